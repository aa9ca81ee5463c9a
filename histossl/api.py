"""What Python users call: each stage as a function of a workspace, and tiles and features without one.

`import histossl` offers all of this under its own name (histossl.tile, histossl.pretrain, ...). A workspace may be
given as a path. Stages print as the commands do, to standard error, and draw a bar in a notebook; within
`histossl.silent()` they print nothing. What a stage has finished is never done twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from histossl.core.config import EmbedConfig, FinetuneConfig, PretrainConfig, RuntimeConfig, TileConfig
from histossl.core.workspace import Workspace
from histossl.tiles.store.index import TileIndex

if TYPE_CHECKING:
    from torch import nn

    from histossl.backbones.loading import BackboneInfo
    from histossl.evaluation.finetune import Result as FinetuneResult
    from histossl.features.extraction import Embedder
    from histossl.slides.ledger import LedgerRow
    from histossl.training.loop import Probe
    from histossl.training.pretrain import Result as PretrainResult

Place = Workspace | Path | str


def workspace_at(place: Place) -> Workspace:
    return place if isinstance(place, Workspace) else Workspace(Path(place))


# ---- stages


def tile(
    slides: Path | str,
    workspace: Place,
    config: TileConfig | None = None,
    *,
    num_workers: int | None = None,
    slide_mpp: float | None = None,
    mpp_csv: Path | str | None = None,
    regions: Path | str | None = None,
    retry: bool = False,
) -> list[LedgerRow]:
    """Cut the tissue of every slide below `slides` into tiles; one row per file says what became of it.

    `config` None: as the workspace is tiled, else 256 px at 0.5 microns per pixel. `num_workers` 0: in this process,
    None: one process per core. `slide_mpp` and `mpp_csv` (columns slide,mpp) give microns per pixel of slides that do
    not say it; `regions` is a folder of QuPath GeoJSON files; `retry` tries again what failed.
    """
    from histossl.tiles.tiling import stored_config, tile_archive

    at = workspace_at(workspace).make()
    return tile_archive(
        Path(slides),
        at,
        config or stored_config(at) or TileConfig(),
        num_workers,
        slide_mpp=slide_mpp,
        mpp_csv=None if mpp_csv is None else Path(mpp_csv),
        regions=None if regions is None else Path(regions),
        retry=retry,
    )


def pretrain(
    workspace: Place,
    config: PretrainConfig = PretrainConfig(),
    name: str = "",
    runtime: RuntimeConfig = RuntimeConfig(),
    probe: Probe | None = None,
) -> PretrainResult:
    """Continue pretraining on the tiles of a workspace, in this process: on one GPU, or the CPU.

    Leaves `result.run.backbone`; `name` is the run's, by default the method's. `runtime`: how it is carried out.
    Test patients stay out where `config.excluded_slides` names their slides: see `slides_of_test_patients`.
    `probe(backbone, info)` scores a backbone on labelled training slides as the run goes, higher is better. The same
    call goes on where it was interrupted.
    """
    from histossl.runtime.locks import refuse_while_tiling
    from histossl.training.pretrain import pretrain as stage

    at = workspace_at(workspace)
    refuse_while_tiling(at)
    return stage(TileIndex.open(at), at.pretrain(name or config.method), config, runtime, probe)


def slides_of_test_patients(labels: Path | str, workspace: Place) -> tuple[str, ...]:
    """Every slide of every patient who has one marked `test` in labels.csv: for `PretrainConfig.excluded_slides`."""
    from histossl.labels.exclusions import slides_of_test_patients as of_test_patients

    return tuple(sorted(of_test_patients(Path(labels), TileIndex.open(workspace_at(workspace)))))


def embed(
    workspace: Place,
    start: str = "adapted",
    *,
    labels: Path | str = "",
    backbone: str = "",
    weights: str = "",
    adapted: str = "",
    input_px: int = 0,
    seed: int = 0,
    config: EmbedConfig = EmbedConfig(),
) -> Path:
    """Features of all tiles through one start; the folder of SLIDE.h5 with features (N, D) and coords (N, 2).

    `start`: random, imagenet, adapted, colour, a pretraining run or a file; `backbone` is the timm name of random and
    imagenet. With `labels` only the slides that labels.csv names. `label_efficiency` takes the folder.
    """
    from histossl.evaluation.finetune import embed_start

    of_start = FinetuneConfig(
        labels=str(labels),
        starts=(start,),
        backbone=backbone,
        weights=weights,
        adapted=adapted,
        input_px=input_px,
        seed=seed,
    )
    return embed_start(workspace_at(workspace), of_start, config)


def finetune(
    workspace: Place,
    config: FinetuneConfig,
    name: str = "default",
    embed: EmbedConfig = EmbedConfig(),
    report: bool = True,
) -> FinetuneResult:
    """The label-efficiency curve of starts on a workspace's slides; tables, a model and report.html in `result.run`."""
    from histossl.evaluation.finetune import finetune as stage

    at = workspace_at(workspace)
    result = stage(at, name, config, embed)
    if report and result.finished:
        from histossl.report.html import write_report

        write_report(result.run, at)
    return result


def predict(
    workspace: Place,
    model: Path | str,
    name: str = "default",
    slides: Path | str | None = None,
    *,
    config: EmbedConfig = EmbedConfig(),
    heatmaps: bool = True,
    slide_mpp: float | None = None,
    mpp_csv: Path | str | None = None,
) -> Path:
    """Class probabilities by a finetuned model's folder: of the slides below `slides` (tiling what is not tiled yet),
    or of every slide of the workspace. The path of predictions.csv."""
    from histossl.evaluation.predict import predict as stage

    return stage(
        workspace_at(workspace),
        Path(model),
        name,
        None if slides is None else Path(slides),
        config,
        heatmaps,
        slide_mpp,
        None if mpp_csv is None else Path(mpp_csv),
    )


# ---- tiles and features


@dataclass(frozen=True)
class Tile:
    """`pixels` (H, H, 3) uint8 RGB; `x_l0`, `y_l0`: its upper left corner in level-0 pixels of the slide."""

    number: int
    slide: str
    x_l0: int
    y_l0: int
    pixels: NDArray[np.uint8]


def iterate_tiles(index: TileIndex, numbers: Sequence[int] | NDArray[np.integer] | None = None) -> Iterator[Tile]:
    """The tiles of a workspace one by one, in the order of their numbers; or those that are named.

    Numbers of a slide's tiles: `index.tiles_of(slide)`. StoreError where a tile is damaged.
    """
    for number in range(len(index)) if numbers is None else numbers:
        jpeg = index.read(int(number))
        ((x_l0, y_l0),) = index.coords_l0([int(number)]).tolist()
        slide = index.slides[int(index.slide_of([int(number)])[0])]
        yield Tile(int(number), slide, x_l0, y_l0, simplejpeg.decode_jpeg(jpeg, "RGB"))


def embedder(backbone: nn.Module, info: BackboneInfo, input_px: int = 0, device: str = "auto") -> Embedder:
    """A backbone as a function of tiles: `embedder(*load_backbone(path)).embed(tiles)`.

    Tiles uint8 (B, 3, H, H) on its `device` become features (B, D) float32, as `embed` makes them. `input_px` 0: the
    size that the backbone was last trained on.
    """
    from histossl.features.extraction import backbone_embedder, device_of

    return backbone_embedder(info.timm_name, backbone, info, input_px or info.input_px, device_of(device))
