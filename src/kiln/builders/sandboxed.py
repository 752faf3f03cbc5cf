"""Builds in a sandbox on this host, whichever runtime makes it: stage, run, capture."""

import asyncio
import contextlib
import dataclasses
import fcntl
import os
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractContextManager, asynccontextmanager
from typing import Self

from kiln.aio import Emit, streaming
from kiln.build.build_id import build_id
from kiln.build.errors import RequestInvalid
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
    OutputReady,
    PathDetail,
    Phase,
    PhaseKind,
    PhaseSpan,
    Reason,
    Refusal,
    Retry,
    Stream,
    Success,
    UnmetDetail,
    Usage,
)
from kiln.build.model import CONTRACT, BuildOptions, BuildRequest
from kiln.build.service import BuildService, Capabilities
from kiln.castore.dirfd import remove_path
from kiln.castore.errors import ContentMissing, EntriesTooMany, IngestRefused
from kiln.castore.local.store import LocalStore
from kiln.castore.local.trouble import host_trouble
from kiln.castore.model import FileNode, SymlinkNode
from kiln.errors import KilnError
from kiln.sandbox import cgroups
from kiln.sandbox.claims import Claims, held, release
from kiln.sandbox.errors import BuildNotKept, ShellMissing
from kiln.sandbox.host import Host
from kiln.sandbox.launcher import Ended, Launcher, Order
from kiln.sandbox.layout import Layout
from kiln.sandbox.plan import HostFacts, Network, RootPlan, plan_root
from kiln.sandbox.policy import Limits, Policy, limits_of, maxima_of
from kiln.sandbox.runtime import Runtime, Sources, Streams
from kiln.sandbox.supervise import Ending, Supervision
from kiln.sandbox.uids import Identity, UidRange
from kiln.sandbox.verdict import failure_of, readable_bytes
from kiln.version import __version__

_PIPE_BYTES = 1 << 20  # A build that writes much is read in gulps; with the kernel's 64 KiB it would wait each time.


class _Refused(Exception):  # A verdict on its way out, not an error.
    """The build ends here, with this failure."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


class SandboxedBuilder(BuildService):
    """One runtime over one local store."""

    def __init__(
        self,
        runtime: Runtime,
        store: LocalStore,
        launcher: Launcher,
        policy: Policy,
        host: Host,
        *,
        uids: UidRange | None,
        shell: FileNode | None,
        url: str,
        store_id: str,
    ) -> None:
        self._runtime = runtime
        self._store = store
        self._launcher = launcher
        self._policy = policy
        self._host = host
        self._uids = uids
        self._shell = shell
        self._store_id = store_id
        self._claims = Claims(store)
        self._removals: set[asyncio.Task[None]] = set()
        self._info = BuilderInfo(
            worker=host.name,
            url=url,
            builder_id=runtime.info.builder_id,
            version=__version__,
            contract=CONTRACT,
            system=host.systems[0],
            shell_digest=shell.digest if shell else None,
            weaker={**runtime.info.weaker, **host.weaker},
        )

    async def capabilities(self) -> Capabilities:
        return Capabilities(
            systems=self._host.systems,
            features=("keep-on-failure", "samples", "split-stderr"),
            builders=(self._info,),
            maxima=maxima_of(self._policy),
            castore_scheme=self._store.scheme.name,
            version=__version__,
        )

    async def aclose(self) -> None:
        """Wait until what ended builds left on disk is removed."""
        await asyncio.gather(*self._removals)
        self._claims.close()

    @asynccontextmanager
    async def build(self, request: BuildRequest, options: BuildOptions) -> AsyncIterator[AsyncIterator[BuildEvent]]:
        async def produce(emit: Emit[BuildEvent]) -> None:
            await _Attempt(self, request, options, emit).run()

        async with streaming(produce, capacity=64) as events:
            yield events

    async def enter(self, request: BuildRequest, build_id: str, streams: Streams) -> int:
        """Run an interactive shell in what the failed build `build_id` of `request` left; returns its exit code.

        It sees what the build saw, and its scratch as it was at the end. Raises BuildNotKept, ContentMissing, and what
        keeps a sandbox from starting.
        """
        if self._shell is None:
            raise ShellMissing
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(held(self._store.builds_dir, build_id))
            except (FileNotFoundError, BlockingIOError) as error:
                raise BuildNotKept(build_id) from error
            options = BuildOptions(build_id=build_id)
            attempt = _Attempt(self, _with_shell(request, self._host.systems[0]), options, _nowhere)
            return await attempt.enter(streams)

    def remove_later(self, path: str) -> None:
        """Remove a build's directory without keeping its caller waiting; a crash leaves it to the next start."""
        doomed = f"{self._store.tmp_dir}/build-{secrets.token_hex(8)}"
        os.rename(path, doomed)
        task = asyncio.create_task(asyncio.to_thread(remove_path, doomed))
        self._removals.add(task)
        task.add_done_callback(self._removals.discard)


class _Attempt:
    """One run of one request."""

    def __init__(
        self, builder: SandboxedBuilder, request: BuildRequest, options: BuildOptions, emit: Emit[BuildEvent]
    ) -> None:
        self._builder = builder
        self._store = builder._store
        self._policy = builder._policy
        self._request = request
        self._options = options
        self._emit = emit
        self._id = options.build_id or build_id(time.time_ns() // 1_000_000, secrets.randbits(35))
        self._limits = limits_of(request, options, builder._policy)
        self._layout = Layout(f"{self._store.builds_dir}/{self._id}")
        self._began = time.monotonic()
        self._spans: list[PhaseSpan] = []
        self._usage = Usage()

    async def run(self) -> None:
        """Emit everything from `Assigned` to `Finished`."""
        failed = False  # A cancelled build leaves nothing.
        claimed = False
        try:
            verdict: Success | Failure
            try:
                self._check_constraints()
                await self._emit(Assigned(self._builder._info, self._limits.memory_bytes))
                self._claim()
                claimed = True
                outputs = await self._stages()
                verdict = Success(outputs, cacheable=not self._why_not_cacheable(), why_not=self._why_not_cacheable())
            except _Refused as refused:
                verdict = refused.failure
            except KilnError as error:
                verdict = Failure(Reason.INFRASTRUCTURE, str(error), Retry.ELSEWHERE)
            except OSError as error:
                verdict = Failure(Reason.INFRASTRUCTURE, host_trouble(error, self._store.path), Retry.ELSEWHERE)
            failed = isinstance(verdict, Failure)
            self._end_phase()
            await self._emit(Finished(verdict, self._usage, self._builder._info, spans=tuple(self._spans)))
        finally:
            if claimed:
                self._leave(failed=failed)

    def _leave(self, *, failed: bool) -> None:
        keep_s = self._options.keep_on_failure_s
        keep_s = self._policy.keep_on_failure_s if keep_s is None else min(keep_s, self._policy.keep_on_failure_s)
        if failed and keep_s > 0 and self._layout.scratch:
            self._layout.keep(until_s=time.time() + keep_s)
        elif os.path.lexists(f"{self._layout.directory}/scratch"):
            self._builder.remove_later(f"{self._layout.directory}/scratch")
        if not os.path.lexists(f"{self._layout.directory}/journal"):  # Whoever records builds still needs it, else.
            release(self._layout.directory)

    def _claim(self) -> None:
        with contextlib.suppress(FileExistsError):  # It is there where somebody records the build.
            self._builder._claims.make(self._id)

    def _check_constraints(self) -> None:
        """Refuse what this host cannot, or may not, do."""
        wanted, host, policy = self._request.constraints, self._builder._host, self._policy
        unmet: list[Refusal] = []

        def refuse(constraint: str, want: str, has: str) -> None:
            unmet.append(Refusal(self._builder._info.url, constraint, want, has))

        if wanted.system is not None and wanted.system not in host.systems:
            refuse("system", wanted.system, ", ".join(host.systems))
        most = min(host.memory_bytes, policy.memory_bytes)
        if wanted.min_memory > most:
            refuse("min_memory", readable_bytes(wanted.min_memory), readable_bytes(most))
        if wanted.provide_bin_sh and self._builder._shell is None:
            refuse("provide_bin_sh", "a static shell", "none: install busybox-static, or name one with --shell")
        denied = [path for path in wanted.available_ro_paths if not policy.allows_path(path)]
        for path in wanted.available_ro_paths:
            if path not in denied and not os.path.exists(path):
                refuse("available_ro_paths", path, "no such path on this host")
        if wanted.network_access and not policy.allow_network:
            raise _Refused(
                Failure(
                    Reason.DENIED,
                    "the request asks for the network, which the policy does not allow; allow it with --allow-net",
                )
            )
        if denied:
            raise _Refused(
                Failure(
                    Reason.DENIED,
                    f"the request asks for the host's {', '.join(denied)}, which the policy does not allow; "
                    f"allow it with --allow-path {denied[0]}",
                    detail=PathDetail(denied[0]),
                )
            )
        if unmet:
            said = "; ".join(f"{refusal.constraint}: wants {refusal.wanted}, has {refusal.has}" for refusal in unmet)
            raise _Refused(
                Failure(
                    Reason.UNSATISFIABLE,
                    f"no builder can run this: {said}",
                    Retry.ELSEWHERE,
                    UnmetDetail(tuple(unmet)),
                )
            )

    def _why_not_cacheable(self) -> str:
        wanted = self._request.constraints
        if wanted.network_access:
            return "it had the network"
        if wanted.available_ro_paths:
            return "it saw paths of the host"
        # Limits that hold less firmly can make a build fail, but no success differ.
        if weaker := sorted(self._builder._info.weaker.keys() - {"limits"}):
            return f"it ran in weaker isolation: {', '.join(weaker)}"
        return ""

    async def _phase(self, kind: PhaseKind) -> None:
        self._end_phase()
        now = round((time.monotonic() - self._began) * 1e6)
        self._spans.append(PhaseSpan(kind, now, now))
        await self._emit(Phase(kind))

    def _end_phase(self) -> None:
        if self._spans:
            now = round((time.monotonic() - self._began) * 1e6)
            self._spans[-1] = dataclasses.replace(self._spans[-1], to_us=now)

    async def _stages(self) -> tuple[Output, ...]:
        await self._phase(PhaseKind.STAGE)
        sources_of_inputs = await self._stage_inputs()
        plan = plan_root(self._request, self._host_facts())
        with contextlib.ExitStack() as held:
            identity = held.enter_context(self._builder._uids.taken()) if self._builder._uids else None
            self._layout.prepare(plan, identity)
            if any(root.holds_inputs for root in plan.scratch):
                self._layout.protect_inputs(self._request.inputs_dir, identity)
            sources = Sources(sources_of_inputs, self._layout.scratch, await self._shell_path())
            await self._run(plan, sources, identity)
        await self._phase(PhaseKind.CAPTURE)
        return await self._capture(plan)

    async def enter(self, streams: Streams) -> int:
        """Run the request's command on `streams` in scratch that is there already, without any limit of time."""
        inputs = await self._paths_of_inputs()
        plan = plan_root(self._request, self._host_facts())
        with contextlib.ExitStack() as stack:
            identity = stack.enter_context(self._builder._uids.taken()) if self._builder._uids else None
            self._layout.reopen(plan, identity)
            if identity is not None:  # Its session has to open the terminal again to be controlled by it.
                os.fchown(streams.stdin, identity.uid, -1)
            group = stack.enter_context(self._group())
            sources = Sources(inputs, self._layout.scratch, await self._shell_path())
            with self._builder._runtime.order(plan, sources, identity, streams) as order:
                launch = self._builder._launcher.launch(self._completed(order, group))
            try:
                ended = await asyncio.shield(launch.ended)
            finally:
                launch.kill()
                await asyncio.wait([launch.ended])
        return ended.status if ended.exit_code is None else ended.exit_code

    async def _paths_of_inputs(self) -> tuple[str, ...]:
        nodes = [node for _, node in self._request.inputs if not isinstance(node, SymlinkNode)]
        staged = iter(await self._store.stage(nodes))
        return tuple("" if isinstance(node, SymlinkNode) else next(staged) for _, node in self._request.inputs)

    async def _stage_inputs(self) -> tuple[str, ...]:
        try:
            return await self._paths_of_inputs()
        except ContentMissing as missing:
            raise _Refused(
                Failure(
                    Reason.MISSING_INPUT,
                    str(missing),
                    Retry.AFTER_UPLOAD,
                    MissingDetail(tuple(sorted(missing.blobs)), tuple(sorted(missing.directories))),
                )
            ) from missing
        except EntriesTooMany as bomb:
            limit = LimitDetail("entries", bomb.entries_max, bomb.entries)
            raise _Refused(Failure(Reason.RESOURCES_EXHAUSTED, str(bomb), detail=limit)) from bomb

    async def _shell_path(self) -> str:
        if not self._request.constraints.provide_bin_sh or self._builder._shell is None:
            return ""
        return (await self._store.stage([self._builder._shell]))[0]

    def _host_facts(self) -> HostFacts:
        host, constraints = self._builder._host, self._request.constraints
        return HostFacts(
            ro_paths=tuple((path, os.path.isdir(path)) for path in constraints.available_ro_paths),
            devices=frozenset(path for path in constraints.available_ro_paths if host.is_device(path)),
            network=host.network,
            network_files=host.network_files() if constraints.network_access else (),
            user_namespaces=self._policy.allow_user_namespaces,
        )

    def _group(self) -> AbstractContextManager[cgroups.Group]:
        return cgroups.group(
            self._builder._host.hierarchies,
            self._builder._store_id,
            self._id,
            memory_bytes=self._limits.memory_bytes,
            processes=self._limits.processes,
            cpu_millis=self._limits.cpu_millis,
        )

    async def _run(self, plan: RootPlan, sources: Sources, identity: Identity | None) -> None:
        """Run the command. Raises _Refused unless it succeeds."""
        if plan.network is Network.HOST:
            text = "neither slirp4netns nor pasta is installed: the build shares the host's network"
            await self._emit(Notice("WEAKER_ISOLATION", text, {"weaker": "network"}))
        with self._group() as group, _Pipes(identity, split=self._options.split_stderr) as pipes:
            with self._builder._runtime.order(plan, sources, identity, pipes.streams) as order:
                launch = self._builder._launcher.launch(self._completed(order, group))
            pipes.close_theirs()
            supervision = Supervision(
                launch,
                logs=pipes.logs,
                limits=self._limits,
                emit=self._emit,
                disk_bytes=lambda: self._layout.disk_bytes(group.processes()),
                sample=lambda: self._sampled(group),
                sample_every_s=self._options.sample_every_s,
            )
            running = asyncio.ensure_future(supervision.run())
            try:
                await launch.running
                await self._phase(PhaseKind.RUN)
                ending = await running
            finally:
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)
            used = group.usage()
        self._usage = _usage_of(ending, used)
        failure = failure_of(ending, used, self._limits)
        if failure is not None:
            raise _Refused(failure)

    def _completed(self, order: Order, group: cgroups.Group) -> Order:
        limits = self._limits
        return dataclasses.replace(
            order,
            cgroups=group.process_files,
            rlimits=_rlimits(limits, enforced=self._builder._host.hierarchies.enforced),
            cpus=self._builder._host.cpus(limits.cpu_millis),
            oom_score_adj=500,  # When the host itself runs out, builds go before whatever serves them.
        )

    def _sampled(self, group: cgroups.Group) -> Usage:
        used = group.usage()
        return Usage(
            wall_s=time.monotonic() - self._began,
            user_s=used.cpu_user_s or 0.0,
            system_s=used.cpu_system_s or 0.0,
            memory=used.memory_now or 0,
            memory_peak=used.memory_peak or 0,
        )

    async def _capture(self, plan: RootPlan) -> tuple[Output, ...]:
        """Take the outputs into the store. All processes are dead by now, so nothing changes under the walk."""
        self._layout.uncover(plan, self._request.outputs)
        outputs: list[Output] = []
        needles = [needle.encode() for needle in self._request.refscan_needles]
        for index, path in enumerate(self._request.outputs):
            located = self._layout.locate(path)
            if located.path is None:
                raise _Refused(
                    Failure(
                        Reason.OUTPUT_MISSING,
                        f"output {located.problem}" + (f"; there is {', '.join(located.near)}" if located.near else ""),
                        detail=PathDetail(path),
                        near=located.near,
                    )
                )
            try:
                taken = await self._store.ingest(
                    located.path,
                    needles=needles,
                    adopt=not self._request.constraints.network_access,
                    take_over=True,
                )
            except IngestRefused as refused:
                where = os.fsdecode(refused.path)
                inside = path if where == located.path else f"{path}/{where}"  # The output itself, or in it.
                raise _Refused(
                    Failure(
                        Reason.OUTPUT_INVALID,
                        f"output {inside} is {refused.why}",
                        detail=PathDetail(inside),
                    )
                ) from refused
            output = Output(taken.node, tuple(sorted(taken.needles)), taken.bytes, taken.files)
            outputs.append(output)
            await self._emit(OutputReady(index, output))
        return tuple(outputs)


def _with_shell(request: BuildRequest, system: str) -> BuildRequest:
    """`request` with a shell for its command. Where it has put something of its own at /bin, that has to bring one."""
    constraints = dataclasses.replace(request.constraints, system=request.constraints.system or system)
    request = dataclasses.replace(request, command=("/bin/sh",), outputs=(), constraints=constraints)
    try:
        return dataclasses.replace(request, constraints=dataclasses.replace(constraints, provide_bin_sh=True))
    except RequestInvalid:
        return request


async def _nowhere(event: BuildEvent) -> None:
    """Nobody follows an interactive shell: its terminal is all there is of it."""


def _rlimits(limits: Limits, *, enforced: frozenset[str]) -> Mapping[str, tuple[int, int]]:
    """The fixed limits of the contract, and those that stand in where no control group enforces."""
    fixed = {
        "RLIMIT_AS": (-1, -1),
        "RLIMIT_CORE": (0, -1),
        "RLIMIT_CPU": (-1, -1),
        "RLIMIT_DATA": (-1, -1),
        "RLIMIT_MEMLOCK": (8 << 20, 8 << 20),
        "RLIMIT_MSGQUEUE": (819200, 819200),
        "RLIMIT_RSS": (-1, -1),
        "RLIMIT_RTTIME": (-1, -1),
        "RLIMIT_STACK": (8 << 20, -1),
        "RLIMIT_NOFILE": (1024, 524288),
        "RLIMIT_FSIZE": (limits.disk_bytes, limits.disk_bytes),
        "RLIMIT_NICE": (0, 0),
        "RLIMIT_RTPRIO": (0, 0),
    }
    if "processes" not in enforced:
        fixed["RLIMIT_NPROC"] = (limits.processes, limits.processes)
    if "memory" not in enforced:
        fixed["RLIMIT_AS"] = (limits.memory_bytes, limits.memory_bytes)
    return fixed


def _usage_of(ending: Ending, used: cgroups.GroupUsage) -> Usage:
    """What was measured: by the control group where there is one, else by the kernel's account of the processes."""
    ended: Ended = ending.ended
    unmeasured = ["read_bytes", "write_bytes", "memory_stall"]
    if ending.disk_peak is None:
        unmeasured.append("disk_peak")
    if used.processes_peak is None:
        unmeasured.append("processes_peak")
    return Usage(
        wall_s=ending.wall_s,
        user_s=ended.user_s if used.cpu_user_s is None else used.cpu_user_s,
        system_s=ended.system_s if used.cpu_system_s is None else used.cpu_system_s,
        memory_peak=ended.peak_bytes if used.memory_peak is None else used.memory_peak,
        processes_peak=used.processes_peak or 0,
        disk_peak=ending.disk_peak or 0,
        unmeasured=tuple(sorted(unmeasured)),
    )


class _Pipes:
    """Standard streams for a command: /dev/null to read, pipes to write to."""

    def __init__(self, identity: Identity | None, *, split: bool) -> None:
        self._stdin = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        self._writers: list[int] = []
        self.logs: dict[int, Stream] = {}
        """Our ends, and what comes out of each."""
        for stream in (Stream.OUTPUT, Stream.STDERR) if split else (Stream.OUTPUT,):
            reader, writer = os.pipe()
            with contextlib.suppress(OSError):  # More than the host allows an ordinary user; then it is slower.
                fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
            self.logs[reader] = stream
            self._writers.append(writer)
            if identity is not None:  # Else `> /dev/stderr` inside could not open it again.
                os.fchown(writer, identity.uid, identity.uid)

    @property
    def streams(self) -> Streams:
        """The command's ends, valid until `close_theirs`."""
        return Streams(self._stdin, self._writers[0], self._writers[-1])

    def close_theirs(self) -> None:
        """Let go of the command's ends, so that the pipes end with its last process."""
        for descriptor in self._writers:
            os.close(descriptor)
        self._writers.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close_theirs()
        for descriptor in (self._stdin, *self.logs):
            os.close(descriptor)
