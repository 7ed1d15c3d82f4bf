"""What every container fills: refuse, predict, write, read back, for models and adapters.

Containers are modules (export.gguf, ...), checked against the protocol by the type checker; a
protocol and not a base class, because they share a shape and no code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from ..adapters.adapter import Adapter
from ..architectures import DecoderConfig, Kind
from ..errors import BadInput, Unsupported, ValidationFailed
from ..quantize.blocks import Quantized
from ..quantize.grid import Float32
from ..quantize.plan import Plan
from ..quantize.store import QuantizedCheckpoint
from ..quantize.windows import Windows
from ..tokenizer.tokenizer import Tokenizer

ANY_DIGEST = "0" * 64  # as long as one that is not known yet


@dataclass(frozen=True, slots=True)
class ReadBack:
    """What a finished file was found to hold.

    Attributes:
        weights_digest: of all quantized weights, `sha256:...`; equal for every container made from
            one checkpoint.
        digests: {source name: sha256 hex} of each quantized weight.
        float_errors: {source name: largest absolute difference} of the other weights, from
            rounding them to the container's float type.
    """

    weights_digest: str
    digests: Mapping[str, str]
    float_errors: Mapping[str, float]


class Separate(NamedTuple):
    """An adapter that stays beside its base, applied `scale` times."""

    adapter: Adapter
    scale: float


@dataclass(frozen=True, slots=True)
class Deployment:
    """What the files of a model are made for.

    Attributes:
        context: tokens of a text and its continuation that the device keeps.
        adapted: kinds of the matrices that separate adapters change at run time.
        adapters: these adapters, for a container that has them in the files of the model.
        hexagon: version of the Hexagon processor that a target names.
        ios: the oldest iOS that a target names.
        calibration: text that activations are observed on, for a container that is CALIBRATED.
    """

    context: int
    adapted: frozenset[Kind] = frozenset()
    adapters: tuple[Separate, ...] = ()
    hexagon: int | None = None
    ios: int | None = None
    calibration: Windows | None = None


@dataclass(frozen=True, slots=True)
class Base:
    """The model that a separate adapter is made for.

    Attributes:
        deployment: that of its files.
        weights_digest: of all its quantized weights; of the same length before they are known.
        digests: {source name: sha256 hex} of each weight.
    """

    config: DecoderConfig
    plan: Plan
    tokenizer: Tokenizer
    deployment: Deployment
    weights_digest: str
    digests: Mapping[str, str]

    @classmethod
    def of(cls, model: QuantizedCheckpoint, tokenizer: Tokenizer, deployment: Deployment) -> Base:
        """A model that is quantized."""
        digests = {name: record.digest for name, record in model.records.items()}
        given = (model.decoder, model.plan, tokenizer, deployment, model.weights_digest)
        return cls(*given, digests)

    @classmethod
    def planned(
        cls, config: DecoderConfig, plan: Plan, tokenizer: Tokenizer, deployment: Deployment
    ) -> Base:
        """A model that is not quantized yet."""
        digests = {choice.weight.name: ANY_DIGEST for choice in plan.choices}
        return cls(config, plan, tokenizer, deployment, f"sha256:{ANY_DIGEST}", digests)


class Minimum(NamedTuple):
    """The oldest release of a runtime that reads a file, and what it is needed for."""

    runtime: str
    build: str
    reason: str


class Container(Protocol):
    """A file format that holds the codes of a quantized checkpoint exactly."""

    @property
    def NAME(self) -> str:
        """As written on the command line and in manifests."""

    @property
    def FILE(self) -> str:
        """The file that a runtime is given; others may lie beside it."""

    @property
    def LIBRARIES(self) -> tuple[str, ...]:
        """Distributions that the bytes of the files depend on."""

    @property
    def CALIBRATED(self) -> bool:
        """Whether `write` observes activations on the calibration text."""

    @property
    def PROOF(self) -> tuple[str, ...]:
        """Files that a device does not need: for `read_back`, or to build its runtime."""

    @property
    def ESTIMATED(self) -> tuple[str, ...]:
        """Files whose size `predict` can only estimate: another compiler makes them."""

    def context_length(self, config: DecoderConfig) -> int:
        """The longest text that the runtime computes as transformers does."""

    def kv_cache(self, wanted: str) -> str:
        """The dtype of keys and values in the runtime, for a target that wants `wanted`."""

    def refuse(self, config: DecoderConfig, plan: Plan, tokenizer: Tokenizer) -> None:
        """Raise Unsupported if the container cannot hold this exactly; before any work starts."""

    def refuse_deployment(self, plan: Plan, deployment: Deployment) -> None:
        """Raise Unsupported if no files can be made for this; before any work starts."""

    def predict(
        self,
        config: DecoderConfig,
        plan: Plan,
        tokenizer: Tokenizer,
        name: str,
        deployment: Deployment,
    ) -> dict[str, int]:
        """{file name: bytes} of what `write` would write; `name` is the model's.

        To the byte, but for the files that are ESTIMATED.
        """

    def tensor_bytes(self, config: DecoderConfig, plan: Plan) -> dict[str, int]:
        """{source name: bytes} that each weight takes in the file, padding left out."""

    def write(
        self,
        model: QuantizedCheckpoint,
        tokenizer: Tokenizer,
        folder: Path,
        deployment: Deployment,
    ) -> list[Path]:
        """Write the files, tensor by tensor, fsynced; returns their paths."""

    def read_back(
        self, folder: Path, config: DecoderConfig, grids: Mapping[str, str]
    ) -> Iterator[tuple[str, Quantized | Float32]]:
        """Every tensor of the finished files, under its source name and in source row order.

        `grids` is {source name: grid name} of the quantized weights. Shares no code with the
        packer.
        """

    def check(self, model: QuantizedCheckpoint, folder: Path) -> ReadBack:
        """Compare every code, scale and value of the finished files with the checkpoint.

        Raises ValidationFailed naming the weight and its first differing element.
        """

    def refuse_adapter(self, adapter: Adapter) -> None:
        """Raise Unsupported if the adapter cannot stay separate from its base."""

    def predict_adapter(self, adapter: Adapter, base: Base) -> dict[str, int]:
        """{file name: bytes} of what `write_adapter` would write, to the byte."""

    def write_adapter(self, adapter: Adapter, base: Base, folder: Path, scale: float = 1.0) -> Path:
        """Write an adapter as a file of its own, fsynced and bound to its base.

        A runtime that applies the file with scale 1 applies `scale` times the adapter.
        """

    def check_adapter(self, path: Path, adapter: Adapter, base: Base, scale: float = 1.0) -> None:
        """Read an adapter's file back; raise ValidationFailed where it differs."""

    def refuse_foreign_adapter(self, path: Path, base: str) -> None:
        """Raise BadInput if an adapter's file is not for the base with this weights digest."""

    def minimum_runtime(
        self, config: DecoderConfig, plan: Plan, tokenizer: Tokenizer, separate: bool
    ) -> Minimum:
        """What the device needs; `separate`: whether adapters stay separate."""

    def notes(self, config: DecoderConfig, plan: Plan, tokenizer: Tokenizer) -> list[str]:
        """Sentences that whoever uses the files must know: what their runtime does not do."""

    def readme(self, fields: Mapping[str, str], adapters: list[str]) -> str:
        """The bundle's README.md: how to load it on the device, with code.

        `fields` are those of assembly.write_readme; `adapters` are paths within the bundle.
        """


def foreign_adapter(path: Path, why: str) -> BadInput:
    """What `refuse_foreign_adapter` raises."""
    return BadInput(
        f"{path.name} is not an adapter of this base", why, "export base and adapter together again"
    )


def not_the_adapter(path: Path, why: str) -> ValidationFailed:
    """What `check_adapter` raises."""
    return ValidationFailed(
        f"{path.name} does not hold the adapter that was given",
        why,
        "export again; if it stays, report it with the adapter_config.json",
    )


def refuse_all_but_layers(adapter: Adapter, container: str) -> None:
    """Raise Unsupported if an adapter is more than an addition to matrices of decoder layers."""
    why = adapter.why_not_separate
    tables = [name for name in adapter.deltas if ".layers." not in name]
    if why is None and tables:
        why = f"it changes {tables[0]}, and only the matrices of decoder layers take an update"
    if why:
        raise Unsupported(
            f"the adapter {adapter.name} cannot stay separate in {container}",
            why,
            "merge it: --adapter-mode merged",
        )


def normalization_notes(tokenizer: Tokenizer, runtime: str) -> list[str]:
    """What `notes` says of text that the source tokenizer normalizes and the runtime does not."""
    if not tokenizer.scheme.nfc:
        return []
    return [
        f"Text must be in Unicode's NFC: the model's tokenizer normalizes it and {runtime} does not"
        " (`java.text.Normalizer` does)."
    ]
