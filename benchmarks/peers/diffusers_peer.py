"""diffusers' own `StableDiffusion3Pipeline`, untouched: eager in any precision, or its transformer by torch.compile.

    model = DiffusersModel(folder, torch.bfloat16, threads=2)
    eager, compiled = model.peer(workload), model.peer(workload, compiled=True)   # of one copy of the weights

The pipeline is called with `max_sequence_length` of the CLIPs' own length, which makes it the model that the engines
run where a folder has no T5: see `engines/families/sd3.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from numpy.typing import NDArray
from torch import nn

from benchmarks.peers import Peer, Workload
from engines.families.loading import load_pipeline
from engines.families.sd3 import CLASSES, OPTIONAL, T5_LENGTH


class DiffusersModel:
    """One folder in one precision; `threads` (0: as it is) are the process's, for every torch model in it.

    Raises:
        FamilyError: diffusers cannot load the folder.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, threads: int = 0) -> None:
        if threads:
            torch.set_num_threads(threads)
        self.name = f"diffusers {str(dtype).removeprefix('torch.')}"
        self.pipeline: Any = load_pipeline(StableDiffusion3Pipeline, folder, dtype, None, CLASSES, OPTIONAL)
        self.pipeline.set_progress_bar_config(disable=True)

    def peer(self, workload: Workload, compiled: bool = False) -> Peer:
        """The pipeline on one workload. A compiled one is compiled by its first call, for exactly these shapes."""
        pipeline, name = self.pipeline, self.name
        request = self._request(workload)
        inputs = self._inputs(request)
        if compiled:
            pipeline = StableDiffusion3Pipeline(**pipeline.components)
            pipeline.set_progress_bar_config(disable=True)
            pipeline.transformer = torch.compile(pipeline.transformer, dynamic=False, fullgraph=True)
            name = name.replace("diffusers", "torch.compile")

        @torch.no_grad()
        def step() -> None:
            pipeline.transformer(**inputs)

        def picture() -> NDArray[np.uint8]:
            return np.stack([np.asarray(image) for image in pipeline(**request).images])

        return Peer(name, step, picture)

    def _request(self, workload: Workload) -> dict[str, Any]:
        pipeline = self.pipeline
        start = workload.noise(pipeline.transformer.config.in_channels, pipeline.vae_scale_factor)
        has_t5 = pipeline.text_encoder_3 is not None
        return {
            "prompt": workload.prompt,
            "num_images_per_prompt": workload.batch,
            "latents": torch.from_numpy(start).to(pipeline.transformer.dtype),
            "num_inference_steps": workload.steps,
            "sigmas": workload.sigmas(),
            "guidance_scale": 1.0,
            "height": workload.height,
            "width": workload.width,
            "max_sequence_length": T5_LENGTH if has_t5 else pipeline.tokenizer_max_length,
        }

    def _inputs(self, request: dict[str, Any]) -> dict[str, Any]:
        """What the pipeline itself gives its transformer at the first step."""
        calls: list[dict[str, Any]] = []

        def keep(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            del module
            assert not arguments
            calls.append(keywords)

        hook = self.pipeline.transformer.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            self.pipeline(**{**request, "num_inference_steps": 1, "sigmas": [1.0], "output_type": "latent"})
        finally:
            hook.remove()
        return calls[0]
