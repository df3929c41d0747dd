"""The official openai SDK against the gateway: every recorded Chat exchange played back as a provider, and a few of our own.

The recordings live in ../shared beside the checkout; where they are not, the cases in tests/data/chat/sdk_*.json make the same checks.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

openai = pytest.importorskip("openai", reason="the openai SDK is not installed: python -m pip install openai")
import aicarousel
from fakes import FAKE_KEY, Gateway, Provider, answer, frame, free_port, load_kit, stream
from pydantic import BaseModel

Json = dict[str, Any]
HERE = Path(__file__).resolve().parent
SHARED = HERE.parent.parent / "shared"
ABSENT = f"{SHARED.name}/recordings is not beside this checkout"
CASES = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((HERE / "data" / "chat").glob("sdk_*.json"))]


# ---------------------------------------------------------------- recordings

def read_recordings() -> list[Json]:
    """Every recorded Chat exchange, none when the folder is absent."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(SHARED.glob("recordings/*/chat-*.json"))]
    return [recording for recording in found if recording["format"] == "chat" and recording["endpoint"] == "chat"]


RECORDINGS = read_recordings()
WHOLE = [recording for recording in RECORDINGS if recording["response"]["status"] < 400]
ERRORS = [recording for recording in RECORDINGS if recording["response"]["status"] >= 400]

#: Recordings that are no whole answer, and what the client gets instead: (exception or None, HTTP status, words of the message, why).
SPECIAL: dict[str, tuple[str | None, int | None, str, str]] = {
    "chat-json-text-3a66b809": ("BadRequestError", 400, "Azure Content management policy", "an error inside a 200: its own status says 400"),
    "chat-json-text-f3ff7a71": ("InternalServerError", 502, "empty_answer", "finish_reason stop and nothing said: an empty answer is a failure, another route may do better"),
    "chat-sse-thinking-924ea98e": ("APIError", None, "Tool choice is required", "an error event behind some of the answer: the stream ends in it"),
    "chat-sse-thinking-9a175d06": ("APIError", None, "tool call validation failed", "an error event behind some of the answer: the stream ends in it"),
    "chat-sse-thinking-9c47feac": (None, None, "", "an error behind the finish reason changes nothing that was said, and counts it"),
}

#: What a provider's error status becomes for the client: SDK class, status, code (None: the provider's).
ERROR_RULES: dict[int, tuple[str, int, str | None]] = {
    400: ("BadRequestError", 400, None),
    401: ("InternalServerError", 502, "credential_rejected"),       # it is the gateway's key that was refused, not the client's
    404: ("NotFoundError", 404, "model_not_found"),
    429: ("RateLimitError", 429, "rate_limit_exceeded"),
}


def each(recordings: list[Json]) -> Any:
    """A parameter per recording; one that is skipped, with the reason, when there are none."""
    if recordings:
        return pytest.mark.parametrize("recording", recordings, ids=[f"{recording['id']}-{recording['provider']}" for recording in recordings])
    return pytest.mark.parametrize("recording", [pytest.param({}, marks=pytest.mark.skip(reason=ABSENT), id="absent")])


@dataclass
class Stage:
    """A running gateway with one provider per recording, and what that provider was asked."""
    gateway: Gateway
    replay: Any
    sync: Any
    relaxed: Any
    run: Callable[[Any], Any]

    def asked(self, recording: Json) -> Json:
        """The body that reached the provider last."""
        return next(entry["body"] for entry in reversed(self.replay.log) if entry["id"] == recording["id"])


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory, module_gateway_factory: Callable[..., Gateway]) -> Iterator[Stage]:
    replay = load_kit("replay").Replay({recording["id"]: recording for recording in RECORDINGS})
    base = replay.start_thread(port=free_port())
    home = tmp_path_factory.mktemp("sdk")
    load_kit("check").prepare_aicarousel(RECORDINGS, base, str(home))
    variables = dict(line.split("=", 1) for line in (home / ".env").read_text().split())
    gateway = module_gateway_factory(json.loads((home / "models.json").read_text()), env_file=variables)
    yield from open_stage(gateway, replay)


def open_stage(gateway: Gateway, replay: Any = None) -> Iterator[Stage]:
    """SDK clients of both kinds, the asynchronous one with a loop that outlives its calls."""
    keep = {"base_url": f"{gateway.url}/v1", "api_key": gateway.key, "max_retries": 0, "timeout": 20.0}
    with asyncio.Runner() as runner, openai.OpenAI(**keep) as sync:
        relaxed = openai.AsyncOpenAI(**keep)
        yield Stage(gateway, replay, sync, relaxed, runner.run)
        runner.run(relaxed.close())


# ---------------------------------------------------------------- what the SDK gave

@dataclass
class Summary:
    """An answer in neutral terms."""
    text: str = ""
    calls: list[tuple[str, Any]] = field(default_factory=list)      #: (name, arguments as JSON)
    finish: str | None = None
    usage: tuple[int, int] | None = None


def text_of(content: Any) -> str:
    """The words of a content field: text, or Mistral's list of parts."""
    if not isinstance(content, list):
        return content or ""
    parts = [part if isinstance(part, dict) else part.model_dump() for part in content]
    return "".join(part.get("text") or "" for part in parts if part.get("type") == "text")


def arguments_of(text: Any) -> Any:
    """Arguments as JSON; none at all means no arguments."""
    return text if isinstance(text, dict) else json.loads(text or "{}")


def called_in(call: Any) -> tuple[str, Any]:
    """Name and arguments of a call; the input of a custom tool is text."""
    if call.type == "custom":
        return call.custom.name, load_kit("wire").args_of(call.custom.input)
    return call.function.name, arguments_of(call.function.arguments)


def usage_of(holder: Any) -> tuple[int, int] | None:
    """Tokens in and out; Groq's may stand in x_groq."""
    usage = holder.usage.model_dump() if getattr(holder, "usage", None) else (getattr(holder, "x_groq", None) or {}).get("usage")
    return (usage["prompt_tokens"], usage["completion_tokens"]) if usage else None


def summarise(completion: Any) -> Summary:
    """A completion that came whole."""
    choice = completion.choices[0]
    calls = [called_in(call) for call in choice.message.tool_calls or ()]
    if choice.message.function_call:
        calls.append((choice.message.function_call.name, arguments_of(choice.message.function_call.arguments)))
    return Summary(text_of(choice.message.content) + (choice.message.refusal or ""), calls, choice.finish_reason, usage_of(completion))


def summarise_chunks(chunks: Iterable[Any]) -> Summary:
    """A completion that came in chunks: calls are told apart by index, or by id where there is no index."""
    found, calls = Summary(), {}
    for chunk in chunks:
        found.usage = usage_of(chunk) or found.usage
        for choice in chunk.choices or ():
            if choice.index:
                continue
            delta = choice.delta
            found.text += text_of(delta.content) + (delta.refusal or "")
            for call in delta.tool_calls or ():
                number = call.index if call.index is not None else len(calls) if call.id or not calls else len(calls) - 1
                name, arguments = calls.get(number, ("", ""))
                function = call.function
                more = function.arguments if function and function.arguments is not None else ""
                calls[number] = ((function.name if function else None) or name, more if isinstance(more, dict) else arguments + more)
            found.finish = choice.finish_reason or found.finish
    found.calls = [(name, arguments_of(arguments)) for name, arguments in calls.values()]
    return found


STOPS = {"stop": "stop", "eos": "stop", "length": "length", "tool_calls": "tool", "function_call": "tool", "content_filter": "filter"}


def expected_of(recording: Json) -> Summary:
    """What the conformance kit reads in the recorded bytes."""
    read = load_kit("wire").semantics("chat", recording["response"])
    counts = (read["usage"]["in"], read["usage"]["out"])
    return Summary(read["text"] + read["refusal"], [(call["name"], call["args"]) for call in read["tool_calls"]], read["stop"], None if None in counts else counts)


# ---------------------------------------------------------------- what the SDK is given

PARAMETERS = frozenset(name for name in openai.resources.chat.completions.Completions.create.__annotations__ if name != "return")


def call_of(recording: Json, streamed: bool) -> Json:
    """Arguments of chat.completions.create for a recorded request; what the SDK has no parameter for travels in extra_body."""
    body = dict(recording["request"]["body"] or {})
    body.pop("stream", None)
    options = body.pop("stream_options", None) or {}
    if streamed:
        body["stream_options"] = {**options, "include_usage": True}     # else a usage chunk would rightly be kept from the client
    known = {name: body.pop(name) for name in list(body) if name in PARAMETERS}
    known = {"messages": [{"role": "user", "content": "Hello"}], **known, "model": f"{recording['id'].lower()}/{recording['model'] or 'm'}", "stream": streamed}
    return {**known, **({"extra_body": body} if body else {})}


async def ask_async(client: Any, call: Json) -> tuple[Summary, Any]:
    """One call; the summary, and the exception a stream ended in."""
    answered = await client.chat.completions.create(**call)
    if not call["stream"]:
        return summarise(answered), None
    chunks: list[Any] = []
    failure = None
    try:
        async for chunk in answered:
            chunks.append(chunk)
    except openai.APIError as error:
        failure = error
    return summarise_chunks(chunks), failure


def ask_sync(client: Any, call: Json) -> tuple[Summary, Any]:
    """One call; the summary, and the exception a stream ended in."""
    answered = client.chat.completions.create(**call)
    if not call["stream"]:
        return summarise(answered), None
    chunks: list[Any] = []
    failure = None
    try:
        for chunk in answered:
            chunks.append(chunk)
    except openai.APIError as error:
        failure = error
    return summarise_chunks(chunks), failure


def ask(stage: Stage, call: Json, kind: str) -> tuple[Summary, Any]:
    """One call by the SDK of that kind."""
    return ask_sync(stage.sync, call) if kind == "sync" else stage.run(ask_async(stage.relaxed, call))


def check_same(got: Summary, want: Summary, *, usage: bool = True) -> None:
    assert got.text == want.text
    assert got.calls == want.calls
    assert STOPS.get(got.finish, got.finish) == want.finish
    if usage and want.usage is not None:
        assert got.usage == want.usage


def check_asked(sent: Json, asked: Json, preset: str) -> None:
    """The provider was asked what the client asked: every field but those it is known to refuse."""
    body = {**{name: value for name, value in sent.items() if name != "extra_body"}, **sent.get("extra_body", {})}
    profile = aicarousel.profile_for(preset, asked["model"])
    assert asked["model"] == body.pop("model").split("/", 1)[1]
    assert bool(asked.get("stream")) == body.pop("stream")
    for name, value in body.items():
        target = profile.seed_field if name == "seed" else profile.max_fields[0] if name.startswith("max_") and name not in profile.max_fields else name
        if name in profile.reject or name in aicarousel.ROUTING_FIELDS:
            assert name not in asked
        elif name == "messages":
            roles = ["system" if message["role"] == "developer" and not profile.developer else message["role"] for message in value]
            kept = [{key: item for key, item in message.items() if key not in profile.message_reject} for message in value]
            assert asked["messages"] == [{**message, "role": role} for message, role in zip(kept, roles)]
        elif name == "stream_options":
            assert asked[name] == {**value, "include_usage": True}
        else:
            assert asked[target] == value, name


# ---------------------------------------------------------------- every recording

@pytest.mark.parametrize("kind", ["sync", "async"])
@each([recording for recording in WHOLE if recording["id"] not in SPECIAL])
def test_a_recorded_answer_reaches_the_sdk_whole(stage: Stage, recording: Json, kind: str) -> None:
    call = call_of(recording, recording["stream"])
    got, failure = ask(stage, call, kind)
    assert failure is None
    check_same(got, expected_of(recording))
    check_asked(call, stage.asked(recording), {"alibaba": "qwen", "azure": "openai", "vertex": "gemini"}.get(recording["provider"], recording["provider"]))


@pytest.mark.parametrize("kind", ["sync", "async"])
@each([recording for recording in WHOLE if recording["id"] not in SPECIAL])
def test_the_same_answer_in_the_other_mode(stage: Stage, recording: Json, kind: str) -> None:
    """What was streamed is asked for whole, and the other way round; the replaying provider makes the other form of it."""
    want = expected_of(recording)
    if not want.text and not want.calls:
        return                          # the kit makes the other form from these alone: of thinking and sound nothing is left
    got, failure = ask(stage, call_of(recording, not recording["stream"]), kind)
    assert failure is None
    check_same(got, want, usage=want.usage is not None and 0 not in want.usage)


@pytest.mark.parametrize("kind", ["sync", "async"])
@each([recording for recording in RECORDINGS if recording["id"] in SPECIAL])
def test_what_is_no_whole_answer(stage: Stage, recording: Json, kind: str) -> None:
    name, status, words, why = SPECIAL[recording["id"]]
    call = call_of(recording, recording["stream"])
    if status is not None:
        with pytest.raises(getattr(openai, name)) as raised:
            ask(stage, call, kind)
        assert raised.value.status_code == status and words in raised.value.message, why
        return
    try:
        got, failure = ask(stage, call, kind)
    except openai.InternalServerError as error:     # the error came in one read with what stood before it, so nothing had gone out yet
        assert name == "APIError" and error.status_code == 502 and words in error.message, why
        return
    want = expected_of(recording)
    assert got.text == want.text, why
    if name is None:
        assert failure is None and STOPS[got.finish] == want.finish and got.usage == want.usage, why
    else:
        assert isinstance(failure, getattr(openai, name)) and words in failure.message and got.finish is None, why


@pytest.mark.parametrize("kind", ["sync", "async"])
@each(ERRORS)
def test_a_recorded_error_keeps_its_class_and_words(stage: Stage, recording: Json, kind: str) -> None:
    name, status, code = ERROR_RULES[recording["response"]["status"]]
    error = recording["response"]["body"]["error"]
    with pytest.raises(getattr(openai, name)) as raised:
        ask(stage, call_of(recording, False), kind)
    found = raised.value
    assert found.status_code == status
    assert found.code == code or code is None
    assert found.type == {502: "server_error", 429: "rate_limit_error"}.get(status, "invalid_request_error")
    words = aicarousel.redact((error.get("metadata") or {}).get("raw") or error["message"])
    assert re.split(r"\(?https?://", words)[0].strip()[:60] in found.message
    assert ("retry-after" in found.response.headers) == (status == 429)
    if status != 400 and (status != 404 or kind == "sync"):      # a model that is gone is not asked for again
        assert found.body["attempts"][0]["provider"] == recording["id"].lower()


# ---------------------------------------------------------------- our own cases, with nothing but this checkout

def play_case(case: Json) -> Callable[[Any], Any]:
    """A script that answers a case streamed or whole, as it was asked."""
    frames = [frame(chunk) for chunk in case["chunks"]]
    return lambda request: stream(*frames, frame("[DONE]")) if request.streamed else answer(case["answer"])


@pytest.fixture(scope="module")
def own(module_provider: Provider, module_gateway_factory: Callable[..., Gateway]) -> Iterator[Stage]:
    models = {case["name"]: {**({"preset": case["preset"]} if case["preset"] else {}), "baseUrl": module_provider.script(case["name"], play_case(case)), "default": "m",
                             "enableFallback": False, "models": ["m"], "keys": ["env:CASE_KEY"]} for case in CASES}
    gateway = module_gateway_factory({**models, "carousel": {"fallback": "none", "maxAttempts": 1}}, env_file={"CASE_KEY": FAKE_KEY})
    yield from open_stage(gateway, module_provider)


def wanted(case: Json) -> Summary:
    gives = case["gives"]
    return Summary(gives["text"], [(name, arguments) for name, arguments in gives["calls"]], gives["finish"], tuple(gives["usage"]))


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_a_case_of_our_own(own: Stage, case: Json, streamed: bool, kind: str) -> None:
    request = {name: value for name, value in case["request"].items() if streamed or name != "stream_options"}
    call = {**request, "model": f"{case['name']}/m", "stream": streamed}
    got, failure = ask(own, call, kind)
    assert failure is None
    want = wanted(case)
    asks_usage = not streamed or case["request"].get("stream_options", {}).get("include_usage") or case["usage_in"] != "own chunk"
    check_same(got, want, usage=bool(asks_usage))
    if not asks_usage:
        assert got.usage is None, "the usage chunk that the client did not ask for stays here"
    asked = own.replay.calls(case["name"])[-1].json
    check_asked(call, asked, case["preset"])
    if streamed:
        knows = "stream_options" not in aicarousel.profile_for(case["preset"], "m").reject
        assert asked.get("stream_options", {}).get("include_usage", False) is knows, "usage is asked for wherever that is understood"


class Weather(BaseModel):
    """What the structured case answers."""
    city: str
    degrees: int


def test_parse_gives_an_object_for_a_json_schema(own: Stage) -> None:
    done = own.sync.chat.completions.parse(model="schema/m", messages=[{"role": "user", "content": "Weather in Paris?"}], response_format=Weather)
    assert done.choices[0].message.parsed == Weather(city="Paris", degrees=21)
    sent = own.replay.calls("schema")[-1].json["response_format"]
    assert sent["type"] == "json_schema" and sent["json_schema"]["strict"] is True and set(sent["json_schema"]["schema"]["properties"]) == {"city", "degrees"}


def test_the_sdks_own_accumulator_gives_the_tool_calls(own: Stage) -> None:
    tools = [openai.pydantic_function_tool(Weather, name="weather")]
    with own.sync.chat.completions.stream(model="tools/m", messages=[{"role": "user", "content": "Weather?"}], tools=tools) as events:
        kinds = [event.type for event in events]
        done = events.get_final_completion()
    assert "tool_calls.function.arguments.done" in kinds
    assert [(call.function.name, json.loads(call.function.arguments)) for call in done.choices[0].message.tool_calls or ()] == wanted(next(
        case for case in CASES if case["name"] == "tools")).calls


def test_async_stream_can_be_left_early(own: Stage) -> None:
    async def leave() -> str:
        chunks: AsyncIterator[Any] = await own.relaxed.chat.completions.create(model="text/m", messages=[{"role": "user", "content": "Hi"}], stream=True)
        async with chunks:
            async for chunk in chunks:
                if chunk.choices and chunk.choices[0].delta.content:
                    return str(chunk.choices[0].delta.content)
        return ""
    assert own.run(leave()) and own.gateway.get("/health").status == 200


def test_models_are_listed_and_found(own: Stage) -> None:
    listed = [model.id for model in own.sync.models.list()]
    assert listed[0] == "aicarousel" and {f"{case['name']}/m" for case in CASES} <= set(listed)
    assert own.sync.models.retrieve("tools/m").id == "tools/m"
    with pytest.raises(openai.NotFoundError):
        own.sync.models.retrieve("nobody/nothing")


def test_headers_tell_who_served(own: Stage) -> None:
    raw = own.sync.chat.completions.with_raw_response.create(model="text/m", messages=[{"role": "user", "content": "Hi"}])
    told = {name: raw.headers[f"x-aicarousel-{name}"] for name in ("provider", "model", "attempts")}
    assert told == {"provider": "text", "model": "m", "attempts": "1"} and raw.headers["x-aicarousel-request-id"]
    assert raw.parse().choices[0].message.content


CLIENT_MISTAKES = [
    ({"messages": []}, "messages must be a list with at least one message"),
    ({"messages": [{"role": "nobody", "content": "Hi"}]}, "messages[0].role must be one of"),
    ({"messages": [{"role": "user", "content": "Hi"}], "extra_body": {"temperature": "warm"}}, "temperature must be a number"),
]


@pytest.mark.parametrize("call,words", CLIENT_MISTAKES, ids=[words[:20] for _, words in CLIENT_MISTAKES])
def test_a_mistake_of_the_client_is_a_bad_request(own: Stage, call: Json, words: str) -> None:
    before = len(own.replay.calls("text"))
    with pytest.raises(openai.BadRequestError, match=re.escape(words)) as raised:
        own.sync.chat.completions.create(model="text/m", **call)
    assert raised.value.type == "invalid_request_error" and raised.value.param
    assert len(own.replay.calls("text")) == before, "no provider is asked"


def test_a_wrong_key_is_an_authentication_error(own: Stage) -> None:
    with openai.OpenAI(base_url=f"{own.gateway.url}/v1", api_key="sk-wrong", max_retries=0) as client, pytest.raises(openai.AuthenticationError) as raised:
        client.chat.completions.create(model="text/m", messages=[{"role": "user", "content": "Hi"}])
    assert raised.value.code == "invalid_api_key"
