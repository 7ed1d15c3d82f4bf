"""Batches of a training text."""

from __future__ import annotations

import numpy as np
import pytest

from slimport.errors import BadInput
from slimport.quantize.qat.text import split

IDS = np.arange(1000, dtype=np.int32)


def test_an_epoch_reads_every_window_once_and_nothing_that_is_held_out() -> None:
    stream, held_out = split(IDS, [7], 11, 4, seed=3)
    whole = stream.ids.size // 10 - 1
    epoch = np.concatenate([stream.batch(step, 8) for step in range(whole // 8)])
    assert (epoch[:, 0] == 7).all() and (np.diff(epoch[:, 1:], axis=1) == 1).all()
    assert len({tuple(row) for row in epoch}) == len(epoch)
    assert held_out.ids.shape == (4, 11)
    assert epoch[:, 1:].max() < held_out.ids[:, 1:].min()


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    stream, _ = split(IDS, [], 10, 4, seed=3)
    batches = [stream.batch(step, 8) for step in range(40)]  # several epochs
    for step in (39, 0, 17):
        assert (split(IDS, [], 10, 4, seed=3)[0].batch(step, 8) == batches[step]).all()
    assert (split(IDS, [], 10, 4, seed=4)[0].batch(0, 8) != batches[0]).any()


def test_a_text_that_is_too_short_is_refused() -> None:
    split(IDS[:30], [], 10, 4, seed=0)
    with pytest.raises(BadInput, match="29 tokens"):
        split(IDS[:29], [], 10, 4, seed=0)
