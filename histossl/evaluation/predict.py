"""Stage `predict`: a saved model and slides in; one row per slide out, with a warning where the model knows nothing.

WORKSPACE/predictions/NAME/
    run.json            which model spoke; another one needs another NAME
    predictions.csv     slide, predicted, p_CLASS..., num_tiles, trained_on, distance, usual_distance, warning
                        (trained_on: yes where the model has learnt the label of a slide of this content, so that a
                        right answer proves nothing; distance: to the nearest training slide; usual: the farthest that
                        a training patient lies off)
    heatmaps/           SLIDE.png (tissue, and tissue under attention or probability), SLIDE.geojson for QuPath
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from histossl.core import console
from histossl.core.anonymous import is_anonymous, names_of
from histossl.core.config import EmbedConfig, TileConfig, TissueConfig, read_run, write_run
from histossl.core.errors import MismatchError, StoreError, UsageError
from histossl.core.names import exact_key
from histossl.core.text import CsvReader, write_csv
from histossl.core.text_files import separator_in
from histossl.core.workspace import PredictionDir, Workspace
from histossl.evaluation.heatmap import draw_heatmap, qupath_corners, write_qupath
from histossl.features.extraction import Bags, device_of, embed_slides, slide_tiles
from histossl.heads.abmil import FittedAbmil
from histossl.heads.feature_heads import Floats
from histossl.heads.model_folder import Model, distances, load_model
from histossl.labels.training_slides import Learnt, slides_learnt
from histossl.runtime.locks import refuse_while_tiling
from histossl.slides.ledger import LedgerRow, hidden
from histossl.tiles.store.anonymisation import holders
from histossl.tiles.store.index import TileIndex
from histossl.tiles.tiling import tile_archive

FEW_TILES = 5


@dataclass(frozen=True)
class SlidePrediction:
    slide: str
    shares: Floats  # (C,)
    num_tiles: int
    distance: float
    usual_distance: float
    warning: str


@dataclass(frozen=True)
class PredictConfig:
    """What was asked for, as run.json tells it."""

    model: str
    slides: str
    slide_mpp: float | None
    heatmaps: bool


def predict(
    workspace: Workspace,
    model_folder: Path,
    name: str = "default",
    slides: Path | None = None,
    embed: EmbedConfig = EmbedConfig(),
    heatmaps: bool = True,
    slide_mpp: float | None = None,
    mpp_csv: Path | None = None,
) -> Path:
    """Predict every slide below `slides` (tiling what is not tiled yet), or without it every slide of the workspace.

    A file below `slides` whose content is tiled under another name is predicted from those tiles, under its own name.
    """
    model = load_model(model_folder)
    folder = workspace.predictions(name)
    digest = _digest_of(model)
    _refuse_another_model(folder, digest)
    rows: list[LedgerRow] = []
    if slides is not None:
        rows = tile_archive(slides, workspace, tile_config_in(workspace, model), slide_mpp=slide_mpp, mpp_csv=mpp_csv)
        rows = [hidden(row, names_of(workspace)) for row in rows]
        _refuse_none(slides, rows, [row for row in rows if row.num_tiles or row.tile_twin])
    refuse_while_tiling(workspace)
    index = TileIndex.open(workspace)
    refuse_other_tiles(model, index)
    tiles_of = {slide: slide for slide in index.slides if len(slide_tiles(index, slide))}
    if slides is not None:
        tiles_of = _tiles_of(workspace, rows, tiles_of)
        _refuse_none(slides, rows, tiles_of)
    skipped = [(row.slide or row.file, row.tile_reason or row.reason) for row in rows if row.slide not in tiles_of]
    embedder = model.embedder(device_of(embed.device))
    files = embed_slides(workspace, index, sorted({*tiles_of.values()}), embedder, embed)
    config = PredictConfig(str(model_folder), str(slides or ""), slide_mpp, heatmaps)
    write_run(folder.run_json, config, model_digest=digest, model=asdict(replace(model.info, provenance={})))
    found = []
    with console.progress("predicting", len(tiles_of), "slides") as bar:
        for slide, holder in tiles_of.items():
            tiles = Bags([(files[holder], None)]).tiles(0)
            one, tile_shares, attention = predict_tiles(model, slide, tiles)
            found.append(one)
            if heatmaps:
                _draw(folder, model, index, holder, one, tile_shares, attention)
            bar.advance()
    learnt = slides_learnt(model.info.provenance, index)
    learnt = replace(learnt, slides=frozenset(slide for slide, holder in tiles_of.items() if holder in learnt.slides))
    _write(folder.table, found, skipped, model.info.classes, learnt)
    _show(found, skipped, model.info.classes, learnt)
    console.say(f"{console.count(len(found), 'slide')} predicted: {folder.table}")
    return folder.table


def _tiles_of(workspace: Workspace, rows: Sequence[LedgerRow], with_tiles: Iterable[str]) -> dict[str, str]:
    """Each slide of `rows` with the slide that holds its tiles: itself, or one of the same content."""
    own = {slide: slide for slide in with_tiles}
    holder_of = {**own, **holders(workspace, own)}
    found = {}
    for row in rows:
        if row.slide not in holder_of or not (row.num_tiles or row.tile_twin):
            continue
        found[row.slide] = holder = holder_of[row.slide]
        if not row.num_tiles:
            console.say(f"{row.slide} is predicted from the tiles of {holder}, which has the same content")
    return found


def _refuse_none(slides: Path, rows: Sequence[LedgerRow], with_tiles: Collection[object]) -> None:
    if not with_tiles:
        why = f", the first because: {rows[0].tile_reason or rows[0].reason}" if rows else ""
        raise StoreError(f"{slides}: none of {console.count(len(rows), 'slide')} gave a tile{why}")


def _digest_of(model: Model) -> str:
    """Changes with whatever may change what the model says."""
    hashed = hashlib.sha256(json.dumps(asdict(replace(model.info, provenance={}))).encode())
    for name in ("backbone.safetensors", "head.safetensors"):
        with (model.folder / name).open("rb") as file:
            hashed.update(hashlib.file_digest(file, "sha256").digest())
    return hashed.hexdigest()[:16]


def _refuse_another_model(folder: PredictionDir, digest: str) -> None:
    if folder.run_json.exists():
        before = read_run(folder.run_json)
        if before.get("model_digest") != digest:
            raise MismatchError(
                f"{folder.root} holds what another model said ({before['config'].get('model')}); use another --name"
            )


def tile_config(model: Model) -> TileConfig:
    """How slides must be tiled for this model."""
    stored = dict(model.info.provenance["tiling"])
    return TileConfig(**{**stored, "tissue": TissueConfig(**stored["tissue"])})


def tile_config_in(workspace: Workspace, model: Model) -> TileConfig:
    """The same, but whether names are hidden is the workspace's; a new one is as the model's was."""
    config = tile_config(model)
    new = not workspace.archive_csv.exists() and not workspace.tiles.exists()
    return replace(config, anonymize=config.anonymize if new else is_anonymous(workspace))


def refuse_other_tiles(model: Model, index: TileIndex, option: str = "--model") -> None:
    if index.tile_px != model.info.tile_px or abs(index.mpp / model.info.mpp - 1) > 0.01:
        raise UsageError(
            f"{option} {model.folder}: knows tiles of {model.info.tile_px} px at {model.info.mpp:g} microns per pixel, "
            f"this workspace holds {index.tile_px} px at {index.mpp:g}; use another --workspace for these slides"
        )


# ---- one slide


def predict_tiles(
    model: Model, slide: str, tiles: NDArray[np.float32]
) -> tuple[SlidePrediction, Floats, Floats | None]:
    """The slide's prediction, each tile's own (N, C), and its attention where the head has one."""
    rows, bag = Rows(tiles), OneBag(tiles)
    each = model.fitted.predict_proba(rows, np.arange(len(tiles)))
    attention = None
    if model.info.unit == "slide":
        shares = model.fitted.predict_proba(bag, np.zeros(1, dtype=np.int64))[0]
        if isinstance(model.fitted, FittedAbmil):
            attention = model.fitted.of_tiles(tiles)[1]
    else:  # it learnt from regions or tiles: a slide is the mean of its tiles
        shares = each.mean(0)
    far, usual = distances(model.training_ND, model.patients_N, bag.pooled)
    distance = float(far[0])
    return (
        SlidePrediction(slide, shares, len(tiles), distance, usual, _warning(len(tiles), distance, usual)),
        each,
        attention,
    )


def _warning(num_tiles: int, distance: float, usual: float) -> str:
    said = []
    if distance > usual:
        said.append(
            f"lies {distance / usual:.1f} times as far from the training slides as the oddest training patient does"
        )
    if num_tiles < FEW_TILES:
        said.append(f"only {console.count(num_tiles, 'tile')} of tissue")
    return "; ".join(said)


class Rows:
    """Every tile as an item of its own."""

    def __init__(self, tiles: NDArray[np.float32]) -> None:
        self._tiles = tiles

    @property
    def pooled(self) -> Floats:
        return self._tiles.astype(np.float64)

    def tiles(self, item: int) -> NDArray[np.float32]:
        return self._tiles[item : item + 1]


class OneBag:
    """All tiles as one item."""

    def __init__(self, tiles: NDArray[np.float32]) -> None:
        self._tiles = tiles

    @property
    def pooled(self) -> Floats:
        mean: Floats = self._tiles.mean(0, dtype=np.float64)
        return mean[None]

    def tiles(self, item: int) -> NDArray[np.float32]:
        del item
        return self._tiles


# ---- what is left of it


def _draw(
    folder: PredictionDir,
    model: Model,
    index: TileIndex,
    holder: str,
    one: SlidePrediction,
    tile_shares: Floats,
    attention: Floats | None,
) -> None:
    numbers = slide_tiles(index, holder)
    side_l0 = float(index.facts(holder)["scales"][0]["side_l0"])
    best = int(one.shares.argmax())
    label = model.info.classes[best]
    values, low, high = tile_shares[:, best], 0.0, 1.0
    caption = f"probability of {label}, tile by tile"
    if attention is not None:
        values, high, caption = attention, float(attention.max()), f"attention (predicted: {label})"
    draw_heatmap(folder.heatmap(one.slide), index, numbers, side_l0, values, caption, low, high)
    corners = qupath_corners(index, holder, numbers)
    write_qupath(folder.qupath(one.slide), corners, side_l0, tile_shares, model.info.classes, attention)


def _write(
    path: Path,
    found: Sequence[SlidePrediction],
    skipped: Sequence[tuple[str, str]],
    classes: Sequence[str],
    learnt: Learnt,
) -> None:
    """A slide that could not be predicted has a row too, with the reason and no probabilities.

    What the same model said of other slides before stays.
    """
    columns = ["slide", "predicted", *(f"p_{name}" for name in classes)]
    columns += ["num_tiles", "trained_on", "distance", "usual_distance", "warning"]
    rows: list[list[Any]] = []
    for one in found:
        label = classes[int(one.shares.argmax())]
        shares = [f"{share:.6f}" for share in one.shares]
        trained_on = "yes" if one.slide in learnt.slides else "no"
        figures = [one.num_tiles, trained_on, f"{one.distance:.4f}", f"{one.usual_distance:.4f}"]
        rows.append([one.slide, label, *shares, *figures, one.warning])
    rows += [[slide, "", *[""] * len(classes), 0, "", "", "", f"not predicted: {why}"] for slide, why in skipped]
    now = {exact_key(str(row[0])) for row in rows}
    if path.exists():
        with path.open(newline="", encoding="utf-8-sig") as file:
            before = list(CsvReader(file, separator_in(file, {"slide"}.issubset)))
        # An older version's rows had no trained_on: that cell stays empty.
        kept = [row for row in before if {*row} <= {*columns} and exact_key(row.get("slide", "")) not in now]
        rows += [[row.get(name, "") for name in columns] for row in kept]
    write_csv(path, columns, sorted(rows, key=lambda row: str(row[0])))


def _show(
    found: Sequence[SlidePrediction],
    skipped: Sequence[tuple[str, str]],
    classes: Sequence[str],
    learnt: Learnt,
    most: int = 20,
) -> None:
    rows = [
        [
            one.slide,
            classes[int(one.shares.argmax())],
            f"{one.shares.max():.2f}",
            "yes" if one.slide in learnt.slides else "no",
            one.warning,
        ]
        for one in found
    ]
    columns = ["slide", "predicted", "probability", "trained on", "warning"]
    console.table("predictions", columns, rows[:most], right=["probability"])
    if len(rows) > most:
        console.say(f"and {len(rows) - most:,} more in the file")
    if learnt.by_name:
        console.say(f"trained_on: compared by the slides' names, for {learnt.by_name}")
    if number := sum(one.slide in learnt.slides for one in found):
        console.warn(
            f"the model was trained with {_labels_of(number, len(found))} here (trained_on in the file): what it says "
            f"of {'it' if number == 1 else 'them'} tests nothing"
        )
    warned = sum(bool(one.warning) for one in found)
    if warned:
        console.warn(
            f"{warned:,} of {console.count(len(found), 'slide')}: look at the warning before you trust the prediction"
        )
    for slide, why in skipped:
        console.warn(f"{slide}: not predicted ({why})")


def _labels_of(number: int, among: int) -> str:
    """Of the slides here, so many whose labels are known."""
    if number == among:
        return "the label of the one slide" if among == 1 else f"the labels of all {among:,} slides"
    return f"the label{'s' if number > 1 else ''} of {number:,} of the {among:,} slides"
