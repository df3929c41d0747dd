"""Section 36, Relay: dialogues between a client, the gateway and scripted providers.

The gateway runs inside this process on a loop whose time the test moves, so that no test waits for a timeout.  Waits are
for things that happen (a script reached a pause, bytes arrived); `settle` lets the gateway take in what is on its sockets.
"""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import aicarousel
from dialects import FORMATS, PATHS, Telling, ask, read_stream
from fakes import (DONE, FAKE_KEY, FINISH, ROLE, TEXT, USAGE, Chunk, Client, Close, Connection, End, Head, Pause, Provider, Reply, Reset, Script, Silence, answer,
                   chat_answer, chat_body, chat_chunk, chat_stream, content, frame, healthy, in_turn, opened, stream, unchunk)
from house import KEY, House, entry

Build = Callable[..., House]
COMMENT = b": keep-alive\n\n"
OTHER_TEXT = "Hello from the second provider."
OOPS = answer({"error": {"message": "Oops.", "type": "server_error"}}, 500)


def rate_limited(*headers: tuple[str, str]) -> list[Any]:
    """Steps of a 429."""
    return answer({"error": {"message": "Slow down."}}, 429, headers)


def times(**seconds: float) -> dict[str, Any]:
    """An entry's timeouts."""
    return {"timeouts": seconds}


def check_broken_off(reply: Reply, text: str) -> dict[str, Any]:
    """`text`, one error event, the body properly ended, no end mark; the error."""
    assert reply.status == 200 and reply.complete and reply.text == text and not reply.done, reply.raw
    errors = [chunk for chunk in reply.chunks if "error" in chunk]
    assert errors == reply.chunks[-1:] and {"message", "type", "param", "code"} <= errors[0]["error"].keys(), reply.raw
    return errors[0]["error"]


def check_answered(reply: Reply, text: str = TEXT) -> None:
    """A whole answer with `text`."""
    assert reply.status == 200 and reply.complete and reply.text == text and reply.finish == "stop" and not reply.error, reply.raw
    assert reply.done or not reply.streamed


def pass_pause(house: House, provider: Provider, pause: str, seconds: float) -> None:
    """Lets time pass while a provider stays at a pause, and has it go on."""
    provider.wait_paused(pause)
    house.pass_time(seconds)
    provider.release(pause)


# ---------------------------------------------------------------- silence

def test_keep_alive_within_5_s_and_then_every_15_s(build: Build, provider: Provider) -> None:
    house = build(slow=stream(Pause("head"), ROLE, content("one"), Pause("more"), content(" two"), FINISH, DONE))
    with house.start_chat("aicarousel") as client:
        provider.wait_calls("slow")
        house.pass_time(4.0)
        assert house.seen_by(client) == b""
        house.pass_time(1.0)
        raw = client.read_until(COMMENT)
        assert raw.startswith(b"HTTP/1.1 200 OK\r\n") and b"text/event-stream; charset=utf-8" in raw and b"x-accel-buffering: no" in raw
        house.pass_time(15.0)
        client.read_until(lambda raw: raw.count(COMMENT) == 2)
        provider.release("head")
        client.read_until(b'"one"')
        house.pass_time(15.0)
        client.read_until(lambda raw: raw.count(COMMENT) == 3)
        provider.release("more")
        check_answered(client.read_all(), "one two")


#: The sign of life of each client format: one that its clients' own clocks heed.
SIGNS = {"chat": COMMENT, "messages": b'event: ping\ndata: {"type":"ping"}\n\n', "responses": b"event: response.in_progress\n"}


def count_signs(raw: bytes) -> int:
    """Signs of life of any kind; a provider's own too."""
    return sum(map(raw.count, (*SIGNS.values(), b"event: keepalive\n", b'data: {"type": "ping"}')))


@pytest.mark.parametrize("where", ["before the head", "before content", "in a call"])
@pytest.mark.parametrize("wire", FORMATS)
@pytest.mark.parametrize("client", FORMATS)
def test_keep_alive_of_every_format(build: Build, provider: Provider, client: str, wire: str, where: str) -> None:
    told = Telling(wire)
    begun, called = told.begin(), told.call("add", '{"a": 1', "}") if where == "in a call" else []
    answered = stream(begun, called[:2], Pause("begun"), called[2:], told.say("one"), Pause("more"), told.say(" two"), told.end())
    pauses = [*(["head"] if where == "before the head" else []), "begun", "more"]
    house = build(slow=[Pause("head"), *answered] if where == "before the head" else answered, entries={"slow": {"format": wire}})
    with house.connect() as connection:
        connection.send(house.request_bytes("POST", PATHS[client], ask(client, "aicarousel")))
        provider.wait_paused(pauses[0])
        house.pass_time(4.0)
        assert house.seen_by(connection) == b""
        house.pass_time(1.0)
        connection.read_until(count_signs)
        assert client == wire == "responses" or SIGNS[client] in connection.raw
        for name in pauses:
            provider.wait_paused(name)
            house.settle()
            n_signs = count_signs(house.seen_by(connection))
            house.pass_time(15.0)
            assert count_signs(connection.read_until(lambda raw: count_signs(raw) > n_signs, 5.0)) == n_signs + 1, (name, connection.raw)
            provider.release(name)
        seen = read_stream(client, connection.read_all())
    assert seen.text == "one two" and seen.ended and not seen.errors and seen.whole == seen.calls == [["add", '{"a": 1}']] * (where == "in a call")


def test_no_keep_alive_for_an_answer_that_is_not_streamed(build: Build, provider: Provider) -> None:
    house = build(slow=[Pause("head"), *answer(chat_answer())])
    with house.start_chat("slow/m", stream=False) as client:
        provider.wait_calls("slow")
        house.pass_time(20.0)
        assert house.seen_by(client) == b""
        provider.release("head")
        check_answered(client.read_all())


@pytest.mark.parametrize("end", ["served", "failed", "served at once"])
def test_blanks_before_an_answer_that_is_not_streamed(build: Build, provider: Provider, end: str) -> None:
    """Only for a client that asks for them; the status is 200 from the first blank on."""
    script = {"served": [Pause("head"), *answer(chat_answer())], "failed": [Pause("head"), *answer({"error": {"message": "Wrong.", "type": "invalid_request_error"}}, 400)],
              "served at once": answer(chat_answer())}[end]
    house = build(slow=script)
    with house.connect() as client:
        client.send(house.request_bytes("POST", "/v1/chat/completions", chat_body("slow/m"), {"x-aicarousel-keep-alive": "1"}))
        if end != "served at once":
            provider.wait_paused("head")
            house.pass_time(4.0)
            assert house.seen_by(client) == b""
            for blanks, wait_s in ((b" ", 1.0), (b"  ", 15.0)):
                house.pass_time(wait_s)
                head, _, body = house.seen_by(client).partition(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 200") and b"application/json" in head and unchunk(body).data == blanks
            provider.release("head")
        reply = client.read_all()
    assert reply.status == 200 and reply.complete and reply.headers["content-type"] == "application/json"
    assert reply.json["error"]["message"] == "Wrong." if end == "failed" else reply.text == TEXT
    [row] = house.wait_rows(1)
    assert (row["status"], row["outcome"]) == ((400, "error") if end == "failed" else (200, "ok"))


def test_head_sent_early_then_every_route_fails(build: Build, provider: Provider) -> None:
    house = build(a=[Pause("a"), *OOPS], b=[Pause("b"), *OOPS])
    with house.start_chat("aicarousel") as client:
        provider.wait_paused("a")
        house.pass_time(5.0)
        client.read_until(COMMENT)
        provider.release("a")
        provider.wait_paused("b")
        provider.release("b")
        error = check_broken_off(client.read_all(), "")
    assert [(row["provider"], row["status"]) for row in error["attempts"]] == [("a", 500), ("b", 500)]
    row = house.wait_rows(1)[0]
    assert row["outcome"] == "error" and row["status"] >= 500 and row["attempts"] == 2


def test_head_sent_early_then_a_client_mistake(build: Build, provider: Provider) -> None:
    house = build(a=[Pause("a"), *answer({"error": {"message": "temperature is too high", "type": "invalid_request_error", "param": "temperature"}}, 400)], b=healthy())
    with house.start_chat("aicarousel") as client:
        pass_pause(house, provider, "a", 5.0)
        error = check_broken_off(client.read_all(), "")
    assert error["message"] == "temperature is too high" and error["param"] == "temperature" and not provider.calls("b")


STALLS: dict[str, tuple[list[Any], dict[str, float], float, str | None]] = {
    # what comes before the silence, timeouts, after how long it is given up, what of it the client got (None: the next provider's answer)
    "before the head": ([Silence()], {"firstByte": 20}, 20, None),
    "after the head": (opened(Silence()), {"firstByte": 20}, 20, None),
    "after a comment": (opened(b": hello\n\n", Silence()), {"firstByte": 20}, 20, None),
    "after the role chunk": (opened(ROLE, Silence()), {"firstByte": 500, "idle": 20}, 20, None),
    "after content": (opened(ROLE, content("one"), Silence()), {"firstByte": 500, "idle": 20}, 20, "one"),
    "inside an event": (opened(ROLE, content("one"), b'data: {"cho', Silence()), {"firstByte": 500, "idle": 20}, 20, "one"),
}


@pytest.mark.parametrize("name", STALLS)
def test_stall(build: Build, provider: Provider, name: str) -> None:
    steps, timeouts, after_s, text = STALLS[name]
    house = build(a=[*steps[:-1], Pause("silent"), *steps[-1:]], b=healthy(OTHER_TEXT), entries={"a": times(**timeouts)})
    with house.start_chat("aicarousel") as client:
        provider.wait_paused("silent")
        house.pass_time(after_s - 1.0)
        assert not provider.calls("b") and provider.links("a")[0].closed_at is None
        house.pass_time(1.5)
        if text is None:
            check_answered(client.read_all(), OTHER_TEXT)
        else:
            check_broken_off(client.read_all(), text)
            assert not provider.calls("b")
    assert provider.wait_closed(provider.links("a")[0], 1.0)
    assert [(row["scope"], row["reason"]) for row in house.cooling("a")] == [("provider", "timeout")]


def test_comments_of_the_provider_keep_its_stream_alive(build: Build, provider: Provider) -> None:
    house = build(a=stream(ROLE, content("one"), Pause("1"), b": still here\n\n", Pause("2"), b": still here\n\n", Pause("3"), content(" two"), FINISH, DONE),
                  entries={"a": times(idle=20)})
    with house.start_chat("aicarousel") as client:
        for pause in "123":
            pass_pause(house, provider, pause, 15.0)
        check_answered(client.read_all(), "one two")


def test_comments_are_not_a_first_byte(build: Build, provider: Provider) -> None:
    house = build(a=opened(b": waiting\n\n", Pause("1"), b": waiting\n\n", Pause("2")), b=healthy(OTHER_TEXT), entries={"a": times(firstByte=20, idle=500)})
    with house.start_chat("aicarousel") as client:
        pass_pause(house, provider, "1", 15.0)
        provider.wait_paused("2")
        house.pass_time(6.0)
        check_answered(client.read_all(), OTHER_TEXT)


def test_blank_lines_keep_a_whole_answer_waiting(build: Build, provider: Provider) -> None:
    raw = json.dumps(chat_answer()).encode()
    house = build(a=[Head(200, [("content-type", "application/json"), ("content-length", str(len(raw) + 2))]), b"\n", Pause("1"), b"\n", Pause("2"), raw],
                  entries={"a": times(idle=20)})
    with house.start_chat("aicarousel", stream=False) as client:
        for pause in "12":
            pass_pause(house, provider, pause, 15.0)
        check_answered(client.read_all())


@pytest.mark.parametrize("streamed", [False, True])
def test_a_success_ends_every_cooldown_of_its_route(build: Build, streamed: bool) -> None:
    """The probe that serves clears the strikes: the next failure is guessed from the start again."""
    down = answer({"error": {"message": "down"}}, 503)
    house = build(a=in_turn(down, healthy(), down, healthy(), down, healthy()), b=healthy(OTHER_TEXT))
    ends = []
    for _ in range(3):
        check_answered(house.chat("a/m", stream=streamed), OTHER_TEXT)
        [cooldown] = house.cooling("a")
        ends.append(cooldown["until_s"])
        house.pass_time(cooldown["until_s"] + 0.1)
        check_answered(house.chat("a/m", stream=streamed))
        assert house.gateway.relay.state.cooling == {}
    assert max(ends) <= 6.0, "never doubled"


def test_whole_stream_has_a_longest_time(build: Build, provider: Provider) -> None:
    house = build(a=opened(ROLE, content("one"), Pause("1"), content(" two"), Pause("2"), content(" three"), Pause("3")), entries={"a": times(idle=500, streamTotal=40)})
    with house.start_chat("aicarousel") as client:
        for pause in "12":
            pass_pause(house, provider, pause, 15.0)
        provider.wait_paused("3")
        house.pass_time(11.0)
        check_broken_off(client.read_all(), "one two three")


def test_whole_answer_has_a_longest_time(build: Build, provider: Provider) -> None:
    house = build(a=[Head(200, [("content-type", "application/json"), ("content-length", "9000")]), b"\n", Pause("1"), b"\n", Pause("2"), b"\n", Pause("3")],
                  b=healthy(OTHER_TEXT), entries={"a": times(idle=20, total=40)})
    with house.start_chat("aicarousel", stream=False) as client:
        for pause in "12":
            pass_pause(house, provider, pause, 15.0)
        provider.wait_paused("3")
        house.pass_time(11.0)
        check_answered(client.read_all(), OTHER_TEXT)


def test_rest_of_a_whole_answer_that_began_must_follow_soon(build: Build, provider: Provider) -> None:
    house = build(a=[Head(200, [("content-type", "application/json"), ("content-length", "9000")]), b'{"id":', Pause("1"), b'"', Pause("2")],
                  b=healthy(OTHER_TEXT), entries={"a": times(firstByte=20, idle=20)})
    with house.start_chat("aicarousel", stream=False) as client:
        pass_pause(house, provider, "1", 15.0)
        provider.wait_paused("2")
        house.pass_time(6.0)
        check_answered(client.read_all(), OTHER_TEXT)


def test_end_without_done_is_waited_for_2_s(build: Build, provider: Provider) -> None:
    house = build(a=opened(ROLE, content("one"), FINISH, Silence()))
    with house.start_chat("aicarousel") as client:
        client.read_until(b'"finish_reason": "stop"')
        house.pass_time(1.5)
        assert b"[DONE]" not in house.seen_by(client)
        house.pass_time(0.6)
        check_answered(client.read_all(), "one")
    assert provider.wait_closed(provider.links("a")[0], 1.0)
    assert house.wait_rows(1)[0]["outcome"] == "ok" and house.cooling("a") == []


# ---------------------------------------------------------------- cooldowns that are waited for

def test_wait_for_a_proven_cooldown(build: Build, provider: Provider) -> None:
    house = build(a=in_turn(rate_limited(("retry-after", "20")), healthy()))
    with house.start_chat("aicarousel") as first:
        house.wait_line("attempt.failed")
        with house.start_chat("aicarousel") as client, house.start_chat("a/m", stream=False) as other:
            house.pass_time(5.0)
            first.read_until(COMMENT)
            client.read_until(COMMENT)
            assert len(provider.calls("a")) == 1
            house.pass_time(16.0)
            for waiting in (first, client, other):
                check_answered(waiting.read_all())
    assert len(provider.calls("a")) == 4, "the one that was refused goes again, the others went once"


@pytest.mark.parametrize("streamed", [False, True])
def test_cooldown_beyond_max_wait(build: Build, provider: Provider, streamed: bool) -> None:
    house = build(a=rate_limited(("retry-after", "300")), b=rate_limited(("retry-after", "200")))
    assert house.chat().status == 429
    reply = house.chat(stream=streamed)
    assert reply.status == 429 and 190 <= int(reply.headers["retry-after"]) <= 200 and not reply.streamed
    assert reply.error["type"] == "rate_limit_error" and "a/m" in reply.error["message"] and "b/m" in reply.error["message"]
    assert len(provider.calls("a")) == len(provider.calls("b")) == 1
    rows = house.wait_rows(2)
    assert [(row["outcome"], row["status"], row["attempts"]) for row in rows] == [("error", 429, 2), ("error", 429, 0)]


# ---------------------------------------------------------------- the client goes

GOING: dict[str, tuple[Script, bool, bytes, int]] = {      # what the provider does, streamed, what the client waits for, least output noted
    "waiting for the head": ([Pause("there"), Silence()], True, b"", 0),
    "waiting for the first event": (opened(Pause("there"), Silence()), True, b"", 0),
    "streaming": (opened(ROLE, content("word " * 40), Pause("there"), Silence()), True, b"word", 40),
    "stalled after keep-alive": (opened(ROLE, content("word " * 40), Pause("there"), Silence()), True, COMMENT, 40),
    "not streamed": ([Pause("there"), Silence()], False, b"", 0),
    "not streamed, in the body": ([Head(200, [("content-length", "999")]), b"{", Pause("there"), Silence()], False, b"", 0),
}


@pytest.mark.parametrize("leave", ["close", "reset"])
@pytest.mark.parametrize("name", GOING)
def test_client_gone(build: Build, provider: Provider, name: str, leave: str) -> None:
    script, streamed, until, n_output = GOING[name]
    house = build(a=script, b=healthy())
    client = house.start_chat("aicarousel", stream=streamed)
    provider.wait_paused("there")
    if until == COMMENT:
        house.pass_time(15.0)
    client.read_until(until)
    getattr(client, leave)()
    assert provider.wait_closed(provider.links("a")[0], 1.0)
    row = house.wait_rows(1)[0]
    assert (row["outcome"], row["status"], row["provider"]) == ("client_closed", 499, "a")
    assert row["output"] >= n_output and bool(row["estimated"]) == bool(n_output)
    assert not provider.calls("b") and house.cooling("a") == []


def test_client_gone_while_waiting_for_a_cooldown(build: Build, provider: Provider) -> None:
    house = build(a=in_turn(rate_limited(("retry-after", "20")), healthy()))
    first = house.start_chat("aicarousel")
    house.wait_line("attempt.failed")
    client = house.start_chat("aicarousel")
    house.pass_time(5.0)
    for waiting in (first, client):
        waiting.read_until(COMMENT)
        waiting.close()
    house.pass_time(60.0)
    assert sorted((row["outcome"], row["attempts"]) for row in house.wait_rows(2)) == [("client_closed", 0), ("client_closed", 1)]
    assert len(provider.calls("a")) == 1 and not house.gateway.relay.lines


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("client", FORMATS)
def test_client_gone_while_waiting_in_line(build: Build, provider: Provider, client: str, streamed: bool) -> None:
    """Nobody is asked for who has left, and those behind move up at once."""
    house = build(a=in_turn([Pause("there"), *answer(chat_answer(OTHER_TEXT))], healthy(OTHER_TEXT)), entries={"a": {"maxConcurrent": 1}})
    def n_waiting() -> int:
        return sum(len(mates) for line in house.gateway.relay.lines.values() for mates in line.values())

    first = house.start_chat("a/m", stream=False)
    provider.wait_paused("there")
    with house.connect() as waiting:
        waiting.send(house.request_bytes("POST", PATHS[client], {**ask(client, "a/m"), "stream": streamed}))
        house.wait(lambda: n_waiting() == 1)
        behind = house.start_chat("a/m", stream=False)
        house.wait(lambda: n_waiting() == 2)
    house.wait(lambda: n_waiting() == 1)
    provider.release("there")
    for other in (first, behind):
        check_answered(other.read_all(), OTHER_TEXT)
    assert len(provider.calls("a")) == 2
    assert sorted((row["outcome"], row["attempts"]) for row in house.wait_rows(3)) == [("client_closed", 0), ("ok", 1), ("ok", 1)]


def test_usage_that_came_before_the_client_went(build: Build, provider: Provider) -> None:
    house = build(a=opened(ROLE, frame(chat_chunk({"content": "one"}, usage={"prompt_tokens": 100, "completion_tokens": 3})), Pause("there"), Silence()))
    client = house.start_chat("aicarousel")
    provider.wait_paused("there")
    client.read_until(b"one")
    client.close()
    provider.wait_closed(provider.links("a")[0], 1.0)
    row = house.wait_rows(1)[0]
    assert (row["input"], row["output"], row["estimated"], row["outcome"]) == (100, 3, 0, "client_closed")


# ---------------------------------------------------------------- usage, headers, log

FULL_USAGE = {"prompt_tokens": 90, "completion_tokens": 30, "prompt_tokens_details": {"cached_tokens": 64}, "completion_tokens_details": {"reasoning_tokens": 20}}


@pytest.mark.parametrize("streamed", [False, True])
def test_usage_row(build: Build, streamed: bool) -> None:
    house = build(a=stream(chat_stream("one", usage=FULL_USAGE)) if streamed else answer(chat_answer("one", usage=FULL_USAGE)))
    reply = house.chat("a/m", stream=streamed)
    row = house.wait_rows(1)[0]
    assert {name: row[name] for name in ("input", "output", "cached", "reasoning", "estimated", "outcome", "status", "attempts", "streamed", "model", "provider", "credential",
                                         "wire_model", "route", "key_name", "client_format")} == {
        "input": 26, "output": 30, "cached": 64, "reasoning": 20, "estimated": 0, "outcome": "ok", "status": 200, "attempts": 1, "streamed": int(streamed), "model": "a/m",
        "provider": "a", "credential": "a/1", "wire_model": "m", "route": "a/1:m", "key_name": "API_KEYS", "client_format": "chat"}
    assert row["request_id"] == reply.headers["x-aicarousel-request-id"] and 0 <= (row["first_ms"] or 0) <= row["total_ms"]
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", row["at_utc"])


@pytest.mark.parametrize("streamed", [False, True])
def test_usage_is_estimated_where_none_comes(build: Build, streamed: bool) -> None:
    words = "word " * 100
    house = build(a=stream(chat_stream(words, usage=None)) if streamed else answer(chat_answer(words, usage=None)))
    reply = house.chat(text="word " * 200, stream=streamed)
    row = house.wait_rows(1)[0]
    assert row["estimated"] == 1 and 100 <= row["output"] <= 250 and 200 <= row["input"] <= 350 and row["outcome"] == "ok"
    assert streamed or reply.headers["x-aicarousel-estimated"] == "1"


def test_error_row(build: Build) -> None:
    house = build(a=OOPS, b=answer({"error": {"message": "no"}}, 401))
    reply = house.chat()
    row = house.wait_rows(1)[0]
    assert (row["outcome"], row["status"], row["provider"], row["attempts"], row["input"], row["output"], row["estimated"]) == ("error", reply.status, "b", 2, 0, 0, 0)


USAGE_CHUNK = frame({"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [], "usage": USAGE})


@pytest.mark.parametrize("asked", [None, False, True])
def test_usage_chunk_only_for_who_asks(build: Build, provider: Provider, asked: bool | None) -> None:
    house = build(a=stream(ROLE, content("one"), frame(chat_chunk({}, "stop")), USAGE_CHUNK, DONE))
    reply = house.chat(stream=True, **({} if asked is None else {"stream_options": {"include_usage": asked}}))
    check_answered(reply, "one")
    assert provider.calls("a")[0].json["stream_options"] == {"include_usage": True}
    assert [chunk["usage"] for chunk in reply.chunks if chunk.get("usage")] == ([USAGE] if asked else [])
    assert house.wait_rows(1)[0]["output"] == USAGE["completion_tokens"]


@pytest.mark.parametrize("streamed", [False, True])
def test_decision_headers(build: Build, streamed: bool) -> None:
    house = build(a=OOPS, b=healthy())
    headers = house.chat(stream=streamed).headers
    assert (headers["x-aicarousel-provider"], headers["x-aicarousel-model"], headers["x-aicarousel-attempts"]) == ("b", "m", "2")
    assert re.fullmatch(r"[0-9a-f]{8,}", headers["x-aicarousel-request-id"]) and float(headers["x-aicarousel-overhead-ms"]) >= 0
    assert not {"x-aicarousel-dropped", "x-aicarousel-estimated"} & headers.keys()


@pytest.mark.parametrize("streamed", [False, True])
def test_dropped_fields_are_told(build: Build, provider: Provider, streamed: bool) -> None:
    house = build(a=healthy(), entries={"a": {"preset": "groq"}})
    reply = house.chat(stream=streamed, logit_bias={"1": 2}, seed=5, store=False)
    check_answered(reply)
    assert set(reply.headers["x-aicarousel-dropped"].split(",")) == {"logit_bias", "store"}
    sent = provider.calls("a")[0].json
    assert sent["seed"] == 5 and not {"logit_bias", "store"} & sent.keys()


@pytest.mark.parametrize("streamed", [False, True])
def test_provider_headers_that_clients_see(build: Build, streamed: bool) -> None:
    seen = [("x-ratelimit-remaining-requests", "9"), ("X-RateLimit-Reset-Tokens", "1s"), ("x-request-id", "req_1"), ("openai-processing-ms", "12")]
    hidden = [("set-cookie", "a=b"), ("server", "nginx"), ("access-control-allow-origin", "*"), ("alt-svc", "h3"), ("openai-organization", "org-x"), ("cf-ray", "1"),
              ("x-aicarousel-provider", "fake"), ("connection", "keep-alive"), ("location", "http://elsewhere"), ("www-authenticate", "Basic")]
    house = build(a=stream(chat_stream(), headers=seen + hidden) if streamed else answer(chat_answer(), headers=seen + hidden))
    headers = house.chat(stream=streamed).headers
    assert {name.lower(): value for name, value in seen}.items() <= headers.items()
    shown = {name for name, _ in hidden} & headers.keys()
    assert shown == {"connection", "x-aicarousel-provider"} and (headers["connection"], headers["x-aicarousel-provider"]) == ("close", "a")


def test_client_headers_that_providers_see(build: Build, provider: Provider) -> None:
    house = build(a=healthy())
    own = {"idempotency-key": "once-1", "cookie": "a=b", "x-forwarded-for": "1.2.3.4", "forwarded": "for=1.2.3.4", "referer": "http://x", "x-api-key": "sk-other",
           "openai-organization": "org-x", "user-agent": "their-sdk/1", "accept-encoding": "gzip", "accept": "text/html", "x-stainless-os": "Linux", "te": "trailers"}
    house.post("/v1/chat/completions", chat_body(), headers=own)
    request = provider.calls("a")[0]
    port = re.search(r":(\d+)/", provider_url(house))[1]
    assert {name: value for name, value in request.headers.items() if name not in ("content-length", "user-agent")} == {
        "host": f"127.0.0.1:{port}", "authorization": f"Bearer {FAKE_KEY}", "content-type": "application/json", "accept-encoding": "identity",
        "accept": "application/json", "idempotency-key": "once-1"}
    assert re.fullmatch(r"aicarousel/[\d.]+\S*", request.headers["user-agent"])
    assert request.method == "POST" and request.path == "/a/v1/chat/completions"


def provider_url(house: House) -> str:
    """The base URL of provider a."""
    return str(house.models["a"]["baseUrl"])


def test_own_headers_of_provider_and_key(build: Build, provider: Provider) -> None:
    house = build(a=healthy(), entries={"a": {"headers": {"X-Title": "AICarousel"}, "keys": [{"key": "env:FAKE_KEY", "headers": {"X-Team": "b"}}]}})
    check_answered(house.chat())
    headers = provider.calls("a")[0].headers
    assert (headers["x-title"], headers["x-team"]) == ("AICarousel", "b")


@pytest.mark.parametrize(("script", "level", "expected"), [
    (healthy(), "INFO", {"key": "API_KEYS", "model": "a/m", "route": "a/1:m", "attempts": "1", "status": "200", "outcome": "ok", "in": "11", "out": "7"}),
    (answer({"error": {"message": "no"}}, 422), "INFO", {"key": "API_KEYS", "model": "a/m", "route": "a/1:m", "attempts": "1", "status": "422", "outcome": "error", "in": "0", "out": "0"}),
], ids=["ok", "error"])
def test_log_line(build: Build, script: Script, level: str, expected: dict[str, str]) -> None:
    house = build(a=script)
    reply = house.chat("a/m")
    lines = [line for line in house.lines if line.startswith(f"{level} req=")]
    assert len(lines) == 1
    fields = dict(word.split("=", 1) for word in lines[0].split()[1:])
    assert expected.items() <= fields.items()
    assert fields["req"] == reply.headers["x-aicarousel-request-id"] and int(fields["total_ms"]) >= int(fields["first_ms"]) >= 0


def test_failed_attempt_is_logged_on_one_line_without_secrets(build: Build) -> None:
    house = build(a=answer({"error": {"message": f"bad\r\nINFO req=forged \x1b[31m {FAKE_KEY}"}}, 500), b=healthy())
    check_answered(house.chat("aicarousel\nINFO forged"))
    [failed] = [line for line in house.lines if line.startswith("WARNING")]
    assert "attempt.failed" in failed and "route=a/1:m" in failed and "status=500" in failed
    assert all("\n" not in line and "\r" not in line and "\x1b" not in line and FAKE_KEY not in line and KEY not in line for line in house.lines)


# ---------------------------------------------------------------- which routes are tried

def test_nine_requests_reach_three_providers_three_times(build: Build, provider: Provider) -> None:
    house = build(a=healthy("a"), b=healthy("b"), c=healthy("c"))
    assert "".join(house.chat(stream=bool(turn % 2)).text for turn in range(9)) == "abcabcabc"
    assert [len(provider.calls(name)) for name in "abc"] == [3, 3, 3]


def test_rotation_goes_on_behind_the_one_that_served(build: Build) -> None:
    house = build(a=healthy("a"), b=in_turn(rate_limited(), healthy("b")), c=healthy("c"), d=healthy("d"))
    assert "".join(house.chat().text for _ in range(5)) == "acdac"


@pytest.mark.parametrize(("scripts", "n_calls", "status"), [
    ([OOPS, healthy()], 2, 200),
    ([OOPS], 2, 502),
    ([answer(chat_answer(""))], 2, 502),
    ([answer({"error": {"message": "bad key"}}, 401)], 1, 502),
    ([rate_limited()], 1, 429),
    ([answer({"error": {"message": "bad field"}}, 400)], 1, 400),
    ([answer({"error": {"message": "no such model"}}, 404)], 1, 404),
], ids=["server then fine", "server", "empty", "credential", "rate", "request", "model"])
@pytest.mark.parametrize("streamed", [False, True])
def test_lone_route_is_asked_once_more_for_server_faults_alone(build: Build, provider: Provider, scripts: list[Script], n_calls: int, status: int, streamed: bool) -> None:
    house = build(a=in_turn(*scripts))
    reply = house.chat(stream=streamed)
    assert (reply.status, len(provider.calls("a"))) == (status, n_calls)
    assert len((reply.error or {}).get("attempts", [])) == (n_calls if status != 200 else 0)


def test_max_attempts(build: Build, provider: Provider) -> None:
    house = build(a=OOPS, b=OOPS, c=healthy(), carousel={"maxAttempts": 2})
    reply = house.chat()
    assert reply.status == 502 and reply.headers["x-aicarousel-attempts"] == "2" and not provider.calls("c")


NO_FALLBACK: list[tuple[str, dict[str, str], str, list[int]]] = [     # model, headers, carousel.fallback, calls of a and b
    ("a/m", {}, "chain", [1, 1]),
    ("a/m", {"x-aicarousel-no-fallback": "1"}, "chain", [2, 0]),
    ("a/m", {"X-AICarousel-No-Fallback": "1"}, "chain", [2, 0]),
    ("a/m", {"x-aicarousel-no-fallback": "0"}, "chain", [1, 1]),
    ("a/m", {}, "none", [2, 0]),
    ("a/only-here", {}, "same-model", [2, 0]),
    ("aicarousel", {"x-aicarousel-no-fallback": "1"}, "chain", [1, 1]),
]


@pytest.mark.parametrize(("model", "headers", "fallback", "calls"), NO_FALLBACK)
def test_fallback_of_an_explicit_model(build: Build, provider: Provider, model: str, headers: dict[str, str], fallback: str, calls: list[int]) -> None:
    house = build(a=OOPS, b=healthy(), carousel={"fallback": fallback})
    reply = house.post("/v1/chat/completions", chat_body(model), headers=headers)
    assert [len(provider.calls("a")), len(provider.calls("b"))] == calls
    assert reply.status == (200 if calls[1] else 502)


def test_attempts_in_the_envelope(build: Build) -> None:
    house = build(a=answer({"error": {"message": f"wrong key {FAKE_KEY} at http://10.0.0.1/x"}}, 401), b=[Close()], c=answer(b"<html>oops</html>", 502, [("content-type", "text/html")]))
    reply = house.chat()
    assert reply.status == 502 and reply.headers["content-type"] == "application/json"
    attempts = reply.error["attempts"]
    assert [(row["provider"], row["model"], row["status"]) for row in attempts] == [("a", "m", 401), ("b", "m", None), ("c", "m", 502)]
    assert all(set(row) == {"provider", "model", "status", "reason", "ms"} and row["reason"] and row["ms"] >= 0 for row in attempts)
    assert FAKE_KEY.encode() not in reply.raw and b"127.0.0.1" not in reply.body and b"<html" not in reply.body


def test_one_bad_request_is_one_call_and_no_cooldown(build: Build, provider: Provider) -> None:
    house = build(a=answer({"error": {"message": "messages[0]: bad image", "type": "invalid_request_error", "code": "invalid_image", "param": "messages"}}, 400), b=healthy())
    reply = house.chat()
    assert reply.status == 400
    assert reply.error["message"] == "messages[0]: bad image" and reply.error["type"] == "invalid_request_error"
    assert reply.error["code"] == "invalid_image" and reply.error["param"] == "messages"
    assert len(provider.calls("a")) == 1 and not provider.calls("b") and house.cooling("a") == []


# ---------------------------------------------------------------- what a broken stream looks like

BROKEN: dict[str, list[Any]] = {
    "error event": [frame({"error": {"message": "overloaded", "code": 529}}), End()],
    "error event and done": [frame({"error": {"message": "overloaded"}}), DONE, End()],
    "error in a finish reason": [frame(chat_chunk({}, "error")), End()],
    "garbage": [b"data: {nonsense\n\n", DONE, End()],
    "no end": [End()],
    "closed": [Close()],
    "reset": [Reset()],
    "choices are a number": [frame({"choices": 5}), End()],
    "choices are an object": [frame({"choices": {"index": 0}}), End()],
    "finish reason is a list": [frame({"choices": [{"index": 0, "delta": {}, "finish_reason": ["stop"]}]}), End()],
    "an event is a number": [frame("5"), End()],
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_before_and_after_commit(build: Build, provider: Provider, name: str) -> None:
    steps = [Chunk(step) if isinstance(step, bytes) else step for step in BROKEN[name]]
    house = build(early=[*opened(ROLE), *steps], late=[*opened(ROLE, content("one")), Pause("break"), *steps], b=healthy(OTHER_TEXT),
                  carousel={"fallback": "none", "aliases": {"first": ["early/m", "b/m"]}})
    check_answered(house.chat("first", stream=True), OTHER_TEXT)
    with house.start_chat("late/m") as client:
        client.read_until(b'"one"')
        provider.release("break")
        error = check_broken_off(client.read_all(), "one")
    assert [row["provider"] for row in error["attempts"]] == ["late"]
    assert not [line for line in house.lines if line.startswith("ERROR")], house.lines


WRONG_BODIES: dict[str, Any] = {
    "a list": [1], "a number": 5, "null": None, "no choices": {"id": "x"}, "choices are an object": {"choices": {}}, "choices hold null": {"choices": [None]},
    "message is a string": {"choices": [{"message": "hi"}]}, "nothing in it": {"choices": [{"message": {"content": None}, "finish_reason": "stop"}]},
    "finish reason is a list": {"choices": [{"message": {"content": ""}, "finish_reason": ["stop"]}]},
    "finish reason is an object": {"choices": [{"message": {}, "finish_reason": {"a": 1}}]},
}


@pytest.mark.parametrize("name", WRONG_BODIES)
def test_wrong_whole_answers(build: Build, name: str) -> None:
    house = build(a=answer(WRONG_BODIES[name]), b=healthy(OTHER_TEXT))
    check_answered(house.chat(), OTHER_TEXT)
    assert not [line for line in house.lines if line.startswith("ERROR")], house.lines


def test_odd_usage_does_no_harm(build: Build) -> None:
    odd = [{"usage": 5}, {"usage": {"prompt_tokens": "many", "completion_tokens": -1}}, {"usage": {"prompt_tokens_details": 3}}, {"usage": []}, {"usage": {"prompt_tokens": 10 ** 30}}]
    house = build(a=in_turn(*[answer({**chat_answer(), **one}) for one in odd]))
    for _ in odd:
        check_answered(house.chat())
    assert len(house.wait_rows(len(odd))) == len(odd)


# ---------------------------------------------------------------- an edit while requests run

def test_request_under_way_finishes_on_the_old_configuration(build: Build, provider: Provider) -> None:
    house = build(a=stream(ROLE, content("one"), Pause("more"), content(" two"), FINISH, DONE))
    with house.start_chat("aicarousel") as client:
        client.read_until(b'"one"')
        house.reconfigure({"b": entry(provider.script("b", healthy(OTHER_TEXT)))})
        check_answered(house.chat(), OTHER_TEXT)
        provider.release("more")
        check_answered(client.read_all(), "one two")
    assert [row["route"] for row in house.wait_rows(2)] == ["b/1:m", "a/1:m"]


def test_fallback_of_a_request_under_way_stays_on_the_old_configuration(build: Build, provider: Provider) -> None:
    """And leaves nothing of the old one behind for those that come later."""
    house = build(a=[Pause("a"), *OOPS], b=healthy("old b"))
    with house.start_chat("aicarousel", stream=False) as client:
        provider.wait_paused("a")
        house.reconfigure({"b": entry(provider.listen("new", healthy("new b")))})
        provider.release("a")
        check_answered(client.read_all(), "old b")
    check_answered(house.chat("b/m"), "new b")


def test_new_configuration_is_used_by_what_was_asked_before(build: Build, provider: Provider) -> None:
    house = build(b=healthy("old b"))
    check_answered(house.chat("b/m"), "old b")
    house.reconfigure({"b": entry(provider.listen("new", healthy("new b")))})
    check_answered(house.chat("b/m"), "new b")


# ---------------------------------------------------------------- many at once

def test_many_at_once_with_one_provider_failing(build: Build, provider: Provider) -> None:
    house = build(a=lambda request: OOPS if request.streamed else [Close()], b=healthy("b" * 5000), c=healthy("c" * 5000))
    with ThreadPoolExecutor(32) as pool:
        replies = list(pool.map(lambda number: house.chat(stream=bool(number % 2)), range(60)))
    for reply in replies:
        check_answered(reply, reply.headers["x-aicarousel-provider"] * 5000)
    assert {row["outcome"] for row in house.wait_rows(60)} == {"ok"}
    assert len({reply.headers["x-aicarousel-request-id"] for reply in replies}) == 60


def test_connection_of_a_finished_stream_is_used_again(build: Build, provider: Provider) -> None:
    house = build(a=healthy())
    for _ in range(4):
        check_answered(house.chat(stream=True))
        house.settle()
        check_answered(house.chat())
    connections: list[Connection] = provider.links("a")
    assert [connection.n_requests for connection in connections] == [8]


# ---------------------------------------------------------------- POST /chat, which has no comments and no error event

def plain(house: House) -> Client:
    """A client that has asked for plain text."""
    client = house.connect()
    client.send(house.request_bytes("POST", "/chat", chat_body()["messages"]))
    return client


def test_plain_text_of_a_slow_provider(build: Build, provider: Provider) -> None:
    house = build(a=stream(Pause("head"), ROLE, content("one"), FINISH, DONE))
    with plain(house) as client:
        pass_pause(house, provider, "head", 20.0)
        reply = client.read_all()
    assert reply.status == 200 and reply.body == b"one" and reply.complete


def test_plain_text_when_slow_providers_fail_is_still_told(build: Build, provider: Provider) -> None:
    """No text has gone out, so that there is something better than a connection that ends."""
    house = build(a=[Pause("a"), *OOPS, Close()])
    with plain(house) as client:
        pass_pause(house, provider, "a", 6.0)
        reply = client.read_all()
    assert reply.status >= 500 and reply.headers["content-type"].startswith("text/plain") and b"a/m" in reply.body, reply.raw


# ---------------------------------------------------------------- what requests leave behind

@pytest.mark.parametrize("client", FORMATS)
@pytest.mark.parametrize("streamed", [False, True])
def test_requests_leave_nothing_that_only_a_garbage_collection_could_free(client: str, streamed: bool, build: Build) -> None:
    house = build(a=healthy())
    n_requests = 20
    for _ in range(3):
        assert house.post(PATHS[client], {**ask(client, "aicarousel"), "stream": streamed}).status == 200
    house.settle()
    gc.collect()
    gc.disable()
    try:
        for _ in range(n_requests):
            assert house.post(PATHS[client], {**ask(client, "aicarousel"), "stream": streamed}).status == 200
        house.settle()
        ours = [item for item in gc.get_objects() if type(item) in (aicarousel.Job, aicarousel.Needs)]
    finally:
        gc.enable()
    assert not ours, f"{len(ours)} of {n_requests}"
