"""Models that providers list themselves: fetched in the background, kept, shown by /v1/models, asked for again by an admin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import aicarousel
from fakes import FAKE_KEY, Pause, Provider, answer, healthy, in_turn
from house import House
from test_why import admin

Build = Callable[..., House]
LISTED = {"object": "list", "data": [{"id": "m", "context_length": 5}, {"id": "vendor/big:free", "context_length": 32768}, {"id": "vendor/hidden-preview"}, {"id": 7}, "x", {"id": "a\nb"}]}
ALL = {"models": ["*"]}


def names(house: House) -> list[str]:
    return [row["id"] for row in house.request("GET", "/v1/models").json["data"]]


def listed(house: House, name: str) -> None:
    house.wait(lambda: name in names(house))


def test_what_a_provider_lists_can_be_named_and_is_no_part_of_the_rotation(build: Build, provider: Provider) -> None:
    house = build(a=in_turn(answer(LISTED), *[healthy()] * 9), b=healthy(), entries={"a": {**ALL, "enableFallback": True}})
    listed(house, "a/vendor/big:free")
    assert names(house) == ["aicarousel", "a/m", "a/vendor/big:free", "a/vendor/hidden-preview", "b/m"]
    [asked] = provider.calls("a")
    assert (asked.method, asked.path.rpartition("/")[2], asked.body, asked.headers["authorization"]) == ("GET", "models", b"", f"Bearer {FAKE_KEY}")
    row = house.request("GET", "/v1/models/a/vendor/big:free").json
    assert row["context_length"] == 32768 and row["owned_by"] == "a"
    assert house.request("GET", "/v1/models/a/m").json.get("context_length") is None, "of a named one configuration tells"
    assert house.chat("a/vendor/big:free", stream=False).status == 200 and provider.calls("a")[-1].json["model"] == "vendor/big:free"
    assert {house.chat("aicarousel", stream=False).headers["x-aicarousel-model"] for _ in range(4)} == {"m"}


@pytest.mark.parametrize("unknown", ["carousel", "reject"])
def test_every_name_that_is_listed_is_taken_and_bare_ids_too(build: Build, provider: Provider, unknown: str) -> None:
    """Whatever /v1/models names leads to its model; what is listed by several providers takes turns; configured names go before fetched ones."""
    told = {"data": [{"id": "vendor/big:free"}, {"id": "n"}, {"id": "odd*"}, {"id": "gpt-9"}, {"id": "b"}]}
    house = build(a=in_turn(answer(told), *[healthy()] * 40), c=in_turn(answer(told), *[healthy()] * 40), b=healthy(), openai=healthy(),
                  entries={"a": ALL, "c": {**ALL, "models": ["m", "*"]}, "b": {"models": ["m", "n"]}}, carousel={"unknownModel": unknown, "aliases": {"fast": "b/n"}, "fallback": "none"})
    listed(house, "a/n")
    listed(house, "c/n")
    for name in names(house):
        reply = house.chat(name, stream=False)
        assert reply.status == 200 and (name in ("aicarousel", "fast") or f"{reply.headers['x-aicarousel-provider']}/{reply.headers['x-aicarousel-model']}" == name), name
    assert "a/odd*" not in names(house)
    assert {house.chat("vendor/big:free", stream=False).headers["x-aicarousel-provider"] for _ in range(4)} == {"a", "c"}
    assert provider.calls("a")[-1].json["model"] == "vendor/big:free"
    for name, served in (("n", "b/n"), ("gpt-9", "openai/gpt-9"), ("b", "b/m")):
        reply = house.chat(name, stream=False)
        assert f"{reply.headers['x-aicarousel-provider']}/{reply.headers['x-aicarousel-model']}" == served
    assert house.request("GET", "/v1/models/vendor/big:free").json["owned_by"] == "a" and house.request("GET", "/v1/models/vendor/small").status == 404
    near = house.chat("vendor/bigg:free", stream=False)
    assert near.status == 200 if unknown == "carousel" else near.status == 404 and "Nearest: vendor/big:free" in near.error["message"]


def test_a_bare_id_survives_an_edit_and_goes_with_its_provider(build: Build) -> None:
    house = build(a=in_turn(answer(LISTED), *[healthy()] * 9), b=healthy(), entries={"a": {**ALL, "keys": [{"key": "env:FAKE_KEY", "excludedModels": ["*-preview"]}]}}, carousel={"unknownModel": "reject"})
    listed(house, "a/vendor/big:free")
    house.reconfigure({**house.models, "b": {**house.models["b"], "weight": 2}})
    assert house.chat("vendor/big:free", stream=False).headers["x-aicarousel-provider"] == "a"
    assert house.chat("vendor/hidden-preview", stream=False).status == 404, "no key may use it"
    key, _ = aicarousel.create_key(house.database, "other", limits={"models": ("b/*",)})
    assert house.request("POST", "/v1/chat/completions", {"model": "vendor/big:free", "messages": [{"role": "user", "content": "Hi"}]}, key=key).status == 403
    house.reconfigure({**house.models, "a": {**house.models["a"], "models": ["m"]}})
    assert house.chat("vendor/big:free", stream=False).status == 404


def test_a_list_is_fetched_again_after_five_minutes_behind_whoever_looks_and_the_last_good_one_stays(build: Build, provider: Provider) -> None:
    more = {"data": [{"id": "new"}]}
    house = build(a=in_turn(answer(LISTED), answer({"error": {"message": f"Oops {FAKE_KEY}"}}, 500), answer(more)), entries={"a": ALL})
    listed(house, "a/vendor/big:free")
    house.pass_time(299.0)
    assert "a/vendor/big:free" in names(house) and len(provider.calls("a")) == 1
    house.pass_time(2.0)
    assert "a/vendor/big:free" in names(house), "nobody waits for it"
    house.wait_line("models.failed provider=a")
    assert "a/vendor/big:free" in names(house) and len(provider.calls("a")) == 2 and not any(FAKE_KEY in line for line in house.lines)
    house.pass_time(301.0)
    listed(house, "a/new")
    assert names(house) == ["aicarousel", "a/m", "a/new"] and not house.gateway.relay.state.cooling


def test_nobody_is_asked_who_is_not_told_to_be(build: Build, provider: Provider) -> None:
    house = build(a=healthy())
    assert names(house) == ["aicarousel", "a/m"] and admin(house, "POST", "/admin/models/refresh", {}).json == {"providers": {}} and not provider.requests


def test_a_list_that_hangs_is_in_nobodys_way(build: Build, provider: Provider) -> None:
    house = build(a=in_turn([Pause("never")], healthy()), entries={"a": ALL})
    house.wait(lambda: provider.calls("a"))
    assert names(house) == ["aicarousel", "a/m"] and house.chat("a/m", stream=False).status == 200


def test_an_admin_has_them_asked_for_at_once(build: Build, provider: Provider) -> None:
    house = build(a=in_turn(answer({"data": []}), answer(LISTED), answer(b"<html>", headers=[("content-type", "text/html")])), b=healthy(), entries={"a": ALL})
    house.wait_line("models.failed provider=a")
    assert admin(house, "POST", "/admin/models/refresh", {}).json == {"providers": {"a": {"models": 3}}}
    assert "a/vendor/big:free" in names(house)
    again = admin(house, "POST", "/admin/models/refresh", {}).json["providers"]["a"]
    assert again["models"] == 3 and again["error"]
    assert house.request("POST", "/admin/models/refresh", {}).status == 403 and house.request("POST", "/admin/models/refresh", {}, key="").status == 401
    assert house.request("GET", "/admin/models/refresh").status == 405


def test_a_key_keeps_to_its_models_and_an_edit_ends_a_list(build: Build, provider: Provider) -> None:
    house = build(a=in_turn(answer(LISTED)), entries={"a": {**ALL, "keys": [{"key": "env:FAKE_KEY", "excludedModels": ["*-preview"]}]}})
    listed(house, "a/vendor/big:free")
    assert "a/vendor/hidden-preview" not in names(house)
    house.reconfigure({"a": {**house.models["a"], "models": ["m"]}})
    assert names(house) == ["aicarousel", "a/m"]


@pytest.mark.parametrize(("body", "found"), [
    (b'{"data": [{"id": "a"}, {"id": "a", "context_window": 9}]}', [("a", 9)]), (b'[{"id": "t", "context_length": 131072}]', [("t", 131072)]),
    (b'{"models": [{"name": "models/gemini-2.5-flash", "max_input_tokens": 10}]}', [("gemini-2.5-flash", 10)]), (b'{"data": {"id": "a"}}', []), (b'{"data": null}', []), (b"null", []), (b"7", []), (b"\xff", []), (b"", []),
    (b"[" * 100_000, []), (b'[{"id": "' + b"x" * 201 + b'"}, {"id": ""}, {"id": null, "name": "n", "max_model_len": true}]', [("n", None)])])
def test_lists_of_every_shape(body: bytes, found: list[tuple[str, Any]]) -> None:
    assert [(model.id, model.context) for model in aicarousel.read_models(body)] == found


def test_a_messages_provider_is_asked_in_its_way(build: Build, provider: Provider) -> None:
    house = build(a=in_turn(answer({"data": [{"type": "model", "id": "claude-x"}]})), entries={"a": {**ALL, "format": "messages"}})
    listed(house, "a/claude-x")
    [asked] = provider.calls("a")
    assert asked.path.endswith("/models?limit=1000") and asked.headers["anthropic-version"] == "2023-06-01"
    assert house.request("GET", "/v1/models", headers={"anthropic-version": "2023-06-01"}).json["data"][-1]["id"] == "a/claude-x"


@pytest.mark.parametrize(("models", "ids", "asks"), [(["*"], ["m"], True), (["n", "*"], ["m", "n"], True), (["*", "m", "n"], ["m", "n"], True), (["m"], ["m"], False)])
def test_a_star_among_the_models(models: list[str], ids: list[str], asks: bool) -> None:
    [provider] = House.read({"a": {"baseUrl": "http://127.0.0.1:9/v1", "default": "m", "enableFallback": True, "models": models, "keys": ["env:FAKE_KEY"]}}).active
    assert ([model.id for model in provider.models], provider.lists_models) == (ids, asks)
