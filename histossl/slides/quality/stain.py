"""Guess a slide's stain family from its tissue's colours, so that an IHC slide among H&E is seen before training."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from histossl.slides.quality.tissue import Image, Mask, is_darkfield, is_grey, optical_density

HE, IHC, OTHER, UNKNOWN = "H&E", "IHC", "fluorescence/other", "unknown"
STAINED = 0.1  # optical density from which a pixel's colour means something


@dataclass(frozen=True)
class Stain:
    """`purple`, `brown`, `blue`: shares of the stained tissue that absorb green, blue or red most."""

    family: str
    purple: float = 0.0
    brown: float = 0.0
    blue: float = 0.0

    @property
    def figures(self) -> str:
        if not self.purple + self.brown + self.blue:
            return ""
        return f"purple {self.purple:.2f} brown {self.brown:.2f} blue {self.blue:.2f}"


def stain_of(thumbnail: Image, tissue: Mask) -> Stain:
    """Haematoxylin with eosin absorbs green most, DAB blue most; a blue counterstain absorbs red as much as green."""
    if is_darkfield(thumbnail):
        return Stain(OTHER)
    if is_grey(thumbnail):
        return Stain(UNKNOWN)
    density = optical_density(thumbnail)[tissue]
    stained: NDArray[np.float32] = density[density.mean(axis=1) > STAINED]
    if len(stained) < 100:
        return Stain(UNKNOWN)
    red, green, blue = stained.T
    is_brown = (blue > 1.05 * green) & (green > 1.15 * red)
    is_blue = (red > 0.92 * green) & (green > 1.1 * blue) & ~is_brown
    is_purple = (green > blue) & (green > red) & ~is_blue
    shares = Stain("", float(is_purple.mean()), float(is_brown.mean()), float(is_blue.mean()))
    return Stain(_family(shares), shares.purple, shares.brown, shares.blue)


def _family(stain: Stain) -> str:
    # Blood is brownish in H&E too; DAB stands on a blue counterstain, or covers most of the tissue.
    if stain.brown > 0.6 or (stain.brown > 0.02 and stain.blue > 0.3) or stain.blue > 0.7:
        return IHC
    if stain.purple > 0.6:
        return HE
    return UNKNOWN
