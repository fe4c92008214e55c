"""Members of a zip file are found and read within limits; a compressed or misplaced one is
refused."""

import io
import zipfile

import pytest
import torch

from megatron_hypenet.errors import CheckpointError
from megatron_hypenet.untrusted.files import FileKind
from megatron_hypenet.untrusted.zips import StoredZip

KIND = FileKind(error=CheckpointError, advice="use another one")


def opened(path, content, start=0, length=None):
    path.write_bytes(content)
    return StoredZip(
        KIND, path, path.open("rb"), start, len(content) - start if length is None else length
    )


def zipped(members, compression=zipfile.ZIP_STORED):
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", compression) as archive:
        for name, content in members:
            # ZipInfo's own date is fixed; a name alone would put the time of day into the bytes
            archive.writestr(zipfile.ZipInfo(name), content, compression)
    return target.getvalue()


def test_members_of_a_file_of_torch_are_found_where_they_are(tmp_path):
    target = io.BytesIO()
    torch.save(torch.arange(5), target)
    content = b"before" + target.getvalue() + b"after"
    archive = opened(tmp_path / "x", content, 6, len(target.getvalue()))
    start, size = archive.place("archive/data/0")
    assert torch.frombuffer(
        bytearray(content[start : start + size]), dtype=torch.int64
    ).tolist() == [0, 1, 2, 3, 4]
    assert archive.read("archive/byteorder", 100) == b"little"


def test_large_members_are_not_read_as_small_ones(tmp_path):
    archive = opened(tmp_path / "x", zipped([("a", b"0" * 100)]))
    with pytest.raises(CheckpointError, match="'?a'? has 100 bytes, the limit is 10"):
        archive.read("a", 10)
    with pytest.raises(CheckpointError, match="no member b"):
        archive.read("b", 10)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "damaged"),
        (zipped([("a", b"0" * 1000)], zipfile.ZIP_DEFLATED), "compressed"),
        (zipped([("a", b"1"), ("a", b"2")]), "twice"),
        (zipped([("a", b"123")])[:-5], "damaged"),
        (zipped([("a", b"123")]).replace(b"PK\x03\x04", b"PK\x03\x05"), "not where the table says"),
        (zipped([(f"member{number}", b"") for number in range(30000)]), "the limit is"),
    ],
    ids=["empty", "compressed", "one name twice", "cut off", "other header", "too many members"],
)
def test_damaged_and_dangerous_files_are_refused(tmp_path, content, word):
    with pytest.raises(CheckpointError, match=f"x: damaged at byte 0: .*{word}|x: .*{word}"):
        opened(tmp_path / "x", content)
