"""Where a view looks on its tile, and one resampling that brings it there.

A view's geometry is a box on the tile, mirrored, turned by quarters, and perhaps rotated freely: one 2x3 matrix a tile
(`matrices`). There are two ways along it. Views along the axes that shrink, or are bicubic, are resampled by rows and
then by columns with the weights of an antialiasing triangle or cubic filter; all others, and so all that are rotated
freely, bilinearly, where the matrix points. Both are what Pillow, and torchvision's `resized_crop(antialias=True)`,
make of the same box, to a hundredth of a grey level; only views that are both rotated and smaller use a Gaussian in
place of the triangle.

Shapes: B tiles, H W tile pixels, O output pixels, T taps of a filter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from histossl.tiles.stream.sampler import Ints
from histossl.views.rng import Draws, Floats

ATTEMPTS = 10  # of a random crop, as torchvision
FILTER_RADIUS = {"bilinear": 1.0, "bicubic": 2.0}


@dataclass(frozen=True)
class Placement:
    """Where B views lie on their tiles. Pixel edges: a box from top 0, of height H, is the whole tile.

    The box is cut out and resized, then mirrored left-right (`mirror`) and top-bottom (`flip`), then turned
    counter-clockwise by `turns` quarters. `angle` (radians, counter-clockwise as seen) rotates it about its centre.
    """

    top: Floats
    left: Floats
    height: Floats
    width: Floats
    mirror: NDArray[np.bool_]
    flip: NDArray[np.bool_]
    turns: Ints
    angle: Floats

    def of(self, rows: slice | Ints) -> Placement:
        return Placement(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))


def random_boxes(
    draws: Draws, tile_px: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[Floats, Floats, Floats, Floats]:
    """top, left, height, width of torchvision's RandomResizedCrop: whole pixels, its distribution number for number.

    Area uniform in `scale`, log aspect uniform in `ratio`, the first of ten attempts that fits the tile; a place
    uniform among those possible. When none fits: the middle, as large as `ratio` allows.
    """
    area = draws.uniform("crop area", scale[0], scale[1], ATTEMPTS) * tile_px**2
    aspect = np.exp(draws.uniform("crop aspect", math.log(ratio[0]), math.log(ratio[1]), ATTEMPTS))
    width, height = np.round(np.sqrt(area * aspect)), np.round(np.sqrt(area / aspect))
    fits = (width >= 1) & (width <= tile_px) & (height >= 1) & (height <= tile_px)
    pick = (np.arange(draws.count), fits.argmax(1))
    narrowest = np.clip(1.0, *ratio)  # the tile is square
    last_width, last_height = min(tile_px, round(tile_px * narrowest)), min(tile_px, round(tile_px / narrowest))
    width = np.where(fits[pick], width[pick], last_width)
    height = np.where(fits[pick], height[pick], last_height)
    top = np.where(fits[pick], np.floor(draws.one("crop top") * (tile_px - height + 1)), (tile_px - height) // 2)
    left = np.where(fits[pick], np.floor(draws.one("crop left") * (tile_px - width + 1)), (tile_px - width) // 2)
    return top, left, height, width


def matrices(where: Placement, size_px: int) -> Floats:
    """(B, 2, 3): takes an output pixel's centre (x, y, 1) to its point (x, y) on the tile, both counted from edges."""
    count = len(where.top)
    # Output to the unit square around 0, undo the turns and mirrors, rotate, scale to the box, move to its middle.
    to_unit = np.zeros((count, 3, 3))
    to_unit[:, 0, 0] = to_unit[:, 1, 1] = 1.0 / size_px
    to_unit[:, :2, 2] = -0.5
    to_unit[:, 2, 2] = 1.0
    quarter = np.array([[0.0, -1.0], [1.0, 0.0]])  # out (x, y) of one turn looks at (-y, x)
    turned = np.stack([np.linalg.matrix_power(quarter, int(turns)) for turns in range(4)])[where.turns]
    mirrored = np.zeros((count, 2, 2))
    mirrored[:, 0, 0] = np.where(where.mirror, -1.0, 1.0)
    mirrored[:, 1, 1] = np.where(where.flip, -1.0, 1.0)
    boxed = np.zeros((count, 2, 2))
    boxed[:, 0, 0], boxed[:, 1, 1] = where.width, where.height
    cos, sin = np.cos(where.angle), np.sin(where.angle)
    rotated = np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], 1)
    linear = rotated @ boxed @ mirrored @ turned
    middle = np.stack([where.left + where.width / 2, where.top + where.height / 2], -1)
    return np.concatenate([linear @ to_unit[:, :2, :2], (linear @ to_unit[:, :2, 2:]) + middle[:, :, None]], 2)


def resampled(tiles: Tensor, where: Placement, size_px: int, interpolation: str = "bilinear") -> Tensor:
    """tiles (B, 3, H, W) float -> views (B, 3, O, O) float. Bicubic overshoots: the caller clamps.

    A freely rotated view is bilinear, whatever the interpolation: no recipe has both.
    """
    by_grid = where.angle != 0
    if interpolation == "bilinear":
        by_grid |= (where.height <= size_px) & (where.width <= size_px)
    if by_grid.all():
        return _by_grid(tiles, where, size_px)
    if not by_grid.any():
        return _by_rows_and_columns(tiles, where, size_px, interpolation)
    out = tiles.new_empty((len(tiles), 3, size_px, size_px))
    rows = np.flatnonzero(by_grid)
    part = on(tiles.device, rows)
    out[part] = _by_grid(tiles[part], where.of(rows), size_px)
    rows = np.flatnonzero(~by_grid)
    part = on(tiles.device, rows)
    out[part] = _by_rows_and_columns(tiles[part], where.of(rows), size_px, interpolation)
    return out


def on(device: torch.device, values: NDArray[np.generic]) -> Tensor:
    """A small host array on the device, without waiting for it."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


# ---- along the matrix


def _by_grid(tiles: Tensor, where: Placement, size_px: int) -> Tensor:
    """Bilinear, each output pixel from the four nearest: right for views that do not shrink, and for rotated ones.

    A view along the axes sees nothing past its box, as if that had been cut out first. A rotated one sees past it, and
    past the tile's edge the tile mirrored; where it shrinks, a Gaussian beforehand stands for the antialiasing.
    """
    free = where.angle != 0
    if free.any():
        shrink = np.sqrt(where.height * where.width) / size_px
        tiles = blurred(tiles, 0.5 * np.sqrt(np.maximum(shrink**2 - 1, 0)) * free)
    lines = on(tiles.device, _lines(where, size_px, tiles.shape[2]).astype(np.float32))
    slope, shift, low, high = lines[..., None].unbind(3)
    place = torch.arange(size_px, device=tiles.device, dtype=torch.float32) + 0.5
    point = torch.minimum(torch.maximum(slope * place + shift, low), high)  # (B, 2, 2, O)
    by_column, by_row = torch.complex(point[:, :, 0], point[:, :, 1]).unbind(1)
    grid = torch.view_as_real(by_column[:, None, :] + by_row[:, :, None])
    return F.grid_sample(tiles, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def _lines(where: Placement, size_px: int, tile_px: int) -> Floats:
    """(B, 2, 2, 4): what an output pixel's column, and its row, add to x, and to y, of its point on the tile in -1..1.

    Each is a line, slope * place + shift, held between low and high. Along the axes x depends on the column alone or on
    the row alone, and y on the other; that one carries the shift and is held inside the box.
    """
    m = matrices(where, size_px)
    lines = np.zeros((len(m), 2, 2, 4))
    free = where.angle != 0
    for axis, start, length in ((0, where.left, where.width), (1, where.top, where.height)):
        leads = np.abs(m[:, axis, 0]) >= np.abs(m[:, axis, 1])
        for half, whole in ((0, leads), (1, ~leads)):
            line = lines[:, half, axis]
            line[:, 0] = np.where(free | whole, m[:, axis, half], 0) * 2 / tile_px
            line[:, 1] = np.where(whole, m[:, axis, 2] * 2 / tile_px - 1, 0)
            line[:, 2] = np.where(free, -np.inf, np.where(whole, (start + 0.5) * 2 / tile_px - 1, 0))
            line[:, 3] = np.where(free, np.inf, np.where(whole, (start + length - 0.5) * 2 / tile_px - 1, 0))
    return lines


# ---- by rows and by columns


def _by_rows_and_columns(tiles: Tensor, where: Placement, size_px: int, interpolation: str) -> Tensor:
    # Mirrors and turns cost nothing: they are the direction in which the weights run, and a transposition.
    upside_down = where.flip ^ (where.turns >= 2)
    backwards = where.mirror ^ ((where.turns == 1) | (where.turns == 2))
    rows = filtered(tiles, where.top, where.height, upside_down, size_px, interpolation)  # (B, 3, O, W)
    columns = filtered(
        rows.transpose(2, 3).contiguous(), where.left, where.width, backwards, size_px, interpolation
    )  # (B, 3, O, O): x, y
    odd = where.turns % 2 == 1
    if odd.all():
        return columns
    if not odd.any():
        return columns.transpose(2, 3).contiguous()
    out = torch.empty_like(columns)
    for chosen, view in ((odd, columns), (~odd, columns.transpose(2, 3))):
        part = on(tiles.device, np.flatnonzero(chosen))
        out[part] = view[part]
    return out


def filtered(
    x: Tensor, start: Floats, length: Floats, reverse: NDArray[np.bool_], size_px: int, interpolation: str
) -> Tensor:
    """Resample the rows of x (B, 3, H, W): `size_px` of them from each sample's own stretch -> (B, 3, O, W).

    Each new row is a weighted sum of old ones, whole rows at a time: torch's embedding bag, which is that sum in one
    call on CPU and GPU. Rows outside the stretch take no part, as if it had been cut out first.
    """
    num_taps = int(np.ceil(2 * FILTER_RADIUS[interpolation] * max(1.0, float((length / size_px).max())))) + 1
    begin = on(x.device, np.stack([start, length, reverse], 1).astype(np.float32))
    first, weights = _taps(begin[:, :1], begin[:, 1:2], begin[:, 2:] > 0, size_px, num_taps, interpolation)
    return weighted_rows(x, first, weights)


def _taps(
    start_B1: Tensor, length_B1: Tensor, reverse_B1: Tensor, size_px: int, num_taps: int, interpolation: str
) -> tuple[Tensor, Tensor]:
    """First source row (B, O) and weights (B, O, T) of each output row; Pillow's rule for where a filter begins."""
    place = torch.arange(size_px, device=start_B1.device, dtype=torch.float32)
    place_BO = torch.where(reverse_B1, size_px - 1 - place, place)
    scale_B1 = length_B1 / size_px
    stretch_B1 = scale_B1.clamp(min=1.0)  # a shrinking view widens its filter: this is the antialiasing
    reach_B1 = FILTER_RADIUS[interpolation] * stretch_B1
    centre_BO = (place_BO + 0.5) * scale_B1  # within the stretch
    first_BO = (centre_BO - reach_B1 + 0.5).floor().clamp(min=0)
    last_BO = torch.minimum((centre_BO + reach_B1 + 0.5).floor(), length_B1)
    source_BOT = first_BO[:, :, None] + torch.arange(num_taps, device=start_B1.device)
    offset_BOT = (source_BOT + 0.5 - centre_BO[:, :, None]) / stretch_B1[:, :, None]
    weights_BOT = _FILTERS[interpolation](offset_BOT) * (source_BOT < last_BO[:, :, None])
    return (first_BO + start_B1), weights_BOT / weights_BOT.sum(2, keepdim=True)


def _triangle(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp(min=0)


def _cubic(x: Tensor) -> Tensor:
    """Keys' cubic with a = -0.5, Pillow's and torchvision's when they antialias."""
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


_FILTERS = {"bilinear": _triangle, "bicubic": _cubic}


def weighted_rows(x: Tensor, first_BO: Tensor, weights_BOT: Tensor) -> Tensor:
    """(B, 3, O, W): row o of sample b is the sum of weights[b, o, t] times row first[b, o] + t of x[b] (B, 3, H, W)."""
    batch, channels, height, width = x.shape
    size, num_taps = weights_BOT.shape[1:]
    rows_BOT = first_BO.long()[:, :, None] + torch.arange(num_taps, device=x.device)
    rows_BOT = rows_BOT.clamp(0, height - 1)  # beyond the edge the weight is 0
    image = torch.arange(batch * channels, device=x.device).view(batch, channels, 1, 1) * height
    picked = (rows_BOT[:, None] + image).view(-1, num_taps)
    weights = weights_BOT[:, None].expand(batch, channels, size, num_taps).reshape(-1, num_taps)
    out = F.embedding_bag(picked, x.reshape(-1, width), mode="sum", per_sample_weights=weights)
    return out.view(batch, channels, size, width)


# ---- Gaussian blur


def blurred(x: Tensor, sigma: Floats) -> Tensor:
    """Gaussian of each sample's own sigma (pixels; 0 leaves it as it is), mirrored at the edges: x (B, 3, H, W).

    Cut off at 3 sigma and a half pixel: the rest weighs 0.1 %. torchvision's `gaussian_blur` with a kernel that wide is
    the same.
    """
    return blur(x.clone(memory_format=torch.contiguous_format), sigma)


def blur(x: Tensor, sigma: Floats) -> Tensor:
    """The same in place: x must be contiguous."""
    chosen = np.flatnonzero(sigma)
    if not chosen.size:
        return x
    reach = min(int(np.ceil(3 * sigma.max())), min(x.shape[2:]) - 1)
    offset, width = np.abs(np.arange(-reach, reach + 1)), sigma[chosen, None]
    kernel = np.exp(-0.5 * (offset / np.maximum(width, 1e-3)) ** 2)  # 1e-3: all weight in the middle
    kernel *= offset <= np.ceil(3 * width)  # each by its own reach, whoever else is in the batch
    kernel_BT = on(x.device, (kernel / kernel.sum(1, keepdims=True)).astype(np.float32))
    part = on(x.device, chosen)
    rows = _blurred_rows(x, part, kernel_BT, reach).transpose(2, 3).contiguous()
    columns = _blurred_rows(rows, torch.arange(len(chosen), device=x.device), kernel_BT, reach)
    x[part] = columns.transpose(2, 3)
    return x


def _blurred_rows(x: Tensor, part: Tensor, kernel_BT: Tensor, reach: int) -> Tensor:
    """The samples `part` of x, each row mixed with its neighbours."""
    channels, height, width = x.shape[1:]
    row = torch.arange(height, device=x.device)[:, None] + torch.arange(-reach, reach + 1, device=x.device)
    row = row.abs()
    row = torch.where(row < height, row, 2 * (height - 1) - row)  # mirrored about the edge pixel, as reflect padding
    image = (part[:, None] * channels + torch.arange(channels, device=x.device)) * height
    picked = (row + image[:, :, None, None]).view(-1, 2 * reach + 1)
    weights = kernel_BT[:, None, None].expand(len(part), channels, height, 2 * reach + 1).reshape(picked.shape)
    out = F.embedding_bag(picked, x.view(-1, width), mode="sum", per_sample_weights=weights)
    return out.view(len(part), channels, height, width)
