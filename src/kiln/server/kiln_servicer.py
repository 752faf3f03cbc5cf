"""`kiln.build.v1` over a host of builds: decode, call, encode; errors become statuses in `kiln.rpc.status`."""

import dataclasses
from collections.abc import Awaitable, Callable

import grpc
import grpc.aio
from google.protobuf.message import Message

from kiln.aio import closing
from kiln.build.errors import RequestInvalid
from kiln.build.service import BuildHost
from kiln.build.unary_status import invalid_request
from kiln.build.validate import check_outputs_sorted
from kiln.build.wire_events import to_event
from kiln.build.wire_host import to_build_info, to_capabilities
from kiln.build.wire_submission import from_submission
from kiln.castore.model import Digest
from kiln.errors import Precondition
from kiln.protos.kiln.build.v1 import build_pb2
from kiln.rpc.channel import MESSAGE_BYTES_MAX
from kiln.server.messages import Context, parsed, refuse, send

_PAGE_MAX = 1000  # Builds in a ListReply. The last event of a failed one has up to 8 KiB of its log.


class FeatureUnknown(Precondition):
    """A submission needs what this server does not have."""

    def __init__(self, names: tuple[str, ...], *, known: tuple[str, ...]) -> None:
        wanted, listed = ", ".join(map(repr, names)), ", ".join(known) or "none"
        super().__init__(f"the submission must be understood as to {wanted}; the features of this server: {listed}")
        self.names = names


def kiln_handlers(host: BuildHost, *, strict: bool) -> grpc.GenericRpcHandler:
    """The service. `strict`: as Snix does, refuse outputs that are out of order."""
    servicer = KilnBuildServicer(host, strict=strict)

    def answering(method: Callable[[bytes], Awaitable[Message]]) -> "grpc.RpcMethodHandler[bytes, bytes]":
        async def answer(data: bytes, _context: Context) -> bytes:
            return (await method(data)).SerializeToString()

        return grpc.unary_unary_rpc_method_handler(answer)

    return grpc.method_handlers_generic_handler(
        "kiln.build.v1.BuildService",
        {
            "Capabilities": answering(servicer.capabilities),
            "Build": grpc.unary_stream_rpc_method_handler(servicer.build),
            "Watch": grpc.unary_stream_rpc_method_handler(servicer.watch),
            "ReadLog": grpc.unary_stream_rpc_method_handler(servicer.read_log),
            "Cancel": answering(servicer.cancel),
            "Get": answering(servicer.get),
            "List": answering(servicer.list),
            "FindMissing": answering(servicer.find_missing),
        },
    )


class KilnBuildServicer:
    """kiln.build.v1.BuildService.

    Streams are written, not yielded: a client that goes away then ends the watching here and now, not when a
    generator happens to be collected.
    """

    def __init__(self, host: BuildHost, *, strict: bool) -> None:
        self._host = host
        self._strict = strict

    async def capabilities(self, _data: bytes) -> build_pb2.CapabilitiesReply:
        """What can be asked here, and how large a message may be."""
        capabilities = await self._host.capabilities()
        return to_capabilities(dataclasses.replace(capabilities, message_bytes_max=MESSAGE_BYTES_MAX))

    async def build(self, data: bytes, context: Context) -> None:
        """Submit, then as `watch` from the beginning. An invalid request is refused as by DoBuild."""
        message = parsed(build_pb2.Submission, data)
        try:
            submission = from_submission(message)
            if self._strict:
                check_outputs_sorted(submission.request)
        except RequestInvalid as error:
            await refuse(context, invalid_request(error))
        if submission.must_understand:
            known = (await self._host.capabilities()).features
            if unknown := tuple(name for name in submission.must_understand if name not in known):
                raise FeatureUnknown(unknown, known=known)
        build_id = await self._host.submit(submission.request, submission.options, client_token=submission.client_token)
        await self._follow(build_pb2.WatchRequest(build_id=build_id), context)

    async def watch(self, data: bytes, context: Context) -> None:
        """Events after `after_seq`."""
        await self._follow(parsed(build_pb2.WatchRequest, data), context)

    async def read_log(self, data: bytes, context: Context) -> None:
        """The log from `offset` on, in messages as large as the host gives them."""
        asked = parsed(build_pb2.ReadLogRequest, data)
        log = self._host.read_log(asked.build_id, offset=asked.offset, limit=asked.limit or None, follow=asked.follow)
        async with closing(log) as pieces:
            async for offset, piece in pieces:
                await send(context, build_pb2.LogBytes(offset=offset, data=piece))

    async def cancel(self, data: bytes) -> build_pb2.BuildInfo:
        """End a build."""
        asked = parsed(build_pb2.CancelRequest, data)
        info = await self._host.cancel(asked.build_id, by="a client", why=asked.why, force=asked.force)
        return to_build_info(info)

    async def get(self, data: bytes) -> build_pb2.BuildInfo:
        """One build."""
        asked = parsed(build_pb2.GetRequest, data)
        return to_build_info(await self._host.get(asked.build_id, with_request=asked.with_request))

    async def list(self, data: bytes) -> build_pb2.ListReply:
        """A page of builds."""
        asked = parsed(build_pb2.ListRequest, data)
        builds, next_page = await self._host.list(
            labels=dict(asked.labels),
            running_only=asked.running_only,
            limit=min(asked.limit, _PAGE_MAX),
            page=asked.page,
        )
        return build_pb2.ListReply(builds=[to_build_info(info) for info in builds], next_page=next_page)

    async def find_missing(self, data: bytes) -> build_pb2.FindMissingReply:
        """What to upload."""
        asked = parsed(build_pb2.FindMissingRequest, data)
        blobs, directories = await self._host.find_missing(
            blobs=[Digest(digest) for digest in asked.blobs],
            directories=[Digest(digest) for digest in asked.directories],
            closure=asked.closure,
        )
        return build_pb2.FindMissingReply(
            blobs=[digest.raw for digest in sorted(blobs)], directories=[digest.raw for digest in sorted(directories)]
        )

    async def _follow(self, asked: build_pb2.WatchRequest, context: Context) -> None:
        async with self._host.watch(
            asked.build_id,
            after_seq=asked.after_seq,
            without_log=asked.without_log,
            recorded_only=asked.recorded_only,
        ) as events:
            async for event in events:
                await send(context, to_event(event))
