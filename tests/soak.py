"""A gateway under mixed load for minutes: three formats, streamed and not, faults, clients that leave, edits of models.json.

    python tests/soak.py --minutes 10

Ends with exit status 0 when no client saw an error that a fallback should have hidden, and file descriptors, tasks and memory are where they were after the warm-up.
`tests/test_soak.py` is a minute of it.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

from answers import read
from dialects import FORMATS, PATHS, Telling, ask
from fakes import DONE, FAKE_KEY, FINISH, ROLE, TEXT, Close, Gateway, Head, Provider, Repeat, Request, Reset, Send, Sleep, answer, content, frame, head_bytes, healthy, opened, read_reply, stream

N_CLIENTS = 5
PAUSE_S = 0.03          #: of a client between two requests: load for a part of a core, since other tests run beside
REST_S = 1.0            #: without load, before what is at rest is counted
SLOPE_MB_PER_MINUTE = 1.0
COOLS = {f"cool{name}": 0.3 for name in ("Rate", "Server", "Network", "Model", "Most", "Credential", "Payment")}
LIMITS = {**COOLS, "retryBudgetLeast": 100}


# ---------------------------------------------------------------- providers

def in_format(wire: str) -> Callable[[Request], list[Any]]:
    """A healthy provider of one format."""
    def play(request: Request) -> list[Any]:
        telling = Telling(wire)
        frames = [*telling.begin(), *telling.say(*(TEXT[at:at + 9] for at in range(0, len(TEXT), 9))), *telling.end()]
        if request.streamed:
            return stream(*frames)
        if wire == "messages":
            return answer({"id": "msg_1", "type": "message", "role": "assistant", "model": "m", "content": [{"type": "text", "text": TEXT}], "stop_reason": "end_turn",
                           "stop_sequence": None, "usage": {"input_tokens": 11, "output_tokens": 7}})
        usage = {"input_tokens": 11, "input_tokens_details": {"cached_tokens": 0}, "output_tokens": 7, "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 18}
        return answer({**telling._response("completed"), "output": telling.output, "usage": usage})
    return play


FAULTS: tuple[Any, ...] = (
    answer({"error": {"message": "Too many requests"}}, 429), answer({"error": {"message": "Slow down"}}, 429, [("retry-after", "1")]), answer({"error": {"message": "Oops"}}, 500),
    answer(b"<html>Bad gateway</html>", 502, [("content-type", "text/html")]), answer(b"<html>Login</html>", 200, [("content-type", "text/html")]), [Close()], [Reset()],
    [Send(b"SSH-2.0-OpenSSH_9.6\r\n"), Close()], [Send(head_bytes(200, [("content-type", "application/json"), ("content-length", "500")]) + b'{"id": "chat'), Close()],
    answer({"error": {"message": "Overloaded", "code": 503}}), answer(b"null", 200, [("content-type", "application/json")]), [Head(204)], opened(ROLE, Close()), stream(),
    [Send(head_bytes(200, [("content-type", "application/json"), ("transfer-encoding", "chunked")]) + b"zz\r\n"), Close()],
)


def flaky(chance: random.Random) -> Callable[[Request], Any]:
    """Well every third time, else one of the faults before there is any content."""
    well = healthy()
    return lambda request: well(request) if chance.random() < 0.34 else chance.choice(FAULTS)


def torn(chance: random.Random) -> Callable[[Request], Any]:
    """A stream that is cut behind its content, or ends in an error."""
    ends = ([Close()], [Reset()], [Send(frame({"error": {"message": "The engine died.", "type": "server_error"}}))], [Send(b"zz\r\n"), Close()])
    return lambda request: opened(ROLE, content(TEXT[:20]), *chance.choice(ends))


LONG = opened(ROLE, Repeat([content("more and more words "), Sleep(0.02)], 500), FINISH, DONE)


def models(provider: Provider, turn: int) -> dict[str, Any]:
    """models.json as an operator edits it: a provider comes and goes, a limit changes."""
    def entry(name: str, **more: Any) -> dict[str, Any]:
        return {"baseUrl": provider.url(name), "default": "m", "enableFallback": False, "models": ["m"], "keys": ["env:FAKE_KEY"], **more}
    return {"flaky": entry("flaky"), "chat": entry("chat"), "messages": entry("messages", format="messages"), "responses": entry("responses", format="responses"),
            **({"guest": entry("chat")} if turn % 2 else {}), "torn": entry("torn"), "long": entry("long"),
            "carousel": {"limits": {**LIMITS, "keepAlive": 10 + turn % 3}, "aliases": {"any": ["chat", "flaky", "messages", "responses"]}}}


# ---------------------------------------------------------------- clients

@dataclass
class Load:
    """What clients do, and what became of it; shared by their threads."""
    gateway: Gateway
    counts: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    going: threading.Event = field(default_factory=threading.Event)
    ended: bool = False

    def run(self, seed: int) -> None:
        """One client until the end; it rests while `going` is not set."""
        chance = random.Random(seed)
        while not self.ended:
            if not self.going.wait(0.1):
                continue
            kind = chance.choices(tuple(ACTIONS), [weight for weight, _ in ACTIONS.values()])[0]
            try:
                trouble = ACTIONS[kind][1](self.gateway, chance)
            except (OSError, AssertionError, ValueError, LookupError, AttributeError) as error:
                trouble = repr(error)
            self.counts[kind] += 1
            if trouble:
                self.errors.append(f"{kind}: {trouble}"[:500])
            time.sleep(PAUSE_S * chance.uniform(0.5, 1.5))


def ask_anything(gateway: Gateway, chance: random.Random) -> str:
    """A request that some provider can answer; what is wrong with the answer."""
    client, streamed = chance.choice(FORMATS), chance.random() < 0.6
    reply = gateway.post(PATHS[client], ask(client, "any", "x" * chance.choice((20, 2000, 60_000))), stream=streamed)
    if reply.status != 200 or not reply.complete:
        return f"{client} streamed={streamed}: {reply.status} {reply.body[:200]!r}"
    said = read(client, reply)
    return "" if (said.text, said.stop, said.error) == (TEXT, "stop", "") else f"{client} streamed={streamed}: {said}"


def ask_torn(gateway: Gateway, chance: random.Random) -> str:
    """A stream that breaks: an exact beginning and an error event, in the client's own format."""
    client = chance.choice(FORMATS)
    reply = gateway.post(PATHS[client], ask(client, "torn/m"), headers={"x-aicarousel-no-fallback": "1"})
    if reply.status != 200 or not reply.complete:
        return f"{client}: {reply.status} {reply.body[:200]!r}"
    said = read(client, reply)
    return "" if said.error and TEXT.startswith(said.text) else f"{client}: {said}"


def leave(gateway: Gateway, chance: random.Random) -> str:
    """A client that goes in the middle of an answer."""
    client = chance.choice(FORMATS)
    with gateway.connect() as connection:
        connection.send(gateway.request_bytes("POST", PATHS[client], ask(client, "long/m")))
        if chance.random() < 0.8:
            connection.read_until(b"more and more")
        if chance.random() < 0.5:
            connection.reset()
    return ""


def ask_badly(gateway: Gateway, chance: random.Random) -> str:
    """What is refused."""
    status, reply = chance.choice((
        (400, lambda: gateway.post("/v1/chat/completions", b"{not json")), (401, lambda: gateway.post("/v1/messages", ask("messages", "any"), key="sk-wrong")),
        (400, lambda: gateway.post("/v1/responses", {"model": "any"})), (404, lambda: gateway.get("/nothing"))))
    found = reply().status
    return "" if found == status else f"{found} instead of {status}"


def ask_in_a_row(gateway: Gateway, chance: random.Random) -> str:
    """Several requests on one connection, which is kept for a while."""
    with gateway.connect() as connection:
        for _ in range(3):
            connection.raw.clear()
            connection.send(gateway.request_bytes("POST", "/v1/chat/completions", ask("chat", "any", stream=False), close=False))
            connection.read_until(lambda raw: read_reply(raw, "left").complete)
            reply = connection.reply()
            if reply.status != 200 or read("chat", reply).text != TEXT:
                return f"{reply.status} {reply.body[:200]!r}"
    return ""


def look(gateway: Gateway, chance: random.Random) -> str:
    found = [gateway.get(path).status for path in ("/v1/models", "/health", "/")]
    return "" if found == [200] * 3 else str(found)


ACTIONS: dict[str, tuple[float, Callable[[Gateway, random.Random], str]]] = {
    "answered": (70, ask_anything), "torn": (8, ask_torn), "left": (10, leave), "refused": (5, ask_badly), "in a row": (5, ask_in_a_row), "looked": (2, look),
}


# ---------------------------------------------------------------- what is measured

@dataclass(frozen=True)
class Rest:
    """What is there while nothing is under way."""
    files: int
    tasks: int
    rss_mb: float


@dataclass
class Report:
    """What a soak found."""
    counts: Counter[str]
    errors: list[str]
    before: Rest                        #: after the warm-up
    after: Rest
    slope_mb: float                     #: per minute, of memory under load after the warm-up
    n_reloads: int
    log: str

    def complaints(self) -> list[str]:
        """What is not as it has to be."""
        found = [f"{len(self.errors)} errors, such as {self.errors[:3]}"] if self.errors else []
        found += [f"{kind} never happened" for kind in ACTIONS if not self.counts[kind]]
        found += ["the configuration was never read again"] if not self.n_reloads else []
        found += [f"file descriptors: {self.before.files}, then {self.after.files}"] if self.after.files > self.before.files + 10 else []
        found += [f"tasks: {self.before.tasks}, then {self.after.tasks}"] if self.after.tasks > self.before.tasks + 2 else []
        found += [f"memory grows {self.slope_mb:.2f} MB a minute"] if self.slope_mb >= SLOPE_MB_PER_MINUTE else []
        found += [f"the log has {word!r}" for word in ("Traceback", FAKE_KEY) if word in self.log]
        return found

    def lines(self) -> list[str]:
        told = ", ".join(f"{count} {kind}" for kind, count in self.counts.most_common())
        return [f"requests: {told}; errors: {len(self.errors)}; edits of models.json: {self.n_reloads}",
                f"at rest after the warm-up {self.before}, at the end {self.after}; memory {self.slope_mb:+.2f} MB a minute under load"]


def rest(load: Load) -> Rest:
    """Takes the load away for a moment and counts what stays."""
    load.going.clear()
    ends_at = time.monotonic() + 10.0
    while True:
        time.sleep(REST_S)
        seen = Rest(load.gateway.open_files(), load.gateway.health()["tasks"], round(load.gateway.rss_bytes() / 1e6, 1))
        if seen.tasks <= 4 or time.monotonic() > ends_at:
            load.going.set()
            return seen


def slope(samples: list[tuple[float, float]]) -> float:
    """Of the straight line through (minute, MB) that fits best."""
    middle_x, middle_y = (sum(column) / len(samples) for column in zip(*samples))
    return sum((x - middle_x) * (y - middle_y) for x, y in samples) / sum((x - middle_x) ** 2 for x, _ in samples)


def soak(minutes: float, warm_up_s: float, seed: int, say: Callable[[str], None] = lambda line: None) -> Report:
    """Load for so long, the warm-up in front of it not counted."""
    provider, chance = Provider(), random.Random(seed)
    logging.getLogger("asyncio").setLevel(logging.ERROR)        # the provider's loop: clients that leave are part of this
    for name, script in (("flaky", flaky(chance)), ("chat", healthy()), ("messages", in_format("messages")), ("responses", in_format("responses")), ("torn", torn(chance)), ("long", LONG)):
        provider.script(name, script)
    with contextlib.closing(provider), Gateway(models(provider, 0), {"FAKE_KEY": FAKE_KEY}) as gateway:
        load = Load(gateway)
        clients = [threading.Thread(target=load.run, args=(seed * 100 + number,), daemon=True) for number in range(N_CLIENTS)]
        for client in clients:
            client.start()
        load.going.set()
        began, before, samples, turn = time.monotonic(), None, [], 0
        while (gone_s := time.monotonic() - began) < warm_up_s + minutes * 60:
            time.sleep(1.0)
            turn += 1
            if turn % 4 == 0:
                gateway.write_models(models(provider, turn // 4))
            if gone_s >= warm_up_s:
                before = before or rest(load)
                samples.append((gone_s / 60, gateway.rss_bytes() / 1e6))
            if turn % 30 == 0:
                say(f"{gone_s:.0f} s: {sum(load.counts.values())} requests, {len(load.errors)} errors, {gateway.open_files()} files, {gateway.rss_bytes() / 1e6:.1f} MB")
        after = rest(load)
        load.ended = True
        for client in clients:
            client.join(30)
        assert before is not None and gateway.stop() == 0
        return Report(load.counts, load.errors, before, after, slope(samples), gateway.log.count("reloaded providers="), gateway.log)


def main() -> int:
    parser = argparse.ArgumentParser(description="Load a gateway for minutes; the exit status is 0 when nothing was lost and nothing grew.")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--warm-up", type=float, default=90.0, metavar="SECONDS")
    parser.add_argument("--seed", type=int, default=random.randrange(10 ** 6))
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    report = soak(arguments.minutes, arguments.warm_up, arguments.seed, lambda line: print(line, flush=True))
    complaints = report.complaints()
    print("\n".join([*report.lines(), *(f"FAILED: {line}" for line in complaints), *report.errors[:20]]))
    return 1 if complaints else 0


if __name__ == "__main__":
    raise SystemExit(main())
