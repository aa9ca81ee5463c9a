"""Notice that a run goes wrong while there is still something to save.

A fixed set of clean tiles is embedded now and then. From the features (N, D): their spread, their effective rank,
how far they moved since the last look and since the start. Thresholds and causes: algorithms.md section 6.
A tile that can no longer be read is missing from then on: what was and what is are compared where both are there.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

LINES_ABOVE = 5  # logged lines with a loss above its ceiling
FALLING = 4  # looks, each with a lower score than the one before
KEY_DRIFT_WARN = 0.1
TOO_EASY, EASY_LINES = 0.9, 3  # instance accuracy, and logged lines that have it
EARLY_STEPS, EARLY_SHARE = 100, 0.05  # of a run; the longer of both
FEW_NEGATIVES = 64  # among so few a pretrained backbone finds a tile's own key honestly
SPREAD_WARN, SPREAD_STOP = 0.3, 0.05
RANK_WARN, RANK_STOP = 0.7, 0.25  # of the value at step 0
UNMOVED = (
    "the backbone that this run exports is the start still, weight for weight. Likely causes: --set momentum=1, which "
    "keeps a teacher where it is; --lr too low; steps that were left out"
)


def feature_spread(x_ND: Tensor) -> float:
    """Mean standard deviation per dimension of unit-length features, times sqrt(D): 1 is isotropic, 0 a constant.

    Blind to dimensional collapse: rank 8 in 128 dimensions still gives 0.97. Look at the rank beside it.
    """
    return float(F.normalize(x_ND.double(), dim=1).std(0).mean() * x_ND.shape[1] ** 0.5)


def effective_rank(x_ND: Tensor) -> float:
    """RankMe: exp of the entropy of the singular values' shares; at most min(N, D). Garrido et al. 2022, 2210.02885."""
    if not bool(torch.isfinite(x_ND).all()):
        return float("nan")
    singular = torch.linalg.svdvals(x_ND.double())
    share = singular / singular.sum().clamp(min=1e-12) + 1e-12
    return float(torch.exp(-(share * share.log()).sum()))


def weight_change(now: nn.Module, start: Mapping[str, Tensor]) -> dict[str, float]:
    """||theta - theta_0|| / ||theta_0|| for each top-level block of a backbone (ViT blocks and ResNet stages apart)."""
    change: dict[str, list[float]] = {}
    for name, parameter in now.named_parameters():
        parts = name.split(".")
        block = ".".join(parts[:2]) if len(parts) > 2 and parts[1].isdigit() and parts[0] == "blocks" else parts[0]
        before = start[name]
        sums = change.setdefault(block, [0.0, 0.0])
        sums[0] += float((parameter.detach().cpu() - before).double().square().sum())
        sums[1] += float(before.double().square().sum())
    return {block: (moved / max(size, 1e-24)) ** 0.5 for block, (moved, size) in change.items()}


class Seen(NamedTuple):
    """Features of those of the fixed tiles that could be read, by their places among all of them, in order."""

    x_ND: Tensor
    places_N: Tensor

    @classmethod
    def of(cls, x_ND: Tensor, places_N: Tensor | None = None) -> Seen:
        x_ND = x_ND.detach().float().cpu()
        return cls(x_ND, torch.arange(len(x_ND)) if places_N is None else places_N.cpu())

    @classmethod
    def saved(cls, state: Any) -> Seen:
        """From a checkpoint; older ones kept the features alone."""
        return cls.of(state) if isinstance(state, Tensor) else cls(*state)

    def cosine(self, other: Seen) -> float:
        """Mean over the tiles that both have; NaN where there are none."""
        here, there = torch.isin(self.places_N, other.places_N), torch.isin(other.places_N, self.places_N)
        return float(F.cosine_similarity(self.x_ND[here], other.x_ND[there]).mean())


@dataclass(frozen=True)
class Health:
    """One look at the features. `verdict` is '' when all is well."""

    spread: float
    rank: float
    rank_share: float  # of the rank at step 0
    drift: float  # 1 - mean cosine to the features of the look before; of the backbone, not of keys
    moved: float  # 1 - mean cosine to the features at step 0
    verdict: str = ""
    collapsed: bool = False


class Watch:
    """Remembers the features at step 0 and at the last look."""

    def __init__(self) -> None:
        self.first: Seen | None = None
        self.last: Seen | None = None
        self.first_rank = self.first_spread = 0.0

    def look(self, x_ND: Tensor, places_N: Tensor | None = None, judges_rank: bool = True) -> Health:
        seen = Seen.of(x_ND, places_N)
        if self.first is None or self.last is None:
            self.first = self.last = seen
            self.first_rank, self.first_spread = effective_rank(seen.x_ND), feature_spread(seen.x_ND)
        health = self.beside(*seen, judges_rank=judges_rank)
        self.last = seen
        return health

    def beside(self, x_ND: Tensor, places_N: Tensor | None = None, judges_rank: bool = True) -> Health:
        """A look that is not remembered, at another network that began as this one."""
        seen = Seen.of(x_ND, places_N)
        assert self.first is not None
        assert self.last is not None
        spread, rank = feature_spread(seen.x_ND), effective_rank(seen.x_ND)
        rank_share = rank / max(self.first_rank, 1e-12)
        verdict = diagnosis(spread, rank_share if judges_rank else 1.0, self.first_spread)
        return Health(spread, rank, rank_share, 1 - seen.cosine(self.last), 1 - seen.cosine(self.first), *verdict)

    def state_dict(self) -> dict[str, object]:
        return {"first_ND": self.first and tuple(self.first), "last_ND": self.last and tuple(self.last)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.look(*Seen.saved(state["first_ND"]))
        self.last = Seen.saved(state["last_ND"])


def diagnosis(spread: float, rank_share: float, first_spread: float) -> tuple[str, bool]:
    """(what is wrong in plain words or '', whether it is too late).

    Random weights spread little to begin with, so only a spread that also fell is a warning.
    """
    if spread != spread or (spread < SPREAD_STOP and spread < first_spread / 2):
        return (
            f"complete collapse: all tiles get nearly the same features (spread {spread:.3f}, healthy near 1). "
            "Likely causes: --lr too high, momentum too low"
        ), True
    if rank_share < RANK_STOP:
        return (
            f"dimensional collapse: the features' effective rank fell to {rank_share:.0%} of the start's. "
            "Likely causes: --lr too high, no --layer-decay, views that differ too much"
        ), True
    if spread < min(SPREAD_WARN, 0.7 * first_spread):
        return f"features draw together (spread {spread:.2f}, healthy near 1); lower --lr if it goes on", False
    if rank_share < RANK_WARN:
        return f"the features' effective rank fell to {rank_share:.0%} of the start's; lower --lr if it goes on", False
    return "", False


class KeyDrift:
    """How far the keys of fixed tiles move while a key is kept: 1 - mean cosine to those of `age_steps` steps ago.

    Looks seldom fall exactly that far back, so the drift is taken between the two looks around that age, in proportion;
    0 steps ago it is 0. Drift grows with time at least in proportion, so this errs towards telling too much. Before the
    run is that old, keys are as old as the run: the first ones were made before step 0.
    """

    def __init__(self, age_steps: float) -> None:
        self.age_steps = age_steps
        self.keys_of_step: dict[int, Seen] = {}

    def look(self, step: int, keys_ND: Tensor, places_N: Tensor | None = None) -> float:
        keys = Seen.of(keys_ND, places_N)
        ages, drifts = [0.0], [0.0]
        for before, past in sorted(self.keys_of_step.items(), reverse=True):
            ages.append(float(step - before))
            drifts.append(max(0.0, 1 - keys.cosine(past)))
        self._keep(step, keys)
        return float(np.interp(min(self.age_steps, ages[-1]), ages, drifts))

    def _keep(self, step: int, keys: Seen) -> None:
        """A dozen looks over the age at most, and one that is older."""
        if not self.keys_of_step or step - max(self.keys_of_step) >= self.age_steps / 12:
            self.keys_of_step[step] = keys
        old = sorted(before for before in self.keys_of_step if step - before >= self.age_steps)
        for before in old[:-1]:
            del self.keys_of_step[before]

    def state_dict(self) -> dict[int, tuple[Tensor, ...]]:
        return {step: tuple(keys) for step, keys in self.keys_of_step.items()}

    def load_state_dict(self, state: Mapping[int, Any]) -> None:
        self.keys_of_step = {step: Seen.saved(keys) for step, keys in state.items()}

    def verdict(self, drift: float) -> str:
        if round(drift, 2) <= KEY_DRIFT_WARN:  # as it is told
            return ""
        return (
            f"keys go stale: over the {self.age_steps:.0f} steps that one is kept, a tile's key moves by {drift:.2f} "
            f"(1 - cosine; healthy below {KEY_DRIFT_WARN}). Likely causes: --lr too high, --set momentum too low, "
            "--set queue_size too large"
        )


class ProbeTrend:
    """Notice what the probe on labelled training slides says against the loss. Each thing is said once."""

    def __init__(self) -> None:
        self.looks: list[tuple[float, float]] = []  # score, loss
        self.told: list[str] = []

    def look(self, score: float, loss: float, at_start: float, best: float, share_done: float) -> str:
        """'' while all is well. `best` is the highest score of the run so far, the start's included."""
        self.looks.append((score, loss))
        below = share_done >= 0.2 and score < at_start and best <= at_start
        if below and "below" not in self.told:
            self.told.append("below")
            return (
                f"the probe is below the start ({score:.3f}, start {at_start:.3f}) and no look was above it in the "
                f"first {share_done:.0%} of the run; a dip is usual, but a shorter one. Lower --lr, or --layer-decay"
            )
        last = self.looks[-FALLING:]
        scores, losses = ([look[place] for look in last] for place in (0, 1))
        falling = len(last) == FALLING and all(a > b for a, b in itertools.pairwise(scores)) and losses[-1] < losses[0]
        if falling and "falling" not in self.told:
            self.told.append("falling")
            return (
                f"the probe falls ({', '.join(f'{each:.3f}' for each in scores)}) while the loss falls too: the "
                "run may be too long for these tiles; fewer --steps, or the best look's backbone"
            )
        return ""


class Shortcut:
    """Notice a contrastive task that is solved too early: who finds a tile's own key at once need not see tissue.

    A healthy run from ImageNet weights begins near 0.1 (examples/LOG.md) and takes most of its length to get far.
    """

    def __init__(self, batchnorm: bool) -> None:
        self.batchnorm = batchnorm
        self.lines = 0

    def taken(self, row: Mapping[str, float], done: int, num_steps: int, helps: bool = False) -> str:
        """'' while all is well. `helps`: the probe on labelled slides has risen, so what is learnt is of use."""
        accuracy = row.get("instance_accuracy")
        negatives = row.get("negatives") or math.exp(row.get("loss_ceiling", 0.0)) - 1  # a ring's are ln(K+1)'s K
        if accuracy is None:
            return ""
        early = done <= max(EARLY_STEPS, EARLY_SHARE * num_steps)
        easy = early and negatives >= FEW_NEGATIVES and accuracy >= TOO_EASY and not helps
        self.lines = self.lines + 1 if easy else 0
        if self.lines != EASY_LINES:
            return ""
        leak = (
            "query and key that share BatchNorm statistics (--set batchnorm_group_tiles=32, or less than half a pass); "
            if self.batchnorm
            else ""
        )
        return (
            f"shortcut: a tile's other view is found among {negatives:,.0f} others with {accuracy:.0%} accuracy this "
            f"early. Likely causes: {leak}views of a tile that differ too little (look at them with histossl views); "
            "slides that their stain or scanner gives away (more stain jitter, --slide-balance 1)"
        )


class Ceiling:
    """Notice a loss that stays where features that tell nothing would put it (InfoNCE: ln(K+1)), or rises above it."""

    def __init__(self, stuck_by: Sequence[str] = (), above_by: Sequence[str] = ()) -> None:
        """Besides the rate: what may keep this method's loss there, and what may raise it above."""
        self.stuck_by = ", ".join(("--lr too low or too high", *stuck_by))
        self.above_by = ", ".join(("--lr too high", *above_by))
        self.lowest = float("inf")
        self.told = False
        self.lines_above = 0

    def stuck(self, loss: float, ceiling: float | None, done: int, num_steps: int) -> str:
        """'' while all is well. Judged after a fifth of the run, and 100 steps: fresh keys start near the ceiling."""
        self.lowest = min(self.lowest, loss)
        early = done < max(100, num_steps / 5)
        above = ceiling is not None and not early and loss > ceiling
        self.lines_above = self.lines_above + 1 if above else 0
        if self.lines_above == LINES_ABOVE:  # once each time
            return (
                f"the loss has been above its ceiling {ceiling:.2f} for {LINES_ABOVE} logged lines (now {loss:.2f}): "
                f"it is worse than telling nothing. Likely causes: {self.above_by}"
            )
        if ceiling is None or self.told or early or self.lowest < 0.98 * ceiling:
            return ""
        self.told = True
        return (
            f"the loss never left its ceiling {ceiling:.2f} (lowest {self.lowest:.2f}): nothing is being learnt. "
            f"Likely causes: {self.stuck_by}"
        )
