"""Section 8: what a model name stands for, in which order routes are tried, what cools and for how long. A row per rule."""
from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import pytest

import aicarousel
from aicarousel import (FAILURE_RULES, Catalogue, Choice, Cooldown, GatewayError, Plan, Route, RoutingState, UpstreamFailure, begin_attempt, build_catalogue, classify, clear, cool,
                        end_probe, find_alias, hindrance, load_config, plan, resolve)

Json = dict[str, Any]
LOCAL = "http://127.0.0.1:9/v1"


def entry(*models: Any, falls: bool = True, keys: Sequence[Any] = (), **fields: Any) -> Json:
    """A provider of models.json; the first model is its default."""
    first = models[0]["id"] if isinstance(models[0], dict) else models[0]
    return {"baseUrl": LOCAL, "default": first, "enableFallback": falls, "models": list(models), **({"keys": list(keys)} if keys else {}), **fields}


def catalogue_of(models: Json, **carousel: Any) -> Catalogue:
    """The catalogue of a models.json; KEY_1 .. KEY_5 are set, and a key for every preset named."""
    environment = {f"KEY_{number}": f"fake-key-number-{number}" for number in range(1, 6)}
    text = json.dumps({**models, **({"carousel": carousel} if carousel else {})})
    return build_catalogue(load_config(text, models_path="models.json", environment=environment, dotenv={}, flags={}))


def routes_of(catalogue: Catalogue, name: str | None, state: RoutingState | None = None, *, now: float = 0.0, fallback: str = "chain", strategy: str = "round-robin") -> Plan:
    return plan(catalogue, resolve(catalogue, name), state or RoutingState(), now, strategy=strategy, fallback=fallback)


def shown(routes: Iterable[Route]) -> str:
    """Routes as provider/model, in order; /credential number where there are several."""
    return " ".join(f"{route.provider.name}/{route.model.id}" + (f"#{route.credential.id.rpartition('/')[2]}" if len(route.provider.credentials) > 1 else "") for route in routes)


# ------------------------------------------------------------------ naming a model

FAMILY_KEYS = {"keys": ["env:KEY_1"]}
HOUSE = {
    "groq": entry("openai/gpt-oss-120b", "openai/gpt-oss-20b", {"id": "qwen/qwen3.8-27b", "alias": "qwen"}, keys=["env:KEY_1"]),
    "cerebras": entry("gpt-oss-120b", "shared", keys=["env:KEY_2"], falls=False),
    "openrouter": entry("nvidia/nemo:free", "qwen/qwen3-coder:free", "shared", keys=["env:KEY_3"]),
}
GROQ = "groq/openai/gpt-oss-120b groq/openai/gpt-oss-20b groq/qwen/qwen3.8-27b"
CEREBRAS = "cerebras/gpt-oss-120b"
OPENROUTER = "openrouter/nvidia/nemo:free openrouter/qwen/qwen3-coder:free openrouter/shared"
WHOLE = f"{GROQ} {CEREBRAS} {OPENROUTER}"
ALIASES = {
    "fast": ["groq/openai/gpt-oss-20b", "cerebras"], "claude-*": ["aicarousel"], "claude-opus-*": ["cerebras"], "claude-opus-4": ["openrouter"],
    "chained": ["middle"], "middle": ["last", "groq"], "last": ["cerebras/shared"], "gpt-oss-*": ["gpt-oss-120b"], "groq": ["cerebras"], "plain": ["shared"],
    "gpt-4?": ["qwen"], "*-mini": ["cerebras"],
}

NAMES: list[tuple[str, str | None, Json, str]] = [       # rule, name, aliases, routes without any fallback
    ("1 absent", None, {}, WHOLE),
    ("1 empty", "", {}, WHOLE),
    ("1 aicarousel", "aicarousel", {}, WHOLE),
    ("1 auto", "auto", {}, WHOLE),
    ("2 exact, several targets in order", "fast", ALIASES, f"groq/openai/gpt-oss-20b {CEREBRAS}"),
    ("2 glob to the carousel", "claude-sonnet-5", ALIASES, WHOLE),
    ("2 the more specific glob", "claude-opus-5", ALIASES, CEREBRAS),
    ("2 exact before globs", "claude-opus-4", ALIASES, OPENROUTER),
    ("2 ? stands for one character", "gpt-4o", ALIASES, "groq/qwen/qwen3.8-27b"),
    ("2 ? does not stand for two", "gpt-4xx", ALIASES, WHOLE),
    ("2 glob at the start", "o7-mini", ALIASES, CEREBRAS),
    ("2 through two other aliases", "chained", ALIASES, f"cerebras/shared {CEREBRAS}"),
    ("2 a glob that covers its own target", "gpt-oss-20b", ALIASES, CEREBRAS),
    ("2 the target itself under that glob", "gpt-oss-120b", ALIASES, CEREBRAS),
    ("2 alias before provider", "groq", ALIASES, CEREBRAS),
    ("2 alias of a listed id", "plain", ALIASES, "cerebras/shared openrouter/shared"),
    ("2 letters matter", "FAST", ALIASES, WHOLE),
    ("3 provider/model", "groq/openai/gpt-oss-20b", {}, "groq/openai/gpt-oss-20b"),
    ("3 provider:model", "groq:openai/gpt-oss-20b", {}, "groq/openai/gpt-oss-20b"),
    ("3 the model need not be listed", "cerebras/brand-new", {}, "cerebras/brand-new"),
    ("3 a slash in an unlisted model", "openrouter/meta/llama-9:free", {}, "openrouter/meta/llama-9:free"),
    ("3 colon first, slash later", "openrouter:qwen/qwen3-coder:free", {}, "openrouter/qwen/qwen3-coder:free"),
    ("3 first segment is no provider", "qwen/qwen3-coder:free", {}, "openrouter/qwen/qwen3-coder:free"),
    ("3 nor is openai here", "openai/gpt-oss-120b", {}, "groq/openai/gpt-oss-120b"),
    ("3 a model's second name", "groq/qwen", {}, "groq/qwen/qwen3.8-27b"),
    ("3 nothing behind the slash", "groq/", {}, WHOLE),
    ("3 nothing before it", "/shared", {}, WHOLE),
    ("4 a provider that falls back inside", "openrouter", {}, OPENROUTER),
    ("4 a provider that does not", "cerebras", {}, CEREBRAS),
    ("5 listed once", "openai/gpt-oss-20b", {}, "groq/openai/gpt-oss-20b"),
    ("5 listed by two, in order", "shared", {}, "cerebras/shared openrouter/shared"),
    ("5 a second name", "qwen", {}, "groq/qwen/qwen3.8-27b"),
    ("7 unknown", "no-such-model", {}, WHOLE),
    ("7 a family whose provider takes no part", "claude-opus-5", {}, WHOLE),
]


@pytest.mark.parametrize(("name", "aliases", "expected"), [row[1:] for row in NAMES], ids=[row[0] for row in NAMES])
def test_what_a_name_stands_for(name: str | None, aliases: Json, expected: str) -> None:
    assert shown(routes_of(catalogue_of(HOUSE, **({"aliases": aliases} if aliases else {})), name, fallback="none").routes) == expected


def test_provider_and_colon_beat_a_listed_id() -> None:
    catalogue = catalogue_of({"one": entry("two/x"), "two": entry("x", "y")})
    assert shown(routes_of(catalogue, "two/x", fallback="none").routes) == "two/x"


@pytest.mark.parametrize(("name", "provider"), [("gpt-6", "openai"), ("chatgpt-9-latest", "openai"), ("o1", "openai"), ("o3-mini", "openai"), ("o4-mini-high", "openai"),
                                                ("claude-opus-9", "anthropic"), ("gemini-9-pro", "gemini")])
def test_family_prefixes_lead_home_when_that_provider_takes_part(name: str, provider: str) -> None:
    family = {"default": "m", "enableFallback": True, "models": ["m"], **FAMILY_KEYS, "baseUrl": LOCAL}
    home = catalogue_of({"groq": HOUSE["groq"], "openai": family, "anthropic": {**family, "preset": "openai", "format": "chat"}, "gemini": family})
    assert shown(routes_of(home, name, fallback="none").routes) == f"{provider}/{name}"
    assert shown(routes_of(catalogue_of(HOUSE), name, fallback="none").routes) == WHOLE, "7: without it the whole carousel"


def test_a_listed_id_beats_the_family() -> None:
    catalogue = catalogue_of({"openai": entry("m", keys=["env:KEY_1"]), "local": entry("gpt-oss")})
    assert shown(routes_of(catalogue, "gpt-oss", fallback="none").routes) == "local/gpt-oss"


def test_unknown_names_can_be_refused_with_the_three_nearest() -> None:
    catalogue = catalogue_of(HOUSE, unknownModel="reject", aliases={"fast": ["groq"]})
    with pytest.raises(GatewayError) as caught:
        resolve(catalogue, "gpt-oss-12b")
    error = caught.value
    assert (error.status, error.code, error.param) == (404, "model_not_found", "model") and "gpt-oss-12b" in error.message
    named = error.message.partition("Nearest: ")[2].rstrip(".").split(", ")
    assert len(named) == 3 and named[0] == "gpt-oss-120b" and set(named) <= {*catalogue.models, *catalogue.aliases, *catalogue.providers}
    for name in (None, "", "auto", "fast", "groq", "shared", "groq/never-heard-of"):
        assert resolve(catalogue, name).groups, name


def test_a_refusal_is_short_however_long_the_name() -> None:
    with pytest.raises(GatewayError) as caught:
        resolve(catalogue_of(HOUSE, unknownModel="reject"), "x" * 100_000)
    assert len(caught.value.message) < 1000


@pytest.mark.parametrize(("name", "alias"), [("claude-opus-4-1", "claude-opus-4*"), ("claude-opus-5", "claude-opus-?"), ("claude-x", "claude-*"), ("abc", "*"), ("exact", "exact")])
def test_the_most_specific_glob_wins_whatever_the_order(name: str, alias: str) -> None:
    globs = ["*", "claude-*", "claude-opus-?", "claude-opus-4*", "exact"]
    assert find_alias(name, globs) == find_alias(name, globs[::-1]) == alias


# ------------------------------------------------------------------ the order: providers, models, keys

THREE = {"a": entry("a1", "a2"), "b": entry("b1", "b2", falls=False), "c": entry("c1")}


def serve(catalogue: Catalogue, state: RoutingState, name: str | None = None, *, failing: Sequence[str] = ()) -> str:
    """One request: tries routes in order; the provider that served."""
    choice = resolve(catalogue, name)
    for route in plan(catalogue, choice, state, 0.0, strategy="round-robin", fallback="chain").routes:
        begin_attempt(state, choice, route)
        if route.provider.name not in failing:
            clear(state, route)
            return route.provider.name
    raise AssertionError("nobody served")


def test_nine_requests_reach_three_providers_three_times_in_order() -> None:
    catalogue, state = catalogue_of(THREE), RoutingState()
    assert "".join(serve(catalogue, state) for _ in range(9)) == "abcabcabc"


def test_after_a_failure_the_next_is_the_one_behind_who_served() -> None:
    catalogue, state = catalogue_of(THREE), RoutingState()
    assert serve(catalogue, state, failing="a") == "b"
    assert serve(catalogue, state) == "c"
    assert serve(catalogue, state, failing="ab") == "c"
    assert serve(catalogue, state) == "a"


def test_an_explicit_model_does_not_move_the_carousel() -> None:
    catalogue, state = catalogue_of({**THREE, "d": entry("c1")}), RoutingState()
    assert serve(catalogue, state) == "a"
    assert [serve(catalogue, state, "c1") for _ in range(4)] == ["c", "d", "c", "d"], "it turns among those that list it"
    assert [serve(catalogue, state, "a/a2") for _ in range(2)] == ["a", "a"]
    assert serve(catalogue, state) == "b"


@pytest.mark.parametrize("strategy", ["fill-first", "priority"])
def test_other_strategies_keep_the_order_of_the_file(strategy: str) -> None:
    catalogue, state = catalogue_of(THREE), RoutingState(turns={"*": "b"})
    assert shown(routes_of(catalogue, None, state, strategy=strategy).routes) == "a/a1 a/a2 b/b1 c/c1"
    assert shown(routes_of(catalogue, None, state).routes) == "c/c1 a/a1 a/a2 b/b1"


def test_a_turn_that_names_a_provider_no_longer_there_starts_at_the_first() -> None:
    assert shown(routes_of(catalogue_of(THREE), None, RoutingState(turns={"*": "gone"})).routes).startswith("a/a1")


def test_inside_a_provider_the_default_comes_first() -> None:
    catalogue = catalogue_of({"x": {**entry("one", "two", "three"), "default": "two"}, "y": {**entry("one", "two", falls=False), "default": "two"}})
    assert shown(routes_of(catalogue, None).routes) == "x/two x/one x/three y/two"


def test_keys_rotate_inside_a_model_and_count_for_each_model() -> None:
    catalogue, state = catalogue_of({"x": entry("m", "n", keys=["env:KEY_1", "env:KEY_2", "env:KEY_3"])}), RoutingState()
    orders = []
    for name in ("x/m", "x/m", "x/n", "x/m", "x/m"):
        choice = resolve(catalogue, name)
        routes = plan(catalogue, choice, state, 0.0, strategy="round-robin", fallback="none").routes
        orders.append(shown(routes))
        begin_attempt(state, choice, routes[0])
    assert orders == ["x/m#1 x/m#2 x/m#3", "x/m#2 x/m#3 x/m#1", "x/n#1 x/n#2 x/n#3", "x/m#3 x/m#1 x/m#2", "x/m#1 x/m#2 x/m#3"]


def test_all_keys_of_a_model_come_before_the_next_model() -> None:
    catalogue = catalogue_of({"x": entry("m", "n", keys=["env:KEY_1", "env:KEY_2"]), "y": entry("o")})
    assert shown(routes_of(catalogue, None).routes) == "x/m#1 x/m#2 x/n#1 x/n#2 y/o"


CREDENTIALS = {"x": entry("big", "small", "small-preview", keys=[
    {"key": "env:KEY_1", "models": ["small*"], "excludedModels": ["*-preview"]}, {"key": "env:KEY_2", "models": ["big"], "prefix": "teamB/"}, {"key": "env:KEY_3"}])}


@pytest.mark.parametrize(("name", "expected"), [
    ("x/big", "x/big#2 x/big#3"),
    ("x/small", "x/small#1 x/small#3"),
    ("x/small-preview", "x/small-preview#3"),
    ("x/unlisted", "x/unlisted#3"),
    ("teamB/big", "x/big#2"),
    ("x", "x/big#2 x/big#3 x/small#1 x/small#3 x/small-preview#3"),
])
def test_a_credential_serves_the_models_it_is_for(name: str, expected: str) -> None:
    assert shown(routes_of(catalogue_of(CREDENTIALS), name, fallback="none").routes) == expected


def test_a_prefix_gives_no_right_to_models_the_credential_is_not_for() -> None:
    assert "teamB/small" not in shown(routes_of(catalogue_of(CREDENTIALS), "teamB/small", fallback="none").routes)
    assert "x/small#2" not in shown(routes_of(catalogue_of(CREDENTIALS), "teamB/small", fallback="none").routes)


def test_a_model_nobody_has_a_key_for_has_no_route() -> None:
    catalogue = catalogue_of({"x": entry("m", keys=[{"key": "env:KEY_1", "models": ["other"]}])})
    found = routes_of(catalogue, "x/m", fallback="none")
    assert found == Plan((), (), None) and catalogue.whole == ()


# ------------------------------------------------------------------ fallback of explicit names

SPREAD = {"a": entry("m", "n"), "b": entry("m"), "c": entry("o")}


@pytest.mark.parametrize(("name", "fallback", "expected"), [
    ("a/m", "none", "a/m"),
    ("a/m", "same-model", "a/m b/m"),
    ("a/m", "chain", "a/m b/m a/n c/o"),
    ("b/m", "chain", "b/m a/m a/n c/o"),
    ("a/unlisted", "none", "a/unlisted"),
    ("a/unlisted", "same-model", "a/unlisted"),
    ("a/unlisted", "chain", "a/unlisted a/m a/n b/m c/o"),
    ("m", "none", "a/m b/m"),
    ("m", "same-model", "a/m b/m"),
    ("m", "chain", "a/m b/m a/n c/o"),
    ("c", "same-model", "c/o"),
    ("c", "chain", "c/o a/m a/n b/m"),
    ("two", "none", "c/o a/n"),
    ("two", "chain", "c/o a/n a/m b/m"),
    ("all", "none", "a/m a/n b/m c/o"),
    (None, "none", "a/m a/n b/m c/o"),
    ("unheard-of", "none", "a/m a/n b/m c/o"),
])
def test_where_an_explicit_name_goes_when_it_fails(name: str | None, fallback: str, expected: str) -> None:
    catalogue = catalogue_of(SPREAD, aliases={"two": ["c", "a/n"], "all": ["aicarousel"]})
    assert shown(routes_of(catalogue, name, fallback=fallback).routes) == expected


def test_the_carousel_behind_an_explicit_name_turns_too() -> None:
    assert shown(routes_of(catalogue_of(SPREAD), "a/unlisted", RoutingState(turns={"*": "a"})).routes) == "a/unlisted b/m c/o a/m a/n"


# ------------------------------------------------------------------ cooldowns

WIDE = {"x": entry("m", "n", keys=["env:KEY_1", "env:KEY_2"]), "y": entry("m")}
ALL = {"x/m#1", "x/m#2", "x/n#1", "x/n#2"}


def route_of(catalogue: Catalogue, provider: str = "x", model: str = "m", credential: int = 1) -> Route:
    return next(route for group in catalogue.whole for routes in group for route in routes
                if (route.provider.name, route.model.id, route.credential.id) == (provider, model, f"{provider}/{credential}"))


def failed(kind: str, *, scope: str | None = None, cool_s: float | None = None, proven: bool = False, reason: str = "") -> UpstreamFailure:
    """A failure of this kind, with the scope its kind has."""
    return UpstreamFailure(kind, reason or kind, scope=FAILURE_RULES[kind].scope if scope is None else scope, cool_s=cool_s, proven=proven)     # type: ignore[index,arg-type]


COOLS = [                       # kind, which routes are out after a failure of x/m#1, first span, second, third, cap
    ("request", set(), None),
    ("parameter", set(), None),
    ("fit", set(), None),
    ("model", {"x/m#1", "x/m#2"}, (60, 120, 240, 600)),
    ("credential", {"x/m#1", "x/n#1"}, (3600, 3600, 3600, 3600)),
    ("payment", {"x/m#1", "x/n#1"}, (3600, 3600, 3600, 3600)),
    ("rate", {"x/m#1"}, (1, 2, 4, 600)),
    ("server", {"x/m#1"}, (5, 10, 20, 600)),
    ("network", ALL, (5, 10, 20, 600)),
]


@pytest.mark.parametrize(("kind", "out", "spans"), COOLS, ids=[row[0] for row in COOLS])
def test_what_cools_and_how_long(kind: str, out: set[str], spans: tuple[float, ...] | None) -> None:
    catalogue, state = catalogue_of(WIDE), RoutingState()
    route = route_of(catalogue)
    seen, now = [], 1000.0
    for strike in range(1, 13):
        cooldown = cool(state, route, failed(kind), now, jitter=0.5)
        if spans is None:
            assert cooldown is None and not state.cooling
            return
        assert cooldown and (cooldown.kind, cooldown.strikes, cooldown.proven) == (kind, strike, False)
        if strike == 1:
            every = [route for routes in catalogue.whole[0] for route in routes] + [route_of(catalogue, "y")]
            assert {shown([one]) for one in every if hindrance(state, one, now)} == out
        seen.append(cooldown.until_at - now)
        now = cooldown.until_at
        assert hindrance(state, route, now - 0.001) is cooldown and hindrance(state, route, now) is None
    assert spans is not None and (*seen[:3], seen[-1]) == pytest.approx(spans)


@pytest.mark.parametrize("kind", [row[0] for row in COOLS if row[2]])
def test_jitter_moves_a_guess_by_a_fifth_and_never_over_its_cap(kind: str) -> None:
    rule = FAILURE_RULES[kind]      # type: ignore[index]
    for jitter, factor in ((0.0, 0.8), (0.5, 1.0), (1.0, 1.2)):
        cooldown = cool(RoutingState(), route_of(catalogue_of(WIDE)), failed(kind), 0.0, jitter=jitter)
        assert cooldown and cooldown.until_at == pytest.approx(min(rule.cap_s, rule.first_cool_s * factor))
    state, route = RoutingState(), route_of(catalogue_of(WIDE))
    for strike in range(1100):
        cooldown = cool(state, route, failed(kind), strike * 1e6, jitter=1.0)
        assert cooldown and cooldown.until_at - strike * 1e6 <= rule.cap_s


def test_a_reason_can_have_a_first_guess_of_its_own() -> None:
    state, route = RoutingState(), route_of(catalogue_of(WIDE))
    assert cool(state, route, failed("rate", cool_s=200.0), 0.0, jitter=0.5).until_at == 200.0              # type: ignore[union-attr]
    assert cool(state, route, failed("rate", cool_s=200.0), 200.0, jitter=0.5).until_at == 600.0            # type: ignore[union-attr]
    assert cool(state, route, failed("rate", cool_s=200.0), 600.0, jitter=0.5).until_at == 600.0 + 600.0    # type: ignore[union-attr]


def test_a_proven_time_is_kept_as_it_is() -> None:
    state, route = RoutingState(), route_of(catalogue_of(WIDE))
    for strike, span_s in enumerate((7200.0, 0.25), 1):
        cooldown = cool(state, route, failed("rate", cool_s=span_s, proven=True), 50.0, jitter=1.0)
        assert cooldown and (cooldown.until_at, cooldown.proven, cooldown.strikes) == (50.0 + span_s, True, strike)


def test_what_the_provider_says_becomes_a_proven_cooldown_of_its_bucket() -> None:
    catalogue, state = catalogue_of(WIDE), RoutingState()
    failure = classify("custom", "account", 429, {"retry-after": "42"}, b'{"error":{"message":"slow down"}}', utc=1_790_000_000.0)
    cooldown = cool(state, route_of(catalogue), failure, 100.0, jitter=0.9)
    assert cooldown and (cooldown.key, cooldown.proven, cooldown.until_at) == ("credential x/1", True, 142.0)


def test_failures_of_requests_sent_before_the_cooldown_add_no_strikes() -> None:
    state, route = RoutingState(), route_of(catalogue_of(WIDE))
    first = cool(state, route, failed("server"), 0.0, jitter=0.5)
    assert [cool(state, route, failed("server"), at, jitter=0.5) for at in (0.1, 1.0, 4.9)] == [first] * 3
    assert first and (first.strikes, first.until_at) == (1, 5.0)
    later = cool(state, route, failed("server"), 5.0, jitter=0.5)
    assert later and (later.strikes, later.until_at) == (2, 15.0)


def test_a_guess_does_not_shorten_what_is_proven() -> None:
    state, route = RoutingState(), route_of(catalogue_of(WIDE))
    proven = cool(state, route, failed("rate", cool_s=300.0, proven=True), 0.0, jitter=0.5)
    assert cool(state, route, failed("rate"), 1.0, jitter=0.5) is proven and state.cooling[route.keys[3]] is proven


@pytest.mark.parametrize("kind", [row[0] for row in COOLS if row[2]])
@pytest.mark.parametrize("proven", [False, True])
def test_any_success_clears_and_strikes_start_anew(kind: str, proven: bool) -> None:
    state, route = RoutingState(), route_of(catalogue_of(WIDE))
    cool(state, route, failed(kind, cool_s=100.0 if proven else None, proven=proven), 0.0, jitter=0.5)
    cool(state, route, failed(kind, cool_s=100.0 if proven else None, proven=proven), 4000.0, jitter=0.5)
    clear(state, route)
    assert not state.cooling and hindrance(state, route, 4001.0) is None
    again = cool(state, route, failed(kind), 5000.0, jitter=0.5)
    assert again and again.strikes == 1


def test_a_success_clears_every_scope_over_the_route_and_no_other() -> None:
    catalogue, state = catalogue_of(WIDE), RoutingState()
    mine, other = route_of(catalogue), route_of(catalogue, model="n", credential=2)
    for scope in ("provider", "credential", "model", "route"):
        cool(state, mine, failed("server", scope=scope), 0.0, jitter=0.5)
    kept = cool(state, other, failed("server"), 0.0, jitter=0.5)
    clear(state, mine)
    assert list(state.cooling.values()) == [kept]


def test_a_guessed_cooldown_is_a_last_resort_soonest_end_first() -> None:
    catalogue, state = catalogue_of({"a": entry("m"), "b": entry("m"), "c": entry("m")}), RoutingState()
    cool(state, route_of(catalogue, "a"), failed("model"), 0.0, jitter=0.5)
    cool(state, route_of(catalogue, "b"), failed("server"), 0.0, jitter=0.5)
    found = routes_of(catalogue, None, state, now=1.0)
    assert shown(found.routes) == "c/m b/m a/m" and found.free_at is None
    assert [(route.provider.name, why) for route, why in found.skipped] == [("a", "model, 59 s left"), ("b", "server, 4 s left")]
    cool(state, route_of(catalogue, "c"), failed("network"), 0.0, jitter=1.0)
    assert shown(routes_of(catalogue, None, state, now=1.0).routes) == "b/m c/m a/m", "with nothing else the one that ends soonest comes first"


def test_a_proven_cooldown_is_left_out_and_says_when_it_ends() -> None:
    catalogue, state = catalogue_of({"a": entry("m"), "b": entry("m")}), RoutingState()
    cool(state, route_of(catalogue, "a"), failed("rate", cool_s=50.0, proven=True), 0.0, jitter=0.5)
    cool(state, route_of(catalogue, "b"), failed("rate", cool_s=20.0, proven=True), 0.0, jitter=0.5)
    found = routes_of(catalogue, None, state, now=5.0)
    assert (found.routes, found.free_at) == ((), 20.0) and [why for _, why in found.skipped] == ["rate, 45 s left", "rate, 15 s left"]
    assert shown(routes_of(catalogue, None, state, now=20.0).routes) == "b/m"
    assert shown(routes_of(catalogue, None, state, now=50.0).routes) == "a/m b/m"


def test_a_longer_guess_does_not_make_a_proven_cooldown_a_last_resort() -> None:
    catalogue, state = catalogue_of({"a": entry("m")}), RoutingState()
    cool(state, route_of(catalogue, "a"), failed("model"), 0.0, jitter=0.5)
    cool(state, route_of(catalogue, "a"), failed("rate", cool_s=20.0, proven=True), 0.0, jitter=0.5)
    found = routes_of(catalogue, None, state, now=5.0)
    assert found.routes == () and found.free_at == 20.0


def test_one_probe_is_let_through_and_the_others_wait_for_what_it_finds() -> None:
    catalogue, state = catalogue_of({"a": entry("m"), "b": entry("m")}), RoutingState()
    choice, probe = resolve(catalogue, None), route_of(catalogue, "a")
    cool(state, probe, failed("server"), 0.0, jitter=0.5)
    assert shown(routes_of(catalogue, None, state, now=5.0).routes) == "a/m b/m"
    begin_attempt(state, choice, probe)
    found = routes_of(catalogue, None, RoutingState(state.cooling), now=5.1)
    assert shown(found.routes) == "b/m a/m" and [why for _, why in found.skipped] == ["server, probing"]
    end_probe(state, probe)                                 # the client left: nothing was found out
    assert shown(routes_of(catalogue, None, RoutingState(state.cooling), now=5.2).routes) == "a/m b/m"
    begin_attempt(state, choice, probe)
    again = cool(state, probe, failed("server"), 6.0, jitter=0.5)
    assert again and (again.strikes, again.until_at, again.probing) == (2, 16.0, False)
    begin_attempt(state, choice, probe)
    clear(state, probe)
    assert shown(routes_of(catalogue, None, RoutingState(state.cooling), now=6.1).routes) == "a/m b/m"


def test_a_failed_probe_that_cools_another_scope_frees_the_first() -> None:
    catalogue, state = catalogue_of({"a": entry("m")}), RoutingState()
    choice, probe = resolve(catalogue, None), route_of(catalogue, "a")
    cool(state, probe, failed("server"), 0.0, jitter=0.5)
    begin_attempt(state, choice, probe)
    cool(state, probe, failed("network"), 6.0, jitter=0.5)
    assert not any(cooldown.probing for cooldown in state.cooling.values()) and hindrance(state, probe, 11.0) is None


@pytest.mark.parametrize(("scope", "cools"), [("model", False), ("route", False), ("credential", True), ("provider", True)])
def test_models_that_are_not_listed_do_not_cool_as_such(scope: str, cools: bool) -> None:
    catalogue, state = catalogue_of(WIDE), RoutingState()
    route = resolve(catalogue, "x/made-up-by-a-client").groups[0][0][0]
    assert (cool(state, route, failed("server", scope=scope), 0.0, jitter=0.5) is not None) == cools == bool(state.cooling)


def test_a_default_that_is_not_listed_cools() -> None:
    catalogue = catalogue_of(WIDE)
    provider = aicarousel.replace(catalogue.providers["x"], models=(aicarousel.Model("n"),))
    route = aicarousel.make_route(provider, provider.credentials[0], aicarousel.Model("m"))
    assert cool(RoutingState(), route, failed("model"), 0.0, jitter=0.5)


def test_no_more_than_ten_thousand_cooldowns_are_kept() -> None:
    state = RoutingState({f"k{number}": Cooldown(f"k{number}", "server", "server_error", 1000.0 + number, 1, False) for number in range(10_000)})
    route = route_of(catalogue_of(WIDE))
    cooldown = cool(state, route, failed("server"), 5000.0, jitter=0.5)
    assert len(state.cooling) == 10_000 and "k0" not in state.cooling and "k1" in state.cooling and state.cooling[route.keys[3]] is cooldown
    cool(state, route, failed("server"), 6000.0, jitter=0.5)
    assert len(state.cooling) == 10_000 and "k1" in state.cooling, "one that is known needs no room"


def test_names_clients_make_up_are_not_remembered_for_ever() -> None:
    catalogue, state = catalogue_of(WIDE), RoutingState()
    for number in range(20_000):
        choice = resolve(catalogue, f"x/made-up-{number}")
        begin_attempt(state, choice, choice.groups[0][0][0])
    assert len(state.turns) <= 10_000


def test_planning_changes_nothing() -> None:
    catalogue, state = catalogue_of(WIDE), RoutingState()
    cool(state, route_of(catalogue), failed("server"), 0.0, jitter=0.5)
    before = repr(state)
    for name in (None, "m", "x", "x/m", "nothing"):
        for now in (1.0, 100.0):
            routes_of(catalogue, name, state, now=now)
    assert repr(state) == before


def test_choices_say_whether_they_were_asked_for() -> None:
    catalogue = catalogue_of(SPREAD, aliases={"two": ["c", "a"], "all": ["aicarousel"]})
    facts = {name: (choice.rotates, choice.explicit) for name in (None, "m", "a", "a/m", "two", "all", "???") if isinstance(choice := resolve(catalogue, name), Choice)}
    assert facts == {None: (True, False), "m": (True, True), "a": (False, True), "a/m": (False, True), "two": (False, True), "all": (True, True), "???": (True, False)}


# ------------------------------------------------------------------ what was held against a key ends with the key

@pytest.mark.parametrize("after,left", [
    ({}, ["credential a/1", "provider a", "provider b", "route a/1:m:free", "route a/2:m:free"]),
    ({"a": entry("m", keys=["env:KEY_3", "env:KEY_2"])}, ["provider a", "provider b", "route a/2:m:free"]),
    ({"a": entry("m", keys=["env:KEY_1"])}, ["credential a/1", "provider a", "provider b", "route a/1:m:free"]),
    ({"a": entry("m", keys=["env:KEY_1", "env:KEY_2"], baseUrl="http://127.0.0.1:8/v1")}, ["provider b"]),
    ({"b": entry("m", proxy="http://127.0.0.1:3128")}, ["credential a/1", "provider a", "route a/1:m:free", "route a/2:m:free"]),
])
def test_a_changed_key_or_address_is_tried_at_once(after: Json, left: list[str]) -> None:
    before = {"a": entry("m", keys=["env:KEY_1", "env:KEY_2"]), "b": entry("m")}
    state = RoutingState()
    for key in ("provider a", "credential a/1", "route a/1:m:free", "route a/2:m:free", "provider b"):
        state.cooling[key] = Cooldown(key, "credential", "auth_invalid", 99.0, 1, False)
    aicarousel.forget_changed(state, catalogue_of(before).providers.values(), catalogue_of({**before, **after}).providers.values())
    assert sorted(state.cooling) == left
