"""Many streams at once: every event of each in its order and in time, and nothing left behind by those that are torn.

    python tests/test_streams.py 1000       a thousand slow streams, ten seconds of them all at once: how late events come
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

from dialects import FORMATS, PATHS  # noqa: E402  (after the path is set)
from fakes import DONE, FAKE_KEY, FINISH, ROLE, SSE_HEADERS, Chunk, Close, Gateway, Pause, Provider, Repeat, Reset, Silence, content, head_bytes, opened  # noqa: E402
from faults import END_MARKS, ask  # noqa: E402

_APART_S = 0.003        #: between the beginnings of two streams
_TOLD = re.compile(rb"(\d+)@(\d+\.\d+);")


class Delays(NamedTuple):
    """What was measured: how late each event came, and what was wrong."""
    delays_s: list[float]
    wrong: list[str]

    @property
    def p99_ms(self) -> float:
        return statistics.quantiles(self.delays_s, n=100)[98] * 1000


async def _tell(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A provider: numbered events, each with the time at which it was sent; how many and how often stands in the question."""
    head = await reader.readuntil(b"\r\n\r\n")
    body = await reader.readexactly(int(re.search(rb"(?i)content-length: (\d+)", head)[1]))
    n_events, interval_s = map(float, re.search(r"(\d+) events every (\S+) s", body.decode()).groups())
    writer.write(head_bytes(200, SSE_HEADERS) + _chunk(ROLE))
    began_at = time.monotonic() + random.random() * interval_s
    for number in range(int(n_events)):
        await asyncio.sleep(max(0.0, began_at + number * interval_s - time.monotonic()))
        writer.write(_chunk(content(f"{number}@{time.monotonic():.6f};")))
    writer.write(_chunk(FINISH) + _chunk(DONE) + b"0\r\n\r\n")
    writer.close()


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


async def _listen(gateway: Gateway, client: str, n_events: int, interval_s: float, after_s: float, found: Delays) -> None:
    """A client: notes how late each event is, and whether all came, in order, and then the end mark."""
    await asyncio.sleep(after_s)
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port, limit=1 << 20)
    body = json.loads(json.dumps(ask(client, "aicarousel", True)).replace('"Hi"', f'"{n_events} events every {interval_s} s"'))
    writer.write(gateway.request_bytes("POST", PATHS[client], body))
    rest, expected = b"", 0
    while data := await reader.read(1 << 16):
        now, rest, at = time.monotonic(), rest + data, 0
        for told in _TOLD.finditer(rest) if expected < n_events else ():
            if int(told[1]) != expected:
                found.wrong.append(f"{client}: {int(told[1])} where {expected} was due")
            found.delays_s.append(now - float(told[2]))
            expected, at = expected + 1, told.end()
            if expected == n_events:        # some formats say the whole text again at the end
                break
        rest = rest[at:]
    if expected != n_events or not any(mark in rest for mark in END_MARKS[client]) or not rest.endswith(b"0\r\n\r\n"):
        found.wrong.append(f"{client}: {expected} of {n_events} events, then {rest[-100:]!r}")
    writer.close()


async def _measure(make_gateway: Callable[..., Gateway], n_streams: int, n_events: int, interval_s: float) -> Delays:
    provider = await asyncio.start_server(_tell, "127.0.0.1", 0, backlog=4096)
    port = provider.sockets[0].getsockname()[1]
    gateway = await asyncio.to_thread(make_gateway, {"a": {"baseUrl": f"http://127.0.0.1:{port}/v1", "default": "m", "enableFallback": False, "models": ["m"], "keys": ["env:FAKE_KEY"]}},
                                      {"FAKE_KEY": FAKE_KEY})
    found = Delays([], [])
    async with asyncio.timeout(60 + 2 * n_events * interval_s):
        await asyncio.gather(*(_listen(gateway, FORMATS[number % 3], n_events, interval_s, number * _APART_S, found) for number in range(n_streams)))
    provider.close()
    return found


def measure(make_gateway: Callable[..., Gateway], n_streams: int, n_events: int, interval_s: float) -> Delays:
    """So many streams of every client format at once, of so many events each."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 8192)), hard))      # the gateway inherits it
    return asyncio.run(_measure(make_gateway, n_streams, n_events, interval_s))


def test_slow_streams_come_in_order_and_in_time(gateway_factory: Callable[..., Gateway]) -> None:
    """Three hundred streams; measured again where the machine was busy with something else."""
    for _ in range(3):
        found = measure(gateway_factory, 300, 8, 0.4)
        assert found.wrong == [] and len(found.delays_s) == 300 * 8
        if found.p99_ms < 250:
            return
    raise AssertionError(f"events came {found.p99_ms:.0f} ms late")


TEARS = {       # what the provider does behind its first words, and how the client leaves
    "client closes": ([Repeat([Chunk(content("more ")), Pause("never")])], "close"),
    "client resets": ([Silence()], "reset"),
    "provider closes": ([Pause("tear"), Close()], ""),
    "provider resets": ([Pause("tear"), Reset()], ""),
}


def test_torn_streams_leave_no_connection_behind(provider: Provider, gateway_factory: Callable[..., Gateway]) -> None:
    """Two hundred, of every format, torn by either side: the gateway has the descriptors that it began with."""
    gateway = gateway_factory({name.replace(" ", "-"): {"baseUrl": provider.listen(name.replace(" ", "-"), opened(ROLE, content("The first words"), *steps)), "default": "m",
                                                       "enableFallback": False, "models": ["m"], "keys": ["env:FAKE_KEY"]} for name, (steps, _) in TEARS.items()}, {"FAKE_KEY": FAKE_KEY})
    assert gateway.get("/health").status == 200
    n_files = gateway.open_files() + 4      # the usage table may have its files open or not
    clients = []
    for number in range(200):
        name = list(TEARS)[number % 4]
        clients.append((name, gateway.connect()))
        clients[-1][1].send(gateway.request_bytes("POST", PATHS[FORMATS[number % 3]], ask(FORMATS[number % 3], f"{name.replace(' ', '-')}/m", True)))
    for _, client in clients:
        client.read_until(b"The first words")
    assert gateway.open_files() >= n_files + 390
    provider.release("tear")
    for name, client in clients:
        if TEARS[name][1]:
            getattr(client, TEARS[name][1])()
        else:
            assert client.read_all().complete
            client.close()
    assert provider.wait_until(lambda: all(connection.closed_at is not None for connection in provider.connections), 5.0)
    ends_at = time.monotonic() + 5.0
    while gateway.open_files() > n_files and time.monotonic() < ends_at:
        time.sleep(0.02)                # the last ones are being closed
    assert gateway.open_files() <= n_files
    assert gateway.health()["requests"] == 200 and "Traceback" not in gateway.log


if __name__ == "__main__":
    made: list[Gateway] = []
    try:
        told = measure(lambda *words: made.append(Gateway(*words)) or made[-1].start(), int(sys.argv[1]) if len(sys.argv) > 1 else 1000, 13, 1.0)
    finally:
        for one in made:
            one.remove()
    print(f"{len(told.delays_s)} events: median {statistics.median(told.delays_s) * 1000:.1f} ms, p99 {told.p99_ms:.1f} ms, latest {max(told.delays_s) * 1000:.1f} ms late")
    print(f"{len(told.wrong)} wrong" + "".join(f"\n  {words}" for words in told.wrong[:10]))
    raise SystemExit(bool(told.wrong))
