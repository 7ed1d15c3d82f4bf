"""The graph of the Vulkan backend as an eager model: operator by operator, in float32 on this CPU.

What an operator does with its arguments is what the backend's sources say, release 1.4.1. Tensors
that share memory there overwrite one another here too, and a cache that was never written holds no
numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from ...export.flatbuffer import Values
from .executorch_program import malformed

_DTYPES = {1: "|u1", 2: "|i1", 5: "<f4"}  # of VkDataType
_LINEAR, _BYTE, _NIBBLE = (
    *("aten.linear.default", "et_vk.linear_q8csw.default", "et_vk.linear_q4gsw.default"),
)
_UPDATE, _PREPACK = "update_cache.default", "et_vk.prepack.default"
_SLICE = "aten.slice_copy.Tensor"


class Graph:
    """A graph with its caches.

    Args:
        values: the flatbuffer.
        named: gives the bytes that the file has under a key.
    """

    def __init__(self, values: Values, named: Callable[[str], npt.NDArray[np.uint8]]) -> None:
        self._calls = [(call["name"], call["args"]) for call in values["chain"]]
        self._values = [each["value"] for each in values["values"]]
        self._keys = [entry["named_key"] for entry in values["constants"]]
        (self._rows, self._position), (self._logits,) = values["input_ids"], values["output_ids"]
        self._named = named
        self._matrices: dict[int, Tensor] = {}
        self._constants: dict[int, Tensor] = {}
        self.reset()

    def reset(self) -> None:
        """Forget the text: no position of a cache holds a number."""
        self._kept: dict[int, Tensor] = {}
        self._here: dict[int, Tensor] = {}
        self._holders: dict[int, int] = {}

    def run(self, rows: Tensor, position: int, every: bool) -> Tensor:
        """Logits (1, 1, vocab) of the last token.

        Args:
            rows: of the embedding, float32 (1, n, hidden_size).
            position: of the first of them.
            every: of all tokens, (1, n, vocab): the last one is not taken out of them.

        Raises:
            ValidationFailed: the graph has an operator that is not known, or is given what it does
                not take.
        """
        self._here, self._holders, self._start = {}, {}, position
        self._write(self._rows, rows)
        for name, ids in self._calls:
            if name == _SLICE and every:
                self._hold(ids[-1], self._argument(ids[0]))
            elif name == _UPDATE:
                self._update(*ids)
            elif name in (_LINEAR, _BYTE, _NIBBLE):
                x, bias = self._argument(ids[0]), self._argument(ids[-2])
                made = functional.linear(x, self._matrix(name, ids), bias)
                self._write(ids[-1], made, every)
            elif name in _OPERATORS:
                given = [self._argument(id) for id in ids[:-1]]
                self._write(ids[-1], _OPERATORS[name](*given), every)
            else:
                raise malformed(f"its graph has the operator {name}")
        logits: Tensor = self._argument(self._logits)
        return logits

    def _argument(self, id: int) -> Any:
        kind, fields = self._values[id]
        if kind == "VkTensor":
            if fields.get("constant_id", 0) >= 0:
                return self._constant(id, fields)
            if id not in self._here and id not in self._kept:
                raise malformed(f"its graph reads value {id}, which is not there")
            return self._here[id] if id in self._here else self._kept[id]
        if kind == "ValueList":
            return [self._argument(each) for each in fields["items"]]
        if kind == "IntList":
            return fields["items"]
        if kind == "SymInt":
            return self._start
        names = {"Int": "int_val", "Double": "double_val", "Bool": "bool_val"}
        return None if kind == "Null" else fields.get(names[kind], 0)

    def _write(self, id: int, made: Tensor | list[Tensor], every: bool = False) -> None:
        """Let a tensor be what an operator made, within the size that it was declared with."""
        if isinstance(made, list):
            for each, tensor in zip(self._values[id][1]["items"], made, strict=True):
                self._write(each, tensor, every)
            return
        dims = self._values[id][1]["dims"]
        fits = made.dim() == len(dims) and all(
            size <= most for size, most in zip(made.shape, dims, strict=True)
        )
        if not fits and not every:
            raise malformed(f"its graph makes {tuple(made.shape)} where {dims} has room")
        self._hold(id, made)

    def _hold(self, id: int, made: Tensor) -> None:
        memory = self._values[id][1].get("mem_obj_id", 0)
        if memory < 0:
            self._kept[id] = made
            return
        self._here.pop(self._holders.get(memory, id), None)
        self._holders[memory], self._here[id] = id, made

    def _update(self, state: int, cache: int, position: int, nothing: int) -> None:
        """Rows beyond the cache are dropped."""
        new, start = self._argument(state), self._argument(position)
        if cache not in self._kept:
            self._kept[cache] = torch.full(self._values[cache][1]["dims"], math.nan)
        kept = self._kept[cache]
        stop = min(start + new.shape[1], kept.shape[1])
        kept[:, start:stop] = new[:, : stop - start]

    def _constant(self, id: int, fields: Values) -> Tensor:
        if id not in self._constants:
            self._constants[id] = torch.from_numpy(np.array(self._bytes(fields)))
        return self._constants[id]

    def _bytes(self, fields: Values) -> npt.NDArray[Any]:
        """What the file has of a constant, mapped."""
        key, dims = self._keys[fields.get("constant_id", 0)], fields["dims"]
        dtype, found = np.dtype(_DTYPES[fields["datatype"]]), self._named(key)
        if found.size != math.prod(dims) * dtype.itemsize:
            raise malformed(f"{key} has {found.size} bytes, and is {dtype} {dims}")
        array: npt.NDArray[Any] = found.view(dtype).reshape(dims)
        return array

    def _matrix(self, name: str, ids: list[int]) -> Tensor:
        """float32 (outputs, inputs): what codes and scales mean."""
        if (weight := ids[1]) not in self._matrices:
            codes = self._bytes(self._values[weight][1])
            if name == _LINEAR:
                found = np.array(codes)
            else:
                scale = self._bytes(self._values[ids[2]][1])
                group = None if name == _BYTE else self._argument(ids[3])
                found = _meant(codes, scale, group)
            self._matrices[weight] = torch.from_numpy(found)
        return self._matrices[weight]


def _meant(
    codes: npt.NDArray[Any], scale: npt.NDArray[Any], group: int | None
) -> npt.NDArray[np.float32]:
    """Codes of 8 bits and a scale for each row, or of 4 bits raised by 8, the even one lower."""
    found: npt.NDArray[np.float32]
    if group is None:
        found = codes.astype(np.float32) * scale.reshape(-1, 1)
        return found
    levels = np.stack([codes & 15, codes >> 4], -1).reshape(len(codes), -1, group)
    found = levels.astype(np.float32) - np.float32(8)
    found *= scale.T[:, :, None]
    return found.reshape(len(codes), -1)


def _normalized(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + epsilon) * weight


def _turned(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, start: int) -> list[Tensor]:
    """The first numbers of each head, as many as a table is wide; of which half is read."""
    width = cos.shape[1]
    stop = start + query.shape[1]
    c, s = (table[start:stop, None, : width // 2] for table in (cos, sin))
    made = []
    for x in (query, key):
        first, second, rest = x[..., : width // 2], x[..., width // 2 : width], x[..., width:]
        made.append(torch.cat([first * c - second * s, second * c + first * s, rest], -1))
    return made


def _attended(query: Tensor, keys: Tensor, values: Tensor, start: int, *more: Any) -> Tensor:
    """Causal attention over what the caches hold, its scores divided by sqrt(head_dim)."""
    if any(each is not None for each in more):
        raise malformed("its attention is given a mask or a scale, and would not load")
    tokens, shared = query.shape[1], query.shape[2] // keys.shape[2]
    seen = start + tokens
    q = query.transpose(1, 2)
    k, v = (
        cache[:, :seen].transpose(1, 2).repeat_interleave(shared, 1) for cache in (keys, values)
    )
    scores = q @ k.transpose(2, 3) / math.sqrt(query.shape[3])
    ahead = torch.ones(tokens, seen, dtype=torch.bool).triu(start + 1)
    shares = torch.softmax(scores.masked_fill(ahead, -math.inf), -1)
    return (shares @ v).transpose(1, 2).contiguous()


def _part(x: Tensor, dim: int, start: int, end: int, step: int) -> Tensor:
    places = range(x.shape[dim])[start:end:step]
    return x.index_select(dim, torch.tensor(list(places)))


_OPERATORS: dict[str, Callable[..., Tensor | list[Tensor]]] = {
    _PREPACK: lambda constant: constant,
    _SLICE: _part,
    "aten.view_copy.default": lambda x, sizes: x.reshape(sizes),
    "aten.cat.default": lambda parts, dim: torch.cat(parts, dim),
    "aten.add.Tensor": lambda x, other, alpha: x + alpha * other,
    "aten.mul.Tensor": torch.mul,
    "aten.sigmoid.default": torch.sigmoid,
    "aten.tanh.default": torch.tanh,
    "et_vk.rms_norm.default": _normalized,
    "et_vk.apply_rotary_emb_hf.default": _turned,
    "llama.custom_sdpa.default": _attended,
}
