"""`kiln doctor`: what works here, and if not, why and what to do."""

import json
from dataclasses import asdict, dataclass

import click

from kiln.build.events import BuilderInfo, Failure, Finished
from kiln.build.model import BuildOptions, BuildRequest, CacheUse, Constraints
from kiln.build.service import BuildHost, Capabilities
from kiln.cli import exits
from kiln.cli.asyncs import run_async
from kiln.cli.command import kiln_command
from kiln.cli.sanitize import one_line
from kiln.cli.session import opened_session
from kiln.cli.settings import Settings
from kiln.cli.stores import opened
from kiln.cli.units import shown_size
from kiln.errors import KilnError


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at. `state` is `ok`, `weaker` (works, but short of the contract) or `fails`."""

    state: str
    what: str
    text: str


@kiln_command("doctor")
@click.pass_context
def command(context: click.Context) -> int:
    """Look at store and builder, and run a small build. Exit code 0 where builds work."""
    settings = Settings.of(context)

    async def main() -> int:
        findings = await _examined(settings)
        if settings.json:
            click.echo(json.dumps([asdict(finding) for finding in findings]))
        else:
            for finding in findings:
                click.echo(one_line(f"{finding.state:6}  {finding.what}: {finding.text}"))
        return exits.FAILED if any(finding.state == "fails" for finding in findings) else exits.OK

    return run_async(main())


async def _examined(settings: Settings) -> list[Finding]:
    findings = []
    try:
        async with opened(settings.store) as store:
            store.local.require_writable()
            findings.append(Finding("ok", "store", f"{settings.store}, {store.castore.scheme.name}"))
    except KilnError as error:
        return [Finding("fails", "store", str(error))]
    try:
        async with opened_session(settings) as session:
            capabilities = await session.host.capabilities()
            findings += _described(settings.builder, capabilities)
            findings.append(await _tried(session.host, capabilities))
    except KilnError as error:
        findings.append(Finding("fails", "builder", str(error)))
    return findings


def _described(url: str, capabilities: Capabilities) -> list[Finding]:
    systems = ", ".join(capabilities.systems)
    findings = [Finding("ok", "builder", f"{url}, kiln {capabilities.version}, builds for {systems or 'no system'}")]
    for builder in capabilities.builders:
        findings += _weaknesses(builder)
    maxima = capabilities.maxima
    if maxima.memory_bytes:
        findings.append(Finding("ok", "memory", f"{shown_size(maxima.memory_bytes)} for all builds together"))
    return findings


def _weaknesses(builder: BuilderInfo) -> list[Finding]:
    findings = [Finding("weaker", name, why) for name, why in sorted(builder.weaker.items())]
    if builder.shell_digest is None:
        advice = (
            "builds cannot ask for /bin/sh: install a static shell (on Debian, busybox-static) or give one by --shell"
        )
        findings.append(Finding("weaker", "shell", advice))
    return findings


async def _tried(host: BuildHost, capabilities: Capabilities) -> Finding:
    """A build that needs nothing: without a shell, that its program is not found is all that can be had."""
    if not capabilities.systems:
        return Finding("fails", "build", "this builder runs no builds")
    has_shell = any(builder.shell_digest is not None for builder in capabilities.builders)
    request = BuildRequest(
        command=("/bin/sh", "-c", "echo works > it") if has_shell else ("/nothing",),
        working_dir="build",
        scratch_paths=("build",),
        outputs=("build/it",) if has_shell else (),
        constraints=Constraints(system=capabilities.systems[0], provide_bin_sh=has_shell),
    )
    options = BuildOptions(cache=CacheUse.BYPASS, cancel_on_disconnect=True, keep_on_failure_s=0.0)
    build_id = await host.submit(request, options)
    async with host.watch(build_id, recorded_only=True) as events:
        async for event in events:
            if isinstance(event.body, Finished):
                return _judged(event.body, has_shell=has_shell)
    return Finding("fails", "build", "its events ended without a verdict")


def _judged(finished: Finished, *, has_shell: bool) -> Finding:
    verdict = finished.verdict
    if isinstance(verdict, Failure) and (has_shell or verdict.reason.name != "COMMAND_FAILED"):
        return Finding("fails", "build", f"{verdict.reason.name.lower()}: {verdict.message}")
    return Finding("ok", "build", "a small one ran")
