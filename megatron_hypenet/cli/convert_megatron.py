"""`hypenet convert to-megatron` and `from-megatron`: a teacher to Megatron-LM's own format and
back."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from megatron_hypenet.checkpoint.places import refuse_missing
from megatron_hypenet.cli.convert_output import (
    CkptArgument,
    DtypeOption,
    OverwriteOption,
    WorkersOption,
    announce,
    finish,
    progress,
)
from megatron_hypenet.cli.options import DryRunOption, JsonOption, check_dtype
from megatron_hypenet.config.bundled import bundled
from megatron_hypenet.ownership import writing


def to_megatron_command(
    ckpt_dir: CkptArgument,
    out: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="Folder to write, for --load of Megatron-LM."),
    ],
    divisible_by: Annotated[
        int,
        typer.Option(
            "--make-vocab-size-divisible-by",
            min=1,
            help="The argument of that name that Megatron-LM will run with: embedding and head are "
            "padded with zeros to a multiple of it times --tp.",
        ),
    ] = 128,
    tp: Annotated[
        int,
        typer.Option(
            "--tp",
            "--tensor-model-parallel-size",
            min=1,
            help="Tensor-parallel size that Megatron-LM will run with. Another one works too if it "
            "divides the padded vocabulary.",
        ),
    ] = 1,
    dtype: DtypeOption = None,
    workers: WorkersOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a teacher's checkpoint as a Megatron-LM checkpoint (torch_dist) of a GPTModel, with its
    arguments; docs/checkpoint_formats.md says how Megatron-LM loads it.

    Example:

      hypenet convert to-megatron teacher/ megatron_teacher/ --tp 2
    """
    check_dtype(dtype)
    refuse_missing(ckpt_dir)
    announce("reading", ckpt_dir)
    from megatron_hypenet.export import to_megatron as convert
    from megatron_hypenet.export.megatron_args import Padding

    started = time.monotonic()
    padding = Padding(divisible_by=divisible_by, tensor_parallel=tp)
    convert.refuse_existing(out)
    # a command that writes compares the large files' hashes while it reads them
    plan = convert.plan_to_megatron(ckpt_dir, padding=padding, dtype=dtype, hashes=dry_run)
    result = {
        "verb": "convert to-megatron",
        "source": str(plan.folder),
        "destination": str(out),
        "kind": "megatron",
        "dry_run": dry_run,
        "tensors": len(plan.tensors),
        "bytes": plan.bytes(),
        "padded_vocab_size": plan.vocab_rows,
    }
    if not dry_run:
        with writing(out):
            convert.to_megatron(
                ckpt_dir, out, padding=padding, dtype=dtype, workers=workers, progress=progress
            )
    finish(result, plan.config, started, as_json)


def from_megatron_command(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR",
            help="What --save of Megatron-LM named (its newest save is read), or one save, "
            "iter_NNNNNNN or release.",
        ),
    ],
    ckpt_dir: Annotated[
        Path, typer.Argument(metavar="CKPT_DIR", help="Checkpoint folder to write.")
    ],
    hf_dir: Annotated[
        Path | None,
        typer.Option(
            "--hf",
            metavar="HF_DIR",
            help="Hugging Face folder of the same model: its config.json says what the save does "
            "not, and its tokenizer comes along. Its weights are not read.",
        ),
    ] = None,
    vocab_size: Annotated[
        int | None,
        typer.Option(
            "--vocab-size",
            min=1,
            help="Number of tokens without Megatron's padding, where neither the save nor --hf "
            "says it.",
        ),
    ] = None,
    dtype: DtypeOption = None,
    workers: WorkersOption = None,
    overwrite: OverwriteOption = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Import a Megatron-LM checkpoint (torch_dist) of a dense Qwen3, saved on any layout.

    Example:

      hypenet convert from-megatron megatron_teacher/ teacher/ --hf /models/Qwen3-1.7B
    """
    check_dtype(dtype)
    hf_dir = None if hf_dir is None else bundled(hf_dir)
    announce("reading", folder)
    from megatron_hypenet.checkpoint.format import refuse_existing
    from megatron_hypenet.export import from_megatron as convert

    started = time.monotonic()
    refuse_existing(ckpt_dir, overwrite)
    plan = convert.plan_from_megatron(folder, hf_dir=hf_dir, vocab_size=vocab_size, dtype=dtype)
    for note in plan.notes:
        progress(f"note: {note}")
    result = {
        "verb": "convert from-megatron",
        "source": str(plan.folder),
        "destination": str(ckpt_dir),
        "kind": "teacher",
        "dry_run": dry_run,
        "tensors": len(plan.tensors),
        "padded_vocab_size": plan.vocab_rows,
        "notes": plan.notes,
    }
    if not dry_run:
        with writing(ckpt_dir):
            convert.from_megatron(
                plan.folder,
                ckpt_dir,
                hf_dir=hf_dir,
                vocab_size=vocab_size,
                dtype=dtype,
                overwrite=overwrite,
                workers=workers,
                progress=progress,
            )
    finish(result, plan.config, started, as_json)
