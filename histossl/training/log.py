"""log.jsonl: one JSON object a line for each logged step, appended across resumes; the same for TensorBoard."""

from __future__ import annotations

import json
import math
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from histossl.errors import HistosslError
from histossl.workspace import PretrainDir, written_aside


def _plain(value: float) -> float | None:
    """JSON knows no NaN: null says that there was no number."""
    return value if math.isfinite(value) else None


class RunLog:
    def __init__(self, run: PretrainDir) -> None:
        self.path: Path = run.log
        try:
            self._board = SummaryWriter(str(run.tensorboard))
        except OSError as error:
            raise HistosslError(f"{run.root}: cannot be written ({error.strerror}); use another --workspace") from error

    def forget_from(self, step: int) -> None:
        """Drop what a resumed run will write again."""
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

    def write(self, row: dict[str, float]) -> None:
        line = json.dumps({name: _plain(value) for name, value in row.items()}) + "\n"
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)
            for name, value in row.items():
                if name != "step":
                    self._board.add_scalar(name, value, int(row["step"]))
            self._board.flush()
        except OSError as error:
            raise HistosslError(
                f"{self.path}: cannot be written ({error.strerror}); what the last checkpoint holds is safe"
            ) from error
