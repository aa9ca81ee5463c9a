"""How good predictions are: five numbers, by scikit-learn, with a defined answer where the data leave it open.

    auroc               macro mean of one class against the rest; tied scores count one half
    balanced_accuracy   mean recall over the classes that occur
    f1                  macro mean over the classes that occur
    log_loss            nats per slide; a probability of 0 counts as 2.2e-16, the float64 step at 1
    calibration_error   how far confidence and accuracy lie apart, mean over ten equally full bins

Where the labels of a test set lack a class, that class is left out of the mean (its wrong predictions still cost
the other classes recall). Where they hold one class only, AUROC does not exist and is nan; the others do.
Where there is nothing to test, everything is nan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import f1_score, log_loss, recall_score, roc_auc_score

METRICS = ("auroc", "balanced_accuracy", "f1", "log_loss", "calibration_error")
HIGHER_IS_BETTER = {
    "auroc": True,
    "balanced_accuracy": True,
    "f1": True,
    "log_loss": False,
    "calibration_error": False,
}
NUM_BINS = 10


def metrics(
    labels: Sequence[str] | NDArray[np.str_],
    probabilities: NDArray[np.floating],
    classes: Sequence[str],
    wanted: Sequence[str] = METRICS,
) -> dict[str, float]:
    """The wanted ones of the five.

    `probabilities` is (slides, classes) in the order of `classes`; rows are made to sum to one.

    The predicted class is the most probable one, the first of them at a tie.
    """
    names = list(classes)
    truth = np.array([names.index(label) for label in labels], dtype=np.int64)
    if not len(truth):
        return dict.fromkeys(wanted, float("nan"))
    shares = unit_rows(np.asarray(probabilities, dtype=np.float64))
    predicted = shares.argmax(1)
    occurring = np.unique(truth)
    scorers: dict[str, Callable[[], float]] = {
        "auroc": lambda: auroc(truth, shares),
        "balanced_accuracy": lambda: recall_score(
            truth, predicted, labels=occurring, average="macro", zero_division=0.0
        ),
        "f1": lambda: f1_score(truth, predicted, labels=occurring, average="macro", zero_division=0.0),
        "log_loss": lambda: log_loss(truth, shares, labels=np.arange(len(names))),
        "calibration_error": lambda: calibration_error(truth, shares),
    }
    return {name: float(scorers[name]()) for name in wanted}


def unit_rows(probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rows that sum to one; a row without any mass becomes even."""
    total = probabilities.sum(1, keepdims=True)
    even = np.full_like(probabilities, 1 / probabilities.shape[1])
    shares: NDArray[np.float64] = np.divide(probabilities, total, out=even, where=total > 0)
    return shares


def auroc(truth: NDArray[np.int64], shares: NDArray[np.float64]) -> float:
    """Macro mean over the classes that occur and are not the only one; nan when there is no such class."""
    areas = [
        float(roc_auc_score(truth == number, shares[:, number]))
        for number in range(shares.shape[1])
        if 0 < (truth == number).sum() < len(truth)
    ]
    return float(np.mean(areas)) if areas else float("nan")


def calibration_error(truth: NDArray[np.int64], shares: NDArray[np.float64]) -> float:
    """Mean over slides of |accuracy - confidence| of their bin."""
    confidence = shares.max(1)
    gap = (shares.argmax(1) == truth) - confidence
    return float(np.abs(np.bincount(confidence_bins(confidence), weights=gap)).sum() / len(truth))


def confidence_bins(confidence: NDArray[np.float64]) -> NDArray[np.int64]:
    """Which of at most ten (nearly) equally full bins each slide falls in, the least confident first.

    Equally full, since few slides leave most of ten equally wide bins empty (Nixon et al. 2019, arXiv 1904.01685);
    never so many bins that one has fewer than five slides.
    """
    bins = np.empty(len(confidence), dtype=np.int64)
    order = np.argsort(confidence, kind="stable")
    for number, members in enumerate(np.array_split(order, max(1, min(NUM_BINS, len(order) // 5)))):
        bins[members] = number
    return bins
