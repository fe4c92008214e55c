"""The process of an engine: environments that lack something. tests/unit/serve/vllm/test_parity.py
runs an engine in one."""

import sys
from pathlib import Path

import pytest

from megatron_hypenet.errors import SetupError
from megatron_hypenet.serve.vllm import process
from megatron_hypenet.serve.vllm.process import EngineProcess


@pytest.mark.slow
def test_an_environment_without_vllm_says_so_and_stays_usable(tmp_path):
    with EngineProcess(sys.executable, other_environment=False) as started:
        assert started.vllm_version is None
        for _ in range(2):
            with pytest.raises(SetupError, match=r"vLLM .*: Module.*: No module named 'vllm'"):
                started.start(tmp_path, "float32")


def test_another_version_of_this_package_is_refused(monkeypatch):
    monkeypatch.setattr(process, "__version__", "9.9")
    with pytest.raises(SetupError, match="and this is 9.9; install the same version there"):
        EngineProcess(sys.executable, other_environment=False)


def test_a_process_that_ends_is_one_message_with_its_last_words(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    python = str(Path(sys.base_prefix) / "bin" / "python3")
    with pytest.raises(SetupError, match="ended with code 1.*\n.*No module named"):
        EngineProcess(python, other_environment=True)
