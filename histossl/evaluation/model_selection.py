"""Which start's backbone the model for use gets, and whether another one scored higher."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from histossl.features.extraction import COLOUR
from histossl.stats import verdict
from histossl.stats.tables import SummaryRow, in_budget_order

PREFERRED = ("adapted", "imagenet")  # else the first start with a network


def for_use(measured: Iterable[str]) -> list[str]:
    """Starts with a network, the one whose model is to be used first."""
    known = [name for name in measured if name != COLOUR]
    return sorted(known, key=lambda name: PREFERRED.index(name) if name in PREFERRED else len(PREFERRED))


def comes_before(in_order: Sequence[str], earlier: str, name: str) -> bool:
    return earlier in in_order and in_order.index(earlier) < in_order.index(name)


def scored_higher(summary: Sequence[SummaryRow], name: str, metric: str = "auroc") -> tuple[str, str]:
    """The start with a network that scored highest at the largest budget, and the two scores in words.

    Empty where none did better than `name`, as far as three decimals tell.
    """
    rows = [row for row in summary if row.metric == metric and row.start != COLOUR]
    if not any(row.start == name for row in rows):
        return "", ""
    largest = max((row.budget for row in rows), key=in_budget_order)
    scores = {row.start: row.mean for row in rows if row.budget == largest}
    best = max(scores, key=lambda start: scores[start])
    if name not in scores or not round(scores[best], 3) > round(scores[name], 3):
        return "", ""
    labels = "with all labels" if largest == "all" else f"with {largest} labels per class"
    figures = f"{verdict.PLAIN_NAME[metric]} {scores[best]:.3f} against {scores[name]:.3f} {labels}"
    return best, f"{best} scored higher than {name} ({figures})"


def other_model(best: str, starts: Sequence[str]) -> str:
    """How a model of the start `best` is made; `starts` as --starts named them."""
    spelt = next((one for one in starts if one.partition("=")[0] == best), best)
    return f"for a model from {best} add --starts {spelt} --name {best} to the command"
