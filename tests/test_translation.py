"""Section 26, Translation: which requests pass through, mistakes of the catalogue that show only at a running gateway, and worked examples across formats."""

from __future__ import annotations

import json
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
CHAT_TOOLS = [{"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {"zone": {"type": "string", "const": "utc"}}}}}]


def chat(call_id: str = "", **fields: Any) -> Json:
    """A Chat request, with one call in its history where an id is given."""
    called = [{"role": "assistant", "content": None, "tool_calls": [{"id": call_id, "type": "function", "function": {"name": "now", "arguments": "{}"}}]},
              {"role": "tool", "tool_call_id": call_id, "content": "12:00"}] if call_id else []
    return {"model": "m", "messages": [{"role": "user", "content": "Time?"}, *called], "tools": CHAT_TOOLS, **fields}


def messages(call_id: str) -> Json:
    return {"model": "m", "messages": [{"role": "user", "content": "Time?"}, {"role": "assistant", "content": [{"type": "tool_use", "id": call_id, "name": "now", "input": {}}]},
                                       {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call_id, "content": "12:00"}]}]}


def responses(call_id: str) -> Json:
    return {"model": "m", "input": [{"role": "user", "content": "Time?"}, {"type": "function_call", "call_id": call_id, "name": "now", "arguments": "{}"},
                                    {"type": "function_call_output", "call_id": call_id, "output": "12:00"}]}


PASSING: dict[str, tuple[str, Json, str, str, bool]] = {
    "Mistral, tools": ("chat", chat(), "mistral", "chat", True),
    "Mistral, its own ids": ("chat", chat("rEJDoePqM"), "mistral", "chat", True),
    "Mistral, ids of another provider": ("chat", chat("call_a1B2c3D4e5F6"), "mistral", "chat", False),
    "Mistral, a tool choice that it calls any": ("chat", chat(tool_choice="required"), "mistral", "chat", False),
    "Mistral, another tool choice": ("chat", chat(tool_choice="none"), "mistral", "chat", True),
    "Groq, any id": ("chat", chat("call_a1B2c3D4e5F6", tool_choice="required"), "groq", "chat", True),
    "OpenAI, an id too long for it": ("chat", chat("x" * 65), "openai", "chat", False),
    "Gemini, schemas": ("chat", chat(), "gemini", "chat", False),
    "Gemini, no tools": ("chat", chat(tools=[]), "gemini", "chat", True),
    "another format": ("chat", chat(), "anthropic", "messages", False),
    "thinking of another provider": ("chat", chat(user="aic1.eyJvIjoiZ3JvcSJ9"), "groq", "chat", False),
    "Anthropic, its own ids": ("messages", messages("toolu_01AbCd"), "anthropic", "messages", True),
    "Anthropic, an id it refuses": ("messages", messages("functions.now:0_u3k2m9x1a"), "anthropic", "messages", False),
    "Responses, own ids": ("responses", responses("call_a1B2c3D4e5F6"), "openai", "responses", True),
    "Responses, an id too long for it": ("responses", responses("x" * 65), "openai", "responses", False),
    "Responses, a string": ("responses", {"model": "m", "input": "Time?"}, "openai", "responses", True),
    "items of kinds unknown here": ("responses", {"model": "m", "input": [{"type": "new", "content": ["x", 5], "tool_calls": 5, "call_id": 7}]}, "openai", "responses", True),
}


@pytest.mark.parametrize("row", PASSING)
def test_a_request_passes_through_when_nothing_has_to_change(row: str) -> None:
    client, body, preset, wire, passes = PASSING[row]
    assert a.may_pass(client, json.dumps(body).encode(), body, a.profile_for(preset, "m", wire)) is passes


@pytest.mark.parametrize("preset", ["mistral", "anthropic", "openai"])
def test_what_does_not_pass_is_mended_so_that_it_would(preset: str) -> None:
    """The hub's edits satisfy the conditions: a second request made of the first one's body needs none."""
    wire = {"anthropic": "messages"}.get(preset, "chat")
    profile = a.profile_for(preset, "m", wire)
    made, _ = a.translate_request(a.chat_read_request(chat("x:" * 40, tool_choice="required")), profile)
    assert a.may_pass(wire, json.dumps(made).encode(), made, profile)


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
    """A provider that speaks Messages is asked; one that has no such path, or fails there, goes on serving."""
    n_asked = len(module_provider.requests)
    assert 5 < count(gateway, model) < 30
    assert len(module_provider.requests) - n_asked == (model != "a/m")
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
    upgrade = {"connection": "Upgrade, close", "upgrade": "websocket", "sec-websocket-version": "13", "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ=="}
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
