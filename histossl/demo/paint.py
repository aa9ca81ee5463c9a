"""Paint slides that behave like H&E, so that the demo and every test have an archive without downloading one.

    histossl demo --only-paint my-archive

Three classes differ in architecture only: round regular glands with one ring of nuclei (normal), crowded long glands
with stratified nuclei (adenoma), solid nests of large uneven nuclei (carcinoma). Stain belongs to the patient and the
slide, never to the class, and the mean amount of each dye is set apart from the class too: colour is no shortcut.

Everything is laid out in microns on a coarse grid (`LAYOUT_UM`) and then drawn at the slide's own resolution, so the
same seed at another `mpp` is the same tissue under another scanner.

Frames: `_um` microns; `_cells` cells of the layout grid; `_px` pixels of the slide's level 0.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import tifffile
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy.ndimage import distance_transform_edt, gaussian_filter

from histossl.errors import UsageError

CLASSES = ("normal", "adenoma", "carcinoma")
PENS = ("blue", "green", "red", "black")
LOOKS = ("plain", "pale", "dark", "fat")
COMPRESSIONS = ("jpeg", "deflate", "jp2k")
LAYOUT_UM = 2.0  # a layout cell; a small nucleus is three of them wide
JPEG_QUALITY = 85

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]
Pixels = NDArray[np.uint8]

# Optical density per unit of dye in R, G, B: the two ends between which laboratories lie (bluish to brownish, magenta
# to salmon; the first of each pair is Ruifrok and Johnston's, 2001), and four felt pens.
HAEMATOXYLIN_OD = np.array([[0.650, 0.704, 0.286], [0.590, 0.690, 0.420]])
EOSIN_OD = np.array([[0.072, 0.990, 0.105], [0.170, 0.840, 0.520]])
EDGE_OD = ((0.44, 0.25, 0.07), (0.5, 0.5, 0.55), (0.07, 0.18, 0.44))  # a prism's: bluish, dark, yellowish
PEN_OD = {"blue": (1.7, 1.0, 0.2), "green": (1.6, 0.45, 1.0), "red": (0.15, 1.5, 1.2), "black": (2.0, 2.0, 1.9)}


@dataclass(frozen=True)
class PaintedSlide:
    """A painted file and what is truly on it. Masks are (height, width) / `mask_downsample`, rounded up."""

    path: Path
    label: str
    size_l0: tuple[int, int]  # width, height
    mpp: float
    mask_downsample: int
    tissue_mask: Bools = field(repr=False)  # tissue without pen ink and without fat
    pen_mask: Bools = field(repr=False)
    fat_mask: Bools = field(repr=False)  # vacuoles: white, yet inside the outline
    blur_mask: Bools = field(repr=False)
    fold_mask: Bools = field(repr=False)
    edge_mask: Bools = field(repr=False)  # of a cover slip, where no tissue lies under it


@dataclass(frozen=True)
class Stain:
    """How one laboratory's dyes look on one slide. Nothing in here knows the class."""

    haematoxylin_od: tuple[float, float, float]
    eosin_od: tuple[float, float, float]
    haematoxylin: float  # mean amount over the tissue
    eosin: float
    contrast: float  # of haematoxylin: the power to which its amounts are taken
    glass: tuple[float, float, float]  # grey values of empty glass

    @staticmethod
    def drawn(rng: Generator) -> Stain:
        """A laboratory: hue and strength of both dyes."""
        (blue, brown), (magenta, salmon) = HAEMATOXYLIN_OD, EOSIN_OD
        h, e = rng.uniform(0, 1, 2)
        return Stain(
            haematoxylin_od=_unit(blue + h * (brown - blue) + rng.uniform(-0.08, 0.08, 3)),
            eosin_od=_unit(magenta + e * (salmon - magenta) + rng.uniform(-0.04, 0.04, 3)),
            haematoxylin=float(rng.uniform(0.24, 0.46)),
            eosin=float(rng.uniform(0.22, 0.46)),
            contrast=float(rng.uniform(0.75, 1.2)),
            glass=tuple(float(v) for v in rng.uniform(239, 247, 3)),  # type: ignore[arg-type]
        )

    def varied(self, rng: Generator) -> Stain:
        """Another slide from the same laboratory, on another day."""
        return Stain(
            haematoxylin_od=_unit(np.asarray(self.haematoxylin_od) + rng.uniform(-0.02, 0.02, 3)),
            eosin_od=_unit(np.maximum(np.asarray(self.eosin_od) + rng.uniform(-0.02, 0.02, 3), 0.02)),
            haematoxylin=self.haematoxylin * float(rng.uniform(0.88, 1.14)),
            eosin=self.eosin * float(rng.uniform(0.88, 1.14)),
            contrast=self.contrast * float(rng.uniform(0.93, 1.07)),
            glass=self.glass,
        )


@dataclass(frozen=True)
class Architecture:
    """What makes a class: glands and nuclei, in microns."""

    spacing: float  # between gland centres
    half_width: tuple[float, float]  # of a gland, drawn between
    elongation: tuple[float, float]
    wobble: float  # of the gland's outline
    epithelium: float  # its height from the basement membrane to the lumen
    nuclei_at: tuple[float, ...]  # depths of the rows of nuclei
    nuclei_every: float
    nucleus: tuple[float, float, float]  # short radius, its relative spread, elongation
    goblets: bool = False


ARCHITECTURES = {
    "normal": Architecture(94, (36, 43), (1.0, 1.18), 0.03, 21, (5.0,), 6.6, (2.7, 0.08, 1.35), goblets=True),
    "adenoma": Architecture(84, (32, 39), (1.8, 2.9), 0.08, 22, (4.5, 9.5, 14.5), 6.0, (2.05, 0.10, 2.3)),
    "carcinoma": Architecture(0, (0, 0), (0, 0), 0, 0, (), 9.2, (4.1, 0.26, 1.3)),  # nests: see _nests
}


# ---- the archive


def paint_archive(
    directory: Path,
    num_slides: int = 24,
    seed: int = 0,
    side_px: int = 2048,
    mpp: float = 0.5,
    classes: Sequence[str] = CLASSES,
    slides_per_patient: int = 2,
    num_workers: int | None = None,
    on_painted: Callable[[str], None] | None = None,
) -> list[PaintedSlide]:
    """Paint `num_slides` slides and labels.csv (slide, label, patient) into `directory`; the same for the same seed.

    Patients hold one class and `slides_per_patient` slides each; classes take turns. labels.csv is written last: it
    says that the archive is whole. `on_painted` hears each slide's name.
    """
    unknown = [name for name in classes if name not in ARCHITECTURES]
    if unknown:
        raise UsageError(f"classes {unknown}: can be painted only as {', '.join(CLASSES)}")
    if num_slides < 1 or slides_per_patient < 1:
        raise UsageError(f"{num_slides} slides, {slides_per_patient} per patient: at least one of each is needed")
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{directory}: cannot be made ({error.strerror}); name another folder") from error

    jobs: list[dict[str, Any]] = []
    rows: list[tuple[str, str, str]] = []
    for number in range(num_slides):
        patient = number // slides_per_patient
        label = classes[patient % len(classes)]
        name = f"P{patient + 1:02d}-{number % slides_per_patient + 1}"
        rows.append((name, label, f"P{patient + 1:02d}"))
        jobs.append(_archive_job(directory / f"{name}.tif", label, seed, number, patient, side_px, mpp))

    painted: list[PaintedSlide] = []
    workers = min(num_workers or os.cpu_count() or 1, num_slides)
    if workers == 1:
        for job in jobs:
            painted.append(_paint_job(job))
            if on_painted:
                on_painted(painted[-1].path.stem)
    else:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            for slide in pool.map(_paint_job, jobs):
                painted.append(slide)
                if on_painted:
                    on_painted(slide.path.stem)
    with (directory / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("slide", "label", "patient"))
        writer.writerows(rows)
    return painted


def _archive_job(
    path: Path, label: str, seed: int, number: int, patient: int, side_px: int, mpp: float
) -> dict[str, Any]:
    """The options of one slide of the archive: the patient's laboratory, and now and then ink, a fold or a blur."""
    of_patient = np.random.default_rng([seed, 1, patient])
    rng = np.random.default_rng([seed, 2, number])
    stain = Stain.drawn(of_patient).varied(rng)
    scale = float(of_patient.uniform(0.88, 1.14))
    pens: tuple[str, ...] = ()
    if rng.random() < 0.4:
        pens = tuple(rng.choice(PENS, size=int(rng.integers(1, 3)), replace=False).tolist())
    return {
        "path": path,
        "width_px": side_px,
        "height_px": side_px,
        "mpp": mpp,
        "label": label,
        "seed": int(np.random.default_rng([seed, 3, number]).integers(2**31)),
        "stain": stain,
        "scale": scale,
        "pens": pens,
        "look": "fat" if rng.random() < 0.12 else "plain",
        "num_blurs": int(rng.random() < 0.15),
        "num_folds": int(rng.random() < 0.2),
    }


def _paint_job(job: dict[str, Any]) -> PaintedSlide:
    return paint_slide(**job)


# ---- one slide


def paint_slide(
    path: Path,
    *,
    width_px: int = 2048,
    height_px: int = 2048,
    mpp: float = 0.5,
    label: str = "normal",
    seed: int = 0,
    stain: Stain | None = None,
    scale: float = 1.0,
    pens: Sequence[str] = (),
    look: str = "plain",
    num_blurs: int = 0,
    num_folds: int = 0,
    num_edges: int = 0,
    tile_px: int = 256,
    compression: str = "jpeg",
    subsampling: tuple[int, int] = (2, 2),
    pyramid: bool = True,
    write_mpp: bool = True,
    mask_downsample: int = 16,
) -> PaintedSlide:
    """Paint one slide to `path`, and return the truth about it. The same arguments give the same bytes.

    `stain` is drawn from the seed when not given; `scale` stretches all of the class's architecture; `pens` are ink
    colours, one stroke each; `num_edges` cover slips end on the slide; `look` is plain, pale, dark or fat.
    `compression` jp2k is laid out as Aperio's, because OpenSlide decodes JPEG 2000 only there. `write_mpp=False`
    leaves the resolution tags out.
    """
    _check(label, pens, look, compression, tile_px, width_px, height_px, mpp)
    poor = (num_blurs, num_folds, num_edges)
    rgb, truth = _painted(width_px, height_px, mpp, label, seed, stain, scale, pens, look, *poor)
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        _write_pyramid(aside, rgb, mpp if write_mpp else None, tile_px, compression, subsampling, pyramid)
        aside.replace(path)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror or error}); name another folder") from error
    finally:
        aside.unlink(missing_ok=True)
    rows, columns = math.ceil(height_px / mask_downsample), math.ceil(width_px / mask_downsample)
    masks = {
        name: _resized(share.astype(np.float32), rows, columns, Image.Resampling.BOX) > 0.5
        for name, share in truth.items()
    }
    return PaintedSlide(path, label, (width_px, height_px), mpp, mask_downsample, **masks)


def _check(
    label: str,
    pens: Sequence[str],
    look: str,
    compression: str,
    tile_px: int,
    width_px: int,
    height_px: int,
    mpp: float,
) -> None:
    for what, value, known in (
        ("label", label, CLASSES),
        ("look", look, LOOKS),
        ("compression", compression, COMPRESSIONS),
        *(("pen", pen, PENS) for pen in pens),
    ):
        if value not in known:
            raise UsageError(f"{what} {value!r}: can be painted only as {', '.join(known)}")
    if tile_px % 16 or tile_px < 16:
        raise UsageError(f"tile_px {tile_px}: a TIFF tile is a multiple of 16 pixels wide")
    if min(width_px, height_px) < 64 or mpp <= 0:
        raise UsageError(f"{width_px} x {height_px} px at {mpp} mpp: a slide is at least 64 x 64 pixels, mpp above 0")


def _painted(
    width_px: int,
    height_px: int,
    mpp: float,
    label: str,
    seed: int,
    stain: Stain | None,
    scale: float,
    pens: Sequence[str],
    look: str,
    num_blurs: int,
    num_folds: int,
    num_edges: int,
) -> tuple[Pixels, dict[str, Bools]]:
    """RGB (height, width, 3) and the truth masks on the layout grid."""
    # Every part has its own generator, so that a pen or another resolution does not move the tissue.
    of = {name: np.random.default_rng([seed, number]) for number, name in enumerate(_PARTS)}
    if stain is None:
        stain = Stain.drawn(of["stain"])
    rows = max(24, round(height_px * mpp / LAYOUT_UM))
    columns = max(24, round(width_px * mpp / LAYOUT_UM))

    # ---- layout, on the coarse grid: where is tissue, fat, the class's own architecture, a gland
    outline = _outline(of["outline"], rows, columns)
    tissue = outline > 0
    fat_depth = _fat(of["fat"], rows, columns, 0.42 if look == "fat" else 0.05)
    # The class's own architecture takes a larger or smaller part; the rest is plain stroma, as on any slide.
    own = _fractal(of["region"], rows, columns, 110 * scale, 2) > of["region"].uniform(-1.1, 0.2)
    own &= (outline > 6) & (fat_depth < 0)
    depth = _glands(of["glands"], rows, columns, label, scale, own)
    fat = fat_depth > 1.0
    angle = _fractal(of["fibres"], rows, columns, 160, 1) * 0.9 + of["fibres"].uniform(0, np.pi)

    # ---- dyes at full resolution, in arbitrary amounts
    def up(field_cells: Floats) -> Floats:
        return _resized(field_cells, height_px, width_px, Image.Resampling.BICUBIC)

    nuclei = _nuclei(of["nuclei"], height_px, width_px, mpp, label, scale, depth, tissue & ~fat, angle)
    haematoxylin, eosin = _ground(of["ground"], up, depth, angle, label, scale, mpp)
    haematoxylin += nuclei
    eosin *= 1 - 0.45 * nuclei
    cover = np.clip(up(outline) / 3.0, 0, 1) * (1 - _step(up(fat_depth), 0.5, 2.5))
    haematoxylin *= cover
    eosin *= cover
    fold = np.zeros_like(tissue)
    for _ in range(num_folds):
        fold |= _fold(of["fold"], outline)
    if num_folds:
        thick = 1 + 0.95 * np.clip(up(gaussian_filter(fold.astype(np.float32), 1.0)), 0, 1)
        haematoxylin *= thick
        eosin *= thick

    # ---- dyes become light. The class must not show in how much of a dye there is: set both means to the stain's.
    strength = {"pale": 0.4, "dark": 1.7}.get(look, 1.0)
    inside = cover > 0.5
    np.maximum(haematoxylin, 0, out=haematoxylin)
    np.power(haematoxylin, np.float32(stain.contrast), out=haematoxylin)
    haematoxylin *= stain.haematoxylin * strength / max(float(haematoxylin[inside].mean()), 1e-6)
    eosin *= stain.eosin * strength / max(float(eosin[inside].mean()), 1e-6)
    unevenness = up(1 + 0.05 * _fractal(of["unevenness"], rows, columns, 300, 1))
    haematoxylin *= unevenness
    ink, pen_od = _pens(of["pens"], rows, columns, outline, pens)
    fringes = [fringe for _ in range(num_edges) for fringe in _edge(of["edges"], rows, columns)]
    rgb = _light(of["grain"], haematoxylin, eosin, stain, up, [*ink, *fringes], [*pen_od, *EDGE_OD * num_edges])
    blur = np.zeros_like(tissue)
    for _ in range(num_blurs):
        blur |= _blur(of["blur"], rgb, tissue, mpp)
    pen = ink.max(0) > 0.5 if len(ink) else np.zeros_like(tissue)
    truth = {
        "tissue_mask": tissue & ~fat & ~pen,
        "pen_mask": pen,
        "fat_mask": fat & tissue & ~pen,
        "blur_mask": blur & tissue,
        "fold_mask": fold & tissue,
        "edge_mask": np.any([fringe > 0.4 for fringe in fringes], axis=0) & ~tissue if fringes else ~tissue & False,
    }
    return rgb, truth


_PARTS = (
    "stain",
    "outline",
    "fat",
    "region",
    "glands",
    "fibres",
    "nuclei",
    "ground",
    "fold",
    "unevenness",
    "pens",
    "grain",
    "blur",
    "edges",
)


# ---- layout: fields over the coarse grid


def _outline(rng: Generator, rows: int, columns: int) -> Floats:
    """Microns inside (positive) or outside (negative) the tissue's ragged edge; one or two pieces."""
    y, x = np.mgrid[0:rows, 0:columns].astype(np.float32)
    y, x = 2 * y / rows - 1, 2 * x / columns - 1
    best = np.full((rows, columns), -9, np.float32)
    turn = rng.uniform(0, np.pi)
    pieces = 2 if rng.random() < 0.35 else 1
    for piece in range(pieces):
        off = 0.0 if pieces == 1 else (0.46 if piece else -0.46)
        centre_x, centre_y = (
            off * np.cos(turn) + rng.uniform(-0.06, 0.06),
            off * np.sin(turn) + rng.uniform(-0.06, 0.06),
        )
        along = rng.uniform(0.78, 0.9) if pieces == 1 else rng.uniform(0.42, 0.5)
        across = rng.uniform(0.7, 0.85)
        u = (x - centre_x) * np.cos(turn) + (y - centre_y) * np.sin(turn)
        v = -(x - centre_x) * np.sin(turn) + (y - centre_y) * np.cos(turn)
        best = np.maximum(best, 1 - (np.abs(u / along) ** 2.4 + np.abs(v / across) ** 2.4) ** (1 / 2.4))
    ragged = best + 0.11 * _fractal(rng, rows, columns, 0.28 * LAYOUT_UM * min(rows, columns), 4)
    inside = ragged > 0
    inside[[0, -1]] = False
    inside[:, [0, -1]] = False
    return _signed_distance_um(inside)


def _fat(rng: Generator, rows: int, columns: int, share: float) -> Floats:
    """Microns inside a fat cell's empty vacuole (negative outside); vacuoles cover about `share` of the field."""
    where = _fractal(rng, rows, columns, 170, 2)
    region = where > np.quantile(where, 1 - share)
    centres = _jittered(rng, rows, columns, 46, 0.55)
    shapes = [(y, x, r, r * 1.12, a) for (y, x), r, a in zip(
        centres, rng.uniform(22, 30, len(centres)), rng.uniform(0, np.pi, len(centres)), strict=True)]  # fmt: skip
    inside = _ellipses(rng, rows, columns, shapes, 0.05) & region
    return _signed_distance_um(inside)


def _glands(rng: Generator, rows: int, columns: int, label: str, scale: float, own: Bools) -> Floats:
    """Microns below the basement membrane of the nearest gland or nest; negative in the stroma."""
    if label == "carcinoma":
        return _nests(rng, rows, columns, scale, own)
    form = ARCHITECTURES[label]
    centres = _jittered(rng, rows, columns, form.spacing * scale, 0.32)
    # Neighbouring glands run alike: their direction is a slow field.
    direction = _fractal(rng, rows, columns, 260 * scale, 1) * 1.1 + rng.uniform(0, np.pi)
    shapes = []
    for y, x in centres:
        row, column = (int(np.clip(at / LAYOUT_UM, 0, last - 1)) for at, last in ((y, rows), (x, columns)))
        short = rng.uniform(*form.half_width) * scale
        long = short * rng.uniform(*form.elongation)
        if own[row, column]:
            shapes.append((y, x, short, long, float(direction[row, column]) + rng.normal(0, 0.2)))
    inside = _ellipses(rng, rows, columns, shapes, form.wobble)
    inside &= own
    return _signed_distance_um(inside)


def _nests(rng: Generator, rows: int, columns: int, scale: float, own: Bools) -> Floats:
    """Irregular cords and sheets: two noises of different grain, one threshold."""
    coarse = _fractal(rng, rows, columns, 62 * scale, 3)
    inside = own & (coarse > -0.45)
    holes = _fractal(rng, rows, columns, 26 * scale, 1) > 2.05  # small ragged lumina and necrosis
    return _signed_distance_um(inside & ~holes)


def _ellipses(
    rng: Generator, rows: int, columns: int, shapes: Sequence[tuple[float, float, float, float, float]], wobble: float
) -> Bools:
    """The union of wobbly ellipses (y, x, short, long in microns, angle) with a gap kept between neighbours."""
    nearness = np.full((rows, columns), -1, np.float32)
    owner = np.full((rows, columns), -1, np.int32)
    for number, (y_um, x_um, short, long, angle) in enumerate(shapes):
        reach = long * (1 + 2 * wobble) / LAYOUT_UM
        y, x = y_um / LAYOUT_UM, x_um / LAYOUT_UM
        top, bottom = max(0, int(y - reach)), min(rows, int(y + reach) + 2)
        left, right = max(0, int(x - reach)), min(columns, int(x + reach) + 2)
        phase = rng.uniform(0, 2 * np.pi, 3)
        if top >= bottom or left >= right:
            continue
        dy = (np.arange(top, bottom, dtype=np.float32)[:, None] - y) * LAYOUT_UM
        dx = (np.arange(left, right, dtype=np.float32)[None] - x) * LAYOUT_UM
        u = (dx * np.cos(angle) + dy * np.sin(angle)) / long
        v = (dy * np.cos(angle) - dx * np.sin(angle)) / short
        theta = np.arctan2(v, u)
        edge = 1 + wobble * (np.cos(2 * theta + phase[0]) + np.cos(3 * theta + phase[1]) + np.cos(5 * theta + phase[2]))
        near = 1 - np.hypot(u, v) / edge
        here = nearness[top:bottom, left:right]
        closer = near > here
        owner[top:bottom, left:right][closer & (near > 0)] = number
        np.maximum(here, near, out=here)
    inside = nearness > 0
    # Where two glands meet there is always a thin septum.
    meets = np.zeros_like(inside)
    meets[:, 1:] |= owner[:, 1:] != owner[:, :-1]
    meets[1:] |= owner[1:] != owner[:-1]
    return inside & ~meets


def _signed_distance_um(inside: Bools) -> Floats:
    if inside.all() or not inside.any():
        return np.where(inside, 1e3, -1e3).astype(np.float32)
    signed = distance_transform_edt(inside) - distance_transform_edt(~inside)
    signed -= np.sign(signed) * 0.5
    return (gaussian_filter(signed.astype(np.float32), 0.7) * LAYOUT_UM).astype(np.float32)


def _jittered(rng: Generator, rows: int, columns: int, spacing_um: float, jitter: float) -> NDArray[np.float64]:
    """Points (y, x) in microns on a staggered grid, each moved by up to `jitter` spacings."""
    height_um, width_um = rows * LAYOUT_UM, columns * LAYOUT_UM
    y, x = np.mgrid[-1 : height_um / (spacing_um * 0.87) + 1, -1 : width_um / spacing_um + 1]
    x = x + 0.5 * (y % 2)
    points = np.stack([y.ravel() * 0.87, x.ravel()], 1) * spacing_um
    points += rng.uniform(-jitter, jitter, points.shape) * spacing_um
    return points


def _resized(field_cells: Floats, rows: int, columns: int, how: Image.Resampling) -> Floats:
    image = Image.fromarray(np.ascontiguousarray(field_cells, np.float32))
    return np.asarray(image.resize((columns, rows), how), np.float32)


def _fractal(rng: Generator, rows: int, columns: int, size_um: float, octaves: int) -> Floats:
    """Smooth noise of about unit variance whose largest blobs are `size_um` wide; each octave is half as wide."""
    total = np.zeros((rows, columns), np.float32)
    weight, power = 1.0, 0.0
    for octave in range(octaves):
        cells = max(size_um / LAYOUT_UM / 2**octave, 2.0)
        coarse = rng.standard_normal((math.ceil(rows / cells) + 3, math.ceil(columns / cells) + 3)).astype(np.float32)
        box = (1.0, 1.0, 1.0 + columns / cells, 1.0 + rows / cells)
        image = Image.fromarray(coarse).resize((columns, rows), Image.Resampling.BICUBIC, box=box)
        total += weight * np.asarray(image, np.float32)
        power += weight**2 * 0.55  # bicubic interpolation keeps about this share of the variance
        weight *= 0.55
    return (total / math.sqrt(power)).astype(np.float32)


def _step(value: Floats, low: float, high: float) -> Floats:
    """0 below `low`, 1 above `high`, smooth between."""
    t = np.clip((value - np.float32(low)) / np.float32(high - low), 0, 1)
    return np.asarray(t * t * (3 - 2 * t), np.float32)


# ---- nuclei


def _nuclei(
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
        points = _jittered(rng, rows, columns, spacing, 0.5)
        angles = (
            fibre_angle[at(points)] + rng.normal(0, 0.25, len(points))
            if follows
            else rng.uniform(0, np.pi, len(points))
        )
        crowd = _fractal(rng, rows, columns, 90, 2)
        keep = (depth[at(points)] < -2.5) & (crowd[at(points)] > drift)
        stamp(points[keep], angles[keep].astype(np.float64), bank)

    # ---- epithelium
    radius, spread, elongation = form.nucleus
    bank = _bank(rng, mpp, radius * scale**0.5, spread, elongation, 1.0, nucleoli=label == "carcinoma")
    if label == "carcinoma":
        points = _jittered(rng, rows, columns, form.nuclei_every * scale**0.5, 0.42)
        points = points[depth[at(points)] > 3.0]
        stamp(points, rng.uniform(0, np.pi, len(points)), bank)
        return np.ascontiguousarray(canvas[margin_px:-margin_px, margin_px:-margin_px])
    for row_depth in form.nuclei_at:
        every = form.nuclei_every * scale**0.5
        points = _jittered(rng, rows, columns, every, 0.25)
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


# ---- what lies between the nuclei


def _ground(
    rng: Generator, up: Callable[[Floats], Floats], depth: Floats, angle: Floats, label: str, scale: float, mpp: float
) -> tuple[Floats, Floats]:
    """Haematoxylin and eosin of cytoplasm, stroma, lumen and mucin, at full resolution."""
    form = ARCHITECTURES[label]
    rows, columns = depth.shape
    fine = up(depth)
    inside = _step(fine, -0.6, 0.6)
    height_px, width_px = fine.shape

    # Fibres: stripes across a slowly turning direction, broken by noise.
    y = np.arange(height_px, dtype=np.float32)[:, None] * np.float32(mpp)
    x = np.arange(width_px, dtype=np.float32)[None] * np.float32(mpp)
    main = float(angle.mean())
    lift = up(_fractal(rng, rows, columns, 90, 2) * 13)
    along = y * np.float32(np.cos(main)) - x * np.float32(np.sin(main)) + lift
    fibres = np.sin(along * np.float32(2 * np.pi / 9.0)) * 0.45 + np.sin(along * np.float32(2 * np.pi / 3.7)) * 0.35
    fibres *= np.clip(0.35 + 0.6 * up(_fractal(rng, rows, columns, 26, 3)), 0, 1.1)
    cloud = up(_fractal(rng, rows, columns, 14, 2))

    eosin_stroma = np.clip(0.62 + 0.24 * fibres + 0.11 * cloud, 0.12, 1.4)
    haematoxylin_stroma = 0.10 + 0.03 * fibres
    eosin_cell = np.clip(0.55 + 0.09 * cloud, 0, 1)
    haematoxylin_cell = 0.21 + 0.04 * cloud
    if form.epithelium:
        tall = form.epithelium * scale
        lumen = _step(fine, tall - 1.5, tall + 1.5)
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
    for y_um, x_um in _jittered(rng, rows, columns, 10.5 * scale, 0.25):
        row, column = int(y_um / LAYOUT_UM), int(x_um / LAYOUT_UM)
        if 0 <= row < rows and 0 <= column < columns and 11 * scale < depth[row, column] < 17 * scale:
            r = rng.uniform(3.2, 4.6) * scale / LAYOUT_UM * 2
            x, y = x_um / LAYOUT_UM * 2, y_um / LAYOUT_UM * 2
            draw.ellipse((x - r, y - r, x + r, y + r), fill=255)
    return np.clip(up(np.asarray(image, np.float32) / np.float32(255)), 0, 1)


# ---- what goes wrong on glass: folds, ink, blur


def _fold(rng: Generator, outline: Floats) -> Bools:
    """A curved band where the section lies double."""
    rows, columns = outline.shape
    path = _curve(rng, rows, columns, outline, bend=0.6, reach=0.35)
    image = Image.new("1", (columns, rows))
    ImageDraw.Draw(image).line(path, fill=1, width=max(3, int(min(26 / LAYOUT_UM, 0.03 * min(rows, columns)))))
    return np.asarray(image, bool) & (outline > 0)


def _pens(
    rng: Generator, rows: int, columns: int, outline: Floats, pens: Sequence[str]
) -> tuple[Floats, list[tuple[float, float, float]]]:
    """Opacity of each stroke (P, rows, columns) and its colour: strokes run round and over the tissue's edge."""
    strokes = []
    for _ in pens:
        width_cells = max(3, int(0.035 * min(rows, columns) * rng.uniform(0.8, 1.3)))
        image = Image.new("L", (columns, rows))
        draw = ImageDraw.Draw(image)
        path = _curve(rng, rows, columns, outline, bend=1.6, reach=0.55, on_edge=True)
        draw.line(path, fill=255, width=width_cells, joint="curve")
        for x, y in (path[0], path[-1]):
            r = width_cells / 2
            draw.ellipse((x - r, y - r, x + r, y + r), fill=255)
        opacity = gaussian_filter(np.asarray(image, np.float32) / 255, 0.8)
        strokes.append(opacity)
    ink = np.stack(strokes) if strokes else np.zeros((0, rows, columns), np.float32)
    return ink.astype(np.float32), [PEN_OD[pen] for pen in pens]


def _edge(rng: Generator, rows: int, columns: int) -> list[Floats]:
    """Where a cover slip ends: a straight or slightly bowed line from side to side, its fringes beside each other."""
    upright, far = rng.random() < 0.5, rng.random() < 0.5
    length, depth = (rows, columns) if upright else (columns, rows)
    inset = depth * rng.uniform(0.02, 0.1)
    along = np.arange(length, dtype=np.float32)
    lean, bow = rng.uniform(-0.04, 0.04) * length, rng.uniform(-0.02, 0.02) * length
    share = along / length
    middle = inset + lean * share + bow * 4 * share * (1 - share)
    fringe_cells = rng.uniform(6, 14) / LAYOUT_UM
    strength = np.clip(1 + 0.15 * _fractal(rng, 1, length, 400, 1)[0], 0.5, 1.5)
    away = np.arange(depth, dtype=np.float32)[None] - middle[:, None]
    fringes = []
    for side in (-1, 0, 1):
        fringe = np.exp(-(((away - side * fringe_cells) / fringe_cells) ** 2)) * strength[:, None]
        fringe = fringe[:, ::-1] if far else fringe
        fringes.append(np.ascontiguousarray(fringe if upright else fringe.T, np.float32))
    return fringes


def _curve(
    rng: Generator, rows: int, columns: int, outline: Floats, bend: float, reach: float, on_edge: bool = False
) -> list[tuple[float, float]]:
    """A bent line (x, y in cells) through a point of the tissue, or of its edge."""
    near = np.argwhere(np.abs(outline) < 8 if on_edge else outline > 0.1 * LAYOUT_UM * min(rows, columns))
    y, x = near[rng.integers(len(near))].astype(float) if len(near) else (rows / 2, columns / 2)
    heading, turn = rng.uniform(0, 2 * np.pi), bend * rng.choice([-1, 1]) * rng.uniform(0.7, 1.3)
    length = reach * min(rows, columns)
    steps = np.linspace(-0.5, 0.5, 40)
    headings = heading + turn * steps
    xs, ys = np.cumsum(np.cos(headings)) * length / 40, np.cumsum(np.sin(headings)) * length / 40
    return list(zip((xs - xs[20] + x).tolist(), (ys - ys[20] + y).tolist(), strict=True))


def _blur(rng: Generator, rgb: Pixels, tissue: Bools, mpp: float) -> Bools:
    """Put a round patch of the picture out of focus, in place; returns where, on the layout grid."""
    rows, columns = tissue.shape
    middle = np.argwhere(tissue)
    if not len(middle):
        return np.zeros_like(tissue)
    row, column = middle[rng.integers(len(middle))]
    radius_um = 0.16 * LAYOUT_UM * min(rows, columns) * rng.uniform(0.9, 1.2)
    y, x = row * LAYOUT_UM / mpp, column * LAYOUT_UM / mpp
    radius_px = radius_um / mpp
    top, bottom = max(0, int(y - radius_px)), min(rgb.shape[0], int(y + radius_px) + 1)
    left, right = max(0, int(x - radius_px)), min(rgb.shape[1], int(x + radius_px) + 1)
    spot = rgb[top:bottom, left:right].astype(np.float32)
    soft = gaussian_filter(spot, (4.5 / mpp, 4.5 / mpp, 0))
    dy, dx = np.arange(top, bottom)[:, None] - y, np.arange(left, right)[None] - x
    weight = np.clip((1 - np.hypot(dy, dx) / radius_px) * 8, 0, 1)[..., None]
    rgb[top:bottom, left:right] = np.round(spot * (1 - weight) + soft * weight).astype(np.uint8)
    cells = np.hypot(np.arange(rows)[:, None] - row, np.arange(columns)[None] - column) * LAYOUT_UM
    return np.asarray(cells < radius_um * 0.9)


# ---- light


def _light(
    rng: Generator,
    haematoxylin: Floats,
    eosin: Floats,
    stain: Stain,
    up: Callable[[Floats], Floats],
    ink: Sequence[Floats],
    pen_od: Sequence[tuple[float, float, float]],
) -> Pixels:
    """Beer and Lambert: dyes and ink absorb, the sensor adds a little grain."""
    height_px, width_px = haematoxylin.shape
    rgb = np.empty((height_px, width_px, 3), np.uint8)
    grain = rng.standard_normal((512, 512)).astype(np.float32)
    repeats = (math.ceil(height_px / 512), math.ceil(width_px / 512))
    grain = np.tile(grain, repeats)[:height_px, :width_px]
    strokes = [np.clip(up(stroke), 0, 1) for stroke in ink]
    for channel in range(3):
        od = haematoxylin * np.float32(stain.haematoxylin_od[channel]) + eosin * np.float32(stain.eosin_od[channel])
        od *= 1 + 0.05 * grain
        for stroke, colour in zip(strokes, pen_od, strict=True):
            od += stroke * np.float32(colour[channel])
        light = np.float32(stain.glass[channel]) * np.exp(-od) + 0.9 * grain
        rgb[..., channel] = np.clip(np.rint(light), 0, 255)
    return rgb


def _unit(od: NDArray[np.float64]) -> tuple[float, float, float]:
    r, g, b = (od / np.linalg.norm(od)).tolist()
    return r, g, b


# ---- files


def _write_pyramid(
    path: Path,
    rgb: Pixels,
    mpp: float | None,
    tile_px: int,
    compression: str,
    subsampling: tuple[int, int],
    pyramid: bool,
) -> None:
    """Tiled TIFF; each level half of the one before, down to about one tile."""
    with tifffile.TiffWriter(path, bigtiff=rgb.nbytes > 2**31) as tiff:
        level, level_rgb = 0, rgb
        while True:
            height_px, width_px = level_rgb.shape[:2]
            tiff.write(
                level_rgb,
                **_level_options(level, mpp, tile_px, compression, subsampling, (width_px, height_px)),
            )
            if not pyramid or max(height_px, width_px) <= max(tile_px, 128):
                return
            level_rgb, level = halved(level_rgb), level + 1


def _level_options(
    level: int,
    mpp: float | None,
    tile_px: int,
    compression: str,
    subsampling: tuple[int, int],
    size: tuple[int, int],
) -> dict[str, Any]:
    options: dict[str, Any] = {
        "tile": (tile_px, tile_px),
        "photometric": "rgb",
        "metadata": None,
        "software": "histossl",
        "subfiletype": 1 if level else 0,
    }
    if compression == "jpeg":
        options.update(compression="jpeg", subsampling=subsampling)  # stored as YCbCr
        options.update(compressionargs={"level": JPEG_QUALITY})
    elif compression == "deflate":
        options.update(compression="deflate", predictor=True)
    else:
        # 33005 is Aperio's own tag for JPEG 2000; OpenSlide finds the scale in Aperio's description.
        description = f"Aperio painted by histossl\n{size[0]}x{size[1]} ({tile_px}x{tile_px}) J2K/RGB Q=70"
        if mpp is not None:
            description += f"|MPP = {mpp * 2**level:.6f}"
        options.update(compression=33005, compressionargs={"level": 40}, description=description)
    if mpp is not None:
        per_cm = 10_000 / (mpp * 2**level)
        options.update(resolution=(per_cm, per_cm), resolutionunit="CENTIMETER")
    return options


def halved(rgb: Pixels) -> Pixels:
    """Half the size, each pixel the mean of four; an odd last row or column counts twice."""
    height_px, width_px = rgb.shape[:2]
    rgb = np.pad(rgb, ((0, height_px % 2), (0, width_px % 2), (0, 0)), mode="edge")
    total = rgb[0::2, 0::2].astype(np.uint16) + rgb[1::2, 0::2] + rgb[0::2, 1::2] + rgb[1::2, 1::2]
    return ((total + 2) // 4).astype(np.uint8)


# ---- a very large slide


def paint_huge_slide(
    path: Path,
    *,
    width_px: int = 100_000,
    height_px: int = 100_000,
    mpp: float = 0.25,
    label: str = "adenoma",
    seed: int = 0,
    tile_px: int = 256,
    block_px: int = 2048,
) -> Path:
    """Write a very large slide in little memory: one painted block, repeated inside a round outline on empty glass.

    Every tile is encoded once and its bytes are written again and again, so 100,000 x 100,000 px take a minute or two
    and a few GB. `block_px` must be `tile_px` times a power of two.
    """
    ratio = block_px / tile_px
    if ratio < 1 or ratio != 2 ** round(math.log2(ratio)):
        raise UsageError(f"block_px {block_px}: must be tile_px {tile_px} times a power of two")
    _check(label, (), "plain", "jpeg", tile_px, width_px, height_px, mpp)
    levels_in_block = round(math.log2(ratio))
    tissue = _full_block(block_px, mpp, label, seed)
    blocks = _round_outline(math.ceil(height_px / block_px), math.ceil(width_px / block_px))
    num_levels = 1 + max(0, math.ceil(math.log2(max(width_px, height_px) / (2 * tile_px))))
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with tifffile.TiffWriter(aside, bigtiff=True) as tiff:
            for level in range(num_levels):
                level_width, level_height = -(-width_px // 2**level), -(-height_px // 2**level)
                tiff.write(
                    _repeated_tiles(tissue, blocks, level, levels_in_block, level_width, level_height, tile_px),
                    shape=(level_height, level_width, 3),
                    dtype=np.uint8,
                    **_level_options(level, mpp, tile_px, "jpeg", (2, 2), (level_width, level_height)),
                )
                if tissue.shape[0] > 1:
                    tissue = halved(tissue)
        aside.replace(path)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror or error}); name another folder") from error
    finally:
        aside.unlink(missing_ok=True)
    return path


def _full_block(block_px: int, mpp: float, label: str, seed: int) -> Pixels:
    """A square of tissue without glass: the middle of a painted slide twice as wide."""
    rgb, _ = _painted(2 * block_px, 2 * block_px, mpp, label, seed, None, 1.0, (), "plain", 0, 0, 0)
    start = block_px // 2
    return np.ascontiguousarray(rgb[start : start + block_px, start : start + block_px])


def _round_outline(rows: int, columns: int) -> Bools:
    """Which blocks are tissue: an ellipse over most of the slide."""
    y = (np.arange(rows)[:, None] + 0.5) / rows * 2 - 1
    x = (np.arange(columns)[None] + 0.5) / columns * 2 - 1
    return np.asarray(np.hypot(y, x) < 0.88)


def _repeated_tiles(
    tissue: Pixels, blocks: Bools, level: int, levels_in_block: int, width_px: int, height_px: int, tile_px: int
) -> Iterator[bytes]:
    """The encoded tiles of one level, row by row. `tissue` is the block at this level."""
    glass = np.full_like(tissue, 243)
    cache: dict[tuple[bytes, int, int], bytes] = {}
    per_block = max(1, tissue.shape[0] // tile_px)  # tiles across a block
    span = 2 ** max(0, level - levels_in_block)  # blocks across a tile
    for tile_row in range(math.ceil(height_px / tile_px)):
        for tile_column in range(math.ceil(width_px / tile_px)):
            first_row, first_column = tile_row * span // per_block, tile_column * span // per_block
            if span > 1:
                first_row, first_column = tile_row * span, tile_column * span
            here = blocks[first_row : first_row + span, first_column : first_column + span]
            sub_row, sub_column = tile_row % per_block, tile_column % per_block
            key = (here.tobytes() + bytes(here.shape), sub_row, sub_column)
            if key not in cache:
                padded = np.zeros((span, span), bool)
                padded[: here.shape[0], : here.shape[1]] = here
                if per_block > 1:
                    source = tissue if here.all() else glass
                    y, x = sub_row * tile_px, sub_column * tile_px
                    tile = source[y : y + tile_px, x : x + tile_px]
                else:
                    tile = np.concatenate(
                        [np.concatenate([tissue if wet else glass for wet in row], 1) for row in padded], 0
                    )
                cache[key] = _jpeg(tile)
            yield cache[key]


def _jpeg(tile: Pixels) -> bytes:
    encoded = imagecodecs.jpeg8_encode(
        np.ascontiguousarray(tile), level=JPEG_QUALITY, colorspace="RGB", outcolorspace="YCBCR", subsampling=(2, 2)
    )
    return bytes(encoded)
