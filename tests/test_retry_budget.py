"""What many failures at once lead to: every request goes on to a provider that nothing is held against; tries of those known to fail are few.

A wave is a number of requests whose first attempts are all under way when they begin to fail.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import aicarousel
import pytest
from fakes import Client, Pause, Provider, Request, Script, answer, healthy
from house import House

Build = Callable[..., House]
OOPS = answer({"error": {"message": "Oops.", "type": "server_error"}}, 500)
LATER = answer({"error": {"message": "Slow down."}}, 429, [("retry-after", "100")])


def held(name: str, then: Script) -> Script:
    """Waits for the test before it answers."""
    return lambda request: [Pause(name), *(then(request) if callable(then) else then)]


def turning(n_first: int, first: Script, then: Script) -> Script:
    """Another script once `n_first` requests have come."""
    seen = Counter()

    def play(request: Request) -> Any:
        seen["requests"] += 1
        script = first if seen["requests"] <= n_first else then
        return script(request) if callable(script) else script
    return play


def send(house: House, stack: ExitStack, n: int, streamed: bool = False) -> list[Client]:
    return [stack.enter_context(house.start_chat("both", stream=streamed)) for _ in range(n)]


def statuses(clients: list[Client]) -> Counter[int]:
    return Counter(client.read_all().status for client in clients)


def both(build: Build, carousel: dict[str, Any] | None = None, **scripts: Script) -> House:
    """Providers behind one name, tried in this order."""
    return build(**scripts, carousel={"fallback": "none", "aliases": {"both": list(scripts)}, "maxWait": 0, **(carousel or {})})


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("n", [1, 5, 30])
def test_all_go_on_to_the_next_provider(build: Build, provider: Provider, n: int, streamed: bool) -> None:
    """However many fail in the same instant, and although the next is slow: nothing is held against it."""
    house = both(build, a=held("a", OOPS), b=held("b", healthy("fine")))
    with ExitStack() as stack:
        clients = send(house, stack, n, streamed)
        provider.wait_paused("a", n)
        provider.release("a")
        provider.wait_paused("b", n)
        provider.release("b")
        assert statuses(clients) == {200: n}
    assert (len(provider.calls("a")), len(provider.calls("b"))) == (n, n)
    assert len(house.gateway.relay.running) == house.gateway.relay.n_retrying == 0


@pytest.mark.parametrize(("n", "carousel", "n_tries"), [
    (2, {}, 2), (3, {}, 3), (10, {}, 3), (40, {}, 8), (40, {"limits": {"retryBudget": 0.5}}, 20), (10, {"limits": {"retryBudget": 0, "retryBudgetLeast": 0}}, 0),
    (10, {"limits": {"retryBudgetLeast": 7}}, 7)])
def test_few_try_a_provider_that_fails_once_more(build: Build, provider: Provider, n: int, carousel: dict[str, Any], n_tries: int) -> None:
    """A lone provider is asked once more after a fault of its own; of a wave a fifth does so at a time, three at least, and the others are told at once."""
    house = both(build, carousel, a=turning(n, held("first", OOPS), held("again", healthy("fine"))))
    with ExitStack() as stack:
        clients = send(house, stack, n)
        provider.wait_paused("first", n)
        provider.release("first")
        house.wait(lambda: sum("attempt.failed" in line for line in house.lines) == n)
        house.pass_time(0.5)                # the pause before a further try
        provider.wait_paused("again", n_tries)
        house.wait(lambda: len(house.gateway.relay.running) == house.gateway.relay.n_retrying == n_tries)
        provider.release("again")
        assert statuses(clients) == Counter({200: n_tries, 502: n - n_tries})
    assert len(provider.calls("a")) == n + n_tries
    assert len(house.gateway.relay.running) == house.gateway.relay.n_retrying == 0


def test_a_success_ends_the_counting(build: Build, provider: Provider) -> None:
    """From its first content on a further try has served: its provider is well, and long streams do not use the budget up."""
    house = both(build, {"limits": {"retryBudget": 0, "retryBudgetLeast": 1}}, a=turning(1, OOPS, lambda request: [*healthy("fine")(request)[:-3], Pause("streaming"), *healthy("fine")(request)[-3:]]))
    with ExitStack() as stack:
        [client] = send(house, stack, 1, streamed=True)
        house.wait_line("attempt.failed")
        house.pass_time(0.5)
        provider.wait_paused("streaming")
        house.wait(lambda: house.gateway.relay.n_retrying == 0)
        assert len(house.gateway.relay.running) == 1
        provider.release("streaming")
        assert client.read_all().text == "fine"


def test_who_leaves_gives_its_place_back(build: Build, provider: Provider) -> None:
    house = both(build, a=turning(1, OOPS, held("again", healthy())))
    with house.start_chat("both"):
        house.wait_line("attempt.failed")
        house.pass_time(0.5)
        provider.wait_paused("again")
        house.wait(lambda: house.gateway.relay.n_retrying == 1)
    house.wait(lambda: not house.gateway.relay.running)
    assert house.gateway.relay.n_retrying == 0


@pytest.mark.parametrize(("fault", "n_asked"), [(OOPS, 0), (LATER, 0)], ids=["guessed", "proven"])
def test_what_others_have_just_found_out_counts(build: Build, provider: Provider, fault: Script, n_asked: int) -> None:
    """A provider that failed for another request since the plan was made is passed over, where there is a better one; explain tells it."""
    house = both(build, a=held("a", OOPS), b=fault, c=healthy("fine"))
    with ExitStack() as stack:
        clients = send(house, stack, 10)
        provider.wait_paused("a", 10)
        assert house.chat("b/m").status >= 429
        n_before = len(provider.calls("b"))
        provider.release("a")
        assert statuses(clients) == {200: 10}
    assert len(provider.calls("b")) - n_before == n_asked and len(provider.calls("c")) == 10
    [why] = {why for decision in house.gateway.decisions for _, why in decision.passed_over}
    assert why == "out_by_now" and any("had just failed for another request" in line for decision in house.gateway.decisions for line in aicarousel.explain_lines(decision))


def test_what_a_provider_said_of_its_time_is_kept_to(build: Build, provider: Provider) -> None:
    """With nothing else left either: one that named a time to another request is not asked before it."""
    house = both(build, a=held("a", OOPS), b=LATER)
    with ExitStack() as stack:
        clients = send(house, stack, 3)
        provider.wait_paused("a", 3)
        assert house.chat("b/m").status == 429
        provider.release("a")
        assert statuses(clients) == {502: 3}
    assert len(provider.calls("b")) == 1


def test_a_storm_at_dead_providers(build: Build, provider: Provider) -> None:
    """Two hundred requests at once while both providers fail: hardly more is asked than once each, and all are answered at once."""
    house = both(build, a=OOPS, b=OOPS)
    house.chat("both")                      # by now both are known to fail
    n_before = len(provider.calls("a")) + len(provider.calls("b"))
    with ExitStack() as stack:
        assert statuses(send(house, stack, 200)) == {502: 200}
    assert 200 <= len(provider.calls("a")) + len(provider.calls("b")) - n_before <= 300
    assert len(house.gateway.relay.running) == house.gateway.relay.n_retrying == 0
