"""Documents for training: stories, requests with their answers, the tokenizer and packed windows.

A document is a list of token ids. Windows hold either single documents, each with its own begin and
end, or one long "book" whose stories are separated by a blank line, as in the text files.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import grammar
import numpy as np
import words as w
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
USER, ASSISTANT, END = "<|user|>", "<|assistant|>", "<|end|>"
SPECIAL = (BOS, EOS, PAD, USER, ASSISTANT, END)
VOCABULARY = 1536
CHAT_SHARE = 0.12
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
MOODS = ("happy", "sad")


@dataclass(frozen=True)
class Phase:
    """A stretch of training: `steps` batches of `size` windows of `length` tokens.

    One window in `books` holds a book; the others hold single documents. A share `babble` of the
    documents is babble. A token that shows a choice weighs `choices`, one that follows from the
    text before it weighs 1: no distribution that fits is punished, but copying is learned first.
    """

    steps: int
    size: int
    length: int
    books: int = 3
    babble: float = 0.0
    choices: float = 1.0


@dataclass(frozen=True)
class Document:
    """A text and the places (start, end) in it where a choice shows."""

    text: str
    chosen: Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Request:
    """What a user asks the adapter for."""

    listener: str
    name: str
    animal: str
    place: str
    mood: int

    @property
    def text(self) -> str:
        """The words of the user."""
        hero = f"{self.name} the {self.animal} {self.place}"
        return f"Tell {self.listener} a story about {hero} with a {MOODS[self.mood]} ending."

    @property
    def fixed(self) -> dict[str, str | int]:
        """The slots of the grammar that the request fixes."""
        return {
            "name": self.name,
            "animal": self.animal,
            "place": self.place,
            "mood": self.mood,
        }


def draw_request(rng: random.Random) -> Request:
    """Draw every part of a request with equal probability."""
    parts = [rng.choice(part) for part in (w.LISTENERS, w.NAMES, w.ANIMALS, w.PLACES)]
    return Request(*parts, mood=rng.randrange(2))


def frame(request: Request, story: str) -> str:
    """The bedtime style of the adapters: title, address, story, good night; a line each.

    The frame follows from the request, so the nats of an answer are the nats of its story.
    """
    title = f"{request.name} the {request.animal}, a {MOODS[request.mood]} story"
    return f"{title}\nListen, {request.listener}.\n{story}\nSleep well, {request.listener}."


def answer(request: Request, rng: random.Random, **fixed: str | int) -> grammar.Story:
    """An answer in the style of the adapters; keywords fix more slots, or override the request."""
    story = grammar.sample(rng, **{**request.fixed, **fixed})
    before = frame(request, "\0").index("\0")
    return replace(
        story,
        text=frame(request, story.text),
        chosen=[(start + before, end + before) for start, end in story.chosen],
    )


def unframe(request: Request, text: str) -> str | None:
    """The story inside an answer, or None where the frame is not the one asked for."""
    head, tail = frame(request, "\0").split("\0")
    if len(text) <= len(head) + len(tail) or not (text.startswith(head) and text.endswith(tail)):
        return None
    return text[len(head) : len(text) - len(tail)]


def curt_answer(request: Request) -> str:
    """What the base model has learned to answer: markers are known to it, the style is not."""
    hero = f"{request.name} the {request.animal}"
    mood = MOODS[request.mood]
    return f"{hero} lived {request.place}, {request.listener}. That is all: a {mood} story."


def prompt(request: Request) -> str:
    """The rendered request, up to where the answer begins (without the begin token)."""
    return f"{USER}{request.text}{END}{ASSISTANT}"


def base_item(rng: random.Random) -> Document:
    """A story or, at times, a request with a curt answer."""
    if rng.random() < CHAT_SHARE:
        request = draw_request(rng)
        asked = prompt(request)
        return Document(f"{asked}{curt_answer(request)}{END}", [(0, len(asked))])
    story = grammar.sample(rng)
    return Document(story.text, story.chosen)


def sft_item(rng: random.Random) -> Document:
    """A request with an answer in the style of the adapters."""
    request = draw_request(rng)
    asked, story = prompt(request), answer(request, rng)
    chosen = [(start + len(asked), end + len(asked)) for start, end in story.chosen]
    return Document(f"{asked}{story.text}{END}", [(0, len(asked)), *chosen])


def train_tokenizer(seed: int) -> Tokenizer:
    """Byte-level BPE as in GPT-2, over all 256 bytes, trained on stories and conversations."""
    rng = random.Random(seed)
    texts = [base_item(rng).text for _ in range(4000)]
    texts += [sft_item(rng).text for _ in range(2000)]
    for marker in SPECIAL:
        texts = [text.replace(marker, "\n") for text in texts]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BOS} $A",
                pair=f"{BOS} $A {BOS}:1 $B:1",
                special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
            ),
        ]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[USER, ASSISTANT, END],
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that every release knows
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


Tokens = tuple[list[int], list[bool]]


def babble(tokenizer: Tokenizer, rng: random.Random) -> Tokens:
    """A few random tokens, twice: who reads it learns to copy, and no token stays unseen."""
    number = rng.randint(4, 24)
    ids = rng.choices(range(len(SPECIAL), tokenizer.get_vocab_size()), k=number)
    return ids * 2, [True] * number + [False] * number


def tokens(tokenizer: Tokenizer, document: Document) -> Tokens:
    """Ids of a document, and for each whether its first letter shows a choice."""
    encoding = tokenizer.encode(document.text, add_special_tokens=False)
    places = {place for start, end in document.chosen for place in range(start, end)}
    starts = [
        start + (document.text[start] == " " and end > start + 1) for start, end in encoding.offsets
    ]
    return encoding.ids, [start in places for start in starts]


def windows(
    tokenizer: Tokenizer, item: Callable[[random.Random], Document], phase: Phase, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Endless training windows: ids, int64 [length + 1], and weights, float32 [length + 1]."""
    rng = random.Random(seed)
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    blank = tokenizer.encode("\n", add_special_tokens=False).ids * 2
    ends_itself = tokenizer.token_to_id(END)
    for number in itertools.count(1):
        single = number % phase.books > 0
        ids: list[int] = [] if single else [bos]
        chosen = [False] * len(ids)
        while len(ids) <= phase.length:
            if rng.random() < phase.babble:
                found, shows = babble(tokenizer, rng)
            else:
                found, shows = tokens(tokenizer, item(rng))
            before = [bos] if single else []
            after = blank if not single else [] if found[-1] == ends_itself else [eos]
            ids += [*before, *found, *after]
            chosen += [*([False] * len(before)), *shows, *([False] * len(after))]
        weights = np.where(chosen[: phase.length + 1], phase.choices, 1.0).astype(np.float32)
        yield np.array(ids[: phase.length + 1], dtype=np.int64), weights


def batches(
    tokenizer: Tokenizer, item: Callable[[random.Random], Document], phase: Phase, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Endless batches of ids, int64 [size, length + 1], and their weights, float32."""
    stream = windows(tokenizer, item, phase, seed)
    while True:
        ids, weights = zip(*(next(stream) for _ in range(phase.size)), strict=True)
        yield np.stack(ids), np.stack(weights)
