"""histossl: continue self-supervised pretraining on a lab's own slides, and measure how many labels that saved.

From Python (examples/python_api.md shows each at work):

    Slides      open_slide(path) -> Slide         .read_region_um(x_um, y_um, width_um, height_um, mpp), .thumbnail(px)
    Tiles       TileIndex.open(workspace)         .slides, .tiles_of(slide), .coords_l0(numbers), len()
                iterate_tiles(index)              Tile by Tile: slide, place, pixels
                decode_tiles(jpegs, tile_px)      a batch (B, 3, H, H) uint8, of index.read_many(numbers)
    Backbones   load_backbone(path)               (network, BackboneInfo) of a backbone.safetensors
                create_backbone(name, weights)    the same of a timm model: imagenet, random or a file of weights
                embedder(network, info)           .embed(tiles): features (B, D)
    Views       recipe_named("mocov2-histology")  how a tile becomes views
                make_views(tiles, recipe, ...)    a batch of tiles as augmented views
                contact_sheet(...)                a picture of them
    Stages      tile, pretrain, embed, finetune, predict: functions of a Workspace, with the configs TileConfig,
                PretrainConfig, FinetuneConfig, TuneConfig, EmbedConfig, TissueConfig, and RuntimeConfig for how a run
                is carried out; slides_of_test_patients for what stays out of pretraining
    Curves      label_efficiency(features, labels, patients) -> CurveResult: the curve for any features, as arrays or
                HDF5 files. No workspace, no torch
    Printing    with silent(): ...                nothing is printed
    Errors      HistosslError; UsageError (also a ValueError): what was given cannot be used

Names are imported when they are first used: `import histossl` is quick, and `label_efficiency` imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:  # for editors and mypy; at run time `_HOME` says where each name lives
    from histossl.api import (
        Tile,
        embed,
        embedder,
        finetune,
        iterate_tiles,
        predict,
        pretrain,
        slides_of_test_patients,
        tile,
    )
    from histossl.backbones.loading import BackboneInfo, create_backbone, load_backbone
    from histossl.core.config import (
        EmbedConfig,
        FinetuneConfig,
        PretrainConfig,
        RuntimeConfig,
        TileConfig,
        TissueConfig,
        TuneConfig,
    )
    from histossl.core.console import muted as silent
    from histossl.core.errors import HistosslError, UsageError
    from histossl.core.workspace import Workspace
    from histossl.evaluation.label_efficiency import label_efficiency
    from histossl.slides.reading.slide import Slide, open_slide
    from histossl.stats.curve import CurveResult
    from histossl.tiles.store.index import TileIndex
    from histossl.tiles.stream.loader import decode_tiles
    from histossl.views.contact_sheet import contact_sheet
    from histossl.views.recipe import make_views, recipe_named

__all__ = [
    "BackboneInfo",
    "CurveResult",
    "EmbedConfig",
    "FinetuneConfig",
    "HistosslError",
    "PretrainConfig",
    "RuntimeConfig",
    "Slide",
    "Tile",
    "TileConfig",
    "TileIndex",
    "TissueConfig",
    "TuneConfig",
    "UsageError",
    "Workspace",
    "contact_sheet",
    "create_backbone",
    "decode_tiles",
    "embed",
    "embedder",
    "finetune",
    "iterate_tiles",
    "label_efficiency",
    "load_backbone",
    "make_views",
    "open_slide",
    "predict",
    "pretrain",
    "recipe_named",
    "silent",
    "slides_of_test_patients",
    "tile",
]

_HOME = {
    "api": "Tile embed embedder finetune iterate_tiles predict pretrain slides_of_test_patients tile",
    "backbones.loading": "BackboneInfo create_backbone load_backbone",
    "core.config": "EmbedConfig FinetuneConfig PretrainConfig RuntimeConfig TileConfig TissueConfig TuneConfig",
    "core.console": "silent",
    "core.errors": "HistosslError UsageError",
    "core.workspace": "Workspace",
    "evaluation.label_efficiency": "label_efficiency",
    "slides.reading.slide": "Slide open_slide",
    "stats.curve": "CurveResult",
    "tiles.store.index": "TileIndex",
    "tiles.stream.loader": "decode_tiles",
    "views.contact_sheet": "contact_sheet",
    "views.recipe": "make_views recipe_named",
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names.split()}
_CALLED = {"silent": "muted"}  # where its own room calls it otherwise


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'histossl' has no attribute {name!r}")
    found = getattr(import_module(f"histossl.{_MODULE_OF[name]}"), _CALLED.get(name, name))
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
