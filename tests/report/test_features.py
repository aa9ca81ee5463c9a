"""What the report shows of the features is what the features are."""

import base64
import io
import math
import re
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from simulated import write_finetuning, write_tiles_and_embeddings

from histossl import cli
from histossl.core.workspace import Workspace
from histossl.report.content import read_content
from histossl.report.features import _sample, look_at_features, neighbourhoods
from histossl.report.html import render


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    workspace = Workspace(tmp_path_factory.mktemp("features") / "ws")
    run = write_finetuning(workspace)
    write_tiles_and_embeddings(workspace, run)
    return read_content(run, workspace), workspace


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_features_that_say_the_label_agree_wholly():
    x = unit(np.repeat(np.eye(2), 24, 0) + 0.01 * np.random.default_rng(0).standard_normal((48, 2)))
    labels = ["a"] * 24 + ["b"] * 24
    patients = [f"{number // 6}" for number in range(48)]  # four patients a class
    agreement, clumping, nearest = neighbourhoods(x, labels, patients, patients)
    assert agreement == 1
    assert clumping < 0.5
    of_patient = np.array(patients)
    assert (of_patient[nearest] != of_patient[:, None]).all()  # never a tile of the same patient


def test_features_that_say_the_slide_clump_and_do_not_agree():
    rng = np.random.default_rng(0)
    x = unit(np.repeat(rng.standard_normal((8, 16)), 15, 0) + 0.01 * rng.standard_normal((120, 16)))
    slides = [f"{number // 15}" for number in range(120)]
    labels = ["a" if int(slide) % 2 else "b" for slide in slides]
    _, clumping, _ = neighbourhoods(x, labels, slides, slides)
    assert clumping == 1


def test_a_class_with_one_patient_is_left_out_of_the_agreement():
    x = unit(np.random.default_rng(0).standard_normal((40, 4)))
    labels = ["a"] * 20 + ["b"] * 20
    assert math.isnan(neighbourhoods(x, labels, labels, labels)[0])


def test_adapted_features_agree_more(content):
    found = look_at_features(*content)
    assert found.starts == ["imagenet", "adapted"]
    assert found.num_tiles == 33 * 8
    assert found.agreement["adapted"] > 0.95
    assert found.agreement["imagenet"] < 0.7


def test_pictures_are_of_the_slides_they_are_said_to_be_of(content):
    """The synthetic tiles carry their slide's number in red: its label must be the one beneath the picture."""
    page, workspace = content
    found = look_at_features(page, workspace)
    label_of = {one.slide: one.label for one in page.predictions}
    slides = sorted(label_of)
    assert [panel.label for panel in found.panels] == page.classes
    for panel in found.panels:
        for picture in [one for row in panel.neighbours.values() for one in row]:
            with Image.open(io.BytesIO(base64.b64decode(picture.uri.partition(",")[2]))) as image:
                red = np.asarray(image.convert("RGB"))[..., 0].mean()
            nearest = [slide for n, slide in enumerate(slides) if abs(40 + n * 37 % 200 - red) < 4]
            assert picture.label in {label_of[slide] for slide in nearest}
            assert picture.same == (picture.label == panel.label)


def test_the_same_features_give_the_same_page(content):
    page, workspace = content
    first, second = (render(page, look_at_features(page, workspace)) for _ in range(2))
    assert first == second


def test_sites_colour_the_map_where_they_are_known(content):
    page, workspace = content
    slides = sorted({one.slide for one in page.predictions})
    page.facts["sites"] = {slide: f"site {number % 2}" for number, slide in enumerate(slides)}
    page.facts["site"] = {
        "start": "imagenet", "num_sites": 2, "site_from_features": 0.91, "site_chance": 0.5, "label_from_site": 0.34,
        "label_chance": 0.33, "entangled": False,
    }  # fmt: skip
    found = look_at_features(page, workspace)
    text = render(page, found)
    del page.facts["sites"], page.facts["site"]
    assert set(found.colourings["site"]) == {"site 0", "site 1"}
    assert "by site" in text
    assert "balanced accuracy of 0.91 (chance 0.50)" in text
    assert "not entangled" in text


def test_of_a_region_only_its_own_tiles_are_shown(content):
    """Each slide has two regions, of its label and another; tile 2 lies in both, the rest in none."""
    page, workspace = content
    rows, of_regions = [], {}
    for one in page.predictions:
        other = next(label for label in page.classes if label != one.label)
        for number, (label, tiles) in enumerate(((one.label, [0, 2]), (other, [1, 2])), start=1):
            rows.append(replace(one, slide=f"{one.slide}#{number}", label=label))
            of_regions[rows[-1].slide] = tiles
    regions = replace(page, predictions=rows, facts={**page.facts, "unit": "region", "region_tiles": of_regions})
    sample = _sample(regions, workspace, ["imagenet"])
    label_of = {one.slide: one.label for one in page.predictions}
    assert sorted(zip(sample.slide, sample.row.tolist(), strict=True)) == sorted(
        (s, n) for s in label_of for n in (0, 1)
    )
    for slide, row, label in zip(sample.slide, sample.row.tolist(), sample.label, strict=True):
        assert (label == label_of[slide]) == (row == 0)


def test_missing_embeddings_are_said_and_break_nothing(content, tmp_path):
    page, workspace = content
    copied = Workspace(shutil.copytree(workspace.root, tmp_path / "ws"))
    embedded = copied.embeddings("adapted-0123-64px")
    next(embedded.glob("*.h5")).unlink()
    assert look_at_features(page, copied) is None
    assert "no map of features" in render(page, None)
    next(embedded.glob("*.h5")).write_bytes(b"not HDF5")
    assert look_at_features(page, copied) is None


def test_without_tiles_the_map_stays(content, tmp_path):
    page, workspace = content
    copied = Workspace(shutil.copytree(workspace.root, tmp_path / "ws"))
    shutil.rmtree(copied.tiles)
    found = look_at_features(page, copied)
    assert found.places
    assert not found.panels


def test_tiles_that_decide_are_those_with_the_most_attention(content, monkeypatch, tmp_path):
    page, workspace = content
    (page.run.model).mkdir()
    (page.run.model / "model.json").write_text("{}")
    info = SimpleNamespace(classes=tuple(page.classes), start="adapted", num_items=33)

    def predicted(model, slide, features):
        attention = np.zeros(len(features))
        attention[5] = 1
        return SimpleNamespace(shares=np.array([1.0, 0, 0])), np.zeros((len(features), 3)), attention

    model = SimpleNamespace(info=info, embedder=lambda device: None)
    monkeypatch.setattr("histossl.heads.model_folder.load_model", lambda folder: model)
    embedded = workspace.embeddings("adapted-0123-64px")
    monkeypatch.setattr(
        "histossl.features.extraction.embed_slides",
        lambda workspace, index, slides, *rest: {slide: embedded / f"{slide}.h5" for slide in slides},
    )
    monkeypatch.setattr("histossl.evaluation.predict.predict_tiles", predicted)
    found = look_at_features(page, workspace)
    shutil.rmtree(page.run.model)
    assert found.deciding_by == "attention"
    assert "with folds it is trained on everything in the end" in render(page, found)
    assert [label for label, _ in found.deciding] == page.classes
    for label, pictures in found.deciding:
        assert len(pictures) == 7
        for picture in pictures:
            with Image.open(io.BytesIO(base64.b64decode(picture.uri.partition(",")[2]))) as image:
                green = np.asarray(image.convert("RGB"))[..., 1].mean()
            assert green == pytest.approx(40 + 5 * 13, abs=4)  # the sixth tile
            assert picture.label == page.classes[0]
            assert picture.same == (label == page.classes[0])


def test_umap_without_its_library_is_one_clear_line(content, monkeypatch, capsys):
    _, workspace = content
    monkeypatch.setitem(sys.modules, "umap", None)  # as if it were not installed
    assert cli.main(["report", "--map", "umap", "-w", str(workspace.root)]) == 2
    assert "pip install 'histossl[umap]'" in capsys.readouterr().err
    assert cli.main(["report", "--map", "tsne", "-w", str(workspace.root)]) == 2
    assert "must be one of pca, umap" in capsys.readouterr().err


@pytest.mark.slow
def test_umap_stands_beside_the_principal_components_and_parts_what_is_apart(content):
    pytest.importorskip("umap", reason="umap-learn is not installed (the extra histossl[umap])")
    read, workspace = content
    found = look_at_features(read, workspace, with_umap=True)
    again = look_at_features(read, workspace, with_umap=True)
    labels = np.array(found.colourings["label"])
    for start, places in found.umap_places.items():
        np.testing.assert_array_equal(places, again.umap_places[start])
    spread = {}
    for start, places in found.umap_places.items():
        middles = np.stack([places[labels == label].mean(0) for label in sorted(set(labels))])
        within = np.mean([places[labels == label].std(0).mean() for label in sorted(set(labels))])
        spread[start] = middles.std(0).mean() / within
    assert spread["adapted"] > spread["imagenet"]  # whose features tell the class less
    page = render(read, found)
    assert {"figure-features", "figure-features-umap"} <= set(re.findall(r'<figure id="([^"]+)"', page))
