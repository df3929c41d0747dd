"""Section 35, Server: what it accepts, refuses and answers on real sockets, before any application has a say.

The server runs in a thread on a loop whose time the test moves; the tests at the end stop whole gateways by signals.
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import aicarousel
from fakes import DONE, FAKE_KEY, FINISH, HANG_S, ROLE, Client, Gateway, InLoop, Pause, Provider, Reply, content, read_reply, stream, unchunk

MAX_BODY = 100_000
BIG = b"0123456789abcdef" * 400_000         # 6.4 MB: more than any socket takes at once


class Echo:
    """An application with a path for each thing a handler can do."""

    def __init__(self) -> None:
        self.bounds = aicarousel.Bounds(body_bytes=MAX_BODY)
        self.seen: list[aicarousel.Request] = []
        self.done: list[str] = []
        self.gate = asyncio.Event()
        self.gone = threading.Event()

    def admit(self, request: aicarousel.Request) -> Callable[[aicarousel.Request, aicarousel.Exchange], Any]:
        if request.path == "/refuse":
            raise aicarousel.unauthorized("no")
        return getattr(self, request.path.strip("/"))

    def explain(self, request: aicarousel.Request | None, error: aicarousel.GatewayError) -> tuple[aicarousel.Headers, bytes]:
        return [("content-type", "application/json")], json.dumps({"error": error.message}).encode()

    async def echo(self, request: aicarousel.Request, exchange: aicarousel.Exchange) -> None:
        self.seen.append(request)
        exchange.respond(200, [("x-path", request.path), ("x-query", request.query)], b"<" + request.body + b">")

    async def big(self, request: aicarousel.Request, exchange: aicarousel.Exchange) -> None:
        exchange.respond(200, [], BIG)

    async def pages(self, request: aicarousel.Request, exchange: aicarousel.Exchange) -> None:
        exchange.respond(200, [], BIG[:40_000])

    async def pieces(self, request: aicarousel.Request, exchange: aicarousel.Exchange) -> None:
        exchange.start(200, [])
        for piece in (b"one ", b"two ", b"three"):
            exchange.write(piece)
            await asyncio.sleep(0)
        exchange.finish()

    async def wait(self, request: aicarousel.Request, exchange: aicarousel.Exchange) -> None:
        """Streams a word, and another one when the test says so, whatever the client does."""
        exchange.start(200, [])
        exchange.write(b"first ")
        await self.gate.wait()
        exchange.write(b"last")
        exchange.finish()
        self.done.append("wait")

    async def work(self, request: aicarousel.Request, exchange: aicarousel.Exchange) -> None:
        """Works as long as the client is there."""
        exchange.cancel_when_gone()
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            if not exchange.interrupted:
                self.gone.set()
                raise
            asyncio.current_task().uncancel()      # type: ignore[union-attr]
        exchange.respond(200, [], exchange.interrupted.encode() or b"worked")

    async def crash(self, request: aicarousel.Request, exchange: aicarousel.Exchange) -> None:
        if request.query:
            exchange.start(200, [])
            exchange.write(b"half of it")
        raise ValueError("secret detail of a bug")

    async def cut(self, request: aicarousel.Request, exchange: aicarousel.Exchange) -> None:
        exchange.start(200, [])
        exchange.write(b"half of it")
        await exchange.flush()
        exchange.cut()


class Hall(InLoop):
    """A Server around Echo, in a thread."""

    def __init__(self, n_sockets: int = 1) -> None:
        self.run_loop()
        self.complaints: list[str] = []
        self.loop.set_exception_handler(lambda loop, context: self.complaints.append(str(context.get("exception") or context["message"])))
        self.do(lambda: self._open(n_sockets))

    async def _open(self, n_sockets: int) -> None:
        self.app = Echo()
        self.server = aicarousel.Server(self.app, aicarousel.real_world())
        sockets = [aicarousel.bind("127.0.0.1", 0)[0] for _ in range(n_sockets)]
        await self.server.listen(sockets)
        self.ports = [listening.getsockname()[1] for listening in sockets]

    def connect(self, receive_buffer: int = 0) -> Client:
        client = Client(self.ports[0], receive_buffer=receive_buffer)
        client.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return client

    def drain(self, within_s: float) -> asyncio.Future[None]:
        """Begins to drain."""
        async def begin() -> asyncio.Future[None]:
            return asyncio.ensure_future(self.server.drain(within_s))
        task = self.do(begin)
        self.settle()
        return task

    def close(self) -> None:
        self.do(lambda: self.server.drain(0.0))
        self.end_loop()
        self.loop.close()
        assert not self.complaints, self.complaints


@pytest.fixture
def hall() -> Iterator[Hall]:
    hall = Hall()
    yield hall
    hall.close()


@pytest.fixture(scope="module")
def common_hall() -> Iterator[Hall]:
    """One server for the tests that neither move its time nor stop it."""
    hall = Hall()
    yield hall
    hall.close()


def request(method: str = "GET", target: str = "/echo", *rows: str, body: bytes = b"", version: str = "1.1", host: str = "localhost") -> bytes:
    """A request as it goes over the wire; with a body its length is told."""
    lines = [f"{method} {target} HTTP/{version}", *([f"Host: {host}"] if host else []), *rows, *([f"Content-Length: {len(body)}"] if body else [])]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def chunked(*chunks: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    """A POST with a chunked body."""
    return request("POST", "/echo", "Transfer-Encoding: chunked") + b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + end


def replies_in(raw: bytes, head_only: bool = False) -> list[Reply]:
    """Every whole response in `raw`, informational ones included."""
    found = []
    while (end := raw.find(b"\r\n\r\n") + 4) >= 4:
        head = raw[:end].lower()
        if head.startswith(b"http/1.1 1") or head_only:
            size = end
        elif b"chunked" in head:
            used = unchunk(raw[end:]).used
            size = end + used if used else len(raw) + 1
        else:
            size = end + int(head.partition(b"content-length: ")[2].split(b"\r\n")[0] or 0)
        if size > len(raw):
            break
        one = raw[:size]
        found.append(Reply(one, int(one[9:12]), {}, [], b"", True, "left", 0.0) if one.startswith(b"HTTP/1.1 1") else read_reply(one, "left"))
        raw = raw[size:]
    return found


def statuses(raw: bytes) -> list[int]:
    return [reply.status for reply in replies_in(raw)]


def is_open(client: Client) -> bool:
    """Whether the connection still serves."""
    before = len(client.raw)
    client.ended = ""
    try:
        client.send(request(target="/echo?probe"))
        client.read_until(lambda raw: b"x-query: probe" in raw[before:] and raw.endswith(b"<>"))
    except ConnectionError:
        return False
    return client.ended == ""


# ---------------------------------------------------------------- one connection, some bytes, these answers

OPEN, CLOSED = True, False
EXCHANGES: dict[str, tuple[bytes, list[int], bool]] = {      # sent, statuses that come back, whether the connection goes on
    "plain": (request(), [200], OPEN),
    "connection close": (request("GET", "/echo", "Connection: close"), [200], CLOSED),
    "connection Close in a list": (request("GET", "/echo", "Connection: foo, Close"), [200], CLOSED),
    "HTTP/1.0": (request(version="1.0"), [200], CLOSED),
    "HTTP/1.0 without host": (request(version="1.0", host=""), [200], CLOSED),
    "HTTP/1.0 keep-alive": (request("GET", "/echo", "Connection: Keep-Alive", version="1.0"), [200], OPEN),
    "three pipelined": (request(target="/echo?1") + request("POST", "/echo", body=b"2") + request(target="/pieces"), [200, 200, 200], OPEN),
    "pipelined behind close": (request("GET", "/echo", "Connection: close") + request(), [200], CLOSED),
    "pipelined behind a refusal": (request(target="/refuse") + request(), [401, 200], OPEN),
    "blank lines first": (b"\r\n\r\n" + request(), [200], OPEN),
    "blank line between": (request() + b"\r\n" + request(), [200, 200], OPEN),
    "blank line behind a body": (request("POST", "/echo", body=b"x") + b"\r\n" + request(), [200, 200], OPEN),
    "absolute form": (request(target="http://localhost/echo?a=1"), [200], OPEN),
    "absolute form, https": (request(target="HTTPS://localhost:1/echo"), [200], OPEN),
    "absolute form, other scheme": (request(target="ftp://localhost/echo"), [400], CLOSED),
    "asterisk form": (request("OPTIONS", "*"), [400], CLOSED),
    "authority form": (request("CONNECT", "localhost:443"), [400], CLOSED),
    "fragment": (request(target="/echo#part"), [400], CLOSED),
    "target with a NUL": (request(target="/echo?%00"), [400], CLOSED),
    "target beyond ASCII": (request(target="/echo?\xe9"), [400], CLOSED),
    "target with a space": (request(target="/echo ?a"), [400], CLOSED),
    "target with a control": (request(target="/echo\x07"), [400], CLOSED),
    "longest target": (request(target="/echo?" + "a" * (8192 - 6)), [200], OPEN),
    "target too long": (request(target="/echo?" + "a" * (8193 - 6)), [414], CLOSED),
    "100 headers": (request("GET", "/echo", *(f"X-{number}: 1" for number in range(99))), [200], OPEN),
    "101 headers": (request("GET", "/echo", *(f"X-{number}: 1" for number in range(100))), [431], CLOSED),
    "large head": (request("GET", "/echo", "X: " + "a" * 60_000), [200], OPEN),
    "head too large": (request("GET", "/echo", "X: " + "a" * 66_000), [431], CLOSED),
    "endless header": (b"GET /echo HTTP/1.1\r\nX: " + b"a" * 70_000, [431], CLOSED),
    "HTTP/2.0": (request(version="2.0"), [505], CLOSED),
    "HTTP/1.2": (request(version="1.2"), [505], CLOSED),
    "version junk": (b"GET /echo HTTP/x.y\r\nHost: a\r\n\r\n", [400], CLOSED),
    "HTTP/0.9": (b"GET /echo\r\n\r\n", [400], CLOSED),
    "HTTP/2 preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", [505], CLOSED),
    "TLS on a plain port": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", [400], CLOSED),
    "lone LF": (b"GET /echo HTTP/1.1\nHost: localhost\n\n", [400], CLOSED),
    "LF inside": (b"GET /echo HTTP/1.1\r\nHost: localhost\r\nX: a\nTransfer-Encoding: chunked\r\n\r\n", [400], CLOSED),
    "CR inside": (b"GET /echo HTTP/1.1\r\nHost: localhost\r\nX: a\rb\r\n\r\n", [400], CLOSED),
    "NUL in a value": (request("GET", "/echo", "X: a\x00b"), [400], CLOSED),
    "no colon": (request("GET", "/echo", "Nonsense"), [400], CLOSED),
    "space before colon": (request("GET", "/echo", "X : a"), [400], CLOSED),
    "method junk": (request("G\x01T"), [400], CLOSED),
    "no host": (request(host=""), [400], CLOSED),
    "two hosts": (request("GET", "/echo", "Host: other"), [400], CLOSED),
    "two authorizations": (request("GET", "/echo", "Authorization: Bearer a", "Authorization: Bearer b"), [400], CLOSED),
    "two lengths": (request("POST", "/echo", "Content-Length: 5", body=b"x"), [400], CLOSED),
    "length list": (request("POST", "/echo", "Content-Length: 1, 2"), [400], CLOSED),
    "length signed": (request("POST", "/echo", "Content-Length: +1") + b"x", [400], CLOSED),
    "length negative": (request("POST", "/echo", "Content-Length: -1"), [400], CLOSED),
    "length hex": (request("POST", "/echo", "Content-Length: 0x1") + b"x", [400], CLOSED),
    "length empty": (request("POST", "/echo", "Content-Length:"), [400], CLOSED),
    "length beyond all": (request("POST", "/echo", "Content-Length: " + "9" * 30), [400], CLOSED),
    "length and coding": (request("POST", "/echo", "Content-Length: 5", "Transfer-Encoding: chunked") + b"0\r\n\r\n", [400], CLOSED),
    "coding gzip": (request("POST", "/echo", "Transfer-Encoding: gzip, chunked"), [501], CLOSED),
    "coding twice": (request("POST", "/echo", "Transfer-Encoding: chunked", "Transfer-Encoding: chunked"), [501], CLOSED),
    "coding in HTTP/1.0": (request("POST", "/echo", "Transfer-Encoding: chunked", version="1.0") + b"0\r\n\r\n", [501], CLOSED),
    "chunked": (chunked(b"one", b"two") + request(), [200, 200], OPEN),
    "chunked, empty": (chunked(), [200], OPEN),
    "chunked with trailers": (chunked(b"one", end=b"0\r\nX: y\r\n\r\n") + request(), [200, 200], OPEN),
    "chunk extension": (request("POST", "/echo", "Transfer-Encoding: chunked") + b"3;a=b\r\none\r\n0\r\n\r\n", [400], CLOSED),
    "chunk size junk": (request("POST", "/echo", "Transfer-Encoding: chunked") + b"zz\r\none\r\n0\r\n\r\n", [400], CLOSED),
    "chunk size negative": (request("POST", "/echo", "Transfer-Encoding: chunked") + b"-3\r\none\r\n", [400], CLOSED),
    "chunk size huge": (request("POST", "/echo", "Transfer-Encoding: chunked") + b"fffffffff\r\n", [400], CLOSED),
    "chunk longer than said": (request("POST", "/echo", "Transfer-Encoding: chunked") + b"2\r\none\r\n0\r\n\r\n", [400], CLOSED),
    "chunk with lone LF": (request("POST", "/echo", "Transfer-Encoding: chunked") + b"3\none\n0\n\n", [400], CLOSED),
    "body at the limit": (request("POST", "/echo", body=b"x" * MAX_BODY), [200], OPEN),
    "body over the limit": (request("POST", "/echo", body=b"x" * (MAX_BODY + 1)), [413], CLOSED),
    "body over the limit, not sent": (request("POST", "/echo", f"Content-Length: {MAX_BODY + 1}"), [413], CLOSED),
    "body over the limit, expected": (request("POST", "/echo", "Expect: 100-continue", f"Content-Length: {MAX_BODY + 1}"), [413], CLOSED),
    "chunks over the limit": (chunked(b"x" * 60_000, b"x" * 60_000), [413], CLOSED),
    "one chunk over the limit, not finished": (request("POST", "/echo", "Transfer-Encoding: chunked") + b"7fffffff\r\n" + b"x" * (MAX_BODY + 1), [413], CLOSED),
    "expect, body there": (request("POST", "/echo", "Expect: 100-continue", body=b"x"), [200], OPEN),
    "expect, other": (request("POST", "/echo", "Expect: 200-maybe", "Content-Length: 1"), [417], CLOSED),
    "expect without a body": (request("GET", "/echo", "Expect: 100-continue"), [200], OPEN),
    "refused without a body": (request(target="/refuse"), [401], OPEN),
    "refused with length 0": (request("POST", "/refuse", "Content-Length: 0"), [401], OPEN),
    "refused with a body": (request("POST", "/refuse", body=b"x" * 50_000), [401], CLOSED),
    "refused with a chunked body": (request("POST", "/refuse", "Transfer-Encoding: chunked") + b"3\r\none\r\n", [401], CLOSED),
    "refused though it expects": (request("POST", "/refuse", "Expect: 100-continue", "Content-Length: 5"), [401], CLOSED),
    "GET with a body": (request("GET", "/echo", body=b"x") + request(), [200, 200], OPEN),
    "crash": (request(target="/crash"), [500], CLOSED),
}


@pytest.mark.parametrize("name", EXCHANGES)
def test_exchange(common_hall: Hall, name: str, caplog: pytest.LogCaptureFixture) -> None:
    sent, expected, stays_open = EXCHANGES[name]
    with common_hall.connect() as client:
        client.send(sent)
        client.read_until(lambda raw: len(statuses(raw)) >= len(expected))
        assert statuses(bytes(client.raw)) == expected, client.raw[:2000]
        if stays_open:
            assert is_open(client)
            assert b"connection: close" not in client.raw
        else:
            client.read_all()
            assert client.ended == "eof" and statuses(bytes(client.raw)) == expected, (client.ended, client.raw[:2000])
            assert b"\r\nconnection: close\r\n" in client.raw
        assert len(replies_in(bytes(client.raw))) == len(expected) + stays_open
    assert b"Traceback" not in client.raw and b"secret detail" not in client.raw


def test_pipelined_answers_come_in_order(common_hall: Hall) -> None:
    with common_hall.connect() as client:
        client.send(b"".join(request("POST", f"/echo?{number}", body=b"%d" % number) if number % 3 else request(target=f"/pieces?{number}") for number in range(30)))
        client.read_until(lambda raw: len(statuses(raw)) == 30)
        assert [reply.body for reply in replies_in(bytes(client.raw))] == [b"<%d>" % number if number % 3 else b"one two three" for number in range(30)]


def test_absolute_form_is_taken_by_its_path(common_hall: Hall) -> None:
    with common_hall.connect() as client:
        client.send(request(target="http://elsewhere:99/echo?a=/b"))
        client.read_until(b"<>")
    assert (client.reply().headers["x-path"], client.reply().headers["x-query"]) == ("/echo", "a=/b")


def test_head_has_no_body_but_its_length(common_hall: Hall) -> None:
    with common_hall.connect() as client:
        client.send(request("HEAD", "/big") + request("HEAD", "/pieces") + request("HEAD", "/refuse") + request(target="/echo?end"))
        raw = client.read_until(b"<>")
        heads = raw.split(b"\r\n\r\n")
        assert [head[:12] for head in heads[:4]] == [b"HTTP/1.1 200", b"HTTP/1.1 200", b"HTTP/1.1 401", b"HTTP/1.1 200"] and heads[4] == b"<>"
        assert f"content-length: {len(BIG)}".encode() in heads[0]


def test_streams_of_each_version(common_hall: Hall) -> None:
    """1.1: chunked, and the connection goes on; 1.0: until the end of the connection."""
    with common_hall.connect() as client:
        client.send(request(target="/pieces"))
        client.read_until(b"0\r\n\r\n")
        assert client.reply().body == b"one two three" and is_open(client)
    with common_hall.connect() as client:
        client.send(request("GET", "/pieces", "Connection: keep-alive", version="1.0"))
        reply = client.read_all()
        assert reply.body == b"one two three" and "transfer-encoding" not in reply.headers and reply.headers["connection"] == "close" and client.ended == "eof"


def test_http_1_0_is_told_that_the_connection_goes_on(common_hall: Hall) -> None:
    with common_hall.connect() as client:
        client.send(request("GET", "/echo", "Connection: keep-alive", version="1.0"))
        client.read_until(b"<>")
        assert client.reply().headers["connection"].lower() == "keep-alive"


def test_every_answer_is_dated(common_hall: Hall) -> None:
    with common_hall.connect() as client:
        client.send(request())
        client.read_until(b"<>")
        from email.utils import parsedate_to_datetime
        assert parsedate_to_datetime(client.reply().headers["date"]).year >= 2024


def test_body_that_is_expected_is_asked_for(common_hall: Hall) -> None:
    with common_hall.connect() as client:
        client.send(request("POST", "/echo", "Expect: 100-Continue", "Content-Length: 3"))
        client.read_until(b"\r\n\r\n")
        assert bytes(client.raw) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.send(b"abc")
        client.read_until(b"<abc>")
        assert statuses(bytes(client.raw)) == [100, 200]


def test_http_1_0_never_gets_an_informational_answer(common_hall: Hall) -> None:
    """RFC 9110, 10.1.1: the expectation of an HTTP/1.0 client is ignored."""
    with common_hall.connect() as client:
        client.send(request("POST", "/echo", "Expect: 100-continue", "Content-Length: 3", version="1.0"))
        common_hall.settle()
        client.send(b"abc")
        assert statuses(bytes(client.read_all().raw)) == [200]


@pytest.mark.parametrize("sent", [
    chunked(b"one", b"x" * 17, b"\r\n0\r\n\r\n", end=b"0\r\nTrailer: yes\r\n\r\n"),
    request("POST", "/echo", body=b"one" + b"x" * 17 + b"\r\n0\r\n\r\n"),
], ids=["chunked", "with its length"])
def test_request_cut_at_every_byte(common_hall: Hall, sent: bytes) -> None:
    body = b"<one" + b"x" * 17 + b"\r\n0\r\n\r\n>"
    with common_hall.connect() as client:
        for place in range(1, len(sent)):
            before = len(client.raw)
            client.send(sent[:place])
            common_hall.settle()
            client.send(sent[place:])
            client.read_until(lambda raw: raw[before:].endswith(body))
            assert client.ended == "", (place, client.raw[before:])
        for byte in sent:
            client.send(bytes([byte]))
            common_hall.settle()
        client.read_until(lambda raw: len(statuses(raw)) == len(sent))
    assert statuses(bytes(client.raw)) == [200] * len(sent)


@pytest.mark.parametrize("sent", [b"GET", b"GET /echo HTTP/1.1\r\nHost: localhost\r\n", request("POST", "/echo", "Content-Length: 9") + b"half", chunked(b"half", end=b"5\r\nx")],
                         ids=["line", "head", "body", "chunk"])
@pytest.mark.parametrize("leave", ["shutdown", "close", "reset"])
def test_end_inside_a_request(hall: Hall, sent: bytes, leave: str) -> None:
    client = hall.connect()
    client.send(sent)
    hall.settle()
    if leave == "shutdown":
        client.socket.shutdown(socket.SHUT_WR)
        assert client.read_all().raw == b"" and client.ended == "eof"
        client.close()
    else:
        getattr(client, leave)()
    hall.settle()
    assert hall.app.seen == [] and hall.server.n_connections() == 0


@pytest.mark.parametrize("target", ["/echo", "/pieces", "/big"])
def test_half_closed_client_gets_its_answer(hall: Hall, target: str) -> None:
    with hall.connect(receive_buffer=8192) as client:
        client.send(request(target=target))
        client.socket.shutdown(socket.SHUT_WR)
        hall.settle()
        reply = client.read_all()
    assert reply.complete and reply.body == {"/echo": b"<>", "/pieces": b"one two three", "/big": BIG}[target]


def test_half_closed_client_gets_what_comes_later(hall: Hall) -> None:
    with hall.connect() as client:
        client.send(request(target="/wait"))
        client.socket.shutdown(socket.SHUT_WR)
        client.read_until(b"first")
        hall.do(hall.app.gate.set)
        assert client.read_all().body == b"first last"


@pytest.mark.parametrize("leave", ["close", "reset"])
def test_handler_learns_at_once_that_the_client_has_gone(hall: Hall, leave: str) -> None:
    client = hall.connect()
    client.send(request(target="/work"))
    hall.settle()
    getattr(client, leave)()
    assert hall.app.gone.wait(1.0)
    hall.settle()
    assert hall.server.n_connections() == 0


def test_leaving_after_the_answer_cancels_nothing(hall: Hall) -> None:
    client = hall.connect()
    hall.do(hall.app.gate.set)
    client.send(request(target="/work"))
    client.read_until(b"worked")
    client.close()
    hall.settle()
    assert not hall.app.gone.is_set() and hall.server.n_connections() == 0


def test_answer_that_is_cut_does_not_look_whole(common_hall: Hall) -> None:
    for target in ("/cut", "/crash?late"):
        with common_hall.connect() as client:
            client.send(request(target=target))
            reply = client.read_all()
        assert reply.status == 200 and not reply.complete and reply.body == b"half of it"


def test_crash_is_logged_with_its_traceback(hall: Hall, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("aicarousel").propagate = True
    with hall.connect() as client:
        client.send(request(target="/crash"))
        client.read_all()
    [record] = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert record.name == "aicarousel.server" and record.exc_info


def test_connection_of_a_crashed_request_is_let_go(hall: Hall, caplog: pytest.LogCaptureFixture) -> None:
    """Also when the client stays."""
    with hall.connect() as client:
        client.send(request(target="/crash"))
        client.read_until(b"500")
        hall.pass_time(1.5)
        assert hall.server.n_connections() == 0


# ---------------------------------------------------------------- slow clients

def raw_of(client: Client, hall: Hall) -> bytes:
    """What has come, without waiting for more."""
    hall.settle()
    client.socket.setblocking(False)
    try:
        while data := client.socket.recv(1 << 18):
            client.raw += data
        client.ended = "eof"
    except BlockingIOError:
        pass
    except ConnectionError:
        client.ended = "reset"
    return bytes(client.raw)


SLOW: dict[str, tuple[bytes, float, list[int]]] = {     # what comes before the silence, for how long that is borne, what is answered
    "silent from the start": (b"", 120.0, []),
    "inside the head": (b"GET /echo HT", 10.0, [408]),
    "inside a header": (b"GET /echo HTTP/1.1\r\nHost: localhost\r\nX: ", 10.0, [408]),
    "before the body": (request("POST", "/echo", "Content-Length: 9"), 60.0, [408]),
    "inside the body": (request("POST", "/echo", "Content-Length: 9") + b"half", 60.0, [408]),
    "inside a chunk": (chunked(b"half", end=b"9\r\nx"), 60.0, [408]),
    "after 100": (request("POST", "/echo", "Expect: 100-continue", "Content-Length: 9"), 60.0, [100, 408]),
    "m125 idle after an answer": (request(), 120.0, [200]),
    "idle after a stream": (request(target="/pieces"), 120.0, [200]),
    "idle after a refusal": (request(target="/refuse"), 120.0, [401]),
    "inside the second head": (request() + b"GET", 10.0, [200, 408]),
}


@pytest.mark.parametrize("name", SLOW)
def test_slow_client(hall: Hall, name: str) -> None:
    sent, borne_s, expected = SLOW[name]
    with hall.connect() as client:
        client.send(sent)
        hall.pass_time(borne_s - 1.0)
        raw_of(client, hall)
        assert client.ended == "" and hall.server.n_connections() == 1
        hall.pass_time(1.5)
        raw = raw_of(client, hall)
        assert client.ended == "eof" and hall.server.n_connections() == 0
        assert statuses(raw) == expected
        assert all(b"connection: close" in reply.raw for reply in replies_in(raw) if reply.status == 408)


DRIPS: dict[str, tuple[bytes, bytes, float]] = {     # what comes first, what comes every 4 s, when it is over
    "a head": (b"GET /echo HTTP/1.1\r\nX: ", b"a", 10.0),
    "a body": (request("POST", "/echo", "Content-Length: 90000"), b"a", 60.0),
    "chunks": (request("POST", "/echo", "Transfer-Encoding: chunked"), b"1\r\na\r\n", 60.0),
    "blank lines": (b"", b"\r\n", 120.0),
}


@pytest.mark.parametrize("name", DRIPS)
def test_drip(hall: Hall, name: str) -> None:
    """A deadline is not put off by a byte now and then."""
    first, drip, within_s = DRIPS[name]
    with hall.connect() as client:
        client.send(first)
        for _ in range(round(within_s / 4.0) + 2):
            hall.pass_time(4.0)
            if hall.server.n_connections() == 0:
                break
            client.send(drip)
        assert hall.server.n_connections() == 0


def test_client_that_does_not_read_is_dropped(hall: Hall) -> None:
    with hall.connect(receive_buffer=4096) as client:
        client.send(request(target="/big"))
        hall.pass_time(59.0)
        assert hall.server.n_connections() == 1
        hall.pass_time(2.0)
        assert hall.server.n_connections() == 0


@pytest.mark.parametrize("close", [False, True], ids=["kept open", "closed"])
def test_slow_reader_gets_its_whole_answer(hall: Hall, close: bool) -> None:
    with hall.connect(receive_buffer=4096) as client:
        client.send(request("GET", "/big", *(["Connection: close"] if close else [])))
        for _ in range(6):
            hall.pass_time(5.0)
            client.read_until(lambda raw, wanted=len(client.raw) + 20_000: len(raw) >= wanted)
        client.read_until(lambda raw: raw.endswith(BIG))
        assert client.reply().complete and client.ended == ""


@pytest.mark.parametrize("half_closed", [False, True], ids=["open", "half closed"])
def test_end_of_an_answer_reaches_a_client_that_pauses(hall: Hall, half_closed: bool) -> None:
    """What is still on its way when the answer is done is not thrown away, neither at once nor a second later."""
    def unsent() -> int:
        return sum(link.inbox.transport.get_write_buffer_size() for link in hall.server._links)

    with hall.connect(receive_buffer=4096) as client:
        hall.settle()
        hall.do(lambda: [link.inbox.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096) for link in hall.server._links])
        client.send(request("GET", "/pages", "Connection: close"))
        if half_closed:
            client.socket.shutdown(socket.SHUT_WR)
        hall.settle()
        assert half_closed or 0 < hall.do(unsent) < 60_000
        hall.pass_time(1.5)
        assert client.read_all().body == BIG[:40_000] and client.reply().complete


def test_a_client_that_resets_while_its_answer_leaves_is_no_failure(hall: Hall, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Between the last write and the end of writing the socket may be gone: the system then says that it is not connected."""
    def gone(transport: asyncio.Transport) -> None:
        raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")
    monkeypatch.setattr(asyncio.selector_events._SelectorSocketTransport, "write_eof", gone)
    with hall.connect() as client:
        client.send(b"GET / HTTP/1.1\r\n\r\n")
        assert client.read_all().status == 400
    hall.settle()
    assert not caplog.records and not hall.complaints



@pytest.mark.parametrize("sent", [
    request("POST", "/echo", f"Content-Length: {MAX_BODY + 1}"),
    request("POST", "/refuse", "Content-Length: 9"),
    request("GET", "/echo", "Connection: close"),
    b"nonsense\r\n\r\n",
    chunked(b"x" * 60_000, b"x" * 60_000, end=b"4\r\n"),
], ids=["too large", "refused", "close", "bad", "chunks too large"])
def test_linger_ends(hall: Hall, sent: bytes) -> None:
    """A client that stays behind its last answer is let go after a second, without another word."""
    with hall.connect() as client:
        client.send(sent)
        hall.settle()
        before = raw_of(client, hall)
        hall.pass_time(1.5)
        assert hall.server.n_connections() == 0 and raw_of(client, hall) == before
    assert len(replies_in(before)) == 1 and not hall.complaints


def test_refusal_arrives_though_the_body_is_still_being_sent(hall: Hall) -> None:
    """No reset may overtake the 413."""
    with hall.connect() as client:
        client.send(request("POST", "/echo", "Content-Length: 4000000"))
        for _ in range(40):
            client.send(b"x" * 50_000)
        assert client.read_all().status == 413 and client.ended == "eof"


# ---------------------------------------------------------------- small packets

def test_no_delay_is_set(hall: Hall) -> None:
    with hall.connect() as client:
        client.send(request())
        client.read_until(b"<>")
        [link] = hall.do(lambda: list(hall.server._links))
        assert link.inbox.transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_head_and_body_leave_together(hall: Hall) -> None:
    """Two small writes in a row are what Nagle's algorithm and delayed acknowledgement turn into 40 ms."""
    with hall.connect() as client:
        for target, whole in (("/echo", b"<>"), ("/wait", b"first \r\n")):
            for _ in range(1 if target == "/wait" else 20):
                client.raw.clear()
                client.send(request(target=target))
                client.read_until(b"\r\n\r\n")
                assert bytes(client.raw).endswith(whole)


# ---------------------------------------------------------------- draining

def test_drain_closes_idle_connections_at_once(hall: Hall) -> None:
    clients = {target: hall.connect() for target in ("", "/echo", "/pieces", "/refuse")}
    for target, client in clients.items():
        if target:
            client.send(request(target=target))
            client.read_until(lambda raw: len(statuses(raw)) == 1)
    hall.settle()
    draining = hall.drain(30.0)
    for client in clients.values():
        raw_of(client, hall)
    assert [target for target, client in clients.items() if not client.ended] == [] and draining.done()
    for client in clients.values():
        client.close()


def test_drain_lets_answers_finish_and_accepts_nobody(hall: Hall) -> None:
    with hall.connect() as client:
        client.send(request(target="/wait"))
        client.read_until(b"first")
        draining = hall.drain(30.0)
        with pytest.raises(ConnectionError):
            hall.connect()
        hall.pass_time(29.0)
        assert not draining.done()
        hall.do(hall.app.gate.set)
        reply = client.read_all()
        assert reply.body == b"first last" and reply.complete and client.ended == "eof"
        client.close()
        hall.settle()
        assert draining.done() and hall.app.done == ["wait"]


def test_drain_interrupts_at_its_end(hall: Hall) -> None:
    with hall.connect() as polite, hall.connect() as stubborn:
        polite.send(request(target="/work"))
        stubborn.send(request(target="/wait"))
        stubborn.read_until(b"first")
        draining = hall.drain(30.0)
        hall.pass_time(31.0)
        reply = polite.read_all()
        assert reply.body == b"the gateway is shutting down" and reply.headers["connection"] == "close"
        hall.pass_time(2.0)
        assert not stubborn.read_all().complete and draining.done() and hall.server.n_connections() == 0


def test_answers_while_draining_end_their_connection(hall: Hall) -> None:
    with hall.connect() as client:
        client.send(request(target="/work"))
        hall.settle()
        hall.drain(30.0)
        hall.do(hall.app.gate.set)
        reply = client.read_all()
        assert reply.body == b"worked" and reply.headers["connection"] == "close" and client.ended == "eof"


def test_drain_does_not_cut_an_answer_that_is_being_read(hall: Hall) -> None:
    with hall.connect(receive_buffer=4096) as client:
        client.send(request(target="/big"))
        client.read_until(b"\r\n\r\n")
        draining = hall.drain(30.0)
        client.read_until(lambda raw: raw.endswith(BIG))
        assert client.reply().complete
        client.close()
        hall.settle()
        assert draining.done()


def test_drain_closes_every_listener() -> None:
    hall = Hall(n_sockets=2)
    for port in hall.ports:
        with Client(port) as client:
            client.send(request())
            client.read_until(b"<>")
    hall.drain(30.0)
    refused = 0
    for port in hall.ports:
        try:
            Client(port).close()
        except ConnectionError:
            refused += 1
    hall.close()
    assert refused == 2


# ---------------------------------------------------------------- signals

def models_of(provider: Provider) -> dict[str, Any]:
    """One provider that stops in the middle of its stream."""
    steps = stream(ROLE, content("one"), Pause("more"), content(" two"), FINISH, DONE)
    return {"slow": {"baseUrl": provider.script("slow", steps), "default": "m", "enableFallback": False, "models": ["m"], "keys": ["env:FAKE_KEY"]}}


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_signal_lets_streams_finish(provider: Provider, gateway_factory: Callable[..., Gateway], name: str) -> None:
    gateway = gateway_factory(models_of(provider), {"FAKE_KEY": FAKE_KEY})
    with gateway.start_chat("slow/m") as client, gateway.connect() as idle:
        client.read_until(b'"one"')
        idle.send(gateway.request_bytes("GET", "/health", close=False))
        idle.read_until(b"}")
        assert gateway.process
        gateway.process.send_signal(getattr(signal, name))
        idle.read_all()
        assert idle.ended == "eof"
        with pytest.raises(ConnectionError):
            gateway.connect()
        provider.release("more")
        reply = client.read_all()
        assert reply.text == "one two" and reply.done and reply.complete
    assert gateway.process.wait(HANG_S) == 0
    assert "Traceback" not in gateway.log


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_signal_interrupts_what_does_not_finish(provider: Provider, gateway_factory: Callable[..., Gateway], name: str) -> None:
    """With the drain time cut short."""
    gateway = gateway_factory({**models_of(provider), "carousel": {"limits": {"drain": 0.2}}}, {"FAKE_KEY": FAKE_KEY})
    with gateway.start_chat("slow/m") as client:
        client.read_until(b'"one"')
        assert gateway.process
        gateway.process.send_signal(getattr(signal, name))
        reply = client.read_all()
    assert reply.text == "one" and not reply.done and reply.complete and "shutting down" in reply.error["message"]
    assert gateway.process.wait(HANG_S) == 0
    assert provider.wait_closed(provider.links("slow")[0], 1.0)
    assert "Traceback" not in gateway.log and "outcome=error" in gateway.log
