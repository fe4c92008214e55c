"""Planned work and the time that is left."""

import json
from pathlib import Path

import pytest

from megatron_hypenet.cli.demo import CONFIG
from megatron_hypenet.cli.pipeline import teacher_shape
from megatron_hypenet.config.loader import load_run_config
from megatron_hypenet.planning.eta import EVALUATION, SAVE, Clock, Rate, read_rates, write_rates
from megatron_hypenet.planning.planned_work import Planned, planned_work
from tests.unit.planning.test_planned_work import STEPS


class World:
    """A machine whose steps take known times, and a clock that watches it."""

    def __init__(self, planned, known=None):
        self.time = 0.0
        self.clock = Clock(planned, known, now=lambda: self.time)

    def step(self, name, seconds, parts, *, before=0.0, first=0, last=None, pauses=None):
        """Do parts `first` + 1 to `last` of `parts`; returns (time, said) after each."""
        said = []
        self.clock.begin(name)
        self.time += before
        for part in range(first + 1, (last or parts) + 1):
            self.time += seconds / parts
            self.clock.progress(name, part, parts)
            for kind, taken in (pauses or {}).get(part, ()):
                self.time += taken
                self.clock.pause(kind, taken)
            said.append((self.time, self.clock.eta()))
        if last is None:
            self.clock.finish(name)
        return said


PLANNED = {
    "teacher": Planned(),
    "align": Planned(flops=40.0, evaluations=1, evaluation_flops=1.0, saves=2),
    "assemble": Planned(),
    "distill": Planned(flops=490.0, evaluations=5, evaluation_flops=4.9, saves=5),
    "export": Planned(),
}
PAUSES = {part: [(EVALUATION, 4.0), (SAVE, 6.0)] for part in (20, 40, 60, 80, 100)}


def whole(world):
    """Return the whole run: moving files takes 5 s, work runs at 1 FLOP/s times its kind's use."""
    world.time += 5.0
    world.clock.begin("teacher")
    world.time += 5.0
    world.clock.finish("teacher")
    said = world.step("align", 100.0, 100, before=10.0, pauses={100: [(EVALUATION, 3.0)]})
    world.clock.begin("assemble")
    world.time += 5.0
    world.clock.finish("assemble")
    said += world.step("distill", 1000.0, 100, before=10.0, pauses=PAUSES)
    world.clock.begin("export")
    world.time += 5.0
    world.clock.finish("export")
    return said


def test_nothing_is_said_before_anything_was_measured():
    world = World(PLANNED)
    assert world.clock.eta() is None and world.clock.fraction() == 0.0
    world.clock.begin("teacher")
    world.time = 500.0
    world.clock.finish("teacher")
    world.clock.begin("align")
    world.time = 510.0
    world.clock.progress("align", 1, 100)
    assert world.clock.eta() is None  # the first part also compiles


def test_the_estimate_is_right_from_a_tenth_of_the_run_on():
    world = World(PLANNED)
    said = whole(world)
    end = world.time
    late = [(time, eta) for time, eta in said if time > 0.1 * end and time < end - 15.0]
    assert len(late) > 90
    for time, eta in late:
        assert eta is not None and 1 / 1.5 < eta / (end - time) < 1.5, (time, eta, end - time)
    assert world.clock.eta() == 0 and world.clock.fraction() == 1.0


def test_after_a_resume_too_from_the_first_line(tmp_path):
    first = World(PLANNED)
    first.clock.begin("teacher")
    first.time = 5.0
    first.clock.finish("teacher")
    first.step("align", 100.0, 100, before=10.0, pauses={100: [(EVALUATION, 3.0)]})
    first.step("distill", 1000.0, 100, before=10.0, last=40, pauses=PAUSES)
    first.clock.end()
    write_rates(tmp_path, first.clock.rates)
    known = read_rates(tmp_path)
    assert known["distill"].flops_per_second == pytest.approx(0.49, rel=1e-3)
    assert known["distill"].save_seconds == 6.0 and known["distill"].seconds > 400
    again = World(PLANNED, known)
    for step in ("teacher", "align", "assemble"):
        again.clock.skip(step)
    said = again.step("distill", 1000.0, 100, before=10.0, first=40, pauses=PAUSES)
    again.clock.begin("export")
    again.time += 5.0
    again.clock.finish("export")
    for time, eta in [pair for pair in said if pair[0] < again.time - 15.0]:
        assert 1 / 1.5 < eta / (again.time - time) < 1.5, (time, eta, again.time - time)


def test_a_part_of_the_run_is_counted_alone():
    world = World(PLANNED)
    world.clock.only({"teacher", "align"})
    world.step("teacher", 5.0, 1)
    said = world.step("align", 100.0, 100)
    assert said[49][1] == pytest.approx(50.0 + 2.5)  # and an evaluation


def test_the_share_is_one_of_time_with_earlier_starts():
    world = World(PLANNED, {"align": Rate(flops_per_second=0.4, seconds=100.0)})
    for step in ("teacher", "align", "assemble", "export"):
        world.clock.skip(step)
    world.step("distill", 1000.0, 100, last=50)
    assert world.clock.fraction() == pytest.approx(0.55, abs=0.03)


def test_a_run_of_skipped_steps_is_finished():
    clock = Clock({"align": Planned(flops=1.0)})
    clock.skip("align")
    assert clock.fraction() == 1.0 and clock.eta() == 0.0


def test_unequal_parts_are_weighed():
    world = World({"report": Planned(flops=100.0, parts=(1.0, 1.0, 1.0, 7.0))})
    world.clock.begin("report")
    for part in (1, 2, 3):
        world.time += 10.0
        world.clock.progress("report", part, 4)
    assert world.clock.eta() == pytest.approx(70.0)


def test_files_that_say_how_far_they_are_are_extrapolated():
    world = World(
        {"data": Planned(), "align": Planned(flops=40.0)}, {"align": Rate(flops_per_second=4)}
    )
    world.clock.begin("data")
    for part in (1, 2, 3):
        world.time += 10.0
        world.clock.progress("data", part, 10)
    assert world.clock.eta() == pytest.approx(70.0 + 10.0)
    assert world.clock.rates["data"].before_seconds == 0.0  # nothing that other steps would need


def test_many_reports_are_thinned():
    world = World(PLANNED)
    world.clock.begin("distill")
    for part in range(1, 5001):
        world.time += 0.2
        world.clock.progress("distill", part, 10_000)
    assert len(world.clock._current.marks) <= 401
    assert world.clock._rest() == pytest.approx(1000.0 + 3 * 20.0, rel=0.02)


def test_damaged_rates_are_measured_again(tmp_path):
    assert read_rates(tmp_path) == {}
    (tmp_path / "rates.json").write_text("{")
    assert read_rates(tmp_path) == {}
    write_rates(tmp_path / "none" / "x", {})


DEMO = [
    "align.train_iters=100", "distill.train_iters=280", "finetune.train_iters=8",
    "align.save_interval=50", "distill.save_interval=140",
]  # fmt: skip
"""What the run was given whose calls of its clock are in demo_timings.json."""


def recorded(repo_root, since=0):
    """Return the clock's plan for that demo, and its calls: seconds (of CPU time of one thread,
    which other work on the machine does not stretch), name and arguments."""
    run = load_run_config(CONFIG, DEMO)
    work = planned_work(run, teacher_shape(repo_root / "assets" / "tiny-qwen3"), STEPS)
    calls = json.loads((Path(__file__).parent / "demo_timings.json").read_text())
    return work, [call for call in calls if call[0] >= since]


def replayed(world, calls):
    """Make the calls at their times; returns (time, said) after each."""
    said = []
    for moment, name, *arguments in calls:
        world.time = moment
        getattr(world.clock, name)(*arguments)
        said.append((moment, world.clock.eta()))
    return said


def assert_close(said, start, end):
    """Every estimate from a tenth of the time on is within 1.5 times the truth, or 3 s."""
    late = [pair for pair in said if pair[0] >= start + 0.1 * (end - start)]
    assert len(late) > 15
    for time, eta in late:
        true = end - time
        assert eta is not None and (abs(eta - true) <= 3.0 or 1 / 1.5 < eta / true < 1.5), (
            time, eta, true,
        )  # fmt: skip


def test_a_recorded_demo_is_foreseen(repo_root):
    work, calls = recorded(repo_root)
    assert_close(replayed(World(work), calls), 0.0, calls[-1][0])


@pytest.mark.parametrize("stopped", [60.0, 130.0, 190.0], ids=["distill", "late", "report"])
def test_a_recorded_demo_is_foreseen_after_a_resume(repo_root, tmp_path, stopped):
    work, calls = recorded(repo_root)
    first = World(work)
    replayed(first, [call for call in calls if call[0] < stopped])
    first.clock.end()
    write_rates(tmp_path, first.clock.rates)
    again = World(work, read_rates(tmp_path))
    done = [call[2] for call in calls if call[0] < stopped and call[1] == "finish"]
    for step in done:
        again.clock.skip(step)
    again.time = stopped
    (step,) = {call[2] for call in calls if call[0] < stopped and call[1] == "begin"} - {*done}
    again.clock.begin(step)
    rest = [call for call in calls if call[0] >= stopped]
    if step == "report":  # it begins anew
        began = next(call[0] for call in calls if call[1:] == ["begin", "report"])
        rest = [[stopped + call[0] - began, *call[1:]] for call in calls if call[0] >= began]
    assert again.clock.eta() is not None  # from the first line
    assert_close(replayed(again, rest), stopped, rest[-1][0])
