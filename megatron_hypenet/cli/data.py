"""`hypenet data`: make token files of text, join and inspect them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_hypenet.cli.options import DryRunOption, JsonOption
from megatron_hypenet.errors import DataError, UsageError
from megatron_hypenet.ownership import writing

app = typer.Typer(
    help="Prepare and inspect training data.",
    epilog="Example:  hypenet data prepare assets/tiny-qwen3/sample.txt build/sample --tokenizer "
    "assets/tiny-qwen3",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)

OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace OUT when it exists.")]


def _refuse_existing(out: Path, overwrite: bool) -> None:
    found = [path for path in (Path(f"{out}.bin"), Path(f"{out}.idx")) if path.exists()]
    if found and not overwrite:
        raise UsageError(
            f"{found[0]} exists; pass --overwrite to replace it, or choose another prefix"
        )


def _say(as_json: bool, content: dict[str, Any], text: str) -> None:
    typer.echo(json.dumps(content) if as_json else text)


@app.command()
def prepare(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="TEXT", help="A .txt file, or a .jsonl file with one object a line."
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
        str, typer.Option("--text-key", help="Field of a .jsonl object that holds the text.")
    ] = "text",
    overwrite: OverwriteOption = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Tokenize a text into Megatron's .bin/.idx format.

    Runs do this by themselves for text files; prepare a large text once, and name the prefix in
    data.train.

    Examples:

      hypenet data prepare assets/tiny-qwen3/sample.txt build/sample --tokenizer assets/tiny-qwen3
      hypenet data prepare corpus.jsonl /data/corpus --tokenizer /models/Qwen3-1.7B --text-key
      content
    """
    from megatron_hypenet.data.prepare import prepare_file, read_documents
    from megatron_hypenet.data.tokenizer import end_of_text, load_tokenizer, model_end_of

    _refuse_existing(out, overwrite)
    loaded = load_tokenizer(tokenizer)
    end = end_of_text(loaded, model_end_of(tokenizer))
    if end.note:
        print(f"note: {end.note}", file=sys.stderr)
    if dry_run:
        if next(read_documents(source, text_key=text_key), None) is None:
            raise DataError(
                f"{source}: holds no text; give a file with at least one sequence of tokens."
            )
        _say(
            as_json,
            {"source": str(source), "out": str(out), "vocab_size": len(loaded)},
            f"would tokenize {source} into {out}.bin and {out}.idx",
        )
        return

    def progress(count: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{count:,} documents", end="", file=sys.stderr, flush=True)

    with writing(out):
        counts = prepare_file(
            source, out, loaded, end=end.id, text_key=text_key, on_documents=progress
        )
    if counts.note:
        print(f"note: {counts.note}", file=sys.stderr)
    content = {
        "out": str(out),
        "documents": counts.documents,
        "tokens": counts.tokens,
        "end_of_document": end.id,
    }
    _say(as_json, content, f"{out}: {counts.documents:,} documents, {counts.tokens:,} tokens")


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
    as_json: JsonOption = False,
) -> None:
    """Say what a pair of token files holds: documents, tokens, id type, ids at the start.

    Negative ids, and with --tokenizer ids outside its model's vocabulary, are an error that names
    the first one.

    Example:

      hypenet data inspect build/sample --tokenizer assets/tiny-qwen3
    """
    from megatron_hypenet.data.indexed import open_tokens
    from megatron_hypenet.data.token_ids import scan_ids

    opened = open_tokens(prefix)
    vocab_size = loaded = None
    if tokenizer is not None:
        from megatron_hypenet.data.tokenizer import load_tokenizer, model_vocabulary

        loaded = load_tokenizer(tokenizer)
        vocab_size = model_vocabulary(tokenizer) or len(loaded)
    found = scan_ids(opened, vocab_size)
    first = opened.tokens[:tokens].tolist()
    content: dict[str, Any] = {
        "prefix": str(prefix),
        "documents": len(opened.document_ends),
        "tokens": len(opened.tokens),
        "id_type": str(opened.tokens.dtype),
        "lowest_id": found.lowest,
        "highest_id": found.highest,
        "first_ids": first,
    }
    if loaded is not None:
        content["text"] = loaded.decode(first)
    _say(as_json, content, "\n".join(f"{name}: {value}" for name, value in content.items()))


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
    if out.resolve() in [prefix.resolve() for prefix in prefixes]:
        raise UsageError(f"{out} is one of the pairs to join; choose another prefix for the result")
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
