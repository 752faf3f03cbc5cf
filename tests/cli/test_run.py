import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]


def script(text: str, *options: str) -> list[str]:
    return ["run", "--sh", *options, "--", "/bin/sh", "-c", text]


def test_a_run_from_inputs_to_exported_outputs(kiln_process: Run, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "word").write_text("hello")
    outcome = kiln_process(
        "run", "--sh", "-i", f"in={tmp_path}/in", "-o", "build/out", "-e", "GREETING=hi", "--export", tmp_path / "ex",
        "--", "/bin/sh", "-c", "cat /inputs/in/word > out; pwd >> out; echo $HOME $GREETING >> out; echo loud; echo err >&2",
    )  # fmt: skip
    assert outcome.code == 0, outcome.said
    assert (tmp_path / "ex" / "build" / "out").read_text() == "hello/build\n/build hi\n"
    path, node = outcome.text.rstrip("\n").split("\t")
    assert path == "build/out"
    assert "file" in json.loads(node)
    assert "loud\nerr\n" in outcome.said
    assert kiln_process("store", "cat", node).text == "hello/build\n/build hi\n"


def test_json_prints_one_object_and_events_are_lines(kiln: Run, tmp_path: Path) -> None:
    outcome = kiln("--json", "--events", tmp_path / "events", *script("echo hi; echo x > out", "-o", "build/out"))
    result = json.loads(outcome.text)
    assert set(result) == {"build_id", "cached", "outputs", "usage"}
    assert [output["path"] for output in result["outputs"]] == ["build/out"]
    events = [json.loads(line) for line in (tmp_path / "events").read_text().splitlines()]
    recorded = [event for event in events if "seq" in event]
    assert [int(event["seq"]) for event in recorded] == list(range(1, len(recorded) + 1))
    assert "accepted" in events[0]
    assert "finished" in events[-1]
    assert {event["buildId"] for event in events} == {result["build_id"]}


def test_a_failure_says_why_and_how_to_go_on(kiln: Run, store: Path) -> None:
    outcome = kiln(*script("for i in $(seq 40); do echo line $i; done; exit 3"))
    assert outcome.code == 1
    assert "(command_failed)" in outcome.said
    assert "code 3" in outcome.said
    tail = [line for line in outcome.said.splitlines() if line.startswith("  | ")]
    assert tail == [f"  | line {i}" for i in range(16, 41)]
    build_id = outcome.said.splitlines()[-1].split()[-1]
    assert outcome.said.splitlines()[-2:] == [f"  kiln --store {store} {word} {build_id}" for word in ("log", "shell")]
    assert kiln("log", build_id).text.splitlines() == [f"line {i}" for i in range(1, 41)]
    assert "command_failed" in kiln("show", build_id[:12]).text
    assert kiln("watch", build_id).code == 1
    failed = json.loads(kiln("--json", *script("exit 3", "-o", "build/x")).text)
    assert failed["failure"]["exit"] == {"code": 3}


@pytest.mark.parametrize(
    ("options", "command", "code", "said"),
    [
        (["-o", "build/nothing"], "true", 1, "output_missing"),
        (["-o", "build/fifo"], "mkfifo fifo", 1, "output_invalid"),
        (["--timeout", "0.3"], "sleep 60", 1, "timed_out"),
        (["-o", "../x"], "true", 3, "outputs[0]"),
        (["--net"], "true", 4, "denied"),
        (["--ro-path", "/etc"], "true", 4, "denied"),
        (["--memory", "900T"], "true", 4, "unsatisfiable"),
        (["-i", "x=" + "0" * 64], "true", 4, "0" * 64),
        (["-i", "x=/nonexistent"], "true", 4, "/nonexistent"),
        (["-i", 'x={"symlink": {}}'], "true", 3, "symlink"),
        (["-i", 'x={"directory": {"digest": "' + "A" * 43 + '=", "size": 3}}'], "true", 4, "missing_input"),
        (["--strict", "-o", "build/b", "-o", "build/a"], "touch a b", 3, "outputs"),
        (["-e", "=x"], "true", 3, "environment_vars"),
        (["-i", "n" * 256 + '={"symlink": {"target": "eA=="}}'], "true", 3, "inputs[0]"),
        (["--events", "/nonexistent/events"], "true", 4, "/nonexistent/events"),
    ],
)
def test_what_does_not_work_has_its_exit_code(
    kiln_process: Run, options: list[str], command: str, code: int, said: str
) -> None:
    outcome = kiln_process(*script(command, *options))
    assert outcome.code == code, outcome.said
    assert said in outcome.said
    assert outcome.out == b""


def test_a_broken_rule_is_a_failure_in_json_too(kiln: Run) -> None:
    outcome = kiln("--json", *script("true", "-o", "../x"))
    assert outcome.code == 3
    failure = json.loads(outcome.text)["failure"]
    assert failure["reason"] == "REASON_INVALID_REQUEST"
    assert failure["field"]["path"] == "outputs"


def test_a_failed_build_exports_nothing(kiln: Run, tmp_path: Path) -> None:
    kiln(*script("echo x > a; exit 1", "-o", "build/a", "--export", str(tmp_path / "ex")))
    assert not (tmp_path / "ex").exists()


def test_a_request_can_be_printed_and_built(kiln: Run, tmp_path: Path) -> None:
    (tmp_path / "word").write_text("hello")
    options = ["--sh", "-i", "word=word", "-o", "build/out", "--", "/bin/sh", "-c", "cp /inputs/word out"]
    printed = kiln("request", *options)
    assert printed.code == 0, printed.said
    (tmp_path / "request.json").write_bytes(printed.out)
    built = kiln("build", "request.json", "--export", "ex")
    assert built.code == 0, built.said
    assert (tmp_path / "ex" / "build" / "out").read_text() == "hello"
    assert kiln("build", "-", stdin=printed.out).text == built.text


def test_the_needles_of_an_output_are_named_by_their_index(kiln: Run) -> None:
    request = json.loads(kiln("request", "--sh", "-o", "build/out", "--", "/bin/sh", "-c", "echo xbbx > out").out)
    request["refscanNeedles"] = ["aa", "bb", "xb"]
    result = kiln("build", "-", "--json", stdin=json.dumps(request).encode())
    assert json.loads(result.text)["outputs"][0]["needles"] == [1, 2]


@pytest.mark.parametrize(
    ("name", "contents", "code", "said"),
    [
        ("absent.json", None, 4, "absent.json"),
        ("empty.json", b"", 3, "line 1"),
        ("cut.json", b'{"commandArgs": ["a",', 3, "line 1"),
        ("list.json", b"[]", 3, "object"),
        ("strange.json", b'{"commandArgs": ["a"], "colour": 1}', 3, "colour"),
        ("wrong.json", b'{"commandArgs": 7}', 3, "commandArgs"),
        ("twice.json", b'{"outputs": [], "outputs": []}', 3, "outputs"),
        ("latin.json", b'{"commandArgs": ["\xe9"]}', 3, "UTF-8"),
        ("deep.json", b"[" * 100000, 3, "not a"),
        ("rule.json", b'{"commandArgs": ["a"], "outputs": ["x"]}', 3, "outputs[0]"),
        ("cut.binpb", b"\x12\xff", 3, "not a"),
        ("newer.binpb", b"\x12\x01a\xf8\x3f\x01", 3, "field"),
    ],
)
def test_a_request_file_that_is_none(
    kiln: Run, tmp_path: Path, name: str, contents: bytes | None, code: int, said: str
) -> None:
    if contents is not None:
        (tmp_path / name).write_bytes(contents)
    outcome = kiln("build", name)
    assert outcome.code == code, outcome.said
    assert said in outcome.said
    assert len(outcome.said.splitlines()) == 1


def test_a_log_moves_no_cursor(kiln: Run) -> None:
    outcome = kiln("--json", *script(r"printf '\033[31mred\033[0m\033[2J\033]0;title\007\n'"))
    build_id = json.loads(outcome.text)["build_id"]
    assert rb"red\x1b[2J\x1b]0;title\x07" in outcome.err
    assert b"\x1b" not in outcome.err
    assert b"\x1b" not in kiln("log", build_id).out
    assert kiln("log", "--raw", build_id).out == b"\x1b[31mred\x1b[0m\x1b[2J\x1b]0;title\x07\n"


def test_on_a_terminal_colours_stay_and_nothing_else(store: Path) -> None:
    master, slave = pty.openpty()
    command = [
        sys.executable,
        "-m",
        "kiln",
        "--store",
        str(store),
        *script(r"printf '\033[31mred\033[0m\033]0;title\007\n'"),
    ]
    environment = {**os.environ, "TERM": "xterm-256color"}
    environment.pop("NO_COLOR", None)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=slave, env=environment)
    os.close(slave)
    shown = b""
    while data := _read(master):
        shown += data
    os.close(master)
    assert process.wait() == 0
    assert process.stdout is not None
    process.stdout.close()
    assert b"\x1b[31mred" in shown
    assert b"\x1b]0;title" not in shown
    assert rb"\x1b]0;title\x07" in shown


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:  # EIO: the other side is closed.
        return b""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_cancels_and_leaves_nothing(kiln: Run, store: Path, number: signal.Signals) -> None:
    marker = f"31415.{os.getpid()}"
    command = [sys.executable, "-m", "kiln", "--store", str(store), *script(f"echo began; sleep {marker}")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    assert process.stderr is not None
    while b"began" not in (line := process.stderr.readline()):
        assert line, "it ended too soon"
    os.killpg(process.pid, number)  # As a terminal does: to all processes of the group.
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err.decode()
    assert b"ended early: cancelled by the command line" in err
    assert b"Traceback" not in err
    assert out == b""
    assert _running(marker) == []
    assert os.listdir(store / "builds") == []
    assert "cancelled" in kiln("builds").text


def _running(marker: str) -> list[str]:
    found = []
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                if f"sleep\0{marker}".encode() in file.read():
                    found.append(pid)
        except OSError:
            continue
    return found


def test_builds_are_listed_and_can_be_found_by_label(kiln: Run) -> None:
    assert kiln("builds").text == ""
    kiln(*script("true", "--label", "ci=1"))
    kiln(*script("false"))
    states = [line[49:].split("  ")[0] for line in kiln("builds").text.splitlines()]
    assert states == ["failed: command_failed", "succeeded"]
    assert len(kiln("builds", "--label", "ci=1", "--json").text.splitlines()) == 1
    assert kiln("builds", "--running").text == ""
    for unknown in ("show", "log", "watch", "cancel"):
        assert kiln(unknown, "zzzz").code == 4


def test_the_doctor_finds_a_builder_that_works(kiln: Run) -> None:
    outcome = kiln("doctor", "--json")
    assert outcome.code == 0, outcome.text
    assert {finding["what"] for finding in json.loads(outcome.text)} >= {"store", "builder", "build"}
    assert kiln("doctor", "--builder", "grpc+unix:///nonexistent.sock").code == 1


def test_a_closed_pipe_is_no_bug(kiln: Run, store: Path, tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(b"x" * 4_000_000)
    node = kiln("store", "import", "big").text.strip()
    command = [sys.executable, "-m", "kiln", "--store", str(store), "store", "cat", node]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 141  # 128 + SIGPIPE


def test_a_shell_enters_what_a_failed_build_left(kiln: Run, kiln_process: Run) -> None:
    failed = json.loads(kiln("--json", *script("echo left > note; exit 3")).text)["build_id"]
    inside = kiln_process("shell", failed, stdin=b"pwd; cat note; exit 7\n")
    assert (inside.code, inside.text) == (7, "/build\nleft\n")
    succeeded = json.loads(kiln("--json", *script("true")).text)["build_id"]
    assert kiln("shell", succeeded).code == 4
    assert kiln("shell", "zzzz").code == 4


def test_a_build_with_the_network_says_no_more_than_another(kiln_process: Run) -> None:
    outcome = kiln_process("--allow-net", *script("echo hi", "--net"))
    assert outcome.code == 0, outcome.said
    assert [line for line in outcome.said.splitlines() if not line.startswith("kiln: ")] == ["hi"]
