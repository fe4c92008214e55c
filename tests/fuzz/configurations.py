"""Configurations and hostfiles: how whole ones are made, and what their readers must say of
them."""

import json
import math
import shutil

import yaml

from tests.fuzz.reading import ROOT, TOKENIZER


def make_config(folder):
    folder.mkdir(exist_ok=True)
    stage = {
        "train_iters": 2,
        "seq_length": 16,
        "micro_batch_size": 1,
        "global_batch_size": 2,
        "lr": 1e-3,
        "min_lr": 1e-4,
    }
    values = {
        "output_dir": "run",
        "teacher": str(TOKENIZER),
        "data": {"train": ["text.txt"]},
        "device": "cpu",
        "precision": "float32",
    }
    (folder / "run.yaml").write_text(
        yaml.safe_dump(values | {"align": stage, "distill": stage, "finetune": stage})
    )
    shutil.copy(ROOT / "configs" / "cluster" / "h100_infiniband.yaml", folder / "cluster.yaml")
    shutil.copy(ROOT / "configs" / "model" / "hypenet_2b.yaml", folder / "model.yaml")
    (folder / "hosts").write_text("worker-1 slots=8\nworker-2 slots=8\n# a comment\n")


def flat(value, prefix=""):
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    return {
        key: leaf
        for name, inner in value.items()
        for key, leaf in flat(inner, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def same_setting(value, written, found):
    """Return whether `found` is the value, or the text that stands in the file; of a list, each
    entry."""
    if any(isinstance(one, list) for one in (value, written, found)):
        value, written, found = (
            one if isinstance(one, list) else [one] for one in (value, written, found)
        )
        return len(value) == len(written) == len(found) and all(
            map(same_setting, value, written, found)
        )
    return (isinstance(found, str) and found == written) or same_leaf(value, found)


def same_leaf(one, other):
    try:
        return (
            type(one) is type(other)
            and one == other
            or math.isclose(float(one), float(other), rel_tol=1e-12)
        )
    except (TypeError, ValueError, OverflowError):
        return str(one) == str(other) or (
            isinstance(one, str) and str(other).endswith(one.rstrip("/"))
        )


class _PlainLoader(yaml.SafeLoader):
    """YAML as PyYAML reads it, but for numbers too long for Python, which stay text."""


def _whole_number(loader, node):
    try:
        return yaml.SafeLoader.construct_yaml_int(loader, node)
    except ValueError:
        return loader.construct_scalar(node)


_PlainLoader.add_constructor("tag:yaml.org,2002:int", _whole_number)


def settings_are_the_files(name, folder, out, said, whole):
    """Every setting in the file has, in the configuration that was read, the value that PyYAML
    reads, or is the text as it stands in the file."""
    text = (folder / name).read_text()
    plain = flat(yaml.load(text, _PlainLoader))
    written = flat(yaml.load(text, yaml.BaseLoader))
    printed = flat(json.loads(said))
    for key, value in plain.items():
        found = printed.get(key)
        assert not key or value == {} or same_setting(value, written.get(key), found), (
            f"{key}: {value!r} in the file, {found!r} read"
        )


def read_cluster(folder):
    from megatron_hypenet.config.cluster import load_cluster_config

    return load_cluster_config(folder / "cluster.yaml").model_dump(mode="json")


def read_model(folder):
    from megatron_hypenet.config.loader import load_model_config

    return load_model_config(folder / "model.yaml").model_dump(mode="json")


def read_hosts(folder):
    from launchers.hostfile import read_hostfile

    return [[host.name, host.slots] for host in read_hostfile(folder / "hosts")]


def hosts_are_the_lines(folder, out, said, whole):
    import re

    lines = [line.partition("#")[0].strip() for line in (folder / "hosts").read_text().split("\n")]
    want = [
        [name, int(slots)]
        for name, slots in (
            re.fullmatch(r"([A-Za-z0-9_.-]+)\s+slots=(\d+)", line).groups()
            for line in lines
            if line
        )
    ]
    assert json.loads(said) == want and all(0 < slots < 10_000 for _, slots in want)
