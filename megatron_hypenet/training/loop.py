"""The one training loop: every stage, every layout. Resumes by itself, saves at intervals, on
request and at the end."""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from megatron_hypenet.checkpoint import format as fmt
from megatron_hypenet.checkpoint.find import finished_checkpoint
from megatron_hypenet.checkpoint.load import load_training, verify_together
from megatron_hypenet.checkpoint.state import TrainState
from megatron_hypenet.config.schema import RunConfig, StageConfig
from megatron_hypenet.engine.async_scalar import OnItsWay
from megatron_hypenet.engine.deepspeed.engine import RefusedUpdate, TrainingEngine
from megatron_hypenet.engine.optim import lr_at
from megatron_hypenet.errors import ConfigError, DivergedError, SavedAndRequeue
from megatron_hypenet.parallel import groups
from megatron_hypenet.parallel.agreement import from_first
from megatron_hypenet.stages.base import Batch, StageModule
from megatron_hypenet.supervision import signals
from megatron_hypenet.supervision.faults import out_of_gpu_memory, record_now
from megatron_hypenet.supervision.heartbeat import PULSE
from megatron_hypenet.training.checkpointing import Saver
from megatron_hypenet.training.grace_period import Timing
from megatron_hypenet.training.metrics import (
    MetricSums,
    Recorder,
    StepRecord,
    memory_gib,
    reset_peak_memory,
)
from megatron_hypenet.training.micro_batches import TokenSource, step_batches
from megatron_hypenet.training.schedule import forward_backward
from megatron_hypenet.training.stragglers import StepTimes, named
from megatron_hypenet.training.throughput import Workload, peak_flops

logger = logging.getLogger(__name__)


def train(
    stage: StageModule,
    data: TokenSource,
    config: StageConfig,
    run: RunConfig,
    out_dir: Path | str,
    *,
    tensorboard_dir: Path | None = None,
    tokenizer_dir: Path | None = None,
    extra: dict[str, Any] | None = None,
    on_step: Callable[[StepRecord], None] | None = None,
    evaluate: Callable[[int], Mapping[str, float]] | None = None,
    log: Callable[[str], None] | None = None,
) -> Path:
    """Train `stage` to config.train_iters and return its final checkpoint,
    <out_dir>/checkpoints/iter_XXXXXXX.

    Returns at once when that is there with its files as written. Otherwise continues from the
    newest usable checkpoint there is; on the same layout the continuation is bit-equal. `on_step`
    sees every step on every process; `evaluate` gives extra TensorBoard points every eval_interval
    steps and after the last. `extra` goes into the manifests. Raises DivergedError (weights
    unchanged since the last good step), SavedAndRequeue after a signal or STOP file, LayoutError
    when the stage does not fit the GPU, CheckpointError.
    """
    # one answer, however slowly the folder shows up elsewhere
    done: Path | None = from_first(finished_checkpoint(Path(out_dir), config.train_iters))
    if done is not None:
        verify_together(done)
        return done
    trainer = _Trainer(
        stage, data, config, run, Path(out_dir), tokenizer_dir=tokenizer_dir, extra=extra or {}
    )
    signals.leave_if_stopped(f"stage {stage.name}", trainer.requests.folders)
    try:
        with trainer.requests:
            trainer.open(tensorboard_dir or Path(out_dir) / "tb", log)
            return trainer.run_to_end(on_step, evaluate)
    except BaseException as fault:
        told = out_of_gpu_memory(fault, config) or fault
        record_now(told)  # before anything is closed: the other processes are about to fail of it
        if told is fault:
            raise
        raise told from fault
    finally:
        trainer.close()


def _not_finite(metrics: Mapping[str, Tensor]) -> str:
    """Names the metrics of this process that are not finite."""
    bad = sorted(tag for tag, value in metrics.items() if not torch.isfinite(value).all())
    return f"; not finite here: {', '.join(bad[:5])}" if bad else ""


class _Trainer:
    """State of one call of `train`."""

    def __init__(
        self, stage: StageModule, data: TokenSource, config: StageConfig, run: RunConfig,
        out_dir: Path, *, tokenizer_dir: Path | None,
        extra: dict[str, Any],
    ) -> None:  # fmt: skip
        self.stage = stage
        self.data = data
        self.config = config
        self.run = run
        self.out_dir = out_dir
        self.tokenizer_dir = tokenizer_dir
        self.extra = extra
        self.requests = signals.Requests([run.output_dir, out_dir])
        self.engine: TrainingEngine | None = None
        self.recorder: Recorder | None = None
        self.saver: Saver | None = None
        self.timing = Timing(stage.name, background=run.checkpoint.async_save)
        self._ahead: tuple[int, list[Batch]] | None = None
        """First sample and micro-batches of a step that has not begun."""

    def open(self, tensorboard_dir: Path, log: Callable[[str], None] | None) -> None:
        """Build the engine, continue from a checkpoint if there is one, and open the logs."""
        PULSE.begin(self.stage.name, train_iters=self.config.train_iters)
        reset_peak_memory()
        self.saver = Saver(self.out_dir / fmt.CHECKPOINTS, self.run.checkpoint)
        self.engine = TrainingEngine(self.stage, self.config, self.run.parallel)
        self.step_times = StepTimes(self.engine.own_time)
        self.state = TrainState(
            stage=self.stage.name, seed=self.run.data.seed, layout=self._layout()
        )
        resumed = self.saver.committed
        elsewhere = ""
        if resumed is not None:
            PULSE.note("load")
            stored = load_training(
                resumed, self.engine, model_config=self.stage.model_config, stage=self.stage.name
            )
            if stored.seed != self.run.data.seed:
                raise ConfigError(
                    f"data.seed={self.run.data.seed}, but {resumed} was trained with "
                    f"data.seed={stored.seed}: the samples after "
                    f"{stored.samples} would be others than in the run it continues; set it back, "
                    "or use another output_dir"
                )
            elsewhere = self._what_changed(stored.layout)
            self.state = replace(stored, layout=self._layout())
            PULSE.iteration = stored.step
        self.recorder = Recorder(
            stage=self.stage.name,
            train_iters=self.config.train_iters,
            step=self.state.step,
            first=groups.rank() == 0,
            out_dir=self.out_dir,
            tensorboard_dir=tensorboard_dir,
            log=log,
            workload=Workload(
                self.stage.flops_per_token(self.config.seq_length),
                groups.world_size(),
                peak_flops(),
            ),
            skipped_steps=self.state.skipped_steps,
        )
        self.saver.note = self.recorder.note
        if resumed is not None:
            self.recorder.note(
                f"resumed from {resumed} at iter "
                f"{self.state.step}/{self.config.train_iters}{elsewhere}"
            )
        if groups.rank() == 0:  # which also has made the folder
            self._warn_of_small_disk()

    def _warn_of_small_disk(self) -> None:
        """Say at the start, not hours later, when the disk cannot hold the next two saves (weights
        and 12 bytes of state per weight)."""
        assert self.engine is not None and self.recorder is not None
        local = sum(
            math.prod(entry.shape) * (entry.parameter.element_size() + 12)
            for entry in self.engine.template
        )
        parallel = self.run.parallel  # context-parallel processes hold the same weights
        parts = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
        needed = 2 * local * parts
        free = shutil.disk_usage(self.out_dir).free
        if free < needed:
            self.recorder.note(
                f"warning: two checkpoints need about {needed / 2**30:.1f} GiB, "
                f"{self.out_dir} has {free / 2**30:.1f} GiB free"
            )

    def run_to_end(
        self,
        on_step: Callable[[StepRecord], None] | None,
        evaluate: Callable[[int], Mapping[str, float]] | None,
    ) -> Path:
        """The loop itself."""
        assert self.engine is not None and self.recorder is not None and self.saver is not None
        config = self.config
        sums = MetricSums()
        self.stage.train()
        while self.state.step < config.train_iters:
            start = time.perf_counter()
            record, metrics = self._one_step()
            self._note_step(record, time.perf_counter() - start)
            if not record.skipped:
                sums.add(metrics)
            step = record.step
            last = record.step == config.train_iters
            if step % config.log_interval == 0 or last:
                values = sums.take(groups.all_reduce_mean)
                values = {
                    tag: value
                    for part in groups.gather_over_pipeline(values)
                    for tag, value in part.items()
                }
                record = replace(record, metrics=values)
                times, slow = self.step_times.compare(self.recorder.interval_steps(step))
                memory = max(groups.gather_numbers(memory_gib()))
                self.recorder.interval(
                    record, {**values, **times}, self.state.tokens, memory=memory, slow=named(slow)
                )
            if on_step is not None:
                on_step(record)
            pause = time.perf_counter()
            if evaluate is not None and (
                last or (config.eval_interval and step % config.eval_interval == 0)
            ):
                self.recorder.points(step, self._evaluated(evaluate, step))
                self.timing.evaluation(time.perf_counter() - pause)
            wish = self.requests.poll()
            if last or wish != signals.GO_ON or step % config.save_interval == 0:
                with PULSE.doing("save"):
                    self._save(wait=last or wish == signals.LEAVE)
            else:
                self.saver.edge()
            self._note_saves()
            self.recorder.exclude(time.perf_counter() - pause)
            # on the last step too: the steps after this stage are for the next start
            if wish == signals.LEAVE:
                raise SavedAndRequeue(
                    f"stage {self.stage.name} stopped at iter {step}/{config.train_iters} on "
                    f"{self.requests.reason or 'request'} and saved "
                    f"{self.saver.committed}; start the same command again to continue"
                )
        assert self.saver.committed is not None
        return self.saver.committed

    def _one_step(self) -> tuple[StepRecord, dict[str, Tensor]]:
        """One optimizer step: forward, backward, checks, update, bookkeeping."""
        assert self.engine is not None and self.recorder is not None
        step = self.state.step + 1
        lr = lr_at(self.state.step, self.config)
        loss_tensor, metrics = forward_backward(self.engine, self._batches())
        self._read_ahead()
        PULSE.note("reduce")
        arriving = OnItsWay(groups.sum_over_pipeline(groups.all_reduce_mean(loss_tensor.double())))
        samples = self.config.global_batch_size
        tokens = samples * self.config.seq_length
        PULSE.note("update")
        try:
            # waits for the norm, while the device is at the update
            grad_norm = self.engine.apply(lr)
        except RefusedUpdate as error:
            loss = arriving.value()
            what = str(error) if math.isfinite(loss) else f"the loss is {loss}"
            if self.state.skipped_in_row >= self.run.guard.max_skipped_steps:
                raise self._diverged(step, what, metrics) from error
            self._say_skipped(step, what, metrics)
            self.state = self.state.skip(samples=samples, tokens=tokens, lr=lr)
            return self.recorder.step(
                step, loss=loss, grad_norm=math.nan, lr=lr, tokens=tokens, skipped=True
            ), metrics
        except DivergedError as error:
            raise self._diverged(step, str(error), metrics) from error
        loss = arriving.value()
        assert math.isfinite(loss), "a loss that is not finite makes the gradient norm so too"
        self.state = self.state.advance(samples=samples, tokens=tokens, loss=loss, lr=lr)
        return self.recorder.step(
            step, loss=loss, grad_norm=grad_norm, lr=lr, tokens=tokens
        ), metrics

    def _note_step(self, record: StepRecord, seconds: float) -> None:
        """Tell the heartbeat and the timing of a step that took `seconds`."""
        if PULSE.warm:  # the first one also compiles and connects
            self.timing.step(seconds)
        PULSE.finish_step(
            record.step,
            loss=None if record.skipped else record.loss,
            tokens_per_second=round(record.tokens_per_second, 1),
            eta_seconds=round(record.eta_seconds, 1),
            skipped_steps=self.state.skipped_steps,
        )

    def _note_saves(self) -> None:
        """Tell them of a save that was committed since the last call."""
        assert self.saver is not None
        if self.saver.seconds is None:
            return
        self.timing.save(self.saver.seconds)
        self.saver.seconds = None
        figures = self.timing.figures()
        del figures["margin_seconds"]
        PULSE.facts = {
            **PULSE.facts,
            "last_save": str(self.saver.committed),
            "last_save_time": round(time.time(), 1),
            **figures,
        }
        if groups.rank() == 0:
            self.timing.write(self.run.output_dir)

    def _what_changed(self, stored: Mapping[str, int]) -> str:
        """Of the layout since the checkpoint was written, and what became of the global batch;
        empty when nothing did."""
        now = self._layout()
        num_micro_batches = self.config.num_micro_batches(groups.data_size())
        changed = [
            f"{axis} {stored[axis]} -> {size}"
            for axis, size in now.items()
            if axis in stored and stored[axis] != size
        ]
        if not changed:
            return ""
        return (
            f" on another layout ({', '.join(changed)}); the global batch stays "
            f"{self.config.global_batch_size}: {num_micro_batches} "
            f"micro-batch{'es' if num_micro_batches > 1 else ''} of {self.config.micro_batch_size} "
            "per process and step"
        )

    def _batches(self) -> list[Batch]:
        """Of this step."""
        first = self.state.samples
        if self._ahead is None or self._ahead[0] != first:
            self._ahead = (first, self._read(first))
        (_, batches) = self._ahead
        self._ahead = None
        return batches

    def _read_ahead(self) -> None:
        """The micro-batches of the next step, while the device is at this one's."""
        if self.state.step + 1 < self.config.train_iters:
            first = self.state.samples + self.config.global_batch_size
            self._ahead = (first, self._read(first))

    def _read(self, first_sample: int) -> list[Batch]:
        PULSE.note("data")
        return step_batches(
            self.data, self.config, first_sample, separate=self.run.data.separate_documents
        )

    def _samples_of_step(self) -> str:
        """Those of the step that is being done."""
        return f"{self.state.samples} to {self.state.samples + self.config.global_batch_size - 1}"

    def _say_skipped(self, step: int, what: str, metrics: Mapping[str, Tensor]) -> None:
        assert self.recorder is not None
        self.recorder.note(
            f"skipped iter {step}/{self.config.train_iters}: {what}{_not_finite(metrics)}; "
            "nothing was updated, samples "
            f"{self._samples_of_step()} are left out ({self.state.skipped_in_row + 1} in a row, "
            f"guard.max_skipped_steps={self.run.guard.max_skipped_steps})"
        )

    def _diverged(self, step: int, what: str, metrics: Mapping[str, Tensor]) -> DivergedError:
        skipped = self.state.skipped_in_row
        again = (
            f", after {skipped} skipped step{'s' if skipped > 1 else ''} in a row"
            if skipped
            else ""
        )
        assert self.saver is not None
        self.saver.settle_before_fault()
        kept = (
            f"the last checkpoint is {self.saver.committed}"
            if self.saver.committed
            else "there is no checkpoint yet"
        )
        return DivergedError(
            f"stage {self.stage.name} diverged at iter {step}: "
            f"{what}{_not_finite(metrics)}{again}. Samples {self._samples_of_step()}, "
            f"learning rate {lr_at(step - 1, self.config):.3g}; weights were not changed by this "
            f"step and {kept}. "
            f"Lower {self.stage.name}.lr or clip_grad, or look at these samples"
        )

    def _evaluated(
        self, evaluate: Callable[[int], Mapping[str, float]], step: int
    ) -> Mapping[str, float]:
        assert self.engine is not None
        self.stage.eval()
        try:
            with torch.no_grad(), PULSE.doing("evaluate"):
                self.engine.make_room()
                return evaluate(step)
        finally:
            self.stage.train()

    def _save(self, *, wait: bool) -> None:
        """Save the present state; with `wait` it is committed on return, whatever
        checkpoint.async_save says."""
        assert self.engine is not None and self.saver is not None and self.recorder is not None
        self.recorder.flush()
        self.state = replace(self.state, adam_step=self.engine.adam_step())
        self.saver.save(
            self.engine,
            self.state,
            wait=wait,
            model_config=self.stage.model_config,
            kind=self.stage.name,
            config_yaml=yaml.safe_dump(self.run.model_dump(mode="json"), sort_keys=False),
            tokenizer_dir=self.tokenizer_dir,
            extra=self.extra,
        )

    def _layout(self) -> dict[str, int]:
        parallel = self.run.parallel
        return {
            "world": groups.world_size(),
            "data": groups.data_size(),
            "tensor": parallel.tensor_model_parallel_size,
            "pipeline": parallel.pipeline_model_parallel_size,
            "context": parallel.context_parallel_size,
            "zero_stage": parallel.zero_stage,
        }

    def close(self) -> None:
        """Close logs and engine; a save that is neither committed nor failed is removed."""
        if self.saver is not None:
            self.saver.close()
        if self.recorder is not None:
            self.recorder.close()
        if self.engine is not None:
            self.engine.close()
