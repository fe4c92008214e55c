"""What can be given as text, by names and first bytes."""

import json

import pytest

from megatron_hypenet.data.sources import find_files, is_pattern, is_prepared, kind_of
from megatron_hypenet.data.token_writer import TokenFileWriter
from megatron_hypenet.errors import DataError


@pytest.mark.parametrize(
    ("name", "kind", "codec"),
    [
        ("a.txt", ".txt", ""),
        ("a.b.jsonl", ".jsonl", ""),
        ("a.jsonl.gz", ".jsonl", ".gz"),
        ("a.json.zst", ".json", ".zst"),
        ("a.parquet", ".parquet", ""),
        ("a.parquet.gz", "", ""),
        ("a.gz", "", ""),
        ("a", "", ""),
        ("a.csv", "", ""),
    ],
)
def test_kinds_follow_from_the_name(tmp_path, name, kind, codec):
    assert kind_of(tmp_path / name) == (kind, codec)


def test_folders_and_patterns_are_sorted_and_say_what_they_leave_out(tmp_path):
    for name in ("b.txt", "a.jsonl", "sub/c.txt", "README.md", ".hidden.txt", ".git/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    found = find_files(tmp_path)
    assert [file.path.name for file in found.files] == ["a.jsonl", "b.txt", "c.txt"]
    assert found.size == 6 and found.note == "1 files are no text and are left out: README.md"
    pattern = tmp_path / "*.txt"
    assert is_pattern(pattern) and [f.path.name for f in find_files(pattern).files] == ["b.txt"]
    assert len(find_files(tmp_path / "**" / "*.txt").files) == 2
    with pytest.raises(DataError, match="no file has such a name"):
        find_files(tmp_path / "*.parquet")
    (tmp_path / "[x].txt").write_text("a name with brackets")
    assert not is_pattern(tmp_path / "[x].txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="a folder without text"):
        find_files(tmp_path / "empty")


def test_prepared_pairs_are_told_from_text(tmp_path):
    (tmp_path / "corpus").mkdir()
    assert not is_prepared(tmp_path / "corpus") and not is_prepared(tmp_path / "gone.jsonl")
    assert is_prepared(tmp_path / "gone") and not is_prepared(tmp_path / "*.gone")
    with TokenFileWriter(tmp_path / "corpus", vocab_size=9) as writer:
        writer.add([1])
    assert is_prepared(tmp_path / "corpus")


def test_saved_datasets(tmp_path):
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "dataset_info.json").write_text("{}")
    state = saved / "state.json"
    names = ["data-00001.arrow", "data-00000.arrow"]
    for name in names:
        (saved / name).write_bytes(b"\xff\xff\xff\xff....")
    state.write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    assert [file.path.name for file in find_files(saved).files] == names
    state.write_text(json.dumps({"_data_files": [{"filename": "../x.arrow"}]}))
    with pytest.raises(DataError, match="not inside the folder"):
        find_files(saved)
    state.write_text(json.dumps({"_data_files": []}))
    with pytest.raises(DataError, match="state.json: names no data files"):
        find_files(saved)
    state.write_text(json.dumps({"_data_files": ["a"], "_indices_data_files": [{}]}))
    with pytest.raises(DataError, match="flatten_indices"):
        find_files(saved)
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(DataError, match=r"several parts \(train, test\)"):
        find_files(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl.gz", b"{}", "first bytes are not those of a .gz file"),
        ("a.txt.zst", b"text", "first bytes are not those of a .zst file"),
        ("a.parquet", b"PK\x03\x04", "first bytes are not those of a .parquet file"),
        ("a.arrow", b"", "first bytes are not those of a .arrow file"),
        ("a.json", b"PAR1", "not text but a Parquet file; give it the suffix of its kind"),
        ("a.json", b"BZh9", "not text but a bzip2 file; unpack it first"),
    ],
)
def test_names_that_do_not_fit_the_content(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        find_files(tmp_path / name)


def test_what_is_no_file_is_named(tmp_path):
    (tmp_path / "link.txt").symlink_to(tmp_path / "nowhere")
    for name in ("link.txt", "none.txt"):
        with pytest.raises(DataError, match=f"{name}: no such file"):
            find_files(tmp_path / name)
