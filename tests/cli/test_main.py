import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kiln.cli.main import COMMANDS, run
from kiln.cli.main import kiln as command_line
from kiln.cli.settings import Settings, default_store
from kiln.version import __version__

Run = Callable[..., Any]


def test_the_version_needs_no_command_line(kiln_process: Run) -> None:
    program = "import sys; sys.argv = ['kiln', '--version']; import kiln.__main__ as m; code = m.main(); print(code, 'click' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True)
    assert done.stdout == f"kiln {__version__}\n0 False\n"
    assert kiln_process("--json", "--version").text == f"kiln {__version__}\n"


def test_the_help_names_every_command(kiln: Run) -> None:
    text = kiln("--help").text
    assert all(f"\n  {name} " in text for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_help(capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert run([name, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"Usage: kiln {name}")


def test_the_options_of_the_help_are_options(kiln: Run) -> None:
    lines = kiln("run", "--help").text.splitlines()
    options = [
        line.split()[0] for line in lines[lines.index("Options:") + 1 :] if line.startswith("  ") and line[2] != " "
    ]
    assert "--export" in options
    assert all(option.startswith("-") for option in options)


@pytest.mark.parametrize("command", [(), ("store",)])
def test_a_command_that_is_not_whole_gets_the_help(
    capsys: pytest.CaptureFixture[str], command: tuple[str, ...]
) -> None:
    assert run(command) == 2
    said = capsys.readouterr()
    assert said.out == ""
    lines = said.err.splitlines()
    assert lines[0].startswith("Usage: kiln")
    assert "Commands:" in lines
    assert not any(line.endswith("...") for line in lines[1:])


@pytest.mark.parametrize(
    "arguments",
    [
        ["bogus"],
        ["--bogus"],
        ["run"],
        ["run", "--bogus", "--", "true"],
        ["run", "-i", "no-equals-sign", "--", "true"],
        ["run", "--memory", "lots", "--", "true"],
        ["run", "--timeout", "never", "--", "true"],
        ["builds", "--limit", "0"],
        ["completions", "tcsh"],
        ["--uid-range", "x", "builds"],
        ["--builder", "teleport://", "run", "--", "true"],
        ["--builder", "bwrap://?colour=red", "run", "--", "true"],
    ],
)
def test_wrong_usage(capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str]) -> None:
    assert run(["--store", str(tmp_path / "store"), *arguments]) == 2
    said = capsys.readouterr()
    assert said.err.splitlines()[-1].startswith("kiln: ")
    assert said.out == ""


def settings(*arguments: str) -> Settings:
    group = command_line()
    context = group.make_context("kiln", list(arguments))
    with context:
        name, command, rest = group.resolve_command(context, [*context._protected_args, *context.args])
        assert command is not None
        with command.make_context(name, rest, parent=context) as inner:
            return Settings.of(inner)


def test_global_options_work_on_both_sides() -> None:
    before = settings("--store", "/a", "--json", "--allow-path", "/x", "builds")
    after = settings("builds", "--store", "/a", "--json", "--allow-path", "/x")
    assert before == after
    assert before.store == "/a"
    assert before.json


def test_what_comes_later_counts_and_lists_grow() -> None:
    both = settings("--store", "/a", "--allow-path", "/x", "builds", "--store", "/b", "--allow-path", "/y")
    assert both.store == "/b"
    assert both.allow_path == ("/x", "/y")


def test_the_default_store() -> None:
    assert default_store({}, 0) == "/var/lib/kiln"
    assert default_store({"XDG_DATA_HOME": "/data"}, 0) == "/data/kiln"
    assert default_store({"XDG_DATA_HOME": "/data"}, 1000) == "/data/kiln"
    assert default_store({}, 1000).endswith("/.local/share/kiln")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completions(kiln: Run, shell: str) -> None:
    outcome = kiln("completions", shell)
    assert outcome.code == 0
    assert "_KILN_COMPLETE" in outcome.text
    assert outcome.err == b""
