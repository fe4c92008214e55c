"""The private fields of DeepSpeed that training uses stand in one list, and one that is missing is
named."""

import re

import pytest

from megatron_hypenet.engine.deepspeed import private_fields, state_access
from megatron_hypenet.engine.deepspeed.config import import_deepspeed
from megatron_hypenet.engine.deepspeed.private_fields import PRIVATE_FIELDS, check_private_fields
from megatron_hypenet.errors import SetupError


def test_the_installed_version_has_all_of_them_and_was_looked_at():
    deepspeed = import_deepspeed()
    check_private_fields(deepspeed)
    assert deepspeed.__version__ in private_fields.SEEN_IN
    constant = private_fields.owner_class("runtime.constants")
    assert constant.PIPE_REPLICATED == state_access._REPLICATED


@pytest.mark.parametrize("owner", PRIVATE_FIELDS)
def test_a_missing_field_is_named_with_the_version(monkeypatch, owner):
    monkeypatch.setitem(PRIVATE_FIELDS, owner, (*PRIVATE_FIELDS[owner], "field_of_tomorrow"))
    with pytest.raises(
        SetupError, match=f"deepspeed 0.* has no field field_of_tomorrow in .*{owner}"
    ):
        import_deepspeed()
    assert SetupError.exit_code == 4


def test_a_missing_class_lacks_all_of_its_fields(monkeypatch):
    monkeypatch.setitem(PRIVATE_FIELDS, "runtime.gone.Optimizer", ("step",))
    with pytest.raises(SetupError, match="no field step in deepspeed.runtime.gone.Optimizer"):
        import_deepspeed()


def test_the_list_holds_every_private_field_in_use(repo_root):
    """The list must have the attributes with a leading underscore of anything but `self` in the
    files that may use them, and the public ones that they replace."""
    listed = {field for fields in PRIVATE_FIELDS.values() for field in fields}
    folder = repo_root / "megatron_hypenet" / "engine"
    for path in folder.rglob("*.py"):
        source = path.read_text()
        used = set(re.findall(r"(?:optimizer|owner|parameter|_owner)\.(_[a-z]\w*)", source))
        used |= set(re.findall(r"\.((?:fp32|bf16)_(?:groups|partitioned)\w*)", source))
        allowed = path.parent.name == "deepspeed" and path.stem in (
            "state_access",
            "bf16_accumulation",
            "bf16_step",
        )
        assert used <= (listed if allowed else set()), path
