"""The child process of `conversion`: a decoder into a program of Core AI that lacks its weights.

What weights are is a name and a shape to torch, and a constant of that name to Core AI, with eight
bytes of content that differ from constant to constant: equal content would be merged. Neither
converter nor compiler looks at it.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...architectures import DecoderConfig
from ...decoder import TracedDecoder
from ..layout import INT4, UINT2, UINT4
from .layout import LEVELS, PLACES, ROPE, Form

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the local version of torch, which it takes for a later one
    import coreai_torch
    from coreai._compiler import ir
    from coreai._compiler.dialects import coreai

INPUTS, OUTPUT, FUNCTION = ("tokens", "position"), "logits", "main"
_LENGTH = 5  # tokens of the run that is traced; any other number comes from a symbol
_ALIGNMENT = 64
Values = Mapping[str, Any]


@torch.library.custom_op("slimport::held", mutates_args=())
def held(name: str, shape: list[int], dtype: torch.dtype) -> Tensor:
    """A weight that is not there."""
    return torch.empty(shape, dtype=dtype)


@held.register_fake
def _(name: str, shape: list[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype)


class _Program:
    """Constants of ours in the program that is being made.

    Args:
        stored: {name: (dtype, shape)} of the constants.
        forms: {name of a weight: how it is held, and its grid}; None: as it is.
    """

    def __init__(
        self,
        stored: Mapping[str, tuple[str, tuple[int, ...]]],
        forms: Mapping[str, tuple[Form, str] | None],
    ) -> None:
        self._stored, self._forms = stored, forms
        self._made: dict[str, Any] = {}

    def held(self, values: Values, node: Any, loc: Any) -> Any:
        """The lowering of `slimport::held`."""
        name = node.args[0]
        if name not in self._made:
            self._made[name] = self._weight(name)
        return self._made[name]

    def _weight(self, name: str) -> Any:
        held_as = self._forms.get(name)
        if held_as is None:
            return self._constant(name)
        (form, grid), stem = held_as, name.removesuffix(".weight")
        codes, scale = self._constant(f"{stem}.codes"), self._constant(f"{stem}.scale")
        if form.looked_up:
            return self._looked_up(codes, self._levels(grid), scale)
        groups = self._stored[f"{stem}.scale"][1]
        offset = ir.IntegerAttr.get(_element(form.codes), form.offset)
        zero = ir.FloatAttr.get(_element(form.scale), 0.0)
        made = coreai.blockwise_shift_scale(
            codes, scale, _splat(groups, form.codes, offset), _splat(groups, form.scale, zero)
        )
        return made if form.scale == "<f4" else coreai.cast(made, np.float32)

    def _looked_up(self, codes: Any, levels: Any, scale: Any) -> Any:
        (rows, columns), (_, groups, _) = codes.type.shape, scale.type.shape
        values = coreai.lut_to_dense(codes, levels, coreai.constant(np.array(0, np.int16)))
        values = coreai.reshape(values, [rows, groups, columns // groups])
        return coreai.reshape(coreai.broadcasting_mul(values, scale), [rows, columns])

    def _levels(self, grid: str) -> Any:
        name = f"{LEVELS}{grid}"
        if name not in self._made:
            self._made[name] = self._constant(name)
        return self._made[name]

    def _constant(self, name: str) -> Any:
        dtype, shape = self._stored[name]
        content = np.frombuffer(hashlib.sha256(name.encode()).digest()[:8], np.uint8).copy()
        kind = ir.RankedTensorType.get(list(shape), _element(dtype))
        attribute = ir.DenseResourceElementsAttr.get_from_buffer(
            content, name, kind, alignment=_ALIGNMENT
        )
        return coreai.ConstantOp(value=attribute).result


def _element(dtype: str) -> Any:
    unsigned = ir.IntegerType.get_unsigned
    made: dict[str, Callable[[], Any]] = {
        "<f4": ir.F32Type.get,
        "<f2": ir.F16Type.get,
        "<i4": lambda: ir.IntegerType.get_signed(32),
        "|i1": lambda: ir.IntegerType.get_signed(8),
        INT4: lambda: ir.IntegerType.get_signed(4),
        UINT4: lambda: unsigned(4),
        UINT2: lambda: unsigned(2),
    }
    return made[dtype]()


def _splat(shape: tuple[int, ...], dtype: str, value: Any) -> Any:
    kind = ir.RankedTensorType.get(list(shape), _element(dtype))
    return coreai.ConstantOp(value=ir.DenseElementsAttr.get_splat(kind, value)).result


def _put(values: Values, node: Any, loc: Any) -> Any:
    """Keys or values of a run into their cache: positions follow one another, so it is a slice.

    The lowering that Apple ships refuses a flexible length there.
    """
    cache, (first, second, where) = values[node.args[0].name], node.args[1]
    update = values[node.args[2].name]
    if first is not None or second is not None or len(node.args) > 3:
        raise ValueError(f"index_put with {node.args}")

    def constant(numbers: list[int]) -> Any:
        return coreai.constant(np.array(numbers, np.int32))

    # A slice of a flexible tensor is typed <?>, and slice_update would end the process with it.
    start = coreai.slice_(values[where.name], [0], [1], [1])
    start = coreai.reshape(coreai.cast(start, np.int32), [1])
    length = coreai.cast(coreai.slice_(coreai.get_shape(update), [2], [3], [1]), np.int32)
    shape = list(cache.type.shape)
    begin = coreai.concat(0, [constant([0, 0]), start, constant([0])])
    end = [constant(shape[:2]), coreai.add(start, length), constant(shape[3:])]
    return coreai.slice_update(cache, begin, coreai.concat(0, end), constant([1] * 4), update)


def convert(
    config: DecoderConfig,
    context: int,
    stored: Mapping[str, tuple[str, tuple[int, ...]]],
    forms: Mapping[str, tuple[Form, str] | None],
    shapes: Mapping[str, tuple[int, ...]],
    folder: Path,
) -> None:
    """Write the program to `folder`, an .aimodel.

    Args:
        shapes: {source name: shape} of the weights.
    """

    def weight(name: str) -> Tensor:
        found: Tensor = held(name, list(shapes[name]), torch.float32)
        return found

    def turned(index: int) -> Tensor | None:
        name = f"{ROPE}{index}"
        return held(name, list(stored[name][1]), torch.float32) if name in stored else None

    def places() -> Tensor:
        found: Tensor = held(PLACES, [context], torch.int64)
        return found

    model = TracedDecoder(config, context, weight, turned, places)
    given = tuple(torch.zeros(*shape, dtype=torch.int64) for shape in ((1, _LENGTH), (1,)))
    length = {1: torch.export.Dim("n", min=1, max=context)}
    with torch.no_grad():
        exported = torch.export.export(model.eval(), given, dynamic_shapes=(length, None))
        exported = exported.run_decompositions(coreai_torch.get_decomp_table())
    converter = coreai_torch.TorchConverter(mode=coreai_torch.TorchConverter.Mode.RELEASE)
    program = _Program(stored, forms)
    converter.register_torch_lowering("slimport::held.default")(program.held)
    converter.register_torch_lowering("aten::index_put.default", allow_override=True)(_put)
    converter.add_exported_program(
        exported,
        input_names=list(INPUTS),
        output_names=[OUTPUT],
        state_names=list(exported.graph_signature.buffers_to_mutate.values()),
        entrypoint_name=FUNCTION,
    )
    converter.to_coreai().save_asset(folder)


if __name__ == "__main__":
    torch.set_num_threads(1)
    convert(**pickle.load(sys.stdin.buffer))  # of the parent's making
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # no teardown of native libraries: the files are written
