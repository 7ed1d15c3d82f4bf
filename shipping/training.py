"""Quantization-aware training of a recipe's model: from its text to a quantized checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import bundle
from ..errors import SlimportError, Unsupported, UsageError
from ..quantize import quantizer
from ..quantize.plan import TRAINED, Plan
from ..quantize.store import TRAINING, Origin, QuantizedCheckpoint
from ..quantize.windows import Int32, Windows, check_ids, cut, read_text
from ..recipe import Recipe
from .source import Source, open_source, origin_of, plan_of

Progress = Callable[[str, int, int], None]
Say = Callable[[str], None]
_START = "start"  # in the run's state: the quantized checkpoint that training starts from


@dataclass(frozen=True, slots=True)
class Training:
    """What a training run starts from.

    Attributes:
        plan: of the start, by a method that does not train.
        ids: int32 (tokens,) of the training text.
        begin: ids that every window begins with.
    """

    recipe: Recipe
    source: Source
    plan: Plan
    ids: Int32
    begin: tuple[int, ...]


def prepare(recipe: Recipe, *, offline: bool = False) -> Training:
    """Open model and text; refuse what cannot be trained.

    Raises:
        UsageError: no training text, or nothing to train.
        Unsupported: a reward model, or a grid that is not learned.
        BadInput: anything unreadable, or a text that is too short.
    """
    from ..quantize.qat.run import trainable  # torch is loaded only to train

    if recipe.quantize.method == TRAINED:
        recipe = recipe.override(method="gptq")
    source = open_source(recipe, offline=offline)
    if source.decoder.reward:
        raise Unsupported(
            f"{source.name} is a reward model, and those are not trained",
            "training compares the logits of a language model with those in full precision",
            "quantize it by another method: --method gptq",
        )
    plan = plan_of(recipe, source)
    trainable(plan, recipe.qat.train_tables)
    if recipe.texts.train is None:
        raise UsageError(
            "there is no text to train on",
            "the model learns its codes from text like that which it will meet",
            "give one with --train FILE, or `train` under [texts] in slimport.toml",
        )
    tokenizer = source.tokenizer
    text = read_text(recipe.texts.train, tokenizer.render_chat)
    ids = np.array(tokenizer.encode(text), np.int32)
    if ids.size:
        check_ids(ids, tokenizer, source.decoder.vocab_size)
    adds = tokenizer.adds_bos and tokenizer.bos_id is not None
    begin = (tokenizer.bos_id,) if adds and tokenizer.bos_id is not None else ()
    return Training(recipe, source, plan, ids, begin)


def train(
    training: Training, output: Path, *, restart: bool, progress: Progress, say: Say
) -> tuple[QuantizedCheckpoint, dict[str, Any]]:
    """Train, or go on after a kill, and write the quantized checkpoint; with its record.

    The caller has checked that what stands at `output` may be replaced.
    """
    from ..quantize.qat import run, state, text

    source, settings = training.source, training.recipe.qat
    length = min(settings.train_length, source.decoder.context_length)
    stream, held_out = text.split(
        training.ids, training.begin, length, settings.held_out_windows, settings.seed
    )
    calibration = _calibration(training, stream.ids)
    with bundle.replacing(output) as partial:
        origin = origin_of(source)
        identity = {
            "origin": asdict(origin),
            "settings": asdict(settings),
            "plan": training.plan.to_json(),
            "training text": stream.digest,
            "held-out text": held_out.digest,
            "calibration": calibration.digest if calibration else None,
        }
        store = state.open_store(output, identity, restart)
        start = _start(training, calibration, origin, store.folder / _START, progress)
        result = run.run(
            source.weights,
            source.decoder,
            start,
            (stream, held_out),
            settings,
            store,
            progress,
            say,
        )
        found = run.record(settings, (stream, held_out), result.trained)
        trained = run.trainable(training.plan, settings.train_tables)
        quantizer.restore(
            result.tensors(start),
            source.config,
            training.plan.trained(trained),
            partial,
            tokenizer_folder=source.checkpoint.folder,
            origin=origin,
            calibration=stream.digest,
            originals=source.weights,
        )
        (partial / TRAINING).write_bytes(bundle.canonical_json(found))
    shutil.rmtree(store.folder, ignore_errors=True)
    return QuantizedCheckpoint.open(output), found


def _calibration(training: Training, ids: Int32) -> Windows | None:
    """Windows of the training text, where the method of the start needs them."""
    if not training.plan.calibrated:
        return None
    given = training.recipe.quantize
    length = min(given.calibration_length, training.source.decoder.context_length)
    return cut(ids, list(training.begin), length, given.calibration_windows)


def _start(
    training: Training,
    calibration: Windows | None,
    origin: Origin,
    folder: Path,
    progress: Progress,
) -> QuantizedCheckpoint:
    """The checkpoint that training starts from: that of a killed run, or a new one."""
    try:
        return QuantizedCheckpoint.open(folder)
    except SlimportError:  # not there, or half-written
        shutil.rmtree(folder, ignore_errors=True)
    source = training.source
    return quantizer.quantize(
        source.weights,
        source.config,
        training.plan,
        folder,
        calibration=calibration,
        tokenizer_folder=source.checkpoint.folder,
        progress=progress,
        origin=lambda: origin,
    )
