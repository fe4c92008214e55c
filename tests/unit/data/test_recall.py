import numpy as np
import pytest

from megatron_hypenet.data.recall import RecallTask, RecallVocabulary
from megatron_hypenet.errors import DataError

VOCABULARY = RecallVocabulary(
    words=tuple(range(10, 90)), opening=(1, 2), separator=(3,), closing=(4, 5)
)
FILLER = np.full(1000, 9, dtype=np.uint16)


def make_task(**changes):
    return RecallTask(VOCABULARY, FILLER, **{"seed": 7, "num_pairs": 4, **changes})


def facts_of(ids):
    """Return (position of the key, key, value) of every statement or question."""
    return [
        (i + 2, int(ids[i + 2]), int(ids[i + 4]))
        for i in range(len(ids) - 6)
        if ids[i] == 1 and ids[i + 1] == 2
    ]


@pytest.mark.parametrize("seq_length", [56, 57, 128, 1000])
@pytest.mark.parametrize("training", [False, True])
def test_every_answer_was_stated_before(seq_length, training):
    for index in range(40):
        ids, answers = make_task().document(index, seq_length, training=training)
        assert ids.shape == (seq_length + 1,) and ids.dtype == np.int64
        stated = {}
        asked = []
        for position, key, value in facts_of(ids):
            if key in stated:
                assert stated[key] == value
                asked.append(position + 1)  # the separator: its successor is the value
            stated.setdefault(key, value)
        assert sorted(answers) == asked
        assert len(set(stated) | set(stated.values())) == 2 * len(stated), (
            "keys and values are all distinct"
        )


def test_evaluation_asks_each_fact_once_at_the_end():
    task = make_task()
    ids, answers = task.document(3, 200)
    facts = facts_of(ids)
    assert len(facts) == 8 and len(answers) == 4
    assert sorted(key for _, key, _ in facts[:4]) == sorted(key for _, key, _ in facts[4:])
    assert list(ids[201 - 4 * VOCABULARY.fact_tokens :: VOCABULARY.fact_tokens][:4]) == [1] * 4
    # spread over what comes before: one statement in each quarter of the filler
    gaps = np.diff([0] + [position - 2 for position, _, _ in facts[:4]])
    assert gaps.max() < 201 * 2 / 4


def test_document_is_a_pure_function():
    first, again = make_task(), make_task()
    for training in (False, True):
        again.document(9, 100, training=training)
        assert (
            first.document(5, 100, training=training)[0]
            == again.document(5, 100, training=training)[0]
        ).all()
    assert (first.document(5, 100)[0] != first.document(6, 100)[0]).any()
    assert (first.document(5, 100)[0] != make_task(seed=8).document(5, 100)[0]).any()
    assert (first.document(5, 100)[0][:50] != first.document(5, 100, training=True)[0][:50]).any()


def test_batch_stacks_documents():
    task = make_task()
    ids, answers = task.batch(10, 3, 80)
    assert ids.shape == (3, 81) and answers.shape == (3, 4)
    assert (ids[2] == task.document(12, 80)[0]).all()


def test_filler_wraps_at_its_end():
    task = RecallTask(VOCABULARY, np.array([6, 7, 8], dtype=np.uint16), seed=1, num_pairs=2)
    ids, _ = task.document(0, 100)
    assert set(ids) <= {1, 2, 3, 4, 5, 6, 7, 8, *VOCABULARY.words}


def test_without_separator_the_key_is_where_the_answer_is_predicted():
    vocabulary = RecallVocabulary(words=VOCABULARY.words, opening=(1,), separator=(), closing=(4,))
    ids, answers = RecallTask(vocabulary, FILLER, seed=1, num_pairs=2).document(0, 60)
    assert (ids[answers - 1] == 1).all() and (ids[answers + 2] == 4).all()


def test_too_short_too_few_words_no_filler():
    with pytest.raises(DataError, match="at least 56 tokens; seq_length is 55"):
        make_task().document(0, 55)
    with pytest.raises(DataError, match="80 one-token words.*need 84"):
        make_task(num_pairs=21)
    with pytest.raises(DataError, match="filler"):
        RecallTask(VOCABULARY, FILLER[:0], seed=1)
