"""`kiln store …`: content in and out of the store."""

import json
import os
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import asdict

import click

from kiln.aio import closing
from kiln.castore.castore import Castore
from kiln.castore.closure import missing_of_closure
from kiln.castore.model import DirectoryNode, FileNode, Node, printable
from kiln.cli import exits
from kiln.cli.asyncs import run_async
from kiln.cli.command import KilnCommand, KilnGroup, kiln_command
from kiln.cli.nodes import descend, node_line, node_text, parse_node
from kiln.cli.sanitize import one_line
from kiln.cli.settings import Settings
from kiln.cli.stores import opened, opened_local, parse_store
from kiln.cli.units import shown_size, shown_time
from kiln.errors import Precondition


class NotAFile(Precondition):
    """Only a file has contents to print."""

    def __init__(self, path: str) -> None:
        super().__init__(f"{printable(os.fsencode(path)) if path else 'this node'} is not a file")
        self.path = path


_NODE = click.argument("node", metavar="NODE")
_PATH = click.argument("path", metavar="[PATH]", default="")


@kiln_command("import")
@click.argument("path", metavar="PATH")
@click.pass_context
def _import(context: click.Context, path: str) -> int:
    """Import a file or a directory; prints its Entry."""
    settings = Settings.of(context)
    name = os.fsencode(os.path.basename(os.path.abspath(path)))

    async def main() -> int:
        started = time.perf_counter()
        async with opened(settings.store) as store:
            found = await store.ingest(path)
        took = shown_time(time.perf_counter() - started)
        click.echo(f"kiln: {found.files} files, {shown_size(found.bytes)} in {took}", err=True)
        click.echo(node_text(found.node, name))
        return exits.OK

    return run_async(main())


@kiln_command("export")
@_NODE
@click.argument("destination", metavar="DESTINATION")
@click.pass_context
def _export(context: click.Context, node: str, destination: str) -> int:
    """Write a node to DESTINATION, replacing what stands there once all of it is written."""
    settings = Settings.of(context)

    async def main() -> int:
        async with opened(settings.store) as store:
            await store.export(await parse_node(node, store.castore), destination)
        return exits.OK

    return run_async(main())


@kiln_command("ls")
@_NODE
@_PATH
@click.option("-R", "--recursive", is_flag=True, help="Everything below, too.")
@click.pass_context
def _ls(context: click.Context, node: str, path: str, recursive: bool) -> int:
    """List a directory: kind, digest, size, name. With --json, an Entry a line."""
    settings = Settings.of(context)

    async def main() -> int:
        async with opened(settings.store) as store:
            top = await descend(await parse_node(node, store.castore), path, store.castore)
            async for name, found in _listed(top, store.castore, recursive=recursive):
                click.echo(node_text(found, name) if settings.json else node_line(name, found))
        return exits.OK

    return run_async(main())


async def _listed(top: Node, castore: Castore, *, recursive: bool) -> AsyncIterator[tuple[bytes, Node]]:
    """What is in `top`, paths relative to it; what is below a directory follows it."""
    if not isinstance(top, DirectoryNode):
        yield b"", top
        return
    pending = [iter([(name, node) for name, node in await castore.directories.get(top.digest)])]
    while pending:
        entry = next(pending[-1], None)
        if entry is None:
            pending.pop()
            continue
        yield entry
        name, node = entry
        if recursive and isinstance(node, DirectoryNode):
            below = await castore.directories.get(node.digest)
            pending.append(iter([(name + b"/" + inner, found) for inner, found in below]))


@kiln_command("cat")
@_NODE
@_PATH
@click.pass_context
def _cat(context: click.Context, node: str, path: str) -> int:
    """Print the contents of a file, byte for byte."""
    settings = Settings.of(context)

    async def main() -> int:
        async with opened(settings.store) as store:
            found = await descend(await parse_node(node, store.castore), path, store.castore)
            if not isinstance(found, FileNode):
                raise NotAFile(path)
            async with closing(store.castore.blobs.read(found.digest)) as chunks:
                async for chunk in chunks:
                    sys.stdout.buffer.write(chunk)
            sys.stdout.buffer.flush()
        return exits.OK

    return run_async(main())


@kiln_command("stat")
@_NODE
@_PATH
@click.pass_context
def _stat(context: click.Context, node: str, path: str) -> int:
    """Print one node, and whether all that belongs to it is there (exit code 4 where it is not)."""
    settings = Settings.of(context)

    async def main() -> int:
        async with opened(settings.store) as store:
            found = await descend(await parse_node(node, store.castore), path, store.castore)
            missing = await missing_of_closure([found], store.castore)
        if settings.json:
            lacking = {
                "blobs": [str(digest) for digest in sorted(missing.blobs)],
                "directories": [str(digest) for digest in sorted(missing.directories)],
            }
            click.echo(json.dumps({"node": json.loads(node_text(found)), "missing": lacking}))
        else:
            click.echo(node_line(os.fsencode(path or "."), found))
            for what, digests in (("blob", missing.blobs), ("directory", missing.directories)):
                for digest in sorted(digests):
                    click.echo(f"missing {what} {digest}")
        return exits.REFUSED if missing else exits.OK

    return run_async(main())


@kiln_command("fsck")
@click.option("--repair", is_flag=True, help="Drop what is damaged; it can be had again.")
@click.pass_context
def _fsck(context: click.Context, repair: bool) -> int:
    """Check everything in a store on disk against its digest. Exit code 1 where something was damaged."""
    settings = Settings.of(context)

    async def main() -> int:
        with opened_local(parse_store(settings.store)) as store:
            damage = await store.fsck(repair=repair)
        if settings.json:
            click.echo(json.dumps([asdict(found) for found in damage]))
        for found in damage:
            done = " (repaired)" if found.repaired else ""
            click.echo(one_line(f"{found.what}: {found.why}{done}"), err=settings.json)
        if any(not found.repaired for found in damage):
            remedy = settings.command("store fsck --repair")
            click.echo(f"kiln: to drop what is damaged, so that it can be had again: {remedy}", err=True)
        return exits.FAILED if damage else exits.OK

    return run_async(main())


@kiln_command("du")
@click.pass_context
def _du(context: click.Context) -> int:
    """Say how much a store on disk holds; what trees share with blobs counts once."""
    settings = Settings.of(context)

    async def main() -> int:
        with opened_local(parse_store(settings.store)) as store:
            usage = await store.du()
        if settings.json:
            click.echo(json.dumps(asdict(usage)))
        else:
            click.echo(f"blobs     {shown_size(usage.blob_bytes):>12}  {usage.blobs} files")
            click.echo(f"trees     {shown_size(usage.tree_bytes):>12}  {usage.trees} trees, beyond the blobs")
            click.echo(f"database  {shown_size(usage.database_bytes):>12}")
            click.echo(f"builds    {shown_size(usage.other_bytes):>12}  running, kept and temporary")
        return exits.OK

    return run_async(main())


_COMMANDS: tuple[KilnCommand, ...] = (_import, _export, _ls, _cat, _stat, _fsck, _du)

command = KilnGroup(  # The name by which `kiln.cli.main` finds it.
    "store", _COMMANDS, help="Import, export, list and check content. A NODE is the JSON of an Entry, or a digest."
)
