"""What a bundle holds beside the model: licences, golden tokens, sampling defaults, a README."""

from __future__ import annotations

import json
import platform
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .bundle import canonical_json
from .quantize.store import QuantizedCheckpoint
from .source import Source

TOOLS = ("slimport", "torch", "transformers", "peft", "numpy", "numba", "gguf", "xllamacpp")
SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def copy_licenses(source: Source, texts: list[Path], folder: Path) -> list[str]:
    """Copy the licences of base, adapters and example texts; returns their names in `folder`.

    A text's licence is a LICENSE file beside it. Where a licence is missing nothing is copied, and
    the manifest shows it by its absence.
    """
    wanted = {"base": source.checkpoint.license_files()}
    for entry, _ in source.adapters:
        wanted[f"adapter-{entry.name}"] = _licenses_in(entry.path)
    wanted["texts"] = sorted({file for text in texts for file in _licenses_in(text.parent)})
    copied = []
    for owner, files in wanted.items():
        for file in files:
            target = folder / "licenses" / f"{owner}-{file.name}"
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)
            copied.append(target.name)
    return copied


def _licenses_in(folder: Path) -> list[Path]:
    names = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*")
    return sorted(path for name in names for path in folder.glob(name) if path.is_file())


def write_tokenizer_notes(source: Source, golden: dict[str, Any] | None, folder: Path) -> None:
    """tokenizer/generation.json (sampling defaults, stops) and tokenizer/golden.json."""
    target = folder / "tokenizer"
    target.mkdir()
    tokenizer = source.tokenizer
    notes = {
        "schema": "slimport.generation/1",
        "sampling": sampling(source),
        "eos_ids": list(tokenizer.eos_ids),
        "stop_strings": [tokenizer.decode([token]) for token in tokenizer.eos_ids],
        "chat_template": tokenizer.chat_template,
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


def inputs(source: Source, quantized: QuantizedCheckpoint) -> dict[str, Any]:
    """Names and digests of all that went in; never a local path or a host name."""
    return {
        "model": {"name": source.checkpoint.name, "digest": quantized.origin.base},
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
    }


def tools() -> dict[str, str]:
    """Versions of what the bytes depend on."""
    return {"python": platform.python_version()} | {name: version(name) for name in TOOLS}
