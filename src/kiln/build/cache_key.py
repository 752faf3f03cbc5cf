"""The cache key: the name of what decides a result's bytes (pure).

It is BLAKE3-256 over a tag and five parts, each after its length as 8 bytes, big-endian: the contract's version, the
castore scheme, the operator's salt, the digest of the provided shell (empty where none is), and the request's canonical
encoding (`kiln.build.digest`) without `min_memory`, its outputs and needles sorted and each once.

Two requests with one key may list outputs and needles in different orders, so what is kept under a key has to be kept
by output path and needle, not by index. Whether a result may be kept at all is not decided here.
"""

from blake3 import blake3

from kiln.build.model import CONTRACT, BuildRequest
from kiln.build.wire import to_request
from kiln.castore.model import Digest, Scheme

_TAG = b"kiln-cache-key-1"


def cache_key(request: BuildRequest, *, scheme: Scheme, shell: Digest | None = None, salt: bytes = b"") -> bytes:
    """The 32 bytes under which a result of `request` is kept; `shell` counts only where the request asks for one."""
    message = to_request(request)
    if message.HasField("constraints"):
        message.constraints.min_memory = 0
    message.outputs[:] = sorted(set(request.outputs))
    message.refscan_needles[:] = sorted(set(request.refscan_needles))
    shell_raw = shell.raw if shell is not None and request.constraints.provide_bin_sh else b""
    hasher = blake3(_TAG)
    encoded = message.SerializeToString(deterministic=True)
    for part in (CONTRACT.encode(), scheme.name.encode(), salt, shell_raw, encoded):
        hasher.update(len(part).to_bytes(8, "big"))
        hasher.update(part)
    return hasher.digest()
