"""Run by torchrun: save known values on every layout of four processes, and read on every layout
what two others wrote.

checkpoint_worker FOLDER LAYOUTS DTYPE      LAYOUTS: JSON {name: ParallelConfig keys}; saves go to
FOLDER/<name>
"""

import json
import sys
import zlib
from pathlib import Path

import torch

from megatron_hypenet.checkpoint import shard_writer
from megatron_hypenet.checkpoint.format import OPTIMIZER_STATES
from megatron_hypenet.checkpoint.load import load_training, read_entry
from megatron_hypenet.checkpoint.save import begin_save
from megatron_hypenet.checkpoint.state import TrainState, empty_like_entry
from megatron_hypenet.engine.deepspeed.engine import TrainingEngine
from megatron_hypenet.errors import SetupError
from megatron_hypenet.model.hypenet import build_model
from megatron_hypenet.parallel import groups
from megatron_hypenet.stages.finetune import FinetuneStage
from megatron_hypenet.supervision.process_exit import exit_process
from tests.distributed.layouts import STUDENT, run_config


def known(key: str, start, shape) -> torch.Tensor:
    """Return the part at `start` of a tensor whose every element is a function of its name and of
    its place in the whole."""
    total = torch.full(tuple(shape), float(zlib.crc32(key.encode()) % 10_007), dtype=torch.float64)
    for axis, (first, size) in enumerate(zip(start, shape, strict=True)):
        view = [1] * len(shape)
        view[axis] = size
        total += (torch.arange(first, first + size) * (axis + 1.618)).view(view)
    return torch.sin(total).float()


class Known:
    """Stands where a ShardReader stands: answers with known values, cut as a layout asks for them;
    optimizer states are fp32."""

    def __init__(self, dtype):
        self.weights = dtype

    def dtype(self, key):
        return torch.float32 if key.startswith("optim.") else self.weights

    def read_into(self, requests):
        for key, start, target in requests:
            target.copy_(known(key, start, target.shape))


def wanted(entry, state=None):
    """Return this process's part of a weight or of one optimizer state."""
    dtype = entry.parameter.dtype
    empty = empty_like_entry(entry, torch.float32 if state else dtype)
    return read_entry(
        Known(dtype), entry.described(empty, prefix=f"optim.{state}" if state else "", owned=False)
    )


def engine_on(parallel: dict, folder: Path, dtype: torch.dtype):
    run = run_config(folder, parallel=parallel)
    groups.init_parallel(run.parallel, seed=1)
    stage = FinetuneStage(build_model(STUDENT, run.parallel, dtype=dtype, seed=5), chunk_tokens=7)
    return TrainingEngine(stage, run.finetune, run.parallel)


def fill(engine) -> None:
    engine.init_optimizer_state(11)
    for entry in engine.template:
        engine.set_weight(entry.parameter, wanted(entry))
        for state in OPTIMIZER_STATES:
            engine.set_full_state(entry.parameter, state, wanted(entry, state))


def check(engine, where: str) -> None:
    assert engine.adam_step() == 11, where
    for entry in engine.template:
        with engine.gathered(entry.parameter):
            assert torch.equal(entry.parameter, wanted(entry)), (
                f"{where}: weight {entry.sharded.key}"
            )
        for state in OPTIMIZER_STATES:
            assert torch.equal(engine.full_state(entry.parameter, state), wanted(entry, state)), (
                f"{where}: {state} of {entry.sharded.key}"
            )


def save(engine, folder: Path, *, background: bool):
    state = TrainState(stage="finetune", step=11, adam_step=engine.adam_step())
    return begin_save(
        folder, engine, state, model_config=STUDENT, kind="finetune", background=background
    )


def full_disk_of_one(engine, folder: Path) -> None:
    """The last process cannot write: all of them raise, nothing stays, and the process with the
    room waits for nobody."""
    write = shard_writer.ShardWrite.write

    def fail(self, **options):
        if groups.rank() == groups.world_size() - 1:
            raise OSError(28, "No space left on device")
        return write(self, **options)

    shard_writer.ShardWrite.write = fail
    try:
        for background in (False, True):
            pending = save(engine, folder / "full", background=background)
            while not pending.ready():
                pass
            try:
                pending.commit()
            except SetupError as error:
                assert "no space left" in str(error)
            else:
                raise AssertionError("a full disk of one process went unnoticed")
            groups.barrier()
            assert not list(folder.glob("*full*")) and not list(folder.glob(".*full*"))
    finally:
        shard_writer.ShardWrite.write = write


def main(folder: Path, layouts: dict, dtype: torch.dtype) -> None:
    for at, (name, parallel) in enumerate(layouts.items()):
        engine = engine_on(parallel, folder, dtype)
        fill(engine)
        pending = save(engine, folder / name, background=at % 2 == 1)
        while not pending.ready():
            pass
        pending.commit()
        if at == 0:
            full_disk_of_one(engine, folder)
        engine.close()
        groups.destroy_model_groups()
    names = list(layouts)
    for at, (name, parallel) in enumerate(layouts.items()):
        engine = engine_on(parallel, folder, dtype)
        for other in {names[at - 1], names[at - 4]}:
            for entry in engine.template:
                engine.set_weight(entry.parameter, torch.zeros(entry.shape))
            load_training(folder / other, engine, model_config=STUDENT, stage="finetune")
            check(engine, f"{other} read on {name}")
        engine.close()
        groups.destroy_model_groups()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), getattr(torch, sys.argv[3]))
    if groups.rank() == 0:
        print("all read", flush=True)
    exit_process(0)
