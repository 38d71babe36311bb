"""`cdm-bench`: measure what is claimed. Every command prints a table, then one JSON line."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from types import FrameType

from engines.commands import Command, run_commands

COMMANDS = {
    "engine": Command(
        "benchmarks.engine:EngineBenchSettings",
        "benchmarks.engine:run",
        "one request through the bundle, beside diffusers and the teacher",
        extra="bench",
    ),
    "steps": Command(
        "benchmarks.steps:StepsBenchSettings",
        "benchmarks.steps:run",
        "one denoiser call and one request at every batch, beside diffusers, torch.compile and other runtimes",
        extra="bench",
        epilog="cdm-bench steps --bundle bundles/emoji --student runs/emoji-cdm/student --batches 1,2,4,8",
    ),
    "http": Command(
        "benchmarks.http:HttpBenchSettings",
        "benchmarks.http:run",
        "what HTTP, scheduling and image encoding add to the engine's own time",
        extra="bench",
        epilog="cdm-bench http\ncdm-bench http --url http://127.0.0.1:8000 --steps 1 --concurrency 1,8",
        user_errors=("benchmarks.server:ServerError",),
    ),
    "serve": Command(
        "benchmarks.serve:ServeBenchSettings",
        "benchmarks.serve:run",
        "the policies under open-loop load: goodput, latency and steps over a sweep of rates past saturation",
        extra="bench",
        epilog="cdm-bench serve --out results\n"
        "cdm-bench serve --bundle bundles/mine --max-batch 16 --rates 0.5x,1x,1.5x --duration 60 --rounds 5\n"
        "cdm-bench serve --url http://127.0.0.1:8000 --variants step,step+auto --rates 20,40",
        user_errors=("benchmarks.server:ServerError",),
    ),
    "soak": Command(
        "benchmarks.soak:SoakSettings",
        "benchmarks.soak:run",
        "overload for long, with callers who leave, send rubbish or read slowly: what is lost, left over or grows",
        extra="bench",
        epilog="cdm-bench soak --minutes 30 --load 1.2\n"
        "cdm-bench soak --engine fake --fake-costs benchmarks/costs/epyc-2-threads.json --minutes 3",
        user_errors=("benchmarks.server:ServerError",),
    ),
    "invariance": Command(
        "benchmarks.invariance:InvarianceSettings",
        "benchmarks.invariance:run",
        "what byte-identical pictures cost, whatever shares their batch",
        extra="bench",
        epilog="cdm-bench invariance --groups 1,4,8",
    ),
    "edges": Command(
        "benchmarks.edges:EdgesSettings",
        "benchmarks.edges:run",
        "what a decision of the scheduler costs in CPU time, by the queue's length",
        extra="bench",
        epilog="cdm-bench edges --costs gpu-like --waiting 8,64,512",
        user_errors=("benchmarks.server:ServerError",),
    ),
    "simulate": Command(
        "benchmarks.simulate:SimulateSettings",
        "benchmarks.simulate:run",
        "the policies on a virtual clock: the same figures for one replica or a thousand, in seconds",
        extra="bench",
        epilog="cdm-bench simulate --costs h200-scaling --rates 0.5x,0.9x,1.2x\n"
        "cdm-bench simulate --replicas 1000 --router two --duration 5 --trace bursty\n"
        "cdm-bench simulate --costs http://127.0.0.1:8000 --trace monday.csv --rates recorded",
        user_errors=("benchmarks.server:ServerError",),
    ),
    "roofline": Command(
        "benchmarks.roofline:RooflineSettings",
        "benchmarks.roofline:run",
        "the denoiser's FLOP/s beside the best matrix product here, and where the rest goes",
        extra="bench",
        epilog="cdm-bench roofline --bundle bundles/emoji --student runs/emoji-cdm/student --batches 1,8",
    ),
    "sensitivity": Command(
        "benchmarks.sensitivity:SensitivitySettings",
        "benchmarks.sensitivity:run",
        "what each layer of the denoiser costs in error when it computes in bfloat16",
        extra="bench",
        epilog="cdm-bench sensitivity --student runs/emoji-cdm/student",
    ),
    "rewrites": Command(
        "benchmarks.rewrites:RewritesBenchSettings",
        "benchmarks.rewrites:run",
        "what each exact rewrite of the model brings to a denoiser call",
        extra="bench",
        epilog="cdm-bench rewrites --longcat 8 --size 512x512 --threads 2 --work runs/rewrites\n"
        "cdm-bench rewrites --model runs/emoji-cdm/student --batches 1,8",
    ),
    "training": Command(
        "benchmarks.training:TrainingBenchSettings",
        "benchmarks.training:run",
        "student steps per second of our iteration against the authors' schedule of passes",
        extra="bench",
        epilog="cdm-bench training --teacher training/assets/teacher --n-max 28 --rounds 8",
    ),
    "ablation": Command(
        "benchmarks.ablation:AblationSettings",
        "benchmarks.ablation:run",
        "every objective with equal budgets and several seeds: Fréchet distance, alignment, diversity",
        extra="bench",
        epilog="cdm-bench ablation --seeds 0,1,2\ncdm-bench ablation --no-train",
    ),
    "finetune": Command(
        "benchmarks.finetune:FinetuneBenchSettings",
        "benchmarks.finetune:run",
        "a student learns a new domain: flow matching, CDM, CDM with a regulariser; blur and forgetting",
        extra="bench",
        epilog="cdm-bench finetune --teacher training/assets/teacher --student runs/emoji-cdm/student",
        user_errors=("training.errors:TrainingError",),
    ),
    "plan": Command(
        "benchmarks.plan:PlanBenchSettings",
        "benchmarks.plan:run",
        "what cdm-train plan predicts beside real runs on this CPU: peak memory and time, by phase",
        extra="bench",
        epilog="cdm-bench plan\ncdm-bench plan --only 10m,10m-checkpointing\ncdm-bench plan --blocks",
    ),
    "student": Command(
        "benchmarks.student:StudentBenchSettings",
        "benchmarks.student:run",
        "a few-step student beside its guided teacher on the same engine: end to end, and by parts",
        extra="bench",
        epilog="cdm-bench student --bundle bundles/emoji --steps 4 --teacher-steps 28",
    ),
    "build": Command(
        "benchmarks.build:BuildBenchSettings",
        "benchmarks.build:run",
        "export time and memory; every engine's build, load from cache and first picture; bytes on disk",
        extra="bench",
        epilog="cdm-bench build --student runs/emoji-cdm/student --runs 5",
    ),
    "bundle": Command(
        "benchmarks.bundle_quality:BundleBenchSettings",
        "benchmarks.bundle_quality:run",
        "a bundle's pictures beside its torch student's: PSNR, and the evaluator's scores",
        extra="bench",
        epilog="cdm-bench bundle --bundle bundles/emoji --student runs/emoji-cdm/student --prompts 200",
        user_errors=("training.errors:TrainingError",),
    ),
    "tensorrt": Command(
        "benchmarks.tensorrt:TensorRTBenchSettings",
        "benchmarks.tensorrt:run",
        "TensorRT-RTX engines for GPUs that need not be here: sizes, memory, fusions",
        extra="bench",
        epilog="cdm-bench tensorrt --bundle bundles/mine --capabilities 8.9,12.0 --cache-dir engines-cache",
    ),
    "gpu-acceptance": Command(
        "benchmarks.gpu_acceptance:GpuAcceptanceSettings",
        "benchmarks.gpu_acceptance:run",
        "on a GPU: build, parity, kernels, what only a GPU proves, all runtimes timed; one report",
        extra="bench",
        epilog="cdm-bench gpu-acceptance --out runs/gpu-acceptance\n"
        "cdm-bench gpu-acceptance --only kernels,torch,torch+kernels,torch-compile --precisions bf16\n"
        "cdm-bench gpu-acceptance --device cpu --size tiny",
    ),
    "triton": Command(
        "benchmarks.triton:TritonBenchSettings",
        "benchmarks.triton:run",
        "what a call costs through a Triton server, beside the same call in process",
        extra="dev",
        epilog="cdm-bench triton --bundle bundles/emoji",
        user_errors=("benchmarks.server:ServerError",),
    ),
    "coldstart": Command(
        "benchmarks.coldstart:ColdStartSettings",
        "benchmarks.coldstart:run",
        "from the start of cdm-serve to the first picture; install time and size",
        extra="bench",
        epilog="cdm-bench coldstart --runs 5\ncdm-bench coldstart --install",
        user_errors=("benchmarks.server:ServerError",),
    ),
}
"""Nothing is imported before its command is asked for."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sub-command that `argv` (default: the process's arguments) begins with.

    SIGTERM ends it as Ctrl-C does: the servers that it has started are stopped.
    """
    before = signal.signal(signal.SIGTERM, _end)
    try:
        return run_commands(COMMANDS, argv, "cdm-bench", "Measure engines and servers.")
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(number: int, frame: FrameType | None) -> None:
    del frame
    raise SystemExit(128 + number)


if __name__ == "__main__":
    raise SystemExit(main())
