"""A fresh process that loads a bundle and makes two pictures: `python -m benchmarks.first_load BUNDLE OPTIONS`.

OPTIONS are JSON: the fields of `EngineOptions`. The last line of its output is what everything took, as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from itertools import pairwise
from pathlib import Path

from engines.base import EngineOptions, load_engine, runtime_class
from engines.bundle import load_bundle
from engines.errors import EngineError
from engines.noise import noise


def main() -> int:
    """0, or 1 with one sentence on stderr."""
    root, text = Path(sys.argv[1]), sys.argv[2]
    fields = json.loads(text)
    if fields.get("cache_dir"):
        fields["cache_dir"] = Path(fields["cache_dir"])
    options = EngineOptions(**fields)
    marks = [time.perf_counter()]
    try:
        runtime_class(options.runtime)
        marks.append(time.perf_counter())
        bundle = load_bundle(root)
        marks.append(time.perf_counter())
        engine = load_engine(bundle, options)
        marks.append(time.perf_counter())
        latent, size = bundle.manifest.latent, bundle.manifest.default_size
        start = noise(0, (latent.channels, size.height // latent.downscale, size.width // latent.downscale))
        for _ in range(2):
            conditioning, x = engine.encode([engine.tokenize("red apple")]), [engine.put(start)]
            for sigma, sigma_next in pairwise(bundle.manifest.sigmas(bundle.manifest.default_steps)):
                x, _ = engine.denoise(x, [sigma], [sigma_next], conditioning)
            engine.decode(x)
            marks.append(time.perf_counter())
    except EngineError as error:
        print(error, file=sys.stderr)
        return 1
    names = ("import_s", "check_s", "load_s", "first_picture_s", "second_picture_s")
    times = {name: after - before for name, (before, after) in zip(names, pairwise(marks), strict=True)}
    print(json.dumps({**times, "runtime": engine.info.runtime, "precision": engine.info.precision}))
    engine.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
