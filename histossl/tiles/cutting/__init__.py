"""One slide in, one zip of tiles out: copied, stitched or read, whichever is cheapest and true."""
