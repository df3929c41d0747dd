"""Section 18, translation: Chat requests read and written, Chat streams and answers read and written.

Ids like m73 are numbers of the catalogue of known mistakes, E1 and so on worked examples, of the translation reference.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

import aicarousel as a
from deltas import check_deltas
from dialects import without_found

Json = dict[str, Any]
SHARED = Path(__file__).resolve().parents[2] / "shared"
PLAIN = a.Profile()
OPENAI = a.profile_for("openai", "gpt-4o")
GPT5 = a.profile_for("openai", "gpt-5.5")
GROQ = a.profile_for("groq", "openai/gpt-oss-120b")
CEREBRAS = a.profile_for("cerebras", "qwen-3")
OPENROUTER = a.profile_for("openrouter", "anthropic/claude-haiku-4.5")
MISTRAL = a.profile_for("mistral", "mistral-large-latest")
DEEPSEEK = a.profile_for("deepseek", "deepseek-flash")
GEMINI = a.profile_for("gemini", "gemini-2.5-flash")
GEMINI3 = a.profile_for("gemini", "gemini-3.5-flash-lite")
KIMI = a.profile_for("moonshot", "kimi-k2")
OLLAMA = a.profile_for("ollama", "qwen3")
VLLM = a.profile_for("vllm", "qwen3")
HI = [{"role": "user", "content": "hi"}]
PIXEL = "data:image/png;base64,iVBORw0KGgo="
SCHEMA = {"type": "object", "properties": {"p": {"type": "string"}}}


# ------------------------------------------------------------------ requests: Chat to hub

def read(**fields: Any) -> Json:
    return a.chat_read_request({"model": "m", "messages": HI, **fields})


def said(*messages: Json) -> list[Json]:
    """The turns of a conversation."""
    turns: list[Json] = read(messages=[*messages])["turns"]
    return turns


def call_of(call_id: str = "call_A12345", name: str = "f", args: str = "{}", **more: Any) -> Json:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": args}, **more}


def parts_of(content: Any) -> list[Json]:
    return said({"role": "user", "content": content})[0]["parts"]


def tool(name: str = "f", **more: Any) -> Json:
    return {"type": "function", "function": {"name": name, "parameters": SCHEMA, **more}}


FIELDS: list[tuple[str, Json, str, Any]] = [        # row, fields of the body, key of the hub, what it holds
    ("max_tokens", {"max_tokens": 5}, "max_out", 5),
    ("max_completion_tokens wins", {"max_tokens": 5, "max_completion_tokens": 7}, "max_out", 7),
    ("stream", {"stream": True}, "stream", True),
    ("include_usage", {"stream_options": {"include_usage": True, "include_obfuscation": False}}, "meta", {"include_usage": True}),
    ("include_usage false", {"stream_options": {"include_usage": False}}, "meta", None),
    ("sampling", {"temperature": 0, "top_p": 0.5, "top_k": 3, "seed": 4, "logit_bias": {"1": 2}}, "sampling",
     {"temperature": 0, "top_p": 0.5, "top_k": 3, "seed": 4, "logit_bias": {"1": 2}}),
    ("sampling null", {"temperature": None}, "sampling", None),
    ("stop string", {"stop": "END"}, "stop", ["END"]),
    ("stop list", {"stop": ["A", "", "B"]}, "stop", ["A", "B"]),
    ("stop null", {"stop": None}, "stop", None),
    ("effort", {"reasoning_effort": "high"}, "think", {"mode": "on", "effort": "high"}),
    ("effort none", {"reasoning_effort": "none"}, "think", {"mode": "off"}),
    ("reasoning effort", {"reasoning": {"effort": "low"}}, "think", {"mode": "on", "effort": "low"}),
    ("reasoning budget", {"reasoning": {"max_tokens": 2000}}, "think", {"mode": "on", "budget": 2000}),
    ("reasoning off", {"reasoning": {"enabled": False}}, "think", {"mode": "off"}),
    ("reasoning excluded", {"reasoning": {"effort": "low", "exclude": True}}, "think", {"mode": "on", "effort": "low", "show": "omitted"}),
    ("thinking enabled", {"thinking": {"type": "enabled", "budget_tokens": 3000}}, "think", {"mode": "on", "budget": 3000}),
    ("thinking adaptive", {"thinking": {"type": "adaptive"}}, "think", {"mode": "auto"}),
    ("thinking disabled", {"thinking": {"type": "disabled"}}, "think", {"mode": "off"}),
    ("enable_thinking", {"enable_thinking": False}, "think", {"mode": "off"}),
    ("chat_template_kwargs", {"chat_template_kwargs": {"enable_thinking": True}}, "think", {"mode": "on"}),
    ("response_format text", {"response_format": {"type": "text"}}, "format", None),
    ("response_format json", {"response_format": {"type": "json_object"}}, "format", {"kind": "json"}),
    ("response_format schema", {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}}, "format",
     {"kind": "schema", "name": "x", "schema": SCHEMA, "strict": True}),
    ("meta", {"user": "u", "service_tier": "auto", "verbosity": "low", "prompt_cache_key": "k", "n": 2, "store": True, "metadata": {"a": "b"}, "safety_identifier": "s"}, "meta",
     {"user": "u", "tier": "auto", "verbosity": "low", "cache_key": "k", "n": 2, "store": True, "metadata": {"a": "b"}, "safety": "s"}),
    ("n 1", {"n": 1}, "meta", None),
    ("logprobs", {"logprobs": True, "top_logprobs": 2}, "meta", {"logprobs": True, "top_logprobs": 2}),
    ("parallel", {"parallel_tool_calls": False}, "parallel", False),
    ("own fields", {"prediction": {"type": "content"}, "modalities": ["text"], "provider": {"order": ["x"]}, "moderation": 1}, "extra",
     {"chat": {"prediction": {"type": "content"}, "modalities": ["text"], "provider": {"order": ["x"]}, "moderation": 1}}),
    ("other words about thinking are kept", {"chat_template_kwargs": {"enable_thinking": True, "custom": 1}}, "extra", {"chat": {"chat_template_kwargs": {"custom": 1}}}),
    ("routing fields go nowhere", {"api_base": "http://x", "api_key": "k", "fallbacks": []}, "extra", {}),
    ("an unknown response_format", {"response_format": {"type": "grammar", "grammar": "g"}}, "extra", {"chat": {"response_format": {"type": "grammar", "grammar": "g"}}}),
    ("system of Claude", {"system": "Be brief."}, "system", [{"type": "text", "text": "Be brief."}]),
    ("cache_control of Claude", {"cache_control": {"type": "ephemeral"}}, "meta", {"cache_auto": {"type": "ephemeral"}}),
    ("tools", {"tools": [tool("f", description="d", strict=True)]}, "tools", [{"name": "f", "kind": "function", "description": "d", "schema": SCHEMA, "strict": True}]),
    ("tools flat", {"tools": [{"type": "function", "name": "f", "parameters": SCHEMA}]}, "tools", [{"name": "f", "kind": "function", "schema": SCHEMA}]),
    ("tools without type", {"tools": [{"function": {"name": "f"}}]}, "tools", [{"name": "f", "kind": "function"}]),
    ("tools twice", {"tools": [tool("f"), tool("f", description="2")]}, "tools", [{"name": "f", "kind": "function", "schema": SCHEMA}]),
    ("tools marked", {"tools": [{**tool("f"), "cache_control": {"type": "ephemeral"}}]}, "tools",
     [{"name": "f", "kind": "function", "schema": SCHEMA, "cache": {"type": "ephemeral"}}]),
    ("tools custom", {"tools": [{"type": "custom", "custom": {"name": "c", "description": "d", "format": {"type": "grammar", "grammar": {"syntax": "lark", "definition": "start: x"}}}}]},
     "tools", [{"name": "c", "kind": "custom", "description": "d", "grammar": {"syntax": "lark", "definition": "start: x"}}]),
    ("tools custom flat", {"tools": [{"type": "custom", "name": "c", "format": {"type": "text"}}]}, "tools", [{"name": "c", "kind": "custom"}]),
    ("tools hosted", {"tools": [{"type": "openrouter:web_search"}]}, "tools",
     [{"name": "openrouter:web_search", "kind": "hosted", "family": "openrouter", "raw": {"type": "openrouter:web_search"}}]),
    ("functions", {"functions": [{"name": "f", "parameters": SCHEMA}]}, "tools", [{"name": "f", "kind": "function", "schema": SCHEMA}]),
    ("functions answer alone", {"functions": [{"name": "f"}]}, "parallel", False),
    ("choice auto", {"tool_choice": "auto"}, "choice", {"mode": "auto"}),
    ("choice required", {"tool_choice": "required"}, "choice", {"mode": "any"}),
    ("choice any", {"tool_choice": "any"}, "choice", {"mode": "any"}),
    ("m76 choice none as an object", {"tool_choice": {"type": "none"}}, "choice", {"mode": "none"}),
    ("choice function", {"tool_choice": {"type": "function", "function": {"name": "f"}}}, "choice", {"mode": "tool", "name": "f"}),
    ("m78 choice flat", {"tool_choice": {"type": "function", "name": "f"}}, "choice", {"mode": "tool", "name": "f"}),
    ("choice custom", {"tool_choice": {"type": "custom", "custom": {"name": "c"}}}, "choice", {"mode": "tool", "name": "c", "kind": "custom"}),
    ("choice allowed", {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "f"}}]}}}, "choice",
     {"mode": "any", "allowed": ["f"]}),
    ("choice allowed flat", {"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]}}, "choice", {"mode": "auto", "allowed": ["f"]}),
    ("choice hosted", {"tool_choice": {"type": "web_search"}}, "choice", {"mode": "tool", "name": "web_search", "kind": "hosted"}),
    ("function_call", {"function_call": {"name": "f"}}, "choice", {"mode": "tool", "name": "f"}),
    ("function_call word", {"function_call": "none"}, "choice", {"mode": "none"}),
    ("choice unknown", {"tool_choice": "whatever"}, "choice", None),
]


@pytest.mark.parametrize("fields, key, expected", [row[1:] for row in FIELDS], ids=[row[0] for row in FIELDS])
def test_a_field_becomes(fields: Json, key: str, expected: Any) -> None:
    before = copy.deepcopy(fields)
    got = read(**fields).get(key)
    assert (got or None) == (expected or None) if expected is not False else got is False
    assert fields == before


THOUGHT = {"type": "reasoning.text", "text": "Hm.", "signature": "EqQBCkYI", "format": "anthropic-claude-v1", "index": 0}
BARE_THOUGHT = {**THOUGHT, "text": ""}
ANTHROPIC_SEAL = {"family": "anthropic", "model": "", "field": "signature", "data": "EqQBCkYI"}
SAID: list[tuple[str, Json, list[Json]]] = [        # row, an assistant message, its parts
    ("string", {"content": "x"}, [a.text_part("x")]),
    ("empty", {"content": ""}, []),
    ("null", {"content": None}, []),
    ("parts", {"content": [{"type": "text", "text": "x"}, {"type": "output_text", "text": "y"}]}, [a.text_part("x"), a.text_part("y")]),
    ("refusal", {"content": None, "refusal": "no"}, [{"type": "refusal", "text": "no"}]),
    ("refusal part", {"content": [{"type": "refusal", "refusal": "no"}]}, [{"type": "refusal", "text": "no"}]),
    ("calls", {"content": "x", "tool_calls": [call_of(), call_of("call_B12345", "g", '{"a": 1}')]},
     [a.text_part("x"), a.call_part("call_A12345", "f", "{}"), a.call_part("call_B12345", "g", '{"a": 1}')]),
    ("call with an object", {"tool_calls": [{"id": "i", "function": {"name": "f", "arguments": {"a": 1}}}]}, [a.call_part("i", "f", '{"a":1}')]),
    ("call with null", {"tool_calls": [{"id": "i", "function": {"name": "f", "arguments": None}}]}, [a.call_part("i", "f", "")]),
    ("custom call", {"tool_calls": [{"id": "i", "type": "custom", "custom": {"name": "c", "input": "a\nb"}}]}, [a.call_part("i", "c", '{"input":"a\\nb"}', "custom")]),
    ("m84 note", {"tool_calls": [call_of(extra_content={"google": {"thought_signature": "S"}})]},
     [{**a.call_part("call_A12345", "f", "{}"), "note": {"family": "gemini", "data": {"google": {"thought_signature": "S"}}}}]),
    ("calls null", {"content": "x", "tool_calls": None}, [a.text_part("x")]),
    ("reasoning_content", {"content": "x", "reasoning_content": "Hm."}, [{"type": "think", "text": "Hm."}, a.text_part("x")]),
    ("reasoning", {"content": "x", "reasoning": "Hm.", "reasoning_content": "Hm."}, [{"type": "think", "text": "Hm."}, a.text_part("x")]),
    ("reasoning_details", {"content": "x", "reasoning": "Hm.", "reasoning_details": [THOUGHT]}, [{"type": "think", "text": "Hm.", "seal": ANTHROPIC_SEAL}, a.text_part("x")]),
    ("text and seal apart", {"content": "x", "reasoning_content": "Hm.", "reasoning_details": [BARE_THOUGHT]}, [{"type": "think", "text": "Hm.", "seal": ANTHROPIC_SEAL}, a.text_part("x")]),
    ("two seals, one text", {"reasoning_content": "Hm. Ho.", "reasoning_details": [BARE_THOUGHT, {**BARE_THOUGHT, "index": 1}]}, [{"type": "think", "text": "Hm. Ho."}]),
    ("encrypted", {"reasoning_content": "Hm.", "reasoning_details": [{"type": "reasoning.encrypted", "data": "gAAAA", "format": "openai-responses-v1"}]},
     [{"type": "think", "text": "Hm.", "seal": {"family": "openai", "model": "", "field": "encrypted", "data": "gAAAA"}}]),
    ("redacted beside text", {"reasoning_content": "Hm.", "reasoning_details": [{"type": "reasoning.encrypted", "data": "D", "format": "anthropic-claude-v1"}]},
     [{"type": "think", "text": "Hm."}, {"type": "think", "text": "", "seal": {"family": "anthropic", "model": "", "field": "redacted", "data": "D"}}]),
    ("Mistral's thinking", {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}, {"type": "text", "text": "x"}]},
     [{"type": "think", "text": "Hm."}, a.text_part("x")]),
    ("prefix", {"content": "x", "prefix": True}, [a.text_part("x")]),
]


@pytest.mark.parametrize("message, parts", [row[1:] for row in SAID], ids=[row[0] for row in SAID])
def test_an_assistant_message_becomes(message: Json, parts: list[Json]) -> None:
    assert said(*HI, {"role": "assistant", **message})[1] == {"role": "assistant", "parts": parts}


CONTENT: list[tuple[str, Any, list[Json]]] = [
    ("string", "x", [a.text_part("x")]),
    ("marked", [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}], [a.text_part("x", {"type": "ephemeral"})]),
    ("input_text", [{"type": "input_text", "text": "x"}], [a.text_part("x")]),
    ("image", [{"type": "image_url", "image_url": {"url": PIXEL, "detail": "low"}}], [{"type": "image", "data": "iVBORw0KGgo=", "mime": "image/png", "detail": "low"}]),
    ("m74 image by URL", [{"type": "image_url", "image_url": {"url": "https://x/y.png"}}], [{"type": "image", "url": "https://x/y.png"}]),
    ("image bare", [{"type": "image_url", "image_url": "https://x/y.png"}], [{"type": "image", "url": "https://x/y.png"}]),
    ("image without mime", [{"type": "image_url", "image_url": {"url": "data:;base64,iVBORw0KGgo="}}], [{"type": "image", "data": "iVBORw0KGgo=", "mime": "image/png"}]),
    ("image of Responses", [{"type": "input_image", "image_url": PIXEL}], [{"type": "image", "data": "iVBORw0KGgo=", "mime": "image/png"}]),
    ("file", [{"type": "file", "file": {"filename": "a.pdf", "file_data": "data:application/pdf;base64,JVBERi0="}}],
     [{"type": "file", "mime": "application/pdf", "data": "JVBERi0=", "name": "a.pdf"}]),
    ("file id", [{"type": "file", "file": {"file_id": "f1"}}], [{"type": "file", "file_id": "f1"}]),
    ("document", [{"type": "document_url", "document_url": "https://x/y.pdf"}], [{"type": "file", "url": "https://x/y.pdf"}]),
    ("audio", [{"type": "input_audio", "input_audio": {"data": "QQ==", "format": "wav"}}], [{"type": "audio", "data": "QQ==", "format": "wav"}]),
    ("video", [{"type": "video_url", "video_url": {"url": "https://x"}}], [{"type": "video", "raw": {"type": "video_url", "video_url": {"url": "https://x"}}}]),
]


@pytest.mark.parametrize("content, parts", [row[1:] for row in CONTENT], ids=[row[0] for row in CONTENT])
def test_content_becomes(content: Any, parts: list[Json]) -> None:
    assert parts_of(content) == parts


REFUSED: list[tuple[str, Json, str]] = [
    ("part", {"messages": [*HI, *HI, *HI, {"role": "user", "content": [{"type": "foo"}]}]}, 'messages[3].content[0]: unknown part type "foo"'),
    ("image", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content[0] has no source."),
    ("data URL", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:;base64,QQ=="}}]}]}, "invalid data URL"),
    ("text", {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "messages[0].content[0].text must be a string."),
    ("audio", {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]}, "messages[0].content[0] has no source."),
    ("custom tool", {"tools": [{"type": "custom"}]}, "tools[0].custom must be an object with a name."),
    ("no messages", {"messages": []}, "messages must be a list with at least one message."),
    ("role", {"messages": [{"role": "bot", "content": "x"}]}, "messages[0].role must be one of assistant, developer, function, system, tool, user."),
]


@pytest.mark.parametrize("fields, message", [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_what_no_provider_could_read_is_refused(fields: Json, message: str) -> None:
    with pytest.raises(a.GatewayError) as caught:
        read(**fields)
    assert (caught.value.status, caught.value.message) == (400, message)


@pytest.mark.parametrize("body", [None, [], "x", {}, {"messages": None}, {"messages": HI, "tools": 5}, {"messages": HI, "tools": [None]}])
def test_garbage_is_refused_and_never_breaks(body: Any) -> None:
    with pytest.raises(a.GatewayError):
        a.chat_read_request(body)


def test_system_text_leads_or_stays_in_its_place() -> None:
    hub = read(messages=[{"role": "system", "content": "a"}, {"role": "developer", "content": [{"type": "text", "text": "b"}]}, *HI, {"role": "developer", "content": "c"}])
    assert hub["system"] == [a.text_part("a"), a.text_part("b")]
    assert hub["turns"][1] == {"role": "system", "parts": [a.text_part("c")]}


def test_tool_messages_join_one_turn_and_keep_their_parts() -> None:
    turns = said(*HI, {"role": "assistant", "tool_calls": [call_of(), call_of("call_B12345")]}, {"role": "tool", "tool_call_id": "call_A12345", "content": "1"},
                 {"role": "tool", "tool_call_id": "call_B12345", "content": [{"type": "text", "text": "2"}, {"type": "image_url", "image_url": {"url": "https://x"}}]}, *HI)
    assert turns[2]["parts"] == [a.result_part("call_A12345", [a.text_part("1")]), a.result_part("call_B12345", [a.text_part("2"), {"type": "image", "url": "https://x"}])]
    assert turns[3]["parts"] == [a.text_part("hi")]


def test_functions_of_old_pair_by_name() -> None:
    old = [{"role": "assistant", "content": None, "function_call": {"name": name, "arguments": "{}"}} for name in "fg"]
    turns = said(*HI, *old, {"role": "function", "name": "f", "content": "1"}, {"role": "function", "name": "g", "content": "2"}, {"role": "function", "name": "h", "content": "3"})
    ids = [turn["parts"][0]["id"] for turn in turns[1:3]]
    assert ids[0] != ids[1] and [part["id"] for part in turns[3]["parts"]] == [*ids, ""]
    again = said(*HI, *old)
    assert [turn["parts"][0]["id"] for turn in again[1:3]] == ids


def test_a_name_is_dropped_and_told() -> None:
    hub = read(messages=[{"role": "user", "name": "bob", "content": "x"}, {"role": "user", "name": None, "content": "y"}])
    assert hub["dropped"] == ["name"]


# ------------------------------------------------------------------ requests: hub to Chat

def user(*parts: Any) -> Json:
    return {"role": "user", "parts": [a.text_part(part) if isinstance(part, str) else part for part in parts]}


def bot(*parts: Any) -> Json:
    return {**user(*parts), "role": "assistant"}


def call(call_id: str = "call_A12345", name: str = "f", args: str = "{}", kind: str = "function", **more: Any) -> Json:
    return {**a.call_part(call_id, name, args, kind), **more}


def result(call_id: str = "call_A12345", *parts: Any, **more: Any) -> Json:
    return {**a.result_part(call_id, [a.text_part(part) if isinstance(part, str) else part for part in parts or ("r",)]), **more}


def think(text: str = "Hm.", **seal: Any) -> Json:
    return {"type": "think", "text": text, **({"seal": {"model": "", **seal}} if seal else {})}


def hub_of(*turns: Json, client: str = "messages", **fields: Any) -> Json:
    return {**a.new_hub(client, "m", False), "turns": [*turns] or [user("hi")], **fields}      # type: ignore[arg-type]


def write(hub: Json, profile: a.Profile = PLAIN) -> Json:
    before = copy.deepcopy(hub)
    ready = a.prepare(hub, profile)
    body = a.chat_write_request(ready, profile)
    assert hub == before and a.chat_write_request(a.prepare(hub, profile), profile) == body
    return body


def messages_of(*turns: Json, profile: a.Profile = PLAIN, **fields: Any) -> list[Json]:
    written: list[Json] = write(hub_of(*turns, **fields), profile)["messages"]
    return written


TOOL = {"name": "f", "kind": "function", "schema": SCHEMA}
CUSTOM = {"name": "apply_patch", "kind": "custom", "description": "Edit files.", "grammar": {"syntax": "lark", "definition": "start: x"}}
A_CALL = {"id": "call_A12345", "type": "function", "function": {"name": "f", "arguments": "{}"}}
A_RESULT = {"role": "tool", "tool_call_id": "call_A12345", "content": "r"}
IMAGE = {"type": "image", "data": "iVBORw0KGgo=", "mime": "image/png"}
IMAGE_OUT = {"type": "image_url", "image_url": {"url": PIXEL}}
MARK = {"type": "ephemeral"}

WRITTEN: list[tuple[str, Json, a.Profile, Json]] = [     # row, fields of the hub, profile, fields of the body (None: absent)
    ("model", {}, a.Profile(model="wire"), {"model": "wire", "stream": None, "tools": None, "max_tokens": None}),
    ("max_tokens", {"max_out": 9}, PLAIN, {"max_tokens": 9}),
    ("max_completion_tokens", {"max_out": 9}, GROQ, {"max_completion_tokens": 9, "max_tokens": None}),
    ("stream", {"stream": True}, PLAIN, {"stream": True, "stream_options": {"include_usage": True}}),
    ("stream without options", {"stream": True}, MISTRAL, {"stream": True, "stream_options": None}),
    ("sampling", {"sampling": {"temperature": 0.2, "top_p": 0.9, "seed": 1, "presence_penalty": 1}}, PLAIN, {"temperature": 0.2, "top_p": 0.9, "seed": 1, "presence_penalty": 1}),
    ("seed of Mistral", {"sampling": {"seed": 1}}, MISTRAL, {"random_seed": 1, "seed": None}),
    ("top_k where known", {"sampling": {"top_k": 5}}, VLLM, {"top_k": 5}),
    ("top_k elsewhere", {"sampling": {"top_k": 5}}, PLAIN, {"top_k": None}),
    ("stop", {"stop": ["a"]}, PLAIN, {"stop": ["a"]}),
    ("effort", {"think": {"mode": "on", "effort": "high"}}, PLAIN, {"reasoning_effort": "high"}),
    ("m99 effort alone", {"think": {"effort": "high"}}, PLAIN, {"reasoning_effort": "high", "thinking": None}),
    ("adaptive", {"think": {"mode": "auto"}}, PLAIN, {"reasoning_effort": None}),
    ("budget", {"think": {"mode": "on", "budget": 8000}}, PLAIN, {"reasoning_effort": "medium"}),
    ("switch", {"think": {"mode": "off"}}, VLLM, {"chat_template_kwargs": {"enable_thinking": False}}),
    ("m102 off and effort to DeepSeek", {"think": {"mode": "off", "effort": "high"}}, DEEPSEEK, {"thinking": {"type": "disabled"}, "reasoning_effort": None}),
    ("reasoning of OpenRouter", {"think": {"mode": "on", "effort": "high"}}, OPENROUTER, {"reasoning": {"effort": "high"}, "reasoning_effort": None}),
    ("schema", {"format": {"kind": "schema", "name": "x", "schema": SCHEMA, "strict": True}}, PLAIN,
     {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}}),
    ("schema without a name", {"format": {"kind": "schema", "schema": SCHEMA}}, PLAIN,
     {"response_format": {"type": "json_schema", "json_schema": {"name": "output", "schema": SCHEMA}}}),
    ("schema where unknown", {"format": {"kind": "schema", "schema": SCHEMA}}, DEEPSEEK, {"response_format": {"type": "json_object"}}),
    ("json", {"format": {"kind": "json"}}, PLAIN, {"response_format": {"type": "json_object"}}),
    ("tools", {"tools": [{**TOOL, "description": "d", "strict": True}]}, PLAIN, {"tools": [tool("f", description="d", strict=True)]}),
    ("m82 tool without schema", {"tools": [{"name": "f", "kind": "function"}]}, PLAIN,
     {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]}),
    ("m83 schema for Gemini", {"tools": [{**TOOL, "schema": {"$schema": "x", "type": "object", "properties": {"n": {"type": "integer", "exclusiveMinimum": 0}}}}]}, GEMINI,
     {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0}}}}}]}),
    ("m90 deferred tool", {"tools": [{**TOOL, "defer": True, "raw": {"defer_loading": True}}]}, PLAIN, {"tools": [tool()]}),
    ("m88 namespace", {"tools": [{**TOOL, "namespace": "mcp__docs"}]}, PLAIN, {"tools": [tool("mcp__docs__f")]}),
    ("m47 freeform as a function", {"tools": [CUSTOM]}, PLAIN, {"tools": [{"type": "function", "function": {
        "name": "apply_patch", "description": 'Edit files.\nThe whole text goes in "input".\nIt must match this lark grammar:\nstart: x',
        "parameters": {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"], "additionalProperties": False}}}]}),
    ("freeform at OpenAI", {"tools": [CUSTOM]}, OPENAI, {"tools": [{"type": "custom", "custom": {
        "name": "apply_patch", "description": "Edit files.", "format": {"type": "grammar", "grammar": {"syntax": "lark", "definition": "start: x"}}}}]}),
    ("tool marks at OpenRouter", {"tools": [{**TOOL, "cache": MARK}]}, OPENROUTER, {"tools": [{**tool(), "cache_control": MARK}]}),
    ("tool marks elsewhere", {"tools": [{**TOOL, "cache": MARK}]}, PLAIN, {"tools": [tool()]}),
    ("choice auto", {"tools": [TOOL], "choice": {"mode": "auto"}}, PLAIN, {"tool_choice": "auto"}),
    ("choice any", {"tools": [TOOL], "choice": {"mode": "any"}}, PLAIN, {"tool_choice": "required"}),
    ("choice any at Mistral", {"tools": [TOOL], "choice": {"mode": "any"}}, MISTRAL, {"tool_choice": "any"}),
    ("choice any at Kimi", {"tools": [TOOL], "choice": {"mode": "any"}}, KIMI, {"tool_choice": "auto"}),
    ("m76 choice none", {"tools": [TOOL], "choice": {"mode": "none"}}, PLAIN, {"tool_choice": "none"}),
    ("m78 choice of one", {"tools": [TOOL], "choice": {"mode": "tool", "name": "f"}}, PLAIN, {"tool_choice": {"type": "function", "function": {"name": "f"}}}),
    ("choice of a freeform tool", {"tools": [CUSTOM], "choice": {"mode": "tool", "name": "apply_patch", "kind": "custom"}}, OPENAI,
     {"tool_choice": {"type": "custom", "custom": {"name": "apply_patch"}}}),
    ("choice among some", {"tools": [TOOL, {**TOOL, "name": "g"}], "choice": {"mode": "any", "allowed": ["g"]}}, OPENAI,
     {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "g"}}]}}}),
    ("choice among some elsewhere", {"tools": [TOOL, {**TOOL, "name": "g"}], "choice": {"mode": "any", "allowed": ["g"]}}, PLAIN, {"tool_choice": "required", "tools": [tool("g")]}),
    ("m75 choice without tools", {"choice": {"mode": "any"}, "parallel": False}, PLAIN, {"tool_choice": None, "parallel_tool_calls": None, "tools": None}),
    ("m77 parallel", {"tools": [TOOL], "parallel": False}, PLAIN, {"parallel_tool_calls": False}),
    ("parallel true", {"tools": [TOOL], "parallel": True}, PLAIN, {"parallel_tool_calls": None}),
    ("m108 account ids", {"meta": {"user": '{"device_id":"d","account_uuid":"a","session_id":"s-12345678"}'}}, OPENAI, {"user": None, "prompt_cache_key": "s-12345678"}),
    ("user", {"meta": {"user": "u1"}}, PLAIN, {"user": "u1"}),
    ("tier and speed of Claude", {"meta": {"tier": "auto", "speed": "fast"}}, OPENAI, {"service_tier": None, "speed": None}),
    ("logprobs", {"client": "responses", "meta": {"logprobs": True, "top_logprobs": 2}}, OPENAI, {"logprobs": True, "top_logprobs": 2}),
    ("store and metadata of Responses", {"client": "responses", "meta": {"store": True, "metadata": {"a": "b"}}}, PLAIN, {"store": None, "metadata": None}),
    ("verbosity at OpenAI", {"client": "responses", "meta": {"verbosity": "low"}}, GPT5, {"verbosity": "low"}),
    ("verbosity elsewhere", {"client": "responses", "meta": {"verbosity": "low"}}, PLAIN, {"verbosity": None}),
    ("n", {"client": "chat", "meta": {"n": 2}}, PLAIN, {"n": 2}),
    ("own fields", {"client": "chat", "extra": {"chat": {"prediction": {"a": 1}}}}, PLAIN, {"prediction": {"a": 1}}),
    ("fields of another format", {"extra": {"messages": {"inference_geo": "us"}}}, PLAIN, {"inference_geo": None}),
    ("own words about thinking", {"client": "chat", "think": {"mode": "off"}, "extra": {"chat": {"chat_template_kwargs": {"x": 1}}}}, VLLM,
     {"chat_template_kwargs": {"x": 1, "enable_thinking": False}}),
]


@pytest.mark.parametrize("fields, profile, expected", [row[1:] for row in WRITTEN], ids=[row[0] for row in WRITTEN])
def test_a_field_is_written(fields: Json, profile: a.Profile, expected: Json) -> None:
    body = write({**hub_of(), **fields}, profile)
    assert {name: body.get(name) for name in expected} == expected


TURNS: list[tuple[str, list[Json], a.Profile, list[Json]]] = [      # row, turns, profile, messages
    ("texts join", [user("a", "b")], PLAIN, [{"role": "user", "content": "a\nb"}]),
    ("image", [user("a", IMAGE)], PLAIN, [{"role": "user", "content": [{"type": "text", "text": "a"}, IMAGE_OUT]}]),
    ("image with detail", [user({**IMAGE, "detail": "original"})], PLAIN, [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": PIXEL, "detail": "high"}}]}]),
    ("image by URL", [user({"type": "image", "url": "https://x"})], PLAIN, [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://x"}}]}]),
    ("pdf", [user({"type": "file", "mime": "application/pdf", "data": "JVBERi0=", "name": "a.pdf"})], PLAIN,
     [{"role": "user", "content": [{"type": "file", "file": {"filename": "a.pdf", "file_data": "data:application/pdf;base64,JVBERi0="}}]}]),
    ("pdf by URL at OpenRouter", [user({"type": "file", "url": "https://x/y.pdf"})], OPENROUTER,
     [{"role": "user", "content": [{"type": "file", "file": {"filename": "document.pdf", "file_data": "https://x/y.pdf"}}]}]),
    ("document", [user({"type": "file", "text": "body", "title": "t", "context": "c"})], PLAIN, [{"role": "user", "content": '<document title="t">\nc\nbody\n</document>'}]),
    ("audio", [user({"type": "audio", "data": "QQ==", "format": "wav"})], PLAIN, [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "QQ==", "format": "wav"}}]}]),
    ("marks at OpenRouter", [user(a.text_part("a", MARK))], OPENROUTER, [{"role": "user", "content": [{"type": "text", "text": "a", "cache_control": MARK}]}]),
    ("marks elsewhere", [user(a.text_part("a", MARK))], PLAIN, [{"role": "user", "content": "a"}]),
    ("text and call", [bot("x", call()), user(result())], PLAIN, [{"role": "assistant", "content": "x", "tool_calls": [A_CALL]}, A_RESULT]),
    ("m63 call alone", [bot(call()), user(result())], PLAIN, [{"role": "assistant", "content": None, "tool_calls": [A_CALL]}, A_RESULT]),
    ("call alone where null breaks", [bot(call()), user(result())], VLLM, [{"role": "assistant", "content": "", "tool_calls": [A_CALL]}, A_RESULT]),
    ("call without arguments", [bot(call(args="")), user(result())], PLAIN, [{"role": "assistant", "content": None, "tool_calls": [A_CALL]}, A_RESULT]),
    ("text behind a call", [bot(call(), "x"), user(result())], PLAIN, [{"role": "assistant", "content": "x", "tool_calls": [A_CALL]}, A_RESULT]),
    ("empty result", [bot(call()), user(result("call_A12345", ""))], PLAIN, [{"role": "assistant", "content": None, "tool_calls": [A_CALL]}, {**A_RESULT, "content": ""}]),
    ("result in parts", [bot(call()), user(result("call_A12345", "a", "b"))], PLAIN, [{"role": "assistant", "content": None, "tool_calls": [A_CALL]}, {**A_RESULT, "content": "a\nb"}]),
    ("error result", [bot(call()), user(result(error=True))], PLAIN, [{"role": "assistant", "content": None, "tool_calls": [A_CALL]}, {**A_RESULT, "content": "[tool error] r"}]),
    ("m64 empty turn", [user("a"), bot(""), user("b")], PLAIN, [{"role": "user", "content": "a\nb"}]),
    ("m65 blanks beside a call", [bot(" \n", call()), user(result())], PLAIN, [{"role": "assistant", "content": None, "tool_calls": [A_CALL]}, A_RESULT]),
    ("m66 text before the result", [bot(call()), user("quick", result())], PLAIN,
     [{"role": "assistant", "content": None, "tool_calls": [A_CALL]}, A_RESULT, {"role": "user", "content": "quick"}]),
    ("m67 results over turns", [bot(call(), call("call_B12345")), user(result("call_B12345", "2")), user(result())], PLAIN,
     [{"role": "assistant", "content": None, "tool_calls": [A_CALL, {**A_CALL, "id": "call_B12345"}]}, A_RESULT, {**A_RESULT, "tool_call_id": "call_B12345", "content": "2"}]),
    ("m68 words between call and result", [bot(call()), bot("Searching."), user(result())], PLAIN,
     [{"role": "assistant", "content": "Searching.", "tool_calls": [A_CALL]}, A_RESULT]),
    ("m69 call without result", [bot(call()), user("stop")], PLAIN, [{"role": "assistant", "content": None, "tool_calls": [A_CALL]},
     {**A_RESULT, "content": "[tool error] No result was recorded for this tool call."}, {"role": "user", "content": "stop"}]),
    ("m70 m71 result without call", [user("a"), user(result("gone", "old"))], PLAIN, [{"role": "user", "content": "a\n[tool result gone]\nold"}]),
    ("m72 result without id", [user(result("", "old"))], PLAIN, [{"role": "user", "content": "[tool result]\nold"}]),
    ("m73 images of two results", [bot(call(), call("call_B12345")), user(result("call_A12345", "a", IMAGE), result("call_B12345", IMAGE), "next")], PLAIN,
     [{"role": "assistant", "content": None, "tool_calls": [A_CALL, {**A_CALL, "id": "call_B12345"}]}, {**A_RESULT, "content": "a\n[image 1]"},
      {**A_RESULT, "tool_call_id": "call_B12345", "content": "[image 2]"},
      {"role": "user", "content": [{"type": "text", "text": text} if text else IMAGE_OUT for text in ("Images returned by tools:", "[image 1]", "", "[image 2]", "", "next")]}]),
    ("images in results", [bot(call()), user(result("call_A12345", "a", IMAGE))], VLLM,
     [{"role": "assistant", "content": "", "tool_calls": [A_CALL]}, {**A_RESULT, "content": [{"type": "text", "text": "a"}, IMAGE_OUT]}]),
    ("m80 long ids at OpenAI", [bot(call("x" * 80)), user(result("x" * 80))], OPENAI,
     [{"role": "assistant", "content": None, "tool_calls": [{**A_CALL, "id": a.fit_id("x" * 80, "openai64")}]}, {**A_RESULT, "tool_call_id": a.fit_id("x" * 80, "openai64")}]),
    ("m81 ids at Mistral", [user("a"), bot(call()), user(result())], MISTRAL,
     [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [{**A_CALL, "id": a.fit_id("call_A12345", "mistral9")}]},
      {**A_RESULT, "tool_call_id": a.fit_id("call_A12345", "mistral9"), "name": "f"}]),
    ("prefix at Mistral", [user("a"), bot("b ")], MISTRAL, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "prefix": True}]),
    ("m84 signature of Gemini", [bot(call(note={"family": "gemini", "data": {"google": {"thought_signature": "S"}}})), user(result())], GEMINI3,
     [{"role": "assistant", "content": "", "tool_calls": [{**A_CALL, "extra_content": {"google": {"thought_signature": "S"}}}]}, A_RESULT]),
    ("m84 signature lost", [bot(call(), call("call_B12345")), user(result(), result("call_B12345"))], GEMINI3,
     [{"role": "assistant", "content": "", "tool_calls": [{**A_CALL, "extra_content": {"google": {"thought_signature": "skip_thought_signature_validator"}}},
       {**A_CALL, "id": "call_B12345"}]}, A_RESULT, {**A_RESULT, "tool_call_id": "call_B12345"}]),
    ("m85 thinking at Groq", [bot(think(), call()), user(result())], GROQ, [{"role": "assistant", "content": None, "tool_calls": [A_CALL]}, A_RESULT]),
    ("thinking at Cerebras", [bot(think(), call()), user(result())], CEREBRAS, [{"role": "assistant", "content": None, "reasoning": "Hm.", "tool_calls": [A_CALL]}, A_RESULT]),
    ("m87 thinking at DeepSeek", [user("a"), bot(think(), call()), user(result())], DEEPSEEK,
     [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "reasoning_content": "Hm.", "tool_calls": [A_CALL]}, A_RESULT]),
    ("thinking at OpenRouter", [bot(think(family="anthropic", field="signature", data="EqQBCkYI"), call()), user(result())], OPENROUTER,
     [{"role": "assistant", "content": None, "reasoning_details": [THOUGHT], "tool_calls": [A_CALL]}, A_RESULT]),
    ("thinking of another family at OpenRouter", [bot(think(family="openai", field="encrypted", data="gAAAA"), call()), user(result())], OPENROUTER,
     [{"role": "assistant", "content": None, "tool_calls": [A_CALL]}, A_RESULT]),
    ("thinking in tags", [bot(think(), "x"), user("y")], a.profile_for("minimax", "m2"), [{"role": "assistant", "content": "x"}, {"role": "user", "content": "y"}]),
    ("thinking in tags within a step", [bot(think(), "x", call()), user(result())], a.profile_for("minimax", "m2"),
     [{"role": "assistant", "content": "<think>Hm.</think>\nx", "tool_calls": [A_CALL]}, A_RESULT]),
    ("thinking alone", [user("a"), bot(think()), user("b")], PLAIN, [{"role": "user", "content": "a\nb"}]),
    ("refusal", [bot({"type": "refusal", "text": "no"})], PLAIN, [{"role": "assistant", "content": "no"}]),
    ("refusal at OpenAI", [bot({"type": "refusal", "text": "no"})], OPENAI, [{"role": "assistant", "content": None, "refusal": "no"}]),
    ("m89 namespace in the history", [bot(call(namespace="mcp__docs")), user(result())], PLAIN,
     [{"role": "assistant", "content": None, "tool_calls": [{**A_CALL, "function": {"name": "mcp__docs__f", "arguments": "{}"}}]}, A_RESULT]),
    ("freeform call", [bot(call(name="c", args='{"input":"a"}', kind="custom")), user(result())], PLAIN,
     [{"role": "assistant", "content": None, "tool_calls": [{**A_CALL, "function": {"name": "c", "arguments": '{"input":"a"}'}}]}, A_RESULT]),
    ("freeform call at OpenAI", [bot(call(name="c", args='{"input":"a"}', kind="custom")), user(result())], OPENAI,
     [{"role": "assistant", "content": None, "tool_calls": [{"id": "call_A12345", "type": "custom", "custom": {"name": "c", "input": "a"}}]}, A_RESULT]),
    ("m93 ids that repeat", [bot(call("list_dir:0")), user(result("list_dir:0")), bot(call("list_dir:0", args='{"a":1}')), user(result("list_dir:0", "2"))], PLAIN,
     [{"role": "assistant", "content": None, "tool_calls": [{**A_CALL, "id": "list_dir:0"}]}, {**A_RESULT, "tool_call_id": "list_dir:0"},
      {"role": "assistant", "content": None, "tool_calls": [{"id": "list_dir:0_2", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}]},
      {**A_RESULT, "tool_call_id": "list_dir:0_2", "content": "2"}]),
    ("m94 Kimi's own ids", [bot(think(), call("list_dir:0_uabcdefgh")), user(result("list_dir:0_uabcdefgh"))], KIMI,
     [{"role": "assistant", "content": None, "reasoning_content": "Hm.", "tool_calls": [{**A_CALL, "id": "list_dir:0"}]}, {**A_RESULT, "tool_call_id": "list_dir:0"}]),
    ("m106 late system text", [user("a"), bot("b"), {"role": "system", "parts": [a.text_part("s")]}, user("c")], PLAIN,
     [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "<system-reminder>\ns\n</system-reminder>\nc"}]),
    ("late system text kept", [user("a"), {"role": "system", "parts": [a.text_part("s")]}, user("c")], a.Profile(late_system="keep"),
     [{"role": "user", "content": "a"}, {"role": "system", "content": "s"}, {"role": "user", "content": "c"}]),
    ("blocks of Anthropic's own", [user("a"), bot({"type": "opaque", "family": "anthropic", "format": "messages", "data": {"type": "server_tool_use"}}, "b")], PLAIN,
     [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]),
]


@pytest.mark.parametrize("turns, profile, expected", [row[1:] for row in TURNS], ids=[row[0] for row in TURNS])
def test_turns_are_written(turns: list[Json], profile: a.Profile, expected: list[Json]) -> None:
    assert messages_of(*turns, profile=profile) == expected


def test_system_text_is_written() -> None:
    billing = a.text_part("x-anthropic-billing-header: cc_version=2.1.9; cch=1")
    assert messages_of(system=[billing, a.text_part("a"), a.text_part("b")])[0] == {"role": "system", "content": "a\n\nb"}      # m105
    assert messages_of(system=[a.text_part("a"), a.text_part("b", MARK)], profile=OPENROUTER)[0]["content"] == [
        {"type": "text", "text": "a"}, {"type": "text", "text": "b", "cache_control": MARK}]
    assert messages_of(system=[]) == HI


def test_a_mark_on_a_result_comes_with_its_last_part() -> None:
    written = messages_of(bot(call()), user(result(cache=MARK)), profile=OPENROUTER)
    assert written[1]["content"] == [{"type": "text", "text": "r", "cache_control": MARK}]


UNFIT: list[tuple[str, Json, str]] = [
    ("m79 forced web search", {"tools": [{"name": "web_search", "kind": "hosted", "family": "anthropic", "raw": {"type": "web_search_20250305"}}],
                               "choice": {"mode": "tool", "name": "web_search"}}, 'the forced tool "web_search" cannot be offered by this provider'),
    ("image file id", {"turns": [user({"type": "image", "file_id": "f"})]}, "image file ids cannot be sent to this provider"),
    ("pdf by URL", {"turns": [user({"type": "file", "url": "https://x"})]}, "file URLs cannot be sent to this provider"),
]


@pytest.mark.parametrize("fields, message", [row[1:] for row in UNFIT], ids=[row[0] for row in UNFIT])
def test_what_a_provider_cannot_take_is_left_to_another(fields: Json, message: str) -> None:
    with pytest.raises(a.UpstreamFailure) as caught:
        write({**hub_of(), **fields})
    assert (caught.value.kind, caught.value.detail) == ("fit", message)


def test_m86_rejected_fields_do_not_leave() -> None:
    hub = hub_of(bot(think(), call()), user(result()), client="chat", meta={"store": True, "tier": "auto"}, sampling={"frequency_penalty": 1})
    body, _ = a.without_rejected(write(hub, CEREBRAS), CEREBRAS)
    assert not {"store", "service_tier", "frequency_penalty"} & body.keys() and not any("reasoning_content" in message for message in body["messages"])


def test_messages_lose_what_a_provider_rejects() -> None:
    profile = a.Profile(replay="reasoning_content", message_reject=("reasoning_content",))
    assert messages_of(bot(think(), call()), user(result()), profile=profile)[0] == {"role": "assistant", "content": None, "tool_calls": [A_CALL]}


def test_the_worked_request_from_messages() -> None:
    hub = hub_of(
        user("read a"), bot(think("Use Read.", family="cerebras", field="reasoning_content"), "Reading.", call("toolu_01AbCdEfGhIj", "Read", '{"p":"a"}')),
        user("and be quick", result("toolu_01AbCdEfGhIj", "no such file", error=True)),
        system=[a.text_part("x-anthropic-billing-header: cc_version=2.1.9; cch=1"), a.text_part("Be brief.", MARK)], max_out=1024,
        tools=[{"name": "Read", "description": "d", "kind": "function", "schema": SCHEMA, "cache": MARK}], choice={"mode": "auto"}, parallel=False)
    assert write(hub, a.Profile(model="wire")) == {
        "model": "wire", "messages": [
            {"role": "system", "content": "Be brief."}, {"role": "user", "content": "read a"},
            {"role": "assistant", "content": "Reading.", "tool_calls": [{"id": "toolu_01AbCdEfGhIj", "type": "function", "function": {"name": "Read", "arguments": '{"p":"a"}'}}]},
            {"role": "tool", "tool_call_id": "toolu_01AbCdEfGhIj", "content": "[tool error] no such file"}, {"role": "user", "content": "and be quick"}],
        "max_tokens": 1024, "tools": [tool("Read", description="d")], "tool_choice": "auto", "parallel_tool_calls": False}


def test_the_worked_request_from_responses() -> None:
    schema = {"type": "object", "properties": {"q": {"type": "string"}}}
    hub = hub_of(
        user("list docs"), bot(think("Use search.", family="openai", field="encrypted", data="gAAAAABo"), call("call_x1y2z3w4v5u6", "search", '{"q":"a"}', namespace="mcp__docs")),
        bot("Searching."), user(result("call_x1y2z3w4v5u6", "none")), client="responses", stream=True, choice={"mode": "auto"}, parallel=True,
        system=[a.text_part("You are Codex."), a.text_part("sandbox: on")], think={"mode": "on", "effort": "high", "show": "auto"}, meta={"cache_key": "s-1", "store": False},
        tools=[{"name": "search", "namespace": "mcp__docs", "kind": "function", "schema": schema}, CUSTOM, {"name": "web_search", "kind": "hosted", "family": "openai", "raw": {"type": "web_search"}}])
    ready = a.prepare(hub, a.Profile(model="wire"))
    flat = {"id": "call_x1y2z3w4v5u6", "type": "function", "function": {"name": "mcp__docs__search", "arguments": '{"q":"a"}'}}
    assert a.chat_write_request(ready, a.Profile(model="wire")) == {
        "model": "wire", "stream": True, "stream_options": {"include_usage": True}, "reasoning_effort": "high", "tool_choice": "auto",
        "messages": [{"role": "system", "content": "You are Codex.\n\nsandbox: on"}, {"role": "user", "content": "list docs"},
                     {"role": "assistant", "content": "Searching.", "tool_calls": [flat]}, {"role": "tool", "tool_call_id": "call_x1y2z3w4v5u6", "content": "none"}],
        "tools": [{"type": "function", "function": {"name": "mcp__docs__search", "parameters": schema}},
                  {"type": "function", "function": {
                      "name": "apply_patch", "description": 'Edit files.\nThe whole text goes in "input".\nIt must match this lark grammar:\nstart: x',
                      "parameters": {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"], "additionalProperties": False}}}]}
    assert ready["dropped"] == ["tools.web_search"]


# ------------------------------------------------------------------ streams: Chat to deltas

def chunk(delta: Json | None = None, finish: Any = None, **more: Any) -> Json:
    stamp = {"id": "c1", "object": "chat.completion.chunk", "created": 1790000000, "model": "m"}
    return {**stamp, "choices": [{"index": 0, "delta": delta or {}, "finish_reason": finish}], **more}


def says(text: str) -> Json:
    return chunk({"content": text})


def calls(*fragments: Json) -> Json:
    return chunk({"tool_calls": list(fragments)})


def fragment(index: Any = 0, call_id: str | None = None, name: str | None = None, args: Any = None) -> Json:
    function = {key: value for key, value in (("name", name), ("arguments", args)) if value is not None}
    made = {"index": index, "id": call_id, "type": "function" if name else None, "function": function}
    return {key: value for key, value in made.items() if value is not None}


DONE = "[DONE]"
COUNTED = {"prompt_tokens": 120, "completion_tokens": 18, "total_tokens": 138, "prompt_tokens_details": {"cached_tokens": 100}}
USAGE = a.usage_delta({"input": 120, "cached": 100, "output": 18})
START = a.start_delta("c1", "m")
CUT = a.error_delta(502, "upstream closed the stream before finishing", "server_error")
PROVENANCE = a.seal_delta({"family": "cerebras", "model": "qwen-3", "field": "reasoning_content"})


def sse(*events: Any) -> bytes:
    """The bytes of a stream; a string is data as it is, bytes are raw."""
    return b"".join(event if isinstance(event, bytes) else b"data: " + (event if isinstance(event, str) else json.dumps(event, ensure_ascii=False)).encode() + b"\n\n" for event in events)


def joined(deltas: list[Json]) -> list[Json]:
    """Deltas with neighbours of one kind made one: how a text was cut says nothing."""
    made: list[Json] = []
    for delta in deltas:
        if made and delta["delta"] in ("text", "think", "args", "refuse") and made[-1]["delta"] == delta["delta"]:
            made[-1] = {**delta, "text": made[-1]["text"] + delta["text"]}
        else:
            made.append(delta)
    return made


def read_bytes(pieces: list[bytes], profile: a.Profile = CEREBRAS, names: a.Names = a.EMPTY_NAMES) -> list[Json]:
    events, reader = a.EventReader(), a.ChatStreamReader(a.Source(profile, seed="s", names=names))
    deltas = [delta for piece in pieces for event in events.feed(piece) for delta in reader.feed(event)]
    deltas += [delta for event in events.close() for delta in reader.feed(event)]
    deltas += reader.close()
    assert reader.done and check_deltas(deltas) == []
    return without_found(deltas)


def stop(reason: str, **more: Any) -> Json:
    return {"delta": "stop", "reason": reason, **more}


PATCH = a.Names([{"name": "apply_patch", "kind": "custom"}], False)
SIGNED = {"type": "reasoning.text", "signature": "EqQBCkYI", "format": "anthropic-claude-v1", "index": 0}
ROUTED = {"family": "openrouter", "model": "anthropic/claude-haiku-4.5", "field": "reasoning_details"}

EXAMPLES: list[tuple[str, list[Any], list[Json]]] = [      # deltas as they are to come, cut for cut
    ("E1", [chunk({"role": "assistant", "content": ""}), says("Hel"), says("lo"), chunk(finish="stop"), {"id": "c1", "choices": [], "usage": COUNTED}, DONE],
     [START, a.text_delta("Hel"), a.text_delta("lo"), USAGE, stop("end")]),
    ("E2", [chunk({"role": "assistant", "content": "Let me look."}), calls(fragment(0, "call_a1B2c3D4e5F6", "Read", "")), calls(fragment(0, args='{"file_path":')),
            calls(fragment(0, args='"/a.txt"}')), chunk(finish="tool_calls"), {"choices": [], "usage": COUNTED}, DONE],
     [START, a.text_delta("Let me look."), a.call_delta("call_a1B2c3D4e5F6", "Read"), a.args_delta('{"file_path":'), a.args_delta('"/a.txt"}'), USAGE, stop("tool")]),
    ("E4", [calls(fragment(0, "call_CCCCCCCCCCCC", "now")), chunk(finish="stop"), DONE], [START, a.call_delta("call_CCCCCCCCCCCC", "now"), stop("tool")]),
    ("E5", [calls({"index": 0, "id": "call_DDDDDDDDDDDD", "function": {"name": "w", "arguments": '{"p":1}'}}),
            calls({"index": 0, "id": "call_EEEEEEEEEEEE", "function": {"name": "w", "arguments": '{"p":2}'}}), chunk(finish="stop"), DONE],
     [START, a.call_delta("call_DDDDDDDDDDDD", "w"), a.args_delta('{"p":1}'), a.call_delta("call_EEEEEEEEEEEE", "w"), a.args_delta('{"p":2}'), stop("tool")]),
    ("E6", [chunk({"reasoning_content": "Need the "}), chunk({"reasoning_content": "file."}), says("Reading."), calls(fragment(0, "call_FFFFFFFFFFFF", "Read", "{}")),
            chunk(finish="tool_calls", usage=COUNTED), DONE],
     [START, a.think_delta("Need the "), a.think_delta("file."), PROVENANCE, a.text_delta("Reading."), a.call_delta("call_FFFFFFFFFFFF", "Read"), a.args_delta("{}"), USAGE, stop("tool")]),
    ("E8", [chunk({"role": "assistant", "content": "<thi"}), says("nk>\nplan it</th"), says("ink>\n\nAnswer"), says(" 4."), chunk(finish="stop", usage=COUNTED), DONE],
     [START, a.think_delta("plan it"), PROVENANCE, a.text_delta("Answer"), a.text_delta(" 4."), USAGE, stop("end")]),
    ("E9", [says("Once"), chunk(finish="length", usage=COUNTED), DONE], [START, a.text_delta("Once"), USAGE, stop("length")]),
    ("E10", [says("Hel"), {"id": "gen-1", "choices": [{"index": 0, "delta": {"content": ""}, "finish_reason": "error"}], "error": {"code": 502, "message": "Provider disconnected"}}],
     [START, a.text_delta("Hel"), a.error_delta(502, "Provider disconnected", "server_error")]),
    ("E11", [says("Hel")], [START, a.text_delta("Hel"), CUT]),
    ("E12", [says("Hi"), chunk(finish="stop")], [START, a.text_delta("Hi"), stop("end")]),
]


@pytest.mark.parametrize("events, expected", [row[1:] for row in EXAMPLES], ids=[row[0] for row in EXAMPLES])
def test_a_worked_example_is_read(events: list[Any], expected: list[Json]) -> None:
    assert read_bytes([sse(*events)]) == expected


def test_worked_example_E3_is_read() -> None:
    events = [calls(fragment(0, "call_AAAAAAAAAAAA", "f", '{"a"'), fragment(1, "call_BBBBBBBBBBBB", "g", '{"b"')), calls(fragment(1, args=":2}")), calls(fragment(0, args=":1}")),
              chunk(finish="tool_calls"), DONE]
    assert joined(read_bytes([sse(*events)])) == [START, a.call_delta("call_AAAAAAAAAAAA", "f"), a.args_delta('{"a":1}'), a.call_delta("call_BBBBBBBBBBBB", "g"),
                                                  a.args_delta('{"b":2}'), stop("tool")]


def test_worked_example_E7_is_read() -> None:
    first = chunk({"role": "assistant", "content": "", "reasoning": "Look.", "reasoning_details": [{"type": "reasoning.text", "text": "Look.", "format": "anthropic-claude-v1", "index": 0}]})
    events = [b": OPENROUTER PROCESSING\n\n", first, chunk({"reasoning_details": [SIGNED]}), says("Ok."), b": OPENROUTER PROCESSING\n\n", chunk({"content": ""}, "stop"),
              {"id": "gen-1", "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}], "usage": COUNTED}, DONE]
    deltas = read_bytes([sse(*events)], OPENROUTER)
    assert deltas == [START, a.think_delta("Look."), a.seal_delta({**ROUTED, "data": [SIGNED]}), a.text_delta("Ok."), USAGE, stop("end")]
    assert a.write_seal({name: value for name, value in deltas[2].items() if name != "delta"}, "anthropic").startswith("aic1.eyJvIjoib3BlbnJvdXRlciIsIm0iOiJhbnRocm9waWMvY2xhdWRlLWhhaWt1")


def test_worked_example_E13_is_read() -> None:
    events = [calls(fragment(0, "call_GGGGGGGGGGGG", "apply_patch", '{"input":"*** Begin')), calls(fragment(0, args=' Patch\\n*** End Patch\\n"}')),
              chunk(finish="tool_calls", usage=COUNTED), DONE]
    deltas = read_bytes([sse(*events)], names=PATCH)
    assert deltas[1] == a.call_delta("call_GGGGGGGGGGGG", "apply_patch", "custom")
    assert a.freeform_text(a.fold_deltas(deltas)[0]["args"]) == "*** Begin Patch\n*** End Patch\n"


A, B = "call_AAAAAAAAAAAA", "call_BBBBBBBBBBBB"
FAILED = {"error": {"message": "no", "type": "invalid_request_error", "code": "tool_use_failed", "failed_generation": '{"name": "f", "arguments": {"a": 1}}'}}
OFFERED = a.Names([{"name": "f", "kind": "function"}], False)


def called(*pairs: tuple[str, str, str], reason: str = "tool") -> list[Json]:
    return [START, *(delta for call_id, name, args in pairs for delta in (a.call_delta(call_id, name), *([a.args_delta(args)] if args else []))), stop(reason)]


SPOKEN: list[tuple[str, list[Any], a.Profile, list[Json]]] = [     # row, events, profile, deltas (neighbours joined)
    # how streams end
    ("finish, then end of file", [says("a"), chunk(finish="stop")], CEREBRAS, [START, a.text_delta("a"), stop("end")]),
    ("m41 finish, then an error", [says("a"), chunk(finish="length"), {"error": {"code": 400, "message": "Token limit reached"}}, DONE], CEREBRAS, [START, a.text_delta("a"), stop("length")]),
    ("m41 finish twice", [says("a"), chunk(finish="length"), chunk({"content": ""}, "stop"), DONE], CEREBRAS, [START, a.text_delta("a"), stop("length")]),
    ("text behind the finish", [says("a"), chunk(finish="stop"), says("b"), DONE], CEREBRAS, [START, a.text_delta("ab"), stop("end")]),
    ("m31 no finish, but the mark", [says("a"), DONE], CEREBRAS, [START, a.text_delta("a"), stop("end")]),
    ("no finish, but the mark, a call", [calls(fragment(0, A, "f", "{}")), DONE], CEREBRAS, called((A, "f", "{}"))),
    ("m32 nothing, the mark", [chunk({"role": "assistant", "content": ""}), DONE], CEREBRAS, [START, a.error_delta(502, "empty answer", "empty_answer")]),
    ("m32 nothing at all", [], CEREBRAS, [CUT]),
    ("nothing but a finish", [chunk(finish="length"), DONE], CEREBRAS, [START, stop("length")]),
    ("m30 cut in a call", [calls(fragment(0, A, "f", '{"a'))], CEREBRAS, [START, a.call_delta(A, "f"), a.args_delta('{"a'), CUT]),
    ("frames behind the end", [says("a"), chunk(finish="stop"), DONE, says("b"), "junk"], CEREBRAS, [START, a.text_delta("a"), stop("end")]),
    ("the mark with blanks", [says("a"), " [DONE] "], CEREBRAS, [START, a.text_delta("a"), stop("end")]),
    ("a last event without its blank line", [says("a"), sse(chunk(finish="stop"))[:-2]], CEREBRAS, [START, a.text_delta("a"), stop("end")]),
    ("what is no JSON", [says("a"), "<html>"], CEREBRAS, [START, a.text_delta("a"), a.error_delta(502, "provider sent something that is not JSON", "server_error")]),
    ("an event called error", [says("a"), b'event: error\ndata: {"message": "Overloaded", "code": 503}\n\n'], CEREBRAS,
     [START, a.text_delta("a"), a.error_delta(503, "Overloaded", "server_is_overloaded")]),
    ("an event called error, in words", [says("a"), b"event: error\ndata: broken\n\n"], CEREBRAS, [START, a.text_delta("a"), a.error_delta(502, "broken", "server_error")]),
    ("m29 an error of its own", [says("a"), {"error": {"message": "Overloaded", "code": 503}}], CEREBRAS, [START, a.text_delta("a"), a.error_delta(503, "Overloaded", "server_is_overloaded")]),
    ("m53 a code that is a number", [{"error": {"message": "x", "code": 502}}], CEREBRAS, [a.error_delta(502, "x", "server_error")]),
    ("an error in the choice", [{"choices": [{"index": 0, "delta": {}, "error": {"message": "x", "code": 503}}]}], CEREBRAS, [a.error_delta(503, "x", "server_is_overloaded")]),
    ("an error of MiniMax", [{"choices": None, "base_resp": {"status_code": 1002, "status_msg": "busy"}}], CEREBRAS, [a.error_delta(502, "busy", "server_error")]),
    ("a finish that is an error", [says("a"), chunk(finish="insufficient_system_resource"), DONE], CEREBRAS,
     [START, a.text_delta("a"), a.error_delta(502, 'The provider stopped with "insufficient_system_resource".', "server_error")]),
    ("m115 an overflow in the stream", [{"error": {"message": "This model's maximum context length is 8192 tokens", "code": 400}}], CEREBRAS,
     [a.error_delta(400, "This model's maximum context length is 8192 tokens", "context_length_exceeded", "invalid_request_error")]),
    # stop reasons
    ("m8 m9 calls and stop", [says("a"), calls(fragment(0, A, "f", "{}")), chunk(finish="stop"), DONE], CEREBRAS,
     [START, a.text_delta("a"), a.call_delta(A, "f"), a.args_delta("{}"), stop("tool")]),
    ("tool_calls without any", [says("a"), chunk(finish="tool_calls"), DONE], CEREBRAS, [START, a.text_delta("a"), stop("end")]),
    ("m36 filter", [says("a"), chunk(finish="content_filter"), DONE], CEREBRAS, [START, a.text_delta("a"), stop("filter")]),
    ("m25 a finish that is empty", [chunk({"content": "a"}, ""), chunk({"tool_calls": [fragment(0, A, "f", "{}")]}, "tool_calls"), DONE], CEREBRAS,
     [START, a.text_delta("a"), a.call_delta(A, "f"), a.args_delta("{}"), stop("tool")]),
    ("an unknown word", [says("a"), chunk(finish="because"), DONE], CEREBRAS, [START, a.text_delta("a"), stop("end")]),
    ("length with calls", [calls(fragment(0, A, "f", '{"a')), chunk(finish="length"), DONE], CEREBRAS, called((A, "f", '{"a'), reason="length")),
    ("the string that stopped vLLM", [says("a"), {**chunk(), "choices": [{"index": 0, "delta": {}, "finish_reason": "stop", "stop_reason": "END"}]}, DONE], CEREBRAS,
     [START, a.text_delta("a"), stop("sequence", sequence="END")]),
    ("the token that stopped vLLM", [says("a"), {**chunk(), "choices": [{"index": 0, "delta": {}, "finish_reason": "stop", "stop_reason": 128009}]}, DONE], CEREBRAS,
     [START, a.text_delta("a"), stop("end")]),
    ("refusal", [chunk({"refusal": "I "}), chunk({"refusal": "can't."}), chunk(finish="stop"), DONE], CEREBRAS, [START, a.refuse_delta("I can't."), stop("refusal")]),
    # oddities of calls
    ("m19 all at index 0, ids differ", [calls(fragment(0, A, "terminal", '{"a":1}')), calls(fragment(0, B, "terminal", '{"a":2}')), DONE], CEREBRAS,
     called((A, "terminal", '{"a":1}'), (B, "terminal", '{"a":2}'))),
    ("all at index 0, no ids", [calls(fragment(0, None, "f", '{"a":1}')), calls(fragment(0, None, "f", '{"a":2}')), DONE], CEREBRAS,
     called((a.mint("call_", "s", 0), "f", '{"a":1}'), (a.mint("call_", "s", 1), "f", '{"a":2}'))),
    ("m20 no index, ids", [calls(fragment(None, A, "f", "{}"), fragment(None, B, "g", "{}")), DONE], CEREBRAS, called((A, "f", "{}"), (B, "g", "{}"))),
    ("no index, fragments", [calls(fragment(None, A, "f", '{"a"')), calls(fragment(None, None, None, ":1}")), DONE], CEREBRAS, called((A, "f", '{"a":1}'))),
    ("index from 1, then 3", [calls(fragment(1, A, "f", "{}"), fragment(3, B, "g", "{}")), DONE], CEREBRAS, called((A, "f", "{}"), (B, "g", "{}"))),
    ("m16 index 0 among others", [calls(fragment(0, A, "f", '{"a"')), calls(fragment(0, None, None, ":1}")), DONE], CEREBRAS, called((A, "f", '{"a":1}'))),
    ("index as text", [calls(fragment("0", A, "f", '{"a"')), calls(fragment("0", None, None, ":1}")), DONE], CEREBRAS, called((A, "f", '{"a":1}'))),
    ("m18 parallel fragments", [calls(fragment(0, A, "f", '{"a"'), fragment(1, B, "g", '{"b"')), calls(fragment(0, args=":1}")), calls(fragment(1, args=":2}")), DONE], CEREBRAS,
     called((A, "f", '{"a":1}'), (B, "g", '{"b":2}'))),
    ("m22 arguments as an object", [calls(fragment(0, A, "f", {"a": [1, "é"]})), calls(fragment(0, A, "f", {"a": [1, "é"]})), DONE], CEREBRAS, called((A, "f", '{"a":[1,"é"]}'))),
    ("m21 no arguments", [calls({"index": 0, "id": A, "function": {"name": "f", "arguments": None}}), DONE], CEREBRAS, called((A, "f", ""))),
    ("id in every chunk", [calls(fragment(0, A, "f", "")), calls(fragment(0, A, None, "{}")), DONE], CEREBRAS, called((A, "f", "{}"))),
    ("name in every chunk", [calls(fragment(0, A, "f", '{"a"')), calls(fragment(0, A, "f", ":1}")), DONE], CEREBRAS, called((A, "f", '{"a":1}'))),
    ("id that is null in words", [calls(fragment(0, "null", "f", "{}")), DONE], CEREBRAS, called((a.mint("call_", "s", 0), "f", "{}"))),
    ("m93 ids that count", [calls(fragment(0, "functions.f:0", "f", "{}")), DONE], CEREBRAS, called((a.unique_id("functions.f:0", (), "s"), "f", "{}"))),
    ("name after a note", [calls({"index": 0, "id": A, "extra_content": {"google": {"thought_signature": "S"}}}), calls(fragment(0, None, "f", "{}")), DONE], GEMINI3,
     [START, a.call_delta(A, "f"), a.note_delta(A, "gemini", {"google": {"thought_signature": "S"}}), a.args_delta("{}"), stop("tool")]),
    ("a call that never had a name", [says("a"), calls(fragment(0, A, None, "{}")), chunk(finish="stop"), DONE], CEREBRAS, [START, a.text_delta("a"), stop("end")]),
    ("function null", [says("a"), calls({"index": 0, "function": None}), chunk(finish="stop"), DONE], CEREBRAS, [START, a.text_delta("a"), stop("end")]),
    ("m4 tool_calls empty beside text", [chunk({"content": "a", "tool_calls": []}), chunk({"content": "b", "tool_calls": None}), DONE], CEREBRAS, [START, a.text_delta("ab"), stop("end")]),
    ("m6 text and call in one chunk", [chunk({"content": "a", "tool_calls": [fragment(0, A, "f", "{}")]}), DONE], CEREBRAS,
     [START, a.text_delta("a"), a.call_delta(A, "f"), a.args_delta("{}"), stop("tool")]),
    ("m7 blank text behind calls", [calls(fragment(0, A, "f", "{}")), chunk({"content": ""}, "stop"), DONE], CEREBRAS, called((A, "f", "{}"))),
    ("text behind a whole call", [calls(fragment(0, A, "f", "{}")), says("a"), DONE], CEREBRAS, [START, a.call_delta(A, "f"), a.args_delta("{}"), a.text_delta("a"), stop("tool")]),
    ("text inside a call", [calls(fragment(0, A, "f", '{"a"')), says("b"), calls(fragment(0, args=":1}")), DONE], CEREBRAS,
     [START, a.call_delta(A, "f"), a.args_delta('{"a":1}'), a.text_delta("b"), stop("tool")]),
    ("m3 text with the role", [chunk({"role": "assistant", "content": "a"}), DONE], CEREBRAS, [START, a.text_delta("a"), stop("end")]),
    ("m17 no role anywhere", [says("a"), DONE], CEREBRAS, [START, a.text_delta("a"), stop("end")]),
    ("old function_call", [chunk({"function_call": {"name": "f", "arguments": ""}}), chunk({"function_call": {"arguments": "{}"}}), chunk(finish="function_call"), DONE], CEREBRAS,
     called((a.mint("call_", "s", 0), "f", "{}"))),
    ("m38 text in choice 0, call in choice 1", [{**chunk(), "choices": [{"index": 0, "delta": {"content": "a"}}, {"index": 1, "delta": {"tool_calls": [fragment(0, A, "f", "{}")]}}]},
     chunk(finish="stop"), DONE], a.profile_for("github-copilot", "claude-sonnet-4.5"), [START, a.text_delta("a"), a.call_delta(A, "f"), a.args_delta("{}"), stop("tool")]),
    ("a second choice", [{**chunk(), "choices": [{"index": 0, "delta": {"content": "a"}}, {"index": 1, "delta": {"content": "b"}}]}, DONE], CEREBRAS, [START, a.text_delta("a"), stop("end")]),
    ("freeform", [calls({"index": 0, "id": A, "type": "custom", "custom": {"name": "c", "input": "a"}}), calls({"index": 0, "custom": {"input": "\nb"}}), DONE], OPENAI,
     [START, a.call_delta(A, "c", "custom"), a.args_delta('{"input":"a\\nb"}'), stop("tool")]),
    # thinking
    ("m39 reasoning", [chunk({"reasoning": "Hm."}), says("a"), DONE], CEREBRAS,
     [START, a.think_delta("Hm."), a.seal_delta({"family": "cerebras", "model": "qwen-3", "field": "reasoning"}), a.text_delta("a"), stop("end")]),
    ("both names", [chunk({"reasoning_content": "Hm.", "reasoning": "Hm."}), says("a"), DONE], CEREBRAS, [START, a.think_delta("Hm."), PROVENANCE, a.text_delta("a"), stop("end")]),
    ("a blank to begin with", [chunk({"reasoning_content": "\n"}), says("a"), DONE], CEREBRAS, [START, a.text_delta("a"), stop("end")]),
    ("m1 thinking, then text", [chunk({"reasoning_content": "Hm.", "content": None}), chunk({"content": "a", "reasoning_content": None}), DONE], CEREBRAS,
     [START, a.think_delta("Hm."), PROVENANCE, a.text_delta("a"), stop("end")]),
    ("m23 thinking, then a call", [chunk({"reasoning_content": "Hm."}), calls(fragment(0, A, "f", "{}")), DONE], CEREBRAS,
     [START, a.think_delta("Hm."), PROVENANCE, a.call_delta(A, "f"), a.args_delta("{}"), stop("tool")]),
    ("Mistral's list", [chunk({"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}]}), chunk({"content": [{"type": "text", "text": "a"}]}), says("b"), DONE],
     a.Profile(family="mistral", model="x"), [START, a.think_delta("Hm."), a.seal_delta({"family": "mistral", "model": "x", "field": "thinking"}), a.text_delta("ab"), stop("end")]),
    ("details alone", [chunk({"reasoning_details": [{"type": "reasoning.text", "text": "Hm.", "format": None, "index": 0}]}), says("a"), DONE], OPENROUTER,
     [START, a.think_delta("Hm."), a.seal_delta(ROUTED), a.text_delta("a"), stop("end")]),
    ("encrypted details", [chunk({"reasoning_details": [{"type": "reasoning.encrypted", "data": "gAAAA", "id": "rs_1"}]}), says("a"), DONE], OPENROUTER,
     [START, a.seal_delta({**ROUTED, "data": [{"type": "reasoning.encrypted", "data": "gAAAA", "id": "rs_1"}]}), a.text_delta("a"), stop("end")]),
    ("Copilot's seal", [chunk({"reasoning_text": "Hm.", "reasoning_opaque": "S"}), says("a"), DONE], a.Profile(family="github-copilot", model="x"),
     [START, a.think_delta("Hm."), a.seal_delta({"family": "github-copilot", "model": "x", "field": "reasoning_opaque", "data": "S"}), a.text_delta("a"), stop("end")]),
    ("m33 both tags in one chunk", [says("<think>\nplan it</think>\n\nAnswer"), DONE], CEREBRAS, [START, a.think_delta("plan it"), PROVENANCE, a.text_delta("Answer"), stop("end")]),
    ("tags quoted later", [says("a <think>b</think>"), DONE], CEREBRAS, [START, a.text_delta("a <think>b</think>"), stop("end")]),
    ("tags behind a thinking field", [chunk({"reasoning_content": "Hm."}), says("<think>a"), DONE], CEREBRAS, [START, a.think_delta("Hm."), PROVENANCE, a.text_delta("<think>a"), stop("end")]),
    ("a tag that never closes", [says("<think>plan"), chunk(finish="length"), DONE], CEREBRAS, [START, a.think_delta("plan"), PROVENANCE, stop("length")]),
    ("half a tag", [says("<thi"), chunk(finish="stop"), DONE], CEREBRAS, [START, a.text_delta("<thi"), stop("end")]),
    # usage and the rest
    ("usage with the finish", [says("a"), chunk(finish="stop", usage=COUNTED), DONE], CEREBRAS, [START, a.text_delta("a"), USAGE, stop("end")]),
    ("m26 usage behind the finish, in an empty choice", [says("a"), chunk(finish="stop"), chunk({"role": "assistant", "content": ""}, usage=COUNTED), DONE], CEREBRAS,
     [START, a.text_delta("a"), USAGE, stop("end")]),
    ("usage of Groq", [says("a"), chunk(finish="stop", x_groq={"id": "r", "usage": COUNTED}), DONE], CEREBRAS, [START, a.text_delta("a"), USAGE, stop("end")]),
    ("usage in the choice", [says("a"), {**chunk(), "choices": [{"index": 0, "delta": {}, "finish_reason": "stop", "usage": COUNTED}]}, DONE], CEREBRAS,
     [START, a.text_delta("a"), USAGE, stop("end")]),
    ("usage in every chunk", [chunk({"content": "a"}, usage={**COUNTED, "completion_tokens": 1}), chunk(finish="stop", usage=COUNTED), DONE], CEREBRAS,
     [START, a.text_delta("a"), USAGE, stop("end")]),
    ("usage in the late error", [says("a"), chunk(finish="length"), {"error": {"message": "x"}, "usage": COUNTED}, DONE], CEREBRAS, [START, a.text_delta("a"), USAGE, stop("length")]),
    ("m119 usage of xAI", [says("a"), chunk(finish="stop", usage={"prompt_tokens": 12, "completion_tokens": 1, "total_tokens": 303, "completion_tokens_details": {"reasoning_tokens": 290}}), DONE],
     CEREBRAS, [START, a.text_delta("a"), a.usage_delta({"input": 12, "output": 291, "reasoning": 290}), stop("end")]),
    ("m35 chunks without choices", [{"id": "", "model": "", "choices": [], "prompt_filter_results": []}, {"ping": 1}, says("a"), {"id": "c1", "choices": None}, DONE], CEREBRAS,
     [START, a.text_delta("a"), stop("end")]),
    ("message for a delta", [{**chunk(), "choices": [{"index": 0, "message": {"role": "assistant", "content": "a"}, "finish_reason": "stop"}]}, DONE], CEREBRAS,
     [START, a.text_delta("a"), stop("end")]),
    ("message beside a delta", [{**chunk(), "choices": [{"index": 0, "delta": {"content": "b"}, "message": {"content": "ab"}}]}, DONE], CEREBRAS, [START, a.text_delta("b"), stop("end")]),
    ("padding", [chunk({"content": "a", "token_id": 5, "channel": "final"}, obfuscation="xx", p="ab"), DONE], CEREBRAS, [START, a.text_delta("a"), stop("end")]),
    ("annotations", [says("a"), chunk({"annotations": [{"type": "url_citation", "url_citation": {"url": "https://x", "title": "t", "start_index": 0, "end_index": 1}}]}), DONE], CEREBRAS,
     [START, a.text_delta("a"), a.cite_delta("https://x", "t", start=0, end=1), stop("end")]),
    ("citations beside the text", [chunk({"content": "a"}, citations=["https://x"]), chunk({"content": "b"}, citations=["https://x"]), DONE], CEREBRAS,
     [START, a.text_delta("ab"), a.cite_delta("https://x", ""), stop("end")]),
    ("search results beside the text", [chunk({"content": "a"}, citations=["https://x"], search_results=[{"url": "https://x", "title": "t"}]), DONE], CEREBRAS,
     [START, a.text_delta("a"), a.cite_delta("https://x", "t"), stop("end")]),
    ("a call written as text stays text", [says('<tool_call>{"name":"f","arguments":{}}</tool_call>'), DONE], CEREBRAS,
     [START, a.text_delta('<tool_call>{"name":"f","arguments":{}}</tool_call>'), stop("end")]),
    ("role and null in every chunk", [chunk({"role": "assistant", "content": None}), chunk({"role": "assistant", "content": "a"}), chunk({"role": "assistant", "content": ""}), DONE], CEREBRAS,
     [START, a.text_delta("a"), stop("end")]),
    ("images", [chunk({"content": "a", "images": [{"type": "image_url"}]}), DONE], CEREBRAS, [START, a.text_delta("a"), a.opaque_delta("chat", {"images": [{"type": "image_url"}]}), stop("end")]),
    ("m34 letters of several bytes", [says("aé𝄞"), chunk(finish="stop"), DONE], CEREBRAS, [START, a.text_delta("aé𝄞"), stop("end")]),
    ("CRLF, a mark of byte order, no blank behind the colon", [b"\xef\xbb\xbfdata:" + json.dumps(says("a")).encode() + b"\r\n\r\ndata:[DONE]\r\n\r\n"], CEREBRAS,
     [START, a.text_delta("a"), stop("end")]),
]
SPOKEN_IDS = [row[0] for row in SPOKEN]


@pytest.mark.parametrize("events, profile, expected", [row[1:] for row in SPOKEN], ids=SPOKEN_IDS)
def test_a_stream_is_read(events: list[Any], profile: a.Profile, expected: list[Json]) -> None:
    assert joined(read_bytes([sse(*events)], profile)) == expected


CUTS: list[tuple[str, list[Any], a.Profile]] = [*((row[0], row[1], CEREBRAS) for row in EXAMPLES), *(row[:3] for row in SPOKEN)]


@pytest.mark.parametrize("events, profile", [row[1:] for row in CUTS], ids=[row[0] for row in CUTS])
def test_where_the_bytes_are_cut_says_nothing(events: list[Any], profile: a.Profile) -> None:
    data = sse(*events)
    whole = read_bytes([data], profile)
    assert read_bytes([data[index:index + 1] for index in range(len(data))], profile) == whole
    for cut in range(1, len(data), 1 if len(data) < 600 else 7):
        assert read_bytes([data[:cut], data[cut:]], profile) == whole


@pytest.mark.parametrize("events", [row[1] for row in EXAMPLES if row[1][-1] == DONE], ids=[row[0] for row in EXAMPLES if row[1][-1] == DONE])
def test_a_stream_cut_before_its_finish_never_looks_whole(events: list[Any]) -> None:
    finish = next(index for index, event in enumerate(events) if isinstance(event, dict) and any(choice.get("finish_reason") for choice in event["choices"]))
    for count in range(finish):
        assert read_bytes([sse(*events[:count])])[-1]["delta"] == "error"


@pytest.mark.parametrize("event", [
    FAILED, {"error": {**FAILED["error"], "failed_generation": '[{"name": "f", "parameters": {"a": 1}}]'}},
    {"error": {**FAILED["error"], "failed_generation": '<function=f={"a": 1}</function>'}},
    {"error": {**FAILED["error"], "failed_generation": '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'}}], ids=["object", "list", "tag", "tool_call"])
def test_m40_a_call_that_groq_would_not_pass_on_is_the_answer(event: Json) -> None:
    deltas = read_bytes([sse(chunk({"reasoning": "Hm."}), b"event: error\n" + sse(event))], GROQ, OFFERED)
    assert deltas[-3:] == [a.call_delta(a.mint("call_", "s", 0), "f"), a.args_delta('{"a":1}'), stop("tool")]
    assert [delta["delta"] for delta in a.chat_read_answer(event, a.Source(GROQ, names=OFFERED))] == ["call", "args", "stop"]


@pytest.mark.parametrize("event, names", [
    (FAILED, a.EMPTY_NAMES), ({"error": {**FAILED["error"], "failed_generation": ""}}, OFFERED), ({"error": {**FAILED["error"], "failed_generation": '{"name": ["f"]}'}}, OFFERED)],
    ids=["a tool nobody offered", "nothing in it", "a name that is none"])
def test_m40_what_is_no_call_of_the_request_stays_an_error(event: Json, names: a.Names) -> None:
    assert read_bytes([sse(event)], GROQ, names)[-1]["message"] == "no"


def test_m40_a_call_under_way_is_not_told_twice() -> None:
    assert read_bytes([sse(calls(fragment(0, A, "f", '{"a"')), FAILED)], GROQ, OFFERED)[-1]["delta"] == "error"


def test_names_come_back_as_the_client_knows_them() -> None:
    names = a.Names([{"name": "search", "namespace": "mcp__docs", "kind": "function"}], False)
    assert read_bytes([sse(calls(fragment(0, A, "mcp__docs__search", "{}")), DONE)], names=names)[1] == a.call_delta(A, "search", namespace="mcp__docs")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.text(max_size=8), st.sampled_from(['"', "\\", "\n", '","finish_reason":"stop"', "</think>", "\ud83d", '"content":"'])), max_size=12), st.booleans())
def test_events_that_only_look_like_the_last_one_are_read_in_full(texts: list[str], ascii_only: bool) -> None:
    events = [a.Event("", json.dumps(says(text), ensure_ascii=ascii_only, separators=(",", ":")), b"") for text in texts]
    reader, source = a.ChatStreamReader(a.Source(CEREBRAS)), a.ChatStreamReader(a.Source(CEREBRAS))
    quick = [delta for event in events for delta in reader.feed(event)] + reader.close()
    full = [delta for event in events for delta in source.take(json.loads(event.data))] + source.close()
    assert quick == full


NO_JSON = a.error_delta(502, "provider sent something that is not JSON", "server_error")
A_CALL_TOO = '","tool_calls":[{"index":0,"id":"call_AAAAAAAAAAAA","function":{"name":"f","arguments":"{}"}}]},"finish_reason":"stop"}]}'


@pytest.mark.parametrize("tail, end", [('"},"finish_reason":null}]}', CUT), ('"},"finish_reason":"stop"}]}', stop("end")), (A_CALL_TOO, stop("tool")), ('"', NO_JSON), ("", NO_JSON), ('\\"},"x', NO_JSON)])
def test_only_the_same_event_with_another_text_is_read_in_short(tail: str, end: Json) -> None:
    head = '{"id":"c1","model":"m","choices":[{"index":0,"delta":{"content":"'
    plain = a.Event("", head + 'a"},"finish_reason":null}]}', b"")
    reader = a.ChatStreamReader(a.Source(CEREBRAS))
    assert reader.feed(plain) == [START, a.text_delta("a")] and reader.feed(plain) == [a.text_delta("a")]
    assert without_found([*reader.feed(a.Event("", head + "b" + tail, b"")), *reader.close()])[-1] == end


# ------------------------------------------------------------------ answers that are not streamed

def answer(message: Json | None = None, finish: str | None = "stop", **more: Any) -> Json:
    return {"id": "c1", "object": "chat.completion", "created": 1, "model": "m", "usage": COUNTED,
            "choices": [{"index": 0, "message": {"role": "assistant", **(message or {})}, "finish_reason": finish}], **more}


ANSWERS: list[tuple[str, Any, list[Json]]] = [
    ("text", answer({"content": "a"}), [START, a.text_delta("a"), USAGE, stop("end")]),
    ("calls", answer({"content": None, "tool_calls": [call_of(A), call_of(B)]}, "stop"),
     [START, a.call_delta(A, "f"), a.args_delta("{}"), a.call_delta(B, "f"), a.args_delta("{}"), USAGE, stop("tool")]),
    ("calls whose ids repeat", answer({"tool_calls": [call_of(A), call_of(A)]}),
     [START, a.call_delta(A, "f"), a.args_delta("{}"), a.call_delta(a.mint("call_", "", 1), "f"), a.args_delta("{}"), USAGE, stop("tool")]),
    ("a freeform call", answer({"tool_calls": [{"id": A, "type": "custom", "custom": {"name": "c", "input": "4 + 4"}}]}),
     [START, a.call_delta(A, "c", "custom"), a.args_delta('{"input":"4 + 4"}'), USAGE, stop("tool")]),
    ("thinking", answer({"content": "a", "reasoning_content": "Hm."}), [START, a.think_delta("Hm."), PROVENANCE, a.text_delta("a"), USAGE, stop("end")]),
    ("tags", answer({"content": "<think>Hm.</think>\na"}), [START, a.think_delta("Hm."), PROVENANCE, a.text_delta("a"), USAGE, stop("end")]),
    ("refusal", answer({"content": None, "refusal": "no"}), [START, a.refuse_delta("no"), USAGE, stop("refusal")]),
    ("old function_call", answer({"function_call": {"name": "f", "arguments": "{}"}}, "function_call"),
     [START, a.call_delta(a.mint("call_", "", 0), "f"), a.args_delta("{}"), USAGE, stop("tool")]),
    ("no finish", answer({"content": "a"}, None), [START, a.text_delta("a"), USAGE, stop("end")]),
    ("message and delta", {**answer(), "choices": [{"index": 0, "delta": {"content": ""}, "message": {"content": "a"}, "finish_reason": "stop"}]}, [START, a.text_delta("a"), USAGE, stop("end")]),
    ("an error in a 200", {"error": {"message": "Overloaded", "code": 503}}, [a.error_delta(503, "Overloaded", "server_is_overloaded")]),
    ("m117 an error in a list", [{"error": {"message": "bad", "code": 400, "status": "INVALID_ARGUMENT"}}], [a.error_delta(400, "bad", None, "invalid_request_error")]),
    ("m118 a bad key of xAI", {"error": "Incorrect API key provided: xx", "code": "invalid_api_key"}, [a.error_delta(502, "Incorrect API key provided: xx", "server_error")]),
    ("m116 overload", {"error": {"type": "overloaded_error", "message": "Overloaded"}}, [a.error_delta(503, "Overloaded", "server_is_overloaded")]),
    ("neither choices nor error", {"id": "x"}, [a.error_delta(502, "empty answer", "empty_answer")]),
    ("empty choices", {"id": "x", "choices": []}, [a.error_delta(502, "empty answer", "empty_answer")]),
    ("text for a body", "hello", [a.error_delta(502, "provider sent something that is not JSON", "server_error")]),
    ("null", None, [a.error_delta(502, "provider sent something that is not JSON", "server_error")]),
]


@pytest.mark.parametrize("body, expected", [row[1:] for row in ANSWERS], ids=[row[0] for row in ANSWERS])
def test_an_answer_is_read(body: Any, expected: list[Json]) -> None:
    before = copy.deepcopy(body)
    deltas = a.chat_read_answer(body, a.Source(CEREBRAS))
    assert without_found(deltas) == expected
    assert body == before and check_deltas(deltas) == []


def test_m38_choices_that_are_one_answer() -> None:
    body = answer({"content": "a"})
    body["choices"].append({"index": 1, "message": {"tool_calls": [call_of(A)]}, "finish_reason": "tool_calls"})
    copilot = a.profile_for("github-copilot", "claude-sonnet-4.5")
    assert a.chat_read_answer(body, a.Source(copilot)) == [START, a.text_delta("a"), a.call_delta(A, "f"), a.args_delta("{}"), USAGE, stop("tool")]
    assert a.chat_read_answer(body, a.Source(CEREBRAS)) == [START, a.text_delta("a"), USAGE, stop("end")]


@pytest.mark.parametrize("garbage", [
    {"choices": 5}, {"choices": [None, 5]}, {"choices": [{"delta": 5}]}, {"choices": [{"message": {"content": 5, "tool_calls": 5, "annotations": 5, "reasoning_details": 5}}]},
    {"choices": [{"message": {"tool_calls": [None, {}, {"function": 5}, {"function": {"name": 5, "arguments": 5}}]}}]}, {"choices": [{"message": {"content": [None, 5, {}, "a"]}}]},
    {"choices": [{"message": {"reasoning_details": [None, {"text": 5}], "annotations": [None, {"url_citation": 5}]}}], "usage": 5, "citations": 5, "x_groq": 5},
    {"choices": [{"message": {}, "finish_reason": 5, "stop_reason": []}], "search_results": [None, 5, {}]}])
def test_answers_without_sense_never_break(garbage: Any) -> None:
    deltas = a.chat_read_answer(garbage, a.Source())
    assert deltas[-1]["delta"] in ("stop", "error")
    assert a.chat_read_answer(garbage, a.Source()) == deltas


# ------------------------------------------------------------------ deltas to Chat

HEAD = {"id": a.mint("chatcmpl-", "x"), "object": "chat.completion.chunk", "created": 1790000000, "model": "asked"}


def asked_by(usage: bool = False, **fields: Any) -> a.Asked:
    return a.Asked({**a.new_hub("chat", "asked", True), "meta": {"include_usage": True} if usage else {}, **fields}, "x", 1790000000)


def frame(delta: Json | None = None, finish: str | None = None, usage: bool = False) -> bytes:
    return a.write_event({**HEAD, "choices": [{"index": 0, "delta": delta or {}, "logprobs": None, "finish_reason": finish}], **({"usage": None} if usage else {})})


def written(deltas: list[Json], asked: a.Asked) -> list[bytes]:
    writer = a.ChatStreamWriter(asked)
    return [event for delta in deltas for event in writer.feed(delta)] + writer.close()


ROLE = {"role": "assistant", "content": ""}
END = b"data: [DONE]\n\n"
OPAQUE_SEAL = a.seal_delta({"family": "anthropic", "model": "claude-opus-5", "field": "signature", "data": "EqQBCkYI"})
BARE = {"type": "reasoning.text", "format": "anthropic-claude-v1", "index": 0, "text": "", "signature": "EqQBCkYI"}


def opens(index: int, call_id: str, name: str) -> Json:
    return {"tool_calls": [{"index": index, "id": call_id, "type": "function", "function": {"name": name, "arguments": ""}}]}


def more(index: int, text: str) -> Json:
    return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}


OUT: list[tuple[str, list[Json], list[Json | None], str]] = [       # row, deltas, deltas of the chunks behind the first, finish reason
    ("text", [a.text_delta("é\n"), a.text_delta('"b\\')], [{"content": "é\n"}, {"content": '"b\\'}], "stop"),
    ("m58 thinking", [a.think_delta("Hm."), PROVENANCE, a.text_delta("a")], [{"reasoning_content": "Hm."}, {"content": "a"}], "stop"),
    ("E14 m56", [a.think_delta("Need file."), OPAQUE_SEAL, a.text_delta("Reading."), a.call_delta("toolu_01Ab", "Read"), a.args_delta('{"file_path":'), a.args_delta('"/a"}'),
                 a.call_delta("toolu_02Cd", "now")],
     [{"reasoning_content": "Need file."}, {"reasoning_details": [BARE]}, {"content": "Reading."}, opens(0, "toolu_01Ab", "Read"), more(0, '{"file_path":'), more(0, '"/a"}'),
      opens(1, "toolu_02Cd", "now"), more(1, "{}")], "tool_calls"),
    ("E15", [a.think_delta("**Look**"), a.seal_delta({"family": "openai", "model": "gpt-5.5", "field": "encrypted", "id": "rs_1", "data": "gAAAAABo"}),
             a.call_delta("call_x1y2z3w4v5u6", "Read"), a.args_delta('{"file_path":"/a"}')],
     [{"reasoning_content": "**Look**"}, {"reasoning_details": [{"type": "reasoning.encrypted", "format": "openai-responses-v1", "index": 0, "id": "rs_1", "data": "gAAAAABo"}]},
      opens(0, "call_x1y2z3w4v5u6", "Read"), more(0, '{"file_path":"/a"}')], "tool_calls"),
    ("two seals", [OPAQUE_SEAL, OPAQUE_SEAL], [{"reasoning_details": [BARE]}, {"reasoning_details": [{**BARE, "index": 1}]}], "stop"),
    ("details as they came", [a.seal_delta({**ROUTED, "data": [SIGNED]})], [{"reasoning_details": [SIGNED]}], "stop"),
    ("m57 a call without arguments", [a.call_delta(A, "f"), a.text_delta("a")], [opens(0, A, "f"), more(0, "{}"), {"content": "a"}], "tool_calls"),
    ("text behind a call", [a.call_delta(A, "f"), a.args_delta("{}"), a.text_delta("a"), a.text_delta("b")], [opens(0, A, "f"), more(0, "{}"), {"content": "a"}, {"content": "b"}], "tool_calls"),
    ("thinking behind a call", [a.call_delta(A, "f"), a.args_delta("{}"), a.think_delta("Hm."), PROVENANCE], [opens(0, A, "f"), more(0, "{}"), {"reasoning_content": "Hm."}], "tool_calls"),
    ("note", [a.call_delta(A, "f"), a.note_delta(A, "gemini", {"g": 1}), a.args_delta("{}")], [opens(0, A, "f"), {"tool_calls": [{"index": 0, "extra_content": {"g": 1}}]}, more(0, "{}")],
     "tool_calls"),
    ("freeform", [a.call_delta(A, "c", "custom"), a.args_delta('{"inp'), a.args_delta('ut":"a"}')],
     [{"tool_calls": [{"index": 0, "id": A, "type": "custom", "custom": {"name": "c", "input": ""}}]}, {"tool_calls": [{"index": 0, "custom": {"input": "a"}}]}], "tool_calls"),
    ("citations", [a.text_delta("a"), a.cite_delta("https://x", "t", start=1, end=2), a.cite_delta("https://y", "")],
     [{"content": "a"}, {"annotations": [{"index": 0, "type": "url_citation", "url_citation": {"start_index": 1, "end_index": 2, "url": "https://x", "title": "t"}}]},
      {"annotations": [{"index": 1, "type": "url_citation", "url_citation": {"start_index": 0, "end_index": 0, "url": "https://y", "title": ""}}]}], "stop"),
    ("images", [a.opaque_delta("chat", {"images": [{"type": "image_url"}]})], [{"images": [{"type": "image_url"}]}], "stop"),
    ("blocks of others", [a.opaque_delta("anthropic", {"type": "server_tool_use"}), a.text_delta("a")], [{"content": "a"}], "stop"),
    ("nothing", [], [], "stop"),
]


@pytest.mark.parametrize("usage", [False, True], ids=["m59 usage not asked for", "m60 usage asked for"])
@pytest.mark.parametrize("deltas, chunks, finish", [row[1:] for row in OUT], ids=[row[0] for row in OUT])
def test_a_stream_is_written(deltas: list[Json], chunks: list[Json], finish: str, usage: bool) -> None:
    reason = {"tool_calls": "tool"}.get(finish, "end")
    counts = [a.write_event({**HEAD, "choices": [], "usage": a.write_usage("chat", USAGE)})] if usage else []
    expected = [*(frame(delta, None, usage) for delta in (ROLE, *chunks)), frame({}, finish, usage), *counts, END]
    assert written([START, *deltas, USAGE, stop(reason)], asked_by(usage)) == expected


STOPS: list[tuple[str, list[Json], list[Json], str]] = [
    ("end", [stop("end")], [], "stop"), ("length", [stop("length")], [], "length"), ("sequence", [stop("sequence", sequence="END")], [], "stop"),
    ("filter", [stop("filter")], [], "content_filter"), ("pause", [stop("pause")], [], "stop"), ("context", [stop("context")], [], "length"),
    ("E18 refusal in words", [a.refuse_delta("I can't help with that."), stop("refusal")], [{"refusal": "I can't help with that."}], "stop"),
    ("refusal explained", [stop("refusal", details={"explanation": "because"})], [{"refusal": "because"}], "stop"),
    ("refusal without words", [stop("refusal")], [], "content_filter"),
]


@pytest.mark.parametrize("deltas, chunks, finish", [row[1:] for row in STOPS], ids=[row[0] for row in STOPS])
def test_a_stop_is_written(deltas: list[Json], chunks: list[Json], finish: str) -> None:
    assert written([START, *deltas], asked_by()) == [*(frame(delta) for delta in (ROLE, *chunks)), frame({}, finish), END]
    body = a.chat_write_answer([START, *deltas], asked_by())
    assert body["choices"][0]["finish_reason"] == finish and body["choices"][0]["message"]["refusal"] == (chunks[0]["refusal"] if chunks else None)


def test_E16_an_error_ends_the_stream_without_its_mark() -> None:
    error = a.error_delta(503, "Overloaded", "server_is_overloaded")
    told = b'data: {"error":{"message":"Overloaded","type":"server_error","param":null,"code":"server_is_overloaded"}}\n\n'
    assert written([START, a.text_delta("Hel"), error], asked_by()) == [frame(ROLE), frame({"content": "Hel"}), told]
    assert written([START, a.call_delta(A, "f"), error], asked_by()) == [frame(ROLE), frame(opens(0, A, "f")), told]
    assert written([error], asked_by()) == [told]
    assert a.chat_write_answer([START, a.text_delta("Hel"), error], asked_by()) == json.loads(told[6:])


def test_m61_deltas_that_break_off_end_in_an_error() -> None:
    told = a.write_event({"error": {"message": "upstream closed the stream before finishing", "type": "server_error", "param": None, "code": None}})
    assert written([START, a.text_delta("Hel")], asked_by())[-1] == told
    assert a.chat_write_answer([START, a.text_delta("Hel")], asked_by()) == json.loads(told[6:])


def test_nothing_follows_the_end() -> None:
    writer = a.ChatStreamWriter(asked_by())
    for delta in (START, a.text_delta("a"), stop("end")):
        writer.feed(delta)
    assert writer.feed(a.text_delta("b")) == writer.feed(a.error_delta(502, "x")) == writer.close() == []


def test_signs_of_life_and_our_own_errors() -> None:
    writer = a.ChatStreamWriter(asked_by())
    writer.feed(START)
    assert writer.keep_alive() == b": keep-alive\n\n"
    assert json.loads(writer.error(a.no_route("gone"))[6:])["error"]["code"] == "no_route"
    assert writer.feed(a.text_delta("b")) == writer.close() == []


def test_thinking_that_was_not_asked_for_is_not_told() -> None:
    asked = asked_by(think={"show": "omitted"})
    deltas = [START, a.think_delta("Hm."), OPAQUE_SEAL, a.text_delta("a"), a.think_delta("Ho."), PROVENANCE, stop("end")]
    assert written(deltas, asked) == [frame(ROLE), frame({"content": "a"}), frame({}, "stop"), END]
    assert not {"reasoning_content", "reasoning_details"} & a.chat_write_answer(deltas, asked)["choices"][0]["message"].keys()


def test_clients_of_old_get_function_call() -> None:
    asked = asked_by(legacy=True)
    deltas = [START, a.call_delta(A, "f"), a.args_delta('{"a":'), a.args_delta("1}"), a.call_delta(B, "g"), a.args_delta("{}"), stop("tool")]
    assert written(deltas, asked) == [*(frame(delta) for delta in (
        ROLE, {"function_call": {"name": "f", "arguments": ""}}, {"function_call": {"arguments": '{"a":'}}, {"function_call": {"arguments": "1}"}})), frame({}, "function_call"), END]
    choice = a.chat_write_answer(deltas, asked)["choices"][0]
    assert (choice["message"]["function_call"], choice["finish_reason"]) == ({"name": "f", "arguments": '{"a":1}'}, "function_call") and "tool_calls" not in choice["message"]


WHOLE: list[tuple[str, list[Json], Json]] = [
    ("text", [a.text_delta("a"), a.text_delta("b")], {"content": "ab", "refusal": None, "annotations": []}),
    ("m63 calls alone", [a.call_delta(A, "f")], {"content": None, "refusal": None, "annotations": [], "tool_calls": [call_of(A)]}),
    ("nothing", [], {"content": "", "refusal": None, "annotations": []}),
    ("m58 thinking", [a.think_delta("H"), a.think_delta("m."), OPAQUE_SEAL, a.text_delta("a")],
     {"content": "a", "refusal": None, "annotations": [], "reasoning_content": "Hm.", "reasoning_details": [BARE]}),
    ("freeform", [a.call_delta(A, "c", "custom"), a.args_delta('{"input":"a"}')],
     {"content": None, "refusal": None, "annotations": [], "tool_calls": [{"id": A, "type": "custom", "custom": {"name": "c", "input": "a"}}]}),
    ("note", [a.call_delta(A, "f"), a.note_delta(A, "gemini", {"g": 1})], {"content": None, "refusal": None, "annotations": [], "tool_calls": [call_of(A, extra_content={"g": 1})]}),
    ("citation", [a.text_delta("a"), a.cite_delta("https://x", "t", start=0, end=1)],
     {"content": "a", "refusal": None, "annotations": [{"type": "url_citation", "url_citation": {"start_index": 0, "end_index": 1, "url": "https://x", "title": "t"}}]}),
    ("media", [a.opaque_delta("chat", {"images": [1]}), a.opaque_delta("chat", {"images": [2]}), a.opaque_delta("chat", {"audio": {"id": "x", "data": "QQ"}}),
               a.opaque_delta("chat", {"audio": {"id": "x", "data": "=="}})],
     {"content": "", "refusal": None, "annotations": [], "images": [1, 2], "audio": {"id": "x", "data": "QQ=="}}),
]


@pytest.mark.parametrize("deltas, message", [row[1:] for row in WHOLE], ids=[row[0] for row in WHOLE])
def test_an_answer_is_written(deltas: list[Json], message: Json) -> None:
    reason = "tool" if "tool_calls" in message else "end"
    assert a.chat_write_answer([START, *deltas, USAGE, stop(reason)], asked_by()) == {
        **HEAD, "object": "chat.completion", "usage": a.write_usage("chat", USAGE),
        "choices": [{"index": 0, "message": {"role": "assistant", **message}, "logprobs": None, "finish_reason": {"tool": "tool_calls", "end": "stop"}[reason]}]}


def test_m62_usage_of_an_answer_counts_the_cached_tokens() -> None:
    usage = a.chat_write_answer([START, a.usage_delta({"input": 120, "cached": 100, "cache_write": 8, "output": 40, "reasoning": 9}), stop("end")], asked_by())["usage"]
    assert usage == {"prompt_tokens": 120, "completion_tokens": 40, "total_tokens": 160, "prompt_tokens_details": {"cached_tokens": 100, "cache_write_tokens": 8},
                     "completion_tokens_details": {"reasoning_tokens": 9}}


def test_the_estimate_that_came_with_the_start_is_told() -> None:
    assert a.chat_write_answer([a.start_delta("c1", "m", {"input": 25}), stop("end")], asked_by())["usage"]["prompt_tokens"] == 25
    assert b'"prompt_tokens":25' in b"".join(written([a.start_delta("c1", "m", {"input": 25}), stop("end")], asked_by(True)))


@pytest.mark.parametrize("row", [row for row in SPOKEN if row[3][-1]["delta"] == "stop"], ids=[row[0] for row in SPOKEN if row[3][-1]["delta"] == "stop"])
def test_a_stream_written_and_read_again_says_the_same(row: tuple[str, list[Any], a.Profile, list[Json]]) -> None:
    deltas = read_bytes([sse(*row[1])], row[2])
    asked = asked_by(True)
    again = read_bytes([b"".join(written(deltas, asked))], a.Profile())
    whole = a.chat_read_answer(a.chat_write_answer(deltas, asked), a.Source())

    def essence(told: list[Json]) -> list[Any]:
        parts = [part for part in a.fold_deltas(told) if part["type"] != "think" or part["text"]]
        kept = [{key: part[key] for key in ("type", "text", "name", "args") if key in part} for part in parts]
        return [*sorted((part for part in kept if part["type"] != "opaque"), key=lambda part: str(part["type"])), told[-1]["reason"].replace("sequence", "end")]

    assert essence(again) == essence(whole) == essence(deltas)


# ------------------------------------------------------------------ recordings

PRESETS = {"alibaba": "qwen", "azure": "openai"}
needs_recordings = pytest.mark.skipif(not (SHARED / "recordings" / "index.json").exists(), reason="the recordings are not beside this checkout (../shared/recordings)")
RECORDED: list[str] = [row["file"] for row in json.loads((SHARED / "recordings" / "index.json").read_text(encoding="utf-8")) if row["endpoint"] == "chat"] \
    if (SHARED / "recordings" / "index.json").exists() else ["none"]


def recording(name: str) -> tuple[Json, a.Profile]:
    kept = json.loads((SHARED / "recordings" / name).read_text(encoding="utf-8"))
    return kept, a.profile_for(PRESETS.get(kept["provider"], kept["provider"]), kept["model"] or "")


def plain_message(message: Json, profile: a.Profile) -> Json:
    """A message without what reading and writing may change, see plain_request."""
    message = {name: value for name, value in message.items() if value not in (None, [], False) and name not in ("name", "reasoning", "reasoning_content", "reasoning_details")}
    content = message.pop("content", None)
    if isinstance(content, list):
        content = [{name: value for name, value in part.items() if value is not None} for part in content if part["type"] not in ("thinking", "refusal")]
        content = [{**part, "image_url": {"url": part["image_url"]}} if isinstance(part.get("image_url"), str) else part for part in content]
        content = [{"type": "file", "file": {"filename": "document.pdf", "file_data": part["document_url"]}} if "document_url" in part else part for part in content]
    if isinstance(content, str):
        content = [{"type": "text", "text": content}] if content.strip() else []
    calls_of = [{**{name: value for name, value in call.items() if name != "index"}, "id": a.fit_id(call["id"], profile.call_id)} for call in message.pop("tool_calls", ())]
    if "tool_call_id" in message:
        message["tool_call_id"] = a.fit_id(message["tool_call_id"], profile.call_id)
    role = "system" if message["role"] == "developer" else message["role"]
    return {**message, "role": role, "content": content or [], **({"tool_calls": calls_of} if calls_of else {})}


def plain_messages(messages: list[Json], profile: a.Profile) -> list[Json]:
    """Neighbours of one role made one, as mend() does, texts joined; system text in the middle wrapped, and made the user's where nobody else speaks."""
    merged: list[Json] = []
    plain = [plain_message(message, profile) for message in messages]
    alone = all(message["role"] == "system" for message in plain)
    for index, message in enumerate(plain):
        if message["role"] == "system" and any(earlier["role"] != "system" for earlier in plain[:index]):
            text = "\n".join(part["text"] for part in message["content"])
            message = {"role": "user", "content": [{"type": "text", "text": f"<system-reminder>\n{text}\n</system-reminder>"}]}
        message = {**message, "role": "user"} if alone else message
        joint = "\n\n" if message["role"] == "system" else "\n"
        if merged and merged[-1]["role"] == message["role"] != "tool":
            merged[-1] = {**merged[-1], "content": merged[-1]["content"] + message["content"]}
        else:
            merged.append(message)
        if all(part["type"] == "text" and len(part) == 2 for part in merged[-1]["content"]) and merged[-1]["content"]:
            merged[-1]["content"] = [{"type": "text", "text": joint.join(part["text"] for part in merged[-1]["content"])}]
    return merged


def plain_request(body: Json, profile: a.Profile) -> Json:
    """A request without what reading and writing may change.

    Fields that are null, empty or the default (n 1, stream false, response_format text); stream_options; one name for the output limit and the seed; stop as a list;
    old functions as tools; empty descriptions; names of messages; thinking, which the profile replays or not; developer for system; system text in the middle;
    neighbours of one role;
    what the profile rejects, does not take, or turns (effort, sampling of thinking models, tier, hosted tools).
    """
    plain = {name: value for name, value in body.items() if value not in (None, [], {}, False) and not (name == "n" and value == 1)}
    for name in ("stream_options", "model", "service_tier", "reasoning_effort", "reasoning", "thinking", "enable_thinking", *profile.reject):
        plain.pop(name, None)
    for old, new in (("max_completion_tokens", "max_tokens"), ("random_seed", "seed")):
        if old in plain:
            plain[new] = plain.pop(old)
    if isinstance(plain.get("stop"), str):
        plain["stop"] = [plain["stop"]]
    if plain.get("response_format") == {"type": "text"}:
        del plain["response_format"]
    if "functions" in plain:
        plain["tools"] = [{"type": "function", "function": function} for function in plain.pop("functions")]
        plain["parallel_tool_calls"] = False
    if profile.sampling == "idle":
        plain.pop("temperature", None)
    plain = {name: value for name, value in plain.items() if name != "parallel_tool_calls" or value}
    tools = [{"type": "function", **one} for one in plain.pop("tools", ()) if one.get("type", "function") in ("function", "custom")]
    plain["tools"] = [{**one, "function": {name: value for name, value in one["function"].items() if value != ""}} if "function" in one else one for one in tools]
    return {**plain, "messages": plain_messages(body["messages"], profile)}


@needs_recordings
@pytest.mark.parametrize("name", RECORDED)
def test_a_recorded_request_comes_back(name: str) -> None:
    kept, profile = recording(name)
    body = kept["request"]["body"]
    if not isinstance(body, dict):
        pytest.skip("the recording has no request")
    hub = a.chat_read_request(body)
    back = a.chat_write_request(a.prepare(hub, profile), profile)
    assert plain_request(back, profile) == plain_request(body, profile)
    assert {name.partition(".")[0] for name in a.prepare(hub, profile)["dropped"]} <= {"tools", "name", "temperature"}


#: What the summary of a recorded answer rightly says otherwise than ours: recording, keys of the summary, why.
OTHERWISE: dict[str, tuple[tuple[str, ...], str]] = {
    "groq/chat-json-text-c6355c00": (("text", "thinking"), "thinking stands in tags"),
    "groq/chat-json-text-d8589d3d": (("text", "thinking"), "thinking stands in tags"),
    "huggingface/chat-json-text-22236508": (("text", "thinking"), "thinking stands in tags"),
    "huggingface/chat-json-text-4e513d7a": (("text", "thinking"), "thinking stands in tags"),
    "huggingface/chat-json-text-5a72cccc": (("text", "thinking"), "thinking stands in tags"),
    "huggingface/chat-sse-text-b1346df0": (("text", "thinking"), "thinking stands in tags"),
    "groq/chat-sse-thinking-9a175d06": (("stop", "tool_calls", "error"), "failed_generation is a call of the request"),
    "groq/chat-sse-thinking-924ea98e": (("text", "thinking"), "the body of a failed answer is its error alone"),
    "openrouter/chat-json-citations-2216a7e6": (("thinking",), "the thinking stands in reasoning_details alone"),
    "openrouter/chat-json-thinking-2b5a4f2b": (("annotations",), "an annotation without a URL, of a parsed file"),
    "openrouter/chat-sse-thinking-9c47feac": (("error",), "the error came behind the finish"),
    "perplexity/chat-json-text-b57e7e9c": (("annotations",), "citations beside the answer become annotations"),
    "perplexity/chat-json-text-da84a9bf": (("annotations",), "citations beside the answer become annotations"),
    "perplexity/chat-sse-text-e4702642": (("annotations",), "citations beside the answer become annotations"),
}
#: Recordings whose stream the SDK's own types cannot hold: old function_call, freeform calls.
UNTYPED = ("openai/chat-json-tool-call-06aa8e7f", "openai/chat-json-tool-call-931cf02b")


def counts_of(usage: Json) -> Json:
    """Usage as the summary has it, with what we rightly change: xAI's reasoning added, parts never larger than the whole, nothing told as nothing."""
    return {name: usage[name] or 0 for name in ("in", "reasoning")}


@needs_recordings
@pytest.mark.parametrize("name", RECORDED)
def test_a_recorded_answer_is_read_and_written(name: str) -> None:
    pytest.importorskip("openai")
    pytest.importorskip("anthropic")
    sys.path.insert(0, str(SHARED / "conformance"))
    import validate
    import wire
    kept, profile = recording(name)
    response, body = kept["response"], kept["request"]["body"]
    if not isinstance(response.get("body"), (dict, list)) and "sse" not in response:
        pytest.skip("the recording has no answer in this format")
    hub = a.chat_read_request(body) if isinstance(body, dict) else a.new_hub("chat", "asked", True)
    names = a.name_map(hub, profile)
    if "sse" in response:
        data = response["sse"].encode()
        deltas = read_bytes([data], profile, names)
        assert read_bytes([data[index:index + 61] for index in range(0, len(data), 61)], profile, names) == deltas
    else:
        deltas = a.chat_read_answer(response["body"], a.Source(profile, "s", names=names))
        assert check_deltas(deltas) == []
    asked = asked_by(True, **({"legacy": True} if hub.get("legacy") else {}))
    failed = deltas[-1]["delta"] == "error"
    want = wire.semantics("chat", response)
    stem = name.removesuffix(".json")
    other = OTHERWISE.get(stem, ((), ""))[0]
    for out in ({"status": 200, "sse": b"".join(written(deltas, asked)).decode()}, {"status": 400 if failed else 200, "body": a.chat_write_answer(deltas, asked)}):
        wrong = [issue for issue in validate.validate("chat", out, True) if issue["level"] != "warn" and not (failed and issue["rule"] == "done-once")]
        assert wrong == [] or stem in UNTYPED and "sse" in out
        got = wire.semantics("chat", out)
        for key in ("text", "thinking", "refusal", "stop", "annotations", "media_out"):
            assert got[key] == want[key] or key in other, key
        assert [(call["name"], call["args"]) for call in got["tool_calls"]] == [(call["name"], call["args"]) for call in want["tool_calls"]] or "tool_calls" in other
        assert bool(got["error"]) == bool(want["error"]) or "error" in other
        if want["usage"]["in"] is not None and not failed:
            assert counts_of(got["usage"]) == counts_of(want["usage"])
            added = want["usage"]["reasoning"] if kept["provider"] == "xai" else 0
            assert got["usage"]["out"] == (want["usage"]["out"] or 0) + (added or 0)
