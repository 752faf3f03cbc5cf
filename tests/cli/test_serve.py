import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The URL of a server with a store of its own."""
    command = [sys.executable, "-m", "kiln", "--store", str(tmp_path / "far"), "serve"]
    process = subprocess.Popen(
        [*command, "--listen", f"unix://{tmp_path}/kiln.sock"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        url = process.stdout.readline().strip()
        assert url, process.communicate()[1]
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, ""), err
    assert "Traceback" not in err


def test_a_builder_elsewhere_takes_inputs_and_gives_outputs(kiln: Run, server: str, tmp_path: Path) -> None:
    (tmp_path / "word").write_text("hello")
    command = ["run", "--sh", "-i", "word=word", "-o", "build/out", "--export", "ex", "--json", "--builder", server]
    outcome = kiln(*command, "--", "/bin/sh", "-c", "echo at work; tr a-z A-Z < /inputs/word > out")
    assert outcome.code == 0, outcome.said
    assert (tmp_path / "ex" / "build" / "out").read_text() == "HELLO"
    assert "at work" in outcome.said
    result = json.loads(outcome.text)
    node = json.dumps(result["outputs"][0]["node"])
    assert kiln("store", "cat", node).text == "HELLO", "the output is in the store of the command"
    assert kiln("log", "--builder", server, result["build_id"]).text == "at work\n"
    assert kiln("watch", "--builder", server, result["build_id"]).code == 0
    assert kiln("builds").text == "", "the build is the server's"
    assert len(kiln("builds", "--builder", server).text.splitlines()) == 1


def test_failures_of_a_builder_elsewhere_have_the_same_exit_codes(kiln: Run, server: str) -> None:
    def run(*options: str, text: str = "true") -> Any:
        return kiln("--builder", server, "run", "--sh", *options, "--", "/bin/sh", "-c", text)

    failed = run(text="echo trying; exit 3")
    assert failed.code == 1
    assert "  | trying" in failed.said
    assert run("--net").code == 4
    assert run("-o", "../x").code == 3
    assert run("-o", "build/nothing").code == 1
    assert run("--timeout", "0.3", text="sleep 60").code == 1
    assert kiln("--builder", server, "show", "zzzz").code == 4
    assert kiln("--builder", server, "doctor").code == 0


def test_the_store_of_a_server_is_a_store(kiln: Run, server: str, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "file").write_text("contents")
    node = kiln("--store", server, "store", "import", "tree").text
    assert kiln("--store", server, "store", "cat", node, "file").text == "contents"
    assert kiln("--store", server, "store", "export", node, "back").code == 0
    assert (tmp_path / "back" / "file").read_text() == "contents"
    assert kiln("store", "stat", node).code == 4, "nothing of it is in the store of the command"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--listen", "ftp://x"], 2),
        (["--listen", "unix://relative"], 2),
        (["--listen", "http://127.0.0.1:0"], 4),
        (["--listen", "https://127.0.0.1:0"], 2),
        (["--tls-cert", "x"], 2),
        (["--listen", "unix:///proc/nothing/kiln.sock"], 5),
    ],
)
def test_what_cannot_be_served(kiln: Run, arguments: list[str], code: int) -> None:
    outcome = kiln("serve", *arguments)
    assert outcome.code == code, outcome.said
    assert outcome.out == b""


def test_a_server_killed_in_mid_build_ends_it_when_it_is_back(kiln: Run, tmp_path: Path) -> None:
    def start() -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "kiln", "--store", str(tmp_path / "far"), "serve"]
        process = subprocess.Popen([*command, "--listen", f"unix://{socket}"], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        return process

    socket = tmp_path / "kiln.sock"
    process = start()
    command = [sys.executable, "-m", "kiln", "--store", str(tmp_path / "near"), "--builder", f"grpc+unix://{socket}"]
    client = subprocess.Popen(
        [*command, "run", "--sh", "--", "/bin/sh", "-c", "echo began; sleep 60"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert client.stderr is not None
    while b"began" not in (line := client.stderr.readline()):
        assert line
    process.kill()
    process.wait()
    process = start()
    try:
        _, err = client.communicate(timeout=100)
        assert client.returncode == 5, err.decode()
        assert b"(infrastructure)" in err
        assert b"Traceback" not in err
        assert "infrastructure" in kiln("--builder", f"grpc+unix://{socket}", "builds").text
    finally:
        process.terminate()
        assert process.wait(timeout=60) == 0
