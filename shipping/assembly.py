"""What a bundle holds beside the model: licences, golden tokens, sampling defaults, a README."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..bundle import canonical_json, sha256
from ..checkpoint import license_files
from ..export.container import Container
from ..quantize.plan import Plan
from ..quantize.store import QuantizedCheckpoint
from ..quantize.windows import Windows
from ..settings import format_size
from ..targets.target import Target
from .source import Source

TOOLS = ("slimport", "torch", "transformers", "peft", "numpy", "numba", "gguf", "xllamacpp")
_NFC = (
    "\nText must be in Unicode's NFC: the model's tokenizer normalizes it and llama.cpp does not"
    " (`java.text.Normalizer` does)."
)
SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True)
class Files:
    """What goes onto the device."""

    model: Path
    adapters: tuple[Path, ...]

    @classmethod
    def of(cls, folder: Path, container: Container, source: Source) -> Files:
        """Those of a finished bundle of this source."""
        names = [entry.name for entry, _ in source.adapters] if source.mode == "separate" else []
        suffix = Path(container.FILE).suffix
        return cls(
            folder / container.FILE,
            tuple(folder / "adapters" / f"{name}{suffix}" for name in names),
        )


def copy_licenses(source: Source, texts: list[Path], folder: Path) -> None:
    """Copy the licences of base, adapters and example texts to licenses/.

    A text's licence is a LICENSE file beside it. Where a licence is missing nothing is copied, and
    the manifest shows it by its absence.
    """
    wanted = {"base": source.checkpoint.license_files()}
    for entry, _ in source.adapters:
        wanted[f"adapter-{entry.name}"] = license_files(entry.path)
    for number, place in enumerate(dict.fromkeys(text.parent for text in texts), 1):
        wanted["texts" if number == 1 else f"texts-{number}"] = license_files(place)
    for owner, files in wanted.items():
        for file in files:
            target = folder / "licenses" / f"{owner}-{file.name}"
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)


def write_tokenizer_notes(source: Source, golden: dict[str, Any] | None, folder: Path) -> None:
    """tokenizer/generation.json (sampling defaults, stops) and tokenizer/golden.json."""
    target = folder / "tokenizer"
    target.mkdir()
    tokenizer = source.tokenizer
    notes = {
        "schema": "slimport.generation/1",
        "sampling": sampling(source),
        "eos_ids": list(tokenizer.eos_ids),
        "stop_strings": stops(source),
        "chat_template": tokenizer.chat_template,
        "normalization": "NFC" if tokenizer.scheme.nfc else None,
    }
    (target / "generation.json").write_bytes(canonical_json(notes))
    if golden is not None:
        (target / "golden.json").write_bytes(canonical_json(golden))


def sampling(source: Source) -> dict[str, Any]:
    """The defaults of the model's makers, from generation_config.json; empty without one."""
    path = source.checkpoint.folder / "generation_config.json"
    if not path.is_file():
        return {}
    stated = json.loads(path.read_text(encoding="utf-8"))
    return {key: stated[key] for key in SAMPLING if stated.get(key) is not None}


def inputs(
    source: Source, quantized: QuantizedCheckpoint, judged_on: Mapping[str, Windows]
) -> dict[str, Any]:
    """Names and digests of all that went in; never a local path or a host name."""
    return {
        "model": {
            "name": source.checkpoint.name,
            "revision": source.checkpoint.revision,
            "digest": quantized.origin.base,
        },
        "tokenizer": {path.name: f"sha256:{sha256(path)}" for path in source.tokenizer.files},
        "adapters": [
            {
                "name": entry.name,
                "kind": adapter.kind,
                "scale": entry.scale,
                "mode": source.mode,
                "digest": adapter.digest(),
            }
            for entry, adapter in source.adapters
        ],
        "calibration": quantized.calibration,
        "judged_on": {name: windows.digest for name, windows in judged_on.items()},
    }


def tools() -> dict[str, str]:
    """Versions of what the bytes depend on."""
    return {"python": platform.python_version()} | {name: version(name) for name in TOOLS}


def write_readme(
    container: Container,
    target: Target,
    source: Source,
    plan: Plan,
    report: Mapping[str, Any] | None,
    files: Files,
    folder: Path,
) -> None:
    """README.md: how to load this bundle on the device, with code; `report` None: not judged."""
    separate = bool(files.adapters)
    build, reason = container.minimum_runtime(source.decoder, plan, source.tokenizer, separate)
    settings = sampling(source)
    fields = {
        "name": source.name,
        "target": target.title,
        "model": files.model.name,
        "size": format_size(files.model.stat().st_size),
        "minimum_build": build,
        "minimum_reason": reason,
        "judged": judged(report),
        "context": str(target.context_length),
        "sampling": ", ".join(f"{key} {value}" for key, value in settings.items()) or "none",
        "stops": ", ".join(repr(stop) for stop in stops(source)),
        "normalization": _NFC if source.tokenizer.scheme.nfc else "",
    }
    names = [path.relative_to(folder).as_posix() for path in files.adapters]
    (folder / "README.md").write_text(container.readme(fields, names), encoding="utf-8")


def judged(report: Mapping[str, Any] | None) -> str:
    """What is known of accuracy and memory, in a few sentences."""
    if report is None:
        return "It was not judged (--no-validate): accuracy and memory are not known."
    footprint, accuracy = report["footprint"], report["accuracy"]["held_out"]
    total, mapped = footprint["memory_bytes"], footprint["memory"]["mapped"]
    return (
        f"Judged with {report['runtime']}: mean KL {accuracy['kl_mean']:.4g} nats and top-1"
        f" agreement {accuracy['top1']:.1%} with full precision on held-out text. It wants"
        f" {format_size(total)} of memory at a context of {footprint['context_length']} tokens:"
        f" {format_size(mapped)} of it is the mapped file, which Android may drop and read again;"
        " the rest is anonymous."
    )


def stops(source: Source) -> list[str]:
    """The texts of the tokens that end an answer."""
    tokenizer = source.tokenizer
    return [tokenizer.library.id_to_token(token) for token in tokenizer.eos_ids]
