"""An engine without weights: deterministic colour fields from the prompt's ids and the seed's noise.

Tests, demos and simulations run on it. It honours schedules and batches like a real one, every row is computed on its
own (so a picture's bytes cannot depend on its batch), a cost can be injected per call, and a call can be told to fail.

    with tempfile.TemporaryDirectory() as folder:
        engine = FakeEngine(fake_bundle(Path(folder)), EngineOptions(), cost=lambda component, batch: 0.01 * batch)
    engine.fail("denoise", after=2)                  # the third denoise call from now raises ExecutionError
"""

from __future__ import annotations

import time
import zlib
from collections import Counter, deque
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engines.base import Conditioning, Engine, EngineInfo, EngineOptions, Sample, TokenIds
from engines.bundle import (
    FORMAT_VERSION,
    Bundle,
    Component,
    Graph,
    Latent,
    Manifest,
    Parity,
    Provenance,
    Size,
    TensorSpec,
    Tokenizer,
    file_ref,
    load_bundle,
    write_manifest,
)
from engines.call_costs import read_cost_table
from engines.errors import ExecutionError, RuntimeUnavailable

Cost = Callable[[str, int], float]
"""(component, batch) → seconds that one call takes."""

VOCABULARY = 2**15
CODE = (3, 4)
"""A prompt's embedding: per colour channel two frequencies, a phase and an offset."""
CALLS_KEPT = 4096


class FakeEngine(Engine):
    """Colour fields for any bundle's shapes. `calls` holds the last (component, batch) pairs it was asked for.

    A call waits for what `cost` says, or the table at `options.fake_costs` for its first size, before it paints.
    Raises `RuntimeUnavailable` for options that could change nothing here.
    """

    def __init__(
        self,
        bundle: Bundle,
        options: EngineOptions,
        *,
        cost: Cost | None = None,
        sleep: Callable[[float], None] = time.sleep,
        overlap: bool = False,
    ) -> None:
        given = {
            "precision": (options.precision, "auto"),
            "threads": (options.threads, 0),
            "cache_dir": (options.cache_dir, None),
            "invariant_batch": (options.invariant_batch, 0),
        }
        for name, (value, nothing) in given.items():
            if value != nothing:
                raise RuntimeUnavailable(
                    f"{name}={value} means nothing to the fake runtime, which computes no model; leave it out, or "
                    "choose another runtime"
                )
        self.manifest = bundle.manifest
        self.info = EngineInfo(
            runtime="fake",
            version=np.__version__,
            device="cpu",
            precision="float32",
            max_batch=options.max_batch,
            threads=1,
            overlap=overlap,
        )
        self.calls: deque[tuple[str, int]] = deque(maxlen=CALLS_KEPT)
        if cost is None and options.fake_costs is not None:
            cost = read_cost_table(options.fake_costs).first_size()
        self._cost = cost
        self._sleep = sleep
        self._counts: Counter[str] = Counter()
        self._failing: set[tuple[str, int]] = set()

    def fail(self, component: str, after: int = 0) -> None:
        """Let one call of `component` (`encode`, `denoise` or `decode`) fail: the next, or the one `after` it."""
        self._failing.add((component, self._counts[component] + after + 1))

    def tokenize(self, prompt: str) -> TokenIds:
        """A checksum per lower-case word."""
        words = [
            zlib.crc32(word.encode("utf-8", "surrogatepass")) % VOCABULARY for word in prompt.lower().split()
        ]
        return tuple(
            (*words[: spec.length], *(spec.pad_id,) * (spec.length - len(words)))
            for spec in self.manifest.tokenizers
        )

    def encode(self, tokens: Sequence[TokenIds]) -> list[Conditioning]:
        """Per prompt a float32 code of shape `CODE`, drawn by a generator keyed with its ids."""
        self._called("encode", len(tokens))
        keys = [zlib.crc32(repr(ids).encode()) for ids in tokens]
        return [
            np.random.Generator(np.random.Philox(key=key)).uniform(-1, 1, CODE).astype(np.float32)
            for key in keys
        ]

    def put(self, noise: NDArray[np.float32]) -> Sample:
        """The noise itself."""
        return noise

    def denoise(
        self,
        samples: Sequence[Sample],
        sigma: Sequence[float],
        sigma_next: Sequence[float],
        conditioning: Sequence[Conditioning],
    ) -> tuple[list[Sample], list[Sample]]:
        """One Euler step per row towards x̂0 = the prompt's field, bent by the row's own low frequencies."""
        self._called("denoise", len(samples))
        rows = zip(samples, sigma, sigma_next, conditioning, strict=True)
        pairs = [_euler(x, s, s_next, code) for x, s, s_next, code in rows]
        return [x for x, _ in pairs], [x0 for _, x0 in pairs]

    def decode(self, samples: Sequence[Sample]) -> NDArray[np.uint8]:
        """The first three latent channels, interpolated to pixels."""
        self._called("decode", len(samples))
        return np.stack([_picture(x, self.manifest.latent.downscale) for x in samples])

    def _called(self, component: str, batch: int) -> None:
        assert 1 <= batch <= self.info.max_batch, (
            f"{component} of {batch} exceeds max_batch={self.info.max_batch}"
        )
        self.calls.append((component, batch))
        self._counts[component] += 1
        if self._cost is not None:
            self._sleep(self._cost(component, batch))
        call = (component, self._counts[component])
        if call in self._failing:
            self._failing.remove(call)
            raise ExecutionError(f"{component} call {call[1]} was told to fail")


def _euler(
    x: NDArray[np.float32], sigma: float, sigma_next: float, code: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    # σ > 0 here: a schedule's last σ is only ever a target.
    x0 = _field(code, x.shape) + np.float32(0.8) * np.tanh(_blur(x))
    velocity = (x - x0) / np.float32(sigma)
    stepped = x + np.float32(sigma_next - sigma) * velocity
    return stepped.astype(np.float32, copy=False), x0.astype(np.float32, copy=False)


def _field(code: NDArray[np.float32], shape: tuple[int, ...]) -> NDArray[np.float32]:
    channels, height, width = shape
    rows = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    columns = np.linspace(-1, 1, width, dtype=np.float32)[None, :]
    across, down, phase, offset = code.T[:, :, None, None]
    waves = np.cos(3 * (across * columns + down * rows + phase)) + offset
    field: NDArray[np.float32] = waves[np.arange(channels) % CODE[0]].astype(np.float32)
    return field


def _blur(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Low frequencies of `(channels, h, w)`, scaled back to about unit deviation: means over a coarse grid."""
    _, height, width = x.shape
    down, across = min(4, height), min(4, width)
    rows, columns = _interpolation(height, down), _interpolation(width, across)
    coarse = rows.T @ x @ columns
    scale = np.float32(np.sqrt(down * across / (height * width)))
    blurred: NDArray[np.float32] = (rows @ (coarse * scale) @ columns.T).astype(np.float32, copy=False)
    return blurred


def _interpolation(fine: int, coarse: int) -> NDArray[np.float32]:
    """Linear interpolation as a matrix `(fine, coarse)`, edges held."""
    at = np.clip((np.arange(fine) + 0.5) * coarse / fine - 0.5, 0, coarse - 1)
    matrix: NDArray[np.float32] = np.maximum(0, 1 - np.abs(at[:, None] - np.arange(coarse))).astype(
        np.float32
    )
    return matrix


def _picture(x: NDArray[np.float32], downscale: int) -> NDArray[np.uint8]:
    channels, height, width = x.shape
    planes = x[np.arange(3) % channels]
    smooth = _interpolation(height * downscale, height) @ planes @ _interpolation(width * downscale, width).T
    picture: NDArray[np.uint8] = (
        np.round(255 / (1 + np.exp(-1.2 * smooth))).astype(np.uint8).transpose(1, 2, 0)
    )
    return picture


def fake_manifest(
    root: Path,
    *,
    sizes: Sequence[tuple[int, int]] = ((128, 128), (64, 64), (128, 64)),
    steps: Sequence[int] = (1, 2, 3, 4, 6, 8),
    default_steps: int = 4,
    name: str = "fake",
) -> Manifest:
    """A valid manifest of a model that does not exist; writes the placeholder files it names into `root`.

    `sizes` are (width, height) in pixels, the first is the default.
    """
    ids = TensorSpec(dtype="int64", shape=("batch", 77))
    embedding = TensorSpec(dtype="float32", shape=("batch", *CODE))
    latent = TensorSpec(dtype="float32", shape=("batch", 4, "height", "width"))
    scalar = TensorSpec(dtype="float32", shape=("batch",))
    picture = TensorSpec(dtype="uint8", shape=("batch", "height", "width", 3))
    denoiser_inputs = {"x": latent, "sigma": scalar, "sigma_next": scalar, "embedding": embedding}
    pictures = tuple(Size(width=width, height=height) for width, height in sizes)
    (root / "tokenizer.json").write_text("{}\n", encoding="utf-8")
    return Manifest(
        format_version=FORMAT_VERSION,
        name=name,
        family="fake",
        components={
            "text_encoder": _component(root, "text_encoder", {"input_ids": ids}, {"embedding": embedding}),
            "denoiser": _component(root, "denoiser", denoiser_inputs, {"x_next": latent, "x0": latent}),
            "decoder": _component(root, "decoder", {"x": latent}, {"image": picture}),
        },
        tokenizers=(
            Tokenizer(
                file=file_ref(root, root / "tokenizer.json"),
                component="text_encoder",
                input="input_ids",
                length=77,
                pad_id=0,
            ),
        ),
        latent=Latent(channels=4, downscale=8, scaling_factor=1.0, shift_factor=0.0),
        sizes=pictures,
        default_size=pictures[0],
        schedules={n: tuple(_shifted((n - i) / n) for i in range(n + 1)) for n in steps},
        default_steps=default_steps,
        provenance=Provenance(teacher="none", recipe="none", config_sha256="0" * 64, steps_trained=0),
    )


def fake_bundle(root: Path, **options: Sequence[tuple[int, int]] | Sequence[int] | int | str) -> Bundle:
    """Write a fake bundle into the existing folder `root` and load it; options are those of `fake_manifest`."""
    write_manifest(root, fake_manifest(root, **options))  # type: ignore[arg-type]
    return load_bundle(root)


def _component(
    root: Path, name: str, inputs: dict[str, TensorSpec], outputs: dict[str, TensorSpec]
) -> Component:
    path = root / f"{name}.onnx"
    path.write_bytes(b"")
    parity = Parity(batch=1, max_abs=0.0, rel_l2=0.0)
    graph = Graph(file=file_ref(root, path), opset=1)
    return Component(graphs={"float32": graph}, inputs=inputs, outputs=outputs, parity=(parity,))


def _shifted(sigma: float, shift: float = 3.0) -> float:
    """SD3's time shift σ' = sσ / (1 + (s − 1)σ): the sigmas of a bundle are unevenly spaced, so these are too."""
    return shift * sigma / (1 + (shift - 1) * sigma)
