"""Whether two slides are the same content. Samples only find candidates: the claim is made after all bytes agreed."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from histossl.core import console
from histossl.runtime.process_pool import Report, run_jobs

Files = tuple[Path, ...]  # all files of a slide, the one that is opened first

SPOTS = 256  # samples that tell a slide from its mended copy
SAMPLE_BYTES = 16384
FEW_SPOTS = 16
TOLD_BYTES = 1 << 30  # to read: fewer take no time worth a line
DIGEST_BYTES = 8 << 20  # read between two signs of life


def files_of(path: Path, parts: Sequence[Path] = ()) -> Files:
    """All files of a slide: the `parts` of a DICOM series or a Hamamatsu VMS, a MIRAX file and its folder."""
    others = [*parts]
    if path.suffix.lower() == ".mrxs":
        others += sorted(each for each in path.with_suffix("").glob("*") if each.is_file())
    return (path, *(each for each in others if each != path))


def fingerprint(path: Path, key: bytes = b"", spots: int = 10, parts: Sequence[Path] = ()) -> str:
    """Tells a slide from another, or from its replacement, by its size and samples of its bytes; not by its name.

    Of a slide in several files (MIRAX, the `parts` of DICOM or VMS) the sizes of the others count too. Equal
    fingerprints are no proof of equal content, unless `samples_are_all`.
    """
    digest = hmac.new(key, digestmod=hashlib.sha256)
    size = path.stat().st_size
    digest.update(str(size).encode())
    _add_samples(digest, path, size, spots)
    others = list(parts)
    if path.suffix.lower() == ".mrxs" and path.with_suffix("").is_dir():
        others = [each for each in path.with_suffix("").glob("*") if each.is_file()]
    if others:
        sizes = sorted((each.name, each.stat().st_size) for each in others)
        digest.update(json.dumps(sizes).encode())
    return digest.hexdigest()[:32]


def samples_are_all(path: Path, parts: Sequence[Path] = ()) -> bool:
    """Whether a fingerprint of SPOTS samples has read every byte of the slide (4 MB, and one file)."""
    return len(files_of(path, parts)) == 1 and path.stat().st_size <= SPOTS * SAMPLE_BYTES


def sampled(files: Files, report: Report) -> str:
    """A digest of the sizes and some samples of all files of a slide; empty if one cannot be read."""
    return _of_all(files, report, whole=False)


def digested(files: Files, report: Report) -> str:
    """A digest of every byte of all files of a slide, whatever their names; empty if one cannot be read."""
    return _of_all(files, report, whole=True)


def _of_all(files: Files, report: Report, whole: bool) -> str:
    found = []
    try:
        for path in files:
            digest = hashlib.sha256()
            if whole:
                with path.open("rb") as file:
                    while piece := file.read(DIGEST_BYTES):
                        digest.update(piece)
                        report(0)  # the time limit is for silence: a large file takes what it takes
            else:
                size = path.stat().st_size
                digest.update(str(size).encode())
                _add_samples(digest, path, size, FEW_SPOTS)
                report(0)
            found.append(digest.hexdigest())
    except OSError:
        return ""
    return hashlib.sha256("".join(sorted(found)).encode()).hexdigest()


def _add_samples(digest: hashlib._Hash | hmac.HMAC, path: Path, size: int, spots: int) -> None:
    with path.open("rb") as file:
        for sample in range(spots):
            file.seek((size - min(size, SAMPLE_BYTES)) * sample // (spots - 1))
            digest.update(file.read(SAMPLE_BYTES))


def contents(groups: Iterable[Sequence[Files]], num_workers: int, silence_s: float) -> dict[Files, object]:
    """Of each slide what is equal for two of a group exactly where their whole content is.

    Links to the same files are not read. A slide that cannot be read, or not in time, is left out: equal to none.
    """
    marks: dict[Files, object] = {}
    to_read: dict[object, Files] = {}
    for group in groups:
        here = {files: mark for files in group if (mark := _inodes(files)) is not None}
        marks |= here
        if len(set(here.values())) > 1:
            to_read |= {mark: files for files, mark in here.items()}
    jobs = list(to_read.items())
    read: dict[object, object] = {}
    if jobs:
        slides = [files for _, files in jobs]
        large = sum(each.stat().st_size for files in slides for each in files) > TOLD_BYTES
        with console.progress("comparing possible duplicates", len(jobs), "slides", visible=large) as bar:
            for event in run_jobs(digested, slides, min(num_workers, len(jobs)), silence_s):
                if event.kind == "done" and event.value:
                    read[jobs[event.job][0]] = event.value
                bar.advance(int(event.kind != "progress"))
    # A mark without its digest is equal to itself alone, which it is in truth.
    return {files: read.get(mark, mark) for files, mark in marks.items()}


def _inodes(files: Files) -> object | None:
    try:
        return tuple(sorted((status.st_dev, status.st_ino) for status in (each.stat() for each in files)))
    except OSError:
        return None
