"""The loop on a method of two numbers: what it checks, when it steps, when it gives up."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from histossl.core.errors import TrainingError
from histossl.methods.method import Method, Outcome, Views
from histossl.training.loop import Precision, Step, train
from histossl.training.setup.memory import is_out_of_memory

CPU = torch.device("cpu")


class Parabola(Method):
    """loss = mean of (w - x)^2 over the views' first image; counts what happens to it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.backbone = nn.Identity()
        self.log: list[Any] = []

    def forward(self, views: Views) -> Outcome:
        loss = (self.weight - views.images[0]).square().mean()
        return Outcome(loss, {"part": torch.tensor(float(views.part))}, carry=(views.step, views.part))

    def after_step(self, carries: Sequence[Any], progress: float) -> None:
        self.log.append((list(carries), progress, self.weight.detach().clone()))


def stream(values: Sequence[float]) -> Iterator[Views]:
    for value in values:
        yield Views([torch.full((4, 2), value)], torch.arange(4), torch.zeros(4), step=-1)


def run(
    method: Parabola, values: Sequence[float], steps: int, clip: float = 1e9, parts: int = 1, start: int = 0
) -> list[Step]:
    optimizer = torch.optim.SGD([{"params": [method.weight], "lr_scale": 0.5}], lr=1.0)
    precision = Precision()
    return list(
        train(
            method, optimizer, stream(values), lambda step: 0.2, start, steps, CPU, precision, precision.scaler(CPU),
            clip, parts,
        )
    )  # fmt: skip


def test_one_step_is_gradient_descent_with_the_group_s_rate() -> None:
    method = Parabola()
    (step,) = run(method, [3.0], 1)
    # d/dw of the mean over 8 numbers is (w - x) / 4 * ... = 2 (w - x) / 2 per weight
    torch.testing.assert_close(method.weight.detach(), torch.full((2,), 0.2 * 0.5 * 3.0))
    assert float(step.loss) == 9
    assert step.lr == 0.2


def test_two_micro_batches_are_one_batch() -> None:
    whole, parts = Parabola(), Parabola()
    run(whole, [2.0], 1)
    run(parts, [1.0, 3.0], 1, parts=2)
    torch.testing.assert_close(parts.weight, whole.weight)
    assert parts.log[0][0] == [(0, 0), (0, 1)]  # after_step once, with every carry in order


def test_after_step_sees_the_stepped_weights_and_the_progress() -> None:
    method = Parabola()
    run(method, [1.0, 1.0], 2)
    assert [progress for _, progress, _ in method.log] == [0.5, 1.0]
    assert float(method.log[0][2][0]) == pytest.approx(0.1)


def test_global_norm_is_clipped_and_reported_unclipped() -> None:
    method = Parabola()
    (step,) = run(method, [3.0], 1, clip=0.1)
    assert float(step.grad_norm) == pytest.approx(18**0.5)
    assert float(method.weight.detach().norm()) == pytest.approx(0.2 * 0.5 * 0.1, rel=1e-4)


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    method = Parabola()
    first, second, third = run(method, [1.0, float("nan"), 1.0], 3)
    assert (first.skipped, second.skipped, third.skipped) == (False, True, False)
    assert len(method.log) == 2  # no after_step: no momentum encoder swallowed it
    clean = Parabola()
    run(clean, [1.0, 1.0], 2)
    torch.testing.assert_close(method.weight, clean.weight)


def test_an_infinite_loss_is_a_reason_though_its_gradient_is_finite() -> None:
    class Shifted(Parabola):
        def forward(self, views: Views) -> Outcome:
            outcome = super().forward(views)
            return outcome._replace(loss=outcome.loss + (math.inf if views.step == 1 else 0))

    method = Shifted()
    assert [step.skipped for step in run(method, [1.0, 1.0, 1.0], 3)] == [False, True, False]
    assert len(method.log) == 2


def test_five_in_a_row_stop_the_run() -> None:
    method = Parabola()
    with pytest.raises(TrainingError, match=r"step 6: .* 5 times in a row.*weights of step 1 are.*lr too high"):
        run(method, [1.0] + [float("inf")] * 9, 10)
    assert torch.isfinite(method.weight).all()


class Normed(Parabola):
    """Runs out of memory in its second micro-batch of step 1, when BatchNorm has already seen the first."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)

    def forward(self, views: Views) -> Outcome:
        self.norm(views.images[0])
        if (views.step, views.part) == (1, 1):
            raise torch.OutOfMemoryError
        return super().forward(views)


def test_a_step_that_breaks_off_leaves_batchnorm_as_it_was() -> None:
    method, precision = Normed(), Precision()
    optimizer = torch.optim.SGD([method.weight], lr=1.0)
    steps = train(
        method, optimizer, stream([1.0, 2.0, 3.0, 4.0]), lambda step: 0.2, 0, 2, CPU, precision, precision.scaler(CPU),
        1e9, 2,
    )  # fmt: skip
    next(steps)
    mean, weight = method.norm.running_mean.clone(), method.weight.detach().clone()
    with pytest.raises(torch.OutOfMemoryError):
        next(steps)
    assert torch.equal(method.norm.running_mean, mean)
    assert torch.equal(method.weight, weight)
    assert len(method.log) == 1


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("GET was unable to find an engine to execute this computation"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("CUDA out of memory"), False),
    ],
)
def test_memory_that_ran_out_is_known_by_all_its_names(error: Exception, memory: bool) -> None:
    assert is_out_of_memory(error) == memory


def test_memory_that_runs_out_behind_the_backward_pass_leaves_the_scaler_ready() -> None:
    """fp16: gradients are divided already when the next views are made."""
    method = Parabola()
    scaler = torch.amp.GradScaler("cpu", enabled=True, init_scale=8.0)
    optimizer = torch.optim.SGD([method.weight], lr=1.0)

    def views() -> Iterator[Views]:
        yield from stream([1.0])
        raise torch.OutOfMemoryError

    for _ in range(2):
        steps = train(method, optimizer, views(), lambda step: 0.2, 0, 2, CPU, Precision(), scaler, 1e9)
        with pytest.raises(torch.OutOfMemoryError):
            next(steps)
    assert scaler.get_scale() == 8.0


def test_fp16_blames_its_scale_for_gradients_and_not_for_the_loss() -> None:
    """The loss is not scaled: where it is infinite a smaller scale would not help, and the run stops after five."""

    class Broken(Parabola):
        def forward(self, views: Views) -> Outcome:
            outcome = super().forward(views)
            return outcome._replace(loss=outcome.loss + math.inf)

    overflowing = Parabola()
    overflowing.weight.register_hook(lambda gradient: gradient * math.inf)
    for method, last, scale in ((Broken(), 5, 8.0), (overflowing, 8, 1 / 16)):
        scaler = torch.amp.GradScaler("cpu", enabled=True, init_scale=8.0)
        optimizer = torch.optim.SGD([method.weight], lr=1.0)
        steps = train(method, optimizer, stream([1.0] * 9), lambda step: 0.2, 0, 9, CPU, Precision(), scaler, 1e9)
        with pytest.raises(TrainingError, match=rf"step {last}: .*not finite 5 times in a row"):
            list(steps)
        assert scaler.get_scale() == pytest.approx(scale, rel=1)


def test_the_next_views_are_made_before_the_step_is_taken() -> None:
    """So that on a GPU they stand in line while the host waits to hear whether the gradient is finite."""
    method = Parabola()

    def told() -> Iterator[Views]:
        for views in stream([1.0, 2.0, 3.0]):
            method.log.append("views")
            yield views

    precision = Precision()
    optimizer = torch.optim.SGD([method.weight], lr=1.0)
    for _ in train(method, optimizer, told(), lambda step: 0.2, 0, 3, CPU, precision, precision.scaler(CPU), 1e9):
        pass
    assert ["views" if entry == "views" else "step" for entry in method.log] == [
        "views", "views", "step", "views", "step", "step"
    ]  # fmt: skip


def test_it_starts_where_it_is_told() -> None:
    assert [step.number for step in run(Parabola(), [1.0] * 3, 5, start=2)] == [2, 3, 4]
