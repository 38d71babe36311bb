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

FORMAT_VERSION = 2
MANIFEST = "bundle.json"
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
"""Names of text encoders, diffusers' own; a bundle has the first, or more of them in this order."""
MODEL = "model"
"""Folder in a bundle with the student as it was, if it was asked for."""
PROVENANCE = "provenance.json"
"""What training leaves in a student folder for the export: the fields of `Provenance` but `tools`."""

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Precision = Literal["float32", "bfloat16"]
DType = Literal["float32", "float16", "bfloat16", "int64", "int32", "uint8"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TensorSpec(_Strict):
    """One input or output of a component. A dimension is a size, or a name when it may vary (`batch`)."""

    dtype: DType
    shape: tuple[int | str, ...]


class Size(_Strict):
    """A picture size in pixels that this bundle may be asked for."""

    width: int = Field(ge=1)
    height: int = Field(ge=1)


class Parity(_Strict):
    """The error of a component, as `runtime` runs it in `precision`, against float32 torch on fresh random inputs.

    `weights` says with which weights torch ran: those `stored` in the float32 graph (what the graph itself gets wrong)
    or the `original` ones (what fewer bits, stored or computed with, cost on top). `size` is that of the picture;
    text encoders have none.
    """

    runtime: str = "onnxruntime"
    precision: str = "f32"
    weights: Literal["stored", "original"] = "stored"
    batch: int = Field(ge=1)
    size: Size | None = None
    max_abs: float = Field(ge=0)
    rel_l2: float = Field(ge=0)


class Fusion(_Strict):
    """What a runtime's compiler made of a component's attentions, and of the rest in its own words.

    `fell_apart` of them could be one kernel and are not. `target`: the compute capability where none was here.
    """

    runtime: str
    precision: str
    target: str = ""
    attentions: int = Field(ge=1)
    fell_apart: int = Field(ge=0)
    report: str


class PictureParity(_Strict):
    """Whole pictures, from token ids and noise to pixels, against float32 torch with the original weights.

    `psnr` (dB, over all pictures of the batch; 99 if they are equal), `max_abs` of 255.
    """

    runtime: str
    precision: str
    size: Size
    steps: int = Field(ge=1)
    batch: int = Field(ge=1)
    psnr: float
    max_abs: int = Field(ge=0, le=255)


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


class Graph(_Strict):
    """One ONNX graph: its file, further files it needs (external weights), and the opset it is written in."""

    file: FileRef
    data: tuple[FileRef, ...] = ()
    opset: int

    @property
    def sha256(self) -> str:
        """Hash of the graph and all its weights: what a compiled form of it is found by."""
        return hashlib.sha256("\n".join(ref.sha256 for ref in (self.file, *self.data)).encode()).hexdigest()


class Component(_Strict):
    """One part of the model: its ONNX graph in each precision exported, its tensors and its measured parity.

    The tensors are the same in every precision: a bfloat16 graph takes and gives float32, and casts inside.
    """

    graphs: dict[Precision, Graph] = Field(min_length=1)
    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]
    parity: tuple[Parity, ...] = Field(min_length=1)
    fusions: tuple[Fusion, ...] = ()


class Tokenizer(_Strict):
    """A `tokenizers` JSON file and how its ids become one `(batch, length)` int64 input of a text encoder.

    `length` counts everything: `prefix`, the prompt's own ids cut or padded to what is left, `suffix`. Where
    `spell_quotes` holds, what stands in quotation marks is tokenized a character at a time (`engines/spelling.py`).
    """

    file: FileRef
    component: str
    input: str
    length: int = Field(ge=1)
    pad_id: int = Field(ge=0)
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    spell_quotes: bool = False


class Latent(_Strict):
    """The denoiser's space: x is `(batch, channels, height / downscale, width / downscale)`."""

    channels: int = Field(ge=1)
    downscale: int = Field(ge=1)
    scaling_factor: float
    shift_factor: float


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
    components: dict[str, Component]
    tokenizers: tuple[Tokenizer, ...] = Field(min_length=1)
    latent: Latent
    text_lengths: dict[str, int] = Field(default_factory=dict)
    """Tokens of each dimension named in text encoders' tensors, as serving always fills them."""
    sizes: tuple[Size, ...] = Field(min_length=1)
    default_size: Size
    schedules: dict[int, tuple[float, ...]]
    default_steps: int
    guidance: None = None
    pictures: tuple[PictureParity, ...] = ()
    model: tuple[FileRef, ...] = ()
    """The student's own diffusers folder, below `MODEL`, for runtimes that run torch; empty: it was left out."""
    provenance: Provenance

    @model_validator(mode="after")
    def _hangs_together(self) -> Self:
        wanted = (*TEXT_ENCODERS[: max(1, len(self.components) - 2)], "denoiser", "decoder")
        if set(self.components) != set(wanted):
            raise ValueError(f"components are {sorted(self.components)}, not {sorted(wanted)}")
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
        denoiser, decoder = self.components["denoiser"], self.components["decoder"]
        inputs = [tokenizer.input for tokenizer in self.tokenizers]
        if len(set(inputs)) != len(inputs):
            raise ValueError(f"tokenizers fill {inputs}: one input twice")
        if len(set(self.conditioning)) != len(self.conditioning):
            raise ValueError(f"text encoders give {list(self.conditioning)}: one tensor twice")
        filled = {
            name: [spec.input for spec in self.tokenizers if spec.component == name]
            for name in self.text_encoders
        }
        for what, found, wanted in (
            *((f"{name} takes", self.components[name].inputs, filled[name]) for name in self.text_encoders),
            ("denoiser takes", denoiser.inputs, ["x", "sigma", "sigma_next", *self.conditioning]),
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
    def text_encoders(self) -> tuple[str, ...]:
        """Names of the components that read token ids, in order."""
        return tuple(name for name in TEXT_ENCODERS if name in self.components)

    @property
    def conditioning(self) -> tuple[str, ...]:
        """Names of the tensors that go from the text encoders to the denoiser, in the denoiser's order."""
        return tuple(name for encoder in self.text_encoders for name in self.components[encoder].outputs)

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """In which precisions every component is there."""
        return tuple(
            precision
            for precision in ("float32", "bfloat16")
            if all(precision in component.graphs for component in self.components.values())
        )


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

    def path(self, component: str, precision: Precision = "float32") -> Path:
        """The ONNX file of `component` (`text_encoder`, …, `denoiser` or `decoder`).

        Raises:
            BundleError: it was not exported in that precision.
        """
        graphs = self.manifest.components[component].graphs
        if precision not in graphs:
            raise BundleError(
                f"{self.root} has {component} in {', '.join(graphs)}, not in {precision}; export it again with "
                f"--precisions {','.join([*graphs, precision])}"
            )
        return self.root / graphs[precision].file.file


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
        newer = type(version) is int and version > FORMAT_VERSION
        remedy = "install the cdm-serve that wrote it" if newer else "export it again with cdm-export"
        raise BundleError(
            f"{root} has bundle format {version!r}, this version serves {FORMAT_VERSION}; {remedy}"
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
    graphs = [graph for component in manifest.components.values() for graph in component.graphs.values()]
    refs = [graph.file for graph in graphs]
    refs += [ref for graph in graphs for ref in graph.data]
    return [*refs, *(tokenizer.file for tokenizer in manifest.tokenizers), *manifest.model]


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
