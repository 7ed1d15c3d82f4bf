"""The commands: each reads as the story of one verb; nothing heavy is imported at the top."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click

from .errors import EnvironmentFailed, SlimportError, UsageError
from .recipe import Recipe, from_environment, load, parse_adapter, template
from .settings import format_size
from .terminal import console
from .terminal.options import (
    fit_options,
    output_options,
    quantize_options,
    source_options,
    text_options,
    training_options,
)


def _recipe(model: str | None, config: str | None, **flags: Any) -> Recipe:
    """Flags over environment over slimport.toml."""
    path = Path(config or "slimport.toml")
    if config or path.exists():
        recipe = load(path)
    elif model is None:
        raise UsageError(
            "no model to work on",
            "there is no slimport.toml here, and no MODEL was given",
            "run `slimport init` to write one, or give a folder or hub id",
        )
    else:
        recipe = Recipe()
    recipe = recipe.override(**from_environment(os.environ))
    adapters: dict[str, Any] = {}
    for words in flags.pop("adapter", ()):
        adapters |= parse_adapter(words)
    patterns = dict(_pattern(words) for words in flags.pop("grid", ()))
    given = {key: value for key, value in flags.items() if value not in (None, ())}
    if "eval_text" in given:
        given["eval"] = given.pop("eval_text")
    if "gguf_type" in given:
        given |= _gguf_type(given.pop("gguf_type"), given)
    return recipe.override(
        model=model, adapters=adapters or None, patterns=patterns or None, **given
    )


def _pattern(words: str) -> tuple[str, str]:
    pattern, equals, grid = words.rpartition("=")
    if not (pattern and equals and grid):
        raise UsageError(f"--grid {words}", "it needs a pattern and a grid", "write PATTERN=GRID")
    return pattern, grid


def _gguf_type(name: str, flags: Mapping[str, Any]) -> dict[str, str]:
    """What `--gguf-type` stands for: a preset, in the container that can hold it."""
    from .quantize.mixes import MIXES

    if "preset" in flags:
        raise UsageError(
            f"--gguf-type {name} and --preset {flags['preset']} are given together",
            "both say which grids the weights get",
            "give one of them",
        )
    if name.upper() not in MIXES:
        raise UsageError(
            f"--gguf-type {name} is not known",
            f"llama.cpp's types are {', '.join(MIXES)}",
            "choose one of them, or one of slimport's own with --preset",
        )
    return {"preset": name.upper(), "container": flags.get("container", "gguf")}


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False))


class _Group(click.Group):
    """Commands in the order in which a newcomer meets them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="slimport")
def cli() -> None:
    """Quantize a language model once, ship those very codes to every phone.

    \b
    slimport init                       # write a commented slimport.toml
    slimport export --target android    # a verified device bundle in dist/android
    slimport check dist/android         # its budgets: exit code 3 when one is broken
    """


@cli.command()
@click.option("--output", default="slimport.toml", type=click.Path(), show_default=True)
@click.option("--model", help="A folder or hub id to fill in.")
@output_options
def init(output: str, model: str | None, as_json: bool, quiet: bool, debug: bool) -> None:
    """Write a commented slimport.toml."""
    words = template()
    if model:
        words = words.replace('"Qwen/Qwen2.5-0.5B-Instruct"', json.dumps(model), 1)
    try:
        with Path(output).open("x", encoding="utf-8") as file:
            file.write(words)
    except FileExistsError:
        raise UsageError(
            f"{output} exists", "init never overwrites", "edit it, or give another --output"
        ) from None
    except OSError as error:
        raise EnvironmentFailed(
            f"{output} cannot be written", str(error.strerror), "give another --output"
        ) from error
    if as_json:
        _print_json({"schema": "slimport.init/1", "written": output})
    else:
        print(f"wrote {output}: set its model, then run `slimport export`")


@cli.command()
@source_options
@click.option("--target", multiple=True, help="A device profile, or its TOML file; repeats.")
@click.option("--container", help="In place of the target's first choice.")
@quantize_options
@fit_options
@text_options
@click.option("-o", "--output", type=click.Path(), help="Receives one bundle per target.")
@click.option(
    "--quantized", type=click.Path(), help="Start from this quantized checkpoint of MODEL."
)
@click.option("--no-validate", is_flag=True, help="Skip validation; the manifest says so.")
@click.option("--dry-run", is_flag=True, help="Plan, sizes and refusals; writes nothing.")
@output_options
def export(
    no_validate: bool,
    dry_run: bool,
    offline: bool,
    quantized: str | None,
    as_json: bool,
    quiet: bool,
    debug: bool,
    target: tuple[str, ...],
    **flags: Any,
) -> None:
    """Quantize MODEL, pack it, judge it, and write a bundle per target.

    MODEL is a folder or a hub id; without it everything comes from slimport.toml.

    \b
    slimport export
    slimport export ./model --adapter support=./lora --target android -o dist
    slimport export ./model --method rtn --target galaxy-s24 --dry-run
    slimport export ./model --fit 900MB           # the grids of the least loss in 900 MB
    slimport export ./model --max-kl 0.02         # the smallest bundle that loses no more
    """
    from . import pipeline
    from .shipping import forecast
    from .terminal import fitted, views

    names = {"preset": "preset", "gguf_type": "preset", "method": "method", "grid": "patterns"}
    stated = {key for flag, key in names.items() if flags.get(flag)}
    recipe = _recipe(**flags, targets=target)
    if dry_run:
        with console.progress(quiet) as progress:
            predicted = forecast.forecast(
                recipe, offline=offline, validate=not no_validate, progress=progress
            )
        if predicted.fit is not None and not as_json:
            fitted.fit(predicted.fit)
        _print_json(predicted.to_json()) if as_json else views.forecast(predicted)
        return
    with console.progress(quiet) as progress:
        bundles = pipeline.export(
            recipe,
            offline=offline,
            quantized=Path(quantized) if quantized else None,
            stated=stated,
            validate=not no_validate,
            progress=progress,
            fitted=(lambda found: None) if as_json else fitted.fit,
        )
    if as_json:
        shown = [{"path": str(folder), **pipeline.report_of(folder)} for folder in bundles]
        _print_json({"schema": "slimport.export/1", "bundles": shown})
    else:
        for bundle in bundles:
            views.bundle(bundle)


@cli.command()
@click.argument("config", type=click.Path())
@click.option("--target", multiple=True, default=["android"], show_default=True)
@click.option("--context", type=click.IntRange(min=1), help="Tokens, in place of the target's.")
@output_options
def plan(
    config: str,
    target: tuple[str, ...],
    context: int | None,
    as_json: bool,
    quiet: bool,
    debug: bool,
) -> None:
    """Which grids and contexts fit a device, from CONFIG, a config.json or its folder, alone.

    \b
    slimport plan ./config.json --target galaxy-s24
    """
    from .shipping import planning
    from .terminal import fitted

    found = planning.plan(Path(config), target, context)
    _print_json(found) if as_json else fitted.plan(found)


@cli.command()
@source_options
@quantize_options
@click.option("-o", "--output", required=True, type=click.Path(), help="The new folder.")
@click.option(
    "--format",
    type=click.Choice(["gptq", "bitsandbytes", "bitsandbytes-double"]),
    help="A checkpoint for transformers in place of slimport's own; tables stay float16.",
)
@output_options
def quantize(
    offline: bool,
    output: str,
    format: str | None,
    as_json: bool,
    quiet: bool,
    debug: bool,
    **flags: Any,
) -> None:
    """Write the quantized checkpoint of MODEL: codes and scales, from which exports can start."""
    from . import pipeline

    recipe = _recipe(**flags)
    with console.progress(quiet) as progress:
        quantized = pipeline.quantize(
            recipe, Path(output), format=format, offline=offline, progress=progress
        )
    if as_json:
        _print_json(quantized)
    else:
        print(f"{output}  {quantized['weights_digest']}")


@cli.command()
@source_options
@quantize_options
@training_options
@click.option("-o", "--output", required=True, type=click.Path(), help="The new folder.")
@click.option("--restart", is_flag=True, help="Begin anew where a run was stopped.")
@output_options
def qat(
    offline: bool,
    output: str,
    restart: bool,
    as_json: bool,
    quiet: bool,
    debug: bool,
    **flags: Any,
) -> None:
    """Train MODEL on the grid that ships, and write its quantized checkpoint for exports.

    Codes and scales are learned from the full-precision model's own logits. A run that was stopped
    goes on with the same command.

    
    slimport qat ./model --preset int2 --train train.txt -o model-int2
    slimport export ./model --quantized model-int2 --target android
    """
    from . import pipeline

    recipe = _recipe(**flags)
    quiet = quiet or os.environ.get("RANK", "0") != "0"  # of torchrun's processes the first speaks
    with console.progress(quiet) as progress:
        trained = pipeline.qat(
            recipe,
            Path(output),
            offline=offline,
            restart=restart,
            progress=progress,
            say=console.said(quiet),
        )
    if trained is None:
        return
    if as_json:
        _print_json(trained)
    else:
        best = trained["training"]["best"]
        print(f"{output}  {trained['weights_digest']}")
        print(f"held-out KL {best['kl']:.4f} at step {best['step']}")


@cli.command()
@source_options
@click.option("--calibration", type=click.Path(), help="Text; without it the model writes its own.")
@click.option("-o", "--output", required=True, type=click.Path(), help="The new file.")
@output_options
def imatrix(
    offline: bool, output: str, as_json: bool, quiet: bool, debug: bool, **flags: Any
) -> None:
    """Write the importance matrix of MODEL, in the format that llama.cpp's tools read."""
    from . import pipeline

    recipe = _recipe(**flags)
    with console.progress(quiet) as progress:
        found = pipeline.measure_importance(
            recipe, Path(output), offline=offline, progress=progress
        )
    if as_json:
        _print_json(found)
    else:
        print(f"{output}  {found['weights']} weights on {found['tokens']:,} tokens")


@cli.command()
@source_options
@quantize_options
@output_options
def inspect(offline: bool, as_json: bool, quiet: bool, debug: bool, **flags: Any) -> None:
    """Show what MODEL, its tokenizer and its adapters are, and what the plan makes of them.

    MODEL may also be a bundle or a .gguf file.
    """
    from . import inspection
    from .terminal import views

    found = inspection.inspect(_recipe(**flags), offline=offline)
    _print_json(found) if as_json else views.inspection(found)


@cli.command()
@click.argument("bundle", type=click.Path())
@source_options
@text_options
@output_options
def validate(
    bundle: str, offline: bool, as_json: bool, quiet: bool, debug: bool, **flags: Any
) -> int:
    """Judge BUNDLE again, against the full-precision MODEL and adapter that it was made from."""
    from . import pipeline
    from .terminal import views

    recipe = _recipe(**flags)
    with console.progress(quiet) as progress:
        judged = pipeline.validate(Path(bundle), recipe, offline=offline, progress=progress)
    _print_json(judged) if as_json else views.report(judged)
    return 0 if judged["passed"] else pipeline.failing_code(judged)


@cli.command()
@click.argument("bundle", type=click.Path())
@click.option("--target", help="Budgets of this device profile, not those of the export.")
@output_options
def check(bundle: str, target: str | None, as_json: bool, quiet: bool, debug: bool) -> int:
    """Compare what was measured of BUNDLE with its budgets; exit code 3 when one is broken."""
    from . import pipeline
    from .terminal import views

    budgets = pipeline.check(Path(bundle), target)
    rows = [budget.to_json() for budget in budgets]
    if as_json:
        _print_json({"schema": "slimport.check/1", "budgets": rows})
    else:
        views.budgets(rows)
    return 0 if all(budget.ok for budget in budgets) else 3


@cli.command()
@click.argument("first", type=click.Path())
@click.argument("second", type=click.Path())
@click.option("--eval", "text", type=click.Path(), help="Text to run both on, for KL and top-1.")
@output_options
def compare(
    first: str, second: str, text: str | None, as_json: bool, quiet: bool, debug: bool
) -> None:
    """Show what differs between two bundles or .gguf files: sizes, tensors, KL.

    With --eval both run in llama.cpp, and KL(FIRST || SECOND) is over the tokens of that text.

    \b
    slimport compare dist/android other/android
    slimport compare model-f16.gguf model-Q4_K_M.gguf --eval held_out.txt
    """
    from .terminal import views
    from .validation import comparison

    with console.progress(quiet) as progress:
        found = comparison.compare(
            Path(first), Path(second), Path(text) if text else None, progress
        )
    _print_json(found) if as_json else views.comparison(found)


@cli.command()
@click.argument("bundle", type=click.Path())
@output_options
def verify(bundle: str, as_json: bool, quiet: bool, debug: bool) -> None:
    """Check every file of BUNDLE against its manifest, and the codes in it against their digest."""
    from . import pipeline

    verified = pipeline.verify(Path(bundle))
    if as_json:
        _print_json(verified)
    else:
        files = f"{verified['files']} files, {format_size(verified['bytes'])}"
        print(f"{bundle} is intact: {files}, {verified['weights_digest']}")


@cli.command()
@output_options
def targets(as_json: bool, quiet: bool, debug: bool) -> None:
    """List the device profiles."""
    from .targets.target import load_target, names
    from .terminal import views

    profiles = [load_target(name) for name in names()]
    if as_json:
        listed = [profile.to_json() for profile in profiles]
        _print_json({"schema": "slimport.targets/1", "targets": listed})
    else:
        views.targets(profiles)


@cli.command()
@output_options
def doctor(as_json: bool, quiet: bool, debug: bool) -> int:
    """Say what is installed, which containers work, and the command that cures the rest."""
    from . import inspection
    from .terminal import views

    checks = inspection.doctor()
    rows = [row.to_json() for row in checks]
    if as_json:
        _print_json({"schema": "slimport.doctor/1", "checks": rows})
    else:
        views.doctor(rows)
    return 0 if all(row.ok for row in checks) else 6


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code and prints errors as three lines on stderr."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    signal.signal(signal.SIGTERM, _terminated)
    try:
        code = _call(words)
        sys.stdout.flush()  # a pipe that is closed is known here at the latest
        return code
    except SlimportError as error:
        if "--debug" in words:
            traceback.print_exc()
        console.show_error(error)
        return error.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message(), file=sys.stderr)
        return 2
    except click.ClickException as error:
        context = getattr(error, "ctx", None) or click.Context(cli, info_name="slimport")
        cure = f"run `{context.command_path} --help`"
        console.show_error(UsageError(error.format_message(), context.get_usage(), cure))
        return 2
    except (KeyboardInterrupt, click.exceptions.Abort):
        return 130
    except BrokenPipeError:
        # The reader of our stdout is gone; keep the interpreter from flushing into it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if "--debug" in words:
            traceback.print_exc()
        if isinstance(error, MemoryError) or getattr(error, "errno", None) in _REFUSALS:
            console.show_error(_refused(error))
            return EnvironmentFailed.exit_code
        why, cure = f"{type(error).__name__}: {error}", f"report it with {_keep_log(words)}"
        console.show_error(SlimportError("internal error", why, cure))
        return 1


# What a system refuses wherever it is asked; any other OSError is a mistake of ours.
_REFUSALS = frozenset(
    getattr(errno, name)
    for name in "EACCES EPERM EROFS ENOSPC EDQUOT EIO EMFILE ENFILE ENOMEM ENAMETOOLONG".split()
)


def _refused(error: Exception) -> EnvironmentFailed:
    if isinstance(error, OSError):
        where = "a temporary file" if error.filename is None else f"{error.filename!s:.120}"
        return EnvironmentFailed(
            f"{where} cannot be read or written",
            error.strerror or str(error),
            "free disk space or memory, mend the permissions, or give another path",
        )
    return EnvironmentFailed(
        "memory ran out",
        str(error) or "the system has no more",
        "free memory, or use a larger machine",
    )


def _keep_log(words: list[str]) -> str:
    """Write the traceback of an internal error to a file; returns its path."""
    import tempfile
    from importlib.metadata import version

    described, path = tempfile.mkstemp(prefix="slimport-", suffix=".log")
    with os.fdopen(described, "w", encoding="utf-8") as log:
        print(f"slimport {version('slimport')}, {sys.version}, {sys.platform}", file=log)
        print("arguments:", *words, file=log)
        traceback.print_exc(file=log)
    return path


def _call(words: list[str]) -> int:
    """Parse and run; click's own `main` would turn a closed pipe into exit code 1."""
    try:
        with cli.make_context("slimport", words) as context:
            result = cli.invoke(context)
    except click.exceptions.Exit as done:  # --help, --version
        return done.exit_code
    return result if isinstance(result, int) else 0


def _terminated(signum: int, frame: FrameType | None) -> NoReturn:
    """SIGTERM unwinds like Ctrl-C, so that nothing half-written stays."""
    sys.exit(143)
