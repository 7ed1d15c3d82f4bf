"""What every verb starts from: a model, its adapters and tokenizer, opened and checked.

Only headers, config and tokenizer are read here; weights follow row by row when they are needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..adapters.adapter import Adapter
from ..adapters.config import trains_reward
from ..adapters.lora import read_adapter
from ..adapters.merge import Merged, merged_config
from ..adapters.recovery import recovered
from ..architectures import SCORE, DecoderConfig, check_weights, decoder_config, reward_config
from ..checkpoint import Checkpoint, Weights
from ..errors import Unsupported, UsageError
from ..quantize.given import Given, open_given
from ..quantize.plan import Plan, keep_given, make_plan
from ..quantize.store import Origin
from ..recipe import AdapterSource, Recipe
from ..tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Source:
    """A full-precision model with its adapters.

    Attributes:
        name: what bundles call it.
        checkpoint: the base.
        adapters: each with the recipe's entry for it.
        mode: "merged" or "separate".
        given: the base as others quantized it; None: it is in full precision.
        weights: what is quantized: the base, or base and adapter merged.
        config: config.json of `weights`.
        decoder: the same, understood.
    """

    name: str
    checkpoint: Checkpoint
    adapters: tuple[tuple[AdapterSource, Adapter], ...]
    mode: str
    given: Given | None
    weights: Weights
    config: dict[str, Any]
    decoder: DecoderConfig
    tokenizer: Tokenizer


def open_source(recipe: Recipe, *, offline: bool = False) -> Source:
    """Open everything a recipe names.

    Raises:
        UsageError: no model, or a path that does not exist.
        Unsupported: a family, config key, adapter or foreign grid that cannot be held exactly.
        BadInput: anything unreadable, corrupt or inconsistent.
    """
    if recipe.model is None:
        raise UsageError(
            f"{recipe.source} names no model", "an export starts from one", "set `model` in it"
        )
    base = Checkpoint.open(recipe.model, revision=recipe.revision, offline=offline)
    given = open_given(base)
    if given is not None and recipe.adapters and recipe.adapter_mode == "merged":
        raise Unsupported(
            f"an adapter cannot be merged into {base.name}, which {given.maker} quantized",
            "the sum would have to be quantized again, and that takes most of the adapter away",
            "keep it beside the base: --adapter-mode separate; or merge it into the full-precision"
            " model and export that",
        )
    weights: Weights = base if given is None else given
    config = dict(base.config if given is None else given.config)
    decoder = decoder_config(config)
    check_weights(decoder, weights)
    if not decoder.reward and any(trains_reward(entry.path) for entry in recipe.adapters):
        config = reward_config(config)
        decoder = decoder_config(config)
    adapters = tuple(
        (entry, read_adapter(entry.path, entry.name, weights, decoder)) for entry in recipe.adapters
    )
    for entry, adapter in adapters:
        _refuse_overflow(entry, adapter)
        if recipe.adapter_mode == "merged" and recovered(entry.path):
            raise UsageError(
                f"the adapter {entry.name} cannot be merged",
                "it repairs the codes that it was trained beside, and merging would change them",
                "keep it beside them: --adapter-mode separate",
            )
    if decoder.reward and SCORE not in base.names() and recipe.adapter_mode == "separate":
        raise Unsupported(
            f"the adapter {adapters[0][0].name} cannot stay separate",
            "it brings the score head, without which the base is no reward model",
            "merge it: --adapter-mode merged",
        )
    if recipe.adapter_mode == "merged" and adapters:
        entry, adapter = _only(adapters)
        weights = Merged(base, adapter, entry.scale)
        config = merged_config(config, adapter)
    return Source(
        name=recipe.name or base.name,
        checkpoint=base,
        adapters=adapters,
        mode=recipe.adapter_mode,
        given=given,
        weights=weights,
        config=config,
        decoder=decoder_config(config),
        tokenizer=Tokenizer.open(base.folder, pre=recipe.pre),
    )


def _refuse_overflow(entry: AdapterSource, adapter: Adapter) -> None:
    for name, delta in adapter.deltas.items():
        with np.errstate(over="ignore"):
            largest = np.float32(entry.scale * delta.scale) * np.abs(delta.b).max(initial=0)
        if not np.isfinite(largest):
            raise UsageError(
                f"the adapter {entry.name} is too large with the scale {entry.scale:g}",
                f"its update of {name} is beyond float32",
                "give a smaller scale: --adapter NAME=PATH:SCALE",
            )


def origin_of(source: Source) -> Origin:
    """What is quantized, for the record: hashes the base."""
    merged = source.adapters if source.mode == "merged" else ()
    return Origin(
        name=source.name,
        base=source.checkpoint.digest(),
        adapters={entry.name: adapter.digest() for entry, adapter in merged},
        scales={entry.name: entry.scale for entry, _ in merged},
    )


def plan_of(recipe: Recipe, source: Source) -> Plan:
    """The recipe's grids and methods for this model.

    Raises:
        UsageError: an unknown name, or a setting that this method does not have.
    """
    method = recipe.quantize.method
    if recipe.quantize.imatrix is not None and method != "imatrix":
        raise UsageError(
            f"an importance matrix has no effect with method {method}",
            "only ggml's kernels and k-means read one; gptq also needs how inputs vary together",
            "add --method imatrix, or leave --imatrix away",
        )
    if recipe.quantize.imatrix is not None and recipe.texts.calibration is not None:
        raise UsageError(
            "an importance matrix and a calibration text are given together",
            f"{recipe.quantize.imatrix.name} stands in place of {recipe.texts.calibration.name}",
            "give one of them",
        )
    if not recipe.quantize.search:
        if method != "rtn":
            raise UsageError(
                f"search = false has no effect with method {method}",
                "only rtn can leave the search for its scales away",
                'remove it, or take method = "rtn"',
            )
        method = "rtn-absmax"
    patterns = recipe.quantize.patterns
    plan = make_plan(source.decoder, recipe.quantize.preset, method, patterns)
    if source.given is None:
        return plan
    return keep_given(plan, source.given.grids, source.given.maker, patterns)


def _only(
    adapters: tuple[tuple[AdapterSource, Adapter], ...],
) -> tuple[AdapterSource, Adapter]:
    if len(adapters) > 1:
        names = ", ".join(entry.name for entry, _ in adapters)
        raise Unsupported(
            f"{len(adapters)} adapters cannot be merged together: {names}",
            "merged mode takes one adapter",
            "keep one --adapter, or ship them beside the base with --adapter-mode separate",
        )
    return adapters[0]
