"""The table of HALO's steps: which there are, what they read, and nothing heavy."""

import pytest

from megatron_hypenet.errors import ConfigError
from megatron_hypenet.halo.run_folder import RunFolder
from megatron_hypenet.halo.tasks import halo_steps, stage_name, starts_from
from tests.processes import loaded_by
from tests.unit.halo.test_run_folder import config


def test_steps_come_after_what_they_read_and_leave_what_is_theirs_alone(tmp_path):
    folder = RunFolder(tmp_path / "run")
    steps = halo_steps(config(folder.root), folder)
    names = [step.name for step in steps]
    assert names == [
        "teacher",
        "data",
        "probe",
        "align",
        "select",
        "assemble",
        "distill",
        "finetune",
        "export",
        "report",
    ]
    for at, step in enumerate(steps):
        assert set(step.after) <= set(names[:at])
    results = [path for step in steps for path in step.results]
    assert len(set(results)) == len(results) and all(
        path.is_relative_to(folder.root) for path in results
    )


def test_stages_start_from_the_student_of_the_task_before(tmp_path):
    folder = RunFolder(tmp_path / "run")
    assert starts_from(halo_steps(config(folder.root), folder)) == {
        "distill": "assemble",
        "finetune": "distill",
    }


def test_a_gate_stands_between_its_stage_and_what_comes_after_that(tmp_path):
    from megatron_hypenet.config.schema import GateConfig, GatesConfig

    folder = RunFolder(tmp_path / "run")
    run = config(folder.root)
    gate = GatesConfig(distill=GateConfig(max_loss_ratio=1.5), align=GateConfig(min_recall=3.0))
    gated = run.model_copy(update={"eval": run.eval.model_copy(update={"gate": gate})})
    steps = {step.name: step for step in halo_steps(gated, folder)}
    names = list(steps)
    assert names[names.index("align") + 1] == "align-gate"
    assert names[names.index("distill") + 1] == "distill-gate" and "finetune-gate" not in names
    assert steps["finetune"].after == ("distill", "distill-gate")
    assert steps["select"].after == ("align", "align-gate")
    assert steps["assemble"].after == ("align", "select", "align-gate")
    assert starts_from(steps.values()) == {"distill": "assemble", "finetune": "distill"}


def test_an_action_belongs_to_each_step_by_name(tmp_path):
    folder = RunFolder(tmp_path / "run")
    steps = halo_steps(config(folder.root), folder, lambda name: lambda: {"did": name})
    assert [step.action() for step in steps] == [{"did": step.name} for step in steps]
    with pytest.raises(AssertionError, match="made for a plan"):
        halo_steps(config(folder.root), folder)[0].action()


def test_no_tensor_library_is_imported():
    assert loaded_by("import megatron_hypenet.halo.tasks", ("torch", "numpy")) == []


@pytest.mark.parametrize(
    ("word", "name"), [("1", "align"), ("2", "distill"), ("3", "finetune"), ("align", "align")]
)
def test_stages_have_names_and_numbers(word, name):
    assert stage_name(word) == name


def test_unknown_stages_are_refused():
    with pytest.raises(ConfigError, match="use align, distill or finetune"):
        stage_name("4")


def test_how_the_text_is_read_decides_only_where_it_is_not_as_usual(tmp_path):
    from megatron_hypenet.config.schema import SourceConfig

    folder = RunFolder(tmp_path / "run")
    (tmp_path / "a.txt").write_text("a")

    def inputs(*train):
        run = config(folder.root)
        data = run.data.model_copy(update={"train": train, "heldout": None})
        return halo_steps(run.model_copy(update={"data": data}), folder)[1].inputs()

    path = tmp_path / "a.txt"
    plain = inputs(path)
    assert set(plain) == {"train", "heldout"} and plain == inputs(SourceConfig(path=path))
    assert plain["train"][0] and inputs(tmp_path / "*.txt")["train"][0]
    for more in ({"weight": 1.0}, {"text_key": "x"}, {"messages_key": "m"}):
        assert inputs(SourceConfig(path=path, **more)) != plain
    assert inputs(SourceConfig(path=path, weight=1.0), path) != inputs(
        SourceConfig(path=path, weight=2.0), path
    )
