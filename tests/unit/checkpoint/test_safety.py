"""A pickle that would run code is refused before it runs."""

import os
import pickle
import zipfile

import pytest
import torch
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata

from megatron_hypenet.checkpoint.safety import check_common, read_plain
from megatron_hypenet.checkpoint.save import write_weights
from megatron_hypenet.checkpoint.shards import ShardReader
from megatron_hypenet.errors import CheckpointError


class Evil:
    """Creates a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_malicious_metadata_is_refused_and_does_not_run(tmp_path, tensors, model_config):
    write_weights(tmp_path / "ck", tensors, model_config, kind="teacher")
    (tmp_path / "ck" / "weights" / ".metadata").write_bytes(pickle.dumps(Evil(tmp_path / "owned")))
    with pytest.raises(CheckpointError, match="posix.mkdir"):
        ShardReader(tmp_path / "ck" / "weights")
    assert not (tmp_path / "owned").exists()


def test_malicious_common_file_is_refused(tmp_path, tensors, model_config):
    write_weights(tmp_path / "ck", tensors, model_config, kind="teacher")
    common = tmp_path / "ck" / "weights" / "common.pt"
    torch.save({"x": Evil(tmp_path / "owned")}, common)
    with pytest.raises(CheckpointError, match="posix.mkdir"):
        ShardReader(common.parent)
    with zipfile.ZipFile(common, "w") as archive:
        archive.writestr("common/data.pkl", pickle.dumps(Evil(tmp_path / "owned")))
    with pytest.raises(CheckpointError, match="foreign code"):
        check_common(common)
    assert not (tmp_path / "owned").exists()


def test_truncated_pickle_is_damage_not_a_crash(tmp_path):
    with pytest.raises(CheckpointError, match="damaged"):
        read_plain(tmp_path / "m", pickle.dumps([1, 2])[:-3])


class ByGetattr:
    """Pickled as a call of getattr."""

    def __init__(self, *args):
        self.args = args

    def __reduce__(self):
        return getattr, self.args


def test_enumerations_as_debian_12_pickles_them_are_read(tmp_path):
    payload = pickle.dumps(
        [ByGetattr(_MEM_FORMAT_ENCODING, one.name) for one in _MEM_FORMAT_ENCODING]
    )
    assert [record.args[1] for record in read_plain(tmp_path / "m", payload)] == [
        one.name for one in _MEM_FORMAT_ENCODING
    ]


@pytest.mark.parametrize(
    "args",
    [
        (set, "pop"),
        (_MEM_FORMAT_ENCODING, "__class__"),
        (_MEM_FORMAT_ENCODING, "mro"),
        (Metadata, "__init__"),
    ],
)
def test_getattr_gives_nothing_else(tmp_path, args):
    with pytest.raises(CheckpointError, match=r"builtins.getattr\(.*foreign code"):
        read_plain(tmp_path / "m", pickle.dumps(ByGetattr(*args)))


@pytest.mark.parametrize("content", [b"", b"PK", b"no zip file", b"\0" * 1000])
def test_a_common_file_that_is_no_zip_file_is_refused(tmp_path, content):
    (tmp_path / "common.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"common.pt: damaged"):
        check_common(tmp_path / "common.pt")


def test_a_common_file_that_lacks_what_torch_reads_first_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "common.pt", "w") as archive:
        archive.writestr("common/data.pkl", pickle.dumps({}))
    with pytest.raises(CheckpointError, match="no member 'version'"):
        check_common(tmp_path / "common.pt")


def test_a_common_file_in_torchs_old_format_is_refused(tmp_path):
    torch.save(
        {"x": Evil(tmp_path / "owned")},
        tmp_path / "common.pt",
        _use_new_zipfile_serialization=False,
    )
    with pytest.raises(CheckpointError, match="damaged"):
        check_common(tmp_path / "common.pt")
