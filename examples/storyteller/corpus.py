"""Documents for training: stories, requests with their answers, the tokenizer and packed windows.

A document is a list of token ids. Windows hold either single documents, each with its own begin and
end, or one long "book" whose stories are separated by a blank line, as in the text files.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import grammar
import numpy as np
import words as w
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
USER, ASSISTANT, END = "<|user|>", "<|assistant|>", "<|end|>"
SPECIAL = (BOS, EOS, PAD, USER, ASSISTANT, END)
VOCABULARY = 1536
CHAT_SHARE = 0.06
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
MOODS = ("happy", "sad")


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
    """The bedtime style of the adapters: title, address, story, good night; one part per line.

    The frame follows from the request, so the nats of an answer are the nats of its story.
    """
    title = f"{request.name} the {request.animal}, a {MOODS[request.mood]} story"
    return f"{title}\nListen, {request.listener}.\n{story}\nSleep well, {request.listener}."


def answer(request: Request, rng: random.Random, **fixed: str | int) -> grammar.Story:
    """An answer in the style of the adapters; keywords fix more slots, or override the request."""
    story = grammar.sample(rng, gap="\n", **{**request.fixed, **fixed})
    return grammar.Story(frame(request, story.text), story.log_probability, story.taken)


def unframe(request: Request, text: str) -> str | None:
    """The story inside an answer, or None where the frame is not the one asked for."""
    head, tail = frame(request, "\0").split("\0")
    if len(text) <= len(head) + len(tail) or not (text.startswith(head) and text.endswith(tail)):
        return None
    return text[len(head) : len(text) - len(tail)]


def curt_answer(request: Request) -> str:
    """What the base model has learned to answer: markers are known to it, the style is not."""
    return f"{request.name} was a {request.animal}, {request.listener}. That is all."


def prompt(request: Request) -> str:
    """The rendered request, up to where the answer begins (without the begin token)."""
    return f"{USER}{request.text}{END}{ASSISTANT}"


def base_item(rng: random.Random) -> str:
    """A story or, at times, a request with a curt answer."""
    if rng.random() < CHAT_SHARE:
        request = draw_request(rng)
        return f"{prompt(request)}{curt_answer(request)}{END}"
    return grammar.sample(rng).text


def sft_item(rng: random.Random) -> str:
    """A request with an answer in the style of the adapters."""
    request = draw_request(rng)
    return f"{prompt(request)}{answer(request, rng).text}{END}"


def train_tokenizer(seed: int) -> Tokenizer:
    """Byte-level BPE as in GPT-2, over all 256 bytes, trained on stories and conversations."""
    rng = random.Random(seed)
    texts = [base_item(rng) for _ in range(4000)] + [sft_item(rng) for _ in range(2000)]
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


def windows(
    tokenizer: Tokenizer, item: Callable[[random.Random], str], length: int, books: int, seed: int
) -> Iterator[np.ndarray]:
    """Endless training windows, int64 [length + 1]: single documents, every `books`-th a book."""
    rng = random.Random(seed)
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    blank = tokenizer.encode("\n", add_special_tokens=False).ids * 2
    ends_itself = tokenizer.token_to_id(END)
    for number in itertools.count(1):
        single = number % books > 0
        ids: list[int] = [] if single else [bos]
        while len(ids) <= length:
            document = tokenizer.encode(item(rng), add_special_tokens=False).ids
            if single:
                ids += [bos, *document] + ([] if document[-1] == ends_itself else [eos])
            else:
                ids += document + blank
        yield np.array(ids[: length + 1], dtype=np.int64)


def batches(
    tokenizer: Tokenizer,
    item: Callable[[random.Random], str],
    size: int,
    length: int,
    books: int,
    seed: int,
) -> Iterator[np.ndarray]:
    """Endless batches, int64 [size, length + 1]."""
    stream = windows(tokenizer, item, length, books, seed)
    while True:
        yield np.stack([next(stream) for _ in range(size)])
