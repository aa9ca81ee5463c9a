"""Tiles once more through JPEG, on their own device: the pixels that libjpeg would give back, with no bytes between.

Entropy coding loses nothing, so what a JPEG does to a picture is colours, halved chroma, a DCT, rounding, and all that
backwards. It is done here for a whole batch, each tile at its own quality, and to the bit as Pillow does with
subsampling="4:2:0" (libjpeg-turbo, accurate DCT, fancy upsampling). simplejpeg is the same from quality 96 on; below,
it encodes with a faster, coarser DCT, which moves pixels by about a level.

libjpeg calculates in whole numbers. So do we, in floats: every sum is of multiples of one power of two and fits the
mantissa (24 bits for the colours, 53 for the DCT). The order of adding, the batch, fused operations and the device
therefore change nothing. TF32 and autocast leave float64 alone, and no float32 is multiplied as a matrix.

Shapes: B tiles, H W pixels, both made up to whole blocks of 16; a plane holds the luma (H rows) and below it the halved
chroma, Cb left and Cr right (H/2 rows).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from histossl.tiles.stream.sampler import Ints
from histossl.views.geometry import on

# One pass of the accurate DCT (jfdctint.c), row by frequency: cosines in units of 2**-13 as its butterflies, with
# constants of 13 bits, add up to. The inverse (jidctint.c) is the transpose.
DCT = np.array(
    [
        [8192, 8192, 8192, 8192, 8192, 8192, 8192, 8192],
        [11363, 9633, 6437, 2260, -2260, -6437, -9633, -11363],
        [10703, 4433, -4433, -10703, -10703, -4433, 4433, 10703],
        [9633, -2259, -11362, -6436, 6436, 11362, 2259, -9633],
        [8192, -8192, -8192, 8192, 8192, -8192, -8192, 8192],
        [6437, -11362, 2261, 9633, -9633, -2261, 11362, -6437],
        [4433, -10704, 10704, -4433, -4433, 10704, -10704, 4433],
        [2260, -6436, 9633, -11363, 11363, -9633, 6436, -2260],
    ],
    dtype=np.float64,
)

# Quantisation at quality 50: ITU-T T.81, Annex K.1 and K.2.
LUMA_STEPS = np.array(
    [
        [16, 11, 10, 16, 24, 40, 51, 61],
        [12, 12, 14, 19, 26, 58, 60, 55],
        [14, 13, 16, 24, 40, 57, 69, 56],
        [14, 17, 22, 29, 51, 87, 80, 62],
        [18, 22, 37, 56, 68, 109, 103, 77],
        [24, 35, 55, 64, 81, 104, 113, 92],
        [49, 64, 78, 87, 103, 121, 120, 101],
        [72, 92, 95, 98, 112, 100, 103, 99],
    ]
)
CHROMA_STEPS = np.full((8, 8), 99)
CHROMA_STEPS[:4, :4] = [[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]]

_QUALITY = np.arange(101).clip(1)  # there is no 0
_PERCENT = np.where(_QUALITY < 50, 5000 // _QUALITY, 200 - 2 * _QUALITY)[:, None, None, None]
STEPS = np.clip((np.stack([LUMA_STEPS, CHROMA_STEPS]) * _PERCENT + 50) // 100, 1, 255)
"""(101, 2, 8, 8): the steps of luma and chroma by quality, as libjpeg's jpeg_set_quality scales the standard's."""


def recompressed(tiles: Tensor, quality: Ints) -> Tensor:
    """tiles (B, 3, H, W) uint8, each once more through JPEG of its own quality (1..100), with halved chroma as scanners
    do. Nothing is read back from the device.
    """
    height, width = tiles.shape[2:]
    half = slice(-(-height // 2)), slice(-(-width // 2))
    plane = _coded(_plane(tiles), STEPS[quality])
    tall, wide = plane.shape[1] * 2 // 3, plane.shape[2]
    chroma = plane[:, tall:].view(-1, tall // 2, 2, wide // 2).transpose(1, 2)
    return _rgb(plane[:, :height, :width], _doubled(chroma[:, :, *half])[:, :, :height, :width])


# ---- colours


def _fixed(value: float) -> float:
    """In whole 65536ths, as libjpeg's colour tables."""
    return round(value * 65536) / 65536


def _mixed(one: Tensor, other: Tensor, third: Tensor, weights: tuple[float, float, float], offset: float) -> Tensor:
    a, b, c = map(_fixed, weights)
    return one.mul(a).add_(other, alpha=b).add_(third, alpha=c).add_(offset).floor_()


def _plane(tiles: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) -> (B, 1.5 H, W) float64 around 0, edges repeated until all blocks are whole."""
    height, width = tiles.shape[2:]
    tall, wide = height + -height % 16, width + -width % 16
    red, green, blue = _grown(tiles.contiguous().float(), height + height % 2, wide).unbind(1)
    luma = _mixed(red, green, blue, (0.299, 0.587, 0.114), 0.5 - 128)
    almost_half = 0.5 - 1 / 65536
    cb = _mixed(red, green, blue, (-0.168735892, -0.331264108, 0.5), almost_half)
    cr = _mixed(red, green, blue, (0.5, -0.418687589, -0.081312411), almost_half)
    plane = tiles.new_empty((len(tiles), tall + tall // 2, wide), dtype=torch.float64)
    plane[:, :tall] = _grown(luma, tall, wide)
    for place, full in enumerate((cb, cr)):
        pairs = torch.view_as_complex((full[:, ::2] + full[:, 1::2]).unflatten(2, (-1, 2)))
        # Halves are rounded down and up in turn along a row.
        bias = 0.25 + 0.25 * (torch.arange(wide // 2, device=tiles.device) % 2)
        halved = (pairs.real + pairs.imag).mul_(0.25).add_(bias).floor_()
        plane[:, tall:, place * wide // 2 : (place + 1) * wide // 2] = _grown(halved, tall // 2, wide // 2)
    return plane


def _grown(x: Tensor, height: int, width: int) -> Tensor:
    down, right = height - x.shape[-2], width - x.shape[-1]
    return F.pad(x, (0, right, 0, down), mode="replicate") if down or right else x


def _doubled(chroma: Tensor) -> Tensor:
    """(B, 2, H, W) -> (B, 2, 2 H, 2 W): each from the nearest by 3/4 and the next by 1/4, both ways."""
    x = chroma / 16
    batch, channels, height, width = x.shape
    padded = F.pad(x, (0, 0, 1, 1), mode="replicate")
    rows = x.new_empty((batch, channels, height, 2, width))
    for half, next_row in enumerate((padded[:, :, :-2], padded[:, :, 2:])):
        torch.add(next_row, x, alpha=3, out=rows[:, :, :, half])
    rows = rows.flatten(2, 3)
    padded = F.pad(rows, (1, 1, 0, 0), mode="replicate")
    left, right = (padded[..., beside].add(rows, alpha=3) for beside in (slice(-2), slice(2, None)))
    return torch.view_as_real(torch.complex(left.add_(8 / 16), right.add_(7 / 16))).flatten(3).floor_()


def _rgb(luma: Tensor, chroma: Tensor) -> Tensor:
    luma, (cb, cr) = luma + 128, chroma.unbind(1)
    out = luma.new_empty((len(luma), 3, *luma.shape[1:]), dtype=torch.uint8)
    red = cr.mul(_fixed(1.402))
    green = cb.mul(-_fixed(0.34414)).sub_(cr, alpha=_fixed(0.71414))
    blue = cb.mul(_fixed(1.772))
    for channel, from_luma in enumerate((red, green, blue)):
        out[:, channel] = from_luma.add_(0.5).floor_().add_(luma).clamp_(0, 255)
    return out


# ---- blocks


def _coded(plane: Tensor, steps: NDArray[np.int64]) -> Tensor:
    """A plane (B, 1.5 H, W) with its blocks rounded to whole steps (B, 2, 8, 8), as float32."""
    batch, _, width = plane.shape
    dct = on(plane.device, DCT)
    # Of three parts as tall the upper two are luma.
    step = on(plane.device, steps[:, [0, 0, 1], None].astype(np.float64)).repeat(1, 1, 1, 1, width // 8)

    def along_rows(x: Tensor, matrix: Tensor) -> Tensor:
        return torch.mm(x.view(-1, 8), matrix).add_(0.5).floor_()

    def along_columns(x: Tensor, matrix: Tensor) -> Tensor:
        return torch.matmul(matrix, x.view(-1, 8, width)).add_(0.5).floor_()

    # libjpeg keeps two more bits between the passes, and coefficients are 8 times as large as in the standard.
    x = along_rows(plane, dct.T / 2**11)
    x = along_columns(x, dct / 2**15).view(batch, 3, -1, 8, width)
    # Halves away from 0: what a hair more turns into a half is one.
    x.mul_((1 + 2**-40) / 8 / step).round_().mul_(step)
    x = along_columns(x, dct.T / 2**11)
    return along_rows(x, dct / 2**18).clamp_(-128, 127).float().view(plane.shape)
