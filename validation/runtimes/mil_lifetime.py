"""What becomes of the values of an ML Program: how long each is read, by whom, where it lies."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from . import mil_shapes
from .mil_step import Step

READ, WRITE, UPDATE = "read_state", "write_state", "coreml_update_state"
# What softmax and exp make of very negative numbers, they make of -inf; others hand them through.
_SHARES = {("softmax", "x"), ("exp", "x"), ("scaled_dot_product_attention", "attn_mask")}
_PASS = {"add", "sub", "select", "cast", "maximum", "minimum"}


def mark_scores(steps: Sequence[Step], results: Collection[int]) -> None:
    """Tell which outputs are read by a softmax only; `results` are slots that a caller reads."""
    harmless = dict.fromkeys(results, False)
    for step in reversed(steps):  # what reads a value comes behind it
        step.outputs = [
            each._replace(scores=harmless.get(each.slot, False)) for each in step.outputs
        ]
        passes = step.kind in _PASS or (step.moves and step.state is None)
        handed = passes and all(each.scores for each in step.outputs)
        for name, slot in step.uses:
            reads = handed or (step.kind, name) in _SHARES
            harmless[slot] = harmless.get(slot, True) and reads


def mark_last_reads(steps: Sequence[Step], results: Collection[int]) -> None:
    """Tell each step which slots nothing reads behind it."""
    for slot, index in _last_reads(steps, results).items():
        if index < len(steps):
            steps[index].frees.append(slot)


def update_in_place(steps: Sequence[Step], results: Collection[int], memory: Sequence[str]) -> None:
    """Let a state be overwritten where it lies, where nobody can tell it from a copy.

    That is a slice_update of what was read from the state, which is written back next, and of
    which nothing else is read any more.

    Args:
        memory: of each slot, whose memory it may share: that of a state, or another's.
    """
    last = _last_reads(steps, results)
    made = {each.slot: index for index, step in enumerate(steps) for each in step.outputs}
    for index, step in enumerate(steps):
        slots = [slot for name, slot in step.uses if name == "x"]
        if step.kind != "slice_update" or not slots or slots[0] not in made:
            continue
        (x,), (output,) = slots, step.outputs
        read = made[x]
        state = steps[read].state
        if state is None or any(each.state == state for each in steps[read + 1 : index]):
            continue
        then = next((each for each in steps[index:] if each.state == state), None)
        written = then is not None and then.kind != READ and then.uses[0][1] == output.slot
        live = [
            slot
            for slot, where in enumerate(memory)
            if where == state and made.get(slot, 0) < index and last.get(slot, 0) > index
        ]
        if written and not live:
            step.function = mil_shapes.slice_update_in_place


def _last_reads(steps: Sequence[Step], results: Collection[int]) -> dict[int, int]:
    """{slot: the last step that makes or reads it}; the number of steps if a caller does."""
    last: dict[int, int] = {}
    for index, step in enumerate(steps):
        last |= {each.slot: index for each in step.outputs}
        last |= {slot: index for _, slot in step.uses}
    return last | dict.fromkeys(results, len(steps))
