"""Numbers on their way from the device to the host."""

import pytest
import torch

from megatron_hypenet.engine.async_scalar import AsyncScalar


@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_number_on_its_way_is_the_one_of_its_time(where):
    number = torch.tensor(2.5, dtype=torch.float64, device=where)
    arriving = AsyncScalar(number * 2)
    number += 1
    assert arriving.value() == arriving.value() == 5.0
