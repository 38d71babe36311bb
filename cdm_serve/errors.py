"""What can go wrong with a request, and the status that each answer has.

    ServeError
    ├── InvalidRequest        422  a field has a value that cannot be served: names field, value and limit
    ├── MalformedBody         400  the body is not JSON
    ├── UnsupportedMedia      415  the body does not say that it is JSON
    ├── BodyTooLarge          413  the body is longer than the limit
    ├── QueueFull             429  no permit is free; says when to come back
    ├── DeadlineInfeasible    429  it could not be finished in time; says when to come back
    ├── Unavailable           503  no engine to answer with: it is stopping or broken
    ├── GenerationFailed      500  the engine failed on this picture's batch
    └── ClientGone            499  nobody is left to answer (never sent, only counted)

Every error answer has the same body, `{"error": {"message", "type", "param", "code"}}`, whoever raised it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from http import HTTPStatus

from starlette.responses import Response


class ServeError(Exception):
    """Base of every error that a client is answered with. `param` is the field at fault, if one is."""

    def __init__(
        self, message: str, *, param: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.headers = dict(headers or {})


class InvalidRequest(ServeError):
    """A field has a value that cannot be served."""


class MalformedBody(ServeError):
    """The body is not JSON."""


class UnsupportedMedia(ServeError):
    """The body's content-type is not JSON's."""


class BodyTooLarge(ServeError):
    """The body is longer than `--max-body-bytes`."""


class QueueFull(ServeError):
    """Accepting the request would exceed `--queue-limit`."""

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(message, headers={"retry-after": str(retry_after_s)})


class DeadlineInfeasible(ServeError):
    """Beside what was accepted before, the request's deadline cannot be met."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        seconds, ms = math.ceil(retry_after_s), math.ceil(retry_after_s * 1e3)
        super().__init__(
            message,
            param="deadline_ms",
            headers={"retry-after": str(max(1, seconds)), "retry-after-ms": str(ms)},
        )


class Unavailable(ServeError):
    """The server is stopping, or its engine cannot run."""


class GenerationFailed(ServeError):
    """An engine call failed; the other batches are not touched."""


class ClientGone(ServeError):
    """The client left before its answer was ready."""


TABLE: dict[type[ServeError], tuple[int, str, str]] = {
    InvalidRequest: (422, "invalid_request_error", "invalid_value"),
    MalformedBody: (400, "invalid_request_error", "malformed_json"),
    UnsupportedMedia: (415, "invalid_request_error", "unsupported_media_type"),
    BodyTooLarge: (413, "invalid_request_error", "body_too_large"),
    QueueFull: (429, "rate_limit_error", "queue_full"),
    DeadlineInfeasible: (429, "rate_limit_error", "deadline_infeasible"),
    Unavailable: (503, "server_error", "unavailable"),
    GenerationFailed: (500, "server_error", "generation_failed"),
    ClientGone: (499, "client_error", "client_gone"),
}
"""Error → (status, `type`, `code`)."""


def error_response(error: ServeError) -> Response:
    """The answer to one of our own errors."""
    status, kind, code = TABLE[type(error)]
    return envelope(status, error.message, kind, code, error.param, error.headers)


def http_error_response(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    """The answer to an error the framework raised: no such path, another method, an unforeseen failure."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return envelope(status, message, kind, HTTPStatus(status).name.lower(), None, headers)


def envelope(
    status: int, message: str, kind: str, code: str, param: str | None, headers: Mapping[str, str] | None
) -> Response:
    """The one shape of every error body."""
    body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    text = json.dumps(body, ensure_ascii=False).encode("utf-8", "backslashreplace")
    return Response(text, status, dict(headers or {}), media_type="application/json")
