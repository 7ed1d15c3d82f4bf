"""One process, or several that torchrun started: what each computes, and what they tell each other.

Processes and their devices are accelerate's affair. Each takes its share of a batch; the student
is whole in every process (DDP), or sharded over them as its moments are (torch's `fully_shard`).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import UsageError
from .model import Decoder
from .text import Int64


@dataclass(frozen=True, slots=True)
class Workers:
    """This process among others.

    Attributes:
        rank, size: number of this process, and how many there are.
        sharded: whether parameters lie in parts, one in each process.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    sharded: bool = False
    accelerator: Any = None

    @property
    def first(self) -> bool:
        """Whether this process reads, writes and speaks for all."""
        return self.rank == 0

    def share(self, batch: Int64) -> Tensor:
        """The rows of a batch (windows, length) that this process computes."""
        rows = np.ascontiguousarray(batch[self.rank :: self.size])
        return torch.from_numpy(rows).to(self.device)

    def spread(self, decoder: Decoder, trains: bool) -> Decoder:
        """A decoder on this process's device, joined with those of the others."""
        decoder = decoder.to(self.device)
        if self.size == 1:
            return decoder
        if self.sharded:
            from torch.distributed.fsdp import fully_shard

            for layer in decoder.layers:
                fully_shard(layer)
            fully_shard(decoder)
            return decoder
        return cast(Decoder, self.accelerator.prepare_model(decoder)) if trains else decoder

    def mean(self, value: float) -> float:
        """Of every process's value."""
        if self.size == 1:
            return value
        whole = self.accelerator.reduce(torch.tensor(value, device=self.device), "mean")
        return float(whole.item())

    def wait(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            self.accelerator.wait_for_everyone()


def start_workers(device: str, shard: bool, batch: int) -> Workers:
    """Find out how many processes there are and what they compute on.

    Args:
        device: "cpu", "cuda", or "auto": a GPU if there is one.
        batch: windows in a step, which the processes share.

    Raises:
        UsageError: no such device, a batch that they cannot share, or nothing to shard over.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "there is no GPU to train on",
            "torch finds no CUDA device, or it is torch's CPU build",
            'take device = "cpu" under [qat], or install torch for CUDA',
        )
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if on_gpu:
        _same_sums()
    if size == 1:
        if shard:
            raise UsageError(
                "there is one process, and shard = true",
                "parameters are sharded over several processes",
                "start them: torchrun --nproc-per-node 2 -m slimport qat ...",
            )
        return Workers(torch.device("cuda" if on_gpu else "cpu"))
    if batch % size:
        raise UsageError(
            f"a batch of {batch} windows is not shared by {size} processes",
            "each computes as many windows of a step",
            f"give --batch {-(-batch // size) * size}",
        )
    from accelerate import Accelerator, InitProcessGroupKwargs

    # The first process makes the start, which may take long, and the others wait.
    patience = InitProcessGroupKwargs(timeout=timedelta(days=1))
    accelerator = Accelerator(cpu=not on_gpu, kwargs_handlers=[patience])
    found = accelerator.process_index, accelerator.num_processes
    return Workers(accelerator.device, *found, shard, accelerator)


def _same_sums() -> None:
    """Let the GPU add in one order, and in float32 as the CPU does."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cuda.matmul.allow_tf32 = False


def whole(tensor: Tensor) -> Tensor:
    """A parameter or a moment of all processes on the CPU; each of them must call this."""
    full = getattr(tensor, "full_tensor", None)
    return (tensor if full is None else full()).detach().cpu()


def put(tensor: Tensor, values: Tensor) -> None:
    """Write values of all processes into a parameter, or the part that lies here."""
    with torch.no_grad():
        tensor.copy_(like(tensor, values))


def like(tensor: Tensor, values: Tensor) -> Tensor:
    """Values of all processes on the device of `tensor`, and sharded as it is."""
    values = values.to(tensor.device)
    mesh = getattr(tensor, "device_mesh", None)
    if mesh is None:
        return values
    from torch.distributed.tensor import DTensor, distribute_tensor

    return distribute_tensor(values, mesh, cast(DTensor, tensor).placements)


def plain(module: nn.Module) -> Decoder:
    """A decoder without the wrapper of DDP."""
    return cast(Decoder, getattr(module, "module", module))
