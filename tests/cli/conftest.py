"""The command line as users have it: a process of its own."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Outcome:
    code: int
    out: bytes
    err: bytes

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
def kiln(tmp_path: Path, store: Path) -> Run:
    def run(*arguments: str | Path, stdin: bytes = b"", use_store: bool = True) -> Outcome:
        own = ["--store", str(store)] if use_store else []
        done = subprocess.run(
            [sys.executable, "-m", "kiln", *own, *map(str, arguments)],
            check=False,
            input=stdin,
            capture_output=True,
            cwd=tmp_path,
            env={**os.environ, "COLUMNS": "120"},
            timeout=100,
        )
        outcome = Outcome(done.returncode, done.stdout, done.stderr)
        assert b"Traceback" not in outcome.err, outcome.said
        assert b"bug in kiln" not in outcome.err, outcome.said
        return outcome

    return run
