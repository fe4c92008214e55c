import copy

import pytest
import torch

from megatron_hypenet.export.hf_remote.cache_hypenet import HypeNetCache
from megatron_hypenet.export.hf_remote.slots_hypenet import KeyValueSlot, StateSlot

CPU = torch.device("cpu")


def softmax_cache(layers=1):
    return HypeNetCache(KeyValueSlot() for _ in range(layers))


def hybrid_cache():
    """Make a cache of a softmax layer, then a recurrent one."""
    return HypeNetCache([KeyValueSlot(), StateSlot("Lightning")])


def feed(cache, tokens, batch=2, real=None):
    _, first, mask = cache.advance(real, batch, tokens, CPU)
    new = torch.randn(batch, 3, tokens, 4)
    return new, cache.slots[0].update(new, -new), first, mask


def test_keys_and_values_come_back_in_order_while_the_buffer_grows():
    cache = softmax_cache()
    seen = []
    capacities = set()
    for tokens in (100, 1, 155, 1, 400, 1, 1):
        new, (keys, values), _, mask = feed(cache, tokens)
        seen.append(new)
        assert mask is None and torch.equal(keys, torch.cat(seen, 2)) and torch.equal(values, -keys)
        capacities.add(cache.slots[0].keys.shape[2])
    assert capacities == {256, 512, 768} and cache.get_seq_length() == 659


def test_growth_copies_each_token_a_bounded_number_of_times():
    cache = softmax_cache()
    buffers = set()
    for _ in range(3000):
        feed(cache, 1, batch=1)
        buffers.add(cache.slots[0].keys.data_ptr())
    assert cache.slots[0].keys.shape[2] < 1.6 * 3000 + 256
    sizes = [256]
    while sizes[-1] < 3000:
        sizes.append(-(-int(max(sizes[-1] * 1.5, sizes[-1] + 1)) // 256) * 256)
    assert len(buffers) <= len(sizes)


def test_padding_is_remembered_even_when_it_comes_late():
    cache = softmax_cache()
    _, _, first, mask = feed(cache, 3)
    assert first == 0 and mask is None
    _, _, first, mask = feed(cache, 2, real=torch.tensor([[False, True], [True, True]]))
    assert first.tolist() == [[3], [3]] and mask.tolist() == [
        [True] * 3 + [False, True],
        [True] * 5,
    ]
    _, _, first, mask = feed(cache, 1)
    assert first.tolist() == [[4], [5]] and mask[:, -1].all()


def test_reordering_moves_everything():
    cache = hybrid_cache()
    feed(cache, 2, real=torch.tensor([[False, True], [True, True]]))
    cache.slots[1].state = torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)])
    keys = cache.slots[0].keys.clone()
    cache.reorder_cache(torch.tensor([1, 1]))
    assert (
        torch.equal(cache.slots[0].keys[0, :, :2], keys[1, :, :2])
        and cache.slots[1].state.min() == 1
    )
    assert cache.real.all() and cache.num_real.tolist() == [2, 2]


def test_reset():
    cache = hybrid_cache()
    feed(cache, 2)
    cache.slots[1].update(torch.ones(2, 3, 4, 4), new_tokens=2)
    assert [slot.get_seq_length() for slot in cache.slots] == [2, 2]
    cache.reset()
    assert cache.slots[1].state is None and cache.slots[1].get_seq_length() == 0
    assert cache.get_seq_length() == 0 and cache.slots[0].keys is None and cache.num_real is None


def test_rows_are_selected_and_repeated():
    cache = hybrid_cache()
    feed(cache, 2, real=torch.tensor([[False, True], [True, True]]))
    cache.slots[1].state = torch.arange(2.0)[:, None, None, None].expand(2, 3, 4, 4)
    keys = cache.slots[0].keys.clone()
    cache.batch_repeat_interleave(2)
    assert cache.batch_size == 4 and cache.num_real.tolist() == [1, 1, 2, 2]
    assert cache.slots[1].state[:, 0, 0, 0].tolist() == [0, 0, 1, 1]
    cache.batch_select_indices(torch.tensor([False, False, False, True]))
    assert cache.batch_size == 1 and cache.num_real.tolist() == [2]
    assert torch.equal(cache.slots[0].keys[0, :, :2], keys[1, :, :2])


def test_another_number_of_rows_is_refused():
    cache = softmax_cache()
    feed(cache, 2)
    with pytest.raises(ValueError, match="holds 2 rows and the input has 6; repeat the rows"):
        feed(cache, 1, batch=6)


def test_what_transformers_asks_of_a_cache():
    cache = softmax_cache(3)
    assert not cache.is_initialized and cache.batch_size == -1 and cache.get_mask_sizes(4) == (4, 0)
    feed(cache, 5)
    assert cache.is_initialized and len(cache) == 3 and cache.get_query_offset() == 5
    assert cache.get_mask_sizes(2, 1) == cache.get_mask_sizes(torch.tensor([5, 6]), 1) == (7, 0)
    assert cache.get_max_length() == cache.get_max_cache_shape() == -1
    assert cache.is_linear == cache.is_sliding == [False] * 3
    assert not cache.is_compileable and not hybrid_cache().is_croppable


def test_earlier_keys_keep_their_gradients():
    cache = softmax_cache()
    parts = [torch.randn(1, 1, 2, 4, requires_grad=True) for _ in range(3)]
    sums = []
    for part in parts:
        cache.advance(None, 1, 2, CPU)
        keys, _ = cache.slots[0].update(part, part)
        sums.append((keys**2).sum())
    sum(sums).backward()
    for index, part in enumerate(parts):
        torch.testing.assert_close(part.grad, 2 * part * (3 - index))


def test_a_recurrent_state_is_never_rolled_back():
    cache = hybrid_cache()
    feed(cache, 3)
    for refused in (lambda: cache.crop(2), cache.activate_past_recording):
        with pytest.raises(
            ValueError, match="cannot be cropped: its Lightning layers keep one state"
        ):
            refused()
    assert cache.get_seq_length() == cache.slots[0].get_seq_length() == 3


@pytest.mark.parametrize("length", [3, -2])
def test_a_cache_without_states_is_cropped(length):
    cache = softmax_cache(2)
    assert cache.is_croppable
    real = torch.tensor([[False, True, True, True, True], [True] * 5])
    new, _, _, _ = feed(cache, 5, real=real)
    cache.slots[1].update(new, new)
    cache.crop(length)
    cache.activate_past_recording()
    assert cache.get_seq_length() == 3 and cache.num_real.tolist() == [2, 3]
    more, (keys, values), first, mask = feed(cache, 1)
    assert first.tolist() == [[2], [3]] and mask.shape == (2, 4)
    assert torch.equal(keys, torch.cat([new[:, :, :3], more], 2)) and torch.equal(values, -keys)


def test_a_copy_is_continued_independently():
    cache = hybrid_cache()
    feed(cache, 2)
    other = copy.deepcopy(cache)
    feed(other, 1)
    assert (cache.get_seq_length(), other.get_seq_length()) == (2, 3)
    assert cache.slots[0].get_seq_length() == 2


def test_device_hooks_do_not_move_the_cache():
    # accelerate would call `to` on whatever has it
    assert not hasattr(softmax_cache(), "to")


@torch.no_grad()
def test_a_mask_that_leaves_nothing_out_is_forgotten():
    """Single tokens may come with a mask that nobody looked into."""
    cache = softmax_cache()
    feed(cache, 3)
    cache.begin_step(2, CPU, masked=True)
    cache.record_step(torch.ones(2, 1, dtype=torch.bool))
    cache.end_step()
    assert cache.real.shape == (2, 4) and cache.num_real.tolist() == [4, 4]
    _, _, first, mask = feed(cache, 2)
    assert first == 4 and mask is None and cache.num_real is None


@torch.no_grad()
def test_steps_in_place_count_columns_and_real_tokens():
    cache = softmax_cache()
    feed(cache, 2, real=torch.tensor([[False, True], [True, True]]))
    for real in (torch.tensor([[True], [False]]), None):
        cache.begin_step(2, CPU, masked=real is not None)
        positions, mask = cache.record_step(real)
        keys, _ = cache.slots[0].update(torch.ones(2, 3, 1, 4), torch.ones(2, 3, 1, 4), cache.at)
        cache.end_step()
        assert keys.shape[2] == 256 and mask.shape[1] >= cache.length
    assert positions.tolist() == [[2], [2]] and cache.num_real.tolist() == [3, 3]
    assert cache.real.tolist() == [[False, True, True, True], [True, True, False, True]]
    assert cache.get_seq_length() == 4 and (cache.slots[0].keys[:, :, 2:4] == 1).all()
    with pytest.raises(ValueError, match="holds 2 rows and the input has 3"):
        cache.begin_step(3, CPU, masked=False)
