"""Looking without changing: what a model, a bundle or a GGUF file is, and what is installed."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from . import bundle, log
from .architectures import decoder_config
from .errors import DependencyMissing
from .export.coreai import sdk as coreai
from .export.gguf import reader
from .export.qnn import sdk as qnn
from .quantize.plan import Plan, grid_summary
from .recipe import Recipe
from .shipping import containers
from .shipping.source import open_source, plan_of

_LIBRARIES = ("torch", "transformers", "peft", "safetensors", "tokenizers", "numba", "gguf", "rich")
_LONG = ("config", "digests", "errors")  # of a manifest: one line per weight


def inspect(recipe: Recipe, *, offline: bool = False) -> dict[str, Any]:
    """What `recipe.model` is: a bundle, a .gguf file, or a model with its adapters and plan.

    Raises:
        SlimportError: as opening it does.
    """
    path = Path(recipe.model) if recipe.model else None
    if path and path.suffix == ".gguf":
        return _gguf(path)
    if path and (path / bundle.MANIFEST).is_file():
        return _bundle(path)
    return _model(recipe, offline)


def _bundle(folder: Path) -> dict[str, Any]:
    manifest = bundle.read_manifest(folder)
    shown = {key: value for key, value in manifest.items() if key not in _LONG}
    shown |= {"schema": "slimport.inspect/1", "kind": "bundle"}
    if "plan" in manifest:  # one whose packing failed has none
        plan = Plan.from_json(manifest["plan"], decoder_config(manifest.get("config", {})))
        shown["plan"] = plan.to_json() | {"summary": grid_summary(plan)}
    return shown


def _model(recipe: Recipe, offline: bool) -> dict[str, Any]:
    source = open_source(recipe, offline=offline)
    plan = plan_of(recipe, source)
    decoder = source.decoder
    tokenizer = source.tokenizer
    return {
        "schema": "slimport.inspect/1",
        "kind": "model",
        "name": source.name,
        "decoder": asdict(decoder) | {"family": decoder.family.model_type},
        "parameters": plan.parameters,
        "tokenizer": {
            "kind": tokenizer.kind,
            "pre": tokenizer.pre,
            "eos_ids": list(tokenizer.eos_ids),
            "adds_bos": tokenizer.adds_bos,
            "chat_template": tokenizer.chat_template is not None,
        },
        "adapters": [
            {
                "name": entry.name,
                "kind": adapter.kind,
                "weights": len(adapter.deltas),
                "scale": entry.scale,
                "base": adapter.base_name,
                "separate": adapter.why_not_separate is None,
            }
            for entry, adapter in source.adapters
        ],
        **_planned(recipe, plan),
    }


def _planned(recipe: Recipe, plan: Plan) -> dict[str, Any]:
    """The plan; of a recipe whose grids are searched the limits, as there is none yet."""
    if recipe.fit.is_wanted:
        return {"fit": recipe.fit.limits}
    return {"plan": plan.to_json() | {"summary": grid_summary(plan)}}


def _gguf(path: Path) -> dict[str, Any]:
    file = reader.open_gguf(path)
    types = Counter(tensor.type.name for tensor in file.tensors.values())
    scalars = {k: v for k, v in file.metadata.items() if isinstance(v, str | int | float)}
    return {
        "schema": "slimport.inspect/1",
        "kind": "gguf",
        "bytes": path.stat().st_size,
        "tensors": dict(sorted(types.items())),
        "metadata": {key: value for key, value in scalars.items() if len(str(value)) < 200},
    }


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that a machine needs; `cure` is the command that brings it."""

    name: str
    ok: bool
    found: str
    cure: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def doctor() -> list[Check]:
    """What is installed, and which containers work here."""
    checks = [Check("python", sys.version_info >= (3, 11), platform.python_version())]
    failures = _import_failures()
    checks += [_library(name, failures.get(name)) for name in _LIBRARIES]
    checks += [_container(name) for name in containers.NAMES if name not in _EXTRAS]
    return [*checks, *(_extra(name, *extra) for name, extra in _EXTRAS.items())]


def _container(name: str) -> Check:
    try:
        return Check(f"container {name}", True, containers.load(name).runtime.version())
    except DependencyMissing as error:
        return Check(f"container {name}", False, error.why, error.cure)


_EXTRAS: Mapping[str, tuple[Callable[[], None], str]] = {
    "coreai": (coreai.require, f"{coreai.CORE} {coreai.VERSIONS[coreai.CORE]}"),
    "qnn": (qnn.require, f"{qnn.DISTRIBUTION} {qnn.VERSION}"),
}


def _extra(name: str, require: Callable[[], None], found: str) -> Check:
    """What is missing of an extra stops no other container."""
    try:
        require()
        return Check(f"container {name}", True, found)
    except DependencyMissing as error:
        return Check(f"container {name}", True, "optional: not usable here", error.cure)


def _library(name: str, failure: str | None) -> Check:
    cure = f"pip install -c constraints.txt {name}"
    if failure is not None:
        return Check(name, False, failure, cure)
    try:
        return Check(name, True, version(name))
    except PackageNotFoundError as error:
        return Check(name, False, str(error), cure)


def _import_failures() -> dict[str, str]:
    """Why libraries do not import: tried in a child, because some print to the terminal."""
    command = [sys.executable, "-P", "-c", _IMPORT, *_LIBRARIES]
    done = subprocess.run(command, capture_output=True)
    log.say("libraries were imported", done.stderr)
    try:
        found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
        ended = f"importing it ended with status {done.returncode}"
        return dict.fromkeys(_LIBRARIES, said[-1] if said else ended)
    return found


_IMPORT = """
import importlib, json, sys
found = {}
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except (ImportError, OSError) as error:
        found[name] = str(error)
print(json.dumps(found))
"""
