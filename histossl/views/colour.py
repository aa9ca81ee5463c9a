"""A view's colours: stain jitter in optical density, all linear colour work as one 3x4 matrix a tile, solarize, JPEG.

Everything linear in RGB (brightness, contrast, saturation, hue, greyscale) is x -> M x + t, and is applied once. Two
things differ from a chain of torchvision's transforms, on purpose:

* values are clamped to [0, 1] once, at the end, and not after each op, so a bright background that one op pushes past
  white can be brought back by the next;
* hue turns the colour plane of YIQ, which keeps every grey and the luma as they are and is linear; torchvision turns
  the hue angle of HSV, which keeps max and min of RGB. For the small angles in use the two nearly agree.

Shapes: B tiles; matrices are (B, 3, 3), offsets (B, 3).
"""

from __future__ import annotations

import itertools

import numpy as np
import simplejpeg
import torch
from torch import Tensor

from histossl.tiles.sampling import Ints
from histossl.views.draws import Floats

LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R 601, as Pillow's "L" and torchvision's greyscale
YIQ_FROM_RGB = np.array([LUMA, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
RGB_FROM_YIQ = np.linalg.inv(YIQ_FROM_RGB)
ORDERS = np.array(list(itertools.permutations(range(4))))  # of brightness, contrast, saturation, hue

# Optical density per unit of haematoxylin, eosin and DAB in R, G, B (Ruifrok and Johnston 2001, as printed there).
OD_FROM_HED = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
HED_FROM_OD = np.linalg.inv(OD_FROM_HED)
DARKEST = 1 / 255  # optical density of a black pixel: that of the darkest grey


# ---- linear


def jitter_matrices(brightness: Floats, contrast: Floats, saturation: Floats, hue: Floats, order: Ints) -> Floats:
    """(B, 2, 3, 3): M and N of x -> M x + N mean(x), for B sets of factors and a row of `ORDERS` for each.

    Brightness b: b x. Contrast c: c x + (1 - c) times the mean luma of the image as the ops before left it.
    Saturation s: s x + (1 - s) luma(x). Hue h: a turn of the colour plane by h of a full circle (-0.5..0.5).
    Contrast's offset is linear in the image's mean colour, so the mean of the *unchanged* view is all that is needed.
    """
    count, eye, luma = len(brightness), np.eye(3), np.tile(LUMA, (3, 1))  # luma: every channel becomes the luma
    angle = -2 * np.pi * hue  # red towards yellow, as in HSV
    turn = np.zeros((count, 3, 3))
    turn[:, 0, 0] = 1
    turn[:, 1, 1] = turn[:, 2, 2] = np.cos(angle)
    turn[:, 1, 2], turn[:, 2, 1] = -np.sin(angle), np.sin(angle)
    b, c, s = (factor[:, None, None] for factor in (brightness, contrast, saturation))
    linear = np.stack([b * eye, c * eye, s * eye + (1 - s) * luma, RGB_FROM_YIQ @ turn @ YIQ_FROM_RGB], 1)
    of_mean = np.zeros_like(linear)  # what is taken of the current mean: only contrast takes any
    of_mean[:, 1] = (1 - c) * luma
    M, N = np.tile(eye, (count, 1, 1)), np.zeros((count, 3, 3))
    for place in range(4):
        op = (np.arange(count), ORDERS[order][:, place])
        # The current mean is (M + N) mean(x).
        M, N = linear[op] @ M, linear[op] @ N + of_mean[op] @ (M + N)
    return np.stack([M, N], 1)


def greyscale(matrices: Floats, chosen: Ints) -> Floats:
    """The same, made grey afterwards for the chosen samples."""
    luma = np.tile(LUMA, (3, 1))
    out = matrices.copy()
    out[chosen] = luma @ out[chosen]
    return out


def recoloured(x: Tensor, matrices: Tensor) -> Tensor:
    """x (B, 3, H, W) under matrices (B, 2, 3, 3); clamped to [0, 1]."""
    flat = x.reshape(len(x), 3, -1)
    offset = matrices[:, 1] @ flat.mean(2, keepdim=True)
    return torch.baddbmm(offset, matrices[:, 0], flat).clamp_(0, 1).view_as(x)


# ---- stain


def stain_matrices(scale: Floats, shift: Floats) -> tuple[Floats, Floats]:
    """A (B, 3, 3) and b (B, 3) of OD -> A OD + b, for stains multiplied by 1 + `scale` and then moved by `shift`.

    Both are (B, 3) for haematoxylin, eosin, DAB. OD is -ln(RGB), in nats, so a shift of d in haematoxylin changes
    ln RGB by exactly -d [0.65, 0.70, 0.29], whatever a library's "HED units" are: scikit-image's are 13.8 nats, those
    of Tellez-era code (which adds 2 to the colours) no optical density at all. Stains are not clamped, so that 0 and 0
    are the identity for every colour.
    """
    into, back = HED_FROM_OD.T, OD_FROM_HED.T  # acting on column vectors
    return back @ ((1 + scale)[:, :, None] * into), shift @ OD_FROM_HED


def restained(x: Tensor, A: Tensor, b: Tensor) -> Tensor:
    """x (B, 3, H, W) in [0, 1] with its stains changed; clamped to [0, 1] at the end."""
    minus_od = x.clamp(min=DARKEST).log_().reshape(len(x), 3, -1)
    return torch.baddbmm(-b[:, :, None], A, minus_od).exp_().clamp_(max=1).view_as(x)


# ---- the rest


def solarized(x: Tensor, threshold: float) -> Tensor:
    """Pixels at or above the threshold are inverted (torchvision and Pillow: 128 of 255)."""
    return torch.where(x >= threshold, 1 - x, x)


def recompressed(tiles: Tensor, quality: Ints) -> Tensor:
    """tiles (B, 3, H, W) uint8, each once more through JPEG of its own quality, with halved chroma as scanners do.

    On the CPU, a tile at a time (0.7 ms for 256 px): the price of asking for this op.
    """
    pixels = tiles.permute(0, 2, 3, 1).cpu().contiguous().numpy()
    out = np.empty_like(pixels)
    for place, q in enumerate(quality):
        jpeg = simplejpeg.encode_jpeg(pixels[place], int(q), colorsubsampling="420")
        simplejpeg.decode_jpeg(jpeg, "RGB", buffer=out[place])
    return torch.from_numpy(out).permute(0, 3, 1, 2).to(tiles.device)
