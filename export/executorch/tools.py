"""ExecuTorch's own schemas, as the Python code that flatbuffers' compiler makes of them.

The package brings the schemas and the compiler along. It is not imported, which takes seconds; and
the compiler, which does not check what it reads, is never given a file that anybody made.
"""

from __future__ import annotations

import shutil
import subprocess
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

from ...errors import DependencyMissing

PROGRAM = "schema/program.fbs"
DATA = "extension/flat_tensor/serialize/flat_tensor.fbs"
XNNPACK = "backends/xnnpack/serialization/runtime_schema.fbs"  # by which the runtime reads
VULKAN = "backends/vulkan/serialization/schema.fbs"
_COMPILER = "data/bin"
_SECONDS = 60


@cache
def generated(schema: str) -> Any:
    """One module with the readers of all tables of a schema: PROGRAM, DATA, XNNPACK, VULKAN.

    Raises:
        DependencyMissing: ExecuTorch is not installed, or its compiler does not run.
    """
    root = _root(schema)
    name = f"{Path(schema).stem}_generated"
    compiler = shutil.which("flatc", path=str(root / _COMPILER))
    if compiler is None:
        raise _missing(f"there is no flatc in {root / _COMPILER}")
    with TemporaryDirectory() as folder:
        command = [compiler, "--python", "--gen-onefile", "--gen-all", "-o", folder]
        try:
            subprocess.run(
                [*command, str(root / schema)], check=True, capture_output=True, timeout=_SECONDS
            )
            code = (Path(folder) / f"{name}.py").read_text(encoding="utf-8")
        except (OSError, subprocess.SubprocessError) as error:
            raise _missing(f"its compiler of schemas fails: {error}") from error
    module = ModuleType(name)
    exec(compile(code, f"{name}.py", "exec"), module.__dict__)
    return module


def _root(schema: str) -> Path:
    """The folder of the package that has the schema."""
    spec = find_spec("executorch")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(folder) / schema).is_file():
            return Path(folder)
    raise _missing(f"no package executorch with {schema} is installed")


def _missing(why: str) -> DependencyMissing:
    return DependencyMissing(
        "ExecuTorch programs cannot be read back",
        why,
        "pip install -c constraints.txt executorch; then run `slimport doctor`",
    )
