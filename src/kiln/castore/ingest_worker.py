"""Worker processes that walk parts of a large tree: Python's threads do not help there.

They are started as fresh interpreters (never forked: the parent may run gRPC's threads), once a walk has seen enough
files to be worth it. Both sides speak marshal, each message after its length, over the worker's stdin and stdout.
"""

import marshal
import os
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from threading import Condition, Thread
from types import TracebackType
from typing import IO, Any, Self

from kiln.castore.dirfd import DIRECTORY
from kiln.castore.errors import IngestChanged, IngestDenied, IngestRefused
from kiln.castore.ingest import Ownership, Sharing, Walked, Walker
from kiln.castore.local.files import StoreFiles
from kiln.castore.model import SCHEMES, Digest, DirectoryNode, Scheme
from kiln.castore.refscan import RefScanner

_WORTH_FILES = 1500  # By then a walk has taken 50 ms or so, about what it takes a worker to start.
_ERRORS: dict[str, type[IngestRefused | IngestChanged | IngestDenied]] = {
    kind.__name__: kind for kind in (IngestRefused, IngestChanged, IngestDenied)
}


class _Job:
    """A directory to walk; its result, once there is one."""

    def __init__(self, crew: "Crew", parts: list[bytes]) -> None:
        self._crew = crew
        self.parts = parts
        self.walked: Walked | None = None
        self.error: Exception | None = None

    def result(self) -> Walked:
        """Walked by whoever came first; we walk what is left while we wait."""
        while self.walked is None and self.error is None:
            self._crew.work_or_wait(self)
        if self.error is not None:
            raise self.error
        assert self.walked is not None
        return self.walked


class Crew(Sharing):
    """The workers of one walk. A context manager: they are gone after the block."""

    def __init__(
        self,
        root: int,
        files: StoreFiles,
        scheme: Scheme,
        needles: Sequence[bytes],
        ownership: Ownership,
        *,
        workers: int,
    ) -> None:
        """`root` is the tree's open directory; `workers` are those beside the calling thread."""
        self._root = os.dup(root)  # A deep descent closes its root for a while.
        self._files = files
        self._scheme = scheme
        self._needles = needles
        self._ownership = ownership
        self._workers = workers
        self._processes: list[subprocess.Popen[bytes]] = []
        self._threads: list[Thread] = []
        self._changed = Condition()
        self._queue: deque[_Job] = deque()
        self._closed = False
        self._own: Walker | None = None
        self._prefix = files.temporary_name() + "-worker-"

    def wants(self, files_so_far: int) -> bool:
        return files_so_far >= _WORTH_FILES and len(self._queue) < self._workers

    def offer(self, parts: list[bytes]) -> _Job:
        job = _Job(self, parts)
        if not self._processes:
            for number in range(self._workers):
                self._start(number)
        with self._changed:
            self._queue.append(job)
            self._changed.notify()
        return job

    def work_or_wait(self, awaited: _Job) -> None:
        """Walk a directory that nobody has taken, or wait for the next result."""
        with self._changed:
            if awaited.walked is not None or awaited.error is not None:
                return
            if not self._queue:
                self._changed.wait()
                return
            job = self._queue.popleft()
        if self._own is None:
            scanner = RefScanner(self._needles) if self._needles else None
            self._own = Walker(self._files, self._scheme, scanner, self._ownership, alone=False)
        job.walked = self._own.walk_directory(os.open(b".", DIRECTORY, dir_fd=self._root), job.parts)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._closed = True
            self._queue.clear()
            self._changed.notify_all()
        for process in self._processes:
            if error is not None:
                process.kill()
        for thread in self._threads:
            thread.join()
        for process in self._processes:
            process.wait()
        os.close(self._root)
        if error is not None:
            self._remove_temporary()

    def _remove_temporary(self) -> None:
        for name in os.listdir(self._files.temporary):
            if name.startswith(self._prefix):
                os.unlink(name, dir_fd=self._files.temporary)

    def _start(self, number: int) -> None:
        files = self._files
        descriptors = (self._root, files.blobs, files.trees, files.temporary)
        program = f"import sys; sys.path[:] = {sys.path!r}; from kiln.castore.ingest_worker import main; main()"
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # A worker that fails has its jobs done again here, where the error is seen.
            pass_fds=descriptors,
        )
        ownership = (self._ownership.take_over, self._ownership.adopt)
        setup = (*descriptors, f"{self._prefix}{number}-", self._scheme.name, tuple(self._needles), *ownership)
        thread = Thread(target=self._serve, args=(process, setup), daemon=True)
        self._processes.append(process)
        self._threads.append(thread)
        thread.start()

    def _serve(self, process: subprocess.Popen[bytes], setup: tuple[Any, ...]) -> None:
        """Feed one worker until there is nothing left, or it dies: then its job goes back."""
        assert process.stdin is not None
        assert process.stdout is not None
        job: _Job | None = None
        with process.stdout as replies, suppress(OSError), process.stdin as orders:
            try:
                _send(orders, setup)
                while (job := self._take()) is not None:
                    _send(orders, job.parts)
                    walked, error = _result(_receive(replies))
                    with self._changed:
                        job.walked, job.error = walked, error
                        self._changed.notify_all()
            except (OSError, EOFError):
                if job is not None:
                    with self._changed:
                        self._queue.appendleft(job)
                        self._changed.notify_all()

    def _take(self) -> _Job | None:
        with self._changed:
            while not self._queue and not self._closed:
                self._changed.wait()
            return None if self._closed else self._queue.popleft()


def main() -> None:
    """A worker: set-up, then jobs until the end of input."""
    orders, replies = sys.stdin.buffer, sys.stdout.buffer
    root, blobs, trees, temporary, prefix, scheme, needles, take_over, adopt = _receive(orders)
    scanner = RefScanner(needles) if needles else None
    files = StoreFiles(blobs, trees, temporary, prefix)
    walker = Walker(files, SCHEMES[scheme], scanner, Ownership(take_over=take_over, adopt=adopt), alone=False)
    while True:
        try:
            parts = _receive(orders)
        except EOFError:
            return
        try:
            walked = walker.walk_directory(os.open(b".", DIRECTORY, dir_fd=root), parts)
        except (IngestRefused, IngestChanged, IngestDenied) as error:
            _send(replies, (type(error).__name__, vars(error)))
        except OSError as error:
            _send(replies, ("OSError", (error.errno, error.strerror)))
        else:
            assert isinstance(walked.node, DirectoryNode)
            node = (walked.node.digest.raw, walked.node.size)
            _send(replies, ("", (node, walked.directories, walked.needles, walked.bytes, walked.files)))


def _result(reply: tuple[str, Any]) -> tuple[Walked | None, Exception | None]:
    kind, value = reply
    if not kind:
        (digest, size), *rest = value
        return Walked(DirectoryNode(Digest(digest), size), *rest), None
    return None, OSError(*value) if kind == "OSError" else _ERRORS[kind](**value)


def _send(stream: IO[bytes], message: Any) -> None:
    data = marshal.dumps(message)
    stream.write(len(data).to_bytes(8, "little") + data)
    stream.flush()


def _receive(stream: IO[bytes]) -> Any:
    """Raises EOFError at the end."""
    length = stream.read(8)
    data = stream.read(int.from_bytes(length, "little"))
    if len(length) < 8:
        raise EOFError
    return marshal.loads(data)  # noqa: S302 - From our own process, over a pipe of ours.
