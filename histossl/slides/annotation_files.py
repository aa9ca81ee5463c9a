"""Which file holds the annotations of which slide, next to the slides or in a folder of their own.

    A1.geojson, A1.svs.geojson, A1.GeoJSON, A1.geojson.gz, A1.json    of A1.svs; read
    A1.xml (Aperio, ASAP), A1.ndpa (NDP.view), A1.qpdata (QuPath)     of A1.svs; named in its row as not read

A slide with annotations that nobody reads would be tiled whole without a word. So every file of a slide's name is
accounted for: one is used, and the rest is noted.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from histossl.core import console
from histossl.core.errors import UsageError
from histossl.core.names import exact_key, path_key
from histossl.slides.archive import SlideFile

READ = (".geojson", ".geojson.gz", ".json", ".json.gz")  # the first is used where there are several
NOT_READ = {".xml": "Aperio's or ASAP's XML", ".ndpa": "NDP.view's XML", ".qpdata": "QuPath's own data"}
NO_GEOJSON = "JSON, but not a GeoJSON"
SUFFIX = re.compile(rf"(?:{'|'.join(map(re.escape, sorted((*READ, *NOT_READ), key=len, reverse=True)))})$", re.I)
HEAD_BYTES = 1 << 16
GEOJSON = re.compile(rb'"(?:coordinates|geometry|FeatureCollection)"')
Key = tuple[str, ...]


@dataclass(frozen=True)
class AnnotationFile:
    path: Path
    stem: str  # its path below the folder, without its suffix
    suffix: str
    not_read: str = ""  # what it is, where that is nothing to read

    @property
    def rank(self) -> int:
        return READ.index(self.suffix) if self.suffix in READ else len(READ)


@dataclass(frozen=True)
class Annotations:
    """Of one slide: the file to read, if there is one, and what a person should know of others of its name."""

    path: Path | None = None
    note: str = ""
    unread: tuple[Path, ...] = ()


NONE = Annotations()


def match_regions(slides: Iterable[SlideFile], directory: Path | None = None) -> dict[Path, Annotations]:
    """The annotations of each slide of an archive, by the slide's path; from `directory`, or next to the slides.

    Files of `directory` that no slide answers to, and slides without one, are told; if no slide has one at all, that
    is an error.
    """
    slides = [one for one in slides if not one.problem]
    if directory is None:
        return _next_to(slides)
    directory = directory.absolute()
    files = annotation_files(directory)
    matched = regions_in(directory, slides, files)
    _tell_unmatched(directory, slides, matched, files)
    return matched


def annotation_files(directory: Path) -> list[AnnotationFile]:
    """Every file of a folder and its subfolders that may hold annotations, in the order of their names."""
    names = (path.relative_to(directory).as_posix() for path in directory.rglob("*") if not path.name.startswith("."))
    return _files(directory, sorted(names))


def _files(directory: Path, names: Iterable[str]) -> list[AnnotationFile]:
    found = []
    for name in names:
        suffix = SUFFIX.search(name)
        path = directory / name
        if suffix and path.is_file():
            kind = suffix.group().lower()
            what = _what(path, kind)
            if what is not None:
                found.append(AnnotationFile(path, name[: suffix.start()], kind, what))
    return found


def _what(path: Path, kind: str) -> str | None:
    """What a file is that cannot be read as annotations; empty if it can be, None if it has nothing to do with any.

    A damaged one says so itself when it is read.
    """
    if kind in (".geojson", ".geojson.gz", ".ndpa", ".qpdata"):
        return NOT_READ.get(kind, "")
    try:
        with gzip.open(path) if kind.endswith(".gz") else path.open("rb") as file:
            head = file.read(HEAD_BYTES).replace(b"\0", b"")  # UTF-16 has them
    except (OSError, EOFError, zlib.error):
        return NOT_READ.get(kind, "")
    if kind == ".xml":
        return NOT_READ[kind] if b"nnotation" in head else None
    return "" if GEOJSON.search(head) else NO_GEOJSON


def _chosen(files: Sequence[AnnotationFile]) -> Annotations:
    """Of all files of one slide's name, the best first: the one to read, and a note of the others."""
    read = [one.path for one in files if not one.not_read]
    said = [f"{one.path.name} is {one.not_read}" for one in files if one.not_read]
    if read:
        others = [one.path.name + f" ({one.not_read})" * bool(one.not_read) for one in files if one.path != read[0]]
        note = f"annotations are read from {read[0].name} alone, not from {', '.join(others)}" if others else ""
    else:
        note = "; ".join(said)
        note += ", not read: export the annotations from QuPath as GeoJSON, else all of the slide is tiled" * bool(said)
    return Annotations(read[0] if read else None, note, tuple(one.path for one in files if one.path not in read[:1]))


def _next_to(slides: Sequence[SlideFile]) -> dict[Path, Annotations]:
    folders: dict[Path, dict[Key, list[AnnotationFile]]] = {}

    def named(folder: Path, names: Sequence[str]) -> list[AnnotationFile]:
        if folder not in folders:
            try:
                listed = sorted(path.name for path in folder.iterdir())
            except OSError:  # opening the slide will say why
                listed = []
            folders[folder] = _by_key(_files(folder, listed))
        return _of_names(folders[folder], names)

    of_slide: dict[Path, list[AnnotationFile]] = {}
    for one in slides:
        path = one.path.absolute()
        files = named(path.parent, [path.name, path.stem])
        if PurePosixPath(one.slide).name == path.parent.name != path.stem:  # a folder that is one slide
            files += named(path.parent.parent, [path.parent.name])
        of_slide[one.path] = files

    def ambiguous(file: Path, owners: Sequence[Path]) -> str:
        names = [path.name for path in owners]
        whole = f"name it by the whole file name, like {names[0]}.geojson"
        return f"{file}: could be of {_some(names, ' or ')} beside it; {whole}"

    return _settled(of_slide, ambiguous)


def _settled(
    of_slide: Mapping[Path, Sequence[AnnotationFile]], ambiguous: Callable[[Path, Sequence[Path]], str]
) -> dict[Path, Annotations]:
    """One file for each slide; UsageError, in the words of `ambiguous`, where two slides would use the same."""
    users: dict[Path, list[Path]] = defaultdict(list)
    for path, files in of_slide.items():
        first = next((file.path for file in files if not file.not_read), None)
        if first is not None:
            users[first].append(path)
    for file, owners in users.items():
        if len(owners) > 1:
            raise UsageError(ambiguous(file, owners))
    # What another slide uses is no leftover of this one.
    return {
        path: _chosen([file for file in files if users.get(file.path, [path]) == [path]])
        for path, files in of_slide.items()
    }


def regions_in(
    directory: Path, slides: Sequence[SlideFile], files: Sequence[AnnotationFile] | None = None
) -> dict[Path, Annotations]:
    """The annotations of each slide in a folder, whose `files` are listed if they are not given.

    A name without its folder (A1.geojson) is taken only if one slide alone answers to it: the regions of one slide on
    another of the same name would be wrong labels without a word.
    """
    by_key = _by_key(annotation_files(directory) if files is None else files)
    matched = {one.path: _of_names(by_key, (one.slide, f"{one.slide}{one.path.suffix}")) for one in slides}
    owned = {file.path for own in matched.values() for file in own}
    for one in slides:
        if all(file.not_read for file in matched[one.path]):
            bare = (PurePosixPath(one.slide).name, one.path.stem, one.path.name)
            matched[one.path] += [file for file in _of_names(by_key, bare) if file.path not in owned]
    slide_of = {one.path: one.slide for one in slides}

    def ambiguous(file: Path, owners: Sequence[Path]) -> str:
        names = [slide_of[path] for path in owners]
        return (
            f"--regions {directory}: {file.name} could be of {_some(names, ' or ')}; name it by the slide's path, "
            f"like {directory / names[0]}.geojson"
        )

    return _settled(matched, ambiguous)


def _by_key(files: Iterable[AnnotationFile]) -> dict[Key, list[AnnotationFile]]:
    by_key: dict[Key, list[AnnotationFile]] = defaultdict(list)
    for one in files:
        by_key[path_key(one.stem, loose=True)].append(one)
    return by_key


def _of_names(by_key: Mapping[Key, list[AnnotationFile]], names: Sequence[str]) -> list[AnnotationFile]:
    """The files of any of these names, in the order in which they are preferred."""
    keys = dict.fromkeys(path_key(name, loose=True) for name in names)
    exact = {exact_key(name) for name in names}
    return [
        one
        for key in keys
        for one in sorted(by_key.get(key, ()), key=lambda one: (exact_key(one.stem) not in exact, one.rank))
    ]


def _tell_unmatched(
    directory: Path,
    slides: Sequence[SlideFile],
    matched: Mapping[Path, Annotations],
    files: Sequence[AnnotationFile],
) -> None:
    used = {path for one in matched.values() for path in (one.path, *one.unread)}
    unused = [one.path.relative_to(directory).as_posix() for one in files if one.path not in used]
    whole = [one.slide for one in slides if matched[one.path].path is None]
    if slides and len(whole) == len(slides):
        told = f"its {_some(unused)}" if unused else "it holds no .geojson"
        notes = [one.note for one in matched.values() if one.note]
        raise UsageError(
            f"--regions {directory}: none of it is named after a slide here ({told}; the slides: {_some(whole)}); "
            "case1/A1.svs goes with case1/A1.geojson or A1.geojson"
            if not notes
            else f"--regions {directory}: holds nothing that can be read ({notes[0]})"
        )
    if unused:
        console.warn(f"--regions {directory}: no slide here answers to {_some(unused)}")
    if whole:
        console.warn(
            f"--regions {directory}: no file there for {console.count(len(whole), 'slide')}, "
            f"taken whole: {_some(whole)}"
        )


def _some(names: Sequence[str], between: str = ", ") -> str:
    return between.join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
