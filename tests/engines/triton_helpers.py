"""What tests against a real Triton server share."""

from __future__ import annotations

from tritonclient.grpc import InferenceServerClient

from benchmarks.tritonserver import TritonServer
from engines.base import EngineOptions
from tests.engines.pictures import Job

JOBS = [
    Job("red apple", 1, 4),
    Job("woman firefighter with tears and a flag of japan", 2, 2),
    Job("", 3, 8),
    Job("Face", 4, 1),
]


def options(server: TritonServer, **given: object) -> EngineOptions:
    return EngineOptions("triton", triton_url=server.url, **given)  # type: ignore[arg-type]


def regions(server: TritonServer) -> set[str]:
    """Names of the system shared memory that the server has open."""
    with InferenceServerClient(server.url) as client:
        return set(client.get_system_shared_memory_status().regions)
