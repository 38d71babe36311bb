"""One run on several processes: who computes which samples, and what they must agree on.

A single process is world size 1 and needs none of this. With more (`accelerate launch` or `torchrun`), `accelerate`
brings up the process group. The batch is divided, every sample keeps its own random numbers (`training/draws.py`), and
gradients are averaged, so that N processes learn what one would learn, to rounding.

Networks are not wrapped in DistributedDataParallel: a step has two forwards before one backward and several
micro-batches, and reducing the finished float32 gradients once an update is simpler, and exact in float32 where DDP
would reduce the bfloat16 copies. With `fsdp` torch's FSDP2 (`fully_shard`) shards the compute copies; masters, moments
and averages are then this process's shards.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor

from training.errors import TrainingError
from training.means import Values


class Parallel:
    """This process among its peers."""

    def __init__(self, device: torch.device, rank: int = 0, world: int = 1, fsdp: bool = False) -> None:
        self.device, self.rank, self.world = device, rank, world
        self.fsdp = fsdp and world > 1

    @classmethod
    def start(cls, device: str = "auto", mode: str = "ddp") -> Parallel:
        """Join the processes that `accelerate launch` or `torchrun` started; alone, if none did.

        Raises:
            TrainingError: a device that is not there, or one GPU for several processes.
        """
        if (processes := int(os.environ.get("WORLD_SIZE", "1"))) == 1:
            return cls(_device(device))
        if device not in ("auto", "cpu", "cuda"):
            raise TrainingError(
                f"--device={device} names one device, and {processes} processes take one each; leave it out, or choose "
                "GPUs with CUDA_VISIBLE_DEVICES"
            )
        from accelerate import PartialState

        state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available())
        return cls(state.device, state.process_index, state.num_processes, mode == "fsdp")

    @property
    def main(self) -> bool:
        """Whether this process writes files."""
        return self.rank == 0

    def share(self, batch: int) -> int:
        """Samples of a batch that each process computes."""
        return batch // self.world

    def parts(self, batch: int, micro_batch: int = 0) -> list[range]:
        """This process's samples of a batch, in micro-batches (0: one)."""
        share = self.share(batch)
        first, size = self.rank * share, micro_batch or share
        return [range(at, min(at + size, first + share)) for at in range(first, first + share, size)]

    def require_divisible(self, batch: int) -> None:
        """Refuse a batch that cannot be divided evenly.

        Raises:
            TrainingError: it cannot.
        """
        if batch % self.world:
            raise TrainingError(
                f"--batch={batch} cannot be divided among {self.world} processes; give a multiple of {self.world}"
            )

    def shard(self, net: nn.Module, units: Sequence[str]) -> nn.Module:
        """Shard `net` in place with FSDP2, a unit each block whose class `units` names; without `fsdp` nothing."""
        if self.fsdp:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

            mesh = init_device_mesh(self.device.type, (self.world,))
            # Inputs keep their type: rounding times to bfloat16 would quantise them.
            policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
            for module in net.modules():
                if type(module).__name__ in units:
                    fully_shard(module, mesh=mesh, mp_policy=policy)
            # By default the outermost unit stays gathered after a forward, and would not see what is put into its
            # shards until a backward: the averaged weights of a sample grid, and then the student's own again.
            fully_shard(net, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        return net

    def average_(self, gradients: Sequence[Tensor]) -> None:
        """Average gradients over processes, in place; sharded ones are averaged already."""
        if self.world > 1 and not self.fsdp:
            # In place and all under way at once: a flat copy of a large model's gradients would be gigabytes.
            works = [dist.all_reduce(gradient, async_op=True) for gradient in gradients]
            for work in works:
                work.wait()
            torch._foreach_div_(list(gradients), float(self.world))

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """Euclidean norm of all gradients together, over all shards."""
        norm = nn.utils.get_total_norm(gradients)
        if self.fsdp:
            square = norm.square()
            dist.all_reduce(square)
            norm = square.sqrt()
        return norm

    def mean(self, values: Values) -> Values:
        """Means over processes; the names are the same on all."""
        if self.world == 1:
            return values
        flat = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(flat)
        return dict(zip(values, (flat / self.world).tolist(), strict=True))

    def barrier(self) -> None:
        """Wait for all."""
        if self.world > 1:
            dist.barrier()

    def agree(self, value: bool) -> bool:
        """Whether any process says so."""
        if self.world == 1:
            return value
        flag = torch.tensor(float(value), device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, or the tensor; shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(shard: Tensor, parameter: Tensor) -> Tensor:
    """`shard` as a sharded tensor laid out as `parameter`; a plain parameter's is itself."""
    if not isinstance(parameter, DTensor):
        return shard
    return DTensor.from_local(
        shard, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
    )


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor; every process takes part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def laid_out(shards: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`like`, by name."""
    return {name: like(shard, parameters[name]) for name, shard in shards.items()}


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise TrainingError(
            f"--device={name} cannot be used ({reason}); give auto, cpu, or a GPU that torch sees"
        ) from error
    return device
