"""A stream that broke off inside its text and is gone on with: the client's text is the exact answer, or an exact beginning of it and an error event.

Scripted models that continue exactly, begin anew, refuse, or say the end once more are cut at every character of a 2,000-character answer with
repetitions and other scripts, first the seam alone, then through the streams of all three formats; then the whole over real sockets.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from typing import Any

import pytest

import aicarousel
from dialects import FORMATS, PATHS, Seen, Telling, ask, read_events, read_stream
from fakes import DONE, FINISH, ROLE, USAGE, Chunk, Close, End, Pause, Provider, Reply, Request, Reset, answer, chat_answer, chat_chunk, content, frame, opened, stream
from house import House, entry

Build = Callable[..., House]

WORDS = ("bread street window early quarrel morning cellar lemon stranger copper letter quiet garden harbour winter ledger candle Maria and of the a in with under before "
         "naturally sometimes seldom caf\u00e9 na\u00efve \u00dcbung \u4e16\u754c \u043c\u0438\u0440 \U0001f600 3.50 1924 (sic) \"well\" don't").split()
DICE = random.Random(5)
PROSE = [" ".join(DICE.choices(WORDS, k=DICE.randint(4, 12))).capitalize() + DICE.choice([". ", "! ", "? ", ";\n", ".\n\n", ": "]) for _ in range(60)]
#: 2,000 characters: prose, other scripts, an emoji, the same sentence twice, laughter, a table, code, camel case, blank lines, no end mark.
ANSWER = (("The caf\u00e9 on the corner opened in 1924. Its owner, a tall woman called Ilse, had left \u00dcr\u00fcmqi the year before. She said: \"Sure, I can bake.\" "
           "And bake she did. And bake she did. \u65e5\u672c\u306e\u5ba2\u3082\u6765\u307e\u3057\u305f\u3002\u0414\u0430, \u0438 \u0438\u0437 \u041c\u043e\u0441\u043a\u0432\u044b. \U0001f370 ha ha ha ha ha ha ha ha! "
           "\n\n| day | sold |\n| --- | --- |\n| Mon | 11 |\n| Tue | 11 |\n| Wed | 1111 |\n\n```python\nfor item in items:\n    total += item.price\n    total += item.price\n"
           "getElementById = lambda name: name\n```\n\nRow, row, row your boat, gently down the stream. Merrily, merrily, merrily, merrily, life is but a dream.\n\n"
           "The bakery had had a second door; that that door led nowhere puzzled many. \u0628\u0633\u0645 \u0627\u0644\u0644\u0647. Naive  spacing  and\ttabs\u00a0too. ") + "".join(PROSE))[:2000]
assert len(ANSWER) == 2000

#: What a model says when it is given the answer up to a place: a function of that beginning and of the whole answer.
Model = Callable[[str, str], str]


def last_sentence(text: str) -> str:
    return re.split(r"(?<=[.!?|\n\u3002])\s*(?=.)", text)[-1] or text


MODELS: dict[str, Model] = {
    "continues": lambda begun, whole: whole[len(begun):],
    "begins anew": lambda begun, whole: whole,
    "begins anew on a new line": lambda begun, whole: "\n\n" + whole,
    "begins anew behind a preamble": lambda begun, whole: "Here is the whole answer once more:\n\n" + whole,
    "begins anew without the marks": lambda begun, whole: whole.replace("\"", "").replace("|", " "),
    "refuses": lambda begun, whole: "I'm sorry, but I can't continue that text.",
    "prefaces": lambda begun, whole: "Sure, continuing from where I left off: " + whole[len(begun):],
    "says the last sentence again": lambda begun, whole: last_sentence(begun) + whole[len(begun):],
    "says the last word again": lambda begun, whole: (re.findall(r"\S+", begun) or [""])[-1] + whole[len(begun):],
    "says the last letter again": lambda begun, whole: begun[-1:] + whole[len(begun):],
    "says the last 300 letters again": lambda begun, whole: begun[-300:] + whole[len(begun):],
    "says the last sentence again behind a blank": lambda begun, whole: " " + last_sentence(begun).lstrip() + whole[len(begun):],
    "says nothing": lambda begun, whole: "",
}


def seam_at(n_chars: int, how: str = "last", whole: str = ANSWER, writer: Any = None) -> aicarousel.Seam:
    return aicarousel.Seam(writer, whole[:n_chars], how)


# ---------------------------------------------------------------- the seam alone

@pytest.mark.parametrize("name", MODELS)
def test_every_cut_is_joined_exactly_or_not_at_all(name: str) -> None:
    joined = 0
    for at in range(1, len(ANSWER)):
        seam = seam_at(at)
        if not aicarousel.can_go_on({"turns": []}, seam.text):
            continue
        said = MODELS[name](seam.text.rstrip(), ANSWER)
        for judged in ({200, 207, 500} if at % 50 == 0 else {203}):
            rest, why = aicarousel.judge_continuation(seam, said[:judged])
            assert bool(rest) is not bool(why), (at, rest, why)
            if rest:
                assert seam.text + rest + said[judged:] == ANSWER, f"{name} at {at}: {seam.text[-30:]!r} + {rest[:30]!r}"
                joined += 1
    # What no test here can show apart from a model that means what it says twice is refused: that costs a model that continues one cut in ten.
    assert joined > 0.85 * len(ANSWER) if name == "continues" else joined < 0.02 * len(ANSWER), joined


@pytest.mark.parametrize("name", MODELS)
def test_a_provider_that_says_again_what_it_was_given(name: str) -> None:
    """What it was given must come first, whole; behind it the same doubts hold."""
    joined = 0
    for at in range(1, len(ANSWER)):
        seam = seam_at(at, "echo")
        if not aicarousel.can_go_on({"turns": []}, seam.text):
            continue
        given = seam.text.rstrip()
        for said in (given + MODELS[name](given, ANSWER), MODELS[name](given, ANSWER)):
            judged = len(seam.text) + 200
            rest, why = aicarousel.judge_continuation(seam, said[:judged])
            assert bool(rest) is not bool(why)
            if rest:
                # An answer that begins with all that was sent is one whole answer, whether it is this one or another.
                assert seam.text + rest + said[judged:] in (ANSWER, said), f"{name} at {at}"
                joined += 1
    assert joined > 0.85 * len(ANSWER) if name in ("continues", "begins anew") else joined < 0.2 * len(ANSWER), joined


TOLD: dict[str, Model] = {
    "obeys": lambda anchor, rest: anchor + rest,
    "obeys on a new line": lambda anchor, rest: "\n" + anchor + rest,
    "continues at once": lambda anchor, rest: rest,
    "begins anew": lambda anchor, rest: ANSWER,
    "prefaces": lambda anchor, rest: "Sure! " + anchor + rest,
}


@pytest.mark.parametrize("name", TOLD)
def test_a_model_that_is_told_where_to_begin_must_begin_there(name: str) -> None:
    joined = 0
    for at in range(1, len(ANSWER)):
        seam = seam_at(at, "told")
        hub = {"turns": [{"role": "user", "parts": [aicarousel.text_part("Tell.")]}], "model": "m", "stream": True, "dropped": [], "extra": {}, "client": "chat"}
        if not aicarousel.can_go_on(hub, seam.text):
            continue
        try:
            body, _ = aicarousel.continuation_request(hub, seam, aicarousel.profile_for("groq", "m"))
        except aicarousel.UpstreamFailure as failure:
            assert failure.reason == "no_seam"
            continue
        told = body["messages"]
        assert [message["role"] for message in told] == ["user", "assistant", "user"] and told[1]["content"] == seam.text.rstrip()
        anchor = told[2]["content"].rpartition("directly behind them:\n")[2]
        assert anchor and seam.text.rstrip().endswith(anchor) and seam.text.count(anchor) == 1
        rest, why = aicarousel.judge_continuation(seam, TOLD[name](anchor, ANSWER[len(seam.text.rstrip()):]))
        assert bool(rest) is not bool(why)
        if rest:
            assert seam.text + rest == ANSWER, f"{name} at {at}"
            joined += 1
    assert joined > 400 if name.startswith("obeys") else True


@pytest.mark.parametrize("text,hub", [
    ("", {}), (" \n", {}), ("half a pair \ud83d", {}), ('{"a": "b', {"format": {"kind": "json"}}), ('{"a": "b', {"format": {"kind": "schema"}}), ("so far", {"meta": {"logprobs": True}}),
    ("so far ST", {"stop": ["x", "STOP"]}), ("so far", {"turns": [{"role": "user"}, {"role": "assistant"}]})])
def test_what_has_no_exact_continuation_is_not_asked_for(text: str, hub: dict[str, Any]) -> None:
    assert not aicarousel.can_go_on({"turns": [], **hub}, text)
    assert aicarousel.can_go_on({"turns": [{"role": "user"}], "stop": ["STOP"], "format": {"kind": "text"}}, "so far")


# ---------------------------------------------------------------- requests

ROUTES = {  # preset, format, model -> what marks the request
    ("mistral", "chat", "mistral-small-latest"): lambda body: body["messages"][-1].get("prefix") is True,
    ("deepseek", "chat", "deepseek-flash"): lambda body: body["messages"][-1].get("prefix") is True,
    ("moonshot", "chat", "kimi-k3"): lambda body: body["messages"][-1].get("partial") is True,
    ("qwen", "chat", "qwen-max"): lambda body: body["messages"][-1].get("partial") is True,
    ("vllm", "chat", "m"): lambda body: body["continue_final_message"] is True and body["add_generation_prompt"] is False,
    ("llamacpp", "chat", "m"): lambda body: body["continue_final_message"] is True and body["chat_template_kwargs"] == {"enable_thinking": False},
    ("anthropic", "messages", "claude-haiku-4-5"): lambda body: True,
}


def way(preset: str, wire: str, model: str, policy: str, base_url: str | None = None) -> str:
    known = aicarousel.PRESETS.get(preset, aicarousel.CUSTOM_PRESET)
    provider = aicarousel.Provider("p", known, known.base_url if base_url is None else base_url, wire, model, True, (), ())     # type: ignore[arg-type]
    return aicarousel.way_on(provider, aicarousel.Model(model), policy)


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route[0])
@pytest.mark.parametrize("client", FORMATS)
def test_the_request_for_the_rest(route: tuple[str, str, str], client: str) -> None:
    preset, wire, model = route
    how = way(*route, "safe")
    assert how and way(*route, "force") == how and way(*route, "off") == ""
    body = {**ask(client, "m"), **{"responses": {"max_output_tokens": 500}, "chat": {"max_tokens": 500}, "messages": {"max_tokens": 500, "thinking": {"type": "enabled", "budget_tokens": 1024}}}[client]}
    hub = aicarousel.FORMATS[client].read_request(aicarousel.FORMATS[client].check(body))
    made, _ = aicarousel.continuation_request(hub, seam_at(400, how), aicarousel.profile_for(preset, model, wire))   # type: ignore[arg-type]
    last = made["messages"][-1]
    assert last["role"] == "assistant" and last["content"] == ANSWER[:400].rstrip() and ROUTES[route](made)
    assert (made.get("max_tokens") or made["max_completion_tokens"]) == 400 and made.get("thinking", {}).get("type") != "enabled"
    assert hub["turns"][-1]["role"] == "user", "the request itself stays as it was"


def test_routes_that_do_not_continue_are_not_asked_unless_told() -> None:
    for route in (("groq", "chat", "m"), ("anthropic", "messages", "claude-haiku-5-5"), ("openrouter", "messages", "anthropic/claude-haiku-4.5"), ("deepseek", "messages", "deepseek-flash"),
                  ("openai", "responses", "gpt-6-luna"), ("nobody", "chat", "m")):
        assert way(*route, "safe") == "" and way(*route, "force") == "told", route
    assert way("deepseek", "chat", "deepseek-flash", "safe", "https://proxy.example/v1") == "", "only its own address has the way that goes on"


# ---------------------------------------------------------------- the streams of all three formats

def cut_pieces(text: str, size: int) -> list[str]:
    return [text[start:start + size] for start in range(0, len(text), size)]


def half(client: str, text: str, size: int = 50, thinking: str = "") -> bytes:
    """A stream that broke off behind `text`, as a provider of that format sends it."""
    told = Telling(client)
    return b"".join([*told.begin(), *(told.think(thinking) if thinking else []), *told.half_say(*cut_pieces(text, size))])


ASKED = {client: aicarousel.Asked(aicarousel.FORMATS[client].read_request(aicarousel.FORMATS[client].check(ask(client, "m"))), "seed", 1790000000) for client in FORMATS}


def rest_of(wire: str, text: str, size: int = 50) -> bytes:
    told = Telling(wire)
    return b"".join([*told.begin(), *told.say(*cut_pieces(text, size)), *told.end()])


def go_on(client: str, sent: bytes, wire: str, model: Model, whole: str = ANSWER, raw: Callable[[str, str], bytes] = rest_of) -> tuple[bytes, str]:
    """(the client's stream in the end, why it was not gone on with)."""
    found = aicarousel.FORMATS[client].take_up(sent, ASKED[client])        # type: ignore[misc]
    if found is None or not aicarousel.can_go_on({"turns": []}, found[1]):
        return sent, "no text"
    seam = aicarousel.Seam(*found, "last")
    carrier = aicarousel.Translation(aicarousel.FORMATS[wire].reader(aicarousel.Source()), aicarousel.SeamWriter(seam, "resumed"), n_prompt_tokens=1)      # type: ignore[misc]
    try:
        out = carrier.feed(raw(wire, model(seam.text.rstrip(), whole))) + carrier.close()
    except aicarousel.UpstreamFailure as failure:
        return sent, failure.detail
    return (sent + out, "") if carrier.done else (sent, carrier.broken)


def events_of(raw: bytes) -> tuple[list[Any], bool]:
    data = [aicarousel.read_frame(one).data for one in aicarousel.split_frames(raw)]
    return [json.loads(one) for one in data if one and one != "[DONE]"], "[DONE]" in data


def seen_in(client: str, raw: bytes) -> Seen:
    """The whole stream read strictly: one id, one model, one block and item, numbers without gaps, and the ends of all that was opened."""
    events, done = events_of(raw)
    seen = read_events(client, events, done)
    if client == "chat":
        assert {(event["id"], event["model"], event["created"], event["object"]) for event in events} == {("chatcmpl-1", "m", 1790000000, "chat.completion.chunk")}
    if client == "messages":
        kinds = [event["type"] for event in events if event["type"] != "ping"]
        assert kinds.count("message_start") == 1 and kinds[-2:] == ["message_delta", "message_stop"]
        starts, stops = [[event["index"] for event in events if event["type"] == f"content_block_{kind}"] for kind in ("start", "stop")]
        assert starts == stops == list(range(len(starts)))
        assert {event["index"] for event in events if event.get("delta", {}).get("type") == "text_delta"} == {len(starts) - 1 if not seen.calls else starts[-1 - len(seen.calls)]}
    if client == "responses":
        assert {event["response"]["id"] for event in events if "response" in event} == {"resp_1"}
        items = [event["item"] for event in events if event["type"] == "response.output_item.done"]
        assert events[-1]["response"]["output"] == items and len({item["id"] for item in items}) == len(items)
        [message] = [item for item in items if item["type"] == "message"]
        assert message["content"][0]["text"] == seen.text and message["id"] in {event["item_id"] for event in events if event["type"] == "response.output_text.delta"}
        assert len({event["item_id"] for event in events if event["type"] == "response.output_text.delta"}) == 1
    return seen


@pytest.mark.parametrize("client", FORMATS)
def test_every_cut_through_the_streams(client: str) -> None:
    """The model that continues at every character, the others at some; the rest comes from providers of all formats by turns."""
    joined, wires = 0, list(FORMATS)
    for at in range(1, len(ANSWER)):
        names = MODELS if at % 197 == 0 else ["continues"]
        for name in names:
            raw, why = go_on(client, half(client, ANSWER[:at], 400), wires[at % 3], MODELS[name], raw=lambda wire, text: rest_of(wire, text, 400))
            if why:
                assert raw == half(client, ANSWER[:at], 400)
                continue
            assert b"\n\n: resumed\n\n" in raw or b": resumed\n\n" in raw
            if at % 10 == 0 or name != "continues":
                seen = seen_in(client, raw)
                assert seen.text == ANSWER and seen.ended in ("stop", "end_turn", "completed") and not seen.errors, (name, at)
            else:
                assert read_events(client, *events_of(raw)).text == ANSWER, at
            joined += name == "continues"
    assert joined > 0.85 * len(ANSWER)


@pytest.mark.parametrize("client", FORMATS)
def test_cut_at_every_byte_of_the_stream(client: str) -> None:
    """Through the passage that the relay uses, so that what the client has got is what left it."""
    whole = "And bake she did: caf\u00e9, \u65e5\u672c, ha ha ha ha, that that is it."
    told = Telling(client)
    raw = b"".join([*told.begin(), *told.think("Hm, hm."), *told.say(*cut_pieces(whole, 7)), *told.end()])
    outcomes = {"joined": 0, "not": 0}
    for at in range(0, len(raw), 1 if client == "chat" else 7):
        passage = aicarousel.HeldPassage(aicarousel.FORMATS[client].passage(wants_usage=False))     # type: ignore[misc]
        sent = passage.feed(raw[:at]) + passage.close()
        if passage.done:
            continue
        got = read_events(client, *events_of(sent)).text if sent else ""
        assert whole.startswith(got)
        out, why = go_on(client, sent, FORMATS[at % 3], MODELS["continues"], whole)
        outcomes["not" if why else "joined"] += 1
        if not why:
            seen = seen_in(client, out)
            assert (seen.text, seen.thinking) == (whole, "Hm, hm."), at
        else:
            assert out == sent
    assert outcomes["joined"] > 100 < outcomes["not"]


@pytest.mark.parametrize("client", FORMATS)
@pytest.mark.parametrize("what", ["call", "thinking alone", "behind the text", "second text", "whole"])
def test_what_broke_off_elsewhere_is_not_taken_up(client: str, what: str) -> None:
    told = Telling(client)
    raw = b"".join({
        "call": [*told.begin(), *told.half_say("One."), *told.half_call("add", '{"a"')],
        "thinking alone": [*told.begin(), *told.think("Hm.")],
        "behind the text": [*told.begin(), *told.say("One."), *([] if client != "chat" else [frame(chat_chunk({}, "stop"))])],
        "second text": [*told.begin(), *told.say("One."), *(told.half_say("Two.") if client != "chat" else [frame(chat_chunk({"reasoning_content": "Hm."}))])],
        "whole": [*told.begin(), *told.say("One."), *told.end()],
    }[what])
    assert aicarousel.FORMATS[client].take_up(raw.replace(b"data: [DONE]\n\n", b""), ASKED[client]) is None      # type: ignore[misc]


def mutated(value: Any, dice: random.Random) -> Any:
    """The value with one thing in it of another kind."""
    if isinstance(value, dict) and value and dice.random() < 0.9:
        name = dice.choice(sorted(value))
        return {**value, name: mutated(value[name], dice)}
    if isinstance(value, list) and value and dice.random() < 0.8:
        return [mutated(value[0], dice), *value[1:]]
    return dice.choice([None, 7, -1, "x", "", [], {}, [7], {"text": 7}, True, 1.5])


@pytest.mark.parametrize("client", FORMATS)
def test_events_of_any_shape_are_taken_up_or_not(client: str) -> None:
    """What a passage lets through may be odd in every field; it is never more than not taken up."""
    events, _ = events_of(half(client, ANSWER[:60], 20, "Hm."))
    taken = 0
    for seed in range(600):
        dice = random.Random(seed)
        odd = list(events)
        place = dice.randrange(len(odd))
        odd[place] = mutated(odd[place], dice)
        sent = b"".join(frame(event) for event in odd if isinstance(event, dict))
        found = aicarousel.FORMATS[client].take_up(sent, ASKED[client])      # type: ignore[misc]
        if found is not None:
            taken += 1
            assert isinstance(found[1], str) and aicarousel.split_frames(b"".join(found[0].feed(aicarousel.text_delta("more"))))
    assert 20 < taken < 580


@pytest.mark.parametrize("text", ["<think>Hm", "So. <think>"])
def test_thinking_inside_the_text_is_not_taken_up(text: str) -> None:
    assert aicarousel.chat_take_up(half("chat", text), ASKED["chat"]) is None


@pytest.mark.parametrize("client", FORMATS)
@pytest.mark.parametrize("wire", FORMATS)
def test_a_call_behind_the_rest_and_thinking_before_it(client: str, wire: str) -> None:
    def raw(wire: str, text: str) -> bytes:
        told = Telling(wire)
        return b"".join([*told.begin(), *told.think("Where was I?"), *told.say(text), *told.call("add", '{"a": 1}'), *told.end()])
    out, why = go_on(client, half(client, ANSWER[:80], thinking="First."), wire, lambda begun, whole: whole[len(begun):120], raw=raw)
    seen = seen_in(client, out)
    assert (why, seen.text, seen.thinking, seen.whole) == ("", ANSWER[:120], "First.", [["add", '{"a": 1}']])
    assert seen.ended in ("tool_calls", "tool_use", "completed")


@pytest.mark.parametrize("what", ["call", "refusal", "nothing"])
def test_an_answer_that_has_no_text_is_no_rest(what: str) -> None:
    def raw(wire: str, text: str) -> bytes:
        told = Telling(wire)
        said = {"call": told.call("add", "{}"), "refusal": [frame(chat_chunk({"refusal": "I will not."}))], "nothing": told.think("Hm.")}[what]
        return b"".join([*told.begin(), *said, *told.end()])
    sent = half("chat", ANSWER[:80])
    assert go_on("chat", sent, "chat", MODELS["continues"], raw=raw)[0] == sent


# ---------------------------------------------------------------- over real sockets

TEXT = "The bakery opened at dawn, and the whole street smelled of bread. Nobody who walked past it went on without a roll."
AT = TEXT.index(" smelled")
PRESETS = {"chat": {"preset": "vllm"}, "messages": {"preset": "anthropic", "format": "messages", "default": "claude-haiku-4-5", "models": ["claude-haiku-4-5"]}}
DEATHS: dict[str, list[Any]] = {"closed": [Close()], "reset": [Reset()], "ended early": [End(), Close()], "garbage": [Chunk(b"data: {nonsense\n\n"), End()],
                                "stall": [Pause("stall"), Close()]}


def dying(wire: str, *steps: Any, text: str = TEXT[:AT]) -> list[Any]:
    """Says the beginning and dies."""
    told = Telling(wire)
    return opened(*told.begin(), *told.half_say(*cut_pieces(text, 9)), Pause("said"), *(steps or (Close(),)))


def continuing(wire: str, model: Model = MODELS["continues"], *steps: Any, whole: str = TEXT) -> Callable[[Request], list[Any]]:
    """A model that is given the beginning and says what `model` makes of it; else the whole."""
    def play(request: Request) -> list[Any]:
        last = request.json["messages"][-1]
        begun = last["content"] if isinstance(last["content"], str) else last["content"][0]["text"]
        told = Telling(wire)
        return stream(*told.begin(), *steps, *told.say(*cut_pieces(model(begun, whole) if last["role"] == "assistant" else whole, 11)), *told.end())
    return play


def street(build: Build, wire: str = "chat", rest: Any = None, to: str = "chat", death: list[Any] | None = None, carousel: dict[str, Any] | None = None, a: Any = None) -> House:
    """A provider a that dies inside its text, and b that can go on."""
    return build(a=a or dying(wire, *(death or ())), b=rest or continuing(to), carousel={"aliases": {"both": ["a", "b"]}, **(carousel or {})},
                 entries={"a": {"format": wire, "timeouts": {"idle": 20}}, "b": PRESETS[to]})


def play(house: House, provider: Provider, client: str, *, seconds: float = 0.0) -> Reply:
    """Asks, and lets a die once all that it said has arrived."""
    with house.connect() as connection:
        connection.send(house.request_bytes("POST", PATHS[client], ask(client, "both")))
        provider.wait_paused("said")
        connection.read_until(cut_pieces(TEXT[:AT], 9)[-1].encode())
        provider.release("said")
        if seconds:
            provider.wait_paused("stall")
            house.pass_time(seconds)
        return connection.read_all()


@pytest.mark.parametrize("client,wire,to", [("chat", "chat", "chat"), ("messages", "messages", "messages"), ("responses", "responses", "chat"), ("messages", "chat", "chat"),
                                            ("responses", "chat", "messages"), ("chat", "messages", "chat"), ("chat", "chat", "messages"), ("responses", "messages", "messages")])
def test_the_client_sees_one_answer(build: Build, provider: Provider, client: str, wire: str, to: str) -> None:
    house = street(build, wire, to=to)
    reply = play(house, provider, client)
    assert reply.complete and reply.body.count(b": resumed by b/") == 1
    seen = read_stream(client, reply)
    assert (seen.text, seen.errors) == (TEXT, []) and seen.ended in ("stop", "end_turn", "completed")
    [request] = provider.calls("b")
    assert request.json["messages"][-1]["role"] == "assistant" and request.json["stream"] is True
    [row] = house.wait_rows(1)
    assert (row["outcome"], row["attempts"], row["estimated"]) == ("ok", 2, 1) and row["route"].startswith("b/") and row["output"] >= 7 + len(TEXT[:AT]) // 4
    house.wait_line("resume.done")
    lines = aicarousel.explain_lines(house.gateway.decisions[-1])
    assert any("a/1" in line and "cut" in line for line in lines) and any(f"goes on after {AT} characters" in line for line in lines)
    assert house.cooling("a") and not house.cooling("b")


@pytest.mark.parametrize("death", DEATHS)
def test_however_it_broke_off(build: Build, provider: Provider, death: str) -> None:
    house = street(build, death=DEATHS[death])
    reply = play(house, provider, "chat", seconds=21.0 if death == "stall" else 0.0)
    assert reply.text == TEXT and reply.done and reply.finish == "stop"


@pytest.mark.parametrize("client", FORMATS)
@pytest.mark.parametrize("name", [name for name in MODELS if name != "continues"])
def test_what_does_not_go_on_ends_in_the_error_event(build: Build, provider: Provider, client: str, name: str) -> None:
    house = street(build, client, rest=continuing("chat", MODELS[name]))
    reply = play(house, provider, client)
    seen = read_stream(client, reply)
    assert reply.complete and (seen.text, seen.ended, seen.after_error, len(seen.errors)) == (TEXT[:AT], "", 0, 1)
    assert len(provider.calls("b")) == 1 and not house.cooling("b") or name == "says nothing"
    [row] = house.wait_rows(1)
    assert row["outcome"] == "error"


@pytest.mark.parametrize("what", ["off", "no route", "no preset", "long", "choices", "json", "max attempts", "thinking"])
def test_when_nobody_is_asked(build: Build, provider: Provider, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    carousel: dict[str, Any] = {"off": {"resume": "off"}, "max attempts": {"maxAttempts": 1}, "no route": {"aliases": {"both": ["a"]}, "fallback": "none"}}.get(what, {})
    told = Telling("chat")
    a = opened(*told.begin(), *told.think(TEXT[:AT]), Pause("said"), Close()) if what == "thinking" else None
    house = street(build, carousel=carousel, a=a)
    if what == "no preset":
        house.reconfigure({**house.models, "b": {**house.models["b"], "preset": "groq"}})
    if what == "long":
        monkeypatch.setattr(aicarousel, "_RESUME_BYTES", 500)
    fields = {"choices": {"n": 2}, "json": {"response_format": {"type": "json_object"}}}.get(what, {})
    if what == "choices":
        provider.scripts["a"] = opened(frame({**chat_chunk({"content": TEXT[:AT]}), "choices": [{"index": 0, "delta": {"content": TEXT[:AT]}}, {"index": 1, "delta": {"content": "Other."}}]}), Close())
    provider.release("said")
    reply = house.chat("both", stream=True, **fields)
    assert reply.error and not reply.done and TEXT.startswith(reply.text.removesuffix("Other."))
    assert provider.calls("b") == [] and house.wait_rows(1)[0]["attempts"] == 1


def test_nothing_is_kept_where_no_provider_goes_on(build: Build) -> None:
    house = build(a=dying("chat"), b=continuing("chat"))
    assert house.gateway.relay.resuming == frozenset()
    for policy, names in (("safe", {"b"}), ("force", {"a", "b"}), ("off", set())):
        house.reconfigure({**house.models, "b": {**house.models["b"], "preset": "mistral"}, "carousel": {"resume": policy}})
        assert house.gateway.relay.resuming == names


def test_a_client_that_leaves_while_the_rest_is_waited_for(build: Build, provider: Provider) -> None:
    house = street(build, rest=[Pause("rest"), *continuing_at(AT)])
    provider.release("said")
    with house.connect() as connection:
        connection.send(house.request_bytes("POST", PATHS["chat"], ask("chat", "both")))
        provider.wait_paused("rest")
    assert provider.wait_closed(provider.links("b")[0], 1.0)
    [row] = house.wait_rows(1)
    assert (row["outcome"], row["attempts"]) == ("client_closed", 2) and row["output"] >= AT // 4


def test_a_request_that_only_its_own_format_understands(build: Build, provider: Provider) -> None:
    """What cannot be asked of the next route ends in the error event of the one that broke off."""
    house = street(build)
    provider.release("said")
    reply = house.post("/v1/chat/completions", {"model": "both", "stream": True, "messages": [{"role": "user", "content": [{"type": "hologram", "hologram": "x"}]}]})
    assert reply.text == TEXT[:AT] and reply.error and reply.error["code"] == "upstream_failed" and [row["provider"] for row in reply.error["attempts"]] == ["a"]
    assert not reply.done and provider.calls("b") == []


def test_the_route_that_broke_off_goes_on_itself(build: Build, provider: Provider) -> None:
    provider.release("said")
    def a(request: Request) -> list[Any]:
        return continuing("chat", lambda begun, whole: whole)(request) if request.json["messages"][-1]["role"] == "assistant" else dying("chat")
    house = build(a=a, entries={"a": {"preset": "mistral"}})
    reply = house.chat("a/m", stream=True)
    assert reply.text == TEXT and reply.done and b": resumed by a/m" in reply.body
    first, second = provider.calls("a")
    assert "idempotency-key" not in second.headers and second.json["messages"][-1]["prefix"] is True


def test_a_route_that_stalled_is_not_asked_again(build: Build, provider: Provider) -> None:
    house = build(a=dying("chat", Pause("stall"), Close()), entries={"a": {"preset": "mistral", "timeouts": {"idle": 20}}}, carousel={"aliases": {"both": ["a"]}})
    reply = play(house, provider, "chat", seconds=21.0)
    assert reply.text == TEXT[:AT] and reply.error and not reply.done and len(provider.calls("a")) == 1


def test_the_route_that_broke_off_counts_against_the_retry_budget(build: Build, provider: Provider) -> None:
    """It is known to fail: something is held against it."""
    provider.release("said")
    def a(request: Request) -> list[Any]:
        return continuing("chat")(request) if request.json["messages"][-1]["role"] == "assistant" else dying("chat")
    house = build(a=a, entries={"a": {"preset": "moonshot"}}, carousel={"limits": {"retryBudget": 0, "retryBudgetLeast": 0}})
    reply = house.chat("a/m", stream=True)
    assert reply.text == TEXT[:AT] and reply.error and len(provider.calls("a")) == 1
    house.reconfigure({**house.models, "carousel": {"limits": {"retryBudget": 0, "retryBudgetLeast": 1}}})
    house.pass_time(20.0)
    assert house.chat("a/m", stream=True).text == TEXT and house.gateway.relay.n_retrying == 0


def test_the_rest_has_what_is_left_of_the_time(build: Build, provider: Provider) -> None:
    house = street(build, "responses", rest=[Pause("rest"), Close()], carousel={"limits": {"requestTotal": 30}})
    provider.release("said")
    with house.connect() as connection:
        connection.send(house.request_bytes("POST", PATHS["responses"], ask("responses", "both")))
        provider.wait_paused("rest")
        for _ in range(4):
            house.pass_time(8.0)
        seen = read_stream("responses", connection.read_all())
    assert seen.text == TEXT[:AT] and len(seen.errors) == 1 and "30 s" in seen.errors[0]["message"] and provider.wait_closed(provider.links("b")[0], 1.0)


def test_a_route_without_room_is_not_asked(build: Build, provider: Provider) -> None:
    """The rest is an attempt like any other: it needs what the limits grant."""
    house = street(build)
    house.reconfigure({**house.models, "b": {**house.models["b"], "limits": {"rpm": 1}}})
    assert house.chat("b/m").text == TEXT
    provider.release("said")
    reply = house.chat("both", stream=True)
    assert reply.text == TEXT[:AT] and reply.error and len(provider.calls("b")) == 1


def test_it_breaks_off_twice(build: Build, provider: Provider) -> None:
    """The second rest begins where the first one ended; each attempt counts."""
    whole = ANSWER[:900]
    provider.release("said")
    def short(request: Request) -> list[Any]:
        begun = request.json["messages"][-1]["content"]
        return opened(*Telling("chat").begin(), *map(content, cut_pieces(whole[len(begun):len(begun) + 301], 10)), Close())
    house = build(a=dying("chat", text=whole[:100]), b=short, c=continuing("chat", whole=whole), entries={name: {"preset": "vllm"} for name in "bc"},
                  carousel={"aliases": {"all": ["a", "b", "c"]}})
    reply = house.chat("all", stream=True)
    assert reply.text == whole and reply.done and reply.body.count(b": resumed by") == 2
    assert house.wait_rows(1)[0]["attempts"] == 3


def test_the_next_route_is_asked_when_one_cannot(build: Build, provider: Provider) -> None:
    provider.release("said")
    house = build(a=dying("chat"), b=answer({"error": {"message": "Slow down."}}, 429), c=continuing("chat"), entries={name: {"preset": "vllm"} for name in "bc"},
                  carousel={"aliases": {"all": ["a", "b", "c"]}})
    assert house.chat("all", stream=True).text == TEXT
    assert [len(provider.calls(name)) for name in "abc"] == [1, 1, 1]


@pytest.mark.parametrize("client", FORMATS)
def test_signs_of_life_while_the_rest_is_waited_for(build: Build, provider: Provider, client: str) -> None:
    house = street(build, client, rest=[Pause("rest"), *continuing_at(AT)])
    with house.connect() as connection:
        connection.send(house.request_bytes("POST", PATHS[client], ask(client, "both")))
        connection.read_until(cut_pieces(TEXT[:AT], 9)[-1].encode())
        provider.release("said")
        provider.wait_paused("rest")
        before = len(house.seen_by(connection))
        house.pass_time(13.0)
        house.wait(lambda: len(house.seen_by(connection)) > before)
        provider.release("rest")
        connection.socket.setblocking(True)
        seen = read_stream(client, connection.read_all())
    assert (seen.text, seen.errors) == (TEXT, []) and seen.ended


@pytest.mark.parametrize("client", FORMATS)
@pytest.mark.parametrize("joined", [False, True])
def test_the_gateway_shuts_down_meanwhile(build: Build, provider: Provider, client: str, joined: bool) -> None:
    """Before the rest has come, and in the middle of it: the error event has its place behind all that went out."""
    long = TEXT + " " + ANSWER[:600]
    told = Telling("chat")
    rest = opened(*told.begin(), *(told.half_say(*cut_pieces(long[AT:AT + 300], 10)) if joined else []), Pause("rest"), Close())
    house = street(build, client, rest=rest)
    provider.release("said")
    with house.connect() as connection:
        connection.send(house.request_bytes("POST", PATHS[client], ask(client, "both")))
        provider.wait_paused("rest")
        if joined:
            connection.read_until(b": resumed by b/m")
        house.settle()
        house.do(lambda: house.server.drain(0.0))
        seen = read_stream(client, connection.read_all())
    assert long.startswith(seen.text) and len(seen.text) >= (AT + 250 if joined else AT) and not seen.ended and not seen.after_error
    assert len(seen.errors) == 1 and "shutting down" in seen.errors[0]["message"]


def continuing_at(at: int) -> list[Any]:
    told = Telling("chat")
    return stream(*told.begin(), *told.say(*cut_pieces(TEXT[len(TEXT[:at].rstrip()):], 11)), *told.end())


def test_a_rest_that_is_not_streamed(build: Build, provider: Provider) -> None:
    house = street(build, rest=answer(chat_answer(TEXT[len(TEXT[:AT].rstrip()):])))
    reply = play(house, provider, "chat")
    assert reply.text == TEXT and reply.done


def test_force_tells_a_model_where_to_begin(build: Build, provider: Provider) -> None:
    def obey(request: Request) -> list[Any]:
        anchor = request.json["messages"][-1]["content"].rpartition("directly behind them:\n")[2]
        return stream(*Telling("chat").begin(), *map(content, cut_pieces(anchor + TEXT[len(TEXT[:AT].rstrip()):], 11)), FINISH, DONE)
    house = street(build, rest=obey, carousel={"resume": "force"})
    house.reconfigure({**house.models, "b": {**house.models["b"], "preset": "groq"}})
    reply = play(house, provider, "chat")
    assert reply.text == TEXT and reply.done


def test_deepseek_goes_on_at_another_address(build: Build, provider: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    url, beta = provider.script("b", continuing("chat")), provider.script("beta", continuing("chat"))
    known = aicarousel.replace(aicarousel.PRESETS["deepseek"], base_url=url, continue_url=beta)
    monkeypatch.setattr(aicarousel, "PRESETS", {**aicarousel.PRESETS, "deepseek": known})
    house = build(a=dying("chat"), carousel={"aliases": {"both": ["a", "b"]}})
    house.reconfigure({**house.models, "b": {**entry(url), "preset": "deepseek"}})
    reply = play(house, provider, "chat")
    assert reply.text == TEXT and [len(provider.calls(name)) for name in ("b", "beta")] == [0, 1]
    assert house.chat("b/m", stream=True).text == TEXT and len(provider.calls("b")) == 1
