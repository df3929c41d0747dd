"""Fixtures that every test may use; what they give is described in fakes.py."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
for folder in (str(HERE), str(HERE.parent)):
    if folder not in sys.path:
        sys.path.insert(0, folder)

pytest.register_assert_rewrite("faults")

from fakes import Gateway, Provider, Script, ShiftedLoop  # noqa: E402  (after the path is set)
from house import House, entry  # noqa: E402


def pytest_configure(config: Any) -> None:
    config.addinivalue_line("markers", "soak: takes a minute by design; leave it out with -m 'not soak'")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes a minute by waiting goes first, so that others run beside it to its end."""
    items.sort(key=lambda item: item.get_closest_marker("soak") is None)


def serve_provider() -> Iterator[Provider]:
    """A scripted provider, closed at the end; a mistake in a script fails the test."""
    provider = Provider()
    yield provider
    provider.close()


def make_gateways() -> Iterator[Callable[..., Gateway]]:
    """A function with Gateway's parameters that returns a running gateway; all are removed at the end."""
    made: list[Gateway] = []

    def make(*arguments: object, **named: object) -> Gateway:
        made.append(Gateway(*arguments, **named))
        return made[-1].start()

    yield make
    for gateway in made:
        gateway.remove()


provider = pytest.fixture(serve_provider, name="provider")
module_provider = pytest.fixture(serve_provider, scope="module", name="module_provider")
gateway_factory = pytest.fixture(make_gateways, name="gateway_factory")
module_gateway_factory = pytest.fixture(make_gateways, scope="module", name="module_gateway_factory")


@pytest.fixture
def clock() -> Iterator[ShiftedLoop]:
    """An event loop whose time the test moves: clock.run_until_complete(...), clock.advance(60)."""
    loop = ShiftedLoop()
    yield loop
    loop.close()


@pytest.fixture
def build(provider: Provider) -> Iterator[Callable[..., House]]:
    """build(a=script, b=script, carousel={...}, entries={"a": {...}}): a house with one provider per script, in that order."""
    houses: list[House] = []

    def make(*, carousel: dict[str, Any] | None = None, entries: dict[str, dict[str, Any]] | None = None, **scripts: Script) -> House:
        models: dict[str, Any] = {name: {**entry(provider.listen(name, script)), **(entries or {}).get(name, {})} for name, script in scripts.items()}
        houses.append(House({**models, "carousel": {"maxWait": 30, **(carousel or {})}}))
        return houses[-1].start()

    yield make
    for house in houses:
        house.remove()
