import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_the_api_example_does_what_it_says(store: Path) -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLES / "api.py", store, "quiet", "words"], capture_output=True, check=False, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "QUIET WORDS\n"
    assert "log: b'at work\\n'" in done.stderr
