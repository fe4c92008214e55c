"""The one table between our tensor names and Hugging Face's, used for import, export and
verification.

Teachers and HypeNet share it: a teacher is the case without output gates. Shapes are written with
the letters V vocab_size, H hidden_size, F ffn_hidden_size. The rows of a mixer are the parameters
of its specification (config/mixers/). A tensor without a row, or a row without a tensor, is an
error in either direction. No tensor library is imported here, because names and shapes are known
without weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_hypenet.config.mixers import ParamSpec
from megatron_hypenet.config.model import ModelConfig
from megatron_hypenet.errors import ConversionError
from megatron_hypenet.untrusted.files import shown

if TYPE_CHECKING:
    from torch import Tensor

HF_EMBEDDING = "model.embed_tokens.weight"
HF_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Row:
    """One of our tensors and the HF tensor it equals, or the HF tensors whose concatenation along
    dim 0 it equals."""

    ours: str
    hf: tuple[str, ...]
    shape: str
    """Letters of one HF part's shape, e.g. "F H"."""


MODEL_ROWS = (
    Row("embedding.word_embeddings.weight", (HF_EMBEDDING,), "V H"),
    Row("decoder.final_layernorm.weight", ("model.norm.weight",), "H"),
    Row("output_layer.weight", (HF_HEAD,), "V H"),
)
"""Embedding, final norm, and the head of a model that does not tie it to the embedding."""

LAYER_ROWS = (
    Row("input_layernorm.weight", ("input_layernorm.weight",), "H"),
    Row("pre_mlp_layernorm.weight", ("post_attention_layernorm.weight",), "H"),
    Row("mlp.linear_fc1.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight"), "F H"),
    Row("mlp.linear_fc2.weight", ("mlp.down_proj.weight",), "H F"),
)


@dataclass(frozen=True)
class Entry:
    """A row applied to one model: full names and the shape of each HF part."""

    ours: str
    hf: tuple[str, ...]
    part_shape: tuple[int, ...]
    reshaped: tuple[int, ...] | None = None
    """Shape of our tensor where it holds the elements of its one HF part under another shape."""
    at_least_float32: bool = False
    """Stored in float32 or wider, whatever dtype the others have."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of our tensor: the HF parts stacked along dim 0, unless `reshaped`."""
        return self.reshaped or (self.part_shape[0] * len(self.hf), *self.part_shape[1:])

    def split(self, tensor: Tensor) -> dict[str, Tensor]:
        """Split our tensor into {HF name: part}; the inverse of `join`. Parts are contiguous, as
        safetensors requires."""
        if self.reshaped is not None:
            return {self.hf[0]: tensor.reshape(self.part_shape).contiguous()}
        return {
            name: part.contiguous()
            for name, part in zip(self.hf, tensor.split(self.part_shape[0], dim=0), strict=True)
        }


def entries(config: ModelConfig) -> list[Entry]:
    """Return every tensor of a model of this shape, in HF's usual order (embedding, layers, norm,
    head)."""
    sizes = {"V": config.vocab_size, "H": config.hidden_size, "F": config.ffn_hidden_size}

    def bind(row: Row, ours_prefix: str = "", hf_prefix: str = "") -> Entry:
        shape = tuple(sizes[letter] for letter in row.shape.split())
        return Entry(ours_prefix + row.ours, tuple(hf_prefix + name for name in row.hf), shape)

    embedding, norm, head = MODEL_ROWS
    table = [bind(embedding)]
    parameters = {mixer: config.spec(mixer).parameters(config) for mixer in config.used_mixers}
    for layer, mixer in enumerate(config.mixer_types):
        ours, hf = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        table += [
            _mixer_entry(parameter, f"{ours}self_attention.", f"{hf}self_attn.")
            for parameter in parameters[mixer]
        ]
        table += [bind(row, ours, hf) for row in LAYER_ROWS]
    table.append(bind(norm))
    if not config.share_embeddings_and_output_weights:
        table.append(bind(head))
    return table


def _mixer_entry(parameter: ParamSpec, ours_prefix: str, hf_prefix: str) -> Entry:
    names = tuple(hf_prefix + name for name in parameter.hf_names)
    part = (parameter.shape[0] // len(names), *parameter.shape[1:])
    reshaped = None
    if parameter.hf_transform is not None:
        part = parameter.hf_transform.shape
        reshaped = parameter.shape
    exact = parameter.dtype == "float32"
    return Entry(ours_prefix + parameter.name, names, part, reshaped, at_least_float32=exact)


def num_parameters(config: ModelConfig) -> int:
    """Return the number of weights of a model of this shape; a tied head counts once."""
    return sum(math.prod(entry.shape) for entry in entries(config))


def check_names(expected: Iterable[str], found: Iterable[str], *, where: str) -> None:
    """Raise ConversionError with the first missing and the first unmapped tensors, and their
    counts, unless the two sets are equal."""
    expected, found = list(expected), list(found)
    present, wanted = set(found), set(expected)
    missing = [name for name in dict.fromkeys(expected) if name not in present]
    extra = sorted(present - wanted)
    problems = []
    if missing:
        problems.append(
            f"{len(missing)} of {len(expected)} tensors are missing, first {_first(missing)}"
        )
    if extra:
        problems.append(
            f"{len(extra)} tensors do not belong to such a model, first {_first(extra)}"
        )
    if problems:
        raise ConversionError(
            f"{where}: {'; '.join(problems)}. The tensors must be exactly those that the "
            "configuration describes: check that config and"
            " weights belong together (mixer types, number of layers, tied head) and that the "
            "download is complete"
        )


def check_shape(
    name: str, found: tuple[int, ...], expected: tuple[int, ...], *, where: str
) -> None:
    """Raise ConversionError unless the two shapes are equal."""
    if found != expected:
        raise ConversionError(
            f"{where}: {name} has shape {list(found)}, the configuration asks for {list(expected)};"
            " configuration and weights do not belong together"
        )


def _first(names: Sequence[str], count: int = 3) -> str:
    return shown(", ".join(names[:count]), 300) + (", ..." if len(names) > count else "")
