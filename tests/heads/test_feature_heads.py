"""The heads learn what is there, do not learn what is not, and answer for classes they never saw."""

import time

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from histossl.heads.feature_heads import DEFAULT_STRENGTH, HEADS, _logistic, head_named, load_head
from histossl.labels.splits import seed_of


class Painted:
    """Bags of tiles: a share of each bag's tiles points in its class's direction."""

    def __init__(self, labels, dim=24, tiles=30, signal=1.5, share=1.0, seed=0):
        rng = np.random.default_rng(seed)
        directions = rng.normal(size=(int(labels.max()) + 1, dim))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        self.bags = []
        for label in labels:
            x = rng.normal(size=(tiles, dim)) + rng.normal(size=dim) * 0.2
            x[: round(share * tiles)] += signal * directions[label]
            self.bags.append(x.astype(np.float32))
        self.pooled = np.stack([bag.mean(0, dtype=np.float64) for bag in self.bags])

    def tiles(self, item):
        return self.bags[item]


def fit(head, bags, train, labels, num_classes, seed=0, groups=None):
    groups = np.arange(len(train)) if groups is None else groups
    return head_named(head).fit(
        bags, train, labels, pool=np.arange(len(bags.bags)), groups=groups, num_classes=num_classes, seed=seed
    )


LABELS = np.arange(60) % 3
TRAIN, TEST = np.arange(30), np.arange(30, 60)


@pytest.mark.parametrize("head", HEADS)
def test_a_head_learns_what_is_there_and_its_rows_sum_to_one(head):
    bags = Painted(LABELS)
    shares = fit(head, bags, TRAIN, LABELS[TRAIN], 3).predict_proba(bags, TEST)
    assert shares.shape == (30, 3)
    np.testing.assert_allclose(shares.sum(1), 1)
    assert (shares.argmax(1) == LABELS[TEST]).mean() > 0.9


@pytest.mark.parametrize("head", HEADS)
def test_permuted_labels_leave_a_head_at_chance(head):
    aucs = []
    for seed in range(8):
        labels = np.random.default_rng(seed).permutation(np.arange(60) % 2)
        bags = Painted(np.arange(60) % 2, seed=seed)
        shares = fit(head, bags, TRAIN, labels[TRAIN], 2).predict_proba(bags, TEST)
        aucs.append(roc_auc_score(labels[TEST], shares[:, 1]))
    assert abs(np.mean(aucs) - 0.5) < 3 * np.std(aucs) / np.sqrt(len(aucs)) + 0.02


@pytest.mark.parametrize("head", HEADS)
def test_the_same_seed_gives_the_same_numbers(head):
    bags = Painted(LABELS, signal=0.4)
    one, two = (fit(head, bags, TRAIN, LABELS[TRAIN], 3, seed=5).predict_proba(bags, TEST) for _ in range(2))
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("head", HEADS)
def test_a_class_without_labels_gets_probability_zero(head):
    bags = Painted(LABELS)
    train = np.array([0, 2, 3, 5])  # classes 0 and 2 only
    shares = fit(head, bags, train, LABELS[train], 3).predict_proba(bags, TEST)
    np.testing.assert_array_equal(shares[:, 1], 0)
    np.testing.assert_allclose(shares.sum(1), 1)


@pytest.mark.parametrize("head", HEADS)
def test_one_label_in_all_is_predicted_for_everything(head):
    bags = Painted(LABELS)
    shares = fit(head, bags, np.array([1]), LABELS[[1]], 3).predict_proba(bags, TEST)
    np.testing.assert_allclose(shares, np.tile([0.0, 1.0, 0.0], (30, 1)))


@pytest.mark.parametrize("head", HEADS)
def test_a_head_predicts_the_same_after_a_trip_to_disk(head, tmp_path):
    bags = Painted(LABELS)
    fitted = fit(head, bags, TRAIN, LABELS[TRAIN], 3)
    np.savez(tmp_path / "head.npz", **fitted.arrays())
    with np.load(tmp_path / "head.npz", allow_pickle=False) as arrays:
        again = load_head(head, dict(arrays))
    np.testing.assert_array_equal(again.predict_proba(bags, TEST), fitted.predict_proba(bags, TEST))


@pytest.mark.parametrize("head", ["mean", "knn", "simpleshot"])
def test_a_feature_that_never_changes_and_the_scale_of_features_do_not_matter(head):
    bags = Painted(LABELS, signal=0.5)
    before = fit(head, bags, TRAIN, LABELS[TRAIN], 3).predict_proba(bags, TEST)
    bags.pooled = np.concatenate([bags.pooled * 8.0, np.full((60, 24), 3.0)], 1)
    after = fit(head, bags, TRAIN, LABELS[TRAIN], 3).predict_proba(bags, TEST)
    assert (before.argmax(1) == after.argmax(1)).mean() > 0.9


def test_the_fit_in_the_span_of_the_labels_is_the_fit_in_all_dimensions():
    bags = Painted(LABELS, dim=200, signal=0.5)
    train = np.array([0, 1, 2])  # one each: no choice of C, the default is used
    ours = fit("mean", bags, train, LABELS[train], 3)
    x = (bags.pooled - ours.centre) / ours.scale
    theirs = LogisticRegression(C=DEFAULT_STRENGTH, class_weight="balanced", tol=1e-8, max_iter=10_000)
    theirs.fit(x[train], LABELS[train])
    np.testing.assert_allclose(ours.predict_proba(bags, TEST), theirs.predict_proba(x[TEST]), atol=2e-4)


def test_two_classes_give_the_probabilities_of_scikit_learn():
    rng = np.random.default_rng(0)
    z, labels = rng.normal(size=(20, 4)), np.arange(20) % 2
    weight, bias, _ = _logistic(z, labels, 1.0)
    logits = z @ weight.T + bias
    ours = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    theirs = LogisticRegression(C=1.0, class_weight="balanced", tol=1e-5).fit(z, labels).predict_proba(z)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_tuning_never_sees_a_slide_of_the_patient_it_is_scored_on():
    """Slides of a patient are copies: parted between folds they would make the weakest penalty look best."""
    rng = np.random.default_rng(0)
    patients = 8
    x = np.repeat(rng.normal(size=(patients, 50)), 6, axis=0)
    labels = np.repeat(np.arange(patients) % 2, 6)  # no relation to x beyond the patient
    from histossl.heads.feature_heads import STRENGTHS, _chosen_strength

    x /= np.sqrt(50)
    by_patient = _chosen_strength(x, labels, np.repeat(np.arange(patients), 6), seed=0)
    by_slide = _chosen_strength(x, labels, np.arange(len(x)), seed=0)
    assert by_patient == STRENGTHS[0]
    assert by_slide == STRENGTHS[-1]


def test_attention_finds_the_few_tiles_that_matter():
    labels = np.arange(60) % 2
    bags = Painted(labels, signal=0.0, tiles=40)
    for item, label in enumerate(labels):
        bags.bags[item][:8, 0] += 5.0  # both classes: look here
        bags.bags[item][:8, 1] += 5.0 * (2 * label - 1)
    fitted = fit("abmil", bags, TRAIN, labels[TRAIN], 2)
    shares, attention = fitted.of_tiles(bags.tiles(40))
    assert shares.argmax() == labels[40]
    assert attention.sum() == pytest.approx(1)
    assert attention[:8].mean() > 2 * attention[8:].mean()


def test_seeds_of_work_are_stable():
    assert seed_of(0, 3, None, "all") == seed_of(0, 3, None, "all")
    assert (
        len({seed_of(0, draw, fold, budget) for draw in range(9) for fold in (None, 0, 1) for budget in (1, 2)}) == 54
    )


@pytest.mark.slow
def test_a_curve_of_200_slides_is_a_matter_of_seconds():
    """The issue's bound: 200 slides x 3 starts x 6 budgets x 10 draws in a minute on two cores."""
    labels = np.arange(200) % 3
    bags = Painted(labels, dim=384, tiles=2)
    began_s = time.perf_counter()
    for budget in (1, 2, 4, 8, 16, 50):
        train = np.concatenate([np.flatnonzero(labels == label)[:budget] for label in range(3)])
        for draw in range(3):
            fit("mean", bags, train, labels[train], 3, seed=draw)
    assert (time.perf_counter() - began_s) / 18 * 180 < 60
