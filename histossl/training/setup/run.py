"""A run with everything that it is made of, as it stands before its first step: tiles, method, plan, optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from histossl.backbones.loading import BackboneInfo, create_backbone, recorded_with
from histossl.core.config import PretrainConfig, RuntimeConfig, read_run, with_overrides
from histossl.core.errors import StoreError, UsageError
from histossl.core.workspace import PretrainDir
from histossl.methods import TAUGHT, classes_of, entry_of, self_supervised
from histossl.methods.method import Method, Views
from histossl.methods.modules.batchnorm import group_of, has_batchnorm
from histossl.runtime.distributed import Processes
from histossl.runtime.process_pool import loader_threads
from histossl.tiles.store.index import TileIndex
from histossl.tiles.store.subset import Subset, open_subset
from histossl.tiles.stream.loader import TileBatches, decode_good_tiles, tile_batches
from histossl.tiles.stream.sampler import TileOrder
from histossl.training.loop import Precision
from histossl.training.setup.optim import optimizer_for, precision_for, recompute_cheap, tune
from histossl.training.setup.planner import plan
from histossl.views.recipe import clean_view, make_views, recipe_named, with_settings

# Added to the run's seed: other tiles, in another order, than the training stream begins with.
PREFILL, MONITOR, BATCHNORM = 1, 2, 3

NOTHING_TO_RECOMPUTE = "--recompute: {} is no ViT, whose blocks it is for; leave it out"
RECOMPUTED = "recompute: norms and GELU of the ViT's blocks are computed twice, for a third less memory"


def pool_of(index: TileIndex, config: PretrainConfig) -> tuple[Subset | None, NDArray[np.bool_]]:
    """What is pretrained on: the subset of tiles, if any, and whether each slide of the index takes part."""
    subset = open_subset(index, config.subset) if config.subset else None
    excluded = set(config.excluded_slides)
    keep = np.array([slide not in excluded for slide in index.slides])
    if subset is not None:
        keep &= subset.counts(index) > 0
    return subset, keep


def refuse_unknown(config: PretrainConfig, operation: RuntimeConfig) -> None:
    """What can be refused without a tile: weights that are not there or do not fit, knobs, recipe, view size."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _precision(operation, device)
    method_class, knobs_class = classes_of(config.method)
    knobs = with_overrides(knobs_class(), config.set)
    backbone, info = _backbone(config, knobs)
    _method(method_class, config, backbone, info, knobs)
    if operation.recompute and not recompute_cheap(backbone):
        raise UsageError(NOTHING_TO_RECOMPUTE.format(config.backbone))


def _precision(operation: RuntimeConfig, device: torch.device) -> Precision:
    if operation.decode_on_gpu and device.type != "cuda":
        raise UsageError("--decode-on-gpu: this machine shows no GPU; leave it out")
    return precision_for(operation.precision, device)


def _backbone(config: PretrainConfig, knobs: Any) -> tuple[nn.Module, BackboneInfo]:
    drop_path = getattr(knobs, "drop_path", 0.0)
    backbone, info = create_backbone(config.backbone, config.weights, config.seed, drop_path)
    _refuse_view_size(backbone, config, config.view_px, "--view-px")
    return backbone, info


def _method(
    method_class: Any, config: PretrainConfig, backbone: nn.Module, info: BackboneInfo, knobs: Any, *taught: nn.Module
) -> Method:
    recipe = recipe_named(config.recipe or entry_of(config.method).default_recipe, config.view_px)
    recipe = with_settings(recipe, config.view_set)
    torch.manual_seed(config.seed)  # of the heads
    method: Method = method_class(backbone, info.feature_dim, recipe, knobs, *taught)
    for side_px in {view.size_px for view in method.views().views} - {config.view_px}:
        _refuse_view_size(backbone, config, side_px, "--set local_px")
    return method


def _group_of(run: PretrainDir, asked: int) -> int:
    """Tiles of a BatchNorm statistic: the run's own where it was begun. Older versions did not write them down."""
    if not asked or not run.run_json.exists():
        return asked
    before = read_run(run.run_json)["plan"]
    own = before["knobs"].get("batchnorm_group_tiles")
    return int(own or group_of(before["tiles_per_pass"], asked, before["num_processes"]) or asked)


class Prepared:
    """What the parts of `pretrain` would otherwise pass from hand to hand. `plan` may still be cut to fit."""

    def __init__(
        self,
        index: TileIndex,
        run: PretrainDir,
        config: PretrainConfig,
        operation: RuntimeConfig,
        processes: Processes,
        teacher: nn.Module | None = None,
    ) -> None:
        self.index, self.run, self.config, self.operation, self.processes = index, run, config, operation, processes
        self.device = processes.device
        asked = operation.num_workers
        self.num_workers = asked if asked >= 0 else loader_threads(processes.count)
        self.precision = _precision(operation, self.device)
        self.subset, self.keep = pool_of(index, config)
        self.order = self.order_of(0)
        if teacher is None:
            self_supervised(config.method)
        taught = (teacher,) if config.method in TAUGHT else ()
        method_class, knobs_class = classes_of(config.method)
        knobs = with_overrides(knobs_class(), config.set)
        backbone, self.info = _backbone(config, knobs)
        self.earlier = recorded_with(config.weights) or {}  # of weights that an earlier run left
        by_hand = {assignment.partition("=")[0].strip().replace("-", "_") for assignment in config.set}
        self.plan_of = partial(
            plan,
            config,
            self.order.num_tiles,
            self.order.num_slides,
            {name: value for name, value in asdict(knobs).items() if name in by_hand},
            processes.count,
            batchnorm=has_batchnorm(backbone),
            training=method_class.trained_with(knobs),
            to_fit=method_class.planned,
            batchnorm_group=_group_of(run, getattr(knobs, "batchnorm_group_tiles", 0)),
            company=self.order.company(),
        )
        self.plan = self.plan_of(micro_batches=operation.micro_batches or 1)
        self.knobs = knobs = replace(knobs, **self.plan.knobs)
        self.start_weights = {name: value.detach().clone() for name, value in backbone.named_parameters()}
        method = _method(method_class, config, backbone, self.info, knobs, *taught)
        self.method = method.to(self.device).train()
        tune(self.method, self.device, self.precision.name, operation.compiled, operation.deterministic)
        self.optimizer = optimizer_for(self.method, self.plan, self.device)
        self.scaler = self.precision.scaler(self.device)
        if operation.recompute:
            self.recompute(asked=True)

    def replan(self, micro_batches: int, num_steps: int = 0) -> None:
        """With a batch in other pieces; `num_steps` is what --hours came to."""
        recompute = self.plan.recompute
        self.plan = self.plan_of(micro_batches=micro_batches, num_steps=num_steps)
        if recompute:
            self.plan = replace(self.plan, recompute=True, reasons=(*self.plan.reasons, RECOMPUTED))
        self.knobs = replace(self.knobs, **self.plan.knobs)
        vars(self.method).update(config=self.knobs)  # the momentum follows the length

    def recompute(self, asked: bool = False) -> None:
        """Before a batch is cut, which some methods pay for: what is cheap of a ViT's activations is not kept."""
        if asked and self.operation.compiled:
            raise UsageError("--recompute: what is compiled does so by itself; leave it or --compile out")
        if self.plan.recompute or self.operation.compiled:
            return
        if not recompute_cheap(self.method.learner()):
            if asked:
                raise UsageError(NOTHING_TO_RECOMPUTE.format(self.config.backbone))
            return
        self.plan = replace(self.plan, recompute=True, reasons=(*self.plan.reasons, RECOMPUTED))

    # ---- tiles and views

    def order_of(self, purpose: int) -> TileOrder:
        tiles = None if self.subset is None else self.subset.tiles
        return TileOrder(self.index, self.config.seed + purpose, self.config.slide_balance, self.keep, tiles)

    def tile_batches(self, first: int, order: TileOrder | None = None, num_steps: int | None = None) -> TileBatches:
        parts = self.plan.micro_batches
        return tile_batches(
            self.index,
            order or self.order,
            self.plan.batch_size // parts,
            first * parts,
            ((self.plan.num_steps - first) if num_steps is None else num_steps) * parts,
            self.processes.rank,
            self.processes.count,
            self.num_workers,
            pin_memory=self.device.type == "cuda",
            decode_on=self.device if self.operation.decode_on_gpu else None,
        )

    def views(self, tiles: TileBatches, first: int = 0) -> Iterator[Views]:
        """What the method sees of each batch, from step `first` on."""
        for batch, (pixels, numbers, positions) in enumerate(tiles):
            recipe = self.method.views((first + batch // self.plan.micro_batches) / self.plan.num_steps)
            on_device = pixels.to(self.device, non_blocking=True)
            statistics = (self.info.mean, self.info.std)
            images = make_views(on_device, recipe, self.config.seed, positions, statistics)
            images = [image.contiguous(memory_format=torch.channels_last) for image in images]
            owners = torch.stack([numbers, torch.from_numpy(self.index.slide_of(numbers.numpy()))])
            if self.device.type == "cuda":
                owners = owners.pin_memory()
            tiles_B, slides_B = owners.to(self.device, non_blocking=True)
            yield Views(images, tiles_B, slides_B, step=0, positions_B=positions, seed=self.config.seed)

    def clean_batches(self, purpose: int, num_tiles: int, size: int = 64) -> Iterator[tuple[Tensor, Tensor]]:
        """Tiles as they are, at the size of the views, normalised: the same ones whenever asked, in the same places.

        A damaged one is left out. Raises StoreError where none can be read.
        """
        order = self.order_of(purpose)
        numbers = order.tile_numbers(0, min(num_tiles, order.num_tiles))
        places = np.arange(len(numbers))
        any_good = False
        for some in np.array_split(places, math.ceil(len(numbers) / size)):  # alike: BatchNorm weighs them alike
            pixels, good = decode_good_tiles(self.index, numbers[some])
            if len(good):
                any_good = True
                view = clean_view(pixels.to(self.device), self.config.view_px, (self.info.mean, self.info.std))
                yield view, torch.from_numpy(some[np.isin(numbers[some], good)])
        if not any_good:
            raise StoreError(f"{self.index.path}: none of {len(numbers):,} tiles can be read; is the disk still there?")


@torch.no_grad()
def _refuse_view_size(backbone: nn.Module, config: PretrainConfig, side_px: int, option: str) -> None:
    """One empty image through the backbone, before anything else: some take no other size than their own."""
    backbone.eval()
    try:
        backbone(torch.zeros(1, 3, side_px, side_px))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise UsageError(f"{option} {side_px}: {config.backbone} does not take that size ({error})") from error
