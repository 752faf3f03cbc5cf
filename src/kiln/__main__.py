"""The `kiln` command. `--version` answers before anything of the command line is imported."""

import sys

from kiln.version import __version__


def main() -> int:
    """Run the command line on the process's arguments; returns the exit code."""
    if sys.argv[1:2] == ["--version"]:
        sys.stdout.write(f"kiln {__version__}\n")
        return 0
    try:
        from kiln.cli.main import run  # noqa: PLC0415  Importing click alone takes longer than `--version` may.

        return run(sys.argv[1:])
    except KeyboardInterrupt:  # So early that nothing has begun.
        return 130


if __name__ == "__main__":
    sys.exit(main())
