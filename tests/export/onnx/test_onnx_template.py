"""Templates that genai is given render as in transformers; the others are withheld."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime_genai as genai
import pytest

from slimport.architectures import decoder_config
from slimport.checkpoint import read_json
from slimport.errors import BadInput
from slimport.export.onnx import template
from slimport.export.onnx import tokenizer as container
from slimport.export.onnx.notes import notes
from slimport.quantize.plan import make_plan
from slimport.tokenizer.conformance import CHATS, Chat
from slimport.tokenizer.tokenizer import Tokenizer

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content']"
    " + '<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "system\\n\\nToday Date: " + date_string + "\\n\\n" + system_message + "<|eos|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or 'tool_calls' in message) %}
        {{- message['role'] + '\\n\\n'+ message['content'] | trim + '<|eos|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("one call only") }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'assistant\\n\\n' }}
{%- endif %}
"""
GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first = messages[0]['content'] + '

' -%}
    {%- else -%}
        {%- set first = messages[0]['content'][0]['text'] + '

' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start>' + role + '
' + (first if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}{{ item['text'] | trim }}{%- endfor -%}
    {%- endif -%}
    {{ '<end>
' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start>model
'}}
{%- endif -%}
"""
MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if not (message.tool_calls is defined and message.tool_calls is not none) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("roles must alternate") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- else %}
        {{- " " + message["content"] + eos_token}}
    {%- endif %}
{%- endfor %}
{{- user_messages | length }}
"""
TINYLLAMA = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
  {% elif message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n'  + message['content'] + eos_token }}
{% endif %}
{# the prompt #}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}
"""
QWEN3 = """{%- for message in messages %}
    {%- set content = message.content %}
    {%- if '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
"""
SHIPPED = {
    "chatml": CHATML,
    "llama 3": LLAMA3,
    "gemma 3": GEMMA,
    "mistral": MISTRAL,
    "tinyllama": TINYLLAMA,
    "line ends of Windows": TINYLLAMA.replace("\n", "\r\n"),
    "after the last mark": CHATML.replace("['content']", "['content'].split('.')[-1].strip()"),
    "generation": CHATML.replace("{{'<", "{% generation %}{{'<").replace(
        "{% endfor", "{% endgeneration %}{% endfor"
    ),
}
MESSAGE = "{% for message in messages %}"
END = "{% endfor %}"
# template -> why it is withheld
WITHHELD = {
    QWEN3: "`in` of what may be a text in line 3",
    "{{ messages[0].content | upper }}": "the filter upper",
    "{{ messages[0].content.replace('a', 'b') }}": "a call of replace",
    "{{ messages[0].content | length }}": "the length of what may be a text",
    "{{ messages[0].content[0] }}": "a part of what may be a text",
    "{{ messages[0].content[1:] }}": "a part of what may be a text",
    "{{ messages[0].content[0].strip() }}": "a part of what may be a text",
    "{{ messages | selectattr('role') | list | length }}": "selectattr without equalto",
    "{{ messages | map('trim') | list }}": "the filter map",
    "{{ messages[0].content }}{{ pad_token }}": "the variable pad_token",
    "{{ 1 / 3 }}": "a Div",
    "{{ 0.5 }}": "a number with a fraction",
    "{% if 'role' not in messages[0] %}x{% endif %}": "`not in` of what may be a text",
    "{% if messages[0].role in ['', 'user'] %}x{% endif %}": "a list of other things than texts",
    "{{ messages[0].role and messages[0].content }}": "an `and` whose value is taken",
    "{% if messages[0].name is none %}x{% endif %}": "an unguarded test for none",
    "{% if messages[0].name == none %}x{% endif %}": "a comparison with none",
    "{% if 1 < messages | length < 3 %}x{% endif %}": "a chain of comparisons",
    "{% if messages is sequence %}x{% endif %}": "the test sequence",
    "{{ messages[0].role ~ 'a' == 'usera' }}": "operators that are taken in another order",
    "{{ 2 * messages | length }}": "operators that are taken in another order",
    "{{ messages[0].items }}": "the attribute items",
    "{{ 'caf\\u00e9' }}": "it writes \\u in a text",
    "{% raw %}{{ }}{% endraw %}": "cannot be written without trimming",
    "{%+ if true %}x{% endif %}": "cannot be written without trimming",
    "{% macro one() %}x{% endmacro %}{{ one() }}": "a Macro",
    "{% for message in messages": "it cannot be parsed",
    f"{MESSAGE}{{{{ loop.cycle('a', 'b') }}}}{END}": "a call of cycle",
    f"{MESSAGE}a{END}{{{{ message.role }}}}": "message in line 1, outside of the loop over it",
    f"{MESSAGE}{{% if loop.first %}}{{% set x = 'a' %}}{{% endif %}}{{{{ x }}}}{END}": (
        "x read before it is set in the loop of line 1"
    ),
}


def said_of(tokenizer: Tokenizer, preset: str = "int4") -> list[str]:
    """The container's notes on a model with this tokenizer."""
    config = decoder_config(read_json(tokenizer.folder / "config.json"))
    return notes(config, make_plan(config, preset, "rtn"), tokenizer)


@pytest.fixture(scope="module")
def source(make_model: Any) -> Tokenizer:
    return Tokenizer.open(make_model("llama"))


def expected(tokenizer: Tokenizer, chat: Chat) -> str | None:
    try:
        return tokenizer.render_chat(chat.messages, chat.add_generation_prompt)
    except BadInput:
        return None


def rendered(tokenizer: Tokenizer, folder: Path, chats: Any = CHATS) -> list[str | None]:
    """By genai, from the files that are written for it."""
    for name, content in container.files(tokenizer).items():
        (folder / name).write_bytes(content)
    config = {"model": {"type": "decoder", "context_length": 8}}
    (folder / "genai_config.json").write_text(json.dumps(config))
    opened = genai.Tokenizer(str(folder))
    found: list[str | None] = []
    for messages, prompt in chats:
        try:
            words = json.dumps(messages)
            found.append(opened.apply_chat_template(words, add_generation_prompt=prompt))
        except RuntimeError:
            found.append(None)
    return found


@pytest.mark.parametrize("name", SHIPPED)
def test_what_ships_renders_as_in_transformers(
    name: str, source: Tokenizer, tmp_path: Path
) -> None:
    tokenizer = replace(source, chat_template=SHIPPED[name])
    assert template.withheld(SHIPPED[name]) is None
    texts = [expected(tokenizer, chat) for chat in CHATS]
    assert rendered(tokenizer, tmp_path) == texts
    assert any(texts)


@pytest.mark.parametrize("written", WITHHELD)
def test_what_is_withheld_says_why(written: str, source: Tokenizer, tmp_path: Path) -> None:
    reason = template.withheld(written)
    assert reason is not None and WITHHELD[written] in reason
    tokenizer = replace(source, chat_template=written)
    assert rendered(tokenizer, tmp_path) == [None] * len(CHATS)  # nobody overlooks that
    assert any(reason in note for note in said_of(tokenizer))


def test_the_shipped_template_is_needed_as_it_is_written(source: Tokenizer, tmp_path: Path) -> None:
    """As its makers write it, genai puts line ends where transformers has none."""
    tokenizer = replace(source, chat_template=TINYLLAMA)
    (tmp_path / "a").mkdir()
    assert rendered(tokenizer, tmp_path / "a")[0] == expected(tokenizer, CHATS[0])
    settings = json.loads((tmp_path / "a" / "tokenizer_config.json").read_text())
    settings["chat_template"] = TINYLLAMA
    (tmp_path / "a" / "tokenizer_config.json").write_text(json.dumps(settings))
    opened = genai.Tokenizer(str(tmp_path / "a"))
    words = json.dumps(CHATS[0].messages)
    assert opened.apply_chat_template(words, add_generation_prompt=True) != expected(
        tokenizer, CHATS[0]
    )


def test_wide_spaces_are_known_not_to_be_trimmed(source: Tokenizer, tmp_path: Path) -> None:
    """docs/tokenizers.md tells of it, and a note; the test fails once genai does the same."""
    chat = Chat(({"role": "user", "content": "\u3000x\u00a0"},), True)
    for written, trims in ((LLAMA3, True), (CHATML, False)):
        tokenizer = replace(source, chat_template=written)
        (found,) = rendered(tokenizer, tmp_path, [chat])
        assert (found != expected(tokenizer, chat)) == trims
        said = said_of(tokenizer)
        assert any("trims" in note for note in said) == trims


def test_bos_is_named_for_prompts_without_a_template(source: Tokenizer, make_model: Any) -> None:
    (bos, trims) = said_of(source)
    assert "`<|bos|>`" in bos and "trims" in trims
    (nfc, _) = said_of(Tokenizer.open(make_model("qwen2")))
    assert "NFC" in nfc and "onnxruntime-genai" in nfc


def test_slow_operators_are_named(tiny_llama: Path) -> None:
    assert any(
        "nf4-g64 is a reference" in note for note in said_of(Tokenizer.open(tiny_llama), "nf4")
    )
    assert not any("nf4" in note for note in said_of(Tokenizer.open(tiny_llama)))
