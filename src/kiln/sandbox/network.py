"""A way out for builds that may have the network: user-mode networks into a namespace of the build's own.

Neither program gives the build the host's loopback, its abstract sockets or its interfaces; slirp4netns(1), pasta(1).
"""

import os
import shutil
from dataclasses import dataclass

from kiln.sandbox.launcher import Companion

_TUNNEL = "/dev/net/tun"
_PASTA_RESOLVER = "169.254.53.53"  # Any address that the network does not use; pasta answers there for the host's.
_SLIRP_RESOLVER = "10.0.2.3"  # slirp4netns(1): its built-in DNS.


@dataclass(frozen=True, slots=True)
class NetworkHelper:
    """A program that connects a network namespace, and the resolver that builds find there."""

    companion: Companion
    resolver: str

    @property
    def resolv_conf(self) -> bytes:
        """What /etc/resolv.conf says in the build."""
        return f"nameserver {self.resolver}\n".encode()


def find_network_helper() -> NetworkHelper | None:
    """The helper that works here. Both open the tunnel device, which some hosts keep for root."""
    try:
        anybody = bool(os.stat(_TUNNEL).st_mode & 0o002)
    except OSError:
        return None
    if not anybody and not os.access(_TUNNEL, os.R_OK | os.W_OK):
        return None
    if slirp := shutil.which("slirp4netns"):
        # As root it shuts itself in; as the build's own user there is nothing to shut away.
        confined = () if anybody else ("--enable-sandbox", "--enable-seccomp")
        argv = (
            slirp, "--configure", "--mtu=65520", "--disable-host-loopback", *confined,
            "--ready-fd={ready}", "{pid}", "tap0",
        )  # fmt: skip
        return NetworkHelper(Companion(argv, as_launcher=not anybody), _SLIRP_RESOLVER)
    if (pasta := shutil.which("pasta")) and (anybody or os.geteuid() != 0):  # As root it would become nobody.
        closed = ("--tcp-ports", "none", "--udp-ports", "none", "--tcp-ns", "none", "--udp-ns", "none")
        argv = (
            pasta, "--foreground", "--quiet", "--config-net", "--no-map-gw", *closed,
            "--dns-forward", _PASTA_RESOLVER, "--pid", "/proc/self/fd/{ready}", "{pid}",
        )  # fmt: skip
        return NetworkHelper(Companion(argv), _PASTA_RESOLVER)
    return None
