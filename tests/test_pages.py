"""Section 21, Pages: what `/` is to a browser and to others, and what it is told by /admin."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable
from typing import Any

import aicarousel
from fakes import FAKE_KEY, ROLE, Pause, Provider, Reply, answer, chat_body, content, healthy, stream
from house import House

Build = Callable[..., House]
SLOW_DOWN = answer({"error": {"message": f"Slow down, {FAKE_KEY}\x1b[2J", "code": "rate_limit_exceeded"}}, 429, [("retry-after", "120")])


def admin(house: House, path: str) -> Any:
    key, _ = aicarousel.create_key(house.database, "admin", limits={"admin": True})
    reply = house.request("GET", path, key=key)
    assert reply.status == 200, reply.raw
    return reply.json


def page(house: House) -> Reply:
    return house.get("/", headers={"accept": "text/html,application/xhtml+xml"}, key="")


def test_a_browser_gets_a_page_and_all_else_some_lines(build: Build) -> None:
    house = build(a=healthy())
    assert house.get("/", key="").headers["content-type"].startswith("text/plain")
    reply = page(house)
    assert reply.status == 200 and reply.headers["content-type"] == "text/html; charset=utf-8" and reply.headers["cache-control"] == "no-store"
    assert house.request("HEAD", "/", headers={"accept": "text/html"}, key="").status == 200


def test_the_page_runs_its_own_script_alone_and_loads_nothing(build: Build) -> None:
    house = build(a=healthy())
    reply = page(house)
    text = reply.body.decode()
    policy = dict(part.strip().split(" ", 1) for part in reply.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'" and policy["frame-ancestors"] == "'none'" and "unsafe" not in str(policy)
    for kind, name in (("style", "style-src"), ("script", "script-src")):
        [source] = re.findall(rf"<{kind}>(.*?)</{kind}>", text, re.S)
        assert policy[name] == f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"
    assert not re.search(r"https?://(?!127\.0\.0\.1)|innerHTML|\son\w+=|\sstyle=|\bsrc=|url\(|@import|eval\(", text)
    assert set(re.findall(r'href="([^"]*)"', text)) == {"/docs", "data:,"}


def test_recipes_stand_in_the_page_as_data_that_cannot_end_it(build: Build) -> None:
    house = build(a=healthy())
    house.gateway.recipes = {"odd": "</script><script>alert(1)</script> {url} {key}"}
    text = page(house).body.decode()
    assert text.count("</script>") == 2 and "\\u003c/script>\\u003cscript>alert(1)" in text


def test_requests_under_way_and_ended_are_listed(build: Build, provider: Provider) -> None:
    house = build(a=SLOW_DOWN, b=stream(Pause("head"), ROLE, content("one"), Pause("more")), carousel={"strategy": "priority"})
    with house.start_chat("aicarousel") as client:
        provider.wait_calls("b")
        [row] = admin(house, "/admin/requests")["live"]
        assert (row["format"], row["model"], row["streamed"], row["route"], row["attempts"], row["state"]) == ("chat", "aicarousel", True, "b/1:m", 2, "asking") and row["for_s"] >= 0
        provider.release("head")
        provider.wait_paused("more")
        house.settle()
        assert [row["state"] for row in admin(house, "/admin/requests")["live"]] == ["answering"]
        client.close()
    house.wait(lambda: not house.gateway.relay.running)
    shown = admin(house, "/admin/requests")
    assert shown["live"] == [] and shown["requests"] == 1 and shown["version"] == aicarousel.__version__
    [row] = shown["last"]
    assert (row["outcome"], row["status"], row["route"], row["attempts"]) == ("client_closed", 499, "b/1:m", 2) and row["total_ms"] >= row["first_ms"]


def test_no_more_than_a_hundred_are_listed_the_newest_first(build: Build) -> None:
    house = build(a=healthy())
    ids = [house.chat("aicarousel").headers["x-aicarousel-request-id"] for _ in range(103)]
    house.settle()
    assert [row["id"] for row in admin(house, "/admin/requests")["last"]] == ids[:2:-1]


def test_routes_tell_their_key_their_buckets_and_their_last_error(build: Build) -> None:
    house = build(a=SLOW_DOWN, b=healthy(), entries={"a": {"keys": [{"key": "env:FAKE_KEY", "label": "team"}]}}, carousel={"strategy": "priority"})
    assert house.chat("aicarousel").status == 200
    house.settle()
    first, second = admin(house, "/admin/routes")["routes"]
    assert (first["provider"], first["key"], first["model"], first["state"], first["proven"]) == ("a", "team", "m", "cooling", True)
    assert first["last_error"].startswith("rate") and "(429) Slow down" in first["last_error"] and FAKE_KEY not in str(first) and "\x1b" not in str(first)
    assert (second["key"], second["state"], second["last_error"]) == ("1", "free", None)
    windows = admin(house, "/admin/quota")["windows"]
    assert second["buckets"] and {row["bucket"] for row in windows} & set(second["buckets"])


def test_what_clients_call_their_models_is_shown_as_one_line_without_secrets(build: Build) -> None:
    house = build(a=healthy())
    house.post("/v1/chat/completions", chat_body(f"{FAKE_KEY}\n\x1b[31m<b>"))
    house.settle()
    [row] = admin(house, "/admin/requests")["last"]
    assert FAKE_KEY not in row["model"] and row["model"].isprintable() and "<b>" in row["model"]
