"""Service URLs: `scheme://authority/path?option=value`; without an authority also `scheme:/path` (pure)."""

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from types import MappingProxyType
from urllib.parse import parse_qsl, unquote, urlsplit

from kiln.errors import Usage

_TLS_OPTIONS = frozenset({"tls-ca-cert-path", "tls-client-cert-path", "tls-client-key-path", "token-file"})
CHANNEL_OPTIONS: Mapping[str, AbstractSet[str]] = MappingProxyType(
    {"grpc+unix": frozenset(), "grpc+http": frozenset(), "grpc+https": _TLS_OPTIONS}
)
"""The schemes of a gRPC peer (`kiln.rpc.channel`), and the options of each. The TLS ones are spelled as in Snix."""


class UrlInvalid(Usage):
    """A service URL that names nothing kiln knows."""

    def __init__(self, url: str, why: str) -> None:
        super().__init__(f"cannot use the URL {url!r}: {why}")
        self.url = url
        self.why = why


@dataclass(frozen=True, slots=True)
class Url:
    """A service URL in parts. `path` is percent-decoded, to a text as `os.fsdecode` makes it."""

    text: str
    scheme: str
    authority: str
    path: str
    options: Mapping[str, str]


def parse_url(text: str, known: Mapping[str, AbstractSet[str]]) -> Url:
    """`text` in parts, where `known` maps each scheme to its options.

    Raises UrlInvalid, listing the known schemes or options, for one that is not among them and for a repeated option.
    """
    try:
        split = urlsplit(text)
        pairs = parse_qsl(split.query, keep_blank_values=True, strict_parsing=True) if split.query else []
    except ValueError as error:
        raise UrlInvalid(text, str(error)) from error
    if split.scheme not in known:
        shown = f"unknown scheme {split.scheme!r}" if split.scheme else "it has no scheme"
        raise UrlInvalid(text, f"{shown}; known are {', '.join(sorted(known))}")
    if split.fragment:
        raise UrlInvalid(text, "it has a fragment (write # in a path as %23)")
    options: dict[str, str] = {}
    for name, value in pairs:
        if name not in known[split.scheme]:
            listed = ", ".join(sorted(known[split.scheme])) or "none"
            raise UrlInvalid(text, f"unknown option {name!r}; known for {split.scheme} are: {listed}")
        if name in options:
            raise UrlInvalid(text, f"option {name!r} is given twice")
        options[name] = value
    path = unquote(split.path, errors="surrogateescape")
    return Url(text, split.scheme, split.netloc, path, MappingProxyType(options))
