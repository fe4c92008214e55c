"""The data of a run: its text as token files, training sequences from them, and held-out data for
evaluation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from megatron_hypenet.checkpoint.load import read_manifest, read_model_config, tokenizer_dir
from megatron_hypenet.config.schema import STAGES, RunConfig
from megatron_hypenet.data.blend import TrainData
from megatron_hypenet.data.corpus import Corpus, open_corpus, prepare_corpus
from megatron_hypenet.errors import DataError
from megatron_hypenet.halo.evaluation import Measure
from megatron_hypenet.halo.run_folder import RunFolder


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


def check_lengths(run: RunConfig, folder: RunFolder) -> None:
    """Raise DataError with all problems when the text or a recall document does not fit the
    sequence length of a stage or measurement."""
    source, measured = training_data(run, folder), measure(run, folder)
    attempts: list[tuple[str, Callable[[], Any]]] = []
    for name in STAGES:
        length = run.stage(name).seq_length
        attempts.append((f"{name}.seq_length={length}", partial(source.windows_per_epoch, length)))
        if source.recall is not None:
            attempts.append(
                (
                    f"{name}.seq_length={length}",
                    partial(source.recall.document, 0, length, training=True),
                )
            )
    multiples = (*run.eval.length_multiples, *run.eval.gate.multiples)
    shortest = run.eval.seq_length * min(multiples)
    for name, pairs, length in (
        ("select", run.select.recall_pairs, run.select.seq_length),
        ("eval", run.eval.recall_pairs, shortest),
    ):
        text_length = run.select.seq_length if name == "select" else run.eval.seq_length
        attempts.append(
            (f"{name}.seq_length={text_length}", partial(measured.heldout, 1, text_length))
        )
        attempts.append(
            (f"{name}.recall_pairs={pairs}", partial(_recall_document, measured, pairs, length))
        )
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


def _recall_document(measured: Measure, num_pairs: int, seq_length: int) -> Any:
    return measured.task(num_pairs).document(0, seq_length)


def training_data(run: RunConfig, folder: RunFolder) -> TrainData:
    """Return the training sequences: text blended with recall documents."""
    return _open(run, folder).training_data(
        recall_fraction=run.data.recall_fraction,
        recall_pairs=run.data.recall_pairs,
        weights=run.data.weights,
    )


def measure(run: RunConfig, folder: RunFolder) -> Measure:
    """Return held-out text and recall documents over it."""
    corpus = _open(run, folder)
    return Measure(run=run, task=corpus.recall_task, heldout=corpus.heldout_sequences)


def _open(run: RunConfig, folder: RunFolder) -> Corpus:
    return open_corpus(folder.data, heldout_fraction=run.data.heldout_fraction, seed=run.data.seed)
