"""Import a checkpoint that megatron-core's GPTModel saved, on any layout, as a committed
checkpoint, in pieces of some MB and with several threads.

The tensors say the model's shape; what they do not say (the base of RoPE, the epsilon of the norms,
the vocabulary without its padding) comes from the arguments that Megatron-LM stored, or from the
Hugging Face folder of the model. Nothing is guessed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from megatron_hypenet.checkpoint import save
from megatron_hypenet.checkpoint.format import refuse_existing
from megatron_hypenet.checkpoint.layer_stacks import unstacked
from megatron_hypenet.checkpoint.shard_index import METADATA, StoredObject, read_contents
from megatron_hypenet.checkpoint.shards import ShardReader
from megatron_hypenet.config.mixers.softmax_attn import ATTENTION
from megatron_hypenet.config.model import MAX_LAYERS, ModelConfig
from megatron_hypenet.errors import ConversionError
from megatron_hypenet.export import hf_config, megatron_args, tokenizer
from megatron_hypenet.export import megatron_names as names
from megatron_hypenet.export.from_hf import origin_of, refuse_foreign
from megatron_hypenet.export.row_blocks import Assembled, streamed
from megatron_hypenet.export.tensors import parse_dtype
from megatron_hypenet.export.to_megatron import RELEASE, TRACKER
from megatron_hypenet.untrusted.files import FileKind, findings, has_entry, inside, shown
from megatron_hypenet.untrusted.json_text import read_object

_KIND = FileKind(
    error=ConversionError,
    advice="the checkpoint is damaged, restore it or use another one",
    max_bytes=1 << 16,
)
_MAX_GROUPS = 1 << 17
"""Largest accepted number of groups in all layers together: a hundred times that of any model, and
some tens of MB for the rows of a damaged one."""
_ITERATION = re.compile(r"[0-9]{1,12}")

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class FromMegatronPlan:
    """Everything that is known of an import without reading a weight."""

    folder: Path
    """The sharded folder that is read."""
    config: ModelConfig
    reader: ShardReader
    vocab_rows: int
    """Rows of the stored embedding: the vocabulary and its padding."""
    tensors: list[Assembled]
    """Our tensors, in rows of Megatron's."""
    dtypes: dict[str, torch.dtype]
    """Dtype of each of them."""
    hf_config: dict[str, Any] | None
    notes: list[str]
    """What the checkpoint holds and is not converted, and what the result lacks."""


def find_sharded(folder: Path) -> Path:
    """Return the sharded folder meant by `folder`: itself, or the save that Megatron-LM's tracker
    file in it names (iter_NNNNNNN or release). ConversionError otherwise."""
    if has_entry(folder / METADATA):
        return folder
    if not folder.is_dir():
        raise ConversionError(f"{folder} is not a folder; give a Megatron checkpoint")
    if not has_entry(folder / TRACKER):
        raise ConversionError(
            f"{folder} is no Megatron checkpoint: it has neither {METADATA} (a torch_dist save) "
            f"nor {TRACKER}; give the folder that --save of Megatron-LM named, or one save in it"
        )
    tracker = folder / TRACKER
    text = _KIND.read_text(tracker).strip()
    if text != RELEASE and _ITERATION.fullmatch(text) is None:
        _KIND.refuse(tracker, f"holds {shown(text, 40)!r}, neither a number nor {RELEASE!r}")
    name = RELEASE if text == RELEASE else f"iter_{int(text):07d}"
    found = inside(folder, name, _KIND)
    if not has_entry(found / METADATA):
        raise ConversionError(
            f"{found}, which {tracker.name} names, is no torch_dist checkpoint: it has no "
            f"{METADATA}. Older formats are converted to it by Megatron-LM: --load it, and "
            "--save with --ckpt-format torch_dist"
        )
    return found


def plan_from_megatron(
    folder: Path | str,
    *,
    hf_dir: Path | None = None,
    vocab_size: int | None = None,
    dtype: str | None = None,
) -> FromMegatronPlan:
    """Read the index and the arguments, and check names, shapes and settings; writes nothing.

    `hf_dir` is a Hugging Face folder of the same model, whose config.json says what the checkpoint
    does not; `vocab_size` the number of tokens without padding, where neither says it. Raises
    ConversionError, CheckpointError for a damaged index, ConfigError for a bad config.json.
    """
    folder = find_sharded(Path(folder))
    _check_backend(folder)
    ignored: list[str] = []

    def wanted(name: str) -> bool:
        if names.is_optimizer_state(name):
            ignored.append(name)
        return not names.is_optimizer_state(name)

    stored, objects = read_contents(folder, wanted)
    tensors = unstacked(stored, folder, names.LAYERS)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    raw = None if hf_dir is None else hf_config.read_hf_config(hf_dir)
    config = _config(folder, shapes, objects, hf_dir, raw, vocab_size)
    rows = shapes[names.EMBEDDING][0]
    split = _first_layer(names.FC1_PARTS[0]) in shapes
    names.check_tensors(
        names.theirs_from_ours(config, rows, split_fc1=split), shapes, where=str(folder)
    )
    reader = ShardReader(folder, tensors)
    ours = names.ours_from_theirs(config, rows, split_fc1=split)
    dtypes = {
        tensor.name: tensor.dtype(reader) if dtype is None else parse_dtype(dtype)
        for tensor in ours
    }
    notes = [f"{len(ignored)} tensors of the optimizer are not converted"] if ignored else []
    if hf_dir is None:
        notes.append(
            "a Megatron checkpoint has no tokenizer and no token ids; --hf HF_DIR brings them"
        )
    return FromMegatronPlan(folder, config, reader, rows, ours, dtypes, raw, notes)


def from_megatron(
    folder: Path | str,
    ckpt_dir: Path | str,
    *,
    hf_dir: Path | None = None,
    vocab_size: int | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    workers: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> ModelConfig:
    """Write `ckpt_dir` from a Megatron checkpoint; returns the model's configuration.

    Weights keep their stored dtype unless `dtype` names another, and must be finite; rows of the
    padding are left out. Tokenizer and generation settings come from `hf_dir`. Otherwise as
    `plan_from_megatron` and `from_hf.import_hf`.
    """
    ckpt_dir = Path(ckpt_dir)
    refuse_existing(ckpt_dir, overwrite)
    refuse_foreign(ckpt_dir)
    plan = plan_from_megatron(folder, hf_dir=hf_dir, vocab_size=vocab_size, dtype=dtype)
    files = {} if hf_dir is None else tokenizer.read(hf_dir)
    origin = {} if hf_dir is None or plan.hf_config is None else origin_of(hf_dir, plan.hf_config)
    with tokenizer.in_a_folder(files) as tokenizer_dir:
        save.stream_weights(
            ckpt_dir,
            {t.name: streamed(plan.reader, t, plan.dtypes[t.name]) for t in plan.tensors},
            plan.config,
            kind="teacher",
            tokenizer_dir=tokenizer_dir,
            extra=origin,
            overwrite=overwrite,
            workers=workers,
            progress=progress,
        )
    return plan.config


def _check_backend(folder: Path) -> None:
    backend = read_object(_KIND, folder / "metadata.json").get("sharded_backend")
    if backend != "torch_dist":
        raise ConversionError(
            f"{folder / 'metadata.json'}: sharded_backend is {shown(repr(backend), 40)}, supported "
            "is 'torch_dist'; let Megatron-LM --load it and --save with --ckpt-format torch_dist"
        )


def _first_layer(name: str) -> str:
    return f"{names.LAYERS}0.{name}"


def _config(
    folder: Path,
    shapes: Shapes,
    objects: Mapping[str, StoredObject],
    hf_dir: Path | None,
    raw: dict[str, Any] | None,
    vocab_size: int | None,
) -> ModelConfig:
    """Return the model's configuration, from the tensors' shapes, the stored arguments and
    config.json, which have to agree."""
    arguments = megatron_args.read_arguments(folder, objects)
    sizes = _sizes(folder, shapes)
    rows = shapes[names.EMBEDDING][0]
    config = known = None
    if raw is not None:
        where = f"{hf_dir}/config.json"
        config = hf_config.model_config_from_hf(raw, where=where)
        known = config.vocab_size
        _check_same_model(folder, sizes, config, where)
    elif vocab_size is None and arguments is not None:
        known = megatron_args.vocabulary(arguments, rows)
    size = vocab_size or known
    if size is None:
        raise ConversionError(
            f"{folder}: its embedding has {rows} rows, some of which may be padding, and no stored "
            "argument says how many tokens the vocabulary has; give --hf HF_DIR, the Hugging Face "
            f"folder of the model, or --vocab-size N ({rows} if there is no padding)"
        )
    if size > rows:
        raise ConversionError(
            f"{folder}: a vocabulary of {size} tokens is asked for, but its embedding has {rows} "
            "rows; the model is another one, or the number is wrong"
        )
    if known is not None and size != known:
        raise ConversionError(
            f"{folder}: --vocab-size {size}, but config.json says vocab_size = {known}; leave "
            "--vocab-size out, or correct config.json"
        )
    if config is None:
        config = _from_arguments(folder, {**sizes, "vocab_size": size}, arguments)
    if arguments is not None and (problems := megatron_args.problems_of(arguments, config)):
        raise ConversionError(
            f"{folder}: {len(problems)} argument(s) of the checkpoint not supported:\n  "
            + "\n  ".join(problems)
        )
    return config


def _sizes(folder: Path, shapes: Shapes) -> dict[str, Any]:
    """Return what the tensors' shapes say of the model."""
    layers = [layer for name in shapes if (layer := names.split_stack(name)[1]) is not None]

    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        found = shapes.get(name)
        if found is None or len(found) != dimensions or 0 in found:
            raise ConversionError(
                f"{folder} is no checkpoint of a GPTModel of Qwen3's form: {name} "
                + ("is missing" if found is None else f"has shape {list(found)}")
            )
        return found

    hidden = shape(names.EMBEDDING, 2)[1]
    (channels,) = shape(_first_layer(names.QUERY_NORM), 1)
    heads, rest = divmod(shape(_first_layer(names.PROJECTION), 2)[1], channels)
    fused, fused_rest = divmod(shape(_first_layer(names.QKV), 2)[0], channels)
    groups, odd = divmod(fused - heads, 2)
    if rest or fused_rest or odd or groups < 1 or heads % groups:
        raise ConversionError(
            f"{folder}: linear_qkv and linear_proj of layer 0 do not fit heads of {channels} "
            "channels, the size of its q_layernorm; it is no checkpoint of Qwen3's form"
        )
    part = _first_layer(names.FC1_PARTS[0])
    ffn = shapes[part][0] if part in shapes else shape(_first_layer(names.FC1), 2)[0] // 2
    num_layers = min(max(layers) + 1, MAX_LAYERS)
    if num_layers * groups > _MAX_GROUPS:
        raise ConversionError(
            f"{folder}: its tensors have {groups:,} groups in {num_layers:,} layers, more than any "
            "model; the checkpoint is damaged or no model of Qwen3's form"
        )
    return {
        "num_layers": num_layers,
        "hidden_size": hidden,
        "ffn_hidden_size": ffn,
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "kv_channels": channels,
        "share_embeddings_and_output_weights": names.HEAD not in shapes,
    }


def _check_same_model(
    folder: Path, sizes: Mapping[str, Any], config: ModelConfig, where: str
) -> None:
    if not config.is_teacher:
        raise ConversionError(f"{where} describes a HypeNet student; give the teacher's folder")
    megatron_args.check_family(config, where=where)
    different = [
        f"{name} is {value} in the tensors and {getattr(config, name)} in config.json"
        for name, value in sizes.items()
        if getattr(config, name) != value
    ]
    if different:
        raise ConversionError(f"{folder} and {where} are different models: {'; '.join(different)}")


def _from_arguments(
    folder: Path, sizes: dict[str, Any], arguments: Mapping[str, Any] | None
) -> ModelConfig:
    """Return the configuration of these sizes with what only the arguments say."""
    if arguments is None:
        raise ConversionError(
            f"{folder} stores no arguments of Megatron-LM, so the base of RoPE and the epsilon of "
            "the norms are unknown; give --hf HF_DIR, the Hugging Face folder of the model, whose "
            "config.json says them"
        )
    fields = {
        "rotary_base": "rotary_base",
        "layernorm_epsilon": "norm_epsilon",
        "max_position_embeddings": "max_position_embeddings",
    }
    values = {
        ours: arguments[theirs]
        for ours, theirs in {**fields, "init_method_std": "init_method_std"}.items()
        if type(arguments.get(theirs)) in (int, float)
    }
    missing = [theirs for ours, theirs in fields.items() if ours not in values]
    if missing:
        raise ConversionError(
            f"{folder}: its arguments lack {', '.join(missing)}, or have no numbers there; give "
            "--hf HF_DIR, the Hugging Face folder of the model, whose config.json says them"
        )
    try:
        return ModelConfig.model_validate(
            {
                **sizes,
                **values,
                "mixer_types": (ATTENTION,) * sizes["num_layers"],
                "attn_use_rope": True,
                "attn_use_output_gate": False,
            }
        )
    except ValidationError as error:
        raise ConversionError(
            f"{folder}: its tensors and arguments describe no model: "
            + findings(error, whole="model")[0]
        ) from None
