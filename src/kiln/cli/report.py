"""The verdict of a build, for people and as JSON."""

from collections.abc import Sequence

from kiln.build.events import Event, Failure, Finished, MissingDetail, Reason, Sample, Success, UnmetDetail
from kiln.build.model import BuildRequest
from kiln.build.wire_json import entry_to_json, event_to_json, failure_to_json
from kiln.cli import exits
from kiln.cli.nodes import node_text
from kiln.cli.sanitize import one_line
from kiln.cli.settings import Settings
from kiln.cli.units import shown_size, shown_time

# No command was started: there is no log, and nothing is kept.
_NEVER_RAN = frozenset({Reason.INVALID_REQUEST, Reason.MISSING_INPUT, Reason.UNSATISFIABLE, Reason.DENIED})
_LISTED = 10  # Of what a failure is about, and then "and N more".


def result_json(build_id: str, request: BuildRequest, finished: Finished) -> dict[str, object]:
    """What `run --json` prints; `needles` are indexes into the request's, as in a BuildResponse."""
    result: dict[str, object] = {"build_id": build_id}
    match finished.verdict:
        case Success(outputs, cached):
            result["cached"] = cached is not None
            result["outputs"] = [
                {
                    "path": path,
                    "node": entry_to_json(b"", output.node),
                    "needles": list(output.needles),
                }
                for path, output in zip(request.outputs, outputs, strict=True)
            ]
        case Failure() as failure:
            result["cached"] = False
            result["failure"] = failure_to_json(failure)
    result["usage"] = event_to_json(Event(build_id, 0, 0.0, 0, 0, Sample(finished.usage)))["sample"]
    return result


def result_lines(request: BuildRequest, success: Success) -> list[str]:
    """What `run` prints: each output's path and node."""
    return [
        f"{one_line(path)}\t{node_text(output.node)}"
        for path, output in zip(request.outputs, success.outputs, strict=True)
    ]


def verdict_lines(build_id: str, finished: Finished, tail: Sequence[str], settings: Settings) -> list[str]:
    """How it ended, in sentences; after a failure also why, the end of the log, and how to go on."""
    match finished.verdict:
        case Success(cached=hit) if hit is not None:
            origin = one_line(hit.origin_build_id)
            return [f"kiln: build {build_id} succeeded, answered from the cache (made by build {origin})"]
        case Success():
            usage = finished.usage
            measured = [f"{shown_time(usage.wall_s)}"]
            if usage.memory_peak:
                measured.append(f"{shown_size(usage.memory_peak)} of memory at most")
            return [f"kiln: build {build_id} succeeded in {', '.join(measured)}"]
        case Failure(reason=Reason.CANCELLED, message=message):
            return [f"kiln: build {build_id} ended early: {one_line(message)}"]
        case Failure() as failure:
            reason = failure.reason.name.lower()
            lines = [f"kiln: build {build_id} failed ({reason}): {one_line(failure.message)}"]
            lines += [f"  {one_line(line)}" for line in _details(failure)]
            if tail:
                lines.append(
                    f"the last {len(tail)} lines of its log:" if len(tail) > 1 else "the last line of its log:"
                )
                lines += [f"  | {line}" for line in tail]
            if failure.reason not in _NEVER_RAN:
                words = ["log", "shell"] if settings.builds_here else ["log"]
                lines += ["to go on:", *(f"  {settings.command(word)} {build_id}" for word in words)]
            return lines
    raise AssertionError(finished.verdict)


def _details(failure: Failure) -> list[str]:
    lines: list[str] = []
    match failure.detail:
        case MissingDetail(blobs, directories, more):
            listed = [f"missing blob {digest}" for digest in blobs]
            listed += [f"missing directory {digest}" for digest in directories]
            lines += listed[:_LISTED]
            if len(listed) > _LISTED or more:
                lines.append(f"and {max(len(listed) - _LISTED, 0) or 'some'} more")
        case UnmetDetail(refusals) if len(refusals) > 1:  # The message has said what one wants.
            lines += [f"{no.worker}: {no.constraint}: wanted {no.wanted}, has {no.has}" for no in refusals[:_LISTED]]
    if failure.near:
        rest = f" and {len(failure.near) - _LISTED} more" if len(failure.near) > _LISTED else ""
        lines.append(f"near it: {', '.join(failure.near[:_LISTED])}{rest}")
    return lines


def exit_of(finished: Finished) -> int:
    """The exit code for a build that ended so."""
    if isinstance(finished.verdict, Failure):
        return exits.exit_of_failure(finished.verdict.reason)
    return exits.OK
