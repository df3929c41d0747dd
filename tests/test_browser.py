"""A page of another origin cannot spend a token or read a byte: shown in headless Chromium, which skips where it is not installed.

The page knows the gateway's address, and even a valid key; the provider behind the gateway counts what reaches it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from browser import Site, browser  # noqa: F401  (a fixture)
from fakes import FAKE_KEY, TEXT, Gateway, Provider, chat_body, healthy
from house import entry


@pytest.fixture(scope="module")
def gateway(module_provider: Provider, module_gateway_factory: Callable[..., Gateway]) -> Gateway:
    return module_gateway_factory({"a": entry(module_provider.script("a", healthy()))}, {"FAKE_KEY": FAKE_KEY})


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    site = Site(lambda path: "<!doctype html><title>evil</title><body>a page of another origin</body>")
    yield site
    site.close()


FETCH = """
const [url, options, done] = arguments;
const told = {};
fetch(url, options).then(async answer => done({type: answer.type, status: answer.status, text: await answer.text(), headers: [...answer.headers]}), error => done({error: String(error)}));
"""
BODY = json.dumps(chat_body("a/m"))
READ = ("/", "/health", "/v1/models", "/admin/stats")
#: What a page may put into fetch(); KEY is a valid key of the gateway's.
WAYS: dict[str, dict[str, Any]] = {
    "cors, JSON": {"method": "POST", "body": BODY, "headers": {"content-type": "application/json", "authorization": "Bearer KEY"}},
    "cors, simple": {"method": "POST", "body": BODY, "headers": {"content-type": "text/plain"}},
    "cors, with credentials": {"method": "POST", "body": BODY, "credentials": "include", "headers": {"content-type": "application/json", "x-api-key": "KEY"}},
    "no-cors, simple": {"method": "POST", "mode": "no-cors", "body": BODY, "headers": {"content-type": "text/plain"}},
    "no-cors, asks for JSON": {"method": "POST", "mode": "no-cors", "body": BODY, "headers": {"content-type": "application/json", "authorization": "Bearer KEY"}},
    "no-cors, form": {"method": "POST", "mode": "no-cors", "body": BODY, "headers": {"content-type": "application/x-www-form-urlencoded"}},
    "no body type": {"method": "POST", "mode": "no-cors", "body": BODY},
    "kept alive": {"method": "POST", "mode": "no-cors", "body": BODY, "keepalive": True},
    "same-origin mode": {"method": "POST", "mode": "same-origin", "body": BODY, "headers": {"content-type": "application/json"}},
}


def check_nothing_read(told: dict[str, Any]) -> None:
    """An error, or an opaque answer that has no text, no status and no headers."""
    assert "error" in told or told == {"type": "opaque", "status": 0, "text": "", "headers": []}, told


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("address", ["127.0.0.1", "localhost"])
def test_chromium_fetch_spends_nothing(browser: Any, site: Site, gateway: Gateway, module_provider: Provider, name: str, address: str) -> None:  # noqa: F811
    before = len(module_provider.requests)
    browser.get(site.url())
    options = json.loads(json.dumps(WAYS[name]).replace("KEY", gateway.key))
    check_nothing_read(browser.execute_async_script(FETCH, f"http://{address}:{gateway.port}/v1/chat/completions", options))
    assert len(module_provider.requests) == before


@pytest.mark.parametrize("mode", ["cors", "no-cors"])
@pytest.mark.parametrize("path", READ)
def test_chromium_fetch_reads_nothing(browser: Any, site: Site, gateway: Gateway, mode: str, path: str) -> None:  # noqa: F811
    browser.get(site.url())
    headers = {"x-api-key": gateway.key} if mode == "cors" else {}
    for page in (f"{gateway.url}{path}", f"http://localhost:{gateway.port}{path}"):
        check_nothing_read(browser.execute_async_script(FETCH, page, {"mode": mode, "headers": headers}))


FORM = """
const [url, kind, body, done] = arguments;
const form = document.createElement('form'), field = document.createElement('input'), frame = document.createElement('iframe');
Object.assign(form, {action: url, method: 'POST', enctype: kind});
field.name = body.slice(0, -1) + ',"x":"'; field.value = '"}';
form.append(field);
document.body.append(form);
if (kind.startsWith('framed ')) {
    frame.name = form.target = 'inner'; form.enctype = kind.slice(7);
    document.body.append(frame);
    frame.onload = () => done('sent');
    form.submit();
} else { form.submit(); done('sent'); }
"""


@pytest.mark.parametrize("place", ["", "framed "])
@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_chromium_form_spends_nothing(browser: Any, site: Site, gateway: Gateway, module_provider: Provider, kind: str, place: str) -> None:  # noqa: F811
    """A form whose text is the JSON of a request, in each of the encodings a form has; what is shown is the refusal."""
    before = len(module_provider.requests)
    browser.get(site.url())
    assert browser.execute_async_script(FORM, f"{gateway.url}/v1/chat/completions", place + kind, BODY) == "sent"
    if not place:
        ends_at = time.monotonic() + 10.0
        while not browser.current_url.startswith(gateway.url) and time.monotonic() < ends_at:
            time.sleep(0.02)
        assert "Pages of other origins may not call this server" in browser.page_source
    assert len(module_provider.requests) == before


def test_chromium_rebinding_gets_nothing(browser: Any, gateway: Gateway, module_provider: Provider) -> None:  # noqa: F811
    """A name of the page's that has come to mean this machine: the page is then of the gateway's own origin as far as the browser knows."""
    before = len(module_provider.requests)
    page = f"http://rebound.test:{gateway.port}"
    browser.get(f"{page}/")
    assert "does not go by the name" in browser.page_source
    for path in READ:
        told = browser.execute_async_script(FETCH, f"{page}{path}", {"headers": {"x-api-key": gateway.key}})
        assert told["status"] == 421 and "does not go by the name" in told["text"] and "a/m" not in told["text"]
    told = browser.execute_async_script(FETCH, f"{page}/v1/chat/completions", {"method": "POST", "body": BODY, "headers": {"content-type": "application/json", "x-api-key": gateway.key}})
    assert told["status"] == 421 and len(module_provider.requests) == before


EMBED = """
const [base, tag, attribute, paths, done] = arguments;
const seen = [];
for (const path of paths) {
    const part = document.createElement(tag);
    part.onload = () => seen.push('load'); part.onerror = () => seen.push('error');
    if (tag === 'link') part.rel = 'stylesheet';
    part[attribute] = base + path;
    document.body.append(part);
}
const look = () => seen.length >= paths.length ? done(seen) : setTimeout(look, 20); look();
"""


@pytest.mark.parametrize(("tag", "attribute"), [("img", "src"), ("script", "src"), ("link", "href"), ("video", "src")])
def test_chromium_embeds_nothing(browser: Any, site: Site, gateway: Gateway, tag: str, attribute: str) -> None:  # noqa: F811
    """Pictures, scripts and styles of the gateway's do not load in another's page: not even whether it is there shows by them."""
    browser.get(site.url())
    assert set(browser.execute_async_script(EMBED, gateway.url, tag, attribute, list(READ))) == {"error"}


def test_chromium_socket_opens_nothing(browser: Any, site: Site, gateway: Gateway) -> None:  # noqa: F811
    browser.get(site.url())
    told = browser.execute_async_script("const [url, done] = arguments; const line = new WebSocket(url); line.onopen = () => done('open'); line.onerror = () => done('error');", f"ws://127.0.0.1:{gateway.port}/v1/responses")
    assert told == "error"


def test_chromium_beacon_and_events_get_nothing(browser: Any, site: Site, gateway: Gateway, module_provider: Provider) -> None:  # noqa: F811
    before = len(module_provider.requests)
    browser.get(site.url())
    browser.execute_script("navigator.sendBeacon(arguments[0], new Blob([arguments[1]], {type: 'text/plain'}))", f"{gateway.url}/v1/chat/completions", BODY)
    told = browser.execute_async_script("const [url, done] = arguments; const line = new EventSource(url); line.onmessage = () => done('message'); line.onerror = () => done('error');", f"{gateway.url}/v1/models")
    assert told == "error" and len(module_provider.requests) == before


def test_chromium_own_page_is_served(browser: Any, gateway: Gateway) -> None:  # noqa: F811
    """The proof would prove nothing if this browser could not reach the gateway at all: from the gateway's own origin it can."""
    browser.get(f"{gateway.url}/")
    told = browser.execute_async_script(FETCH, f"{gateway.url}/v1/chat/completions", {"method": "POST", "body": BODY, "headers": {"content-type": "application/json", "x-api-key": gateway.key}})
    assert told["status"] == 200 and TEXT in json.loads(told["text"])["choices"][0]["message"]["content"]
