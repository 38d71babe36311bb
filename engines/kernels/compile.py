"""Compile every kernel for every GPU generation, on a machine with or without a GPU, and say what each takes.

    python -m engines.kernels.compile

A table, then one JSON line. A kernel is compiled as a launch on SD3-Medium's or LongCat's shapes would compile it:
pointers and strides divisible by 16, the tile of that width. "mixed" is what our mixed precision runs: a float32
residual stream and modulation between bfloat16 products.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from engines.errors import RuntimeUnavailable
from engines.kernels import gate_residual_norm, layer_norm_modulate, qk_norm_rope
from engines.kernels.launch import INTERPRETED

ARCHITECTURES = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}
"""Compute capability ·10 → KiB of shared memory that one block may take there (CUDA programming guide)."""

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

EPS = 1e-6
"""Of every norm of both families."""

STREAM = {"x", "gate", "scale", "shift", "r", "cos", "sin"}
"""Pointers to float32 in mixed precision; all others are to bfloat16."""


class Case(NamedTuple):
    """One kernel as one model launches it."""

    kernel: Any
    model: str
    constants: dict[str, int]

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)


CASES = (
    Case(layer_norm_modulate.layer_norm_modulate_kernel, "SD3-Medium", layer_norm_modulate.tile(1536)),
    Case(layer_norm_modulate.layer_norm_modulate_kernel, "LongCat", layer_norm_modulate.tile(3072)),
    Case(gate_residual_norm.gate_residual_norm_kernel, "SD3-Medium", layer_norm_modulate.tile(1536)),
    Case(gate_residual_norm.gate_residual_norm_kernel, "LongCat", layer_norm_modulate.tile(3072)),
    Case(qk_norm_rope.qk_norm_rope_kernel, "SD3.5-Medium", qk_norm_rope.tile(24, 64, False, False)),
    Case(qk_norm_rope.qk_norm_rope_kernel, "LongCat", qk_norm_rope.tile(24, 128, True, False)),
    Case(qk_norm_rope.qk_norm_rope_kernel, "LongCat, interleaved", qk_norm_rope.tile(24, 128, True, True)),
)
PRECISIONS = ("mixed", "float32")


class Compiled(NamedTuple):
    """What the compiler and the assembler say of one kernel; bytes of shared memory per block, of stack per thread."""

    kernel: str
    model: str
    precision: str
    architecture: int
    warps: int
    registers: int
    spilled: int
    shared: int
    cubin: int


def compile_case(case: Case, precision: str, architecture: int) -> Compiled:
    """Compile one kernel to a cubin.

    Raises:
        RuntimeUnavailable: Triton was imported for its interpreter, which compiles nothing.
    """
    if INTERPRETED:
        raise RuntimeUnavailable("TRITON_INTERPRET=1 replaces Triton's compiler; unset it to compile kernels")
    constants = dict(case.constants)
    options = {"num_warps": constants.pop("num_warps")}
    signature = {
        parameter.name: "constexpr" if parameter.is_constexpr else _type(parameter, precision)
        for parameter in case.kernel.params
    }
    # A launch finds these out from its arguments: pointers by their address, strides by their value.
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or re.search("_(batch|token|head)$", name)
    }
    compiled = triton.compile(
        ASTSource(case.kernel, signature, constants | {"eps": EPS}, aligned),
        target=GPUTarget("cuda", architecture, 32),
        options=options,
    )
    cubin: bytes = compiled.asm["cubin"]
    usage = _usage(cubin)[case.name]
    return Compiled(
        case.name,
        case.model,
        precision,
        architecture,
        options["num_warps"],
        usage["REG"],
        usage["STACK"] + usage["LOCAL"],
        max(usage["SHARED"], compiled.metadata.shared),
        len(cubin),
    )


def _type(parameter: Any, precision: str) -> str:
    if parameter.annotation_type:  # a number
        return str(parameter.annotation_type)
    return "*fp32" if precision == "float32" or parameter.name in STREAM else "*bf16"


def _usage(cubin: bytes) -> dict[str, dict[str, int]]:
    """Function → what `cuobjdump` (it comes with Triton) says that it uses; LOCAL and STACK hold spilled registers."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        said = subprocess.run(
            [CUOBJDUMP, "-res-usage", path], capture_output=True, text=True, check=True
        ).stdout
    return {
        name: {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
        for name, line in re.findall(r"Function (\w+):\s*\n(.*)", said)
    }


def compile_all(architectures: Sequence[int] = tuple(ARCHITECTURES)) -> Iterator[Compiled]:
    """Every kernel, model and precision, for every architecture."""
    for case in CASES:
        for precision in PRECISIONS:
            for architecture in architectures:
                yield compile_case(case, precision, architecture)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table and the JSON line; 1 if a kernel spills or takes more shared memory than there is."""
    parser = argparse.ArgumentParser(
        prog="python -m engines.kernels.compile", description="Compile all GPU kernels."
    )
    parser.add_argument(
        "--architectures",
        type=int,
        nargs="+",
        choices=list(ARCHITECTURES),
        default=list(ARCHITECTURES),
        help="compute capabilities, times ten",
    )
    architectures = parser.parse_args(argv).architectures
    rows = list(compile_all(architectures))
    _print_table(rows, architectures)
    wrong = [row for row in rows if row.spilled or row.shared > ARCHITECTURES[row.architecture] * 1024]
    print(
        json.dumps(
            {"triton": triton.__version__, "kernels": [row._asdict() for row in rows], "wrong": len(wrong)}
        )
    )
    return 1 if wrong else 0


def _print_table(rows: Sequence[Compiled], architectures: Sequence[int]) -> None:
    lines = [["kernel", "model", "precision", "warps", *(f"sm_{number}" for number in architectures)]]
    cells: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        key = (row.kernel, row.model, row.precision, str(row.warps))
        cells.setdefault(key, []).append(f"{row.registers} {row.spilled} {row.shared}")
    lines += [[*key, *values] for key, values in cells.items()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print("registers per thread, bytes spilled per thread, bytes of shared memory per block\n")
    for line in lines:
        print("  ".join(value.ljust(width) for value, width in zip(line, widths, strict=True)).rstrip())


if __name__ == "__main__":
    raise SystemExit(main())
