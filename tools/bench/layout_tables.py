"""Tables of cases (`layout_case.py`) that were measured on several layouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fresh_process import Row

PARITY = "parity"
TIMING = "timing"
ONE_GPU = "one GPU"
"""The layout of the cases that others are compared with."""


def parity_lines(rows: Sequence[Row]) -> list[str]:
    """Return a Markdown table of losses and gradient norms of every stage and layout, and how far
    they are from those of one GPU: the largest of all steps, relative."""
    lines = [
        "| stage | layout | losses | norms | largest difference of loss, norm |",
        "|---|---|---|---|---|",
    ]
    cases = [row for row in rows if row["kind"] == PARITY]
    for stage in dict.fromkeys(stage for row in cases for stage in row["stages"]):
        for row in (row for row in cases if stage in row["stages"]):
            if "failed" in row:
                lines.append(f"| {stage} | {row['layout']} | failed | | |")
                continue
            found = row["measured"][stage]
            losses, norms = (
                " ".join(f"{value:.5f}" for value in found[key]) for key in ("losses", "grad_norms")
            )
            apart = difference(rows, row, stage)
            said = "-" if apart is None else f"{apart[0]:.1e}, {apart[1]:.1e}"
            lines.append(f"| {stage} | {row['layout']} | {losses} | {norms} | {said} |")
    return lines if cases else []


def difference(rows: Sequence[Row], row: Row, stage: str) -> tuple[float, float] | None:
    """Return the largest relative differences of the losses and of the norms of a parity case from
    those of one GPU; None when one GPU was not measured."""
    one = _one_gpu(rows, PARITY, None)
    if one is None or stage not in one["measured"]:
        return None
    loss, norm = (
        max(
            abs(a - b) / abs(a)
            for a, b in zip(one["measured"][stage][key], row["measured"][stage][key], strict=True)
        )
        for key in ("losses", "grad_norms")
    )
    return loss, norm


def efficiency(rows: Sequence[Row], row: Row) -> tuple[float, float] | None:
    """Return the tokens per second, and the operations per second, of each GPU of a timed case over
    those of the case on one GPU that it is compared with; None when that was not measured."""
    one = _one_gpu(rows, TIMING, row["baseline"])
    if one is None:
        return None
    (mine,), (ones,) = row["measured"].values(), one["measured"].values()
    tokens = mine["tokens_per_second"] / row["processes"] / ones["tokens_per_second"]
    return tokens, mine["tflops_per_gpu"] / ones["tflops_per_gpu"]


def _one_gpu(rows: Sequence[Row], kind: str, name: str | None) -> Row | None:
    return next(
        (
            row
            for row in rows
            if row["kind"] == kind
            and "measured" in row
            and (row["layout"] == ONE_GPU if name is None else row["name"] == name)
        ),
        None,
    )


def timing_lines(
    rows: Sequence[Row], more: Mapping[str, Mapping[str, str]] | None = None
) -> list[str]:
    """Return a Markdown table of the speed of every timed case. `more` adds columns: by the name of
    a case what each column says."""
    cases = [row for row in rows if row["kind"] == TIMING]
    if not cases:
        return []
    extra = list(next(iter(more.values()))) if more else []
    heads = [
        "case", "tokens x sequences", "ms a step", "tokens/s/GPU", "MFU", "GiB",
        "of one GPU", "by work", "goal", *extra,
    ]  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in cases:
        begin = [row["name"], f"{row['seq_length']} x {row['global_batch']}"]
        goal = f"{row['goal']:.0%}" if row["goal"] else ""
        said = more.get(row["name"], {}) if more else {}
        end = [goal, *(said.get(column, "") for column in extra)]
        if "failed" in row:
            middle = ["failed", *[""] * 5]
        else:
            (found,) = row["measured"].values()
            shares = efficiency(rows, row)
            milliseconds = 1e3 * sorted(found["seconds"])[len(found["seconds"]) // 2]
            middle = [
                f"{milliseconds:.1f}",
                f"{found['tokens_per_second'] / row['processes']:.0f}",
                f"{found['mfu']:.1%}" if found["mfu"] else "-",
                f"{found['memory_gib']:.1f}",
                *([f"{share:.1%}" for share in shares] if shares else ["-", "-"]),
            ]
        lines.append("| " + " | ".join([*begin, *middle, *end]) + " |")
    return lines


def failures(rows: Sequence[Row]) -> list[str]:
    """Return what went wrong, a paragraph for each case that failed."""
    return [
        f"{row['name']} failed:\n\n    " + row["failed"].strip().replace("\n", "\n    ")
        for row in rows
        if "failed" in row
    ]
