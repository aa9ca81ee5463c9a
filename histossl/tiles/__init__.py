"""Slides become tiles: one zip of JPEG tiles per slide (cutting/), kept (store/) and read (stream/)."""
