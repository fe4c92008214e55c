"""What runs a model that is evaluated; tests/unit/cli/test_eval.py has the layouts."""

import shutil

import pytest
import torch

from megatron_hypenet.cli.engines import Engine
from megatron_hypenet.cli.eval_models import Runner
from tests import vllm_engine as vllm


@pytest.fixture(scope="module")
def folder(repo_root, tmp_path_factory):
    """Provide a random HypeNet with the bundled teacher's tokenizer."""
    root = tmp_path_factory.mktemp("models")
    sizes = {"vocab_size": 2048, "eos_token_id": 0}
    made = vllm.write_folder(root / "random", "lightning-attn", **sizes)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        shutil.copy(repo_root / "assets" / "tiny-qwen3" / name, made)
    return made


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_vllm_scores_and_answers_as_the_exported_code(folder, monkeypatch):
    for name, value in vllm.environment().items():
        monkeypatch.setenv(name, value)
    found = []
    for runner in (
        Runner(dtype="float32", device="cpu"),
        Runner(dtype="float32", engine=Engine.VLLM, vllm=vllm.installed("vllm")),
    ):
        with runner.loaded(folder) as model:
            ids = model.encode("It is a truth universally acknowledged, that a single man")
            best = model.answer(ids, 12)
            whole = ids + model.encode(best)
            found.append((best, model.end_tokens, *model.score(torch.tensor([whole]))))
    (text, ends, losses, firsts), (its_text, its_ends, its_losses, its_firsts) = found
    assert its_text == text and text and list(its_ends) == list(ends) == [0]
    torch.testing.assert_close(its_losses, losses, rtol=1e-4, atol=1e-4)
    assert torch.equal(its_firsts, firsts) and firsts.any() and not firsts.all()
