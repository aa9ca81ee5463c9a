"""An archive whose features hold a known number of informative ones per start: the curve's order is the true order."""

import json
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from synthetic_store import write_synthetic_store

from histossl.backbones.loading import create_backbone, save_backbone
from histossl.core.config import FinetuneConfig
from histossl.core.workspace import Workspace
from histossl.evaluation.finetune import finetune
from histossl.stats.tables import read_predictions, read_summary

CLASSES = ("adenoma", "carcinoma", "normal")
SLIDES = [f"s{number:02d}" for number in range(45)]  # one patient each
INFORMATIVE = {"random": 0, "imagenet": 16, "adapted": 48}  # of a backbone's features, as far as it has so many
TILES = 3


@pytest.fixture(scope="module")
def known(tmp_path_factory) -> tuple[Workspace, FinetuneConfig]:
    """The stage's own embeddings of three backbones, in which the numbers are replaced by features of known worth."""
    workspace = Workspace(tmp_path_factory.mktemp("known")).make()
    write_synthetic_store(workspace, SLIDES, TILES, tile_px=32)
    for seed, name in ((1, "imagenet"), (2, "adapted")):
        backbone, info = create_backbone("test_vit", "random", seed)
        if name == "adapted":
            save_backbone(workspace.pretrain(name).backbone, backbone, replace(info, input_px=32))
        else:
            torch.save(backbone.state_dict(), workspace.root / "imagenet.pth")
    labels = {slide: CLASSES[number % 3] for number, slide in enumerate(SLIDES)}
    config = FinetuneConfig(
        labels=str(write_labels(workspace.root / "labels.csv", labels)),
        starts=(*INFORMATIVE, "colour"),
        backbone="test_vit",
        weights=str(workspace.root / "imagenet.pth"),
        adapted="adapted",
        input_px=32,
        draws=3,
        budgets=(4, "all"),
    )
    finetune(workspace, "embeds", replace(config, draws=1, budgets=(1,)))
    for start, informative in INFORMATIVE.items():
        (folder,) = (workspace.root / "embeddings").glob(f"{start}-*")
        rng = np.random.default_rng(informative)
        for slide in SLIDES:
            with h5py.File(folder / f"{slide}.h5", "r+") as file:
                features = rng.standard_normal(file["features"].shape) + rng.standard_normal(file["mean"].shape)
                features[:, CLASSES.index(labels[slide]) : informative : len(CLASSES)] += 1.0
                file["features"][:], file["mean"][:] = features, features.mean(0)
    return workspace, config


def write_labels(path: Path, labels: dict[str, str]) -> Path:
    path.write_text("slide,label,patient\n" + "".join(f"{s},{label},P{s}\n" for s, label in labels.items()))
    return path


def outcome_of(workspace: Workspace, name: str) -> tuple[dict[str, list], str]:
    """AUROC by rising budget of each start, and the verdict's words."""
    run = workspace.finetune(name)
    curve: dict[str, list] = {}
    for row in read_summary(run.summary):
        if row.metric == "auroc":
            curve.setdefault(row.start, []).append(row)
    return curve, json.loads(run.run_json.read_text())["verdict"]["headline"]


def test_the_order_of_the_starts_is_that_of_their_informative_features(known):
    workspace, config = known
    finetune(workspace, "true", config)
    curve, said = outcome_of(workspace, "true")
    for random, imagenet, adapted in zip(curve["random"], curve["imagenet"], curve["adapted"], strict=True):
        assert random.mean < imagenet.mean < adapted.mean
        assert random.low <= 0.5 <= random.high
    assert curve["adapted"][-1].low > curve["imagenet"][-1].mean
    assert "helped" in said


def test_with_permuted_labels_every_start_sits_at_chance(known):
    workspace, config = known
    shuffled = np.random.default_rng(1).permutation([CLASSES[number % 3] for number in range(len(SLIDES))])
    labels = write_labels(workspace.root / "permuted.csv", dict(zip(SLIDES, shuffled, strict=True)))
    finetune(workspace, "permuted", replace(config, labels=str(labels)))
    curve, said = outcome_of(workspace, "permuted")
    for start, rows in curve.items():
        assert all(row.low <= 0.5 <= row.high for row in rows), start
    assert "no measurable difference" in said
    assert {one.start for one in read_predictions(workspace.finetune("permuted").predictions)[0]} == {*config.starts}
