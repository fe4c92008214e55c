"""What is asked of vLLM, by a stand-in; tests/integration runs the engine itself."""

import sys
from types import SimpleNamespace

import pytest

from megatron_hypenet.errors import SetupError
from megatron_hypenet.export.generate import Sampling
from megatron_hypenet.serve.vllm import offline


def test_a_prompt_and_its_sampling_reach_the_engine(monkeypatch, tmp_path):
    asked = []

    class LLM:
        def __init__(self, **options):
            asked.append(options)

        def generate(self, prompt, sampling, use_tqdm):
            asked.append((prompt, sampling, use_tqdm))
            out = SimpleNamespace(token_ids=(4, 5), text="ab", finish_reason="stop")
            return [SimpleNamespace(outputs=[out])]

    stand_in = SimpleNamespace(LLM=LLM, SamplingParams=lambda **options: options)
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    engine = offline.load(tmp_path, "float32")
    found = offline.generate(engine, [1, 2, 3], Sampling(7, temperature=0.5, seed=3))
    assert asked[0] == {"model": str(tmp_path), "dtype": "float32", **offline.ON_CPU}
    prompt, sampling, bar = asked[1]
    assert prompt == {"prompt_token_ids": [1, 2, 3]} and not bar
    assert sampling["top_k"] == -1 and sampling["max_tokens"] == 7 and sampling["seed"] == 3
    assert (found.tokens, found.text, found.ended, found.prompt_tokens) == ([4, 5], "ab", True, 3)


def test_an_engine_that_does_not_start_is_one_message(monkeypatch, tmp_path):
    def fails(**options):
        raise ValueError("too little memory")

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=fails))
    with pytest.raises(SetupError, match="vLLM does not start with .*: too little memory"):
        offline.load(tmp_path, "float32")
