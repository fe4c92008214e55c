import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_hypenet.data.blend import TrainData, permuted, scramble
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
