"""The model for use is of the preferred start; that another one scored higher is said, with the way to its model."""

from dataclasses import replace

import pytest
import torch
from synthetic_store import write_synthetic_store

from histossl.backbones.loading import create_backbone, save_backbone
from histossl.core.config import FinetuneConfig
from histossl.evaluation.finetune import finetune
from histossl.evaluation.model_selection import comes_before, for_use, other_model, scored_higher
from histossl.heads.model_folder import load_model
from histossl.report.content import read_content
from histossl.report.html import write_report
from histossl.stats.tables import SummaryRow


def row(start, budget, mean, metric="auroc"):
    return SummaryRow(start, "mean", budget, metric, mean, 0.0, 1.0, 1, 9)


def test_the_largest_budget_and_starts_with_a_network_decide():
    rows = [row("adapted", 4, 0.7), row("imagenet", 4, 0.9), row("adapted", "all", 0.975), row("imagenet", "all", 0.98)]
    rows += [row("random", "all", 0.99), row("colour", "all", 1.0), row("imagenet", "all", 1.0, "accuracy")]
    best, said = scored_higher(rows, "adapted")
    assert best == "random"
    assert said.startswith("random scored higher than adapted (")
    assert said.endswith("0.990 against 0.975 with all labels)")
    assert scored_higher(rows, "random") == ("", "")
    assert scored_higher(rows, "gone") == ("", "")


def test_what_three_decimals_do_not_tell_is_not_higher():
    assert scored_higher([row("adapted", 8, 0.97501), row("imagenet", 8, 0.97502)], "adapted") == ("", "")
    best, said = scored_higher([row("adapted", 8, 0.975), row("imagenet", 8, 0.976)], "adapted")
    assert best == "imagenet"
    assert "with 8 labels per class" in said


def test_adapted_comes_first_and_a_pooled_start_is_named_as_it_was_spelt():
    assert for_use(["colour", "dino", "imagenet", "adapted"]) == ["adapted", "imagenet", "dino"]
    assert comes_before(["adapted", "imagenet"], "adapted", "imagenet")
    assert not comes_before(["adapted", "imagenet"], "gone", "imagenet")
    assert "--starts dino=d0+d1 --name dino" in other_model("dino", ("adapted", "dino=d0+d1"))


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # principal components of what never varies
def test_a_better_start_than_the_saved_models_is_told_and_its_model_can_be_made(workspace, capsys):
    """An adapted backbone of zeros tells nothing; random weights tell the slides' red."""
    slides = [f"s{number:02d}" for number in range(24)]
    write_synthetic_store(workspace, slides, tiles_per_slide=4, tile_px=32)
    lines = [f"{slide},{'low' if number % 5 < 2 else 'high'}" for number, slide in enumerate(slides)]
    (workspace.root / "labels.csv").write_text("\n".join(["slide,label", *lines]) + "\n")
    backbone, info = create_backbone("test_vit", "random", 3)
    with torch.no_grad():
        for weights in backbone.parameters():
            weights.zero_()
    save_backbone(
        workspace.pretrain("run").backbone,
        backbone,
        replace(info, input_px=32, provenance={"start_weights": "random", "pretraining_slides": []}),
    )
    config = FinetuneConfig(
        labels=str(workspace.root / "labels.csv"), starts=("random", "adapted"), draws=2, folds=3, budgets=(4,)
    )
    finetune(workspace, "a", config)
    said = " ".join(capsys.readouterr().err.split())
    assert "random scored higher than adapted (" in said
    assert "for a model from random add --starts random --name random to the command" in said
    content = read_content(workspace.finetune("a"), workspace)
    assert "random scored higher than adapted" in content.higher_than("adapted")
    report = write_report(workspace.finetune("a"), workspace).read_text()
    assert "not of the best: random scored higher than adapted" in " ".join(report.split())

    finetune(workspace, "random", replace(config, starts=("random",)))
    assert load_model(workspace.finetune("random").model).info.start == "random"
    assert "scored higher" not in capsys.readouterr().err
