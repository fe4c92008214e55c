import gc

import torch

from megatron_hypenet.parallel.context.documents import _DERIVED, Documents
from tests.dense_attention import document_ids

IDS = document_ids((3, 5), (4,), length=8)  # row 0: 000 11 222, row 1: 0000 1111


def test_ids_at_spans_come_in_the_order_of_the_spans():
    documents = Documents(IDS)
    assert documents.ids_at(((6, 8), (0, 2))).tolist() == [[2, 2, 0, 0], [1, 1, 0, 0]]


def test_whole_rows_pack_without_moving_anything():
    packing = Documents(IDS).packing(((0, 8),), ((0, 8),))
    assert packing.query_rows is None and packing.key_rows is None
    assert packing.query_bounds.tolist() == packing.key_bounds.tolist() == [0, 3, 5, 8, 12, 16]
    assert (packing.max_queries, packing.max_keys) == (4, 4)
    assert packing.query_bounds.dtype == torch.int32


def test_only_documents_on_both_sides_are_packed():
    """Queries are 4..7 and keys 0..3: row 0 shares document 1 (query 4, key 3), row 1 nothing."""
    packing = Documents(IDS).packing(((4, 8),), ((0, 4),))
    assert packing.query_rows.tolist() == [0] and packing.key_rows.tolist() == [3]
    assert packing.query_bounds.tolist() == packing.key_bounds.tolist() == [0, 1]
    assert not packing.empty
    assert Documents(IDS).packing(((5, 8),), ((0, 3),)).empty


def test_a_document_that_meets_again_later_is_one_run():
    """The two chunks of a zigzag rank touch the same document; what lies between is elsewhere."""
    ids = document_ids((6,), length=8)
    packing = Documents(ids).packing(((0, 2), (4, 8)), ((2, 4),))
    assert packing.query_rows.tolist() == [0, 1, 2, 3] and packing.key_rows is None
    assert (packing.query_bounds.tolist(), packing.key_bounds.tolist()) == ([0, 4], [0, 2])


def test_what_was_derived_is_kept_for_a_tensor_until_it_changes_or_dies():
    ids = IDS.clone()
    first = Documents(ids).packing(((0, 8),), ((0, 8),))
    assert Documents(ids).packing(((0, 8),), ((0, 8),)) is first
    ids[:, 4:] += 1
    assert Documents(ids).packing(((0, 8),), ((0, 8),)).query_bounds.tolist() == [
        0,
        3,
        4,
        5,
        8,
        12,
        16,
    ]
    gc.collect()
    before = len(_DERIVED)
    del ids
    gc.collect()
    assert len(_DERIVED) == before - 1


def test_ids_made_in_inference_mode_work_too():
    with torch.inference_mode():
        ids = IDS.clone()
        assert Documents(ids).packing(((4, 8),), ((0, 4),)).query_rows.tolist() == [0]
