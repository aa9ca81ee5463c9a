"""A region image, PNG or JPEG: one level, decoded whole on the first read, white where it is transparent."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from histossl.core.errors import SlideError
from histossl.slides.reading.integrity import image_damage
from histossl.slides.reading.mpp import Scale
from histossl.slides.reading.tifffile_backend import blaming

MAX_PLAIN_PX = 25 << 20  # 5,120 x 5,120: it is decoded whole, at 7 to 13 bytes per pixel
BAND = 256  # rows of it turned into RGB at a time
EXIF_ORIENTATION = 0x0112


class PlainLevels:
    """A PNG or JPEG region: one level, decoded whole on the first read."""

    in_strips = False

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pixels: NDArray[np.uint8] | None = None
        with blaming(path, "opening it as an image"), self._image() as image:
            width, height = int(image.width), int(image.height)
            # Of a JPEG only: asked for a PNG's, Pillow decodes the whole picture.
            self.orientation = image.getexif().get(EXIF_ORIENTATION, 1) if image.format == "JPEG" else 1
            self.dpi = image.info.get("dpi")
        self.sizes: tuple[tuple[int, int], ...] = ((width, height),)
        if width * height > MAX_PLAIN_PX:
            raise SlideError(
                f"{path.name}: {width} x {height} px are too many for a plain image, which is decoded whole (at most "
                f"{MAX_PLAIN_PX / 1e6:.0f} million); make it a tiled TIFF: "
                f"vips tiffsave {path.name} {path.stem}.tif --tile --pyramid --compression jpeg --Q 90"
            )

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
            with blaming(self.path, "decoding it"), self._image() as image:
                damage = image_damage(self.path, str(image.format), image.mode)
                if damage:
                    raise SlideError(f"{self.path.name}: damaged ({damage}); copy or download it again")
                pixels = np.empty((image.height, image.width, 3), dtype=np.uint8)
                # Band by band: Pillow's copies on the way to RGB are each as large as what they are made of.
                for top in range(0, image.height, BAND):
                    bottom = min(top + BAND, image.height)
                    pixels[top:bottom] = _rgb(image.crop((0, top, image.width, bottom)))
            self._pixels = pixels
        return self._pixels

    def close(self) -> None:
        self._pixels = None


def _rgb(image: Image.Image) -> NDArray[np.uint8]:
    """Any image as (h, w, 3), what is transparent over white."""
    if image.mode.startswith("I;16") or image.mode == "I":
        grey = (np.asarray(image).astype(np.uint32) // 257).clip(0, 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return np.asarray(Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba))[..., :3]
    return np.asarray(image.convert("RGB"))
