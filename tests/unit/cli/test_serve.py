"""`hypenet serve` as a user starts it; vLLM itself runs in tests/integration."""

import json
import os
import shutil
import sys

import pytest
import torch

from megatron_hypenet.checkpoint.save import write_weights
from megatron_hypenet.cli import serve
from megatron_hypenet.cli.main import run
from megatron_hypenet.config.schema import ParallelConfig
from megatron_hypenet.export.to_hf import export_hf
from megatron_hypenet.model.hypenet import build_model
from tests.tiny import tiny_model_config, whole_tensors


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = tiny_model_config(attn_logits_scaling="hype 5")
    model = build_model(config, ParallelConfig(), dtype=torch.float32, seed=3)
    write_weights(folder / "ckpt", whole_tensors(model), model.model_config, kind="student")
    export_hf(folder / "ckpt", folder / "export")
    return folder


@pytest.fixture
def vllm(tmp_path):
    program = tmp_path / "vllm"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    return program


def test_it_becomes_vllm_with_the_export_of_a_run(run_folder, vllm, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(os, "execvpe", lambda *given: calls.append(given))
    heads = tiny_model_config().num_attention_heads
    words = ["--port", "81", "--tp", str(heads), "--vllm", str(vllm)]
    assert run(["serve", str(run_folder), *words, "--", "--enforce-eager", "--seed", "3"]) == 0
    program, command, environment = calls[0]
    assert program == command[0] == str(vllm) and command[1:3] == ["serve", f"{run_folder}/export"]
    assert command[-2:] == ["--seed", "3"] and "--enforce-eager" in command
    assert command[command.index("--tensor-parallel-size") + 1] == str(heads)
    assert "VLLM_ALLOW_LONG_MAX_MODEL_LEN" not in environment
    assert capsys.readouterr().out == ""


def test_a_longer_context_than_claimed_is_allowed_and_noted(run_folder, vllm, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(os, "execvpe", lambda *given: calls.append(given))
    words = ["--max-model-len", "99999999", "--vllm", str(vllm), "--json"]
    assert run(["serve", str(run_folder), *words]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["url"] == "http://127.0.0.1:8000/v1" and "more than the" in err
    assert calls[0][2]["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] == "1"


def test_a_dry_run_starts_nothing(run_folder, vllm, monkeypatch, capsys):
    monkeypatch.setattr(os, "execvpe", None)
    assert run(["serve", str(run_folder), "--vllm", str(vllm), "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith(f"{vllm} serve {run_folder}/export ")


def test_without_vllm_it_says_what_to_install(run_folder, monkeypatch, capsys):
    monkeypatch.setattr(serve, "installed_vllm", lambda: None)
    monkeypatch.setenv("PATH", "")
    assert run(["serve", str(run_folder)]) == 4
    assert 'pip install "megatron-hypenet[vllm]"' in capsys.readouterr().err


@pytest.mark.parametrize(("version", "code"), [("0.32.0", 0), ("0.32", 0), ("0.33.1", 4)])
def test_the_version_of_this_environment_counts(
    run_folder, vllm, monkeypatch, capsys, version, code
):
    monkeypatch.setattr(serve, "installed_vllm", lambda: version)
    monkeypatch.setattr(sys, "executable", str(vllm.parent / "python"))
    assert run(["serve", str(run_folder), "--dry-run"]) == code
    assert (f"vLLM {version} is installed" in capsys.readouterr().err) == bool(code)


def test_what_cannot_be_served_is_named(run_folder, vllm, tmp_path, capsys):
    program = ["--vllm", str(vllm), "--dry-run"]
    assert run(["serve", str(run_folder / "ckpt"), *program]) == 5
    assert "export it first: hypenet convert export" in capsys.readouterr().err
    old = tmp_path / "old"
    shutil.copytree(run_folder / "export", old)
    config = json.loads((run_folder / "export" / "config.json").read_text())
    del config["layer_types"]
    (old / "config.json").write_text(json.dumps(config))
    assert run(["serve", str(old), *program]) == 5
    assert "has no layer_types" in capsys.readouterr().err
    assert run(["serve", str(run_folder), *program, "--tp", "7"]) == 2
    assert "--tp 7 does not divide" in capsys.readouterr().err
    assert run(["serve", str(run_folder), "--vllm", str(tmp_path), "--dry-run"]) == 4
    assert "no program" in capsys.readouterr().err
