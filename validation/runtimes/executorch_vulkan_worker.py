"""The child process behind `executorch_vulkan`: the program of a GPU as an eager model.

It reads the shipped file and runs each instruction of its method: the loop over the prompt, the
embedding that is looked up on the CPU, and the graph of the GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...errors import SlimportError
from ...export.executorch.decoder import ALL_LOGITS, FORWARD
from ...export.executorch_vulkan.schema import VULKAN
from ...quantize.grid import Float32
from .. import worker
from . import executorch_vulkan_memory
from .executorch_program import Program, malformed
from .executorch_vulkan_graph import Graph
from .executorch_worker import greedy, refuse_longer, vocabulary_of, write_logits

_TYPES = {0: "|u1", 1: "|i1", 5: "<f2", 6: "<f4"}  # of scalar_type.fbs
_STEPS = 16  # instructions for a token, at most


class Model:
    """A program whose method `forward` is run, in the place of all others too."""

    def __init__(self, file: Path, threads: int) -> None:
        torch.set_num_threads(threads)
        self._program = Program.open(file)
        with _checked():
            plan = self._program.method(FORWARD)
            self._instructions = plan["chains"][0]["instructions"]
            self._inputs, (self._made,) = plan["inputs"], plan["outputs"]
            self._operators = [f"{each['name']}.{each['overload']}" for each in plan["operators"]]
            self._values = [self._value(*each["val"]) for each in plan["values"]]
            (delegate,) = plan["delegates"]
            if delegate["id"] != "VulkanBackend":
                raise malformed(f"it has a delegate of {delegate['id']}")
            graph, _ = self._program.graph(delegate["processed"].get("index", 0), VULKAN)
            self._graph = Graph(graph, self._program.named)
            ((self.vocab_size,), (self.context,)) = (
                self.told(name) for name in ("get_vocab_size", "get_max_context_len")
            )
        self.chunk = self.context  # the program cuts a prompt by itself

    def names(self) -> Collection[str]:
        return [plan["name"] for plan in self._program.values["execution_plan"]]

    def told(self, name: str) -> list[int]:
        plan = self._program.method(name)
        return [self._value(*plan["values"][index]["val"]) for index in plan["outputs"]]

    def reset(self) -> None:
        """Forget the text."""
        self._graph.reset()

    def run(self, method: str, ids: npt.NDArray[np.int32], position: int) -> Float32:
        refuse_longer(self, position + ids.size)
        values, found, every = self._values, list[Tensor](), method == ALL_LOGITS
        given = (torch.from_numpy(ids.astype(np.int64))[None], torch.tensor([position]))
        for index, tensor in zip(self._inputs, given, strict=True):
            values[index] = tensor
        with _checked(), torch.inference_mode():
            at = 0
            for _ in range(_STEPS * (1 + ids.size)):
                if at == len(self._instructions):
                    break
                kind, call = self._instructions[at]["instr_args"]
                at += 1
                if kind == "DelegateCall":
                    rows, first, made = call["args"]
                    values[made] = self._graph.run(values[rows], int(values[first][0]), every)
                    found.append(values[made][0])
                elif kind == "KernelCall":
                    self._call(self._operators[call.get("op_index", 0)], call["args"])
                elif kind == "MoveCall":
                    values[call["move_to"]] = values[call["move_from"]]
                elif kind == "JumpFalseCall":
                    if not values[call["cond_value_index"]]:
                        at = call["destination_instruction"]
                else:
                    raise malformed(f"it has a {kind}")
            else:
                raise malformed("its loop does not end")
            logits: Float32 = (torch.cat(found) if every else values[self._made][0]).numpy()
        return logits

    def _call(self, operator: str, args: list[int]) -> None:
        if operator not in _KERNELS:
            raise malformed(f"it calls {operator}")
        given = [self._values[index] for index in args[:-1]]
        self._values[args[-1]] = _KERNELS[operator](*given)

    def _value(self, kind: str, fields: Any) -> Any:
        if kind == "Tensor":
            if not fields.get("data_buffer_idx", 0):
                return None
            dtype, shape = np.dtype(_TYPES[fields.get("scalar_type", 0)]), fields["sizes"]
            content = self._program.constant(fields)[: dtype.itemsize * int(np.prod(shape))]
            return content.view(dtype).reshape(shape)
        names = {"Int": "int_val", "Bool": "bool_val", "Double": "double_val"}
        return None if kind == "Null" else fields.get(names[kind], 0)


@contextmanager
def _checked() -> Iterator[None]:
    """What a program that is not as it should be makes of its interpreter, as ValidationFailed."""
    try:
        yield
    except SlimportError:
        raise
    except (LookupError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise malformed(f"it cannot be run: {type(error).__name__}: {error}") from error


def _bytes(table: Any, scale: Any, zero: None, low: int, high: int, ids: Tensor, _: Any) -> Tensor:
    return _scaled(table[ids.numpy()], scale[ids.numpy()])


def _nibbles(
    table: Any, scale: Any, zero: None, low: int, high: int, ids: Tensor, _: Any
) -> Tensor:
    """The even code stands in the high half of a byte, raised by 8."""
    rows = table[ids.numpy()]
    codes = np.stack([rows >> 4, rows & 15], -1).reshape(*rows.shape[:-1], -1)
    return _scaled(codes.astype(np.int8) - np.int8(8), scale[ids.numpy()])


def _pairs_of_bits(
    table: Any, scale: Any, zero: Any, low: int, high: int, ids: Tensor, _: Any
) -> Tensor:
    """The first of four stands in the lowest bits of a byte, raised by 2; less its zero point."""
    rows = table[ids.numpy()]
    codes = np.stack([rows >> place & 3 for place in (0, 2, 4, 6)], -1).reshape(
        *rows.shape[:-1], -1
    )
    scales, zeros = scale[ids.numpy()], zero[ids.numpy()]
    grouped = codes.astype(np.float32).reshape(*scales.shape, -1) - np.float32(2)
    return torch.from_numpy(((grouped - zeros[..., None]) * scales[..., None]).reshape(codes.shape))


def _scaled(codes: Any, scale: Any) -> Tensor:
    """Rows of codes (..., columns) with scales (..., groups)."""
    grouped = codes.astype(np.float32).reshape(*scale.shape, -1)
    return torch.from_numpy((grouped * scale[..., None]).reshape(codes.shape))


# Each is given its output as it was, which it does not read.
_KERNELS: dict[str, Callable[..., Any]] = {
    "aten::sym_size.int": lambda x, dim: x.shape[dim],
    "executorch_prim::add.Scalar": lambda x, other: x + other,
    "executorch_prim::ge.Scalar": lambda x, other: x >= other,
    "aten::slice_copy.Tensor_out": lambda x, dim, start, end, step, _: x[:, start:end:step],
    "aten::add.Scalar_out": lambda x, other, alpha, _: x + alpha * other,
    "aten::embedding.out": lambda table, ids, *_: torch.from_numpy(table[ids.numpy()]),
    "aten::_to_copy.out": lambda x, *_: x.float(),
    "quantized_decomposed::embedding_byte.out": _bytes,
    "quantized_decomposed::embedding_4bit.out": _nibbles,
    "quantized_decomposed::embedding_2bit.out": _pairs_of_bits,
}


def _logits(file: str, folder: str, windows: list[list[int]], out: str, threads: int) -> None:
    model = Model(Path(file), threads)

    def opened() -> Model:
        model.reset()
        return model

    write_logits(opened, windows, out)


def _generate(
    file: str, folder: str, prompts: list[list[int]], max_tokens: int, threads: int
) -> list[tuple[list[int], bool]]:
    return greedy(Model(Path(file), threads), folder, prompts, max_tokens)


def _vocabulary(file: str, folder: str) -> dict[str, Any]:
    return vocabulary_of(Model(Path(file), 1))


def _memory(file: str, folder: str) -> dict[str, Any]:
    return executorch_vulkan_memory.memory(Path(file)).to_json()


JOBS: dict[str, Any] = {
    "logits": _logits,
    "generate": _generate,
    "vocabulary": _vocabulary,
    "memory": _memory,
}

if __name__ == "__main__":
    worker.serve(JOBS)
