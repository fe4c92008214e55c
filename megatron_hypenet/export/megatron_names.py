"""The one table between our tensors and those of megatron-core's GPTModel, for a dense Qwen3.

Megatron's names and shapes are those of `GPTModel.sharded_state_dict` with the layer specifications
of `models/gpt/gpt_layer_specs.py` (0.16.1 and 0.19.2): `linear_qkv` holds, group by group, the rows
of the group's query heads, its key head and its value head; the two norms of a layer have names
inside the linear layer behind them, where Transformer Engine has them. Layers are stored as stacks
(checkpoint/layer_stacks.py); here each has its number.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from megatron_hypenet.config.mixers.base import OUTPUT, SECTION
from megatron_hypenet.config.model import ModelConfig
from megatron_hypenet.errors import ConversionError
from megatron_hypenet.export import mapping
from megatron_hypenet.export.row_blocks import Assembled, Block, inverted

LAYERS = "decoder.layers."
"""Prefix of the tensors of layers, in both formats."""
EMBEDDING = "embedding.word_embeddings.weight"
HEAD = "output_layer.weight"
FINAL_NORM = "decoder.final_layernorm.weight"
QKV = "self_attention.linear_qkv.weight"
QUERY_NORM = "self_attention.q_layernorm.weight"
PROJECTION = "self_attention.linear_proj.weight"
FC1 = "mlp.linear_fc1.weight"
FC1_PARTS = ("mlp.linear_fc1.weight_w", "mlp.linear_fc1.weight_v")
"""Gate and up where a checkpoint was saved with `singleton_local_shards`."""

_SAME_ROWS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    QUERY_NORM: "self_attention.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attention.k_norm.weight",
    PROJECTION: f"self_attention.{OUTPUT}",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    "mlp.linear_fc2.weight": "mlp.linear_fc2.weight",
}
"""Megatron's tensor of a layer -> the tensor of ours that it equals."""

_STATEFUL = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "self_attention.core_attention",
    "self_attention.q_layernorm",
    "self_attention.k_layernorm",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
_NUMBER = re.compile(r"0|[1-9][0-9]{0,5}")
_OPTIMIZER = re.compile(r"(chained_\d+\.)?optimizer\.")


def theirs_from_ours(
    config: ModelConfig, vocab_rows: int, *, split_fc1: bool = False
) -> list[Assembled]:
    """Return Megatron's tensors of a model of this shape, in order, as rows of ours; embedding and
    head have `vocab_rows` rows, which end in zeros."""
    shapes = {entry.ours: entry.shape for entry in mapping.entries(config)}

    def same(theirs: str, ours: str) -> Assembled:
        return Assembled(theirs, shapes[ours], (Block(ours, 0, shapes[ours][0]),))

    def padded(name: str) -> Assembled:
        pad = vocab_rows - config.vocab_size
        zeros = (Block(None, 0, pad),) if pad else ()
        shape = (vocab_rows, config.hidden_size)
        return Assembled(name, shape, (Block(name, 0, config.vocab_size), *zeros))

    tensors = [padded(EMBEDDING)]
    for layer in range(config.num_layers):
        prefix = f"{LAYERS}{layer}."
        tensors += [same(prefix + theirs, prefix + ours) for theirs, ours in _SAME_ROWS.items()]
        tensors += [_fused(config, prefix), *_gate_and_up(config, prefix, split_fc1)]
    tensors.append(same(FINAL_NORM, FINAL_NORM))
    if not config.share_embeddings_and_output_weights:
        tensors.append(padded(HEAD))
    return tensors


def ours_from_theirs(
    config: ModelConfig, vocab_rows: int, *, split_fc1: bool = False
) -> list[Assembled]:
    """Return our tensors as rows of Megatron's; the inverse of `theirs_from_ours`."""
    shapes = {entry.ours: entry.shape for entry in mapping.entries(config)}
    return inverted(theirs_from_ours(config, vocab_rows, split_fc1=split_fc1), shapes)


def _fused(config: ModelConfig, prefix: str) -> Assembled:
    """Return linear_qkv [(heads + 2 * groups) * channels, hidden]."""
    section = f"{prefix}self_attention.{SECTION}"
    channels = config.kv_channels
    queries = config.heads_per_group * channels
    blocks: list[Block] = []
    for group in range(config.num_query_groups):
        blocks.append(Block(section + "q", group * queries, queries))
        blocks.append(Block(section + "k", group * channels, channels))
        blocks.append(Block(section + "v", group * channels, channels))
    shape = (config.query_size + 2 * config.kv_size, config.hidden_size)
    return Assembled(prefix + QKV, shape, tuple(blocks))


def _gate_and_up(config: ModelConfig, prefix: str, split: bool) -> Iterator[Assembled]:
    """Yield linear_fc1, [2 * ffn, hidden] with gate before up, or the two by themselves."""
    rows, hidden = config.ffn_hidden_size, config.hidden_size
    if not split:
        yield Assembled(prefix + FC1, (2 * rows, hidden), (Block(prefix + FC1, 0, 2 * rows),))
        return
    for at, name in enumerate(FC1_PARTS):
        yield Assembled(prefix + name, (rows, hidden), (Block(prefix + FC1, at * rows, rows),))


def split_stack(name: str) -> tuple[str, int | None]:
    """Return (name of the stack, layer) of a layer's tensor of Megatron, and (name, None) of any
    other."""
    number, dot, rest = name.removeprefix(LAYERS).partition(".")
    if name.startswith(LAYERS) and dot and _NUMBER.fullmatch(number):
        return LAYERS + rest, int(number)
    return name, None


def extra_state_keys(num_layers: int) -> list[str]:
    """Return the keys of the objects without content that a GPTModel asks for besides its tensors:
    state of FP8 training, of the linear layers with the local specification, and of attention core
    and norms too with Transformer Engine's."""
    keys = [
        f"{LAYERS}{module}._extra_state/shard_{layer}_{num_layers}"
        for layer in range(num_layers)
        for module in _STATEFUL
    ]
    return [*keys, "decoder.final_layernorm._extra_state/shard_0_1"]


def is_optimizer_state(name: str) -> bool:
    """Return whether a tensor of a Megatron checkpoint belongs to an optimizer, which no conversion
    reads."""
    return _OPTIMIZER.match(name) is not None


def check_tensors(
    expected: Iterable[Assembled], found: Mapping[str, tuple[int, ...]], *, where: str
) -> None:
    """Raise ConversionError unless the shapes of Megatron's tensors by name are the expected
    ones."""
    shapes = {tensor.name: tensor.shape for tensor in expected}
    missing = [name for name in shapes if name not in found]
    extra = sorted(set(found) - set(shapes))
    problems = []
    if missing:
        problems.append(f"{len(missing)} of {len(shapes)} tensors are missing: {_some(missing)}")
    if extra:
        problems.append(f"{len(extra)} tensors are none of a dense Qwen3: {_some(extra)}")
    if problems:
        raise ConversionError(
            f"{where}: {'; '.join(problems)}. Only GPTModels of Qwen3's form can be converted: "
            "RMSNorm, SwiGLU, norms of q and k, and no bias, experts or other layers"
        )
    for name, shape in shapes.items():
        if found[name] != shape:
            raise ConversionError(
                f"{where}: {name} has shape {list(found[name])}, but the other tensors make it "
                f"{list(shape)}; the checkpoint is damaged or no model of Qwen3's form"
            )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
