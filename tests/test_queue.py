"""Sections 7 and 7 at work in the relay, over real sockets: bursts, lines, caps, affinity, restarts. Providers enforce what they grant, on the test's clock."""

from __future__ import annotations

import json
import random
import select
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import aicarousel
import test_simulator as simulator
from fakes import FAKE_KEY, TEXT, Client, Gateway, Pause, Provider, Reply, Request, Script, answer, chat_answer, chat_body, healthy, in_turn
from house import House, entry

Build = Callable[..., House]
COMMENT = b": keep-alive\n\n"


class Enforcer:
    """A script that grants `limit` requests in any `span_s` of the house's time and refuses the rest."""

    def __init__(self, limit: int, span_s: float, *, tells: bool = False, named: str = "requests-10-second") -> None:
        self.limit, self.span_s, self.tells, self.named = limit, span_s, tells, named
        self.house: House | None = None
        self.served: list[float] = []
        self.texts: list[str] = []
        self.n_refused = 0
        self._lock = threading.Lock()

    def __call__(self, request: Request) -> Sequence[Any]:
        assert self.house is not None
        with self._lock:
            now = self.house.loop.time()
            recent = [at for at in self.served if at > now - self.span_s]
            if len(recent) >= self.limit:
                self.n_refused += 1
                return answer({"error": {"message": "Slow down."}}, 429, [("retry-after", f"{int(recent[0] + self.span_s - now) + 1}")])
            self.served.append(now)
            self.texts.append(request.json["messages"][-1]["content"])
            left = self.limit - len(recent) - 1
        told = [(f"x-ratelimit-limit-{self.named}", str(self.limit)), (f"x-ratelimit-remaining-{self.named}", str(left))] if self.tells else []
        return answer(chat_answer(), headers=told)


def open_house(build: Build, scripts: dict[str, Enforcer], **more: Any) -> House:
    house = build(**more, **scripts)
    for script in scripts.values():
        script.house = house
    return house


def send(house: House, text: str = "Hi", **fields: Any) -> Client:
    """A chat request that the gateway has taken in."""
    client, n_before = house.connect(), house.gateway.n_requests
    client.send(house.request_bytes("POST", "/v1/chat/completions", chat_body(None, text, **fields)))
    house.wait(lambda: house.gateway.n_requests > n_before)
    return client


def ledger_window(house: House, key: str, measure: str = "requests", span_s: float = 60.0) -> aicarousel.Window:
    return next(window for window in house.gateway.relay.state.ledger.buckets[key].windows if (window.measure, window.span_s) == (measure, span_s))


def test_a_burst_is_spread_by_reservation_and_not_by_refusals(build: Build) -> None:
    scripts = {"a": Enforcer(4, 60), "b": Enforcer(6, 60), "c": Enforcer(10, 60)}
    house = open_house(build, scripts, entries={name: {"limits": {"rpm": script.limit}} for name, script in scripts.items()})
    with ThreadPoolExecutor(20) as pool:
        replies = list(pool.map(lambda _: house.chat("aicarousel", stream=False), range(20)))
    assert [reply.status for reply in replies] == [200] * 20
    assert {name: len(script.served) for name, script in scripts.items()} == {"a": 4, "b": 6, "c": 10}
    assert not any(script.n_refused for script in scripts.values())
    late = house.chat("aicarousel", stream=False)
    assert late.status == 429 and 55 <= int(late.headers["retry-after"]) <= 61 and "quota: " in late.error["message"] and late.error["type"] == "rate_limit_error"
    house.pass_time(61.0)
    assert house.chat("aicarousel", stream=False).status == 200


def test_those_who_wait_are_served_first_come_first_served(build: Build) -> None:
    script = Enforcer(2, 10.0, tells=True)
    house = open_house(build, {"a": script})
    assert house.chat("aicarousel", stream=False).status == 200, "the first answer tells the limit"
    clients = [send(house, f"number {number}") for number in range(7)]
    for n_served in (2, 4, 6):
        house.wait(lambda: len(script.served) == n_served)
        house.pass_time(10.6)
    replies = [client.read_all() for client in clients]
    assert [reply.status for reply in replies] == [200] * 5 + [429] * 2, "the last of them would have waited for more than maxWait"
    assert script.texts == ["Hi", *(f"number {number}" for number in range(5))] and script.n_refused == 0
    assert not house.gateway.relay.lines


def test_who_waits_hears_keep_alives_and_whoever_leaves_the_line_holds_nobody_up(build: Build) -> None:
    script = Enforcer(1, 10.0)
    house = open_house(build, {"a": script}, entries={"a": {"limits": {"rpm": 3}}}, carousel={"maxWait": 100})
    for _ in range(3):
        house.pass_time(10.0)
        assert house.chat("aicarousel", stream=False).status == 200
    first, second = send(house, "first", stream=True), send(house, "second")
    house.pass_time(6.0)
    assert COMMENT in house.seen_by(first)
    first.close()
    house.pass_time(40.0)
    assert second.read_all().status == 200 and script.texts[3:] == ["second"] and not script.n_refused


def test_no_more_at_a_time_than_configured(build: Build, provider: Provider) -> None:
    house = build(a=in_turn([Pause("one"), *answer(chat_answer())], answer(chat_answer())), entries={"a": {"maxConcurrent": 1}})
    first = send(house, "first")
    provider.wait_paused("one")
    second = send(house, "second")
    house.settle()
    assert len(provider.calls("a")) == 1
    provider.release("one")
    assert first.read_all().status == second.read_all().status == 200 and len(provider.calls("a")) == 2


def test_other_names_do_not_wait_in_the_same_line(build: Build) -> None:
    script = Enforcer(1, 60.0)
    house = open_house(build, {"a": script, "b": Enforcer(9, 60.0)}, entries={"a": {"limits": {"rpm": 1}}})
    headers = {"x-aicarousel-no-fallback": "1"}
    assert house.chat("a/m", stream=False, headers=headers).status == 200
    house.pass_time(40.0)
    with house.connect() as waiting:
        waiting.send(house.request_bytes("POST", "/v1/chat/completions", chat_body("a/m"), headers))
        house.wait(lambda: len(house.gateway.relay.lines) == 1)
        assert house.chat("b/m", stream=False, headers=headers).status == 200
        house.pass_time(21.0)
        assert waiting.read_all().status == 200


def test_what_was_used_is_settled(build: Build) -> None:
    house = build(a=answer(chat_answer(usage={"prompt_tokens": 900, "completion_tokens": 90, "total_tokens": 990})), entries={"a": {"limits": {"tpm": 1000}}})
    assert house.chat("a/m", stream=False).status == 200
    window = ledger_window(house, "credential a/1", "tokens")
    assert (window.used, window.held, window.limit) == (990.0, 0.0, 1000.0)
    assert house.chat("a/m", stream=False).status == 429


def test_a_request_larger_than_any_allowance_is_told_so(build: Build, provider: Provider) -> None:
    house = build(a=healthy(), b=healthy(), entries={name: {"limits": {"tpm": 100}} for name in "ab"})
    reply = house.request("POST", "/v1/chat/completions", chat_body(None, "word " * 400))
    assert reply.status == 400 and reply.error["code"] == "context_length_exceeded" and "too large for it" in reply.error["message"] and not provider.requests


def test_what_never_arrived_counts_for_nothing(build: Build, provider: Provider) -> None:
    house = build(a=healthy(), b=healthy(), entries={"a": {"baseUrl": provider.refusing(), "limits": {"rpm": 5}}})
    for _ in range(3):
        assert house.chat("aicarousel", stream=False).status == 200
    bucket = house.gateway.relay.state.ledger.buckets["credential a/1"]
    assert bucket.n_open == 0 and not any(window.used or window.held for window in bucket.windows)


@pytest.mark.parametrize("script", [
    answer({"error": {"message": "Oops."}}, 500), answer({"error": {"message": "No."}}, 400), answer(b"not json", headers=[("content-type", "application/json")]),
    answer({"error": {"message": "Slow down."}}, 429), healthy(), answer({"error": {"message": "maximum context length is 10 tokens"}}, 400)], ids=["500", "400", "junk", "429", "200", "too long"])
@pytest.mark.parametrize("streamed", [False, True])
def test_nothing_stays_reserved_however_it_ends(build: Build, script: Script, streamed: bool) -> None:
    house = build(a=script, carousel={"maxWait": 0})
    house.chat("a/m", stream=streamed)
    house.wait_rows(1)
    for bucket in house.gateway.relay.state.ledger.buckets.values():
        assert bucket.n_open == bucket.n_unseen == bucket.unseen_input == 0 and not any(window.held for window in bucket.windows)


def test_nothing_stays_reserved_when_the_client_leaves(build: Build, provider: Provider) -> None:
    house = build(a=[Pause("there"), *answer(chat_answer())])
    client = send(house)
    provider.wait_paused("there")
    client.close()
    house.wait_rows(1)
    assert all(bucket.n_open == bucket.n_unseen == bucket.unseen_input == 0 for bucket in house.gateway.relay.state.ledger.buckets.values())


def test_a_refusal_that_ends_soon_is_waited_for_and_not_shown(build: Build, provider: Provider) -> None:
    house = build(a=in_turn(answer({"error": {"message": "Slow down."}}, 429, [("retry-after", "7")]), healthy()))
    client = send(house)
    house.wait_line("attempt.failed")
    house.pass_time(8.0)
    reply = client.read_all()
    assert reply.status == 200 and reply.text == TEXT and reply.headers["x-aicarousel-attempts"] == "2"


def test_limits_that_were_learned_outlive_an_edit_of_models_json(build: Build, provider: Provider) -> None:
    refusal = answer({"error": {"message": "Your rate limit is 1 queries per minute."}}, 429)
    house = build(a=in_turn(healthy(), refusal, healthy()), carousel={"maxWait": 0})
    assert [house.chat("a/m", stream=False).status for _ in range(2)] == [200, 429]
    house.reconfigure({**house.models, "b": entry(provider.listen("b", healthy()))})
    window = ledger_window(house, "credential a/1")
    assert (window.limit, window.origin, window.used) == (1.0, "refusal", 1.0)
    assert house.chat("aicarousel", stream=False).headers["x-aicarousel-provider"] == "b"


def test_a_refusal_inside_an_answer_teaches_too(build: Build) -> None:
    house = build(a=in_turn(healthy(), answer({"error": {"message": "Your rate limit is 1 queries per minute.", "type": "rate_limit_error"}})), carousel={"maxWait": 0})
    assert [house.chat("a/m", stream=False).status for _ in range(2)] == [200, 429]
    assert ledger_window(house, "credential a/1").origin == "refusal"


def turns(*texts: str) -> dict[str, Any]:
    """A conversation so far: the user's words and an answer to each but the last."""
    messages = [{"role": "system", "content": "Be brief."}]
    for text in texts[:-1]:
        messages += [{"role": "user", "content": text}, {"role": "assistant", "content": "Yes."}]
    return {"messages": [*messages, {"role": "user", "content": texts[-1]}]}


@pytest.mark.parametrize(("affinity", "fields", "headers", "stays"), [
    ("auto", {}, {}, True), ("off", {}, {}, False), ("auto", {"prompt_cache_key": "k"}, {}, True), ("auto", {"metadata": {"user_id": "u"}}, {}, True),
    ("auto", {}, {"x-session-id": "s"}, True), ("off", {}, {"x-session-id": "s"}, False), ("on", {}, {}, True)])
def test_the_turns_of_a_conversation_stay_together(build: Build, affinity: str, fields: dict[str, Any], headers: dict[str, str], stays: bool) -> None:
    house = build(a=healthy(), b=healthy(), c=healthy(), carousel={"affinity": affinity})

    def served(body: dict[str, Any], more: dict[str, str] | None = None) -> str:
        reply = house.request("POST", "/v1/chat/completions", body, more)
        assert reply.status == 200
        return reply.headers["x-aicarousel-provider"]
    where = []
    for number in range(1, 5):
        where.append(served({**turns(*(f"turn {turn}" for turn in range(number))), **fields}, headers))
        served(chat_body(None, f"something else {number}"))
    assert (len(set(where)) == 1) == stays, where


@pytest.mark.parametrize(("affinity", "expected"), [("auto", {"a": 4, "b": 4, "c": 4}), ("on", {"a": 12})])
def test_single_requests_that_begin_alike_go_round_unless_told_to_stay(build: Build, affinity: str, expected: dict[str, int]) -> None:
    house = build(a=healthy(), b=healthy(), c=healthy(), carousel={"affinity": affinity})
    assert Counter(house.chat("aicarousel", stream=False).headers["x-aicarousel-provider"] for _ in range(12)) == expected


@pytest.mark.parametrize("body", [
    {"messages": "x"}, {"messages": []}, {"input": [1, None, "x"]}, {"input": "text"}, {"messages": [{"role": "user", "content": None}]}, {"metadata": [], "messages": [{"role": "user"}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}, 7]}], "system": {"x": 1}}, {"prompt_cache_key": 5}])
def test_any_body_belongs_to_some_conversation_or_to_none(body: dict[str, Any]) -> None:
    for affinity in ("auto", "on", "off"):
        session, sticks = aicarousel.find_session(body, "", 1, affinity)
        assert isinstance(session, str) and (not sticks or session)
    named = aicarousel.find_session(body, "mine", 1, "auto")
    assert named == ("1 mine", True) and aicarousel.find_session(body, "mine", 2, "auto") != named, "keys do not share conversations"


def test_a_restart_keeps_what_a_provider_has_proven(provider: Provider, gateway_factory: Callable[..., Gateway]) -> None:
    weekly = answer({"error": {"message": "Sorry, you've exceeded your weekly rate limit.", "code": "user_weekly_rate_limited"}}, 429, [("retry-after", "400000")])
    gateway = gateway_factory({"a": entry(provider.listen("a", in_turn(weekly, healthy())))}, {"FAKE_KEY": FAKE_KEY})
    first = gateway.chat("a/m", stream=False)
    assert first.status == 429
    assert gateway.stop() == 0
    gateway.start()
    again = gateway.chat("a/m", stream=False)
    assert again.status == 429 and 390_000 < int(again.headers["retry-after"]) <= 400_000 and len(provider.calls("a")) == 1


def test_what_was_proven_is_on_disk_at_once(build: Build) -> None:
    house = build(a=answer({"error": {"message": "Slow down."}}, 429, [("retry-after", "5000")]))
    assert house.chat("a/m", stream=False).status == 429
    assert house.usage.flush(10.0)
    saved = aicarousel.load_routing(house.database)
    assert json.loads(saved["cooldown credential a/1"])["reason"] == "rate_minute"


def test_a_damaged_table_is_no_reason_not_to_serve(build: Build, caplog: pytest.LogCaptureFixture) -> None:
    house = build(a=healthy())
    house.do(lambda: house.gateway.relay.load({"bucket credential a/1": "{", "cooldown x": "[]", "repairs x": "{}", "window x": "7", "nonsense": "{}", "": "1"}))
    assert house.chat("a/m", stream=False).status == 200
    assert aicarousel.load_routing(house.folder / "none" / "aicarousel.db") == {}


# ------------------------------------------------------------------ the simulator's providers, over sockets

POOLED = {"a": "groq", "b": "cerebras", "c": "cerebras-sliding", "d": "silent"}
STEP_S, SPAN_S = 0.5, 150.0


class Enforced:
    """One of the simulator's providers as a script: it counts and refuses as there, on the house's time."""

    def __init__(self, name: str) -> None:
        self.provider, self.house, self.n_attempts, self.n_refused = simulator.Provider(simulator.SPECS[name], random.Random(name)), None, 0, 0
        self._lock = threading.Lock()

    def now(self) -> float:
        return self.house.loop.time() - self.house.began_at

    def __call__(self, request: Request) -> Sequence[Any]:
        n_input = 10 + request.json["messages"][-1]["content"].count("word")
        with self._lock:
            now, provider = self.now(), self.provider
            self.n_attempts += 1
            if (window := provider.short(now, n_input, 0)) is not None:
                self.n_refused += 1
                headers, body = provider.refusal(window, now, n_input, 0)
                return answer(body, 429, [*headers.items(), ("content-type", "application/json")])
            provider.take(now, n_input, 0)
            headers = provider.headers(now)
            provider.finish(now, 200, now, 0)
        return answer(chat_answer(usage={"prompt_tokens": n_input, "completion_tokens": 200, "total_tokens": n_input + 200}), headers=headers)


@pytest.mark.parametrize(("times", "burst"), [(0.8, 1), (1.5, 1), (2.0, 20)])
def test_over_sockets_too_a_pool_gives_nearly_all_it_can(build: Build, times: float, burst: int) -> None:
    scripts, dice = {name: Enforced(spec) for name, spec in POOLED.items()}, random.Random(f"{times} {burst}")
    house = build(**scripts, entries={name: {"preset": simulator.SPECS[spec].preset} for name, spec in POOLED.items() if spec != "silent"})
    house.began_at = house.loop.time()
    for script in scripts.values():
        script.house = house
    specs = [simulator.SPECS[name] for name in POOLED.values()]
    load = [ask._replace(n_output=200) for ask in simulator.make_load(specs, times, burst, SPAN_S, dice)]
    best = simulator.run_omniscient([simulator.Provider(spec, random.Random(name)) for name, spec in zip(POOLED.values(), specs, strict=True)], load)
    waiting: dict[Client, simulator.Ask] = {}
    replies: Counter[int] = Counter()
    unjust, coming = [], deque(load)
    while coming or waiting:
        now = house.loop.time() - house.began_at
        while coming and coming[0].at <= now:
            ask = coming.popleft()
            waiting[send(house, "word " * ask.n_input)] = ask
        house.settle()
        for sock in select.select([client.socket for client in waiting], [], [], 0.0)[0]:
            client = next(one for one in waiting if one.socket is sock)
            ask, reply = waiting.pop(client), client.read_all()
            replies[reply.status] += 1
            free = [name for name, script in scripts.items() if script.provider.spec.style != "none" and script.provider.has_room_by(now, ask.at + simulator.MAX_WAIT_S - simulator.SLACK_S - 4 * STEP_S, ask)]     # seen a step later, or more on a busy machine
            unjust += [(now, ask, free)] if reply.status == 429 and free else []
        house.pass_time(STEP_S)
    assert set(replies) <= {200, 429} and replies.total() == len(load) and replies[200] >= 0.97 * best, (replies, best)
    told = [script for name, script in scripts.items() if name != "d"]
    assert sum(script.n_refused for script in told) <= max(0.01 * sum(script.n_attempts for script in told), 1.0), [(script.n_refused, script.n_attempts) for script in scripts.values()]
    assert scripts["d"].n_refused <= max(0.05 * scripts["d"].n_attempts, 3.0), (scripts["d"].n_refused, scripts["d"].n_attempts)     # of some 30; it has to be learned first
    assert not unjust, unjust[:3]
