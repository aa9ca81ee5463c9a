"""A saved model works without the workspace it came from, and says where it knows nothing."""

import csv
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import simplejpeg
from PIL import Image
from synthetic_store import write_synthetic_store

from histossl.core.config import FinetuneConfig
from histossl.core.errors import MismatchError, UsageError, WeightsError
from histossl.core.workspace import Workspace
from histossl.evaluation.finetune import finetune
from histossl.evaluation.predict import predict, predict_tiles, tile_config
from histossl.heads.model_folder import distances, load_model
from histossl.labels.training_slides import slides_learnt
from histossl.slides.ledger import LedgerRow, write_ledger
from histossl.tiles.store.index import TileIndex


def trained(workspace: Workspace, head: str = "mean", unit: str = ""):
    """Slides whose red tells the label; returns the model's folder and the labels."""
    slides = [f"s{number:02d}" for number in range(20)]
    write_synthetic_store(workspace, slides, tiles_per_slide=6, tile_px=32)
    labels = {slide: "low" if n % 5 < 2 else "high" for n, slide in enumerate(slides)}
    lines = ["slide,label,patient,split"]
    lines += [
        f"{slide},{label},P{n},{'test' if n >= 15 else 'train'}" for n, (slide, label) in enumerate(labels.items())
    ]
    (workspace.root / "labels.csv").write_text("\n".join(lines) + "\n")
    config = FinetuneConfig(
        labels=str(workspace.root / "labels.csv"),
        starts=("random",),
        backbone="test_vit",
        input_px=32,
        draws=1,
        budgets=(2,),
        head=head,
        unit=unit,
    )
    finetune(workspace, "a", config)
    return workspace.finetune("a").model, labels


def table_of(workspace: Workspace, name: str = "default") -> dict[str, dict[str, str]]:
    with workspace.predictions(name).table.open() as file:
        return {row["slide"]: row for row in csv.DictReader(file)}


@pytest.mark.parametrize(("head", "unit"), [("mean", ""), ("mean", "tile"), ("abmil", "")])
def test_a_model_predicts_in_another_place_what_it_learnt(workspace, tmp_path, head, unit):
    model, labels = trained(workspace, head, unit)
    shutil.copytree(model, tmp_path / "moved")
    elsewhere = Workspace(tmp_path / "elsewhere").make()
    shutil.copytree(workspace.tiles, elsewhere.tiles, copy_function=shutil.copy2)
    shutil.rmtree(workspace.root)
    predict(elsewhere, tmp_path / "moved")
    rows = table_of(elsewhere)
    assert set(rows) == set(labels)
    right = np.mean([rows[slide]["predicted"] == label for slide, label in labels.items()])
    assert right > 0.8
    for row in rows.values():
        assert float(row["p_high"]) + float(row["p_low"]) == pytest.approx(1, abs=1e-5)
        assert row["num_tiles"] == "6"
    folder = elsewhere.predictions("default")
    collection = json.loads(folder.qupath("s03").read_text())
    assert len(collection["features"]) == 6
    corner = collection["features"][1]["geometry"]["coordinates"][0]
    assert corner[0] == [64, 0]  # level-0 pixels: 32 px at 0.5, of a slide at 0.25
    assert corner[2] == [128, 64]
    measurements = collection["features"][0]["properties"]["measurements"]
    assert measurements["probability high"] + measurements["probability low"] == pytest.approx(1, abs=1e-3)
    assert ("attention" in measurements) == (head == "abmil")
    with Image.open(folder.heatmap("s03")) as picture:
        assert np.asarray(picture.convert("RGB")).std() > 5


def test_without_a_model_folder_or_with_other_tiles_it_says_so(workspace, tmp_path, cli):
    model, _ = trained(workspace)
    (tmp_path / "model.json").write_text("{}")
    with pytest.raises(WeightsError, match="is damaged or not histossl"):
        load_model(tmp_path)
    other = Workspace(tmp_path / "other").make()
    write_synthetic_store(other, ["A"], tile_px=64)
    with pytest.raises(UsageError, match="knows tiles of 32 px"):
        predict(other, model)
    code, _, err = cli("predict", "--model", model, "-w", workspace.root, "--slide-mpp", 0.25)
    assert code == 2
    assert "add --slides DIR" in err
    code, _, err = cli("predict", "--model", tmp_path / "nowhere", "-w", workspace.root)
    assert code == 2
    assert "WORKSPACE/finetune/NAME/model" in err


def test_another_model_does_not_write_over_what_the_first_said(workspace, tmp_path):
    model, _ = trained(workspace)
    other = tmp_path / "other"
    shutil.copytree(model, other)
    (other / "model.json").write_text((other / "model.json").read_text().replace('"high"', '"tall"'))
    predict(workspace, model, heatmaps=False)
    said = workspace.predictions("default").table.read_text()
    run = json.loads(workspace.predictions("default").run_json.read_text())
    assert run["config"]["model"] == str(model)
    assert run["model"]["classes"] == ["high", "low"]
    predict(workspace, model, heatmaps=False)  # the same model again is welcome
    with pytest.raises(MismatchError, match="holds what another model said"):
        predict(workspace, other, heatmaps=False)
    assert workspace.predictions("default").table.read_text() == said
    predict(workspace, other, "second", heatmaps=False)


def test_what_was_said_of_other_slides_stays(workspace, monkeypatch, tmp_path):
    model, _ = trained(workspace)
    table = workspace.predictions("default").table
    predict(workspace, model, heatmaps=False)
    before = table.read_text().splitlines()
    only = [
        LedgerRow("s03.svs", slide="s03", num_tiles=6),
        LedgerRow("x.svs", num_tiles=0, reason="torn"),
    ]
    monkeypatch.setattr("histossl.evaluation.predict.tile_archive", lambda *args, **named: only)
    predict(workspace, model, slides=tmp_path, heatmaps=False)
    after = table.read_text().splitlines()
    assert set(after) == {*before, after[-1]}
    assert after[-1].startswith("x.svs,")
    assert len(after) == len(before) + 1
    older = [",".join(cells[:5] + cells[6:]) for cells in (line.split(",") for line in before)]  # without trained_on
    assert older[0] == "slide,predicted,p_high,p_low,num_tiles,distance,usual_distance,warning"
    table.write_text("\n".join(older) + "\n")
    predict(workspace, model, slides=tmp_path, heatmaps=False)
    assert {slide: row["trained_on"] for slide, row in table_of(workspace).items() if row["trained_on"]} == {
        "s03": "yes"
    }
    assert len(table_of(workspace)) == 21


def test_slides_that_the_model_was_trained_on_are_marked(workspace, cli):
    """Fifteen of twenty were its training slides: what it says of these is no test of it."""
    model, labels = trained(workspace)
    told = cli("predict", "--model", model, "-w", workspace.root, "--no-heatmaps")
    assert told.code == 0
    marked = {slide: row["trained_on"] for slide, row in table_of(workspace).items()}
    assert marked == {slide: "no" if number >= 15 else "yes" for number, slide in enumerate(labels)}
    assert "trained with the labels of 15 of the 20 slides here" in " ".join(told.err.split())


def stored(workspace: Workspace, contents: dict[str, int], spots: str = "") -> None:
    """Zips whose fingerprints are numbers; `trained` gives its n-th slide the number n."""
    from histossl.tiles.store.zip_store import new_store, read_store

    write_synthetic_store(workspace, list(contents), tiles_per_slide=6, tile_px=32)
    for slide, number in contents.items():
        path = workspace.zip_of(slide)
        before = read_store(path)
        tiling = {key: value for key, value in before.tiling.items() if key not in ("format", "digest")}
        tiling["slide"] |= {"fingerprint": f"{number:032x}", **({"spots": spots} if spots else {})}
        data = path.read_bytes()
        with new_store(path, [0.5]) as writer:
            for row in before.table:
                jpeg = data[row["offset"] : row["offset"] + row["length"]]
                writer.add(int(row["x_l0"]), int(row["y_l0"]), jpeg, float(row["tissue"]))
            writer.finish(tiling)


def test_a_training_slide_is_known_by_its_content_whatever_its_name(workspace, tmp_path, cli):
    """Slide 3 was trained on, 17 was tested. A copy of 3 has another name, and a new slide has the name of 3."""
    model, _ = trained(workspace)
    elsewhere = Workspace(tmp_path / "elsewhere").make()
    stored(elsewhere, {"copy": 3, "s03": 900, "s17": 17})
    told = cli("predict", "--model", model, "-w", elsewhere.root, "--no-heatmaps")
    assert told.code == 0, told.err
    assert {slide: row["trained_on"] for slide, row in table_of(elsewhere).items()} == {
        "copy": "yes",
        "s03": "no",
        "s17": "no",
    }
    assert "with the label of 1 of the 3 slides here" in " ".join(told.err.split())
    assert "compared by the slides' names" not in told.out + told.err


def test_the_one_slide_here_is_told_in_the_singular(workspace, tmp_path, cli):
    model, _ = trained(workspace)
    elsewhere = Workspace(tmp_path / "elsewhere").make()
    stored(elsewhere, {"s03": 3})
    told = cli("predict", "--model", model, "-w", elsewhere.root, "--no-heatmaps")
    said = " ".join(told.err.split())
    assert "trained with the label of the one slide here (trained_on in the file): what it says of it tests" in said


def test_a_model_without_fingerprints_compares_names_and_says_so(workspace, tmp_path, cli):
    model, _ = trained(workspace)
    facts = json.loads((model / "model.json").read_text())
    assert facts["provenance"].pop("contents")["s03"] == [f"{3:032x}", ""]
    (model / "model.json").write_text(json.dumps(facts))
    elsewhere = Workspace(tmp_path / "elsewhere").make()
    stored(elsewhere, {"copy": 3, "s03": 900})
    told = cli("predict", "--model", model, "-w", elsewhere.root, "--no-heatmaps")
    assert {slide: row["trained_on"] for slide, row in table_of(elsewhere).items()} == {"copy": "no", "s03": "yes"}
    assert "compared by the slides' names, for the model was made by an older histossl" in " ".join(
        (told.out + told.err).split()
    )


def test_slides_alike_in_few_samples_are_told_apart_by_many(workspace):
    model = load_model(trained(workspace)[0])
    contents = {slide: [few, "a"] for slide, (few, _) in model.info.provenance["contents"].items()}
    model = replace(model, info=replace(model.info, provenance={**model.info.provenance, "contents": contents}))
    for spots, expected in (("a", {"s03"}), ("b", set()), ("", {"s03"})):
        shutil.rmtree(workspace.tiles)
        stored(workspace, {"s03": 3, "s04": 904}, spots)
        assert slides_learnt(model.info.provenance, TileIndex.open(workspace)).slides == expected, spots


def test_the_models_tiling_is_the_one_it_was_trained_on(workspace):
    model, _ = trained(workspace)
    config = tile_config(load_model(model))
    assert config.tile_px == 32
    assert config == config.__class__(tile_px=32)


def test_a_slide_far_from_the_training_data_is_warned_of(workspace):
    model = load_model(trained(workspace)[0])
    known = model.training_ND[:1].astype(np.float32).repeat(9, 0)
    assert predict_tiles(model, "A", known)[0].warning == ""
    far = known + 40 * model.training_ND.std(0).astype(np.float32)
    assert "times as far from the training slides" in predict_tiles(model, "A", far)[0].warning
    assert "only 2 tiles" in predict_tiles(model, "A", known[:2])[0].warning


def test_distances_are_those_of_a_plain_loop():
    rng = np.random.default_rng(0)
    training, new = rng.normal(size=(12, 5)), rng.normal(size=(3, 5)) + 1
    patients = np.arange(12) // 2
    found, usual = distances(training, patients, new)
    scaled = [(rows - training.mean(0)) / training.std(0) / np.sqrt(5) for rows in (training, new)]
    expected = [min(np.linalg.norm(row - other) for other in scaled[0]) for row in scaled[1]]
    left_out = [
        min(np.linalg.norm(row - other) for j, other in enumerate(scaled[0]) if patients[j] != patients[i])
        for i, row in enumerate(scaled[0])
    ]
    np.testing.assert_allclose(found, expected)
    assert usual == pytest.approx(max(left_out))


def test_new_patients_of_the_same_kind_are_rarely_warned_of_and_others_mostly():
    rng = np.random.default_rng(1)
    patients = np.arange(60) // 2
    warned = {"same": 0, "other": 0}
    for _ in range(200):
        own = rng.normal(size=(31, 40)).repeat(2, 0) + 0.3 * rng.normal(size=(62, 40))
        same, other = own[60:61], own[60:61] + 2 * rng.choice([-1, 1], 40)
        for kind, x in (("same", same), ("other", other)):
            found, usual = distances(own[:60], patients, x)
            warned[kind] += found[0] > usual
    assert warned["same"] <= 16  # 1 in 31 by chance
    assert warned["other"] >= 190


def test_the_heatmap_shows_each_tile_at_its_place(workspace, tmp_path):
    from histossl.evaluation.heatmap import GAP_PX, draw_heatmap

    index = write_synthetic_store(workspace, ["A"], tiles_per_slide=12, tile_px=32)
    values = np.zeros(12)
    values[3] = 1.0
    draw_heatmap(tmp_path / "a.png", index, np.arange(12), 64.0, values, "x", 0.0, 1.0)
    with Image.open(tmp_path / "a.png") as opened:
        page = np.asarray(opened)
    width = (page.shape[1] - GAP_PX) // 2
    side = width // 10
    tile = simplejpeg.decode_jpeg(index.read(3))
    shown = page[side // 2, 3 * side + side // 2].astype(int)
    assert np.abs(shown - tile[16, 16]).max() < 30
    right = page[side // 2, width + GAP_PX :].astype(int)
    bright = right[3 * side + side // 2]
    dark = right[4 * side + side // 2]
    assert bright[1] > dark[1] + 40  # yellow against violet
    assert (page[side + side // 2, 2 * side + side // 2 :][: side // 2] == 255).all()  # no tile, no tissue


def test_slides_that_cannot_be_read_have_a_row_with_the_reason(workspace, tmp_path, paint, cli):
    painted = paint("good.tif", mpp=0.5)
    (painted.path.parent / "broken.svs").write_bytes(b"II*\0garbage")
    store = Workspace(tmp_path / "train").make()
    model, _ = trained(store)
    code, _, err = cli("predict", "--model", model, "--slides", painted.path.parent, "-w", workspace.root)
    assert code == 0, err
    rows = table_of(workspace)
    assert rows["good"]["predicted"] in ("high", "low")
    assert any("not predicted" in row["warning"] for name, row in rows.items() if "broken" in name)
    assert TileIndex.open(workspace).tile_px == 32


def test_a_copy_of_a_tiled_slide_is_predicted_under_its_own_name(workspace, tmp_path, paint, cli):
    painted = paint("good.tif", mpp=0.5)
    store = Workspace(tmp_path / "train").make()
    model, _ = trained(store)
    new = tmp_path / "new"
    new.mkdir()
    shutil.copy(painted.path, new / "neu.tif")
    predict(workspace, model, slides=painted.path.parent)
    told = cli("predict", "--model", model, "--slides", new, "-w", workspace.root)
    assert told.code == 0, told.err
    assert "neu is predicted from the tiles of good, which has the same content" in " ".join(told.err.split())
    assert TileIndex.open(workspace).slides == ["good"]
    rows = table_of(workspace)
    assert {**rows["neu"], "slide": "good"} == rows["good"]
    assert rows["neu"]["predicted"] in ("high", "low")
    folder = workspace.predictions("default")
    assert folder.heatmap("neu").read_bytes() == folder.heatmap("good").read_bytes()
    assert folder.qupath("neu").exists()


def test_a_copy_of_a_training_slide_is_marked_as_trained_on(workspace, monkeypatch, tmp_path):
    model, _ = trained(workspace)
    copy = LedgerRow("neu.svs", slide="neu", tile_status="no tiles", tile_twin="s03", num_tiles=0)
    write_ledger(workspace.archive_csv, [copy])
    monkeypatch.setattr("histossl.evaluation.predict.tile_archive", lambda *args, **named: [copy])
    predict(workspace, model, slides=tmp_path, heatmaps=False)
    assert table_of(workspace)["neu"]["trained_on"] == "yes"


def test_a_head_with_nan_is_refused_when_it_is_loaded(workspace, cli):
    from safetensors.numpy import load_file, save_file

    model, _ = trained(workspace)
    arrays = load_file(model / "head.safetensors")
    name = next(name for name, array in arrays.items() if array.dtype.kind == "f" and array.ndim)
    arrays[name].flat[0] = np.nan
    save_file(arrays, model / "head.safetensors")
    told = cli("predict", "--model", model, "-w", workspace.root)
    assert told.code == 1
    assert f"{name} in its head.safetensors" in told.err
