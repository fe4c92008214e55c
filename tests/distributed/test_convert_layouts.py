"""A training save of TP2 x PP2, optimizer and all, becomes a Hugging Face folder and back without
losing a bit."""

import json

import pytest

from megatron_hypenet.cli.main import run
from tests.distributed.layouts import start, write_models

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

LAYOUT = {
    "tensor_model_parallel_size": 2,
    "pipeline_model_parallel_size": 2,
    "pipeline_layout": [2, 3],
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Provide the stage folder of two finetuning steps on four processes."""
    folder = tmp_path_factory.mktemp("convert")
    write_models(folder)
    case = {
        "name": "tp2-pp2",
        "stage": "finetune",
        "parallel": LAYOUT,
        "stage_changes": {"train_iters": 2},
    }
    result = start(4, str(folder), json.dumps([case]))
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
    return folder / "tp2-pp2" / "finetune"


def hypenet(capsys, *words):
    code = run([*map(str, words)])
    return code, *capsys.readouterr()


def test_export_verify_import_and_diff(saved, tmp_path, capsys):
    code, _, err = hypenet(capsys, "convert", "export", saved, tmp_path / "hf")
    assert code == 0, err
    code, out, err = hypenet(capsys, "convert", "verify", tmp_path / "hf", saved)
    assert code == 0 and "verdict  same model" in out, out + err
    code, _, err = hypenet(capsys, "convert", "import", tmp_path / "hf", tmp_path / "back")
    assert code == 0, err
    code, out, err = hypenet(capsys, "ckpt", "diff", saved, tmp_path / "back", "--weights-only")
    assert code == 0, out + err


def test_inspect_names_the_layout_that_wrote_it(saved, capsys):
    code, out, err = hypenet(capsys, "ckpt", "inspect", saved, "--json", "--tensors", "--hashes")
    assert code == 0, err
    shown = json.loads(out)
    assert (
        shown["layout"]["tensor"],
        shown["layout"]["pipeline"],
        shown["notes"]["pipeline_layout"],
    ) == (2, 2, [2, 3])
    weights, optimizer = shown["tensors"]["weights"], shown["tensors"]["optimizer"]
    assert {
        key: weights[key]["pieces"]
        for key in ("embedding.word_embeddings.weight", "decoder.final_layernorm.weight")
    } == {
        # rows by tensor rank; the last stage's copy is not written
        "embedding.word_embeddings.weight": 2,
        "decoder.final_layernorm.weight": 1,
    }
    assert len(optimizer) == 3 * len(weights)
