"""`hypenet data`: make token files of text, join and inspect them.

One file, because half of it declares the options of three verbs."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_hypenet.cli.options import DryRunOption, JsonOption
from megatron_hypenet.config.bundled import bundled
from megatron_hypenet.errors import UsageError
from megatron_hypenet.ownership import writing

if TYPE_CHECKING:
    from megatron_hypenet.data.prepare import CorpusJob

app = typer.Typer(
    help="Prepare and inspect training data.",
    epilog="Example:\n\nhypenet data prepare assets/tiny-qwen3/sample.txt build/sample --tokenizer "
    "assets/tiny-qwen3",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)

OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace OUT when it exists.")]


WORTH_WORKERS = 32_000_000
"""Bytes of text from which on several processes are faster."""


def _refuse_existing(out: Path, overwrite: bool) -> None:
    from megatron_hypenet.data.journal import is_finishing

    names = [Path(f"{out}{suffix}") for suffix in (".bin", ".idx", ".mask")]
    found = [path for path in names if path.exists()]
    if found and not overwrite and not is_finishing(out):
        raise UsageError(
            f"{found[0]} exists; pass --overwrite to replace it, or choose another prefix"
        )


def _say(as_json: bool, content: dict[str, Any], text: str) -> None:
    typer.echo(json.dumps(content) if as_json else text)


SeqLengthOption = Annotated[
    int,
    typer.Option(
        "--seq-length",
        min=1,
        metavar="N",
        help="Sequence length that the statistics tell cut documents for.",
    ),
]


@app.command()
def prepare(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="TEXT",
            help="A .txt, .jsonl, .json (also as .gz or .zst), .parquet or .arrow file, a folder "
            "or pattern of them, or a folder of `save_to_disk`.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="Prefix of the pair to write: OUT.bin and OUT.idx."),
    ],
    tokenizer: Annotated[
        Path,
        typer.Option("--tokenizer", help="Hugging Face folder whose tokenizer the teacher uses."),
    ],
    text_key: Annotated[
        str, typer.Option("--text-key", help="Field of a record that holds the text.")
    ] = "text",
    messages_key: Annotated[
        str | None,
        typer.Option(
            "--messages-key",
            help="Field of a record that holds a conversation, for the chat template; writes "
            "OUT.mask, and stages 2 and 3 learn the answers only.",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            min=1,
            help="Processes that tokenize; the output is the same for every number. Default: one "
            "per CPU, but none for less than 32 MB of text.",
        ),
    ] = None,
    part: Annotated[
        str | None,
        typer.Option(
            "--part",
            metavar="I/N",
            help="Only the I-th of N shares of TEXT, from 0; `data merge` joins them in order.",
        ),
    ] = None,
    seq_length: SeqLengthOption = 4096,
    slurm: Annotated[
        bool,
        typer.Option("--slurm", help="Submit it as a job array; needs --cluster and --tasks."),
    ] = False,
    cluster: Annotated[
        Path | None,
        typer.Option("--cluster", help="Cluster profile; its GPUs and nodes are not asked for."),
    ] = None,
    tasks: Annotated[
        int | None,
        typer.Option("--tasks", min=1, help="Shares of TEXT, a task of the array for each."),
    ] = None,
    overwrite: OverwriteOption = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Tokenize a corpus into Megatron's .bin/.idx format.

    Runs do this by themselves for short texts; prepare a large one once, and name the prefix in
    data.train. A preparation that was killed goes on when the same command is given again.

    Examples:

      hypenet data prepare assets/tiny-qwen3/sample.txt build/sample --tokenizer assets/tiny-qwen3

      hypenet data prepare 'crawl/*.jsonl.zst' /data/crawl --tokenizer /models/Qwen3-1.7B
        --text-key content --workers 32

      hypenet data prepare crawl /data/crawl --tokenizer /models/Qwen3-1.7B --slurm
        --cluster my.yaml --tasks 64 --workers 16
    """
    from megatron_hypenet.cli.progress import corpus_progress
    from megatron_hypenet.data.prepare import CorpusJob, prepare_corpus_files

    by_slurm = slurm or cluster is not None or tasks is not None
    if by_slurm and not (slurm and cluster is not None and tasks is not None and part is None):
        raise UsageError("--slurm needs --cluster PROFILE and --tasks N, and takes no --part")
    share = _part(part)
    source, tokenizer = bundled(source), bundled(tokenizer)
    job = CorpusJob(**_checked_job(source, out, tokenizer, text_key, messages_key), part=share)
    _refuse_existing(out, overwrite)
    size = _text_bytes(job)
    if by_slurm and cluster is not None and tasks is not None:
        words = ["--tokenizer", str(tokenizer.absolute()), "--text-key", text_key]
        words = words if messages_key is None else [*words[:2], "--messages-key", messages_key]
        _submit(job, words, cluster, tasks, workers, overwrite, dry_run, as_json)
        return
    job = replace(job, workers=default_workers(size) if workers is None else workers)
    if dry_run:
        _say(
            as_json,
            {
                "source": str(source),
                "out": str(out),
                "vocab_size": job.vocab_size,
                "bytes": size,
                "workers": job.workers,
            },
            f"would tokenize {source} ({size:,} bytes) into {out}.bin and {out}.idx",
        )
        return
    with writing(out), corpus_progress() as progress:
        counts = prepare_corpus_files(job, overwrite=overwrite, on_progress=progress)
    if counts.note:
        print(f"note: {counts.note}", file=sys.stderr)
    content = {"out": str(out), "documents": counts.documents, "tokens": counts.tokens}
    content |= {"end_of_document": job.end}
    if counts.answers is not None:
        content["answers"] = counts.answers
    content |= _statistics(out, seq_length) if counts.tokens else {}
    _say(as_json, content, f"{out}: " + described(content))


def _submit(
    job: CorpusJob, words: list[str], cluster: Path, tasks: int, workers: int | None,
    overwrite: bool, dry_run: bool, as_json: bool,
) -> None:  # fmt: skip
    """Write and submit the job array of a preparation that was checked, or show its scripts."""
    from megatron_hypenet.cli.submit import show_scripts
    from megatron_hypenet.cluster import prepare_jobs
    from megatron_hypenet.cluster.job_script import missing_variables
    from megatron_hypenet.config.cluster import load_cluster_config
    from megatron_hypenet.data.readers import parts_of
    from megatron_hypenet.data.sources import find_files
    from megatron_hypenet.errors import SetupError

    profile = load_cluster_config(cluster)
    if missing := missing_variables(profile, os.environ):
        raise SetupError(
            f"the profile hands on {', '.join(missing)} from your shell, where it is not set; "
            "export it, or take it off the list"
        )
    files = find_files(job.source).files
    filled = sum(bool(parts_of(files, number, tasks)) for number in range(tasks))
    if filled < tasks:
        raise UsageError(
            f"--tasks {tasks}: the text gives {filled} shares; only .jsonl is split inside of "
            f"files. Use --tasks {filled}"
        )
    scripts = prepare_jobs.prepare_scripts(
        job.source, job.out, words, profile, tasks=tasks, workers=workers
    )
    if not overwrite:
        prepare_jobs.refuse_earlier(job.out)
    if dry_run:
        show_scripts(scripts, as_json=as_json)
        return
    prepare_jobs.remove_earlier(job.out)
    numbers = prepare_jobs.send(scripts)
    folder = str(prepare_jobs.jobs_folder(job.out))
    jobs = {script.part: number for script, number in zip(scripts, numbers, strict=True)}
    lines = [f"job {number} ({part})" for part, number in jobs.items()]
    _say(as_json, {"out": str(job.out), "jobs": jobs, "folder": folder}, "\n".join(lines))
    if not as_json:
        print(f"scripts and logs in {folder}", file=sys.stderr)


def _part(word: str | None) -> tuple[int, int]:
    """Return (number from 0, count) of --part I/N."""
    if word is None:
        return 0, 1
    number, slash, count = word.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise UsageError(f"--part {word}: expected I/N with I from 0 to N - 1, such as 0/8")
    return int(number), int(count)


def _checked_job(
    source: Path, out: Path, tokenizer: Path, text_key: str, messages_key: str | None
) -> dict[str, Any]:
    """Return what a preparation needs, after everything that can be checked without reading the
    text."""
    from megatron_hypenet.data.chat import ChatEncoder
    from megatron_hypenet.data.places import Fields
    from megatron_hypenet.data.tokenizer import end_of_text, load_tokenizer, model_end_of

    if messages_key is not None and text_key != "text":
        raise UsageError("--text-key and --messages-key name one field each; give one of them")
    loaded = load_tokenizer(tokenizer)
    if messages_key is not None:
        ChatEncoder(loaded)
    end = end_of_text(loaded, model_end_of(tokenizer))
    if end.note:
        print(f"note: {end.note}", file=sys.stderr)
    files = [path for path in sorted(tokenizer.iterdir()) if path.is_file()]
    return {
        "source": source,
        "out": out,
        "tokenizer": loaded,
        # weights beside the tokenizer do not decide the ids
        "tokenizer_files": [
            (path.name, path.stat().st_size, path.stat().st_mtime_ns)
            for path in files
            if path.suffix in (".json", ".txt", ".model", ".jinja")
        ],
        "fields": Fields(text_key, messages_key),
        "end": end.id,
        "vocab_size": len(loaded),
        "workers": 0,
    }


def _text_bytes(job: CorpusJob) -> int:
    """Return the bytes of text of a preparation, whose files and first document are checked."""
    from megatron_hypenet.data.check import check_text
    from megatron_hypenet.data.readers import parts_of
    from megatron_hypenet.data.sources import find_files

    found = find_files(job.source)
    check_text(found, job.fields, job.source)
    return sum(part.stop - part.start for part in parts_of(found.files, *job.part))


def default_workers(text_bytes: int) -> int:
    """Return one process per CPU that this one may use; none where starting them takes longer than
    the text."""
    return 0 if text_bytes < WORTH_WORKERS else len(os.sched_getaffinity(0))


def _statistics(prefix: Path, seq_length: int) -> dict[str, Any]:
    """Return the statistics of a pair, by name."""
    from megatron_hypenet.data.indexed import open_tokens
    from megatron_hypenet.data.statistics import statistics

    return asdict(statistics(open_tokens(prefix), seq_length))


def described(content: dict[str, Any]) -> str:
    """Return the counts of a preparation in one line."""
    text = f"{content['documents']:,} documents, {content['tokens']:,} tokens"
    if "answers" in content:
        text += f", {content['answers'] / max(1, content['tokens']):.1%} of them answers"
    if "longest" in content:
        text += (
            f"; the longest has {content['longest']:,}; {content['cut_documents']:.1%} are longer "
            f"than {content['seq_length']:,}, with {content['cut_tokens']:.1%} of the tokens "
            "behind that"
        )
    return text


@app.command()
def inspect(
    prefix: Annotated[Path, typer.Argument(metavar="PREFIX", help="Prefix of a .bin/.idx pair.")],
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            "--tokenizer", help="Also show the beginning of the text with this tokenizer."
        ),
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens to show.")] = 64,
    seq_length: SeqLengthOption = 4096,
    as_json: JsonOption = False,
) -> None:
    """Say what a pair of token files holds: documents, tokens, id type, lengths, ids at the start.

    Negative ids, and with --tokenizer ids outside its model's vocabulary, are an error that names
    the first one.

    Example:

      hypenet data inspect build/sample --tokenizer assets/tiny-qwen3
    """
    from megatron_hypenet.data.indexed import open_tokens
    from megatron_hypenet.data.statistics import statistics
    from megatron_hypenet.data.token_ids import scan_ids

    opened = open_tokens(prefix)
    vocab_size = loaded = None
    if tokenizer is not None:
        tokenizer = bundled(tokenizer)
        from megatron_hypenet.data.tokenizer import load_tokenizer, model_vocabulary

        loaded = load_tokenizer(tokenizer)
        vocab_size = model_vocabulary(tokenizer) or len(loaded)
    found = scan_ids(opened, vocab_size)
    lengths = asdict(statistics(opened, seq_length))
    first = opened.tokens[:tokens].tolist()
    content: dict[str, Any] = {
        "prefix": str(prefix),
        "documents": len(opened.document_ends),
        "tokens": len(opened.tokens),
        "id_type": str(opened.tokens.dtype),
        "lowest_id": found.lowest,
        "highest_id": found.highest,
        **({} if found.answers is None else {"answers": found.answers}),
        **{name: lengths[name] for name in ("longest", "cut_documents", "cut_tokens")},
        "first_ids": first,
    }
    if loaded is not None:
        content["text"] = loaded.decode(first)
    _say(as_json, content, "\n".join(f"{name}: {value}" for name, value in content.items()))


def _refuse_input_as_output(out: Path, prefixes: list[Path]) -> None:
    """Raise UsageError when a file of the result is a file to join, under whatever name."""
    for prefix in prefixes:
        for suffix in (".bin", ".idx", ".mask"):
            one, other = Path(f"{out}{suffix}"), Path(f"{prefix}{suffix}")
            same = one.exists() and other.exists() and one.samefile(other)
            if same or out.resolve() == prefix.resolve():
                raise UsageError(
                    f"{out} is one of the pairs to join (as {prefix}); choose another prefix for "
                    "the result"
                )


@app.command()
def merge(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Prefix of the pair to write.")],
    prefixes: Annotated[
        list[Path], typer.Argument(metavar="PREFIX...", help="Pairs to join, in order.")
    ],
    overwrite: OverwriteOption = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Join pairs of token files that one tokenizer made.

    Example:

      hypenet data merge /data/all /data/part0 /data/part1
    """
    from megatron_hypenet.data.indexed import open_tokens
    from megatron_hypenet.data.prepare import merge_files

    _refuse_existing(out, overwrite)
    _refuse_input_as_output(out, prefixes)
    if dry_run:
        total = sum(len(open_tokens(prefix).tokens) for prefix in prefixes)
        _say(
            as_json,
            {"out": str(out), "tokens": total},
            f"would join {len(prefixes)} pairs with {total:,} tokens into {out}",
        )
        return
    with writing(out):
        counts = merge_files(prefixes, out)
    _say(
        as_json,
        {"out": str(out), "documents": counts.documents, "tokens": counts.tokens},
        f"{out}: {counts.tokens:,} tokens",
    )
