"""The child process behind `onnxruntime`: one job on one folder."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import onnxruntime_genai as genai

from ...errors import ValidationFailed
from ...export.onnx import reader as onnx_reader
from ...export.ort import reader as ort_reader
from ...quantize.grid import Float32
from .. import worker
from ..logits import writer
from ..runtime import Speed
from . import onnxruntime_exact, onnxruntime_memory
from .onnxruntime import SESSION
from .refusals import refusals
from .rss import gained, rss

PROVIDERS: list[str] = SESSION["providers"]
_ENTRY = "session."  # in genai_config.json, what it gives to ONNX Runtime as it is
_FOLDER = "session.model_external_initializers_file_folder_path"
_LOGITS = 2**24  # numbers of one run: 64 MiB
ort.set_default_logger_severity(4)  # what fails is raised; the log repeats it in color


def _options(threads: int) -> ort.SessionOptions:
    """Those of SESSION."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = SESSION["threads"]["inter_op"]
    level, mode = SESSION["graph_optimization_level"], SESSION["execution_mode"]
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    options.execution_mode = getattr(ort.ExecutionMode, mode)
    for key, value in SESSION["config_entries"].items():
        options.add_session_config_entry(key, value)
    return options


def _open(file: Path, threads: int, exact: bool) -> ort.InferenceSession:
    """The model in ONNX Runtime's own session, on its own provider."""
    options = _options(threads)
    for key, value in _settings(file.parent)["decoder"]["session_options"].items():
        if key.startswith(_ENTRY):
            options.add_session_config_entry(key, value)
    model: str | bytes = str(file)
    if exact:
        model = _exact(file)
        options.add_session_config_entry(_FOLDER, str(file.parent))
    with refusals(f"ONNX Runtime does not load {file.name}"):
        session = ort.InferenceSession(model, options, providers=PROVIDERS)
    if session.get_providers() != PROVIDERS:
        raise ValidationFailed(
            f"ONNX Runtime runs {file.name} on other providers than it was told",
            f"it names {', '.join(session.get_providers())}",
            "install the onnxruntime of constraints.txt alone",
        )
    return session


class _Session:
    """A language model, with the cache of its last run."""

    def __init__(self, file: Path, threads: int, exact: bool) -> None:
        self.session = _open(file, threads, exact)
        self.run_options = ort.RunOptions()
        outputs = [value.name for value in self.session.get_outputs()]
        self.outputs = [name for name in outputs if not name.endswith(onnxruntime_exact.PEAK)]
        self.peaks = outputs[len(self.outputs) :]
        settings = _settings(file.parent)
        decoder = settings["decoder"]
        kinds = {value.name: value.type for value in self.session.get_inputs()}
        dtype = np.float16 if kinds[self.caches()[0]] == "tensor(float16)" else np.float32
        self.empty = np.zeros((1, decoder["num_key_value_heads"], 0, decoder["head_size"]), dtype)
        self.vocab_size = int(settings["vocab_size"])

    def attach(self, adapter: str) -> None:
        with refusals(f"ONNX Runtime does not load the adapter {Path(adapter).name}"):
            self.adapter = ort.LoraAdapter()  # kept: the options only point to it
            self.adapter.Load(adapter)
            self.run_options.add_active_adapter(self.adapter)

    def caches(self) -> list[str]:
        """The inputs for keys and values, in the order of the outputs after the logits."""
        return [name.replace("present", "past_key_values") for name in self.outputs[1:]]

    def logits(self, window: list[int], step: int) -> Iterator[Float32]:
        """float32 (tokens, vocabulary) of at most `step` tokens at a time.

        Raises:
            ValidationFailed: a number that the file has in float16 does not fit it; looked for in
                the exact form.
        """
        names = self.caches()
        cache = dict.fromkeys(names, self.empty)
        for start in range(0, len(window), step):
            ids = np.array([window[start : start + step]], np.int64)
            mask = np.ones((1, start + ids.size), np.int64)
            with refusals("ONNX Runtime cannot run the model"):
                found, *rest = self.session.run(
                    [*self.outputs, *self.peaks],
                    {"input_ids": ids, "attention_mask": mask, **cache},
                    self.run_options,
                )
            cache = dict(zip(names, rest, strict=False))
            peaks = zip(self.peaks, map(float, rest[len(names) :]), strict=True)
            onnxruntime_exact.refuse_overflow(dict(peaks))
            yield found[0].astype(np.float32, copy=False)


def _exact(file: Path) -> bytes:
    """The model with every product in float32."""
    if file.name == ort_reader.MODEL:
        return ort_reader.at_accuracy_level(file, onnxruntime_exact.LEVEL)
    return onnxruntime_exact.exact(file)


def _logits(
    file: str,
    windows: list[list[int]],
    out: str,
    exact: bool,
    threads: int,
    adapter: str | None,
) -> None:
    model = _Session(Path(file), threads, exact)
    if adapter is not None:
        model.attach(adapter)
    length = len(windows[0])
    step = min(length, 512, max(32, _LOGITS // model.vocab_size))
    with writer(Path(out), (len(windows), length, model.vocab_size)) as target:
        for window in worker.counted(windows, len(windows)):
            for rows in model.logits(window, step):
                target.write(np.ascontiguousarray(rows).data)


def _scores(file: str, texts: list[list[int]], exact: bool, threads: int) -> list[float]:
    session = _open(Path(file), threads, exact)
    return [_score(session, text) for text in worker.counted(texts, len(texts))]


def _score(session: ort.InferenceSession, text: list[int]) -> float:
    ids = np.array([text], np.int64)
    with refusals("ONNX Runtime cannot run the model"):
        found, *_ = session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})
    return float(found[0])


def _measure_scores(file: str, context: int, lengths: list[int], threads: int) -> dict[str, Any]:
    before = rss()
    folder = Path(file).parent
    session = _open(Path(file), threads, exact=False)
    tokens = np.random.default_rng(0).integers(_settings(folder)["vocab_size"], size=context)
    _score(session, tokens[:32].tolist())  # the first run: not timed
    fitting = [length for length in lengths if length <= context]
    speed = []
    for length in worker.counted(fitting, len(fitting)):
        start = time.perf_counter()
        _score(session, tokens[:length].tolist())
        seconds = time.perf_counter() - start
        speed.append(Speed(length, seconds, length / seconds, None, seconds).to_json())
    memory = onnxruntime_memory.memory(_read(Path(file)), folder, context, None)
    return {"speed": speed, "memory": memory.to_json(), **gained(before)}


class _Genai:
    """The folder as an app opens it."""

    def __init__(self, file: str) -> None:
        with refusals(f"onnxruntime-genai does not load the folder of {Path(file).name}"):
            self.model = genai.Model(str(Path(file).parent))
            self.tokenizer = genai.Tokenizer(self.model)
        self.adapters: Any = None

    def attach(self, adapter: str) -> None:
        with refusals(f"onnxruntime-genai does not load the adapter {Path(adapter).name}"):
            self.adapters = genai.Adapters(self.model)
            self.adapters.load(adapter, "adapter")

    def generator(self, length: int, least: int = 0) -> Any:
        """A greedy generator with a cache for `length` tokens; no end before `least` of them."""
        params = genai.GeneratorParams(self.model)
        params.set_search_options(
            max_length=length, min_length=least, do_sample=False, repetition_penalty=1.0
        )
        generator = genai.Generator(self.model, params)
        if self.adapters is not None:
            generator.set_active_adapter(self.adapters, "adapter")
        return generator


def _tokenizer(file: str) -> Any:
    """The folder's tokenizer, without its model."""
    with refusals(f"onnxruntime-genai does not load the tokenizer of {Path(file).name}"):
        return genai.Tokenizer(str(Path(file).parent))


def _tokenize(file: str, texts: list[str]) -> list[list[int]]:
    tokenizer = _tokenizer(file)
    with refusals("onnxruntime-genai cannot tokenize a text"):
        return [[int(token) for token in tokenizer.encode(text)] for text in texts]


def _vocabulary(file: str) -> dict[str, Any]:
    tokenizer, folder = _tokenizer(file), Path(file).parent
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    return {
        "size": int(_settings(folder)["vocab_size"]),
        "eog": [int(token) for token in tokenizer.eos_token_ids],
        "bos": int(tokenizer.bos_token_id),
        "adds_bos": True if len(tokenizer.encode("")) else None,
        "chat_template": settings.get("chat_template"),
    }


def _settings(folder: Path) -> dict[str, Any]:
    """The model in genai_config.json."""
    content = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
    found: dict[str, Any] = content["model"]
    return found


def _render(file: str, chats: list[tuple[list[dict[str, str]], bool]]) -> list[str | None]:
    tokenizer = _tokenizer(file)
    return [_rendered(tokenizer, json.dumps(messages), prompt) for messages, prompt in chats]


def _rendered(tokenizer: Any, messages: str, prompt: bool) -> str | None:
    try:
        return str(tokenizer.apply_chat_template(messages, add_generation_prompt=prompt))
    except RuntimeError as error:  # of every kind, such as "Empty chat template"
        print(f"refused: {error}", file=sys.stderr)
        return None


def _generate(
    file: str, prompts: list[list[int]], max_tokens: int, adapter: str | None
) -> list[tuple[list[int], bool]]:
    opened = _Genai(file)
    if adapter is not None:
        opened.attach(adapter)
    ends = {int(token) for token in opened.tokenizer.eos_token_ids}
    return [
        _greedy(opened, prompt, max_tokens, ends)
        for prompt in worker.counted(prompts, len(prompts))
    ]


def _greedy(
    opened: _Genai, prompt: list[int], max_tokens: int, ends: set[int]
) -> tuple[list[int], bool]:
    with refusals("onnxruntime-genai cannot continue a prompt"):
        generator = opened.generator(len(prompt) + max_tokens)
        generator.append_tokens(np.array(prompt, np.int32))
        tokens: list[int] = []
        while len(tokens) < max_tokens and not generator.is_done():
            generator.generate_next_token()
            token = int(generator.get_next_tokens()[0])
            if token in ends:
                return tokens, True
            tokens.append(token)
    return tokens, False


def _measure(
    file: str, context: int, prompt_lengths: list[int], generated: int, adapter: str | None
) -> dict[str, Any]:
    before = rss()
    opened = _Genai(file)
    if adapter is not None:
        opened.attach(adapter)
    folder = Path(file).parent
    memory = onnxruntime_memory.memory(
        _read(Path(file)), folder, context, Path(adapter) if adapter else None
    )
    tokens = np.random.default_rng(0).integers(
        _settings(folder)["vocab_size"], size=context, dtype=np.int32
    )
    with refusals("onnxruntime-genai cannot run the model"):
        _time(opened, tokens[: min(32, context - 2)], 2, context)  # the first run: not timed
        fitting = [length for length in prompt_lengths if length + 2 <= context]
        speed = [
            _time(opened, tokens[:length], min(generated, context - length), context)
            for length in worker.counted(fitting, len(fitting))
        ]
    return {"speed": speed, "memory": memory.to_json(), **gained(before)}


def _read(file: Path) -> onnx_reader.File:
    """The model, read as the containers read theirs back."""
    if file.name == ort_reader.MODEL:
        return ort_reader.open_file(file.parent)
    return onnx_reader.open_file(file.parent)


def _time(
    opened: _Genai, prompt: npt.NDArray[np.int32], generated: int, context: int
) -> dict[str, Any]:
    generator = opened.generator(context, len(prompt) + generated)
    start = time.perf_counter()
    generator.append_tokens(prompt)
    generator.generate_next_token()
    first = time.perf_counter()
    for _ in range(generated - 1):
        generator.generate_next_token()
    end = time.perf_counter()
    return Speed.of(len(prompt), generated, start, first, end).to_json()


JOBS: dict[str, Any] = {
    "logits": _logits,
    "tokenize": _tokenize,
    "vocabulary": _vocabulary,
    "render": _render,
    "generate": _generate,
    "measure": _measure,
    "scores": _scores,
    "measure_scores": _measure_scores,
}

if __name__ == "__main__":
    worker.serve(JOBS)
