"""DoBuild of `snix.build.v1` and `tvix.build.v1`: a fold over the events of a host's build.

The call is the only interest in its build: a client that goes away cancels it. The build's id is in the initial
metadata, so that others can watch it meanwhile. A failure rides in the status details.
"""

import grpc
import grpc.aio

from kiln.build.errors import RequestInvalid
from kiln.build.events import Failure, Finished, Success
from kiln.build.model import BuildOptions, BuildRequest
from kiln.build.service import BuildHost
from kiln.build.unary_status import invalid_request
from kiln.build.validate import check_outputs_sorted
from kiln.build.wire import from_request, to_response
from kiln.build.wire_tvix import from_tvix_request, to_build
from kiln.castore.model import BLAKE3_DOCUMENTED, BLAKE3_DOUBLED, Scheme
from kiln.errors import Unavailable
from kiln.protos.snix.build.protos import build_pb2
from kiln.protos.tvix.build.protos import build_pb2 as tvix_build_pb2
from kiln.server.messages import Context, parsed, refuse, send_build_id


class NoVerdict(Unavailable):
    """A build's events ended early."""

    def __init__(self, build_id: str) -> None:
        super().__init__(f"the events of build {build_id} ended without a verdict")
        self.build_id = build_id


def unary_handlers(host: BuildHost, scheme: Scheme, *, strict: bool) -> tuple[grpc.GenericRpcHandler, ...]:
    """The service that goes with a castore of `scheme`; none where no protocol does.

    `strict`: as Snix does, refuse outputs that are out of order. Its own client sends them so.
    """
    if scheme is BLAKE3_DOUBLED:
        package, do_build = "snix.build.v1", SnixBuildServicer(host, strict=strict).do_build
    elif scheme is BLAKE3_DOCUMENTED:
        package, do_build = "tvix.build.v1", TvixBuildServicer(host, strict=strict).do_build
    else:
        return ()
    methods: dict[str, grpc.RpcMethodHandler[bytes, bytes]]
    methods = {"DoBuild": grpc.unary_unary_rpc_method_handler(do_build)}
    return (grpc.method_handlers_generic_handler(f"{package}.BuildService", methods),)


class SnixBuildServicer:
    """snix.build.v1.BuildService."""

    def __init__(self, host: BuildHost, *, strict: bool) -> None:
        self._host = host
        self._strict = strict

    async def do_build(self, data: bytes, context: Context) -> bytes:
        """The outputs, in the order of the request."""
        message = parsed(build_pb2.BuildRequest, data)
        try:
            request = from_request(message)
            if self._strict:
                check_outputs_sorted(request)
        except RequestInvalid as error:
            await refuse(context, invalid_request(error))
        success = await _built(self._host, request, context)
        return to_response(success.outputs).SerializeToString()


class TvixBuildServicer:
    """tvix.build.v1.BuildService."""

    def __init__(self, host: BuildHost, *, strict: bool) -> None:
        self._host = host
        self._strict = strict

    async def do_build(self, data: bytes, context: Context) -> bytes:
        """The request as it came, and the outputs by name."""
        message = parsed(tvix_build_pb2.BuildRequest, data)
        try:
            request = from_tvix_request(message)
            if self._strict:
                check_outputs_sorted(request)
        except RequestInvalid as error:
            await refuse(context, invalid_request(error))
        success = await _built(self._host, request, context)
        return to_build(message, request, success.outputs).SerializeToString()


async def _built(host: BuildHost, request: BuildRequest, context: Context) -> Success:
    """The build's success; a failure ends the call."""
    build_id = await host.submit(request, BuildOptions(cancel_on_disconnect=True))
    async with host.watch(build_id, without_log=True) as events:
        await send_build_id(context, build_id)
        async for event in events:
            match event.body:
                case Finished(Success() as success):
                    return success
                case Finished(Failure() as failure):
                    await refuse(context, failure)
    raise NoVerdict(build_id)
