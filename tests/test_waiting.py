"""Whom a request waits for and whom it does not: misfits, failures, lines that are fair by key, caches worth waiting for. Section 8 alone, then at work in section 20."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

import aicarousel
from aicarousel import MISFITS, Facts, Plan, Route, note_cached, note_served, reserve, settle
from fakes import TEXT, Client, Pause, Provider, Reply, answer, chat_answer, chat_body, healthy, in_turn
from house import House
from test_queue import Enforcer, open_house, send
from test_quota import Pool, entry

Json = dict[str, Any]
Build = Callable[..., House]
OOPS = answer({"error": {"message": "Oops.", "type": "server_error"}}, 500)
SLOW = answer({"error": {"message": "Slow down."}}, 429, [("retry-after", "7")])
BAD = answer({"error": {"message": "Invalid 'messages'.", "type": "invalid_request_error"}}, 400)
IMAGE = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]}
BLIND = {"models": [{"id": "m", "vision": False}]}


# ------------------------------------------------------------------ section 7: what fits

def plan_of(pool: Pool, unfit: str = "", *, now: float = 1.0, facts: Facts = Facts(10, 10), give_up_at: float = 31.0, asked: list[str] | None = None) -> Plan:
    """A plan for a request that providers named by a letter of `unfit` cannot serve; `asked` collects whom it was tried on."""
    def fits(route: Route) -> str:
        if asked is not None:
            asked.append(route.provider.name)
        return "too_small" if route.provider.name in unfit else ""
    return aicarousel.plan(pool.catalogue, pool.choice, pool.state, now, strategy=pool.strategy, fallback="chain", facts=facts, asked_at=1.0, give_up_at=give_up_at, fits=fits)


def fill(pool: Pool, *names: str, now: float = 0.0) -> None:
    """Takes one request's room of these providers."""
    for route in pool.routes():
        if route.provider.name in names:
            settle(pool.ledger, reserve(pool.ledger, route, 10, 10, now), 10, 10, now)


def cool_down(pool: Pool, name: str, kind: str, *, proven: bool, cool_s: float, now: float = 0.0) -> None:
    route = next(route for route in pool.routes() if route.provider.name == name)
    aicarousel.cool(pool.state, route, aicarousel.UpstreamFailure(kind, f"{kind} failure", scope="credential", proven=proven, cool_s=cool_s), now, jitter=0.5)


FULL = {"limits": {"rpm": 1}}


@pytest.mark.parametrize("out", ["full", "cooling, proven", "cooling, guessed"])
def test_a_free_route_that_does_not_fit_hides_no_fitting_one_that_is_soon_free(out: str) -> None:
    pool = Pool({"a": entry("m"), "b": entry("m", **FULL), "c": entry("m", **FULL)})
    if out == "full":
        fill(pool, "b", now=-50.0)
    else:
        cool_down(pool, "b", "rate", proven=out.endswith("proven"), cool_s=9.0)
    fill(pool, "c")
    found = plan_of(pool, "ac")
    assert found.routes == () and found.free_at is not None and 8.0 <= found.free_at <= 11.0 and [wait.route.provider.name for wait in found.waits] == ["b"]
    why = {route.provider.name: why for route, why in found.skipped}
    assert why["a"] == why["c"] == "too_small" and "s left" in why["b"]
    later = plan_of(pool, "ac", now=found.free_at)
    assert [route.provider.name for route in later.routes][0] == "b"


def test_what_fits_nowhere_waits_for_nothing() -> None:
    pool = Pool({"a": entry("m"), "b": entry("m", **FULL), "c": entry("m")})
    fill(pool, "b", now=-50.0)
    cool_down(pool, "c", "server", proven=False, cool_s=5.0)
    found = plan_of(pool, "abc")
    assert (found.routes, found.free_at, found.waits) == ((), None, ()) and {why for _, why in found.skipped} == {"too_small"} and len(found.skipped) == 3


def test_last_resorts_and_routes_beyond_a_free_plan_must_fit_too() -> None:
    pool = Pool({"n": entry("m", preset="nvidia"), "b": entry("m"), "c": entry("m"), "d": entry("m")})
    for _ in range(40):
        fill(pool, "n")
    for name in "bc":
        cool_down(pool, name, "server", proven=False, cool_s=5.0)
    for unfit, expected in (("", "d n b c"), ("d", "n b c"), ("db", "n c"), ("dbn", "c"), ("dbnc", "")):
        found = plan_of(pool, unfit)
        assert " ".join(route.provider.name for route in found.routes) == expected and {route.provider.name for route, why in found.skipped if why == "too_small"} == set(unfit)


def test_a_named_time_is_tested_only_by_what_fits() -> None:
    pool = Pool({"a": entry("m"), "b": entry("m"), "c": entry("m")})
    cool_down(pool, "a", "rate", proven=True, cool_s=4000.0)
    cool_down(pool, "b", "rate", proven=True, cool_s=8000.0)
    for unfit, expected in (("c", "a"), ("ca", "b"), ("cab", "")):
        found = plan_of(pool, unfit, now=2500.0, give_up_at=2530.0)
        assert "".join(route.provider.name for route in found.routes) == expected and {route.provider.name for route, why in found.skipped if why == "too_small"} == set(unfit)


def test_a_request_too_large_for_a_route_that_cools_waits_for_no_end_of_days(build: Build) -> None:
    house = build(a=in_turn(answer({"error": {"message": "Slow down."}}, 429), healthy()), entries={"a": {"limits": {"tpm": 300}}}, carousel={"maxWait": 0})
    assert house.post("/v1/chat/completions", chat_body(None, "few words", max_tokens=1)).status == 429
    reply = house.post("/v1/chat/completions", chat_body(None, "word " * 400, max_tokens=1))
    assert reply.status == 400 and reply.error["code"] == "context_length_exceeded"


def test_one_route_is_looked_at_where_the_first_fits() -> None:
    pool, asked = Pool({f"p{number:03}": entry("m") for number in range(200)}), list[str]()
    assert len(plan_of(pool, asked=asked).routes) == 200 and asked == ["p000"]
    asked.clear()
    found = plan_of(pool, "p000 p001", asked=asked)
    assert len(found.routes) == 198 and asked == ["p000", "p001", "p002"] and all(why in MISFITS for _, why in found.skipped)


# ------------------------------------------------------------------ section 7: what a cache is worth

def conversation(n_cached: list[int], *, rpm: int = 2) -> Pool:
    """Two providers; a conversation on the first, which is full until 60.5, with what its turns found in the cache."""
    pool = Pool({"a": entry("m", limits={"rpm": rpm}), "b": entry("m")})
    for n_tokens in n_cached:
        note_served(pool.state, pool.routes()[0], TALK, 100.0, 0.0)
        note_cached(pool.state, TALK, n_tokens)
    for _ in range(rpm):
        fill(pool, "a")
    return pool


TALK = Facts(10, 10, "talk", True)
WORTH: list[tuple[str, list[int], float, str]] = [       # tokens found in the cache by turn, when it is asked, what comes of it
    ("nothing measured", [], 41.0, "repin"),
    ("20 s worth, 19.5 s to wait", [0, 40_000], 41.0, "wait"),
    ("20 s worth, 20.5 s to wait", [0, 40_000], 40.0, "repin"),
    ("a prompt grows: the last counts", [10_000, 20_000, 40_000], 41.0, "wait"),
    ("it found less once: half of it", [40_000, 0], 51.0, "wait"),
    ("it found less once: no longer than half of it", [40_000, 0], 49.0, "repin"),
    ("nothing for some turns", [40_000, 0, 0, 0, 0, 0, 0], 60.0, "repin"),
    ("what no provider keeps", [1023], 60.3, "repin"),
    ("the least that is kept", [1024], 60.1, "wait"),
]


@pytest.mark.parametrize(("what", "n_cached", "at", "expected"), WORTH, ids=[row[0] for row in WORTH])
def test_a_conversation_waits_for_its_cache_as_long_as_that_saves(what: str, n_cached: list[int], at: float, expected: str) -> None:
    pool = conversation(n_cached or [0])
    found = aicarousel.plan(pool.catalogue, pool.choice, pool.state, at, strategy="round-robin", fallback="chain", facts=TALK, asked_at=at, give_up_at=at + 30.0)
    if expected == "wait":
        assert (found.routes, found.free_at, found.session) == ((), 60.5, "hit") and [wait.route.provider.name for wait in found.waits] == ["a"]
    else:
        assert found.session == expected and found.routes[0].provider.name == "b"


def test_the_wait_for_a_cache_is_counted_once_and_within_what_the_client_waits() -> None:
    def session(at: float, asked_at: float, give_up_at: float, **more: Any) -> str:
        found = aicarousel.plan(pool.catalogue, pool.choice, pool.state, at, strategy="round-robin", fallback="chain", facts=TALK, asked_at=asked_at, give_up_at=give_up_at, **more)
        return "wait" if not found.routes else found.session
    pool = conversation([40_000])
    assert session(45.0, 45.0, 75.0) == "wait"
    assert session(55.0, 40.0, 75.0) == "repin", "20 seconds since it asked are over before there is room"
    assert session(45.0, 45.0, 60.0) == "moved", "nobody waits beyond maxWait"
    assert session(45.0, 45.0, 75.0, fits=lambda route: "no_vision" if route.provider.name == "a" else "") == "moved"
    assert session(360.0, 360.0, 390.0) == "hit", "its hour is not over"
    fill(pool, "a", "a", now=345.0)
    fill(pool, "a", now=345.0)
    assert session(360.0, 360.0, 420.0) == "repin", "but its cache is likely gone"


def test_a_conversation_takes_no_cache_along() -> None:
    pool = conversation([40_000])
    first, second = pool.routes()
    note_served(pool.state, second, TALK, 100.0, 1.0)
    assert pool.state.sessions["talk"].n_cached == 0
    note_cached(pool.state, Facts(session="another"), 5)
    note_cached(pool.state, Facts(), 5)
    assert list(pool.state.sessions) == ["talk"], "what is measured of unknown conversations is not kept"


def test_no_conversation_waits_longer_than_its_cache_saves() -> None:
    """A seeded simulation: 40 conversations, half of them with caches, on two narrow providers beside a wide one."""
    dice, waited, longest, repins = random.Random(11), Counter[str](), 0.0, 0
    pool = Pool({"a": entry("m", limits={"rpm": 6}), "b": entry("m", limits={"rpm": 6}), "c": entry("m")})
    now = 0.0
    for _ in range(4000):
        number = dice.randrange(40)
        facts, saves = Facts(10, 10, f"talk {number}", True), number % 2 * 1000 * number
        now += dice.expovariate(1.0)
        at, worth_s = now, getattr(pool.state.sessions.get(facts.session), "n_cached", 0) / 2000.0
        while not (found := aicarousel.plan(pool.catalogue, pool.choice, pool.state, at, strategy="round-robin", fallback="chain", facts=facts, asked_at=now, give_up_at=now + 30.0)).routes:
            assert found.free_at is not None and found.free_at > at
            at = found.free_at
        assert at - now <= worth_s, (facts, at - now)
        waited["cached" if saves else "not"] += at > now
        longest, repins = max(longest, at - now), repins + (found.session == "repin")
        route = found.routes[0]
        aicarousel.begin_attempt(pool.state, pool.choice, route)
        settle(pool.ledger, reserve(pool.ledger, route, 10, 10, at), 10, 10, at)
        note_served(pool.state, route, facts, 100.0, at)
        note_cached(pool.state, facts, saves if found.session == "hit" else 0)
        now = max(now, at)
    assert waited["not"] == 0 and waited["cached"] > 5 and repins > 10 and longest > 3.0, (waited, repins, longest)


# ------------------------------------------------------------------ section 7: strategies that look at more than one request

def dispatch(pool: Pool, now: float) -> tuple[str, aicarousel.Hold]:
    """A request that goes out and stays under way: to whom, and what ends it."""
    route = aicarousel.plan(pool.catalogue, pool.choice, pool.state, now, strategy=pool.strategy, fallback="chain").routes[0]
    aicarousel.begin_attempt(pool.state, pool.choice, route)
    aicarousel.clear(pool.state, route)
    return route.credential.id, reserve(pool.ledger, route, 10, 10, now)


def test_least_busy_always_takes_one_with_the_fewest_requests_under_way() -> None:
    """Poisson arrivals at three keys, one of which takes ten times as long: each request goes to a key with the least under way."""
    pool, dice, now = Pool({"a": entry("m", keys=["env:KEY_1", "env:KEY_2"]), "b": entry("m")}, strategy="least-busy"), random.Random(7), 0.0
    under_way: dict[str, list[tuple[float, aicarousel.Hold]]] = {"a/1": [], "a/2": [], "b/1": []}
    served, most = Counter[str](), 0
    for _ in range(3000):
        now += dice.expovariate(2.0)
        for ends in under_way.values():
            for end in [end for end in ends if end[0] <= now]:
                ends.remove(end)
                settle(pool.ledger, end[1], 10, 10, now)
        least = min(map(len, under_way.values()))
        name, hold = dispatch(pool, now)
        assert len(under_way[name]) == least
        under_way[name].append((now + dice.expovariate(1.0 if name != "b/1" else 0.1), hold))
        served[name] += 1
        most = max(most, *map(len, under_way.values()))
    assert most >= 3 and served["b/1"] < min(served["a/1"], served["a/2"]) / 3, (served, most)


def test_weights_hold_over_any_stretch_and_who_was_out_does_not_catch_up() -> None:
    weights = {"a": 5, "b": 3, "c": 1}
    pool = Pool({name: entry("m", weight=weight) for name, weight in weights.items()}, strategy="weighted")
    order = [dispatch(pool, 0.0)[0][0] for _ in range(900)]
    for start in range(0, 891):
        counts = Counter(order[start:start + 9])
        assert all(abs(counts[name] - weight) <= 1 for name, weight in weights.items()), (start, counts)
    cool_down(pool, "a", "rate", proven=True, cool_s=60.0)
    assert Counter(dispatch(pool, 1.0)[0][0] for _ in range(400)) == {"b": 300, "c": 100}
    again = Counter(dispatch(pool, 61.0)[0][0] for _ in range(90))
    assert all(abs(again[name] - 10 * weight) <= 1 for name, weight in weights.items()), again


# ------------------------------------------------------------------ section 20: waiting

def picture(**fields: Any) -> Json:
    return {**chat_body(None), "messages": [IMAGE], **fields}


def post(house: House, body: Json, headers: dict[str, str] | None = None, key: str | None = None) -> Client:
    """A request that the gateway has taken in."""
    client, n_before = house.connect(), house.gateway.n_requests
    client.send(house.request_bytes("POST", "/v1/chat/completions", body, headers, **({"key": key} if key else {})))
    house.wait(lambda: house.gateway.n_requests > n_before)
    house.settle()
    return client


def test_a_picture_waits_for_the_route_that_sees_and_holds_nobody_up(build: Build, provider: Provider) -> None:
    house = build(a=healthy(), b=healthy(), entries={"a": BLIND, "b": {"limits": {"rpm": 1}}})
    assert house.chat("b/m", stream=False).status == 200
    house.pass_time(40.0)
    waiting = post(house, picture())
    assert len(house.gateway.relay.lines) == 1
    for _ in range(4):
        assert house.chat("aicarousel", stream=False).headers["x-aicarousel-provider"] == "a"
    house.pass_time(21.0)
    reply = waiting.read_all()
    assert reply.status == 200 and reply.headers["x-aicarousel-provider"] == "b" and not house.gateway.relay.lines
    assert [request.json["messages"][0] == IMAGE for request in provider.calls("b")] == [False, True]


def test_a_dry_run_tells_how_long_it_would_wait(build: Build) -> None:
    house = build(a=healthy(), entries={"a": {"limits": {"rpm": 1}}})
    key = aicarousel.create_key(house.database, "admin", limits={"admin": True})[0]
    assert house.chat("aicarousel", stream=False).status == 200
    assert house.request("POST", "/admin/explain", chat_body(None), key=key).json["lines"][1:] == ["left out:", "  a/1:m: quota: 1 request a minute (configured), 60 s left"]
    house.pass_time(45.0)
    [told] = house.request("POST", "/admin/explain", chat_body(None), key=key).json["lines"][3:]
    assert told.startswith("would wait 15") and told.endswith(" ms in line") and not house.gateway.relay.lines


def test_what_will_not_be_free_in_time_is_a_429_and_what_fits_nowhere_a_400(build: Build, provider: Provider) -> None:
    house = build(a=healthy(), b=healthy(), entries={"a": BLIND, "b": {"limits": {"rpm": 1}}})
    assert house.chat("b/m", stream=False).status == 200
    late = house.post("/v1/chat/completions", picture())
    assert late.status == 429 and 55 <= int(late.headers["retry-after"]) <= 61 and "b/m" in late.error["message"] and "a/m" not in late.error["message"]
    house = build(a=healthy(), c=healthy(), entries={"a": BLIND, "c": BLIND})
    nowhere = house.post("/v1/chat/completions", picture())
    assert nowhere.status == 400 and "reads no images" in nowhere.error["message"]


GOES_ON: list[tuple[str, Any, int, int]] = [         # what the only free route does, status the client gets, calls of it
    ("server", OOPS, 200, 2), ("not json", answer(b"x", headers=[("content-type", "application/json")]), 200, 2), ("credential", answer({"error": {"message": "No."}}, 401), 200, 1),
    ("too long", answer({"error": {"message": "maximum context length is 10 tokens"}}, 400), 200, 1), ("limit, no time named", answer({"error": {"message": "Slow down."}}, 429), 200, 1),
    ("the request itself", BAD, 400, 1)]


@pytest.mark.parametrize(("what", "script", "status", "n_calls"), GOES_ON, ids=[row[0] for row in GOES_ON])
def test_a_failure_waits_for_another_route_that_is_soon_free(build: Build, provider: Provider, what: str, script: Any, status: int, n_calls: int) -> None:
    house = build(a=script, b=healthy(), entries={"b": {"limits": {"rpm": 1}}})
    assert house.chat("b/m", stream=False).status == 200
    house.pass_time(45.0)
    client = send(house)
    house.wait_line("attempt.failed")
    house.wait(lambda: len(provider.calls("a")) >= 1)
    if status == 200:
        for _ in range(4):
            house.pass_time(4.0)
    reply = client.read_all()
    assert reply.status == status and len(provider.calls("a")) == n_calls and len(provider.calls("b")) == 1 + (status == 200), reply.raw
    assert status != 200 or reply.text == TEXT and not house.gateway.relay.lines
    assert all(bucket.n_open == 0 for bucket in house.gateway.relay.state.ledger.buckets.values())


def test_a_failure_waits_no_longer_than_it_may_and_tries_no_more_than_it_may(build: Build, provider: Provider) -> None:
    house = build(a=OOPS, b=healthy(), entries={"b": {"limits": {"rpm": 1}}})
    assert house.chat("b/m", stream=False).status == 200
    assert house.chat("aicarousel", stream=False).error["attempts"][0]["status"] == 500, "60 seconds are more than maxWait"
    house = build(a=OOPS, b=healthy(), entries={"b": {"limits": {"rpm": 1}}}, carousel={"maxAttempts": 2})
    assert house.chat("b/m", stream=False).status == 200
    house.pass_time(45.0)
    assert house.chat("aicarousel", stream=False).status == 502 and len(provider.calls("a")) == 4, "both attempts are used up at once"


def test_guesses_about_broken_routes_are_not_waited_for(build: Build, provider: Provider) -> None:
    house = build(a=OOPS, b=OOPS)
    assert house.chat("aicarousel", stream=False).status == 502
    n_before = len(provider.requests)
    again = house.chat("aicarousel", stream=False)      # both cool now: last resorts, asked once each and at once
    assert again.status == 502 and [attempt["provider"] for attempt in again.error["attempts"]] in (["a", "b"], ["b", "a"]) and len(provider.requests) == n_before + 2


def test_a_limit_without_a_time_is_not_asked_again_by_the_request_that_met_it(build: Build, provider: Provider) -> None:
    house = build(a=answer({"error": {"message": "Slow down."}}, 429))
    assert house.chat("aicarousel", stream=False).status == 429 and len(provider.calls("a")) == 1


def test_who_allows_no_other_provider_waits_for_none(build: Build, provider: Provider) -> None:
    house = build(a=OOPS, b=healthy(), entries={"b": {"limits": {"rpm": 1}}})
    assert house.chat("b/m", stream=False).status == 200
    house.pass_time(45.0)
    reply = house.post("/v1/chat/completions", {**chat_body(None), "provider": {"allow_fallbacks": False}})
    assert reply.status == 502 and {attempt["provider"] for attempt in reply.error["attempts"]} == {"a"}
    house = build(a=in_turn(SLOW, healthy()), b=healthy(), entries={"b": {"limits": {"rpm": 1}}})
    client = post(house, {**chat_body(None), "provider": {"allow_fallbacks": False}})
    house.wait_line("attempt.failed")
    house.pass_time(8.0)
    assert client.read_all().headers["x-aicarousel-provider"] == "a", "but for the one that it has"


# ------------------------------------------------------------------ section 20: lines

def new_key(house: House, name: str) -> str:
    return aicarousel.create_key(house.database, name)[0]


def served(provider: Provider, name: str = "a") -> list[str]:
    return [request.json["messages"][-1]["content"] for request in provider.calls(name)]


def test_a_burst_of_one_key_does_not_keep_another_waiting(build: Build, provider: Provider) -> None:
    house = build(a=in_turn([Pause("one"), *answer(chat_answer())], answer(chat_answer())), entries={"a": {"maxConcurrent": 1}})
    other, third = new_key(house, "other"), new_key(house, "third")
    clients = [send(house, "burst 0")]
    provider.wait_paused("one")
    clients += [send(house, f"burst {number}") for number in range(1, 200)]
    clients += [post(house, chat_body(None, f"{name} {number}"), key=key) for number in range(3) for name, key in (("other", other), ("third", third))]
    house.settle()
    [line] = house.gateway.relay.lines.values()
    assert sum(map(len, line.values())) == 205
    provider.release("one")
    assert [client.read_all().status for client in clients] == [200] * 206
    texts = served(provider)
    assert texts[1:10] == ["burst 1", "other 0", "third 0", "burst 2", "other 1", "third 1", "burst 3", "other 2", "third 2"]
    assert [text for text in texts if text.startswith("burst")] == [f"burst {number}" for number in range(200)] and not house.gateway.relay.lines


def test_a_line_has_an_end_and_whoever_comes_then_is_told_when_to_come_again(build: Build, provider: Provider) -> None:
    script = Enforcer(2, 60.0)
    house = open_house(build, {"a": script}, entries={"a": {"limits": {"rpm": 2}}}, carousel={"limits": {"queue": 3}, "maxWait": 130})
    assert [house.chat("aicarousel", stream=False).status for _ in range(2)] == [200, 200]
    waiting = [send(house, f"number {number}") for number in range(3)]
    refused = house.chat("aicarousel", stream=False)
    assert refused.status == 429 and 55 <= int(refused.headers["retry-after"]) <= 61 and "3 requests waiting for" in refused.error["message"] and refused.error["type"] == "rate_limit_error"
    waiting.pop().close()
    house.settle()
    waiting.append(send(house, "in time"))
    house.pass_time(61.0)
    house.wait(lambda: len(script.served) == 4)
    house.pass_time(61.0)
    assert [client.read_all().status for client in waiting] == [200] * 3 and script.texts[2:] == ["number 0", "number 1", "in time"] and script.n_refused == 0


def test_without_a_queue_nobody_waits(build: Build) -> None:
    house = build(a=healthy(), entries={"a": {"limits": {"rpm": 1}}}, carousel={"limits": {"queue": 0}, "maxWait": 90})
    assert house.chat("aicarousel", stream=False).status == 200
    refused = house.chat("aicarousel", stream=False)
    assert refused.status == 429 and 55 <= int(refused.headers["retry-after"]) <= 61 and not house.gateway.relay.lines


def test_a_reset_beyond_the_deadline_never_queues_even_where_others_wait(build: Build) -> None:
    house = build(a=healthy(), b=healthy(), entries={"a": {"limits": {"rpm": 1}}, "b": {**BLIND, "limits": {"rpm": 1}}})
    assert [house.chat(f"{name}/m", stream=False, headers={"x-aicarousel-no-fallback": "1"}).status for name in "b"] == [200]
    house.pass_time(35.0)
    assert house.chat("a/m", stream=False, headers={"x-aicarousel-no-fallback": "1"}).status == 200
    waiting = send(house)                               # b is free in 25 s
    late = house.post("/v1/chat/completions", picture())        # and a, which alone reads images, in 60 s
    assert late.status == 429 and 55 <= int(late.headers["retry-after"]) <= 61 and len(house.gateway.relay.lines) == 1
    house.pass_time(26.0)
    assert waiting.read_all().headers["x-aicarousel-provider"] == "b"


def test_lines_for_overlapping_routes_take_turns(build: Build, provider: Provider) -> None:
    """Pictures can go to one of the two routes that words can go to: neither kind starves the other."""
    house = build(a=in_turn([Pause("one"), *answer(chat_answer())], answer(chat_answer())), b=[Pause("two"), *answer(chat_answer())],
                  entries={"a": {"maxConcurrent": 1}, "b": {**BLIND, "maxConcurrent": 1}})
    clients = [send(house, "first"), send(house, "second")]
    provider.wait_paused("one")
    provider.wait_paused("two")
    clients += [send(house, f"words {number}") for number in range(50)]
    clients += [post(house, picture(user=f"{number}")) for number in range(3)]
    assert len(house.gateway.relay.lines) == 2
    provider.release("one")
    house.wait(lambda: len(provider.calls("a")) == 54)
    kinds = ["picture" if request.json["messages"][0] == IMAGE else "words" for request in provider.calls("a")]
    assert kinds[1:8] == ["words", "picture", "words", "picture", "words", "picture", "words"], kinds
    provider.release("two")
    assert {client.read_all().status for client in clients} == {200} and not house.gateway.relay.lines


def test_small_requests_do_not_starve_a_large_one(build: Build, provider: Provider) -> None:
    """The room that a large request waits for is not taken away in small pieces, by its own kind or by another."""
    filler = answer(chat_answer(usage={"prompt_tokens": 2000, "completion_tokens": 0, "total_tokens": 2000}))
    house = build(a=in_turn(filler, answer(chat_answer())), entries={"a": {"limits": {"tpm": 4000}}}, carousel={"maxWait": 100})
    large = chat_body(None, "word " * 2000, max_tokens=1)
    assert house.chat("aicarousel", stream=False).status == 200
    waiting = post(house, large)
    small = [post(house, {**chat_body(None, f"small {number}", max_tokens=1), **({"tools": [{"type": "function", "function": {"name": "f"}}]} if number % 2 else {})}) for number in range(20)]
    house.settle()
    assert len(provider.calls("a")) == 1, "they have room and wait behind it"
    house.pass_time(62.0)
    replies = [client.read_all() for client in (waiting, *small)]
    assert [reply.status for reply in replies] == [200] * 21, [reply.raw for reply in replies if reply.status != 200]
    assert len(served(provider)[1]) > 5000


def test_what_somebody_waits_for_is_left_to_him(build: Build, provider: Provider) -> None:
    """A large picture waits for the room of `a`: a small one stands behind it, words go elsewhere, even those of a conversation that was served there."""
    filler = answer(chat_answer(usage={"prompt_tokens": 2000, "completion_tokens": 0, "total_tokens": 2000}))
    house = build(a=in_turn(filler, answer(chat_answer())), b=healthy(), entries={"a": {"limits": {"tpm": 4000}}, "b": BLIND}, carousel={"strategy": "priority", "maxWait": 100})
    assert in_session(house).headers["x-aicarousel-provider"] == "a"
    large = post(house, {**picture(max_tokens=1), "messages": [{"role": "user", "content": "word " * 2000}, IMAGE]})
    small = post(house, picture(max_tokens=1))
    told = in_session(house).headers
    assert (told["x-aicarousel-provider"], told["x-aicarousel-session"]) == ("b", "repin") and len(provider.calls("a")) == 1
    house.pass_time(62.0)
    assert {reply.headers["x-aicarousel-provider"] for reply in (large.read_all(), small.read_all())} == {"a"}
    assert [len(request.json["messages"]) for request in provider.calls("a")[1:]] == [2, 1]


def test_a_restricted_key_that_waits_holds_no_other_up(build: Build, provider: Provider) -> None:
    house = build(a=healthy(), b=healthy(), entries={"a": {"limits": {"rpm": 1}}})
    narrow = aicarousel.create_key(house.database, "narrow", limits={"models": ["a/*"]})[0]
    assert house.chat("a/m", stream=False).status == 200
    house.pass_time(40.0)
    waiting = post(house, chat_body(None), key=narrow)
    assert len(house.gateway.relay.lines) == 1 and [house.chat("aicarousel", stream=False).headers["x-aicarousel-provider"] for _ in range(3)] == ["b"] * 3
    house.pass_time(21.0)
    assert waiting.read_all().headers["x-aicarousel-provider"] == "a"


# ------------------------------------------------------------------ section 20: conversations

def cached(n_tokens: int) -> Json:
    return chat_answer(usage={"prompt_tokens": 50_000, "completion_tokens": 5, "total_tokens": 50_005, "prompt_tokens_details": {"cached_tokens": n_tokens}})


def in_session(house: House) -> Reply:
    return house.post("/v1/chat/completions", chat_body(None), headers={"x-session-id": "s"})


@pytest.mark.parametrize(("n_cached", "told", "who"), [(40_000, "hit", "a"), (10_000, "repin", "b"), (0, "repin", "b")])
def test_a_conversation_waits_for_its_cache_or_leaves_it(build: Build, n_cached: int, told: str, who: str) -> None:
    house = build(a=answer(cached(n_cached)), b=healthy(), entries={"a": {"limits": {"rpm": 2}}}, carousel={"strategy": "priority"})
    assert [in_session(house).headers["x-aicarousel-session"] for _ in range(2)] == ["new", "hit"]
    house.pass_time(45.0)
    client = post(house, chat_body(None), {"x-session-id": "s"})
    assert house.chat("aicarousel", stream=False).headers["x-aicarousel-provider"] == "b", "whoever has no cache there does not wait"
    if told == "hit":
        house.pass_time(16.0)
    reply = client.read_all()
    assert (reply.headers["x-aicarousel-session"], reply.headers["x-aicarousel-provider"]) == (told, who) and not house.gateway.relay.lines
    house.settle()
    decision = next(one for one in house.gateway.decisions if one.id == reply.headers["x-aicarousel-request-id"])
    assert f"conversation: {told}" in aicarousel.explain_lines(decision)[-1]


def test_each_conversation_waits_by_its_own_cache_whoever_is_first(build: Build, provider: Provider) -> None:
    house = build(a=in_turn(healthy(), healthy(), [Pause("busy"), *answer(chat_answer())], healthy()), b=healthy(), entries={"a": {"maxConcurrent": 1}}, carousel={"strategy": "priority"})
    for name in ("long", "short"):
        assert house.post("/v1/chat/completions", chat_body(None), headers={"x-session-id": name}).headers["x-aicarousel-provider"] == "a"
    house.settle()
    busy = send(house, "busy")
    provider.wait_paused("busy")
    pins = house.gateway.relay.state.sessions
    for name, pin in list(pins.items()):
        pins[name] = pin._replace(n_cached={"long": 40_000, "short": 8_000}[name.split()[-1]])      # 20 and 4 seconds
    long, short = (post(house, chat_body(None), {"x-session-id": name}) for name in ("long", "short"))
    assert [sum(map(len, line.values())) for line in house.gateway.relay.lines.values()] == [2]
    for _ in range(5):
        house.pass_time(1.01)
    assert (reply := short.read_all()).headers["x-aicarousel-session"] == "repin" and reply.headers["x-aicarousel-provider"] == "b"
    provider.release("busy")
    assert (reply := long.read_all()).headers["x-aicarousel-session"] == "hit" and reply.headers["x-aicarousel-provider"] == "a" and busy.read_all().status == 200


# ------------------------------------------------------------------ section 20: all of it at once

class Crowd:
    """Requests that stand in line, hold their route for a while and leave, without a provider to ask; and what must hold of them at any time."""

    def __init__(self, house: House, seed: int) -> None:
        self.house, self.dice, self.relay = house, random.Random(seed), house.gateway.relay
        self.outcomes, self.waited_s, self.order = Counter[str](), dict[int, list[float]](), dict[tuple[int, bool], list[int]]()
        self.tasks: list[asyncio.Task[None]] = []

    def arrive(self, key_id: int, *, seen: bool, session: str = "") -> None:
        number = len(self.tasks)
        body = {"model": "aicarousel", "messages": [IMAGE if seen else {"role": "user", "content": "Hi"}], **({"prompt_cache_key": session} if session else {})}
        job = aicarousel.Job(id=f"{number}", raw=json.dumps(body).encode(), body=body, model="aicarousel", stream=False, received_at=self.relay.world.clock(), key_id=key_id)
        self.tasks.append(self.house.loop.create_task(self._serve(job, number, seen)))

    async def _serve(self, job: aicarousel.Job, number: int, seen: bool) -> None:
        run, clock, state = aicarousel._Run(self.relay, job, None), self.relay.world.clock, self.relay.state      # type: ignore[arg-type]
        run._choice, run._catalogue = self.relay.choose(job)
        run._facts, run._give_up_at = run._read_facts(), clock() + 30.0
        began_at = clock()
        try:
            found = await run._plan()
        except aicarousel.GatewayError as error:
            assert error.status == 429 and clock() - began_at >= 28.9, "who waits for a place is told so a second before its time is over"
            self.outcomes["refused"] += 1
            return
        except asyncio.CancelledError:
            self.outcomes["left"] += 1
            raise
        route = found.routes[0]
        assert not (seen and route.provider.name == "b") and aicarousel.find_shortage(state.ledger, route, *run._facts[:2], clock()) is None
        aicarousel.begin_attempt(state, run._choice, route)
        hold = reserve(state.ledger, route, *run._facts[:2], clock())
        self.waited_s.setdefault(job.key_id, []).append(clock() - began_at)
        self.order.setdefault((job.key_id, seen), []).append(number)
        note_served(state, route, run._facts, 100.0, clock())
        try:
            await asyncio.sleep(self.dice.uniform(0.2, 2.0))
            note_cached(state, run._facts, 20_000)
            self.outcomes["served"] += 1
        finally:
            settle(state.ledger, hold, 5, 5, clock())
            self.relay.wake()

    def check(self) -> None:
        """No route stands free that somebody waits for, and none has more than it takes."""
        buckets = self.relay.state.ledger.buckets
        for name in "abc":
            bucket = buckets[f"provider {name}"]
            assert bucket.n_open <= bucket.max_open
            assert bucket.n_open == bucket.max_open or not any(f"{name}/1:m" in awaited for awaited in self.relay.lines), (name, self.relay.lines.keys())
        assert all(line and all(line.values()) for line in self.relay.lines.values())


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_crowd_is_served_in_turn_and_no_route_stands_idle(build: Build, seed: int) -> None:
    """Near 600 requests of four keys, one of which sends nine in ten, in bursts; a quarter are pictures, some belong to conversations, some leave."""
    house = build(a=healthy(), b=healthy(), c=healthy(), entries={"a": {"maxConcurrent": 2}, "b": {**BLIND, "maxConcurrent": 2}, "c": {"maxConcurrent": 1}})
    crowd = Crowd(house, seed)
    dice = crowd.dice

    def burst(size: int) -> None:
        for _ in range(size):
            crowd.arrive(1, seen=dice.random() < 0.25)
    for step in range(240):
        if step % 12 == 0 and step < 180:
            house.do(lambda: burst(36))
        if step % 4 == 0 and step < 180:
            house.do(lambda: crowd.arrive(dice.choice((2, 3, 4)), seen=dice.random() < 0.25, session=dice.choice(("", f"s{dice.randrange(4)}"))))
        if step % 7 == 0:
            house.do(lambda: dice.choice(crowd.tasks).cancel())
        house.pass_time(0.5)
        house.do(crowd.check)
    house.do(lambda: asyncio.gather(*crowd.tasks, return_exceptions=True))
    assert all(task.cancelled() or task.exception() is None for task in crowd.tasks), [task.exception() for task in crowd.tasks if not task.cancelled() and task.exception()]
    assert not house.gateway.relay.lines and all(bucket.n_open == 0 for bucket in house.gateway.relay.state.ledger.buckets.values())
    for (key_id, _), numbers in crowd.order.items():
        assert key_id != 1 or numbers == sorted(numbers), "within a key and a kind it is first come first served"
    light = [waited for key_id in (2, 3, 4) for waited in crowd.waited_s[key_id]]
    assert crowd.outcomes["refused"] > 10 and crowd.outcomes["left"] > 3 and max(crowd.waited_s[1]) > 25.0 and max(light) < 11.0, (crowd.outcomes, max(crowd.waited_s[1]), max(light))
