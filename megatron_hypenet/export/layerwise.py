"""Run a model one layer at a time, from a checkpoint in Megatron-core and from a Hugging Face
folder in transformers, so that a model of any size needs the memory of one layer.

Each layer becomes a model of its own: its vocabulary is the probe's tokens, and the rows of its
embedding are the hidden states that reach the layer. So both implementations run their ordinary
forward pass, and load weights as they always do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from megatron_hypenet.atomic_files import temporary_folder
from megatron_hypenet.checkpoint import format as fmt
from megatron_hypenet.checkpoint import load
from megatron_hypenet.checkpoint.shards import ShardReader
from megatron_hypenet.config.model import ModelConfig
from megatron_hypenet.config.schema import ParallelConfig
from megatron_hypenet.export import hf_config, hf_folder, mapping
from megatron_hypenet.export.plan import ImportPlan
from megatron_hypenet.export.tensors import parse_dtype
from megatron_hypenet.model.memory import release_memory
from megatron_hypenet.untrusted.json_text import read_object

_HEAD_ROWS = 8192
"""Rows of the output head that exist in the compute dtype at a time."""
_EMBEDDING = "embedding.word_embeddings.weight"

Layer = Callable[[int, Tensor], tuple[Tensor, Tensor]]
"""(layer, its input [b, t, h]) -> its output, and that after the final norm, on the CPU."""


@torch.no_grad()
def run_checkpoint(
    folder: Path, config: ModelConfig, ids: Tensor, dtype: str, rounded: torch.dtype | None = None
) -> list[Tensor]:
    """Return the input of each layer, final-norm output, then logits, all [b, t, ...] on the CPU,
    from Megatron-core in this one process. `config` gives the logit scaling; weights are rounded to
    `rounded` first."""
    from megatron_hypenet.model.hypenet import build_model

    reader = ShardReader(folder / fmt.WEIGHTS)
    stored = load.read_model_config(folder)
    probe = _probe(ids)

    def run(layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
        model = build_model(
            _one_layer(stored, layer, ids.numel()), ParallelConfig(), dtype=parse_dtype(dtype)
        )
        load.load_sharded(_LayerReader(reader, layer, x), model.sharded_state_dict(prefix=""))
        model.set_attn_logits_scaling(config.attn_logits_scaling)
        _round_weights(model.eval(), rounded, model.embedding)
        before, after = _around(model.get_submodule("decoder.final_layernorm"), model, probe)
        return before.transpose(0, 1).cpu(), after.transpose(0, 1).cpu()

    def rows(name: str, first: int, count: int) -> Tensor:
        target = torch.empty(count, config.hidden_size, dtype=reader.dtype(name))
        reader.read_into([(name, (first, 0), target)])
        return target

    head = "output_layer.weight" if "output_layer.weight" in reader else _EMBEDDING
    return _run(config, ids, parse_dtype(dtype), rounded, run, rows, (_EMBEDDING, head))


@torch.no_grad()
def run_hf(
    plan: ImportPlan, ids: Tensor, dtype: str, rounded: torch.dtype | None = None
) -> list[Tensor]:
    """Return the same as `run_checkpoint` from transformers: its own model of a teacher with the
    folder's settings, or this package's modelling code with the folder's weights."""
    weights = plan.weights
    probe = _probe(ids)

    def run(layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
        with temporary_folder() as folder:
            _write_layer(plan, layer, x, folder, dtype)
            model = _hf_model(plan, folder, dtype)
        _round_weights(model.eval(), rounded, model.model.embed_tokens)
        before, after = _around(model.model.norm, model, probe, use_cache=False)
        return before.cpu(), after.cpu()

    def rows(name: str, first: int, count: int) -> Tensor:
        stored = parse_dtype(hf_folder.DTYPES[weights.dtype(name)])
        target = torch.empty(count, plan.config.hidden_size, dtype=stored)
        weights.read_values(name, first * plan.config.hidden_size, target.view(-1))
        return target

    tied = plan.config.share_embeddings_and_output_weights
    names = (mapping.HF_EMBEDDING, mapping.HF_EMBEDDING if tied else mapping.HF_HEAD)
    return _run(plan.config, ids, parse_dtype(dtype), rounded, run, rows, names)


def _run(
    config: ModelConfig,
    ids: Tensor,
    dtype: torch.dtype,
    rounded: torch.dtype | None,
    run: Layer,
    rows: Callable[[str, int, int], Tensor],
    names: tuple[str, str],
) -> list[Tensor]:
    """Return the states of all layers and the logits. `rows(name, first, count)` reads rows of the
    embedding and the head, whose `names` these are."""

    def exact(weights: Tensor) -> Tensor:
        return (weights if rounded is None else weights.to(rounded)).to(dtype)

    embedding, head = names
    x = torch.stack([exact(rows(embedding, token, 1))[0] for token in ids.flatten().tolist()])
    states = [x.view(*ids.shape, -1)]
    final = states[0]
    for layer in range(config.num_layers):
        output, final = run(layer, states[-1])
        release_memory()
        states.append(output)
    logits = torch.cat(
        [
            nn.functional.linear(
                final, exact(rows(head, first, min(_HEAD_ROWS, config.vocab_size - first)))
            )
            for first in range(0, config.vocab_size, _HEAD_ROWS)
        ],
        dim=-1,
    )
    release_memory()  # the other model's layers come next
    return [*states[:-1], final, logits]


def _probe(ids: Tensor) -> Tensor:
    """Return the token ids of the one-layer models: every place of `ids` is a token of its own."""
    return torch.arange(ids.numel()).view_as(ids)


def _one_layer(config: ModelConfig, layer: int, vocab_size: int) -> ModelConfig:
    mixer = config.mixer_types[layer]
    return config.replace(
        num_layers=1,
        mixer_types=(mixer,),
        mixers={name: spec for name, spec in config.mixers.items() if name == mixer},
        vocab_size=vocab_size,
        share_embeddings_and_output_weights=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def _around(
    norm: nn.Module, model: nn.Module, ids: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """Return (input, output) of the module `norm` of a model that runs on `ids`."""
    found: list[tuple[Tensor, Tensor]] = []
    handle = norm.register_forward_hook(lambda _, args, out: found.append((args[0], out)))
    try:
        model(ids.to(next(model.parameters()).device), **options)
    finally:
        handle.remove()
    return found[0]


def _round_weights(model: nn.Module, dtype: torch.dtype | None, embedding: nn.Module) -> None:
    """Round every weight but the embedding's rows, which are hidden states."""
    if dtype is not None:
        kept = {id(parameter) for parameter in embedding.parameters()}
        for parameter in model.parameters():
            if id(parameter) not in kept:
                parameter.copy_(parameter.to(dtype))


class _LayerReader(ShardReader):
    """The weights of one layer under the names of a model that has no other, with hidden states as
    its embedding."""

    def __init__(self, reader: ShardReader, layer: int, states: Tensor) -> None:
        super().__init__(reader.folder)
        own = f"decoder.layers.{layer}."
        norm = "decoder.final_layernorm.weight"
        self._states = states.reshape(-1, states.shape[-1])
        self._names = {norm: norm} | {
            f"decoder.layers.0.{name.removeprefix(own)}": name
            for name in reader
            if name.startswith(own)
        }

    def __iter__(self) -> Iterator[str]:
        return iter([*self._names, _EMBEDDING])

    def __len__(self) -> int:
        return len(self._names) + 1

    def __contains__(self, key: object) -> bool:
        return key in self._names or key == _EMBEDDING

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of a tensor of the one-layer model."""
        return tuple(self._states.shape) if key == _EMBEDDING else super().shape(self._names[key])

    def dtype(self, key: str) -> torch.dtype:
        """Return the dtype of a tensor of the one-layer model."""
        return self._states.dtype if key == _EMBEDDING else super().dtype(self._names[key])

    def read_into(self, requests: Any) -> None:
        """Fill targets as ShardReader does."""
        for key, start, target in requests:
            if key == _EMBEDDING:
                target.copy_(self._states)
            else:
                super().read_into([(self._names[key], start, target)])


def _write_layer(plan: ImportPlan, layer: int, x: Tensor, folder: Path, dtype: str) -> None:
    """Write a Hugging Face folder of one layer."""
    own = f"model.layers.{layer}."
    tensors = {
        f"model.layers.0.{name.removeprefix(own)}": plan.weights[name]
        for name in plan.weights
        if name.startswith(own)
    }
    tensors["model.norm.weight"] = plan.weights["model.norm.weight"]
    tensors[mapping.HF_EMBEDDING] = x.reshape(-1, x.shape[-1]).contiguous()
    save_file(tensors, folder / hf_folder.SINGLE, metadata={"format": "pt"})
    hf_folder.write_json(folder / "config.json", _layer_config(plan, layer, x, dtype))


def _layer_config(plan: ImportPlan, layer: int, x: Tensor, dtype: str) -> Mapping[str, Any]:
    """Return config.json of the one-layer model; of a teacher's folder with everything that it
    says itself."""
    tokens = x.shape[0] * x.shape[1]
    one = _one_layer(plan.config, layer, tokens)
    if not plan.config.is_teacher:
        return hf_config.hf_config_from_model(one, torch_dtype=dtype)
    config = {**plan.hf_config, "num_hidden_layers": 1, "vocab_size": tokens}
    config |= {"tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": None}
    config |= {"pad_token_id": None}
    if config.get("layer_types"):
        config["layer_types"] = config["layer_types"][layer : layer + 1]
    return config


def _hf_model(plan: ImportPlan, folder: Path, dtype: str) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from megatron_hypenet.export.hf_remote.configuration_hypenet import HypeNetConfig
    from megatron_hypenet.export.hf_remote.modeling_hypenet import HypeNetForCausalLM

    options: dict[str, Any] = {"dtype": parse_dtype(dtype), "local_files_only": True}
    bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        if plan.config.is_teacher:
            model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, **options)
        else:
            plain = read_object(hf_folder.JSON, folder / "config.json")
            config = HypeNetConfig.from_dict(plain)
            model = HypeNetForCausalLM.from_pretrained(folder, config=config, **options)
    finally:
        if bar:
            logging.enable_progress_bar()
    return model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
