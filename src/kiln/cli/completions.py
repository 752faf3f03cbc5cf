"""`kiln completions`: the script that teaches a shell kiln's commands and options."""

import click
from click.shell_completion import get_completion_class

from kiln.cli import exits
from kiln.cli.command import kiln_command

_SHELLS = ("bash", "zsh", "fish")


@kiln_command(
    "completions", epilog="For bash:\n\n\b\n  kiln completions bash > ~/.local/share/bash-completion/completions/kiln"
)
@click.argument("shell", type=click.Choice(_SHELLS))
@click.pass_context
def command(context: click.Context, shell: str) -> int:
    """Print the completion script for SHELL."""
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(context.find_root().command, {}, "kiln", "_KILN_COMPLETE").source())
    return exits.OK
