"""The stage as a whole: a student comes to say what its teacher says, resumes exactly, and is a model for use."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from synthetic_store import write_synthetic_store

from histossl.backbones.loading import BackboneInfo, create_backbone, load_backbone
from histossl.core.config import DistillConfig, FinetuneConfig, PretrainConfig, RuntimeConfig
from histossl.core.errors import UsageError
from histossl.core.workspace import Workspace
from histossl.evaluation.distill import compared, leave_model, look_at_teacher, sample_of, slides_held_out, verdict
from histossl.evaluation.finetune import finetune
from histossl.evaluation.predict import Rows, predict_tiles
from histossl.features.extraction import slide_tiles
from histossl.features.initialisations import Start
from histossl.heads.feature_heads import HEADS, Fitted, head_named
from histossl.heads.model_folder import Model, load_model
from histossl.heads.torch_heads import teacher_of, tile_head
from histossl.labels.label_csv import read_rows
from histossl.labels.label_table import match_labels
from histossl.labels.leakage import leak_statement
from histossl.labels.slide_lookup import SlideNames
from histossl.labels.splits import make_splits
from histossl.labels.training_slides import contents_of
from histossl.methods.distillation import Teacher
from histossl.tiles.store.index import TileIndex
from histossl.tiles.stream.loader import decode_tiles
from histossl.training.pretrain import pretrain
from histossl.views.recipe import clean_view

SLIDES = [f"s{number:02d}" for number in range(16)]
CLASSES = ("pale", "dark")
QUICK = RuntimeConfig(num_workers=0, log_every=1, monitor_every=100)
TINY = DistillConfig(
    backbone="resnet10t", weights="random", steps=30, batch_size=16, view_px=32, lr=3e-3, set=("targets=soft",)
)


def painted(slide: int, tile: int, tile_px: int) -> np.ndarray:
    """Pale or dark, of any hue: even slides are mostly pale, odd ones mostly dark; a quarter of the tiles is not."""
    rng = np.random.default_rng([slide, tile])
    picture = (170.0, 90.0)[true_class(slide, tile)] + rng.uniform(-25, 25, 3)
    return np.clip(picture + rng.normal(0, 12, (tile_px, tile_px, 3)), 0, 255).astype(np.uint8)


def true_class(slide: int, tile: int) -> int:
    return (slide + (tile % 4 == 3)) % 2


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Painted slides, the last four of test patients, and a model finetuned on the others."""
    workspace = Workspace(tmp_path_factory.mktemp("lab"))
    write_synthetic_store(workspace, SLIDES, tiles_per_slide=12, tile_px=32, picture=painted)
    lines = [f"{slide},{CLASSES[n % 2]},P{n},{'test' if n >= 12 else 'train'}" for n, slide in enumerate(SLIDES)]
    (workspace.root / "labels.csv").write_text("\n".join(["slide,label,patient,split", *lines]) + "\n")
    labels = str(workspace.root / "labels.csv")
    settings = FinetuneConfig(
        labels=labels, starts=("random",), backbone="test_vit", input_px=32, draws=1, budgets=("all",)
    )
    finetune(workspace, "a", settings)
    return workspace


@pytest.fixture(scope="module")
def index(lab: Workspace) -> TileIndex:
    return TileIndex.open(lab)


@pytest.fixture(scope="module")
def model(lab: Workspace) -> Model:
    return load_model(lab.finetune("a").model)


def info_of(name: str) -> BackboneInfo:
    return create_backbone(name, "random")[1]


def taught(model: Model, config: DistillConfig) -> tuple[Teacher, DistillConfig]:
    teacher = teacher_of(model, info_of(config.backbone))
    return teacher, replace(config, teacher=teacher.facts["digest"], excluded_slides=tuple(SLIDES[12:]))


def pixels(index: TileIndex, slides: list[str]) -> tuple[torch.Tensor, np.ndarray]:
    """Tiles of slides and the class that was painted on each."""
    numbers = [slide_tiles(index, slide) for slide in slides]
    truth = [true_class(SLIDES.index(slide), tile) for slide in slides for tile in range(12)]
    return decode_tiles(index.read_many(np.concatenate(numbers)), 32), np.array(truth)


# ---- the teacher


@pytest.mark.parametrize("name", HEADS)
def test_a_head_in_torch_says_of_tiles_what_it_says_in_numpy(name: str) -> None:
    rng = np.random.default_rng(0)
    centres = 2 * rng.normal(size=(4, 6))
    labels = np.repeat([0, 1, 3], 6)  # nothing of class 2
    tiles = [(centres[label] + rng.normal(size=(5, 6))).astype(np.float32) for label in labels]
    for one in tiles:
        one[:, 5] = 1.0  # a feature that never varies
    bags = Bags(tiles)
    every = np.arange(18)
    fitted: Fitted = head_named(name).fit(bags, every, labels, pool=every, groups=every, num_classes=4, seed=0)
    new = rng.normal(size=(40, 6)).astype(np.float32)
    head, present = tile_head(fitted)
    shares = np.zeros((40, 4))
    shares[:, present] = head(torch.from_numpy(new)).softmax(1).detach().numpy()
    np.testing.assert_allclose(shares, fitted.predict_proba(Rows(new), np.arange(40)), atol=2e-5)
    assert present.tolist() == [0, 1, 3]


class Bags:
    def __init__(self, tiles: list[np.ndarray]) -> None:
        self._tiles = tiles
        self.pooled = np.stack([one.mean(0, dtype=np.float64) for one in tiles])

    def tiles(self, item: int) -> np.ndarray:
        return self._tiles[item]


def test_the_teacher_says_what_predict_says(model: Model, index: TileIndex) -> None:
    """Its own tile probabilities, though the student normalises by other statistics."""
    tiles, _ = pixels(index, SLIDES[:2])
    student = replace(info_of("test_vit"), mean=(0.3, 0.4, 0.5), std=(0.1, 0.2, 0.3))
    teacher = teacher_of(model, student)
    shares = teacher(clean_view(tiles, 32, (student.mean, student.std))).softmax(1)
    features = model.embedder(torch.device("cpu")).embed(tiles).detach().numpy()
    np.testing.assert_allclose(shares.numpy(), predict_tiles(model, "s00", features)[1], atol=1e-4)
    assert teacher.facts["slides"] == SLIDES[:12]


def test_slides_that_the_teacher_was_tested_on_stay_out(model: Model, index: TileIndex) -> None:
    assert slides_held_out(model, index) == set(SLIDES[12:])
    known = {key: value for key, value in model.info.provenance.items() if key != "tested_slides"}
    older = replace(model, info=replace(model.info, provenance=known))  # by the splits beside it
    assert slides_held_out(older, index) == set(SLIDES[12:])
    assert slides_held_out(replace(older, folder=Path("moved/model")), index) == set()


def test_a_teacher_from_whom_nothing_can_be_learnt_is_refused(
    model: Model, index: TileIndex, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher, config = taught(model, TINY)
    sample = sample_of(index, config)
    look_at_teacher(sample, teacher, info_of("resnet10t"), config)
    assert "the teacher on 144 tiles: dark" in capsys.readouterr().err
    teacher.head.weight *= 0.1
    teacher.head.bias.copy_(torch.tensor([3.0, 0.0]))  # always the first, yet its probabilities vary
    with pytest.raises(UsageError, match="calls every tile 'dark'; hard labels would teach that alone"):
        look_at_teacher(sample, teacher, info_of("resnet10t"), replace(config, set=("targets=hard",)))
    look_at_teacher(sample, teacher, info_of("resnet10t"), config)
    assert "only its probabilities vary" in " ".join(capsys.readouterr().err.split())
    teacher.head.weight.zero_()
    with pytest.raises(UsageError, match="answers every tile alike"):
        look_at_teacher(sample, teacher, info_of("resnet10t"), config)
    with pytest.raises(UsageError, match="all 16 slides are left out"):
        sample_of(index, replace(config, excluded_slides=tuple(SLIDES)))


def test_a_teacher_that_is_too_sure_is_told_with_a_way_out(
    model: Model, index: TileIndex, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher, config = taught(model, TINY)
    for times, way_out in ((3, "--temperature"), (1000, "--targets hard")):
        teacher.head.weight *= times
        teacher.head.bias *= times
        look_at_teacher(sample_of(index, config), teacher, info_of("resnet10t"), config)
        assert f"almost hard; {way_out}" in " ".join(capsys.readouterr().err.split())


# ---- the student


def run_one(
    index: TileIndex, workspace: Workspace, name: str, model: Model, config: DistillConfig, **changes: Any
) -> None:
    teacher, config = taught(model, config)
    run = workspace.pretrain(name)
    if pretrain(index, run, config, replace(QUICK, **changes), teacher=teacher).finished:
        leave_model(index, run, model, teacher, config)


@pytest.mark.parametrize("targets", ["soft", "hard"])
def test_the_student_reaches_the_teachers_tile_accuracy_on_patients_neither_saw(
    lab: Workspace, index: TileIndex, model: Model, targets: str
) -> None:
    """Labels are of slides, a quarter of whose tiles are of the other class: what is painted on each tile is the truth.

    The student is another architecture, from random weights.
    """
    run_one(index, lab, targets, model, replace(TINY, set=(f"targets={targets}",)))
    tiles, truth = pixels(index, SLIDES[12:])
    rows = []
    for each in (model, load_model(lab.pretrain(targets).model)):
        features = each.embedder(torch.device("cpu")).embed(tiles).detach().numpy()
        said = predict_tiles(each, "x", features)[1].argmax(1)
        rows.append(np.mean([each.info.classes[one] == CLASSES[real] for one, real in zip(said, truth, strict=True)]))
    teacher, student = rows
    assert teacher > 0.8
    assert student >= teacher - 0.05
    kept = load_model(lab.pretrain(targets).model).info.provenance
    assert kept["contents"] == model.info.provenance["contents"]
    assert sorted(kept["contents"]) == SLIDES[:12]
    found = kept["distillation"]
    assert found["agreement"] > 0.9 > found["agreement_by_chance"]
    assert verdict(found) == ""
    stored = load_backbone(lab.pretrain(targets).backbone)[1]
    assert stored.provenance["teacher"]["slides"] == SLIDES[:12]
    assert stored.provenance["pretraining_slides"] == SLIDES[:12]


def test_stopped_and_resumed_equals_the_unbroken_run(
    lab: Workspace, index: TileIndex, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = replace(TINY, steps=6)
    run_one(index, lab, "unbroken", model, short)
    teacher, config = taught(model, short)
    broken = lab.pretrain("broken")
    with pytest.raises(RuntimeError, match="killed"):
        pretrain(index, broken, config, replace(QUICK, checkpoint_every="4", monitor_every=5), die_at_step_5(), teacher)
    run_one(index, lab, "broken", model, short)
    whole = lab.pretrain("unbroken")
    for one, two in ((broken.backbone, whole.backbone), (broken.head, whole.head)):
        assert one.read_bytes() == two.read_bytes()
    assert (broken.model / "head.safetensors").read_bytes() == (whole.model / "head.safetensors").read_bytes()


def die_at_step_5() -> Any:
    looks = iter([0.5])

    def probe(*_: object) -> float:
        if (score := next(looks, None)) is None:
            raise RuntimeError("killed")
        return score

    return probe


def test_a_method_that_is_taught_needs_a_teacher(lab: Workspace, index: TileIndex, cli) -> None:
    with pytest.raises(UsageError, match="histossl distill --teacher"):
        pretrain(index, lab.pretrain("alone"), PretrainConfig(method="distillation", backbone="test_vit", view_px=32))
    told = cli("pretrain", "-w", lab.root, "--method", "distillation")
    assert told.code == 2
    assert "histossl distill --teacher" in told.err


# ---- what is said of it


def test_agreement_is_told_beside_what_guessing_gives() -> None:
    teacher = torch.tensor([[3.0, 0.0], [3.0, 0.0], [0.0, 3.0], [0.0, 3.0]])
    found = compared(teacher, torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]]), ("a", "b"))
    assert found["agreement"] == 0.75
    assert found["agreement_by_chance"] == pytest.approx(0.5 * 0.25 + 0.5 * 0.75)
    assert found["classes"]["a"] == {"teacher_share": 0.5, "student_share": 0.25, "agreement": 0.5}
    one_class = compared(teacher, torch.tensor([[0.0, 1.0]] * 4), ("a", "b"))
    assert "collapse to one class: the student calls every tile 'b'" in verdict(one_class)
    assert "never says c" in verdict(
        compared(torch.eye(3).repeat(4, 1), torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [1.0, 0, 0]] * 4), ("a", "b", "c"))
    )


# ---- the command line


def command(lab: Workspace, *more: object) -> list[object]:
    options = "--steps 2 --batch-size 8 --log-every 1 --monitor-every 50 --workers 0"
    return ["distill", "-w", lab.root, "--teacher", lab.finetune("a").model, *options.split(), *more]


def test_self_distillation_from_the_command_line_leaves_what_predict_loads(lab: Workspace, cli) -> None:
    as_predict_has_it = ["--model" if word == "--teacher" else word for word in command(lab, "--name", "self")]
    told = cli(*as_predict_has_it, "--labels", lab.root / "labels.csv")
    assert told.code == 0, told.err
    said = " ".join(told.err.split())
    assert "self-distillation: the student starts from the teacher's own weights" in said
    assert "4 slides stay out: the teacher was tested on these patients" in said
    assert "the student agrees with its teacher on" in said
    assert "next: histossl predict" in said
    run = lab.pretrain("self")
    told = cli("predict", "-w", lab.root, "--model", run.model, "--no-heatmaps")
    assert told.code == 0, told.err
    with lab.predictions("default").table.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["slide"] for row in rows] == SLIDES
    assert {row["predicted"] for row in rows} <= set(CLASSES)
    (run.model / "model.json").unlink()  # killed between backbone and model: the same command makes it
    assert cli(*command(lab, "--name", "self", "--labels", lab.root / "labels.csv")).code == 0
    assert load_model(run.model).info.start == "self"
    assert json.loads(run.run_json.read_text())["config"]["teacher"]
    curve = ["finetune", "-w", lab.root, "--labels", lab.root / "labels.csv", "--name", "curve", "--draws", "1"]
    told = cli(*curve, "--budgets", "2", "--starts", "random,self", "--backbone", "test_vit")
    assert told.code == 0, told.err
    assert "self: none of the 4 tested slides" in " ".join(told.err.split())


def test_a_student_that_says_one_class_alone_is_no_success_and_no_model(lab: Workspace, cli) -> None:
    burnt = ("--lr", "10", "--warmup", "0", "--no-stop-on-collapse", "--name", "burnt")
    for _ in range(2):  # and the same command says the same again
        told = cli(*command(lab, *burnt))
        assert told.code == 1
        assert "collapse to one class: the student calls every tile" in " ".join(told.err.split("error:")[1].split())
        assert "next: histossl predict" not in told.err
        assert not lab.pretrain("burnt").model.exists()


def test_a_curve_says_so_when_the_teacher_knew_the_labels_it_tests(lab: Workspace, index: TileIndex) -> None:
    """By the slides' content: the teacher's workspace may have called them otherwise, or others by the same name."""
    labels = match_labels(read_rows(lab.root / "labels.csv"), index.slides)
    splits = make_splits(labels, num_draws=1)
    same = contents_of(index, SLIDES)
    renamed = {f"other-{name}": content for name, content in same.items()}
    strangers = {name: [f"{9000 + number:032x}", ""] for number, name in enumerate(SLIDES)}
    for contents, taught in (({}, True), (same, True), (renamed, True), (strangers, False)):
        teacher = {"slides": list(contents or SLIDES), "contents": contents}
        student = Start("small", exported=Path("x"), provenance={"pretraining_slides": [], "teacher": teacher})
        told = leak_statement(labels, splits, [student], SlideNames(SLIDES), index)["statement"]
        assert told.startswith("small: its teacher had learnt the labels of 4 of 4 tested slides") == taught, told


def test_a_tested_slide_is_found_in_a_pool_that_knew_it_by_its_twin_s_name(lab: Workspace, index: TileIndex) -> None:
    labels = match_labels(read_rows(lab.root / "labels.csv"), index.slides)
    splits = make_splits(labels, num_draws=1)
    names = SlideNames(SLIDES, {"twin": labels.items[splits.tested[0]].slide})
    student = Start("small", exported=Path("x"), provenance={"pretraining_slides": ["twin.svs"]})
    told = leak_statement(labels, splits, [student], names, index)["statement"]
    assert told.startswith("small: 1 of 4 tested slides were in its pretraining pool")


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (("--teacher", "nowhere"), 2, "--teacher nowhere: holds no model.json"),
        (("--student", "resnet5"), 2, "timm has no such model"),
        (("--student", "resnet10t", "--weights", "teacher"), 2, "the teacher is a test_vit, the student a resnet10t"),
        (("--targets", "hart"), 2, "did you mean 'hard'"),
        (("--temperature", "-1"), 2, "--temperature -1: must be"),
        (("--targets", "hard", "--temperature", "2"), 2, "hard labels have no temperature"),
        (("--recipe", "mocov2"), 2, "distillation takes 1"),
        (("--weights", "nowhere.pth"), 2, "no such file"),
        (("--batch-size", "1000"), 2, "only 144 tiles"),
        (("--method", "mocov2"), 2, "No such option"),
    ],
)
def test_mistakes_get_one_clear_line(lab: Workspace, cli, more: tuple[str, ...], code: int, said: str) -> None:
    told = cli(*command(lab, "--name", "mistake", *more))
    assert told.code == code, told.err
    assert said in " ".join(told.err.split())
    assert told.err.count("error:") == 1
    assert not lab.pretrain("mistake").run_json.exists()


def test_tiles_of_another_scale_are_refused(lab: Workspace, tmp_path: Path, cli) -> None:
    write_synthetic_store(Workspace(tmp_path), ["A"], tile_px=64)
    told = cli("distill", "-w", tmp_path, "--teacher", lab.finetune("a").model)
    assert told.code == 2
    assert "--teacher" in told.err
    assert "knows tiles of 32 px" in told.err
