"""Checkpoints and training states: how a whole one is made, and what an export that accepts one
must have."""

import hashlib
import json
import shutil

import torch

from megatron_hypenet.cli.main import run
from tests.fuzz import mutations as m
from tests.fuzz.hf_folders import make_model


def make_checkpoint(folder):
    make_model(folder.with_name("source"))
    assert run(["convert", "import", str(folder.with_name("source")), str(folder)]) == 0
    shutil.rmtree(folder.with_name("source"))


def write_hashes(folder, name):
    """Make the manifest fit the damaged file, and COMMITTED the manifest."""
    path = folder / name
    manifest = folder / "manifest.json"
    if (
        name not in ("manifest.json", "COMMITTED")
        and path.is_file()
        and not path.is_symlink()
        and path.stat().st_size < m.BIG
    ):
        content = path.read_bytes()
        record = json.loads(manifest.read_text())
        record["files"][name] = {
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        manifest.write_text(json.dumps(record))
    if (
        name != "COMMITTED"
        and manifest.is_file()
        and not manifest.is_symlink()
        and manifest.stat().st_size < m.BIG
    ):
        (folder / "COMMITTED").write_text(hashlib.sha256(manifest.read_bytes()).hexdigest() + "\n")


def nothing_is_accepted(folder, out, said, whole):
    same = all(
        (folder / file.relative_to(whole)).read_bytes() == file.read_bytes()
        for file in whole.rglob("*")
        if file.is_file()
    )
    assert same, "a file that differs from its hash was accepted"


def exported_as_torch_reads_it(folder, out, said, whole):
    """Compare every exported tensor with what torch's own reader finds in the checkpoint, and its
    shape what model.json says."""
    from safetensors.torch import load_file
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    from megatron_hypenet.config.model import ModelConfig
    from megatron_hypenet.export.mapping import entries

    found = load_file(next(out.glob("*.safetensors")))
    config = ModelConfig.model_validate(json.loads((folder / "model.json").read_text()))
    assert json.loads((out / "config.json").read_text())["vocab_size"] == config.vocab_size
    state = {entry.ours: torch.zeros(entry.shape) for entry in entries(config)}
    _load_state_dict(
        state,
        storage_reader=dcp.FileSystemReader(folder / "weights"),
        planner=dcp.DefaultLoadPlanner(),
        no_dist=True,
    )
    for entry in entries(config):
        assert torch.equal(torch.cat([found[name] for name in entry.hf]), state[entry.ours]), (
            entry.ours
        )
    if not json.loads((folder / "manifest.json").read_text())["kind"]:
        raise AssertionError("a checkpoint of no kind")


def make_training_state(folder):
    from megatron_hypenet.checkpoint.state import TrainState

    make_checkpoint(folder)
    TrainState(
        stage="align", step=3, samples=12, tokens=700, losses=(0.5, 0.25), layout={"tp": 1}
    ).write(folder / "train_state.json")
    write_hashes(folder, "train_state.json")


def read_train_state(folder):
    from dataclasses import asdict

    from megatron_hypenet.checkpoint.state import TrainState

    return asdict(TrainState.read(folder))


def _same(one, other):
    """Return whether values are equal; a whole number may be read as the float nearest to it."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return one == other or (
        isinstance(one, float) and isinstance(other, int) and one == float(other)
    )


def says_what_the_file_says(name, folder, out, said, whole):
    """Check that what was read is the file's content as a plain parser reads it: same keys, same
    values; keys that are gone have defaults."""
    printed = json.loads(said)
    plain = json.loads((folder / name).read_text())
    before = json.loads((whole / name).read_text())
    for key, value in printed.items():
        assert (
            _same(value, plain.get(key, value))
            and isinstance(value, type(before[key]))
            or (isinstance(value, int) and isinstance(before[key], float))
        ), key
