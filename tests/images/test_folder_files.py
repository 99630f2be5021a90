import os

from raysweep.images.folder_files import list_folder, local_files


def test_links_to_themselves_and_to_nothing_are_listed_as_files(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "1.png").write_bytes(b"")
    (tmp_path / "cat" / "self.png").symlink_to("self.png")
    (tmp_path / "cat" / "gone.png").symlink_to("nothing.png")
    (tmp_path / "cat" / "above").symlink_to("..")
    (tmp_path / ".hidden").symlink_to(".hidden")
    os.mkfifo(tmp_path / "cat" / "pipe.png")
    expected = ["cat/1.png", "cat/gone.png", "cat/self.png"]
    assert list(list_folder(str(tmp_path)).files) == sorted(local_files(str(tmp_path))) == expected
