"""Names are private data: no file of an anonymous workspace tells a name of a slide, folder or patient, in any form."""

import base64
import contextlib
import csv
import io
import json
import multiprocessing
import struct
import unicodedata
import zipfile
import zlib
from pathlib import Path
from urllib.parse import quote

import h5py
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, PngImagePlugin

from histossl.core.anonymous import PSEUDONYM, names_of, settle
from histossl.core.config import read_run
from histossl.core.errors import HistosslError, StoreError
from histossl.core.workspace import Workspace
from histossl.demo.paint import paint_pixels
from histossl.slides.ledger import LedgerRow, read_ledger, write_ledger
from histossl.tiles.store.index import TileIndex

# One for each place that a name can be in; the umlaut is one letter or two (NFC, NFD).
FOLDER, FILE, TAG, OME, DICOM, EXIF, PNG, DRAWN, PATIENT, PLACE, MISSING, COPY, SUFFIX, REST = SECRETS = (
    "Quexölla", "Zaubermännlein", "Tagliaferrox", "Omegabert", "Dicomeda", "Exifiana", "Pengwinna", "Geojsonne",
    "Patientula", "Ordnerine", "Fehlmannov", "Doppelgunda", "Suffixandra", "Truncatius",
)  # fmt: skip
CLASSES = ("normal", "carcinoma")
SIZE = {"tile_px": 64, "mpp": 1.0}


def archive(root: Path) -> Path:
    """Slides of two classes, and files that fail in several ways; all of them name somebody."""
    slides = root / "slides" / f"{FOLDER}^Anna"
    slides.mkdir(parents=True)
    usual = (None, 1.0, (), "plain", 0, 0, 0)
    pixels = {label: paint_pixels(512, 512, 0.5, label, seed, *usual)[0] for seed, label in enumerate(CLASSES)}
    tags = [(315, "s", 0, TAG, True), (316, "s", 0, TAG, True), (269, "s", 0, TAG, True)]
    layout = {"tile": (128, 128), "photometric": "rgb", "resolution": (20000, 20000), "resolutionunit": "CENTIMETER"}
    for number in range(8):
        picture = np.roll(pixels[CLASSES[number % 2]], 32 * number, axis=1)
        path = slides / f"{FILE}-{number}.tif"
        if number < 6:
            more = {"description": f"Name: {TAG}", "extratags": tags, "metadata": None, "compression": "jpeg"}
        else:
            path = path.with_suffix(".ome.tif")
            axes = {"axes": "YXS", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5, "Name": OME, "Description": OME}
            more = {"ome": True, "metadata": axes, "compression": "zlib"}
        tifffile.imwrite(path, picture, **layout, **more)
    whole = (slides / f"{FILE}-0.tif").read_bytes()
    (slides / f"{COPY}.tif").write_bytes(whole)
    (slides / f"a {REST} b.tif").write_bytes(whole[: len(whole) // 2])
    (slides / f"{REST}.{SUFFIX}").write_bytes(whole)
    (slides / f"note.{SUFFIX}x").write_text("nothing")
    (slides / f"{REST}.dcm").write_bytes(dicom())
    exif = Image.Exif()
    exif[0x010E] = exif[0x013B] = EXIF
    Image.fromarray(pixels["normal"]).save(slides / f"{EXIF}.jpg", exif=exif, comment=EXIF.encode())
    text = PngImagePlugin.PngInfo()
    text.add_text("Patient", PNG)
    Image.fromarray(pixels["normal"]).save(slides / f"{PNG}.png", pnginfo=text)
    square = [[[0, 0], [512, 0], [512, 512], [0, 512], [0, 0]]]
    feature = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": square}}
    feature["properties"] = {"name": DRAWN, "classification": {"name": "tissue"}, "metadata": {"who": DRAWN}}
    (slides / f"{FILE}-1.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))
    return root / "slides"


def dicom() -> bytes:
    def element(group: int, number: int, kind: bytes, value: bytes) -> bytes:
        value += b" " * (len(value) % 2)
        return struct.pack("<HH2sH", group, number, kind, len(value)) + value

    body = element(0x0008, 0x0008, b"CS", rb"ORIGINAL\PRIMARY\VOLUME") + element(0x0010, 0x0010, b"PN", DICOM.encode())
    body += element(0x0010, 0x0020, b"LO", DICOM.encode()) + element(0x0020, 0x000E, b"UI", b"1.2.3.4")
    meta = element(0x0002, 0x0010, b"UI", b"1.2.840.10008.1.2.1")
    return bytes(128) + b"DICM" + meta + body


def labels(root: Path) -> Path:
    path = root / PLACE / "labels.csv"
    path.parent.mkdir()
    rows = [f"{FILE}-{number},{CLASSES[number % 2]},{PATIENT}-{number}" for number in range(8)]
    rows.append(f"{MISSING}.svs,normal,{PATIENT}-9")
    path.write_text("\n".join(["slide,label,patient", *rows]) + "\n", encoding="utf-8")
    return path


def run_all(cli, root: Path, monkeypatch, commands: int) -> tuple[Workspace, Path]:
    """What a lab does from the scan to the report, the first `commands` of it."""
    monkeypatch.setattr("sys.argv", ["histossl"])
    monkeypatch.chdir(root)
    slides, csv_file, at, names = archive(root), labels(root), root / "ws", root / "private" / "names.csv"
    (root / PLACE / "exclude.txt").write_text(f"{FILE}-7\n", encoding="utf-8")
    of = ["-w", at]
    tiny = ["--backbone", "test_vit", "--weights", "random"]
    every = [
        ["scan", slides, *of, "--anonymize", "--names", names, "--contact-sheet", "--verify", "--tile-px", 64],
        ["tile", "slides", *of, "--tile-px", 64, "--workers", 1],
        ["scan", slides, *of, "--tile-px", 64, "--workers", 1, "--contact-sheet"],
        ["curate", *of, "--name", "few", "--tiles", 60, "--like-slides", f"{FILE}-0,{FILE}-1", *tiny],
        ["pretrain", *of, "--steps", 2, "--batch-size", 4, "--view-px", 32, "--seed", 1, *tiny, "--labels", csv_file,
         "--exclude", root / PLACE / "exclude.txt"],
        ["embed", *of, "--labels", csv_file],
        ["finetune", *of, "--labels", csv_file, "--draws", 2, "--budgets", "1,2", "--folds", 2,
         "--starts", "adapted,random,colour"],
        ["predict", *of, "--model", at / "finetune" / "default" / "model", "--slides", slides],
        ["suggest", *of, "--labels", Path(PLACE) / "few.csv", "--number", 2],
        ["report", *of],
    ]  # fmt: skip
    some = csv_file.read_text(encoding="utf-8").splitlines()[:5]
    (root / PLACE / "few.csv").write_text("\n".join(some) + "\n", encoding="utf-8")
    for command in every[:commands]:
        monkeypatch.setattr("sys.argv", ["/opt/bin/histossl", *map(str, command)])
        told = cli(*command)
        assert told.code == 0, (command, told.err)
    return Workspace(at), names


def spellings(secret: str) -> set[bytes]:
    """How a name may be written: as text in several codes, in a link, in JSON, in base64 at any offset."""
    found = set()
    for form in ("NFC", "NFD"):
        text = unicodedata.normalize(form, secret)
        for one in {text, text.lower(), text.upper()}:
            found |= {one.encode(code) for code in ("utf-8", "utf-16-le", "utf-16-be", "utf-32-le")}
            found |= {quote(one).encode(), json.dumps(one)[1:-1].encode(), one.encode("unicode_escape")}
            raw = one.encode()
            for offset in range(3):
                coded = base64.b64encode(bytes(offset) + raw)
                found.add(coded[-(-offset * 4 // 3) : (offset + len(raw)) * 4 // 3])
    return found


def contents(path: Path):
    """A file as it is, and what it holds in compressed form."""
    data = path.read_bytes()
    yield "", data
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archived:
            for member in archived.infolist():
                yield member.filename, member.filename.encode() + archived.read(member)
    if path.suffix == ".h5":
        with h5py.File(path) as stored:
            yield "attributes", repr([dict(stored.attrs), *stored]).encode()
    if path.suffix == ".png":
        with Image.open(path) as picture:
            yield "text", repr({**picture.info, **picture.text}).encode()
    if path.suffix == ".pt":
        buffer = io.StringIO()
        print(torch.load(path, weights_only=False), file=buffer)
        yield "state", buffer.getvalue().encode()
    for part in data.split(b"base64,")[1:]:
        yield "picture", base64.b64decode(part[: part.find(b'"')] + b"==", validate=False)
    start = data.find(b"\x78\x9c")
    if start >= 0:
        with contextlib.suppress(zlib.error):
            yield "deflated", zlib.decompressobj().decompress(data[start:])


def told_in(workspace: Workspace, secrets=SECRETS) -> list[str]:
    looked_for = {secret: spellings(secret) for secret in secrets}
    found = []
    for path in sorted(workspace.root.rglob("*")):
        place = path.relative_to(workspace.root).as_posix()
        pieces = [("name", place.encode())]
        if path.is_file():
            pieces += contents(path)
        found += [
            f"{place} {where}: {secret}"
            for where, piece in pieces
            for secret, ways in looked_for.items()
            if any(way in piece for way in ways)
        ]
    return found


def test_after_scan_and_tile_an_anonymous_workspace_tells_no_name(cli, tmp_path, monkeypatch):
    workspace, names = run_all(cli, tmp_path, monkeypatch, 3)
    assert told_in(workspace) == []
    rows = read_ledger(workspace.archive_csv)
    assert {row.file for row in rows} >= {f"{FOLDER}^Anna/{FILE}-0.tif", f"{FOLDER}^Anna/{REST}.{SUFFIX}"}
    assert all(PSEUDONYM.fullmatch(row.file) for row in read_ledger(workspace.archive_csv, with_names=False))
    assert names.stat().st_mode & 0o777 == 0o600
    again = cli("tile", tmp_path / "slides", "-w", workspace.root, "--workers", 1)
    assert "nothing new to tile" in again.err


@pytest.mark.slow
def test_after_all_commands_an_anonymous_workspace_tells_no_name(cli, tmp_path, monkeypatch):
    workspace, _ = run_all(cli, tmp_path, monkeypatch, 10)
    assert told_in(workspace) == []
    run = workspace.finetune("default")
    with run.predictions.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["slide"] for row in rows} <= {*TileIndex.open(workspace).slides}
    assert len({row["patient"] for row in rows}) == 8  # the labels were found by the names in them
    assert read_run(run.run_json)["config"]["labels"] == str(tmp_path / PLACE / "labels.csv")
    told = cli("names", run.predictions, "-w", workspace.root)
    shown = {(row["slide"], row["patient"]) for row in csv.DictReader(io.StringIO(told.out))}
    assert (f"{FOLDER}^Anna/{FILE}-3", f"{PATIENT}-3") in shown
    assert f"{FILE}-" in cli("suggest", "-w", workspace.root, "--labels", Path(PLACE) / "few.csv").err
    command = ["finetune", "-w", workspace.root, "--labels", tmp_path / PLACE / "labels.csv", "--draws", 2]
    told = cli(*command, "--budgets", "1,2", "--folds", 2, "--starts", "adapted,random,colour")
    assert told.code == 0, told.err  # the same run, by the same pseudonyms
    assert told_in(workspace) == []


def test_a_plain_workspace_holds_names_where_they_are_looked_for(cli, paint, workspace):
    """Else the tests above could not fail."""
    directory = paint(f"{FOLDER}/{FILE}.tif", width_px=512, height_px=512).path.parent.parent
    assert cli("scan", directory, "-w", workspace.root, "--contact-sheet", "--workers", 1).code == 0
    assert cli("tile", directory, "-w", workspace.root, "--workers", 1).code == 0
    TileIndex.open(workspace)
    found = told_in(workspace, (FOLDER, FILE))
    for place in ("archive.csv", "contact-sheet.html", "tiles/index.npy", f"tiles/{FOLDER}/{FILE}.zip tiling.json"):
        assert any(one.startswith(place) for one in found)


# ---- the file of names


@pytest.fixture
def anonymous(cli, paint, workspace):
    """A workspace of one slide, and its folder of slides."""
    slides = paint("Doe-A1.tif", width_px=512, height_px=512).path.parent
    assert cli("tile", slides, "-w", workspace.root, "--workers", 1, "--anonymize").code == 0
    return slides


def test_the_names_lie_beside_the_workspace_and_are_said_to(cli, paint, workspace):
    slides = paint("Doe-A1.tif", width_px=512, height_px=512).path.parent
    told = cli("scan", slides, "-w", workspace.root, "--workers", 1, "--anonymize")
    path = workspace.root.parent / f"{workspace.root.name}-names.csv"
    assert str(path) in told.err
    assert path.stat().st_mode & 0o777 == 0o600
    assert not [one for one in workspace.root.rglob("*") if "names" in one.name]


@pytest.mark.parametrize("command", [["scan"], ["tile"], ["scan", "--anonymize"], ["tile", "--anonymize"]])
def test_without_its_names_an_anonymous_workspace_is_left_as_it_is(cli, anonymous, workspace, command):
    path = names_of(workspace).path
    path.rename(path.with_name("moved.csv"))
    before = workspace.archive_csv.read_bytes()
    told = cli(*command, anonymous, "-w", workspace.root, "--workers", 1)
    assert told.code == 1
    assert len(told.err.strip().splitlines()) == 1
    assert str(path) in told.err
    assert "--names" in told.err
    assert workspace.archive_csv.read_bytes() == before
    assert cli(*command, anonymous, "-w", workspace.root, "--names", path.with_name("moved.csv")).code == 0
    assert cli(*command, anonymous, "-w", workspace.root).code == 0  # and remembers where it is now


def test_another_file_of_names_is_refused(cli, anonymous, workspace, tmp_path):
    other = Workspace(tmp_path / "other").make()
    theirs = settle(other, anonymize=True).path
    for names, code in ((theirs, 2), (tmp_path / "none.csv", 1), (anonymous / "Doe-A1.tif", 1)):
        told = cli("tile", anonymous, "-w", workspace.root, "--names", names)
        assert told.code == code
        assert len(told.err.strip().splitlines()) == 1
        assert str(names) in told.err
    assert cli("tile", anonymous, "-w", workspace.root).code == 0


def test_what_names_do_not_go_with_is_refused(cli, paint, tmp_path, workspace):
    slides = paint("Doe-A1.tif", width_px=512, height_px=512).path.parent
    inside = cli("tile", slides, "-w", workspace.root, "--anonymize", "--names", workspace.root / "n.csv")
    assert (inside.code, "--names" in inside.err) == (2, True)
    assert cli("scan", slides, "-w", workspace.root, "--workers", 1).code == 0
    plain = cli("tile", slides, "-w", workspace.root, "--names", tmp_path / "n.csv")
    assert (plain.code, "--anonymize" in plain.err) == (2, True)
    late = cli("tile", slides, "-w", workspace.root, "--anonymize")
    assert (late.code, "--workspace" in late.err) == (2, True)
    (workspace.root / "anonymous-names.csv").write_text("# key 00\nname,slide,file\n")
    older = cli("tile", slides, "-w", workspace.root)
    assert (older.code, "anonymous-names.csv" in older.err) == (2, True)


def _hide(root: Path, names: Path, number: int) -> None:
    mine = settle(Workspace(root / f"ws{number}").make(), anonymize=True, given=names)
    for slide in range(20):
        mine.slide(f"Doe-{number}-{slide}")
        mine.write()


def test_workspaces_that_share_a_file_of_names_lose_none(tmp_path):
    names = tmp_path / "private" / "names.csv"
    processes = [multiprocessing.get_context("fork").Process(target=_hide, args=(tmp_path, names, n)) for n in range(3)]
    for one in processes:
        one.start()
    for one in processes:
        one.join()
        assert one.exitcode == 0
    first, second = (settle(Workspace(tmp_path / f"ws{number}")) for number in (0, 1))
    assert len(first.slides()) == 60
    assert first.slide("Doe-1-3") == second.slide("Doe-1-3")


def test_a_reason_names_nobody_and_is_itself_again_in_memory(workspace):
    names = settle(workspace, anonymize=True)
    reason = "same content as Doe/Jane B2.svs; /data/Doe/x.tif: the tile at 8 is 'Janet', and Doe/A1 too"
    rows = [LedgerRow("Doe/A1.svs", "warning", reason, "Doe/A1"), LedgerRow("Doe/Jane B2.svs", slide="Doe/Jane B2")]
    write_ledger(workspace.archive_csv, rows)
    written = workspace.archive_csv.read_text()
    assert not any(name in written for name in ("Doe", "Jane"))
    assert "the tile at 8" in written
    assert read_ledger(workspace.archive_csv)[0].reason == reason.replace("'Janet'", "'...'")
    assert names.slides() == {"Doe/A1": names.slide("Doe/A1"), "Doe/Jane B2": names.slide("Doe/Jane B2")}


def test_a_record_hides_paths_and_slides_and_keeps_words(workspace, tmp_path):
    names = settle(workspace, anonymize=True)
    names.slide("slide", "slide.tif")
    backbone = workspace.root / "pretrain" / "a" / "backbone.safetensors"
    record = {
        "unit": "slide",
        "labels": "Doe/labels.csv",
        "source": str(backbone),
        "pretraining_slides": ["Doe"],
        "starts": [f"mine={tmp_path}/Doe.safetensors", "random"],
        "command": ["/usr/bin/histossl", "finetune", "--labels=Doe.csv", "-w", str(workspace.root), "--draws", "-1"],
    }
    hidden = names.hidden(record)
    assert "Doe" not in json.dumps(hidden)
    assert (hidden["unit"], hidden["source"]) == ("slide", "WORKSPACE/pretrain/a/backbone.safetensors")
    assert hidden["command"][3:] == ["-w", "WORKSPACE", "--draws", "-1"]
    back = names.revealed(hidden)
    assert {key: back[key] for key in ("labels", "source", "starts")} == {
        key: record[key] for key in ("labels", "source", "starts")
    }


def test_a_damaged_file_of_names_is_one_line(anonymous, workspace):
    path = names_of(workspace).path
    path.write_text("pseudonym,name,file\n")
    with pytest.raises(HistosslError, match="--names"):
        names_of(workspace)
    path.unlink()
    with pytest.raises(StoreError, match="key to the names"):
        names_of(workspace)
