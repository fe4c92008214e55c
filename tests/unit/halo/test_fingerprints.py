"""Which settings and files make a run, or a task, another one."""

from megatron_hypenet.halo.fingerprints import (
    content_of,
    difference,
    files_identity,
    fingerprint_of,
    removed,
    settled,
)
from tests.unit.halo.test_run_folder import STAGE


def test_difference_sees_new_and_lost_keys():
    assert difference({"a": 1, "b": {"c": 2}}, {"b": {"c": 2}, "d": [1]}) == [
        "a: 1 there, not set now",
        "d: not set there, [1] now",
    ]


def test_settled_leaves_out_what_may_change():
    assert settled({"align": STAGE, "parallel": {"zero_stage": 1}}) == {
        f"align.{key}": value for key, value in STAGE.items() if key != "micro_batch_size"
    }
    assert settled({"seed": 1, "align": {"lr": 2.0}}, without={"align.lr"}) == {"seed": 1}


def test_identity_follows_content_not_place(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_bytes(b"x" * 3_000_000)
    first = files_identity(tmp_path / "a")
    assert first == files_identity(tmp_path / "b")
    with (tmp_path / "b" / "weights").open("r+b") as stream:
        stream.seek(2_999_999)
        stream.write(b"y")
    assert files_identity(tmp_path / "b") != first
    assert fingerprint_of({"files": first}) != fingerprint_of(
        {"files": files_identity(tmp_path / "b")}
    )
    assert files_identity(tmp_path / "none") == []


def test_content_has_no_name_and_no_place(tmp_path):
    for name in ("a.txt", "b.txt", "c.jsonl"):
        (tmp_path / name).write_text("text")
    assert content_of(tmp_path / "a.txt") == content_of(tmp_path / "b.txt")
    assert content_of(tmp_path / "a.txt") != content_of(
        tmp_path / "c.jsonl"
    )  # it is read another way
    for name in ("one", "two"):
        (tmp_path / f"{name}.bin").write_bytes(b"tokens")
        (tmp_path / f"{name}.idx").write_bytes(b"index")
    assert content_of(tmp_path / "one") == content_of(tmp_path / "two")
    (tmp_path / "two.idx").write_bytes(b"other")
    assert content_of(tmp_path / "one") != content_of(tmp_path / "two")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "weights").write_text("w")
    (tmp_path / "folder").rename(tmp_path / "moved")
    assert content_of(tmp_path / "moved")[0][0] == "weights"
    assert content_of(tmp_path / "none") == []


def test_removed_names_what_decided_a_result_and_is_unknown_now():
    stored = {"seed": 1, "warp": 9, "parallel": {"old": 1}}
    assert removed(stored, {"seed": 2}) == ["warp: 9"]
