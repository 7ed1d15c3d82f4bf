"""The texts of an export as token windows: given by the user, or sampled from the model itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..adapters.recovery import recovered
from ..errors import BadInput, UsageError
from ..quantize import imatrix
from ..quantize.imatrix import Imatrix
from ..quantize.windows import Windows, read_text, token_windows, windows_of
from ..recipe import Recipe
from ..recipe import Texts as GivenTexts
from ..tokenizer.tokenizer import Tokenizer
from ..validation.preference import Pairs
from ..validation.runtimes import reference
from ..validation.runtimes.reference import Oracle
from .pairs import read_pairs
from .source import Source

Progress = Callable[[str, int, int], None]
SAMPLED = "sampled from the full-precision model"
_SAMPLED_LENGTH = 256
_CALIBRATION_SEED, _EVAL_SEED = 1, 2
_LOGITS_LIMIT = 2_000_000_000  # bytes on disk for the logits of one text
_PROMPTS, _PROMPT_TOKENS = 3, 24


@dataclass(frozen=True, slots=True)
class Texts:
    """What an export is calibrated and judged on.

    Attributes:
        calibration: windows of text, or an importance matrix; None where nothing is calibrated.
        judged: "held_out" and, if there is one, "out_of_distribution"; none of a reward model.
        pairs: the same of a reward model.
        origins: what each is: a file's name, or SAMPLED.
        files: the files that were read, for their licences.
        prompts: {what the reader sees: ids} for golden tokens and samples.
    """

    calibration: Windows | Imatrix | None
    judged: Mapping[str, Windows]
    origins: Mapping[str, str]
    files: list[Path]
    prompts: Mapping[str, list[int]]
    pairs: Mapping[str, Pairs] = field(default_factory=dict)

    @property
    def digests(self) -> dict[str, str]:
        """Of what is judged on, by text."""
        texts: Mapping[str, Windows | Pairs] = {**self.judged, **self.pairs}
        return {name: found.digest for name, found in texts.items()}


def read_texts(
    recipe: Recipe,
    source: Source,
    *,
    calibrate: bool,
    validate: bool,
    progress: Progress,
    context: int | None = None,
) -> Texts:
    """Read or sample the text to calibrate on, the texts to judge on, or both.

    Args:
        context: tokens that every target keeps; those of the model by default.

    Raises:
        BadInput: a file is malformed or too short for one window.
        UsageError: a prompt is longer than the context, or a text is missing that a reward model
            cannot write.
    """
    refuse_missing(recipe, source, calibrate=calibrate, validate=validate)
    given = recipe.texts
    longest = source.decoder.context_length
    context = longest if context is None else context
    origins: dict[str, str] = {}
    calibration: Windows | Imatrix | None = None
    if calibrate and recipe.quantize.imatrix is not None:
        calibration = imatrix.read(recipe.quantize.imatrix, source.decoder)
        origins["calibration"] = recipe.quantize.imatrix.name
    elif calibrate:
        length = min(recipe.quantize.calibration_length, longest)
        count = recipe.quantize.calibration_windows
        origins["calibration"] = given.calibration.name if given.calibration else SAMPLED
        calibration = _read_or_sample(
            given.calibration, source, length, count, _CALIBRATION_SEED, progress
        )
    judged: dict[str, Windows] = {}
    pairs: dict[str, Pairs] = {}
    if validate and source.decoder.reward:
        for name, path in _pair_files(given).items():
            pairs[name], count = read_pairs(
                path, source.tokenizer, context, recipe.validate.pairs, source.decoder.vocab_size
            )
            origins[name] = f"{path.name}, {len(pairs[name].chosen)} of {count} pairs"
    elif validate:
        length = min(recipe.validate.window_length, context)
        fits = _LOGITS_LIMIT // (4 * length * source.decoder.vocab_size)
        count = max(2, min(recipe.validate.windows, fits))
        origins["held_out"] = given.eval.name if given.eval else SAMPLED
        judged["held_out"] = _read_or_sample(
            given.eval, source, length, count, _EVAL_SEED, progress
        )
        if given.eval_ood:
            origins["out_of_distribution"] = given.eval_ood.name
            judged["out_of_distribution"] = _read(given.eval_ood, source, length, count)
    files = [path for path in (given.calibration, given.eval, given.eval_ood) if path]
    prompts = _prompts(recipe, source, judged, context) if judged else {}
    return Texts(calibration, judged, origins, files, prompts, pairs)


def refuse_missing(recipe: Recipe, source: Source, *, calibrate: bool, validate: bool) -> None:
    """Raise UsageError if a text is not given that a reward model cannot write."""
    if not source.decoder.reward:
        return
    if calibrate and recipe.texts.calibration is None and recipe.quantize.imatrix is None:
        raise UsageError(
            "there is no text to calibrate on",
            "a reward model writes none of its own",
            "give one: --calibration FILE; or take --method rtn, which needs none",
        )
    if validate:
        _pair_files(recipe.texts)


def _pair_files(given: GivenTexts) -> dict[str, Path]:
    if given.eval is None:
        raise UsageError(
            "there is nothing to judge the reward model on",
            "it writes no text of its own: its scores are compared on pairs of answers",
            "give pairs as JSONL: --eval FILE, each line with `prompt`, `chosen` and `rejected`",
        )
    ood = {"out_of_distribution": given.eval_ood} if given.eval_ood else {}
    return {"held_out": given.eval, **ood}


def _read_or_sample(
    path: Path | None, source: Source, length: int, count: int, seed: int, progress: Progress
) -> Windows:
    if path is not None:
        return _read(path, source, length, count)
    ids = reference.sample(
        oracle(source),
        _start_of_text(source.tokenizer),
        min(count, 32),
        min(length, _SAMPLED_LENGTH),
        seed,
        progress=lambda done, total: progress("sampling text from the model", done, total),
    )
    return windows_of(ids)


def _start_of_text(tokenizer: Tokenizer) -> int:
    """What a text of the model itself begins with: BOS, or what ended the text before."""
    if tokenizer.bos_id is None and not tokenizer.eos_ids:
        raise BadInput(
            "no text can be sampled from the model",
            "its tokenizer names neither a BOS nor an EOS token to start from",
            "give texts: --calibration FILE and --eval FILE",
        )
    return tokenizer.eos_ids[0] if tokenizer.bos_id is None else tokenizer.bos_id


def _read(path: Path, source: Source, length: int, count: int) -> Windows:
    text = read_text(path, source.tokenizer.render_chat)
    return token_windows(
        text, source.tokenizer, length, count, vocab_size=source.decoder.vocab_size
    )


def _prompts(
    recipe: Recipe, source: Source, judged: Mapping[str, Windows], context: int
) -> dict[str, list[int]]:
    """The recipe's prompts as the model reads a chat; without any, the starts of windows."""
    tokenizer = source.tokenizer
    prompts: dict[str, list[int]] = {}
    for words in recipe.validate.prompts:
        rendered = tokenizer.render_chat([{"role": "user", "content": words}])
        if rendered is None:
            prompts[words] = tokenizer.encode(words, add_special=True)
        else:
            prompts[words] = tokenizer.encode(rendered)
    for words, ids in prompts.items():
        if len(ids) >= context:
            raise UsageError(
                f"a prompt under [validate] has {len(ids)} tokens: {words[:40]!r}...",
                f"the context of model and targets is {context} tokens",
                "give a shorter prompt",
            )
    if not prompts:
        for window in judged["held_out"].ids[:_PROMPTS]:
            ids = window[:_PROMPT_TOKENS].tolist()
            prompts[tokenizer.decode(ids)] = ids
    return prompts


def oracle(source: Source) -> Oracle:
    """The full-precision base with the first adapter, as transformers and peft run it.

    Without one that repairs the base's codes: the base itself is what that pair comes back to.
    """
    if not source.adapters or recovered(source.adapters[0][0].path):
        return Oracle(source.checkpoint.folder, reward=source.decoder.reward)
    entry, _ = source.adapters[0]
    return Oracle(source.checkpoint.folder, entry.path, entry.scale, reward=source.decoder.reward)
