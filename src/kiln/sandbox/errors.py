"""What can go wrong with a sandbox, apart from the build in it."""

from kiln.errors import NotFound, Precondition, Unavailable


class LaunchFailed(Unavailable):
    """The runtime did not come up: in its own words, or the launcher's."""


class LauncherGone(Unavailable):
    """The launcher process ended; every build that it had started was killed with it."""

    def __init__(self) -> None:
        super().__init__("the launcher process ended unexpectedly, and with it every running build")


class RuntimeMissing(Precondition):
    """A program that a builder needs is not installed."""


class UidsExhausted(Unavailable):
    """All host uids of the range are in use."""


class ShellMissing(Precondition):
    """No static shell was found on the host."""

    def __init__(self) -> None:
        super().__init__("there is no static shell here: install busybox-static, or name one with --shell")


class BuildNotKept(NotFound):
    """Nothing of the build is on disk any more, or somebody is in it already."""

    def __init__(self, build_id: str) -> None:
        super().__init__(
            f"nothing of build {build_id} is kept: only failed builds are, for a time, and one shell at a time enters"
        )
        self.build_id = build_id
