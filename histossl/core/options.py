"""One field of a config is one option: default, help, panel and range stand there, and nowhere else.

    @dataclass(frozen=True)
    class PretrainConfig(Checked):
        lr: float = option(0.0, "Peak learning rate.", METHOD, check=above(0), unset="from the batch size")

The command line (`cli/from_config.py`), TOML files, `run.json`, the report's table of settings and the reference page
`examples/options.md` are made from these fields.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any

from histossl.core.errors import UsageError
from histossl.core.names import trimmed


@dataclass(frozen=True)
class Check:
    """What a value must be, as a function and in words that follow "must be"."""

    holds: Callable[[Any], bool]
    words: str
    known: tuple[str, ...] = ()  # the words that it may be


def nearest(name: str, known: Iterable[str]) -> str:
    """', did you mean X?' for a mistyped name, with X as it is spelt, or nothing. Small letters and large are alike."""
    spelt = {each.casefold(): each for each in known}
    close = difflib.get_close_matches(name.casefold(), list(spelt), n=1, cutoff=0.5)
    return f", did you mean {spelt[close[0]]!r}?" if close else ""


def between(low: float, high: float, words: str = "") -> Check:
    """low <= value <= high; not for nan."""
    return Check(lambda value: low <= value <= high, words or f"{low:g} to {high:g}")


def above(low: float, words: str = "", most: float = math.inf) -> Check:
    """low < value <= most, and finite."""
    return Check(lambda value: low < value <= most and math.isfinite(value), words or f"a number above {low:g}")


def one_of(*known: str) -> Check:
    return Check(lambda value: value in known, f"one of {', '.join(known)}", known)


@dataclass(frozen=True)
class Option:
    """What the command line knows of a field besides its type and its default."""

    help: str
    panel: str = ""  # "": among the first, which most people need
    metavar: str = ""
    flag: str = ""  # "--set": where the option is not named as the field is; "-n/--number" with a short one
    check: Check | None = None
    read: Callable[[str], Any] | None = None  # text -> value, where it is no plain number, word or path
    show: Callable[[Any], str] = str  # value -> the text that `read` takes
    unset: str | None = None  # the default means "worked out", and how: it is not shown, and not to be typed
    positional: bool = False  # an argument of the command: histossl scan DIR

    def name(self, field_name: str) -> str:
        """As it is typed and as messages call it: --batch-size."""
        return self.flag.rpartition("/")[2] or f"--{field_name.replace('_', '-')}"


REQUIRED = MISSING


def option(default: Any, help: str, panel: str = "", **more: Any) -> Any:
    """A field of a config that is an option of the command line; `more` are the fields of `Option`."""
    return field(default=default, metadata={"option": Option(help, panel, **more)})


def option_of(one: Field[Any]) -> Option | None:
    """None of a field that no person sets: what a stage fills in."""
    found: Option | None = one.metadata.get("option")
    return found


def is_required(one: Field[Any]) -> bool:
    return one.default is MISSING and one.default_factory is MISSING


class Checked:
    """A config whose fields are checked when it is made: UsageError names the option, its value and what it takes."""

    def __post_init__(self) -> None:
        for one in fields(self):  # type: ignore[arg-type]
            found, value = option_of(one), getattr(self, one.name)
            if found is None or found.check is None or value is None:
                continue
            if not is_required(one) and type(value) is type(one.default) and value == one.default:
                continue  # also where it stands for "worked out"
            if not found.check.holds(value):
                close = nearest(str(value), found.check.known)
                raise UsageError(f"{found.name(one.name)} {shown(found, value)}: must be {found.check.words}{close}")


def shown(found: Option, value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) and found.show is str else found.show(value)


# ---- how a text becomes a value


def read_list(text: str) -> tuple[str, ...]:
    """'a, b' -> ('a', 'b')."""
    return tuple(trimmed(piece) for piece in text.split(",") if trimmed(piece))


def show_list(values: tuple[Any, ...]) -> str:
    return ",".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)


def numbers(kind: type[int] | type[float], words: str) -> Callable[[str], tuple[Any, ...]]:
    """A reader of '0.5,1': ValueError says what it must be."""

    def read(text: str) -> tuple[Any, ...]:
        try:
            return tuple(kind(piece) for piece in read_list(text))
        except ValueError as error:
            raise ValueError(words) from error

    return read
