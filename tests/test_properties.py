"""The properties P1 to P13 of the translation, under generated requests, damaged histories, answers and streams of all three formats.

Examples are derived from the tests' names, so that a run finds what the last one found; PROPERTIES_LONG=20 takes fresh ones, twenty times as many.
What is generated is rendered by the small functions here, never by the module, so that a mistake cannot cancel itself out.
"""
from __future__ import annotations

import copy
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, example, given, settings, strategies as st

import aicarousel as a
from deltas import check_deltas

anthropic = pytest.importorskip("anthropic", reason="the Anthropic SDK is not installed")
openai = pytest.importorskip("openai", reason="the OpenAI SDK is not installed")

Json = dict[str, Any]
LONG = int(os.environ.get("PROPERTIES_LONG", "0"))
FORMATS = ("chat", "messages", "responses")
VENDORS = {"chat": a.profile_for("openai", "gpt-4o"), "messages": a.profile_for("anthropic", "claude-sonnet-4-6", "messages"), "responses": a.profile_for("openai", "gpt-5.5", "responses")}
TARGETS = [*VENDORS.values(), *(a.profile_for(*row) for row in (
    ("anthropic", "claude-opus-5", "messages"), ("anthropic", "claude-sonnet-4-5", "messages"), ("moonshot", "kimi-k2", "messages"), ("deepseek", "deepseek-flash", "messages"), ("groq", "openai/gpt-oss-120b"),
    ("gemini", "gemini-3.5-flash-lite"), ("deepseek", "deepseek-flash"), ("mistral", "mistral-large-latest"), ("moonshot", "kimi-k2"), ("cerebras", "gpt-oss-120b"), ("minimax", "m2"),
    ("openrouter", "anthropic/claude-haiku-4.5"), ("xai", "grok-4.3", "responses"), ("groq", "openai/gpt-oss-20b", "responses"))), a.Profile()]


def examples(count: int) -> Any:
    return settings(derandomize=not LONG, max_examples=count * max(1, LONG), deadline=None, database=None, suppress_health_check=list(HealthCheck))


# ---------------------------------------------------------------- what is said: blocks of an answer, items of a conversation

letters = st.sampled_from(["a", "b ", " c", "\u00e9", "\u4e2d", "\U0001f600", "\n", "\r\n", '"', "\\", "<", "{", "data: [DONE]", "\u2028"])
pieces = st.lists(letters, min_size=1, max_size=4).map("".join)
objects = st.dictionaries(st.sampled_from(["p", "q", "\u00e9"]), st.one_of(st.integers(), st.none(), st.text(st.sampled_from('ab"\\\n\u4e2d'), max_size=5), st.lists(st.integers(), max_size=2)), max_size=3)


@st.composite
def cut_up(draw: Any, texts: Any) -> list[str]:
    """A text in pieces, none of them empty."""
    text = draw(texts)
    places = sorted({0, len(text), *draw(st.lists(st.integers(0, len(text)), max_size=4))})
    return [text[start:end] for start, end in zip(places, places[1:])]


def block_of(kind: str, number: int) -> Any:
    if kind == "call":
        dumped = st.builds(lambda value, ascii_only: json.dumps(value, ensure_ascii=ascii_only), objects, st.booleans())
        return st.tuples(st.just("call"), st.just(f"call_abcdef{number}x"), st.sampled_from(["read", "find_all"]), cut_up(st.one_of(dumped, st.just(""))))
    return st.tuples(st.just(kind), st.lists(pieces, min_size=1, max_size=3).map(lambda found: ["." + found[0], *found[1:]]))


@st.composite
def answers(draw: Any, ordered: bool = False) -> list[Any]:
    """Blocks of an answer, neighbours of different kinds; ordered: thinking, text, calls, as a whole Chat answer has them."""
    kinds = draw(st.lists(st.sampled_from(["think", "text", "call"]), min_size=1, max_size=5))
    if ordered:
        kinds = ["think"] * ("think" in kinds) + ["text"] * ("text" in kinds) + ["call"] * kinds.count("call")
    kinds = [kind for place, kind in enumerate(kinds) if kind == "call" or not place or kinds[place - 1] != kind]
    return [draw(block_of(kind, number)) for number, kind in enumerate(kinds)]


def chat_frames(blocks: list[Any], *, usage: bool, field: str = "reasoning_content", mixed: bool = False) -> tuple[list[Any], int]:
    """Events of a Chat provider and the place of the finish; mixed: the fragments of neighbouring calls take turns."""
    deltas: list[Json] = []
    n_calls, waiting = 0, []
    for place, block in enumerate(blocks):
        if block[0] != "call":
            key = "content" if block[0] == "text" else field
            deltas += [{key: [{"type": "reasoning.text", "format": "unknown", "index": 0, "text": piece}] if key == "reasoning_details" else piece} for piece in block[1]]
            continue
        first = {"index": n_calls, "id": block[1], "type": "function", "function": {"name": block[2], "arguments": ""}}
        deltas.append({"tool_calls": [first]})
        waiting.append([{"tool_calls": [{"index": n_calls, "function": {"arguments": piece}}]} for piece in block[3]])
        n_calls += 1
        if not mixed or place + 1 == len(blocks) or blocks[place + 1][0] != "call":
            while any(waiting):
                deltas += [queue.pop(0) for queue in waiting if queue]
            waiting = []
    head = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    events = [{**head, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in [{"role": "assistant", "content": ""}, *deltas]]
    end = len(events)
    events.append({**head, "choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls" if n_calls else "stop"}]})
    if usage:
        events.append({**head, "choices": [], "usage": {"prompt_tokens": 20, "completion_tokens": 9, "total_tokens": 29, "prompt_tokens_details": {"cached_tokens": 5}}})
    return [*events, "[DONE]"], end


def messages_frames(blocks: list[Any], *, usage: bool, field: str = "", mixed: bool = False) -> tuple[list[Any], int]:
    """Events of a Messages provider and the place of the stop reason."""
    counts = {"input_tokens": 15, "cache_read_input_tokens": 5, "output_tokens": 1} if usage else {}
    events: list[Json] = [{"type": "message_start", "message": {"id": "msg_1", "type": "message", "role": "assistant", "model": "m", "content": [], "usage": counts}}]
    starts = {"text": {"type": "text", "text": ""}, "think": {"type": "thinking", "thinking": "", "signature": ""}}
    for index, block in enumerate(blocks):
        start = starts.get(block[0]) or {"type": "tool_use", "id": block[1], "name": block[2], "input": {}}
        form, key = {"text": ("text_delta", "text"), "think": ("thinking_delta", "thinking"), "call": ("input_json_delta", "partial_json")}[block[0]]
        events += [{"type": "content_block_start", "index": index, "content_block": start}, {"type": "ping"}]
        events += [{"type": "content_block_delta", "index": index, "delta": {"type": form, key: piece}} for piece in block[-1]]
        if block[0] == "think":
            events.append({"type": "content_block_delta", "index": index, "delta": {"type": "signature_delta", "signature": "EqQBCkYI"}})
        events.append({"type": "content_block_stop", "index": index})
    end = len(events)
    stop = "tool_use" if any(block[0] == "call" for block in blocks) else "end_turn"
    events.append({"type": "message_delta", "delta": {"stop_reason": stop, "stop_sequence": None}, "usage": {"output_tokens": 9} if usage else {}})
    return [*events, {"type": "message_stop"}], end


def responses_frames(blocks: list[Any], *, usage: bool, field: str = "", mixed: bool = False) -> tuple[list[Any], int]:
    """Events of a Responses provider and the place of the terminal one."""
    events: list[Json] = [{"type": "response.created", "response": {"id": "resp_1", "status": "in_progress", "output": []}}]
    output = responses_whole(blocks, usage=usage)["output"]
    for index, (block, item) in enumerate(zip(blocks, output)):
        empty = {"message": {"content": []}, "reasoning": {"summary": []}, "function_call": {"arguments": ""}}[item["type"]]
        events.append({"type": "response.output_item.added", "output_index": index, "item": {**item, **empty}})
        name = {"text": "output_text", "think": "reasoning_summary_text", "call": "function_call_arguments"}[block[0]]
        events += [{"type": f"response.{name}.delta", "output_index": index, "item_id": item["id"], "content_index": 0, "summary_index": 0, "delta": piece} for piece in block[-1]]
        events.append({"type": "response.output_item.done", "output_index": index, "item": item})
    return [*events, {"type": "response.completed", "response": responses_whole(blocks, usage=usage)}], len(events)


def chat_whole(blocks: list[Any], *, usage: bool) -> Json:
    message: Json = {"role": "assistant", "content": None}
    for block in blocks:
        if block[0] == "call":
            message.setdefault("tool_calls", []).append({"id": block[1], "type": "function", "function": {"name": block[2], "arguments": "".join(block[3])}})
        else:
            message["content" if block[0] == "text" else "reasoning_content"] = "".join(block[1])
    told = {"usage": {"prompt_tokens": 20, "completion_tokens": 9, "total_tokens": 29, "prompt_tokens_details": {"cached_tokens": 5}}} if usage else {}
    return {"id": "c1", "object": "chat.completion", "created": 1, "model": "m", "choices": [{"index": 0, "message": message, "finish_reason": "tool_calls" if "tool_calls" in message else "stop"}], **told}


def messages_whole(blocks: list[Any], *, usage: bool) -> Json:
    content = [{"type": "text", "text": "".join(block[1])} if block[0] == "text" else {"type": "thinking", "thinking": "".join(block[1]), "signature": "EqQBCkYI"} if block[0] == "think" else
               {"type": "tool_use", "id": block[1], "name": block[2], "input": json.loads("".join(block[3]) or "{}")} for block in blocks]
    return {"id": "msg_1", "type": "message", "role": "assistant", "model": "m", "content": content, "stop_sequence": None, "stop_reason": "tool_use" if any(block[0] == "call" for block in blocks) else "end_turn",
            "usage": {"input_tokens": 15, "cache_read_input_tokens": 5, "output_tokens": 9} if usage else {}}


def responses_whole(blocks: list[Any], *, usage: bool) -> Json:
    output: list[Json] = []
    for index, block in enumerate(blocks):
        if block[0] == "text":
            output.append({"id": f"msg_{index}", "type": "message", "role": "assistant", "status": "completed", "content": [{"type": "output_text", "text": "".join(block[1]), "annotations": []}]})
        elif block[0] == "think":
            output.append({"id": f"rs_{index}", "type": "reasoning", "summary": [{"type": "summary_text", "text": "".join(block[1])}], "encrypted_content": "gAAAAABo"})
        else:
            output.append({"id": f"fc_{index}", "type": "function_call", "status": "completed", "call_id": block[1], "name": block[2], "arguments": "".join(block[3])})
    told = {"usage": {"input_tokens": 20, "input_tokens_details": {"cached_tokens": 5}, "output_tokens": 9, "total_tokens": 29}} if usage else {}
    return {"id": "resp_1", "object": "response", "status": "completed", "model": "m", "output": output, **told}


FRAMES: dict[str, Callable[..., tuple[list[Any], int]]] = {"chat": chat_frames, "messages": messages_frames, "responses": responses_frames}
WHOLES: dict[str, Callable[..., Json]] = {"chat": chat_whole, "messages": messages_whole, "responses": responses_whole}


def as_bytes(frames: list[Any], newline: str = "\n", ascii_only: bool = False, comments: bool = False) -> list[bytes]:
    """Each event as it goes over the wire."""
    done = []
    for frame in frames:
        data = frame if isinstance(frame, str) else json.dumps(frame, ensure_ascii=ascii_only)
        name = f"event: {frame['type']}{newline}" if isinstance(frame, dict) and "type" in frame else ""
        done.append(f"{': hello' + newline * 2 if comments else ''}{name}data: {data}{newline * 2}".encode("utf-8", "replace"))
    return done


framings = st.fixed_dictionaries({"newline": st.sampled_from(["\n", "\r\n", "\r"]), "ascii_only": st.booleans(), "comments": st.booleans()})
manners = st.fixed_dictionaries({"usage": st.booleans(), "field": st.sampled_from(["reasoning_content", "reasoning", "reasoning_details"]), "mixed": st.booleans()})


def asked_by(client: str, **more: Any) -> a.Asked:
    return a.Asked({**a.new_hub(client, "asked", True), "turns": [], "meta": {"include_usage": True}, **more}, seed="s")


def relayed(chunks: list[bytes], wire: str, client: str) -> tuple[bytes, a.Translation]:
    """A provider's stream through the whole coupling: what the client gets, and how it ended."""
    fmt = a.FORMATS[client]
    way = a.Translation(a.FORMATS[wire].reader(a.Source(VENDORS[wire], "s", fmt.call_prefix)), fmt.writer(asked_by(client)), n_prompt_tokens=25)
    out = b"".join([way.feed(chunk) for chunk in chunks])
    return out + way.close(), way


# ---------------------------------------------------------------- what a client understands, by the vendors' own accumulators

def events_of(stream: bytes) -> list[Any]:
    """The events of a stream, by a parser of this file's."""
    blocks = stream.decode().split("\n\n")
    assert blocks[-1] == ""
    found = []
    for block in blocks[:-1]:
        lines = dict(line.split(": ", 1) for line in block.split("\n"))
        if "data" in lines:
            found.append("[DONE]" if lines["data"] == "[DONE]" else json.loads(lines["data"]))
            assert "event" not in lines or lines["event"] == found[-1]["type"]
    return found


def check_grammar(events: list[Any], client: str) -> None:
    """The order of a stream's events, whatever they hold."""
    if client == "chat":
        assert events.count("[DONE]") == 1 and events[-1] == "[DONE]" or "[DONE]" not in events and set(events[-1]) == {"error"}
        return
    if client == "responses":
        added = [event["output_index"] for event in events if event["type"] == "response.output_item.added"]
        assert [event["sequence_number"] for event in events] == list(range(len(events))) and added == list(range(len(added)))
        assert [event["type"] for event in events if event["type"] in ("response.completed", "response.incomplete", "response.failed")] == [events[-1]["type"]]
        return
    letters_of = {"message_start": "s", "ping": "p", "content_block_start": "o", "content_block_delta": "d", "content_block_stop": "c", "message_delta": "m", "message_stop": "e", "error": "x"}
    said = "".join(letters_of[event["type"]] for event in events)
    assert re.fullmatch(r"s(p|od*c)*me|(s(p|od*c)*(od*)?)?x", said), said
    assert [event["index"] for event in events if event["type"] == "content_block_start"] == list(range(said.count("o")))


def heard_messages(events: list[Any]) -> Json:
    from anthropic._models import construct_type
    from anthropic.lib.streaming._messages import accumulate_event
    from anthropic.types import RawMessageStreamEvent
    check_grammar(events, "messages")
    snapshot, buffers = None, {}
    for event in events:
        if event["type"] not in ("error", "ping"):
            snapshot = accumulate_event(event=construct_type(type_=RawMessageStreamEvent, value=event), current_snapshot=snapshot, json_bufs=buffers)
    if events[-1]["type"] == "error":
        return {"error": events[-1]["error"]["message"]}
    return {**whole_messages(snapshot.to_dict()), "error": None}


def whole_messages(body: Json) -> Json:
    content = body["content"]
    assert all(block.get("text") != "" or block["type"] != "text" for block in content)
    usage = body["usage"]
    return {"text": "".join(block["text"] for block in content if block["type"] == "text"), "think": "".join(block["thinking"] for block in content if block["type"] == "thinking"),
            "calls": [(block["id"], block["name"], block["input"]) for block in content if block["type"] == "tool_use"], "stop": body["stop_reason"],
            "in": usage["input_tokens"] + usage["cache_read_input_tokens"] + usage["cache_creation_input_tokens"], "out": usage["output_tokens"]}


def heard_chat(events: list[Any]) -> Json:
    from openai.lib.streaming.chat import ChatCompletionStreamState
    from openai.types.chat import ChatCompletionChunk
    check_grammar(events, "chat")
    state = ChatCompletionStreamState()
    if isinstance(events[-1], dict):
        return {"error": events[-1]["error"]["message"]}
    for event in events[:-1]:
        state.handle_chunk(ChatCompletionChunk.model_validate(event))
    assert len({(event["id"], event["created"], event["model"]) for event in events[:-1]}) == 1
    return {**whole_chat(state.current_completion_snapshot.to_dict()), "error": None}


def whole_chat(body: Json) -> Json:
    choice = body["choices"][0]
    message, usage = choice["message"], body["usage"]
    calls = [(call["id"], call["function"]["name"], json.loads(call["function"]["arguments"])) for call in message.get("tool_calls") or ()]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    return {"text": (message.get("content") or "") + (message.get("refusal") or ""), "think": message.get("reasoning_content") or "", "calls": calls, "stop": choice["finish_reason"],
            "in": usage["prompt_tokens"], "out": usage["completion_tokens"]}


def heard_responses(events: list[Any]) -> Json:
    from openai._models import construct_type_unchecked
    from openai._types import omit
    from openai.lib.streaming.responses._responses import ResponseStreamState
    from openai.types.responses import ResponseStreamEvent
    state = ResponseStreamState(input_tools=omit, text_format=omit)
    check_grammar(events, "responses")
    for event in events:
        state.handle_event(construct_type_unchecked(type_=ResponseStreamEvent, value=event))
    last = events[-1]
    if last["type"] == "response.failed":
        return {"error": last["response"]["error"]["message"]}
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == last["response"]["output"]
    return {**whole_responses(last["response"]), "error": None}


def whole_responses(body: Json) -> Json:
    items, usage = body["output"], body["usage"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"] and len({item["id"] for item in items}) == len(items)
    calls = [(item["call_id"], item["name"], {"input": item["input"]} if item["type"] == "custom_tool_call" else json.loads(item["arguments"])) for item in items if item["type"].endswith("_call")]
    return {"text": "".join(part.get("text", "") + part.get("refusal", "") for item in items if item["type"] == "message" for part in item["content"]),
            "think": "".join(part["text"] for item in items if item["type"] == "reasoning" for part in item["summary"]), "calls": calls, "stop": (body.get("incomplete_details") or {}).get("reason") or body["status"],
            "in": usage["input_tokens"], "out": usage["output_tokens"]}


HEARD: dict[str, Callable[[list[Any]], Json]] = {"chat": heard_chat, "messages": heard_messages, "responses": heard_responses}
WHOLE_HEARD: dict[str, Callable[[Json], Json]] = {"chat": whole_chat, "messages": whole_messages, "responses": whole_responses}


def meant(blocks: list[Any]) -> Json:
    return {"text": "".join("".join(block[1]) for block in blocks if block[0] == "text"), "think": "".join("".join(block[1]) for block in blocks if block[0] == "think"),
            "calls": [(block[1], block[2], json.loads("".join(block[3]) or "{}")) for block in blocks if block[0] == "call"]}


# ---------------------------------------------------------------- P1 to P3, P9, P11: answers

SEAL = {"family": "cerebras", "model": "m", "field": "reasoning"}
part_deltas = st.one_of(
    st.lists(pieces, min_size=1, max_size=3).map(lambda found: [a.text_delta(piece) for piece in found]),
    st.lists(pieces, min_size=1, max_size=2).map(lambda found: [*(a.think_delta(piece) for piece in found), a.seal_delta(SEAL)]),
    st.just([a.seal_delta({"family": "anthropic", "model": "m", "field": "redacted", "data": "Emw"})]), st.just([a.refuse_delta("No.")]),
    st.just([a.text_delta("x"), a.cite_delta("https://e.x", "t")]), st.just([a.opaque_delta("perplexity", {"type": "thing"})]),
    st.tuples(st.sampled_from(["read", "patch"]), cut_up(objects.map(json.dumps))).map(lambda row: [a.call_delta("", row[0], "custom" if row[0] == "patch" else "function"), *(
        [a.args_delta(piece) for piece in row[1]] if row[0] == "read" else [a.args_delta('{"input":'), a.args_delta('"x"}')])]))
counts = st.fixed_dictionaries({}, optional={name: st.one_of(st.none(), st.integers(-5, 10**6)) for name in ("input", "cached", "cache_write", "output", "reasoning")})
REASONS = ["end", "length", "tool", "sequence", "filter", "refusal", "pause", "context"]


@st.composite
def delta_streams(draw: Any) -> list[Json]:
    deltas = [a.start_delta("i", "m", draw(st.none() | st.just({"input": 7})))] if draw(st.booleans()) else []
    for number, found in enumerate(draw(st.lists(part_deltas, max_size=5))):
        deltas += [{**delta, "id": f"call_abcdef{number}x"} if delta["delta"] == "call" else delta for delta in found]
    end = draw(st.sampled_from([*REASONS, "error"]))
    if end == "error":
        return [*deltas, a.error_delta(draw(st.sampled_from([400, 429, 500, 503])), "It broke.")]
    return [*deltas, *([a.usage_delta(draw(counts))] if draw(st.booleans()) else []), a.stop_delta(end, "END" if end == "sequence" else None)]


@examples(100)
@given(delta_streams(), st.sampled_from(FORMATS))
def test_P1_what_is_written_is_what_the_vendors_sdk_understands(deltas: list[Json], client: str) -> None:
    assert check_deltas(deltas) == []
    if client == "chat":        # the SDK's type of a chunk knows no freeform calls
        deltas = [{**delta, "kind": "function"} if delta["delta"] == "call" else delta for delta in deltas]
    before = copy.deepcopy(deltas)
    filler, writer = a.UsageFiller(25), a.FORMATS[client].writer(asked_by(client, tools=[{"name": "patch", "kind": "custom"}, {"name": "read", "kind": "function"}]))
    filled = [ready for delta in deltas for ready in filler.feed(delta)]
    heard = HEARD[client](events_of(b"".join([piece for delta in filled for piece in writer.feed(delta)] + writer.close())))
    assert deltas == before
    if deltas[-1]["delta"] == "error":
        assert heard == {"error": "It broke."}
        return
    parts = a.fold_deltas(deltas)
    assert heard["error"] is None
    shown = [part for part in parts if part["type"] in ("text", "refusal")]
    assert heard["text"] == "".join(part["text"] for part in (sorted(shown, key=lambda part: part["type"] == "refusal") if client == "chat" else shown))
    assert heard["think"] == "".join(part["text"] for part in parts if part["type"] == "think")
    calls = [(part["id"], part["name"], json.loads(part["args"])) for part in parts if part["type"] == "call"]
    assert heard["calls"] == calls


@examples(120)
@given(answers(), manners, framings, st.sampled_from(FORMATS), st.sampled_from(FORMATS), st.data())
def test_P2_where_a_stream_is_cut_says_nothing(blocks: list[Any], manner: Json, framing: Json, wire: str, client: str, data: Any) -> None:
    stream = b"".join(as_bytes(FRAMES[wire](blocks, **manner)[0], **framing))
    whole, way = relayed([stream], wire, client)
    assert way.done and not way.broken and way.error is None
    heard = HEARD[client](events_of(whole))
    assert {name: heard[name] for name in ("text", "think", "calls")} == meant(blocks)
    assert (heard["in"], heard["out"]) == (20, 9) if manner["usage"] else (heard["in"] == 25 and heard["out"] > 0)
    assert relayed([stream[place:place + 1] for place in range(len(stream))], wire, client)[0] == whole
    places = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    assert relayed([stream[start:end] for start, end in zip([0, *places], [*places, len(stream)])], wire, client)[0] == whole


SAMPLE = [("think", ["\u00e9\u4e2d", "b"]), ("text", ["Hi \U0001f600", "\u4e2d."]), ("call", "call_abcdef1x", "read", ['{"p":', '"\u00e9"}']), ("call", "call_abcdef2x", "find_all", [])]


@pytest.mark.parametrize("client", FORMATS)
@pytest.mark.parametrize("wire", FORMATS)
def test_P2_at_every_byte(wire: str, client: str) -> None:
    """Inside letters of several bytes and between CR and LF too."""
    stream = b"".join(as_bytes(FRAMES[wire](SAMPLE, usage=True)[0], "\r\n"))
    whole = relayed([stream], wire, client)[0]
    assert HEARD[client](events_of(whole))["text"] == "Hi \U0001f600\u4e2d."
    for place in range(1, len(stream)):
        assert relayed([stream[:place], stream[place:]], wire, client)[0] == whole, place


@examples(120)
@given(answers(ordered=True), st.booleans(), st.sampled_from(FORMATS), st.sampled_from(FORMATS))
def test_P3_a_whole_answer_is_its_stream_folded(blocks: list[Any], usage: bool, wire: str, client: str) -> None:
    streamed = HEARD[client](events_of(relayed(as_bytes(FRAMES[wire](blocks, usage=usage)[0]), wire, client)[0]))
    source = a.Source(VENDORS[wire], "s", a.FORMATS[client].call_prefix)
    deltas = a.FORMATS[wire].read_answer(WHOLES[wire](blocks, usage=usage), source)
    body, told, _ = a.translate_answer(deltas, asked_by(client), client, lambda: 25)
    whole = {**WHOLE_HEARD[client](body), "error": None}
    if not usage:       # estimated from what came, and a stream may spell out an empty object
        assert whole.pop("out") > 0 < streamed.pop("out")
    assert whole == streamed
    assert told is not None and told.estimated is not usage


@examples(70)
@given(answers(), manners, st.sampled_from(FORMATS), st.sampled_from(FORMATS))
def test_P9_a_stream_that_breaks_off_never_looks_whole(blocks: list[Any], manner: Json, wire: str, client: str) -> None:
    """After each frame before the finish, and inside the frame behind it."""
    frames, end = FRAMES[wire](blocks, **manner)
    sent = as_bytes(frames)
    for n_frames in range(end + 1):
        for tail in (b"", sent[n_frames][:len(sent[n_frames]) // 2]):
            out, way = relayed([*sent[:n_frames], tail], wire, client)
            assert way.broken in ("cut", "empty_answer") and not way.done and way.finish is None
            assert way.content or out == b""
            assert not re.search(rb"message_stop|message_delta|\[DONE\]\n|finish_reason\": ?\"|response\.(completed|incomplete)\"", out)


@examples(90)
@given(counts, st.sampled_from(FORMATS))
def test_P11_totals(usage: Json, client: str) -> None:
    told = a.write_usage(client, usage)
    flat = [told, *(value for value in told.values() if isinstance(value, dict))]
    assert all(isinstance(count, int) and count >= 0 for counted in flat for count in counted.values() if not isinstance(count, dict))
    whole = max(0, usage.get("input") or 0)
    if client == "messages":
        assert told["input_tokens"] + told["cache_read_input_tokens"] + told["cache_creation_input_tokens"] == whole
    else:
        first, second = ("prompt", "completion") if client == "chat" else ("input", "output")
        assert told["total_tokens"] == told[f"{first}_tokens"] + told[f"{second}_tokens"] and told[f"{first}_tokens"] == whole
    assert a.read_usage(client, told).get("input", 0) == whole


# ---------------------------------------------------------------- conversations, rendered as each kind of client sends them

WORDS = st.lists(st.sampled_from(["\u0430", "\u0431\u0432 ", "\n", " ", "\u0433\u0434"]), max_size=4).map("".join)      # Cyrillic: none of it is ours
CALL_IDS = ["call_abcdef1x", "call_abcdef2x", "toolu_01AbCdEf", "functions.read:0", "x" * 80, "0"]
OWN = {"anthropic": ("signature", "EqQBCkYIAxgCIkAx"), "openai": ("encrypted", "gAAAAABoX"), "gemini": ("signature", "CpcBGeminiSeal"), "xai": ("encrypted", "xaiSealedData")}
thoughts = st.tuples(st.just("think"), WORDS, st.sampled_from(sorted(OWN)))
spoken = st.one_of(st.tuples(st.just("user"), WORDS), st.tuples(st.just("say"), WORDS), st.tuples(st.just("system"), WORDS), st.just(("image",)), thoughts)


@st.composite
def rounds(draw: Any) -> list[Any]:
    """A few calls and their results, as a sound history has them."""
    ids = draw(st.lists(st.sampled_from(CALL_IDS), min_size=1, max_size=3, unique=True))
    return [*draw(st.lists(thoughts, max_size=1)), *(("call", call_id, draw(st.sampled_from(["read", "find_all"])), json.dumps(draw(objects))) for call_id in ids),
            *(("result", call_id, draw(WORDS)) for call_id in draw(st.permutations(ids)))]


@st.composite
def conversations(draw: Any, damaged: bool = True) -> list[Any]:
    items = [("user", draw(WORDS) + "\u0436"), *(item for part in draw(st.lists(st.one_of(spoken.map(lambda item: [item]), rounds()), max_size=5)) for item in part)]
    for blow in draw(st.lists(st.sampled_from(["drop", "twice", "swap"]), max_size=3)) if damaged else ():
        place = draw(st.integers(0, len(items) - 1))
        if blow == "drop" and len(items) > 1:
            del items[place]
        elif blow == "twice":
            items.insert(draw(st.integers(0, len(items))), items[place])
        elif blow == "swap":
            other = draw(st.integers(0, len(items) - 1))
            items[place], items[other] = items[other], items[place]
    return items


PICTURE = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJ"


def sealed(family: str) -> Json:
    return {"family": family, "model": "m", "field": OWN[family][0], "data": OWN[family][1]}


def chat_body(items: list[Any]) -> Json:
    messages: list[Json] = []
    for item in items:
        kind = item[0]
        if kind in ("user", "system"):
            messages.append({"role": kind, "content": item[1]})
        elif kind == "image":
            messages.append({"role": "user", "content": [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PICTURE}"}}]})
        elif kind == "result":
            messages.append({"role": "tool", "tool_call_id": item[1], "content": item[2]})
        else:
            if not messages or messages[-1]["role"] != "assistant" or kind == "think":
                messages.append({"role": "assistant", "content": None})
            if kind == "call":
                messages[-1].setdefault("tool_calls", []).append({"id": item[1], "type": "function", "function": {"name": item[2], "arguments": item[3]}})
            elif kind == "think":
                messages[-1] |= {"reasoning_content": item[1], "reasoning_details": a.details_of(sealed(item[2]))}
            else:
                messages[-1]["content"] = (messages[-1]["content"] or "") + item[1]
    tools = [{"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {}}}} for name in ("read", "find_all")]
    return {"model": "m", "messages": messages, "tools": tools, "max_tokens": 2000, "stop": ["END"]}


def messages_body(items: list[Any]) -> Json:
    messages: list[Json] = []
    for item in items:
        kind = item[0]
        role = {"user": "user", "image": "user", "result": "user", "system": "system"}.get(kind, "assistant")
        if not messages or messages[-1]["role"] != role:
            messages.append({"role": role, "content": []})
        block = {"call": lambda: {"type": "tool_use", "id": item[1], "name": item[2], "input": json.loads(item[3])},
                 "result": lambda: {"type": "tool_result", "tool_use_id": item[1], "content": item[2], "is_error": len(item[2]) == 1},
                 "image": lambda: {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PICTURE}},
                 "think": lambda: {"type": "thinking", "thinking": item[1], "signature": OWN["anthropic"][1] if item[2] == "anthropic" else a.seal_envelope(sealed(item[2]))}}.get(
                     kind, lambda: {"type": "text", "text": item[1], **({"cache_control": {"type": "ephemeral"}} if kind == "user" and item[1].startswith("\u0430") else {})})()
        messages[-1]["content"].append(block)
    return {"model": "m", "messages": messages, "max_tokens": 2000, "stop_sequences": ["END"], "metadata": {"user_id": "u"},
            "tools": [{"name": name, "input_schema": {"type": "object", "properties": {}}} for name in ("read", "find_all")]}


def responses_body(items: list[Any]) -> Json:
    made: list[Json] = []
    for item in items:
        kind = item[0]
        if kind in ("user", "system", "say"):
            part = {"type": "output_text" if kind == "say" else "input_text", "text": item[1]}
            made.append({"type": "message", "role": {"say": "assistant", "system": "developer"}.get(kind, kind), "content": [part]})
        elif kind == "image":
            made.append({"type": "message", "role": "user", "content": [{"type": "input_image", "image_url": f"data:image/png;base64,{PICTURE}"}]})
        elif kind == "call":
            made.append({"type": "function_call", "call_id": item[1], "name": item[2], "arguments": item[3]})
        elif kind == "result":
            made.append({"type": "function_call_output", "call_id": item[1], "output": item[2]})
        else:
            data = OWN["openai"][1] if item[2] == "openai" else a.seal_envelope(sealed(item[2]))
            made.append({"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": item[1]}], "encrypted_content": data})
    return {"model": "m", "input": made, "store": False, "max_output_tokens": 2000, "reasoning": {"effort": "low"},
            "tools": [{"type": "function", "name": name, "parameters": {"type": "object", "properties": {}}} for name in ("read", "find_all")]}


BODIES: dict[str, Callable[[list[Any]], Json]] = {"chat": chat_body, "messages": messages_body, "responses": responses_body}


def sent(body: Json, client: str, profile: a.Profile) -> Json:
    """What the provider is sent; hypothesis tries another example where no route can serve it."""
    try:
        return a.translate_request(a.FORMATS[client].read_request(body), profile)[0]
    except (a.UpstreamFailure, a.GatewayError) as refused:
        assert refused.status == 400
        assume(False)
        raise


clients, targets = st.sampled_from(FORMATS), st.sampled_from(TARGETS)


def calls_and_results(body: Json, wire: str) -> list[tuple[str, str]]:
    """("call", id), ("result", id) and ("", "") for what others say, in the order in which the provider reads them."""
    if wire == "chat":
        return [row for message in body["messages"] for row in (
            [("result", message["tool_call_id"])] if message["role"] == "tool" else [("", ""), *(("call", call["id"]) for call in message.get("tool_calls", ()))])]
    if wire == "messages":
        kinds = {"tool_use": ("call", "id"), "tool_result": ("result", "tool_use_id")}
        blocks = [(message["role"], block) for message in body["messages"] for block in (message["content"] if isinstance(message["content"], list) else [{"type": "text"}])]
        return [(kinds[block["type"]][0], block[kinds[block["type"]][1]]) if block["type"] in kinds else ("", "") for role, block in blocks if block["type"] in kinds or role != "assistant"]
    return [("result" if item["type"].endswith("_output") else "call", item["call_id"]) if "call_id" in item else ("", "") for item in body["input"] if "call_id" in item or item.get("role", "assistant") != "assistant"]


def texts_of(body: Json, wire: str) -> list[str]:
    """Every text that the model is shown."""
    if wire == "responses":
        shown = [part for item in body["input"] for part in (item.get("content") or item.get("summary") or item.get("output") or ())]
        found = [body.get("instructions", ""), *(item["output"] for item in body["input"] if isinstance(item.get("output"), str))]
        return found + [part["text"] for part in shown if isinstance(part, dict) and "text" in part]
    found = [message[name] for message in body["messages"] for name in ("reasoning_content", "reasoning") if name in message]
    for content in [body.get("system", ""), *(message["content"] for message in body["messages"])]:
        for part in [{"text": content}] if isinstance(content, str) else content or ():
            inner = part.get("content")
            found += [part.get("text", "") or part.get("thinking", "") or (inner if isinstance(inner, str) else "")]
            found += [deeper.get("text", "") for deeper in inner] if isinstance(inner, list) else []
    return found


# ---------------------------------------------------------------- P4 to P8, P10: requests

@examples(90)
@given(conversations(), clients)
@example([("user", ""), ("system", "\u0430"), ("user", "\u0431")], "messages")
@example([("user", ""), ("system", "\u0430")], "messages")
def test_P4_what_was_written_is_written_again_the_same(items: list[Any], client: str) -> None:
    """A body in normal form comes back byte for byte, seals, ids, arguments and cache marks with it."""
    profile = VENDORS[client]
    once = sent(BODIES[client](items), client, profile)
    assert a.dump_json(sent(once, client, profile)) == a.dump_json(once)


@examples(60)
@given(conversations(damaged=False), clients)
def test_P4_a_sound_history_keeps_what_its_own_family_made(items: list[Any], client: str) -> None:
    profile = VENDORS[client]
    items = [*(one for item in items for one in ([item, ("say", "\u0430")] if item[0] == "think" else [item])), ("user", "\u0433\u0434")]      # thinking leads to something
    body = sent(BODIES[client](items), client, profile)
    told = json.dumps(body, ensure_ascii=False)
    blocks = [block for message in body.get("messages", ()) for block in (message["content"] if isinstance(message["content"], list) else ())]
    calls = [item for item in items if item[0] == "call"]
    kept = {"chat": lambda: [call["function"] for message in body["messages"] for call in message.get("tool_calls", ())],
            "messages": lambda: [{"name": block["name"], "arguments": json.dumps(block["input"])} for block in blocks if block["type"] == "tool_use"],
            "responses": lambda: [{"name": item["name"], "arguments": item["arguments"]} for item in body["input"] if item["type"] == "function_call"]}[client]()
    assert [(call["name"], json.loads(call["arguments"])) for call in kept] == [(call[2], json.loads(call[3])) for call in calls]
    if client != "messages":
        assert [call["arguments"] for call in kept] == [call[3] for call in calls]
    else:
        assert [(block["thinking"], block["signature"]) for block in blocks if block["type"] == "thinking"] == [(item[1], OWN["anthropic"][1]) for item in items if item[0] == "think" and item[2] == "anthropic"]
    assert told.count("\u0436") == 1


parts = st.one_of(WORDS.map(a.text_part), st.builds(lambda i, n: a.call_part(i, n, "{}"), st.sampled_from(["", "null", *CALL_IDS]), st.sampled_from("fg")),
                  st.builds(lambda i, t: a.result_part(i, [a.text_part(t)]), st.sampled_from(["", "null", *CALL_IDS]), WORDS),
                  st.builds(lambda f, t: {"type": "think", "text": t, "seal": sealed(f)}, st.sampled_from(sorted(OWN)), WORDS), st.just({"type": "image", "url": "https://e.x/i.png"}))
ALLOWED = {"user": ("text", "result", "image"), "assistant": ("text", "call", "think"), "system": ("text",)}
turn_lists = st.lists(st.sampled_from(["user", "assistant", "user", "assistant", "system"]).flatmap(lambda role: st.lists(parts.filter(lambda part: part["type"] in ALLOWED[role]), max_size=4).map(
    lambda found: {"role": role, "parts": found})), min_size=1, max_size=8)


def pairing_faults(turns: list[Json]) -> list[Any]:
    """Calls that the next turn does not answer at its head and in order, results of no call, ids that occur twice."""
    faults: list[Any] = []
    ids = [[[part["id"] for part in turn["parts"] if part["type"] == kind] for kind in ("call", "result")] for turn in turns] + [[[], []]]
    for index, (turn, (calls, results)) in enumerate(zip(turns, ids)):
        behind = [part.get("id") for part in turns[index + 1]["parts"][:len(calls)] if part["type"] == "result"] if index + 1 < len(turns) else []
        faults += [(index, "unanswered", calls)] if calls and behind != calls else []
        faults += [(index, "unasked", results)] if results and (not index or results != ids[index - 1][0]) else []
    every = [call_id for calls, _ in ids for call_id in calls]
    return faults + ([("ids", every)] if len(set(every)) != len(every) or "" in every else [])


@examples(100)
@given(turn_lists)
def test_P5_P7_mending_pairs_once_and_for_all(turns: list[Json]) -> None:
    before = copy.deepcopy(turns)
    mended = a.mend(turns)
    assert turns == before and pairing_faults(mended) == [] and a.mend(mended) == mended
    assert all(turn["parts"] for turn in mended) and all(one["role"] != two["role"] for one, two in zip(mended, mended[1:]))


@examples(90)
@given(st.text(), st.sampled_from(["anthropic", "openai64", "mistral9", ""]))
def test_P5_ids_are_fitted_once(call_id: str, rule: str) -> None:
    fitted = a.fit_id(call_id, rule)
    assert a.fit_id(fitted, rule) == fitted == a.fit_id(call_id, rule)


schemas = st.deferred(lambda: st.fixed_dictionaries({}, optional={
    "type": st.sampled_from(["string", "integer", "object", "array", "number", "boolean", ["string", "null"], ["string", "integer"], ["null"]]),
    "properties": st.dictionaries(st.sampled_from("ab"), schemas, max_size=2), "items": schemas, "anyOf": st.lists(schemas, max_size=2), "oneOf": st.lists(schemas, min_size=1, max_size=2),
    "allOf": st.lists(schemas, max_size=2), "enum": st.lists(st.one_of(st.text(max_size=2), st.integers()), max_size=2), "const": st.one_of(st.text(max_size=2), st.integers()),
    "required": st.lists(st.sampled_from("abz"), max_size=2), "format": st.sampled_from(["uri", "date-time", "int32"]), "exclusiveMinimum": st.integers(), "$schema": st.just("x"), "$ref": st.just("#/$defs/a"), "$defs": st.fixed_dictionaries({"a": schemas}), "not": schemas,
    "additionalProperties": schemas | st.booleans(), "description": st.text(max_size=3)}))


@examples(50)
@given(schemas, targets, st.sampled_from([a.gemini_schema, a.closed_schema]))
def test_P5_schemas_are_cleaned_once(schema: Json, profile: a.Profile, clean: Callable[[Json], Json]) -> None:
    before = copy.deepcopy(schema)
    assert clean(clean(schema)) == clean(schema)
    assert schema == before
    parameters = {**schema, "type": "object"}           # what is no object is no tool's
    assert a.clean_schema(a.clean_schema(parameters, profile), profile) == a.clean_schema(parameters, profile)


@examples(90)
@given(turn_lists, targets, clients)
def test_P5_P6_P7_preparing_is_pure_stable_and_pairs(turns: list[Json], profile: a.Profile, client: str) -> None:
    request = {**a.new_hub(client, "m", False), "turns": turns, "tools": [{"name": "f", "kind": "function"}, {"name": "g", "kind": "function"}]}
    before = copy.deepcopy(request)
    try:
        ready = a.prepare(request, profile)
    except (a.GatewayError, a.UpstreamFailure):
        assume(False)
        raise
    assert request == before and pairing_faults(ready["turns"]) == [] and a.prepare(request, profile) == ready
    assert {part["seal"]["family"] for turn in ready["turns"] for part in turn["parts"] if "seal" in part} <= {profile.family}
    again = a.prepare({name: value for name, value in ready.items() if name != "prepared"}, profile)
    assert {name: again.get(name) for name in ("turns", "tools", "system")} == {name: ready.get(name) for name in ("turns", "tools", "system")}


@examples(140)
@given(conversations(), clients, targets)
def test_P6_P7_P8_P10_what_a_provider_is_sent(items: list[Any], client: str, profile: a.Profile) -> None:
    body = BODIES[client](items)
    before = copy.deepcopy(body)
    made = sent(body, client, profile)
    assert body == before
    assert a.dump_json(sent(body, client, profile)) == a.dump_json(made)                                        # P6
    rows = calls_and_results(made, profile.format)                                                              # P7
    ids = [call_id for kind, call_id in rows if kind == "call"]
    assert "" not in ids and (len(set(ids)) == len(ids) or profile.own_ids)
    waiting: list[str] = []
    for kind, call_id in rows:
        if kind == "call":
            waiting.append(call_id)
        elif kind == "result":
            assert waiting and waiting.pop(0) == call_id
        else:
            assert not waiting
    assert not waiting
    ours = "|".join((r"No result was recorded for this tool call\.", r"\[tool result ?[^\]\n]{0,80}\]", r"\[tool error\] ", "</?system-reminder>", r"\(conversation continues\)", r"Continue\.",
                     r"Images returned by tools:", r"\[image (omitted|\d+)\]", "</?think>"))
    rest = "".join(texts_of(made, profile.format))                                                              # P8
    assert re.sub(ours, "", re.sub("[\u0430-\u044f]", "", rest)).strip() == "", rest
    told = json.dumps(made)                                                                                     # P10
    assert "aic1." not in told
    foreign = [OWN[family][1] for family in OWN if family != profile.family and profile.replay != "reasoning_details"]
    assert not any(data in told for data in foreign), profile.family


@examples(90)
@given(st.sampled_from(sorted(OWN)), st.lists(st.tuples(st.integers(0, 80), st.sampled_from("aZ9-_=.~ ")), min_size=1, max_size=3), targets, st.sampled_from(["messages", "responses"]))
def test_P10_a_damaged_envelope_is_foreign(family: str, blows: list[Any], profile: a.Profile, client: str) -> None:
    envelope = a.seal_envelope(sealed(family))
    damaged = list(envelope)
    for place, letter in blows:
        damaged[5 + place % (len(envelope) - 5)] = letter
    text = "".join(damaged)
    assume((a.open_envelope(text) or {"family": "?"})["family"] != family)
    body = BODIES[client]([("user", "\u0436"), ("think", "\u0430", family), ("say", "\u0431"), ("user", "\u0432")])
    changed = json.loads(json.dumps(body).replace(json.dumps(envelope), json.dumps(text)).replace(json.dumps(OWN[family][1]), json.dumps(text)))
    told = json.dumps(sent(changed, client, profile))
    assert "aic1." not in told and text[5:] not in told and OWN[family][1] not in told or profile.replay == "reasoning_details" and "aic1." not in told
    assert not a.may_pass(profile.format, json.dumps(changed).encode(), changed, profile)


def test_P6_no_order_depends_on_the_process(tmp_path: Path) -> None:
    """Sets and dicts of strings have another order in each process; what is sent must not."""
    program = ("import json, sys; sys.path[:0] = sys.argv[1:3]; import aicarousel as a, test_properties as t\n"
               "items = [('system', 'a'), ('user', 'b'), ('call', '0', 'read', '{}'), ('call', 'x' * 80, 'find_all', '{}'), ('result', '0', 'r'), ('image',), ('think', 'c', 'xai'), ('user', 'd')]\n"
               "extra = {name: 1 for name in ('seed', 'top_k', 'min_p', 'odd', 'other', 'novel')}\n"
               "print([a.translate_request(a.FORMATS[c].read_request({**t.BODIES[c](items), **extra}), p) for c in t.FORMATS for p in t.TARGETS])\n")
    here = Path(__file__).resolve().parent
    outs = [subprocess.run([sys.executable, "-c", program, str(here), str(here.parent)], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, timeout=60, cwd=tmp_path) for seed in "01"]
    assert outs[0].returncode == 0, outs[0].stderr
    assert len(outs[0].stdout) > 10_000 and outs[0].stdout == outs[1].stdout


# ---------------------------------------------------------------- P12: what nobody knows

junk = st.one_of(st.none(), st.booleans(), st.integers(-3, 3), st.floats(allow_nan=False), st.sampled_from(["", "x", "\ud800", "auto", "[DONE]"]), st.lists(st.integers(), max_size=2),
                 st.just([None]), st.just([{}]), st.just([{"type": "novel", "text": "x"}]), st.dictionaries(st.sampled_from(["type", "text", "id", "index", "role"]), st.one_of(st.text(max_size=3), st.none(), st.integers(0, 3)), max_size=3))


def paths(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [here, *(path for key, child in inner for path in paths(child, (*here, key)))]


def changed_at(value: Any, path: tuple[Any, ...], other: Any) -> Any:
    if not path:
        return other
    copied = copy.copy(value)
    copied[path[0]] = changed_at(value[path[0]], path[1:], other)
    return copied


@st.composite
def spoiled(draw: Any, values: Any) -> Any:
    """A sound value in which one to three places hold something else, or gained an unknown field."""
    value = draw(values)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(paths(value)))
        found = value
        for key in path:
            found = found[key]
        other = {**found, draw(st.sampled_from(["novel", "type", "content", "id"])): draw(junk)} if isinstance(found, dict) and draw(st.booleans()) else draw(junk)
        value = changed_at(value, path, other)
    return value


SCHEMA = {"type": "object", "properties": {"p": {"type": "string"}}, "required": ["p"]}
DETAIL = {"type": "reasoning.text", "format": "anthropic-claude-v1", "index": 0, "text": "t", "signature": "EqQ"}
#: A body of each format with much of what it can hold; spoilt like the generated ones.
RICH: dict[str, Json] = {
    "chat": {"model": "m", "temperature": 1.5, "top_p": 0.9, "stop": ["x"], "max_completion_tokens": 100, "reasoning_effort": "high", "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}},
             "parallel_tool_calls": False, "user": "u", "metadata": {"a": "b"}, "tool_choice": {"type": "function", "function": {"name": "read"}}, "stream_options": {"include_usage": True}, "reasoning": {"effort": "low", "max_tokens": 9},
             "thinking": {"type": "enabled", "budget_tokens": 2000}, "web_search_options": {"search_context_size": "low", "user_location": {"type": "approximate", "approximate": {"city": "x"}}}, "service_tier": "auto", "verbosity": "low",
             "tools": [{"type": "function", "function": {"name": "read", "description": "d", "parameters": SCHEMA, "strict": True}}, {"type": "custom", "custom": {"name": "patch", "format": {"type": "grammar", "grammar": {"syntax": "lark", "definition": "x"}}}}],
             "messages": [{"role": "developer", "content": [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}]},
                          {"role": "user", "name": "n", "content": [{"type": "text", "text": "t"}, {"type": "image_url", "image_url": {"url": "https://e.x/i.png", "detail": "low"}}, {"type": "file", "file": {"filename": "f.pdf", "file_data": "data:application/pdf;base64,JVBERi0="}}]},
                          {"role": "assistant", "content": [{"type": "text", "text": "x"}, {"type": "refusal", "refusal": "no"}], "refusal": "no", "reasoning_details": [DETAIL], "annotations": [{"type": "url_citation", "url_citation": {"url": "u", "title": "t"}}],
                           "tool_calls": [{"id": "call_1abcdef", "type": "function", "function": {"name": "read", "arguments": "{}"}, "extra_content": {"google": {"thought_signature": "S"}}}, {"id": "call_2abcdef", "type": "custom", "custom": {"name": "patch", "input": "x"}}]},
                          {"role": "tool", "tool_call_id": "call_1abcdef", "content": [{"type": "text", "text": "r"}]}, {"role": "tool", "tool_call_id": "call_2abcdef", "content": "r"}, {"role": "user", "content": "on"}]},
    "messages": {"model": "m", "max_tokens": 3000, "system": [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral", "ttl": "1h"}}], "thinking": {"type": "enabled", "budget_tokens": 2000, "display": "omitted"}, "temperature": 1,
                 "output_config": {"effort": "high", "format": {"type": "json_schema", "schema": SCHEMA}}, "metadata": {"user_id": "user_x_account_y_session_z"}, "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}, "stop_sequences": ["x"],
                 "context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}, "mcp_servers": [{"type": "url", "url": "https://e.x", "name": "n"}], "container": {"skills": []}, "service_tier": "auto", "top_k": 5,
                 "tools": [{"name": "read", "input_schema": SCHEMA, "cache_control": {"type": "ephemeral"}, "defer_loading": True, "strict": True}, {"type": "bash_20250124", "name": "bash"}, {"type": "web_search_20250305", "name": "web_search", "allowed_domains": ["e.x"]}],
                 "messages": [{"role": "user", "content": [{"type": "text", "text": "t"}, {"type": "document", "title": "T", "context": "c", "citations": {"enabled": True}, "source": {"type": "text", "media_type": "text/plain", "data": "d"}},
                                                           {"type": "document", "source": {"type": "content", "content": [{"type": "text", "text": "t"}]}}, {"type": "search_result", "source": "s", "title": "t", "content": [{"type": "text", "text": "t"}]}]},
                              {"role": "assistant", "content": [{"type": "thinking", "thinking": "t", "signature": "EqQ"}, {"type": "redacted_thinking", "data": "Emw"}, {"type": "text", "text": "x", "citations": [{"type": "char_location", "cited_text": "d"}]},
                                                                {"type": "server_tool_use", "id": "srvtoolu_1", "name": "web_search", "input": {"query": "q"}},
                                                                {"type": "web_search_tool_result", "tool_use_id": "srvtoolu_1", "content": [{"type": "web_search_result", "url": "u", "title": "t", "encrypted_content": "e"}]},
                                                                {"type": "tool_use", "id": "toolu_1", "name": "read", "input": {"p": "a"}}]},
                              {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "is_error": True, "content": [{"type": "text", "text": "r"}, {"type": "image", "source": {"type": "url", "url": "https://e.x/i.png"}},
                                                                                                                                         {"type": "tool_reference", "tool_name": "read"}]}, {"type": "text", "text": "on"}]},
                              {"role": "system", "content": [{"type": "text", "text": "s"}, {"type": "tool_addition", "tool": {"name": "g", "input_schema": SCHEMA}}]}, {"role": "user", "content": "on"}]},
    "responses": {"model": "m", "instructions": "i", "store": False, "include": ["reasoning.encrypted_content"], "reasoning": {"effort": "high", "summary": "auto"}, "text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA}, "verbosity": "low"},
                  "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "read"}]}, "parallel_tool_calls": False, "max_output_tokens": 100, "prompt_cache_key": "k", "metadata": {"a": "b"}, "truncation": "auto",
                  "tools": [{"type": "function", "name": "read", "parameters": SCHEMA}, {"type": "custom", "name": "patch", "format": {"type": "grammar", "syntax": "lark", "definition": "x"}}, {"type": "local_shell"}, {"type": "tool_search", "execution": "client", "parameters": SCHEMA},
                            {"type": "namespace", "name": "ns", "tools": [{"type": "function", "name": "f"}]}, {"type": "web_search", "filters": {"allowed_domains": ["e.x"]}}],
                  "input": [{"role": "developer", "content": "s"}, {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "t"}, {"type": "input_image", "image_url": "https://e.x/i.png", "detail": "low"}, {"type": "input_file", "filename": "f.pdf", "file_data": "data:application/pdf;base64,JVBERi0="}]},
                            {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "t"}], "content": [{"type": "reasoning_text", "text": "t"}], "encrypted_content": "gAAAAABo"},
                            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "x", "annotations": [{"type": "url_citation", "url": "u", "title": "t", "start_index": 0, "end_index": 1}]}, {"type": "refusal", "refusal": "no"}]},
                            {"type": "function_call", "call_id": "call_1abcdef", "name": "f", "namespace": "ns", "arguments": "{}"}, {"type": "function_call_output", "call_id": "call_1abcdef", "output": [{"type": "input_text", "text": "r"}]},
                            {"type": "custom_tool_call", "call_id": "call_2abcdef", "name": "patch", "input": "x"}, {"type": "custom_tool_call_output", "call_id": "call_2abcdef", "output": "r"},
                            {"type": "local_shell_call", "call_id": "call_3abcdef", "action": {"type": "exec", "command": ["ls"], "env": {}}}, {"type": "local_shell_call_output", "call_id": "call_3abcdef", "output": "r"},
                            {"type": "tool_search_call", "call_id": "call_4abcdef", "execution": "client", "arguments": {"q": "x"}}, {"type": "tool_search_output", "call_id": "call_4abcdef", "execution": "client", "tools": [{"type": "function", "name": "late", "parameters": SCHEMA}]},
                            {"type": "web_search_call", "id": "ws_1", "status": "completed", "action": {"type": "search", "query": "q"}}, {"type": "image_generation_call", "id": "ig_1", "result": PICTURE}, {"type": "compaction", "encrypted_content": "gA"},
                            {"type": "additional_tools", "role": "developer", "tools": [{"type": "function", "name": "more"}]}, {"type": "message", "role": "user", "content": "on"}]},
}
REASONED = chat_body([("user", "\u0436"), ("think", "t", "anthropic"), ("say", "x")])


@examples(210)
@given(clients.flatmap(lambda client: st.tuples(st.just(client), spoiled(st.one_of(conversations().map(BODIES[client]), st.just(RICH[client]))))), targets)
@example(("chat", changed_at(REASONED, ("messages", 1, "reasoning_details", 0, "text"), [None])), a.Profile())
@example(("chat", changed_at(REASONED, ("messages", 1, "reasoning_details", 0, "format"), [None])), a.Profile())
def test_P12_no_body_breaks_reader_or_writer(row: tuple[str, Any], profile: a.Profile) -> None:
    client, body = row
    try:
        made, dropped = a.translate_request(a.FORMATS[client].read_request(a.FORMATS[client].check(body)), profile)
    except (a.GatewayError, a.UpstreamFailure) as refused:
        assert 400 <= refused.status < 500
        return
    a.dump_json(made)
    assert all(isinstance(name, str) for name in dropped)


@examples(90)
@given(clients, targets, st.sampled_from(["novel_field", "x", "Some.Field"]), st.sampled_from([1, "on", True, [1], {"a": 1}]))
def test_P12_unknown_fields_are_told(client: str, profile: a.Profile, name: str, value: Any) -> None:
    hub = a.FORMATS[client].read_request({**BODIES[client]([("user", "\u0436")]), name: value})
    made, dropped = a.translate_request(hub, profile)
    assert name in dropped or made.get(name) == value and profile.format == client


@examples(140)
@given(clients.flatmap(lambda wire: st.tuples(st.just(wire), spoiled(st.tuples(answers(), manners).map(lambda row: [one for one in FRAMES[wire](row[0], **row[1])[0] if one != "[DONE]"])))), clients)
def test_P12_no_event_breaks_a_stream(row: tuple[str, Any], client: str) -> None:
    wire, events = row
    raw = b"".join(as_bytes([event for event in events if not isinstance(event, str)] if isinstance(events, list) else [{"whole": events}], ascii_only=True))
    reader = a.FORMATS[wire].reader(a.Source(VENDORS[wire], "s"))
    assert check_deltas(a.read_events(raw, reader)) == []
    out, way = relayed([raw], wire, client)
    assert way.done or way.broken or way.error is not None
    if way.done:
        check_grammar(events_of(out), client)


@examples(100)
@given(clients.flatmap(lambda wire: st.tuples(st.just(wire), spoiled(answers(ordered=True).map(lambda blocks: WHOLES[wire](blocks, usage=True))))), clients)
def test_P12_no_whole_answer_breaks_its_reader(row: tuple[str, Any], client: str) -> None:
    wire, body = row
    fmt = a.FORMATS[wire]
    if fmt.find_error(body) is not None or fmt.judge_answer(body)[0]:
        return              # no route's answer: the relay reads it no further
    deltas = fmt.read_answer(body, a.Source(VENDORS[wire], "s"))
    assert check_deltas(deltas) == []
    if deltas[-1]["delta"] != "error":
        a.dump_json(a.translate_answer(deltas, asked_by(client), client, lambda: 25)[0])


@examples(120)
@given(clients, st.lists(st.one_of(st.binary(max_size=12), st.sampled_from([b"data: ", b"\n\n", b"\r\n", b"event: error\n", b'{"type":"error"}', b"[DONE]", b"{}", b"[]", b"null", b'"x"', b'{"choices":[{}]}'])), max_size=12), clients)
def test_P12_no_bytes_break_a_stream(wire: str, chunks: list[bytes], client: str) -> None:
    out, way = relayed(chunks, wire, client)
    assert way.done or way.broken or way.error is not None
    assert way.content or out == b""


# ---------------------------------------------------------------- P13: errors

def shapes_of(message: str, kind: str, code: Any) -> dict[str, bytes]:
    """The bodies in which providers tell an error."""
    bodies = {"openai": {"error": {"message": message, "type": kind, "param": None, "code": code}}, "anthropic": {"type": "error", "error": {"type": kind, "message": message}},
              "xai": {"code": code or kind, "error": message}, "cerebras": {"message": message, "type": kind, "param": "", "code": code}, "mistral": {"object": "error", "message": message, "type": kind, "code": code},
              "fastapi": {"detail": message}, "gemini": [{"error": {"code": 0, "message": message, "status": kind.upper()}}], "errors": {"errors": [{"message": message}]},
              "openrouter": {"error": {"message": message, "code": code, "metadata": {"raw": message, "provider_name": "x"}}}}
    return {**{name: json.dumps(body).encode() for name, body in bodies.items()}, "html": f"<html><body><h1>{message}</h1></body></html>".encode(), "text": message.encode(), "empty": b""}


#: What the provider says (status, message, type, code), what the client is to see of it, and the classes of the SDKs: OpenAI's, Anthropic's (by its versions).
FAULTS: dict[str, tuple[tuple[int, str, str, Any], str, str]] = {
    "bad request": ((400, "Invalid value for temperature.", "invalid_request_error", "invalid_value"), "BadRequestError", "BadRequestError"),
    "unprocessable": ((422, "Input should be a string.", "invalid_request_error", None), "UnprocessableEntityError", "UnprocessableEntityError"),
    "too long": ((400, "This model's maximum context length is 8192 tokens. However, you requested 9000 tokens.", "invalid_request_error", "context_length_exceeded"), "BadRequestError", "BadRequestError"),
    "too large": ((413, "Request body too big.", "invalid_request_error", None), "APIStatusError", "ContentTooLargeError RequestTooLargeError"),
    "no such model": ((404, "The model `x` does not exist.", "invalid_request_error", "model_not_found"), "NotFoundError", "NotFoundError"),
    "our credential": ((401, "Incorrect API key provided.", "invalid_request_error", "invalid_api_key"), "InternalServerError", "InternalServerError"),
    "no money": ((402, "Insufficient balance.", "insufficient_quota", "insufficient_quota"), "RateLimitError", "RateLimitError"),
    "rate": ((429, "Rate limit reached. Please try again in 12s.", "rate_limit_error", "rate_limit_exceeded"), "RateLimitError", "RateLimitError"),
    "overloaded": ((503, "The model is overloaded.", "overloaded_error", None), "InternalServerError", "OverloadedError"),
    "overloaded 529": ((529, "Overloaded", "overloaded_error", None), "InternalServerError", "OverloadedError"),
    "broken": ((500, "Something went wrong.", "server_error", None), "InternalServerError", "InternalServerError"),
    "gateway timeout": ((504, "Timed out.", "server_error", None), "InternalServerError", "GatewayTimeoutError DeadlineExceededError"),
}


@pytest.mark.parametrize("client", FORMATS)
@pytest.mark.parametrize("name", FAULTS)
def test_P13_an_error_of_any_shape_is_the_right_exception(name: str, client: str) -> None:
    httpx = importlib.import_module("httpx2" if importlib.util.find_spec("httpx2") else "httpx")        # which of them the SDKs brought
    (status, message, kind, code), of_openai, of_anthropic = FAULTS[name]
    for shape, body in sorted(shapes_of(message, kind, code).items(), key=lambda row: row[0] == "html"):
        if shape == "html" and name in ("bad request", "unprocessable"):
            of_openai = of_anthropic = "InternalServerError"        # no API's words: a proxy in between
        failure = a.classify("", "model", status, {}, body, utc=1.79e9)
        entry = a.Provider("p", None, "http://127.0.0.1:1/v1", "chat", "m", True, (), ())
        attempt = a.Attempt(a.make_route(entry, a.Credential("p/1"), a.Model("m")), 0.0, failure.status, failure.reason, failure.detail, 3)
        error = a.answer_for([failure], [attempt])
        fmt = a.FORMATS[client]
        raw = json.dumps(fmt.envelope(error)).encode()
        response = httpx.Response(fmt.status(error), content=raw, headers={"content-type": "application/json"}, request=httpx.Request("POST", "http://127.0.0.1/v1"))
        sdk = anthropic.Anthropic(api_key="fake") if client == "messages" else openai.OpenAI(api_key="fake")
        thrown = sdk._make_status_error_from_response(response)
        assert type(thrown).__name__ in (of_anthropic if client == "messages" else of_openai).split(), (shape, response.status_code, raw)
        told = json.loads(raw)["error"]
        assert told["message"] and isinstance(told.get("code", ""), str | None) and (shape in ("empty", "html") or status != 400 or "maximum" in told["message"] or message in told["message"])
