"""What one root leaves behind for the next."""

import os

import pytest

from kiln.sandbox.complete_root import complete_root


def test_a_step_that_fails_is_named_and_leaves_the_umask_as_it_was() -> None:
    before = os.umask(0o027)
    try:
        with pytest.raises(OSError, match="cannot make remove /nothing"):
            complete_root([["remove", "nothing"]], os.geteuid(), os.getegid())
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
