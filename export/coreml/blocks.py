"""The operations that decoders are made of, each a method from values to a value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from ...quantize.grid import GRIDS
from ..layout import Layout, Matrix, Stored
from .adapter import HALVES, factor_name
from .layout import LEVELS, form_of
from .program import CASTS, FLOAT16, FLOAT32, Function, Shape, Value

SAME = 1e-9
_SCALED, _LOOKED_UP = "constexpr_blockwise_shift_scale", "constexpr_lut_to_dense"


class Blocks:
    """Operations of a function over the tensors of a weight file.

    Args:
        channels: the dimension of a tensor that products and norms go along.
        exact: whether factors that float16 does not have are multiplied in float32.
        adapted: the name of the function of an adapter; None: the base alone.
    """

    def __init__(
        self, function: Function, layout: Layout, channels: int, exact: bool, adapted: str | None
    ) -> None:
        self.function, self.layout = function, layout
        self.channels, self.exact, self.adapted = channels, exact, adapted
        self._weights: dict[tuple[str, Shape], Value] = {}

    def stored(self, name: str, *shape: int) -> Value:
        """A tensor of the weight file, made once; as `shape`, if given."""
        if (name, ()) not in self._weights:
            tensor = self.layout.by_name[name]
            tensor = replace(tensor, shape=shape or tensor.shape)
            self._weights[name, ()] = self.function.stored(tensor, identifier(name))
        return self._weights[name, ()]

    def updates(self, matrix: Matrix, *tail: int) -> list[Value]:
        """The factors that an adapter has for a matrix, if it has."""
        if self.adapted is None:
            return []
        names = [factor_name(self.adapted, matrix.name, which) for which in HALVES]
        held = self.layout.by_name
        return [self.stored(name, *held[name].shape, *tail) for name in names if name in held]

    def weight(self, matrix: Matrix, *tail: int) -> Value:
        """A matrix that the device decompresses, made once; with `tail` behind its shape.

        A tied table that has two shapes is made twice, of the same codes.
        """
        if (matrix.name, tail) not in self._weights:
            again = any(name == matrix.name for name, _ in self._weights)
            self._weights[matrix.name, tail] = self._decompressed(matrix, tail, again)
        return self._weights[matrix.name, tail]

    def _decompressed(self, matrix: Matrix, tail: tuple[int, ...], again: bool) -> Value:
        (choice,), function = matrix.choices, self.function
        name = identifier(choice.weight.name) + (AGAIN if again else "")

        def held(part: str) -> Stored:
            tensor = self.layout.by_name[part]
            return replace(tensor, shape=(*tensor.shape, *tail))

        if choice.grid is None:
            return function.stored(held(choice.weight.name), name)
        form, codes = form_of(choice), held(f"{matrix.name}.codes")
        if form.scale is None:
            tensor = self.layout.by_name[f"{matrix.name}.levels"]
            groups, *rest = tensor.shape
            table = replace(tensor, shape=(groups, *tail, *rest))
            shape = codes.shape
            return function.decompressed(_LOOKED_UP, name, shape, FLOAT16, indices=codes, lut=table)
        dtype = FLOAT16 if form.scale == "<f2" else FLOAT32
        scale = held(f"{matrix.name}.scale")
        data: Stored | Value = codes
        if form.levels is not None:
            data = function.decompressed(
                _LOOKED_UP,
                f"{name}_levels",
                codes.shape,
                "INT8" if form.levels == "|i1" else FLOAT32,
                indices=codes,
                lut=self._levels(choice.grid.name),
            )
        given = {"data": data, "scale": scale}
        if form.zero_point is not None:
            given["offset"] = held(f"{matrix.name}.zero_point")
        return function.decompressed(_SCALED, name, codes.shape, dtype, **given)

    def _levels(self, grid: str) -> Stored | npt.NDArray[np.int8]:
        if f"{LEVELS}{grid}" in self.layout.by_name:
            return self.layout.by_name[f"{LEVELS}{grid}"]
        low, high = GRIDS[grid].low, GRIDS[grid].high
        return np.arange(low, high + 1, dtype=np.int8).reshape(1, 1, -1, 1)

    def multiplied(
        self, name: str, x: Value, y: Value, shape: Shape, across: bool = False
    ) -> Value:
        """x @ y; `across`: x @ y.T."""
        return self.function.op(
            "matmul", name, shape, x=x, y=y, transpose_x=False, transpose_y=across
        )

    def looked_up(self, name: str, table: Value, places: Value) -> Value:
        """Rows of a table: (*places, columns)."""
        return self.function.op(
            "gather",
            name,
            (*places.shape, *table.shape[1:]),
            table.dtype,
            x=table,
            indices=places,
            axis=0,
            batch_dims=0,
            validate_indices=False,
        )

    def capped(self, name: str, x: Value, cap: float, made: str = "") -> Value:
        """x drawn softly into (-cap, cap)."""
        x = self.scaled(f"{name}_narrowed", x, 1 / cap)
        x = self.function.op("tanh", f"{name}_bent", x.shape, x=x)
        return self.scaled(made or f"{name}_capped", x, cap)

    def parts(self, x: Value, sizes: Sequence[int]) -> list[Value]:
        """Consecutive channels."""
        ends = np.cumsum(sizes)
        return [
            self.part(f"{x.name}_{end}", x, int(end) - size, int(end), self.channels)
            for size, end in zip(sizes, ends, strict=True)
        ]

    def part(self, name: str, x: Value, start: int, stop: int, axis: int = -1) -> Value:
        """[start:stop) of a dimension."""
        axis %= len(x.shape)
        shape, others = list(x.shape), [place != axis for place in range(len(x.shape))]
        shape[axis] = stop - start
        return self.function.op(
            "slice_by_index",
            name,
            tuple(shape),
            x.dtype,
            x=x,
            begin=[0 if other else start for other in others],
            end=[0 if other else stop for other in others],
            end_mask=others,
        )

    def joined(self, name: str, values: Sequence[Value | list[int]], axis: int) -> Value:
        """Values one after the other; lists of ints among them are constants."""
        held = [
            each if isinstance(each, Value) else self.function.constant(each, f"{name}_{place}")
            for place, each in enumerate(values)
        ]
        shape = list(held[0].shape)
        sizes = [each.shape[axis] for each in held]
        known = [size for size in sizes if size is not None]
        shape[axis] = sum(known) if len(known) == len(sizes) else None
        return self.function.op(
            "concat", name, tuple(shape), held[0].dtype, values=held, axis=axis, interleave=False
        )

    def two(self, kind: str, name: str, x: Value, y: Value) -> Value:
        """An operation on two tensors of one type, the second as small as it broadcasts from."""
        return self.function.op(kind, name, x.shape, x.dtype, x=x, y=y)

    def scaled(self, name: str, x: Value, factor: float) -> Value:
        """x * factor, nothing for 1."""
        if factor == 1:
            return x
        for kind, wanted in (("mul", factor), ("real_div", 1 / factor)):
            half = np.float16(wanted)
            if x.dtype == FLOAT16 and abs(float(half) - wanted) <= SAME * abs(wanted):
                return self.function.op(kind, name, x.shape, FLOAT16, x=x, y=half)
        if x.dtype == FLOAT16 and not self.exact:
            return self.function.op("mul", name, x.shape, FLOAT16, x=x, y=np.float16(factor))
        wide = self.cast(f"{name}_wide", x, FLOAT32)
        made = name if wide is x else f"{name}_scaled"
        wide = self.function.op("mul", made, x.shape, FLOAT32, x=wide, y=np.float32(factor))
        return self.cast(name, wide, x.dtype)

    def wide_turns(self, name: str, cos: Value, sin: Value) -> tuple[Value, Value]:
        """Tables for whole heads of tables for halves; `turned` takes the first sines negated."""
        negated = self.scaled(f"{name}_negated", sin, -1.0)
        wide = self.joined(f"{name}_cosines", [cos, cos], -1)
        return wide, self.joined(f"{name}_sines", [negated, sin], -1)

    def turned(self, name: str, x: Value, cos: Value, sin: Value) -> Value:
        """Heads with their first numbers rotated in halves, as many as the tables are wide."""
        width, size = cos.shape[-1], x.shape[-1]
        assert width is not None and size is not None, "tables and heads have fixed widths"
        first, second = (
            self.part(f"{name}_{which}_half", x, start, start + width // 2)
            for which, start in (("first", 0), ("second", width // 2))
        )
        swapped = self.joined(f"{name}_swapped", [second, first], -1)
        kept = self.part(f"{name}_turning", x, 0, width) if width < size else x
        turned = self.two(
            "add",
            f"{name}_turned",
            *(
                self.two("mul", f"{name}_{by}", each, table)
                for by, each, table in (("cosines", kept, cos), ("sines", swapped, sin))
            ),
        )
        if width == size:
            return turned
        rest = self.part(f"{name}_rest", x, width, size)
        return self.joined(f"{name}_whole", [turned, rest], -1)

    def cast(self, name: str, x: Value, dtype: str) -> Value:
        """x as another type."""
        if x.dtype == dtype:
            return x
        return self.function.op("cast", name, x.shape, dtype, x=x, dtype=CASTS[dtype])

    def reshaped(self, name: str, x: Value, *shape: int) -> Value:
        """x with other sizes; -1: what is left."""
        sizes: Shape = tuple(None if size < 0 else size for size in shape)
        return self.function.op("reshape", name, sizes, x.dtype, x=x, shape=list(shape))

    def transposed(self, name: str, x: Value, *order: int) -> Value:
        """x with its dimensions in another order."""
        shape = tuple(x.shape[place] for place in order)
        return self.function.op("transpose", name, shape, x.dtype, x=x, perm=list(order))


AGAIN = "_again"  # behind the name of a table that is made twice


def identifier(source: str) -> str:
    """A source name as MIL writes identifiers."""
    return source.replace(".", "_").replace("/", "_")
