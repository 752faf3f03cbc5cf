"""URL -> castore."""

import re
from pathlib import Path

import pytest

from kiln.castore.backends import BACKENDS
from kiln.castore.errors import StoreSchemeDiffers
from kiln.castore.model import BLAKE3_DOUBLED, SHA256_DOCUMENTED
from kiln.castore.registry import CastoreRegistry
from kiln.rpc.url import UrlInvalid

REGISTRY = CastoreRegistry(BACKENDS)


@pytest.mark.parametrize("url", ["memory://", "memory:", "memory:///", "memory://?scheme=blake3/doubled"])
async def test_memory(url: str) -> None:
    async with REGISTRY.open(url) as castore:
        assert castore.scheme is BLAKE3_DOUBLED


async def test_a_local_store_keeps_its_scheme(tmp_path: Path) -> None:
    async with REGISTRY.open(f"local://{tmp_path}/store?scheme=sha256/documented&durability=strict") as castore:
        assert castore.scheme is SHA256_DOCUMENTED
    async with REGISTRY.open(f"local:{tmp_path}/store") as castore:
        assert castore.scheme is SHA256_DOCUMENTED
    with pytest.raises(StoreSchemeDiffers):
        async with REGISTRY.open(f"local:{tmp_path}/store?scheme=blake3/doubled"):
            pass


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("s3://bucket", "known are grpc+http, grpc+https, grpc+unix, local, memory"),
        ("local:///x?durable=1", "known for local are: durability, scheme"),
        ("local:///x?durability=some", "known are normal, strict"),
        ("local://host/x", "absolute path"),
        ("local:x", "absolute path"),
        ("memory:///x", "takes no path"),
        ("memory://?scheme=md5", "known are blake3/doubled, blake3/documented, sha256/documented"),
        ("grpc+unix://host/x", "absolute path"),
        ("grpc+unix:///" + "x" * 107, "at most 107 bytes"),
        ("grpc+unix:///", "names no socket"),
        ("grpc+http://localhost", "a host and a port"),
        ("grpc+http://localhost:1/path", "takes no path"),
        ("grpc+http://localhost:1?token-file=/x", "known for grpc+http are: scheme"),
        ("grpc+https://user@localhost:1", "a host and a port"),
        ("grpc+https://localhost:1?tls-client-key-path=/dev/null", "go together"),
    ],
)
async def test_a_wrong_url_is_refused_with_what_is_known(url: str, says: str) -> None:
    with pytest.raises(UrlInvalid, match=re.escape(says)):
        async with REGISTRY.open(url):
            pass
