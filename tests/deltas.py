"""What the deltas of a finished stream must be like, whichever reader made them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Json = dict[str, Any]
_CONTENT = frozenset({"text", "think", "call", "refuse", "opaque"})


def check_deltas(deltas: Sequence[Json]) -> list[str]:
    """Where a finished stream breaks the contract of the deltas, [] when it is kept."""
    wrong: list[str] = []
    kinds = [delta["delta"] for delta in deltas]
    for index, (kind, delta) in enumerate(zip(kinds, deltas)):
        if kind == "start" and index:
            wrong.append(f"{index}: start is not first")
        if kind in ("text", "think", "refuse", "args") and not delta["text"]:
            wrong.append(f"{index}: {kind} is empty")
        if kind == "call" and not (delta["id"] and delta["name"]):
            wrong.append(f"{index}: call without id or name")
        if kind in ("args", "note") and _since_content(kinds[:index]) != "call":
            wrong.append(f"{index}: {kind} outside a call")
        if kind in ("text", "refuse", "call", "opaque", "stop") and _last_thinking(kinds[:index]) == "think":
            wrong.append(f"{index}: thinking was not sealed")
        if kind in ("stop", "error") and index != len(kinds) - 1:
            wrong.append(f"{index}: {kind} is not last")
    ids = [delta["id"] for delta in deltas if delta["delta"] == "call"]
    if len(set(ids)) != len(ids):
        wrong.append("a call id occurs twice")
    if kinds and kinds[-1] not in ("stop", "error"):
        wrong.append("no end")
    return wrong


def _since_content(kinds: list[str]) -> str:
    """The latest kind that opened something."""
    return next((kind for kind in reversed(kinds) if kind in _CONTENT or kind == "seal"), "")


def _last_thinking(kinds: list[str]) -> str:
    return next((kind for kind in reversed(kinds) if kind in ("think", "seal", "text", "refuse", "call", "opaque")), "")
