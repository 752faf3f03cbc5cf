"""What kiln's exit codes mean: the one table for failed builds and for kiln's own errors."""

from collections.abc import Mapping
from types import MappingProxyType

from kiln.build.events import Reason
from kiln.castore.errors import DigestMismatch, StoreReadOnly
from kiln.errors import (
    Corrupt,
    Denied,
    Exhausted,
    Invalid,
    KilnError,
    NotFound,
    OutOfRange,
    Precondition,
    Unavailable,
    Usage,
)

OK = 0
FAILED = 1  # The build failed, or `fsck` found damage, or `doctor` found that builds cannot work.
USAGE = 2
INVALID = 3
REFUSED = 4  # Missing, denied, or not to be had here.
TROUBLE = 5  # Kiln's own, or its store's, or its builder's.
CANCELLED = 130  # 128 + SIGINT, as shells have it.
PIPE_CLOSED = 141  # 128 + SIGPIPE.

_REASONS: Mapping[Reason, int] = MappingProxyType(
    {
        Reason.INVALID_REQUEST: INVALID,
        Reason.MISSING_INPUT: REFUSED,
        Reason.UNSATISFIABLE: REFUSED,
        Reason.DENIED: REFUSED,
        Reason.COMMAND_FAILED: FAILED,
        Reason.OUTPUT_MISSING: FAILED,
        Reason.OUTPUT_INVALID: FAILED,
        Reason.TIMED_OUT: FAILED,
        Reason.RESOURCES_EXHAUSTED: FAILED,
        Reason.CANCELLED: CANCELLED,
        Reason.INFRASTRUCTURE: TROUBLE,
        Reason.UNSPECIFIED: TROUBLE,
    }
)

_KINDS: Mapping[type[KilnError], int] = MappingProxyType(
    {
        StoreReadOnly: TROUBLE,  # A denial, but of the store: another argument would not help.
        Usage: USAGE,
        Invalid: INVALID,
        NotFound: REFUSED,
        Precondition: REFUSED,
        OutOfRange: REFUSED,
        Denied: REFUSED,
        Exhausted: TROUBLE,
        Corrupt: TROUBLE,
        Unavailable: TROUBLE,
        KilnError: TROUBLE,
    }
)


def way_out(error: KilnError) -> str:
    """What to add to the sentence of an error that the command line has a remedy for."""
    if isinstance(error, DigestMismatch):
        return "; `kiln store fsck --repair`, on the host the store is on, drops what is damaged"
    return ""


def exit_of_failure(reason: Reason) -> int:
    """The exit code of a build that failed for `reason`."""
    return _REASONS[reason]


def exit_of_error(error: KilnError) -> int:
    """The exit code for `error`, by its kind."""
    return next(_KINDS[kind] for kind in type(error).__mro__ if kind in _KINDS)
