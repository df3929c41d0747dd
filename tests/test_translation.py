"""Section 13: which requests pass through in the client's own bytes."""

from __future__ import annotations

import json
from typing import Any

import aicarousel as a
import pytest

Json = dict[str, Any]
TOOLS = [{"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {"zone": {"type": "string", "const": "utc"}}}}}]


def chat(call_id: str = "", **fields: Any) -> Json:
    """A Chat request, with one call in its history where an id is given."""
    called = [{"role": "assistant", "content": None, "tool_calls": [{"id": call_id, "type": "function", "function": {"name": "now", "arguments": "{}"}}]},
              {"role": "tool", "tool_call_id": call_id, "content": "12:00"}] if call_id else []
    return {"model": "m", "messages": [{"role": "user", "content": "Time?"}, *called], "tools": TOOLS, **fields}


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
    assert a.may_pass(client, json.dumps(body).encode(), body, a.profile_for(preset, "m", wire), a.PRESETS[preset]) is passes


@pytest.mark.parametrize("preset", ["mistral", "anthropic", "openai"])
def test_what_does_not_pass_is_mended_so_that_it_would(preset: str) -> None:
    """The hub's edits satisfy the conditions: a second request made of the first one's body needs none."""
    wire = {"anthropic": "messages"}.get(preset, "chat")
    profile = a.profile_for(preset, "m", wire)
    made, _ = a.translate_request(a.chat_read_request(chat("x:" * 40, tool_choice="required")), profile)
    assert a.may_pass(wire, json.dumps(made).encode(), made, profile, a.PRESETS[preset])
