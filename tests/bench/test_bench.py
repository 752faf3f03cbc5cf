"""Every benchmark runs, and the page has what was measured. What the figures are is nobody's business here."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
NAMES = ("trivial", "inputs", "cache-hit", "small-files", "large-file", "start-up", "log")


def bench(*arguments: str) -> "subprocess.CompletedProcess[str]":
    argv = [sys.executable, "-m", "bench", *arguments]
    return subprocess.run(argv, check=False, capture_output=True, text=True, cwd=CHECKOUT, timeout=100)


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_and_the_page_has_a_row_for_every_side(name: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    done = bench(name, "--quick", "--rounds", "1", "--write", str(page))
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in page.read_text().splitlines() if line.startswith("| ")]
    sides = [row[0].removeprefix("| ") for row in rows[2:]]
    assert any("kiln" in side for side in sides)
    assert all(re.fullmatch(r"\d+\.\d\d", figure) for row in rows[2:] for figure in row[1:3])
    assert all(side in done.stdout for side in sides)


def test_the_page_says_what_it_was_measured_on_and_how_to_write_it_again(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    done = bench("start-up", "--quick", "--rounds", "2", "--write", str(page))
    assert done.returncode == 0, done.stderr
    text = page.read_text()
    assert f"Written by `./dev bench start-up --quick --rounds 2 --write {page}`" in text
    for fact in ("date", "kiln", "peers", "Python", "kernel", "machine", "scheduling", "load before"):
        assert f"\n- {fact}: " in text
    assert "\n- rounds: 2\n" in text


def test_an_unknown_name_is_refused_before_anything_runs_with_those_that_are_known() -> None:
    done = bench("start-up", "nonsense")
    assert done.returncode == 2
    assert done.stdout == ""
    assert f"unknown: nonsense; known are {', '.join(NAMES)}\n" in done.stderr
