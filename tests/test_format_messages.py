"""Anthropic Messages: requests read and written, answers and streams read and written, streams that pass through.

Rows named by a number are mistakes of other gateways (`m64`), rows named E and a number are worked examples (tests/data/messages/examples.txt).
"""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import aicarousel as gateway
from deltas import check_deltas
from dialects import without_found

HERE = Path(__file__).resolve().parent
SHARED = HERE.parents[1] / "shared"
CLAUDE = gateway.profile_for("anthropic", "claude-sonnet-4-6", "messages")
COMPAT = gateway.profile_for("moonshot", "kimi-k2", "messages")
ASKED = gateway.Asked({"model": "claude-sonnet-5"}, seed="t")
MESSAGE_ID = gateway.mint("msg_", "t")
HI = [{"role": "user", "content": "hi"}]

Json = dict[str, Any]


def body_of(**fields: Any) -> Json:
    return {"model": "claude-sonnet-5", "max_tokens": 100, "messages": HI, **fields}


def said(content: Any, role: str = "user") -> Json:
    """A request whose only message has this content."""
    return body_of(messages=[{"role": role, "content": content}])


def read(**fields: Any) -> Json:
    return gateway.messages_read_request(body_of(**fields))


def parts(content: Any, role: str = "user") -> list[Json]:
    """The hub parts of one content."""
    return gateway.messages_read_request(said(content, role))["turns"][0]["parts"]


def write(body: Json, profile: Any = CLAUDE) -> Json:
    """A Messages request read, prepared and written to a Messages provider."""
    return gateway.messages_write_request(gateway.prepare(gateway.messages_read_request(body), profile), profile)


def hub_of(*turns: Json, client: str = "chat", **fields: Any) -> Json:
    return {**gateway.new_hub(client, "gpt-5.5", False), "turns": list(turns), **fields}


def send(hub: Json, profile: Any = CLAUDE) -> Json:
    """A hub request of another client, written to a Messages provider."""
    return gateway.messages_write_request(gateway.prepare(hub, profile), profile)


def text(words: str) -> Json:
    return {"type": "text", "text": words}


def user(*items: Json) -> Json:
    return {"role": "user", "parts": list(items)}


def assistant(*items: Json) -> Json:
    return {"role": "assistant", "parts": list(items)}


# ---- Requests: what is refused

REFUSED = {
    "no object": ([], None, "The body must be a JSON object."),
    "model number": (body_of(model=1), "model", "model must be a string."),
    "model empty": (body_of(model=""), "model", "model must be a name."),
    "max_tokens text": (body_of(max_tokens="9"), "max_tokens", "max_tokens must be an integer."),
    "max_tokens boolean": (body_of(max_tokens=True), "max_tokens", "max_tokens must be an integer."),
    "max_tokens negative": (body_of(max_tokens=-1), "max_tokens", "max_tokens must be 0 or more."),
    "stream text": (body_of(stream="yes"), "stream", "stream must be a boolean."),
    "temperature text": (body_of(temperature="hot"), "temperature", "temperature must be a number."),
    "tools object": (body_of(tools={}), "tools", "tools must be a list."),
    "thinking text": (body_of(thinking="on"), "thinking", "thinking must be an object."),
    "messages missing": ({"model": "m", "max_tokens": 1}, "messages", "messages: at least one message is required"),
    "messages empty": (body_of(messages=[]), "messages", "messages: at least one message is required"),
    "messages text": (body_of(messages="hi"), "messages", "messages must be a list."),
    "message text": (body_of(messages=["hi"]), "messages[0]", "messages[0] must be an object."),
    "role": (body_of(messages=[*HI, {"role": "tool", "content": "x"}]), "messages[1].role", "messages[1].role must be one of assistant, system, user."),
    "role list": (body_of(messages=[{"role": ["user"], "content": "x"}]), "messages[0].role", "messages[0].role must be one of assistant, system, user."),
    "content object": (said({}), "messages[0].content", "messages[0].content must be a string or a list of blocks."),
    "block text": (said(["hi"]), "messages[0].content[0]", "messages[0].content[0] must be a block with a type."),
    "block untyped": (said([text("a"), {"text": "hi"}]), "messages[0].content[1]", "messages[0].content[1] must be a block with a type."),
    "text missing": (said([{"type": "text"}]), "messages[0].content[0].text", "messages[0].content[0].text must be a string."),
    "call nameless": (said([{"type": "tool_use", "id": "a"}], "assistant"), "messages[0].content[0].name", "messages[0].content[0].name must be a string."),
    "result without id": (said([{"type": "tool_result"}]), "messages[0].content[0].tool_use_id", "messages[0].content[0].tool_use_id must be a string."),
    "inside a result": (said([{"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": 1}]}]), "messages[0].content[0].content[0].text",
                        "messages[0].content[0].content[0].text must be a string."),
    "image sourceless": (said([{"type": "image"}]), "messages[0].content[0].source", "messages[0].content[0].source must be an object of type base64, text, url, file, content."),
    "image dataless": (said([{"type": "image", "source": {"type": "base64"}}]), "messages[0].content[0].source.data", "messages[0].content[0].source.data is missing."),
    "system number": (body_of(system=1), "system", "system must be a string or a list."),
    "system block": (body_of(system=[{"type": "text"}]), "system[0].text", "system[0].text must be a string."),
    "tool text": (body_of(tools=["Read"]), "tools[0]", "tools[0] must be an object."),
    "tool nameless": (body_of(tools=[{"input_schema": {}}]), "tools[0].name", "tools[0].name is missing."),
    "tool schema": (body_of(tools=[{"name": "a", "input_schema": []}]), "tools[0].input_schema", "tools[0].input_schema must be an object."),
    "thread": (body_of(thread={"type": "create"}), "thread", "thread: conversations are not kept here, send the whole history."),
}


@pytest.mark.parametrize("row", REFUSED)
def test_a_request_that_is_none_is_refused_by_its_first_wrong_field(row: str) -> None:
    body, param, message = REFUSED[row]
    for reader in (gateway.check_messages_request, gateway.messages_read_request):
        with pytest.raises(gateway.GatewayError) as refused:
            reader(body)
        assert (refused.value.status, refused.value.param, refused.value.message) == (400, param, message)


def test_a_thread_is_refused_in_the_words_that_make_the_sdk_go_on_without_one() -> None:
    with pytest.raises(gateway.GatewayError) as refused:
        gateway.check_messages_request(body_of(thread={"type": "continue", "previous_message_id": "msg_1"}))
    assert gateway.messages_error(refused.value) == {"type": "error", "error": {
        "type": "invalid_request_error", "message": "thread: conversations are not kept here, send the whole history.",
        "details": {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}}}
    assert gateway.check_messages_request(body_of(thread={"type": "create"}), threads=True)


CLAUDE_CODE = {
    "model": "claude-opus-5-5", "max_tokens": 32000, "stream": True,
    "system": [{"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.329.abc; cch=00000;"},
               {"type": "text", "text": "You are Claude Code.", "cache_control": {"type": "ephemeral"}}],
    "messages": [{"role": "user", "content": [{"type": "text", "text": "write a file", "cache_control": {"type": "ephemeral"}}]},
                 {"role": "system", "content": [{"type": "text", "text": "environment: linux"}]},
                 {"role": "assistant", "content": [{"type": "thinking", "thinking": "", "signature": "EqQBCkYI"},
                                                   {"type": "tool_use", "id": "toolu_01AbCdEfGhIj", "name": "Write", "input": {"file_path": "/a"}}]},
                 {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_01AbCdEfGhIj", "content": "done", "cache_control": {"type": "ephemeral"}}]},
                 {"role": "system", "content": "deferred tools: none"}],
    "tools": [{"name": "Write", "description": "d", "input_schema": {"$schema": "https://json-schema.org/draft/2020-12/schema", "type": "object",
                                                                      "properties": {"n": {"type": "integer", "exclusiveMinimum": 0}}}},
              {"name": "DeferredToolPlaceholder", "description": "d", "input_schema": {"type": "object"}, "defer_loading": True}],
    "metadata": {"user_id": '{"device_id":"d1","account_uuid":"a1","session_id":"s-1"}'},
    "thinking": {"type": "adaptive", "display": "omitted"}, "output_config": {"effort": "high"},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    "a_field_of_next_year": {"x": 1},
}


def test_what_claude_code_sends_is_accepted_and_read() -> None:
    hub = gateway.messages_read_request(gateway.check_messages_request(CLAUDE_CODE))
    assert [turn["role"] for turn in hub["turns"]] == ["user", "system", "assistant", "user", "system"]
    assert hub["think"] == {"mode": "auto", "effort": "high", "show": "omitted"}
    assert hub["meta"]["session"] == "s-1"
    assert hub["extra"]["messages"] == {"context_management": CLAUDE_CODE["context_management"], "a_field_of_next_year": {"x": 1}}


def test_what_claude_code_sends_reaches_anthropic_as_it_was() -> None:
    profile = gateway.profile_for("anthropic", "claude-opus-5-5", "messages")
    written = write(CLAUDE_CODE, profile)
    wanted = {**CLAUDE_CODE, "messages": [dict(message) for message in CLAUDE_CODE["messages"]]}
    wanted["messages"][1]["content"] = "environment: linux"
    wanted["tools"] = [CLAUDE_CODE["tools"][0], {**CLAUDE_CODE["tools"][1], "input_schema": {"type": "object", "properties": {}}}]
    assert written == wanted


# ---- Requests: fields

READ_FIELDS = {
    "max_tokens": ({"max_tokens": 7}, "max_out", 7),
    "max_tokens 0": ({"max_tokens": 0}, "max_out", 0),
    "max_tokens absent": ({"max_tokens": None}, "max_out", None),
    "system string": ({"system": "Be brief."}, "system", [text("Be brief.")]),
    "system blocks": ({"system": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}]}, "system", [{**text("a"), "cache": {"type": "ephemeral"}}]),
    "stream": ({"stream": True}, "stream", True),
    "sampling": ({"temperature": 0.2, "top_p": 1, "top_k": 5}, "sampling", {"temperature": 0.2, "top_p": 1, "top_k": 5}),
    "temperature 0": ({"temperature": 0}, "sampling", {"temperature": 0}),
    "stop": ({"stop_sequences": ["END", ""]}, "stop", ["END"]),
    "choice auto": ({"tool_choice": {"type": "auto"}}, "choice", {"mode": "auto"}),
    "choice any": ({"tool_choice": {"type": "any"}}, "choice", {"mode": "any"}),
    "m76 choice none": ({"tool_choice": {"type": "none"}}, "choice", {"mode": "none"}),
    "choice tool": ({"tool_choice": {"type": "tool", "name": "Read"}}, "choice", {"mode": "tool", "name": "Read"}),
    "choice unknown": ({"tool_choice": {"type": "maybe"}}, "choice", None),
    "m77 no parallel calls": ({"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}, "parallel", False),
    "parallel calls": ({"tool_choice": {"type": "auto", "disable_parallel_tool_use": False}}, "parallel", None),
    "thinking enabled": ({"thinking": {"type": "enabled", "budget_tokens": 4096}}, "think", {"mode": "on", "budget": 4096}),
    "thinking adaptive": ({"thinking": {"type": "adaptive"}}, "think", {"mode": "auto"}),
    "thinking disabled": ({"thinking": {"type": "disabled"}}, "think", {"mode": "off"}),
    "thinking shown": ({"thinking": {"type": "adaptive", "display": "summarized"}}, "think", {"mode": "auto", "show": "summarized"}),
    "m99 effort alone": ({"output_config": {"effort": "high"}}, "think", {"effort": "high"}),
    "m100 adaptive and effort": ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "max"}}, "think", {"mode": "auto", "effort": "max"}),
    "format": ({"output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}}}, "format", {"kind": "schema", "schema": {"type": "object"}}),
    "output_format": ({"output_format": {"type": "json_schema", "schema": {"type": "object"}}}, "format", {"kind": "schema", "schema": {"type": "object"}}),
    "user": ({"metadata": {"user_id": "u1"}}, "meta", {"user": "u1"}),
    "session": ({"metadata": {"user_id": "user_0a_account_1b_session_0123-4567"}}, "meta", {"user": "user_0a_account_1b_session_0123-4567", "session": "0123-4567"}),
    "cache_control": ({"cache_control": {"type": "ephemeral"}}, "meta", {"cache_auto": {"type": "ephemeral"}}),
    "service_tier": ({"service_tier": "standard_only"}, "meta", {"tier": "standard_only"}),
    "speed": ({"speed": "fast"}, "meta", {"speed": "fast"}),
    "task_budget": ({"output_config": {"task_budget": {"total": 5}}}, "extra", {"messages": {"output_config": {"task_budget": {"total": 5}}}}),
    "own fields": ({"container": "c1", "mcp_servers": [], "inference_geo": "eu", "betas": ["b"], "fallbacks": [1], "diagnostics": {}}, "extra",
                   {"messages": {"container": "c1", "mcp_servers": [], "inference_geo": "eu", "betas": ["b"], "fallbacks": [1], "diagnostics": {}}}),
}


@pytest.mark.parametrize("row", READ_FIELDS)
def test_a_field_is_read_into_the_hub(row: str) -> None:
    fields, name, value = READ_FIELDS[row]
    before = copy.deepcopy(fields)
    hub = read(**fields)
    assert hub.get(name) == value
    assert fields == before and hub["client"] == "messages" and hub["model"] == "claude-sonnet-5" and hub["dropped"] == []


PNG = {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}
OWN_SEAL = {"family": "anthropic", "model": "", "field": "signature", "data": "EqQBCkYI"}
CEREBRAS = {"family": "cerebras", "model": "qwen-3", "field": "reasoning_content"}
HIT = {"type": "web_search_result_location", "url": "https://a.example", "title": "A", "cited_text": "a", "encrypted_index": "Eo8B"}

READ_BLOCKS: dict[str, tuple[Json, Json]] = {
    "text": (text("a"), text("a")),
    "text marked": ({**text("a"), "cache_control": {"type": "ephemeral", "ttl": "1h"}}, {**text("a"), "cache": {"type": "ephemeral", "ttl": "1h"}}),
    "text cited": ({**text("a"), "citations": [HIT]}, {**text("a"), "cites": [{"url": "https://a.example", "title": "A", "raw": HIT, "family": "anthropic"}]}),
    "text cited by us": ({**text("a"), "citations": [{**HIT, "encrypted_index": ""}]}, {**text("a"), "cites": [{"url": "https://a.example", "title": "A"}]}),
    "text cites nothing": ({**text("a"), "citations": None}, text("a")),
    "image": ({"type": "image", "source": PNG}, {"type": "image", "data": "iVBORw0KGgo=", "mime": "image/png"}),
    "image with blanks": ({"type": "image", "source": {**PNG, "data": "iVBO\nRw0KGgo="}}, {"type": "image", "data": "iVBORw0KGgo=", "mime": "image/png"}),
    "image url": ({"type": "image", "source": {"type": "url", "url": "https://a.example/x.png"}}, {"type": "image", "url": "https://a.example/x.png"}),
    "image file": ({"type": "image", "source": {"type": "file", "file_id": "f1"}}, {"type": "image", "file_id": "f1"}),
    "pdf": ({"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "JVBERg=="}, "title": "T", "context": "C", "citations": {"enabled": True}},
            {"type": "file", "data": "JVBERg==", "mime": "application/pdf", "title": "T", "context": "C", "citations": {"enabled": True}}),
    "pdf url": ({"type": "document", "source": {"type": "url", "url": "https://a.example/x.pdf"}}, {"type": "file", "url": "https://a.example/x.pdf"}),
    "text document": ({"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "words"}}, {"type": "file", "text": "words", "mime": "text/plain"}),
    "result": ({"type": "tool_result", "tool_use_id": "t1", "content": "ok"}, {"type": "result", "id": "t1", "parts": [text("ok")], "kind": "function"}),
    "result of nothing": ({"type": "tool_result", "tool_use_id": "t1"}, {"type": "result", "id": "t1", "parts": [], "kind": "function"}),
    "result failed": ({"type": "tool_result", "tool_use_id": "t1", "is_error": True, "content": [text("no"), {"type": "image", "source": PNG}], "cache_control": {"type": "ephemeral"}},
                      {"type": "result", "id": "t1", "parts": [text("no"), {"type": "image", "data": "iVBORw0KGgo=", "mime": "image/png"}], "kind": "function", "error": True,
                       "cache": {"type": "ephemeral"}}),
    "call": ({"type": "tool_use", "id": "t1", "name": "Read", "input": {"b": 1, "a": "\u00e9"}},
             {"type": "call", "id": "t1", "name": "Read", "args": '{"b":1,"a":"\u00e9"}', "kind": "function"}),
    "call without input": ({"type": "tool_use", "id": "t1", "name": "now"}, {"type": "call", "id": "t1", "name": "now", "args": "", "kind": "function"}),
    "call of null": ({"type": "tool_use", "id": "t1", "name": "now", "input": None}, {"type": "call", "id": "t1", "name": "now", "args": "", "kind": "function"}),
    "thinking": ({"type": "thinking", "thinking": "Hm.", "signature": "EqQBCkYI"}, {"type": "think", "text": "Hm.", "seal": OWN_SEAL}),
    "m111 thinking omitted": ({"type": "thinking", "thinking": "", "signature": "EqQBCkYI"}, {"type": "think", "text": "", "seal": OWN_SEAL}),
    "thinking unsigned": ({"type": "thinking", "thinking": "Hm.", "signature": ""}, {"type": "think", "text": "Hm."}),
    "thinking from elsewhere": ({"type": "thinking", "thinking": "Hm.", "signature": gateway.seal_envelope(CEREBRAS)}, {"type": "think", "text": "Hm.", "seal": CEREBRAS}),
    "thinking hidden by us": ({"type": "thinking", "thinking": "", "signature": gateway.seal_envelope(CEREBRAS, "Hm.")}, {"type": "think", "text": "Hm.", "seal": CEREBRAS}),
    "thinking of OpenAI": ({"type": "thinking", "thinking": "Hm.", "signature": "gAAAAABo"}, {"type": "think", "text": "Hm.", "seal": {"family": "?", "model": "", "field": "?"}}),
    "redacted": ({"type": "redacted_thinking", "data": "EmwK"}, {"type": "think", "text": "", "hidden": True, "seal": {**OWN_SEAL, "field": "redacted", "data": "EmwK"}}),
}


@pytest.mark.parametrize("row", READ_BLOCKS)
def test_a_block_is_read_into_a_part(row: str) -> None:
    block, part = READ_BLOCKS[row]
    assert parts([block]) == [part]


OPAQUE: dict[str, tuple[Json, str]] = {
    "server_tool_use": ({"type": "server_tool_use", "id": "srv1", "name": "web_search", "input": {"query": "a"}}, ""),
    "web search": ({"type": "web_search_tool_result", "tool_use_id": "srv1", "content": [
        {"type": "web_search_result", "title": "A", "url": "https://a.example", "encrypted_content": "Eo8B", "page_age": None},
        {"type": "web_search_result", "title": "B", "url": "https://b.example", "encrypted_content": "Eo8C"}]}, "A https://a.example\nB https://b.example"),
    "web search failed": ({"type": "web_search_tool_result", "tool_use_id": "srv1", "content": {"type": "web_search_tool_result_error", "error_code": "max_uses_exceeded"}}, ""),
    "web fetch": ({"type": "web_fetch_tool_result", "tool_use_id": "srv1", "content": {"type": "web_fetch_result", "url": "https://a.example", "content": {
        "type": "document", "title": "A", "source": {"type": "text", "media_type": "text/plain", "data": "page"}}}}, "page"),
    "code": ({"type": "bash_code_execution_tool_result", "tool_use_id": "srv1", "content": {"type": "bash_code_execution_result", "stdout": "out", "stderr": "err", "return_code": 0,
                                                                                             "content": []}}, "out\nerr"),
    "tool search": ({"type": "tool_search_tool_result", "tool_use_id": "srv1", "content": {"type": "tool_search_tool_search_result", "tool_references": [
        {"type": "tool_reference", "tool_name": "a"}, {"type": "tool_reference", "tool_name": "b"}]}}, "Tool available: a\nTool available: b"),
    "tool reference": ({"type": "tool_reference", "tool_name": "a"}, "Tool available: a"),
    "compaction": ({"type": "compaction", "content": "so far"}, "<summary>\nso far\n</summary>"),
    "compaction failed": ({"type": "compaction", "content": None}, ""),
    "search result": ({"type": "search_result", "source": "https://a.example", "title": "A", "content": [text("a"), text("b")]},
                      '<search_result source="https://a.example" title="A">\na\nb\n</search_result>'),
    "document of blocks": ({"type": "document", "title": "T", "source": {"type": "content", "content": [text("a"), text("b")]}}, '<document title="T">\na\nb\n</document>'),
    "document of a string": ({"type": "document", "source": {"type": "content", "content": "a"}}, "<document>\na\n</document>"),
    "upload": ({"type": "container_upload", "file_id": "f1"}, ""),
    "mcp": ({"type": "mcp_tool_result", "tool_use_id": "m1", "is_error": False, "content": [text("found")]}, "found"),
    "unknown": ({"type": "hologram", "text": "?"}, ""),
}


@pytest.mark.parametrize("row", OPAQUE)
def test_a_block_of_anthropics_own_goes_back_to_it_and_is_readable_to_others(row: str) -> None:
    block, rendering = OPAQUE[row]
    part = parts([block])[0]
    assert part == {"type": "opaque", "family": "anthropic", "format": "messages", "data": block, **({"text": rendering} if rendering else {})}
    assert write(said([text("a"), block]))["messages"][0]["content"] == [text("a"), block]
    if rendering:
        assert write(said([text("a"), block]), COMPAT)["messages"][0]["content"] == [text("a"), text(rendering)]


TOOLS: dict[str, tuple[Json, Json]] = {
    "plain": ({"name": "a", "description": "d", "input_schema": {"type": "object"}}, {"name": "a", "kind": "function", "description": "d", "schema": {"type": "object"}}),
    "custom": ({"type": "custom", "name": "a"}, {"name": "a", "kind": "function"}),
    "strict": ({"name": "a", "strict": True}, {"name": "a", "kind": "function", "strict": True}),
    "marked": ({"name": "a", "cache_control": {"type": "ephemeral"}}, {"name": "a", "kind": "function", "cache": {"type": "ephemeral"}}),
    "m90 deferred": ({"name": "a", "defer_loading": True}, {"name": "a", "kind": "function", "defer": True}),
    "hosted": ({"type": "web_search_20250305", "name": "web_search", "max_uses": 3}, {"name": "web_search", "kind": "hosted", "family": "anthropic"}),
    "client-run": ({"type": "bash_20250124", "name": "bash"}, {"name": "bash", "kind": "hosted", "family": "anthropic"}),
    "toolset": ({"type": "mcp_toolset", "mcp_server_name": "docs"}, {"name": "docs", "kind": "hosted", "family": "anthropic"}),
}


@pytest.mark.parametrize("row", TOOLS)
def test_a_tool_is_read(row: str) -> None:
    tool, wanted = TOOLS[row]
    assert read(tools=[tool])["tools"] == [{**wanted, "raw": tool}]


def test_system_messages_stay_in_place_and_the_leading_ones_join_the_system_prompt() -> None:
    hub = read(system="one", messages=[{"role": "system", "content": "two"}, *HI, {"role": "system", "content": "three"}])
    assert hub["system"] == [text("one"), text("two")]
    assert hub["turns"] == [user(text("hi")), {"role": "system", "parts": [text("three")]}]


def test_a_system_prompt_is_text_alone() -> None:
    hub = read(system=[{"type": "image", "source": PNG}, text("Be brief.")])
    assert hub["system"] == [text("Be brief.")] and hub["dropped"] == ["system.image"]


def test_m106_system_messages_in_the_middle() -> None:
    body = body_of(messages=[*HI, {"role": "system", "content": "mind the gap"}, {"role": "assistant", "content": "ok"}, *HI])
    assert write(body)["messages"][1] == {"role": "system", "content": "mind the gap"}
    compat = write(body, COMPAT)["messages"]
    assert compat[0] == {"role": "user", "content": [text("hi"), text("<system-reminder>\nmind the gap\n</system-reminder>")]}


def test_tools_added_and_removed_in_the_middle_are_applied_where_no_such_turn_exists() -> None:
    late, new = {"name": "late", "input_schema": {"type": "object", "properties": {}}}, {"name": "new", "input_schema": {"type": "object", "properties": {}}}
    changes = [{"type": "tool_removal", "tool": {"type": "tool_reference", "name": "old"}}, {"type": "tool_addition", "tool": {"type": "tool_reference", "name": "late"}},
               {"type": "tool_addition", "tool": {"type": "tool_definition", "definition": new}}]
    body = body_of(tools=[{"name": "old", "input_schema": {"type": "object", "properties": {}}}, late], messages=[*HI, {"role": "system", "content": changes}, *HI])
    assert write(body)["messages"][1]["content"] == changes
    assert [tool["name"] for tool in write(body)["tools"]] == ["old", "late"]
    ready = gateway.prepare(gateway.messages_read_request(body), COMPAT)
    assert ready["dropped"] == ["mid_conv_tools"]
    assert gateway.messages_write_request(ready, COMPAT)["tools"] == [late, new]


@pytest.mark.parametrize("name", ["claude-opus-4-8", "claude-opus-4-8[1m]", "claude-opus-4-8[1M][1m]"])
def test_m112_the_suffix_of_a_long_context_is_no_part_of_the_name(name: str) -> None:
    assert gateway.plain_model(name) == "claude-opus-4-8"
    assert gateway.messages_write_request(gateway.prepare(read(model=name), gateway.Profile(format="messages")), gateway.Profile(format="messages"))["model"] == "claude-opus-4-8"


# ---- Requests: written to a provider

CALL = {"type": "call", "id": "call_1abcdef", "name": "Read", "args": '{"p":"a"}', "kind": "function"}
RESULT = {"type": "result", "id": "call_1abcdef", "parts": [text("none")], "kind": "function"}
READ_TOOL = {"name": "Read", "description": "d", "schema": {"type": "object", "properties": {"p": {"type": "string"}}}, "kind": "function"}
USE_BLOCK = {"type": "tool_use", "id": "call_1abcdef", "name": "Read", "input": {"p": "a"}}


def test_chat_history_becomes_blocks() -> None:
    """3.2 and 3.6: system blocks, text before calls, results first in the next user turn."""
    hub = hub_of(user(text("read a")), assistant(text("Reading."), CALL), user(RESULT), user(text("and be quick")), system=[text("Be brief.")], tools=[READ_TOOL], max_out=64, stream=True)
    assert send(hub) == {
        "model": "claude-sonnet-4-6", "max_tokens": 64, "system": "Be brief.",
        "messages": [{"role": "user", "content": "read a"}, {"role": "assistant", "content": [text("Reading."), USE_BLOCK]},
                     {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "call_1abcdef", "content": "none"}, text("and be quick")]}],
        "tools": [{"name": "Read", "description": "d", "input_schema": READ_TOOL["schema"]}], "stream": True, "cache_control": {"type": "ephemeral"}}


WRITTEN_FIELDS: dict[str, tuple[Json, str, Any]] = {
    "max_out": ({"max_out": 9}, "max_tokens", 9),
    "max_out absent": ({}, "max_tokens", 32000),
    "system": ({"system": [text("a"), {**text("b"), "cache": {"type": "ephemeral"}}]}, "system", [text("a"), {**text("b"), "cache_control": {"type": "ephemeral"}}]),
    "no system": ({"system": []}, "system", None),
    "stop": ({"stop": ["END", " \n"]}, "stop_sequences", ["END"]),
    "m103 temperature": ({"sampling": {"temperature": 1.7}}, "temperature", 1),
    "m104 temperature and top_p": ({"sampling": {"temperature": 0.5, "top_p": 0.9}}, "top_p", None),
    "top_k": ({"sampling": {"top_k": 4}}, "top_k", 4),
    "seed": ({"sampling": {"seed": 4}}, "seed", None),
    "penalties": ({"sampling": {"presence_penalty": 1}}, "presence_penalty", None),
    "thinking by budget": ({"think": {"mode": "on", "budget": 2000}, "max_out": 4000}, "thinking", {"type": "enabled", "budget_tokens": 2000}),
    "m101 budget too small": ({"think": {"mode": "on", "budget": 500}, "max_out": 4000}, "thinking", {"type": "enabled", "budget_tokens": 1024}),
    "budget over the limit": ({"think": {"mode": "on", "budget": 9000}, "max_out": 4000}, "thinking", {"type": "enabled", "budget_tokens": 3999}),
    "m101 no room for a budget": ({"think": {"mode": "on", "budget": 500}, "max_out": 1000}, "thinking", {"type": "disabled"}),
    "thinking by effort": ({"think": {"mode": "on", "effort": "high"}}, "thinking", {"type": "adaptive"}),
    "effort": ({"think": {"mode": "on", "effort": "high"}}, "output_config", {"effort": "high"}),
    "m99 effort alone": ({"think": {"effort": "low"}}, "thinking", None),
    "thinking off": ({"think": {"mode": "off"}}, "thinking", {"type": "disabled"}),
    "summaries": ({"think": {"mode": "on", "effort": "low", "show": "auto"}}, "thinking", {"type": "adaptive", "display": "summarized"}),
    "schema": ({"format": {"kind": "schema", "name": "x", "schema": {"type": "object", "properties": {}}}}, "output_config",
               {"format": {"type": "json_schema", "schema": {"type": "object", "properties": {}, "additionalProperties": False}}}),
    "json": ({"format": {"kind": "json"}}, "system", "Answer with a single JSON object and nothing else."),
    "user": ({"meta": {"user": "u1"}}, "metadata", {"user_id": "u1"}),
    "user by mail": ({"meta": {"user": "a@b.example"}}, "metadata", {"user_id": gateway.user_id("a@b.example")}),
    "tier default": ({"meta": {"tier": "default"}}, "service_tier", "standard_only"),
    "tier flex": ({"meta": {"tier": "flex"}}, "service_tier", None),
    "verbosity": ({"meta": {"verbosity": "low"}}, "verbosity", None),
    "no tools": ({"choice": {"mode": "any"}}, "tool_choice", None),
    "m75 no tools left": ({"choice": {"mode": "auto"}, "tools": [{"name": "x", "kind": "hosted", "family": "openai", "raw": {"type": "file_search"}}]}, "tool_choice", None),
    "choice auto": ({"tools": [READ_TOOL], "choice": {"mode": "auto"}}, "tool_choice", {"type": "auto"}),
    "choice any": ({"tools": [READ_TOOL], "choice": {"mode": "any"}}, "tool_choice", {"type": "any"}),
    "choice none": ({"tools": [READ_TOOL], "choice": {"mode": "none"}}, "tool_choice", {"type": "none"}),
    "choice tool": ({"tools": [READ_TOOL], "choice": {"mode": "tool", "name": "Read"}}, "tool_choice", {"type": "tool", "name": "Read"}),
    "not parallel": ({"tools": [READ_TOOL], "parallel": False}, "tool_choice", {"type": "auto", "disable_parallel_tool_use": True}),
    "any, not parallel": ({"tools": [READ_TOOL], "parallel": False, "choice": {"mode": "any"}}, "tool_choice", {"type": "any", "disable_parallel_tool_use": True}),
    "none, not parallel": ({"tools": [READ_TOOL], "parallel": False, "choice": {"mode": "none"}}, "tool_choice", {"type": "none"}),
    "allowed": ({"tools": [READ_TOOL, {**READ_TOOL, "name": "b"}], "choice": {"mode": "any", "allowed": ["b"]}}, "tools",
                [{"name": "b", "description": "d", "input_schema": READ_TOOL["schema"]}]),
    "m82 no schema": ({"tools": [{"name": "a", "kind": "function"}]}, "tools", [{"name": "a", "input_schema": {"type": "object", "properties": {}}}]),
    "strict": ({"tools": [{"name": "a", "kind": "function", "strict": True}]}, "tools", [{"name": "a", "input_schema": {"type": "object", "properties": {}}, "strict": True}]),
    "hosted elsewhere": ({"tools": [{"name": "web_search", "kind": "hosted", "family": "openai", "raw": {"type": "web_search"}}]}, "tools",
                         [{"type": "web_search_20250305", "name": "web_search"}]),
}


@pytest.mark.parametrize("row", WRITTEN_FIELDS)
def test_a_hub_field_is_written(row: str) -> None:
    fields, name, value = WRITTEN_FIELDS[row]
    assert send(hub_of(user(text("hi")), **fields)).get(name) == value


SIGNED = {"type": "think", "text": " Look. ", "seal": OWN_SEAL}

MENDED: dict[str, tuple[list[Json], list[Json]]] = {
    "m64 nothing said": ([user(text("a")), assistant(text("")), user(text("b"))], [{"role": "user", "content": [text("a"), text("b")]}]),
    "m65 blanks beside a call": ([user(text("a")), assistant(text(" \n"), CALL), user(RESULT)],
                                 [{"role": "user", "content": "a"}, {"role": "assistant", "content": [USE_BLOCK]},
                                  {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "call_1abcdef", "content": "none"}]}]),
    "m66 text before the result": ([user(text("a")), assistant(CALL), user(text("hurry"), RESULT)],
                                   [{"role": "user", "content": "a"}, {"role": "assistant", "content": [USE_BLOCK]},
                                    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "call_1abcdef", "content": "none"}, text("hurry")]}]),
    "m67 results over turns": ([user(text("a")), assistant(CALL, {**CALL, "id": "call_2abcdef"}), user(RESULT), user({**RESULT, "id": "call_2abcdef"})],
                               [{"role": "user", "content": "a"}, {"role": "assistant", "content": [USE_BLOCK, {**USE_BLOCK, "id": "call_2abcdef"}]},
                                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "call_1abcdef", "content": "none"},
                                                             {"type": "tool_result", "tool_use_id": "call_2abcdef", "content": "none"}]}]),
    "m68 words between call and result": ([user(text("a")), assistant(CALL), assistant(text("Searching.")), user(RESULT)],
                                          [{"role": "user", "content": "a"}, {"role": "assistant", "content": [text("Searching."), USE_BLOCK]},
                                           {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "call_1abcdef", "content": "none"}]}]),
    "m69 never answered": ([user(text("a")), assistant(CALL), user(text("go on"))],
                           [{"role": "user", "content": "a"}, {"role": "assistant", "content": [USE_BLOCK]},
                            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "call_1abcdef", "content": "No result was recorded for this tool call.", "is_error": True},
                                                         text("go on")]}]),
    "m70 m71 result without a call": ([user(RESULT, text("b"))], [{"role": "user", "content": [text("[tool result call_1abcdef]\nnone"), text("b")]}]),
    "m72 result without an id": ([user({**RESULT, "id": ""})], [{"role": "user", "content": "[tool result]\nnone"}]),
    "m73 images in results": ([user(text("a")), assistant(CALL), user({**RESULT, "parts": [text("see"), {"type": "image", "data": "iVBORw0KGgo=", "mime": "image/png"}]})],
                              [{"role": "user", "content": "a"}, {"role": "assistant", "content": [USE_BLOCK]},
                               {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "call_1abcdef", "content": [text("see"), {"type": "image", "source": PNG}]}]}]),
    "result of blanks": ([user(text("a")), assistant(CALL), user({**RESULT, "parts": [text(" ")]})],
                         [{"role": "user", "content": "a"}, {"role": "assistant", "content": [USE_BLOCK]}, {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "call_1abcdef"}]}]),
    "m74 image by address": ([user({"type": "image", "url": "https://a.example/x.png", "detail": "low"})],
                             [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "https://a.example/x.png"}}]}]),
    "image/jpg": ([user({"type": "image", "data": "/9j/", "mime": "image/jpg"})],
                  [{"role": "user", "content": [{"type": "image", "source": {"type": "base64", "media_type": "image/jpeg", "data": "/9j/"}}]}]),
    "pdf": ([user({"type": "file", "data": "JVBERg==", "mime": "application/pdf", "name": "a.pdf"})],
            [{"role": "user", "content": [{"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "JVBERg=="}, "title": "a.pdf"}]}]),
    "text file": ([user({"type": "file", "text": "words", "title": "T"})],
                  [{"role": "user", "content": [{"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "words"}, "title": "T"}]}]),
    "call without arguments": ([user(text("a")), assistant({**CALL, "args": ""}), user(RESULT)],
                               [{"role": "user", "content": "a"}, {"role": "assistant", "content": [{**USE_BLOCK, "input": {}}]},
                                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "call_1abcdef", "content": "none"}]}]),
    "call with a bare value": ([user(text("a")), assistant({**CALL, "args": "3"}), user(RESULT)],
                               [{"role": "user", "content": "a"}, {"role": "assistant", "content": [{**USE_BLOCK, "input": {"value": 3}}]},
                                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "call_1abcdef", "content": "none"}]}]),
    "call with broken arguments": ([user(text("a")), assistant({**CALL, "args": '{"p":'}), user(RESULT)],
                                   [{"role": "user", "content": "a"}, {"role": "assistant", "content": [{**USE_BLOCK, "input": {"_raw": '{"p":'}}]},
                                    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "call_1abcdef", "content": "none"}]}]),
    "id of another alphabet": ([user(text("a")), assistant({**CALL, "id": "functions.Read:0"}), user({**RESULT, "id": "functions.Read:0"})],
                               [{"role": "user", "content": "a"}, {"role": "assistant", "content": [{**USE_BLOCK, "id": gateway.fit_id("functions.Read:0", "anthropic")}]},
                                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": gateway.fit_id("functions.Read:0", "anthropic"), "content": "none"}]}]),
    "refusal": ([user(text("a")), assistant({"type": "refusal", "text": "No."}), user(text("b"))],
                [{"role": "user", "content": "a"}, {"role": "assistant", "content": "No."}, {"role": "user", "content": "b"}]),
    "m110 own thinking": ([user(text("a")), assistant(SIGNED, CALL), user(RESULT)],
                          [{"role": "user", "content": "a"}, {"role": "assistant", "content": [{"type": "thinking", "thinking": " Look. ", "signature": "EqQBCkYI"}, USE_BLOCK]},
                           {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "call_1abcdef", "content": "none"}]}]),
    "own redacted thinking": ([user(text("a")), assistant({"type": "think", "text": "", "seal": {**OWN_SEAL, "field": "redacted"}}, text("b")), user(text("c"))],
                              [{"role": "user", "content": "a"}, {"role": "assistant", "content": [{"type": "redacted_thinking", "data": "EqQBCkYI"}, text("b")]},
                               {"role": "user", "content": "c"}]),
    "m109 thinking signed elsewhere": ([user(text("a")), assistant({"type": "think", "text": "Look.", "seal": CEREBRAS}, text("b")), user(text("c"))],
                                       [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]),
    "begins with the assistant": ([assistant(text("a")), user(text("b"))],
                                  [{"role": "user", "content": "(conversation continues)"}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]),
}


@pytest.mark.parametrize("row", MENDED)
def test_turns_are_written_as_messages_wants_them(row: str) -> None:
    turns, messages = MENDED[row]
    before = copy.deepcopy(turns)
    assert send(hub_of(*turns, tools=[READ_TOOL]))["messages"] == messages
    assert turns == before


def test_m91_calls_in_the_history_without_tools_get_stubs() -> None:
    body = send(hub_of(user(text("a")), assistant(CALL), user(RESULT)))
    assert body["tools"] == [{"name": "Read", "input_schema": {"type": "object", "properties": {}}}] and body["tool_choice"] == {"type": "none"}


def test_interleaved_thinking_keeps_its_order() -> None:
    content = [{"type": "thinking", "thinking": "one", "signature": "EqQB"}, text("first"), {"type": "tool_use", "id": "toolu_one", "name": "a", "input": {}},
               {"type": "thinking", "thinking": "two", "signature": "EqQC"}, {"type": "tool_use", "id": "toolu_two", "name": "a", "input": {}}]
    results = [{"type": "tool_result", "tool_use_id": "toolu_one", "content": "x"}, {"type": "tool_result", "tool_use_id": "toolu_two", "content": "y"}]
    body = body_of(messages=[*HI, {"role": "assistant", "content": content}, {"role": "user", "content": results}], tools=[{"name": "a", "input_schema": {"type": "object", "properties": {}}}])
    assert write(body)["messages"] == body["messages"]


COMPAT_LOSES: dict[str, tuple[Json, str]] = {
    "m107 context_management": ({"context_management": {"edits": []}}, "context_management"),
    "output_config": ({"output_config": {"effort": "high", "task_budget": {"total": 5}}}, "output_config"),
    "mcp_servers": ({"mcp_servers": [{"name": "a"}]}, "mcp_servers"),
    "container": ({"container": "c1"}, "container"),
}


@pytest.mark.parametrize("row", COMPAT_LOSES)
def test_a_compatible_provider_is_spared_what_only_anthropic_knows(row: str) -> None:
    fields, name = COMPAT_LOSES[row]
    body, _ = gateway.without_rejected(write(body_of(**fields), COMPAT), COMPAT)
    assert name not in body


def test_a_compatible_provider_gets_plain_tools_and_no_billing_block() -> None:
    body = write(CLAUDE_CODE, COMPAT)
    assert body["tools"][1] == {"name": "DeferredToolPlaceholder", "description": "d", "input_schema": {"type": "object", "properties": {}}}
    assert "$schema" not in body["tools"][0]["input_schema"]
    assert body["system"] == [{"type": "text", "text": "You are Claude Code.", "cache_control": {"type": "ephemeral"}}]       # 105
    assert "metadata" not in body                                                                                          # 108
    assert "aic1" not in json.dumps(body) and "EqQBCkYI" not in json.dumps(body)


def test_an_envelope_reaches_no_provider() -> None:
    content = [{"type": "thinking", "thinking": "Use Read.", "signature": gateway.seal_envelope({**CEREBRAS, "data": "x"})}, text("Reading.")]
    body = body_of(messages=[*HI, {"role": "assistant", "content": content}, *HI])
    for profile in (CLAUDE, COMPAT):
        assert "aic1" not in json.dumps(write(body, profile))


def test_writing_twice_gives_the_same_bytes_and_leaves_the_hub_alone() -> None:
    hub = gateway.messages_read_request(CLAUDE_CODE)
    before = copy.deepcopy(hub)
    first, second = (json.dumps(gateway.messages_write_request(gateway.prepare(hub, CLAUDE), CLAUDE)) for _ in range(2))
    assert first == second and hub == before


# ---- Streams: read

def event(value: Any, name: str = "") -> Any:
    data = value if isinstance(value, str) else json.dumps(value)
    return gateway.Event(name, data, b"")


def read_events(*values: Any, profile: Any = CLAUDE, seed: str = "s") -> list[Json]:
    """The deltas of a stream with these events, whose end is the end of the connection."""
    reader = gateway.MessagesStreamReader(gateway.Source(profile, seed))
    deltas = [delta for value in values for delta in reader.feed(value if isinstance(value, gateway.Event) else event(value))]
    deltas += reader.close()
    assert check_deltas(deltas) == [] and reader.done and reader.close() == []
    return without_found(deltas)


def start(**usage: Any) -> Json:
    return {"type": "message_start", "message": {"id": "msg_9", "type": "message", "role": "assistant", "model": "claude-x", "content": [], "stop_reason": None,
                                                 "usage": usage or {"input_tokens": 12, "output_tokens": 1}}}


def opens(index: int, **block: Any) -> Json:
    return {"type": "content_block_start", "index": index, "content_block": block}


def more(index: int, kind: str, words: str) -> Json:
    field_name = {"text": "text", "thinking": "thinking", "signature": "signature", "input_json": "partial_json"}[kind]
    return {"type": "content_block_delta", "index": index, "delta": {"type": f"{kind}_delta", field_name: words}}


def stops(index: int) -> Json:
    return {"type": "content_block_stop", "index": index}


def ends(reason: str | None, **more_fields: Any) -> Json:
    return {"type": "message_delta", "delta": {"stop_reason": reason, "stop_sequence": None}, "usage": {"output_tokens": 7}, **more_fields}


STOP = {"type": "message_stop"}
TEXT = [opens(0, type="text", text=""), more(0, "text", "Hel"), more(0, "text", "lo"), stops(0)]


def without_frame(deltas: list[Json]) -> list[Json]:
    """The deltas between start and usage."""
    return [delta for delta in deltas if delta["delta"] not in ("start", "usage", "stop", "error")]


def test_a_text_stream_is_read() -> None:
    assert read_events(start(), *TEXT, ends("end_turn"), STOP) == [
        {"delta": "start", "id": "msg_9", "model": "claude-x", "usage": {"input": 12, "output": 1}}, {"delta": "text", "text": "Hel"}, {"delta": "text", "text": "lo"},
        {"delta": "usage", "input": 12, "output": 7}, {"delta": "stop", "reason": "end"}]


def call(call_id: str, name: str, *args: str) -> list[Json]:
    return [{"delta": "call", "id": call_id, "name": name, "kind": "function"}, *({"delta": "args", "text": words} for words in args)]


def seal(**more_fields: Any) -> Json:
    return {"delta": "seal", "family": "anthropic", "model": "claude-sonnet-4-6", "field": "signature", **more_fields}


SAY = [{"delta": "text", "text": "Hel"}, {"delta": "text", "text": "lo"}]
USE = opens(0, type="tool_use", id="toolu_one", name="a", input={})
SEARCH = {"type": "server_tool_use", "id": "srv_1", "name": "web_search", "input": {}}

STREAMS: dict[str, tuple[list[Any], list[Json]]] = {
    "text in its start": ([opens(0, type="text", text="Hel"), more(0, "text", "lo"), stops(0)], SAY),
    "empty text": ([opens(0, type="text", text=""), stops(0), opens(1, type="text", text=""), more(1, "text", "Hel"), more(1, "text", ""), more(1, "text", "lo"), stops(1)], SAY),
    "ping and the unknown": ([{"type": "ping"}, {"type": "aurora", "x": 1}, *TEXT, event(": x", "ping")][:-1], SAY),
    "by event line alone": ([event({"index": 0, "content_block": {"type": "text", "text": ""}}, "content_block_start"),
                             event({"index": 0, "delta": {"type": "text_delta", "text": "Hel"}}, "content_block_delta"), more(0, "text", "lo")], SAY),
    "block never started": ([more(0, "text", "Hel"), more(0, "text", "lo"), stops(0)], SAY),
    "block never stopped": ([opens(0, type="text", text=""), more(0, "text", "Hel"), more(0, "text", "lo")], SAY),
    "signed thinking": ([opens(0, type="thinking", thinking="", signature=""), more(0, "thinking", "Hm."), more(0, "signature", "EqQB"), stops(0), opens(1, type="text", text="a")],
                        [{"delta": "think", "text": "Hm."}, seal(data="EqQB"), {"delta": "text", "text": "a"}]),
    "thinking whole in its start": ([opens(0, type="thinking", thinking="Hm.", signature="EqQB"), stops(0)], [{"delta": "think", "text": "Hm."}, seal(data="EqQB")]),
    "thinking omitted": ([opens(0, type="thinking", thinking="", signature=""), more(0, "signature", "EqQB"), stops(0)], [seal(data="EqQB")]),
    "thinking unsigned": ([opens(0, type="thinking", thinking=""), more(0, "thinking", "Hm."), stops(0), *TEXT], [{"delta": "think", "text": "Hm."}, seal(), *SAY]),
    "thinking unsigned, then signed": ([opens(0, type="thinking", thinking="one"), stops(0), opens(1, type="thinking", thinking="two", signature="EqQB"), stops(1)],
                                       [{"delta": "think", "text": "one"}, seal(), {"delta": "think", "text": "two"}, seal(data="EqQB")]),
    "thinking of nothing": ([opens(0, type="thinking", thinking="", signature=""), stops(0), *TEXT], SAY),
    "redacted thinking": ([opens(0, type="redacted_thinking", data="EmwK"), stops(0)], [seal(field="redacted", data="EmwK")]),
    "call": ([USE, more(0, "input_json", ""), more(0, "input_json", '{"p":'), more(0, "input_json", "1}"), stops(0)], call("toolu_one", "a", '{"p":', "1}")),
    "m21 call without arguments": ([USE, more(0, "input_json", ""), stops(0)], call("toolu_one", "a")),
    "call whole in its start": ([opens(0, type="tool_use", id="toolu_one", name="a", input={"p": 1}), stops(0)], call("toolu_one", "a", '{"p":1}')),
    "call in its start and in deltas": ([opens(0, type="tool_use", id="toolu_one", name="a", input={"p": 1}), more(0, "input_json", '{"p":2}'), stops(0)], call("toolu_one", "a", '{"p":2}')),
    "m24 one index for all": ([*TEXT, USE, more(0, "input_json", "{}"), stops(0), opens(0, type="tool_use", id="toolu_two", name="b", input={}), stops(0)],
                              [*SAY, *call("toolu_one", "a", "{}"), *call("toolu_two", "b")]),
    "one index and no stops": ([opens(0, type="text", text="Hel"), opens(0, type="text", text="lo"), USE, opens(0, type="tool_use", id="toolu_two", name="b", input={})],
                               [*SAY, *call("toolu_one", "a"), *call("toolu_two", "b")]),
    "m18 two blocks at once": ([USE, opens(1, type="tool_use", id="toolu_two", name="b", input={}), more(1, "input_json", '{"b"'), more(0, "input_json", '{"a":1}'),
                                more(1, "input_json", ":2}"), stops(1), stops(0)], [*call("toolu_one", "a", '{"a":1}'), *call("toolu_two", "b", '{"b"', ":2}")]),
    "text within a call": ([USE, opens(1, type="text", text=""), more(1, "text", "Hel"), more(0, "input_json", "{}"), more(1, "text", "lo"), stops(0), stops(1)],
                           [*call("toolu_one", "a", "{}"), *SAY]),
    "server tool": ([opens(0, **SEARCH), more(0, "input_json", '{"query":'), more(0, "input_json", '"a"}'), stops(0)],
                    [{"delta": "opaque", "family": "anthropic", "data": {**SEARCH, "input": {"query": "a"}}}]),
    "compaction": ([opens(0, type="compaction", content=None), {"type": "content_block_delta", "index": 0, "delta": {"type": "compaction_delta", "content": "so "}},
                    {"type": "content_block_delta", "index": 0, "delta": {"type": "compaction_delta", "content": "far", "encrypted_content": "E"}}, stops(0)],
                   [{"delta": "opaque", "family": "anthropic", "data": {"type": "compaction", "content": "so far", "encrypted_content": "E"}}]),
    "citation": ([opens(0, type="text", text="", citations=[]), {"type": "content_block_delta", "index": 0, "delta": {"type": "citations_delta", "citation": HIT}}, more(0, "text", "Hel"),
                  more(0, "text", "lo"), stops(0)],
                 [*SAY, {"delta": "cite", "url": "https://a.example", "title": "A", "raw": HIT, "family": "anthropic", "start": 0, "end": 5}]),
    "two starts": ([start(input_tokens=99, output_tokens=9), *TEXT], SAY),
}


@pytest.mark.parametrize("row", STREAMS)
def test_a_stream_is_read(row: str) -> None:
    events, deltas = STREAMS[row]
    assert without_frame(read_events(start(), *events, ends("end_turn"), STOP)) == deltas


def stop_of(*events: Any, profile: Any = CLAUDE) -> Json:
    return {name: value for name, value in read_events(*events, profile=profile)[-1].items() if name != "delta"}


CUT = {"status": 502, "type": "server_error", "code": "server_error", "message": "upstream closed the stream before finishing"}

ENDS: dict[str, tuple[list[Any], Json]] = {
    "end_turn": ([start(), *TEXT, ends("end_turn"), STOP], {"reason": "end"}),
    "max_tokens": ([start(), *TEXT, ends("max_tokens"), STOP], {"reason": "length"}),
    "tool_use": ([start(), USE, stops(0), ends("tool_use"), STOP], {"reason": "tool"}),
    "pause_turn": ([start(), *TEXT, ends("pause_turn"), STOP], {"reason": "pause"}),
    "compaction": ([start(), *TEXT, ends("compaction"), STOP], {"reason": "pause"}),
    "window": ([start(), *TEXT, ends("model_context_window_exceeded"), STOP], {"reason": "context"}),
    "unknown word": ([start(), *TEXT, ends("bored"), STOP], {"reason": "end"}),
    "sequence": ([start(), *TEXT, {"type": "message_delta", "delta": {"stop_reason": "stop_sequence", "stop_sequence": "END"}}, STOP], {"reason": "sequence", "sequence": "END"}),
    "refusal": ([start(), {"type": "message_delta", "delta": {"stop_reason": "refusal", "stop_details": {"type": "refusal", "category": "cyber"}}}, STOP],
                {"reason": "refusal", "details": {"type": "refusal", "category": "cyber"}}),
    "m9 end_turn after a call": ([start(), *TEXT, opens(1, type="tool_use", id="t", name="a", input={}), stops(1), ends("end_turn"), STOP], {"reason": "tool"}),
    "tool_use without a call": ([start(), *TEXT, ends("tool_use"), STOP], {"reason": "end"}),
    "reason null": ([start(), *TEXT, ends(None), STOP], {"reason": "end"}),
    "reason null after a call": ([start(), USE, stops(0), ends(None), STOP], {"reason": "tool"}),
    "no message_stop": ([start(), *TEXT, ends("end_turn")], {"reason": "end"}),
    "[DONE]": ([start(), *TEXT, event(" [DONE] ")], {"reason": "end"}),
    "nothing but a reason": ([start(), ends("end_turn"), STOP], {"reason": "end"}),
    "events behind the end": ([start(), *TEXT, ends("end_turn"), STOP, more(0, "text", "x"), {"type": "error", "error": {"message": "late"}}], {"reason": "end"}),
    "error behind the reason": ([start(), *TEXT, ends("max_tokens"), {"type": "error", "error": {"message": "late"}}], {"reason": "length"}),
    "m30 cut": ([start(), *TEXT], CUT),
    "cut in a call": ([start(), USE, more(0, "input_json", '{"p":')], CUT),
    "m32 nothing at all": ([], CUT),
    "only a start": ([start(), STOP], {"status": 502, "type": "server_error", "code": "empty_answer", "message": "empty answer"}),
    "m13 overloaded": ([start(), *TEXT, {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}],
                       {"status": 503, "type": "server_error", "code": "server_is_overloaded", "message": "Overloaded"}),
    "rate limit": ([{"type": "error", "error": {"type": "rate_limit_error", "message": "slow"}}],
                   {"status": 429, "type": "rate_limit_error", "code": "rate_limit_exceeded", "message": "slow"}),
    "error by its line": ([event({"message": "broken"}, "error")], {"status": 502, "type": "server_error", "code": "server_error", "message": "broken"}),
    "error in words": ([event("broken", "error")], {"status": 502, "type": "server_error", "code": "server_error", "message": "broken"}),
    "m29 error of another format": ([{"error": {"message": "broken", "code": 500}}], {"status": 500, "type": "server_error", "code": "server_error", "message": "broken"}),
    "not JSON": ([start(), event("<html>busy</html>")], {**CUT, "message": "provider sent something that is not JSON"}),
}


@pytest.mark.parametrize("row", ENDS)
def test_how_a_stream_ends(row: str) -> None:
    events, wanted = ENDS[row]
    assert stop_of(*events) == wanted


USAGES: dict[str, tuple[list[Any], Json]] = {
    "start and delta": ([start(input_tokens=12, cache_read_input_tokens=100, cache_creation_input_tokens=8, output_tokens=1), ends("end_turn")],
                        {"input": 120, "cached": 100, "cache_write": 8, "output": 7}),
    "delta tells all anew": ([start(input_tokens=100, cache_read_input_tokens=55096, output_tokens=1),
                              ends("end_turn", usage={"input_tokens": 181, "cache_read_input_tokens": 0, "cache_creation_input_tokens": None, "output_tokens": 8})],
                             {"input": 181, "cached": 0, "output": 8}),
    "delta tells the input": ([start(input_tokens=0, output_tokens=0), ends("end_turn", usage={"input_tokens": 30, "output_tokens": 7})], {"input": 30, "output": 7}),
    "no input ever": ([start(input_tokens=0, output_tokens=0), ends("end_turn")], {"output": 7}),
    "thinking": ([start(), ends("end_turn", usage={"output_tokens": 40, "output_tokens_details": {"thinking_tokens": 9}})], {"input": 12, "output": 40, "reasoning": 9}),
    "no usage": ([{"type": "message_start", "message": {"id": "m"}}, ends("end_turn", usage=None)], {}),
}


@pytest.mark.parametrize("row", USAGES)
def test_usage_is_cumulative_and_partial(row: str) -> None:
    events, counts = USAGES[row]
    told = [delta for delta in read_events(*events[:1], *TEXT, *events[1:], STOP) if delta["delta"] == "usage"]
    assert [{name: count for name, count in delta.items() if name != "delta"} for delta in told] == ([counts] if counts else [])


def test_E14_thinking_text_a_call_and_one_without_arguments() -> None:
    profile = gateway.profile_for("anthropic", "claude-opus-5", "messages")
    lines = [json.loads(line[6:]) for line in EXAMPLES["E14 in"]]
    deltas = read_events(*lines, profile=profile)
    assert deltas == [
        {"delta": "start", "id": "msg_9", "model": "claude-opus-5", "usage": {"input": 120, "cached": 100, "cache_write": 8, "output": 1}},
        {"delta": "think", "text": "Need file."}, {"delta": "seal", "family": "anthropic", "model": "claude-opus-5", "field": "signature", "data": "EqQBCkYI"},
        {"delta": "text", "text": "Reading."}, *call("toolu_01Ab", "Read", '{"file_path":', '"/a"}'), *call("toolu_02Cd", "now"),
        {"delta": "usage", "input": 120, "cached": 100, "cache_write": 8, "output": 40, "reasoning": 9}, {"delta": "stop", "reason": "tool"}]
    [record] = [delta for delta in deltas if delta["delta"] == "seal"]
    assert gateway.seal_envelope({name: value for name, value in record.items() if name != "delta"}) == (
        "aic1.eyJvIjoiYW50aHJvcGljIiwibSI6ImNsYXVkZS1vcHVzLTUiLCJmIjoic2lnbmF0dXJlIiwiZCI6IkVxUUJDa1lJIn0")


def test_m110_signed_thinking_keeps_every_blank() -> None:
    """The signature covers the text, also where a stream begins it with nothing but a line end."""
    deltas = read_events(start(), opens(0, type="thinking", thinking="", signature=""), more(0, "thinking", "\n"), more(0, "thinking", " Look. "), more(0, "signature", "EqQB"), stops(0),
                         ends("end_turn"), STOP)
    assert "".join(delta["text"] for delta in deltas if delta["delta"] == "think") == "\n Look. "


def test_E16_an_error_after_text() -> None:
    deltas = read_events(start(), opens(0, type="text", text=""), more(0, "text", "Hel"), {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}})
    assert deltas[1:] == [{"delta": "text", "text": "Hel"}, gateway.error_delta(503, "Overloaded", "server_is_overloaded")]


def test_m15_arguments_go_on_as_they_come() -> None:
    reader = gateway.MessagesStreamReader(gateway.Source(CLAUDE))
    for value in (start(), USE):
        reader.feed(event(value))
    assert [reader.feed(event(more(0, "input_json", words))) for words in ('{"p":', '"a', '"}')] == [[{"delta": "args", "text": words}] for words in ('{"p":', '"a', '"}')]


def test_names_and_ids_are_the_clients() -> None:
    """Names go back through the request's map; missing ids are minted, counting ones made unique."""
    hub = hub_of(user(text("a")), tools=[{"name": "search", "namespace": "docs", "kind": "function"}])
    source = gateway.Source(CLAUDE, "s", "toolu_", gateway.name_map(hub, CLAUDE))
    reader = gateway.MessagesStreamReader(source)
    deltas = [delta for value in (start(), opens(0, type="tool_use", id="", name="docs__search", input={}), stops(0), opens(1, type="tool_use", id="a:0", name="b", input={}), stops(1),
                                  ends("tool_use"), STOP) for delta in reader.feed(event(value))] + reader.close()
    first, second = (delta for delta in deltas if delta["delta"] == "call")
    assert (first["name"], first["namespace"], first["id"][:6], len(first["id"])) == ("search", "docs", "toolu_", 30)
    assert second["id"].startswith("a:0_u") and len(second["id"]) == 13


BROKEN_EVENTS = [
    {"type": ["message_start"]}, {"type": "message_start"}, {"type": "message_start", "message": 3}, {"type": "content_block_start"}, {"type": "content_block_start", "index": [1], "content_block": []},
    {"type": "content_block_start", "index": 5, "content_block": {"type": ["x"]}}, {"type": "content_block_start", "index": 6, "content_block": {"type": "text", "text": 3, "citations": True}},
    {"type": "content_block_delta"}, {"type": "content_block_delta", "delta": 3}, {"type": "content_block_delta", "index": 5, "delta": {"type": ["x"]}},
    {"type": "content_block_delta", "index": 6, "delta": {"type": "text_delta"}}, {"type": "content_block_delta", "index": 6, "delta": {"type": "citations_delta", "citation": "x"}},
    {"type": "content_block_delta", "index": 9, "delta": {"type": "input_json_delta", "partial_json": "{}"}}, {"type": "content_block_stop"}, {"type": "content_block_stop", "index": 77},
    {"type": "message_delta"}, {"type": "message_delta", "delta": [], "usage": "x"}, {"type": "message_delta", "delta": {"stop_reason": 3, "stop_details": "x"}, "usage": {"input_tokens": "x"}},
]


@pytest.mark.parametrize("index", range(len(BROKEN_EVENTS)))
def test_a_broken_event_breaks_nothing(index: int) -> None:
    deltas = read_events(start(), BROKEN_EVENTS[index], opens(0, type="text", text="ok"), stops(0), ends("end_turn"), STOP)
    assert {"delta": "text", "text": "ok"} in deltas and deltas[-1] == {"delta": "stop", "reason": "end"}
    passage = gateway.MessagesPassage()
    passage.feed(b"".join(gateway.write_event(value, "x") for value in (start(), BROKEN_EVENTS[index], *TEXT, ends("end_turn"), STOP)))
    assert passage.done and not passage.broken and passage.error is None


# ---- Whole answers: read

ANSWER = {"id": "msg_1", "type": "message", "role": "assistant", "model": "claude-x", "stop_reason": "tool_use", "stop_sequence": None,
          "content": [{"type": "thinking", "thinking": "Hm.", "signature": "EqQB"}, {"type": "redacted_thinking", "data": "EmwK"}, {"type": "text", "text": "Hello", "citations": [HIT]},
                      {**SEARCH, "input": {"query": "a"}}, {"type": "tool_use", "id": "toolu_one", "name": "a", "input": {"p": 1}}, {"type": "tool_use", "id": "toolu_two", "name": "b", "input": {}}],
          "usage": {"input_tokens": 12, "cache_creation_input_tokens": 8, "cache_read_input_tokens": 100, "output_tokens": 40}}


def test_a_whole_answer_is_a_stream_of_one() -> None:
    deltas = gateway.messages_read_answer(ANSWER, gateway.Source(CLAUDE))
    assert check_deltas(deltas) == []
    assert without_frame(deltas) == [
        {"delta": "think", "text": "Hm."}, seal(data="EqQB"), seal(field="redacted", data="EmwK"), {"delta": "text", "text": "Hello"},
        {"delta": "cite", "url": "https://a.example", "title": "A", "raw": HIT, "family": "anthropic", "start": 0, "end": 5},
        {"delta": "opaque", "family": "anthropic", "data": {**SEARCH, "input": {"query": "a"}}}, *call("toolu_one", "a", '{"p":1}'), *call("toolu_two", "b")]
    assert deltas[-2:] == [{"delta": "usage", "input": 120, "cached": 100, "cache_write": 8, "output": 40}, {"delta": "stop", "reason": "tool"}]


def test_a_whole_answer_survives_both_ways() -> None:
    written = gateway.messages_write_answer(gateway.messages_read_answer(ANSWER, gateway.Source(CLAUDE)), ASKED)
    assert written == {**ANSWER, "id": MESSAGE_ID, "model": "claude-sonnet-5"}


WRONG_ANSWERS: dict[str, tuple[Any, Json]] = {
    "error": ({"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}, gateway.error_delta(503, "Overloaded", "server_is_overloaded")),
    "error of another format": ({"error": {"message": "gone", "code": 404}}, gateway.error_delta(404, "gone", "model_not_found", "invalid_request_error")),
    "no content": ({"type": "message"}, gateway.error_delta(502, "empty answer", "empty_answer")),
    "no object": ([], gateway.error_delta(502, "empty answer", "empty_answer")),
    "content of nothing": ({"content": []}, gateway.error_delta(502, "empty answer", "empty_answer")),
}


@pytest.mark.parametrize("row", WRONG_ANSWERS)
def test_an_answer_that_is_none_is_an_error(row: str) -> None:
    body, error = WRONG_ANSWERS[row]
    deltas = gateway.messages_read_answer(body, gateway.Source(CLAUDE))
    assert without_found(deltas)[-1] == error and without_frame(deltas) == []


@pytest.mark.parametrize("reason, hub_reason", [("refusal", "refusal"), ("max_tokens", "length"), ("end_turn", "end")])
def test_an_answer_of_nothing_with_a_reason_is_one(reason: str, hub_reason: str) -> None:
    assert gateway.messages_read_answer({**ANSWER, "content": [], "stop_reason": reason}, gateway.Source(CLAUDE))[-1] == {"delta": "stop", "reason": hub_reason}


# ---- Streams: written

def examples() -> dict[str, list[str]]:
    """The worked examples by name, «start» filled in."""
    found: dict[str, list[str]] = {}
    for chunk in (HERE / "data" / "messages" / "examples.txt").read_text(encoding="utf-8").split("## ")[1:]:
        name, *lines = chunk.strip().splitlines()
        found[name] = [found["E1"][0] if line == "\u00abstart\u00bb" else line.replace('"msg_01"', f'"{MESSAGE_ID}"') for line in lines]
    return found


EXAMPLES = examples()
COUNTED = {"delta": "usage", "input": 120, "cached": 100, "output": 18}
GUESSED = {"delta": "usage", "input": 25, "output": 9, "estimated": True}
BEGIN = {"delta": "start", "id": "c1", "model": "m", "usage": {"input": 25}}


def end(reason: str) -> Json:
    return {"delta": "stop", "reason": reason}


WRITTEN: dict[str, list[Json]] = {
    "E1": [*SAY, COUNTED, end("end")],
    "E2": [{"delta": "text", "text": "Let me look."}, *call("call_a1B2c3D4e5F6", "Read", '{"file_path":', '"/a.txt"}'), COUNTED, end("tool")],
    "E3": [*call("call_AAAAAAAAAAAA", "f", '{"a"', ":1}"), *call("call_BBBBBBBBBBBB", "g", '{"b":2}'), GUESSED, end("tool")],
    "E4": [*call("call_CCCCCCCCCCCC", "now"), GUESSED, end("tool")],
    "E5": [*call("call_DDDDDDDDDDDD", "w", '{"p":1}'), *call("call_EEEEEEEEEEEE", "w", '{"p":2}'), GUESSED, end("tool")],
    "E6": [{"delta": "think", "text": "Need the "}, {"delta": "think", "text": "file."}, {"delta": "seal", **CEREBRAS}, {"delta": "text", "text": "Reading."},
           *call("call_FFFFFFFFFFFF", "Read", "{}"), COUNTED, end("tool")],
    "E7": [{"delta": "think", "text": "Look."}, {"delta": "seal", "family": "openrouter", "model": "anthropic/claude-haiku-4.5", "field": "reasoning_details", "data": [
        {"type": "reasoning.text", "signature": "EqQBCkYI", "format": "anthropic-claude-v1", "index": 0}]}, {"delta": "text", "text": "Ok."}, COUNTED, end("end")],
    "E8": [{"delta": "think", "text": "plan it"}, {"delta": "seal", **CEREBRAS}, {"delta": "text", "text": "Answer"}, {"delta": "text", "text": " 4."}, COUNTED, end("end")],
    "E10": [{"delta": "text", "text": "Hel"}, gateway.error_delta(502, "Provider disconnected", "server_error")],
    "E11": [{"delta": "text", "text": "Hel"}, gateway.error_delta(502, "upstream closed the stream before finishing", "server_error")],
    "E12": [{"delta": "text", "text": "Hi"}, GUESSED, end("end")],
    # the example leaves out the thinking tokens that 4.1 wants beside output_tokens, so they are left out here too
    "E15": [{"delta": "think", "text": "**Look**"}, {"delta": "seal", "family": "openai", "model": "gpt-5.5", "field": "encrypted", "data": "gAAAAABo"},
            *call("call_x1y2z3w4v5u6", "Read", '{"file_path":"/a"}'), {"delta": "usage", "input": 120, "cached": 100, "output": 30}, end("tool")],
}


def write_stream(deltas: list[Json], asked: Any = ASKED) -> bytes:
    writer = gateway.MessagesStreamWriter(asked)
    return b"".join(frame for delta in deltas for frame in writer.feed(delta)) + b"".join(writer.close())


def frames_of(stream: bytes) -> list[Json]:
    """The events of our own stream, by our own parser, each under the event line that SDKs dispatch on."""
    reader = gateway.EventReader()
    events = reader.feed(stream)
    assert reader.close() == [] and all(json.loads(item.data)["type"] == item.name for item in events)
    return [json.loads(item.data) for item in events]


@pytest.mark.parametrize("name", WRITTEN)
def test_a_worked_example_comes_out_byte_for_byte(name: str) -> None:
    wanted = "".join(f"event: {json.loads(line[6:])['type']}\n{line}\n\n" for line in EXAMPLES[name])
    assert write_stream([BEGIN, *WRITTEN[name]]).decode() == wanted


def test_m14_every_event_stands_under_its_name() -> None:
    lines = write_stream([BEGIN, SAY[0], *call("t", "a", "{}"), end("tool")]).decode().split("\n\n")[:-1]
    assert len(lines) == 9 and all(re.fullmatch(r'event: (\w+)\ndata: \{"type": ?"\1".*\}', line) for line in lines), lines


def test_E18_a_refusal_is_text_with_its_own_stop() -> None:
    stream = frames_of(write_stream([BEGIN, {"delta": "refuse", "text": "I can't help with that."}, {"delta": "usage", "input": 9, "output": 7}, end("refusal")]))
    assert stream[2]["delta"] == {"type": "text_delta", "text": "I can't help with that."}
    assert stream[-2] == {"type": "message_delta", "delta": {"stop_reason": "refusal", "stop_sequence": None},
                          "usage": {"input_tokens": 9, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0, "output_tokens": 7}}


@pytest.mark.parametrize("words", ["", "plain", 'quote " back \\ slash', "\u00e9\u4e2d\U0001f600", "\ud800 alone", "\u2028\x00\x1f\n\r\t"])
@pytest.mark.parametrize("kind, delta_type, field_name", [("text", "text_delta", "text"), ("think", "thinking_delta", "thinking"), ("args", "input_json_delta", "partial_json")])
def test_the_quick_way_gives_the_bytes_of_the_slow_one(kind: str, delta_type: str, field_name: str, words: str) -> None:
    writer = gateway.MessagesStreamWriter(ASKED)
    first: Json = {"delta": "call", "id": "t", "name": "a", "kind": "function"} if kind == "args" else {"delta": kind, "text": "x"}
    writer.feed(first)
    assert writer.feed({"delta": kind, "text": words}) == [
        gateway.write_event({"type": "content_block_delta", "index": 0, "delta": {"type": delta_type, field_name: words}}, "content_block_delta")]


def blocks_of(stream: bytes) -> list[Json]:
    return [frame["content_block"] for frame in frames_of(stream) if frame["type"] == "content_block_start"]


#: Which types of frames a few deltas give, each block by its start, its deltas and its stop.
SHAPES: dict[str, tuple[list[Json], str]] = {
    "m1 m23 thinking, then a call": ([{"delta": "think", "text": "a"}, {"delta": "seal", **CEREBRAS}, *call("t", "a", "{}"), end("tool")],
                                     "start 0:thinking thinking_delta signature_delta stop 1:tool_use input_json_delta stop delta end"),
    "m5 citation without text": ([{"delta": "cite", "url": "u", "title": "t"}, end("end")], "start delta end"),
    "m6 text and a call": ([*SAY, *call("t", "a", "{}"), end("tool")], "start 0:text text_delta text_delta stop 1:tool_use input_json_delta stop delta end"),
    "m3 content without a start": (SAY[:1] + [end("end")], "start 0:text text_delta stop delta end"),
    "nothing": ([BEGIN, end("end")], "start delta end"),
    "text again": ([SAY[0], *call("t", "a"), SAY[1], end("tool")], "start 0:text text_delta stop 1:tool_use input_json_delta stop 2:text text_delta stop delta end"),
    "seal alone": ([{"delta": "seal", **CEREBRAS}, end("end")], "start 0:thinking signature_delta stop delta end"),
    "redacted": ([seal(field="redacted", data="EmwK"), end("end")], "start 0:redacted_thinking stop delta end"),
    "two thoughts": ([{"delta": "think", "text": "a"}, {"delta": "seal", **CEREBRAS}, {"delta": "think", "text": "b"}, {"delta": "seal", **CEREBRAS}, end("end")],
                     "start 0:thinking thinking_delta signature_delta stop 1:thinking thinking_delta signature_delta stop delta end"),
    "own block": ([{"delta": "opaque", "family": "anthropic", "data": {**SEARCH, "input": {"query": "a"}}}, end("end")], "start 0:server_tool_use input_json_delta stop delta end"),
    "own block without input": ([{"delta": "opaque", "family": "anthropic", "data": {"type": "compaction", "content": "x"}}, end("end")], "start 0:compaction stop delta end"),
    "foreign block": ([SAY[0], {"delta": "opaque", "family": "openai", "data": {"type": "web_search_call"}}, SAY[1], end("end")], "start 0:text text_delta text_delta stop delta end"),
    "citations part the text": ([SAY[0], {"delta": "cite", "url": "u", "title": "t"}, {"delta": "cite", "url": "v", "title": "t"}, SAY[1], end("end")],
                                "start 0:text text_delta citations_delta citations_delta stop 1:text text_delta stop delta end"),
    "note": ([*call("t", "a"), {"delta": "note", "id": "t", "family": "gemini", "data": {}}, {"delta": "args", "text": "{}"}, end("tool")],
             "start 0:tool_use input_json_delta stop delta end"),
    "m10 m11 error at once": ([gateway.error_delta(503, "gone")], "error"),
    "m12 error within": ([BEGIN, *call("t", "a", '{"p":'), gateway.error_delta(503, "gone"), end("end")], "start 0:tool_use input_json_delta error"),
    "m30 no stop": ([BEGIN, SAY[0]], "start 0:text text_delta error"),
    "after the stop": ([SAY[0], end("end"), SAY[1], end("end")], "start 0:text text_delta stop delta end"),
}


def shape_of(stream: bytes) -> str:
    names = {"message_start": "start", "content_block_stop": "stop", "message_delta": "delta", "message_stop": "end"}
    return " ".join(f"{frame['index']}:{frame['content_block']['type']}" if frame["type"] == "content_block_start"
                    else frame["delta"]["type"] if frame["type"] == "content_block_delta" else names.get(frame["type"], frame["type"]) for frame in frames_of(stream))


@pytest.mark.parametrize("row", SHAPES)
def test_every_delta_stands_in_a_block_of_its_kind(row: str) -> None:
    deltas, shape = SHAPES[row]
    assert shape_of(write_stream(deltas)) == shape


STOP_WORDS = {"end": "end_turn", "length": "max_tokens", "tool": "tool_use", "sequence": "stop_sequence", "filter": "refusal", "refusal": "refusal", "pause": "pause_turn",
              "context": "model_context_window_exceeded"}


@pytest.mark.parametrize("reason", STOP_WORDS)
def test_m36_m37_a_stop_is_written_in_the_clients_words(reason: str) -> None:
    details = {"type": "refusal", "category": "cyber"}
    stop = {**end(reason), "sequence": "END", "details": details}
    assert frames_of(write_stream([SAY[0], stop]))[-2]["delta"] == {"stop_reason": STOP_WORDS[reason], "stop_sequence": "END", "stop_details": details}


def test_m26_m28_the_last_counts_are_told_whole() -> None:
    stream = frames_of(write_stream([BEGIN, SAY[0], {"delta": "usage", "input": 120}, {"delta": "usage", "cached": 100, "cache_write": 8, "output": 18, "reasoning": 4}, end("end")]))
    assert stream[-2]["usage"] == {"input_tokens": 12, "cache_creation_input_tokens": 8, "cache_read_input_tokens": 100, "output_tokens": 18,
                                   "output_tokens_details": {"thinking_tokens": 4}}


def test_m27_an_estimate_stands_where_nobody_counted() -> None:
    filler = gateway.UsageFiller(25)
    stream = frames_of(write_stream([ready for delta in ({"delta": "start", "id": "c", "model": "m"}, SAY[0], end("end")) for ready in filler.feed(delta)]))
    assert stream[0]["message"]["usage"]["input_tokens"] == 25
    assert stream[-2]["usage"]["input_tokens"] == 25 and stream[-2]["usage"]["output_tokens"] > 0


def test_thinking_that_the_client_does_not_want_to_see_rides_in_the_envelope() -> None:
    asked = gateway.Asked({"model": "m", "think": {"mode": "auto", "show": "omitted"}})
    stream = frames_of(write_stream([{"delta": "think", "text": "one "}, {"delta": "think", "text": "two"}, {"delta": "seal", **CEREBRAS}, SAY[0], end("end")], asked))
    assert [frame["delta"]["type"] for frame in stream if frame["type"] == "content_block_delta"] == ["signature_delta", "text_delta"]
    signature = stream[2]["delta"]["signature"]
    assert gateway.open_envelope(signature) == {**CEREBRAS, "text": "one two"}
    assert parts([{"type": "thinking", "thinking": "", "signature": signature}], "assistant") == [{"type": "think", "text": "one two", "seal": CEREBRAS}]


def test_own_signatures_and_citations_go_out_as_they_came() -> None:
    stream = frames_of(write_stream([{"delta": "think", "text": "a"}, seal(data="EqQBCkYI"), SAY[0], {"delta": "cite", "url": "u", "title": "t", "raw": HIT, "family": "anthropic"}, end("end")]))
    assert stream[3]["delta"] == {"type": "signature_delta", "signature": "EqQBCkYI"}
    assert stream[7]["delta"] == {"type": "citations_delta", "citation": HIT}


def test_a_foreign_citation_is_told_and_never_shown_to_anthropic() -> None:
    stream = frames_of(write_stream([SAY[0], {"delta": "cite", "url": "https://a.example", "title": "A"}, end("end")]))
    citation = stream[3]["delta"]["citation"]
    assert (citation["type"], citation["url"], citation["title"], citation["encrypted_index"]) == ("web_search_result_location", "https://a.example", "A", "")
    body = body_of(messages=[*HI, {"role": "assistant", "content": [{"type": "text", "text": "Hel", "citations": [citation]}]}, *HI])
    assert write(body)["messages"][1]["content"] == "Hel"


def test_what_is_written_between_the_deltas() -> None:
    writer = gateway.MessagesStreamWriter(ASKED)
    assert writer.keep_alive() == b'event: ping\ndata: {"type":"ping"}\n\n'
    writer.feed(SAY[0])
    error = gateway.GatewayError("slow down", 429, "rate_limit_exceeded", "rate_limit_error")
    assert writer.error(error) == b'event: error\ndata: {"type":"error","error":{"type":"rate_limit_error","message":"slow down"}}\n\n'
    assert writer.feed(SAY[1]) == [] and writer.close() == []


# ---- Whole answers: written

def fold(stream: bytes) -> Json:
    """What a client makes of a stream, written down here apart from the module."""
    message: Json = {}
    for frame in frames_of(stream):
        if frame["type"] == "message_start":
            message = frame["message"]
        elif frame["type"] == "content_block_start":
            message["content"].append({**frame["content_block"], "partial": ""})
        elif frame["type"] == "content_block_delta":
            block, delta = message["content"][-1], frame["delta"]
            if delta["type"] == "citations_delta":
                block.setdefault("citations", []).append(delta["citation"])
            elif delta["type"] == "input_json_delta":
                block["partial"] += delta["partial_json"]
            else:
                field_name = delta["type"].removesuffix("_delta")
                block[field_name] += delta[field_name]
        elif frame["type"] == "content_block_stop":
            partial = message["content"][-1].pop("partial")
            if partial:
                message["content"][-1]["input"] = gateway.args_object(partial)
        elif frame["type"] == "message_delta":
            message |= {**frame["delta"], "usage": frame["usage"]}
    return message


@pytest.mark.parametrize("name", [*(name for name in WRITTEN if name not in ("E10", "E11")), *(name for name in SHAPES if SHAPES[name][1].endswith("end"))])
def test_an_answer_that_is_not_streamed_is_the_stream_folded(name: str) -> None:
    deltas = [BEGIN, *WRITTEN[name]] if name in WRITTEN else [delta for delta in SHAPES[name][0]]
    before = copy.deepcopy(deltas)
    assert gateway.messages_write_answer(deltas, ASKED) == fold(write_stream(deltas))
    assert deltas == before


def test_a_whole_answer_has_the_documented_form() -> None:
    assert gateway.messages_write_answer([BEGIN, *WRITTEN["E2"]], ASKED) == {
        "id": MESSAGE_ID, "type": "message", "role": "assistant", "model": "claude-sonnet-5",
        "content": [text("Let me look."), {"type": "tool_use", "id": "call_a1B2c3D4e5F6", "name": "Read", "input": {"file_path": "/a.txt"}}],
        "stop_reason": "tool_use", "stop_sequence": None,
        "usage": {"input_tokens": 20, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 100, "output_tokens": 18}}


def test_a_call_cut_by_the_limit_keeps_what_there_is() -> None:
    body = gateway.messages_write_answer([BEGIN, *call("t", "a", '{"p":'), end("length")], ASKED)
    assert body["content"] == [{"type": "tool_use", "id": "t", "name": "a", "input": {"_raw": '{"p":'}}] and body["stop_reason"] == "max_tokens"


def test_an_answer_that_failed_is_the_errors_envelope() -> None:
    assert gateway.messages_write_answer([BEGIN, SAY[0], gateway.error_delta(503, "Overloaded", "server_is_overloaded")], ASKED) == {
        "type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}


# ---- Errors

ERRORS: dict[str, tuple[Any, str, int]] = {
    "bad request": (gateway.bad_request("x"), "invalid_request_error", 400),
    "m115 too long": (gateway.GatewayError("prompt is too long: 9 tokens > 8 maximum", 400, "context_length_exceeded", "invalid_request_error"), "invalid_request_error", 400),
    "unprocessable": (gateway.bad_request("x", status=422), "invalid_request_error", 422),
    "key": (gateway.unauthorized("x"), "authentication_error", 401),
    "forbidden": (gateway.forbidden("x"), "permission_error", 403),
    "unknown model": (gateway.unknown_model("x"), "not_found_error", 404),
    "too large": (gateway.too_large("x"), "request_too_large", 413),
    "rate": (gateway.no_route("x", status=429), "rate_limit_error", 429),
    "server": (gateway.GatewayError("x", 500), "api_error", 500),
    "credential": (gateway.GatewayError("x", 502), "api_error", 502),
    "no route": (gateway.no_route("x"), "overloaded_error", 503),
    "m116 overloaded": (gateway.GatewayError("x", 503, "server_is_overloaded"), "overloaded_error", 529),
    "timeout": (gateway.GatewayError("x", 504, "timeout"), "timeout_error", 504),
    "529": (gateway.GatewayError("x", 529), "overloaded_error", 529),
}


@pytest.mark.parametrize("row", ERRORS)
def test_an_error_has_anthropics_form(row: str) -> None:
    error, kind, status = ERRORS[row]
    assert gateway.messages_error(error) == {"type": "error", "error": {"type": kind, "message": error.message}}
    tried = [{"provider": "a", "model": "m", "status": 500, "reason": "server_error", "ms": 5}]
    assert gateway.messages_error(dataclasses.replace(error, attempts=tried))["error"] == {"type": kind, "message": error.message, "attempts": tried}
    assert gateway.messages_error(error, "req_1") == {"type": "error", "error": {"type": kind, "message": error.message}, "request_id": "req_1"}
    assert gateway.messages_status(error) == status


# ---- Passing through

def raw(*values: Any, padding: str = "", line_end: str = "\n") -> bytes:
    """The events as a provider sends them; Anthropic pads with blanks before the last brace."""
    stream = "".join(f"event: {value['type']}\ndata: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))[:-1]}{padding}}}\n\n" for value in values)
    return stream.replace("\n", line_end).encode()


WHOLE = [start(input_tokens=12, cache_read_input_tokens=100, output_tokens=1), opens(0, type="thinking", thinking="", signature=""), {"type": "ping"}, more(0, "thinking", "Hm \u00e9"),
         more(0, "thinking", " \u4e2d."), more(0, "signature", "EqQB"), stops(0), opens(1, type="text", text=""), *(more(1, "text", words) for words in ("Hel", "lo", ' "quoted" \\', "\u00e9")),
         stops(1), opens(2, type="tool_use", id="toolu_one", name="a", input={}), more(2, "input_json", ""), more(2, "input_json", '{"p":'), more(2, "input_json", "1}"), stops(2),
         ends("tool_use"), STOP]
SAMPLES = {"plain": raw(*WHOLE), "padded": raw(*WHOLE, padding="     "), "crlf": raw(*WHOLE, line_end="\r\n"), "cr": raw(*WHOLE, line_end="\r"), "bom": b"\xef\xbb\xbf" + raw(*WHOLE),
           "comments": b": hello\n\n" + raw(*WHOLE).replace(b"event: content_block_stop\n", b": PROCESSING\n\nevent: content_block_stop\n"), "error": raw(*WHOLE[:10], {"type": "error", "error": {
               "type": "overloaded_error", "message": "Overloaded"}}), "garbage behind": raw(*WHOLE) + b"data: {\n\nnonsense"}


def watch(*chunks: bytes, **options: Any) -> tuple[Any, bytes]:
    passage = gateway.MessagesPassage(**options)
    out = b"".join(passage.feed(chunk) for chunk in chunks) + passage.close()
    return passage, out


def told(passage: Any) -> tuple[Any, ...]:
    return passage.content, passage.done, passage.finish, passage.usage, passage.error, passage.broken


def test_a_stream_passes_untouched_and_is_understood() -> None:
    for name in ("plain", "padded", "crlf", "cr", "comments"):
        passage, out = watch(SAMPLES[name])
        wanted = SAMPLES[name].replace(b": hello\n\n", b"")
        assert out == wanted + (b"\n\n" if name == "cr" else b""), name     # a last CR may be half of a CRLF until the stream ends
        assert told(passage) == (True, True, "tool_use", gateway.Usage(112, 7, 100), None, "")
    assert watch(SAMPLES["bom"])[1] == SAMPLES["plain"]


@pytest.mark.parametrize("name", SAMPLES)
def test_a_stream_cut_at_every_byte_passes_alike(name: str) -> None:
    sample = SAMPLES[name]
    whole, out = watch(sample)
    for cut in range(1, len(sample)):
        passage, pieces = watch(sample[:cut], sample[cut:])
        assert (told(passage), pieces) == (told(whole), out), cut
    passage, pieces = watch(*(sample[index:index + 1] for index in range(len(sample))))
    assert (told(passage), pieces) == (told(whole), out)


@pytest.mark.parametrize("name", SAMPLES)
def test_a_stream_cut_at_every_byte_is_read_alike(name: str) -> None:
    sample = SAMPLES[name]

    def deltas_of(*chunks: bytes) -> list[Json]:
        events, reader = gateway.EventReader(), gateway.MessagesStreamReader(gateway.Source(CLAUDE, "s"))
        found = [delta for chunk in chunks for item in events.feed(chunk) for delta in reader.feed(item)]
        return found + [delta for item in events.close() for delta in reader.feed(item)] + reader.close()

    wanted = deltas_of(sample)
    for cut in range(1, len(sample)):
        assert deltas_of(sample[:cut], sample[cut:]) == wanted, cut
    assert deltas_of(*(sample[index:index + 1] for index in range(len(sample)))) == wanted


def test_a_stream_that_breaks_off_never_looks_whole() -> None:
    """Cut after every event before the stop reason: no end for a reader, a cut or an empty answer for a passage."""
    for n_events in range(len(WHOLE) - 2):
        assert read_events(*WHOLE[:n_events])[-1]["delta"] == "error"
        passage, out = watch(raw(*WHOLE[:n_events]))
        assert not passage.done and passage.broken == ("cut" if n_events > 3 else "empty_answer")
        assert b"message_stop" not in out


def test_a_stop_reason_and_the_end_of_the_connection_are_an_end() -> None:
    passage, out = watch(raw(*WHOLE[:-1]))
    assert told(passage)[1:3] == (True, "tool_use") and not passage.broken
    assert out == raw(*WHOLE)


def test_an_unfinished_last_frame_counts_when_it_is_whole() -> None:
    passage, out = watch(raw(*WHOLE)[:-2])
    assert passage.done and out == raw(*WHOLE)
    assert watch(raw(*WHOLE[:8])[:-9])[0].broken == "cut"


PASSAGE_CONTENT: dict[str, tuple[Json, bool]] = {
    "start": (start(), False),
    "ping": ({"type": "ping"}, False),
    "empty text": (opens(0, type="text", text=""), False),
    "empty thinking": (opens(0, type="thinking", thinking="", signature=""), False),
    "text": (more(0, "text", "a"), True),
    "no text": (more(0, "text", ""), False),
    "thinking": (more(0, "thinking", "a"), True),
    "signature": (more(0, "signature", "a"), True),
    "call": (opens(0, type="tool_use", id="a", name="b", input={}), True),
    "server tool": (opens(0, **SEARCH), True),
    "redacted": (opens(0, type="redacted_thinking", data="E"), True),
    "end": (ends("end_turn"), False),
    "limit": (ends("max_tokens"), True),
    "refusal": (ends("refusal"), True),
    "pause": (ends("pause_turn"), True),
}


@pytest.mark.parametrize("row", PASSAGE_CONTENT)
def test_what_counts_as_content(row: str) -> None:
    value, counts = PASSAGE_CONTENT[row]
    passage = gateway.MessagesPassage()
    passage.feed(raw(value))
    assert passage.content is counts and passage.n_signs >= 1


PASSAGE_ENDS: dict[str, tuple[bytes, str, Any, str]] = {
    "error": (raw(start(), {"type": "error", "error": {"type": "api_error", "message": "x"}}), "", {"type": "error", "error": {"type": "api_error", "message": "x"}}, ""),
    "error by its line": (b'event: error\ndata: {"message":"x"}\n\n', "", {"message": "x"}, ""),
    "error in words": (b"event: error\ndata: overloaded\n\n", "", {"error": {"message": "overloaded"}}, ""),
    "error of another format": (b'data: {"error":{"message":"x"}}\n\n', "", {"error": {"message": "x"}}, ""),
    "not JSON": (b"data: <html>\n\n", "not_json", None, ""),
    "nothing": (b"", "empty_answer", None, ""),
    "only a start": (raw(start(), STOP), "", None, "done"),
    "cut": (raw(start(), *TEXT), "cut", None, ""),
    "too big": (b"data: " + b"x" * (gateway.MAX_EVENT_BYTES + 9), "too_big", None, ""),
}


@pytest.mark.parametrize("row", PASSAGE_ENDS)
def test_how_a_passing_stream_goes_wrong(row: str) -> None:
    stream, broken, error, done = PASSAGE_ENDS[row]
    passage, out = watch(stream)
    assert (passage.broken, passage.error, passage.done) == (broken, error, bool(done))
    assert b"event: error" not in out and b"message_stop" not in out
    assert passage.feed(raw(*TEXT)) == b""


def test_an_error_behind_the_stop_reason_changes_nothing() -> None:
    passage, out = watch(raw(*WHOLE[:-1], {"type": "error", "error": {"message": "late"}}))
    assert passage.done and passage.error is None and out == raw(*WHOLE)


@pytest.mark.parametrize("tail", [raw(STOP), b"data: [DONE]\n\n"])
def test_m31_a_stop_reason_that_is_missing_is_supplied(tail: bytes) -> None:
    passage, out = watch(raw(start(), *TEXT) + tail)
    assert passage.done and passage.finish == "end_turn"
    assert [frame["type"] for frame in frames_of(out)][-2:] == ["message_delta", "message_stop"]
    assert frames_of(out)[-2]["delta"]["stop_reason"] == "end_turn"


def test_a_missing_event_line_is_supplied() -> None:
    """Without it the SDKs see nothing."""
    bare = re.sub(rb"event: \w+\n", b"", raw(*WHOLE))
    assert watch(bare)[1] == raw(*WHOLE)


def test_the_model_may_be_echoed() -> None:
    _, out = watch(raw(*WHOLE), echo_model="mine", wants_usage=False)
    assert frames_of(out)[0]["message"]["model"] == "mine" and frames_of(out)[1:] == frames_of(raw(*WHOLE))[1:]


def test_the_quick_look_sees_the_same_as_the_slow_one() -> None:
    """Many deltas in one read, in a form that allows the quick look and in one that does not: the same output, end and about the same size."""
    deltas = [more(0, "text", f'word {number} "\u00e9\\') for number in range(50)]
    quick, slow = gateway.MessagesPassage(), gateway.MessagesPassage()
    stream = raw(start(), opens(0, type="text", text=""), *deltas, stops(0), ends("end_turn"), STOP)
    spread = stream.replace(b'"index":0,"delta":', b'"delta":').replace(b'"}}\n', b'"},"index":0}\n')
    assert quick.feed(stream) == stream and slow.feed(spread) == spread
    assert told(quick) == told(slow)
    n_bytes = sum(len(value["delta"]["text"].encode()) for value in deltas)
    assert slow.n_content_bytes == n_bytes and n_bytes <= quick.n_content_bytes <= 1.2 * n_bytes + 100


def test_signs_of_life() -> None:
    passage = gateway.MessagesPassage()
    passage.feed(b": waiting\n\n")
    assert passage.n_signs == 0
    seen = [0]
    for chunk in (raw(start()), raw({"type": "ping"}), b": waiting\n\n", raw(opens(0, type="text", text="")), *(raw(more(0, "text", words)) for words in "abc"), b": waiting\n\n"):
        passage.feed(chunk)
        seen.append(passage.n_signs)
    assert seen == sorted(set(seen))


JUDGED: dict[str, tuple[Any, str]] = {
    "answer": (ANSWER, ""),
    "refusal": ({"content": [], "stop_reason": "refusal"}, ""),
    "limit": ({"content": [], "stop_reason": "max_tokens"}, ""),
    "empty": ({"content": [], "stop_reason": "end_turn"}, "empty_answer"),
    "empty text": ({"content": [{"type": "text", "text": ""}], "stop_reason": "end_turn"}, "empty_answer"),
    "omitted thinking": ({"content": [{"type": "thinking", "thinking": "", "signature": "E"}], "stop_reason": "end_turn"}, ""),
    "call": ({"content": [{"type": "tool_use", "id": "a", "name": "b", "input": {}}], "stop_reason": "tool_use"}, ""),
    "no content": ({"type": "message"}, "not_json"),
    "content of words": ({"content": ["a"]}, "not_json"),
    "list": ([], "not_json"),
    "text": ("hello", "not_json"),
    "chat": ({"choices": []}, "not_json"),
}


@pytest.mark.parametrize("row", JUDGED)
def test_a_whole_body_is_judged(row: str) -> None:
    body, why = JUDGED[row]
    assert gateway.judge_messages_answer(body)[0] == why


def test_usage_of_bodies_and_events() -> None:
    assert gateway.judge_messages_answer(ANSWER)[1] == gateway.messages_usage(ANSWER) == gateway.Usage(120, 40, 100, 8)
    assert gateway.messages_usage(start(input_tokens=3, output_tokens=1)) == gateway.Usage(3, 1)
    assert gateway.messages_usage(ends("end_turn", usage={"output_tokens": 9, "output_tokens_details": {"thinking_tokens": 4}})) == gateway.Usage(0, 9, 0, 0, 4)
    assert gateway.messages_usage({}) is None and gateway.messages_usage({"usage": None}) is None


FOUND_ERRORS: dict[str, tuple[Any, bool]] = {
    "own": ({"type": "error", "error": {"type": "api_error", "message": "x"}}, True),
    "other": ({"error": {"message": "x"}}, True),
    "list": ([{"error": {"message": "x"}}], True),
    "words": ({"error": "x"}, True),
    "answer": (ANSWER, False),
    "answer that mentions one": ({**ANSWER, "error": None}, False),
    "event": ({"type": "ping", "error": "x"}, False),
    "text": ("error", False),
}


@pytest.mark.parametrize("row", FOUND_ERRORS)
def test_an_error_in_a_200_is_found(row: str) -> None:
    body, is_error = FOUND_ERRORS[row]
    assert (gateway.find_messages_error(body) is not None) is is_error


# ---- Recorded traffic

def recordings() -> list[str]:
    index = SHARED / "recordings" / "index.json"
    return [row["file"] for row in json.loads(index.read_text(encoding="utf-8")) if row["format"] == "messages"] if index.exists() else []


RECORDED = recordings()
needs_recordings = pytest.mark.skipif(not RECORDED, reason="the recordings are not beside the checkout")


def load(file: str) -> Json:
    return json.loads((SHARED / "recordings" / file).read_text(encoding="utf-8"))


def plain_blocks(content: Any) -> Any:
    """Content as blocks, without what says nothing: is_error false, null citations."""
    if content is None or isinstance(content, str):
        return [text(content)] if content and content.strip() else []
    blocks = [{name: value for name, value in block.items() if (name, value) not in (("is_error", False), ("citations", None))} for block in content
              if block["type"] != "text" or block["text"].strip()]
    return [{**block, "content": plain_blocks(block.get("content"))} if block["type"] == "tool_result" else block for block in blocks]


def plain_request(body: Json) -> Json:
    """A request in the form in which equal ones are equal. The normalisations, all of them:

    strings are one text block; blank texts are left out; a missing max_tokens (count_tokens) is filled in; stream false is absent; object schemas
    have properties; temperature is not sent to a model that thinks (1 is all it takes); neighbours of one role are one message.
    """
    plain = {name: value for name, value in body.items() if name not in ("stream", "max_tokens")}
    if plain.get("thinking", {}).get("type") in ("enabled", "adaptive"):
        plain.pop("temperature", None)
    if "system" in plain:
        plain["system"] = plain_blocks(plain["system"])
    if "tools" in plain:
        plain["tools"] = [{**tool, "input_schema": {"properties": {}, **tool["input_schema"]}} if "input_schema" in tool else tool for tool in plain["tools"]]
    messages: list[Json] = []
    for message in body["messages"]:
        if messages and messages[-1]["role"] == message["role"]:
            messages[-1]["content"] += plain_blocks(message["content"])
        else:
            messages.append({"role": message["role"], "content": plain_blocks(message["content"])})
    return {**plain, "messages": messages}


@needs_recordings
@pytest.mark.parametrize("file", RECORDED)
def test_a_recorded_request_comes_through_the_hub_unchanged(file: str) -> None:
    recording = load(file)
    body = recording["request"]["body"]
    if not isinstance(body, dict):
        assert "request_absent" in recording["flags"]
        return
    profile = gateway.profile_for("anthropic", body["model"], "messages")
    before = copy.deepcopy(body)
    ready = gateway.prepare(gateway.messages_read_request(body), profile)
    written = gateway.messages_write_request(ready, profile)
    assert body == before
    if file in CHANGED:
        assert CHANGED[file](written), file
        return
    assert plain_request(written) == plain_request(body)
    assert written["max_tokens"] == body.get("max_tokens", 32000 if "claude-3" not in body["model"] else 4096)
    assert not set(ready["dropped"]) - {"temperature"}


#: Recorded requests that rightly do not come through unchanged, with what must be true instead.
CHANGED: dict[str, Callable[[Json], bool]] = {
    # Opus 4.6 has no xhigh and answered 400
    "anthropic/messages-json-error-400-113631f7.json": lambda body: body["output_config"] == {"effort": "high"},
}


#: Recorded answers whose summary differs, and in what: two answers stand in one file, of which a client sees the first.
TWO_ANSWERS = {"anthropic/messages-sse-tool-call-046f6f81.json"}
#: Of a call that the limit cut off, a stream keeps the text and a body an object that holds it.
CUT_CALLS = {"anthropic/messages-sse-tool-call-40d58d0d.json"}
#: What the validator finds wrong with genuine answers too: a block that the SDK does not know yet.
NEWER = ("unknown type 'fallback'", "unknown type 'content_block_start'")


@needs_recordings
@pytest.mark.parametrize("file", [file for file in RECORDED if "count-tokens" not in file and "-error-" not in file and "models-" not in file])
def test_a_recorded_answer_comes_through_reader_and_writer(file: str) -> None:
    pytest.importorskip("anthropic")
    pytest.importorskip("openai")
    sys.path.insert(0, str(SHARED / "conformance"))
    import validate  # type: ignore[import-not-found]
    import wire  # type: ignore[import-not-found]
    response = load(file)["response"]
    source = gateway.Source(CLAUDE, "s")
    if "sse" in response:
        events, reader = gateway.EventReader(), gateway.MessagesStreamReader(source)
        deltas = [delta for item in events.feed(response["sse"].encode()) + events.close() for delta in reader.feed(item)] + reader.close()
    else:
        deltas = gateway.messages_read_answer(response["body"], source)
    assert check_deltas(deltas) == []
    wanted = wire.semantics("messages", response)
    for answer in ({"status": 200, "sse": write_stream(deltas).decode()}, {"status": 200, "body": gateway.messages_write_answer(deltas, ASKED)}):
        assert [issue for issue in validate.validate("messages", answer) if issue["level"] != "warn" and not ("fallback" in json.dumps(response) and issue["detail"] in NEWER)] == []
        if file not in TWO_ANSWERS:
            found = wire.semantics("messages", answer)
            if "body" in answer and file in CUT_CALLS:
                assert [item["args"]["_raw"] for item in found["tool_calls"]] == [item["args"]["__raw__"] for item in wanted["tool_calls"]]
                found["tool_calls"] = wanted["tool_calls"]
            for name in ("text", "thinking", "tool_calls", "stop", "signatures", "server_tools", "annotations", "complete", "error"):
                assert found[name] == wanted[name], name
            assert found["usage"] == {name: count if count is not None or name == "reasoning" else 0 for name, count in wanted["usage"].items()}


@needs_recordings
@pytest.mark.parametrize("file", [file for file in RECORDED if "-sse-" in file])
def test_a_recorded_stream_passes_untouched(file: str) -> None:
    stream = load(file)["response"]["sse"].encode()
    if file in TWO_ANSWERS:
        stream = stream[:stream.index(b"event: message_start", 1)]
    passage, out = watch(stream)
    assert out == stream.rstrip() + b"\n\n" and passage.done and passage.content and passage.error is None and passage.broken == ""
    assert watch(*(stream[index:index + 701] for index in range(0, len(stream), 701)))[1] == out
