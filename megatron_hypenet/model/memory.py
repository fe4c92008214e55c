"""Memory of models that are no longer used."""

import ctypes
import gc

import torch

_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
"""glibc's function that gives free memory back to the system; other C libraries have none."""


def release_memory() -> None:
    """Give the memory of what went out of scope back to the system and the device, so that what is
    built next can use it."""
    gc.collect()
    if _trim is not None:
        # by itself glibc keeps the memory of a model's weights
        _trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
