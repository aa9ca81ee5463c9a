"""A view's colours: stain jitter in optical density, all linear colour work as one 3x4 matrix a tile, solarize.

Everything linear in RGB (brightness, contrast, saturation, hue, greyscale) is x -> M x + t, and is applied once. Two
things differ from a chain of torchvision's transforms, on purpose:

* values are clamped to [0, 1] once, at the end, and not after each op, so a bright background that one op pushes past
  white can be brought back by the next, and the order of the four ops makes no difference;
* hue turns the colour plane of YIQ, which is linear and keeps every grey and the luma as they are; torchvision turns
  the hue angle of HSV, which keeps the largest and the smallest of RGB and so makes haematoxylin lighter or darker too.
  The same way round; at 0.05 the colours of stained tissue differ by some 6 of 255 levels for it.

Shapes: B tiles; matrices are (B, 3, 3), offsets (B, 3).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from histossl.tiles.stream.sampler import Ints
from histossl.views.rng import Floats

LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R 601, as Pillow's "L" and torchvision's greyscale
YIQ_FROM_RGB = np.array([LUMA, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
RGB_FROM_YIQ = np.linalg.inv(YIQ_FROM_RGB)
TO_LUMA = np.tile(LUMA, (3, 1))  # every channel becomes the luma

# Optical density per unit of haematoxylin, eosin and DAB in R, G, B (Ruifrok and Johnston 2001, as printed there).
OD_FROM_HED = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
HED_FROM_OD = np.linalg.inv(OD_FROM_HED)
DARKEST = 1 / 255  # optical density of a black pixel: that of the darkest grey


# ---- linear


def jitter_matrices(brightness: Floats, contrast: Floats, saturation: Floats, hue: Floats) -> Floats:
    """(B, 2, 3, 3): M and N of x -> M x + N mean(x), for B sets of factors.

    Brightness b: b x. Contrast c: c x + (1 - c) times the mean luma of the image. Saturation s: s x + (1 - s) luma(x).
    Hue h: a turn of the colour plane by h of a full circle (-0.5..0.5). The order, which torchvision draws at random,
    changes nothing here: contrast acts on luma and colour alike, saturation and hue on colour alone, and no clamp comes
    between them.
    """
    angle = -2 * np.pi * hue  # red towards yellow, as in HSV
    turn = np.zeros((len(hue), 3, 3))
    turn[:, 0, 0] = 1
    turn[:, 1, 1] = turn[:, 2, 2] = np.cos(angle)
    turn[:, 1, 2], turn[:, 2, 1] = -np.sin(angle), np.sin(angle)
    b, c, s = (factor[:, None, None] for factor in (brightness, contrast, saturation))
    turned = RGB_FROM_YIQ @ turn @ YIQ_FROM_RGB
    return np.stack([b * c * (s * turned + (1 - s) * TO_LUMA), b * (1 - c) * TO_LUMA], 1)


def greyscale(matrices: Floats, chosen: Ints) -> Floats:
    """The same, made grey afterwards for the chosen samples."""
    out = matrices.copy()
    out[chosen] = TO_LUMA @ out[chosen]
    return out


def recoloured(x: Tensor, matrices: Tensor, out: Tensor | None = None) -> Tensor:
    """x (B, 3, H, W) under matrices (B, 2, 3, 3); clamped to [0, 1]. Written to `out`, where given."""
    flat = x.reshape(len(x), 3, -1)
    # Rows first: a sum that many threads share would depend on how many, and on the batch.
    offset = matrices[:, 1] @ x.mean(3).mean(2, keepdim=True)
    out = torch.empty_like(x) if out is None else out
    torch.baddbmm(offset, matrices[:, 0], flat, out=out.view(len(x), 3, -1))
    return out.clamp_(0, 1)


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
    """x (B, 3, H, W) in [0, 1] with its stains changed; clamped to [0, 1] at the end. Overwrites x."""
    minus_od = x.clamp_(min=DARKEST).log_().view(len(x), 3, -1)
    return torch.baddbmm(-b[:, :, None], A, minus_od).exp_().clamp_(max=1).view_as(x)


# ---- the rest


def solarized(x: Tensor, threshold: float) -> Tensor:
    """Pixels at or above the threshold are inverted (torchvision and Pillow: 128 of 255)."""
    return torch.where(x >= threshold, 1 - x, x)
