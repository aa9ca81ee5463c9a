"""End-to-end finetuning: the last blocks or the whole backbone learn together with an attention head.

A step takes some labelled items, as many of each class, and some tiles of each, augments them on the device, and asks
for the item's label. It runs through the same loop as pretraining. The backbone learns slower than the head, and its
early blocks slower than its late ones. Where the labelled budget has four patients in each class, a quarter of them
is kept to stop by; the weights that did best on these are the ones used. Every start gets exactly the same of all this.

Shapes: S items in a step, T tiles of each, D features, C classes.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.nn import functional

from histossl.backbones.loading import BackboneInfo
from histossl.core.config import TuneConfig
from histossl.heads.abmil import FittedAbmil, GatedAttention
from histossl.heads.feature_heads import Floats, Ints
from histossl.methods.method import Method, Outcome, Views
from histossl.methods.schedules import warmup_cosine
from histossl.runtime.collectives import imagined
from histossl.tiles.store.index import TileIndex
from histossl.tiles.stream.loader import decode_tiles
from histossl.training.loop import Precision, has_bf16, train
from histossl.views.recipe import ViewRecipe, clean_view, make_views, normalise, recipe_named

WARMUP = 0.1  # share of the steps
FINAL_LR = 0.01
HEAD_FASTER = 10.0  # the head's learning rate over the last block's
LOOKS = 10  # at the validation part, during a run
FEWEST_TO_STOP_BY = 4  # patients per class, of which a quarter is kept for validation
SMOOTHING = 0.05
LEAST_SCALE = 0.5  # a crop covers at least half of the tile: few labels, and the tile must keep its content
CHUNK = 128  # tiles in one forward pass without gradients


class Tuned(Method):
    """Backbone and attention head over bags of tiles, with the labels of its items."""

    def __init__(
        self, backbone: nn.Module, feature_dim: int, num_classes: int, label_of_item: Tensor, tiles_per_bag: int
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = GatedAttention(feature_dim, num_classes, layer_norm=True)
        self.register_buffer("label_of_item", label_of_item, persistent=False)
        self.tiles_per_bag = tiles_per_bag

    def train(self, mode: bool = True) -> Tuned:
        """BatchNorm keeps its running statistics: a step holds too few slides to know better."""
        super().train(mode)
        for module in self.backbone.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def forward(self, views: Views) -> Outcome:
        """`views.slides_B` holds item numbers: T rows of one item after T rows of another."""
        features_BD = self.backbone(views.images[0])
        logits_SC, _ = self.head(features_BD.unflatten(0, (-1, self.tiles_per_bag)))
        items_S = views.slides_B[:: self.tiles_per_bag]
        assert isinstance(self.label_of_item, Tensor)
        labels_S = self.label_of_item[items_S]
        loss = functional.cross_entropy(logits_SC.float(), labels_S, label_smoothing=SMOOTHING)
        right = (logits_SC.argmax(1) == labels_S).float().mean()
        return Outcome(loss, {"accuracy": right.detach()})


@dataclass(frozen=True)
class TileSource:
    """Tiles of items: which numbers of the index belong to each."""

    index: TileIndex
    numbers: Sequence[NDArray[np.int64]]  # per item

    def some(self, item: int, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
        own = self.numbers[item]
        return own[rng.choice(len(own), count, replace=len(own) < count)]

    def at_most(self, item: int, count: int) -> NDArray[np.int64]:
        """The same ones whenever asked: spread evenly over the slide."""
        own = self.numbers[item]
        return own if len(own) <= count else own[np.linspace(0, len(own) - 1, count).round().astype(np.int64)]


class FittedTuned:
    """What `tune` leaves."""

    def __init__(
        self, backbone: nn.Module, info: BackboneInfo, head: FittedAbmil, input_px: int, test_tiles: int
    ) -> None:
        self.backbone, self.info, self.head = backbone, info, head
        self.input_px, self.test_tiles = input_px, test_tiles

    def predict_proba(self, source: TileSource, items: Ints) -> Floats:
        wide = np.zeros((len(items), self.head.num_classes))
        for row, item in enumerate(items):
            wide[row, self.head.present] = self.head.of_tiles(self.features(source, int(item)))[0]
        return wide

    def features(self, source: TileSource, item: int) -> NDArray[np.float32]:
        """(N, D) of at most `test_tiles` of an item's tiles."""
        numbers = source.at_most(item, self.test_tiles)
        return _features(self.backbone, self.info, self.input_px, source.index, numbers).cpu().numpy()


def tune(
    backbone: nn.Module,
    info: BackboneInfo,
    source: TileSource,
    train_items: Ints,
    labels: Ints,
    groups: Ints,
    *,
    num_classes: int,
    part: str,
    input_px: int,
    config: TuneConfig,
    device: torch.device,
    seed: int,
) -> FittedTuned:
    """Train `part` ('last' or 'all') of a copy of `backbone` with a new head on `train_items` (`labels`, `groups`)."""
    present = np.unique(labels)
    position = np.searchsorted(present, labels).astype(np.int64)
    kept = _kept_for_validation(position, groups, seed)
    label_of_item = torch.zeros(int(train_items.max()) + 1, dtype=torch.int64)
    label_of_item[torch.from_numpy(train_items)] = torch.from_numpy(position)
    # Processes beside this one train other heads (team.py), and their ranks must not enter this one's dropout.
    with imagined(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        own = copy.deepcopy(backbone)
        model = Tuned(own, info.feature_dim, len(present), label_of_item, config.tiles_per_bag)
        model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if len(present) > 1:
            batches = _Batches(source, train_items[~kept], position[~kept], info, input_px, config, device, seed)
            validation = (train_items[kept], position[kept])
            _train(model, info, source, batches, validation, part, input_px, config, device, seed)
    model.eval()
    zero, one = torch.zeros(info.feature_dim), torch.ones(info.feature_dim)
    head = FittedAbmil(model.head.cpu(), zero, one, present, num_classes)
    return FittedTuned(own, info, head, input_px, config.test_tiles)


def _train(
    model: Tuned,
    info: BackboneInfo,
    source: TileSource,
    batches: _Batches,
    validation: tuple[Ints, Ints],
    part: str,
    input_px: int,
    config: TuneConfig,
    device: torch.device,
    seed: int,
) -> None:
    optimizer = _optimizer(model, part, config)
    precision = Precision("bf16" if has_bf16(device) else "fp32")
    model.train()
    lr_at = partial(
        warmup_cosine,
        num_steps=config.steps,
        warmup_steps=round(WARMUP * config.steps),
        peak=config.lr,
        final=FINAL_LR * config.lr,
    )
    look_every = max(1, config.steps // LOOKS)
    best: tuple[float, dict[str, Tensor]] | None = None
    with batches:
        for step in train(
            model,
            optimizer,
            batches,
            lr_at,
            0,
            config.steps,
            device,
            precision,
            precision.scaler(device),
            clip_norm=1.0,
            seed=seed,
        ):
            done = step.number + 1
            if len(validation[0]) and (done % look_every == 0 or done == config.steps):
                loss = _validation_loss(model, info, source, validation, input_px, config, device)
                if best is None or loss < best[0]:
                    best = loss, {name: value.detach().clone() for name, value in model.state_dict().items()}
    if best is not None:
        model.load_state_dict(best[1])


@torch.inference_mode()
def _validation_loss(
    model: Tuned,
    info: BackboneInfo,
    source: TileSource,
    validation: tuple[Ints, Ints],
    input_px: int,
    config: TuneConfig,
    device: torch.device,
) -> float:
    model.eval()
    total = 0.0
    for item, label in zip(*validation, strict=True):
        numbers = source.at_most(int(item), config.test_tiles)
        features = _features(model.backbone, info, input_px, source.index, numbers)
        logits, _ = model.head(features[None])
        total += float(functional.cross_entropy(logits.float(), torch.tensor([int(label)], device=device)))
    model.train()
    return total / len(validation[0])


def _kept_for_validation(position: Ints, groups: Ints, seed: int) -> NDArray[np.bool_]:
    """Items of a quarter of each class's patients; none where some class has fewer than four."""
    kept = np.zeros(len(position), dtype=bool)
    per_class = [np.unique(groups[position == label]) for label in np.unique(position)]
    if min(len(patients) for patients in per_class) < FEWEST_TO_STOP_BY:
        return kept
    rng = np.random.default_rng([seed, 3])
    for patients in per_class:
        kept |= np.isin(groups, rng.permutation(patients)[: len(patients) // FEWEST_TO_STOP_BY])
    missing = set(position.tolist()) - set(position[~kept].tolist())
    return np.zeros_like(kept) if missing else kept  # patients of several classes may take a class away


def _optimizer(model: Tuned, part: str, config: TuneConfig) -> torch.optim.Optimizer:
    """Layer-wise decay over the backbone; with 'last' only its last quarter of blocks learns."""
    backbone: Any = model.backbone
    if part == "last":
        layers = group_parameters(backbone, backbone.group_matcher(coarse=True))
        late = sorted(layers)[-max(1, len(layers) // 4) :]
        learning = {name for layer in late for name in layers[layer]}
        for name, parameter in backbone.named_parameters():
            parameter.requires_grad_(name in learning)
    groups = param_groups_layer_decay(backbone, weight_decay=config.weight_decay, layer_decay=config.layer_decay)
    heads = list(model.head.parameters())
    groups.append({"params": heads, "weight_decay": config.weight_decay, "lr_scale": HEAD_FASTER})
    return torch.optim.AdamW(groups, lr=config.lr)


class _Batches(Iterator[Views]):
    """Endless steps: items in turn by class, random tiles of each, read one step ahead, augmented on the device."""

    def __init__(
        self,
        source: TileSource,
        items: Ints,
        position: Ints,
        info: BackboneInfo,
        input_px: int,
        config: TuneConfig,
        device: torch.device,
        seed: int,
    ) -> None:
        self.source, self.info, self.device, self.config, self.seed = source, info, device, config, seed
        classes = np.unique(position)
        self.by_class = [items[position == label] for label in classes]
        self.rng = np.random.default_rng([seed, 2])
        self.num_items = max(len(classes), min(config.bags_per_step, 4 * len(items)))
        self.recipe = _recipe(input_px)
        self.pool = ThreadPoolExecutor(2, "tuning")
        self.ahead: deque[tuple[NDArray[np.int64], NDArray[np.int64], Future[Tensor]]] = deque()
        self.begun = self.step = 0

    def _begin(self) -> None:
        items, numbers = [], []
        for place in range(self.num_items):
            own = self.by_class[(self.begun * self.num_items + place) % len(self.by_class)]
            item = int(own[self.rng.integers(len(own))])
            items.append(item)
            numbers.append(self.source.some(item, self.config.tiles_per_bag, self.rng))
        self.begun += 1
        flat = np.concatenate(numbers)
        index = self.source.index
        self.ahead.append(
            (np.array(items), flat, self.pool.submit(lambda: decode_tiles(index.read_many(flat), index.tile_px)))
        )

    def __next__(self) -> Views:
        while len(self.ahead) < 3:
            self._begin()
        items, numbers, tiles = self.ahead.popleft()
        pixels = tiles.result().to(self.device, non_blocking=True)
        first = self.step * len(numbers)
        positions = torch.arange(first, first + len(numbers))
        image = make_views(pixels, self.recipe, self.seed, positions)[0]
        self.step += 1
        return Views(
            [normalise(image, self.info.mean, self.info.std)],
            torch.from_numpy(numbers).to(self.device),
            torch.from_numpy(np.repeat(items, self.config.tiles_per_bag)).to(self.device),
            step=self.step - 1,
        )

    def __enter__(self) -> _Batches:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)


def _recipe(input_px: int) -> ViewRecipe:
    """One view of the histology recipe, milder: the label must survive it."""
    view = recipe_named("mocov2-histology", input_px).views[0]
    mild = replace(view, scale=(LEAST_SCALE, 1.0), grey_p=0.0, blur_p=0.1, brightness=0.2, contrast=0.2, saturation=0.2)
    return ViewRecipe("finetuning", (mild,))


@torch.inference_mode()
def _features(
    backbone: nn.Module, info: BackboneInfo, input_px: int, index: TileIndex, numbers: NDArray[np.int64]
) -> Tensor:
    device = next(backbone.parameters()).device
    low = has_bf16(device)
    features = []
    for first in range(0, len(numbers), CHUNK):
        tiles = decode_tiles(index.read_many(numbers[first : first + CHUNK]), index.tile_px).to(device)
        x = clean_view(tiles, input_px, (info.mean, info.std))
        with torch.autocast(device.type, torch.bfloat16, enabled=low):
            features.append(backbone(x).float())
    return torch.cat(features)
