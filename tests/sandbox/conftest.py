"""Builders for the tests of this folder."""

import dataclasses
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path

import pytest
from tests.sandbox.real_builder import Bench, MakeBench

from kiln.builders.sandboxed import SandboxedBuilder
from kiln.castore.local.store import LocalStore
from kiln.sandbox.bwrap import Bwrap
from kiln.sandbox.host import detect_host
from kiln.sandbox.launcher import Launcher
from kiln.sandbox.policy import GIB, Policy
from kiln.sandbox.uids import UidRange


@pytest.fixture
async def make_bench(tmp_path: Path) -> AsyncIterator[MakeBench]:
    """Makes builders with a policy of one's own; what they leave running or on disk at the end is an error."""
    made: list[Bench] = []

    async def make(
        policy: Policy | None = None, program: str | None = None, weaker: Mapping[str, str] | None = None
    ) -> Bench:
        bwrap, busybox = shutil.which("bwrap"), shutil.which("busybox")
        assert bwrap is not None, "bubblewrap is not installed: run ./dev setup"
        assert busybox is not None, "busybox-static is not installed: run ./dev setup"
        store = LocalStore.open(str(tmp_path / f"store{len(made)}"))
        shell = dataclasses.replace(await store.add_blob(Path(busybox).read_bytes()), executable=True)
        launcher = Launcher()
        store_id = f"{tmp_path.name}{len(made)}"
        host = detect_host()
        if weaker is not None:
            host = dataclasses.replace(host, weaker=weaker)
        policy = policy or Policy(memory_bytes=4 * GIB, keep_on_failure_s=0)
        uids = UidRange(lock_dir=str(tmp_path / "uids")) if os.geteuid() == 0 else None
        builder = SandboxedBuilder(
            Bwrap(program or bwrap, host.network_helper),
            store,
            launcher,
            policy,
            host,
            uids=uids,
            shell=shell,
            url="bwrap://",
            store_id=store_id,
        )
        made.append(Bench(builder, store, launcher, host, policy, shell, store_id))
        return made[-1]

    yield make
    for bench in made:
        await bench.builder.aclose()
        await bench.launcher.close()
        bench.store.close()


@pytest.fixture
async def bench(make_bench: MakeBench) -> Bench:
    """A builder under the default policy."""
    return await make_bench()


@pytest.fixture
def reachable() -> Iterator[Path]:
    """A directory that a build's uid can enter; pytest's own are closed to others."""
    with tempfile.TemporaryDirectory() as path:
        Path(path).chmod(0o755)
        yield Path(path)
