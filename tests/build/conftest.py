import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.fixture(scope="session")
def golden() -> Callable[[str], list[dict[str, Any]]]:
    """The cases of a file of vectors that real peers made."""

    def cases(name: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads((GOLDEN / name).read_text())["cases"]
        return found

    return cases
