"""The folder of a package: a manifest, the model and its weights, the same bytes in every run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from uuid import NAMESPACE_OID, uuid5

from google.protobuf.message import DecodeError

from ...errors import BadInput
from ..file import write_aligned, write_bytes
from ..layout import ALIGNMENT
from .layout import Ios
from .program import BLOB_FILE, Function, program
from .proto import messages

PACKAGE = "Model.mlpackage"
_AUTHOR = "com.apple.CoreML"


def package_name(place: int) -> str:
    """Of the package that runs at a place, from 0 on."""
    return PACKAGE if place == 0 else PACKAGE.replace(".", f"_{place + 1}.")


def packages_in(folder: Path) -> list[str]:
    """Names of the packages in a folder, in the order in which they run."""
    found = [package_name(0)]
    while (folder / package_name(len(found))).is_dir():
        found.append(package_name(len(found)))
    return found


class Paths(NamedTuple):
    """The files of a package, within the folder that it lies in."""

    model: str
    manifest: str
    weights: str


def paths(package: str = PACKAGE) -> Paths:
    """Of a package of this name."""
    data = f"{package}/Data/{_AUTHOR}"
    return Paths(f"{data}/model.mlmodel", f"{package}/Manifest.json", f"{data}/{BLOB_FILE}")


def model_bytes(
    functions: Mapping[str, Function], release: Ios, properties: Mapping[str, str]
) -> bytes:
    """The model file: its description and its program.

    Args:
        functions: by name; one alone is the model, of several the first is the default.
        properties: what apps can read of the model, under names of its metadata.
    """
    model = messages("Model").Model(specificationVersion=release.specification)
    description = model.description
    if len(functions) == 1:
        (function,) = functions.values()
        function.describe(description)
    else:
        for name, function in functions.items():
            function.describe(description.functions.add(name=name))
        description.defaultFunctionName = next(iter(functions))
    for key in sorted(properties):
        description.metadata.userDefined[key] = properties[key]
    model.mlProgram.CopyFrom(program(functions))
    content: bytes = model.SerializeToString(deterministic=True)
    return content


def manifest_bytes() -> bytes:
    """Manifest.json; coremltools gives its items random names."""
    items = (("model.mlmodel", "Core ML Model Specification"), ("weights", "Core ML Model Weights"))
    entries = {_identifier(name): _item(name, about) for name, about in items}
    manifest = {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": entries,
        "rootModelIdentifier": _identifier("model.mlmodel"),
    }
    return (json.dumps(manifest, indent=4, sort_keys=True) + "\n").encode()


def write(
    folder: Path,
    model: bytes,
    start: bytes,
    tensors: Iterable[tuple[str, int, Any]],
    package: str = PACKAGE,
) -> list[Path]:
    """Write a package into `folder`, and fsync it; returns its files, the model first.

    Args:
        start, tensors: of the weight file, as write_aligned takes them.
    """
    place = paths(package)
    (folder / place.weights).parent.mkdir(parents=True)
    write_bytes(folder / place.manifest, manifest_bytes())
    write_bytes(folder / place.model, model)
    write_aligned(folder / place.weights, start, tensors, ALIGNMENT)
    return [folder / name for name in place]


def sizes(model: bytes, weights: int, package: str = PACKAGE) -> dict[str, int]:
    """{file: bytes} of what `write` writes, `weights` bytes of tensors among them."""
    place = paths(package)
    return {
        place.model: len(model),
        place.manifest: len(manifest_bytes()),
        place.weights: weights,
    }


def package_of(model: Path) -> Path:
    """The package of a model file."""
    return model.parents[2]


def bundle_of(model: Path) -> Path:
    """The folder that the package of a model file lies in."""
    return model.parents[3]


def properties_of(model: Path) -> dict[str, str]:
    """What `model_bytes` was given as properties.

    Raises:
        BadInput: it is no model file.
    """
    try:
        read = messages("Model").Model.FromString(model.read_bytes())
    except (OSError, DecodeError) as error:
        raise BadInput(
            f"{model.name} cannot be read", "it is not a message of Core ML", "export it again"
        ) from error
    return dict(read.description.metadata.userDefined)


def _item(name: str, about: str) -> dict[str, str]:
    return {
        "author": _AUTHOR,
        "description": about,
        "name": name,
        "path": f"{_AUTHOR}/{name}",
    }


def _identifier(name: str) -> str:
    return str(uuid5(NAMESPACE_OID, f"slimport/{name}")).upper()
