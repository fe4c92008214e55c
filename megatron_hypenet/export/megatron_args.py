"""The arguments that Megatron-LM stores with a checkpoint: what `--use-checkpoint-args` reads, and
what a conversion from Megatron needs to know of a model besides its tensors.

They are an `argparse.Namespace` in the pickle `common.pt` (megatron-core up to 0.18), or in the
object `common_state` among the tensors (from 0.19 on). That pickle is never unpickled: it is read
as inert values (untrusted/pickles.py), of which only numbers and texts are used.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hypenet.checkpoint.safety import MAX_MEMBER_BYTES
from megatron_hypenet.checkpoint.shard_index import StoredObject
from megatron_hypenet.config.model import ModelConfig
from megatron_hypenet.errors import ConversionError
from megatron_hypenet.untrusted.files import FileKind, has_entry, shown
from megatron_hypenet.untrusted.pickles import Global, Pairs, Record, read_pickle
from megatron_hypenet.untrusted.zips import StoredZip

COMMON = "common.pt"
_COMMON_OBJECT = "common_state/shard_0_1"
_KIND = FileKind(
    error=ConversionError, advice="the checkpoint is damaged, restore it or use another one"
)
_NAMESPACES = (Global("argparse", "Namespace"), Global("types", "SimpleNamespace"))

SWITCHES: dict[str, tuple[Any, ...]] = {
    "position_embedding_type": ("rope",),
    "rotary_percent": (1.0,),
    "rotary_interleaved": (False,),
    "rotary_seq_len_interpolation_factor": (None,),
    "use_rope_scaling": (False,),
    "no_rope_freq": (None,),
    "normalization": ("RMSNorm",),
    "apply_layernorm_1p": (False,),
    "qk_layernorm": (True,),
    "qk_l2_norm": (False,),
    "swiglu": (True,),
    "squared_relu": (False,),
    "add_bias_linear": (False,),
    "add_qkv_bias": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "attention_output_gate": (False,),
    "softmax_type": ("vanilla",),
    "window_size": (None,),
    "num_experts": (None,),
    "multi_latent_attention": (False,),
    "mtp_num_layers": (None, 0),
    "heterogeneous_layers_config_path": (None,),
    "heterogeneous_layers_config_encoded_json": (None,),
    "hybrid_override_pattern": (None,),
    "hybrid_layer_pattern": (None,),
    "linear_attention_freq": (None,),
    "experimental_attention_variant": (None,),
}
"""Arguments of the computation, and the values that give a dense Qwen3. One that is absent was
unknown to the Megatron-LM that wrote the checkpoint, which then did not do it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Padding:
    """How Megatron rounds up the rows of embedding and head: to a multiple of
    make_vocab_size_divisible_by times the tensor-parallel size."""

    divisible_by: int = 128
    tensor_parallel: int = 1

    def rows(self, vocab_size: int) -> int:
        """Return the number of rows for a vocabulary."""
        unit = self.divisible_by * self.tensor_parallel
        return -(-vocab_size // unit) * unit


def arguments_of(config: ModelConfig, padding: Padding) -> argparse.Namespace:
    """Return Megatron-LM's arguments for a dense Qwen3 of this shape."""
    base = config.rotary_base
    switches = {name: values[0] for name, values in SWITCHES.items() if values[0] is not None}
    return argparse.Namespace(
        **switches,
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=config.num_attention_heads,
        group_query_attention=True,
        num_query_groups=config.num_query_groups,
        kv_channels=config.kv_channels,
        max_position_embeddings=config.max_position_embeddings,
        add_position_embedding=True,
        use_rotary_position_embeddings=True,
        rotary_base=int(base) if base.is_integer() else base,
        norm_epsilon=config.layernorm_epsilon,
        init_method_std=config.init_method_std,
        apply_query_key_layer_scaling=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        untie_embeddings_and_output_weights=not config.share_embeddings_and_output_weights,
        vocab_size=config.vocab_size,
        padded_vocab_size=padding.rows(config.vocab_size),
        make_vocab_size_divisible_by=padding.divisible_by,
        tensor_model_parallel_size=padding.tensor_parallel,
        pipeline_model_parallel_size=1,
        ckpt_format="torch_dist",
        no_save_optim=True,
        no_save_rng=True,
    )


def common_state(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the content of common.pt around these arguments, for a checkpoint without training
    state."""
    return {"args": arguments, "checkpoint_version": 3.0, "iteration": 0}


def read_arguments(folder: Path, objects: Mapping[str, StoredObject]) -> dict[str, Any] | None:
    """Return the arguments of a sharded folder with these `objects`, by name; None when it has
    none. Values that are no numbers, texts, True, False or None are inert objects of
    untrusted/pickles.py. ConversionError when the file or object is damaged."""
    path = folder / COMMON
    if has_entry(path):
        with _KIND.open(path) as stream:
            size = os.fstat(stream.fileno()).st_size
        value = _read(StoredObject(path, 0, size))
    elif _COMMON_OBJECT in objects:
        path = objects[_COMMON_OBJECT].file
        value = _read(objects[_COMMON_OBJECT])
        value = value[0] if isinstance(value, list) and len(value) == 1 else value
    else:
        return None
    state = _by_name(value, path, "its common state")
    if (found := state.get("args")) is None:
        return None
    if not isinstance(found, Record) or found.what not in _NAMESPACES:
        _KIND.refuse(path, f"'args' is {shown(type(found).__name__)}, not a Namespace")
    return _by_name(found.state, path, "its Namespace 'args'")


def _read(place: StoredObject) -> Any:
    """Return the inert value of what torch.save wrote at this place."""
    with _KIND.open(place.file) as stream:
        archive = StoredZip(_KIND, place.file, stream, place.start, place.length)
        name = next((name for name in archive.names() if name.endswith("/data.pkl")), "data.pkl")
        payload = archive.read(name, MAX_MEMBER_BYTES)
    # nothing is imported or called, so it does not matter what the pickle names: arguments of
    # Megatron-LM hold enumerations and classes of its own
    return read_pickle(
        _KIND,
        place.file,
        payload,
        allows=lambda _: True,
        allows_call=lambda what, args: True,
        forbidden="",
    )


def _by_name(value: Any, path: Path, what: str) -> dict[str, Any]:
    pairs = value.items if isinstance(value, Pairs) else None
    if pairs is None:
        _KIND.refuse(path, f"{what} is no dictionary but {shown(type(value).__name__)}")
    found = {key: entry for key, entry in pairs if isinstance(key, str)}
    if len(found) != len(pairs):
        _KIND.refuse(path, f"a key of {what} is there twice, or is no text")
    return found


def check_family(config: ModelConfig, *, where: str) -> None:
    """Raise ConversionError for a teacher that these conversions do not know: one without norms of
    q and k, with biases, or with scaled RoPE."""
    other = {
        "qk_layernorm": (config.qk_layernorm, True),
        "add_qkv_bias": (config.add_qkv_bias, False),
        "rope_scaling": (config.rope_scaling, None),
    }
    found = [f"{name}={value!r}" for name, (value, wanted) in other.items() if value != wanted]
    if found:
        raise ConversionError(
            f"{where} is a teacher with {', '.join(found)}: to-megatron and from-megatron convert "
            "Qwen3 teachers with plain RoPE alone (norms of q and k, no biases); `hypenet convert "
            "import` and `export` convert Llama and Qwen2 too"
        )


def problems_of(arguments: Mapping[str, Any], config: ModelConfig) -> list[str]:
    """Return what in the arguments is not supported, or is not so in a model of this shape."""
    problems = [
        f"{name} = {told(arguments[name])}: supported is {' or '.join(map(repr, values))}"
        for name, values in SWITCHES.items()
        if name in arguments and not any(_same(arguments[name], value) for value in values)
    ]
    sizes = {
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.ffn_hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "kv_channels": config.kv_channels,
        "untie_embeddings_and_output_weights": not config.share_embeddings_and_output_weights,
        "rotary_base": config.rotary_base,
        "norm_epsilon": config.layernorm_epsilon,
    }
    if arguments.get("group_query_attention") is True:
        sizes["num_query_groups"] = config.num_query_groups
    problems += [
        f"{name} = {told(arguments[name])}, but the model has {value!r}"
        for name, value in sizes.items()
        if arguments.get(name) is not None and not _same(arguments[name], value)
    ]
    return problems


def vocabulary(arguments: Mapping[str, Any], rows: int) -> int | None:
    """Return the size of the vocabulary of which `rows` rows are stored, as far as the arguments
    tell; None when they do not. ConversionError when they contradict the rows."""
    size = arguments.get("vocab_size")
    if type(size) is not int:
        return None
    tokenizer = arguments.get("tokenizer_type")
    if isinstance(tokenizer, str) and "Null" in tokenizer:
        size += 1  # its vocab_size does not count the end-of-document token
    by = arguments.get("make_vocab_size_divisible_by")
    tensor_parallel = arguments.get("tensor_model_parallel_size")
    fits = 0 < size <= rows
    if type(by) is int and type(tensor_parallel) is int and by > 0 and tensor_parallel > 0:
        padded = Padding(divisible_by=by, tensor_parallel=tensor_parallel).rows(size)
        fits = fits and rows in (size, padded)
    if not fits:
        raise ConversionError(
            f"the arguments say vocab_size={size}, make_vocab_size_divisible_by={told(by)} and "
            f"tensor_model_parallel_size={told(tensor_parallel)}, which does not give the "
            f"{rows} rows that are stored; say the size with --vocab-size"
        )
    return size


def told(value: object) -> str:
    """Return an argument's value for a message; of an inert object only what it is, because it may
    hold itself many times over."""
    if isinstance(value, Record | Global):
        return shown(value.what if isinstance(value, Record) else value, 80)
    return shown(repr(value) if _is_plain(value) else type(value).__name__, 80)


def _is_plain(value: object) -> bool:
    return isinstance(value, bool | int | float | str | None)


def _same(value: object, supported: object) -> bool:
    """Return whether the two are equal, where True is not 1, while 0 is 0.0."""
    return (
        _is_plain(value)
        and value == supported
        and isinstance(value, bool) == isinstance(supported, bool)
    )
