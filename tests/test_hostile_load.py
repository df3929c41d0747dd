"""What many clients, few descriptors, signals and edits do to the gateway: the groups slow, storm, idle, fds, drain and reload of tests/test_hostile.py."""

from __future__ import annotations

import json
import re
import resource
import select
import signal
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import aicarousel
from dialects import FORMATS, PATHS, Telling, read_stream
from fakes import FAKE_KEY, HANG_S, TEXT, TLS, Client, Gateway, Pause, Provider, Silence, answer, healthy, opened, read_reply, stream
from house import House, entry
from test_hostile import body_of, check_envelope
from test_server import replies_in

Json = dict[str, Any]
MAX_IDLE_BYTES = 64 * 1024


def told(reply: Any, client: str) -> Any:
    return read_stream(client, reply)


# ---------------------------------------------------------------- slow

HALF: dict[str, tuple[str, float]] = {      # what comes before the silence, for how long that is borne; PATH is each format's
    "half a first line": ("POST PATH HT", 10.0), "half a head": ("POST PATH HTTP/1.1\r\nHost: localhost\r\nX: ", 10.0), "no body": ("HEAD", 60.0),
    "half a body": ("HEAD{\"model\": ", 60.0),
}


@pytest.mark.parametrize("name", HALF)
@pytest.mark.parametrize("client", FORMATS)
def test_slow(build: Callable[..., House], name: str, client: str) -> None:
    """60 at once are told so at their deadline, in their own format, and nobody else waits for them."""
    house = build(a=healthy())
    sent, borne_s = HALF[name]
    whole = house.request_bytes("POST", PATHS[client], body_of(client, "a/m"), close=False)
    raw = sent.replace("PATH", PATHS[client]).encode().replace(b"HEAD", whole.partition(b"{")[0])
    clients = [house.connect() for _ in range(60)]
    for link in clients:
        link.send(raw)
    house.settle()
    began = time.monotonic()
    assert house.chat("a/m").text == TEXT and time.monotonic() - began < 2.0
    house.pass_time(borne_s - 1.0)
    assert house.do(house.server.n_connections) == 60
    house.pass_time(2.0)
    for link in clients:
        reply = link.read_all(5.0)
        assert reply.status == 408 and link.ended == "eof"
        check_envelope(reply, client if name != "half a first line" or client != "messages" else "messages")
        link.close()
    assert house.chat("a/m").text == TEXT


def test_slow_handshake(provider: Provider, gateway_factory: Callable[..., Gateway]) -> None:
    """TLS that never gets on, or is none, is let go by the deadline of a head; others are served."""
    gateway = gateway_factory({"carousel": {"limits": {"clientHead": 1.0}}, "a": entry(provider.script("a", healthy()))}, {"FAKE_KEY": FAKE_KEY}, arguments=["--tls-cert", str(TLS / "good.pem"), "--tls-key", str(TLS / "good.pem")])
    silent, wrong = [gateway.connect() for _ in range(20)], gateway.connect()
    wrong.send(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert wrong.read_all(5.0).status == 0 and wrong.ended in ("eof", "reset")
    context = ssl.create_default_context(cafile=str(TLS / "ca.pem"))
    context.check_hostname = False
    with socket.create_connection(("127.0.0.1", gateway.port), 5.0) as plain, context.wrap_socket(plain) as line:
        line.sendall(gateway.request_bytes("GET", "/health"))
        assert line.recv(65536).startswith(b"HTTP/1.1 200")
    for link in silent:
        assert link.read_all(5.0).status == 0 and link.ended in ("eof", "reset")
        link.close()
    wrong.close()
    assert "Traceback" not in gateway.log


# ---------------------------------------------------------------- storm

@pytest.mark.parametrize("client", FORMATS)
def test_storm(provider: Provider, gateway_factory: Callable[..., Gateway], client: str) -> None:
    """200 streams that are torn off leave no connection behind, on either side."""
    telling = Telling("chat")
    gateway = gateway_factory({"a": entry(provider.script("a", opened(telling.begin(), telling.say("one"), Silence())))}, {"FAKE_KEY": FAKE_KEY})
    raw = gateway.request_bytes("POST", PATHS[client], body_of(client, "a/m", stream=True))
    before = gateway.open_files()
    for _ in range(4):
        links = [gateway.connect() for _ in range(50)]
        for link in links:
            link.send(raw)
        for link in links:
            link.read_until(b"one")
        for number, link in enumerate(links):
            link.reset() if number % 2 else link.close()
        opened_now = list(provider.links("a"))
        ends_at = time.monotonic() + 1.0
        assert all(provider.wait_closed(one, max(0.0, ends_at - time.monotonic())) for one in opened_now), "a provider's connection outlives its client by a second"
    assert wait_for(lambda: gateway.open_files() <= before + 10), gateway.open_files() - before
    assert "Traceback" not in gateway.log


def wait_for(check: Callable[[], object], seconds: float = 5.0) -> bool:
    ends_at = time.monotonic() + seconds
    while not check():
        if time.monotonic() > ends_at:
            return False
        time.sleep(0.02)
    return True


# ---------------------------------------------------------------- idle

@pytest.fixture(scope="module")
def plain_gateway(module_provider: Provider, module_gateway_factory: Callable[..., Gateway]) -> Iterator[Gateway]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 5000 if hard == resource.RLIM_INFINITY else min(5000, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    gateway = module_gateway_factory({"a": entry(module_provider.script("a", healthy()))}, {"FAKE_KEY": FAKE_KEY})
    assert gateway.chat("a/m").text == TEXT
    time.sleep(0.5)             # past the start's own clearing of memory
    gateway.rss_at_start = gateway.rss_bytes()      # type: ignore[attr-defined]
    yield gateway
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("kind", ["silent", "after an answer", "after a stream", "after a refusal", "inside a head"])
def test_idle(plain_gateway: Gateway, kind: str) -> None:
    """2,000 connections that wait hold less than 64 KiB each, and keep nobody from being served."""
    gateway, n_links = plain_gateway, 2000
    first = {"silent": b"", "after an answer": gateway.request_bytes("POST", PATHS["chat"], body_of("chat", "a/m"), close=False), "after a refusal": gateway.request_bytes("GET", "/health?deep=1", key="", close=False),
             "after a stream": gateway.request_bytes("POST", PATHS["chat"], body_of("chat", "a/m", stream=True), close=False), "inside a head": b"GET /health HTTP/1.1\r\nX: " + b"a" * 500}[kind]
    links = []
    for start in range(0, n_links, 100):
        batch = [socket.create_connection(("127.0.0.1", gateway.port), HANG_S) for _ in range(100)]
        for link in batch if first else ():
            link.sendall(first)
        for link in batch if kind.startswith("after") else ():
            raw = b""
            while not read_reply(raw, "left").complete:
                raw += link.recv(1 << 16)
        links += batch
    began = time.monotonic()
    assert gateway.chat("a/m").text == TEXT and time.monotonic() - began < 2.0
    grown = gateway.rss_bytes() - gateway.rss_at_start      # type: ignore[attr-defined]
    poll = select.poll()
    for link in links:
        poll.register(link, select.POLLIN)
    still = n_links - len(poll.poll(0))
    for link in links:
        link.close()
    assert still == n_links and grown < n_links * MAX_IDLE_BYTES, f"{still} of {n_links} open, {grown / n_links / 1024:.1f} KiB each"
    print(f"idle, {kind}: {grown / n_links / 1024:.1f} KiB each")
    assert wait_for(lambda: gateway.open_files() < 200, 20.0)


# ---------------------------------------------------------------- fds

POOR = """
import resource, sys
sys.path.insert(0, {folder!r})
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
import aicarousel
raise SystemExit(aicarousel.main())
"""


@pytest.fixture
def poor(provider: Provider, gateway_factory: Callable[..., Gateway], tmp_path: Path) -> Gateway:
    """A gateway that may open 256 files: 96 clients and as many providers."""
    program = tmp_path / "poor.py"
    program.write_text(POOR.format(folder=str(Path(aicarousel.__file__).parent)))
    telling = Telling("chat")
    held = lambda request: stream(telling.begin(), Telling("chat").say("one"), Pause("more"), Telling("chat").end()) if request.streamed else healthy()(request)
    return gateway_factory({"a": entry(provider.script("a", held))}, {"FAKE_KEY": FAKE_KEY}, program=program)


def test_fds_idle_clients_make_room(poor: Gateway) -> None:
    """Who says nothing is let go for who does."""
    idle = [poor.connect() for _ in range(300)]
    for _ in range(3):
        assert poor.chat("a/m").text == TEXT
    for link in idle:
        link.close()
    assert wait_for(lambda: "connections are limited to 96" in poor.log) and "Too many open files" not in poor.log


@pytest.mark.parametrize("client", FORMATS)
def test_fds_over_the_cap(poor: Gateway, provider: Provider, client: str) -> None:
    """While all are busy, one more is told so in its own format; afterwards it is served."""
    busy = [poor.start_chat("a/m") for _ in range(96)]
    for link in busy:
        link.read_until(b"one")
    refused = poor.post(PATHS[client], body_of(client, "a/m"))
    assert refused.status == 503 and refused.headers["retry-after"] == "1" and refused.headers["connection"] == "close"
    assert "96 connections" in check_envelope(refused, client)
    provider.release("more")
    for link in busy:
        assert link.read_all().text == "one"
        link.close()
    assert wait_for(lambda: poor.post(PATHS[client], body_of(client, "a/m")).status == 200)


@pytest.mark.parametrize(("limits", "fitting", "raised"), [((256, 256), 96, None), ((256, 4096), 2016, (4096, 4096)), ((20_000, 20_000), 9968, None), ((1024, resource.RLIM_INFINITY), 4096, (8256, resource.RLIM_INFINITY)),
                                                           ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), 1 << 20, None), ((10, 10), 1, None), (None, 1 << 20, None)])
def test_fds_that_fit(monkeypatch: pytest.MonkeyPatch, limits: tuple[int, int] | None, fitting: int, raised: tuple[int, int] | None) -> None:
    """Two for a client, some for the rest; the limit is raised where it may be, and where nobody knows it nothing is held back."""
    def told(which: int) -> tuple[int, int]:
        if limits is None:
            raise OSError("no such limit")
        return limits
    changed: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", told)
    monkeypatch.setattr(resource, "setrlimit", lambda which, both: changed.append(both))
    assert aicarousel._fitting_connections(4096) == fitting
    assert [both for both in changed if both != limits] == ([raised] if raised else [])


def test_fds_none_left(poor: Gateway) -> None:
    """EMFILE: accepting pauses, the log says so once, and everybody is served as soon as there is room."""
    assert poor.chat("a/m").text == TEXT
    resource.prlimit(poor.pid, resource.RLIMIT_NOFILE, (poor.open_files() + 2, 256))
    raw = poor.request_bytes("GET", "/health")
    links = [poor.connect() for _ in range(30)]
    assert wait_for(lambda: "Too many open files" in poor.log)
    time.sleep(2.5)             # two more tries of the gateway's, and nothing more of it in the log
    assert poor.log.count("accept.failed") == 1 and "Traceback" not in poor.log
    resource.prlimit(poor.pid, resource.RLIMIT_NOFILE, (256, 256))
    for link in links:
        link.send(raw)
    assert [link.read_all().status for link in links] == [200] * 30
    for link in links:
        link.close()


@pytest.mark.parametrize("client", FORMATS)
def test_fds_none_left_for_a_provider(poor: Gateway, client: str) -> None:
    """That is the gateway's own trouble: 503 says so, nothing is held against the provider, and the next request is served."""
    body = body_of(client, "a/m")
    with poor.connect() as link:
        link.send(poor.request_bytes("GET", "/health", close=False))
        link.read_until(b'"ok"')
        resource.prlimit(poor.pid, resource.RLIMIT_NOFILE, (poor.open_files(), 256))
        link.send(poor.request_bytes("POST", PATHS[client], body))
        raw = link.read_until(b"out_of_descriptors" if client != "messages" else b"no_descriptor").rpartition(b"HTTP/1.1 ")[2]
    resource.prlimit(poor.pid, resource.RLIMIT_NOFILE, (256, 256))
    assert raw.startswith(b"503 ") and b"\r\nretry-after: 5\r\n" in raw.lower() and b"none left for a connection to a provider" in raw
    assert poor.post(PATHS[client], body).status == 200
    assert wait_for(lambda: "outcome=ok" in poor.log) and re.search(r"reason=no_descriptor .*cools=-\n", poor.log) and "Traceback" not in poor.log


# ---------------------------------------------------------------- drain

@pytest.fixture
def patient(provider: Provider, gateway_factory: Callable[..., Gateway]) -> Gateway:
    """A gateway with providers that stop at each place; it drains for 30 s."""
    return gateway_factory(stopping(provider), {"FAKE_KEY": FAKE_KEY})


def stopping(provider: Provider, **limits: float) -> Json:
    telling = Telling("chat")
    scripts = {"slow": stream(telling.begin(), telling.say("one"), Pause("more"), telling.say(" two"), telling.end()), "stuck": opened(telling.begin(), telling.say("one"), Silence()),
               "silent": [Silence()], "limited": answer({"error": {"message": "Slow down."}}, 429, [("retry-after", "25")])}
    return {"carousel": {"fallback": "none", "maxWait": 30, "limits": limits}, **{name: entry(provider.script(name, script)) for name, script in scripts.items()}}


def send_signal(gateway: Gateway, name: str = "SIGTERM") -> None:
    assert gateway.process
    gateway.process.send_signal(getattr(signal, name))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_drain_under_50_streams(provider: Provider, gateway_factory: Callable[..., Gateway], name: str) -> None:
    """Those whose provider goes on finish; the others get their error event; status 0."""
    gateway = gateway_factory(stopping(provider, drain=1.0), {"FAKE_KEY": FAKE_KEY})
    clients = [(FORMATS[number % 3], "slow" if number % 2 else "stuck", gateway.connect()) for number in range(50)]
    for client, model, link in clients:
        link.send(gateway.request_bytes("POST", PATHS[client], body_of(client, f"{model}/m", stream=True)))
    for _, _, link in clients:
        link.read_until(b"one")
    send_signal(gateway, name)
    wait_for(lambda: "draining" in gateway.log)
    with pytest.raises(ConnectionError):
        gateway.connect()
    provider.release("more")
    for client, model, link in clients:
        reply = link.read_all()
        seen = told(reply, client)
        assert reply.complete and reply.headers["x-aicarousel-request-id"]
        if model == "slow":
            assert seen.text == "one two" and seen.ended and not seen.errors
        else:
            assert seen.text == "one" and not seen.ended and len(seen.errors) == 1 and seen.after_error == 0 and "shutting down" in seen.errors[0]["message"]
        link.close()
    assert gateway.process and gateway.process.wait(HANG_S) == 0
    assert "Traceback" not in gateway.log


@pytest.mark.parametrize("client", FORMATS)
def test_drain_hurried_by_a_second_signal(patient: Gateway, provider: Provider, client: str) -> None:
    """In a stream, waiting for a provider's first word, waiting in line: the second SIGTERM ends it at once, in the client's format."""
    assert patient.post(PATHS[client], body_of(client, "limited/m"), timeout=0.5).ended == "timeout"      # from now on one waits in line there
    links = {model: patient.connect() for model in ("stuck", "silent", "limited")}
    for model, link in links.items():
        link.send(patient.request_bytes("POST", PATHS[client], body_of(client, f"{model}/m", stream=True)))
    links["stuck"].read_until(b"one")
    provider.wait_calls("silent")
    time.sleep(0.3)             # for the one in line there is nothing to be seen from outside
    began = time.monotonic()
    send_signal(patient)
    assert wait_for(lambda: "draining" in patient.log)
    send_signal(patient)
    for model, link in links.items():
        reply = link.read_all()
        if model == "stuck":
            seen = told(reply, client)
            assert seen.text == "one" and len(seen.errors) == 1 and reply.complete
        else:
            assert reply.status == 503 and "shutting down" in check_envelope(reply, client), (model, reply.raw)
        link.close()
    assert patient.process and patient.process.wait(HANG_S) == 0 and time.monotonic() - began < 8.0
    assert "Traceback" not in patient.log


def test_drain_while_a_body_is_being_sent(patient: Gateway) -> None:
    with patient.connect() as link, patient.connect() as idle:
        idle.send(patient.request_bytes("GET", "/health", close=False))
        idle.read_until(b"}")
        link.send(patient.request_bytes("POST", PATHS["messages"], body_of("messages", "slow/m"))[:-20])
        time.sleep(0.1)
        send_signal(patient)
        assert idle.read_all(2.0).complete and idle.ended == "eof"
        send_signal(patient)
        reply = link.read_all(5.0)
    assert reply.status == 503 and "shutting down" in check_envelope(reply, "messages")
    assert patient.process and patient.process.wait(HANG_S) == 0


# ---------------------------------------------------------------- reload

EDITS: dict[str, str | None] = {        # what stands in models.json next; None: no such file
    "no JSON": "{", "empty": "", "cut in the middle": '{"a": {"baseUrl": "http://127.0.0.1:1/v1", "mod', "a list": "[]", "deep": "[" * 100_000, "an unknown field": '{"a": {"baseUrl": "http://127.0.0.1:1/v1", "nonsense": 1}}',
    "another type": '{"a": {"baseUrl": 5, "models": ["m"]}}', "NUL": "\x00", "a key where none belongs": '{"a": "sk-planted0123456789abcdefghij"}', "NaN": '{"carousel": {"maxWait": NaN}}',
}


@pytest.fixture(scope="module")
def edited(module_provider: Provider, module_gateway_factory: Callable[..., Gateway]) -> Gateway:
    return module_gateway_factory({"a": entry(module_provider.script("a", healthy()))}, {"FAKE_KEY": FAKE_KEY})


@pytest.mark.parametrize("name", EDITS)
def test_reload_of_what_is_broken_keeps_the_old(edited: Gateway, name: str) -> None:
    """One line says what is wrong, no secret in it; the next good edit is taken."""
    before, sound = edited.log, (edited.home / "models.json").read_text()
    (edited.home / "models.json").write_text(EDITS[name] or "")
    send_signal(edited, "SIGHUP")
    assert wait_for(lambda: "kept the old configuration" in edited.log[len(before):]), edited.log[len(before):]
    assert edited.chat("a/m").text == TEXT
    new = edited.log[len(before):]
    assert "Traceback" not in new and "planted" not in new and all(line.isprintable() for line in new.splitlines())
    (edited.home / "models.json").write_text(sound)
    assert wait_for(lambda: "reloaded providers=a" in edited.log[len(before):])


def test_reload_lets_requests_under_way_finish_on_the_old(provider: Provider, gateway_factory: Callable[..., Gateway]) -> None:
    telling = Telling("chat")
    old = provider.script("old", stream(telling.begin(), telling.say("old"), Pause("more"), telling.say(" end"), telling.end()))
    gateway = gateway_factory({"a": entry(old)}, {"FAKE_KEY": FAKE_KEY})
    with gateway.start_chat("a/m") as link:
        link.read_until(b"old")
        gateway.write_models({"a": entry(provider.script("new", healthy()))})
        assert wait_for(lambda: "reloaded" in gateway.log)
        assert gateway.chat("a/m").text == TEXT and len(provider.calls("new")) == 1
        provider.release("more")
        reply = link.read_all()
    assert reply.text == "old end" and reply.done and len(provider.calls("old")) == 1


def test_reload_of_a_file_that_cannot_be_read(edited: Gateway) -> None:
    """A folder in its place, and nothing in its place: no models.json means the presets."""
    path, before = edited.home / "models.json", edited.log
    sound = path.read_text()
    path.unlink()
    path.mkdir()
    assert wait_for(lambda: "kept the old configuration" in edited.log[len(before):])
    assert edited.chat("a/m").text == TEXT
    path.rmdir()
    path.write_text(sound)
    assert wait_for(lambda: "reloaded providers=a" in edited.log[len(before):])
    env = edited.home / ".env"
    keys = env.read_text()
    env.write_text("not a variable\n")
    assert wait_for(lambda: edited.log[len(before):].count("kept the old configuration") == 2)
    env.write_text(keys)
    assert wait_for(lambda: edited.log[len(before):].count("reloaded providers=a") == 2) and edited.chat("a/m").text == TEXT
