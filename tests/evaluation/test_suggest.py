"""Suggested slides are worth more than random ones, are not ten times the same, and say why."""

import csv

import numpy as np
import pytest
from synthetic_store import write_synthetic_store

from histossl.evaluation.suggest import committee, disagreement, picks
from histossl.heads.feature_heads import MeanHead


class Pooled:
    def __init__(self, pooled):
        self.pooled = pooled

    def tiles(self, item):
        return self.pooled[item : item + 1].astype(np.float32)


def archive(seed, counts=(60, 40, 15, 8, 5), dim=30):
    """Slides of classes that are not equally common, each class of two looks, and a few oddities far from all."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(len(counts), 2, dim)) * 1.3
    rows, labels = [], []
    for label, count in enumerate(counts):
        for number in range(count):
            rows.append(centres[label, int(number % 3 == 0)] + rng.normal(size=dim))
            labels.append(label)
    odd = rng.normal(size=(4, dim)) * 5
    order = rng.permutation(len(labels) + 4)
    return np.concatenate([rows, odd])[order], np.concatenate([labels, [0, 1, 2, 3]])[order].astype(np.int64)


def accuracy_with(x, labels, chosen, test):
    fitted = MeanHead(choose=False).fit(
        Pooled(x), chosen, labels[chosen], pool=np.arange(len(x)), groups=chosen, num_classes=5, seed=0
    )
    predicted = fitted.predict_proba(Pooled(x), test).argmax(1)
    return np.mean([(predicted[labels[test] == label] == label).mean() for label in np.unique(labels[test])])


def suggested(x, labels, begun, pool, number, seed=0):
    shares = committee(x[begun], labels[begun], begun, x[pool], 5, seed)
    names = [str(item) for item in pool]
    found = picks(
        x[begun],
        x[pool],
        shares,
        number,
        labelled_names=[str(item) for item in begun],
        names=names,
        classes=list("abcde"),
    )
    return np.array([int(one.slide) for one in found]), found


def test_picks_beat_random_picks_over_20_draws():
    gains = []
    for draw in range(20):
        x, labels = archive(draw)
        rng = np.random.default_rng([draw, 1])
        order = rng.permutation(len(x))
        test, rest = order[:40], order[40:]
        begun, pool = rest[:4], rest[4:]
        ours, _ = suggested(x, labels, begun, pool, 8)
        by_chance = [
            accuracy_with(x, labels, np.concatenate([begun, rng.choice(pool, 8, replace=False)]), test)
            for _ in range(5)
        ]
        gains.append(accuracy_with(x, labels, np.concatenate([begun, ours]), test) - np.mean(by_chance))
    mean, error = np.mean(gains), np.std(gains, ddof=1) / np.sqrt(20)
    assert mean > 2 * error
    assert mean > 0.04


def test_copies_of_a_slide_are_picked_once():
    rng = np.random.default_rng(0)
    x = np.concatenate([np.repeat(rng.normal(size=(1, 10)) * 3, 10, axis=0), rng.normal(size=(10, 10))])
    known = rng.normal(size=(4, 10))
    shares = np.full((3, 20, 2), 0.5)
    found = picks(known, x, shares, 5, labelled_names="wxyz", names=[str(n) for n in range(20)], classes="ab")
    assert sum(int(one.slide) < 10 for one in found) == 1
    assert len({one.slide for one in found}) == 5


def test_disagreement_is_zero_when_heads_agree_and_one_when_they_split():
    unsure_alike = np.full((2, 1, 2), 0.5)
    split = np.array([[[1.0, 0.0]], [[0.0, 1.0]]])
    assert disagreement(unsure_alike)[0] == pytest.approx(0)
    assert disagreement(split)[0] == pytest.approx(1)


def test_of_equals_the_one_that_heads_disagree_on_comes_first_and_says_so():
    x = np.array([[3.0, 0.0], [-3.0, 0.0]])
    shares = np.zeros((4, 2, 2))
    shares[:, 0] = [0.9, 0.1]
    shares[:2, 1], shares[2:, 1] = [0.95, 0.05], [0.05, 0.95]
    found = picks(np.zeros((1, 2)), x, shares, 2, labelled_names=["L"], names=["sure", "torn"], classes=["a", "b"])
    assert [one.slide for one in found] == ["torn", "sure"]
    assert "heads disagree (2 of 4 say" in found[0].reason


def test_reasons_say_what_is_so():
    rng = np.random.default_rng(0)
    known = rng.normal(size=(6, 30)) * 3
    shares = np.tile([0.9, 0.1], (4, 7, 1))

    def reasons(x):
        return [
            one.reason
            for one in picks(
                known,
                x,
                shares[:, : len(x)],
                len(x),
                labelled_names="uvwxyz",
                names=[str(n) for n in range(len(x))],
                classes="ab",
            )
        ]

    assert not any("nothing labelled" in reason for reason in reasons(known + rng.normal(size=known.shape) * 0.5))
    far = np.concatenate([known + 0.1, rng.normal(size=(1, 30)) * 3 + 6])
    assert "resembles nothing labelled" in reasons(far)[0]
    twins = np.concatenate([known[:4] + 0.1, np.repeat(far[-1:], 3, 0) + rng.normal(size=(3, 30)) * 0.1])
    assert "stands for 2 other unlabelled slides" in reasons(twins)[0]


def test_the_command_leaves_a_list_of_unlabelled_slides_with_reasons(workspace, cli, tmp_path):
    write_synthetic_store(workspace, [f"s{n:02d}" for n in range(12)], tiles_per_slide=3, tile_px=32)
    labels = tmp_path / "labels.csv"
    labels.write_text("slide,label\ns00,a\ns01,a\ns04,b\n")
    base = ["suggest", "--labels", labels, "-w", workspace.root, "--backbone", "test_vit", "--starts", "random"]
    code, _, err = cli(*base, "--input-px", 32, "-n", 4)
    assert code == 0, err
    with workspace.suggestions.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["rank"] for row in rows] == ["1", "2", "3", "4"]
    assert not {row["slide"] for row in rows} & {"s00", "s01", "s04"}
    assert all(row["reason"] for row in rows)
    assert cli(*base, "--input-px", 32, "-n", 4).code == 0
    with workspace.suggestions.open() as file:
        assert list(csv.DictReader(file)) == rows


def test_labels_of_the_test_set_change_no_suggestion(workspace, cli, tmp_path):
    write_synthetic_store(workspace, [f"s{n:02d}" for n in range(12)], tiles_per_slide=3, tile_px=32)
    labels = tmp_path / "labels.csv"
    base = ["suggest", "--labels", labels, "-w", workspace.root, "--backbone", "test_vit", "--starts", "random"]

    def suggested(test_labels):
        lines = ["slide,label,split", *(f"s{n:02d},{'ab'[n % 2]},train" for n in range(4))]
        lines += [f"s{n:02d},{label},test" for n, label in enumerate(test_labels, start=4)]
        labels.write_text("\n".join(lines) + "\n")
        told = cli(*base, "--input-px", 32, "-n", 4)
        assert told.code == 0, told.err
        return workspace.suggestions.read_text()

    assert suggested("abab") == suggested("bbaa")


def test_nothing_left_to_label_is_one_clear_line(workspace, cli, tmp_path):
    write_synthetic_store(workspace, ["A", "B"], tiles_per_slide=2, tile_px=32)
    (tmp_path / "labels.csv").write_text("slide,label\nA,a\nB,b\n")
    code, _, err = cli("suggest", "--labels", tmp_path / "labels.csv", "-w", workspace.root, "--backbone", "test_vit")
    assert code == 2
    assert "labelled already" in err
