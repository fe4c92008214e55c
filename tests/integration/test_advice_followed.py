"""The advice of one error is not refused by the next: commands that fail as users' first commands
do, then what their message says, done."""

import json
import re
import shlex
import shutil

import pytest
import torch
from safetensors.torch import save_file

from megatron_hypenet.cli import main
from tests import tiny_run

SHORT = {**tiny_run.STAGE, "train_iters": 1, "save_interval": 1}


@pytest.fixture(scope="module")
def material():
    with pytest.MonkeyPatch.context() as patch:
        tiny_run.fake_material(patch)
        yield patch


@pytest.fixture(scope="module")
def finished(material, tmp_path_factory):
    """Provide the folder of a configuration whose run is finished."""
    root = tmp_path_factory.mktemp("finished")
    tiny_run.write_teacher(root / "qwen3")
    config = tiny_run.write_config(root, align=SHORT, distill=SHORT, finetune=SHORT)
    assert main.run(["run", str(config)]) == 0
    return root


@pytest.fixture
def hypenet(finished, tmp_path, monkeypatch, capsys):
    """Provide a function from a command line to (exit code, its error); it runs beside a copy of
    the finished run."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    text = (tmp_path / "run.yaml").read_text().replace(str(finished), str(tmp_path))
    (tmp_path / "run.yaml").write_text(text)
    stored = tmp_path / "run" / "config.yaml"
    stored.write_text(stored.read_text().replace(str(finished), str(tmp_path)))
    monkeypatch.chdir(tmp_path)

    def call(line):
        code = main.run(shlex.split(line))
        captured = capsys.readouterr()
        return code, captured.err + captured.out

    return call


def advised(said, pattern):
    """Return the one piece of advice of this form."""
    found = re.search(pattern, said)
    assert found is not None, said
    return found.group(1)


@pytest.mark.parametrize("verb", ["run", "train", "select sweep"])
@pytest.mark.parametrize("change", ["align.lr=5e-4", "distill.lr=5e-4", "data.seed=3"])
def test_a_change_that_costs_training_names_a_step_from_which_it_is_accepted(hypenet, verb, change):
    if verb == "select sweep" and change == "distill.lr=5e-4":
        change = "select.seq_length=32"
    code, said = hypenet(f"{verb} run.yaml {change} --dry-run")
    assert code == 3 and "would be done again" in said
    redo = advised(said, r"(--redo-from \w+)")
    for instead in (redo, "--overwrite", "output_dir=elsewhere"):
        code, said = hypenet(f"{verb} run.yaml {change} {instead} --dry-run")
        assert code == 0, said


def test_a_stage_is_lengthened_as_advised(hypenet):
    code, said = hypenet("run run.yaml distill.train_iters=2 --dry-run")
    keep = advised(said, r"(distill\.lr_decay_iters=\d+)")
    code, said = hypenet(f"run run.yaml distill.train_iters=2 {keep} --dry-run")
    assert code == 0 or "--redo-from finetune" in said  # what comes after it is another matter
    code, said = hypenet(
        f"run run.yaml distill.train_iters=2 {keep} --redo-from finetune --dry-run"
    )
    assert code == 0, said


def test_limits_of_the_guard_may_be_changed_as_advised(hypenet):
    for setting in ("guard.max_teacher_loss=50", "guard.max_skipped_steps=9"):
        code, said = hypenet(f"run run.yaml {setting} --dry-run")
        assert code == 0, said
    # the advice after a divergence
    lower = "finetune.lr=1e-5 finetune.min_lr=1e-5"
    code, said = hypenet(f"run run.yaml {lower} --redo-from finetune --dry-run")
    assert code == 0, said


def test_a_folder_that_is_no_run_and_a_stop_file(hypenet, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine").touch()
    code, said = hypenet("run run.yaml output_dir=other")
    assert code == 2 and "choose another output_dir" in said
    stop = tmp_path / "run" / "STOP"
    stop.touch()
    code, said = hypenet("run run.yaml")
    assert code == 2 and f"{stop} asks for a stop" in said and "delete it" in said
    stop.unlink()
    assert hypenet("run run.yaml")[0] == 0


def test_an_unfinished_run_has_no_report_until_it_is_continued(hypenet, tmp_path):
    (tmp_path / "run" / "report" / "report.json").unlink()
    manifest = tmp_path / "run" / "manifest.json"
    content = json.loads(manifest.read_text())
    del content["steps"]["finetune"]
    manifest.write_text(json.dumps(content))
    code, said = hypenet("report run")
    assert code == 5
    code, said = hypenet(advised(said, r"`hypenet (run [^`]*)`"))
    assert code == 0 and hypenet("report run")[0] == 0, said


def test_results_that_exist_are_replaced_by_the_option_that_the_message_names(hypenet, tmp_path):
    save_file({"input_ids": torch.arange(8).reshape(1, 8)}, tmp_path / "ids.safetensors")
    for line in (
        "convert import qwen3 imported",
        "convert export run exported",
        "score run --tokens ids.safetensors --out scores.safetensors",
    ):
        assert hypenet(line)[0] == 0
        code, said = hypenet(line)
        assert code in (2, 5) and "--overwrite" in said
        code, said = hypenet(f"{line} --overwrite")
        assert code == 0, said


def test_the_other_kind_of_folder_is_made_as_the_message_says(hypenet, tmp_path):
    save_file({"input_ids": torch.arange(8).reshape(1, 8)}, tmp_path / "ids.safetensors")
    code, said = hypenet("score qwen3 --tokens ids.safetensors --out out.safetensors")
    command = advised(said, r"hypenet (convert import \S+) CKPT_DIR")
    assert code == 5 and hypenet(f"{command} made")[0] == 0
    assert hypenet("score made --tokens ids.safetensors --out out.safetensors")[0] == 0
    program = tmp_path / "vllm"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    code, said = hypenet(f"serve run/distill --vllm {program} --dry-run")
    command = advised(said, r"hypenet (convert export \S+) FOLDER")
    assert code == 5 and hypenet(f"{command} folder")[0] == 0
    assert hypenet(f"serve folder --vllm {program} --dry-run")[0] == 0


def test_a_stage_starts_from_a_checkpoint_that_the_message_lists(hypenet):
    line = "train run.yaml output_dir=third --stage finetune --init {} --dry-run"
    code, said = hypenet(line.format("run"))
    names = advised(said, r"say which of its checkpoints: (.*)").split(", ")
    assert code == 5 and len(names) == 4
    for name in names[:2]:
        code, said = hypenet(line.format(name))
        assert code == 0, said


def test_layouts_and_batches_that_the_message_proposes(hypenet):
    code, said = hypenet("config validate run.yaml --world-size 4")
    assert code == 3
    code, said = hypenet(
        "config validate run.yaml --world-size 4 "
        + " ".join(re.findall(r"use (\w+\.global_batch_size=\d+)", said))
    )
    assert code == 0, said
