"""The report's figures, by matplotlib without a display: readable in print, by the colour-blind, and without a legend.

Each function takes numbers and returns a Figure; `svg` and `png` turn it into text and bytes, the same every time.
A start keeps its colour, marker and place in every figure.
"""

from __future__ import annotations

import functools
import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullFormatter, NullLocator
from numpy.typing import NDArray

from histossl.core.text import shown as seen

Floats = NDArray[np.float64]
P = ParamSpec("P")
R = TypeVar("R")

INK, SOFT, FAINT, RULE = "#1d2329", "#5b6670", "#9aa4ad", "#d9dee3"
# Okabe and Ito's colours, which the colour-blind tell apart; markers and dashes tell them apart in grey.
OF_START = {
    "adapted": ("#C2410C", "o", "-"),
    "imagenet": ("#0B5C93", "s", "-"),
    "random": ("#8A949C", "^", "-"),
    "colour": ("#6B7178", "", (0, (4, 2.5))),
}
FOR_OTHERS = (("#00795A", "D", "-"), ("#A8517F", "v", "-"), ("#B07D00", "P", "-"), ("#2E8FC0", "X", "-"))
SHOWN_AS = {"imagenet": "ImageNet", "random": "random weights", "colour": "stain colour alone"}
FONTS = "system-ui, -apple-system, 'Segoe UI', 'Helvetica Neue', Arial, 'Liberation Sans', 'DejaVu Sans', sans-serif"
LINE_PT = 11  # of small text
STYLE: Any = {  # matplotlib types its keys one by one
    "font.size": 9.5,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": SOFT,
    "axes.linewidth": 0.7,
    "axes.titlesize": 9.5,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "figure.facecolor": "white",
    "svg.fonttype": "none",  # text stays text: sharp, selectable, in the page's own face
    "text.parse_math": False,  # a class may be called "CD3$"
}


def shown(start: str) -> str:
    return SHOWN_AS.get(start, start)


def look_of(starts: Sequence[str]) -> dict[str, tuple[str, str, Any]]:
    """Colour, marker and dash of each start, the same whatever other starts there are (for the four known ones)."""
    others = [start for start in starts if start not in OF_START]
    return {
        start: OF_START[start] if start in OF_START else FOR_OTHERS[others.index(start) % len(FOR_OTHERS)]
        for start in starts
    }


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """Draw with our STYLE, whatever the caller's settings are."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> R:
        with matplotlib.rc_context(STYLE), warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"Glyph .* missing from font")  # the browser's fonts have it
            return draw(*args, **kwargs)

    return drawn


# ---- from a figure to bytes


@styled
def svg(figure: Figure, name: str, title: str = "") -> str:
    """One <svg> element to put into a page or a file. `name` keeps the ids of several figures on a page apart."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(
            buffer, format="svg", dpi=220, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    text = seen(buffer.getvalue(), lines=True)  # no reader of XML takes a control character
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r"(font(?:-family)?: [^;\"]*?)'DejaVu Sans'[^;\"]*", lambda found: found[1] + FONTS, text)
    label = seen(title).replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1).strip()


@styled
def png(figure: Figure, dpi: int = 160) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def _figure(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


# ---- the label-efficiency curve


@dataclass(frozen=True)
class Line:
    """One start's curve. `labels` (of the x axis) come from the longest line."""

    start: str
    slides: Floats
    mean: Floats
    low: Floats
    high: Floats
    seeds: Sequence[Floats] = ()  # the curves of its pretraining runs, where it is the mean of several


@styled
def curve(
    lines: Sequence[Line],
    ticks: Mapping[float, str],
    ylabel: str,
    unit: str = "slide",
    chance: float | None = None,
    size: tuple[float, float] = (7.4, 4.3),
) -> Figure:
    """Score over labelled slides per class (log2), each start with its 95 % band and its name at its end."""
    figure, axes = _figure(*size)
    look = look_of([line.start for line in lines])
    ends = []
    for line in lines:
        colour, marker, dash = look[line.start]
        main = line.start not in ("random", "colour")
        if line.start != "colour":
            axes.fill_between(line.slides, line.low, line.high, color=colour, alpha=0.14 if main else 0.08, linewidth=0)
            if main:  # edges keep bands apart that lie upon each other
                for edge in (line.low, line.high):
                    axes.plot(line.slides, edge, color=colour, linewidth=0.7, alpha=0.55, linestyle=dash)
        for seed in line.seeds:
            axes.plot(line.slides, seed, color=colour, linewidth=0.8, alpha=0.7, linestyle=(0, (1, 1.2)), zorder=2)
        axes.plot(
            line.slides,
            line.mean,
            color=colour,
            linestyle=dash,
            linewidth=2 if main else 1.3,
            marker=marker or None,
            markersize=5 if main else 4,
            markeredgecolor="white",
            markeredgewidth=0.8,
            solid_capstyle="round",
            zorder=3 if main else 2,
            gid=f"curve-{line.start}",
        )
        ends.append((float(line.mean[-1]), shown(line.start), colour, main))
    if chance is not None:
        ends.append((chance, "guessing", SOFT, False))
    framed = [line for line in lines if line.start != "colour"] or lines  # the floor alone must be in the picture
    everything = np.concatenate([np.concatenate([line.low, line.high]) for line in framed])
    bottom, top = float(np.nanmin(everything)), float(np.nanmax(everything))
    if chance is not None:
        bottom = min(bottom, chance)
        axes.axhline(chance, color=FAINT, linewidth=0.8, linestyle=(0, (1, 2)), zorder=1)
    for line in lines:
        bottom, top = min(bottom, float(np.nanmin(line.mean))), max(top, float(np.nanmax(line.mean)))
    room = 0.04 * max(top - bottom, 0.02)
    axes.set_ylim(bottom - room, min(top + room, 1.004) if top <= 1 else top + room)
    _log2_axis(axes, ticks)
    axes.set_xlabel(f"labelled {unit}s per class (log scale)")
    axes.set_ylabel(ylabel)
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    right = axes.get_xlim()[1]
    for y, (_, name, colour, main) in zip(_apart([end[0] for end in ends], axes, 0.055), ends, strict=True):
        axes.annotate(
            name,
            (right, y),
            xytext=(5, 0),
            textcoords="offset points",
            color=colour,
            va="center",
            fontweight="bold" if main else "normal",
            annotation_clip=False,
        )
    _drop_colliding_names(axes)
    return figure


def _log2_axis(axes: Axes, ticks: Mapping[float, str]) -> None:
    axes.set_xscale("log", base=2)
    places = sorted(ticks)
    axes.set_xlim(places[0] * 2**-0.12, places[-1] * 2**0.12 if len(places) > 1 else places[-1] * 2)
    axes.xaxis.set_major_locator(FixedLocator(places))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xticklabels([ticks[place] for place in places])


def _drop_colliding_names(axes: Axes, room: float = 0.5) -> None:
    """Of two names of the x axis that would overlap ("8" and "all (10)") the right one stays; its tick stays of both.

    `room` between them, in heights of a letter. Last of all: the layout must be known.
    """
    figure = axes.figure
    figure.draw_without_rendering()  # type: ignore[union-attr]
    names = axes.get_xticklabels()
    kept = [name.get_text() for name in names]
    left_of_next = np.inf
    for number in reversed(range(len(names))):
        box = names[number].get_window_extent()
        if box.x1 + room * box.height > left_of_next:
            kept[number] = ""
        else:
            left_of_next = box.x0
    axes.set_xticklabels(kept)


def _apart(heights: Sequence[float], axes: Axes, least: float) -> list[float]:
    """Label heights, pushed apart until they are at least this share of the axis from each other."""
    bottom, top = axes.get_ylim()
    gap = least * (top - bottom)
    order = np.argsort(heights)
    placed = np.clip(np.array(heights, dtype=float)[order], bottom, top)
    for _ in range(200):
        for i in range(len(placed) - 1):
            short = gap - (placed[i + 1] - placed[i])
            if short > 1e-9:
                placed[i] -= short / 2
                placed[i + 1] += short / 2
    result = np.empty(len(placed))
    result[order] = placed
    return [float(y) for y in result]


# ---- labels saved


@dataclass(frozen=True)
class SavedRow:
    """Ends of the interval may be inf (not reached); `slides` too."""

    reference_slides: float
    slides: float
    low: float
    high: float
    at_most: bool


@styled
def saved(rows: Sequence[SavedRow], ticks: Mapping[float, str], start: str, reference: str, unit: str) -> Figure:
    """For each budget of the reference: where the start gets the same score. Left of the square means labels saved."""
    figure, axes = _figure(7.4, 0.9 + 0.42 * len(rows))
    look = look_of([start, reference])
    last = max(ticks)
    beyond = last * 2**0.45  # where "not reached" is drawn
    for y, row in enumerate(rows):
        if np.isfinite(row.slides):
            axes.plot(
                [row.slides, row.reference_slides], [y, y], color=RULE, linewidth=5, solid_capstyle="round", zorder=1
            )
        axes.plot([row.low, min(row.high, beyond)], [y, y], color=look[start][0], linewidth=1.3, zorder=2)
        if not np.isfinite(row.high):
            axes.plot(beyond, y, marker=">", color=look[start][0], markersize=5, zorder=2)
        axes.plot(row.reference_slides, y, marker="s", color=look[reference][0], markersize=6.5, zorder=3)
        if np.isfinite(row.slides):
            axes.plot(row.slides, y, marker="o", color=look[start][0], markersize=7, zorder=4, markeredgecolor="white")
    axes.axvline(last * 2**0.2, color=RULE, linewidth=0.8)
    _log2_axis(axes, ticks)
    axes.set_xlim(min(ticks) * 2**-0.25, beyond * 2**0.25)
    axes.annotate(
        "not\nreached",
        (beyond, 1),
        xycoords=("data", "axes fraction"),
        ha="center",
        va="bottom",
        color=SOFT,
        fontsize=8,
    )
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), [f"{shown(reference)}, {ticks[row.reference_slides]}" for row in rows])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(f"labelled {unit}s per class for the same score")
    _drop_colliding_names(axes)
    return figure


# ---- what is confused, found, and believed


@styled
def confusion(tables: Mapping[str, Floats], classes: Sequence[str]) -> Figure:
    """One matrix per start: rows are true classes, cells the share of their slides (mean over draws)."""
    side = max(2.0, 0.5 * len(classes) + 0.5)
    longest = min(1.6, 0.075 * max(len(name) for name in classes))
    figure, grid = _figure(
        len(tables) * side + longest + 0.5, side + 0.7 * longest + 0.75, 1, len(tables), squeeze=False, sharey=True
    )
    for axes, (start, counts) in zip(grid[0], tables.items(), strict=True):
        total = counts.sum(1, keepdims=True)
        share = np.divide(counts, total, out=np.zeros_like(counts), where=total > 0)
        axes.imshow(share, cmap="Blues", vmin=0, vmax=1.15)
        for i in range(len(classes)):
            for j in range(len(classes)):
                if total[i, 0] > 0:
                    axes.text(
                        j, i, f"{100 * share[i, j]:.0f}", ha="center", va="center", fontsize=9,
                        color="white" if share[i, j] > 0.6 else INK if share[i, j] >= 0.005 else FAINT,
                        fontweight="bold" if i == j else "normal",
                    )  # fmt: skip
        axes.set_xticks(
            range(len(classes)), classes, rotation=35 if longest > 0.3 else 0, ha="right" if longest > 0.3 else "center"
        )
        axes.set_yticks(range(len(classes)), classes)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.set_title(shown(start))
        axes.set_xlabel("predicted")
    grid[0][0].set_ylabel("true")
    return figure


@styled
def roc(curves: Mapping[str, Mapping[str, tuple[Floats, Floats, float]]], unit: str = "slide") -> Figure:
    """{class: {start: (false positive rate, true positive rate, area)}}: one small panel per class."""
    num = len(curves)
    rows = -(-num // 4)
    columns = -(-num // rows)
    most = max(len(one) for one in curves.values())
    figure, grid = _figure(
        max(3.2, 1.95 * columns + 0.5),
        (2.15 + 0.17 * (most + 1)) * rows + 0.35,
        rows,
        columns,
        squeeze=False,
        sharex=True,
        sharey=True,
    )
    look = look_of(list(dict.fromkeys(start for one in curves.values() for start in one)))
    for axes, (label, by_start) in zip(grid.flat, curves.items(), strict=False):
        axes.plot([0, 1], [0, 1], color=FAINT, linewidth=0.8, linestyle=(0, (1, 2)))
        for number, (start, (false_rate, true_rate, area)) in enumerate(by_start.items()):
            colour, _, dash = look[start]
            axes.plot(false_rate, true_rate, color=colour, linestyle=dash, linewidth=1.7)
            _name_above(axes, f"{shown(start)} {area:.2f}", len(by_start) - 1 - number, colour)
        _name_above(axes, label, len(by_start), INK, 9.5)
        axes.set_aspect("equal")
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(-0.02, 1.02)
        axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
        axes.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])
    for place, axes in enumerate(grid.flat):
        axes.set_visible(place < num)
        axes.tick_params(labelbottom=place + columns >= num)  # the last of its column, whatever its row
    figure.supxlabel(f"false alarms (share of other {unit}s)", fontsize=9.5, color=SOFT)
    figure.supylabel("found (share of this class)", fontsize=9.5, color=SOFT)
    return figure


def _name_above(axes: Axes, name: str, line: int, colour: str, size: float = 8) -> None:
    """In the `line`th line above the panel, counted upwards: within it a curve may pass anywhere."""
    axes.annotate(
        name, (0, 1), xytext=(0, 2 + LINE_PT * line), xycoords="axes fraction", textcoords="offset points",
        color=colour, va="bottom", fontsize=size,
    )  # fmt: skip


@styled
def calibration(bins: Mapping[str, tuple[Floats, Floats]]) -> Figure:
    """{start: (mean confidence, share right)} per bin. On the diagonal a stated 80 % is right in 80 of 100."""
    figure, axes = _figure(3.7, 3.3 + 0.16 * len(bins))
    axes.plot([0, 1], [0, 1], color=FAINT, linewidth=0.8, linestyle=(0, (1, 2)))
    look = look_of(list(bins))
    lowest = min((float(confidence.min()) for confidence, _ in bins.values()), default=0.0)
    for number, (start, (confidence, right)) in enumerate(bins.items()):
        colour, marker, dash = look[start]
        axes.plot(
            confidence, right, color=colour, linestyle=dash, marker=marker or None, linewidth=1.7, markersize=5,
            markeredgecolor="white",
        )  # fmt: skip
        _name_above(axes, shown(start), len(bins) - 1 - number, colour)
    left = max(0.0, np.floor(10 * lowest - 0.2) / 10)
    axes.set_xlim(left, 1.01)
    axes.set_ylim(-0.02, 1.03)
    axes.set_xlabel("stated confidence")
    axes.set_ylabel("share that was right")
    axes.grid(color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure


# ---- features


@styled
def feature_map(maps: Mapping[str, Floats], colourings: Mapping[str, Sequence[str]]) -> Figure:
    """{start: (tiles, 2)}, {what: name per tile}: a row per start, a column per colouring."""
    figure, grid = _figure(
        2.55 * len(colourings) + 0.3, 2.5 * len(maps) + 0.55, len(maps), len(colourings), squeeze=False
    )
    for row, (start, places) in enumerate(maps.items()):
        for column, (what, names) in enumerate(colourings.items()):
            axes = grid[row][column]
            kinds = list(dict.fromkeys(sorted(names)))
            palette = _palette(len(kinds))
            given = np.array([kinds.index(name) for name in names])
            shuffled = np.random.default_rng(0).permutation(len(places))
            axes.scatter(
                places[shuffled, 0], places[shuffled, 1], s=5, c=palette[given[shuffled]], linewidths=0, alpha=0.8,
                rasterized=True,
            )  # fmt: skip
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set_visible(True)
                spine.set_color(RULE)
            if row == 0:
                axes.set_title(f"by {what}")
            if column == 0:
                axes.set_ylabel(shown(start), color=INK)
            if row == len(maps) - 1 and len(kinds) <= 8:
                _names_below(axes, kinds, palette)
            elif row == len(maps) - 1:
                axes.set_xlabel(f"{len(kinds)} {what}s", fontsize=8)
    return figure


def _names_below(axes: Axes, kinds: Sequence[str], palette: Floats) -> None:
    handles = [
        matplotlib.lines.Line2D([], [], marker="o", linestyle="", color=tuple(colour), markersize=4)
        for colour in palette
    ]
    kinds = [f" {kind}" if kind.startswith("_") else kind for kind in kinds]  # else matplotlib leaves it out
    axes.legend(
        handles, kinds, loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=min(3, len(kinds)), frameon=False,
        fontsize=8, handletextpad=0.1, columnspacing=0.8, borderpad=0.1,
    )  # fmt: skip


def _palette(num: int) -> Floats:
    """Eight colours to be told apart, then evenly turned hues: of many slides only clumps can be seen anyway."""
    base = ["#C2410C", "#0B5C93", "#00795A", "#B07D00", "#A8517F", "#5FB3E0", "#7A8288", "#2B2F33"]
    if num <= len(base):
        return np.array([matplotlib.colors.to_rgb(colour) for colour in base[:num]])
    turned = matplotlib.colormaps["turbo"](np.linspace(0.02, 0.98, num))[:, :3]
    return np.asarray(turned, dtype=np.float64)


# ---- pretraining


@styled
def pretraining(log: Mapping[str, tuple[Floats, Floats]], titles: Mapping[str, str]) -> Figure:
    """{key: (steps, values)}: one small panel per logged value, in the order of `titles`."""
    keys = [key for key in titles if key in log]
    columns = min(3, len(keys))
    rows = -(-len(keys) // columns)
    figure, grid = _figure(2.45 * columns + 0.2, 1.6 * rows + 0.3, rows, columns, squeeze=False, sharex=True)
    for axes, key in zip(grid.flat, keys, strict=False):
        steps, values = log[key]
        fine = np.isfinite(values)
        many = fine.sum() > 40
        axes.plot(steps[fine], values[fine], color="#0B5C93", linewidth=0.7 if many else 1.4, alpha=0.4 if many else 1)
        if key == "loss" and "loss_ceiling" in log:  # what a method that tells nothing apart would have
            axes.plot(*log["loss_ceiling"], color=FAINT, linewidth=0.8, linestyle=(0, (1, 2)))
        if many:
            axes.plot(steps[fine], smoothed(values[fine]), color="#0B5C93", linewidth=1.5)
        axes.set_title(titles[key], fontsize=8.5)
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        if fine.any() and np.ptp(values[fine]) < 1e-9:
            axes.set_ylim(values[fine][0] - 0.5, values[fine][0] + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.tick_params(labelsize=8)
        axes.grid(axis="y", color=RULE, linewidth=0.5)
    for axes in list(grid.flat)[len(keys) :]:
        axes.set_visible(False)
    figure.supxlabel("step", fontsize=9, color=SOFT)
    return figure


def smoothed(values: Floats) -> Floats:
    """A running mean over a twentieth of the run, shortened at its ends."""
    half = max(1, len(values) // 40)
    total = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    left, right = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    mean: Floats = (total[right] - total[left]) / (right - left)
    return mean
