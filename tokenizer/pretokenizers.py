"""How byte-level BPE splits a text first: from tokenizer.json to a name that llama.cpp knows.

llama.cpp has many names for fewer behaviours (its `llama-vocab.cpp` and `unicode.cpp`): one name
stands here for each. Known are those that were found equal to the tokenizers library on text of
all scripts; docs/tokenizers.md has what is left.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import Unsupported
from .refusals import differs

DIGIT, THREE_DIGITS = r"\p{N}", r"\p{N}{1,3}"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_SYMBOLS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3, QWEN2, MINICPM5 = (
    _CONTRACTION + r"[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + _SYMBOLS + SPACES
    for digits in (THREE_DIGITS, DIGIT, r"\p{N}+")
)
JAIS2 = LLAMA3.replace(
    r"\s+(?!\S)|\s+",
    "".join(rf"\s{{{2**power}}}(?!\S)|" for power in range(9, 1, -1)) + r"\s{1,2}(?!\S)|\s{1}",
)
QWEN35 = (
    _CONTRACTION + r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + SPACES
)
SEED_CODER = _CONTRACTION + r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+" + SPACES
EXAONE_MOE = (
    _CONTRACTION
    + r"[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?"
    + r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
DEEPSEEK_V3 = (
    THREE_DIGITS,
    "[一-龥\u3040-ゟ\u30a0-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*" + SPACES,
)
_BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"  # noqa: RUF001
# tiktoken's way to write the same
_SAME = {
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|"
    + digits
    + r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+": regex
    for digits, regex in ((THREE_DIGITS, LLAMA3), (DIGIT, QWEN2))
}
WHOLE = (GPT2, LLAMA3, QWEN2)  # these leave no character unmatched
# (regexes applied in turn, ignore_merges) -> tokenizer.ggml.pre with the same behaviour
_NAMES = {
    ((GPT2,), False): "gpt-2",  # mpt, olmo, jais, trillion, exaone4, granite-docling
    ((DIGIT, GPT2), False): "smollm",  # starcoder, refact, command-r, codeshell, minerva-7b
    ((LLAMA3,), True): "llama-bpe",  # falcon3, pixtral, lfm2
    ((LLAMA3,), False): "smaug-bpe",  # dbrx (OLMo 2, Phi-4), glm4, chatglm-bpe
    ((QWEN2,), False): "qwen2",  # stablelm2, hunyuan, megrez, grok-2, bailingmoe
    (DEEPSEEK_V3, False): "deepseek-v3",  # hunyuan-dense, joyai-llm
    ((_BLOOM,), False): "bloom",  # poro-chat, gpt3-finnish
    ((_BLOOM, DIGIT), False): "viking",
    ((SEED_CODER,), False): "seed-coder",
    ((JAIS2,), False): "jais-2",
    ((QWEN35,), False): "qwen35",
    ((EXAONE_MOE,), False): "exaone-moe",
    ((THREE_DIGITS, MINICPM5), True): "minicpm5",
}


@dataclass(frozen=True, slots=True)
class _Inexact:
    """A pre-tokenizer that llama.cpp only comes near; `mark` stands in one of its regexes."""

    name: str
    mark: str
    why: str


_CASES = "knows upper and lower case only from a to z, and parts marks from their letters"
_INEXACT = (
    _Inexact("gpt-4o", r"\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?", _CASES),
    _Inexact("tekken", r"\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+", _CASES),
    _Inexact("deepseek-coder", "一-龥ࠀ-一", "does not keep wide spaces among Chinese letters"),
    _Inexact("superbpe", r"(?=(\d{3})+(?!\d))", "knows no digits but 0 to 9"),
)


def pre_name(pre_tokenizer: Mapping[str, Any], ignore_merges: bool) -> str:
    """`tokenizer.ggml.pre` of a byte-level pre-tokenizer of tokenizer.json.

    Raises:
        Unsupported: llama.cpp has none that splits every text in the same places.
    """
    found = tuple(regexes(pre_tokenizer))
    if name := _NAMES.get((found, ignore_merges)):
        return name
    for near in _INEXACT:
        if any(near.mark in regex for regex in found):
            raise Unsupported(
                f"the tokenizer splits text as {near.name} is meant to",
                f"llama.cpp's {near.name} {near.why}: it would give other ids for some text",
                "use a model with another tokenizer",
            )
    raise Unsupported(
        f"tokenizer.json splits text in a way unknown here: {' then '.join(found) or 'none'}",
        f"no pre-tokenizer of llama.cpp is known to do the same (ignore_merges {ignore_merges})",
        "if you know its name in llama.cpp, give it with --pre NAME",
    )


def steps(step: Mapping[str, Any] | None, key: str) -> list[Any]:
    """The members of a Sequence, or the one step; `key` is where a Sequence holds them."""
    if step is None:
        return []
    return list(step[key]) if step["type"] == "Sequence" else [step]


def ends_in_bytes(pre_tokenizer: Mapping[str, Any] | None) -> bool:
    """Whether this is byte-level BPE."""
    found = steps(pre_tokenizer, "pretokenizers")
    return bool(found) and found[-1]["type"] == "ByteLevel"


def regexes(pre_tokenizer: Mapping[str, Any]) -> Iterator[str]:
    """The regexes that a byte-level pre-tokenizer applies in turn, tiktoken's as Llama 3 writes it.

    Raises:
        Unsupported: it does not split with regexes.
    """
    *first, last = steps(pre_tokenizer, "pretokenizers")
    for step in first:
        yield _regex(step)
    match last:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}:
            if use_regex:
                yield GPT2
        case _:
            raise differs(f"it splits text with {dict(last)}")


def _regex(step: Mapping[str, Any]) -> str:
    """What is a piece of its own after this step."""
    match step:
        case {"type": "Digits", "individual_digits": True}:
            return DIGIT
        case {"type": "Split", "pattern": {"Regex": written}, "behavior": how, "invert": invert}:
            plain = str(written).replace("\r", r"\r").replace("\n", r"\n")
            regex = _SAME.get(plain, plain)
            if (how, invert) == ("Isolated", False):
                return regex
            if (how, invert) == ("Removed", True) and regex in WHOLE:
                return regex
    raise differs(f"it splits text with {dict(step)}")
