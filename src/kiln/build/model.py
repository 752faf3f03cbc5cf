"""What a build is: the request, its constraints, and the options of one run of it (pure)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from kiln.build.validate import check_request
from kiln.castore.model import Node

CONTRACT = "kiln-contract-1"  # What a build gets to see; a change of it is another version.


@dataclass(frozen=True, slots=True)
class Constraints:
    """What the build needs of its host. `system` is Nix's name of a platform; None where nobody asked."""

    system: str | None = None
    min_memory: int = 0
    """Bytes the host must be able to give."""
    available_ro_paths: tuple[str, ...] = ()
    """Absolute host paths that must be visible inside, read-only."""
    network_access: bool = False
    provide_bin_sh: bool = False


@dataclass(frozen=True, slots=True)
class BuildRequest:
    """One build, valid by construction: breaking a rule raises `RequestInvalid`, which names field, index and rule.

    Paths are relative to the build's root unless they say otherwise. Strings are UTF-8 on the wire; names of inputs,
    values of environment variables and contents of files are any bytes.
    """

    inputs: tuple[tuple[bytes, Node], ...] = ()
    command: tuple[str, ...] = ()
    working_dir: str = ""
    scratch_paths: tuple[str, ...] = ()
    inputs_dir: str = ""
    outputs: tuple[str, ...] = ()
    environment: tuple[tuple[str, bytes], ...] = ()
    additional_files: tuple[tuple[str, bytes], ...] = ()
    refscan_needles: tuple[str, ...] = ()
    constraints: Constraints = field(default_factory=Constraints)

    def __post_init__(self) -> None:
        check_request(self)


class CacheUse(Enum):
    """USE looks and stores; REFRESH runs, compares and stores; BYPASS does neither and is never merged."""

    USE = 0
    REFRESH = 1
    BYPASS = 2


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """How one run of a request is to go. Options can make a build fail, never alter what a success contains.

    0 or None leaves the choice to the builder's policy, whose maxima hold in any case.
    """

    wall_s: float | None = None
    silence_s: float | None = None
    memory_bytes: int = 0
    cpu_millis: int = 0
    processes: int = 0
    disk_bytes: int = 0
    log_bytes: int = 0
    priority: int = 0
    cache: CacheUse = CacheUse.USE
    cancel_on_disconnect: bool = False
    disconnect_grace_s: float = 0.0
    keep_on_failure_s: float | None = None
    """How long a failed build's scratch is kept; None: the policy's default, 0: not at all."""
    split_stderr: bool = False
    attempts: int = 0
    prefer_local: bool = False
    sample_every_s: float = 0.0
    build_id: str = ""
    """Given by whoever records the build; empty: the backend makes one up. Not on the wire."""
    labels: Mapping[str, str] = field(default_factory=dict)
