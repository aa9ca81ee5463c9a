"""Memory: whether an error says that a GPU's ran out, how much of the machine's is free, what a pass keeps."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

# Near a full card libraries have other words for it: cuDNN and cuBLAS when they cannot have their workspace.
IN_OTHER_WORDS = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "unable to find an engine to execute this computation",
    "Unable to find a valid cuDNN algorithm",
)


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError):
        return True
    said = str(error).lower()
    return isinstance(error, RuntimeError) and any(words.lower() in said for words in IN_OTHER_WORDS)


def free_ram() -> int | None:
    """Bytes that this process may still take, by the machine and by the container it runs in; None if nobody tells."""
    try:
        told = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None
    found = re.search(r"^MemAvailable:\s+(\d+) kB", told, re.MULTILINE)
    free = [int(found[1]) << 10] if found else []
    for folder in _cgroups():
        for limit, used, cache in (
            ("memory.max", "memory.current", r"(?:in)?active_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", r"total_(?:in)?active_file"),
        ):
            with contextlib.suppress(OSError, ValueError):
                most = int((folder / limit).read_text())  # "max" where there is none
                told = (folder / "memory.stat").read_text(encoding="ascii")
                given_back = sum(map(int, re.findall(rf"^{cache} (\d+)", told, re.MULTILINE)))  # files that were read
                free.append(most - int((folder / used).read_text()) + given_back)
    return min(free, default=None)


def _cgroups() -> list[Path]:
    """Of this process, from its own up to the root: any of them may set a limit."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    folders = []
    for _, controllers, name in (line.split(":", 2) for line in lines):
        if controllers in ("", "memory") or "memory" in controllers.split(","):
            root = Path("/sys/fs/cgroup", "memory" if controllers else "")
            own = root / name.lstrip("/")
            folders += [own, *(each for each in own.parents if each.is_relative_to(root))]
    return folders


@contextmanager
def kept_for_backward() -> Iterator[list[int]]:
    """A list of one number: the bytes that forward passes within keep for their backward pass, parameters apart."""
    total, seen = [0], set()

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        leaf = isinstance(tensor, nn.Parameter) or (tensor._base is not None and isinstance(tensor._base, nn.Parameter))
        if not leaf and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total[0] += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield total
