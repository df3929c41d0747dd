"""Answers to why: explain, quota and route, over /admin and as commands; what the headers of an answer tell of its route."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

import aicarousel
from fakes import FAKE_KEY, Gateway, Provider, Reply, answer, chat_answer, chat_body, healthy, in_turn, invocation
from house import House

Json = dict[str, Any]
Build = Callable[..., House]
OOPS = answer({"error": {"message": "Oops.", "type": "server_error"}}, 500)
SLOW_DOWN = answer({"error": {"message": "Rate limit reached.", "code": "rate_limit_exceeded"}}, 429, [("retry-after", "120")])
BAD = answer({"error": {"message": "Invalid 'messages'.", "type": "invalid_request_error"}}, 400)


def admin(house: House, method: str, path: str, body: Any = None) -> Reply:
    key, _ = aicarousel.create_key(house.database, "admin", limits={"admin": True})
    return house.request(method, path, body, key=key)


def explained(house: House, query: str = "") -> list[str]:
    reply = admin(house, "GET", f"/admin/explain{query}")
    assert reply.status == 200, reply.raw
    lines = reply.json["lines"]
    assert len(lines) <= 15 and all(line.isprintable() for line in lines) and FAKE_KEY not in str(lines)
    return lines


def test_what_was_tried_is_told_in_order_with_reasons_and_times(build: Build) -> None:
    house = build(a=OOPS, b=SLOW_DOWN, c=healthy(), d=healthy())
    reply = house.chat("a/m", logprobs=True)
    assert reply.status == 200
    lines = explained(house, f"?id={reply.headers['x-aicarousel-request-id']}")
    assert lines == explained(house)
    head, tried = lines[0], lines[2:5]
    assert "chat, model a/m" in head and "served with 200 in" in head
    assert lines[1] == "tried, in order:" and tried[0].startswith("  a/1:m: server_error (500), ") and "Oops." in tried[0]
    assert tried[1].startswith("  b/1:m: ") and "(429)" in tried[1] and tried[2].startswith("  c/1:m: served (200), ")
    assert lines[5] == "free and not needed: d/1:m"
    again = house.chat("a/m")
    lines = explained(house)
    assert again.status == 200 and lines[1] == "tried, in order:" and any("left out" in line for line in lines)
    assert [line for line in lines if line.startswith("  b/1:m: ") and "s left" in line] and house.health()


def test_a_failure_a_misfit_and_a_mistake_are_explained(build: Build) -> None:
    house = build(a=BAD, b=healthy(), entries={"b": {"models": [{"id": "m", "context": 600}]}, "a": {"models": [{"id": "m", "tools": False}]}})
    assert house.chat("a/m").status == 400
    lines = explained(house)
    assert "failed with 400" in lines[0] and "Invalid 'messages'." in lines[2] and len([line for line in lines if line.startswith("  ")]) == 1
    assert house.post("/v1/chat/completions", chat_body("b/m", "many words " * 2000), headers={"x-aicarousel-no-fallback": "1"}).status == 400
    assert "  b/1:m: its context is too small" in explained(house)
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
    assert house.post("/v1/chat/completions", {**chat_body("a/m"), "tools": tools}).headers["x-aicarousel-provider"] == "b"
    assert "  a/1:m: calls no tools" in explained(house)
    assert admin(house, "GET", "/admin/explain?id=nobody").status == 404


REFUSES_SEED = answer({"error": {"message": "Unsupported parameter: 'seed' is not supported with this model.", "type": "invalid_request_error", "param": "seed",
                                 "code": "unsupported_parameter"}}, 400)
MS = r"\d+ ms"
ONE = {"limits": {"rpm": 1}}


def ask(house: House, model: str | None = None, **more: Any) -> Reply:
    return house.post("/v1/chat/completions", {**chat_body(model), **more})


def wait_in_line(house: House) -> None:
    ask(house)
    client, n_before = house.connect(), house.gateway.n_requests
    client.send(house.request_bytes("POST", "/v1/chat/completions", chat_body(None)))
    house.wait(lambda: house.gateway.n_requests > n_before)
    house.pass_time(61.0)
    assert client.read_all().status == 200


def ask_with(limits: Json, n_times: int = 1) -> Callable[[House], None]:
    """With a key of its own."""
    def act(house: House) -> None:
        key, _ = aicarousel.create_key(house.database, "limited", limits=limits)
        for _ in range(n_times):
            reply = house.request("POST", "/v1/chat/completions", chat_body("a/m"), key=key)
        assert reply.headers["x-aicarousel-request-id"]
    return act


def talk(house: House) -> None:
    for _ in range(2):
        assert house.post("/v1/chat/completions", chat_body(None), headers={"x-session-id": "s1"}).status == 200


HEALTHY, TWO = {"a": healthy()}, {"a": healthy(), "b": healthy()}
#: what happened, providers, what else build() takes, what is asked, the lines behind the number
CASES: list[tuple[str, Json, Json, Callable[[House], Any], list[str]]] = [
    ("no room, another has", TWO, {"entries": {"a": ONE}}, lambda house: [ask(house, "a/m"), ask(house, "a/m")], [
        rf"chat, model a/m, about \d+ tokens: served with 200 in {MS}.*", "tried, in order:", rf"  b/1:m: served \(200\), {MS}", "left out:",
        r"  a/1:m: quota: 1 request a minute \(configured\), 60 s left"]),
    ("no room anywhere", HEALTHY, {"entries": {"a": ONE}, "carousel": {"maxWait": 0}}, lambda house: [ask(house), ask(house)], [
        rf"chat, model not named, .*: failed with 429 in {MS}", "left out:", r"  a/1:m: quota: 1 request a minute \(configured\), 60 s left"]),
    ("waited in line", HEALTHY, {"entries": {"a": ONE}, "carousel": {"maxWait": 100}}, wait_in_line, [
        r"chat, .*: served with 200 in 61\d\d\d ms.*", "tried, in order:", rf"  a/1:m: served \(200\), {MS}", r"waited 6[01]\d\d\d ms in line"]),
    ("refused before", {"a": SLOW_DOWN, "b": healthy()}, {}, lambda house: [ask(house, "a/m"), ask(house, "a/m")], [
        "chat, .*: served with 200.*", "tried, in order:", rf"  b/1:m: served \(200\), {MS}", "left out:", "  a/1:m: rate_minute, 1[12]. s left"]),
    ("too small", TWO, {"entries": {"a": {"models": [{"id": "m", "context": 600}]}}}, lambda house: house.post("/v1/chat/completions", chat_body("a/m", "many words " * 2000)), [
        "chat, model a/m, about [4-9]... tokens: served with 200.*", "tried, in order:", rf"  b/1:m: served \(200\), {MS}", "left out:", "  a/1:m: its context is too small"]),
    ("malformed", {"a": BAD, "b": healthy()}, {}, lambda house: ask(house), [
        "chat, .*: failed with 400.*", "tried, in order:", rf"  a/1:m: bad_request \(400\), {MS}, Invalid 'messages'.", "free and not needed: b/1:m"]),
    ("repaired", {"a": in_turn(REFUSES_SEED, healthy())}, {}, lambda house: ask(house, seed=5), [
        "chat, .*: served with 200.*", "tried, in order:", rf"  a/1:m: bad_param \(400\), {MS}, Unsupported parameter: 'seed' .*", rf"  a/1:m: served \(200\), {MS}; changed: seed"]),
    ("a conversation", TWO, {}, talk, ["chat, .*: served with 200.*", "tried, in order:", rf"  a/1:m: served \(200\), {MS}", "free and not needed: b/1:m", "conversation: hit"]),
    ("a key for other models", TWO, {}, ask_with({"models": ["b/*"]}), [
        "chat, model a/m, .*: failed with 403.*", r"its key may use b/\* alone; This key may not use the model 'a/m'; it may use: b/\*\."]),
    ("a key that has used its minute", TWO, {}, ask_with({"rpm": 1}, 2), ["chat, model a/m, .*: failed with 429.*", "This key has used its .*"]),
    ("all failed", {"a": OOPS, "b": SLOW_DOWN}, {"carousel": {"maxWait": 0}}, lambda house: ask(house), [
        "chat, .*: failed with 502.*", "tried, in order:", rf"  a/1:m: server_error \(500\), {MS}, Oops\.", rf"  b/1:m: rate_minute \(429\), {MS}, Rate limit reached\.", "left out:",
        "  b/1:m: rate_minute, 1.. s left"]),
    ("wished", {"a": OOPS, "b": healthy(), "c": healthy()}, {}, lambda house: ask(house, provider={"order": ["a", "c"], "ignore": ["b"]}), [
        "chat, .*: served with 200.*", "tried, in order:", rf"  a/1:m: server_error \(500\), {MS}, Oops\.", rf"  c/1:m: served \(200\), {MS}", "it wished for order a, c; without b"]),
    ("a name that leads nowhere", HEALTHY, {"carousel": {"unknownModel": "reject"}}, lambda house: ask(house, "zzz"), [
        "chat, model zzz, .*: failed with 404.*", r"The model 'zzz' is not known here\. Nearest: .*"]),
]


@pytest.mark.parametrize(("scripts", "more", "act", "expected"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_every_case_tells_what_was_considered_and_passed_over_and_tried(build: Build, scripts: Json, more: Json, act: Callable[[House], Any], expected: list[str]) -> None:
    house = build(**more, **scripts)
    act(house)
    lines = [line for line in explained(house) if not re.fullmatch("  a/1:m: server_error, . s left", line)]       # a last resort is left out where it has had its turn, or tried
    assert len(lines) == len(expected), lines
    for line, pattern in zip((lines[0].partition(": ")[2], *lines[1:]), expected, strict=True):
        assert re.fullmatch(pattern, line), (pattern, lines)


def test_what_others_wrote_is_one_line_that_no_terminal_obeys(build: Build) -> None:
    house = build(a=answer({"error": {"message": f"Wrong\x1b[2J\nkey {FAKE_KEY}", "type": "invalid_request_error"}}, 400), b=healthy())
    assert house.chat("a/m").status == 400
    assert "Wrong?[2J?key" in explained(house)[2]
    assert house.post("/v1/chat/completions", chat_body("odd\x1b[31m\nname")).status in (200, 400)
    assert "model odd?[31m?name" in explained(house)[0]


def test_forty_routes_are_still_fifteen_lines(build: Build) -> None:
    house = build(**{f"p{number:02}": SLOW_DOWN if number < 20 else OOPS for number in range(40)}, carousel={"maxWait": 0})
    for _ in range(4):
        house.chat("aicarousel")
    lines = explained(house)
    assert any("of " in line and line.startswith("tried") for line in lines) and any(line.startswith("free and not needed: ") and "more" in line for line in lines)


def test_what_is_kept_of_a_decision_is_small_and_tells_the_same(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its client, providers and configuration made of it: kilobytes, not megabytes, and the same lines."""
    monkeypatch.setattr(aicarousel, "condense", lambda decision: decision)
    long = answer({"error": {"message": "Slow down. " + "Words, words. " * 150, "code": "rate_limit_exceeded"}}, 429, [("retry-after", "120")])
    house = build(**{f"p{number:02}": long if number < 38 else OOPS for number in range(40)}, carousel={"maxWait": 0})
    for number in range(12):
        ask(house, provider={"ignore": ["q" * 1_000_000, "r"]} if number % 2 else {"order": ["p39"]})
    monkeypatch.undo()
    before = list(house.gateway.decisions)
    after = [aicarousel.condense(decision) for decision in before]
    assert [aicarousel.explain_lines(decision) for decision in after] == [aicarousel.explain_lines(decision) for decision in before]
    assert any(line == "left out (5 of 40):" for decision in after for line in aicarousel.explain_lines(decision)) and len(repr(before[-1].wish)) > 1_000_000
    for decision in after:
        assert decision.wish is not None and len(repr(decision.wish)) < 1000 and decision.wish.provider is None
        assert len(decision.passed_over) <= 20 and all(len(attempt.detail) <= 200 for attempt in decision.attempts) and len(decision.told) <= 300
        assert decision.plan is not None and len(decision.plan.skipped) <= 20 and (not decision.n_more_out or decision.plan.skipped == decision.plan.waits == ())
    assert max(decision.n_more_out for decision in after) >= 10 and max(len(attempt.detail) for decision in before for attempt in decision.attempts) > 1000


def test_a_thousand_are_remembered_and_others_told_by_the_usage_table(build: Build) -> None:
    house = build(a=OOPS, b=healthy(), carousel={"strategy": "priority"})
    reply = house.chat("aicarousel")
    found = f"?id={reply.headers['x-aicarousel-request-id']}"
    house.settle()
    [decision] = house.gateway.decisions
    house.gateway.decisions.extend([decision._replace(id="other")] * 999)
    assert "tried, in order:" in explained(house, found)
    house.gateway.decisions.append(decision._replace(id="another"))
    house.rows()
    head, tried, end = explained(house, found)
    assert re.fullmatch(rf"{found[4:]}: chat, model aicarousel, \d+ tokens: served with 200 in {MS}, first words after {MS}", head) and tried == "tried: 2 times, the last b/1:m"
    assert re.fullmatch(r"it ended at \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ; more is not remembered of it, this is its row of the usage table", end)

    assert house.chat("aicarousel").status == 200 and house.post("/v1/chat/completions", chat_body("aicarousel", stream=True), headers={"x-aicarousel-no-fallback": "1"}).status == 200
    house.rows()
    house.gateway.decisions.clear()         # as a start anew does
    assert " streamed, model aicarousel" in explained(house)[0] and explained(house)[1] == "tried: b/1:m"
    assert admin(house, "GET", "/admin/explain?id=nobody").status == 404
    house.usage.path = house.folder / "gone" / "aicarousel.db"
    assert admin(house, "GET", f"/admin/explain{found}").status == 404


def test_a_refused_request_is_recalled_too(build: Build) -> None:
    house = build(a=healthy(), carousel={"unknownModel": "reject"})
    assert house.chat("zzz").status == 404 and house.rows()
    house.gateway.decisions.clear()
    assert explained(house)[0].endswith(" ms") and "model zzz, 0 tokens: failed with 404" in explained(house)[0] and explained(house)[1] == "no route was tried"


def test_a_dry_run_asks_nobody_and_changes_nothing(build: Build, provider: Provider) -> None:
    house = build(a=healthy(), b=healthy(), entries={"b": {"models": [{"id": "m", "vision": False}]}})
    body = {"model": "aicarousel", "messages": [{"role": "user", "content": "Hi"}]}
    for name, asked in (("chat", body), ("messages", {**body, "max_tokens": 5}), ("responses", {"model": "aicarousel", "input": "Hi"})):
        reply = admin(house, "POST", f"/admin/explain?format={name}", asked)
        assert reply.status == 200 and reply.json["lines"][-1] == "in this order: a/1:m, b/1:m" and f"{name}, model aicarousel" in reply.json["lines"][0], reply.raw
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]}
    lines = admin(house, "POST", "/admin/explain", {**body, "messages": [image]}).json["lines"]
    assert lines[1:] == ["left out:", "  b/1:m: reads no images", "in this order: a/1:m"]
    assert not provider.requests and house.chat("aicarousel").headers["x-aicarousel-provider"] == "a"
    n_asked = len(provider.requests)
    for path, wrong in (("/admin/explain", b"{"), ("/admin/explain", {"messages": 5}), ("/admin/explain?format=odd", body), ("/admin/explain?format=messages", {"model": "m", "messages": []})):
        reply = admin(house, "POST", path, wrong)
        assert reply.status == 400 and reply.json["error"]["message"], reply.raw
    assert len(provider.requests) == n_asked


def test_quota_tells_used_left_reset_burn_and_where_from(build: Build) -> None:
    told = [("x-ratelimit-limit-requests-minute", "30"), ("x-ratelimit-remaining-requests-minute", "20"), ("x-ratelimit-reset-requests-minute", "30")]
    house = build(a=answer(chat_answer(), 200, told), b=healthy(), entries={"a": {"preset": "cerebras"}, "b": {"limits": {"rpm": 4, "tpd": 100000}}})
    assert house.chat("a/m").status == house.chat("b/m").status == 200
    house.settle()
    rows = {(row["bucket"], row["measure"], row["per"]): row for row in admin(house, "GET", "/admin/quota").json["windows"]}
    [header] = [row for row in rows.values() if row["origin"] == "header"]
    assert (header["limit"], header["used"], header["left"]) == (30, 10, 20) and header["bucket"].split()[1].startswith("a/") and 0 < header["resets_in_s"] <= 61
    own = rows["credential b/1", "requests", "minute"]
    assert (own["limit"], own["used"], own["left"], own["origin"]) == (4, 1, 3, "configured") and own["burn_per_minute"] == 1.0 and own["empty_in_s"] == 180
    assert rows["credential b/1", "tokens", "day"]["left"] < 100000
    lines = aicarousel.quota_lines(list(rows.values()))
    assert lines[0].split() == "bucket what used limit left resets in burn/min empty in known from".split()
    assert any(line.startswith("credential b/1  requests/minute") and line.endswith("configured") for line in lines)


def test_a_route_that_is_out_can_be_used_again(build: Build, provider: Provider) -> None:
    house = build(a=SLOW_DOWN, b=healthy(), entries={"b": {"maxConcurrent": 2}})
    assert house.chat("aicarousel").status == 200
    rows = {row["route"]: row for row in admin(house, "GET", "/admin/routes").json["routes"]}
    assert rows["b/1:m"]["state"] == "free" and (rows["a/1:m"]["state"], rows["a/1:m"]["proven"]) == ("cooling", True) and 110 < rows["a/1:m"]["left_s"] <= 120
    table = aicarousel.route_lines(list(rows.values()))
    assert len(table) == 3 and "2 min" in table[1] and aicarousel.route_lines([]) == ["no provider takes part"]
    for wrong in (b"[]", b"{", {"route": 5}, {}):
        assert admin(house, "POST", "/admin/routes/reset", wrong).status == 400
    assert admin(house, "POST", "/admin/routes/reset", {"route": "nobody"}).json == {"reset": []}
    assert admin(house, "POST", "/admin/routes/reset", {"route": "a*"}).json == {"reset": ["a/1:m"]}
    assert {row["state"] for row in admin(house, "GET", "/admin/routes").json["routes"]} == {"free"}
    n_calls = len(provider.calls("a"))
    house.chat("a/m")
    assert len(provider.calls("a")) == n_calls + 1


@pytest.mark.parametrize("path,method", [("/admin/explain", "GET"), ("/admin/explain", "POST"), ("/admin/quota", "GET"), ("/admin/routes", "GET"), ("/admin/routes/reset", "POST")])
def test_only_an_admin_key_is_answered(build: Build, path: str, method: str) -> None:
    house = build(a=healthy())
    body = {"route": "a"} if method == "POST" else None
    assert house.request(method, path, body).status == 403 and house.request(method, path, body, key="").status == 401


def test_what_an_answer_tells_of_its_route(build: Build) -> None:
    cached = {**chat_answer(), "usage": {"prompt_tokens": 90, "completion_tokens": 5, "total_tokens": 95, "prompt_tokens_details": {"cached_tokens": 64}}}
    house = build(a=answer(cached))
    told = house.post("/v1/chat/completions", chat_body("a/m"), headers={"x-session-id": "s1"}).headers
    assert (told["x-aicarousel-key"], told["x-aicarousel-cache"], told["x-aicarousel-session"]) == (FAKE_KEY[-4:], "64/90", "new")
    assert house.post("/v1/chat/completions", chat_body("a/m"), headers={"x-session-id": "s1"}).headers["x-aicarousel-session"] == "hit"


@pytest.mark.parametrize("n,told", [(0, "0 models"), (1, "1 model"), (2, "2 models"), (1000, "1000 models")])
def test_a_count_agrees_with_its_noun(n: int, told: str) -> None:
    assert aicarousel.count_of(n, "model") == told


# ---------------------------------------------------------------- commands

@pytest.fixture(scope="module")
def running(module_provider: Provider, module_gateway_factory: Callable[..., Gateway]) -> Gateway:
    rows = {"a": module_provider.script("a", SLOW_DOWN), "b": module_provider.script("b", healthy())}
    return module_gateway_factory({name: {"baseUrl": url, "default": "m", "models": ["m"], "enableFallback": False, "keys": ["env:FAKE_KEY"], "limits": {"rpm": 50}} for name, url in rows.items()},
                                  environment={"FAKE_KEY": FAKE_KEY})


def run(gateway: Gateway, *words: str, server: bool = True, stdin: str = "") -> subprocess.CompletedProcess[str]:
    where = ["--server", gateway.url] if server else ["--server", "http://127.0.0.1:1"]
    return subprocess.run([*invocation(gateway.program), *words, "--home", str(gateway.home), *where], env=gateway.environment, cwd=gateway.folder, input=stdin, capture_output=True, text=True, timeout=30)


def test_commands_ask_the_running_gateway_and_leave_no_key(running: Gateway) -> None:
    asked = running.chat("aicarousel")
    told = run(running, "explain", asked.headers["x-aicarousel-request-id"])
    assert told.returncode == 0 and "tried, in order:" in told.stdout and told.stdout == run(running, "explain", "--last").stdout, told.stderr
    assert json.loads(run(running, "explain", "--last", "--json").stdout)["id"] == asked.headers["x-aicarousel-request-id"]
    body = running.folder / "body.json"
    body.write_text(json.dumps({"model": "b/m", "input": "Hi"}))
    dry = run(running, "explain", "--dry", str(body), "--format", "responses")
    assert dry.returncode == 0 and "in this order: b/1:m" in dry.stdout, dry.stderr
    assert run(running, "explain", "--dry", "-", stdin='{"model": "b/m", "messages": [{"role": "user", "content": "Hi"}]}').stdout.splitlines()[-1].startswith("in this order: b/1:m")
    assert "requests/minute" in run(running, "quota").stdout and json.loads(run(running, "quota", "--json").stdout)["windows"]
    listed = run(running, "route", "list")
    assert listed.returncode == 0 and any(line.startswith("a/1:m") and "cooling" in line for line in listed.stdout.splitlines())
    assert run(running, "route", "reset", "a").stdout == "reset: a/1:m\n"
    assert not any(line.startswith("a/1:m") and "cooling" in line for line in run(running, "route", "list").stdout.splitlines())
    keys = json.loads(running.command("key", "list", "--json").stdout)
    assert [row["name"] for row in keys] == ["test"]


@pytest.mark.parametrize("words,complaint", [
    (("explain", "nobody"), "404: No such request"), (("route", "reset", "nobody"), "found 'nobody'; expected a route's id"), (("explain", "--dry", "absent.json"), "--dry: found absent.json: No such file"),
    (("explain", "--dry", "-"), "400: The body is not valid JSON")])
def test_what_cannot_be_answered_is_one_line(running: Gateway, words: tuple[str, ...], complaint: str) -> None:
    told = run(running, *words)
    assert told.returncode == 2 and complaint in told.stderr and told.stderr.count("\n") == 1 and not told.stdout, (told.returncode, told.stderr)


@pytest.mark.parametrize("server", ["http://example.com:7123", "http://192.0.2.1", "ftp://127.0.0.1", "http://", "127.0.0.1:7123"])
def test_no_key_is_made_for_another_machine(running: Gateway, server: str) -> None:
    told = subprocess.run([*invocation(running.program), "quota", "--home", str(running.home), "--server", server], env=running.environment, cwd=running.folder, capture_output=True, text=True, timeout=30)
    assert told.returncode == 2 and "--server: found" in told.stderr and "on this machine" in told.stderr and told.stderr.count("\n") == 1, told.stderr


def test_without_a_running_gateway_commands_say_so(running: Gateway) -> None:
    for words in (("quota",), ("route", "list"), ("explain", "--last"), ("route", "reset", "a")):
        told = run(running, *words, server=False)
        assert told.returncode == 2 and "gateway at 127.0.0.1:1: found no answer" in told.stderr and told.stderr.count("\n") == 1, told.stderr
    assert [row["name"] for row in json.loads(running.command("key", "list", "--json").stdout)] == ["test"]
