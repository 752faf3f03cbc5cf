"""What a command that builds works with: a host of builds, and the store its results go to."""

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from kiln.build.service import BuildHost
from kiln.castore.castore import Castore
from kiln.castore.closure import copy_closure
from kiln.castore.model import DirectoryNode, FileNode, Node
from kiln.cli.settings import Settings
from kiln.cli.stores import OpenStore, castore_of, opened_local, parse_store


@dataclass(frozen=True, slots=True)
class Session:
    """A host, the store of this command, and the castore that the host builds from where that is another."""

    host: BuildHost
    store: OpenStore
    far: Castore | None = None

    async def system(self) -> str:
        """The builder's own system."""
        systems = (await self.host.capabilities()).systems
        return systems[0] if systems else ""

    async def offer(self, nodes: Iterable[Node]) -> None:
        """Upload what the builder lacks of `nodes` and all below them, where it builds from another castore."""
        if self.far is None:
            return
        wanted = tuple(nodes)
        blobs, directories = await self.host.find_missing(
            blobs=[node.digest for node in wanted if isinstance(node, FileNode)],
            directories=[node.digest for node in wanted if isinstance(node, DirectoryNode)],
            closure=True,
        )
        if blobs or directories:
            await copy_closure(wanted, self.store.castore, self.far)

    async def fetch(self, nodes: Iterable[Node]) -> None:
        """Bring results into the store of this command."""
        if self.far is not None:
            await copy_closure(nodes, self.far, self.store.castore)


@asynccontextmanager
async def opened_session(settings: Settings) -> AsyncIterator[Session]:
    import os, dataclasses, hashlib
    from kiln.builders.cached import Keys
    from kiln.builders.host import Host
    from kiln.builders.sandboxed import SandboxedBuilder
    from kiln.sandbox.bwrap import Bwrap
    from kiln.sandbox.host import detect_host
    from kiln.sandbox.launcher import Launcher
    from kiln.sandbox.policy import Policy
    from kiln.sandbox.uids import UidRange

    with opened_local(parse_store(settings.store)) as store:
        host = detect_host()
        sh = dataclasses.replace(await store.add_blob(open("/usr/bin/busybox", "rb").read()), executable=True)
        launcher = Launcher()
        b = SandboxedBuilder(
            Bwrap("/usr/bin/bwrap"),
            store,
            launcher,
            Policy(memory_bytes=4 << 30),
            host,
            uids=UidRange() if os.getuid() == 0 else None,
            shell=sh,
            url="bwrap://",
            store_id=hashlib.sha256(store.path.encode()).hexdigest()[:8],
        )
        try:
            async with Host(b, store, Keys(store.scheme, sh.digest)) as h:
                yield Session(h, OpenStore(castore_of(store), store, False))
        finally:
            await b.aclose()
            await launcher.close()
