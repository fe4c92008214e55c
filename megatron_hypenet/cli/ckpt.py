"""`hypenet ckpt`: which checkpoints there are, what one holds, how two differ, and which may go.

One file, because the four verbs name, read and print checkpoints in the same way."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_hypenet.byte_sizes import size_text
from megatron_hypenet.cli.options import DryRunOption, JsonOption
from megatron_hypenet.errors import CheckpointError, VerificationError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help=(
        "List, inspect, compare and prune checkpoints, whatever parallel layout wrote them.\n\n"
        "Only prune changes anything; tensors are read one at a time, on the CPU."
    ),
    epilog="Examples:\n\nhypenet ckpt ls runs/quickstart\n\n"
    "hypenet ckpt inspect runs/quickstart/finetune",
)

CkptArgument = Annotated[
    Path,
    typer.Argument(
        metavar="CKPT", help="Checkpoint, or the folder of a stage or a run that has one."
    ),
]
SHOWN = 20
"""Number of lines of a list that are shown; further ones are counted."""


@app.command("ls")
def ls_command(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Run folder, stage folder, or one checkpoint.")
    ],
    as_json: JsonOption = False,
) -> None:
    """List every checkpoint below DIR: step, stage, size, whether it is usable, the layout that
    wrote it, and when.

    Example:

      hypenet ckpt ls runs/quickstart
    """
    from megatron_hypenet.checkpoint.survey import layout_text, survey

    found = survey(folder)
    if as_json:
        print(
            json.dumps(
                {
                    "verb": "ckpt ls",
                    "folder": str(folder),
                    "checkpoints": [one.as_dict() for one in found],
                }
            )
        )
        return
    if not found:
        print(f"no checkpoint in {folder}")
        return
    rows = [("CHECKPOINT", "STAGE", "STEP", "SIZE", "STATE", "WRITTEN BY", "DATE")]
    for one in found:
        name = "." if one.path == folder else str(one.path.relative_to(folder))
        step = "-" if one.step is None else str(one.step)
        date = (one.created or "-").replace("T", " ").removesuffix("+00:00")
        rows.append(
            (
                name,
                one.stage or one.kind or "-",
                step,
                size_text(one.bytes),
                one.state,
                layout_text(one.layout),
                date,
            )
        )
    print_table(rows)
    for one in found:
        if one.problem:
            print(f"{one.path.name}: {one.state}: {one.problem}")


@app.command("inspect")
def inspect_command(
    path: CkptArgument,
    tensors: Annotated[
        bool, typer.Option("--tensors", help="List every tensor with its shape, type and pieces.")
    ] = False,
    hashes: Annotated[
        bool, typer.Option("--hashes", help="Read every file and compare it with its sha256.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what one checkpoint holds: model, mixers, tensors, optimizer state, progress, layout and
    versions; exit code 5 when it is damaged.

    Example:

      hypenet ckpt inspect runs/quickstart/distill --hashes
    """
    from megatron_hypenet.checkpoint.survey import COMMITTED, describe

    folder = resolve_any(path)
    described = describe(folder)
    problems = [described["problem"]] if described["problem"] else []
    if described["state"] == COMMITTED:
        problems += read_tensors(folder, described, hashes=hashes)
        described["state"], described["problem"] = (
            ("damaged", problems[0]) if problems else (described["state"], None)
        )
    if as_json:
        shown = (
            described
            if tensors
            else {key: value for key, value in described.items() if key != "tensors"}
        )
        print(json.dumps({"verb": "ckpt inspect", **shown}))
    else:
        print("\n".join(inspect_lines(described, tensors=tensors)))
    if problems:
        raise CheckpointError(f"{folder} is not usable: {problems[0]}; use another checkpoint")


@app.command("diff")
def diff_command(
    first: Annotated[
        Path,
        typer.Argument(
            metavar="A", help="Checkpoint, or the folder of a stage or a run that has one."
        ),
    ],
    second: Annotated[Path, typer.Argument(metavar="B", help="The other one.")],
    weights_only: Annotated[
        bool, typer.Option("--weights-only", help="Leave optimizer state and progress aside.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Compare two checkpoints: model, progress and every tensor, bit by bit. Exit code 0 when they
    hold the same, 6 when they differ.

    Run settings (config.yaml) are shown but do not count: two layouts may have written the same
    state.

    Example:

      hypenet ckpt diff runs/a/finetune runs/b/finetune/checkpoints/iter_0000120
    """
    from megatron_hypenet.checkpoint.find import resolve

    folders = resolve(first), resolve(second)
    print(f"reading {folders[0]} and {folders[1]}", file=sys.stderr, flush=True)
    from megatron_hypenet.checkpoint.compare import compare

    report = compare(
        *folders,
        weights_only=weights_only,
        progress=lambda line: print(line, file=sys.stderr, flush=True),
    )
    if as_json:
        print(
            json.dumps(
                {
                    "verb": "ckpt diff",
                    "a": str(folders[0]),
                    "b": str(folders[1]),
                    **report.as_dict(),
                }
            )
        )
    else:
        print("\n".join(diff_lines(report)))
    if not report.equal:
        raise VerificationError(f"{folders[0]} and {folders[1]} differ")


@app.command("prune")
def prune_command(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Run folder, or the folder of a stage.")
    ],
    keep_last: Annotated[
        int, typer.Option("--keep-last", min=1, help="Newest usable checkpoints that stay.")
    ] = 1,
    keep_every: Annotated[
        int | None,
        typer.Option("--keep-every", min=1, help="Also keep steps that are multiples of this."),
    ] = None,
    weights_only: Annotated[
        bool,
        typer.Option(
            "--weights-only",
            help="Take the optimizer state off those that stay: no training goes on from them.",
        ),
    ] = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Delete the older checkpoints of every stage below DIR, and say how much space it frees.

    Only usable checkpoints are counted and deleted; damaged ones, and saves that are not finished,
    stay. A run that is under way is refused.

    Example:

      hypenet ckpt prune runs/quickstart --keep-last 1 --dry-run
    """
    from megatron_hypenet.checkpoint.retention import delete, drop_optimizer, surplus
    from megatron_hypenet.checkpoint.survey import COMMITTED, survey

    refuse_used(folder)
    usable = [one for one in survey(folder) if one.state == COMMITTED and is_save(one.path)]
    sizes = {one.path: one.bytes for one in usable}
    doomed: list[Path] = []
    for parent in dict.fromkeys(path.parent for path in sizes):
        of_stage = [path for path in sizes if path.parent == parent]
        doomed += surplus(of_stage, keep_last=keep_last, keep_every=keep_every)
    kept = [path for path in sizes if path not in doomed] if weights_only else []
    freed = sum(sizes[path] for path in doomed)
    if not dry_run:
        for path in doomed:
            delete(path)
        freed += sum(map(drop_optimizer, kept))
    if as_json:
        print(
            json.dumps(
                {
                    "verb": "ckpt prune",
                    "deleted": list(map(str, doomed)),
                    "weights_only": list(map(str, kept)),
                    "bytes": freed,
                }
            )
        )
        return
    words = ("would delete", "would take the optimizer state off") if dry_run else (
        "deleted", "took the optimizer state off",
    )  # fmt: skip
    for verb, paths in zip(words, (doomed, kept), strict=True):
        print("".join(f"{verb} {path}\n" for path in paths), end="")
    print(
        f"{len(doomed)} checkpoints, {size_text(freed)}" + (" at least" if dry_run and kept else "")
    )


def is_save(path: Path) -> bool:
    """Return whether a checkpoint is one of a training stage's saves."""
    from megatron_hypenet.checkpoint import format as fmt

    return fmt.iteration_of(path) is not None and not path.is_symlink()


def refuse_used(folder: Path) -> None:
    """Raise UsageError while another command or a job works in the run that `folder` belongs to."""
    from megatron_hypenet.cluster.jobs import refuse_live_jobs
    from megatron_hypenet.ownership import refuse_if_owned

    for place in (folder.absolute(), *folder.absolute().parents):
        refuse_if_owned(place)
        refuse_live_jobs(place)


def resolve_any(path: Path) -> Path:
    """Return a checkpoint folder as it is, usable or not; else the newest usable one below a stage
    folder."""
    from megatron_hypenet.atomic_files import is_temporary
    from megatron_hypenet.checkpoint import format as fmt

    one = (
        fmt.iteration_of(path) is not None
        or is_temporary(path)
        or (path / fmt.MODEL_JSON).is_file()
    )
    if path.is_dir() and one:
        return path
    from megatron_hypenet.checkpoint.find import resolve

    return resolve(path)


def read_tensors(folder: Path, described: dict[str, Any], *, hashes: bool) -> list[str]:
    """Add names, shapes and types of all tensors to `described`; returns what is wrong with the
    files."""
    from megatron_hypenet.checkpoint import format as fmt
    from megatron_hypenet.checkpoint.manifest import verify_files
    from megatron_hypenet.checkpoint.shards import ShardReader

    try:
        if hashes:
            print(f"hashing {size_text(described['bytes'])}", file=sys.stderr, flush=True)
            verify_files(folder, hashes=True)
        parts = {
            part: ShardReader(folder / part)
            for part in (fmt.WEIGHTS, fmt.OPTIMIZER)
            if (folder / part).is_dir()
        }
    except CheckpointError as error:
        return [str(error)]
    described["hashes_verified"] = hashes
    described["tensors"] = {
        part: {
            key: {
                "shape": list(reader.shape(key)),
                "dtype": str(reader.dtype(key)).removeprefix("torch."),
                "pieces": reader.pieces(key),
            }
            for key in sorted(reader)
        }
        for part, reader in parts.items()
    }
    described["summary"] = {part: summary(rows) for part, rows in described["tensors"].items()}
    return []


def summary(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the count of tensors and elements, and the types, of one part."""
    return {
        "tensors": len(rows),
        "elements": sum(math.prod(row["shape"]) for row in rows.values()),
        "dtypes": sorted({row["dtype"] for row in rows.values()}),
    }


def inspect_lines(described: dict[str, Any], *, tensors: bool) -> list[str]:
    """Return the text of `inspect`: one `key  value` line per fact."""
    from megatron_hypenet.checkpoint.survey import layout_text, mixer_runs

    progress, model = described["progress"], described["model"]
    rows = [
        ("folder", described["path"]),
        (
            "state",
            described["state"] + (f": {described['problem']}" if described["problem"] else ""),
        ),
    ]
    rows += [
        ("kind", described["kind"] or "-"),
        ("stage", described["stage"] or "- (weights only)"),
    ]
    rows += [("step", "-" if described["step"] is None else str(described["step"]))]
    rows += [
        (key.replace("_", " "), f"{value:,}" if key in ("samples", "tokens") else str(value))
        for key, value in progress.items()
        if key not in ("stage", "step")
    ]
    if model is not None:
        head = "tied" if model["share_embeddings_and_output_weights"] else "own"
        heads = (
            f"{model['num_attention_heads']}/{model['num_query_groups']} x {model['kv_channels']}"
        )
        sizes = (
            f"{model['num_layers']} layers, hidden {model['hidden_size']}, "
            f"ffn {model['ffn_hidden_size']}"
        )
        rows.append(
            ("model", f"{sizes}, heads {heads}, vocabulary {model['vocab_size']}, {head} head")
        )
        rows.append(("mixers", ", ".join(mixer_runs(model["mixer_types"]))))
    for part, counts in described.get("summary", {}).items():
        rows.append(
            (
                part,
                f"{counts['tensors']} tensors, {counts['elements']:,} elements, "
                f"{', '.join(counts['dtypes'])}",
            )
        )
    if "summary" in described and "optimizer" not in described["summary"]:
        rows.append(("optimizer", "none: no run can continue from it"))
    rows.append(("layout", layout_text(described["layout"])))
    rows.append(
        (
            "size",
            f"{size_text(described['bytes'])} in "
            f"{described['files'] if described['files'] is not None else '?'} files"
            + (", all hashes verified" if described.get("hashes_verified") else ""),
        )
    )
    rows.append(("tokenizer", "yes" if described["tokenizer"] else "no"))
    rows.append(
        (
            "written",
            f"{described['created'] or '-'} by commit {described['git_commit'] or 'unknown'}",
        )
    )
    rows.append(
        (
            "versions",
            ", ".join(f"{name} {version}" for name, version in described["versions"].items())
            or "-",
        )
    )
    rows += [(key, str(value)) for key, value in described["notes"].items()]
    lines = [f"{key:<11} {value}" for key, value in rows]
    if tensors:
        for part, entries in described.get("tensors", {}).items():
            lines += [
                f"{part}/{key}  {row['dtype']} {row['shape']} in {row['pieces']} "
                f"piece{'s' if row['pieces'] != 1 else ''}"
                for key, row in entries.items()
            ]
    return lines


def diff_lines(report: Any) -> list[str]:
    """Return the text of `diff`: differences first, then one line of verdict."""
    lines = []
    for title, pairs in (
        ("model", report.model),
        ("progress", report.progress),
        ("run setting", report.run_settings),
    ):
        lines += _cut([f"{title:<12}{key}: {a!r} | {b!r}" for key, (a, b) in pairs.items()])
    lines += _cut([f"only in A   {name}" for name in report.only_in_first])
    lines += _cut([f"only in B   {name}" for name in report.only_in_second])
    differing = []
    for one in report.differing:
        (shape_a, shape_b) = one.shapes
        (dtype_a, dtype_b) = one.dtypes
        what = [f"shape {list(shape_a)} | {list(shape_b)}"] if shape_a != shape_b else []
        what += [f"dtype {dtype_a} | {dtype_b}"] if dtype_a != dtype_b else []
        if one.max_abs_diff is not None:
            relative = "-" if one.max_rel_diff is None else f"{one.max_rel_diff:.3g}"
            what.append(f"max abs diff {one.max_abs_diff:.3g}, relative {relative}")
        differing.append(f"tensor      {one.name}: {'; '.join(what)}")
    lines += _cut(differing)
    apart = [one for one in report.differing if one.max_abs_diff is not None]
    if len(apart) > 1:
        worst = max(
            apart, key=lambda one: math.inf if math.isnan(one.max_abs_diff) else one.max_abs_diff
        )
        lines.append(f"largest     {worst.name}: max abs diff {worst.max_abs_diff:.3g}")
    same = report.compared - len(report.differing)
    lines.append(
        f"verdict     {'same' if report.equal else 'DIFFERENT'}: {same} of {report.compared} "
        "common tensors equal bit for bit"
    )
    return lines


def _cut(lines: list[str]) -> list[str]:
    return (
        [*lines[:SHOWN], f"... and {len(lines) - SHOWN} more (see --json)"]
        if len(lines) > SHOWN
        else lines
    )


def print_table(rows: Sequence[tuple[str, ...]]) -> None:
    """Print columns as wide as their widest cell."""
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    for row in rows:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )
