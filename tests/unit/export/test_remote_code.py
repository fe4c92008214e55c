import json
import subprocess
import sys

import pytest

from megatron_hypenet.errors import ConversionError
from megatron_hypenet.export import remote_code
from megatron_hypenet.export.remote_code import REMOTE_CODE, remote_files

SHARED = {
    f"{part}_hypenet.py"
    for part in (
        "cache",
        "configuration",
        "generation",
        "graph",
        "layers",
        "modeling",
        "ops",
        "slots",
    )
}
OF_SOFTMAX = {"attention_hypenet.py", "kernels_hypenet.py"}
MIXERS = sorted(file.stem.removeprefix("mixer_") for file in REMOTE_CODE.glob("mixer_*.py"))


@pytest.mark.parametrize(
    "mixers", [["attn"], ["attn", "lightning-attn"], ["lightning-attn"]], ids="+".join
)
def test_only_files_of_the_model_s_mixers_are_there(mixers):
    found = remote_files(mixers)
    shared = SHARED | OF_SOFTMAX if "attn" in mixers else SHARED
    assert found.keys() == shared | {f"mixer_{name.replace('-', '_')}.py" for name in mixers}
    for name, text in found.items():
        if name.removesuffix(".py") not in remote_code.ENTRIES:
            assert text == (REMOTE_CODE / name).read_text()


def test_files_that_are_loaded_name_the_mixers():
    found = remote_files(["attn", "lightning-attn"])
    for entry in remote_code.ENTRIES:
        before, after = (REMOTE_CODE / f"{entry}.py").read_text().split(remote_code.REGISTRY)
        text = found[f"{entry}.py"]
        assert text.startswith(before) and after in text
        assert "MIXERS = by_name(mixer_attn, mixer_lightning_attn)" in text


def test_all_mixers_together_need_every_file():
    files = {path.name for path in REMOTE_CODE.glob("*.py")} - {
        "__init__.py",
        "mixers_hypenet.py",
    }
    assert remote_files(MIXERS).keys() == files


def test_a_mixer_without_code_is_named():
    with pytest.raises(ConversionError, match="mixer 'toy-x' has no modelling code.*mixer_toy_x"):
        remote_files(["attn", "toy-x"])


@pytest.mark.parametrize("mixer", MIXERS)
def test_transformers_finds_every_file(mixer, tmp_path):
    """Each entry leads to the files that it imports itself: transformers 4.57 copies no more of a
    local folder."""
    from transformers.dynamic_module_utils import get_relative_import_files, get_relative_imports

    found = remote_files([mixer])
    for name, text in found.items():
        (tmp_path / name).write_text(text)
    needed = {
        module: {name.rpartition("/")[2] for name in get_relative_import_files(file)}
        for module in remote_code.ENTRIES
        for file in [tmp_path / f"{module}.py"]
    }
    for module, files in needed.items():
        direct = {f"{name}.py" for name in get_relative_imports(tmp_path / f"{module}.py")}
        assert direct == files
    assert needed["modeling_hypenet"] | {"modeling_hypenet.py"} == found.keys()
    assert f"mixer_{mixer}.py" in needed["configuration_hypenet"]


@pytest.mark.parametrize("mixer", MIXERS)
def test_the_files_of_one_mixer_work_alone(mixer, tmp_path):
    """The registry knows this mixer, and a default configuration can be made."""
    for name, text in remote_files([mixer]).items():
        (tmp_path / name).write_text(text)
    (tmp_path / "__init__.py").write_text("")
    code = (
        "import importlib, json, sys; sys.path.insert(0, sys.argv[1])\n"
        "sys.modules['megatron_hypenet'] = None\n"
        "modeling = importlib.import_module(f'{sys.argv[2]}.modeling_hypenet')\n"
        "config = modeling.HypeNetConfig(num_hidden_layers=2)\n"
        "print(json.dumps([sorted({m.hf_names[0] for m in modeling.MIXERS.values()}),"
        " config.mixer_types]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path.parent, tmp_path.name],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (name,), types = json.loads(done.stdout)
    assert name.replace("-", "_") == mixer and types == [name] * 2
