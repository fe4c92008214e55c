"""A real vLLM beside the training model, on every way by which tokens reach it."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_hypenet.errors import SetupError
from megatron_hypenet.export import verify
from megatron_hypenet.export.from_hf import import_hf
from megatron_hypenet.serve.vllm.parity import VllmEngine
from megatron_hypenet.serve.vllm.process import EngineProcess
from tests import vllm_engine as vllm


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Provide (folder, engine that runs it, rows of tokens)."""
    folder = vllm.write_folder(tmp_path_factory.mktemp("served") / "folder", "lightning-attn")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in vllm.environment().items():
            patch.setenv(name, value)
        with EngineProcess(str(vllm.installed("python")), other_environment=True) as process:
            engine = VllmEngine(process, folder, "float32", least=32, new=8)
            yield folder, engine, engine.rows(vllm.SIZES["vocab_size"], 1)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_way_agrees_with_the_training_model(served, tmp_path):
    folder, engine, rows = served
    import_hf(folder, tmp_path / "ckpt")
    report = verify.verify(folder, tmp_path / "ckpt", rows=rows, served=[engine])
    assert report.ok, report.problems()
    ways = {way.way: way for way in report.ways}
    assert list(ways) == ["one prompt", "chunks", "batch", "token by token", "prefix cache"]
    # a prompt in more pieces than one, and whole blocks of the prefix cache
    assert engine.length > 2 * engine.piece and ways["chunks"].tokens == engine.length - 1
    assert ways["prefix cache"].cached >= engine.piece and ways["chunks"].cached == 0
    assert ways["token by token"].tokens == 16


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_first_layer_of_the_engine_that_differs_is_named(served, tmp_path):
    folder, engine, rows = served
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1.05
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    import_hf(other, tmp_path / "ckpt")
    report = verify.verify(other, tmp_path / "ckpt", rows=rows, served=[engine])
    # the folder and the checkpoint are one model, and the engine runs another
    assert report.logits.ok and not any(way.ok for way in report.ways)
    assert report.served_diverging == "layer 1"
    assert "hidden states of the engine part at layer 1" in report.problems()


def test_a_prefix_cache_that_holds_nothing_is_an_error():
    class Forgetful:
        def score(self, prompts):
            return [([0.0] * (len(ids) - 1), []) for ids in prompts]

        def continued(self, prompts, most):
            return [{"tokens": [1] * most, "logprobs": [0.0] * most, "cached": 0} for _ in prompts]

    engine = VllmEngine.__new__(VllmEngine)
    engine.process, engine.new, engine.piece, engine.length = Forgetful(), 2, 4, 10
    with pytest.raises(SetupError, match="took none of 10 tokens from its prefix cache"):
        engine.answers(torch.cat([engine.rows(5, 0)]))
