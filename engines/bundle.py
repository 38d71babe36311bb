"""What an exported model is: a folder with `bundle.json` and the files it names.

The manifest binds to the weights everything that must not be guessed: the files and their hashes, the tensors that
go in and out, the latent's shape and scale, the sizes and text lengths the model may be asked for, and the sigmas
(after the scheduler's shift) for each step count. A server refuses a bundle in which any of this does not hold.

    bundle = load_bundle(Path("bundles/emoji"))
    bundle.manifest.sigmas(4)        # (1.0, 0.9, 0.75, 0.5, 0.0)
    bundle.path("denoiser")          # …/denoiser.onnx
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from engines.errors import BundleError
from engines.files import sha256_file, write_text_atomically

FORMAT_VERSION = 1
MANIFEST = "bundle.json"
COMPONENTS = ("text_encoder", "denoiser", "decoder")
PROVENANCE = "provenance.json"
"""What training leaves in a student folder for the export: the fields of `Provenance` but `tools`."""

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
DType = Literal["float32", "float16", "bfloat16", "int64", "int32", "uint8"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TensorSpec(_Strict):
    """One input or output of a component. A dimension is a size, or a name when it may vary (`batch`)."""

    dtype: DType
    shape: tuple[int | str, ...]


class Parity(_Strict):
    """The error of an exported component against float32 torch, for fresh random inputs at one batch size.

    `weights` says with which weights torch ran: those `stored` (what the graph itself gets wrong) or the `original`
    ones (what storing them in fewer bits costs on top).
    """

    weights: Literal["stored", "original"] = "stored"
    batch: int = Field(ge=1)
    max_abs: float = Field(ge=0)
    rel_l2: float = Field(ge=0)


class FileRef(_Strict):
    """A file inside the bundle, by relative POSIX path, and what its bytes must hash to."""

    file: str
    sha256: Sha256
    bytes: int = Field(ge=0)

    @field_validator("file")
    @classmethod
    def _stays_inside(cls, value: str) -> str:
        path = PurePosixPath(value)
        if path.is_absolute() or ".." in path.parts or not value or "\\" in value:
            raise ValueError(f"file {value!r} must be a relative path inside the bundle")
        return value


class Component(_Strict):
    """One ONNX graph: its file, further files it needs (external weights), its tensors and its measured parity."""

    graph: FileRef
    data: tuple[FileRef, ...] = ()
    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]
    opset: int
    parity: tuple[Parity, ...] = Field(min_length=1)


class Tokenizer(_Strict):
    """A `tokenizers` JSON file and how its ids become one `(batch, length)` int64 input of the text encoder."""

    file: FileRef
    input: str
    length: int = Field(ge=1)
    pad_id: int = Field(ge=0)


class Latent(_Strict):
    """The denoiser's space: x is `(batch, channels, height / downscale, width / downscale)`."""

    channels: int = Field(ge=1)
    downscale: int = Field(ge=1)
    scaling_factor: float
    shift_factor: float


class Size(_Strict):
    """A picture size in pixels that this bundle may be asked for."""

    width: int = Field(ge=1)
    height: int = Field(ge=1)


class Provenance(_Strict):
    """Where the weights come from. Nothing here changes a picture; all of it is shown to whoever asks."""

    teacher: str
    recipe: str
    config_sha256: str
    steps_trained: int
    metrics: dict[str, Any] = Field(default_factory=dict)
    licences: tuple[str, ...] = ()
    tools: dict[str, str] = Field(default_factory=dict)


class Manifest(_Strict):
    """`bundle.json`, whole."""

    format_version: int
    name: str = Field(min_length=1, max_length=128)
    family: str
    precision: DType
    components: dict[Literal["text_encoder", "denoiser", "decoder"], Component]
    tokenizers: tuple[Tokenizer, ...] = Field(min_length=1)
    latent: Latent
    sizes: tuple[Size, ...] = Field(min_length=1)
    default_size: Size
    schedules: dict[int, tuple[float, ...]]
    default_steps: int
    guidance: None = None
    provenance: Provenance

    @model_validator(mode="after")
    def _hangs_together(self) -> Self:
        if missing := [name for name in COMPONENTS if name not in self.components]:
            raise ValueError(f"components lacks {', '.join(missing)}")
        for steps, sigmas in self.schedules.items():
            check_schedule(steps, sigmas)
        if self.default_steps not in self.schedules:
            raise ValueError(
                f"default_steps={self.default_steps} has no schedule; there are {sorted(self.schedules)}"
            )
        if self.default_size not in self.sizes:
            raise ValueError("default_size is not among sizes")
        factor = self.latent.downscale
        for size in self.sizes:
            if size.width % factor or size.height % factor:
                raise ValueError(
                    f"size {size.width}x{size.height}: both sides must be multiples of latent.downscale={factor}"
                )
        self._tensors_meet()
        return self

    def _tensors_meet(self) -> None:
        """Every tensor that one part gives is what the next one takes, by the names that engines use."""
        text, denoiser, decoder = (self.components[name] for name in COMPONENTS)  # type: ignore[index]
        inputs = [tokenizer.input for tokenizer in self.tokenizers]
        if len(set(inputs)) != len(inputs):
            raise ValueError(f"tokenizers fill {inputs}: one input twice")
        for what, found, wanted in (
            ("text_encoder takes", text.inputs, inputs),
            ("denoiser takes", denoiser.inputs, ["x", "sigma", "sigma_next", *text.outputs]),
            ("denoiser gives", denoiser.outputs, ["x_next", "x0"]),
            ("decoder takes", decoder.inputs, ["x"]),
            ("decoder gives", decoder.outputs, ["image"]),
        ):
            if set(found) != set(wanted):
                raise ValueError(f"{what} {sorted(found)}, not {sorted(wanted)}")

    def sigmas(self, steps: int) -> tuple[float, ...]:
        """The `steps + 1` post-shift sigmas of a picture made in `steps` steps, from 1 (noise) to 0 (picture)."""
        return self.schedules[steps]

    @property
    def conditioning(self) -> tuple[str, ...]:
        """Names of the tensors that go from the text encoder to the denoiser."""
        return tuple(self.components["text_encoder"].outputs)


def check_schedule(steps: int, sigmas: tuple[float, ...]) -> None:
    """Refuse a schedule that is not `steps + 1` finite sigmas falling strictly from 1 to 0."""
    ok = (
        len(sigmas) == steps + 1
        and steps >= 1
        and all(math.isfinite(s) for s in sigmas)
        and sigmas[0] == 1.0
        and sigmas[-1] == 0.0
        and all(a > b for a, b in pairwise(sigmas))
    )
    if not ok:
        raise ValueError(
            f"schedule for {steps} steps is {list(sigmas)}; it must be {steps + 1} sigmas falling strictly from 1 to 0"
        )


@dataclass(frozen=True)
class Bundle:
    """A verified bundle: the folder, its manifest, and the manifest's own hash (the model's identity in caches)."""

    root: Path
    manifest: Manifest
    sha256: str

    def path(self, component: str) -> Path:
        """The ONNX file of `component` (`text_encoder`, `denoiser` or `decoder`)."""
        return self.root / self.manifest.components[component].graph.file  # type: ignore[index]


def file_ref(root: Path, path: Path) -> FileRef:
    """Describe an existing file of the bundle at `root`."""
    return FileRef(
        file=path.relative_to(root).as_posix(), sha256=sha256_file(path), bytes=path.stat().st_size
    )


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Write `bundle.json`, readable and stable (equal manifests are equal bytes)."""
    text = json.dumps(manifest.model_dump(mode="json"), indent=2, ensure_ascii=False)
    write_text_atomically(root / MANIFEST, text + "\n")


def load_bundle(root: Path) -> Bundle:
    """Read and verify a bundle.

    Raises:
        BundleError: in one sentence: no such bundle, another format version, an invalid manifest or schedule, a
            missing file, or a file whose bytes are not those it was exported with.
    """
    manifest_path = root / MANIFEST
    try:
        raw = manifest_path.read_bytes()
    except (OSError, ValueError) as error:  # a path with a NUL in it is no OSError
        reason = getattr(error, "strerror", None) or error
        raise BundleError(f"{root} is not a bundle: cannot read {MANIFEST} ({reason})") from error
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise BundleError(
            f"{manifest_path} is not valid JSON ({error}); export or download the bundle again"
        ) from error
    version = document.get("format_version") if isinstance(document, dict) else None
    if version != FORMAT_VERSION:
        raise BundleError(
            f"{root} has bundle format {version!r}, this version serves {FORMAT_VERSION}; "
            "export it again with cdm-export"
        )
    try:
        manifest = Manifest.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "manifest"
        raise BundleError(f"{manifest_path} is invalid: {where}: {first['msg']}") from error
    for ref in file_refs(manifest):
        _verify(root, ref)
    return Bundle(root=root, manifest=manifest, sha256=hashlib.sha256(raw).hexdigest())


def file_refs(manifest: Manifest) -> list[FileRef]:
    """Every file that the manifest names, graphs first."""
    components = manifest.components.values()
    refs = [component.graph for component in components]
    refs += [ref for component in components for ref in component.data]
    return refs + [tokenizer.file for tokenizer in manifest.tokenizers]


def _verify(root: Path, ref: FileRef) -> None:
    path = root / ref.file
    again = "export or download the bundle again"
    try:
        if not path.is_file():
            raise BundleError(f"{root} lacks {ref.file}, which {MANIFEST} names; {again}")
        size = path.stat().st_size
        if size != ref.bytes:
            raise BundleError(
                f"{path} is not the file that was exported: it has {size} bytes, not {ref.bytes}; {again}"
            )
        found = sha256_file(path)
    except OSError as error:
        raise BundleError(
            f"{path} cannot be read ({error.strerror}); let this user read it, or {again}"
        ) from error
    if found != ref.sha256:
        raise BundleError(
            f"{path} is not the file that was exported: its SHA-256 is {found[:12]}…, not {ref.sha256[:12]}…; {again}"
        )
