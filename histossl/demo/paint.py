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

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter

from histossl.core.errors import UsageError
from histossl.core.text import write_csv
from histossl.demo.cells import painted_ground, painted_nuclei
from histossl.demo.flaws import EDGE_OD, blurred, cover_slip_edge, folded, pen_strokes
from histossl.demo.layout import (
    ARCHITECTURES,
    LAYOUT_UM,
    Bools,
    Floats,
    Pixels,
    fat_um,
    fractal,
    glands_um,
    outline_um,
    resized,
    smooth_step,
)
from histossl.demo.pyramid import write_pyramid

CLASSES = ("normal", "adenoma", "carcinoma")
PENS = ("blue", "green", "red", "black")
LOOKS = ("plain", "pale", "dark", "fat")
COMPRESSIONS = ("jpeg", "deflate", "jp2k")

# Optical density per unit of dye in R, G, B: the two ends between which laboratories lie (bluish to brownish, magenta
# to salmon; the first of each pair is Ruifrok and Johnston's, 2001).
HAEMATOXYLIN_OD = np.array([[0.650, 0.704, 0.286], [0.590, 0.690, 0.420]])
EOSIN_OD = np.array([[0.072, 0.990, 0.105], [0.170, 0.840, 0.520]])


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
    write_csv(directory / "labels.csv", ("slide", "label", "patient"), rows)
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
    refuse_unpaintable(label, pens, look, compression, tile_px, width_px, height_px, mpp)
    poor = (num_blurs, num_folds, num_edges)
    rgb, truth = paint_pixels(width_px, height_px, mpp, label, seed, stain, scale, pens, look, *poor)
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write_pyramid(aside, rgb, mpp if write_mpp else None, tile_px, compression, subsampling, pyramid)
        aside.replace(path)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror or error}); name another folder") from error
    finally:
        aside.unlink(missing_ok=True)
    rows, columns = math.ceil(height_px / mask_downsample), math.ceil(width_px / mask_downsample)
    masks = {
        name: resized(share.astype(np.float32), rows, columns, Image.Resampling.BOX) > 0.5
        for name, share in truth.items()
    }
    return PaintedSlide(path, label, (width_px, height_px), mpp, mask_downsample, **masks)


def refuse_unpaintable(
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


def paint_pixels(
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
    outline = outline_um(of["outline"], rows, columns)
    tissue = outline > 0
    fat_depth = fat_um(of["fat"], rows, columns, 0.42 if look == "fat" else 0.05)
    # The class's own architecture takes a larger or smaller part; the rest is plain stroma, as on any slide.
    own = fractal(of["region"], rows, columns, 110 * scale, 2) > of["region"].uniform(-1.1, 0.2)
    own &= (outline > 6) & (fat_depth < 0)
    depth = glands_um(of["glands"], rows, columns, label, scale, own)
    fat = fat_depth > 1.0
    angle = fractal(of["fibres"], rows, columns, 160, 1) * 0.9 + of["fibres"].uniform(0, np.pi)

    # ---- dyes at full resolution, in arbitrary amounts
    def up(field_cells: Floats) -> Floats:
        return resized(field_cells, height_px, width_px, Image.Resampling.BICUBIC)

    nuclei = painted_nuclei(of["nuclei"], height_px, width_px, mpp, label, scale, depth, tissue & ~fat, angle)
    haematoxylin, eosin = painted_ground(of["ground"], up, depth, angle, label, scale, mpp)
    haematoxylin += nuclei
    eosin *= 1 - 0.45 * nuclei
    cover = np.clip(up(outline) / 3.0, 0, 1) * (1 - smooth_step(up(fat_depth), 0.5, 2.5))
    haematoxylin *= cover
    eosin *= cover
    fold = np.zeros_like(tissue)
    for _ in range(num_folds):
        fold |= folded(of["fold"], outline)
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
    unevenness = up(1 + 0.05 * fractal(of["unevenness"], rows, columns, 300, 1))
    haematoxylin *= unevenness
    ink, pen_od = pen_strokes(of["pens"], rows, columns, outline, pens)
    fringes = [fringe for _ in range(num_edges) for fringe in cover_slip_edge(of["edges"], rows, columns)]
    rgb = _light(of["grain"], haematoxylin, eosin, stain, up, [*ink, *fringes], [*pen_od, *EDGE_OD * num_edges])
    blur = np.zeros_like(tissue)
    for _ in range(num_blurs):
        blur |= blurred(of["blur"], rgb, tissue, mpp)
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
