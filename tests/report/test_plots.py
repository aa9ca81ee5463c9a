"""Figures keep their colours, keep their labels apart, and are the same every time."""

import math
import re
from itertools import pairwise

import numpy as np
import pytest

from histossl.report import plots


def line(start, heights):
    x = np.array([1.0, 2, 4, 8])
    y = np.array(heights)
    return plots.Line(start, x, y, y - 0.05, y + 0.05)


TICKS = {1.0: "1", 2.0: "2", 4.0: "4", 8.0: "all (8)"}


def test_a_start_keeps_its_colour_whatever_others_there_are():
    alone, among = plots.look_of(["adapted"]), plots.look_of(["random", "other", "adapted", "imagenet"])
    assert alone["adapted"] == among["adapted"]
    assert len({look[0] for look in among.values()}) == 4


def test_starts_differ_without_colour_too():
    looks = plots.look_of(["adapted", "imagenet", "random", "colour", "x", "y", "z"])
    assert len({(marker, str(dash)) for _, marker, dash in looks.values()}) == 7


def test_labels_at_the_ends_do_not_overlap():
    figure = plots.curve(
        [line(name, [0.5, 0.6, 0.7, 0.8]) for name in ("adapted", "imagenet", "random", "a")], TICKS, "AUROC"
    )
    axes = figure.axes[0]
    heights = sorted(text.xy[1] for text in axes.texts)
    bottom, top = axes.get_ylim()
    assert len(heights) == 4
    assert min(np.diff(heights)) >= 0.054 * (top - bottom)


def test_names_of_the_x_axis_do_not_overlap_in_a_small_plot():
    """Ten slides per class: 8 and all (10) lie closer than their names are wide."""
    x, ticks = np.array([1.0, 2, 4, 8, 10]), {1.0: "1", 2.0: "2", 4.0: "4", 8.0: "8", 10.0: "all (10)"}
    lines = [plots.Line(start, x, x / 20, x / 20, x / 20) for start in ("adapted", "imagenet")]
    small, large = (plots.curve(lines, ticks, "AUROC", size=size).axes[0] for size in ((3.6, 2.6), (14, 4)))
    assert [name.get_text() for name in small.get_xticklabels()] == ["1", "2", "4", "", "all (10)"]
    assert [name.get_text() for name in large.get_xticklabels()] == list(ticks.values())
    assert list(small.get_xticks()) == list(x)  # the tick itself stays
    wide = {2.0**n: str(2**n) for n in range(9)} | {280.0: "all (280)"}
    row = plots.SavedRow(256, 200, 150, 240, False)
    names = plots.saved([row], wide, "adapted", "imagenet", "slide").axes[0].get_xticklabels()
    boxes = [name.get_window_extent() for name in names if name.get_text()]
    assert all(one.x1 < other.x0 for one, other in pairwise(boxes))


def test_no_name_lies_where_a_roc_curve_or_a_calibration_may_pass():
    rate = np.linspace(0, 1, 11)
    many = dict.fromkeys(("adapted", "imagenet", "random", "colour"), (rate, rate**2, 0.3))
    for figure, number in (
        (plots.roc({"ill": many, "well": dict(list(many.items())[:2])}), 8),
        (plots.calibration(dict.fromkeys(many, (rate, rate))), 4),
    ):
        figure.draw_without_rendering()
        names = [(axes, text) for axes in figure.axes for text in axes.texts]
        assert len(names) == number
        for axes, text in names:
            assert text.get_window_extent().y0 > axes.transData.transform((0, 1))[1]
            assert text.get_window_extent().y1 <= figure.bbox.y1
        for axes in figure.axes:
            heights = sorted((text.get_window_extent() for text in axes.texts), key=lambda box: box.y0)
            assert all(one.y1 <= other.y0 + 2 for one, other in pairwise(heights))


def test_an_svg_is_the_same_twice_and_shares_no_id_with_another():
    def drawn(name):
        return plots.svg(plots.curve([line("adapted", [0.5, 0.6, 0.7, 0.8])], TICKS, "AUROC", chance=0.5), name)

    assert drawn("a") == drawn("a")
    ids = [set(re.findall(r'\bid="([^"]+)"', drawn(name))) for name in ("a", "b")]
    assert ids[0]
    assert not ids[0] & ids[1]


def test_text_stays_text_and_is_escaped():
    figure = plots.curve([line("<b>&$x_1^{$", [0.5, 0.6, 0.7, 0.8])], TICKS, "AUROC")
    text = plots.svg(figure, "a", 'a "title" <i>')
    assert "&lt;b&gt;&amp;$x_1^{$" in text
    assert "<b>" not in text
    assert "<i>" not in text


def test_names_in_other_scripts_do_not_warn():
    figure = plots.confusion({"adapted": np.eye(2)}, ["腺癌", "فئة"])
    assert "腺癌" in plots.svg(figure, "a")
    assert plots.png(figure)[:4] == b"\x89PNG"


def test_what_is_not_reached_has_its_own_place():
    rows = [
        plots.SavedRow(2, 1.2, 1, 1.9, True),
        plots.SavedRow(4, 2.5, 1.4, math.inf, False),
        plots.SavedRow(8, math.inf, 4, math.inf, False),
    ]
    axes = plots.saved(rows, TICKS, "adapted", "imagenet", "slide").axes[0]
    dots = [mark for mark in axes.lines if mark.get_marker() == "o"]
    arrows = [mark for mark in axes.lines if mark.get_marker() == ">"]
    assert sorted(float(mark.get_xdata()[0]) for mark in dots) == [1.2, 2.5]  # none for what is never reached
    assert len(arrows) == 2
    assert all(float(mark.get_xdata()[0]) > 8 for mark in arrows)


def test_cells_of_a_confusion_matrix_are_shares_of_the_true_class():
    figure = plots.confusion({"adapted": np.array([[9.0, 1], [20, 60]])}, ["a", "b"])
    assert [text.get_text() for text in figure.axes[0].texts] == ["90", "10", "25", "75"]


def test_running_mean_keeps_a_constant_and_follows_a_line():
    assert np.allclose(plots.smoothed(np.full(200, 3.0)), 3)
    assert np.allclose(plots.smoothed(np.arange(200.0))[20:-20], np.arange(200.0)[20:-20])


@pytest.mark.parametrize("key", ["loss", "lr"])
def test_a_log_with_gaps_and_constants_is_drawn(key):
    steps = np.arange(5.0)
    log = {key: (steps, np.array([1, math.nan, 1, 1, 1.0])), "loss_ceiling": (steps, np.full(5, 2.0))}
    assert "svg" in plots.svg(plots.pretraining(log, {key: "it"}), "a")
