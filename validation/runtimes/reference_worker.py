"""The child process behind `reference`: loads with transformers and peft, answers in float32."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...checkpoint import QUANTIZED_KEYS, Checkpoint, Weights
from ...errors import BadInput
from ...quantize.given import Given, open_given
from ...quantize.store import QuantizedCheckpoint
from .. import worker
from ..logits import writer

_LOADING = {"trust_remote_code": False, "local_files_only": True}
_BATCH = 16


def _transformers() -> Any:
    """The library, kept from torchao: it would import it, for five seconds and with warnings.

    ExecuTorch brings torchao; nothing here needs it. None stands for what is not installed.
    """
    sys.modules.setdefault("torchao", None)  # type: ignore[arg-type]
    import transformers

    return transformers


def _load(
    folder: str, adapter: str | None, scale: float, quantized: bool, reward: bool, threads: int
) -> Any:
    torch.set_num_threads(threads)
    library = _transformers()
    kind = library.AutoModelForSequenceClassification if reward else library.AutoModelForCausalLM
    try:
        given = None if quantized else _given(Path(folder))
        if quantized:
            model = _dequantized(QuantizedCheckpoint.open(Path(folder)), folder, kind)
        elif given is not None:
            model = _dequantized(given, folder, kind)
        else:
            model = _full_precision(folder, kind, becomes_reward=reward and adapter is not None)
        if adapter is not None:
            model = _adapted(model, adapter, scale)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        names = Path(folder).name if adapter is None else f"{Path(folder).name} + adapter"
        raise BadInput(
            f"the full-precision reference of {names} does not load",
            f"transformers and peft say: {str(error).strip().splitlines()[0]}",
            "check the model folder and the adapter with `slimport inspect`",
        ) from error
    return model.eval()


def _given(folder: Path) -> Given | None:
    """The codes of others, where config.json says that there are some."""
    config = folder / "config.json"
    if not config.is_file() or not any(key in config.read_text() for key in QUANTIZED_KEYS):
        return None
    return open_given(Checkpoint.open(folder))


def _full_precision(folder: str, kind: Any, becomes_reward: bool) -> Any:
    """`becomes_reward`: a language model may be given, whose adapter brings the score head."""
    model, report = kind.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
        **({"num_labels": 1} if becomes_reward else {}),
        **_LOADING,
    )
    heads = {"score.weight", "lm_head.weight"} if becomes_reward else set()
    _refuse_leftovers(set(report["missing_keys"]) - heads, set(report["unexpected_keys"]) - heads)
    return model


def _dequantized(weights: Weights, folder: str, kind: Any) -> Any:
    """The decoder of the folder's config, with the weights that codes mean."""
    state = {
        name: torch.from_numpy(np.ascontiguousarray(weights.rows(name), np.float32))
        for name in weights.names()
    }
    config = _transformers().AutoConfig.from_pretrained(folder, **_LOADING)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = kind.from_config(config, dtype=torch.float32, attn_implementation="eager")
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    tied = ["lm_head.weight"] if config.tie_word_embeddings else []  # a reward model has no such
    _refuse_leftovers(set(missing) - set(tied), unexpected)
    model.tie_weights()
    return model


def _refuse_leftovers(missing: Any, unexpected: Any) -> None:
    leftover = sorted(missing) or sorted(unexpected)
    if leftover:
        raise ValueError(f"{len(leftover)} weights missing or left over, first {leftover[0]}")


def _adapted(model: Any, adapter: str, scale: float) -> Any:
    from peft import PeftModel  # half a second, spared where there is no adapter
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = PeftModel.from_pretrained(model, adapter)
    tuned: list[Any] = [part for part in adapted.modules() if isinstance(part, BaseTunerLayer)]
    for layer in tuned:
        layer.scale_layer(scale)
    return adapted


@torch.inference_mode()
def _logits(windows: list[list[int]], out: str, **source: Any) -> None:
    model = _load(**source)
    shape = (len(windows), len(windows[0]), model.config.vocab_size)
    with writer(Path(out), shape) as file:
        for window in worker.counted(windows, len(windows)):
            rows = model(torch.tensor([window]), use_cache=False).logits[0]
            file.write(np.ascontiguousarray(rows.numpy()).data)


@torch.inference_mode()
def _generate(
    prompts: list[list[int]], max_tokens: int, eos_ids: list[int] | None, **source: Any
) -> list[tuple[list[int], bool]]:
    model = _load(**source)
    ends = set(_eos_ids(Path(source["folder"])) if eos_ids is None else eos_ids)
    found = []
    for prompt in worker.counted(prompts, len(prompts)):
        tokens = _extend(model, torch.tensor([prompt]), max_tokens, _most_likely, ends)
        stop = next((place for place, token in enumerate(tokens[0]) if token in ends), None)
        found.append((tokens[0][:stop], stop is not None))
    return found


@torch.inference_mode()
def _sample(start: int, count: int, length: int, seed: int, **source: Any) -> list[list[int]]:
    model = _load(**source)
    random = torch.Generator().manual_seed(seed)

    def choose(rows: torch.Tensor) -> torch.Tensor:
        return torch.multinomial(rows.softmax(-1), 1, generator=random)

    windows: list[list[int]] = []
    while len(windows) < count:
        first = torch.full((min(_BATCH, count - len(windows)), 1), start)
        windows += [[start, *rest] for rest in _extend(model, first, length - 1, choose, set())]
        worker.tick(len(windows), count)
    return windows


def _extend(
    model: Any,
    tokens: torch.Tensor,
    count: int,
    choose: Callable[[torch.Tensor], torch.Tensor],
    ends: set[int],
) -> list[list[int]]:
    """Up to `count` tokens after each row of `tokens`; an end is kept, and stops a single row."""
    cache, chosen = None, []
    for _ in range(count):
        answer = model(tokens, past_key_values=cache, use_cache=True)
        cache, tokens = answer.past_key_values, choose(answer.logits[:, -1])
        chosen.append(tokens)
        if len(tokens) == 1 and int(tokens) in ends:
            break
    rows: list[list[int]] = torch.cat(chosen, 1).tolist() if chosen else [[]] * len(tokens)
    return rows


def _most_likely(rows: torch.Tensor) -> torch.Tensor:
    return rows.argmax(-1, keepdim=True)


def _eos_ids(folder: Path) -> list[int]:
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        ids = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
        if ids is not None:
            return ids if isinstance(ids, list) else [ids]
    return []


@torch.inference_mode()
def _scores(texts: list[list[int]], **source: Any) -> list[float]:
    model = _load(**source)
    return [
        float(model(torch.tensor([text]), use_cache=False).logits[0, 0])
        for text in worker.counted(texts, len(texts))
    ]


JOBS: dict[str, Any] = {
    "scores": _scores,
    "logits": _logits,
    "generate": _generate,
    "sample": _sample,
}

if __name__ == "__main__":
    worker.serve(JOBS)
