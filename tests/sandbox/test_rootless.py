"""The same promises, kept for somebody who is not root: the suite of `test_builds`, run again as an ordinary user."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOMEBODY = 54321
TESTS = Path(__file__).parent / "test_builds.py"
CHECKOUT = TESTS.parents[2]


def exposing(paths: list[Path]) -> str:
    """Shell commands that make `paths` reachable for everybody, in a mount namespace of their own.

    A checkout or a Python below /root cannot be entered by others. The closed directory is covered with an open one
    that holds just what is needed.
    """
    closed: dict[Path, list[Path]] = {}
    for path in paths:
        for ancestor in reversed(path.parents):
            if not ancestor.stat().st_mode & 0o001:
                closed.setdefault(ancestor, []).append(path)
                break
    commands = ["mount --make-rprivate /", "mount -t tmpfs -o mode=755 none /mnt"]
    for number, (ancestor, inside) in enumerate(closed.items()):
        kept = f"/mnt/{number}"
        commands += [f"mkdir {kept}", f"mount --rbind {ancestor} {kept}", f"mount -t tmpfs -o mode=755 none {ancestor}"]
        for path in inside:
            commands += [f"mkdir -p {path}", f"mount --rbind {kept}/{path.relative_to(ancestor)} {path}"]
    return " && ".join(commands)


@pytest.mark.timeout(300)
@pytest.mark.skipif(os.geteuid() != 0, reason="who is not root has run test_builds as an ordinary user already")
def test_an_ordinary_user_gets_the_same(tmp_path: Path) -> None:
    interpreter = Path(sys.base_prefix).resolve()
    home = tmp_path / "home"
    home.mkdir()
    os.chown(home, SOMEBODY, SOMEBODY)
    where = Path("/mnt/home")
    command = [
        "setpriv", f"--reuid={SOMEBODY}", f"--regid={SOMEBODY}", "--clear-groups", "env", f"HOME={where}", f"TMPDIR={where}",
        f"{sys.prefix}/bin/python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "2", f"--basetemp={where}/t", str(TESTS),
    ]  # fmt: skip
    script = f"{exposing([interpreter, CHECKOUT, Path(sys.prefix)])} && mkdir {where} && mount --bind {home} {where} && exec {' '.join(command)}"
    assert shutil.which("unshare") is not None
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-ec", script], cwd=CHECKOUT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
