"""Stage `scan`: look through an archive before any GPU time is spent on it."""

from histossl.slides.files import SlideFile, find_slides

__all__ = ["SlideFile", "find_slides"]
