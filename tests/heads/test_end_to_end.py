"""End to end: the backbone learns what a frozen one does not show, the rest stays put, and a run repeats itself."""

import csv
import itertools
import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from synthetic_store import write_synthetic_store

from histossl.backbones.loading import create_backbone
from histossl.core.config import FinetuneConfig, TuneConfig
from histossl.core.errors import UsageError
from histossl.core.workspace import Workspace
from histossl.evaluation.finetune import finetune
from histossl.evaluation.predict import predict
from histossl.features.extraction import slide_tiles
from histossl.heads.end_to_end import TileSource, Tuned, _kept_for_validation, _optimizer, tune
from histossl.heads.model_folder import load_model
from histossl.report.content import read_content
from histossl.report.features import look_at_features
from histossl.report.html import write_report
from histossl.stats.tables import read_points

CPU = torch.device("cpu")
QUICK = TuneConfig(steps=12, lr=1e-3, bags_per_step=4, tiles_per_bag=2, test_tiles=4)


@pytest.fixture
def ready(tmp_path) -> Workspace:
    """16 slides whose red grows with their number."""
    workspace = Workspace(tmp_path / "w").make()
    slides = [f"s{number:02d}" for number in range(16)]
    write_synthetic_store(workspace, slides, tiles_per_slide=4, tile_px=32)
    lines = ["slide,label,patient,split"]
    lines += [f"s{n:02d},{'low' if n % 5 < 2 else 'high'},P{n},{'test' if n % 4 == 3 else 'train'}" for n in range(16)]
    (workspace.root / "labels.csv").write_text("\n".join(lines) + "\n")
    return workspace


def source_of(workspace: Workspace) -> TileSource:
    from histossl.tiles.store.index import TileIndex

    index = TileIndex.open(workspace)
    return TileSource(index, [slide_tiles(index, slide) for slide in index.slides])


def tuned(workspace, part="all", name="test_vit", config=QUICK, items=np.arange(0, 12), seed=0):
    backbone, info = create_backbone(name, "random", 1)
    fitted = tune(
        backbone,
        info,
        source_of(workspace),
        items,
        (items % 2).astype(np.int64),
        items,
        num_classes=3,
        part=part,
        input_px=32,
        config=config,
        device=CPU,
        seed=seed,
    )
    return backbone, fitted


def test_the_start_is_left_as_it_was_and_the_copy_learns(ready):
    before = {name: value.clone() for name, value in create_backbone("test_vit", "random", 1)[0].state_dict().items()}
    backbone, fitted = tuned(ready)
    for name, value in backbone.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    moved = [name for name, value in fitted.backbone.state_dict().items() if not torch.equal(value, before[name])]
    assert "patch_embed.proj.weight" in moved


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_with_last_only_the_late_blocks_learn(ready, name):
    before, fitted = tuned(ready, "last", name)
    same = {n for n, value in fitted.backbone.state_dict().items() if torch.equal(value, before.state_dict()[n])}
    moved = set(before.state_dict()) - same
    early, late = ("blocks.0.", "blocks.5.") if name == "test_vit" else ("layer1.", "layer4.")
    assert any(n.startswith(late) for n in moved)
    assert not any(n.startswith(early) for n in moved)
    assert not any("running" in n for n in moved)  # BatchNorm keeps its statistics


def test_the_same_seed_gives_the_same_predictions(ready):
    one, two, other = (
        tuned(ready, seed=seed)[1].predict_proba(source_of(ready), np.arange(12, 16)) for seed in (3, 3, 4)
    )
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(one, other)
    np.testing.assert_allclose(one.sum(1), 1)
    np.testing.assert_array_equal(one[:, 2], 0)  # a class without labels


def test_it_learns_what_it_is_shown(ready):
    items = np.arange(16)
    backbone, info = create_backbone("test_resnet", "random", 1)
    labels = np.array([n % 5 >= 2 for n in items], dtype=np.int64)  # the red channel tells, if stain is left alone
    config = replace(QUICK, steps=60, lr=2e-3, bags_per_step=8)
    common = {"num_classes": 2, "part": "all", "input_px": 32, "config": config, "device": CPU, "seed": 0}
    fitted = tune(backbone, info, source_of(ready), items, labels, np.zeros(16, np.int64), **common)
    shares = fitted.predict_proba(source_of(ready), items)
    assert (shares.argmax(1) == labels).mean() > 0.8


def test_validation_takes_a_quarter_of_each_class_and_whole_patients():
    position = np.arange(32) % 2
    groups = np.arange(32) // 4 * 2 + position  # eight patients a class, two items each
    kept = _kept_for_validation(position, groups, seed=0)
    assert {label: len(set(groups[kept & (position == label)])) for label in (0, 1)} == {0: 2, 1: 2}
    assert not set(groups[kept]) & set(groups[~kept])
    assert not _kept_for_validation(position[:6], groups[:6], seed=0).any()


def test_the_loss_is_the_cross_entropy_of_bags(ready):
    backbone, info = create_backbone("test_vit", "random", 1)
    from histossl.methods.method import Views

    model = Tuned(backbone, info.feature_dim, 2, torch.tensor([1, 0, 1]), tiles_per_bag=3).eval()
    images = torch.rand(6, 3, 32, 32)
    views = Views([images], torch.zeros(6), torch.tensor([2, 2, 2, 1, 1, 1]), step=0)
    with torch.no_grad():
        logits = torch.cat([model.head(backbone(images[i : i + 3])[None])[0] for i in (0, 3)])
        expected = torch.nn.functional.cross_entropy(logits, torch.tensor([1, 0]), label_smoothing=0.05)
        torch.testing.assert_close(model(views).loss, expected)


def test_the_weights_of_the_best_look_at_validation_are_the_ones_kept(ready, monkeypatch):
    losses = iter([2.0, 1.0, 3.0, *[4.0] * 20])
    seen = []

    def looked(model, *_):
        seen.append({name: value.clone() for name, value in model.backbone.state_dict().items()})
        return next(losses)

    monkeypatch.setattr("histossl.heads.end_to_end._validation_loss", looked)
    _, fitted = tuned(ready)
    assert len(seen) > 2
    kept = fitted.backbone.state_dict()
    assert all(torch.equal(kept[name], value) for name, value in seen[1].items())
    assert any(not torch.equal(kept[name], value) for name, value in seen[-1].items())


def test_a_curve_end_to_end_leaves_points_and_a_model_that_loads(ready, tmp_path):
    config = FinetuneConfig(
        labels=str(ready.root / "labels.csv"),
        starts=("random", "colour"),
        backbone="test_vit",
        input_px=32,
        train="last",
        tune=QUICK,
        draws=1,
        budgets=(2,),
    )
    finetune(ready, "a", config)
    points = read_points(ready.finetune("a").points)
    assert {(point.start, point.head) for point in points} == {
        ("random", "end-to-end (last)"),
        ("colour", "mean"),
    }
    page = write_report(ready.finetune("a"), ready).read_text()
    assert "no map of features" in page  # end to end no start was embedded
    assert 'id="figure-deciding"' in page
    shown = look_at_features(read_content(ready.finetune("a"), ready), ready)
    predict(ready, ready.finetune("a").model, heatmaps=False)
    with ready.predictions("default").table.open() as file:
        said = Counter(row["predicted"] for row in csv.DictReader(file) if int(row["slide"][1:]) % 4 == 3)
    assert Counter(one.label for _, row in shown.deciding for one in row) == said  # what predict says of these slides
    moved = tmp_path / "elsewhere"
    ready.finetune("a").model.rename(moved)
    model = load_model(moved)
    assert model.info.classes == ("high", "low")
    assert model.info.head == "abmil"
    assert model.training_ND.shape == (12, 64)
    tiles = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    with torch.inference_mode():
        features = model.embedder(CPU).embed(tiles).numpy()
    shares, attention = model.fitted.of_tiles(features)
    assert shares.sum() == pytest.approx(1)
    assert attention.shape == (3,)


def test_the_head_learns_fastest_and_early_blocks_slowest():
    backbone, info = create_backbone("test_vit", "random", 1)
    model = Tuned(backbone, info.feature_dim, 2, torch.zeros(1, dtype=torch.int64), tiles_per_bag=2)
    optimizer = _optimizer(model, "all", replace(QUICK, layer_decay=0.5))
    rate_of = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    named = {name: rate_of[id(parameter)] for name, parameter in model.named_parameters()}
    depth = len(backbone.blocks)
    blocks = [named[f"backbone.blocks.{number}.attn.qkv.weight"] for number in range(depth)]
    assert [late / early for early, late in itertools.pairwise(blocks)] == pytest.approx([2.0] * (depth - 1))
    assert named["backbone.patch_embed.proj.weight"] < blocks[0]
    assert named["head.classify.1.weight"] == 10 > max(blocks)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core: two processes would have to stand in a queue")
def test_two_processes_make_the_curve_of_one(ready):
    """End to end and frozen, over gloo; and what one process had begun, two finish."""
    options = ["--labels", ready.root / "labels.csv", "-w", ready.root, "--starts", "random", "--backbone", "test_vit"]
    options += ["--input-px", 32, "--draws", 2, "--budgets", "1,2"]
    options += [word for key, value in asdict(QUICK).items() for word in ("--set", f"{key}={value}")]
    line = [sys.executable, "-m", "histossl", "finetune", "--train", "last", *map(str, options), "--name"]
    done = subprocess.run([*line, "one", "--gpus", "1"], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    half = ready.finetune("two").root
    shutil.copytree(ready.finetune("one").root, half)
    journal = ready.finetune("two").journal("random")
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(lines[0])
    # a second process of a run that was killed had done one piece
    journal.with_name("random@1.part").write_bytes(lines[0] + lines[1])
    ready.finetune("two").points.unlink()
    done = subprocess.run([*line, "two", "--gpus", "2"], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("== verdict") == 1  # the second process is silent
    assert read_points(ready.finetune("two").points) == read_points(ready.finetune("one").points)
    assert not list(journal.parent.glob("*.part"))
    assert len(journal.read_bytes().splitlines()) == len(lines)


def test_settings_that_would_take_no_effect_are_refused(ready, cli):
    labels = ready.root / "labels.csv"
    with pytest.raises(UsageError, match="only the attention head"):
        FinetuneConfig(labels=str(labels), train="all", head="knn")
    code, _, err = cli("finetune", "--labels", labels, "-w", ready.root, "--set", "steps=3")
    assert code == 2
    assert "add --train last" in err
