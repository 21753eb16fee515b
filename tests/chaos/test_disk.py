"""A disk that goes away under whoever writes to it."""

import pytest

from tozan.chaos import disk


def test_what_is_written_between_two_disks_is_lost_with_the_first(tmp_path, monkeypatch):
    folder, mount = tmp_path / "disk", disk._mount

    def late(*words: str) -> bool:
        (folder / "between").write_text("written while no disk was there")
        return mount(*words)

    with disk.mounted(folder) as made:
        if made is None:
            pytest.skip("mounting needs root")
        (folder / "first").write_text("on the first disk")
        with monkeypatch.context() as patched:
            patched.setattr(disk, "_mount", late)
            made.lose()
        (folder / "second").write_text("on the second disk")
    assert [path.name for path in folder.iterdir()] == ["second"]
