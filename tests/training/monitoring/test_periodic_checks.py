"""What is said of the looks at a run: which was best, and whether it was above the start."""

from pathlib import Path

from histossl.core.workspace import PretrainDir
from histossl.training.monitoring.periodic_checks import Best, probe_verdict


def test_the_last_score_is_told_whatever_the_best_one_was(tmp_path: Path) -> None:
    best = Best()
    for step, score in ((0, 0.5), (3, 0.501), (6, 0.3), (9, 0.2)):
        best = best.with_look(step, score)
    said = probe_verdict(best, 9, PretrainDir(tmp_path / "run"))
    assert "rose from 0.500 to 0.501 (step 3 of 9)" in said
    assert "what finetune takes, has 0.200, no more than the start" in said
    assert "highest of 3 looks is partly luck" in said


def test_a_probe_that_reads_the_same_did_not_rise(tmp_path: Path) -> None:
    said = probe_verdict(Best().with_look(0, 0.45931).with_look(6, 0.45940), 6, PretrainDir(tmp_path / "run"))
    assert "stayed at 0.459" in said
    assert "rose" not in said


def test_labels_that_come_late_are_compared_with_no_start(tmp_path: Path) -> None:
    best = Best().with_look(6, 0.4).with_look(9, 0.3)
    assert (best.step, best.score) == (6, 0.4)
    said = probe_verdict(best, 9, PretrainDir(tmp_path / "run"))
    assert "no score of the start to compare with" in said
    assert "nan" not in said
