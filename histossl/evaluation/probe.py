"""Judge a backbone while it is being pretrained, on the labelled *training* slides alone.

Nearest neighbours among tiles of other patients: no fitting, no choice to make, a few seconds. It is for watching a run
and choosing a checkpoint; what the model is worth is measured by `finetune` on patients that this never sees.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import balanced_accuracy_score
from torch import Tensor, nn
from torch.nn import functional as F

from histossl.backbones.loading import BackboneInfo
from histossl.core import console
from histossl.labels.label_table import LabelTable
from histossl.tiles.store.index import TileIndex
from histossl.tiles.stream.loader import decode_good_tiles
from histossl.views.recipe import clean_view

TILES_PER_SLIDE = 32
TILES_MOST = 4096  # all slides together: a look takes seconds, and on several GPUs the others wait for it
NEIGHBOURS = 20


def knn_score(
    x_ND: Tensor, labels_N: NDArray[np.int64], patients_N: NDArray[np.int64], neighbours: int = NEIGHBOURS
) -> float:
    """Balanced accuracy of a vote of the nearest tiles (cosine) of *other* patients.

    A vote counts 1 / the number of that class's tiles that could have voted, so that a frequent class does not win by
    being frequent. At most half of the tiles that could vote do, or all would be near.
    """
    x_ND = F.normalize(x_ND.float(), dim=1)
    other_NN = patients_N[:, None] != patients_N[None, :]
    classes, label_N = np.unique(labels_N, return_inverse=True)
    could_NC = other_NN @ np.eye(len(classes))[label_N]
    similarity_NN = (x_ND @ x_ND.T).masked_fill(torch.from_numpy(~other_NN), -torch.inf)
    nearest_NK = similarity_NN.topk(max(1, min(neighbours, int(could_NC.sum(1).min()) // 2)), dim=1).indices.numpy()
    votes_NC = np.zeros(could_NC.shape)
    rows = np.arange(len(x_ND))
    for column in nearest_NK.T:
        votes_NC[rows, label_N[column]] += 1
    return float(balanced_accuracy_score(label_N, (votes_NC / np.maximum(could_NC, 1)).argmax(1)))


def probe_of(index: TileIndex, table: LabelTable, input_px: int) -> Callable[[nn.Module, BackboneInfo], float] | None:
    """A function that scores a backbone by `knn_score` on tiles of the slides that are not marked `test`.

    None, with the reason told, where a class has too few training patients for it.
    """
    items = [item for item in table.items if item.split != "test"]
    patients = sorted({item.patient for item in items})
    for label in sorted({item.label for item in items}):
        if len({item.patient for item in items if item.label == label}) < 2:
            console.warn(f"no probe during the run: class {label!r} has one training patient, and it needs two")
            return None
    if len({item.label for item in items}) < 2:
        console.warn("no probe during the run: the training slides are all of one class")
        return None
    classes = sorted({item.label for item in items})
    numbers, labels, owners = [], [], []
    per_slide = max(1, min(TILES_PER_SLIDE, TILES_MOST // len(items)))
    for item in items:
        tiles = index.tiles_of(item.slide)
        chosen = np.unique(np.linspace(tiles.start, tiles.stop - 1, per_slide).astype(np.int64))
        numbers += chosen.tolist()
        labels += [classes.index(item.label)] * len(chosen)
        owners += [patients.index(item.patient)] * len(chosen)

    if len(numbers) > TILES_MOST:  # more slides than that, with a tile each
        some = np.sort(np.random.default_rng(0).permutation(len(numbers))[:TILES_MOST])
        numbers, labels, owners = ([each[place] for place in some] for each in (numbers, labels, owners))

    console.say(
        f"probe during the run: balanced accuracy of {console.count(len(numbers), 'tile')} of "
        f"{console.count(len(patients), 'training patient')}, each told by the nearest tiles of other patients; "
        f"guessing scores {1 / len(classes):.2f}"
    )

    @torch.no_grad()
    def probe(backbone: nn.Module, info: BackboneInfo) -> float:
        device = next(backbone.parameters()).device
        features, seen = [], []
        for first in range(0, len(numbers), 64):
            pixels, good = decode_good_tiles(index, numbers[first : first + 64])
            seen.append(np.isin(numbers[first : first + 64], good))
            if not len(good):
                continue
            view = clean_view(pixels.to(device), input_px, (info.mean, info.std))
            features.append(backbone(view).float().cpu())
        whole = np.concatenate(seen)
        return knn_score(torch.cat(features), np.array(labels)[whole], np.array(owners)[whole])

    return probe
