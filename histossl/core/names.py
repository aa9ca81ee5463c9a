"""When two names are one: files whose names are coded or cased differently, and words that a reader cannot tell apart.

A Mac writes the "ö" of Köln as two code points (Unicode NFD), a spreadsheet as one (NFC). Every name that comes from a
person or a table is compared with names of files here, and nowhere else.

    path_key("Case1\\KÖLN-7.svs ")    ("case1", "köln-7.svs"): the same for every spelling of one path
    letters("Köln_7") == letters("köln-7")         what differs is no identity; may be offered as "did you mean"
    same_to_a_reader("G01") == same_to_a_reader("g 1")     would count as two; is refused
"""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal
from typing import Literal

DASHES = dict.fromkeys(map(ord, "\u00ad\u2010\u2011\u2012\u2013\u2014\u2015\u2043\u2212\ufe58\ufe63\uff0d"), "-")
QUOTES = {
    **dict.fromkeys(map(ord, "\u2018\u2019\u201a\u201b\u2032\u00b4\u0060\u2039\u203a"), "'"),
    **dict.fromkeys(map(ord, "\u201c\u201d\u201e\u201f\u2033\u00ab\u00bb"), '"'),
}
# Small Cyrillic and Greek letters that look like a Latin one, small or large (В, Н and Т do, as в, н and т do not).
LOOK_LATIN = str.maketrans("авеікмнорстухѕјαεικορτχ", "abeikmhopctyxsjaeikoptx")
NUMBER = re.compile(r"[+-]?(\d+(?:\.\d*)?|\.\d+)(e[+-]?\d{1,3})?")
THOUSANDS = re.compile(r"[1-9]\d{0,2}(?:,\d{3})+")


def trimmed(text: str) -> str:
    """Without the white space, byte order marks and zero-width characters around it."""
    bare = text.strip()
    while bare and (_hidden(bare[0]) or _hidden(bare[-1])):
        bare = (bare[1:] if _hidden(bare[0]) else bare[:-1]).strip()
    return bare


def path_key(name: str, loose: bool = False) -> tuple[str, ...]:
    """The folders and the file of a path, the same in every Unicode form, case and operating system.

    `loose`: also for dashes of any length, full-width letters, superscripts and hidden characters.
    """
    parts = (folded(trimmed(part), loose) for part in name.replace("\\", "/").split("/"))
    return tuple(part for part in parts if part not in ("", ".")) or ("",)


def exact_key(name: str) -> str:
    """A path as it is written, in one Unicode form."""
    return unicodedata.normalize("NFC", trimmed(name).replace("\\", "/").removeprefix("./"))


def letters(name: str) -> str:
    """The letters, digits and signs of a name. Case, Unicode form, dashes and spaces that part words are set aside.

    Between digits a dash or a space stays (1-11 is not 11-1), and so does the minus sign of a number.
    """
    text = folded(name, loose=True).translate(QUOTES).translate(LOOK_LATIN)
    bare = text.strip(" '\"").rstrip(".,;:").strip(" '\"") or text
    return re.sub(r"[\s_-]+", _joint, bare)


def same_to_a_reader(name: str, identifier: bool = False) -> str:
    """What names share that a person reads as one word: `letters`, and numbers by their value (0, 0.0 and 00; G1, G01).

    Of an `identifier` (a patient, a site) decimals are kept: 1.1 and 1.10 may be two patients of one site.
    """
    text = letters(name)
    if THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    text = re.sub(r"(?<=\d),(?=\d{1,2}(?!\d))", ".", text)
    if not identifier and (value := _value(text)):
        return value
    text = re.sub(r"(?<![\d.,])(\d+)\.0+(?![\d.,])", r"\1", text)
    return re.sub(r"(?<![\d.,])0+(?=\d)", "", text)


def differs_unseen(one: str, other: str) -> bool:
    """Whether two names that are not equal look equal on a screen: other code points for the same shapes."""

    def shapes(name: str) -> list[tuple[str, bool]]:
        seen = (letter for letter in unicodedata.normalize("NFKC", name) if not _hidden(letter))
        return [(folded(letter, loose=True).translate(LOOK_LATIN), letter.isupper()) for letter in seen]

    return one != other and shapes(one) == shapes(other)


def folded(text: str, loose: bool) -> str:
    """Text in small letters and one Unicode form; `loose` as in `path_key`."""
    form: Literal["NFC", "NFKC"] = "NFKC" if loose else "NFC"
    text = unicodedata.normalize(form, text)
    if loose and not text.isascii():
        text = "".join(one for one in text.translate(DASHES) if not _hidden(one))
    return unicodedata.normalize(form, text.casefold())


def _hidden(character: str) -> bool:
    """Zero-width characters, byte order marks, direction marks, variation selectors."""
    return not character.isascii() and (unicodedata.category(character) == "Cf" or "\ufe00" <= character <= "\ufe0f")


def _joint(run: re.Match[str]) -> str:
    """What is left of the dashes, spaces and underscores at one place of a name."""
    text, dash = run.string, "-" * ("-" in run.group())
    if run.start() == 0 or run.end() == len(text):
        return dash
    before, after = text[run.start() - 1], text[run.end()]
    if before.isdigit() and after.isdigit():
        return dash or " "
    if after.isdigit() and re.fullmatch(r"[\s_]+-", run.group()):
        return " -"
    return "" if before.isalnum() and after.isalnum() else dash


def _value(text: str) -> str:
    """A number's value, exact at any length; empty if it is none. 0e1 is a name, as hashes are."""
    match = NUMBER.fullmatch(text)
    if not match:
        return ""
    sign, digits, exponent = Decimal(text).as_tuple()
    figures = "".join(map(str, digits)).lstrip("0")
    if not figures:
        return "" if match[2] else "0"
    assert isinstance(exponent, int)
    plain = figures.rstrip("0")
    return f"{'-' * sign}{plain}e{exponent + len(figures) - len(plain)}"
