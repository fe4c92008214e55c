"""The loop trains, saves, continues bit for bit, and ends with the right exception.

One file, because every test drives the same loop with the same toy stage."""

import os
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch

from megatron_hypenet.checkpoint import format as fmt
from megatron_hypenet.checkpoint.load import read_manifest, read_weights, verify_files
from megatron_hypenet.checkpoint.state import TrainState
from megatron_hypenet.config.schema import ParallelConfig
from megatron_hypenet.errors import (
    CheckpointError,
    ConfigError,
    DivergedError,
    LayoutError,
    SavedAndRequeue,
)
from megatron_hypenet.parallel import groups
from megatron_hypenet.supervision import signals
from megatron_hypenet.training import loop
from tests.losses import read_losses
from tests.unit.engine.toy import VOCAB, ToyData, ToyStage, run_config, stage_config
from tests.unit.training.trackers.test_tensorboard import scalars


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    groups.init_parallel(ParallelConfig())
    monkeypatch.setattr(signals, "_FILE_CHECK_SECONDS", 0.0)
    monkeypatch.setattr(
        loop,
        "train",
        lambda *a, _train=loop.train, **k: _train(*a, **{"log": lambda text: None, **k}),
    )


class Interrupted(Exception):
    """Stands for a crash."""


def crash_after(step):
    def on_step(record):
        if record.step == step:
            raise Interrupted

    return on_step


def test_trains_saves_and_returns_at_once_when_done(tmp_path):
    records, lines = [], []
    final = loop.train(
        ToyStage(),
        ToyData(),
        stage_config(),
        run_config(tmp_path),
        tmp_path / "a",
        on_step=records.append,
        log=lines.append,
    )
    assert (
        final == tmp_path / "a" / "checkpoints" / "iter_0000006"
        and verify_files(final, hashes=True).stage == "align"
    )
    assert [record.step for record in records] == [1, 2, 3, 4, 5, 6]
    assert records[-1].loss < records[0].loss
    assert (
        records[1].metrics["align-layers/00"] == pytest.approx(records[0].loss + records[1].loss)
        and records[0].metrics == {}
    )
    assert [line.split(" | ")[0] for line in lines if line.startswith("iter")] == [
        "iter 2/6",
        "iter 4/6",
        "iter 6/6",
    ]
    assert [record["loss"] for record in read_losses(tmp_path / "a" / "losses.jsonl")] == [
        record.loss for record in records
    ]
    assert (
        loop.train(
            ToyStage(),
            ToyData(),
            stage_config(),
            run_config(tmp_path),
            tmp_path / "a",
            on_step=pytest.fail,
        )
        == final
    )


def test_a_finished_stage_whose_last_save_has_changed_is_not_finished(tmp_path):
    def train():
        return loop.train(
            ToyStage(), ToyData(), stage_config(), run_config(tmp_path), tmp_path / "a"
        )

    final = train()
    want = read_weights(final)
    losses = (tmp_path / "a" / "losses.jsonl").read_text()
    data = next((final / "weights").glob("*.distcp"))
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(
        CheckpointError, match="iter_0000006 is damaged: 1 of its files .*sha256 differs"
    ):
        train()
    # as a power cut leaves it: the missing steps are done again from the older save
    for file in final.rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    assert train() == final
    got = read_weights(final)
    assert (
        all(torch.equal(want[name], got[name]) for name in want)
        and (tmp_path / "a" / "losses.jsonl").read_text() == losses
    )


def test_the_next_step_is_read_while_the_device_is_busy_and_nothing_twice(tmp_path):
    events = []

    class Watched(ToyData):
        def batch(self, sample_start, count, seq_length):
            events.append(sample_start)
            return super().batch(sample_start, count, seq_length)

    def note(record):
        events.append(f"step {record.step}")

    loop.train(
        ToyStage(),
        Watched(),
        stage_config(train_iters=3),
        run_config(tmp_path),
        tmp_path / "a",
        on_step=note,
    )
    assert events == [0, 2, 4, 6, "step 1", 8, 10, "step 2", "step 3"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_continues_bit_for_bit_after_a_crash(tmp_path, zero_stage, dtype):
    config = stage_config(weight_decay=0.1)
    run = run_config(tmp_path, zero_stage=zero_stage)
    straight = loop.train(ToyStage(dtype), ToyData(), config, run, tmp_path / "a")
    with pytest.raises(Interrupted):
        loop.train(ToyStage(dtype), ToyData(), config, run, tmp_path / "b", on_step=crash_after(5))
    resumed = loop.train(ToyStage(dtype), ToyData(), config, run, tmp_path / "b")
    assert (tmp_path / "a" / "losses.jsonl").read_text() == (
        tmp_path / "b" / "losses.jsonl"
    ).read_text()
    want, got = read_weights(straight), read_weights(resumed)
    assert all(torch.equal(want[name], got[name]) for name in want)


def test_falls_back_to_the_save_before_a_damaged_one(tmp_path):
    config = stage_config(save_interval=2)
    run = run_config(tmp_path)
    straight = loop.train(ToyStage(), ToyData(), config, run, tmp_path / "a")
    with pytest.raises(Interrupted):
        loop.train(ToyStage(), ToyData(), config, run, tmp_path / "b", on_step=crash_after(5))
    newest = tmp_path / "b" / "checkpoints" / "iter_0000004"
    next(newest.rglob("*.distcp")).unlink()
    (tmp_path / "b" / "checkpoints" / ".iter_0000009.tmp-1").mkdir()
    resumed = loop.train(ToyStage(), ToyData(), config, run, tmp_path / "b")
    want, got = read_weights(straight), read_weights(resumed)
    assert all(torch.equal(want[name], got[name]) for name in want)
    assert not list((tmp_path / "b" / "checkpoints").glob(".*"))


def test_retention_follows_the_config(tmp_path):
    run = run_config(tmp_path, checkpoint={"keep_last": 1, "keep_every": 4})
    loop.train(ToyStage(), ToyData(), stage_config(save_interval=1), run, tmp_path / "a")
    assert [
        fmt.iteration_of(folder) for folder in fmt.iteration_folders(tmp_path / "a" / "checkpoints")
    ] == [4, 6]


@pytest.mark.parametrize("gradient", [False, True])
def test_divergence_names_step_layer_and_samples_and_saves_nothing(tmp_path, gradient):
    stage = ToyStage(poison=VOCAB - 1)
    stage.poison_gradient = gradient
    with pytest.raises(
        DivergedError,
        match=r"align diverged at iter 5: .*Samples 16 to 19.*last checkpoint is .*iter_0000003",
    ) as caught:
        loop.train(
            stage,
            ToyData(bad=17),
            stage_config(),
            run_config(tmp_path, guard={"max_skipped_steps": 0}),
            tmp_path / "a",
        )
    assert caught.value.exit_code == 7
    assert ("align-layers/00" in str(caught.value)) == (not gradient)
    assert len(read_losses(tmp_path / "a" / "losses.jsonl")) == 4
    assert [folder.name for folder in fmt.iteration_folders(tmp_path / "a" / "checkpoints")] == [
        "iter_0000003"
    ]


class BadSamples(ToyData):
    """Every sample of a range is bad."""

    def __init__(self, bad):
        self.bad_samples = bad

    def batch(self, sample_start, count, seq_length):
        samples = range(sample_start, sample_start + count)
        return torch.cat(
            [
                ToyData(at if at in self.bad_samples else None).batch(at, 1, seq_length)
                for at in samples
            ]
        )


@pytest.mark.parametrize("gradient", [False, True])
def test_bad_steps_are_skipped_said_and_counted(tmp_path, gradient):
    stage = ToyStage(poison=VOCAB - 1)
    lines = []
    records = []
    stage.poison_gradient = gradient
    run = run_config(tmp_path, guard={"max_skipped_steps": 2})
    data = BadSamples({5, *range(12, 20)})  # in steps 2, 4 and 5
    final = loop.train(
        stage, data, stage_config(), run, tmp_path / "a", log=lines.append, on_step=records.append
    )
    assert [record.skipped for record in records] == [False, True, False, True, True, False]
    said = [line for line in lines if line.startswith("skipped")]
    what = (
        "the gradient norm is not finite"
        if gradient
        else "the loss is nan; not finite here: align-layers/00, align-layers/01"
    )
    left_out = (
        "nothing was updated, samples {} are left out ({} in a row, guard.max_skipped_steps=2)"
    )
    assert said == [
        f"skipped iter {step}/6: {what}; {left_out.format(samples, in_row)}"
        for step, samples, in_row in ((2, "4 to 7", 1), (4, "12 to 15", 1), (5, "16 to 19", 2))
    ]
    assert [record["step"] for record in read_losses(tmp_path / "a" / "losses.jsonl")] == [1, 3, 6]
    state = TrainState.read(final)
    assert (
        state.step,
        state.samples,
        state.adam_step,
        state.skipped_steps,
        state.skipped_in_row,
    ) == (6, 24, 3, 3, 0)
    points = scalars(tmp_path / "a" / "tb")
    assert [value for _, value in points["train/skipped-steps"]] == [1, 2, 3] and points[
        "train/align-mse"
    ][1][1] == pytest.approx(records[2].loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_a_run_with_skipped_steps_continues_bit_for_bit(tmp_path, zero_stage, dtype):
    # steps 3, which is saved, and 4
    run = run_config(tmp_path, zero_stage=zero_stage)
    data = BadSamples({10, 13})
    straight = loop.train(
        ToyStage(dtype, poison=VOCAB - 1), data, stage_config(), run, tmp_path / "a"
    )
    with pytest.raises(Interrupted):
        loop.train(
            ToyStage(dtype, poison=VOCAB - 1),
            data,
            stage_config(),
            run,
            tmp_path / "b",
            on_step=crash_after(4),
        )
    resumed = loop.train(
        ToyStage(dtype, poison=VOCAB - 1), data, stage_config(), run, tmp_path / "b"
    )
    assert (tmp_path / "a" / "losses.jsonl").read_text() == (
        tmp_path / "b" / "losses.jsonl"
    ).read_text()
    assert TrainState.read(straight) == TrainState.read(resumed)
    want, got = read_weights(straight), read_weights(resumed)
    assert all(torch.equal(want[name], got[name]) for name in want)


def test_too_many_bad_steps_in_a_row_end_the_run_even_across_a_resume(tmp_path):
    # from step 3, which is saved
    run = run_config(tmp_path, guard={"max_skipped_steps": 2})
    data = BadSamples(range(8, 99))
    with pytest.raises(Interrupted):
        loop.train(
            ToyStage(poison=VOCAB - 1),
            data,
            stage_config(),
            run,
            tmp_path / "a",
            on_step=crash_after(3),
        )
    for _ in range(2):
        with pytest.raises(
            DivergedError,
            match=r"iter 5: the loss is nan.*, after 2 skipped steps in a row\. Samples 16 to 19",
        ):
            loop.train(ToyStage(poison=VOCAB - 1), data, stage_config(), run, tmp_path / "a")


def test_signal_saves_and_asks_to_be_requeued(tmp_path):
    def on_step(record):
        if record.step == 2:
            os.kill(os.getpid(), signal.SIGUSR2)

    with pytest.raises(SavedAndRequeue, match="iter 2/6 on SIGUSR2") as caught:
        loop.train(
            ToyStage(),
            ToyData(),
            stage_config(),
            run_config(tmp_path),
            tmp_path / "a",
            on_step=on_step,
        )
    assert caught.value.exit_code == 75
    straight = loop.train(
        ToyStage(), ToyData(), stage_config(), run_config(tmp_path), tmp_path / "b"
    )
    resumed = loop.train(
        ToyStage(), ToyData(), stage_config(), run_config(tmp_path), tmp_path / "a"
    )
    assert (tmp_path / "a" / "losses.jsonl").read_text() == (
        tmp_path / "b" / "losses.jsonl"
    ).read_text()
    assert (
        read_manifest(straight).files["weights/__0_0.distcp"]
        == read_manifest(resumed).files["weights/__0_0.distcp"]
    )


def test_request_files(tmp_path):
    def on_step(record):
        if record.step in (1, 4):
            (tmp_path / ("SAVE_NOW" if record.step == 1 else "STOP")).touch()

    with pytest.raises(SavedAndRequeue, match="STOP"):
        loop.train(
            ToyStage(),
            ToyData(),
            stage_config(),
            run_config(tmp_path, checkpoint={"keep_last": 9}),
            tmp_path / "a",
            on_step=on_step,
        )
    saved = [
        fmt.iteration_of(folder) for folder in fmt.iteration_folders(tmp_path / "a" / "checkpoints")
    ]
    assert saved == [1, 3, 4]
    with pytest.raises(SavedAndRequeue, match="stopped before stage .*STOP; .*delete it"):
        loop.train(ToyStage(), ToyData(), stage_config(), run_config(tmp_path), tmp_path / "a")


def test_evaluation_runs_in_eval_mode_at_its_interval_and_at_the_end(tmp_path):
    stage = ToyStage()
    seen = []

    def evaluate(step):
        seen.append((step, stage.training, torch.is_grad_enabled()))
        return {"eval/x": 1.0}

    loop.train(
        stage,
        ToyData(),
        stage_config(eval_interval=4),
        run_config(tmp_path),
        tmp_path / "a",
        evaluate=evaluate,
    )
    assert seen == [(4, False, False), (6, False, False)]


def test_another_data_seed_does_not_continue_a_run(tmp_path):
    with pytest.raises(Interrupted):
        loop.train(
            ToyStage(),
            ToyData(),
            stage_config(),
            run_config(tmp_path),
            tmp_path / "a",
            on_step=crash_after(4),
        )
    other = run_config(tmp_path, data={"train": ["x.txt"], "seed": 5})
    with pytest.raises(ConfigError, match="data.seed=5, but .* data.seed=1234"):
        loop.train(ToyStage(), ToyData(), stage_config(), other, tmp_path / "a")


def test_a_small_disk_is_announced_at_the_start(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    loop.train(
        ToyStage(),
        ToyData(),
        stage_config(),
        run_config(tmp_path),
        tmp_path / "a",
        log=lines.append,
    )
    assert lines[0].startswith("warning: two checkpoints need")


class Large(ToyStage):
    """Fails as torch does where memory runs out, in the third step."""

    def __init__(self):
        super().__init__()
        self.passes = 0

    def forward(self, batch):
        self.passes += 1
        if self.passes > 4:
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 64.00 MiB. GPU 0 has a total capacity of "
                "79.18 GiB"
            )
        return super().forward(batch)


def test_a_stage_that_does_not_fit_says_what_takes_less(tmp_path):
    with pytest.raises(LayoutError) as caught:
        loop.train(Large(), ToyData(), stage_config(), run_config(tmp_path), tmp_path / "a")
    said = str(caught.value)
    assert (
        "ran out of GPU memory in iteration 3/6 of align, forward-backward: CUDA out of memory"
        in said
    )
    assert (
        "align.micro_batch_size" in said
        and "hypenet plan" in said
        and "align.recompute" not in said
    )
