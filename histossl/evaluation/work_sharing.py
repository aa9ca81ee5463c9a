"""One process or several that make a curve together: who does which piece, and who waits for whom.

The many small trainings of a curve (each start, draw, fold and budget) are dealt out to the processes, as are the
slides that are embedded. Each training runs whole on one GPU, through the same loop, with the seed of its piece: so two
processes give the numbers of one, and four GPUs take a quarter of the time. Splitting each training over the GPUs
would have to exchange gradients at every one of its few steps, for batches that fit one GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from histossl.core import console
from histossl.core.errors import HistosslError, UsageError
from histossl.core.workspace import FinetuneDir
from histossl.features.extraction import device_of
from histossl.runtime.distributed import is_worker, joined
from histossl.runtime.locks import alone_in_run

T = TypeVar("T")
# Pieces end at different times, and a launcher ends all processes when one dies: waiting long is no danger.
PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class Team:
    rank: int = 0
    count: int = 1
    group: Any = None

    @property
    def leads(self) -> bool:
        """Whether this process writes what all share, and speaks to the person."""
        return self.rank == 0

    def share(self, work: Sequence[T]) -> list[T]:
        """This process's part: every so-manieth piece, since neighbours cost alike."""
        return list(work[self.rank :: self.count])

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            dist.barrier(self.group)


ALONE = Team()


@contextmanager
def held_by(team: Team, run: FinetuneDir) -> Iterator[None]:
    """The run's directory, held by the process that leads; where it cannot be, all end, and that one says why."""
    with ExitStack() as stack:
        refusal: HistosslError | None = None
        if team.leads:
            try:
                stack.enter_context(alone_in_run(run))
            except HistosslError as error:
                refusal = error
        refused = torch.tensor(refusal is not None, dtype=torch.uint8)
        if team.count > 1:  # a number and not the error: torch would send it as a pickle
            dist.broadcast(refused, src=0, group=team.group)
        if refusal is not None:
            raise refusal
        if refused:
            raise SystemExit(HistosslError.exit_code)
        yield


@contextmanager
def team_on(device: str) -> Iterator[tuple[Team, torch.device]]:
    """The processes that a launcher has started, and this one's device; one process and `device` without a launcher."""
    if not is_worker():
        yield ALONE, device_of(device)
        return
    with joined() as processes:
        if processes.count > 1 and device not in ("auto", processes.device.type):
            raise UsageError(f"--device {device}: with several processes each takes its own GPU; leave --device out")
        if processes.count == 1:
            yield ALONE, device_of(device)
            return
        before, console.console.quiet = console.console.quiet, console.console.quiet or processes.rank > 0
        try:
            yield (
                Team(processes.rank, processes.count, dist.new_group(backend="gloo", timeout=PATIENCE)),
                processes.device,
            )
        finally:
            console.console.quiet = before
