"""The training loop of every stage on every layout. It resumes by itself, and saves at intervals,
on request and at the end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from megatron_hypenet.checkpoint.find import finished_checkpoint
from megatron_hypenet.checkpoint.load import verify_together
from megatron_hypenet.config.schema import RunConfig, StageConfig
from megatron_hypenet.engine.async_scalar import AsyncScalar
from megatron_hypenet.engine.deepspeed.engine import RefusedUpdate
from megatron_hypenet.engine.optim import lr_at
from megatron_hypenet.errors import DivergedError, SavedAndRequeue
from megatron_hypenet.parallel import groups
from megatron_hypenet.parallel.agreement import from_first
from megatron_hypenet.stages.base import StageModule
from megatron_hypenet.supervision import signals
from megatron_hypenet.supervision.heartbeat import PROGRESS
from megatron_hypenet.training.grace_period import Timing
from megatron_hypenet.training.hooks import (
    CallbackHook,
    Hook,
    ProgressHook,
    RecordingHook,
    StepEnd,
)
from megatron_hypenet.training.metrics import StepRecord
from megatron_hypenet.training.micro_batches import StepReader, TokenSource
from megatron_hypenet.training.opening import Job, Opened, opened
from megatron_hypenet.training.schedule import forward_backward
from megatron_hypenet.training.stragglers import StepTimes
from megatron_hypenet.training.trackers.base import Tracker
from megatron_hypenet.training.trackers.tensorboard import TensorBoard


def train(
    stage: StageModule,
    data: TokenSource,
    config: StageConfig,
    run: RunConfig,
    out_dir: Path | str,
    *,
    trackers: Callable[[int], Sequence[Tracker]] | None = None,
    tokenizer_dir: Path | None = None,
    extra: dict[str, Any] | None = None,
    on_step: Callable[[StepRecord], None] | None = None,
    on_pause: Callable[[str, float], None] | None = None,
    evaluate: Callable[[int], Mapping[str, float]] | None = None,
    log: Callable[[str], None] | None = None,
) -> Path:
    """Train `stage` to config.train_iters and return its final checkpoint,
    `OUT_DIR/checkpoints/iter_XXXXXXX`.

    Returns at once when that checkpoint exists and its files are verified. Otherwise it continues
    from the newest usable checkpoint; on the same layout the continuation is bit-equal. `on_step`
    is called with every step on every process, `on_pause` with "evaluate" or "save" and the seconds
    for which training paused; `evaluate` gives points of held-out quantities at its interval
    (`RunConfig.eval_every`) and after the last step. `trackers` opens what shows the points of the
    steps after the given one; without it they go to TensorBoard files in `OUT_DIR/tb`. `extra` goes
    into the manifests. Raises DivergedError
    (weights unchanged since the last good step), SavedAndRequeue after a signal or STOP file,
    LayoutError when the stage does not fit the GPU, CheckpointError.
    """
    # decided on the first process: a network file system may show the folder later on others
    done: Path | None = from_first(finished_checkpoint(Path(out_dir), config.train_iters))
    if done is not None:
        verify_together(done)
        return done
    job = Job(
        stage=stage,
        data=data,
        config=config,
        run=run,
        out_dir=Path(out_dir),
        trackers=trackers or (lambda step: [TensorBoard(Path(out_dir) / "tb", step)]),
        tokenizer_dir=tokenizer_dir,
        extra=extra or {},
        log=log,
    )
    requests = signals.Requests([run.output_dir, job.out_dir])
    signals.leave_if_stopped(f"stage {stage.name}", requests.folders)
    with opened(job, requests) as parts:
        timing = Timing(stage.name, background=run.checkpoint.async_save)
        hooks = [
            ProgressHook(timing, run.output_dir),
            RecordingHook(parts.recorder, StepTimes(parts.engine.own_time), config),
            CallbackHook(on_step, on_pause, background=run.checkpoint.async_save),
        ]
        return _Loop(job, parts, requests, hooks, evaluate).run_to_end()


class _Loop:
    """The steps of one call of `train`, on what is open."""

    def __init__(
        self,
        job: Job,
        parts: Opened,
        requests: signals.Requests,
        hooks: Sequence[Hook],
        evaluate: Callable[[int], Mapping[str, float]] | None,
    ) -> None:
        self.job = job
        self.stage = job.stage
        self.config = job.config
        self.run = job.run
        self.engine = parts.engine
        self.saver = parts.saver
        self.recorder = parts.recorder
        self.state = parts.state
        self.requests = requests
        self.hooks = hooks
        self.evaluate = evaluate
        self.reader = StepReader(job.data, job.config, separate=job.run.data.separate_documents)

    def run_to_end(self) -> Path:
        """Run the loop; returns the final checkpoint."""
        self.stage.train()
        while self.state.step < self.config.train_iters:
            end = self._step_end()
            for hook in self.hooks:
                hook.on_step_end(end)
            pause = time.perf_counter()
            self._evaluate_if_due(end)
            request = self.requests.poll()
            self._save_if_due(end, request)
            self.recorder.exclude(time.perf_counter() - pause)
            # on the last step too: the tasks after this stage are left to the next start
            if request == signals.LEAVE:
                raise SavedAndRequeue(
                    f"stage {self.stage.name} stopped at iter "
                    f"{end.step}/{self.config.train_iters} on "
                    f"{self.requests.reason or 'request'} and saved "
                    f"{self.saver.committed}; start the same command again to continue"
                )
        assert self.saver.committed is not None, "the last step was saved"
        return self.saver.committed

    def _step_end(self) -> StepEnd:
        start = time.perf_counter()
        record, metrics = self._one_step()
        return StepEnd(
            record=record,
            metrics=metrics,
            seconds=time.perf_counter() - start,
            tokens_seen=self.state.tokens,
            skipped_steps=self.state.skipped_steps,
        )

    def _one_step(self) -> tuple[StepRecord, dict[str, Tensor]]:
        """Do one optimizer step: forward, backward, checks, update, record."""
        step = self.state.step + 1
        lr = lr_at(self.state.step, self.config)
        loss_tensor, metrics = forward_backward(self.engine, self.reader.take(self.state.samples))
        if step < self.config.train_iters:  # while the device is at this step
            self.reader.read_ahead(self.state.samples + self.config.global_batch_size)
        PROGRESS.note("reduce")
        arriving = AsyncScalar(
            groups.sum_over_pipeline(groups.all_reduce_mean(loss_tensor.double()))
        )
        samples = self.config.global_batch_size
        tokens = samples * self.config.seq_length
        PROGRESS.note("update")
        try:
            # waits for the norm while the device runs the update
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

    def _evaluate_if_due(self, end: StepEnd) -> None:
        """Evaluate at the interval and after the last step, where there is something to do."""
        if self.evaluate is None or not (
            end.last or end.step % self.run.eval_every(self.config) == 0
        ):
            return
        start = time.perf_counter()
        self.stage.eval()
        try:
            with torch.no_grad(), PROGRESS.doing("evaluate"):
                self.engine.make_room()
                values = self.evaluate(end.step)
        finally:
            self.stage.train()
        for hook in self.hooks:
            hook.on_eval(end.step, values, time.perf_counter() - start)

    def _save_if_due(self, end: StepEnd, request: int) -> None:
        """Save at the interval, on request and after the last step; otherwise commit the pending
        save if all processes have written their files."""
        interval = self.config.save_interval
        if end.last or request != signals.GO_ON or end.step % interval == 0:
            with PROGRESS.doing("save"):
                self._save(wait=end.last or request == signals.LEAVE)
        else:
            self.saver.step_boundary()
        if (commit := self.saver.take_commit()) is not None:
            for hook in self.hooks:
                hook.on_save(*commit)

    def _save(self, *, wait: bool) -> None:
        """Save the current state; with `wait` it is committed on return, also under
        checkpoint.async_save."""
        self.recorder.flush()
        self.state = replace(self.state, adam_step=self.engine.adam_step())
        self.saver.save(
            self.engine,
            self.state,
            wait=wait,
            model_config=self.stage.model_config,
            kind=self.stage.name,
            config_yaml=yaml.safe_dump(self.run.model_dump(mode="json"), sort_keys=False),
            tokenizer_dir=self.job.tokenizer_dir,
            extra=dict(self.job.extra),
        )

    def _samples_of_step(self) -> str:
        """Return the samples of the current step, for messages."""
        return f"{self.state.samples} to {self.state.samples + self.config.global_batch_size - 1}"

    def _say_skipped(self, step: int, what: str, metrics: Mapping[str, Tensor]) -> None:
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
            f"Lower {self.stage.name}.lr or {self.stage.name}.clip_grad and train the stage anew "
            f"with --redo-from {self.stage.name}, or look at these samples"
        )


def _not_finite(metrics: Mapping[str, Tensor]) -> str:
    """Return text that names the metrics of this process that are not finite."""
    bad = sorted(tag for tag, value in metrics.items() if not torch.isfinite(value).all())
    return f"; not finite here: {', '.join(bad[:5])}" if bad else ""
