"""The composition root: from configuration, the one graph of objects that builds. It alone knows all backends."""

import hashlib
import os
import shutil
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from types import MappingProxyType

from kiln.build.service import BuildHost, BuildService
from kiln.builders.admission import Admission
from kiln.builders.cached import Cached, Keys
from kiln.builders.deduplicated import Deduplicated
from kiln.builders.dummy import DummyBuilder
from kiln.builders.host import Host
from kiln.builders.limited import Limited
from kiln.builders.recovery import recover
from kiln.builders.sandboxed import SandboxedBuilder
from kiln.castore.castore import Castore
from kiln.castore.local.store import LocalStore
from kiln.castore.model import FileNode
from kiln.rpc.url import CHANNEL_OPTIONS, Url, UrlInvalid, parse_url
from kiln.sandbox.bwrap import Bwrap
from kiln.sandbox.errors import RuntimeMissing
from kiln.sandbox.host import Host as Machine
from kiln.sandbox.host import detect_host
from kiln.sandbox.launcher import Launcher
from kiln.sandbox.policy import Policy, limits_of
from kiln.sandbox.runtime import Runtime
from kiln.sandbox.shell import import_shell
from kiln.sandbox.uids import UidRange
from kiln.server.config import BuilderConfig


@dataclass(frozen=True, slots=True)
class Composition:
    """A host of builds, and the castore that it builds from where that is not the store it was composed over."""

    host: BuildHost
    far: Castore | None = None
    sandbox: SandboxedBuilder | None = None
    """Where builds run in a sandbox of this process: to enter what a failed one left."""


@asynccontextmanager
async def composed(config: BuilderConfig, store: LocalStore) -> AsyncIterator[Composition]:
    """The builder of `config` over `store`, for as long as the block; leaving it cancels what it still builds.

    Raises UrlInvalid, and whatever keeps the builder from working (RuntimeMissing, ShellUnusable, …).
    """
    url = parse_builder(config.url)
    if url.scheme in CHANNEL_OPTIONS:
        from kiln.builders.grpc import connected_host  # noqa: PLC0415  gRPC takes 80 ms to import.

        async with connected_host(url, store) as (host, far):
            yield Composition(host, far)
        return
    async with _here(config, url, store) as composition:
        yield composition


def parse_builder(text: str) -> Url:
    """The URL of a builder, with the known schemes and options named where it is wrong. Raises UrlInvalid."""
    known = {**CHANNEL_OPTIONS, **{scheme: backend.options for scheme, backend in _BACKENDS.items()}}
    return parse_url(text, known)


@dataclass(frozen=True, slots=True)
class _Surroundings:
    """What a backend on this host is made from."""

    url: Url
    store: LocalStore
    machine: Machine
    policy: Policy
    uids: UidRange | None
    shell: FileNode | None
    store_id: str


@dataclass(frozen=True, slots=True)
class _Backend:
    options: frozenset[str]
    open: Callable[[_Surroundings], AbstractAsyncContextManager[BuildService]]


@asynccontextmanager
async def _here(config: BuilderConfig, url: Url, store: LocalStore) -> AsyncIterator[Composition]:
    """Host(cached(deduplicated(limited(backend))))."""
    if not store.writable:  # What was built can still be looked at; a new build is refused as it is submitted.
        async with Host(DummyBuilder(store.scheme.name), store, Keys(store.scheme)) as host:
            yield Composition(host)
        return
    machine = detect_host()
    policy = policy_of(config, machine)
    store_id = id_of(store)
    await recover(store, machine.hierarchies, store_id, kept_bytes_max=policy.kept_bytes)
    shell = await import_shell(store, config.shell)
    surroundings = _Surroundings(url, store, machine, policy, _uids(config), shell, store_id)
    async with AsyncExitStack() as stack:
        backend = await stack.enter_async_context(_BACKENDS[url.scheme].open(surroundings))
        admission = Admission(slots=policy.slots, memory_bytes=policy.memory_bytes)
        service: BuildService = Limited(backend, admission, lambda r, o: limits_of(r, o, policy).memory_bytes)
        service = Deduplicated(service, spool_dir=store.tmp_dir)
        keys = Keys(store.scheme, shell.digest if shell else None, policy.salt)
        service = Cached(service, store, keys)
        host = await stack.enter_async_context(Host(service, store, keys, kept_bytes_max=policy.kept_bytes))
        yield Composition(host, sandbox=backend if isinstance(backend, SandboxedBuilder) else None)


def policy_of(config: BuilderConfig, machine: Machine) -> Policy:
    """The operator's word, completed by what the host has: a slot for each CPU, 80 % of the memory."""
    given = {
        "disk_bytes": config.disk_bytes,
        "log_bytes": config.log_bytes,
        "processes": config.processes,
        "wall_s": config.wall_s,
    }
    return Policy(
        allow_network=config.allow_network,
        allowed_paths=config.allowed_paths,
        allow_user_namespaces=config.allow_user_namespaces,
        slots=config.slots or len(machine.cpu_numbers),
        memory_bytes=config.memory_bytes or machine.memory_bytes * 4 // 5,
        cpus=len(machine.cpu_numbers),
        salt=config.salt,
        **{name: value for name, value in given.items() if value is not None},  # type: ignore[arg-type]
    )


def id_of(store: LocalStore) -> str:
    """What tells this store's control groups from those of other stores on the host."""
    return hashlib.sha256(os.fsencode(os.path.realpath(store.path))).hexdigest()[:12]


def _uids(config: BuilderConfig) -> UidRange | None:
    if os.geteuid() != 0:
        return None
    return UidRange() if config.uid_range is None else UidRange(*config.uid_range)


@asynccontextmanager
async def _sandboxed(runtime: Runtime, given: _Surroundings) -> AsyncIterator[BuildService]:
    # Before anything starts threads: gRPC's would make a later fork unsafe, and the first build would wait for it.
    launcher = Launcher()
    launcher.start()
    builder = SandboxedBuilder(
        runtime,
        given.store,
        launcher,
        given.policy,
        given.machine,
        uids=given.uids,
        shell=given.shell,
        url=given.url.text,
        store_id=given.store_id,
    )
    try:
        yield builder
    finally:
        await builder.aclose()
        await launcher.close()


@asynccontextmanager
async def _bwrap(given: _Surroundings) -> AsyncIterator[BuildService]:
    if given.url.authority or given.url.path not in {"", "/"}:
        raise UrlInvalid(given.url.text, "bwrap:// takes no path: builds run in the store's own builds/")
    program = given.url.options.get("program") or shutil.which("bwrap")
    if program is None:
        raise RuntimeMissing("bwrap is not there: install bubblewrap (Debian: apt-get install bubblewrap)")
    async with _sandboxed(Bwrap(program, given.machine.network_helper), given) as builder:
        yield builder


@asynccontextmanager
async def _dummy(given: _Surroundings) -> AsyncIterator[BuildService]:
    yield DummyBuilder(given.store.scheme.name)


_BACKENDS: Mapping[str, _Backend] = MappingProxyType(
    {"bwrap": _Backend(frozenset({"program"}), _bwrap), "dummy": _Backend(frozenset(), _dummy)}
)
