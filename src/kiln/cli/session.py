"""What a command that builds works with: a host of builds, and the store its results go to."""

import platform
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from kiln.build.service import BuildHost
from kiln.builders.sandboxed import SandboxedBuilder
from kiln.castore.castore import Castore
from kiln.castore.closure import copy_closure
from kiln.castore.model import DirectoryNode, FileNode, Node
from kiln.cli.settings import Settings
from kiln.cli.stores import OpenStore, opened
from kiln.rpc.url import CHANNEL_OPTIONS, UrlInvalid
from kiln.server.compose import composed, parse_builder


@dataclass(frozen=True, slots=True)
class Session:
    """A host, the store of this command, and the castore that the host builds from where that is another.

    `sandbox` is there where builds run in this process.
    """

    host: BuildHost
    store: OpenStore
    far: Castore | None = None
    sandbox: SandboxedBuilder | None = None

    async def system(self) -> str:
        """The builder's own system; this host's where it has none, for the builder to refuse."""
        systems = (await self.host.capabilities()).systems
        return systems[0] if systems else f"{platform.machine()}-linux"

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
    """Store and builder of the settings, for as long as the block. Leaving it cancels what a builder here builds."""
    config = settings.builder_config()
    builder = parse_builder(config.url)
    async with opened(settings.store) as store:
        if store.elsewhere and builder.scheme not in CHANNEL_OPTIONS:
            raise UrlInvalid(settings.store, "a builder here needs a store on disk, as in local:///var/lib/kiln")
        async with composed(config, store.local) as composition:
            yield Session(composition.host, store, composition.far, composition.sandbox)
