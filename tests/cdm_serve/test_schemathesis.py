"""The served OpenAPI document against the server: generated requests, valid and not, to every operation of it.

Every run of the test suite sends the same bounded number of requests. `FUZZ_EXAMPLES=3000` sends as many to each
operation, drawn anew: `FUZZ_EXAMPLES=3000 python -m pytest tests/cdm_serve/test_schemathesis.py`.
"""

from __future__ import annotations

import io
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import booleans
from schemathesis import APIOperation, Case, GenerationMode, Response
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from cdm_serve import keys
from cdm_serve.protocol import BoundedHttp
from engines.bundle import Bundle
from tests.cdm_serve.helpers import App, Gate, listening

DEEP = int(os.environ.get("FUZZ_EXAMPLES", "0"))
EXAMPLES = DEEP or 25
# Shrinking a failure takes longer than finding it; the request that failed is printed as curl, and is small enough.
PHASES = (Phase.explicit, Phase.generate)
FUZZ = settings(
    max_examples=EXAMPLES,
    derandomize=not DEEP,
    database=None,
    deadline=None,
    phases=PHASES,
    suppress_health_check=list(HealthCheck),
)
CHECKS: list[Callable[..., Any]] = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
]
MODEL = "fake"
CREDENTIALS = ("authorization", "x-api-key")
# What a valid body may still be refused for, because JSON Schema cannot say it: `fields` that exclude each other,
# a size as a pair, a prompt of nothing but blanks; and 2.0, which JSON Schema calls an integer and we do not.
INEXPRESSIBLE = re.compile(
    r"goes with stream=true; |cannot be streamed|goes with (num_inference_)?steps=\"auto\"; |carries one picture|"
    r"is for jpeg and webp|prompt is empty|is not a size of this model|=-?\d+\.0\S* must be an integer"
)
# Where valid data is refused for what no schema could know: tensor sizes that follow from shapes, folders on a
# disk, the last model.
REFUSES_VALID_DATA = {"POST /v2/models/{model}/infer", "POST /admin/models", "DELETE /admin/models/{model}"}


class Target:
    """A served document, a key to send with each request, and how many requests have been sent to which operation."""

    def __init__(self, url: str, headers: dict[str, str]) -> None:
        self.url = url
        self.headers = headers
        self.schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
        self.sent: Counter[str] = Counter()

    def operations(self) -> list[APIOperation[Any, Any, Any, Any]]:
        return [found.ok() for found in self.schema.get_all_operations()]

    def fuzz(self, operation: APIOperation[Any, Any, Any, Any], mode: GenerationMode) -> None:
        def send(case: Case, served: bool) -> None:
            self.sent[operation.label] += 1
            for name in CREDENTIALS:
                case.headers.pop(name, None)
            if served and "model" in case.path_parameters:  # a drawn one is hardly ever there
                case.path_parameters["model"] = MODEL
            response = case.call(headers=self.headers)
            case.validate_response(response, checks=CHECKS)
            if mode == GenerationMode.POSITIVE and operation.label not in REFUSES_VALID_DATA:
                accepts_valid_data(case, response)

        FUZZ(given(case=operation.as_strategy(generation_mode=mode), served=booleans())(send))()


def accepts_valid_data(case: Case, response: Response) -> None:
    """Only what a schema cannot say is a reason to refuse what keeps to the schema; a drawn name need not be there."""
    if response.status_code == 404:
        assert case.path_parameters or case.query or "model" in (case.body or {}), case.as_curl_command()
        return
    if response.status_code in (400, 422):
        problems = response.json()["error"]["message"].split("; ")
        assert INEXPRESSIBLE.search("; ".join(problems)), f"{problems}: {case.as_curl_command()}"
        return
    assert response.status_code in (200, 429), case.as_curl_command()


def new_key(file: Path) -> str:
    """An admin's key, entered into a new `file`."""
    told = io.StringIO()
    with redirect_stdout(told):
        assert keys.main(["new", "operator", "--keys", str(file), "--role", "admin"]) == 0
    return told.getvalue().strip()


@pytest.fixture(scope="module", params=["open", "keyed"])
def target(
    request: pytest.FixtureRequest, bundle: Bundle, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Target]:
    """A server that is open to everybody, and one that asks for keys, with an admin's."""
    given: dict[str, Any] = {"admin_open": True}
    headers = {}
    if request.param == "keyed":
        file = tmp_path_factory.mktemp("keys") / "keys.json"
        given = {"keys": file}
        headers = {"x-api-key": new_key(file)}
    with listening(App(bundle, Gate(), **given), http=BoundedHttp) as url:
        yield Target(url, headers)


@pytest.mark.slow
def test_generated_requests_are_answered_as_the_document_says(target: Target) -> None:
    failures = []
    for operation in target.operations():
        varied = bool(operation.body or operation.query)
        for mode in GenerationMode if varied else [GenerationMode.POSITIVE]:
            try:
                target.fuzz(operation, mode)
            except (FailureGroup, AssertionError) as failure:
                failures.append(f"{operation.label}, {mode.value}: {failure!r}")
    assert not failures, "\n\n".join(failures)
    assert set(target.sent) == {operation.label for operation in target.operations()}
    assert target.sent["POST /generate"] >= EXAMPLES


def test_other_methods_than_the_documented_are_405(target: Target) -> None:
    paths = target.schema.raw_schema["paths"]
    with httpx.Client(base_url=target.url, headers=target.headers, trust_env=False) as client:
        for path, documented in paths.items():
            if path == "/v2/models/{model}/infer":
                continue  # a model's name may have slashes, so this is also the metadata of a model "fake/infer"
            for method in ("get", "post", "put", "patch", "delete"):
                if method not in documented:
                    answer = client.request(method, path.replace("{model}", MODEL))
                    assert answer.status_code == 405, (method, path)
                    assert {name.strip().lower() for name in answer.headers["allow"].split(",")} <= set(
                        documented
                    )


def test_without_a_key_every_documented_operation_that_wants_one_says_so(target: Target) -> None:
    guarded = [operation for operation in target.operations() if operation.definition.raw.get("security")]
    assert bool(guarded) == bool(target.headers)
    for operation in guarded:
        path = operation.path.replace("{model}", MODEL)
        answer = httpx.request(operation.method, target.url + path, trust_env=False)
        assert answer.status_code == 401, operation.label
        assert "401" in operation.definition.raw["responses"], operation.label
