"""Work is finished in order, with few buffers, and ends at the first failure."""

import threading
import time

import pytest
import torch

from megatron_hypenet.checkpoint.ordered_work import one_thread_per_operation, run_in_order


@pytest.mark.parametrize("workers", [1, 3])
def test_a_failure_while_finishing_ends_the_work(workers):
    def finish(index, content):
        if index == 3:
            raise ValueError("three")

    with pytest.raises(ValueError, match="three"):
        run_in_order(1000, lambda index, buffer: 1, finish, workers=workers, buffer_bytes=1)


def test_order_and_bounded_memory():
    buffers = set()
    order = []
    lock = threading.Lock()

    def work(index, buffer):
        with lock:
            buffers.add(id(buffer.obj))
        time.sleep(0.001 * (index % 3))
        buffer[:2] = index.to_bytes(2, "big")
        return 2

    run_in_order(
        200,
        work,
        lambda index, content: order.append(int.from_bytes(content, "big")),
        workers=4,
        buffer_bytes=2,
    )
    assert order == list(range(200)) and len(buffers) <= 10


def test_threads_of_torch_are_as_before():
    before = torch.get_num_threads()
    with one_thread_per_operation():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
