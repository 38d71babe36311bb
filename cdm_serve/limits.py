"""What this server can be asked for: the settings' limits within the bundle's, and a request checked against them."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

from cdm_serve.errors import InvalidRequest
from cdm_serve.images import QUALITY
from cdm_serve.schemas import Format, GenerateRequest, listed, number
from cdm_serve.settings import ServeSettings
from engines.bundle import Manifest
from engines.errors import BundleError
from engines.noise import MAX_SEED

# A seed that nobody chose is short enough to retype and exact in JavaScript.
DRAWN_SEEDS = 2**32
MAX_DEADLINE_MS = 3_600_000
MAX_PRIORITY = 9


@dataclass(frozen=True)
class Order:
    """A request with every default filled in and every limit met. Sizes in pixels, one seed per picture."""

    prompt: str
    seeds: tuple[int, ...]
    steps: int
    width: int
    height: int
    format: Format
    as_json: bool
    min_steps: int | None = None
    """The fewest that will do; none: exactly `steps`."""
    deadline_s: float | None = None
    priority: int = 0
    quality: int = QUALITY
    """Of JPEG and WebP, 0 to 100."""
    file: bool = True
    """Whether a file in `format` is wanted."""
    pixels: bool = False
    """Whether the raw pixels are wanted."""


@dataclass(frozen=True)
class Limits:
    """What this server can be asked for: the settings' limits within the bundle's."""

    steps: tuple[int, ...]
    default_steps: int
    sizes: tuple[tuple[int, int], ...]
    """(width, height) in pixels."""
    default_size: tuple[int, int]
    max_images: int
    max_prompt_chars: int
    auto_deadline_ms: int

    @classmethod
    def of(cls, settings: ServeSettings, manifest: Manifest) -> Limits:
        """Raises `BundleError` when the settings leave nothing of what the bundle can do."""
        steps = tuple(sorted(n for n in manifest.schedules if n <= settings.max_steps))
        if not steps:
            raise BundleError(
                f"--max-steps={settings.max_steps} allows none of the bundle's step counts "
                f"{listed(sorted(manifest.schedules))}; restart with --max-steps {min(manifest.schedules)} or more"
            )
        within_default = [n for n in steps if n <= manifest.default_steps]
        return cls(
            steps=steps,
            default_steps=max(within_default, default=steps[0]),
            sizes=tuple((size.width, size.height) for size in manifest.sizes),
            default_size=(manifest.default_size.width, manifest.default_size.height),
            max_images=settings.max_images,
            max_prompt_chars=settings.max_prompt_chars,
            auto_deadline_ms=settings.auto_deadline_ms,
        )

    def order(self, request: GenerateRequest) -> Order:
        """Fill in the defaults and check every value; every broken limit is named in one error."""
        seed = secrets.randbelow(DRAWN_SEEDS) if request.seed is None else request.seed
        auto = request.steps == "auto"
        deadline_ms = self.auto_deadline_ms if auto and request.deadline_ms is None else request.deadline_ms
        order = Order(
            prompt=request.prompt,
            seeds=tuple((seed + i) % (MAX_SEED + 1) for i in range(min(request.num_images, self.max_images))),
            steps=self.default_steps if request.steps is None or request.steps == "auto" else request.steps,
            width=self.default_size[0] if request.width is None else request.width,
            height=self.default_size[1] if request.height is None else request.height,
            format=request.format,
            as_json=request.response_format == "json" or request.num_images > 1 or request.stream,
            min_steps=(request.min_steps or 1) if auto else None,
            deadline_s=None if deadline_ms is None else deadline_ms / 1e3,
            priority=request.priority,
        )
        problems = [
            *self._text_problems(request),
            *self._number_problems(request, order),
            *self._stream_problems(request),
        ]
        if problems:
            raise InvalidRequest("; ".join(message for _, message in problems), param=problems[0][0])
        return order

    def _text_problems(self, request: GenerateRequest) -> list[tuple[str, str]]:
        length = len(request.prompt)
        if not request.prompt.strip():
            return [("prompt", "prompt is empty; say what to draw")]
        if length > self.max_prompt_chars:
            return [
                (
                    "prompt",
                    f"prompt has {length} characters, the limit is {self.max_prompt_chars}; shorten it",
                )
            ]
        return []

    def _number_problems(self, request: GenerateRequest, order: Order) -> list[tuple[str, str]]:
        problems = []
        if request.seed is not None and not 0 <= request.seed <= MAX_SEED:
            problems.append(("seed", f"seed={number(request.seed)} is outside 0 to {MAX_SEED}"))
        if order.steps not in self.steps:
            problems.append(
                ("steps", f"steps={number(order.steps)} is not offered; allowed: {listed(self.steps)}")
            )
        if request.min_steps is not None:
            if request.steps != "auto":
                problems.append(
                    (
                        "min_steps",
                        f'min_steps={number(request.min_steps)} goes with steps="auto"; ask for that, or leave it out',
                    )
                )
            elif not 1 <= request.min_steps <= self.default_steps:
                problems.append(
                    (
                        "min_steps",
                        f"min_steps={number(request.min_steps)} is outside 1 to {self.default_steps}",
                    )
                )
        if request.deadline_ms is not None and not 1 <= request.deadline_ms <= MAX_DEADLINE_MS:
            problems.append(
                (
                    "deadline_ms",
                    f"deadline_ms={number(request.deadline_ms)} is outside 1 to {MAX_DEADLINE_MS}",
                )
            )
        if not 0 <= request.priority <= MAX_PRIORITY:
            problems.append(
                ("priority", f"priority={number(request.priority)} is outside 0 to {MAX_PRIORITY}")
            )
        if not 1 <= request.num_images <= self.max_images:
            problems.append(
                ("num_images", f"num_images={number(request.num_images)} is outside 1 to {self.max_images}")
            )
        elif request.num_images > 1 and request.response_format == "image":
            message = (
                f"response_format='image' carries one picture, num_images={request.num_images} were asked for; "
                "ask for response_format='json' (or leave it out), or for num_images=1"
            )
            problems.append(("response_format", message))
        if (order.width, order.height) not in self.sizes:
            param = "width" if order.width not in {width for width, _ in self.sizes} else "height"
            sizes = listed(f"{width}×{height}" for width, height in self.sizes)
            asked = f"width={number(order.width)}, height={number(order.height)}"
            problems.append((param, f"{asked} is not a size of this model; allowed: {sizes}"))
        return problems

    def _stream_problems(self, request: GenerateRequest) -> list[tuple[str, str]]:
        most = max(self.steps) - 1
        if not request.stream:
            if request.previews is None:
                return []
            message = f"previews={number(request.previews)} goes with stream=true"
            return [("previews", f"{message}; ask for that, or leave it out")]
        problems = []
        if request.num_images > 1:
            message = f"num_images={number(request.num_images)} cannot be streamed; ask for num_images=1"
            problems.append(("num_images", message))
        if request.response_format == "image":
            message = "response_format='image' cannot be streamed, events carry base64; leave it out"
            problems.append(("response_format", message))
        if request.previews is not None and not 0 <= request.previews <= most:
            problems.append(("previews", f"previews={number(request.previews)} is outside 0 to {most}"))
        return problems

    def schema(self) -> dict[str, Any]:
        """The body's JSON schema with this server's limits in it, for the OpenAPI document."""
        schema = GenerateRequest.model_json_schema()
        fields = {name: plain(field) for name, field in schema["properties"].items()}
        fields["prompt"] |= {"minLength": 1, "maxLength": self.max_prompt_chars, "example": "red apple"}
        fields["seed"] |= {"minimum": 0, "maximum": MAX_SEED}
        fields["steps"] |= {"enum": [*self.steps, "auto"], "default": self.default_steps}
        fields["min_steps"] |= {"minimum": 1, "maximum": self.default_steps, "default": 1}
        fields["deadline_ms"] |= {"minimum": 1, "maximum": MAX_DEADLINE_MS}
        fields["priority"] |= {"minimum": 0, "maximum": MAX_PRIORITY}
        fields["num_images"] |= {"minimum": 1, "maximum": self.max_images}
        fields["previews"] |= {"minimum": 0, "maximum": max(self.steps) - 1}
        fields["width"] |= {
            "enum": sorted({width for width, _ in self.sizes}),
            "default": self.default_size[0],
        }
        fields["height"] |= {
            "enum": sorted({height for _, height in self.sizes}),
            "default": self.default_size[1],
        }
        return {**schema, "properties": with_nulls(fields, schema["properties"])}


NULL = {"type": "null"}


def plain(field: dict[str, Any]) -> dict[str, Any]:
    """Write an optional field as its type alone, for limits to be added; `with_nulls` comes last."""
    options = [option for option in field.get("anyOf", []) if option != NULL]
    plain = {
        key: value for key, value in field.items() if key not in ("title", "anyOf") and value is not None
    }
    # Several types show in their values (an enum), which the caller adds.
    return {**plain, **(options[0] if len(options) == 1 else {})}


def with_nulls(fields: dict[str, Any], optional: dict[str, Any]) -> dict[str, Any]:
    """`fields`, with null allowed where the model's own `optional` allow it: it means that the field is left out."""
    made = {}
    for name, field in fields.items():
        made[name] = dict(field)
        if NULL in optional[name].get("anyOf", []):
            if isinstance(field.get("type"), str) and field["type"] != "null":
                made[name]["type"] = [field["type"], "null"]
            if "enum" in field:
                made[name]["enum"] = [*field["enum"], None]
    return made
