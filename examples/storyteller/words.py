"""The vocabulary of the stories. Every tuple is prefix-free: no entry begins with another entry."""

# SPDX-License-Identifier: Apache-2.0

HE_NAMES = tuple(
    "Pip Tom Ben Max Leo Sam Finn Otto Hugo Jack Theo Gus Milo Oscar Ned Ralph".split()
)
SHE_NAMES = tuple(
    "Mia Lily Rosa Ella Nina Zoe Ruby Ivy Daisy Clara Hazel Wendy Tilly Olive Fern Bella".split()
)
NAMES = HE_NAMES + SHE_NAMES
LISTENERS = tuple("Emma Noah Lucas Sofia Peter Alice Henry Grace".split())

ANIMALS = tuple(
    "rabbit fox bear mouse hedgehog owl frog duck cat dog pig goat sheep horse badger squirrel "
    "beaver otter turtle crow sparrow wolf lion hen".split()
)
TRAITS = tuple(
    "brave shy clever lazy curious gentle proud humble greedy patient cheerful grumpy clumsy kind "
    "quiet bold silly wise tiny young careful stubborn busy dreamy".split()
)
PLACES = (
    "in the old mill",
    "in the dark forest",
    "in the green valley",
    "in the little village",
    "in a wooden hut",
    "in a stone tower",
    "by the blue lake",
    "by the wide river",
    "by the sandy beach",
    "by the busy market",
    "under the tall oak",
    "under the stone bridge",
    "on the windy hill",
    "on the small island",
    "on a sunny farm",
    "on a steep cliff",
    "near the quiet pond",
    "near the red barn",
    "near the city wall",
    "near the apple orchard",
    "behind the white church",
    "behind the rose garden",
    "at the edge of the meadow",
    "at the foot of the mountain",
)
SPOTS = (
    "under the bed",
    "behind the door",
    "inside the oven",
    "on the top shelf",
    "in the well",
    "in the hay",
    "under a mossy log",
    "behind the fence",
    "beside the stove",
    "in the tall grass",
    "below the stairs",
    "on the roof",
    "among the roses",
    "between two rocks",
    "in the cellar",
    "under the wagon",
)
HOBBIES = (
    "paint pictures",
    "sing old songs",
    "count the stars",
    "bake plum cakes",
    "climb tall trees",
    "read thick books",
    "collect smooth stones",
    "dance in the rain",
    "plant seeds",
    "tell jokes",
    "swim in cold water",
    "draw maps",
    "play the drum",
    "watch the clouds",
    "knit warm socks",
    "write long letters",
)
ADJECTIVES = tuple(
    "red blue golden silver wooden striped shiny tattered heavy pretty favorite new".split()
)
OBJECTS = tuple(
    "kite lantern hat scarf bell drum book clock basket teapot umbrella boat key violin map "
    "blanket mirror coat spoon puppet necklace whistle cup box".split()
)
RELATIVES = tuple("grandmother uncle cousin sister father aunt brother teacher".split())
FOODS = (
    "plum cake",
    "honey bread",
    "apple pie",
    "pea soup",
    "roasted nuts",
    "warm milk",
    "berry jam",
    "cheese rolls",
    "sweet corn",
    "ginger cookies",
    "carrot stew",
    "pancakes",
)
WEATHERS = tuple("sunny rainy windy foggy snowy warm cold stormy misty cloudy hot bright".split())
TIMES = tuple("morning afternoon evening night".split())
ACCIDENTS = ("dropped", "stepped on", "sat on", "tripped over", "rolled over", "bumped into")
TOOLS = (
    "a pot of glue",
    "a needle and thread",
    "a small hammer",
    "a ball of string",
    "a roll of tape",
    "a can of paint",
    "a box of nails",
    "a jar of wax",
)
TRAPS = (
    "in a muddy ditch",
    "in a hollow log",
    "on a high branch",
    "in a thorny bush",
    "on a slippery rock",
    "in a deep hole",
    "in a rusty gate",
    "in a fishing net",
)
RESCUES = (
    "a long rope",
    "a tall ladder",
    "a strong branch",
    "a sharp saw",
    "a wooden plank",
    "a hot pan of butter",
    "a rusty hook",
    "a bucket of soap",
)
OBSTACLES = (
    "a flooded stream",
    "a fallen tree",
    "a locked gate",
    "a wall of snow",
    "a sleeping bull",
    "a swarm of bees",
    "a herd of cows",
    "a broken bridge",
)
DETOURS = (
    "a secret path",
    "a narrow tunnel",
    "a raft of logs",
    "a row of stepping stones",
    "a swing of vines",
    "a cart with big wheels",
)
NOISES = tuple("strange loud scratching hollow creaking howling ticking rustling".split())
MONSTERS = tuple("ghost dragon giant witch troll monster".split())
CULPRITS = (
    "a loose shutter",
    "a lost kitten",
    "an old gramophone",
    "a hungry mole",
    "a family of mice",
    "a dripping pipe",
    "a snoring toad",
    "a branch in the wind",
)
CONTESTS = (
    "the singing contest",
    "the great race",
    "the baking fair",
    "the chess match",
    "the swimming cup",
    "the dancing show",
    "the jumping game",
    "the poetry evening",
)
PRACTICES = (
    "before breakfast",
    "until midnight",
    "in the attic",
    "in front of a mirror",
    "for nine days",
    "without a break",
)
OCCASIONS = ("birthday", "wedding", "first day of school", "farewell party")
HAPPY_FEELINGS = tuple("happy glad thankful joyful excited delighted relieved hopeful".split())
SAD_FEELINGS = tuple("sad lonely upset ashamed tired sorry gloomy miserable".split())
HAPPY_ACTIONS = (
    "danced on the table",
    "laughed out loud",
    "sang all the way home",
    "hugged everyone",
    "jumped up and down",
    "threw a big party",
    "forgot to eat supper",
    "turned three cartwheels",
)
SAD_ACTIONS = (
    "cried all night",
    "went to bed without supper",
    "did not speak for a week",
    "walked home alone",
    "hid in the closet",
    "stared at the floor",
    "sighed at the moon",
    "packed a bag and left",
)
HAPPY_TURNS = ("At last", "In the end", "Luckily", "To their joy", "Thankfully")
SAD_TURNS = ("Sadly", "Alas", "To their sorrow", "Unhappily")
MEETINGS = ("came along", "walked by", "stopped to look", "heard everything", "looked up")
QUESTIONS = ("What is wrong?", "Can I help?", "Why the long face?", "What happened here?")
ASKED = ("asked", "called", "whispered", "wondered")
SAID = ("said", "cried", "answered", "sobbed")
OFFERS = ("Do not worry", "Leave it to me", "I have an idea", "Follow me", "We can do it together")
WHENS = ("Just then", "After a while", "Before long", "That very moment")
CHASES = tuple("butterfly ball beetle feather snowflake dragonfly".split())
MENDED = ("was as good as new", "looked better than before", "held together", "was whole again")
RUINED = ("fell apart again", "could not be saved", "only got worse", "had to be thrown away")
GONE = (
    "was never seen again",
    "had been stolen",
    "was burned in the fire",
    "had sunk in the river",
)
FREED = ("came out with a loud pop", "was free again", "stood on firm ground", "could move again")
FAILED = ("was too short", "broke in two", "slipped away", "fell into the mud")
CLOSED = ("led nowhere", "ended in a swamp", "was too dangerous", "had been washed away")
LIGHTS = tuple("candle torch lamp match".split())
SHOPS = ("the shop was closed", "it cost too much", "somebody had bought it", "it was far too big")
HAPPY_BONDS = (
    "were best friends",
    "met every morning",
    "shared every meal",
    "kept no secrets",
)
SAD_BONDS = (
    "hardly spoke",
    "told nobody about it",
    "were a little wiser",
    "stayed at home",
)
SHONE = tuple("brightly softly warmly coldly".split())
DIGRESSIONS = ("once found", "used to own", "always wanted", "never liked", "had just sold")

# arc -> (morals of happy stories, morals of sad stories)
MORALS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "lost": (
        ("four eyes see more than two", "a good friend never stops looking"),
        ("some things are gone forever", "one should take care of small treasures"),
    ),
    "broken": (
        ("most things can be mended", "a crack is not the end"),
        ("haste makes waste", "glue cannot fix everything"),
    ),
    "stuck": (
        ("it is fine to call for help", "even the strong need a hand"),
        ("one should look before leaping", "nobody should wander off alone"),
    ),
    "visit": (
        ("there is always another way", "the longest road is worth it"),
        ("not every door opens", "one should leave home early"),
    ),
    "noise": (
        ("fear makes small things big", "one should look twice before running"),
        ("running away solves nothing", "a secret grows in the dark"),
    ),
    "contest": (
        ("practice makes perfect", "two heads are better than one"),
        ("nobody wins every time", "pride comes before a fall"),
    ),
    "gift": (
        ("the best gifts come from the heart", "kindness costs nothing"),
        ("one should not wait too long", "empty pockets make heavy hearts"),
    ),
}
