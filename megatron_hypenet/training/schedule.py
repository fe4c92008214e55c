"""Forward and backward over one step's micro-batches, with one pipeline stage or several.

With one, DeepSpeed's engine runs each micro-batch. With several, Megatron's schedules move hidden
states between the stages and DeepSpeed only reduces and applies the gradients (ZeRO 0 and 1). The
HALO stage decides which models run (`StageModule.pipeline_step`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from megatron_hypenet.engine.deepspeed.engine import TrainingEngine
from megatron_hypenet.engine.own_time import OwnTime
from megatron_hypenet.model.hypenet import HypeNetModel
from megatron_hypenet.parallel import groups
from megatron_hypenet.parallel.pipeline import run_pipeline
from megatron_hypenet.stages.base import LocalTokens, MicroBatch, StageModule, local_tokens
from megatron_hypenet.supervision.heartbeat import PROGRESS
from megatron_hypenet.training.metrics import MetricSums
from megatron_hypenet.training.tags import TRAIN

LossAndMetrics = tuple[Tensor, dict[str, Tensor]]
_LOSS = ""
"""The loss's tag among the sums of a step; a metric has a name."""


def forward_backward(engine: TrainingEngine, batches: Iterable[MicroBatch]) -> LossAndMetrics:
    """Accumulate gradients over `batches` (engine.num_micro_batches of them); mean loss and metrics
    of this process.

    The loss of a step is the sum over pipeline stages, and metrics are known on the pipeline stage
    that computes them. Results stay on the device: nothing here waits for it.
    """
    if groups.pipeline_stage()[1] > 1:
        stage = engine.module
        assert isinstance(stage, StageModule), "the engine trains a stage"
        PROGRESS.note("forward-backward")
        whole = list(batches)
        assert len(whole) == engine.num_micro_batches, (
            f"{len(whole)} micro-batches for {engine.num_micro_batches}"
        )
        result = _pipelined(stage, whole, train=True, clock=engine.own_time)
        PROGRESS.note("reduce")
        engine.reduce_gradients()
        return result
    results = _Results()
    for count, batch in enumerate(batches, start=1):
        PROGRESS.note("forward-backward")
        results.add(*engine.micro_step(batch, last=count == engine.num_micro_batches))
    assert results.count == engine.num_micro_batches, (
        f"{results.count} micro-batches for {engine.num_micro_batches}"
    )
    return results.take(results.count)


@torch.no_grad()
def stage_values(stage: StageModule, batch: MicroBatch, names: Sequence[str]) -> Tensor:
    """Return the quantities `names` of one micro-batch without training, the stage's loss first
    (`StageSpec.quantities`): [names], the same on every pipeline stage."""
    PROGRESS.note("evaluate")
    loss, metrics = (
        stage(batch)
        if groups.pipeline_stage()[1] == 1
        else _pipelined(stage, [batch], train=False, clock=OwnTime())
    )
    # what another pipeline stage computes is not among this one's metrics
    others = [metrics.get(TRAIN + name, torch.zeros_like(loss)) for name in names[1:]]
    return groups.sum_over_pipeline(torch.stack([loss.detach(), *others]))


class _Results:
    """Means over micro-batches of a loss and of metrics by tag."""

    def __init__(self) -> None:
        self._sums = MetricSums()

    @property
    def count(self) -> int:
        return self._sums.count

    def add(self, loss: Tensor, metrics: Mapping[str, Tensor]) -> None:
        self._sums.add({_LOSS: loss, **metrics})

    def take(self, micro_batches: int) -> LossAndMetrics:
        means = self._sums.means(micro_batches)
        return means.pop(_LOSS), means


def _pipelined(
    stage: StageModule, batches: Sequence[MicroBatch], *, train: bool, clock: OwnTime
) -> LossAndMetrics:
    """Return one step's micro-batches through several pipeline stages; returns this rank's part of
    loss and metrics."""
    pipeline = _PipelineRun([local_tokens(batch) for batch in batches], train=train, clock=clock)
    stage.pipeline_step(pipeline)
    return pipeline.results()


class _PipelineRun:
    """Megatron's schedules over micro-batches that all have the shape of the first, with the
    heartbeat and the own time of this rank."""

    def __init__(self, tokens: Sequence[LocalTokens], *, train: bool, clock: OwnTime) -> None:
        self.tokens = tokens
        self.train = train
        self._clock = clock
        self._phase = PROGRESS.phase
        self._results = _Results()

    def flow(
        self,
        model: HypeNetModel,
        step: Callable[[int, int], Tensor],
        finish: Callable[[int, Tensor], Tensor | None],
        *,
        train: bool = False,
    ) -> None:
        """Send every micro-batch through `model`."""
        rows, length = self.tokens[0].inputs.shape

        def noted(index: int, chunk: int) -> Tensor:
            PROGRESS.note(self._phase)
            return step(index, chunk)

        run_pipeline(
            model.chunks,
            len(self.tokens),
            seq_length=length * groups.context_group().size(),
            micro_batch_size=rows,
            step=noted,
            finish=finish,
            train=train,
        )

    def working(self) -> AbstractContextManager[None]:
        """Measure a block of this rank's own work."""
        return self._clock.working()

    def add(self, loss: Tensor, metrics: Mapping[str, Tensor]) -> None:
        """Count what this rank has of a micro-batch's loss and metrics, or what one of its chunks
        has."""
        self._results.add(loss, metrics)

    def results(self) -> LossAndMetrics:
        """Return the means over the micro-batches; the loss is zero on ranks that compute none."""
        if not self._results.count:
            self._results.add(torch.zeros((), device=self.tokens[0].inputs.device), {})
        return self._results.take(len(self.tokens))
