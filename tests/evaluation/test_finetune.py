"""From tiles to curve: it resumes, it repeats, one start does not touch another, and labels are what count."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from synthetic_store import write_synthetic_store

from histossl.backbones.loading import create_backbone, save_backbone, save_tensors
from histossl.core.config import EmbedConfig, FinetuneConfig
from histossl.core.errors import LabelsError, MismatchError, StoreError, TrainingError, UsageError, WeightsError
from histossl.core.workspace import Workspace
from histossl.evaluation.finetune import finetune
from histossl.evaluation.journal import Journal
from histossl.features.extraction import Bags, backbone_embedder, colour_embedder, embed_slides, slide_tiles
from histossl.features.initialisations import resolve_starts
from histossl.report.html import write_report
from histossl.runtime.locks import alone_in_run
from histossl.stats.tables import read_points, read_predictions, read_summary
from histossl.tiles.store.index import TileIndex

SLIDES = [f"s{number:02d}" for number in range(24)]
CPU = torch.device("cpu")
ONE = {"draws": 1, "budgets": (1,)}  # where the curve itself does not matter


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    """24 slides of 12 patients: red (the slide's number) separates the first half from the second."""
    root = tmp_path_factory.mktemp("archive")
    write_synthetic_store(Workspace(root).make(), SLIDES, tiles_per_slide=5, tile_px=32)
    lines = ["slide,label,patient"] + [f"s{n:02d}.svs,{'low' if n % 5 < 2 else 'high'},P{n % 12}" for n in range(24)]
    (root / "labels.csv").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture
def ready(archive, tmp_path) -> Workspace:
    shutil.copytree(archive, tmp_path / "w", copy_function=shutil.copy2)
    return Workspace(tmp_path / "w")


def config_of(workspace: Workspace, **options) -> FinetuneConfig:
    common = {"starts": ("random", "colour"), "backbone": "test_vit", "input_px": 32, "mixed_patients": True}
    quick = {"draws": 2, "folds": 2, "budgets": (1, 4), "head": "simpleshot"}
    return FinetuneConfig(labels=str(workspace.root / "labels.csv"), **{**common, **quick, **options})


def tables_of(workspace: Workspace, name: str = "a") -> tuple[list, list, list]:
    run = workspace.finetune(name)
    return read_points(run.points), read_predictions(run.predictions)[0], read_summary(run.summary)


def export(workspace: Workspace, run: str, seed: int, slides: list[str] | None = None) -> Path:
    backbone, info = create_backbone("test_vit", "random", seed)
    provenance = {"start_weights": "random"} | ({} if slides is None else {"pretraining_slides": slides})
    path = workspace.pretrain(run).backbone
    save_backbone(path, backbone, replace(info, input_px=32, provenance=provenance))
    return path


# ---- embeddings


def test_embeddings_are_the_backbones_features_of_the_tiles_in_order(ready):
    index = TileIndex.open(ready)
    backbone, info = create_backbone("test_vit", "random", 3)
    embedder = backbone_embedder("mine", backbone, info, 32, CPU)
    paths = embed_slides(ready, index, ["s03"], embedder, EmbedConfig(batch_size=2))
    assert paths["s03"].parent.parent == ready.root / "embeddings"
    with h5py.File(paths["s03"]) as file:
        features, coords = file["features"][:], file["coords"][:]
        np.testing.assert_allclose(file["mean"][:], features.mean(0), atol=1e-6)
    numbers = slide_tiles(index, "s03")
    np.testing.assert_array_equal(coords, index.coords_l0(numbers))
    from histossl.tiles.stream.loader import decode_tiles

    tiles = decode_tiles(index.read_many(numbers), 32)
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (info.mean, info.std))
    with torch.no_grad():
        expected = backbone((tiles / 255 - mean) / std).numpy()
    np.testing.assert_allclose(features, expected, atol=1e-4)


def test_tiles_of_a_bag_are_mapped_and_not_held(ready):
    """Of thousands of slides an attention head sees a few tiles at a time: memory must not grow with the archive."""
    path = embed_slides(ready, TileIndex.open(ready), ["s03"], colour_embedder(32, CPU), EmbedConfig())["s03"]
    with h5py.File(path) as file:
        features = file["features"][:]
    bags = Bags([(path, None), (path, np.array([4, 1])), (path, np.array([2]))])
    assert isinstance(bags.tiles(0), np.memmap)
    for item, rows in enumerate((slice(None), [4, 1], [2])):
        np.testing.assert_array_equal(bags.tiles(item), features[rows])
    bags.tiles(0)[:] = 0
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file["features"][:], features)


def test_embeddings_are_made_once_and_made_anew_when_tiles_or_weights_change(ready):
    index = TileIndex.open(ready)
    embedder = colour_embedder(32, CPU)
    counted = []
    watched = replace(embedder, embed=lambda tiles: counted.append(len(tiles)) or embedder.embed(tiles))
    slides = ["s00", "s01"]
    for _ in range(2):
        embed_slides(ready, index, slides, watched, EmbedConfig())
    assert sum(counted) == 10
    with h5py.File(ready.embeddings(embedder.folder) / "s01.h5", "r+") as file:
        file.attrs["tiles_digest"] = "other"
    embed_slides(ready, index, slides, watched, EmbedConfig())
    assert sum(counted) == 15
    (ready.embeddings(embedder.folder) / "s00.h5").write_bytes(b"cut off")
    embed_slides(ready, index, slides, watched, EmbedConfig())
    assert sum(counted) == 20


def test_slides_of_one_patient_embed_the_same_alone_and_in_company(ready):
    index = TileIndex.open(ready)
    embedder = colour_embedder(32, CPU)
    paths = embed_slides(ready, index, SLIDES[:4], embedder, EmbedConfig(batch_size=3))
    together = [Bags([(path, None)]).tiles(0) for path in paths.values()]
    shutil.rmtree(ready.root / "embeddings")
    for slide, features in zip(SLIDES[:4], together, strict=True):
        alone = embed_slides(ready, index, [slide], embedder, EmbedConfig(batch_size=3))
        np.testing.assert_array_equal(Bags([(alone[slide], None)]).tiles(0), features)


def test_features_that_are_not_finite_stop_everything(ready):
    embedder = replace(colour_embedder(32, CPU), embed=lambda tiles: torch.full((len(tiles), 27), float("nan")))
    with pytest.raises(WeightsError, match="5 of 5 tiles of s00 give features that are not finite"):
        embed_slides(ready, TileIndex.open(ready), ["s00"], embedder, EmbedConfig())


def test_a_damaged_tile_costs_its_slide_and_no_other(ready):
    index = TileIndex.open(ready)
    row = index.rows([slide_tiles(index, "s01")[2]])[0]
    with ready.zip_of("s01").open("r+b") as file:
        file.seek(int(row["offset"]))
        file.write(b"\0" * int(row["length"]))
    (ready.index).unlink()
    index = TileIndex.open(ready)
    embedder = colour_embedder(32, CPU)
    with pytest.raises(StoreError, match="1 of 3 slides have damaged tiles, the first s01"):
        embed_slides(ready, index, ["s00", "s01", "s02"], embedder, EmbedConfig())
    assert sorted(path.stem for path in ready.embeddings(embedder.folder).iterdir()) == ["s00", "s02"]


# ---- the curve


def test_the_curve_has_every_start_budget_and_draw(ready):
    finetune(ready, "a", config_of(ready, head="mean", budgets=(1, 2, "all")))
    points, predictions, summary = tables_of(ready)
    cells = {(point.start, point.budget, point.draw) for point in points}
    budgets = {point.budget for point in points}
    assert cells == {(s, b, d) for s in ("random", "colour") for b in budgets for d in (0, 1)}
    assert {"auroc", "balanced_accuracy", "f1", "log_loss", "calibration_error"} == {point.metric for point in points}
    for draw in (0, 1):  # with folds each slide is tested once per draw
        tested = [p.slide for p in predictions if (p.start, p.budget, p.draw) == ("colour", 1, draw)]
        assert sorted(tested) == SLIDES
    assert {row.num_patients for row in summary} == {12}
    run = json.loads(ready.finetune("a").run_json.read_text())
    assert run["classes"] == ["high", "low"]
    assert run["labels"]["num_items"] == 24


def test_the_same_command_twice_and_from_scratch_gives_the_same_numbers(ready):
    finetune(ready, "a", config_of(ready))
    before = tables_of(ready)
    finetune(ready, "a", config_of(ready))
    assert tables_of(ready) == before
    finetune(ready, "b", config_of(ready))
    assert tables_of(ready, "b") == before


@pytest.mark.parametrize("kept", [0, 0.02, 0.5, 0.99])
def test_a_run_cut_off_anywhere_ends_with_the_same_numbers(ready, kept):
    finetune(ready, "a", config_of(ready))
    before = tables_of(ready)
    run = ready.finetune("a")
    for start in ("random", "colour"):
        whole = run.journal(start).read_bytes()
        run.journal(start).write_bytes(whole[: int(kept * len(whole))])
    run.points.unlink()
    finetune(ready, "a", config_of(ready))
    assert tables_of(ready) == before


def test_one_more_start_changes_nothing_about_the_others(ready):
    finetune(ready, "a", config_of(ready, starts=("colour",)))
    before, _, _ = tables_of(ready)
    finetune(ready, "a", config_of(ready, starts=("random", "colour")))
    after, _, _ = tables_of(ready)
    assert [point for point in after if point.start == "colour"] == before
    assert {point.start for point in after} == {"random", "colour"}


def test_the_same_backbone_under_two_names_gives_the_same_points(ready):
    path = export(ready, "run", seed=3)
    finetune(ready, "a", config_of(ready, starts=(f"one={path}", f"two={path}"), backbone=""))
    points, _, _ = tables_of(ready)
    one, two = ([replace(p, start="") for p in points if p.start == start] for start in ("one", "two"))
    assert one == two
    assert one


def test_other_settings_labels_or_weights_need_another_name(ready):
    finetune(ready, "a", config_of(ready))
    with pytest.raises(MismatchError, match="draws was 2, now 3"):
        finetune(ready, "a", config_of(ready, draws=3))
    with pytest.raises(MismatchError, match="seed was 0, now 1"):
        finetune(ready, "a", config_of(ready, seed=1))
    labels = ready.root / "labels.csv"
    labels.write_text(labels.read_text().replace("s00.svs,low", "s00.svs,high"))
    with pytest.raises(
        MismatchError, match=r"a was made with other labels \(s00 was 'low', now 'high'\); use another --name"
    ):
        finetune(ready, "a", config_of(ready))


def test_regions_that_moved_need_another_name(ready):
    def draw(x):
        lines = ["slide,x,y,width,height,label,patient"]
        lines += [f"s{n:02d},{x * 64},0,64,64,left,P{n}\ns{n:02d},256,0,64,64,right,P{n}" for n in range(24)]
        (ready.root / "labels.csv").write_text("\n".join(lines) + "\n")

    draw(0)
    finetune(ready, "a", config_of(ready, starts=("colour",)))
    draw(1)
    with pytest.raises(MismatchError, match=r"other regions or tiles \(s00#1 and 23 more\)"):
        finetune(ready, "a", config_of(ready, starts=("colour",)))


def test_slides_tiled_anew_need_another_name(ready):
    finetune(ready, "a", config_of(ready, starts=("colour",)))
    before = ready.finetune("a").run_json.read_text()
    shutil.rmtree(ready.tiles)
    write_synthetic_store(ready, SLIDES, tiles_per_slide=4, tile_px=32, mpp=1.0)
    with pytest.raises(MismatchError, match=r"other tiles of these slides \(32 px at 0.5 .* now 32 px at 1 "):
        finetune(ready, "a", config_of(ready, starts=("colour",)))
    assert ready.finetune("a").run_json.read_text() == before
    ready.finetune("a").run_json.unlink()  # the journal by itself knows too
    with pytest.raises(MismatchError, match="made with other tiles"):
        finetune(ready, "a", config_of(ready, starts=("colour",)))


def test_a_start_that_became_another_is_noticed(ready):
    export(ready, "run", seed=3)
    finetune(ready, "a", config_of(ready, starts=("adapted",), backbone=""))
    export(ready, "run", seed=4)
    with pytest.raises(MismatchError, match="'adapted' was measured with other weights"):
        finetune(ready, "a", config_of(ready, starts=("adapted",), backbone=""))


def test_a_dry_run_writes_nothing(ready, cli):
    before = sorted(ready.root.rglob("*"))
    code, _, err = cli(
        "finetune", "--labels", ready.root / "labels.csv", "-w", ready.root, "--dry-run", "--mixed-patients"
    )
    assert code == 0
    assert "24 slides named, 24 found, 0 missing" in err
    assert sorted(ready.root.rglob("*")) == before


def test_a_dry_run_says_that_the_site_gives_the_label_away(ready, capsys):
    lines = ["slide,label,patient,site"]
    lines += [f"s{n:02d},{'low' if n % 12 < 6 else 'high'},P{n % 12},{'K' if n % 12 < 6 else 'L'}" for n in range(24)]
    (ready.root / "labels.csv").write_text("\n".join(lines) + "\n")
    finetune(ready, "a", config_of(ready), dry_run=True)
    said = " ".join(capsys.readouterr().err.split())
    assert "the site alone tells the label with a balanced accuracy of 1.00" in said
    assert not ready.finetune("a").root.exists()


def test_a_dry_run_looks_at_the_starts_that_are_asked_for(ready, cli):
    """It is what one does before a job is queued; starts that nobody named may only be pretrained after it."""
    base = ["finetune", "--labels", ready.root / "labels.csv", "-w", ready.root, "--mixed-patients", "--dry-run"]
    for options, said in (
        (["--starts", "imagnet"], "'imagnet' is neither"),
        (["--adapted", "s9"], "no such file or run"),
    ):
        code, _, err = cli(*base, *options)
        assert code == 2
        assert said in " ".join(err.split())
    code, _, err = cli(*base, "--starts", "random,colour", "--backbone", "test_vit")
    assert code == 0
    assert "the labels and the starts are in order" in err
    assert cli(*base)[0] == 0


def test_the_same_labelled_slides_give_the_same_head_in_every_draw(ready):
    """With a fixed test set all labels are the same slides in each draw; folds within them must not differ either."""
    lines = ["slide,label,patient,split"]
    lines += [f"s{n:02d},{'low' if n % 5 < 2 else 'high'},P{n},{'test' if n % 4 == 3 else 'train'}" for n in range(24)]
    (ready.root / "labels.csv").write_text("\n".join(lines) + "\n")
    own = {"draws": 4, "folds": 0, "budgets": (2, "all"), "head": "mean", "mixed_patients": False}
    finetune(ready, "a", config_of(ready, starts=("random",), **own))
    rows = [row for row in tables_of(ready)[1] if row.start == "random"]
    said = {b: [[r.probabilities for r in rows if (r.budget, r.draw) == (b, d)] for d in range(4)] for b in (2, "all")}
    assert said["all"][1:] == said["all"][:-1]
    assert said[2][1:] != said[2][:-1]


def test_two_at_once_into_one_curve_are_refused(ready):
    with alone_in_run(ready.finetune("a")):
        with pytest.raises(TrainingError, match="another process is at work on this run"):
            finetune(ready, "a", config_of(ready, **ONE))
        finetune(ready, "a", config_of(ready, **ONE), dry_run=True)
        finetune(ready, "b", config_of(ready, **ONE))
    finetune(ready, "a", config_of(ready, **ONE))


def test_labels_of_another_workspace_are_told_as_such(ready, cli):
    (ready.root / "other.csv").write_text("slide,label\ns00,low\nnone1,high\nnone2,high\n")
    code, _, err = cli("finetune", "--labels", ready.root / "other.csv", "-w", ready.root)
    assert code == 2
    assert f"2 of its 3 slides have no tiles in {ready.root}, the first 'none1'" in " ".join(err.split())


def test_the_pretraining_pool_is_told(ready):
    export(ready, "run", seed=3, slides=SLIDES[:7])
    finetune(ready, "a", config_of(ready, starts=("adapted", "random"), backbone=""))
    leak = json.loads(ready.finetune("a").run_json.read_text())["leak"]
    assert leak["seen"] == {"adapted": 14}  # the other slides of these seven patients, s12 to s18, are no news either
    assert leak["only_beside"] == {"adapted": 7}
    assert "7 of 24 tested slides were in its pretraining pool, and other slides of 7 tested pat" in leak["statement"]
    export(ready, "all", seed=3, slides=SLIDES)
    finetune(ready, "b", config_of(ready, starts=("adapted", "random"), backbone="", adapted="all", **ONE))
    facts = json.loads(ready.finetune("b").run_json.read_text())
    assert facts["leak"]["only_beside"] == {"adapted": 0}
    assert "24 of 24 tested slides were in the pretraining pool" in " ".join(facts["verdict"]["limits"])


def test_the_pretraining_pool_is_told_in_what_is_tested(ready):
    export(ready, "run", seed=3, slides=SLIDES[:7])
    finetune(ready, "a", config_of(ready, starts=("adapted",), backbone="", unit="tile", tiles_per_slide=2))
    leak = json.loads(ready.finetune("a").run_json.read_text())["leak"]
    assert leak["seen"] == {"adapted": 28}  # tiles, as the predictions are
    assert "7 of 24 tested slides" in leak["statement"]


def test_the_pretraining_pool_is_found_under_other_folders_and_unknown_names_are_no_clean_bill(ready):
    def leak(pool):
        export(ready, "run", 3, pool)
        finetune(ready, pool[0][:2], config_of(ready, starts=("adapted", "random"), backbone="", **ONE))
        facts = json.loads(ready.finetune(pool[0][:2]).run_json.read_text())
        return facts["leak"], " ".join(facts["verdict"]["limits"])

    moved, limits = leak([f"archive/{slide}.svs" for slide in SLIDES[:7]])
    assert moved["seen"] == {"adapted": 14}
    assert "14 of 24 tested slides, or others of their patients, were in the pretraining pool" in limits
    anonymous, limits = leak([f"h{number:031x}" for number in range(24)])
    assert anonymous["seen"] == {"adapted": None}
    assert "cannot be told" in anonymous["statement"]
    assert "pretraining pool is not known" in limits
    assert "pretraining pool is not known" in write_report(ready.finetune("h0"), ready).read_text()


def test_tiles_and_regions_can_carry_the_labels(ready):
    finetune(ready, "tiles", config_of(ready, starts=("colour",), unit="tile", tiles_per_slide=3, budgets=(1, 4)))
    _, predictions, _ = tables_of(ready, "tiles")
    assert len({p.slide for p in predictions}) == 24 * 3
    assert all(p.slide.split("@")[0] in SLIDES for p in predictions)
    side = 64  # 32 px at 0.5 mpp on a slide of 0.25 mpp
    lines = ["slide,x,y,width,height,label,patient"]
    for n in range(24):
        lines += [f"s{n:02d},0,0,{2 * side},{side},left,P{n}", f"s{n:02d},{3 * side},0,{2 * side},{side},right,P{n}"]
        lines += [f"s{n:02d},9000,9000,9,9,left,P{n}"]
    (ready.root / "labels.csv").write_text("\n".join(lines) + "\n")
    result = finetune(ready, "regions", config_of(ready, starts=("colour",)))
    assert result.table.unit == "region"
    assert [item.tiles.tolist() for item in result.table.items[:2]] == [[0, 1], [3, 4]]
    assert any("24 regions hold no tile's centre" in note for note in result.table.notes)


# ---- starts


def test_without_names_all_starts_that_can_be_made_are_compared(ready):
    export(ready, "run", seed=3)
    found = resolve_starts(ready, config_of(ready, starts=(), backbone="", input_px=0))
    assert [start.name for start in found.chosen] == ["random", "adapted", "colour"]
    assert found.input_px == 32
    assert "began from random weights" in found.skipped["imagenet"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"starts": ("adapted",)}, "no finished pretraining run"),
        ({"starts": ("random",), "backbone": ""}, "of which architecture"),
        ({"starts": ("randon",)}, "did you mean 'random'"),
        ({"starts": ("nowhere.safetensors",)}, "neither a file nor one of"),
        ({"adapted": "nowhere"}, "no such file or run"),
        ({"starts": ("imagenet",), "weights": "random"}, "--weights random: no ImageNet start"),
        ({"weights": "w.pth"}, "--weights w.pth: is the imagenet start, which --starts random,colour"),
    ],
)
def test_a_start_that_is_missing_is_one_clear_line(ready, options, said):
    with pytest.raises(UsageError, match=said):
        resolve_starts(ready, config_of(ready, **options))


def test_several_finished_runs_are_not_guessed_between(ready):
    export(ready, "one", seed=1)
    export(ready, "two", seed=2)
    with pytest.raises(UsageError, match="several finished pretraining runs \\(one, two\\)"):
        resolve_starts(ready, config_of(ready, starts=()))
    found = resolve_starts(ready, config_of(ready, starts=("adapted",), adapted="two"))
    assert found.chosen[0].exported == ready.pretrain("two").backbone


def test_an_adapted_start_that_nothing_asks_for_is_refused(ready):
    export(ready, "run", 3)
    with pytest.raises(UsageError, match="--adapted run: is the adapted start, which --starts random,colour does not"):
        resolve_starts(ready, config_of(ready, adapted="run"))
    assert resolve_starts(ready, config_of(ready, adapted="run", backbone="")).chosen[0].timm_name == "test_vit"


def test_another_architecture_beside_the_adapted_one_is_refused(ready):
    export(ready, "run", seed=1)
    with pytest.raises(UsageError, match="adapted backbone is a test_vit"):
        resolve_starts(ready, config_of(ready, starts=(), backbone="test_resnet"))


def test_starts_of_two_architectures_are_not_compared(ready, cli):
    backbone, info = create_backbone("test_resnet", "random", 1)
    save_backbone(ready.pretrain("resnet").backbone, backbone, replace(info, input_px=32))
    options = ["--labels", ready.root / "labels.csv", "-w", ready.root, "--mixed-patients", "--backbone", "test_vit"]
    code, _, err = cli("finetune", *options, "--starts", "random,other=resnet")
    assert code == 2
    assert "random is a test_vit, other a test_resnet" in " ".join(err.split())
    finetune(ready, "a", config_of(ready, starts=("random",)))
    with pytest.raises(UsageError, match="has random, a test_vit; resnet is a test_resnet"):
        finetune(ready, "a", config_of(ready, starts=("resnet",), backbone=""))


def test_an_adapted_backbone_is_no_imagenet_start(ready):
    first = export(ready, "first", seed=1, slides=SLIDES)
    second = export(ready, "second", seed=2, slides=SLIDES[:6])
    stored = json.loads(second.with_suffix(".json").read_text())
    stored["provenance"]["start_weights"] = str(first)
    second.with_suffix(".json").write_text(json.dumps(stored))
    options = {"adapted": "second", "backbone": ""}
    with pytest.raises(UsageError, match=r"first.* a backbone that histossl wrote; compare it as --starts NAME="):
        resolve_starts(ready, config_of(ready, starts=("imagenet", "adapted"), **options))
    found = resolve_starts(ready, config_of(ready, starts=(), **options))
    assert [start.name for start in found.chosen] == ["random", "adapted", "colour"]
    assert "histossl wrote" in found.skipped["imagenet"]
    with pytest.raises(UsageError, match="no ImageNet start"):
        resolve_starts(ready, config_of(ready, starts=("imagenet",), weights=str(first)))


def test_the_file_that_pretraining_began_from_is_the_imagenet_start_while_it_is_the_same(ready, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_tensors(Path("w.safetensors"), create_backbone("test_vit", "random", 5)[0].state_dict())
    backbone, info = create_backbone("test_vit", Path("w.safetensors"))
    save_backbone(ready.pretrain("run").backbone, backbone, replace(info, input_px=32))
    monkeypatch.chdir("/")
    options = {"starts": (), "adapted": "run", "backbone": ""}
    found = resolve_starts(ready, config_of(ready, **options))
    assert [start.name for start in found.chosen] == ["random", "imagenet", "adapted", "colour"]
    assert str(found.chosen[1].weights) == str(tmp_path / "w.safetensors")
    save_tensors(tmp_path / "w.safetensors", create_backbone("test_vit", "random", 6)[0].state_dict())
    found = resolve_starts(ready, config_of(ready, **options))
    assert "whose content has changed since; pass --weights FILE" in found.skipped["imagenet"]
    (tmp_path / "w.safetensors").unlink()
    found = resolve_starts(ready, config_of(ready, **options))
    assert "which is not there any more; pass --weights FILE" in found.skipped["imagenet"]


def test_weights_that_do_not_fit_end_before_anything_is_written(ready, cli):
    export(ready, "run", 3)
    base = ["finetune", "--labels", ready.root / "labels.csv", "-w", ready.root, "--mixed-patients"]
    weights = ready.pretrain("run").backbone
    for backbone, options in (("test_resnet", ["--weights", weights]), ("test_vit", ["--weights", "nowhere.pth"])):
        code, _, err = cli(*base, "--starts", "random,imagenet", "--backbone", backbone, *options)
        assert code == 2
        assert err.count("error:") == 1
    assert not ready.finetune_root.exists()
    assert not (ready.root / "embeddings").exists()


def test_a_start_added_later_keeps_what_was_said_of_the_first_and_its_model(ready):
    lines = ["slide,label,patient,site"]
    lines += [f"s{n:02d},{'low' if n % 5 < 2 else 'high'},P{n % 12},site{n % 2}" for n in range(24)]
    (ready.root / "labels.csv").write_text("\n".join(lines) + "\n")
    export(ready, "run", seed=3, slides=SLIDES)
    finetune(ready, "a", config_of(ready, starts=("adapted",), backbone="", **ONE))
    run = ready.finetune("a")
    first = json.loads(run.run_json.read_text())
    finetune(ready, "a", config_of(ready, starts=("random",), **ONE))
    both = json.loads(run.run_json.read_text())
    assert "adapted: 24 of 24 tested slides were in its pretraining pool" in both["leak"]["statement"]
    assert both["leak"] == first["leak"]
    assert json.loads((run.model / "model.json").read_text())["start"] == "adapted"
    assert both["site"] == first["site"]
    assert both["site"]["start"] == "adapted"
    finetune(ready, "b", config_of(ready, starts=("random",), **ONE))
    finetune(ready, "b", config_of(ready, starts=("adapted",), backbone="", **ONE))
    assert json.loads((ready.finetune("b").model / "model.json").read_text())["start"] == "adapted"


def test_with_sites_left_out_predictions_name_them_and_the_run_counts_them(ready, capsys):
    lines = ["slide,label,patient,site"]
    lines += [f"s{n:02d},{'low' if n % 5 < 2 else 'high'},P{n % 12},site{n % 6}" for n in range(24)]
    (ready.root / "labels.csv").write_text("\n".join(lines) + "\n")
    finetune(ready, "a", config_of(ready, starts=("random",), group="site", **ONE))
    run = ready.finetune("a")
    rows = read_predictions(run.predictions)[0]
    assert {one.site for one in rows} == {f"site{n}" for n in range(6)}
    for one in rows:
        assert int(one.patient[1:]) % 6 == int(one.site[4:])
    facts = json.loads(run.run_json.read_text())
    assert facts["split"]["num_tested_sites"] == 6
    said = " ".join(capsys.readouterr().err.split())
    assert "12 patients of 6 sites tested" in said
    assert "on sites never trained on" in said


def test_a_backbone_of_another_scale_is_told_on_the_page_too(ready, capsys):
    path = export(ready, "run", seed=3)
    stored = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps(stored | {"mpp": 2.0}))
    finetune(ready, "a", config_of(ready, starts=("adapted",), backbone="", **ONE))
    told = "adapted learnt from tiles at 2 microns per pixel, those here are at 0.5"
    assert told in " ".join(capsys.readouterr().err.split())
    finetune(ready, "a", config_of(ready, starts=("random",), **ONE))
    assert told in write_report(ready.finetune("a"), ready).read_text()


def test_a_start_added_later_is_shown_tiles_at_the_size_of_the_first(ready):
    finetune(ready, "a", config_of(ready, starts=("random",), backbone="test_vit", input_px=0, **ONE))
    first = json.loads(ready.finetune("a").run_json.read_text())["input_px"]
    export(ready, "run", seed=3)
    assert resolve_starts(ready, config_of(ready, starts=(), backbone="", input_px=0)).input_px == 32 != first
    finetune(ready, "a", config_of(ready, starts=(), backbone="", input_px=0, **ONE))
    facts = json.loads(ready.finetune("a").run_json.read_text())
    assert {one["input_px"] for name, one in facts["starts"].items() if name != "colour"} == {first}


# ---- several pretraining seeds


def test_pooled_seeds_are_one_start_whose_points_are_those_of_its_runs(ready):
    for seed in (1, 2, 3):
        export(ready, f"s{seed}", seed)
    finetune(ready, "a", config_of(ready, starts=("adapted", "random"), adapted="s1,s2,s3", backbone=""))
    points, predictions, summary = tables_of(ready)
    assert {point.backbone for point in points if point.start == "adapted"} == {"s1", "s2", "s3"}
    assert {row.num_seeds for row in summary if row.start == "adapted"} == {3}
    assert {row.num_seeds for row in summary if row.start == "random"} == {1}
    assert {row.backbone for row in predictions if row.start == "random"} == {""}
    for seed in (1, 2, 3):  # by itself each run has the same points
        finetune(ready, f"only-{seed}", config_of(ready, starts=("adapted",), adapted=f"s{seed}", backbone=""))
        alone, _, _ = tables_of(ready, f"only-{seed}")
        pooled = [replace(point, backbone="") for point in points if point.backbone == f"s{seed}"]
        assert pooled == [point for point in alone if point.start == "adapted"]
    for row in summary:
        its = [p.value for p in points if (p.start, p.budget, p.metric) == (row.start, row.budget, row.metric)]
        assert row.mean == pytest.approx(np.mean(its))
    limits = json.loads(ready.finetune("a").run_json.read_text())["verdict"]["limits"]
    assert any("the mean of 3 pretraining seeds (s1, s2 and s3)" in limit for limit in limits)


def test_a_second_run_may_be_added_to_a_lone_one(ready):
    """Measured as the adapted start by itself, it is the first of two afterwards, with nothing computed anew."""
    export(ready, "s0", 1)
    export(ready, "s1", 2)
    finetune(ready, "a", config_of(ready, starts=("adapted", "random"), backbone="", adapted="s0"))
    alone = {(one.slide, one.budget, one.draw): one.probabilities for one in of_start(tables_of(ready)[1], "adapted")}
    export(ready, "s2", 3)
    with pytest.raises(MismatchError, match="measured with other weights than those of s1, s2; name that run too"):
        finetune(ready, "a", config_of(ready, starts=("adapted", "random"), backbone="", adapted="s1,s2"))
    journal = ready.finetune("a").journal("adapted").read_bytes()
    finetune(ready, "a", config_of(ready, starts=("adapted", "random"), backbone="", adapted="s0,s1"))
    assert ready.finetune("a").journal("adapted+s0").read_bytes() == journal
    pooled = of_start(tables_of(ready)[1], "adapted")
    assert {one.backbone for one in pooled} == {"s0", "s1"}
    first = {(one.slide, one.budget, one.draw): one.probabilities for one in pooled if one.backbone == "s0"}
    assert first == alone


def of_start(rows, start):
    return [row for row in rows if row.start == start]


def test_starts_measured_first_are_shown_tiles_as_the_adapted_one_learnt_them(ready, capsys):
    """`--adapted` beside other starts says at which size, so that adding it later judges it as it learnt."""
    export(ready, "run", 1)
    finetune(ready, "a", config_of(ready, starts=("random",), backbone="", input_px=0, adapted="run", **ONE))
    assert json.loads(ready.finetune("a").run_json.read_text())["input_px"] == 32
    assert "not adapted to" not in capsys.readouterr().err
    finetune(ready, "b", config_of(ready, starts=("adapted",), backbone="", input_px=48, adapted="run", **ONE))
    said = "adapted learnt from tiles shown at 32 px, and all starts are shown them at 48 px here"
    assert said in " ".join(capsys.readouterr().err.split())
    assert said in " ".join(json.loads(ready.finetune("b").run_json.read_text())["pool_notes"])


def test_a_seed_may_be_added_later(ready):
    for seed in (1, 2):
        export(ready, f"s{seed}", seed)
    options = {"starts": ("random", "more=s1+s2"), "backbone": ""}
    finetune(ready, "a", config_of(ready, **options))
    before, _, _ = tables_of(ready)
    export(ready, "s3", 3)
    finetune(ready, "a", config_of(ready, **options | {"starts": ("random", "more=s1+s2+s3")}))
    after, _, _ = tables_of(ready)
    assert [point for point in after if point.backbone != "s3"] == before
    assert {point.backbone for point in after if point.start == "more"} == {"s1", "s2", "s3"}


def test_a_start_keeps_the_runs_it_was_measured_with(ready):
    for seed in (1, 2, 3):
        export(ready, f"s{seed}", seed)
    options = {"starts": ("adapted",), "backbone": "", **ONE}
    finetune(ready, "a", config_of(ready, **options, adapted="s1,s2"))
    said = ready.finetune("a").run_json.read_text()
    for other in ("s3", "s1,s3", "s1"):
        with pytest.raises(MismatchError, match="measured as s1, s2, and is now"):
            finetune(ready, "a", config_of(ready, **options, adapted=other))
    assert ready.finetune("a").run_json.read_text() == said


def test_seeds_of_another_architecture_or_given_twice_are_refused(ready):
    export(ready, "one", 1)
    shutil.copytree(ready.pretrain("one").root, ready.pretrain("copy").root)
    backbone, info = create_backbone("test_resnet", "random", 1)
    save_backbone(ready.pretrain("other").backbone, backbone, replace(info, input_px=32))
    with pytest.raises(UsageError, match="must be of one architecture"):
        resolve_starts(ready, config_of(ready, starts=("adapted",), adapted="one,other", backbone=""))
    with pytest.raises(UsageError, match="same weights as"):
        resolve_starts(ready, config_of(ready, starts=("adapted",), adapted="one,copy", backbone=""))
    with pytest.raises(UsageError, match="two of them are called 'x'"):
        resolve_starts(ready, config_of(ready, starts=("x=one", "random", "x=other"), backbone=""))


def test_pooled_runs_that_differ_in_more_than_their_seed_are_told(ready):
    for run, rate, seed in (("one", 0.1, 1), ("two", 0.1, 2), ("three", 0.2, 3)):
        export(ready, run, seed)
        ready.pretrain(run).run_json.write_text(json.dumps({"config": {"lr": rate, "seed": seed}}))
    alike = resolve_starts(ready, config_of(ready, starts=("adapted",), adapted="one,two", backbone=""))
    assert alike.notes == ()
    younger = json.dumps({"config": {"lr": 0.1, "seed": 2, "view_set": []}})  # of a younger histossl
    ready.pretrain("two").run_json.write_text(younger)
    assert resolve_starts(ready, config_of(ready, starts=("adapted",), adapted="one,two", backbone="")).notes == ()
    mixed = resolve_starts(ready, config_of(ready, starts=("adapted",), adapted="one,three", backbone=""))
    assert "differ in lr, not only in their seed" in mixed.notes[0]


def test_named_runs_are_compared_with_what_they_started_from(ready):
    """Without --adapted: the architecture of random (and imagenet) is that of the runs that are named."""
    for seed in (1, 2):
        export(ready, f"s{seed}", seed)
    found = resolve_starts(ready, config_of(ready, starts=("random", "s1", "pair=s1+s2"), backbone=""))
    assert [(start.name, start.backbone) for start in found.chosen] == [
        ("random", ""), ("s1", ""), ("pair", "s1"), ("pair", "s2"),
    ]  # fmt: skip
    assert found.chosen[0].timm_name == "test_vit"


def test_the_colour_floor_is_on_every_curve(ready):
    finetune(ready, "a", config_of(ready, starts=("random",)))
    assert {point.start for point in tables_of(ready)[0]} == {"random", "colour"}


# ---- the command line, and the journal


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--budgets", "0"], "--budgets 0: must be"),
        (["--budgets", "99"], "no class has more than"),
        (["--head", "meen"], "did you mean 'mean'"),
        (["--unit", "cell"], "--unit cell: must be one of slide, region, tile\n"),
        (["--labels", "nowhere.csv"], "nowhere.csv: cannot be read"),
        (["--classes", "low"], "two classes at least"),
        (["--group", "site"], "name no site; add a column 'site'"),
        (["--device", "cuda:7"], "CUDA devices"),
        (["--tiles-per-slide", "5"], "add --unit tile"),
        (["--train", "all", "--workers", "4"], "--workers 4: is of embedding"),
    ],
)
def test_a_wrong_command_ends_in_one_line_and_exit_2(ready, cli, options, said):
    base = ["finetune", "--labels", ready.root / "labels.csv", "-w", ready.root, "--mixed-patients"]
    code, _, err = cli(*base, "--starts", "colour", *options)
    assert code == 2
    assert said in err
    assert err.count("error:") == 1
    assert "Traceback" not in err


def test_patients_of_several_classes_are_refused_whatever_carries_the_label(ready, cli):
    told = cli("finetune", "--labels", ready.root / "labels.csv", "-w", ready.root, "--unit", "tile", "--dry-run")
    assert told.code == 2
    assert "pass --mixed-patients" in " ".join(told.err.split())


def test_embed_by_itself_leaves_files_as_mil_tools_read_them(ready, cli):
    code, _, _ = cli("embed", "--start", "random", "--backbone", "test_vit", "--input-px", 32, "-w", ready.root)
    assert code == 0
    files = sorted((ready.root / "embeddings").rglob("*.h5"))
    assert [path.stem for path in files] == SLIDES
    with h5py.File(files[0]) as file:
        assert file["features"].shape == (5, 64)
        assert file["coords"].shape == (5, 2)
        assert file.attrs["tile_px"] == 32


def test_embed_speaks_of_its_own_option_and_of_the_file_that_lacks_its_other_half(ready, tmp_path, cli):
    told = cli("embed", "--start", "nope", "-w", ready.root)
    assert told.code == 2
    assert "--start nope: 'nope' is neither a file nor" in told.err
    (tmp_path / "lonely.safetensors").touch()
    told = cli("embed", "--start", tmp_path / "lonely.safetensors", "-w", ready.root)
    assert told.code == 1
    assert "there is no lonely.json beside it" in " ".join(told.err.split())
    assert "Error" not in told.err
    (tmp_path / "lonely.json").write_text("{}")
    told = cli("embed", "--start", tmp_path / "lonely.safetensors", "-w", ready.root)
    assert "is not one that histossl wrote; copy both files together" in " ".join(told.err.split())
    assert cli("embed", "-w", tmp_path / "mistyped").code == 1
    assert not (tmp_path / "mistyped").exists()


def test_every_slide_that_is_not_found_is_named_by_embed_and_by_a_dry_run(ready, cli):
    labels = ready.root / "labels.csv"
    labels.write_text(labels.read_text() + "".join(f"gone{n},low,Q\n" for n in range(7)))
    options = ["--labels", labels, "-w", ready.root]
    for command in (["embed", "--start", "colour"], ["finetune", "--dry-run", "--mixed-patients"]):
        told = cli(*command, *options)
        assert told.code == 0, told.err
        assert all(f"gone{n}: not found" in told.err for n in range(7))


def test_no_tiles_yet_says_how_to_make_them(workspace, cli, tmp_path):
    (tmp_path / "labels.csv").write_text("slide,label\nA,x\n")
    code, _, err = cli("finetune", "--labels", tmp_path / "labels.csv", "-w", workspace.root)
    assert code == 1
    assert "histossl tile --slides DIR" in err


def test_a_journal_drops_the_line_that_was_being_written(tmp_path):
    path = tmp_path / "start.jsonl"
    with Journal(path, ["weights"]) as journal:
        journal.write(("1", 0, None), np.array([[0.25, 0.75]]))
        journal.write(("2", 0, None), np.array([[0.5, 0.5]]))
    path.write_bytes(path.read_bytes()[:-7])
    with Journal(path, ["weights"]) as journal:
        assert set(journal.done) == {("1", 0, None)}
        journal.write(("2", 0, None), np.array([[0.125, 0.875]]))
    again = Journal(path, ["weights"]).done
    np.testing.assert_array_equal(again[("2", 0, None)], [[0.125, 0.875]])
    with pytest.raises(MismatchError, match="other weights"):
        Journal(path, ["others"])


def test_labels_of_slides_without_tiles_are_named(ready):
    labels = ready.root / "labels.csv"
    labels.write_text("slide,label\nX1,a\nX2,b\n")
    with pytest.raises(LabelsError, match="none of its 2 slides has tiles"):
        finetune(ready, "a", config_of(ready))
