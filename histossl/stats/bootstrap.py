"""Scores of every start, budget and draw, and what they had been with other patients: the ground of all intervals.

The estimator, in one place. M[b, d] is a metric of one start at budget b in draw d, over all tested patients (pooled
over folds where there are folds). Reported is its mean over draws. It would come out differently with other *test
patients* and with other *labelled slides*, and draws are neither new patients nor independent of each other, since
all are taken from one pool. So the variance has two parts:

    patients   bootstrap of patients (with all their slides, within their class, the same ones in every start, budget
               and draw): the variance of the draws' mean. Of a class of n patients n - 1 are drawn and weighted by
               n / (n - 1) (Rao and Wu 1988), which is unbiased; the plain bootstrap is too small by (n - 1) / n.
    labelling  the variance between draws, less what by the same bootstrap a draw owes to its finite test set (a
               draw's own luck with these patients would else count twice).

A fixed test set: draws share their pool, so the variance between them is not all that labelling anew would bring. What
they share (`floor`) and where they differ (`spread`) is in pool.py; labelling is (floor + spread / D) / spread times
the variance seen between draws. How alike items of a patient are there is taken to be the intraclass correlation of the
test items' log-odds (`common_share`): an assumption, that items of a patient are as alike for a head that learns from
them as for one that judges them. Where the draws' own spread is smaller than the floor they are too alike to tell, and
the largest smaller budget stands in. Whatever stands in, all parts together are never less than the mean of the draws
seen varies by itself (their variance divided by D), with folds neither.

Folds: patients are also what heads are trained on, and an archive whose patients are typical is easy to test *and* good
to learn from. No resampling of predictions shows that, and draws do not either (each draw's folds between them use most
of the pool), so labelling is only divided by D, and the patients' part is multiplied by TWICE_USED. But not all that
the bootstrap shows is of patients. Let a patient's items score a[p] + c[d] + e[p, d] in draw d. The mean over P
patients and D draws has the variance

    Var(a) / P          patients            the bootstrap of the draws' mean sees both this
    Var(e) / (P D)      a patient's luck    and this, which other draws average away: what a draw owes to its test set
                        with a draw         and the mean does not, `_overlap`, divided by D
    Var(c) / D          labelling

and only the first is in both uses. (Multiplied as well, Var(e), which is most of the whole with a label or two or with
labels that say nothing, made intervals with permuted labels hold .99 at a nominal .95.) TWICE_USED is measured, not
derived: in simulated archives, whose true variances are known, Var(a) / P had to be multiplied by 2.6 to 4 with one
label a class (4 to 5 with sites, 1.6 with permuted labels), by 2.2 to 3.4 with two, by 2 to 2.5 with four, by 1 to 2
from there on. Which cases intervals are held to is the list in tests/evaluation/test_curves.py.

Whole sites left out (predictions name their site): sites are then what is drawn, for the bootstrap, for both uses and
for the degrees of freedom (Kish's number of sites of one size, less one), with all their patients and without classes
as strata, since a site has patients of several. Below 8 sites that is too little to go by: with 6 that differ much,
intervals held 91 of 100, and no verdict is given.

A start that is several pretraining runs (seeds of one recipe) scores the mean over them, and has a third part:

    seeds      the variance between its runs' curves (means over draws) divided by their number M, less what by the same
               bootstrap a run owes to the finite test set. Runs of two starts are independent of each other. What is
               said is then about the recipe, not about one run of it. With one run there is no such part, and the
               interval is about this very backbone.

All parts are linear in the curve, so every contrast (a budget, a difference of two starts, an area) has its own.
Shapes: R resamples, S series (a start with a head), M seeds, B budgets, D draws, P patients, N tested slides,
K classes, X results of one kind.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from histossl.core.errors import StoreError
from histossl.stats.draw_variance import Pool
from histossl.stats.metrics import METRICS, metrics, unit_rows
from histossl.stats.tables import Budget, Prediction, in_budget_order
from histossl.stats.weighted_metrics import drawn_weights, resampled_metrics

Floats = NDArray[np.float64]
NUM_RESAMPLES = 1000
SMALLEST_SHARE = 1e-6
TOO_ALIKE = 1.0  # draws of a budget tell no more of the labelling once the pool's variance is this many times theirs
Series = tuple[str, str]  # start, head


def beside(series: Series, head: str | None) -> bool:
    """Whether a series belongs beside those with `head`: the colour floor does, by whatever head it was measured."""
    return head in (None, series[1]) or series[0] == "colour"


@dataclass(frozen=True)
class Measured:
    """Every metric of every series, budget and draw; nan where a series lacks that budget or draw."""

    classes: list[str]
    series: list[Series]
    budgets: list[Budget]
    slides: Floats  # (B,) labelled slides per class; "all" in numbers
    draws: list[int]
    pool: Pool
    patients_per_class: dict[str, int]  # who has items of that class; with regions, a patient may be in several
    num_patients: int
    num_strata: int  # of the bootstrap: there every patient is in one
    num_tested: int
    sites_per_class: dict[str, int]  # where whole sites are left out: sites are then what is drawn; else empty
    num_sites: int
    worth_sites: float  # how many sites of one size would be worth these
    values_SBD: dict[str, Floats]  # means over a start's seeds
    resampled_RSBD: dict[str, NDArray[np.float32]]
    backbones: list[list[str]]  # per series its seeds' names; [""] where there is but one
    seeds_SMBD: dict[str, list[Floats]]  # per series (M, B, D)
    resampled_seeds_SRMB: dict[str, list[NDArray[np.float32]]]  # per series (R, M, B), means over draws
    alike_S: Floats  # how alike items of one patient are (see `common_share`)
    alike_sites_S: Floats  # and those of one site; 0 where patients are drawn

    def num_seeds(self, start: str, head: str | None = None) -> int:
        return len(self.backbones[self.number(start, head)])

    @property
    def several_items(self) -> bool:
        """Whether patients have several tested items of a class, as tiles and regions have."""
        return self.num_tested > sum(self.patients_per_class.values())

    @property
    def drawn(self) -> Literal["patient", "site"]:
        """What the intervals take to be drawn at random."""
        return "site" if self.num_sites else "patient"

    @property
    def df_drawn(self) -> float:
        """Degrees of freedom of a variance over what is drawn."""
        return max(1.0, self.worth_sites - 1 if self.num_sites else self.num_patients - self.num_strata)

    def number(self, start: str, head: str | None = None) -> int:
        for number, series in enumerate(self.series):
            if series[0] == start and beside(series, head):
                return number
        raise KeyError(start)

    def has(self, start: str, head: str | None = None) -> bool:
        return any(series[0] == start and beside(series, head) for series in self.series)

    def seed_curves_MB(self, metric: str, number: int) -> Floats:
        return _nanmean(self.seeds_SMBD[metric][number], -1)

    def mean_B(self, metric: str, number: int) -> Floats:
        return _nanmean(self.values_SBD[metric][number], -1)


def measure(
    predictions: Iterable[Prediction],
    classes: Sequence[str],
    pool_per_class: float | None = None,
    pool_patients_per_class: float | None = None,
    wanted: Sequence[str] = METRICS,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
    pool_sites: float | None = None,
) -> Measured:
    """Score predictions, as they are and with patients resampled; or sites, where predictions name them.

    `pool_per_class`, `pool_patients_per_class`: labelled slides and patients per class that a draw may choose from when
    the test set is fixed (with folds they follow from the predictions); `pool_sites`: what the sites there are worth
    (`worth_of_sizes`). Every cell (series, seed, budget, draw) must hold the same slides; StoreError if not.
    """
    cells: dict[tuple[Series, str, Budget, int], list[Prediction]] = {}
    for one in predictions:
        cells.setdefault(((one.start, one.head), one.backbone, one.budget, one.draw), []).append(one)
    if not cells:
        raise StoreError("predictions.csv holds no predictions; run `histossl finetune` again")
    for rows in cells.values():
        rows.sort(key=lambda row: row.slide)  # stable, so that a slide's own rows keep their order

    names = list(classes)
    first = next(iter(cells.values()))
    slides = [row.slide for row in first]
    labels = [row.label for row in first]
    for (series, _, budget, draw), rows in cells.items():
        if [row.slide for row in rows] != slides or [row.label for row in rows] != labels:
            raise StoreError(
                f"predictions.csv: start {series[0]!r}, budget {budget}, draw {draw} tests other slides than the rest; "
                "run `histossl finetune` again"
            )
    truth_N = np.array([names.index(label) for label in labels], dtype=np.int64)
    patients, patient_N = np.unique([row.patient for row in first], return_inverse=True)
    by_site = all(row.site for row in first)
    sites, site_N = np.unique([row.site for row in first], return_inverse=True)
    # Sites hold several classes, so no class is theirs to be drawn within.
    unit_N = site_N if by_site else patient_N
    stratum_U = (
        np.zeros(len(sites), dtype=np.int64) if by_site else _stratum_of(truth_N, patient_N, len(patients), len(names))
    )
    worth_sites = worth_of_sizes([site_N[patient_N == p][0] for p in range(len(patients))]) if by_site else 0.0

    folds = {row.fold for rows in cells.values() for row in rows} - {None}
    if folds:
        num_classes = len(set(labels))
        num_patients = len({(row.label, row.patient) for row in first})
        pool = Pool(len(slides) / num_classes, num_patients / num_classes, max(2, len(folds)), worth_sites or None)
    else:
        pool = Pool(pool_per_class, pool_patients_per_class or pool_per_class, sites=pool_sites if by_site else None)

    all_series = list(dict.fromkeys(key[0] for key in cells))
    backbones = [list(dict.fromkeys(key[1] for key in cells if key[0] == series)) for series in all_series]
    budgets = sorted({key[2] for key in cells}, key=in_budget_order)
    draws = sorted({key[3] for key in cells})
    shape = (len(budgets), len(draws))
    values = {name: [np.full((len(seeds), *shape), np.nan) for seeds in backbones] for name in wanted}
    with_others = {
        name: [np.full((num_resamples, len(seeds), *shape), np.nan, dtype=np.float32) for seeds in backbones]
        for name in wanted
    }
    alike: list[list[float]] = [[] for _ in all_series]
    alike_sites: list[list[float]] = [[] for _ in all_series]
    weights_RU = drawn_weights(stratum_U, num_resamples, np.random.default_rng(seed))
    for (key, backbone, its_budget, its_draw), rows in cells.items():
        s = all_series.index(key)
        m, b, d = backbones[s].index(backbone), budgets.index(its_budget), draws.index(its_draw)
        shares_NK = unit_rows(np.array([row.probabilities for row in rows], dtype=np.float64))
        alike[s].append(common_share(shares_NK, truth_N, patient_N))
        alike_sites[s].append(common_share(shares_NK, truth_N, site_N) if by_site else 0.0)
        scores = metrics(labels, shares_NK, names, wanted)
        resampled = resampled_metrics(truth_N, shares_NK, unit_N, weights_RU, wanted)
        for name in wanted:
            values[name][s][m, b, d] = scores[name]
            with_others[name][s][:, m, b, d] = resampled[name]

    return Measured(
        classes=names,
        series=all_series,
        budgets=budgets,
        slides=np.array([_slides_at(budget, budgets, pool) for budget in budgets]),
        draws=draws,
        pool=pool,
        patients_per_class={name: len(np.unique(patient_N[truth_N == number])) for number, name in enumerate(names)},
        num_patients=len(patients),
        num_strata=len(np.unique(stratum_U)),
        num_tested=len(slides),
        sites_per_class={
            name: len(np.unique(site_N[truth_N == number])) for number, name in enumerate(names) if by_site
        },
        num_sites=len(sites) if by_site else 0,
        worth_sites=worth_sites,
        values_SBD={name: np.stack([_nanmean(one, 0) for one in values[name]]) for name in wanted},
        resampled_RSBD={
            name: np.stack([_nanmean(one, 1) for one in with_others[name]], 1).astype(np.float32) for name in wanted
        },
        backbones=backbones,
        seeds_SMBD=values,
        resampled_seeds_SRMB={
            name: [_nanmean(one, -1).astype(np.float32) for one in with_others[name]] for name in wanted
        },
        alike_S=_shares(alike),
        alike_sites_S=_shares(alike_sites),
    )


def _shares(found: Sequence[Sequence[float]]) -> Floats:
    return np.array([min(1.0, max(0.0, float(np.mean(one)))) for one in found])


def worth_of_sizes(site_of_each: Sequence[object]) -> float:
    """How many sites of one size would average out as well as these: Kish's (sum n)^2 / sum n^2 of their patients."""
    sizes = np.array(list(Counter(site_of_each).values()), dtype=np.float64)
    return float(sizes.sum() ** 2 / (sizes**2).sum())


def _slides_at(budget: Budget, budgets: Sequence[Budget], pool: Pool) -> float:
    if not isinstance(budget, str):
        return float(budget)
    largest = max((float(other) for other in budgets if not isinstance(other, str)), default=1.0)
    # Unknown pools put "all" one doubling to the right of the last budget: a place to draw it, not a claim.
    return max(pool.slides * pool.kept, largest) if pool.slides else 2 * largest


def _stratum_of(
    truth_N: NDArray[np.int64], patient_N: NDArray[np.intp], num_patients: int, num_classes: int
) -> NDArray[np.int64]:
    """Each patient's class; the most frequent one where a patient has regions of several."""
    counts_PK = np.zeros((num_patients, num_classes), dtype=np.int64)
    np.add.at(counts_PK, (patient_N, truth_N), 1)
    most: NDArray[np.int64] = counts_PK.argmax(1)
    return most


def common_share(shares_NK: Floats, truth_N: NDArray[np.int64], patient_N: NDArray[np.intp]) -> float:
    """How alike what is said of one patient's (or site's) items is: the intraclass correlation of log-odds, in classes.

    By analysis of variance, summed over the classes' log-odds; may come out below 0. 1 where nobody has two items.
    """
    _, own_N = np.unique(truth_N * (patient_N.max() + 1) + patient_N, return_inverse=True)
    logs_NK = np.log(np.clip(shares_NK, SMALLEST_SHARE, 1))
    logs_NK = logs_NK - logs_NK.mean(1, keepdims=True)

    def means(group_N: NDArray[np.int64]) -> tuple[Floats, Floats]:
        count = np.bincount(group_N).astype(np.float64)
        total = np.stack([np.bincount(group_N, column) for column in logs_NK.T], 1)
        return (total / np.maximum(count, 1)[:, None])[group_N], count

    of_class_NK, class_sizes = means(truth_N)
    of_patient_NK, sizes = means(own_N)
    df_between = len(sizes) - int((class_sizes > 0).sum())
    df_within = len(truth_N) - len(sizes)
    if df_between < 1 or df_within < 1:
        return 1.0
    within = float(((logs_NK - of_patient_NK) ** 2).sum()) / df_within
    between = float(((of_patient_NK - of_class_NK) ** 2).sum()) / df_between
    # The size that unequal groups are worth (Searle 1971).
    class_of = np.zeros(len(sizes), dtype=np.int64)
    class_of[own_N] = truth_N
    squares = float((sizes**2 / class_sizes[class_of]).sum())
    size = (len(truth_N) - squares) / df_between
    common = (between - within) / size
    return common / (common + within) if common + within > 0 else 1.0


# ---- what varies


@dataclass(frozen=True)
class Estimate:
    """A contrast of scores, the parts of its variance, and Satterthwaite's degrees of freedom for their sum."""

    value: float
    patients_variance: float
    labelling_variance: float
    df: float
    seeds_variance: float = 0.0
    worth: float = 1.0  # how many independent items a patient's tested items are worth
    least_variance: float = 0.0  # of the steps that scores move in

    @property
    def variance(self) -> float:
        return self.patients_variance + self.labelling_variance + self.seeds_variance + self.least_variance


def estimate(measured: Measured, metric: str, weights_SB: Floats, least_variance: float = 0.0) -> Estimate:
    """The contrast sum(weights * scores), its variance and degrees of freedom. nan where a weighted cell is missing.

    `least_variance` comes on top, known as well as the patients' is: where all else is rounding, it gives the degrees.
    """
    used = np.argwhere(weights_SB != 0)
    values_SBD, resampled_RSBD = measured.values_SBD[metric], measured.resampled_RSBD[metric]
    value = 0.0
    labelling_D, own_D = np.zeros((2, len(measured.draws)))
    labelling_RD, own_RD = np.zeros((2, resampled_RSBD.shape[0], len(measured.draws)))
    for s, b in used:
        weight = weights_SB[s, b]
        value += float(weight * _nanmean(values_SBD[s, b], -1))
        own_D += weight * values_SBD[s, b]
        own_RD += weight * resampled_RSBD[:, s, b]
        source, scale = labelling_source(measured, metric, int(s), int(b))
        if source is not None:
            labelling_D += weight * scale * values_SBD[s, source]
            labelling_RD += weight * scale * resampled_RSBD[:, s, source]
    patients_variance = _patients_variance(measured, metric, weights_SB)
    by_pool, num_draws = _between_draws(labelling_D, labelling_RD)
    # Where a smaller budget stands in, these very draws may differ by more than it says: that is seen, so it counts.
    by_draws, _ = _between_draws(own_D, own_RD)
    owed_at_least = _mean_alone(own_D) - patients_variance
    labelling_variance = max(by_pool, by_draws / len(own_D), owed_at_least)
    parts: list[tuple[float, float]] = [
        (patients_variance + least_variance, measured.df_drawn),
        (labelling_variance, max(1, num_draws - 1)),
    ]
    seeds: list[float] = [_seeds_variance(measured, metric, s, weights_SB[s]) for s in range(len(measured.series))]
    parts += [(variance, len(names) - 1) for variance, names in zip(seeds, measured.backbones, strict=True) if variance]
    total = sum(variance for variance, _ in parts)
    squared = sum(variance**2 / num for variance, num in parts)
    df = float(total**2 / squared) if squared > 0 else measured.df_drawn
    worth = _worth(measured, sorted(set(used[:, 0].tolist())))
    return Estimate(value, patients_variance, labelling_variance, df, sum(seeds), worth, least_variance)


def _between_draws(contrast_D: Floats, owed_RD: Floats) -> tuple[float, int]:
    """Variance of a contrast between draws, less what a draw owes to its finite test set; and of how many draws."""
    seen_D = np.isfinite(contrast_D) & np.isfinite(owed_RD).all(0)
    if seen_D.sum() < 2:
        return 0.0, int(seen_D.sum())
    return max(0.0, float(contrast_D[seen_D].var(ddof=1)) - _overlap(owed_RD[:, seen_D])), int(seen_D.sum())


def _mean_alone(contrast_D: Floats) -> float:
    """How much the mean of the draws varies were there nothing else: no estimate of the whole may be less than that.

    With few patients it may be: the parts are told apart by covariances between draws, which may come out negative.
    """
    seen = contrast_D[np.isfinite(contrast_D)]
    return float(seen.var(ddof=1)) / len(seen) if len(seen) > 1 else 0.0


def _worth(measured: Measured, series: Sequence[int]) -> float:
    """How many independent items the tested items of a patient are worth; fewer than one where sites are alike."""
    patients = sum(measured.patients_per_class.values())
    each = measured.num_tested / patients
    worth = each / (1 + (each - 1) * float(measured.alike_S[series].max(initial=0.0)))
    if not measured.num_sites:
        return worth
    at_a_site = patients / sum(measured.sites_per_class.values())
    return worth / (1 + (at_a_site * worth - 1) * float(measured.alike_sites_S[series].max(initial=0.0)))


def _seeds_variance(measured: Measured, metric: str, s: int, weights_B: Floats) -> float:
    """Of a contrast's share in series `s`: how much it would differ with other pretraining seeds."""
    used = np.flatnonzero(weights_B)
    num = len(measured.backbones[s])
    if num < 2 or not len(used):
        return 0.0
    contrast_M = measured.seed_curves_MB(metric, s)[:, used] @ weights_B[used]
    owed_RM = measured.resampled_seeds_SRMB[metric][s][:, :, used] @ weights_B[used]
    return max(0.0, float(contrast_M.var(ddof=1)) - _overlap(owed_RM)) / num


def _overlap(owed_RX: NDArray[np.floating]) -> float:
    """How much X results on the same test patients differ by those patients' luck alone, as a variance between them."""
    num = int(owed_RX.shape[1])
    alone = float(owed_RX.var(0, ddof=1, dtype=np.float64).mean())
    together = float(owed_RX.mean(1, dtype=np.float64).var(ddof=1))
    return max(0.0, alone - together) * num / (num - 1)


def _patients_variance(measured: Measured, metric: str, weights_SB: Floats) -> float:
    """Of a contrast, from what patients do in both of their uses and from their luck with single draws."""
    resampled_RSBD = measured.resampled_RSBD[metric]
    mean_R = np.zeros(len(resampled_RSBD))
    owed_RD = single_RD = np.zeros((len(resampled_RSBD), len(measured.draws)))
    for s, b in np.argwhere(weights_SB != 0):
        own_RD = weights_SB[s, b] * resampled_RSBD[:, s, b].astype(np.float64)
        uses = np.sqrt(measured.pool.patients_factor(measured.slides[b]))
        mean_R += uses * _nanmean(own_RD, -1)
        owed_RD, single_RD = owed_RD + uses * own_RD, single_RD + own_RD
    whole = float(mean_R.var(ddof=1))
    seen_D = np.isfinite(owed_RD).all(0)
    num_draws = int(seen_D.sum())
    if not measured.pool.num_folds or num_draws < 2:
        return whole
    with_uses, once = (_overlap(one_RD[:, seen_D]) / num_draws for one_RD in (owed_RD, single_RD))
    return max(0.0, whole - with_uses) + once


def labelling_source(measured: Measured, metric: str, s: int, b: int) -> tuple[int | None, float]:
    """Which budget's draws tell how much budget b varies with the labelled slides, and the factor on their deviations.

    Its own, while draws differ among themselves at least as much as pools do; else the largest smaller budget's.
    """
    pool, alike = measured.pool, (float(measured.alike_S[s]), float(measured.alike_sites_S[s]))
    if pool.num_folds:
        num_draws = int(np.isfinite(measured.values_SBD[metric][s, b]).sum())
        return (b, num_draws**-0.5) if num_draws > 1 else (None, 0.0)
    draws_B = np.isfinite(measured.values_SBD[metric][s]).sum(1)
    floor = pool.floor(*alike)
    spread_B = np.array([pool.spread(slides, *alike) for slides in measured.slides])
    fit = np.flatnonzero((draws_B[: b + 1] > 1) & (floor <= TOO_ALIKE * spread_B[: b + 1] * (1 + 1e-9)))
    if not len(fit):
        if draws_B[b] < 2:
            return None, 0.0
        return b, float(draws_B[b]) ** -0.5
    here = floor + spread_B[b] / max(1, draws_B[b])
    return int(fit[-1]), float(np.sqrt(here / spread_B[fit[-1]]))


def _nanmean(values: NDArray[np.floating], axis: int) -> Floats:
    """Mean over what is there, nan where nothing is, without a warning."""
    there = np.isfinite(values)
    count = there.sum(axis)
    total = np.where(there, values, 0).sum(axis, dtype=np.float64)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
