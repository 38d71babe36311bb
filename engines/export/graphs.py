"""The components of a bundle as torch modules, built from any family. Shapes as in `engines/families/base.py`.

- `TextEncoderGraph`: token ids → that encoder's outputs
- `DenoiserGraph`:    (x, σ, σ′, all encoders' outputs) → (x′, x̂0), the transformer and the Euler update in one graph
- `DecoderGraph`:     scaled latents → uint8 pictures `(B, height, width, 3)`
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers.models.embeddings import PatchEmbed
from torch import Tensor

from engines.export.onnx_file import GraphModule
from engines.families.base import Family, TextEncoder

Axes = dict[str, dict[int, str]]


class TextEncoderGraph(GraphModule):
    """Ids `(B, L)` int64 → the encoder's outputs in float32; those of three dimensions have a row per token."""

    def __init__(self, encoder: TextEncoder, states: tuple[str, ...]) -> None:
        """`states`: which outputs are `(B, L, D)`."""
        super().__init__()
        self.weights = encoder.module
        self.inputs = (encoder.input,)
        self.outputs = encoder.outputs
        self.axes: Axes = {encoder.input: {0: "batch", 1: f"{encoder.component}_length"}}
        self.axes |= text_axes(encoder.component, encoder.outputs, states)

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        return tuple(output.to(torch.float32) for output in self.weights(ids))


def text_axes(component: str, outputs: tuple[str, ...], states: tuple[str, ...]) -> Axes:
    """The varying dimensions of a text encoder's outputs."""
    return {
        name: {0: "batch", 1: f"{component}_states"} if name in states else {0: "batch"} for name in outputs
    }


class DenoiserGraph(GraphModule):
    """One step for a batch whose rows may sit at different σ of different schedules: `σ`, `σ′` are `(B,)`.

    σ, the Euler update and all that the family keeps in float32 are float32 whatever the transformer's precision.
    """

    def __init__(self, family: Family, conditioning: Axes) -> None:
        """`conditioning`: the text encoders' outputs in order, and what varies in them."""
        super().__init__()
        self.weights = family.transformer
        self._family = family
        latent = {0: "batch", 2: "height", 3: "width"}
        self.inputs = ("x", "sigma", "sigma_next", *conditioning)
        self.outputs = ("x_next", "x0")
        self.axes: Axes = dict.fromkeys(("x", "x_next", "x0"), latent)
        self.axes |= {"sigma": {0: "batch"}, "sigma_next": {0: "batch"}, **conditioning}

    def forward(
        self, x: Tensor, sigma: Tensor, sigma_next: Tensor, *conditioning: Tensor
    ) -> tuple[Tensor, Tensor]:
        named = self._family.join(dict(zip(self.inputs[3:], conditioning, strict=True)))
        velocity = self._family.velocity(self.weights, x, sigma, named)
        sigma_B111, next_B111 = sigma[:, None, None, None], sigma_next[:, None, None, None]
        # Euler step and prediction of the rectified flow x_σ = (1−σ)·x0 + σ·ε, v = ε − x0.
        return x + (next_B111 - sigma_B111) * velocity, x - sigma_B111 * velocity


class DecoderGraph(GraphModule):
    """Scaled latents `(B, C, H, W)` → uint8 RGB, rounded as diffusers' image processor does (half to even)."""

    def __init__(self, family: Family) -> None:
        super().__init__()
        self.inputs = ("x",)
        self.outputs = ("image",)
        self.axes = {
            "x": {0: "batch", 2: "height", 3: "width"},
            "image": {0: "batch", 1: "image_height", 2: "image_width"},
        }
        self.weights = family.vae
        self._family = family

    def forward(self, x: Tensor) -> tuple[Tensor]:
        picture_BCHW = self._family.decode(x).to(torch.float32)
        unit_BCHW = (picture_BCHW / 2 + 0.5).clamp(0, 1)
        return ((unit_BCHW.permute(0, 2, 3, 1) * 255).round().to(torch.uint8),)


@contextmanager
def exportable() -> Iterator[None]:
    """Run the body with modules whose ONNX form differs from torch swapped for equal ones that export right."""
    original = PatchEmbed.cropped_pos_embed
    PatchEmbed.cropped_pos_embed = _cropped_pos_embed
    try:
        yield
    finally:
        PatchEmbed.cropped_pos_embed = original


def _cropped_pos_embed(self: PatchEmbed, height: int, width: int) -> Tensor:
    """The centre `(height, width)` of the position table.

    diffusers slices `top : top + rows` with `top = (M − rows) // 2`. For a symbolic number of rows the exporter turns
    that end into `M/2 + rows + (−rows) // 2` and lowers `//` on the negative number to a division that truncates, one
    off for odd rows. `(M + rows) // 2` is the same end without a negative number.
    """
    limit, rows, columns = self.pos_embed_max_size, height // self.patch_size, width // self.patch_size
    table = self.pos_embed.reshape(1, limit, limit, -1)
    table = table[
        :, (limit - rows) // 2 : (limit + rows) // 2, (limit - columns) // 2 : (limit + columns) // 2, :
    ]
    crop: Tensor = table.reshape(1, -1, table.shape[-1])
    return crop
