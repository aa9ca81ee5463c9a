"""log.jsonl: one JSON object a line for each logged step, appended across resumes; the same for TensorBoard."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from histossl.core.errors import HistosslError
from histossl.core.workspace import PretrainDir, written_aside


def _plain(value: float) -> float | None:
    """JSON knows no NaN: null says that there was no number."""
    return value if math.isfinite(value) else None


class RunLog:
    def __init__(self, run: PretrainDir) -> None:
        self.run = run
        self.path: Path = run.log
        self._board: SummaryWriter | None = None

    def begin_at(self, step: int) -> None:
        """Drop what the run is going to write again: the rows here, and in TensorBoard's files as it reads them."""
        try:
            self._board = SummaryWriter(str(self.run.tensorboard), purge_step=step)
        except OSError as error:
            raise HistosslError(
                f"{self.run.root}: cannot be written ({error.strerror}); use another --workspace"
            ) from error
        if not self.path.exists():
            return
        rows = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue  # the last line of a killed run
        with written_aside(self.path) as aside:
            kept = [json.dumps(row) + "\n" for row in rows if row["step"] < step]
            aside.write_text("".join(kept), encoding="utf-8")

    def warn(self, step: int, text: str) -> None:
        """A row without figures: what a monitor said at this step."""
        self._write({"step": step, "warning": text}, {})

    def write(self, row: dict[str, float]) -> None:
        self._write({name: _plain(value) for name, value in row.items()}, row)

    def _write(self, line: Mapping[str, object], row: Mapping[str, float]) -> None:
        assert self._board is not None, "begin_at comes first"
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            for name, value in row.items():
                if name != "step":
                    self._board.add_scalar(name, value, int(row["step"]))
            self._board.flush()
        except OSError as error:
            raise HistosslError(
                f"{self.path}: cannot be written ({error.strerror}); what the last checkpoint holds is safe"
            ) from error
