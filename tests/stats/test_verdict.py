"""What is said about a curve is true of the archives it is said about: known truths, simulated many times over."""

import math
from dataclasses import replace

import numpy as np
import pytest
from simulated import Archive, _order, predictions_of, true_balanced_accuracy

from histossl.core.errors import StoreError
from histossl.stats import bootstrap
from histossl.stats import verdict as curves
from histossl.stats.draw_variance import Pool
from histossl.stats.labels_saved import first_crossing
from histossl.stats.verdict import (
    Point,
    Prediction,
    SummaryRow,
    area,
    compare,
    holm,
    labels_saved,
    measure,
    points_from,
    summarise,
    verdict,
    wilson,
)

# ---- the files


def test_tables_come_back_as_they_were(tmp_path):
    points = [Point("imagenet", "mean", 4, 0, None, "auroc", 1 / 3), Point("a,b", "mean", "all", 1, 2, "f1", math.pi)]
    curves.write_points(tmp_path / "points.csv", points)
    assert curves.read_points(tmp_path / "points.csv") == points
    rows = [
        Prediction("adapted", "mean", 1, 0, 3, 'A "1"', "P1", "x", "y", (0.1, 1 / 7, 0.7)),
        Prediction("adapted", "mean", "all", 0, None, "B\nb", "P2", "y", "y", (1e-300, 0.5, 0.25)),
    ]
    curves.write_predictions(tmp_path / "predictions.csv", rows, ["x", "y", "ä,z"])
    assert curves.read_predictions(tmp_path / "predictions.csv") == (rows, ["x", "y", "ä,z"])
    summary = [SummaryRow("random", "mean", "all", "auroc", 0.5, 0.4, 0.6, 10, 33)]
    curves.write_summary(tmp_path / "summary.csv", summary)
    assert curves.read_summary(tmp_path / "summary.csv") == summary
    header = (tmp_path / "predictions.csv").read_text(encoding="utf-8").splitlines()[0]
    assert header == 'start,backbone,head,budget,draw,fold,slide,patient,site,label,predicted,p_x,p_y,"p_ä,z"'


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("start,head,budget,draw,fold,metric\n", "value"),
        ("start,head,budget,draw,fold,metric,value\na,b,1,0,,auroc,0.5\na,b,1,0,,auroc,half\n", "line 3"),
        ("start,head,budget,draw,fold,metric,value\na,b,1,0,,auroc\n", "line 2"),
    ],
)
def test_a_damaged_table_is_named_with_its_line(tmp_path, text, word):
    (tmp_path / "points.csv").write_text(text)
    with pytest.raises(StoreError, match=word):
        curves.read_points(tmp_path / "points.csv")


def test_a_missing_table_is_one_clear_line(tmp_path):
    with pytest.raises(StoreError, match="finetune"):
        curves.read_predictions(tmp_path / "none.csv")


# ---- closed forms


def test_wilson_is_the_textbook_interval():
    assert wilson(1.0, 20, 1.96) == pytest.approx((20 / (20 + 1.96**2), 1))
    assert wilson(0.5, 100, 1.96) == pytest.approx((0.4038, 0.5962), abs=1e-4)


def test_holm_is_the_textbook_correction():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])


def test_a_score_is_reached_on_the_log_axis_between_budgets():
    x = np.log2([1.0, 2, 4, 8])
    curve = np.array([0.5, 0.6, 0.7, 0.9])
    assert 2 ** first_crossing(x, curve, 0.7) == pytest.approx(4)
    assert 2 ** first_crossing(x, curve, 0.65) == pytest.approx(2 * 2**0.5)
    assert 2 ** first_crossing(x, curve, 0.4) == pytest.approx(1)
    assert first_crossing(x, curve, 0.91) == np.inf
    flat = np.array([0.5, 0.7, 0.7, 0.7])
    assert 2 ** first_crossing(x, flat, 0.7) == pytest.approx(2)  # the first place, not the last


def test_area_is_the_mean_height_over_log2():
    weights = curves.area_weights(np.array([1.0, 2, 4, 8]), np.array([True] * 4))
    assert weights == pytest.approx([1 / 6, 1 / 3, 1 / 3, 1 / 6])
    assert curves.area_weights(np.array([1.0, 2, 8]), np.array([True, False, True])) == pytest.approx([0.5, 0, 0.5])


def fixed_scores(adapted, imagenet, budgets=(1, 2, 4, 8), per_class=40):
    """Predictions whose balanced accuracy at each budget is exactly the given one, the same in every draw."""
    rows = []
    for start, scores in (("adapted", adapted), ("imagenet", imagenet)):
        for budget, score in zip(budgets, scores, strict=True):
            right = round(score * per_class)
            for draw in range(3):
                for number in range(2 * per_class):
                    label, other = ("a", "b") if number < per_class else ("b", "a")
                    called = label if number % per_class < right else other
                    shares = (0.9, 0.1) if called == "a" else (0.1, 0.9)
                    rows.append(
                        Prediction(start, "mean", budget, draw, None, f"s{number}", f"p{number}", label, called, shares)
                    )
    return rows


def test_labels_saved_of_a_curve_moved_left_by_a_factor_of_two():
    rows = fixed_scores((0.7, 0.8, 0.9, 1.0), (0.6, 0.7, 0.8, 0.9))
    saved = labels_saved(measure(rows, ["a", "b"], 30), "balanced_accuracy", "adapted", "imagenet")
    assert [row.slides for row in saved[1:]] == pytest.approx([1, 2, 4])
    assert [row.factor for row in saved[1:]] == pytest.approx([2, 2, 2])
    assert saved[0].at_most
    assert saved[1].at_most  # reaches it at its very first budget: fewer might do
    assert not saved[2].at_most
    for row in saved[2:]:
        assert row.low <= row.slides <= (row.high or math.inf)


def test_a_score_that_is_never_reached_is_said_so():
    rows = fixed_scores((0.6, 0.65, 0.7, 0.75), (0.7, 0.8, 0.9, 1.0))
    saved = labels_saved(measure(rows, ["a", "b"], 30), "balanced_accuracy", "adapted", "imagenet")
    assert saved[0].slides == pytest.approx(4)
    assert [row.slides for row in saved[1:]] == [None] * 3
    assert [row.factor for row in saved[1:]] == [None] * 3
    assert all(row.high is None for row in saved[1:])


@pytest.mark.parametrize("per_class", [2, 5, 40])
def test_labels_saved_are_no_surer_than_the_scores(per_class):
    """Every draw of both starts scores the same: resamples would say "4 to 4" of any number of patients."""
    scores = (0.5, 0.8, 1.0, 1.0)
    measured = measure(fixed_scores(scores, scores, per_class=per_class), ["a", "b"], 30)
    by_budget = compare(measured, "balanced_accuracy", "adapted", "imagenet").budgets
    saved = labels_saved(measured, "balanced_accuracy", "adapted", "imagenet")
    for difference, row in zip(by_budget, saved, strict=True):
        assert difference.low < 0 < difference.high
        assert row.low <= row.reference_slides
        assert row.high is None or row.high > row.slides
    assert saved[-1].high is None  # with all there are the adapted start may still be lower
    assert (saved[-1].low <= 2) == (per_class < 40)  # of five patients a class 0.8 and 1.0 are not told apart


def test_nothing_is_saved_against_a_reference_at_chance():
    rows = fixed_scores((0.8, 0.8, 0.8, 0.8), (0.5, 0.5, 0.5, 0.9))
    saved = labels_saved(measure(rows, ["a", "b"], 30), "balanced_accuracy", "adapted", "imagenet")
    assert [bool(row.reason) for row in saved] == [True, True, True, False]


# ---- what is estimated


def test_points_and_summary_are_scikit_learns_means():
    archive = Archive(patients_per_class=6, budgets=(1, "all"), num_draws=3)
    rows = predictions_of(archive, np.random.default_rng(0))
    measured = measure(rows, archive.classes)
    points = points_from(measured)
    summary = summarise(measured)
    assert len(points) == 2 * 2 * 3 * 5
    assert len(summary) == 2 * 2 * 5
    for row in summary:
        its = [p.value for p in points if (p.start, p.budget, p.metric) == (row.start, row.budget, row.metric)]
        assert row.mean == pytest.approx(np.mean(its))
        assert row.low <= row.mean <= row.high
        assert (row.num_draws, row.num_patients) == (3, 18)
    assert measured.slides[-1] == pytest.approx(6 * 0.8)  # "all" of what the folds leave for training


def test_another_start_changes_nothing_about_the_others():
    archive = Archive(patients_per_class=6, budgets=(1, 4), num_draws=3)
    rows = predictions_of(archive, np.random.default_rng(0))
    renamed = [replace(row, start="third") for row in rows if row.start == "adapted"]
    alone = summarise(measure(rows, archive.classes))
    beside = summarise(measure(renamed + rows, archive.classes))
    assert alone == [row for row in beside if row.start != "third"]


def test_the_order_of_the_rows_does_not_matter():
    archive = Archive(patients_per_class=5, budgets=(1, 2), num_draws=2)
    rows = predictions_of(archive, np.random.default_rng(0))
    shuffled = [rows[i] for i in np.random.default_rng(1).permutation(len(rows))]
    first, second = (
        {(row.start, row.budget, row.metric): row for row in summarise(measure(given, archive.classes))}
        for given in (rows, shuffled)
    )
    assert first == second


def test_starts_tested_on_other_slides_are_refused():
    rows = predictions_of(Archive(patients_per_class=4, budgets=(1,), num_draws=2), np.random.default_rng(0))
    with pytest.raises(StoreError, match="other slides"):
        measure(rows[1:], ["normal", "adenoma", "carcinoma"])


def test_perfect_scores_keep_an_honest_interval():
    """20 of 20 patients right is not certainty: the lower end is what Wilson's interval says of 20."""
    measured = measure(fixed_scores((1.0,), (1.0,), (1,), per_class=10), ["a", "b"], 50)
    row = next(row for row in summarise(measured) if row.metric == "balanced_accuracy")
    assert row.high == 1
    assert 0.7 < row.low < 0.9


def test_no_interval_leaves_the_range_of_its_metric():
    """Four patients: intervals are as wide as they get, and none says more than all."""
    archive = Archive(patients_per_class=2, budgets=(1,), num_draws=2)
    for row in summarise(measure(predictions_of(archive, np.random.default_rng(0)), archive.classes)):
        most = math.inf if row.metric == "log_loss" else 1.0
        assert 0 <= row.low <= row.mean <= row.high <= most, row


def test_slides_of_one_patient_do_not_count_as_patients():
    """Five copies of every slide: the same interval, not one narrower by the root of five."""
    archive = Archive(patients_per_class=10, budgets=(2,), num_draws=4)
    rows = predictions_of(archive, np.random.default_rng(0))
    copies = [replace(row, slide=f"{row.slide}-{number}") for row in rows for number in range(5)]
    once, five = (
        next(r for r in summarise(measure(given, archive.classes)) if r.metric == "balanced_accuracy")
        for given in (rows, copies)
    )
    assert five.mean == pytest.approx(once.mean)
    assert five.high - five.low == pytest.approx(once.high - once.low, rel=0.02)


def test_more_draws_of_a_small_pool_do_not_narrow_the_interval_to_nothing():
    """With half the pool labelled, a draw repeats the others: the pool's own luck stays."""
    pool = Pool(16, 16)
    assert pool.floor() / pool.spread(8) == pytest.approx(1)  # f / (1 - f) at f = 1/2
    assert Pool(1000, 1000).floor() / Pool(1000, 1000).spread(1) == pytest.approx(0.001, rel=0.01)


def regions_of_every_class(patients=16, only_in_one=()):
    """Each patient has a region of each class, all found but for one start's misses; some classes in one patient."""
    classes = ["normal", "stroma", "tumour"]
    rows = []
    for start in ("adapted", "imagenet"):
        for draw in range(3):
            for patient in range(patients):
                for k, label in enumerate(classes):
                    if label in only_in_one and patient:
                        continue
                    shares = tuple(0.9 if j == k else 0.05 for j in range(3))
                    rows.append(
                        Prediction(start, "mean", 1, draw, None, f"s{patient}#{k}", f"p{patient}", label, label, shares)
                    )
    return rows, classes


def test_a_patient_with_regions_of_every_class_counts_in_every_class():
    """Strata of the bootstrap put a patient into one class; what is told does not."""
    rows, classes = regions_of_every_class()
    measured = measure(rows, classes, 30)
    assert measured.patients_per_class == {"normal": 16, "stroma": 16, "tumour": 16}
    assert measured.num_patients == 16
    found = verdict(measured, metric="balanced_accuracy", unit="region")
    assert "16 tested patients; 16 of each class" in found.limits[0]
    saved = labels_saved(measured, "balanced_accuracy", "adapted", "imagenet")
    assert not saved[0].reason  # a score of 1.0 is above the chance of three classes
    low = next(row.low for row in summarise(measured) if row.metric == "balanced_accuracy")
    assert low == pytest.approx(wilson(1.0, 16, 2.13)[0], abs=0.01)  # 16 patients' worth, not 48


def test_a_class_that_lives_in_one_patient_gives_no_verdict():
    rows, classes = regions_of_every_class(only_in_one=("stroma",))
    found = verdict(measure(rows, classes, 30), unit="region")
    assert found.outcome == "too few patients"
    assert "class stroma has one" in found.headline


@pytest.mark.parametrize("alike", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("budget", [3, 8, 40])
def test_what_draws_share_and_where_they_differ_is_that_of_labels_taken_by_turns(alike, budget):
    """5 patients of 12 items: the variance of a mean of `budget` of them, between draws of a pool and between pools."""
    rng = np.random.default_rng(0)
    between, means = [], []
    for _ in range(700):
        items = np.sqrt(alike) * rng.standard_normal((5, 1)) + np.sqrt(1 - alike) * rng.standard_normal((5, 12))
        draws = [items.reshape(-1)[_order(np.arange(5), 12, rng)[:budget]].mean() for _ in range(4)]
        between.append(np.var(draws, ddof=1))
        means.append(np.mean(draws))
    pool = Pool(60, 5)
    assert np.mean(between) == pytest.approx(pool.spread(budget, alike), rel=0.1, abs=1e-4)
    assert np.var(means) == pytest.approx(pool.floor(alike) + pool.spread(budget, alike) / 4, rel=0.2)


@pytest.mark.parametrize("budget", [2, 8, 24])
def test_patients_of_one_site_are_part_of_what_draws_share(budget):
    """6 sites of 4 patients, half of the variance their sites': a mean of `budget`, between draws and between pools."""
    rng = np.random.default_rng(0)
    between, means = [], []
    for _ in range(1500):
        items = np.sqrt(0.5) * rng.standard_normal((6, 1)) + np.sqrt(0.5) * rng.standard_normal((6, 4))
        draws = [rng.permutation(items.reshape(-1))[:budget].mean() for _ in range(4)]
        between.append(np.var(draws, ddof=1))
        means.append(np.mean(draws))
    pool = Pool(24, 24, sites=6)
    assert np.mean(between) == pytest.approx(pool.spread(budget, 1.0, 0.5), rel=0.1, abs=1e-4)
    assert np.var(means) == pytest.approx(pool.floor(1.0, 0.5) + pool.spread(budget, 1.0, 0.5) / 4, rel=0.15)


@pytest.mark.parametrize("share", [0.1, 0.6])
def test_how_alike_a_patients_items_are_is_read_off_the_predictions(share):
    archive = Archive(
        patients_per_class=5, test_patients_per_class=60, slides_per_patient=8, patient_share=share, budgets=(40,),
        num_draws=1,
    )  # fmt: skip
    measured = measure(predictions_of(archive, np.random.default_rng(0)), archive.classes, 40, 5, ("auroc",), 2)
    assert measured.alike_S == pytest.approx([share, share], abs=0.08)
    alone = replace(archive, slides_per_patient=1, budgets=(4,))
    assert measure(predictions_of(alone, np.random.default_rng(0)), archive.classes, 5, 5).alike_S.tolist() == [1, 1]


def test_many_tiles_of_few_patients_are_worth_more_than_the_patients_and_less_than_the_tiles():
    """All right on 10 patients with 10 tiles each: Wilson's n is 10 to 100, as the tiles of a patient agree."""
    rng = np.random.default_rng(0)

    def low(share):
        rows = []
        for patient in range(10):
            luck = rng.standard_normal()
            for tile in range(10):
                shift = np.sqrt(share) * luck + np.sqrt(1 - share) * rng.standard_normal()
                right = 1 / (1 + np.exp(-4 - 0.5 * shift))
                label = "ab"[patient % 2]
                shares = (right, 1 - right) if label == "a" else (1 - right, right)
                rows.append(
                    Prediction(
                        "imagenet", "mean", 1, 0, None, f"s{patient}@{tile}", f"p{patient}", label, label, shares
                    )
                )
        measured = measure(rows, ["a", "b"], 40, 4)
        return next(row.low for row in summarise(measured) if row.metric == "balanced_accuracy")

    apart, together = low(0.0), low(1.0)
    assert wilson(1.0, 10, 2.31)[0] - 0.03 < together < wilson(1.0, 14, 2.31)[0]
    assert wilson(1.0, 60, 2.31)[0] < apart <= wilson(1.0, 100, 2.31)[0] + 0.01


# ---- sites


def found_or_missed_by_site(patients_per_site, sites=10):
    """Every second site is told wrong throughout: however many patients these are, they are so many sites' evidence."""
    rows = []
    for start in ("adapted", "imagenet"):
        for draw in range(3):
            for patient in range(sites * patients_per_site):
                site, label, other = patient % sites, *("ab" if patient // sites % 2 else "ba")
                called = other if site % 2 else label
                shares = (0.9, 0.1) if called == "a" else (0.1, 0.9)
                rows.append(
                    Prediction(
                        start,
                        "mean",
                        1,
                        draw,
                        None,
                        f"s{patient}",
                        f"p{patient}",
                        label,
                        called,
                        shares,
                        "",
                        f"at{site}",
                    )
                )
    return rows


def test_with_sites_left_out_sites_are_drawn_and_more_patients_of_them_tell_no_more():
    few, many, unknown = (
        next(row for row in summarise(measure(rows, ["a", "b"])) if row.metric == "balanced_accuracy")
        for rows in (
            found_or_missed_by_site(4),
            found_or_missed_by_site(20),
            [replace(row, site="") for row in found_or_missed_by_site(20)],
        )
    )
    assert few.mean == many.mean == 0.5
    assert many.high - many.low == pytest.approx(few.high - few.low, rel=0.1)
    assert (
        2 * 2.26 * np.sqrt(0.25 / 9) * 0.75 < many.high - many.low < 2 * 2.26 * np.sqrt(0.25 / 9)
    )  # Wilson's is shorter
    assert unknown.high - unknown.low < 0.3 * (many.high - many.low)


def test_sites_of_unequal_size_are_worth_fewer():
    assert bootstrap.worth_of_sizes(["a", "a", "b", "b", "c", "c"]) == 3
    assert bootstrap.worth_of_sizes(["a"] * 8 + ["b", "c"]) == pytest.approx(100 / 66)
    measured = measure(found_or_missed_by_site(4), ["a", "b"], 30)
    assert (measured.num_sites, measured.worth_sites, measured.df_drawn) == (10, 10, 9)
    assert measured.sites_per_class == {"a": 10, "b": 10}


def test_the_verdict_says_how_many_sites_it_rests_on_and_asks_for_eight():
    said = verdict(measure(found_or_missed_by_site(4), ["a", "b"], 30))
    assert said.outcome == "no measurable difference"
    assert "10 tested sites with 40 patients; 10 with each class" in said.limits[0]
    assert "with 10 sites, a difference" in said.sentences[-1]
    few = verdict(measure(found_or_missed_by_site(8, sites=7), ["a", "b"], 30))
    assert few.outcome == "too few sites"
    assert few.headline == "Too few sites to say whether adaptation helped: 7 were tested."
    only_there = [row for row in found_or_missed_by_site(4, sites=8) if row.label == "a" or row.site == "at3"]
    assert "8 were tested, and class b has one" in verdict(measure(only_there, ["a", "b"], 30)).headline


# ---- the verdict


def test_identical_starts_make_no_difference():
    archive = Archive(separation={"imagenet": 1.5}, budgets=(1, 2, 4), num_draws=4)
    rows = predictions_of(archive, np.random.default_rng(0))
    both = rows + [replace(row, start="adapted") for row in rows]
    measured = measure(both, archive.classes)
    found = compare(measured, "auroc", "adapted", "imagenet")
    assert found.area.value == pytest.approx(0, abs=1e-12)
    assert found.area.p == pytest.approx(1)
    assert verdict(measured).outcome == "no measurable difference"
    # Half a slide of 36 is the least that counts; rounding decides nothing about how well that is known.
    assert [row.high for row in (*found.budgets, found.area)] == pytest.approx([0.5 / 36 * 2.03] * 4, rel=0.01)


def test_a_big_effect_is_found_and_told():
    archive = Archive(separation={"imagenet": 1.0, "adapted": 2.6}, budgets=(1, 2, 4, 8), num_draws=6)
    measured = measure(predictions_of(archive, np.random.default_rng(0)), archive.classes)
    found = verdict(measured)
    assert found.outcome == "helped"
    assert found.headline.startswith("Adaptation helped: AUROC +0.")
    assert found.headline.endswith(
        ") against the ImageNet start, on average over budgets from 1 to 8 labelled slides per class."
    )
    assert "the adapted start reaches what the ImageNet start reaches" in found.sentences[-1]
    assert "36 tested patients" in found.limits[0]
    turned = verdict(measured, adapted="imagenet", reference="adapted")
    assert turned.outcome == "hurt"
    assert turned.comparison.area.value == pytest.approx(-found.comparison.area.value)


def test_a_difference_between_one_in_twenty_and_one_in_fifty_is_a_hint():
    """The headline's interval leaves out zero, so the headline must not read as if it did not; nor is it a verdict."""
    archive = Archive(separation={"imagenet": 1.3, "adapted": 1.9}, budgets=(1, 2, 4, 8), num_draws=4)
    for seed in range(200):
        measured = measure(predictions_of(archive, np.random.default_rng(seed)), archive.classes, wanted=("auroc",))
        if curves.VERDICT_P < compare(measured, "auroc", "adapted", "imagenet").area.p < 0.05:
            break
    found = verdict(measured)
    assert found.outcome == "no measurable difference"
    assert found.headline.startswith("A hint, but no proof, that adaptation helped: AUROC +0.")
    assert found.comparison.area.low > 0
    assert "a verdict asks for one in 50" in found.sentences[0]
    assert found.sentences[1].startswith("With 36 patients")


def test_the_headline_names_what_it_is_measured_against_and_where():
    archive = Archive(separation={"random": 1.0, "adapted": 1.0}, budgets=(2, "all"), num_draws=4)
    rows = predictions_of(archive, np.random.default_rng(0))
    measured = measure(rows, archive.classes, pool_per_class=9.6, pool_patients_per_class=9.6)
    assert verdict(measured, reference="random").headline.endswith(
        ") against the random start, on average over budgets from 2 to all (about 9.6) labelled slides per class."
    )
    one = measure([row for row in rows if row.budget == 2], archive.classes)
    assert verdict(one, reference="random").headline.endswith(", at a budget of 2 labelled slides per class.")


def test_a_difference_of_scores_does_not_leave_its_range():
    archive = Archive(patients_per_class=2, budgets=(1,), num_draws=2, num_folds=2)
    for seed in range(10):
        measured = measure(predictions_of(archive, np.random.default_rng(seed)), archive.classes)
        for metric in ("auroc", "balanced_accuracy", "f1", "calibration_error"):
            found = compare(measured, metric, "adapted", "imagenet").area
            assert -1 <= found.low <= found.value <= found.high <= 1


def test_random_weights_that_do_as_well_are_told():
    archive = Archive(separation={"imagenet": 0.8, "adapted": 1.5, "random": 2.5}, budgets=(1, 4), num_draws=4)
    said = " ".join(verdict(measure(predictions_of(archive, np.random.default_rng(0)), archive.classes)).limits)
    assert "The adapted start is not clearly above random weights (−" in said  # noqa: RUF001
    archive = replace(archive, separation={"imagenet": 0.8, "adapted": 2.5, "random": 0.5})
    said = " ".join(verdict(measure(predictions_of(archive, np.random.default_rng(0)), archive.classes)).limits)
    assert "random weights" not in said


def test_no_variance_is_less_than_the_draws_seen_vary_by_themselves():
    """Draws of many alike tiles are told by those of one tile. Where these happen to agree, the others still differ."""
    archive = Archive(
        patients_per_class=5, test_patients_per_class=2, slides_per_patient=8, budgets=(1, 5, 20), num_draws=4
    )
    rows = predictions_of(archive, np.random.default_rng(0))
    first = {(row.start, row.slide): row.probabilities for row in rows if (row.budget, row.draw) == (1, 0)}
    rows = [replace(row, probabilities=first[row.start, row.slide]) if row.budget == 1 else row for row in rows]
    measured = measure(rows, archive.classes, 40, 5, wanted=("auroc",))
    weights_SB = np.outer([1, -1], curves.area_weights(measured.slides, np.ones(3, dtype=bool)))
    draws = np.einsum("sb,sbd->d", weights_SB, measured.values_SBD["auroc"])
    found = bootstrap.estimate(measured, "auroc", weights_SB)
    assert found.variance >= draws.var(ddof=1) / len(draws) * (1 - 1e-9)
    assert found.labelling_variance > 0


def test_a_start_level_with_the_colour_floor_is_said_to_be():
    archive = Archive(separation={"imagenet": 1.0, "adapted": 1.5}, budgets=(1, 4), num_draws=4)
    rows = predictions_of(archive, np.random.default_rng(0))
    rows += [replace(row, start="colour") for row in rows if row.start == "adapted"]
    limits = verdict(measure(rows, archive.classes)).limits
    assert any("The adapted start is level with the colour floor (0.00" in limit for limit in limits)


def test_log_loss_is_better_when_it_is_lower():
    archive = Archive(separation={"imagenet": 1.0, "adapted": 2.6}, budgets=(2, 4, 8), num_draws=6)
    measured = measure(predictions_of(archive, np.random.default_rng(0)), archive.classes)
    found = verdict(measured, metric="log_loss")
    assert found.comparison.area.value < 0
    assert found.outcome == "helped"


def test_limits_are_named():
    archive = Archive(
        separation={"imagenet": 1.5, "adapted": 1.5, "colour": 2.5}, patients_per_class=8, budgets=(1, 4), num_draws=4
    )
    measured = measure(predictions_of(archive, np.random.default_rng(0)), archive.classes)
    limits = verdict(measured, seen_in_pretraining=7, site_statement="Site and label are entangled.").limits
    text = "\n".join(limits)
    assert "7 of 24 tested slides were in the pretraining pool" in text
    assert "does not reach the colour floor" in text
    assert "entangled" in text


def test_the_colour_floor_is_told_even_where_there_is_no_verdict():
    archive = Archive(
        separation={"imagenet": 1.5, "adapted": 1.5, "colour": 2.5}, patients_per_class=2, budgets=(1,), num_draws=2,
        num_folds=2,
    )  # fmt: skip
    found = verdict(measure(predictions_of(archive, np.random.default_rng(0)), archive.classes))
    assert found.outcome == "too few patients"
    assert "the colour floor" in "\n".join(found.limits)


def test_too_few_patients_get_no_verdict():
    archive = Archive(patients_per_class=2, budgets=(1,), num_draws=2, num_folds=2)
    measured = measure(predictions_of(archive, np.random.default_rng(0)), archive.classes)
    assert verdict(measured).outcome == "too few patients"
    one = predictions_of(Archive(patients_per_class=6, num_draws=2), np.random.default_rng(0))
    kept = [row for row in one if row.label != "carcinoma" or row.slide == "s0012"]
    found = verdict(measure(kept, archive.classes))
    assert found.outcome == "too few patients"
    assert "class carcinoma has one" in found.headline


# ---- several pretraining seeds


def test_the_spread_between_seeds_widens_the_interval_and_their_number_narrows_it():
    """Runs that differ by much: the interval of their mean is Student's over the runs, whatever the patients."""
    rows = []
    for number, shift in enumerate((-0.2, -0.1, 0.1, 0.2)):
        own = fixed_scores((0.7 + shift,), (0.7,), (1,), per_class=200)
        rows += [replace(row, backbone=f"s{number}") for row in own if row.start == "adapted"]
    rows += [row for row in fixed_scores((0.7,), (0.7,), (1,), per_class=200) if row.start == "imagenet"]
    measured = measure(rows, ["a", "b"], 4000)
    found = compare(measured, "balanced_accuracy", "adapted", "imagenet").area
    assert found.value == pytest.approx(0, abs=1e-9)
    half = 3.18 * np.std([-0.2, -0.1, 0.1, 0.2], ddof=1) / 2  # t of three degrees of freedom
    assert found.high == pytest.approx(half, rel=0.15)
    one_run = [row for row in rows if row.backbone in ("", "s3")]
    alone = compare(measure(one_run, ["a", "b"], 4000), "balanced_accuracy", "adapted", "imagenet").area
    assert alone.low > 0.1  # of that run by itself the patients leave no doubt


def test_identical_seeds_are_worth_one():
    archive = Archive(budgets=(1, 4), num_draws=4)
    rows = predictions_of(archive, np.random.default_rng(0))
    pooled = [replace(row, backbone=f"s{number}") for row in rows if row.start == "adapted" for number in range(3)]
    alone = [row for row in summarise(measure(rows, archive.classes)) if row.start == "adapted"]
    three = [row for row in summarise(measure(pooled, archive.classes)) if row.start == "adapted"]
    for one, row in zip(alone, three, strict=True):
        assert (row.mean, row.low, row.high) == pytest.approx((one.mean, one.low, one.high), abs=1e-6)
        assert row.num_seeds == 3


def test_the_verdict_says_how_many_seeds_it_rests_on():
    archive = Archive(seeds={"adapted": 4}, seed_spread=0.1, budgets=(1, 4), num_draws=3)
    measured = measure(predictions_of(archive, np.random.default_rng(0)), archive.classes)
    assert "mean of 4 pretraining seeds (s0, s1, s2 and s3)" in "\n".join(verdict(measured).limits)
    heights = curves.area_per_seed(measured, "auroc", "adapted")
    assert list(heights) == ["s0", "s1", "s2", "s3"]
    assert np.mean(list(heights.values())) == pytest.approx(area(measured, "auroc", "adapted")[0])
    one = measure(predictions_of(Archive(budgets=(1,), num_draws=2), np.random.default_rng(0)), archive.classes)
    assert "is one pretraining run" in "\n".join(verdict(one).limits)


# ---- the levels that are promised


def quick_metrics(labels, shares_NK, classes, wanted):
    """scikit-learn's values (test_metrics.py holds them equal) without its checks, 4/5 of a simulation's time."""
    truth_N = np.array([classes.index(label) for label in labels])
    found = bootstrap.resampled_metrics(truth_N, shares_NK, np.arange(len(truth_N)), np.ones((1, len(truth_N))), wanted)
    return {name: float(values[0]) for name, values in found.items()}


def pool_of(archive):
    """What `measure` is told of a fixed test set's pool."""
    if not archive.test_patients_per_class:
        return {}
    found = {"pool_per_class": archive.patients_per_class * archive.slides_per_patient}
    found["pool_patients_per_class"] = archive.patients_per_class
    if archive.test_sites:  # worth fewer than they are, by how much their sizes differ by chance
        patients = archive.patients_per_class * len(archive.classes)
        found["pool_sites"] = archive.sites / (1 + (archive.sites - 1) / patients)
    return found


def measured_quickly(rows, archive: Archive, metric: str, seed: int):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bootstrap, "metrics", quick_metrics)
        return measure(rows, archive.classes, wanted=(metric,), num_resamples=300, seed=seed, **pool_of(archive))


def coverage_and_alarms(archive: Archive, num_runs: int, seed: int, metric: str = "balanced_accuracy", sites=True):
    """How often intervals hold the truth (per start and budget), and how often the verdict sees a difference.

    `sites` False: as if nobody knew which site a patient is from.
    """
    truth = {
        (start, budget): true_balanced_accuracy(archive, start, budget)
        for start in archive.separation
        for budget in archive.budgets
    }
    rng = np.random.default_rng(seed)
    held = dict.fromkeys(truth, 0)
    alarms = 0
    for run in range(num_runs):
        rows = predictions_of(archive, rng)
        if not sites:
            rows = [replace(row, site="") for row in rows]
        measured = measured_quickly(rows, archive, metric, run)
        for row in summarise(measured):
            held[(row.start, row.budget)] += row.low <= truth[(row.start, row.budget)] <= row.high
        alarms += verdict(measured, metric=metric).outcome != "no measurable difference"
    return {key: count / num_runs for key, count in held.items()}, alarms / num_runs


def test_intervals_hold_the_truth_and_equal_starts_are_called_equal_quickly():
    """The slow test below on a smaller scale: enough to notice an interval that is a third too narrow."""
    archive = Archive(patients_per_class=9, budgets=(1, 4), num_draws=4)
    held, alarms = coverage_and_alarms(archive, 40, seed=0)
    assert 0.88 <= np.mean(list(held.values())) <= 1.0
    assert alarms <= 0.10


EIGHT_SITES = Archive(
    patients_per_class=24,
    sites=8,
    site_share=0.2,
    site_spread=0.5,
    patient_share=0.4,
    separation={"imagenet": 2.0, "adapted": 2.0},
    budgets=(1, 4, 12),
    num_draws=5,
    num_folds=4,
)


def test_intervals_over_sites_hold_the_truth_where_those_over_their_patients_do_not_quickly():
    archive = replace(EIGHT_SITES, budgets=(1, 4), num_draws=3)
    held, alarms = coverage_and_alarms(archive, 40, seed=0)
    assert 0.88 <= np.mean(list(held.values())) <= 1.0
    assert alarms <= 0.10
    held, _ = coverage_and_alarms(archive, 40, seed=0, sites=False)
    assert np.mean(list(held.values())) <= 0.87


@pytest.mark.slow
@pytest.mark.parametrize(
    "archive",
    [
        Archive(),
        Archive(patients_per_class=20, classes=("a", "b")),
        Archive(patients_per_class=6, classes=("a", "b", "c", "d", "e"), separation={"imagenet": 2.0, "adapted": 2.0}),
        Archive(patients_per_class=15, test_patients_per_class=8),
        Archive(seeds={"adapted": 4}, seed_spread=0.4),
        Archive(
            patients_per_class=5,
            test_patients_per_class=4,
            slides_per_patient=20,
            patient_share=0.1,
            budgets=(1, 5, 20, 80),
            num_draws=6,
            separation={"imagenet": 2.0, "adapted": 2.0},
        ),
        Archive(logistic=True, budgets=(1, 4, 8), num_draws=5),
        Archive(logistic=True, budgets=(1, 4, 8), num_draws=5, patients_per_class=15, test_patients_per_class=8),
        Archive(permuted=True, num_draws=6),
        Archive(
            patients_per_class=10,
            slides_per_patient=8,
            patient_share=0.3,
            budgets=(1, 8, 32),
            num_draws=6,
            separation={"imagenet": 2.0, "adapted": 2.0},
        ),
        EIGHT_SITES,
        replace(EIGHT_SITES, sites=20, num_folds=5, patients_per_class=30),
        replace(EIGHT_SITES, slides_per_patient=4),
        replace(EIGHT_SITES, sites=12, num_folds=5, unequal_sites=True),
        replace(EIGHT_SITES, site_share=0.0, site_spread=0.0),
        replace(EIGHT_SITES, test_sites=8, test_patients_per_class=24),
    ],
    ids=[
        "folds",
        "two classes",
        "six patients a class",
        "fixed test set",
        "four seeds",
        "fixed, twenty unlike tiles a patient",
        "folds, logistic head",
        "fixed, logistic head",
        "folds, permuted",
        "folds, eight slides a patient",
        "folds, eight sites",
        "folds, twenty sites",
        "folds, eight sites, four slides a patient",
        "folds, twelve sites of unequal size",
        "folds, eight sites that do not differ",
        "fixed, eight and eight sites",
    ],
)
def test_intervals_hold_the_truth_at_their_nominal_rate(archive):
    """200 archives: 95 % intervals hold the true value in 92 to 98 of 100; one start and budget in 90 to 99.5."""
    held, alarms = coverage_and_alarms(archive, 200, seed=1)
    assert 0.92 <= np.mean(list(held.values())) <= 0.98
    assert min(held.values()) >= 0.90
    assert max(held.values()) <= 0.995
    assert alarms <= 0.05


@pytest.mark.slow
def test_intervals_that_are_wider_than_they_need_be_hold_the_truth_at_least_at_their_rate():
    """A fixed test set with twenty alike tiles a patient: pool.py says why."""
    archive = Archive(
        patients_per_class=5,
        test_patients_per_class=4,
        slides_per_patient=20,
        patient_share=0.6,
        budgets=(1, 5, 20, 80),
        num_draws=6,
        separation={"imagenet": 2.0, "adapted": 2.0},
    )
    held, alarms = coverage_and_alarms(archive, 200, seed=1)
    assert 0.92 <= np.mean(list(held.values())) <= 0.99
    assert min(held.values()) >= 0.90
    assert alarms <= 0.05


def coverage_of_labels_saved(archive: Archive, num_runs: int) -> tuple[list[float], np.ndarray]:
    """With how many slides the adapted start truly does what ImageNet does, and how often intervals hold that."""
    metric = "balanced_accuracy"
    height = {
        start: np.array([true_balanced_accuracy(archive, start, budget) for budget in archive.budgets])
        for start in archive.separation
    }
    x = np.log2(np.array(archive.budgets, dtype=float))
    truth = [2 ** first_crossing(x, height["adapted"], height["imagenet"][b]) for b in range(len(x))]
    rng = np.random.default_rng(5)
    held = np.zeros(len(x))
    for run in range(num_runs):
        measured = measured_quickly(predictions_of(archive, rng), archive, metric, run)
        for b, row in enumerate(labels_saved(measured, metric, "adapted", "imagenet")):
            low, high = (math.inf if end is None else end for end in (row.low, row.high))
            held[b] += low <= truth[b] + 1e-9 and truth[b] <= high + 1e-9
    return truth, held / num_runs


def test_intervals_of_labels_saved_hold_the_true_number_with_two_tested_patients_a_class():
    """Too few for a verdict, and many of the tested are right whatever the budget: no reason to be surer."""
    archive = Archive(test_patients_per_class=2, separation={"imagenet": 2.2, "adapted": 2.6}, num_draws=4)
    truth, held = coverage_of_labels_saved(archive, 60)
    assert 2 < truth[-1] < 4
    assert held.min() >= 0.92


@pytest.mark.slow
def test_intervals_of_labels_saved_hold_the_true_number():
    truth, held = coverage_of_labels_saved(Archive(separation={"imagenet": 1.5, "adapted": 2.1}), 100)
    assert truth[0] == 1
    assert 1 < truth[-1] < 3
    assert held.min() >= 0.92


@pytest.mark.slow
def test_permuted_labels_are_called_no_difference_and_chance():
    archive = Archive(permuted=True, separation={"random": 0.0, "imagenet": 1.5, "adapted": 1.5})
    rng = np.random.default_rng(2)
    calls, at_chance = 0, dict.fromkeys(archive.separation, 0)
    for run in range(100):
        measured = measured_quickly(predictions_of(archive, rng), archive, "auroc", run)
        calls += verdict(measured).outcome == "no measurable difference"
        for start in at_chance:
            _, low, high = area(measured, "auroc", start)
            at_chance[start] += low <= 0.5 <= high
    assert calls >= 95
    assert min(at_chance.values()) >= 90


@pytest.mark.slow
def test_a_real_effect_is_found_in_most_archives():
    archive = Archive(separation={"imagenet": 1.0, "adapted": 2.2})
    rng = np.random.default_rng(3)
    found = [verdict(measured_quickly(predictions_of(archive, rng), archive, "auroc", 0)).outcome for _ in range(40)]
    assert found.count("helped") >= 32
    assert "hurt" not in found
