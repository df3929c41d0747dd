#!/usr/bin/env python3
"""Measures the gateway against a bare relay and against going direct, in one run.

    python tests/bench.py              about three minutes
    python tests/bench.py --quick      about 25 seconds, for CI; a shape that misses its target is measured once more
    python tests/bench.py --check      exit status 1 when a target is missed
    python tests/bench.py --json FILE  the figures as JSON too
    python tests/bench.py --gateway PATH   another aicarousel.py; the word `bare` puts the bare relay in
                                           the gateway's place, so that every ratio must come out near 1

What runs where

    core 0   the gateway or the bare relay, one at work at a time
    others   a mock provider, and the load generator (this process)

The same program moves by up to 40 % between runs minutes apart, so only ratios inside one run count. Each measure is
taken in short rounds; in a round direct, bare and gateway take turns. Tables show the median of the rounds, and a ratio
is the median of the rounds' own ratios. A ratio within a few percent of another is a tie.

Every answer is checked: status, the whole body or the whole count of events, the end mark. A relay that breaks an answer
is an error here (exit status 2), never a fast relay. All traffic stays on 127.0.0.1.

Contents
    1  Wire samples       the request, the completion, the stream, in bytes
    2  Mock provider      answers at once, floods, or paces events
    3  Bare relay         the reference: streams, h11 heads, pool, raw bytes, nothing else
    4  Load generator     keep-alive connections that check what they get
    5  Processes          start, pin, read CPU time and memory, end
    6  Measures           throughput, latency, streams, memory, start
    7  Report             targets, table, JSON
    8  Command line
"""

from __future__ import annotations

import argparse
import asyncio
import bisect
import functools
import importlib.util
import json
import os
import platform
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

import h11

Json = dict[str, Any]

HOST = "127.0.0.1"
HEAD_END = b"\r\n\r\n"


class BenchError(Exception):
    """A figure that would be worth nothing: something answered wrongly, or did not start."""


##############################################################################
# 1. Wire samples
##############################################################################
# Sizes follow real traffic: a request head of 13 fields and a body of some 400 bytes, an answer of 9 fields and some 600 bytes,
# stream events of some 200 bytes. `bench` in the body is for the mock provider; a gateway passes unknown fields on.

_ID = "chatcmpl-bench8Zq1xYpV3nW7kTrDfGhJ2mLcA"
_QUESTION = "Explain in two sentences why a relay should never wait for the whole answer before it passes the first part of it on."


def json_bytes(value: Json) -> bytes:
    """Compact JSON, as providers send it."""
    return json.dumps(value, separators=(",", ":")).encode()


COMPLETION = json_bytes({
    "id": _ID, "object": "chat.completion", "created": 1790000000, "model": "m",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "A reader sees the first words at once. " * 5, "refusal": None},
                 "logprobs": None, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 58, "completion_tokens": 46, "total_tokens": 104, "prompt_tokens_details": {"cached_tokens": 0}},
    "system_fingerprint": "fp_bench"})


def request_body(n_events: int | None = None, interval_ms: float = 0, write_bytes: int = 0, *, messages: bool = False) -> bytes:
    """A request in the Chat or the Messages format: for one whole answer, or with `n_events` for a stream of so many content events.

    The provider sends one event each `interval_ms`; at 0 as fast as it can, in writes of one event, or of `write_bytes`. What it is to do stands
    in the question, which every translation keeps.
    """
    body: Json = {"model": "aicarousel", "temperature": 0.7, "max_tokens": 512}
    rules, turns = "You are a careful assistant who answers briefly and names sources.", [{"role": "user", "content": _QUESTION}]
    body |= {"system": rules, "messages": turns} if messages else {"messages": [{"role": "system", "content": rules}, *turns]}
    if n_events is not None:
        turns[-1]["content"] += f" bench={n_events},{interval_ms},{write_bytes}"
        body["stream"] = True
    return json.dumps(body).encode()


def request_bytes(port: int, key: str, body: bytes, path: str = "/v1/chat/completions") -> bytes:
    """The whole request as a client writes it, head of 13 fields and body."""
    return (f"POST {path} HTTP/1.1\r\nHost: {HOST}:{port}\r\nAccept: application/json\r\nAccept-Encoding: identity\r\n"
            f"Connection: keep-alive\r\nContent-Type: application/json\r\nUser-Agent: bench/1.0\r\nX-Stainless-Lang: python\r\n"
            f"X-Stainless-Package-Version: 3.52.0\r\nX-Stainless-OS: Linux\r\nX-Stainless-Arch: x64\r\nX-Stainless-Runtime: CPython\r\n"
            f"Authorization: Bearer {key}\r\nContent-Length: {len(body)}\r\n\r\n").encode() + body


def answer_head(content_type: str, framing: str) -> bytes:
    """Head of a provider's answer, 9 fields."""
    return (f"HTTP/1.1 200 OK\r\nDate: Mon, 02 Nov 2026 10:00:00 GMT\r\nContent-Type: {content_type}\r\n{framing}\r\nConnection: keep-alive\r\n"
            "Server: bench\r\nX-Request-Id: req_8f14e45fceea167a5a36dedd4bea2543\r\nCache-Control: no-cache\r\nVary: Accept-Encoding\r\n"
            "Strict-Transport-Security: max-age=31536000\r\n\r\n").encode()


COMPLETION_ANSWER = answer_head("application/json", f"Content-Length: {len(COMPLETION)}") + COMPLETION
STREAM_HEAD = answer_head("text/event-stream", "Transfer-Encoding: chunked")

#: Events of a stream that carry no token: the role, the finish reason, the end mark.
N_FRAME_EVENTS = 3


def event_chunk(text: bytes) -> bytes:
    """One SSE event as one HTTP chunk."""
    event = b"data: %s\n\n" % text
    return b"%x\r\n%s\r\n" % (len(event), event)


def delta_chunk(delta: Json, finish_reason: str | None = None) -> bytes:
    """One chunk of a streamed completion, as one HTTP chunk."""
    return event_chunk(json_bytes({"id": _ID, "object": "chat.completion.chunk", "created": 1790000000, "model": "m",
                                   "choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]}))


@functools.lru_cache(maxsize=16)
def stream_writes(n_events: int, with_usage: bool) -> tuple[bytes, ...]:
    """What the provider writes for a stream, one entry per write: role, each token, and the ending as one.

    The usage event comes only when the request asked for it, which a gateway does for its own accounts.
    """
    ending = delta_chunk({}, "stop")
    if with_usage:
        usage = {"prompt_tokens": 58, "completion_tokens": n_events, "total_tokens": 58 + n_events}
        ending += event_chunk(json_bytes({"id": _ID, "object": "chat.completion.chunk", "created": 1790000000, "model": "m",
                                          "choices": [], "usage": usage}))
    tokens = (delta_chunk({"content": f"tok {n:04d}"}) for n in range(n_events))
    return STREAM_HEAD + delta_chunk({"role": "assistant", "content": ""}), *tokens, ending + event_chunk(b"[DONE]") + b"0\r\n\r\n"


@functools.lru_cache(maxsize=16)
def bulk_writes(n_events: int, with_usage: bool, write_bytes: int) -> tuple[bytes, ...]:
    """The same bytes as `stream_writes`, in writes of `write_bytes`: every event still is its own HTTP chunk."""
    whole = b"".join(stream_writes(n_events, with_usage))
    return tuple(whole[at:at + write_bytes] for at in range(0, len(whole), write_bytes))


##############################################################################
# 2. Mock provider
##############################################################################
# A hand-made HTTP server that does as little as it can, so that it is never what limits a relay. One request at a time per connection.

_CONTENT_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


class MockProvider(asyncio.Protocol):
    """One connection to the mock provider. Lives as long as the connection."""

    #: Streams begun so far, in the whole process; spreads the phases of paced streams.
    n_paced = 0

    def __init__(self) -> None:
        self._received = b""
        self._paused = False
        self._flood: Iterator[bytes] = iter(())
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        set_nodelay(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._flood = iter(())
        if self._timer:
            self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        self._received += data
        head_end = self._received.find(HEAD_END)
        if head_end < 0:
            return
        head = self._received[:head_end]
        length = _CONTENT_LENGTH.search(head)
        body_at = head_end + len(HEAD_END)
        body_end = body_at + (int(length[1]) if length else 0)
        if len(self._received) < body_end:
            return
        body, self._received = self._received[body_at:body_end], self._received[body_end:]
        if head.startswith(b"POST /v1/chat/completions "):
            self._answer(json.loads(body))
        else:
            self._transport.write(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n")

    def _answer(self, request: Json) -> None:
        if not request.get("stream"):
            self._transport.write(COMPLETION_ANSWER)
            return
        n_events, interval_ms, write_bytes = map(int, request["messages"][-1]["content"].rpartition(" bench=")[2].split(","))
        with_usage = bool((request.get("stream_options") or {}).get("include_usage"))
        if interval_ms:
            self._pace(stream_writes(n_events, with_usage), interval_ms / 1000)
        else:
            self._flood = iter(bulk_writes(n_events, with_usage, write_bytes) if write_bytes else stream_writes(n_events, with_usage))
            self._pump()

    def _pump(self) -> None:
        while not self._paused and (data := next(self._flood, None)) is not None:
            self._transport.write(data)

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._pump()

    def _pace(self, writes: Sequence[bytes], interval_s: float) -> None:
        # Streams that begin together would tick together; the golden ratio spreads them over the interval.
        MockProvider.n_paced += 1
        phase_s = interval_s * (MockProvider.n_paced * 0.618034 % 1)
        self._transport.write(writes[0])
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(phase_s, self._tick, loop, writes, 1, loop.time() + phase_s, interval_s)

    def _tick(self, loop: asyncio.AbstractEventLoop, writes: Sequence[bytes], n: int, due_at: float, interval_s: float) -> None:
        self._transport.write(writes[n])
        if n + 1 < len(writes):
            due_at += interval_s
            self._timer = loop.call_at(due_at, self._tick, loop, writes, n + 1, due_at, interval_s)


async def serve_provider() -> None:
    """Role `provider`: print the port, serve until stdin closes."""
    server = await asyncio.get_running_loop().create_server(MockProvider, HOST, 0, backlog=4096)
    await announce_and_wait(server)


##############################################################################
# 3. Bare relay
##############################################################################
# The reference: what relaying costs in this language and with this parser, and nothing more. asyncio streams, h11 for the two heads,
# heads written as bytes, pooled upstream connections, TCP_NODELAY on both sides, bodies as the bytes they came in, drain() only over
# the high-water mark. No JSON, no keys, no log, no retries, no timeouts. It is kept as quick as that shape allows: a slow
# reference would flatter the gateway.

READ_BYTES = 256 * 1024
HIGH_WATER_BYTES = 64 * 1024
HOP_BY_HOP = frozenset((b"connection", b"host", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"te", b"trailer", b"upgrade"))

Upstream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class ChunkedEnd:
    """Tells where a chunked body ends, by its chunk sizes and nothing else. One per body."""

    __slots__ = ("_rest", "_skip_bytes")

    def __init__(self) -> None:
        self._rest = b""         #: a size line, or an ending, that is not whole yet
        self._skip_bytes = 0     #: bytes of the chunk begun that are still to come, with its line end

    def seen_in(self, data: bytes) -> bool:
        """Whether the body ends with `data`, the bytes that follow those given before."""
        if self._rest:
            data = self._rest + data
        at, size = self._skip_bytes, len(data)
        while at < size:
            line_end = data.find(b"\r\n", at)
            if line_end < 0:
                break
            chunk_bytes = int(data[at:line_end], 16)
            if not chunk_bytes:
                if data.find(HEAD_END, line_end) >= 0:      # "0", any trailers, and the empty line
                    return True
                break
            at = line_end + 4 + chunk_bytes
        self._rest, self._skip_bytes = (data[at:], 0) if at < size else (b"", at - size)
        return False


def parse_head(role: type[h11.CLIENT] | type[h11.SERVER], head: bytes) -> Any:
    """The h11 Request or Response in `head`. A new connection object per head: h11 keeps the state of one message."""
    parser = h11.Connection(role)
    parser.receive_data(head)
    return parser.next_event()


def rewrite_head(first_line: bytes, fields: Sequence[tuple[bytes, bytes]]) -> bytes:
    """A head as bytes, without the fields that belong to one connection."""
    return b"%s\r\n%s\r\n" % (first_line, b"".join([b"%s: %s\r\n" % field for field in fields if field[0] not in HOP_BY_HOP]))


def over_high_water(writer: asyncio.StreamWriter) -> bool:
    """Whether the other side reads more slowly than we write."""
    return writer.transport.get_write_buffer_size() > HIGH_WATER_BYTES


class BareRelay:
    """The relay to one provider port, and its pool. Lives as long as the process."""

    def __init__(self, provider_port: int) -> None:
        self._port = provider_port
        self._host_line = b"host: %s:%d" % (HOST.encode(), provider_port)
        self._pool: list[Upstream] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One client connection, to its end."""
        set_nodelay(writer.transport)
        try:
            while not writer.is_closing():
                await self._relay_one(reader, writer)
        except (OSError, EOFError, LookupError, ValueError, h11.ProtocolError):
            pass        # the client went away, or something is wrong: the load generator notices a cut answer
        finally:
            writer.close()

    async def _relay_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = parse_head(h11.SERVER, await reader.readuntil(HEAD_END))
        fields = list(request.headers)
        body = await reader.readexactly(int(dict(fields)[b"content-length"]))
        first_lines = b"%s %s HTTP/1.1\r\n%s" % (request.method, request.target, self._host_line)
        upstream_reader, upstream_writer = await self._take_upstream()
        try:
            upstream_writer.write(rewrite_head(first_lines, fields) + body)
            await relay_answer(upstream_reader, writer)
        except BaseException:
            upstream_writer.close()
            raise
        self._pool.append((upstream_reader, upstream_writer))

    async def _take_upstream(self) -> Upstream:
        while self._pool:
            reader, writer = self._pool.pop()
            if not (writer.is_closing() or reader.at_eof()):
                return reader, writer
        reader, writer = await asyncio.open_connection(HOST, self._port, limit=READ_BYTES)
        set_nodelay(writer.transport)
        return reader, writer


async def relay_answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Carry one answer across: the head, then the body by its framing."""
    response = parse_head(h11.CLIENT, await reader.readuntil(HEAD_END))
    fields = list(response.headers)
    head = rewrite_head(b"HTTP/1.1 %d %s" % (response.status_code, response.reason), fields)
    by_name = dict(fields)
    if b"content-length" in by_name:
        await relay_counted(head, int(by_name[b"content-length"]), reader, writer)
    elif by_name.get(b"transfer-encoding") == b"chunked":
        await relay_chunked(head, reader, writer)
    else:
        raise ValueError("the provider always frames its answers")


async def relay_counted(pending: bytes, left_bytes: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Carry a body of known length; `pending` (the head) goes out with its first part in one write."""
    while left_bytes:
        data = await reader.read(min(left_bytes, READ_BYTES))
        if not data:
            raise EOFError
        left_bytes -= len(data)
        writer.write(pending + data)
        pending = b""
        if over_high_water(writer):
            await writer.drain()
    writer.write(pending)


async def relay_chunked(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Carry a chunked body as it comes; the head goes out at once, since the first event may take its time."""
    writer.write(head)
    end = ChunkedEnd()
    ended = False
    while not ended:
        data = await reader.read(READ_BYTES)
        if not data:
            raise EOFError
        writer.write(data)
        ended = end.seen_in(data)
        if over_high_water(writer):
            await writer.drain()


async def serve_relay(provider_port: str, port: str = "0") -> None:
    """Role `relay`: print the port, serve until stdin closes."""
    server = await asyncio.start_server(BareRelay(int(provider_port)).serve, HOST, int(port), backlog=4096, limit=READ_BYTES)
    await announce_and_wait(server)


##############################################################################
# 4. Load generator
##############################################################################
# Keep-alive connections, each sending its next request when the last answer is whole and right. The checks cost a little, alike for all.


class CountedBody:
    """Reads a body of known length."""

    def __init__(self, n_bytes: int) -> None:
        self._left_bytes = n_bytes
        self.ended = n_bytes == 0

    def feed(self, data: bytes) -> bytes:
        """The content in `data`. Raises BenchError for bytes after the end."""
        self._left_bytes -= len(data)
        if self._left_bytes < 0:
            raise BenchError("bytes after the end of a body")
        self.ended = not self._left_bytes
        return data


class ChunkedBody:
    """Reads a chunked body. Written apart from ChunkedEnd, so that neither hides a mistake of the other."""

    def __init__(self) -> None:
        self._rest = b""
        self._skip_bytes = 0     #: content and line end still to come of the chunk begun
        self.ended = False

    def feed(self, data: bytes) -> bytes:
        """The content in `data`. Raises BenchError for bytes after the end, ValueError for a bad size."""
        if self._rest:
            data, self._rest = self._rest + data, b""
        at, size = self._skip_bytes, len(data)
        content = [data[:at - 2]] if at > 2 else []
        while at < size:
            line_end = data.find(b"\r\n", at)
            chunk_bytes = int(data[at:line_end], 16) if line_end >= 0 else -1
            if chunk_bytes <= 0:
                self._finish_or_keep(data, at, line_end if chunk_bytes == 0 else -1)
                at = size
                break
            content_at = line_end + 2
            at = content_at + chunk_bytes + 2
            content.append(data[content_at:at - 2])
        self._skip_bytes = at - size
        return b"".join(content)

    def _finish_or_keep(self, data: bytes, at: int, line_end: int) -> None:
        end = data.find(HEAD_END, line_end) if line_end >= 0 else -1
        if end < 0:
            self._rest = data[at:]
        elif end + len(HEAD_END) != len(data):
            raise BenchError("bytes after the end of a chunked body")
        else:
            self.ended = True


class CompletionAnswer:
    """One whole answer: must be the provider's completion."""

    def __init__(self, head: bytes) -> None:
        self._body = framed_body(head)
        self._content = b""

    @property
    def ended(self) -> bool:
        """Whether the body has ended."""
        return self._body.ended

    def feed(self, data: bytes) -> int:
        """Take bytes of the body; the number of events in them, which is none."""
        self._content += self._body.feed(data)
        return 0

    def finish(self) -> None:
        """Raises BenchError unless all of the completion came, and nothing else."""
        if self._content != COMPLETION and not same_json(self._content, COMPLETION):
            raise BenchError(f"not the provider's completion: {self._content[:300]!r}")


def same_json(left: bytes, right: bytes) -> bool:
    """Whether two texts say the same in JSON, however it is spaced."""
    try:
        return bool(json.loads(left) == json.loads(right))
    except ValueError:
        return False


@dataclass(frozen=True, slots=True)
class SentStream:
    """What the mock provider sends for a stream, to compare with."""

    raw: bytes                       #: the body with its chunk framing
    content: bytes                   #: the body without it
    event_ends: Sequence[int]        #: where each event ends in `raw`


@functools.lru_cache(maxsize=16)
def sent_stream(n_tokens: int) -> SentStream:
    """The stream of so many tokens, without a usage event: the client did not ask for one."""
    raw = b"".join(stream_writes(n_tokens, False))[len(STREAM_HEAD):]
    content = ChunkedBody().feed(raw)
    return SentStream(raw, content, [found.end() for found in re.finditer(rb"\n\n\r\n", raw)])


class MessageAnswer(CompletionAnswer):
    """One whole answer translated to Messages: must say what the provider's completion says."""

    def finish(self) -> None:
        """Raises BenchError unless it does."""
        told, sent = json.loads(self._content), json.loads(COMPLETION)
        if [part["text"] for part in told["content"]] != [sent["choices"][0]["message"]["content"]] or told["usage"]["output_tokens"] != sent["usage"]["completion_tokens"]:
            raise BenchError(f"not the provider's completion: {self._content[:300]!r}")


class MessageStreamAnswer:
    """One stream translated to Messages: must hold every token in its order, and its end."""

    def __init__(self, n_tokens: int, head: bytes) -> None:
        self._n_tokens = n_tokens
        self._body = framed_body(head)
        self._content: list[bytes] = []
        self._tail = b""
        self.n_events = 0

    @property
    def ended(self) -> bool:
        """Whether the body has ended."""
        return self._body.ended

    def feed(self, data: bytes) -> int:
        """Take bytes of the body; the number of events in them."""
        content = self._body.feed(data)
        self._content.append(content)
        text = self._tail + content
        self._tail = text[-4:]
        n_events = text.count(b"data:")
        self.n_events += n_events
        return n_events

    def finish(self) -> None:
        """Raises BenchError when tokens are missing, changed or out of order, or the end is not there."""
        content = b"".join(self._content)
        tokens = re.findall(rb'"text": ?"(tok [0-9]+)"', content)
        if tokens != [b"tok %04d" % number for number in range(self._n_tokens)] or b"event: message_stop" not in content[-80:]:
            raise BenchError(f"a stream came changed: {len(tokens)} of {self._n_tokens} tokens, its end {content[-160:]!r}")


class StreamAnswer:
    """One streamed answer: must be the provider's stream, event by event.

    As long as the bytes come framed as the provider framed them, comparing them is enough, and so cheap that the load generator
    does not limit a quick relay. A relay may cut chunks its own way, and add comment lines; then content is collected, and compared at the end.
    """

    def __init__(self, sent: SentStream, head: bytes) -> None:
        self._sent = sent
        self._body = framed_body(head)
        self._as_sent = isinstance(self._body, ChunkedBody)
        self._n_bytes = 0
        self._content: list[bytes] = []
        self._tail = b""
        self.n_events = 0
        self.ended = False

    def feed(self, data: bytes) -> int:
        """Take bytes of the body; the number of events in them."""
        before = self.n_events
        if self._as_sent and self._sent.raw.startswith(data, self._n_bytes):
            self._compare(data)
        elif self._as_sent:
            self._as_sent, self.n_events = False, 0
            self._collect(self._sent.raw[:self._n_bytes] + data)
        else:
            self._collect(data)
        return self.n_events - before

    def _compare(self, data: bytes) -> None:
        self._n_bytes += len(data)
        self.ended = self._n_bytes == len(self._sent.raw)
        self.n_events = bisect.bisect_right(self._sent.event_ends, self._n_bytes)

    def _collect(self, data: bytes) -> None:
        content = self._body.feed(data)
        self.ended = self._body.ended
        self._content.append(content)
        text = self._tail + content
        self._tail = text[-4:]          # too short to hold a whole `data:`, so none is counted twice
        self.n_events += text.count(b"data:")

    def finish(self) -> None:
        """Raises BenchError when events are missing, too many or changed, or the end mark is not there."""
        if self._as_sent:
            return
        content = b"".join(self._content)
        if content != self._sent.content and _COMMENT.sub(b"", content) != self._sent.content:
            n_events, n_sent = content.count(b"data:"), len(self._sent.event_ends)
            raise BenchError(f"a stream came changed: {n_events} of {n_sent} events, its end {content[-160:]!r}")


Answer = CompletionAnswer | StreamAnswer | MessageStreamAnswer

#: A comment of an event stream, such as a keep-alive, with the empty line that may follow.
_COMMENT = re.compile(rb"(?m)^:[^\n]*\n\n?")


@dataclass(slots=True)
class Load:
    """One run of the load generator: what is sent, what came of it. Owned by `run_window` or `run_batch`."""

    request: bytes
    new_answer: Callable[[bytes], Answer]     #: from the head of an answer, its checker
    budget: int | None                                          #: requests to send in all; None: until `stopping`
    ended: asyncio.Future[None]                                 #: all connections are done, or one met an error
    stopping: bool = False
    n_sent: int = 0
    n_answers: int = 0
    n_events: int = 0
    latencies_ms: list[float] = field(default_factory=list)     #: one per answer, in order of their ends
    first_ms: list[float] = field(default_factory=list)         #: one per stream: until its first event
    clients: set[LoadClient] = field(default_factory=set)

    def wants_more(self) -> bool:
        """Whether a connection that is free is to send again."""
        return not self.stopping and (self.budget is None or self.n_sent < self.budget)

    def fail(self, reason: str) -> None:
        """End the run with an error."""
        if not self.ended.done():
            self.ended.set_exception(BenchError(reason))

    def leave(self, client: LoadClient) -> None:
        """Count a connection as done."""
        self.clients.discard(client)
        if not self.clients and not self.ended.done():
            self.ended.set_result(None)

    def close(self) -> None:
        """Close what is still open, at the end of a run or after an error."""
        for client in tuple(self.clients):
            client.close()


class LoadClient(asyncio.Protocol):
    """One connection of the load generator."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._head = b""
        self._answer: Answer | None = None      #: None while the head is awaited

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        set_nodelay(transport)
        self._load.clients.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        if self in self._load.clients:
            self._load.fail(f"the connection was closed inside an answer ({exc or 'end of stream'})")

    def close(self) -> None:
        """Leave the load, and close without waiting for anything."""
        self._load.leave(self)
        self._transport.abort()

    def send(self) -> None:
        """Send the next request, or leave when there is none."""
        if not self._load.wants_more():
            self.close()
            return
        self._load.n_sent += 1
        self._has_event = False
        self._sent_at = time.perf_counter()
        self._transport.write(self._load.request)

    def data_received(self, data: bytes) -> None:
        try:
            self._take(data)
        except (BenchError, ValueError) as error:
            self._load.fail(str(error))

    def _take(self, data: bytes) -> None:
        if self._answer is None:
            self._head += data
            head, found, data = self._head.partition(HEAD_END)
            if not found:
                return
            self._answer, self._head = self._load.new_answer(head), b""
        n_events = self._answer.feed(data) if data else 0
        if n_events and not self._has_event:
            self._has_event = True
            self._load.first_ms.append((time.perf_counter() - self._sent_at) * 1000)
        self._load.n_events += n_events
        if self._answer.ended:
            self._finish(self._answer)

    def _finish(self, answer: Answer) -> None:
        self._load.latencies_ms.append((time.perf_counter() - self._sent_at) * 1000)
        answer.finish()
        self._load.n_answers += 1
        self._answer = None
        self.send()


def framed_body(head: bytes) -> CountedBody | ChunkedBody:
    """The body that follows `head`. Raises BenchError for any status but 200 and for a body that only the closing would end."""
    if not head.startswith(b"HTTP/1.1 200"):
        raise BenchError(f"not a 200: {head!r}")
    if length := _CONTENT_LENGTH.search(head):
        return CountedBody(int(length[1]))
    if _CHUNKED.search(head):
        return ChunkedBody()
    raise BenchError(f"neither content-length nor chunked: {head!r}")


_CHUNKED = re.compile(rb"\r\ntransfer-encoding: *chunked", re.IGNORECASE)

#: Connections opened at a time: fewer than a listener's usual backlog of 100, past which a connection waits a second.
N_OPENING = 50

#: Longest time a run may go on after its window, or a batch in all.
MAX_RUN_S = 120


async def open_clients(load: Load, port: int, n_connections: int) -> None:
    """Open the connections, then send the first request on each."""
    loop = asyncio.get_running_loop()
    clients: list[LoadClient] = []
    while len(clients) < n_connections:
        n_now = min(N_OPENING, n_connections - len(clients))
        opened = await asyncio.gather(*[loop.create_connection(lambda: LoadClient(load), HOST, port) for _ in range(n_now)])
        clients += [client for _, client in opened]
    for client in clients:
        client.send()


async def wait_or_fail(load: Load, span_s: float) -> None:
    """Let the load run for `span_s`, or until it ends. Raises BenchError as soon as an answer is wrong."""
    done, _ = await asyncio.wait({load.ended}, timeout=span_s)
    if done:
        load.ended.result()


async def await_end(load: Load) -> None:
    """Wait until every answer is in. Raises BenchError when that takes too long."""
    await wait_or_fail(load, MAX_RUN_S)
    if not load.ended.done():
        raise BenchError(f"{len(load.clients)} connections still wait for an answer after {MAX_RUN_S} s")


@dataclass(frozen=True, slots=True)
class Sample:
    """What one run gave."""

    span_s: float
    n_answers: int
    n_events: int
    cpu_s: float | None          #: CPU time of the relay at work; None when going direct or where it cannot be read
    latencies_ms: Sequence[float]
    first_ms: Sequence[float]

    @property
    def is_held_up(self) -> bool:
        """Whether a relay that had work all the time got less than its core."""
        return self.cpu_s is not None and self.cpu_s < LEAST_SHARE * self.span_s

    @property
    def answers_per_s(self) -> float:
        """Whole answers per second."""
        return self.n_answers / self.span_s

    @property
    def events_per_s(self) -> float:
        """Streamed events per second."""
        return self.n_events / self.span_s


@dataclass(frozen=True, slots=True)
class Way:
    """One of the ways to the provider: direct, bare, gateway."""

    name: str
    port: int
    pid: int | None
    key: str = "sk-" + "0" * 64


@dataclass(frozen=True, slots=True)
class Shape:
    """What is asked for, and over how many connections."""

    n_connections: int
    n_tokens: int | None = None      #: None: one whole answer
    interval_ms: float = 0           #: 0: as fast as it goes
    write_bytes: int = 0             #: size of the provider's writes; 0: each event its own
    saturates: bool = False          #: a relay that has its core to itself is busy all the time
    messages: str = ""               #: the shape with which it is compared: the same through the gateway alone, from a client that speaks Messages

    def new_load(self, way: Way, budget: int | None) -> Load:
        """A load of this shape for `way`."""
        body = request_body(self.n_tokens, self.interval_ms, self.write_bytes, messages=bool(self.messages))
        request = request_bytes(way.port, way.key, body, "/v1/messages" if self.messages else "/v1/chat/completions")
        new_answer: Callable[[bytes], Answer]
        if self.messages:
            new_answer = MessageAnswer if self.n_tokens is None else functools.partial(MessageStreamAnswer, self.n_tokens)
        else:
            new_answer = CompletionAnswer if self.n_tokens is None else functools.partial(StreamAnswer, sent_stream(self.n_tokens))
        return Load(request, new_answer, budget, asyncio.get_running_loop().create_future())


async def run_window(way: Way, shape: Shape, warm_s: float, window_s: float) -> Sample:
    """Keep all connections busy; count what comes in a window after a warm-up; then let every answer end, and check it."""
    load = shape.new_load(way, None)
    try:
        await open_clients(load, way.port, shape.n_connections)
        await wait_or_fail(load, warm_s)
        began_at, began_cpu_s, n_answers, n_events, n_first = time.perf_counter(), cpu_seconds(way.pid), load.n_answers, load.n_events, len(load.first_ms)
        await wait_or_fail(load, window_s)
        cpu_s, span_s = cpu_seconds(way.pid), time.perf_counter() - began_at
        sample = Sample(span_s, load.n_answers - n_answers, load.n_events - n_events, None if cpu_s is None or began_cpu_s is None else cpu_s - began_cpu_s,
                        load.latencies_ms[n_answers:], load.first_ms[n_first:])
        load.stopping = True
        await await_end(load)
    finally:
        load.close()
    return sample


async def run_batch(way: Way, shape: Shape, n_requests: int, watch: Callable[[], None] | None = None, watch_s: float = 0.25) -> int:
    """Send `n_requests` in all and check every answer; the number of events. Calls `watch` now and then meanwhile."""
    load = shape.new_load(way, n_requests)
    try:
        await open_clients(load, way.port, shape.n_connections)
        deadline_at = time.perf_counter() + MAX_RUN_S
        while not load.ended.done() and time.perf_counter() < deadline_at:
            await wait_or_fail(load, watch_s)
            if watch and not load.ended.done():
                watch()
        await wait_or_fail(load, 0)
        if load.n_answers != n_requests:
            raise BenchError(f"{load.n_answers} of {n_requests} answers after {MAX_RUN_S} s")
    finally:
        load.close()
    return load.n_events


##############################################################################
# 5. Processes
##############################################################################
# Every child is in an ExitStack from the moment it exists, and the mock provider and the bare relay also end when their stdin closes,
# so they end however this process does. (Only kill -9 on this process leaves a gateway behind.)

#: Longest time from start to the first answer; far over any sane figure.
MAX_START_S = 30


def set_nodelay(transport: asyncio.BaseTransport) -> None:
    """Turn Nagle's algorithm off: with delayed acknowledgement it makes a small second write wait 40 ms."""
    transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


async def announce_and_wait(server: asyncio.Server) -> None:
    """Print the port of a child's server, and serve until the parent closes our stdin."""
    print(server.sockets[0].getsockname()[1], flush=True)
    parent_gone = asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), parent_gone.set)
    async with server:
        await parent_gone.wait()


@dataclass(frozen=True, slots=True)
class Cores:
    """Who runs where; empty sets where the system cannot pin."""

    relay: frozenset[int]
    rest: frozenset[int]


def choose_cores() -> Cores:
    """The first core for the relay, all others for the provider and the load."""
    if not hasattr(os, "sched_setaffinity"):
        return Cores(frozenset(), frozenset())
    first, *others = sorted(os.sched_getaffinity(0))
    return Cores(frozenset({first}), frozenset(others or {first}))


def pin(pid: int, cores: frozenset[int]) -> None:
    """Keep a process on `cores`. Called right after its start, while it has one thread; later threads inherit it."""
    if cores:
        os.sched_setaffinity(pid, cores)


def clean_environment(home: Path) -> dict[str, str]:
    """Our environment without credentials, proxies and settings that would change what is measured."""
    kept = {name: value for name, value in os.environ.items()
            if not name.upper().endswith(("_KEY", "_TOKEN", "_PROXY")) and not re.search(r"_KEY_\d+$", name) and not name.startswith("AICAROUSEL")}
    kept.pop("DATABASE_URL", None)
    return kept | {"XDG_CONFIG_HOME": str(home), "XDG_DATA_HOME": str(home)}


def end_process(process: subprocess.Popen[bytes]) -> None:
    """Ask a child to end, then make it."""
    for stop in (process.terminate, process.kill):
        if process.poll() is None:
            stop()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                continue
    for pipe in (process.stdin, process.stdout):
        if pipe:
            pipe.close()


def raise_file_limit(n_files: int = 8192) -> None:
    """Allow this process and its children the sockets of many streams."""
    try:
        import resource
    except ImportError:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = n_files if hard == resource.RLIM_INFINITY else min(n_files, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def cpu_seconds(pid: int | None) -> float | None:
    """CPU time a process has used, all threads; None without /proc. In steps of 10 ms on most systems."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_mb(pid: int | None) -> float | None:
    """Resident memory in MB (2**20 bytes); None without /proc."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    return int(found[1]) / 1024 if found else None


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True, slots=True)
class Bench:
    """What holds for the whole run: the program measured, its home, the provider, the cores."""

    gateway: str         #: path of an aicarousel.py, or `bare`
    home: Path
    provider_port: int
    cores: Cores
    key: str

    def start_role(self, stack: ExitStack, role: str, *args: str, cores: frozenset[int]) -> subprocess.Popen[bytes]:
        """Start this file in another role."""
        return start_process(stack, [sys.executable, str(Path(__file__).resolve()), role, *args], self.home, cores, speaks=True)

    def start_gateway(self, stack: ExitStack, port: int) -> subprocess.Popen[bytes]:
        """Start the gateway as a user would; its log goes to a file in the home folder."""
        if self.gateway == "bare":
            return self.start_role(stack, "relay", str(self.provider_port), str(port), cores=self.cores.relay)
        command = [sys.executable, self.gateway, "serve", "--home", str(self.home), "--port", str(port)]
        return start_process(stack, command, self.home, self.cores.relay, speaks=False)

    def first_request(self, port: int) -> bytes:
        """The request by which a start is judged."""
        return request_bytes(port, self.key, request_body())

    def open_gateway(self, stack: ExitStack) -> Way:
        """Start the gateway and wait for its first answer."""
        port = free_port()
        process = self.start_gateway(stack, port)
        await_answer(process, port, self.first_request(port), self.log_tail)
        return Way("gateway", port, process.pid, self.key)

    def open_bare(self, stack: ExitStack) -> Way:
        """Start the bare relay and wait for its first answer."""
        process = self.start_role(stack, "relay", str(self.provider_port), cores=self.cores.relay)
        port = announced_port(process)
        await_answer(process, port, self.first_request(port), self.log_tail)
        return Way("bare", port, process.pid)

    def log_tail(self) -> str:
        """The last lines the children wrote to stderr."""
        return "\n".join(log_path(self.home).read_text(errors="replace").splitlines()[-20:])


def log_path(home: Path) -> Path:
    """Where the children's stderr goes."""
    return home / "stderr.log"


def start_process(stack: ExitStack, command: Sequence[str], home: Path, cores: frozenset[int], *, speaks: bool) -> subprocess.Popen[bytes]:
    """Start a child and pin it. `speaks`: it is one of ours, with pipes on stdin and stdout."""
    with log_path(home).open("ab") as log:
        pipe = subprocess.PIPE if speaks else subprocess.DEVNULL
        process = subprocess.Popen(command, cwd=home, env=clean_environment(home), stdin=pipe, stdout=pipe, stderr=log)
    stack.callback(end_process, process)
    pin(process.pid, cores)
    return process


def announced_port(process: subprocess.Popen[bytes]) -> int:
    """The port a child of ours prints."""
    assert process.stdout
    line = process.stdout.readline()
    if not line.strip().isdigit():
        raise BenchError(f"{process.args!r} did not print its port")
    return int(line)


def await_answer(process: subprocess.Popen[bytes], port: int, request: bytes, log_tail: Callable[[], str]) -> None:
    """Return at the first whole answer; refused connections are tried again each millisecond."""
    deadline_at = time.perf_counter() + MAX_START_S
    while time.perf_counter() < deadline_at and process.poll() is None:
        try:
            with socket.create_connection((HOST, port), timeout=MAX_START_S) as connection:
                connection.sendall(request)
                read_answer(connection)
                return
        except ConnectionRefusedError:
            time.sleep(0.001)
    raise BenchError(f"{process.args!r} gave no answer (exit status {process.poll()}); last lines of its log:\n{log_tail()}")


def read_answer(connection: socket.socket) -> None:
    """Read one answer and check that it is the completion."""
    head, answer = b"", None
    while answer is None or not answer.ended:
        data = connection.recv(65536)
        if not data:
            raise BenchError(f"the first answer was cut: {head!r}")
        if answer is None:
            head, found, data = (head + data).partition(HEAD_END)
            if not found:
                continue
            answer = CompletionAnswer(head)
        answer.feed(data)
    answer.finish()


def prepare_home(gateway: str, home: Path, provider_port: int) -> str:
    """Write models.json and make a gateway key; the key."""
    if gateway == "bare":
        return "sk-" + "0" * 64
    models = {"bench": {"baseUrl": f"http://{HOST}:{provider_port}/v1", "default": "m", "enableFallback": False, "models": ["m"]}}
    (home / "models.json").write_text(json.dumps(models))
    made = subprocess.run([sys.executable, gateway, "key", "create", "bench", "--home", str(home)], cwd=home, env=clean_environment(home),
                          stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False)
    found = re.search(r"sk-[0-9a-f]{64}", made.stdout)
    if not found:
        raise BenchError(f"`key create` printed no key (exit status {made.returncode}):\n{made.stdout}{made.stderr}")
    return found[0]


##############################################################################
# 6. Measures
##############################################################################
# "flood" and "single" differ in how the provider writes. In a flood it writes some 20 events at a time, so that neither it nor the load limits
# a relay: both relays are busy all the time, and what is compared is what they do to each event's bytes. In "single" each event is a write of its
# own. That flips between two states, since a relay that falls behind finds more in each read and so costs less per event; it is shown, and
# has no target. What one event that arrives alone costs is told by "paced", in CPU time.
# "short" is a stream of a few events in as many small writes, alone on its connection: where Nagle's algorithm would show as 40 ms.
# The shapes of Messages go through the gateway alone: what they are compared with is its own pass-through of the same, in the same round.
# To add a measure: a row in SHAPES, and a row in `speed_rows` (section 7) that says what of its samples is shown.

SHAPES: dict[str, Shape] = {
    "c1":     Shape(1),
    "c16":    Shape(16),
    "c64":    Shape(64, saturates=True),
    "short":  Shape(1, n_tokens=8),
    "flood":  Shape(64, n_tokens=20_000, write_bytes=4096, saturates=True),     # long: what a request costs is told by c64
    "single": Shape(64, n_tokens=1000),
    "paced":  Shape(64, n_tokens=30, interval_ms=20),
    "messages_c64":    Shape(64, saturates=True, messages="c64"),
    "messages_flood":  Shape(64, n_tokens=20_000, write_bytes=4096, saturates=True, messages="flood"),
    "messages_single": Shape(64, n_tokens=1000, messages="single"),
}

IMPORTS = "import asyncio, ssl, json, sqlite3, h11"


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured: the difference between quick and full."""

    n_rounds: int
    n_rounds_paced: int
    warm_s: float
    window_s: float
    window_paced_s: float
    n_requests: int          #: sent before memory is read again
    n_slow: int              #: slow streams at a time
    n_slow_tokens: int       #: tokens of each, one each 250 ms
    n_starts: int
    leaves_out: frozenset[str] = frozenset()     #: shapes not measured
    bare_memory: bool = True                     #: read the bare relay's memory too


FULL = Effort(n_rounds=5, n_rounds_paced=3, warm_s=0.2, window_s=0.9, window_paced_s=3.0, n_requests=20_000, n_slow=1000, n_slow_tokens=20, n_starts=7)
QUICK = Effort(n_rounds=3, n_rounds_paced=1, warm_s=0.1, window_s=0.25, window_paced_s=0.8, n_requests=3000, n_slow=200, n_slow_tokens=6, n_starts=5,
               leaves_out=frozenset({"single", "messages_single"}), bare_memory=False)

#: measure -> way -> one sample per round
Samples = dict[str, dict[str, list[Sample]]]


#: Share of its core below which a relay that should be busy all the time was held up by something else on this machine.
LEAST_SHARE = 0.8


def measure_speed(ways: Sequence[Way], effort: Effort) -> Samples:
    """Measure every shape; once more, with the rounds put together, where a ratio misses its target."""
    samples: Samples = {}
    for name in SHAPES:
        if name not in effort.leaves_out:
            samples[name] = {"direct": [], "bare": [], "gateway": []}
            take_rounds(ways, name, effort, samples[name])
    rows = speed_rows(samples)
    for name in sorted({target.shape for target in TARGETS if target.shape and target.missed(rows)}):
        take_rounds(ways, name, effort, samples[name])
    return samples


def take_rounds(ways: Sequence[Way], name: str, effort: Effort, taken: dict[str, list[Sample]]) -> None:
    """Add rounds of one shape to `taken`, the ways taking turns. A disturbed round is taken again, up to as many times as there are rounds."""
    shape = SHAPES[name]
    asked = [(way.name, way, shape) for way in ways]
    if shape.messages:          # "bare" is what it is compared with: the gateway's own pass-through
        asked = [("bare", ways[-1], SHAPES[shape.messages]), ("gateway", ways[-1], shape)]
    n_rounds, window_s = (effort.n_rounds_paced, effort.window_paced_s) if shape.interval_ms else (effort.n_rounds, effort.window_s)
    n_spare = n_rounds
    n_taken = 0
    while n_taken < n_rounds:
        # Turned round each time, so that neither relay always follows the same neighbour.
        order = asked if (n_taken + n_spare) % 2 == 0 else asked[::-1]
        one = {label: run_checked(way, name, run_window(way, form, effort.warm_s, window_s)) for label, way, form in order}
        if shape.saturates and n_spare and any(sample.is_held_up for sample in one.values()):
            n_spare -= 1
            continue
        n_taken += 1
        for way_name, sample in one.items():
            taken[way_name].append(sample)
    figures = {way: f"{statistics.median(s.events_per_s if shape.n_tokens else s.answers_per_s for s in runs):,.0f}/s"
               for way, runs in taken.items() if runs}
    say(name, figures | ({"disturbed rounds:": str(n_rounds - n_spare)} if n_spare < n_rounds else {}))


def run_checked(way: Way, what: str, run: Any) -> Any:
    """Run a coroutine of the load generator; an error says where it happened."""
    try:
        return asyncio.run(run)
    except (BenchError, OSError) as error:
        raise BenchError(f"{what}, {way.name}: {error}") from error


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident memory of one relay, in MB; None where it cannot be read."""

    idle_mb: float | None
    after_mb: float | None       #: after `n_requests`
    slow_mb: float | None        #: the most seen in the middle half of the slow streams
    n_events: int                #: events of the slow streams, all checked


def measure_memory(open_way: Callable[[ExitStack], Way], effort: Effort) -> Memory:
    """Start a relay afresh and read its memory: after one answer, after many, with slow streams."""
    slow = Shape(effort.n_slow, n_tokens=effort.n_slow_tokens, interval_ms=250)
    with ExitStack() as stack:
        way = open_way(stack)
        time.sleep(0.5)      # what starts late belongs to idle
        idle_mb = resident_mb(way.pid)
        run_checked(way, f"{effort.n_requests} requests", run_batch(way, Shape(64), effort.n_requests))
        time.sleep(0.5)
        after_mb = resident_mb(way.pid)
        seen: list[tuple[float, float]] = []
        began_at = time.perf_counter()

        def watch() -> None:
            if (now_mb := resident_mb(way.pid)) is not None:
                seen.append((time.perf_counter() - began_at, now_mb))

        n_events = run_checked(way, f"{effort.n_slow} slow streams", run_batch(way, slow, effort.n_slow, watch))
    span_s = seen[-1][0] if seen else 0
    slow_mb = max((mb for at_s, mb in seen if span_s / 4 <= at_s <= span_s * 3 / 4), default=None)
    result = Memory(idle_mb, after_mb, slow_mb, n_events)
    say(f"memory, {way.name}", {"idle": f"{show(idle_mb, 1)} MB", "after requests": f"{show(after_mb, 1)} MB", "slow streams": f"{show(slow_mb, 1)} MB"})
    return result


@dataclass(frozen=True, slots=True)
class Starts:
    """Times of several starts, taken in turn."""

    gateway_s: Sequence[float]       #: from exec to the first answered request
    imports_s: Sequence[float]       #: a whole run of the interpreter that only imports what a relay needs
    compiled_s: Sequence[float]      #: the same, after compiling a script as long as the gateway's: no script of its size can be quicker


def measure_start(bench: Bench, n_starts: int) -> Starts:
    """Start the gateway, the bare imports, and these behind the compiler, in turn, on the same core."""
    gateway_s, imports_s, compiled_s = [], [], []
    source = __file__ if bench.gateway == "bare" else bench.gateway
    compiling = f"compile(open({source!r}, encoding='utf-8').read(), 'gateway', 'exec', dont_inherit=True)\n{IMPORTS}"
    for _ in range(n_starts):
        imports_s.append(time_script(bench, IMPORTS))
        compiled_s.append(time_script(bench, compiling))
        gateway_s.append(time_gateway(bench))
    say("start", {"imports": f"{statistics.median(imports_s):.3f} s", "compiled": f"{statistics.median(compiled_s):.3f} s", "gateway": f"{statistics.median(gateway_s):.3f} s"})
    return Starts(gateway_s, imports_s, compiled_s)


def time_script(bench: Bench, script: str) -> float:
    """Seconds from exec to exit of a script."""
    with ExitStack() as stack:
        began_at = time.perf_counter()
        process = start_process(stack, [sys.executable, "-c", script], bench.home, bench.cores.relay, speaks=False)
        if process.wait():          # with a timeout it would poll in steps of up to 50 ms
            raise BenchError("the bare imports failed")
        return time.perf_counter() - began_at


def time_gateway(bench: Bench) -> float:
    """Seconds from exec to the first answered request."""
    port = free_port()
    request = bench.first_request(port)
    with ExitStack() as stack:
        began_at = time.perf_counter()
        process = bench.start_gateway(stack, port)
        await_answer(process, port, request, bench.log_tail)
        return time.perf_counter() - began_at


##############################################################################
# 7. Report
##############################################################################
# A row of the table is also an entry of the JSON. A target names a row and which of its figures counts.


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table; None is shown as a dash."""

    title: str
    digits: int
    direct: float | None = None
    bare: float | None = None
    gateway: float | None = None
    ratio: float | None = None       #: gateway by bare (for the start: gateway by the imports behind the compiler)


@dataclass(frozen=True, slots=True)
class Target:
    """What a figure must be."""

    row: str
    figure: str          #: `ratio` or `gateway`
    shape: str = ""      #: the shape measured again before the target counts as missed
    least: float | None = None
    most: float | None = None

    def __str__(self) -> str:
        return f">= {self.least:g}" if self.least is not None else f"<= {self.most:g}"

    def missed(self, rows: dict[str, Row]) -> bool:
        """Whether the figure is known and not good enough."""
        value: float | None = getattr(rows[self.row], self.figure)
        if value is None:
            return False
        return (self.least is not None and value < self.least) or (self.most is not None and value > self.most)


TARGETS = (
    Target("requests_c1", "ratio", "c1", least=0.6),
    Target("requests_c64", "ratio", "c64", least=0.65),
    Target("events_flood", "ratio", "flood", least=0.7),
    Target("events_paced", "ratio", "paced", least=0.7),
    Target("messages_c64", "ratio", "messages_c64", least=0.6),
    Target("messages_flood", "ratio", "messages_flood", least=0.35),
    Target("memory_idle", "gateway", most=45),
    Target("memory_growth", "gateway", most=5),
    Target("memory_slow", "gateway", most=70),
    Target("start", "ratio", most=1.7),
)

Figure = Callable[[Sequence[Sample]], list[float] | None]


def per_sample(figure: Callable[[Sample], float]) -> Figure:
    """One figure of each sample."""
    return lambda samples: [figure(sample) for sample in samples]


def per_cpu(figure: Callable[[float, int, int], float]) -> Figure:
    """A figure of CPU time over all samples together, since a clock of 10 ms is coarse for one."""
    def of_all(samples: Sequence[Sample]) -> list[float] | None:
        cpu_s = sum(sample.cpu_s or 0 for sample in samples)
        return [figure(cpu_s, sum(s.n_answers for s in samples), sum(s.n_events for s in samples))] if cpu_s else None
    return of_all


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the values lie."""
    if not values:
        raise BenchError("a run was too short for a single answer")
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def row_of(title: str, digits: int, samples: dict[str, list[Sample]] | None, figure: Figure) -> Row:
    """A row of medians; its ratio is the median of the ratios within each round. No samples: an empty row."""
    if samples is None:
        return Row(title, digits)
    of_way = {way: figure(runs) for way, runs in samples.items()}
    medians = {way: statistics.median(values) if values else None for way, values in of_way.items()}
    gateway, bare = of_way["gateway"], of_way["bare"]
    ratio = statistics.median(ours / theirs for ours, theirs in zip(gateway, bare, strict=True)) if gateway and bare else None
    return Row(title, digits, medians["direct"], medians["bare"], medians["gateway"], ratio)


def added_row(title: str, latency: Row) -> Row:
    """What each relay adds to the latency of going direct."""
    assert latency.direct is not None and latency.bare is not None and latency.gateway is not None
    bare, gateway = latency.bare - latency.direct, latency.gateway - latency.direct
    return Row(title, latency.digits, None, bare, gateway, gateway / bare if bare > 0 else None)


def speed_rows(samples: Samples) -> dict[str, Row]:
    """The rows of throughput, latency and streams."""
    answers, events = per_sample(lambda s: s.answers_per_s), per_sample(lambda s: s.events_per_s)
    rows = {
        "requests_c1":   row_of("requests/s, 1 connection", 0, samples["c1"], answers),
        "requests_c16":  row_of("requests/s, 16 connections", 0, samples["c16"], answers),
        "requests_c64":  row_of("requests/s, 64 connections", 0, samples["c64"], answers),
        "requests_cpu":  row_of("requests per CPU second, 64 connections", 0, samples["c64"], per_cpu(lambda cpu_s, n_answers, _: n_answers / cpu_s)),
        "latency_p50":   row_of("latency p50 ms, 1 connection", 3, samples["c1"], per_sample(lambda s: percentile(s.latencies_ms, 0.50))),
        "latency_p99":   row_of("latency p99 ms, 1 connection", 3, samples["c1"], per_sample(lambda s: percentile(s.latencies_ms, 0.99))),
        "first_p50":     row_of("first event p50 ms, 1 connection", 3, samples["short"], per_sample(lambda s: percentile(s.first_ms, 0.50))),
        "first_p99":     row_of("first event p99 ms, 1 connection", 3, samples["short"], per_sample(lambda s: percentile(s.first_ms, 0.99))),
        "short_p50":     row_of("whole short stream p50 ms, 1 connection", 3, samples["short"], per_sample(lambda s: percentile(s.latencies_ms, 0.50))),
        "short_p99":     row_of("whole short stream p99 ms, 1 connection", 3, samples["short"], per_sample(lambda s: percentile(s.latencies_ms, 0.99))),
        "events_flood":  row_of("streamed events/s, 64 streams, flood", 0, samples["flood"], events),
        "flood_cpu":     row_of("streamed events per CPU second, flood", 0, samples["flood"], per_cpu(lambda cpu_s, _, n_events: n_events / cpu_s)),
        "events_single": row_of("streamed events/s, 64 streams, single writes", 0, samples.get("single"), events),
        "messages_c64":    row_of("Messages on Chat by passing, requests/s", 0, samples["messages_c64"], answers),
        "messages_flood":  row_of("Messages on Chat by passing, events/s, flood", 0, samples["messages_flood"], events),
        "messages_cpu":    row_of("Messages on Chat by passing, events per CPU second", 0, samples["messages_flood"], per_cpu(lambda cpu_s, _, n_events: n_events / cpu_s)),
        "messages_single": row_of("Messages on Chat by passing, events/s, single", 0, samples.get("messages_single"), events),
        "events_paced":  row_of("streamed events/s, 64 streams, each 20 ms", 0, samples["paced"], events),
        "event_cpu":     row_of("CPU us per event, each 20 ms", 1, samples["paced"], per_cpu(lambda cpu_s, _, n_events: cpu_s * 1e6 / n_events)),
    }
    for measure, what in (("latency", "latency"), ("first", "first event")):
        for share in ("p50", "p99"):
            rows[f"{measure}_added_{share}"] = added_row(f"added {what} {share} ms", rows[f"{measure}_{share}"])
    return rows


def memory_rows(gateway: Memory, bare: Memory | None, effort: Effort) -> dict[str, Row]:
    """The rows of resident memory."""
    def row(title: str, figure: Callable[[Memory], float | None]) -> Row:
        return Row(title, 1, None, figure(bare) if bare else None, figure(gateway))

    return {
        "memory_idle":   row("resident MB, idle after one answer", lambda m: m.idle_mb),
        "memory_growth": row(f"resident MB more after {effort.n_requests:,} requests",
                             lambda m: None if m.idle_mb is None or m.after_mb is None else m.after_mb - m.idle_mb),
        "memory_slow":   row(f"resident MB with {effort.n_slow:,} slow streams", lambda m: m.slow_mb),
        "slow_events":   replace(row("events of these streams, all delivered", lambda m: m.n_events), digits=0),
    }


def start_rows(starts: Starts) -> dict[str, Row]:
    """The rows of the start; the ratio is to the bare imports behind the compiler, which a script is read by at every start."""
    gateway_s, compiled_s = statistics.median(starts.gateway_s), statistics.median(starts.compiled_s)
    return {
        "start_imports": Row("seconds to run the bare imports", 3, bare=statistics.median(starts.imports_s)),
        "start_best":    Row("seconds from exec to first answer, best", 3, bare=min(starts.compiled_s), gateway=min(starts.gateway_s), ratio=min(starts.gateway_s) / min(starts.compiled_s)),
        "start":         Row("seconds from exec to first answer, median", 3, bare=compiled_s, gateway=gateway_s, ratio=gateway_s / compiled_s),
    }


def planning_rows(gateway: str) -> dict[str, Row]:
    """The rows of planning: microseconds for one plan over routes that all have limits; of the repository's module where the gateway is `bare`."""
    path = Path(__file__).resolve().parent.parent / "aicarousel.py" if gateway == "bare" else Path(gateway)
    spec = importlib.util.spec_from_file_location("measured_aicarousel", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules["measured_aicarousel"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {f"plan_{n}": Row(f"microseconds to plan, {n} routes with limits", 1, gateway=time_plan(module, n_providers, n_models))
            for n, n_providers, n_models in ((4, 4, 1), (200, 20, 10))}


def time_plan(module: Any, n_providers: int, n_models: int) -> float:
    """Microseconds of one plan, the best of several runs."""
    names = [f"m{number}" for number in range(n_models)]
    entry = {"baseUrl": "http://127.0.0.1:9/v1", "preset": "groq", "default": names[0], "enableFallback": True, "models": names, "keys": ["env:KEY"],
             "limits": {"rpm": 300, "rpd": 10_000, "tpm": 1_000_000, "tpd": 100_000_000}}
    config = module.load_config(json.dumps({f"p{number}": entry for number in range(n_providers)}), models_path="models.json",
                                environment={"KEY": "fake-key-for-planning"}, dotenv={}, flags={})
    catalogue, state = module.build_catalogue(config), module.RoutingState()
    module.prepare_ledger(state.ledger, config.active, utc_less_now=0.0)
    choice, facts = module.resolve(catalogue, None), module.Facts(500, 300)
    assert len(module.plan(catalogue, choice, state, 1.0, strategy="round-robin", fallback="chain", facts=facts).routes) == n_providers * n_models
    runs = []
    for _ in range(20):
        began = time.perf_counter()
        for _ in range(50):
            module.plan(catalogue, choice, state, 1.0, strategy="round-robin", fallback="chain", facts=facts)
        runs.append((time.perf_counter() - began) / 50)
    return min(runs) * 1e6


#: Order of the table.
TABLE = ("requests_c1", "requests_c16", "requests_c64", "requests_cpu", "latency_p50", "latency_p99", "latency_added_p50", "latency_added_p99",
         "first_p50", "first_p99", "first_added_p50", "first_added_p99", "short_p50", "short_p99",
         "messages_c64", "messages_flood", "messages_cpu", "messages_single", "events_flood", "flood_cpu", "events_single", "events_paced", "event_cpu",
         "memory_idle", "memory_growth", "memory_slow", "slow_events", "start_imports", "start_best", "start", "plan_4", "plan_200")


def show(value: float | None, digits: int) -> str:
    """A figure for people."""
    return "-" if value is None else f"{value:,.{digits}f}"


def print_table(rows: dict[str, Row]) -> None:
    """The table, with targets beside the rows that have one."""
    by_row = {target.row: target for target in TARGETS}
    print(f"{'':<46}{'direct':>10}{'bare':>10}{'gateway':>10}{'ratio':>8}  target")
    for name in TABLE:
        row = rows[name]
        verdict = ""
        if target := by_row.get(name):
            verdict = f"{target.figure} {target} {'MISSED' if target.missed(rows) else 'ok'}"
        figures = "".join(f"{show(value, row.digits):>10}" for value in (row.direct, row.bare, row.gateway))
        print(f"{row.title:<46}{figures}{show(row.ratio, 2):>8}  {verdict}".rstrip())


def describe_machine(cores: Cores) -> Json:
    """What the figures were taken on."""
    return {"python": platform.python_version(), "h11": h11.__version__, "system": platform.system(), "machine": platform.machine(),
            "relay_cores": sorted(cores.relay), "other_cores": sorted(cores.rest)}


def say(what: str, figures: dict[str, str]) -> None:
    """One line of progress."""
    print(f"  {what:<16}" + "   ".join(f"{name} {value}" for name, value in figures.items()), file=sys.stderr, flush=True)


##############################################################################
# 8. Command line
##############################################################################

ROLES: dict[str, Callable[..., Any]] = {"provider": serve_provider, "relay": serve_relay}


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(prog="bench.py", description="Measures the gateway against a bare relay and against going direct, in one run.")
    parser.add_argument("--quick", action="store_true", help="about 25 seconds: fewer rounds, requests and streams")
    parser.add_argument("--check", action="store_true", help="exit status 1 when a target is missed")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures to FILE")
    parser.add_argument("--gateway", metavar="PATH", default=str(Path(__file__).resolve().parent.parent / "aicarousel.py"),
                        help="the program to measure (default: aicarousel.py of this folder's parent), or `bare`")
    return parser.parse_args(argv)


def measure_all(gateway: str, effort: Effort) -> tuple[dict[str, Row], Cores]:
    """Start everything, measure everything, end everything."""
    cores = choose_cores()
    raise_file_limit()
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        pin(0, cores.rest)
        provider = start_process(stack, [sys.executable, str(Path(__file__).resolve()), "provider"], home, cores.rest, speaks=True)
        provider_port = announced_port(provider)
        bench = Bench(gateway, home, provider_port, cores, prepare_home(gateway, home, provider_port))
        starts = measure_start(bench, effort.n_starts)
        memory = measure_memory(bench.open_gateway, effort)
        bare_memory = measure_memory(bench.open_bare, effort) if effort.bare_memory else None
        with ExitStack() as relays:
            ways = (Way("direct", provider_port, None), bench.open_bare(relays), bench.open_gateway(relays))
            samples = measure_speed(ways, effort)
    return speed_rows(samples) | memory_rows(memory, bare_memory, effort) | start_rows(starts) | planning_rows(gateway), cores


def exit_on_signal(number: int, _: FrameType | None) -> None:
    """Leave by an exception, so that the children are ended."""
    raise SystemExit(128 + number)


def main(argv: Sequence[str] | None = None) -> int:
    """0 fine, 1 a target was missed (with --check), 2 something answered wrongly or did not start."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in ROLES:
        asyncio.run(ROLES[argv[0]](*argv[1:]))
        return 0
    options = parse_arguments(argv)
    gateway = options.gateway if options.gateway == "bare" else str(Path(options.gateway).resolve())
    signal.signal(signal.SIGTERM, exit_on_signal)
    try:
        if gateway != "bare" and not Path(gateway).is_file():
            raise BenchError(f"no such program: {options.gateway}")
        rows, cores = measure_all(gateway, QUICK if options.quick else FULL)
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    print_table(rows)
    missed = [target for target in TARGETS if target.missed(rows)]
    if options.json:
        report = {"machine": describe_machine(cores), "quick": options.quick, "rows": {name: asdict(rows[name]) for name in TABLE},
                  "targets": [asdict(target) | {"missed": target in missed} for target in TARGETS]}
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    for target in missed:
        print(f"missed: {rows[target.row].title}: {target.figure} {getattr(rows[target.row], target.figure):.2f}, wanted {target}")
    return 1 if options.check and missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
