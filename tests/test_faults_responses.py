"""The matrix of faults for clients that speak Responses: in front of Chat providers and of one that speaks Responses too."""

from __future__ import annotations

from faults import *  # noqa: F403  (the tests of every client format)

CLIENT = "responses"
