"""Every recorded exchange replayed as a provider, to clients of all three formats, streamed and whole: nothing of it is lost.

The recordings, the program that plays them and the strict validator lie in ../shared beside the checkout; where they are not, the cases of our own in
tests/data/replay go through the same comparison (misses) and the same check of form (answers.faults).

Columns of a comparison: valid, text, calls, stop, usage, thinking; request (what reached the provider); status and message (of an error); broken (what is no
whole answer must not look like one). What cannot be carried is a row of NOT_CARRIED, and a row that is no longer needed is an error.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("openai", reason="the openai SDK is not installed: python -m pip install openai")
pytest.importorskip("anthropic", reason="the anthropic SDK is not installed: python -m pip install anthropic")
import answers
import pydantic
from answers import Said
from fakes import FAKE_KEY, Gateway, Provider, Reply, answer, frame, free_port, load_kit, stream

Json = dict[str, Any]
HERE = Path(__file__).resolve().parent
SHARED = HERE.parent.parent / "shared"
FORMATS = ("chat", "messages", "responses")
PATHS = {"chat": "/v1/chat/completions", "messages": "/v1/messages", "responses": "/v1/responses"}
OWN_CASES = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((HERE / "data" / "replay").glob("*.json"))]


class Row(NamedTuple):
    """Recordings that cannot be carried to some clients: in which columns, and why."""
    reason: str
    columns: str
    clients: str
    recordings: str
    modes: str = "streamed whole"       #: how the client asked; native: as recorded, other: not as recorded


ANY = "chat messages responses"
NOT_CARRIED = (
    # by design: what happened is told otherwise
    Row("it is the gateway's key that the provider refused, not the client's: 502, for clients log their user out on a 401", "status", ANY,
        "chat-json-error-401-0c837e0c chat-json-error-401-2730f874 chat-json-error-401-374eb32a chat-json-error-401-47dde188 chat-json-error-401-513e0f64 "
        "messages-json-error-401-92e9b5bf responses-json-error-400-d06665aa responses-json-error-401-79d53b16"),
    Row("that a request is too long is told to Messages clients in the words on which Claude Code compacts", "message", "messages",
        "chat-json-error-400-426e280b chat-json-error-400-cfcddc33"),
    Row("an unknown model is 404 to every client, whichever status the provider has for it", "status", ANY, "responses-json-error-400-bc3d22fa"),
    Row("end_turn and nothing said: an empty answer is a failure, another route may do better", "status", ANY, "chat-json-text-f3ff7a71"),
    Row("tokens spent on thinking, which xAI leaves out of completion_tokens, are part of the output", "usage", "messages responses",
        "chat-json-thinking-d9a6d935 chat-json-tool-call-5be0fca5 chat-sse-thinking-bd7f0bf3 chat-sse-tool-call-9c8a8e4f", "native"),
    Row("the provider told 0 tokens for a prompt, which cannot be: an estimate stands in, since Claude Code never compacts at 0", "usage", "chat messages",
        "responses-sse-text-3d2d4a61 responses-sse-tool-call-cd0483ae", "native"),
    Row("a call in Groq's failed_generation that names one of the request's tools is given to the client as that call", "broken", "messages responses",
        "chat-sse-thinking-9a175d06", "native"),
    Row("the kit does not read reasoning_details, where the thinking stands alone: it is told, though not expected", "thinking", "messages responses",
        "chat-json-citations-2216a7e6", "native"),
    Row("texts of one turn, or of neighbouring turns of one role, are joined by a line break for the provider; the kit joins them by nothing", "request", "messages responses",
        "chat-json-text-b57e7e9c"),
    Row("neighbouring turns of one role are made one for every provider, in which the kit sees one text where it had two", "request", "chat messages",
        "responses-json-tool-result-57c36869"),
    # bytes pass through, and with them what the provider does
    Row("passed through byte for byte: this provider tells usage beside the last words instead of in a chunk of its own", "valid", "chat",
        "chat-sse-text-af4a9f45 chat-sse-thinking-3fe664a1 chat-sse-thinking-ec6fb6a9 chat-sse-tool-call-b712a6a8 chat-sse-tool-call-bc6cdce5", "native"),
    Row("passed through byte for byte: Perplexity tells usage in every chunk", "valid", "chat", "chat-sse-text-e4702642", "native"),
    Row("passed through: a background answer that is not ready is what its client asked for", "broken", "responses",
        "responses-json-text-a0cf1eb9 responses-json-tool-result-5ddc824f", "native"),
    # the client's format has no place for it
    Row("a freeform call, to clients that declared a function: its text goes into the one argument", "calls", "messages responses", "chat-json-tool-call-931cf02b", "native"),
    Row("a text of refusal has a stop reason of its own in Messages, none in Chat", "stop", "messages", "chat-sse-refusal-f19999a7"),
    Row("Anthropic's refusal has no text but an explanation: that is the text of the refusal, and Chat and Responses end such an answer in stop", "text stop", "chat responses",
        "messages-json-text-204d17f2 messages-sse-text-04615365 messages-sse-text-ec8cb757", "native"),
    Row("local_shell and tool_search calls are run by the client: as functions elsewhere, while the kit counts them as calls nowhere", "calls stop", "chat messages",
        "responses-json-text-2c7ec48a responses-sse-text-10e1b04f responses-sse-text-aec4d303 responses-sse-text-bc8173f1", "native"),
    Row("two answers stand in this one file; a client reads the first and the kit the second", "text usage", ANY, "messages-sse-tool-call-046f6f81", "native"),
    # the kit
    Row("the replaying provider makes the other mode from text, calls and thinking alone: of this answer (sound, an image, hosted tools) nothing is left", "status", ANY,
        "chat-json-text-3300b35a messages-sse-text-dcad4f45 responses-json-text-2c7ec48a responses-json-text-55bf4f46 responses-json-text-9f8851fa "
        "responses-json-tool-result-781288d8 responses-sse-text-10e1b04f responses-sse-text-5f1d979e responses-sse-text-98769ebb responses-sse-text-aec4d303 "
        "responses-sse-text-bc8173f1", "other"),
)


# ---------------------------------------------------------------- one comparison

def spread(text: str) -> str:
    """`text` with every run of white space as one blank."""
    return re.sub(r"\s+", " ", text).strip()


def lifted(said: Said) -> Said:
    """An answer that thinks in tags, as a client of another format gets it: the thinking is thinking."""
    tagged = re.match(r"\s*<think>(.*?)(?:</think>\s*(.*)|\Z)", said.text, re.S)
    return Said(tagged[2] or "", said.calls, said.stop, said.usage, tagged[1] + said.thinking, said.error) if tagged else said


def misses(want: Said, got: Said) -> dict[str, str]:
    """The columns in which two answers differ, with what was wanted and what came. White space of thinking is not compared, nor what the provider did not tell."""
    pairs: dict[str, tuple[Any, Any]] = {"text": (want.text, got.text), "calls": (want.calls, got.calls), "thinking": (spread(want.thinking), spread(got.thinking))}
    if want.stop is not None:
        pairs["stop"] = ("tool" if want.calls and want.stop == "stop" else want.stop), ("tool" if got.calls and got.stop == "stop" else got.stop)
    if None not in want.usage:
        pairs["usage"] = (want.usage, got.usage)
    return {column: f"want {str(wanted)[:90]!r}, got {str(found)[:90]!r}" for column, (wanted, found) in pairs.items() if wanted != found}


# ---------------------------------------------------------------- recordings

def read_recordings() -> list[Json]:
    """Every recorded exchange at the endpoints of the three formats, none when the folder is absent."""
    found = [json.loads(path.read_text(encoding="utf-8")) for name in FORMATS for path in sorted(SHARED.glob(f"recordings/*/{name}-*.json"))]
    return [recording for recording in found if recording["endpoint"] in FORMATS]


RECORDINGS = read_recordings()
IDS = {recording["id"]: recording for recording in RECORDINGS}
needs_recordings = pytest.mark.skipif(not RECORDINGS, reason=f"{SHARED.name}/recordings is not beside this checkout")


@dataclass
class Stage:
    """A running gateway with one provider per recording, and what that provider was asked."""
    gateway: Gateway
    replay: Any
    conversations: dict[str, Json]

    def asked(self, recording: Json) -> Json | None:
        """What reached the provider last."""
        return next((entry for entry in reversed(self.replay.log) if entry["id"] == recording["id"]), None)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory, module_gateway_factory: Callable[..., Gateway]) -> Stage:
    replay = load_kit("replay").Replay(IDS)
    base = replay.start_thread(port=free_port())
    home = tmp_path_factory.mktemp("replay")
    load_kit("check").prepare_aicarousel(RECORDINGS, base, str(home))
    variables = dict(line.split("=", 1) for line in (home / ".env").read_text().split())
    gateway = module_gateway_factory(json.loads((home / "models.json").read_text()), env_file=variables)
    prepare_request_types()
    return Stage(gateway, replay, {recording["id"]: conversation_of(recording) for recording in RECORDINGS})


def prepare_request_types() -> None:
    """The kit's types of requests, made once; where they cannot be made of the SDK that is installed it checks pairing alone, and test_requests.py the types."""
    validate = load_kit("validate")
    for format in FORMATS:
        try:
            validate.request_adapter(format)
        except pydantic.errors.PydanticSchemaGenerationError:
            validate._req[format] = pydantic.TypeAdapter(Any)


def conversation_of(recording: Json) -> Json:
    """The recorded request in the kit's neutral form. Where it needs what only the provider kept, a greeting; tools that are called without being listed are added."""
    wire = load_kit("wire")
    body, greeting = recording["request"]["body"], {"role": "user", "parts": [{"t": "text", "text": "Hello"}]}
    told = wire.read_request(recording["format"], body) if isinstance(body, dict) else {**wire.read_request("chat", {}), "turns": [greeting]}
    parts = [part for turn in told["turns"] for part in turn["parts"]]
    called = {part["id"] for part in parts if part["t"] == "call"}
    if not parts or told["turns"][0]["role"] != "user" or all(part["t"] == "result" for part in parts) or any(part["t"] == "result" and part["id"] not in called for part in parts):
        told["turns"] = [greeting]
    listed = dict.fromkeys([tool["name"] for tool in told["tools"]] + [call["name"] for call in wire.semantics(recording["format"], recording["response"])["tool_calls"]])
    known = {tool["name"]: tool for tool in told["tools"]}
    tools = [known.get(name) or {"name": name, "description": "d", "schema": {"type": "object", "properties": {}}} for name in listed if name]
    return {**told, "tools": tools, "schema": None, "tool_choice": told["tool_choice"] if tools and isinstance(told["tool_choice"], str) else None}


def expected_of(recording: Json, client: str, streamed: bool) -> Said:
    """What the kit reads in the recorded bytes, and what its replaying provider makes of it in the other mode."""
    wire = load_kit("wire")
    read = wire.semantics(recording["format"], recording["response"])
    counts, native = read["usage"], streamed == recording["stream"]
    tokens_in = load_kit("check").total_in(recording["format"], counts)
    if not native:                      # it never tells 0, and always tells something
        tokens_in, counts = max(tokens_in or 0, 1) if recording["format"] != "messages" else tokens_in or 1, {"out": counts["out"] or 1}
    stop = {"stop_sequence": "stop", "pause": None, "error": None}.get(read["stop"], read["stop"])
    said = Said(read["text"] + read["refusal"], [(call["name"], call["args"]) for call in read["tool_calls"]], stop, (tokens_in, counts["out"]), read["thinking"])
    return lifted(said) if client != recording["format"] else said


def is_broken(recording: Json) -> bool:
    """Whether what was recorded is no whole answer: an error inside a 200, a stream that broke off, an answer that is not ready."""
    read = load_kit("wire").semantics(recording["format"], recording["response"])
    body = recording["response"].get("body")
    return (read["stop"] in (None, "error") and bool(read["error"] or not read["complete"])) or isinstance(body, dict) and body.get("status") in ("queued", "in_progress")


def can_be_made_over(recording: Json) -> bool:
    """Whether the replaying provider has the same answer in the other mode: of an error, or of what is no whole answer, there is none."""
    return recording["response"]["status"] < 400 and not is_broken(recording)


def own_faults(recording: Json, client: str, streamed: bool) -> set[str]:
    """Rules of the validator that the recording itself breaks; they pass through with it."""
    if client != recording["format"] or streamed != recording["stream"]:
        return set()
    return {issue["rule"] for issue in load_kit("validate").validate(client, recording["response"])}


def faults_of(recording: Json, client: str, reply: Reply, streamed: bool) -> str:
    """What the strict validator finds, and our own check where nothing passes through."""
    told = {"status": reply.status, "headers": reply.headers, **({"sse": reply.body.decode()} if reply.streamed else {"body": reply.json})}
    issues = [issue for issue in load_kit("validate").validate(client, told, True if streamed and client == "chat" else None) if issue["level"] == "error"]
    inherited = own_faults(recording, client, streamed) if issues else ()
    found = [f"{issue['rule']} {issue['where']} {issue['detail']}" for issue in issues if issue["rule"] not in inherited]
    if reply.status == 200 and client != recording["format"]:
        found += answers.faults(client, reply)
    return "; ".join(found[:3])


def replay(stage: Stage, recording: Json, client: str, streamed: bool) -> dict[str, str]:
    """One exchange: the columns in which it misses."""
    conversation, format = stage.conversations[recording["id"]], recording["format"]
    body = load_kit("wire").write_request(client, conversation, load_kit("check").name_aicarousel(recording, client), streamed)
    reply = stage.gateway.post(PATHS[client], body, headers={"anthropic-version": "2023-06-01"}, timeout=30.0)
    if recording["response"]["status"] >= 400:
        return compare_errors(recording, client, reply)
    if is_broken(recording):
        said = answers.read(client, reply)
        return {} if said.error else {"broken": f"looks whole: {said}"}
    if reply.status != 200 or reply.streamed != streamed:
        return {"status": f"HTTP {reply.status}, {'a stream' if reply.streamed else reply.body[:160].decode()}"}
    found = misses(expected_of(recording, client, streamed), answers.read(client, reply))
    wrong = faults_of(recording, client, reply, streamed)
    if wrong:
        found["valid"] = wrong
    asked = stage.asked(recording)
    held, notes = load_kit("check").upstream_ok(format, conversation, [asked] if asked else [], load_kit("validate").validate_request, recording["provider"])
    if not held:
        found["request"] = "; ".join(notes)[:200]
    return found


def compare_errors(recording: Json, client: str, reply: Reply) -> dict[str, str]:
    """A recorded error keeps its status and its words, in the client's own form."""
    status = recording["response"]["status"]
    words = spread((load_kit("wire").semantics(recording["format"], recording["response"])["error"] or {}).get("message") or "")[:60]
    words = re.split(r"\(?https?:", words + "ttps:" if words.endswith(" h") else words)[0].rstrip()         # links are not told
    found = {} if reply.status == status else {"status": f"want {status}, got {reply.status}"}
    if words not in spread(answers.read(client, reply).error):
        found["message"] = f"want {words!r}, got {reply.json['error']['message']!r}"
    wrong = faults_of(recording, client, reply, False)
    return {**found, "valid": wrong} if wrong else found


def excused(recording: Json, client: str, streamed: bool) -> dict[str, str]:
    """The columns that need not hold for one case, with the reason."""
    modes = {"streamed" if streamed else "whole", "native" if streamed == recording["stream"] else "other"}
    return {column: row.reason for row in NOT_CARRIED for column in row.columns.split()
            if recording["id"] in row.recordings.split() and client in row.clients.split() and modes & set(row.modes.split())}


GROUPS = list(itertools.product(FORMATS, FORMATS, (False, True)))


@needs_recordings
@pytest.mark.parametrize("wire,client,streamed", GROUPS, ids=[f"{wire}-to-{client}-{'streamed' if streamed else 'whole'}" for wire, client, streamed in GROUPS])
def test_every_recording_reaches_every_client(stage: Stage, wire: str, client: str, streamed: bool) -> None:
    recordings = [recording for recording in RECORDINGS if recording["format"] == wire and (streamed == recording["stream"] or can_be_made_over(recording))]
    with ThreadPoolExecutor(4) as workers:
        results = list(workers.map(lambda recording: replay(stage, recording, client, streamed), recordings))
    told = []
    for recording, found in zip(recordings, results):
        excuses, case = excused(recording, client, streamed), f"{recording['id']} ({recording['provider']}) {wire} -> {client} {'streamed' if streamed else 'whole'}"
        told += [f"{case}: {column}: {detail}" for column, detail in found.items() if column not in excuses]
        told += [f"{case}: {column} holds, its row in NOT_CARRIED is not needed: {reason}" for column, reason in excuses.items() if column not in found]
    assert not told, f"{len(told)} misses of {len(recordings)} recordings\n" + "\n".join(told)


@needs_recordings
def test_the_table_names_recordings_that_exist() -> None:
    named = [name for row in NOT_CARRIED for name in row.recordings.split()]
    assert [name for name in named if name not in IDS] == [] and all(len(row.reason) > 20 for row in NOT_CARRIED)


# ---------------------------------------------------------------- our own cases, with nothing but this checkout

TOOL = {"type": "object", "properties": {"q": {"type": "string"}}}
QUESTION = "What is it? (ü)"


def request_of(case: Json, client: str, streamed: bool) -> Json:
    """A question in the client's format, with the tools that the answer calls."""
    names = list(dict.fromkeys(name for name, _ in case["says"]["calls"]))
    head = {"model": f"{case['name']}/m", "stream": streamed}
    if client == "chat":
        tools = [{"type": "function", "function": {"name": name, "parameters": TOOL}} for name in names]
        head |= {"messages": [{"role": "user", "content": QUESTION}], **({"stream_options": {"include_usage": True}} if streamed else {})}
    elif client == "messages":
        tools = [{"name": name, "input_schema": TOOL} for name in names]
        head |= {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 500}
    else:
        tools = [{"type": "function", "name": name, "parameters": TOOL, "strict": False} for name in names]
        head |= {"input": QUESTION}
    return {**head, "tools": tools} if tools else head


def play_case(case: Json) -> Callable[[Any], Any]:
    """A script that answers a case streamed or whole, as it was asked."""
    frames = [frame(event, "" if case["format"] == "chat" else event["type"]) for event in case["events"]]
    return lambda request: stream(*frames, *([frame("[DONE]")] if case["format"] == "chat" else [])) if request.streamed else answer(case["whole"])


@pytest.fixture(scope="module")
def own(module_provider: Provider, module_gateway_factory: Callable[..., Gateway]) -> Iterator[tuple[Gateway, Provider]]:
    models = {case["name"]: {**({"preset": case["preset"]} if "preset" in case else {}), "baseUrl": module_provider.script(case["name"], play_case(case)),
                             "format": case["format"], "default": "m", "enableFallback": False, "models": ["m"], "keys": ["env:CASE_KEY"]} for case in OWN_CASES}
    yield module_gateway_factory({**models, "carousel": {"fallback": "none", "maxAttempts": 1}}, env_file={"CASE_KEY": FAKE_KEY}), module_provider


def wanted_of(case: Json, client: str) -> Said:
    """What a case says to a client; `to` holds what is rightly told otherwise to some."""
    told = {**case["says"], **case.get("to", {}).get(client, {})}
    said = Said(told["text"], [(name, called) for name, called in told["calls"]], told["stop"], (told["usage"][0], told["usage"][1]), told["thinking"])
    return lifted(said) if client != case["format"] else said


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("client", FORMATS)
@pytest.mark.parametrize("case", OWN_CASES, ids=[case["name"] for case in OWN_CASES])
def test_a_case_of_our_own_reaches_every_client(own: tuple[Gateway, Provider], case: Json, client: str, streamed: bool) -> None:
    gateway, provider = own
    body = request_of(case, client, streamed)
    reply = gateway.post(PATHS[client], body)
    assert (reply.status, reply.streamed) == (200, streamed), reply.body[:300]
    assert misses(wanted_of(case, client), answers.read(client, reply)) == {}
    if client != case["format"]:
        assert answers.faults(client, reply) == []
    else:                               # passed through as it is, odd or not
        assert [data for _, data in answers.frames(reply) if data != "[DONE]"] == case["events"] if streamed else reply.json == case["whole"]
    sent = provider.calls(case["name"])[-1].json
    assert QUESTION in json.dumps(sent, ensure_ascii=False) and bool(sent.get("stream")) is streamed
    assert [tool.get("function", tool)["name"] for tool in sent.get("tools", ())] == [tool.get("function", tool)["name"] for tool in body.get("tools", ())]


def test_a_passing_request_loses_what_the_provider_rejects(own: tuple[Gateway, Provider]) -> None:
    gateway, provider = own
    case = next(case for case in OWN_CASES if case["name"] == "messages_stop_sequence")
    body = {**request_of(case, "messages", False), "context_management": {"edits": []}, "new": {"x": 1}}
    reply = gateway.post(PATHS["messages"], body)
    assert provider.calls(case["name"])[-1].json == {**request_of(case, "messages", False), "model": "m", "new": {"x": 1}}
    assert reply.json == case["whole"] and reply.headers["x-aicarousel-dropped"] == "context_management"


def test_the_comparison_sees_each_kind_of_loss() -> None:
    whole = Said("a", [("f", {"x": 1})], "tool", (3, 4), "t")
    losses = {"text": Said("b", whole.calls, "tool", (3, 4), "t"), "calls": Said("a", [("f", {"x": 2})], "tool", (3, 4), "t"), "stop": Said("a", whole.calls, "length", (3, 4), "t"),
              "usage": Said("a", whole.calls, "tool", (3, 5), "t"), "thinking": Said("a", whole.calls, "tool", (3, 4), "")}
    assert misses(whole, whole) == {} and all(list(misses(whole, other)) == [column] for column, other in losses.items())
    assert lifted(Said("<think>\nx\n</think>\n\ny")) == Said("y", thinking="\nx\n") and lifted(Said("<think>x")) == Said("", thinking="x") and lifted(Said("a <think>")) == Said("a <think>")
