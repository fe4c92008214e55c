"""`hypenet convert`: Hugging Face folders to checkpoints and back, and the proof that both hold the
same model. One file, because the three commands share options and what they print."""

from __future__ import annotations

import json
import math
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_hypenet.cli import convert_megatron
from megatron_hypenet.cli.convert_output import (
    CkptArgument,
    DtypeOption,
    OverwriteOption,
    WorkersOption,
    announce,
    finish,
    progress,
)
from megatron_hypenet.cli.engines import Engine, VllmOption, vllm_process
from megatron_hypenet.cli.options import DryRunOption, JsonOption, check_dtype
from megatron_hypenet.cli.serve import find_vllm
from megatron_hypenet.config.bundled import bundled
from megatron_hypenet.config.model import LogitsScaling, ModelConfig, check_logits_scaling
from megatron_hypenet.errors import UsageError
from megatron_hypenet.ownership import writing

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help=(
        "Import a Hugging Face model, export a checkpoint, verify that both are the same model; "
        "import from Megatron-LM's format and export to it.\n\n"
        "Runs offline on a CPU, in pieces of some MB: a model of any size needs little memory."
    ),
    rich_markup_mode=None,
    epilog="Examples:\n\nhypenet convert import /models/Qwen3-1.7B teacher/\n\n"
    "hypenet convert verify /models/Qwen3-1.7B teacher/",
)

HfArgument = Annotated[
    Path,
    typer.Argument(
        metavar="HF_DIR", help="Hugging Face folder: config.json, *.safetensors, tokenizer files."
    ),
]
NEW_TOKENS = 16
"""Tokens that an engine decodes one by one."""


@app.command("import")
def import_command(
    hf_dir: HfArgument,
    ckpt_dir: Annotated[
        Path, typer.Argument(metavar="CKPT_DIR", help="Checkpoint folder to write.")
    ],
    dtype: DtypeOption = None,
    workers: WorkersOption = None,
    overwrite: OverwriteOption = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Import a folder as a checkpoint; config.json says whether it is a teacher's (Qwen3, Llama,
    Qwen2) or a HypeNet's.

    Example:

      hypenet convert import /models/Qwen3-1.7B teacher/
    """
    check_dtype(dtype)
    from megatron_hypenet.checkpoint.format import refuse_existing
    from megatron_hypenet.export.hf_config import read_hf_config

    hf_dir = bundled(hf_dir)
    refuse_existing(ckpt_dir, overwrite)
    read_hf_config(hf_dir)
    announce("reading", hf_dir)
    from megatron_hypenet.export import from_hf, mapping
    from megatron_hypenet.export.plan import plan_import

    started = time.monotonic()
    plan = plan_import(hf_dir)
    result = {
        "verb": "convert import",
        "source": str(hf_dir),
        "destination": str(ckpt_dir),
        "kind": plan.kind,
        "dry_run": dry_run,
    }
    result |= {
        "tensors": len(plan.weights),
        "parameters": mapping.num_parameters(plan.config),
        "source_bytes": plan.weights.total_bytes(),
    }
    if not dry_run:
        with writing(ckpt_dir):
            from_hf.import_hf(
                hf_dir,
                ckpt_dir,
                dtype=dtype,
                overwrite=overwrite,
                workers=workers,
                progress=progress,
            )
    finish(result, plan.config, started, as_json)


@app.command("export")
def export_command(
    ckpt_dir: CkptArgument,
    hf_dir: Annotated[Path, typer.Argument(metavar="HF_DIR", help="Hugging Face folder to write.")],
    attn_logits_scaling: Annotated[
        str,
        typer.Option(
            "--attn-logits-scaling",
            help="Inference-time logit scaling: keep, off, 'hype <a>' (e.g. "
            "'hype 500') or a number.",
        ),
    ] = "keep",
    dtype: DtypeOption = None,
    max_shard_gb: Annotated[
        float,
        typer.Option("--max-shard-gb", min=0.001, help="Size of one weight file, in 10^9 bytes."),
    ] = 5.0,
    workers: WorkersOption = None,
    overwrite: OverwriteOption = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a checkpoint as a Hugging Face folder, offline and from the checkpoint alone: that of
    its family for a teacher, HypeNet with its code otherwise.

    Example:

      hypenet convert export runs/my_run out/HypeNet-2B --attn-logits-scaling 'hype 500'
        --dtype bfloat16
    """
    scaling = parse_scaling(attn_logits_scaling)
    check_dtype(dtype)
    from megatron_hypenet.checkpoint.find import resolve

    resolve(ckpt_dir)
    announce("reading", ckpt_dir)
    from megatron_hypenet.export import to_hf

    started = time.monotonic()
    options: dict[str, Any] = {
        "attn_logits_scaling": scaling,
        "dtype": dtype,
        "max_shard_bytes": int(max_shard_gb * 1e9),
    }
    to_hf.refuse_existing(hf_dir, overwrite)
    # a command that writes compares the large files' hashes while it reads them
    plan = to_hf.plan_export(ckpt_dir, **options, hashes=dry_run)
    result = {
        "verb": "convert export",
        "source": str(plan.folder),
        "destination": str(hf_dir),
        "kind": plan.family,
        "dry_run": dry_run,
    }
    result |= {"tensors": len(plan.dtypes), "files": len(plan.shards), "bytes": plan.bytes()}
    result["attn_logits_scaling"] = plan.config.attn_logits_scaling
    if not dry_run:
        with writing(hf_dir):
            to_hf.export_hf(
                ckpt_dir,
                hf_dir,
                **options,
                overwrite=overwrite,
                workers=workers,
                progress=progress,
            )
            result["figures"] = _note_figures(plan.folder, plan.config, hf_dir)
    finish(result, plan.config, started, as_json)


def _note_figures(checkpoint: Path, config: ModelConfig, hf_dir: Path) -> bool:
    """Put the figures of the run that a checkpoint lies in into the model card; returns whether
    there are any about this model as it is exported."""
    from megatron_hypenet.checkpoint.places import run_around
    from megatron_hypenet.export.model_card import add_figures
    from megatron_hypenet.halo.report import report_on
    from megatron_hypenet.halo.run_folder import RunFolder

    run = run_around(checkpoint)
    report = None if run is None else report_on(RunFolder(run), checkpoint)
    if report is None:
        return False
    measured = report.get("attn_logits_scaling")
    if measured != config.attn_logits_scaling:
        word = "off" if measured is None else str(measured)
        progress(
            f"note: the run's figures are of the logit scaling {word} and stay out of the model "
            f"card; --attn-logits-scaling '{word}' exports that model"
        )
        return False
    add_figures(hf_dir, report)
    return True


@app.command("verify")
def verify_command(
    hf_dir: HfArgument,
    ckpt_dir: CkptArgument,
    dtype: Annotated[
        str,
        typer.Option("--dtype", help="Compute dtype of both models: float32, float64 or bfloat16."),
    ] = "float32",
    num_tokens: Annotated[
        int, typer.Option("--num-tokens", min=2, help="Length of the two probe sequences.")
    ] = 128,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the probe token ids.")] = 1234,
    tensors_only: Annotated[
        bool, typer.Option("--tensors-only", help="Compare the tensors and run no model.")
    ] = False,
    engine: Annotated[
        Engine | None,
        typer.Option(
            "--engine",
            help="Also compare what serves the folder: hf is its code in transformers, vllm that "
            "and vLLM.",
            show_default=False,
        ),
    ] = None,
    vllm: VllmOption = None,
    bound: Annotated[
        float | None,
        typer.Option(
            "--bound",
            min=0.0,
            help="Largest difference of a log-probability of an engine, in nats; default: by "
            "--dtype.",
            show_default=False,
        ),
    ] = None,
    workers: WorkersOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Compare all tensors bit by bit, then the logits of transformers and of Megatron-core; exit
    code 6 when they differ.

    With --engine also log-probabilities as they are when the model serves: of single prompts,
    batches, chunks, tokens one by one, and behind a cached prefix.

    Examples:

      hypenet convert verify /models/Qwen3-1.7B teacher/

      hypenet convert verify runs/demo/export runs/demo/finetune --engine vllm --vllm
      .venv-vllm/bin/vllm
    """
    if engine is None and (vllm is not None or bound is not None):
        raise UsageError("--vllm and --bound are about an engine; add --engine hf or vllm")
    if engine is not None and tensors_only:
        raise UsageError("--engine runs models and --tensors-only runs none; give one of them")
    check_dtype(dtype)
    if engine is Engine.VLLM and dtype == "float64":
        raise UsageError("--dtype float64: vLLM does not compute in it; use float32")
    if engine is Engine.VLLM and not dry_run:
        find_vllm(vllm)
    from megatron_hypenet.checkpoint.find import resolve
    from megatron_hypenet.export.hf_config import read_hf_config

    hf_dir = bundled(hf_dir)
    read_hf_config(hf_dir)
    resolve(ckpt_dir)
    announce("reading", hf_dir)
    from megatron_hypenet.export import verify
    from megatron_hypenet.export.plan import plan_import

    started = time.monotonic()
    if dry_run:
        plan = plan_import(hf_dir)
        result = {
            "verb": "convert verify",
            "source": str(hf_dir),
            "destination": str(resolve(ckpt_dir)),
            "dry_run": True,
        }
        finish({**result, "tensors": len(plan.weights)}, plan.config, started, as_json)
        return
    with ExitStack() as stack:
        stack.callback(_end_groups)
        asked: dict[str, Any] = {"num_tokens": num_tokens, "seed": seed}
        if engine is not None:
            asked |= _served(stack, engine, vllm, hf_dir, dtype, num_tokens, seed)
        report = verify.verify(
            hf_dir,
            ckpt_dir,
            dtype=dtype,
            logits=not tensors_only,
            workers=workers,
            progress=progress,
            bound=bound,
            **asked,
        )
    if as_json:
        print(
            json.dumps(
                {
                    "verb": "convert verify",
                    "seconds": round(time.monotonic() - started, 2),
                    **report.as_dict(),
                }
            )
        )
    else:
        print(_verdict(report))
    report.require_ok()


app.command("to-megatron")(convert_megatron.to_megatron_command)
app.command("from-megatron")(convert_megatron.from_megatron_command)


def _served(
    stack: ExitStack,
    engine: Engine,
    vllm: Path | None,
    hf_dir: Path,
    dtype: str,
    num_tokens: int,
    seed: int,
) -> dict[str, Any]:
    """Return what verify() is given: the engines, which live as long as `stack`, and the rows of
    tokens."""
    from megatron_hypenet.export import hf_model, verify
    from megatron_hypenet.export.parity import ExportedCode

    config = hf_model.read_config(hf_dir)
    new = max(1, min(NEW_TOKENS, num_tokens // 3))
    rows = verify.random_rows(config.vocab_size, num_tokens, seed)
    engines: list[Any] = []
    if engine is Engine.VLLM:
        from megatron_hypenet.serve.vllm.parity import VllmEngine

        process = stack.enter_context(vllm_process(vllm))
        progress(f"starting vLLM with {hf_dir} ({dtype})")
        engines = [VllmEngine(process, hf_dir, dtype, least=num_tokens, new=new)]
        rows = engines[0].rows(config.vocab_size, seed)
    model = hf_model.load_model(hf_dir, config, dtype, hf_model.default_device())
    return {"served": [ExportedCode(model, new), *engines], "rows": rows}


def parse_scaling(text: str) -> LogitsScaling:
    """Return the option's words: keep, off (None), 'hype <a>', or a number; UsageError
    otherwise."""
    if text in ("keep", "off"):
        return None if text == "off" else text
    try:
        number = float(text)
    except ValueError:
        number = math.nan  # not a number: a word, then
    try:
        return check_logits_scaling(number if math.isfinite(number) else text)
    except ValueError as error:
        raise UsageError(f"--attn-logits-scaling {text!r}: {error}; or 'keep', 'off'") from error


def _end_groups() -> None:
    """Drop the process groups that running the checkpoint started, if it came that far."""
    if "megatron_hypenet.parallel.groups" in sys.modules:
        from megatron_hypenet.parallel.groups import destroy_parallel

        destroy_parallel()


def _verdict(report: Any) -> str:
    tensors = report.tensors
    logits = report.logits
    lines = [
        f"tensors  {tensors.equal} of {tensors.compared} equal bit for bit"
        + (f", {tensors.cast} after a cast" if tensors.cast else "")
    ]
    if logits is not None:
        lines.append(
            f"logits   max abs diff {logits.max_abs_diff:.3g}, relative {logits.max_rel_diff:.3g} "
            f"(limit {logits.tolerance:g}),"
            f" cosine {logits.cosine:.9f}, top-1 agreement {100 * logits.top1_agreement:.2f} % of "
            f"{logits.tokens} tokens, {logits.dtype}"
        )
        first = logits.first_diverging
        lines.append(f"layers   {'all agree' if first is None else f'first difference at {first}'}")
    lines += _ways(report)
    lines += [f"note     {line}" for line in report.notes]
    lines.append("verdict  " + ("same model" if report.ok else "DIFFERENT"))
    return "\n".join(lines)


def _ways(report: Any) -> list[str]:
    """Return a table of what serves the folder, in nats."""
    if not report.ways:
        return []
    cells = [("engine", "way", "tokens", "cached", "max diff", "mean diff", "")]
    cells += [
        (
            way.engine,
            way.way,
            str(way.tokens),
            str(way.cached or ""),
            f"{way.max_diff:.2g}",
            f"{way.mean_diff:.2g}",
            "" if way.ok else f"beyond {report.bound:g}: {way.worst}",
        )
        for way in report.ways
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [f"served   log-probabilities in nats, bound {report.bound:g}"]
    for row in cells:
        left = "  ".join(cell.ljust(width) for cell, width in zip(row[:2], widths, strict=False))
        numbers = (cell.rjust(width) for cell, width in zip(row[2:6], widths[2:6], strict=True))
        lines.append(f"         {left}  {'  '.join(numbers)}  {row[6]}".rstrip())
    if report.served_diverging is not None:
        lines.append(f"         first difference at {report.served_diverging}")
    return lines
