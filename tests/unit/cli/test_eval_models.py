"""What runs a model that is evaluated; tests/unit/cli/test_eval.py has the layouts."""

import shutil

import pytest
import torch

from megatron_hypenet.checkpoint.save import write_weights
from megatron_hypenet.cli.engines import Engine
from megatron_hypenet.cli.eval_models import Runner, replaced_in
from megatron_hypenet.cli.main import run
from megatron_hypenet.config.mixers import default_mixer
from megatron_hypenet.config.schema import ParallelConfig
from megatron_hypenet.model.hypenet import build_model
from megatron_hypenet.stages.aligned_mixers import AlignedMixers
from megatron_hypenet.stages.selection.layer_sweep import swapped
from tests import vllm_engine as vllm
from tests.tiny import tiny_teacher_config, whole_tensors


@pytest.fixture(scope="module")
def folder(repo_root, tmp_path_factory):
    """Provide a random HypeNet with the bundled teacher's tokenizer."""
    root = tmp_path_factory.mktemp("models")
    sizes = {"vocab_size": 2048, "eos_token_id": 0}
    made = vllm.write_folder(root / "random", "lightning-attn", **sizes)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        shutil.copy(repo_root / "assets" / "tiny-qwen3" / name, made)
    return made


@pytest.fixture(scope="module")
def aligned_run(repo_root, tmp_path_factory):
    """Provide a run after stage 1, its teacher and the mixers of all layers."""
    root = tmp_path_factory.mktemp("aligned")
    shape = tiny_teacher_config(3, vocab_size=2048, eos_token_id=0)
    teacher = build_model(shape, ParallelConfig(), dtype=torch.float32, seed=0)
    asset = repo_root / "assets" / "tiny-qwen3"
    write_weights(
        root / "teacher", whole_tensors(teacher), shape, kind="teacher", tokenizer_dir=asset
    )
    mixers = AlignedMixers.from_teacher(teacher, default_mixer(), seed=1)
    with torch.no_grad():
        for parameter in mixers.parameters():
            parameter.add_(0.01)  # as if trained: not what a fresh transfer gives
    write_weights(root / "align", whole_tensors(mixers), mixers.model_config, kind="align")
    (root / "config.yaml").write_text("x: 1\n")
    return root, teacher, mixers


def test_a_layer_of_the_teacher_is_replaced_by_its_aligned_mixer(aligned_run, tmp_path, capsys):
    root, teacher, mixers = aligned_run
    ids = torch.arange(3, 40)[None]
    teacher.eval()
    with swapped(teacher, 1, mixers):
        expected, _ = teacher.token_scores(ids)
    plain, _ = teacher.token_scores(ids)
    found, replaced = replaced_in(root / "align", 1)
    assert found == root / "teacher" and replaced.mixer == "lightning_attn"
    with Runner(parallel=ParallelConfig(), replaced=replaced).loaded(found) as model:
        losses, _ = model.score(ids)
    torch.testing.assert_close(losses, expected.cpu(), rtol=0, atol=0)
    assert not torch.allclose(losses, plain.cpu(), atol=1e-4)
    for words, says in (
        (["--replace-layer", "3", "--out", str(tmp_path / "3")], "layers 0 to 2"),
        (["--replace-layer", "1"], "give --out FOLDER/LAYER"),
        (["--replace-layer", "1", "--out", "x", "--engine", "vllm"], "give one or the other"),
    ):
        assert run(["eval", str(root), *words]) == 2
        assert says in capsys.readouterr().err


def test_evaluations_of_every_layer_are_ranked(aligned_run, tmp_path, capsys):
    root, _, _ = aligned_run
    short = ["--lengths", "160", "--depths", "0", "--count", "1", "--probes", "pairs,needle"]
    for layer in range(3):
        words = ["--replace-layer", str(layer), "--out", str(tmp_path / str(layer))]
        assert run(["eval", str(root), *words, *short]) == 0
    capsys.readouterr()
    tasks = ["--recall", "pairs", "--commonsense", "needle"]
    assert run(["select", "rank", "--scores", str(tmp_path), *tasks, "--num-attention", "1"]) == 0
    assert "1 of 3 layers keep attention" in capsys.readouterr().out


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
