"""OpenVINO GenAI's own Stable Diffusion 3 pipeline, in C++, on the same weights.

    model = genai_model(Path("runs/random-75m"), Path("runs/random-75m-genai"), steps=4, threads=2)
    peer = model.peer(Workload("red apple", steps=4, batch=1, height=512, width=512))
    peer.picture()
    peer.steps_ms()     # what GenAI says that each call of its transformer took in that picture

The pipeline is put together from GenAI's parts, so that its transformer can be called alone too; all are compiled for
the workload's shapes, which is GenAI's fastest way. Guidance is off: one evaluation per step and picture.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers import Peer, Workload

SOURCE = "converted_from.json"
"""In a converted folder: how many steps it is for, and the files that it was made of."""


@dataclass(frozen=True)
class GenAIPeer(Peer):
    """A peer that also tells the parts of its last picture."""

    steps_ms: Callable[[], list[float]]


class GenAIModel:
    """A folder made by `genai_folder.convert`; `threads` 0 lets OpenVINO choose, `precision` is its hint."""

    def __init__(self, folder: Path, threads: int = 0, precision: str = "bf16") -> None:
        self.folder = folder
        self.name = f"openvino genai {precision}"
        self._properties: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": precision,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
        }
        if threads:
            self._properties["INFERENCE_NUM_THREADS"] = threads

    def peer(self, workload: Workload) -> GenAIPeer:
        """The pipeline compiled for one workload. GenAI has one schedule per folder: the one it was converted for."""
        import openvino
        import openvino_genai as genai  # type: ignore[import-untyped]

        made_for = json.loads((self.folder / SOURCE).read_text(encoding="utf-8"))["steps"]
        assert workload.steps == made_for, f"{self.folder} was converted for {made_for} steps"
        batch, height, width = workload.batch, workload.height, workload.width
        text = [
            genai.CLIPTextModelWithProjection(self.folder / name)
            for name in ("text_encoder", "text_encoder_2")
        ]
        transformer = genai.SD3Transformer2DModel(self.folder / "transformer")
        decoder = genai.AutoencoderKL(self.folder / "vae_decoder")
        config = json.loads((self.folder / "transformer" / "config.json").read_text(encoding="utf-8"))
        # The CLIPs' tokens, and as many zeros in the place of the T5's.
        length = 2 * text[0].get_config().max_position_embeddings
        for encoder in text:
            encoder.reshape(1)  # a prompt is encoded once and repeated
        transformer.reshape(batch, height, width, length)
        decoder.reshape(batch, height, width)
        for part in (*text, transformer, decoder):
            part.compile("CPU", **self._properties)
        scheduler = genai.Scheduler.from_config(self.folder / "scheduler" / "scheduler_config.json")
        pipeline = genai.Text2ImagePipeline.stable_diffusion_3(scheduler, *text, transformer, decoder)

        start = workload.noise(config["in_channels"], decoder.get_vae_scale_factor())
        rng = np.random.default_rng(workload.seed)
        for name, shape in (
            ("encoder_hidden_states", (batch, length, config["joint_attention_dim"])),
            ("pooled_projections", (batch, config["pooled_projection_dim"])),
        ):
            # Until a picture is made, whose prompt's stay: the pipeline holds the same request.
            transformer.set_hidden_states(name, openvino.Tensor(rng.standard_normal(shape, np.float32)))
        latents, time = openvino.Tensor(start), openvino.Tensor(np.ones(1, np.float32))

        class Noise(genai.Generator):  # type: ignore[misc]
            def randn_tensor(self, shape: Any) -> Any:
                assert tuple(shape) == start.shape, shape
                return openvino.Tensor(start)

        def step() -> None:
            transformer.infer(latents, time)

        def picture() -> NDArray[np.uint8]:
            image = pipeline.generate(
                workload.prompt,
                num_inference_steps=workload.steps,
                num_images_per_prompt=batch,
                height=height,
                width=width,
                guidance_scale=1.0,
                generator=Noise(),
            )
            return np.array(image.data)

        def steps_ms() -> list[float]:
            raw = pipeline.get_performance_metrics().raw_metrics
            return [micros / 1e3 for micros in raw.transformer_inference_durations]

        return GenAIPeer(self.name, step, picture, steps_ms)


def genai_model(
    folder: Path, converted: Path, steps: int, threads: int = 0, precision: str = "bf16"
) -> GenAIModel:
    """Convert the diffusers `folder` for `steps` steps, unless `converted` is just that, and take it."""
    from benchmarks.peers.genai_folder import convert, is_conversion

    if not is_conversion(folder, converted, steps):
        convert(folder, converted, steps)
    return GenAIModel(converted, threads, precision)
