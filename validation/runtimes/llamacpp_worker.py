"""The child process behind `llamacpp`: one job on one file."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Sequence
from ctypes import c_float, c_int32, c_void_p
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import Unsupported
from ...quantize import ggml
from ...quantize.grid import Float32
from .. import worker
from ..logits import writer
from ..runtime import Speed
from .llamacpp_api import library, log_lines, refused
from .rss import gained, rss


class _Model:
    """A loaded file; the process ends after its one job, so nothing is freed."""

    def __init__(self, file: str, vocab_only: bool = False) -> None:
        self.lib, self.name = library(), Path(file).name
        params = self.lib.llama_model_default_params()
        params.vocab_only = vocab_only
        self.model = self.lib.llama_model_load_from_file(os.fsencode(file), params)
        if not self.model:
            raise refused(f"llama.cpp does not load {self.name}")
        self.vocab = self.lib.llama_model_get_vocab(self.model)
        self.vocab_size = int(self.lib.llama_vocab_n_tokens(self.vocab))

    def open(self, length: int, batch: int, kv_cache: str, threads: int) -> None:
        """Make the context: room for `length` tokens, decoded at most `batch` at a time."""
        params = self.lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = length, batch, min(batch, 512)
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = _cache_type(kv_cache)
        # Flash attention rounds to f16, which would hide what an f32 cache is asked to show.
        params.flash_attn_type = 0 if kv_cache == "f32" else -1
        self.context = self.lib.llama_init_from_model(self.model, params)
        if not self.context:
            raise refused(f"llama.cpp cannot run {self.name} with {length} tokens of context")
        self.batch = self.lib.llama_batch_init(batch, 0, 1)
        self.batch_size = batch

    def attach(self, adapter: str, scale: float) -> None:
        handle = self.lib.llama_adapter_lora_init(self.model, os.fsencode(adapter))
        if not handle:
            raise refused(f"llama.cpp does not load the adapter {Path(adapter).name}")
        handles, scales = (c_void_p * 1)(handle), (c_float * 1)(scale)
        if self.lib.llama_set_adapters_lora(self.context, handles, 1, scales):
            raise refused(f"llama.cpp does not apply the adapter {Path(adapter).name}")

    def clear(self) -> None:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)

    def decode(self, tokens: Sequence[int], start: int, all_logits: bool = False) -> None:
        """Feed at most `batch_size` tokens at positions from `start`."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for index, token in enumerate(tokens):
            batch.token[index], batch.pos[index] = token, start + index
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
            batch.logits[index] = all_logits or index == len(tokens) - 1
        status = self.lib.llama_decode(self.context, batch)
        if status:
            raise refused(f"llama.cpp cannot decode {len(tokens)} tokens (status {status})")

    def prompt(self, tokens: Sequence[int]) -> None:
        """Feed a whole prompt from position 0."""
        self.clear()
        for start in range(0, len(tokens), self.batch_size):
            self.decode(tokens[start : start + self.batch_size], start)

    def all_logits(self, count: int) -> Float32:
        """Logits of the last `decode`, float32 (count, vocabulary); valid until the next one."""
        pointer = self.lib.llama_get_logits(self.context)
        return np.ctypeslib.as_array(pointer, (count, self.vocab_size))

    def best(self) -> int:
        """The most likely next token."""
        pointer = self.lib.llama_get_logits_ith(self.context, -1)
        return int(np.ctypeslib.as_array(pointer, (self.vocab_size,)).argmax())

    def ends(self, token: int) -> bool:
        return bool(self.lib.llama_vocab_is_eog(self.vocab, token))

    def tokenize(self, text: str) -> list[int]:
        print(f"tokenizing {text[:80]!r}", file=sys.stderr)  # llama.cpp may abort on it
        raw = text.encode()
        ids = (c_int32 * (len(raw) + 8))()
        count = self.lib.llama_tokenize(self.vocab, raw, len(raw), ids, len(ids), False, True)
        if count < 0:
            raise refused(f"llama.cpp does not tokenize {text!r} (status {count})")
        return list(ids[:count])


def _cache_type(name: str) -> int:
    if name.upper() not in ggml.Type.__members__:
        raise Unsupported(
            f"KV cache type {name!r} is not supported",
            "llama.cpp caches keys and values in one of ggml's types",
            "choose f16, q8_0 or f32",
        )
    return ggml.Type[name.upper()]


def _logits(
    file: str,
    windows: list[list[int]],
    out: str,
    kv_cache: str,
    threads: int,
    adapter: str | None,
    scale: float,
) -> None:
    model = _Model(file)
    length = len(windows[0])
    # Logits of one batch stay under 64 MiB, whatever the vocabulary.
    batch = min(length, 512, max(32, 2**24 // model.vocab_size))
    model.open(length, batch, kv_cache, threads)
    if adapter is not None:
        model.attach(adapter, scale)
    with writer(Path(out), (len(windows), length, model.vocab_size)) as target:
        for window in worker.counted(windows, len(windows)):
            model.clear()
            for start in range(0, length, batch):
                tokens = window[start : start + batch]
                model.decode(tokens, start, all_logits=True)
                target.write(model.all_logits(len(tokens)).data)


def _tokenize(file: str, texts: list[str]) -> list[list[int]]:
    model = _Model(file, vocab_only=True)
    return [model.tokenize(text) for text in texts]


def _vocabulary(file: str) -> dict[str, Any]:
    model = _Model(file, vocab_only=True)
    template = model.lib.llama_model_chat_template(model.model, None)
    bos = int(model.lib.llama_vocab_bos(model.vocab))
    return {
        "size": model.vocab_size,
        "eog": [token for token in range(model.vocab_size) if model.ends(token)],
        "bos": None if bos < 0 else bos,
        "adds_bos": bool(model.lib.llama_vocab_get_add_bos(model.vocab)),
        "chat_template": None if template is None else template.decode(),
    }


def _generate(
    file: str,
    prompts: list[list[int]],
    max_tokens: int,
    kv_cache: str,
    threads: int,
    adapter: str | None,
    scale: float,
) -> list[tuple[list[int], bool]]:
    model = _Model(file)
    model.open(max(map(len, prompts)) + max_tokens, 512, kv_cache, threads)
    if adapter is not None:
        model.attach(adapter, scale)
    return [_greedy(model, prompt, max_tokens) for prompt in worker.counted(prompts, len(prompts))]


def _greedy(model: _Model, prompt: list[int], max_tokens: int) -> tuple[list[int], bool]:
    model.prompt(prompt)
    tokens: list[int] = []
    while len(tokens) < max_tokens:
        token = model.best()
        if model.ends(token):
            return tokens, True
        tokens.append(token)
        if len(tokens) < max_tokens:
            model.decode([token], len(prompt) + len(tokens) - 1)
    return tokens, False


def _measure(
    file: str,
    context: int,
    prompt_lengths: list[int],
    generated: int,
    kv_cache: str,
    threads: int,
    adapter: str | None,
    scale: float,
) -> dict[str, Any]:
    library()
    before = rss()
    model = _Model(file)
    model.open(context, min(context, 512), kv_cache, threads)
    if adapter is not None:
        model.attach(adapter, scale)
    tokens = np.random.default_rng(0).integers(model.vocab_size, size=context).tolist()
    model.prompt(tokens[: min(32, context)])  # the first decode reads the file: not timed
    fitting = [length for length in prompt_lengths if length + 2 <= context]
    speed = [
        _time(model, tokens[:length], min(generated, context - length))
        for length in worker.counted(fitting, len(fitting))
    ]
    return {"speed": speed, "buffers": _buffers("".join(log_lines)), **gained(before)}


def _time(model: _Model, prompt: list[int], generated: int) -> dict[str, Any]:
    start = time.perf_counter()
    model.prompt(prompt)
    token = model.best()
    first = time.perf_counter()
    for step in range(generated - 1):  # end-of-generation tokens do not shorten the timing
        model.decode([token], len(prompt) + step)
        token = model.best()
    end = time.perf_counter()
    return Speed.of(len(prompt), generated, start, first, end).to_json()


def _buffers(log: str) -> dict[str, int]:
    """Bytes by the names that llama.cpp logs, such as `CPU_REPACK model`, `CPU KV`."""
    found: dict[str, int] = {}
    for name, size in re.findall(r"(\S+ +\w+) buffer size = +([\d.]+) MiB", log):
        key = " ".join(name.split())
        found[key] = found.get(key, 0) + round(float(size) * 2**20)
    return found


if __name__ == "__main__":
    worker.serve(
        {
            "logits": _logits,
            "tokenize": _tokenize,
            "vocabulary": _vocabulary,
            "generate": _generate,
            "measure": _measure,
        }
    )
