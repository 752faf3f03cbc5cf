"""What the figures were measured on."""

import datetime as dt
import os
import platform
import shutil
import subprocess

from kiln.version import __version__

_POLICIES = {os.SCHED_OTHER: "normal", os.SCHED_FIFO: "real-time (chrt -f)", os.SCHED_RR: "real-time (chrt -r)"}


def facts(*, rounds: int) -> dict[str, str]:
    """Date, versions, machine, load: without these, figures mean nothing."""
    return {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "kiln": __version__,
        "peers": ", ".join(filter(None, map(_version, ("bwrap", "nix-store", "git")))),
        "Python": platform.python_version(),
        "kernel": platform.release().partition("-")[0],
        "machine": f"{_cpu()}, {len(os.sched_getaffinity(0))} CPUs, {_memory_gib()} GiB",
        "scheduling": _POLICIES.get(os.sched_getscheduler(0), "other"),
        "load before": " ".join(f"{load:.1f}" for load in os.getloadavg()),
        "rounds": str(rounds),
    }


def _version(program: str) -> str:
    path = shutil.which(program)
    if path is None:
        return ""
    return subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]


def _cpu() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        for line in lines:
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.machine()


def _memory_gib() -> int:
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / (1 << 30))
