"""A provider that dies inside its answer, for clients of every format in front of providers of every format.

In the middle of text the client is told by its format's error event, and nothing looks ended.  In the middle of a tool call
nobody sees any of the call: where nothing went before it the next provider answers as if nothing had been, else comes the
error event.  First over real sockets, with the ways a connection ends; then for every byte at which a stream may be cut.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

import aicarousel
from dialects import FORMATS, PATHS, Seen, Telling, ask, read_events, read_stream
from fakes import FAKE_KEY, Chunk, Close, End, Gateway, Pause, Provider, Reply, Reset, opened, sse_data, stream

SAID = "Said by the first."
THOUGHT = "Thought by the first."
ARGUMENTS = ('{"a": 1, ', '"b": "two ', 'and more"}')
B_CALL = ["add", '{"a": 1, "b": 2}']


def chunks(frames: list[bytes]) -> list[Chunk]:
    return [Chunk(one) for one in frames]


#: How a provider dies: the steps that follow what it said.
DEATHS: dict[str, Callable[[Telling], list[Any]]] = {
    "reset": lambda told: [Reset()],
    "closed": lambda told: [Close()],
    "ended early": lambda told: [End(), Close()],
    "cut inside a frame": lambda told: [Chunk(told.call("add", *ARGUMENTS)[1][:-9]), Close()],
    "error event": lambda told: [*chunks(told.error()), End()],
}

#: Where it dies: what it said before, and the text and thinking of it that the client is shown (none: the next provider's answer, and nothing of this one).
PLACES: dict[str, tuple[Callable[[Telling], list[bytes]], str, str]] = {
    "before anything": (lambda told: [], "", ""),
    "in text": (lambda told: told.half_say(SAID), SAID, ""),
    "in a call": (lambda told: told.half_call("add", *ARGUMENTS[:2]), "", ""),
    "behind the name of a call": (lambda told: told.half_call("add"), "", ""),
    "in a call behind text": (lambda told: [*told.say(SAID), *told.half_call("add", *ARGUMENTS[:2])], SAID, ""),
    "in a call behind thinking": (lambda told: [*told.think(THOUGHT), *told.half_call("add", *ARGUMENTS[:2])], "", THOUGHT),
}


def answer_of_b(wire: str) -> list[Any]:
    """Text and a whole call."""
    told = Telling(wire)
    return stream(told.begin(), told.say("Said by ", "the second."), told.call("add", *B_CALL[1].partition(" ")), told.end())


def name_of(wire: str, place: str, death: str) -> str:
    return f"{wire}-{place}-{death}".replace(" ", "-")


CASES = [(wire, place, death) for wire in FORMATS for place in PLACES for death in DEATHS]


@pytest.fixture(scope="module")
def gateway(module_provider: Provider, module_gateway_factory: Callable[..., Gateway]) -> Gateway:
    """For each client format and case a pair of providers of its own behind an alias: the first plays the death, the second is well."""
    models: dict[str, Any] = {}
    aliases = {}
    for client in FORMATS:
        for wire, place, death in CASES:
            name = f"{client}-{name_of(wire, place, death)}"
            told = Telling(wire)
            dying = opened(told.begin(), PLACES[place][0](told), Pause(name), *DEATHS[death](told))
            for side, script in (("a", dying), ("b", answer_of_b(wire))):
                models[f"{name}-{side}"] = {"baseUrl": module_provider.script(f"{name}-{side}", script), "format": wire, "default": "m", "enableFallback": False, "models": ["m"],
                                            "keys": ["env:FAKE_KEY"]}
            aliases[name] = [f"{name}-a", f"{name}-b"]
    return module_gateway_factory({**models, "carousel": {"aliases": aliases, "fallback": "same-model", "maxWait": 0}}, {"FAKE_KEY": FAKE_KEY})


def play(gateway: Gateway, provider: Provider, client: str, name: str, shown: str) -> Reply:
    """Asks; lets the first provider die once all that it said has got through; the whole reply."""
    with gateway.connect() as connection:
        connection.send(gateway.request_bytes("POST", PATHS[client], ask(client, name)))
        provider.wait_paused(name)
        assert shown.encode() in connection.read_until(shown.encode(), 5.0)       # b"" is always in
        provider.release(name)
        return connection.read_all()


@pytest.mark.parametrize("client", FORMATS)
@pytest.mark.parametrize(("wire", "place", "death"), [pytest.param(*case, id=name_of(*case)) for case in CASES])
def test_a_provider_dies(gateway: Gateway, module_provider: Provider, client: str, wire: str, place: str, death: str) -> None:
    name, text, thinking = f"{client}-{name_of(wire, place, death)}", *PLACES[place][1:]
    reply = play(gateway, module_provider, client, name, text or thinking)
    assert reply.status == 200 and reply.streamed and reply.complete, reply.raw
    seen = read_stream(client, reply)
    n_asked = [len(module_provider.calls(f"{name}-{side}")) for side in "ab"]
    if not text and not thinking:
        assert n_asked == [1, 1]
        assert seen.text == "Said by the second." and seen.calls == seen.whole == [B_CALL] and seen.ended in ("tool_calls", "tool_use", "completed"), reply.raw
        assert not seen.errors and not seen.thinking
        assert reply.headers["x-aicarousel-attempts"] == "2"
    else:
        assert n_asked == [1, 0]
        assert (seen.text, seen.thinking) == (text, thinking)
        check_broken_off(seen, reply)


def check_broken_off(seen: Seen, reply: Reply) -> None:
    """No call at all, one error as the last event, and nothing that looks like an end."""
    assert not seen.calls and not seen.ended, reply.raw
    assert len(seen.errors) == 1 and not seen.after_error and seen.errors[0]["message"], reply.raw
    for mark in (b"[DONE]", b'"message_stop"', b'"response.completed"', b'"function_call"', b'"tool_use"', b'"tool_calls"'):
        assert mark not in reply.body, reply.raw


# ---------------------------------------------------------------- every byte at which a stream may be cut

def carrier_for(client: str, wire: str) -> Any:
    """What the relay sends a stream through."""
    told = aicarousel.FORMATS[client]
    if client == wire:
        return aicarousel.HeldPassage(told.passage(wants_usage=True, n_prompt_tokens=11, echo_model=None))
    asked = aicarousel.Asked(told.read_request(told.check(ask(client, "m"))), "seed", 1790000000)
    return aicarousel.Translation(aicarousel.FORMATS[wire].reader(aicarousel.Source(call_prefix=told.call_prefix)), told.writer(asked), n_prompt_tokens=11)


def two_calls(wire: str, text: str) -> bytes:
    """Text (or none) and two calls."""
    told = Telling(wire)
    return b"".join([*told.begin(), *(told.say(text) if text else []), *told.call("add", *ARGUMENTS), *told.call("add", *B_CALL[1].partition(" ")), *told.end()])


@pytest.mark.parametrize("text", ["", "Hi."], ids=["calls", "text and calls"])
@pytest.mark.parametrize("wire", FORMATS)
@pytest.mark.parametrize("client", FORMATS)
def test_cut_at_every_byte(client: str, wire: str, text: str) -> None:
    raw, calls = two_calls(wire, text), [["add", "".join(ARGUMENTS)], B_CALL]
    kinds = set()
    for at in range(len(raw)):
        carrier = carrier_for(client, wire)
        out = carrier.feed(raw[:at])
        shown = carrier.content
        out += carrier.close()
        body = out.decode()
        if not shown and not carrier.done:
            assert not carrier.content or carrier.broken, at
            kinds.add("unseen")             # the next provider is asked, and what came out is thrown away
            continue
        events = [json.loads(data) for data in sse_data(out) if data != "[DONE]"]
        seen = read_events(client, events, "[DONE]" in body)
        if carrier.done:
            kinds.add("whole")
            assert seen.text == text and seen.whole == seen.calls == calls and seen.ended, (at, body)
        else:
            kinds.add("broken off")
            assert carrier.broken == "cut" and not seen.ended, (at, body)
            assert seen.text == text[:len(seen.text)] and seen.calls == calls[:len(seen.calls)], (at, body)
            assert client == "chat" or seen.whole == seen.calls, (at, body)
    assert kinds >= {"unseen", "whole"} and ("broken off" in kinds or not text)



@pytest.mark.parametrize("wire", FORMATS)
@pytest.mark.parametrize("client", FORMATS)
def test_error_in_the_same_read_as_a_piece_of_a_call(client: str, wire: str) -> None:
    told, calls = Telling(wire), [["add", "".join(ARGUMENTS)], B_CALL]
    frames = [*told.begin(), *told.say("Hi."), *told.call("add", *ARGUMENTS), *told.call("add", *B_CALL[1].partition(" "))]
    error, n_broken_off = b"".join(told.error()), 0
    for first in range(len(frames)):
        for second in range(first, len(frames) + 1):
            carrier = carrier_for(client, wire)
            out = carrier.feed(b"".join(frames[:first]))
            committed = carrier.content
            out += carrier.feed(b"".join(frames[first:second]) + error)
            assert carrier.error is not None and not carrier.done
            if not committed:
                continue                # the next provider is asked
            n_broken_off += 1
            seen = read_events(client, [json.loads(data) for data in sse_data(out)])
            assert seen.text == "Hi."[:len(seen.text)] and seen.calls == calls[:len(seen.calls)] and not seen.ended, (first, second, out)
            assert client == "chat" or seen.whole == seen.calls, (first, second, out)
    assert n_broken_off > 20
