"""What a build occupies on disk, however deep it hides it."""

import os
import subprocess
from pathlib import Path

from kiln.sandbox.layout import occupied_bytes


def test_disk_counts_what_lies_deeper_than_any_path_reaches(tmp_path: Path) -> None:
    here = os.open(tmp_path, os.O_RDONLY)
    for _ in range(120):  # Twelve thousand bytes of path: three times PATH_MAX.
        os.mkdir("d" * 100, dir_fd=here)
        below = os.open("d" * 100, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    file = os.open("big", os.O_CREAT | os.O_WRONLY, dir_fd=here)
    os.write(file, b"x" * (4 << 20))
    os.fsync(file)
    os.close(file)
    os.close(here)
    assert occupied_bytes(str(tmp_path)) >= 4 << 20


def test_disk_counts_a_hard_linked_file_once_and_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a").write_bytes(os.urandom(1 << 20))
    os.link(tmp_path / "in/a", tmp_path / "in/b")
    (tmp_path / "in/l").symlink_to("/")
    os.sync()
    said = subprocess.run(["du", "-s", "-B1", str(tmp_path / "in")], capture_output=True, check=True, text=True).stdout
    assert abs(occupied_bytes(str(tmp_path / "in")) - int(said.split()[0])) <= 8192
