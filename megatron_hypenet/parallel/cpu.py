"""Megatron-core on a machine without CUDA: the few torch.cuda entry points it calls, answered for the CPU.

Megatron-core asks `torch.cuda` for the current device, for random-number states and for synchronisation even when every tensor is on
the CPU (0.16.1: rotary_pos_embedding.py, tensor_parallel/random.py, dist_checkpointing/strategies/filesystem_async.py). This module
answers those calls; nothing of Megatron itself is patched but two RNG helpers. `torch.cuda.is_available()` stays False, because torch
and DeepSpeed choose their own CPU paths by it. With CUDA present everything here does nothing."""

import torch

_enabled = False


def device() -> torch.device:
    """The device of this process: its current CUDA device, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def enable_cpu() -> None:
    """Let Megatron-core run without CUDA in this process; call before building a model. Idempotent, no-op with CUDA."""
    global _enabled
    if _enabled or torch.cuda.is_available():
        return
    import megatron.core.tensor_parallel.random as megatron_random

    generator = torch.default_generator
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.manual_seed = lambda seed: generator.manual_seed(seed) and None
    torch.cuda.get_rng_state = lambda device="cuda": generator.get_state()
    torch.cuda.set_rng_state = lambda state, device="cuda": generator.set_state(state) and None
    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: generator.get_state()
    megatron_random._set_cuda_rng_state = lambda state, *args, **kwargs: generator.set_state(state) and None
    torch.Tensor.cuda = lambda tensor, *args, **kwargs: tensor  # type: ignore[method-assign,assignment]
    _enabled = True
