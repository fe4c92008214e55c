from megatron_hypenet.supervision.request_files import STOP, stop_file


def test_the_first_folder_with_the_file_is_named(tmp_path):
    folders = [tmp_path / name for name in ("run", "align", "distill")]
    for folder in folders:
        folder.mkdir()
    assert stop_file(folders) is None
    for folder in folders[1:]:
        (folder / STOP).touch()
    assert stop_file(folders) == folders[1] / "STOP"
