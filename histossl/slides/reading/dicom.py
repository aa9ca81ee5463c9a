"""Check that a DICOM slide's frames hold the colours that its PhotometricInterpretation names: OpenSlide trusts it."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import imagecodecs
import numpy as np

from histossl.core.errors import SlideError
from histossl.slides.reading.tiff.codestream import RGB, YCBCR, colours_by_pixels, read_jpeg, read_jpeg_2000

JPEG_SYNTAX, JPEG_2000_SYNTAXES = "1.2.840.10008.1.2.4.50", ("1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91")
NAMES = {RGB: "RGB", YCBCR: "YBR_FULL_422"}
FRAMES = 4  # looked at
SEARCHED = 256 << 20  # bytes from the file's start: tables of frames come before the pixels
_PIXELS = b"\xe0\x7f\x10\x00OB\x00\x00\xff\xff\xff\xff"  # encapsulated: fragments, each an item
_ITEM = b"\xfe\xff\x00\xe0"


def check_frame_colours(path: Path, properties: Mapping[str, str]) -> str:
    """What a row should say of the colours, "" if they are sure; SlideError where OpenSlide would show wrong ones."""
    syntax, named = properties.get("dicom.TransferSyntaxUID"), properties.get("dicom.PhotometricInterpretation", "")
    if syntax != JPEG_SYNTAX and syntax not in JPEG_2000_SYNTAXES:
        return ""
    tag = YCBCR if named.startswith("YBR_FULL") else RGB
    frames = list(_frames(path))
    streams = [read_jpeg(each) if syntax == JPEG_SYNTAX else read_jpeg_2000(each) for each in frames]
    doubtful = [frame for frame, each in zip(frames, streams, strict=True) if each is not None and each.in_doubt(tag)]
    found = []
    for frame in doubtful:
        with suppress(Exception):  # a damaged frame is OpenSlide's to tell
            if syntax == JPEG_SYNTAX:
                stored = imagecodecs.jpeg8_decode(frame, colorspace=RGB, outcolorspace=RGB)
            else:
                stored = imagecodecs.jpeg2k_decode(frame)
            found.append(np.asarray(stored).reshape(-1, 3))
    by_pixels = colours_by_pixels(np.concatenate(found)) if found else ""
    for each in streams:
        if each is not None and each.components == 3 and each.colours(tag, by_pixels) != tag:
            held = each.colours(tag, by_pixels)
            raise SlideError(
                f"{path.name}: its frames hold {'RGB' if held == RGB else 'YCbCr'}, its PhotometricInterpretation says "
                f"{named}, so that OpenSlide would show wrong colours; correct it: "
                f"dcmodify -m PhotometricInterpretation={NAMES[held]} {path.name}"
            )
    return f"nothing tells for sure whether its frames hold {named}" if doubtful and not by_pixels else ""


def _frames(path: Path) -> Iterator[bytes]:
    """The first fragments of the pixel data: of a slide each is a frame."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        position = data.find(_PIXELS, 0, SEARCHED)
        for number in range(FRAMES + 1 if position >= 0 else 0):
            position += len(_PIXELS) if number == 0 else 0
            if data[position : position + 4] != _ITEM:
                return
            end = position + 8 + int.from_bytes(data[position + 4 : position + 8], "little")
            if number:  # the first is the table of offsets
                yield data[position + 8 : end]
            position = end
