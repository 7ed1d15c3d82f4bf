"""Graphs into context binaries, each in a process of its own, and what must hold of them.

QNN writes the path of a graph into the names of its context, and a second one in a process is
called otherwise: the same bytes come from a fresh process and fixed relative paths alone.
"""

from __future__ import annotations

import json
import mmap
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ... import log
from ...errors import EnvironmentFailed, ValidationFailed
from . import sdk
from .chips import Chip
from .delegation import delegated

TRACE = "trace"
_WORKER = "slimport.export.qnn.compiler"
_MADE_FOR = re.compile(rb"soc_type=(\w+);arch=(\d+);")
_AGAIN = "report it with the model's config.json; --container gguf may hold this model"


def binary_of(name: str) -> str:
    """The file that QNN puts beside the context model `name`.onnx."""
    return f"{name}_qnn.bin"


def compile_graph(folder: Path, name: str, graph: str, chip: Chip) -> list[Path]:
    """Make `name`.onnx and its binary in `folder` from the graph at the relative path `graph`.

    Raises:
        DependencyMissing: the compiler is not installed.
        ValidationFailed: it refuses the graph, would leave a part of it to the CPU, or makes a
            binary for another chip. Nothing of it is left in `folder`.
    """
    sdk.require()
    made = [folder / f"{name}.onnx", folder / binary_of(name)]
    try:
        _run(folder, {"name": name, "graph": graph, "chip": chip._asdict()})
        found = delegated(folder / graph, made[0])
        if found.npu_nodes < found.nodes or found.npu_weight_bytes < found.weight_bytes:
            raise ValidationFailed(
                f"{name}: a part of the graph would run on the CPU",
                f"the NPU took {found.npu_nodes} of {found.nodes} nodes and"
                f" {found.npu_weight_bytes} of {found.weight_bytes} bytes of constants",
                _AGAIN,
            )
        require_chip(made[1], chip)
    except BaseException:  # a refused session leaves its files, and they would load
        for path in made:
            path.unlink(missing_ok=True)
        raise
    finally:
        shutil.rmtree(folder / TRACE, ignore_errors=True)
    return made


def require_chip(binary: Path, chip: Chip) -> None:
    """Read in a context binary itself which chip it is for.

    QNN compiles for v68 where it does not know what was asked for, and its metadata repeats the
    question, not the answer.

    Raises:
        ValidationFailed: it is for another chip, or does not say.
    """
    with binary.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        found = {match.groups() for match in _MADE_FOR.finditer(mapped)}
    if found != {(chip.soc.encode(), str(chip.hexagon).encode())}:
        words = ", ".join(f"{soc.decode()} v{arch.decode()}" for soc, arch in sorted(found))
        raise ValidationFailed(
            f"{binary.name} is not for {chip.soc} (Hexagon v{chip.hexagon})",
            f"it says that it is for {words or 'no chip'}",
            "install the tested release: "
            f"pip install {sdk.DISTRIBUTION}=={sdk.VERSION}, and export again",
        )


def _run(folder: Path, request: Mapping[str, Any]) -> None:
    """One compilation in a child process, with `folder` as its working directory."""
    command = [sys.executable, "-P", "-m", _WORKER, json.dumps(request)]
    done = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True)
    name = request["name"]
    log.say(f"compiler of {name} ended with status {done.returncode}", done.stdout + done.stderr)
    if done.returncode == 0:
        return
    said = done.stderr.decode("utf-8", "replace").strip().splitlines()
    if done.returncode == -9:
        raise EnvironmentFailed(
            f"the compiler of {name} was killed by the system",
            "most likely memory ran out: it takes about 20 MB for each layer of a small model",
            "free memory, or use a larger machine",
        )
    why = said[-1] if said else f"it ended with status {done.returncode} and said nothing"
    raise ValidationFailed(
        f"{name}: Qualcomm's compiler does not put the whole graph on the NPU",
        "; ".join(filter(None, [why, _unsupported(folder / TRACE)])),
        _AGAIN,
    )


def _unsupported(trace: Path) -> str:
    """The operators that the NPU did not take, as the compiler's trace names them."""
    try:
        content = json.loads((trace / "qnn_op_trace.json").read_text(encoding="utf-8"))
        nodes = content["unsupported_nodes"]
        words = [f"{node['op_type']} {node['node_name']}" for node in nodes]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return f"not taken: {', '.join(words[:4])}" if words else ""
