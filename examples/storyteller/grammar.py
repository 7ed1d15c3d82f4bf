"""A generative grammar of short animal stories whose entropy is known exactly, story by story.

The grammar is a program, `tell`, that makes choices through a `Teller`. `Sampler` draws the choices
at random, `Reader` recovers them from a finished text. Both add up the same log-probability. Every
choice shows at once in the text and its options are prefix-free, so a text has one derivation at
most, and the mean of `-log p` over samples estimates the entropy of the texts themselves.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

import words as w


Shape = Callable[[str], str]


class AmbiguousError(ValueError):
    """A choice whose options do not show which of them was taken, or a text outside the grammar."""


@lru_cache(maxsize=4096)
def require_prefix_free(options: tuple[str, ...]) -> None:
    """Raise AmbiguousError if one option is a prefix of another (sorted neighbours tell)."""
    ordered = sorted(options)
    for shorter, longer in zip(ordered, ordered[1:], strict=False):
        if longer.startswith(shorter):
            raise AmbiguousError(f"option {shorter!r} is a prefix of option {longer!r}")


class Teller(Protocol):
    """What `tell` needs: fixed text, visible choices and branches."""

    gap: str

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
    the probability is conditional on it. `gap` stands between the sections of a story.
    """

    fixed: Mapping[str, str | int] = field(default_factory=dict)
    gap: str = " "
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
    """Draws a story; `text` is the story so far."""

    rng: random.Random = field(default_factory=random.Random)
    text: str = ""
    _due: tuple[str, ...] = ()

    def say(self, text: str) -> None:
        """Emit text, which must keep the promise of the last fork."""
        if self._due and not any(text.startswith(opener) for opener in self._due):
            raise AmbiguousError(f"{text!r} follows a fork that promised one of {self._due}")
        self._due = ()
        self.text += text

    def pick(self, options: Sequence[str], slot: str = "", shape: Shape = str) -> str:
        """Draw one option."""
        require_prefix_free(tuple(options))
        option = self.rng.choice(self.allowed(options, slot))
        self.say(shape(option))
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


@dataclass(frozen=True)
class Character:
    """Somebody in a story."""

    name: str
    trait: str
    animal: str

    @property
    def he(self) -> str:
        """The pronoun."""
        return "he" if self.name in w.HE_NAMES else "she"

    @property
    def his(self) -> str:
        """The possessive."""
        return "his" if self.name in w.HE_NAMES else "her"


@dataclass(frozen=True)
class Scene:
    """What a plot may refer back to."""

    hero: Character
    place: str


HAPPY, SAD = 0, 1


def capital(text: str) -> str:
    """The text with its first letter in upper case."""
    return text[0].upper() + text[1:]


def without(options: Sequence[str], *used: str) -> tuple[str, ...]:
    """The options that have not been used."""
    return tuple(option for option in options if option not in used)


def introduce(t: Teller) -> Scene:
    """Name the hero, the trait, the animal and the place, in one of four orders."""
    names = t.allowed(w.NAMES, "name")
    places = [capital(place) for place in t.allowed(w.PLACES, "place")]
    form = t.fork([3, 2, 3, 2], [("Once",), ("Long ago",), names, places], "form")
    if form == 0:
        t.say("Once upon a time, a ")
        trait, animal = _kind(t)
        t.say(" named ")
        name = t.pick(w.NAMES, "name")
        t.say(" lived ")
        place = t.pick(w.PLACES, "place")
    elif form == 1:
        t.say("Long ago, ")
        place = t.pick(w.PLACES, "place")
        t.say(", there was a ")
        trait, animal = _kind(t)
        t.say(" called ")
        name = t.pick(w.NAMES, "name")
    elif form == 2:
        name = t.pick(w.NAMES, "name")
        t.say(" was a ")
        trait, animal = _kind(t)
        t.say(" who lived ")
        place = t.pick(w.PLACES, "place")
    else:
        place = t.pick(w.PLACES, "place", capital)
        t.say(" lived a ")
        trait, animal = _kind(t)
        t.say(" named ")
        name = t.pick(w.NAMES, "name")
    t.say(".")
    return Scene(Character(name, trait, animal), place)


def _kind(t: Teller) -> tuple[str, str]:
    trait = t.pick(w.TRAITS, "trait")
    t.say(" ")
    return trait, t.pick(w.ANIMALS, "animal")


def habit(t: Teller, hero: Character) -> None:
    """What the hero likes to do; one story in five leaves it out."""
    loved = f" {capital(hero.he)} loved to "
    form = t.fork([2, 2, 1], [(loved,), (" Every ",), (f"{t.gap}One ",)], "habit")
    if form == 2:
        return
    if form == 0:
        t.say(loved)
    else:
        t.say(" Every ")
        t.pick(w.TIMES)
        t.say(f" {hero.he} liked to ")
    t.pick(w.HOBBIES)
    if t.fork([1, 1], [(".",), (" with ",)], "company") == 1:
        t.say(f" with {hero.his} ")
        t.pick(w.RELATIVES)
    t.say(".")


def meet(t: Teller, hero: Character, complaint: str) -> Character:
    """A helper of another kind comes along, perhaps with a digression, and offers help."""
    t.say(t.gap)
    t.pick(w.WHENS)
    t.say(", a ")
    trait = t.pick(without(w.TRAITS, hero.trait))
    t.say(" ")
    animal = t.pick(without(w.ANIMALS, hero.animal))
    t.say(" named ")
    helper = Character(t.pick(without(w.NAMES, hero.name)), trait, animal)
    t.say(" ")
    t.pick(w.MEETINGS)
    t.say(".")
    digress(t, helper)
    t.say(' "')
    t.pick(w.QUESTIONS)
    t.say('" ')
    t.pick(w.ASKED)
    t.say(f' {helper.name}. "{complaint}" ')
    t.pick(w.SAID)
    t.say(f' {hero.name}. "')
    t.pick(w.OFFERS)
    t.say(f'," said the {helper.animal}.')
    return helper


def digress(t: Teller, helper: Character) -> None:
    """In two stories of five the teller rambles about the helper."""
    ramble = f" By the way, {helper.name} "
    if t.fork([3, 2], [(' "',), (ramble,)], "digression") == 0:
        return
    t.say(ramble)
    t.pick(w.DIGRESSIONS)
    t.say(" a ")
    t.pick(w.ADJECTIVES)
    t.say(" ")
    t.pick(w.OBJECTS)
    t.say(" ")
    t.pick(w.PLACES)
    t.say(".")


def turn(t: Teller) -> int:
    """The turn of the story, happy or sad, which shows in its first words."""
    t.say(t.gap)
    mood = t.fork([3, 2], [w.HAPPY_TURNS, w.SAD_TURNS], "mood")
    t.pick((w.HAPPY_TURNS, w.SAD_TURNS)[mood])
    t.say(", ")
    return mood


def close(t: Teller, hero: Character, helper: Character, mood: int) -> None:
    """How the hero felt and whether the two became friends."""
    feelings, actions = ((w.HAPPY_FEELINGS, w.HAPPY_ACTIONS), (w.SAD_FEELINGS, w.SAD_ACTIONS))[mood]
    by_name, by_kind = f" {hero.name} was so ", f" The {hero.trait} {hero.animal} "
    if t.fork([1, 1], [(by_name,), (by_kind,)], "reaction") == 0:
        t.say(by_name)
        t.pick(feelings)
        t.say(f" that {hero.he} ")
    else:
        t.say(by_kind)
    t.pick(actions)
    t.say(".")
    friends = f" From that day on, {hero.name} and {helper.name} "
    if t.fork([1, 1], [(friends,), (" So ", " That ")], "friends") == 0:
        t.say(friends)
        t.pick(("were best friends", "met every ", "shared ", "never quarreled")[mood * 2 :][:2])
