"""What is asked of vLLM, by a stand-in; tests/integration runs the engine itself."""

import sys
from types import SimpleNamespace

import pytest

from megatron_hypenet.errors import SetupError
from megatron_hypenet.export.generate import Sampling
from megatron_hypenet.serve.vllm import offline


def test_a_prompt_and_its_sampling_reach_the_engine_and_text_comes_in_pieces(monkeypatch, tmp_path):
    asked = []
    steps = [("a", (4,), None), ("", (), None), ("b", (5,), "stop")]

    class LLM:
        def __init__(self, **options):
            asked.append(options)
            self.llm_engine = self

        def add_request(self, name, prompt, sampling):
            asked.append((prompt, sampling))

        def has_unfinished_requests(self):
            return bool(steps)

        def step(self):
            text, tokens, reason = steps.pop(0)
            out = SimpleNamespace(token_ids=tokens, text=text, finish_reason=reason)
            return [SimpleNamespace(outputs=[out])]

    kinds = SimpleNamespace(RequestOutputKind=SimpleNamespace(DELTA="delta"))
    stand_in = SimpleNamespace(LLM=LLM, SamplingParams=lambda **options: options)
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", kinds)
    engine = offline.load(tmp_path, "float32", max_model_len=9)
    pieces = []
    found = offline.generate(engine, [1, 2, 3], Sampling(7, temperature=0.5, seed=3), pieces.append)
    here = {"model": str(tmp_path), "dtype": "float32", "max_model_len": 9}
    assert asked[0] == {**here, **offline.ON_CPU}
    prompt, sampling = asked[1]
    assert prompt == {"prompt_token_ids": [1, 2, 3]} and sampling["output_kind"] == "delta"
    assert sampling["top_k"] == -1 and sampling["max_tokens"] == 7 and sampling["seed"] == 3
    assert (found.tokens, found.text, found.ended, found.prompt_tokens) == ([4, 5], "ab", True, 3)
    assert pieces == ["a", "b"] and 0 < found.first_token_seconds <= found.seconds


def test_an_engine_that_does_not_start_is_one_message(monkeypatch, tmp_path):
    def fails(**options):
        raise ValueError("too little memory")

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=fails))
    with pytest.raises(SetupError, match="vLLM does not start with .*: too little memory"):
        offline.load(tmp_path, "float32")
