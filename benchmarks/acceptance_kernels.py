"""The Triton kernels on the GPU: against float64, and timed against the same expression in torch, eager and compiled.

    examine("qk_norm_rope, LongCat, batch 1", "bf16", "cuda", rounds=20)

Inputs have the shapes, strides and dtypes that the models launch them with. Times are the device's alone: each
contender is a CUDA graph over several sets of inputs, more than the L2 cache holds together, and graphs take turns.
Without a GPU Triton's interpreter computes, in float32 (its bfloat16 truncates) and on short sequences.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.acceptance_report import Missed, sentence
from engines.export.tolerance import Tolerance
from engines.kernels import gate_residual_norm, layer_norm_modulate, qk_norm_rope
from engines.kernels.compile import EPS

UNIT = {torch.float32: 0.0, torch.bfloat16: 2.0**-8}
"""By how much, relatively, a correctly rounded result may be off in a dtype; float32's own is within `LIMIT`."""

LIMIT = Tolerance.stored
"""Of any one value's error beyond its rounding, over the root mean square of all."""

SHORT = (5, 3)
"""Tokens of image and text for the interpreter."""

L2_SETS = 4
"""Inputs and outputs of all sets together, in sizes of the L2 cache."""


@dataclass(frozen=True)
class Case:
    """One kernel as one model launches it; `tokens` of each segment. Heads only where it takes them."""

    kernel: str
    model: str
    batch: int
    tokens: tuple[int, ...]
    width: int
    heads: int = 0
    rotate: bool = False
    interleaved: bool = False

    @property
    def name(self) -> str:
        return f"{self.kernel}, {self.model}, batch {self.batch}"


IMAGE, SD3_TEXT, LONGCAT_TEXT = 4096, 77 + 256, 512
"""Tokens of a picture of 1024×1024, and of the texts."""

CASES = {
    case.name: case
    for batch in (1, 4)
    for case in (
        Case("layer_norm_modulate", "SD3-Medium", batch, (IMAGE,), 1536),
        Case("layer_norm_modulate", "LongCat", batch, (LONGCAT_TEXT, IMAGE), 3072),
        Case("gate_residual_norm", "SD3-Medium", batch, (IMAGE,), 1536),
        Case("gate_residual_norm", "LongCat", batch, (IMAGE,), 3072),
        Case("qk_norm_rope", "SD3.5-Medium", batch, (IMAGE, SD3_TEXT), 64, heads=24),
        Case("qk_norm_rope", "LongCat", batch, (LONGCAT_TEXT, IMAGE), 128, heads=24, rotate=True),
        Case(
            "qk_norm_rope", "LongCat interleaved", batch, (LONGCAT_TEXT, IMAGE), 128, 24, rotate=True, interleaved=True
        ),
    )
}  # fmt: skip

Arguments = tuple[list[Any], dict[str, Any]]
Call = Callable[..., Any]


def examine(case: str, precision: str, device: str, rounds: int) -> dict[str, Any]:
    """One row: errors, and on a GPU microseconds and GB/s.

    Raises:
        Missed: a value is off by more than rounding explains.
    """
    chosen = CASES[case]
    if device != "cuda":
        chosen = replace(chosen, tokens=SHORT[: len(chosen.tokens)])
    with torch.inference_mode():
        arguments = inputs(chosen, precision, device, seed=0)
        function, plain = functions(chosen)
        row = errors(function, plain, arguments)
        if device == "cuda":
            row |= times(chosen, precision, rounds)
    return row


def functions(case: Case) -> tuple[Call, Call]:
    """The kernel, and the same in plain torch."""
    modules = (layer_norm_modulate, gate_residual_norm, qk_norm_rope)
    (module,) = [item for item in modules if item.__name__.endswith(f".{case.kernel}")]
    return getattr(module, case.kernel), getattr(module, f"{case.kernel}_reference")


def inputs(case: Case, precision: str, device: str, seed: int) -> Arguments:
    """What the model gives: a float32 residual stream and modulation, and products in `precision`."""
    generator = torch.Generator(device).manual_seed(seed)
    low = torch.bfloat16 if precision == "bf16" else torch.float32

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    if case.kernel == "qk_norm_rope":
        return _heads(case, random, low)
    rows = random(case.batch, 6 * case.width).chunk(6, dim=1)  # of one product, as adaLN makes them
    streams = [random(case.batch, length, case.width) for length in case.tokens]
    settings = {"eps": EPS, "dtype": low}
    if case.kernel == "layer_norm_modulate":
        return [streams, rows[0], rows[1]], settings
    new = random(case.batch, case.tokens[0], case.width, dtype=low)
    return [streams[0], rows[0], new, rows[1], rows[2]], settings


def _heads(case: Case, random: Callable[..., Tensor], low: torch.dtype) -> Arguments:
    inner = case.heads * case.width
    queries, keys = [], []
    for length in case.tokens:
        projected = random(case.batch, length, 3 * inner, dtype=low).chunk(3, dim=-1)  # of one product too
        query, key = (part.view(*part.shape[:2], case.heads, case.width) for part in projected[:2])
        queries.append(query)
        keys.append(key)
    weights = [[random(case.width, dtype=low) for _ in case.tokens] for _ in range(2)]
    settings: dict[str, Any] = {"eps": EPS}
    if case.rotate:
        angles = random(sum(case.tokens), case.width // 2)
        angles = angles.repeat_interleave(2, dim=1) if case.interleaved else angles
        settings |= {"cos": angles.cos(), "sin": angles.sin(), "interleaved": case.interleaved}
    return [queries, keys, *weights], settings


def errors(function: Call, plain: Call, arguments: Arguments) -> dict[str, Any]:
    """Of every output against float64, the worst.

    Raises:
        Missed: one is off by more than its rounding and `LIMIT`.
    """
    outputs = _tuple(function(*arguments[0], **arguments[1]))
    exact = _tuple(plain(*_double(arguments[0]), **_double(arguments[1])))
    row = {"rel L2": 0.0, "max abs": 0.0, "beyond rounding": 0.0}
    for output, wanted in zip(outputs, exact, strict=True):
        assert wanted.dtype == torch.float64
        difference = (output.double() - wanted).abs()
        unexplained = (difference - UNIT[output.dtype] * wanted.abs()).clamp(min=0)
        beyond = unexplained.max() / wanted.square().mean().sqrt()
        row["rel L2"] = max(row["rel L2"], float(difference.norm() / wanted.norm()))
        row["max abs"] = max(row["max abs"], float(difference.max()))
        row["beyond rounding"] = max(row["beyond rounding"], float(beyond))
        if not float(beyond) <= LIMIT:  # not a number is not within it
            raise Missed(
                f"a value is off from float64 by {float(beyond):.2e} of the root mean square beyond its rounding to "
                f"{output.dtype}; at most {LIMIT:.0e} is allowed"
            )
    return row


def times(case: Case, precision: str, rounds: int) -> dict[str, Any]:
    """Median microseconds of one launch of each contender, on the GPU, and what that makes in GB/s."""
    function, plain = functions(case)
    first = inputs(case, precision, "cuda", seed=0)
    outputs = _tuple(function(*first[0], **first[1]))
    nbytes = _bytes(first[0]) + _bytes(list(first[1].values())) + _bytes(list(outputs))
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    sets = [
        first,
        *(inputs(case, precision, "cuda", seed) for seed in range(1, 1 + L2_SETS * cache // nbytes)),
    ]
    contenders: dict[str, Call] = {"kernel": function, "eager": plain}
    row: dict[str, Any] = {"MB": nbytes / 1e6}
    torch._dynamo.reset()  # or the eighth shape of a function would run eagerly, without a word
    compiled = torch.compile(plain, dynamic=False)
    try:
        compiled(*first[0], **first[1])
        contenders["compiled"] = compiled
    except (
        Exception
    ) as error:  # the compiler's own, a missing C compiler's: the kernel is measured all the same
        row["not compiled"] = sentence(error)
    graphs = {name: captured(call, sets) for name, call in contenders.items()}
    found: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, graph in graphs.items():
            found[name].append(1e3 * _elapsed_ms(graph) / len(sets))
    medians = {name: statistics.median(values) for name, values in found.items()}
    row |= {f"{name} µs": round(value, 2) for name, value in medians.items()}
    row |= {f"{name} GB/s": round(nbytes / value / 1e3, 1) for name, value in medians.items()}
    row |= {
        f"× over {name}": round(medians[name] / medians["kernel"], 2) for name in medians if name != "kernel"
    }
    return row


def captured(call: Call, sets: Sequence[Arguments]) -> Any:
    """A CUDA graph of one call on each set, warmed up."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for arguments in sets:
            call(*arguments[0], **arguments[1])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for arguments in sets:
            call(*arguments[0], **arguments[1])
    graph.replay()
    torch.cuda.synchronize()
    return graph


def _elapsed_ms(graph: Any) -> float:
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    began.record()
    graph.replay()
    ended.record()
    ended.synchronize()
    return float(began.elapsed_time(ended))


def _tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _double(value: Any) -> Any:
    """Tensors in float64, wherever they are; a dtype that is asked for becomes float64 too."""
    if isinstance(value, Tensor):
        return value.double()
    if isinstance(value, torch.dtype):
        return torch.float64
    if isinstance(value, dict):
        return {key: _double(item) for key, item in value.items()}
    return [_double(item) for item in value] if isinstance(value, list) else value


def _bytes(values: Sequence[Any]) -> int:
    """Of all tensors in it, as many elements as they have: a view does not read what it leaves out."""
    total = 0
    for value in values:
        if isinstance(value, Tensor):
            total += value.numel() * value.element_size()
        elif isinstance(value, list):
            total += _bytes(value)
    return total
