"""Which places of a slide's grid become tiles. `scan` counts with it what `tile` cuts with it, so that they agree.

A place is judged on the thumbnail first (regions, tissue, folds, ink), then by its own pixels (colour, focus, ink).
Each counts for the first filter that turns it down.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from histossl.core.config import TissueConfig
from histossl.core.units import um_from_l0
from histossl.slides.annotations import MIN_INSIDE, read_regions
from histossl.slides.grid import Grid
from histossl.slides.quality.focus import out_of_focus, without_colour
from histossl.slides.quality.tissue import (
    InkFinder,
    TissueMask,
    fold_mask,
    glass_colour,
    highest,
    lowest,
    readable_thumbnail,
    tissue_and_ink,
)
from histossl.slides.reading.slide import Slide

Ints = npt.NDArray[np.int64]
Pixels = npt.NDArray[np.uint8]
Bools = npt.NDArray[np.bool_]

# Filters in the order in which they judge; what they say of a place, and the option that moves them.
FILTERS = {
    "region": ("lie outside the regions", "--regions"),
    "tissue": ("have less than {min_tissue:.0%} tissue", "--min-tissue"),
    "fold": ("are folded", "--max-fold"),
    "ink": ("have more than {max_ink:.0%} pen ink", "--max-ink"),
    "saturation": ("have no colour", "--min-saturation 0 keeps them"),
    "blur": ("are out of focus", "--min-sharpness 0 keeps them"),
    "damaged": ("are damaged", ""),
}


def left_out(counts: Mapping[str, int], tissue: Mapping[str, float]) -> str:
    """What turned places down and by which option it can be moved, the filter that took most of them first."""
    limits = {"max_ink": 1.0, **tissue}  # a store from before that filter has none
    taken = sorted(((counts.get(name) or 0, name) for name in FILTERS), key=lambda one: -one[0])
    told = [(count, *FILTERS[name]) for count, name in taken if count]
    return ", ".join(f"{count} {said.format(**limits)}" + (f" ({way})" if way else "") for count, said, way in told)


@dataclass(frozen=True)
class Wanted:
    """Places of a grid to be cut (columns of equal length), and how many others each filter turned down."""

    places: Ints
    x_l0: Ints
    y_l0: Ints
    tissue: npt.NDArray[np.float64]
    regions: npt.NDArray[np.uint16]
    rejected: dict[str, int]


class PlaceFilter:
    """The filters of one slide. `handle_spent`: `slide` met damage and has to be opened again."""

    def __init__(
        self, slide: Slide, open_again: Callable[[], Slide], limits: TissueConfig, regions: Path | None
    ) -> None:
        found = readable_thumbnail(slide, open_again, limits.tissue_um)
        self.limits, self.thumbnail = limits, found.pixels
        self.handle_spent, self.unreadable_share = found.handle_spent, float(found.unreadable.mean())
        thumbnail, downsample = found.pixels, found.downsample
        mask, ink = tissue_and_ink(thumbnail, um_from_l0(downsample, slide.mpp_l0), limits)
        self.seen = TissueMask(mask, downsample)
        # What the thumbnail could not show counts as tissue: cutting will tell exactly which tiles are damaged.
        mask = mask | found.unreadable
        self.tissue = TissueMask(mask, downsample)
        self.ink = TissueMask(ink, downsample) if ink is not None and ink.any() else None
        sought = ink is not None and limits.max_ink < 1
        self.ink_finder = InkFinder(glass_colour(thumbnail)) if sought else None
        self._folds = TissueMask(fold_mask(thumbnail, mask), downsample)
        self.pale = _pale(thumbnail, 3 * limits.min_saturation)
        self.region_names: list[str] = []
        self._regions: list[TissueMask] = []
        if regions is not None:
            drawn = read_regions(regions, slide.size_l0, slide.bounds_l0).masks(mask.shape, downsample)
            self._regions = [TissueMask(each, downsample) for each in drawn.values()]
            self.region_names = list(drawn)

    @property
    def drawn(self) -> Bools | None:
        """Where regions are, on the thumbnail; None without any file of them."""
        if not self._regions:
            return None
        result: Bools = np.logical_or.reduce([each.mask for each in self._regions])
        return result

    def wanted(self, grid: Grid) -> Wanted:
        """What the filters of the thumbnail leave."""
        limits, side_l0 = self.limits, grid.side_l0
        places = np.arange(grid.num_places)
        x_l0, y_l0 = grid.corners_l0(places)
        tissue = self.tissue.share(x_l0, y_l0, side_l0)
        regions = np.zeros(len(places), np.uint16)
        inside = np.ones(len(places), bool)
        if self._regions:
            shares = np.stack([each.share(x_l0, y_l0, side_l0) for each in self._regions])
            inside = shares.sum(axis=0) >= MIN_INSIDE
            regions = np.where(inside, shares.argmax(axis=0) + 1, 0).astype(np.uint16)
        enough = tissue >= limits.min_tissue
        flat = self._folds.share(x_l0, y_l0, side_l0) <= limits.max_fold
        clean = np.ones(len(places), bool)
        if self.ink is not None:
            clean = self.ink.share(x_l0, y_l0, side_l0) <= limits.max_ink
        kept = inside & enough & flat & clean
        return Wanted(
            places=places[kept],
            x_l0=x_l0[kept],
            y_l0=y_l0[kept],
            tissue=tissue[kept],
            regions=regions[kept],
            rejected={
                "region": int((~inside).sum()),
                "tissue": int((inside & ~enough).sum()),
                "fold": int((inside & enough & ~flat).sum()),
                "ink": int((inside & enough & flat & ~clean).sum()),
            },
        )

    def poor(self, pixels: Pixels) -> str:
        """The filter of colour or focus that turns a tile (h, w, 3) down; empty if none does."""
        if self.limits.min_saturation > 0 and without_colour(pixels, self.limits.min_saturation):
            return "saturation"
        if self.limits.min_sharpness > 0 and out_of_focus(pixels, self.limits.min_sharpness):
            return "blur"
        return ""

    def inked(self, pixels: Pixels, mpp: float) -> bool:
        """Whether a tile (h, w, 3) shows more ink than is allowed."""
        return self.ink_finder is not None and self.ink_finder.share(pixels, mpp) > self.limits.max_ink


def _pale(thumbnail: Pixels, limit: float) -> Bools:
    """Where colour saturation is below a limit."""
    high = highest(thumbnail)
    pale: Bools = (high - lowest(thumbnail)) < np.float32(limit) * np.maximum(high, 1)
    return pale
