"""`hypenet demo` without its minutes of work: which run it starts, and where."""

import json

import pytest

from megatron_hypenet.cli import demo
from megatron_hypenet.cli.main import run
from megatron_hypenet.config.loader import load_run_config
from tests import tiny_run


def test_the_bundled_configuration_is_valid_and_small(repo_root):
    settings = load_run_config(demo.CONFIG)
    tokens = sum(
        stage.train_iters * stage.tokens_per_step
        for stage in (settings.align, settings.distill, settings.finetune)
    )
    assert tokens < 5_000_000
    assert (
        settings.eval.length_multiples == (1, 2, 4, 8)
        and settings.eval.seq_length == settings.distill.seq_length
    )
    assert demo.CONFIG == repo_root / "configs" / "run" / "demo.yaml"


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Put a tiny run in the place of the demo's own."""
    tiny_run.fake_material(monkeypatch)
    tiny_run.write_teacher(tmp_path / "qwen3")
    monkeypatch.setattr(demo, "CONFIG", tiny_run.write_config(tmp_path))
    return tmp_path


def test_the_folder_is_said_in_either_way_and_once(tiny, capsys):
    there = tiny / "there"
    assert run(["demo", f"output_dir={there}", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["config"]["output_dir"] == str(there)
    assert run(["demo", f"output_dir={there}", "--out", str(tiny / "here"), "--dry-run"]) == 2
    assert "are the same setting; give one of them" in capsys.readouterr().err


def test_the_demo_runs_everything_into_its_folder(tiny, capsys):
    assert run(["demo", "--out", str(tiny / "here"), "finetune.train_iters=1", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert len(content["rows"]) == 4 and (tiny / "here" / "export" / "config.json").is_file()
    assert (tiny / "here" / "finetune" / "checkpoints" / "iter_0000001").is_dir() and not (
        tiny / "run"
    ).exists()


def test_dry_run_starts_nothing(tiny, capsys):
    assert run(["demo", "--out", str(tiny / "here"), "--dry-run"]) == 0
    assert (
        f"output_dir: {tiny / 'here'}" in capsys.readouterr().out and not (tiny / "here").exists()
    )


def test_an_installation_without_the_bundle_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "CONFIG", tmp_path / "none.yaml")
    assert run(["demo"]) == 4
    assert "come with the package; install it again" in capsys.readouterr().err
