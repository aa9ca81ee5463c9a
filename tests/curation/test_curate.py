"""The stage and its command: copies planted in a painted archive, test patients, resuming, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import tifffile
import torch
from painted_kinds import KINDS, kind_of_tiles, paint_kinds
from synthetic_store import write_synthetic_store

from histossl.core.config import EmbedConfig
from histossl.core.workspace import Workspace
from histossl.curation.curate import embedder_for
from histossl.curation.features import embed_tiles
from histossl.curation.near_duplicates import find_copies
from histossl.demo.paint import CLASSES, paint_slide
from histossl.tiles.store.index import TileIndex
from histossl.tiles.store.subset import open_subset
from histossl.tiles.stream.loader import TileBatches

SIDE_PX = 96


def cuts(painted_archive):
    """Tissue of the painted slides: uint8 (n, 96, 96, 3) and their 98 px surroundings, from which copies are cut."""
    found = []
    for slide in painted_archive.slides:
        image = tifffile.imread(slide.path)
        for top in range(0, image.shape[0] - SIDE_PX - 2, SIDE_PX + 2):
            for left in range(0, image.shape[1] - SIDE_PX - 2, SIDE_PX + 2):
                cut = image[top : top + SIDE_PX + 2, left : left + SIDE_PX + 2]
                if cut.std() > 20:
                    found.append(cut)
    return found


def copied(cut, how):
    """A cut as it might come again: encoded anew, moved by a pixel or two, exposed otherwise, or all of these."""
    top = left = 1
    if how in ("moved", "all"):
        top, left = 2, 1
    if how == "moved across":
        top, left = 2, 2
    tile = np.ascontiguousarray(cut[top : top + SIDE_PX, left : left + SIDE_PX])
    if how in ("brighter", "all"):
        tile = np.clip(tile * 1.05, 0, 255).astype(np.uint8)
    if how == "darker":
        tile = (tile * 0.92).astype(np.uint8)
    if how in ("encoded", "all"):
        tile = simplejpeg.decode_jpeg(simplejpeg.encode_jpeg(tile, quality=60))
    return tile


HOW = ("encoded", "moved", "moved across", "brighter", "darker", "all")


@pytest.fixture(scope="module")
def planted(painted_archive, tmp_path_factory):
    """(index, tile number of each copy -> that of its original): 6 slides, every one with copies of its own tiles and
    of those of others."""
    rng = np.random.default_rng(0)
    found = cuts(painted_archive)
    pictures, originals = [], []
    for cut in found:
        pictures.append(cut[1:-1, 1:-1])
        originals.append(-1)
    chosen = rng.choice(len(found), len(found) // 5, replace=False)
    for turn, original in enumerate(chosen):
        pictures.append(copied(found[original], HOW[turn % len(HOW)]))
        originals.append(int(original))
    place = rng.permutation(len(pictures))
    ends = np.linspace(0, len(pictures), 7).astype(int)
    index = write_synthetic_store(
        Workspace.at(tmp_path_factory.mktemp("planted")).make(),
        [f"S{number}" for number in range(6)],
        np.diff(ends).tolist(),
        SIDE_PX,
        picture=lambda slide, tile, _: np.ascontiguousarray(pictures[place[ends[slide] + tile]]),
    )
    number_of = np.argsort(place)
    copies = {int(number_of[n]): int(number_of[original]) for n, original in enumerate(originals) if original >= 0}
    return index, copies


def found_and_false(index, copies, folder, timm_name, weights, cosine, input_px):
    embedder = embedder_for(None, timm_name, weights, "", input_px, 0, "cpu")
    features, whole = embed_tiles(folder / "features.npy", index, np.arange(len(index)), embedder, EmbedConfig())
    first = find_copies(features, whole, cosine, 0, torch.device("cpu")).stands_for
    found = np.mean([first[copy] == first[original] for copy, original in copies.items()])
    group = np.arange(len(index))  # the truth: by original
    for copy, original in copies.items():
        group[copy] = original
    dropped = np.flatnonzero(first != np.arange(len(index)))
    return found, np.mean(group[dropped] != group[first[dropped]]) * len(dropped) / len(index)


def test_copies_planted_among_painted_tiles_are_found_and_hardly_any_other(planted, tmp_path):
    """A network that has learnt nothing: the picture carries it, with a threshold a little higher than the default."""
    found, false = found_and_false(*planted, tmp_path, "resnet10t", "random", 0.94, 32)
    assert len(planted[1]) > 100
    assert found >= 0.95
    assert false <= 0.01


@pytest.mark.slow
@pytest.mark.data
def test_the_default_threshold_finds_them_with_imagenet_weights(planted, tmp_path, real_data):
    weights = real_data / "weights" / "deit_tiny_patch16_224_in1k.pth"
    found, false = found_and_false(*planted, tmp_path, "deit_tiny_patch16_224", str(weights), 0.9, SIDE_PX)
    print(f"found {found:.2%}, false {false:.2%}")
    assert found >= 0.95
    assert false <= 0.01


def test_a_slide_that_lies_there_twice_is_found_by_the_commands_and_hardly_any_other_tile(workspace, cli, tmp_path):
    """Painted slides, tiled and curated as a user does; one comes again without the JPEG's traces."""
    slides = tmp_path / "slides"
    slides.mkdir()
    how = {"width_px": 640, "height_px": 640}
    for seed, label in enumerate(CLASSES):
        paint_slide(slides / f"{label}.tif", label=label, seed=seed, **how)
    paint_slide(slides / "zagain.tif", label=CLASSES[0], seed=0, compression="deflate", **how)
    at = ("-w", workspace.root)
    assert cli("tile", "--slides", slides, *at, "--tile-px", 64, "--mpp", 0.5, "--grid", "physical").code == 0
    told = cli("curate", *at, *NET, "--duplicate-cosine", 0.94)
    assert told.code == 0, told.err
    index = TileIndex.open(workspace)
    numbers = np.arange(len(index))
    keys = zip(index.slide_of(numbers), *index.coords_l0(numbers).T, strict=True)
    place = {key: n for n, key in enumerate(keys)}
    names = {name.removesuffix(".tif"): number for number, name in enumerate(index.slides)}
    again = [n for key, n in place.items() if key[0] == names["zagain"]]
    first = {n: place.get((names[CLASSES[0]], *index.coords_l0([n])[0])) for n in again}
    dropped = set(range(len(index))) - set(open_subset(index, "curated").tiles.tolist())
    found = [n in dropped or first[n] in dropped for n in again]
    assert len(again) > 40
    assert np.mean(found) >= 0.95
    assert len(dropped) - sum(found) <= 0.01 * len(index)


def test_kinds_that_stand_a_hundred_to_one_come_out_below_ten_to_one_by_the_commands(workspace, cli, tmp_path):
    """Painted slides of five kinds, tiled, and balanced by a network that has learnt nothing."""
    slides = tmp_path / "slides"
    slides.mkdir()
    of_cell = {f"S{n}": paint_kinds(slides / f"S{n}.tif", seed=n, rare=2) for n in range(4)}
    at = ("-w", workspace.root)
    assert cli("tile", "--slides", slides, *at, "--tile-px", 64, "--mpp", 0.5, "--grid", "physical").code == 0
    told = cli("curate", *at, *NET, "--duplicate-cosine", 0.94, "--tiles", 60)
    assert told.code == 0, told.err
    index = TileIndex.open(workspace)
    of_kind = kind_of_tiles(index, {slide: of_cell[Path(slide).stem] for slide in index.slides})
    before = np.bincount(of_kind, minlength=len(KINDS))
    after = np.bincount(of_kind[open_subset(index, "curated").tiles], minlength=len(KINDS))
    assert before.max() / before.min() > 100
    assert after.max() < 10 * after.min(), after


# ---- the command

NET = ("--backbone", "resnet10t", "--weights", "random", "--input-px", "32")


def textured(slide, tile, tile_px):
    """Each tile another texture, but tile 0 of later slides is tile 5 of the first, tile 7 is the slide's tile 3."""
    if tile == 0 and slide:
        slide, tile = 0, 5
    if tile == 7:
        tile = 3
    rng = np.random.default_rng((slide, tile))
    coarse = rng.integers(40, 220, size=(8, 8, 3), dtype=np.uint8)
    return np.kron(coarse, np.ones((tile_px // 8, tile_px // 8, 1), np.uint8))


@pytest.fixture
def lab(workspace, tmp_path):
    """(workspace, index): five slides of 12 tiles, 9 copies among them, and labels.csv beside."""
    index = write_synthetic_store(workspace, ("A", "B", "C", "D", "E"), 12, 32, picture=textured)
    (tmp_path / "labels.csv").write_text(
        "slide,label,patient,split\nA,tumour,P1,train\nB,normal,P2,train\nE,tumour,P5,test\n"
    )
    return workspace, index


def ledger_of(workspace, name="curated"):
    return json.loads(workspace.subset(name).ledger.read_text())


def test_copies_go_within_and_across_slides_and_the_rest_stays(lab, cli):
    workspace, index = lab
    told = cli("curate", "-w", workspace.root, *NET)
    assert told.code == 0, told.err
    subset = open_subset(index, "curated")
    first = {slide: index.tiles_of(slide).start for slide in index.slides}
    gone = {first[slide] + 7 for slide in "ABCDE"} | {first[slide] for slide in "BCDE"}
    assert set(range(60)) - set(subset.tiles.tolist()) == gone
    ledger = ledger_of(workspace)
    assert (ledger["copies"]["within_slides"], ledger["copies"]["across_slides"]) == (5, 4)
    assert "5 within a slide, 4 across" in told.err
    assert "data:image/jpeg" in workspace.subset("curated").sheet.read_text()


def test_test_patients_and_excluded_slides_are_not_even_embedded(lab, cli, tmp_path):
    workspace, index = lab
    (tmp_path / "out.txt").write_text("D\n")
    told = cli(
        "curate", "-w", workspace.root, *NET, "--labels", tmp_path / "labels.csv", "--exclude", tmp_path / "out.txt"
    )
    assert told.code == 0, told.err
    assert not set(open_subset(index, "curated").tiles.tolist()) & {*index.tiles_of("D"), *index.tiles_of("E")}
    rows = np.load(next(workspace.root.rglob("features-*.npy")))
    assert not rows[[*index.tiles_of("D"), *index.tiles_of("E")]].any()
    assert rows[[*index.tiles_of("A")]].any(axis=1).all()


def test_a_number_of_tiles_is_kept(lab, cli):
    workspace, index = lab
    assert cli("curate", "-w", workspace.root, *NET, "--tiles", 20, "--clusters", "12,4").code == 0
    assert len(open_subset(index, "curated").tiles) == 20
    assert len(ledger_of(workspace)["clusters"]) == 2


def test_classes_retrieve_from_unlabelled_slides_only(lab, cli, tmp_path):
    workspace, index = lab
    how = ("--labels", tmp_path / "labels.csv", "--like-classes", "tumour", "--tiles", 20)
    told = cli("curate", "-w", workspace.root, *NET, *how)
    assert told.code == 0, told.err
    slides = {index.slides[number] for number in index.slide_of(open_subset(index, "curated").tiles)}
    assert "A" in slides
    assert slides <= {"A", "C", "D"}  # not B, which has a label, and not E, which is for testing
    assert len(open_subset(index, "curated").tiles) == 20


def test_random_weights_are_told_which_threshold_they_need(lab, cli):
    workspace, _ = lab
    assert "0.94 was right for them" in cli("curate", "-w", workspace.root, *NET).err
    assert "right for" not in cli("curate", "-w", workspace.root, *NET, "--name", "b", "--duplicate-cosine", 0.94).err


def test_slides_retrieve_from_what_has_no_label_and_from_all_others_without_labels(lab, cli, tmp_path):
    workspace, index = lab

    def retrieved(name, *how):
        told = cli("curate", "-w", workspace.root, *NET, "--like-slides", "C", "--name", name, *how)
        assert told.code == 0, told.err
        tiles = open_subset(index, name).tiles
        found = ledger_of(workspace, name)["retrieved"]
        own = int(np.isin(tiles, [*index.tiles_of("C")]).sum())
        assert (own, own + found["tiles"]) == (found["own_tiles"], len(tiles))  # its own tiles are kept, not retrieved
        return {index.slides[number] for number in index.slide_of(tiles)}

    assert retrieved("labels", "--labels", tmp_path / "labels.csv", "--tiles", 20) == {"C", "D"}  # E is for testing
    assert retrieved("plain", "--tiles", 50) == {"A", "B", "C", "D", "E"}
    (tmp_path / "some.csv").write_text("slide,label,patient,split\nA,,P1,train\nB,normal,P2,train\nE,,P5,test\n")
    assert retrieved("some", "--labels", tmp_path / "some.csv", "--tiles", 30) == {"A", "C", "D"}  # A waits for a label


def test_the_same_command_does_nothing_and_another_is_refused(lab, cli):
    workspace, _ = lab
    assert cli("curate", "-w", workspace.root, *NET).code == 0
    written = workspace.subset("curated").tiles.stat().st_mtime_ns
    again = cli("curate", "-w", workspace.root, *NET)
    assert (again.code, workspace.subset("curated").tiles.stat().st_mtime_ns) == (0, written)
    assert "finished before" in again.err
    other = cli("curate", "-w", workspace.root, *NET, "--tiles", 9, "--duplicate-cosine", 0.8)
    assert other.code == 2
    assert "duplicate_cosine was 0.9, now 0.8" in other.err
    assert "tiles was worked out, now 9" in other.err


def test_a_killed_run_goes_on_from_the_rows_that_are_there(lab, cli, monkeypatch):
    workspace, index = lab
    reads = []
    step = TileBatches.__next__

    def interrupted(self):
        if len(reads) == 4:
            raise KeyboardInterrupt
        tiles, numbers, positions = step(self)
        reads.append(numbers.tolist())
        return tiles, numbers, positions

    monkeypatch.setattr(TileBatches, "__next__", interrupted)
    assert cli("curate", "-w", workspace.root, *NET, "--embed-batch-size", 8).code == 130
    assert not workspace.subset("curated").tiles.exists()
    before = [number for batch in reads for number in batch]
    reads.clear()
    reads.append([])  # never 4 again at the same place
    monkeypatch.setattr(TileBatches, "__next__", step)
    told = cli("curate", "-w", workspace.root, *NET, "--embed-batch-size", 8)
    assert told.code == 0
    assert f"{len(before)} of 60 tiles are embedded" in told.err
    broken = open_subset(index, "curated").tiles.tolist()
    assert cli("curate", "-w", workspace.root, *NET, "--name", "whole").code == 0
    assert open_subset(index, "whole").tiles.tolist() == broken


def test_a_damaged_tile_is_left_out_and_not_tried_again(lab, cli):
    workspace, _ = lab
    zip_path = workspace.zip_of("A")
    raw = bytearray(zip_path.read_bytes())
    start = raw.find(b"\xff\xd8\xff", 200)
    raw[start + 2 : start + 60] = bytes(58)
    status = zip_path.stat()
    zip_path.write_bytes(raw)
    os.utime(zip_path, ns=(status.st_atime_ns, status.st_mtime_ns))
    told = cli("curate", "-w", workspace.root, *NET)
    assert told.code == 0, told.err
    assert ledger_of(workspace)["tiles"]["embedded"] == 59
    assert "was left out" in told.err
    again = cli("curate", "-w", workspace.root, *NET, "--name", "again")
    assert again.code == 0
    assert "was left out" not in again.err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--like-slides", "Aa"), "is none of the tiled slides"),
        (("--like-classes", "tumor", "--labels", "labels.csv"), "did you mean 'tumour'?"),
        (("--like-classes", "tumour"), "needs --labels"),
        (("--like-slides", "E", "--labels", "labels.csv"), "is left out"),
        (("--clusters", "10,100", "--tiles", "5"), "finest first"),
        (("--clusters", "10"), "together with --tiles"),
        (("--clusters", "ten", "--tiles", "5"), "whole numbers"),
        (("--duplicate-cosine", "1.5"), "at most 1"),
        (("--like-slides", "A", "--tiles", "3"), "hold 11 tiles by themselves"),
        (("--clusters", "90,10", "--tiles", "5"), "more than the 60 tiles"),
        (("--like-slides", "A,B,C,D,E"), "nothing to retrieve from"),
        (("--like-slides", "C,D", "--labels", "labels.csv"), "name the test slides by --exclude instead"),
        (("--name", "a/b"), "one plain directory name"),
    ],
)
def test_what_cannot_be_curated_is_refused_in_one_line(lab, cli, tmp_path, monkeypatch, options, said):
    workspace, _ = lab
    monkeypatch.chdir(tmp_path)
    told = cli("curate", "-w", workspace.root, *NET, *options)
    assert told.code == 2
    assert said in told.err
    assert told.err.count("error:") == 1
    if "a/b" not in options:
        assert not workspace.subset("curated").run_json.exists()  # the name is free for another try


def test_without_a_backbone_the_way_out_is_said(lab, cli):
    workspace, _ = lab
    told = cli("curate", "-w", workspace.root)
    assert told.code == 2
    assert "--backbone NAME --weights FILE" in told.err


# ---- pretraining on a subset

SHORT = ("--backbone", "resnet10t", "--weights", "random", "--steps", "2", "--batch-size", "8", "--view-px", "32")


def test_pretraining_sees_the_tiles_of_the_subset_and_says_so(lab, cli):
    workspace, index = lab
    assert cli("curate", "-w", workspace.root, *NET, "--like-slides", "C", "--tiles", "30").code == 0
    planned = cli("plan", "-w", workspace.root, *SHORT, "--subset", "curated")
    assert planned.code == 0, planned.err
    assert "subset curated of 60 tiles" in planned.err
    told = cli("pretrain", "-w", workspace.root, *SHORT, "--subset", "curated", "--name", "on-subset")
    assert told.code == 0, told.err
    run = workspace.pretrain("on-subset")
    subset = open_subset(index, "curated")
    assert json.loads(run.run_json.read_text())["tiles"]["subset"] == subset.facts()
    provenance = json.loads(run.backbone.with_suffix(".json").read_text())["provenance"]
    assert provenance["num_tiles"] == 30
    assert provenance["subset"] == subset.facts()
    seen = {index.slides[number] for number in index.slide_of(subset.tiles)}
    assert set(provenance["pretraining_slides"]) == seen


def test_a_subset_that_is_missing_or_of_other_tiles_is_refused(lab, cli):
    workspace, _ = lab
    none = cli("plan", "-w", workspace.root, *SHORT, "--subset", "curated")
    assert none.code == 2
    assert "make it with `histossl curate --name curated`" in none.err
    assert cli("curate", "-w", workspace.root, *NET).code == 0
    wrong = cli("plan", "-w", workspace.root, *SHORT, "--subset", "curate")
    assert wrong.code == 2
    assert "did you mean 'curated'?" in wrong.err
    write_synthetic_store(workspace, ("F",), 12, 32, picture=textured)
    other = cli("plan", "-w", workspace.root, *SHORT, "--subset", "curated")
    assert other.code == 2
    assert "was made of other tiles" in other.err
    again = cli("curate", "-w", workspace.root, *NET)
    assert again.code == 2
    assert "begun on other tiles" in again.err
    assert len(TileIndex.open(workspace)) == 72
