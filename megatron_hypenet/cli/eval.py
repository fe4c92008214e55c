"""Evaluation of a model, beside others: losses by length and position, tasks over long contexts,
questions of local files.

Every measurement is written when it is done; the same command continues an interrupted one. One
file, because all of it reads the options of the one command; measuring is in eval/."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_hypenet.cli import processes
from megatron_hypenet.cli.engines import Engine, VllmOption
from megatron_hypenet.cli.eval_models import Replaced, Runner, checked_checkpoint, replaced_in
from megatron_hypenet.cli.options import (
    ContextParallelOption,
    DryRunOption,
    JsonOption,
    PipelineParallelOption,
    SequenceParallelOption,
    TensorParallelOption,
    check_device,
    check_dtype,
)
from megatron_hypenet.config.schema import ParallelConfig
from megatron_hypenet.errors import DataError, UsageError
from megatron_hypenet.untrusted.files import FileKind

if TYPE_CHECKING:
    from megatron_hypenet.eval.harness import Tasks

app = typer.Typer(add_completion=False, rich_markup_mode=None)

FILE = "eval.json"
PICTURE = "eval.png"
TEACHER = "teacher"

Measure = Callable[[Any], list[dict[str, Any]]]


@app.command("eval")
def evaluate(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="Checkpoint, run, or Hugging Face folder.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Folder for eval.json and eval.png; default: eval/ of the model's run."
        ),
    ] = None,
    beside: Annotated[
        list[Path] | None,
        typer.Option("--beside", help="Another model to compare with; default: a run's teacher."),
    ] = None,
    replace_layer: Annotated[
        int | None,
        typer.Option(
            "--replace-layer",
            min=0,
            metavar="LAYER",
            help="Measure the run's teacher with this layer's attention replaced by its aligned "
            "mixer, for `hypenet select rank`.",
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option("--text", help="Held-out text (UTF-8): its loss, and filler of the tasks."),
    ] = None,
    lengths: Annotated[
        str, typer.Option("--lengths", metavar="N,N", help="Context lengths in tokens.")
    ] = "1024,4096",
    depths: Annotated[
        str, typer.Option("--depths", metavar="X,X", help="Places of the answer, 0 to 1.")
    ] = "0,0.25,0.5,0.75,1",
    tasks: Annotated[
        str, typer.Option("--probes", metavar="NAME,NAME", help="Long-context tasks, or none.")
    ] = "all",
    count: Annotated[
        int, typer.Option("--count", min=1, help="Documents per task, length and depth.")
    ] = 10,
    loss_count: Annotated[
        int, typer.Option("--loss-count", min=1, help="Sequences per length for the loss.")
    ] = 8,
    questions: Annotated[
        list[Path] | None,
        typer.Option("--questions", help=".jsonl of multiple choice or exact match; repeatable."),
    ] = None,
    harness_tasks: Annotated[
        str | None,
        typer.Option("--tasks", metavar="NAME,NAME", help="Tasks of lm-eval, such as hellaswag."),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option("--include-path", help="Folder with tasks of lm-eval as YAML.")
    ] = None,
    fewshot: Annotated[
        int | None, typer.Option("--fewshot", min=0, help="Examples before a question of --tasks.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Most documents of each of --tasks.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Ask --tasks through the tokenizer's chat template.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the documents.")] = 0,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32, bfloat16, ...; default: the weights'.")
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", help="cuda, cuda:1, cpu; default: a GPU if any.")
    ] = None,
    engine: Annotated[Engine, typer.Option("--engine", help="transformers or vLLM.")] = Engine.HF,
    vllm: VllmOption = None,
    tp: TensorParallelOption = None,
    pp: PipelineParallelOption = None,
    cp: ContextParallelOption = None,
    sp: SequenceParallelOption = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace another evaluation in --out.")
    ] = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure models side by side and write eval.json, and a heat map by length and depth.

    Tasks: needle, needle_multikey, needle_multivalue, variables, common_words, pairs. Multiple
    choice is answered by log-likelihood and by generation: a distilled model can be good at the
    one and not at the other.

    Examples:

      hypenet eval runs/demo --out runs/demo/eval --text held_out.txt --lengths 256,1024

      hypenet eval /models/HypeNet-2B --beside /models/Qwen3-1.7B --out eval --questions mmlu.jsonl
    """
    check_dtype(dtype)
    check_device(device)
    from megatron_hypenet.checkpoint.places import run_around
    from megatron_hypenet.data.questions import read_questions

    models, replaced = _models(model, beside, replace_layer, out)
    out, run = _place(out, None if replaced else run_around(model), model)
    named = _probes(tasks)
    layout = _layout(tp, pp, cp, sp, always=replaced is not None)
    if layout is not None and (engine is Engine.VLLM or device is not None):
        raise UsageError(
            "--tp, --pp, --cp, --sp and --replace-layer are of the training model, which has no "
            "--engine and no --device; give one or the other"
        )
    plan: dict[str, Any] = {
        "lengths": sorted(_numbers("--lengths", lengths, int, 16, 10**8)),
        "depths": sorted(_numbers("--depths", depths, float, 0, 1)),
        "tasks": named,
        "count": count,
        "loss_count": loss_count,
        "seed": seed,
        "dtype": dtype,
        "models": {name: str(path.resolve()) for name, path in models.items()},
        "engine": engine.value,
        "layout": None if layout is None else layout.model_dump(mode="json", exclude_defaults=True),
        "text": text and _digest("--text", text),
        "questions": {str(path): _digest("--questions", path) for path in questions or []},
        **({} if replaced is None else {"replaced": replaced.described()}),
    }
    asking = {"fewshot": fewshot, "limit": limit, **({"chat": True} if chat else {})}
    harness = _harness(harness_tasks, include_path, asking)
    if harness is not None:
        plan["tasks of lm-eval"] = dict(asking)
        if include_path is not None:
            plan["tasks of lm-eval"]["files"] = _digests(include_path)
    words = None if text is None else _words(text)
    asked = {path.stem: read_questions(path) for path in questions or []}
    if len(asked) < len(questions or []):
        raise UsageError("--questions: two files have the same name; rename one of them")
    if not (named or text or asked or harness):
        raise UsageError(
            "nothing to measure; give --text, --questions or --tasks, or leave --probes out"
        )
    rows = _earlier(out, plan, overwrite=overwrite)
    measures = _measures(plan, text, asked)
    if harness is not None:
        measures |= _harness_measures(harness, asking)
    if dry_run:
        _say({"measurements": len(measures) * len(models), "done": len(_done(rows))}, as_json)
        return
    if layout is not None:
        _start(models, layout)
    runner = Runner(
        engine=engine,
        dtype=dtype,
        device=device,
        vllm=vllm,
        parallel=layout,
        longest=max(plan["lengths"]),
        replaced=replaced,
    )
    for name, path in models.items():
        todo = {key: call for key, call in measures.items() if (name, key) not in _done(rows)}
        if todo:
            _run(name, path, todo, plan, words, rows, out, runner)
    if processes.is_rank0():
        _finish(run, out, rows, as_json=as_json)


def _place(out: Path | None, run: Path | None, model: Path) -> tuple[Path, Path | None]:
    """Return where the results go, and the run that they belong to. UsageError without a place."""
    from megatron_hypenet.eval.results import FOLDER

    if out is None and run is None:
        raise UsageError(f"{model} lies in no run; give --out FOLDER for the results")
    return out or (run or Path()) / FOLDER, run


def _with_replaced(
    model: Path, layer: int, beside: list[Path] | None, out: Path | None
) -> tuple[dict[str, Path], Replaced]:
    """Return the teacher of the model's run, under a name that says what is replaced in it.
    UsageError for what does not go with it."""
    if beside or out is None:
        raise UsageError(
            "--replace-layer measures one model of many: give --out FOLDER/LAYER, for "
            "`hypenet select rank --scores FOLDER`, and no --beside"
        )
    teacher, replaced = replaced_in(model, layer)
    return {f"layer {layer} replaced": teacher}, replaced


def _layout(
    tp: int | None, pp: int | None, cp: int | None, sequence_parallel: bool, *, always: bool
) -> ParallelConfig | None:
    """Return the layout that is asked for, or None unless there is `always` one."""
    if not (tp or pp or cp or sequence_parallel or always):
        return None
    return ParallelConfig(
        tensor_model_parallel_size=tp or 1,
        pipeline_model_parallel_size=pp or 1,
        context_parallel_size=cp or 1,
        sequence_parallel=sequence_parallel,
    )


def _start(models: dict[str, Path], layout: ParallelConfig) -> None:
    """Check that the layout suits all models, and start its processes unless a launcher did."""
    from megatron_hypenet.checkpoint.find import read_model_config
    from megatron_hypenet.cli.pipeline import configure_logging
    from megatron_hypenet.config.checks import check_model_layout

    num_processes = processes.fixed(layout.model_parallel_size)
    for path in models.values():
        config = read_model_config(checked_checkpoint(path))
        check_model_layout(config, layout, processes.join())
    processes.start_here(num_processes)
    configure_logging()


def _probes(tasks: str) -> list[str]:
    """Return the long-context tasks that are asked for. UsageError for a name that is none."""
    from megatron_hypenet.data.probes import TASKS

    named = list(TASKS) if tasks == "all" else [] if tasks == "none" else tasks.split(",")
    for task in named:
        if task not in TASKS:
            raise UsageError(f"--probes {task}: no task; choose from {', '.join(TASKS)}")
    return named


def _models(
    model: Path, beside: list[Path] | None, layer: int | None, out: Path | None
) -> tuple[dict[str, Path], Replaced | None]:
    """Return the models by name; beside what lies in a run, its teacher unless others are given.
    With `layer` it is the run's teacher, and what is replaced in it. UsageError or CheckpointError
    for what does not go together or is not there."""
    from megatron_hypenet.checkpoint.places import refuse_missing, run_around

    for path in (model, *(beside or [])):
        refuse_missing(path)
    if layer is not None:
        return _with_replaced(model, layer, beside, out)
    run = run_around(model)
    others = beside or ([run / TEACHER] if run is not None and (run / TEACHER).is_dir() else [])
    found = {path.resolve().name: path for path in (*others, model)}
    if len(found) < len(others) + 1:
        raise UsageError("two models have the same name; rename a folder, or leave one out")
    return found, None


def _numbers(option: str, text: str, kind: type, least: float, most: float) -> list[Any]:
    try:
        found = [kind(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{option} {text}: give numbers with commas between") from None
    for number in found:
        if not least <= number <= most:
            raise UsageError(f"{option} {number}: must be {least} to {most}")
    return list(dict.fromkeys(found))


def _words(path: Path) -> str:
    words = FileKind(
        error=DataError, advice="--text takes a text file in UTF-8", max_bytes=1 << 30
    ).read_text(path)
    if not words.strip():
        raise DataError(f"--text {path}: it is empty; give held-out text")
    return words


def _harness(
    names: str | None, include_path: Path | None, asking: Mapping[str, Any]
) -> Tasks | None:
    """Return the tasks of lm-eval that are asked for. UsageError for what belongs to none."""
    if names is None:
        if include_path is not None or any(value is not None for value in asking.values()):
            raise UsageError(
                "--include-path, --fewshot, --limit and --chat are about tasks of lm-eval; add "
                "--tasks NAME"
            )
        return None
    if include_path is not None and not include_path.is_dir():
        raise UsageError(f"--include-path {include_path}: no folder; name one with YAML files")
    from megatron_hypenet.eval.harness import Tasks

    return Tasks(list(dict.fromkeys(names.split(","))), include_path)


def _harness_measures(harness: Tasks, asking: Mapping[str, Any]) -> dict[str, Measure]:
    """Return a measurement for each task of lm-eval; `asking` are keywords of `Tasks.rows`."""
    return {
        f"lm-eval {name}": lambda at, name=name: harness.rows(  # type: ignore[misc]
            at.model, name, **asking
        )
        for name in harness.names
    }


def _digests(folder: Path) -> dict[str, str]:
    """Return the hashes of the files under a folder."""
    return {
        str(file.relative_to(folder)): _digest("--include-path", file)
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def _digest(option: str, path: Path) -> str:
    if not path.is_file():
        raise DataError(f"{option} {path}: no such file")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _earlier(out: Path, plan: dict[str, Any], *, overwrite: bool) -> list[dict[str, Any]]:
    """Return the rows of an interrupted evaluation with this plan. UsageError when another one is
    there."""
    from megatron_hypenet.eval.results import read_results

    file = out / FILE
    if overwrite or not file.exists():
        return []
    earlier, rows = read_results(file)
    if earlier != json.loads(json.dumps(plan)):
        raise UsageError(
            f"{file} is an evaluation of other models, files or settings; choose another --out, or "
            "--overwrite"
        )
    return rows


def _done(rows: list[dict[str, Any]]) -> set[tuple[str, str]]:
    return {(row["model"], row["measure"]) for row in rows}


def _measures(plan: dict[str, Any], text: Path | None, asked: dict[str, Any]) -> dict[str, Measure]:
    """Return what is measured of each model, by a key that names it in eval.json. The functions
    take (Model, Probes, tokens of the text)."""
    from megatron_hypenet.eval import suite

    found: dict[str, Measure] = {}
    for length in plan["lengths"]:
        if text is not None:
            found[f"loss {length}"] = lambda at, n=length: suite.loss_rows(  # type: ignore[misc]
                at.model, at.tokens, n, plan["loss_count"]
            )
        for task in plan["tasks"]:
            for depth in plan["depths"]:
                cell = (task, length, depth, plan["count"])
                found[f"{task} {length} {depth}"] = lambda at, cell=cell: [  # type: ignore[misc]
                    suite.probe_row(at.model, at.probes, *cell)
                ]
    for name, given in asked.items():
        found[f"questions {name}"] = lambda at, given=given, name=name: suite.question_rows(  # type: ignore[misc]
            at.model, given, name
        )
    return found


def _run(
    name: str,
    path: Path,
    todo: dict[str, Measure],
    plan: dict[str, Any],
    words: str | None,
    rows: list[dict[str, Any]],
    out: Path,
    runner: Runner,
) -> None:
    """Measure one model; every measurement is in the file before the next begins. All processes of
    a layout compute, and the first one writes."""
    from megatron_hypenet.atomic_files import write_json

    for place, (key, found) in enumerate(_measured(path, todo, plan, words, runner), 1):
        rows += [{"model": name, "measure": key, **row} for row in found]
        if not processes.is_rank0():
            continue
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / FILE, {"plan": plan, "rows": rows})
        scores = ", ".join(f"{row['score']:.3f}" for row in found[:3])
        print(f"{name}: {place} of {len(todo)}: {key}: {scores}", file=sys.stderr)


def _measured(
    path: Path, todo: dict[str, Measure], plan: dict[str, Any], words: str | None, runner: Runner
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Load the model, and yield each measurement's rows."""
    from types import SimpleNamespace

    import torch

    from megatron_hypenet.data.probes import Probes

    with runner.loaded(path) as model:
        tokens = None if words is None else model.encode(words)
        at = SimpleNamespace(
            model=model,
            probes=Probes(model.encode, tokens, seed=plan["seed"]),
            tokens=None if tokens is None else torch.tensor(tokens),
        )
        for key, call in todo.items():
            yield key, call(at)


def _finish(run: Path | None, out: Path, rows: list[dict[str, Any]], *, as_json: bool) -> None:
    """Draw the heat map and print the table, or all rows as JSON; inside a run its TensorBoard
    shows them too."""
    from megatron_hypenet.eval import plots
    from megatron_hypenet.eval.results import table

    mapped = [row for row in rows if "depth" in row]
    if mapped:
        plots.heat_maps(mapped, out / PICTURE)
    if run is not None:
        from megatron_hypenet.config.loader import load_run_config
        from megatron_hypenet.halo.run_folder import RunFolder
        from megatron_hypenet.halo.tracking import show_evaluation

        folder = RunFolder(run)
        settings = load_run_config(folder.config_file, [f"output_dir={run}"])
        show_evaluation(settings, folder, rows, out / PICTURE if mapped else None)
    if as_json:
        print(json.dumps({"file": str(out / FILE), "rows": rows}))
    else:
        print(table(rows))
    written = [FILE, *([PICTURE] if mapped else [])]
    print(f"wrote {' and '.join(str(out / name) for name in written)}", file=sys.stderr)


def _say(numbers: dict[str, Any], as_json: bool) -> None:
    print(
        json.dumps(numbers)
        if as_json
        else "\n".join(f"{name}: {value}" for name, value in numbers.items())
    )
