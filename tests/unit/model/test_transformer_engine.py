"""What is said of an installed, missing or unfitting Transformer Engine, by made-up packages."""

import re
import sys

import pytest
import torch

from megatron_hypenet.errors import SetupError
from megatron_hypenet.model import transformer_engine as engine


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Provide a function that installs packages of these versions, and none besides, with this
    source as transformer_engine/pytorch.py."""

    def install(source="", **versions):
        for name, version in versions.items():
            folder = tmp_path / f"{name}-{version}.dist-info"
            folder.mkdir()
            (folder / "METADATA").write_text(
                f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n"
            )
        package = tmp_path / "transformer_engine"
        package.mkdir()
        (package / "__init__.py").touch()
        (package / "pytorch.py").write_text(source)
        for name in [name for name in sys.modules if name.split(".")[0] == "transformer_engine"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.syspath_prepend(tmp_path)

    return install


WHOLE = {name: "2.20.2" for name in ("transformer_engine", "transformer_engine_torch")}


@pytest.mark.parametrize(
    ("versions", "cuda", "says"),
    [
        ({"transformer_engine": "1.13.0"}, "13.0", "1.13.0 is older than 2.3"),
        (WHOLE, None, "needs a torch with CUDA"),
        (WHOLE, "13.0", "has no transformer-engine-cu13"),
        ({**WHOLE, "transformer_engine_cu12": "2.20.2"}, "13.0", "has no transformer-engine-cu13"),
        ({**WHOLE, "transformer_engine_cu13": "2.19"}, "13.0", "does not go with .*cu13 2.19"),
        (
            {"transformer_engine": "2.20.2", "transformer_engine_cu12": "2.20.2"},
            "12.8",
            "has no transformer-engine-torch",
        ),
        ({**WHOLE, "transformer_engine_cu12": "2.20.2"}, "12.8", "^$"),
    ],
)
def test_packages_that_do_not_belong_together(installed, versions, cuda, says):
    installed(**versions)
    assert re.search(says, engine.fault(cuda))


def test_without_it_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setattr(engine, "version_of", lambda package: None)
    with pytest.raises(SetupError, match="is not installed; pip install") as told:
        engine.require("model.transformer_impl=transformer_engine")
    assert told.value.exit_code == 4
    assert str(told.value).startswith("model.transformer_impl=transformer_engine is set")


@pytest.mark.parametrize(
    ("source", "gpu", "says"),
    [
        ("", False, "needs a GPU"),
        ("", True, ""),
        ("raise ImportError('undefined symbol: _ZN3c10')", True, "undefined symbol"),
        ("import ctypes; ctypes.CDLL('libno-such.so')", True, "OSError: libno-such.so"),
    ],
)
def test_an_import_that_fails_is_told(installed, monkeypatch, source, gpu, says):
    installed(source, **WHOLE, transformer_engine_cu13="2.20.2")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    found = engine.import_fault()
    assert says in found and bool(found) == bool(says)
