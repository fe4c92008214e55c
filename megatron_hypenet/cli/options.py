"""Arguments that several verbs share: the run configuration, its overrides, and the layout under
its short names."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_hypenet.cli import completion
from megatron_hypenet.config.paths import expanded
from megatron_hypenet.errors import UsageError

ConfigArgument = Annotated[
    Path,
    typer.Argument(
        metavar="CONFIG",
        help="Run configuration (YAML), or the name of a preset, e.g. quickstart.",
        autocompletion=completion.presets("run"),
    ),
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Settings that win over the file, e.g. align.lr=3e-4 teacher=PATH.",
        autocompletion=completion.settings,
    ),
]
TensorParallelOption = Annotated[
    int | None,
    typer.Option(
        "--tp",
        "--tensor-model-parallel-size",
        min=1,
        help="Same as parallel.tensor_model_parallel_size=N.",
    ),
]
PipelineParallelOption = Annotated[
    int | None,
    typer.Option(
        "--pp",
        "--pipeline-model-parallel-size",
        min=1,
        help="Same as parallel.pipeline_model_parallel_size=N.",
    ),
]
ContextParallelOption = Annotated[
    int | None,
    typer.Option(
        "--cp", "--context-parallel-size", min=1, help="Same as parallel.context_parallel_size=N."
    ),
]
SequenceParallelOption = Annotated[
    bool,
    typer.Option(
        "--sp",
        "--sequence-parallel",
        help="Same as parallel.sequence_parallel=true; needs --tp above 1.",
    ),
]
ProcessesOption = Annotated[
    int | None,
    typer.Option(
        "--nproc",
        min=1,
        help="Processes to start on this machine; default: every GPU that fits, or what tensor, "
        "pipeline and context need.",
    ),
]
OverwriteOption = Annotated[
    bool,
    typer.Option("--overwrite", help="Delete an earlier run in output_dir and start again."),
]
RedoOption = Annotated[
    str | None,
    typer.Option(
        "--redo-from",
        metavar="STEP",
        help="Do this step and what depends on it again; an interrupted command with it continues.",
        autocompletion=completion.steps,
    ),
]
LauncherOption = Annotated[
    str,
    typer.Option(
        "--launcher",
        metavar="local|hostfile",
        help="Start processes here, or on the hosts of --hostfile with DeepSpeed.",
    ),
]
HostfileOption = Annotated[
    Path | None,
    typer.Option(
        "--hostfile",
        metavar="FILE",
        help="Lines of `HOST slots=N`; needs --launcher hostfile, pdsh and ssh.",
    ),
]
VariablesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--env",
        metavar="NAME",
        help="Variable of yours that the hosts' processes get, too; may be repeated.",
    ),
]
ShapeOption = Annotated[
    Path | None,
    typer.Option(
        "--model",
        help="Model shape (YAML of configs/model) to go by, in the place of the teacher's.",
        autocompletion=completion.presets("model"),
    ),
]
WorldSizeOption = Annotated[
    int | None,
    typer.Option(
        "--world-size",
        min=1,
        help="Processes the run will have; default: what tensor, pipeline and context need.",
    ),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")
]
DryRunOption = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Check everything and say what would happen; write and start nothing."
    ),
]


DTYPES = ("float32", "bfloat16", "float16", "float64")
"""What a --dtype may be; export/tensors.py has torch's dtype of each."""
_DEVICE = re.compile(r"cpu|cuda(:\d+)?")


def check_dtype(dtype: str | None, choices: Sequence[str] = DTYPES) -> None:
    """Raise UsageError for a --dtype that is none of `choices`, before anything is loaded."""
    if dtype is not None and dtype not in choices:
        raise UsageError(f"--dtype {dtype}: use one of {', '.join(choices)}")


def check_device(device: str | None) -> None:
    """Raise UsageError for a --device that is no name of a device, before anything is loaded."""
    if device is not None and not _DEVICE.fullmatch(device):
        raise UsageError(f"--device {device}: use cpu, cuda, or one GPU, such as cuda:1")


def collect_overrides(
    overrides: list[str] | None,
    *,
    tp: int | None = None,
    pp: int | None = None,
    cp: int | None = None,
) -> list[str]:
    """Return the KEY=VALUE words plus the layout options spelled out, in the order
    `load_run_config` wants (later wins)."""
    words = list(overrides or [])
    axes = {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "context_parallel_size": cp,
    }
    words += [f"parallel.{key}={value}" for key, value in axes.items() if value is not None]
    return words


def expand_paths(app: typer.Typer) -> None:
    """Make every command of `app` replace `~` and variables in its paths, which a shell leaves
    alone in quotes and in `--out=~/x`.

    A path with an unknown user or variable is a UsageError that names it.
    """
    for info in app.registered_commands:
        if info.callback is not None and not hasattr(info.callback, "takes_expanded_paths"):
            info.callback = _with_expanded_paths(info.callback)


def _with_expanded_paths(command: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(command)
    def call(*args: Any, **values: Any) -> Any:
        return command(*args, **{name: _expanded(value) for name, value in values.items()})

    call.takes_expanded_paths = True  # type: ignore[attr-defined]
    return call


def _expanded(value: Any) -> Any:
    if isinstance(value, list | tuple) and any(isinstance(entry, Path) for entry in value):
        return type(value)(map(_expanded, value))
    if not isinstance(value, Path):
        return value
    try:
        return expanded(value)
    except ValueError as error:
        raise UsageError(str(error)) from None
