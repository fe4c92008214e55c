"""Steps run once for the same inputs, in order, and continue after an interruption."""

from dataclasses import replace

import pytest
import yaml

from megatron_hypenet.errors import CheckpointError, DataError, SavedAndRequeue
from megatron_hypenet.halo.run_folder import RunFolder
from megatron_hypenet.halo.task_runner import Runner, Step, identity_of, read_json
from tests.unit.halo.test_run_folder import STAGE, config


class World:
    """Two chained steps that write files and log what they did."""

    def __init__(self, root):
        self.folder = RunFolder(root / "run")
        self.source = root / "source"
        self.log = []
        self.source.write_text("one")
        self.folder.prepare(config(self.folder.root))

    def write(self, name):
        def action():
            self.log.append(name)
            (self.folder.root / name).write_text(self.source.read_text())
            return {"note": name}

        return action

    def runner(self, run=None, **kwargs):
        root = self.folder.root
        first = Step(
            name="first", does="", after=(), settings=("align",), results=(root / "first",),
            inputs=lambda: identity_of([self.source]), action=self.write("first"),
        )  # fmt: skip
        second = Step(
            name="second",
            does="",
            after=("first",),
            settings=("seed",),
            results=(root / "second",),
            action=self.write("second"),
        )
        third = Step(
            name="third",
            does="",
            after=(),
            settings=(),
            results=(root / "third",),
            action=self.write("third"),
            alone=True,
        )
        return Runner(run or config(root), self.folder, [first, second, third], **kwargs)


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def test_steps_run_once_and_in_order(world):
    heard = []
    world.runner(announce=lambda step, what: heard.append((step, what.split()[0]))).run_all()
    assert world.log == ["first", "second", "third"]
    world.runner(announce=lambda step, what: heard.append((step, what))).run_all()
    assert world.log == ["first", "second", "third"]
    assert heard[:2] == [("first", "starts"), ("first", "done")]
    assert heard[-3:] == [("first", "skipped"), ("second", "skipped"), ("third", "skipped")]
    record = world.folder.records()["first"]
    assert record["note"] == "first" and record["seconds"] >= 0


def test_a_run_may_be_ended_before_a_step_that_has_work_to_do(world):
    def may_start(step):
        world.log.append(f"{step}?")
        if step == "second":
            raise SavedAndRequeue("stopped")

    for _ in range(2):
        with pytest.raises(SavedAndRequeue):
            world.runner(may_start=may_start).run_all()
    assert (
        world.log == ["first?", "first", "second?", "second?"]
        and world.folder.started("second") is None
    )


def test_only_what_a_step_needs_is_run(world):
    world.runner().run_through("second")
    assert world.log == ["first", "second"]


def test_changed_inputs_run_a_step_and_its_successors_again(world):
    world.runner().run_all()
    world.source.write_text("two")
    world.runner().run_all()
    assert world.log == ["first", "second", "third", "first", "second"]


def test_changed_settings_run_only_what_reads_them(world):
    world.runner().run_all()
    world.runner(config(world.folder.root, seed=5)).run_all()
    assert world.log[3:] == ["second"]
    world.runner(config(world.folder.root, align={**STAGE, "lr": 1.0})).run_all()
    assert world.log[4:] == ["first", "second"]


def test_a_setting_that_a_newer_version_adds_runs_nothing_again(world):
    """The older version knew no align.weight_decay: neither its config.yaml nor its fingerprints
    have it."""
    older = world.runner()
    older.added = frozenset({"align.weight_decay"})
    assert older.fingerprint("second") != world.runner().fingerprint("second")
    older.run_all()
    stored = yaml.safe_load(world.folder.config_file.read_text())
    del stored["align"]["weight_decay"]
    world.folder.config_file.write_text(yaml.safe_dump(stored))
    # a dry run, before anything is brought up to date
    assert {row["state"] for row in world.runner().plan()} == {"done"}
    for _ in range(2):
        world.folder.prepare(config(world.folder.root))
        world.runner().run_all()
    assert world.log == ["first", "second", "third"]


def test_settings_that_may_change_run_nothing_again(world):
    world.runner().run_all()
    world.runner(
        config(world.folder.root, align={**STAGE, "log_interval": 3, "micro_batch_size": 2})
    ).run_all()
    assert len(world.log) == 3


def test_a_lost_result_is_made_again(world):
    world.runner().run_all()
    (world.folder.root / "second").unlink()
    world.runner().run_all()
    assert world.log[3:] == ["second"]


def test_an_interrupted_step_keeps_its_partial_result_for_the_same_inputs(world):
    partial = world.folder.root / "first"
    runner = world.runner()
    world.folder.begin("first", runner.fingerprint("first"))
    partial.write_text("half")
    seen = []
    step = runner.steps["first"]
    object.__setattr__(step, "action", lambda: seen.append(partial.read_text()) or {})
    runner.run_step("first")
    assert seen == ["half"]


def test_a_partial_result_of_other_inputs_is_cleared(world):
    partial = world.folder.root / "first"
    world.folder.begin("first", "another fingerprint")
    partial.write_text("half")
    runner = world.runner()
    seen = []
    object.__setattr__(
        runner.steps["first"],
        "action",
        lambda: seen.append(partial.exists()) or partial.write_text("x") and {},
    )
    runner.run_step("first")
    assert seen == [False]


def test_a_failed_step_is_not_done(world):
    runner = world.runner()
    object.__setattr__(runner.steps["first"], "action", lambda: {})
    with pytest.raises(CheckpointError, match="ended without"):
        runner.run_step("first")
    assert not world.folder.records()


def test_other_processes_wait_and_write_nothing(world):
    barriers = []
    runner = world.runner(is_main=False, barrier=lambda: barriers.append(1))
    runner.run_step("third")
    assert world.log == [] and barriers and not world.folder.records()
    runner.run_step("first")
    assert world.log == ["first"] and not world.folder.records()


def test_the_plan_touches_nothing(world):
    runner = world.runner()
    runner.run_step("first")
    before = sorted(path.name for path in world.folder.root.iterdir())
    assert [row["state"] for row in runner.plan()] == ["done", "to do", "to do"]
    world.source.unlink()
    assert [row["state"] for row in runner.plan()] == ["to do"] * 3
    assert sorted(path.name for path in world.folder.root.iterdir()) == before


def test_inputs_must_exist(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        identity_of([tmp_path / "none"])
    (tmp_path / "prefix.bin").write_bytes(b"1")
    assert identity_of([tmp_path / "prefix"])[0]


def test_damaged_json_is_named(tmp_path):
    (tmp_path / "x.json").write_text("[")
    with pytest.raises(DataError, match="x.json: not valid JSON"):
        read_json(tmp_path / "x.json")


def test_a_step_whose_checkpoint_is_not_whole_is_not_done(world):
    root = world.folder.root
    whole = [True]

    def runner(**kwargs):
        made = world.runner(**kwargs)
        made.steps["first"] = replace(
            made.steps["first"], checkpoint=lambda: root / "first" if whole[0] else None
        )
        return made

    verified = []
    runner(verify=verified.append).run_all()
    assert verified == []
    runner(verify=verified.append).run_all()
    assert verified == [root / "first"]
    whole[0] = False
    assert [row["state"] for row in runner().plan()] == ["to do", "to do", "to do"]
    whole[0] = True

    def damaged(checkpoint):
        raise CheckpointError(f"{checkpoint} is damaged")

    with pytest.raises(CheckpointError, match="first is damaged"):
        runner(verify=damaged).run_all()
    world.log.clear()
    whole[0] = False
    with pytest.raises(CheckpointError, match="ended without a whole checkpoint"):
        runner(verify=verified.append).run_step("first")
    assert world.log == ["first"]


def with_recorded_file(world):
    runner = world.runner()
    place = world.folder.root / "second"
    runner.steps["second"] = replace(runner.steps["second"], files=lambda: [place])
    return runner, place


@pytest.mark.parametrize("damage", ["two", ""])
def test_a_file_that_is_not_as_written_is_made_again(world, caplog, damage):
    runner, place = with_recorded_file(world)
    runner.run_all()
    assert set(world.folder.records()["second"]["written"]) == {"second"}
    place.write_text(damage)
    assert [row["state"] for row in runner.plan()] == ["done", "to do", "to do"]
    with_recorded_file(world)[0].run_all()
    assert world.log == ["first", "second", "third", "second"]
    assert place.read_text() == "one"
    assert f"{place} is not as step second wrote it; the step is done again" in caplog.text


def test_other_files_beside_those_that_were_written_do_not_matter(world):
    runner, place = with_recorded_file(world)
    runner.run_all()
    other = place.with_name("other")
    other.write_text("mine")
    runner.steps["second"] = replace(runner.steps["second"], files=lambda: [place, other])
    runner.run_all()
    assert world.log == ["first", "second", "third"]


def test_a_record_with_damaged_hashes_is_refused(world):
    runner, _ = with_recorded_file(world)
    runner.run_all()
    text = world.folder.manifest_file.read_text()
    world.folder.manifest_file.write_text(text.replace('"sha256": "', '"sha256": "x'))
    with pytest.raises(DataError, match="steps.second.written.second.sha256"):
        runner.run_all()


def test_only_the_first_process_decides(world):
    world.runner().run_all()
    other = world.runner(
        is_main=False, decided=lambda decide: ("fingerprint of the first", True, False, None)
    )
    other.fingerprint = None
    other.run_step("first")
    assert world.log == ["first", "second", "third"]


def test_a_fingerprint_looks_at_every_input_once(world):
    runner = world.runner()
    asked = []
    first, second, third = (runner.steps[name] for name in ("first", "second", "third"))
    runner.steps["first"] = replace(first, inputs=lambda: asked.append("first") or first.inputs())
    runner.steps["second"] = replace(second, after=("first",))
    runner.steps["third"] = replace(third, after=("first", "second"))
    before = runner.fingerprint("third")
    assert asked == ["first"]
    world.source.write_text("two")
    assert runner.fingerprint("third") != before
