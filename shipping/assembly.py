"""What a bundle holds beside the model: licences, golden tokens, sampling defaults, a README."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..bundle import canonical_json, sha256
from ..checkpoint import license_files
from ..export.container import Container
from ..quantize.plan import Plan
from ..quantize.store import QuantizedCheckpoint
from ..settings import format_size
from ..targets.target import Target
from .source import Source

TOOLS = ("slimport", "torch", "transformers", "peft", "numpy", "numba")


@dataclass(frozen=True, slots=True)
class Files:
    """What goes onto the device: the model's files, first what a runtime is given; adapters."""

    base: tuple[Path, ...]
    adapters: tuple[Path, ...]

    @property
    def model(self) -> Path:
        return self.base[0]

    @property
    def model_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.base)


def copy_licenses(source: Source, texts: list[Path], folder: Path) -> None:
    """Copy the licences of base, adapters and example texts to licenses/.

    A text's licence is a LICENSE file beside it. Where a licence is missing nothing is copied, and
    the manifest shows it by its absence.
    """
    wanted = {"base": source.checkpoint.license_files()}
    for entry, _ in source.adapters:
        wanted[f"adapter-{entry.name}"] = license_files(entry.path)
    for number, place in enumerate(dict.fromkeys(text.parent for text in texts), 1):
        wanted["texts" if number == 1 else f"texts-{number}"] = license_files(place)
    for owner, files in wanted.items():
        for file in files:
            target = folder / "licenses" / f"{owner}-{file.name}"
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)


def write_tokenizer_notes(source: Source, golden: dict[str, Any] | None, folder: Path) -> None:
    """tokenizer/generation.json (sampling defaults, stops) and tokenizer/golden.json."""
    target = folder / "tokenizer"
    target.mkdir()
    tokenizer = source.tokenizer
    notes = {
        "schema": "slimport.generation/1",
        "sampling": tokenizer.sampling,
        "eos_ids": list(tokenizer.eos_ids),
        "stop_strings": stops(source),
        "chat_template": tokenizer.chat_template,
        "normalization": "NFC" if tokenizer.scheme.nfc else None,
    }
    (target / "generation.json").write_bytes(canonical_json(notes))
    if golden is not None:
        (target / "golden.json").write_bytes(canonical_json(golden))


def inputs(
    source: Source, quantized: QuantizedCheckpoint, judged_on: Mapping[str, str]
) -> dict[str, Any]:
    """Names and digests of all that went in; never a local path or a host name.

    Args:
        judged_on: digests of the texts.
    """
    return {
        "model": {
            "name": source.checkpoint.name,
            "revision": source.checkpoint.revision,
            "digest": quantized.origin.base,
        },
        "tokenizer": {path.name: f"sha256:{sha256(path)}" for path in source.tokenizer.files},
        "adapters": [
            {
                "name": entry.name,
                "kind": adapter.kind,
                "scale": entry.scale,
                "mode": source.mode,
                "digest": adapter.digest(),
            }
            for entry, adapter in source.adapters
        ],
        "calibration": quantized.calibration,
        "judged_on": dict(judged_on),
        **({} if quantized.training is None else {"training": quantized.training}),
    }


def tools(container: Container) -> dict[str, str]:
    """Versions of what the bytes depend on."""
    names = (*TOOLS, *container.LIBRARIES)
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def write_readme(
    container: Container,
    target: Target,
    source: Source,
    plan: Plan,
    report: Mapping[str, Any] | None,
    files: Files,
    folder: Path,
    chats: bool | None = None,
) -> None:
    """README.md: how to load this bundle on the device, with code.

    Args:
        report: None: it was not judged.
        chats: whether the pairs that a reward model was judged on are chats; None: there are none.
    """
    reward = source.decoder.reward
    separate = bool(files.adapters)
    minimum = container.minimum_runtime(source.decoder, plan, source.tokenizer, separate)
    settings = source.tokenizer.sampling
    bos = source.tokenizer.bos_id if source.tokenizer.adds_bos else None
    fields = {
        "name": source.name,
        "target": target.title,
        "model": files.model.name,
        "size": format_size(files.model_bytes),
        "minimum_build": minimum.build,
        "minimum_reason": minimum.reason,
        "judged": judged(report),
        "context": str(target.context_length),
        "sampling": ", ".join(f"{key} {value}" for key, value in settings.items()) or "none",
        "stops": ", ".join(repr(stop) for stop in stops(source)),
        "bos": source.tokenizer.library.id_to_token(bos) if bos is not None else "",
        "notes": "".join(f"\n- {note}" for note in notes(container, source, plan)),
        "kind": "reward" if reward else "language",
        "and_judged": _NOT_JUDGED if report is None else _JUDGED,
        "judged_rows": "" if report is None else _GOLDEN[reward] + _REPORT,
    }
    if reward:
        fields |= _written(source, bool(source.tokenizer.chat_template) if chats is None else chats)
    names = [path.relative_to(folder).as_posix() for path in files.adapters]
    (folder / "README.md").write_text(container.readme(fields, names), encoding="utf-8")


_JUDGED = " and judged before it was shipped"
_NOT_JUDGED = " and not judged"
_GOLDEN = {
    False: "| `tokenizer/golden.json` | prompts, their token ids and the greedy tokens that follow:"
    " run them on the device to prove it |\n",
    True: "| `tokenizer/golden.json` | token ids and their scores: run them on the device to prove"
    " it |\n",
}
_REPORT = (
    "| `report/report.html` | all that was measured; `report/report.json` is the same for machines"
    " |\n"
)
_CHAT_CODE = """\
    chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    text = tokenizer.apply_chat_template(json.dumps(chat), add_generation_prompt=False)
"""


def _written(source: Source, chats: bool) -> dict[str, str]:
    """How the texts of a reward model are made, in words and in Python."""
    if chats:
        return {"written": "by the chat template", "text_code": _CHAT_CODE}
    tokenizer = source.tokenizer
    plain, whole = tokenizer.encode("a"), tokenizer.encode("a", add_special=True)
    places = range(len(whole) - len(plain) + 1)
    place = next(n for n in places if whole[n : n + len(plain)] == plain)
    start, end = (
        "".join(map(tokenizer.library.id_to_token, ids))
        for ids in (whole[:place], whole[place + len(plain) :])
    )
    return {
        "written": "as prompt and answer joined, with the special tokens that the tokenizer adds",
        "text_code": f"    text = {start!r} + prompt + answer + {end!r}\n",
    }


def notes(container: Container, source: Source, plan: Plan) -> list[str]:
    """What an app must do that the runtime does not."""
    found = container.notes(source.decoder, plan, source.tokenizer)
    if source.given is None:
        return found
    return [
        f"{source.given.maker} quantized these weights, and slimport carried its codes over: the"
        " reference is what they mean, and what was lost before is in no figure here.",
        *found,
    ]


def judged(report: Mapping[str, Any] | None) -> str:
    """What is known of accuracy and memory, in a few sentences."""
    if report is None:
        return "It was not judged (--no-validate): accuracy and memory are not known."
    footprint = report["footprint"]
    total, mapped = footprint["memory_bytes"], footprint["memory"]["mapped"]
    if "preference" in report:
        found = report["preference"]["held_out"]
        accuracy = (
            f"{found['pair_agreement']:.1%} of {found['pairs']} held-out pairs in the same order as"
            f" full precision, scores off by {found['score_rmse']:.3g} (root mean square)"
        )
    else:
        found = report["accuracy"]["held_out"]
        accuracy = (
            f"mean KL {found['kl_mean']:.4g} nats and top-1 agreement {found['top1']:.1%} with full"
            " precision on held-out text"
        )
    return (
        f"Judged with {report['runtime']}: {accuracy}. It wants"
        f" {format_size(total)} of memory at a context of {footprint['context_length']} tokens:"
        f" {format_size(mapped)} of it is the mapped file, which the system may drop and read"
        " again; the rest is anonymous."
    )


def stops(source: Source) -> list[str]:
    """The texts of the tokens that end an answer."""
    tokenizer = source.tokenizer
    return [tokenizer.library.id_to_token(token) for token in tokenizer.eos_ids]
