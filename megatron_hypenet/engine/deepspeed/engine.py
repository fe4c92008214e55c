"""The one place that runs DeepSpeed: engine configuration, one training step, and access to weights
and optimizer state by parameter.

DeepSpeed does data parallelism and ZeRO over Megatron's groups. What is handled here, found with
DeepSpeed 0.19.8:
- ZeRO stage 0 becomes 1: stage 0 has no gradient norm in fp32, and its clipping asks the wrong rank
  under pipeline parallelism.
- bf16 with fp32 accumulation at stage 1 selects BF16_Optimizer, which needs
  `immediate_grad_update`.
- On a CPU, DeepSpeed compiles a shared-memory collective for inference when its backend starts (24
  s, needs a compiler). Training never calls it, so it is marked unusable in DeepSpeed's table of
  ops.
- Adam's state is created at the start: DeepSpeed links it to parameters after the first group's
  first step, and so misses the others.
- BF16_Optimizer rounds fp32 sums to bf16 before it reduces them, on one rank too, and passes over
  memory too often: bf16_accumulation.py, bf16_step.py.
- With the optimizer on the CPU, gradients of a refused update stay in stage 1 and 2's buffers and
  spoil all later ones.
- `safe_set_full_*` fails under ZeRO-3 when a parameter's size is no multiple of the group
  (stage3.py): the local part is written.

Private fields of its optimizers are used in state_access.py and the bf16 files, and listed in
private_fields.py.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_hypenet.checkpoint.state import Template
from megatron_hypenet.config.schema import HeadStageConfig, ParallelConfig, StageConfig
from megatron_hypenet.engine.cuda_graph import CudaGraphs
from megatron_hypenet.engine.deepspeed import private_fields
from megatron_hypenet.engine.deepspeed.config import config_dict, import_deepspeed
from megatron_hypenet.engine.deepspeed.state_access import (
    is_replicated,
    mark_replicated,
    optimizer_access,
)
from megatron_hypenet.engine.optim import adamw
from megatron_hypenet.engine.own_time import OwnTime
from megatron_hypenet.errors import DivergedError, LayoutError
from megatron_hypenet.parallel import groups
from megatron_hypenet.stages.base import MicroBatch, finite_or_nan

logger = logging.getLogger(__name__)


class RefusedUpdate(DivergedError):
    """A step whose gradients were not finite; nothing has changed, and training may go on with
    other samples."""


class TrainingEngine:
    """A stage module under DeepSpeed. Use: micro_step per micro-batch, then apply; close at the
    end.

    Also the `EngineState` through which checkpoints reach weights and optimizer state.
    """

    def __init__(self, module: nn.Module, stage: StageConfig, parallel: ParallelConfig) -> None:
        """`module` has trainable_parameters() and sharded_state_dict(), lies on its device in its
        dtype, and stays usable by itself."""
        if groups.pipeline_stage()[1] > 1 and parallel.zero_stage > 1:
            raise LayoutError(
                f"parallel.zero_stage={parallel.zero_stage} under pipeline parallelism would give "
                "gradients away before they are complete; "
                "use zero_stage 0 or 1, or a pipeline size of 1"
            )
        self.deepspeed = import_deepspeed()
        self.module = module
        trainable: Mapping[str, nn.Parameter] = module.trainable_parameters()  # type: ignore[operator]
        # a few parameters of a bfloat16 model may stay in float32
        self.dtype = min((one.dtype for one in trainable.values()), key=lambda one: one.itemsize)
        self.num_micro_batches = stage.num_micro_batches(groups.data_size())
        self.template = Template(module)
        self.data_rank = groups.ModelParallelUnit.get_data_parallel_rank()
        self.data_size = groups.ModelParallelUnit.get_data_parallel_world_size()
        self.replicated: list[nn.Parameter] = module.replicated_over_pipeline()  # type: ignore[operator]
        if groups.pipeline_stage()[0] > 0:
            for parameter in self.replicated:
                mark_replicated(parameter)
        optimizer = adamw(dict(trainable), stage)
        self._guard = optimizer.register_step_pre_hook(self._refuse_bad_norm)
        config = config_dict(
            stage, parallel, num_micro_batches=self.num_micro_batches, dtype=self.dtype
        )
        # without no_grad its flat copies of the weights are results of a graph that lives, with
        # nodes of all weights
        with _silenced(), torch.no_grad(), self._dtypes_kept(trainable, parallel.zero_stage):
            self.engine, *_ = self.deepspeed.initialize(
                model=module, optimizer=optimizer, mpu=groups.ModelParallelUnit, config=config
            )
        self.zero_stage = self.engine.zero_optimization_stage()
        self.own_time = OwnTime()
        """Time of the forward passes since the last reading; with CUDA graphs, of forward and
        backward."""
        self.graphs: CudaGraphs | None = None
        self.access = optimizer_access(self.engine.optimizer, self.deepspeed)
        self.sums = self.access.accumulate_in_fp32(
            self._counts_in_norm, getattr(torch, parallel.gradient_exchange)
        )
        if self.sums is not None:
            # micro-batches so small have no need to recompute, and Megatron's way of it restores
            # random states, which no graph holds
            recomputes = isinstance(stage, HeadStageConfig) and stage.recompute != "none"
            if (
                torch.cuda.is_available()
                and parallel.model_parallel_size == 1
                and stage.cuda_graphs
                and module.replayable
                and not recomputes
            ):
                self.graphs = CudaGraphs(
                    self._forward_backward, self.sums, several=self.num_micro_batches > 1
                )
        self.access.init_adam(0)

    def _dtypes_kept(
        self, trainable: Mapping[str, nn.Parameter], zero_stage: int
    ) -> contextlib.AbstractContextManager[None]:
        """Return a context in which DeepSpeed rounds no parameter that stays in float32; under
        ZeRO-3, whose buffer has one dtype, it does round them, and that is said."""
        if zero_stage < 3:
            return private_fields.without_casts()
        wider = [name for name, one in trainable.items() if one.dtype != self.dtype]
        if wider and groups.rank() == 0:
            logger.warning(
                "WARNING: zero_stage=3 holds %d parameters that otherwise stay in float32 (%s, ...)"
                " in %s; the optimizer's copies are float32. Use zero_stage=2 to keep them exact",
                len(wider),
                wider[0],
                str(self.dtype).removeprefix("torch."),
            )
        return contextlib.nullcontext()

    def micro_step(self, batch: MicroBatch, *, last: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Forward and backward of one micro-batch; gradients accumulate until the `last` of the
        step.

        Returns (loss, metrics) detached, good until the next call."""
        if self.graphs is not None and self.sums is not None and self.graphs.takes(batch):
            with self.own_time.working():
                result = self.graphs.replay(batch, first=self.sums.empty)
            if last:
                self.reduce_gradients()
            return result
        self.engine.set_gradient_accumulation_boundary(last)
        with self.own_time.working():
            loss, metrics = self.engine(batch)
        self.engine.backward(loss * finite_or_nan(loss))
        if not last:
            self.engine.step()  # only counts: the update waits for the boundary
        return loss.detach(), metrics

    def make_room(self) -> None:
        """Free GPU memory before other work than training, which may need it."""
        if self.graphs is not None:
            self.graphs.make_room()

    def _forward_backward(self, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Run a micro-batch without DeepSpeed's part in it but its gradient hooks: what a CUDA
        graph can hold."""
        # not the call: DeepSpeed hooks into that, and its timer waits for the device
        loss, metrics = self.module.forward(batch)
        loss.backward(gradient=finite_or_nan(loss) / self.num_micro_batches)
        return loss.detach(), metrics

    def reduce_gradients(self) -> None:
        """Complete and average gradients that were accumulated past DeepSpeed's engine, by a
        pipeline schedule or a CUDA graph."""
        for parameter in self.replicated:
            gradient = self.access.accumulated_gradient(parameter)
            assert gradient is not None, (
                "a replicated parameter got no gradient on this pipeline stage"
            )
            dist.all_reduce(gradient, group=groups.embedding_group())
        self.engine.set_gradient_accumulation_boundary(True)
        self.engine.allreduce_gradients()

    def _counts_in_norm(self, parameter: nn.Parameter) -> bool:
        """Return whether a gradient counts in the norm on this rank: for weights that several
        model-parallel ranks hold, one rank's gradient counts, as in DeepSpeed's own norm."""
        if is_replicated(parameter):
            return False
        split = getattr(parameter, "tensor_model_parallel", False) or getattr(
            parameter, "model_parallel", False
        )
        return split or groups.tensor_group().rank() == 0

    def apply(self, lr: float) -> float:
        """Clip, update the weights with learning rate `lr`, clear gradients; returns the gradient
        norm before clipping.

        RefusedUpdate on all processes when the norm is not finite: gradients are then cleared,
        weights, moments and Adam's step are as they were, and the next step may follow. The norm is
        reduced over all processes, so they agree without a further collective.
        """
        self.access.set_learning_rate(lr)
        self.engine.step()
        norm = float(self.engine.get_global_grad_norm())
        if not math.isfinite(norm) or self.access.overflow:
            self.access.drop_gradients()
            raise RefusedUpdate("the gradient norm is not finite")
        return norm

    def _refuse_bad_norm(self, *_: Any) -> None:
        """Raise inside DeepSpeed's step, before the first change of a weight: a bad norm (-1 is
        DeepSpeed's mark) must not get this far. Where FusedAdamWStep has taken that step's place,
        it refuses such a norm itself.

        Should another version of DeepSpeed let one through, the weights are saved, but not the
        step: it cannot be continued from here.
        """
        norm = self.access.gradient_norm
        if not math.isfinite(norm) or norm < 0:
            raise DivergedError("the gradient norm is not finite")

    def gathered(self, parameter: nn.Parameter) -> AbstractContextManager[None]:
        """Return a context in which `parameter` holds its full local value."""
        return self.access.gathered(parameter)

    def set_weight(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Overwrite the weight the forward pass uses."""
        self.access.set_weight(parameter, value)

    def full_state(self, parameter: nn.Parameter, name: str) -> Tensor:
        """Return fp32_param, exp_avg or exp_avg_sq of one parameter, full local shape; collective
        over the data-parallel group."""
        return self.access.full_state(parameter, name)

    def set_full_state(self, parameter: nn.Parameter, name: str, value: Tensor) -> None:
        """Write this rank's part of one state from the full local value."""
        self.access.set_full_state(parameter, name, value)

    def init_optimizer_state(self, adam_step: int) -> None:
        """Create Adam's moments (zeros) where they are missing, and set its step counters."""
        self.access.init_adam(adam_step)

    def adam_step(self) -> int:
        """Return Adam's step counter, 0 before the first step."""
        return self.access.adam_step()

    def close(self) -> None:
        """Release DeepSpeed's hooks and buffers; the module keeps its weights (whole ones, except
        under ZeRO-3)."""
        self._guard.remove()
        self.graphs = None
        with _silenced():
            self.engine.destroy()


@contextmanager
def _silenced() -> Iterator[None]:
    """Suppress what DeepSpeed prints about memory while it builds an optimizer."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
