"""Real Nix, where it is installed, over a store of its own."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from bench.bwrap_side import found

_OPTIONS = {
    "sandbox": "true",
    "sandbox-fallback": "false",
    "substitute": "false",
    "build-users-group": "",  # Builds as whoever runs it: root here, in a user namespace.
    "require-sigs": "false",
}


def nix_is_there() -> bool:
    """Whether Nix is installed and may build: it needs root for its sandbox."""
    return shutil.which("nix-store") is not None and os.geteuid() == 0


@dataclass(frozen=True, slots=True)
class Nix:
    """A store below `root`, in which builds see /nix/store."""

    root: str

    def chain(self, scripts: Sequence[str]) -> list[str]:
        """Derivations that each run one script, after the one before, whose output is `$prev`. Returns the last."""
        return self._instantiate(
            "let step = prev: number: mk (toString number) (builtins.elemAt scripts number) { inherit prev; }; in "
            f"builtins.foldl' step null (builtins.genList (number: number) {len(scripts)})",
            scripts,
        )

    def independent(self, scripts: Sequence[str], inputs: Sequence[str] = ()) -> list[str]:
        """A derivation for each script, with `inputs` (paths of the store) as `$inputs`."""
        listed = " ".join(f'(builtins.storePath "{path}")' for path in inputs)
        return self._instantiate(f"map (script: mk script script {{ inputs = [{listed}]; }}) scripts", scripts)

    def realise(self, derivations: Sequence[str], *, jobs: int) -> None:
        """Build them all."""
        self._run("nix-store", "--realise", *derivations, "--max-jobs", str(jobs))

    def add(self, *paths: str) -> list[str]:
        """Import files or directories; returns their paths in the store."""
        return self._run("nix-store", "--add", *paths).split()

    def _instantiate(self, body: str, scripts: Sequence[str]) -> list[str]:
        listed = " ".join(f"''{script}''" for script in scripts)
        expression = (
            f"let scripts = [{listed}]; mk = name: script: more: derivation ({{ "
            'name = "bench-${builtins.hashString "sha256" name}"; system = builtins.currentSystem; '
            'builder = "/bin/sh"; args = ["-c" script]; } // more); in ' + body
        )
        return self._run("nix-instantiate", "--expr", expression).split()

    def _run(self, program: str, *arguments: str) -> str:
        options = [word for name, value in self._options().items() for word in ("--option", name, value)]
        done = subprocess.run(
            [found(program), "--store", self.root, *arguments, *options],
            capture_output=True,
            text=True,
            check=False,
            # Neither the user's configuration nor a daemon has a say.
            env={"PATH": os.environ.get("PATH", os.defpath), "HOME": self.root, "NIX_CONF_DIR": self.root},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    @staticmethod
    def _options() -> dict[str, str]:
        return {**_OPTIONS, "sandbox-paths": f"/bin/sh={found('busybox')}"}
