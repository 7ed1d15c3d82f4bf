"""The tokenizer of a model: tokenizer.json as it is, special ids, chat template.

tokenizer.json is loaded by the tokenizers library itself. transformers' AutoTokenizer rebuilds
some tokenizers and then ignores their normalizer. tokenizer.model is read where it stands alone.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from ..checkpoint import TOKENIZER_FILES, read_json, refuse_lfs_pointer
from ..errors import BadInput, Unsupported
from .conformance import MESSAGES, TEXTS
from .refusals import contradiction
from .sentencepiece import read_sentencepiece
from .vocabulary import Kind, Piece, Scheme, read_pieces, read_scheme, space_charsmap

_SETTINGS = (
    "tokenizer_config.json",
    "added_tokens.json",
    "generation_config.json",
    "config.json",
)
SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_EOS_TOKENS = ("eos_token", "eot_token", "eom_token")


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """A tokenizer and what a runtime must know about it.

    Attributes:
        folder: where the files are.
        scheme: how text becomes tokens.
        bos_id, pad_id, unk_id: None where the model has none.
        eos_ids: every id that ends a text; first the tokenizer's own eos token, then those of
            generation_config.json and config.json.
        adds_bos: whether encoding with special tokens puts `bos_id` first.
        chat_template: Jinja source, None for a model without one.
        special: the texts of special tokens that a chat template may use, such as `bos_token`.
        library: the tokenizers library's object.
        spec: tokenizer.json, or what it would be.
    """

    folder: Path
    scheme: Scheme
    bos_id: int | None
    eos_ids: tuple[int, ...]
    pad_id: int | None
    unk_id: int | None
    adds_bos: bool
    chat_template: str | None
    special: Mapping[str, str]
    library: Any
    spec: Mapping[str, Any]

    @classmethod
    def open(cls, folder: Path, pre: str | None = None) -> Tokenizer:
        """Read the tokenizer of a model folder; `pre` overrides the pre-tokenizer found there.

        Raises:
            BadInput: no tokenizer, or one that is unreadable or contradicts the other files.
            Unsupported: llama.cpp would give other ids for some text.
        """
        settings, added, generation, config = (
            read_json(folder / name) if (folder / name).exists() else {} for name in _SETTINGS
        )
        special = _special_tokens(settings)
        model = folder / "tokenizer.model"
        if model.exists() and not (folder / "tokenizer.json").exists():
            refuse_lfs_pointer(model)
            library, special = read_sentencepiece(model, settings, added, special)
        else:
            library = _load(folder / "tokenizer.json")
        spec = json.loads(library.to_str())
        ids = _Ids(library, special, (generation, config))
        first = _ids_before_text(library)
        bos_id = first[0] if first else ids.one("bos")
        unknown = spec["model"].get("unk_token")
        return cls(
            folder=folder,
            scheme=read_scheme(spec, pre),
            bos_id=bos_id,
            eos_ids=ids.ends(),
            pad_id=ids.one("pad"),
            unk_id=ids.one("unk") if unknown is None else library.token_to_id(unknown),
            adds_bos=bool(first),
            chat_template=_chat_template(folder, settings),
            special=special,
            library=library,
            spec=spec,
        )

    @property
    def kind(self) -> Kind:
        return self.scheme.kind

    @property
    def pre(self) -> str | None:
        return self.scheme.pre

    @property
    def charsmap(self) -> bytes | None:
        """llama.cpp's `tokenizer.ggml.precompiled_charsmap`; ugm with a space prefix only."""
        return space_charsmap() if self.kind == "ugm" and self.scheme.space_prefix else None

    @property
    def files(self) -> list[Path]:
        """The files that ship with a model."""
        paths = (self.folder / name for name in TOKENIZER_FILES)
        return [path for path in paths if path.exists()]

    @property
    def sampling(self) -> dict[str, Any]:
        """The defaults of the model's makers, from generation_config.json; empty without one."""
        path = self.folder / "generation_config.json"
        stated = read_json(path) if path.is_file() else {}
        return {key: stated[key] for key in SAMPLING if stated.get(key) is not None}

    def encode(self, text: str, add_special: bool = False) -> list[int]:
        """Ids of a text; special tokens written in it become their ids."""
        ids: list[int] = self.library.encode(text, add_special_tokens=add_special).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, without special tokens."""
        text: str = self.library.decode(list(ids), skip_special_tokens=True)
        return text

    def render_chat(
        self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str | None:
        """The prompt of a conversation, by the model's template in transformers' sandbox.

        None for a model without a template. Messages are {"role": ..., "content": ...}.

        Raises:
            BadInput: the template is wrong, unsafe, or refuses these messages.
        """
        if self.chat_template is None:
            return None
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        render: Any = render_jinja_template  # its annotation names one of its two results
        try:
            prompts, _ = render(
                [[dict(message) for message in messages]],
                chat_template=self.chat_template,
                add_generation_prompt=add_generation_prompt,
                **self.special,
            )
        except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise BadInput(
                "the chat template cannot be rendered",
                f"{type(error).__name__}: {error}",
                "correct chat_template.jinja, or the roles and order of the messages",
            ) from error
        return str(prompts[0])

    def conformance_texts(self) -> list[str]:
        """Texts on which another tokenizer must give equal ids; NFC where this one normalizes."""
        added = [token["content"] for token in self.spec["added_tokens"]]
        texts = [*TEXTS, *added]
        texts += [f"a{token}b {token} {token}{token}\n{token}" for token in added[:50]]
        if chat := self._conformance_chat():
            texts.append(chat)
        if self.scheme.nfc:
            texts = [unicodedata.normalize("NFC", text) for text in texts]
        return list(dict.fromkeys(texts))

    def _conformance_chat(self) -> str | None:
        # Many templates refuse a system message, and some a second turn.
        for messages in (MESSAGES, MESSAGES[1:], MESSAGES[1:2]):
            try:
                return self.render_chat(messages)
            except BadInput as error:
                refusal = error
        raise refusal

    def pieces(self, vocab_size: int | None = None) -> list[Piece]:
        """Every token in the order of ids, filled up to `vocab_size` with unused ones.

        Raises:
            BadInput: an id beyond `vocab_size`.
        """
        return read_pieces(self.spec, self.scheme, vocab_size)

    def merges(self) -> list[str]:
        """`left right` in the order of merging."""
        return [f"{left} {right}" for left, right in self.spec["model"]["merges"]]


@dataclass(frozen=True, slots=True)
class _Ids:
    """Special ids: the token's text in tokenizer_config.json first, then ids of other files."""

    library: Any
    special: Mapping[str, str]
    configs: Sequence[Mapping[str, Any]]

    def one(self, name: str) -> int | None:
        return next(iter(self._named(f"{name}_token")), None)

    def ends(self) -> tuple[int, ...]:
        found = [index for name in _EOS_TOKENS for index in self._named(name)]
        return tuple(dict.fromkeys(found))

    def _named(self, token: str) -> list[int]:
        found = []
        if token in self.special:
            found.append(self._of_text(token, self.special[token]))
        for config in self.configs:
            value = config.get(f"{token}_id")
            for index in value if isinstance(value, list) else [value]:
                if index not in (None, -1):
                    found.append(self._checked(f"{token}_id", index))
        return found

    def _of_text(self, token: str, text: str) -> int:
        index: int | None = self.library.token_to_id(text)
        if index is None:
            raise contradiction(f"{token} {text!r} is not in the vocabulary")
        return index

    def _checked(self, key: str, index: Any) -> int:
        known = type(index) is int and 0 <= index < 2**31
        if not known or self.library.id_to_token(index) is None:
            raise contradiction(f"{key} = {index!r} is no id of the vocabulary")
        return int(index)


def _load(path: Path) -> Any:
    refuse_lfs_pointer(path)
    if not path.is_file():
        raise BadInput(
            "tokenizer.json is missing",
            f"there is none in {path.parent}, and no tokenizer.model either",
            "save it with transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...)",
        )
    try:
        library = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises Exception itself
        raise BadInput(
            "tokenizer.json cannot be read", str(error), f"download {path} again"
        ) from error
    library.no_truncation()
    library.no_padding()
    return library


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """{bos_token: text, ...} of tokenizer_config.json, where a token is a text or an object."""
    found = {}
    for key in (*_EOS_TOKENS, "bos_token", "pad_token", "unk_token"):
        value = settings.get(key)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            found[key] = text
    return found


def _ids_before_text(library: Any) -> list[int]:
    """The ids that encoding with special tokens adds: none, or one at the start."""
    text = "a"
    plain = library.encode(text, add_special_tokens=False).ids
    full: list[int] = library.encode(text, add_special_tokens=True).ids
    extra = len(full) - len(plain)
    if extra > 1 or full[extra:] != plain:
        raise Unsupported(
            f"tokenizer.json adds special tokens around a text: {full} instead of {plain}",
            "a decoder's prompt starts with at most one, and nothing follows it",
            "correct the post_processor in tokenizer.json",
        )
    return full[:extra]


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.exists():
        refuse_lfs_pointer(path)
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = [t for t in template if isinstance(t, dict) and t.get("name") == "default"]
        template = named[0].get("template") if named else None
    if template is not None and not isinstance(template, str):
        raise contradiction(f"chat_template is {template!r}, neither a text nor a list of texts")
    return template
