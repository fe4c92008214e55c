import numpy as np
import pytest

from megatron_hypenet.data import statistics as module
from megatron_hypenet.data.indexed import TokenFile
from megatron_hypenet.data.statistics import statistics


@pytest.mark.parametrize("chunk", [2, 100])
def test_lengths_and_what_is_cut(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(module, "_CHUNK", chunk)
    file = TokenFile(tmp_path, np.zeros(20, np.uint16), np.array([3, 13, 14, 20]))
    found = statistics(file, 5)
    assert (found.documents, found.tokens, found.longest) == (4, 20, 10)
    # 10 and 6 of the lengths 3, 10, 1, 6 are longer than 5, by 5 and 1
    assert found.cut_documents == 0.5 and found.cut_tokens == 6 / 20 and found.seq_length == 5
    assert statistics(file, 10).cut_documents == 0
