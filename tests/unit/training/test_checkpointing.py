"""Saves in the background: the same checkpoints as in the foreground, later; never early, never
half, never lost on the way out."""

import os
import signal
import threading

import pytest
import torch

from megatron_hypenet.checkpoint import format as fmt
from megatron_hypenet.checkpoint import shard_writer
from megatron_hypenet.checkpoint.load import read_manifest, verify_files
from megatron_hypenet.config.schema import ParallelConfig
from megatron_hypenet.errors import DivergedError, SavedAndRequeue, SetupError
from megatron_hypenet.parallel import groups
from megatron_hypenet.training import loop
from tests.unit.engine.toy import VOCAB, ToyData, ToyStage, run_config, stage_config

BACKGROUND = {"checkpoint": {"async_save": True, "keep_last": 9}}


@pytest.fixture(autouse=True)
def one_process():
    groups.init_parallel(ParallelConfig())


@pytest.fixture
def gate(monkeypatch):
    """Make the writers of a save wait until it is set."""
    event = threading.Event()
    write = shard_writer.ShardWrite.write

    def slow(self, **options):
        assert event.wait(30)
        return write(self, **options)

    monkeypatch.setattr(shard_writer.ShardWrite, "write", slow)
    yield event
    event.set()


def train(out, lines, *, stage=None, data=None, on_step=None, config=None, **changes):
    run = run_config(out, **(BACKGROUND | changes))
    return loop.train(
        stage or ToyStage(),
        data or ToyData(),
        config or stage_config(),
        run,
        out,
        on_step=on_step,
        log=lines.append,
    )


def saves(out):
    return [fmt.iteration_of(folder) for folder in fmt.iteration_folders(out / "checkpoints")]


def test_background_saves_hold_the_same_bytes(tmp_path):
    lines = []
    train(tmp_path / "a", lines)
    train(tmp_path / "b", [], checkpoint={"keep_last": 9})
    assert saves(tmp_path / "a") == saves(tmp_path / "b") == [3, 6]
    for step in ("iter_0000003", "iter_0000006"):
        one, other = (
            verify_files(tmp_path / name / "checkpoints" / step, hashes=True) for name in "ab"
        )
        # config.yaml names the run's folder and how it saves
        assert {k: v for k, v in one.files.items() if k != "config.yaml"} == {
            k: v for k, v in other.files.items() if k != "config.yaml"
        }
    said = [
        line.split()[0] + " " + line.split()[1].split("/")[-1].rstrip(":")
        for line in lines
        if line.startswith(("requested", "saved"))
    ]
    # the last one is waited for
    assert said == ["requested iter_0000003", "saved iter_0000003", "saved iter_0000006"]


def test_training_goes_on_and_the_commit_comes_at_a_later_edge(tmp_path, gate):
    seen = {}

    def on_step(record):
        seen[record.step] = saves(tmp_path)
        if record.step == 5:
            gate.set()
            next(t for t in threading.enumerate() if t.name == "save-iter_0000003").join()

    train(tmp_path, [], on_step=on_step, config=stage_config(train_iters=7))
    assert seen == {1: [], 2: [], 3: [], 4: [], 5: [], 6: [3], 7: [3]}
    assert saves(tmp_path) == [3, 6, 7]


def test_the_next_save_waits_for_the_one_before(tmp_path, gate):
    threading.Timer(0.5, gate.set).start()
    train(tmp_path, [], config=stage_config(save_interval=1, train_iters=3))
    assert saves(tmp_path) == [1, 2, 3]


def test_pruning_waits_for_the_commit(tmp_path, gate):
    gate.set()
    seen = {}

    def on_step(record):
        if record.step == 3:  # or its writer could meet the closed gate
            [
                writer.join()
                for writer in threading.enumerate()
                if writer.name == "save-iter_0000002"
            ]
        if record.step == 4:
            gate.clear()  # holds the save of step 4
        if record.step == 6:
            seen["before"] = saves(tmp_path)
            gate.set()

    train(
        tmp_path,
        [],
        on_step=on_step,
        config=stage_config(save_interval=2),
        checkpoint={"async_save": True, "keep_last": 1},
    )
    assert seen["before"] == [2] and saves(tmp_path) == [6]


def test_a_signal_is_answered_with_committed_saves(tmp_path):
    def on_step(record):
        if record.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SavedAndRequeue, match="iter 4/6 on SIGTERM and saved .*iter_0000004"):
        train(tmp_path, [], on_step=on_step)
    assert saves(tmp_path) == [3, 4] and not list((tmp_path / "checkpoints").glob(".*"))


def test_full_disk_in_the_background_is_raised_at_an_edge(tmp_path, monkeypatch):
    write = shard_writer.ShardWrite.write
    steps = []

    def full(self, **options):
        if "iter_0000004" in str(self.folder):
            raise OSError(28, "No space left on device")
        return write(self, **options)

    monkeypatch.setattr(shard_writer.ShardWrite, "write", full)
    with pytest.raises(
        SetupError,
        match="cannot save .*iter_0000004: no space left.*older checkpoints are untouched",
    ):
        train(
            tmp_path,
            [],
            on_step=lambda record: steps.append(record.step),
            config=stage_config(save_interval=2),
        )
    assert steps[-1] in (5, 6)
    assert saves(tmp_path) == [2] and not list((tmp_path / "checkpoints").glob(".*"))
    verify_files(tmp_path / "checkpoints" / "iter_0000002", hashes=True)


def test_a_crash_removes_the_pending_save(tmp_path, gate):
    def on_step(record):
        if record.step == 4:
            threading.Timer(0.2, gate.set).start()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(tmp_path, [], on_step=on_step)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_divergence_keeps_the_pending_save(tmp_path, gate):
    threading.Timer(0.5, gate.set).start()
    with pytest.raises(DivergedError, match="the last checkpoint is .*iter_0000004"):
        poisoned = ToyStage(poison=VOCAB - 1)
        never_skip = {"max_skipped_steps": 0}
        train(
            tmp_path,
            [],
            stage=poisoned,
            data=ToyData(bad=17),
            config=stage_config(save_interval=4),
            guard=never_skip,
        )
    assert read_manifest(tmp_path / "checkpoints" / "iter_0000004").stage == "align"


def test_a_background_run_continues_bit_for_bit(tmp_path):
    def crash(record):
        if record.step == 5:
            raise ZeroDivisionError

    config = stage_config(save_interval=1)
    straight = train(tmp_path / "a", [], config=config)
    with pytest.raises(ZeroDivisionError):
        train(tmp_path / "b", [], config=config, on_step=crash)
    assert saves(tmp_path / "b") in ([1, 2, 3], [1, 2, 3, 4])
    resumed = train(tmp_path / "b", [], config=config)
    assert (tmp_path / "a" / "losses.jsonl").read_text() == (
        tmp_path / "b" / "losses.jsonl"
    ).read_text()
    one, other = (read_manifest(folder).files for folder in (straight, resumed))
    assert [name for name in one if one[name] != other[name]] in ([], ["config.yaml"])
    assert torch.is_grad_enabled()
