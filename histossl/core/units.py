"""Microns, level-0 pixels and tile pixels, and the converters between them, so that no other file multiplies by mpp.

Frames: `_um` microns on the glass; `_l0` pixels of the slide's finest level; `_px` pixels of a tile.
`mpp` is microns per pixel; `mpp_l0` that of level 0, `mpp` that of the tiles.
"""


def um_from_l0(length_l0: float, mpp_l0: float) -> float:
    return length_l0 * mpp_l0


def l0_from_um(length_um: float, mpp_l0: float) -> float:
    return length_um / mpp_l0


def um_from_px(length_px: float, mpp: float) -> float:
    return length_px * mpp


def l0_from_px(length_px: float, mpp: float, mpp_l0: float) -> float:
    """A length in tile pixels at `mpp`, as level-0 pixels of a slide scanned at `mpp_l0`."""
    return l0_from_um(um_from_px(length_px, mpp), mpp_l0)
