"""The program around the graph: one loop that looks up a part of the tokens and calls the GPU.

Part of the reader, which shares no code with what writes the file. Every instruction and each of
its arguments is compared with what they have to be, so that no token is left out or read twice.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ..executorch.opened import Lookup, Program
from ..executorch.products import FEW, elements, text

_BACKEND = "VulkanBackend"
_INT64, _FLOAT32 = 4, 6  # of scalar_type.fbs
_KERNELS = (
    "aten::sym_size.int",
    "executorch_prim::add.Scalar",
    "aten::slice_copy.Tensor_out",
    "aten::add.Scalar_out",
)
_LAST = "executorch_prim::ge.Scalar"
_FEWEST, _MOST = 10, 11  # instructions; a table of float16 is converted by one more
_AGAIN = 2  # where the loop begins


def read_loop(program: Program, method: str) -> tuple[Lookup, memoryview]:
    """The embedding that a method looks up, and what it hands to the GPU.

    Raises:
        ValueError, or what the generated classes raise: it is another program.
    """
    plan = program.plan(method)
    steps = list(program.calls(plan))
    if not _FEWEST <= len(steps) <= _MOST or (plan.InputsLength(), plan.OutputsLength()) != (2, 1):
        raise ValueError(f"{method} has {len(steps)} instructions")
    loop = _Loop(program, plan)
    return loop.read(steps)


class _Literal(NamedTuple):
    """An integer that stands in the file, and that nothing computes; None: any."""

    number: int | None


_ONE = _Literal(1)
_Wanted = int | _Literal  # a value, or what it has to be


class _Loop:
    def __init__(self, program: Program, plan: Any) -> None:
        self.program, self.plan = program, plan
        self.literals: set[int] = set()

    def read(self, steps: list[tuple[str, Any]]) -> tuple[Lookup, memoryview]:
        """Compare every instruction, in their order."""
        plan = self.plan
        tokens, position, logits = plan.Inputs(0), plan.Inputs(1), plan.Outputs(0)
        size, begin, ahead, cut, place, *found, call, on, compared, back = steps
        count = self.kernel(size, _KERNELS[0], [tokens, _ONE])
        start = self.moved(begin)
        self.literal(begin[1].MoveFrom(), _Literal(0))
        end = self.kernel(ahead, _KERNELS[1], [start, _Literal(None)])
        part = self.kernel(cut, _KERNELS[2], [tokens, _ONE, start, end, _ONE])
        first = self.kernel(place, _KERNELS[3], [position, start, _ONE])
        lookup, rows = self.looked_up(found, part)
        payload = self.delegated(call, [rows, first, logits])
        if self.moved(on) != start or on[1].MoveFrom() != end:
            raise ValueError("the loop does not go on behind its part")
        done = self.kernel(compared, _LAST, [start, count])
        if back[0] != "JumpFalseCall" or back[1].CondValueIndex() != done:
            raise ValueError("the loop does not end where its tokens do")
        if back[1].DestinationInstruction() != _AGAIN:
            raise ValueError("the loop begins elsewhere")
        computed = {count, start, end, done}
        if len(computed) != 4 or computed & self.literals:
            raise ValueError("two numbers of the loop are one")
        step = self.literal(ahead[1].Args(1), _Literal(None))
        for value, longest in ((part, step), (rows, step)):
            if self.tensor(value)[1][1:2] != [longest]:
                raise ValueError(f"the loop steps over {step} tokens")
        return lookup, payload

    def kernel(self, step: tuple[str, Any], operator: str, wanted: list[_Wanted]) -> int:
        """The value that a kernel fills, which is its last argument; it is given those `wanted`."""
        kind, call = step
        if kind != "KernelCall" or self.name(call) != operator:
            raise ValueError(f"{operator} does not stand where it has to")
        args: list[int] = list(elements(call, "Args", FEW))
        if len(args) < len(wanted) + 1:
            raise ValueError(f"{operator} is given {len(args)} arguments")
        for given, each in zip(args, wanted, strict=False):
            if isinstance(each, _Literal):
                self.literal(given, each)
            elif given != each:
                raise ValueError(f"{operator} is given value {given}, not {each}")
        return args[-1]

    def looked_up(self, steps: list[tuple[str, Any]], tokens: int) -> tuple[Lookup, int]:
        """The embedding, and the value that its rows become."""
        (kind, call), *converted = steps
        lookups = list(self.program.lookup(self.plan, call, tokens)) if kind == "KernelCall" else []
        if len(lookups) != 1 or len(converted) != (lookups[0].scale is None):
            raise ValueError(f"the program looks up {len(lookups)} embeddings")
        made = call.Args(call.ArgsLength() - 1)
        for step in converted:
            made = self.kernel(step, "aten::_to_copy.out", [made])
        return lookups[0], made

    def delegated(self, step: tuple[str, Any], wanted: list[int]) -> memoryview:
        """What the backend is handed."""
        kind, call = step
        if kind != "DelegateCall" or list(elements(call, "Args", FEW)) != wanted:
            raise ValueError("the GPU is not given the rows of the part and its position")
        given = [self.tensor(value)[0] for value in wanted]
        if given != [_FLOAT32, _INT64, _FLOAT32]:
            raise ValueError(f"the GPU is given numbers of the types {given}")
        index = self.program.segment_of(self.plan, call, _BACKEND)
        return self.program.segment(index)

    def moved(self, step: tuple[str, Any]) -> int:
        """The value that becomes another."""
        if step[0] != "MoveCall":
            raise ValueError(f"a {step[0]} stands where the loop moves on")
        target: int = step[1].MoveTo()
        return target

    def literal(self, value: int, wanted: _Literal) -> int:
        self.literals.add(value)
        kind, table = self.program.argument(self.plan, value)
        if kind != "Int" or wanted.number not in (None, table.IntVal()):
            raise ValueError(f"value {value} is a {kind}, or not {wanted.number}")
        found: int = table.IntVal()
        return found

    def tensor(self, value: int) -> tuple[int, list[int]]:
        kind, table = self.program.argument(self.plan, value)
        if kind != "Tensor":
            raise ValueError(f"value {value} is a {kind}")
        return table.ScalarType(), list(elements(table, "Sizes", FEW))

    def name(self, call: Any) -> str:
        operator = self.plan.Operators(call.OpIndex())
        return f"{text(operator.Name())}.{text(operator.Overload())}"
