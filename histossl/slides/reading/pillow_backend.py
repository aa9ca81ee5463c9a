"""A region image, PNG or JPEG: one level, decoded whole on the first read, white where it is transparent."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from histossl.core.errors import SlideError
from histossl.slides.reading.mpp import Scale
from histossl.slides.reading.tiff.codestream import RGB, colours_by_pixels, read_jpeg
from histossl.slides.reading.tiff.integrity import image_damage
from histossl.slides.reading.tiff.samples import find_range, in_range, over_white
from histossl.slides.reading.tifffile_backend import blaming

MAX_PLAIN_PX = 25 << 20  # 5,120 x 5,120: it is decoded whole, at 7 to 13 bytes per pixel, 19 in 16 bits
HEADER_BYTES = 1 << 20  # within which a JPEG says what it holds
BAND = 256  # rows of it turned into RGB at a time
EXIF_ORIENTATION = 0x0112
EXIF_IN_PNG = {"exif", "Raw profile type exif"}


class PlainLevels:
    """A PNG or JPEG region: one level, decoded whole on the first read."""

    in_strips = False

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pixels: NDArray[np.uint8] | None = None
        self.notes: list[str] = []
        self._unmarked = self._read_header()
        with blaming(path, "opening it as an image"), self._image() as image:
            width, height = int(image.width), int(image.height)
            self._kind = "PNG" if image.format == "PNG" else "JPEG"  # also of what cameras make of several JPEGs
            # Of a PNG's colours in 16 bits Pillow keeps the upper 8, which is little of 12.
            self._deep = self._kind == "PNG" and _png_depth(path) == 16
            # Asked for what a PNG does not tell in front, Pillow decodes the whole picture.
            told = self._kind == "JPEG" or EXIF_IN_PNG & image.info.keys()
            self.orientation = image.getexif().get(EXIF_ORIENTATION, 1) if told else 1
            self.dpi = image.info.get("dpi")
            pictures = int(getattr(image, "n_frames", 1))
            self.notes += [f"holds {pictures} pictures: the first is read"] if pictures > 1 else []
        self.sizes: tuple[tuple[int, int], ...] = ((width, height),)
        if width * height > MAX_PLAIN_PX:
            raise SlideError(
                f"{path.name}: {width} x {height} px are too many for a plain image, which is decoded whole (at most "
                f"{MAX_PLAIN_PX / 1e6:.0f} million); make it a tiled TIFF: "
                f"vips tiffsave {path.name} {path.stem}.tif --tile --pyramid --compression jpeg --Q 90"
            )
        if self._deep or self._unmarked:
            self._decoded()  # what its range is, or its colours, can be told only then

    def _read_header(self) -> bool:
        """Whether nothing in a JPEG says that it holds RGB or YCbCr. SlideError if it is of a kind that is not read."""
        with blaming(self.path, "opening it as an image"), self.path.open("rb") as file:
            stream = read_jpeg(file.read(HEADER_BYTES))  # of a PNG None
        if stream is None:
            return False
        if stream.bits != 8 or stream.lossless:
            kind = "lossless JPEG" if stream.lossless else f"JPEG of {stream.bits} bits per sample"
            raise SlideError(f"{self.path.name}: a {kind}, which is not read; convert it to PNG or a usual JPEG")
        return stream.components == 3 and not stream.subsampled and not stream.said

    def _image(self) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is our own
            return Image.open(self.path, formats=("PNG", "JPEG"))

    def downsamples(self) -> tuple[float, ...]:
        return (1.0,)

    def scale(self) -> Scale | None:
        return None  # dots per inch in a PNG or JPEG are a screen's or a printer's

    def read_level(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        assert level == 0, level
        pixels = self._decoded()
        out = np.full((height, width, 3), 255, dtype=np.uint8)
        left, top = max(x, 0), max(y, 0)
        right, bottom = min(x + width, pixels.shape[1]), min(y + height, pixels.shape[0])
        if left < right and top < bottom:
            out[top - y : bottom - y, left - x : right - x] = pixels[top:bottom, left:right]
        return out

    def _decoded(self) -> NDArray[np.uint8]:
        if self._pixels is None:
            width, height = self.sizes[0]
            pixels = np.empty((height, width, 3), dtype=np.uint8)
            with blaming(self.path, "decoding it"), self._bands() as bands:
                # Band by band: copies on the way to RGB are each as large as what they are made of.
                for top in range(0, height, BAND):
                    pixels[top : top + BAND] = bands(top, min(top + BAND, height))
            self._pixels = pixels
        return self._pixels

    @contextmanager
    def _bands(self) -> Iterator[Callable[[int, int], NDArray[np.uint8]]]:
        """Gives the RGB of rows from one to before another."""
        if self._deep:
            yield self._deep_bands()
            return
        with self._image() as image:
            damage = image_damage(self.path, self._kind, image.mode)
            if damage:
                raise SlideError(f"{self.path.name}: damaged ({damage}); copy or download it again")
            if self._unmarked:
                stored = imagecodecs.jpeg_decode(self.path.read_bytes(), colorspace=RGB, outcolorspace=RGB)
                if colours_by_pixels(stored[::4, ::4]) == RGB:
                    self.notes.append("nothing but its pixels says whether it holds RGB or YCbCr: read as RGB")
                    yield lambda top, bottom: stored[top:bottom]
                    return
            yield lambda top, bottom: _rgb(image.crop((0, top, image.width, bottom)))

    def _deep_bands(self) -> Callable[[int, int], NDArray[np.uint8]]:
        stored = np.asarray(imagecodecs.png_decode(self.path.read_bytes()))
        stored = stored.reshape(*stored.shape[:2], -1)
        count = stored.shape[2] - (stored.shape[2] in (2, 4))
        found = find_range(16, 16, (), [stored[::4, ::4, :count].ravel()])
        self.notes += [found.note] if found.note else []

        def rgb(top: int, bottom: int) -> NDArray[np.uint8]:
            colour = in_range(stored[top:bottom, :, :count], found.white)
            if count < stored.shape[2]:
                colour = over_white(colour, in_range(stored[top:bottom, :, count:], 65535))
            return np.repeat(colour, 3, axis=2) if count == 1 else colour

        return rgb

    def close(self) -> None:
        self._pixels = None


def _png_depth(path: Path) -> int:
    """Bits per sample: the header is always the first thing in the file."""
    with path.open("rb") as file:
        return file.read(25)[24]


def _rgb(image: Image.Image) -> NDArray[np.uint8]:
    """Any image as (h, w, 3), what is transparent over white."""
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return np.asarray(Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba))[..., :3]
    return np.asarray(image.convert("RGB"))
