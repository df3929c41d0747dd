"""Section 30: connections to providers against real loopback servers: pool, deadlines, TLS, proxies, compression, cancellation."""
from __future__ import annotations

import asyncio
import base64
import contextlib
import gzip
import json
import socket
import ssl
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

import aicarousel
from aicarousel import (Answer, Inbox, InboxProtocol, Job, Origin, Relay, Timeouts, Transport, UpstreamFailure, World, build_catalogue, load_config, make_client_context, no_proxy_covers, real_world, resolve,
                        split_url)
from fakes import TLS, ShiftedLoop

REQUEST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n{}"
TIMEOUTS = Timeouts(connect_s=5.0, first_byte_s=5.0)
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"

Talk = Callable[["Peer", asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Peer:
    """A loopback server in the test's own loop: `talk` plays each connection; what came is kept."""
    talk: Talk
    tls: ssl.SSLContext | None = None
    n_connections: int = 0
    n_closed: int = 0
    requests: list[bytes] = field(default_factory=list)
    facts: list[dict[str, Any]] = field(default_factory=list)      #: of each TLS connection: reused, sni
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    port: int = 0

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.n_connections += 1
        secure = writer.get_extra_info("ssl_object")
        if secure is not None:
            self.facts.append({"reused": secure.session_reused, "version": secure.version()})
        self.note()
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, ssl.SSLError):
            await self.talk(self, reader, writer)
        self.n_closed += 1
        self.note()
        writer.close()

    def note(self) -> None:
        self.changed.set()
        self.changed.clear()

    async def request(self, reader: asyncio.StreamReader) -> bytes:
        """The next request on a connection, head and body."""
        head = await reader.readuntil(b"\r\n\r\n")
        request = head + (await reader.readexactly(2) if head.startswith(b"POST") else b"")
        self.requests.append(request)
        self.note()
        return request

    async def until(self, true: Callable[[], Any]) -> None:
        """Waits for `true()`, looking whenever something came; a wait of 5 s has failed."""
        async with asyncio.timeout(5):
            while not true():
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.changed.wait(), 0.02)

    @property
    def origin(self) -> Origin:
        return Origin("https" if self.tls else "http", "127.0.0.1", self.port)


@contextlib.asynccontextmanager
async def serving(talk: Talk, tls: ssl.SSLContext | None = None) -> AsyncIterator[Peer]:
    peer = Peer(talk, tls)
    server = await asyncio.start_server(peer.accept, "127.0.0.1", 0, ssl=tls)
    peer.port = server.sockets[0].getsockname()[1]
    try:
        yield peer
    finally:
        server.close()


def answers(*pieces: bytes, then: str = "go on") -> Talk:
    """Answers each request of a connection with the next piece, the last again and again; then: go on, close, wait."""
    async def talk(peer: Peer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        left = list(pieces)
        while True:
            await peer.request(reader)
            writer.write(left.pop(0) if len(left) > 1 else left[0])
            if then == "close":
                return
            if then == "wait":
                await reader.read()
                return
    return talk


async def hush(peer: Peer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Reads the request and says nothing."""
    await peer.request(reader)
    await reader.read()


@contextlib.asynccontextmanager
async def transporting() -> AsyncIterator[Transport]:
    transport = Transport(real_world())
    try:
        yield transport
    finally:
        transport.close()
        await asyncio.sleep(0)


async def body_of(answer: Answer) -> bytes:
    body = await answer.read_all(idle_s=5.0, within_s=30.0)
    answer.release()
    return body


async def ask(transport: Transport, origin: Origin, timeouts: Timeouts = TIMEOUTS) -> bytes:
    return await body_of(await transport.request(origin, REQUEST, timeouts))


async def failure_of(work: Coroutine[Any, Any, Any]) -> UpstreamFailure:
    with pytest.raises(UpstreamFailure) as caught:
        await work
    return caught.value


def told(failure: UpstreamFailure) -> tuple[str, str]:
    return failure.reason, failure.phase


@pytest.fixture
def run() -> Any:
    """Runs a coroutine in a loop of its own."""
    return asyncio.run


# ------------------------------------------------------------------ the pool

def test_one_connection_serves_many_requests(run: Any) -> None:
    async def main() -> None:
        async with serving(answers(OK)) as peer, transporting() as transport:
            assert [await ask(transport, peer.origin) for _ in range(20)] == [b"ok"] * 20
            assert (peer.n_connections, len(peer.requests), transport.n_parked()) == (1, 20, 1)
            assert set(peer.requests) == {REQUEST}
    run(main())


REUSED = [                                  # answer -> is its connection used again?
    (OK, True),
    (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", True),
    (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nX-Trailer: 1\r\n\r\n", True),
    (b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 2\r\n\r\nok", True),
    (b"HTTP/1.1 200 OK\r\nconnection: keep-alive\r\ncontent-length: 2\r\n\r\nok", True),
    (b"HTTP/1.1 200 OK\r\nconnection: Close\r\ncontent-length: 2\r\n\r\nok", False),
    (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok!", False),
    (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nokHTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil", False),
    (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil", False),
]


@pytest.mark.parametrize(("answer", "reused"), REUSED, ids=range(len(REUSED)))
def test_a_connection_comes_back_only_when_its_answer_was_whole_and_alone(run: Any, answer: bytes, reused: bool) -> None:
    async def main() -> None:
        async with serving(answers(answer)) as peer, transporting() as transport:
            for _ in range(3):
                assert await ask(transport, peer.origin) == b"ok"
            assert peer.n_connections == (1 if reused else 3)
    run(main())


def test_requests_at_the_same_time_have_a_connection_each_and_the_last_used_goes_first(run: Any) -> None:
    async def main() -> None:
        gate = asyncio.Event()

        async def talk(peer: Peer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            number = peer.n_connections
            while True:
                await peer.request(reader)
                await gate.wait()
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\n%d" % number)

        async with serving(talk) as peer, transporting() as transport:
            asked = [asyncio.ensure_future(ask(transport, peer.origin)) for _ in range(3)]
            await peer.until(lambda: len(peer.requests) == 3)
            gate.set()
            assert sorted(await asyncio.gather(*asked)) == [b"1", b"2", b"3"] and transport.n_parked() == 3
            assert await ask(transport, peer.origin) == await ask(transport, peer.origin) and peer.n_connections == 3
    run(main())


def test_origins_and_proxies_do_not_share_connections(run: Any) -> None:
    async def main() -> None:
        async with serving(answers(OK)) as peer, transporting() as transport:
            for host in ("127.0.0.1", "localhost", "127.0.0.1", "localhost"):
                await ask(transport, peer.origin._replace(host=host))
            assert peer.n_connections == 2
    run(main())


def dying(after: int, last: bytes = b"") -> Talk:
    """Answers `after` requests on a connection; at the next one it sends `last` and closes."""
    async def talk(peer: Peer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(after):
            await peer.request(reader)
            writer.write(OK)
        await peer.request(reader)
        writer.write(last)
    return talk


def test_a_pooled_connection_that_dies_at_the_request_is_replaced_once(run: Any) -> None:
    async def main() -> None:
        async with serving(dying(1)) as peer, transporting() as transport:
            assert [await ask(transport, peer.origin) for _ in range(4)] == [b"ok"] * 4
            assert (peer.n_connections, len(peer.requests)) == (4, 7)
        async with serving(lambda peer, *link: (dying(1) if peer.n_connections == 1 else dying(0))(peer, *link)) as peer, transporting() as transport:
            assert await ask(transport, peer.origin) == b"ok"
            failure = await failure_of(ask(transport, peer.origin))
            assert told(failure) == ("cut", "head") and (peer.n_connections, len(peer.requests)) == (2, 3), "once, not again"
    run(main())


@pytest.mark.parametrize("last", [b"HTTP/1.1 200 OK\r\n", b"H", b"garbage\r\n\r\n"])
def test_a_pooled_connection_that_dies_inside_the_answer_is_not_replaced(run: Any, last: bytes) -> None:
    async def main() -> None:
        async with serving(dying(1, last)) as peer, transporting() as transport:
            assert await ask(transport, peer.origin) == b"ok"
            failure = await failure_of(ask(transport, peer.origin))
            assert failure.reason in ("cut", "protocol") and failure.phase == "head" and (peer.n_connections, len(peer.requests)) == (1, 2)
    run(main())


def test_a_fresh_connection_that_dies_is_a_failure_at_once(run: Any) -> None:
    async def main() -> None:
        async with serving(dying(0)) as peer, transporting() as transport:
            assert told(await failure_of(ask(transport, peer.origin))) == ("cut", "head") and peer.n_connections == 1
    run(main())


@pytest.mark.parametrize("unasked", [b"", OK, b"x"], ids=["end", "answer", "byte"])
def test_whatever_comes_unasked_spoils_a_pooled_connection(run: Any, unasked: bytes) -> None:
    async def main() -> None:
        gate = asyncio.Event()

        async def talk(peer: Peer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await peer.request(reader)
            writer.write(OK if peer.n_connections == 1 else OK.replace(b"ok", b"B!"))
            await gate.wait()
            writer.write(unasked)
            if unasked:
                await writer.drain()
                await reader.read()

        async with serving(talk) as peer, transporting() as transport:
            assert await ask(transport, peer.origin) == b"ok" and transport.n_parked() == 1
            line = transport._pool[peer.origin][0]
            gate.set()
            await peer.until(lambda: line.inbox.spoiled)
            assert await ask(transport, peer.origin) == b"B!" and (peer.n_connections, len(peer.requests)) == (2, 2), "the request was not sent on the first"
    run(main())


def test_no_more_is_taken_in_than_is_read(run: Any) -> None:
    async def main() -> None:
        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"x" * 9_000_000)
            await writer.drain()
            writer.close()

        async with await asyncio.start_server(talk, "127.0.0.1", 0) as server:
            inbox = Inbox(100_000)
            await asyncio.get_running_loop().create_connection(lambda: InboxProtocol(inbox), *server.sockets[0].getsockname())
            async with asyncio.timeout(10):
                while inbox.transport.is_reading():
                    await asyncio.sleep(0.005)
                n_bytes = len(await inbox.take())
                assert 100_000 < n_bytes < 400_000 and inbox.transport.is_reading()
                while piece := await inbox.take():
                    n_bytes += len(piece)
            assert n_bytes == 9_000_000 and inbox.at_eof()
            inbox.transport.abort()
    run(main())


def test_waiting_connections_are_closed_after_a_while(clock: ShiftedLoop) -> None:
    async def main() -> None:
        async with serving(answers(OK)) as peer, transporting() as transport:
            await ask(transport, peer.origin)
            clock.advance(55)
            await ask(transport, peer.origin)
            assert peer.n_connections == 1
            clock.advance(61)
            await peer.until(lambda: peer.n_closed == 1)
            assert await ask(transport, peer.origin) == b"ok" and peer.n_connections == 2
    clock.run_until_complete(main())


def test_the_pool_has_a_bound_and_close_empties_it(run: Any) -> None:
    async def main() -> None:
        gate = asyncio.Event()

        async def talk(peer: Peer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await peer.request(reader)
            await gate.wait()
            writer.write(OK)
            await reader.read()

        async with serving(talk) as peer, transporting() as transport:
            transport.bounds = aicarousel.Bounds(pool_size=2)
            asked = [asyncio.ensure_future(ask(transport, peer.origin)) for _ in range(5)]
            await peer.until(lambda: len(peer.requests) == 5)
            gate.set()
            await asyncio.gather(*asked)
            assert transport.n_parked() == 2
            await peer.until(lambda: peer.n_closed == 3)
            transport.close()
            await peer.until(lambda: peer.n_closed == 5)
            assert transport.n_parked() == 0
    run(main())


def test_an_answer_may_be_ended_again_and_in_any_way(run: Any) -> None:
    async def main() -> None:
        async with serving(answers(OK)) as peer, transporting() as transport:
            answer = await transport.request(peer.origin, REQUEST, TIMEOUTS)
            await body_of(answer)
            answer.release()
            answer.abort()
            assert transport.n_parked() == 1 and await ask(transport, peer.origin) == b"ok" and peer.n_connections == 1
            answer = await transport.request(peer.origin, REQUEST, TIMEOUTS)
            answer.abort()
            answer.abort()
            answer.release()
            assert transport.n_parked() == 0
            await peer.until(lambda: peer.n_closed == 1)
    run(main())


def test_ending_an_old_answer_does_no_harm_to_a_new_one_on_its_connection(run: Any) -> None:
    async def main() -> None:
        async with serving(answers(OK)) as peer, transporting() as transport:
            old = await transport.request(peer.origin, REQUEST, TIMEOUTS)
            await body_of(old)
            new = await transport.request(peer.origin, REQUEST, TIMEOUTS)
            old.abort()
            old.release()
            assert await body_of(new) == b"ok" and transport.n_parked() == 1 and not new._line.inbox.transport.is_closing()
    run(main())


# ------------------------------------------------------------------ connecting

def test_nobody_listens(run: Any) -> None:
    async def main() -> None:
        with socket.socket() as holder:
            holder.bind(("127.0.0.1", 0))
            async with transporting() as transport:
                failure = await failure_of(ask(transport, Origin("http", "127.0.0.1", holder.getsockname()[1])))
        assert told(failure) == ("refused", "connect") and (failure.kind, failure.scope) == ("network", "provider")
    run(main())


DIAL_FAILURES = [
    (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), "dns"),
    (ConnectionRefusedError(111, "Connection refused"), "refused"),
    (ConnectionResetError(104, "Connection reset by peer"), "reset"),
    (OSError(101, "Network is unreachable"), "reset"),
    (OSError(24, "Too many open files"), "no_descriptor"),
    (OSError(23, "Too many open files in system"), "no_descriptor"),
    (OSError("Multiple exceptions: [Errno 24] Too many open files, [Errno 111] Connect call failed ('127.0.0.1', 9)"), "no_descriptor"),
    (OSError("Multiple exceptions: [Errno 111] Connect call failed ('::1', 9), [Errno 101] Network is unreachable"), "reset"),
    (type("FromOpenSSL", (ssl.SSLError,), {"reason": "WRONG_VERSION_NUMBER"})(1, "wrong version number"), "tls"),
    (type("Unverified", (ssl.SSLCertVerificationError,), {"reason": "X", "verify_message": "certificate has expired"})(1, "certificate verify failed"), "tls"),
    (TimeoutError(), "timeout"),
]


@pytest.mark.parametrize(("error", "reason"), DIAL_FAILURES, ids=[type(row[0]).__name__ + str(index) for index, row in enumerate(DIAL_FAILURES)])
def test_every_way_a_connection_can_fail_is_told_apart(run: Any, error: Exception, reason: str) -> None:
    async def main() -> None:
        async def dial(*_: Any, **__: Any) -> Any:
            raise error

        world = real_world()
        transport = Transport(World(world.clock, world.utc, world.sleep, world.random, dial))
        failure = await failure_of(ask(transport, Origin("http", "nothing.invalid", 80)))
        assert told(failure) == (reason, "connect") and failure.kind == "network" and failure.detail and failure.__cause__ is error
    run(main())


def test_a_name_with_two_addresses_that_both_refuse_is_refused(run: Any) -> None:
    async def main() -> None:
        async def dial(*_: Any, **__: Any) -> Any:
            raise OSError("Multiple exceptions: [Errno 111] Connect call failed ('::1', 9, 0, 0), [Errno 111] Connect call failed ('127.0.0.1', 9)")

        world = real_world()
        failure = await failure_of(ask(Transport(World(world.clock, world.utc, world.sleep, world.random, dial)), Origin("http", "localhost", 9)))
        assert failure.reason == "refused" and failure.detail != "OSError"
    run(main())


# ------------------------------------------------------------------ deadlines

async def advanced(clock: ShiftedLoop, peer: Peer, work: Coroutine[Any, Any, Any], when: Callable[[], Any], *spans_s: float) -> asyncio.Task[Any]:
    """Starts `work`, waits for `when()`, moves time forward in spans, and gives the task."""
    task = asyncio.ensure_future(work)
    await peer.until(when)
    for span_s in spans_s:
        clock.advance(span_s)
        for _ in range(5):
            await asyncio.sleep(0)
    return task


def test_no_connection_in_time(clock: ShiftedLoop) -> None:
    async def main() -> None:
        async def dial(*_: Any, **__: Any) -> Any:
            await asyncio.Event().wait()

        world = real_world()
        transport = Transport(World(world.clock, world.utc, world.sleep, world.random, dial))
        task = asyncio.ensure_future(ask(transport, Origin("http", "127.0.0.1", 9), Timeouts(connect_s=7.5)))
        await asyncio.sleep(0)
        clock.advance(7)
        await asyncio.sleep(0.01)
        assert not task.done()
        clock.advance(1)
        failure = await failure_of(task)      # type: ignore[arg-type]
        assert told(failure) == ("timeout", "connect") and "7.5 s" in failure.detail
    clock.run_until_complete(main())


def test_no_head_in_time(clock: ShiftedLoop) -> None:
    async def main() -> None:
        async with serving(hush) as peer, transporting() as transport:
            task = await advanced(clock, peer, ask(transport, peer.origin, Timeouts(first_byte_s=60)), lambda: peer.requests, 59)
            assert not task.done()
            clock.advance(2)
            failure = await failure_of(task)      # type: ignore[arg-type]
            assert told(failure) == ("timeout", "head") and (failure.kind, failure.scope) == ("network", "provider")
            await peer.until(lambda: peer.n_closed == 1)
            assert peer.n_connections == 1 and transport.n_parked() == 0
    clock.run_until_complete(main())


@pytest.mark.parametrize("drip", [b"HTTP/1.1 100 Continue\r\n\r\n", b"x"], ids=["informational", "bytes of a head"])
def test_signs_of_life_do_not_put_off_the_head(clock: ShiftedLoop, drip: bytes) -> None:
    async def main() -> None:
        more = asyncio.Event()

        async def talk(peer: Peer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await peer.request(reader)
            writer.write(b"HTTP/1.1 200 OK\r\nX: " if drip == b"x" else b"")
            while True:
                await more.wait()
                more.clear()
                writer.write(drip)

        async with serving(talk) as peer, transporting() as transport:
            task = await advanced(clock, peer, ask(transport, peer.origin, Timeouts(first_byte_s=60)), lambda: peer.requests)
            for _ in range(5):
                more.set()
                await asyncio.sleep(0.005)
                clock.advance(13)
                await asyncio.sleep(0.005)
            assert told(await failure_of(task)) == ("timeout", "head")      # type: ignore[arg-type]
    clock.run_until_complete(main())


def test_a_pooled_connection_that_says_nothing_is_a_timeout_and_not_replaced(clock: ShiftedLoop) -> None:
    async def main() -> None:
        async def talk(peer: Peer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await peer.request(reader)
            writer.write(OK)
            await hush(peer, reader, writer)

        async with serving(talk) as peer, transporting() as transport:
            assert await ask(transport, peer.origin) == b"ok"
            task = await advanced(clock, peer, ask(transport, peer.origin, Timeouts(first_byte_s=30)), lambda: len(peer.requests) == 2, 31)
            assert told(await failure_of(task)) == ("timeout", "head") and peer.n_connections == 1      # type: ignore[arg-type]
    clock.run_until_complete(main())


def test_silence_inside_a_body(clock: ShiftedLoop) -> None:
    async def main() -> None:
        async with serving(answers(STREAM_HEAD + b"2\r\nab\r\n", then="wait")) as peer, transporting() as transport:
            answer = await transport.request(peer.origin, REQUEST, TIMEOUTS)
            assert await answer.read() == b"ab"
            answer.watch("idle", 90.0)
            clock.advance(80)
            answer.watch("idle", 90.0)
            task = await advanced(clock, peer, answer.read(), lambda: True, 80)
            assert not task.done(), "each sign of life starts the wait anew"
            clock.advance(11)
            assert told(await failure_of(task)) == ("timeout", "idle")      # type: ignore[arg-type]
            answer.abort()
            await peer.until(lambda: peer.n_closed == 1)
    clock.run_until_complete(main())


def test_a_whole_answer_must_keep_coming(clock: ShiftedLoop) -> None:
    async def main() -> None:
        async with serving(answers(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf", then="wait")) as peer, transporting() as transport:
            answer = await transport.request(peer.origin, REQUEST, TIMEOUTS)
            task = await advanced(clock, peer, answer.read_all(idle_s=60.0, within_s=600.0), lambda: True, 61)
            assert told(await failure_of(task))[0] == "timeout"      # type: ignore[arg-type]
    clock.run_until_complete(main())


def test_blank_lines_keep_a_slow_answer_alive_but_not_for_ever(clock: ShiftedLoop) -> None:
    async def main() -> None:
        more = asyncio.Event()

        async def talk(peer: Peer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await peer.request(reader)
            writer.write(STREAM_HEAD)
            while True:
                await more.wait()
                more.clear()
                writer.write(b"1\r\n\n\r\n")

        async with serving(talk) as peer, transporting() as transport:
            answer = await transport.request(peer.origin, REQUEST, TIMEOUTS)
            task = asyncio.ensure_future(answer.read_all(idle_s=60.0, within_s=200.0))
            for _ in range(3):
                more.set()
                await asyncio.sleep(0.01)
                clock.advance(50)
                await asyncio.sleep(0.01)
            assert not task.done()
            for _ in range(2):
                more.set()
                await asyncio.sleep(0.01)
                clock.advance(50)
                await asyncio.sleep(0.01)
            assert told(await failure_of(task)) == ("timeout", "idle")      # type: ignore[arg-type]
    clock.run_until_complete(main())


# ------------------------------------------------------------------ answers

HEADS = [                                   # what comes -> status and body, or the failure
    (OK, (200, b"ok")),
    (b"HTTP/1.1 100 Continue\r\n\r\n" + OK, (200, b"ok")),
    (b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n" * 20 + OK, (200, b"ok")),
    (b"HTTP/1.1 102 Processing\r\n\r\n" * 21 + OK, "protocol"),
    (b"HTTP/1.1 100 Continue\r\n\r\n" * 5000, "protocol"),
    (b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\n\r\n" + OK, "protocol"),
    (b"HTTP/1.1 204 No Content\r\n\r\n", (204, b"")),
    (b"HTTP/1.1 302 Found\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\n\r\n", (302, b"")),
    (b"HTTP/1.1 307 Temporary Redirect\r\nlocation: /loop\r\ncontent-length: 2\r\n\r\nno", (307, b"no")),
    (b"HTTP/1.0 200 OK\r\n\r\nto the end", (200, b"to the end")),
    (b"HTTP/1.1 200 OK\r\n\r\nto the end", (200, b"to the end")),
    (b"HTTP/1.1 529 Site is overloaded\r\ncontent-length: 2\r\n\r\nno", (529, b"no")),
    (b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhel", "cut"),
    (STREAM_HEAD + b"5\r\nhel", "cut"),
    (STREAM_HEAD + b"5\r\nhello\r\n", "cut"),
    (STREAM_HEAD + b"5\r\nhello\r\n0\r\n", "cut"),
    (STREAM_HEAD + b"zz\r\nhello\r\n", "protocol"),
    (STREAM_HEAD + b"5;x=y\r\nhello\r\n0\r\n\r\n", "protocol"),
    (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", "protocol"),
    (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\nok!", "protocol"),
    (b"HTTP/1.1 200 OK\r\ncontent-length: -2\r\n\r\nok", "protocol"),
    (b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\n\r\nok", "protocol"),
    (b"HTTP/1.1 200 OK\r\nX: a\nY: b\r\ncontent-length: 2\r\n\r\nok", "protocol"),
    (b"HTTP/1.1 200 OK\ncontent-length: 2\n\nok", "protocol"),
    (b"HTTP/1.1 200 OK\r\nX: " + b"a" * 70_000 + b"\r\n\r\n", "protocol"),
    (b"HTTP/1.1 200 OK\r\n" + b"X: a\r\n" * 201 + b"\r\n", "protocol"),
    (b"HTTP/1.1 200 OK\r\nX: a\0b\r\n\r\n", "protocol"),
    (b"HTTP/2 200\r\n\r\n", "protocol"),
    (b"SSH-2.0-OpenSSH_9.6\r\n", "protocol"),
    (b"\x15\x03\x01\x00\x02\x02\x28", "protocol"),
    (b"\x00" * 5000, "protocol"),
    (b"HTTP/1.1 200 OK\r\nconten", "cut"),
    (b"", "cut"),
]


@pytest.mark.parametrize(("raw", "expected"), HEADS, ids=range(len(HEADS)))
def test_what_comes_back_whole_and_byte_by_byte(run: Any, raw: bytes, expected: tuple[int, bytes] | str) -> None:
    async def whole(peer: Peer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await peer.request(reader)
        writer.write(raw)

    async def by_bytes(peer: Peer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await peer.request(reader)
        for index in range(len(raw)):
            writer.write(raw[index:index + 1])
            await asyncio.sleep(0)

    async def main(talk: Talk) -> None:
        async with serving(talk) as peer, transporting() as transport:
            async def once() -> tuple[int, bytes]:
                answer = await transport.request(peer.origin, REQUEST, TIMEOUTS)
                return answer.status, await body_of(answer)

            if isinstance(expected, str):
                failure = await failure_of(once())
                assert failure.reason == expected and failure.phase in ("head", "body")
            else:
                assert await once() == expected
            assert (peer.n_connections, len(peer.requests)) == (1, 1), "nothing is asked twice, no redirect is followed"
    run(main(whole))
    if len(raw) < 700:
        run(main(by_bytes))


def test_headers_are_given_in_small_letters_and_in_order(run: Any) -> None:
    async def main() -> None:
        raw = b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 7\r\nX-A: 1\r\nx-a: 2\r\nContent-Length: 0\r\n\r\n"
        async with serving(answers(raw)) as peer, transporting() as transport:
            answer = await transport.request(peer.origin, REQUEST, TIMEOUTS)
            assert answer.headers == [("retry-after", "7"), ("x-a", "1"), ("x-a", "2"), ("content-length", "0")]
            assert (answer.header("retry-after"), answer.header("x-a"), answer.header("none")) == ("7", "1", "")
            answer.abort()
    run(main())


def test_a_reset_inside_the_answer(run: Any) -> None:
    async def talk(peer: Peer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await peer.request(reader)
        writer.write(STREAM_HEAD + b"2\r\nab\r\n")
        await writer.drain()
        await asyncio.sleep(0.02)
        writer.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        writer.transport.abort()

    async def main() -> None:
        async with serving(talk) as peer, transporting() as transport:
            answer = await transport.request(peer.origin, REQUEST, TIMEOUTS)
            assert await answer.read() == b"ab"
            failure = await failure_of(answer.read())
            assert failure.reason in ("reset", "cut")
            answer.abort()
    run(main())


def test_an_answer_larger_than_is_taken(run: Any) -> None:
    async def main() -> None:
        async with serving(answers(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n" + b"x" * 100)) as peer, transporting() as transport:
            answer = await transport.request(peer.origin, REQUEST, TIMEOUTS)
            transport.bounds = aicarousel.Bounds(answer_bytes=99)
            assert told(await failure_of(answer.read_all(idle_s=5.0, within_s=5.0))) == ("too_big", "body")
            answer.abort()
            answer = await transport.request(peer.origin, REQUEST, TIMEOUTS)
            transport.bounds = aicarousel.Bounds(answer_bytes=100)
            assert await answer.read_all(idle_s=5.0, within_s=5.0) == b"x" * 100
            answer.release()
    run(main())


@pytest.mark.parametrize(("raw", "start", "parked"), [
    (b"HTTP/1.1 500 X\r\ncontent-length: 5\r\n\r\nhello", b"hello", 1),
    (b"HTTP/1.1 500 X\r\ncontent-length: 9\r\n\r\nhello", b"hello", 0),
    (STREAM_HEAD + b"5\r\nhello\r\n4\r\n wor\r\n2\r\nld\r\n0\r\n\r\n", b"hello worl", 1),
    (b"HTTP/1.1 500 X\r\n\r\nhello", b"hello", 0),
])
def test_the_start_of_an_error_body_is_enough(run: Any, raw: bytes, start: bytes, parked: int) -> None:
    async def main() -> None:
        async with serving(answers(raw, then="close")) as peer, transporting() as transport:
            answer = await transport.request(peer.origin, REQUEST, TIMEOUTS)
            assert await answer.read_start(10, idle_s=5.0) == start
            answer.release()
            assert transport.n_parked() == parked
    run(main())


def test_what_came_before_a_bad_chunk_is_not_lost(run: Any) -> None:
    async def main() -> None:
        async with serving(answers(STREAM_HEAD + b"9\r\ndata: 1\n\n\r\nzz\r\n")) as peer, transporting() as transport:
            answer = await transport.request(peer.origin, REQUEST, TIMEOUTS)
            try:
                assert await answer.read() == b"data: 1\n\n"
                assert told(await failure_of(answer.read())) == ("protocol", "body")
            finally:
                answer.abort()
    run(main())


# ------------------------------------------------------------------ compression that was not asked for

PLAIN = b'{"choices": [' + b"hello " * 400 + b"]}"
RAW_DEFLATE = zlib.compressobj(wbits=-15)
TWO_MEMBERS = gzip.compress(PLAIN[:1000]) + gzip.compress(PLAIN[1000:])
CODED = [                                   # content-encoding, body -> what is read, or the failure
    ("gzip", gzip.compress(PLAIN), PLAIN),
    ("GZip ", gzip.compress(PLAIN), PLAIN),
    ("x-gzip", gzip.compress(PLAIN), PLAIN),
    ("deflate", zlib.compress(PLAIN), PLAIN),
    ("identity", PLAIN, PLAIN),
    ("", PLAIN, PLAIN),
    ("gzip", gzip.compress(b""), b""),
    ("gzip", PLAIN, "protocol"),
    ("deflate", b"\xff" * 50, "protocol"),
    ("gzip", gzip.compress(PLAIN)[:-12], "cut"),
    ("gzip", gzip.compress(PLAIN)[:5], "cut"),
    ("gzip", gzip.compress(PLAIN)[:-8] + b"\0" * 8, "protocol"),
    ("gzip", gzip.compress(b"\0" * (40 << 20)), "too_big"),
    ("br", b"xx", "protocol"),
    ("zstd", b"xx", "protocol"),
    ("gzip, gzip", gzip.compress(gzip.compress(PLAIN)), "protocol"),
]


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(("coding", "body", "expected"), CODED, ids=range(len(CODED)))
def test_what_is_compressed_unasked(run: Any, coding: str, body: bytes, expected: bytes | str, chunked: bool) -> None:
    pieces = [body[start:start + 97] for start in range(0, min(len(body), 5000), 97)] + ([body[5044:]] if len(body) > 5044 else [])
    assert b"".join(pieces) == body
    framed = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n" if chunked else body
    framing = "transfer-encoding: chunked" if chunked else f"content-length: {len(body)}"

    async def main() -> None:
        async with serving(answers(f"HTTP/1.1 200 OK\r\ncontent-encoding: {coding}\r\n{framing}\r\n\r\n".encode() + framed)) as peer, transporting() as transport:
            if isinstance(expected, bytes):
                assert await ask(transport, peer.origin) == await ask(transport, peer.origin) == expected and peer.n_connections == 1
                return
            failure = await failure_of(ask(transport, peer.origin))
            assert failure.reason == expected
    run(main())


def test_a_gzip_body_of_two_members_is_read_whole_or_refused(run: Any) -> None:
    async def main() -> None:
        async with serving(answers(b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: %d\r\n\r\n" % len(TWO_MEMBERS) + TWO_MEMBERS)) as peer, transporting() as transport:
            try:
                body = await ask(transport, peer.origin)
            except UpstreamFailure as failure:
                assert failure.reason in ("protocol", "cut")
            else:
                assert body == PLAIN
    run(main())


def test_a_compressed_stream_is_inflated_as_it_comes(run: Any) -> None:
    async def main() -> None:
        gate = asyncio.Event()

        async def talk(peer: Peer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await peer.request(reader)
            engine = zlib.compressobj(wbits=31)
            for piece in (engine.compress(b"data: 1\n\n") + engine.flush(zlib.Z_SYNC_FLUSH), engine.compress(b"data: 2\n\n") + engine.flush()):
                writer.write((STREAM_HEAD.replace(b"\r\n\r\n", b"\r\ncontent-encoding: gzip\r\n\r\n") if not gate.is_set() else b"") + b"%x\r\n%s\r\n" % (len(piece), piece))
                await gate.wait()
            writer.write(b"0\r\n\r\n")

        async with serving(talk) as peer, transporting() as transport:
            answer = await transport.request(peer.origin, REQUEST, TIMEOUTS)
            assert await answer.read() == b"data: 1\n\n"
            gate.set()
            assert await answer.read() == b"data: 2\n\n" and await answer.read() == b""
            answer.release()
    run(main())


# ------------------------------------------------------------------ leaving

@pytest.mark.parametrize("phase", ["connect", "head", "body"])
def test_cancelling_closes_the_connection(run: Any, phase: str) -> None:
    async def main() -> None:
        async def accept_only(peer: Peer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()

        talk: Talk = {"connect": accept_only, "head": hush, "body": answers(STREAM_HEAD + b"2\r\nab\r\n", then="wait")}[phase]
        async with serving(talk) as peer, transporting() as transport:
            origin = peer.origin._replace(scheme="https") if phase == "connect" else peer.origin      # a handshake that is never answered
            answer = await transport.request(peer.origin, REQUEST, TIMEOUTS) if phase == "body" else None
            if answer:
                await answer.read()
            task = asyncio.ensure_future(answer.read() if answer else ask(transport, origin))
            await peer.until(lambda: peer.n_connections == 1 and (phase == "connect" or peer.requests))
            await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            if answer:
                answer.abort()
            async with asyncio.timeout(1):
                await peer.until(lambda: peer.n_closed == 1)
            assert transport.n_parked() == 0
    run(main())


# ------------------------------------------------------------------ TLS

def tls_server(name: str = "good", seen: list[str | None] | None = None, version: ssl.TLSVersion | None = None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(TLS / f"{name}.pem")
    if version is not None:
        context.minimum_version = context.maximum_version = version
    if seen is not None:
        context.sni_callback = lambda _, sni, __: seen.append(sni)
    return context


@pytest.fixture
def trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Certificates signed by the test's own authority are good."""
    monkeypatch.setenv("SSL_CERT_FILE", str(TLS / "ca.pem"))


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_tls_names_its_host_and_resumes_its_session(run: Any, trusted: None, version: ssl.TLSVersion) -> None:
    async def main() -> None:
        seen: list[str | None] = []
        async with serving(answers(OK, OK, OK), tls_server(seen=seen, version=version)) as peer, transporting() as transport:
            origin = peer.origin._replace(host="localhost")
            assert await ask(transport, origin) == await ask(transport, origin) == b"ok" and peer.n_connections == 1
            first = await transport.request(origin, REQUEST, TIMEOUTS)          # takes the one that waits
            assert await ask(transport, origin) == b"ok" and await body_of(first) == b"ok"
            assert [fact["reused"] for fact in peer.facts] == [False, True] and set(seen) == {"localhost"}
            third = [await transport.request(origin, REQUEST, TIMEOUTS) for _ in range(3)]
            assert [await body_of(answer) for answer in third] == [b"ok"] * 3 and [fact["reused"] for fact in peer.facts] == [False, True, True]
    run(main())


def test_tls_sessions_resume_where_connections_do_not_last(run: Any, trusted: None) -> None:
    async def main() -> None:
        closing = OK.replace(b"content-length", b"connection: close\r\ncontent-length")
        async with serving(answers(closing, then="close"), tls_server()) as peer, transporting() as transport:
            assert [await ask(transport, peer.origin) for _ in range(3)] == [b"ok"] * 3
            assert [fact["reused"] for fact in peer.facts] == [False, True, True]
    run(main())


def test_an_address_is_verified_and_not_sent_as_a_name(run: Any, trusted: None) -> None:
    async def main() -> None:
        seen: list[str | None] = []
        async with serving(answers(OK), tls_server(seen=seen)) as peer, transporting() as transport:
            assert await ask(transport, peer.origin) == b"ok" and seen == [None]
            await ask(transport, peer.origin._replace(host="localhost"))
            assert [fact["reused"] for fact in peer.facts] == [False, False], "a session belongs to its host"
    run(main())


@pytest.mark.parametrize(("certificate", "words"), [("wrong_name", "mismatch"), ("untrusted", "self"), ("expired", "expired")])
def test_certificates_that_are_not_good(run: Any, trusted: None, certificate: str, words: str) -> None:
    async def main() -> None:
        async with serving(answers(OK), tls_server(certificate)) as peer, transporting() as transport:
            failure = await failure_of(ask(transport, peer.origin))
            assert told(failure) == ("tls", "connect") and words in failure.detail.lower() and failure.scope == "provider"
            assert peer.requests == [], "no key goes to a stranger"
    run(main())


def test_an_unknown_authority_is_not_trusted(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)

    async def main() -> None:
        async with serving(answers(OK), tls_server()) as peer, transporting() as transport:
            assert told(await failure_of(ask(transport, peer.origin))) == ("tls", "connect") and peer.requests == []
    run(main())


def test_plain_http_on_a_tls_port_and_the_other_way_round(run: Any, trusted: None) -> None:
    async def rude(peer: Peer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(10)
        writer.write(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n")

    async def main() -> None:
        async with serving(rude) as peer, transporting() as transport:
            assert told(await failure_of(ask(transport, peer.origin._replace(scheme="https")))) == ("tls", "connect")
        async with serving(answers(OK), tls_server()) as peer, transporting() as transport:
            failure = await failure_of(ask(transport, peer.origin._replace(scheme="http")))
            assert failure.reason in ("cut", "reset", "protocol") and failure.phase == "head"
    run(main())


def test_a_handshake_that_takes_too_long_or_breaks_off(clock: ShiftedLoop, trusted: None) -> None:
    async def silent(peer: Peer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async def leaving(peer: Peer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(10)

    async def main() -> None:
        async with serving(silent) as peer, transporting() as transport:
            task = await advanced(clock, peer, ask(transport, peer.origin._replace(scheme="https"), Timeouts(connect_s=10)), lambda: peer.n_connections, 11)
            assert told(await failure_of(task)) == ("timeout", "connect")      # type: ignore[arg-type]
            await peer.until(lambda: peer.n_closed == 1)
        async with serving(leaving) as peer, transporting() as transport:
            failure = await failure_of(ask(transport, peer.origin._replace(scheme="https")))
            assert failure.reason in ("tls", "reset") and failure.phase == "connect"
    clock.run_until_complete(main())


def test_old_tls_is_not_spoken_and_one_context_is_made() -> None:
    context = make_client_context()
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2 and context.verify_mode == ssl.CERT_REQUIRED and context.check_hostname
    transport = Transport(World(None, None, None, None, None))      # type: ignore[arg-type]
    assert transport._tls_context() is transport._tls_context()


def test_tls_cut_without_a_goodbye_is_a_cut(run: Any, trusted: None) -> None:
    async def talk(peer: Peer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await peer.request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf")
        await writer.drain()
        await asyncio.sleep(0.02)
        writer.transport.abort()

    async def main() -> None:
        async with serving(talk, tls_server()) as peer, transporting() as transport:
            failure = await failure_of(ask(transport, peer.origin))
            assert failure.reason in ("cut", "reset", "tls") and failure.phase in ("body", "idle", "head")
    run(main())


# ------------------------------------------------------------------ proxies

def proxying(status: bytes = b"200 Connection established", extra: bytes = b"") -> Talk:
    """A proxy that tunnels to where it is told, or answers `status`."""
    async def talk(peer: Peer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await peer.request(reader)
        if not status.startswith(b"200"):
            writer.write(b"HTTP/1.1 " + status + b"\r\ncontent-length: 5\r\n\r\nsorry")
            await reader.read()
            return
        host, _, port = head.split(b" ")[1].rpartition(b":")
        far_reader, far_writer = await asyncio.open_connection(host.decode().strip("[]"), int(port))
        writer.write(b"HTTP/1.1 " + status + b"\r\nproxy-agent: x\r\n\r\n" + extra)

        async def pump(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
            while data := await source.read(65536):
                target.write(data)
            target.close()
        await asyncio.gather(pump(reader, far_writer), pump(far_reader, writer), return_exceptions=True)
    return talk


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize("login", ["", "ann:p%40ss%3Aw%C3%B6rd", "ann"])
def test_through_a_proxy_by_connect(run: Any, trusted: None, login: str, secure: bool) -> None:
    async def main() -> None:
        seen: list[str | None] = []
        async with serving(answers(OK), tls_server(seen=seen) if secure else None) as peer, serving(proxying()) as proxy, transporting() as transport:
            origin = peer.origin._replace(host="localhost", proxy=f"http://{login + '@' if login else ''}127.0.0.1:{proxy.port}")
            assert [await ask(transport, origin) for _ in range(3)] == [b"ok"] * 3
            assert (peer.n_connections, proxy.n_connections, len(peer.requests)) == (1, 1, 3)
            lines = proxy.requests[0].decode().split("\r\n")
            assert lines[:2] == [f"CONNECT localhost:{peer.port} HTTP/1.1", f"Host: localhost:{peer.port}"]
            words = [base64.b64decode(line.split(" ")[2]).decode() for line in lines if line.startswith("Proxy-Authorization: Basic ")]
            assert words == ({"": [], "ann": ["ann:"]}.get(login) if login in ("", "ann") else ["ann:p@ss:w\u00f6rd"])
            assert b"Proxy-Authorization" not in peer.requests[0] and seen == (["localhost"] if secure else [])
            assert await ask(transport, origin._replace(proxy="")) == b"ok" and (peer.n_connections, proxy.n_connections) == (2, 1), "the pool keeps them apart"
            if secure:
                assert [fact["reused"] for fact in peer.facts] == [False, True]
    run(main())


@pytest.mark.parametrize(("status", "extra"), [(b"407 Proxy Authentication Required", b""), (b"403 Forbidden", b""), (b"502 Bad Gateway", b""), (b"200 OK", b"unasked")])
def test_a_proxy_that_refuses(run: Any, trusted: None, status: bytes, extra: bytes) -> None:
    async def main() -> None:
        async with serving(answers(OK), tls_server()) as peer, serving(proxying(status, extra)) as proxy, transporting() as transport:
            failure = await failure_of(ask(transport, peer.origin._replace(proxy=f"http://ann:secret-word@127.0.0.1:{proxy.port}")))
            assert failure.kind == "network" and failure.phase == "connect" and status[:3].decode() in failure.detail and "secret-word" not in str(failure)
            assert peer.requests == []
            await proxy.until(lambda: proxy.n_closed == 1)
    run(main())


def test_a_proxy_that_is_none(run: Any) -> None:
    async def main() -> None:
        async with transporting() as transport:
            for talk, reason in ((dying(0), "cut"), (dying(0, b"SSH-2.0-x\r\n\r\n"), "protocol"), (dying(0, b"HTTP/1.1 200 OK\n\n"), "protocol")):
                async def connect_only(peer: Peer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, talk: Talk = talk) -> None:
                    await talk(peer, reader, writer)
                async with serving(connect_only) as proxy:
                    failure = await failure_of(ask(transport, Origin("http", "127.0.0.1", 9, f"http://127.0.0.1:{proxy.port}")))
                    assert told(failure) == (reason, "connect")
            with socket.socket() as holder:
                holder.bind(("127.0.0.1", 0))
                failure = await failure_of(ask(transport, Origin("http", "127.0.0.1", 9, f"http://127.0.0.1:{holder.getsockname()[1]}")))
                assert told(failure) == ("refused", "connect")
    run(main())


def test_a_bad_certificate_behind_a_proxy(run: Any, trusted: None) -> None:
    async def main() -> None:
        async with serving(answers(OK), tls_server("wrong_name")) as peer, serving(proxying()) as proxy, transporting() as transport:
            failure = await failure_of(ask(transport, peer.origin._replace(proxy=f"http://127.0.0.1:{proxy.port}")))
            assert told(failure) == ("tls", "connect") and peer.requests == []
            await proxy.until(lambda: proxy.n_closed == 1)
    run(main())


def test_a_proxy_that_says_nothing(clock: ShiftedLoop) -> None:
    async def main() -> None:
        async with serving(hush) as proxy, transporting() as transport:
            task = await advanced(clock, proxy, ask(transport, Origin("http", "127.0.0.1", 9, f"http://127.0.0.1:{proxy.port}")), lambda: proxy.requests, 11)
            assert told(await failure_of(task)) == ("timeout", "connect")      # type: ignore[arg-type]
            await proxy.until(lambda: proxy.n_closed == 1)
    clock.run_until_complete(main())


PROXY, OTHER = "http://127.0.0.1:3128", "http://127.0.0.1:3129"
FAR, NEAR = "https://api.example.com/v1", "http://127.0.0.1:8000/v1"
WHICH_PROXY = [                             # base URL, provider's proxy, key's proxy, environment -> proxy
    (FAR, None, None, {}, ""),
    (FAR, None, None, {"HTTPS_PROXY": PROXY}, PROXY),
    (FAR, None, None, {"https_proxy": PROXY}, PROXY),
    (FAR, None, None, {"HTTP_PROXY": PROXY}, ""),
    (FAR, None, None, {"HTTPS_PROXY": PROXY, "NO_PROXY": "example.com"}, ""),
    (FAR, None, None, {"HTTPS_PROXY": PROXY, "NO_PROXY": ".example.com, other.org"}, ""),
    (FAR, None, None, {"HTTPS_PROXY": PROXY, "no_proxy": "*"}, ""),
    (FAR, None, None, {"HTTPS_PROXY": PROXY, "NO_PROXY": "ample.com"}, PROXY),
    (FAR, OTHER, None, {"HTTPS_PROXY": PROXY}, OTHER),
    (FAR, OTHER, None, {"HTTPS_PROXY": PROXY, "NO_PROXY": "*"}, OTHER),
    (FAR, "", None, {"HTTPS_PROXY": PROXY}, ""),
    (FAR, None, OTHER, {"HTTPS_PROXY": PROXY}, OTHER),
    (FAR, PROXY, OTHER, {}, OTHER),
    (FAR, PROXY, "", {"HTTPS_PROXY": OTHER}, ""),
    (NEAR, None, None, {"HTTPS_PROXY": PROXY, "HTTP_PROXY": PROXY}, ""),
    (NEAR, OTHER, None, {"HTTP_PROXY": PROXY}, OTHER),
    ("http://[::1]:8000/v1", None, None, {"HTTP_PROXY": PROXY}, ""),
    ("http://localhost/v1", None, None, {"HTTP_PROXY": PROXY}, ""),
]


def relay_for(url: str, provider_proxy: str | None = None, key_proxy: str | None = None, environment: dict[str, str] | None = None, **fields: Any) -> tuple[Relay, Any]:
    key = {"key": "env:A_KEY", **({"proxy": key_proxy} if key_proxy is not None else {}), **fields.pop("key", {})}
    models = {"p": {"baseUrl": url, "default": "m", "enableFallback": True, "models": ["m"], "keys": [key], **({"proxy": provider_proxy} if provider_proxy is not None else {}), **fields}}
    config = load_config(json.dumps(models), models_path="models.json", environment={"A_KEY": "fake-key-1", **(environment or {})}, dotenv={}, flags={})
    relay = Relay(SimpleNamespace(clock=lambda: 0.0, utc=lambda: 0.0), None, lambda _: None, "aicarousel/test")      # type: ignore[arg-type]
    relay.configure(config)
    return relay, resolve(build_catalogue(config), "p").groups[0][0][0]


def job(stream: bool = False, idempotency_key: str = "") -> Job:
    return Job("r", b"{}", {}, "m", stream, 0.0, idempotency_key=idempotency_key)


@pytest.mark.parametrize(("url", "provider_proxy", "key_proxy", "environment", "expected"), WHICH_PROXY, ids=range(len(WHICH_PROXY)))
def test_which_proxy_a_key_goes_through(url: str, provider_proxy: str | None, key_proxy: str | None, environment: dict[str, str], expected: str) -> None:
    relay, route = relay_for(url, provider_proxy, key_proxy, environment)
    assert relay.message(route, job(), b"{}", "/chat/completions")[0].proxy == expected


def test_a_key_goes_through_its_own_proxy(run: Any) -> None:
    async def main() -> None:
        async with serving(answers(OK)) as peer, serving(proxying()) as proxy, transporting() as transport:
            relay, route = relay_for(f"http://127.0.0.1:{peer.port}/v1", None, f"http://127.0.0.1:{proxy.port}")
            origin, message = relay.message(route, job(), b"{}", "/chat/completions")
            assert await body_of(await transport.request(origin, message, TIMEOUTS)) == b"ok" and proxy.n_connections == 1
            assert peer.requests == [message]
    run(main())


@pytest.mark.parametrize(("url", "origin", "host", "target"), [
    ("https://api.example.com/v1", Origin("https", "api.example.com", 443), "api.example.com", "/v1/chat/completions"),
    ("https://api.example.com:8443/openai/v1/", Origin("https", "api.example.com", 8443), "api.example.com:8443", "/openai/v1/chat/completions"),
    ("http://127.0.0.1:8000", Origin("http", "127.0.0.1", 8000), "127.0.0.1:8000", None),
    ("http://[::1]:8000/v1", Origin("http", "::1", 8000), "[::1]:8000", "/v1/chat/completions"),
    ("http://localhost/v1", Origin("http", "localhost", 80), "localhost", "/v1/chat/completions"),
])
def test_where_a_request_goes(url: str, origin: Origin, host: str, target: str | None) -> None:
    relay, route = relay_for(url)
    found, message = relay.message(route, job(), b'{"a":1}', "/chat/completions")
    head, _, body = message.partition(b"\r\n\r\n")
    start, *rows = head.decode().split("\r\n")
    headers = dict(row.split(": ", 1) for row in rows)
    assert found == origin and headers["Host"] == host and body == b'{"a":1}' and headers["Content-Length"] == "7"
    assert target is None or start == f"POST {target} HTTP/1.1"
    assert {name.lower() for name in headers} == {"host", "user-agent", "content-type", "accept-encoding", "authorization", "accept", "content-length"}
    assert (headers["Accept-Encoding"], headers["authorization"], headers["Accept"]) == ("identity", "Bearer fake-key-1", "application/json")


def test_headers_of_the_request_are_configured_ones_and_later_ones_win() -> None:
    relay, route = relay_for(FAR, headers={"X-Title": "A", "user-agent": "mine/1"}, key={"headers": {"X-Title": "B", "X-Team": "b"}})
    message = relay.message(route, job(True, "once-1"), b"{}", "/chat/completions")[1].decode()
    for line in ("X-Title: B", "X-Team: b", "user-agent: mine/1", "Idempotency-Key: once-1", "Accept: text/event-stream"):
        assert f"\r\n{line}\r\n" in message
    assert "X-Title: A" not in message and "aicarousel/test" not in message
    assert "Idempotency-Key" not in relay.message(route, job(), b"{}", "/chat/completions")[1].decode(), "what is kept per route is not one request's own"


@pytest.mark.parametrize(("host", "no_proxy", "covered"), [
    ("a.example.com", ("example.com",), True), ("a.example.com", (".example.com",), True), ("example.com", (".example.com",), True), ("A.Example.COM", ("example.com",), True),
    ("a.example.com", ("a.EXAMPLE.com",), True), ("badexample.com", ("example.com",), False), ("example.com", ("a.example.com",), False), ("x", ("*",), True), ("x", (), False),
    ("127.0.0.1", ("127.0.0.1",), True), ("10.0.0.1", ("0.0.1",), True), ("x", ("",), False),
])
def test_no_proxy_names_hosts_and_domains(host: str, no_proxy: tuple[str, ...], covered: bool) -> None:
    assert no_proxy_covers(host, no_proxy) is covered


@pytest.mark.parametrize(("url", "parts"), [
    ("https://a.b/v1", ("https", "a.b", 443, "/v1")), ("http://a.b", ("http", "a.b", 80, "")), ("http://[::1]:8/x/y", ("http", "::1", 8, "/x/y")), ("HTTPS://A.b:1/", ("https", "a.b", 1, "/")),
])
def test_split_url(url: str, parts: tuple[str, str, int, str]) -> None:
    assert split_url(url) == parts
