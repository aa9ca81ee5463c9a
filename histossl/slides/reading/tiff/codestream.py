"""What a JPEG or JPEG 2000 says of itself: its components, their bits, and whether they are RGB or YCbCr.

A TIFF says it too, in a tag, and the two contradict each other in real files. libtiff and OpenSlide trust the tag;
every other decoder trusts the codestream. Where neither is certain, the pixels decide: stained tissue on glass that is
stored as RGB is no possible YCbCr.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

RGB, YCBCR, CMYK = "RGB", "YCBCR", "CMYK"

_SOS, _APP0, _APP1, _APP14 = 0xDA, 0xE0, 0xE1, 0xEE
_NOT_FRAMES = (0xC4, 0xC8, 0xCC)  # of C0-CF: Huffman tables, reserved, arithmetic conditioning
_LOSSLESS = (0xC3, 0xC7, 0xCB, 0xCF)
_J2K_START, _J2K_COD, _J2K_TILE = b"\xff\x4f\xff\x51", b"\xff\x52", b"\xff\x90"
_COLOUR_BOX = {16: RGB, 18: RGB}  # sRGB, and sYCC, which the decoder turns into RGB by itself

IMPOSSIBLE = 16  # grey levels outside 0-255: more than the rounding of a JPEG makes of a possible colour
MOSTLY, HARDLY, SOME = 0.25, 0.02, 0.25  # shares of pixels
NEUTRAL, APART = 32, 48  # grey levels from 128: of chroma that is faint, of luma that is not in the middle


@dataclass(frozen=True)
class Codestream:
    bits: int  # per sample
    sampling: tuple[tuple[int, int], ...]  # of each component, horizontally and vertically
    said: str = ""  # RGB, YCBCR or CMYK where it says so; RGB, too, where its decoder makes that of it
    boxed: bool = False  # JPEG 2000 in a JP2 file
    lossless: bool = False  # of a JPEG: another process, which few decoders know

    @property
    def components(self) -> int:
        return len(self.sampling)

    @property
    def subsampled(self) -> bool:
        return len(set(self.sampling)) > 1

    def in_doubt(self, tag: str) -> bool:
        """Whether the pixels should be asked: it does not say what the file's tag says."""
        return self.components == 3 and self.said != tag and not (self.subsampled and self.said)

    def colours(self, tag: str, by_pixels: str = "") -> str:
        """RGB or YCBCR, for three components; `by_pixels` as `colours_by_pixels` finds them."""
        if self.subsampled and self.said:
            return YCBCR  # hardly anybody leaves out green and blue
        return tag if self.said == tag else by_pixels or self.said or tag


def read_jpeg(data: bytes) -> Codestream | None:
    """None if no frame header is found. libjpeg's rules, except where two of its signs contradict each other."""
    adobe, jfif, frame, lossless = -1, False, b"", False
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        if marker == _SOS:
            break
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        body = data[position + 4 : end]
        if (marker, body[:5]) == (_APP0, b"JFIF\0") or (marker, body[:6]) == (_APP1, b"Exif\0\0"):
            jfif = True
        elif marker == _APP14 and body[:5] == b"Adobe" and len(body) >= 12:
            adobe = body[11]
        elif 0xC0 <= marker <= 0xCF and marker not in _NOT_FRAMES and len(body) >= 9:
            frame, lossless = body, marker in _LOSSLESS
        position = end
    if not frame:
        return None
    parts = frame[6 : 6 + 3 * frame[5]]
    signs = {RGB} if adobe == 0 or parts[::3] == b"RGB" else set()
    signs |= {YCBCR} if adobe == 1 or jfif else set()
    if frame[5] == 4:
        signs = {CMYK} if adobe >= 0 else set()
    sampling = tuple((both >> 4, both & 15) for both in parts[1::3])
    signs |= {YCBCR} if frame[5] == 3 and len(set(sampling)) > 1 else set()
    return Codestream(frame[0], sampling, signs.pop() if len(signs) == 1 else "", lossless=lossless)


def read_jpeg_2000(data: bytes) -> Codestream | None:
    """None if no codestream begins in `data`."""
    start = data.find(_J2K_START)
    count = int.from_bytes(data[start + 40 : start + 42], "big")
    parts = data[start + 42 : start + 42 + 3 * count]
    if start < 0 or not count or len(parts) < 3 * count:
        return None
    # With the multiple component transform the decoder computes RGB of what is stored.
    transformed = False
    position = start + 2
    while data[position : position + 1] == b"\xff" and data[position : position + 2] != _J2K_TILE:
        if data[position : position + 2] == _J2K_COD:
            transformed = data[position + 8 : position + 9] == b"\1"
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    box = data.find(b"colr", 0, start)
    listed = box >= 0 and data[box + 4] == 1
    said = _COLOUR_BOX.get(int.from_bytes(data[box + 7 : box + 11], "big"), "") if listed else ""
    sampling = tuple(zip(parts[1::3], parts[2::3], strict=True))
    said = YCBCR if len(set(sampling)) > 1 else said or (RGB if transformed else "")
    return Codestream((parts[0] & 127) + 1, sampling, said, boxed=start > 0)


def colours_by_pixels(components: NDArray[Any]) -> str:
    """RGB or YCBCR, of (n, 3) samples of 8 bits as they are stored; "" if they could be either.

    Read as YCbCr, white, black and stains stored as RGB lie far outside the colours there are.
    """
    luma, blue, red = np.asarray(components, np.float32).reshape(-1, 3).T
    if not len(luma):
        return ""
    as_rgb = (luma + 1.402 * (red - 128), luma + 1.772 * (blue - 128))
    outside = np.mean(np.any([(one < -IMPOSSIBLE) | (one > 255 + IMPOSSIBLE) for one in as_rgb], axis=0))
    if outside > MOSTLY:
        return RGB
    faint = (np.abs(blue - 128) < NEUTRAL) & (np.abs(red - 128) < NEUTRAL)
    if outside < HARDLY and np.mean(faint & (np.abs(luma - 128) > APART)) > SOME:
        return YCBCR
    return ""
