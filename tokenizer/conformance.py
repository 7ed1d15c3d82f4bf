"""Texts that tell tokenizers apart: a container's tokenizer must give equal ids on all of them."""

# ruff: noqa: RUF001  (letters that look like others are the point)
from __future__ import annotations

from typing import NamedTuple

TEXTS = (
    "",
    " ",
    "  ",
    "   ",
    "\t",
    "\n",
    "\n\n",
    "\n\n\n\n",
    "\r\n",
    " \n \n ",
    "\n \n x",
    "a  \n  b",
    "def f():\n    \n    x = 1\n",
    "\t\n\t \r\n  \n",
    "Hello, world!",
    " Hello",
    "  Hello",
    "Hello ",
    "Hello  ",
    "Hello\n",
    "\nHello\n\n there",
    "Hello\r\nthere\rand\nhere",
    "a  b   c    d     e      f",
    "a\tb\t\tc\t \t d",
    " leading and trailing ",
    "\u00a0no\u00a0break\u00a0space\u00a0",
    "thin\u2009space, em\u2003space, ideographic\u3000space, line\u2028separator, next\u0085line",
    "zero\u200bwidth\u200cand\u200djoiner\ufeffand mark",
    "I'm you're he'd we'll they've it's don't",
    "I'M YOU'RE HE'D WE'LL THEY'VE IT'S DON'T",
    "' 's 't'' 'll'll '",
    "rock 'n' roll, the '90s, the dogs' bones",
    "'12 345",
    "1",
    "12",
    "123",
    "1234",
    "12345678901234567890",
    " 7  42   1984",
    "3.14159, 1,000,000.00, -1e-10, 0x1F, 1st 2nd 3rd",
    "x²+y³=½, Ⅷ ①②③ ٣٤٥ १२३",
    "def f(x):\n    return x ** 2  # square\n\n\nclass A:\n\tpass\n",
    "for (int i = 0; i < n; ++i) { a[i] += b[i] << 2; }",
    '{"key": [1, 2.5, null, true], "text": "a\\n\\"b\\""}',
    "<html><body class='x'>&nbsp;&lt;p&gt;</body></html>",
    "https://example.org/path?query=1&other=%20#part",
    "user@example.org C:\\Users\\name ../../etc ~/.config",
    "!?.,;:-_+*/\\|@#$%^&()[]{}<>~`'\"",
    "... --- === *** ///// !!!!!!!! ????",
    "Wait... what?! No—really – “quoted” ‘text’ «here»…",
    "schläft Äpfel größer Straße naïve façade Ærø Łódź",
    "cafe\u0301 n\u0303 a\u0308\u0323 o\u0302\u0301",
    "ŐŰ ΑΒΓ αβγ Привет мир ЁЖИК Україна",
    "你好，世界。今天天气很好！",
    "こんにちは世界、カタカナとひらがな。",
    "안녕하세요 세계, 한국어 문장입니다.",
    "สวัสดีชาวโลก ภาษาไทยไม่มีช่องว่าง",
    "مرحبا بالعالم، كيف حالك؟",
    "हिन्दी में लिखा মানুষ தமிழ்",
    "наЮге iЯ éÉcole ÉCOLEéa ǅungla",
    "\u3000Hello\u3000\u3000你好",
    "שלום עולם, מה שלומך?",
    "नमस्ते दुनिया, আপনি কেমন আছেন, தமிழ் மொழி",
    "Tiếng Việt có nhiều dấu thanh",
    "🙂",
    "🙂🙃😀 👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪🇫🇷 ❤️ 1️⃣",
    "a🙂b 🙂 c",
    "𝒜𝓁𝑔𝑒𝒷𝓇𝒶 𐍈 𠜎 \U0001f9ec",
    "∀x∈ℝ: ⌈x⌉ = −⌊−x⌋ ≠ ∞, √2 ≈ 1.414, ∑∏∫",
    "← ↑ → ↓ █▓▒░ ┌─┐│└┘ ★☆ ♠♥♦♣",
    "\x01\x02\x07\x08\x0b\x0c\x1b[31mred\x1b[0m\x7f",
    "\ufffd\ufffd\ue000\uffff",
    "▁",
    "▁▁a▁b ▁ c",
    "Ġthe Ċ Ã©",
    "<0x0A>",
    "<0x0A><0xE2> <unk> <s> </s> <|endoftext|> [INST] [PAD0]",
    "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n",
    "<s> </s><s>a</s> b",
    "ALL CAPS TEXT and camelCaseText and snake_case_text and kebab-case",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "a" * 300,
    "ab" * 200,
    " " * 65 + "x",
    "\n" * 33,
    "na " * 60,
    "Donaudampfschifffahrtsgesellschaftskapitänsmütze" * 4,
    "zzzzqqqqxxxxjjjjvvvv" * 8,
    "word " * 40 + "\n" + "word\n" * 20,
    "Once upon a time there was a little fox who lived under an old oak tree near the river.",
)
MESSAGES = (
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "  Hello! What's 12 × 34?\n"},
    {"role": "assistant", "content": "It's 408. 🙂"},
    {"role": "user", "content": "Danke schön, and tell me a story."},
)
_THOUGHTS = (
    {"role": "user", "content": "Which is larger?"},
    {"role": "assistant", "content": "<think>\nLet me see.\n</think>\n\nThe second."},
    {"role": "user", "content": "Why?"},
)


class Chat(NamedTuple):
    """A conversation to render, and whether an answer is to follow."""

    messages: tuple[dict[str, str], ...]
    add_generation_prompt: bool


# Many templates refuse a system message, and some a second turn.
CHATS = tuple(
    Chat(messages, prompt)
    for messages in (MESSAGES, MESSAGES[1:], MESSAGES[1:2], _THOUGHTS)
    for prompt in (True, False)
)
