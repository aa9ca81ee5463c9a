"""The label-efficiency curve of any features, as arrays or HDF5: no workspace, no torch, the numbers of `finetune`.

    result = label_efficiency({"resnet50": x, "uni": y}, labels, patients, budgets=(1, 2, 4, 8), draws=10)
    print(result)

Splits, draws, heads, statistics and verdict are those of `histossl finetune`, which uses the same functions: on the
same features, names, patients and seed both give the same figures, digit for digit.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from histossl.core import console
from histossl.core.config import FinetuneConfig
from histossl.core.errors import LabelsError, UsageError
from histossl.core.options import nearest
from histossl.evaluation.journal import DIGITS
from histossl.evaluation.site_confounding import check_site, warn_of_sites
from histossl.features.arrays import Features, Piece, files_in, is_path, load_bags, names_of_files, pieces_of
from histossl.heads.feature_heads import HEADS, OnFeatures
from histossl.labels.label_csv import Row, read_labels
from histossl.labels.label_table import LabelTable, Unit, match_labels
from histossl.labels.spelling import reads_unknown, refuse_alike
from histossl.labels.splits import Part, Splits, groups_of, make_splits, seed_of, site_names
from histossl.stats.bootstrap import worth_of_sizes
from histossl.stats.curve import CurveResult, curve_of
from histossl.stats.tables import Budget, Prediction
from histossl.stats.verdict import pool_of

ONE_START = "features"  # what a start is called where only one is given
OPTION = re.compile(r"--([a-z][a-z-]*)")
COLOUR = "colour"  # the floor: neither a reference nor judged unless asked for


def label_efficiency(
    features: Features | Mapping[str, Features],
    labels: ArrayLike | Path,
    patients: ArrayLike | None = None,
    budgets: Sequence[int | str] = (),
    draws: int = 10,
    heads: str | Sequence[str] = "mean",
    *,
    names: Sequence[str] | None = None,
    sites: ArrayLike | None = None,
    split: ArrayLike | None = None,
    group: Literal["patient", "site"] = "patient",
    folds: int = 0,
    unit: Unit = "slide",
    mixed_patients: bool = False,
    reference: str | None = None,
    seed: int = 0,
    progress: bool = False,
) -> CurveResult:
    """How good a head is with 1, 2, 4 ... labelled items per class, on patients that it has never seen.

    features        of one model, or {name: features} to compare several. Features of n items are an array (n, D), an
                    array (n, N, D), a list of n arrays (N_i, D), a list of n HDF5 files, or a folder of them (dataset
                    `features`, as `histossl embed`, CLAM and TRIDENT write it). They are taken as float32.
    labels          n classes, text or whole numbers; or the Path of a labels.csv, where features are HDF5 files that
                    are called like its slides
    patients        n names: who must not be trained on and tested. None: by TCGA barcode in `names`, else every item
                    counts as its own patient
    budgets         labelled items per class, and "all"; (): 1, 2, 4 ... and all
    draws           random choices of the labelled items, the same for every model
    heads           mean, knn, simpleshot; abmil (which needs torch); or several
    names           n names of the items. With a folder they say which file is whose: NAME.h5
    sites, group    where each item is from; group="site" leaves out whole sites instead of patients
    split           n times "train" or "test": a fixed test set. None: folds by patient
    folds           None of them named (0): up to five, as patients allow
    unit            what an item is, for the words of the result; patients of regions and tiles may have several classes
    mixed_patients  a patient may have slides of several classes
    reference       the model that others are compared with. None: imagenet, random, or the first one
    progress        show a progress bar

    Items are sorted by name first, so their order changes nothing where they have names.
    ValueError (UsageError) says what cannot be used and what to do. Nothing is written; see CurveResult.to_csv.
    """
    with _in_python():
        starts: dict[str, Features] = dict(features) if isinstance(features, Mapping) else {ONE_START: features}
        heads = list(dict.fromkeys([heads] if isinstance(heads, str) else heads))
        _check_starts(starts, heads, reference)
        for head in heads:  # the curve's own config has the checks of all that it shares with this call
            config = FinetuneConfig("", head=head, budgets=_numbers(budgets), draws=draws, folds=folds, group=group)
        if isinstance(labels, Path):
            _check_not_given(patients=patients, names=names, sites=sites, split=split)
            table, found, pieces = _from_labels_csv(labels, starts, mixed_patients)
        else:
            words = _words(labels, "labels")
            found = _names_of(starts, names, len(words))
            columns = {"patients": patients, "sites": sites, "split": split}
            table = _table(words, found, columns, unit, mixed_patients)
            pieces = {start: _in_order(one, start, found) for start, one in starts.items()}
        splits = make_splits(
            table,
            group="site" if config.group == "site" else "patient",
            budgets=config.budgets,
            num_draws=draws,
            num_folds=folds,
            seed=seed,
        )
        position = {name: number for number, name in enumerate(found)}
        items = [item.name for item in table.items]
        bags = {
            start: load_bags([own[position[name]] for name in items], start, items) for start, own in pieces.items()
        }

    predictions: list[Prediction] = []
    labels_N, groups_N, sites_N = table.label_numbers(), groups_of(table, splits.group), sites_of(table, splits)
    total = len(bags) * len(heads) * len(splits.parts) * len(splits.budgets)
    with console.progress("label efficiency", total, "heads", visible=progress) as bar:
        for start, head in itertools.product(bags, heads):
            learner = OnFeatures(head, bags[start], labels_N, groups_N, len(table.classes))
            for part, budget in itertools.product(splits.parts, splits.budgets):
                learner.fit(part.taken(budget), part.pool, seed_of_fit(seed, head, table, part, budget))
                shares = np.round(learner.predict(np.array(part.test, dtype=np.int64)), DIGITS)
                predictions += predictions_of(start, head, table, sites_N, part, budget, shares)
                bar.advance()

    networks = [start for start in bags if start != COLOUR] or list(bags)
    site = check_site(bags["adapted" if "adapted" in bags else networks[-1]].pooled, table)
    if reference is None and len(networks) > 1 and not {"imagenet", "random"} & {*networks}:
        reference = networks[0]
    return curve_of(
        predictions,
        table.classes,
        pool_of(split_facts(table, splits)),
        unit=table.unit,
        reference=reference,
        site_statement=site.statement if site else "",
        notes=[*filter(None, (*table.notes, *splits.notes, warn_of_sites(table)))],
    )


# ---- shared with the stage `finetune`, so that both give the same figures


def seed_of_fit(seed: int, head: str, table: LabelTable, part: Part, budget: Budget) -> int:
    """Of an attention head and of a backbone each fit begins by chance. Of the others only the inner folds hang on it:
    the same labelled slides then give the same head, in whichever draw."""
    if head == "abmil":
        return seed_of(seed, part.draw, part.fold, budget)
    return seed_of(seed, *(table.items[item].name for item in part.taken(budget)))


def sites_of(table: LabelTable, splits: Splits) -> list[str]:
    """Per item the sites that were left out with it; empty where patients were."""
    return site_names(table) if splits.group == "site" else [""] * len(table.items)


def predictions_of(
    start: str,
    head: str,
    table: LabelTable,
    sites: Sequence[str],
    part: Part,
    budget: Budget,
    shares: NDArray[np.float64],
    backbone: str = "",
) -> Iterator[Prediction]:
    """`shares` (tested items, classes) as rows, in the order of `part.test`; `sites` as `sites_of` has them."""
    for item, row in zip(part.test, shares, strict=True):
        one = table.items[item]
        predicted = table.classes[int(row.argmax())]
        yield Prediction(
            start, head, budget, part.draw, part.fold, one.name, one.patient, one.label, predicted,
            tuple(row.tolist()), backbone, sites[item],
        )  # fmt: skip


def split_facts(table: LabelTable, splits: Splits) -> dict[str, Any]:
    """How the items were split, as run.json keeps it; `pool_of` takes from it what the statistics ask for."""
    tested = [table.items[item] for item in splits.tested]
    pool = [table.items[item] for item in splits.parts[0].pool]
    num_classes = len(table.classes)
    return {
        "group": splits.group,
        "fixed_test_set": splits.num_folds == 0,
        "num_folds": splits.num_folds,
        "num_draws": len({part.draw for part in splits.parts}),
        "budgets": list(splits.budgets),
        "num_tested": len(tested),
        "num_tested_patients": len({item.patient for item in tested}),
        "pool_per_class": len(pool) / num_classes,
        "pool_patients_per_class": len({(item.label, item.patient) for item in pool}) / num_classes,
        **_sites_drawn(table, splits),
        "notes": list(splits.notes),
    }


def _sites_drawn(table: LabelTable, splits: Splits) -> dict[str, float]:
    """With whole sites left out: how many are tested, and what those of the pool are worth."""
    if splits.group != "site":
        return {}
    names = site_names(table)
    of_patient = {table.items[item].patient: names[item] for item in splits.parts[0].pool}
    return {
        "num_tested_sites": len({names[item] for item in splits.tested}),
        "pool_sites": worth_of_sizes(list(of_patient.values())),
    }


# ---- what is given


def _check_starts(starts: Mapping[str, object], heads: Sequence[str], reference: str | None) -> None:
    if not heads or "" in heads:
        raise UsageError(f"heads {heads}: name one or more of {', '.join(HEADS)}")
    if not starts:
        raise UsageError("features: an empty dict; give the features of one model or more, as {name: features}")
    odd = [name for name in starts if not isinstance(name, str) or not name]
    if odd:
        raise UsageError(f"features: the name {odd[0]!r}; must be text, as in {{'resnet50': features}}")
    if reference is not None and reference not in starts:
        raise UsageError(
            f"reference {reference!r}: none of the features{nearest(reference, starts)} ({', '.join(starts)})"
        )


def _numbers(budgets: int | str | Sequence[Any]) -> tuple[int | str, ...]:
    """NumPy's whole numbers as Python's."""
    listed: list[Any] = [budgets] if isinstance(budgets, int | str) else list(budgets)
    return tuple(int(one) if isinstance(one, np.integer) else one for one in listed)


def _check_not_given(**arguments: object) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise UsageError(f"{name}: the labels are a file, which says them; leave {name} out")


def _words(values: object, what: str, count: int | None = None) -> list[str]:
    """Labels, patients, sites, names: text, or whole numbers as text."""
    if isinstance(values, str | Mapping) or not isinstance(values, Iterable):
        shown = repr(values) if isinstance(values, str) else f"a {type(values).__name__}"
        hint = " (a labels.csv is given as Path('labels.csv'))" if what == "labels" else ""
        raise UsageError(f"{what}: {shown}; must be a list or an array, one for each item{hint}")
    listed = list(values)
    if count is not None and len(listed) != count:
        raise UsageError(f"{what}: {len(listed):,} where there are {count:,} labels; give one for each item")
    for number, value in enumerate(listed):
        if not isinstance(value, str | int | np.integer | np.bool_):
            unknown = value is None or value != value
            way_out = "leave this item out" if unknown else "convert it, for example with .astype(str)"
            raise UsageError(
                f"{what}: item {number}: {value!r} ({type(value).__name__}); must be text or whole numbers; {way_out}"
            )
        if isinstance(value, str) != isinstance(listed[0], str):
            raise UsageError(
                f"{what}: item 0 is {listed[0]!r} and item {number} is {value!r}; must be all text or all whole numbers"
            )
    words = [str(value).strip() for value in listed]
    if what in ("labels", "patients", "names") and "" in words:
        raise UsageError(f"{what}: item {words.index('')} is empty; fill it in, or leave the item out")
    return words


def _names_of(starts: Mapping[str, Features], names: Sequence[str] | None, count: int) -> list[str]:
    """As given, else the names of files, else numbers."""
    if names is not None:
        given = _words(names, "names", count)
        twice = next((name for name, times in Counter(given).items() if times > 1), None)
        if twice is not None:
            raise UsageError(f"names: {twice!r} stands twice; each item needs a name of its own")
        return given
    for start, features in starts.items():
        if is_path(features):
            raise UsageError(
                f"features {start!r}: a folder has no order; give names=[...] in the order of the labels, the labels "
                "as Path('labels.csv'), or the files as a list"
            )
    for features in starts.values():
        own = names_of_files(features) if isinstance(features, Sequence) else None
        if own is not None and len(own) == count:
            return own
    return [f"item{number:06d}" for number in range(count)]


def _in_order(features: Features, start: str, names: Sequence[str]) -> list[Piece]:
    """One piece per item, in the order of `names`."""
    pieces = pieces_of(features, start, names)
    if len(pieces) != len(names):
        raise UsageError(
            f"features {start!r}: {len(pieces):,} items where there are {len(names):,} labels; give one label for each "
            "item, in the same order"
        )
    own = names_of_files(pieces)
    if own is not None and own != names and sorted(own) == sorted(names):
        raise UsageError(f"features {start!r}: the files are in another order than the names; list them alike")
    return pieces


def _table(
    labels: Sequence[str], names: Sequence[str], columns: Mapping[str, ArrayLike | None], unit: Unit, mixed: bool
) -> LabelTable:
    """What labels.csv with these columns would say, and refuse."""
    told = {
        what: [""] * len(labels) if one is None else _words(one, what, len(labels)) for what, one in columns.items()
    }
    for what, words in {"label": labels, "patient": told["patients"], "site": told["sites"]}.items():
        refuse_alike("given", what, ((word, f"item {number}") for number, word in enumerate(words) if word))
    for number, patient in enumerate(told["patients"]):
        if reads_unknown(patient):
            raise LabelsError(
                f"patients: item {number} is {patient!r}, and all items with it would count as one patient's; fill in "
                "whose it is, or leave it out"
            )
    for number, side in enumerate(told["split"]):
        if columns["split"] is not None and side.lower() not in ("train", "test"):
            raise LabelsError(f"split: item {number} is {side!r}; must be train or test")
    rows = [
        Row(number, name, label, patient, "" if reads_unknown(site) else site, side.lower())
        for number, (name, label, patient, site, side) in enumerate(
            zip(names, labels, told["patients"], told["sites"], told["split"], strict=True)
        )
    ]
    table = match_labels(rows, names, mixed_patients=mixed or unit != "slide", source="labels", where="what was given")
    return replace(table, unit=unit)


def _from_labels_csv(
    path: Path, starts: Mapping[str, Features], mixed: bool
) -> tuple[LabelTable, list[str], dict[str, list[Piece]]]:
    """The labelled slides that the first start has features of; the others need to have them too."""
    files = {start: _files_by_name(features, start) for start, features in starts.items()}
    first, known = next(iter(files.items()))
    read = read_labels(path)
    if any(row.box for row in read.rows):
        raise LabelsError(f"{path}: labels regions (x,y,width,height), and a file of features is a whole slide's")
    table = match_labels(read.rows, known, mixed_patients=mixed, source=path.name, where=f"the features {first!r}")
    lacking = [
        f"{len(table.missing)} slides of {path.name} have no features, the first {name!r}" for name, _ in table.missing
    ]
    table = replace(table, notes=(*read.notes, *table.notes, *lacking[:1]))
    found = [item.name for item in table.items]
    for start, own in files.items():
        missing = [name for name in found if name not in own]
        if missing:
            raise UsageError(
                f"features {start!r}: {len(missing)} labelled slides are missing, the first {missing[0]!r}"
            )
    return table, found, {start: [own[name] for name in found] for start, own in files.items()}


def _files_by_name(features: Features, start: str) -> dict[str, Path]:
    if is_path(features):
        return files_in(str(features), start)
    names = names_of_files(features) if isinstance(features, Sequence) else None
    if names is None:
        raise UsageError(
            f"features {start!r}: labels.csv names slides, and arrays have no names; give HDF5 files (a folder, or a "
            "list with different names), or the labels as a list"
        )
    assert isinstance(features, Sequence)
    return {name: Path(str(piece)) for name, piece in zip(names, features, strict=True)}


@contextmanager
def _in_python() -> Iterator[None]:
    """Errors name options as the command line has them; here they are arguments."""
    try:
        yield
    except UsageError as error:
        text = OPTION.sub(lambda found: found[1].replace("-", "_"), str(error))
        if text == str(error):
            raise
        raise type(error)(text) from None
