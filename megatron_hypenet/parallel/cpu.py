"""Megatron-core on a machine without CUDA: the few torch.cuda functions that it calls, provided for
the CPU.

Megatron-core asks `torch.cuda` for the current device, for random-number states and for
synchronisation even when every tensor is on the CPU (0.16.1: rotary_pos_embedding.py,
tensor_parallel/random.py, dist_checkpointing/strategies/filesystem_async.py). This module provides
those calls for the CPU. In Megatron itself it patches two RNG helpers, and the name `torch` in the
pipeline schedules, which ask for a tensor on "cuda" by name. `torch.cuda.is_available()` stays
False, because torch and DeepSpeed choose their own CPU paths by it. With CUDA present everything
here does nothing."""

import ctypes
from typing import Any

import torch

_enabled = False


def device() -> torch.device:
    """Return the device of this process: its current CUDA device, or the CPU."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def _keep_freed_memory() -> None:
    """Ask glibc to keep large freed blocks instead of returning them to the kernel, where the C
    library has that switch.

    Activations of a training step are allocated and freed over and over; mapping their pages again
    each time cost 10-35% of a step of the tiny models (measured on 2 cores with glibc 2.36)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3  # malloc.h
        mallopt(m_mmap_threshold, 1 << 30)
        mallopt(m_trim_threshold, (1 << 31) - 1)
        mallopt(m_top_pad, 1 << 28)


class _TorchOnCpu:
    """torch for a module that writes device="cuda" where it means this process's device."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def zeros(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        kwargs.pop("device", None)
        return torch.zeros(*args, **kwargs)


def enable_cpu() -> None:
    """Let Megatron-core run without CUDA in this process; call before building a model. Idempotent,
    no-op with CUDA."""
    global _enabled
    if _enabled or torch.cuda.is_available():
        return
    import megatron.core.pipeline_parallel.schedules as megatron_schedules
    import megatron.core.tensor_parallel.random as megatron_random

    _keep_freed_memory()

    generator = torch.default_generator

    def get_state(*args: Any, **kwargs: Any) -> torch.Tensor:
        return generator.get_state()

    def set_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        generator.set_state(state)

    def manual_seed(seed: int) -> None:
        generator.manual_seed(seed)

    answers = {
        "current_device": lambda: torch.device("cpu"),
        "synchronize": lambda device=None: None,
        "manual_seed": manual_seed,
        "get_rng_state": get_state,
        "set_rng_state": set_state,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    megatron_random._get_cuda_rng_state = get_state
    megatron_random._set_cuda_rng_state = set_state
    megatron_schedules.torch = _TorchOnCpu()
    setattr(torch.Tensor, "cuda", lambda tensor, *args, **kwargs: tensor)  # noqa: B010 - mypy forbids the plain assignment
    _enabled = True
