"""Patients stay on one side, budgets grow by adding, and the same draws serve everybody."""

import json
from dataclasses import replace

import numpy as np
import pytest

from histossl.core.errors import LabelsError, MismatchError
from histossl.labels.label_table import Item, LabelTable
from histossl.labels.splits import Part, Splits, check, make_splits, read_splits, site_names, write_splits
from histossl.stats.tables import ALL


def table_of(items) -> LabelTable:
    items = tuple(items)
    return LabelTable(items, tuple(sorted({item.label for item in items})))


def random_table(seed: int, with_split: bool = False, with_site: bool = False) -> LabelTable:
    """Any table that labels.csv could give: 2-4 classes, patients with one to four slides, mixed or not."""
    rng = np.random.default_rng(seed)
    num_classes = int(rng.integers(2, 5))
    items = []
    for patient in range(int(rng.integers(4 * num_classes, 12 * num_classes))):
        label = patient % num_classes
        split = ("test" if patient // num_classes % 3 == 2 else "train") if with_split else ""
        site = f"site{rng.integers(6)}" if with_site else ""
        for number in range(int(rng.integers(1, 5))):
            own = int(rng.integers(num_classes)) if rng.random() < 0.1 else label
            items.append(Item(f"s{patient}.{number}", f"s{patient}.{number}", f"c{own}", f"P{patient}", site, split))
    return table_of(items)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("with_split", [False, True])
def test_no_patient_is_on_both_sides_and_budgets_are_nested(seed, with_split):
    table = random_table(seed, with_split)
    splits = make_splits(table, num_draws=3, seed=seed)
    for part in splits.parts:
        trained = {table.items[item].patient for item in part.pool}
        tested = {table.items[item].patient for item in part.test}
        assert not trained & tested
        before: set[int] = set()
        for budget in splits.budgets:
            taken = set(part.taken(budget).tolist())
            assert before <= taken
            if budget != ALL:
                per_class = [sum(table.items[item].label == label for item in taken) for label in table.classes]
                assert per_class == [budget] * len(table.classes)
            before = taken
        assert before == set(part.pool.tolist())
    if not with_split:
        for draw in range(3):
            tested = sorted(item for part in splits.parts if part.draw == draw for item in part.test)
            assert tested == list(range(len(table.items)))


def test_that_no_verdict_will_be_given_is_said_before_anything_is_computed():
    """Enough patients in all, but the test set holds one of a class: what counts is who is tested."""
    items = [Item(f"s{n}", f"s{n}", f"c{n % 2}", f"P{n}", "", "test" if n < 9 else "train") for n in range(40)]
    said = "\n".join(make_splits(table_of(items), num_draws=2).notes)
    assert "verdict" not in said
    few = [item for item in items if not (item.split == "test" and item.label == "c1" and item.patient != "P1")]
    said = "\n".join(make_splits(table_of(few), num_draws=2).notes)
    assert "no verdict will be given: 6 patients are tested, of class 'c1' one;" in said
    without = [Item(item.name, item.slide, item.label, item.patient, "", "") for item in items[:6]]
    assert "no verdict will be given: 6 patients are tested;" in make_splits(table_of(without), num_draws=2).notes[-1]


def test_one_draw_says_what_its_intervals_leave_out():
    items = [Item(f"s{n}", f"s{n}", f"c{n % 2}", f"P{n}", "", "") for n in range(40)]
    assert "no interval holds it" in make_splits(table_of(items), num_draws=1).notes[0]
    assert make_splits(table_of(items), num_draws=2).notes == ()


def test_sites_stay_together_and_so_do_patients_seen_at_two():
    items = [Item(f"s{n}", f"s{n}", f"c{n % 2}", f"P{n // 2}", f"site{n // 4}") for n in range(40)]
    items.append(Item("t", "t", "c0", "P0", "site7"))  # ties site 0 to site 7
    table = table_of(items)
    splits = make_splits(table, group="site", num_draws=2)
    together = {"site0": "A", "site7": "A"}
    for part in splits.parts:
        sides = [{together.get(items[n].site, items[n].site) for n in side} for side in (part.pool, part.test)]
        assert not sides[0] & sides[1]
    assert site_names(table)[:2] == ["site0+site7"] * 2
    assert site_names(table)[4] == "site1"
    told = [note for note in splits.notes if "count as one" in note]
    assert told == [
        "the sites 'site0' and 'site7' count as one: patient 'P0' has slides at several of them, and no patient may "
        "stand on both sides"
    ]


def test_a_site_that_is_missing_is_named_by_its_column():
    items = [Item(f"s{n}", f"s{n}", f"c{n % 2}", f"P{n}", f"site{n % 9}" if n else "") for n in range(54)]
    with pytest.raises(LabelsError, match="1 of 54 slides have no site, the first 's0'; fill in the column 'site'"):
        make_splits(table_of(items), group="site")
    with pytest.raises(LabelsError, match="the labels name no site; add a column 'site'"):
        make_splits(table_of([Item(f"s{n}", f"s{n}", f"c{n % 2}", f"P{n}") for n in range(54)]), group="site")


def test_too_few_sites_for_a_verdict_are_told_before_anything_runs():
    items = [Item(f"s{n}", f"s{n}", f"c{n % 2}", f"P{n}", f"site{n % 5}") for n in range(40)]
    said = make_splits(table_of(items), group="site", num_draws=2).notes
    assert said == ("no verdict will be given: 5 sites are tested; it takes 8 tested sites, and two of each class",)
    items = [Item(f"s{n}", f"s{n}", f"c{n % 2}", f"P{n}", f"site{n % 9}") for n in range(54)]
    assert make_splits(table_of(items), group="site", num_draws=2).notes == ()


def test_slides_of_other_patients_come_before_a_second_of_the_same():
    items = [Item(f"s{p}.{n}", f"s{p}.{n}", f"c{p % 2}", f"P{p}", "", "train") for p in range(8) for n in range(5)]
    items += [Item(f"t{n}", f"t{n}", f"c{n}", f"T{n}", "", "test") for n in range(2)]
    for part in make_splits(table_of(items), num_draws=5).parts:
        for order in part.order:
            assert len({items[item].patient for item in order[:4]}) == 4
            assert len({items[item].patient for item in order[4:8]}) == 4


def test_tiles_of_one_slide_do_not_come_before_those_of_the_next():
    items = [
        Item(f"s{s}@{t}", f"s{s}", f"c{s % 2}", f"P{s // 4}", "", "train" if s < 8 else "test")
        for s in range(12)
        for t in range(6)
    ]
    table = LabelTable(tuple(items), ("c0", "c1"), unit="tile")
    for part in make_splits(table, num_draws=3).parts:
        for order in part.order:
            assert len({items[item].slide for item in order[:4]}) == 4


def test_draws_differ_and_the_same_seed_gives_the_same():
    table = random_table(0)
    one, again, other = (make_splits(table, num_draws=4, seed=seed) for seed in (1, 1, 2))
    assert one == again
    assert one != other
    assert len({part.order for part in one.parts}) == len(one.parts)


def test_more_draws_do_not_change_the_first_ones():
    table = random_table(0)
    few, many = make_splits(table, num_draws=2), make_splits(table, num_draws=4)
    assert many.parts[: len(few.parts)] == few.parts


def test_budgets_double_up_to_the_smallest_class():
    items = [Item(f"s{n}", f"s{n}", "c0" if n < 13 else "c1", f"P{n}", "", "train") for n in range(33)]
    items += [Item(f"t{n}", f"t{n}", f"c{n}", f"T{n}", "", "test") for n in range(2)]
    assert make_splits(table_of(items), num_draws=1).budgets == (1, 2, 4, 8, ALL)
    assert make_splits(table_of(items), num_draws=1, budgets=[ALL, 16, 3]).budgets == (3, 16, ALL)
    assert not any("to train on" in note for note in make_splits(table_of(items), num_draws=1, budgets=[13]).notes)
    short = make_splits(table_of(items), num_draws=1, budgets=[3, 16]).notes
    assert "class 'c0' has 13 slides to train on: budget 16 takes no more of it" in short
    assert not any("'c1' has 20" in note for note in short)
    with pytest.raises(LabelsError, match="--budgets 21: no class has more than 20"):
        make_splits(table_of(items), num_draws=1, budgets=[21])


def test_a_class_with_one_patient_is_refused_and_few_are_named():
    items = [Item(f"s{n}", f"s{n}", "a" if n < 2 else "bc"[n % 2], "P0" if n < 2 else f"P{n}") for n in range(12)]
    with pytest.raises(LabelsError, match=r"'a' has one patient only.*--classes b,c"):
        make_splits(table_of(items), num_draws=1)
    items = [Item(f"s{n}", f"s{n}", "a" if n < 3 else "b", f"P{n}") for n in range(12)]
    splits = make_splits(table_of(items), num_draws=1)
    assert splits.num_folds == 3
    assert any("'a' has 3 patients" in note for note in splits.notes)
    with pytest.raises(LabelsError, match="--folds 4: class 'a' has 3 patients"):
        make_splits(table_of(items), num_draws=1, num_folds=4)


def test_a_test_set_of_one_class_or_an_untrained_class_is_refused():
    items = [Item(f"s{n}", f"s{n}", "ab"[n % 2], f"P{n}", "", "train") for n in range(8)]
    with pytest.raises(LabelsError, match="holds only 'a'"):
        make_splits(table_of([*items, Item("t", "t", "a", "T", "", "test")]), num_draws=1)
    with pytest.raises(LabelsError, match="'c' has no training slide"):
        make_splits(table_of([*items, Item("t", "t", "c", "T", "", "test")]), num_draws=1)


def test_splits_come_back_from_disk_and_refuse_other_labels(tmp_path):
    table = random_table(3)
    splits = make_splits(table, num_draws=2)
    write_splits(tmp_path / "splits.json", splits, table)
    assert read_splits(tmp_path / "splits.json", table) == splits
    with pytest.raises(MismatchError, match="other slides"):
        read_splits(tmp_path / "splits.json", random_table(4))


@pytest.mark.parametrize("older", [False, True])
def test_what_is_not_as_it_was_is_named(tmp_path, older):
    """By example. A file that an earlier version wrote tells the names, and the labels of who is trained on."""
    items = [Item(f"s{n}", f"s{n}", f"c{n % 2}", f"P{n}", "Bonn") for n in range(20)]
    table, path = table_of(items), tmp_path / "run" / "splits.json"
    path.parent.mkdir()
    write_splits(path, make_splits(table, num_draws=1), table)
    if older:
        content = json.loads(path.read_text())
        del content["items"]
        path.write_text(json.dumps(content))

    def said(changes) -> str:
        with pytest.raises(MismatchError) as refused:
            read_splits(path, table_of([changes.get(item.name, item) for item in items if changes.get(item.name, 1)]))
        assert "run was made with other " in str(refused.value)
        return str(refused.value).split("was made with other ")[1].split("; use another --name")[0]

    place = np.arange(3)
    generic = "labels, patients, slides, regions or tiles than these"
    for changes, expected, by_older in (
        ({"s3": replace(items[3], name="neu", slide="neu")}, "slides (new: neu; missing: s3)", None),
        ({"s3": None, "s4": None, "s5": None}, "slides (missing: s3 and 2 more)", None),
        ({"s4": replace(items[4], label="c1")}, "labels (s4 was 'c0', now 'c1')", None),
        ({"s10": replace(items[10], patient="P2")}, "patients (s10 was 'P10', now 'P2')", generic),
        (
            {f"s{n}": replace(items[n], site="") for n in (2, 11)},
            "sites (s2 was 'Bonn', now none, and 1 more)",
            generic,
        ),
        ({"s4": replace(items[4], tiles=place)}, "regions or tiles (s4)", generic),
        (
            {"s4": None, "s5": replace(items[5], patient="P1")},
            "slides (missing: s4) and other patients (s5 was 'P5', now 'P1')",
            "slides (missing: s4)",
        ),
    ):
        assert said(changes) == ((by_older or expected) if older else expected)


def test_the_program_finds_its_own_leaks():
    items = [Item(f"s{n}", f"s{n}", f"c{n % 2}", f"P{n // 4}") for n in range(8)]
    table = table_of(items)
    leak = Part(0, None, ((0, 4), (1, 5)), (2, 3))  # slide 0 and slide 2 are of patient P0
    with pytest.raises(AssertionError, match="both sides"):
        check(Splits("patient", 0, (1, ALL), (leak,)), table)
