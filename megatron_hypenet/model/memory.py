"""Memory of models that are no longer used."""

import gc

import torch


def release_memory() -> None:
    """Give the memory of what went out of scope back to the device, so that what is built next can
    use it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
