"""Walk an archive: which files are slides, and what each is called.

A slide's id is its path in the archive without its suffix ("case1/A1"). What several files make up together (a DICOM
series, MIRAX with its folder, Hamamatsu VMS with its JPEGs) is one slide. Nothing is opened but headers.
"""

from __future__ import annotations

import configparser
import os
import stat
import struct
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

from histossl.core.errors import HistosslError, UsageError

OPENSLIDE_SUFFIXES = (".svs", ".ndpi", ".scn", ".bif", ".mrxs", ".svslide", ".vms", ".vmu", ".dcm", ".czi")
TIFF_SUFFIXES = (".tif", ".tiff", ".qptiff", ".btf", ".tf2", ".tf8", ".gtif")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
SUFFIXES = frozenset(OPENSLIDE_SUFFIXES + TIFF_SUFFIXES + IMAGE_SUFFIXES)
VOLUME = "VOLUME"
STALLED = "the disk gave no answer about it; try again when it is connected"
NOT_REGULAR = "not a regular file (a named pipe, a socket or a device)"
UNWRITABLE = (
    "its name, or that of a folder it lies in, has a line break in it or is not UTF-8 (written here with backslashes); "
    "rename it"
)
LINE_BREAKS = {ord("\n"): "\\n", ord("\r"): "\\r"}  # a reader of the ledger may take either for the end of a row
STALL_S = 60.0  # a file whose header, or a folder whose listing, takes longer is left out: a disk that does not answer
MAX_STALLS = 3  # more of them, and it is the disk's fault
TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


@dataclass(frozen=True)
class SlideFile:
    """One slide of the archive: the file to open, and the slide's id. `problem` if it is known not to be one."""

    path: Path
    slide: str
    problem: str = ""
    note: str = ""  # worth a warning, though it can be opened
    parts: tuple[Path, ...] = ()  # of a DICOM series or a Hamamatsu VMS: all its files, `path` among them


@dataclass
class Walk:
    """What a folder holds: slides, and how many other files of which suffix were passed by."""

    root: Path
    found: list[SlideFile] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)


def find_slides(directory: Path) -> list[SlideFile]:
    """The slides of a folder and all its subfolders, sorted by id. Files that cannot be opened are not among them."""
    return [one for one in walk(directory).found if not one.problem]


def relative(path: Path, root: Path) -> str:
    """A path in the archive with /; line breaks and what is not UTF-8 as backslash escapes: it can be written."""
    return _writable(path.relative_to(root).as_posix())


def _writable(name: str) -> str:
    return name.translate(LINE_BREAKS).encode("utf-8", "backslashreplace").decode("utf-8")


def walk(directory: Path, stall_s: float = STALL_S) -> Walk:
    """Every file once, links followed without going in circles.

    A file or folder that does not answer for `stall_s` is found with that as its problem, and the walk goes on without
    it; HistosslError if there are several.
    """
    directory = Path(directory)
    stalled: set[Path] = set()
    while True:
        visit = _Visit(frozenset(stalled))
        outcome: list[Walk | Exception] = []
        # A thread, since nothing else outlives a system call that never returns. One that hangs is left behind.
        thread = threading.Thread(target=_walk_into, args=(directory, visit, outcome), daemon=True)
        thread.start()
        while thread.is_alive() and visit.waited_s() < stall_s:
            thread.join(min(1.0, max(0.01, stall_s - visit.waited_s())))
        if outcome:
            if isinstance(outcome[0], Exception):
                raise outcome[0]
            return outcome[0]
        if not thread.is_alive():
            continue
        stalled.add(visit.path)
        if visit.path == directory or len(stalled) > MAX_STALLS:
            raise HistosslError(f"{visit.path}: the disk gave no answer for {stall_s:g} s; is it connected?")


class _Visit:
    """Notes what a walk is looking at. False if that has stalled before."""

    def __init__(self, stalled: frozenset[Path]) -> None:
        self._stalled, self.path, self._since_s = stalled, Path(), time.monotonic()

    def __call__(self, path: Path) -> bool:
        self.path, self._since_s = path, time.monotonic()
        return path not in self._stalled

    def waited_s(self) -> float:
        return time.monotonic() - self._since_s


def _walk_into(directory: Path, visit: _Visit, outcome: list[Walk | Exception]) -> None:
    try:
        outcome.append(_walked(directory, visit))
    except Exception as error:  # it is raised where the walk was asked for
        outcome.append(error)


def _walked(directory: Path, visit: _Visit) -> Walk:
    visit(directory)
    if not directory.exists():
        raise UsageError(f"{directory}: no such folder")
    if not directory.is_dir():
        raise UsageError(f"{directory}: a file, not a folder; give the folder that holds the slides")
    result = Walk(directory)
    files: list[tuple[Path, str, str]] = []  # path, problem, note
    parts: dict[Path, tuple[Path, ...]] = {}
    series: dict[str, list[_Series]] = defaultdict(list)
    like_slides: list[Path] = []  # folders by their name
    for folder, names, problem in _folders(directory, visit):
        if problem:
            files.append((folder, problem, ""))
            continue
        files += _slides_of(folder, names, result.ignored, visit, parts, series)
        if folder != directory and folder.suffix.lower() in SUFFIXES - {".dcm"}:
            like_slides.append(folder)
    for folder in like_slides:
        if not any(path.is_relative_to(folder) for path, _, _ in files):
            files.append((folder, "a folder named like a slide, without a slide in it", ""))
    for group in series.values():
        files = _one_of(group, files, directory) if len(group) > 1 else files
    result.found = [replace(one, parts=parts.get(one.path, ())) for one in _named(directory, files)]
    return result


def _folders(root: Path, visit: _Visit) -> Iterator[tuple[Path, list[str], str]]:
    """(folder, names of its files, problem). Real folders go before links to them, so that paths stay stable."""
    seen: set[tuple[int, int]] = set()
    waiting, links = [root], list[Path]()
    while waiting or links:
        folder = waiting.pop() if waiting else links.pop(0)
        if not visit(folder):
            yield folder, [], f"{STALLED}; its slides are left out"
            continue
        try:
            status = folder.stat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            yield folder, [], f"the folder cannot be listed ({error.strerror}); its slides are left out"
            continue
        files: list[str] = []
        for entry in entries:
            if entry.name.startswith("."):
                continue
            try:
                is_folder = entry.is_dir()
            except OSError as error:
                yield folder / entry.name, [], f"a link that cannot be followed ({error.strerror})"
                continue
            if not is_folder:
                files.append(entry.name)
            elif entry.is_symlink():
                links.append(folder / entry.name)
            else:
                waiting.append(folder / entry.name)
        yield folder, files, ""


@dataclass(frozen=True)
class _Series:
    """What one folder holds of a DICOM series."""

    path: Path  # the file to open
    instances: frozenset[str]
    has_volume: bool


def _one_of(group: list[_Series], files: list[tuple[Path, str, str]], root: Path) -> list[tuple[Path, str, str]]:
    """A DICOM series is one slide, also where it lies in several folders: that of the folder with its finest level.

    OpenSlide looks for the rest of a series beside the file that it opens, no further. A folder with the very same
    instances is a copy; whether it is whole, its content will tell.
    """
    volumes = [one for one in group if one.has_volume]
    if not volumes:
        return files
    main = min(volumes, key=lambda one: (-dicom_columns(one.path), -len(one.instances), one.path))
    at = relative(main.path, root)
    told: dict[Path, tuple[str, str]] = {}
    for one in group:
        if one is main:
            continue
        if one.instances == main.instances:
            told[one.path] = "", f"the same DICOM series as {at}"
            continue
        told[one.path] = f"part of the DICOM series of {at}, in another folder; put all its files into one folder", ""
        if not one.instances <= main.instances:
            beside = relative(one.path.parent, root)
            note = f"its DICOM series goes on in another folder ({beside}), which is not read; put all into one"
            told[main.path] = "", note
    return [(path, *told.get(path, (problem, note))) for path, problem, note in files]


def _slides_of(
    folder: Path,
    names: list[str],
    ignored: Counter[str],
    visit: _Visit,
    parts: dict[Path, tuple[Path, ...]],
    all_series: dict[str, list[_Series]],
) -> list[tuple[Path, str, str]]:
    """The slides among a folder's files; companions of other files are noted in `parts`, the rest is counted."""
    companions = _companions(folder, names, visit, parts)
    files: list[tuple[Path, str, str]] = []
    series: dict[str, list[tuple[Path, str, str]]] = defaultdict(list)
    for name in names:
        path = folder / name
        suffix = path.suffix.lower()
        if name in companions:
            continue
        known = suffix in SUFFIXES
        if not visit(path):
            files.append((path, STALLED, ""))
            continue
        if known and _irregular(path):
            files.append((path, NOT_REGULAR, ""))
            continue
        head = _head(path)
        if head[128:132] == b"DICM":
            uid, kind, instance = dicom_series(path)
            if uid:
                series[uid].append((path, kind, instance))
            elif known:
                files.append((path, "a DICOM file without a series; not a slide", ""))
            else:
                ignored[_writable(suffix) or "no suffix"] += 1
        elif known:
            files.append((path, "", ""))
        elif head[:4] in TIFF_MAGIC:
            files.append((path, "", f"its suffix {suffix or '(none)'} is no slide's, its content is a TIFF"))
        else:
            ignored[_writable(suffix) or "no suffix"] += 1
    for uid, instances in series.items():
        # A label or an overview is an instance of the series like the levels are; it is never the one to open.
        volumes = [path for path, kind, _ in instances if VOLUME in kind.split("\\")]
        uids = frozenset(instance or str(path) for path, _, instance in instances)
        all_series[uid].append(_Series(volumes[0] if volumes else instances[0][0], uids, bool(volumes)))
        if volumes:
            files.append((volumes[0], "", ""))
            parts[volumes[0]] = tuple(path for path, *_ in instances)
        else:
            files.append((instances[0][0], "a DICOM series without a volume image (no whole-slide levels)", ""))
    return files


def _companions(folder: Path, names: list[str], visit: _Visit, parts: dict[Path, tuple[Path, ...]]) -> set[str]:
    """Files that belong to another file: JPEGs of a Hamamatsu VMS, data of a MIRAX folder."""
    if "Slidedat.ini" in names:
        return set(names)
    found: set[str] = set()
    for name in names:
        hamamatsu = Path(name).suffix.lower() in (".vms", ".vmu")
        if hamamatsu and visit(folder / name) and not _irregular(folder / name):
            parser = configparser.ConfigParser(strict=False, interpolation=None)
            try:
                parser.read(folder / name, encoding="latin-1")
            except (configparser.Error, OSError):
                continue
            values = {value for section in parser.sections() for _, value in parser.items(section)}
            own = (values & set(names)) - {name}
            parts[folder / name] = tuple(folder / each for each in sorted({*own, name}))
            found |= own
    return found


def _named(root: Path, files: list[tuple[Path, str, str]]) -> list[SlideFile]:
    """Ids without suffix; those that collide all keep theirs, so that none takes another's name."""
    per_folder = Counter(path.parent for path, _, _ in files)
    ids: list[str] = []
    for path, problem, _ in files:
        name = relative(path, root)
        is_dicom = problem != STALLED and path.suffix.lower() in (".dcm", "") and _head(path)[128:132] == b"DICM"
        if is_dicom and path.parent != root and per_folder[path.parent] == 1:
            ids.append(relative(path.parent, root))  # a folder that is one slide gives it its name
        else:
            ids.append(name.removesuffix(path.suffix))
    # A1.svs and a1.svs are two files here and one zip on a case-blind disk.
    counts = Counter(one.casefold() for one in ids)
    named = [
        SlideFile(path, relative(path, root) if counts[one.casefold()] > 1 else one, problem or _misnamed(path), note)
        for (path, problem, note), one in zip(files, ids, strict=True)
    ]
    return sorted(named, key=lambda one: (one.slide, one.path))


def _misnamed(path: Path) -> str:
    return "" if str(path) == _writable(str(path)) else UNWRITABLE


def _irregular(path: Path) -> bool:
    """A named pipe, a socket, a device: opening one may wait for ever. What cannot be asked is opened, to say why."""
    try:
        return not stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return False


def _head(path: Path) -> bytes:
    if _irregular(path):
        return b""
    try:
        with path.open("rb") as file:
            return file.read(132)
    except OSError:
        return b""  # opening it will say why, in its own row


# ---- DICOM, as little of it as naming needs

_LONG = frozenset([b"OB", b"OW", b"OF", b"OD", b"OL", b"OV", b"SQ", b"UC", b"UR", b"UT", b"UN", b"SV", b"UV"])
_SEQUENCE_END, _ITEM_END = (0xFFFE, 0xE0DD), (0xFFFE, 0xE00D)


_SYNTAX, _TYPE, _INSTANCE = (0x0002, 0x0010), (0x0008, 0x0008), (0x0008, 0x0018)
_SERIES, _COLUMNS = (0x0020, 0x000E), (0x0048, 0x0006)


def dicom_series(path: Path) -> tuple[str, str, str]:
    """(SeriesInstanceUID, ImageType, SOPInstanceUID) of a DICOM file; empty if it has none or is damaged."""
    found = _elements(path, (_TYPE, _INSTANCE, _SERIES))
    if _SERIES not in found:
        return "", "", ""
    text = {tag: value.decode("latin-1").strip("\0 ") for tag, value in found.items()}
    return text[_SERIES], text.get(_TYPE, ""), text.get(_INSTANCE, "")


def dicom_columns(path: Path) -> int:
    """Width in pixels of the finest level of a DICOM series among the files of this one's folder; 0 if none says it."""
    mine = dicom_series(path)[0]
    widest = 0
    for one in path.parent.iterdir():
        if _head(one)[128:132] == b"DICM" and (kind := dicom_series(one))[0] == mine and VOLUME in kind[1]:
            value = _elements(one, (_COLUMNS,)).get(_COLUMNS, b"")
            widest = max(widest, int.from_bytes(value[:4], "little"))
    return widest


def _elements(path: Path, wanted: tuple[tuple[int, int], ...]) -> dict[tuple[int, int], bytes]:
    """Values of elements of a DICOM file, as it holds them; none of a damaged one. Stops before the pixels."""
    found: dict[tuple[int, int], bytes] = {}
    last = max(wanted)
    try:
        with path.open("rb") as file:
            file.seek(132)
            implicit, big = False, False
            while True:
                tag, kind, length = _element(file, implicit, big)
                if tag > last:
                    break
                if kind == b"SQ" or length == 0xFFFFFFFF:
                    _skip_sequence(file, length, implicit, big)
                    continue
                value = file.read(min(length, 1024)) if tag in wanted or tag == _SYNTAX else b""
                file.seek(length - len(value), os.SEEK_CUR)
                if tag == _SYNTAX:
                    text = value.decode("latin-1").strip("\0 ")
                    implicit, big = text == "1.2.840.10008.1.2", text == "1.2.840.10008.1.2.2"
                elif tag in wanted:
                    found[tag] = value
                if tag == last:
                    break
    except (OSError, struct.error, RecursionError):
        return {}
    return found


def _element(file: BinaryIO, implicit: bool, big: bool) -> tuple[tuple[int, int], bytes, int]:
    """(tag, value representation, length) at the file's position. The file meta group is always explicit little."""
    group = struct.unpack("<H", _exactly(file, 2))[0]
    order = ">" if big and group != 0x0002 else "<"
    if order == ">":
        group = struct.unpack(">H", struct.pack("<H", group))[0]
    element = struct.unpack(order + "H", _exactly(file, 2))[0]
    tag = (group, element)
    if group == 0xFFFE or (implicit and group != 0x0002):
        return tag, b"", struct.unpack(order + "I", _exactly(file, 4))[0]
    kind = _exactly(file, 2)
    if kind in _LONG:
        _exactly(file, 2)
        return tag, kind, struct.unpack(order + "I", _exactly(file, 4))[0]
    return tag, kind, struct.unpack(order + "H", _exactly(file, 2))[0]


def _skip_sequence(file: BinaryIO, length: int, implicit: bool, big: bool) -> None:
    if length != 0xFFFFFFFF:
        file.seek(length, os.SEEK_CUR)
        return
    while True:
        tag, kind, inner = _element(file, implicit, big)
        if tag in (_SEQUENCE_END, _ITEM_END):
            return
        if kind == b"SQ" or inner == 0xFFFFFFFF:
            _skip_sequence(file, inner, implicit, big)
        else:
            file.seek(inner, os.SEEK_CUR)


def _exactly(file: BinaryIO, count: int) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise struct.error("the file ends")
    return data
