"""Quantization-aware training of a recipe's model: from its text to a quantized checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import bundle
from ..adapters.recovery import write_recovery
from ..errors import SlimportError, Unsupported, UsageError
from ..quantize import quantizer
from ..quantize.plan import TRAINED, Plan
from ..quantize.store import TRAINING, Origin, QuantizedCheckpoint
from ..quantize.windows import Windows, check_ids, cut, read_text
from ..recipe import Qat, Recipe
from .source import Source, open_source, origin_of, plan_of

if TYPE_CHECKING:  # torch is loaded only to train
    from ..quantize.qat.run import Result
    from ..quantize.qat.state import Store
    from ..quantize.qat.text import Stream
    from ..quantize.qat.workers import Workers

Progress = Callable[[str, int, int], None]
Say = Callable[[str], None]
ADAPTER = "adapter"  # in the quantized checkpoint: a PEFT folder, if LoRA was trained
_START = "start"  # in the run's state: the quantized checkpoint that training starts from


@dataclass(frozen=True, slots=True)
class Training:
    """What a training run starts from.

    Attributes:
        plan: of the start, by a method that does not train.
        trained: names of the weights that train on their grids.
        text: what is trained on, and windows that are held out.
        calibration: windows of that text, where the method of the start needs them.
    """

    source: Source
    settings: Qat
    plan: Plan
    trained: frozenset[str]
    text: tuple[Stream, Windows]
    calibration: Windows | None


def prepare(recipe: Recipe, *, offline: bool = False) -> Training:
    """Open model and text; refuse what cannot be trained.

    Raises:
        UsageError: no training text, or nothing to train.
        Unsupported: a reward model, or a grid that is not learned.
        BadInput: anything unreadable, or a text that is too short.
    """
    from ..quantize.qat.run import trainable
    from ..quantize.qat.text import split

    if recipe.fit.is_wanted:
        raise UsageError(
            f"{recipe.source} wants grids that fit, and `qat` cannot search them",
            "sizes are those of containers, and it makes none",
            "remove [fit] and choose a preset",
        )
    if recipe.quantize.method == TRAINED:
        recipe = recipe.override(method="gptq")
    settings = recipe.qat
    source = open_source(recipe, offline=offline)
    if source.decoder.reward:
        raise Unsupported(
            f"{source.name} is a reward model, and those are not trained",
            "training compares the logits of a language model with those in full precision",
            "quantize it by another method: --method gptq",
        )
    if source.given is not None:
        raise UsageError(
            f"{source.name} is not trained",
            f"{source.given.maker} chose its codes, and training would quantize them again",
            "give the full-precision model that it was made from",
        )
    plan = plan_of(recipe, source)
    if settings.train_only == "lora" and source.adapters:
        raise UsageError(
            "an adapter that repairs codes is trained for a base alone",
            f"{source.adapters[0][0].name} is given beside it, and a bundle merges one or none",
            "leave --adapter away; or train the codes of the merged model: --train-only weights",
        )
    trained = trainable(plan, settings)
    if recipe.texts.train is None:
        raise UsageError(
            "there is no text to train on",
            "the model learns its codes from text like that which it will meet",
            "give one with --train FILE, or `train` under [texts] in slimport.toml",
        )
    tokenizer, longest = source.tokenizer, source.decoder.context_length
    ids = np.array(tokenizer.encode(read_text(recipe.texts.train, tokenizer.render_chat)), np.int32)
    if ids.size:
        check_ids(ids, tokenizer, source.decoder.vocab_size)
    begin = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
    length = min(settings.train_length, longest)
    text = split(ids, begin, length, settings.held_out_windows, settings.seed)
    calibration = None
    if plan.calibrated:
        length = min(recipe.quantize.calibration_length, longest)
        calibration = cut(text[0].ids, begin, length, recipe.quantize.calibration_windows)
    return Training(source, settings, plan, trained, text, calibration)


def train(
    training: Training, output: Path, *, restart: bool, progress: Progress, say: Say
) -> tuple[QuantizedCheckpoint, dict[str, Any]] | None:
    """Train, or go on after a kill, and write the quantized checkpoint; with its record.

    The caller has checked that what stands at `output` may be replaced. Of several processes the
    first one reads and writes the state; the others get None.
    """
    from ..quantize.qat.lora import write_adapter
    from ..quantize.qat.run import record
    from ..quantize.qat.state import Store, folder_of, open_store
    from ..quantize.qat.workers import start_workers

    settings, source = training.settings, training.source
    workers = start_workers(settings.device, settings.shard, settings.batch)
    if not workers.first:
        workers.wait()  # for the start
        _run(training, Store(folder_of(output)), workers, progress, say)
        return None
    with bundle.replacing(output) as partial:
        origin = origin_of(source)
        store = open_store(output, _identity(training, origin, workers.size), restart)
        start = _start(training, origin, store.folder / _START, progress)
        workers.wait()
        result = _run(training, store, workers, progress, say)
        assert result is not None
        found = record(settings, workers.size, training.text, result.trained)
        lora = settings.train_only == "lora"
        written = quantizer.restore(
            result.tensors(start),
            source.config,
            training.plan if lora else training.plan.trained(training.trained),
            partial,
            tokenizer_folder=source.checkpoint.folder,
            origin=origin,
            calibration=start.calibration if lora else training.text[0].digest,
            originals=source.weights,
        )
        if lora:
            folder = partial / ADAPTER
            write_adapter(result.made, settings.lora_rank, source.name, folder)
            write_recovery(folder, written.weights_digest)
        (partial / TRAINING).write_bytes(bundle.canonical_json(found))
    shutil.rmtree(store.folder, ignore_errors=True)
    return QuantizedCheckpoint.open(output), found


def _identity(training: Training, origin: Origin, processes: int) -> dict[str, Any]:
    """What decides the bytes of a run, by the words for it in a message."""
    stream, held_out = training.text
    return {
        "model or adapters": asdict(origin),
        "grids or method": training.plan.to_json(),
        "settings": asdict(training.settings),
        "processes": processes,
        "training text": stream.digest,
        "held-out text": held_out.digest,
        "calibration": training.calibration and training.calibration.digest,
    }


def _start(
    training: Training, origin: Origin, folder: Path, progress: Progress
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
        calibration=training.calibration,
        tokenizer_folder=source.checkpoint.folder,
        progress=progress,
        origin=lambda: origin,
    )


def _run(
    training: Training, store: Store, workers: Workers, progress: Progress, say: Say
) -> Result | None:
    from ..quantize.qat.run import run

    source = training.source
    start = QuantizedCheckpoint.open(store.folder / _START)
    given = training.text, training.settings
    return run(source.weights, source.decoder, start, *given, store, workers, progress, say)
