"""The model card of an exported HypeNet, README.md: how it is loaded and served, what it was made
of, and figures of the run's report once they are known."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_hypenet import __version__
from megatron_hypenet.atomic_files import write_text
from megatron_hypenet.checkpoint import format as fmt
from megatron_hypenet.checkpoint.manifest import TEACHER_LICENSE, Manifest
from megatron_hypenet.config.loader import read_stored
from megatron_hypenet.config.model import ModelConfig
from megatron_hypenet.config.schema import STAGES
from megatron_hypenet.errors import ConversionError
from megatron_hypenet.export.hf_folder import JSON
from megatron_hypenet.export.mapping import num_parameters
from megatron_hypenet.untrusted.files import has_entry, inside, shown

FILE = "README.md"
_FIGURES = "\n## Figures\n"
_HEADER_BYTES = 8192
_LICENSE = re.compile(r"[\w.+-]{1,64}")
_STATED = re.compile(rf"^license:[ \t]*[\"']?({_LICENSE.pattern})[\"']?[ \t]*$", re.MULTILINE)

_USE = """
## Load

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto")
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))
```

It needs torch and transformers (4.57 or 5). The modelling code lies in this folder.

## Serve

```bash
pip install "megatron-hypenet[vllm]"
vllm serve .   # this folder
```
"""


def stated_license(hf_dir: Path) -> str | None:
    """Return the licence that the model card of a Hugging Face folder states in its header, None
    without one. A card is for readers, so one that cannot be read, or leads out of the folder, is
    no error."""
    try:
        with JSON.open(inside(hf_dir, FILE, JSON)) as stream:
            text = stream.read(_HEADER_BYTES).decode(errors="replace")
    except (ConversionError, OSError):
        return None
    header = re.match(r"---[ \t]*\r?\n(.*?)^---", text, re.DOTALL | re.MULTILINE)
    found = header and _STATED.search(header[1].replace("\r", ""))
    return found[1] if found else None


def model_card(config: ModelConfig, checkpoint: Path, manifest: Manifest) -> str:
    """Return the text of the card, for a model exported from this checkpoint."""
    settings = read_stored(checkpoint / fmt.CONFIG) if has_entry(checkpoint / fmt.CONFIG) else {}
    stated = str(manifest.extra.get(TEACHER_LICENSE, ""))
    stated = stated if _LICENSE.fullmatch(stated) else ""
    header = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        *([f"license: {stated}"] if stated else []),
        "tags: [hypenet, hybrid, linear-attention]",
        "---",
    ]
    rows = "".join(f"| {name} | {value} |\n" for name, value in _facts(config, settings, stated))
    return (
        "\n".join(header)
        + "\n# HypeNet\n\nA hybrid language model: recurrent layers, whose state does not grow "
        "with the context, between\nlayers of softmax attention. Converted from a softmax-attention"
        f" teacher with HALO (arXiv 2601.22156)\nby megatron-hypenet {__version__}.\n\n"
        f"| | |\n|---|---|\n{rows}{_USE}"
    )


def add_figures(hf_dir: Path, report: Mapping[str, Any]) -> None:
    """Put the results of a run's report.json at the end of the card, in the place of earlier ones;
    a folder without a card stays as it is."""
    path = hf_dir / FILE
    if not path.is_file():
        return
    text = path.read_text(encoding="utf-8").partition(_FIGURES)[0]
    rows = report["rows"]
    lengths = {multiple: int(multiple) * report["seq_length"] for multiple in rows[0]["recall"]}
    names = ["model", "held-out loss", *(f"recall at {n:,}" for n in lengths.values())]
    lines = [
        "| " + " | ".join(names) + " |",
        "|" + "---|" * len(names),
        *(
            f"| {row['model']} | {row['heldout_loss']:.4f} | "
            + " | ".join(f"{row['recall'][multiple]:.1f}" for multiple in lengths)
            + " |"
            for row in rows
        ),
    ]
    write_text(
        path,
        f"{text}{_FIGURES}\nLoss in nats per token; recall of key-value pairs in %, by tokens of "
        "context. This folder is the\nlast row.\n\n" + "\n".join(lines) + "\n",
    )


def _facts(config: ModelConfig, settings: Mapping[str, Any], stated: str) -> list[tuple[str, str]]:
    counts = Counter(config.spec(mixer).hf_keys.name for mixer in config.mixer_types)
    softmax = [
        str(layer)
        for layer, mixer in enumerate(config.mixer_types)
        if not config.spec(mixer).recurrent
    ]
    facts = [
        ("parameters", f"{num_parameters(config):,}"),
        ("layers", ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))),
        ("softmax attention in layers", ", ".join(softmax) or "none"),
        ("logit scaling", str(config.attn_logits_scaling or "off")),
        ("teacher", shown(settings.get("teacher", "not recorded"), 120)),
        ("licence of the teacher", stated or "not recorded"),
    ]
    if tokens := [_tokens(name, settings.get(name)) for name in STAGES if name in settings]:
        facts.append(("tokens of training", ", ".join(tokens)))
    return facts


def _tokens(name: str, stage: Any) -> str:
    sizes = [stage.get(key) for key in ("train_iters", "global_batch_size", "seq_length")]
    if not all(isinstance(size, int) for size in sizes):
        return f"{name}: not recorded"
    iterations, rows, length = sizes
    return f"{name} {iterations * rows * length:,}"
