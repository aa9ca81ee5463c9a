"""`histossl methods`: what there is to learn from without labels, when to choose which, and every knob of one."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import typer

from histossl.cli.from_config import OTHER, command
from histossl.core import console
from histossl.core.options import Checked, option
from histossl.methods import REGISTRY, TAUGHT, classes_of, entry_of


@dataclass(frozen=True)
class Which(Checked):
    name: str = option("", "A method, to see its settings.", positional=True)


def register(app: typer.Typer) -> None:
    command(app, group=OTHER, toml=False, epilog="Example: histossl methods\n\nhistossl methods dinov2")(methods)


def methods(which: Which) -> None:
    """List the self-supervised methods, or one method's settings with the paper's values."""
    name = which.name
    if not name:
        console.table(
            "methods for `histossl pretrain --method NAME`",
            ("name", "learns from", "backbones", "memory", "choose it"),
            [
                (name, entry.learns_from, entry.backbones, entry.memory, entry.choose)
                for name, entry in REGISTRY.items()
            ],
            to=console.answer,
        )
        _say(
            "memory: of 128 tiles of 224 px a pass in bf16 with a ViT-S / a ResNet-50 (tests/bench/bench_methods.py "
            "methods; counted, not measured on a GPU); the plan cuts a batch that does not fit"
        )
        _say("histossl methods NAME lists one method's knobs, their defaults and the papers' values")
        for name, entry in TAUGHT.items():
            _say(f"histossl methods {name}: {entry.learns_from}")
        return
    entry = entry_of(name)
    method, knobs = classes_of(name)
    _say(f"{name}: {entry.learns_from}. Choose it {entry.choose}.")
    if method.caution:
        console.warn(method.caution)
    taught = name in TAUGHT
    console.table(
        f"{name}: options of histossl distill" if taught else f"{name}: knobs for --set KEY=VALUE",
        ("option" if taught else "key", "default", "paper", "meaning", "source (arXiv)"),
        [(f"--{field.name}" if taught else field.name, *_told(field, method.planned)) for field in fields(knobs)],
        to=console.answer,
    )
    console.table(
        f"{name}: how it is trained{'' if taught else ' unless options say otherwise'}",
        ("what" if taught else "option", "default"),
        [(option.replace("--", "") if taught else option, value) for option, value in _trained_by(entry, method)],
        to=console.answer,
    )


def _say(text: str) -> None:
    console.say(text, to=console.answer)


def _told(field: Any, planned: tuple[str, ...]) -> tuple[object, ...]:
    default = f"planned ({field.default})" if field.name in planned else field.default
    return default, field.metadata["paper"], field.metadata["meaning"], field.metadata["source"]


def _trained_by(entry: Any, method: Any) -> list[tuple[str, str]]:
    training = method.trained_by
    which = training.optimizer or f"{training.for_batchnorm} for backbones with BatchNorm, else adamw"
    rows = [("--recipe", entry.default_recipe), ("--optimizer", which)]
    for optimizer in (training.optimizer,) if training.optimizer else (training.for_batchnorm, "adamw"):
        rate = getattr(training, optimizer)
        follows = "the square root of the batch" if rate.scaling == "sqrt" else "the batch"
        end = training.weight_decay_end if optimizer == "adamw" else None
        rows.append(
            (
                f"--lr, --weight-decay ({optimizer})",
                f"{rate.continued:g} at batch {rate.batch} and as {follows} (from scratch {rate.lr:g}); weight decay "
                f"{rate.weight_decay:g}{'' if end is None else f' to {end:g}'}",
            )
        )
    return [
        *rows,
        ("--layer-decay", f"{training.layer_decay:g} with adamw from pretrained weights, else 1"),
        ("--warmup", f"{training.warmup:g} of the steps"),
        ("--final-lr", f"{training.final_lr:g} of the peak, at the last step"),
        (
            "--clip-norm",
            {"all": "3 over all", "parameter": "3, each parameter by itself"}[training.clip_by],
        ),
    ]
