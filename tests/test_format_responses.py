"""Section 20: OpenAI Responses, both ways.  Ids like m46 are numbers of the catalogue of known mistakes, E1 and so on worked examples, of the translation reference."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest

import aicarousel as a
from deltas import check_deltas
from dialects import without_found

SHARED = Path(__file__).resolve().parents[2] / "shared"
OPENAI = a.profile_for("openai", "gpt-5.5", "responses")
OLD_OPENAI = a.profile_for("openai", "gpt-4o", "responses")
PLAIN = a.profile_for("groq", "openai/gpt-oss-20b", "responses")
CEREBRAS = {"family": "cerebras", "model": "qwen-3", "field": "reasoning_content"}
USAGE = {"input": 120, "cached": 100, "output": 18}
USER = {"role": "user", "content": "hi"}


def body_of(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "input": "hi", **fields}


def read(**fields: Any) -> dict[str, Any]:
    return a.responses_read_request(body_of(**fields))


def read_items(*items: Any, **fields: Any) -> dict[str, Any]:
    return read(input=list(items), **fields)


def parts_of(hub: dict[str, Any]) -> list[Any]:
    return [(turn["role"], part) for turn in hub["turns"] for part in turn["parts"]]


def write(hub: dict[str, Any], profile: a.Profile = OPENAI) -> dict[str, Any]:
    return a.responses_write_request(a.prepare(hub, profile), profile)


def again(body: dict[str, Any], profile: a.Profile = OPENAI) -> dict[str, Any]:
    """What a Responses body becomes on its way through the hub to a Responses provider."""
    return write(a.responses_read_request(body), profile)


def hub_of(*turns: Any, client: str = "chat", **fields: Any) -> dict[str, Any]:
    hub = a.new_hub(client, "m", False)
    return {**hub, "turns": [{"role": role, "parts": list(parts)} for role, *parts in turns] or [{"role": "user", "parts": [a.text_part("hi")]}], **fields}


def event(kind: str, **fields: Any) -> a.Event:
    return a.Event(kind, json.dumps({"type": kind, **fields}), b"")


def reader(**fields: Any) -> a.ResponsesStreamReader:
    return a.ResponsesStreamReader(a.Source(**{"profile": OPENAI, "seed": "s", **fields}))


def read_stream(*events: a.Event, **fields: Any) -> list[Any]:
    stream = reader(**fields)
    deltas = [delta for one in events for delta in stream.feed(one)] + stream.close()
    assert check_deltas(deltas) == []
    return deltas


def kinds_of(deltas: list[Any]) -> list[Any]:
    """(kind, what it says) of deltas, start and usage left out."""
    said = {"stop": "reason", "call": "name", "error": "status", "seal": "field", "opaque": "family", "cite": "url"}
    return [(delta["delta"], delta[said.get(delta["delta"], "text")]) for delta in deltas if delta["delta"] not in ("start", "usage")]


def asked(seed: str = "x", **sent: Any) -> a.Asked:
    return a.Asked(hub=a.responses_read_request(body_of(**{"model": "gpt-asked", **sent})), seed=seed, created_s=1790000000)


def write_bytes(deltas: list[Any], **sent: Any) -> bytes:
    writer = a.ResponsesStreamWriter(asked(**sent))
    return b"".join(piece for delta in deltas for piece in writer.feed(delta)) + b"".join(writer.close())


def events_of(stream: bytes) -> list[dict[str, Any]]:
    """The events of a written stream; names, numbering and indexes are checked on the way."""
    found = a.EventReader().feed(stream)
    events = [json.loads(one.data) for one in found]
    assert [one.name for one in found] == [one["type"] for one in events]
    assert [one["sequence_number"] for one in events] == list(range(len(events)))
    return events


def write_stream(deltas: list[Any], **sent: Any) -> list[dict[str, Any]]:
    return events_of(write_bytes(deltas, **sent))


def names_of(events: list[dict[str, Any]]) -> list[str]:
    return [one["type"].removeprefix("response.") for one in events]


START = a.start_delta("x1", "m")
CALL_A = [a.call_delta("call_AAAAAAAAAAAA", "f"), a.args_delta('{"a"'), a.args_delta(":1}")]


# ---- What a request must look like

CODEX = {
    "model": "gpt-5.5", "stream": True, "store": False, "parallel_tool_calls": True, "tool_choice": "auto", "reasoning": {"summary": "auto"},
    "include": ["reasoning.encrypted_content"], "prompt_cache_key": "s-1", "client_metadata": {"x-codex-installation-id": "i"}, "text": {"verbosity": "low"},
    "input": [{"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "You are Codex."}]},
              {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "list"}, {"type": "input_image", "image_url": "data:image/png;base64,iVBORw0K"}]},
              {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Use it."}], "content": None, "encrypted_content": "gAAAAABo"},
              {"type": "function_call", "name": "exec_command", "arguments": "{\"cmd\":\"ls\"}", "call_id": "call_x1y2z3w4v5u6"},
              {"type": "function_call_output", "call_id": "call_x1y2z3w4v5u6", "output": "a.txt"},
              {"type": "custom_tool_call", "name": "apply_patch", "input": "*** Begin Patch", "call_id": "call_p1p2p3p4p5p6", "status": "completed"},
              {"type": "custom_tool_call_output", "call_id": "call_p1p2p3p4p5p6", "output": "ok"}],
    "tools": [{"type": "function", "name": "exec_command", "strict": False, "parameters": {"type": "object", "properties": {"cmd": {"type": "string"}}}},
              {"type": "namespace", "name": "multi_agent_v1", "description": "Agents.", "tools": [{"type": "function", "name": "spawn", "parameters": {"type": "object", "properties": {}}}]},
              {"type": "custom", "name": "apply_patch", "description": "Edit files.", "format": {"type": "grammar", "syntax": "lark", "definition": "start: x"}},
              {"type": "tool_search", "execution": "client", "description": "d", "parameters": {"type": "object", "properties": {"query": {"type": "string"}}}},
              {"type": "web_search", "external_web_access": True}]}
CODEX_NEW = {
    "model": "gpt-5.6-sol", "stream": True, "store": False, "parallel_tool_calls": False, "tools": [], "tool_choice": "auto", "reasoning": {"effort": "high", "context": "all_turns"},
    "input": [{"type": "additional_tools", "role": "developer", "tools": [
                  {"type": "namespace", "name": "functions", "tools": [{"type": "custom", "name": "exec", "format": {"type": "text"}}]},
                  {"type": "namespace", "name": "clock", "tools": [{"type": "function", "name": "now", "parameters": {}}]}]},
              {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "You are Codex."}]},
              {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "go"}]},
              {"type": "function_call", "name": "now", "namespace": "clock", "arguments": "{}", "call_id": "call_n1n2n3n4n5n6"},
              {"type": "function_call_output", "call_id": "call_n1n2n3n4n5n6", "output": [{"type": "input_text", "text": "noon"}]}]}
OPENCODE = {"model": "m", "store": False, "input": [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "input_text", "text": "x"}]},
                                                    {"role": "assistant", "content": [{"type": "output_text", "text": "y"}]}, {"role": "user", "content": "z"}]}


@pytest.mark.parametrize("body", [CODEX, CODEX_NEW, OPENCODE, {"model": None, "input": "hi"}, {"previous_response_id": "resp_1"}], ids=["codex", "codex gpt-5.6", "opencode", "no model", "stored"])
def test_bodies_of_real_clients_are_accepted(body: dict[str, Any]) -> None:
    assert a.check_responses_request(body) is body


REFUSED = [
    ("no object", [], "The body must be a JSON object."),
    ("no input", {"model": "m"}, "input must be a string or a list with at least one item."),
    ("input number", {"input": 3}, "input must be a string or a list."),
    ("boolean for number", body_of(max_output_tokens=True), "max_output_tokens must be an integer."),
    ("zero output", body_of(max_output_tokens=0), "max_output_tokens must be at least 1."),
    ("item", {"input": ["x"]}, "input[0] must be an object with a type."),
    ("item type", {"input": [{"type": 3}]}, "input[0] must be an object with a type."),
    ("role", {"input": [{"role": "tool", "content": "x"}]}, "input[0].role must be one of assistant, developer, system, user."),
    ("no content", {"input": [USER, {"role": "user"}]}, "input[1].content is missing."),
    ("content", {"input": [{"role": "user", "content": 3}]}, "input[0].content must be a string or a list of parts with a type."),
    ("part", {"input": [{"role": "user", "content": [{"text": "x"}]}]}, "input[0].content must be a string or a list of parts with a type."),
    ("call name", {"input": [{"type": "function_call", "call_id": "c"}]}, "input[0].name is missing."),
    ("output", {"input": [{"type": "function_call_output", "output": ["x"]}]}, "input[0].output must be a string or a list of parts with a type."),
    ("tool", body_of(tools=["x"]), "tools[0] must be an object with a type."),
    ("tool name", body_of(tools=[{"type": "function"}]), "tools[0].name is missing."),
    ("namespace", body_of(tools=[{"type": "namespace", "name": "n"}]), "tools[0] must be a namespace with a name and tools."),
    ("member", body_of(tools=[{"type": "namespace", "name": "n", "tools": [{"type": "custom"}]}]), "tools[0].tools[0].name is missing."),
]


@pytest.mark.parametrize(("body", "message"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_the_first_bad_field_is_named(body: Any, message: str) -> None:
    with pytest.raises(a.GatewayError) as caught:
        a.check_responses_request(body)
    assert (caught.value.status, caught.value.message) == (400, message)


UNREADABLE = [
    ("part type", {"role": "user", "content": [{"type": "foo"}]}, 'input[0].content[0]: unknown part type "foo"'),
    ("image source", {"role": "user", "content": [{"type": "input_image"}]}, "input[0].content[0]: image_url or file_id is required"),
    ("file source", {"role": "user", "content": [{"type": "input_file"}]}, "input[0].content[0]: file_data, file_url or file_id is required"),
    ("data url", {"role": "user", "content": [{"type": "input_image", "image_url": "data:nothing"}]}, "invalid data URL"),
    ("item reference", {"type": "item_reference", "id": "rs_1"}, "item references need a provider that stores responses"),
]


@pytest.mark.parametrize(("item", "message"), [row[1:] for row in UNREADABLE], ids=[row[0] for row in UNREADABLE])
def test_what_cannot_be_read_is_refused(item: Any, message: str) -> None:
    with pytest.raises(a.GatewayError, match="^" + message.replace("[", r"\[").replace("]", r"\]") + "$"):
        read_items(item)


def test_m114_a_previous_response_is_refused_clearly_unless_it_passes_through() -> None:
    body = body_of(previous_response_id="resp_9")
    assert a.check_responses_request(body) is body
    for refuse in (a.check_responses_state, a.responses_read_request):
        with pytest.raises(a.GatewayError) as caught:
            refuse(body)
        assert a.chat_error(caught.value)["error"] == {"message": "Previous response with id 'resp_9' not found.", "type": "invalid_request_error", "param": "previous_response_id",
                                                       "code": "previous_response_not_found"} if hasattr(a, "chat_error") else caught.value.code == "previous_response_not_found"


# ---- Requests: fields to the hub (sections 3.3 and 3.6 of the reference)

SCHEMA = {"type": "object", "properties": {}}
FIELDS = [
    ("model", {"model": "gpt-x"}, "model", "gpt-x"),
    ("stream", {"stream": True}, "stream", True),
    ("input string", {"input": "x"}, "turns", [{"role": "user", "parts": [a.text_part("x")]}]),
    ("instructions", {"instructions": "Be brief."}, "system", [a.text_part("Be brief.")]),
    ("max_output_tokens", {"max_output_tokens": 9}, "max_out", 9),
    ("temperature, top_p", {"temperature": 0, "top_p": 0.5}, "sampling", {"temperature": 0, "top_p": 0.5}),
    ("tool_choice word", {"tool_choice": "required"}, "choice", {"mode": "any"}),
    ("tool_choice none", {"tool_choice": "none"}, "choice", {"mode": "none"}),
    ("m76 tool_choice none as object", {"tool_choice": {"type": "none"}}, "choice", {"mode": "none"}),
    ("tool_choice flat", {"tool_choice": {"type": "function", "name": "f"}}, "choice", {"mode": "tool", "name": "f"}),
    ("tool_choice nested", {"tool_choice": {"type": "function", "function": {"name": "f"}}}, "choice", {"mode": "tool", "name": "f"}),
    ("tool_choice custom", {"tool_choice": {"type": "custom", "name": "f"}}, "choice", {"mode": "tool", "name": "f", "kind": "custom"}),
    ("tool_choice hosted", {"tool_choice": {"type": "web_search"}}, "choice", {"mode": "tool", "name": "web_search", "raw": {"type": "web_search"}}),
    ("tool_choice allowed", {"tool_choice": {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "f"}, {"type": "image_generation"}]}},
     "choice", {"mode": "any", "allowed": ["f", "image_generation"]}),
    ("parallel_tool_calls", {"parallel_tool_calls": False}, "parallel", False),
    ("reasoning.effort", {"reasoning": {"effort": "high"}}, "think", {"mode": "on", "effort": "high"}),
    ("reasoning.effort none", {"reasoning": {"effort": "none"}}, "think", {"mode": "off"}),
    ("reasoning.summary", {"reasoning": {"summary": "auto"}}, "think", {"mode": "auto", "show": "auto"}),
    ("reasoning.generate_summary", {"reasoning": {"effort": "low", "generate_summary": "concise"}}, "think", {"mode": "on", "effort": "low", "show": "concise"}),
    ("reasoning.context", {"reasoning": {"context": "all_turns"}}, "extra", {"responses": {"reasoning": {"context": "all_turns"}}}),
    ("text.format schema", {"text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA, "strict": True}}}, "format",
     {"kind": "schema", "name": "x", "schema": SCHEMA, "strict": True}),
    ("text.format nested", {"text": {"format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}}}, "format", {"kind": "schema", "name": "x", "schema": SCHEMA}),
    ("text.format json", {"text": {"format": {"type": "json_object"}}}, "format", {"kind": "json"}),
    ("text.format text", {"text": {"format": {"type": "text"}}}, "format", None),
    ("text.verbosity", {"text": {"verbosity": "low"}}, "meta", {"verbosity": "low"}),
    ("top_logprobs", {"top_logprobs": 2}, "meta", {"top_logprobs": 2, "logprobs": True}),
    ("include logprobs", {"include": ["message.output_text.logprobs"]}, "meta", {"logprobs": True}),
    ("include seals", {"include": ["reasoning.encrypted_content"]}, "extra", {}),
    ("include others", {"include": ["web_search_call.action.sources"]}, "extra", {"responses": {"include": ["web_search_call.action.sources"]}}),
    ("store", {"store": True}, "meta", {"store": True}),
    ("user, safety, cache, tier", {"user": "u", "safety_identifier": "s", "prompt_cache_key": "k", "service_tier": "flex"}, "meta",
     {"user": "u", "safety": "s", "cache_key": "k", "tier": "flex"}),
    ("metadata", {"metadata": {"k": "v"}}, "meta", {"metadata": {"k": "v"}}),
    ("truncation auto", {"truncation": "auto"}, "extra", {"responses": {"truncation": "auto"}}),
    ("truncation disabled", {"truncation": "disabled"}, "extra", {}),
    ("background", {"background": True}, "extra", {"responses": {"background": True}}),
    ("prompt", {"prompt": {"id": "p"}}, "extra", {"responses": {"prompt": {"id": "p"}}}),
    ("conversation", {"conversation": "c"}, "extra", {"responses": {"conversation": "c"}}),
    ("max_tool_calls, context_management, moderation, client_metadata", {"max_tool_calls": 2, "context_management": [], "moderation": {}, "client_metadata": {}}, "extra",
     {"responses": {"max_tool_calls": 2, "context_management": [], "moderation": {}, "client_metadata": {}}}),
    ("unknown field", {"frobnicate": 1}, "extra", {"responses": {"frobnicate": 1}}),
]


@pytest.mark.parametrize(("sent", "key", "value"), [row[1:] for row in FIELDS], ids=[row[0] for row in FIELDS])
def test_each_field_is_read(sent: dict[str, Any], key: str, value: Any) -> None:
    assert read(**sent).get(key) == value


ON_CHAT = [
    ("background", {"background": True}, "background mode is not supported"),
    ("prompt", {"prompt": {"id": "p"}}, "stored prompts are not supported by this provider"),
    ("forced hosted tool, m79", {"tools": [{"type": "web_search"}], "tool_choice": {"type": "web_search"}}, 'the forced tool "web_search" cannot be offered by this provider'),
    ("image file id", {"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "file_1"}]}]}, "image file ids cannot be sent to this provider"),
]


@pytest.mark.parametrize(("sent", "message"), [row[1:] for row in ON_CHAT], ids=[row[0] for row in ON_CHAT])
def test_what_only_some_routes_can_serve_sends_the_others_away(sent: dict[str, Any], message: str) -> None:
    with pytest.raises(a.UpstreamFailure) as caught:
        a.prepare(read(**sent), a.profile_for("groq", "m"))
    assert (caught.value.kind, caught.value.detail) == ("fit", message)


DROPPED_ON_CHAT = [
    ("hosted tool", {"tools": [{"type": "web_search", "external_web_access": True}]}, ["tools.web_search"]),
    ("two MCP servers", {"tools": [{"type": "mcp", "server_label": "a"}, {"type": "mcp", "server_label": "b"}]}, ["tools.mcp_a", "tools.mcp_b"]),
    ("truncation", {"truncation": "auto"}, ["truncation"]),
    ("unknown item", {"input": [USER, {"type": "frobnicate_call"}]}, ["input.frobnicate_call"]),
    ("compaction", {"input": [USER, {"type": "compaction", "encrypted_content": "x"}]}, ["compaction"]),
    ("silent ones", {"include": ["reasoning.encrypted_content"], "store": False, "client_metadata": {"a": "b"}, "context_management": [{"type": "compaction"}], "max_tool_calls": 3,
                     "reasoning": {"context": "all_turns"}, "prompt_cache_retention": "24h", "metadata": {"a": "b"}}, []),
]


@pytest.mark.parametrize(("sent", "names"), [row[1:] for row in DROPPED_ON_CHAT], ids=[row[0] for row in DROPPED_ON_CHAT])
def test_what_is_left_out_for_a_chat_provider_is_named(sent: dict[str, Any], names: list[str]) -> None:
    assert a.prepare(read(**sent), a.profile_for("groq", "m"))["dropped"] == names


# ---- Requests: items to turns

CALL = {"type": "function_call", "call_id": "call_x1y2z3", "name": "f", "arguments": "{ \"a\": 1.0 }"}
ITEMS = [
    ("text without type", [{"role": "user", "content": "x"}], [("user", a.text_part("x"))]),
    ("tolerated parts", [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "output_text", "text": "y"}]}], [("user", a.text_part("x")), ("user", a.text_part("y"))]),
    ("assistant and refusal", [USER, {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "y"}, {"type": "refusal", "refusal": "no"}]}],
     [("user", a.text_part("hi")), ("assistant", a.text_part("y")), ("assistant", {"type": "refusal", "text": "no"})]),
    ("image data", [{"role": "user", "content": [{"type": "input_image", "image_url": "data:image/png;base64,QUJD", "detail": "low"}]}],
     [("user", {"type": "image", "mime": "image/png", "data": "QUJD", "detail": "low"})]),
    ("m74 image url", [{"role": "user", "content": [{"type": "input_image", "image_url": "https://x/y"}]}], [("user", {"type": "image", "url": "https://x/y"})]),
    ("image id", [{"role": "user", "content": [{"type": "input_image", "file_id": "file_1"}]}], [("user", {"type": "image", "file_id": "file_1"})]),
    ("file data", [{"role": "user", "content": [{"type": "input_file", "filename": "a.pdf", "file_data": "data:application/pdf;base64,QUJD"}]}],
     [("user", {"type": "file", "mime": "application/pdf", "data": "QUJD", "name": "a.pdf"})]),
    ("file url", [{"role": "user", "content": [{"type": "input_file", "file_url": "https://x/y.pdf"}]}], [("user", {"type": "file", "url": "https://x/y.pdf"})]),
    ("audio", [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "QUJD", "format": "wav"}}]}], [("user", {"type": "audio", "data": "QUJD", "format": "wav"})]),
    ("cache mark", [{"role": "user", "content": [{"type": "input_text", "text": "x", "prompt_cache_breakpoint": {"mode": "explicit"}}]}], [("user", a.text_part("x", {"type": "ephemeral"}))]),
    ("call keeps its JSON", [CALL], [("assistant", a.call_part("call_x1y2z3", "f", "{ \"a\": 1.0 }"))]),
    ("call arguments as object", [{**CALL, "arguments": {"a": 1}}], [("assistant", a.call_part("call_x1y2z3", "f", '{"a":1}'))]),
    ("namespaced call", [{**CALL, "namespace": "ns"}], [("assistant", a.call_part("call_x1y2z3", "f", "{ \"a\": 1.0 }", "function", "ns"))]),
    ("searched tool's own namespace", [{**CALL, "namespace": "f"}], [("assistant", {**a.call_part("call_x1y2z3", "f", "{ \"a\": 1.0 }"), "raw": {"namespace": "f"}})]),
    ("result string", [{"type": "function_call_output", "call_id": "c", "output": "r"}], [("user", a.result_part("c", [a.text_part("r")]))]),
    ("result parts", [{"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "r"}, {"type": "input_image", "image_url": "https://x"}]}],
     [("user", a.result_part("c", [a.text_part("r"), {"type": "image", "url": "https://x"}]))]),
    ("result object", [{"type": "function_call_output", "call_id": "c", "output": {"k": 1}}], [("user", a.result_part("c", [a.text_part('{"k":1}')]))]),
    ("m72 result without id", [{"type": "function_call_output", "output": "r"}], [("user", a.result_part("", [a.text_part("r")]))]),
    ("freeform call", [{"type": "custom_tool_call", "call_id": "c", "name": "apply_patch", "input": "*** é"}], [("assistant", a.call_part("c", "apply_patch", '{"input":"*** é"}', "custom"))]),
    ("freeform result", [{"type": "custom_tool_call_output", "call_id": "c", "output": "r"}], [("user", a.result_part("c", [a.text_part("r")], kind="custom"))]),
    ("shell", [{"type": "local_shell_call", "call_id": "c", "action": {"type": "exec", "command": ["ls"], "timeout_ms": 5}}],
     [("assistant", a.call_part("c", "local_shell", '{"command":["ls"],"timeout_ms":5}', "shell"))]),
    ("shell result", [{"type": "local_shell_call_output", "id": "c", "output": '{"stdout":"a"}'}], [("user", a.result_part("c", [a.text_part('{"stdout":"a"}')], kind="shell"))]),
    ("client search", [{"type": "tool_search_call", "call_id": "c", "execution": "client", "arguments": {"query": "x"}}], [("assistant", a.call_part("c", "tool_search", '{"query":"x"}', "search"))]),
    ("thinking", [{"type": "reasoning", "summary": [{"type": "summary_text", "text": "t"}], "encrypted_content": "gAAAAABo"}],
     [("assistant", {"type": "think", "text": "t", "seal": {"family": "openai", "model": "", "field": "encrypted", "data": "gAAAAABo"}})]),
    ("thinking in an envelope", [{"type": "reasoning", "summary": [{"type": "summary_text", "text": " t\n"}], "content": None,
                                  "encrypted_content": a.seal_envelope({"family": "anthropic", "model": "c", "field": "signature", "data": "Eq"})}],
     [("assistant", {"type": "think", "text": " t\n", "seal": {"family": "anthropic", "model": "c", "field": "signature", "data": "Eq"}})]),
    ("thinking in the open", [{"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "t"}]}], [("assistant", {"type": "think", "text": "t"})]),
    ("empty thinking", [{"type": "reasoning", "summary": []}], []),
    ("hosted", [{"type": "web_search_call", "id": "ws_1"}], [("assistant", {"type": "opaque", "family": "openai", "format": "responses", "data": {"type": "web_search_call", "id": "ws_1"}})]),
    ("approval", [{"type": "mcp_approval_response", "approve": True}],
     [("user", {"type": "opaque", "family": "openai", "format": "responses", "data": {"type": "mcp_approval_response", "approve": True}})]),
    ("server search", [{"type": "tool_search_call", "call_id": None, "execution": "server", "arguments": {}}],
     [("assistant", {"type": "opaque", "family": "openai", "format": "responses", "data": {"type": "tool_search_call", "call_id": None, "execution": "server", "arguments": {}}})]),
    ("picture", [{"type": "image_generation_call", "result": "QUJD", "output_format": "webp"}],
     [("user", {"type": "opaque", "family": "openai", "format": "responses", "data": {"type": "image_generation_call", "result": "QUJD", "output_format": "webp"},
                "image": {"type": "image", "mime": "image/webp", "data": "QUJD"}})]),
]


@pytest.mark.parametrize(("items", "expected"), [row[1:] for row in ITEMS], ids=[row[0] for row in ITEMS])
def test_each_item_is_read(items: list[Any], expected: list[Any]) -> None:
    body = body_of(input=items)
    before = copy.deepcopy(body)
    assert parts_of(a.responses_read_request(body)) == expected
    assert body == before


def test_leading_system_text_is_system_and_later_text_stays_in_place_m106() -> None:
    hub = read_items({"role": "developer", "content": "b"}, {"role": "system", "content": [{"type": "input_text", "text": "c"}]}, USER, {"role": "developer", "content": "late"}, USER,
                     instructions="a")
    assert [part["text"] for part in hub["system"]] == ["a", "b", "c"]
    assert [(role, part["text"]) for role, part in parts_of(hub)] == [("user", "hi"), ("system", "late"), ("user", "hi")]
    assert [item["role"] for item in write(hub)["input"]] == ["user", "developer", "user"]


def test_vendor_calls_are_functions_elsewhere_and_themselves_at_home() -> None:
    call = {"type": "apply_patch_call", "id": "apc_1", "call_id": "call_q1w2e3", "status": "completed", "operation": {"type": "delete_file", "path": "a"}}
    output = {"type": "apply_patch_call_output", "call_id": "call_q1w2e3", "status": "completed"}
    hub = read_items(USER, call, output)
    away = a.prepare(hub, a.profile_for("groq", "m"))
    assert [(part["type"], part.get("name"), part.get("args")) for _, part in parts_of(away)][1:] == [("call", "apply_patch", '{"type":"delete_file","path":"a"}'), ("result", None, None)]
    assert write(hub)["input"][1:] == [{name: value for name, value in call.items() if name != "id"}, output]


def test_compaction_goes_back_to_its_maker_and_is_missed_elsewhere() -> None:
    hub = read_items(USER, {"type": "compaction", "id": "cmp_1", "encrypted_content": "gAAAAABo"}, USER)
    for profile, items, names in ((OPENAI, ["message", "compaction", "message"], []), (PLAIN, ["message"], ["compaction"])):
        ready = a.prepare(hub, profile)
        assert ([item["type"] for item in a.responses_write_request(ready, profile)["input"]], ready["dropped"]) == (items, names)


# ---- Requests: tools

FUNCTION = {"type": "function", "name": "f", "description": "d", "parameters": SCHEMA, "strict": True}
TOOLS = [
    ("flat", FUNCTION, [{"name": "f", "kind": "function", "description": "d", "schema": SCHEMA, "strict": True}]),
    ("nested", {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}, [{"name": "f", "kind": "function", "schema": SCHEMA}]),
    ("m82 no schema", {"type": "function", "name": "f", "parameters": None}, [{"name": "f", "kind": "function"}]),
    ("m90 deferred", {"type": "function", "name": "f", "defer_loading": True}, [{"name": "f", "kind": "function", "defer": True, "raw": {"type": "function", "name": "f", "defer_loading": True}}]),
    ("custom text", {"type": "custom", "name": "p", "format": {"type": "text"}}, [{"name": "p", "kind": "custom"}]),
    ("custom grammar", {"type": "custom", "name": "p", "description": "d", "format": {"type": "grammar", "syntax": "lark", "definition": "x"}},
     [{"name": "p", "kind": "custom", "description": "d", "grammar": {"syntax": "lark", "definition": "x"}}]),
    ("namespace", {"type": "namespace", "name": "ns", "tools": [{"type": "function", "name": "f"}, {"type": "custom", "name": "p"}]},
     [{"name": "f", "kind": "function", "namespace": "ns"}, {"name": "p", "kind": "custom", "namespace": "ns"}]),
    ("hosted", {"type": "web_search"}, [{"name": "web_search", "kind": "hosted", "family": "openai", "raw": {"type": "web_search"}}]),
    ("server search", {"type": "tool_search"}, [{"name": "tool_search", "kind": "hosted", "family": "openai", "raw": {"type": "tool_search"}}]),
]


@pytest.mark.parametrize(("tool", "expected"), [row[1:] for row in TOOLS], ids=[row[0] for row in TOOLS])
def test_each_tool_is_read(tool: dict[str, Any], expected: list[Any]) -> None:
    assert read(tools=[tool])["tools"] == expected


def test_tools_that_clients_run_in_their_own_way_are_functions_with_a_mark() -> None:
    shell, search = read(tools=[{"type": "local_shell"}, {"type": "tool_search", "execution": "client", "description": "d", "parameters": SCHEMA}])["tools"]
    assert (shell["name"], shell["calls"], set(shell["schema"]["properties"])) == ("local_shell", "shell", {"command", "workdir", "timeout_ms", "env"})
    assert (search["name"], search["calls"], search["schema"]) == ("tool_search", "search", SCHEMA)


def test_m55_tools_inside_the_conversation_join_the_others_first_one_winning() -> None:
    hub = read_items({"type": "additional_tools", "role": "developer", "tools": [{**FUNCTION, "description": "second"}, {"type": "namespace", "name": "ns", "tools": [FUNCTION]}]},
                     USER, {"type": "tool_search_output", "call_id": "c", "execution": "client", "tools": [{"type": "function", "name": "found"}]}, tools=[FUNCTION])
    assert [(tool.get("namespace"), tool["name"], tool.get("description")) for tool in hub["tools"]] == [(None, "f", "d"), ("ns", "f", "d"), (None, "found", None)]
    assert "system" not in hub and parts_of(hub)[-1][1]["parts"] == [a.text_part("found")]


def test_tools_in_place_stay_there_for_the_vendor_and_are_listed_for_others() -> None:
    written = again(CODEX_NEW, a.profile_for("openai", "gpt-5.6-sol", "responses"))
    assert written["input"][0] == CODEX_NEW["input"][0]
    assert "tools" not in written and written["input"][2]["namespace"] == "clock"
    flat = again(CODEX_NEW, PLAIN)
    assert [tool["name"] for tool in flat["tools"]] == ["exec", "clock__now"]
    assert [item["type"] for item in flat["input"]] == ["message", "function_call", "function_call_output"]
    assert flat["input"][1]["name"] == "clock__now"


def test_m47_m88_m89_codex_tools_flattened_for_a_provider_that_knows_functions_only() -> None:
    hub = read_items(USER, {**CALL, "namespace": "multi_agent_v1", "name": "spawn"}, tools=CODEX["tools"])
    ready = a.prepare(hub, a.profile_for("groq", "m"))
    assert [tool["wire"] for tool in ready["tools"]] == ["exec_command", "multi_agent_v1__spawn", "apply_patch", "tool_search"]
    assert ready["tools"][2]["schema"]["required"] == ["input"] and "lark grammar" in ready["tools"][2]["description"]
    assert parts_of(ready)[1][1]["name"] == "multi_agent_v1__spawn"


# ---- Requests: hub to body (sections 3.4 and 3.5 of the reference)

THINK = {"type": "think", "text": "t", "seal": {"family": "openai", "model": "m", "field": "encrypted", "data": "gAAAAABo", "id": "rs_1"}}
REASONING = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "t"}], "encrypted_content": "gAAAAABo"}
WRITTEN = [
    ("instructions", hub_of(system=[a.text_part("a"), a.text_part("b")]), {"instructions": "a\n\nb"}),
    ("no empty system, nothing stored", hub_of(), {"instructions": None, "store": False, "include": ["reasoning.encrypted_content"], "stream": None}),
    ("stream", {**hub_of(), "stream": True}, {"stream": True}),
    ("stored on demand", hub_of(meta={"store": True}), {"store": True, "include": None}),
    ("max_out at least 16", hub_of(max_out=1), {"max_output_tokens": 16}),
    ("effort from Chat", hub_of(think={"mode": "on", "effort": "high"}), {"reasoning": {"effort": "high", "summary": "auto"}}),
    ("budget from Messages", hub_of(client="messages", think={"mode": "on", "budget": 8192}), {"reasoning": {"effort": "medium", "summary": "auto"}}),
    ("adaptive from Messages", hub_of(client="messages", think={"mode": "auto"}), {"reasoning": {"summary": "auto"}}),
    ("m99 effort alone from Messages", hub_of(client="messages", think={"effort": "high"}), {"reasoning": {"effort": "high"}}),
    ("thinking not shown", hub_of(client="messages", think={"mode": "auto", "effort": "low", "show": "omitted"}), {"reasoning": {"effort": "low"}}),
    ("thinking off", hub_of(think={"mode": "off"}), {"reasoning": {"effort": "none"}}),
    ("schema without a name", hub_of(format={"kind": "schema", "schema": SCHEMA}), {"text": {"format": {"type": "json_schema", "name": "output", "schema": SCHEMA}}}),
    ("json mode", hub_of(("user", a.text_part("json please")), format={"kind": "json"}), {"text": {"format": {"type": "json_object"}}}),
    ("verbosity", hub_of(meta={"verbosity": "low"}), {"text": {"verbosity": "low"}}),
    ("logprobs", hub_of(meta={"logprobs": True, "top_logprobs": 2}), {"top_logprobs": 2, "include": ["reasoning.encrypted_content", "message.output_text.logprobs"]}),
    ("user, cache key, tier, metadata", hub_of(meta={"user": "u", "cache_key": "k", "tier": "flex", "metadata": {"a": "b"}, "safety": "s"}),
     {"user": "u", "service_tier": "flex", "metadata": {"a": "b"}, "safety_identifier": "s"}),
    ("m108 session of Claude Code", hub_of(client="messages", meta={"user": '{"device_id":"d","account_uuid":"a","session_id":"0123456789"}'}), {"prompt_cache_key": "0123456789", "user": None}),
    ("stop strings", hub_of(stop=["END"]), {"stop": None}),
    ("m75 choice without tools", hub_of(choice={"mode": "any"}, parallel=False), {"tool_choice": None, "parallel_tool_calls": None, "tools": None}),
    ("strict told", hub_of(tools=[{"name": "f", "kind": "function", "schema": SCHEMA}]), {"tools": [{"type": "function", "name": "f", "parameters": SCHEMA, "strict": False}]}),
    ("m77 parallel", hub_of(tools=[{"name": "f", "kind": "function"}], parallel=False), {"parallel_tool_calls": False}),
    ("forced function", hub_of(tools=[{"name": "f", "kind": "function"}], choice={"mode": "tool", "name": "f"}), {"tool_choice": {"type": "function", "name": "f"}}),
    ("forced custom", hub_of(tools=[{"name": "p", "kind": "custom"}], choice={"mode": "tool", "name": "p", "kind": "custom"}),
     {"tool_choice": {"type": "custom", "name": "p"}, "tools": [{"type": "custom", "name": "p"}]}),
    ("any", hub_of(tools=[{"name": "f", "kind": "function"}], choice={"mode": "any"}), {"tool_choice": "required"}),
    ("allowed", hub_of(tools=[{"name": "f", "kind": "function"}], choice={"mode": "auto", "allowed": ["f"]}),
     {"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]}}),
    ("other vendor's search", hub_of(client="messages", tools=[{"name": "web_search", "kind": "hosted", "family": "anthropic", "raw": {
        "type": "web_search_20250305", "name": "web_search", "allowed_domains": ["x.org"]}}]), {"tools": [{"type": "web_search", "filters": {"allowed_domains": ["x.org"]}}]}),
]


@pytest.mark.parametrize(("hub", "expected"), [row[1:] for row in WRITTEN], ids=[row[0] for row in WRITTEN])
def test_each_field_is_written(hub: dict[str, Any], expected: dict[str, Any]) -> None:
    body = write(hub)
    assert {name: body.get(name) for name in expected} == expected
    assert json.dumps(write(hub)) == json.dumps(body)


U, RESULT = ("user", a.text_part("hi")), a.result_part("call_x1y2z3", [a.text_part("r")])
HUB_CALL = a.call_part("call_x1y2z3", "f", "{}")
HI = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]}
WRITTEN_ITEMS = [
    ("neighbours make one message", [("user", a.text_part("a"), {"type": "image", "url": "https://x", "detail": "original"}, {"type": "file", "mime": "application/pdf", "data": "QQ", "name": "n.pdf"})],
     [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_image", "image_url": "https://x", "detail": "original"},
                                                      {"type": "input_file", "filename": "n.pdf", "file_data": "data:application/pdf;base64,QQ"}]}]),
    ("file by url, text document", [("user", {"type": "file", "url": "https://x/a.pdf"}, {"type": "file", "text": "body", "title": "T"})],
     [{"type": "message", "role": "user", "content": [{"type": "input_file", "file_url": "https://x/a.pdf"}, {"type": "input_text", "text": '<document title="T">\nbody\n</document>'}]}]),
    ("assistant text is never input", [U, ("assistant", a.text_part("y"), {"type": "refusal", "text": "no"}), U],
     [HI, {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "y"}, {"type": "refusal", "refusal": "no"}]}, HI]),
    ("m96 m97 m98 reasoning, message, calls; no item ids", [U, ("assistant", THINK, HUB_CALL, a.text_part("y")), ("user", RESULT)],
     [HI, REASONING, {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "y"}]},
      {"type": "function_call", "call_id": "call_x1y2z3", "name": "f", "arguments": "{}"}, {"type": "function_call_output", "call_id": "call_x1y2z3", "output": "r"}]),
    ("m95 thinking with nothing after it", [U, ("assistant", a.text_part("y"), THINK), U], [HI, {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "y"}]}, HI]),
    ("m109 foreign thinking", [U, ("assistant", {"type": "think", "text": "t", "seal": {"family": "anthropic", "field": "signature", "data": "Eq"}}, a.text_part("y")), U],
     [HI, {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "y"}]}, HI]),
    ("m66 m68 results first, right after the call", [U, ("assistant", HUB_CALL), ("assistant", a.text_part("y")), ("user", a.text_part("more"), RESULT)],
     [HI, {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "y"}]}, {"type": "function_call", "call_id": "call_x1y2z3", "name": "f", "arguments": "{}"},
      {"type": "function_call_output", "call_id": "call_x1y2z3", "output": "r"}, {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "more"}]}]),
    ("m69 unanswered call", [U, ("assistant", HUB_CALL), U],
     [HI, {"type": "function_call", "call_id": "call_x1y2z3", "name": "f", "arguments": "{}"},
      {"type": "function_call_output", "call_id": "call_x1y2z3", "output": "[tool error] No result was recorded for this tool call."}, HI]),
    ("m70 m71 orphan result", [U, ("assistant", a.text_part("y")), ("user", RESULT)],
     [HI, {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "y"}]},
      {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "[tool result call_x1y2z3]\nr"}]}]),
    ("m73 image in a result", [U, ("assistant", HUB_CALL), ("user", a.result_part("call_x1y2z3", [a.text_part("r"), {"type": "image", "mime": "image/png", "data": "QQ"}]))],
     [HI, {"type": "function_call", "call_id": "call_x1y2z3", "name": "f", "arguments": "{}"},
      {"type": "function_call_output", "call_id": "call_x1y2z3", "output": [{"type": "input_text", "text": "r"}, {"type": "input_image", "image_url": "data:image/png;base64,QQ"}]}]),
    ("empty result, error result", [U, ("assistant", HUB_CALL), ("user", a.result_part("call_x1y2z3", [])), ("assistant", a.call_part("call_o9o8o7", "f", "")),
                                    ("user", a.result_part("call_o9o8o7", [a.text_part("bad")], error=True))],
     [HI, {"type": "function_call", "call_id": "call_x1y2z3", "name": "f", "arguments": "{}"}, {"type": "function_call_output", "call_id": "call_x1y2z3", "output": ""},
      {"type": "function_call", "call_id": "call_o9o8o7", "name": "f", "arguments": "{}"}, {"type": "function_call_output", "call_id": "call_o9o8o7", "output": "[tool error] bad"}]),
    ("freeform call whose result does not know", [U, ("assistant", a.call_part("call_x1y2z3", "p", '{"input":"x"}', "custom")), ("user", RESULT)],
     [HI, {"type": "custom_tool_call", "call_id": "call_x1y2z3", "name": "p", "input": "x"}, {"type": "custom_tool_call_output", "call_id": "call_x1y2z3", "output": "r"}]),
    ("m80 long ids on both sides", [U, ("assistant", a.call_part("c" * 80, "f", "{}")), ("user", a.result_part("c" * 80, [a.text_part("r")]))],
     [HI, {"type": "function_call", "call_id": a.fit_id("c" * 80, "openai64"), "name": "f", "arguments": "{}"},
      {"type": "function_call_output", "call_id": a.fit_id("c" * 80, "openai64"), "output": "r"}]),
    ("m64 m65 blank text", [U, ("assistant", a.text_part("  "), HUB_CALL), ("user", RESULT)],
     [HI, {"type": "function_call", "call_id": "call_x1y2z3", "name": "f", "arguments": "{}"}, {"type": "function_call_output", "call_id": "call_x1y2z3", "output": "r"}]),
]


@pytest.mark.parametrize(("turns", "items"), [row[1:] for row in WRITTEN_ITEMS], ids=[row[0] for row in WRITTEN_ITEMS])
def test_each_part_is_written(turns: list[Any], items: list[Any]) -> None:
    assert write(hub_of(*turns))["input"] == items


def test_a_model_that_cannot_think_is_not_asked_for_seals() -> None:
    assert "include" not in write(hub_of(), OLD_OPENAI)


def test_own_data_of_thinking_comes_back_byte_for_byte_m110() -> None:
    item = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "**A**\n\nx"}, {"type": "summary_text", "text": " y "}], "encrypted_content": "gAAAAABo+/="}
    assert again(body_of(input=[USER, item, CALL, {"type": "function_call_output", "call_id": "call_x1y2z3", "output": "r"}]))["input"][1] == item


def test_codex_body_comes_back_as_it_was_on_its_own_vendor() -> None:
    written = again(CODEX)
    assert written["tools"] == CODEX["tools"]
    assert written["instructions"] == "You are Codex." and written["input"][0]["role"] == "user"
    kept = ("model", "stream", "store", "tool_choice", "reasoning", "include", "prompt_cache_key", "client_metadata", "text")
    assert {name: written[name] for name in kept} == {name: CODEX[name] for name in kept}
    sent = [{name: value for name, value in item.items() if name not in ("content", "status")} if item["type"] != "message" else item for item in CODEX["input"][1:]]
    assert written["input"] == sent


# ---- Streams: events to deltas

E15 = [
    event("response.created", response={"id": "resp_7"}),
    event("response.output_item.added", output_index=0, item={"id": "rs_1", "type": "reasoning", "summary": []}),
    event("response.output_item.done", output_index=0, item={"id": "rs_1", "type": "reasoning", "summary": [{"type": "summary_text", "text": "**Look**"}], "encrypted_content": "gAAAAABo"}),
    event("response.output_item.added", output_index=1, item={"id": "fc_1", "type": "function_call", "call_id": "call_x1y2z3w4v5u6", "name": "Read", "arguments": ""}),
    event("response.function_call_arguments.done", output_index=1, item_id="fc_1", arguments='{"file_path":"/a"}'),
    event("response.output_item.done", output_index=1, item={"id": "fc_1", "type": "function_call", "call_id": "call_x1y2z3w4v5u6", "name": "Read", "arguments": '{"file_path":"/a"}'}),
    event("response.completed", response={"id": "resp_7", "usage": {"input_tokens": 120, "input_tokens_details": {"cached_tokens": 100}, "output_tokens": 30,
                                                                    "output_tokens_details": {"reasoning_tokens": 12}, "total_tokens": 150}}),
]


def test_E15_m2_summary_and_arguments_only_in_done_events() -> None:
    assert read_stream(*E15) == [
        {"delta": "start", "id": "resp_7", "model": ""}, {"delta": "think", "text": "**Look**"},
        {"delta": "seal", "family": "openai", "model": "gpt-5.5", "field": "encrypted", "data": "gAAAAABo", "id": "rs_1"},
        {"delta": "call", "id": "call_x1y2z3w4v5u6", "name": "Read", "kind": "function"}, {"delta": "args", "text": '{"file_path":"/a"}'},
        {"delta": "usage", "input": 120, "cached": 100, "output": 30, "reasoning": 12}, {"delta": "stop", "reason": "tool"}]


def test_E17_failure_before_content_tells_its_status_and_words() -> None:
    deltas = read_stream(event("response.created", response={"id": "resp_7"}), event("response.failed", response={"id": "resp_7", "status": "failed", "error": {
        "code": "rate_limit_exceeded", "message": "Rate limit reached. Please try again in 12s."}}))
    assert without_found(deltas)[1:] == [a.error_delta(429, "Rate limit reached. Please try again in 12s.", "rate_limit_exceeded", "rate_limit_error")]


def test_E18_refusal() -> None:
    deltas = read_stream(
        event("response.output_item.added", output_index=0, item={"id": "msg_1", "type": "message", "content": []}),
        event("response.content_part.added", item_id="msg_1", output_index=0, content_index=0, part={"type": "refusal", "refusal": ""}),
        event("response.refusal.delta", item_id="msg_1", output_index=0, content_index=0, delta="I can't help with that."),
        event("response.refusal.done", item_id="msg_1", output_index=0, content_index=0, refusal="I can't help with that."),
        event("response.completed", response={"id": "resp_7", "status": "completed", "usage": {"input_tokens": 9, "output_tokens": 7, "total_tokens": 16}}))
    assert kinds_of(deltas) == [("refuse", "I can't help with that."), ("stop", "refusal")]


def text_delta(text: str, index: int = 0, **more: Any) -> a.Event:
    return event("response.output_text.delta", output_index=index, content_index=0, delta=text, **more)


def item_done(index: int, **item: Any) -> a.Event:
    return event("response.output_item.done", output_index=index, item=item)


def added(index: int, **item: Any) -> a.Event:
    return event("response.output_item.added", output_index=index, item=item)


def args(text: str, index: int) -> a.Event:
    return event("response.function_call_arguments.delta", output_index=index, delta=text)


DONE = event("response.completed", response={"status": "completed"})
MESSAGE = {"type": "message", "id": "msg_1", "content": [{"type": "output_text", "text": "Hello", "annotations": []}]}
STREAMS = [
    ("text", [text_delta("Hel"), text_delta("lo"), item_done(0, **MESSAGE), DONE], [("text", "Hel"), ("text", "lo"), ("stop", "end")]),
    ("text only in done", [item_done(0, **MESSAGE), DONE], [("text", "Hello"), ("stop", "end")]),
    ("text longer in done", [text_delta("Hel"), item_done(0, **MESSAGE), DONE], [("text", "Hel"), ("text", "lo"), ("stop", "end")]),
    ("text other in done", [text_delta("Bye"), item_done(0, **MESSAGE), DONE], [("text", "Bye"), ("stop", "end")]),
    ("item only in the last event", [text_delta("Hello"), item_done(0, **MESSAGE), event("response.completed", response={"output": [MESSAGE, {
        "type": "function_call", "id": "fc_1", "call_id": "call_x1y2z3", "name": "f", "arguments": "{}"}]})], [("text", "Hello"), ("call", "f"), ("args", "{}"), ("stop", "tool")]),
    ("last event with other ids", [text_delta("Hello"), item_done(0, **MESSAGE), event("response.completed", response={"output": [{**MESSAGE, "id": "msg_other"}]})],
     [("text", "Hello"), ("stop", "end")]),
    ("ids that change", [added(0, type="function_call", id="a", call_id="call_x1y2z3", name="f", arguments=""), event("response.function_call_arguments.delta", output_index=0, item_id="b", delta="{}"),
                         item_done(0, type="function_call", id="c", call_id="call_x1y2z3", name="f", arguments="{}"), DONE], [("call", "f"), ("args", "{}"), ("stop", "tool")]),
    ("no output_index", [event("response.output_item.added", item={"type": "function_call", "id": "a", "call_id": "call_x1y2z3", "name": "f"}),
                         event("response.function_call_arguments.delta", item_id="a", delta="{}"), event("response.completed", response={"output": [
                             {"type": "function_call", "id": "a", "call_id": "call_x1y2z3", "name": "f", "arguments": "{}"}]})],
     [("call", "f"), ("args", "{}"), ("call", "f"), ("args", "{}"), ("stop", "tool")]),
    ("m18 interleaved calls", [added(0, type="function_call", call_id="call_aaaaaa", name="f"), added(1, type="function_call", call_id="call_bbbbbb", name="g"), args('{"b"', 1), args("{}", 0), args(":1}", 1), DONE],
     [("call", "f"), ("args", "{}"), ("call", "g"), ("args", '{"b"'), ("args", ":1}"), ("stop", "tool")]),
    ("m21 call without arguments", [added(0, type="function_call", call_id="call_x1y2z3", name="f"), item_done(0, type="function_call", call_id="call_x1y2z3", name="f", arguments=""), DONE],
     [("call", "f"), ("stop", "tool")]),
    ("m22 arguments as object", [item_done(0, type="function_call", call_id="call_x1y2z3", name="f", arguments={"a": 1}), DONE], [("call", "f"), ("args", '{"a":1}'), ("stop", "tool")]),
    ("freeform", [added(0, type="custom_tool_call", call_id="call_x1y2z3", name="p", input=""), event("response.custom_tool_call_input.delta", output_index=0, delta="*** "),
                  event("response.custom_tool_call_input.done", output_index=0, input="*** x"), item_done(0, type="custom_tool_call", call_id="call_x1y2z3", name="p", input="*** x"), DONE],
     [("call", "p"), ("args", '{"input":"*** x"}'), ("stop", "tool")]),
    ("shell", [item_done(0, type="local_shell_call", call_id="call_x1y2z3", action={"type": "exec", "command": ["ls"], "env": {}}), DONE],
     [("call", "local_shell"), ("args", '{"command":["ls"],"env":{}}'), ("stop", "tool")]),
    ("client search", [item_done(0, type="tool_search_call", call_id="call_x1y2z3", execution="client", arguments={"query": "x"}), DONE],
     [("call", "tool_search"), ("args", '{"query":"x"}'), ("stop", "tool")]),
    ("server search is opaque", [item_done(0, type="tool_search_call", call_id=None, execution="server", arguments={}), item_done(1, **MESSAGE), DONE],
     [("opaque", "openai"), ("text", "Hello"), ("stop", "end")]),
    ("two summary parts", [event("response.reasoning_summary_text.delta", output_index=0, summary_index=0, delta="a"), event("response.reasoning_summary_text.delta", output_index=0, summary_index=0, delta="b"),
                           event("response.reasoning_summary_text.delta", output_index=0, summary_index=1, delta="c"), item_done(0, type="reasoning", encrypted_content="gA"), DONE],
     [("think", "a"), ("think", "b"), ("think", "\n\nc"), ("seal", "encrypted"), ("stop", "end")]),
    ("open thinking without seal", [event("response.reasoning_text.delta", output_index=0, delta="a"), item_done(0, type="reasoning", content=[{"text": "a"}]), text_delta("x", 1), DONE],
     [("think", "a"), ("seal", "reasoning_text"), ("text", "x"), ("stop", "end")]),
    ("summary wins over open thinking", [event("response.reasoning_summary_text.delta", output_index=0, delta="s"), event("response.reasoning_text.delta", output_index=0, delta="a"), item_done(0, type="reasoning"), DONE],
     [("think", "s"), ("seal", "summary_text"), ("stop", "end")]),
    ("thinking closed after the text", [event("response.reasoning_text.delta", output_index=0, delta="a"), text_delta("x", 1), item_done(0, type="reasoning", content=[{"text": "a"}]), DONE],
     [("think", "a"), ("seal", "reasoning_text"), ("text", "x"), ("stop", "end")]),
    ("seal alone", [item_done(0, type="reasoning", summary=[], encrypted_content="gA"), text_delta("x", 1), DONE], [("seal", "encrypted"), ("text", "x"), ("stop", "end")]),
    ("citation", [text_delta("x"), event("response.output_text.annotation.added", output_index=0, annotation={"type": "url_citation", "url": "https://x", "title": "T", "start_index": 0, "end_index": 1}), DONE],
     [("text", "x"), ("cite", "https://x"), ("stop", "end")]),
    ("citation only in done", [text_delta("Hello"), item_done(0, type="message", content=[{"type": "output_text", "text": "Hello", "annotations": [{"type": "url_citation", "url": "https://x"}]}]), DONE],
     [("text", "Hello"), ("cite", "https://x"), ("stop", "end")]),
    ("m37 length while a call is open", [added(0, type="function_call", call_id="call_x1y2z3", name="f"), args('{"a', 0), event("response.incomplete", response={"incomplete_details": {"reason": "max_output_tokens"}})],
     [("call", "f"), ("args", '{"a'), ("stop", "length")]),
    ("filter", [text_delta("x"), event("response.incomplete", response={"incomplete_details": {"reason": "content_filter"}})], [("text", "x"), ("stop", "filter")]),
    ("incomplete for whatever reason is never whole", [text_delta("x"), event("response.incomplete", response={})], [("text", "x"), ("stop", "length")]),
    ("m30 cut", [text_delta("x")], [("text", "x"), ("error", 502)]),
    ("end mark is no end", [text_delta("x"), a.Event("", "[DONE]", b"")], [("text", "x"), ("error", 502)]),
    ("m32 nothing at all", [event("response.created", response={"id": "r"})], [("error", 502)]),
    ("cancelled", [text_delta("x"), event("response.cancelled", response={"status": "cancelled"})], [("text", "x"), ("error", 502)]),
    ("error at top level", [event("error", code="server_is_overloaded", message="m")], [("error", 503)]),
    ("error inside", [event("error", error={"code": "insufficient_quota", "message": "m"})], [("error", 429)]),
    ("m115 overflow", [event("response.failed", response={"error": {"code": "context_length_exceeded", "message": "m"}})], [("error", 400)]),
    ("invalid prompt", [event("response.failed", response={"error": {"code": "invalid_prompt", "message": "m"}})], [("error", 400)]),
    ("not JSON", [text_delta("x"), a.Event("", "<html>", b"")], [("text", "x"), ("error", 502)]),
    ("after the end", [text_delta("x"), DONE, text_delta("y"), event("error", message="late")], [("text", "x"), ("stop", "end")]),
    ("unknown events, keep-alives", [event("keepalive"), event("response.frobnicated", delta="x"), text_delta("x"), event("response.in_progress", response={}), DONE], [("text", "x"), ("stop", "end")]),
]


@pytest.mark.parametrize(("events", "expected"), [row[1:] for row in STREAMS], ids=[row[0] for row in STREAMS])
def test_each_stream_is_read(events: list[a.Event], expected: list[Any]) -> None:
    stream = reader()
    deltas = [delta for one in events for delta in stream.feed(one)] + stream.close()
    assert kinds_of(deltas) == expected
    assert stream.close() == []


def test_names_come_back_as_the_client_knows_them_m46_m48_m54() -> None:
    hub = read(tools=[{"type": "namespace", "name": "ns", "tools": [{"type": "function", "name": "f"}]}, {"type": "custom", "name": "p"},
                      {"type": "tool_search", "execution": "client", "parameters": SCHEMA}])
    names = a.name_map(hub, PLAIN)
    deltas = read_stream(item_done(0, type="function_call", call_id="call_aaaaaa", name="ns__f", arguments="{}"),
                         item_done(1, type="function_call", call_id="call_bbbbbb", name="p", arguments='{"input":"*** x"}'),
                         item_done(2, type="function_call", call_id="call_cccccc", name="tool_search", arguments='{"query":"q"}'), DONE, profile=PLAIN, names=names)
    events = write_stream(deltas, tools=[])
    items = [one["item"] for one in events if one["type"] == "response.output_item.done"]
    assert [(item["type"], item.get("name"), item.get("namespace")) for item in items] == [("function_call", "f", "ns"), ("custom_tool_call", "p", None), ("tool_search_call", None, None)]
    assert (items[1]["input"], items[2]["arguments"], items[2]["execution"]) == ("*** x", {"query": "q"}, "client")


def test_a_whole_answer_is_a_stream_of_one() -> None:
    body = {"id": "resp_7", "model": "m", "status": "completed", "output": [one_done["item"] for one_done in (json.loads(one.data) for one in E15) if one_done["type"] == "response.output_item.done"],
            "usage": json.loads(E15[-1].data)["response"]["usage"]}
    source = a.Source(profile=OPENAI, seed="s")
    assert [delta for delta in a.responses_read_answer(body, source) if delta["delta"] != "start"] == [delta for delta in read_stream(*E15) if delta["delta"] != "start"]


ANSWERS = [
    ("failed", {"status": "failed", "error": {"code": "server_error", "message": "m"}, "output": []}, [("error", 502)]),
    ("error body", {"error": {"message": "m", "code": "rate_limit_exceeded"}}, [("error", 429)]),
    ("error as text", {"code": "invalid-argument", "error": "no key"}, [("error", 502)]),
    ("not ready", {"status": "queued", "output": []}, [("error", 502)]),
    ("incomplete", {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}, "output": [MESSAGE]}, [("text", "Hello"), ("stop", "length")]),
    ("no status", {"output": [MESSAGE]}, [("text", "Hello"), ("stop", "end")]),
]


@pytest.mark.parametrize(("body", "expected"), [row[1:] for row in ANSWERS], ids=[row[0] for row in ANSWERS])
def test_each_answer_is_read(body: dict[str, Any], expected: list[Any]) -> None:
    assert kinds_of(a.responses_read_answer(body, a.Source(profile=OPENAI))) == expected


# ---- Streams: deltas to events

#: The frames that the reference prints for Responses clients, envelopes and all; ids count from 1, the rest of the response object is left out.
EXAMPLES = {
    "E1": r"""
{"type":"response.created","sequence_number":0,"response":{"id":"resp_01","status":"in_progress","output":[],"usage":null}}
{"type":"response.in_progress","sequence_number":1,"response":{"id":"resp_01","status":"in_progress","output":[],"usage":null}}
{"type":"response.output_item.added","sequence_number":2,"output_index":0,"item":{"id":"msg_01","type":"message","status":"in_progress","role":"assistant","content":[]}}
{"type":"response.content_part.added","sequence_number":3,"item_id":"msg_01","output_index":0,"content_index":0,"part":{"type":"output_text","text":"","annotations":[],"logprobs":[]}}
{"type":"response.output_text.delta","sequence_number":4,"item_id":"msg_01","output_index":0,"content_index":0,"delta":"Hel","logprobs":[]}
{"type":"response.output_text.delta","sequence_number":5,"item_id":"msg_01","output_index":0,"content_index":0,"delta":"lo","logprobs":[]}
{"type":"response.output_text.done","sequence_number":6,"item_id":"msg_01","output_index":0,"content_index":0,"text":"Hello","logprobs":[]}
{"type":"response.content_part.done","sequence_number":7,"item_id":"msg_01","output_index":0,"content_index":0,"part":{"type":"output_text","text":"Hello","annotations":[],"logprobs":[]}}
{"type":"response.output_item.done","sequence_number":8,"output_index":0,"item":{"id":"msg_01","type":"message","status":"completed","role":"assistant","content":[{"type":"output_text","text":"Hello","annotations":[],"logprobs":[]}]}}
{"type":"response.completed","sequence_number":9,"response":{"id":"resp_01","status":"completed","output":[{"id":"msg_01","type":"message","status":"completed","role":"assistant","content":[{"type":"output_text","text":"Hello","annotations":[],"logprobs":[]}]}],"usage":{"input_tokens":120,"input_tokens_details":{"cached_tokens":100,"cache_write_tokens":0},"output_tokens":18,"output_tokens_details":{"reasoning_tokens":0},"total_tokens":138}}}
""",
    "E3": r"""
{"type":"response.output_item.added","sequence_number":2,"output_index":0,"item":{"id":"fc_01","type":"function_call","status":"in_progress","call_id":"call_AAAAAAAAAAAA","name":"f","arguments":""}}
{"type":"response.function_call_arguments.delta","sequence_number":3,"item_id":"fc_01","output_index":0,"delta":"{\"a\""}
{"type":"response.function_call_arguments.delta","sequence_number":4,"item_id":"fc_01","output_index":0,"delta":":1}"}
{"type":"response.function_call_arguments.done","sequence_number":5,"item_id":"fc_01","output_index":0,"name":"f","arguments":"{\"a\":1}"}
{"type":"response.output_item.done","sequence_number":6,"output_index":0,"item":{"id":"fc_01","type":"function_call","status":"completed","call_id":"call_AAAAAAAAAAAA","name":"f","arguments":"{\"a\":1}"}}
{"type":"response.output_item.added","sequence_number":7,"output_index":1,"item":{"id":"fc_02","type":"function_call","status":"in_progress","call_id":"call_BBBBBBBBBBBB","name":"g","arguments":""}}
{"type":"response.function_call_arguments.delta","sequence_number":8,"item_id":"fc_02","output_index":1,"delta":"{\"b\":2}"}
{"type":"response.function_call_arguments.done","sequence_number":9,"item_id":"fc_02","output_index":1,"name":"g","arguments":"{\"b\":2}"}
{"type":"response.output_item.done","sequence_number":10,"output_index":1,"item":{"id":"fc_02","type":"function_call","status":"completed","call_id":"call_BBBBBBBBBBBB","name":"g","arguments":"{\"b\":2}"}}
{"type":"response.completed","sequence_number":11,"response":{"id":"resp_01","status":"completed","output":[{"id":"fc_01","type":"function_call","status":"completed","call_id":"call_AAAAAAAAAAAA","name":"f","arguments":"{\"a\":1}"},{"id":"fc_02","type":"function_call","status":"completed","call_id":"call_BBBBBBBBBBBB","name":"g","arguments":"{\"b\":2}"}],"usage":{"input_tokens":25,"input_tokens_details":{"cached_tokens":0,"cache_write_tokens":0},"output_tokens":9,"output_tokens_details":{"reasoning_tokens":0},"total_tokens":34}}}
""",
    "E6": r"""
{"type":"response.output_item.added","sequence_number":2,"output_index":0,"item":{"id":"rs_01","type":"reasoning","summary":[],"encrypted_content":null}}
{"type":"response.reasoning_summary_part.added","sequence_number":3,"item_id":"rs_01","output_index":0,"summary_index":0,"part":{"type":"summary_text","text":""}}
{"type":"response.reasoning_summary_text.delta","sequence_number":4,"item_id":"rs_01","output_index":0,"summary_index":0,"delta":"Need the "}
{"type":"response.reasoning_summary_text.delta","sequence_number":5,"item_id":"rs_01","output_index":0,"summary_index":0,"delta":"file."}
{"type":"response.reasoning_summary_text.done","sequence_number":6,"item_id":"rs_01","output_index":0,"summary_index":0,"text":"Need the file."}
{"type":"response.reasoning_summary_part.done","sequence_number":7,"item_id":"rs_01","output_index":0,"summary_index":0,"part":{"type":"summary_text","text":"Need the file."}}
{"type":"response.output_item.done","sequence_number":8,"output_index":0,"item":{"id":"rs_01","type":"reasoning","summary":[{"type":"summary_text","text":"Need the file."}],"encrypted_content":"aic1.eyJvIjoiY2VyZWJyYXMiLCJtIjoicXdlbi0zIiwiZiI6InJlYXNvbmluZ19jb250ZW50In0"}}
{"type":"response.output_item.added","sequence_number":9,"output_index":1,"item":{"id":"msg_02","type":"message","status":"in_progress","role":"assistant","content":[]}}
{"type":"response.content_part.added","sequence_number":10,"item_id":"msg_02","output_index":1,"content_index":0,"part":{"type":"output_text","text":"","annotations":[],"logprobs":[]}}
{"type":"response.output_text.delta","sequence_number":11,"item_id":"msg_02","output_index":1,"content_index":0,"delta":"Reading.","logprobs":[]}
{"type":"response.output_text.done","sequence_number":12,"item_id":"msg_02","output_index":1,"content_index":0,"text":"Reading.","logprobs":[]}
{"type":"response.content_part.done","sequence_number":13,"item_id":"msg_02","output_index":1,"content_index":0,"part":{"type":"output_text","text":"Reading.","annotations":[],"logprobs":[]}}
{"type":"response.output_item.done","sequence_number":14,"output_index":1,"item":{"id":"msg_02","type":"message","status":"completed","role":"assistant","content":[{"type":"output_text","text":"Reading.","annotations":[],"logprobs":[]}]}}
{"type":"response.output_item.added","sequence_number":15,"output_index":2,"item":{"id":"fc_03","type":"function_call","status":"in_progress","call_id":"call_FFFFFFFFFFFF","name":"Read","arguments":""}}
{"type":"response.function_call_arguments.delta","sequence_number":16,"item_id":"fc_03","output_index":2,"delta":"{}"}
{"type":"response.function_call_arguments.done","sequence_number":17,"item_id":"fc_03","output_index":2,"name":"Read","arguments":"{}"}
{"type":"response.output_item.done","sequence_number":18,"output_index":2,"item":{"id":"fc_03","type":"function_call","status":"completed","call_id":"call_FFFFFFFFFFFF","name":"Read","arguments":"{}"}}
{"type":"response.completed","sequence_number":19,"response":{"id":"resp_01","status":"completed","output":[{"id":"rs_01","type":"reasoning","summary":[{"type":"summary_text","text":"Need the file."}],"encrypted_content":"aic1.eyJvIjoiY2VyZWJyYXMiLCJtIjoicXdlbi0zIiwiZiI6InJlYXNvbmluZ19jb250ZW50In0"},{"id":"msg_02","type":"message","status":"completed","role":"assistant","content":[{"type":"output_text","text":"Reading.","annotations":[],"logprobs":[]}]},{"id":"fc_03","type":"function_call","status":"completed","call_id":"call_FFFFFFFFFFFF","name":"Read","arguments":"{}"}],"usage":{"input_tokens":120,"input_tokens_details":{"cached_tokens":100,"cache_write_tokens":0},"output_tokens":18,"output_tokens_details":{"reasoning_tokens":0},"total_tokens":138}}}
""",
    "E9": r"""
{"type":"response.output_item.added","sequence_number":2,"output_index":0,"item":{"id":"msg_01","type":"message","status":"in_progress","role":"assistant","content":[]}}
{"type":"response.content_part.added","sequence_number":3,"item_id":"msg_01","output_index":0,"content_index":0,"part":{"type":"output_text","text":"","annotations":[],"logprobs":[]}}
{"type":"response.output_text.delta","sequence_number":4,"item_id":"msg_01","output_index":0,"content_index":0,"delta":"Once","logprobs":[]}
{"type":"response.output_text.done","sequence_number":5,"item_id":"msg_01","output_index":0,"content_index":0,"text":"Once","logprobs":[]}
{"type":"response.content_part.done","sequence_number":6,"item_id":"msg_01","output_index":0,"content_index":0,"part":{"type":"output_text","text":"Once","annotations":[],"logprobs":[]}}
{"type":"response.output_item.done","sequence_number":7,"output_index":0,"item":{"id":"msg_01","type":"message","status":"incomplete","role":"assistant","content":[{"type":"output_text","text":"Once","annotations":[],"logprobs":[]}]}}
{"type":"response.incomplete","sequence_number":8,"response":{"id":"resp_01","status":"incomplete","incomplete_details":{"reason":"max_output_tokens"},"output":[{"id":"msg_01","type":"message","status":"incomplete","role":"assistant","content":[{"type":"output_text","text":"Once","annotations":[],"logprobs":[]}]}],"usage":{"input_tokens":120,"input_tokens_details":{"cached_tokens":100,"cache_write_tokens":0},"output_tokens":18,"output_tokens_details":{"reasoning_tokens":0},"total_tokens":138}}}
""",
    "E10": r"""
{"type":"response.output_item.added","sequence_number":2,"output_index":0,"item":{"id":"msg_01","type":"message","status":"in_progress","role":"assistant","content":[]}}
{"type":"response.content_part.added","sequence_number":3,"item_id":"msg_01","output_index":0,"content_index":0,"part":{"type":"output_text","text":"","annotations":[],"logprobs":[]}}
{"type":"response.output_text.delta","sequence_number":4,"item_id":"msg_01","output_index":0,"content_index":0,"delta":"Hel","logprobs":[]}
{"type":"response.failed","sequence_number":5,"response":{"id":"resp_01","status":"failed","error":{"code":"server_error","message":"Provider disconnected"},"output":[],"usage":null}}
""",
    "E11": r"""
{"type":"response.output_item.added","sequence_number":2,"output_index":0,"item":{"id":"msg_01","type":"message","status":"in_progress","role":"assistant","content":[]}}
{"type":"response.content_part.added","sequence_number":3,"item_id":"msg_01","output_index":0,"content_index":0,"part":{"type":"output_text","text":"","annotations":[],"logprobs":[]}}
{"type":"response.output_text.delta","sequence_number":4,"item_id":"msg_01","output_index":0,"content_index":0,"delta":"Hel","logprobs":[]}
{"type":"response.failed","sequence_number":5,"response":{"id":"resp_01","status":"failed","error":{"code":"server_error","message":"upstream closed the stream before finishing"},"output":[],"usage":null}}
""",
    "E13": r"""
{"type":"response.output_item.added","sequence_number":2,"output_index":0,"item":{"id":"ctc_01","type":"custom_tool_call","status":"in_progress","call_id":"call_GGGGGGGGGGGG","name":"apply_patch","input":""}}
{"type":"response.custom_tool_call_input.delta","sequence_number":3,"item_id":"ctc_01","output_index":0,"delta":"*** Begin Patch\n*** End Patch\n"}
{"type":"response.custom_tool_call_input.done","sequence_number":4,"item_id":"ctc_01","output_index":0,"input":"*** Begin Patch\n*** End Patch\n"}
{"type":"response.output_item.done","sequence_number":5,"output_index":0,"item":{"id":"ctc_01","type":"custom_tool_call","status":"completed","call_id":"call_GGGGGGGGGGGG","name":"apply_patch","input":"*** Begin Patch\n*** End Patch\n"}}
{"type":"response.completed","sequence_number":6,"response":{"id":"resp_01","status":"completed","output":[{"id":"ctc_01","type":"custom_tool_call","status":"completed","call_id":"call_GGGGGGGGGGGG","name":"apply_patch","input":"*** Begin Patch\n*** End Patch\n"}],"usage":{"input_tokens":120,"input_tokens_details":{"cached_tokens":100,"cache_write_tokens":0},"output_tokens":18,"output_tokens_details":{"reasoning_tokens":0},"total_tokens":138}}}
""",
    "E14": r"""
{"type":"response.output_item.added","sequence_number":2,"output_index":0,"item":{"id":"rs_01","type":"reasoning","summary":[],"encrypted_content":null}}
{"type":"response.reasoning_summary_part.added","sequence_number":3,"item_id":"rs_01","output_index":0,"summary_index":0,"part":{"type":"summary_text","text":""}}
{"type":"response.reasoning_summary_text.delta","sequence_number":4,"item_id":"rs_01","output_index":0,"summary_index":0,"delta":"Need file."}
{"type":"response.reasoning_summary_text.done","sequence_number":5,"item_id":"rs_01","output_index":0,"summary_index":0,"text":"Need file."}
{"type":"response.reasoning_summary_part.done","sequence_number":6,"item_id":"rs_01","output_index":0,"summary_index":0,"part":{"type":"summary_text","text":"Need file."}}
{"type":"response.output_item.done","sequence_number":7,"output_index":0,"item":{"id":"rs_01","type":"reasoning","summary":[{"type":"summary_text","text":"Need file."}],"encrypted_content":"aic1.eyJvIjoiYW50aHJvcGljIiwibSI6ImNsYXVkZS1vcHVzLTUiLCJmIjoic2lnbmF0dXJlIiwiZCI6IkVxUUJDa1lJIn0"}}
{"type":"response.output_item.added","sequence_number":8,"output_index":1,"item":{"id":"msg_02","type":"message","status":"in_progress","role":"assistant","content":[]}}
{"type":"response.content_part.added","sequence_number":9,"item_id":"msg_02","output_index":1,"content_index":0,"part":{"type":"output_text","text":"","annotations":[],"logprobs":[]}}
{"type":"response.output_text.delta","sequence_number":10,"item_id":"msg_02","output_index":1,"content_index":0,"delta":"Reading.","logprobs":[]}
{"type":"response.output_text.done","sequence_number":11,"item_id":"msg_02","output_index":1,"content_index":0,"text":"Reading.","logprobs":[]}
{"type":"response.content_part.done","sequence_number":12,"item_id":"msg_02","output_index":1,"content_index":0,"part":{"type":"output_text","text":"Reading.","annotations":[],"logprobs":[]}}
{"type":"response.output_item.done","sequence_number":13,"output_index":1,"item":{"id":"msg_02","type":"message","status":"completed","role":"assistant","content":[{"type":"output_text","text":"Reading.","annotations":[],"logprobs":[]}]}}
{"type":"response.output_item.added","sequence_number":14,"output_index":2,"item":{"id":"fc_03","type":"function_call","status":"in_progress","call_id":"toolu_01Ab","name":"Read","arguments":""}}
{"type":"response.function_call_arguments.delta","sequence_number":15,"item_id":"fc_03","output_index":2,"delta":"{\"file_path\":"}
{"type":"response.function_call_arguments.delta","sequence_number":16,"item_id":"fc_03","output_index":2,"delta":"\"/a\"}"}
{"type":"response.function_call_arguments.done","sequence_number":17,"item_id":"fc_03","output_index":2,"name":"Read","arguments":"{\"file_path\":\"/a\"}"}
{"type":"response.output_item.done","sequence_number":18,"output_index":2,"item":{"id":"fc_03","type":"function_call","status":"completed","call_id":"toolu_01Ab","name":"Read","arguments":"{\"file_path\":\"/a\"}"}}
{"type":"response.output_item.added","sequence_number":19,"output_index":3,"item":{"id":"fc_04","type":"function_call","status":"in_progress","call_id":"toolu_02Cd","name":"now","arguments":""}}
{"type":"response.function_call_arguments.delta","sequence_number":20,"item_id":"fc_04","output_index":3,"delta":"{}"}
{"type":"response.function_call_arguments.done","sequence_number":21,"item_id":"fc_04","output_index":3,"name":"now","arguments":"{}"}
{"type":"response.output_item.done","sequence_number":22,"output_index":3,"item":{"id":"fc_04","type":"function_call","status":"completed","call_id":"toolu_02Cd","name":"now","arguments":"{}"}}
{"type":"response.completed","sequence_number":23,"response":{"id":"resp_01","status":"completed","output":[{"id":"rs_01","type":"reasoning","summary":[{"type":"summary_text","text":"Need file."}],"encrypted_content":"aic1.eyJvIjoiYW50aHJvcGljIiwibSI6ImNsYXVkZS1vcHVzLTUiLCJmIjoic2lnbmF0dXJlIiwiZCI6IkVxUUJDa1lJIn0"},{"id":"msg_02","type":"message","status":"completed","role":"assistant","content":[{"type":"output_text","text":"Reading.","annotations":[],"logprobs":[]}]},{"id":"fc_03","type":"function_call","status":"completed","call_id":"toolu_01Ab","name":"Read","arguments":"{\"file_path\":\"/a\"}"},{"id":"fc_04","type":"function_call","status":"completed","call_id":"toolu_02Cd","name":"now","arguments":"{}"}],"usage":{"input_tokens":120,"input_tokens_details":{"cached_tokens":100,"cache_write_tokens":8},"output_tokens":40,"output_tokens_details":{"reasoning_tokens":9},"total_tokens":160}}}
""",
    "E16": r"""
{"type":"response.failed","sequence_number":5,"response":{"id":"resp_01","status":"failed","error":{"code":"server_is_overloaded","message":"Overloaded"},"output":[],"usage":null}}
""",}
OPUS = {"family": "anthropic", "model": "claude-opus-5", "field": "signature", "data": "EqQBCkYI"}
EXAMPLE_DELTAS = {
    "E1": [START, a.text_delta("Hel"), a.text_delta("lo"), a.usage_delta(USAGE), a.stop_delta("end")],
    "E3": [START, *CALL_A, a.call_delta("call_BBBBBBBBBBBB", "g"), a.args_delta('{"b":2}'), a.usage_delta({"input": 25, "output": 9, "estimated": True}), a.stop_delta("tool")],
    "E6": [START, a.think_delta("Need the "), a.think_delta("file."), a.seal_delta(CEREBRAS), a.text_delta("Reading."), a.call_delta("call_FFFFFFFFFFFF", "Read"), a.args_delta("{}"),
           a.usage_delta(USAGE), a.stop_delta("tool")],
    "E9": [START, a.text_delta("Once"), a.usage_delta(USAGE), a.stop_delta("length")],
    "E10": [START, a.text_delta("Hel"), a.error_delta(502, "Provider disconnected")],
    "E11": [START, a.text_delta("Hel"), a.error_delta(502, "upstream closed the stream before finishing", "server_error")],
    "E13": [START, a.call_delta("call_GGGGGGGGGGGG", "apply_patch", "custom"), a.args_delta('{"input":"*** Begin'), a.args_delta(' Patch\\n*** End Patch\\n"}'), a.usage_delta(USAGE), a.stop_delta("tool")],
    "E14": [START, a.think_delta("Need file."), a.seal_delta(OPUS), a.text_delta("Reading."), a.call_delta("toolu_01Ab", "Read"), a.args_delta('{"file_path":'), a.args_delta('"/a"}'),
            a.call_delta("toolu_02Cd", "now"), a.usage_delta({"input": 120, "cached": 100, "cache_write": 8, "output": 40, "reasoning": 9}), a.stop_delta("tool")],
    "E16": [START, a.text_delta("Hel"), a.error_delta(503, "Overloaded", "server_is_overloaded")],
}


def plain_ids(events: list[Any]) -> list[Any]:
    """The events with item and answer ids counted in order of appearance, and no field that the reference leaves out."""
    text, seen = json.dumps(events), {}
    for prefix in ("resp_", "msg_", "rs_", "fc_", "ctc_"):
        for word in text.split('"'):
            if word.startswith(prefix):
                seen.setdefault(word, f"{prefix}#{len(seen)}")
    for word in sorted(seen, key=len, reverse=True):
        text = text.replace(f'"{word}"', f'"{seen[word]}"')
    return json.loads(text)


def only(expected: Any, found: Any) -> Any:
    """`found` without the fields of a response object that `expected` does not name."""
    return [{**event_found, "response": {name: event_found["response"].get(name) for name in event_expected["response"]}} if "response" in event_expected else event_found
            for event_expected, event_found in zip(expected, found)]


@pytest.mark.parametrize("name", EXAMPLES)
def test_worked_examples(name: str) -> None:
    expected = [json.loads(line) for line in EXAMPLES[name].split("\n") if line]
    found = write_stream(EXAMPLE_DELTAS[name])
    whole = name in ("E1",)
    if not whole and expected[0]["sequence_number"]:
        assert [names_of(found)[:2]] == [["created", "in_progress"]]
        found = found[expected[0]["sequence_number"]:]
    assert len(found) == len(expected)
    assert plain_ids(only(expected, found)) == plain_ids(expected)


def test_the_fast_way_gives_the_same_bytes_as_the_slow_one() -> None:
    for text in ('a"\\\n\u2028é😀\ud83d', "x" * 5000, "\x00</script>"):
        for first, second in ((a.text_delta("x"), a.text_delta(text)), (a.refuse_delta("x"), a.refuse_delta(text)), (a.think_delta("x"), a.think_delta(text)), (a.call_delta("call_x1y2z3", "f"), a.args_delta(text))):
            writer = a.ResponsesStreamWriter(asked())
            writer.feed(START), writer.feed(first)
            (piece,) = writer.feed(second)
            told = json.loads(a.read_frame(piece).data)
            assert piece == a.write_event(told, told["type"]) and told["delta"] == text


WRITTEN_STREAMS = [
    ("m42 m44 reasoning and call", [a.think_delta("t"), a.seal_delta(CEREBRAS), *CALL_A, a.stop_delta("tool")],
     "created in_progress output_item.added reasoning_summary_part.added reasoning_summary_text.delta reasoning_summary_text.done reasoning_summary_part.done output_item.done "
     "output_item.added function_call_arguments.delta function_call_arguments.delta function_call_arguments.done output_item.done completed"),
    ("m43 call without arguments", [a.call_delta("call_x1y2z3", "f"), a.stop_delta("tool")],
     "created in_progress output_item.added function_call_arguments.delta function_call_arguments.done output_item.done completed"),
    ("m45 text then call", [a.text_delta("x"), *CALL_A, a.stop_delta("tool")],
     "created in_progress output_item.added content_part.added output_text.delta output_text.done content_part.done output_item.done "
     "output_item.added function_call_arguments.delta function_call_arguments.delta function_call_arguments.done output_item.done completed"),
    ("refusal", [a.refuse_delta("no"), a.stop_delta("refusal")],
     "created in_progress output_item.added content_part.added refusal.delta refusal.done content_part.done output_item.done completed"),
    ("refusal told in the details", [a.stop_delta("refusal", details={"explanation": "no"})],
     "created in_progress output_item.added content_part.added refusal.delta refusal.done content_part.done output_item.done completed"),
    ("refusal without a word", [a.stop_delta("refusal")], "created in_progress incomplete"),
    ("refusal already said as text", [a.text_delta("no"), a.stop_delta("refusal")],
     "created in_progress output_item.added content_part.added output_text.delta output_text.done content_part.done output_item.done completed"),
    ("seal alone", [a.seal_delta({**CEREBRAS, "data": "d"}), a.stop_delta("end")], "created in_progress output_item.added output_item.done completed"),
    ("m54 search", [a.call_delta("call_x1y2z3", "tool_search", "search"), a.args_delta('{"query":"x"}'), a.stop_delta("tool")], "created in_progress output_item.added output_item.done completed"),
    ("m51 cut inside a call", [*CALL_A[:2], a.error_delta(502, "cut")], "created in_progress output_item.added function_call_arguments.delta failed"),
    ("m51 cut without a word", CALL_A[:2], "created in_progress output_item.added function_call_arguments.delta failed"),
    ("length inside a call", [*CALL_A[:2], a.stop_delta("length")],
     "created in_progress output_item.added function_call_arguments.delta function_call_arguments.done output_item.done incomplete"),
    ("length inside a freeform call", [a.text_delta("x"), a.call_delta("call_x1y2z3", "p", "custom"), a.args_delta('{"input":"*'), a.stop_delta("length")],
     "created in_progress output_item.added content_part.added output_text.delta output_text.done content_part.done output_item.done incomplete"),
    ("length after a whole freeform call", [a.call_delta("call_x1y2z3", "p", "custom"), a.args_delta('{"input":"*"}'), a.stop_delta("length")],
     "created in_progress output_item.added custom_tool_call_input.delta custom_tool_call_input.done output_item.done incomplete"),
    ("citation", [a.text_delta("x"), a.cite_delta("https://x", "T", start=0, end=1), a.stop_delta("end")],
     "created in_progress output_item.added content_part.added output_text.delta output_text.annotation.added output_text.done content_part.done output_item.done completed"),
    ("own opaque, foreign opaque, note", [a.opaque_delta("openai", {"type": "web_search_call", "id": "ws_1"}), a.opaque_delta("anthropic", {"type": "server_tool_use"}),
                                          a.text_delta("x"), a.stop_delta("end")],
     "created in_progress output_item.added output_item.done output_item.added content_part.added output_text.delta output_text.done content_part.done output_item.done completed"),
    ("nothing", [a.stop_delta("length")], "created in_progress incomplete"),
    ("context", [a.text_delta("x"), a.stop_delta("context")], "created in_progress output_item.added content_part.added output_text.delta output_text.done content_part.done output_item.done incomplete"),
    ("after the end", [a.stop_delta("end"), a.error_delta(502, "late")], "created in_progress completed"),
]


@pytest.mark.parametrize(("deltas", "names"), [row[1:] for row in WRITTEN_STREAMS], ids=[row[0] for row in WRITTEN_STREAMS])
def test_each_stream_is_written(deltas: list[Any], names: str) -> None:
    events = write_stream(deltas)
    assert names_of(events) == names.split()
    indexes = [one["output_index"] for one in events if one["type"] == "response.output_item.added"]
    assert indexes == list(range(len(indexes)))
    items = {one["output_index"]: one["item"]["id"] for one in events if one["type"] == "response.output_item.added"}
    assert all(one["item_id"] == items[one["output_index"]] for one in events if "item_id" in one)
    if events[-1]["type"] == "response.completed":
        assert events[-1]["response"]["output"] == [one["item"] for one in events if one["type"] == "response.output_item.done"]


def test_m49_m50_usage_is_all_integers() -> None:
    usage = write_stream([a.text_delta("x"), a.usage_delta({"input": 25, "estimated": True}), a.usage_delta({"output": 9}), a.stop_delta("end")])[-1]["response"]["usage"]
    assert usage == {"input_tokens": 25, "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0}, "output_tokens": 9, "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 34}


@pytest.mark.parametrize(("delta", "code"), [
    (a.error_delta(502, "m", 502), "server_error"),     # type: ignore[arg-type]
    (a.error_delta(429, "m"), "rate_limit_exceeded"),
    (a.error_delta(400, "m"), "invalid_prompt"),
    (a.error_delta(400, "m", "context_length_exceeded"), "context_length_exceeded"),
    (a.error_delta(429, "m", "insufficient_quota"), "insufficient_quota"),
], ids=["m53 number", "rate", "request", "m115 overflow", "quota"])
def test_the_code_of_a_failure_is_a_word(delta: dict[str, Any], code: str) -> None:
    response = write_stream([START, delta])[-1]["response"]
    assert (response["status"], response["error"], response["output"], response["usage"]) == ("failed", {"code": code, "message": "m"}, [], None)


def test_the_answer_repeats_what_was_asked() -> None:
    tools = [{"type": "web_search", "x": 1}]
    response = a.responses_write_answer([START, a.text_delta("x"), a.stop_delta("end")], asked(
        tools=tools, instructions="i", reasoning={"effort": "low"}, metadata={"a": "b"}, temperature=0.5, text={"verbosity": "low"}, tool_choice="required", max_output_tokens=99, store=False, user="u"))
    assert response["model"] == "gpt-asked" and response["tools"] == tools and response["reasoning"] == {"effort": "low", "summary": None}
    assert {name: response[name] for name in ("instructions", "metadata", "temperature", "text", "tool_choice", "max_output_tokens", "user", "background", "error", "created_at", "completed_at")} == {
        "instructions": "i", "metadata": {"a": "b"}, "temperature": 0.5, "text": {"verbosity": "low"}, "tool_choice": "required", "max_output_tokens": 99, "user": "u", "background": False,
        "error": None, "created_at": 1790000000, "completed_at": 1790000000}


@pytest.mark.parametrize("name", [name for name in EXAMPLE_DELTAS])
def test_the_whole_answer_is_what_the_last_event_holds(name: str) -> None:
    assert a.responses_write_answer(EXAMPLE_DELTAS[name], asked()) == write_stream(EXAMPLE_DELTAS[name])[-1]["response"]


def test_m52_keep_alives_are_parsed_events_at_any_time() -> None:
    writer = a.ResponsesStreamWriter(asked())
    pieces = [writer.keep_alive(), writer.keep_alive(), *writer.feed(START), *writer.feed(a.text_delta("x")), writer.keep_alive(), *writer.feed(a.stop_delta("end"))]
    assert names_of(events_of(b"".join(pieces)))[:7] == ["created", "in_progress", "in_progress", "output_item.added", "content_part.added", "output_text.delta", "in_progress"]
    assert writer.keep_alive() == b"" and writer.close() == []


def test_an_error_of_ours_is_the_last_event() -> None:
    writer = a.ResponsesStreamWriter(asked())
    events = events_of(writer.error(a.no_route("All busy.", status=429, retry_after_s=12)))
    assert names_of(events) == ["created", "in_progress", "failed"]
    assert events[-1]["response"]["error"] == {"code": "rate_limit_exceeded", "message": "All busy. Please try again in 12s."}
    assert writer.error(a.no_route("again")) == b"" and writer.close() == []


def test_calls_for_the_local_shell_are_told_in_its_own_words() -> None:
    deltas = [a.call_delta("call_x1y2z3", "local_shell", "shell"), a.args_delta('{"command":["ls"],"workdir":"/x"}'), a.stop_delta("tool")]
    item = write_stream(deltas)[-2]["item"]
    assert item["action"] == {"type": "exec", "command": ["ls"], "env": {}, "working_directory": "/x"} and item["status"] == "completed"


# ---- Pass-through

def frames(*events: a.Event, **more: Any) -> bytes:
    return b"".join(b"event: " + one.name.encode() + b"\ndata: " + one.data.encode() + b"\n\n" for one in events)


WHOLE = frames(event("response.created", sequence_number=0, response={"id": "r", "model": "wire", "output": []}), event("response.in_progress", sequence_number=1, response={"id": "r"}),
               added(0, **{**MESSAGE, "content": []}), *(text_delta(text, sequence_number=n, obfuscation="xyz") for n, text in enumerate(["Hé", "l", "l", "o"], 3)), item_done(0, **MESSAGE),
               event("response.completed", sequence_number=8, response={"id": "r", "model": "wire", "status": "completed", "output": [MESSAGE], "usage": {"input_tokens": 9, "output_tokens": 7}}))


def test_a_stream_passes_byte_for_byte_however_it_was_cut() -> None:
    for size in (1, 2, 3, 7, 64, len(WHOLE)):
        passage = a.ResponsesPassage(wants_usage=True)
        out = b"".join(passage.feed(WHOLE[start:start + size]) for start in range(0, len(WHOLE), size)) + passage.close()
        assert out == WHOLE
        assert (passage.content, passage.done, passage.finish, passage.error, passage.broken) == (True, True, "completed", None, "")
        assert passage.usage == a.Usage(input=9, output=7) and passage.n_content_bytes >= 5 and passage.n_signs == 9


PASSAGES = [
    ("cut after text", frames(event("response.created", response={}), text_delta("x")), (True, False, "cut", False)),
    ("nothing", b"", (False, False, "empty_answer", False)),
    ("opening only", frames(event("response.created", response={}), added(0, type="message", content=[]), added(1, type="reasoning", summary=[])), (False, False, "empty_answer", False)),
    ("a call is content", frames(added(0, type="function_call", name="f")), (True, False, "cut", False)),
    ("failed before content", frames(event("response.created", response={}), event("response.failed", response={"error": {"code": "rate_limit_exceeded", "message": "m"}})), (False, False, "", True)),
    ("error event", frames(event("error", message="m")), (False, False, "", True)),
    ("error by name alone", b'event: error\ndata: oops\n\n', (False, False, "", True)),
    ("garbage", b"data: <html>\n\n", (False, False, "not_json", False)),
    ("completed with nothing", frames(event("response.completed", response={"status": "completed", "output": []})), (False, False, "empty_answer", False)),
    ("incomplete with nothing", frames(event("response.incomplete", response={"status": "incomplete", "output": []})), (True, True, "", False)),
    ("last blank line missing", WHOLE[:-2], (True, True, "", False)),
]


@pytest.mark.parametrize(("stream", "expected"), [row[1:] for row in PASSAGES], ids=[row[0] for row in PASSAGES])
def test_how_a_passing_stream_ends_is_seen(stream: bytes, expected: tuple[Any, ...]) -> None:
    passage = a.ResponsesPassage()
    out = passage.feed(stream) + passage.close()
    assert (passage.content, passage.done, passage.broken, passage.error is not None) == expected
    if passage.error is not None or passage.broken == "not_json":
        assert b"failed" not in out and b"html" not in out and passage.feed(WHOLE) == b""


def test_after_the_end_nothing_passes() -> None:
    passage = a.ResponsesPassage()
    assert passage.feed(WHOLE + frames(text_delta("late")) + b"data: [DONE]\n\n") == WHOLE
    assert passage.feed(frames(text_delta("later"))) == b""


def test_a_passing_stream_may_bear_the_name_that_was_asked() -> None:
    passage = a.ResponsesPassage(echo_model="mine")
    events = [json.loads(one.data) for one in a.EventReader().feed(passage.feed(WHOLE))]
    assert [one["response"]["model"] for one in events if "model" in one.get("response", {})] == ["mine", "mine"]


def test_a_passing_stream_that_breaks_off_ends_as_its_provider_would_have_told() -> None:
    """Under the answer's own id, with the number after the last that was shown."""
    told = a.GatewayError("The provider broke off.", 502, "upstream_failed")
    early = a.ResponsesPassage()
    bare = json.loads(a.read_frame(early.failed(told)).data)
    assert bare["type"] == "response.failed" and bare["response"]["status"] == "failed" and bare["response"]["error"] == {"code": "upstream_failed", "message": told.message}
    events = [{**json.loads(one.data), "sequence_number": number} for number, one in enumerate(a.EventReader().feed(WHOLE))]
    for count in range(1, len(events)):
        passage = a.ResponsesPassage()
        passage.feed(b"".join(a.write_event(event, event["type"]) for event in events[:count]))
        failed = json.loads(a.read_frame(passage.failed(told)).data)
        assert failed["sequence_number"] == count and failed["response"]["id"] == events[0]["response"]["id"], count
    waits = a.GatewayError("Too many requests.", 429, None, retry_after_s=7.0)
    assert json.loads(a.read_frame(passage.failed(waits)).data)["response"]["error"] == {"code": "rate_limit_exceeded", "message": "Too many requests. Please try again in 7s."}


def test_keep_alives_between_passing_events_do_not_disturb_their_numbers() -> None:
    passage = a.ResponsesPassage()
    assert passage.keep_alive() == b": keep-alive\n\n"
    passage.feed(WHOLE[:WHOLE.index(b"response.output_item.added") - 7])
    assert json.loads(a.read_frame(passage.keep_alive()).data) == {"type": "keepalive", "sequence_number": 1}


@pytest.mark.parametrize(("body", "expected"), [
    ({"output": [MESSAGE], "usage": {"input_tokens": 1, "output_tokens": 2, "input_tokens_details": {"cached_tokens": 1}}}, ("", a.Usage(input=1, output=2, cached=1))),
    ({"output": [], "status": "completed"}, ("empty_answer", None)),
    ({"output": [{"type": "reasoning", "summary": []}]}, ("empty_answer", None)),
    ({"output": [], "status": "incomplete"}, ("", None)),
    ({"output": [], "status": "queued"}, ("", None)),
    ({"choices": []}, ("not_json", None)),
    ("x", ("not_json", None)),
], ids=["answer", "empty", "only an empty item", "incomplete", "queued", "other format", "no object"])
def test_whole_answers_are_judged(body: Any, expected: Any) -> None:
    assert a.judge_responses_answer(body) == expected


# ---- What others send is never trusted to have its shape

JUNK: list[Any] = [None, 0, 1.5, True, "", "x", [], {}, ["x"], [None], {"a": 1}, [{}], [{"type": 3}]]


def spoiled(value: Any) -> Any:
    """`value` with each of its fields in turn replaced by each kind of junk."""
    places = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for place in places:
        for junk in [*JUNK, *spoiled(value[place])]:
            copied = value.copy()
            copied[place] = junk
            yield copied


@pytest.mark.parametrize("row", [row for row in STREAMS if len(row[1]) <= 3], ids=lambda row: row[0])
def test_no_event_makes_the_reader_fail(row: Any) -> None:
    for index, one in enumerate(row[1]):
        for value in spoiled(json.loads(one.data)) if one.data[0] == "{" else ():
            stream, writer, passage = reader(), a.ResponsesStreamWriter(asked()), a.ResponsesPassage()
            events = [*row[1][:index], a.Event(one.name, json.dumps(value), b""), *row[1][index + 1:]]
            deltas = [delta for each in events for delta in stream.feed(each)] + stream.close()
            assert deltas[-1]["delta"] in ("stop", "error")
            written = events_of(b"".join(piece for delta in deltas for piece in writer.feed(delta)) + b"".join(writer.close()))
            assert written[-1]["type"] in ("response.completed", "response.incomplete", "response.failed")
            passage.feed(frames(*events)), passage.close()
            assert passage.done or passage.error is not None or passage.broken


@pytest.mark.parametrize("row", ITEMS, ids=lambda row: row[0])
def test_no_item_makes_the_reader_fail(row: Any) -> None:
    n_read = 0
    for item in row[1]:
        for changed in spoiled(item):
            try:
                ready = a.prepare(read_items(USER, changed), OPENAI)
            except (a.GatewayError, a.UpstreamFailure):
                continue
            n_read += 1
            json.dumps(a.responses_write_request(ready, OPENAI))
    assert n_read or row[0] == "empty thinking"


def test_envelopes_never_reach_a_provider() -> None:
    sealed = a.seal_envelope({"family": "cerebras", "model": "q", "field": "reasoning_content"})
    history = [USER, {"type": "reasoning", "summary": [{"type": "summary_text", "text": "t"}], "encrypted_content": sealed}, {"role": "assistant", "content": "y"}, USER]
    for profile in (OPENAI, PLAIN, a.profile_for("xai", "grok-4.3", "responses")):
        assert "aic1." not in json.dumps(again(body_of(input=history), profile))


# ---- Cuts, and recorded traffic

def as_stream(events: list[a.Event]) -> bytes:
    return b": hello\r\n\r\n" + b"".join(f"event: {one.name}\r\ndata: {one.data}\r\n\r\n".encode() for one in events)


@pytest.mark.parametrize("row", [row for row in STREAMS if row[0] in ("text", "m18 interleaved calls", "freeform", "two summary parts", "citation", "m37 length while a call is open")], ids=lambda row: row[0])
def test_a_stream_reads_the_same_cut_at_every_byte(row: Any) -> None:
    stream = as_stream([event("response.created", response={"id": "r", "model": "é"}), *row[1]])
    whole = translate([stream])
    assert all(translate([stream[:cut], stream[cut:]]) == whole for cut in range(1, len(stream)))
    assert translate([stream[n:n + 1] for n in range(len(stream))]) == whole


def translate(chunks: list[bytes]) -> bytes:
    """Provider's bytes to client's bytes, through the hub."""
    events, stream, writer = a.EventReader(), reader(), a.ResponsesStreamWriter(asked())
    deltas = [delta for chunk in chunks for one in events.feed(chunk) for delta in stream.feed(one)]
    deltas += [delta for one in events.close() for delta in stream.feed(one)] + stream.close()
    return b"".join(piece for delta in deltas for piece in writer.feed(delta)) + b"".join(writer.close())


def test_m30_m51_a_stream_cut_after_any_frame_never_looks_whole() -> None:
    for row in STREAMS:
        events = [one for one in row[1] if one.name not in ("response.completed", "response.incomplete")]
        for n in range(len(events) + 1):
            last = names_of(events_of(translate([as_stream(events[:n])])))[-1]
            assert last == "failed", row[0]


def recordings() -> list[Path]:
    return sorted((SHARED / "recordings").glob("*/responses-*.json")) if SHARED.is_dir() else []


NO_RECORDINGS = pytest.mark.skipif(not recordings(), reason="the recordings are not beside this checkout (../shared)")
#: Recordings that cannot be carried, and why.
NOT_CARRIED = {
    "openai/responses-json-text-a0cf1eb9": "a background answer that is not ready",
    "openai/responses-json-tool-result-5ddc824f": "a background answer that is not ready",
}
#: What is not the same or not valid after translation, and why.
DIFFERENCES = {
    "xai/responses-json-citations-cfcf0d6c": ("server_tools", "x_search_call is no item of the published format"),
    "xai/responses-json-text-b9837128": ("valid", "its code_interpreter_call lacks container_id"),
    "xai/responses-sse-citations-0f20b13a": ("valid", "its web_search_call lacks action"),
    "openai/responses-sse-text-c39351f4": ("valid", "insufficient_quota, which Codex reads, is not among the SDK's codes"),
}


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def conformance(name: str) -> Any:
    folder = str(SHARED / "conformance")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return pytest.importorskip(name)


def profile_of(recording: dict[str, Any]) -> a.Profile:
    preset = "openai" if recording["provider"] == "azure" else recording["provider"]
    return a.profile_for(preset, recording["model"] or "m", "responses")


def deltas_of(recording: dict[str, Any]) -> list[Any]:
    source = a.Source(profile=profile_of(recording), seed="s")
    if recording["response"].get("sse") is None:
        return a.responses_read_answer(recording["response"]["body"], source)
    stream, events = a.ResponsesStreamReader(source), a.EventReader()
    found = events.feed(recording["response"]["sse"].encode()) + events.close()
    return [delta for one in found for delta in stream.feed(one)] + stream.close()


@NO_RECORDINGS
@pytest.mark.parametrize("path", recordings(), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_recorded_answers_come_out_valid_and_the_same(path: Path) -> None:
    wire, validate = conformance("wire"), conformance("validate")
    recording = load(path)
    name = f"{path.parent.name}/{path.stem}"
    if recording["endpoint"] != "responses" or recording["response"]["status"] != 200 or name in NOT_CARRIED:
        assert name in NOT_CARRIED or recording["endpoint"] != "responses" or "error" in recording["response"]["body"]
        return
    deltas = deltas_of(recording)
    assert check_deltas(deltas) == []
    fields, _ = DIFFERENCES.get(name, ("", ""))
    stream, body = write_bytes(deltas), a.responses_write_answer(deltas, asked())
    want = wire.semantics("responses", recording["response"])
    for answer in ({"status": 200, "sse": stream.decode()}, {"status": 200, "body": body}):
        found = wire.semantics("responses", answer)
        for key in ("text", "thinking", "refusal", "stop", "server_tools"):
            assert found[key] == want[key] or key == fields, key
        assert [(call["name"], call["args"]) for call in found["tool_calls"]] == [(call["name"], call["args"]) for call in want["tool_calls"]]
        assert {key: found["usage"][key] for key in ("in", "out")} == {key: want["usage"][key] for key in ("in", "out")}
        assert all((found["usage"][key] or 0) == (want["usage"][key] or 0) for key in ("cached", "cache_write", "reasoning"))
        assert found["signatures"] >= want["signatures"] - ("5c55ef17" in name)
        faults = [fault for fault in validate.validate("responses", answer) if fault["level"] != "warn"]
        assert not faults or fields == "valid", faults[:2]


def normal_request(body: dict[str, Any]) -> dict[str, Any]:
    """A body as it is to come back from the hub: the normalisations, one line each."""
    text = "instructions"
    body = copy.deepcopy({name: value for name, value in body.items() if value is not None})
    items = body["input"] if isinstance(body["input"], list) else [{"role": "user", "content": body["input"]}]
    system, turns = [body.pop(text)] if body.get(text) else [], []
    for item in items:
        item.setdefault("type", "message")                                              # items may come without a type
        if item["type"] in ("message", "reasoning", "function_call", "tool_search_call", "tool_search_output"):
            if item["type"] not in ("tool_search_call", "tool_search_output") or item.get("execution") == "client":
                item.pop("id", None)                                                     # nothing is stored that an id could name
        if item["type"] in ("message", "function_call"):
            item.pop("status", None)                                                     # what is in the history is completed
        if item["type"] == "message":
            item.pop("phase", None)                                                      # kept on pass-through only
            kind = "output_text" if item["role"] == "assistant" else "input_text"
            if isinstance(item["content"], str):
                item["content"] = [{"type": kind, "text": item["content"]}]              # strings become parts
            item["content"] = [{key: value for key, value in part.items() if key not in ("annotations", "logprobs")} for part in item["content"]]
            if item["role"] in ("system", "developer") and not any(other["type"] != "additional_tools" for other in turns):
                system += [part["text"] for part in item["content"]]                     # leading system text becomes instructions
                continue
            last = turns[-1] if turns else {}
            if last.get("type") == "message" and last["role"] == item["role"]:
                last["content"] += item["content"]                                       # neighbours become one message
                continue
        if item["type"] == "reasoning" and not item.get("encrypted_content"):
            continue                                                                     # thinking without a seal is not taken back
        if item["type"] == "reasoning":
            item.pop("content", None)
            item["summary"] = [part for part in item["summary"] if part["text"]]
        turns.append(item)
    body["input"] = turns
    if system:
        body[text] = "\n\n".join(system)
    for tool in body.get("tools") or ():
        for name in [name for name, value in tool.items() if value is None]:
            del tool[name]                                                               # null says nothing
        if tool["type"] == "function" and not tool.get("parameters"):
            tool["parameters"] = {"type": "object", "properties": {}}
    if not body.get("tools"):
        for name in ("tools", "tool_choice", "parallel_tool_calls"):
            body.pop(name, None)                                                         # nothing to choose from
    if body.get("parallel_tool_calls"):
        del body["parallel_tool_calls"]                                                  # it is the default
    for name in ("store", "include", "stream", "max_output_tokens"):
        body.pop(name, None)                                                             # ours: compared by test_each_field_is_written
    if "reasoning" in body:
        shown = body["reasoning"].pop("generate_summary", None)                          # the older name
        asked_for = {name: value for name, value in {"summary": shown, **body["reasoning"]}.items() if value is not None}
        body["reasoning"] = {"summary": shown, **asked_for} if shown else asked_for
    if body.get("instructions") == "":
        del body["instructions"]
    return {name: value for name, value in body.items() if value != {}}


#: Recordings whose turns are mended on the way, so that their items have another order, and by which rule.
MENDED = {
    "openai/responses-json-tool-result-57c36869": "an assistant message without text goes, its neighbours become one",
    "deepseek/responses-json-error-400-f82d3e06": "calls go behind the text of their turn",
}


def said(items: list[Any]) -> list[str]:
    """All that a conversation says, without its order."""
    return sorted(json.dumps(part, sort_keys=True) for item in items for part in item.get("content") or [item] if part.get("text") != "")


@NO_RECORDINGS
@pytest.mark.parametrize("path", recordings(), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_recorded_requests_come_back_the_same(path: Path) -> None:
    validate = conformance("validate")
    recording = load(path)
    body = recording["request"]["body"]
    if not isinstance(body, dict) or recording["endpoint"] != "responses":
        return
    if body.get("previous_response_id"):
        with pytest.raises(a.GatewayError, match="Previous response with id"):
            a.responses_read_request(body)
        return
    before = copy.deepcopy(body)
    profile = OPENAI._replace(model=body["model"])
    written = again(body, profile)
    assert body == before
    expected = normal_request(body)
    found = {name: value for name, value in written.items() if name not in ("store", "include", "stream", "max_output_tokens")}
    if "temperature" in expected and "temperature" not in found:
        assert "temperature" in a.prepare(a.responses_read_request(body), profile)["dropped"]
        del expected["temperature"]
    if f"{path.parent.name}/{path.stem}" in MENDED:
        assert said(found.pop("input")) == said(expected.pop("input"))
    assert found == expected
    assert again(written, profile) == written
    assert [fault for fault in validate.validate_request("responses", written) if fault["level"] == "error"] == []
