"""The options of `kiln run` -> a BuildRequest (pure)."""

from collections.abc import Iterable
from dataclasses import dataclass

from kiln.build.model import BuildRequest, Constraints
from kiln.build.validate import is_clean
from kiln.castore.model import Node

WORKING_DIR = "build"


@dataclass(frozen=True, slots=True)
class Asked:
    """What was asked for, as it stands on the command line."""

    command: tuple[str, ...]
    inputs: tuple[tuple[bytes, Node], ...] = ()
    outputs: tuple[str, ...] = ()
    environment: tuple[tuple[str, bytes], ...] = ()
    scratch: tuple[str, ...] = ()
    inputs_dir: str = "inputs"
    shell: bool = False
    network: bool = False
    paths: tuple[str, ...] = ()
    memory: int = 0


def request_of(asked: Asked, system: str) -> BuildRequest:
    """The request for `system`. Lists are put in the order that the protocol wants, outputs left in theirs.

    Raises RequestInvalid.
    """
    environment = list(asked.environment)
    if all(name != "HOME" for name, _ in environment):
        environment.append(("HOME", f"/{WORKING_DIR}".encode()))
    return BuildRequest(
        inputs=tuple(sorted(asked.inputs, key=lambda item: item[0])),
        command=asked.command,
        working_dir=WORKING_DIR,
        scratch_paths=tuple(sorted({WORKING_DIR, *asked.scratch, *_parents(asked.outputs)})),
        inputs_dir=asked.inputs_dir,
        outputs=asked.outputs,
        environment=tuple(sorted(environment, key=lambda variable: variable[0])),
        constraints=Constraints(
            system=system,
            min_memory=asked.memory,
            available_ro_paths=tuple(sorted(asked.paths)),
            network_access=asked.network,
            provide_bin_sh=asked.shell,
        ),
    )


def _parents(outputs: Iterable[str]) -> Iterable[str]:
    """What has to be writable for `outputs`. A path that is none is left to the request to refuse, under its name."""
    for path in outputs:
        if path and is_clean(path) and "\0" not in path:
            yield path.rpartition("/")[0] or path
