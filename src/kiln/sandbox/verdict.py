"""From how a command ended to why the build failed, if it did (pure)."""

import signal

from kiln.build.events import ExitDetail, Failure, LimitDetail, Reason, Retry
from kiln.sandbox.cgroups import GroupUsage
from kiln.sandbox.policy import Limits
from kiln.sandbox.supervise import Ending

_START_FAILED = ((b"bwrap: execvp ", ""), (b"bwrap: Can't chdir to ", "its working directory "))
_UNITS = ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))
_HINTS = {
    "memory": "raise it with --memory",
    "processes": "the policy's --max-processes sets it",
    "disk": "the policy's --max-disk sets it",
    "log": "the policy's --max-log sets it",
    "wall": "raise it with --timeout",
    "silence": "raise it with --silence-timeout",
}


def readable_bytes(count: int) -> str:
    """`count` in the largest unit that it reaches."""
    for size, unit in _UNITS:
        if count >= size:
            return f"{count / size:.1f}".removesuffix(".0") + f" {unit}"
    return f"{count} bytes"


def readable_seconds(milliseconds: int) -> str:
    """A time limit as one would say it."""
    return f"{milliseconds / 1000:g} s"


def failure_of(ending: Ending, group: GroupUsage, limits: Limits) -> Failure | None:
    """Why the command's end is a failure, or None where it is a success."""
    if (stop := ending.stopped) is not None:
        return _stopped(ending, stop.what, stop.limit, stop.peak)
    code = ending.ended.exit_code
    if code == 0:
        return None
    if group.oom_kills:
        return _exhausted(ending, "memory", limits.memory_bytes, group.memory_peak or limits.memory_bytes)
    if group.fork_refusals:
        return _exhausted(ending, "processes", limits.processes, group.processes_peak or limits.processes)
    if code is None:  # Asked only now: a group out of memory may have lost its runtime, too.
        return _never_ran(ending)
    number = code - 128 if code > 128 and code - 128 in set(signal.Signals) else 0
    if number == signal.SIGXFSZ:
        return _exhausted(ending, "disk", limits.disk_bytes, limits.disk_bytes)
    message = f"the command exited with code {code}"
    if number:
        # A runtime reports a command that a signal ended as a shell would: the two cannot be told apart.
        message += f" ({signal.Signals(number).name})"
    return Failure(
        Reason.COMMAND_FAILED,
        message,
        detail=ExitDetail(code=code, signal=number),
        log_tail=ending.log_tail,
    )


def _stopped(ending: Ending, what: str, limit: int, peak: int) -> Failure:
    if what in {"wall", "silence"}:
        said = "ran longer than" if what == "wall" else "wrote nothing for"
        message = f"the command {said} its limit of {readable_seconds(limit)}; {_HINTS[what]}"
        detail = LimitDetail(what, limit, peak)
        return Failure(Reason.TIMED_OUT, message, Retry.MORE_RESOURCES, detail, ending.log_tail)
    return _exhausted(ending, what, limit, peak)


def _exhausted(ending: Ending, what: str, limit: int, peak: int) -> Failure:
    amount = str(limit) if what == "processes" else readable_bytes(limit)
    return Failure(
        Reason.RESOURCES_EXHAUSTED,
        f"the build reached its {what} limit of {amount}; {_HINTS[what]}",
        Retry.MORE_RESOURCES,
        LimitDetail(what, limit, peak),
        ending.log_tail,
    )


def _never_ran(ending: Ending) -> Failure:
    """The runtime ended without saying how the command did: where it did not run, the log has the runtime's words."""
    words = ending.log_tail.strip()
    last = words.rpartition(b"\n")[2]
    said = last.decode(errors="replace")
    for words_of_runtime, what in _START_FAILED:
        if last.startswith(words_of_runtime):
            return Failure(
                Reason.COMMAND_FAILED,
                f"the command could not be started: {what}{said.removeprefix(words_of_runtime.decode())}",
                detail=ExitDetail(code=127),
                log_tail=ending.log_tail,
            )
    status = ending.ended.status
    how = f"ended with status {status} before the command ran" if status >= 0 else f"was killed by signal {-status}"
    return Failure(
        Reason.INFRASTRUCTURE,
        f"the runtime {how}" + (f": {said}" if said else ""),
        Retry.ELSEWHERE,
        log_tail=ending.log_tail,
    )
