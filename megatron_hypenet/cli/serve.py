"""Serve an exported model with vLLM: finds vllm, checks the folder, and becomes `vllm serve`.

The model of this package reaches vLLM by an entry point, so that no flag is needed for it."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_hypenet.cli.options import DryRunOption, JsonOption, TensorParallelOption
from megatron_hypenet.errors import ConversionError, SetupError, UsageError

app = typer.Typer(add_completion=False, rich_markup_mode=None)

VERSION = "0.32"
"""The release of vLLM whose interfaces the model is written against."""
INSTALL = (
    'pip install "megatron-hypenet[vllm]" (or `.[vllm]` in a checkout), best into an environment '
    "of its own, because vLLM decides which torch there is"
)


@app.command(context_settings={"allow_extra_args": True})
def serve(
    context: typer.Context,
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="Hugging Face folder, or a run with an export.")
    ],
    name: Annotated[str, typer.Option("--name", help="What requests call the model.")] = "hypenet",
    host: Annotated[str, typer.Option("--host", help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port.")] = 8000,
    max_model_len: Annotated[
        int | None,
        typer.Option("--max-model-len", min=1, help="Longest text; default: what it claims."),
    ] = None,
    tp: TensorParallelOption = None,
    vllm: Annotated[
        Path | None,
        typer.Option("--vllm", help="Program of another environment, such as .venv-vllm/bin/vllm."),
    ] = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Serve a model with vLLM, by the interface of OpenAI.

    What follows `--` goes to `vllm serve` as it is. Ctrl-C stops it.

    Examples:

      hypenet serve runs/demo

      hypenet serve /models/HypeNet-2B --tp 2 --port 8080 -- --gpu-memory-utilization 0.8
    """
    program = find_vllm(vllm)
    folder, config = _checked(model)
    if tp is not None and config.num_attention_heads % tp:
        raise UsageError(
            f"--tp {tp} does not divide the {config.num_attention_heads} heads of {folder}"
        )
    command = [program, "serve", str(folder), "--served-model-name", name]
    command += ["--host", host, "--port", str(port)]
    environment = dict(os.environ)
    if max_model_len is not None:
        command += ["--max-model-len", str(max_model_len)]
        if max_model_len > config.max_position_embeddings:
            # vLLM otherwise refuses more than config.json claims
            environment["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
            print(
                f"note: --max-model-len {max_model_len} is more than the "
                f"{config.max_position_embeddings} that the model claims",
                file=sys.stderr,
            )
    if tp is not None:
        command += ["--tensor-parallel-size", str(tp)]
    command += context.args
    numbers = {"model": str(folder), "url": f"http://{host}:{port}/v1", "command": command}
    if as_json:
        print(json.dumps(numbers), flush=True)
    else:
        print(shlex.join(command), file=sys.stdout if dry_run else sys.stderr, flush=True)
    if not dry_run:
        os.execvpe(program, command, environment)


def installed_vllm() -> str | None:
    """Return the version of vLLM in this environment, from its metadata, or None."""
    from megatron_hypenet.serve.vllm import worker

    return worker.installed_vllm()


def require_vllm() -> None:
    """Raise SetupError unless this environment has a vLLM that the model is written for."""
    check_vllm(installed_vllm(), "this environment")


def check_vllm(version: str | None, where: str) -> None:
    """Raise SetupError unless `version` is one that the model is written for."""
    if version is None:
        raise SetupError(f"vLLM is not installed in {where}; {INSTALL}")
    if version != VERSION and not version.startswith(f"{VERSION}."):
        raise SetupError(
            f"vLLM {version} is installed in {where}, and the model is written for {VERSION}; "
            f"{INSTALL}"
        )


def find_vllm(given: Path | None) -> str:
    """Return the program `vllm`: the given one, or that of this environment. SetupError when there
    is none, or one of another version."""
    if given is not None:
        if not os.access(given, os.X_OK) or given.is_dir():
            raise SetupError(f"--vllm {given}: no program; name the vllm of an environment's bin/")
        return str(given)
    beside = Path(sys.executable).parent / "vllm"
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which("vllm")
    if found is None or installed_vllm() is not None:
        require_vllm()
    if found is None:
        raise SetupError(f"vLLM is installed without its program; {INSTALL}")
    return found


def _checked(model: Path) -> tuple[Path, Any]:
    """Return the folder to serve and its configuration. ConversionError for a checkpoint, and for
    an export that engines cannot read."""
    from megatron_hypenet.export.hf_config import read_hf_config
    from megatron_hypenet.export.hf_model import is_hf_folder, meant, read_config

    folder = meant(model)
    if not is_hf_folder(folder):
        raise ConversionError(
            f"{model} is no Hugging Face folder and no run with an export; export it first: "
            f"hypenet convert export {model} FOLDER"
        )
    config = read_config(folder)
    if not config.is_teacher and not read_hf_config(folder).get("layer_types"):
        raise ConversionError(
            f"{folder}/config.json has no layer_types, by which engines size their caches: it was "
            "exported by an older version; export it again with hypenet convert export"
        )
    return folder, config
