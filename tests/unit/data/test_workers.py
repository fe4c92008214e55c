"""Several processes give what one gives, in order; a worker that is killed is named."""

import os
import signal

import numpy as np
import pytest

from megatron_hypenet.data.encode import Encoded
from megatron_hypenet.data.readers import Batch, Place
from megatron_hypenet.data.sources import SourceFile
from megatron_hypenet.data.workers import encoded_in_order
from megatron_hypenet.errors import DataError, SetupError


class Counting:
    """Gives the number in a batch; some numbers mean trouble."""

    def encode(self, batch, file):
        if batch.content == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if batch.content == "bad":
            raise DataError(f"{file}: bad")
        ids = np.array([batch.content, os.getpid()])
        return Encoded(ids, np.array([2], np.int32), None, ())


def run(tmp_path, contents, workers):
    files = [SourceFile(tmp_path / "a.txt", ".txt", "", 1, 1)]
    batches = [Batch(0, 1, "rows", content, Place(), 0) for content in contents]
    found = encoded_in_order(Counting(), files, iter(batches), workers)
    return [(batch.content, *encoded.ids.tolist()) for batch, encoded in found]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_come_in_order(tmp_path, workers):
    found = run(tmp_path, range(40), workers)
    assert [row[:2] for row in found] == [(number, number) for number in range(40)]
    processes = {row[2] for row in found}
    assert (os.getpid() in processes) == (workers == 0) and 1 <= len(processes) <= max(1, workers)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_first_error_is_raised(tmp_path, workers):
    with pytest.raises(DataError, match="a.txt: bad"):
        run(tmp_path, [1, 2, "bad", 3, 4], workers)


def test_a_killed_worker_is_one_clear_error(tmp_path):
    with pytest.raises(SetupError, match="one of 2 workers was killed.*fewer --workers"):
        run(tmp_path, [1, "die", 3, 4], 2)
