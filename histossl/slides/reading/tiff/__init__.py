"""The inside of a TIFF: which image is the slide, where its tiles lie, what their bytes mean, what is damaged.

In: pages as tifffile lists them. Out: RGB of 8 bits, or a SlideError that says what is wrong with the file.
"""
