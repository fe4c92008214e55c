"""`hypenet train` as a user starts it, on a random tiny teacher."""

import json

import pytest

from megatron_hypenet.checkpoint.load import read_manifest
from megatron_hypenet.cli.main import run
from tests import tiny_run


@pytest.fixture
def config(tmp_path, monkeypatch):
    tiny_run.fake_material(monkeypatch)
    tiny_run.write_teacher(tmp_path / "qwen3")
    return tiny_run.write_config(tmp_path)


def steps_done(tmp_path, name="run"):
    return list(json.loads((tmp_path / name / "manifest.json").read_text())["steps"])


def test_a_stage_brings_what_it_needs(config, tmp_path, capsys):
    assert run(["train", str(config), "--stage", "1", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["stage"] == "align" and read_manifest(shown["checkpoint"]).stage == "align"
    assert steps_done(tmp_path) == ["teacher", "data", "probe", "align"]
    assert run(["train", str(config), "--stage", "distill"]) == 0
    assert steps_done(tmp_path)[-3:] == ["select", "assemble", "distill"]


def test_without_a_word_the_first_unfinished_stage_is_trained(config, tmp_path, capsys):
    stages = []
    for _ in range(4):
        assert run(["train", str(config), "--json"]) == 0
        stages.append(json.loads(capsys.readouterr().out)["stage"])
    assert stages == ["align", "distill", "finetune", "finetune"]
    assert "export" not in steps_done(tmp_path)


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_held_out_losses_reach_tensorboard_and_leave_training_alone(config, tmp_path, zero_stage):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    often = [f"{stage}.eval_interval=1" for stage in ("align", "distill", "finetune")]
    for name, words in (("often", often), ("seldom", [])):
        where = [f"output_dir={tmp_path / name}", f"parallel.zero_stage={zero_stage}"]
        assert run(["train", str(config), "--stage", "finetune", *where, *words]) == 0
    of_student = tuple(
        who + name for who in ("", "teacher-") for name in ("lm-loss", "accuracy", "recall")
    )
    for stage in ("align", "distill", "finetune"):
        events = EventAccumulator(str(tmp_path / "often" / "tb" / stage)).Reload()
        of_stage = {"align": ("align-mse",), "distill": ("kl", *of_student), "finetune": of_student}
        found = {tag for tag in events.Tags()["scalars"] if tag.startswith("eval/")}
        assert found == {f"eval/{name}" for name in of_stage[stage]}
        for tag in found:
            points = [(point.step, point.value) for point in events.Scalars(tag)]
            assert [step for step, _ in points] == [1, 2] and all(value > 0 for _, value in points)
            assert ("teacher" not in tag) or points[0][1] == points[1][1]
        losses = [
            (tmp_path / name / stage / "losses.jsonl").read_text() for name in ("often", "seldom")
        ]
        assert losses[0] == losses[1]


def test_init_starts_from_a_given_student(config, tmp_path, capsys):
    assert run(["train", str(config), "--stage", "2", "--json"]) == 0
    student = json.loads(capsys.readouterr().out)["checkpoint"]
    assert (
        run(
            [
                "train",
                str(config),
                f"output_dir={tmp_path / 'other'}",
                "--stage",
                "3",
                "--init",
                student,
            ]
        )
        == 0
    )
    assert steps_done(tmp_path, "other") == ["teacher", "data", "finetune"]
    assert (
        run(
            [
                "train",
                str(config),
                f"output_dir={tmp_path / 'third'}",
                "--stage",
                "3",
                "--init",
                str(tmp_path / "qwen3"),
            ]
        )
        == 5
    )


def test_dry_run_lists_the_steps_up_to_the_stage(config, tmp_path, capsys):
    assert run(["train", str(config), "--stage", "align", "--dry-run", "--json"]) == 0
    assert [row["step"] for row in json.loads(capsys.readouterr().out)["steps"]] == [
        "teacher",
        "data",
        "probe",
        "align",
    ]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--init", "x"], 2),
        (["--stage", "4"], 3),
        (["--stage", "1", "--init", "x"], 2),
        (["--stage", "1", "--pp", "4"], 3),
    ],
)
def test_mistakes_end_with_their_exit_code(config, tmp_path, words, code):
    assert run(["train", str(config), *words]) == code
    assert not (tmp_path / "run").exists()
