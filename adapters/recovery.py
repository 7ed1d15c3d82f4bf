"""Adapters that repair what quantization took: each is made for one set of codes.

`slimport qat --train-only lora` writes one, with `recovery.json` beside peft's own files. Over its
codes it brings the base back to its own full precision, so that is what such a pair is judged by.
"""

from __future__ import annotations

import json
from pathlib import Path

from ..bundle import canonical_json
from ..errors import BadInput, UsageError

RECOVERY = "recovery.json"
SCHEMA = "slimport.recovery/1"


def recovered(folder: Path) -> str | None:
    """The weights digest of the codes that an adapter repairs; None: it is an ordinary one.

    Raises:
        BadInput: the file is damaged.
    """
    path = folder / RECOVERY
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["schema"] == SCHEMA and isinstance(found["weights_digest"], str):
            return str(found["weights_digest"])
        why = f"its schema is not {SCHEMA}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = f"{type(error).__name__}: {error}"
    raise BadInput(f"{path} cannot be read", why, "train the adapter again with `slimport qat`")


def write_recovery(folder: Path, weights_digest: str) -> None:
    """Say which codes the adapter in `folder` repairs."""
    content = {"schema": SCHEMA, "weights_digest": weights_digest}
    (folder / RECOVERY).write_bytes(canonical_json(content))


def refuse_other_codes(folder: Path, name: str, weights_digest: str) -> None:
    """Raise UsageError if the adapter in `folder` repairs other codes than these."""
    wanted = recovered(folder)
    if wanted not in (None, weights_digest):
        raise UsageError(
            f"the adapter {name} was trained for other codes",
            f"it repairs those of {wanted}, and these are {weights_digest}",
            "give the quantized checkpoint that it was written beside: --quantized FOLDER",
        )
