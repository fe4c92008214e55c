"""Plan an import from config.json and the headers of weight files alone, without reading weights
and without a tensor library."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hypenet.config.model import ModelConfig
from megatron_hypenet.errors import ConversionError
from megatron_hypenet.export import hf_config, hf_folder, mapping


@dataclass(frozen=True)
class ImportPlan:
    """The plan of an import: everything that is known from config.json and the headers of the
    weight files."""

    config: ModelConfig
    hf_config: dict[str, Any]
    weights: hf_folder.HfWeights
    entries: list[mapping.Entry]
    duplicate_head: bool
    """Whether the folder stores the tied head a second time."""

    @property
    def kind(self) -> str:
        """Return the kind of the checkpoint in its manifest: teacher or student."""
        return "teacher" if self.config.is_teacher else "student"


def plan_import(hf_dir: Path) -> ImportPlan:
    """Read configuration and headers, and check names, shapes and dtypes. Raises ConfigError or
    ConversionError; writes nothing."""
    raw = hf_config.read_hf_config(hf_dir)
    config = hf_config.model_config_from_hf(raw, where=str(hf_dir / "config.json"))
    weights = hf_folder.HfWeights(hf_dir)
    entries = mapping.entries(config)
    tied = config.share_embeddings_and_output_weights
    duplicate_head = tied and mapping.HF_HEAD in weights
    expected = [name for entry in entries for name in entry.hf]
    mapping.check_names(
        expected,
        (name for name in weights if not (duplicate_head and name == mapping.HF_HEAD)),
        where=str(hf_dir),
    )
    for entry in entries:
        for name in entry.hf:
            mapping.check_shape(name, weights.shape(name), entry.part_shape, where=str(hf_dir))
            if weights.dtype(name) not in hf_folder.DTYPES:
                supported = ", ".join(hf_folder.DTYPES.values())
                raise ConversionError(
                    f"{hf_dir}: {name} is stored as {weights.dtype(name)}; "
                    f"supported are {supported}. Dequantize the model first"
                )
    return ImportPlan(config, raw, weights, entries, duplicate_head)
