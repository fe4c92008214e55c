"""`hypenet config`: look at a configuration without starting anything."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from megatron_hypenet.cli import completion
from megatron_hypenet.cli.options import (
    ConfigArgument,
    ContextParallelOption,
    JsonOption,
    OverridesArgument,
    PipelineParallelOption,
    ShapeOption,
    TensorParallelOption,
    WorldSizeOption,
    collect_overrides,
)
from megatron_hypenet.config.checks import check_run, layout_warnings
from megatron_hypenet.config.layout import Layout
from megatron_hypenet.config.loader import (
    dump_config,
    load_model_config,
    load_run_config,
    load_with_origins,
    read_yaml,
)
from megatron_hypenet.config.model import ModelConfig
from megatron_hypenet.config.paths import download_hint
from megatron_hypenet.config.problems import Origins
from megatron_hypenet.config.schema import STAGES, RunConfig
from megatron_hypenet.errors import ConfigError, UsageError

app = typer.Typer(
    help="Show, validate, list, copy or describe configurations.",
    epilog="Example:\n\nhypenet config show configs/run/demo.yaml --origin",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)


@app.command()
def show(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    tp: TensorParallelOption = None,
    pp: PipelineParallelOption = None,
    cp: ContextParallelOption = None,
    origin: Annotated[
        bool,
        typer.Option("--origin", help="One line per setting, with where its value comes from."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Print the resolved configuration.

    Includes, defaults and overrides are merged; nothing is started.

    Example:

      hypenet config show configs/run/demo.yaml align.lr=3e-4 --origin
    """
    run, origins = load_with_origins(config, collect_overrides(overrides, tp=tp, pp=pp, cp=cp))
    if origin:
        rows = list(settings_with_origin(run, origins))
        typer.echo(
            json.dumps({"settings": [origin_row(*row) for row in rows]})
            if as_json
            else "\n".join(f"{key} = {value}    # {source}" for key, value, source in rows)
        )
        return
    typer.echo(
        json.dumps(run.model_dump(mode="json"), indent=2) if as_json else dump_config(run).rstrip()
    )


@app.command()
def validate(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    tp: TensorParallelOption = None,
    pp: PipelineParallelOption = None,
    cp: ContextParallelOption = None,
    model: ShapeOption = None,
    world_size: WorldSizeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check a run configuration or a model shape; needs no GPU and no weights.

    Exit code 3 with all problems listed when it is invalid. The layout is checked against the
    teacher's config.json (or the model.json of a checkpoint) where the teacher is here, or against
    --model: a file of configs/model. Of data that is here the files and the first document are
    looked at.

    Example:

      hypenet config validate configs/run/distill_2b.yaml teacher=/models/Qwen3-1.7B data=corpus
        --model configs/model/hypenet_2b.yaml --world-size 8
    """
    from megatron_hypenet.config.bundled import preset

    words = collect_overrides(overrides, tp=tp, pp=pp, cp=cp)
    for kind in ("run", "model"):
        config = preset(config, kind)
    if is_model_file(config):
        if words or model is not None or world_size is not None:
            raise UsageError(
                f"{config} is a model shape; it takes no overrides, no --model and no --world-size"
            )
        shape = load_model_config(config)
        summary = {
            "file": str(config),
            "kind": "model",
            "num_layers": shape.num_layers,
            "attention_layers": list(shape.attention_layers),
        }
    else:
        run = load_run_config(config, words)
        check_and_warn(
            run, load_model_config(model) if model else shape_if_present(run.teacher), world_size
        )
        check_data_here(run)
        summary = {"file": str(config), "kind": "run", "tokens": stage_tokens(run)}
    if as_json:
        typer.echo(json.dumps(summary))
    else:
        typer.echo(f"{config}: valid {summary['kind']} configuration; " + describe(summary))


def check_and_warn(run: RunConfig, shape: ModelConfig | None, world_size: int | None) -> None:
    """Raise LayoutError or ConfigError for what spans model, run and processes; warnings go to
    stderr."""
    check_run(shape, run, world_size)
    if shape is None:
        typer.echo(
            f"note: teacher {run.teacher} is not here, so rules about its shape are left out; "
            f"--model names a shape{download_hint(run.teacher)}",
            err=True,
        )
    for line in layout_warnings(Layout(shape, run, world_size)):
        typer.echo(f"warning: {line}", err=True)


def check_data_here(run: RunConfig) -> None:
    """Look at the lengths of recall documents, and at the files and the first document of each
    source of data that is here; a note on stderr names the others. Raises DataError."""
    from megatron_hypenet.data.check import check_recall_lengths, check_source
    from megatron_hypenet.data.pairs import token_paths
    from megatron_hypenet.data.sources import is_pattern

    check_recall_lengths(run)
    for source in run.data.every_source:
        path = source.path
        if path.exists() or is_pattern(path) or any(one.exists() for one in token_paths(path)):
            check_source(source)
        else:
            hint = download_hint(path, what="dataset")
            typer.echo(f"note: data {path} is not here, so it is not looked at{hint}", err=True)


def shape_if_present(path: Path) -> ModelConfig | None:
    """Return the shape of a teacher from its configuration alone; None where there is no such
    folder. Raises ConfigError, CheckpointError."""
    if not path.exists():
        return None
    if (path / "config.json").is_file():
        from megatron_hypenet.export.hf_config import model_config_from_hf, read_hf_config

        return model_config_from_hf(read_hf_config(path), where=str(path / "config.json"))
    from megatron_hypenet.checkpoint.find import read_model_config, resolve

    return read_model_config(resolve(path, fall_back=False))


@app.command("list")
def list_presets(as_json: JsonOption = False) -> None:
    """List the presets that come with the package.

    A run's name may stand for its file: `hypenet run quickstart ...`; a cluster's for --cluster, a
    model's for --model.

    Example:

      hypenet config list
    """
    from megatron_hypenet.config.bundled import presets

    rows = [(kind, path.stem, first_comment(path)) for kind, path in presets()]
    if as_json:
        content = [{"kind": kind, "name": name, "about": about} for kind, name, about in rows]
        typer.echo(json.dumps({"presets": content}))
        return
    for kind, name, about in rows:
        typer.echo(f"{kind:<8}  {name:<18}  {about}")


@app.command()
def copy(
    name: Annotated[
        str,
        typer.Argument(
            help="Name of a preset; `hypenet config list` has all.",
            autocompletion=completion.presets(),
        ),
    ],
    out: Annotated[
        Path | None, typer.Argument(help="File to write; default: NAME.yaml in this folder.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Copy a preset into a file of yours, to be changed.

    Example:

      hypenet config copy h100_infiniband my_cluster.yaml
    """
    from megatron_hypenet.atomic_files import write_text
    from megatron_hypenet.config.bundled import presets

    found = next((path for _, path in presets() if path.stem == name), None)
    if found is None:
        names = ", ".join(path.stem for _, path in presets())
        raise UsageError(f"{name}: no preset has this name; choose one of {names}")
    target = out or Path(f"{name}.yaml")
    if target.exists():
        raise UsageError(f"{target} exists; name another file")
    # files beside the preset are found among the bundled ones from anywhere
    write_text(target, found.read_text(encoding="utf-8").replace("../stage/", "configs/stage/"))
    typer.echo(json.dumps({"written": str(target)}) if as_json else f"wrote {target}")


def first_comment(path: Path) -> str:
    """Return the first line of comment of a preset, which says what it is for."""
    first = path.read_text(encoding="utf-8").splitlines()[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


@app.command()
def schema(
    of: Annotated[
        str, typer.Argument(metavar="[run|model]", help="Which configuration to describe.")
    ] = "run",
    as_json: JsonOption = False,
) -> None:
    """Print the JSON schema, for editors.

    Editors use it to complete and check YAML. The same as a page: docs/config.md.

    Example:

      hypenet config schema run > run.schema.json
    """
    kinds: dict[str, type[RunConfig] | type[ModelConfig]] = {"run": RunConfig, "model": ModelConfig}
    if of not in kinds:
        raise UsageError(f"unknown configuration {of!r}; choose run or model")
    typer.echo(json.dumps(kinds[of].model_json_schema(), indent=None if as_json else 2))


def settings_with_origin(run: RunConfig, origins: Origins) -> Iterator[tuple[str, str, str]]:
    """Yield every setting as (dotted key, value as JSON, file or "CLI" or "default"), in schema
    order."""

    def walk(values: dict[str, object], above: tuple[str, ...]) -> Iterator[tuple[str, str, str]]:
        for name, value in values.items():
            place = (*above, name)
            if isinstance(value, dict):
                yield from walk(value, place)
            else:
                yield ".".join(place), json.dumps(value), origins.get(place, "default")

    yield from walk(run.model_dump(mode="json"), ())


def origin_row(key: str, value: str, origin: str) -> dict[str, object]:
    """Return one setting with its origin, for machines."""
    return {"key": key, "value": json.loads(value), "origin": origin}


def is_model_file(path: Path) -> bool:
    """Return true when the YAML at `path` has the keys of a model and none that only a run has."""
    keys = set(read_yaml(path))
    if not keys:
        raise ConfigError(
            f"{path}: the file is empty; a run needs at least output_dir, teacher, "
            "data and the stages"
        )
    return "num_layers" in keys and not keys & (set(RunConfig.model_fields) | {"include"})


def stage_tokens(run: RunConfig) -> dict[str, int]:
    """Return the tokens that each stage reads."""
    return {name: run.stage(name).tokens_per_step * run.stage(name).train_iters for name in STAGES}


def describe(summary: dict[str, object]) -> str:
    """Return a summary in one line."""
    if isinstance(tokens := summary.get("tokens"), dict):
        return "tokens: " + ", ".join(f"{name} {count:,}" for name, count in tokens.items())
    return f"{summary['num_layers']} layers, softmax in {summary['attention_layers']}"
