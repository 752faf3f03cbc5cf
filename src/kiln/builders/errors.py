"""What can be wrong with a call to a host of builds."""

from kiln.errors import Exhausted, Invalid, NotFound, OutOfRange, Precondition, Unavailable


class BuildNotFound(NotFound):
    """No build of this id, or none whose id begins so."""

    def __init__(self, build_id: str) -> None:
        super().__init__(f"no build {build_id!r}; `kiln builds` lists them")
        self.build_id = build_id


class BuildAmbiguous(Invalid):
    """Several builds' ids begin so."""

    def __init__(self, prefix: str) -> None:
        super().__init__(f"several builds begin with {prefix!r}: give more of the id")
        self.prefix = prefix


class BeyondHead(OutOfRange):
    """A position after the last event, or after the last byte of the log."""

    def __init__(self, what: str, *, asked: int, head: int) -> None:
        super().__init__(f"{what} {asked} is beyond the end: there are {head} so far")
        self.head = head


class PageInvalid(Invalid):
    """A page's name that no list gave."""

    def __init__(self, page: str) -> None:
        super().__init__(f"no page {page!r}: pass on `next_page` of the list before as it is")
        self.page = page


class RunsElsewhere(Precondition):
    """The build belongs to another process with the same store."""

    def __init__(self, build_id: str) -> None:
        super().__init__(f"build {build_id} runs in another kiln process: cancel it there")
        self.build_id = build_id


class OwnerGone(Unavailable):
    """The process that ran a build died, and nobody has cleaned up after it yet."""

    def __init__(self, build_id: str) -> None:
        super().__init__(f"the process that ran build {build_id} ended; the next one that builds here cleans up")
        self.build_id = build_id


class BuilderBroken(Unavailable):
    """A builder broke its contract."""


class HostClosing(Unavailable):
    """No new builds: the host is about to end."""

    def __init__(self) -> None:
        super().__init__("this kiln is shutting down and takes no new builds")


class QueueFull(Exhausted):
    """As many builds wait or run as the host takes."""

    def __init__(self, builds_max: int) -> None:
        super().__init__(f"{builds_max} builds wait or run here, which is all this kiln takes: submit again later")
        self.builds_max = builds_max
