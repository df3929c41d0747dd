"""The carousel's mind at work on a virtual clock: thousands of requests, the real policy functions, providers that enforce their published limits.

Every pool is offered the same load three times: to the policy of sections 6 and 7, to a scheduler that sees the providers' own counts (nothing could
serve more than what it is granted), and to naive round robin that tries one provider after the other. The figures are those of the table it prints.
"""
from __future__ import annotations

import heapq
import itertools
import json
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest

from aicarousel import (Facts, Hold, Ledger, Plan, Route, RoutingState, begin_attempt, build_catalogue, classify, clear, cool, feed, find_shortage, learn_refusal, load_config, note_served, plan,
                        prepare_ledger, release, reserve, resolve, settle)

Json = dict[str, Any]
UTC0 = 1_792_000_000.0          # the instant at which the virtual clock is 0; somewhere inside a day
MAX_WAIT_S = 30.0
MAX_ATTEMPTS = 6
DAY = 86_400.0


# ------------------------------------------------------------------ what providers grant

@dataclass(slots=True)
class Truth:
    """A window as its provider counts it."""
    measure: str
    span_s: float
    limit: float
    kind: str = "sliding"           # sliding, fixed, refill
    phase_s: float = 0.0            # fixed: when windows begin
    used: float = 0.0
    at: float = 0.0
    log: deque[tuple[float, float]] = field(default_factory=deque)

    def look(self, now: float) -> None:
        if self.kind == "sliding":
            while self.log and self.log[0][0] <= now - self.span_s:
                self.used -= self.log.popleft()[1]
        elif self.kind == "fixed":
            if (now - self.phase_s) // self.span_s > (self.at - self.phase_s) // self.span_s:
                self.used = 0.0
        else:
            self.used = max(self.used - (now - self.at) * self.limit / self.span_s, 0.0)
        self.at = now

    def add(self, now: float, amount: float) -> None:
        self.look(now)
        self.used += amount
        if self.kind == "sliding":
            self.log.append((now, amount))

    def wait_s(self, now: float, amount: float) -> float:
        """How long until `amount` fits."""
        self.look(now)
        short = self.used + amount - self.limit
        if short <= 1e-6:
            return 0.0
        if self.kind == "fixed":
            return self.span_s - (now - self.phase_s) % self.span_s
        if self.kind == "refill":
            return short / self.limit * self.span_s
        for at, part in self.log:
            short -= part
            if short <= 1e-6:
                return at + self.span_s - now + 1e-6
        return self.span_s

    def reset_s(self, now: float) -> float:
        """What its header says: the end of a fixed window, the time to full of a refill, the end of the oldest entry of a sliding one."""
        self.look(now)
        if self.kind == "fixed":
            return self.span_s - (now - self.phase_s) % self.span_s
        if self.kind == "refill":
            return self.used / self.limit * self.span_s
        return self.log[0][0] + self.span_s - now if self.log else 0.0


class Spec(NamedTuple):
    """A bucket of a pool: its entry in models.json, its windows, how it tells of them."""
    preset: str
    windows: tuple[tuple[str, float, float, str], ...]     # measure, span, limit, kind
    style: str                      # groq, cerebras, mistral, anthropic, plain, none
    body: str = ""                  # gemini, groq, openrouter, "": what its 429 says
    configured: bool = False        # its limits stand in models.json
    retry_after: bool = True

    @property
    def announced(self) -> bool:
        return self.configured or self.style != "none"


R, T, M = "requests", "tokens", 60.0
#: Published free-tier limits (provider sheets, 2026-11), and what vendors' own rate limits are elsewhere.
SPECS: dict[str, Spec] = {
    "groq": Spec("groq", ((R, M, 30, "refill"), (R, DAY, 1000, "refill"), (T, M, 8_000, "refill"), (T, DAY, 200_000, "refill")), "groq", "groq"),
    "cerebras": Spec("cerebras", ((R, M, 5, "fixed"), (T, M, 30_000, "fixed"), (T, DAY, 1_000_000, "fixed")), "cerebras"),
    "cerebras-sliding": Spec("cerebras", ((R, M, 5, "sliding"), (T, M, 30_000, "sliding"), (T, DAY, 1_000_000, "sliding")), "cerebras"),
    "gemini-lite": Spec("gemini", ((R, M, 15, "sliding"), (R, DAY, 500, "fixed"), ("input", M, 250_000, "sliding")), "none", "gemini"),
    "gemini-flash": Spec("gemini", ((R, M, 5, "fixed"), (R, DAY, 20, "fixed"), ("input", M, 250_000, "fixed")), "none", "gemini"),
    "gemma": Spec("gemini", ((R, M, 15, "fixed"), (R, DAY, 1500, "fixed")), "none", "gemini"),
    "openrouter": Spec("openrouter", ((R, M, 20, "fixed"), (R, DAY, 50, "fixed")), "none", "openrouter"),
    "mistral": Spec("mistral", ((R, M, 60, "sliding"), (T, M, 500_000, "sliding")), "mistral"),
    "nvidia": Spec("nvidia", ((R, M, 40, "sliding"),), "none", retry_after=False),
    "nvidia-fixed": Spec("nvidia", ((R, M, 40, "fixed"),), "none", retry_after=True),
    "sambanova": Spec("sambanova", ((R, M, 20, "fixed"), (R, DAY, 20, "fixed"), (T, DAY, 200_000, "fixed")), "plain"),
    "anthropic": Spec("anthropic", ((R, M, 50, "refill"), ("input", M, 30_000, "refill"), ("output", M, 8_000, "refill")), "anthropic"),
    "configured": Spec("custom", ((R, M, 30, "sliding"), (T, M, 60_000, "sliding")), "none", configured=True, retry_after=False),
    "configured-fixed": Spec("custom", ((R, M, 30, "fixed"), (R, DAY, 400, "fixed")), "none", configured=True),
    "silent": Spec("custom", ((R, M, 12, "sliding"),), "none", retry_after=False),
    "silent-fixed": Spec("custom", ((R, M, 25, "fixed"),), "none", retry_after=False),
    "silent-tokens": Spec("custom", ((T, M, 40_000, "sliding"),), "none", body="groq"),
    "plain-sliding": Spec("custom", ((R, M, 20, "sliding"),), "plain"),
    "tokens-sliding": Spec("cerebras", ((T, M, 8_000, "sliding"), (R, DAY, 1000, "sliding")), "cerebras"),
    "plain": Spec("custom", ((R, M, 60, "fixed"),), "plain"),
}

ERROR = {
    "gemini": lambda window, now: {"error": {"code": 429, "status": "RESOURCE_EXHAUSTED", "message": f"You exceeded your current quota. limit: {window.limit:.0f}", "details": [
        {"@type": "type.googleapis.com/google.rpc.QuotaFailure", "violations": [{"quotaId": (
            f"GenerateRequestsPer{'Day' if window.span_s == DAY else 'Minute'}PerProjectPerModel-FreeTier" if window.measure == R
            else "GenerateContentInputTokensPerModelPerMinute-FreeTier"), "quotaValue": f"{window.limit:.0f}"}]},
        {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": f"{min(window.wait_s(now, 1.0), 59.0):.3f}s"}]}},
    "groq": lambda window, now: {"error": {"message": (
        f"Rate limit reached for model `m` on {window.measure} per {'day' if window.span_s == DAY else 'minute'} "
        f"({window.measure[0].upper()}P{'D' if window.span_s == DAY else 'M'}): Limit {window.limit:.0f}, Used {window.used:.0f}, Requested 1. "
        f"Please try again in {window.wait_s(now, 1.0):.2f}s."), "type": window.measure, "code": "rate_limit_exceeded"}},
    "openrouter": lambda window, now: {"error": {"code": 429, "message": f"Rate limit exceeded: free-models-per-{'day' if window.span_s == DAY else 'min'}", "metadata": {"headers": {
        "X-RateLimit-Limit": f"{window.limit:.0f}", "X-RateLimit-Remaining": "0", "X-RateLimit-Reset": f"{(UTC0 + now + window.reset_s(now)) * 1000:.0f}"}}}},
    "": lambda window, now: {"error": {"message": "Rate limit exceeded", "type": "rate_limit_exceeded"}},
}


class Provider:
    """What stands at the other end: counts, refuses, answers, fails for a while."""

    def __init__(self, spec: Spec, dice: random.Random, outages: tuple[tuple[float, float], ...] = ()) -> None:
        self.spec, self.outages = spec, outages
        # Days end where their preset's do: Pacific midnight is 7 or 8 hours behind UTC.
        midnight = {"gemini": 7 * 3600.0}.get(spec.preset, 0.0) - UTC0 % DAY
        self.windows = [Truth(measure, span_s, limit, kind, midnight if span_s == DAY else dice.random() * span_s) for measure, span_s, limit, kind in spec.windows]

    def is_out(self, now: float) -> bool:
        return any(start <= now < end for start, end in self.outages)

    @staticmethod
    def asks(window: Truth, n_input: int) -> float:
        """What a request counts when it arrives: nobody knows yet how long its answer will be."""
        return {"requests": 1.0, "input": float(n_input), "output": 0.0, "tokens": float(n_input)}[window.measure]

    def wait_s(self, now: float, n_input: int) -> float:
        return max(window.wait_s(now, self.asks(window, n_input)) for window in self.windows)

    def short(self, now: float, n_input: int) -> Truth | None:
        """The window that refuses, the longest wait first."""
        worst = max(self.windows, key=lambda window: window.wait_s(now, self.asks(window, n_input)))
        return worst if worst.wait_s(now, self.asks(worst, n_input)) > 0.0 else None

    def take(self, now: float, n_input: int) -> None:
        for window in self.windows:
            window.add(now, self.asks(window, n_input))

    def finish(self, now: float, n_output: int) -> None:
        for window in self.windows:
            if window.measure in ("output", "tokens"):
                window.add(now, float(n_output))

    def headers(self, now: float) -> list[tuple[str, str]]:
        """The rate-limit headers of any answer."""
        rows: list[tuple[str, str]] = []
        for window in self.windows:
            window.look(now)
            left, reset_s = f"{max(window.limit - window.used, 0.0):.0f}", window.reset_s(now)
            day, style = window.span_s == DAY, self.spec.style
            if style == "groq" and (window.measure, day) in ((R, True), (T, False)):
                rows += [(f"x-ratelimit-{name}-{window.measure}", value) for name, value in (
                    ("limit", f"{window.limit:.0f}"), ("remaining", left), ("reset", f"{reset_s // 60:.0f}m{reset_s % 60:.3f}s"))]
            elif style == "cerebras":
                rows += [(f"x-ratelimit-{name}-{window.measure}-{'day' if day else 'minute'}", value) for name, value in (
                    ("limit", f"{window.limit:.0f}"), ("remaining", left), ("reset", f"{reset_s}"))]
            elif style == "mistral":
                word = "req" if window.measure == R else window.measure
                rows += [(f"x-ratelimit-limit-{word}-minute", f"{window.limit:.0f}"), (f"x-ratelimit-remaining-{word}-minute", left)]
            elif style == "anthropic":
                word = window.measure if window.measure == R else f"{window.measure}-tokens"
                from datetime import datetime, timezone
                reset = datetime.fromtimestamp(UTC0 + now + reset_s + 1.0, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
                rows += [(f"anthropic-ratelimit-{word}-limit", f"{window.limit:.0f}"), (f"anthropic-ratelimit-{word}-remaining", left),
                         (f"anthropic-ratelimit-{word}-reset", reset)]
            elif style == "plain" and window.measure == R:
                tail = "requests-day" if day else "requests"
                rows += [(f"x-ratelimit-limit-{tail}", f"{window.limit:.0f}"), (f"x-ratelimit-remaining-{tail}", left),
                         (f"x-ratelimit-reset-{tail}", f"{UTC0 + now + reset_s:.0f}")]
        return rows

    def refusal(self, window: Truth, now: float) -> tuple[dict[str, str], bytes]:
        headers = dict(self.headers(now))
        if self.spec.retry_after:
            headers["retry-after"] = f"{int(window.wait_s(now, 1.0)) + 1}"
        return headers, json.dumps(ERROR[self.spec.body](window, now)).encode()


# ------------------------------------------------------------------ the load

class Ask(NamedTuple):
    at: float
    n_input: int
    n_output: int
    guess_input: int
    travel_s: float
    takes_s: float


@dataclass
class Outcome:
    """What became of a load."""
    n_asked: int = 0
    n_served: int = 0
    n_attempts: dict[bool, int] = field(default_factory=lambda: {True: 0, False: 0})      # by whether limits are announced
    n_refused: dict[bool, int] = field(default_factory=lambda: {True: 0, False: 0})
    n_unjust: int = 0               # 429 to a client while a bucket had room within the wait


def capacity_per_s(specs: list[Spec], mean_tokens: float, span_s: float) -> float:
    """Requests a second that the pool grants over `span_s`."""
    def rate(spec: Spec) -> float:
        return min(limit * max(1.0, span_s / span if span < DAY else 1.0) / (span_s if span < DAY else span_s) / (1.0 if measure == R else mean_tokens)
                   for measure, span, limit, _ in spec.windows)
    return sum(rate(spec) for spec in specs)


def make_load(specs: list[Spec], times: float, burst: int, span_s: float, dice: random.Random) -> list[Ask]:
    """`times` the pool's capacity, evenly at random or in bursts."""
    rate, now, asks = times * capacity_per_s(specs, 900.0, span_s), 0.0, []
    while now < span_s:
        now += dice.expovariate(rate / burst)
        for _ in range(burst):
            n_input, n_output = int(dice.lognormvariate(6.3, 0.5)), int(dice.lognormvariate(5.2, 0.6))
            asks.append(Ask(now, n_input, n_output, int(n_input * dice.uniform(0.95, 1.25)), dice.uniform(0.02, 0.25), dice.uniform(0.5, 4.0)))
    return asks


# ------------------------------------------------------------------ three schedulers

def run_omniscient(providers: list[Provider], load: list[Ask]) -> int:
    """How many are served by one who sees the providers' counts: at once, or in turn as soon as one has room, within the wait."""
    served, free_at = 0, 0.0
    for ask in load:
        now = max(ask.at, free_at)          # first in, first out
        while now <= ask.at + MAX_WAIT_S:
            ready = [provider for provider in providers if not provider.is_out(now) and provider.short(now, ask.n_input) is None]
            if ready:
                chosen = max(ready, key=lambda provider: min(1.0 - window.used / window.limit for window in provider.windows))
                chosen.take(now, ask.n_input)
                chosen.finish(now, ask.n_output)
                served += 1
                free_at = now
                break
            waits = [provider.wait_s(now, ask.n_input) if not provider.is_out(now)
                     else next(end for start, end in provider.outages if start <= now < end) - now for provider in providers]
            now += max(min(waits), 1e-3)
    return served


class Clock:
    """Events in order of their time."""

    def __init__(self) -> None:
        self.now, self._events, self._order = 0.0, [], itertools.count()

    def at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._order), what))

    def run(self) -> None:
        while self._events:
            self.now, _, what = heapq.heappop(self._events)
            what()


def models_of(specs: dict[str, Spec]) -> Json:
    """The models.json of a pool."""
    rows: Json = {}
    for name, spec in specs.items():
        limits = {{(R, M): "rpm", (R, DAY): "rpd", (T, M): "tpm", (T, DAY): "tpd"}[measure, span]: int(limit) for measure, span, limit, _ in spec.windows} if spec.configured else {}
        rows[name] = {"baseUrl": "http://127.0.0.1:9/v1", "default": "m", "enableFallback": False, "models": ["m"], "keys": ["env:KEY"],
                      **({"preset": spec.preset} if spec.preset != "custom" else {}), **({"limits": limits} if limits else {})}
    return rows


class Carousel:
    """The policy, with a queue in front as the relay has one: first in, first out, nobody longer than MAX_WAIT_S."""

    def __init__(self, specs: dict[str, Spec], providers: dict[str, Provider], dice: random.Random) -> None:
        config = load_config(json.dumps(models_of(specs)), models_path="models.json", environment={"KEY": "fake-key-number-1"}, dotenv={}, flags={})
        self.catalogue, self.state, self.clock, self.dice = build_catalogue(config), RoutingState(), Clock(), dice
        self.providers, self.outcome = providers, Outcome()
        self.n_travelling = dict.fromkeys(providers, 0)
        self.line: deque[tuple[Ask, int]] = deque()
        self.due_at = float("inf")
        self.choice = resolve(self.catalogue, None)
        prepare_ledger(self.state.ledger, config.active, utc_less_now=UTC0)

    def run(self, load: list[Ask]) -> Outcome:
        for ask in load:
            self.clock.at(ask.at, lambda ask=ask: self.arrive(ask))
        self.outcome.n_asked = len(load)
        self.clock.run()
        return self.outcome

    def arrive(self, ask: Ask) -> None:
        self.line.append((ask, 0))
        if len(self.line) == 1:
            self.serve_line()

    def wake(self, at: float) -> None:
        if at < self.due_at:
            self.due_at = at
            self.clock.at(at, self.look)

    def look(self) -> None:
        if self.clock.now >= self.due_at:
            self.due_at = float("inf")
            self.serve_line()

    def serve_line(self) -> None:
        """Let as many go as there is room for."""
        now = self.clock.now
        while self.line:
            ask, n_tried = self.line[0]
            found = self.plan(ask, now)
            if found.routes:
                self.line.popleft()
                self.send(found.routes[0], ask, n_tried)
            elif found.free_at is not None and found.free_at <= ask.at + MAX_WAIT_S:
                return self.wake(found.free_at)
            else:
                self.line.popleft()
                self.refuse(ask)

    def plan(self, ask: Ask, now: float) -> Plan:
        return plan(self.catalogue, self.choice, self.state, now, strategy="round-robin", fallback="chain", facts=Facts(ask.guess_input, 250), give_up_at=ask.at + MAX_WAIT_S)

    def refuse(self, ask: Ask) -> None:
        """A 429 to the client; unjust where one whose limits are known has had room all along, and is not expected to have any for a while."""
        now, ledger = self.clock.now, self.state.ledger
        for route in (route for group in self.choice.groups for routes in group for route in routes):
            provider = self.providers[route.provider.name]
            idle = all(window.used + 0.25 * window.limit + 2 * provider.asks(window, ask.n_input) < window.limit for window in provider.windows)
            if provider.spec.style != "none" and not provider.outages and not self.n_travelling[route.provider.name] and provider.short(now, ask.n_input) is None and idle:
                shortage = find_shortage(ledger, route, ask.guess_input, 250, now)
                self.outcome.n_unjust += shortage is not None and shortage.at > now + 5.0

    def send(self, route: Route, ask: Ask, n_tried: int) -> None:
        begin_attempt(self.state, self.choice, route)
        hold = reserve(self.state.ledger, route, ask.guess_input, 250, self.clock.now)
        self.n_travelling[route.provider.name] += 1
        self.clock.at(self.clock.now + ask.travel_s, lambda: self.judge(route, ask, n_tried + 1, hold))

    def judge(self, route: Route, ask: Ask, n_tried: int, hold: Hold) -> None:
        """The provider has the request: it answers or refuses."""
        provider, now, state = self.providers[route.provider.name], self.clock.now, self.state
        spec = provider.spec
        self.n_travelling[route.provider.name] -= 1
        self.outcome.n_attempts[spec.announced] += 1
        window = provider.short(now, ask.n_input)
        status, headers, body = 200, dict(provider.headers(now)), b""
        if provider.is_out(now):
            status, headers, body = 503, {}, b""
        elif window is not None:
            status, (headers, body) = 429, provider.refusal(window, now)
            self.outcome.n_refused[spec.announced] += 1
        if status == 200:
            provider.take(now, ask.n_input)
            self.outcome.n_served += 1
            feed(state.ledger, route, provider.headers(now), now, hold)
            clear(state, route)
            note_served(state, route, Facts(), 300.0, now)
            self.clock.at(now + ask.takes_s, lambda: self.finish(provider, ask, hold))
            return self.serve_line()
        failure = classify(route.provider.preset.name, route.provider.preset.bucket, status, headers, body, utc=UTC0 + now)
        release(state.ledger, hold, now)
        feed(state.ledger, route, headers.items(), now)
        learn_refusal(state.ledger, route, failure, body.decode(), now)
        cool(state, route, failure, now, jitter=self.dice.random())
        if n_tried < MAX_ATTEMPTS:
            self.line.appendleft((ask, n_tried))
        else:
            self.refuse(ask)
        self.serve_line()


    def finish(self, provider: Provider, ask: Ask, hold: Hold) -> None:
        """The answer is whole."""
        provider.finish(self.clock.now, ask.n_output)
        settle(self.state.ledger, hold, ask.n_input, ask.n_output, self.clock.now)
        self.serve_line()


def run_naive(providers: list[Provider], load: list[Ask]) -> tuple[int, int, int]:
    """(served, attempts, refused) of plain rotation: the next provider, and on a refusal the one after it, once round."""
    served = attempts = refused = turn = 0
    for ask in load:
        for step in range(min(len(providers), MAX_ATTEMPTS)):
            provider, now = providers[(turn + step) % len(providers)], ask.at + step * ask.travel_s
            attempts += 1
            if provider.is_out(now):
                continue
            if provider.short(now, ask.n_input) is None:
                provider.take(now, ask.n_input)
                provider.finish(now, ask.n_output)
                served += 1
                break
            refused += 1
        turn += 1
    return served, attempts, refused


# ------------------------------------------------------------------ the pools

POOLS: dict[str, list[str]] = {
    "2 announced": ["groq", "cerebras"],
    "3 sliding": ["plain-sliding", "tokens-sliding", "cerebras-sliding"],
    "3 free tiers": ["groq", "gemini-lite", "mistral"],
    "4 silent": ["silent", "silent-fixed", "nvidia", "silent-tokens"],
    "4 configured": ["configured", "configured-fixed", "configured", "configured-fixed"],
    "6 mixed": ["groq", "cerebras", "mistral", "anthropic", "plain", "configured"],
    "8 free tiers": ["groq", "cerebras", "gemini-lite", "gemma", "openrouter", "mistral", "nvidia", "sambanova"],
    "12 of all": ["groq", "groq", "cerebras", "cerebras-sliding", "gemini-lite", "gemini-flash", "gemma", "openrouter", "mistral", "nvidia-fixed", "sambanova", "plain"],
}
CASES = [(pool, times, burst, out) for pool, times, burst, out in (
    ("2 announced", 0.5, 1, False), ("2 announced", 2.0, 1, False), ("2 announced", 1.0, 50, False), ("3 sliding", 1.0, 1, False), ("3 sliding", 3.0, 1, False),
    ("3 free tiers", 0.8, 1, False), ("3 free tiers", 1.5, 50, False), ("4 silent", 0.5, 1, False), ("4 silent", 1.0, 1, False), ("4 silent", 3.0, 1, False),
    ("4 silent", 1.0, 50, False), ("4 configured", 0.9, 1, False), ("4 configured", 2.0, 50, False), ("6 mixed", 0.5, 50, False), ("6 mixed", 1.0, 1, True),
    ("6 mixed", 3.0, 1, False), ("8 free tiers", 0.7, 1, True), ("8 free tiers", 1.5, 1, False), ("12 of all", 0.9, 50, False), ("12 of all", 2.0, 1, True))]
SPAN_S = 1200.0


class Figures(NamedTuple):
    pool: str
    load: str
    n_asked: int
    omniscient: int
    served: int
    naive: int
    naive_refused: float
    refused: dict[bool, float]
    n_attempts: dict[bool, int]
    n_unjust: int


def simulate(pool: str, times: float, burst: int, out: bool, span_s: float = SPAN_S) -> Figures:
    names = POOLS[pool]
    specs = {f"p{number}-{name}": SPECS[name] for number, name in enumerate(names)}
    seed = f"{pool} {times} {burst} {out}"

    def make() -> dict[str, Provider]:
        dice = random.Random(seed)
        return {name: Provider(spec, dice, ((300.0, 480.0),) if out and number % 3 == 2 else ()) for number, (name, spec) in enumerate(specs.items())}
    load = make_load(list(specs.values()), times, burst, span_s, random.Random(seed))
    best = run_omniscient(list(make().values()), load)
    naive, naive_attempts, naive_refused = run_naive(list(make().values()), load)
    found = Carousel(specs, make(), random.Random(seed)).run(load)
    return Figures(pool, f"{times:g}x" + (f" bursts of {burst}" if burst > 1 else "") + (" outages" if out else ""), len(load), best, found.n_served, naive,
                   naive_refused / max(naive_attempts, 1), {known: found.n_refused[known] / max(found.n_attempts[known], 1) for known in (True, False)}, found.n_attempts, found.n_unjust)


ROWS: list[str] = [f"{'pool':<14} {'load':<22} {'asked':>6} {'best':>6} {'served':>6} {'share':>7} {'refused, announced':>19} {'silent':>7} {'429 unjust':>10}   naive: served, refused"]


def show(figures: Figures) -> str:
    return (f"{figures.pool:<14} {figures.load:<22} {figures.n_asked:>6} {figures.omniscient:>6} {figures.served:>6} {figures.served / figures.omniscient:>7.1%} "
            f"{figures.refused[True]:>19.2%} {figures.refused[False]:>7.2%} {figures.n_unjust:>10}   {figures.naive / figures.omniscient:>6.1%} {figures.naive_refused:>7.1%}")


@pytest.mark.parametrize("case", CASES, ids=[f"{pool}, {times:g}x, bursts of {burst}{', outages' if out else ''}" for pool, times, burst, out in CASES])
def test_the_pool_gives_nearly_all_it_can(case: tuple[str, float, int, bool]) -> None:
    found = simulate(*case)
    ROWS.append(show(found))
    assert found.served >= 0.97 * found.omniscient, show(found)
    assert found.refused[True] <= 0.01, show(found)
    assert found.refused[False] <= 0.05, show(found)
    assert found.n_unjust == 0, show(found)


def test_the_table_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print("\n" + "\n".join(ROWS))
    assert len(ROWS) > 1


if __name__ == "__main__":
    print(ROWS[0])
    for case in CASES:
        print(show(simulate(*case)), flush=True)
