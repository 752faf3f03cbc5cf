"""What an operator decides about building, as frozen values."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BuilderConfig:
    """A builder by URL, and the policy of one that runs here. None leaves a figure to the host or to the default."""

    url: str = "bwrap://"
    allow_network: bool = False
    allowed_paths: tuple[str, ...] = ()
    allow_user_namespaces: bool = False
    slots: int | None = None
    memory_bytes: int | None = None
    disk_bytes: int | None = None
    log_bytes: int | None = None
    processes: int | None = None
    wall_s: float | None = None
    uid_range: tuple[int, int] | None = None
    shell: str | None = None
    salt: str = ""
