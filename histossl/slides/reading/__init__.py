"""One file becomes a `Slide`: pixels of any region at any scale, through OpenSlide, tifffile or Pillow."""
