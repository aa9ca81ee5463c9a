"""The five metrics for patients (or sites) who count more or less often, in all resamples at once.

With weights of one they are scikit-learn's values: tests/evaluation/test_metrics.py holds them to that.
Shapes: R resamples, U what is drawn (patients or sites; P in what follows), N tested slides, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from histossl.stats.metrics import METRICS, confidence_bins

Floats = NDArray[np.float64]


def drawn_weights(stratum_U: NDArray[np.int64], num_resamples: int, generator: np.random.Generator) -> Floats:
    """(R, U): how often each patient (or site) counts in each resample; always once where a stratum has no other."""
    weights_RU = np.ones((num_resamples, len(stratum_U)))
    for stratum in np.unique(stratum_U):
        members = np.flatnonzero(stratum_U == stratum)
        n = len(members)
        if n > 1:
            counts = generator.multinomial(n - 1, np.full(n, 1 / n), size=num_resamples)
            weights_RU[:, members] = counts * (n / (n - 1))
    return weights_RU


# ---- the metrics again, weighted by patients and for all resamples at once


def resampled_metrics(
    truth_N: NDArray[np.int64],
    shares_NK: Floats,
    patient_N: NDArray[np.intp],
    weights_RP: Floats,
    wanted: Sequence[str] = METRICS,
) -> dict[str, Floats]:
    """Each wanted metric under each row of weights, (R,). With weights of one these are scikit-learn's values."""
    num_patients = weights_RP.shape[1]
    num_classes = shares_NK.shape[1]
    predicted_N = shares_NK.argmax(1)
    right_N = predicted_N == truth_N

    def summed(values: Floats, group_N: NDArray[np.int64], num_groups: int) -> Floats:
        """Weighted sums per group, (R, groups)."""
        table = np.bincount(patient_N * num_groups + group_N, weights=values, minlength=num_patients * num_groups)
        return weights_RP @ table.reshape(num_patients, num_groups)

    ones_N = np.ones(len(truth_N))
    true_RK = summed(ones_N, truth_N, num_classes)
    hits_RK = summed(right_N.astype(np.float64), truth_N, num_classes)
    present_RK = true_RK > 0
    total_R = true_RK.sum(1)
    scores: dict[str, Floats] = {}
    for name in wanted:
        if name == "auroc":
            scores[name] = _weighted_auroc(truth_N, shares_NK, patient_N, weights_RP)
        elif name == "balanced_accuracy":
            recall_RK = hits_RK / np.where(present_RK, true_RK, 1)
            scores[name] = (recall_RK * present_RK).sum(1) / present_RK.sum(1)
        elif name == "f1":
            claimed_RK = summed(ones_N, predicted_N, num_classes)
            f1_RK = 2 * hits_RK / np.where(present_RK, true_RK + claimed_RK, 1)
            scores[name] = (f1_RK * present_RK).sum(1) / present_RK.sum(1)
        elif name == "log_loss":
            smallest = np.finfo(np.float64).eps
            loss_N = -np.log(np.clip(shares_NK[np.arange(len(truth_N)), truth_N], smallest, 1))
            scores[name] = summed(loss_N, np.zeros_like(truth_N), 1)[:, 0] / total_R
        elif name == "calibration_error":
            confidence_N = shares_NK.max(1)
            bin_N = confidence_bins(confidence_N)
            gap_RJ = summed(right_N - confidence_N, bin_N, int(bin_N.max()) + 1)
            scores[name] = np.abs(gap_RJ).sum(1) / total_R
        else:
            raise AssertionError(f"no weighted form of metric {name!r}")
    return scores


def _weighted_auroc(
    truth_N: NDArray[np.int64], shares_NK: Floats, patient_N: NDArray[np.intp], weights_RP: Floats
) -> Floats:
    """Macro one against the rest, (R,). Pairs of slides are first counted per pair of patients, who are weighted."""
    total_R = np.zeros(len(weights_RP))
    num_R = np.zeros(len(weights_RP))
    weights = weights_RP.astype(np.float32)
    for number in range(shares_NK.shape[1]):
        positive_N = truth_N == number
        if not 0 < positive_N.sum() < len(truth_N):
            continue
        with_P, with_number = np.unique(patient_N[positive_N], return_inverse=True)
        without_P, without_number = np.unique(patient_N[~positive_N], return_inverse=True)
        won = pairs_won(
            shares_NK[positive_N, number],
            with_number,
            len(with_P),
            shares_NK[~positive_N, number],
            without_number,
            len(without_P),
        ).astype(np.float32)
        ours_R = weights[:, with_P]
        theirs_R = weights[:, without_P]
        num_pairs_R = (ours_R @ np.bincount(with_number).astype(np.float32)) * (
            theirs_R @ np.bincount(without_number).astype(np.float32)
        )
        won_R = np.einsum("rq,rq->r", ours_R @ won, theirs_R)
        exists_R = num_pairs_R > 0
        total_R += np.where(exists_R, won_R / np.where(exists_R, num_pairs_R, 1), 0)
        num_R += exists_R
    return np.where(num_R > 0, total_R / np.maximum(num_R, 1), np.nan)


def pairs_won(
    ours: Floats,
    our_patient: NDArray[np.intp],
    num_ours: int,
    theirs: Floats,
    their_patient: NDArray[np.intp],
    num_theirs: int,
) -> Floats:
    """(our patients, their patients): in how many pairs of slides ours scores higher, ties one half."""
    levels, their_level = np.unique(theirs, return_inverse=True)
    held = np.zeros((len(levels) + 1, num_theirs))
    np.add.at(held, (their_level + 1, their_patient), 1)
    below = held.cumsum(0)  # below[i]: theirs under the i lowest levels
    won = 0.5 * (below[np.searchsorted(levels, ours, "left")] + below[np.searchsorted(levels, ours, "right")])
    table = np.zeros((num_ours, num_theirs))
    np.add.at(table, our_patient, won)
    return table
