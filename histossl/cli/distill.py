"""`histossl distill`: a model of labelled slides teaches a student on all tiles, labelled or not.

Options that `histossl pretrain` has too are that command's own, word for word.
"""

from __future__ import annotations

import inspect
import os
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from histossl.cli import pretrain as pretraining
from histossl.cli.options import above_0, workspace_of
from histossl.cli.tile import tell_tiled
from histossl.core import console
from histossl.core.config import DistillConfig, PretrainConfig
from histossl.core.errors import UsageError
from histossl.core.workspace import refuse_while_tiling
from histossl.runtime.launcher_messages import is_launched

if TYPE_CHECKING:
    from histossl.backbones.loading import BackboneInfo
    from histossl.heads.model_folder import Model
    from histossl.methods.distillation import Teacher
    from histossl.tiles.store.index import TileIndex
    from histossl.training.setup.run_options import Operation

NAME = "distillation"
# Of pretrain's options: those that a teacher decides, or that are spelled otherwise here.
NOT_SHARED = ("name", "method", "backbone", "weights", "view_px", "tile_px", "mpp", "set_", "labels", "anonymize")


def register(app: typer.Typer) -> None:
    app.command(
        epilog="Example: histossl distill --teacher histossl-workspace/finetune/default/model --student resnet18\n\n"
        "then histossl predict --model histossl-workspace/pretrain/distillation/model --slides DIR"
    )(distill)


def distill(
    teacher: Annotated[
        Path,
        typer.Option(
            "--teacher",
            "--model",
            metavar="DIR",
            help="The model that teaches: WORKSPACE/finetune/NAME/model, as predict takes it.",
            show_default=False,
        ),
    ],
    student: Annotated[
        str,
        typer.Option(
            "--student", metavar="NAME", help="Any timm model. Default: the teacher's own (self-distillation)."
        ),
    ] = "",
    weights: Annotated[
        str,
        typer.Option(
            "--weights",
            help="Where the student starts: teacher, imagenet, random or a weights file. Default: teacher where it is "
            "of the same architecture, else imagenet.",
            show_default=False,
        ),
    ] = "",
    targets: Annotated[
        str,
        typer.Option(
            "--targets", help="What it learns: soft (the teacher's class probabilities) or hard (its first choice)."
        ),
    ] = "soft",
    temperature: Annotated[
        float, typer.Option("--temperature", help="Above 1 softens the labels of a teacher that is too sure.")
    ] = 1.0,
    view_px: Annotated[
        int,
        typer.Option(
            "--view-px",
            help="Side of the student's views. Default: as the teacher sees tiles.",
            show_default=False,
            callback=above_0,
        ),
    ] = 0,
    name: Annotated[
        str, typer.Option("--name", help="Name of the run: its directory under WORKSPACE/pretrain.")
    ] = NAME,
    labels: Annotated[
        Path | None,
        typer.Option(
            "--labels",
            metavar="FILE.csv",
            help="Patients marked `test` are left out too, besides those that the teacher was tested on; the rest "
            "judge the run as it goes. Nobody's label is learnt from.",
        ),
    ] = None,
    **shared: Any,
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
    from histossl.runtime.distributed import is_worker, launch, num_processes_for
    from histossl.tiles.store.index import TileIndex
    from histossl.training.plan import check, show_plan
    from histossl.training.pretrain import pretrain as run_pretrain

    at = workspace_of(shared["workspace"], shared["names"])
    model = load_model(teacher, "--teacher")
    DistillationConfig(temperature, targets)  # refuses what no run could use
    settings = _settings(model, student, weights, targets, temperature, view_px, shared)
    num_processes = 1 if is_worker() else num_processes_for(shared["gpus"])
    slides, only_plan = shared["slides"], shared["only_plan"]
    if slides is not None and not only_plan and not is_worker():
        from histossl.tiles.tiling import tile_archive

        tiling = tile_config_in(at, model)
        scale = {name: shared[name] for name in ("slide_mpp", "mpp_csv")}
        tell_tiled(tile_archive(slides, at, tiling, **scale), at, tiling.mpps)
    refuse_while_tiling(at)
    index = TileIndex.open(at)
    refuse_other_tiles(model, index, "--teacher")
    told_already = is_launched() or os.environ.get("RANK", "0") != "0"  # by the launcher, or by the first process
    with console.muted(told_already):
        table = labelled_slides(labels, index) if labels else None
        tested = slides_held_out(model, index)
        left_out = tested | excluded_slides(shared["exclude"], index)
        left_out |= slides_of_test_patients(labels, index) if labels else set()
    student_info = _student_info(settings)
    taught = teacher_of(model, student_info)
    settings = replace(settings, excluded_slides=tuple(left_out), teacher=taught.facts["digest"])
    run, operation = at.pretrain(name), _operation(shared, num_processes)
    if not is_worker():
        _say_who(settings, model, taught, tested, index)
        if not run.run_json.exists():
            look_at_teacher(sample_of(index, settings), taught, student_info, settings)
    with console.muted(told_already):
        judge = probe_of(index, without(table, left_out), settings.view_px) if table else None
    if only_plan:
        show_plan(index, run, settings, operation, num_processes, judge, teacher=taught)
        return 0
    if num_processes > 1:
        check(index, run, settings, operation, num_processes, teacher=taught)
        return launch(num_processes, sys.argv[1:], shared["max_restarts"])
    result = run_pretrain(index, run, settings, operation, judge, teacher=taught)
    if int(os.environ.get("RANK", "0")) == 0:
        console.panel("finished" if result.finished else "stopped", result.text.split("\n"))
        if result.finished:
            text, fit = leave_model(index, run, model, taught, settings)
            console.say(*text.split("\n"))
            here = f" -w {shared['workspace']}" if shared["workspace"] else ""
            if fit:
                console.say(f"next: histossl predict --model {run.model}{here}")
    return pretraining.exit_code_of(result)


def _with_shared_options(command: Any) -> None:
    """Give `command`, in place of its **shared, the options of `pretrain` that mean the same here."""
    own = [each for each in inspect.signature(command, eval_str=True).parameters.values() if each.name != "shared"]
    theirs = inspect.signature(pretraining.pretrain, eval_str=True).parameters.values()
    taken = [*own, *(each for each in theirs if each.name not in NOT_SHARED)]
    every = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in taken]
    command.__signature__ = inspect.Signature(every, return_annotation=int)
    command.__annotations__ = {each.name: each.annotation for each in every}


_with_shared_options(distill)


# ---- what the options say


def _settings(
    model: Model, student: str, weights: str, targets: str, temperature: float, view_px: int, shared: dict[str, Any]
) -> DistillConfig:
    from histossl.backbones.loading import load_backbone

    of_teacher = model.folder / "backbone.safetensors"
    timm_name = load_backbone(of_teacher)[1].timm_name
    same = student in ("", timm_name)
    if weights == "teacher" and not same:
        raise UsageError(
            f"--weights teacher: the teacher is a {timm_name}, the student a {student}; use imagenet, random or a file"
        )
    start = str(of_teacher) if weights in ("", "teacher") and same else weights or "imagenet"
    known = {field.name for field in fields(PretrainConfig)} - {"batch_size"}
    return DistillConfig(
        backbone=student or timm_name,
        weights=start,
        view_px=view_px or model.info.input_px,
        batch_size=pretraining._batch(shared["batch_size"]),
        set=(f"targets={targets}", f"temperature={temperature:g}"),
        **{key: value for key, value in shared.items() if key in known},
    )


def _student_info(settings: DistillConfig) -> BackboneInfo:
    from histossl.backbones.loading import create_backbone

    return create_backbone(settings.backbone, "random")[1]


def _operation(shared: dict[str, Any], num_processes: int) -> Operation:
    from histossl.training.setup.run_options import Operation

    every_s, every_steps = pretraining._every(shared["checkpoint_every"])
    workers = shared["workers"]
    return Operation(
        num_workers=workers if workers >= 0 else pretraining._loader_threads(num_processes),
        micro_batches=shared["accumulate"],
        checkpoint_every_s=every_s,
        checkpoint_every_steps=every_steps,
        **{
            key: shared[key]
            for key in (
                "precision", "decode_on_gpu", "compiled", "recompute", "deterministic", "log_every", "monitor_every",
                "stop_on_collapse",
            )
        },
    )  # fmt: skip


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
