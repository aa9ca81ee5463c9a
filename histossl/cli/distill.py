"""`histossl distill`: a model of labelled slides teaches a student on all tiles, labelled or not."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from histossl.cli.from_config import PRETRAIN, command
from histossl.cli.pretrain import OnlyPlan, exit_code_of, named
from histossl.cli.tile import tell_tiled
from histossl.core import console
from histossl.core.anonymous import settle
from histossl.core.config import MOST, DistillConfig, LaunchConfig, PretrainData, RuntimeConfig
from histossl.core.errors import UsageError
from histossl.core.options import REQUIRED, Checked, above, between, option
from histossl.core.workspace import Workspace
from histossl.runtime.launcher_messages import is_launched
from histossl.runtime.locks import refuse_while_tiling

if TYPE_CHECKING:
    from histossl.backbones.loading import BackboneInfo
    from histossl.heads.model_folder import Model
    from histossl.methods.distillation import Teacher
    from histossl.tiles.store.index import TileIndex

NAME = "distillation"


@dataclass(frozen=True)
class TeacherData(Checked):
    """Who teaches whom."""

    teacher: Path = option(
        REQUIRED,
        "The model that teaches: WORKSPACE/finetune/NAME/model, as predict takes it.",
        metavar="DIR",
        flag="--teacher/--model",
    )
    student: str = option("", "Any timm model.", metavar="NAME", unset="the teacher's own (self-distillation)")
    weights: str = option(
        "",
        "Where the student starts: teacher, imagenet, random or a weights file.",
        unset="teacher where it is of the same architecture, else imagenet",
    )
    targets: str = option(
        "soft", "What it learns: soft (the teacher's class probabilities) or hard (its first choice)."
    )
    temperature: float = option(
        1.0, "Above 1 softens the labels of a teacher that is too sure.", check=above(0, most=MOST)
    )
    view_px: int = option(
        0,
        "Side of the student's views.",
        check=between(16, 1024, "a side of 16 to 1024 pixels"),
        unset="as the teacher sees tiles",
    )


def register(app: typer.Typer) -> None:
    command(
        app,
        group=PRETRAIN,
        epilog="Example: histossl distill --teacher histossl-workspace/finetune/default/model --student resnet18\n\n"
        "then histossl predict --model histossl-workspace/pretrain/distillation/model --slides DIR",
        without=("backbone", "set", "tile_px", "mpp", "anonymize"),  # which the teacher decides
        change={
            "name": {"unset": NAME},
            "labels": {
                "help": "Patients marked `test` are left out too, besides those that the teacher was tested on; the "
                "rest judge the run as it goes. Nobody's label is learned from."
            },
        },
    )(distill)


def distill(
    workspace: Workspace,
    teaching: TeacherData,
    data: PretrainData,
    config: DistillConfig,
    runtime: RuntimeConfig,
    launching: LaunchConfig,
    only: OnlyPlan,
) -> int:
    """Teach a student, small or large, on all tiles what a finetuned model says of each: no label is needed.

    Leaves a backbone as `pretrain` does, and a model folder for `histossl predict`. The same command resumes.
    """
    from histossl.evaluation.distill import leave_model, look_at_teacher, sample_of, slides_held_out
    from histossl.evaluation.predict import refuse_other_tiles, tile_config_in
    from histossl.evaluation.probe import probe_of
    from histossl.heads.model_folder import load_model
    from histossl.heads.torch_heads import teacher_of
    from histossl.labels.exclusions import excluded_slides, labelled_slides, slides_of_test_patients, without
    from histossl.methods.distillation import DistillationConfig
    from histossl.runtime.distributed import is_worker, num_processes_for
    from histossl.runtime.launcher import launch
    from histossl.tiles.store.index import TileIndex
    from histossl.training.plan import check, show_plan
    from histossl.training.pretrain import pretrain as run_pretrain

    settle(workspace, given=data.names)
    DistillationConfig(teaching.temperature, teaching.targets)  # refuses what no run could use
    num_processes = 1 if is_worker() else num_processes_for(launching.gpus)
    model = load_model(teaching.teacher, "--teacher")
    config = _settings(model, teaching, config)
    if data.slides is not None and not only.only_plan and not is_worker():
        from histossl.tiles.tiling import tile_archive

        tiling = tile_config_in(workspace, model)
        rows = tile_archive(data.slides, workspace, tiling, slide_mpp=data.slide_mpp, mpp_csv=data.mpp_csv)
        tell_tiled(rows, workspace, tiling.mpps)
    refuse_while_tiling(workspace)
    index = TileIndex.open(workspace)
    refuse_other_tiles(model, index, "--teacher")
    told_already = is_launched() or os.environ.get("RANK", "0") != "0"  # by the launcher, or by the first process
    with console.muted(told_already):
        table = labelled_slides(data.labels, index) if data.labels else None
        tested = slides_held_out(model, index)
        left_out = tested | excluded_slides(data.exclude, index)
        allowed = data.allow_missing_test_slides
        left_out |= slides_of_test_patients(data.labels, index, allowed) if data.labels else set()
    student_info = _student_info(config)
    taught = teacher_of(model, student_info)
    config = replace(config, excluded_slides=tuple(left_out), teacher=taught.facts["digest"])
    run = workspace.pretrain(data.name or NAME)
    if not is_worker():
        _say_who(config, model, taught, tested, index)
        if not run.run_json.exists():
            look_at_teacher(sample_of(index, config), taught, student_info, config)
    with console.muted(told_already):
        judge = probe_of(index, without(table, left_out), config.view_px) if table else None
    if only.only_plan:
        show_plan(index, run, config, runtime, num_processes, judge, teacher=taught)
        return 0
    if num_processes > 1:
        check(index, run, config, runtime, num_processes, teacher=taught)
        return launch(num_processes, sys.argv[1:], launching.max_restarts)
    result = run_pretrain(index, run, config, runtime, judge, teacher=taught)
    if int(os.environ.get("RANK", "0")) == 0:
        console.panel("finished" if result.finished else "stopped", result.text.split("\n"))
        if result.finished:
            text, fit = leave_model(index, run, model, taught, config)
            console.say(*text.split("\n"))
            if fit:
                said = ["histossl", "predict", "--model", str(run.model), *named(workspace)]
                console.say(f"next: {shlex.join(said)}")
    return exit_code_of(result)


# ---- what the options say


def _settings(model: Model, teaching: TeacherData, config: DistillConfig) -> DistillConfig:
    from histossl.backbones.loading import load_backbone

    of_teacher = model.folder / "backbone.safetensors"
    timm_name = load_backbone(of_teacher)[1].timm_name
    student, weights = teaching.student, teaching.weights
    same = student in ("", timm_name)
    if weights == "teacher" and not same:
        raise UsageError(
            f"--weights teacher: the teacher is a {timm_name}, the student a {student}; use imagenet, random or a file"
        )
    start = str(of_teacher) if weights in ("", "teacher") and same else weights or "imagenet"
    return replace(
        config,
        backbone=student or timm_name,
        weights=start,
        view_px=teaching.view_px or model.info.input_px,
        set=(f"targets={teaching.targets}", f"temperature={teaching.temperature:g}"),
    )


def _student_info(settings: DistillConfig) -> BackboneInfo:
    from histossl.backbones.loading import create_backbone

    return create_backbone(settings.backbone, "random")[1]


def _say_who(settings: DistillConfig, model: Model, taught: Teacher, tested: set[str], index: TileIndex) -> None:
    """Who teaches whom, on whose tiles."""
    name, start = taught.facts["backbone"], settings.weights
    kind = "self-distillation" if name == settings.backbone else f"from {name} to {settings.backbone}"
    begins = "the teacher's own weights" if start == str(model.folder / "backbone.safetensors") else f"{start} weights"
    console.say(f"{kind}: the student starts from {begins}; classes {', '.join(taught.classes)}")
    missing = [each for each in model.info.classes if each not in taught.classes]
    if missing:
        console.warn(f"the teacher never saw {', '.join(missing)}; the student will not know it either")
    from histossl.labels.training_slides import slides_learnt

    known = slides_learnt(model.info.provenance, index).slides
    if tested:
        slides = console.count(len(tested), "slide")
        console.say(f"{slides} stay{'s' if len(tested) == 1 else ''} out: the teacher was tested on these patients")
    elif known:
        console.warn(
            f"the teacher's own record names no test patients, so no slide stays out for it (it has learnt the labels "
            f"of {console.count(len(known), 'slide')} here); keep some out with --labels or "
            "--exclude, to test on"
        )
    if settings.view_px < taught.input_px:
        console.warn(
            f"--view-px {settings.view_px}: is enlarged to {taught.input_px} px for the teacher, which then sees less "
            f"than it learnt from; --view-px {taught.input_px} shows both the same"
        )
