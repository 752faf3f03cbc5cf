import pytest

from kiln.build.events import Reason
from kiln.castore.errors import StoreFull, StoreReadOnly
from kiln.cli.exits import exit_of_error, exit_of_failure
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

# As the design has them.
REASONS = {
    "invalid_request": 3,
    "missing_input": 4,
    "unsatisfiable": 4,
    "denied": 4,
    "command_failed": 1,
    "output_missing": 1,
    "output_invalid": 1,
    "timed_out": 1,
    "resources_exhausted": 1,
    "cancelled": 130,
    "infrastructure": 5,
    "unspecified": 5,
}


def test_each_reason_has_its_exit_code() -> None:
    assert {reason.name.lower(): exit_of_failure(reason) for reason in Reason} == REASONS


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (Usage("u"), 2),
        (Invalid("i"), 3),
        (NotFound("n"), 4),
        (Precondition("p"), 4),
        (OutOfRange("o"), 4),
        (Denied("d"), 4),
        (Exhausted("e"), 5),
        (Corrupt("c"), 5),
        (Unavailable("u"), 5),
        (KilnError("k"), 5),
        (StoreReadOnly("/s", "read-only"), 5),
        (StoreFull("/s", "full"), 5),
    ],
)
def test_each_kind_has_its_exit_code(error: KilnError, code: int) -> None:
    assert exit_of_error(error) == code
