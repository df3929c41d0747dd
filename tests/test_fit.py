"""What a request needs and what a model takes: refusals repaired, routes passed over, wishes in the request, payload rules.

Tables for the pure functions; then dialogues between a client, the gateway and scripted providers that refuse as real ones do.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import aicarousel as ac
from dialects import FORMATS, PATHS, SCHEMA, Telling, ask, read_stream
from fakes import TEXT, Json, Provider, Reply, Request, answer, chat_body, healthy, in_turn, rows_of, stream
from house import House
from test_policy import catalogue_of, entry, shown

Build = Callable[..., House]
DAY_S = 86400.0
PIXEL = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="


def refusal(message: str, param: str | None = None, code: str | None = None, status: int = 400) -> list[Any]:
    """Steps of a refusal as OpenAI words it."""
    return answer({"error": {"message": message, "type": "invalid_request_error", "param": param, "code": code}}, status)


def judged(message: str, param: str | None = None, status: int = 400) -> ac.UpstreamFailure:
    """The failure that such a refusal is."""
    return ac.classify("custom", "account", status, {}, json.dumps({"error": {"message": message, "param": param}}).encode(), utc=0.0)


def refusing(when: Callable[[Json], bool], steps: Sequence[Any]) -> Callable[[Request], Sequence[Any]]:
    """A provider that refuses what `when` says, and answers the rest."""
    def play(request: Request) -> Sequence[Any]:
        return steps if when(request.json) else healthy()(request)
    return play


def dropped(reply: Reply) -> list[str]:
    """What the client was told of its fields."""
    return [part for part in reply.headers.get("x-aicarousel-dropped", "").split(",") if part]


# ------------------------------------------------------------------ what a refusal asks for

CURES: list[tuple[str, str | None, Json, Any]] = [      # words, param, request, (field, how, to) or None
    ("Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.", "max_tokens", {"max_tokens": 5}, ("max_tokens", "rename", "max_completion_tokens")),
    ("Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.", "max_tokens", {"max_tokens": 5, "max_completion_tokens": 6}, ("max_tokens", "drop", None)),
    ("Unknown parameter: 'max_completion_tokens'. Did you mean 'max_tokens'?", None, {"max_completion_tokens": 5}, ("max_completion_tokens", "rename", "max_tokens")),
    ("Unsupported parameter: 'stop'. Please use 'stop_sequences'.", "stop", {"stop": ["x"]}, ("stop", "rename", "stop_sequences")),
    ("Unsupported parameter: 'seed'. Use 'messages' instead.", "seed", {"seed": 1}, ("seed", "drop", None)),
    ("max_tokens is too large: 100000. This model supports at most 16384 completion tokens, whereas you provided 100000.", "max_tokens", {"max_tokens": 100000}, ("max_tokens", "most", 16384)),
    ("`max_tokens` must be less than or equal to `32768`, the maximum value for `max_tokens` is less than the `context_window` for this model", None, {"max_tokens": 40000}, ("max_tokens", "most", 32768)),
    ("Invalid max_tokens value, the valid range of max_tokens is [1, 8192]", None, {"max_tokens": 9000}, ("max_tokens", "most", 8192)),
    ("Range of max_tokens should be [1, 8192]", None, {"max_tokens": 9000}, ("max_tokens", "most", 8192)),
    ("max_tokens: 100000 > 64000, which is the maximum allowed number of output tokens for claude-x", None, {"max_tokens": 100000}, ("max_tokens", "most", 64000)),
    ("Invalid 'temperature': decimal above maximum value. Expected a value <= 2, but got 5 instead.", "temperature", {"temperature": 5}, ("temperature", "most", 2)),
    ("temperature: range: 0..1", None, {"temperature": 1.5}, ("temperature", "most", 1)),
    ("temperature must be between 0 and 1.5", None, {"temperature": -1}, ("temperature", "least", 0)),
    ("top_p must be in (0, 1]", None, {"top_p": 1.2}, ("top_p", "most", 1)),
    ("Invalid 'n': integer above maximum value. Expected a value <= 8, but got 10 instead.", "n", {"n": 10}, ("n", "most", 8)),
    ("Invalid 'max_output_tokens': integer below minimum value. Expected a value >= 16, but got 1 instead.", "max_output_tokens", {"max_output_tokens": 1}, ("max_output_tokens", "least", 16)),
    ("max_tokens cannot exceed 4,096", None, {"max_tokens": 5000}, ("max_tokens", "most", 4096)),
    ("Unsupported value: 'temperature' does not support 0.2 with this model. Only the default (1) value is supported.", "temperature", {"temperature": 0.2}, ("temperature", "drop", None)),
    ("Unsupported parameter: 'logit_bias' is not supported.", "logit_bias", {"logit_bias": {"1": 2}}, ("logit_bias", "drop", None)),
    ("Unsupported parameter: 'reasoning.summary' is not supported with this model.", "reasoning.summary", {"reasoning": {"summary": "auto", "effort": "low"}}, ("reasoning.summary", "drop", None)),
    ("Unsupported parameter: 'logit_bias[5]'.", "logit_bias[5]", {"logit_bias": {"5": 2}}, ("logit_bias", "drop", None)),
    # nothing that would change what is asked for, nothing that is not there, nothing that would not help
    ("Unsupported parameter: 'tools' is not supported with this model.", "tools", {"tools": []}, None),
    ("Unsupported parameter: 'response_format' is not supported with this model.", "response_format", {"response_format": {}}, None),
    ("Unsupported parameter: 'seed'.", "seed", {"top_p": 1}, None),
    ("temperature must be at most 2", None, {"temperature": 1}, None),
    ("temperature must be at most 2", None, {"temperature": "5"}, None),
    ("temperature must be at most 2", None, {"temperature": True}, None),
    ("messages[0].content is required", "messages[0]", {"temperature": 1}, None),
]


@pytest.mark.parametrize(("words", "param", "sent", "cure"), CURES)
def test_the_least_edit_that_a_refusal_asks_for(words: str, param: str | None, sent: Json, cure: Any) -> None:
    found = ac.find_cure(judged(words, param), sent)
    assert (found and (found.field, found.how, found.to)) == cure and (found is None or found.value is None)


def test_a_refused_word_is_left_out_alone_and_other_words_pass() -> None:
    failure = judged("Unsupported value: 'reasoning_effort' does not support 'banana' with this model. Supported values are: 'low' and 'high'.", "reasoning_effort")
    cure = ac.find_cure(failure, {"reasoning_effort": "banana"})
    assert cure is not None and (cure.how, cure.value) == ("drop", '"banana"')
    assert ac.edit_body({"reasoning_effort": "banana"}, ac.Edits((), (cure,))) == ({}, ("reasoning_effort",))
    assert ac.edit_body({"reasoning_effort": "low"}, ac.Edits((), (cure,))) == ({"reasoning_effort": "low"}, ())


def test_what_other_failures_say_cures_nothing() -> None:
    assert ac.find_cure(judged("Unsupported parameter: 'seed'.", "seed", 500), {"seed": 1}) is None


@pytest.mark.parametrize(("words", "window"), [
    ("This model's maximum context length is 8192 tokens. However, your messages resulted in 9000 tokens.", 8192),
    ("prompt is too long: 210000 tokens > 200000 maximum", 200000),
    ("The input token count (1200000) exceeds the maximum number of tokens allowed (1048576).", 1048576),
    ("This model's maximum prompt length is 131072 but the request contains 140000 tokens.", 131072),
    ("prompt token count of 70000 exceeds the limit of 64000", 64000),
    ("Range of input length should be [1, 129024]", 129024),
    ("the request exceeds the available context size (4096 tokens), try increasing it", 4096),
    ("Invalid request: Your request exceeded model token limit: 131072", 131072),
    ("input length and `max_tokens` exceed context limit: 188240 + 21333 > 200000, decrease input length or `max_tokens` and try again", 200000),
    ("Input length (265330) exceeds model's maximum context length (262144).", 262144),
    ("context_length_exceeded", None),
    ("prompt too long; exceeded max context length by 1119046 tokens (ref: 96164522-08b2-4cbf-886e-e5a38961a688)", None),
    ("maximum context length is 7 tokens", None),
])
def test_the_window_that_an_overflow_tells(words: str, window: int | None) -> None:
    assert ac.told_window(words) == window


@pytest.mark.parametrize(("words", "sent", "room"), [
    ("This model's maximum context length is 8192 tokens. However, you requested 9000 tokens (1000 in the messages, 8000 in the completion).", {"max_tokens": 8000}, 7192),
    ("'max_tokens' or 'max_completion_tokens' is too large: 100000. This model's maximum context length is 32768 tokens and your request has 2000 input tokens", {"max_completion_tokens": 100000}, 30768),
    ("input length and `max_tokens` exceed context limit: 188240 + 21333 > 200000, decrease input length", {"max_tokens": 21333}, 11760),
    ("This model's maximum context length is 8192 tokens. However, you requested 16000 tokens (8100 in the messages, 7900 in the completion).", {"max_tokens": 7900}, None),
    ("This model's maximum context length is 8192 tokens. However, you requested 9000 tokens (1000 in the messages, 8000 in the completion).", {}, None),
    ("prompt is too long: 210000 tokens > 200000 maximum", {"max_tokens": 9}, None),
])
def test_a_shorter_answer_that_fits(words: str, sent: Json, room: int | None) -> None:
    found = ac.find_shrink(judged(words), sent)
    assert (found and found.to) == room


SAID = st.lists(st.sampled_from(["max_tokens", "'temperature'", "n", "seed", "is", "not supported", "Unsupported parameter:", "Unsupported value:", "use", "must be", "at most", "between", "and", "<=",
                                 "[", "]", ",", ">", ", which is the maximum", "maximum context length is", "tokens", "in the messages", "range:", "..", "logit_bias[", "a.b.", "\u2264"])
                | st.integers().map(str) | st.floats().map(str) | st.text(max_size=5), max_size=25).map(" ".join)
ANYTHING = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=4),
                        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["a", "b", "summary"]), inner, max_size=2), max_leaves=5)
FIELDS = st.sampled_from(["max_tokens", "max_completion_tokens", "temperature", "n", "seed", "logit_bias", "a", "model"])


@settings(max_examples=400, deadline=None)
@given(SAID, st.none() | FIELDS | st.text(max_size=8), st.dictionaries(FIELDS, ANYTHING, max_size=5), st.sampled_from([400, 413, 422]))
def test_whatever_a_refusal_says_a_cure_changes_one_field_and_never_the_essence(words: str, param: str | None, sent: Json, status: int) -> None:
    failure = judged(words, param, status)
    assert failure.reason in ac.REASONS
    ac.told_window(failure.detail)
    for cure in (ac.find_cure(failure, sent), ac.find_shrink(failure, sent)):
        made, told = ac.edit_body(sent, ac.Edits((), (cure,) if cure else ()))
        assert len(told) == (cure is not None) and made.get("model") == sent.get("model")
        assert all(made.get(name) == value for name, value in sent.items() if not cure or name != cure.field.partition(".")[0])
        assert cure is None or json.loads(json.dumps(ac.repair_row(cure))) == ac.repair_row(cure)


@settings(max_examples=200, deadline=None)
@given(st.fixed_dictionaries({}, optional={"models": ANYTHING, "provider": ANYTHING | st.dictionaries(
    st.sampled_from(["order", "only", "ignore", "allow_fallbacks", "require_parameters", "sort"]), ANYTHING | st.lists(st.sampled_from(["a", "b", "c"])), max_size=4)}))
def test_a_wish_of_any_shape_is_taken_or_refused(body: Json) -> None:
    try:
        rest, wish = ac.take_wish(body)
        if wish is not None:
            ac.choose(catalogue_of({"a": entry("m", keys=["env:KEY_1"])}), None, wish)
            ac.wish_for_openrouter(wish, "a")
        assert not {"models", "provider"} & rest.keys()
    except ac.GatewayError as error:
        assert error.status in (400, 404)


# ------------------------------------------------------------------ edits

def rule(default: Json | None = None, override: Json | None = None, drop: Sequence[str] = ()) -> ac.Edits:
    return ac.Edits((ac.PayloadRule("*", default or {}, override or {}, tuple(drop)),))


@pytest.mark.parametrize(("edits", "body", "made", "told"), [
    (rule(default={"seed": 1}), {}, {"seed": 1}, ("seed=1",)),
    (rule(default={"seed": 1}), {"seed": None}, {"seed": 1}, ("seed=1",)),
    (rule(default={"seed": 1}), {"seed": 2}, {"seed": 2}, ()),
    (rule(override={"seed": 1}), {"seed": 2}, {"seed": 1}, ("seed=1",)),
    (rule(override={"seed": 1}), {"seed": 1}, {"seed": 1}, ()),
    (rule(override={"user": "private"}), {}, {"user": "private"}, ("user=...",)),
    (rule(override={"a.b.c": True}), {"a": {"x": 1}}, {"a": {"x": 1, "b": {"c": True}}}, ("a.b.c=true",)),
    (rule(override={"a.b": 1}), {"a": "text"}, {"a": {"b": 1}}, ("a.b=1",)),
    (rule(default={"a.b": 1}), {"a": {"b": 2}}, {"a": {"b": 2}}, ()),
    (rule(drop=["seed", "none"]), {"seed": 2, "x": 1}, {"x": 1}, ("seed",)),
    (rule(drop=["a.b"]), {"a": {"b": 1, "c": 2}}, {"a": {"c": 2}}, ("a.b",)),
    (rule(drop=["a.b"]), {"a": {"b": 1}}, {}, ("a.b",)),
    (rule(drop=["a.b"]), {"a": [1]}, {"a": [1]}, ()),
    (ac.Edits((), (ac.Repair("a", "rename", "b"),)), {"a": 1}, {"b": 1}, ("a>b",)),
    (ac.Edits((), (ac.Repair("a", "rename", "b"),)), {"a": 1, "b": 2}, {"b": 2}, ("a>b",)),
    (ac.Edits((), (ac.Repair("a", "most", 5),)), {"a": 9}, {"a": 5}, ("a=5",)),
    (ac.Edits((), (ac.Repair("a", "most", 5),)), {"a": 4}, {"a": 4}, ()),
    (ac.Edits((), (ac.Repair("a", "least", 5),)), {"a": 4}, {"a": 5}, ("a=5",)),
    (ac.Edits((), (ac.Repair("a", "drop"),)), {"a": {"x": 1}}, {}, ("a",)),
    (ac.Edits((), (ac.Repair("a", "none"),)), {"a": 1}, {"a": 1}, ()),
])
def test_edits(edits: ac.Edits, body: Json, made: Json, told: tuple[str, ...]) -> None:
    before = json.dumps(body)
    assert ac.edit_body(body, edits) == (made, told) and json.dumps(body) == before


# ------------------------------------------------------------------ what is remembered of refusals

def one_route(state: ac.RoutingState | None = None) -> ac.Route:
    catalogue = catalogue_of({"a": entry("m", "m-old", keys=["env:KEY_1"])})
    return ac.resolve(catalogue, "a/m").groups[0][0][0]


UNKNOWN = judged("Unsupported parameter: 'seed'.", "seed")


def test_a_repair_is_remembered_for_seven_days() -> None:
    state, route = ac.RoutingState(), one_route()
    assert ac.learn_repair(state, route, UNKNOWN, {"seed": 1}, 100.0) is not None
    assert [repair.field for repair in ac.repairs_of(state, route, 100.0 + 7 * DAY_S - 1)] == ["seed"] and ac.repairs_of(state, route, 100.0 + 7 * DAY_S) == ()


def test_what_did_not_help_is_not_tried_again() -> None:
    state, route = ac.RoutingState(), one_route()
    assert ac.learn_repair(state, route, UNKNOWN, {"seed": 1}, 0.0) is not None
    assert ac.learn_repair(state, route, UNKNOWN, {}, 0.0) is None and [repair.how for repair in ac.repairs_of(state, route, 0.0)] == ["none"]
    assert ac.learn_repair(state, route, UNKNOWN, {"seed": 1}, 0.0) is None
    assert ac.learn_repair(state, route, UNKNOWN, {"seed": 1}, 7 * DAY_S) is not None


def test_two_names_that_are_refused_in_turn_are_tried_once() -> None:
    state, route = ac.RoutingState(), one_route()
    there, back = judged("Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens'."), judged("Unsupported parameter: 'max_completion_tokens'. Use 'max_tokens'.")
    body, n_learned = {"max_tokens": 5}, 0
    for _ in range(10):
        sent, _ = ac.edit_body(body, ac.Edits((), ac.repairs_of(state, route, 0.0)))
        name = next(iter(sent), "")
        n_learned += ac.learn_repair(state, route, there if name == "max_tokens" else back, sent, 0.0) is not None
    assert n_learned == 1


def test_of_names_that_clients_make_up_nothing_is_remembered() -> None:
    state, catalogue = ac.RoutingState(), catalogue_of({"a": entry("m", keys=["env:KEY_1"])})
    route = ac.resolve(catalogue, "a/made-up").groups[0][0][0]
    assert ac.learn_repair(state, route, UNKNOWN, {"seed": 1}, 0.0) is None and ac.learn_window(state, route, judged("maximum context length is 8192 tokens"), 0.0, shared=False) is None
    assert not state.repairs and not state.windows


def test_repairs_of_one_model_are_bounded() -> None:
    state, route = ac.RoutingState(), one_route()
    for number in range(100):
        ac.learn_repair(state, route, judged(f"Unsupported parameter: 'field_{number}'."), {f"field_{number}": 1}, 0.0)
    assert len(state.repairs[route.keys[2]]) == 16


def test_what_was_learned_survives_and_foreign_rows_are_passed_over() -> None:
    state, route = ac.RoutingState(), one_route()
    ac.learn_repair(state, route, UNKNOWN, {"seed": 1}, 0.0)
    kept = [ac.repair_row(repair) for repair in state.repairs[route.keys[2]]]
    back = ac.RoutingState()
    ac.load_learned(back, {route.keys[2]: kept, "x": [7], "y": [{"odd": 1}]}, {route.keys[2]: [8192, 5.0, True], "x": ["a", 1, 2], "y": [None] * 3, "z": [1]})
    assert back.repairs == state.repairs and back.windows == {route.keys[2]: ac.ContextWindow(8192, 5.0, True)}


# ------------------------------------------------------------------ repairs, over the wire

@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(("wrong", "sent", "repaired", "told", "words"), [
    ({"max_tokens": 50}, {"max_completion_tokens": 50}, "max_tokens", "max_tokens>max_completion_tokens", "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."),
    ({"max_tokens": 9000}, {"max_tokens": 4096}, "", "max_tokens=4096", "max_tokens is too large: 9000. This model supports at most 4096 completion tokens."),
    ({"seed": 5}, {}, "seed", "seed", "Unsupported parameter: 'seed'."),
])
def test_a_refused_field_is_repaired_once_and_remembered(build: Build, provider: Provider, streamed: bool, wrong: Json, sent: Json, repaired: str, told: str, words: str) -> None:
    bad = next(iter(wrong))
    house = build(a=refusing(lambda body: body.get(bad) == wrong[bad], refusal(words, bad)), b=healthy())
    for _ in range(3):
        reply = house.chat("a/m", stream=streamed, **wrong)
        assert reply.status == 200 and reply.text == TEXT and dropped(reply) == [told]
    bodies = [request.json for request in provider.calls("a")]
    assert len(bodies) == 4 and bodies[0].items() >= wrong.items() and all(body.items() >= sent.items() and repaired not in body for body in bodies[1:])
    assert provider.calls("b") == [] and not house.gateway.relay.state.cooling
    assert [line for line in house.lines if "repair." in line][0].partition(" req=")[0] == "WARNING repair.learned"


@pytest.mark.parametrize("wire", FORMATS)
@pytest.mark.parametrize("client", FORMATS)
def test_repairs_are_the_same_where_a_request_is_translated(build: Build, provider: Provider, client: str, wire: str) -> None:
    told = Telling(wire)
    steps = stream(told.begin(), told.say("one"), told.end())
    house = build(a=lambda request: refusal("Unsupported parameter: 'top_p' is not supported with this model.", "top_p") if "top_p" in request.json else steps, entries={"a": {"format": wire}})
    for _ in range(2):
        reply = house.post(PATHS[client], ask(client, "a/m", top_p=0.5))
        assert read_stream(client, reply).text == "one" and "top_p" in dropped(reply)
    assert ["top_p" in request.json for request in provider.calls("a")] == [True, False, False]


@pytest.mark.parametrize("older", [False, True])
def test_a_repair_outlives_a_restart(build: Build, provider: Provider, older: bool) -> None:
    house = build(a=refusing(lambda body: "seed" in body, refusal("Unsupported parameter: 'seed'.", "seed")))
    assert house.chat("a/m", seed=1).text == TEXT
    house.settle()
    assert house.usage.flush(10.0)
    if older:                       # as a version left it that kept such rows in a table of their own; every start opens the database first
        assert ac.rollback(house.database) == "joined" and rows_of(house.database, "SELECT kind, key FROM learned") == [("repairs", "model a:m")]
        ac.open_database(house.database).close()
    again = house.do(lambda: ac.Gateway(house.gateway.config, house.keys, house.usage, ac.real_world()))
    assert [repair.field for repair in again.relay.state.repairs["model a:m"]] == ["seed"]


def test_several_refused_fields_are_repaired_one_by_one(build: Build, provider: Provider) -> None:
    def play(request: Request) -> Sequence[Any]:
        bad = next((name for name in ("seed", "logit_bias", "user") if name in request.json), None)
        return refusal(f"Unsupported parameter: '{bad}'.", bad) if bad else healthy()(request)
    house = build(a=play)
    assert house.chat("a/m", seed=1, logit_bias={}, user="u").text == TEXT
    assert house.chat("a/m", seed=1, user="u").text == TEXT
    assert len(provider.calls("a")) == 5


@pytest.mark.parametrize(("steps", "more"), [
    (refusal("Invalid 'messages[0].content': expected a string.", "messages[0].content"), {}),
    (refusal("Unsupported parameter: 'tools'.", "tools"), {"tools": [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}]}),
    (refusal("Unsupported parameter: 'seed'.", "seed"), {"seed": 1}),
    (refusal("Invalid 'temperature': decimal above maximum value. Expected a value <= 1.", "temperature"), {"temperature": 2}),
    (refusal("Field required", None, status=422), {}),
])
def test_a_malformed_request_costs_one_call_and_cools_nothing(build: Build, provider: Provider, steps: list[Any], more: Json) -> None:
    """100 times; a repair that does not help is tried once."""
    house = build(a=steps, b=healthy())
    replies = [house.chat("a/m", **more) for _ in range(100)]
    assert {reply.status for reply in replies} <= {400, 422} and all(reply.error for reply in replies)
    repaired = bool(more.keys() & {"seed", "temperature"})         # a request is not the same without its tools
    assert len(provider.calls("a")) == 100 + repaired and provider.calls("b") == [] and not house.gateway.relay.state.cooling


# ------------------------------------------------------------------ withdrawn models

def gone(model: str) -> list[Any]:
    return refusal(f"The model `{model}` has been decommissioned and is no longer supported.", None, "model_decommissioned")


def test_a_withdrawn_model_is_out_alone_and_the_nearest_is_named(build: Build, provider: Provider) -> None:
    models = ["kimi-k2-old", "kimi-k2-new", "other"]
    house = build(a=lambda request: gone(request.json["model"]) if request.json["model"] == "kimi-k2-old" else healthy()(request),
                  entries={"a": {"models": models, "default": "kimi-k2-old", "keys": ["env:FAKE_KEY"]}}, carousel={"fallback": "none"})
    first, second = house.chat("a/kimi-k2-old"), house.chat("a/kimi-k2-old")
    for reply in (first, second):
        assert reply.status == 404 and reply.error["code"] == "model_not_found" and "kimi-k2-new" in reply.error["message"] and "has been decommissioned" in reply.error["message"], reply.raw
    assert house.chat("a/kimi-k2-new").text == TEXT and len(provider.calls("a")) == 2
    assert list(house.gateway.relay.state.cooling) == ["model a:kimi-k2-old"] and house.gateway.relay.state.cooling["model a:kimi-k2-old"].proven
    assert any("kimi-k2-new" in line for line in house.lines if "attempt.failed" in line)


def test_a_withdrawn_model_leads_on_where_requests_may_fall_back(build: Build, provider: Provider) -> None:
    house = build(a=gone("m"), b=healthy())
    assert house.chat("a/m").text == TEXT and house.chat("a/m").text == TEXT
    assert len(provider.calls("a")) == 1 and len(provider.calls("b")) == 2


# ------------------------------------------------------------------ too long, no eyes, no hands

WORDS = "The quick brown fox jumps over the lazy dog. "
LONG = WORDS * 1000         # some 10,000 tokens


def windows(**sizes: int | None) -> dict[str, Json]:
    """Entries whose model holds so much."""
    return {name: {"models": [{"id": "m", **({"context": size} if size else {})}]} for name, size in sizes.items()}


def say(text: str) -> list[Json]:
    return [{"role": "user", "content": text}]


def test_a_long_request_goes_where_it_fits(build: Build, provider: Provider) -> None:
    house = build(a=healthy(), b=healthy(), c=healthy(), entries=windows(a=4096, b=None, c=65536), carousel={"strategy": "priority"})
    for _ in range(3):
        reply = house.chat(messages=say(LONG))
        assert reply.text == TEXT and reply.headers["x-aicarousel-provider"] == "b" and reply.headers["x-aicarousel-attempts"] == "1"
    assert house.chat().headers["x-aicarousel-provider"] == "a"
    assert len(provider.calls("a")) == 1


@pytest.mark.parametrize("client", FORMATS)
def test_a_request_too_long_for_all_is_told_in_the_clients_words(build: Build, provider: Provider, client: str) -> None:
    house = build(a=healthy(), b=healthy(), entries=windows(a=4096, b=2048))
    reply = house.post(PATHS[client], ask(client, "aicarousel", LONG, stream=False))
    error = reply.json["error"]
    assert reply.status == 400 and error["type"] == "invalid_request_error" and provider.calls("a") == provider.calls("b") == []
    if client == "messages":
        assert error["message"].startswith("prompt is too long: ") and "maximum" in error["message"]
    else:
        assert error["code"] == "context_length_exceeded" and "maximum context length is" in error["message"]


OVERFLOW = refusal("This model's maximum context length is 4096 tokens. However, your messages resulted in 9000 tokens.", "messages", "context_length_exceeded")


def test_an_overflow_goes_on_to_a_larger_window_once_and_is_learned(build: Build, provider: Provider) -> None:
    house = build(a=refusing(lambda body: len(body["messages"][0]["content"]) > 20000, OVERFLOW), b=healthy(), c=healthy(), entries=windows(a=None, b=2048, c=65536),
                  carousel={"strategy": "priority"})
    first, second = house.chat(messages=say(LONG)), house.chat(messages=say(LONG))
    assert (first.headers["x-aicarousel-provider"], first.headers["x-aicarousel-attempts"]) == ("c", "2")
    assert (second.headers["x-aicarousel-provider"], second.headers["x-aicarousel-attempts"]) == ("c", "1")
    assert len(provider.calls("a")) == 1 and provider.calls("b") == [] and list(house.gateway.relay.state.windows) == ["model a:m"]
    assert not house.gateway.relay.state.cooling


def test_an_overflow_is_not_shown_to_every_model_of_unknown_size(build: Build, provider: Provider) -> None:
    silent = refusal("context_length_exceeded", None, "context_length_exceeded")
    house = build(a=silent, b=silent, c=silent, d=silent)
    reply = house.chat(messages=say("Hi"))
    assert reply.status == 400 and reply.error["code"] == "context_length_exceeded"
    assert [len(provider.calls(name)) for name in "abcd"] == [1, 1, 0, 0]


def test_a_messages_client_hears_an_overflow_in_its_own_words(build: Build) -> None:
    house = build(a=OVERFLOW)
    reply = house.post(PATHS["messages"], ask("messages", "a/m", "Hi", stream=False))
    assert reply.status == 400 and reply.json["error"]["message"] == "prompt is too long: 9000 tokens > 4096 maximum"
    house = build(b=refusal("prompt too long; exceeded max context length by 1119046 tokens (ref: 96164522-08b2)"))
    assert house.post(PATHS["messages"], ask("messages", "b/m", "Hi", stream=False)).json["error"]["message"].startswith("prompt is too long: 1")


def test_an_answer_is_made_shorter_where_nothing_larger_is_left(build: Build, provider: Provider) -> None:
    words = "This model's maximum context length is 8192 tokens. However, you requested 9000 tokens (1000 in the messages, 8000 in the completion)."
    house = build(a=in_turn(refusal(words, "messages", "context_length_exceeded"), healthy(), healthy(), healthy()))
    reply = house.chat("a/m", max_tokens=8000)
    assert reply.text == TEXT and dropped(reply) == ["max_tokens=7192"] and not house.gateway.relay.state.repairs
    assert [request.json["max_tokens"] for request in provider.calls("a")] == [8000, 7192]
    for wanted, least, most in ((1000, 1000, 1000), (8192, 8100, 8191)):       # from now on it is known that the prompt takes from the answer
        assert house.chat("a/m", max_tokens=wanted).text == TEXT
        assert least <= provider.calls("a")[-1].json["max_tokens"] <= most
    assert len(provider.calls("a")) == 4


LARGE = "Request too large for model `m` in organization `org_1` on tokens per minute (TPM): Limit 8000, Requested {}, please reduce your message size and try again."


@pytest.mark.parametrize("client", ["chat", "messages"])
def test_a_minute_is_not_asked_for_by_one_request_where_its_cap_counts(build: Build, provider: Provider, client: str) -> None:
    """Groq counts what a request names for its answer. Claude Code's 32,000 would fit no minute of a free plan: a modest part of it is asked for, and told."""
    house = build(a=healthy(), entries={"a": {"preset": "groq"}})
    for wanted, asked in ((32_000, 4096), (300, 300)):
        reply = house.post(PATHS[client], {**ask(client, "a/m"), "max_tokens": wanted})
        sent = provider.calls("a")[-1].json
        assert reply.status == 200 and sent.get("max_completion_tokens", sent.get("max_tokens")) == asked
        assert any("tokens=4096" in part for part in dropped(reply)) == (wanted > asked)


def test_that_caps_count_is_learned_and_the_next_request_asks_for_less_at_once(build: Build, provider: Provider) -> None:
    house = build(a=in_turn(refusal(LARGE.format(32_040), status=413), healthy(), healthy()))
    for _ in range(2):
        assert house.chat("a/m", max_tokens=32_000).text == TEXT and provider.calls("a")[-1].json["max_tokens"] == 4096
    assert len(provider.calls("a")) == 3 and not house.gateway.relay.state.cooling


def test_an_answer_made_shorter_in_vain_ends_in_the_overflow(build: Build, provider: Provider) -> None:
    words = "This model's maximum context length is 8192 tokens. However, you requested 9000 tokens (1000 in the messages, 8000 in the completion)."
    house = build(a=refusal(words, "messages", "context_length_exceeded"))
    reply = house.chat("a/m", max_tokens=8000)
    assert reply.status == 400 and reply.error["code"] == "context_length_exceeded" and len(provider.calls("a")) == 2


def picture(*texts: str) -> list[Json]:
    return [{"role": "user", "content": [*({"type": "text", "text": text} for text in texts), {"type": "image_url", "image_url": {"url": PIXEL}}]}]


def can(**flags: bool) -> Json:
    return {"models": [{"id": "m", **flags}]}


def test_an_image_goes_to_a_model_with_eyes_and_nothing_is_sent_to_the_others(build: Build, provider: Provider) -> None:
    house = build(a=healthy(), b=healthy(), entries={"a": can(vision=False), "b": can(vision=True)}, carousel={"strategy": "priority"})
    reply = house.chat(messages=picture("What is this?"))
    assert (reply.headers["x-aicarousel-provider"], reply.headers["x-aicarousel-attempts"]) == ("b", "1") and provider.calls("a") == []
    seen_before = [*picture("Look"), {"role": "assistant", "content": "A dot."}, *say("Thanks. Write a poem on image formats.")]
    assert house.chat(messages=seen_before).headers["x-aicarousel-provider"] == "a"


def test_no_eyes_anywhere(build: Build) -> None:
    house = build(a=healthy(), b=healthy(), entries={"a": can(vision=False), "b": can(vision=True)}, carousel={"fallback": "none"})
    reply = house.chat("a/m", messages=picture("What is this?"))
    assert reply.status == 400 and reply.error["code"] == "unsupported" and "a/m reads no images; b/m does" in reply.error["message"]
    assert reply.headers["x-aicarousel-attempts"] == "0" and "attempts" not in reply.error


@pytest.mark.parametrize("client", FORMATS)
def test_tools_go_to_a_model_with_hands(build: Build, provider: Provider, client: str) -> None:
    house = build(a=healthy(), b=healthy(), entries={"a": can(tools=False), "b": can(tools=True)}, carousel={"strategy": "priority"})
    assert house.post(PATHS[client], ask(client, "aicarousel")).headers["x-aicarousel-provider"] == "b" and provider.calls("a") == []
    none = {"type": "none"} if client == "messages" else "none"
    assert house.post(PATHS[client], ask(client, "aicarousel", tool_choice=none)).headers["x-aicarousel-provider"] == "a"
    alone = house.post(PATHS[client], ask(client, "a/m", stream=False), headers={"x-aicarousel-no-fallback": "1"})
    assert alone.status == 400 and "a/m calls no tools" in alone.json["error"]["message"]


def test_what_was_passed_over_and_changed_is_kept_to_be_told(build: Build) -> None:
    house = build(a=healthy(), b=healthy(), entries={"a": can(tools=False), "b": {"rules": [{"override": {"seed": 1}}]}}, carousel={"strategy": "priority"})
    settled: list[ac.Settled] = []
    house.gateway.relay.settle = settled.append
    assert house.post(PATHS["chat"], ask("chat", "aicarousel")).status == 200
    house.settle()
    assert settled[0].plan is not None and [(route.id, why) for route, why in settled[0].plan.skipped] == [("a/1:m", "no_tools")] and [attempt.changed for attempt in settled[0].attempts] == [("seed=1",)]


def test_a_request_that_cannot_be_read_is_not_measured() -> None:
    route = ac.resolve(catalogue_of({"a": entry({"id": "m", "context": 300, "vision": False}, keys=["env:KEY_1"])}), "a").groups[0][0][0]

    def read(body: Json) -> Json:
        raise ac.bad_request("odd")
    assert ac.misfit(route, ac.Needs(b"image" * 1000, {}, {}, 0.0, read, lambda model: 1.0)) == ""


def needs(body: Json, **more: Any) -> ac.Needs:
    """What a Chat request needs; counting its tokens fails the test."""
    raw = json.dumps(body).encode()

    def read(body: Json) -> Json:
        raise AssertionError("read when nothing made it matter")
    return ac.Needs(raw, body, {}, 0.0, read, lambda model: 1.0, **more)


def test_plain_requests_are_neither_read_nor_counted() -> None:
    catalogue = catalogue_of({"a": entry({"id": "m", "context": 8192, "vision": False, "tools": False}, keys=["env:KEY_1"])})
    route = ac.resolve(catalogue, "a").groups[0][0][0]
    assert ac.misfit(route, needs(chat_body("a/m"))) == "" and ac.misfit(route, needs({**chat_body("a/m"), "tools": [{}]})) == "no_tools"


def test_a_window_that_was_learned_is_believed_for_seven_days() -> None:
    state, route = ac.RoutingState(), one_route()
    assert ac.learn_window(state, route, judged("This model's maximum context length is 8192 tokens."), 100.0, shared=False) == (8192, 100.0 + 7 * DAY_S, False)
    for utc, window in ((100.0 + 7 * DAY_S - 1, 8192), (100.0 + 7 * DAY_S, None)):
        assert ac.Needs(b"", {}, state.windows, utc, dict, lambda model: 1.0).window(route) == window


def test_text_to_complete_is_measured_and_texts_for_vectors_are_not(build: Build, provider: Provider) -> None:
    """Each of many texts to embed has the window to itself."""
    vectors = answer({"object": "list", "data": [{"object": "embedding", "index": 0, "embedding": [0.5]}], "model": "m", "usage": {"prompt_tokens": 1, "total_tokens": 1}})
    house = build(a=vectors, entries=windows(a=2048))
    reply = house.post("/v1/completions", {"model": "a/m", "prompt": LONG})
    assert reply.status == 400 and reply.error["code"] == "context_length_exceeded" and provider.calls("a") == []
    assert house.post("/v1/embeddings", {"model": "a/m", "input": [WORDS] * 1000}).status == 200
    tokens = house.post("/v1/completions", {"model": "a/m", "prompt": list(range(5000))})       # nobody here can read these
    assert tokens.status == 400 and tokens.error["code"] == "unsupported"


# ------------------------------------------------------------------ what a request wishes

HOUSE = {"groq": entry("g", "both", keys=["env:KEY_1"]), "cerebras": entry("c", "both", keys=["env:KEY_2"]), "openrouter": entry("o", "both", keys=["env:KEY_3"])}


@pytest.mark.parametrize(("name", "wish", "routes"), [
    (None, {"models": ["cerebras/c", "groq/g"]}, "cerebras/c groq/g"),
    ("aicarousel", {"models": "cerebras/c, groq/g"}, "cerebras/c groq/g"),
    ("openrouter/o", {"models": ["cerebras/c"]}, "openrouter/o cerebras/c"),
    ("nowhere", {"models": ["cerebras/c"]}, "cerebras/c"),
    ("groq/g", {"models": ["nowhere"]}, "groq/g"),
    ("nowhere", {"models": ["nowhere-either"]}, "groq/g groq/both cerebras/c cerebras/both openrouter/o openrouter/both"),
    (None, {"models": []}, "groq/g groq/both cerebras/c cerebras/both openrouter/o openrouter/both"),
    (None, {"provider": None}, "groq/g groq/both cerebras/c cerebras/both openrouter/o openrouter/both"),
    ("both", {"provider": {"order": ["cerebras"]}}, "cerebras/both groq/both openrouter/both"),
    ("both", {"provider": {"order": ["OpenRouter", "groq"]}}, "openrouter/both groq/both cerebras/both"),
    ("both", {"provider": {"order": ["cerebras"], "allow_fallbacks": False}}, "cerebras/both"),
    ("both", {"provider": {"only": ["groq", "cerebras"]}}, "groq/both cerebras/both"),
    ("both", {"provider": {"ignore": ["groq"]}}, "cerebras/both openrouter/both"),
    ("both", {"provider": {"only": ["anthropic"]}}, "openrouter/both"),             # not ours: OpenRouter's own
    ("both", {"provider": {"only": ["groq", "anthropic"], "ignore": ["openrouter"]}}, "groq/both"),
    (None, {"provider": {"only": ["cerebras"]}}, "cerebras/c cerebras/both"),
    ("groq/b*", {}, "groq/both"),
    ("groq/*", {}, "groq/g groq/both"),
])
def test_where_a_wish_leads(name: str | None, wish: Json, routes: str) -> None:
    catalogue = catalogue_of(HOUSE)
    _, taken = ac.take_wish(wish)
    found = ac.resolve(catalogue, name) if taken is None else ac.choose(catalogue, name, taken)[1]
    assert shown(route for group in found.groups for each in group for route in each) == routes


@pytest.mark.parametrize(("name", "wish"), [("groq/g", {"only": ["cerebras"]}), ("groq/g", {"ignore": ["groq"]}), (None, {"only": ["groq"], "ignore": ["groq"]})])
def test_nothing_is_left_of_a_wish(name: str | None, wish: Json) -> None:
    with pytest.raises(ac.GatewayError) as caught:
        ac.choose(catalogue_of(HOUSE), name, ac.take_wish({"provider": wish})[1])
    assert (caught.value.status, caught.value.code) == (404, "no_allowed_provider")


def test_a_glob_that_covers_no_model() -> None:
    with pytest.raises(ac.GatewayError) as caught:
        ac.resolve(catalogue_of(HOUSE), "groq/x*")
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")


BAD_WISHES: list[tuple[Json, str]] = [
    ({"models": 5}, "models"), ({"models": {}}, "models"), ({"models": [1]}, "models"), ({"models": [""]}, "models"), ({"models": ""}, "models"), ({"models": "a,,b"}, "models"),
    ({"models": ["a"] * 51}, "models"), ({"provider": []}, "provider"), ({"provider": "groq"}, "provider"), ({"provider": {"order": "groq"}}, "provider.order"),
    ({"provider": {"only": [None]}}, "provider.only"), ({"provider": {"ignore": {}}}, "provider.ignore"), ({"provider": {"allow_fallbacks": "no"}}, "provider.allow_fallbacks"),
    ({"provider": {"require_parameters": 1}}, "provider.require_parameters"),
]


@pytest.mark.parametrize("client", FORMATS)
def test_wishes_of_the_wrong_shape_are_refused_in_the_clients_format(build: Build, provider: Provider, client: str) -> None:
    house = build(a=healthy())
    for wish, where in BAD_WISHES:
        reply = house.post(PATHS[client], {**ask(client, "aicarousel"), **wish})
        assert reply.status == 400 and where in reply.json["error"]["message"], (wish, reply.raw)
        assert reply.json["error"].get("param", where) == where and (client == "messages") == (reply.json.get("type") == "error")
    assert provider.calls("a") == []


@pytest.mark.parametrize("client", FORMATS)
def test_models_of_a_request_are_tried_in_order_and_no_other(build: Build, provider: Provider, client: str) -> None:
    oops = answer({"error": {"message": "Oops."}}, 500)
    house = build(a=oops, b=oops, c=healthy(), d=healthy(), carousel={"strategy": "priority"})
    reply = house.post(PATHS[client], {**ask(client, "aicarousel"), "models": ["b/m", "c/m"]})
    assert reply.headers["x-aicarousel-provider"] == "c" and [len(provider.calls(name)) for name in "abcd"] == [0, 1, 1, 0]
    assert house.post(PATHS[client], {**ask(client, "aicarousel"), "models": ["a/m", "b/m"]}).status >= 500
    assert provider.calls("d") == [] and not any({"models", "provider"} & request.json.keys() for name in "abc" for request in provider.calls(name))


def test_the_provider_object_is_honoured_and_only_openrouter_gets_it(build: Build, provider: Provider) -> None:
    house = build(a=healthy(), openrouter=healthy(), entries={"openrouter": {"preset": "openrouter"}}, carousel={"strategy": "priority"})
    wish = {"order": ["openrouter", "deepinfra"], "data_collection": "deny"}
    assert house.chat(provider=wish).headers["x-aicarousel-provider"] == "openrouter"
    assert provider.calls("openrouter")[0].json["provider"] == {"order": ["deepinfra"], "data_collection": "deny"}
    assert house.chat(provider={"only": ["a"]}).headers["x-aicarousel-provider"] == "a" and "provider" not in provider.calls("a")[0].json
    assert house.chat(provider={"only": ["nobody"], "ignore": ["openrouter"]}).status == 404
    translated = house.post(PATHS["messages"], {**ask("messages", "openrouter/m", stream=False), "provider": {"data_collection": "deny"}})
    assert translated.status == 200 and provider.calls("openrouter")[-1].json["provider"] == {"data_collection": "deny"}


def test_no_fallbacks_beyond_the_first_provider(build: Build, provider: Provider) -> None:
    house = build(a=answer({"error": {"message": "Oops."}}, 500), b=healthy(), carousel={"strategy": "priority"})
    assert house.chat(provider={"allow_fallbacks": False}).status >= 500 and provider.calls("b") == []
    assert house.chat(provider={"allow_fallbacks": True}).text == TEXT


def test_required_parameters_keep_providers_out_that_refuse_them(build: Build, provider: Provider) -> None:
    house = build(a=healthy(), b=healthy(), entries={"a": {"preset": "groq"}}, carousel={"strategy": "priority"})
    assert house.chat(logit_bias={}, provider={"require_parameters": True}).headers["x-aicarousel-provider"] == "b"
    assert house.chat(logit_bias={}).headers["x-aicarousel-provider"] == "a"
    alone = house.chat("a/m", logit_bias={}, provider={"require_parameters": True, "only": ["a"]})
    assert alone.status == 400 and "does not take every field" in alone.error["message"]


def test_wishes_in_a_count_of_tokens(build: Build) -> None:
    body = {"model": "a/m", "messages": [{"role": "user", "content": "Hi"}], "provider": {"only": ["a"]}}
    house = build(a=healthy())
    assert house.post("/v1/messages/count_tokens", body).json["input_tokens"] > 0
    assert house.post("/v1/messages/count_tokens", {**body, "models": 1}).status == 400
    assert house.post("/v1/messages/count_tokens", {**body, "provider": {"ignore": ["a"]}}).status == 404


def test_tokens_are_counted_where_the_request_would_be_sent(build: Build, provider: Provider) -> None:
    entries = {"a": {"preset": "anthropic", "format": "messages", **can(context=600)}, "b": {"preset": "anthropic", "format": "messages"}}
    house = build(a=answer({"input_tokens": 1}), b=answer({"input_tokens": 2}), entries=entries, carousel={"strategy": "priority"})
    for words, n_tokens in (("Hi", 1), ("many words " * 2000, 2)):
        assert house.post("/v1/messages/count_tokens", {"model": "aicarousel", "messages": [{"role": "user", "content": words}]}).json["input_tokens"] == n_tokens
    assert len(provider.calls("a")) == len(provider.calls("b")) == 1


SOUND = {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}
PAPER = {"type": "file", "file": {"filename": "a.pdf", "file_data": "data:application/pdf;base64,JVBERi0="}}


HEARD = {"messages": [{"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "JVBERi0="}}], "responses": [{"type": "input_file", "filename": "a.pdf", "file_data": "data:application/pdf;base64,JVBERi0="}],
         "chat": [SOUND, PAPER]}


@pytest.mark.parametrize("part", [SOUND, PAPER], ids=["sound", "a paper"])
def test_sound_and_papers_go_on_to_where_they_are_taken(build: Build, provider: Provider, part: Json) -> None:
    """A model of which nothing is known says so itself: that leads on and is held against nobody. Sound has no form in Messages: nothing is sent there."""
    refusal = answer({"error": {"message": f"This model does not support {'audio' if part is SOUND else 'image'} input.", "type": "invalid_request_error"}}, 400)
    more = {"m": healthy()} if part is SOUND else {}
    house = build(**more, a=refusal, b=healthy(), entries={"m": {"format": "messages"}} if more else {}, carousel={"strategy": "priority"})
    reply = house.chat(stream=False, messages=[{"role": "user", "content": [{"type": "text", "text": "What is this?"}, part]}])
    assert (reply.status, reply.headers["x-aicarousel-provider"]) == (200, "b") and provider.calls("m") == [] and len(provider.calls("a")) == 1
    assert provider.calls("b")[0].json["messages"][0]["content"][1] == part and not house.gateway.relay.state.cooling


def asked_of(client: str, part: Json, *, later: bool) -> Json:
    """A request that holds a part, in its last turn or in the one before."""
    told = {"type": "input_text" if client == "responses" else "text", "text": "What is this?"}
    turns = [{"role": "user", "content": [told, part]}, *([{"role": "assistant", "content": "A page."}, {"role": "user", "content": "Go on with application/pdf, please."}] if later else [])]
    return {"model": "aicarousel", "stream": False, "input" if client == "responses" else "messages": turns, **({"max_tokens": 50} if client == "messages" else {})}


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize(("client", "part"), [(client, part) for client, parts in HEARD.items() for part in parts])
def test_who_is_known_to_take_no_sound_or_papers_is_not_asked(build: Build, provider: Provider, client: str, part: Json, later: bool) -> None:
    word = "audio" if part is SOUND else "pdf"
    house = build(a=healthy(), b=healthy(), c=healthy(), entries={"a": can(vision=False), "b": can(vision=True, **{word: False}), "c": can(vision=False, **{word: True})}, carousel={"strategy": "priority"})
    reply = house.post(PATHS[client], asked_of(client, part, later=later))
    assert (reply.status, reply.headers["x-aicarousel-provider"], reply.headers["x-aicarousel-attempts"]) == (200, "c", "1") and not provider.calls("a") and not provider.calls("b")
    alone = house.post(PATHS[client], {**asked_of(client, part, later=later), "model": "a/m"}, headers={"x-aicarousel-no-fallback": "1"})
    told = alone.json["error"]
    assert alone.status == 400 and f"a/m {'takes no audio' if part is SOUND else 'reads no PDFs'}; c/m does" in told["message"] and not provider.calls("a")
    words = {**asked_of(client, {"type": "input_text" if client == "responses" else "text", "text": "input_audio, application/pdf and \"input_audio\""}, later=later)}
    assert house.post(PATHS[client], words).headers["x-aicarousel-provider"] == "a", "to speak of them is no hindrance"


def test_openrouter_reads_papers_for_any_model(build: Build, provider: Provider) -> None:
    house = build(a=healthy(), entries={"a": {"preset": "openrouter", **can(vision=False)}})
    assert house.chat("a/m", messages=[{"role": "user", "content": [PAPER]}]).status == 200
    assert house.chat("a/m", messages=[{"role": "user", "content": [SOUND]}]).status == 400 and len(provider.calls("a")) == 1


# ------------------------------------------------------------------ payload rules

@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("client", FORMATS)
def test_payload_rules_hold_for_passing_and_translated_requests(build: Build, provider: Provider, client: str, streamed: bool) -> None:
    rules = [{"models": "m*", "default": {"top_p": 0.5}, "override": {"temperature": 0.25, "chat_template_kwargs.enable_thinking": False}, "drop": ["user"]},
             {"models": "other", "override": {"seed": 1}}]
    house = build(a=healthy(), entries={"a": {"rules": rules}})
    for more, top_p in (({}, 0.5), ({"top_p": 0.75}, 0.75)):
        reply = house.post(PATHS[client], ask(client, "a/m", stream=streamed, temperature=1, **more))
        sent = provider.calls("a")[-1].json
        assert reply.status == 200 and sent["temperature"] == 0.25 and sent["top_p"] == top_p and sent["chat_template_kwargs"] == {"enable_thinking": False}
        assert "seed" not in sent and {"temperature=0.25", "chat_template_kwargs.enable_thinking=false"} <= set(dropped(reply)) and ("top_p=0.5" in dropped(reply)) == (not more)
    assert "user" in dropped(house.chat("a/m", user="ann")) and "user" not in provider.calls("a")[-1].json


def test_rules_are_no_part_of_embeddings(build: Build, provider: Provider) -> None:
    vectors = answer({"object": "list", "data": [{"object": "embedding", "index": 0, "embedding": [0.5]}], "model": "m", "usage": {"prompt_tokens": 1, "total_tokens": 1}})
    house = build(a=vectors, entries={"a": {"rules": [{"override": {"temperature": 0}}]}})
    assert house.post("/v1/embeddings", {"model": "a/m", "input": "Hi"}).status == 200 and provider.calls("a")[0].json == {"model": "m", "input": "Hi"}


def test_without_rules_a_passing_request_keeps_its_bytes(build: Build, provider: Provider) -> None:
    house = build(a=healthy(), entries={"a": {"rules": [{"models": "other", "override": {"seed": 1}}]}})
    raw = b'{ "messages" : [{"content":"Hi", "role":"user"}],  "model" : "a/m" }'
    assert house.post(PATHS["chat"], raw).text == TEXT
    assert provider.calls("a")[0].body == raw.replace(b"a/m", b"m")


# ------------------------------------------------------------------ models that no key may use

def test_a_model_that_every_key_excludes_is_neither_listed_nor_asked(build: Build, provider: Provider) -> None:
    keys = [{"key": "env:FAKE_KEY", "excludedModels": ["*-preview"]}]
    house = build(a=healthy(), entries={"a": {"models": ["m", "m-preview", "m-2"], "keys": keys}}, carousel={"fallback": "none"})
    assert [row["id"] for row in house.get("/v1/models").json["data"]] == ["aicarousel", "a/m", "a/m-2"]
    assert house.chat("a/m-preview").status >= 400 and provider.calls("a") == [] and house.chat("a/m-2").text == TEXT


# ------------------------------------------------------------------ refused for what it says

BLOCKED = refusal("The response was filtered due to the prompt triggering our content management policy.", "prompt", "content_filter")


def test_a_policys_refusal_is_final_unless_configured_otherwise(build: Build, provider: Provider) -> None:
    carousel = {"strategy": "priority"}
    assert build(a=BLOCKED, b=healthy(), carousel=carousel).chat().status == 400 and provider.calls("b") == []
    assert build(c=BLOCKED, d=healthy(), carousel={**carousel, "contentFallback": True}).chat().text == TEXT
    oops = answer({"error": {"message": "Oops."}}, 500)
    assert build(g=BLOCKED, h=oops, carousel={**carousel, "contentFallback": True}).chat().error["code"] == "content_filter"
    everywhere = build(e=BLOCKED, f=BLOCKED, carousel={**carousel, "contentFallback": True}).chat()
    assert everywhere.status == 400 and everywhere.error["code"] == "content_filter"
