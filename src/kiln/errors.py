"""The kinds of trouble kiln itself can have, by what the caller can do about each.

A failed build is not among them: it is a result (`kiln.build.events.Failure`). Every leaf class has exactly
one of these kinds as its ancestor, so that one table maps errors to gRPC statuses (`kiln.rpc.status`) and one to
exit codes (`kiln.cli.exits`).
"""


class KilnError(Exception):
    """Base of every error kiln raises on purpose. Its text is a sentence for a person."""


class Invalid(KilnError):
    """A value breaks a rule of its format: the same call can never succeed."""


class Usage(KilnError):
    """A URL, option or configuration that kiln does not know: the person who typed it has to change it."""


class NotFound(KilnError):
    """The named thing is not there."""


class Precondition(KilnError):
    """The call is fine, the state is not: change that first (an upload, another store) and call again."""


class OutOfRange(KilnError):
    """A position lies beyond what is kept."""


class Denied(KilnError):
    """The operator's policy, or the operating system, forbids it."""


class Exhausted(KilnError):
    """A limit is reached: disk, size, number."""


class Corrupt(KilnError):
    """Stored or received bytes are not what they claim to be."""


class Unavailable(KilnError):
    """The other side is not there, or went away: safe to try again, or elsewhere."""
