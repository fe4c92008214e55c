import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_hypenet.data.blend import TrainData, permuted, scramble, shares, taken_from
from megatron_hypenet.data.indexed import TokenStream
from megatron_hypenet.data.recall import RecallTask, RecallVocabulary
from megatron_hypenet.errors import DataError


def text(count=1000):
    return TokenStream([np.arange(count, dtype=np.int32)])


def data(count=1000, **changes):
    return TrainData(text(count), **{"seed": 3, "vocab_size": count, **changes})


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 300), key=st.integers(0, 2**64 - 1))
def test_permutation_is_a_permutation(size, key):
    assert sorted(permuted(i, size, key) for i in range(size)) == list(range(size))


def test_permutation_mixes():
    order = [permuted(i, 1000, scramble(1)) for i in range(1000)]
    assert abs(np.corrcoef(order, np.arange(1000))[0, 1]) < 0.1
    assert order != [permuted(i, 1000, scramble(2)) for i in range(1000)]


def test_one_epoch_visits_every_window_once():
    source = data()
    windows = source.windows_per_epoch(10)
    starts = source.batch(0, windows, 10)[:, 0]
    assert windows == 99 and len(set((starts - starts.min()).tolist())) == windows
    assert (starts % 10 == starts[0] % 10).all()
    second = source.batch(windows, windows, 10)[:, 0]
    assert (second != starts).any()


def test_windows_are_consecutive_tokens():
    batch = data().batch(0, 5, 16)
    assert batch.shape == (5, 17) and batch.dtype == torch.int64
    assert (batch.diff(dim=1) == 1).all()


def test_any_split_of_the_index_range_gives_the_same_samples():
    whole = data().batch(0, 250, 10)
    parts = torch.cat([data().batch(start, 50, 10) for start in range(0, 250, 50)])
    assert (whole == parts).all()
    assert (data(seed=4).batch(0, 250, 10) != whole).any()


def test_recall_share_is_exact_and_even():
    vocabulary = RecallVocabulary(
        words=tuple(range(100, 200)), opening=(1,), separator=(), closing=(2,)
    )
    task = RecallTask(vocabulary, text(), seed=3, num_pairs=2)
    mixed = data(recall=task, recall_fraction=0.3)
    is_recall = (mixed.batch(0, 1000, 40).diff(dim=1) != 1).any(dim=1)
    assert abs(int(is_recall.sum()) - 300) <= 1
    assert all(2 <= int(is_recall[i : i + 10].sum()) <= 4 for i in range(0, 1000, 10))
    plain = mixed.batch(0, 1000, 40)[~is_recall]
    assert (plain == data().batch(0, len(plain), 40)).all(), (
        "text samples are those of a run without recall, in the same order"
    )


def test_short_text():
    assert data(11).batch(0, 3, 10)[:, 0].tolist() == [0, 0, 0]
    with pytest.raises(DataError, match="10 tokens, one sequence needs 11"):
        data(10).batch(0, 1, 10)


def test_foreign_ids_and_missing_task():
    with pytest.raises(DataError, match="made with another tokenizer"):
        data(vocab_size=500).batch(0, 99, 10)
    with pytest.raises(DataError, match="recall_fraction"):
        data(recall_fraction=0.1)


@pytest.mark.parametrize("weights", [(1,), (1, 1), (3, 1), (0.7, 0.2, 0.1), (1, 1e9, 5)])
def test_a_blend_takes_from_every_text_as_often_as_its_weight_says(weights):
    units = shares(weights)
    counts = [0] * len(weights)
    for index in range(5000):
        number, before = taken_from(index, units)
        assert before == counts[number]
        counts[number] += 1
        for count, weight in zip(counts, weights, strict=True):
            # spread evenly: at any time within a few samples of the share
            assert abs(count - (index + 1) * weight / sum(weights)) < 3


def test_texts_of_a_blend_have_their_own_windows_and_any_split_gives_the_same():
    parts = [TokenStream([np.arange(start, start + 500)]) for start in (0, 1000, 2000)]
    blended = data(3000, blend=list(zip(parts, (1.0, 2.0, 1.0), strict=True)))
    whole = blended.batch(0, 400, 10)
    source = whole[:, 0] // 1000
    assert [int((source == number).sum()) for number in range(3)] == [100, 200, 100]
    assert (whole.diff(dim=1) == 1).all()
    # two epochs of 49 windows of the first text
    starts = whole[source == 0][:, 0]
    assert len(set(starts[:49].tolist())) == 49 and blended.windows_per_epoch(10) == 147
    offsets = [whole[source == n][:49, 0] - 1000 * n for n in range(3)]
    assert (offsets[0] != offsets[1]).any()
    again = torch.cat([blended.batch(start, 7, 10) for start in range(0, 399, 7)])
    assert (again == whole[:399]).all()
    short = [(parts[0], 1.0), (TokenStream([np.arange(5)]), 1.0)]
    with pytest.raises(DataError, match="the training text has 5 tokens"):
        data(3000, blend=short).windows_per_epoch(10)


def test_answers_follow_the_tokens_through_a_blend_with_recall_documents():
    mask = (np.arange(500) % 3 == 0).astype(np.uint8)
    chats = TokenStream([np.arange(500)], [np.arange(50, 501, 50)], [mask])
    plain = TokenStream([np.arange(1000, 1500)])
    vocabulary = RecallVocabulary(
        words=tuple(range(2000, 2100)), opening=(1,), separator=(), closing=(2,)
    )
    task = RecallTask(vocabulary, plain, seed=3, num_pairs=2)
    source = data(
        3000, blend=[(chats, 1.0), (plain, 1.0)], recall=task, recall_fraction=0.25,
        end_of_document=1010,
    )  # fmt: skip
    tokens = source.batch(5, 60, 40)
    answers = source.answers(5, 60, 40)
    ends = source.document_ends(tokens, 5)
    kinds = set()
    for row, counted, last in zip(tokens, answers, ends, strict=True):
        if (row >= 2000).any():
            kinds.add("recall")
            assert counted.all()
        elif row[0] >= 1000:
            kinds.add("plain")
            assert counted.all() and torch.equal(last, row == 1010)
        else:
            kinds.add("chat")
            assert torch.equal(counted, row % 3 == 0) and torch.equal(last, row % 50 == 49)
    assert kinds == {"recall", "plain", "chat"}
    assert data().answers(0, 3, 10) is None


def test_what_is_predicted_is_the_answers_of_recall_documents_and_all_of_a_text():
    vocabulary = RecallVocabulary(
        words=tuple(range(100, 200)), opening=(1,), separator=(), closing=(2,)
    )
    task = RecallTask(vocabulary, text(), seed=3, num_pairs=2)
    mixed = data(recall=task, recall_fraction=0.5)
    predicted = mixed.predicted(0, 6, 50)
    assert predicted.shape == (6, 50) and predicted.dtype == torch.bool
    documents = [row for row in range(6) if not predicted[row].all()]
    assert len(documents) == 3
    for number, row in enumerate(documents):
        ids, answers = task.document(number, 50, training=True)
        assert (mixed.sample(row, 50) == ids).all()
        assert predicted[row].nonzero().flatten().tolist() == sorted(answers.tolist())
    assert torch.equal(mixed.predicted(3, 2, 50), predicted[3:5])


def test_a_mask_says_what_is_predicted_in_a_text():
    mask = (np.arange(1000) % 3 == 0).astype(np.uint8)
    masked = TrainData(
        TokenStream([np.arange(1000, dtype=np.int32)], masks=[mask]), seed=3, vocab_size=1000
    )
    tokens = masked.batch(0, 4, 16)
    assert torch.equal(masked.predicted(0, 4, 16), tokens[:, 1:] % 3 == 0)
