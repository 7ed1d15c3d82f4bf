"""Names of tensors in a PEFT file, old and new: which weight of the base, and which part of it."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from typing import Literal, NamedTuple

from ..errors import BadInput, SlimportError, Unsupported
from .file import WEIGHTS_FILE, Stored

Part = Literal[
    "a", "b", "b_bias", "embedding_a", "embedding_b", "magnitude",
    "tokens", "saved", "base_layer", "original", "plain",
]  # fmt: skip

Parts = dict[Part, Stored]

# After the wrapper's name may stand the adapter's, such as `default`; the first match counts.
_NAMES: dict[Part, str] = {
    "a": r"(?P<module>.+)\.lora_A(\.[^.]+)?\.weight",
    "b": r"(?P<module>.+)\.lora_B(\.[^.]+)?\.weight",
    "b_bias": r"(?P<module>.+)\.lora_B(\.[^.]+)?\.bias",
    "embedding_a": r"(?P<module>.+)\.lora_embedding_A(\.[^.]+)?",
    "embedding_b": r"(?P<module>.+)\.lora_embedding_B(\.[^.]+)?",
    "magnitude": r"(?P<module>.+)\.lora_magnitude_vector(\.[^.]+){0,2}",
    "tokens": r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta(\.[^.]+)?",
    "saved": r"(?P<module>.+)\.modules_to_save(\.[^.]+)?\.(?P<tensor>weight|bias)",
    "base_layer": r"(?P<module>.+?)(\.token_adapter)?\.base_layer\.(?P<tensor>weight|bias)",
    "original": r"(?P<module>.+)\.original_module\.(?P<tensor>weight|bias)",
    "plain": r"(?P<module>.+)\.(?P<tensor>weight|bias)",
}
_PATTERNS = {part: re.compile(pattern) for part, pattern in _NAMES.items()}
_HEADS = re.compile(r"(^|\.)(score|classifier|classification_head|v_head|value_head|qa_outputs)\.")


class Place(NamedTuple):
    """Where a tensor of the file belongs: a weight or bias of the base, and what it is to it."""

    weight: str
    part: Part


def place(name: str) -> Place | None:
    """`base_model.model.lm_head.lora_A.default.weight` -> (`lm_head.weight`, "a")."""
    bare = name.removeprefix("base_model.model.")
    for part, pattern in _PATTERNS.items():
        if match := pattern.fullmatch(bare):
            tensor = match.groupdict().get("tensor", "weight")
            return Place(f"{match['module']}.{tensor}", part)
    return None


def place_all(tensors: Mapping[str, Stored], known: Container[str]) -> dict[str, Parts]:
    """{weight or bias of the base: {part: tensor}}, with every tensor of the file placed.

    Raises:
        BadInput: a tensor belongs to no weight of the base, or two tensors to the same place.
        Unsupported: the head of a reward model or classifier.
    """
    placed: dict[str, Parts] = {}
    leftover = []
    for name, tensor in tensors.items():
        where = place(name)
        if where is None or where.weight not in known:
            leftover.append(name)
            continue
        parts = placed.setdefault(where.weight, {})
        if where.part in parts:
            raise BadInput(
                f"{WEIGHTS_FILE}: {parts[where.part].name} and {name} are the same tensor",
                "the file holds two adapters, or one under an old and a new name",
                "save one adapter alone with peft's save_pretrained",
            )
        parts[where.part] = tensor
    if leftover:
        raise _leftover(leftover)
    return placed


def _leftover(names: list[str]) -> SlimportError:
    if heads := [name for name in names if _HEADS.search(name)]:
        return Unsupported(
            f"{WEIGHTS_FILE}: {heads[0]} is the head of a reward model or classifier",
            "such an adapter scores texts, it is not exported as a language model",
            "use an adapter trained with task_type CAUSAL_LM",
        )
    return BadInput(
        f"{WEIGHTS_FILE}: {len(names)} tensors fit no weight of the base: {some(names)}",
        "the adapter was trained on another architecture or number of layers",
        "give the base that the adapter was trained on (base_model_name_or_path in its config)",
    )


def some(names: Iterable[str]) -> str:
    """The first three names, and how many more."""
    names = sorted(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
