"""Text from a checkpoint, a run or a Hugging Face folder, streamed as it comes.

transformers runs it with this package's modelling code, or vLLM where it is installed. A prompt is
taken as it is; with --chat the tokenizer's template is put around it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_hypenet.cli.engines import Engine
from megatron_hypenet.cli.options import DryRunOption, JsonOption, check_device, check_dtype
from megatron_hypenet.errors import DataError, UsageError
from megatron_hypenet.untrusted.files import FileKind

if TYPE_CHECKING:
    from megatron_hypenet.export.generate import Generated, Sampling

app = typer.Typer(add_completion=False, rich_markup_mode=None)

_MOST_PROMPT_BYTES = 64 << 20
"""Largest prompt that is read; no model has a context of so many tokens."""


@app.command()
def generate(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="Checkpoint, run, or Hugging Face folder.")
    ],
    prompt: Annotated[str | None, typer.Option("--prompt", help="The text to continue.")] = None,
    file: Annotated[
        Path | None, typer.Option("--file", help="Text file (UTF-8) to continue; - reads stdin.")
    ] = None,
    chat: Annotated[
        bool,
        typer.Option("--chat", help="Use the chat template; without a prompt, a line is a turn."),
    ] = False,
    system: Annotated[
        str | None, typer.Option("--system", help="System message, with --chat.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Most tokens to generate.")
    ] = 256,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, help="0 takes the likeliest token.")
    ] = 0.0,
    top_k: Annotated[
        int, typer.Option("--top-k", min=0, help="Sample among so many tokens; 0: among all.")
    ] = 0,
    top_p: Annotated[
        float, typer.Option("--top-p", min=0.0, max=1.0, help="Sample within this probability.")
    ] = 1.0,
    repetition_penalty: Annotated[
        float, typer.Option("--repetition-penalty", min=0.01, help="Above 1 avoids repetition.")
    ] = 1.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the sampling.")] = 0,
    ignore_end: Annotated[
        bool, typer.Option("--ignore-end", help="Go on after an end token.")
    ] = False,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32, bfloat16, ...; default: the weights'.")
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", help="cuda, cuda:1, cpu; default: a GPU if any.")
    ] = None,
    engine: Annotated[Engine, typer.Option("--engine", help="transformers or vLLM.")] = Engine.HF,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Continue a prompt, or chat.

    The text is printed as it comes; --json prints it at the end, with tokens and times. Greedy
    unless --temperature is given.

    Examples:

      hypenet generate runs/demo --prompt "It is a truth universally" --max-new-tokens 32

      hypenet generate /models/HypeNet-2B --file book.txt --temperature 0.7 --top-p 0.9

      hypenet generate /models/HypeNet-2B --chat
    """
    turns = _turns(prompt, file, chat=chat, as_json=as_json or dry_run)
    if system is not None and not chat:
        raise UsageError("--system is part of a chat template; add --chat")
    if not (temperature or (top_k == 0 and top_p == 1.0)):
        raise UsageError("--top-k and --top-p choose among samples; add --temperature, such as 0.7")
    check_dtype(dtype)
    check_device(device)
    from megatron_hypenet.checkpoint.places import refuse_missing

    refuse_missing(model)
    from megatron_hypenet.data.tokenizer import load_tokenizer
    from megatron_hypenet.export.generate import Sampling
    from megatron_hypenet.export.hf_model import as_hf_folder, read_config

    sampling = Sampling(
        max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed, ignore_end
    )
    with as_hf_folder(model) as folder:
        config = read_config(folder)
        tokenizer = load_tokenizer(folder)
        if chat and not getattr(tokenizer, "chat_template", None):
            raise DataError(f"{model}: its tokenizer has no chat template; leave out --chat")
        run = _engine(engine, folder, config, tokenizer, dtype, device, dry_run=dry_run)
        messages = [{"role": "system", "content": system}] if system is not None else []
        for turn in turns:
            ids = _ids(tokenizer, turn, messages, chat=chat)
            _mind_length(len(ids), max_new_tokens, config.max_position_embeddings)
            if dry_run:
                _print({"model": str(folder), "prompt_tokens": len(ids)}, as_json=as_json)
                return
            found = run(ids, sampling, quiet=as_json)
            messages.append({"role": "assistant", "content": found.text})
            if as_json:
                numbers = {name: getattr(found, name) for name in found.__slots__}
                _print({"model": str(folder), **numbers}, as_json=True)
            else:
                print(flush=True)
                print(_figures(found), file=sys.stderr)


def _figures(found: Generated) -> str:
    """Return the lengths and times of one answer."""
    lengths = f"{found.prompt_tokens} + {len(found.tokens)} tokens, "
    if not found.first_token_seconds:
        return f"{lengths}{found.seconds:.2f} s"
    return (
        f"{lengths}{found.first_token_seconds:.2f} s to the first, "
        f"{found.tokens_per_second:.1f} tokens/s after it"
    )


def _turns(prompt: str | None, file: Path | None, *, chat: bool, as_json: bool) -> Iterator[str]:
    """Return the prompts: one, or in a chat each line that is typed. UsageError unless there is
    one."""
    if prompt is not None and file is not None:
        raise UsageError("give --prompt or --file, not both")
    if prompt is None and file is None:
        if not chat or as_json:
            raise UsageError("give a prompt: --prompt TEXT, or --file FILE (- reads stdin)")
        return _typed()
    text = prompt if prompt is not None else _read(file or Path("-"))
    if not text:
        raise UsageError("the prompt is empty; give at least one character")
    return iter([text])


def _typed() -> Iterator[str]:
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            print(file=sys.stderr)
            return
        if line.strip():
            yield line.rstrip("\n")


def _read(file: Path) -> str:
    kind = FileKind(
        error=DataError, advice="give a text file in UTF-8", max_bytes=_MOST_PROMPT_BYTES
    )
    if str(file) != "-":
        file.stat()  # OSError, which names a file that is missing
        return kind.read_text(file)
    raw = sys.stdin.buffer.read(_MOST_PROMPT_BYTES + 1)
    if len(raw) > _MOST_PROMPT_BYTES:
        kind.refuse("stdin", f"more than {_MOST_PROMPT_BYTES:,} bytes")
    return kind.decode("stdin", raw)


def _ids(tokenizer: Any, turn: str, messages: list[dict[str, str]], *, chat: bool) -> list[int]:
    """Return the tokens of a prompt, or of the whole conversation, to which the turn is added."""
    from megatron_hypenet.data.tokenizer import encode

    text = turn
    if chat:
        messages.append({"role": "user", "content": turn})
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = encode(tokenizer, text)
    if not ids:
        raise UsageError("the prompt has no tokens; give at least one character")
    return ids


def _mind_length(prompt: int, new: int, known: int) -> None:
    if prompt + new > known:
        print(
            f"note: {prompt} + {new} tokens are more than the {known} that the model claims; "
            "how good it is there, only an evaluation says",
            file=sys.stderr,
        )


def _engine(
    engine: Engine,
    folder: Path,
    config: Any,
    tokenizer: Any,
    dtype: str | None,
    device: str | None,
    *,
    dry_run: bool,
) -> Any:
    """run(ids, sampling, quiet=...) -> Generated, with the model loaded."""
    if engine is Engine.VLLM:
        from megatron_hypenet.cli.serve import require_vllm

        require_vllm()
        import megatron_hypenet.serve.vllm.offline as offline
        from megatron_hypenet.export.hf_model import weights_dtype

        loaded = None if dry_run else offline.load(folder, dtype or weights_dtype(folder))

        def by_vllm(ids: list[int], sampling: Sampling, *, quiet: bool) -> Any:
            return offline.generate(loaded, ids, sampling, None if quiet else _show)

        return by_vllm
    from megatron_hypenet.export import generate as exported
    from megatron_hypenet.export.hf_model import default_device, load_model

    model = None if dry_run else load_model(folder, config, dtype, device or default_device())

    def by_transformers(ids: list[int], sampling: Sampling, *, quiet: bool) -> Any:
        return exported.generate(model, tokenizer, ids, sampling, None if quiet else _show)

    return by_transformers


def _show(text: str) -> None:
    print(text, end="", flush=True)


def _print(numbers: dict[str, Any], *, as_json: bool) -> None:
    print(
        json.dumps(numbers)
        if as_json
        else "\n".join(f"{name}: {value}" for name, value in numbers.items())
    )
