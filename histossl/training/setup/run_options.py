"""How a run is carried out: what may differ when it goes on, unlike the config, which says what the run is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from histossl.backbones.loading import BackboneInfo

# Scores a backbone on labelled training slides; higher is better.
Probe = Callable[[nn.Module, BackboneInfo], float]


@dataclass(frozen=True)
class Operation:
    num_workers: int = 2
    precision: str = "auto"  # auto, fp32, bf16, fp16
    micro_batches: int = 0  # 0: as few as GPU memory allows
    decode_on_gpu: bool = False
    compiled: bool = False
    recompute: bool = False  # also where memory would do; False: by itself where it would not
    deterministic: bool = False
    log_every: int = 10  # steps
    monitor_every: int = 100  # steps
    checkpoint_every_s: float = 600.0
    checkpoint_every_steps: int = 0  # 0: by time alone
    stop_on_collapse: bool = True
