"""NVIDIA Triton Inference Server as a runtime: cdm-serve schedules, Triton executes.

    cdm-export --to triton …                                          # a model repository
    cdm-serve --engine triton --triton-url 127.0.0.1:8001

Every call is one request with one batch, which is why the repository's queue delay is 0: the scheduler has put the
batch together, and Triton would only wait for requests that do not come. Large tensors go through system shared memory
where the server can open it, all else in the request itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import ClassVar, TypeVar

try:
    from tritonclient.grpc import InferInput, InferRequestedOutput, InferResult
    from tritonclient.utils import InferenceServerException
except RuntimeError as error:  # tritonclient is here, what its gRPC part needs is not
    raise ModuleNotFoundError(str(error), name="tritonclient[grpc]") from error

from engines.base import EngineInfo, EngineOptions
from engines.bundle import Bundle, Size
from engines.errors import RuntimeUnavailable
from engines.rows import Array, HostEngine
from engines.triton_memory import Layout, SharedRegion, layouts_of, plain_input, span
from engines.triton_repository.config import known_dims
from engines.triton_server import CALL_TIMEOUT_S, TritonServer, reason

log = logging.getLogger("engines.triton")

DEAD = "StatusCode.UNAVAILABLE"
LATE = "StatusCode.DEADLINE_EXCEEDED"

Answer = TypeVar("Answer")


class TritonEngine(HostEngine):
    """A bundle whose components a Triton server has; whenever it connects, it checks that they are this bundle's.

    A call that fails is an `ExecutionError`. After one that found nobody there, or took too long, the next call
    connects anew: a server that comes back is used again.

    Args:
        shared_memory: False sends every tensor in the request.
        timeout_s: how long one call may take.

    Raises:
        RuntimeUnavailable: no server there, it lacks the bundle's models, or an option means nothing here.
    """

    runtime: ClassVar[str] = "triton"

    def __init__(
        self,
        bundle: Bundle,
        options: EngineOptions,
        *,
        shared_memory: bool = True,
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> None:
        super().__init__(bundle, options)
        self._refuse_what_means_nothing(options)
        self._options = options
        self._shares = shared_memory
        self._timeout_s = timeout_s
        self._server: TritonServer | None = None
        self._region: SharedRegion | None = None
        self._connected()

    def _refuse_what_means_nothing(self, options: EngineOptions) -> None:
        if not options.triton_url:
            raise RuntimeUnavailable(
                f"the {self.runtime} runtime needs triton_url, HOST:PORT of a Triton server's gRPC endpoint"
            )
        given = {"threads": (options.threads, 0), "cache_dir": (options.cache_dir, None)}
        for name, (value, nothing) in given.items():
            if value != nothing:
                raise RuntimeUnavailable(
                    f"{name}={value} means nothing to {self.runtime}, whose server has its own; leave it out"
                )

    @classmethod
    def precisions(cls, bundle: Bundle) -> tuple[str, ...]:
        return ("auto",)  # the server's

    def run(self, component: str, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """Run `component` on whole batches of up to `info.max_batch`."""
        return self._with_server(lambda: self._on_host(component, inputs))

    def _on_host(self, component: str, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        layouts = self._outputs_of(component, {name: array.shape for name, array in inputs.items()})
        result = self._infer(component, self._given(inputs), self._wanted(layouts))
        self._check_shapes_of(result, layouts)
        return {name: self._read(result, name) for name in layouts}

    def _given(self, arrays: Mapping[str, Array]) -> list[InferInput]:
        if self._region is not None:
            return self._region.inputs(arrays)
        return [plain_input(name, array) for name, array in arrays.items()]

    def _wanted(self, layouts: Mapping[str, Layout]) -> list[InferRequestedOutput]:
        if self._region is not None:
            return self._region.outputs(layouts)
        return [InferRequestedOutput(name) for name in layouts]

    def _read(self, result: InferResult, name: str) -> Array:
        if self._region is not None:
            return self._region.read(result, name)
        array: Array = result.as_numpy(name)
        return array

    def _infer(
        self, component: str, inputs: list[InferInput], outputs: list[InferRequestedOutput]
    ) -> InferResult:
        assert self._server is not None
        return self._server.infer(component, inputs, outputs, self._timeout_s)

    def _outputs_of(self, component: str, inputs: Mapping[str, tuple[int, ...]]) -> dict[str, Layout]:
        """What `component` gives for inputs of these shapes: places in shared memory are handed out before the call."""
        size, factor = self.manifest.default_size, self.manifest.latent.downscale
        if "x" in inputs:
            height, width = inputs["x"][2:]
            size = Size(width=width * factor, height=height * factor)
        batch = next(iter(inputs.values()))[0]
        specs = self.manifest.components[component].outputs
        return layouts_of(specs, batch, known_dims(self.manifest, size))

    @staticmethod
    def _check_shapes_of(result: InferResult, layouts: Mapping[str, Layout]) -> None:
        """What is in shared memory is read with the shapes that were expected; were those the server's?"""
        for output in result.get_response().outputs:
            shape, _ = layouts[output.name]
            if tuple(output.shape) != shape:
                raise InferenceServerException(
                    f"it gave {output.name} of shape {list(output.shape)}, not {list(shape)}"
                )

    # the connection

    def _with_server(self, call: Callable[[], Answer]) -> Answer:
        """`call`; a second time where the server was restarted since the last one, and knows our memory no more."""
        self._connected()
        try:
            return call()
        except InferenceServerException as error:
            gone = error.status() in (DEAD, LATE)
            restarted = not gone and not self._is_remembered()
            if gone or restarted:
                self._disconnect(late=error.status() == LATE)
            if not restarted:
                raise
        self._connected()
        return call()

    def _connected(self) -> None:
        """Connect, unless that is done.

        Raises:
            RuntimeUnavailable: there is nobody, or not who was there before.
        """
        if self._server is not None:
            return
        server = TritonServer(self._options.triton_url, self.manifest)
        try:
            info = self._describe(server)
            before = getattr(self, "info", info)
            if (before.precision, before.max_batch) != (info.precision, info.max_batch):
                raise RuntimeUnavailable(
                    f"the Triton server at {server.url} came back with {info.precision} and batches of "
                    f"{info.max_batch}, not {before.precision} and {before.max_batch}; restart cdm-serve"
                )
            self._share(server, info.max_batch)
        except BaseException:
            self._disconnect()  # what is shared already
            server.close()
            raise
        self._server, self.info = server, info

    def _describe(self, server: TritonServer) -> EngineInfo:
        options, models = self._options, server.models.values()
        precision = ", ".join(dict.fromkeys(model.precision for model in models))
        if options.precision not in ("auto", precision):
            raise RuntimeUnavailable(
                f"precision={options.precision!r} is not what the Triton server at {server.url} runs, which is "
                f"{precision}; leave it out, or write another repository with cdm-export --to triton"
            )
        max_batch = min(options.max_batch, *(model.max_batch for model in models))
        self._check_invariant(server, max_batch)
        for model in models:
            if model.queue_delay_us:
                log.warning(
                    "the Triton server lets every call of %s wait up to %d µs for others; cdm-serve has put the batch "
                    "together already, write the repository with a queue delay of 0",
                    model.name,
                    model.queue_delay_us,
                )
        kinds = "+".join(dict.fromkeys(kind for model in models for kind in model.kinds))
        return EngineInfo(
            runtime=self.runtime,
            version=server.version,
            device=f"{server.name} {server.version} at {server.url} ({kinds})",
            precision=precision,
            max_batch=max_batch,
            threads=0,
            invariant_batch=options.invariant_batch,
        )

    def _check_invariant(self, server: TritonServer, max_batch: int) -> None:
        group = self._options.invariant_batch
        if group > max_batch:
            raise RuntimeUnavailable(
                f"invariant_batch={group} exceeds the {max_batch} pictures that the Triton server at {server.url} "
                "takes at once; lower it, or write a repository with a larger max_batch"
            )
        joined = [model.name for model in server.models.values() if model.batching]
        if group and joined:
            raise RuntimeUnavailable(
                f"invariant_batch={group} cannot hold: the Triton server at {server.url} may join requests of "
                f"{joined[0]} with those of others; write a repository without dynamic batching"
            )

    def _share(self, server: TritonServer, max_batch: int) -> None:
        """Make the memory that calls of up to `max_batch` pictures go through."""
        if not self._shares:
            return
        try:
            self._region = SharedRegion(server.client, self._bytes(max_batch))
        except (OSError, InferenceServerException) as error:
            told = reason(error) if isinstance(error, InferenceServerException) else error
            log.warning("tensors go to the Triton server in its requests, without shared memory: %s", told)

    def _bytes(self, max_batch: int) -> int:
        """What the largest call takes, inputs and outputs."""
        return max(
            span({**layouts_of(part.inputs, max_batch, known), **layouts_of(part.outputs, max_batch, known)})
            for size in self.manifest.sizes
            for known in [known_dims(self.manifest, size)]
            for part in self.manifest.components.values()
        )

    def _is_remembered(self) -> bool:
        return self._region is None or self._region.is_registered()

    def _disconnect(self, late: bool = False) -> None:
        """Let go of the server and of what it shares; `late`: a call of ours may still be running there."""
        server, self._server = self._server, None
        region, self._region = self._region, None
        if region is not None:
            # A late call will write into the memory: the server keeps its mapping until it ends.
            if not late:
                region.unregister()
            region.destroy()
        if server is not None:
            server.close()

    def close(self) -> None:
        """End the connection; the server forgets the shared memory."""
        self._disconnect()
