"""Stage `suggest`: which unlabelled slides to label next.

A slide is worth a label when it stands for many that nothing labelled resembles (coverage), and when heads that
learnt from different parts of the labels disagree about it. Slides are picked one after the other, each with what the
ones before already cover, so that ten picks are not ten times the same.

Coverage is facility location (Wei, Iyer, Bilmes 2015): the sum over unlabelled slides of the similarity to the
nearest labelled or picked one. Unlike picking the farthest slide, it does not run after oddities. Disagreement is
the mutual information of the prediction and the head (Houlsby et al. 2011, arXiv 1112.5745).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from histossl.core import console
from histossl.core.config import EmbedConfig, FinetuneConfig
from histossl.core.errors import UsageError
from histossl.core.text import write_csv
from histossl.core.workspace import Workspace
from histossl.evaluation.model_selection import PREFERRED
from histossl.features.extraction import COLOUR, Bags, device_of, embed_slides, slide_tiles
from histossl.features.initialisations import resolve_starts
from histossl.heads.feature_heads import Floats, Ints, MeanHead
from histossl.labels.load_labels import labelled_items
from histossl.runtime.locks import refuse_while_tiling
from histossl.tiles.store.index import TileIndex

NUM_HEADS = 12
DISAGREEMENT_COUNTS = 1.0  # a slide that heads disagree on fully is worth this many times its coverage on top
STANDS_FOR = 0.1  # gain in similarity (0 to 1) from which a slide is told to stand for another


@dataclass(frozen=True)
class Suggestion:
    slide: str
    score: float
    stands_for: int  # other unlabelled slides that it covers better than anything labelled or picked before
    disagreement: float  # 0: all heads agree; 1: as much as they can
    nearest_labelled: str
    reason: str


def suggest(
    workspace: Workspace, config: FinetuneConfig, number: int = 10, embed: EmbedConfig = EmbedConfig()
) -> list[Suggestion]:
    """The `number` slides of the workspace to label next, best first, in the feature space of the adapted start."""
    refuse_while_tiling(workspace)
    index = TileIndex.open(workspace)
    table = labelled_items(workspace, index, config)
    labelled = set(table.slides)
    unlabelled = [slide for slide in index.slides if slide not in labelled and len(slide_tiles(index, slide))]
    if not unlabelled:
        raise UsageError(
            f"every slide of {workspace.root} that has tiles is labelled already; there is none to suggest"
        )
    starts = resolve_starts(workspace, config)
    by_name = {start.name: start for start in reversed(starts.chosen) if start.name != COLOUR}  # a pool's first run
    if not by_name:
        raise UsageError("--starts colour: suggestions need features of a network")
    start = next((by_name[name] for name in PREFERRED if name in by_name), next(reversed(by_name.values())))
    embedder = start.embedder(
        seed=config.seed, input_px=starts.input_px, tile_px=index.tile_px, device=device_of(embed.device)
    )
    # Labels of a fixed test set teach the heads nothing, and what it holds counts as uncovered: it is not learnt from.
    train = [number for number, item in enumerate(table.items) if item.split != "test"]
    if not train:
        raise UsageError(f"--labels {config.labels}: every labelled slide is for testing; there is none to learn from")
    items = [table.items[number] for number in train]
    files = embed_slides(workspace, index, [*sorted({item.slide for item in items}), *unlabelled], embedder, embed)
    known = Bags([(files[item.slide], item.tiles) for item in items])
    new = Bags([(files[slide], None) for slide in unlabelled])
    patients = np.unique([item.patient for item in items], return_inverse=True)[1].astype(np.int64)
    labels = table.label_numbers()[train]
    shares = committee(known.pooled, labels, patients, new.pooled, len(table.classes), config.seed)
    found = picks(
        known.pooled,
        new.pooled,
        shares,
        number,
        labelled_names=[item.name for item in items],
        names=unlabelled,
        classes=table.classes,
    )
    path = workspace.suggestions
    _write(path, found)
    _show(found, start.name)
    console.say(f"{len(found)} of {len(unlabelled)} unlabelled slides: {path}")
    return found


# ---- the committee


def committee(known: Floats, labels: Ints, patients: Ints, new: Floats, num_classes: int, seed: int) -> Floats:
    """(heads, new, classes): what heads trained on bootstraps of the labelled patients say of the new slides."""
    both = _Pooled(np.concatenate([known, new]))
    items = np.arange(len(known))
    wanted = np.arange(len(known), len(known) + len(new))
    rng = np.random.default_rng([seed, 7])
    said = []
    for draw in range(NUM_HEADS):
        chosen = rng.choice(np.unique(patients), len(np.unique(patients)))
        train = np.concatenate([items[patients == patient] for patient in chosen])
        # Each class keeps a slide, or a bootstrap of few patients forgets a class and disagrees about nothing else.
        missing = [rng.choice(items[labels == label]) for label in np.unique(labels) if label not in labels[train]]
        train = np.concatenate([train, np.array(missing, dtype=np.int64)])
        fitted = MeanHead(choose=False).fit(
            both,
            train,
            labels[train],
            pool=np.arange(len(both.pooled)),
            groups=patients[train],
            num_classes=num_classes,
            seed=draw,
        )
        said.append(fitted.predict_proba(both, wanted))
    return np.stack(said)


def disagreement(shares: Floats) -> Floats:
    """(new,): mutual information of class and head, over its largest possible value; 0 where all heads say the same."""
    mean = shares.mean(0)
    information = _entropy(mean) - _entropy(shares).mean(0)
    largest = np.log(min(shares.shape[0], shares.shape[2]))
    share: Floats = np.clip(information / largest, 0, 1)
    return share


def _entropy(shares: Floats) -> Floats:
    found: Floats = -(shares * np.log(np.maximum(shares, 1e-12))).sum(-1)
    return found


# ---- picking


def picks(
    known: Floats,
    new: Floats,
    shares: Floats,
    number: int,
    *,
    labelled_names: Sequence[str],
    names: Sequence[str],
    classes: Sequence[str],
) -> list[Suggestion]:
    """Greedy: each pick is worth its gain in coverage, times one plus its disagreement."""
    everything = np.concatenate([known, new])
    centre, std = everything.mean(0), everything.std(0)
    std = np.where(std > 1e-8 * max(1.0, float(np.abs(everything).max())), std, np.inf)
    a, b = (known - centre) / std, (new - centre) / std
    among, to_known = _distance(b, b), _distance(b, a)
    off = among[~np.eye(len(b), dtype=bool)]
    # As wide as two slides usually lie apart. Half of it, once the rule here, saw only twins in so many dimensions, and
    # picks were no better than random ones (examples/LOG.md).
    width = float(np.median(off)) if len(off) else 1.0
    width = width if width > 0 else 1.0
    similar = np.exp(-((among / width) ** 2))
    covered = np.exp(-((to_known / width) ** 2)).max(1) if len(a) else np.zeros(len(b))
    doubt = disagreement(shares)
    found: list[Suggestion] = []
    free = np.ones(len(b), dtype=bool)
    for _ in range(min(number, len(b))):
        gain = np.maximum(similar - covered[:, None], 0)
        worth = np.where(free, gain.sum(0) * (1 + DISAGREEMENT_COUNTS * doubt), -np.inf)
        best = int(worth.argmax())
        own = float(gain[best, best])
        stands_for = int((gain[:, best] > STANDS_FOR).sum()) - (own > STANDS_FOR)
        nearest = labelled_names[int(to_known[best].argmin())] if len(a) else ""
        if not len(a) or to_known[best].min() > width:
            apart = "resembles nothing labelled"
        else:
            apart = f"differs from {nearest}, the labelled slide nearest to it" if own > STANDS_FOR else ""
        reason = _reason(stands_for, apart, float(doubt[best]), shares[:, best], classes, nearest)
        found.append(Suggestion(names[best], float(worth[best]), stands_for, float(doubt[best]), nearest, reason))
        covered = np.maximum(covered, similar[:, best])
        free[best] = False
    return found


def _reason(stands_for: int, apart: str, doubt: float, shares: Floats, classes: Sequence[str], nearest: str) -> str:
    mean = shares.mean(0)
    first, second = np.argsort(-mean)[:2]
    said = []
    if stands_for:
        others = f"{stands_for} other unlabelled slide{'s' * (stands_for > 1)}"
        said.append(f"stands for {others} that nothing labelled or picked before resembles as much")
    elif apart:
        said.append(apart)
    if doubt > 0.1:
        votes = np.bincount(shares.argmax(1), minlength=len(classes))
        said.append(
            f"heads disagree ({votes[first]} of {len(shares)} say {classes[first]}, {votes[second]} {classes[second]})"
        )
    elif mean[first] < 0.6:
        said.append(f"heads are unsure ({classes[first]} {mean[first]:.2f}, {classes[second]} {mean[second]:.2f})")
    if not said:
        said.append(f"adds little: close to {nearest}, and heads agree on {classes[first]}")
    return "; ".join(said)


def _distance(a: NDArray[np.float64], b: NDArray[np.float64]) -> Floats:
    squared = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T
    found: Floats = np.sqrt(np.maximum(squared, 0))
    return found


class _Pooled:
    def __init__(self, pooled: Floats) -> None:
        self.pooled = pooled

    def tiles(self, item: int) -> NDArray[np.float32]:
        return self.pooled[item : item + 1].astype(np.float32)


# ---- what is left of it


def _write(path: Path, found: Sequence[Suggestion]) -> None:
    rows = []
    for rank, one in enumerate(found, start=1):
        figures = [f"{one.score:.4f}", one.stands_for, f"{one.disagreement:.4f}"]
        rows.append([rank, one.slide, *figures, one.nearest_labelled, one.reason])
    write_csv(path, ["rank", "slide", "score", "stands_for", "disagreement", "nearest_labelled", "reason"], rows)


def _show(found: Sequence[Suggestion], start: str) -> None:
    rows = [[rank, one.slide, one.reason] for rank, one in enumerate(found, start=1)]
    console.table(f"label next (features: {start})", ["", "slide", "why"], rows, right=[""])
