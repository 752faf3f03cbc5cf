"""The action cache, a wrapper: what a request gave once is given again, as long as all of it is there."""

import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace

from kiln.aio import closing
from kiln.build.cache_key import cache_key
from kiln.build.events import BuildEvent, CacheHit, Event, Finished, Notice, Output, Success, Usage
from kiln.build.model import BuildOptions, BuildRequest, CacheUse
from kiln.build.service import BuildService, Capabilities
from kiln.build.wire_events import decode_event, encode_event
from kiln.castore.castore import Castore
from kiln.castore.closure import missing_of_closure
from kiln.castore.errors import ContentMissing
from kiln.castore.local.store import LocalStore
from kiln.castore.model import Digest, FileNode, Node, Scheme, SymlinkNode
from kiln.errors import Invalid

_VERIFIED_MAX = 100_000


@dataclass(frozen=True, slots=True)
class Keys:
    """What besides the request decides a result's bytes here, and so is part of its key."""

    scheme: Scheme
    shell: Digest | None = None
    salt: str = ""

    def key(self, request: BuildRequest) -> bytes:
        """The key of the request's result."""
        return cache_key(request, scheme=self.scheme, shell=self.shell, salt=self.salt.encode())


class Cached(BuildService):
    """Answers from the store's results, and keeps what is cacheable there.

    A value is the event that ended the first run, with its outputs and needles in the order of the key, so that it
    serves every request of that key.
    """

    def __init__(
        self, inner: BuildService, store: LocalStore, keys: Keys, *, time_s: Callable[[], float] = time.time
    ) -> None:
        self._inner = inner
        self._store = store
        self._keys = keys
        self._time_s = time_s
        self._verified: set[Node] = set()
        """Nodes whose whole closure this process has seen in the store, or put there."""

    async def capabilities(self) -> Capabilities:
        return await self._inner.capabilities()

    @asynccontextmanager
    async def build(self, request: BuildRequest, options: BuildOptions) -> AsyncIterator[AsyncIterator[BuildEvent]]:
        async with AsyncExitStack() as stack:
            if options.cache is CacheUse.BYPASS:
                yield await stack.enter_async_context(self._inner.build(request, options))
            else:
                yield await stack.enter_async_context(closing(self._events(request, options, stack)))

    async def _events(
        self, request: BuildRequest, options: BuildOptions, stack: AsyncExitStack
    ) -> AsyncIterator[BuildEvent]:
        key = self._keys.key(request)
        if options.cache is CacheUse.USE and (kept := await self._look_up(key)) is not None:
            yield _hit(kept, request)
            return
        async for event in await stack.enter_async_context(self._inner.build(request, options)):
            if isinstance(event, Finished) and isinstance(event.verdict, Success) and event.verdict.cacheable:
                made = Event(options.build_id, 1, self._time_s(), 0, 1, _canonical(event, event.verdict, request))
                # Whoever equals us may have been faster.
                kept = await self._look_up(key)
                if kept is None:
                    self._store.results.put(key, encode_event(made))
                    self._remember(event.verdict.outputs)
                elif differing := _differing(kept, made, request):
                    yield _differs(kept, differing)
            yield event

    async def _look_up(self, key: bytes) -> Event | None:
        """What is kept under `key`; None also where some of it is no longer in the store."""
        value = self._store.results.get(key)
        if value is None:
            return None
        try:
            kept = decode_event(value)
        except Invalid:  # Another kiln's, or damaged: made anew.
            return None
        if kept is None or not await self._is_there(_success(kept).outputs):
            return None
        return kept

    async def _is_there(self, outputs: Sequence[Output]) -> bool:
        nodes = [output.node for output in outputs if not isinstance(output.node, SymlinkNode)]
        try:
            await self._store.stage(nodes)
        except ContentMissing:
            return False
        unsure = [node for node in nodes if node not in self._verified]
        if unsure:
            castore = Castore(self._store.blobs, self._store.directories)
            if await missing_of_closure(unsure, castore):
                return False
            self._remember(outputs)
        return True

    def _remember(self, outputs: Sequence[Output]) -> None:
        if len(self._verified) >= _VERIFIED_MAX:
            self._verified.clear()
        self._verified.update(output.node for output in outputs)


def _success(kept: Event) -> Success:
    assert isinstance(kept.body, Finished)
    assert isinstance(kept.body.verdict, Success)
    return kept.body.verdict


def _canonical(finished: Finished, success: Success, request: BuildRequest) -> Finished:
    """The verdict with outputs by path and needles by text, as `cache_key` orders them; without what is one run's."""
    numbers = {needle: number for number, needle in enumerate(sorted(set(request.refscan_needles)))}

    def canonical(output: Output) -> Output:
        found = {numbers[request.refscan_needles[index]] for index in output.needles}
        return replace(output, needles=tuple(sorted(found)))

    by_path = sorted(zip(request.outputs, success.outputs, strict=True), key=lambda pair: pair[0])
    outputs = tuple(canonical(output) for _, output in by_path)
    return replace(finished, verdict=Success(outputs, cacheable=True), log=None, log_truncated=False, spans=())


def _hit(kept: Event, request: BuildRequest) -> Finished:
    """What is kept, in the order of `request`."""
    needles = sorted(set(request.refscan_needles))
    by_path = dict(zip(sorted(request.outputs), _success(kept).outputs, strict=True))

    def asked(output: Output) -> Output:
        found = {needles[number] for number in output.needles}
        return replace(output, needles=tuple(i for i, needle in enumerate(request.refscan_needles) if needle in found))

    outputs = tuple(asked(by_path[path]) for path in request.outputs)
    assert isinstance(kept.body, Finished)
    hit = Success(outputs, cached=CacheHit(kept.build_id, kept.time_s), cacheable=True)
    return Finished(hit, usage=Usage(), builder=kept.body.builder)


def _differing(kept: Event, made: Event, request: BuildRequest) -> dict[str, str]:
    """Output path -> what it was and what it is now."""
    pairs = zip(sorted(request.outputs), _success(kept).outputs, _success(made).outputs, strict=True)
    return {path: f"{_said(was.node)} -> {_said(now.node)}" for path, was, now in pairs if was.node != now.node}


def _said(node: Node) -> str:
    if isinstance(node, SymlinkNode):
        return f"symlink to {node.target!r}"
    return f"{node.digest} (executable)" if isinstance(node, FileNode) and node.executable else str(node.digest)


def _differs(kept: Event, differing: dict[str, str]) -> Notice:
    said = (
        f"the same request gave something else before, in build {kept.build_id}: {', '.join(differing)} differ; "
        "the cache keeps what it has"
    )
    return Notice("CACHE_DIFFERS", said, {"origin": kept.build_id, **differing})
