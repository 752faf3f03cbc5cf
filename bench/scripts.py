"""Shell scripts for builds."""

import secrets


def new_scripts(count: int, out: str) -> list[str]:
    """Scripts that make `out`, and that nobody has run before: no cache knows them."""
    return [f"echo {secrets.token_hex(8)} > {out}" for _ in range(count)]
