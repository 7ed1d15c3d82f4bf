"""Grammars as programs, with the exact log-probability of every text.

A grammar is a program that makes choices through a `Teller`. `Sampler` draws the choices
at random, `Reader` recovers them from a finished text. Both add up the same log-probability. Every
choice shows at once in the text and its options are prefix-free, so a text has one derivation at
most, and the mean of `-log p` over samples estimates the entropy of the texts themselves.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

Shape = Callable[[str], str]


class AmbiguousError(ValueError):
    """A choice whose options do not show which of them was taken, or a text outside the grammar."""


@lru_cache(maxsize=4096)
def require_prefix_free(options: tuple[str, ...]) -> None:
    """Raise AmbiguousError if one option is a prefix of another (sorted neighbours tell)."""
    ordered = sorted(options)
    for shorter, longer in itertools.pairwise(ordered):
        if longer.startswith(shorter):
            raise AmbiguousError(f"option {shorter!r} is a prefix of option {longer!r}")


class Teller(Protocol):
    """What `tell` needs: fixed text, visible choices and branches."""

    def say(self, text: str) -> None:
        """Emit text that carries no choice."""

    def allowed(self, options: Sequence[str], slot: str) -> tuple[str, ...]:
        """The options, or the one that is fixed for this slot."""

    def pick(self, options: Sequence[str], slot: str = "", shape: Shape = str) -> str:
        """Choose one option with equal probability and emit `shape(option)`; return the option.

        `slot` names the choice, so that it can be fixed.
        """

    def fork(self, weights: Sequence[float], openers: Sequence[Sequence[str]], slot: str) -> int:
        """Choose a branch; branch i must go on by emitting one of openers[i]."""


@dataclass
class _Choices:
    """Log-probability in nats of the choices made so far, and the choices fixed in advance.

    `fixed` maps a slot to the option (or branch index) it must take. A fixed choice costs nothing:
    the probability is conditional on it.
    """

    fixed: Mapping[str, str | int] = field(default_factory=dict)
    log_probability: float = 0.0
    taken: dict[str, str | int] = field(default_factory=dict)

    def _record(self, slot: str, value: str | int, probability: float) -> None:
        if slot:
            self.taken[slot] = value
        if slot not in self.fixed:
            self.log_probability += math.log(probability)

    def allowed(self, options: Sequence[str], slot: str) -> tuple[str, ...]:
        """The options, or the one that is fixed for this slot."""
        if slot and slot in self.fixed:
            return (str(self.fixed[slot]),)
        return tuple(options)


@dataclass
class Sampler(_Choices):
    """Draws a story; `text` is the story so far, `chosen` where in it a choice shows."""

    rng: random.Random = field(default_factory=random.Random)
    text: str = ""
    chosen: list[tuple[int, int]] = field(default_factory=list)
    _due: tuple[str, ...] = ()

    def say(self, text: str) -> None:
        """Emit text, which must keep the promise of the last fork."""
        if self._due:
            if not any(text.startswith(due) or due.startswith(text) for due in self._due):
                raise AmbiguousError(f"{text!r} follows a fork that promised one of {self._due}")
            longer = [due for due in self._due if due.startswith(text)]
            self._due = tuple(due[len(text) :] for due in longer if due != text)
        self.text += text

    def pick(self, options: Sequence[str], slot: str = "", shape: Shape = str) -> str:
        """Draw one option."""
        require_prefix_free(tuple(options))
        allowed = self.allowed(options, slot)
        option = allowed[0] if slot in self.fixed else self.rng.choice(allowed)
        start = len(self.text)
        self.say(shape(option))
        if slot not in self.fixed:
            self.chosen.append((start, len(self.text)))
        self._record(slot, option, 1 / len(options))
        return option

    def fork(self, weights: Sequence[float], openers: Sequence[Sequence[str]], slot: str) -> int:
        """Draw one branch."""
        require_prefix_free(tuple(text for branch in openers for text in branch))
        if slot in self.fixed:
            branch = int(self.fixed[slot])
        else:
            branch = self.rng.choices(range(len(weights)), weights)[0]
        self._due = tuple(openers[branch])
        if slot not in self.fixed:
            self.chosen.append((len(self.text), len(self.text) + 2))  # a blank and a letter show it
        self._record(slot, branch, weights[branch] / sum(weights))
        return branch


@dataclass
class Reader(_Choices):
    """Recovers the choices from `text`; `position` is the end of what has been read."""

    text: str = ""
    position: int = 0

    def say(self, text: str) -> None:
        """Require the given text here."""
        if not self.text.startswith(text, self.position):
            found = self.text[self.position : self.position + 40]
            raise AmbiguousError(f"expected {text!r} at {self.position}, found {found!r}")
        self.position += len(text)

    def pick(self, options: Sequence[str], slot: str = "", shape: Shape = str) -> str:
        """Find the one option that the text goes on with."""
        here = self.position
        found = [o for o in self.allowed(options, slot) if self.text.startswith(shape(o), here)]
        if len(found) != 1:
            raise AmbiguousError(f"{len(found)} options fit at {here} of {self.text!r}")
        self.position += len(found[0])
        self._record(slot, found[0], 1 / len(options))
        return found[0]

    def fork(self, weights: Sequence[float], openers: Sequence[Sequence[str]], slot: str) -> int:
        """Find the one branch that the text goes on with."""
        here = self.position
        fits = [any(self.text.startswith(text, here) for text in branch) for branch in openers]
        if sum(fits) != 1:
            raise AmbiguousError(f"{sum(fits)} branches fit at {here} of {self.text!r}")
        branch = fits.index(True)
        if slot in self.fixed and branch != self.fixed[slot]:
            raise AmbiguousError(f"{slot} must take branch {self.fixed[slot]}, found {branch}")
        self._record(slot, branch, weights[branch] / sum(weights))
        return branch
