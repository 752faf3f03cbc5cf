"""A builder that speaks only DoBuild of `snix.build.v1`, such as a real Snix.

It knows no options, sends no log and builds from its own castore: inputs are copied there, outputs back.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import grpc
import grpc.aio

from kiln.aio import Emit, streaming
from kiln.build.events import (
    Assigned,
    BuilderInfo,
    BuildEvent,
    Failure,
    Finished,
    LimitDetail,
    MissingDetail,
    Notice,
    Output,
    Phase,
    PhaseKind,
    Reason,
    Retry,
    Success,
)
from kiln.build.model import BuildOptions, BuildRequest
from kiln.build.service import BuildService, Capabilities
from kiln.build.unary_status import failure_in
from kiln.build.wire import from_response, to_request
from kiln.castore.castore import Castore
from kiln.castore.closure import copy_closure
from kiln.castore.errors import ContentMissing
from kiln.errors import Corrupt
from kiln.protos.snix.build.protos import build_pb2
from kiln.protos.snix.build.protos.rpc_build_pb2_grpc import BuildServiceStub
from kiln.rpc.channel import Peer
from kiln.rpc.status import error_of

# The texts of a Snix, which has INTERNAL for all failures. Seen on the wire.
_COMMAND_FAILED = "nonzero exit code"
_OUTPUT_MISSING = "Not all outputs produced"


class AnswerInvalid(Corrupt):
    """A builder answered with other outputs than it was asked for."""

    def __init__(self, url: str, *, found: int, wanted: int) -> None:
        super().__init__(f"the builder at {url} answered with {found} outputs for {wanted}")
        self.url = url


class GrpcUnary(BuildService):
    """The builder at a peer, for nodes of the castore `near`; `far` is the peer's own."""

    def __init__(self, peer: Peer, *, near: Castore, far: Castore) -> None:
        self._peer = peer
        self._stub = BuildServiceStub(peer.channel)
        self._near = near
        self._far = far
        self._info = BuilderInfo(
            worker=peer.url, url=peer.url, weaker={"contract": "it does not say what its builds get to see"}
        )

    async def capabilities(self) -> Capabilities:
        return Capabilities(builders=(self._info,), castore_scheme=self._near.scheme.name)

    @asynccontextmanager
    async def build(self, request: BuildRequest, options: BuildOptions) -> AsyncIterator[AsyncIterator[BuildEvent]]:
        async def produce(emit: Emit[BuildEvent]) -> None:
            await emit(Assigned(self._info))
            await emit(Notice("NO_LOG", "the builder speaks snix.build.v1 only: it sends no log and takes no limits"))
            await emit(Phase(PhaseKind.FETCH))
            try:
                await copy_closure([node for _, node in request.inputs], self._near, self._far)
            except ContentMissing as missing:
                detail = MissingDetail(tuple(sorted(missing.blobs)), tuple(sorted(missing.directories)))
                await emit(Finished(Failure(Reason.MISSING_INPUT, str(missing), Retry.AFTER_UPLOAD, detail)))
                return
            await emit(Phase(PhaseKind.RUN))
            try:
                outputs = await self._do_build(request, options)
            except grpc.aio.AioRpcError as error:
                await emit(Finished(_failure(error, options, url=self._peer.url)))
                return
            await emit(Phase(PhaseKind.UPLOAD))
            await copy_closure([output.node for output in outputs], self._far, self._near)
            await emit(Finished(Success(outputs, why_not="the builder does not say what its builds get to see")))

        async with streaming(produce, capacity=16) as events:
            yield events

    async def _do_build(self, request: BuildRequest, options: BuildOptions) -> tuple[Output, ...]:
        """The outputs, in the order of the request. Cancelled, it ends the call. Raises AioRpcError."""
        paths = sorted(request.outputs)  # A Snix refuses any other order.
        asked = to_request(replace(request, outputs=tuple(paths)))
        answer: build_pb2.BuildResponse = await self._stub.DoBuild(asked, timeout=options.wall_s)
        found = from_response(answer)
        if len(found) != len(paths):
            raise AnswerInvalid(self._peer.url, found=len(found), wanted=len(paths))
        by_path = dict(zip(paths, found, strict=True))
        return tuple(by_path[path] for path in request.outputs)


def _failure(error: grpc.aio.AioRpcError, options: BuildOptions, *, url: str) -> Failure:
    """What a status of DoBuild says: the failure in its details, or what can be made of code and text."""
    for name, value in error.trailing_metadata() or ():
        if name == "grpc-status-details-bin" and isinstance(value, bytes) and (failure := failure_in(value)):
            return failure
    text = error.details() or error.code().name
    said = f"the builder says: {text}"
    match error.code():
        case grpc.StatusCode.DEADLINE_EXCEEDED if options.wall_s is not None:
            limit = LimitDetail("wall", round(options.wall_s * 1000), 0)
            return Failure(Reason.TIMED_OUT, f"it took longer than {options.wall_s:g} s", detail=limit)
        case grpc.StatusCode.INVALID_ARGUMENT:
            return Failure(Reason.INVALID_REQUEST, said)
        case grpc.StatusCode.PERMISSION_DENIED | grpc.StatusCode.UNAUTHENTICATED:
            return Failure(Reason.DENIED, said)
        case grpc.StatusCode.INTERNAL if _COMMAND_FAILED in text:
            return Failure(Reason.COMMAND_FAILED, said)
        case grpc.StatusCode.INTERNAL if _OUTPUT_MISSING in text:
            return Failure(Reason.OUTPUT_MISSING, said)
        case _:
            return Failure(Reason.INFRASTRUCTURE, str(error_of(error, url=url)), Retry.ELSEWHERE)
