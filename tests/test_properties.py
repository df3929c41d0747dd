"""The properties P1 to P13 of the translation, under generated requests, damaged histories, answers and streams of all three formats.

Examples are derived from the tests' names, so that a run finds what the last one found; PROPERTIES_LONG=20 takes fresh ones, twenty times as many.
What is generated is rendered by the small functions here, never by the module, so that a mistake cannot cancel itself out.
"""
from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings, strategies as st

import aicarousel as a

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
            deltas += [{"content" if block[0] == "text" else field: piece} for piece in block[1]]
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
        done.append(f"{': hello' + newline * 2 if comments else ''}{name}data: {data}{newline * 2}".encode())
    return done


framings = st.fixed_dictionaries({"newline": st.sampled_from(["\n", "\r\n", "\r"]), "ascii_only": st.booleans(), "comments": st.booleans()})
manners = st.fixed_dictionaries({"usage": st.booleans(), "field": st.sampled_from(["reasoning_content", "reasoning"]), "mixed": st.booleans()})


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


def heard_messages(events: list[Any]) -> Json:
    from anthropic._models import construct_type
    from anthropic.lib.streaming._messages import accumulate_event
    from anthropic.types import RawMessageStreamEvent
    letters_of = {"message_start": "s", "ping": "p", "content_block_start": "o", "content_block_delta": "d", "content_block_stop": "c", "message_delta": "m", "message_stop": "e", "error": "x"}
    said = "".join(letters_of[event["type"]] for event in events)
    assert re.fullmatch(r"s(p|od*c)*me|(s(p|od*c)*(od*)?)?x", said), said
    assert [event["index"] for event in events if event["type"] == "content_block_start"] == list(range(said.count("o")))
    snapshot, buffers = None, {}
    for event in events:
        if event["type"] not in ("error", "ping"):
            snapshot = accumulate_event(event=construct_type(type_=RawMessageStreamEvent, value=event), current_snapshot=snapshot, json_bufs=buffers)
    if said.endswith("x"):
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
    state = ChatCompletionStreamState()
    if isinstance(events[-1], dict):
        assert set(events[-1]) == {"error"} and "[DONE]" not in events
        return {"error": events[-1]["error"]["message"]}
    assert events.count("[DONE]") == 1 and events[-1] == "[DONE]"
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
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["output_index"] for event in events if event["type"] == "response.output_item.added"] == list(range(sum(event["type"] == "response.output_item.added" for event in events)))
    for event in events:
        state.handle_event(construct_type_unchecked(type_=ResponseStreamEvent, value=event))
    last = events[-1]
    assert last["type"] in ("response.completed", "response.incomplete", "response.failed")
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
    st.just([a.text_delta("x"), a.cite_delta("https://e.x", "t")]), st.just([a.opaque_delta("perplexity", {"type": "thing"}, "shown")]),
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


@examples(300)
@given(delta_streams(), st.sampled_from(FORMATS))
def test_P1_what_is_written_is_what_the_vendors_sdk_understands(deltas: list[Json], client: str) -> None:
    assert a.check_deltas(deltas) == []
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


@examples(200)
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


@pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize("client", FORMATS)
@pytest.mark.parametrize("wire", FORMATS)
def test_P2_at_every_byte(wire: str, client: str, newline: str) -> None:
    """Inside letters of several bytes and between CR and LF too."""
    stream = b"".join(as_bytes(FRAMES[wire](SAMPLE, usage=True)[0], newline))
    whole = relayed([stream], wire, client)[0]
    assert HEARD[client](events_of(whole))["text"] == "Hi \U0001f600\u4e2d."
    for place in range(1, len(stream)):
        assert relayed([stream[:place], stream[place:]], wire, client)[0] == whole, place


@examples(200)
@given(answers(ordered=True), st.booleans(), st.sampled_from(FORMATS), st.sampled_from(FORMATS))
def test_P3_a_whole_answer_is_its_stream_folded(blocks: list[Any], usage: bool, wire: str, client: str) -> None:
    streamed = HEARD[client](events_of(relayed(as_bytes(FRAMES[wire](blocks, usage=usage)[0]), wire, client)[0]))
    source = a.Source(VENDORS[wire], "s", a.FORMATS[client].call_prefix)
    deltas = a.FORMATS[wire].read_answer(WHOLES[wire](blocks, usage=usage), source)
    body, told, _ = a.translate_answer(deltas, asked_by(client), client, 25)
    whole = {**WHOLE_HEARD[client](body), "error": None}
    if not usage:       # estimated from what came, and a stream may spell out an empty object
        assert abs(whole.pop("out") - streamed.pop("out")) < 5
    assert whole == streamed
    assert told is not None and told.estimated is not usage


@examples(120)
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


@examples(150)
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
