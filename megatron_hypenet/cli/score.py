"""Logits and per-token losses of given token ids, for comparing a checkpoint with other software.

The model runs in the dtype that is asked for, on any parallel layout; logit scaling is active as
the checkpoint's model.json says.
"""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_hypenet.atomic_files import replacing
from megatron_hypenet.cli import processes
from megatron_hypenet.cli.options import (
    ContextParallelOption,
    DryRunOption,
    JsonOption,
    PipelineParallelOption,
    SequenceParallelOption,
    TensorParallelOption,
)
from megatron_hypenet.errors import DataError, SetupError, UsageError, is_disk_full
from megatron_hypenet.ownership import writing

if TYPE_CHECKING:
    import torch

    from megatron_hypenet.config.model import ModelConfig
    from megatron_hypenet.config.schema import ParallelConfig

app = typer.Typer(add_completion=False, rich_markup_mode=None)

TOKENS = "input_ids"
"""Name of the tensor that is read."""


class Dtype(StrEnum):
    """Dtypes a model can be run in."""

    FLOAT32 = "float32"
    FLOAT64 = "float64"
    BFLOAT16 = "bfloat16"


@app.command()
def score(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CKPT_DIR", help="Checkpoint, or the folder of a stage or a run that has one."
        ),
    ],
    tokens: Annotated[
        Path, typer.Option("--tokens", help="safetensors file with input_ids [B, T] (integers).")
    ],
    out: Annotated[
        Path,
        typer.Option("--out", help="safetensors file to write: logits [B, T, V] and nll [B, T-1]."),
    ],
    dtype: Annotated[
        Dtype, typer.Option("--dtype", help="Dtype of weights, activations and results.")
    ] = Dtype.FLOAT32,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Sequences per forward pass.")
    ] = 8,
    tp: TensorParallelOption = None,
    pp: PipelineParallelOption = None,
    cp: ContextParallelOption = None,
    sp: SequenceParallelOption = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the file at --out.")
    ] = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write the logits of every position and the negative log likelihood of every next token.

    With a layout of several processes they are started here, unless torchrun or srun did; sequences
    may have any length.

    Examples:

      hypenet score runs/demo/finetune --tokens ids.safetensors --out out.safetensors
        --dtype float64

      hypenet score runs/demo/finetune --tokens ids.safetensors --out out.safetensors --cp 2
    """
    check_place(out, overwrite=overwrite)
    from megatron_hypenet.checkpoint.find import read_model_config, resolve
    from megatron_hypenet.cli.pipeline import configure_logging
    from megatron_hypenet.config.checks import check_model_layout
    from megatron_hypenet.config.schema import ParallelConfig

    parallel = ParallelConfig(
        tensor_model_parallel_size=tp or 1,
        pipeline_model_parallel_size=pp or 1,
        context_parallel_size=cp or 1,
        sequence_parallel=sp,
    )
    folder = resolve(checkpoint)
    config = read_model_config(folder)
    num_processes = processes.fixed(parallel.model_parallel_size)
    check_model_layout(config, parallel, processes.join())
    ids = read_ids(tokens, config)
    numbers: dict[str, Any] = {
        "checkpoint": str(folder),
        "sequences": ids.shape[0],
        "tokens_per_sequence": ids.shape[1],
        "dtype": dtype.value,
    }
    if dry_run:
        start = processes.planned_start(num_processes)
        numbers["launch"] = start and start.describe()
    else:
        processes.start_here(num_processes)
        configure_logging()
        logits, nll = compute(folder, config, parallel, ids, dtype.value, batch_size)
        if not processes.is_rank0():
            return
        write_result(out, {"logits": logits, "nll": nll})
        numbers["mean_nll"] = float(nll.double().mean())
    print(
        json.dumps({**numbers, "out": str(out)})
        if as_json
        else "\n".join(f"{name}: {value}" for name, value in numbers.items())
    )
    print(f"{'would write' if dry_run else 'wrote'} {out}", file=sys.stderr)


def check_place(out: Path, *, overwrite: bool) -> None:
    """Raise UsageError when the result could not be written at `out`, before anything is
    computed."""
    if out.exists() and not overwrite:
        raise UsageError(f"--out {out} exists; choose another file, or --overwrite")
    for folder in out.parents:
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"--out {out}: {folder} is a file, not a folder; choose another place")
    if out.is_dir():
        raise UsageError(f"--out {out} is a folder; name a file in it")


def read_ids(path: Path, config: ModelConfig) -> torch.Tensor:
    """Read `input_ids` [B, T] as int64. DataError unless it is a non-empty integer matrix with T >=
    2 and ids inside the vocabulary."""
    import torch
    from safetensors import SafetensorError, safe_open

    from megatron_hypenet.untrusted.files import FileKind, shown
    from megatron_hypenet.untrusted.safetensors_header import read_header

    kind = FileKind(error=DataError, advice=f"write a safetensors file with {TOKENS}")
    tensors = read_header(kind, path)
    if TOKENS not in tensors:
        raise DataError(
            f"{path}: no tensor named {TOKENS}; "
            f"it holds {shown(', '.join(sorted(tensors)) or 'nothing')}"
        )
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            ids = file.get_tensor(TOKENS)
    # the last two: a dtype that torch lacks
    except (OSError, SafetensorError, RuntimeError, AttributeError, KeyError) as error:
        kind.refuse(path, f"cannot be read as safetensors: {error}")
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
        raise DataError(
            f"{path}: {TOKENS} is {str(ids.dtype).removeprefix('torch.')}; token ids are integers"
        )
    if ids.dim() != 2 or ids.shape[0] < 1 or ids.shape[1] < 2:
        raise DataError(
            f"{path}: {TOKENS} has shape {list(ids.shape)}; expected [B, T] with B >= 1 and T >= 2"
        )
    ids = ids.long()
    wrong = (ids < 0) | (ids >= config.vocab_size)
    if wrong.any():
        row, column = wrong.nonzero()[0].tolist()
        raise DataError(
            f"{path}: {int(wrong.sum())} token ids are outside the vocabulary, "
            f"the first {ids[row, column].item()} at [{row}, {column}]; "
            f"this model knows 0 to {config.vocab_size - 1}"
        )
    return ids


def compute(
    folder: Path,
    config: ModelConfig,
    parallel: ParallelConfig,
    ids: torch.Tensor,
    dtype: str,
    batch_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute logits [B, T, V] and negative log likelihoods [B, T-1] on the CPU, both in `dtype`;
    of all processes of the layout, which each call this, only the first keeps them and the others
    get empty tensors."""
    import torch

    from megatron_hypenet.checkpoint.load import load_model, read_whole_config
    from megatron_hypenet.model.hypenet import build_model
    from megatron_hypenet.model.kernel_guard import guard_kernels
    from megatron_hypenet.parallel.cpu import device
    from megatron_hypenet.parallel.groups import destroy_parallel, rank

    kind = getattr(torch, dtype)
    try:
        model = build_model(read_whole_config(folder), parallel, dtype=kind)
        guard_kernels(model)
        keeps = rank() == 0
        load_model(model, folder)
        model.eval()
        kept = ids.shape[0] if keeps else 0
        logits = torch.empty(kept, ids.shape[1], config.vocab_size, dtype=kind)
        nll = torch.empty(kept, ids.shape[1] - 1, dtype=kind)
        with torch.no_grad():
            for start in range(0, ids.shape[0], batch_size):
                rows = slice(start, start + batch_size)
                part = ids[rows].to(device())
                found = model(part), model.token_scores(part)[0]
                if keeps:
                    logits[rows] = found[0].cpu()
                    nll[rows] = found[1].to(kind).cpu()
    finally:
        destroy_parallel()
    return logits, nll


def write_result(out: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write atomically: the file appears whole or not at all. UsageError when the place cannot be
    written."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with writing(out), replacing(out) as temporary:
            save_file(tensors, temporary)
    except (OSError, SafetensorError) as error:
        if is_disk_full(error):
            raise SetupError(
                f"--out {out}: no space left on the disk; free space or choose another place"
            ) from error
        raise UsageError(
            f"--out {out}: cannot be written: {error}; choose a writable place"
        ) from error
