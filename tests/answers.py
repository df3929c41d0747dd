"""What an answer says, in neutral words, and what is wrong with its form: for a client of each of the three formats.

    read(client, reply) -> Said         text, calls, stop, usage, thinking; of a body or of a whole stream
    faults(client, reply) -> [str]      the SDK's own types, and the order of events that clients rely on; [] when fine
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import anthropic.types
import openai.types.chat
import openai.types.responses
import pydantic
from fakes import Reply

Json = dict[str, Any]
STOPS = {
    "chat": {"stop": "stop", "eos": "stop", "length": "length", "tool_calls": "tool", "function_call": "tool", "content_filter": "filter"},
    "messages": {"end_turn": "stop", "stop_sequence": "stop", "max_tokens": "length", "tool_use": "tool", "refusal": "filter", "pause_turn": "pause",
                 "model_context_window_exceeded": "length"},
    "responses": {"completed": "stop", "max_output_tokens": "length", "content_filter": "filter"},
}


@dataclass
class Said:
    """An answer in neutral words."""
    text: str = ""
    calls: list[tuple[str | None, Any]] = field(default_factory=list)   #: (name, arguments as JSON)
    stop: str | None = None
    usage: tuple[int | None, int | None] = (None, None)             #: tokens in, cached ones too, and out
    thinking: str = ""
    error: str = ""                                                 #: words of the error it is, or ends in


def arguments(text: Any) -> Any:
    """Arguments as JSON; what is no JSON stands under __raw__."""
    try:
        return json.loads(text or "{}") if isinstance(text, str) else text or {}
    except ValueError:
        return {"__raw__": text}


def frames(reply: Reply) -> list[tuple[str, Any]]:
    """The events of a stream: name and parsed data; comments left out."""
    found = []
    for frame in re.split(r"\n\n", reply.body.decode().replace("\r\n", "\n")):
        rows = [line.partition(":") for line in frame.split("\n") if line and not line.startswith(":")]
        name = "".join(value.removeprefix(" ") for key, _, value in rows if key == "event")
        data = "\n".join(value.removeprefix(" ") for key, _, value in rows if key == "data")
        if data:
            found.append((name, data if data == "[DONE]" else json.loads(data)))
    return found


def read(client: str, reply: Reply) -> Said:
    """What a client of that format understands."""
    if reply.streamed:
        return {"chat": _read_chunks, "messages": _read_events, "responses": _read_response_events}[client]([data for _, data in frames(reply) if data != "[DONE]"])
    if reply.status >= 400:
        return Said(error=reply.json["error"]["message"])
    return {"chat": _read_completion, "messages": _read_message, "responses": _read_response}[client](reply.json)


# ---------------------------------------------------------------- Chat

def _text(content: Any) -> tuple[str, str]:
    """Text and thinking of a content field: a string, or Mistral's parts, which pass through."""
    if not isinstance(content, list):
        return content or "", ""
    thought = [inner for part in content if part["type"] == "thinking" for inner in part["thinking"]]
    return "".join(part["text"] for part in content if part["type"] == "text"), "".join(part["text"] for part in thought)


def _take_chat(said: Said, message: Json, choice: Json) -> None:
    text, thinking = _text(message.get("content"))
    said.text += text + (message.get("refusal") or "")
    said.thinking += thinking or next((message[name] for name in ("reasoning_content", "reasoning") if message.get(name)), "")
    said.stop = STOPS["chat"].get(choice.get("finish_reason") or "", choice.get("finish_reason")) or said.stop


def _chat_usage(usage: Json | None) -> tuple[int | None, int | None] | None:
    return (usage["prompt_tokens"], usage["completion_tokens"]) if usage else None


def _called(call: Json) -> Json:
    return call.get("function") or call.get("custom") or {}


def _read_completion(body: Json) -> Said:
    said, choice = Said(usage=_chat_usage(body.get("usage")) or (None, None)), body["choices"][0]
    message = choice["message"]
    _take_chat(said, message, choice)
    old = [{"function": message["function_call"]}] if message.get("function_call") else []
    said.calls = [(call["name"], arguments(call.get("arguments", call.get("input")))) for call in map(_called, (message.get("tool_calls") or []) + old)]
    return said


def _read_chunks(chunks: list[Json]) -> Said:
    said, slots = Said(), {}
    for chunk in chunks:
        if chunk.get("error"):
            said.error = chunk["error"]["message"]
        said.usage = _chat_usage(chunk.get("usage") or (chunk.get("x_groq") or {}).get("usage")) or said.usage
        for choice in chunk.get("choices") or ():
            if choice.get("index"):
                continue
            delta = choice.get("delta") or {}
            _take_chat(said, delta, choice)
            for call in (delta.get("tool_calls") or []) + ([{"index": 0, "function": delta["function_call"]}] if delta.get("function_call") else []):
                place = call.get("index", len(slots) if call.get("id") or not slots else len(slots) - 1)
                slot, called = slots.setdefault(place, {"name": None, "text": ""}), _called(call)
                slot["name"] = slot["name"] or called.get("name")
                slot["text"] += called.get("arguments", called.get("input")) or ""
    said.calls = [(slot["name"], arguments(slot["text"])) for slot in slots.values()]
    return said


# ---------------------------------------------------------------- Messages

def _messages_usage(usage: Json) -> tuple[int, int]:
    return usage["input_tokens"] + (usage.get("cache_read_input_tokens") or 0) + (usage.get("cache_creation_input_tokens") or 0), usage["output_tokens"]


def _read_message(body: Json) -> Said:
    said = Said(stop=STOPS["messages"].get(body["stop_reason"], body["stop_reason"]), usage=_messages_usage(body["usage"]))
    for block in body["content"]:
        said.text += block["text"] if block["type"] == "text" else ""
        said.thinking += block["thinking"] if block["type"] == "thinking" else ""
        if block["type"] == "tool_use":
            said.calls.append((block["name"], block["input"]))
    return said


_BLOCK_FIELDS = {"text_delta": "text", "thinking_delta": "thinking", "signature_delta": "signature", "input_json_delta": "partial_json"}


def _read_events(events: list[Json]) -> Said:
    message: Json = {"content": [], "stop_reason": None, "usage": {"input_tokens": 0, "output_tokens": 0}}
    error = ""
    for event in events:
        kind = event["type"]
        if kind == "message_start":
            message["usage"].update({name: count for name, count in event["message"]["usage"].items() if count is not None})
        elif kind == "content_block_start":
            message["content"].append(dict(event["content_block"]))
        elif kind == "content_block_delta":
            name = _BLOCK_FIELDS.get(event["delta"]["type"])
            block = message["content"][-1]
            if name:
                block[name] = (block.get(name) or "") + event["delta"][name]
        elif kind == "message_delta":
            message["stop_reason"] = event["delta"].get("stop_reason") or message["stop_reason"]
            message["usage"].update({name: count for name, count in event["usage"].items() if count is not None})
        elif kind == "error":
            error = event["error"]["message"]
    for block in message["content"]:
        if block.get("partial_json"):
            block["input"] = arguments(block.pop("partial_json"))
    return Said(error=error) if error else _read_message(message)


# ---------------------------------------------------------------- Responses

def _read_response(body: Json) -> Said:
    said = Said(error=(body.get("error") or {}).get("message", ""))
    for item in body["output"]:
        if item["type"] == "message":
            said.text += "".join(part.get("text", part.get("refusal", "")) for part in item["content"])
        elif item["type"] == "reasoning":
            said.thinking += "".join(part["text"] for part in item.get("content") or ()) or "\n\n".join(part["text"] for part in item["summary"])
        elif item["type"] == "function_call":
            said.calls.append((item["name"], arguments(item["arguments"])))
        elif item["type"] == "custom_tool_call":
            said.calls.append((item["name"], {"__raw__": item["input"]}))
    said.stop = STOPS["responses"].get((body.get("incomplete_details") or {}).get("reason") or body["status"], body["status"])
    if body.get("usage"):
        said.usage = body["usage"]["input_tokens"], body["usage"]["output_tokens"]
    return said


def _read_response_events(events: list[Json]) -> Said:
    last = events[-1]
    return _read_response(last["response"]) if "response" in last else Said(error=last.get("message") or "no terminal event")


# ---------------------------------------------------------------- form

TYPES = {"chat": (openai.types.chat.ChatCompletion, openai.types.chat.ChatCompletionChunk), "messages": (anthropic.types.Message, anthropic.types.RawMessageStreamEvent),
         "responses": (openai.types.responses.Response, openai.types.responses.ResponseStreamEvent)}


@functools.cache
def _type(client: str, streamed: bool) -> pydantic.TypeAdapter[Any]:
    return pydantic.TypeAdapter(TYPES[client][streamed])


def _untyped(client: str, streamed: bool, value: Any) -> Iterator[str]:
    """Where a body or an event is not what the SDK's types say."""
    try:
        _type(client, streamed).validate_json(json.dumps(value), strict=True)
    except pydantic.ValidationError as error:
        yield from (f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors(include_url=False)[:2])


_FREE = frozenset({"delta", "content", "text", "thinking", "partial_json", "arguments", "reasoning_content", "refusal", "signature"})


def _shape(value: Any, name: str = "") -> Any:
    """The same for events that differ in counts and free text alone: of those the types see no difference, so one will do."""
    if isinstance(value, dict):
        return tuple((key, _shape(inner, key)) for key, inner in value.items())
    if isinstance(value, list):
        return tuple(_shape(inner) for inner in value)
    return value if isinstance(value, str) and name not in _FREE else type(value)


def faults(client: str, reply: Reply) -> list[str]:
    """What is wrong with the form of a good answer."""
    if not reply.complete:
        return ["the body does not end as its framing says"]
    if not reply.streamed:
        return list(_untyped(client, False, reply.json))
    found = frames(reply)
    events = [data for _, data in found if data != "[DONE]"]
    shapes = {_shape(event): event for event in events}
    wrong = [fault for event in shapes.values() for fault in _untyped(client, True, event)]
    if client == "chat":
        return wrong + _chat_faults(events, found)
    wrong += [f"event {name!r} for {event['type']}" for name, event in found if name != event["type"]]
    return wrong + (_messages_faults(events) if client == "messages" else _responses_faults(events))


def _chat_faults(chunks: list[Json], found: list[tuple[str, Any]]) -> list[str]:
    wrong = [] if found[-1] == ("", "[DONE]") else ["no [DONE] at the end"]
    wrong += [f"{name} changes" for name in ("id", "created", "model") if len({chunk[name] for chunk in chunks}) != 1]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    ends = [index for index, choice in enumerate(choices) if choice["finish_reason"]]
    wrong += [] if ends == [len(choices) - 1] else ["finish_reason is not told once and last"]
    wrong += [] if choices[0]["delta"].get("role") == "assistant" else ["no role at first"]
    places = [call["index"] for choice in choices for call in choice["delta"].get("tool_calls", ())]
    wrong += [] if places == sorted(places) and sorted(set(places)) == list(range(len(set(places)))) else [f"calls in the order {places}"]
    told = [index for index, chunk in enumerate(chunks) if chunk.get("usage")]
    return wrong + ([] if told == [len(chunks) - 1] and not chunks[-1]["choices"] else ["usage is not in a chunk of its own, the last"])


_MESSAGE_FORM = re.compile(r"message_start( ping)*( content_block_start( content_block_delta| ping)* content_block_stop( ping)*)* message_delta message_stop")
_DELTAS = {"text": {"text_delta", "citations_delta"}, "thinking": {"thinking_delta", "signature_delta"}, "tool_use": {"input_json_delta"}, "redacted_thinking": set()}


def _messages_faults(events: list[Json]) -> list[str]:
    wrong = [] if _MESSAGE_FORM.fullmatch(" ".join(event["type"] for event in events)) else ["events in the order " + " ".join(event["type"] for event in events)[:200]]
    opened: list[Json] = []
    for event in events:
        if event["type"] == "content_block_start":
            opened.append({**event["content_block"], "said": ""})
        if event["type"].startswith("content_block") and event["index"] != len(opened) - 1:
            wrong.append(f"index {event['index']} in block {len(opened) - 1}")
        if event["type"] == "content_block_delta":
            if event["delta"]["type"] not in _DELTAS.get(opened[-1]["type"], {event["delta"]["type"]}):
                wrong.append(f"{event['delta']['type']} in {opened[-1]['type']}")
            opened[-1]["said"] += event["delta"].get(_BLOCK_FIELDS.get(event["delta"]["type"], ""), "")
    wrong += [f"an empty {block['type']} block" for block in opened if not block["said"] and block["type"] in ("text", "thinking", "tool_use")]
    return wrong


def _responses_faults(events: list[Json]) -> list[str]:
    wrong = [] if [event["sequence_number"] for event in events] == list(range(len(events))) else ["sequence numbers have gaps"]
    kinds = [event["type"] for event in events]
    wrong += [] if kinds[:2] == ["response.created", "response.in_progress"] else [f"begins with {kinds[:2]}"]
    wrong += [] if kinds[-1] in ("response.completed", "response.incomplete") else [f"ends in {kinds[-1]}"]
    done: list[Json] = []
    said: dict[str, str] = {}
    for event in events:
        if event["type"].endswith(".delta"):
            said[event["item_id"]] = said.get(event["item_id"], "") + event["delta"]
        if event["type"] == "response.output_item.done":
            done.append(event["item"])
        elif "output_index" in event and event["output_index"] != len(done):
            wrong.append(f"{event['type']} of item {event['output_index']} while {len(done)} is open")
    for item in done:
        if item["type"] in ("message", "function_call"):
            whole = item["arguments"] if item["type"] == "function_call" else "".join(part.get("text", part.get("refusal", "")) for part in item["content"])
            wrong += [] if said.get(item["id"], "") == whole else [f"the deltas of {item['id']} are not its whole"]
    return wrong + ([] if events[-1].get("response", {}).get("output") == done else ["the last event has other items than those that were done"])
