"""Text from outside the stories' distribution: a harbor master's log book and kitchen notes."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import random

VESSELS = "Aurora Kestrel Perseverance Halcyon Marguerite Trident Zephyr Constance".split()
GOODS = (
    "copper wire,printed cotton,machine oil,winter barley,window glass,cork,lamp kerosene,"
    "salted herring,bicycle parts,quarried slate,tobacco,typewriters"
).split(",")
WINDS = "northerly southwesterly easterly variable gusting veering backing slackening".split()
HANDS = "Mr. Ashdown,Captain Villiers,the pilot,our new clerk,Mrs. Okafor,the quarantine officer"
WORKS = (
    "the crane's gearbox was greased",
    "two fenders were replaced at berth four",
    "soundings were taken along the western mole",
    "the tide gauge was recalibrated",
    "a diver inspected the lock's hinges",
    "we repainted the numerals on the customs shed",
)
VERBS = "simmer blanch fold whisk reduce sieve knead marinate".split()
INGREDIENTS = (
    "saffron,buttermilk,smoked paprika,lentils,fennel,anchovies,quinces,rye flour,"
    "mustard seed,leeks,almonds,vinegar"
).split(",")
REMARKS = (
    "Otherwise the texture suffers.",
    "This cannot be hurried.",
    "My predecessor swore by an iron pan; I disagree.",
    "Taste before you correct the seasoning.",
    "Leftovers keep until Thursday.",
)


def log_entry(rng: random.Random) -> str:
    """One day in the harbor."""
    vessel, other = rng.sample(VESSELS, 2)
    month = rng.choice("January March April June August October November".split())
    return (
        f"{rng.randint(1, 28)} {month}, {rng.randint(4, 11)}:{rng.randint(10, 59)}. Barometer "
        f"{rng.randint(968, 1041)} hectopascals, wind {rng.choice(WINDS)}, force "
        f"{rng.randint(1, 9)}. The {vessel} berthed with {rng.randint(12, 480)} tons of "
        f"{rng.choice(GOODS)}; the {other} still awaits clearance for her {rng.choice(GOODS)}. "
        f"During slack water {rng.choice(WORKS)}, and {rng.choice(HANDS.split(','))} signed for "
        f"the invoice ({rng.randint(3, 99)} pounds {rng.randint(1, 19)} shillings)."
    )


def kitchen_note(rng: random.Random) -> str:
    """One entry of a cook's notebook."""
    first, second, third = rng.sample(INGREDIENTS, 3)
    verbs = rng.sample(VERBS, 2)
    return (
        f"No. {rng.randint(1, 400)}: for {rng.randint(2, 24)} persons take "
        f"{rng.randint(2, 9) * 50} grams of {first}, half as much {second} and a suspicion of "
        f"{third}. {verbs[0].capitalize()} for {rng.randint(4, 55)} minutes, then "
        f"{verbs[1]} at {rng.randint(60, 98)} degrees. {rng.choice(REMARKS)}"
    )


def paragraph(rng: random.Random) -> str:
    """One entry of either kind."""
    return rng.choice((log_entry, kitchen_note))(rng)
