"""The request digest: the name of what was asked (pure).

It is BLAKE3-256 over the tag `kiln-request-1` and the canonical encoding: the request in its `snix.build.v1` shape in
proto3's wire format, fields in ascending order of their numbers, fields with their default value left out, repeated
fields in the request's order (most have to be sorted; command, outputs and needles keep theirs), `constraints` there
exactly when the request has a system, no unknown fields. There are no maps and no floats in it, so these rules leave
one encoding, and the `tvix.build.v1` shape of the same request over the same nodes has the same digest.
"""

from blake3 import blake3

from kiln.build.model import BuildRequest
from kiln.build.wire import encode_request

_TAG = b"kiln-request-1"


def request_digest(request: BuildRequest) -> bytes:
    """The 32 bytes that name `request`."""
    return blake3(_TAG + encode_request(request)).digest()
