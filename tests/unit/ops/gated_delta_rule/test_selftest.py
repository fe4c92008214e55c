"""The check itself: a right kernel passes; of a wrong one the tensor that is off most is named."""

from dataclasses import replace

import pytest
import torch

from megatron_hypenet.model.kernel_guard import DOCTOR_USE
from megatron_hypenet.ops.gated_delta_rule import DeltaRule
from megatron_hypenet.ops.gated_delta_rule.selftest import check_delta_rule
from tests.unit.ops.gated_delta_rule.test_fla import kernel

USE = replace(DOCTOR_USE, dtype=torch.float32, head_dim=8)


def look(wrong=None, **changes):
    def tried(*inputs, **options):
        o, state = kernel(*inputs, **options)
        return (o * 1.1, state) if wrong == "o" else (o, state * 1.1 if wrong == "state" else state)

    per_channel = changes.pop("per_channel", False)
    use = replace(USE, **changes)
    where = torch.device("cpu")
    rule = DeltaRule("x", lambda: tried)
    return check_delta_rule(rule, where, use, per_channel=per_channel, tokens=40, heads=2)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("documents", [False, True])
def test_the_definition_passes(per_channel, documents):
    found = look(per_channel=per_channel, documents=documents)
    assert found.ok, str(found)


def test_a_wrong_output_and_a_wrong_state_are_found():
    assert not look("o").ok
    found = look("state")
    assert not found.ok and found.worst == "final state"


def test_without_an_initial_state():
    assert look(thorough=False).ok


def test_a_kernel_that_cannot_be_imported_is_a_finding():
    def missing():
        raise ImportError("no such kernel")

    found = check_delta_rule(DeltaRule("x", missing), torch.device("cpu"), USE)
    assert not found.ok and "ImportError: no such kernel" in found.failure
