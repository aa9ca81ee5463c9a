"""Checksums of an archive: content that changes while size and time do not is found, file by file."""

import os
import shutil

import pytest

from histossl.core.errors import HistosslError
from histossl.slides import checksums
from histossl.slides.checksums import check, verify


@pytest.fixture
def archive(tmp_path, painted_slide):
    """Three slides, one of them in a folder."""
    folder = tmp_path / "archive"
    (folder / "case1").mkdir(parents=True)
    for number, name in enumerate(["case1/A1.tif", "B1.tif", "C1.tif"]):
        shutil.copy(painted_slide.path, folder / name)
        with (folder / name).open("ab") as file:
            file.write(bytes([number]))
    return folder


def rot(path):
    """One bit, and the file system does not know."""
    status = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_changed_bit_is_found_and_named(archive, workspace, cli):
    assert cli("scan", archive, "-w", workspace.root, "--verify").code == 0
    answer = cli("scan", archive, "-w", workspace.root, "--check")
    assert answer.code == 0
    assert "3 files" in answer.out + answer.err
    rot(archive / "case1" / "A1.tif")
    answer = cli("scan", archive, "-w", workspace.root, "--check")
    assert answer.code == 1
    assert "case1/A1.tif" in answer.out + answer.err
    assert "B1.tif" not in answer.out + answer.err
    # It is no news to a second check, and is still wrong; --verify alone does not take the damage for the truth.
    assert cli("scan", archive, "-w", workspace.root, "--verify").code == 0
    assert cli("scan", archive, "-w", workspace.root, "--check").code == 1


def test_what_was_replaced_is_gone_or_is_new_is_no_damage(archive, workspace):
    assert verify(archive, workspace, 1, 30).taken == 3
    assert verify(archive, workspace, 1, 30).taken == 0
    (archive / "B1.tif").write_bytes((archive / "C1.tif").read_bytes())
    os.utime(archive / "B1.tif", (1, 1))
    shutil.copy(archive / "C1.tif", archive / "D1.tif")
    (archive / "C1.tif").unlink()
    found = check(archive, workspace, 1, 30)
    assert (found.replaced, found.unknown, found.gone) == (["B1.tif"], ["D1.tif"], ["C1.tif"])
    assert (found.same, found.changed, found.failed) == (1, [], {})
    assert verify(archive, workspace, 1, 30).taken == 2
    assert check(archive, workspace, 1, 30).same == 3


def test_every_file_of_a_slide_of_several_is_read(tmp_path, workspace):
    folder = tmp_path / "archive"
    (folder / "M").mkdir(parents=True)
    (folder / "M.mrxs").write_bytes(b"head")
    for name in ("Slidedat.ini", "Index.dat", "Data0000.dat"):
        (folder / "M" / name).write_bytes(name.encode())
    assert verify(folder, workspace, 1, 30).taken == 4
    rot(folder / "M" / "Data0000.dat")
    assert check(folder, workspace, 1, 30).changed == ["M/Data0000.dat"]


@pytest.mark.parametrize("command", [verify, check])
def test_a_stopped_run_goes_on_where_it_stopped(archive, workspace, monkeypatch, command):
    if command is check:
        verify(archive, workspace, 1, 30)
    run_jobs, read = checksums.run_jobs, []

    def stopped(function, jobs, *limits):
        for event in run_jobs(function, jobs, *limits):
            if event.kind == "done":
                read.append(jobs[event.job].name)
            yield event
            if len(read) == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(checksums, "run_jobs", stopped)
    with pytest.raises(KeyboardInterrupt):
        command(archive, workspace, 1, 30)
    first = list(read)
    read.clear()
    found = command(archive, workspace, 1, 30)
    assert sorted([*first, *read]) == ["A1.tif", "B1.tif", "C1.tif"]
    assert len(read) == 1
    assert found.same + found.taken == 3
    if command is check:  # a complete one is followed by another complete one
        monkeypatch.undo()
        rot(archive / "B1.tif")
        assert check(archive, workspace, 1, 30).changed == ["B1.tif"]


def test_what_a_stopped_check_found_is_not_forgotten(archive, workspace, monkeypatch):
    verify(archive, workspace, 1, 30)
    rot(archive / "B1.tif")
    run_jobs = checksums.run_jobs

    def stopped(function, jobs, *limits):
        for event in run_jobs(function, jobs, *limits):
            yield event
            if event.kind == "done" and event.job == 1:
                raise KeyboardInterrupt

    monkeypatch.setattr(checksums, "run_jobs", stopped)
    with pytest.raises(KeyboardInterrupt):
        check(archive, workspace, 1, 30)
    monkeypatch.undo()
    assert check(archive, workspace, 1, 30).changed == ["B1.tif"]


def test_a_check_without_checksums_says_what_to_run(archive, workspace, cli):
    with pytest.raises(HistosslError, match="--verify"):
        check(archive, workspace, 1, 30)
    assert cli("scan", archive, "-w", workspace.root, "--check", "--verify").code == 2
    assert cli("scan", archive, "-w", workspace.root, "--check", "--time-limit", "0").code == 2


def test_a_file_that_hangs_costs_its_time_limit_and_is_named(archive, workspace, monkeypatch):
    monkeypatch.setattr(checksums, "digest_of", hanging)
    found = verify(archive, workspace, 2, 2)
    assert list(found.failed) == ["B1.tif"]
    assert "--time-limit" in found.failed["B1.tif"]
    assert found.taken == 2


def hanging(path, report):
    if path.name == "B1.tif":
        import time

        time.sleep(600)
    return (1, 1), "x"
