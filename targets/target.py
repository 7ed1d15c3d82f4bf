"""A device profile: what a bundle is made for and what it must not exceed, read from TOML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import BadInput, UsageError
from ..settings import (
    METRICS,
    Place,
    Reader,
    limit_of,
    read_table,
    read_toml,
    size,
    text,
    whole,
    wrong,
)
from ..settings import (
    names as list_of_names,
)


@dataclass(frozen=True, slots=True)
class Limit:
    """A bound and where it is stated; a bound of our own choice says so in `source`."""

    limit: float
    source: str


@dataclass(frozen=True, slots=True)
class Target:
    """A device profile.

    Attributes:
        name: as given to `--target`.
        title: for people.
        platform: "android" or "ios".
        containers: in order of preference.
        context_length: tokens that the KV cache is sized for.
        isa: the processor's features that a runtime repacks weights for.
        kv_cache: dtype of the KV cache.
        prompt_lengths: tokens of the prompts that latency is measured with.
        budgets: metric of settings.METRICS -> its limit.
        limits: key of targets.limits.LIMITS -> bytes that the platform or its store allows.
        hexagon: version of the NPU's processor, one of HEXAGONS; None: no container needs it.
        ios: the oldest iOS that the bundle is for, one of IOS; None: no container needs it.
    """

    name: str
    title: str
    platform: str
    containers: tuple[str, ...]
    context_length: int
    isa: tuple[str, ...]
    kv_cache: str
    prompt_lengths: tuple[int, ...]
    budgets: Mapping[str, Limit]
    limits: Mapping[str, Limit]
    hexagon: int | None = None
    ios: int | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, table: Mapping[str, Any]) -> Target:
        """What `to_json` wrote, as a manifest holds it.

        Raises:
            BadInput: a key is missing, unknown or malformed.
        """
        try:
            values: dict[str, Any] = {
                key: tuple(value) if isinstance(value, list) else value
                for key, value in table.items()
            }
            values |= {key: _limits_of(table[key]) for key in ("budgets", "limits")}
            return cls(**values)
        except (KeyError, TypeError, AttributeError) as error:
            raise BadInput(
                "the target profile in a manifest is malformed",
                f"{type(error).__name__} {error}",
                "export the bundle again",
            ) from error


def _limits_of(table: Mapping[str, Any]) -> dict[str, Limit]:
    return {key: Limit(**limit) for key, limit in table.items()}


_FOLDER = Path(__file__).parent


def names() -> tuple[str, ...]:
    """The profiles that ship with slimport."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.toml")))


def load_target(name: str) -> Target:
    """A profile by its name, or a user's own by the path of its TOML file.

    Raises:
        UsageError: no such profile, an unknown or missing key, a wrong value, a circle of extends.
    """
    path = _find(name, Path.cwd())
    table = _extended(path, ())
    required = {part for part in Target.__slots__ if part not in ("name", "hexagon", "ios")}
    if missing := sorted(required - table.keys()):
        raise UsageError(
            f"{path.name} has no {', '.join(missing)}",
            "a device profile needs every key",
            'add them, or start from a platform: extends = "android"',
        )
    return Target(name=path.stem, **table)


def _find(name: str, folder: Path) -> Path:
    """The file of a profile; the path of a user's own starts from `folder`."""
    own = name.endswith(".toml")
    path = folder / name if own else _FOLDER / f"{name}.toml"
    if (own and path.is_file()) or name in names():
        return path
    raise UsageError(
        f"no target {name!r}",
        f"the targets are {', '.join(names())}",
        "give one of them, or the path of your own TOML file",
    )


def _extended(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """The values of a profile over those of the profiles it extends; limits are merged by key."""
    if path in seen:
        raise UsageError(
            f"{path.name} extends itself",
            " > ".join(part.name for part in (*seen, path)),
            "remove one extends",
        )
    table = read_table(read_toml(path), _KEYS, Place(path.name, path.parent))
    if "extends" not in table:
        return table
    base = _extended(_find(table.pop("extends"), path.parent).resolve(), (*seen, path))
    for key in ("budgets", "limits"):
        table[key] = {**base.get(key, {}), **table.get(key, {})}
    return {**base, **table}


def _limit(read: Reader) -> Reader:
    def reader(value: Any, place: Place) -> Limit:
        found = read_table(value, {"limit": read, "source": text}, place)
        if len(found) < 2:
            raise wrong(
                place, value, "a table of limit and source: a bound without a source is none"
            )
        return Limit(**found)

    return reader


def _budgets(value: Any, place: Place) -> dict[str, Limit]:
    return read_table(value, {metric: _limit(limit_of(metric)) for metric in METRICS}, place)


def _limits(value: Any, place: Place) -> dict[str, Limit]:
    return read_table(value, dict.fromkeys(LIMITS, _limit(size)), place)


def _lengths(value: Any, place: Place) -> tuple[int, ...]:
    if not isinstance(value, list) or not value:
        raise wrong(place, value, "a list of token counts")
    return tuple(whole(part, place) for part in value)


def _isa(value: Any, place: Place) -> tuple[str, ...]:
    found = list_of_names(value, place)
    for feature in found:
        if feature not in ISA:  # it would change no prediction, and nobody would know
            raise wrong(place, feature, f"one of {', '.join(ISA)}")
    return found


def _kv_cache(value: Any, place: Place) -> str:
    if value not in KV_CACHES:
        raise wrong(place, value, f"one of {', '.join(KV_CACHES)}")
    return str(value)


def _hexagon(value: Any, place: Place) -> int:
    if value not in HEXAGONS or isinstance(value, bool):
        raise wrong(place, value, f"one of {', '.join(map(str, HEXAGONS))}")
    return int(value)


def _ios(value: Any, place: Place) -> int:
    if value not in IOS or isinstance(value, bool):
        raise wrong(place, value, f"one of {', '.join(map(str, IOS))}")
    return int(value)


IOS = (18, 26, 27)  # releases that brought operations of Core ML, states with the first; Core AI
HEXAGONS = (73, 75, 79, 81)  # an unknown one would silently become v68
ISA = ("arm64", "dotprod", "i8mm", "sve", "avx2", "avx512")
KV_CACHES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
LIMITS = ("store_module", "store_pack", "store_packs_total", "page")
_KEYS: dict[str, Reader] = {
    "extends": text,
    "title": text,
    "platform": text,
    "containers": list_of_names,
    "context_length": whole,
    "isa": _isa,
    "kv_cache": _kv_cache,
    "prompt_lengths": _lengths,
    "budgets": _budgets,
    "limits": _limits,
    "hexagon": _hexagon,
    "ios": _ios,
}
