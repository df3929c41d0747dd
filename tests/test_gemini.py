"""Gemini's own way of asking (sections 13 and 22): generateContent as a Chat request, and the Chat stream that answers it as Gemini tells it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import aicarousel as a
from fakes import Close, Provider, answer, chat_chunk, frame, opened, stream
from house import House

Json = dict[str, Any]
STREAM, WHOLE = "/v1beta/models/aicarousel:streamGenerateContent?alt=sse", "/v1beta/models/aicarousel:generateContent"
HI: Json = {"contents": [{"role": "user", "parts": [{"text": "Hi"}]}]}
USED: Json = {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18, "prompt_tokens_details": {"cached_tokens": 3}}


def user(*parts: Json) -> Json:
    return {"role": "user", "parts": list(parts)}


def model(*parts: Json) -> Json:
    return {"role": "model", "parts": list(parts)}


def called(name: str, call_id: str | None = None, **args: Any) -> Json:
    return {"functionCall": {"name": name, "args": args, **({"id": call_id} if call_id else {})}}


def told(name: str, response: Any, call_id: str | None = None) -> Json:
    return {"functionResponse": {"name": name, "response": response, **({"id": call_id} if call_id else {})}}


# ---------------------------------------------------------------- requests

REQUESTS: list[tuple[str, Json, Json]] = [
    ("text", HI, {"messages": [{"role": "user", "content": "Hi"}]}),
    ("one part that is no list, and no role", {"contents": [{"parts": {"text": "Hi"}}]}, {"messages": [{"role": "user", "content": "Hi"}]}),
    ("system", {**HI, "systemInstruction": {"parts": [{"text": "You "}, {"text": "help."}]}}, {"messages": [{"role": "system", "content": "You help."}, {"role": "user", "content": "Hi"}]}),
    ("texts and a picture", {"contents": [user({"text": "a"}, {"inlineData": {"mimeType": "image/png", "data": "AAAA"}}, {"text": "b"})]},
     {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}, {"type": "text", "text": "b"}]}]}),
    ("a document", {"contents": [user({"inline_data": {"mime_type": "application/pdf", "data": "AAAA"}})]},
     {"messages": [{"role": "user", "content": [{"type": "file", "file": {"filename": "file", "file_data": "data:application/pdf;base64,AAAA"}}]}]}),
    ("calls with ids, thinking left out", {"contents": [user({"text": "Hi"}), model({"text": "hm", "thought": True}, {"text": "I "}, {"text": "look."}, {**called("look", "c1", path="a"), "thoughtSignature": "x"}),
                                                        user(told("look", {"output": "empty"}, "c1"), {"text": "and?"})]},
     {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "I look.", "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"path":"a"}'}}]},
                   {"role": "tool", "tool_call_id": "c1", "content": "empty"}, {"role": "user", "content": "and?"}]}),
    ("settings", {**HI, "generationConfig": {"temperature": 1, "topP": 0.9, "topK": 64, "maxOutputTokens": 9, "stopSequences": ["x"], "seed": 1, "candidateCount": 1, "thinkingConfig": {"includeThoughts": True}}},
     {"messages": [{"role": "user", "content": "Hi"}], "temperature": 1, "top_p": 0.9, "max_tokens": 9, "stop": ["x"], "seed": 1}),
    ("a schema for the answer", {**HI, "generationConfig": {"responseMimeType": "application/json", "responseSchema": {"type": "OBJECT", "properties": {"type": {"type": "STRING"}}}}},
     {"messages": [{"role": "user", "content": "Hi"}], "response_format": {"type": "json_schema", "json_schema": {
         "name": "answer", "schema": {"type": "object", "properties": {"type": {"type": "string"}}}}}}),
    ("JSON without a schema", {**HI, "generationConfig": {"responseMimeType": "application/json"}}, {"messages": [{"role": "user", "content": "Hi"}], "response_format": {"type": "json_object"}}),
    ("tools", {**HI, "tools": [{"functionDeclarations": [{"name": "f", "description": "F.", "parametersJsonSchema": {"type": "object"}}]}, {"googleSearch": {}}, {"function_declarations": [{"name": "g"}]}],
               "toolConfig": {"functionCallingConfig": {"mode": "ANY", "allowedFunctionNames": ["g"]}}},
     {"messages": [{"role": "user", "content": "Hi"}], "tool_choice": {"type": "function", "function": {"name": "g"}},
      "tools": [{"type": "function", "function": {"name": "f", "description": "F.", "parameters": {"type": "object"}}}, {"type": "function", "function": {"name": "g", "description": "", "parameters": {"type": "object", "properties": {}}}}]}),
    ("tools that may not be called", {**HI, "tools": [{"functionDeclarations": [{"name": "f", "parameters": {"type": "OBJECT"}}]}], "toolConfig": {"functionCallingConfig": {"mode": "NONE"}}},
     {"messages": [{"role": "user", "content": "Hi"}], "tool_choice": "none", "tools": [{"type": "function", "function": {"name": "f", "description": "", "parameters": {"type": "object"}}}]}),
    ("Google's tools alone", {**HI, "tools": [{"googleSearch": {}}, {"codeExecution": {}}]}, {"messages": [{"role": "user", "content": "Hi"}]}),
]


@pytest.mark.parametrize("body,wanted", [row[1:] for row in REQUESTS], ids=[row[0] for row in REQUESTS])
def test_a_request_becomes_one_of_chat(body: Json, wanted: Json) -> None:
    made = a.gemini_chat_request(body, "m")
    assert made == {"model": "m", "stream": True, "stream_options": {"include_usage": True}, **wanted}
    assert a.check_chat_request(made) == made


def test_results_find_their_calls_without_ids_and_with_ids_that_come_twice() -> None:
    body = {"contents": [user({"text": "Hi"}), model(called("f", n=1), called("f", n=2), called("g", "same"), called("h", "same")), user(told("g", {"output": "G"}, "same"), told("h", "H"), told("f", [1]), told("f", {"output": "2", "more": 1}))]}
    _, said, *results = a.gemini_chat_request(body, "m")["messages"]
    ids = [call["id"] for call in said["tool_calls"]]
    assert len(set(ids)) == 4 and ids[2] == "same"
    assert [(result["tool_call_id"], result["content"]) for result in results] == [("same", "G"), (ids[3], '"H"'), (ids[0], "[1]"), (ids[1], '{"output":"2","more":1}')]


REFUSED: list[tuple[Any, str]] = [
    ([], "contents"), ({}, "contents"), ({"contents": []}, "contents"), ({"contents": [1]}, "contents[0].parts"), ({"contents": [{"parts": ["x"]}]}, "contents[0].parts"),
    ({**HI, "systemInstruction": "x"}, "systemInstruction.parts"), ({"contents": [user(told("f", {}))]}, "contents[0]"), ({"contents": [user({"fileData": {"fileUri": "gs://x"}})]}, "contents[0]"),
    ({**HI, "tools": {}}, ""), ({**HI, "tools": [1]}, "tools"), ({**HI, "tools": [{"functionDeclarations": [{}]}]}, "tools"), ({**HI, "tools": [{"functionDeclarations": 1}]}, "tools"), ({**HI, "generationConfig": []}, ""),
    ({**HI, "generationConfig": [1]}, "generationConfig"), ({**HI, "generationConfig": {"temperature": "hot"}}, "temperature"),
]


@pytest.mark.parametrize("body,param", REFUSED)
def test_what_is_no_request_is_refused(body: Any, param: str) -> None:
    if not param:       # nothing in it: as if it were not there
        assert a.gemini_chat_request(body, "m")["messages"]
        return
    with pytest.raises(a.GatewayError) as raised:
        a.check_chat_request(a.gemini_chat_request(body, "m"))
    assert raised.value.status == 400 and raised.value.param == param


JSONS = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=3), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([
    "contents", "parts", "text", "role", "functionCall", "functionResponse", "name", "id", "args", "inlineData", "mimeType", "data", "tools", "functionDeclarations", "parameters", "type", "toolConfig",
    "functionCallingConfig", "mode", "allowedFunctionNames", "generationConfig", "responseSchema", "responseMimeType", "systemInstruction", "thought"]), inner, max_size=4), max_leaves=20)


@settings(max_examples=300, deadline=None)
@given(JSONS, st.lists(JSONS, max_size=3))
def test_whatever_is_sent_is_read_or_refused(body: Any, contents: list[Any]) -> None:
    for sent in (body, {**body, "contents": contents} if isinstance(body, dict) else contents):
        try:
            json.dumps(a.gemini_chat_request(sent, "m"))
        except a.GatewayError as error:
            assert error.status == 400


def test_many_calls_are_read_in_a_moment() -> None:
    n_calls = 20_000
    body = {"contents": [model(*(called(f"f{number}", f"c{number}") for number in range(n_calls))), user(*(told(f"f{number}", {}, f"c{number}") for number in reversed(range(n_calls))))]}
    assert len(a.gemini_chat_request(body, "m")["messages"]) == n_calls + 1


# ---------------------------------------------------------------- answers

def deltas(*rows: Json, finish: str = "stop", usage: Json | None = USED) -> list[Any]:
    """A Chat stream of these deltas."""
    return stream(*(frame(chat_chunk(row)) for row in rows), frame(chat_chunk({}, finish)), *([frame({**chat_chunk({}), "choices": [], "usage": usage})] if usage else []), frame("[DONE]"))


def call_deltas(index: int, call_id: str, name: str, *arguments: str) -> list[Json]:
    return [{"tool_calls": [{"index": index, "id": call_id, "type": "function", "function": {"name": name, "arguments": ""}}]},
            *({"tool_calls": [{"index": index, "function": {"arguments": text}}]} for text in arguments)]


TOLD = [{"role": "assistant", "content": ""}, {"reasoning_content": "hm"}, {"content": "I "}, {"content": "look."}, *call_deltas(0, "c1", "f", '{"a"', ": 1}"), *call_deltas(1, "c2", "g", "")]
COUNTS = {"promptTokenCount": 11, "candidatesTokenCount": 7, "totalTokenCount": 18, "cachedContentTokenCount": 3}
CALLS = [{"functionCall": {"id": "c1", "name": "f", "args": {"a": 1}}}, {"functionCall": {"id": "c2", "name": "g", "args": {}}}]


def test_a_stream_is_told_as_it_comes(build: Callable[..., House], provider: Provider) -> None:
    house = build(one=deltas(*TOLD, finish="tool_calls"))
    reply = house.post(STREAM, HI)
    assert reply.status == 200 and reply.headers["content-type"].startswith("text/event-stream") and reply.headers["x-aicarousel-provider"] == "one"
    events = [json.loads(text) for text in reply.events]
    parts = [event["candidates"][0]["content"]["parts"] for event in events]
    assert parts == [[{"text": "hm", "thought": True}], [{"text": "I "}], [{"text": "look."}], CALLS]
    assert [event["candidates"][0].get("finishReason") for event in events] == [None, None, None, "STOP"] and events[-1]["usageMetadata"] == COUNTS
    assert {event["modelVersion"] for event in events} == {"aicarousel"} and len({event["responseId"] for event in events}) == 1
    assert provider.calls("one")[0].json["messages"] == [{"role": "user", "content": "Hi"}]


def test_a_whole_answer(build: Callable[..., House], provider: Provider) -> None:
    house = build(one=deltas(*TOLD, finish="tool_calls"))
    reply = house.post(WHOLE, HI)
    assert reply.status == 200 and reply.headers["content-type"] == "application/json"
    [candidate] = reply.json["candidates"]
    assert candidate == {"content": {"role": "model", "parts": [{"text": "hm", "thought": True}, {"text": "I look."}, *CALLS]}, "index": 0, "finishReason": "STOP"} and reply.json["usageMetadata"] == COUNTS


@pytest.mark.parametrize("finish,wanted", [("stop", "STOP"), ("length", "MAX_TOKENS"), ("content_filter", "SAFETY")])
def test_why_it_ended(build: Callable[..., House], finish: str, wanted: str) -> None:
    house = build(one=deltas({"content": "x"}, finish=finish, usage=None))
    for path in (STREAM, WHOLE):
        reply = house.post(path, HI)
        last = reply.json if path == WHOLE else json.loads(reply.events[-1])
        assert last["candidates"][0]["finishReason"] == wanted, path
        assert (path == WHOLE) is (last["candidates"][0]["content"]["parts"] == [{"text": "x"}])


@pytest.mark.parametrize("path", [STREAM, WHOLE])
def test_errors_are_geminis(build: Callable[..., House], provider: Provider, path: str) -> None:
    house = build(one=answer({"error": {"message": "temperature is out of range", "type": "invalid_request_error", "param": "temperature"}}, 400))
    for status, word, reply in ((401, "UNAUTHENTICATED", house.post(path, HI, key="")), (400, "INVALID_ARGUMENT", house.post(path, {})), (400, "INVALID_ARGUMENT", house.post(path, HI)),
                                (405, "INTERNAL", house.get(path))):
        assert reply.status == status and reply.json["error"]["code"] == status and reply.json["error"]["status"] == word and reply.json["error"]["message"], reply.body
    assert house.post("/v1beta/models/m:predict", HI).status == house.post("/v1beta/models/m", HI).status == house.post("/v1beta/models/", HI).status == 404
    assert house.post(path, HI, key="", headers={"x-goog-api-key": house.key}).status == 400, "the key as Gemini's clients send it"


def test_every_provider_out_is_told_with_its_status(build: Callable[..., House]) -> None:
    house = build(one=answer({"error": {"message": "slow down"}}, 429, headers=[("retry-after", "99")]), carousel={"maxWait": 0})
    for path in (STREAM, WHOLE):
        reply = house.post(path, HI)
        assert reply.status == 429 and reply.json["error"]["status"] == "RESOURCE_EXHAUSTED" and reply.headers["retry-after"]


def test_what_breaks_off_never_looks_whole(build: Callable[..., House]) -> None:
    house = build(one=opened(frame(chat_chunk({"content": "Half of "})), frame(chat_chunk({"content": "this"})), Close()), carousel={"resume": "off"} if "resume" in a._CAROUSEL_FIELDS else {})
    reply = house.post(STREAM, HI)
    events = [json.loads(text) for text in reply.events]
    assert events[0]["candidates"][0]["content"]["parts"] == [{"text": "Half of "}] and events[-1]["error"]["code"] == 502 and not any("finishReason" in json.dumps(event) for event in events)
    house.pass_time(3600.0)
    reply = house.post(WHOLE, HI)
    assert reply.status == 502 and reply.json["error"]["code"] == 502 and "Half" not in reply.body.decode()


def test_the_name_may_hold_slashes_and_the_next_provider_takes_over(build: Callable[..., House], provider: Provider) -> None:
    house = build(one=answer({"error": {"message": "down"}}, 500), two=deltas({"content": "ok"}))
    reply = house.post("/v1beta/models/two%2Fm:generateContent", HI)
    assert reply.status == 200 and reply.json["modelVersion"] == "two/m" and not provider.calls("one")
    assert house.post("/v1beta/models/two/m:generateContent", HI).status == 200
    assert "ok" in house.post(STREAM, HI).body.decode() and len(provider.calls("two")) == 3


def test_a_provider_that_speaks_another_format(build: Callable[..., House]) -> None:
    from dialects import Telling
    said = Telling("messages")
    house = build(one=stream(said.begin(), said.think("hm"), said.say("All ", "well."), said.end()), entries={"one": {"format": "messages"}})
    assert [part.get("text") for part in house.post(WHOLE, HI).json["candidates"][0]["content"]["parts"]] == ["hm", "All well."]
