"""Fakes for tests, standard library only: a scripted provider, the gateway as a process, a raw client, a clock moved by hand.

    provider.script("slow", [Pause("go"), *answer(chat_answer("hi"))])     # played when POST <provider.url("slow")>/chat/completions comes in
    gateway = Gateway({"slow": {"baseUrl": provider.url("slow"), ...}})     # python aicarousel.py serve, in a home of its own
    reply = gateway.chat("slow/m", stream=True)                             # Reply: status, headers, text, events, complete ...
    provider.release("go"); provider.calls("slow"); provider.wait_closed(connection, 1.0)

A script is a list of steps (nested lists are flattened), or a function of the parsed request that returns one.
One more step: a frozen dataclass with `async def play(self, link)`.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import os
import re
import shutil
import signal
import site
import socket
import sqlite3
import ssl
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

Json = dict[str, Any]
ROOT = Path(__file__).resolve().parent.parent
TLS = Path(__file__).resolve().parent / "data" / "tls"      #: test certificates: ca.pem signs good, wrong_name and expired; untrusted signs itself
FAKE_KEY = "sk-fake-provider-0123456789abcdef"              #: shown to scripted providers; must never be seen anywhere else
HANG_S = 15.0                                               #: a wait that lasts this long has failed
TEXT = "Hello from the provider: caf\u00e9, \u65e5\u672c, ok."


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rows_of(path: Path, sql: str) -> list[tuple[Any, ...]]:
    """What a database answers."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return connection.execute(sql).fetchall()


def mode_of(path: Path) -> int:
    """The permissions of a file."""
    return stat.S_IMODE(path.stat().st_mode)


def load_kit(name: str) -> ModuleType:
    """A program of ../shared/conformance."""
    folder = str(ROOT.parent / "shared" / "conformance")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(name)


# ---------------------------------------------------------------- answers in OpenAI's shape

USAGE = {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18}


def chat_answer(text: str | None = TEXT, *, tool_calls: list[Json] | None = None, usage: Json | None = USAGE, finish: str | None = None, model: str = "m") -> Json:
    """A whole chat completion."""
    message: Json = {"role": "assistant", "content": text, **({"tool_calls": tool_calls} if tool_calls else {})}
    choice = {"index": 0, "message": message, "finish_reason": finish or ("tool_calls" if tool_calls else "stop")}
    return {"id": "chatcmpl-1", "object": "chat.completion", "created": 1790000000, "model": model, "choices": [choice], **({"usage": usage} if usage else {})}


def chat_chunk(delta: Json, finish: str | None = None, **more: Any) -> Json:
    """One chunk of a streamed chat completion."""
    return {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1790000000, "model": "m",
            "choices": [{"index": 0, "delta": delta, "finish_reason": finish}], **more}


def frame(data: Json | str, name: str = "") -> bytes:
    """One SSE frame."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    return (f"event: {name}\n" if name else "").encode() + b"data: " + text.encode() + b"\n\n"


ROLE = frame(chat_chunk({"role": "assistant", "content": ""}))
FINISH = frame(chat_chunk({}, "stop", usage=USAGE))
DONE = frame("[DONE]")


def content(text: str) -> bytes:
    """The frame that carries `text`."""
    return frame(chat_chunk({"content": text}))


def pieces(text: str) -> list[str]:
    """`text` in three parts, as a stream would bring it."""
    third = max(1, len(text) // 3)
    return [part for part in (text[:third], text[third:2 * third], text[2 * third:]) if part]


def chat_stream(*texts: str, tool_calls: list[Json] | None = None, usage: Json | None = USAGE, done: bool = True) -> list[bytes]:
    """Frames of a healthy stream: role, one per text, tool calls (each whole, in one delta), finish with usage, [DONE]."""
    calls = [frame(chat_chunk({"tool_calls": [{"index": index, **call}]})) for index, call in enumerate(tool_calls or [])]
    finish = frame(chat_chunk({}, "tool_calls" if calls else "stop", **({"usage": usage} if usage else {})))
    return [ROLE, *map(content, texts or pieces(TEXT)), *calls, finish, *([DONE] if done else [])]


# ---------------------------------------------------------------- steps of a script

class Step(Protocol):
    """One thing a scripted provider does on a connection."""

    async def play(self, link: Link) -> None: ...


Script = Sequence[Any] | Callable[["Request"], Sequence[Any]]
SSE_HEADERS = (("content-type", "text/event-stream"), ("transfer-encoding", "chunked"))
JSON_HEADERS = (("content-type", "application/json"),)
REASONS = {200: "OK", 400: "Bad Request", 429: "Too Many Requests", 500: "Internal Server Error"}


class PeerGone(Exception):
    """The peer left while a script was being played."""


@dataclass(frozen=True)
class Send:
    """Writes bytes as they are."""
    data: bytes

    async def play(self, link: Link) -> None:
        await link.write(self.data)


@dataclass(frozen=True)
class Head:
    """Writes a response head."""
    status: int = 200
    headers: Iterable[tuple[str, str]] = ()

    async def play(self, link: Link) -> None:
        await link.write(head_bytes(self.status, self.headers))


@dataclass(frozen=True)
class Chunk:
    """Writes one chunk of a chunked body."""
    data: bytes

    async def play(self, link: Link) -> None:
        await link.write(b"%x\r\n%s\r\n" % (len(self.data), self.data))


class Event(Chunk):
    """Writes one SSE frame as a chunk."""

    def __init__(self, data: Json | str, name: str = "") -> None:
        super().__init__(frame(data, name))


@dataclass(frozen=True)
class End:
    """Ends a chunked body."""

    async def play(self, link: Link) -> None:
        await link.write(b"0\r\n\r\n")


@dataclass(frozen=True)
class EachByte:
    """Writes each byte by itself; chunked: each byte is a chunk."""
    data: bytes
    chunked: bool = False
    every_s: float = 0.0

    async def play(self, link: Link) -> None:
        for byte in self.data:
            await link.write(b"1\r\n%c\r\n" % byte if self.chunked else b"%c" % byte)
            await link.sleep(self.every_s)


@dataclass(frozen=True)
class Pause:
    """Waits until the test calls provider.release(name), or until the peer goes away."""
    name: str

    async def play(self, link: Link) -> None:
        await link.until(link.provider.gate(self.name))


@dataclass(frozen=True)
class Sleep:
    """Waits a while: for providers that are slow, where the slowness itself is the case."""
    seconds: float

    async def play(self, link: Link) -> None:
        await link.sleep(self.seconds)


@dataclass(frozen=True)
class Silence:
    """Says nothing more until the peer leaves."""

    async def play(self, link: Link) -> None:
        await link.until(asyncio.Event())


@dataclass(frozen=True)
class Repeat:
    """Plays steps again and again, until the peer leaves or `times` is reached."""
    steps: Sequence[Any]
    times: int = 1 << 60

    async def play(self, link: Link) -> None:
        for _ in range(self.times):
            for step in flatten(self.steps):
                await step.play(link)
            await asyncio.sleep(0)


@dataclass(frozen=True)
class Close:
    """Closes the connection in the ordinary way."""

    async def play(self, link: Link) -> None:
        link.close()


@dataclass(frozen=True)
class Reset:
    """Closes the connection by RST."""

    async def play(self, link: Link) -> None:
        link.reset()


def flatten(steps: Iterable[Any]) -> list[Any]:
    """Steps of nested lists, in order; bytes count as Send."""
    flat: list[Any] = []
    for step in steps:
        if isinstance(step, (list, tuple)):
            flat += flatten(step)
        else:
            flat.append(Send(step) if isinstance(step, bytes) else step)
    return flat


def head_bytes(status: int, headers: Iterable[tuple[str, str]] = (), version: str = "1.1") -> bytes:
    """A response head as it goes over the wire."""
    lines = [f"HTTP/{version} {status} {REASONS.get(status, 'Whatever')}", *(f"{name}: {value}" for name, value in headers)]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"


def answer(body: Any, status: int = 200, headers: Iterable[tuple[str, str]] = ()) -> list[Any]:
    """Steps of an ordinary answer with its length: `body` is JSON, or bytes as they are (then name the content type in `headers`)."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    kind = () if isinstance(body, bytes) else JSON_HEADERS
    return [Send(head_bytes(status, (*kind, ("content-length", str(len(raw))), *headers)) + raw)]


def stream(*parts: Any, headers: Iterable[tuple[str, str]] = ()) -> list[Any]:
    """Steps of a streamed answer that ends properly: frames (bytes) go out as chunks, steps are played."""
    return [*opened(*parts, headers=headers), End()]


def opened(*parts: Any, headers: Iterable[tuple[str, str]] = ()) -> list[Any]:
    """As `stream`, but the chunked body is left open."""
    return [Head(200, (*SSE_HEADERS, *headers)), *(Chunk(part) if isinstance(part, bytes) else part for part in flatten_frames(parts))]


def flatten_frames(parts: Iterable[Any]) -> list[Any]:
    """Parts of nested lists, in order."""
    return [one for part in parts for one in (flatten_frames(part) if isinstance(part, (list, tuple)) else [part])]


def healthy(text: str = TEXT) -> Script:
    """A script that answers `text`, streamed or not, as it was asked."""
    return lambda request: stream(chat_stream(*pieces(text))) if request.streamed else answer(chat_answer(text))


def in_turn(*scripts: Script) -> Script:
    """A script that plays another one for each request; the last one stays."""
    left = list(scripts)

    def play(request: Request) -> Sequence[Any]:
        script = left.pop(0) if len(left) > 1 else left[0]
        return script(request) if callable(script) else script
    return play


# ---------------------------------------------------------------- the scripted provider

@dataclass(frozen=True)
class Request:
    """What a provider was asked."""
    name: str                       #: the script's name
    method: str
    path: str
    headers: dict[str, str]         #: lower-case names; of repeated ones the last
    header_list: list[tuple[str, str]]
    body: bytes
    at: float                       #: time.monotonic()
    connection: Connection
    turn: int                       #: 1 for the first request on its connection

    @property
    def json(self) -> Any:
        """The body, parsed; {} when there is none."""
        return json.loads(self.body) if self.body else {}

    @property
    def streamed(self) -> bool:
        """Whether a streamed answer was asked for."""
        return bool(self.json.get("stream"))


@dataclass
class Connection:
    """One connection to a provider, open or past."""
    id: int
    opened_at: float
    name: str = ""                  #: the script last played on it
    n_requests: int = 0
    n_sent: int = 0                 #: bytes handed to the kernel or its queue
    closed_at: float | None = None
    closed_by: str = ""             #: peer, script


class Link(asyncio.Protocol):
    """A connection's server side: reads requests, plays their scripts."""

    def __init__(self, provider: Provider, name: str, at_once: bool) -> None:
        self.provider, self.name, self.at_once = provider, name, at_once
        self.buffer = bytearray()
        self.gone, self.arrived, self.writable = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.writable.set()

    # asyncio calls these
    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.connection = self.provider.note_opened(self)
        self.task = asyncio.ensure_future(self.serve())

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        self.arrived.set()

    def eof_received(self) -> None:
        self._note_gone("peer")

    def connection_lost(self, exc: Exception | None) -> None:
        self._note_gone("peer")

    def pause_writing(self) -> None:
        self.writable.clear()

    def resume_writing(self) -> None:
        self.writable.set()

    # scripts call these
    async def until(self, event: asyncio.Event) -> None:
        """Waits for `event`; raises PeerGone when the connection ends first."""
        waits = [asyncio.ensure_future(event.wait()), asyncio.ensure_future(self.gone.wait())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        if self.gone.is_set():
            raise PeerGone

    async def sleep(self, seconds: float) -> None:
        """Waits `seconds`; raises PeerGone when the connection ends first."""
        if not seconds:
            await asyncio.sleep(0)
        else:
            try:
                await asyncio.wait_for(self.gone.wait(), seconds)
            except asyncio.TimeoutError:
                pass
        if self.gone.is_set():
            raise PeerGone

    async def write(self, data: bytes) -> None:
        """Writes when the peer takes data; raises PeerGone when there is no peer."""
        if not self.writable.is_set():
            await self.until(self.writable)
        if self.gone.is_set():
            raise PeerGone
        self.transport.write(data)
        self.connection.n_sent += len(data)

    def close(self) -> None:
        self._note_gone("script")
        self.transport.close()

    def reset(self) -> None:
        self._note_gone("script")
        self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    def _note_gone(self, by: str) -> None:
        if not self.gone.is_set():
            self.gone.set()
            self.provider.note_closed(self.connection, by)

    async def serve(self) -> None:
        """Plays the script of one request after the other until either side leaves."""
        try:
            if self.at_once:
                await self._play(self.provider.steps(self.name, None))
            while not self.gone.is_set():
                request = await self._read_request()
                self.provider.note_request(request)
                await self._play(self.provider.steps(request.name, request))
        except PeerGone:
            self.transport.close()
        except Exception as error:      # a mistake in a script: told to the test by Provider.close
            self.provider.mistakes.append(f"{self.connection.name or self.name}: {error!r}")
            self.transport.abort()

    async def _play(self, steps: Sequence[Any]) -> None:
        for step in flatten(steps):
            await step.play(self)

    async def _take(self, ready: Callable[[], int]) -> bytes:
        """Removes as many bytes from the buffer as `ready` says (0: not yet)."""
        while not (size := ready()):
            self.arrived.clear()
            await self.until(self.arrived)
        taken = bytes(self.buffer[:size])
        del self.buffer[:size]
        return taken

    async def _read_request(self) -> Request:
        head = await self._take(lambda: self.buffer.find(b"\r\n\r\n") + 4 if b"\r\n\r\n" in self.buffer else 0)
        line, *rows = head.decode("latin-1")[:-4].split("\r\n")
        method, path, _ = line.split(" ", 2)
        header_list = [(name.lower(), value.strip()) for name, _, value in (row.partition(":") for row in rows)]
        headers = dict(header_list)
        length = int(headers.get("content-length", 0))
        if "chunked" in headers.get("transfer-encoding", ""):
            body = unchunk(await self._take(lambda: unchunk(bytes(self.buffer)).used)).data
        else:
            body = await self._take(lambda: length if len(self.buffer) >= length else 0) if length else b""
        self.connection.n_requests += 1
        self.connection.name = name = self.provider.name_of(path, self.name)
        return Request(name, method, path, headers, header_list, body, time.monotonic(), self.connection, self.connection.n_requests)


class Provider:
    """Scripted providers behind real sockets on loopback, in a thread with a loop of its own.

    The first segment of a request's path names the script, so url("a") and url("b") are two providers on one port.
    listen(name) gives a script a port of its own: for faults before a request is read, for TLS, and to keep pools apart.
    """

    def __init__(self) -> None:
        self.scripts: dict[str, Script] = {}
        self.requests: list[Request] = []
        self.connections: list[Connection] = []
        self.mistakes: list[str] = []           #: scripts that failed; close() raises on them
        self.paused: list[str] = []             #: names of pauses that were reached
        self._changed = threading.Condition()
        self._gates: dict[str, asyncio.Event] = {}
        self._links: set[Link] = set()
        self._servers: list[asyncio.Server] = []
        self._sockets: list[socket.socket] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.base = self._open("", None, False)

    # set-up, from the test's thread
    def script(self, name: str, steps: Script) -> str:
        """Sets what `name` plays; returns its base URL."""
        self.scripts[name] = steps
        return self.url(name)

    def url(self, name: str) -> str:
        """Base URL of `name` on the shared port."""
        return f"{self.base}/{name}/v1"

    def listen(self, name: str, steps: Script | None = None, *, tls: Path | None = None, at_once: bool = False) -> str:
        """Base URL of `name` on a port of its own; tls: a PEM file; at_once: play on connect, without reading a request."""
        if steps is not None:
            self.scripts[name] = steps
        return f"{self._open(name, tls, at_once)}/{name}/v1"

    def refusing(self, name: str = "refused") -> str:
        """Base URL of a port where nobody listens; it stays reserved."""
        holder = self._hold(socket.socket())
        holder.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{holder.getsockname()[1]}/{name}/v1"

    def unaccepting(self, name: str = "full") -> str:
        """Base URL of a port whose queue is full: a SYN gets no answer (on Linux)."""
        holder = self._hold(socket.socket())
        holder.bind(("127.0.0.1", 0))
        holder.listen(0)
        for _ in range(4):
            filler = self._hold(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(holder.getsockname())
        return f"http://127.0.0.1:{holder.getsockname()[1]}/{name}/v1"

    # what happened
    def calls(self, name: str) -> list[Request]:
        """The requests that named `name`, in order."""
        with self._changed:
            return [request for request in self.requests if request.name == name]

    def links(self, name: str) -> list[Connection]:
        """The connections whose last request named `name`."""
        with self._changed:
            return [connection for connection in self.connections if connection.name == name]

    def wait_until(self, true: Callable[[], Any], timeout: float = HANG_S) -> bool:
        """Waits for `true()` to hold, looking after every request, pause and close."""
        with self._changed:
            return bool(self._changed.wait_for(true, timeout))

    def wait_calls(self, name: str, count: int = 1, timeout: float = HANG_S) -> list[Request]:
        """Waits for `count` requests that name `name`."""
        assert self.wait_until(lambda: len(self.calls(name)) >= count, timeout), f"{name}: {len(self.calls(name))} of {count} requests came"
        return self.calls(name)

    def wait_paused(self, name: str, times: int = 1, timeout: float = HANG_S) -> None:
        """Waits for scripts to have reached Pause(name) that often."""
        assert self.wait_until(lambda: self.paused.count(name) >= times, timeout), f"the pause {name} was reached {self.paused.count(name)} times, not {times}"

    def wait_closed(self, connection: Connection, timeout: float) -> bool:
        """Whether `connection` is closed within `timeout` seconds."""
        return self.wait_until(lambda: connection.closed_at is not None, timeout)

    def release(self, name: str) -> None:
        """Lets Pause(name) pass, now and from now on."""
        self._loop.call_soon_threadsafe(lambda: self._gates.setdefault(name, asyncio.Event()).set())

    def close(self) -> None:
        """Ends all connections, ports and the thread; raises when a script was wrong."""
        asyncio.run_coroutine_threadsafe(self._shut(), self._loop).result(HANG_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(HANG_S)
        self._loop.close()
        for holder in self._sockets:
            holder.close()
        assert not self.mistakes, self.mistakes

    # called by links, in the loop's thread
    def gate(self, name: str) -> asyncio.Event:
        with self._changed:
            self.paused.append(name)
            self._changed.notify_all()
        return self._gates.setdefault(name, asyncio.Event())

    def name_of(self, path: str, default: str) -> str:
        first = path.split("?")[0].strip("/").split("/")[0]
        return first if first in self.scripts or not default else default

    def steps(self, name: str, request: Request | None) -> Sequence[Any]:
        script = self.scripts.get(name, answer({"error": {"message": f"no script named {name}"}}, 404))
        return script(request) if callable(script) else script

    def note_request(self, request: Request) -> None:
        with self._changed:
            self.requests.append(request)
            self._changed.notify_all()

    def note_opened(self, link: Link) -> Connection:
        connection = Connection(len(self.connections) + 1, time.monotonic(), link.name)
        with self._changed:
            self.connections.append(connection)
            self._changed.notify_all()
        self._links.add(link)
        return connection

    def note_closed(self, connection: Connection, by: str) -> None:
        with self._changed:
            connection.closed_at, connection.closed_by = time.monotonic(), by
            self._changed.notify_all()
        self._links = {link for link in self._links if link.connection is not connection}

    def _hold(self, holder: socket.socket) -> socket.socket:
        self._sockets.append(holder)
        return holder

    def _open(self, name: str, tls: Path | None, at_once: bool) -> str:
        context = None
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(tls)
        opening = self._loop.create_server(lambda: Link(self, name, at_once), "127.0.0.1", 0, ssl=context, backlog=512)
        server = asyncio.run_coroutine_threadsafe(opening, self._loop).result(HANG_S)
        self._servers.append(server)
        return f"{'https' if tls else 'http'}://127.0.0.1:{server.sockets[0].getsockname()[1]}"

    async def _shut(self) -> None:
        for server in self._servers:
            server.close()
        tasks = [link.task for link in self._links]
        for link in list(self._links):
            link.task.cancel()
            link.transport.abort()
        await asyncio.gather(*tasks, return_exceptions=True)


# ---------------------------------------------------------------- a client on a raw socket

@dataclass(frozen=True)
class Unchunked:
    """A chunked body: its data, how many bytes it took with its end (0: it has none), what was wrong."""
    data: bytes
    used: int
    wrong: str = ""


def unchunk(raw: bytes) -> Unchunked:
    """Reads a chunked body; used is 0 while the last chunk is missing."""
    data, at = [], 0
    while (line_end := raw.find(b"\r\n", at)) >= 0:
        try:
            size = int(raw[at:line_end].split(b";")[0], 16)
        except ValueError:
            return Unchunked(b"".join(data), 0, f"chunk size {raw[at:line_end]!r}")
        if not size:
            end = raw.find(b"\r\n", line_end + 2)
            return Unchunked(b"".join(data), end + 2 if end >= 0 else 0)
        data.append(raw[line_end + 2:line_end + 2 + size])
        at = line_end + 2 + size + 2
        if at > len(raw):
            break
    return Unchunked(b"".join(data), 0)


_BLANK = re.compile(r"\r\n\r\n|\n\n|\r\r")


def sse_data(body: bytes) -> list[str]:
    """The data of each whole event of a stream, in order; comments and unfinished frames left out."""
    text = body.decode("utf-8", "replace").removeprefix("\ufeff")
    frames = _BLANK.split(text.replace("\r\n", "\n").replace("\r", "\n"))[:-1]
    rows = [[line.partition(":") for line in re.split("\n", one)] for one in frames]
    data = ["\n".join(value.removeprefix(" ") for name, _, value in row if name == "data") for row in rows]
    return [one for one in data if one]


@dataclass(frozen=True)
class Reply:
    """A response as a raw client saw it."""
    raw: bytes
    status: int
    headers: dict[str, str]
    header_list: list[tuple[str, str]]
    body: bytes                     #: without chunk framing
    complete: bool                  #: the body ended as its framing says, with nothing after it
    ended: str                      #: eof, reset, timeout, left
    elapsed_s: float

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def streamed(self) -> bool:
        return self.headers.get("content-type", "").startswith("text/event-stream")

    @property
    def events(self) -> list[str]:
        """Data of each event of a stream."""
        return sse_data(self.body)

    @property
    def chunks(self) -> list[Json]:
        """The JSON events of a stream."""
        return [json.loads(data) for data in self.events if data.strip() != "[DONE]"]

    @property
    def done(self) -> bool:
        """Whether the stream said [DONE]."""
        return b"[DONE]" in self.body

    @property
    def text(self) -> str:
        """The assistant's words, streamed or not."""
        if not self.streamed:
            return json.loads(self.body.decode("utf-8-sig", "replace"))["choices"][0]["message"]["content"]
        deltas = [choice.get("delta") or choice.get("message") or {} for chunk in self.chunks for choice in chunk.get("choices") or []]
        return "".join(delta.get("content") or "" for delta in deltas)

    @property
    def finish(self) -> str | None:
        """The finish reason, streamed or not."""
        found = self.chunks if self.streamed else [self.json]
        return next((choice["finish_reason"] for chunk in found for choice in chunk.get("choices") or [] if choice.get("finish_reason")), None)

    @property
    def error(self) -> Json | None:
        """The error of a body, or of a stream's last event."""
        found = self.chunks[-1:] if self.streamed else [json.loads(self.body)] if self.body else []
        return found[0].get("error") if found and isinstance(found[0], dict) else None


def read_reply(raw: bytes, ended: str = "eof", elapsed_s: float = 0.0) -> Reply:
    """Parses one response; informational ones before it are skipped."""
    head, _, rest = raw.partition(b"\r\n\r\n")
    while re.match(rb"HTTP/1\.1 1\d\d ", head):
        head, _, rest = rest.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 "):
        return Reply(raw, 0, {}, [], b"", False, ended, elapsed_s)
    line, *rows = head.decode("latin-1").split("\r\n")
    header_list = [(name.lower(), value.strip()) for name, _, value in (row.partition(":") for row in rows)]
    headers = dict(header_list)
    if "chunked" in headers.get("transfer-encoding", ""):
        read = unchunk(rest)
        body, complete = read.data, read.used == len(rest) > 0
    elif "content-length" in headers:
        body, complete = rest, len(rest) == int(headers["content-length"])
    else:
        body, complete = rest, ended == "eof"
    return Reply(raw, int(line.split(" ")[1]), headers, header_list, body, complete, ended, elapsed_s)


class Client:
    """One raw connection to a server: sends what it is told, keeps what comes, may leave at any time."""

    def __init__(self, port: int, host: str = "127.0.0.1", receive_buffer: int = 0) -> None:
        self.socket = socket.socket()
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(HANG_S)
        self.socket.connect((host, port))
        self.began = time.monotonic()
        self.raw = bytearray()
        self.arrivals: list[tuple[float, int]] = []     #: when pieces came and how large they were
        self.ended = ""

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def read_until(self, enough: bytes | Callable[[bytes], Any], timeout: float = HANG_S) -> bytes:
        """Reads until `enough` is in (or says yes to) what came, or the other side ends; returns all that came."""
        holds = enough if callable(enough) else lambda raw: enough in raw
        deadline = time.monotonic() + timeout
        while not holds(bytes(self.raw)) and not self.ended:
            self._read(deadline)
        return bytes(self.raw)

    def read_all(self, timeout: float = HANG_S) -> Reply:
        """Reads until the other side ends."""
        deadline = time.monotonic() + timeout
        while not self.ended:
            self._read(deadline)
        return self.reply()

    def reply(self) -> Reply:
        """What came so far, parsed."""
        return read_reply(bytes(self.raw), self.ended or "left", time.monotonic() - self.began)

    def close(self) -> None:
        self.socket.close()

    def reset(self) -> None:
        """Leaves by RST."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def _read(self, deadline: float) -> None:
        try:
            self.socket.settimeout(max(0.01, deadline - time.monotonic()))
            data = self.socket.recv(1 << 18)
        except TimeoutError:
            self.ended = "timeout"
        except ConnectionError:
            self.ended = "reset"
        else:
            self.raw += data
            self.arrivals.append((time.monotonic(), len(data)))
            self.ended = "" if data else "eof"

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# ---------------------------------------------------------------- the gateway as a process

_SECRET_NAME = re.compile(r"(_API_KEY|_TOKEN|_SECRET|_KEY)(_\d+)?$|_proxy$|_BASE_URL$|^AICAROUSEL_|^API_KEYS$|^PORT$|^DATABASE_URL$|^OLLAMA_HOST$", re.IGNORECASE)
_LISTENING = re.compile(r"https?://127\.0\.0\.1:(\d+)")


class Gateway:
    """`python aicarousel.py serve --port 0` in a home of its own, with one gateway key; use start() or `with`."""

    def __init__(self, models: Json | None = None, env_file: Mapping[str, str] | None = None, environment: Mapping[str, str] | None = None,
                 arguments: Sequence[str] = (), program: Path = ROOT / "aicarousel.py", run: Sequence[str] = ()) -> None:
        """run: how the program is run, where it is not by this Python as a script."""
        self.folder = Path(tempfile.mkdtemp(prefix="aicarousel-test-"))
        self.home = self.folder / "home"
        self.home.mkdir(mode=0o700)
        self.program, self.arguments, self.run = program, list(arguments), list(run)
        self.environment = clean_environment(self.folder) | dict(environment or {})
        self.log_file = self.folder / "stderr"
        self.process: subprocess.Popen[str] | None = None
        self.key, self.port, self.printed = "", 0, ""
        if models is not None:
            self.write_models(models)
        if env_file:
            write_private(self.home / ".env", "".join(f"{name}={value}\n" for name, value in env_file.items()))

    def write_models(self, models: Json) -> None:
        """Writes models.json, as an operator would."""
        write_private(self.home / "models.json", json.dumps(models, indent=1))

    def command(self, *words: str, timeout: float = 30.0) -> subprocess.CompletedProcess[str]:
        """Runs `python aicarousel.py <words> --home HOME` to its end."""
        return subprocess.run([*(self.run or invocation(self.program)), *words, "--home", str(self.home)],
                              env=self.environment, cwd=self.folder, capture_output=True, text=True, timeout=timeout)

    def create_key(self, name: str = "test") -> str:
        """A new gateway key."""
        made = self.command("key", "create", name)
        found = re.search(r"sk-[0-9a-f]{64}", made.stdout)
        assert made.returncode == 0 and found, f"key create: {made.returncode} {made.stdout} {made.stderr}"
        return found[0]

    def start(self) -> Gateway:
        """Makes a key, starts serving, waits for the line with the address."""
        self.key = self.key or self.create_key()
        with open(self.log_file, "ab") as log:
            self.process = subprocess.Popen([*(self.run or [sys.executable, "-u", str(self.program)]), "serve", "--home", str(self.home), "--port", "0", *self.arguments],
                                            env=self.environment, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True)
        self.printed, listening = "", threading.Event()
        threading.Thread(target=self._drain, args=(self.process.stdout, listening), daemon=True).start()
        if not listening.wait(HANG_S) or not self.port:
            self.process.kill()
            raise AssertionError(f"the gateway did not start:\n{self.printed}\n{self.log}")
        return self

    def _drain(self, output: Any, listening: threading.Event) -> None:
        for line in output:
            self.printed += line
            found = _LISTENING.search(line)
            if found and not listening.is_set():
                self.port = int(found[1])
                listening.set()
        listening.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self.process
        return self.process.pid

    @property
    def log(self) -> str:
        """What the gateway wrote to stderr."""
        return self.log_file.read_text(errors="replace") if self.log_file.exists() else ""

    def request_bytes(self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None, *, key: str | None = None, close: bool = True) -> bytes:
        """A request as it goes over the wire; key: None for the gateway's own, "" for none."""
        raw = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        key = self.key if key is None else key
        rows = {"host": f"127.0.0.1:{self.port}", **({"authorization": f"Bearer {key}"} if key else {}),
                **({"content-type": "application/json", "content-length": str(len(raw))} if body is not None else {}),
                **({"connection": "close"} if close else {}), **{name.lower(): value for name, value in (headers or {}).items()}}
        return f"{method} {path} HTTP/1.1\r\n".encode() + "".join(f"{name}: {value}\r\n" for name, value in rows.items()).encode() + b"\r\n" + raw

    def connect(self, receive_buffer: int = 0) -> Client:
        """A raw connection to the gateway."""
        return Client(self.port, receive_buffer=receive_buffer)

    def request(self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None, *, key: str | None = None, timeout: float = HANG_S) -> Reply:
        """One request on a connection of its own, answered whole."""
        with self.connect() as client:
            client.send(self.request_bytes(method, path, body, headers, key=key))
            return client.read_all(timeout)

    def get(self, path: str, **more: Any) -> Reply:
        return self.request("GET", path, **more)

    def post(self, path: str, body: Any, *, stream: bool | None = None, **more: Any) -> Reply:
        """POST with JSON; stream: sets that field."""
        return self.request("POST", path, body if stream is None else {**body, "stream": stream}, **more)

    def chat(self, model: str | None = None, text: str = "Hi", *, stream: bool = False, **fields: Any) -> Reply:
        """One chat completion."""
        return self.post("/v1/chat/completions", chat_body(model, text, stream=stream, **fields))

    def start_chat(self, model: str, *, stream: bool = True, receive_buffer: int = 0) -> Client:
        """A client that has asked and not read yet."""
        client = self.connect(receive_buffer)
        client.send(self.request_bytes("POST", "/v1/chat/completions", chat_body(model, stream=stream)))
        return client

    def health(self) -> Json:
        """What /health tells a caller with a key."""
        reply = self.get("/health?deep=1")
        assert reply.status == 200, (reply.status, reply.body)
        return reply.json

    def cooling(self, provider: str) -> list[Json]:
        """The cooldowns of one provider."""
        return next(row for row in self.health()["providers"] if row["name"] == provider)["cooling"]

    def rss_bytes(self) -> int:
        """Resident memory, on Linux."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def open_files(self) -> int:
        """How many file descriptors are open, on Linux."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def stop(self, timeout: float = 10.0) -> int:
        """SIGTERM; the exit status."""
        assert self.process
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise

    def remove(self) -> None:
        """Ends the process if it lives, and deletes its folder."""
        if self.process and self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Gateway:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.remove()


def chat_body(model: str | None = None, text: str = "Hi", **fields: Any) -> Json:
    """A chat request."""
    return {**({"model": model} if model is not None else {}), "messages": [{"role": "user", "content": text}], **fields}


_COMPILED = tempfile.TemporaryDirectory(prefix="aicarousel-compiled-")


def invocation(program: Path) -> list[str]:
    """How a command of the program is run many times: as a module, so that it is compiled once. Serving, and what README shows, is run as a script."""
    return [sys.executable, "-m", "aicarousel"] if program == ROOT / "aicarousel.py" else [sys.executable, str(program)]


def clean_environment(folder: Path) -> dict[str, str]:
    """This process's environment without keys, proxies and settings of the gateway, and with home folders inside `folder`."""
    kept = {name: value for name, value in os.environ.items() if not _SECRET_NAME.search(name) and name != "PYTHONDONTWRITEBYTECODE"}
    return kept | {"HOME": str(folder), "PYTHONUSERBASE": site.getuserbase(), "PYTHONPATH": str(ROOT), "PYTHONPYCACHEPREFIX": _COMPILED.name, "XDG_CONFIG_HOME": str(folder / "config"), "XDG_DATA_HOME": str(folder / "data")}


def write_private(path: Path, text: str) -> None:
    """Writes a file for the owner's eyes, replacing it in one step."""
    draft = path.with_name(path.name + ".draft")
    draft.touch(mode=0o600)
    draft.write_text(text)
    draft.replace(path)


# ---------------------------------------------------------------- time moved by hand

class ShiftedLoop(asyncio.SelectorEventLoop):
    """An event loop whose time is the real one plus what the test added: timers fire without waiting."""

    def __init__(self) -> None:
        super().__init__()
        self.shift_s = 0.0

    def time(self) -> float:
        return super().time() + self.shift_s

    def advance(self, seconds: float) -> None:
        """Moves time forward and wakes the loop; from any thread."""
        self.shift_s += seconds
        self.call_soon_threadsafe(lambda: None)


class InLoop:
    """What works inside this process: a ShiftedLoop in a thread of its own, and ways to act in it from the test's thread."""

    loop: ShiftedLoop

    def run_loop(self) -> None:
        """Starts the loop."""
        self.loop = ShiftedLoop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def end_loop(self) -> None:
        """Stops it and waits for its thread."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(HANG_S)

    def do(self, work: Callable[[], Any]) -> Any:
        """Runs `work` (a coroutine function or a plain one) in the loop."""
        async def run() -> Any:
            result = work()
            return await result if asyncio.iscoroutine(result) else result
        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(HANG_S)

    def settle(self) -> None:
        """Lets the loop take in everything that has arrived on its sockets."""
        async def turn() -> None:
            for _ in range(20):
                await asyncio.sleep(0)
        self.do(turn)

    def pass_time(self, seconds: float) -> None:
        """What was due in `seconds` is done when this returns."""
        self.settle()
        self.loop.advance(seconds)
        self.settle()
