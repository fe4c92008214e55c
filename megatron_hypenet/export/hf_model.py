"""Models for inference by transformers, from a Hugging Face folder, a checkpoint or a run.

The modelling code that came with a folder is never run: a HypeNet runs this package's copy, a
teacher transformers' own model of its family."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron_hypenet.atomic_files import temporary_folder
from megatron_hypenet.config.model import ModelConfig
from megatron_hypenet.errors import ConversionError, SetupError
from megatron_hypenet.export import hf_config
from megatron_hypenet.export.hf_folder import read_generation_config
from megatron_hypenet.export.plan import plan_import
from megatron_hypenet.export.tensors import parse_dtype
from megatron_hypenet.export.to_hf import export_hf
from megatron_hypenet.untrusted.files import reason_of, shown

EXPORT = "export"
"""Where a run keeps its Hugging Face folder."""


def is_hf_folder(path: Path) -> bool:
    """Return whether a folder looks like one of Hugging Face rather than like a checkpoint."""
    return (path / "config.json").is_file()


def meant(path: Path) -> Path:
    """Return the Hugging Face folder or checkpoint meant by `path`: the export of a run, else
    itself; which checkpoint of a run or stage, checkpoint/find.py decides."""
    if is_hf_folder(path):
        return path
    if is_hf_folder(path / EXPORT):
        return path / EXPORT
    return path


@contextmanager
def as_hf_folder(path: Path) -> Iterator[Path]:
    """Provide the Hugging Face folder of what `path` means; a checkpoint is exported into a
    temporary one.

    Raises CheckpointError or ConversionError for what is neither."""
    found = meant(path)
    if is_hf_folder(found):
        yield found
        return
    with temporary_folder() as place:
        folder = place / EXPORT
        export_hf(found, folder)
        yield folder


def read_config(folder: Path) -> ModelConfig:
    """Return the model of a Hugging Face folder, whose weights are there in full. ConfigError or
    ConversionError for one that this package does not know, and for weights that are damaged or of
    another model: transformers would fill the missing ones with random numbers."""
    read_generation_config(folder)
    return plan_import(folder).config


def weights_dtype(folder: Path) -> str:
    """Return the dtype of a folder's weights, as its config.json has it."""
    raw = hf_config.read_hf_config(folder)
    return str(raw.get("dtype") or raw.get("torch_dtype") or "float32")


def load_model(folder: Path, config: ModelConfig, dtype: str | None, device: str) -> Any:
    """Return the model of a Hugging Face folder, for inference, on `device`; `dtype` None is that
    of its weights. ConversionError where transformers cannot read it, SetupError where the device
    has too little memory."""
    from transformers import AutoModelForCausalLM

    from megatron_hypenet.export.hf_remote.configuration_hypenet import HypeNetConfig
    from megatron_hypenet.export.hf_remote.modeling_hypenet import HypeNetForCausalLM

    dtype = dtype or weights_dtype(folder)
    options: dict[str, Any] = {"dtype": parse_dtype(dtype), "local_files_only": True}
    # safetensors alone: other weights are pickles
    options["use_safetensors"] = True
    try:
        with _quiet():
            if config.is_teacher:
                model = AutoModelForCausalLM.from_pretrained(
                    folder, trust_remote_code=False, **options
                )
            else:
                plain = hf_config.hf_config_from_model(config, torch_dtype=dtype)
                model = HypeNetForCausalLM.from_pretrained(
                    folder, config=HypeNetConfig.from_dict(plain), **options
                )
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise ConversionError(
            f"{folder}: transformers cannot load it ({type(error).__name__}: "
            f"{shown(reason_of(error))}); its config.json or generation_config.json is damaged, or "
            "belongs to another version: fetch the folder again"
        ) from error
    try:
        return model.eval().to(torch.device(device))
    except torch.OutOfMemoryError as error:
        needed = sum(parameter.nbytes for parameter in model.parameters()) / 2**30
        raise SetupError(
            f"{folder}: its weights take {needed:.1f} GiB and {device} has less free; "
            "choose another device with --device, or a narrower --dtype"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' progress bar, and its warnings about settings that both of its major
    versions are given."""
    from transformers.utils import logging

    bar = logging.is_progress_bar_enabled()
    level = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def default_device() -> str:
    """Return the first GPU, or the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"
