"""Every checkpoint of a folder is found with its true state, the usable and the broken ones."""

import json
import shutil
import subprocess
import sys

import pytest

from megatron_hypenet.checkpoint import format as fmt
from megatron_hypenet.checkpoint import save, survey
from megatron_hypenet.checkpoint.state import TrainState
from megatron_hypenet.errors import CheckpointError

LAYOUT = {"world": 4, "data": 1, "tensor": 2, "pipeline": 2, "context": 1, "zero_stage": 1}


@pytest.fixture
def run(tmp_path, make_engine, model_config, tensors):
    """Provide a run folder: a teacher and three saves of a stage."""
    root = tmp_path / "run"
    save.write_weights(root / "teacher", tensors, model_config, kind="teacher")
    engine = make_engine().randomize(0)
    for step in (10, 20, 30):
        state = TrainState(
            stage="distill",
            step=step,
            samples=step * 4,
            tokens=step * 64,
            adam_step=step,
            layout=LAYOUT,
            losses=(2.0, 1.5),
        )
        save.begin_save(
            root / "distill/checkpoints" / fmt.iteration_name(step),
            engine,
            state,
            model_config=model_config,
            kind="distill",
        ).commit()
    (root / "manifest.json").write_text("{}")  # the run's own, no checkpoint's
    (root / "logs").mkdir()
    return root


def test_finds_all_of_a_run_in_order(run):
    found = survey.survey(run)
    assert [one.path.relative_to(run).as_posix() for one in found] == [
        "teacher",
        *(f"distill/checkpoints/iter_00000{step}" for step in (10, 20, 30)),
    ]
    assert {one.state for one in found} == {survey.COMMITTED}
    teacher, first = found[:2]
    assert (teacher.kind, teacher.stage, teacher.step, teacher.layout) == (
        "teacher",
        None,
        None,
        None,
    )
    assert (first.stage, first.step, first.tokens, first.layout) == ("distill", 10, 640, LAYOUT)
    assert first.bytes == sum(
        path.stat().st_size for path in first.path.rglob("*") if path.is_file()
    ) and first.created.startswith("20")
    assert survey.survey(run / "distill") == survey.survey(run / "distill/checkpoints") == found[1:]
    assert survey.survey(first.path) == [first] and survey.survey(run.parent) == found


def test_names_what_is_not_usable(run):
    folder = run / "distill/checkpoints"
    (folder / "iter_0000010" / fmt.COMMITTED).unlink()
    next((folder / "iter_0000020").rglob("*.distcp")).unlink()
    (folder / "iter_0000030").rename(folder / ".iter_0000030.tmp-7")
    (folder / "iter_0000040").symlink_to(folder / "iter_0000010")
    found = survey.survey(folder)
    assert [(one.path.name, one.state, one.step) for one in found] == [
        ("iter_0000010", survey.UNCOMMITTED, 10),
        ("iter_0000020", survey.DAMAGED, 20),
        (".iter_0000030.tmp-7", survey.UNFINISHED, None),
    ]
    assert "missing" in found[1].problem and all(one.problem for one in found)
    (folder / "iter_0000020" / fmt.MANIFEST).write_text("{")
    assert "differs from what COMMITTED says" in survey.look_at(folder / "iter_0000020").problem


def test_refuses_what_is_no_folder(tmp_path):
    assert survey.survey(tmp_path) == []
    with pytest.raises(CheckpointError, match="is not a folder"):
        survey.survey(tmp_path / "none")


def test_describes_origin_progress_and_model(run):
    described = survey.describe(run / "distill/checkpoints/iter_0000020")
    assert described["progress"] == {
        "stage": "distill",
        "step": 20,
        "samples": 80,
        "tokens": 1280,
        "adam_step": 20,
        "lr": 0.0,
        "seed": 0,
        "last_loss": 1.5,
        "skipped_steps": 0,
        "skipped_in_row": 0,
    }
    assert (
        described["model"]["num_layers"] == 2
        and described["versions"]["torch"]
        and described["layout"] == LAYOUT
    )
    shutil.rmtree(run / "distill/checkpoints/iter_0000020/optimizer")
    (run / "distill/checkpoints/iter_0000020/model.json").write_text("")
    broken = survey.describe(run / "distill/checkpoints/iter_0000020")
    assert broken["state"] == survey.DAMAGED and broken["model"] is None and broken["step"] == 20


def test_texts():
    assert survey.layout_text(LAYOUT) == "4 processes, tp2 pp2 cp1 dp1 zero1"
    assert (
        survey.layout_text({"world": 1, "pipeline_layout": [3, 5]})
        == "1 process, pipeline_layout=[3, 5]"
    )
    assert (
        survey.layout_text({"world": 2, "pipeline": 2, "virtual_pipeline": 4})
        == "2 processes, pp2 vp4"
        and survey.layout_text({}) == "-"
    )
    assert (
        survey.mixer_runs(["a", "a", "b", "a"]) == ["0-1 a", "2 b", "3 a"]
        and survey.mixer_runs([]) == []
    )


def test_listing_needs_no_torch(run):
    probe = (
        "import sys; from pathlib import Path; from megatron_hypenet.checkpoint.survey import "
        "survey; "
        "assert len(survey(Path(sys.argv[1]))) == 4 and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", probe, str(run)], check=True, timeout=60)


@pytest.mark.parametrize("entry", ["stage", "step", "samples", "tokens", "losses", "layout"])
@pytest.mark.parametrize("value", [None, "x", [[]], {"a": []}])
def test_progress_of_other_types_is_not_shown(tmp_path, entry, value):
    state = {
        "stage": "align",
        "step": 1,
        "samples": 2,
        "tokens": 3,
        "losses": [1.5],
        "layout": {"world": 1},
    }
    (tmp_path / "train_state.json").write_text(json.dumps(state))
    assert survey.read_progress(tmp_path) == state
    if (entry, value) != ("stage", "x"):
        (tmp_path / "train_state.json").write_text(json.dumps({**state, entry: value}))
        assert survey.read_progress(tmp_path) == {}
