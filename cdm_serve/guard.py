"""Who may ask: with `--keys`, every path needs a key, but those named here.

ASGI middleware rather than a dependency of routes: a route that somebody adds is closed until it is named here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers

from cdm_serve.errors import Forbidden, ServeError, Unauthorized, error_response
from cdm_serve.quota import CALLER, Account

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

    from cdm_serve.keys import Key, KeyRing
    from cdm_serve.metrics import Metrics

PROBES = frozenset({"/livez", "/readyz", "/v2/health/live", "/v2/health/ready"})
"""What orchestrators ask, which have no key; they tell up or down."""
PAGES = frozenset({"/", "/docs", "/openapi.json"})
"""What a browser opens by address, where no header can be given; the same for everybody."""
PAGE_FILES = "/page/"
METRICS = "/metrics"
ADMIN = "/admin"

HOW = "send it as 'Authorization: Bearer KEY' or as 'x-api-key: KEY'"


class Guard:
    """ASGI middleware: finds the caller's key; answers 401 or 403 where that does not open the path."""

    def __init__(self, app: ASGIApp, keys: KeyRing, metrics: Metrics, metrics_open: bool) -> None:
        self.app = app
        self._keys = keys
        self._metrics = metrics
        self._metrics_open = metrics_open
        self._accounts: dict[str, Account] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # there are none to open
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] == "http":
            try:
                # Set on every request, open ones too: a connection's next request may begin in the last one's context.
                CALLER.set(self._admit(scope))
            except ServeError as error:
                await error_response(error, scope["path"])(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _admit(self, scope: Scope) -> Account | None:
        """The caller's account, or none where the path needs no key.

        Raises:
            Unauthorized: there is no key, or no such key.
            Forbidden: the path is for admins.
        """
        path = scope["path"]
        if self._is_open(path):
            return None
        key = self._key(scope)
        scope["state"]["key"] = key.name
        if key.role != "admin" and (_is_under(path, ADMIN) or _is_under(path, METRICS)):
            raise Forbidden(
                f"{path} is for admins, the key {key.name!r} has the role {key.role!r}; use an admin's key",
                headers={"www-authenticate": f'{CHALLENGE}, error="insufficient_scope"'},
            )
        return self._account(key)

    def _is_open(self, path: str) -> bool:
        return (
            path in PROBES
            or path in PAGES
            or path.startswith(PAGE_FILES)
            or (self._metrics_open and path == METRICS)
        )

    def _key(self, scope: Scope) -> Key:
        headers = Headers(scope=scope)
        scheme, _, token = headers.get("authorization", "").partition(" ")
        secret = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        if not secret:
            raise Unauthorized(
                f"this server needs an API key; {HOW}", headers={"www-authenticate": CHALLENGE}
            )
        if (key := self._keys.find(secret)) is None:
            raise Unauthorized(
                "this is no API key of this server, or no longer one; ask its operator for another",
                headers={"www-authenticate": f'{CHALLENGE}, error="invalid_token"'},
            )
        return key

    def _account(self, key: Key) -> Account:
        account = self._accounts.get(key.name)
        if account is None:
            count = self._metrics.key_pictures.labels(key.name).inc
            account = self._accounts[key.name] = Account(key, count)
        elif account.key != key:  # the file was read again
            account.follow(key)
        return account


CHALLENGE = 'Bearer realm="cdm-serve"'
"""RFC 6750, section 3: what a 401 says about how to ask; an `error` is named only if there was a token."""


def _is_under(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder + "/")


def show_keys(document: dict[str, Any], metrics_open: bool) -> None:
    """Put the need for a key into an OpenAPI document."""
    document.setdefault("components", {})["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    }
    for path, operations in document["paths"].items():
        if path in PROBES or (path == METRICS and metrics_open):
            continue
        for operation in operations.values():
            operation["security"] = [{"bearer": []}, {"x-api-key": []}]
            operation["responses"].setdefault("401", {"description": "There is no API key, or no such key"})
            operation["responses"].setdefault("403", {"description": "The key may not do this"})
