# ruff: noqa: INP001  A script, part of no package.
"""Generate the Python modules of all .proto files here: `python proto/generate.py src/kiln/protos`.

The .proto files carry the names that peers know them by (`snix/castore/protos/castore.proto`), which reflection shows
and descriptors are registered under; the Python modules live below the package `kiln.protos` all the same. So the
generated import statements, and only those, are rewritten. The same inputs and pinned tools give the same bytes.
"""

import importlib.resources
import os
import re
import shutil
import sys
from pathlib import Path

from grpc_tools import protoc  # type: ignore[import-untyped]  # It has none.

HERE = Path(__file__).resolve().parent
PACKAGE = "kiln.protos"
ROOTS = "|".join(sorted(path.name for path in HERE.iterdir() if path.is_dir()))

_IMPORT = re.compile(rf"^(\s*)from ({ROOTS})\.", re.MULTILINE)


def generate(out: Path) -> None:
    """Replace `out` by what the .proto files say. Raises SystemExit with protoc's status where they do not parse."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    sources = sorted(path.relative_to(HERE).as_posix() for path in HERE.rglob("*.proto"))
    scripts = Path(sys.executable).parent  # The mypy plugins stand beside the interpreter of their environment.
    os.environ["PATH"] = f"{scripts}{os.pathsep}{os.environ['PATH']}"
    well_known = importlib.resources.files("grpc_tools") / "_proto"
    for plugins, names in (
        (("python", "mypy"), sources),
        (("grpc_python", "mypy_grpc"), [name for name in sources if "\nservice " in (HERE / name).read_text()]),
    ):
        flags = [f"--{plugin}_out={out}" for plugin in plugins]
        if status := protoc.main(["protoc", f"-I{HERE}", f"-I{well_known}", *flags, *names]):
            raise SystemExit(status)
    for path in sorted(out.rglob("*.py*")):
        path.write_text(_IMPORT.sub(rf"\1from {PACKAGE}.\2.", path.read_text()))
    for folder in [out, *sorted(path for path in out.rglob("*") if path.is_dir())]:
        named = folder.relative_to(out).as_posix()
        about = "Generated from proto/ by proto/generate.py; never edited." if named == "." else f"Generated: {named}."
        (folder / "__init__.py").write_text(f'"""{about}"""\n')


if __name__ == "__main__":
    generate(Path(sys.argv[1]).resolve())
