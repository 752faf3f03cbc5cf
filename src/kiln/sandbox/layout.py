"""What a sandbox has in builds/<id>/, the directory of one build on the host: its scratch."""

import contextlib
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from kiln.castore.dirfd import DIRECTORY, Descent, visit
from kiln.sandbox.errors import LaunchFailed
from kiln.sandbox.plan import TMP, HostDirectory, RootPlan
from kiln.sandbox.uids import Identity


@dataclass(frozen=True, slots=True)
class Located:
    """Where an output is on the host; or, where `path` is None, why it is nowhere, and what lies near it."""

    path: str | None
    problem: str = ""
    near: tuple[str, ...] = ()


class Layout:
    """builds/<id>/ of a build whose plan is known."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self._scratch: dict[str, str] = {}

    def prepare(self, plan: RootPlan, identity: Identity | None) -> None:
        """Make the scratch directories with all that has to be in them; owned by `identity`, or by us."""
        os.mkdir(f"{self.directory}/scratch", 0o700)
        for number, root in enumerate(plan.scratch):
            path = f"{self.directory}/scratch/{number}"
            self._scratch[root.root] = path
            self._make(path, 0o1777 if root.root == TMP else 0o755, identity)
            self._fill(root, path, identity)

    def reopen(self, plan: RootPlan, identity: Identity | None) -> None:
        """Take up what an earlier run with the same plan left. Now all of it, mount points too, is `identity`'s.

        Raises LaunchFailed where the build left something else in the place of a mount point.
        """
        for number, root in enumerate(plan.scratch):
            path = f"{self.directory}/scratch/{number}"
            self._scratch[root.root] = path
            if identity is not None:
                _give(path, identity.uid)
            for target, is_directory in root.mount_points:
                try:
                    _make_mount_point(path, os.fsencode(target[len(root.root) + 1 :]), is_directory=is_directory)
                except OSError as error:
                    raise LaunchFailed(f"the build left no place for /{target}: {error.strerror}") from error

    def _fill(self, root: HostDirectory, path: str, identity: Identity | None) -> None:
        def on_host(inside: str) -> str:
            return path + inside[len(root.root) :]

        for directory in root.directories:
            self._make(on_host(directory), 0o755, identity)
        for target, is_directory in root.mount_points:
            if is_directory:
                os.mkdir(on_host(target), 0o755)
            else:
                os.close(os.open(on_host(target), os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o444))
        for link in root.links:
            os.symlink(link.target, on_host(link.path))
        for file in root.files:
            descriptor = os.open(on_host(file.path), os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "wb") as opened:
                opened.write(file.contents)
                os.fchmod(descriptor, file.mode)
                if identity is not None:
                    os.fchown(descriptor, identity.uid, identity.uid)

    @staticmethod
    def _make(path: str, mode: int, identity: Identity | None) -> None:
        os.mkdir(path, mode)
        os.chmod(path, mode)  # What mkdir makes of it depends on our umask.
        if identity is not None:
            os.chown(path, identity.uid, identity.uid)

    def protect_inputs(self, inputs_dir: str, identity: Identity | None) -> None:
        """Where inputs stand in scratch: new names can be made beside them, theirs cannot be taken away."""
        path = self.host_path(inputs_dir)
        if path is not None and identity is not None:
            os.chown(path, 0, 0)
            os.chmod(path, 0o1777)  # noqa: S103  # As every store in a sandbox: sticky, below a directory of ours.

    def keep(self, *, until_s: float) -> None:
        """Mark the directory as a kept failure, to be removed after `until_s` (Unix seconds)."""
        with open(f"{self.directory}/kept", "w", encoding="ascii") as file:
            file.write(f"{until_s:.0f}\n")

    def host_path(self, inside: str) -> str | None:
        """The host's path of what is at `inside` in the sandbox; None if that is in no scratch."""
        for root, path in self._scratch.items():
            if inside == root or inside.startswith(root + "/"):
                return path + inside[len(root) :]
        return None

    @property
    def scratch(self) -> dict[str, str]:
        """Scratch path -> host directory."""
        return dict(self._scratch)

    def uncover(self, plan: RootPlan, outputs: tuple[str, ...]) -> None:
        """Remove from `outputs` the mount points that were made for the plan's mounts: no part of any result."""
        for root in plan.scratch:
            for target, is_directory in root.mount_points:
                if any(target.startswith(output + "/") for output in outputs):
                    path = self.host_path(target)
                    assert path is not None
                    with contextlib.suppress(OSError):  # The build may have moved it; then it is what it made of it.
                        (os.rmdir if is_directory else os.unlink)(path)

    def locate(self, output: str) -> Located:
        """Find an output that the build should have made, following nothing on the way."""
        path = self.host_path(output)
        assert path is not None, "an output outside scratch is refused with the request"
        root = next(r for r in self._scratch if output == r or output.startswith(r + "/"))
        current, walked = self._scratch[root], root
        parts = [part for part in output[len(root) :].split("/") if part]
        for part in parts:
            try:
                names = sorted(os.listdir(current))
            except OSError:
                names = []
            try:
                found = os.lstat(f"{current}/{part}")
            except OSError:
                return Located(
                    None,
                    f"{output} was not made: nothing is at /{output}",
                    tuple(f"{walked}/{name}" for name in names[:16]),
                )
            current, walked = f"{current}/{part}", f"{walked}/{part}"
            if walked != output and not stat.S_ISDIR(found.st_mode):
                return Located(None, f"{output} was not made: {walked} is no directory")
        return Located(current)

    def disk_bytes(self, processes: Iterable[int]) -> int:
        """What all of scratch occupies now, with what `processes` hold open there and have unlinked."""
        named = sum(occupied_bytes(path) for path in self._scratch.values())
        return named + _unlinked_bytes(processes, os.stat(self.directory).st_dev)


def occupied_bytes(root: str) -> int:
    """Bytes on disk of everything below `root`, each inode once; what vanishes meanwhile counts nothing."""
    total, seen = 0, set()
    for _, entries in _visited(root):
        for _, status in entries:
            if status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode):
                if status.st_ino in seen:
                    continue
                seen.add(status.st_ino)
            total += status.st_blocks * 512
    return total


def _unlinked_bytes(processes: Iterable[int], device: int) -> int:
    """Bytes on `device` of files without a name that `processes` have open, each inode once."""
    total, seen = 0, set()
    for process in processes:
        with contextlib.suppress(OSError), os.scandir(f"/proc/{process}/fd") as descriptors:
            for descriptor in descriptors:
                with contextlib.suppress(OSError):
                    status = descriptor.stat()
                    if not status.st_nlink and status.st_dev == device and status.st_ino not in seen:
                        seen.add(status.st_ino)
                        total += status.st_blocks * 512
    return total


def _make_mount_point(root: str, path: bytes, *, is_directory: bool) -> None:
    """Make what is missing on the way to `path` below `root`, and it; a build was here, so nothing is followed."""
    *parents, name = path.split(b"/")
    with Descent(os.open(root, DIRECTORY)) as descent:
        for parent in parents:
            with contextlib.suppress(FileExistsError):
                os.mkdir(parent, 0o755, dir_fd=descent.descriptor)
            descent.enter(parent)
        with contextlib.suppress(FileExistsError):
            if is_directory:
                os.mkdir(name, 0o755, dir_fd=descent.descriptor)
            else:
                flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
                os.close(os.open(name, flags, 0o444, dir_fd=descent.descriptor))


def _give(root: str, uid: int) -> None:
    """Make everything below `root` belong to `uid`, following nothing."""
    for descriptor, entries in _visited(root):
        os.fchown(descriptor, uid, uid)
        for name, status in entries:
            if not stat.S_ISDIR(status.st_mode):
                os.chown(name, uid, uid, dir_fd=descriptor, follow_symlinks=False)


def _visited(root: str) -> Iterator[tuple[int, list[tuple[str, os.stat_result]]]]:
    try:
        descriptor = os.open(root, DIRECTORY)
    except PermissionError:
        return  # Rootless, it is one user's, and a build can close it to us; as it can what is in it.
    try:
        yield from visit(descriptor)
    finally:
        os.close(descriptor)
