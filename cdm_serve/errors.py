"""What can go wrong with a request, and the status that each answer has.

    ServeError
    ├── InvalidRequest        422  a field has a value that cannot be served: names field, value and limit
    ├── ModelNotFound         404  another model than the served one was asked for
    ├── MalformedBody         400  the body is not JSON
    ├── UnsupportedMedia      415  the body does not say that it is JSON, or is compressed in an unknown way
    ├── BodyTooLarge          413  the body is longer than the limit
    ├── BodyTimeout           408  the body took too long to arrive
    ├── Unauthorized          401  there is no API key, or no such key
    ├── Forbidden             403  the key may not do this
    ├── RateLimited           429  the key has used up its rate; says when to come back
    ├── KeyBusy               429  the key has too many pictures in work; says when to come back
    ├── ContentRefused        400  prompt or picture is against the server's content policy
    ├── SafetyFailed          500  the picture could not be judged, so it is not shown
    ├── QueueFull             429  no permit is free; says when to come back
    ├── DeadlineInfeasible    429  it could not be finished in time; says when to come back
    ├── Unavailable           503  no engine to answer with: it is stopping or broken
    ├── GenerationFailed      500  the engine failed on this picture's batch
    ├── LoadFailed            500  the engine of a bundle to be loaded failed in its warm-up
    └── ClientGone            499  nobody is left to answer (never sent, only counted)

Every error answer has the same body, `{"error": {"message", "type", "param", "code"}}`, whoever raised it. Only under
/v2 it is the Open Inference Protocol's, `{"error": message}`. An invalid value is 400 under /v1 and /v2.
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


class ModelNotFound(ServeError):
    """The request names a model that is not served here."""


class MalformedBody(ServeError):
    """The body is not JSON."""


class UnsupportedMedia(ServeError):
    """The body's content-type is not JSON's."""


class BodyTooLarge(ServeError):
    """The body is longer than `--max-body-bytes`."""


class BodyTimeout(ServeError):
    """The body was not there within `--body-timeout-s`."""


class Unauthorized(ServeError):
    """No API key came with the request, or one that is not in `--keys`."""


class Forbidden(ServeError):
    """The caller's key does not allow it."""


class RateLimited(ServeError):
    """The caller's key has used up its rate for now."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message, headers=retry_headers(retry_after_s))


class KeyBusy(ServeError):
    """The caller's key has as many pictures in work as it may."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message, headers=retry_headers(retry_after_s))


class ContentRefused(ServeError):
    """`--block-list` refuses the prompt, or `--safety-hook` the picture."""


class SafetyFailed(ServeError):
    """`--safety-hook` could not judge a picture."""


class QueueFull(ServeError):
    """Accepting the request would exceed `--queue-limit`."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message, headers=retry_headers(retry_after_s))


class DeadlineInfeasible(ServeError):
    """Beside what was accepted before, the request's deadline cannot be met; `hopeless`: nor on an idle server."""

    def __init__(self, message: str, *, retry_after_s: float, hopeless: bool = False) -> None:
        # What OpenAI's client obeys before it looks at the time.
        retry = {"x-should-retry": "false"} if hopeless else {}
        super().__init__(message, param="deadline_ms", headers=retry_headers(retry_after_s) | retry)


class Unavailable(ServeError):
    """The server is stopping, or its engine cannot run."""


class GenerationFailed(ServeError):
    """An engine call failed; the other batches are not touched."""


class LoadFailed(ServeError):
    """A model could not be loaded; what was served before still is."""


class ClientGone(ServeError):
    """The client left before its answer was ready."""


def retry_headers(seconds: float) -> dict[str, str]:
    """When to come back, in whole seconds and, as OpenAI's client prefers, in milliseconds; both at least 1."""
    whole, ms = math.ceil(seconds), math.ceil(seconds * 1e3)
    return {"retry-after": str(max(1, whole)), "retry-after-ms": str(max(1, ms))}


TABLE: dict[type[ServeError], tuple[int, str, str]] = {
    InvalidRequest: (422, "invalid_request_error", "invalid_value"),
    ModelNotFound: (404, "invalid_request_error", "model_not_found"),
    MalformedBody: (400, "invalid_request_error", "malformed_json"),
    UnsupportedMedia: (415, "invalid_request_error", "unsupported_media_type"),
    BodyTooLarge: (413, "invalid_request_error", "body_too_large"),
    BodyTimeout: (408, "invalid_request_error", "body_timeout"),
    Unauthorized: (401, "invalid_request_error", "invalid_api_key"),
    Forbidden: (403, "invalid_request_error", "permission_denied"),
    RateLimited: (429, "rate_limit_error", "rate_limit_exceeded"),
    KeyBusy: (429, "rate_limit_error", "concurrency_limit_exceeded"),
    ContentRefused: (400, "invalid_request_error", "content_policy_violation"),
    SafetyFailed: (500, "server_error", "safety_check_failed"),
    QueueFull: (429, "rate_limit_error", "queue_full"),
    DeadlineInfeasible: (429, "rate_limit_error", "deadline_infeasible"),
    Unavailable: (503, "server_error", "unavailable"),
    GenerationFailed: (500, "server_error", "generation_failed"),
    LoadFailed: (500, "server_error", "load_failed"),
    ClientGone: (499, "client_error", "client_gone"),
}
"""Error → (status, `type`, `code`)."""


def error_response(error: ServeError, path: str = "") -> Response:
    """The answer to one of our own errors, in the envelope of the API that `path` belongs to."""
    status, kind, code = TABLE[type(error)]
    if status == 422 and path.startswith("/v1/"):
        status = 400  # as OpenAI's: its client raises BadRequestError, which is what callers catch
    if is_kserve(path):
        return kserve_envelope(400 if status == 422 else status, error.message, error.headers)
    return envelope(status, error.message, kind, code, error.param, error.headers)


def http_error_response(
    status: int, message: str, headers: Mapping[str, str] | None = None, path: str = ""
) -> Response:
    """The answer to an error the framework raised: no such path, another method, an unforeseen failure."""
    if is_kserve(path):
        return kserve_envelope(status, message, headers)
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return envelope(status, message, kind, HTTPStatus(status).name.lower(), None, headers)


def envelope(
    status: int, message: str, kind: str, code: str, param: str | None, headers: Mapping[str, str] | None
) -> Response:
    """The shape of every error body but those under /v2."""
    return _json({"error": {"message": message, "type": kind, "param": param, "code": code}}, status, headers)


def is_kserve(path: str) -> bool:
    """Whether `path` belongs to the Open Inference Protocol's API."""
    return path == "/v2" or path.startswith("/v2/")


def kserve_envelope(status: int, message: str, headers: Mapping[str, str] | None) -> Response:
    """The Open Inference Protocol's error body: a string is all that its clients read."""
    return _json({"error": message}, status, headers)


def _json(body: object, status: int, headers: Mapping[str, str] | None) -> Response:
    text = json.dumps(body, ensure_ascii=False).encode("utf-8", "backslashreplace")
    return Response(text, status, dict(headers or {}), media_type="application/json")
