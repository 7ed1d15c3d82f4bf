"""What a quantization leaves behind that is killed, and how the same one goes on from there.

Beside the finished shards `unfinished.json` names them in order, each with its sha256 and what is
known of its weights, and the run that made them: weights, plan, text, versions and processor. It is
replaced as a whole after every shard from the first decoder layer on. Nothing is flushed to the
disk: a killed process loses nothing that it wrote, and what a power failure takes is missed by its
digest.

What lies between two layers is not kept, it would be gigabytes after every layer. It is computed
again from the shards: two passes of the text through each finished layer, a part of what its
statistics and its codes cost.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..architectures import DecoderConfig
from ..bundle import UNFINISHED, canonical_json, sha256
from .plan import Plan
from .store import Origin, QuantizedCheckpoint, Record, Shard, shard_name, shards, writing
from .versions import made_with

SCHEMA = "slimport.unfinished/1"

Records = dict[str, Record]


def run_of(
    plan: Plan, config: Mapping[str, Any], calibration: str | None, origin: Origin
) -> dict[str, Any]:
    """What makes a run: two of equal value write equal bytes."""
    inputs = {"base": origin.base, "adapters": {**origin.adapters}, "scales": {**origin.scales}}
    given = {"plan": plan.to_json(), "config": {**config}, "calibration": calibration}
    return given | inputs | {"made_with": made_with()}


class Journal:
    """The finished shards of a checkpoint that is being made.

    Attributes:
        finished: what is known of the weights, by shard, from the first on without a gap.
        told: {layer: what was measured of it} of these, where something was.
    """

    def __init__(self, folder: Path, plan: Plan, run: Callable[[], Mapping[str, Any]]) -> None:
        """Take up what lies in `folder`, if it is of this run and undamaged; remove the rest.

        Args:
            run: as `run_of`; called when it is needed, because it hashes the base.
        """
        self._folder, self._shards, self._run = folder, shards(plan), run
        self._entries = self._found()
        self.finished = [
            {c.weight.name: Record(**entry["records"][c.weight.name]) for c in shard}
            for shard, entry in zip(self.done, self._entries, strict=True)
        ]
        self.told = {key: each for entry in self._entries for key, each in entry["told"].items()}
        kept = {self._name(index) for index in range(len(self._entries))}
        with writing(folder):
            for path in folder.iterdir():
                if path.name not in kept | {UNFINISHED}:
                    path.unlink()

    @property
    def weights(self) -> int:
        """Numbers in the finished shards."""
        choices = [choice for shard in self.done for choice in shard]
        return sum(math.prod(choice.weight.shape) for choice in choices)

    @property
    def done(self) -> tuple[Shard, ...]:
        """The finished shards."""
        return self._shards[: len(self._entries)]

    def add(self, records: Records, told: Mapping[str, Any]) -> None:
        """The next shard is written, and these are its weights; `told` is of all layers so far."""
        index = len(self._entries)
        layer = str(self._shards[index][0].weight.layer)
        self._entries.append(
            {
                "sha256": sha256(self._folder / self._name(index)),
                "records": {name: asdict(record) for name, record in records.items()},
                "told": {layer: told[layer]} if layer in told else {},
            }
        )
        if index or self._shards[0][0].weight.layer is not None:
            self._write()

    def open(self, config: DecoderConfig, plan: Plan) -> QuantizedCheckpoint:
        """The finished shards, to be read."""
        records = {name: record for part in self.finished for name, record in part.items()}
        files = {
            choice.weight.name: self._folder / self._name(index)
            for index, shard in enumerate(self.done)
            for choice in shard
        }
        return QuantizedCheckpoint(self._folder, {}, config, plan, Origin(), None, records, files)

    def _write(self) -> None:
        content = {"schema": SCHEMA, "run": self._told(), "shards": self._entries}
        content["digest"] = _digest(content)
        partial = self._folder / f"{UNFINISHED}.partial"
        with writing(self._folder):
            partial.write_bytes(canonical_json(content))
            partial.replace(self._folder / UNFINISHED)

    def _told(self) -> str:
        return hashlib.sha256(canonical_json(self._run())).hexdigest()

    def _found(self) -> list[dict[str, Any]]:
        """Entries of the shards that are whole, up to the first that is not."""
        content = self._read()
        if not content or content["run"] != self._told():
            with writing(self._folder):
                (self._folder / UNFINISHED).unlink(missing_ok=True)
            return []
        entries: Sequence[dict[str, Any]] = content["shards"]
        for index, entry in enumerate(entries):
            path = self._folder / self._name(index)
            if not path.is_file() or sha256(path) != entry["sha256"]:
                return [*entries[:index]]
        return [*entries]

    def _read(self) -> dict[str, Any]:
        """What `_write` wrote; empty if it is not there or not the same any more."""
        with suppress(OSError, ValueError, RecursionError):
            content = json.loads((self._folder / UNFINISHED).read_bytes())
            if isinstance(content, dict) and content.get("schema") == SCHEMA:
                return content if content.get("digest") == _digest(content) else {}
        return {}

    def _name(self, index: int) -> str:
        return shard_name(index, len(self._shards))


def _digest(content: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in content.items() if key != "digest"}
    return hashlib.sha256(canonical_json(rest)).hexdigest()
