"""Forward and backward over one step's micro-batches, with one pipeline stage or several.

With one, DeepSpeed's engine runs each micro-batch. With several, Megatron's schedules move hidden
states between the stages and DeepSpeed only reduces and applies the gradients (ZeRO 0 and 1). What
flows differs by HALO stage:
- alignment: the teacher's trunk, forward only; each rank differentiates its own layers' losses on
  the spot, nothing flows back;
- distillation: the teacher forward only, the last rank keeps its hidden states; then the student,
  one forward one backward, with the loss of both on the last rank;
- finetuning: the student alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from megatron_hypenet.engine.deepspeed.engine import TrainingEngine, finite_or_nan
from megatron_hypenet.engine.own_time import OwnTime
from megatron_hypenet.model.hypenet import HypeNetModel
from megatron_hypenet.parallel import groups
from megatron_hypenet.parallel.pipeline import run_pipeline
from megatron_hypenet.stages.align import AlignStage
from megatron_hypenet.stages.base import Batch, HeadStage, LocalTokens, StageModule, local_tokens
from megatron_hypenet.supervision.heartbeat import PULSE

LossAndMetrics = tuple[Tensor, dict[str, Tensor]]


def forward_backward(engine: TrainingEngine, batches: Iterable[Batch]) -> LossAndMetrics:
    """Accumulate gradients over `batches` (engine.num_micro_batches of them); mean loss and metrics
    of this process.

    The loss of a step is the sum over pipeline stages, and metrics are known to the stage they
    arise on. Results stay on the device: nothing here waits for it.
    """
    if groups.pipeline_stage()[1] > 1:
        stage = engine.module
        assert isinstance(stage, StageModule), "the engine trains a stage"
        PULSE.note("forward-backward")
        whole = list(batches)
        assert len(whole) == engine.num_micro_batches, (
            f"{len(whole)} micro-batches for {engine.num_micro_batches}"
        )
        result = _pipelined(stage, whole, train=True, clock=engine.own_time)
        PULSE.note("reduce")
        engine.reduce_gradients()
        return result
    results = _Mean()
    for count, batch in enumerate(batches, start=1):
        PULSE.note("forward-backward")
        results.add(*engine.micro_step(batch, last=count == engine.num_micro_batches))
    assert results.count == engine.num_micro_batches, (
        f"{results.count} micro-batches for {engine.num_micro_batches}"
    )
    return results.take()


@torch.no_grad()
def stage_loss(stage: StageModule, batch: Batch) -> Tensor:
    """Loss of one micro-batch without training, the same value on every pipeline stage."""
    PULSE.note("evaluate")
    loss, _ = (
        stage(batch)
        if groups.pipeline_stage()[1] == 1
        else _pipelined(stage, [batch], train=False, clock=OwnTime())
    )
    return groups.sum_over_pipeline(loss.detach().clone())


class _Mean:
    """Means over micro-batches of a loss and of metrics by tag."""

    def __init__(self) -> None:
        self.count = 0
        self._loss: Tensor | None = None
        self._sums: dict[str, Tensor] = {}

    def add(self, loss: Tensor, metrics: Mapping[str, Tensor]) -> None:
        self.count += 1
        self._loss = loss.detach().clone() if self._loss is None else self._loss + loss.detach()
        for tag, value in metrics.items():
            self._sums[tag] = (
                value.detach().clone()
                if tag not in self._sums
                else self._sums[tag] + value.detach()
            )

    def take(self) -> LossAndMetrics:
        assert self._loss is not None, "no micro-batch was run"
        return self._loss / self.count, {
            tag: value / self.count for tag, value in self._sums.items()
        }


def _pipelined(
    stage: StageModule, batches: Sequence[Batch], *, train: bool, clock: OwnTime
) -> LossAndMetrics:
    """One step's micro-batches through several pipeline stages; the share of this rank in loss and
    metrics."""
    tokens = [local_tokens(batch) for batch in batches]
    results = _Mean()
    if isinstance(stage, AlignStage):
        _align(stage, tokens, results, train=train, clock=clock)
    else:
        assert isinstance(stage, HeadStage), f"no pipeline schedule for {type(stage).__name__}"
        kept = (
            _kept_hidden(stage.frozen_teacher, tokens)
            if stage.frozen_teacher is not None
            else [None] * len(tokens)
        )

        def loss_of(index: int, hidden: Tensor) -> Tensor:
            loss, metrics = stage.head_loss(tokens[index], hidden, kept[index])
            results.add(loss, metrics)
            kept[index] = None
            return loss * finite_or_nan(loss)

        _flow(stage.student, tokens, loss_of, train=train, clock=clock)
    if not results.count:  # not the last rank: the loss arises there
        results.add(torch.zeros((), device=tokens[0].inputs.device), {})
    return results.take()


def _align(
    stage: AlignStage, tokens: Sequence[LocalTokens], results: _Mean, *, train: bool, clock: OwnTime
) -> None:
    phase = "forward-backward" if train else "evaluate"

    def step(index: int) -> Tensor:
        PULSE.note(phase)
        with clock.working():
            output = stage.teacher.hidden(tokens[index].inputs, tokens[index].document_ids)
            loss, metrics = stage.layer_losses()
        if train:
            loss.backward(gradient=finite_or_nan(loss) / len(tokens))
        results.add(loss, metrics)
        return output

    _flow(stage.teacher, tokens, lambda index, hidden: None, train=False, step=step)


def _kept_hidden(teacher: HypeNetModel, tokens: Sequence[LocalTokens]) -> list[Tensor | None]:
    """The teacher's final hidden states of every micro-batch on the last pipeline stage, None
    elsewhere."""
    kept: list[Tensor | None] = [None] * len(tokens)

    def keep(index: int, hidden: Tensor) -> None:
        kept[index] = hidden

    _flow(teacher, tokens, keep, train=False)
    return kept


def _flow(
    model: HypeNetModel,
    tokens: Sequence[LocalTokens],
    finish: Callable[[int, Tensor], Tensor | None],
    *,
    train: bool,
    step: Callable[[int], Tensor] | None = None,
    clock: OwnTime | None = None,
) -> None:
    """run_pipeline over micro-batches that all have the shape of the first; the stage's own work
    counts on `clock`."""
    rows, length = tokens[0].inputs.shape
    phase = "forward-backward" if train else PULSE.phase

    def hidden(index: int) -> Tensor:
        PULSE.note(phase)
        with contextlib.nullcontext() if clock is None else clock.working():
            return model.hidden(tokens[index].inputs, tokens[index].document_ids)

    run_pipeline(
        model,
        len(tokens),
        seq_length=length * groups.context_group().size(),
        micro_batch_size=rows,
        step=step or hidden,
        finish=finish,
        train=train,
    )
