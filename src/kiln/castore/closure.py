"""Trees of directories: their order, what one put brings and relies on, what is missing, copies between stores."""

from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

from kiln.aio import closing, each
from kiln.castore.castore import Castore
from kiln.castore.directory_service import DirectoryService
from kiln.castore.errors import (
    ContentMissing,
    DigestMismatch,
    DirectoryInvalid,
    DirectoryNotFound,
    SchemeDiffers,
)
from kiln.castore.model import Digest, Directory, DirectoryNode, FileNode, Node, Scheme
from kiln.castore.wire import encode_directory

_SIZE_MAX = 2**64 - 1  # DirectoryEntry.size is a uint64.
_ASKED_AT_ONCE = 1000  # Digests in one question: 32 kB, so that no message grows with the tree.
_CALLS_AT_ONCE = 8


def children(directory: Directory) -> dict[Digest, int]:
    """The directories right below, and the size stated for each. Raises DirectoryInvalid where two sizes are."""
    found: dict[Digest, int] = {}
    for _, node in directory:
        if isinstance(node, DirectoryNode) and found.setdefault(node.digest, node.size) != node.size:
            raise DirectoryInvalid(f"it states two sizes for {node.digest}")
    return found


async def breadth_first(
    root: Digest, get: Callable[[Digest], Awaitable[Directory]]
) -> AsyncIterator[tuple[Digest, Directory]]:
    """`root` and all below it as `DirectoryService.closure` orders them, each fetched by `get`."""
    seen = {root}
    ahead = deque([root])
    while ahead:
        digest = ahead.popleft()
        directory = await get(digest)
        yield digest, directory
        for child in children(directory):
            if child not in seen:
                seen.add(child)
                ahead.append(child)


def children_first(directories: Mapping[Digest, Directory], roots: Iterable[Digest]) -> dict[Digest, Directory]:
    """Those of `directories` that are `roots` or below them, each after all that it refers to."""
    ordered: dict[Digest, Directory] = {}
    for root in roots:
        # By hand and not by recursion: trees are deeper than Python's stack.
        stack = [(root, False)]
        while stack:
            digest, below_done = stack.pop()
            if digest in ordered or digest not in directories:
                continue
            if below_done:
                ordered[digest] = directories[digest]
            else:
                stack.append((digest, True))
                stack.extend((child, False) for child in children(directories[digest]))
    return ordered


@dataclass(slots=True)
class Arrivals:
    """Checks a closure as it arrives: its root first, each directory announced by an earlier one with its true size."""

    scheme: Scheme
    root: Digest
    outstanding: dict[Digest, int | None] = field(init=False)
    """Announced and not there yet, in the order announced, with the size stated."""
    _seen: set[Digest] = field(init=False)

    def __post_init__(self) -> None:
        self.outstanding = {self.root: None}
        self._seen = {self.root}

    def expect(self, digest: Digest) -> None:
        """Raise DigestMismatch where nobody announced `digest`, or it came already."""
        if digest not in self.outstanding:
            wanted = next(iter(self.outstanding), self.root)
            raise DigestMismatch(wanted=wanted, found=digest, what="directory")

    def take(self, digest: Digest, directory: Directory) -> None:
        """`directory`, whose contents have `digest`, is next. Raises as `expect`, or DirectoryInvalid for its size."""
        self.expect(digest)
        stated = self.outstanding.pop(digest)
        if stated is not None:
            check_size(digest, stated=stated, sizes=self.scheme.sizes_of(directory))
        for child, size in children(directory).items():
            if child not in self._seen:
                self._seen.add(child)
                self.outstanding[child] = size

    def check_complete(self) -> None:
        """Raise DirectoryNotFound, naming the first, where something announced never came."""
        for digest in self.outstanding:
            raise DirectoryNotFound(digest)


@dataclass(frozen=True, slots=True)
class Batch:
    """What one put brings, and what it takes for stored already."""

    root: Digest
    given: Sequence[Directory]
    """In their order, the root last, also where it came before."""
    directories: Mapping[Digest, Directory]
    relied_on: Mapping[Digest, int]
    """The size stated for each directory that is referred to and not brought."""


def batch_of(directories: Iterable[Directory], scheme: Scheme) -> Batch:
    """The directories of one put, checked as far as they can be without the store. Raises DirectoryInvalid."""
    brought: dict[Digest, Directory] = {}
    sizes: dict[Digest, range] = {}
    relied_on: dict[Digest, int] = {}
    root = None
    given = tuple(directories)
    for directory in given:
        root = scheme.digest_of(encode_directory(directory))
        if root in brought:
            continue
        for child, stated in children(directory).items():
            if child in sizes:
                check_size(child, stated=stated, sizes=sizes[child])
            elif relied_on.setdefault(child, stated) != stated:
                raise DirectoryInvalid(f"two sizes are stated for {child}")
        sizes[root] = sizes_of(root, directory, scheme)
        brought[root] = directory
    if root is None:
        raise DirectoryInvalid("there is none")
    if late := relied_on.keys() & brought.keys():
        raise DirectoryInvalid(f"{min(late)} comes after a directory that refers to it")
    return Batch(root, given, brought, relied_on)


def sizes_of(digest: Digest, directory: Directory, scheme: Scheme) -> range:
    """The sizes that may be stated for `directory`, whose digest is given. Raises DirectoryInvalid beyond 64 bits."""
    sizes = scheme.sizes_of(directory)
    if sizes[-1] > _SIZE_MAX:
        raise DirectoryInvalid(f"the size of {digest} does not fit 64 bits")
    return sizes


def check_size(digest: Digest, *, stated: int, sizes: range | None) -> None:
    """Raise DirectoryInvalid unless `digest`, which a parent refers to, is there (has sizes) and one of them stated."""
    if sizes is None:
        raise DirectoryInvalid(f"it refers to {digest}, which is neither brought before it nor stored")
    if stated not in sizes:
        raise DirectoryInvalid(f"wrong size {stated} for {digest}: it is {sizes[-1]}")


@dataclass(frozen=True, slots=True)
class Missing:
    """What a store lacks. Falsy where it lacks nothing."""

    blobs: frozenset[Digest] = frozenset()
    directories: frozenset[Digest] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.blobs or self.directories)


@dataclass(slots=True)
class _Survey:
    """One walk over the closures of some nodes, level by level: all that they refer to."""

    directories: dict[Digest, Directory] = field(default_factory=dict)
    blobs: set[Digest] = field(default_factory=set)
    absent: set[Digest] = field(default_factory=set)

    async def walk(self, nodes: Iterable[Node], service: DirectoryService) -> None:
        """Read what `service` has of the directories; those it lacks become `absent`."""
        level = self._new(nodes)
        while level:
            found = await each(partial(_get, service), level, at_once=_CALLS_AT_ONCE)
            self.directories.update((digest, directory) for digest, directory in found if directory is not None)
            self.absent.update(digest for digest, directory in found if directory is None)
            level = self._new(node for _, directory in found if directory is not None for _, node in directory)

    def _new(self, nodes: Iterable[Node]) -> list[Digest]:
        """The directories among `nodes` that were not met yet, each once; notes the files."""
        new: dict[Digest, None] = {}
        for node in nodes:
            if isinstance(node, FileNode):
                self.blobs.add(node.digest)
            elif isinstance(node, DirectoryNode) and node.digest not in self.directories:
                new[node.digest] = None
        return [digest for digest in new if digest not in self.absent]


async def _get(service: DirectoryService, digest: Digest) -> tuple[Digest, Directory | None]:
    try:
        return digest, await service.get(digest)
    except DirectoryNotFound:
        return digest, None


async def missing_of_closure(nodes: Iterable[Node], store: Castore) -> Missing:
    """What `store` lacks of `nodes` and everything below them: all of it, as far as the directories there tell."""
    survey = _Survey()
    await survey.walk(nodes, store.directories)
    return Missing(await _missing(store.blobs.missing, survey.blobs), frozenset(survey.absent))


@dataclass(frozen=True, slots=True)
class Copied:
    """What a copy had to move."""

    blobs: int = 0
    directories: int = 0


async def copy_closure(nodes: Iterable[Node], source: Castore, target: Castore) -> Copied:
    """Bring `target` to hold `nodes` and everything below them.

    A directory that is there says nothing about the blobs below it, so `target` is asked about all of them, in
    batches. Blobs go first, several at a time; then directories, children before parents: what is visible is complete.
    Raises ContentMissing, listing everything that neither store has, before anything is written.
    """
    if source.scheme is not target.scheme:
        raise SchemeDiffers(has=target.scheme, wanted=source.scheme)
    here, there = _Survey(), _Survey()
    await here.walk(nodes, source.directories)
    await there.walk((DirectoryNode(digest, 0) for digest in here.absent), target.directories)
    blobs = await _missing(target.blobs.missing, here.blobs | there.blobs)
    lost = Missing(await _missing(source.blobs.missing, blobs), frozenset(there.absent))
    if lost:
        raise ContentMissing(blobs=lost.blobs, directories=lost.directories)
    await each(partial(_copy_blob, source, target), sorted(blobs), at_once=_CALLS_AT_ONCE)
    lacking = await _missing(target.directories.missing, here.directories)
    unsent = {digest: directory for digest, directory in here.directories.items() if digest in lacking}
    for digest in here.directories:  # Breadth first, so a put takes all that is missing below its root with it.
        if digest in unsent:
            tree = children_first(unsent, [digest])
            await target.directories.put(tree.values())
            for sent in tree:
                del unsent[sent]
    return Copied(len(blobs), len(lacking))


async def _copy_blob(source: Castore, target: Castore, digest: Digest) -> None:
    async with closing(source.blobs.read(digest)) as chunks:
        found = await target.blobs.write(chunks)
    if found != digest:  # Harmless there, for it lies under what it is; but it is not what was wanted.
        raise DigestMismatch(wanted=digest, found=found, what="blob")


async def _missing(
    ask: Callable[[Iterable[Digest]], Awaitable[frozenset[Digest]]], digests: Iterable[Digest]
) -> frozenset[Digest]:
    """`ask` about all of `digests`, in batches."""
    left = iter(digests)
    missing: frozenset[Digest] = frozenset()
    while batch := tuple(islice(left, _ASKED_AT_ONCE)):
        missing |= await ask(batch)
    return missing
