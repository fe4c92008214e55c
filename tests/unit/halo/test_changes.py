"""A run may change: what has not begun is free, the rest is named, and what comes before stays."""

import pytest

from megatron_hypenet.errors import ConfigError, UsageError
from megatron_hypenet.halo.changes import Change, accept, changed, finish_redo
from megatron_hypenet.halo.run_folder import RunFolder
from megatron_hypenet.halo.task_runner import Runner, remove
from megatron_hypenet.halo.tasks import halo_steps
from tests.unit.halo.test_run_folder import STAGE, config

LONG = {**STAGE, "train_iters": 8}


class World:
    """A run whose steps are recorded without being done."""

    def __init__(self, root):
        self.root = root
        (root / "qwen3").mkdir()
        (root / "qwen3" / "config.json").write_text("{}")
        (root / "a.txt").write_text("text\n")
        self.folder = RunFolder(root / "run")

    def config(self, **changes):
        values = {
            "teacher": str(self.root / "qwen3"),
            "data": {"train": [str(self.root / "a.txt")]},
        }
        return config(self.folder.root, **{**values, **changes})

    def runner(self, run):
        return Runner(run, self.folder, halo_steps(run, self.folder))

    def start(self, run, redo_from=None):
        """Do what a command does before its first step."""
        found = accept(run, self.folder, redo_from)
        self.folder.prepare(run)
        return found

    def do(self, run, last, *, finish=True):
        """Do all steps up to `last`; the last one is only begun without `finish`."""
        runner = self.runner(run)
        for name, step in runner.steps.items():
            basis = runner.basis(name)
            record = self.folder.records().get(name, {})
            if record.get("fingerprint") != runner.fingerprint(name):
                if not runner.goes_on(name, basis):
                    for result in step.results:
                        remove(result)
                self.folder.begin(name, basis)
                self.leave(step, 1 if name == last and not finish else step.length)
                if name != last or finish:
                    self.folder.record(name, runner.fingerprint(name), seconds=1.0, software={})
            if name == last:
                return

    @staticmethod
    def leave(step, iteration):
        for result in step.results:
            if step.length is not None:
                (result / "checkpoints" / f"iter_{iteration:07d}").mkdir(
                    parents=True, exist_ok=True
                )
            else:
                result.parent.mkdir(parents=True, exist_ok=True)
                result.write_text("{}")


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def test_settings_of_steps_that_have_not_begun_are_free(world):
    world.start(world.config())
    world.do(world.config(), "select")
    other = world.config(
        distill={**STAGE, "lr": 5e-3}, finetune={**STAGE, "seq_length": 32}, eval={"seq_length": 64}
    )
    found = world.start(other)
    assert found.again == ("probe",)  # it only compares lengths with the text
    assert "distill.lr: 0.001 there, 0.005 now" in found.what
    assert "probe" in found.lines()[-1] and world.folder.records().keys() >= {"align", "select"}
    world.do(other, "probe")
    assert world.start(other) == Change()


def test_what_would_be_lost_is_named_and_kept_without_the_flag(world):
    world.start(world.config())
    world.do(world.config(), "report")
    other = world.config(distill={**STAGE, "lr": 5e-3})
    before = world.folder.manifest_file.read_text()
    for check in (changed, accept):
        with pytest.raises(ConfigError) as caught:
            check(other, world.folder)
        assert "distill.lr: 0.001 there, 0.005 now" in str(caught.value)
        assert "distill, finetune, export, report would be done again: --redo-from distill" in str(
            caught.value
        )
    assert world.folder.manifest_file.read_text() == before
    with pytest.raises(ConfigError, match="--redo-from finetune comes too late.*"):
        changed(other, world.folder, "finetune")
    found = world.start(other, "distill")
    assert found.again == ("distill", "finetune", "export", "report")
    assert list(world.folder.records()) == [
        *("teacher", "data", "probe", "align", "select", "assemble")
    ]


def test_the_same_command_with_the_flag_goes_on_and_then_redoes(world):
    world.start(world.config())
    world.do(world.config(), "report")
    assert world.start(world.config(), "distill").again[0] == "distill"
    world.do(world.config(), "distill")
    assert world.start(world.config(), "distill") == Change()  # interrupted, and given again
    assert "distill" in world.folder.records()
    world.do(world.config(), "report")
    finish_redo(world.folder)
    assert world.start(world.config(), "distill").again[0] == "distill"
    # an earlier step goes further than what was begun
    assert world.start(world.config(), "align").again[:2] == ("align", "select")


def test_a_finished_run_may_export_and_evaluate_anew(world):
    world.start(world.config())
    world.do(world.config(), "report")
    found = world.start(world.config(export={"attn_logits_scaling": None}))
    assert found.again == ("export", "report") and not found.loses
    assert world.start(world.config(export={"attn_logits_scaling": None})) == Change()


def test_limits_of_the_guard_are_no_other_run(world):
    world.start(world.config())
    world.do(world.config(), "distill")
    found = world.start(world.config(guard={"max_teacher_loss": 50.0, "max_skipped_steps": 9}))
    assert found.again == ("probe",) and not found.loses


def test_files_of_another_name_or_place_are_the_same_run(world, monkeypatch):
    world.start(world.config())
    world.do(world.config(), "report")
    (world.root / "deep").mkdir()
    (world.root / "a.txt").rename(world.root / "deep" / "b.txt")
    (world.root / "qwen3").rename(world.root / "deep" / "teacher")
    monkeypatch.chdir(world.root)
    moved = world.config(teacher="deep/teacher", data={"train": ["deep/../deep/b.txt"]})
    assert world.start(moved) == Change()
    (world.root / "deep" / "b.txt").write_text("more text\n")
    with pytest.raises(ConfigError) as caught:
        world.start(moved)
    assert "the files of data.train or data.heldout are others" in str(caught.value)
    assert "data, probe, align, " in str(caught.value) and "--redo-from data" in str(caught.value)


def test_the_held_out_text_is_not_one_of_the_training_texts(world):
    (world.root / "b.txt").write_text("other\n")
    texts = [str(world.root / name) for name in ("a.txt", "b.txt")]
    together = world.config(data={"train": texts})
    apart = world.config(data={"train": texts[:1], "heldout": texts[1]})
    assert world.runner(together).basis("data") != world.runner(apart).basis("data")


def test_data_that_no_training_has_used_is_made_again_without_asking(world):
    world.start(world.config())
    world.do(world.config(), "probe")
    (world.root / "a.txt").write_text("more text\n")
    found = world.start(world.config())
    assert found.again == ("data", "probe")
    assert "the files of data.train or data.heldout are others" in found.what


def test_a_choice_of_layers_by_hand_is_named(world):
    world.start(world.config())
    world.do(world.config(), "distill")
    world.folder.mixers_file.write_text('{"by": "hand"}')
    with pytest.raises(ConfigError, match="mixers.json was changed\n.*--redo-from assemble"):
        changed(world.config(), world.folder)


def test_the_last_stage_goes_on_longer_and_only_its_export_is_done_again(world):
    constant = {**STAGE, "lr_schedule": "constant"}
    world.start(world.config(finetune=constant))
    world.do(world.config(finetune=constant), "report")
    longer = world.config(finetune={**constant, "train_iters": 8})
    found = world.start(longer)
    assert found.again == ("export", "report")
    assert found.longer == (
        "finetune: goes on from its last checkpoint to step 8; the learning rate stays at 0.001",
    )
    runner = world.runner(longer)
    assert runner.goes_on("finetune", runner.basis("finetune")) and not runner.is_done("finetune")


def test_a_cosine_is_kept_or_done_again(world):
    world.start(world.config())
    world.do(world.config(), "report")
    with pytest.raises(ConfigError) as caught:
        changed(world.config(finetune=LONG), world.folder)
    assert "finetune.lr_decay_iters=2 keeps the learning rates" in str(caught.value)
    assert "finetune, export, report would be done again: --redo-from finetune" in str(caught.value)
    found = world.start(world.config(finetune={**LONG, "lr_decay_iters": 2}))
    assert found.again == ("export", "report")
    assert "the cosine ends at step 2, as before" in found.longer[0]
    assert "then stays at 0.0001" in found.longer[0]


def test_a_longer_early_stage_keeps_its_steps_and_asks_for_what_follows(world):
    constant = {**STAGE, "lr_schedule": "constant"}
    world.start(world.config(align=constant))
    world.do(world.config(align=constant), "finetune")
    longer = world.config(align={**constant, "train_iters": 8})
    with pytest.raises(ConfigError) as caught:
        changed(longer, world.folder)
    assert "align: goes on from its last checkpoint to step 8" in str(caught.value)
    assert "select, assemble, distill, finetune would be done again: --redo-from select" in str(
        caught.value
    )
    found = world.start(longer, "select")
    assert found.longer and found.again == ("select", "assemble", "distill", "finetune")
    runner = world.runner(longer)
    assert runner.goes_on("align", runner.basis("align"))
    # asked for by name, it begins from its start
    assert "align" in world.start(longer, "align").again
    assert not runner.goes_on("align", runner.basis("align"))


def test_a_shorter_stage_does_not_take_the_longer_one_for_its_own(world):
    constant = {**STAGE, "lr_schedule": "constant", "train_iters": 8}
    world.start(world.config(finetune=constant))
    world.do(world.config(finetune=constant), "finetune")
    shorter = world.config(finetune={**constant, "train_iters": 4})
    with pytest.raises(ConfigError, match="finetune would be done again: --redo-from finetune"):
        changed(shorter, world.folder)


def test_an_interrupted_stage_may_be_lengthened(world):
    constant = {**STAGE, "lr_schedule": "constant", "train_iters": 4}
    world.start(world.config(align=constant))
    world.do(world.config(align=constant), "align", finish=False)
    assert world.start(world.config(align={**constant, "train_iters": 8})).again == ()
    with pytest.raises(ConfigError, match="align would be done again"):
        changed(world.config(align={**constant, "lr": 0.5}), world.folder)


def test_a_stage_that_saved_nothing_has_nothing_to_lose(world):
    world.start(world.config())
    world.do(world.config(), "probe")
    world.folder.begin("align", world.runner(world.config()).basis("align"))
    world.folder.stage("align").mkdir()
    assert world.start(world.config(align={**STAGE, "lr": 0.5})).again == ()


def test_an_unknown_step_and_a_new_folder(world):
    with pytest.raises(UsageError, match="--redo-from stage2: no step has this name; use one of"):
        changed(world.config(), world.folder, "stage2")
    assert changed(world.config(), world.folder, "distill") == Change()
