"""castore.v1 as both its ends agree on it: which scheme goes by which package, and how large messages are.

`snix.castore.v1` and `tvix.castore.v1` differ in names only: the same fields have the same numbers. So the messages
of the first serve both, under method names of either. A Directory message is its canonical bytes, which are what the
digest is of; they are read and written by `kiln.castore.wire`, not by protobuf.
"""

from collections.abc import Iterator, Mapping
from types import MappingProxyType

from kiln.castore.errors import SchemeWithoutWire
from kiln.castore.model import BLAKE3_DOCUMENTED, BLAKE3_DOUBLED, Scheme

PACKAGES: Mapping[str, str] = MappingProxyType(
    {BLAKE3_DOUBLED.name: "snix.castore.v1", BLAKE3_DOCUMENTED.name: "tvix.castore.v1"}
)
"""The package that speaks each scheme; the others have none."""

# Snix refuses messages over 4 MiB (tonic's default) and sends 128 KiB itself.
SENT_CHUNK_BYTES = 128 * 1024


def package_of(scheme: Scheme) -> str:
    """The package that speaks `scheme`. Raises SchemeWithoutWire."""
    if scheme.name not in PACKAGES:
        raise SchemeWithoutWire(scheme)
    return PACKAGES[scheme.name]


def pieces(chunk: bytes, bytes_max: int) -> Iterator[bytes]:
    """`chunk` in pieces of at most `bytes_max` bytes; none for an empty one."""
    if 0 < len(chunk) <= bytes_max:
        yield chunk
        return
    for start in range(0, len(chunk), bytes_max):
        yield chunk[start : start + bytes_max]
