"""Anonymous memory while a model is exported without validation, for one depth and twice the depth.

RssAnon is looked at every 20 ms, in a process of its own per model. Pages of mapped files are not
counted: the system may drop them at any time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from meter import anonymous, anonymous_peak, cache_folder

_INTERPRETER = anonymous()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[22, 44])
    parser.add_argument("--method", default="rtn")
    parser.add_argument("--preset", default="int4")
    parser.add_argument("--container", default="gguf")
    parser.add_argument("--folder", type=Path, default=cache_folder(), help="for large files")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        quantize = {
            "method": options.method,
            "preset": options.preset,
            "container": options.container,
        }
        print(json.dumps(measure(options.layers[0], quantize, options.folder)))
        return
    print("RssAnon in MB      peak above: imports   interpreter   |  peak   after imports")
    from random_llama import random_llama

    for layers in options.layers:
        random_llama(layers, options.folder)  # made here, where making it is not measured
        command = [sys.executable, *sys.argv, "--measure", "--layers", str(layers)]
        found = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        above, whole = found["peak"] - found["imports"], found["peak"] - found["interpreter"]
        print(
            f"{found['model']:20}{above / 1e6:20.0f}{whole / 1e6:14.0f}   |"
            f"{found['peak'] / 1e6:6.0f}{found['imports'] / 1e6:16.0f}",
            flush=True,
        )


def measure(layers: int, quantize: dict[str, str], folder: Path) -> dict[str, int | str]:
    """Bytes before and after the imports, and at the peak of one export."""
    from random_llama import random_llama

    from slimport.pipeline import export
    from slimport.recipe import Recipe

    model = random_llama(layers, folder)
    imports = anonymous()
    with tempfile.TemporaryDirectory(dir=folder) as output, anonymous_peak() as peak:
        settings = {"model": str(model), "targets": ["android"]}
        export(Recipe(output=Path(output)).override(**settings, **quantize), validate=False)
    return {
        "model": model.name,
        "interpreter": _INTERPRETER,
        "imports": imports,
        "peak": peak[0],
    }


if __name__ == "__main__":
    main()
