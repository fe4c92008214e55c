"""Registration against stand-ins for vLLM's tables; the tests of the model run the real one."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from megatron_hypenet.export.hf_remote.configuration_hypenet import HypeNetConfig
from megatron_hypenet.serve.vllm.plugin import cached_head_size, register


class Base:
    """Stands for vLLM's converter."""

    def __init__(self, config):
        self.hf_text_config = config


@pytest.fixture
def engine(monkeypatch):
    """Provide vLLM's tables, and where transformers keeps configurations."""
    from transformers import AutoConfig

    tables = SimpleNamespace(models={}, sizes={}, configs=[])
    modules = {
        "vllm": {"ModelRegistry": SimpleNamespace(register_model=tables.models.__setitem__)},
        "vllm.transformers_utils": {},
        "vllm.transformers_utils.model_arch_config_convertor": {
            "MODEL_ARCH_CONFIG_CONVERTORS": tables.sizes,
            "ModelArchConfigConvertorBase": Base,
        },
    }
    for name, content in modules.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(
        AutoConfig, "register", lambda *names, exist_ok: tables.configs.append((*names, exist_ok))
    )
    return tables


def test_registers_under_the_names_that_folders_have(engine, repo_root):
    register()
    register()  # as vLLM may do
    assert engine.configs == [("hypenet", HypeNetConfig, True)] * 2
    module, _, name = engine.models.pop("HypeNetForCausalLM").partition(":")
    assert not engine.models and name == "HypeNetForCausalLM"
    assert (repo_root / f"{module.replace('.', '/')}.py").is_file()
    config = HypeNetConfig(head_dim=16, num_hidden_layers=1)
    assert engine.sizes["hypenet"](config).get_head_size() == 32


def test_is_the_entry_point_that_vllm_looks_for():
    from importlib.metadata import entry_points

    (found,) = entry_points(group="vllm.general_plugins", name="hypenet")
    assert found.load() is register


def test_heads_without_kernels_are_filled_up():
    assert [cached_head_size(d) for d in (8, 32, 33, 128, 129, 256)] == [32, 32, 64, 128, 160, 256]
    with pytest.raises(ValueError, match="head_dim = 257: vLLM has attention kernels up to 256"):
        cached_head_size(257)
