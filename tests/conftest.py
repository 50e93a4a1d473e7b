"""Settings and fixtures of all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import emulated
import pytest
from doors import DOOR_PARAMS, HOST_DOORS, Door
from ranks import Worlds
from wrong import Arrays

try:  # the tests of `make gpu` need neither hypothesis nor pytest-timeout
    from hypothesis import settings
except ModuleNotFoundError:
    pass
else:
    # Examples are the same in every run under CI, so that a red run can be repeated; elsewhere they
    # are new each time. Timing on a shared machine says nothing, so there is no deadline.
    settings.register_profile("local", deadline=None, max_examples=60)
    settings.register_profile("ci", deadline=None, max_examples=60, derandomize=True, database=None)
    settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    if not pluginmanager.hasplugin("timeout"):
        parser.addini("timeout", "seconds a test may take; pytest-timeout is not installed")


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.hasplugin("timeout"):
        config.addinivalue_line("markers", "timeout: pytest-timeout is not installed")


@pytest.fixture(params=DOOR_PARAMS)
def door(request: pytest.FixtureRequest) -> Door:
    """Each door with each instruction set of this machine, and emulated CUDA."""
    return Door(*request.param)


@pytest.fixture(params=sorted({kind for kind, _ in HOST_DOORS}))
def a(request: pytest.FixtureRequest) -> Arrays:
    """Arrays and functions of each door."""
    return Arrays(request.param)


@pytest.fixture(autouse=True)
def repeatable_emulation() -> None:
    """A test alone meets the orders of threads that it meets in the whole run."""
    if emulated.EMULATOR is not None:
        emulated.EMULATOR.restart()


@pytest.fixture(scope="session")
def worlds() -> Iterator[Worlds]:
    """Ranks that stay up for the whole session: ``worlds(3).run(case)``."""
    started = Worlds()
    yield started
    started.close()


def pytest_unconfigure(config: pytest.Config) -> None:
    """Closes with what was emulated."""
    reporter = config.pluginmanager.getplugin("terminalreporter")
    if not emulated.LAUNCHED or reporter is None:
        return
    reports = [
        report
        for outcome in ("passed", "failed")
        for report in reporter.stats.get(outcome, [])
        if "emulated" in report.keywords
    ]
    reporter.write_line(emulated.summary(sum(report.duration for report in reports)))
