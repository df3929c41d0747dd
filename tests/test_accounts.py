"""Prices, costs, statistics and the limits of gateway keys: what was used is what providers say they served, and no key goes over its limits."""

from __future__ import annotations

import json
import random
import re
import select
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import aicarousel
from aicarousel import Accounts, GatewayError, GatewayKey, KeyLimits, Model, Price, TokenClasses, Usage, UsageRow, UsageWriter
from dialects import PATHS, Telling
from fakes import DONE, HANG_S, ROOT, Close, Pause, Provider, Reply, Request, answer, chat_answer, chat_chunk, content, frame, healthy, opened, stream
from house import House
from test_store import ROW

Json = dict[str, Any]
Build = Callable[..., House]
WIRES = ("chat", "responses", "messages")


# ---------------------------------------------------------------- prices

MILLION = Usage(1_000_000, 1_000_000)
COSTS: dict[str, tuple[Usage, Price | None, float | None]] = {
    "in and out": (MILLION, Price(2.0, 10.0), 12.0),
    "cached tokens once": (Usage(1_000_000, 0, cached=400_000), Price(2.0, 10.0, 0.5), 0.6 * 2 + 0.4 * 0.5),
    "written ones too": (Usage(1_000_000, 0, cached=400_000, cache_write=100_000), Price(2.0, 10.0, 0.5, 2.5), 0.5 * 2 + 0.4 * 0.5 + 0.1 * 2.5),
    "no price for a cache is that of input": (Usage(1_000_000, 0, cached=400_000, cache_write=100_000), Price(2.0, 10.0), 2.0),
    "reasoning is in the output": (Usage(0, 1_000_000, reasoning=900_000), Price(2.0, 10.0), 10.0),
    "more cached than there was": (Usage(100, 0, cached=10_000_000, cache_write=5), Price(2.0, 10.0, 1.0), 0.0001),
    "free": (MILLION, Price(0.0, 0.0), 0.0),
    "unknown": (MILLION, None, None),
    "unknown output": (MILLION, Price(2.0, None), None),
    "unknown output, none used": (Usage(1_000_000, 0), Price(2.0, None), 2.0),
    "unknown input, all of it cached": (Usage(1_000_000, 0, cached=1_000_000), Price(None, 1.0, 0.5), 0.5),
    "nothing used": (Usage(), None, 0.0),
    "a long prompt": (Usage(300_000, 1_000_000), Price(1.0, 10.0, long_over=272_000, long_input=2.0, long_output=1.5), 0.6 + 15.0),
    "as long as is allowed": (Usage(272_000, 0), Price(1.0, 10.0, long_over=272_000, long_input=2.0, long_output=1.5), 0.272),
    "a long prompt at a price nobody states": (Usage(300_000, 1), Price(1.0, 10.0, long_over=272_000), None),
}


@pytest.mark.parametrize("case", COSTS)
def test_cost(case: str) -> None:
    usage, price, cost = COSTS[case]
    assert aicarousel.cost_usd(aicarousel.token_classes(usage), price) == (cost if cost is None else pytest.approx(cost, abs=1e-12))


@pytest.mark.parametrize("usage", [Usage(10, 3), Usage(10, 3, 4, 2, 1), Usage(10, 3, 40, 2), Usage(10, 3, 4, 20), Usage(0, 0, 5, 5)])
def test_classes_add_up_to_what_was_used(usage: Usage) -> None:
    tokens = aicarousel.token_classes(usage)
    assert tokens.input + tokens.cached + tokens.cache_write == usage.input and tokens.output == usage.output and min(tokens) >= 0


def provider_of(**entries: Json) -> dict[str, aicarousel.Provider]:
    config = aicarousel.load_config(json.dumps(entries), models_path="models.json", environment={"FAKE_KEY": "k" * 20}, dotenv={}, flags={})
    return {provider.name: provider for provider in config.providers}


LISTED = {"default": "m", "enableFallback": True, "keys": ["env:FAKE_KEY"]}
PRICED: list[tuple[str, str, Json, float | None]] = [      # provider, model, entry, price of input
    ("groq", "openai/gpt-oss-120b", {"models": ["m", "openai/gpt-oss-120b"]}, 0.15),
    ("groq", "openai/gpt-oss-20b", {"models": ["m"]}, 0.075),                                            # not listed, known all the same
    ("groq", "openai/gpt-oss-120b", {"models": ["m", {"id": "openai/gpt-oss-120b", "price": {"input": 9}}]}, 9),
    ("groq", "m", {"models": ["m"]}, None),
    ("mine", "openai/gpt-oss-20b", {"models": ["m"], "baseUrl": "https://mine.example/v1", "preset": "groq"}, 0.075),
    ("mine", "openai/gpt-oss-20b", {"models": ["m"], "baseUrl": "https://mine.example/v1"}, None),
    ("gemini", "gemma-4-31b-it", {"models": ["m"]}, 0.0),
    ("openrouter", "some/new-model:free", {"models": ["m"]}, 0.0),
    ("openrouter", "some/new-model", {"models": ["m"]}, None),
    ("ollama", "whatever:7b", {"models": ["m"]}, 0.0),
]


@pytest.mark.parametrize(("name", "model", "given", "price"), PRICED)
def test_price_of_a_model(name: str, model: str, given: Json, price: float | None) -> None:
    provider = provider_of(**{name: {**LISTED, **given}})[name]
    listed = next((one for one in provider.models if one.id == model), Model(model))
    found = aicarousel.price_for(provider, listed)
    assert (found.input if found else None) == price


def test_prices_of_presets_are_dated_and_readme_says_when() -> None:
    prices = [model.price for preset in aicarousel.PRESETS.values() for model in preset.models]
    assert len(prices) > 60 and all(price is not None and price.as_of == aicarousel.PRICES_AS_OF and re.fullmatch(r"20\d\d-\d\d-\d\d", price.as_of) for price in prices)
    assert f"catalogues on {aicarousel.PRICES_AS_OF};" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("price", "text"), [
    (None, ""), (Price(2.0, 10.0, 0.1), "2/10/0.1/- models.json"), (Price(0.0, 0.0, as_of="2026-11-21"), "0/0/-/- 2026-11-21"),
    (Price(1.0, None, None, 1.25, "2026-11-21", 272_000), "1/-/-/1.25 2026-11-21 (dearer over 272000)"),
])
def test_price_as_a_row_keeps_it(price: Price | None, text: str) -> None:
    assert aicarousel.price_text(price) == text


# ---------------------------------------------------------------- rows

def served(house: House, count: int) -> list[Json]:
    """The usage table once it has that many rows."""
    deadline = time.monotonic() + HANG_S
    while len(rows := house.rows()) < count and time.monotonic() < deadline:
        house.settle()
    assert len(rows) == count, rows
    return rows


def usage_of(wire: str, tokens: TokenClasses, reasoning: int = 0) -> Json:
    """What a provider of that format says it served."""
    whole = tokens.input + tokens.cached + tokens.cache_write
    if wire == "messages":
        return {"input_tokens": tokens.input, "cache_read_input_tokens": tokens.cached, "cache_creation_input_tokens": tokens.cache_write, "output_tokens": tokens.output}
    names = ("prompt", "completion") if wire == "chat" else ("input", "output")
    return {f"{names[0]}_tokens": whole, f"{names[1]}_tokens": tokens.output, "total_tokens": whole + tokens.output,
            f"{names[0]}_tokens_details": {"cached_tokens": tokens.cached, "cache_write_tokens": tokens.cache_write},
            f"{names[1]}_tokens_details": {"reasoning_tokens": reasoning}}


class Counted(Telling):
    """A Telling that says what it served."""

    def __init__(self, wire: str, tokens: TokenClasses, reasoning: int = 0) -> None:
        super().__init__(wire)
        self.usage = usage_of(wire, tokens, reasoning)

    def begin(self) -> list[bytes]:
        if self.wire != "messages":
            return super().begin()
        message = {"id": "msg_1", "type": "message", "role": "assistant", "model": "m", "content": [], "stop_reason": None, "stop_sequence": None,
                   "usage": {**self.usage, "output_tokens": 1}}
        return [self._event("message_start", message=message)]

    def end(self) -> list[bytes]:
        if self.wire == "chat":
            return [frame(chat_chunk({}, "stop")), frame({**chat_chunk({}), "choices": [], "usage": self.usage}), DONE]
        if self.wire == "messages":
            return [self._event("message_delta", delta={"stop_reason": "end_turn", "stop_sequence": None}, usage={"output_tokens": self.usage["output_tokens"]}),
                    self._event("message_stop")]
        return [self._event("response.completed", response={**self._response("completed"), "output": self.output, "usage": self.usage})]

    def whole(self, text: str) -> Json:
        """The same as an answer that is not streamed; no text: an answer with nothing in it."""
        if self.wire == "chat":
            return chat_answer(text, usage=self.usage)
        if self.wire == "messages":
            return {"id": "msg_1", "type": "message", "role": "assistant", "model": "m", "content": [{"type": "text", "text": text}] if text else [],
                    "stop_reason": "end_turn", "stop_sequence": None, "usage": self.usage}
        if text:
            self.say(text)
        return {**self._response("completed"), "output": self.output, "usage": self.usage}


def request_body(client: str, model: str, text: str = "Hi", **fields: Any) -> Json:
    """The smallest request of a client format."""
    if client == "responses":
        return {"model": model, "input": text, **fields}
    return {"model": model, "messages": [{"role": "user", "content": text}], **({"max_tokens": 1000} if client == "messages" else {}), **fields}


SERVED = TokenClasses(1000, 600, 50, 30)
FULL_PRICE = {"input": 2.0, "output": 10.0, "cacheRead": 0.2, "cacheWrite": 2.5}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("client", WIRES)
def test_a_row_has_disjoint_tokens_cost_and_price(build: Build, client: str, wire: str, streamed: bool) -> None:
    told = Counted(wire, SERVED, 7)
    script = stream(told.begin(), told.say("one"), told.end()) if streamed else answer(told.whole("one"))
    house = build(a=script, entries={"a": {"format": wire, "models": [{"id": "m", "price": FULL_PRICE}]}})
    assert house.post(PATHS[client], request_body(client, "a/m", stream=streamed)).status == 200
    [row] = served(house, 1)
    assert TokenClasses(row["input"], row["cached"], row["cache_write"], row["output"]) == SERVED and not row["estimated"]
    assert row["reasoning"] == (0 if wire == "messages" else 7)
    assert row["cost_usd"] == pytest.approx((1000 * 2 + 600 * 0.2 + 50 * 2.5 + 30 * 10) / 1e6) and row["price"] == "2/10/0.2/2.5 models.json"


@pytest.mark.parametrize("client", WIRES)
def test_reasoning_that_is_left_out_of_the_output_is_counted(build: Build, client: str) -> None:
    """As xAI counts: passed through and translated."""
    usage = {"prompt_tokens": 20, "completion_tokens": 5, "total_tokens": 125, "completion_tokens_details": {"reasoning_tokens": 100}}
    house = build(a=answer(chat_answer(usage=usage)))
    assert house.post(PATHS[client], request_body(client, "a/m")).status == 200
    [row] = served(house, 1)
    assert (row["input"], row["output"], row["reasoning"]) == (20, 105, 100)


def test_an_answer_that_was_counted_and_thrown_away_is_a_row_of_its_own(build: Build) -> None:
    told = Counted("chat", SERVED)
    house = build(a=answer(told.whole("")), b=healthy(), entries={"a": {"models": [{"id": "m", "price": FULL_PRICE}]}})
    assert house.chat("a/m").headers["x-aicarousel-provider"] == "b"
    request, discarded = served(house, 2)
    assert (discarded["request_id"], discarded["outcome"], discarded["provider"], discarded["attempts"]) == (f"{request['request_id']}-1", "discarded", "a", 0)
    assert (discarded["input"], discarded["output"]) == (1000, 30) and discarded["cost_usd"] > 0
    assert (request["provider"], request["input"], request["output"], request["attempts"], request["cost_usd"]) == ("b", 11, 7, 2, None)
    stats = aicarousel.read_stats(house.database, since_utc_s=0, by=("provider",))
    assert (stats["total"]["requests"], stats["total"]["input"], stats["total"]["unpriced_requests"]) == (1, 1011, 1)
    assert [(group["provider"], group["requests"]) for group in stats["groups"]] == [("a", 0), ("b", 1)]


def test_what_came_before_a_client_went_is_counted_where_its_provider_counts_late(build: Build, provider: Provider) -> None:
    told = Counted("messages", SERVED)
    house = build(a=opened(told.begin(), told.half_say("word " * 80), Pause("there")), entries={"a": {"format": "messages"}})
    with house.connect() as client:
        client.send(house.request_bytes("POST", "/v1/messages", request_body("messages", "a/m", stream=True)))
        client.read_until(b"word")
        provider.wait_paused("there")
    [row] = served(house, 1)
    assert (row["outcome"], row["output"], row["estimated"]) == ("client_closed", 100, 1)
    assert (row["input"], row["cached"], row["cache_write"]) == SERVED[:3]


# ---------------------------------------------------------------- statistics against what providers say

N_REQUESTS = 2000
FATES = ("fine",) * 12 + ("oops", "empty", "early", "told", "broken", "alone")
ASKED = re.compile(rb"#(\d+) (\w+) (\w+)#")


class Books:
    """What three providers, one per format, say they have served; each does to a request what its text asks for."""

    def __init__(self) -> None:
        self.served: dict[str, list[TokenClasses]] = {wire: [] for wire in WIRES}
        self._lock = threading.Lock()

    def say(self, wire: str, tokens: TokenClasses) -> None:
        with self._lock:
            self.served[wire].append(tokens)

    def script(self, wire: str) -> Callable[[Request], Sequence[Any]]:
        def play(request: Request) -> Sequence[Any]:
            found = ASKED.search(request.body)
            assert found
            number, fate, target = int(found[1]), found[2].decode(), found[3].decode()
            dice = random.Random(number * 10 + WIRES.index(wire))
            tokens = TokenClasses(dice.randrange(1, 5000), *(dice.choice((0, dice.randrange(1, 900))) for _ in range(2)), dice.randrange(1, 400))
            return self._play(wire, fate if wire == target else "fine", number, tokens, request.streamed)
        return play

    def _play(self, wire: str, fate: str, number: int, tokens: TokenClasses, streamed: bool) -> Sequence[Any]:
        told = Counted(wire, tokens)
        if fate == "oops":
            return answer({"error": {"message": "Oops.", "type": "server_error"}}, 500)
        if fate == "early":
            return [Pause(f"early{number}"), Close()]
        if fate in ("told", "broken") and streamed:
            begun = told.begin()
            if fate == "told" and wire == "chat":
                begun = [frame(chat_chunk({"role": "assistant", "content": ""}, usage=told.usage))]
                self.say(wire, tokens)
            elif wire == "messages":
                self.say(wire, tokens._replace(output=1))
            return opened(begun, told.half_say("Hello"), *([Pause(f"told{number}")] if fate == "told" else []), Close())
        self.say(wire, tokens)
        text = "" if fate == "empty" else "Hello"
        return stream(told.begin(), told.say(text) if text else (), told.end()) if streamed else answer(told.whole(text))


def ask_as_told(house: House, provider: Provider, number: int) -> None:
    """One request of the mixture; the client leaves where its fate says so."""
    dice = random.Random(number)
    client, wire, fate, streamed = dice.choice(WIRES), dice.choice(WIRES), dice.choice(FATES), dice.random() < 0.6
    streamed = streamed or fate in ("told", "broken")
    headers = {"x-aicarousel-no-fallback": "1"} if fate == "alone" or number % 3 == 0 else {}
    fate = "oops" if fate == "alone" else fate
    with house.connect() as connection:
        connection.send(house.request_bytes("POST", PATHS[client], request_body(client, f"{wire}/m", f"#{number} {fate} {wire}#", stream=streamed), headers))
        if fate in ("early", "told"):
            if fate == "told":
                connection.read_until(b"Hello")
            # Another provider may serve it, while this one is left out: such an answer is read to its end, as its provider says that all of it was served.
            while f"{fate}{number}" not in provider.paused and not connection.ended:
                if select.select([connection.socket], [], [], 0.002)[0]:
                    connection.read_until(lambda raw, n_before=len(connection.raw): len(raw) > n_before)
        else:
            assert connection.read_all().status in (200, 429, 500, 502, 503)


def test_stats_equal_what_providers_say_they_served(build: Build, provider: Provider, capsys: pytest.CaptureFixture[str]) -> None:
    books = Books()
    prices = {"chat": FULL_PRICE, "responses": {"input": 1.0, "output": 4.0}, "messages": None}
    house = build(**{wire: books.script(wire) for wire in WIRES}, entries={
        wire: {"format": wire, "models": [{"id": "m", **({"price": prices[wire]} if prices[wire] else {})}]} for wire in WIRES})
    with ThreadPoolExecutor(8) as pool:
        for begin in range(0, N_REQUESTS, 100):
            list(pool.map(lambda number: ask_as_told(house, provider, number), range(begin, begin + 100)))
            house.settle()
            house.do(house.gateway.relay.state.cooling.clear)
    deadline = time.monotonic() + HANG_S
    while sum(row["outcome"] != "discarded" for row in house.rows()) < N_REQUESTS and time.monotonic() < deadline:
        house.settle()
    assert aicarousel.main(["stats", "--home", str(house.folder), "--days", "2", "--by", "provider", "--json", "--heatmap"]) == 0
    stats = json.loads(capsys.readouterr().out)
    outcomes = Counter(row["outcome"] for row in house.rows())
    assert min(outcomes[name] for name in ("ok", "error", "client_closed", "discarded")) > 50, outcomes
    total = stats["total"]
    assert total["requests"] == N_REQUESTS == sum(map(sum, stats["hours"]))
    assert (total["ok"], total["failed"], total["client_closed"]) == (outcomes["ok"], outcomes["error"], outcomes["client_closed"])
    groups = {group["provider"]: group for group in stats["groups"]}
    for wire in WIRES:
        group, told = groups[wire], [sum(column) for column in zip(*books.served[wire])]
        assert group["estimated_requests"] > 0 or wire == "messages"
        assert [group["input"] + group["cached"] + group["cache_write"] - group["estimated_input"], group["cached"], group["cache_write"],
                group["output"] - group["estimated_output"]] == [sum(told[:3]), told[1], told[2], told[3]], wire
    assert groups["chat"]["cost_usd"] > 0 and groups["messages"]["cost_usd"] is None and groups["messages"]["unpriced_requests"] > 0
    for name in ("input", "cached", "cache_write", "output", "estimated_input", "requests"):
        assert total[name] == sum(group[name] for group in stats["groups"])
    costs = [aicarousel.cost_usd(TokenClasses(row["input"], row["cached"], row["cache_write"], row["output"]), Price(1.0, 4.0)) for row in house.rows() if row["provider"] == "responses"]
    assert groups["responses"]["cost_usd"] == pytest.approx(sum(filter(None, costs)))


# ---------------------------------------------------------------- statistics by themselves

@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """written(row, ...): the home of a database with these rows, where the local time is UTC-5 (without a summer time)."""
    monkeypatch.setenv("TZ", "EST5")
    time.tzset()

    def write(*rows: UsageRow) -> Path:
        path = tmp_path / "data" / "aicarousel.db"
        writer = UsageWriter(path)
        for number, row in enumerate(rows):
            writer.put(row._replace(request_id=f"{number}"))
        assert writer.flush(HANG_S)
        writer.close()
        return path
    yield write
    monkeypatch.undo()
    time.tzset()


def seconds(utc: str) -> float:
    return aicarousel.datetime.fromisoformat(utc).timestamp()


DAYS = [ROW._replace(at_utc=at_utc, key_id=key_id, key_name=name, provider=provider, wire_model=model, model=asked, cost_usd=cost) for at_utc, key_id, name, provider, model, asked, cost in (
    ("2026-01-30T04:59:59.999+00:00", 1, "ci", "groq", "kimi", "fast", 1.0),              # still the 29th
    ("2026-01-30T05:00:00.000+00:00", 1, "ci", "groq", "kimi", "fast", 2.0),
    ("2026-01-31T04:00:00+00:00", 2, "ci", "groq", "kimi", "groq/kimi", None),
    ("2026-01-31T05:30:00Z", 0, "API_KEYS", "openai", "luna", "luna", 4.0),
    ("2026-02-01T04:30:00.5+00:00", 0, "", "", "", "nothing", 0.0))]


def test_groups_and_local_days(written: Callable[..., Path]) -> None:
    path = written(*DAYS)
    assert aicarousel.local_midnight(seconds("2026-01-31T04:59:00+00:00")) == seconds("2026-01-30T05:00:00+00:00")
    read = lambda *by, **more: aicarousel.read_stats(path, since_utc_s=0.0, by=by, **more)["groups"]     # noqa: E731
    assert [(group["day"], group["requests"]) for group in read("day")] == [("2026-01-29", 1), ("2026-01-30", 2), ("2026-01-31", 2)]
    assert [(group["key"], group["requests"]) for group in read("key")] == [("", 1), ("API_KEYS", 1), ("ci #1", 2), ("ci #2", 1)]
    assert [(group["provider"], group["model"], group["cost_usd"], group["unpriced_requests"]) for group in read("provider", "model")] == [
        ("", "", 0.0, 0), ("groq", "kimi", 3.0, 1), ("openai", "luna", 4.0, 0)]
    assert [group["cost_usd"] for group in read("key", provider="groq")] == [3.0, None]
    assert [group["requests"] for group in read("provider", model="fast")] == [2] and [group["requests"] for group in read("provider", model="kimi")] == [3]
    assert aicarousel.read_stats(path, since_utc_s=0.0, model="none")["total"]["requests"] == 0
    assert aicarousel.stats_since("2", seconds("2026-01-31T12:00:00+00:00")) == seconds("2026-01-30T05:00:00+00:00")
    assert aicarousel.read_stats(path, since_utc_s=aicarousel.stats_since("2", seconds("2026-01-31T12:00:00+00:00")))["total"]["requests"] == 4


def test_heat_map(written: Callable[..., Path]) -> None:
    path = written(*DAYS, *(DAYS[3] for _ in range(7)))
    hours = aicarousel.read_stats(path, since_utc_s=0.0, heatmap=True)["hours"]
    assert {(weekday, hour): count for weekday, row in enumerate(hours) for hour, count in enumerate(row) if count} == {(3, 23): 1, (4, 0): 1, (4, 23): 1, (5, 0): 8, (5, 23): 1}
    lines = aicarousel.heatmap_lines(hours, blocks=False)
    assert len(lines) == 9 and all(line.isascii() for line in lines) and lines[0].split() == [f"{hour:02}" for hour in range(24)]
    assert lines[6] == "Sat  ## " + "   " * 22 + "..  9" and lines[1] == "Mon  " + "   " * 24 + " 0"
    assert lines[8] == "requests per hour, local time: .. 1+   ++ 3+   ** 5+   ## 7+"
    assert "\u2588\u2588" in aicarousel.heatmap_lines(hours, blocks=True)[6]
    assert aicarousel.heatmap_lines([[0] * 24] * 7, blocks=False)[8] == "no requests"
    assert aicarousel.heatmap_lines([[1] + [0] * 23] + [[0] * 24] * 6, blocks=False)[1].startswith("Mon  ## ")


def test_stats_as_text(written: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    home = written(*DAYS, DAYS[0]._replace(estimated=True)).parent.parent
    assert aicarousel.main(["stats", "--home", str(home), "--days", "36600", "--by", "provider", "--heatmap"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["provider", "requests", "failed", "left", "input", "cached", "written", "output", "cost"]
    assert lines[2].split() == ["-", "1", "0", "0", "812", "100", "0", "164", "$0.0000"]
    assert lines[3].split() == ["groq", "4", "0", "0", "3248", "400", "0", "656", "$4.0000", "+", "1", "unknown"]
    assert lines[5].split()[:2] == ["total", "6"] and lines[6].startswith("estimated: 912 tokens in and 164 out, of 1 request whose") and lines[-2].startswith("Sun")
    assert aicarousel.main(["stats", "--home", str(home), "--days", "36600", "--by", ""]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4
    assert aicarousel.main(["stats", "--home", str(home), "--days", "36600", "--by", "key", "--model", "groq/kimi"]) == 0
    assert capsys.readouterr().out.splitlines()[2].split()[-1] == "unknown", "an unknown price is never 0"


def test_rows_of_before_have_classes_that_do_not_overlap_either(written: Callable[..., Path]) -> None:
    path = written(ROW._replace(input=1000, cached=600, cache_write=100), ROW)
    while aicarousel.rollback(path) != "accounts":
        assert aicarousel.schema_version(path)
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT input FROM usage").fetchall() == [(1700,), (912,)]
        connection.execute("UPDATE usage SET input = 50 WHERE cached = 600")         # a provider that counted strangely
    assert aicarousel.migrate(path)[0] == "accounts"
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT input, cached, price FROM usage").fetchall() == [(0, 600, ""), (812, 100, "")]


# ---------------------------------------------------------------- limits, by themselves

class Times:
    """A clock that the test moves; both kinds of time."""

    def __init__(self, utc: str = "2026-01-31T12:00:00+00:00") -> None:
        self.now, self.utc = 1000.25, seconds(utc)

    def go(self, seconds: float) -> None:
        self.now, self.utc = self.now + seconds, self.utc + seconds


def key_of(number: int = 1, **limits: Any) -> GatewayKey:
    return GatewayKey(number, "sk-1234...", "ci", "", "", True, 0, limits=KeyLimits(**limits))


def accounts_of(path: Path, times: Times) -> Accounts:
    return Accounts(path, lambda: times.now, lambda: times.utc)


def refused(accounts: Accounts, key: GatewayKey, n_tokens: int = 0, usd: float = 0.0) -> GatewayError:
    with pytest.raises(GatewayError) as raised:
        accounts.admit(key, n_tokens, usd)
    assert raised.value.status == 429 and raised.value.retry_after_s is not None and raised.value.retry_after_s > 0
    return raised.value


def test_requests_in_any_minute(tmp_path: Path) -> None:
    times = Times()
    accounts, key = accounts_of(tmp_path / "none.db", times), key_of(rpm=3)
    for wait_s in (0.0, 30.0, 5.0):
        times.go(wait_s)
        accounts.settle(accounts.admit(key), 0)
    error = refused(accounts, key)
    assert error.code == "rate_limit_exceeded" and error.retry_after_s == pytest.approx(1061 - 1035.25)
    times.go(error.retry_after_s or 0)
    accounts.admit(key)
    assert refused(accounts, key).retry_after_s == pytest.approx(30.0, abs=0.3)
    accounts.admit(key_of(2, rpm=3))                    # keys do not share


def test_tokens_are_reserved_then_settled(tmp_path: Path) -> None:
    times = Times()
    accounts, key = accounts_of(tmp_path / "none.db", times), key_of(tpm=1000)
    first = accounts.admit(key, 900)
    second = accounts.admit(key, 900)                   # over the limit by one estimate
    assert refused(accounts, key, 1).message == "This key has used its 1000 tokens per minute."
    accounts.settle(first, 100)
    accounts.settle(first, 0)                           # once is enough
    accounts.settle(second, 100)
    assert dict(accounts.headers(key))["x-ratelimit-remaining-tokens"] == "800"
    late = accounts.admit(key, 500)
    times.go(61.0)
    assert dict(accounts.headers(key)) == {"x-ratelimit-limit-tokens": "1000", "x-ratelimit-remaining-tokens": "1000", "x-ratelimit-reset-tokens": "0s"}
    accounts.settle(late, 2000)                         # its minute is over
    assert dict(accounts.headers(key))["x-ratelimit-remaining-tokens"] == "1000"
    accounts.admit(key, 1000)
    assert refused(accounts, key).retry_after_s == pytest.approx(60.75)


def test_seconds_kept_are_bounded(tmp_path: Path) -> None:
    times = Times()
    accounts, key = accounts_of(tmp_path / "none.db", times), key_of(tpm=10 ** 9)
    for _ in range(5000):
        accounts.settle(accounts.admit(key, 5), 1)
        times.go(0.1)
    account = accounts._accounts[1]
    assert len(account.seconds) <= 62 and account.n_requests == sum(second[1] for second in account.seconds) <= 610 and account.n_tokens == account.n_requests


def test_at_a_time(tmp_path: Path) -> None:
    accounts, key = accounts_of(tmp_path / "none.db", Times()), key_of(concurrency=2)
    holds = [accounts.admit(key), accounts.admit(key)]
    assert refused(accounts, key).retry_after_s == 1.0
    accounts.settle(holds[0], 0)
    accounts.admit(key)
    refused(accounts, key)


def test_budgets_of_days_and_months_in_local_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: Callable[..., Path]) -> None:
    times = Times("2026-01-30T12:00:00-05:00")
    accounts, key = accounts_of(tmp_path / "none.db", times), key_of(usd_per_day=1.0, usd_per_month=1.5)
    hold = accounts.admit(key, 0, 0.9)
    accounts.settle(hold, 0)
    accounts.charge(1, 0.9)
    hold = accounts.admit(key, 0, 0.5)                  # less than a dollar is spent: over by one estimate
    error = refused(accounts, key, 0, 0.01)
    assert (error.code, error.retry_after_s) == ("rate_limit_exceeded", 5.0), "only a reservation stands in the way"
    accounts.settle(hold, 0)
    accounts.charge(1, 0.2)
    error = refused(accounts, key, 0, 0.01)
    assert (error.code, error.retry_after_s) == ("insufficient_quota", 12 * 3600.0) and error.message == "This key has spent its $1 of this day."
    times.go(12 * 3600.0)
    accounts.admit(key, 0, 0.0)                         # the next day, the same month
    accounts.charge(1, 0.4)
    error = refused(accounts, key)
    assert error.message == "This key has spent its $1.5 of this month." and error.retry_after_s == 24 * 3600.0
    times.go(24 * 3600.0)
    accounts.admit(key)


def test_spend_survives_a_restart(written: Callable[..., Path]) -> None:
    path = written(*(ROW._replace(key_id=key_id, at_utc=at_utc, cost_usd=cost) for key_id, at_utc, cost in (
        (1, "2026-01-31T05:00:00.000+00:00", 0.6), (1, "2026-01-31T04:59:59.999+00:00", 0.6), (1, "2026-01-01T04:59:00+00:00", 50.0), (1, "2026-01-31T06:00:00+00:00", None),
        (2, "2026-01-10T05:00:00+00:00", 5.0))))
    accounts = accounts_of(path, Times())
    accounts.admit(key_of(usd_per_day=0.7, usd_per_month=1.3))
    assert "day" in refused(accounts, key_of(usd_per_day=0.6)).message
    assert "month" in refused(accounts, key_of(usd_per_month=1.2)).message
    assert "month" in refused(accounts, key_of(2, usd_per_day=0.01, usd_per_month=5.0)).message


def test_spend_that_cannot_be_read_is_told_and_counting_begins(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "aicarousel.db"
    path.write_bytes(b"no database" * 500)
    accounts_of(path, Times()).admit(key_of(usd_per_day=1.0))
    assert "spend.failed" in caplog.text


# ---------------------------------------------------------------- limits, at the door

def new_key(house: House, **limits: Any) -> str:
    """A key with limits, made as the command does."""
    return aicarousel.create_key(house.database, "limited", limits=limits)[0]


def post(house: House, client: str, key: str, model: str = "a/m", **fields: Any) -> Reply:
    return house.post(PATHS[client], request_body(client, model, **fields), key=key)


def words_of(client: str, reply: Reply) -> str:
    """The message of an error in the envelope of a client format."""
    body = reply.json
    assert set(body) == ({"type", "error"} if client == "messages" else {"error"}), body
    assert client != "messages" or body["type"] == "error"
    return body["error"]["message"]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("client", WIRES)
def test_over_a_limit_nothing_goes_upstream(build: Build, provider: Provider, client: str, streamed: bool) -> None:
    house = build(a=healthy())
    key = new_key(house, rpm=2, tpm=100_000)
    first = post(house, client, key, stream=streamed)
    assert first.status == 200 and first.headers["x-ratelimit-limit-requests"] == "2" and first.headers["x-ratelimit-remaining-requests"] == "1"
    assert first.headers["x-ratelimit-limit-tokens"] == "100000" and 80_000 < int(first.headers["x-ratelimit-remaining-tokens"]) < 100_000
    served(house, 1)
    second = post(house, client, key, stream=streamed)
    assert 90_000 < int(second.headers["x-ratelimit-remaining-tokens"]) < 99_982, "the first one is settled by then: 18 tokens"
    reply = post(house, client, key, stream=streamed)
    assert reply.status == 429 and "2 requests per minute" in words_of(client, reply) and not reply.streamed
    assert 55 <= int(reply.headers["retry-after"]) <= 61 and reply.headers["x-ratelimit-remaining-requests"] == "0" and reply.headers["x-ratelimit-reset-requests"] in ("60s", "61s")
    assert reply.json["error"]["type"] == "rate_limit_error"
    assert len(provider.calls("a")) == 2 and len(served(house, 2)) == 2 and house.chat().status == 200
    house.pass_time(61.0)
    assert post(house, client, key, stream=streamed).status == 200


def test_a_limited_client_sees_its_own_limits_and_an_unlimited_one_the_providers(build: Build) -> None:
    house = build(a=answer(chat_answer(), 200, [("x-ratelimit-limit-requests", "7777"), ("x-request-id", "theirs")]))
    reply = post(house, "chat", new_key(house, rpm=5))
    assert [value for name, value in reply.header_list if name == "x-ratelimit-limit-requests"] == ["5"] and reply.headers["x-request-id"] == "theirs"
    assert house.chat("a/m").headers["x-ratelimit-limit-requests"] == "7777"


def test_plain_chat_is_refused_in_plain_text(build: Build) -> None:
    house = build(a=healthy())
    key = new_key(house, rpm=1)
    messages = [{"role": "user", "content": "Hi"}]
    assert house.post("/chat", messages, key=key).status == 200
    reply = house.post("/chat", messages, key=key)
    assert (reply.status, reply.headers["content-type"]) == (429, "text/plain; charset=utf-8") and reply.body == b"This key has used its 1 request per minute."


def test_a_hundred_parallel_calls_overspend_by_one_estimate_at_most(build: Build, provider: Provider) -> None:
    """Each may cost 1000 tokens at $1000 per million; the budget is for three and a half of what they are expected to use."""
    usage = usage_of("chat", TokenClasses(10, 0, 0, 1000))
    house = build(a=[Pause("all"), *answer(chat_answer(usage=usage))], entries={"a": {"models": [{"id": "m", "price": {"input": 0, "output": 1000}}]}})
    estimate_usd, budget_usd = 1.0, 3.5
    key = new_key(house, usd_per_day=budget_usd)
    with ThreadPoolExecutor(100) as pool:
        calls = [pool.submit(post, house, "chat", key, max_tokens=1000) for _ in range(100)]
        provider.wait_paused("all", 4)
        deadline = time.monotonic() + HANG_S
        while sum(call.done() for call in calls) < 96 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(provider.calls("a")) == 4, "the fourth begins below the budget, the fifth would not"
        provider.release("all")
        replies = [call.result() for call in calls]
    assert sorted(reply.status for reply in replies) == [200] * 4 + [429] * 96
    assert {reply.headers["retry-after"] for reply in replies if reply.status == 429} == {"5"}
    spent_usd = sum(row["cost_usd"] for row in served(house, 4))
    assert budget_usd <= spent_usd <= budget_usd + estimate_usd
    reply = post(house, "chat", key, max_tokens=1)
    assert reply.status == 429 and reply.json["error"]["code"] == "insufficient_quota" and "$3.5 of this day" in reply.json["error"]["message"]
    reborn = aicarousel.Accounts(house.database, time.monotonic, time.time)
    with pytest.raises(GatewayError):
        reborn.admit(house.keys.find(key))
    assert aicarousel.set_limits(house.database, 1, {"usd_per_day": 5.0}) is not None
    assert post(house, "chat", key, max_tokens=1).status == 200, "in force at once"


def test_a_hundred_parallel_calls_stay_within_their_requests_and_tokens(build: Build, provider: Provider) -> None:
    for number, (limits, n_served) in enumerate((({"rpm": 7}, 7), ({"tpm": 10_000}, 3), ({"concurrency": 5}, 5))):       # one is expected to take 4096 tokens and a few
        house = build(a=[Pause(f"all{number}"), *answer(chat_answer())])
        key = new_key(house, **limits)
        with ThreadPoolExecutor(100) as pool:
            calls = [pool.submit(post, house, "chat", key) for _ in range(100)]
            provider.wait_paused(f"all{number}", n_served)
            deadline = time.monotonic() + HANG_S
            while sum(call.done() for call in calls) < 100 - n_served and time.monotonic() < deadline:
                time.sleep(0.01)
            provider.release(f"all{number}")
        assert Counter(call.result().status for call in calls) == {200: n_served, 429: 100 - n_served}, limits


@pytest.mark.parametrize("leave", [False, True])
def test_concurrency_ends_with_the_answer_or_the_client(build: Build, provider: Provider, leave: bool) -> None:
    house = build(a=opened(content("one"), Pause("more"), frame(chat_chunk({}, "stop")), DONE, Close()))
    key = new_key(house, concurrency=1)
    with house.connect() as client:
        client.send(house.request_bytes("POST", "/v1/chat/completions", request_body("chat", "a/m", stream=True), key=key))
        client.read_until(b"one")
        assert post(house, "chat", key, stream=True).status == 429
        if not leave:
            provider.release("more")
            client.read_all()
    served(house, 1)
    provider.release("more")
    assert post(house, "chat", key, stream=True).status == 200


def test_what_nobody_has_a_price_for_counts_as_reserved(build: Build) -> None:
    house = build(a=healthy(), b=healthy(), entries={"b": {"models": [{"id": "m", "price": {"input": 0, "output": 1000}}]}})
    key = new_key(house, usd_per_month=1.0)
    assert post(house, "chat", key, max_tokens=2000).headers["x-aicarousel-provider"] == "a"
    assert served(house, 1)[0]["cost_usd"] is None
    assert post(house, "chat", key, max_tokens=2000).status == 429
    lone = new_key(house, usd_per_day=1.0)
    reply = house.request("POST", "/v1/chat/completions", request_body("chat", "a/m"), {"x-aicarousel-no-fallback": "1"}, key=lone)
    assert reply.status == 403 and "no model it could be served by has a known price" in reply.json["error"]["message"]


ODD_REQUESTS: list[tuple[str, Json]] = [
    ("/v1/completions", {"model": "a/m", "prompt": [1, 2, 3]}), ("/v1/completions", {"model": "a/m", "prompt": "Hi", "max_tokens": 7, "n": 3}),
    ("/v1/embeddings", {"model": "a/m", "input": "Hi"}), ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
    ("/v1/chat/completions", {"model": None, "messages": [{"role": "user", "content": "Hi"}], "n": None, "max_completion_tokens": None}),
    ("/v1/messages", {"model": "a/m", "max_tokens": 5, "messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}]}]}),
]


@pytest.mark.parametrize(("path", "body"), ODD_REQUESTS)
def test_every_request_can_be_estimated(build: Build, path: str, body: Json) -> None:
    """Whatever it is answered by, no estimate fails and nothing stays reserved."""
    house = build(a=healthy(), entries={"a": {"models": [{"id": "m", "price": {"input": 1, "output": 1}}]}})
    reply = house.post(path, body, key=new_key(house, tpm=10 ** 6, usd_per_day=5.0, concurrency=1))
    assert reply.status in (200, 400, 502) and "x-ratelimit-remaining-tokens" in reply.headers
    house.settle()
    assert house.do(lambda: [(account.n_running, account.held_usd) for number, account in house.gateway.accounts._accounts.items()]) == [(0, 0.0)]


ALLOWED: list[tuple[tuple[str, ...], str | None, int]] = [      # globs, model asked for, status
    (("m",), "a/m", 200), (("a/*",), "a/m", 200), (("a/*",), "m", 200), (("a/*",), None, 200), (("a/*",), "b/m", 403), (("other*",), "a/m", 403), (("other*",), None, 403),
    (("fast",), "fast", 200), (("b/m",), "fast", 403), (("long-*",), "long-m", 200), (("M",), "m", 403), (("[",), "m", 403),
]


@pytest.mark.parametrize(("globs", "model", "status"), ALLOWED)
def test_models_of_a_key(build: Build, provider: Provider, globs: tuple[str, ...], model: str | None, status: int) -> None:
    house = build(a=healthy(), b=healthy(), carousel={"aliases": {"fast": "a/m"}}, entries={"a": {"models": [{"id": "m", "alias": "long-m"}]}})
    reply = house.post("/v1/chat/completions", {key: value for key, value in request_body("chat", model or "").items() if model or key != "model"},
                       key=new_key(house, models=globs))
    assert reply.status == status
    if status == 403:
        assert reply.json["error"]["code"] == "model_not_allowed" and not provider.requests
    else:
        assert reply.headers["x-aicarousel-provider"] == "a"


@pytest.mark.parametrize(("wished", "status"), [
    ({"models": ["b/m"]}, 403), ({"models": ["b/m", "a/m"]}, 200), ({"models": "b/m, fast"}, 403), ({"provider": {"only": ["b"]}}, 403), ({"provider": {"order": ["b"]}}, 200),
    ({"provider": {"ignore": ["a"]}}, 403), ({"provider": {"order": ["b"], "allow_fallbacks": False}}, 403), ({"models": ["a/m"], "provider": {"only": ["b"]}}, 404)])
def test_what_a_request_wishes_stays_within_what_its_key_may(build: Build, provider: Provider, wished: Json, status: int) -> None:
    house = build(a=healthy(), b=healthy(), carousel={"aliases": {"fast": "b/m"}})
    reply = house.post("/v1/chat/completions", {**request_body("chat", "aicarousel"), **wished}, key=new_key(house, models=("a/*",)))
    assert reply.status == status and not provider.calls("b"), reply.raw


def test_a_fallback_stays_within_the_models_of_a_key(build: Build, provider: Provider) -> None:
    house = build(a=answer({"error": {"message": "Oops."}}, 500), b=healthy(), c=healthy(), entries={"b": {"default": "n", "models": ["n"]}})
    reply = post(house, "chat", new_key(house, models=("a/*", "c/*")))
    assert reply.headers["x-aicarousel-provider"] == "c" and not provider.calls("b")
    for client in WIRES:
        reply = post(house, client, new_key(house, models=("a/*",)), model="b/n")
        assert reply.status == 403 and "may not use the model 'b/n'; it may use: a/*" in words_of(client, reply)
    house.reconfigure({**house.models, "a": {**house.models["a"], "models": ["m", "n"]}})
    assert house.post("/v1/messages/count_tokens", request_body("messages", "b/n"), key=new_key(house, models=("a/*",))).status == 403


def test_counting_tokens_counts_as_a_request(build: Build) -> None:
    house = build(a=healthy())
    key = new_key(house, rpm=1)
    assert house.post("/v1/messages/count_tokens", request_body("messages", "a/m"), key=key).status == 200
    reply = house.post("/v1/messages/count_tokens", request_body("messages", "a/m"), key=key)
    assert reply.status == 429 and "retry-after" in reply.headers and post(house, "messages", key).status == 429


def test_an_expired_key_is_refused_and_may_be_prolonged(build: Build) -> None:
    house = build(a=healthy())
    key = new_key(house, expires_at=int(time.time()) + 1000)
    assert post(house, "chat", key).status == 200
    assert aicarousel.set_limits(house.database, 1, {"expires_at": int(time.time())}) is not None
    for client in WIRES:
        reply = post(house, client, key)
        assert reply.status == 401 and words_of(client, reply) == aicarousel.EXPIRED_KEY
    assert aicarousel.set_limits(house.database, 1, {"expires_at": None}) is not None
    assert post(house, "chat", key).status == 200


# ---------------------------------------------------------------- admin keys

def test_admin_endpoints_take_an_admin_key_of_this_machine(build: Build) -> None:
    house = build(a=healthy())
    admin, other = new_key(house, admin=1), new_key(house, rpm=5)
    assert post(house, "chat", admin).status == 200
    assert [house.get("/admin/stats", key=key).status for key in (admin, other, house.key, "wrong", "")] == [200, 403, 403, 401, 401]
    house.gateway.config = aicarousel.replace(house.gateway.config, settings=aicarousel.replace(house.gateway.config.settings, no_auth=True))
    assert [house.get("/admin/stats", key=key).status for key in (admin, "")] == [200, 401], "--no-auth opens nothing here"
    request = aicarousel.Request("GET", "/admin/stats", "", {"host": "127.0.0.1", "authorization": f"Bearer {admin}"}, peer="192.0.2.7")
    with pytest.raises(GatewayError) as raised:
        house.do(lambda: house.gateway.admit(request))
    assert raised.value.status == 403
    assert house.request("POST", "/admin/stats", {}, key=admin).status == 405 and house.get("/admin/nothing", key=admin).status == 404


def test_admin_stats_tell_of_the_request_before(build: Build) -> None:
    house = build(a=healthy(), entries={"a": {"models": [{"id": "m", "price": {"input": 1000, "output": 0}}]}})
    admin = new_key(house, admin=1)
    for number in (1, 2):
        assert post(house, "chat", house.key).status == 200
        house.settle()
        stats = house.get("/admin/stats?days=1&by=key,provider&heatmap=1", key=admin).json
        assert (stats["total"]["requests"], stats["total"]["input"], stats["total"]["cost_usd"]) == (number, 11 * number, pytest.approx(0.011 * number))
        assert [(group["key"], group["provider"]) for group in stats["groups"]] == [("API_KEYS", "a")] and sum(map(sum, stats["hours"])) == number
    assert "hours" not in house.get("/admin/stats?provider=b", key=admin).json
    for query in ("days=0", "days=x", "by=nothing", "by=key,key", "what=1", "days="):
        reply = house.get(f"/admin/stats?{query}", key=admin)
        assert reply.status == 400 and "expected" in reply.json["error"]["message"], query


def test_admin_stats_without_a_database(build: Build) -> None:
    house = build(a=healthy())
    admin = new_key(house, admin=1)
    assert house.get("/admin/stats", key=admin).status == 200
    for suffix in ("", "-wal", "-shm"):
        Path(f"{house.database}{suffix}").unlink(missing_ok=True)
    house.database.mkdir()
    reply = house.get("/admin/stats", key=admin)
    assert reply.status == 503 and str(house.database) not in reply.body.decode()


# ---------------------------------------------------------------- keys on the command line

def run(home: Path, capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    assert aicarousel.main([*words, "--home", str(home), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_limits_by_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, capsys, "key", "create", "one", "--rpm", "60", "--tpm", "1000", "--concurrency", "2", "--usd-per-day", "1.5", "--usd-per-month", "20", "--models", "groq/*, gpt-*",
        "--expires", "2027-01-31T18:00+00:00", "--admin")
    run(tmp_path, capsys, "key", "create", "two")
    one, two = run(tmp_path, capsys, "key", "list")
    assert one["limits"] == {"rpm": 60, "tpm": 1000, "concurrency": 2, "usd_per_day": 1.5, "usd_per_month": 20.0, "models": ["groq/*", "gpt-*"]}
    assert (one["admin"], one["expires"]) == (True, "2027-01-31T18:00:00Z") and (two["admin"], two["expires"]) == (False, None) and not any(two["limits"].values())
    assert aicarousel.main(["key", "list", "--home", str(tmp_path)]) == 0
    table = capsys.readouterr().out.splitlines()
    assert "rpm=60 tpm=1000 concurrency=2 usd_per_day=1.5 usd_per_month=20 models=groq/*,gpt-*" in table[1] and table[2].split()[-3:] == ["no", "-", "-"]
    [one] = run(tmp_path, capsys, "key", "set", "1", "--rpm", "none", "--tpm", "5", "--models", "none", "--expires", "none", "--usd-per-day", "none")
    assert one["limits"] == {"rpm": None, "tpm": 5, "concurrency": 2, "usd_per_day": None, "usd_per_month": 20.0, "models": []} and one["expires"] is None and one["admin"]
    [two] = run(tmp_path, capsys, "key", "set", "2", "--expires", "12h")
    assert 12 * 3600 - 60 < seconds(two["expires"]) - time.time() <= 12 * 3600
    assert aicarousel.main(["key", "set", "9", "--rpm", "1", "--home", str(tmp_path), "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == {"id": 9, "done": False}
    assert run(tmp_path, capsys, "key", "delete", "1")["done"]
    with sqlite3.connect(tmp_path / "data" / "aicarousel.db") as connection:
        assert connection.execute("SELECT key_id FROM key_limits").fetchall() == [(2,)]


EXPIRIES = [("30d", 30 * 86_400), ("12h", 12 * 3600), ("2026-02-01", 17 * 3600 + 86_400), ("2026-01-31T18:00", 11 * 3600), ("2026-01-31T18:00+00:00", 6 * 3600)]


@pytest.mark.parametrize(("text", "after_s"), EXPIRIES)
def test_expiry(written: Callable[..., Path], text: str, after_s: int) -> None:
    now = seconds("2026-01-31T12:00:00+00:00")          # 7 in the morning there
    assert aicarousel._read_expiry(text, now) - now == after_s


def test_limits_outlive_a_rollback(tmp_path: Path) -> None:
    path = tmp_path / "data" / "aicarousel.db"
    secret, _ = aicarousel.create_key(path, "kept", limits={"rpm": 3, "admin": 1})
    while aicarousel.rollback(path) is not None:
        found = aicarousel.KeyRing(path, ()).find(secret)
        assert found is not None and found.limits == KeyLimits(rpm=3) and found.admin
    aicarousel.migrate(path)
    assert aicarousel.list_keys(path)[0].limits == KeyLimits(rpm=3)
