"""`kiln serve`: builder and store for other processes and hosts."""

import asyncio
import json
import logging
import os

import click

from kiln.cli import exits
from kiln.cli.asyncs import run_async
from kiln.cli.command import kiln_command
from kiln.cli.interrupts import Interrupts, interrupts
from kiln.cli.sanitize import one_line
from kiln.cli.session import opened_session
from kiln.cli.settings import Settings
from kiln.cli.units import Duration
from kiln.errors import Usage
from kiln.server.listen import Security, Tls, default_listen, parse_listen
from kiln.server.serve import Serving, serving

_DRAIN_S = 3600.0


@kiln_command("serve")
@click.option(
    "--listen",
    metavar="URL",
    multiple=True,
    help="unix:///PATH, http://HOST:PORT or https://HOST:PORT; repeatable (default: a socket of this user's).",
)
@click.option("--tls-cert", metavar="FILE", help="The certificate for https, PEM.")
@click.option("--tls-key", metavar="FILE", help="Its key, PEM.")
@click.option("--tls-client-ca", metavar="FILE", help="Only clients with a certificate of this authority, PEM.")
@click.option("--token-file", metavar="FILE", help="Only https clients that send the token in this file.")
@click.option("--insecure-tcp", is_flag=True, help="Allow http://, and https:// to anybody.")
@click.option("--strict", is_flag=True, help="Refuse requests whose outputs are not sorted, as Snix does.")
@click.option(
    "--drain",
    "drain_s",
    type=Duration(),
    default=str(int(_DRAIN_S)),
    help="How long running builds may go on once the server is asked to stop (default: 1h).",
)
@click.pass_context
def command(
    context: click.Context,
    *,
    listen: tuple[str, ...],
    tls_cert: str | None,
    tls_key: str | None,
    tls_client_ca: str | None,
    token_file: str | None,
    insecure_tcp: bool,
    strict: bool,
    drain_s: float,
) -> int:
    """Offer builder and store by gRPC: kiln's own protocol, Snix's or tvix's, health and reflection.

    Prints the URLs for --builder and --store once they answer. SIGTERM or Ctrl-C: no new builds, those that run may
    end; the second one cancels them.
    """
    settings = Settings.of(context)
    if (tls_cert is None) != (tls_key is None):
        raise Usage("--tls-cert and --tls-key go together")
    if tls_client_ca is not None and tls_cert is None:
        raise Usage("--tls-client-ca goes with --tls-cert and --tls-key")
    tls = Tls(tls_cert, tls_key, tls_client_ca) if tls_cert is not None and tls_key is not None else None
    security = Security(tls, token_file, insecure_tcp)
    addresses = [parse_listen(url, security) for url in listen or [default_listen(os.environ)]]

    async def main() -> int:
        with interrupts() as interrupted:
            async with opened_session(settings) as session:
                castore = session.far or session.store.castore
                async with serving(session.host, castore, addresses, security, log=_log(), strict=strict) as server:
                    _announce(server, settings)
                    await _until_stopped(server, interrupted, drain_s=drain_s)
        return exits.OK

    return run_async(main())


def _announce(server: Serving, settings: Settings) -> None:
    if settings.json:
        click.echo(json.dumps({"urls": server.urls}))
        return
    for url in server.urls:
        click.echo(url)


async def _until_stopped(server: Serving, interrupted: Interrupts, *, drain_s: float) -> None:
    """Serve until a signal says to stop, then until the builds have ended; the second signal ends them."""
    stop, hurry = asyncio.Event(), asyncio.Event()
    interrupted.first = stop.set
    await stop.wait()
    interrupted.first = hurry.set
    click.echo("kiln: stopping once the running builds have ended; asked again, they are cancelled", err=True)
    await server.drain(grace_s=drain_s, hurry=hurry)


class _Lines(logging.Formatter):
    """What a client sent may stand in a traceback: control characters are escaped in each of its lines."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(f"kiln: {one_line(line)}" for line in super().format(record).split("\n"))


def _log() -> logging.Logger:
    """For what a client is not told: surprises, with their tracebacks, on stderr."""
    log = logging.getLogger("kiln.server")
    handler = logging.StreamHandler()
    handler.setFormatter(_Lines())
    log.addHandler(handler)
    log.propagate = False
    return log
