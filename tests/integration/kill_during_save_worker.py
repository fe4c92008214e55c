"""Kills saving processes with SIGKILL, many of them: imports once, forks one child per attempt,
looks at what each leaves.

    python -m tests.integration.kill_during_save_worker FOLDER
        [--writer-kills N] [--training-kills N] [--seed S]
points: at every file operation of one save in turn. writer: at random moments of a process that
does nothing but save. training: at random moments of a real run's saves, which then goes on to its
end. Each with saves in the foreground and in the background; prints one JSON object, {mode-kind:
counts}.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn

from megatron_hypenet.checkpoint import format as fmt
from megatron_hypenet.checkpoint.load import (
    load_training,
    newest_of_run,
    read_weights,
    verify_files,
)
from megatron_hypenet.checkpoint.state import Template, TrainState
from megatron_hypenet.config.schema import CheckpointConfig
from megatron_hypenet.training.checkpointing import Saver
from tests.integration import training_worker
from tests.tiny import tiny_model_config

MODEL = tiny_model_config()


class Module(nn.Module):
    """Four matrices of `rows` x 256."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.zeros(rows, 256)) for _ in range(4)])

    def sharded_state_dict(self, prefix=""):
        from megatron.core.dist_checkpointing.mapping import ShardedTensor

        return {
            f"w{at}": ShardedTensor.from_rank_offsets(f"w{at}", weight)
            for at, weight in enumerate(self.weights)
        }


class Engine:
    """An EngineState whose every number is the step."""

    data_rank = 0
    data_size = 1

    def __init__(self, rows: int) -> None:
        self.module = Module(rows)
        self.template = Template(self.module)
        self.step = 0
        self.loaded: set[float] = set()

    def go_to(self, step: int) -> None:
        self.step = step
        for weight in self.module.weights:
            weight.data.fill_(step)

    def gathered(self, parameter):
        return nullcontext()

    def full_state(self, parameter, name):
        return torch.full_like(parameter, self.step)

    def set_full_state(self, parameter, name, value):
        self.loaded |= set(value.unique().tolist())

    def set_weight(self, parameter, value):
        self.loaded |= set(value.unique().tolist())

    def init_optimizer_state(self, adam_step):
        pass

    def adam_step(self):
        return self.step


def save_forever(
    folder: Path, last_commit: Path, *, background: bool, rows: int, last: int
) -> None:
    """Continue from the newest save and save every step up to `last`; each commit is then noted
    in a file of its own."""
    saver = Saver(folder, CheckpointConfig(keep_last=2, async_save=background))
    engine = Engine(rows)
    if saver.committed is not None:
        state = load_training(saver.committed, engine, model_config=MODEL, stage="finetune")
        assert engine.loaded == {float(state.step)}, (
            f"{saver.committed} holds steps {engine.loaded}"
        )
        engine.go_to(state.step)
    while engine.step < last:
        engine.go_to(engine.step + 1)
        state = TrainState(stage="finetune", step=engine.step, adam_step=engine.step)
        saver.save(engine, state, wait=engine.step == last, model_config=MODEL, kind="finetune")
        while saver.committed is None or fmt.iteration_of(saver.committed) != engine.step:
            time.sleep(0.001)
            saver.step_boundary()
        last_commit.write_text(str(engine.step))


def forked(work: Callable[[], None]) -> int:
    """Return the process id of a child that does `work` and ends with code 0."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return child


def ended(child: int, code: int = 0) -> None:
    """Wait for `child`, which has to end with `code`."""
    found = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert found == code, f"the child ended with {found}, not {code}"


def unfinished(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if ".tmp-" in name] if folder.is_dir() else []


def kill_in_a_save(child: int, folder: Path, *, skip: int, delay: float) -> bool | None:
    """Kill `child` some time after its save number `skip` + 1 has begun; whether a save was
    unfinished, None when the child had ended."""
    seen: set[str] = set()
    deadline = time.monotonic() + 60
    while len(seen) <= skip and time.monotonic() < deadline:
        seen.update(unfinished(folder))
        gone, status = os.waitpid(child, os.WNOHANG)
        if gone:
            assert os.waitstatus_to_exitcode(status) == 0, "the child failed by itself"
            return None
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL), f"the child ended with {code}"
    return bool(unfinished(folder))


def look_at(folder: Path, last_commit: Path | None, *, content: bool) -> int:
    """Check what a kill left: every visible checkpoint is whole, and the newest is not older than
    the last commit noted. Its step or 0."""
    for entry in fmt.iteration_folders(folder):
        verify_files(entry, hashes=True)
        step = float(fmt.iteration_of(entry))
        if content:
            assert all((tensor == step).all() for tensor in read_weights(entry).values()), entry
    newest = newest_of_run(folder)
    step = fmt.iteration_of(newest) if newest is not None else 0
    if newest is not None:
        verify_files(newest, hashes=True)
    committed = (
        int(last_commit.read_text() or 0)
        if last_commit is not None and last_commit.is_file()
        else 0
    )
    assert step >= committed, f"iter {committed} was committed, {step} is the newest left"
    return step


def writer(folder: Path, *, background: bool, kills: int) -> dict:
    """Kill at random a process that saves 8 MiB over and over."""
    last_commit = folder.parent / "last_commit"
    hits = 0
    tries = 0
    while hits < kills and tries < 10 * kills:
        child = forked(
            lambda: save_forever(folder, last_commit, background=background, rows=512, last=10**6)
        )
        hits += (
            kill_in_a_save(child, folder, skip=random.randrange(3), delay=random.uniform(0, 0.06))
            is True
        )
        tries += 1
        step = look_at(folder, last_commit, content=True)
    return {"kills": tries, "in_save": hits, "step": step}


def die_at(operation: int) -> Callable[[], int]:
    """Let this process kill itself before its file operation number `operation`; returns the
    counter."""
    count = -1

    def counted(function):
        def call(*arguments, **keywords):
            nonlocal count
            count += 1
            if count == operation:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **keywords)

        return call

    for name in ("replace", "rename", "fsync", "mkdir", "unlink", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))
    return lambda: count + 1


def points(folder: Path, *, background: bool, kills: int) -> dict:
    """Kill before each file operation of a save that takes the place of a damaged one and prunes an
    older one."""
    base = folder.parent / "base"
    save_forever(base, folder.parent / "base_told", background=False, rows=1, last=3)
    # damaged: the run goes back to 2 and saves 3 over it
    (base / fmt.iteration_name(3) / fmt.RNG).write_bytes(b"")
    last_commit = folder.parent / "last_commit"
    newer = 0

    def counting() -> None:
        counter = die_at(-1)
        save_forever(folder, last_commit, background=background, rows=1, last=3)
        last_commit.write_text(str(counter()))

    shutil.copytree(base, folder)
    ended(forked(counting))
    operations = int(last_commit.read_text())
    for at in range(operations):
        shutil.rmtree(folder)
        shutil.copytree(base, folder)
        last_commit.write_text("2")

        def dying(at=at) -> None:
            die_at(at)
            save_forever(folder, last_commit, background=background, rows=1, last=3)

        ended(forked(dying), -signal.SIGKILL)
        newest = newest_of_run(folder)
        verify_files(newest, hashes=True)
        step = fmt.iteration_of(newest)
        assert step >= int(last_commit.read_text()), f"operation {at}: iter {step} is left"
        newer += step == 3
        ended(forked(lambda: save_forever(folder, last_commit, background=False, rows=1, last=4)))
        assert look_at(folder, last_commit, content=True) == 4 and not list(folder.glob(".*")), (
            f"operation {at}"
        )
    return {"kills": operations, "in_save": operations, "already_committed": newer}


def training(folder: Path, *, background: bool, kills: int) -> dict:
    """Kill at random a real run that saves every step, until it has finished; an undisturbed run
    first."""
    words = ["--iters", "20", "--save-interval", "1", *(["--async-save"] if background else [])]

    def child(out: Path) -> int:
        return forked(lambda: training_worker.main(training_worker.parse([str(out), *words])))

    straight = folder.parent.parent / "straight"
    if not straight.is_dir():
        ended(child(straight))
    hits = tries = step = 0
    checkpoints = folder / "finetune" / "checkpoints"
    while hits < kills and step < 16:
        hits += (
            kill_in_a_save(
                child(folder), checkpoints, skip=random.randrange(2), delay=random.uniform(0, 0.04)
            )
            is True
        )
        tries += 1
        before = step
        step = look_at(checkpoints, None, content=False)
        assert step >= before
    ended(child(folder))
    losses = [(out / "finetune" / "losses.jsonl").read_text() for out in (straight, folder)]
    assert losses[0] == losses[1], "the killed run took another path"
    return {
        "kills": tries,
        "in_save": hits,
        "step": look_at(checkpoints, None, content=False),
        "lines": losses[0].count("\n"),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--writer-kills", type=int, default=8)
    parser.add_argument("--training-kills", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    random.seed(options.seed)
    torch.set_num_threads(1)
    counted = {}
    for kind in ("foreground", "background"):
        for mode, kills in (
            (points, 0),
            (writer, options.writer_kills),
            (training, options.training_kills),
        ):
            name = f"{mode.__name__}-{kind}"
            began = time.monotonic()
            folder = options.folder / name
            folder.mkdir(parents=True)
            counted[name] = mode(folder / "run", background=kind == "background", kills=kills)
            counted[name]["seconds"] = round(time.monotonic() - began, 1)
    print(json.dumps(counted))


if __name__ == "__main__":
    main()
