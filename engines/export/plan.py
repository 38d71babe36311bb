"""What an export compares: which prompts, noise, sizes and batches, and the stages that they pass through.

The order is that of a request. What a text encoder answers is what the denoiser is asked with, and the whole pictures
that runtimes are compared with at the end are made on the way, by torch with the original weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from engines.bundle import Size
from engines.errors import ExportError
from engines.export.graphs import Axes, DecoderGraph, DenoiserGraph, TextEncoderGraph, text_axes
from engines.export.onnx_file import GraphModule
from engines.export.parity import EXAMPLE_BATCH, Probe, answer, latent_probe, random_prompts
from engines.export.precision import LOW, lower_
from engines.export.stages import Stage
from engines.families.base import Family
from engines.families.loading import quiet

PICTURES = 2
"""Whole pictures compared per size."""

SHORT_BATCH = 2


@dataclass
class Pictures:
    """Token ids (by input) and noise `(PICTURES, C, H, W)` of one size, and torch's `(PICTURES, height, width, 3)`."""

    size: Size
    ids: dict[str, Tensor]
    noise: Tensor
    latents: Tensor | None = None
    image: Tensor | None = None


@dataclass
class Plan:
    """Everything compared. `probes` by component fill with torch's answers as stages run."""

    family: Family
    sizes: tuple[Size, ...]
    batches: tuple[int, ...]
    steps: int
    seed: int
    probes: dict[str, list[Probe]] = field(default_factory=dict)
    pictures: list[Pictures] = field(default_factory=list)
    _example: dict[str, Tensor] = field(default_factory=dict)
    _picture_text: dict[str, Tensor] = field(default_factory=dict)
    _axes: Axes = field(default_factory=dict)

    @property
    def text_lengths(self) -> dict[str, int]:
        """For the manifest: how many tokens each named text dimension has at the tokenizers' lengths."""
        lengths = {
            f"{spec['component']}_length": int(spec["length"]) for spec in self.family.tokenizer_specs()
        }
        for name, axes in self._axes.items():
            if 1 in axes:
                lengths[axes[1]] = self._picture_text[name].shape[1]
        return lengths

    def sigmas(self, steps: int, size: Size | None = None) -> tuple[float, ...]:
        """The family's, for pictures of `size`; None: the default size, whose schedules a bundle has."""
        return self.family.sigmas(steps, self._latent(size or self.sizes[0]))

    def stages(self, fuse: Callable[[Family], None]) -> Iterator[Stage]:
        """Each is to be run before the next is asked for."""
        specs = self.family.tokenizer_specs()
        for spec in specs:
            yield self._text_stage(spec["component"], spec["input"])
        yield self._denoiser_stage(fuse)
        yield self._decoder_stage()

    def _text_stage(self, component: str, name: str) -> Stage:
        def ids(batch: int, seed: int) -> dict[str, Tensor]:
            return {name: self.family.tokenize(random_prompts(batch, self.seed + seed))[name]}

        def module(family: Family) -> TextEncoderGraph:
            (encoder,) = [item for item in family.text_encoders() if item.component == component]
            return TextEncoderGraph(encoder, self._states(component, encoder.outputs))

        def meanwhile(family: Family) -> None:
            graph = module(family)
            pictures = Probe(PICTURES, None, ids(PICTURES, 2))
            for probe, kept in ((example, self._example), (pictures, self._picture_text)):
                answer(component, graph, probe, "original")
                answers = probe.answers.pop("original")
                kept |= {output: torch.from_numpy(array) for output, array in answers.items()}
                kept |= probe.inputs
            self._axes |= text_axes(component, graph.outputs, self._states(component, graph.outputs))

        example = Probe(EXAMPLE_BATCH, None, ids(EXAMPLE_BATCH, 1))
        whole = [Probe(batch, None, ids(batch, 1000 + batch)) for batch in self.batches]
        cut = {key: rows[:, : max(2, rows.shape[1] // 2)] for key, rows in ids(SHORT_BATCH, 3).items()}
        self.probes[component] = [*whole, Probe(SHORT_BATCH, None, cut, short=True)]
        return Stage(
            component, component, module, self.probes[component], example, _lower_whole, meanwhile=meanwhile
        )

    def _states(self, component: str, outputs: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(name for name in outputs if name not in self.family.pooled)

    def _denoiser_stage(self, fuse: Callable[[Family], None]) -> Stage:
        def conditioning(row: int) -> dict[str, Tensor]:
            """What torch's text encoders answered to probe `row`."""
            found: dict[str, Tensor] = {}
            for probes in self.probes.values():
                found |= {
                    name: torch.from_numpy(array) for name, array in probes[row].answers["original"].items()
                }
            return {name: found[name] for name in self._axes}

        text = [conditioning(row) for row in range(len(self.batches) + 1)]
        channels = self.family.latent_channels
        probes = [
            Probe(
                batch,
                size,
                {**latent_probe(channels, batch, self._latent(size), self._seed(index, batch)), **rows},
            )
            for index, size in enumerate(self.sizes)
            for batch, rows in zip(self.batches, text, strict=False)
        ]
        first = self._latent(self.sizes[0])
        short = latent_probe(channels, SHORT_BATCH, first, self._seed(0, 99))
        probes.append(Probe(SHORT_BATCH, self.sizes[0], {**short, **text[-1]}, short=True))
        start = latent_probe(channels, EXAMPLE_BATCH, first, self.seed + 1)
        example = Probe(
            EXAMPLE_BATCH, self.sizes[0], {**start, **{name: self._example[name] for name in self._axes}}
        )
        self.probes["denoiser"] = probes

        def module(family: Family) -> DenoiserGraph:
            return DenoiserGraph(family, self._axes)

        def lower(graph: GraphModule) -> None:
            lower_(graph.weights, self.family.low_precision())

        return Stage(
            "denoiser",
            "transformer",
            module,
            probes,
            example,
            lower,
            fuse,
            lambda family: self._sample(module(family)),
        )

    def _decoder_stage(self) -> Stage:
        channels = self.family.latent_channels
        self.probes["decoder"] = [
            Probe(
                batch,
                size,
                {"x": latent_probe(channels, batch, self._latent(size), self._seed(index, 50 + batch))["x"]},
            )
            for index, size in enumerate(self.sizes)
            for batch in self.batches
        ]
        example = {
            "x": latent_probe(channels, EXAMPLE_BATCH, self._latent(self.sizes[0]), self.seed + 1)["x"]
        }
        return Stage(
            "decoder", "vae", DecoderGraph, self.probes["decoder"], Probe(EXAMPLE_BATCH, self.sizes[0], example),
            _lower_whole, meanwhile=self._decode,
        )  # fmt: skip

    def _seed(self, index: int, number: int) -> int:
        """Seeds apart from the tracing example's, and from one another's."""
        return self.seed + 1000 + 1000 * index + number

    def _latent(self, size: Size) -> tuple[int, int]:
        factor = self.family.downscale
        return size.height // factor, size.width // factor

    @torch.no_grad()
    def _sample(self, module: DenoiserGraph) -> None:
        """The reference pictures' latents."""
        ids = {spec["input"]: self._picture_text[spec["input"]] for spec in self.family.tokenizer_specs()}
        text = [self._picture_text[name] for name in self._axes]
        for index, size in enumerate(self.sizes):
            noise = latent_probe(
                self.family.latent_channels, PICTURES, self._latent(size), self._seed(index, 77)
            )["x"]
            x = noise
            for sigma, sigma_next in pairwise(self.sigmas(self.steps)):
                x, _ = module(x, torch.full((PICTURES,), sigma), torch.full((PICTURES,), sigma_next), *text)
            self.pictures.append(Pictures(size, ids, noise, x))

    @torch.no_grad()
    def _decode(self, family: Family) -> None:
        for pictures in self.pictures:
            assert pictures.latents is not None
            (pictures.image,) = DecoderGraph(family)(pictures.latents)


def make_plan(
    family: Family, sizes: tuple[Size, ...], batches: tuple[int, ...], steps: int, seed: int
) -> Plan:
    """The plan of an export of `family`, of which only configuration and tokenizers need be there.

    Raises:
        ExportError: a size that the autoencoder or the transformer's patches cannot make.
    """
    unit = family.downscale * family.patch_size
    for size in sizes:
        if size.width % unit or size.height % unit:
            raise ExportError(
                f"size {size.width}x{size.height}: both sides must be multiples of {unit}, the autoencoder's factor "
                f"{family.downscale} times the transformer's patch of {family.patch_size}"
            )
    return Plan(family, sizes, batches, steps, seed)


def _lower_whole(module: GraphModule) -> None:
    with quiet():  # diffusers notes that no module asked to stay in float32
        module.weights.to(LOW)
