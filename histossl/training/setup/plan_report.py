"""What a run tells the person who started it: its plan with the reasons beforehand, a line while it goes on."""

from __future__ import annotations

import shutil
from collections.abc import Iterable

from torch import Tensor

from histossl.backbones.loading import weights_told
from histossl.core import console
from histossl.core.config import PretrainConfig
from histossl.core.console import count
from histossl.methods.modules.masked_vit import Tokens
from histossl.training.setup.optim import name_of
from histossl.training.setup.planner import BATCH_LEAST, BATCH_MOST, BATCH_SHARE, BATCH_USUAL
from histossl.training.setup.run import Prepared

AUTO_BATCH = (
    f"--batch-size auto: {BATCH_SHARE:.0%} of the tiles, {BATCH_LEAST} to {BATCH_USUAL} (up to {BATCH_MOST:,} where "
    "GPU memory has room), at most an eighth of the tiles"
)


def announce(
    prepared: Prepared,
    asked: PretrainConfig,
    time_told: str = "told after the run's first 20 steps, or 20 s of them; `histossl plan` times them beforehand",
) -> None:
    planned = prepared.plan
    lines = [
        f"{planned.num_tiles:,} tiles of {count(planned.num_slides, 'slide')}, "
        f"{count(int((~prepared.keep).sum()), 'slide')} left out"
        + (f" (subset {prepared.subset.name} of {len(prepared.index):,} tiles)" if prepared.subset else ""),
        f"batch {planned.batch_size:,}: {planned.tiles_per_pass:,} tiles a pass x "
        f"{count(planned.num_processes, 'process')} ({name_of(prepared.device)}, {prepared.precision.name}) x "
        f"{count(planned.micro_batches, 'micro-batch')}",
        *([AUTO_BATCH] if asked.batch_size == 0 else []),
        weights_told(prepared.info, isinstance(getattr(prepared.method, "student", None), Tokens)),
        *planned.reasons,
        _disk(prepared),
        f"time: {time_told}",
    ]
    console.panel(f"{prepared.config.method}: {prepared.config.backbone} from {prepared.config.weights} weights", lines)
    if prepared.method.caution:
        console.warn(prepared.method.caution)


def _disk(prepared: Prepared) -> str:
    trained = _bytes(value for value in prepared.method.parameters() if value.requires_grad)
    held = _bytes(prepared.method.state_dict().values()) + trained * (2 if prepared.plan.optimizer == "adamw" else 1)
    backbone = _bytes(prepared.method.backbone.state_dict().values())
    told = (
        f"disk: two checkpoints of {_mb(held)} and a third while it is written, three backbones of {_mb(backbone)} "
        "(last, healthy, best)"
    )
    there = next(path for path in (prepared.run.root, *prepared.run.root.absolute().parents) if path.exists())
    own = sum(file.stat().st_size for file in prepared.run.root.glob("*") if file.is_file())  # of a run that goes on
    free = shutil.disk_usage(there).free + own
    return told if free > 3 * (held + backbone) else f"warning: {told}, and {there} has {_mb(free)} free"


def _bytes(values: Iterable[Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in values)


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.0f} MB"


def note(row: dict[str, float]) -> str:
    parts = [f"loss {row['loss']:.3f}"]
    if "loss_ceiling" in row:
        parts[0] += f" of {row['loss_ceiling']:.2f}"
    for name, told in (("instance_accuracy", "accuracy"), ("agreement", "agreement"), ("learnt", "teacher followed")):
        if name in row:
            parts.append(f"{told} {max(0.0, row[name]):.0%}")  # below none is none
    if "pretext_accuracy_recent" in row:
        parts.append(f"accuracy {row['pretext_accuracy_recent']:.1%}, chance {row['chance']:.1%}")
    parts += [f"{row['tiles_per_s']:.0f} tiles/s", f"waiting for tiles {row['data_wait']:.0%}"]
    if "gpu_memory_gb" in row:
        parts.append(f"GPU memory {row['gpu_memory_gb']:.1f} GB")
    return ", ".join(parts)
