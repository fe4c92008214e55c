"""What each hook makes of a step, an evaluation and a save."""

import json
import math
from pathlib import Path

import pytest
import torch

from megatron_hypenet.config.schema import ParallelConfig
from megatron_hypenet.engine.own_time import OwnTime
from megatron_hypenet.parallel import groups
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
from megatron_hypenet.training.stragglers import StepTimes
from tests.unit.engine.toy import stage_config


@pytest.fixture(autouse=True)
def parallel():
    groups.init_parallel(ParallelConfig())


def end(step, *, value=1.0, skipped=False, train_iters=5):
    record = StepRecord(
        stage="align",
        step=step,
        train_iters=train_iters,
        loss=math.nan if skipped else 2.0,
        grad_norm=1.0,
        lr=0.1,
        tokens_per_second=10.04,
        eta_seconds=3.0,
        skipped=skipped,
    )
    metrics = {"x": torch.tensor(value)}
    return StepEnd(
        record=record, metrics=metrics, seconds=step, tokens_seen=8 * step, skipped_steps=0
    )


class Reports:
    """The part of a Recorder that the hook talks to."""

    def __init__(self):
        self.intervals = []
        self.written = []

    def interval_steps(self, step):
        return 2

    def interval(self, record, metrics, tokens_seen, *, memory, slow):
        self.intervals.append((record.step, metrics["x"], tokens_seen, slow))
        assert memory > 0 and "speed/rank-time-max-ms" in metrics

    def evaluation(self, step, values, seconds):
        self.written.append((step, values, seconds))


def test_metrics_are_means_over_the_steps_of_an_interval_that_were_not_skipped():
    reports = Reports()
    hook = RecordingHook(reports, StepTimes(OwnTime()), stage_config(log_interval=2))
    ends = [
        end(1, value=1.0),
        end(2, value=4.0),
        end(3, value=7.0),
        end(4, value=9.0, skipped=True),
    ]
    for each in [*ends, end(5, value=3.0)]:
        hook.on_step_end(each)
    assert reports.intervals == [(2, 2.5, 16, ""), (4, 7.0, 32, ""), (5, 3.0, 40, "")]
    assert ends[0].record.metrics == {} and ends[1].record.metrics == {"x": 2.5}
    hook.on_eval(5, {"eval/loss": 1.0}, 0.1)
    assert reports.written == [(5, {"eval/loss": 1.0}, 0.1)]


def test_progress_is_noted_and_the_first_step_is_not_measured(tmp_path):
    timing = Timing("align", background=False)
    hook = ProgressHook(timing, tmp_path)
    PROGRESS.begin("align", train_iters=5)
    hook.on_step_end(end(1))
    assert timing.figures()["step_seconds"] == 0.0
    hook.on_step_end(end(2, skipped=True))
    assert timing.figures()["step_seconds"] == 2.0
    assert (PROGRESS.iteration, PROGRESS.facts["loss"], PROGRESS.facts["tokens_per_second"]) == (
        2,
        None,
        10.0,
    )
    hook.on_eval(2, {}, 0.5)
    hook.on_save(Path("/a/iter_0000002"), 0.25)
    assert (
        PROGRESS.facts["last_save"] == "/a/iter_0000002" and PROGRESS.facts["save_seconds"] == 0.25
    )
    assert "margin_seconds" not in PROGRESS.facts
    written = json.loads((tmp_path / "timing.json").read_text())
    assert (written["evaluate_seconds"], written["save_seconds"]) == (0.5, 0.25)


def test_the_callers_function_sees_every_step():
    seen = []
    hook = CallbackHook(seen.append)
    hook.on_step_end(end(3))
    hook.on_eval(3, {}, 0.0)
    hook.on_save(Path("x"), 0.0)
    assert [record.step for record in seen] == [3]


def test_a_hook_does_nothing_by_itself():
    hook = Hook()
    assert (
        hook.on_step_end(end(1)) is hook.on_eval(1, {}, 0.0) is hook.on_save(Path("x"), 0) is None
    )


def test_the_last_step_is_the_one_that_the_stage_trains_to():
    assert not end(4).last and end(5).last and end(5).step == 5
