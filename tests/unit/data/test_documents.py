import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_hypenet.data.documents import document_ids, loss_weights

END = 0


def test_the_end_token_belongs_to_the_document_it_closes():
    inputs = torch.tensor([[5, 6, END, 7, END, END, 8], [END, 1, 2, 3, 4, 5, END]])
    ids = document_ids(inputs == END)
    assert ids.dtype == torch.int32
    assert ids.tolist() == [[0, 0, 0, 1, 1, 2, 3], [0, 1, 1, 1, 1, 1, 1]]


def test_the_loss_leaves_out_what_starts_another_document():
    weights = loss_weights(torch.tensor([[5, 6, END, 7, END, END, 8]]) == END)
    assert weights.dtype == torch.float32
    assert weights.tolist() == [[1, 1, 0, 1, 0, 0, 1]]


@given(st.lists(st.integers(0, 3), min_size=2, max_size=40))
def test_weights_are_zero_exactly_where_the_label_is_of_another_document(tokens):
    whole = torch.tensor([tokens])
    ids = document_ids(whole == END)  # with the label of the last input
    same = ids[:, 1:] == ids[:, :-1]
    assert torch.equal(loss_weights(whole[:, :-1] == END), same.float())
    assert torch.equal(document_ids(whole[:, :-1] == END), ids[:, :-1])


def test_a_row_without_ends_is_one_document():
    inputs = torch.randint(1, 9, (3, 5))
    assert not document_ids(inputs == END).any() and loss_weights(inputs == END).all()
