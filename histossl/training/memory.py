"""Whether an error says that the GPU's memory ran out: near a full card libraries have other words for it."""

from __future__ import annotations

import torch

# cuDNN and cuBLAS when they cannot have their workspace, and the driver itself.
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
