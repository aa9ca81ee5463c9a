"""Every file of the archive once, under the right name, whatever the folders look like."""

from __future__ import annotations

import os
import shutil
import signal
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from histossl.core.config import ScanConfig
from histossl.core.errors import HistosslError, SlideError, UsageError
from histossl.core.workspace import Workspace
from histossl.slides import archive
from histossl.slides.archive import dicom_series, find_slides, relative, walk
from histossl.slides.content import fingerprint
from histossl.slides.reading.slide import open_slide
from histossl.slides.scan import scan, stamp

TIFF = b"II*\0" + bytes(200)


def touch(root: Path, *names: str, content: bytes = b"x") -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def ids(root: Path) -> list[str]:
    return [one.slide for one in find_slides(root)]


def element(tag: tuple[int, int], kind: bytes, value: bytes) -> bytes:
    return struct.pack("<HH2sH", *tag, kind, len(value)) + value


def dicom(
    series: bytes,
    image_type: bytes = b"ORIGINAL\\PRIMARY\\VOLUME\\NONE",
    instance: bytes = b"",
    columns: int = 0,
) -> bytes:
    """A DICOM header with a sequence in front of the series, whose own series must not be taken for it."""
    inner = element((0x0020, 0x000E), b"UI", b"9.9.9.9 ")
    item = struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF) + inner + struct.pack("<HHI", 0xFFFE, 0xE00D, 0)
    sequence = (
        struct.pack("<HH2sHI", 0x0008, 0x1115, b"SQ", 0, 0xFFFFFFFF) + item + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    )
    meta = element((0x0002, 0x0010), b"UI", b"1.2.840.10008.1.2.1\0")
    kind = element((0x0008, 0x0008), b"CS", image_type + b" " * (len(image_type) % 2))
    own = element((0x0008, 0x0018), b"UI", instance) if instance else b""
    width = element((0x0048, 0x0006), b"UL", struct.pack("<I", columns)) if columns else bytes(64)
    uid = element((0x0020, 0x000E), b"UI", series)
    return bytes(128) + b"DICM" + meta + kind + own + sequence + uid + width


def test_id_is_the_path_without_suffix(tmp_path: Path) -> None:
    touch(tmp_path, "A1.svs", "case 1/deep/B.2.ndpi", "case2/C.ome.tif", "d.PNG")
    assert ids(tmp_path) == ["A1", "case 1/deep/B.2", "case2/C.ome", "d"]


def test_those_that_collide_all_keep_their_suffix(tmp_path: Path) -> None:
    touch(tmp_path, "A1.svs", "A1.tif", "B1.svs", "c/A1.svs", "c/a1.tif")
    assert ids(tmp_path) == ["A1.svs", "A1.tif", "B1", "c/A1.svs", "c/a1.tif"]


def test_other_files_are_counted_not_lost(tmp_path: Path) -> None:
    touch(tmp_path, "A1.svs", "notes.txt", "more.txt", "labels.csv", ".hidden.svs", "._A1.svs")
    walked = walk(tmp_path)
    assert [one.slide for one in walked.found] == ["A1"]
    assert walked.ignored == {".txt": 2, ".csv": 1}


def test_tiff_under_a_strange_name_is_found(tmp_path: Path) -> None:
    touch(tmp_path, "slide.dat", "NOSUFFIX", content=TIFF)
    found = walk(tmp_path).found
    assert [one.slide for one in found] == ["NOSUFFIX", "slide"]
    assert "content is a TIFF" in found[1].note


def test_links_are_followed_without_going_in_circles(tmp_path: Path) -> None:
    touch(tmp_path, "archive/case1/A1.svs", "elsewhere/B1.svs")
    (tmp_path / "archive" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "archive" / "case1" / "up").symlink_to(tmp_path / "archive")
    (tmp_path / "archive" / "again").symlink_to(tmp_path / "archive" / "case1")
    (tmp_path / "archive" / "C1.svs").symlink_to(tmp_path / "elsewhere" / "B1.svs")
    assert ids(tmp_path / "archive") == ["C1", "case1/A1", "linked/B1"]


def test_folder_that_cannot_be_listed_has_its_own_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "A1.svs", "closed/B1.svs")
    listed = os.scandir

    def scandir(path: Path) -> object:
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied")
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    problems = {one.path.name: one.problem for one in walk(tmp_path).found}
    assert not problems["A1.svs"]
    assert "cannot be listed" in problems["closed"]


def test_a_link_that_cannot_be_followed_has_its_own_row(tmp_path: Path) -> None:
    touch(tmp_path, "A1.svs")
    (tmp_path / "loop.svs").symlink_to("loop.svs")
    problems = {one.path.name: one.problem for one in walk(tmp_path).found}
    assert not problems["A1.svs"]
    assert "cannot be followed" in problems["loop.svs"]


def test_a_name_that_is_not_utf8_is_told_and_can_be_written(tmp_path: Path) -> None:
    touch(tmp_path, "A1.svs", os.fsdecode(b"M\xfcller.svs"), os.fsdecode(b"notes.\xfc"))
    walked = walk(tmp_path)
    problems = {one.slide: one.problem for one in walked.found}
    assert not problems["A1"]
    assert "rename it" in problems["M\\udcfcller"]
    " ".join([*problems, *walked.ignored]).encode("utf-8")


def test_folder_named_like_a_slide(tmp_path: Path) -> None:
    touch(tmp_path, "A1.svs/A1.svs")
    touch(tmp_path, "C1.svs/notes.txt", "D1.svs/.DS_Store", "E1.svs/deep/F1.svs")
    (tmp_path / "B1.svs").mkdir()
    found = {one.slide: one.problem for one in walk(tmp_path).found}
    hollow = dict.fromkeys(("B1", "C1", "D1"), "a folder named like a slide, without a slide in it")
    assert found == {"A1.svs/A1": "", "E1.svs/deep/F1": "", **hollow}
    assert ids(tmp_path) == ["A1.svs/A1", "E1.svs/deep/F1"]


def test_named_pipes_are_told_and_never_opened(tmp_path: Path) -> None:
    """Opening one would wait for ever for somebody to write into it."""
    touch(tmp_path, "A1.svs")
    for name in ("x.svs", "y.dcm", "v.vms", "w.txt", "nosuffix"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "link.tif").symlink_to(tmp_path / "x.svs")
    found = {one.path.name: one.problem for one in in_time(lambda: walk(tmp_path)).found}
    assert found.pop("A1.svs") == ""
    assert set(found) == {"x.svs", "y.dcm", "v.vms", "link.tif"}
    assert all(problem.startswith("not a regular file") for problem in found.values())
    assert walk(tmp_path).ignored == {".txt": 1, "no suffix": 1}
    with pytest.raises(SlideError, match=r"x\.svs: not a regular file"):
        in_time(lambda: open_slide(tmp_path / "x.svs"))


def in_time(call: Callable[[], Any]) -> Any:
    """What the call answers within 10 seconds; an alarm ends one that waits for ever."""

    def too_late(*_: object) -> None:
        raise AssertionError("waited for ever")

    signal.signal(signal.SIGALRM, too_late)
    signal.alarm(10)
    try:
        return call()
    finally:
        signal.alarm(0)


def test_mirax_and_vms_are_one_slide_each(tmp_path: Path) -> None:
    touch(tmp_path, "M.mrxs", "M/Data0000.dat", "M/Slidedat.ini", "M/extra.tif", "tile1.jpg", "own.jpg", "macro.jpg")
    (tmp_path / "V.vms").write_text("[Virtual Microscope Specimen]\nImageFile=tile1.jpg\nMacroImage=macro.jpg\n")
    assert ids(tmp_path) == ["M", "V", "own"]


def test_dicom_series_is_one_slide_and_its_label_is_not_opened(tmp_path: Path) -> None:
    touch(tmp_path, "S1/1.dcm", content=dicom(b"1.2.1 ", b"ORIGINAL\\PRIMARY\\LABEL\\NONE"))
    touch(tmp_path, "S1/2.dcm", "S1/3.dcm", content=dicom(b"1.2.1 "))
    touch(tmp_path, "two/a.dcm", "two/nosuffix", content=dicom(b"1.2.2 "))
    touch(tmp_path, "two/b.dcm", content=dicom(b"1.2.3 "))
    touch(tmp_path, "labels/x.dcm", content=dicom(b"1.2.4 ", b"ORIGINAL\\PRIMARY\\LABEL\\NONE"))
    found = {one.slide: (one.path.name, one.problem) for one in walk(tmp_path).found}
    assert found["S1"] == ("2.dcm", "")
    assert found["two/a"] == ("a.dcm", "")
    assert found["two/b"] == ("b.dcm", "")
    assert "without a volume image" in found["labels"][1]
    assert len(found) == 4


LABEL = b"ORIGINAL\\PRIMARY\\LABEL\\NONE"


def test_a_dicom_series_in_two_folders_is_one_slide_that_of_its_finest_level(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.dcm", content=dicom(b"1.2.1 ", instance=b"1.5.2 ", columns=1024))
    touch(tmp_path, "b/0.dcm", content=dicom(b"1.2.1 ", instance=b"1.5.1 ", columns=4096))
    touch(tmp_path, "c/9.dcm", content=dicom(b"1.2.1 ", LABEL, instance=b"1.5.9 "))
    touch(tmp_path, "d/7.dcm", content=dicom(b"1.2.7 ", instance=b"1.5.7 ", columns=4096))
    found = {one.slide: one for one in walk(tmp_path).found}
    assert [name for name, one in found.items() if not one.problem] == ["b", "d"]
    assert "part of the DICOM series of b/0.dcm" in found["a"].problem
    assert "part of the DICOM series of b/0.dcm" in found["c"].problem
    assert "goes on in another folder" in found["b"].note
    assert (found["d"].problem, found["d"].note) == ("", "")
    assert found["b"].parts == (tmp_path / "b" / "0.dcm",)


def test_a_dicom_series_copied_to_another_folder_is_left_to_its_content(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        touch(tmp_path, f"{folder}/0.dcm", content=dicom(b"1.2.1 ", instance=b"1.5.1 ", columns=4096))
        touch(tmp_path, f"{folder}/1.dcm", content=dicom(b"1.2.1 ", instance=b"1.5.2 ", columns=1024))
    touch(tmp_path, "part/1.dcm", content=dicom(b"1.2.1 ", instance=b"1.5.2 ", columns=1024))
    found = {one.slide: one for one in walk(tmp_path).found}
    assert [found[name].problem for name in ("a", "b")] == ["", ""]
    assert (found["a"].note, found["b"].note) == ("", "the same DICOM series as a/0.dcm")
    assert "part of the DICOM series of a/0.dcm" in found["part"].problem


@pytest.mark.data
def test_a_real_dicom_series_copied_is_a_duplicate_and_split_is_one_slide(real_data: Path, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        shutil.copytree(real_data / "slides" / "boxes_dicom", tmp_path / folder)
    workspace = Workspace.at(tmp_path / "ws").make()
    rows = {row.slide: row for row in scan(tmp_path, workspace, ScanConfig(), 1).rows}
    assert rows["b"].duplicate_of == rows["a"].file
    (tmp_path / "a" / "boxes_1.dcm").unlink()
    (tmp_path / "b" / "boxes_0.dcm").unlink()
    rows = {row.slide: row for row in scan(tmp_path, workspace, ScanConfig(), 1).rows}
    assert "part of the DICOM series" in rows["b"].reason
    assert rows["b"].duplicate_of == ""


def test_a_slide_is_known_by_all_its_files_and_no_other_s(tmp_path: Path) -> None:
    """Also by those of a series without a suffix or with it in capitals, and by the JPEGs of a VMS."""
    touch(tmp_path, "1.DCM", "2", content=dicom(b"1.2.1 "))
    touch(tmp_path, "tile1.jpg")
    (tmp_path / "V.vms").write_text("[Virtual Microscope Specimen]\nImageFile=tile1.jpg\n")

    def known() -> dict[str, Any]:
        slides = {one.slide: one for one in find_slides(tmp_path)}
        return {
            name: (stamp(one.path, one.parts), fingerprint(one.path, parts=one.parts)) for name, one in slides.items()
        }

    before = known()
    assert set(before) == {"1", "V"}
    touch(tmp_path, "3.dcm", content=dicom(b"1.2.2 "))
    assert {name: known()[name] for name in before} == before
    for part, name in (("2", "1"), ("tile1.jpg", "V")):
        (tmp_path / part).write_bytes((tmp_path / part).read_bytes() + b"xx")
        assert known()[name][0] != before[name][0]
        assert known()[name][1] != before[name][1]
    (tmp_path / "2").unlink()
    assert known()["1"][1] != before["1"][1]


def test_dicom_header_is_read_past_nested_sequences(tmp_path: Path) -> None:
    touch(tmp_path, "a.dcm", content=dicom(b"1.2.3.4 "))
    touch(tmp_path, "cut.dcm", content=dicom(b"1.2.3.4 ")[:180])
    assert dicom_series(tmp_path / "a.dcm") == ("1.2.3.4", "ORIGINAL\\PRIMARY\\VOLUME\\NONE", "")
    assert dicom_series(tmp_path / "cut.dcm") == ("", "", "")


@pytest.mark.data
def test_real_dicom_instances_are_one_slide(real_data: Path) -> None:
    found = {one.slide for one in find_slides(real_data / "slides")}
    assert {"boxes_dicom", "dicom_small", "CMU-1-Small-Region"} <= found
    assert len(found) == 6


def test_wrong_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        walk(tmp_path / "none")
    touch(tmp_path, "A1.svs")
    with pytest.raises(UsageError, match="a file, not a folder"):
        walk(tmp_path / "A1.svs")


# ---- a disk that does not answer


def stalling(monkeypatch, *names):
    """Reading the header of these files never ends."""
    for_ever = threading.Event()
    real = archive._head

    def head(path):
        if path.name in names:
            for_ever.wait(60)
        return real(path)

    monkeypatch.setattr(archive, "_head", head)
    return for_ever


def test_a_file_that_never_answers_costs_itself_and_not_the_walk(tmp_path, monkeypatch):
    for name in ("A1.svs", "B1.svs", "C1.svs"):
        (tmp_path / name).write_bytes(b"x")
    released = stalling(monkeypatch, "B1.svs")
    found = {one.slide: one.problem for one in walk(tmp_path, stall_s=0.3).found}
    released.set()
    assert list(found) == ["A1", "B1", "C1"]
    assert "gave no answer" in found["B1"]
    assert not found["A1"]
    assert not found["C1"]


def test_a_disk_that_never_answers_is_named_in_one_line(tmp_path, monkeypatch):
    names = [f"{letter}1.svs" for letter in "ABCDEF"]
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    released = stalling(monkeypatch, *names)
    with pytest.raises(HistosslError, match="the disk gave no answer"):
        walk(tmp_path, stall_s=0.2)
    released.set()


def test_names_that_differ_in_a_line_break_alone_keep_apart_and_are_told(tmp_path: Path) -> None:
    for name in ("a b.svs", "a\nb.svs", "a\rb.svs"):
        (tmp_path / name).write_bytes(b"x")
    found = {relative(one.path, tmp_path): one.problem for one in walk(tmp_path).found}
    assert set(found) == {"a b.svs", "a\\nb.svs", "a\\rb.svs"}
    assert [("line break" in problem) for problem in found.values()] == [name != "a b.svs" for name in found]
