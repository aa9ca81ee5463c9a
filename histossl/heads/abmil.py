"""The `abmil` head: gated attention over a bag of tiles (Ilse, Tomczak, Welling 2018, arXiv 1802.04712).

Small on purpose: a handful of labelled slides cannot feed more. Dropout on the features, weight decay, few steps, and
in each step another random part of every bag. The attention of a tile says how much it weighed in the answer.

Shapes: S bags, N tiles, D features, H hidden, A attention, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from histossl.heads.feature_heads import Arrays, BagsLike, Floats, Ints

HIDDEN, ATTENTION = 128, 64
NUM_STEPS, BAGS_PER_STEP, TILES_PER_BAG = 80, 16, 64
LEARNING_RATE, WEIGHT_DECAY, DROPOUT = 1e-3, 0.05, 0.25


class GatedAttention(nn.Module):
    """Tiles -> one attention-weighted feature per bag -> class logits."""

    def __init__(
        self,
        feature_dim: int,
        num_classes: int,
        hidden: int = HIDDEN,
        dropout: float = DROPOUT,
        layer_norm: bool = False,
    ) -> None:
        """`layer_norm`: features are brought to one scale tile by tile, where no statistics of them are at hand."""
        super().__init__()
        self.layer_norm = layer_norm
        self.reduce = nn.Sequential(nn.Dropout(dropout), nn.Linear(feature_dim, hidden), nn.ReLU())
        self.content = nn.Linear(hidden, ATTENTION)
        self.gate = nn.Linear(hidden, ATTENTION)
        self.score = nn.Linear(ATTENTION, 1)
        self.classify = nn.Sequential(nn.Dropout(dropout), nn.Linear(hidden, num_classes))

    def forward(self, x_SND: Tensor, mask_SN: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits (S, C), and attention (S, N) that sums to one over the tiles that `mask_SN` keeps."""
        if self.layer_norm:
            x_SND = functional.layer_norm(x_SND, x_SND.shape[-1:])
        hidden_SNH = self.reduce(x_SND)
        gated = torch.tanh(self.content(hidden_SNH)) * torch.sigmoid(self.gate(hidden_SNH))
        score_SN = self.score(gated).squeeze(-1).float()
        if mask_SN is not None:
            score_SN = score_SN.masked_fill(~mask_SN, float("-inf"))
        attention_SN = score_SN.softmax(1)
        pooled_SH = torch.einsum("sn,snh->sh", attention_SN.to(hidden_SNH.dtype), hidden_SNH)
        return self.classify(pooled_SH), attention_SN


class FittedAbmil:
    def __init__(self, model: GatedAttention, centre: Tensor, scale: Tensor, present: Ints, num_classes: int) -> None:
        self.model, self.centre, self.scale = model.eval(), centre, scale
        self.present, self.num_classes = present, num_classes

    def predict_proba(self, bags: BagsLike, items: Ints) -> Floats:
        wide = np.zeros((len(items), self.num_classes))
        with _one_thread():
            for row, item in enumerate(items):
                wide[row, self.present] = self.of_tiles(bags.tiles(int(item)))[0]
        return wide

    @torch.inference_mode()
    def of_tiles(self, tiles: NDArray[np.float32]) -> tuple[Floats, Floats]:
        """Shares of the classes that were there (C,), and each tile's attention (N,)."""
        x = (torch.from_numpy(np.ascontiguousarray(tiles)) - self.centre) / self.scale
        logits, attention = self.model(x[None])
        return logits.double().softmax(1)[0].numpy(), attention[0].double().numpy()

    def arrays(self) -> Arrays:
        state = {f"model.{name}": value.numpy() for name, value in self.model.state_dict().items()}
        return {
            **state,
            "layer_norm": np.array(self.model.layer_norm),
            "centre": self.centre.numpy(),
            "scale": self.scale.numpy(),
            "present": self.present,
            "num_classes": np.array(self.num_classes),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> FittedAbmil:
        state = {
            name.removeprefix("model."): torch.from_numpy(value)
            for name, value in arrays.items()
            if name.startswith("model.")
        }
        hidden, feature_dim = state["reduce.1.weight"].shape
        model = GatedAttention(feature_dim, len(arrays["present"]), hidden, layer_norm=bool(arrays["layer_norm"]))
        model.load_state_dict(state)
        centre, scale = (torch.from_numpy(arrays[name]) for name in ("centre", "scale"))
        return cls(model, centre, scale, arrays["present"], int(arrays["num_classes"]))


def fit_abmil(bags: BagsLike, train: Ints, labels: Ints, *, pool: Ints, num_classes: int, seed: int) -> FittedAbmil:
    """Steps of AdamW with a cosine that ends at zero; every class is drawn equally often."""
    present = np.unique(labels)
    centre, scale = _tile_statistics(bags, pool, seed)
    rng = np.random.default_rng(seed)
    with _one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GatedAttention(len(centre), len(present))
        fitted = FittedAbmil(model, centre, scale, present, num_classes)
        if len(present) == 1:
            return fitted
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, NUM_STEPS)
        position = np.searchsorted(present, labels)
        num_bags = min(BAGS_PER_STEP, 2 * len(train))
        by_class = [np.flatnonzero(position == number) for number in range(len(present))]
        for step in range(NUM_STEPS):
            classes = (np.arange(num_bags) + step * num_bags) % len(present)
            chosen = np.array([rng.choice(by_class[number]) for number in classes])
            x = torch.from_numpy(np.stack([_some(bags.tiles(int(train[one])), rng) for one in chosen]))
            logits, _ = model((x - centre) / scale)
            loss = functional.cross_entropy(logits, torch.from_numpy(classes), label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        model.eval()
    return fitted


@contextmanager
def _one_thread() -> Iterator[None]:
    """Such small matrices are faster on one thread: on a busy machine two wait for each other most of the time.

    And the sums come out the same on any number of cores.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _some(tiles: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """TILES_PER_BAG of a bag's tiles: without repetition where there are enough."""
    few = len(tiles) < TILES_PER_BAG
    return tiles[rng.choice(len(tiles), TILES_PER_BAG, replace=few)]


def _tile_statistics(bags: BagsLike, pool: Ints, seed: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of tile features, from a few tiles of every item of the training side."""
    rng = np.random.default_rng([seed, 1])
    x = np.concatenate([_some(bags.tiles(int(item)), rng) for item in pool]).astype(np.float64)
    std = x.std(0)
    std = np.where(std > 1e-8 * max(1.0, float(np.abs(x).max())), std, np.inf)
    return torch.from_numpy(x.mean(0).astype(np.float32)), torch.from_numpy(std.astype(np.float32))
