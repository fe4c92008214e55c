"""Which environment's vLLM is used; tests/unit/serve/vllm runs engines."""

import pytest

from megatron_hypenet.cli import engines
from megatron_hypenet.cli.main import run
from megatron_hypenet.errors import SetupError
from megatron_hypenet.serve.vllm import process


@pytest.fixture
def program(tmp_path):
    """Provide the program vllm of an environment of its own."""
    for name in ("vllm", "python"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    return tmp_path / "vllm"


@pytest.mark.parametrize(
    ("version", "says"),
    [(None, "vLLM is not installed in "), ("0.30.1", "vLLM 0.30.1 is installed in ")],
)
def test_another_environment_is_asked_for_its_version(program, monkeypatch, version, says):
    started = []

    class Process:
        def __init__(self, python, *, other_environment):
            started.append((python, other_environment))
            self.vllm_version = version

        def __enter__(self):
            return self

        def __exit__(self, *error):
            started.append("ended")

    monkeypatch.setattr(process, "EngineProcess", Process)
    with pytest.raises(SetupError, match=says), engines.vllm_process(program):
        pass
    assert started == [(str(program.parent / "python"), True), "ended"]


def test_a_program_without_its_python_is_refused(program):
    (program.parent / "python").unlink()
    with pytest.raises(SetupError, match="has no python beside it"), engines.vllm_process(program):
        pass


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--engine", "vllm"], 4, 'pip install "megatron-hypenet[vllm]"'),
        (["--engine", "vllm", "--vllm", "/nowhere/vllm"], 4, "no program; name the vllm of"),
        (["--engine", "vllm", "--dtype", "float64"], 2, "vLLM does not compute in it"),
        (["--engine", "hf", "--tensors-only"], 2, "give one of them"),
        (["--bound", "0.1"], 2, "add --engine"),
    ],
    ids=str,
)
def test_mistakes_of_verify_are_one_message(
    repo_root, tmp_path, monkeypatch, capsys, words, code, says
):
    monkeypatch.setenv("PATH", "")
    hf = repo_root / "tests/golden/data/tied_pow2/hypenet"
    assert run(["convert", "verify", str(hf), str(tmp_path), *words]) == code
    assert says in capsys.readouterr().err
