"""Save and restore the random generators of all processes as plain tensors, so that rng.safetensors
needs no pickle."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from megatron_hypenet.checkpoint.manifest import KIND

logger = logging.getLogger(__name__)


def local_state() -> dict[str, Tensor]:
    """Return the state of torch (CPU, this process's CUDA device, Megatron's tracked generators),
    numpy and Python's random."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    state = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    for name, tracked in get_cuda_rng_tracker().get_states().items():
        if isinstance(tracked, Tensor):
            state[f"tracker.{name}"] = tracked.clone()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # type: ignore[misc]
    state["numpy"] = torch.tensor([*map(int, keys), position, has_gauss], dtype=torch.int64)
    state["numpy_gauss"] = torch.tensor([cached], dtype=torch.float64)
    version, words, gauss = random.getstate()
    state["python"] = torch.tensor([version, *words], dtype=torch.int64)
    state["python_gauss"] = torch.tensor(
        [float("nan") if gauss is None else gauss], dtype=torch.float64
    )
    return state


def restore_local_state(state: dict[str, Tensor]) -> None:
    """Restore what `local_state` returned; entries for generators that this process lacks are
    ignored."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    tracker = get_cuda_rng_tracker()
    tracked = {
        name.removeprefix("tracker."): value
        for name, value in state.items()
        if name.startswith("tracker.")
    }
    if tracked and set(tracked) == set(tracker.get_states()):
        tracker.set_states(tracked)
    numbers = state["numpy"].tolist()
    np.random.set_state(
        (
            "MT19937",
            np.array(numbers[:-2], dtype=np.uint32),
            numbers[-2],
            numbers[-1],
            state["numpy_gauss"].item(),
        )
    )
    words, gauss = state["python"].tolist(), state["python_gauss"].item()
    random.setstate((words[0], tuple(words[1:]), None if gauss != gauss else gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    torch.set_rng_state(state["torch"])


def gather_state() -> dict[str, Tensor]:
    """Return the generators of all processes under rank<R>.<name>, the same on every process;
    collective."""
    states: list[Any] = [
        {name: tensor.cpu().contiguous() for name, tensor in local_state().items()}
    ]
    if dist.is_initialized() and dist.get_world_size() > 1:
        states = [None] * dist.get_world_size()
        dist.all_gather_object(
            states, {name: tensor.cpu().contiguous() for name, tensor in local_state().items()}
        )
    return {
        f"rank{rank}.{name}": tensor
        for rank, state in enumerate(states)
        for name, tensor in state.items()
    }


def load_rng(path: Path) -> bool:
    """Restore this process's generators; returns False, with a note in the log, when the number of
    processes changed and no state belongs to it."""
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        KIND.refuse(path, error)
    world = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    if len({name.split(".")[0] for name in stored}) != world:
        logger.info(
            "random generators start afresh: the checkpoint was written by another number of "
            "processes"
        )
        return False
    prefix = f"rank{rank}."
    try:
        restore_local_state(
            {
                name.removeprefix(prefix): tensor
                for name, tensor in stored.items()
                if name.startswith(prefix)
            }
        )
    except (KeyError, ValueError, TypeError, IndexError, OverflowError, RuntimeError) as error:
        KIND.refuse(
            path, f"holds no state of the random generators ({type(error).__name__}: {error})"
        )
    return True
