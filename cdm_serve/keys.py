"""API keys: a JSON file of names, hashes and limits, and the command that writes it.

    python -m cdm_serve.keys new alice --keys keys.json --rate-per-minute 60    # prints the key, once
    cdm-serve --keys keys.json

    {"keys": [{"name": "alice", "sha256": "9f86…", "role": "user", "rate_per_minute": 60}]}

The file holds SHA-256 hashes without salt or stretching. Both of these protect secrets that can be guessed; a key is
256 bits from the system's generator, so a hash tells as much about it as about any other of 2^256. Stretching would
only make every request, a stranger's too, cost the server milliseconds.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import logging
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator
from pydantic_settings import CliPositionalArg

from engines.cli import CommandSettings, UsageError
from engines.commands import Command, run_commands

log = logging.getLogger("cdm_serve.keys")

PREFIX = "cdm_"  # so that a key in the wrong place is recognised as one
KEY_BYTES = 32
CHECK_S = 1.0
"""Seconds between two looks at the file's time."""
MODE = 0o600

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
Role = Literal["user", "admin"]


class Key(BaseModel):
    """One key's entry. A limit that is absent is none. `rate_per_minute` and `max_concurrent` count pictures."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: Name
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    role: Role = "user"
    rate_per_minute: int | None = Field(None, ge=1, le=1_000_000)
    max_concurrent: int | None = Field(None, ge=1, le=1_000_000)
    max_priority: int | None = Field(None, ge=0, le=9)


class KeyFile(BaseModel):
    """The whole file."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    keys: tuple[Key, ...]

    @model_validator(mode="after")
    def _each_once(self) -> KeyFile:
        for field in ("name", "sha256"):
            seen: set[str] = set()
            for key in self.keys:
                if (value := getattr(key, field)) in seen:
                    raise ValueError(f"two entries have the {field} of {key.name!r}; remove one")
                seen.add(value)
        return self


def hashed(secret: str) -> str:
    """The SHA-256 of a key, in hexadecimal."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def read_keys(path: Path) -> tuple[Key, ...]:
    """The file's entries.

    Raises:
        UsageError: it cannot be read, or does not say what it must. Values are never quoted: one may be a key.
    """
    try:
        return KeyFile.model_validate_json(path.read_bytes()).keys
    except OSError as error:
        raise UsageError(f"the keys in {path} cannot be read: {error.strerror or error}") from error
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(map(str, problem["loc"]))
        message = problem["msg"].removeprefix("Value error, ")
        # Not "from error": its own text quotes the value.
        raise UsageError(f"{path} is no file of keys: {where + ': ' if where else ''}{message}") from None


class KeyRing:
    """The keys of a file, read again when it changes. A file that is broken then is reported, and changes nothing."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.path = path
        self._clock = clock
        self._checked = clock()
        self._stamp = _stamp(path)
        self._keys = read_keys(path)
        log.info("%d keys in %s", len(self._keys), path)

    def find(self, secret: str) -> Key | None:
        """The entry of `secret`. It is compared with every entry, in the same time wherever they differ."""
        if (now := self._clock()) - self._checked >= CHECK_S:
            self._checked = now
            if _stamp(self.path) != self._stamp:
                self.reload()
        digest = hashed(secret)
        found = None
        for key in self._keys:
            if hmac.compare_digest(key.sha256, digest):
                found = key
        return found

    def reload(self) -> None:
        """Read the file now. Called on the event loop."""
        self._stamp = _stamp(self.path)
        try:
            self._keys = read_keys(self.path)
        except UsageError as error:
            log.error("%s; the %d keys read before stay in force", error, len(self._keys))
        else:
            log.info("read %d keys from %s again", len(self._keys), self.path)


def _stamp(path: Path) -> tuple[int, ...] | None:
    """What changes with the file; a mounted secret is changed by pointing a link elsewhere, so the inode counts."""
    try:
        status = path.stat()
    except OSError:
        return None
    return (status.st_mtime_ns, status.st_size, status.st_ino, status.st_dev)


class NewKey(CommandSettings):
    """Make a key, append its hash to the file and print it. It cannot be shown again."""

    name: CliPositionalArg[Name] = Field(description="whose key it is; stands in logs and metrics")
    keys: Path = Field(description="the file; made if there is none")
    role: Role = Field("user", description="an admin may also use /admin and /metrics")
    rate_per_minute: int | None = Field(None, ge=1, le=1_000_000, description="pictures a minute")
    max_concurrent: int | None = Field(None, ge=1, le=1_000_000, description="pictures in work at once")
    max_priority: int | None = Field(None, ge=0, le=9, description="highest priority it may ask for")


class RemoveKey(CommandSettings):
    """Take a key out of the file. A running server refuses it from then on; what it has in work is finished."""

    name: CliPositionalArg[Name] = Field(description="whose key it is")
    keys: Path = Field(description="the file")


class ListKeys(CommandSettings):
    """Show names, roles and limits."""

    keys: Path = Field(description="the file")


def new(settings: NewKey) -> None:
    """`new`: the key alone on standard output."""
    secret = PREFIX + secrets.token_urlsafe(KEY_BYTES)
    limits = settings.model_dump(include={"role", "rate_per_minute", "max_concurrent", "max_priority"})
    key = Key(name=settings.name, sha256=hashed(secret), **limits)
    with _edited(settings.keys, create=True) as keys:
        if any(other.name == key.name for other in keys):
            raise UsageError(
                f"{settings.keys} has a key named {key.name!r} already; choose another name, or remove it first"
            )
        keys.append(key)
    print(secret)
    print(f"{key.role} {key.name!r} is in {settings.keys}; the key is shown only this once", file=sys.stderr)


def remove(settings: RemoveKey) -> None:
    """`remove`."""
    with _edited(settings.keys) as keys:
        kept = [key for key in keys if key.name != settings.name]
        if len(kept) == len(keys):
            names = ", ".join(key.name for key in keys) or "none"
            raise UsageError(f"{settings.keys} has no key named {settings.name!r}; it has: {names}")
        keys[:] = kept


def show(settings: ListKeys) -> None:
    """`list`: an object a line, without the hash."""
    for key in read_keys(settings.keys):
        print(json.dumps(key.model_dump(exclude={"sha256"}, exclude_none=True)))


@contextmanager
def _edited(path: Path, create: bool = False) -> Iterator[list[Key]]:
    """The entries, to be changed; then the file is replaced as a whole. One writer at a time."""
    try:
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {path.parent}: {error.strerror}") from error
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        keys = [] if create and not path.exists() else list(read_keys(path))
        yield keys
        text = json.dumps({"keys": [key.model_dump(exclude_none=True) for key in keys]}, indent=1) + "\n"
        _replace(path.resolve(), text)
    finally:
        os.close(folder)


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(
            os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, MODE), "w", encoding="utf-8"
        ) as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
            if path.exists():  # the server's account must be able to read what root has changed
                with suppress(PermissionError):
                    os.fchown(out.fileno(), path.stat().st_uid, path.stat().st_gid)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UsageError(f"{path} cannot be written: {error.strerror or error}") from error


COMMANDS = {
    "new": Command("cdm_serve.keys:NewKey", "cdm_serve.keys:new", "make a key and print it once"),
    "remove": Command("cdm_serve.keys:RemoveKey", "cdm_serve.keys:remove", "take a key out"),
    "list": Command("cdm_serve.keys:ListKeys", "cdm_serve.keys:show", "show names, roles and limits"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m cdm_serve.keys COMMAND`; returns the exit code."""
    return run_commands(COMMANDS, argv, "python -m cdm_serve.keys", "API keys of cdm-serve.")


if __name__ == "__main__":
    raise SystemExit(main())
