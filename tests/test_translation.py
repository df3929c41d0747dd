"""Mistakes of the catalogue that show only at a running gateway: counting, lists of models, what clients try first; and worked examples across formats."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import aicarousel as a
from fakes import FAKE_KEY, Gateway, Provider, answer, healthy

Json = dict[str, Any]
ASKS = {"max_tokens": 50, "messages": [{"role": "user", "content": "Hi"}]}
TOOL = {"name": "read", "description": "Reads a file and gives its text.", "input_schema": {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]}}
MESSAGE = {"id": "msg_1", "type": "message", "role": "assistant", "model": "m", "content": [{"type": "text", "text": "Hi."}], "stop_reason": "end_turn", "stop_sequence": None,
           "usage": {"input_tokens": 3, "output_tokens": 2}}


@pytest.fixture(scope="module")
def gateway(module_provider: Provider, module_gateway_factory: Callable[..., Gateway]) -> Gateway:
    """Provider a speaks Chat, b Messages, c Messages and always fails."""
    scripts = {"a": healthy(), "b": lambda request: answer(MESSAGE), "c": lambda request: answer({"error": {"message": "Oops."}}, 500)}
    common = {"default": "m", "enableFallback": False, "keys": ["env:FAKE_KEY"]}
    rows = {name: {"baseUrl": module_provider.script(name, script), "models": ["m", "claude-opus-4-8"], "format": "chat" if name == "a" else "messages", **common}
            for name, script in scripts.items()}
    return module_gateway_factory(rows, environment={"FAKE_KEY": FAKE_KEY})


def count(gateway: Gateway, model: str, **fields: Any) -> int:
    reply = gateway.post("/v1/messages/count_tokens?beta=true", {"model": model, "messages": ASKS["messages"], **fields})
    assert reply.status == 200, reply.raw
    return reply.json["input_tokens"]


@pytest.mark.parametrize("model", ["a/m", "b/m", "c/m"])
def test_m120_m121_counting_is_answered_and_harms_no_provider(gateway: Gateway, module_provider: Provider, model: str) -> None:
    before = len(module_provider.requests)
    assert 5 < count(gateway, model) < 30
    assert len(module_provider.requests) == before
    assert gateway.post("/v1/messages", {**ASKS, "model": "b/m"}).status == 200


def test_m122_tools_and_results_are_counted(gateway: Gateway) -> None:
    plain = count(gateway, "a/m")
    tooled = count(gateway, "a/m", tools=[TOOL])
    history = [*ASKS["messages"], {"role": "assistant", "content": [{"type": "tool_use", "id": "toolu_1", "name": "read", "input": {"path": "/a"}}]},
               {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "words " * 200}]}]}]
    assert tooled > plain + 20 and count(gateway, "a/m", tools=[TOOL], messages=history) > tooled + 200


@pytest.mark.parametrize("suffix", ["", "[1m]"])
def test_m113_the_beta_for_a_long_context_stays_in_the_header(gateway: Gateway, module_provider: Provider, suffix: str) -> None:
    betas = "claude-code-20250219,context-1m-2025-08-07"
    reply = gateway.post("/v1/messages?beta=true", {**ASKS, "model": f"b/claude-opus-4-8{suffix}"}, headers={"anthropic-beta": betas})
    assert reply.status == 200
    sent = module_provider.requests[-1]
    assert sent.headers["anthropic-beta"] == betas and sent.json["model"] == "claude-opus-4-8"


def test_m123_the_list_of_models_that_codex_asks_for_breaks_nothing(gateway: Gateway) -> None:
    reply = gateway.get("/v1/models?client_version=0.99.0", headers={"user-agent": "codex_cli_rs/0.99.0", "originator": "codex_cli_rs"})
    assert reply.status == 200 and reply.json["object"] == "list" and all(row["object"] == "model" and row["id"] for row in reply.json["data"])
    assert gateway.post("/v1/responses", {"model": "a/m", "input": "Hi", "store": False}).json["status"] == "completed"


def test_m124_a_websocket_is_refused_at_once_and_http_serves(gateway: Gateway) -> None:
    upgrade = {"connection": "Upgrade", "upgrade": "websocket", "sec-websocket-version": "13", "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ=="}
    reply = gateway.request("GET", "/v1/responses", headers=upgrade)
    assert reply.status in (405, 426) and reply.complete and reply.json["error"]["message"]
    assert gateway.post("/v1/responses", {"model": "a/m", "input": "Hi"}).status == 200


@pytest.mark.parametrize("path, body", [("/v1/messages", {**ASKS, "model": "c/m"}), ("/v1/chat/completions", {"model": "c/m", "messages": ASKS["messages"]}), ("/v1/responses", {"model": "c/m", "input": "Hi"})])
def test_m10_a_provider_that_fails_at_once_is_an_http_error(gateway: Gateway, path: str, body: Json) -> None:
    reply = gateway.post(path, body, stream=True, headers={"x-aicarousel-no-fallback": "1"})
    assert reply.status >= 500 and "error" in reply.json and not reply.streamed


def test_E18_a_refusal_reaches_every_client() -> None:
    """Responses in; Messages and Chat out."""
    events = [{"type": "response.output_item.added", "output_index": 0, "item": {"id": "msg_1", "type": "message", "status": "in_progress", "role": "assistant", "content": []}},
              {"type": "response.content_part.added", "item_id": "msg_1", "output_index": 0, "content_index": 0, "part": {"type": "refusal", "refusal": ""}},
              {"type": "response.refusal.delta", "item_id": "msg_1", "output_index": 0, "content_index": 0, "delta": "I can't help with that."},
              {"type": "response.refusal.done", "item_id": "msg_1", "output_index": 0, "content_index": 0, "refusal": "I can't help with that."},
              {"type": "response.completed", "response": {"id": "resp_7", "status": "completed", "usage": {"input_tokens": 9, "output_tokens": 7, "total_tokens": 16}}}]
    raw = b"".join(a.write_event(event, event["type"]) for event in events)
    deltas = a.read_events(raw, a.ResponsesStreamReader(a.Source(a.profile_for("openai", "gpt-5.5", "responses"), "s")))
    message = a.messages_write_answer(deltas, a.Asked({"model": "m"}, "s"))
    assert (message["content"], message["stop_reason"]) == ([{"type": "text", "text": "I can't help with that."}], "refusal")
    assert message["usage"] == {"input_tokens": 9, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0, "output_tokens": 7}
    choice = a.chat_write_answer(deltas, a.Asked({"model": "m", "meta": {"include_usage": True}}, "s"))["choices"][0]
    assert (choice["message"]["refusal"], choice["finish_reason"]) == ("I can't help with that.", "stop")
