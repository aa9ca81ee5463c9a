"""An anonymous workspace: slides, files, folders and patients have pseudonyms in it; one private file tells the names.

    WORKSPACE/anonymous.json    marks it: a digest of the key, and where the file of names lies
    WORKSPACE-names.csv         beside it (or --names FILE): the key, and pseudonym, name, file of everything hidden

A pseudonym is a keyed hash, so it is the same in every run, and in every workspace that has the same file of names.
In memory names are names; they are hidden where a file is written (archive.csv, run.json, a page) and put back where
it is read. The terminal shows names.
"""

from __future__ import annotations

import csv
import hashlib
import hmac
import json
import mimetypes
import os
import re
import secrets
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from histossl.core.errors import MismatchError, StoreError, UsageError
from histossl.core.text import CsvReader, write_cells
from histossl.core.workspace import Workspace, locked, written_aside

MARKER = "anonymous.json"
OLDER = "anonymous-names.csv"  # lay within the workspace, whose other files told the names
HERE = "WORKSPACE"  # its own place, in what is written below it
PSEUDONYM = re.compile(r"\b(?:slide|file|patient|path|name)-[0-9a-f]{16}\b")
GIVEN = re.compile(r"\b(?:path|name)-[0-9a-f]{16}\b")  # what a person typed
SHORTEST, DIGITS = 2, 4  # letters of a name that is looked for in a sentence; digits, if it has nothing else
LOCK_S = 60.0
# What of a run's settings and record is a file, a slide's name, or a command.
FILES = ("labels", "regions", "slides", "mpp_csv", "model")
SLIDES = ("pretraining_slides", "excluded_slides", "tested_slides", "slides")
FILE_OPTIONS = ("--slides", "--labels", "--regions", "--exclude", "--mpp-csv", "--names", "--config", "--model")
QUOTED = re.compile(r"(?<!\w)(['\"])(?=\S)(.+?)\1(?!\w)")
ABSOLUTE = re.compile(r"(?<![\w.>/-])/[^\s'\",;:()/]+(?:/[^\s'\",;:()/]+)+")


class Names:
    """The pseudonyms of a workspace; without a key it is not anonymous, and every name stays as it is."""

    def __init__(self, root: Path, path: Path = Path(), key: bytes = b"") -> None:
        self.root, self.path, self.key = root, path, key
        self._given: dict[str, tuple[str, str]] = {}  # pseudonym: name, file of a slide
        self._written = 0
        self._known: dict[str, str] = {}  # names, and parts of them, as a sentence may hold them
        self._lengths: dict[str, set[int]] = {}  # of these, by their first letters
        # A ledger is written again and again: what was worked out for it is kept.
        self._made: dict[tuple[str, str, str], str] = {}
        self._reasons: dict[str, str] = {}

    # ---- from a name to its pseudonym

    def slide(self, slide: str, file: str = "") -> str:
        return self._pseudonym("slide", slide, file)

    def file(self, file: str) -> str:
        return self._pseudonym("file", file)

    def patient(self, patient: str) -> str:
        return self._pseudonym("patient", patient)

    def place(self, path: str) -> str:
        """Of a file or folder anywhere; what lies in the workspace keeps its place in it."""
        if not self.key or not path or path == HERE or path.startswith(f"{HERE}/"):
            return path
        if ("path", path, "") in self._made and Path(path).is_absolute():
            return self._made["path", path, ""]
        full = Path(path).resolve()
        if full == self.root or full.is_relative_to(self.root):
            return (PurePosixPath(HERE) / full.relative_to(self.root).as_posix()).as_posix()
        return self._pseudonym("path", path)

    def _pseudonym(self, kind: str, name: str, file: str = "") -> str:
        if not self.key or not name or PSEUDONYM.fullmatch(name):
            return name
        if (kind, name, file) in self._made:
            return self._made[kind, name, file]
        pseudonym = f"{kind}-{hmac.new(self.key, f'{kind} {name}'.encode(), hashlib.sha256).hexdigest()[:16]}"
        known = self._given.get(pseudonym)
        if known is None or (file and known[1] != file):
            self._given[pseudonym] = (name, file)
            self._written = -1
            self._learn(pseudonym, name)
        self._made[kind, name, file] = pseudonym
        return pseudonym

    def _learn(self, pseudonym: str, name: str) -> None:
        self._reasons.clear()
        path, names = PurePosixPath(name), {name}
        if pseudonym.startswith(("slide-", "file-")):
            names |= {path.name, path.stem, path.name.split(".")[0]}
            names |= {path.suffix, path.suffix.lower()} - _USUAL_SUFFIXES
        for one in names:
            if len(one) >= (DIGITS if one.isdecimal() else SHORTEST):
                self._known.setdefault(one, pseudonym)
                self._lengths.setdefault(one[:SHORTEST], set()).add(len(one))

    # ---- from a pseudonym to its name

    def name_of(self, pseudonym: str) -> str:
        """As it is where it is none of this workspace's."""
        return self._given.get(pseudonym, (pseudonym, ""))[0]

    def file_of(self, pseudonym: str) -> str:
        """The file that a slide's pseudonym stands for; empty if it is not known."""
        return self._given.get(pseudonym, ("", ""))[1]

    def slides(self) -> dict[str, str]:
        """Pseudonym by slide."""
        return {name: one for one, (name, _) in self._given.items() if one.startswith("slide-")}

    def with_names(self, text: str) -> str:
        """For a person: names in place of all pseudonyms."""
        return PSEUDONYM.sub(lambda found: self.name_of(found[0]), text) if self.key else text

    def revealed(self, value: Any) -> Any:
        """A record as it was before `hidden`, for a run that goes on; slides and patients are pseudonyms in it too."""
        if not self.key:
            return value
        if isinstance(value, str):
            value = GIVEN.sub(lambda found: self.name_of(found[0]), value)
            return re.sub(rf"^{HERE}(?=/|$)", lambda _: str(self.root), value)
        if isinstance(value, Mapping):
            return {name: self.revealed(one) for name, one in value.items()}
        return [self.revealed(one) for one in value] if isinstance(value, list) else value

    # ---- whole texts and records

    def sentence(self, text: str) -> str:
        """A text in which no name is left that is known: every file, slide, folder and patient, and absolute paths."""
        if not self.key or not text:
            return text
        text = text.replace(str(self.root), HERE)
        text = self._cover(text)
        return ABSOLUTE.sub(lambda found: self.place(found[0]), text)

    def reason(self, text: str) -> str:
        """The same of what a library or a file's own fields said: quoted words may be anybody's name."""
        if not self.key or not text:
            return text
        if text not in self._reasons:
            said = self.sentence(text)
            said = QUOTED.sub(lambda found: found[0] if PSEUDONYM.fullmatch(found[2]) else "'...'", said)
            self._reasons[text] = said
        return self._reasons[text]

    def _cover(self, text: str) -> str:
        covered, start = [], 0
        while start < len(text):
            if start and text[start - 1].isalnum() and text[start].isalnum():
                covered.append(text[start])
                start += 1
                continue
            pseudonym = PSEUDONYM.match(text, start)
            name = pseudonym[0] if pseudonym else next(self._names_at(text, start), "")
            covered.append(self._known.get(name, name) or text[start])
            start += max(1, len(name))
        return "".join(covered)

    def _names_at(self, text: str, start: int) -> Iterator[str]:
        """Known names that stand there as whole words, the longest first."""
        for length in sorted(self._lengths.get(text[start : start + SHORTEST], ()), reverse=True):
            name, rest = text[start : start + length], text[start + length : start + length + 1]
            if name in self._known and not (name[-1].isalnum() and rest.isalnum()):
                yield name

    def hidden(self, record: Any) -> Any:
        """A record (run.json, a model's) as it may be written, and the file of names with all it now needs."""
        if not self.key:
            return record
        self._hidden(record)  # once for the names in it, once with all of them known
        hidden = self._hidden(record)
        self.write()
        return hidden

    def _hidden(self, value: Any, key: str = "") -> Any:
        if isinstance(value, Mapping):
            of = self.slide if key == "contents" else str  # of slides
            return {of(str(name)): self._hidden(one, str(name)) for name, one in value.items()}
        if key == "command":
            return self.command(value)
        if key == "commands":
            commands = [self.command(one) for one in value]
            return [one for number, one in enumerate(commands) if one not in commands[:number]]
        if isinstance(value, list | tuple):
            if key in SLIDES:
                return [self.slide(str(one)) for one in value]
            return [self._hidden(one, key) for one in value]
        if not isinstance(value, str) or not value:
            return value
        if key == "like_slides":
            return self._pseudonym("name", value)
        return self.place(value) if key in FILES else self._word(value)

    def _word(self, word: str) -> str:
        """One setting: a path, or several parted by , = or +; or plain words."""
        if _is_path(word):
            return self.place(word)
        pieces = re.split(r"([,=+])", word)
        if len(pieces) > 1 and any(map(_is_path, pieces)):
            return "".join(self.place(one) if _is_path(one) else one for one in pieces)
        return self.sentence(word) if " " in word else word  # `slide` is a unit, whatever a file is called

    def command(self, words: Sequence[str]) -> list[str]:
        """A command line without the paths and names that a person typed."""
        if not self.key:
            return list(words)
        hidden, option = [], ""
        for number, word in enumerate(words):
            if number == 0:
                hidden.append(Path(word).name)
            elif number == 1:  # the command's own name
                hidden.append(word)
            elif word.startswith("--") and "=" in word:
                option, _, value = word.partition("=")
                hidden.append(f"{option}={self._argument(option, value)}")
                option = ""
            elif word.startswith("-w") and len(word) > 2:
                hidden.append(f"-w{HERE}")
            elif re.match(r"--?[a-zA-Z]", word):
                hidden.append(word)
                option = word
            else:
                hidden.append(self._argument(option, word))
                option = ""
        return hidden

    def _argument(self, option: str, value: str) -> str:
        if option in ("-w", "--workspace"):
            return HERE
        if option == "--like-slides":
            return ",".join(self._pseudonym("name", one.strip()) for one in value.split(","))
        return self.place(value) if option in FILE_OPTIONS or _exists(value) else self._word(value)

    def kinds(self, suffixes: Mapping[str, int]) -> Counter[str]:
        """Counts of file types; a strange one may be a name's end (`Doe.Jane`)."""
        counts: Counter[str] = Counter()
        for suffix, count in suffixes.items():
            usual = not self.key or suffix.lower() in _USUAL_SUFFIXES or suffix == "no suffix"
            counts[suffix if usual else "others"] += count
        return counts

    # ---- the file

    def write(self) -> None:
        """What is new joins what the file holds by then: nothing that it ever held is lost."""
        if not self.key or self._written == len(self._given):
            return
        with _alone_at(self.path):
            if self.path.exists():
                before = _read(self.path)
                _refuse_other_key(self.path, before, self.root, key_digest(self.key))
                self._given = before._given | self._given
            _write(self.path, self.key, self._given)
        self._written = len(self._given)
        _kept[self.root] = (_stamp(self.path), self)

    def take(self, given: Mapping[str, tuple[str, str]]) -> None:
        self._given = dict(given)
        self._written = len(self._given)
        for pseudonym, (name, _) in given.items():
            self._learn(pseudonym, name)


_USUAL_SUFFIXES = {
    *mimetypes.MimeTypes().types_map[True],
    *(".svs", ".ndpi", ".scn", ".bif", ".mrxs", ".svslide", ".vms", ".vmu", ".dcm", ".czi", ".ome", ".geojson", ".dat"),
    *(".tif", ".tiff", ".qptiff", ".btf", ".tf2", ".tf8", ".gtif", ".ini", ".db", ".gz", ".qpdata", ".qpproj", ".md"),
    *(".isyntax", ".kfb", ".lif", ".sdpc", ".tron", ".vsi", ".zarr", ".zvi", ".xlsx", ".log", ".opt", ".ets", ".md5"),
}


def _is_path(text: str) -> bool:
    """Whether a setting is a file or folder: by how it begins, or by what is there."""
    if len(text) > 4096 or "\n" in text or "\0" in text:
        return False
    if text.startswith((os.sep, f"~{os.sep}", f".{os.sep}", f"..{os.sep}")) or re.match(r"[A-Za-z]:\\", text):
        return True
    return (os.sep in text or "." in text) and text.strip(".") != "" and _exists(text)


def _exists(text: str) -> bool:
    try:
        return Path(text).exists()
    except (OSError, ValueError):
        return False


# ---- a workspace and its file of names


def key_digest(key: bytes) -> str:
    """What the workspace keeps of the key: enough to know it again, nothing to make a pseudonym with."""
    return hashlib.sha256(b"histossl names " + key).hexdigest()[:16]


def is_anonymous(workspace: Workspace) -> bool:
    return (workspace.root / MARKER).exists()


def settle(workspace: Workspace, anonymize: bool = False, given: Path | None = None) -> Names:
    """The names of a workspace for a command that is about to read or write it; a new one becomes anonymous here.

    `given` is --names. An error where the file of names is gone, or is another's.
    """
    root = workspace.root.resolve()
    if (root / OLDER).exists():
        raise MismatchError(
            f"{root / OLDER}: of an older histossl, whose archive.csv and commands here hold the slides' names; use "
            "another --workspace, with --anonymize"
        )
    if given is not None and given.resolve().is_relative_to(root):
        raise UsageError(f"--names {given}: lies in the workspace, which it must not be given away with; name another")
    if not is_anonymous(workspace):
        if not anonymize:
            if given is not None:
                raise UsageError(f"--names {given}: {workspace.root} is not anonymous; add --anonymize to a new one")
            return Names(root)
        if workspace.archive_csv.exists() or any(workspace.tiles.rglob("*.zip")):
            raise MismatchError(
                f"{workspace.root}: holds names of slides already, anonymize was False, now True; use another "
                "--workspace, anonymous from its first command on"
            )
        _begin(root, (given or root.with_name(f"{root.name}-names.csv")).resolve())
    names = _opened(root, given)
    from histossl.core import console  # which brings rich: not where nothing is printed

    console.named[:] = [names.with_names]
    return names


def names_of(workspace: Workspace) -> Names:
    return settle(workspace) if is_anonymous(workspace) else Names(workspace.root.resolve())


def names_above(path: Path) -> Names:
    """Of the workspace that a file lies in."""
    for folder in path.absolute().parents[:5]:
        if (folder / MARKER).exists():
            return names_of(Workspace(folder))
    return Names(path.parent.resolve())


def _begin(root: Path, path: Path) -> None:
    with _alone_at(path):
        if not path.exists():
            _write(path, secrets.token_bytes(32), {})
        key = _read(path).key
    _mark(root, key_digest(key), path)
    from histossl.core import console

    console.say(f"names of slides and patients: {path} (private: keep it, and do not give it away with {root})")


def _mark(root: Path, digest: str, path: Path) -> None:
    with written_aside(root / MARKER) as aside:
        aside.write_text(json.dumps({"key": digest, "names": str(path)}) + "\n", encoding="utf-8")


_kept: dict[Path, tuple[tuple[int, ...], Names]] = {}  # read once, for as long as the file is the same


def _stamp(path: Path) -> tuple[int, ...]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size, status.st_ino


def _opened(root: Path, given: Path | None) -> Names:
    try:
        marker = json.loads((root / MARKER).read_text(encoding="utf-8"))
        digest, recorded = str(marker["key"]), Path(str(marker["names"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"{root / MARKER}: cannot be read ({error}); restore it, or use another --workspace"
        ) from error
    path = recorded if given is None else given.resolve()
    if not path.exists():
        raise StoreError(
            f"{path}: gone, and with it the key to the names in {root}; restore it, or name it with --names FILE "
            f"(who was given the workspace without it deletes {root / MARKER}, and hides names no more)"
        )
    stamp, (before, names) = _stamp(path), _kept.get(root, ((), Names(root)))
    if before != stamp or names.path != path or key_digest(names.key) != digest:
        read = _read(path)
        _refuse_other_key(path, read, root, digest)
        names = Names(root, path, read.key)
        names.take(read._given)
        _kept[root] = (stamp, names)
    if path != recorded:
        _mark(root, digest, path)
    return names


def _refuse_other_key(path: Path, names: Names, root: Path, digest: str) -> None:
    if key_digest(names.key) != digest:
        raise MismatchError(
            f"{path}: holds the names of another workspace than {root}, for its key is another; pass the one that was "
            "made with it as --names FILE"
        )


def _read(path: Path) -> Names:
    try:
        with path.open(encoding="utf-8", newline="") as text:
            key = bytes.fromhex(text.readline().split()[-1])
            given = {row["pseudonym"]: (row["name"], row["file"]) for row in CsvReader(text)}
        if len(key) < 16:
            raise ValueError("no key")
    except (OSError, ValueError, IndexError, KeyError, csv.Error) as error:
        raise StoreError(
            f"{path}: is no file of names, or is damaged ({error}); restore it, or give another --names FILE"
        ) from error
    names = Names(Path(), path, key)
    names._given = given
    return names


def _write(path: Path, key: bytes, given: Mapping[str, tuple[str, str]]) -> None:
    with written_aside(path) as aside:
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="") as text:
            text.write(f"# keep this file, and keep it private: it names the slides. key {key.hex()}\n")
            write_cells(text, ["pseudonym", "name", "file"], [[one, *given[one]] for one in sorted(given)])


@contextmanager
def _alone_at(path: Path) -> Iterator[None]:
    """One process at a time changes a file of names: two workspaces may share one."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_name(f".{path.name}.lock").open("ab")
    except OSError as error:
        raise StoreError(f"{path}: cannot be written ({error.strerror}); give another place as --names FILE") from error
    with lock:
        until_s = time.monotonic() + LOCK_S
        while not locked(lock.fileno()):
            if time.monotonic() > until_s:
                raise StoreError(f"{path}: another process holds it for {LOCK_S:.0f} s now; try again when it is done")
            time.sleep(0.05)
        yield
