import json
import shutil

import numpy as np
import pytest

from megatron_hypenet.config.schema import SourceConfig
from megatron_hypenet.data.corpus import open_corpus, prepare_corpus
from megatron_hypenet.data.prepare import prepare_file
from megatron_hypenet.data.token_writer import TokenFileWriter
from megatron_hypenet.data.tokenizer import load_tokenizer
from megatron_hypenet.errors import DataError


@pytest.fixture
def teacher(repo_root):
    return repo_root / "assets" / "tiny-qwen3"


@pytest.fixture
def sources(tmp_path, teacher):
    text = (teacher / "heldout.txt").read_text()
    (tmp_path / "a.txt").write_text(text[:80_000])
    (tmp_path / "b.txt").write_text(text[80_000:120_000])
    return [tmp_path / "a.txt", tmp_path / "b.txt"]


def make(train, heldout, teacher, folder):
    log = []
    content = prepare_corpus(train, heldout, teacher, folder, vocab_size=2048, log=log.append)
    return content, sum("tokenizing" in line for line in log)


def test_unchanged_text_is_not_tokenized_again(tmp_path, sources, teacher):
    first, made = make(sources, None, teacher, tmp_path / "data")
    again, remade = make(sources, None, teacher, tmp_path / "data")
    assert (made, remade) == (2, 0) and first == again
    sources[1].write_text("Another text, much shorter.")
    changed, remade = make(sources, None, teacher, tmp_path / "data")
    assert (
        remade == 1
        and changed["train"][0] == first["train"][0]
        and changed["train"][1]["tokens"] < 20
    )


def test_heldout_is_the_end_of_each_source(tmp_path, sources, teacher):
    content, _ = make(sources, None, teacher, tmp_path / "data")
    corpus = open_corpus(tmp_path / "data", heldout_fraction=0.1, seed=1)
    total = sum(record["tokens"] for record in content["train"])
    assert (
        len(corpus.train) + len(corpus.heldout) == total
        and 0.1 * total <= len(corpus.heldout) < 0.5 * total
    )
    text = load_tokenizer(teacher).decode(corpus.heldout[: len(corpus.heldout)])
    assert text.split("<|endoftext|>")[0] in sources[0].read_text()


def test_heldout_file_and_prepared_pair(tmp_path, sources, teacher):
    prepare_file(sources[0], tmp_path / "ready", load_tokenizer(teacher))
    content, made = make([tmp_path / "ready"], sources[1], teacher, tmp_path / "data")
    assert made == 1 and not (tmp_path / "data" / "train_000.bin").exists()
    corpus = open_corpus(tmp_path / "data", heldout_fraction=0.1, seed=1)
    assert (
        len(corpus.train) == content["train"][0]["tokens"]
        and len(corpus.heldout) == content["heldout"]["tokens"]
    )


def test_what_an_opened_corpus_gives(tmp_path, sources, teacher):
    make(sources[:1], sources[1], teacher, tmp_path / "data")
    corpus = open_corpus(tmp_path / "data", heldout_fraction=0.0, seed=1)
    batch = corpus.training_data(recall_fraction=0.5, recall_pairs=4).batch(0, 6, 128)
    assert batch.shape == (6, 129) and int(batch.max()) < 2048
    windows = corpus.heldout_sequences(3, 64)
    assert windows.shape == (3, 65) and (windows[0, -1] == windows[1, 0])
    assert corpus.heldout_sequences(10**6, 64).shape[0] == (len(corpus.heldout) - 1) // 64
    ids, answers = corpus.recall_task(4).batch(0, 2, 128)
    assert ids.shape == (2, 129) and answers.shape == (2, 4)
    with pytest.raises(DataError, match="raise data.heldout_fraction"):
        corpus.heldout_sequences(1, 10**6)


def test_nothing_to_measure_on(tmp_path, sources, teacher):
    sources[1].write_text("One short text is one document.")
    make(sources[1:], None, teacher, tmp_path / "data")
    with pytest.raises(DataError, match="no held-out text"):
        open_corpus(tmp_path / "data", heldout_fraction=0.1, seed=1)


def test_missing_and_damaged_index(tmp_path, sources, teacher):
    with pytest.raises(DataError, match="has not been prepared"):
        open_corpus(tmp_path, heldout_fraction=0.1, seed=1)
    (tmp_path / "corpus.json").write_text("{")
    with pytest.raises(DataError, match="delete the folder"):
        open_corpus(tmp_path, heldout_fraction=0.1, seed=1)
    shutil.rmtree(tmp_path / "data", ignore_errors=True)
    with pytest.raises(DataError, match="no such file"):
        make([tmp_path / "nowhere"], None, teacher, tmp_path / "data")


def write_pair(prefix, documents):
    with TokenFileWriter(prefix, dtype="int32") as writer:
        for ids in documents:
            writer.add(ids)
    return prefix


@pytest.mark.parametrize("foreign", [5000, -1])
def test_prepared_pairs_with_foreign_ids_are_refused_wherever_they_stand(
    tmp_path, teacher, foreign
):
    pair = write_pair(tmp_path / "pair", [[1, 2, 0]] * 50 + [[3, foreign, 0]])
    with pytest.raises(
        DataError,
        match=rf"pair\.bin: token 151 \(in document 50\) is {foreign}, but the model's vocabulary "
        r"has 2048",
    ):
        make([pair], None, teacher, tmp_path / "data")
    good = write_pair(tmp_path / "good", [[1, 2, 0]] * 50)
    with pytest.raises(DataError, match="pair.bin: token 151"):
        make([good], pair, teacher, tmp_path / "data")


def test_a_prepared_pair_is_looked_through_once(tmp_path, teacher):
    pair = write_pair(tmp_path / "pair", [[1, 2, 0]] * 50)
    log = []
    for _ in range(2):
        content = prepare_corpus(
            [pair], None, teacher, tmp_path / "data", vocab_size=2048, log=log.append
        )
    assert (
        len(log) == 1
        and "150 tokens, ids 0 to 2, 50 end tokens" in log[0]
        and content["train"][0]["end_tokens"] == 50
    )
    write_pair(tmp_path / "pair", [[1, 2, 0]] * 51)
    prepare_corpus([pair], None, teacher, tmp_path / "data", vocab_size=2048, log=log.append)
    prepare_corpus([pair], None, teacher, tmp_path / "data", vocab_size=1024, log=log.append)
    assert len(log) == 3


def test_documents_without_end_tokens_are_kept_apart_by_the_index(tmp_path, teacher):
    rng = np.random.default_rng(0)
    silent = write_pair(tmp_path / "silent", rng.integers(1, 2048, (40, 50)).tolist())
    marked = write_pair(tmp_path / "marked", [[7] * 30 + [0]] * 20)
    make([silent, marked], None, teacher, tmp_path / "data")
    corpus = open_corpus(tmp_path / "data", heldout_fraction=0.25, seed=1)
    data = corpus.training_data(recall_fraction=0.5, recall_pairs=2)
    tokens = data.batch(3, 12, 128)
    ends = data.document_ends(tokens, 3)
    whole = corpus.train[: len(corpus.train)]
    last = (np.arange(len(whole)) < 1500) & (np.arange(1, len(whole) + 1) % 50 == 0) | (whole == 0)
    assert len(whole) > 1500 and last[1499] and not last[1500]
    places = {tuple(whole[start : start + 129]): start for start in range(len(whole) - 128)}
    seen = 0
    for row, marks in zip(tokens.tolist(), ends.tolist(), strict=True):
        start = places.get(tuple(row))
        seen += start is not None
        expected = (
            [token == 0 for token in row] if start is None else last[start : start + 129].tolist()
        )
        assert marks == expected
    assert 0 < seen < 12


def test_the_models_end_token_closes_documents_and_is_recorded(tmp_path, sources, teacher):
    log = []
    content = prepare_corpus(
        sources[:1], None, teacher, tmp_path / "data", vocab_size=2048, model_end=9, log=log.append
    )
    assert content["end_of_document"] == 9 and any(
        "documents end with" in line and "(9)" in line for line in log
    )
    again, made = make(sources[:1], None, teacher, tmp_path / "data")
    assert made == 1 and again["end_of_document"] == 0


def test_conversations_reach_the_training_data_with_their_mask(tmp_path, teacher):
    """Text and conversations in one blend: answers and boundaries stay with their tokens."""
    chats = tmp_path / "teacher"
    shutil.copytree(teacher, chats)
    settings = json.loads((chats / "tokenizer_config.json").read_text())
    settings["chat_template"] = (
        "{%- for m in messages %}{{ '<|endoftext|>' + m.role + ':' + m.content }}{%- endfor %}"
        "<|endoftext|>{%- if add_generation_prompt %}{{ 'assistant:' }}{%- endif %}"
    )
    (chats / "tokenizer_config.json").write_text(json.dumps(settings))
    talk = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello there."}]
    (tmp_path / "c.jsonl").write_text((json.dumps({"m": talk}) + "\n") * 60)
    (tmp_path / "t.txt").write_text("A line of prose.\n\n" * 4000)
    train = [
        SourceConfig(path=tmp_path / "c.jsonl", weight=1.0, messages_key="m"),
        SourceConfig(path=tmp_path / "t.txt", weight=3.0),
    ]
    log = []
    for _ in range(2):
        content = prepare_corpus(
            train, None, chats, tmp_path / "data", vocab_size=2048, log=log.append
        )
    assert sum("tokenizing" in line for line in log) == 2 and any("answers" in line for line in log)
    assert (tmp_path / "data" / "train_000.mask").is_file()
    assert not (tmp_path / "data" / "train_001.mask").exists()
    corpus = open_corpus(tmp_path / "data", heldout_fraction=0.1, seed=1)
    data = corpus.training_data(recall_fraction=0.0, recall_pairs=2, weights=(1.0, 3.0))
    tokenizer = load_tokenizer(chats)
    tokens, answers = data.batch(0, 40, 32), data.answers(0, 40, 32)
    ends = data.document_ends(tokens, 0)
    plain = answers.all(dim=1)
    assert int(plain.sum()) == 30
    said = {tokenizer.decode(row[mask]) for row, mask in zip(tokens, answers, strict=True)}
    assert any("Hello there.<|endoftext|>" in text and "Hi" not in text for text in said)
    # four end tokens in a conversation, one of which is its last
    marks = (tokens == content["end_of_document"])[~plain].sum()
    assert 0 < int(ends[~plain].sum()) < int(marks)
