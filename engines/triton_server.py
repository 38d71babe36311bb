"""A Triton Inference Server as cdm-serve sees it: is it there, has it this bundle's models, run one of them.

    server = TritonServer("127.0.0.1:8001", bundle.manifest)     # checks everything, or says what is wrong
    server.models["denoiser"].max_batch
    server.infer("denoiser", inputs, outputs)

Nothing is retried here.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput, InferResult
from tritonclient.grpc import model_config_pb2 as pb
from tritonclient.utils import InferenceServerException

from engines.bundle import Component, Manifest, TensorSpec
from engines.errors import RuntimeUnavailable
from engines.triton_repository.config import (
    PRECISION,
    TYPES,
    known_dims,
    model_name,
    tensor_dims,
    weights_key,
    weights_parameter,
)

CALL_TIMEOUT_S = 300.0
"""Far above any call that serves somebody; a server that hangs must not hang us for ever."""

ASK_TIMEOUT_S = 10.0
"""For questions that need no computing."""

CHANNEL = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.enable_http_proxy", 0),  # a proxy for the web is no way to a neighbour
    ("grpc.use_local_subchannel_pool", 1),  # a new client connects at once, whatever the last one's back-off
)

EXPORT_AGAIN = "write the repository again with cdm-export --to triton, and restart the server"


def connect(url: str) -> InferenceServerClient:
    """A client, to be closed; nothing has been asked yet."""
    return InferenceServerClient(url, channel_args=CHANNEL)


@dataclass(frozen=True)
class ServedModel:
    """What the server says of the model of one component. `gpus` are those that its instances are bound to."""

    name: str
    max_batch: int
    precision: str
    kinds: tuple[str, ...]
    gpus: tuple[int, ...]
    batching: bool
    queue_delay_us: int


class TritonServer:
    """A connection to the server at `url` (`HOST:PORT` of its gRPC endpoint), which has all of `manifest`'s components.

    Raises:
        RuntimeUnavailable: nobody answers, a model is missing or not ready, or is not the bundle's component.
    """

    def __init__(self, url: str, manifest: Manifest) -> None:
        if not re.fullmatch(r"[^/\s]+:\d{1,5}", url):
            raise RuntimeUnavailable(
                f"triton_url={url!r} is no address; give HOST:PORT of a Triton server's gRPC endpoint, as "
                "127.0.0.1:8001"
            )
        self.url = url
        self.client = connect(url)
        try:
            with self._asking():
                if not self.client.is_server_live(client_timeout=ASK_TIMEOUT_S):
                    raise RuntimeUnavailable(
                        f"the Triton server at {url} says that it is not live; see its log"
                    )
                about = self.client.get_server_metadata(client_timeout=ASK_TIMEOUT_S)
                self.name, self.version = str(about.name), str(about.version)
                self.models = {name: self._model(manifest, name) for name in manifest.components}
        except BaseException:
            self.close()
            raise

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        try:
            yield
        except InferenceServerException as error:
            raise RuntimeUnavailable(
                f"no Triton server answers gRPC at {self.url} ({reason(error)}); start it, or correct triton_url"
            ) from error

    def infer(
        self,
        component: str,
        inputs: Sequence[InferInput],
        outputs: Sequence[InferRequestedOutput],
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> InferResult:
        """Run `component`. Raises `InferenceServerException`."""
        name = self.models[component].name
        return self.client.infer(name, list(inputs), outputs=list(outputs), client_timeout=timeout_s)

    def close(self) -> None:
        """End the connection."""
        self.client.close()

    def _model(self, manifest: Manifest, component: str) -> ServedModel:
        name = model_name(manifest, component)
        if not self.client.is_model_ready(name, client_timeout=ASK_TIMEOUT_S):
            raise RuntimeUnavailable(self._why_not_ready(name))
        config = self.client.get_model_config(name, client_timeout=ASK_TIMEOUT_S).config
        where = f"the Triton server's model {name}"
        part = manifest.components[component]
        for problem in (*_tensor_problems(manifest, part, config), *self._weights_problems(part, config)):
            raise RuntimeUnavailable(f"{where} is not this bundle's {component}: {problem}; {EXPORT_AGAIN}")
        if config.max_batch_size < 1:
            raise RuntimeUnavailable(f"{where} takes no batches (max_batch_size is 0); {EXPORT_AGAIN}")
        kind = pb.ModelInstanceGroup.Kind.Name
        return ServedModel(
            name=name,
            max_batch=config.max_batch_size,
            precision=config.parameters[PRECISION].string_value
            if PRECISION in config.parameters
            else "unknown",
            kinds=tuple(
                dict.fromkeys(kind(group.kind).removeprefix("KIND_") for group in config.instance_group)
            ),
            gpus=tuple(gpu for group in config.instance_group for gpu in group.gpus),
            batching=config.HasField("dynamic_batching"),
            queue_delay_us=config.dynamic_batching.max_queue_delay_microseconds,
        )

    def _why_not_ready(self, name: str) -> str:
        index = self.client.get_model_repository_index(client_timeout=ASK_TIMEOUT_S).models
        known = {model.name: model for model in index}
        if name not in known:
            there = ", ".join(sorted(known)) or "none"
            return (
                f"the Triton server at {self.url} has no model {name!r} (it has: {there}); write one with cdm-export "
                "--to triton, and start the server with --model-repository naming that folder"
            )
        state = " ".join(part for part in (known[name].state, known[name].reason) if part) or "still loading"
        return f"the Triton server's model {name} is not ready: {state}; see the server's log"

    def _weights_problems(self, part: Component, config: Any) -> list[str]:
        """A repository that another hand has written says nothing of weights; then there is nothing to compare."""
        about = self.client.get_model_metadata(config.name, client_timeout=ASK_TIMEOUT_S)
        newest = max(int(version) for version in about.versions)  # what answers where no version is asked for
        key = weights_parameter(newest)
        if key in config.parameters and config.parameters[key].string_value != weights_key(part):
            return [f"version {newest} has other weights"]
        return []


def _tensor_problems(manifest: Manifest, part: Component, config: Any) -> Iterator[str]:
    for what, wanted, given in (("takes", part.inputs, config.input), ("gives", part.outputs, config.output)):
        found = {tensor.name: tensor for tensor in given}
        if set(found) != set(wanted):
            yield f"it {what} {', '.join(sorted(found))}, not {', '.join(sorted(wanted))}"
            return
        for name, spec in wanted.items():
            tensor = found[name]
            if tensor.data_type != TYPES[spec.dtype]:
                types = pb.DataType.Name(tensor.data_type), pb.DataType.Name(TYPES[spec.dtype])
                yield f"it {what} {name} as {types[0]}, not {types[1]}"
            elif not _dims_fit(manifest, spec, list(tensor.dims)):
                yield f"it {what} {name} of dimensions {list(tensor.dims)}, not {tensor_dims(spec)}"


def _dims_fit(manifest: Manifest, spec: TensorSpec, served: list[int]) -> bool:
    """Whether the model takes every shape that serving asks for: any size, or the only one there is."""
    wanted = spec.shape[1:] or (1,)
    needed = [
        {known_dims(manifest, size).get(dim) if isinstance(dim, str) else dim for size in manifest.sizes}
        for dim in wanted
    ]
    return len(served) == len(wanted) and all(
        dim == -1 or {dim} == values for dim, values in zip(served, needed, strict=True)
    )


def reason(error: InferenceServerException) -> str:
    """The first line of what went wrong."""
    lines = str(error.message() or error.status() or type(error).__name__).strip().splitlines()
    return lines[0] if lines else type(error).__name__
