"""Training text as batches: which windows a step reads depends on the seed and the step alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...errors import BadInput
from ..windows import Int32, Windows, cut, windows_of

_HELD_OUT = 10  # a tenth of the text, at its end

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Stream:
    """A text to train on.

    Attributes:
        ids: int32 (tokens,).
        start: ids that every window begins with.
        length: tokens in a window.
        seed: of the order.
        digest: `sha256:...` over ids, start and length.
    """

    ids: Int32
    start: tuple[int, ...]
    length: int
    seed: int
    digest: str

    def batch(self, step: int, count: int) -> Int64:
        """The windows of a step, int64 (count, length).

        An epoch reads the whole text once, in windows that are in another order, and cut at other
        places, in each.
        """
        body = self.length - len(self.start)
        whole = self.ids.size // body - 1  # whatever the first cut is
        found = np.empty((count, self.length), np.int64)
        found[:, : len(self.start)] = self.start
        epochs: dict[int, tuple[int, Int64]] = {}
        for row, index in enumerate(range(step * count, (step + 1) * count)):
            epoch, place = divmod(index, whole)
            if epoch not in epochs:
                epochs[epoch] = self._epoch(epoch, body, whole)
            first, order = epochs[epoch]
            begin = first + body * int(order[place])
            found[row, len(self.start) :] = self.ids[begin : begin + body]
        return found

    def _epoch(self, epoch: int, body: int, whole: int) -> tuple[int, Int64]:
        generator = np.random.default_rng([self.seed, epoch])
        return int(generator.integers(body)), generator.permutation(whole)


def split(
    ids: Int32, start: Sequence[int], length: int, held_out: int, seed: int
) -> tuple[Stream, Windows]:
    """A text as what is trained on and, from its end, at most `held_out` windows that are not.

    Args:
        ids: int32 (tokens,).
        start: ids that every window begins with.
        length: tokens in a window.

    Raises:
        BadInput: the text is too short.
    """
    body = length - len(start)
    kept = max(body, ids.size // _HELD_OUT)
    trained = ids[: ids.size - kept] if ids.size > kept else ids[:0]
    if trained.size < 2 * body:
        raise BadInput(
            f"the training text has {ids.size} tokens",
            f"windows of {length} need {3 * body}: two to train on, and one that is held out",
            "give a longer text with --train FILE, or shorter windows: train_length under [qat]",
        )
    whole = windows_of(np.concatenate((np.array([length, *start], np.int32), trained))[None])
    stream = Stream(trained, tuple(start), length, seed, whole.digest)
    return stream, cut(ids[-kept:], list(start), length, held_out)
