"""Differences between two tokenizers are found and named."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from slimport.errors import BadInput, ValidationFailed
from slimport.validation import conformance
from slimport.validation.runtime import Vocabulary


@dataclass
class Fake:
    """A source tokenizer and a runtime in one; `wrong` holds ids that the runtime gets wrong."""

    eos_ids: tuple[int, ...] = (2, 7)
    eog: tuple[int, ...] = (2, 7)
    wrong: tuple[str, ...] = ()
    bos_id: int | None = None
    adds_bos: bool = False
    chat_template: str | None = None
    read: tuple = (None, False, None)  # BOS, whether it is added, template: as the runtime has them
    prompts: list | None = None  # of the runtime, by conversation

    def conformance_texts(self):
        return ["hello", " hello", "a\x00b", ""]

    def encode(self, text):
        return [*text.encode()]

    def tokenize(self, file, texts):
        return [[0] if text in self.wrong else [*text.encode()] for text in texts]

    def vocabulary(self, file):
        return Vocabulary(256, self.eog, *self.read)

    def render(self, file, chats):
        return self.prompts

    def render_chat(self, messages, add_generation_prompt):
        if len(messages) == 4:
            raise BadInput("a system message", "it is refused", "leave it out")
        return f"{len(messages)} {add_generation_prompt}"


PROMPTS = [None, None, *(f"{n} {prompt}" for n in (3, 1, 3) for prompt in (True, False))]


def check(fake):
    return conformance.check(fake, Path("model.gguf"), fake)


def test_equal_tokenizers_conform():
    found = check(Fake())
    assert found.conforms and found.checked == 4
    expected = {"conforms": True, "checked": 4, "further_stops": [], "chats": 0}
    assert found.to_json() == expected


def test_the_first_difference_is_named():
    with pytest.raises(ValidationFailed, match=r"' hello' otherwise \(2 of 4") as caught:
        check(Fake(wrong=("a\x00b", " hello")))
    assert "[32, 104," in caught.value.why and "[0]" in caught.value.why


def test_a_stop_that_the_runtime_misses_fails():
    with pytest.raises(ValidationFailed, match="does not stop at token 7"):
        check(Fake(eog=(2,)))


def test_stops_that_the_runtime_adds_are_told():
    found = check(Fake(eos_ids=(2,)))
    assert found.conforms and found.further_stops == (7,)


@pytest.mark.parametrize(
    ("source", "read", "what"),
    [
        ({"bos_id": 1, "adds_bos": True}, (1, False, None), "puts BOS"),
        ({"bos_id": 1}, (11, False, None), "BOS id: 11"),
        ({"chat_template": "{{ a }}"}, (None, False, "{{ b }}"), "chat template"),
    ],
)
def test_another_start_fails(source, read, what):
    with pytest.raises(ValidationFailed, match=what):
        check(Fake(**source, read=read))


def test_a_bos_that_the_source_does_not_have_is_not_compared():
    assert check(Fake(read=(11, False, None))).conforms


def test_a_bos_that_is_left_to_the_app_is_not_compared():
    assert check(Fake(bos_id=1, adds_bos=True, read=(1, None, None))).conforms


def test_conversations_are_compared_where_a_runtime_renders():
    template = {"chat_template": "{{ a }}", "read": (None, False, "{{ written anew }}")}
    assert check(Fake(**template, prompts=PROMPTS)).chats == len(PROMPTS)
    for place, other in ((0, "a prompt"), (2, None), (5, "1 True")):
        wrong = [*PROMPTS[:place], other, *PROMPTS[place + 1 :]]
        with pytest.raises(ValidationFailed, match="renders a conversation as"):
            check(Fake(**template, prompts=wrong))


def test_a_template_that_is_withheld_must_not_render():
    withheld = {"chat_template": "{{ a }}", "read": (None, False, None)}
    assert check(Fake(**withheld, prompts=[None] * 8)).chats == 0
    with pytest.raises(ValidationFailed, match="renders a conversation as"):
        check(Fake(**withheld, prompts=[""] * 8))


def test_compare_keeps_every_difference():
    found = conformance.compare(["a", "b"], [[1], [2]], [[1], [3]], [], [])
    assert not found.conforms
    assert [(d.text, d.expected, d.got) for d in found.differences] == [("b", (2,), (3,))]
