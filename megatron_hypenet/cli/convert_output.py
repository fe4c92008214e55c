"""Options that the verbs of `hypenet convert` share, and what they print: progress on stderr, and a
summary or one JSON object on stdout."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_hypenet.config.model import ModelConfig

CkptArgument = Annotated[
    Path,
    typer.Argument(
        metavar="CKPT_DIR", help="Checkpoint, or the folder of a stage or a run that has one."
    ),
]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace an earlier result at the destination.")
]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help="float32, bfloat16, float16 or float64; default: as stored.",
        show_default=False,
    ),
]
WorkersOption = Annotated[
    int | None,
    typer.Option(
        "--workers",
        min=1,
        max=64,
        help="Threads that read, check and write; the result is the same for any number. Default: "
        "this machine's cores, at most 4.",
        show_default=False,
    ),
]
GIB = 2**30


def announce(action: str, path: Path) -> None:
    """Say on stderr what is being done with a path."""
    # importing torch takes seconds: say what is going on first
    progress(f"{action} {path}")


def progress(line: str) -> None:
    """Print a line on stderr at once."""
    print(line, file=sys.stderr, flush=True)


def finish(result: dict[str, Any], config: ModelConfig, started: float, as_json: bool) -> None:
    """Print the outcome of a conversion of the model `config` that began at the monotonic time
    `started`; `result` has the entries tensors, dry_run, source and destination, and others that
    only JSON shows."""
    seconds = time.monotonic() - started
    if as_json:
        print(
            json.dumps(
                {
                    **result,
                    "seconds": round(seconds, 2),
                    "peak_memory_gib": _peak_gib(),
                    "model": config.model_dump(mode="json"),
                }
            )
        )
        return
    softmax = len(config.attention_layers)
    print(
        f"{result['kind'] if 'kind' in result else 'model'}: {config.num_layers} layers ({softmax} "
        f"softmax), hidden {config.hidden_size},"
        f" heads {config.num_attention_heads}/{config.num_query_groups}, "
        f"vocabulary {config.vocab_size},"
        f" {'tied' if config.share_embeddings_and_output_weights else 'own'} head, "
        f"{result['tensors']} tensors"
    )
    if result["dry_run"]:
        print(
            f"dry run: {result['source']} is complete and supported; nothing was written to "
            f"{result['destination']}"
        )
    else:
        print(
            f"wrote {result['destination']} in {seconds:.1f} s, peak memory {_peak_gib():.2f} GiB"
        )


def _peak_gib() -> float:
    import resource

    # Linux counts in KiB
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB, 3)
