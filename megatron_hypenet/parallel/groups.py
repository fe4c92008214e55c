"""Process groups: the one place that starts torch.distributed and asks Megatron-core's
`parallel_state`.

Megatron-core makes the model-parallel groups; DeepSpeed gets them through `ModelParallelUnit` and
runs data parallelism over them (context-parallel ranks count as data-parallel there: they hold the
same weights and different tokens)."""

import math
import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_hypenet.config.schema import ParallelConfig
from megatron_hypenet.errors import SetupError
from megatron_hypenet.parallel.cpu import device, enable_cpu
from megatron_hypenet.parallel.rendezvous import (
    Meeting,
    choose_interfaces,
    meeting_point,
    wait_for_all,
)
from megatron_hypenet.process_place import launched_place


def init_parallel(
    parallel: ParallelConfig, *, seed: int = 1234, timeout_minutes: float = 30.0,
    collective_minutes: float | None = None,
    meeting: Meeting | None = None,
) -> None:  # fmt: skip
    """Start torch.distributed (at the launcher's address, or as one process without one) and
    Megatron's groups.

    `timeout_minutes` is how long the processes wait for each other at the start,
    `collective_minutes` (default: the same) how long in any collective later. Calling it again
    while the groups exist only sets the seeds again; `destroy_parallel` ends them."""
    enable_cpu()
    minutes = timeout_minutes if collective_minutes is None else collective_minutes
    if not dist.is_initialized():
        _init_process_group(timedelta(minutes=timeout_minutes), meeting)
        if minutes != timeout_minutes and dist.get_world_size() > 1:
            dist.distributed_c10d._set_pg_timeout(timedelta(minutes=minutes))
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=(
                parallel.virtual_pipeline_model_parallel_size if parallel.interleaved else None
            ),
            context_parallel_size=parallel.context_parallel_size,
            distributed_timeout_minutes=math.ceil(minutes),
        )
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def _init_process_group(timeout: timedelta, meeting: Meeting | None) -> None:
    place = launched_place()
    if torch.cuda.is_available():
        local_rank = place.local_rank if place else 0
        if local_rank >= torch.cuda.device_count():
            raise SetupError(
                f"LOCAL_RANK={local_rank}, and {torch.cuda.device_count()} GPUs are visible here "
                "(CUDA_VISIBLE_DEVICES="
                f"{os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}); each process needs its "
                "own: start fewer, or show more GPUs"
            )
        torch.cuda.set_device(local_rank)
    choose_interfaces(place)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    meeting = meeting or meeting_point(timeout)
    if meeting is None:
        dist.init_process_group(
            backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout
        )
        return
    wait_for_all(meeting, timeout)
    own = dist.PrefixStore("torch.distributed", meeting.store)
    dist.init_process_group(
        backend, store=own, rank=meeting.rank, world_size=meeting.world_size, timeout=timeout
    )


def destroy_model_groups() -> None:
    """End Megatron's groups, so that another layout can be set up over the same processes.

    Megatron only drops its references: their sockets and threads would stay and add up in a process
    that changes its layout often."""
    if not parallel_state.model_parallel_is_initialized():
        return
    created = [
        group for group in parallel_state._global_process_group_list or [] if group is not None
    ]
    parallel_state.destroy_model_parallel()
    for group in created:
        if group in dist.distributed_c10d._world.pg_map:  # some it has destroyed itself
            dist.destroy_process_group(group)


def destroy_parallel() -> None:
    """Drop Megatron's groups and torch.distributed; safe to call when nothing was started."""
    destroy_model_groups()
    if dist.is_initialized():
        dist.destroy_process_group()


def is_initialized() -> bool:
    """Return true when Megatron's groups exist."""
    return parallel_state.model_parallel_is_initialized()


def collection() -> ProcessGroupCollection:
    """Return Megatron's groups of this process, as its modules take them."""
    return ProcessGroupCollection.use_mpu_process_groups()


def tensor_group() -> dist.ProcessGroup:
    """Return the tensor-parallel group of this process."""
    return parallel_state.get_tensor_model_parallel_group()


def data_group() -> dist.ProcessGroup:
    """Return the ranks that hold the same weights and read different tokens: data parallel x
    context parallel."""
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def context_group() -> dist.ProcessGroup:
    """Return the context-parallel group of this process: the ranks that split every sequence
    between them."""
    return parallel_state.get_context_parallel_group()


def pipeline_group() -> dist.ProcessGroup:
    """Return the pipeline group of this process: the ranks that hold consecutive layers of one
    replica."""
    return parallel_state.get_pipeline_model_parallel_group()


def embedding_group() -> dist.ProcessGroup:
    """Return the first and last pipeline rank of this replica, which both hold a tied embedding."""
    return parallel_state.get_embedding_group()


def data_rank() -> int:
    """Return this process's rank among the processes that read different samples (context-parallel
    ranks share their samples)."""
    return parallel_state.get_data_parallel_rank()


def data_size() -> int:
    """Return the number of different sample streams."""
    return parallel_state.get_data_parallel_world_size()


def pipeline_stage() -> tuple[int, int]:
    """Return this process's pipeline rank and the number of pipeline stages."""
    return (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_world_size(),
    )


class ModelParallelUnit:
    """The `mpu` of DeepSpeed 0.19: Megatron's groups under the names that its ZeRO optimizers call.

    `initialize_sequence_parallel` must not be added: DeepSpeed would then ignore the model-parallel
    group."""

    get_tensor_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_tensor_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_tensor_model_parallel_world_size = staticmethod(
        parallel_state.get_tensor_model_parallel_world_size
    )
    get_pipeline_model_parallel_group = staticmethod(
        parallel_state.get_pipeline_model_parallel_group
    )
    get_pipeline_model_parallel_world_size = staticmethod(
        parallel_state.get_pipeline_model_parallel_world_size
    )
    get_model_parallel_group = staticmethod(parallel_state.get_model_parallel_group)
    get_data_parallel_group = staticmethod(data_group)

    @staticmethod
    def get_data_parallel_rank() -> int:
        """Return the rank in `data_group`."""
        return parallel_state.get_data_parallel_rank(with_context_parallel=True)

    @staticmethod
    def get_data_parallel_world_size() -> int:
        """Return the size of `data_group`."""
        return parallel_state.get_data_parallel_world_size(with_context_parallel=True)

    @staticmethod
    def get_data_parallel_group_ranks() -> list[int]:
        """Return the global ranks of `data_group`."""
        return dist.get_process_group_ranks(data_group())

    @staticmethod
    def get_model_parallel_rank() -> int:
        """Return the rank in the tensor x pipeline group."""
        return dist.get_rank(parallel_state.get_model_parallel_group())

    @staticmethod
    def get_model_parallel_world_size() -> int:
        """Return the size of the tensor x pipeline group."""
        return dist.get_world_size(parallel_state.get_model_parallel_group())


def barrier() -> None:
    """Wait for all ranks."""
    dist.barrier()


def rank() -> int:
    """Return the global rank, 0 without torch.distributed."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes, 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather_numbers(value: float) -> list[float]:
    """Return the `value` of every process by rank, on all processes; collective."""
    if world_size() == 1:
        return [value]
    own = torch.tensor([value], dtype=torch.float64, device=device())
    gathered = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(gathered, own)
    return [float(number) for number in torch.cat(gathered).tolist()]


def all_reduce_mean(tensor: torch.Tensor) -> torch.Tensor:
    """Average `tensor` over `data_group`, in place; returns it."""
    group: Any = data_group()
    if group.size() > 1:
        dist.all_reduce(tensor, group=group)
        tensor /= group.size()
    return tensor


def all_reduce_over_samples(tensor: torch.Tensor) -> torch.Tensor:
    """Sum `tensor` over the ranks that read different samples, in place; returns it."""
    group: Any = parallel_state.get_data_parallel_group()
    if group.size() > 1:
        dist.all_reduce(tensor, group=group)
    return tensor


def sum_over_pipeline(tensor: torch.Tensor) -> torch.Tensor:
    """Add up `tensor` over the pipeline stages, in place; returns it."""
    group: Any = pipeline_group()
    if group.size() > 1:
        dist.all_reduce(tensor, group=group)
    return tensor


def broadcast_from_last_stage(tensor: torch.Tensor) -> torch.Tensor:
    """Give every pipeline stage the last stage's values of `tensor` (same shape and dtype
    everywhere), in place; returns it."""
    group: Any = pipeline_group()
    if group.size() > 1:
        dist.broadcast(
            tensor, src=parallel_state.get_pipeline_model_parallel_last_rank(), group=group
        )
    return tensor


def gather_over_pipeline(value: Any) -> list[Any]:
    """Return every pipeline stage's `value` (small and picklable), in order of the stages."""
    group: Any = pipeline_group()
    gathered: list[Any] = [value]
    if group.size() > 1:
        gathered = [None] * group.size()
        dist.all_gather_object(gathered, value, group=group)
    return gathered
