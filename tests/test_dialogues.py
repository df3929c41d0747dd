"""Sections 26 and 20: conversations that move between providers, and requests that not every model can serve."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dialects import FORMATS, PATHS
from fakes import FAKE_KEY, Gateway, Provider, Reply, Request, answer, chat_answer

Json = dict[str, Any]
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
MESSAGE = {"id": "msg_1", "type": "message", "role": "assistant", "model": "m", "content": [{"type": "text", "text": "Served."}], "stop_reason": "end_turn", "stop_sequence": None,
           "usage": {"input_tokens": 3, "output_tokens": 2}}
RESPONSE = {"id": "resp_1", "object": "response", "created_at": 1, "status": "completed", "model": "m", "output": [
    {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": [{"type": "output_text", "text": "Served.", "annotations": []}]}],
    "usage": {"input_tokens": 3, "output_tokens": 2, "total_tokens": 5}}
SERVED = {"chat": chat_answer("Served."), "messages": MESSAGE, "responses": RESPONSE}
GEMINI = "gemini-3.5-flash"
SIGNATURE, THOUGHT = "Z2VtaW5pLXNpZ25hdHVyZQ==", {"type": "thinking", "thinking": "It may rain.", "signature": "Y2xhdWRlLXNpZ25hdHVyZQ=="}


def entry(url: str, wire: str = "chat", **more: Any) -> Json:
    return {"baseUrl": url, "format": wire, "default": "m", "enableFallback": False, "models": ["m"], "keys": ["env:FAKE_KEY"], **more}


# ---------------------------------------------------------------- the three clients

def asked(client: str, model: str, words: str, *parts: Json) -> Json:
    """A request with one turn: words, and parts in the client's form."""
    text = {"type": "input_text" if client == "responses" else "text", "text": words}
    turn = {"role": "user", "content": [text, *parts] if parts else words}
    return {"model": model, "input": [turn]} if client == "responses" else {"model": model, "messages": [turn], **({"max_tokens": 500} if client == "messages" else {})}


def image(client: str) -> Json:
    url = f"data:image/png;base64,{PNG}"
    return {"chat": {"type": "image_url", "image_url": {"url": url}}, "responses": {"type": "input_image", "image_url": url, "detail": "auto"},
            "messages": {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}}}[client]


def tool(client: str) -> Json:
    return {"chat": {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}, "responses": {"type": "function", "name": "weather", "parameters": SCHEMA, "strict": False},
            "messages": {"name": "weather", "input_schema": SCHEMA}}[client]


def call_of(client: str, reply: Json) -> tuple[str, list[Json]]:
    """The id of the one call of an answer, and the turns that a client adds to its history for it. A Chat SDK keeps only the fields that it knows."""
    if client == "chat":
        message = reply["choices"][0]["message"]
        [call] = message["tool_calls"]
        return call["id"], [{"role": "assistant", "content": message["content"], "tool_calls": [{name: call[name] for name in ("id", "type", "function")}]},
                            {"role": "tool", "tool_call_id": call["id"], "content": "Rain."}]
    if client == "messages":
        [call] = [block for block in reply["content"] if block["type"] == "tool_use"]
        return call["id"], [{"role": "assistant", "content": reply["content"]}, {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call["id"], "content": "Rain."}]}]
    [call] = [item for item in reply["output"] if item["type"] == "function_call"]
    return call["call_id"], [*reply["output"], {"type": "function_call_output", "call_id": call["call_id"], "output": "Rain."}]


def text_of(client: str, reply: Json) -> str:
    if client == "chat":
        return reply["choices"][0]["message"]["content"]
    blocks = reply["content"] if client == "messages" else [part for item in reply["output"] if item["type"] == "message" for part in item["content"]]
    return "".join(block["text"] for block in blocks if block["type"] in ("text", "output_text"))


# ---------------------------------------------------------------- Gemini, Claude, Gemini

def refused(why: str) -> Any:
    return answer({"error": {"message": why, "type": "invalid_request_error"}, "type": "error"}, 400)


def play_gemini(request: Request) -> Any:
    """As Gemini's OpenAI endpoint: the first call of each of its steps comes with a signature, and the history without one is refused."""
    calls = [message["tool_calls"] for message in request.json["messages"] if message.get("tool_calls")]
    for made in calls:
        if not made[0].get("extra_content", {}).get("google", {}).get("thought_signature"):
            return refused("Function call is missing a thought_signature in functionCall parts.")
    if len(calls) == 2:
        return answer(chat_answer("Take an umbrella."))
    made = {"id": "function-call-1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Berlin"}'}, "extra_content": {"google": {"thought_signature": SIGNATURE}}}
    message = {"role": "assistant", "content": None, "tool_calls": [made]}
    return answer({**chat_answer(), "choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}]})


def play_claude(request: Request) -> Any:
    """As Anthropic's: only its own signatures, ids of its letters, a result for each call."""
    called: list[str] = []
    for message in request.json["messages"]:
        for block in message["content"] if isinstance(message["content"], list) else ():
            if block["type"] == "thinking" and block != THOUGHT:
                return refused("Invalid `signature` in `thinking` block")
            if block["type"] == "tool_use":
                if set(block) - {"type", "id", "name", "input", "cache_control"} or not block["id"].replace("_", "").replace("-", "").isalnum():
                    return refused("Extra inputs are not permitted")
                called.append(block["id"])
            if block["type"] == "tool_result" and block["tool_use_id"] not in called:
                return refused("unexpected `tool_use_id` found in `tool_result` blocks")
    return answer({**MESSAGE, "content": [THOUGHT, {"type": "tool_use", "id": "toolu_01Ab", "name": "weather", "input": {"city": "Paris"}}], "stop_reason": "tool_use"})


@pytest.fixture(scope="module")
def travelling(module_provider: Provider, module_gateway_factory: Callable[..., Gateway]) -> Gateway:
    models = {"gemini": entry(module_provider.script("gemini", play_gemini), default=GEMINI, models=[GEMINI]), "anthropic": entry(module_provider.script("anthropic", play_claude), "messages")}
    return module_gateway_factory(models, environment={"FAKE_KEY": FAKE_KEY})


@pytest.mark.parametrize("client", FORMATS)
def test_one_tool_conversation_goes_from_gemini_to_claude_and_back(travelling: Gateway, module_provider: Provider, client: str) -> None:
    place = "input" if client == "responses" else "messages"
    body = {**asked(client, f"gemini/{GEMINI}", "Weather in Berlin and Paris?"), "tools": [tool(client)]}
    for model in (f"gemini/{GEMINI}", "anthropic/m"):
        reply = travelling.post(PATHS[client], {**body, "model": model})
        assert reply.status == 200, reply.raw
        body = {**body, place: [*body[place], *call_of(client, reply.json)[1]]}
    reply = travelling.post(PATHS[client], {**body, "model": f"gemini/{GEMINI}"})
    assert reply.status == 200 and text_of(client, reply.json) == "Take an umbrella.", reply.raw
    own, other = [message["tool_calls"][0]["extra_content"]["google"]["thought_signature"] for message in module_provider.calls("gemini")[-1].json["messages"] if message.get("tool_calls")]
    assert own == SIGNATURE != other
    back = travelling.post(PATHS[client], {**body, "model": "anthropic/m"})
    assert back.status == 200, back.raw
    thoughts = [block for message in module_provider.calls("anthropic")[-1].json["messages"] if isinstance(message["content"], list) for block in message["content"]
                if block["type"] == "thinking"]
    assert thoughts == [THOUGHT]


# ---------------------------------------------------------------- what a model cannot do

@pytest.fixture(scope="module")
def able(module_provider: Provider, module_gateway_factory: Callable[..., Gateway]) -> Iterator[Callable[..., Reply]]:
    """Asks a gateway whose first provider has a model without eyes and tools; gives the reply."""
    def served(request: Request) -> Any:
        return answer(SERVED[next(wire for wire in FORMATS if PATHS[wire].removeprefix("/v1") in request.path)])
    models: Json = {}
    for wire in FORMATS:
        models[f"plain-{wire}"] = entry(module_provider.script(f"plain-{wire}", served), wire, models=[{"id": "m", "vision": False, "tools": False}])
        models[f"able-{wire}"] = entry(module_provider.script(f"able-{wire}", served), wire, models=[{"id": "m", "vision": True, "tools": True}])
    models["carousel"] = {"aliases": {f"any-{wire}": [f"plain-{wire}/m", f"able-{wire}/m"] for wire in FORMATS}}
    gateway = module_gateway_factory(models, environment={"FAKE_KEY": FAKE_KEY})

    def ask(client: str, body: Json, alone: bool = False) -> Reply:
        return gateway.post(PATHS[client], body, headers={"x-aicarousel-no-fallback": "1"} if alone else {})
    yield ask


def told(client: str, reply: Reply) -> str:
    """The message of an error in the client's own form."""
    error = reply.json["error"]
    assert reply.status == 400 and (client != "messages" or reply.json["type"] == "error") and error["type"] == "invalid_request_error", reply.raw
    return error["message"]


@pytest.mark.parametrize("wire", FORMATS)
@pytest.mark.parametrize("client", FORMATS)
def test_an_image_goes_to_a_model_that_reads_images(able: Callable[..., Reply], module_provider: Provider, client: str, wire: str) -> None:
    n_calls = len(module_provider.calls(f"plain-{wire}"))
    reply = able(client, asked(client, f"any-{wire}", "What is this?", image(client)))
    assert reply.status == 200 and text_of(client, reply.json) == "Served." and reply.headers["x-aicarousel-provider"] == f"able-{wire}"
    assert PNG in module_provider.calls(f"able-{wire}")[-1].body.decode()
    message = told(client, able(client, asked(client, f"plain-{wire}/m", "What is this?", image(client)), alone=True))
    assert "m reads no images" in message and "able-chat/m" in message
    assert len(module_provider.calls(f"plain-{wire}")) == n_calls


@pytest.mark.parametrize("client", FORMATS)
def test_an_image_that_was_spoken_of_before_is_no_reason_to_leave(able: Callable[..., Reply], module_provider: Provider, client: str) -> None:
    """Only the last turn decides; what older ones show becomes text."""
    body = asked(client, "plain-chat/m", "What is this?", image(client))
    place = "input" if client == "responses" else "messages"
    body[place] += [{"role": "assistant", "content": "A dot."}, {"role": "user", "content": "Thank you."}]
    reply = able(client, body, alone=True)
    assert reply.status == 200 and PNG not in module_provider.calls("plain-chat")[-1].body.decode() and "image" in reply.headers["x-aicarousel-dropped"]


@pytest.mark.parametrize("client", FORMATS)
def test_tools_go_to_a_model_that_calls_tools(able: Callable[..., Reply], client: str) -> None:
    body = {**asked(client, "any-chat", "Weather?"), "tools": [tool(client)]}
    assert able(client, body).headers["x-aicarousel-provider"] == "able-chat"
    assert "m calls no tools" in told(client, able(client, {**body, "model": "plain-chat/m"}, alone=True))


SEARCH = {"messages": {"type": "web_search_20250305", "name": "web_search"}, "responses": {"type": "web_search"}}
FORCED = {"messages": {"type": "tool", "name": "web_search"}, "responses": {"type": "web_search"}}


@pytest.mark.parametrize("client", SEARCH)
def test_a_tool_that_the_provider_runs_goes_where_it_can_run(able: Callable[..., Reply], module_provider: Provider, client: str) -> None:
    """Elsewhere it is left out and named, and refused where it is forced."""
    body = {**asked(client, f"able-{client}/m", "News?"), "tools": [SEARCH[client], tool(client)]}
    assert able(client, body).status == 200
    assert SEARCH[client] in module_provider.calls(f"able-{client}")[-1].json["tools"]
    reply = able(client, {**body, "model": "able-chat/m"})
    sent = module_provider.calls("able-chat")[-1].json
    assert reply.status == 200 and [one["function"]["name"] for one in sent["tools"]] == ["weather"] and "web_search" in reply.headers["x-aicarousel-dropped"]
    n_calls = len(module_provider.calls("able-chat"))
    assert "web_search" in told(client, able(client, {**body, "model": "able-chat/m", "tool_choice": FORCED[client]}, alone=True))
    assert len(module_provider.calls("able-chat")) == n_calls
