"""Text to token files: documents through a tokenizer into Megatron's .bin/.idx format.

`prepare_file` does it in one go, as a run does for its text. `prepare_corpus_files` is for corpora
of any size: several processes, and a journal with which the same command goes on after it was
killed. Both give the same bytes, whatever the number of processes and interruptions.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_hypenet.data import journal
from megatron_hypenet.data.encode import Encoded, Encoder, Fields
from megatron_hypenet.data.indexed import open_tokens
from megatron_hypenet.data.journal import Empty, Journal, working_folder
from megatron_hypenet.data.pairs import token_paths
from megatron_hypenet.data.places import RecordError
from megatron_hypenet.data.readers import Batch, Part, parts_of, read_batches
from megatron_hypenet.data.sources import Found, SourceFile, find_files
from megatron_hypenet.data.token_writer import (
    TokenFileWriter,
    TokenFolder,
    id_type,
    move_into_place,
)
from megatron_hypenet.data.tokenizer import end_of_text
from megatron_hypenet.data.workers import encoded_in_order
from megatron_hypenet.errors import DataError, SetupError, is_disk_full

COMMIT_SECONDS = 20.0
"""Time between two states to which a killed preparation can go back."""


@dataclass(frozen=True, kw_only=True)
class Counts:
    """The counts of what one preparation wrote."""

    documents: int
    tokens: int
    note: str = ""
    """What was left out of the source, and why; else empty."""
    answers: int | None = None
    """Tokens that count in the loss, for conversations; None for text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a preparation is."""

    read_bytes: int
    total_bytes: int
    documents: int
    tokens: int
    seconds: float
    """Since the start of this command."""
    bytes_before: int = 0
    """Bytes that an earlier start of the command had read."""


def prepare_file(
    source: Path, prefix: Path, tokenizer: Any, *, end: int | None = None,
    vocab_size: int | None = None, text_key: str = "text", messages_key: str | None = None,
    on_documents: Callable[[int], None] = lambda count: None,
) -> Counts:  # fmt: skip
    """Tokenize `source` (data/sources.py) into the pair `prefix`.bin/.idx; the end-of-text id
    follows every document.

    `end` is that id (default: the tokenizer's, see `end_of_text`); `vocab_size` is the model's
    (default: the tokenizer's); `on_documents` is called with the running count. Records with
    `messages_key` are conversations, and the pair gets a .mask. A failure leaves no files. Raises
    DataError when the source is missing, of another kind, without text, or the tokenizer makes ids
    beyond `vocab_size`.
    """
    found = find_files(source)
    fields = Fields(text_key, messages_key)
    limit = len(tokenizer) if vocab_size is None else vocab_size
    end = end_of_text(tokenizer, None).id if end is None else end
    encoder = Encoder(tokenizer, fields, end=end, vocab_size=limit)
    batches = read_batches(found.files, parts_of(found.files, 0, 1), fields.key)
    empty = Empty()
    answers = 0
    with TokenFileWriter(prefix, vocab_size=limit, masked=fields.chat) as writer:
        for batch, encoded in encoded_in_order(encoder, found.files, batches, 0):
            writer.add_documents(encoded.ids, encoded.lengths, encoded.mask)
            answers += answers_of(encoded)
            empty = empty.with_more(places(batch, encoded, found.files))
            on_documents(writer.num_documents)
        if writer.num_tokens == 0:
            raise DataError(_no_text(source))
    return Counts(
        documents=writer.num_documents,
        tokens=writer.num_tokens,
        note=_note(source, found, empty),
        answers=answers if fields.chat else None,
    )


def answers_of(encoded: Encoded) -> int:
    """Count the tokens of a batch that count in the loss."""
    return len(encoded.ids) if encoded.mask is None else int(encoded.mask.sum())


def places(batch: Batch, encoded: Encoded, files: Sequence[SourceFile]) -> list[str]:
    """Say where a batch has records without a text: the line or row, and the file if there are
    several."""
    unit = "line" if batch.form == "lines" else "row"
    name = f"{files[batch.file].path.name} " if len(files) > 1 else ""
    return [f"{name}{unit} {number}" for number in encoded.empty]


def _no_text(source: Path) -> str:
    return f"{source}: holds no text; give a file with at least one sequence of tokens."


def _note(source: Path, found: Found, empty: Empty) -> str:
    notes = [f"{source}: {found.note}"] if found.note else []
    if empty.count:
        shown = ", ".join(empty.first[:5])
        # one file: "line 2, 3, 4"
        if len(found.files) == 1:
            unit = empty.first[0].split()[0]
            shown = f"{unit} " + ", ".join(place.split()[-1] for place in empty.first[:5])
        more = ", ..." if empty.count > 5 else ""
        notes.append(
            f"{source}: {empty.count:,} documents have an empty text and are left out "
            f"({shown}{more})"
        )
    return "; ".join(notes)


@dataclass(frozen=True, kw_only=True)
class CorpusJob:
    """A large preparation."""

    source: Path
    out: Path
    tokenizer: Any
    tokenizer_files: Sequence[Sequence[Any]]
    """Name, size and time of each of the tokenizer's files."""
    fields: Fields
    end: int
    vocab_size: int
    workers: int
    part: tuple[int, int] = (0, 1)
    """(number from 0, count): the share of the source that this job reads."""

    def identity(self, found: Found) -> dict[str, Any]:
        """Return what decides the bytes that come out, as JSON."""
        return {
            "source": [
                [str(file.path.absolute()), file.size, file.modified_ns] for file in found.files
            ],
            "tokenizer": [list(entry) for entry in self.tokenizer_files],
            "text or messages key": asdict(self.fields),
            "end token": self.end,
            "vocabulary size": self.vocab_size,
            "part": list(self.part),
        }


def prepare_corpus_files(
    job: CorpusJob, *, overwrite: bool, on_progress: Callable[[Progress], None]
) -> Counts:
    """Tokenize a source of any size; goes on with what an earlier call of the same job left.

    The unfinished files lie in OUT.preparing. Bad input leaves nothing; after anything else the
    same job goes on. Raises DataError as `prepare_file`, UsageError when OUT.preparing belongs to
    another job, SetupError for a full disk or a killed worker.
    """
    found = find_files(job.source)
    encoder = Encoder(job.tokenizer, job.fields, end=job.end, vocab_size=job.vocab_size)
    folder = working_folder(job.out)
    state = journal.earlier(job.out, job.identity(found), overwrite=overwrite)
    masked = job.fields.chat
    if state is None or not state.finishing:
        if state is None:
            shutil.rmtree(folder, ignore_errors=True)
        files = TokenFolder(folder, id_type(job.vocab_size), masked=masked)
        if state is None or not files.cut_back(state.sizes):
            files.cut_back(dict.fromkeys(files.sizes(), 0))
            state = Journal(job=job.identity(found))
        try:
            state = _read_all(job, found, encoder, files, state, on_progress)
        except DataError as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise _in_whole_file(error, found, job) from None
        except OSError as error:
            if is_disk_full(error):
                raise SetupError(
                    f"{folder}: no space left on the disk; free space, and give the same command "
                    "again: it goes on"
                ) from error
            raise
        finally:
            files.close()
    move_into_place(folder, job.out, masked=masked)
    return Counts(
        documents=state.documents,
        tokens=state.tokens,
        note=_note(job.source, found, state.empty),
        answers=state.answers if masked else None,
    )


def _read_all(
    job: CorpusJob, found: Found, encoder: Encoder, files: TokenFolder, state: Journal,
    on_progress: Callable[[Progress], None],
) -> Journal:  # fmt: skip
    """Read, encode and append everything from `state` on; the state at the end."""
    parts = parts_of(found.files, *job.part)
    started = noted = time.monotonic()
    begin = state.place if state.sizes else None
    first_read: int | None = None
    batches = read_batches(found.files, parts, job.fields.key, begin)
    for batch, encoded in encoded_in_order(encoder, found.files, batches, job.workers):
        files.add(encoded.ids, encoded.lengths, encoded.mask)
        state = replace(
            state,
            place=batch.after,
            documents=state.documents + len(encoded.lengths),
            tokens=state.tokens + len(encoded.ids),
            answers=state.answers + answers_of(encoded),
            empty=state.empty.with_more(places(batch, encoded, found.files)),
        )
        now = time.monotonic()
        if now - noted >= COMMIT_SECONDS:
            state = replace(state, sizes=files.sizes())
            state.write(files.folder)
            noted = now
        read = _read_so_far(batch, parts)
        first_read = read if first_read is None else first_read
        on_progress(
            Progress(
                read_bytes=read,
                total_bytes=sum(part.stop - part.start for part in parts),
                documents=state.documents,
                tokens=state.tokens,
                seconds=now - started,
                bytes_before=first_read if begin is not None else 0,
            )
        )
    if state.tokens == 0 and job.part[1] == 1:
        raise DataError(_no_text(job.source))
    state = replace(state, sizes=files.sizes(), finishing=True)
    files.write_index()
    state.write(files.folder)
    return state


def _read_so_far(batch: Batch, parts: Sequence[Part]) -> int:
    """Count the bytes of `parts` that were read when `batch` was."""
    done = 0
    for part in parts:
        if part.file < batch.file:
            done += part.stop - part.start
        elif part.file == batch.file:
            done += min(batch.read_bytes, part.stop) - part.start
    return done


def _in_whole_file(error: DataError, found: Found, job: CorpusJob) -> DataError:
    """Return `error` of a share, with the number of its line in the whole file."""
    starts = {
        str(found.files[part.file].path): part.start for part in parts_of(found.files, *job.part)
    }
    if isinstance(error, RecordError) and (start := starts.get(error.where.file, 0)):
        return error.moved(_lines_before(Path(error.where.file), start))
    return error


def _lines_before(path: Path, offset: int) -> int:
    """Line ends in the first `offset` bytes of a file."""
    count = 0
    with path.open("rb") as stream:
        while offset > 0 and (content := stream.read(min(offset, 1 << 22))):
            count += content.count(b"\n")
            offset -= len(content)
    return count


def merge_files(prefixes: Sequence[Path], out: Path) -> Counts:
    """Join prepared pairs, in order, into the pair `out`; shares of a corpus in which no document
    begins are empty and add nothing. Raises DataError when their id types differ, or all are
    empty."""
    filled = [one for one in prefixes if not _is_empty(one)]
    if not filled:
        raise DataError(
            f"{', '.join(map(str, prefixes))}: hold no tokens; there is nothing to join"
        )
    files = [open_tokens(prefix) for prefix in filled]
    types = {str(file.tokens.dtype) for file in files}
    if len(types) > 1:
        raise DataError(
            f"token files of different id types cannot be joined: {', '.join(sorted(types))}; "
            "prepare all with one tokenizer."
        )
    masked = any(file.mask is not None for file in files)
    with TokenFileWriter(out, dtype=files[0].tokens.dtype, masked=masked) as writer:
        for file in files:
            writer.add_file(file)
    return Counts(documents=writer.num_documents, tokens=writer.num_tokens)


def _is_empty(prefix: Path) -> bool:
    """Return whether a pair has two files and no token."""
    bin_path, idx_path = token_paths(prefix)
    return bin_path.is_file() and idx_path.is_file() and bin_path.stat().st_size == 0
