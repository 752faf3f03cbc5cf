"""What a build says while it runs, in the order it says it; the last word is `Finished` (pure)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from kiln.build.model import BuildOptions
from kiln.castore.model import Digest, FileNode, Node

# UNSPECIFIED is what a newer peer said in a word that this kiln does not know; kiln itself says it only of the phase of
# progress before there is one.


class Stream(Enum):
    """Where log bytes came from. OUTPUT is stdout, and stderr with it unless they are split."""

    UNSPECIFIED = 0
    OUTPUT = 1
    STDERR = 2
    BUILDER = 3


class PhaseKind(Enum):
    """The stretches of one attempt."""

    UNSPECIFIED = 0
    FETCH = 1
    STAGE = 2
    RUN = 3
    CAPTURE = 4
    UPLOAD = 5


class Wait(Enum):
    """What a queued build waits for."""

    UNSPECIFIED = 0
    SLOT = 1
    MEMORY = 2
    WORKER = 3
    MERGED = 4
    QUOTA = 5
    DISK = 6


class Reason(Enum):
    """Why a build failed: the closed list."""

    UNSPECIFIED = 0
    INVALID_REQUEST = 1
    MISSING_INPUT = 2
    UNSATISFIABLE = 3
    COMMAND_FAILED = 4
    OUTPUT_MISSING = 5
    OUTPUT_INVALID = 6
    TIMED_OUT = 7
    RESOURCES_EXHAUSTED = 8
    CANCELLED = 9
    INFRASTRUCTURE = 10
    DENIED = 11


class Retry(Enum):
    """Whether and how trying again makes sense."""

    NEVER = 0
    ELSEWHERE = 1
    MORE_RESOURCES = 2
    AFTER_UPLOAD = 3


@dataclass(frozen=True, slots=True)
class Refusal:
    """One builder's no: what was wanted of it, and what it has."""

    worker: str
    constraint: str
    wanted: str
    has: str


@dataclass(frozen=True, slots=True)
class BuilderInfo:
    """Who runs a build, and how far its isolation falls short of the contract (`weaker`: name -> why)."""

    worker: str = ""
    url: str = ""
    builder_id: str = ""
    version: str = ""
    contract: str = ""
    system: str = ""
    shell_digest: Digest | None = None
    weaker: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Usage:
    """What was measured: seconds, bytes. A figure named in `unmeasured` was not, and stands at 0."""

    wall_s: float = 0.0
    user_s: float = 0.0
    system_s: float = 0.0
    memory: int = 0
    memory_peak: int = 0
    read_bytes: int = 0
    write_bytes: int = 0
    processes_peak: int = 0
    memory_stall_s: float = 0.0
    disk_peak: int = 0
    unmeasured: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Output:
    """One output: its node, the indexes of the needles found in it (ascending), and how much it holds."""

    node: Node
    needles: tuple[int, ...] = ()
    bytes: int = 0
    files: int = 0


# What a failure adds to its sentence; which of them, the reason decides.


@dataclass(frozen=True, slots=True)
class ExitDetail:
    """How the command ended: exit code, or the signal that ended it."""

    code: int = 0
    signal: int = 0
    core: bool = False


@dataclass(frozen=True, slots=True)
class FieldDetail:
    """Which field of the request breaks which rule; `index` is -1 where the field is not a list."""

    path: str
    index: int
    rule: str


@dataclass(frozen=True, slots=True)
class MissingDetail:
    """All content that is not in the castore; `more` where the list was cut."""

    blobs: tuple[Digest, ...] = ()
    directories: tuple[Digest, ...] = ()
    more: bool = False


@dataclass(frozen=True, slots=True)
class UnmetDetail:
    """Each builder's refusals."""

    refusals: tuple[Refusal, ...] = ()


@dataclass(frozen=True, slots=True)
class LimitDetail:
    """The limit that was reached, in bytes, counts or ms.

    `what` is `memory`, `processes`, `disk`, `log`, `wall`, `silence`, or `entries` of an input's tree.
    """

    what: str
    limit: int
    peak: int


@dataclass(frozen=True, slots=True)
class PathDetail:
    """The path the failure is about."""

    path: str


Detail = ExitDetail | FieldDetail | MissingDetail | UnmetDetail | LimitDetail | PathDetail


@dataclass(frozen=True, slots=True)
class Failure:
    """Why there is no result: a reason, a sentence a person can act on, and the facts behind it."""

    reason: Reason
    message: str
    retry: Retry = Retry.NEVER
    detail: Detail | None = None
    log_tail: bytes = b""
    near: tuple[str, ...] = ()
    """What the build made beside a missing output."""


@dataclass(frozen=True, slots=True)
class CacheHit:
    """The build whose result is served again, and when it was made (Unix seconds)."""

    origin_build_id: str
    made_s: float


@dataclass(frozen=True, slots=True)
class Success:
    """All outputs, in the order of the request."""

    outputs: tuple[Output, ...]
    cached: CacheHit | None = None
    cacheable: bool = False
    why_not: str = ""


# Recorded events: numbered and journaled before a follower sees them.


@dataclass(frozen=True, slots=True)
class Accepted:
    """The build exists; always first. `merged_into` is the build whose run it shares."""

    request_digest: bytes = b""
    cache_key: bytes = b""
    merged_into: str = ""
    effective: BuildOptions | None = None
    kept_until_s: float | None = None
    server_epoch: str = ""


@dataclass(frozen=True, slots=True)
class Queued:
    """It waits; said again whenever `wait` changes."""

    wait: Wait
    detail: str = ""
    ahead: int = 0
    refusals: tuple[Refusal, ...] = ()


@dataclass(frozen=True, slots=True)
class Assigned:
    """A builder took it."""

    builder: BuilderInfo
    memory_bytes: int = 0
    emulated: bool = False


@dataclass(frozen=True, slots=True)
class Phase:
    """A phase begins; the next one, or the attempt's end, ends it."""

    kind: PhaseKind


@dataclass(frozen=True, slots=True)
class Log:
    """Bytes the build wrote; `offset` counts all log bytes before them. Cuts are arbitrary."""

    data: bytes
    offset: int
    stream: Stream = Stream.OUTPUT


@dataclass(frozen=True, slots=True)
class OutputReady:
    """Output `index` of the request is captured; promised only once `Finished` says so."""

    index: int
    output: Output


@dataclass(frozen=True, slots=True)
class Notice:
    """Worth knowing, changes no verdict: LOG_TRUNCATED, WEAKER_ISOLATION, SHELL_ATTACHED, CACHE_DIFFERS."""

    kind: str
    text: str
    fields: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class AttemptEnded:
    """An attempt failed for a reason that is not the build's, and another follows."""

    failure: Failure
    next: str = ""


@dataclass(frozen=True, slots=True)
class Cancelling:
    """Somebody asked for its end."""

    by: str
    why: str = ""


@dataclass(frozen=True, slots=True)
class PhaseSpan:
    """When a phase began and ended, in microseconds since `Accepted`."""

    kind: PhaseKind
    from_us: int
    to_us: int


@dataclass(frozen=True, slots=True)
class Finished:
    """The verdict: exactly one, always last."""

    verdict: Success | Failure
    usage: Usage = field(default_factory=Usage)
    builder: BuilderInfo | None = None
    log: FileNode | None = None
    log_truncated: bool = False
    spans: tuple[PhaseSpan, ...] = ()


# Passing events: unnumbered, conflated for the slow, never replayed.


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a phase is."""

    kind: PhaseKind
    done_bytes: int = 0
    total_bytes: int = 0
    done: int = 0
    total: int = 0
    ahead: int = 0


@dataclass(frozen=True, slots=True)
class Sample:
    """What the running build uses now."""

    usage: Usage


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """The stream is alive; how much there is to be had."""

    head_seq: int
    log_size: int


RecordedEvent = Accepted | Queued | Assigned | Phase | Log | OutputReady | Notice | AttemptEnded | Cancelling | Finished
PassingEvent = Progress | Sample | Heartbeat
BuildEvent = RecordedEvent | PassingEvent


@dataclass(frozen=True, slots=True)
class Event:
    """A build event as its followers get it.

    `seq` counts recorded events from 1 without gaps, over attempts and restarts; passing events have 0. `time_s` is
    Unix time, `elapsed_us` counts from `Accepted`.
    """

    build_id: str
    seq: int
    time_s: float
    elapsed_us: int
    attempt: int
    body: BuildEvent
