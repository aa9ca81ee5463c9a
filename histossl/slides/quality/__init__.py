"""What of a slide is worth a tile: tissue, cover-slip edges, focus and colour, the stain family."""
