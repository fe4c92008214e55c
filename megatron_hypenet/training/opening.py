"""Build everything that a training loop needs before it runs: the engine, the state to continue
from, the checkpoints and the reports. They are closed together, however the loop ends."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_hypenet.byte_sizes import size_text
from megatron_hypenet.checkpoint import format as fmt
from megatron_hypenet.checkpoint.load import load_training
from megatron_hypenet.checkpoint.state import TrainState
from megatron_hypenet.config.schema import RunConfig, StageConfig
from megatron_hypenet.engine.deepspeed.engine import TrainingEngine
from megatron_hypenet.errors import ConfigError
from megatron_hypenet.parallel import groups
from megatron_hypenet.stages.base import StageModule
from megatron_hypenet.stages.spec import stage_spec
from megatron_hypenet.supervision.faults import out_of_gpu_memory, record_now
from megatron_hypenet.supervision.heartbeat import PROGRESS
from megatron_hypenet.supervision.signals import Requests
from megatron_hypenet.training.checkpointing import Saver
from megatron_hypenet.training.metrics import Recorder, reset_peak_memory
from megatron_hypenet.training.micro_batches import TokenSource
from megatron_hypenet.training.throughput import Workload, peak_flops
from megatron_hypenet.training.trackers.base import Tracker

CHUNKS = "virtual_pipeline"
"""The axis of a recorded layout that is there only where it is above 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """The task of a training loop: a stage, its data, and the places of its results."""

    stage: StageModule
    data: TokenSource
    config: StageConfig
    run: RunConfig
    out_dir: Path
    trackers: Callable[[int], Sequence[Tracker]]
    """Opens what shows the points of the steps after the given one; called on the first process."""
    tokenizer_dir: Path | None
    extra: Mapping[str, Any]
    """Entries for the manifests of its checkpoints."""
    log: Callable[[str], None] | None
    """Called with the log's lines on the first process; None prints them to stderr."""

    @property
    def layout(self) -> dict[str, int]:
        """Return the number of processes per axis, as a checkpoint records them."""
        parallel = self.run.parallel
        chunks = parallel.virtual_pipeline_model_parallel_size
        return {
            "world": groups.world_size(),
            "data": groups.data_size(),
            "tensor": parallel.tensor_model_parallel_size,
            "pipeline": parallel.pipeline_model_parallel_size,
            **({CHUNKS: chunks} if parallel.interleaved else {}),
            "context": parallel.context_parallel_size,
            "zero_stage": parallel.zero_stage,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Opened:
    """The objects with which a training loop runs."""

    engine: TrainingEngine
    saver: Saver
    recorder: Recorder
    state: TrainState
    """The state in which training begins: a new one, or that of the newest checkpoint."""


@contextmanager
def opened(job: Job, requests: Requests) -> Iterator[Opened]:
    """Build the engine, load the newest checkpoint and open the logs for the block, in which
    signals are `requests`; collective.

    A fault in building or inside the block is recorded before anything is closed, because the other
    processes will fail as a consequence; an error of full GPU memory is raised as LayoutError. A
    save that is neither committed nor failed is removed."""
    with ExitStack() as closing:
        try:
            with requests:
                yield _open(job, closing)
        except BaseException as fault:
            translated = out_of_gpu_memory(fault, job.config) or fault
            record_now(translated)
            if translated is fault:
                raise
            raise translated from fault


def _open(job: Job, closing: ExitStack) -> Opened:
    PROGRESS.begin(job.stage.name, train_iters=job.config.train_iters)
    reset_peak_memory()
    saver = Saver(job.out_dir / fmt.CHECKPOINTS, job.run.checkpoint)
    closing.callback(saver.close)
    engine = TrainingEngine(job.stage, job.config, job.run.parallel)
    closing.callback(engine.close)
    state = TrainState(stage=job.stage.name, seed=job.run.data.seed, layout=job.layout)
    resumed = ""
    if saver.committed is not None:
        PROGRESS.note("load")
        stored = _load(job, engine, saver.committed)
        state = replace(stored, layout=job.layout)
        PROGRESS.iteration = stored.step
        resumed = (
            f"resumed from {saver.committed} at iter {state.step}/{job.config.train_iters}"
            f"{_what_changed(job, stored.layout)}"
        )
    recorder = _recorder(job, state)
    closing.callback(recorder.close)
    saver.note = recorder.note
    if resumed:
        recorder.note(resumed)
    if groups.rank() == 0:  # which also has made the folder
        _warn_of_small_disk(job, engine, recorder)
    return Opened(engine=engine, saver=saver, recorder=recorder, state=state)


def _load(job: Job, engine: TrainingEngine, checkpoint: Path) -> TrainState:
    """Load the checkpoint into the engine; ConfigError when the run would continue with other
    samples."""
    stored = load_training(
        checkpoint, engine, model_config=job.stage.model_config, stage=job.stage.name
    )
    if stored.seed != job.run.data.seed:
        raise ConfigError(
            f"data.seed={job.run.data.seed}, but {checkpoint} was trained with "
            f"data.seed={stored.seed}: the samples after "
            f"{stored.samples} would be others than in the run it continues; set it back, "
            "or use another output_dir"
        )
    return stored


def _recorder(job: Job, state: TrainState) -> Recorder:
    first = groups.rank() == 0
    return Recorder(
        stage=job.stage.name,
        loss=stage_spec(job.stage.name).loss(job.config),
        train_iters=job.config.train_iters,
        step=state.step,
        first=first,
        out_dir=job.out_dir,
        trackers=job.trackers(state.step) if first else (),
        log=job.log,
        workload=Workload(
            job.stage.flops_per_token(job.config),
            groups.world_size(),
            peak_flops(),
            job.stage.fp8_flops_per_token(job.config),
        ),
        skipped_steps=state.skipped_steps,
    )


def _warn_of_small_disk(job: Job, engine: TrainingEngine, recorder: Recorder) -> None:
    """Warn at the start, not hours later, when the disk cannot hold the next two saves (weights and
    12 bytes of state per weight)."""
    local = sum(
        math.prod(entry.shape) * (entry.parameter.element_size() + 12) for entry in engine.template
    )
    parallel = job.run.parallel  # context-parallel processes hold the same weights
    parts = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    needed = 2 * local * parts
    free = shutil.disk_usage(job.out_dir).free
    if free < needed:
        recorder.note(
            f"warning: two checkpoints need about {size_text(needed)}, "
            f"{job.out_dir} has {size_text(free)} free"
        )


def _what_changed(job: Job, stored: Mapping[str, int]) -> str:
    """Say how the layout differs from that of the checkpoint, and what becomes of the global batch;
    empty when it does not differ."""
    now = job.layout
    if CHUNKS in {**stored, **now}:
        stored, now = ({CHUNKS: 1, **sizes} for sizes in (stored, now))
    num_micro_batches = job.config.num_micro_batches(groups.data_size())
    changed = [
        f"{axis} {stored[axis]} -> {size}"
        for axis, size in now.items()
        if axis in stored and stored[axis] != size
    ]
    if not changed:
        return ""
    return (
        f" on another layout ({', '.join(changed)}); the global batch stays "
        f"{job.config.global_batch_size}: {num_micro_batches} "
        f"micro-batch{'es' if num_micro_batches > 1 else ''} of {job.config.micro_batch_size} "
        "per process and step"
    )
