"""What `cdm-serve` can be told. A field is its flag, its environment variable, its help and its README row."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, StringConstraints, WithJsonSchema, model_validator

from engines.base import RUNTIMES, EngineOptions
from engines.cli import CommandSettings

# JPEG keeps EXIF in one 64 KiB segment, and a character of the prompt may take 12 bytes there ("\ud83d\ude00").
MAX_PROMPT_CHARS = 4096

Prompt = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Origin = Annotated[str, StringConstraints(pattern=r"^(\*|https?://[^/\s]+)$")]
Endpoint = Annotated[str, StringConstraints(pattern=r"^https?://[^/\s?#]+(/[^\s?#]*)?$")]
Function = Annotated[str, StringConstraints(pattern=r"^\w+(\.\w+)*:\w+$")]


def _is_a_runtime(value: str) -> str:
    if value != "auto" and value not in RUNTIMES:
        raise ValueError(f"no such runtime; there are auto, {', '.join(RUNTIMES)}")
    return value


Runtime = Annotated[
    str,
    AfterValidator(_is_a_runtime),
    WithJsonSchema({"type": "string", "enum": ["auto", *RUNTIMES]}),
]


def default_bundle() -> Path:
    """The bundled model's folder: what is served when neither `--bundle` nor `CDM_SERVE_BUNDLE` names another."""
    return Path(__file__).parent / "bundles" / "emoji"


class ServeSettings(CommandSettings, env_prefix="CDM_SERVE_"):
    """Serve pictures over HTTP."""

    bundle: tuple[Path, ...] = Field(
        (), description="folders of exported models, the default first; none: the bundled model"
    )
    engine: Runtime = Field(
        "auto",
        description="runtime that runs the bundle; auto: the fastest here, measured, of openvino and onnxruntime, and "
        "with a GPU of tensorrt-rtx, tensorrt, aotinductor and torch; fake needs no bundle and paints colour fields",
    )
    precision: str = Field("auto", description="arithmetic of the runtime; auto: the runtime's best here")
    threads: int = Field(0, ge=0, le=1024, description="threads of the runtime; 0: the runtime chooses")
    max_batch: int = Field(8, ge=1, le=256, description="pictures that one engine call may advance")
    invariant_batch: int = Field(
        0,
        ge=0,
        le=256,
        description="run every engine call in groups of exactly so many pictures: the same seed then gives the same "
        "bytes whatever shares its batch; 0: batches as they come",
    )
    cache_dir: Path | None = Field(
        None,
        description="folder for compiled models and measured costs; none: compile and measure at every start",
    )

    fake_costs: Path | None = Field(
        None, description="cost table (JSON): how long calls of the fake engine take; none: no time"
    )

    triton_url: str = Field(
        "",
        max_length=255,
        description="with --engine triton or triton-cuda: gRPC address (host:port) of the server that executes",
    )
    torch_compile: bool = Field(False, description="with --engine torch: compile the denoiser at the start")
    fused_kernels: bool | None = Field(
        None,
        description="with --engine torch or aotinductor: use our Triton kernels; none: where there is a GPU for them",
    )

    host: str = Field("127.0.0.1", min_length=1, description="address to listen on; 0.0.0.0: all")
    port: int = Field(8000, ge=0, le=65535, description="TCP port; 0: a free one")

    max_steps: int = Field(8, ge=1, le=1000, description="most denoising steps that a request may ask for")
    max_images: int = Field(16, ge=1, le=256, description="most pictures in one request")
    max_prompt_chars: int = Field(
        1000, ge=1, le=MAX_PROMPT_CHARS, description="longest prompt, in characters"
    )
    max_body_bytes: int = Field(65536, ge=256, le=2**30, description="longest request body, in bytes")

    policy: Literal["step", "request", "none"] = Field(
        "step",
        description="who shares an engine call; step: joining and leaving at every step; request: whole requests of "
        "equal steps; none: one picture at a time (the last two to compare with)",
    )
    aging_s: float = Field(
        5.0, gt=0, le=3600, description="seconds of waiting that raise a picture by one priority"
    )
    auto_deadline_ms: int = Field(
        1000, ge=1, le=3_600_000, description='deadline of requests with steps="auto" that give none'
    )
    stuck_s: float = Field(
        60.0,
        gt=0,
        le=86400,
        description="seconds after which a running engine call counts as stuck: /livez fails",
    )
    queue_limit: int = Field(
        64, ge=1, le=1_000_000, description="pictures of a model accepted and unfinished; more get 429"
    )
    image_workers: int = Field(2, ge=1, le=64, description="threads that encode PNG, JPEG and WebP")
    embedding_cache: int = Field(
        1024, ge=0, le=1_000_000, description="prompt embeddings kept of a model; 0: none"
    )
    result_cache: int = Field(
        0,
        ge=0,
        le=1_000_000,
        description="finished pictures kept of a model, uncompressed; asked for again (prompt, seed, steps, size) they "
        "come at once, and one in work is shared; 0: every picture is made",
    )

    body_timeout_s: float = Field(
        30.0, gt=0, le=3600, description="seconds that a request's body may take to arrive"
    )
    max_connections: int = Field(
        512, ge=1, le=65536, description="connections open at once; on more, all but probes get 503"
    )

    keys: Path | None = Field(
        None, description="file of API keys, written by `python -m cdm_serve.keys`; none: no key is asked for"
    )
    metrics_open: bool = Field(
        False, description="with --keys: /metrics needs no key; off: an admin's, as /admin does"
    )
    admin_open: bool = Field(
        False, description="without keys: let everybody load and unload models; off: /admin is closed"
    )
    cors_origin: tuple[Origin, ...] = Field(
        (),
        description="sites whose pages may use this server, such as https://example.org; *: all; none: only its own",
    )
    block_list: Path | None = Field(
        None, description="file of words and phrases, one a line, that no prompt may have; none: any prompt"
    )
    safety_hook: Function | None = Field(
        None,
        description="module:function that is shown every picture and says whether it may be sent; none: all",
    )

    log_format: Literal["text", "json"] = Field("text", description="how log lines are written")
    log_prompts: bool = Field(
        False, description="write prompts, and messages of exceptions that may quote them, into the log"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="least severe log line"
    )
    otlp_endpoint: Endpoint | None = Field(
        None,
        description="URL of an OpenTelemetry collector (OTLP/HTTP, such as http://collector:4318) that gets a trace of "
        "every request; OTEL_… variables say the rest; none: nothing is traced",
    )
    drain_timeout_s: float = Field(
        30.0, ge=0, le=3600, description="seconds that a stop waits for what was accepted"
    )
    examples: tuple[Prompt, ...] = Field(
        (
            "red apple",
            "grinning face",
            "woman astronaut medium dark skin tone",
            "blue heart",
            "cat",
            "flag of japan",
        ),
        description="prompts that the page offers",
    )

    @model_validator(mode="after")
    def _groups_fit_a_batch(self) -> Self:
        if self.invariant_batch > self.max_batch:
            raise ValueError(
                f"--invariant-batch={self.invariant_batch} exceeds --max-batch={self.max_batch}: part of every group "
                f"would always be padding; lower it to {self.max_batch} or raise --max-batch"
            )
        return self

    @model_validator(mode="after")
    def _open_doors_fit_the_keys(self) -> Self:
        if self.metrics_open and self.keys is None:
            raise ValueError("--metrics-open goes with --keys: without keys /metrics is open; leave it out")
        if self.admin_open and self.keys is not None:
            raise ValueError(
                "--admin-open goes without --keys: with keys an admin's opens /admin; leave it out"
            )
        if self.admin_open and self.cors_origin:
            raise ValueError(
                "--admin-open with --cors-origin would let pages of those sites load and unload models; let an admin's "
                "key open /admin, with --keys"
            )
        return self

    @model_validator(mode="after")
    def _one_request_fits_the_queue(self) -> Self:
        if self.max_images > self.queue_limit:
            raise ValueError(
                f"--max-images={self.max_images} exceeds --queue-limit={self.queue_limit}: such a request could never "
                f"be accepted; raise --queue-limit to at least {self.max_images} or lower --max-images"
            )
        return self

    def engine_options(self) -> EngineOptions:
        """What the engine is loaded with."""
        return EngineOptions(
            runtime=self.engine,
            precision=self.precision,
            threads=self.threads,
            max_batch=self.max_batch,
            invariant_batch=self.invariant_batch,
            cache_dir=self.cache_dir,
            fake_costs=self.fake_costs,
            triton_url=self.triton_url,
            torch_compile=self.torch_compile,
            fused_kernels=self.fused_kernels,
        )
