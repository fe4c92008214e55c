"""Token files, texts and token ids: how whole ones are made, and what their readers must say of
them."""

import json

import numpy as np
import torch

from tests.fuzz.reading import TOKENIZER
from tests.tiny_run import TEACHER


def make_tokens(folder):
    from megatron_hypenet.data.token_writer import TokenFileWriter

    with TokenFileWriter(folder / "text", vocab_size=1000) as writer:
        for length in (5, 1, 7, 3):
            writer.add(list(range(10, 10 + length)))


def as_megatron_reads_it(folder, out, said, whole):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    data = IndexedDataset(str(folder / "text"))
    printed = json.loads(said)
    documents = [
        np.concatenate([data[i] for i in range(a, b)] or [[]])
        for a, b in zip(data.document_indices, data.document_indices[1:], strict=False)
    ]
    assert printed["documents"] == len(documents) and printed["tokens"] == sum(map(len, documents))
    assert printed["first_ids"] == np.concatenate(documents)[:64].astype(int).tolist()


def make_text(folder):
    folder.mkdir(exist_ok=True)
    (folder / "text.jsonl").write_text(
        "".join(
            json.dumps({"text": f"Document {i} has words, ä and more."}) + "\n" for i in range(6)
        )
    )


def documents_are_the_lines(folder, out, said, whole):
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from tokenizers import Tokenizer

    lines = [
        json.loads(line)["text"]
        for line in (folder / "text.jsonl").read_bytes().decode().split("\n")
        if line.strip()
    ]
    data = IndexedDataset(str(out))
    tokenizer = Tokenizer.from_file(str(TOKENIZER / "tokenizer.json"))
    kept = [line for line in lines if line]
    assert len(data) == len(kept)
    for ids, text in zip(data, kept, strict=True):
        assert (
            ids.tolist()[: len(tokenizer.encode(text, add_special_tokens=False).ids)]
            == tokenizer.encode(text, add_special_tokens=False).ids
        )


def make_ids(folder):
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    save_file(
        {"input_ids": torch.arange(12).view(3, 4), "other": torch.zeros(3)},
        folder / "ids.safetensors",
    )


def read_token_ids(folder):
    from megatron_hypenet.cli.score import read_ids

    return read_ids(folder / "ids.safetensors", TEACHER).tolist()


def ids_are_the_files(folder, out, said, whole):
    from safetensors.torch import load_file

    ids = load_file(folder / "ids.safetensors")["input_ids"]
    assert json.loads(said) == ids.tolist() and 0 <= ids.min() and ids.max() < TEACHER.vocab_size
