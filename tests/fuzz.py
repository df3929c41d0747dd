"""Coverage-guided fuzzing of the pure parsers, by hand: python tests/fuzz.py [--seconds 1200] [TARGET ...]   (needs the package atheris)

Each target takes bytes and calls the module; an exception that is not the module's own refusal, or a second without an answer, is a finding.
What was found to reach new code is kept, smallest first, in tests/data/fuzz/TARGET.json (Latin-1 strings); tests/test_fuzz.py replays it.
"""

from __future__ import annotations

import argparse
import base64
import copy
import importlib
import json
import math
import random
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
KEPT = HERE / "data" / "fuzz"
KEPT_BYTES = 22_000         #: of one target
sys.path[:0] = [str(HERE), str(HERE.parent)]
if __name__ == "__main__" and "--run" in sys.argv:
    atheris = importlib.import_module("atheris")        # for this tool alone
    with atheris.instrument_imports(include=["aicarousel"]):
        import aicarousel as a
else:
    import aicarousel as a

UTC = 1_790_000_000.0
JUNK: list[Any] = [None, True, False, 0, -1, 2**63, 1e308, 0.5, "", "x", "\ud800", "\x00", [], {}, [None], [[]], [{}], {"a": None}, {"type": "text"}, {"role": "user"}, "auto", "a" * 300]


# ---------------------------------------------------------------- changing JSON in its structure

def paths(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value."""
    yield here
    for key, child in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from paths(child, (*here, key))


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def put(value: Any, path: tuple[Any, ...], other: Any) -> Any:
    """A copy of `value` with `other` in one place."""
    if not path:
        return other
    made = copy.copy(value)
    made[path[0]] = put(value[path[0]], path[1:], other)
    return made


def mutated(value: Any, rng: random.Random) -> Any:
    """`value` with one thing in it replaced, moved, doubled, renamed or taken away."""
    places = list(paths(value))
    path = rng.choice(places)
    found, how = at(value, path), rng.randrange(6)
    if how == 0 and path and isinstance(at(value, path[:-1]), (dict, list)):
        rest = copy.copy(at(value, path[:-1]))
        del rest[path[-1]]
        return put(value, path[:-1], rest)
    if how == 1:
        return put(value, path, at(value, rng.choice(places)))
    if how == 2 and isinstance(found, list):
        return put(value, path, found * rng.choice([2, 3]))
    if how == 3 and isinstance(found, dict):
        return put(value, path, {**found, rng.choice(["type", "role", "content", "id", "name", "input", "novel"]): rng.choice(JUNK)})
    if how == 4 and isinstance(found, list):
        return put(value, path, [*found, rng.choice(JUNK)])
    return put(value, path, rng.choice(JUNK))


# ---------------------------------------------------------------- targets

def pieces_of(data: bytes) -> list[bytes]:
    """The bytes behind the first, cut into pieces of that many (0: one piece)."""
    size, rest = data[0] if data else 0, data[1:]
    return [rest[place:place + size] for place in range(0, len(rest), size)] if size else [rest]


def sse(data: bytes) -> None:
    """Cuts change nothing, and only the cap on one event refuses."""
    def read(pieces: list[bytes]) -> list[Any] | str:
        reader, events = a.EventReader(), []
        try:
            for piece in pieces:
                events += reader.feed(piece)
        except a.UpstreamFailure as failure:
            return failure.reason
        return [(event.name, event.data) for event in events + reader.close()]
    assert read(pieces_of(data)) == read([data[1:]])


def stream(data: bytes) -> None:
    """A provider's stream in each format, read as the relay does for each client."""
    for wire in a.FORMAT_NAMES:
        client = "messages" if wire == "chat" else "chat"
        fmt, asked = a.FORMATS[client], a.Asked({**a.new_hub(client, "asked", True), "turns": [], "meta": {"include_usage": True}}, seed="s")
        way = a.Translation(a.FORMATS[wire].reader(a.Source(a.Profile(format=wire), "s", fmt.call_prefix)), fmt.writer(asked), n_prompt_tokens=25)
        out = b"".join([way.feed(piece) for piece in pieces_of(data)]) + way.close()
        assert way.done or way.broken or way.error is not None
        assert way.content or out == b""


def reset(data: bytes) -> None:
    """Waits are numbers or nothing, in every place they can be told."""
    text = data.decode("utf-8", "replace")
    value, _, rest = text.partition("\n")
    try:
        parsed = json.loads(rest)
    except (ValueError, RecursionError):
        parsed = None
    waits = [a.read_wait(value, UTC), *(a.read_reset({name: value, **{name.replace("reset", "remaining"): "0"}}, parsed, rest, utc=UTC)
                                        for name in ("retry-after", "retry-after-ms", "x-ratelimit-reset-requests"))]
    assert all(wait is None or math.isfinite(wait) for wait in waits), waits
    for told in a.read_limits("groq", [(f"x-ratelimit-{name}-requests", value) for name in ("limit", "remaining", "reset")], UTC):
        assert math.isfinite(told.span_s)
    a.read_refusal(text, "rate")


def error(data: bytes) -> None:
    """An error body of any shape becomes an envelope of every format."""
    status = (200, 400, 401, 403, 404, 413, 422, 429, 500, 503)[data[0] % 10] if data else 500
    body = data[1:]
    a.error_text(body)
    for preset in ("", "gemini", "openrouter"):
        failure = a.classify(preset, "model", status, {}, body, utc=UTC)
        assert failure.reason and (failure.cool_s is None or math.isfinite(failure.cool_s))
        a.find_cure(failure, {"model": "m", "messages": [], "max_tokens": 5})
        a.find_shrink(failure, {"model": "m", "messages": [], "max_tokens": 5})
        provider = a.Provider("p", None, "http://127.0.0.1:1/v1", "chat", "m", True, (), ())
        attempt = a.Attempt(a.make_route(provider, a.Credential("p/1"), a.Model("m")), 0.0, failure.status, failure.reason, failure.detail, 3)
        told = a.answer_for([failure], [attempt])
        assert 400 <= told.status < 600
        for fmt in a.FORMATS.values():
            a.dump_json(fmt.envelope(told))


PROFILES = [a.Profile(), a.profile_for("openai", "gpt-5.5", "responses"), a.profile_for("anthropic", "claude-sonnet-4-6", "messages"), a.profile_for("gemini", "gemini-3.5-flash-lite")]


def request_reader(client: a.Format) -> Callable[[bytes], None]:
    def read(data: bytes) -> None:
        """A body is refused, or made for every kind of provider."""
        try:
            body, _ = a.take_wish(a.FORMATS[client].check(a.parse_body(data)))
            hub = a.FORMATS[client].read_request(body)
        except (a.GatewayError, a.UpstreamFailure) as refused:
            assert 400 <= refused.status < 500
            return
        for profile in PROFILES:
            try:
                a.dump_json(a.translate_request(hub, profile)[0])
            except (a.GatewayError, a.UpstreamFailure) as refused:
                assert 400 <= refused.status < 500
    return read


TARGETS: dict[str, Callable[[bytes], None]] = {"sse": sse, "stream": stream, "reset": reset, "error": error, **{client: request_reader(client) for client in a.FORMAT_NAMES}}


# ---------------------------------------------------------------- running

def seeds(name: str) -> list[bytes]:
    """Where to begin: what is kept, and what other tests have."""
    from dialects import Telling
    kept = [text.encode("latin-1") for text in json.loads((KEPT / f"{name}.json").read_text())] if (KEPT / f"{name}.json").exists() else []
    if name in ("sse", "stream"):
        tellings = [Telling(wire) for wire in a.FORMAT_NAMES]
        whole = [b"".join([*told.begin(), *told.think("a"), *told.say("Hel", "lo"), *told.call("add", '{"a":', "1}"), *told.end()]) for told in tellings]
        return [*kept, *(bytes([size]) + body for size in (0, 1, 7) for body in [*whole, *(b"".join(told.error()) for told in tellings)])]
    if name == "reset":
        return [*kept, *(text.encode() for text in ("12", "1m30s", "2026-10-01T00:00:00Z", "Wed, 21 Oct 2026 07:28:00 GMT", "1790000100000", "x\nPlease try again in 9m38.016s.",
                                                    'x\n{"error":{"details":[{"retryDelay":"13s"}],"metadata":{"headers":{"X-RateLimit-Reset":"1790000000"}}}}'))]
    from test_properties import RICH, shapes_of
    if name == "error":
        return [*kept, *(bytes([status]) + body for status in range(10) for body in shapes_of("Rate limit of 5 requests per minute, max_tokens must be below 8192", "rate_limit_error", "x").values())]
    return [*kept, json.dumps(RICH[name]).encode()]


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Half the time by structure, where there is one."""
    rng = random.Random(seed)
    head = 0 if data[:1] == b"{" else 1
    try:
        if rng.random() < 0.6:
            return (data[:head] + json.dumps(mutated(json.loads(data[head:]), rng)).encode())[:max_size]
    except (ValueError, RecursionError):
        pass
    return atheris.Mutate(data, max_size)


def run(name: str, folder: Path, seconds: int) -> None:
    """Fuzzes in a process of its own, as libFuzzer never returns. What is found is written down once per place, and fuzzing goes on."""
    seen: set[str] = set()

    def target(data: bytes) -> None:
        began = time.perf_counter()
        trouble = ""
        try:
            TARGETS[name](data)
        except Exception as error:
            trouble = f"{type(error).__name__} at {traceback.extract_tb(error.__traceback__)[-1].lineno}"
            told = traceback.format_exc()
        if time.perf_counter() - began > 1.0:
            trouble, told = "slow", f"{time.perf_counter() - began:.1f} s"
        if trouble and trouble not in seen:
            seen.add(trouble)
            (folder / "findings" / f"{len(seen)}").write_text(f"{trouble}\n{base64.b64encode(data).decode()}\n{told}")

    atheris.Setup([sys.argv[0], str(folder / "found"), f"-max_total_time={seconds}", "-timeout=10", "-max_len=6000", "-rss_limit_mb=3000", f"-artifact_prefix={folder}/findings/", "-print_final_stats=1"],
                  target, custom_mutator=mutate)
    atheris.Fuzz()


def lines_run(name: str, data: bytes) -> set[int]:
    """The lines of the module that a target runs for `data`."""
    lines: set[int] = set()

    def trace(frame: Any, event: str, _: Any) -> Any:
        if frame.f_code.co_filename != a.__file__:
            return None
        lines.add(frame.f_lineno)
        return trace

    sys.settrace(trace)
    try:
        TARGETS[name](data)
    except Exception:       # it is kept for that
        lines.add(-1)
    finally:
        sys.settrace(None)
    return lines


def keep(name: str, inputs: list[bytes]) -> None:
    """Writes down the inputs that between them run every line that was run, the smallest first, as far as there is room."""
    known: set[int] = set()
    kept: list[str] = []
    for data in sorted(inputs, key=lambda data: (len(data), data)):
        fresh = lines_run(name, data) - known
        text = data.decode("latin-1")
        if fresh and len(json.dumps([*kept, text])) <= KEPT_BYTES:
            known |= fresh
            kept.append(text)
    (KEPT / f"{name}.json").write_text(json.dumps(kept, indent=0) + "\n")


def fuzz(name: str, seconds: int) -> bool:
    """Fuzzes one target and keeps what reached new code; whether nothing was found."""
    with tempfile.TemporaryDirectory(prefix="aicarousel-fuzz-") as made:
        folder = Path(made)
        (folder / "found").mkdir()
        (folder / "findings").mkdir()
        for number, seed in enumerate(seeds(name)):
            (folder / "found" / f"seed{number}").write_bytes(seed)
        ended = subprocess.run([sys.executable, __file__, "--run", name, made, str(seconds)], capture_output=True, text=True)
        print(name, "exit", ended.returncode, *(line.removeprefix("stat::") for line in ended.stderr.splitlines() if line.startswith(("stat::number", "stat::new"))), flush=True)
        findings = sorted((folder / "findings").iterdir())
        for finding in findings:
            print(f"FOUND in {name}: {finding.read_bytes().decode('utf-8', 'replace')}\n", flush=True)
        keep(name, [path.read_bytes() for path in (folder / "found").iterdir()])
        return ended.returncode == 0 and not findings


def main() -> int:
    if "--run" in sys.argv:
        run(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", choices=[*TARGETS, []], help="all of them when none is named")
    parser.add_argument("--seconds", type=int, default=1200, help="for all targets together")
    arguments = parser.parse_args()
    names = arguments.targets or list(TARGETS)
    return 0 if all([fuzz(name, max(1, arguments.seconds // len(names))) for name in names]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
