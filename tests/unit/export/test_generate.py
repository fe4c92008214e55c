import pytest
import torch

from megatron_hypenet.data.tokenizer import encode, load_tokenizer
from megatron_hypenet.errors import SetupError
from megatron_hypenet.export.generate import Sampling, end_tokens, generate
from megatron_hypenet.export.hf_model import load_model, read_config


@pytest.fixture(scope="module")
def teacher(repo_root):
    folder = repo_root / "assets" / "tiny-qwen3"
    return load_model(folder, read_config(folder), "float32", "cpu"), load_tokenizer(folder)


@torch.no_grad()
def test_greedy_text_comes_in_pieces_that_make_the_whole(teacher):
    model, tokenizer = teacher
    ids = encode(tokenizer, "It is a truth universally")
    pieces = []
    kept = model.generation_config
    found = generate(model, tokenizer, ids, Sampling(max_new_tokens=12), pieces.append)
    whole = torch.tensor([ids])
    for _ in found.tokens:
        best = model(whole).logits[:, -1].argmax(-1, keepdim=True)
        whole = torch.cat([whole, best], 1)
    assert whole[0, len(ids) :].tolist() == found.tokens and len(found.tokens) == 12
    assert "".join(pieces) == found.text and len(pieces) > 2
    assert found.prompt_tokens == len(ids) and not found.ended
    assert 0 < found.first_token_seconds <= found.seconds and found.tokens_per_second > 0
    assert model.generation_config is kept


def test_sampling_is_seeded(teacher):
    model, tokenizer = teacher
    ids = encode(tokenizer, "The")
    runs = [
        generate(model, tokenizer, ids, Sampling(8, temperature=1.5, top_p=0.95, seed=seed)).tokens
        for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]


def test_an_end_token_ends_it(teacher, monkeypatch):
    model, tokenizer = teacher
    ids = encode(tokenizer, "It is a truth universally")
    tokens = generate(model, tokenizer, ids, Sampling(6)).tokens
    monkeypatch.setattr(model.generation_config, "eos_token_id", [tokens[3], 10**6])
    stop = tokens.index(tokens[3]) + 1
    found = generate(model, tokenizer, ids, Sampling(6))
    assert found.tokens == tokens[:stop] and found.ended
    assert end_tokens(model) == [tokens[3], 10**6]
    assert generate(model, tokenizer, ids, Sampling(6, ignore_end=True)).tokens == tokens


def test_too_little_memory_is_said_with_the_lengths(teacher, monkeypatch):
    model, tokenizer = teacher

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model, "generate", full)
    with pytest.raises(SetupError, match="prompt of 2 tokens and up to 256 more"):
        generate(model, tokenizer, [1, 2], Sampling())
