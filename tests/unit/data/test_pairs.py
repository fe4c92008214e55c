from megatron_hypenet.data.pairs import is_token_file, mask_path, token_paths


def test_names_of_a_pair(tmp_path):
    prefix = tmp_path / "a.b"
    names = [path.name for path in (*token_paths(prefix), mask_path(prefix))]
    assert names == ["a.b.bin", "a.b.idx", "a.b.mask"]
    token_paths(prefix)[0].touch()
    assert not is_token_file(prefix)
    token_paths(prefix)[1].touch()
    assert is_token_file(prefix)
