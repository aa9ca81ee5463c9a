"""What is trained on frozen features of a few labelled items: four small heads with one interface.

    mean        mean of the tiles' features, standardised, logistic regression (default)
    knn         vote of the nearest labelled items, by cosine
    simpleshot  nearest class mean after centring and scaling to unit length (Wang et al. 2019, arXiv 1911.04623)
    abmil       gated attention over the tiles (Ilse et al. 2018, arXiv 1802.04712), small and strongly regularised

Features are centred and scaled with the statistics of all items on the training side (`pool`): these need no labels,
and two labelled slides are too few to say what is usual. Whatever is tuned is tuned inside the labelled budget.
A class without a labelled item gets probability 0.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Arrays = dict[str, NDArray[Any]]

HEADS = ("mean", "knn", "simpleshot", "abmil")


class BagsLike(Protocol):
    """Items as heads see them: `pooled` (items, D), and the tiles (N, D) of one item."""

    @property
    def pooled(self) -> Floats: ...

    def tiles(self, item: int) -> NDArray[np.float32]: ...


class Fitted(Protocol):
    def predict_proba(self, bags: BagsLike, items: Ints) -> Floats:
        """(items, classes); rows sum to one."""
        ...

    def arrays(self) -> Arrays:
        """All it needs to predict, to be saved; `load_head` takes it back."""
        ...


class Head(Protocol):
    def fit(
        self, bags: BagsLike, train: Ints, labels: Ints, *, pool: Ints, groups: Ints, num_classes: int, seed: int
    ) -> Fitted:
        """Learn from items `train` with `labels` and `groups` (patients), one each; `pool` are unlabelled company."""
        ...


def head_named(name: str) -> Head:
    heads: dict[str, Head] = {"mean": MeanHead(), "knn": KnnHead(), "simpleshot": SimpleShotHead(), "abmil": _Abmil()}
    return heads[name]


def load_head(name: str, arrays: Mapping[str, NDArray[Any]]) -> Fitted:
    if name == "abmil":
        from histossl.heads.abmil import FittedAbmil

        return FittedAbmil.from_arrays(arrays)
    kinds: dict[str, Callable[..., Fitted]] = {"mean": FittedLinear, "knn": FittedKnn, "simpleshot": FittedPrototypes}
    return kinds[name](**arrays)


class OnFeatures:
    """One head on the features of one start: trained on some items, asked about others. Items are numbers of rows."""

    def __init__(self, head: str, bags: BagsLike, labels: Ints, groups: Ints, num_classes: int) -> None:
        """`labels` and `groups` (patients): one number per item."""
        self.head, self.bags, self.labels, self.groups, self.num_classes = head, bags, labels, groups, num_classes

    def fit(self, items: Ints, pool: Ints, seed: int) -> None:
        self.fitted = head_named(self.head).fit(
            self.bags,
            items,
            self.labels[items],
            pool=pool,
            groups=self.groups[items],
            num_classes=self.num_classes,
            seed=seed,
        )

    def predict(self, items: Ints) -> Floats:
        """(items, classes) by the last fit."""
        return self.fitted.predict_proba(self.bags, items)


# ---- mean: logistic regression

# On rows of about unit length (standardised, divided by sqrt(D)), so that C means the same for every backbone.
STRENGTHS = (0.1, 1.0, 10.0, 100.0, 1000.0)
DEFAULT_STRENGTH = 10.0  # where the budget is too small to choose: one patient in some class
INNER_FOLDS = 3


class MeanHead:
    """Logistic regression on the mean of the tiles' features.

    C is chosen by log-loss in a patient-wise cross-validation inside the labelled budget when each class has two
    patients in it; else it is DEFAULT_STRENGTH. Classes weigh the same, however many slides they have.
    """

    def __init__(self, choose: bool = True) -> None:
        self.choose = choose  # without it, always DEFAULT_STRENGTH: for committees, where speed counts

    def fit(
        self, bags: BagsLike, train: Ints, labels: Ints, *, pool: Ints, groups: Ints, num_classes: int, seed: int
    ) -> FittedLinear:
        # The matrices are a few dozen rows: sharing them among threads costs twenty times what it saves.
        with _threads().limit(limits=1):
            centre, scale = _statistics(bags.pooled[pool])
            x = (bags.pooled[train] - centre) / scale
            # The penalised solution lies in the span of the labelled rows: in their own coordinates the fit is the same
            # and has as many columns as there are labelled items, not as the backbone has features.
            basis = np.linalg.svd(x, full_matrices=False)[2] if len(x) < x.shape[1] else np.eye(x.shape[1])
            z = x @ basis.T
            strength = _chosen_strength(z, labels, groups, seed) if self.choose else DEFAULT_STRENGTH
            weight, bias, present = _logistic(z, labels, strength)
            return FittedLinear(centre, scale, weight @ basis, bias, present, np.array(num_classes))


@functools.cache
def _threads() -> ThreadpoolController:
    import sklearn.linear_model  # noqa: F401  (it brings libraries of its own, which the controller must find)

    return ThreadpoolController()


class FittedLinear:
    def __init__(
        self, centre: Floats, scale: Floats, weight: Floats, bias: Floats, present: Ints, num_classes: NDArray[Any]
    ) -> None:
        self.centre, self.scale, self.weight, self.bias = centre, scale, weight, bias
        self.present, self.num_classes = present, num_classes

    def predict_proba(self, bags: BagsLike, items: Ints) -> Floats:
        return self.of_features(bags.pooled[items])

    def of_features(self, x: Floats) -> Floats:
        logits = ((x - self.centre) / self.scale) @ self.weight.T + self.bias
        return _spread(_softmax(logits), self.present, int(self.num_classes))

    def arrays(self) -> Arrays:
        return {
            "centre": self.centre,
            "scale": self.scale,
            "weight": self.weight,
            "bias": self.bias,
            "present": self.present,
            "num_classes": np.array(self.num_classes),
        }


def _chosen_strength(z: Floats, labels: Ints, groups: Ints, seed: int) -> float:
    from sklearn.model_selection import StratifiedGroupKFold

    classes = np.unique(labels)
    patients = min(len(np.unique(groups[labels == label])) for label in classes)
    if patients < 2 or len(classes) < 2:
        return DEFAULT_STRENGTH
    folder = StratifiedGroupKFold(min(INNER_FOLDS, patients), shuffle=True, random_state=seed % 2**31)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        sides = [(a, b) for a, b in folder.split(z, labels, groups) if len(a) and len(b)]
    loss = np.zeros(len(STRENGTHS))
    for train, test in sides:
        for number, strength in enumerate(STRENGTHS):
            weight, bias, present = _logistic(z[train], labels[train], strength)
            shares = _spread(_softmax(z[test] @ weight.T + bias), present, int(labels.max()) + 1)
            loss[number] -= np.log(np.maximum(shares[np.arange(len(test)), labels[test]], 1e-6)).sum()
    return STRENGTHS[int(loss.argmin())]


def _logistic(z: Floats, labels: Ints, strength: float) -> tuple[Floats, Floats, Ints]:
    """(weight, bias, classes that occur): one row per class, softmax over them gives the probabilities."""
    from sklearn.linear_model import LogisticRegression

    present = np.unique(labels)
    if len(present) == 1:
        return np.zeros((1, z.shape[1])), np.zeros(1), present
    model = LogisticRegression(C=strength, class_weight="balanced", max_iter=2000, tol=1e-5)
    model.fit(z, labels)
    weight, bias = model.coef_, model.intercept_
    if len(present) == 2:  # one row of log-odds: the same as two rows of half of it each
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    return weight, bias, present


# ---- knn


class KnnHead:
    NEIGHBOURS = 5
    TEMPERATURE = 0.1

    def fit(
        self, bags: BagsLike, train: Ints, labels: Ints, *, pool: Ints, groups: Ints, num_classes: int, seed: int
    ) -> FittedKnn:
        del groups, seed
        centre = bags.pooled[pool].mean(0)
        # Never more neighbours than the rarest labelled class has: else the common class always wins the vote.
        rarest = int(np.unique(labels, return_counts=True)[1].min())
        keys = _unit(bags.pooled[train] - centre)
        return FittedKnn(centre, keys, labels, np.array(min(self.NEIGHBOURS, rarest)), np.array(num_classes))


class FittedKnn:
    def __init__(
        self, centre: Floats, keys: Floats, labels: Ints, neighbours: NDArray[Any], num_classes: NDArray[Any]
    ) -> None:
        self.centre, self.keys, self.labels = centre, keys, labels
        self.neighbours, self.num_classes = neighbours, num_classes

    def predict_proba(self, bags: BagsLike, items: Ints) -> Floats:
        cosine = _unit(bags.pooled[items] - self.centre) @ self.keys.T
        nearest = np.argsort(-cosine, axis=1, kind="stable")[:, : int(self.neighbours)]
        votes = np.exp(np.take_along_axis(cosine, nearest, 1) / KnnHead.TEMPERATURE)
        shares = np.zeros((len(items), int(self.num_classes)))
        np.add.at(shares, (np.arange(len(items))[:, None], self.labels[nearest]), votes)
        normalised: Floats = shares / shares.sum(1, keepdims=True)
        return normalised

    def arrays(self) -> Arrays:
        return {
            "centre": self.centre,
            "keys": self.keys,
            "labels": self.labels,
            "neighbours": np.array(self.neighbours),
            "num_classes": np.array(self.num_classes),
        }


# ---- simpleshot


class SimpleShotHead:
    TEMPERATURE = 0.2  # of the squared distance between unit vectors, which lies in 0..4

    def fit(
        self, bags: BagsLike, train: Ints, labels: Ints, *, pool: Ints, groups: Ints, num_classes: int, seed: int
    ) -> FittedPrototypes:
        del groups, seed
        centre = bags.pooled[pool].mean(0)
        x = _unit(bags.pooled[train] - centre)
        present = np.unique(labels)
        prototypes = np.stack([x[labels == label].mean(0) for label in present])
        return FittedPrototypes(centre, prototypes, present, np.array(num_classes))


class FittedPrototypes:
    def __init__(self, centre: Floats, prototypes: Floats, present: Ints, num_classes: NDArray[Any]) -> None:
        self.centre, self.prototypes, self.present, self.num_classes = centre, prototypes, present, num_classes

    def predict_proba(self, bags: BagsLike, items: Ints) -> Floats:
        x = _unit(bags.pooled[items] - self.centre)
        squared = ((x[:, None] - self.prototypes[None]) ** 2).sum(2)
        shares = _softmax(-squared / SimpleShotHead.TEMPERATURE)
        return _spread(shares, self.present, int(self.num_classes))

    def arrays(self) -> Arrays:
        return {
            "centre": self.centre,
            "prototypes": self.prototypes,
            "present": self.present,
            "num_classes": np.array(self.num_classes),
        }


# ---- abmil lives in its own file, with torch


class _Abmil:
    def fit(
        self, bags: BagsLike, train: Ints, labels: Ints, *, pool: Ints, groups: Ints, num_classes: int, seed: int
    ) -> Fitted:
        from histossl.heads.abmil import fit_abmil

        del groups
        return fit_abmil(bags, train, labels, pool=pool, num_classes=num_classes, seed=seed)


# ---- shared


def _statistics(x: Floats) -> tuple[Floats, Floats]:
    """Centre and scale that make rows of about unit length; a constant feature stays at zero."""
    centre, std = x.mean(0), x.std(0)
    std = np.where(std > 1e-8 * max(1.0, float(np.abs(x).max())), std, np.inf)
    return centre, std * np.sqrt(x.shape[1])


def _unit(x: Floats) -> Floats:
    length: Floats = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.maximum(length, 1e-12)


def _softmax(logits: Floats) -> Floats:
    powers: Floats = np.exp(logits - logits.max(1, keepdims=True))
    shares: Floats = powers / powers.sum(1, keepdims=True)
    return shares


def _spread(shares: Floats, present: Ints, num_classes: int) -> Floats:
    """Shares of the classes that were there, among all classes; the others get 0."""
    wide = np.zeros((len(shares), num_classes))
    wide[:, present] = shares
    return wide
