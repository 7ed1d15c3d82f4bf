"""Errors of runtimes, whose kinds are not public or not their own, as one of ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ...errors import ValidationFailed


@contextmanager
def refusals(what: str) -> Iterator[None]:
    """Raise ValidationFailed, `what` and the first line that the library says."""
    try:
        yield
    except Exception as error:
        plain = isinstance(error, RuntimeError) or type(error) is Exception  # as coremltools has it
        if not (plain or type(error).__module__.startswith("onnx")):
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        why, cure = f"it says: {lines[0]}", "export the files again from the model"
        raise ValidationFailed(what, why, cure) from error
