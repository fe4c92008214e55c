"""What a run reads: its text as token files, training sequences from them, and the held-out material that models are measured on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_hypenet.checkpoint.load import read_model_config, tokenizer_dir
from megatron_hypenet.config.schema import RunConfig
from megatron_hypenet.data.blend import TrainData
from megatron_hypenet.data.corpus import Corpus, open_corpus, prepare_corpus
from megatron_hypenet.engine.measure import Measure
from megatron_hypenet.engine.run_folder import RunFolder
from megatron_hypenet.errors import DataError


def prepare(run: RunConfig, folder: RunFolder, log: Callable[[str], None]) -> dict[str, Any]:
    """Make token files of the run's text in the folder's data/; returns token counts. Raises DataError.

    Text needs the teacher's tokenizer, which came with its import; so do recall documents over prepared token files.
    """
    tokenizer = tokenizer_dir(folder.teacher)
    if tokenizer is None:
        raise DataError(
            f"teacher {run.teacher} has no tokenizer files, and text is read with the teacher's own tokenizer; "
            "put its tokenizer.json and tokenizer_config.json into the teacher's folder"
        )
    vocab_size = read_model_config(folder.teacher).vocab_size
    made = prepare_corpus(run.data.train, run.data.heldout, tokenizer, folder.data, vocab_size=vocab_size, log=log)
    _open(run, folder)  # a text too short to split is found here, not after hours of training
    counts = {"train_tokens": sum(source["tokens"] for source in made["train"])}
    return counts if made["heldout"] is None else {**counts, "heldout_tokens": made["heldout"]["tokens"]}


def training_data(run: RunConfig, folder: RunFolder) -> TrainData:
    """Training sequences: text blended with recall documents."""
    return _open(run, folder).training_data(recall_fraction=run.data.recall_fraction, recall_pairs=run.data.recall_pairs)


def measure(run: RunConfig, folder: RunFolder) -> Measure:
    """Held-out text and recall documents over it."""
    corpus = _open(run, folder)
    return Measure(run=run, task=corpus.recall_task, heldout=corpus.heldout_sequences)


def _open(run: RunConfig, folder: RunFolder) -> Corpus:
    return open_corpus(folder.data, heldout_fraction=run.data.heldout_fraction, seed=run.data.seed)
