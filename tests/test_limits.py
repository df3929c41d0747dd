"""`carousel.limits`: every limit is in force where it belongs, at the value that is set, and an edit counts from then on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import aicarousel
from fakes import DONE, FINISH, ROLE, TEXT, Pause, Provider, answer, chat_answer, chat_body, content, healthy, stream
from house import House, entry

Build = Callable[..., House]
COMMENT = b": keep-alive\n\n"
OOPS = answer({"error": {"message": "Oops.", "type": "server_error"}}, 500)
HALF_HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"


@pytest.fixture
def one(build: Build) -> Callable[..., House]:
    """one(script, limit=value): a house with one provider under these limits."""
    return lambda script=None, **limits: build(a=script or healthy(), carousel={"limits": limits})


def post(house: House, body: dict[str, Any]) -> bytes:
    return house.request_bytes("POST", "/v1/chat/completions", body, close=False)


# ---------------------------------------------------------------- of clients

@pytest.mark.parametrize("limit,sent", [("clientHead", 20), ("clientBody", -5), ("clientIdle", 0)])
def test_a_client_has_the_time_that_is_set(one: Callable[..., House], limit: str, sent: int) -> None:
    """And the next one another time, after an edit."""
    house = one(**{limit: 3})
    whole = post(house, chat_body("a/m"))
    for seconds, early_s in ((3, 2.5), (9, 8.5)):
        with house.connect() as client:
            client.send(whole[:sent])
            house.pass_time(early_s)
            assert house.seen_by(client) == b"" and client.ended == ""
            house.pass_time(1.0)
            reply = client.read_all()
            assert (reply.status == 408 if sent else reply.raw == b"") and client.ended == "eof"
        house.reconfigure({**house.models, "carousel": {"limits": {limit: 9}}})


def test_a_client_that_reads_nothing_has_the_time_that_is_set(one: Callable[..., House], provider: Provider) -> None:
    house = one(stream(ROLE, content("x" * 8_000_000), FINISH, DONE), clientStall=2)
    with house.connect(receive_buffer=4096) as client:
        client.send(post(house, chat_body("a/m", stream=True)))
        provider.wait_calls("a")
        house.wait(lambda: any(link.inbox.transport.get_write_buffer_size() > 100_000 for link in house.server._links))
        house.pass_time(1.5)
        assert house.do(house.server.n_connections) == 1
        house.pass_time(1.0)
        house.wait(lambda: house.do(house.server.n_connections) == 0)


def test_connections_are_as_many_as_are_set(one: Callable[..., House], provider: Provider) -> None:
    house = one([Pause("held"), *answer(chat_answer())], connections=2)
    with house.start_chat("a/m", stream=False) as first, house.start_chat("a/m", stream=False) as second:
        provider.wait_calls("a", 2)
        assert house.get("/health").status == 503 and first.ended == second.ended == ""
        house.reconfigure({**house.models, "carousel": {"limits": {"connections": 3}}})
        assert house.get("/health").status == 200
        provider.release("held")
        assert [client.read_all().text for client in (first, second)] == [TEXT, TEXT]


def test_a_body_is_as_large_as_is_set(one: Callable[..., House]) -> None:
    house = one(bodyBytes=2000)
    for size, status in ((1000, 200), (3000, 413)):
        assert house.post("/v1/chat/completions", chat_body("a/m", "x" * size)).status == status
    house.reconfigure({**house.models, "carousel": {"limits": {"bodyBytes": 9000}}})
    assert house.post("/v1/chat/completions", chat_body("a/m", "x" * 3000)).status == 200


def test_signs_of_life_come_when_they_are_set_to(one: Callable[..., House], provider: Provider) -> None:
    house = one(stream(Pause("head"), ROLE, content("one"), Pause("more"), content(" two"), FINISH, DONE), keepAliveFirst=1, keepAlive=2)
    with house.start_chat("a/m") as client:
        provider.wait_calls("a")
        for n_signs, wait_s in ((0, 0.9), (1, 0.2), (1, 1.8), (2, 0.3)):
            house.pass_time(wait_s)
            assert house.seen_by(client).count(COMMENT) == n_signs
        provider.release("head")
        client.read_until(b'"one"')
        house.pass_time(2.1)
        client.read_until(lambda raw: raw.count(COMMENT) == 3)
        provider.release("more")
        assert client.read_all().text == "one two"


# ---------------------------------------------------------------- of providers

def test_answers_are_as_large_as_is_set(one: Callable[..., House]) -> None:
    house = one(answer(chat_answer("x" * 4000)), answerBytes=3000)
    assert (house.chat("a/m", stream=False).status, house.cooling("a")[0]["reason"]) == (502, "too_big")
    house.reconfigure({"a": house.models["a"], "carousel": {"limits": {"answerBytes": 9000}}})
    house.pass_time(60)
    assert house.chat("a/m", stream=False).text == "x" * 4000


@pytest.mark.parametrize("client", ["chat", "messages"])
def test_events_are_as_large_as_is_set(one: Callable[..., House], client: str) -> None:
    """For a stream in its own bytes and for one that is translated."""
    house = one(stream(ROLE, content("x" * 400_000), FINISH, DONE), eventBytes=140_000)
    path, body = ("/v1/chat/completions", chat_body("a/m", stream=True)) if client == "chat" else ("/v1/messages", {**chat_body("a/m", stream=True), "max_tokens": 9})
    reply = house.post(path, body)
    assert reply.status in (500, 502, 503) and house.cooling("a")[0]["reason"] == "too_big"
    house.reconfigure({"a": house.models["a"], "carousel": {"limits": {"eventBytes": 500_000}}})
    house.pass_time(60)
    assert house.post(path, body).raw.count(b"x") >= 400_000


def test_connections_to_providers_wait_as_long_and_as_many_as_is_set(one: Callable[..., House]) -> None:
    house = one(poolIdle=5, poolSize=1)
    parked = house.gateway.transport.n_parked
    assert house.chat("a/m").text == TEXT and house.do(parked) == 1
    house.pass_time(6)
    house.wait(lambda: house.chat("a/m").text == TEXT and len(house.gateway.transport._pool) == 1)
    house.reconfigure({"a": house.models["a"], "carousel": {"limits": {"poolSize": 0}}})
    assert house.chat("a/m").text == TEXT and house.do(parked) == 0


@pytest.mark.parametrize("kind,status,first_s,field", [
    ("rate", 429, 7, "coolRate"), ("server", 500, 8, "coolServer"), ("model", 404, 11, "coolModel"), ("credential", 401, 13, "coolCredential"), ("payment", 402, 17, "coolPayment")])
def test_what_failed_is_left_out_as_long_as_is_set(one: Callable[..., House], kind: str, status: int, first_s: float, field: str) -> None:
    """First as set, in the end not longer than set; credentials and money do not double."""
    house = one(answer({"error": {"message": "No."}}, status), **{field: first_s, "coolMost": 20})
    spans, doubles = [], kind in ("rate", "server", "model")
    for _ in range(3):
        house.chat("a/m", stream=False)
        [cooldown] = house.cooling("a")
        assert cooldown["kind"] == kind and not cooldown["proven"]
        spans.append(cooldown["until_s"])
        house.pass_time(cooldown["until_s"] + 0.1)
    assert first_s * 0.7 <= spans[0] <= first_s * 1.21 and max(spans) <= (20 if doubles else first_s)
    assert (spans[2] > first_s * 1.25) is doubles


def test_a_provider_that_cannot_be_reached_is_left_out_as_long_as_is_set(build: Build) -> None:
    house = build(b=healthy(), carousel={"limits": {"coolNetwork": 50}})
    house.reconfigure({"a": entry("http://127.0.0.1:9/v1"), **house.models})
    assert house.chat("a/m").text == TEXT
    [cooldown] = house.cooling("a")
    assert cooldown["scope"] == "provider" and 39 <= cooldown["until_s"] <= 61


# ---------------------------------------------------------------- all of them

def test_every_limit_has_a_test_here_or_is_named_there() -> None:
    """What is shown elsewhere: drain by test_server's signals, queue by test_waiting, what the relay does with the budget and the deadline by test_faults, usage by test_storage, the request log by test_request_log."""
    text = open(__file__, encoding="utf-8").read()
    elsewhere = {"drain", "queue", "requestTotal", "retryBudget", "retryBudgetLeast", "usageRows", "usageDays", "requestLogBytes", "requestLogDays"}
    assert {name for name in aicarousel._BOUND_FIELDS if name not in text} == set() and elsewhere <= set(aicarousel._BOUND_FIELDS)
