"""Losses are exact and rewound, points carry the tags of the table, lines read well."""

import json
import time
from dataclasses import replace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_hypenet.errors import DataError
from megatron_hypenet.training.metrics import (
    TAGS,
    LossLog,
    MetricSums,
    Recorder,
    StepRecord,
)
from megatron_hypenet.training.throughput import Workload
from tests.losses import read_losses


def test_losses_keep_every_bit_and_are_rewound(tmp_path):
    path = tmp_path / "losses.jsonl"
    log = LossLog(path, 0)
    for step in (1, 2, 3):
        log.append(step, 0.1 + 0.2, 1 / 3, 1e-3)
    log.close()
    with path.open("a") as stream:
        stream.write('{"step": 4, "lo')  # torn by a kill
    log = LossLog(path, 2)
    log.append(3, 7.0, 1.0, 1e-3)
    log.close()
    assert [(record["step"], record["loss"]) for record in read_losses(path)] == [
        (1, 0.1 + 0.2),
        (2, 0.1 + 0.2),
        (3, 7.0),
    ]


def test_points_and_lines_of_an_interval(tmp_path):
    lines = []
    recorder = Recorder(
        stage="align",
        train_iters=4,
        step=0,
        first=True,
        out_dir=tmp_path,
        tensorboard_dir=tmp_path / "tb",
        log=lines.append,
    )
    for step, loss in ((1, 2.0), (2, 4.0)):
        record = recorder.step(step, loss=loss, grad_norm=0.5, lr=1e-3, tokens=100)
    recorder.interval(record, {"align/layer_00": 1.5}, 200, memory=3.5)
    recorder.close()
    assert len(lines) == 1 and lines[0].startswith("iter 2/4 | loss 4 | gnorm 0.5 | lr 1.00e-03 | ")
    points = scalars(tmp_path / "tb")
    of_a_workload = {"tokens-per-second-per-gpu", "tflops-per-gpu", "mfu"}
    of_the_ranks = {"step-time/min-ms", "step-time/median-ms", "step-time/max-ms"}
    assert set(points) == set(TAGS) - of_a_workload - of_the_ranks | {"align/layer_00"}
    assert (
        points["loss"] == [(2, 3.0)]
        and points["tokens-seen"] == [(2, 200.0)]
        and points["align/layer_00"] == [(2, 1.5)]
    )
    assert (
        min(
            points[tag][0][1].expected
            for tag in ("memory-gib", "step-time-ms", "tokens-per-second")
        )
        > 0
    )


def next_second():
    """Wait for the next second: TensorBoard reads files by name, which has whole seconds and then a
    counter in the process, and 10 would come before 9."""
    now = int(time.time())
    while int(time.time()) == now:
        time.sleep(0.02)


def test_resume_purges_points_that_will_be_written_again(tmp_path):
    for start, value in ((0, 1.0), (2, 9.0)):
        next_second()
        recorder = Recorder(
            stage="a",
            train_iters=4,
            step=start,
            first=True,
            out_dir=tmp_path,
            tensorboard_dir=tmp_path / "tb",
            log=print,
        )
        for step in range(start + 1, 5):
            recorder.points(step, {"x": value})
        recorder.close()
    assert scalars(tmp_path / "tb")["x"] == [(1, 1.0), (2, 1.0), (3, 9.0), (4, 9.0)]


def test_points_before_a_save_outlive_a_killed_process_and_a_start_from_nothing_replaces_them(
    tmp_path,
):
    def begin(step):
        return Recorder(
            stage="a",
            train_iters=4,
            step=step,
            first=True,
            out_dir=tmp_path,
            tensorboard_dir=tmp_path / "tb",
            log=print,
        )

    killed = begin(0)
    killed.points(1, {"x": 1.0})
    killed.flush()
    assert scalars(tmp_path / "tb")["x"] == [(1, 1.0)]  # while the writer is still open
    next_second()
    again = begin(0)
    again.points(1, {"x": 9.0})
    again.close()
    assert scalars(tmp_path / "tb")["x"] == [(1, 9.0)]
    killed.close()


def test_other_ranks_write_nothing(tmp_path):
    recorder = Recorder(
        stage="a",
        train_iters=4,
        step=0,
        first=False,
        out_dir=tmp_path,
        tensorboard_dir=tmp_path / "tb",
        log=pytest.fail,
    )
    recorder.interval(
        recorder.step(1, loss=1.0, grad_norm=1.0, lr=1.0, tokens=1), {}, 1, memory=0.5
    )
    recorder.note("x")
    recorder.close()
    assert list(tmp_path.iterdir()) == []


def test_metric_sums_are_means_over_the_interval():
    sums = MetricSums()
    assert sums.take(lambda tensor: tensor) == {}
    for value in (1.0, 3.0):
        sums.add({"a": torch.tensor(value), "b": torch.tensor(2 * value)})
    assert sums.take(lambda tensor: tensor * 10) == {"a": 20.0, "b": 40.0}
    sums.add({"a": torch.tensor(5.0)})
    assert sums.take(lambda tensor: tensor) == {"a": 5.0}


def test_the_line_of_a_step():
    record = StepRecord(
        stage="a",
        step=120,
        train_iters=20000,
        loss=1.23456,
        grad_norm=0.987,
        lr=1e-3,
        tokens_per_second=1234.0,
        eta_seconds=72,
    )
    assert (
        record.line()
        == "iter 120/20000 | loss 1.235 | gnorm 0.987 | lr 1.00e-03 | 1.2k tok/s | eta 1m12s"
    )
    assert json.loads(json.dumps(record.loss)) == record.loss


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        tag: [(event.step, pytest.approx(event.value)) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_the_line_and_the_board_show_the_use_of_each_gpu(tmp_path):
    lines = []
    work = Workload(flops_per_token=13.1e9, num_devices=8, peak=989e12)
    options = {
        "stage": "finetune",
        "train_iters": 4,
        "step": 0,
        "first": True,
        "out_dir": tmp_path,
        "tensorboard_dir": tmp_path / "tb",
    }
    recorder = Recorder(**options, log=lines.append, workload=work)
    record = replace(
        recorder.step(1, loss=2.0, grad_norm=1.0, lr=1e-4, tokens=100),
        tokens_per_second=8 * 37_900.0,
    )
    recorder.interval(record, {}, 100, memory=0.5)
    recorder.close()
    assert "303.2k tok/s | 37.9k tok/s/gpu | 496 TFLOP/s/gpu | mfu 50.2%" in lines[0]
    board = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert board.Scalars("mfu")[0].value == pytest.approx(0.502, rel=1e-3)
    assert board.Scalars("tokens-per-second-per-gpu")[0].value == pytest.approx(37_900)


def test_damage_in_the_losses_is_named_and_a_torn_end_is_not_damage(tmp_path, caplog):
    path = tmp_path / "losses.jsonl"
    lines = ['{"step": %d, "loss": 1.5, "grad_norm": 0.5, "lr": 0.1}' % step for step in (1, 2, 3)]  # noqa: UP031 - braces
    for bad, word in [
        ("{", "not valid JSON"),
        ("\0\0\0", "NUL"),
        ("\udcff", "not UTF-8"),
        ("", "not valid JSON"),
        ('{"step": 2, "loss": NaN, "grad_norm": 0.5, "lr": 0.1}', "NaN"),
        ('{"step": "2", "loss": 1.5, "grad_norm": 0.5, "lr": 0.1}', "step: "),
        ('{"step": 2, "grad_norm": 0.5, "lr": 0.1}', "loss: missing"),
        (lines[0], "step 1 follows step 1"),
        ("[]", "should be an object"),
    ]:
        path.write_bytes(
            ("\n".join([lines[0], bad, lines[2]]) + "\n").encode(errors="surrogateescape")
        )
        with pytest.raises(DataError, match=word) as caught:
            LossLog(path, 3)
        assert str(path) in str(caught.value)
        assert "losses.jsonl, line 2: " in str(caught.value)
        assert path.read_bytes().split(b"\n")[1] == bad.encode(errors="surrogateescape")
    path.write_text(lines[0] + "\n" + lines[1][:20])
    LossLog(path, 3).close()
    assert path.read_text() == lines[0] + "\n"
    assert "ends at step 1, the run continues after step 3" in caplog.text
