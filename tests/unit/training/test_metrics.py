"""Points carry the tags of the table, lines read well."""

import json
from dataclasses import replace

import pytest
import torch

from megatron_hypenet.training.metrics import (
    MetricSums,
    Recorder,
    StepRecord,
    evaluation_line,
)
from megatron_hypenet.training.step_files import metrics_lines
from megatron_hypenet.training.tags import tag_of
from megatron_hypenet.training.throughput import Workload


class Board:
    """A tracker that remembers."""

    def __init__(self):
        self.points = []
        self.texts = []
        self.closed = False

    def scalars(self, step, values):
        self.points.append((step, values))

    def text(self, tag, text, step=0):
        self.texts.append((tag, text, step))

    def close(self):
        self.closed = True


def recorder_in(tmp_path, log, board, **changes):
    options = {
        "stage": "align",
        "loss": "align-mse",
        "train_iters": 4,
        "step": 0,
        "first": True,
        "out_dir": tmp_path,
        "trackers": [board],
        "log": log,
    }
    return Recorder(**{**options, **changes})


def test_points_and_lines_of_an_interval(tmp_path):
    lines, board = [], Board()
    recorder = recorder_in(tmp_path, lines.append, board)
    for step, loss in ((1, 2.0), (2, 4.0)):
        record = recorder.step(step, loss=loss, grad_norm=loss / 4, lr=1e-3, tokens=100)
    recorder.interval(
        record, {"align-layers/00": 1.5}, 200, memory=3.5, slow="rank 1 on node7 1.6x"
    )
    recorder.close()
    assert len(lines) == 1 and lines[0].startswith(
        "iter 2/4 | loss 3 | gnorm 0.75 | lr 1.00e-03 | "
    ), "means over the interval"
    assert record.loss == 4.0
    ((step, points),) = board.points
    assert step == 2 and all(tag_of(tag) for tag in points)
    expected = {
        "train/align-mse": 3.0,
        "train/grad-norm": 0.75,
        "train/learning-rate": 1e-3,
        "train/tokens-seen": 200,
        "train/skipped-steps": 0,
        "align-layers/00": 1.5,
        "speed/memory-gib": 3.5,
    }
    measured = {"speed/tokens-per-second", "speed/step-time-ms"}
    assert points.keys() == expected.keys() | measured
    assert {tag: points[tag] for tag in expected} == expected
    assert min(points[tag] for tag in measured) > 0
    assert board.texts == [("speed/slow-ranks", "rank 1 on node7 1.6x", 2)] and board.closed
    assert [(line.step, line.values) for _, line in metrics_lines(tmp_path / "metrics.jsonl")] == [
        (2, points)
    ]


def test_an_interval_without_a_finite_loss_has_no_mean(tmp_path):
    lines, board = [], Board()
    recorder = recorder_in(tmp_path, lines.append, board)
    record = recorder.step(1, loss=1.0, grad_norm=1.0, lr=1.0, tokens=1, skipped=True)
    recorder.interval(record, {}, 1, memory=0.5)
    recorder.close()
    assert "loss nan" in lines[0] and board.points[0][1]["train/skipped-steps"] == 1


def test_an_evaluation_is_a_point_and_a_line_with_the_teacher_beside_the_student(tmp_path):
    lines, board = [], Board()
    recorder = recorder_in(tmp_path, lines.append, board)
    values = {
        "eval/lm-loss": 2.31456,
        "eval/recall": 87.5,
        "eval/kl": 0.0123,
        "eval/teacher-lm-loss": 2.25,
        "eval/teacher-recall": 99.2,
    }
    recorder.evaluation(4, values, 1.4)
    recorder.evaluation(4, {}, 1.4)
    recorder.close()
    assert board.points == [(4, {**values, "speed/evaluation-seconds": 1.4})]
    assert lines == [
        "held-out at iter 4/4 | lm-loss 2.315 (teacher 2.25) | recall 87.5 % (teacher 99.2 %)"
        " | kl 0.0123 | 1s"
    ]
    assert evaluation_line(1, 9, {"eval/align-mse": 0.5}, 0.2) == (
        "held-out at iter 1/9 | align-mse 0.5 | 0s"
    )


def test_other_ranks_write_nothing(tmp_path):
    recorder = recorder_in(tmp_path, pytest.fail, Board(), first=False, trackers=())
    recorder.interval(
        recorder.step(1, loss=1.0, grad_norm=1.0, lr=1.0, tokens=1), {}, 1, memory=0.5
    )
    recorder.evaluation(1, {"eval/kl": 1.0}, 0.1)
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


def test_the_line_and_the_board_show_the_use_of_each_gpu(tmp_path):
    lines, board = [], Board()
    work = Workload(flops_per_token=13.1e9, num_devices=8, peak=989e12)
    recorder = recorder_in(tmp_path, lines.append, board, workload=work)
    record = replace(
        recorder.step(1, loss=2.0, grad_norm=1.0, lr=1e-4, tokens=100),
        tokens_per_second=8 * 37_900.0,
    )
    recorder.interval(record, {}, 100, memory=0.5)
    recorder.close()
    assert "303.2k tok/s | 37.9k tok/s/gpu | 496 TFLOP/s/gpu | mfu 50.2%" in lines[0]
    ((_, points),) = board.points
    assert points["speed/mfu"] == pytest.approx(0.502, rel=1e-3)
    assert points["speed/tokens-per-second-per-gpu"] == pytest.approx(37_900)
    assert points["speed/tflops-per-gpu"] == pytest.approx(496.5, rel=1e-3)
