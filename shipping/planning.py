"""Which grids and contexts of a model fit a device, from its config.json alone: `slimport plan`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from ..architectures import DecoderConfig, decoder_config, weights
from ..checkpoint import read_json
from ..errors import Unsupported, UsageError
from ..export.container import Container, Deployment
from ..quantize.mixes import MIXES
from ..quantize.plan import Plan, make_plan
from ..settings import format_size
from ..targets.target import Target, load_target
from ..tokenizer.tokenizer import Tokenizer
from ..validation.planned_memory import PlannedMemory, planned_memory
from . import containers

# From many bits to few; GGUF alone has llama.cpp's mixes.
PRESETS = ("int8", "Q6_K", "mixed", "Q4_K_M", "int4", "lut4", "int4-all", "Q3_K_M", "Q2_K", "int2")
_TOKEN_BYTES = 60  # of a vocabulary in a file, where no tokenizer is given: measured 31 to 63
_CONTEXT_STEP = 256


@dataclass(frozen=True, slots=True)
class Row:
    """One preset on one target. Bytes; sizes of files are exact where a tokenizer is given.

    Attributes:
        bits: per weight, with tables.
        memory: mapped and anonymous at `context`; None: not known for this container.
        longest: the longest context that keeps the target's memory budgets; 0: none does; None:
            not known.
        refused: why it does not fit, or cannot be made; "" if it fits.
    """

    target: str
    container: str
    preset: str
    bits: float
    device_bytes: int
    context: int
    memory: int | None
    anonymous: int | None
    longest: int | None
    refused: str


def plan(path: Path, targets: Sequence[str], context: int | None = None) -> dict[str, Any]:
    """What fits: the JSON of `slimport plan`.

    Args:
        path: a config.json, or the folder of a model; its weights are not read, and need not be
            there. With a tokenizer beside it file sizes are exact.
        targets: device profiles.
        context: tokens, in place of the targets'.

    Raises:
        UsageError: no such file, or an unknown target.
        Unsupported: a family or a config that slimport does not hold.
    """
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise UsageError(
            f"{path} is no config", "a model is planned from its config.json", "check the path"
        )
    config = decoder_config(read_json(file))
    tokenizer = _tokenizer(file.parent)
    every = weights(config)
    rows = [row for name in targets for row in _rows(load_target(name), config, tokenizer, context)]
    return {
        "schema": "slimport.plan/1",
        "family": config.family.model_type,
        "parameters": sum(prod(weight.shape) for weight in every),
        "tokenizer": tokenizer is not None,
        "rows": [asdict(row) for row in rows],
    }


def _tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer beside a config, if there is one that slimport reads."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return None
    return Tokenizer.open(folder)


def _rows(
    target: Target, config: DecoderConfig, tokenizer: Tokenizer | None, context: int | None
) -> Iterator[Row]:
    container = next((c for c in target.containers if c in containers.NAMES), target.containers[0])
    made = containers.load(container).container
    longest = made.context_length(config)
    tokens = min(context or target.context_length, longest)
    for preset in PRESETS:
        if preset in MIXES and container != "gguf":
            continue
        if preset == "lut4" and container != "coreml-ane":
            continue
        chosen = make_plan(config, preset, "gptq")
        try:
            yield _row(target, made, config, tokenizer, chosen, tokens, longest)
        except Unsupported as refusal:
            parameters = sum(prod(weight.shape) for weight in weights(config))
            bits = 8 * sum(_planned_bytes(chosen)) / parameters
            given = (target.name, container, preset, bits, 0, tokens)
            yield Row(*given, None, None, None, f"{refusal.what}: {refusal.why}")


def _planned_bytes(chosen: Plan) -> Iterator[int]:
    for choice in chosen.choices:
        shape = choice.weight.shape
        if choice.grid is None:
            yield (2 if choice.weight.is_matrix else 4) * prod(shape)
        else:
            yield choice.grid.bytes_of((shape[0], shape[1]))


def _row(
    target: Target,
    container: Container,
    config: DecoderConfig,
    tokenizer: Tokenizer | None,
    chosen: Plan,
    context: int,
    longest: int,
) -> Row:
    deployment = Deployment(context, hexagon=target.hexagon, ios=target.ios)
    if tokenizer is not None:
        container.refuse(config, chosen, tokenizer)
    container.refuse_deployment(chosen, deployment)
    sizes = container.tensor_bytes(config, chosen)
    if tokenizer is None:
        nbytes = sum(sizes.values()) + _TOKEN_BYTES * config.vocab_size
    else:
        files = container.predict(config, chosen, tokenizer, "model", deployment)
        nbytes = sum(size for name, size in files.items() if name not in container.PROOF)

    def memory(tokens: int) -> PlannedMemory | None:
        cache = container.kv_cache(target.kv_cache)
        given = (config, chosen, sizes, tokens, cache, target.isa)
        return planned_memory(container.NAME, *given)

    planned = memory(context)
    needed = planned.memory if planned else None
    broken = [] if needed is None else list(_broken(target, needed.total, needed.anonymous))
    if (limit := target.budgets["device_bytes"].limit) < nbytes:
        broken.insert(0, f"size above {format_size(limit)}")

    def fits(tokens: int) -> bool:
        found = memory(tokens)
        assert found is not None, "it is known for this container"
        return not any(_broken(target, found.memory.total, found.memory.anonymous))

    parameters = sum(prod(weight.shape) for weight in weights(config))
    return Row(
        target=target.name,
        container=container.NAME,
        preset=chosen.preset,
        bits=8 * sum(sizes.values()) / parameters,
        device_bytes=nbytes,
        context=context,
        memory=needed.total if needed else None,
        anonymous=needed.anonymous if needed else None,
        longest=_longest(fits, longest) if planned else None,
        refused="; ".join(broken),
    )


def _broken(target: Target, total: int, anonymous: int) -> Iterator[str]:
    for metric, words, value in (
        ("memory_bytes", "memory", total),
        ("anonymous_bytes", "anonymous memory", anonymous),
    ):
        limit = target.budgets.get(metric)
        if limit is not None and value > limit.limit:
            yield f"{words} above {format_size(limit.limit)}"


def _longest(fits: Callable[[int], bool], most: int) -> int:
    """The longest context that fits, in whole steps or all of it; 0 if none does."""
    if fits(most):
        return most
    low, high = 0, most // _CONTEXT_STEP
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle * _CONTEXT_STEP):
            low = middle
        else:
            high = middle - 1
    return low * _CONTEXT_STEP
