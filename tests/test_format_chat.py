"""Section 18: Chat requests checked and passed on, Chat streams on their way through: whole, byte by byte, cut at every byte."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings, strategies as st

import aicarousel
from aicarousel import (PRESETS, ChatPassage, EventReader, GatewayError, Profile, ROUTING_FIELDS, Usage, chat_error, chat_pass_request, chat_usage,
                        check_chat_request, find_chat_error, judge_chat_answer, profile_for, read_frame, split_frames, whole_json)

Json = dict[str, Any]
DATA = Path(__file__).resolve().parent / "data" / "chat"
BOM = b"\xef\xbb\xbf"
USER = {"role": "user", "content": "Hi"}
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


# ------------------------------------------------------------------ requests: what is refused, what is not

def body(**fields: Any) -> Json:
    return {"model": "m", "messages": [USER], **fields}


def said(**message: Any) -> Json:
    return {"model": "m", "messages": [USER, message]}


REFUSED: list[tuple[Any, str | None]] = [                       # body, the field that is named
    *[(whole, None) for whole in (None, [], [USER], "text", 5, True)],
    *[(body(model=wrong), "model") for wrong in (5, True, [], {}, 1.5)],
    *[(body(stream=wrong), "stream") for wrong in ("true", 1, 0, [], {})],
    *[(body(stream_options=wrong), "stream_options") for wrong in (True, "x", [])],
    *[(body(**{name: wrong}), name) for name in ("max_tokens", "max_completion_tokens", "n") for wrong in ("5", 1.5, True, [], {}, 0, -1, -10**30)],
    *[(body(**{name: wrong}), name) for name in ("temperature", "top_p", "presence_penalty", "frequency_penalty") for wrong in ("1", True, [], {})],
    *[(body(**{name: wrong}), name) for name in ("seed", "top_logprobs") for wrong in ("1", 1.5, False)],
    *[(body(**{name: wrong}), name) for name in ("tools",) for wrong in ({}, "x", True, 0)],
    *[(body(tool_choice=wrong), "tool_choice") for wrong in (5, True, [])],
    *[(body(stop=wrong), "stop") for wrong in (5, True, {})],
    *[(body(**{name: wrong}), name) for name in ("response_format", "logit_bias", "metadata") for wrong in ("x", [], 1)],
    *[(body(**{name: wrong}), name) for name in ("parallel_tool_calls", "logprobs") for wrong in ("x", 1)],
    *[(body(**{name: wrong}), name) for name in ("user", "reasoning_effort") for wrong in (1, [], True)],
    *[({"model": "m", "messages": wrong}, "messages") for wrong in (None, [], {}, "Hi", 5)],
    ({"model": "m"}, "messages"),
    *[({"messages": [USER, wrong]}, "messages[1]") for wrong in (None, "Hi", 5, [])],
    *[(said(role=wrong, content="Hi"), "messages[1].role") for wrong in ("", "bot", "User", None, 5, ["user"], {})],
    (said(content="Hi"), "messages[1].role"),
    *[(said(role="user", content=wrong), "messages[1].content") for wrong in (5, True, {}, ["Hi"], [None], [{}], [{"type": 5}], [{"type": "text", "text": "Hi"}, "Hi"])],
    *[(said(role=role), "messages[1].content") for role in ("system", "developer", "user")],
    *[(said(role=role, content=None), "messages[1].content") for role in ("system", "developer", "user")],
    *[(said(role="tool", content="1", tool_call_id=wrong), "messages[1].tool_call_id") for wrong in (None, 5)],
    (said(role="tool", content="1"), "messages[1].tool_call_id"),
    *[(said(role="assistant", tool_calls=wrong), "messages[1].tool_calls") for wrong in (
        {}, "x", 5, [None], ["x"], [{}], [{"id": "a"}], [{"id": 5, "function": {"name": "f"}}], [{"id": "a", "function": "f"}], [{"id": "a", "function": {}}],
        [{"id": "a", "function": {"name": 5}}], [CALL, {**CALL, "id": None}])],
    *[(body(tools=[wrong]), "tools[0]") for wrong in (None, "f", 5, [], {"type": 5, "function": {"name": "f"}})],
    *[(body(tools=[wrong]), "tools[0].function") for wrong in ({}, {"type": "function"}, {"type": "function", "function": "f"}, {"type": "function", "function": {}},
                                                              {"type": "function", "function": {"name": 5}}, {"function": None})],
]


@pytest.mark.parametrize(("wrong", "param"), REFUSED, ids=range(len(REFUSED)))
def test_a_request_that_is_none_is_refused_and_the_field_is_named(wrong: Any, param: str | None) -> None:
    with pytest.raises(GatewayError) as caught:
        check_chat_request(wrong)
    error = caught.value
    assert (error.status, error.type, error.param) == (400, "invalid_request_error", param) and len(error.message) < 300
    assert param is None or param in error.message


ACCEPTED: list[Json] = [
    body(), {"messages": [USER]}, body(model=None), body(model=""), body(unknown_field={"a": [1]}, another=None),
    body(stream=True, stream_options={"include_usage": True}), body(stream=None, stream_options=None, tools=None, stop=None, max_tokens=None),
    body(max_tokens=1, max_completion_tokens=10**9, n=2, seed=-5, top_logprobs=0, logprobs=True, logit_bias={"50256": -100}),
    body(temperature=0, top_p=1, presence_penalty=-2.0, frequency_penalty=0.5), body(stop="END"), body(stop=["a", "b"]), body(user="u", metadata={"a": "b"}, store=True),
    body(reasoning_effort="high", reasoning_effort_=None, service_tier="flex", verbosity="low", prompt_cache_key="k", safety_identifier="s"),
    body(response_format={"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": {"type": "object"}}}), body(response_format={"type": "json_object"}),
    body(modalities=["text", "audio"], audio={"voice": "alloy", "format": "wav"}, prediction={"type": "content", "content": "x"}, web_search_options={}),
    body(functions=[{"name": "f"}], function_call="auto"), body(reasoning={"effort": "high"}, thinking={"type": "enabled"}, extra_body={"a": 1}),
    body(tools=[{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}, "strict": True}}], tool_choice="auto", parallel_tool_calls=False),
    body(tools=[{"function": {"name": "f"}}], tool_choice={"type": "function", "function": {"name": "f"}}), body(tools=[]),
    body(tools=[{"type": "custom", "custom": {"name": "c", "format": {"type": "text"}}}], tool_choice={"type": "custom", "custom": {"name": "c"}}),
    body(tools=[{"type": "web_search"}]),
    said(role="system", content=""), said(role="developer", content="Be brief."), said(role="user", content=[], name="ann"),
    said(role="user", content=[{"type": "text", "text": "Hi"}, {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA==", "detail": "low"}},
                               {"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}}, {"type": "file", "file": {"file_id": "f"}}, {"type": "brand_new"}]),
    said(role="system", content=[{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}]),
    said(role="assistant", content=None, tool_calls=[CALL]), said(role="assistant", tool_calls=[CALL, {"id": "c", "type": "custom", "custom": {"name": "c", "input": "x"}}]),
    said(role="assistant", content="", tool_calls=[]), said(role="assistant", content="x", tool_calls=None, refusal=None, reasoning_content="Hm", audio={"id": "a"}),
    said(role="assistant"), said(role="assistant", content=[{"type": "refusal", "refusal": "No"}]),
    said(role="tool", tool_call_id="call_1", content="1"), said(role="tool", tool_call_id="", content=[{"type": "text", "text": "1"}]),
    said(role="function", name="f", content="1"), said(role="function", name="f", content=None),
]


@pytest.mark.parametrize("right", ACCEPTED, ids=range(len(ACCEPTED)))
def test_what_the_openai_api_takes_is_taken(right: Json) -> None:
    before = json.dumps(right)
    assert check_chat_request(right) is right and json.dumps(right) == before


# ------------------------------------------------------------------ requests: what goes to the provider

PLAIN = Profile(reject=("stream_options",), developer=True)
STREAMS = Profile(developer=True)
GROQ = profile_for("groq", "openai/gpt-oss-120b")


def passed(raw: bytes | str, profile: Profile = PLAIN, wire: str = "WIRE") -> tuple[bytes, tuple[str, ...]]:
    """What the provider gets; it is JSON, and never more than the client sent but for what the gateway changes."""
    raw = raw.encode() if isinstance(raw, str) else raw
    out, dropped = chat_pass_request(raw, json.loads(raw), wire, profile)
    json.loads(out)
    return out, dropped


SPLICED = [                                                    # bytes that are kept but for the model
    ('{"model":"a","messages":[]}', '{"model":"WIRE","messages":[]}'),
    ('{ "messages" : [ ] ,\n "model" \t:\r\n "a" }', '{ "messages" : [ ] ,\n "model" \t:\r\n "WIRE" }'),
    ('\n {"model":"a","messages":[]}\n\n', '\n {"model":"WIRE","messages":[]}\n\n'),
    ('{"model":"","messages":[]}', '{"model":"WIRE","messages":[]}'),
    ('{"model":"a\\"b\\\\","messages":[]}', '{"model":"WIRE","messages":[]}'),
    ('{"model":"caf\u00e9 \\u00e9","messages":[]}', '{"model":"WIRE","messages":[]}'),
    ('{"model":"WIRE","messages":[]}', '{"model":"WIRE","messages":[]}'),
    ('{"messages":[]}', '{"messages":[],"model":"WIRE"}'),
    ('{"messages":[]  }  ', '{"messages":[],"model":"WIRE"}'),
    ('{"model":"a","seed":12345678901234567890,"temperature":1.0E-1,"x":0.10,"messages":[]}', '{"model":"WIRE","seed":12345678901234567890,"temperature":1.0E-1,"x":0.10,"messages":[]}'),
    ('{"model":"a","messages":[{"role":"user","content":"say \\"model\\": \\"b\\" \\ud800 \u65e5"}]}',
     '{"model":"WIRE","messages":[{"role":"user","content":"say \\"model\\": \\"b\\" \\ud800 \u65e5"}]}'),
    ('{"model":"a","x":{"models":"b","a model":"c"},"messages":[]}', '{"model":"WIRE","x":{"models":"b","a model":"c"},"messages":[]}'),
    ('{"model":"a","x":1,"x":2,"messages":[]}', '{"model":"WIRE","x":1,"x":2,"messages":[]}'),
]


@pytest.mark.parametrize(("raw", "expected"), SPLICED)
def test_bytes_are_kept_but_for_the_model(raw: str, expected: str) -> None:
    assert passed(raw) == (expected.encode(), ())


def test_nothing_to_change_is_the_very_same_bytes() -> None:
    raw = b'{"model":"WIRE","messages":[]}'
    assert chat_pass_request(raw, json.loads(raw), "WIRE", PLAIN)[0] is raw


REWRITTEN = [                                                  # bodies that cannot be spliced -> the object that goes out
    ('{"model":null,"messages":[]}', {"model": "WIRE", "messages": []}),
    ('{"metadata":{"model":"x"},"model":"a","messages":[]}', {"metadata": {"model": "x"}, "model": "WIRE", "messages": []}),
    ('{"model":"a","messages":[{"role":"user","content":"model"}]}', {"model": "WIRE", "messages": [{"role": "user", "content": "model"}]}),
    ('{"model":"a","tools":[{"function":{"name":"f","parameters":{"properties":{"model":{"type":"string"}}}}}],"messages":[]}',
     {"model": "WIRE", "tools": [{"function": {"name": "f", "parameters": {"properties": {"model": {"type": "string"}}}}}], "messages": []}),
    ('{"model":"a","model":"b","messages":[]}', {"model": "WIRE", "messages": []}),
    ('{"mod\\u0065l":"a","messages":[]}', {"model": "WIRE", "messages": []}),
    ('{"m\\u006fdel":"a","n":1.0,"big":123456789012345678901234567890,"messages":[]}', {"model": "WIRE", "n": 1.0, "big": 123456789012345678901234567890, "messages": []}),
]


@pytest.mark.parametrize(("raw", "expected"), REWRITTEN)
def test_otherwise_the_body_is_written_anew_in_its_order(raw: str, expected: Json) -> None:
    out, dropped = passed(raw)
    assert json.loads(out) == expected and list(json.loads(out)) == list(expected) and dropped == ()


def pairs(raw: bytes) -> list[tuple[str, Any]]:
    """Top-level names and values, repeated ones too."""
    return json.JSONDecoder(object_pairs_hook=lambda found: found).decode(raw.decode())


@pytest.mark.parametrize("raw", ['{"mod\\u0065l":"a","metadata":{"model":"x"},"messages":[]}', '{"mod\\u0065l":"x","metadata":{"model":"x"},"messages":[]}',
                                 '{"model":"a","mod\\u0065l":"b","messages":[]}'])
def test_an_escaped_model_key_cannot_smuggle_another_model(raw: str) -> None:
    out, _ = passed(raw)
    assert [value for name, value in pairs(out) if name == "model"] == ["WIRE"]
    assert json.loads(out).get("metadata", {"model": "x"}) == {"model": "x"}


OPTIONS = [                                                    # stream_options of the client -> of the provider's request
    ('"stream":true', {"include_usage": True}),
    ('"stream":true,"stream_options":null', {"include_usage": True}),
    ('"stream":true,"stream_options":{}', {"include_usage": True}),
    ('"stream":true,"stream_options":{"include_usage":false}', {"include_usage": True}),
    ('"stream":true,"stream_options":{"include_usage":true}', {"include_usage": True}),
    ('"stream":true,"stream_options":{"include_obfuscation":false}', {"include_obfuscation": False, "include_usage": True}),
    ('"stream":false', None),
    ('"stream":null', None),
    ('"n":1', None),
]


@pytest.mark.parametrize(("fields", "expected"), OPTIONS)
def test_usage_is_asked_for_where_it_may_be(fields: str, expected: Json | None) -> None:
    raw = f'{{"model":"a",{fields},"messages":[]}}'
    assert json.loads(passed(raw, STREAMS)[0]).get("stream_options") == expected
    assert "stream_options" not in json.loads(passed(raw, PLAIN)[0])


def test_asking_for_usage_keeps_the_bytes_too() -> None:
    assert passed('{"model":"a", "stream":true,"messages":[] }', STREAMS)[0] == b'{"model":"WIRE", "stream":true,"messages":[],"stream_options":{"include_usage":true}}'
    kept = '{"model":"WIRE","stream":true,"stream_options":{"include_usage":true},"messages":[]}'
    assert passed(kept, STREAMS)[0] == kept.encode()


def test_fields_a_provider_rejects_are_left_out_and_named() -> None:
    raw = json.dumps(body(logprobs=True, logit_bias={}, store=False, seed=5))
    out, dropped = passed(raw, GROQ)
    assert dropped == ("logprobs", "logit_bias", "store") and json.loads(out) == {"model": "WIRE", "messages": [USER], "seed": 5}
    assert passed(raw, PLAIN)[1] == ()


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_gets_only_what_it_takes(name: str) -> None:
    profile = profile_for(name, PRESETS[name].default)
    everything = body(stream=True, max_tokens=5, max_completion_tokens=6, **{field: "x" for field in ("seed", *profile.reject, *ROUTING_FIELDS)})
    everything["messages"] = [{"role": "developer", "content": "x", **{field: "x" for field in profile.message_reject}}]
    before = json.dumps(everything)
    out = json.loads(chat_pass_request(before.encode(), everything, "WIRE", profile)[0])
    assert json.dumps(everything) == before, "the client's body is another provider's next"
    assert not {*profile.reject, *ROUTING_FIELDS} & set(out) and out["model"] == "WIRE" and out[profile.seed_field] == "x"
    assert not set(profile.message_reject) & set(out["messages"][0]) and out["messages"][0]["role"] == ("developer" if profile.developer else "system")
    assert (out.get("stream_options") == {"include_usage": True}) is ("stream_options" not in profile.reject)
    assert {field for field in out if field.startswith("max_")} == set(profile.max_fields)


@pytest.mark.parametrize(("max_fields", "fields", "expected"), [
    ("max_tokens", {"max_tokens": 5}, {"max_tokens": 5}),
    ("max_tokens", {"max_completion_tokens": 5}, {"max_tokens": 5}),
    ("max_tokens", {"max_tokens": 5, "max_completion_tokens": 6}, {"max_tokens": 5}),
    ("max_tokens", {"max_tokens": None, "max_completion_tokens": 6}, {"max_tokens": 6}),
    ("max_completion_tokens", {"max_tokens": 5}, {"max_completion_tokens": 5}),
    ("max_completion_tokens", {"max_completion_tokens": 5}, {"max_completion_tokens": 5}),
    ("max_completion_tokens", {"max_tokens": 5, "max_completion_tokens": 6}, {"max_completion_tokens": 6}),
    ("max_completion_tokens max_tokens", {"max_tokens": 5, "max_completion_tokens": 6}, {"max_tokens": 5, "max_completion_tokens": 6}),
])
def test_the_output_limit_goes_by_the_name_the_provider_knows(max_fields: str, fields: Json, expected: Json) -> None:
    out = json.loads(passed(json.dumps(body(**fields)), Profile(max_fields=tuple(max_fields.split())))[0])
    assert {name: value for name, value in out.items() if name.startswith("max_")} == expected


def test_a_field_without_a_name_is_left_alone() -> None:
    assert json.loads(passed('{"model":"a","":1,"messages":[]}')[0]) == {"model": "WIRE", "": 1, "messages": []}


def test_fields_are_renamed() -> None:
    out = json.loads(passed(json.dumps(body(seed=5, user="u")), Profile(seed_field="random_seed"))[0])
    assert out == {"model": "WIRE", "messages": [USER], "user": "u", "random_seed": 5}


def test_developer_becomes_system_where_it_is_unknown() -> None:
    raw = json.dumps({"model": "a", "messages": [{"role": "developer", "content": "x", "name": "n"}, USER, {"role": "developer", "content": "y"}]})
    assert [message["role"] for message in json.loads(passed(raw, Profile())[0])["messages"]] == ["system", "user", "system"]
    assert [message["role"] for message in json.loads(passed(raw, PLAIN)[0])["messages"]] == ["developer", "user", "developer"]
    assert json.loads(passed(raw, Profile())[0])["messages"][0] == {"role": "system", "content": "x", "name": "n"}


def test_message_fields_a_provider_rejects_are_left_out() -> None:
    raw = json.dumps({"model": "a", "messages": [{**USER, "name": "ann"}, {"role": "assistant", "content": "x", "reasoning": "Hm", "reasoning_content": "Hm"}]})
    assert json.loads(passed(raw, GROQ)[0])["messages"] == [USER, {"role": "assistant", "content": "x"}]


@pytest.mark.parametrize("field", sorted(ROUTING_FIELDS))
def test_fields_with_power_elsewhere_are_never_forwarded(field: str) -> None:
    out, dropped = passed(json.dumps(body(**{field: "http://127.0.0.1:1/"})))
    assert json.loads(out) == {"model": "WIRE", "messages": [USER]} and dropped == ()
    escaped = json.dumps(body()).replace('"messages"', '"' + "".join(f"\\u{ord(letter):04x}" for letter in field) + '": 1, "messages"')
    assert field in json.loads(escaped) and field not in json.loads(passed(escaped)[0])


def test_lone_surrogates_survive() -> None:
    raw = '{"model":"a","logprobs":true,"messages":[{"role":"user","content":"\\ud800 caf\u00e9 \\ud83d\\ude42"}]}'
    out, _ = passed(raw, GROQ)
    assert out.isascii() and json.loads(out)["messages"] == json.loads(raw)["messages"]
    assert json.loads(passed('{"model":"a","messages":[]}', wire="\ud800\u65e5\"")[0])["model"] == "\ud800\u65e5\""


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.text(min_size=1, max_size=6), st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=8), lambda inner: st.lists(inner, max_size=3)
                       | st.dictionaries(st.sampled_from(["model", "a", "stream"]), inner, max_size=3), max_leaves=6), max_size=4),
       st.text(max_size=8), st.booleans(), st.sampled_from([None, 2]))
def test_any_body_goes_out_as_it_came_but_for_its_model(fields: Json, model: str, ascii_only: bool, indent: int | None) -> None:
    body_in = {**{name: value for name, value in fields.items() if name not in ROUTING_FIELDS | {"stream", "messages"}}, "model": model, "messages": [USER]}
    raw = json.dumps(body_in, ensure_ascii=ascii_only, indent=indent).encode("utf-8", "surrogatepass")
    assert json.loads(passed(raw)[0].decode("utf-8", "surrogatepass")) == {**body_in, "model": "WIRE"}


# ------------------------------------------------------------------ streams

class Told(NamedTuple):
    """What a passage tells of a stream."""
    outcome: str                    #: done, silent (an end and nothing before it), error, or why it is broken
    text: str = ""                  #: of choice 0, as the client reads it
    finish: str | None = None
    usage: Usage | None = None
    stays: tuple[int, ...] = ()     #: frames (from 0) that do not go to the client
    owed: bytes = b""               #: what the client gets beyond the provider's frames


DONE_FRAME = b"data: [DONE]\n\n"
SHORT = Usage(9, 4)


def owed_finish(reason: str) -> bytes:
    return (b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1790000000,"model":"gpt-6-mini","choices":[{"index":0,"delta":{},"finish_reason":"%s"}]}\n\n'
            % reason.encode())


STREAM_TABLE: dict[str, Told] = {
    "openai": Told("done", "Hi caf\u00e9 \U0001f642", "stop", Usage(9, 4, 3, 0, 2), (4,)),
    "openai_plain": Told("done", "One \"two\" thr\u00e9\u00e9\n \\four five", "stop"),
    "openai_n2": Told("done", "Aa", "stop", SHORT, (8,)),
    "openai_tools": Told("done", "", "tool_calls"),
    "openai_refusal": Told("done", "", "stop"),
    "groq": Told("done", "Hello!", "stop", Usage(12, 6, 0, 0, 1)),
    "openrouter": Told("done", "One two", "stop", Usage(9, 10, 0, 5), (0, 1, 3)),
    "openrouter_late_error": Told("done", "Long text", "length", None, (0, 3, 4), DONE_FRAME),
    "openrouter_error": Told("error", "Half", None, None, (0, 2, 3)),
    "mistral": Told("done", "The sky is", "length", Usage(9, 3)),
    "mistral_thinking": Told("done", ".", "stop", SHORT),
    "azure": Told("done", "1,", "stop", SHORT, (5,)),
    "azure_filtered": Told("done", "", "content_filter"),
    "gemini": Told("done", "Sure, done.", "stop", SHORT, (), DONE_FRAME),
    "gemini_tool": Told("done", "", "stop", SHORT),
    "perplexity": Told("done", "It rains.", "stop", Usage(4, 3), (), DONE_FRAME),
    "deepseek": Told("done", "42", "stop", Usage(9, 5, 8), (0, 2)),
    "empty_finish": Told("done", "ok then", "stop", SHORT),
    "done_without_finish": Told("done", "All said", "stop", None, (3,), owed_finish("stop") + DONE_FRAME),
    "done_without_finish_tools": Told("done", "", "tool_calls", None, (1,), owed_finish("tool_calls") + DONE_FRAME),
    "finish_without_done": Told("done", "All", "stop", SHORT, (), DONE_FRAME),
    "no_last_blank_line": Told("done", "All", "stop", SHORT, (3,), DONE_FRAME),
    "no_last_blank_line_finish": Told("done", "All", "stop", SHORT, (), b"\n\n" + DONE_FRAME),
    "after_the_end": Told("done", "All", "stop", None, (3, 4, 5)),
    "cut": Told("cut", "Half an answ"),
    "empty": Told("empty_answer"),
    "done_only": Told("silent", stays=(0,)),
    "comments_only": Told("empty_answer", stays=(0, 1, 2)),
    "role_only": Told("empty_answer"),
    "role_only_done": Told("silent", stays=(1,)),
    "finish_only": Told("silent", "", "stop"),
    "length_only": Told("done", "", "length", SHORT),
    "error_first": Told("error", stays=(0,)),
    "error_in_chunk": Told("error", "Half", stays=(2, 3, 4, 5)),
    "error_event": Told("error", "Half", stays=(1, 2)),
    "error_event_words": Told("error", "Half", stays=(1, 2)),
    "error_list": Told("error", stays=(0,)),
    "html": Told("empty_answer", stays=(0, 1)),
    "html_in_data": Told("not_json", stays=(0,)),
    "garbage": Told("not_json", "Half", stays=(1, 2, 3, 4)),
    "json_instead": Told("not_json", stays=(0,)),
    "crlf": Told("done", "caf\u00e9 au lait", "stop", SHORT),
    "cr": Told("done", "caf\u00e9 au lait", "stop", SHORT, (4,), b"data: [DONE]\r\r\n\n"),
    "bom": Told("done", "caf\u00e9 au lait", "stop", SHORT),
    "bom_crlf": Told("done", "caf\u00e9 au lait", "stop", SHORT),
    "no_space": Told("done", "caf\u00e9 au lait", "stop", SHORT),
    "extra_fields": Told("done", "caf\u00e9 au lait", "stop", SHORT),
    "spaced_json": Told("done", "caf\u00e9 \u65e5\u672c", "stop"),
    "many_lines": Told("done", "Hi there", "stop"),
    "message_stream": Told("done", "Whole", "stop"),
}
STREAMS_BY_NAME = {path.stem: path.read_bytes() for path in sorted(DATA.glob("*.sse"))}


class Passed(NamedTuple):
    """A stream that has gone through: the bytes of each step, and what the passage tells."""
    fed: bytes
    closed: bytes
    told: tuple[Any, ...]
    passage: ChatPassage


def go(*pieces: bytes, passage: ChatPassage | None = None, **options: Any) -> Passed:
    passage = passage or ChatPassage(**{"wants_usage": False, **options})
    fed = b"".join([passage.feed(piece) for piece in pieces])
    closed = b"" if passage.error or passage.broken else passage.close()      # as the relay does
    return Passed(fed, closed, (passage.content, passage.done, passage.finish, passage.usage, passage.error, passage.broken), passage)


def outcome(passage: ChatPassage) -> str:
    if passage.error is not None:
        return "error"
    return passage.broken or ("done" if passage.content else "silent") if passage.broken or passage.done else "open"


def chunks_of(out: bytes) -> list[Json]:
    reader = EventReader()
    return [json.loads(event.data) for event in [*reader.feed(out), *reader.close()] if event.data != "[DONE]"]


def text_of(out: bytes) -> str:
    parts = [choice.get("delta") or choice.get("message") or {} for chunk in chunks_of(out) for choice in chunk.get("choices", ()) if choice["index"] == 0]
    return "".join(part["content"] for part in parts if isinstance(part.get("content"), str))


def frames_of(stream: bytes) -> list[bytes]:
    return split_frames(stream.removeprefix(BOM))


def each_byte(stream: bytes) -> list[bytes]:
    return [stream[index:index + 1] for index in range(len(stream))]


def test_every_sample_has_its_row() -> None:
    assert set(STREAMS_BY_NAME) == set(STREAM_TABLE)


@pytest.mark.parametrize("name", STREAM_TABLE)
def test_a_stream_whole(name: str) -> None:
    stream, expected = STREAMS_BY_NAME[name], STREAM_TABLE[name]
    found = go(stream)
    out = found.fed + found.closed
    assert (outcome(found.passage), text_of(out), found.passage.finish, found.passage.usage) == expected[:4]
    assert out == b"".join(frame for index, frame in enumerate(frames_of(stream)) if index not in expected.stays) + expected.owed
    assert (b"[DONE]" in out) == (expected.outcome == "done" or name == "finish_only")


@pytest.mark.parametrize("name", STREAM_TABLE)
def test_a_stream_in_pieces_is_the_same(name: str) -> None:
    stream = STREAMS_BY_NAME[name]
    whole = go(stream)
    everything = whole.fed + whole.closed
    by_bytes = go(*each_byte(stream))
    assert (by_bytes.fed + by_bytes.closed, by_bytes.told) == (everything, whole.told)
    for cut in range(0, len(stream) + 1):
        found = go(stream[:cut], stream[cut:])
        assert (found.fed + found.closed, found.told) == (everything, whole.told), f"cut at {cut}"


def arrived(stream: bytes, cut: int) -> list[bytes]:
    """The frames that are whole in stream[:cut]; the last one may lack its blank line when its JSON is whole."""
    frames = frames_of(stream[:cut] if cut >= 3 or not BOM.startswith(stream[:cut]) else b"")
    if frames and not frames[-1].endswith((b"\n\n", b"\r\n\r\n", b"\r\r")):
        data = read_frame(frames[-1]).data
        if not whole_json(data) and data != "[DONE]":
            frames.pop()
    return [frame.rstrip(b"\r\n") + b"\n\n" for frame in frames]


@pytest.mark.parametrize("name", [name for name in STREAM_TABLE if name != "json_instead"])     # that is no stream
def test_a_stream_that_ends_at_any_byte(name: str) -> None:
    stream = STREAMS_BY_NAME[name]
    whole = go(stream)
    expected: dict[int, Passed] = {}
    for cut in range(len(stream)):
        frames = arrived(stream, cut)
        expected.setdefault(len(frames), go(*frames))
        found, like = go(stream[:cut]), expected[len(frames)]
        out = found.fed + found.closed
        assert found.told == like.told and chunks_of(out) == chunks_of(like.fed + like.closed), f"cut at {cut}"
        assert (whole.fed + whole.closed).startswith(found.fed) and found.fed.endswith((b"", b"\n\n", b"\r\n\r\n", b"\r\r")), "whole events, and they are a prefix"
        ended = any(b"[DONE]" in frame or b'"finish_reason":"stop' in frame.replace(b": ", b":") or b'"finish_reason":"length' in frame or b'finish_reason":"tool' in frame
                    or b'finish_reason":"content_f' in frame for frame in frames)
        assert found.passage.done <= ended
        if found.passage.broken or found.passage.error is not None:
            assert not found.passage.done and b"[DONE]" not in out, "what is broken never looks whole"
        else:
            assert found.passage.done and (out.endswith(b"data: [DONE]\n\n") or not found.passage.content or out.rstrip(b"\r\n").endswith(b"[DONE]"))


class SlowPassage(ChatPassage):
    """A passage that looks closely at every event."""

    def _learn(self, choices: Any, raw: bytes) -> None:
        super()._learn(choices, raw)
        self._prefix = self._suffix = b""


@pytest.mark.parametrize("name", STREAM_TABLE)
@pytest.mark.parametrize("wants_usage", [False, True])
def test_the_short_way_for_plain_text_gives_the_same(name: str, wants_usage: bool) -> None:
    stream = STREAMS_BY_NAME[name]
    wants_usage = wants_usage and STREAM_TABLE[name].usage is not None      # an estimate counts bytes, which the two ways see escaped or not
    fast, slow = go(stream, wants_usage=wants_usage), go(stream, passage=SlowPassage(wants_usage=wants_usage))
    assert (fast.fed, fast.closed, fast.told) == (slow.fed, slow.closed, slow.told)


def test_the_short_way_is_taken() -> None:
    looked: list[bytes] = []

    class Watched(ChatPassage):
        def _take(self, event: aicarousel.Event) -> bytes:
            looked.append(event.raw)
            return super()._take(event)

    frames = [b'data: {"id":"1","choices":[{"index":0,"delta":{"content":"%d"},"finish_reason":null}]}\n\n' % number for number in range(50)]
    passage = Watched(wants_usage=False)
    assert passage.feed(b"".join(frames)) == b"".join(frames) and len(looked) == 1
    assert passage.n_content_bytes == sum(len(str(number)) for number in range(50))


HIDDEN = [                          # events that have the look of plain text around something else
    b'data: {"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":"stop"}]}\n\n',
    b'data: {"choices":[{"index":0,"delta":{"content":""},"finish_reason":null}],"usage":{"prompt_tokens":1,"completion_tokens":2}}\n\n',
    b'data: {"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null}],"error":{"message":"x"}}\n\n',
    b'event: error\ndata: {"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null}]}\n\n',
    b'data: {"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null}]}\nevent: error\n\n',
    b'data: {"choices":[{"index":0,"delta":{"content":"a","tool_calls":[{"index":0,"id":"c","function":{"name":"f","arguments":""}}]},"finish_reason":null}]}\n\n',
    b'data: {"choices":[{"index":0,"delta":{"content":"a\n\n',
    b'data: "},"finish_reason":null}]}\n\n',
]


@pytest.mark.parametrize("hidden", HIDDEN)
def test_nothing_of_meaning_takes_the_short_way(hidden: bytes) -> None:
    plain = b'data: {"choices":[{"index":0,"delta":{"content":"text"},"finish_reason":null}]}\n\n'
    for n_before, n_behind in ((3, 1), (100, 100), (1, 200), (200, 1)):          # many at once are taken as one
        for pieces in ([plain * n_before + hidden + plain * n_behind], [plain, plain * (n_before - 1) + hidden + plain * n_behind]):
            fast, slow = go(*pieces), go(*pieces, passage=SlowPassage(wants_usage=False))
            assert (fast.fed, fast.closed, fast.told) == (slow.fed, slow.closed, slow.told)


@pytest.mark.parametrize("middle", [b'a"b', b"bad \\x escape", b"new\nline", b'a"},"finish_reason":"stop"},{"index":1,"delta":{"content":"b'])
def test_nothing_broken_takes_the_short_way(middle: bytes) -> None:
    head, tail = b'data: {"choices":[{"index":0,"delta":{"content":"', b'"},"finish_reason":null}]}\n\n'
    stream = head + b"text" + tail + head + middle + tail
    fast, slow = go(stream), go(stream, passage=SlowPassage(wants_usage=False))
    assert (fast.fed, fast.told) == (slow.fed, slow.told)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text(max_size=8), max_size=8), st.booleans(), st.booleans(), st.lists(st.integers(0, 900), max_size=5))
def test_any_text_goes_through_as_it_came(texts: list[str], ascii_only: bool, spaced: bool, cuts: list[int]) -> None:
    def frame(delta: Json, finish: str | None = None) -> bytes:
        chunk = {"id": "1", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}
        text = json.dumps(chunk, ensure_ascii=ascii_only, separators=(", ", ": ") if spaced else (",", ":"))
        return b"data: " + text.encode("utf-8", "replace") + b"\n\n"

    stream = b"".join([frame({"role": "assistant", "content": ""}), *(frame({"content": text}) for text in texts), frame({}, "stop"), DONE_FRAME])
    places = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    pieces = [stream[start:end] for start, end in zip(places, places[1:])]
    fast, slow = go(*pieces), go(*pieces, passage=SlowPassage(wants_usage=False))
    assert fast.fed == slow.fed == stream and fast.told == slow.told and fast.passage.content is any(texts)
    n_bytes = sum(len(text.encode("utf-8", "replace")) for text in texts)
    assert n_bytes == slow.passage.n_content_bytes <= fast.passage.n_content_bytes <= 6 * n_bytes


@pytest.mark.parametrize(("name", "index"), [("openai", 4), ("azure", 5), ("openai_n2", 8)])
def test_the_usage_chunk_stays_here_when_it_was_not_asked_for(name: str, index: int) -> None:
    frames = frames_of(STREAMS_BY_NAME[name])
    assert b'"choices":[]' in frames[index].replace(b" ", b"") and b"usage" in frames[index]
    without, with_usage = go(*frames), go(*frames, wants_usage=True)
    assert without.fed == b"".join(frames[:index] + frames[index + 1:]) and with_usage.fed == b"".join(frames)
    assert without.passage.usage == with_usage.passage.usage == STREAM_TABLE[name].usage


@pytest.mark.parametrize("name", STREAM_TABLE)
def test_the_clients_own_model_name_can_be_echoed(name: str) -> None:
    stream, told = STREAMS_BY_NAME[name], STREAM_TABLE[name].usage is not None
    plain, echoed = go(stream, wants_usage=told), go(stream, wants_usage=told, echo_model="my-name")
    assert plain.told == echoed.told
    before, after = chunks_of(plain.fed + plain.closed), chunks_of(echoed.fed + echoed.closed)
    assert after == [{**chunk, "model": "my-name"} if "model" in chunk else chunk for chunk in before]
    for cut in range(0, len(stream), 7):
        pieces = go(stream[:cut], stream[cut:], wants_usage=told, echo_model="my-name")
        assert pieces.fed + pieces.closed == echoed.fed + echoed.closed


def test_content_bytes_are_counted_where_there_is_plain_text() -> None:
    for name in ("openai", "openai_plain", "groq", "mistral", "gemini", "cut", "bom", "no_space", "spaced_json"):
        n_text, counted = len(STREAM_TABLE[name].text.encode()), go(STREAMS_BY_NAME[name]).passage.n_content_bytes
        assert n_text <= counted <= 2 * n_text + 10, name


@pytest.mark.parametrize(("name", "echo", "at_least"), [("crlf", None, 13), ("openai", "x", 9), ("openai_tools", None, 12), ("openai_refusal", None, 10), ("mistral_thinking", None, 4)])
def test_content_bytes_are_counted_for_every_stream(name: str, echo: str | None, at_least: int) -> None:
    assert go(STREAMS_BY_NAME[name], echo_model=echo).passage.n_content_bytes >= at_least


def test_nothing_leaves_behind_an_end_an_error_or_garbage() -> None:
    more = b'data: {"choices":[{"index":0,"delta":{"content":"more"},"finish_reason":"stop"}]}\n\n' + DONE_FRAME
    for name in ("openai", "error_in_chunk", "garbage", "error_event_words"):
        passage = ChatPassage(wants_usage=False)
        passage.feed(STREAMS_BY_NAME[name])
        before = outcome(passage)
        assert passage.feed(more) == b"" and passage.close() == b"" and outcome(passage) == before


@pytest.mark.parametrize("name", ["error_in_chunk", "garbage"])
def test_nothing_leaves_at_the_close_of_a_broken_stream(name: str) -> None:
    passage = ChatPassage(wants_usage=False)
    passage.feed(STREAMS_BY_NAME[name] + b'data: {"choices":[{"index":0,"delta":{"content":"more"},"finish_reason":null}]}')
    assert outcome(passage) in ("error", "not_json") and passage.close() == b"" and not passage.done


def test_an_event_beyond_all_measure_breaks_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aicarousel, "MAX_EVENT_BYTES", 5000)
    passage = ChatPassage(wants_usage=False)
    good = frames_of(STREAMS_BY_NAME["openai"])[1]
    assert passage.feed(good) == good
    assert b"".join([passage.feed(b"data: " + b"x" * 2000) for _ in range(5)]) == b"" and (passage.broken, passage.done) == ("too_big", False)


def test_signs_of_life() -> None:
    passage = ChatPassage(wants_usage=False)
    seen = []
    for piece in (b": c\n\n", b": c\n\n", *frames_of(STREAMS_BY_NAME["openai"])[:2], b": c\n\n", b": half", b" a comment\n\n"):
        passage.feed(piece)
        seen.append(passage.n_signs)
    assert seen[:2] == [0, 0], "comments before the first event are no life: a provider may send them for ever"
    assert 0 < seen[2] < seen[3] < seen[4] == seen[5] < seen[6]


STRANGE = ['"x"', "[null]", '[{"delta":null}]', '[{"delta":["x"]}]', '[{"delta":{"content":5}}]', '[{"delta":{"tool_calls":{}}}]', '[["x"]]', "null", "[]", "{}", '[{"delta":{"content":{}}}]']


@pytest.mark.parametrize("choices", STRANGE)
def test_chunks_of_wrong_types_do_no_harm(choices: str) -> None:
    found = go(b'data: {"choices":%s,"usage":"x","model":5}\n\n' % choices.encode(), b'data: {"x_groq":5,"usage":{"prompt_tokens":"9","completion_tokens":-1}}\n\n')
    assert not found.passage.done and b"[DONE]" not in found.fed + found.closed


@pytest.mark.parametrize("choices", ['{"a":1}', "5", "true", "1.5", '[{"delta":{"content":"a"},"finish_reason":["stop"]}]', '[{"delta":{},"finish_reason":{"a":1}}]'])
def test_chunks_of_other_wrong_types_do_no_harm_either(choices: str) -> None:
    found = go(b'data: {"choices":%s}\n\n' % choices.encode())
    assert b"[DONE]" not in found.fed


# ------------------------------------------------------------------ whole answers, errors, usage

def said_by(message: Any, finish: Any = "stop", **more: Any) -> Json:
    return {"choices": [{"index": 0, "message": message, "finish_reason": finish}], **more}


JUDGED: list[tuple[Any, str]] = [
    (said_by({"content": "Hi"}), ""),
    (said_by({"content": "Hi"}, None), ""),
    (said_by({"content": None, "tool_calls": [CALL]}, "tool_calls"), ""),
    (said_by({"content": None, "function_call": {"name": "f"}}), ""),
    (said_by({"content": "", "reasoning_content": "Hm"}), ""),
    (said_by({"content": None, "reasoning": "Hm"}), ""),
    (said_by({"content": None, "refusal": "No"}), ""),
    (said_by({"content": None, "audio": {"id": "a"}}), ""),
    (said_by({"content": "", "images": [{}]}), ""),
    (said_by({"content": [{"type": "text", "text": "Hi"}]}), ""),
    (said_by({"content": ""}, "length"), ""),
    (said_by({"content": None}, "content_filter"), ""),
    ({"choices": [said_by({"content": ""})["choices"][0], said_by({"content": "b"})["choices"][0]]}, ""),
    (said_by({"content": ""}), "empty_answer"),
    (said_by({"content": None}), "empty_answer"),
    (said_by({}), "empty_answer"),
    (said_by({"content": None, "tool_calls": []}, "tool_calls"), "empty_answer"),
    ({"choices": []}, "empty_answer"),
    (said_by(None), "not_json"),
    (said_by("Hi"), "not_json"),
    ({"choices": [{"text": "Hi"}]}, "not_json"),
    ({"choices": ["Hi"]}, "not_json"),
    ({"choices": {}}, "not_json"),
    ({"choices": None}, "not_json"),
    ({}, "not_json"),
    ({"message": {"content": "Hi"}, "done": True}, "not_json"),
    ([], "not_json"),
    (None, "not_json"),
    ("Hi", "not_json"),
    (5, "not_json"),
]


@pytest.mark.parametrize(("answer", "why"), JUDGED, ids=range(len(JUDGED)))
def test_a_whole_answer_is_judged(answer: Any, why: str) -> None:
    assert judge_chat_answer(answer) == (why, None)
    if isinstance(answer, dict):
        assert judge_chat_answer({**answer, "usage": {"prompt_tokens": 9, "completion_tokens": 4}}) == (why, SHORT if why in ("", "empty_answer") else None)


def test_a_strange_finish_reason_is_an_empty_answer() -> None:
    assert judge_chat_answer(said_by({"content": ""}, ["stop"]))[0] == "empty_answer"


ERRORS: list[tuple[Any, bool]] = [
    ({"error": {"message": "x"}}, True),
    ({"error": "x"}, True),
    ([{"error": {"message": "x"}}], True),
    ({"object": "error", "message": "x"}, True),
    ({"type": "error", "error": {"type": "overloaded_error"}}, True),
    ({"success": False, "errors": [{"code": 7000}]}, True),
    ({"base_resp": {"status_code": 1002, "status_msg": "rate limit"}}, True),
    ({"choices": [{"delta": {}, "finish_reason": "error"}]}, True),
    ({"choices": [{"delta": {}, "error": {"code": 502}}]}, True),
    ({"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}], "error": {"message": "x"}}, True),
    ({"choices": [{"delta": {"content": "x"}, "finish_reason": "stop"}]}, False),
    ({"error": None, "choices": []}, False),
    ({"error": {}, "choices": []}, False),
    ({"success": True, "errors": []}, False),
    ({"base_resp": {"status_code": 0, "status_msg": ""}}, False),
    ({"base_resp": None}, False),
    ({"choices": []}, False),
    ({"choices": ["error"]}, False),
    ({"choices": {"error": 1}}, False),
    ({}, False),
    ([], False),
    ([{"error": 1}, {"error": 2}], False),
    (None, False),
    ("error", False),
]


@pytest.mark.parametrize(("answer", "is_error"), ERRORS, ids=range(len(ERRORS)))
def test_errors_inside_answers_are_found(answer: Any, is_error: bool) -> None:
    assert (find_chat_error(answer) is not None) is is_error


USAGES: list[tuple[Json, Usage | None]] = [
    ({"usage": {"prompt_tokens": 9, "completion_tokens": 4}}, SHORT),
    ({"usage": {"prompt_tokens": 9, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 2}, "completion_tokens_details": {"reasoning_tokens": 1}}},
     Usage(9, 4, 3, 2, 1)),
    ({"usage": {"prompt_tokens": 9, "completion_tokens": 4, "prompt_tokens_details": None, "completion_tokens_details": None}}, SHORT),
    ({"usage": {"prompt_tokens": 9, "completion_tokens": 4, "prompt_tokens_details": "x", "completion_tokens_details": [1]}}, SHORT),
    ({"usage": {"prompt_tokens": 9, "completion_tokens": 4, "prompt_cache_hit_tokens": 8}}, Usage(9, 4, 8)),
    ({"usage": {"prompt_tokens": 9, "completion_tokens": 4, "prompt_cache_hit_tokens": 8, "prompt_tokens_details": {"cached_tokens": 8}}}, Usage(9, 4, 8)),
    ({"x_groq": {"id": "r", "usage": {"prompt_tokens": 9, "completion_tokens": 4}}}, SHORT),
    ({"usage": {"prompt_tokens": 9, "completion_tokens": 4}, "x_groq": {"usage": {"prompt_tokens": 1}}}, SHORT),
    ({"usage": None, "x_groq": {"usage": {"prompt_tokens": 9, "completion_tokens": 4}}}, SHORT),
    ({"usage": {"prompt_tokens": "9", "completion_tokens": -4}}, Usage(9)),
    ({"usage": {"prompt_tokens": True, "completion_tokens": 4.5}}, Usage(0, 4)),
    ({"usage": {"total_tokens": 5}}, Usage()),
    ({"usage": {}}, None),
    ({"usage": None}, None),
    ({"usage": "x"}, None),
    ({"x_groq": "x"}, None),
    ({"x_groq": {"usage": 5}}, None),
    ({}, None),
]


@pytest.mark.parametrize(("answer", "usage"), USAGES, ids=range(len(USAGES)))
def test_usage_is_read_wherever_it_stands(answer: Json, usage: Usage | None) -> None:
    assert chat_usage(answer) == usage


def test_the_envelope_of_errors() -> None:
    plain = {"message": "No", "type": "server_error", "param": None, "code": None}
    assert chat_error(GatewayError("No")) == {"error": plain}
    tried = [{"provider": "a", "model": "m", "status": 500, "reason": "server_error", "ms": 5}]
    full = GatewayError("No", 404, "model_not_found", "invalid_request_error", "model", attempts=tried)
    assert chat_error(full) == {"error": {"message": "No", "type": "invalid_request_error", "param": "model", "code": "model_not_found", "attempts": tried}}


def test_a_stream_of_two_choices_is_whole_when_both_have_finished() -> None:
    def piece(index: int, text: str | None = None, reason: str | None = None) -> bytes:
        return b"data: %s\n\n" % json.dumps({"id": "1", "choices": [{"index": index, "delta": {"content": text} if text else {}, "finish_reason": reason}]}).encode()

    begun = piece(0, "a") + piece(1, "b") + piece(0, reason="stop")
    cut, whole, marked = go(begun), go(begun + piece(1, reason="stop")), go(begun + DONE_FRAME)
    assert outcome(cut.passage) == "cut" and b"[DONE]" not in cut.fed + cut.closed
    assert whole.passage.done and (whole.fed + whole.closed).endswith(DONE_FRAME)
    assert marked.passage.done and b'"index":1,"delta":{},"finish_reason":"stop"' in marked.fed
