"""LARS: SGD whose rate follows, layer by layer, how large the weights are beside their gradient (You et al. 2017)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

ETA = 1e-3  # google-research/simclr's `eeta`


class LARS(torch.optim.Optimizer):
    """v <- momentum v + lr * trust * (g + wd w);  w <- w - v,  with trust = eta |w| / |g + wd w|.

    As google-research/simclr (lars_optimizer.py): biases and norms (groups without weight decay, or one-dimensional)
    take neither weight decay nor the trust ratio, and a ratio with a zero norm in it is 1.
    """

    def __init__(self, params: Iterable[Any], lr: float, momentum: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                update = parameter.grad
                if parameter.ndim > 1:
                    update = update.add(parameter, alpha=group["weight_decay"])
                    weight_norm, update_norm = parameter.norm(), update.norm()
                    trust = torch.where((weight_norm > 0) & (update_norm > 0), ETA * weight_norm / update_norm, 1.0)
                    update = update * trust
                state = self.state[parameter]
                if "velocity" not in state:
                    state["velocity"] = torch.zeros_like(parameter)
                velocity = state["velocity"].mul_(group["momentum"]).add_(update * group["lr"])
                parameter.sub_(velocity)
