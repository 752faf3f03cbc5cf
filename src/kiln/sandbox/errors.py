"""What can go wrong with a sandbox, apart from the build in it."""

from kiln.errors import Unavailable, Usage


class LaunchFailed(Unavailable):
    """The runtime did not come up: in its own words, or the launcher's."""


class LauncherGone(Unavailable):
    """The launcher process ended; every build that it had started was killed with it."""

    def __init__(self) -> None:
        super().__init__("the launcher process ended unexpectedly, and with it every running build")


class RuntimeMissing(Usage):
    """A program that a builder needs is not installed."""


class UidsExhausted(Unavailable):
    """All host uids of the range are in use."""
