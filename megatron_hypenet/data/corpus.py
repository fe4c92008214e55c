"""The data of one run: its sources as token files in one folder, split into training and held-out
text, and recall documents over both.

DIR/corpus.json            sources, fingerprints, counts
DIR/train_000.bin/.idx     one pair for each text source; prepared pairs are used where they lie
DIR/heldout.bin/.idx       the held-out source, when it is text
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_hypenet.atomic_files import write_text
from megatron_hypenet.config.schema import SourceConfig, as_source
from megatron_hypenet.data.blend import TrainData, check_ids
from megatron_hypenet.data.indexed import TokenFile, TokenStream, open_tokens
from megatron_hypenet.data.pairs import INDEX_FILE, is_token_file, mask_path, token_paths
from megatron_hypenet.data.prepare import prepare_file
from megatron_hypenet.data.recall import RecallTask, RecallVocabulary
from megatron_hypenet.data.sources import find_files, is_prepared
from megatron_hypenet.data.token_ids import scan_ids
from megatron_hypenet.data.tokenizer import end_of_text, load_tokenizer, recall_vocabulary
from megatron_hypenet.errors import DataError
from megatron_hypenet.untrusted.files import FileKind, has_entry
from megatron_hypenet.untrusted.json_text import read_object, typed

EVALUATION_SEED = 0x5EED
"""Added to the run's seed for evaluation documents, so that they differ from the recall documents
that are trained on."""


def prepare_corpus(
    train: Sequence[Path | SourceConfig], heldout: Path | SourceConfig | None,
    tokenizer_dir: Path, folder: Path, *,
    vocab_size: int,
    model_end: int | Sequence[int] | None = None, log: Callable[[str], None] = lambda text: None,
    check: Callable[[RecallVocabulary], None] = lambda vocabulary: None,
) -> dict[str, Any]:  # fmt: skip
    """Make the token files of a run in `folder`; a source that has not changed since the last call
    is not tokenized again, and a prepared pair that has not changed is not checked for foreign ids
    again.

    `model_end` is the end-of-text token of the model's configuration; `check` is called with what
    the tokenizer spells facts by, before any text is tokenized. Returns what corpus.json holds.
    Raises DataError as `prepare_file`, `open_tokens` and `scan_ids` do.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(tokenizer_dir)
    known = (
        _read_index(folder) if has_entry(folder / INDEX_FILE) else {"train": [], "heldout": None}
    )
    end = end_of_text(tokenizer, model_end)
    if end.note:
        log(f"data: {end.note}")
    same_end = known.get("end_of_document") == end.id
    earlier = {
        record["prefix"]: record
        for record in [*known["train"], known["heldout"]]
        if record and same_end
    }

    def one(entry: Path | SourceConfig, name: str) -> dict[str, Any]:
        settings = as_source(entry)
        source = settings.path
        if is_prepared(source):
            return _checked_pair(
                source, earlier.get(str(source.resolve())), vocab_size, end.id, log
            )
        fingerprint = _fingerprint(settings, tokenizer_dir, vocab_size)
        record = earlier.get(name)
        if record and record["fingerprint"] == fingerprint and is_token_file(folder / name):
            return record
        log(f"data: tokenizing {source}")
        made = prepare_file(
            source,
            folder / name,
            tokenizer,
            end=end.id,
            vocab_size=vocab_size,
            text_key=settings.text_key,
            messages_key=settings.messages_key,
        )
        log(f"data: {source}: {made.tokens:,} tokens{_share(made.answers, made.tokens)}")
        if made.note:
            log(f"data: {made.note}")
        return {
            "source": str(source),
            "prefix": name,
            "fingerprint": fingerprint,
            "documents": made.documents,
            "tokens": made.tokens,
        }

    vocabulary = recall_vocabulary(tokenizer)
    check(vocabulary)
    content = {
        "vocab_size": vocab_size,
        "end_of_document": end.id,
        "train": [one(source, f"train_{number:03d}") for number, source in enumerate(train)],
        "heldout": None if heldout is None else one(heldout, "heldout"),
        "recall": {
            name: list(getattr(vocabulary, name))
            for name in ("words", "opening", "separator", "closing")
        },
    }
    write_text(folder / INDEX_FILE, json.dumps(content) + "\n")
    return content


def _checked_pair(
    source: Path,
    earlier: dict[str, Any] | None,
    vocab_size: int,
    end: int,
    log: Callable[[str], None],
) -> dict[str, Any]:
    """Return the record of a prepared pair. Its ids are checked once: now, or when `earlier` was
    written for the same files."""
    opened = open_tokens(source)
    files = [path.stat() for path in token_paths(source)]
    if opened.mask is not None:
        files.append(mask_path(source).stat())
    fingerprint = [vocab_size, *([stat.st_size, stat.st_mtime_ns, stat.st_ino] for stat in files)]
    if earlier and earlier["fingerprint"] == fingerprint:
        return earlier
    started = time.perf_counter()
    found = scan_ids(opened, vocab_size, end_of_document=end)
    seconds = max(time.perf_counter() - started, 1e-6)
    log(
        f"data: {source}: {len(opened.tokens):,} tokens, ids {found.lowest} to {found.highest}, "
        f"{found.ends:,} end tokens{_share(found.answers, len(opened.tokens))} "
        f"(looked through at {opened.tokens.nbytes / seconds / 1e9:.1f} GB/s)"
    )
    counts = {
        "documents": len(opened.document_ends),
        "tokens": len(opened.tokens),
        "end_tokens": found.ends,
    }
    return {
        "source": str(source),
        "prefix": str(source.resolve()),
        "fingerprint": fingerprint,
        **counts,
    }


def _share(answers: int | None, tokens: int) -> str:
    """Return the share of a pair with a mask that is trained on, in words."""
    return "" if answers is None else f", {answers / tokens:.1%} of them answers"


def _fingerprint(source: SourceConfig, tokenizer_dir: Path, vocab_size: int) -> list[Any]:
    """Return values that change when the text or the tokenizer may have changed: sizes and
    modification times, not contents (texts can be terabytes)."""
    suffixes = (".json", ".txt", ".model") if source.messages_key is None else None
    files = [(file.path, file.size, file.modified_ns) for file in find_files(source.path).files]
    files += [
        (path, path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(tokenizer_dir.iterdir())
        if (path.suffix in suffixes if suffixes else path.is_file())
    ]
    defaults = SourceConfig(path=source.path)
    fields = [source.text_key, source.messages_key]
    return [
        vocab_size,
        *([str(path.resolve()), size, modified] for path, size, modified in files),
        *([] if fields == [defaults.text_key, defaults.messages_key] else [fields]),
    ]


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX_FILE
    if not path.exists():
        raise DataError(f"{path}: no such file; the text of this run has not been prepared.")
    kind = FileKind(error=DataError, advice=f"delete the folder {folder}, it will be made again")
    content = read_object(kind, path)
    typed(kind, path, content, _Index)
    return content


@dataclass(frozen=True, kw_only=True, slots=True)
class _Source:
    """One token file in corpus.json."""

    prefix: str
    documents: int
    tokens: int
    fingerprint: list[Any] | None
    end_tokens: int | None = None
    """Number of end-of-document tokens in a prepared pair; None for text, which always has them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Index:
    """The form of corpus.json."""

    vocab_size: int
    train: list[_Source]
    heldout: _Source | None
    recall: RecallVocabulary
    end_of_document: int | None = None


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """An opened folder of `prepare_corpus`."""

    train: TokenStream
    """All training text, one source after the other."""
    sources: tuple[TokenStream, ...]
    """The training text of each source."""
    heldout: TokenStream
    vocabulary: RecallVocabulary
    vocab_size: int
    end_of_document: int | None
    seed: int

    def training_data(
        self, *, recall_fraction: float, recall_pairs: int, weights: Sequence[float] | None = None
    ) -> TrainData:
        """Return training sequences, from each source as often as its weight says, or from all of
        them as one text; recall documents use training text as filler."""
        task = None
        if recall_fraction > 0:
            task = RecallTask(self.vocabulary, self.train, seed=self.seed, num_pairs=recall_pairs)
        return TrainData(
            self.train,
            seed=self.seed,
            vocab_size=self.vocab_size,
            end_of_document=self.end_of_document,
            recall=task,
            recall_fraction=recall_fraction,
            blend=() if weights is None else list(zip(self.sources, weights, strict=True)),
        )

    def recall_task(self, num_pairs: int) -> RecallTask:
        """Return the recall documents to measure on; held-out text is the filler."""
        return RecallTask(
            self.vocabulary, self.heldout, seed=self.seed + EVALUATION_SEED, num_pairs=num_pairs
        )

    def heldout_sequences(self, count: int, seq_length: int) -> Tensor:
        """Return the first `count` windows of the held-out text (fewer when it is short), int64 [n,
        seq_length + 1], overlapping by one token.

        Raises DataError when the held-out text is shorter than one window.
        """
        available = (len(self.heldout) - 1) // seq_length
        if available < 1:
            raise DataError(
                f"the held-out text has {len(self.heldout)} tokens, "
                f"one sequence needs {seq_length + 1}; "
                "raise data.heldout_fraction, name a data.heldout file, "
                "or use a shorter seq_length."
            )
        windows = [
            self.heldout[i * seq_length : (i + 1) * seq_length + 1]
            for i in range(min(count, available))
        ]
        rows = np.stack(windows)
        check_ids(rows, self.vocab_size)
        return torch.from_numpy(rows)


def open_corpus(folder: Path, *, heldout_fraction: float, seed: int) -> Corpus:
    """Open a folder that `prepare_corpus` made. Without a held-out source, the last
    `heldout_fraction` of each training source is held out.

    Raises DataError when the folder was not prepared, a file is damaged, or no text is left to
    train on or to measure on.
    """
    content = _read_index(folder)
    files = [open_tokens(folder / record["prefix"]) for record in content["train"]]
    if content["heldout"]:
        cuts = [len(file.tokens) for file in files]
        heldout = [open_tokens(folder / content["heldout"]["prefix"]).tokens]
    else:
        cuts = [file.documents_before(heldout_fraction) for file in files]
        heldout = [file.tokens[cut:] for file, cut in zip(files, cuts, strict=True)]
    parts = [
        _Part(file, cut, record.get("end_tokens"))
        for file, cut, record in zip(files, cuts, content["train"], strict=True)
    ]
    streams = _stream(parts), TokenStream(heldout)
    if len(streams[1]) == 0:
        raise DataError(
            "no held-out text: data.heldout is not set and the training files have one document "
            "each or data.heldout_fraction is 0. "
            "Name a data.heldout file, or give training text of at least two documents."
        )
    vocabulary = RecallVocabulary(**{name: tuple(ids) for name, ids in content["recall"].items()})
    return Corpus(
        train=streams[0],
        sources=tuple(_stream([part]) for part in parts),
        heldout=streams[1],
        vocabulary=vocabulary,
        vocab_size=content["vocab_size"],
        end_of_document=content.get("end_of_document"),
        seed=seed,
    )


@dataclass(frozen=True, slots=True)
class _Part:
    """The part of a source that is trained on."""

    file: TokenFile
    cut: int
    """Tokens before the held-out text."""
    end_tokens: int | None

    @property
    def document_ends(self) -> npt.NDArray[np.int64] | None:
        """Return the boundaries of the documents, where the end token does not tell them: files
        without one, and conversations, whose turns may end with it."""
        known = self.end_tokens == 0 or self.file.mask is not None
        return self.file.document_ends if known else None


def _stream(parts: Sequence[_Part]) -> TokenStream:
    return TokenStream(
        [part.file.tokens[: part.cut] for part in parts],
        [part.document_ends for part in parts],
        [part.file.mask_of(0, part.cut) for part in parts],
    )
