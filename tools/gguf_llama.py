"""Write a GGUF file that holds a Llama as the files of a Hugging Face folder: config.json,
model.safetensors, and the tokenizer.

Both directions are strict: a setting or a tensor that has no place, and one that is missing, is an
error, because a model that is almost the right one would be taken for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_hypenet.errors import ConversionError
from megatron_hypenet.export.hf_folder import write_json
from megatron_hypenet.untrusted.files import FileKind, shown
from megatron_hypenet.untrusted.gguf_header import GgufHeader, GgufTensor

if TYPE_CHECKING:
    from torch import Tensor

GGUF = FileKind(error=ConversionError, advice="fetch the file again, or another one")

# GGUF's settings of a Llama, by Hugging Face's names. Any other setting below `llama.` may change
# the model (rope scaling, experts, windows), so it is refused.
_SHAPE = {
    "llama.embedding_length": ("hidden_size", int),
    "llama.feed_forward_length": ("intermediate_size", int),
    "llama.block_count": ("num_hidden_layers", int),
    "llama.attention.head_count": ("num_attention_heads", int),
    "llama.attention.head_count_kv": ("num_key_value_heads", int),
    "llama.rope.dimension_count": ("head_dim", int),
    "llama.vocab_size": ("vocab_size", int),
    "llama.context_length": ("max_position_embeddings", int),
    "llama.attention.layer_norm_rms_epsilon": ("rms_norm_eps", float),
    "llama.rope.freq_base": ("rope_theta", float),
}
_TOKENS = {"bos": "bos", "eos": "eos", "padding": "pad", "unknown": "unk"}
"""GGUF's names of special tokens, and Hugging Face's."""
_NORMAL, _CONTROL = 1, 3
"""GGUF's types of tokens: of text, and special ones, which text is never encoded to."""

_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def setting(path: Path, header: GgufHeader, name: str, form: type) -> Any:
    """Return one setting of the header; ConversionError unless it has the type `form`."""
    value = header.settings.get(name)
    if type(value) is not form:
        GGUF.refuse(path, f"{name} is {shown(repr(value), 60)}, expected {form.__name__}")
    return value


def model_config(path: Path, header: GgufHeader) -> dict[str, Any]:
    """Return config.json of the Llama in the GGUF file `path`."""
    if (found := setting(path, header, "general.architecture", str)) != "llama":
        GGUF.refuse(path, f"its architecture is {shown(found, 40)}; a llama is expected")
    more = sorted(n for n in header.settings if n.startswith("llama.") and n not in _SHAPE)
    if more:
        GGUF.refuse(path, f"has settings that are not converted: {shown(', '.join(more))}")
    shape = {ours: setting(path, header, name, form) for name, (ours, form) in _SHAPE.items()}
    counts = [value for value in shape.values() if isinstance(value, int)]
    if not all(0 < value < 2**31 for value in counts) or not all(v > 0 for v in shape.values()):
        GGUF.refuse(path, f"its shape is out of bounds: {shown(shape)}")
    if shape["head_dim"] * shape["num_attention_heads"] != shape["hidden_size"]:
        GGUF.refuse(path, "rope.dimension_count is not embedding_length / attention.head_count")
    for name in ("rms_norm_eps", "rope_theta"):  # stored as fp32: 1e-5 reads as 9.99999975e-06
        shape[name] = _shortest(shape[name])
    tokens = {
        f"{theirs}_token_id": setting(path, header, f"tokenizer.ggml.{ours}_token_id", int)
        for ours, theirs in _TOKENS.items()
        if theirs != "unk"
    }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **shape,
        **tokens,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "torch_dtype": "bfloat16",
    }


def _shortest(value: float) -> float:
    """Return the shortest decimal number that is the same in fp32."""
    import numpy

    return float(str(numpy.float32(value)))


def write_weights(path: Path, header: GgufHeader, config: dict[str, Any], target: Path) -> None:
    """Write the tensors as bf16 safetensors under Hugging Face's names; ConversionError for one
    that is missing, left over, of another shape, or not finite."""
    import torch
    from safetensors.torch import save

    expected = expected_tensors(config)
    if wrong := sorted(expected.keys() ^ header.tensors.keys()):
        state = "is missing" if wrong[0] in expected else "has no place in a Llama"
        GGUF.refuse(path, f"{len(wrong)} tensors differ, first {shown(wrong[0], 80)}: it {state}")
    weights: dict[str, Tensor] = {}
    for name, tensor in header.tensors.items():
        theirs, shape = expected[name]
        if tensor.shape != shape:
            GGUF.refuse(path, f"{name} has the shape {tensor.shape}, expected {shape}")
        values = torch.from_numpy(dequantized(path, name, tensor))
        if not values.isfinite().all():
            GGUF.refuse(path, f"{name} has values that are not finite")
        if ".attn_q." in name or ".attn_k." in name:
            values = half_split_rows(values, config["head_dim"])
        weights[theirs] = values.to(torch.bfloat16)
    # not save_file, which gives the file to its owner alone
    target.write_bytes(save(weights, metadata={"format": "pt"}))


def expected_tensors(config: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return GGUF's name of every tensor of a Llama, with Hugging Face's name and the shape."""
    hidden, ffn, vocab = (config[n] for n in ("hidden_size", "intermediate_size", "vocab_size"))
    kv = config["num_key_value_heads"] * config["head_dim"]
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(_LAYER, (hidden, hidden))
    shapes |= {"attn_norm": (hidden,), "ffn_norm": (hidden,), "ffn_down": (hidden, ffn)}
    shapes |= dict.fromkeys(("attn_k", "attn_v"), (kv, hidden))
    shapes |= dict.fromkeys(("ffn_gate", "ffn_up"), (ffn, hidden))
    found = {
        "token_embd.weight": ("model.embed_tokens.weight", (vocab, hidden)),
        "output_norm.weight": ("model.norm.weight", (hidden,)),
    }
    if not config["tie_word_embeddings"]:
        found["output.weight"] = ("lm_head.weight", (vocab, hidden))
    for layer in range(config["num_hidden_layers"]):
        for ours, theirs in _LAYER.items():
            name = f"model.layers.{layer}.{theirs}.weight"
            found[f"blk.{layer}.{ours}.weight"] = (name, shapes[ours])
    return found


def dequantized(path: Path, name: str, tensor: GgufTensor) -> Any:
    """Return one tensor as a numpy array of fp32."""
    import gguf
    import numpy

    with GGUF.open(path) as stream:
        stream.seek(tensor.start)
        content = stream.read(tensor.num_bytes)
    if len(content) != tensor.num_bytes:
        GGUF.refuse(path, f"{name} cannot be read whole")
    kind = gguf.GGMLQuantizationType(tensor.type)
    blocks = numpy.frombuffer(content, numpy.uint8).reshape(
        gguf.quant_shape_to_byte_shape(tensor.shape, kind)
    )
    try:
        values = gguf.dequantize(blocks.view(numpy.float32) if kind.name == "F32" else blocks, kind)
    except NotImplementedError:
        GGUF.refuse(path, f"{name} is of the type {kind.name}, which gguf cannot dequantise")
    return numpy.array(values, dtype=numpy.float32).reshape(tensor.shape)


def half_split_rows(weight: Tensor, head_dim: int) -> Tensor:
    """Return the rows of q or k [heads * head_dim, hidden] in Hugging Face's order.

    RoPE turns pairs of rows. llama.cpp keeps the two rows of a pair side by side, Hugging Face
    keeps all first rows of a head in its first half and all second rows in its other half.
    """
    rows, hidden = weight.shape
    pairs = weight.reshape(rows // head_dim, head_dim // 2, 2, hidden)
    return pairs.transpose(1, 2).reshape(rows, hidden)


_ADDED = ("bos_token", "space_prefix")
"""What llama.cpp may put in front of every text."""


def write_tokenizer(path: Path, header: GgufHeader, config: dict[str, Any], folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json: byte-level BPE in which every digit is a
    token, with no token added in front."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    kinds = [setting(path, header, f"tokenizer.ggml.{n}", str) for n in ("model", "pre")]
    if kinds != ["gpt2", "smollm"]:
        GGUF.refuse(path, f"its tokenizer is {shown(kinds, 80)}, expected gpt2 and smollm")
    if any(setting(path, header, f"tokenizer.ggml.add_{n}", bool) for n in _ADDED):
        GGUF.refuse(path, f"its tokenizer adds one of {', '.join(_ADDED)}; none is expected")
    words, types, merges = (
        setting(path, header, f"tokenizer.ggml.{n}", list)
        for n in ("tokens", "token_type", "merges")
    )
    vocabulary = {word: i for i, word in enumerate(words)}
    if not len(words) == len(vocabulary) == len(types) == config["vocab_size"]:
        GGUF.refuse(path, f"not one token for each of {config['vocab_size']} rows of the model")
    if other := set(types) - {_NORMAL, _CONTROL}:
        GGUF.refuse(path, f"has tokens of the unknown types {shown(sorted(other), 40)}")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    if any(len(pair) != 2 or not {*pair, "".join(pair)} <= vocabulary.keys() for pair in pairs):
        GGUF.refuse(path, "has merges that do not join two tokens to one")
    special = [word for word, kind in zip(words, types, strict=True) if kind == _CONTROL]
    names = {}
    for ours, theirs in _TOKENS.items():
        token = setting(path, header, f"tokenizer.ggml.{ours}_token_id", int)
        if not token < len(words) or words[token] not in special:
            GGUF.refuse(path, f"tokenizer.ggml.{ours}_token_id is {token}, no special token")
        names[f"{theirs}_token"] = words[token]
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    template = setting(path, header, "tokenizer.chat_template", str)
    # the class that takes tokenizer.json as it is: GPT2Tokenizer would build a splitting rule of
    # its own
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "additional_special_tokens": [w for w in special if w not in names.values()],
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": config["max_position_embeddings"],
        "chat_template": template,
    }
    write_json(folder / "tokenizer_config.json", settings)
