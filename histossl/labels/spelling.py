"""Words of labels.csv that a computer tells apart and a person does not: `AC` and `ac`, a site called `NA`, `patients`.

Two spellings of one class are two classes that look alike, two spellings of one patient are a leak, and a misspelt
column is not read at all. None of the three shows in any figure, so they are looked for before one is computed.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence

from histossl.core.errors import LabelsError
from histossl.core.names import differs_unseen, folded, same_to_a_reader

UNKNOWN = frozenset(
    ("?", "??", "-", "--", "na", "n/a", "n.a.", "nan", "none", "null", "unknown", "not known", "missing", "unspecified")
)
OFTEN_CALLED = {
    "slide": (
        "slides",
        "slide_id",
        "slide id",
        "slideid",
        "slide_name",
        "file",
        "filename",
        "file_name",
        "image",
        "wsi",
    ),
    "label": ("labels", "diagnosis", "class", "category", "target", "type", "subtype", "grade"),
    "patient": ("patients", "patient_id", "patient id", "patientid", "case", "case_id", "subject", "subject_id", "pid"),
    "site": ("sites", "site_id", "center", "centre", "hospital", "institution", "lab"),
    "split": ("splits", "set", "fold", "partition", "train_test"),
}
MOST_NAMED = 5  # columns: a clinical table has dozens
ALIKE = 0.8  # share of letters in order, of a column's name and the one that is wanted


def reads_unknown(word: str) -> bool:
    """Whether a cell says that nobody knows: `NA`, `?`, `unknown`."""
    return " ".join(folded(word, loose=True).replace("_", " ").split()) in UNKNOWN


def person(patient: str) -> str:
    """A patient's name without the signs that people put in or leave out: `P.1`, `P#1` and `P1` are one."""
    parted = re.sub(r"(?<=\d)[\W_]+(?=\d)", "\x00", same_to_a_reader(patient, identifier=True))  # 1-11 and 11-1 are two
    return re.sub(r"[^\w\x00]|_", "", parted)


def maybe_one_person(patients: Iterable[str]) -> list[tuple[str, ...]]:
    """Patients whose names differ only in signs that are neither letters nor digits."""
    groups: dict[str, set[str]] = {}
    for patient in patients:
        groups.setdefault(person(patient), set()).add(patient)
    return sorted(tuple(sorted(names)) for key, names in groups.items() if key and len(names) > 1)


def refuse_alike(source: str, what: str, words: Iterable[tuple[str, str]]) -> None:
    """`words` are (word, where it stands). LabelsError where a person reads two of them as one (`same_to_a_reader`)."""
    first: dict[str, tuple[str, str]] = {}
    for word, where in words:
        key = same_to_a_reader(word, identifier=what in ("patient", "site"))
        before, there = first.setdefault(key, (word, where))
        if word != before:
            unseen = " (the two are coded differently, which a screen does not show)"
            raise LabelsError(
                f"{source}: {what} {before!r} ({there}) and {word!r} ({where}) differ only in case, spaces, dashes or "
                f"how a number is written{unseen * differs_unseen(before, word)}, and would count as two; spell them "
                "alike (or, if they are two, name them so that it shows)"
            )


def looks_like(name: str, columns: Sequence[str], known: Iterable[str]) -> str:
    """The column that may be meant by `name`, as it is spelt, of those that are not `known`; empty: none."""
    spelt = {column.strip().lower(): column.strip() for column in columns if column.strip()}
    others = [column for column in spelt if column not in {*known}]
    close = [column for column in others if column in OFTEN_CALLED.get(name, ())]
    close += difflib.get_close_matches(name, others, n=1, cutoff=ALIKE)
    return spelt[close[0]] if close else ""


def unread_columns(columns: Sequence[str], read: Mapping[str, str], known: Iterable[str]) -> list[str]:
    """`read` are the optional columns and what each holds; a line for each that is absent though one looks like it.

    One more for the rest that are not `known`.
    """
    known = {*known, *read}
    header = {column.strip().lower() for column in columns}
    like = {name: looks_like(name, columns, known) for name in read if name not in header}
    said = [
        f"the column {column!r} is not read; if it holds {read[name]}, call it {name!r}"
        for name, column in like.items()
        if column
    ]
    rest = [one.strip() for one in columns if one.strip() and one.strip().lower() not in known]
    rest = [repr(one) for one in rest if one not in like.values()]
    if rest:
        more = f" and {len(rest) - MOST_NAMED} more" if len(rest) > MOST_NAMED else ""
        several = "s" if len(rest) > 1 else ""
        said.append(f"not read: the column{several} {', '.join(rest[:MOST_NAMED])}{more}")
    return said
