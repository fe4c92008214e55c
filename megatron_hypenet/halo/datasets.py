"""The data of a run: its text as token files, training sequences from them, and held-out data for
evaluation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from megatron_hypenet.checkpoint.load import read_manifest, read_model_config, tokenizer_dir
from megatron_hypenet.config.schema import STAGES, RunConfig
from megatron_hypenet.data.blend import TrainData
from megatron_hypenet.data.check import RecallUse, recall_uses, refuse_recall
from megatron_hypenet.data.corpus import Corpus, open_corpus, prepare_corpus
from megatron_hypenet.data.recall import RecallVocabulary
from megatron_hypenet.errors import DataError
from megatron_hypenet.halo.evaluation import Measure
from megatron_hypenet.halo.run_folder import RunFolder
from megatron_hypenet.stages.selection.method import HELDOUT, RECALL, TRAINING, selection_method

_Attempt = tuple[str, Callable[[], Any]]
"""A setting, and what raises DataError where the data does not fit it."""


def prepare(run: RunConfig, folder: RunFolder, log: Callable[[str], None]) -> dict[str, Any]:
    """Make token files of the run's text in the folder's data/; returns token counts. Raises
    DataError.

    Text needs the teacher's tokenizer, which was imported with it; so do recall documents over
    prepared token files.
    """
    tokenizer = tokenizer_dir(folder.teacher)
    if tokenizer is None:
        raise DataError(
            f"teacher {run.teacher} has no tokenizer files, and text is read with the teacher's "
            "own tokenizer; "
            "put its tokenizer.json and tokenizer_config.json into the teacher's folder"
        )
    model = read_model_config(folder.teacher)
    # its eos_token_id may be a list; model.json has the first entry
    original = read_manifest(folder.teacher).extra.get("hf_config")
    model_end = (
        original.get("eos_token_id", model.eos_token_id)
        if isinstance(original, dict)
        else model.eos_token_id
    )
    made = prepare_corpus(
        run.data.train,
        run.data.heldout,
        tokenizer,
        folder.data,
        vocab_size=model.vocab_size,
        model_end=model_end,
        log=log,
        check=partial(check_recall, run),
    )
    for source in made["train"] if run.data.separate_documents else ():
        if source.get("end_tokens") == 0:
            log(
                f"data: {source['source']} holds no end-of-document token "
                f"({made['end_of_document']}); data.separate_documents keeps its "
                f"{source['documents']:,} documents apart by the boundaries in its .idx file"
            )
    # a text too short for a late stage is found here, not after hours of training
    check_lengths(run, folder)
    counts = {"train_tokens": sum(source["tokens"] for source in made["train"])}
    return (
        counts
        if made["heldout"] is None
        else {**counts, "heldout_tokens": made["heldout"]["tokens"]}
    )


def check_recall(run: RunConfig, vocabulary: RecallVocabulary) -> None:
    """Raise DataError with all problems when the recall documents of a stage or measurement cannot
    be made with a tokenizer."""
    problems: dict[str, None] = {}  # a dict keeps the order and drops repetitions
    select = run.select
    uses = recall_uses(run)
    if RECALL in selection_method(select.method).reads:
        setting = f"select.recall_pairs={select.recall_pairs}"
        pairs, length = select.recall_pairs, select.seq_length
        uses.append(RecallUse(setting=setting, num_pairs=pairs, seq_length=length))
    for use in uses:
        try:
            vocabulary.check(use.num_pairs, use.seq_length)
        except DataError as error:
            problems[f"{use.setting}: {error}"] = None
    refuse_recall(list(problems))


def check_lengths(run: RunConfig, folder: RunFolder) -> None:
    """Raise DataError with all problems when the text or a recall document does not fit the
    sequence length of a stage or measurement."""
    source, measured = training_data(run, folder), measure(run, folder)
    attempts: list[_Attempt] = []
    for name in STAGES:
        attempts += _trained_on(name, run.stage(name).seq_length, source)
    select, evaluation = run.select, run.eval
    reads = selection_method(select.method).reads
    if TRAINING in reads:
        attempts += _trained_on("select", select.seq_length, selection_samples(run, folder))
    if HELDOUT in reads:
        attempts.append(_text("select", select.seq_length, measured))
    if RECALL in reads:
        attempts.append(_documents("select", select.recall_pairs, select.seq_length, measured))
    shortest = evaluation.seq_length * min(
        (*evaluation.length_multiples, *evaluation.gate.multiples)
    )
    attempts.append(_text("eval", evaluation.seq_length, measured))
    attempts.append(_documents("eval", evaluation.recall_pairs, shortest, measured))
    problems: dict[str, None] = {}  # a dict keeps the order and drops repetitions
    for setting, attempt in attempts:
        try:
            attempt()
        except DataError as error:
            problems[f"{setting}: {error}"] = None
    if problems:
        names = ", ".join(str(source.path) for source in run.data.sources)
        raise DataError(
            f"the data ({names}) does not fit the configuration:\n  - " + "\n  - ".join(problems)
        )


def _trained_on(section: str, seq_length: int, source: TrainData) -> list[_Attempt]:
    where = f"{section}.seq_length={seq_length}"
    found: list[_Attempt] = [(where, partial(source.windows_per_epoch, seq_length))]
    if source.recall is not None:
        found.append((where, partial(source.recall.document, 0, seq_length, training=True)))
    return found


def _text(section: str, seq_length: int, measured: Measure) -> _Attempt:
    return f"{section}.seq_length={seq_length}", partial(measured.heldout, 1, seq_length)


def _documents(section: str, num_pairs: int, seq_length: int, measured: Measure) -> _Attempt:
    return (
        f"{section}.recall_pairs={num_pairs}",
        lambda: measured.task(num_pairs).document(0, seq_length),
    )


def training_data(run: RunConfig, folder: RunFolder) -> TrainData:
    """Return the training sequences: text blended with recall documents."""
    return _open(run, folder).training_data(
        recall_fraction=run.data.recall_fraction,
        recall_pairs=run.data.recall_pairs,
        weights=run.data.weights,
    )


def selection_samples(run: RunConfig, folder: RunFolder) -> TrainData:
    """Return the sequences that layer selection learns from: training text, and recall documents
    over it in a share of their own."""
    return _open(run, folder).training_data(
        recall_fraction=run.select.gates.recall_fraction,
        recall_pairs=run.select.recall_pairs,
        weights=run.data.weights,
    )


def measure(run: RunConfig, folder: RunFolder) -> Measure:
    """Return held-out text and recall documents over it."""
    corpus = _open(run, folder)
    return Measure(run=run, task=corpus.recall_task, heldout=corpus.heldout_sequences)


def _open(run: RunConfig, folder: RunFolder) -> Corpus:
    return open_corpus(folder.data, heldout_fraction=run.data.heldout_fraction, seed=run.data.seed)
