"""A run made ready: teachers of both kinds, and everything that can be found wrong early."""

import os
import subprocess
import sys

import pytest

from megatron_hypenet.checkpoint.load import read_model_config, resolve
from megatron_hypenet.cli import pipeline
from megatron_hypenet.config.loader import load_run_config
from megatron_hypenet.errors import (
    CheckpointError,
    LayoutError,
    SavedAndRequeue,
    SetupError,
    UsageError,
)
from megatron_hypenet.parallel import groups
from tests import tiny_run


@pytest.fixture
def run(tmp_path, monkeypatch):
    tiny_run.fake_material(monkeypatch)
    tiny_run.write_teacher(tmp_path / "qwen3")
    return load_run_config(tiny_run.write_config(tmp_path))


def test_a_teacher_may_be_a_folder_or_a_checkpoint(run, tmp_path):
    pipeline.import_teacher(tmp_path / "qwen3", tmp_path / "imported")
    assert (
        pipeline.teacher_shape(tmp_path / "qwen3")
        == pipeline.teacher_shape(tmp_path / "imported")
        == tiny_run.TEACHER
    )
    pipeline.import_teacher(tmp_path / "imported", tmp_path / "linked")
    assert (
        resolve(tmp_path / "linked") == tmp_path / "linked"
        and read_model_config(tmp_path / "linked") == tiny_run.TEACHER
    )


def test_what_is_neither_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        pipeline.teacher_shape(tmp_path / "none")
    with pytest.raises(
        CheckpointError,
        match="no Hugging Face folder .it has no config.json.*not a checkpoint.*Set teacher=PATH",
    ):
        pipeline.teacher_shape(tmp_path)


def test_the_layout_is_checked_for_the_number_of_processes(run, monkeypatch):
    assert pipeline.checked(run) == pipeline.Checked(tiny_run.TEACHER, 1)
    with pytest.raises(LayoutError, match="global_batch_size=2 is not a multiple"):
        pipeline.checked(run, nproc=3)
    with pytest.raises(LayoutError, match="global_batch_size=2 is not a multiple"):
        pipeline.checked(run, world_size=3)
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "3",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LayoutError, match="global_batch_size=2 is not a multiple"):
        pipeline.checked(run)


STARTING = """
import sys
from launchers import local
def start(launch):
    print([name for name in ("torch", "megatron.core", "deepspeed") if name in sys.modules])
    return launch.num_processes
local.run = start
from megatron_hypenet.cli.main import main
main()
"""


@pytest.mark.parametrize("teacher", ["qwen3", "imported"])
@pytest.mark.parametrize("verb", ["run", "train"])
def test_a_command_that_only_starts_processes_imports_no_models(
    run, tmp_path, repo_root, verb, teacher
):
    pipeline.import_teacher(tmp_path / "qwen3", tmp_path / "imported")
    words = [verb, str(tmp_path / "run.yaml"), f"teacher={tmp_path / teacher}", "--nproc", "2"]
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    done = subprocess.run(
        [sys.executable, "-c", STARTING, *words],
        capture_output=True,
        text=True,
        cwd=repo_root,
        env=environment,
        check=False,
    )
    assert (done.stdout.strip(), done.returncode) == ("[]", 2), done.stderr


def test_a_pipeline_ends_its_process_groups_and_keeps_its_folder(run):
    with pipeline.prepared(run) as ready:
        assert (
            groups.is_initialized()
            and ready.is_main
            and list(ready.runner.steps) == list(ready.screen.does)
        )
        ready.runner.run_step("teacher")
    assert not groups.is_initialized()
    assert (
        ready.folder.config_file.is_file()
        and "teacher: import the teacher" in ready.folder.log_file.read_text()
    )


def test_a_stop_file_of_yesterday_is_named_before_anything_starts(run, monkeypatch):
    run.output_dir.mkdir()
    (run.output_dir / "STOP").touch()
    for prepare in (pipeline.checked, lambda run: pipeline.prepared(run).__enter__()):
        with pytest.raises(UsageError, match="it was there before this command"):
            prepare(run)
    pipeline.checked(run, overwrite=True)  # which deletes the folder
    # as in a rank: whoever started it has looked, so the file is for this run
    monkeypatch.setenv("HYPENET_UNDER_WAY", "1")
    pipeline.checked(run)


def test_a_stop_file_that_comes_between_steps_is_a_stop(run):
    with (
        pytest.raises(SavedAndRequeue, match="stopped before step data on the file"),
        pipeline.prepared(run) as ready,
    ):
        ready.runner.run_step("teacher")
        (run.output_dir / "STOP").touch()
        ready.runner.run_step("teacher")  # done, so nothing starts
        ready.runner.run_step("data")


def test_commands_of_on_event_hear_of_stages_and_of_the_end(run, tmp_path):
    heard = tmp_path / "heard"
    told = run.model_copy(update={"on_event": (f'echo "$HYPENET_EVENT $HYPENET_STEP" >> {heard}',)})
    with pytest.raises(SavedAndRequeue), pipeline.prepared(told) as ready:
        ready.runner.run_through("align")
        (told.output_dir / "STOP").touch()
        ready.runner.run_step("select")
    assert heard.read_text() == "stage_done align\nstopped \n"


def test_a_failure_inside_still_ends_the_groups(run):
    with pytest.raises(RuntimeError), pipeline.prepared(run):
        raise RuntimeError("inside")
    assert not groups.is_initialized()


@pytest.fixture
def somebody_else(run):
    """Provide a process that owns the run folder of `run`."""
    with pipeline.prepared(run) as ready:
        ready.runner.run_step("teacher")
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom megatron_hypenet.ownership import "
        "owning\n"
        "with owning(Path(sys.argv[1]), inside=True):\n    print('owned', "
        "flush=True)\n    time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(run.output_dir)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "owned\n"
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_in_use_is_refused_by_its_owner_and_nothing_in_it_changes(
    run, somebody_else, overwrite
):
    before = {path: path.stat().st_mtime_ns for path in run.output_dir.rglob("*")}
    with pytest.raises(UsageError, match=f"is in use by process {somebody_else.pid} on "):
        pipeline.prepared(run, overwrite=overwrite).__enter__()
    assert {path: path.stat().st_mtime_ns for path in run.output_dir.rglob("*")} == before
    pipeline.checked(run)  # --dry-run only reads
    assert pipeline.planned(run)[0]["state"] == "done"


def test_an_owner_that_was_killed_is_replaced(run, somebody_else):
    somebody_else.kill()
    somebody_else.wait()
    with pipeline.prepared(run) as ready:
        ready.runner.run_step("teacher")
    assert not (run.output_dir / "owner.json").exists()


def test_a_rank_and_a_job_do_not_ask_twice(run, somebody_else, monkeypatch):
    monkeypatch.setenv("HYPENET_UNDER_WAY", "1")
    pipeline.refuse_in_use(run.output_dir)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("model.transformer_impl=transformer_engine",), "and Transformer Engine .*pip install"),
        (("fp8.teacher=true",), "fp8.teacher needs a GPU"),
    ],
)
def test_what_this_machine_lacks_is_named_before_anything_starts(tmp_path, words, says):
    tiny_run.write_teacher(tmp_path / "qwen3")
    changes = {"device": "auto", "precision": "auto"}
    sized = tiny_run.tiny_teacher_config(2, hidden_size=32, ffn_hidden_size=48)
    tiny_run.write_teacher(tmp_path / "sized", shape=sized)
    path = tiny_run.write_config(tmp_path, **changes, teacher=str(tmp_path / "sized"))
    settings = load_run_config(path, words)
    with pytest.raises(SetupError, match=says) as told:
        pipeline.checked(settings)
    assert told.value.exit_code == 4 and not settings.output_dir.exists()
    # a job's processes look for themselves, where they will run
    assert pipeline.checked(settings, world_size=1).num_processes == 1
