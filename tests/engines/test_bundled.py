"""The model that ships: bfloat16 draws its pictures, not others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import cdm_serve
from engines.base import EngineOptions, load_engine
from engines.bundle import load_bundle
from tests.engines.pictures import Job, draw

PROMPTS = ("red apple", "grinning face", "woman astronaut medium dark skin tone", "flag of japan", "cat")


@pytest.mark.parametrize(("runtime", "precision"), [("openvino", "bf16"), ("openvino", "f32")])
def test_bundled_model_draws_the_same_in_every_precision(runtime: str, precision: str) -> None:
    bundle = load_bundle(Path(cdm_serve.__file__).parent / "bundles" / "emoji")
    size = tuple(side // bundle.manifest.latent.downscale for side in (128, 128))
    jobs = [Job(prompt, seed, 4, size=size) for seed, prompt in enumerate(PROMPTS)]  # type: ignore[arg-type]
    reference, other = (
        load_engine(bundle, EngineOptions(name, precision, threads=1))
        for name, precision in (("onnxruntime", "f32"), (runtime, precision))
    )
    theirs = np.stack(draw(reference, jobs)).astype(int)
    for mine in (draw(other, jobs), [draw(other, [job])[0] for job in jobs]):
        assert theirs.std() > 40
        # Edges may move by a shade; on average a colour value is off by a third of a level.
        assert np.abs(np.stack(mine) - theirs).mean() < 1.0
