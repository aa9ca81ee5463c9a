"""Nuclei of a painted slide, and what lies between them: how much of each dye is at every pixel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from histossl.demo.layout import ARCHITECTURES, LAYOUT_UM, Bools, Floats, fractal, jittered, smooth_step


def painted_nuclei(
    rng: Generator,
    height_px: int,
    width_px: int,
    mpp: float,
    label: str,
    scale: float,
    depth: Floats,
    allowed: Bools,
    fibre_angle: Floats,
) -> Floats:
    """Haematoxylin in nuclei, 0 to about 1: epithelial ones where the class puts them, stromal ones anywhere."""
    form = ARCHITECTURES[label]
    rows, columns = depth.shape
    slope_y, slope_x = np.gradient(depth / LAYOUT_UM)
    margin_px = int(40 / mpp) + 4
    canvas = np.zeros((height_px + 2 * margin_px, width_px + 2 * margin_px), np.float32)

    def at(points_um: NDArray[np.float64]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        row = np.clip(points_um[:, 0] / LAYOUT_UM, 0, rows - 1).astype(np.intp)
        column = np.clip(points_um[:, 1] / LAYOUT_UM, 0, columns - 1).astype(np.intp)
        return row, column

    def stamp(points_um: NDArray[np.float64], angles: NDArray[np.float64], bank: Floats) -> None:
        """Set one nucleus of the bank (angles, variants, side, side) at each point."""
        here = allowed[at(points_um)]
        points_um, angles = points_um[here], angles[here]
        side = bank.shape[-1]
        which_angle = np.round(angles / np.pi * len(bank)).astype(np.intp) % len(bank)
        which = rng.integers(0, bank.shape[1], len(points_um))
        corner = np.round(points_um / mpp).astype(np.intp) + margin_px - side // 2
        fits = ((corner >= 0) & (corner + side <= canvas.shape)).all(1)
        for (y, x), a, v in zip(corner[fits].tolist(), which_angle[fits].tolist(), which[fits].tolist(), strict=True):
            spot = canvas[y : y + side, x : x + side]
            np.maximum(spot, bank[a, v], out=spot)

    # ---- stroma: spindle cells along the fibres, and lymphocytes in drifts; how many is the slide's, not the class's
    for spacing, bank, follows, drift in (
        (rng.uniform(17, 24), _bank(rng, mpp, 1.5, 0.15, 4.2, 0.85), True, -0.2),
        (rng.uniform(9, 12), _bank(rng, mpp, 2.4, 0.10, 1.1, 1.05), False, 1.1),
    ):
        points = jittered(rng, rows, columns, spacing, 0.5)
        angles = (
            fibre_angle[at(points)] + rng.normal(0, 0.25, len(points))
            if follows
            else rng.uniform(0, np.pi, len(points))
        )
        crowd = fractal(rng, rows, columns, 90, 2)
        keep = (depth[at(points)] < -2.5) & (crowd[at(points)] > drift)
        stamp(points[keep], angles[keep].astype(np.float64), bank)

    # ---- epithelium
    radius, spread, elongation = form.nucleus
    bank = _bank(rng, mpp, radius * scale**0.5, spread, elongation, 1.0, nucleoli=label == "carcinoma")
    if label == "carcinoma":
        points = jittered(rng, rows, columns, form.nuclei_every * scale**0.5, 0.42)
        points = points[depth[at(points)] > 3.0]
        stamp(points, rng.uniform(0, np.pi, len(points)), bank)
        return np.ascontiguousarray(canvas[margin_px:-margin_px, margin_px:-margin_px])
    for row_depth in form.nuclei_at:
        every = form.nuclei_every * scale**0.5
        points = jittered(rng, rows, columns, every, 0.25)
        wanted = row_depth + rng.normal(0, 0.12 * every + 0.4 * (len(form.nuclei_at) > 1), len(points))
        found = depth[at(points)]
        keep = np.abs(found - wanted) < every * 0.5
        points, wanted = points[keep], wanted[keep]
        # Walk each point down the depth field to its row: an even chain along the basement membrane.
        for _ in range(2):
            where = at(points)
            slope = np.stack([slope_y[where], slope_x[where]], 1)
            slope /= np.maximum(np.linalg.norm(slope, axis=1, keepdims=True), 0.3)
            points = points + (wanted - depth[where])[:, None] * slope
        where = at(points)
        points_across = np.arctan2(slope_y[where], slope_x[where]).astype(np.float64)
        # Radial when stratified (pencil nuclei), along the membrane when not.
        turned = 0.0 if len(form.nuclei_at) > 1 else np.pi / 2
        keep = depth[where] > 1.5
        stamp(points[keep], (points_across + turned + rng.normal(0, 0.18, len(points)))[keep], bank)
    return np.ascontiguousarray(canvas[margin_px:-margin_px, margin_px:-margin_px])


def _bank(
    rng: Generator,
    mpp: float,
    radius_um: float,
    spread: float,
    elongation: float,
    dark: float,
    nucleoli: bool = False,
    num_angles: int = 16,
    num_variants: int = 12,
) -> Floats:
    """Ready nuclei (angles, variants, side, side): wobbly ellipses with a rim, clumped chromatin, maybe a nucleolus."""
    short = radius_um * np.exp(rng.normal(0, spread, num_variants))
    long = short * np.maximum(1.0, elongation * np.exp(rng.normal(0, 0.12, num_variants)))
    side = 2 * int(np.ceil(long.max() * 1.25 / mpp)) + 3
    across = (np.arange(side, dtype=np.float32) - side // 2) * np.float32(mpp)
    y, x = across[None, None, :, None], across[None, None, None, :]
    angle = (np.arange(num_angles) * np.pi / num_angles)[:, None, None, None]

    def per_variant(values: NDArray[Any]) -> NDArray[Any]:
        return np.asarray(values)[None, :, None, None]

    u = x * np.cos(angle) + y * np.sin(angle)  # along the long side
    v = y * np.cos(angle) - x * np.sin(angle)
    theta = np.arctan2(v, u)
    phase = rng.uniform(0, 2 * np.pi, (6, num_variants))
    uneven = 0.035 + 0.5 * spread**2
    edge = 1 + uneven * (np.cos(2 * theta + per_variant(phase[0])) + np.cos(3 * theta + per_variant(phase[1])))
    reach = np.hypot(u / per_variant(long), v / per_variant(short)) / edge
    body = np.clip((1 - reach) * per_variant(short) / max(mpp, 0.35) + 0.5, 0, 1)
    grain = per_variant(rng.uniform(1.6, 2.6, num_variants))
    clumps = np.cos(u * grain + per_variant(phase[2])) * np.cos(v * grain * 1.2 + per_variant(phase[3]))
    tone = 0.74 + 0.16 * clumps + 0.22 * np.clip((reach - 0.6) / 0.4, 0, 1)
    if nucleoli:
        off_u, off_v = rng.uniform(-0.35, 0.35, (2, num_variants))
        spot = np.hypot(u - per_variant(off_u * long), v - per_variant(off_v * short))
        tone = tone - 0.22 * (reach < 0.75) + 0.75 * np.clip(1.6 - spot / 0.9, 0, 1)
    variants = per_variant(np.exp(rng.normal(0, 0.1, num_variants)))
    return np.ascontiguousarray(dark * variants * body * np.clip(tone, 0.25, 1.3), np.float32)


def painted_ground(
    rng: Generator, up: Callable[[Floats], Floats], depth: Floats, angle: Floats, label: str, scale: float, mpp: float
) -> tuple[Floats, Floats]:
    """Haematoxylin and eosin of cytoplasm, stroma, lumen and mucin, at full resolution."""
    form = ARCHITECTURES[label]
    rows, columns = depth.shape
    fine = up(depth)
    inside = smooth_step(fine, -0.6, 0.6)
    height_px, width_px = fine.shape

    # Fibres: stripes across a slowly turning direction, broken by noise.
    y = np.arange(height_px, dtype=np.float32)[:, None] * np.float32(mpp)
    x = np.arange(width_px, dtype=np.float32)[None] * np.float32(mpp)
    main = float(angle.mean())
    lift = up(fractal(rng, rows, columns, 90, 2) * 13)
    along = y * np.float32(np.cos(main)) - x * np.float32(np.sin(main)) + lift
    fibres = np.sin(along * np.float32(2 * np.pi / 9.0)) * 0.45 + np.sin(along * np.float32(2 * np.pi / 3.7)) * 0.35
    fibres *= np.clip(0.35 + 0.6 * up(fractal(rng, rows, columns, 26, 3)), 0, 1.1)
    cloud = up(fractal(rng, rows, columns, 14, 2))

    eosin_stroma = np.clip(0.62 + 0.24 * fibres + 0.11 * cloud, 0.12, 1.4)
    haematoxylin_stroma = 0.10 + 0.03 * fibres
    eosin_cell = np.clip(0.55 + 0.09 * cloud, 0, 1)
    haematoxylin_cell = 0.21 + 0.04 * cloud
    if form.epithelium:
        tall = form.epithelium * scale
        lumen = smooth_step(fine, tall - 1.5, tall + 1.5)
        brush = np.exp(-(((fine - tall + 2) / 1.6) ** 2)) * 0.22  # the luminal border stains a little more
        eosin_cell = eosin_cell + brush
        if form.goblets:
            mucin = _goblets(rng, up, depth, scale)
            eosin_cell = eosin_cell * (1 - 0.72 * mucin)
            haematoxylin_cell = haematoxylin_cell * (1 - 0.35 * mucin)
        secretion = np.clip(cloud * 0.6 - 0.2, 0, 1)
        eosin_cell = eosin_cell * (1 - lumen) + lumen * (0.03 + 0.10 * secretion)
        haematoxylin_cell = haematoxylin_cell * (1 - lumen) + lumen * (0.02 + 0.10 * secretion)
    membrane = np.exp(-((fine / 1.1) ** 2)) * (0.30 if form.epithelium else 0.05)
    eosin = eosin_stroma * (1 - inside) + eosin_cell * inside + membrane
    haematoxylin = haematoxylin_stroma * (1 - inside) + haematoxylin_cell * inside
    return haematoxylin.astype(np.float32), eosin.astype(np.float32)


def _goblets(rng: Generator, up: Callable[[Floats], Floats], depth: Floats, scale: float) -> Floats:
    """Pale mucin drops in the upper half of the epithelium."""
    rows, columns = depth.shape
    image = Image.new("L", (columns * 2, rows * 2))
    draw = ImageDraw.Draw(image)
    for y_um, x_um in jittered(rng, rows, columns, 10.5 * scale, 0.25):
        row, column = int(y_um / LAYOUT_UM), int(x_um / LAYOUT_UM)
        if 0 <= row < rows and 0 <= column < columns and 11 * scale < depth[row, column] < 17 * scale:
            r = rng.uniform(3.2, 4.6) * scale / LAYOUT_UM * 2
            x, y = x_um / LAYOUT_UM * 2, y_um / LAYOUT_UM * 2
            draw.ellipse((x - r, y - r, x + r, y + r), fill=255)
    return np.clip(up(np.asarray(image, np.float32) / np.float32(255)), 0, 1)
