"""The models of one server: the first is the default; others come and go at run time without a request being dropped.

models = Models(settings, [engine])
async with models:                               # every model works until the end of the body; leaving it drains
    service = models.find("emoji")               # None: the default
    await models.load(Path("bundles/mine"))      # loaded and warmed up beside the others, then served
    await models.unload("mine")                  # newcomers are refused, who was accepted is answered
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from cdm_serve.costs import CostModel
from cdm_serve.errors import InvalidRequest, LoadFailed, ModelNotFound, Unavailable
from cdm_serve.metrics import Metrics
from cdm_serve.safety import Safety
from cdm_serve.schemas import listed, quoted
from cdm_serve.service import Service
from cdm_serve.settings import ServeSettings
from cdm_serve.turns import Turns
from engines.base import Engine, load_engine
from engines.bundle import load_bundle
from engines.cli import UsageError
from engines.errors import BundleError, RuntimeUnavailable

if TYPE_CHECKING:
    from cdm_serve.otel import Tracing

log = logging.getLogger("cdm_serve.models")

POLL_S = 0.05
STOPPING = "the server is stopping; send the request again elsewhere"


@dataclass(frozen=True)
class Status:
    """One line about a model: `loading` (a folder, not yet a name), `warming`, `ready`, `draining` or `failed`."""

    name: str
    state: str
    warmed: tuple[int, int]
    """Warm-up calls made, and how many there are."""


class Models:
    """Owns its engines: closes each when it is unloaded, and all at the end. Lives on the event loop.

    `costs`: the first engine's cost model, if it shall not begin with the warm-up's measurements.

    Raises:
        BundleError: the settings' limits leave nothing of what a bundle can do.
        UsageError: two bundles have the same name; a file or function that the settings name is not there.
    """

    def __init__(
        self,
        settings: ServeSettings,
        engines: Sequence[Engine],
        costs: CostModel | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        assert engines
        self.settings = settings
        self.metrics = Metrics()
        self.draining = False
        self._safety = Safety(settings.block_list, settings.safety_hook, self.metrics)
        self._turns = Turns()
        self._tracing = tracing
        self._served: dict[str, Service] = {}
        self._loading: dict[Path, Service | None] = {}
        self._leaving: dict[Service, asyncio.Task[None]] = {}
        self._stuck: list[Service] = []
        """Gone, but an engine call of theirs has not returned."""
        self._one_load = asyncio.Lock()
        self._tasks: set[asyncio.Task[Service]] = set()
        self._loop: asyncio.AbstractEventLoop
        for number, engine in enumerate(engines):
            service = self._service(engine, None if number else costs)
            if service.name in self._served:
                raise UsageError(
                    f"two bundles have the name {service.name!r}, by which requests tell them apart; export one of "
                    "them anew with another --name"
                )
            self._served[service.name] = service

    def _service(self, engine: Engine, costs: CostModel | None = None) -> Service:
        return Service(self.settings, engine, self.metrics, self._safety, costs, self._turns, self._tracing)

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        try:
            for service in self._served.values():
                await service.__aenter__()
                service.show()
        except BaseException:
            for service in self._served.values():
                if service.entered:
                    await self._end(service)
                else:
                    service.engine.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self.drain()
        async with self._one_load:  # one that was under way gives up
            pass
        await asyncio.gather(
            *(self._end(service) for service in self._served.values()), *self._leaving.values()
        )

    @property
    def default(self) -> Service:
        """The model of requests that name none."""
        return next(iter(self._served.values()))

    @property
    def services(self) -> tuple[Service, ...]:
        """The models that requests can name, the default first."""
        return tuple(self._served.values())

    def find(self, name: str | None) -> Service:
        """The model of this name, or the default. Raises `ModelNotFound`."""
        if name is None:
            return self.default
        if name not in self._served:
            raise ModelNotFound(
                f"model={quoted(name)} is not served here; name one of {listed(map(quoted, self._served))}, or none",
                param="model",
            )
        return self._served[name]

    @property
    def broken(self) -> str | None:
        """What only a restart mends: of any model that is served, comes, goes, or is gone but holds its device."""
        coming = (service for service in self._loading.values() if service is not None)
        others = [
            service for service in (*coming, *self._leaving, *self._stuck) if not service.runner.failure
        ]
        return next(
            (reason for service in (*self._served.values(), *others) if (reason := service.broken)), None
        )

    @property
    def unavailable(self) -> str | None:
        """Why requests should go elsewhere: it is stopping, or one of its engines is broken."""
        return STOPPING if self.draining else self.broken

    @property
    def ended(self) -> bool:
        """Whether no engine is in a call, or will be."""
        return all(service.runner.ended for service in (*self._served.values(), *self._leaving, *self._stuck))

    def statuses(self) -> list[Status]:
        """Every model that is served, comes or goes."""
        lines = [Status(service.name, _state(service), service.runner.warmed) for service in self.services]
        for folder, coming in self._loading.items():
            if coming is None:
                lines.append(Status(str(folder), "loading", (0, 1)))
            else:
                lines.append(Status(coming.name, _state(coming), coming.runner.warmed))
        return lines + [Status(old.name, "draining", old.runner.warmed) for old in self._leaving]

    def drain(self) -> None:
        """Refuse newcomers from now on and let every model finish what it accepted."""
        self.draining = True
        for service in self._served.values():
            service.drain()

    def drain_soon(self) -> None:
        """`drain`, from a signal handler or another thread: it must not fall between a check and a submit."""
        self._loop.call_soon_threadsafe(self.drain)

    def give_up_soon(self) -> None:
        """Answer everybody who waits `Unavailable`, from a signal handler."""
        coming = (service for service in self._loading.values() if service is not None)
        for service in (*self._served.values(), *coming, *self._leaving):
            self._loop.call_soon_threadsafe(service.give_up)

    async def load(self, folder: Path) -> Service:
        """Serve the bundle in `folder`, once it is warm; until then, and if that fails, nothing changes.

        A served model of the same name is replaced without a gap: whom it had accepted it answers. Loads wait for
        each other.

        Raises:
            InvalidRequest: there is no bundle, or not one that this server can run.
            LoadFailed: its engine failed while it was warmed up.
            Unavailable: the server is stopping.
        """
        # A task of its own: who asked may leave, and half a load cannot be left behind.
        task = asyncio.ensure_future(self._load(folder))
        self._tasks.add(task)
        task.add_done_callback(self._loaded)
        return await asyncio.shield(task)

    def _loaded(self, task: asyncio.Task[Service]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.warning("a model was not loaded: %s", error)

    async def _load(self, folder: Path) -> Service:
        async with self._one_load:
            if self.draining:
                raise Unavailable(STOPPING)
            self._loading[folder] = None
            try:
                service = await asyncio.to_thread(self._opened, folder)
                self._loading[folder] = service
                try:
                    await self._warm(service, folder)
                except BaseException:
                    await self._end(service)
                    raise
            finally:
                del self._loading[folder]
            old = self._served.get(service.name)
            self._served[service.name] = service
            service.show()
            log.info("model %r is served from %s", service.name, folder)
        if old is not None:
            self._retire(old)
        return service

    async def _warm(self, service: Service, folder: Path) -> None:
        await service.__aenter__()
        while not (service.runner.ready.is_set() or service.broken or self.draining):
            await asyncio.sleep(POLL_S)
        if self.draining:
            raise Unavailable(STOPPING)
        if reason := service.broken:
            raise LoadFailed(f"the engine of {folder} failed in its warm-up: {reason}")

    async def unload(self, name: str) -> None:
        """Serve the model of this name no more; returns when whatever it had accepted is answered.

        Raises:
            ModelNotFound: there is none.
            InvalidRequest: it is the last one.
        """
        service = self.find(name)
        if len(self._served) == 1:
            raise InvalidRequest(
                f"model={quoted(name)} is the only one that is served; load another first, or stop the server"
            )
        del self._served[name]
        await asyncio.shield(self._retire(service))

    def _opened(self, folder: Path) -> Service:
        try:
            engine = load_engine(load_bundle(folder), self.settings.engine_options())
        except (BundleError, RuntimeUnavailable) as error:
            raise InvalidRequest(str(error), param="bundle") from error
        except Exception as error:  # whatever a runtime says of a graph that it cannot read
            log.exception("the bundle in %s could not be loaded", folder)
            raise LoadFailed(f"the runtime cannot load the bundle in {folder}: {error}") from error
        try:
            return self._service(engine)
        except BundleError as error:
            engine.close()
            raise InvalidRequest(str(error), param="bundle") from error

    def _retire(self, service: Service) -> asyncio.Task[None]:
        async def retire() -> None:
            try:
                await self._end(service)
            finally:
                del self._leaving[service]
                if service.name not in self._served:
                    self.metrics.forget(service.name)
            log.info("model %r is unloaded", service.name)

        self._leaving[service] = asyncio.ensure_future(retire())
        return self._leaving[service]

    async def _end(self, service: Service) -> None:
        await service.__aexit__()
        if service.runner.ended:
            await asyncio.to_thread(service.engine.close)
        else:  # it is in a call
            self._stuck.append(service)


def _state(service: Service) -> str:
    if service.runner.failure:
        return "failed"
    if service.draining:
        return "draining"
    return "ready" if service.runner.ready.is_set() else "warming"
