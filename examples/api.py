"""kiln from Python: a builder over a store, a build, its events, and an output read back.

python examples/api.py STORE [WORD]
"""

import asyncio
import sys

from kiln.build.events import Failure, Finished, Log, Phase, Success
from kiln.build.model import BuildOptions, BuildRequest, Constraints
from kiln.castore.castore import read_whole
from kiln.castore.local.store import LocalStore
from kiln.castore.model import FileNode
from kiln.server.compose import composed
from kiln.server.config import BuilderConfig


async def shout(store: LocalStore, word: str) -> bytes:
    """`word` in capitals, made so in a sandbox."""
    node = await store.add_blob(word.encode())
    request = BuildRequest(
        inputs=((b"word", node),),
        inputs_dir="inputs",
        command=("/bin/sh", "-c", "echo at work; tr a-z A-Z < /inputs/word > loud"),
        working_dir="build",
        scratch_paths=("build",),
        outputs=("build/loud",),
        constraints=Constraints(system="x86_64-linux", provide_bin_sh=True),
    )
    async with composed(BuilderConfig("bwrap://"), store) as composition:
        host = composition.host
        build_id = await host.submit(request, BuildOptions(wall_s=60.0, labels={"example": "api"}))
        async with host.watch(build_id) as events:
            async for event in events:
                match event.body:
                    case Phase(kind):
                        print(f"{event.elapsed_us / 1e6:.3f} s: {kind.name.lower()}", file=sys.stderr)
                    case Log(data):
                        print(f"log: {data!r}", file=sys.stderr)
                    case Finished(verdict=Failure() as failure):  # A result, not an exception.
                        raise SystemExit(f"{failure.reason.name.lower()}: {failure.message}")
                    case Finished(verdict=Success() as success):
                        output = success.outputs[0].node
    assert isinstance(output, FileNode)
    return await read_whole(store.blobs, output.digest, bytes_max=1 << 20)


def main() -> None:
    """Run the example in the store named on the command line, which is made where there is none."""
    store = LocalStore.open(sys.argv[1])
    try:
        print(asyncio.run(shout(store, " ".join(sys.argv[2:]) or "hello")).decode())
    finally:
        store.close()


if __name__ == "__main__":
    main()
