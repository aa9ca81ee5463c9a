"""What a process that was launched beside others tells its launcher when it fails.

torch's launcher restarts every worker that ends badly, which is right for a crash and useless for a mistake: the
mistake would be made again. So a worker writes its error down and ends; started again, it sees the note and ends well;
the launcher then shows the error, once.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from histossl.core.errors import HistosslError

NOTE = "HISTOSSL_FAILURE_NOTE"
LAUNCHER = "HISTOSSL_LAUNCHER"  # its process number


def is_launched() -> bool:
    """Whether our own launcher has started this process, and not torchrun or SLURM."""
    return NOTE in os.environ


def launcher_is_gone() -> bool:
    """Whether our own launcher was killed: nobody would hear of this process any more, nor end it."""
    launcher = os.environ.get(LAUNCHER)
    return launcher is not None and os.getppid() != int(launcher)


def failed_before() -> bool:
    path = os.environ.get(NOTE)
    return bool(path) and Path(str(path)).exists()


def tell_launcher(error: HistosslError) -> bool:
    """Write the error down where there is a launcher to read it. The first worker's word counts."""
    path = os.environ.get(NOTE)
    if not path:
        return False
    aside = Path(f"{path}.{os.getpid()}")
    aside.write_text(json.dumps([error.exit_code, str(error)]), encoding="utf-8")
    if not Path(path).exists():
        aside.replace(path)
    return True


def tell_end(code: int = 0) -> None:
    """A worker has done all it should, or has saved and stopped: its launcher reads here what to exit with."""
    path = os.environ.get(NOTE)
    if path:
        _ending(Path(path)).write_text(str(code), encoding="utf-8")


def read_end(path: Path) -> int | None:
    """What `tell_end` wrote, or None where nothing ended well."""
    ending = _ending(path)
    return int(ending.read_text(encoding="utf-8")) if ending.exists() else None


def _ending(path: Path) -> Path:
    return path.with_name("ended")


def read_note(path: Path) -> tuple[int, str] | None:
    if not path.exists():
        return None
    code, text = json.loads(path.read_text(encoding="utf-8"))
    return int(code), str(text)
