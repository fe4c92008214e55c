import json
import shutil

import pytest
import yaml

from megatron_hypenet.cli.config import is_model_file
from megatron_hypenet.cli.main import run
from megatron_hypenet.errors import ConfigError


@pytest.fixture
def hypenet(capsys, monkeypatch, repo_root):
    monkeypatch.chdir(repo_root)

    def call(*words):
        code = run(["config", *words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_show_merges_everything(hypenet):
    code, out, _ = hypenet(
        "show", "configs/run/distill_2b.yaml", "teacher=T", "data=D", "align.lr=3e-4", "--tp", "2"
    )
    shown = yaml.safe_load(out)
    assert code == 0
    assert shown["align"]["lr"] == 3e-4 and shown["parallel"]["tensor_model_parallel_size"] == 2
    assert shown["finetune"]["seq_length"] == 16384  # from the include
    assert shown["checkpoint"]["keep_last"] == 2  # from the schema


def test_show_json(hypenet):
    code, out, _ = hypenet("show", "configs/run/demo.yaml", "--json")
    assert code == 0 and json.loads(out)["output_dir"] == "runs/demo"


def test_show_origin(hypenet):
    words = ("show", "configs/run/distill_2b.yaml", "teacher=T", "data=D", "--cp", "2", "--origin")
    code, out, _ = hypenet(*words)
    rows = dict(line.split(" = ", 1) for line in out.splitlines())
    assert code == 0
    assert rows["teacher"] == '"T"    # CLI' and rows["data.train"] == '["D"]    # CLI'
    assert rows["parallel.context_parallel_size"] == "2    # CLI"
    assert rows["align.lr"] == "0.001    # configs/stage/align.yaml"
    assert rows["eval.seq_length"] == "4096    # configs/run/distill_2b.yaml"
    assert rows["checkpoint.keep_every"] == "null    # default"
    settings = json.loads(hypenet(*words, "--json")[1])["settings"]
    assert {"key": "checkpoint.keep_every", "value": None, "origin": "default"} in settings


def test_validate_says_what_is_trained(hypenet):
    code, out, _ = hypenet("validate", "configs/run/distill_2b.yaml", "teacher=T", "data=D")
    assert code == 0 and "align 327,680,000, distill 983,040,000, finetune 1,048,576,000" in out
    code, out, _ = hypenet(
        "validate", "configs/run/distill_2b.yaml", "teacher=T", "data=D", "--json"
    )
    assert code == 0 and json.loads(out)["tokens"]["align"] == 327_680_000


def test_validate_lists_problems_with_exit_3(hypenet):
    code, out, err = hypenet("validate", "configs/run/quickstart.yaml", "algin.lr=1")
    assert code == 3 and out == ""
    assert (
        "teacher: missing" in err
        and "data.train: missing" in err
        and "did you mean 'align'?" in err
    )


def test_validate_against_a_model_and_a_world(hypenet):
    words = [
        "validate",
        "configs/run/distill_2b.yaml",
        "teacher=T",
        "data=D",
        "--model",
        "configs/model/hypenet_2b.yaml",
    ]
    assert hypenet(*words, "--world-size", "8")[0] == 0
    assert hypenet(*words, "--world-size", "16", "--tp", "8", "--cp", "2")[0] == 0
    code, _, err = hypenet(*words, "--world-size", "3", "--tp", "3")
    assert code == 3 and "tensor_model_parallel_size=3 does not divide" in err


@pytest.mark.parametrize("name", ["hypenet_2b", "hypenet_5b", "hypenet_9b", "tiny"])
def test_validate_model_files(hypenet, name):
    code, out, _ = hypenet("validate", f"configs/model/{name}.yaml")
    assert code == 0 and "valid model configuration" in out
    assert hypenet("validate", f"configs/model/{name}.yaml", "seed=1")[0] == 2


def test_validate_reads_the_teachers_shape_and_nothing_else(hypenet, tmp_path):
    (tmp_path / "teacher").mkdir()
    shutil.copy("assets/tiny-qwen3/config.json", tmp_path / "teacher")  # no weights, no tokenizer
    words = ("validate", "configs/run/demo.yaml", f"teacher={tmp_path / 'teacher'}")
    assert hypenet(*words)[0] == 0
    code, _, err = hypenet(*words, "--pp", "64")
    assert (
        code == 3
        and "error: pipeline-layers: parallel.pipeline_model_parallel_size=64 exceeds" in err
    )
    assert hypenet(*words, "select.num_attention_layers=99")[0] == 3


def test_validate_without_the_teacher_says_what_it_left_out(hypenet):
    words = ("validate", "configs/run/distill_2b.yaml", "teacher=T", "data=D")
    code, _, err = hypenet(*words, "--pp", "2")
    assert code == 0 and "note: teacher T is not here" in err
    code, _, err = hypenet(*words, "--pp", "2", "parallel.zero_stage=3")
    assert code == 3 and "pipeline-zero" in err


def test_validate_warns_of_an_idle_pipeline(hypenet):
    code, _, err = hypenet("validate", "configs/run/demo.yaml", "--pp", "2")
    assert code == 0 and "warning: align: 1 micro-batches per step on 2 pipeline stages" in err


def test_validate_against_the_number_of_processes(hypenet):
    code, _, err = hypenet("validate", "configs/run/demo.yaml", "--tp", "2", "--world-size", "3")
    assert code == 3 and "whole-replicas: 3 processes cannot be divided into replicas of 2" in err


def test_empty_file_says_what_a_run_needs(tmp_path):
    path = tmp_path / "empty.yaml"
    path.write_text("")
    with pytest.raises(ConfigError, match="the file is empty"):
        is_model_file(path)


@pytest.mark.parametrize(("kind", "key"), [("run", "align"), ("model", "mixer_types")])
def test_schema(hypenet, kind, key):
    code, out, _ = hypenet("schema", kind)
    assert code == 0 and key in json.loads(out)["properties"]


def test_schema_of_something_else(hypenet):
    assert hypenet("schema", "teacher")[0] == 2


def test_data_that_is_here_is_looked_at(tmp_path, capsys, repo_root, monkeypatch):
    monkeypatch.chdir(repo_root)
    words = ["config", "validate", "configs/run/demo.yaml"]
    (tmp_path / "a.jsonl").write_text('{"body": "a"}')
    source = f"path: {tmp_path}/a.jsonl, weight: 1"
    assert run([*words, f"data=[{{{source}, text_key: body}}]"]) == 0
    assert run([*words, f"data=[{{{source}}}]"]) == 5
    assert "a.jsonl, line 1: no text under 'text' (found: body)" in capsys.readouterr().err
    assert run([*words, f"data={tmp_path}/gone.txt"]) == 0
    assert "gone.txt is not here, so it is not looked at" in capsys.readouterr().err


def test_presets_are_listed_and_copied(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(["config", "list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["presets"]
    assert {"kind": "run", "name": "quickstart"}.items() <= found[-1].items() or any(
        row["name"] == "quickstart" and row["kind"] == "run" for row in found
    )
    assert all(row["about"] for row in found if row["kind"] == "run")
    assert run(["config", "list"]) == 0 and "h100_infiniband" in capsys.readouterr().out
    assert run(["config", "copy", "distill_2b", "mine.yaml"]) == 0
    assert run(["config", "validate", "mine.yaml", "teacher=T", "data=D"]) == 0
    assert run(["config", "copy", "distill_2b", "mine.yaml"]) == 2
    assert run(["config", "copy", "distil"]) == 2
    assert "choose one of" in capsys.readouterr().err
