"""What the features see, before and after adapting: a map of tiles, their nearest neighbours, the tiles that decide.

Made from the embeddings and tiles that the workspace still holds; where it does not, the report goes without.
All tiles are drawn at random with a fixed seed, none is chosen for its looks. Only slides that were tested are shown.

The map is of principal components: no other library, seconds, and far apart means unlike. UMAP shows clusters better
and distances worse; it is drawn beside it on request (`histossl report --map umap`), for it brings 200 MB of compiler
and half a minute of compiling to every report.
"""

from __future__ import annotations

import base64
import importlib
import io
import math
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.decomposition import PCA

from histossl.core.config import EmbedConfig
from histossl.core.errors import HistosslError, UsageError
from histossl.core.workspace import Workspace, file_stem
from histossl.report.content import Content
from histossl.tiles.store.index import TileIndex

Floats = NDArray[np.float64]
MOST_TILES = 1500  # on the map: neighbours are looked for among all pairs
MOST_CLASSES = 6  # with panels
NUM_SHOWN = 7  # neighbours, or deciding tiles, in a row
NUM_NEIGHBOURS = 10  # in the figures of agreement
TILE_PX = 112


@dataclass(frozen=True)
class Sample:
    """Tiles drawn from the tested slides: row of the slide's embedding, and what is known of it."""

    slide: list[str]
    row: NDArray[np.int64]
    label: list[str]
    patient: list[str]
    features: dict[str, Floats]  # per start, unit length (tiles, D)


@dataclass(frozen=True)
class Picture:
    uri: str
    label: str
    same: bool


@dataclass(frozen=True)
class Panel:
    """One tile drawn at random, and what each start finds nearest to it among other patients."""

    label: str
    uri: str
    neighbours: dict[str, list[Picture]]


@dataclass(frozen=True)
class Features:
    starts: list[str]  # []: no map, no neighbours
    num_tiles: int
    places: dict[str, Floats]  # per start (tiles, 2), principal components
    colourings: dict[str, list[str]]  # label, patient or slide (, site) of each tile
    agreement: dict[str, float]  # share of the nearest tiles of other patients that have the same label
    clumping: dict[str, float]  # share of the nearest tiles that are of the same slide
    panels: list[Panel] = field(default_factory=list)
    deciding: list[tuple[str, list[Picture]]] = field(default_factory=list)
    deciding_by: str = ""  # attention or probability
    deciding_start: str = ""
    deciding_items: int = 0  # labelled items that the saved model was trained on
    umap_places: dict[str, Floats] = field(default_factory=dict)  # per start (tiles, 2); empty: not asked for


def look_at_features(content: Content, workspace: Workspace, with_umap: bool = False) -> Features | None:
    """None where there is nothing to look at: no model, and a start's embeddings are gone or were never made.

    Without embeddings (end-to-end training makes none) there is no map, but still what the saved model looks at.
    """
    index = None
    with suppress(HistosslError, OSError):
        index = TileIndex.open(workspace)
    deciding: tuple[list[tuple[str, list[Picture]]], str, str, int] = ([], "", "", 0)
    if index is not None:
        with suppress(HistosslError, OSError):
            deciding = _deciding(content, workspace, index)
    starts = [start for start in content.compared if _folder(content, workspace, start)]
    sample = _sample(content, workspace, starts) if starts else None
    if sample is None:
        return Features([], 0, {}, {}, {}, {}, [], *deciding) if deciding[0] else None
    colourings = {"label": sample.label, "slide": sample.slide}
    if len(set(sample.patient)) < len(set(sample.slide)):
        colourings = {"label": sample.label, "patient": sample.patient, "slide": sample.slide}
    sites = content.facts.get("sites", {})
    if len(set(sites.values())) > 1:
        colourings["site"] = [str(sites.get(slide, "not known")) for slide in sample.slide]
    places, agreement, clumping, nearest = {}, {}, {}, {}
    for start in starts:
        places[start] = _two_dimensions(sample.features[start])
        agreement[start], clumping[start], nearest[start] = neighbourhoods(
            sample.features[start], sample.label, sample.patient, sample.slide
        )
    panels: list[Panel] = []
    if index is not None:
        with suppress(HistosslError, OSError):
            panels = _panels(content, sample, nearest, index)
    return Features(
        starts,
        len(sample.slide),
        places,
        colourings,
        agreement,
        clumping,
        panels,
        *deciding,
        umap_places={start: umap_places(sample.features[start]) for start in starts} if with_umap else {},
    )


# ---- which tiles


def _folder(content: Content, workspace: Workspace, start: str) -> Path | None:
    name = str(content.facts.get("starts", {}).get(start, {}).get("embeddings") or "")
    folder = workspace.embeddings(name) if name else None
    return folder if folder is not None and folder.is_dir() else None


def _tested(content: Content) -> dict[str, dict[int | None, tuple[str, str]]]:
    """Per slide: (label, patient) of each row of its embedding that a tested item holds, or of None: of all its rows.

    Where regions of two labels overlap, a tile has no label and is left out.
    """
    found: dict[str, dict[int | None, tuple[str, str]]] = {}
    torn: set[tuple[str, int | None]] = set()
    in_region = content.facts.get("region_tiles", {})
    for one in content.at_largest(content.compared[0])[0]:
        slide, rows = one.slide, list[int | None]([None])
        if content.unit == "tile":
            slide, _, tile = one.slide.rpartition("@")
            rows = [int(tile)]
        elif content.unit == "region":
            slide, rows = one.slide.rpartition("#")[0], in_region.get(one.slide, [])
        for row in rows:
            before = found.setdefault(slide, {}).setdefault(row, (one.label, one.patient))
            if before[0] != one.label:
                torn.add((slide, row))
    for slide, row in torn:
        del found[slide][row]
    return {slide: rows for slide, rows in found.items() if rows}


def _sample(content: Content, workspace: Workspace, starts: Sequence[str]) -> Sample | None:
    tested = _tested(content)
    per_slide = max(1, MOST_TILES // max(1, len(tested)))
    rng = np.random.default_rng(0)
    slides: list[str] = []
    rows: list[int] = []
    labels: list[str] = []
    patients: list[str] = []
    features: dict[str, list[Floats]] = {start: [] for start in starts}
    try:
        for slide, of_row in sorted(tested.items()):
            taken: NDArray[np.int64] | None = None
            for start in starts:
                folder = _folder(content, workspace, start)
                assert folder is not None
                with h5py.File(folder / f"{file_stem(slide)}.h5") as file:
                    stored = file["features"]
                    if taken is None:
                        given = [row for row in of_row if row is not None]
                        candidates = np.array(sorted(given) or range(len(stored)), dtype=np.int64)
                        taken = np.sort(rng.permutation(candidates)[:per_slide])
                    features[start].append(stored[:][taken].astype(np.float64))
            assert taken is not None
            for row in taken.tolist():
                label, patient = of_row.get(row) or of_row[None]
                slides.append(slide)
                rows.append(row)
                labels.append(label)
                patients.append(patient)
    except (OSError, KeyError, IndexError):
        return None  # embeddings of another workspace, or since removed
    if len(set(labels)) < 2 or len(rows) < 10:
        return None
    unit = {start: _unit(np.concatenate(parts)) for start, parts in features.items()}
    return Sample(slides, np.array(rows), labels, patients, unit)


def _unit(x: Floats) -> Floats:
    """Centred and of unit length: what nearest means is an angle seen from the middle."""
    x = x - x.mean(0)
    length = np.linalg.norm(x, axis=1, keepdims=True)
    unit: Floats = x / np.maximum(length, 1e-12)
    return unit


def _two_dimensions(x: Floats) -> Floats:
    places: Floats = PCA(2, svd_solver="full").fit_transform(x)
    # A component's sign is arbitrary; fixed, so that the same features give the same map.
    return places * np.sign(places[np.abs(places).argmax(0), [0, 1]] + 1e-300)


def umap_places(x: Floats) -> Floats:
    """(tiles, 2) by UMAP (McInnes et al. 2018, arXiv 1802.03426) in the cosine distance, the same every time."""
    try:
        umap = importlib.import_module("umap")  # here: it compiles for seconds
    except ImportError as error:
        raise UsageError(f"--map umap: needs umap-learn ({error}); pip install 'histossl[umap]'") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that one thread is used because of the seed, and numba's about itself
        mapper = umap.UMAP(n_neighbors=min(15, len(x) - 1), metric="cosine", random_state=0, n_jobs=1)
        return np.asarray(mapper.fit_transform(x.astype(np.float32)), dtype=np.float64)


# ---- neighbours


def neighbourhoods(
    x: Floats, labels: Sequence[str], patients: Sequence[str], slides: Sequence[str]
) -> tuple[float, float, NDArray[np.int64]]:
    """(agreement, clumping, nearest tiles of other patients (tiles, NUM_NEIGHBOURS), -1 where there are none).

    Agreement: of a tile's nearest tiles of other patients, the share with its label, as a mean over classes of their
    tiles' means; classes with one patient have no others to be found and are left out. Clumping: of its nearest tiles
    at all, the share from its own slide. x (N, D) has unit length.
    """
    label = np.unique(labels, return_inverse=True)[1]
    patient = np.unique(patients, return_inverse=True)[1]
    slide = np.unique(slides, return_inverse=True)[1]
    closeness = x @ x.T
    np.fill_diagonal(closeness, -np.inf)
    any_nearest = np.argsort(-closeness, axis=1, kind="stable")[:, :NUM_NEIGHBOURS]
    clumping = float((slide[any_nearest] == slide[:, None]).mean())
    closeness[patient[:, None] == patient[None]] = -np.inf
    nearest = np.argsort(-closeness, axis=1, kind="stable")[:, :NUM_NEIGHBOURS]
    there = np.isfinite(np.take_along_axis(closeness, nearest, 1))
    same = (label[nearest] == label[:, None]) & there
    share = same.sum(1) / np.maximum(there.sum(1), 1)
    with_others = [number for number in np.unique(label) if len(np.unique(patient[label == number])) > 1]
    agreement = float(np.mean([share[label == number].mean() for number in with_others])) if with_others else math.nan
    return agreement, clumping, np.where(there, nearest, -1)


def _panels(content: Content, sample: Sample, nearest: dict[str, NDArray[np.int64]], index: TileIndex) -> list[Panel]:
    rng = np.random.default_rng(1)
    panels: list[Panel] = []
    for label in content.classes:
        members = [number for number, its in enumerate(sample.label) if its == label]
        if len({sample.patient[number] for number in members}) < 2 or len(panels) == MOST_CLASSES:
            continue  # with one patient there is no tile of this label that could be found
        query = int(rng.choice(members))
        found = {
            start: [
                Picture(_tile(index, sample.slide[n], int(sample.row[n])), sample.label[n], sample.label[n] == label)
                for n in rows[query][:NUM_SHOWN].tolist()
                if n >= 0
            ]
            for start, rows in nearest.items()
        }
        panels.append(Panel(label, _tile(index, sample.slide[query], int(sample.row[query])), found))
    return panels


def _tile(index: TileIndex, slide: str, row: int) -> str:
    """A small data URI of the tile in row `row` of a slide's embedding: its tiles of the finest scale, in order."""
    tiles = index.tiles_of(slide)
    numbers = np.arange(tiles.start, tiles.stop, dtype=np.int64)
    numbers = numbers[index.rows(numbers)["scale"] == 0]
    with Image.open(io.BytesIO(index.read(int(numbers[row])))) as picture:
        small = picture.convert("RGB").resize((TILE_PX, TILE_PX), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=84)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


# ---- deciding tiles


def _deciding(
    content: Content, workspace: Workspace, index: TileIndex
) -> tuple[list[tuple[str, list[Picture]]], str, str, int]:
    """Per class the labelled tile of some slides that weighs most in the saved model: by attention, else probability.

    Slides with tiles or regions of several labels are left out: they are slides of no class.

    The slides are seen through the model's own backbone: trained end to end, it is no longer that of its start.
    """
    if not (content.run.model / "model.json").exists():
        return [], "", "", 0
    # Here, since it needs torch, and most remakes of a report have no model to look at.
    from histossl.evaluation.predict import predict_tiles
    from histossl.features.extraction import device_of, embed_slides
    from histossl.heads.model_folder import load_model

    model = load_model(content.run.model)
    rng = np.random.default_rng(2)
    found: list[tuple[str, list[Picture]]] = []
    by_attention = False
    shown: dict[str, list[str]] = {}
    tested = _tested(content)
    for label in model.info.classes[:MOST_CLASSES]:
        slides = sorted(slide for slide, rows in tested.items() if {its for its, _ in rows.values()} == {label})
        shown[label] = [slides[n] for n in sorted(rng.permutation(len(slides))[:NUM_SHOWN].tolist())]
    wanted = sorted({slide for some in shown.values() for slide in some})
    files = embed_slides(workspace, index, wanted, model.embedder(device_of("auto")), EmbedConfig())
    for number, (label, slides) in enumerate(shown.items()):
        row_of_pictures: list[Picture] = []
        for slide in slides:
            with h5py.File(files[slide]) as file:
                rows = np.array([row for row in tested[slide] if row is not None] or range(len(file["features"])))
                features = file["features"][:][rows]
            prediction, each, attention = predict_tiles(model, slide, features)
            by_attention |= attention is not None
            weight: NDArray[Any] = each[:, number] if attention is None else attention
            called = model.info.classes[int(prediction.shares.argmax())]
            row_of_pictures.append(Picture(_tile(index, slide, int(rows[weight.argmax()])), called, called == label))
        if row_of_pictures:
            found.append((label, row_of_pictures))
    return found, "attention" if by_attention else "probability", model.info.start, model.info.num_items
