"""A generative grammar of short animal stories whose entropy is known exactly, story by story.

`tell` is the grammar: introduction, habit, one of seven plots, a helper, a happy or a sad turn,
close. `sample` draws a story with its log-probability and `read` recovers both from a text.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import words as w
from telling import AmbiguousError, Reader, Sampler, Teller


@dataclass(frozen=True)
class Character:
    """Somebody in a story."""

    name: str
    trait: str
    animal: str

    @property
    def kind(self) -> str:
        """The name with the animal."""
        return f"{self.name} the {self.animal}"

    @property
    def he(self) -> str:
        """The pronoun."""
        return "he" if self.name in w.HE_NAMES else "she"

    @property
    def his(self) -> str:
        """The possessive."""
        return "his" if self.name in w.HE_NAMES else "her"


@dataclass
class Scene:
    """What later sentences refer back to; the helper joins in the middle."""

    hero: Character
    place: str
    helper: Character | None = None

    def meet(self, t: Teller, complaint: str) -> Character:
        """Bring in the helper, to whom the hero complains."""
        self.helper = meet(t, self.hero, complaint)
        return self.helper


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
    form = t.fork([2, 2, 1], [(loved,), (" Every ",), (" One ",)], "habit")
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
    t.say(" ")
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
    t.say('," said ')
    speakers = (helper.name, f"the {helper.animal}")
    t.say(speakers[t.fork([1, 1], [(speaker,) for speaker in speakers], "speaker")])
    t.say(".")
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
    t.say(" ")
    mood = t.fork([3, 2], [w.HAPPY_TURNS, w.SAD_TURNS], "mood")
    t.pick((w.HAPPY_TURNS, w.SAD_TURNS)[mood])
    t.say(", ")
    return mood


def close(t: Teller, scene: Scene, mood: int) -> None:
    """How the hero felt, and whether the two became friends."""
    hero, helper = scene.hero, scene.helper
    assert helper is not None, "every plot brings in a helper"
    feelings, actions = ((w.HAPPY_FEELINGS, w.HAPPY_ACTIONS), (w.SAD_FEELINGS, w.SAD_ACTIONS))[mood]
    subjects = (
        f" {hero.name} was so ",
        f" {capital(hero.he)} ",
        f" The {hero.trait} {hero.animal} ",
    )
    form = t.fork([2, 1, 2], [(subject,) for subject in subjects], "reaction")
    t.say(subjects[form])
    if form == 0:
        t.pick(feelings)
        t.say(f" that {hero.he} ")
    t.pick(actions)
    t.say(".")
    friends = f" From that day on, {hero.kind} and {helper.kind} "
    if t.fork([1, 1], [(friends,), (" So ", " That ")], "friends") == 0:
        t.say(friends)
        t.pick((w.HAPPY_BONDS, w.SAD_BONDS)[mood])
        t.say(".")


def lesson(t: Teller, scene: Scene, arc: str, mood: int) -> None:
    """The last sentence: a moral that fits plot and mood, or the stars over the first place."""
    moral = f" So {scene.hero.name} learned that "
    if t.fork([1, 1], [(" That night, ",), (moral,)], "moral") == 1:
        t.say(moral)
        t.pick(w.MORALS[arc][mood])
    else:
        t.say(" That night, the stars shone ")
        t.pick(w.SHONE)
        t.say(f" {scene.place}")
    t.say(".")


def lost(t: Teller, scene: Scene) -> int:
    """A thing cannot be found."""
    hero = scene.hero
    t.say(f" could not find {hero.his} ")
    t.pick(w.ADJECTIVES)
    t.say(" ")
    thing = t.pick(w.OBJECTS)
    t.say(f". {capital(hero.he)} looked ")
    first = t.pick(w.SPOTS)
    t.say(" and ")
    second = t.pick(without(w.SPOTS, first))
    t.say(", but it was not there.")
    scene.meet(t, f"My {thing} is gone!")
    t.say(" Together they searched ")
    third = t.pick(without(w.SPOTS, first, second))
    t.say(".")
    if (mood := turn(t)) == HAPPY:
        t.say(f"they found the {thing} ")
        t.pick(without(w.SPOTS, first, second, third))
    else:
        t.say(f"the {thing} ")
        t.pick(w.GONE)
    return mood


def broken(t: Teller, scene: Scene) -> int:
    """A thing breaks."""
    hero = scene.hero
    t.say(" ")
    t.pick(w.ACCIDENTS)
    t.say(f" {hero.his} ")
    t.pick(w.ADJECTIVES)
    t.say(" ")
    thing = t.pick(w.OBJECTS)
    t.say(", and it broke.")
    helper = scene.meet(t, f"My {thing} is broken!")
    t.say(f" {helper.name} brought ")
    t.pick(w.TOOLS)
    t.say(".")
    mood = turn(t)
    t.say(f"the {thing} ")
    t.pick((w.MENDED, w.RUINED)[mood])
    return mood


def stuck(t: Teller, scene: Scene) -> int:
    """The hero is trapped."""
    hero = scene.hero
    t.say(" chased a ")
    t.pick(w.CHASES)
    t.say(" and got stuck ")
    t.pick(w.TRAPS)
    t.say(".")
    helper = scene.meet(t, "I cannot get out!")
    t.say(f" {helper.name} fetched ")
    tool = t.pick(w.RESCUES)
    t.say(".")
    if (mood := turn(t)) == HAPPY:
        t.say(f"{hero.name} ")
        t.pick(w.FREED)
    else:
        t.say(f"the {tool.removeprefix('a ')} ")
        t.pick(w.FAILED)
    return mood


def visit(t: Teller, scene: Scene) -> int:
    """The road to a relative is blocked."""
    hero = scene.hero
    t.say(f" set out to visit {hero.his} ")
    relative = t.pick(w.RELATIVES)
    t.say(" ")
    t.pick(without(w.PLACES, scene.place))
    t.say(", but ")
    t.pick(w.OBSTACLES)
    t.say(" was in the way.")
    helper = scene.meet(t, f"I cannot reach my {relative}!")
    t.say(f" {helper.name} knew ")
    way = t.pick(w.DETOURS)
    t.say(".")
    if (mood := turn(t)) == HAPPY:
        t.say(f"they all sat down with the {relative} and ate ")
        t.pick(w.FOODS)
    else:
        t.say(f"the {way.removeprefix('a ')} ")
        t.pick(w.CLOSED)
    return mood


def noise(t: Teller, scene: Scene) -> int:
    """Something makes a noise."""
    hero = scene.hero
    t.say(" heard a ")
    t.pick(w.NOISES)
    t.say(" noise ")
    spot = t.pick(w.SPOTS)
    t.say(f". {capital(hero.he)} thought that it was a ")
    monster = t.pick(w.MONSTERS)
    t.say(".")
    helper = scene.meet(t, f"There is a {monster} {spot}!")
    t.say(f" {helper.name} lit a ")
    t.pick(w.LIGHTS)
    t.say(" and went to look.")
    if (mood := turn(t)) == HAPPY:
        t.say("it was only ")
        t.pick(w.CULPRITS)
    else:
        t.say(f"they saw a shadow and ran, and the {monster} kept {hero.his} ")
        t.pick(w.OBJECTS)
    return mood


def contest(t: Teller, scene: Scene) -> int:
    """The hero takes part in a contest."""
    hero = scene.hero
    t.say(" entered ")
    event = t.pick(w.CONTESTS)
    t.say(f". {capital(hero.he)} practiced ")
    first = t.pick(w.PRACTICES)
    t.say(" and ")
    t.pick(without(w.PRACTICES, first))
    t.say(".")
    helper = scene.meet(t, f"I will never win {event}!")
    t.say(f" {helper.name} shared some ")
    t.pick(w.FOODS)
    t.say(" and a good trick.")
    mood = turn(t)
    t.say(f"{hero.name} {('won', 'lost')[mood]} {event} and got {('a', 'only a')[mood]} ")
    t.pick(w.ADJECTIVES)
    t.say(" ")
    t.pick(w.OBJECTS)
    return mood


def gift(t: Teller, scene: Scene) -> int:
    """A present cannot be bought."""
    hero = scene.hero
    t.say(f" wanted to give {hero.his} ")
    relative = t.pick(w.RELATIVES)
    t.say(" a ")
    t.pick(w.ADJECTIVES)
    t.say(" ")
    thing = t.pick(w.OBJECTS)
    t.say(" for the ")
    t.pick(w.OCCASIONS)
    t.say(", but ")
    t.pick(w.SHOPS)
    t.say(".")
    helper = scene.meet(t, f"I have no {thing} for my {relative}!")
    t.say(f" {helper.name} and {hero.name} made ")
    food = t.pick(w.FOODS)
    t.say(" instead.")
    mood = turn(t)
    t.say(f"the {relative} ")
    t.say((f"loved the {food}", f"hated the {food}")[mood])
    return mood


# plot -> (what the sentence goes on with after the hero's name, the plot)
PLOTS: dict[str, tuple[tuple[str, ...], Callable[[Teller, Scene], int]]] = {
    "lost": ((" could not",), lost),
    "broken": (tuple(f" {accident}" for accident in w.ACCIDENTS), broken),
    "stuck": ((" chased",), stuck),
    "visit": ((" set out",), visit),
    "noise": ((" heard",), noise),
    "contest": ((" entered",), contest),
    "gift": ((" wanted",), gift),
}


def tell(t: Teller) -> None:
    """Tell one story: introduction, day and trouble, helper, outcome, close."""
    scene = introduce(t)
    habit(t, scene.hero)
    t.say(" One ")
    t.pick(w.WEATHERS)
    t.say(" ")
    t.pick(w.TIMES)
    t.say(f", {scene.hero.name}")
    branch = t.fork([1] * len(PLOTS), [opener for opener, _ in PLOTS.values()], "plot")
    arc, (_, plot) = list(PLOTS.items())[branch]
    mood = plot(t, scene)
    t.say(".")
    close(t, scene, mood)
    lesson(t, scene, arc, mood)


@dataclass(frozen=True)
class Story:
    """A story, its log-probability in nats given what was fixed, and the choices by slot.

    `chosen` are the places (start, end) where a choice shows; all other text follows from them. It
    is known of drawn stories only.
    """

    text: str
    log_probability: float
    taken: Mapping[str, str | int]
    chosen: Sequence[tuple[int, int]] = ()


def sample(rng: random.Random, **fixed: str | int) -> Story:
    """Draw a story; keywords fix slots: name, trait, animal, place, mood, moral, digression."""
    sampler = Sampler(rng=rng, fixed=fixed)
    tell(sampler)
    return Story(sampler.text, sampler.log_probability, sampler.taken, sampler.chosen)


def tells(text: str, **fixed: str | int) -> bool:
    """Whether the grammar tells this text: all it refers back to is right, to the last word."""
    try:
        read(text, **fixed)
    except AmbiguousError:
        return False
    return True


def read(text: str, **fixed: str | int) -> Story:
    """Recover the choices of a story.

    Raises:
        AmbiguousError: if the text is not a story of this grammar, to its last character.
    """
    reader = Reader(text=text, fixed=fixed)
    tell(reader)
    if reader.position != len(text):
        raise AmbiguousError(f"text goes on after the story: {text[reader.position :]!r}")
    return Story(text, reader.log_probability, reader.taken)
