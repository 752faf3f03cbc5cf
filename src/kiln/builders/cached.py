"""The action cache: what a request gave once is given again."""

from dataclasses import dataclass

from kiln.build.cache_key import cache_key
from kiln.build.model import BuildRequest
from kiln.castore.model import Digest, Scheme


@dataclass(frozen=True, slots=True)
class Keys:
    """What besides the request decides a result's bytes here, and so is part of its key."""

    scheme: Scheme
    shell: Digest | None = None
    salt: str = ""

    def key(self, request: BuildRequest) -> bytes:
        """The key of the request's result."""
        return cache_key(request, scheme=self.scheme, shell=self.shell, salt=self.salt.encode())
