"""ExecuTorch's own runner of language models, which apps call: its greedy text beside ours.

It takes a text and prints one. Part of the child process behind `executorch`.
"""

from __future__ import annotations

import ctypes
import os
import string
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from ...errors import ValidationFailed

_END = b"\nPyTorchObserver "  # what it prints behind an answer, figures follow


def require_same_text(
    module: Any,
    runner: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    context: int,
) -> int:
    """How many prompts it was asked to continue: those whose text becomes their ids again.

    Args:
        module, runner: as `load_runner` gives them.
        tokenizer: ExecuTorch's, which the runner has too.
        answers: tokens after each prompt, without an end.
        context: tokens that the program has room for.

    Raises:
        ValidationFailed: it prints another text than these tokens are.
    """
    asked = 0
    for prompt, tokens in zip(prompts, answers, strict=True):
        count = min(len(tokens), context - len(prompt))
        text = _prompt(tokenizer, prompt)
        if count < 1 or text is None:
            continue
        settings = module.GenerationConfig(
            echo=False, max_new_tokens=count, temperature=0.0, num_bos=0, num_eos=0
        )
        runner.reset()
        printed = _printed(partial(runner.generate, text, settings))
        answer = printed.partition(_END)[0].decode("utf-8", "replace")
        expected, whole = _text(tokenizer, tokens[:count], as_printed=True)
        if (answer != expected) if whole else not answer.startswith(expected):
            raise ValidationFailed(
                "ExecuTorch's own runner generates another text than the program",
                f"after {text[-40:]!r} it says {answer[:60]!r}, the program {expected[:60]!r}",
                "export again; if it stays, report it with the model's config.json",
            )
        asked += 1
    return asked


def load_runner(
    package: Path, file: Path, tokenizer: Path, weights: Path | None
) -> tuple[Any, Any]:
    """The bindings' module, and a runner with a program open.

    The package's own `__init__` imports the exporter, which takes seconds.
    """
    (place,) = (package / "extension/llm/runner").glob("_llm_runner*.so")
    spec = spec_from_file_location("_llm_runner", place)
    assert spec is not None and spec.loader is not None, "the file is there"
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    files = [str(path) for path in (file, tokenizer, weights) if path is not None]
    return module, module.TextLLMRunner(*files)


def _prompt(tokenizer: Any, ids: Sequence[int]) -> str | None:
    """A text that becomes these ids; None: there may be none."""
    text, _ = _text(tokenizer, ids)
    for wanted in (text, text.replace(" ", "", 1)):  # SentencePiece's puts a space before a text
        if list(tokenizer.encode(wanted)) == list(ids):
            return wanted
    return None


def _text(tokenizer: Any, ids: Sequence[int], as_printed: bool = False) -> tuple[str, bool]:
    """The text of these tokens, up to one that is a part of a character; whether that is all.

    `as_printed`: without control characters that stand alone, which the runner leaves out.
    """
    pieces: list[str] = []
    for token in ids:
        try:
            piece = tokenizer.decode(token)
        except UnicodeDecodeError:
            return "".join(pieces), False
        if not as_printed or len(piece) != 1 or piece in string.printable or ord(piece) > 127:
            pieces.append(piece)
    return "".join(pieces), True


def _printed(call: Callable[[], object]) -> bytes:
    """What native code prints while it is called."""
    flush, kept = ctypes.CDLL(None).fflush, os.dup(1)
    with tempfile.TemporaryFile() as file:
        flush(None)
        os.dup2(file.fileno(), 1)
        try:
            call()
        finally:
            flush(None)
            os.dup2(kept, 1)
            os.close(kept)
        file.seek(0)
        return file.read()
