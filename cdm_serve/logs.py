"""Log lines, as text or as JSON objects, with the id of the request they belong to.

configure("json", "info")
log.info("%d keys", 3, extra={"fields": {"keys": 3}})     # {"time": …, "message": "3 keys", "request_id": …, "keys": 3}

No prompt, key or picture gets into a log unless `--log-prompts` is given. We log none; but an exception's message may
quote whatever the code that raised it was given (a safety hook's, a library's), so that of a trace only the places and
the exceptions' types are written.
"""

from __future__ import annotations

import copy
import json
import logging
import sys
import traceback
from contextvars import ContextVar
from datetime import UTC, datetime
from types import TracebackType
from typing import IO, Literal

ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]

REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")
"""Set by `front.py`; empty outside requests. `Picture.context` carries it to other threads."""
TRACE_ID: ContextVar[str] = ContextVar("trace_id", default="")
"""Set by `otel.py`, as 32 hex digits; empty where nothing is traced."""


def configure(format: Literal["text", "json"], level: str, prompts: bool = False) -> None:
    """Send the process's log to standard error. Does nothing where it is configured already."""
    logging.basicConfig(level=level.upper(), handlers=[handler(format, prompts)])
    logging.getLogger("uvicorn").setLevel(logging.WARNING)


def handler(
    format: Literal["text", "json"], prompts: bool = False, stream: IO[str] | None = None
) -> logging.Handler:
    """What writes lines of `format` to `stream` (default: standard error)."""
    made = logging.StreamHandler(sys.stderr if stream is None else stream)
    made.setFormatter(JsonLines(prompts) if format == "json" else TextLines(prompts))
    return made


class Discreet(logging.Formatter):
    """Leaves the messages of exceptions out of traces, unless `prompts` may be logged."""

    def __init__(self, prompts: bool) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")
        self._prompts = prompts

    def format(self, record: logging.LogRecord) -> str:
        record = copy.copy(record)
        record.exc_text = None  # another handler's trace, messages included, would be taken over
        return self.line(record)

    def line(self, record: logging.LogRecord) -> str:
        """The line of a record that is ours alone."""
        return super().format(record)

    def formatException(self, ei: ExcInfo) -> str:
        if self._prompts or ei[1] is None:
            return super().formatException(ei)
        return "\n".join(trace(ei[1]))


def trace(error: BaseException) -> list[str]:
    """Where `error` and what led to it were raised: places and types, first cause first, no messages."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    lines = []
    for link in reversed(chain):
        lines.append("Traceback (most recent call last; messages are shown with --log-prompts):")
        lines += "".join(traceback.format_tb(link.__traceback__)).splitlines()
        lines.append(f"{type(link).__module__}.{type(link).__qualname__}")
    return lines


class TextLines(Discreet):
    """`time level logger: message request_id=…`."""

    def line(self, record: logging.LogRecord) -> str:
        if request_id := REQUEST_ID.get():
            record.msg, record.args = f"{record.getMessage()} request_id={request_id}", None
        return super().line(record)


class JsonLines(Discreet):
    """One object a line; what a call gives as `extra={"fields": {…}}` stands beside the rest."""

    def line(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        entry = {
            "time": time.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request_id := REQUEST_ID.get():
            entry["request_id"] = request_id
        if trace_id := TRACE_ID.get():
            entry["trace_id"] = trace_id
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps({**entry, **getattr(record, "fields", {})}, default=str)
