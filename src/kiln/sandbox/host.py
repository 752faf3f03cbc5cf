"""What this host is and can do, found out once: systems, memory, CPUs, control groups, a way to the network."""

import contextlib
import os
import platform
import socket
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field

from kiln.sandbox import cgroups
from kiln.sandbox.network import NetworkHelper, find_network_helper
from kiln.sandbox.plan import Network

_CA_BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt",  # Debian, Alpine, Arch
    "/etc/pki/tls/certs/ca-bundle.crt",  # Fedora
    "/etc/ssl/ca-bundle.pem",  # openSUSE
)
_CA_BUNDLE_INSIDE = "etc/ssl/certs/ca-certificates.crt"
_RUNS_32_BIT = {"x86_64": "i686-linux"}
_BINFMT = "/proc/sys/fs/binfmt_misc"


@dataclass(frozen=True, slots=True)
class Host:
    """The host as builders see it. `systems[0]` is its own."""

    name: str
    systems: tuple[str, ...]
    memory_bytes: int
    cpu_numbers: tuple[int, ...]
    hierarchies: cgroups.Hierarchies
    network_helper: NetworkHelper | None
    weaker: Mapping[str, str] = field(default_factory=dict)

    @property
    def network(self) -> Network:
        """What a build gets that may have the network."""
        return Network.PRIVATE if self.network_helper else Network.HOST

    def network_files(self) -> tuple[tuple[str, bytes], ...]:
        """How to resolve names and whom to trust, for a build with the network."""
        found = []
        if self.network_helper:
            found.append(("etc/resolv.conf", self.network_helper.resolv_conf))
        else:
            with contextlib.suppress(OSError), open("/etc/resolv.conf", "rb") as file:
                found.append(("etc/resolv.conf", file.read()))
        for bundle in _CA_BUNDLES:
            with contextlib.suppress(OSError), open(bundle, "rb") as file:
                found.append((_CA_BUNDLE_INSIDE, file.read()))
                break
        return tuple(found)

    def cpus(self, millis: int) -> tuple[int, ...]:
        """The CPUs a build limited to `millis` thousandths may run on; empty: all."""
        if not millis:
            return ()
        return self.cpu_numbers[: max(1, -(-millis // 1000))]

    @staticmethod
    def is_device(path: str) -> bool:
        """Whether `path` is a device node."""
        with contextlib.suppress(OSError):
            mode = os.stat(path).st_mode
            return stat.S_ISCHR(mode) or stat.S_ISBLK(mode)
        return False


def detect_host() -> Host:
    """Look at the host."""
    machine = platform.machine()
    systems = [f"{machine}-linux"]
    if machine in _RUNS_32_BIT and _runs_i386():
        systems.append(_RUNS_32_BIT[machine])
    hierarchies = cgroups.detect()
    weaker = {}
    missing = {"memory", "processes"} - hierarchies.enforced
    if missing:
        weaker["limits"] = f"no control group for {' and '.join(sorted(missing))}: limits hold for each process alone"
    if foreign := _emulators():
        weaker["foreign-binaries"] = f"binfmt_misc runs them here ({', '.join(foreign)})"
    return Host(
        name=socket.gethostname(),
        systems=tuple(systems),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        cpu_numbers=tuple(sorted(os.sched_getaffinity(0))),
        hierarchies=hierarchies,
        network_helper=find_network_helper(),
        weaker=weaker,
    )


def _emulators() -> list[str]:
    """Enabled binfmt_misc entries that work in any mount namespace (flag F)."""
    found = []
    with contextlib.suppress(OSError):
        for name in sorted(os.listdir(_BINFMT)):
            if name in {"register", "status"}:
                continue
            with open(f"{_BINFMT}/{name}", encoding="utf-8", errors="replace") as entry:
                text = entry.read()
            flags = next((line.partition(":")[2] for line in text.splitlines() if line.startswith("flags")), "")
            if text.startswith("enabled") and "F" in flags:
                found.append(name)
    return found


# The smallest i386 program: mov eax, 1 (exit); xor ebx, ebx; int 0x80. ELF32 header and one program header before it.
_EXIT_I386 = bytes.fromhex(
    "7f454c4601010100000000000000000002000300010000005480040834000000000000000000000034002000010000000000000001000000"
    "0000000000800408008004085d0000005d0000000500000000100000b80100000031dbcd80"
)


def _runs_i386() -> bool:
    """Whether the kernel executes i386 programs: tried, for kernels say so nowhere."""
    descriptor = os.memfd_create("i386", 0)
    try:
        os.write(descriptor, _EXIT_I386)
        try:
            process = os.posix_spawn(f"/proc/self/fd/{descriptor}", ["i386"], {})
        except OSError:
            return False
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    finally:
        os.close(descriptor)
