import os

from benchmarks.refit import Copy, medium


def test_a_copy_goes_into_a_new_file_or_over_the_old_one(tmp_path):
    copy = Copy(tmp_path / "copy", 100_001, fsync=True)
    assert copy.seconds(new=True) > 0
    with open(tmp_path / "copy", "rb") as first:  # held, so that its number is not given again
        assert copy.seconds(new=False) > 0
        assert os.stat(tmp_path / "copy").st_ino == os.fstat(first.fileno()).st_ino
        assert copy.seconds(new=True) > 0
        assert os.stat(tmp_path / "copy").st_ino != os.fstat(first.fileno()).st_ino
    assert os.stat(tmp_path / "copy").st_size == 100_001


def test_the_medium_is_that_of_the_longest_mount(tmp_path):
    assert medium(tmp_path.__class__("/proc/self")) == "proc"
    assert medium(tmp_path) != "proc"
