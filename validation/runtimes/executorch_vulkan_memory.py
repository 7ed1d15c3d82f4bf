"""Bytes that a program of a GPU takes once it is loaded, as the program says."""

from __future__ import annotations

import math
from pathlib import Path

from ...export.executorch.decoder import FORWARD
from ...export.executorch_vulkan.schema import VULKAN
from ...export.flatbuffer import Values
from ..runtime import Memory
from .executorch_program import Program

_UPDATE, _ATTENTION = "update_cache.default", "llama.custom_sdpa.default"
_FLOAT = 4
_BYTES = {1: 1, 2: 1, 5: _FLOAT}  # of VkDataType


def memory(file: Path) -> Memory:
    """Memory of a program whose method `forward` is loaded; a GPU's memory is the phone's.

    The file is mapped. Each operator copies its constants to the GPU. Activations share as many
    allocations as the program says, beside the scores of attention before and after the softmax,
    what goes to the GPU and back, and the arena on the CPU. The driver's own is not known.
    """
    program = Program.open(file)
    method = program.method(FORWARD)
    (segment,) = program.graphs(method)
    graph, _ = program.graph(segment, VULKAN)
    tensors = {
        id: value["value"][1]
        for id, value in enumerate(graph["values"])
        if value["value"][0] == "VkTensor"
    }
    used = [tensors[id] for call in graph["chain"] for id in call["args"] if id in tensors]
    caches = {call["args"][1] for call in graph["chain"] if call["name"] == _UPDATE}
    shared: dict[int, int] = {}
    for tensor in tensors.values():
        place = tensor.get("mem_obj_id", 0)
        if place >= 0:
            shared[place] = max(shared.get(place, 0), _nbytes(tensor))
    ends = (tensors[id] for id in (*graph["input_ids"], *graph["output_ids"]) if id in tensors)
    return Memory(
        mapped=file.stat().st_size,
        repacked=sum(_nbytes(tensor) for tensor in used if tensor.get("constant_id", 0) >= 0),
        kv_cache=sum(_nbytes(tensors[id]) for id in caches),
        compute=sum(shared.values())
        + sum(_nbytes(tensor) for tensor in ends)
        + sum(method["non_const_buffer_sizes"])
        + _scores(graph["chain"], tensors),
    )


def _scores(calls: list[Values], tensors: dict[int, Values]) -> int:
    """Bytes of the scores of the longest run, twice; all layers use the same."""
    sizes = [0]
    for call in calls:
        if call["name"] == _ATTENTION:
            (_, tokens, heads, _), (_, room, *_) = (tensors[id]["dims"] for id in call["args"][:2])
            sizes.append(2 * _FLOAT * heads * tokens * room)
    return max(sizes)


def _nbytes(tensor: Values) -> int:
    return _BYTES[tensor["datatype"]] * math.prod(tensor["dims"])
