"""The choice of engine that several verbs share, and the process of the one that is a program of
its own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_hypenet.cli.serve import INSTALL, check_vllm, find_vllm
from megatron_hypenet.errors import SetupError

if TYPE_CHECKING:
    from megatron_hypenet.serve.vllm.process import EngineProcess


class Engine(StrEnum):
    """What runs the model."""

    HF = "hf"
    VLLM = "vllm"


VllmOption = Annotated[
    Path | None,
    typer.Option(
        "--vllm",
        help="Program of another environment that has vLLM and this package, such as "
        ".venv-vllm/bin/vllm; default: this one's.",
    ),
]


@contextmanager
def vllm_process(given: Path | None) -> Iterator[EngineProcess]:
    """Start the process of a vLLM engine, in the environment of the program `vllm` that is given or
    found, and end it with the block. SetupError when the environment lacks vLLM or this
    package."""
    from megatron_hypenet.serve.vllm.process import EngineProcess

    program = Path(find_vllm(given))
    here = Path(sys.executable).parent
    other = program.parent.absolute() != here.absolute()
    python = str(program.parent / "python") if other else sys.executable
    if not Path(python).is_file():
        raise SetupError(f"--vllm {program}: its environment has no python beside it; {INSTALL}")
    with EngineProcess(python, other_environment=other) as process:
        check_vllm(process.vllm_version, str(program.parent))
        yield process
