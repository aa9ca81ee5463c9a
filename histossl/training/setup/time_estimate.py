"""How long a run will take: from its own first steps and looks, so that asking costs nothing and changes nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median

from histossl.core.console import count

TIMED_STEPS, TIMED_S = 20, 20.0


@dataclass(frozen=True)
class Expected:
    """What is left of a run, in seconds."""

    step_s: float
    num_steps: int
    look_s: float = 0.0
    num_looks: int = 0
    rest_s: float = 0.0  # before the first step and after the last

    @property
    def total_s(self) -> float:
        return self.step_s * self.num_steps + self.look_s * self.num_looks + self.rest_s

    def __str__(self) -> str:
        each = (
            f"of {duration(self.look_s)}"
            if self.look_s
            else f"that {'is' if self.num_looks == 1 else 'are'} not timed yet"
        )
        looks = f", {count(self.num_looks, 'look')} {each}" if self.num_looks else ""
        rest = f", {duration(self.rest_s)} before and after" if self.rest_s >= 1 else ""
        return f"about {duration(self.total_s)} ({count(self.num_steps, 'step')} of {self.step_s:.3g} s{looks}{rest})"


@dataclass
class Pace:
    """Collects what steps and looks took, and says once what that means for `num_steps` steps from here."""

    first: int
    num_steps: int
    look_every: int
    look_s: float = 0.0  # of the last look; 0: none was timed
    stepped_s: float = 0.0  # in steps alone, without looks, logs and checkpoints
    _steps_s: list[float] = field(default_factory=list)
    _since_s: float = field(default_factory=time.monotonic)
    _told: bool = False

    def stepped(self) -> None:
        """A step has come: what it took is the time since the last `resumed`."""
        took_s = time.monotonic() - self._since_s
        self.stepped_s += took_s
        if not self._told:
            self._steps_s.append(took_s)

    def resumed(self) -> None:
        """All that is not the step (log, look, checkpoint) is over."""
        self._since_s = time.monotonic()

    @contextmanager
    def look(self) -> Iterator[None]:
        began_s = time.monotonic()
        yield
        self.look_s = time.monotonic() - began_s

    def expected(self, done: int) -> Expected | None:
        """Once, after 20 steps or 20 seconds of them (in a short run after a tenth of it); the first step warms up."""
        timed = self._steps_s[1:]
        wanted = min(TIMED_STEPS, (self.num_steps - self.first) // 10)
        enough = len(timed) >= max(2, wanted) or (len(timed) >= 2 and sum(timed) >= TIMED_S)
        if self._told or not enough or self.num_steps - done <= len(timed):
            return None
        self._told = True
        looks = sum(1 for step in range(done + 1, self.num_steps + 1) if self.is_look(step))
        return Expected(median(timed), self.num_steps - done, self.look_s, looks)

    def is_look(self, done: int) -> bool:
        return done % self.look_every == 0 or done == self.num_steps


def steps_within(total_s: float, step_s: float, look_s: float, look_every: int, rest_s: float) -> int:
    """How many steps there is time for beside the looks, one before the first step, and the rest; at least one."""
    return max(1, int((total_s - look_s - rest_s) / (step_s + look_s / look_every)))


def clock(after_s: float) -> str:
    """The time of day in so many seconds, and the day where it is another one."""
    now, then = time.localtime(), time.localtime(time.time() + after_s)
    return time.strftime("%H:%M" if now[:3] == then[:3] else "%H:%M on %a %d %b", then)


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.3g} s"
    hours, minutes = int(seconds // 3600), seconds % 3600 / 60
    return f"{hours} h {minutes:.0f} min" if hours else f"{minutes:.1f} min"
