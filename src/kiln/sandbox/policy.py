"""What the operator allows, and what a build gets of it: limits are never absent (pure)."""

from dataclasses import dataclass, replace

from kiln.build.model import BuildOptions, BuildRequest

MIB = 1 << 20
GIB = 1 << 30

# What a sandbox needs before its command has any memory of its own; the kernel cannot start a process in less.
MEMORY_BYTES_LEAST = 8 * MIB


@dataclass(frozen=True, slots=True)
class Policy:
    """The operator's word: what a request may ask for at all, and the most a build may use."""

    allow_network: bool = False
    allowed_paths: tuple[str, ...] = ()
    """Absolute host paths a request may list in `available_ro_paths`; each allows what is below it, too."""
    allow_user_namespaces: bool = False
    slots: int = 1
    memory_bytes: int = GIB
    """For all builds together."""
    processes: int = 4096
    disk_bytes: int = 20 * GIB
    log_bytes: int = 64 * MIB
    wall_s: float = 6 * 3600.0
    silence_s: float | None = None
    keep_on_failure_s: float = 24 * 3600.0
    kept_bytes: int = 10 * GIB
    """Kept scratch of failed builds beyond this is removed, oldest first."""
    cpus: int = 1
    salt: str = ""
    """Part of every cache key: another salt, another cache."""

    def allows_path(self, path: str) -> bool:
        """Whether a build may see the host's `path`."""
        return any(path == allowed or path.startswith(allowed.rstrip("/") + "/") for allowed in self.allowed_paths)


@dataclass(frozen=True, slots=True)
class Limits:
    """What one build may use; seconds, bytes, counts. `cpu_millis` 0: all CPUs."""

    wall_s: float
    silence_s: float | None
    memory_bytes: int
    processes: int
    disk_bytes: int
    log_bytes: int
    cpu_millis: int = 0


def limits_of(request: BuildRequest, options: BuildOptions, policy: Policy) -> Limits:
    """The limits of one build: what was asked for, within the policy's maxima, which hold where nobody asked.

    `--memory N` is request and limit at once. A request that needs more than a slot's share gets what it needs.
    """
    share = policy.memory_bytes // max(policy.slots, 1)
    memory = options.memory_bytes or max(share, request.constraints.min_memory)
    silence = options.silence_s or policy.silence_s
    return Limits(
        wall_s=min(options.wall_s or policy.wall_s, policy.wall_s),
        silence_s=silence,
        memory_bytes=max(min(memory, policy.memory_bytes), MEMORY_BYTES_LEAST),
        processes=min(options.processes or policy.processes, policy.processes),
        disk_bytes=min(options.disk_bytes or policy.disk_bytes, policy.disk_bytes),
        log_bytes=min(options.log_bytes or policy.log_bytes, policy.log_bytes),
        cpu_millis=min(options.cpu_millis, policy.cpus * 1000),
    )


def maxima_of(policy: Policy) -> BuildOptions:
    """The policy's maxima, in the shape in which `Capabilities` announces them."""
    return replace(
        BuildOptions(),
        wall_s=policy.wall_s,
        silence_s=policy.silence_s,
        memory_bytes=policy.memory_bytes,
        cpu_millis=policy.cpus * 1000,
        processes=policy.processes,
        disk_bytes=policy.disk_bytes,
        log_bytes=policy.log_bytes,
    )
