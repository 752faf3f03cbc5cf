"""The command line as users have it."""

import io
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from kiln.cli.main import run


@dataclass(frozen=True)
class Outcome:
    code: int
    out: bytes
    err: bytes

    def __post_init__(self) -> None:
        assert b"Traceback" not in self.err, self.said
        assert b"bug in kiln" not in self.err, self.said

    @property
    def text(self) -> str:
        return self.out.decode()

    @property
    def said(self) -> str:
        return self.err.decode()


Run = Callable[..., Outcome]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def kiln_process(tmp_path: Path, store: Path) -> Run:
    """A process of its own, as from a shell. Starting one takes most of a second."""

    def start(*arguments: str | Path, stdin: bytes = b"") -> Outcome:
        done = subprocess.run(
            [sys.executable, "-m", "kiln", "--store", str(store), *map(str, arguments)],
            check=False,
            input=stdin,
            capture_output=True,
            cwd=tmp_path,
            env={**os.environ, "COLUMNS": "120"},
            timeout=100,
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    return start


@pytest.fixture
def kiln(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> Run:
    """All of the same but the process."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str | Path, stdin: bytes = b"") -> Outcome:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capfdbinary.readouterr()
        code = run(["--store", str(store), *map(str, arguments)])
        out, err = capfdbinary.readouterr()
        return Outcome(code, out, err)

    return call
