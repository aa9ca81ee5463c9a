"""Metrics have the values that they should, and defined ones where the data leave them open."""

import math

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, f1_score, log_loss, roc_auc_score

from histossl.stats.metrics import METRICS, confidence_bins, metrics
from histossl.stats.weighted_metrics import drawn_weights, pairs_won, resampled_metrics

CLASSES = ["a", "b", "c"]


def test_perfect_predictions():
    found = metrics(["a", "b", "c", "a"], np.eye(3)[[0, 1, 2, 0]], CLASSES)
    assert found["auroc"] == found["balanced_accuracy"] == found["f1"] == 1
    assert found["log_loss"] == pytest.approx(0, abs=1e-9)
    assert found["calibration_error"] == 0


def test_predictions_that_say_nothing_score_what_guessing_does():
    found = metrics(["a", "a", "b", "c"], np.full((4, 3), 1 / 3), CLASSES)
    assert found["auroc"] == 0.5  # all scores tied
    assert found["balanced_accuracy"] == pytest.approx(1 / 3)  # the first class is called at a tie
    assert found["log_loss"] == pytest.approx(math.log(3))


def test_a_tie_counts_half():
    # positives .5 .9, negatives .5 .1: of four pairs three are won and one is tied
    shares = np.array([0.5, 0.9, 0.5, 0.1])
    found = metrics(["b", "b", "a", "a"], np.stack([1 - shares, shares], 1), ["a", "b"])
    assert found["auroc"] == pytest.approx(3.5 / 4)


def test_one_class_only_has_no_auroc_but_the_rest():
    found = metrics(["a", "a"], np.array([[0.9, 0.1], [0.2, 0.8]]), ["a", "b"])
    assert math.isnan(found["auroc"])
    assert found["balanced_accuracy"] == 0.5
    assert found["log_loss"] == pytest.approx(-(math.log(0.9) + math.log(0.2)) / 2)


def test_a_class_without_test_slides_is_left_out_of_the_means():
    shares = np.array([[0.8, 0.1, 0.1], [0.2, 0.2, 0.6], [0.1, 0.8, 0.1], [0.1, 0.7, 0.2]])
    found = metrics(["a", "a", "b", "b"], shares, CLASSES)
    assert found["balanced_accuracy"] == pytest.approx((0.5 + 1) / 2)  # the call of "c" still costs "a" its recall
    assert found["auroc"] == pytest.approx((1 + 1) / 2)


def test_nothing_to_test_is_nan():
    assert all(math.isnan(value) for value in metrics([], np.zeros((0, 3)), CLASSES).values())


def test_a_probability_of_zero_for_the_truth_stays_finite():
    assert np.isfinite(metrics(["a", "b"], np.array([[0.0, 1.0], [0.0, 1.0]]), ["a", "b"])["log_loss"])


def test_rows_without_mass_become_even():
    found = metrics(["a", "b"], np.zeros((2, 2)), ["a", "b"])
    assert found["log_loss"] == pytest.approx(math.log(2))


def test_overconfidence_is_calibration_error():
    # 100 slides called at 90 %, of which 60 are right
    shares = np.tile([0.9, 0.1], (100, 1))
    labels = ["a"] * 60 + ["b"] * 40
    rng = np.random.default_rng(0)
    order = rng.permutation(100)
    found = metrics([labels[i] for i in order], shares, ["a", "b"])
    assert found["calibration_error"] == pytest.approx(0.3, abs=0.12)
    one_bin = metrics(["a"] * 3 + ["b"] * 2, shares[:5], ["a", "b"])
    assert one_bin["calibration_error"] == pytest.approx(0.3)


def test_bins_are_equally_full_and_never_emptier_than_five():
    assert np.bincount(confidence_bins(np.random.default_rng(0).random(23))).tolist() == [6, 6, 6, 5]
    assert np.bincount(confidence_bins(np.arange(100.0))).tolist() == [10] * 10


# ---- the same, weighted and for many resamples at once


@pytest.mark.parametrize("num_classes", [2, 3, 5])
@pytest.mark.parametrize("ties", [False, True])
def test_weights_of_one_give_scikit_learns_values(num_classes, ties):
    rng = np.random.default_rng(num_classes)
    truth = np.concatenate([np.arange(num_classes), rng.integers(0, num_classes, 60)])
    shares = rng.random((len(truth), num_classes))
    shares[np.arange(len(truth)), truth] += 0.4
    if ties:
        shares = np.round(shares, 1) + 0.05
    shares /= shares.sum(1, keepdims=True)
    patients = rng.integers(0, 25, len(truth))
    names = [str(number) for number in range(num_classes)]
    expected = metrics([names[k] for k in truth], shares, names)
    found = resampled_metrics(truth, shares, patients, np.ones((1, 25)))
    for name in METRICS:
        assert found[name][0] == pytest.approx(expected[name], rel=1e-5), name


def test_whole_weights_are_repeated_patients():
    """A resample in which a patient counts twice is the data with that patient's slides twice."""
    rng = np.random.default_rng(3)
    truth = rng.integers(0, 3, 50)
    shares = rng.dirichlet([1, 1, 1], 50)
    patients = rng.integers(0, 12, 50)
    weights = rng.integers(0, 4, (6, 12)).astype(float)
    found = resampled_metrics(truth, shares, patients, weights)
    for number, row in enumerate(weights):
        again = np.repeat(np.arange(50), row[patients].astype(int))
        y, p = truth[again], shares[again]
        assert found["balanced_accuracy"][number] == pytest.approx(balanced_accuracy_score(y, p.argmax(1)))
        assert found["f1"][number] == pytest.approx(f1_score(y, p.argmax(1), average="macro", labels=np.unique(y)))
        assert found["log_loss"][number] == pytest.approx(log_loss(y, p, labels=[0, 1, 2]))
        assert found["auroc"][number] == pytest.approx(
            np.mean([roc_auc_score(y == k, p[:, k]) for k in range(3)]), rel=1e-5
        )


def test_pairs_won_counts_every_pair_once():
    rng = np.random.default_rng(0)
    ours, theirs = rng.integers(0, 5, 20).astype(float), rng.integers(0, 5, 30).astype(float)
    our_patient, their_patient = rng.integers(0, 4, 20), rng.integers(0, 6, 30)
    expected = np.zeros((4, 6))
    for i in range(20):
        for j in range(30):
            expected[our_patient[i], their_patient[j]] += (ours[i] > theirs[j]) + 0.5 * (ours[i] == theirs[j])
    assert np.array_equal(pairs_won(ours, our_patient, 4, theirs, their_patient, 6), expected)


def test_resampled_patients_stay_in_their_class_and_keep_its_size():
    stratum = np.array([0] * 7 + [1] * 3 + [2])
    weights = drawn_weights(stratum, 4000, np.random.default_rng(0))
    for number, size in ((0, 7), (1, 3), (2, 1)):
        assert np.allclose(weights[:, stratum == number].sum(1), size)
    # The variance of a class's mean is then the unbiased one, s^2 / n.
    values = np.arange(7.0)
    means = weights[:, :7] @ values / 7
    assert means.var() == pytest.approx(values.var(ddof=1) / 7, rel=0.06)
