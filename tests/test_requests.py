"""Every recorded request body, translated to each other format for every provider: valid by the SDK's types, and free of what that provider rejects.

The recordings and the reference on providers lie in ../shared beside the checkout; where they are not, the bodies in BODIES go through the same checks.
A field that the SDK's types do not have is an error, unless DIALECT says whose word it is; a rule of the reference is a row of RULES, or of UNCHECKED with the reason.
"""

from __future__ import annotations

import collections.abc
import fnmatch
import functools
import json
import os
import re
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai", reason="the openai SDK is not installed: python -m pip install openai")
pytest.importorskip("anthropic", reason="the anthropic SDK is not installed: python -m pip install anthropic")
import aicarousel as a
import pydantic
from anthropic.types import message_create_params
from openai.types.chat import completion_create_params
from openai.types.responses import response_create_params
from typing_extensions import NotRequired, Required, TypedDict

Json = dict[str, Any]
SHARED = Path(__file__).resolve().parents[2] / "shared"
REFERENCE: Json = json.loads((SHARED / "providers.json").read_text(encoding="utf-8"))["providers"] if (SHARED / "providers.json").exists() else {}
ABSENT = f"{SHARED.name} is not beside this checkout"


# ---------------------------------------------------------------- the SDK's types, without room for more

def closed(kind: Any, seen: dict[Any, Any]) -> Any:
    """A type of the SDK's parameters in a form that pydantic checks whole: lists for what may be any iterable, no fields beyond those named."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated or origin in (Required, NotRequired):
        return closed(inner[0], seen)
    if origin in (collections.abc.Iterable, collections.abc.Sequence, list) or getattr(origin, "__name__", "") == "SequenceNotStr":
        return list[closed(inner[0], seen)]         # type: ignore[misc]
    if origin is dict:
        return dict[str, Any]
    if origin is typing.Union or str(origin) == "<class 'types.UnionType'>":
        return typing.Union[tuple(closed(one, seen) for one in inner)]
    if hasattr(kind, "__required_keys__"):
        if kind not in seen:
            seen[kind] = dict[str, Any]             # where a type holds itself it is not looked into
            fields = {name: (Required if name in kind.__required_keys__ else NotRequired)[closed(one, seen)] for name, one in typing.get_type_hints(kind).items()}
            made = TypedDict(kind.__name__, fields)     # type: ignore[operator]
            made.__pydantic_config__ = pydantic.ConfigDict(extra="forbid")
            seen[kind] = made
        return seen[kind]
    if isinstance(kind, type) and issubclass(kind, pydantic.BaseModel):
        return Any
    return str if origin not in (None, typing.Literal) or isinstance(kind, type) and issubclass(kind, os.PathLike) else kind    # files, which JSON has not


PARAMETERS = {"chat": completion_create_params.CompletionCreateParamsNonStreaming, "messages": message_create_params.MessageCreateParamsNonStreaming,
              "responses": response_create_params.ResponseCreateParamsNonStreaming}
FORMATS = tuple(PARAMETERS)
CLIENTS = (*FORMATS, "completions")     #: a prompt of the older endpoint is told as a conversation; embeddings are none


@functools.cache
def adapter(format: str) -> pydantic.TypeAdapter[Any]:
    return pydantic.TypeAdapter(closed(PARAMETERS[format], {}))


@functools.cache
def untyped(format: str, text: str) -> tuple[str, ...]:
    """Where a body, as JSON, is not what the SDK's types say; of a union, the member that fits best."""
    try:
        adapter(format).validate_json(text, strict=True)
    except pydantic.ValidationError as error:
        faults = error.errors(include_url=False)
        deepest = max(len(fault["loc"]) for fault in faults)
        return tuple(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in faults if len(fault["loc"]) == deepest)[:3]
    return ()


# ---------------------------------------------------------------- what providers know beyond the SDK

#: (format, where, field): whose word it is, as preset globs, and what it is for.
DIALECT: dict[tuple[str, str, str], tuple[str, str]] = {
    ("messages", "top", "temperature"): ("*", "older models take it; the SDK's types no longer name it"),
    ("messages", "top", "top_p"): ("*", "older models take it; the SDK's types no longer name it"),
    ("messages", "top", "top_k"): ("*", "older models take it; the SDK's types no longer name it"),
    ("chat", "top", "reasoning"): ("openrouter together", "their switch for thinking"),
    ("chat", "top", "thinking"): ("deepseek moonshot zai", "their switch for thinking"),
    ("chat", "top", "enable_thinking"): ("qwen", "its switch for thinking"),
    ("chat", "top", "chat_template_kwargs"): ("vllm llamacpp", "their switch for thinking"),
    ("chat", "top", "top_k"): ("openrouter together fireworks ollama* vllm llamacpp lmstudio", "a sampling parameter of open models"),
    ("chat", "top", "random_seed"): ("mistral", "its name for seed"),
    ("chat", "message", "reasoning"): ("cerebras ollama ollama-cloud vllm lmstudio", "thinking goes back in it"),
    ("chat", "message", "reasoning_content"): ("deepseek moonshot zai llamacpp", "thinking goes back in it"),
    ("chat", "message", "prefix"): ("mistral", "marks the beginning of an answer"),
    ("chat", "message", "name"): ("mistral", "the tool that a result belongs to"),
    ("chat", "call", "extra_content"): ("gemini", "the signature of a call"),
    ("chat", "part", "cache_control"): ("openrouter", "marks of prompt caching"),
    ("chat", "result", "image_url"): ("moonshot vllm", "a tool's image stands in its result"),
    ("chat", "tool", "cache_control"): ("openrouter", "marks of prompt caching"),
    ("chat", "choice", "any"): ("mistral", "its word for required"),
}


def without_dialect(body: Json, profile: Any, used: set[tuple[str, str, str]]) -> Json:
    """The body without the provider's own words; `used` collects the rows of DIALECT that were needed."""
    def plain(where: str, fields: Json) -> Json:
        own = {name for name in fields for row in [(profile.format, where, name)]
               if row in DIALECT and any(fnmatch.fnmatchcase(profile.preset, glob) for glob in DIALECT[row][0].split()) and not used.add(row)}     # type: ignore[func-returns-value]
        return {name: value for name, value in fields.items() if name not in own}

    body = plain("top", {name: value for name, value in body.items() if name != "stream"})
    if profile.format == "chat":
        if isinstance(body.get("tool_choice"), str) and not plain("choice", {body["tool_choice"]: 1}):
            body["tool_choice"] = "required"
        body |= {"tools": [plain("tool", tool) for tool in body["tools"]]} if "tools" in body else {}
        messages = [{**message, "content": [part for part in message["content"] if plain("result", {part["type"]: 1})]}
                    if message["role"] == "tool" and isinstance(message["content"], list) else message for message in body["messages"]]
        messages = [plain("message", message) if message["role"] in ("assistant", "tool") else message for message in messages]
        body["messages"] = [{**message, **({"tool_calls": [plain("call", call) for call in message["tool_calls"]]} if "tool_calls" in message else {}),
                             **({"content": [plain("part", part) for part in message["content"]]} if isinstance(message.get("content"), list) else {})} for message in messages]
    return body


# ---------------------------------------------------------------- what providers reject

def schemas(body: Json) -> list[Json]:
    """The parameters of each tool of a Chat body."""
    return [tool["function"].get("parameters") or {} for tool in body.get("tools", ()) if tool["type"] == "function"]


def subschemas(schema: Any) -> Iterator[Json]:
    """A schema and all within it."""
    if isinstance(schema, dict):
        yield schema
        nested = [*(schema.get("properties") or {}).values(), *(schema.get("$defs") or {}).values(), schema.get("items"), *(schema.get("anyOf") or ())]
        for one in nested:
            yield from subschemas(one)


def parts(body: Json) -> list[Json]:
    return [part for message in body["messages"] if isinstance(message.get("content"), list) for part in message["content"]]


def calls(body: Json) -> list[Json]:
    return [call for message in body["messages"] for call in message.get("tool_calls") or ()]


Check = Callable[[Json, Any], bool]


def fields(*names: str) -> Check:
    return lambda body, profile: any(name in body for name in names)


def in_messages(*names: str) -> Check:
    return lambda body, profile: any(name in message for message in body["messages"] for name in names)


def for_models(globs: str, check: Check) -> Check:
    return lambda body, profile: any(fnmatch.fnmatchcase(profile.model, glob) for glob in globs.split()) and check(body, profile)


def developer(body: Json, profile: Any) -> bool:
    return any(message["role"] == "developer" for message in body["messages"])


def named_choice(body: Json, profile: Any) -> bool:
    return isinstance(body.get("tool_choice"), dict)


def unpaired(body: Json, profile: Any) -> bool:
    """Whether a tool result does not follow its call, in a Chat body."""
    waiting: set[str] = set()
    for message in body["messages"]:
        if message["role"] == "tool":
            if message["tool_call_id"] not in waiting:
                return True
            waiting.discard(message["tool_call_id"])
        elif waiting:
            return True
        else:
            waiting = {call["id"] for call in message.get("tool_calls") or ()}
    return bool(waiting)


def broken_turns(body: Json, profile: Any) -> bool:
    """What Anthropic refuses in messages: empty texts, neighbours of one role, an unanswered call, a result without its call, thinking without a signature."""
    waiting: set[str] = set()
    roles = [message["role"] for message in body["messages"] if message["role"] != "system"]
    for message in body["messages"]:
        blocks = message["content"] if isinstance(message["content"], list) else [{"type": "text", "text": message["content"]}]
        results = [block["tool_use_id"] for block in blocks if block["type"] == "tool_result"]
        if set(results) != waiting or any(block["type"] == "text" and not block["text"].strip() or block["type"] == "thinking" and not block.get("signature") for block in blocks):
            return True
        waiting = {block["id"] for block in blocks if block["type"] == "tool_use"}
    return bool(waiting) or roles[:1] != ["user"] or any(one == other for one, other in zip(roles, roles[1:]))


def lost_thinking(body: Json, profile: Any) -> bool:
    """Whether thinking may be on while a call since the user's last words came without its own."""
    last = max((index for index, message in enumerate(body["messages"]) if message["role"] == "user"), default=-1)
    lost = any("tool_calls" in message and "reasoning_content" not in message for message in body["messages"][last + 1:])
    return lost and (body.get("thinking") or {}).get("type") != "disabled"


REASONERS = "o1* o3* o4* gpt-5* gpt-6*"
NEW_CLAUDE = "*opus-4-7* *opus-4-8* *opus-5* *sonnet-5* *haiku-5-5* *haiku-5.5* *fable-5* *mythos*"
GROK_THINKS = "grok-4* grok-5* *-mini*"
#: (provider, format, rule in the reference's words, what breaks it).
RULES: tuple[tuple[str, str, str, Check], ...] = (
    ("cerebras", "chat", "max_completion_tokens", fields("max_tokens")),
    ("cerebras", "chat", "store", fields("store")),
    ("cerebras", "chat", "metadata", fields("metadata")),
    ("cerebras", "chat", "developer", developer),
    ("cerebras", "chat", "tools together with response_format", lambda body, profile: "tools" in body and "response_format" in body),
    ("cerebras", "chat", "image_url that is https", lambda body, profile: any(part.get("image_url", {}).get("url", "data:")[:5] != "data:" for part in parts(body))),
    ("cerebras", "chat", "tools that do not all carry the same strict", lambda body, profile: len({tool["function"].get("strict", False) for tool in body.get("tools", ())}) > 1),
    ("cerebras", "chat", "reasoning_content on history messages", in_messages("reasoning_content")),
    ("groq", "chat", "max_completion_tokens", fields("max_tokens")),
    ("groq", "chat", "developer", developer),
    ("groq", "chat", "store", fields("store")),
    ("groq", "chat", "metadata", fields("metadata")),
    ("groq", "chat", "cache_control", lambda body, profile: '"cache_control":' in json.dumps(body)),
    ("groq", "chat", "messages[].reasoning_content", in_messages("reasoning_content")),
    ("groq", "chat", "messages[].name", in_messages("name")),
    ("groq", "chat", "logit_bias", fields("logit_bias")),
    ("groq", "chat", "logprobs", fields("logprobs")),
    ("groq", "chat", "top_logprobs", fields("top_logprobs")),
    ("groq", "chat", "logprobs, top_logprobs, logit_bias, messages[].name", fields("logprobs", "top_logprobs", "logit_bias")),
    ("groq", "chat", "n other than 1", lambda body, profile: body.get("n", 1) != 1),
    ("groq", "chat", "unknown message properties", lambda body, profile: any(set(message) - {"role", "content", "tool_calls", "tool_call_id"} for message in body["messages"])),
    ("groq", "chat", "reasoning_effort none on gpt-oss", for_models("*gpt-oss*", lambda body, profile: body.get("reasoning_effort", "low") not in ("low", "medium", "high"))),
    ("groq", "chat", "include_reasoning together with", lambda body, profile: "include_reasoning" in body and "reasoning_format" in body),
    ("groq", "chat", "reasoning_format raw with tools", lambda body, profile: body.get("reasoning_format") == "raw" and ("tools" in body or "response_format" in body)),
    ("gemini", "chat", "store", fields("store")),
    ("gemini", "chat", "metadata, user", fields("metadata", "user")),
    ("gemini", "chat", "JSON-Schema keywords outside", lambda body, profile: any({"$schema", "additionalProperties", "exclusiveMinimum", "const", "oneOf"} & set(one)
                                                                              for schema in schemas(body) for one in subschemas(schema))),
    ("gemini", "chat", "Gemini 3 function-call turns", for_models("*gemini-3*", lambda body, profile: any("extra_content" not in (message.get("tool_calls") or [{"extra_content": 1}])[0]
                                                                                                       for message in body["messages"]))),
    ("gemini", "chat", "consecutive turns of one role", unpaired),
    ("openai", "chat", "max_tokens on reasoning models", for_models(REASONERS, fields("max_tokens"))),
    ("openai", "chat", "max_completion_tokens on every reasoning", for_models(REASONERS, fields("max_tokens"))),
    ("openai", "*", "temperature/top_p other", for_models(REASONERS, lambda body, profile: (body.get("reasoning_effort") or (body.get("reasoning") or {}).get("effort")) not in ("none",)
                                                         and (body.get("temperature", 1) != 1 or body.get("top_p", 1) != 1))),
    ("anthropic", "messages", "temperature, top_p, top_k on", for_models(NEW_CLAUDE, fields("temperature", "top_p", "top_k"))),
    ("anthropic", "messages", "thinking{type:enabled", for_models(NEW_CLAUDE, lambda body, profile: (body.get("thinking") or {}).get("type") == "enabled")),
    ("anthropic", "messages", "unsupported effort", for_models("*4-5* *4-6*", lambda body, profile: (body.get("output_config") or {}).get("effort") == "xhigh")),
    ("anthropic", "messages", "empty text blocks", broken_turns),
    ("anthropic", "messages", "max_tokens", lambda body, profile: not body.get("max_tokens")),
    ("anthropic", "messages", "messages alternate", broken_turns),
    ("huggingface", "chat", "max_tokens", fields("max_completion_tokens")),
    ("huggingface", "chat", "developer", developer),
    ("ollama", "chat", "max_tokens", fields("max_completion_tokens")),
    ("github-copilot", "messages", "strict tool schemas", lambda body, profile: "context_management" in body or any("strict" in tool for tool in body.get("tools", ()))),
    ("github-copilot", "messages", "web_search tools", lambda body, profile: any(tool.get("type", "").startswith("web_search") for tool in body.get("tools", ()))),
    ("github-copilot", "chat", "max_tokens on gpt-5", for_models("gpt-5* gpt-6*", fields("max_tokens"))),
    ("github-copilot", "chat", "store, developer role", lambda body, profile: "store" in body or developer(body, profile)),
    ("deepseek", "chat", "max_tokens", fields("max_completion_tokens")),
    ("deepseek", "chat", "developer", developer),
    ("deepseek", "chat", "store", fields("store")),
    ("deepseek", "chat", "thinking turns whose reasoning_content", lost_thinking),
    ("mistral", "chat", "max_tokens", fields("max_completion_tokens")),
    ("mistral", "chat", "max_completion_tokens", fields("max_completion_tokens")),
    ("mistral", "chat", "store", fields("store")),
    ("mistral", "chat", "stream_options (older), logit_bias", fields("stream_options", "logit_bias", "logprobs", "user", "seed")),
    ("mistral", "chat", "developer", developer),
    ("mistral", "chat", "tool_call_id should be", lambda body, profile: any(not re.fullmatch("[A-Za-z0-9]{9}", call["id"]) for call in calls(body))),
    ("mistral", "chat", "required is spelled any", lambda body, profile: body.get("tool_choice") == "required"),
    ("mistral", "chat", "assistant turn last unless", lambda body, profile: body["messages"][-1]["role"] == "assistant" and not body["messages"][-1].get("prefix") or unpaired(body, profile)),
    ("xai", "chat", "max_completion_tokens", fields("max_tokens")),
    ("xai", "chat", "store", fields("store")),
    ("xai", "chat", "logit_bias", fields("logit_bias")),
    ("xai", "responses", "reasoning.summary", lambda body, profile: "summary" in (body.get("reasoning") or {})),
    ("xai", "chat", "root anyOf/oneOf", lambda body, profile: any({"anyOf", "oneOf"} & set(schema) for schema in schemas(body))),
    ("xai", "chat", "reasoning_effort on models without", lambda body, profile: "reasoning_effort" in body and "mini" not in profile.model or body.get("reasoning_effort") == "minimal"),
    ("xai", "chat", "presence/frequency penalty", for_models(GROK_THINKS, fields("presence_penalty", "frequency_penalty", "stop"))),
    *((name, "chat", "max_tokens", fields("max_completion_tokens")) for name in ("together", "fireworks", "nvidia", "sambanova", "zai", "moonshot", "minimax", "qwen")),
    *((name, "chat", "store", fields("store")) for name in ("together", "fireworks", "nvidia", "sambanova", "zai", "moonshot", "qwen", "cloudflare", "llamacpp")),
    *((name, "chat", "developer", developer) for name in ("together", "fireworks", "nvidia", "sambanova", "zai", "moonshot", "minimax", "qwen", "cloudflare", "openrouter", "llamacpp")),
    ("nvidia", "chat", "parallel_tool_calls", fields("parallel_tool_calls")),
    ("sambanova", "chat", "n, logit_bias, penalties", fields("n", "logit_bias", "presence_penalty", "frequency_penalty")),
    ("moonshot", "chat", "missing reasoning_content on k3", lost_thinking),
    ("moonshot", "chat", "tool_choice required on some", lambda body, profile: body.get("tool_choice") == "required"),
    ("moonshot", "chat", "reasoning_effort before k3", for_models("*k2* *moonshot-v1*", fields("reasoning_effort"))),
    ("qwen", "chat", "enable_thinking true on a non-stream", for_models("*qwen3-*", lambda body, profile: bool(body.get("enable_thinking")) and not body.get("stream"))),
    ("lmstudio", "chat", "named tool_choice", named_choice),
    ("llamacpp", "chat", "named tool_choice", named_choice),
)


# ---------------------------------------------------------------- targets and bodies

def targets(format: str) -> list[Any]:
    """Profiles of every provider that has the format, by our presets or the reference; one of each kind of model."""
    spelled = {"messages": "anthropic"}.get(format, format)
    found: list[Any] = []
    for name, preset in a.PRESETS.items():
        facts = REFERENCE.get(name, {})
        told = facts.get("formats", {}).get(spelled)
        if preset.gone or "translate instead" in str(told) or format != preset.format and format not in preset.other_urls and not told:
            continue
        for model in dict.fromkeys([*(model.id for model in preset.models), *(model["id"] for model in facts.get("models", ())), "m"]):
            profile = a.profile_for(name, model, format)
            if all(profile._replace(model="") != other._replace(model="") for other in found):
                found.append(profile)
    return found


def faults(body: Json, profile: Any, used: set[tuple[str, str, str]]) -> list[str]:
    """What is wrong with a body for a target."""
    plain = without_dialect(body, profile, used)
    wrong = list(untyped(profile.format, json.dumps({**plain, "model": "m"})))
    broken = [rule for name, format, rule, check in RULES if name == profile.preset and format in (profile.format, "*") and check(body, profile)]
    return wrong + [f"breaks the rule {rule!r}" for rule in broken]


SCHEMA: Json = {"$schema": "http://json-schema.org/draft-07/schema#", "type": "object", "additionalProperties": False, "required": ["city"],
                "properties": {"city": {"type": "string", "const": "Lyon"}, "days": {"anyOf": [{"type": "integer", "exclusiveMinimum": 0}, {"type": "null"}]}}}
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR4nGP4z8DwHwAFAAH/iZk9HQAAAABJRU5ErkJggg=="
#: Bodies of our own, for a checkout without the recordings: (format, body).
BODIES: dict[str, tuple[str, Json]] = {
    "chat, everything that some provider rejects": ("chat", {
        "model": "m", "max_tokens": 4000, "temperature": 1.4, "top_p": 0.9, "top_k": 20, "seed": 3, "presence_penalty": 0.5, "frequency_penalty": 0.5, "logit_bias": {"50256": -100},
        "logprobs": True, "top_logprobs": 2, "user": "someone@example.org", "metadata": {"a": "b"}, "store": True, "service_tier": "on_demand", "verbosity": "low",
        "prompt_cache_key": "k", "safety_identifier": "s", "stop": ["a", "b", "c", "d", "e"], "parallel_tool_calls": False, "reasoning_effort": "minimal",
        "response_format": {"type": "json_schema", "json_schema": {"name": "weather", "strict": True, "schema": SCHEMA}}, "tool_choice": "required",
        "messages": [{"role": "developer", "content": "Be brief."}, {"role": "user", "name": "ann", "content": [{"type": "text", "text": "Weather?"}]},
                     {"role": "assistant", "content": None, "reasoning_content": "Look it up.", "tool_calls": [
                         {"id": "functions.weather:0", "type": "function", "function": {"name": "weather", "arguments": "{\"city\":\"Lyon\"}"}},
                         {"id": "call_" + "x" * 70, "type": "function", "function": {"name": "now", "arguments": ""}}]},
                     {"role": "tool", "tool_call_id": "call_" + "x" * 70, "content": "12:00"}, {"role": "tool", "tool_call_id": "functions.weather:0", "content": [{"type": "text", "text": "21"}]},
                     {"role": "developer", "content": "In French."}, {"role": "user", "content": "And now?"}],
        "tools": [{"type": "function", "function": {"name": "weather", "strict": True, "parameters": SCHEMA}}, {"type": "function", "function": {"name": "now"}}]}),
    "chat, a word for effort that only one provider has": ("chat", {"model": "m", "reasoning_effort": "default", "messages": [{"role": "user", "content": "Hi"}]}),
    "chat, an effort that nobody has": ("chat", {"model": "m", "reasoning_effort": "extreme", "messages": [{"role": "user", "content": "Hi"}]}),
    "chat, thinking switched on, an answer begun": ("chat", {"model": "m", "reasoning_effort": "high", "max_completion_tokens": 9000, "messages": [
        {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well, "}]}),
    "messages, Claude Code": ("messages", {
        "model": "claude-sonnet-5", "max_tokens": 32000, "stream": True, "thinking": {"type": "adaptive"}, "output_config": {"effort": "xhigh"}, "service_tier": "auto",
        "metadata": {"user_id": json.dumps({"device_id": "d", "account_uuid": "a", "session_id": "s-1"})}, "context_management": {"edits": []},
        "system": [{"type": "text", "text": "x-anthropic-billing-header: cch=1"}, {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
        "messages": [{"role": "user", "content": "read a"},
                     {"role": "assistant", "content": [{"type": "thinking", "thinking": "Use Read.", "signature": "EqQBCkYIARgCKkA="}, {"type": "text", "text": " "},
                                                       {"type": "tool_use", "id": "toolu_01Ab", "name": "Read", "input": {"p": "a"}}]},
                     {"role": "user", "content": [{"type": "text", "text": "quick"}, {"type": "tool_result", "tool_use_id": "toolu_01Ab", "is_error": True, "content": [
                         {"type": "text", "text": "no"}, {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PIXEL}}]}]}],
        "tools": [{"name": "Read", "description": "d", "input_schema": {"type": "object", "properties": {"p": {"type": "string"}}}, "cache_control": {"type": "ephemeral"}},
                  {"type": "bash_20250124", "name": "bash"}, {"type": "web_search_20250305", "name": "web_search"}],
        "tool_choice": {"type": "any", "disable_parallel_tool_use": True}}),
    "messages, sampling and a budget": ("messages", {
        "model": "claude-haiku-4-5", "max_tokens": 5000, "temperature": 1, "top_p": 0.97, "top_k": 40, "stop_sequences": ["END", " "], "thinking": {"type": "enabled", "budget_tokens": 2048},
        "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}, "messages": [{"role": "user", "content": [
            {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "It rains."}, "title": "Log"}, {"type": "text", "text": "Weather?"}]}]}),
    "responses, Codex": ("responses", {
        "model": "gpt-6-luna", "instructions": "You are Codex.", "store": False, "stream": True, "include": ["reasoning.encrypted_content"], "prompt_cache_key": "s-1", "tool_choice": "auto",
        "parallel_tool_calls": True, "reasoning": {"effort": "xhigh", "summary": "auto"}, "text": {"verbosity": "low"}, "client_metadata": {"a": "b"}, "max_output_tokens": 9000,
        "input": [{"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "sandbox: on"}]},
                  {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "list"}, {"type": "input_image", "image_url": f"data:image/png;base64,{PIXEL}"}]},
                  {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Search."}], "encrypted_content": "gAAAAABo"},
                  {"type": "function_call", "name": "search", "namespace": "mcp__docs", "arguments": "{\"q\":\"a\"}", "call_id": "call_x1y2z3w4v5u6"},
                  {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Searching."}]},
                  {"type": "function_call_output", "call_id": "call_x1y2z3w4v5u6", "output": "none"},
                  {"type": "custom_tool_call", "call_id": "call_p1", "name": "apply_patch", "input": "*** Begin Patch"}, {"type": "custom_tool_call_output", "call_id": "call_p1", "output": "done"}],
        "tools": [{"type": "namespace", "name": "mcp__docs", "description": "d", "tools": [{"type": "function", "name": "search", "parameters": {"type": "object", "properties": {}}}]},
                  {"type": "custom", "name": "apply_patch", "description": "Edit.", "format": {"type": "grammar", "syntax": "lark", "definition": "start: x"}},
                  {"type": "function", "name": "plan", "strict": True, "parameters": SCHEMA}, {"type": "web_search"}]}),
    "responses, a tier of one provider": ("responses", {"model": "m", "input": "Hi", "service_tier": "scale", "top_logprobs": 2, "temperature": 0.3, "user": "u"}),
    "responses, a schema beside a tool": ("responses", {"model": "m", "input": "Weather?", "tools": [{"type": "function", "name": "now", "parameters": None, "strict": False}],
                                                        "text": {"format": {"type": "json_schema", "name": "weather", "schema": SCHEMA, "strict": True}}}),
}

#: What no provider of another format can serve, as the client hears it, and why.
REFUSED: dict[str, str] = {
    "audio input is not supported by this provider": "only some Chat providers hear",
    "audio output is not supported for this model": "only some Chat providers speak",
    "n > 1 is not supported for this model": "Messages and Responses have one answer",
    "background mode is not supported": "only Responses has it",
    "file URLs cannot be sent to this provider": "Chat has files by their content, and the gateway fetches nothing",
    "file ids cannot be sent to this provider": "a file id means something to its own provider alone",
    "max_tokens must be at least 1.": "the client's own mistake, recorded with the provider's 400",
    "suffix: filling in needs a provider": "no other format fills in",
    "prompt: tokens and several prompts": "a conversation has one prompt, of text",
    "Previous response with id": "its text is kept by the provider that gave it",
}


def recorded() -> list[tuple[str, str, Json]]:
    """(id, format, body) of every recorded request."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(SHARED.glob("recordings/*/*.json"))]
    return [(one["id"], one["format"], one["request"]["body"]) for one in found if one["format"] in CLIENTS and one["endpoint"] == one["format"] and isinstance(one["request"]["body"], dict)]


def translate_all(bodies: list[tuple[str, str, Json]], format: str, used: set[tuple[str, str, str]]) -> tuple[list[str], set[str], int]:
    """Every body of another format for every target: what is wrong, the refusals that were heard, and how many bodies were made."""
    wrong, refusals, n_made = [], set(), 0
    for name, client, body in bodies:
        for profile in targets_of(format) if client != format else ():
            try:
                made, _ = a.translate_request(a.FORMATS[client].read_request(body), profile)
            except (a.UpstreamFailure, a.GatewayError) as failure:
                words = failure.detail if isinstance(failure, a.UpstreamFailure) else failure.message
                refusals.add(next((known for known in REFUSED if words.startswith(known)), f"{name} for {profile.preset}: {words}"))
                continue
            n_made += 1
            wrong += [f"{name} for {profile.preset}/{profile.model}: {fault}" for fault in faults(made, profile, used)]
    return wrong, refusals, n_made


targets_of = functools.cache(targets)


@pytest.mark.parametrize("format", FORMATS)
def test_our_own_requests_are_valid_for_every_provider(format: str) -> None:
    wrong, refusals, n_made = translate_all([(name, client, body) for name, (client, body) in BODIES.items()], format, set())
    assert wrong == [], "\n".join(wrong)
    assert refusals == set() and n_made >= 2 * len(targets_of(format)) > 10


@pytest.mark.skipif(not (SHARED / "recordings").is_dir(), reason=ABSENT)
@pytest.mark.parametrize("format", FORMATS)
def test_every_recorded_request_is_valid_for_every_provider(format: str) -> None:
    wrong, refusals, n_made = translate_all(recorded(), format, set())
    assert wrong == [], f"{len(wrong)} faults in {n_made} bodies\n" + "\n".join(wrong)
    assert refusals <= set(REFUSED) and n_made > 1000


@pytest.mark.skipif(not (SHARED / "recordings").is_dir(), reason=ABSENT)
def test_no_row_of_the_tables_is_idle() -> None:
    """Every word of DIALECT and every refusal is met, by the recordings or by our own bodies."""
    bodies = recorded() + [(name, client, body) for name, (client, body) in BODIES.items()]
    used: set[tuple[str, str, str]] = set()
    heard = {refusal for format in FORMATS for refusal in translate_all(bodies, format, used)[1]}
    assert (set(DIALECT) - used, set(REFUSED) - heard) == (set(), set())


#: Rules of the reference that no body can be held against, and why: beginnings of their words.
UNCHECKED: dict[str, str] = {
    "seed, logprobs and logit_bias partly": "partly is no rule",
    "unknown JSON names": "the types and DIALECT leave no room for unknown names",
    "unknown parameters": "the types and DIALECT leave no room for unknown names",
    "extra fields": "the types and DIALECT leave no room for unknown names",
    "some models answer only on /responses": "which format a model speaks is the configuration's",
    "wrong endpoint": "which format a model speaks is the configuration's",
    "anthropic-version": "a header",
    "--enable-auto-tool-choice": "a flag of the server",
    "--jinja": "a flag of the server",
    "tool_choice while thinking": "uncertain, and refused by no recorded exchange: a learned repair",
    "max_tokens above a few thousand": "uncertain: the limit is not told",
    "temperature other than the fixed one": "uncertain: the values are not told",
    "reasoning_effort unless the model documents it": "which models do is not told",
    "stream_options is accepted": "no rule",
    "max_tokens or max_completion_tokens": "both are taken",
    "max_completion_tokens or max_tokens": "both are taken",
    "native generationConfig": "both are taken on this path",
}


def rules_of(facts: Json) -> Iterator[str]:
    """What the reference says that a provider refuses or wants, one by one."""
    request = facts.get("request", {})
    for name in ("max_tokens_field", "tool_ids", "tool_choice"):
        yield from [request[name]] if name in request else ()
    for name in ("strip", "strip_openai_path", "rejects_400", "required"):
        yield from request.get(name, ())
    yield from request.get("rename_roles", {})


@pytest.mark.skipif(not REFERENCE, reason=ABSENT)
def test_every_rule_of_the_reference_is_checked_or_said_not_to_be() -> None:
    covered = {name: [rule for owner, _, rule, _ in RULES if owner == name] for name in a.PRESETS}
    missing = [f"{name}: {rule}" for name, facts in REFERENCE.items() if name in covered for rule in rules_of(facts)
               if not any(rule.startswith(known) or known in rule for known in covered[name]) and not any(rule.startswith(known) for known in UNCHECKED)]
    assert missing == []


def test_every_rule_is_about_a_provider_that_has_the_format() -> None:
    with_format = {(profile.preset, format) for format in FORMATS for profile in targets_of(format)}
    assert [row[:3] for row in RULES if row[1] != "*" and (row[0], row[1]) not in with_format] == []


def test_the_checks_see_what_is_wrong() -> None:
    """A body that breaks rules of types and of a provider is told for each of them."""
    profile = a.profile_for("groq", "openai/gpt-oss-120b")
    body = {"model": "m", "messages": [{"role": "user", "content": "Hi", "name": "x"}], "max_tokens": 5, "logprobs": True, "n": 2, "surprise": 1, "reasoning_effort": "none"}
    told = faults(body, profile, set())
    assert told[0].startswith("surprise: Extra inputs") and {fault for fault in told[1:]} >= {
        f"breaks the rule {rule!r}" for rule in ("max_completion_tokens", "logprobs", "messages[].name", "n other than 1", "reasoning_effort none on gpt-oss")}
    claude = a.profile_for("anthropic", "claude-opus-5", "messages")
    broken = {"model": "m", "max_tokens": 5, "temperature": 1.0, "messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {}}]}]}
    assert len(faults(broken, claude, set())) == 3
