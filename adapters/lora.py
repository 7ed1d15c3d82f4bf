"""A PEFT LoRA folder, every tensor resolved to a weight of the base, nothing left over."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..architectures import SCORE, DecoderConfig, Kind, Weight
from ..architectures import weights as base_weights
from ..checkpoint import Float32, Weights
from ..errors import BadInput, Unsupported
from .adapter import EMBEDDING, HEAD, Adapter, Delta, TokenRows
from .config import CONFIG_FILE, AdapterConfig, read_config
from .file import DOWNLOAD_AGAIN, WEIGHTS_FILE, Stored, open_adapter
from .names import Part, Parts, place_all

_FACTORS: frozenset[Part] = frozenset(
    {"a", "b", "embedding_a", "embedding_b", "magnitude", "b_bias"}
)

__all__ = ["Adapter", "Delta", "TokenRows", "read_adapter"]


def read_adapter(folder: Path, name: str, weights: Weights, config: DecoderConfig) -> Adapter:
    """Read a folder that peft's `save_pretrained` wrote.

    Args:
        folder: holds adapter_config.json and adapter_model.safetensors.
        name: the adapter's name in bundles and reports.
        weights: the full-precision base.
        config: of the base; of a reward model also where the base is the causal language model
            that the adapter gives its score head.

    Raises:
        UsageError: the folder does not exist.
        BadInput: a damaged or incomplete folder, or one that does not fit this base.
        Unsupported: another kind of adapter, or something that no weight of this base can hold.
    """
    tensors = open_adapter(folder)
    settings = read_config(folder, config.reward)
    known = _known(config)
    source = _Source(settings, known, place_all(tensors, known), config.tied)
    _check_copies(source, weights)
    _check_complete(source)
    deltas, biases = _deltas(source)
    replaced, tokens = _replaced(source), _tokens(source)
    if config.reward and SCORE not in replaced and SCORE not in weights.names():
        raise _incomplete(SCORE, "task_type SEQ_CLS, over a base without a score head")
    _check_conflicts(deltas, replaced, tokens)
    if not deltas and not replaced and not tokens:
        raise BadInput(
            f"the adapter {folder.name} changes nothing",
            f"{WEIGHTS_FILE} holds only copies of weights of the base",
            DOWNLOAD_AGAIN,
        )
    unties = config.tied and not _tables_agree(deltas, replaced, tokens)
    if config.tied and not unties:
        for changes in (deltas, replaced, tokens):
            changes.pop(HEAD, None)
    return Adapter(
        name=name,
        config=settings.raw,
        trained_on=settings.trained_on,
        deltas=deltas,
        replaced=replaced,
        biases=biases,
        tokens=tokens,
        tied=config.tied,
        unties=unties,
    )


class _Source(NamedTuple):
    """A PEFT folder beside the weights of its base.

    `known` has the head also where it is tied: a folder may change it alone.
    """

    settings: AdapterConfig
    known: Mapping[str, Weight]
    parts: Mapping[str, Parts]
    tied: bool


def _known(config: DecoderConfig) -> dict[str, Weight]:
    known = {weight.name: weight for weight in base_weights(config)}
    if config.tied:
        known[HEAD] = Weight(HEAD, known[EMBEDDING].shape, Kind.HEAD, None)
    return known


def _module(weight: str) -> str:
    return weight.rpartition(".")[0]


def _listed_module(source: _Source, name: str) -> str:
    """The module whose mention in the config covers a weight.

    With ensure_weight_tying, peft treats a tied head as it treats the embedding.
    """
    follows = name == HEAD and source.tied and source.settings.ensure_tying
    return _module(EMBEDDING if follows else name)


def _replacements(source: _Source, name: str) -> list[Stored]:
    """Tensors that stand in place of a weight or bias of the base."""
    settings, parts = source.settings, source.parts.get(name, {})
    places: set[Part] = {"saved"}
    if settings.saves(_listed_module(source, name)):
        places |= {"plain"}
    if settings.bias != "none" and name.endswith(".bias"):
        places |= {"plain", "base_layer"}
    return [tensor for part, tensor in parts.items() if part in places]


def _check_copies(source: _Source, weights: Weights) -> None:
    """peft saves the tables it adapts along with the adapter; they must be those of the base."""
    for name, parts in source.parts.items():
        replacements = _replacements(source, name)
        base = EMBEDDING if source.tied and name == HEAD else name
        for part, tensor in parts.items():
            if part in ("plain", "base_layer", "original") and tensor not in replacements:
                _check_copy(tensor, source.known[name], base, weights)


def _check_copy(tensor: Stored, weight: Weight, base: str, weights: Weights) -> None:
    if tensor.shape != weight.shape:
        raise _misfit(tensor, weight.shape, "the base has another size or vocabulary")
    for start, rows in tensor.blocks():
        ours = weights.rows(base, start, start + len(rows))
        if not np.array_equal(tensor.rounded(ours), rows):
            raise BadInput(
                f"{WEIGHTS_FILE}: {tensor.name} differs from the base between the rows"
                f" {start} and {start + len(rows) - 1}",
                f"it is a copy of {base}, so the adapter was trained on another base",
                "give the base that was trained on; list trained tables in modules_to_save",
            )


def _check_complete(source: _Source) -> None:
    """Whatever the config promises must be in the file."""
    settings, parts = source.settings, source.parts
    for name, weight in source.known.items():
        module = _listed_module(source, name)
        adapted = _FACTORS & parts.get(name, {}).keys()
        if weight.is_matrix and not adapted and settings.targets(module):
            raise _incomplete(name, "target_modules")
        if _replacements(source, name):
            continue
        if settings.saves(module):
            raise _incomplete(name, "modules_to_save")
        beside = bool(_FACTORS & parts.get(f"{module}.weight", {}).keys())
        trained = settings.bias == "all" or (settings.bias == "lora_only" and beside)
        if trained and name.endswith(".bias"):
            raise _incomplete(name, f"bias = {settings.bias}")


def _replaced(source: _Source) -> dict[str, Stored]:
    replaced: dict[str, Stored] = {}
    for name in source.parts:
        for tensor in _replacements(source, name):
            if name in replaced:
                raise _twice(replaced[name], tensor)
            if tensor.shape != source.known[name].shape:
                raise _misfit(tensor, source.known[name].shape, f"it replaces {name} of the base")
            for _ in tensor.blocks():  # reading refuses NaN and Inf
                pass
            replaced[name] = tensor
    return replaced


def _deltas(source: _Source) -> tuple[dict[str, Delta], dict[str, Float32]]:
    """The update of every adapted weight, and what lora_bias adds to biases."""
    deltas, biases = {}, {}
    for name in sorted(source.parts):
        if not _FACTORS & source.parts[name].keys():
            continue
        factors = _factors(source, source.known[name])
        scale = source.settings.scale_of(_module(name))
        deltas[name] = _delta(factors, scale)
        if "b_bias" in factors:
            bias = _bias_of(source, name)
            biases[bias] = np.float32(scale) * factors["b_bias"]
    return deltas, biases


def _shapes(weight: Weight, settings: AdapterConfig) -> dict[Part, tuple[int, ...]]:
    """The LoRA tensors that one matrix must have in the file, and their shapes."""
    rank = settings.rank_of(_module(weight.name))
    rows, columns = weight.shape
    embedding = weight.kind is Kind.EMBEDDING
    shapes: dict[Part, tuple[int, ...]] = (
        {"embedding_a": (rank, rows), "embedding_b": (columns, rank)}  # stored transposed
        if embedding
        else {"a": (rank, columns), "b": (rows, rank)}
    )
    if settings.dora:
        shapes["magnitude"] = (columns if embedding else rows,)
    if settings.lora_bias and not embedding:
        shapes["b_bias"] = (rows,)
    return shapes


def _factors(source: _Source, weight: Weight) -> dict[Part, Float32]:
    """The LoRA tensors of one weight, read: exactly those of `_shapes`."""
    parts = source.parts[weight.name]
    found = {part: parts[part] for part in parts if part in _FACTORS}
    if not weight.is_matrix:
        raise _foreign(next(iter(found.values())), f"{weight.name} is a vector")
    shapes = _shapes(weight, source.settings)
    for part in found.keys() - shapes.keys():
        raise _foreign(found[part], f"{CONFIG_FILE} asks for {', '.join(shapes)} here")
    for part, shape in shapes.items():
        if part not in found:
            raise _incomplete(weight.name, f"part {part}, as the config and the other parts say")
        if found[part].shape != shape:
            rank = source.settings.rank_of(_module(weight.name))
            raise _misfit(found[part], shape, f"{weight.name} is {weight.shape}, the rank {rank}")
    return {part: found[part].rows() for part in shapes}


def _delta(factors: Mapping[Part, Float32], scale: float) -> Delta:
    embedding = "embedding_a" in factors
    a = factors["embedding_b"].T if embedding else factors["a"]
    b = factors["embedding_a"].T if embedding else factors["b"]
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    return Delta(a, b, scale, embedding, factors.get("magnitude"))


def _bias_of(source: _Source, weight: str) -> str:
    bias = f"{_module(weight)}.bias"
    if bias not in source.known:
        raise Unsupported(
            f"{CONFIG_FILE}: lora_bias = True cannot be merged into {weight}",
            "that layer of the base has no bias to add to",
            "train the adapter without lora_bias",
        )
    return bias


def _tokens(source: _Source) -> dict[str, TokenRows]:
    indices = source.settings.token_indices()
    tokens: dict[str, TokenRows] = {}
    for name, parts in source.parts.items():
        if "tokens" in parts:
            ids = next((ids for key, ids in indices.items() if _module(name).endswith(key)), [])
            tokens[name] = _token_rows(parts["tokens"], ids, source.known[name])
    # Equal ids for two tied tables are stored once, under the embedding.
    tied = source.tied and EMBEDDING in tokens
    stored_once = tokens[EMBEDDING].indices.tolist() if tied else []
    for key, ids in indices.items():
        if ids != stored_once and not any(_module(name).endswith(key) for name in tokens):
            raise _incomplete(key, "trainable_token_indices")
    if tied:
        tokens.setdefault(HEAD, tokens[EMBEDDING])
    return tokens


def _token_rows(tensor: Stored, ids: list[int], weight: Weight) -> TokenRows:
    count, columns = weight.shape
    if len(set(ids)) < len(ids) or max(ids, default=0) >= count:
        raise BadInput(
            f"{CONFIG_FILE}: trainable_token_indices for {weight.name}",
            f"they must be different ids below {count}",
            DOWNLOAD_AGAIN,
        )
    if tensor.shape != (len(ids), columns):
        raise _misfit(tensor, (len(ids), columns), f"{CONFIG_FILE} names {len(ids)} trained tokens")
    return TokenRows(np.array(ids, np.int64), tensor.rows())


def _check_conflicts(*changes: Mapping[str, object]) -> None:
    names = [name for change in changes for name in change]
    for name in names:
        if names.count(name) > 1:
            raise BadInput(
                f"{WEIGHTS_FILE}: {name} is changed in two ways",
                "LoRA, modules_to_save and trained tokens exclude each other on one weight",
                DOWNLOAD_AGAIN,
            )


def _tables_agree(
    deltas: Mapping[str, Delta],
    replaced: Mapping[str, Stored],
    tokens: Mapping[str, TokenRows],
) -> bool:
    """Whether embedding and head of a tied base stay equal."""
    tables = {EMBEDDING, HEAD}
    if any(len(tables & changes.keys()) == 1 for changes in (deltas, replaced, tokens)):
        return False
    return (
        (HEAD not in deltas or deltas[HEAD].same(deltas[EMBEDDING]))
        and (HEAD not in replaced or replaced[HEAD].same(replaced[EMBEDDING]))
        and (HEAD not in tokens or tokens[HEAD].same(tokens[EMBEDDING]))
    )


def _twice(first: Stored, second: Stored) -> BadInput:
    return BadInput(
        f"{WEIGHTS_FILE}: {first.name} and {second.name} replace the same weight",
        "the file holds it under an old and a new name",
        "save the adapter again with peft's save_pretrained",
    )


def _misfit(tensor: Stored, wanted: tuple[int, ...], why: str) -> BadInput:
    return BadInput(
        f"{WEIGHTS_FILE}: {tensor.name} has the shape {tensor.shape}, not {wanted}",
        why,
        "give the base that the adapter was trained on (base_model_name_or_path in its config)",
    )


def _foreign(tensor: Stored, why: str) -> BadInput:
    return BadInput(f"{WEIGHTS_FILE}: {tensor.name} does not belong there", why, DOWNLOAD_AGAIN)


def _incomplete(name: str, promised: str) -> BadInput:
    return BadInput(
        f"{WEIGHTS_FILE}: nothing in it for {name}",
        f"{CONFIG_FILE} promises it ({promised}), so the file is incomplete",
        DOWNLOAD_AGAIN,
    )
