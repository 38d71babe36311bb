"""Served fake engines for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from hypothesis import settings

from engines.bundle import Bundle
from engines.fake import fake_bundle
from tests.cdm_serve.helpers import PATIENCE_S, App, Gate

settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return fake_bundle(tmp_path_factory.mktemp("fake"))


@pytest.fixture
def serve(bundle: Bundle) -> Iterator[Callable[..., App]]:
    """Start an app with some settings; all are stopped at the end of the test, their gates opened.

    `before` is done to the app before it starts to warm up.
    """
    with ExitStack() as stack:

        def start(ready: bool = True, before: Callable[[App], None] = lambda _: None, **settings: Any) -> App:
            app = App(bundle, Gate(), **settings)
            before(app)
            stack.enter_context(app.client)
            stack.callback(app.gate.open)
            if ready:
                assert app.service.runner.ready.wait(PATIENCE_S)
            return app

        yield start


@pytest.fixture(scope="module")
def app(bundle: Bundle) -> Iterator[App]:
    """One app for the tests that leave nothing behind."""
    app = App(bundle, Gate())
    with app.client:
        assert app.service.runner.ready.wait(PATIENCE_S)
        yield app
