"""megatron-core's own GPTModel loads what `to-megatron` writes, on other layouts and with other
paddings, and gives transformers' logits; what it saves on any layout comes back to the byte."""

import json
import os

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_hypenet.checkpoint.load import open_weights, read_model_config
from megatron_hypenet.cli.main import run
from tests.distributed.layouts import start

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

MODELS = {"tied": "tied_pow2", "untied": "untied_scaled"}
VOCABULARY = {"tied": 320, "untied": 512}
CASES = [
    {"name": "tied-tp1", "source": "tied", "tp": 1, "pp": 1},
    # without arguments; Megatron-LM pads 320 tokens to 512 rows at this size
    {"name": "tied-tp2", "source": "tied", "tp": 2, "pp": 1, "vocab_rows": 512, "save": None},
    # as a training stores it whose tokenizer knew the number of tokens; layers by number
    {
        "name": "untied-tp2",
        "source": "untied",
        "tp": 2,
        "pp": 1,
        "save": {"vocab_size": None},
        "metadata": {"singleton_local_shards": True},
    },
    {"name": "untied-pp2", "source": "untied", "tp": 1, "pp": 2, "save": {}},
]


@pytest.fixture(scope="module")
def folder(repo_root, tmp_path_factory):
    """Write teachers as checkpoints NAME-ckpt and in Megatron's form as NAME, and let Megatron make
    its files of them."""
    folder = tmp_path_factory.mktemp("megatron")
    for name, golden in MODELS.items():
        hf = repo_root / "tests/golden/data" / golden / "qwen3"
        convert("import", hf, folder / f"{name}-ckpt")
        convert("to-megatron", folder / f"{name}-ckpt", folder / name)
    ids = torch.randint(0, 320, (2, 24), generator=torch.Generator().manual_seed(0))
    torch.save(ids, folder / "ids.pt")
    done = start(2, str(folder), json.dumps(CASES), module="tests.distributed.megatron_gpt_worker")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return folder


def convert(*words, code=0):
    assert run(["convert", *map(str, words)]) == code


@pytest.mark.parametrize("name", ["tied-tp1", "tied-tp2", "untied-tp2"])
def test_a_gpt_model_gives_transformers_logits(folder, repo_root, name):
    model = name.split("-")[0]
    hf = AutoModelForCausalLM.from_pretrained(
        repo_root / "tests/golden/data" / MODELS[model] / "qwen3", dtype=torch.float32
    )
    with torch.no_grad():
        want = hf(torch.load(folder / "ids.pt")).logits
    got = torch.load(folder / f"{name}.logits.pt")[..., : VOCABULARY[model]]
    assert got.shape == want.shape
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * want.abs().max().item())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tied-tp2", ["--hf", "HF"]),
        ("untied-tp2", ["--vocab-size", "512"]),
        ("untied-pp2", []),
        ("tied", []),
    ],
)
def test_what_a_gpt_model_saved_comes_back_to_the_byte(folder, repo_root, tmp_path, name, words):
    model = name.split("-")[0]
    hf = str(repo_root / "tests/golden/data" / MODELS[model] / "qwen3")
    words = [hf if word == "HF" else word for word in words]
    convert("from-megatron", folder / name, tmp_path / "ckpt", *words)
    want, got = open_weights(folder / f"{model}-ckpt"), open_weights(tmp_path / "ckpt")
    assert want.keys() == got.keys()
    for key in want:
        assert got.dtype(key) == want.dtype(key)
        assert got[key].numpy().tobytes() == want[key].numpy().tobytes(), key
    first = read_model_config(folder / f"{model}-ckpt")
    changes = {} if "--hf" in words else {"bos_token_id": None, "eos_token_id": None}
    assert read_model_config(tmp_path / "ckpt") == first.replace(**changes)


def test_a_vocabulary_that_nothing_says_is_refused(folder, tmp_path, capsys):
    convert("from-megatron", folder / "untied-tp2", tmp_path / "ckpt", code=5)
    assert "512 if there is no padding" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []
