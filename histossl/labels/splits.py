"""Who is trained on and who is tested, drawn once and shared by every start, so that a curve moves by labels, not luck.

A patient (or a site, with --group site) stands on one side only. With a `split` column the test set is fixed;
else every draw is one stratified group k-fold, so that each patient is tested once per draw. In each training side
every class has an order, and a budget of b takes the first b of each class: budgets are nested. The order takes one
item from each patient before a second from any, since ten slides of one patient say less than one slide of ten.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from histossl.core.errors import LabelsError, MismatchError, StoreError
from histossl.core.workspace import written_aside
from histossl.labels.label_table import LabelTable, natural
from histossl.stats.tables import ALL, Budget, in_budget_order
from histossl.stats.verdict import FEWEST_DRAWN

Group = Literal["patient", "site"]
MOST_FOLDS = 5
FEW_PATIENTS = 5
TRIES = 50  # shuffles of the folds, until each training side holds each class


@dataclass(frozen=True)
class Part:
    """One training and one test side. `order` gives, class by class, in which order items enter the budgets."""

    draw: int
    fold: int | None  # None: the test set is fixed
    order: tuple[tuple[int, ...], ...]  # item numbers, per class
    test: tuple[int, ...]

    @property
    def pool(self) -> NDArray[np.int64]:
        """Every item of the training side."""
        return np.sort(np.array([item for one in self.order for item in one], dtype=np.int64))

    def taken(self, budget: Budget) -> NDArray[np.int64]:
        """The labelled items at `budget` per class, in item order."""
        each = None if isinstance(budget, str) else budget
        return np.sort(np.array([item for one in self.order for item in one[:each]], dtype=np.int64))


@dataclass(frozen=True)
class Splits:
    group: Group
    num_folds: int  # 0: the test set is fixed
    budgets: tuple[Budget, ...]
    parts: tuple[Part, ...]
    notes: tuple[str, ...] = ()

    @property
    def tested(self) -> tuple[int, ...]:
        return tuple(sorted({item for part in self.parts for item in part.test}))


# ---- drawing


def make_splits(
    table: LabelTable,
    *,
    group: Group = "patient",
    budgets: Sequence[Budget] = (),
    num_draws: int = 10,
    num_folds: int = 0,
    seed: int = 0,
) -> Splits:
    """Draws for `table`. `budgets` empty: 1, 2, 4, ... and all; `num_folds` 0: up to five, as patients allow."""
    labels = table.label_numbers()
    groups = groups_of(table, group)
    notes = _few_patients(table, groups, group)
    sides: list[tuple[int, int | None, NDArray[np.int64], NDArray[np.int64]]]
    if table.has_split:
        if num_folds:
            raise LabelsError("--folds: the labels name a fixed test set in their split column; remove one of the two")
        sides = [(draw, None, *_fixed(table)) for draw in range(num_draws)]
        _refuse_torn_groups(table, groups, group)
        folds = 0
    else:
        folds = _folds(table, groups, group, num_folds)
        sides = [
            (draw, fold, train, test)
            for draw in range(num_draws)
            for fold, (train, test) in enumerate(_k_fold(labels, groups, folds, seed, draw))
        ]
    num_classes = len(table.classes)
    parts = tuple(
        Part(draw, fold, _orders(table, labels, train, num_classes, seed, draw, fold), tuple(test.tolist()))
        for draw, fold, train, test in sides
    )
    least = min(min(len(one) for one in part.order) for part in parts)
    whole = max(max(len(one) for one in part.order) for part in parts)
    taken = _budgets(budgets, least, whole, table)
    notes += _short_classes(taken, parts, table) + _untested(table, parts)
    notes += _no_verdict(table, parts, groups, group) + _one_draw(num_draws, table)
    notes += _tied_sites(table, groups) if group == "site" else []
    splits = Splits(group, folds, taken, parts, tuple(notes))
    check(splits, table)
    return splits


def groups_of(table: LabelTable, group: Group) -> NDArray[np.int64]:
    """A number per item; items with the same number must not be parted.

    By site, patients seen at two sites tie these sites together.
    """
    if group == "patient":
        names = [item.patient for item in table.items]
        return np.unique(names, return_inverse=True)[1].astype(np.int64)
    without = [item.name for item in table.items if not item.site]
    if len(without) == len(table.items):
        raise LabelsError("--group site: the labels name no site; add a column 'site' to them")
    if without:
        raise LabelsError(
            f"--group site: {len(without)} of {len(table.items):,} {table.unit}s have no site, the first "
            f"{without[0]!r}; fill in the column 'site' everywhere"
        )
    root: dict[str, str] = {}

    def top(name: str) -> str:
        while root.setdefault(name, name) != name:
            name = root[name]
        return name

    for item in table.items:
        root[top(f"patient {item.patient}")] = top(f"site {item.site}")
    tops = [top(f"site {item.site}") for item in table.items]
    return np.unique(tops, return_inverse=True)[1].astype(np.int64)


def _few_patients(table: LabelTable, groups: NDArray[np.int64], group: Group) -> list[str]:
    """Names the classes about which little can be said."""
    notes = []
    for label, count in groups_per_class(table, groups).items():
        if count < FEW_PATIENTS:
            notes.append(
                f"class {label!r} has {count} {group}{'s' * (count != 1)}: what is said of it rests on very few"
            )
    return notes


def _untested(table: LabelTable, parts: Sequence[Part]) -> list[str]:
    """Classes that no test set holds."""
    tested = {table.items[item].label for part in parts for item in part.test}
    absent = [repr(label) for label in table.classes if label not in tested]
    return [f"no tested {table.unit} is {' or '.join(absent)}: how well it is told is not measured"] if absent else []


def _no_verdict(table: LabelTable, parts: Sequence[Part], groups: NDArray[np.int64], group: Group) -> list[str]:
    """Said before hours of computing: with so few tested patients the report will not say whether adaptation helped."""
    tested = {(table.items[item].label, int(groups[item])) for part in parts for item in part.test}
    number = len({one for _, one in tested})
    per_class = Counter(label for label, _ in tested)
    rare = [label for label in table.classes if per_class[label] == 1]
    if number >= FEWEST_DRAWN and not rare:
        return []
    why = f"{number} {group}s are tested"
    if rare:
        why += f", of class {', '.join(map(repr, rare))} one{' each' * (len(rare) > 1)}"
    note = f"no verdict will be given: {why}; it takes {FEWEST_DRAWN} tested {group}s, and two of each class"
    if table.has_split:
        note += f" (label more {group}s, or test on all of them by leaving out the split column)"
    return [note]


def _one_draw(num_draws: int, table: LabelTable) -> list[str]:
    if num_draws > 1:
        return []
    return [
        f"with one draw nothing shows how much hangs on which {table.unit}s are labelled, so no interval holds it; "
        "--draws 5 or more does"
    ]


def site_names(table: LabelTable) -> list[str]:
    """Per item the sites that stay on one side with it, as `groups_of` ties them."""
    groups = groups_of(table, "site").tolist()
    named = _sites_of_groups(table, groups)
    return ["+".join(sorted(named[number])) for number in groups]


def _sites_of_groups(table: LabelTable, groups: Sequence[int]) -> dict[int, set[str]]:
    named: dict[int, set[str]] = defaultdict(set)
    for item, number in zip(table.items, groups, strict=True):
        named[number].add(item.site)
    return named


def _tied_sites(table: LabelTable, groups: NDArray[np.int64]) -> list[str]:
    """Sites that count as one because a patient was at more than one of them."""
    at: dict[str, set[str]] = defaultdict(set)
    for item in table.items:
        at[item.patient].add(item.site)
    notes = []
    for sites in _sites_of_groups(table, groups.tolist()).values():
        if len(sites) > 1:
            patients = sorted(patient for patient, own in at.items() if len(own) > 1 and own <= sites)
            others = f" and {len(patients) - 1} more" * (len(patients) > 1)
            notes.append(
                f"the sites {' and '.join(map(repr, sorted(sites)))} count as one: patient {patients[0]!r}{others} has "
                "slides at several of them, and no patient may stand on both sides"
            )
    return notes


def groups_per_class(table: LabelTable, groups: NDArray[np.int64]) -> dict[str, int]:
    per_class: dict[str, set[int]] = {label: set() for label in table.classes}
    for item, number in zip(table.items, groups.tolist(), strict=True):
        per_class[item.label].add(number)
    return {label: len(members) for label, members in per_class.items()}


def _fixed(table: LabelTable) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    side = np.array([item.split for item in table.items])
    train, test = np.flatnonzero(side == "train"), np.flatnonzero(side == "test")
    in_train = {table.items[number].label for number in train}
    in_test = {table.items[number].label for number in test}
    for label in table.classes:
        if label not in in_train:
            raise LabelsError(f"class {label!r} has no training slide in the split column, so it cannot be learnt")
    if len(in_test) < 2:
        held = f"only {next(iter(in_test))!r}" if in_test else "no slide"
        raise LabelsError(
            f"the test set of the split column holds {held}; two classes at least are needed there "
            "(without the column every patient is tested, in folds)"
        )
    return train, test


def _refuse_torn_groups(table: LabelTable, groups: NDArray[np.int64], group: Group) -> None:
    sides: dict[int, set[str]] = defaultdict(set)
    for item, number in zip(table.items, groups.tolist(), strict=True):
        sides[number].add(item.split)
        if len(sides[number]) > 1:
            name = item.site if group == "site" else item.patient
            raise LabelsError(f"{group} {name!r} is in both train and test of the split column; it must be in one")


def _folds(table: LabelTable, groups: NDArray[np.int64], group: Group, wanted: int) -> int:
    counts = groups_per_class(table, groups)
    fewest = min(counts, key=lambda label: counts[label])
    if counts[fewest] < 2:
        keep = ",".join(label for label in table.classes if counts[label] > 1)
        way_out = f"leave it out with --classes {keep}" if keep.count(",") else f"label more {group}s"
        raise LabelsError(
            f"class {fewest!r} has one {group} only, so it cannot be both trained on and tested; {way_out}"
        )
    if wanted > counts[fewest]:
        raise LabelsError(
            f"--folds {wanted}: class {fewest!r} has {counts[fewest]} {group}s, so at most {counts[fewest]} folds"
        )
    return wanted or min(MOST_FOLDS, counts[fewest])


def _k_fold(
    labels: NDArray[np.int64], groups: NDArray[np.int64], num_folds: int, seed: int, draw: int
) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """One stratified group k-fold whose training sides hold every class, if a shuffle among `TRIES` gives that."""
    from sklearn.model_selection import StratifiedGroupKFold

    best: tuple[int, list[tuple[NDArray[np.int64], NDArray[np.int64]]]] | None = None
    for attempt in range(TRIES):
        state = int(np.random.default_rng([seed, draw, attempt]).integers(2**31))
        folder = StratifiedGroupKFold(num_folds, shuffle=True, random_state=state)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # fewer items than folds: told by _few_patients
            sides = [
                (train.astype(np.int64), test.astype(np.int64))
                for train, test in folder.split(np.zeros(len(labels)), labels, groups)
            ]
        lacking = sum(len(np.unique(labels)) - len(np.unique(labels[train])) for train, _ in sides)
        lacking += sum(not len(test) for _, test in sides)
        if best is None or lacking < best[0]:
            best = lacking, sides
        if lacking == 0:
            break
    assert best is not None
    return [(train, test) for train, test in best[1] if len(test) and len(train)]


def _orders(
    table: LabelTable,
    labels: NDArray[np.int64],
    train: NDArray[np.int64],
    num_classes: int,
    seed: int,
    draw: int,
    fold: int | None,
) -> tuple[tuple[int, ...], ...]:
    """Per class a random order that goes round the patients, and within a patient round the slides."""
    rng = np.random.default_rng([seed, draw, 0 if fold is None else fold + 1, 4711])
    orders = []
    for label in range(num_classes):
        members = train[labels[train] == label]
        # place among the items of its slide, of its slide among the patient's slides, then chance
        shuffled = members[rng.permutation(len(members))].tolist()
        seen_tiles: Counter[str] = Counter()
        by_patient: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for item in shuffled:
            slide = table.items[item].slide
            by_patient[table.items[item].patient].append((seen_tiles[slide], item))
            seen_tiles[slide] += 1
        turns = []
        for patient, own in by_patient.items():
            chance = rng.random()
            for turn, (_, item) in enumerate(sorted(own, key=lambda pair: pair[0])):
                turns.append((turn, chance, patient, item))
        orders.append(tuple(item for _, _, _, item in sorted(turns)))
    return tuple(orders)


def _budgets(wanted: Sequence[Budget], least: int, whole: int, table: LabelTable) -> tuple[Budget, ...]:
    """`least` items are in every class of every training side; `whole` is where even the largest class is used up."""
    unit = f"{table.unit}s"
    if wanted:
        for budget in wanted:
            if not isinstance(budget, str) and budget > whole:
                raise LabelsError(
                    f"--budgets {budget}: no class has more than {whole} labelled {unit} to train on "
                    f"(the smallest has {least}); 'all' takes everything"
                )
        return tuple(sorted(set(wanted), key=in_budget_order))
    doubled: list[Budget] = []
    budget = 1
    while budget <= least and budget < whole:
        doubled.append(budget)
        budget *= 2
    return (*doubled, ALL)


def _short_classes(budgets: Sequence[Budget], parts: Sequence[Part], table: LabelTable) -> list[str]:
    """Budgets that some class cannot fill: at these the curve is not of so many labels in each class."""
    notes = []
    for number, label in enumerate(table.classes):
        held = min(len(part.order[number]) for part in parts)
        above = [str(budget) for budget in budgets if not isinstance(budget, str) and budget > held]
        if above:
            notes.append(
                f"class {label!r} has {held} {table.unit}{'s' * (held != 1)} to train on: "
                f"budget{'s' * (len(above) > 1)} {', '.join(above)} take{'s' * (len(above) == 1)} no more of it"
            )
    return notes


# ---- leak checks, run by the program itself


def check(splits: Splits, table: LabelTable) -> None:
    """Our own mistakes end here, before a number is computed: leaks, budgets that do not grow, untested patients."""
    groups = groups_of(table, splits.group)
    labels = table.label_numbers()
    patients = np.array([item.patient for item in table.items])
    for part in splits.parts:
        test = np.array(part.test, dtype=np.int64)
        pool = part.pool
        assert not set(groups[pool]) & set(groups[test]), f"draw {part.draw}: a {splits.group} is on both sides"
        assert not set(patients[pool]) & set(patients[test]), f"draw {part.draw}: a patient is on both sides"
        assert len(set(pool.tolist())) == len(pool), f"draw {part.draw}: an item is drawn twice"
        before: set[int] = set()
        for budget in splits.budgets:
            taken = set(part.taken(budget).tolist())
            assert before <= taken, f"draw {part.draw}: budget {budget} does not contain the one before"
            assert taken <= set(pool.tolist())
            before = taken
        for number, order in enumerate(part.order):
            assert all(labels[item] == number for item in order), f"draw {part.draw}: a class holds another's item"
    if splits.num_folds:
        for draw in {part.draw for part in splits.parts}:
            tested = Counter(item for part in splits.parts if part.draw == draw for item in part.test)
            assert set(tested) == set(range(len(table.items))), f"draw {draw}: an item is never tested"
            assert set(tested.values()) == {1}, f"draw {draw}: an item is tested twice"


# ---- splits.json


def write_splits(path: Path, splits: Splits, table: LabelTable) -> None:
    names = [item.name for item in table.items]
    parts = [
        {
            "draw": part.draw,
            "fold": part.fold,
            "order": {
                label: [names[item] for item in one] for label, one in zip(table.classes, part.order, strict=True)
            },
            "test": [names[item] for item in part.test],
        }
        for part in splits.parts
    ]
    content: dict[str, Any] = {
        "labels_digest": table.digest,
        "items": _items_told(table),
        "group": splits.group,
        "num_folds": splits.num_folds,
        "budgets": list(splits.budgets),
        "notes": list(splits.notes),
        "parts": parts,
    }
    with written_aside(path) as aside:
        aside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_splits(path: Path, table: LabelTable) -> Splits:
    """The splits of an earlier run of the same labels; other labels are refused."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(
            f"{path}: cannot be read ({error}); move the directory aside, or use another --name"
        ) from error
    if content["labels_digest"] != table.digest:
        raise MismatchError(
            f"{path.parent} was made with other {_what_differs(content, table)}; "
            "use another --name, so that its curve stays true to its splits"
        )
    number = {item.name: position for position, item in enumerate(table.items)}
    parts = tuple(
        Part(
            part["draw"],
            part["fold"],
            tuple(tuple(number[name] for name in part["order"][label]) for label in table.classes),
            tuple(number[name] for name in part["test"]),
        )
        for part in content["parts"]
    )
    splits = Splits(content["group"], content["num_folds"], tuple(content["budgets"]), parts, tuple(content["notes"]))
    check(splits, table)
    return splits


TOLD = {"label": "labels", "patient": "patients", "site": "sites", "split": "train and test sets"}


def _items_told(table: LabelTable) -> dict[str, dict[str, str]]:
    """What the digest of the labels is of, item by item: enough to say later what differs."""
    return {
        item.name: {
            **{what: getattr(item, what) for what in TOLD},
            "place": hashlib.sha256(item.place.encode()).hexdigest()[:8],
        }
        for item in table.items
    }


def _what_differs(content: Mapping[str, Any], table: LabelTable) -> str:
    """What of the labels is not as it was, each with its first example. An older file tells names and some labels."""
    now = _items_told(table)
    before: dict[str, dict[str, str]] = content.get("items") or {
        **{name: {} for part in content["parts"] for name in part["test"]},
        **{name: {"label": label} for part in content["parts"] for label, of in part["order"].items() for name in of},
    }
    found = []
    new, missing = sorted(now.keys() - before.keys(), key=natural), sorted(before.keys() - now.keys(), key=natural)
    told = [f"{what}: {_some(names)}" for what, names in (("new", new), ("missing", missing)) if names]
    if told:
        found.append(f"{table.unit}s ({'; '.join(told)})")
    both = sorted(now.keys() & before.keys(), key=natural)
    for what, several in TOLD.items():
        changed = [name for name in both if before[name].get(what, now[name][what]) != now[name][what]]
        if changed:
            was, has = (repr(one[changed[0]][what]) if one[changed[0]][what] else "none" for one in (before, now))
            more = f", and {len(changed) - 1:,} more" if len(changed) > 1 else ""
            found.append(f"{several} ({changed[0]} was {was}, now {has}{more})")
    elsewhere = [name for name in both if before[name].get("place", now[name]["place"]) != now[name]["place"]]
    if elsewhere:
        found.append(f"regions or tiles ({_some(elsewhere)})")
    return " and other ".join(found) or "labels, patients, slides, regions or tiles than these"


def _some(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1:,} more" if len(names) > 1 else "")


def seed_of(*names: object) -> int:
    """A 32-bit seed from what identifies a piece of work, the same on every machine."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, names)).encode()).digest()[:4])
