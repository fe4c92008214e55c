import json
import os
import subprocess
import sys

import pytest

from megatron_hypenet.cli import completion, main
from tests.unit.cli.test_main import HEAVY

# prints what a shell's function would be told, and which heavy libraries were loaded for it
ASK = """
import contextlib, io, json, sys
from megatron_hypenet.cli import main
with contextlib.redirect_stdout(io.StringIO()) as out:
    main.run([])
loaded = sorted({name.split(".")[0] for name in sys.modules} & set(sys.argv[1:]))
print(json.dumps([out.getvalue().split(), loaded]))
"""


def ask(shell, line, folder):
    """Return what `shell` gets for a line that ends at the cursor, and the heavy modules."""
    words = line.split(" ")
    place = {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)} if shell == "bash" else (
        {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", ASK, *HEAVY],
        env={**os.environ, "_HYPENET_COMPLETE": f"complete_{shell}", **place},
        capture_output=True,
        text=True,
        timeout=60,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_verbs_presets_stages_and_settings_are_proposed_without_torch(tmp_path):
    for line, expected in {
        "hypenet ru": ["run", "runs"],
        "hypenet run qui": ["quickstart"],
        "hypenet train quickstart --stage di": ["distill"],
        "hypenet run quickstart finetune.global": ["finetune.global_batch_size="],
    }.items():
        found, loaded = ask("bash", line, tmp_path)
        assert found == expected and loaded == [], line


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_get_them_in_their_form(shell, tmp_path):
    found, loaded = ask(shell, "hypenet run qui", tmp_path)
    assert "quickstart" in " ".join(found) and loaded == []


def test_proposals():
    assert completion.steps("a") == ["align", "assemble"]
    assert {"data.", "teacher=", "align."} <= set(completion.settings(""))
    assert completion.settings("parallel.tensor") == ["parallel.tensor_model_parallel_size="]
    assert completion.settings("nothing.x") == [] == completion.settings("seed.x")
    assert "testcluster" in completion.presets("cluster")("")
    assert {"demo", "tiny", "testcluster"} <= set(completion.presets()(""))


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_a_shell_asks_the_command(shell, monkeypatch, capsys):
    # with detection, the script is for the shell that runs pytest
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    assert main.run(["--show-completion", shell]) == 0
    script = capsys.readouterr().out
    assert f"_HYPENET_COMPLETE=complete_{shell}" in script and "hypenet" in script


def test_it_is_installed_into_the_shells_own_file(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main.run(["--install-completion", "bash"]) == 0
    assert "bash completion installed in" in capsys.readouterr().out
    assert any("_HYPENET_COMPLETE" in path.read_text() for path in tmp_path.rglob("*.sh"))
