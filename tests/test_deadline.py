"""The time of a whole request: one deadline over connecting, waiting, every route and the answer, for clients of every format."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from dialects import FORMATS, PATHS, Telling, read_stream
from fakes import Chunk, Client, Pause, Provider, Script, Silence, answer, healthy, opened
from faults import ask, check_broken_off, check_error_body
from house import House

Build = Callable[..., House]
OOPS = answer({"error": {"message": "Oops.", "type": "server_error"}}, 500)
LONG = {"timeouts": {"connect": 5000, "firstByte": 5000, "idle": 5000, "total": 5000, "streamTotal": 5000}}
WORDS = opened(Telling("chat").begin(), Telling("chat").say("The first", " words"))


def start(house: House, client: str, streamed: bool, limit: str = "") -> Client:
    """A client that has asked."""
    connection = house.connect()
    connection.send(house.request_bytes("POST", PATHS[client], ask(client, "aicarousel", streamed), {"x-aicarousel-timeout": limit} if limit else {}))
    return connection


#: What a provider does that is not done when the time is over.
SLOW: dict[str, Script] = {
    "silent": [Pause("there"), Silence()],
    "in the body": opened(Pause("there"), Silence()),
    "after another failed": [Pause("there"), Silence()],
}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("name", SLOW)
@pytest.mark.parametrize("client", FORMATS)
def test_before_content_it_is_504(build: Build, provider: Provider, client: str, name: str, streamed: bool) -> None:
    """After just that time, with nothing held against the provider: who was in a hurry was the client."""
    house = build(**({"bad": OOPS} if name == "after another failed" else {}), slow=SLOW[name], b=healthy("too late"), entries={"slow": LONG},
                  carousel={"strategy": "priority", "limits": {"keepAliveFirst": 100}})
    with start(house, client, streamed, "20.5") as connection:
        provider.wait_paused("there")
        house.pass_time(20.0)
        assert provider.links("slow")[0].closed_at is None and house.seen_by(connection) == b""
        house.pass_time(0.6)
        connection.read_until(b"}}")
        reply = connection.read_all()
    assert reply.status == 504 and "20.5 s" in check_error_body(client, reply)["message"]
    assert provider.wait_closed(provider.links("slow")[0], 1.0)
    assert house.cooling("slow") == [] and not provider.calls("b")
    [row] = house.wait_rows(1)
    assert (row["status"], row["outcome"]) == (504, "error")
    if client != "messages":
        assert [(one["provider"], one["reason"]) for one in reply.json["error"]["attempts"]][-1] == ("slow", "deadline")


@pytest.mark.parametrize("client", FORMATS)
def test_behind_a_sign_of_life_it_is_an_event(build: Build, provider: Provider, client: str) -> None:
    house = build(slow=SLOW["silent"], entries={"slow": LONG})
    with start(house, client, True, "20") as connection:
        provider.wait_paused("there")
        house.pass_time(5.0)
        assert house.seen_by(connection)
        house.pass_time(15.1)
        assert "given up after 20 s" in check_broken_off(client, connection.read_all(), "")


@pytest.mark.parametrize("client", FORMATS)
def test_after_content_it_is_an_event(build: Build, provider: Provider, client: str) -> None:
    house = build(slow=[*WORDS, Pause("there"), Silence()], entries={"slow": LONG})
    with start(house, client, True, "20") as connection:
        provider.wait_paused("there")
        connection.read_until(b'" words"')
        house.pass_time(20.1)
        assert "given up after 20 s" in check_broken_off(client, connection.read_all(), "The first words")
    assert provider.wait_closed(provider.links("slow")[0], 1.0)
    assert house.cooling("slow") == []


def test_it_is_settable_and_the_client_can_only_shorten_it(build: Build, provider: Provider) -> None:
    house = build(slow=SLOW["silent"], entries={"slow": LONG}, carousel={"limits": {"requestTotal": 30}})
    for limit in ("", "86400"):
        with start(house, "chat", False, limit) as connection:
            provider.wait_paused("there", 1 + bool(limit))
            house.pass_time(29.0)
            assert house.seen_by(connection) == b""
            house.pass_time(1.1)
            assert "given up after 30 s" in connection.read_all().json["error"]["message"]


def test_connecting_and_waiting_in_line_count(build: Build, provider: Provider) -> None:
    house = build(a=[Pause("there"), Silence()], entries={"a": {**LONG, "maxConcurrent": 1}, "far": {**LONG}}, far=healthy(), carousel={"fallback": "none"})
    house.reconfigure({**house.models, "far": {**house.models["far"], "baseUrl": provider.unaccepting("far")}})
    with house.start_chat("a/m"), house.connect() as connecting, house.connect() as waiting:
        provider.wait_paused("there")
        for connection, name in ((connecting, "far/m"), (waiting, "a/m")):
            connection.send(house.request_bytes("POST", PATHS["chat"], ask("chat", name, False), {"x-aicarousel-timeout": "20"}))
        house.wait(lambda: len(house.gateway.relay.running) == 3 and house.gateway.relay.lines)
        house.pass_time(18.0)
        assert house.seen_by(connecting) == house.seen_by(waiting) == b""
        house.pass_time(2.1)
        assert connecting.read_all().status == 504
        assert waiting.read_all().status in (429, 504) and len(provider.calls("a")) == 1
    house.wait(lambda: not house.gateway.relay.running and not house.gateway.relay.lines)


def test_who_cannot_be_served_in_time_is_told_at_once(build: Build, provider: Provider) -> None:
    """The line is no place for a request that would be late in any case: it gets the limit that is in its way, and when it ends."""
    house = build(a=answer({"error": {"message": "Slow down."}}, 429, [("retry-after", "20")]))
    assert start(house, "chat", False, "5").read_all().status == 429
    reply = start(house, "chat", False, "5").read_all()
    assert reply.status == 429 and int(reply.headers["retry-after"]) == 20
    with start(house, "chat", False, "25") as connection:
        house.settle()
        assert house.seen_by(connection) == b"" and house.gateway.relay.lines
    house.wait(lambda: not house.gateway.relay.lines)


def test_an_answer_that_was_whole_stays_so(build: Build, provider: Provider) -> None:
    """The time is over while the provider's connection has yet to end: that is no failure any more."""
    whole = [*Telling("chat").begin(), *Telling("chat").say("All."), *Telling("chat").end()]
    house = build(a=opened(whole, Pause("there"), Silence()), entries={"a": LONG})
    with start(house, "chat", True, "0.2") as connection:
        provider.wait_paused("there")
        connection.read_until(b"[DONE]")
        house.pass_time(0.21)
        reply = connection.read_all()
    assert read_stream("chat", reply).text == "All." and reply.complete and not reply.error
    assert house.wait_rows(1)[0]["outcome"] == "ok"


@pytest.mark.parametrize("limit", ["soon", "-1", "0", "86401", "1e3", "", " ", "1" * 400, "\u0662"])
@pytest.mark.parametrize("client", FORMATS)
def test_a_time_that_is_none_is_refused(build: Build, provider: Provider, client: str, limit: str) -> None:
    house = build(a=healthy())
    with house.connect() as connection:
        raw = house.request_bytes("POST", PATHS[client], ask(client, "aicarousel", False), {"x-aicarousel-timeout": "LIMIT"}).replace(b"LIMIT", limit.encode())
        connection.send(raw)
        reply = connection.read_all()
    assert reply.status == 400 and not provider.calls("a")
    if limit.isascii():
        assert "x-aicarousel-timeout" in check_error_body(client, reply)["message"]
