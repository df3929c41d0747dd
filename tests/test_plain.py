"""Section 24, Plain endpoints, and what Anthropic's clients have beside /v1/messages: completions, embeddings, token counts and the mirror."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from openai import OpenAI

from fakes import DONE, FAKE_KEY, FINISH, ROLE, Close, EachByte, End, Gateway, Pause, Provider, Reply, Reset, Script, answer, chat_answer, content, frame, healthy, in_turn, opened, stream

VECTOR = {"object": "list", "model": "vectors", "data": [{"object": "embedding", "index": 0, "embedding": [0.25, -1.0]}], "usage": {"prompt_tokens": 3, "total_tokens": 3}}
COMPLETION = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "m", "choices": [{"text": " upon a time", "index": 0, "logprobs": None, "finish_reason": "stop"}],
              "usage": {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}}
OTHER_VECTOR = {**VECTOR, "data": [{"object": "embedding", "index": 0, "embedding": [9.0, 9.0]}]}
NOT_FOUND = answer({"error": {"message": "Not Found"}}, 404)
OOPS = answer({"error": {"message": "Oops."}}, 500)
COUNT = {"model": "native/m", "messages": [{"role": "user", "content": "How many tokens are these words?"}]}


def chunk(text: str, finish: str | None = None) -> bytes:
    """One event of a provider's own text completion."""
    return frame({"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "m", "choices": [{"text": text, "index": 0, "logprobs": None, "finish_reason": finish}]})


USAGE = frame({"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "m", "choices": [], "usage": COMPLETION["usage"]})
TEXT_STREAM = stream(chunk(" upon"), chunk(" a time"), chunk("", "stop"), USAGE, DONE)
TEXT_BYTES = b"".join((chunk(" upon"), chunk(" a time"), chunk("", "stop"), USAGE, DONE))


def by_path(**scripts: Script) -> Script:
    """What is played depends on the last part of the path; anything else is not found."""
    def play(request: Any) -> Any:
        script = scripts.get(request.path.partition("?")[0].rpartition("/")[2], NOT_FOUND)
        return script(request) if callable(script) else script
    return play


def completion(request: Any) -> Any:
    return TEXT_STREAM if request.json.get("stream") else answer(COMPLETION)


class Place:
    """A gateway with one provider for each behaviour, and the requests they got."""

    def __init__(self, provider: Provider, gateway: Gateway) -> None:
        self.provider, self.gateway = provider, gateway
        self.client = OpenAI(base_url=f"{gateway.url}/v1", api_key=gateway.key, max_retries=0)

    def last(self, name: str) -> Any:
        return self.provider.calls(name)[-1]


def entry(url: str, *models: str, **more: Any) -> dict[str, Any]:
    return {"baseUrl": url, "default": "m", "enableFallback": False, "models": ["m", *models], "keys": ["env:FAKE_KEY"], **more}


@pytest.fixture(scope="module")
def place(module_provider: Provider, module_gateway_factory: Any) -> Iterator[Place]:
    scripts: dict[str, tuple[Script, dict[str, Any]]] = {
        "plain": (by_path(completions=completion, embeddings=answer(VECTOR)), {"preset": "vllm"}),
        "chatty": (by_path(completions=healthy("Once upon a time")), {"preset": "groq"}),
        "cut": (opened(chunk(" upon"), Pause("cut"), Close()), {"preset": "vllm"}),
        "erring": (opened(chunk(" upon"), Pause("erring"), frame({"error": {"message": "overloaded"}}), Close()), {"preset": "vllm"}),
        "unstreamed": (answer(COMPLETION), {"preset": "vllm"}),
        "unasked": (TEXT_STREAM, {"preset": "vllm"}),
        "unfinished": (stream(chunk(" upon"), DONE), {"preset": "vllm"}),
        "one": (in_turn(OOPS, OOPS, OOPS), {"enableFallback": True}),
        "two": (answer(OTHER_VECTOR), {}),
        "three": (answer(VECTOR), {}),
        "odd": (answer({"data": [{"index": 0}]}), {}),
        "empty": (answer({"data": []}), {}),
        "native": (by_path(count_tokens=answer({"input_tokens": 77})), {"preset": "anthropic", "format": "messages"}),
        "uncounting": (by_path(messages=answer({})), {"preset": "anthropic", "format": "messages"}),
        "resetting": ([Reset()], {"preset": "anthropic", "format": "messages"}),
        "miscounting": (answer({"input_tokens": "many"}), {"preset": "anthropic", "format": "messages"}),
    }
    models: dict[str, Any] = {name: {**entry(module_provider.script(name, script), *(["shared"] if name in ("one", "three") else [])), **more} for name, (script, more) in scripts.items()}
    models["carousel"] = {"fallback": "none", "strategy": "priority", "aliases": {"vectors": ["one/shared", "two/m", "three/shared"]}}
    gateway = module_gateway_factory(models, {"FAKE_KEY": FAKE_KEY})
    yield Place(module_provider, gateway)


# ---------------------------------------------------------------- completions

@pytest.mark.parametrize("name", ["plain", "chatty"])
def test_a_completion_for_the_sdk(place: Place, name: str) -> None:
    """Of a provider that completes text itself, and of one that only chats."""
    made = place.client.completions.create(model=f"{name}/m", prompt="Once", max_tokens=9, stop=["END"], temperature=0.5)
    assert made.object == "text_completion" and made.choices[0].text.endswith(" upon a time") and made.choices[0].finish_reason == "stop" and made.usage.completion_tokens
    sent = place.last(name)
    assert sent.path.endswith("/v1/completions" if name == "plain" else "/v1/chat/completions")
    assert sent.json["model"] == "m" and sent.json["stop"] == ["END"] and sent.json["temperature"] == 0.5
    assert sent.json.get("prompt") == "Once" if name == "plain" else sent.json["messages"] == [{"role": "user", "content": "Once"}]


@pytest.mark.parametrize("usage", [False, True])
@pytest.mark.parametrize("name", ["plain", "chatty", "unstreamed"])
def test_a_streamed_completion_for_the_sdk(place: Place, name: str, usage: bool) -> None:
    more = {"stream_options": {"include_usage": True}} if usage else {}
    chunks = list(place.client.completions.create(model=f"{name}/m", prompt="Once", stream=True, **more))
    text = "".join(choice.text for part in chunks for choice in part.choices)
    assert text.endswith(" upon a time") and [choice.finish_reason for part in chunks for choice in part.choices][-1] == "stop"
    assert [part.usage.completion_tokens > 0 for part in chunks if part.usage] == [True] * usage
    assert place.last(name).json["stream"] is True and place.last(name).json["stream_options"] == {"include_usage": True}


def test_a_provider_that_streams_unasked(place: Place) -> None:
    assert place.client.completions.create(model="unasked/m", prompt="Once").choices[0].text == " upon a time"


def test_a_stream_that_ends_without_its_finish_gets_one(place: Place) -> None:
    chunks = list(place.client.completions.create(model="unfinished/m", prompt="Once", stream=True))
    assert [choice.finish_reason for part in chunks for choice in part.choices] == [None, "stop"]


@pytest.mark.parametrize("name", ["cut", "erring"])
def test_a_broken_completion_ends_in_an_error_event(place: Place, name: str) -> None:
    with place.gateway.connect() as client:
        client.send(place.gateway.request_bytes("POST", "/v1/completions", {"model": f"{name}/m", "prompt": "Once", "stream": True}))
        client.read_until(b" upon")
        place.provider.release(name)
        reply = client.read_all()
    assert reply.status == 200 and reply.complete and not reply.done
    assert reply.chunks[0]["choices"][0]["text"] == " upon" and "error" in reply.chunks[-1] and len(reply.chunks) == 2


@pytest.mark.parametrize(("fields", "param"), [
    ({}, "prompt"), ({"prompt": 5}, "prompt"), ({"prompt": []}, "prompt"), ({"prompt": ["a", 1]}, "prompt"), ({"prompt": [[]]}, "prompt"),
    ({"prompt": "a", "logprobs": True}, "logprobs"), ({"prompt": "a", "n": 0}, "n"), ({"prompt": "a", "stream": "yes"}, "stream"),
])
def test_a_wrong_completion_request(place: Place, fields: dict[str, Any], param: str) -> None:
    reply = place.gateway.post("/v1/completions", {"model": "plain/m", **fields})
    assert reply.status == 400 and reply.json["error"]["param"] == param


@pytest.mark.parametrize("prompt", [[1, 2, 3], [[1, 2], [3]], ["one", "two"]])
def test_prompts_that_only_text_completion_has(place: Place, prompt: Any) -> None:
    """Passed on where the provider completes text; elsewhere the client is told why not."""
    assert place.gateway.post("/v1/completions", {"model": "plain/m", "prompt": prompt}).status == 200
    assert place.last("plain").json["prompt"] == prompt
    refused = place.gateway.post("/v1/completions", {"model": "chatty/m", "prompt": prompt})
    assert refused.status == 400 and "/completions" in refused.json["error"]["message"]


def test_what_a_chat_model_cannot_do_is_refused_or_told(place: Place) -> None:
    assert place.gateway.post("/v1/completions", {"model": "chatty/m", "prompt": "def f(", "suffix": "return x"}).status == 400
    reply = place.gateway.post("/v1/completions", {"model": "chatty/m", "prompt": ["Once"], "echo": True, "logprobs": 2})
    assert reply.status == 200 and {"echo", "logprobs"} <= set(reply.headers["x-aicarousel-dropped"].split(","))


def test_the_endpoint_without_v1(place: Place) -> None:
    assert place.gateway.post("/completions", {"model": "plain/m", "prompt": "Once"}).json["choices"][0]["text"] == " upon a time"


def test_a_streamed_completion_cut_at_every_byte(place: Place) -> None:
    place.provider.script("plain", [*opened(EachByte(TEXT_BYTES, chunked=True)), End()])
    reply = place.gateway.post("/v1/completions", {"model": "plain/m", "prompt": "Once", "stream": True})
    assert "".join(choice["text"] for part in reply.chunks for choice in part["choices"]) == " upon a time" and reply.done
    place.provider.script("plain", by_path(completions=completion, embeddings=answer(VECTOR)))


# ---------------------------------------------------------------- embeddings

@pytest.mark.parametrize("text", ["words", ["words", "more"], [1, 2, 3], [[1, 2], [3]]], ids=["string", "list", "tokens", "lists of tokens"])
def test_embeddings_for_the_sdk(place: Place, text: Any) -> None:
    made = place.client.embeddings.create(model="plain/m", input=text, dimensions=2)
    assert made.data[0].embedding == [0.25, -1.0] and made.usage.prompt_tokens == 3
    sent = place.last("plain")
    assert sent.path.endswith("/v1/embeddings") and sent.json == {"input": text, "model": "m", "dimensions": 2, "encoding_format": "base64"}


def test_an_embedding_never_comes_from_another_model(place: Place) -> None:
    """The alias names one/shared, two/m and three/shared: when one fails, three has the same model and two has not."""
    assert place.gateway.post("/v1/embeddings", {"model": "vectors", "input": "a"}).json["data"] == VECTOR["data"]
    assert place.last("one").json["model"] == place.last("three").json["model"] == "shared" and not place.provider.calls("two")


def test_a_provider_without_embeddings_keeps_its_good_name(place: Place) -> None:
    reply = place.gateway.post("/v1/embeddings", {"model": "chatty/m", "input": "a"})
    assert reply.status == 404 and place.gateway.cooling("chatty") == []
    reply = place.gateway.post("/v1/embeddings", {"model": "native/m", "input": "a"})
    assert reply.status == 400 and "embeddings" in reply.json["error"]["message"] and not any("embeddings" in call.path for call in place.provider.calls("native"))


@pytest.mark.parametrize("model", ["aicarousel", "never-heard-of"])
def test_embeddings_want_a_model_by_name(place: Place, model: str) -> None:
    assert place.gateway.post("/v1/embeddings", {"model": model, "input": "a"}).status == 404


@pytest.mark.parametrize(("body", "param"), [
    ({"input": "a"}, "model"), ({"model": "", "input": "a"}, "model"), ({"model": "plain/m"}, "input"), ({"model": "plain/m", "input": ""}, "input"),
    ({"model": "plain/m", "input": [None]}, "input"), ({"model": "plain/m", "input": "a", "dimensions": "2"}, "dimensions"),
])
def test_a_wrong_embeddings_request(place: Place, body: dict[str, Any], param: str) -> None:
    reply = place.gateway.post("/v1/embeddings", body)
    assert reply.status == 400 and reply.json["error"]["param"] == param


@pytest.mark.parametrize("name", ["odd", "empty", "unasked"])
def test_an_answer_without_vectors_is_a_failure(place: Place, name: str) -> None:
    reply = place.gateway.post("/v1/embeddings", {"model": f"{name}/m", "input": "a", "stream": True})
    assert reply.status == 502 and reply.json["error"]["message"]


# ---------------------------------------------------------------- counting tokens

def count(place: Place, model: str, path: str = "/v1/messages/count_tokens", **fields: Any) -> Reply:
    return place.gateway.post(path, {**COUNT, "model": model, **fields}, headers={"anthropic-beta": "token-counting-2024-11-01"})


def test_a_provider_that_counts_is_asked(place: Place) -> None:
    reply = count(place, "native/m", "/v1/messages/count_tokens?beta=true", tools=[{"name": "f", "input_schema": {"type": "object"}}])
    assert reply.json == {"input_tokens": 77} and "x-aicarousel-estimated" not in reply.headers
    sent = place.last("native")
    assert sent.path.endswith("/v1/messages/count_tokens") and sent.json["model"] == "m" and sent.json["tools"] and sent.headers["anthropic-version"]
    assert sent.headers["anthropic-beta"] == "token-counting-2024-11-01"


@pytest.mark.parametrize("name", ["uncounting", "resetting", "miscounting", "chatty"])
def test_elsewhere_tokens_are_estimated_and_the_provider_stays_well(place: Place, name: str) -> None:
    reply = count(place, f"{name}/m")
    assert 8 <= reply.json["input_tokens"] <= 30 and reply.headers["x-aicarousel-estimated"] == "1" and place.gateway.cooling(name) == []


def test_a_conversation_of_another_provider_is_counted_too(place: Place) -> None:
    thinking = {"type": "thinking", "thinking": "Hm.", "signature": "aic1.bm90IG9uZQ"}
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": [thinking, {"type": "text", "text": "b"}]}, {"role": "user", "content": "c"}]
    assert count(place, "native/m", messages=messages, max_tokens=5, stream=True).json == {"input_tokens": 77}
    sent = place.last("native").json
    assert "aic1." not in json.dumps(sent) and not {"max_tokens", "stream"} & sent.keys() and len(sent["messages"]) == 3


def test_wrong_count_requests_and_unknown_models(place: Place) -> None:
    for body in ({"model": "native/m"}, {"messages": "a", "model": "native/m"}):
        reply = place.gateway.post("/v1/messages/count_tokens", body)
        assert reply.status == 400 and reply.json["type"] == "error"


# ---------------------------------------------------------------- the mirror

def test_the_mirror_has_what_anthropics_api_has(place: Place) -> None:
    assert place.gateway.post("/api/anthropic/v1/messages/count_tokens", COUNT).json == {"input_tokens": 77}
    said = place.gateway.post("/api/anthropic/v1/messages", {"model": "chatty/m", "max_tokens": 50, "messages": [{"role": "user", "content": "Hi"}]})
    assert said.status == 200 and said.json["content"][0]["text"]
    listed = place.gateway.get("/api/anthropic/v1/models").json
    assert listed["data"][0]["type"] == "model" and listed["has_more"] is False
    assert place.gateway.get("/api/anthropic/v1/models/aicarousel").json["type"] == "model"


@pytest.mark.parametrize("path", ["/api/anthropic/v1/chat/completions", "/api/anthropic/messages", "/api/anthropic/", "/api/anthropic/v1/messagesx"])
def test_the_mirror_has_nothing_else(place: Place, path: str) -> None:
    reply = place.gateway.post(path, {})
    assert reply.status == 404 and reply.json["type"] == "error" and reply.json["error"]["type"] == "not_found_error"


def test_chat_is_not_touched_by_the_answer_of_a_plain_endpoint(place: Place) -> None:
    place.provider.script("chatty", answer(chat_answer("still chatting")))
    assert place.gateway.chat("chatty/m").text == "still chatting"
    place.provider.script("chatty", stream(ROLE, content("still"), FINISH, DONE))
    assert place.gateway.chat("chatty/m", stream=True).text == "still"


LONG: dict[str, tuple[str, dict[str, Any], int]] = {
    "embeddings, as the SDK asks": ("/v1/embeddings", {"model": "three/m", "input": "word " * 6000, "encoding_format": "base64"}, 200),
    "several prompts": ("/v1/completions", {"model": "plain/m", "prompt": ["base64 " * 4000, "b"]}, 200),
    "several prompts for a chat": ("/v1/completions", {"model": "chatty/m", "prompt": ["base64 " * 4000, "b"]}, 400),
    "filling in": ("/v1/completions", {"model": "plain/m", "prompt": "base64 " * 4000, "suffix": "x"}, 200),
    "filling in for a chat": ("/v1/completions", {"model": "chatty/m", "prompt": "base64 " * 4000, "suffix": "x"}, 400),
}


@pytest.mark.parametrize("row", LONG)
def test_a_long_request_that_speaks_of_base64_is_served_as_a_short_one(place: Place, row: str) -> None:
    """Long requests are measured for their images; these have no form in which they could be."""
    path, body, status = LONG[row]
    reply = place.gateway.post(path, body)
    assert reply.status == status and ("error" in reply.json) is (status == 400), reply.raw
