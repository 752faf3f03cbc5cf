"""A host of builds in another process or on another machine, over `kiln.build.v1`.

Its castore is at the same URL (castore.v1), and has to be of the same scheme as the store that brings inputs and takes
results. A peer that does not know `kiln.build.v1` answers UNIMPLEMENTED, as a Snix does. It is then used by DoBuild of
`snix.build.v1`, as a mere builder (`kiln.builders.grpc_unary`) under a host of our own, so that ids and events are kept
here.
"""

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from types import MappingProxyType, TracebackType
from typing import Self

from kiln.aio import closing
from kiln.build.events import Event, Finished, Log
from kiln.build.model import CONTRACT, BuildOptions, BuildRequest
from kiln.build.service import BuildHost, BuildInfo, Capabilities
from kiln.build.wire_events import from_event
from kiln.build.wire_host import from_build_info, from_capabilities
from kiln.build.wire_submission import Submission, to_submission
from kiln.builders.cached import Keys
from kiln.builders.errors import HostClosing
from kiln.builders.grpc_unary import GrpcUnary
from kiln.builders.host import Host
from kiln.castore.blobs.grpc import GrpcBlobs
from kiln.castore.blobs.verified import VerifiedBlobs
from kiln.castore.castore import Castore
from kiln.castore.directories.grpc import GrpcDirectories
from kiln.castore.local.store import LocalStore
from kiln.castore.model import BLAKE3_DOUBLED, Digest
from kiln.errors import Precondition, Unavailable
from kiln.protos.kiln.build.v1 import build_pb2
from kiln.protos.kiln.build.v1.build_pb2_grpc import BuildServiceStub
from kiln.rpc.calls import ask, receive
from kiln.rpc.channel import Peer, connected
from kiln.rpc.status import PeerFailed, PeerLacksMethod, PeerStalled, PeerUnreachable
from kiln.rpc.url import Url

_SILENCE_S = 45.0  # Of a watched build, which has to be heard of each 15 s.
_PAUSE_MIN_S, _PAUSE_MAX_S = 0.1, 2.0
_UNWATCHED_MAX = 100


class CastoreDiffers(Precondition):
    """A host builds from a castore of another scheme than the store here."""

    def __init__(self, url: str, *, has: str, wanted: str) -> None:
        super().__init__(f"the server at {url} has a castore of scheme {has}, the store here is {wanted}: use another")
        self.url = url


class ContractDiffers(Precondition):
    """What builds get to see there is not what they get to see here."""

    def __init__(self, url: str, contract: str) -> None:
        super().__init__(f"the server at {url} builds under {contract}, this kiln under {CONTRACT}: use equal versions")
        self.url = url


@asynccontextmanager
async def connected_host(url: Url, store: LocalStore) -> AsyncIterator[tuple[BuildHost, Castore | None]]:
    """The host at `url`, and the castore it builds from; None where it builds from `store`.

    Raises PeerUnreachable, CastoreDiffers, ContractDiffers.
    """
    async with connected(url) as peer, AsyncExitStack() as stack:
        host = await stack.enter_async_context(GrpcHost(peer))
        try:
            capabilities = await host.capabilities()
        except PeerLacksMethod:
            if store.scheme is not BLAKE3_DOUBLED:
                raise
            builder = GrpcUnary(peer, near=Castore(store.blobs, store.directories), far=_castore(peer, store))
            yield await stack.enter_async_context(Host(builder, store, Keys(store.scheme))), None
            return
        if capabilities.castore_scheme != store.scheme.name:
            raise CastoreDiffers(url.text, has=capabilities.castore_scheme, wanted=store.scheme.name)
        for builder_info in capabilities.builders:
            if builder_info.contract not in {"", CONTRACT}:  # None where nothing is ever built.
                raise ContractDiffers(url.text, builder_info.contract)
        yield host, _castore(peer, store)


def _castore(peer: Peer, store: LocalStore) -> Castore:
    return Castore(VerifiedBlobs(GrpcBlobs(peer, store.scheme)), GrpcDirectories(peer, store.scheme))


class GrpcHost(BuildHost):
    """The builds of a peer. Who follows one survives broken connections, and the peer's restart.

    Use it as a context manager; leaving it lets go of all builds.
    """

    def __init__(
        self, peer: Peer, *, patience_s: float = 30.0, new_token: Callable[[], str] = lambda: secrets.token_hex(16)
    ) -> None:
        """`patience_s`: how long a peer that went away may take to come back."""
        self._peer = peer
        self._watched = replace(peer, stall_s=min(_SILENCE_S, peer.stall_s))
        self._stub = BuildServiceStub(peer.channel)
        self._patience_s = patience_s
        self._new_token = new_token
        self._unwatched: dict[str, _Submitted] = {}
        """What nobody watches yet, by the build's id."""
        self._closing = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._unwatched:
            await self._let_go(next(iter(self._unwatched)))

    async def submit(self, request: BuildRequest, options: BuildOptions, *, client_token: str = "") -> str:
        if self._closing:
            raise HostClosing
        # A token of our own where there is none: whether a submission arrived whose answer did not, nobody knows.
        message = to_submission(Submission(request, options, client_token or self._new_token()))
        patience = _Patience(self._patience_s)
        while True:
            events = receive(self._watched, self._stub.Build, message)
            try:
                accepted = await anext(events)
            except StopAsyncIteration:
                raise Unavailable(f"the server at {self._peer.url} accepted a build without a word") from None
            except Unavailable as error:
                await patience.pause_after(error)
            else:
                break
        await self._let_go(accepted.build_id)
        submitted = _Submitted(accepted, events)
        # Were nobody left for a moment, a build that is to end with its followers would.
        if options.cancel_on_disconnect or len(self._unwatched) < _UNWATCHED_MAX:
            self._unwatched[accepted.build_id] = submitted
        else:
            await submitted.close()
        return accepted.build_id

    @asynccontextmanager
    async def watch(
        self, build_id: str, *, after_seq: int = 0, without_log: bool = False, recorded_only: bool = False
    ) -> AsyncIterator[AsyncIterator[Event]]:
        submitted = self._unwatched.pop(build_id, None)
        async with AsyncExitStack() as stack:
            if submitted is not None:
                stack.push_async_callback(submitted.close)
            events = self._events(build_id, after_seq, submitted, without_log=without_log)
            await stack.enter_async_context(closing(events))
            yield (event async for event in events if event.seq or not recorded_only)

    async def read_log(
        self, build_id: str, *, offset: int = 0, limit: int | None = None, follow: bool = False
    ) -> AsyncIterator[tuple[int, bytes]]:
        peer = replace(self._peer, stall_s=float("inf")) if follow else self._peer  # A log may be silent for hours.
        patience = _Patience(self._patience_s)
        while limit is None or limit > 0:
            asked = build_pb2.ReadLogRequest(build_id=build_id, offset=offset, limit=limit or 0, follow=follow)
            try:
                async with closing(receive(peer, self._stub.ReadLog, asked)) as messages:
                    async for message in messages:
                        patience.renew()
                        yield message.offset, message.data
                        offset = message.offset + len(message.data)
                        limit = None if limit is None else limit - len(message.data)
            except Unavailable as error:
                await patience.pause_after(error)
            else:
                return

    async def cancel(self, build_id: str, *, by: str, why: str = "", force: bool = False) -> BuildInfo:
        asked = build_pb2.CancelRequest(build_id=build_id, why=why or by, force=force)
        return from_build_info(await ask(self._peer, self._stub.Cancel, asked))

    async def get(self, build_id: str, *, with_request: bool = False) -> BuildInfo:
        asked = build_pb2.GetRequest(build_id=build_id, with_request=with_request)
        return from_build_info(await ask(self._peer, self._stub.Get, asked))

    async def list(
        self,
        *,
        labels: Mapping[str, str] = MappingProxyType({}),
        running_only: bool = False,
        limit: int = 0,
        page: str = "",
    ) -> tuple[tuple[BuildInfo, ...], str]:
        asked = build_pb2.ListRequest(labels=labels, running_only=running_only, limit=limit, page=page)
        reply = await ask(self._peer, self._stub.List, asked)
        return tuple(from_build_info(info) for info in reply.builds), reply.next_page

    async def find_missing(
        self, *, blobs: Iterable[Digest], directories: Iterable[Digest], closure: bool = False
    ) -> tuple[frozenset[Digest], frozenset[Digest]]:
        asked = build_pb2.FindMissingRequest(
            blobs=[digest.raw for digest in blobs],
            directories=[digest.raw for digest in directories],
            closure=closure,
        )
        reply = await ask(self._peer, self._stub.FindMissing, asked)
        return frozenset(map(Digest, reply.blobs)), frozenset(map(Digest, reply.directories))

    async def capabilities(self) -> Capabilities:
        return from_capabilities(await ask(self._peer, self._stub.Capabilities, build_pb2.CapabilitiesRequest()))

    async def close(self, *, cancel: bool, why: str = "") -> None:
        """Submit no more. The builds there are belong to the peer; with `cancel`, those nobody watches are let go."""
        del why
        self._closing = True
        while cancel and self._unwatched:
            await self._let_go(next(iter(self._unwatched)))

    async def _let_go(self, build_id: str) -> None:
        if submitted := self._unwatched.pop(build_id, None):
            await submitted.close()

    async def _events(
        self, build_id: str, after_seq: int, submitted: "_Submitted | None", *, without_log: bool
    ) -> AsyncIterator[Event]:
        """Events after `after_seq`, over as many streams as it takes, the first of them `submitted`."""
        patience = _Patience(self._patience_s)
        messages = None if submitted is None else submitted.all()
        while True:
            if messages is None:
                # Passing events too: among them are the heartbeats that tell a quiet build from a dead peer.
                asked = build_pb2.WatchRequest(build_id=build_id, after_seq=after_seq, without_log=without_log)
                messages = receive(self._watched, self._stub.Watch, asked)
            try:
                async with closing(messages):
                    async for message in messages:
                        patience.renew()
                        event = from_event(message)
                        if message.seq and message.seq <= after_seq:
                            continue
                        after_seq = max(after_seq, message.seq)
                        if event is None or (without_log and isinstance(event.body, Log)):
                            continue
                        yield event
                        if isinstance(event.body, Finished):
                            return
            except Unavailable as error:
                await patience.pause_after(error)
            else:
                return
            messages = None


class _Submitted:
    """The stream that came with a submission."""

    def __init__(self, accepted: build_pb2.Event, rest: AsyncIterator[build_pb2.Event]) -> None:
        self._accepted = accepted
        self._rest = rest

    async def all(self) -> AsyncIterator[build_pb2.Event]:
        """Its events."""
        yield self._accepted
        async for event in self._rest:
            yield event

    async def close(self) -> None:
        """End the call."""
        async with closing(self._rest):
            pass


class _Patience:
    """How often a peer that went away is tried again: at growing intervals, for so long since it last said a word."""

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._since: float | None = None
        self._pause_s = _PAUSE_MIN_S

    def renew(self) -> None:
        """The peer said something."""
        self._since = None
        self._pause_s = _PAUSE_MIN_S

    async def pause_after(self, error: Unavailable) -> None:
        """Wait before the next try; raise `error` where none makes sense any more."""
        is_gone = isinstance(error, PeerUnreachable | PeerStalled)
        was_dropped = isinstance(error, PeerFailed) and error.code.name == "CANCELLED"  # As by a server that stops.
        now = asyncio.get_running_loop().time()
        if self._since is None:
            self._since = now
        if not (is_gone or was_dropped) or now + self._pause_s > self._since + self._patience_s:
            raise error
        await asyncio.sleep(self._pause_s)
        self._pause_s = min(2 * self._pause_s, _PAUSE_MAX_S)
