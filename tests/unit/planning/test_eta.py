"""Planned work and the time that is left."""

import pytest

from megatron_hypenet.config.model import ModelConfig
from megatron_hypenet.planning.eta import (
    EVALUATION,
    SAVE,
    Clock,
    Planned,
    Rate,
    planned_work,
    read_rates,
    write_rates,
)
from tests.unit.halo.test_run_folder import STAGE, config

TEACHER = ModelConfig(
    num_layers=4,
    hidden_size=32,
    ffn_hidden_size=64,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=100,
    share_embeddings_and_output_weights=True,
    mixer_types=("attn",) * 4,
    attn_use_rope=True,
    attn_use_output_gate=False,
)


STEPS = (
    "teacher", "data", "probe", "align", "select", "assemble", "distill", "finetune", "export",
    "report",
)  # fmt: skip


def test_work_grows_with_what_is_asked(tmp_path):
    base = planned_work(config(tmp_path), TEACHER, STEPS)
    longer = planned_work(config(tmp_path, distill={**STAGE, "train_iters": 4}), TEACHER, STEPS)
    assert longer["distill"].flops == 2 * base["distill"].flops
    assert longer["align"] == base["align"]
    wider = planned_work(config(tmp_path, eval={"length_multiples": [1]}), TEACHER, STEPS)
    assert wider["report"].flops < base["report"].flops and wider["select"] == base["select"]
    assert tuple(base) == STEPS
    assert [name for name, work in base.items() if not work.flops] == [
        *("teacher", "data", "probe", "assemble", "export")
    ]


def test_pauses_and_unequal_parts_are_planned(tmp_path):
    stage = {**STAGE, "train_iters": 10, "save_interval": 4, "eval_interval": 3}
    work = planned_work(config(tmp_path, align=stage), TEACHER, STEPS)
    assert (work["align"].evaluations, work["align"].saves) == (4, 3)  # and after the last step
    assert work["distill"].evaluations == 1 and work["align"].evaluation_flops > 0
    # the student's language loss and recall come to the loss of the stage itself
    assert work["finetune"].evaluation_flops > 2 * work["align"].evaluation_flops
    parts = work["report"].parts
    assert len(parts) == 4 * 5 and parts[4] > 8 * parts[1]  # 8 times as long, and attention
    assert sum(parts) == pytest.approx(work["report"].flops)


def test_a_gate_costs_what_it_measures(tmp_path):
    def work(**bounds):
        found = planned_work(
            config(tmp_path, eval={"gate": {"distill": bounds}}), TEACHER, ["distill-gate"]
        )
        return found["distill-gate"].flops

    assert work() == 0.0 < work(min_recall=50.0) < work(min_recall=50.0, recall_multiple=2)
    # as many sequences, by teacher and student
    assert work(max_loss_ratio=2.0) == pytest.approx(2 * work(min_recall=50.0))


def test_distillation_costs_more_per_token_than_finetuning(tmp_path):
    work = planned_work(config(tmp_path), TEACHER, STEPS)
    assert work["distill"].flops > work["finetune"].flops


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
