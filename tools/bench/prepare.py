"""The rate of `hypenet data prepare` beside the tokenizer's own, on a corpus made here of the text
files of this Python's packages.

    python tools/bench/prepare.py --gigabytes 2 --out /tmp/bench_prepare

The peer is the tokenizer itself: `tokenizer(texts, add_special_tokens=False)` of transformers over
lists of 256 texts, one thread, texts already in memory, ids thrown away. N = 2 is compared with two
such processes at the same time. A preparation is timed from the first byte read until the pair is
in place, after the tokenizer is loaded. Every measurement is taken in turns, a round after the
other, so that other work on the machine meets all alike. MB/s are of text in UTF-8. Beside the time
that passed stands the processor time of all processes, which other work disturbs less.

The corpus is .jsonl, a package's file for each document, in a seeded order, repeated until it is
large enough; every repetition after the first is changed: its words are rotated by a random number
of lines, and a heading with its number is put before it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import resource
import site
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SUFFIXES = (".py", ".md", ".rst", ".txt", ".pyi")
BATCH = 256


@dataclass(frozen=True)
class Measured:
    """One measurement."""

    what: str
    processes: int
    megabytes: float
    seconds: float
    cpu_seconds: float

    @property
    def rate(self) -> float:
        """Return MB of text for each second that passed."""
        return self.megabytes / self.seconds

    @property
    def cpu_rate(self) -> float:
        """Return MB of text for each second of processor time."""
        return self.megabytes / self.cpu_seconds


def package_texts() -> list[str]:
    """Return the text files of the installed packages, at most 200 kB of each."""
    found = []
    for folder in site.getsitepackages():
        for path in sorted(Path(folder).rglob("*")):
            if path.suffix in SUFFIXES and path.is_file():
                text = path.read_text(encoding="utf-8", errors="ignore").replace("\0", "")[:200_000]
                if len(text) > 200:
                    found.append(text)
    return found


def documents(texts: list[str], seed: int) -> Iterator[str]:
    """Yield all texts in random order, again and again, changed each time."""
    random_ = random.Random(seed)
    for turn in range(1_000_000):
        for number in random_.sample(range(len(texts)), len(texts)):
            if turn == 0:
                yield texts[number]
                continue
            lines = texts[number].splitlines(keepends=True)
            cut = random_.randrange(len(lines))
            yield f"Part {turn} of {number}\n" + "".join(lines[cut:] + lines[:cut])


def write_corpus(path: Path, size: float, texts: list[str], seed: int) -> int:
    """Write documents until `size` bytes of text; returns the bytes of text."""
    written = 0
    with path.open("w", encoding="utf-8") as out:
        for text in documents(texts, seed):
            out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            written += len(text.encode())
            if written >= size:
                return written
    raise AssertionError("the documents never end")


def peer(path: Path, tokenizer: Path) -> None:
    """Tokenize all texts of `path` as transformers does, in one thread."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from megatron_hypenet.data.tokenizer import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    texts = [json.loads(line)["text"] for line in path.open(encoding="utf-8")]
    before = time.perf_counter(), cpu_seconds()
    for start in range(0, len(texts), BATCH):
        loaded(
            texts[start : start + BATCH],
            add_special_tokens=False,
            return_attention_mask=False,
            verbose=False,
        )
    note_times(path, before)


def prepared(path: Path, tokenizer: Path, workers: int) -> None:
    """Do what `hypenet data prepare` does with `path` once the tokenizer is loaded: read, tokenize
    in `workers` processes, write, bring to the disk, and move into place."""
    from megatron_hypenet.data.places import Fields
    from megatron_hypenet.data.prepare import CorpusJob, prepare_corpus_files
    from megatron_hypenet.data.tokenizer import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    job = CorpusJob(
        source=path,
        out=path.with_suffix(""),
        tokenizer=loaded,
        tokenizer_files=[],
        fields=Fields(),
        end=loaded.eos_token_id,
        vocab_size=len(loaded),
        workers=workers,
    )
    before = time.perf_counter(), cpu_seconds()
    prepare_corpus_files(job, overwrite=True, on_progress=lambda progress: None)
    note_times(path, before)


def cpu_seconds() -> float:
    """Return the processor time of this process and its ended children so far, in seconds."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def note_times(path: Path, before: tuple[float, float]) -> None:
    """Leave the seconds and the processor seconds since `before` for the process that measures."""
    seconds = time.perf_counter() - before[0], cpu_seconds() - before[1]
    path.with_suffix(f".times{os.getpid()}").write_text(json.dumps(seconds))


def measured(what: str, path: Path, size: int, tokenizer: Path, processes: int) -> Measured:
    """Measure the tokenizer's rate in this number of processes at the same time, each over the
    whole of `path`; or the rate of a preparation with as many workers. Loading is not counted."""
    context = multiprocessing.get_context("spawn")
    if what == "tokenizer":
        running = [context.Process(target=peer, args=(path, tokenizer)) for _ in range(processes)]
    else:
        running = [context.Process(target=prepared, args=(path, tokenizer, processes))]
    for process in running:
        process.start()
    for process in running:
        process.join()
    notes = list(path.parent.glob(f"{path.stem}.times*"))
    times = [json.loads(note.read_text()) for note in notes]
    for note in notes:
        note.unlink()
    return Measured(
        what,
        processes,
        len(running) * size / 1e6,
        max(wall for wall, _ in times),
        sum(cpu for _, cpu in times),
    )


def table(found: list[Measured]) -> list[str]:
    """Return the medians as a Markdown table, with ratios to the peer."""
    rows = [
        "| N | | MB/s | of the peer | MB per CPU second | of the peer |",
        "|---|---|---|---|---|---|",
    ]
    for processes in sorted({one.processes for one in found}):
        peers = [one for one in found if (one.what, one.processes) == ("tokenizer", processes)]
        for what in ("tokenizer", "prepare"):
            these = [one for one in found if (one.what, one.processes) == (what, processes)]
            if not these:
                continue
            cells = []
            for value in (lambda one: one.rate, lambda one: one.cpu_rate):
                mine = statistics.median(map(value, these))
                cells += [f"{mine:.2f}", ratio(mine, peers, value)]
            rows.append(f"| {processes} | {what} | {' | '.join(cells)} |")
    return rows


def ratio(mine: float, peers: list[Measured], value: Callable[[Measured], float]) -> str:
    """Return a rate as a share of the peers' median."""
    return f"{mine / statistics.median(map(value, peers)):.0%}" if peers else "-"


def arguments() -> Any:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=0.02, help="text of the whole corpus")
    parser.add_argument("--sample", type=float, default=0.01, help="GB of text of one round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "assets" / "tiny-qwen3")
    parser.add_argument("--out", type=Path, required=True, help="folder for corpus and results")
    return parser.parse_args()


def main() -> None:
    """Measure samples in turns, then the whole corpus once with two workers."""
    given = arguments()
    given.out.mkdir(parents=True, exist_ok=True)
    texts = package_texts()
    unique = sum(len(text.encode()) for text in texts)
    print(f"{len(texts):,} files, {unique / 1e6:.0f} MB of text", file=sys.stderr)
    found: list[Measured] = []

    def note(one: Measured) -> None:
        found.append(one)
        print(f"{one.what} {one.processes}: {one.rate:.2f} MB/s, {one.cpu_rate:.2f} MB/CPU s")
        sys.stdout.flush()

    for turn in range(given.rounds):
        sample = given.out / f"sample{turn}.jsonl"
        size = write_corpus(sample, given.sample * 1e9, texts, seed=turn)
        for processes in (1, 2):
            note(measured("tokenizer", sample, size, given.tokenizer, processes))
            note(measured("prepare", sample, size, given.tokenizer, processes))
    print("\n".join(table(found)), flush=True)
    if given.gigabytes > given.sample:
        whole = given.out / "whole.jsonl"
        size = write_corpus(whole, given.gigabytes * 1e9, texts, seed=99)
        one = measured("prepare", whole, size, given.tokenizer, 2)
        print(
            f"whole corpus: {size / 1e9:.2f} GB of text, {one.seconds:.0f} s, {one.rate:.2f} MB/s, "
            f"{one.cpu_rate:.2f} MB/CPU s"
        )
    (given.out / "prepare.json").write_text(
        json.dumps([one.__dict__ for one in found], indent=1) + "\n"
    )
    for path in given.out.glob("*.*"):
        if path.suffix in (".jsonl", ".bin", ".idx"):
            path.unlink()


if __name__ == "__main__":
    main()
