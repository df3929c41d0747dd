"""x-aicarousel-mock: faults that a client with an admin key wishes on its own requests, to see what becomes of them."""

from __future__ import annotations

from collections.abc import Callable

import aicarousel
import answers
import pytest
from dialects import FORMATS, PATHS
from fakes import Client, Provider, Reply, chat_answer, healthy
from faults import ask, check_broken_off, check_error_body
from house import House

Build = Callable[..., House]
TEXT = "A sentence that is long enough to be cut. " * 20


def start(house: House, client: str, streamed: bool, faults: str, key: str | None = None, model: str = "aicarousel") -> Client:
    """A client that has asked."""
    connection = house.connect()
    admin = aicarousel.create_key(house.database, "admin", limits={"admin": True})[0] if key is None else key
    connection.send(house.request_bytes("POST", PATHS[client], ask(client, model, streamed), {"x-aicarousel-mock": faults}, key=admin))
    return connection


def post(house: House, client: str, streamed: bool, faults: str, key: str | None = None) -> Reply:
    with start(house, client, streamed, faults, key) as connection:
        return connection.read_all()


@pytest.mark.parametrize(("client", "streamed"), [("chat", False), ("messages", True), ("responses", True)])
@pytest.mark.parametrize(("faults", "reasons", "asked"), [
    ("429", ["rate_minute"], [0, 1, 0]),
    ("500,429", ["server_error", "rate_minute"], [0, 0, 1]),
    ("empty", None, [0, 1, 0]),
    ("401, 503", ["auth_invalid", "model_capacity"], [0, 0, 1]),
    ("drop@0B", ["cut"], [1, 1, 0]),
    ("slow=0.01", [], [1, 0, 0]),
], ids=["429", "two", "empty", "spaced", "drop", "slow"])
def test_one_fault_for_each_attempt(build: Build, provider: Provider, client: str, streamed: bool, faults: str, reasons: list[str] | None, asked: list[int]) -> None:
    """The attempts that are left are real; nothing cools, whatever was made up."""
    house = build(a=healthy(TEXT), b=healthy(TEXT), c=healthy(TEXT), carousel={"strategy": "priority"})
    reply = post(house, client, streamed, faults)
    assert reply.status == 200 and reply.complete and TEXT[:40].encode() in reply.body
    [decision] = house.gateway.decisions
    told = [attempt.reason for attempt in decision.attempts]
    assert told[:-1] == (told[:1] if reasons is None else reasons) and told[-1] == "" and reply.headers["x-aicarousel-attempts"] == str(len(told))
    assert [len(provider.calls(name)) for name in "abc"] == asked
    assert house.gateway.relay.state.cooling == {}
    assert house.wait_rows(1)[0]["outcome"] == "ok"


@pytest.mark.parametrize("client", FORMATS)
def test_all_attempts_may_suffer(build: Build, provider: Provider, client: str) -> None:
    house = build(a=healthy(), b=healthy())
    reply = post(house, client, False, "429,429")
    assert reply.status == 429 and check_error_body(client, reply) and not provider.requests
    assert house.gateway.relay.state.cooling == {} and house.chat().status == 200


@pytest.mark.parametrize("client", FORMATS)
@pytest.mark.parametrize("n_bytes", [0, 1, 500, 1000, 10 ** 8])
def test_a_stream_is_cut_after_so_many_bytes(build: Build, provider: Provider, client: str, n_bytes: int) -> None:
    """Before there is content the next provider serves; after it comes the error event; beyond the end there is nothing to cut."""
    house = build(a=healthy(TEXT), b=healthy("The other."), carousel={"strategy": "priority"})
    reply = post(house, client, True, f"drop@{n_bytes}B")
    if n_bytes == 1000:
        assert "cut" in check_broken_off(client, reply, TEXT[:len(TEXT) // 3])
    else:
        assert reply.status == 200 and reply.complete and answers.read(client, reply).text == ("The other." if n_bytes < 1000 else TEXT)
    assert house.gateway.relay.state.cooling == {}
    assert provider.links("a")[0].closed_at is not None or provider.wait_closed(provider.links("a")[0], 1.0), "what was not read to its end is not used again"


def test_a_whole_answer_is_cut_after_so_many_bytes(build: Build, provider: Provider) -> None:
    house = build(a=healthy(TEXT), b=healthy("The other."), carousel={"strategy": "priority"})
    assert post(house, "chat", False, "drop@200B").text == "The other."
    assert post(house, "chat", False, "drop@100000B").json == chat_answer(TEXT)


@pytest.mark.parametrize("client", FORMATS)
def test_a_slow_provider(build: Build, provider: Provider, client: str) -> None:
    """Slow is slow to answer at all: signs of life go out meanwhile, and beyond firstByte it is a timeout."""
    house = build(a=healthy(TEXT), b=healthy("The other."), carousel={"strategy": "priority"}, entries={"a": {"timeouts": {"firstByte": 30}}})
    with start(house, client, True, "slow=20") as connection:
        house.wait(lambda: house.gateway.relay.running)
        house.pass_time(5.0)
        assert house.seen_by(connection) and not provider.calls("a")
        house.pass_time(15.1)
        assert TEXT[:40].encode() in connection.read_all().body
    with start(house, client, False, "slow=40") as connection:
        house.wait(lambda: house.gateway.relay.running)
        house.pass_time(29.0)
        assert not provider.calls("b")
        house.pass_time(1.1)
        assert b"The other." in connection.read_all().body
    assert [attempt.reason for attempt in house.gateway.decisions[-1].attempts] == ["timeout", ""] and len(provider.calls("a")) == 1


@pytest.mark.parametrize("faults", ["", "429,", "200", "600", "drop@B", "drop@-1B", "drop@5", "slow=", "slow=1e3", "reset", "429;500", "\u0664\u0662\u0669", "drop@9999999999B", ",".join(["429"] * 51)])
def test_what_is_no_fault_is_refused(build: Build, provider: Provider, faults: str) -> None:
    house = build(a=healthy())
    for client in FORMATS if faults.isascii() else ():
        reply = post(house, client, False, faults)
        assert reply.status == 400 and "x-aicarousel-mock" in check_error_body(client, reply)["message"]
    with pytest.raises(aicarousel.GatewayError):
        aicarousel.read_faults(faults)
    assert not provider.requests


def test_only_with_an_admin_key_of_this_machine(build: Build, provider: Provider) -> None:
    house = build(a=healthy())
    assert [post(house, "messages", False, "429", key).status for key in (house.key, "sk-wrong", "")] == [403, 401, 401]
    admin = aicarousel.create_key(house.database, "admin", limits={"admin": True})[0]
    request = aicarousel.Request("POST", "/v1/messages", "", {"host": "127.0.0.1", "content-type": "application/json", "authorization": f"Bearer {admin}", "x-aicarousel-mock": "429"},
                                 peer="192.0.2.7")
    with pytest.raises(aicarousel.GatewayError) as raised:
        house.do(lambda: house.gateway.admit(request))
    assert raised.value.status == 403 and not provider.requests
    assert house.get("/v1/models", key="").status == 200
