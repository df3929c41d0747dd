"""What fuzzing found is replayed, and every endpoint takes requests changed in their structure: refused or served, never broken.

FUZZ_LONG=1 sends 1,500 changed requests to each format instead of 300; tests/fuzz.py looks for new ones in the pure parsers.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from typing import Any

import pytest

import fuzz
from dialects import PATHS
from fakes import FAKE_KEY, Gateway, Provider, healthy, read_reply
from house import entry
from test_hostile import body_of, check_envelope

N_REQUESTS = 1500 if os.environ.get("FUZZ_LONG") else 300


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_fuzz_corpus(name: str) -> None:
    kept = json.loads((fuzz.KEPT / f"{name}.json").read_text())
    assert len(kept) > 5
    for text in kept:
        fuzz.TARGETS[name](text.encode("latin-1"))


FOUND: dict[str, tuple[str, bytes]] = {
    "a third line end behind an event held up the loop for ever": ("stream", b"\x00event: x\ndata: {}\n\n\n"),
    "four of them": ("stream", b"\x00data: {}\n\n\n\n\ndata: {}\n\n\n"),
    "a choice of a tool by a type that is a list": ("chat", json.dumps(body_of("chat", tool_choice={"type": [None], "function": {"name": "f"}})).encode()),
    "a grammar that is no text": ("chat", json.dumps(body_of("chat", tools=[{"type": "custom", "custom": {"name": "p", "format": {"type": "grammar", "grammar": {"syntax": 1, "definition": [1]}}}}])).encode()),
    "a tier that is an object": ("chat", json.dumps(body_of("chat", service_tier={})).encode()),
    "a tier that is a list, from Messages": ("messages", json.dumps(body_of("messages", service_tier=[1])).encode()),
    "filters of a search that are a string": ("responses", json.dumps(body_of("responses", tools=[{"type": "web_search", "filters": "x"}])).encode()),
}


@pytest.mark.parametrize("name", FOUND)
def test_fuzz_found(name: str) -> None:
    target, data = FOUND[name]
    fuzz.TARGETS[target](data)


# ---------------------------------------------------------------- requests changed in their structure

TOOLS: dict[str, Any] = {
    "chat": [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}}}],
    "messages": [{"name": "f", "description": "d", "input_schema": {"type": "object", "properties": {"a": {"type": "string"}}}}],
    "responses": [{"type": "function", "name": "f", "description": "d", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}}],
}
#: A request of each format with what clients send every day: no field that is the provider's alone.
SOUND: dict[str, Any] = {
    "chat": {"model": "well/m", "stream": False, "max_tokens": 50, "temperature": 0.5, "top_p": 0.9, "stop": ["x"], "tools": TOOLS["chat"], "tool_choice": "auto",
             "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "t"}]},
                          {"role": "assistant", "content": None, "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
                          {"role": "tool", "tool_call_id": "call_1", "content": "r"}]},
    "messages": {"model": "well/m", "stream": False, "max_tokens": 50, "temperature": 0.5, "stop_sequences": ["x"], "system": [{"type": "text", "text": "s"}], "tools": TOOLS["messages"], "tool_choice": {"type": "auto"},
                 "messages": [{"role": "user", "content": [{"type": "text", "text": "t"}]}, {"role": "assistant", "content": [{"type": "tool_use", "id": "toolu_1", "name": "f", "input": {}}]},
                              {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "r"}]}]},
    "responses": {"model": "well/m", "stream": False, "max_output_tokens": 50, "temperature": 0.5, "instructions": "s", "tools": TOOLS["responses"], "tool_choice": "auto",
                  "input": [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "t"}]}, {"type": "function_call", "call_id": "call_1", "name": "f", "arguments": "{}"},
                            {"type": "function_call_output", "call_id": "call_1", "output": "r"}]},
}


def broken(client: str, body: Any) -> str:
    """What of the format's own schema `body` breaks at its core, "" for nothing: the fields without which nobody knows what was asked."""
    if not isinstance(body, dict):
        return "no object"
    if not isinstance(body.get("model", ""), (str, type(None))):
        return "model"
    if not isinstance(body.get("stream", False), (bool, type(None))):
        return "stream"
    limit = {"chat": "max_tokens", "messages": "max_tokens", "responses": "max_output_tokens"}[client]
    n_out = body.get(limit)
    if n_out is not None and (type(n_out) not in (int, float) or n_out < 0):
        return limit
    items = body.get("input" if client == "responses" else "messages")
    if client == "responses" and isinstance(items, str):
        return ""
    if not isinstance(items, list) or not items and client != "responses":
        return "no list of messages"
    for item in items:
        if not isinstance(item, dict):
            return "a message that is no object"
        if client != "responses" and not isinstance(item.get("role"), str):
            return "a role that is no string"
        said = item.get("content") if item.get("type", "message") in ("message", None) else None
        if not isinstance(said, (str, list, type(None))):
            return "content that is neither text nor parts"
        if isinstance(said, list) and not all(isinstance(part, dict) for part in said if client != "chat" or not isinstance(part, str)):
            return "a part that is no object"
    if not isinstance(body.get("tools", []), (list, type(None))) or not all(isinstance(tool, dict) for tool in body.get("tools") or ()):
        return "tools"
    return ""


@pytest.fixture(scope="module")
def gateway(module_provider: Provider, module_gateway_factory: Callable[..., Gateway]) -> Gateway:
    return module_gateway_factory({"carousel": {"maxWait": 0}, "well": entry(module_provider.script("well", healthy()))}, {"FAKE_KEY": FAKE_KEY})


@pytest.mark.parametrize("client", PATHS)
def test_fuzz_sound(gateway: Gateway, client: str) -> None:
    """What the changes begin with is served."""
    reply = gateway.post(PATHS[client], SOUND[client])
    assert reply.status == 200 and not broken(client, SOUND[client]), reply.raw


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("client", PATHS)
def test_fuzz_requests(gateway: Gateway, client: str, seed: int) -> None:
    """No 5xx, no misshapen error, none lost, and no 2xx for what breaks the schema."""
    rng, wrong = random.Random(f"{client} {seed}"), []
    link = gateway.connect()
    for _ in range(N_REQUESTS // 3):
        body = SOUND[client]
        for _ in range(rng.choice([1, 1, 2, 3])):
            body = fuzz.mutated(body, rng)
        link.raw.clear()
        link.send(gateway.request_bytes("POST", PATHS[client], json.dumps(body).encode(), close=False))
        link.read_until(lambda raw: read_reply(raw, "left").complete)
        reply = read_reply(bytes(link.raw), link.ended or "left")
        if not reply.complete or reply.status not in (200, 400, 404, 413) or reply.status == 200 and broken(client, body):
            wrong.append((reply.status, broken(client, body), body, reply.body[:300]))
        elif reply.status != 200:
            check_envelope(reply, client)
        if link.ended or reply.headers.get("connection") == "close":
            link.close()
            link = gateway.connect()
    link.close()
    assert not wrong, (len(wrong), wrong[:3])


def test_fuzz_broke_nothing(gateway: Gateway) -> None:
    """The last one."""
    assert gateway.stop() == 0 and "Traceback" not in gateway.log, gateway.log[-3000:]
