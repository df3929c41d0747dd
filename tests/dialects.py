"""The three wire formats as a provider streams them and as a client reads them, small enough to compare one with another.

    told = Telling("messages")                      # one answer in one format: each method gives the frames of one step
    stream(told.begin(), told.say("Hel", "lo"), told.call("add", '{"a":', "1}"), told.end())
    seen = read_stream("messages", reply)           # Seen: text, thinking, calls, how it ended, whatever the format
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fakes import USAGE, Json, Reply, chat_chunk, frame

FORMATS = ("chat", "messages", "responses")
PATHS = {"chat": "/v1/chat/completions", "messages": "/v1/messages", "responses": "/v1/responses"}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a"]}


def without_found(deltas: list[Json]) -> list[Json]:
    """Hub deltas without the provider's own error object, which is there to be judged."""
    return [{name: value for name, value in delta.items() if name != "found"} for delta in deltas]


def ask(client: str, model: str, text: str = "Add one and two.", **fields: Any) -> Json:
    """A streamed request with one tool, `add`, as a client of that format sends it."""
    user = {"role": "user", "content": text}
    body: Json = {"model": model, "stream": True, **fields}
    if client == "chat":
        return {**body, "messages": [user], "tools": [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": SCHEMA}}]}
    if client == "messages":
        return {**body, "max_tokens": 1000, "messages": [user], "tools": [{"name": "add", "description": "Adds.", "input_schema": SCHEMA}]}
    return {**body, "input": [{"type": "message", **user}], "tools": [{"type": "function", "name": "add", "description": "Adds.", "parameters": SCHEMA, "strict": False}]}


class Telling:
    """One streamed answer in one format; seed: what its call ids have in them."""

    def __init__(self, wire: str, seed: str = "") -> None:
        self.wire, self.seed = wire, seed
        self.n_blocks = 0
        self.n_calls = 0
        self.n_events = 0
        self.output: list[Json] = []

    def begin(self) -> list[bytes]:
        """What comes before there is any content."""
        if self.wire == "chat":
            return [frame(chat_chunk({"role": "assistant", "content": ""}))]
        if self.wire == "messages":
            message = {"id": "msg_1", "type": "message", "role": "assistant", "model": "m", "content": [], "stop_reason": None, "stop_sequence": None,
                       "usage": {"input_tokens": 11, "output_tokens": 1}}
            return [self._event("message_start", message=message), self._event("ping")]
        return [self._event("response.created", response=self._response("in_progress")), self._event("response.in_progress", response=self._response("in_progress"))]

    def say(self, *texts: str) -> list[bytes]:
        """Text, whole."""
        if self.wire == "chat":
            return [frame(chat_chunk({"content": text})) for text in texts]
        if self.wire == "messages":
            return self._block({"type": "text", "text": ""}, [{"type": "text_delta", "text": text} for text in texts])
        index, part = self._next(), {"type": "output_text", "annotations": [], "logprobs": []}
        item = {"id": f"msg_{index}", "type": "message", "role": "assistant"}
        place = {"item_id": item["id"], "output_index": index, "content_index": 0}
        self.output.append({**item, "status": "completed", "content": [{**part, "text": "".join(texts)}]})
        return [self._event("response.output_item.added", output_index=index, item={**item, "status": "in_progress", "content": []}),
                self._event("response.content_part.added", **place, part={**part, "text": ""}),
                *(self._event("response.output_text.delta", **place, delta=text, logprobs=[]) for text in texts),
                self._event("response.output_text.done", **place, text="".join(texts), logprobs=[]),
                self._event("response.content_part.done", **place, part={**part, "text": "".join(texts)}),
                self._event("response.output_item.done", output_index=index, item=self.output[-1])]

    def think(self, *texts: str) -> list[bytes]:
        """Thinking, whole."""
        if self.wire == "chat":
            return [frame(chat_chunk({"reasoning_content": text})) for text in texts]
        if self.wire == "messages":
            return self._block({"type": "thinking", "thinking": "", "signature": ""},
                               [*({"type": "thinking_delta", "thinking": text} for text in texts), {"type": "signature_delta", "signature": "c2lnbmVk"}])
        index = self._next()
        place = {"item_id": f"rs_{index}", "output_index": index, "summary_index": 0}
        item = {"id": f"rs_{index}", "type": "reasoning"}
        self.output.append({**item, "summary": [{"type": "summary_text", "text": "".join(texts)}]})
        return [self._event("response.output_item.added", output_index=index, item={**item, "summary": []}),
                self._event("response.reasoning_summary_part.added", **place, part={"type": "summary_text", "text": ""}),
                *(self._event("response.reasoning_summary_text.delta", **place, delta=text) for text in texts),
                self._event("response.reasoning_summary_text.done", **place, text="".join(texts)),
                self._event("response.reasoning_summary_part.done", **place, part=self.output[-1]["summary"][0]),
                self._event("response.output_item.done", output_index=index, item=self.output[-1])]

    def call(self, name: str, *arguments: str) -> list[bytes]:
        """A tool call, whole; its arguments in pieces."""
        self.n_calls += 1
        call_id = f"call_{name}{self.seed}{self.n_calls:08d}"
        if self.wire == "chat":
            index = self.n_calls - 1
            return [frame(chat_chunk({"tool_calls": [{"index": index, "id": call_id, "type": "function", "function": {"name": name, "arguments": ""}}]})),
                    *(frame(chat_chunk({"tool_calls": [{"index": index, "function": {"arguments": text}}]})) for text in arguments)]
        if self.wire == "messages":
            return self._block({"type": "tool_use", "id": f"toolu_{call_id}", "name": name, "input": {}}, [{"type": "input_json_delta", "partial_json": text} for text in arguments])
        index, whole = self._next(), "".join(arguments)
        item = {"id": f"fc_{index}", "type": "function_call", "call_id": call_id, "name": name}
        self.output.append({**item, "status": "completed", "arguments": whole})
        return [self._event("response.output_item.added", output_index=index, item={**item, "status": "in_progress", "arguments": ""}),
                *(self._event("response.function_call_arguments.delta", item_id=item["id"], output_index=index, delta=text) for text in arguments),
                self._event("response.function_call_arguments.done", item_id=item["id"], output_index=index, name=name, arguments=whole),
                self._event("response.output_item.done", output_index=index, item=self.output[-1])]

    def half_say(self, *texts: str) -> list[bytes]:
        """Text, and no word that it is whole."""
        frames = self.say(*texts)
        return frames[:{"chat": len(texts), "messages": 1 + len(texts), "responses": 2 + len(texts)}[self.wire]]

    def half_call(self, name: str, *arguments: str) -> list[bytes]:
        """The beginning of a tool call that never gets whole."""
        return self.call(name, *arguments)[:1 + len(arguments)]

    def end(self) -> list[bytes]:
        """The proper end of an answer."""
        if self.wire == "chat":
            return [frame(chat_chunk({}, "tool_calls" if self.n_calls else "stop", usage=USAGE)), frame("[DONE]")]
        if self.wire == "messages":
            delta = {"stop_reason": "tool_use" if self.n_calls else "end_turn", "stop_sequence": None}
            return [self._event("message_delta", delta=delta, usage={"output_tokens": 7}), self._event("message_stop")]
        usage = {"input_tokens": 11, "input_tokens_details": {"cached_tokens": 0}, "output_tokens": 7, "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 18}
        return [self._event("response.completed", response={**self._response("completed"), "output": self.output, "usage": usage})]

    def error(self) -> list[bytes]:
        """What a provider sends that breaks off by its own word."""
        if self.wire == "chat":
            return [frame({"error": {"message": "The engine died.", "type": "server_error", "param": None, "code": None}})]
        if self.wire == "messages":
            return [self._event("error", error={"type": "api_error", "message": "The engine died."})]
        failed = {**self._response("failed"), "error": {"code": "server_error", "message": "The engine died."}}
        return [self._event("response.failed", response=failed)]

    def _event(self, kind: str, /, **fields: Any) -> bytes:
        numbered = {"sequence_number": self.n_events} if self.wire == "responses" else {}
        self.n_events += 1
        return frame({"type": kind, **numbered, **fields}, kind)

    def _next(self) -> int:
        self.n_blocks += 1
        return self.n_blocks - 1

    def _block(self, block: Json, deltas: list[Json]) -> list[bytes]:
        index = self._next()
        return [self._event("content_block_start", index=index, content_block=block), *(self._event("content_block_delta", index=index, delta=delta) for delta in deltas),
                self._event("content_block_stop", index=index)]

    @staticmethod
    def _response(status: str) -> Json:
        return {"id": "resp_1", "object": "response", "created_at": 1790000000, "status": status, "error": None, "incomplete_details": None, "model": "m", "output": [], "usage": None,
                "parallel_tool_calls": True, "tool_choice": "auto", "tools": []}


@dataclass
class Seen:
    """What a client was told, whatever the format. A call of which anything was told is in `calls`; `whole` has those that were finished too."""
    text: str = ""
    thinking: str = ""
    calls: list[list[str]] = field(default_factory=list)    #: [name, arguments so far]
    whole: list[list[str]] = field(default_factory=list)
    ended: str = ""                                         #: stop reason or status of a proper end; "" when there was none
    errors: list[Json] = field(default_factory=list)
    after_error: int = 0                                    #: events behind the error
    open_at: int = -1                                       #: Messages: index of the latest call's block


def read_stream(client: str, reply: Reply) -> Seen:
    """What the events of `reply` tell a client of that format. Raises AssertionError on what breaks the format's own rules."""
    return read_events(client, reply.chunks, reply.done)


def read_events(client: str, events: list[Json], done: bool = False) -> Seen:
    """The same of events; done: whether [DONE] came."""
    seen = Seen()
    for event in events:
        seen.after_error += bool(seen.errors)
        {"chat": _see_chat, "messages": _see_messages, "responses": _see_responses}[client](seen, event)
    if client == "chat":
        assert not seen.ended or done, "a finish reason and no [DONE]"
        assert seen.ended or not done, "[DONE] without a finish reason"
        seen.whole = [call for call in seen.calls if seen.ended]
    if client == "responses":
        numbers = [event["sequence_number"] for event in events if event["type"] not in ("error", "keepalive")]     # those of a passage, which leaves numbers as they are
        assert numbers == list(range(len(numbers))), f"sequence numbers {numbers}"
        assert [event["type"] for event in events].count("response.created") == min(1, len(numbers))
    return seen


def _see_chat(seen: Seen, event: Json) -> None:
    if event.get("error"):
        seen.errors.append(event["error"])
    for choice in event.get("choices") or []:
        delta = choice["delta"]
        seen.text += delta.get("content") or ""
        seen.thinking += delta.get("reasoning_content") or ""
        for call in delta.get("tool_calls") or []:
            if call["index"] == len(seen.calls):
                assert call["id"] and call["function"]["name"], call
                seen.calls.append([call["function"]["name"], ""])
            seen.calls[call["index"]][1] += call["function"].get("arguments") or ""
        seen.ended = choice.get("finish_reason") or seen.ended


def _see_messages(seen: Seen, event: Json) -> None:
    kind, delta = event["type"], event.get("delta") or {}
    if kind == "error":
        seen.errors.append(event["error"])
    elif kind == "content_block_start" and event["content_block"]["type"] == "tool_use":
        seen.calls.append([event["content_block"]["name"], ""])
        seen.open_at = event["index"]
    elif kind == "content_block_delta":
        seen.text += delta.get("text", "")
        seen.thinking += delta.get("thinking", "")
        if delta["type"] == "input_json_delta":
            seen.calls[-1][1] += delta["partial_json"]
    elif kind == "content_block_stop" and event["index"] == seen.open_at:
        seen.whole.append(seen.calls[-1])
    elif kind == "message_delta":
        seen.ended = delta["stop_reason"]


def _see_responses(seen: Seen, event: Json) -> None:
    kind, item = event["type"], event.get("item") or {}
    if kind in ("response.failed", "error"):
        seen.errors.append(event["response"]["error"] if kind == "response.failed" else event)
    elif kind == "response.output_item.added" and item["type"] == "function_call":
        seen.calls.append([item["name"], ""])
    elif kind == "response.function_call_arguments.delta":
        seen.calls[-1][1] += event["delta"]
    elif kind == "response.output_item.done" and item["type"] == "function_call":
        assert seen.calls[-1] == [item["name"], item["arguments"]], (seen.calls, item)
        seen.whole.append(seen.calls[-1])
    elif kind == "response.output_text.delta":
        seen.text += event["delta"]
    elif kind == "response.reasoning_summary_text.delta":
        seen.thinking += event["delta"]
    elif kind in ("response.completed", "response.incomplete"):
        seen.ended = event["response"]["status"]

