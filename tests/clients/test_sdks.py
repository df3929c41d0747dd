"""The vendors' own SDKs, streaming with tools and thinking, against a gateway whose only providers speak Chat."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from dialects import SCHEMA
from driver import Model, asked, call, dies, outcomes, says
from fakes import Provider
from house import House

anthropic = pytest.importorskip("anthropic")
openai = pytest.importorskip("openai")

THOUGHT, TEXTS = "First one, then the other.", ("I add ", "caf\u00e9 and \u65e5\u672c.")
CALLS = [call("add", a=1, b=2), call("add", a=3)]
WELL = says(*TEXTS, think=THOUGHT, calls=CALLS)
DONE = says("All ", "done.")
WORDS = "Add one and two, then three."


@pytest.fixture(params=["sync", "async"])
def play(request: pytest.FixtureRequest) -> Callable[[Any, Callable[[Any], Any]], Any]:
    """play(stream manager, take): opens the stream, gives its events to `take` and returns what that function, told None, makes of the stream.

    Managers of both kinds of client are played alike: what is awaited in one is plain in the other.
    """
    async def asynchronously(manager: Any, end: Callable[[Any], Any]) -> tuple[list[Any], Any]:
        async with manager as stream:
            events = [event async for event in stream]
            made = end(stream)
            return events, await made if asyncio.iscoroutine(made) else made

    def synchronously(manager: Any, end: Callable[[Any], Any]) -> tuple[list[Any], Any]:
        with manager as stream:
            return list(stream), end(stream)

    return synchronously if request.param == "sync" else lambda manager, end: asyncio.run(asynchronously(manager, end))


def client(sdk: Any, house: House, request: pytest.FixtureRequest, **options: Any) -> Any:
    """A client of that SDK, of the kind that this test plays."""
    kind = ("Async" if request.node.callspec.params["play"] == "async" else "") + {"anthropic": "Anthropic", "openai": "OpenAI"}[sdk.__name__]
    return getattr(sdk, kind)(api_key=house.key, base_url=house.url + ("/v1" if sdk is openai else ""), **options)


MESSAGES = {"model": "aicarousel", "max_tokens": 4000, "thinking": {"type": "enabled", "budget_tokens": 2000}, "tools": [{"name": "add", "description": "Adds.", "input_schema": SCHEMA}]}
RESPONSES = {"model": "aicarousel", "reasoning": {"effort": "low", "summary": "auto"}, "store": False, "include": ["reasoning.encrypted_content"],
             "tools": [{"type": "function", "name": "add", "description": "Adds.", "parameters": SCHEMA, "strict": False}]}
CHAT = {"model": "aicarousel", "reasoning_effort": "low", "tools": [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": SCHEMA}}]}


def test_anthropic(build: Callable[..., House], provider: Provider, play: Any, request: pytest.FixtureRequest) -> None:
    house = build(first=Model(WELL, DONE))
    sdk = client(anthropic, house, request)
    asking: list[Any] = [{"role": "user", "content": WORDS}]
    events, message = play(sdk.messages.stream(messages=asking, **MESSAGES), lambda stream: stream.get_final_message())

    assert [block.type for block in message.content] == ["thinking", "text", "tool_use", "tool_use"] and message.stop_reason == "tool_use"
    assert message.content[0].thinking == THOUGHT and message.content[0].signature and message.content[1].text == "".join(TEXTS)
    assert [(block.name, block.input) for block in message.content[2:]] == CALLS
    assert (message.usage.input_tokens, message.usage.output_tokens) == (11, 7)
    assert [event.text for event in events if event.type == "text"] == list(TEXTS) and len([event for event in events if event.type == "thinking"]) == 3

    answers = [{"type": "tool_result", "tool_use_id": block.id, "content": str(number)} for number, block in enumerate(message.content[2:], 3)]
    asking += [{"role": "assistant", "content": message.content}, {"role": "user", "content": answers}]
    _, message = play(client(anthropic, house, request).messages.stream(messages=asking, **MESSAGES), lambda stream: stream.get_final_message())
    assert [block.text for block in message.content] == ["All done."] and message.stop_reason == "end_turn"
    check_second_request(provider)


def test_openai_responses(build: Callable[..., House], provider: Provider, play: Any, request: pytest.FixtureRequest) -> None:
    house = build(first=Model(WELL, DONE))
    asking: list[Any] = [{"role": "user", "content": WORDS}]
    events, response = play(client(openai, house, request).responses.stream(input=asking, **RESPONSES), lambda stream: stream.get_final_response())

    assert [item.type for item in response.output] == ["reasoning", "message", "function_call", "function_call"] and response.status == "completed"
    assert [part.text for part in response.output[0].summary] == [THOUGHT] and response.output[0].encrypted_content and response.output_text == "".join(TEXTS)
    assert [(item.name, json.loads(item.arguments)) for item in response.output[2:]] == CALLS
    assert (response.usage.input_tokens, response.usage.output_tokens) == (11, 7)
    assert [event.delta for event in events if event.type == "response.output_text.delta"] == list(TEXTS)
    assert len([event for event in events if event.type == "response.reasoning_summary_text.delta"]) == 3

    known = [{name: value for name, value in item.to_dict().items() if name not in ("parsed_arguments", "parsed")} for item in response.output]
    asking += [*known, *({"type": "function_call_output", "call_id": item.call_id, "output": str(number)} for number, item in enumerate(response.output[2:], 3))]
    _, response = play(client(openai, house, request).responses.stream(input=asking, **RESPONSES), lambda stream: stream.get_final_response())
    assert response.output_text == "All done." and [item.type for item in response.output] == ["message"]
    check_second_request(provider)


def test_openai_chat(build: Callable[..., House], provider: Provider, play: Any, request: pytest.FixtureRequest) -> None:
    house = build(first=Model(WELL, DONE))
    asking: list[Any] = [{"role": "user", "content": WORDS}]
    events, completion = play(client(openai, house, request).chat.completions.stream(messages=asking, stream_options={"include_usage": True}, **CHAT),
                              lambda stream: stream.get_final_completion())

    [choice] = completion.choices
    assert choice.finish_reason == "tool_calls" and choice.message.content == "".join(TEXTS) and choice.message.reasoning_content == THOUGHT
    assert [(made.function.name, json.loads(made.function.arguments)) for made in choice.message.tool_calls] == CALLS
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (11, 7)
    assert [event.delta for event in events if event.type == "content.delta" and event.delta] == list(TEXTS)

    made = [{"id": one.id, "type": "function", "function": {"name": one.function.name, "arguments": one.function.arguments}} for one in choice.message.tool_calls]
    asking += [{"role": "assistant", "content": choice.message.content, "tool_calls": made}, *({"role": "tool", "tool_call_id": one["id"], "content": str(number)} for number, one in enumerate(made, 3))]
    _, completion = play(client(openai, house, request).chat.completions.stream(messages=asking, **CHAT), lambda stream: stream.get_final_completion())
    assert completion.choices[0].message.content == "All done." and completion.choices[0].finish_reason == "stop"
    check_second_request(provider)


def check_second_request(provider: Provider) -> None:
    """The provider was shown its own two calls and a result for each, in their order."""
    assert asked(provider, "first") == [0, 1]
    user, assistant, *rest = provider.calls("first")[1].json["messages"]
    assert user["role"] == "user" and assistant["content"] == "".join(TEXTS) and [message["content"] for message in rest] == ["3", "4"]
    assert [json.loads(made["function"]["arguments"]) for made in assistant["tool_calls"]] == [arguments for _, arguments in CALLS]
    assert [made["id"] for made in assistant["tool_calls"]] == [message["tool_call_id"] for message in rest]


# ---------------------------------------------------------------- a provider that dies

STREAMS: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "messages": (anthropic, lambda sdk: sdk.messages.stream(messages=[{"role": "user", "content": WORDS}], **MESSAGES)),
    "responses": (openai, lambda sdk: sdk.responses.stream(input=WORDS, **RESPONSES)),
    "chat": (openai, lambda sdk: sdk.chat.completions.stream(messages=[{"role": "user", "content": WORDS}], **CHAT)),
}


@pytest.mark.parametrize("death", ["reset", "closed"])
@pytest.mark.parametrize("calls", [[], CALLS], ids=["in text", "in a call behind text"])
@pytest.mark.parametrize("name", STREAMS)
def test_the_sdk_tells_of_a_broken_stream(build: Callable[..., House], provider: Provider, play: Any, request: pytest.FixtureRequest, name: str, calls: Any, death: str) -> None:
    """Messages and Chat raise; of Responses the last event is response.failed."""
    house = build(first=Model(dies(death, "Half of ", "this", calls=calls)), spare=Model(WELL))
    sdk, opening = STREAMS[name]
    manager = opening(client(sdk, house, request, max_retries=0))
    if name == "responses":
        events, _ = play(manager, lambda stream: None)
        assert events[-1].type == "response.failed" and events[-1].response.error.message and "response.completed" not in [event.type for event in events]
        assert not [event for event in events if "function_call" in event.type or event.type == "response.output_item.added" and event.item.type == "function_call"]
    else:
        with pytest.raises(sdk.APIError) as raised:
            play(manager, lambda stream: None)
        assert "first/m" in str(raised.value)
    assert outcomes(house) == ["error"] and asked(provider, "spare") == []


@pytest.mark.parametrize("death", ["reset", "closed"])
@pytest.mark.parametrize("name", STREAMS)
def test_the_sdk_sees_nothing_of_a_call_that_died(build: Callable[..., House], provider: Provider, play: Any, request: pytest.FixtureRequest, name: str, death: str) -> None:
    house = build(first=Model(dies(death, calls=CALLS)), spare=Model(says(calls=[call("add", a=9)])))
    sdk, opening = STREAMS[name]
    finals = {"messages": lambda stream: stream.get_final_message(), "responses": lambda stream: stream.get_final_response(), "chat": lambda stream: stream.get_final_completion()}
    _, final = play(opening(client(sdk, house, request, max_retries=0)), finals[name])
    made = {"messages": lambda: [block.input for block in final.content], "responses": lambda: [json.loads(item.arguments) for item in final.output],
            "chat": lambda: [json.loads(one.function.arguments) for one in final.choices[0].message.tool_calls]}[name]()
    assert made == [{"a": 9}] and asked(provider, "first") == asked(provider, "spare") == [0] and outcomes(house) == ["ok"]
