"""The page of `/` and that of /docs in headless Chromium, which skips where it is not installed: what they show, by keyboard alone, in every width and theme.

The house behind them is in this process, so that the test moves its clock; the page asks every two seconds, and at once where a test calls its look().
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest

import aicarousel
from browser import browser  # noqa: F401  (a fixture)
from fakes import HANG_S, ROLE, Pause, Provider, answer, chat_body, chat_stream, content, healthy, in_turn, stream
from house import House

keys = pytest.importorskip("selenium.webdriver.common.keys", reason="selenium is not installed").Keys
Build = Callable[..., House]
MARKUP = "<img src=x onerror=window.hit=1><b id=bold>"
SLOW_DOWN = answer({"error": {"message": f"Slow down {MARKUP}", "code": "rate_limit_exceeded"}}, 429, [("retry-after", "120")])


class Page:
    """The page in the browser, and what a person does with it."""

    def __init__(self, browser: Any, house: House, path: str = "/") -> None:
        self.browser, self.house, self.url = browser, house, f"http://127.0.0.1:{house.port}"
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": 1280, "height": 1000, "deviceScaleFactor": 1, "mobile": False})
        browser.execute_cdp_cmd("Emulation.setFocusEmulationEnabled", {"enabled": True})        # whatever the test before left it at
        for kind in ("browser", "performance"):
            browser.get_log(kind)                       # what the tests before left
        browser.get(self.url + path)

    def run(self, script: str, *arguments: object) -> Any:
        return self.browser.execute_script(script, *arguments)

    def all(self, css: str) -> list[str]:
        """The texts of what is shown."""
        return self.run("return [...document.querySelectorAll(arguments[0])].filter(one => one.checkVisibility()).map(one => one.innerText)", css)

    def text(self, css: str) -> str:
        return "\n".join(self.all(css))

    def press(self, *words: str) -> None:
        """Keys, to whatever has the focus."""
        self.browser.switch_to.active_element.send_keys(*words)

    def focus(self) -> str:
        """What has the focus: its id, else its text."""
        return self.run("const one = document.activeElement; return one === document.body ? '' : one.id || one.innerText")

    def wait(self, check: Callable[[], Any]) -> Any:
        ends_at = time.monotonic() + HANG_S
        while not (found := check()):
            assert time.monotonic() < ends_at, self.text("body")
            time.sleep(0.02)
        return found

    def look(self) -> None:
        """Have it ask now, statistics too, and show what it is told."""
        self.run("look.statsAt = 0; return look()")

    def enter(self) -> None:
        """The admin key, typed."""
        key, _ = aicarousel.create_key(self.house.database, "admin", limits={"admin": True})
        self.press(key, keys.ENTER)
        self.wait(lambda: self.all("#p-heat h3"))

    def check_console(self, *expected: str) -> None:
        """Nothing was complained of, but for what holds one of these words."""
        said = [entry["message"] for entry in self.browser.get_log("browser")]
        assert not [message for message in said if not any(word in message for word in expected)]

    def state(self, route: str) -> str:
        return self.text(f'[data-route="{route}"] .state')


def test_it_loads_without_an_error_or_a_foreign_request(build: Build, browser: Any) -> None:  # noqa: F811
    house = build(a=healthy())
    page = Page(browser, house)
    page.enter()
    page.browser.get(f"{page.url}/docs")
    page.check_console()
    asked = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [message["params"]["request"]["url"] for message in asked if message["method"] == "Network.requestWillBeSent"]
    assert f"{page.url}/" in urls and f"{page.url}/admin/routes" in urls and f"{page.url}/docs" in urls
    assert not [url for url in urls if not url.startswith((f"{page.url}/", "data:"))]


def test_a_provider_goes_into_cooldown_and_comes_back(build: Build, browser: Any) -> None:  # noqa: F811
    house = build(a=in_turn(SLOW_DOWN, healthy()), b=healthy(), carousel={"strategy": "priority"})
    page = Page(browser, house)
    page.enter()
    assert page.state("a/1:m") == "serving" and "1 of 1 free" in page.text('[data-provider="a"]')
    assert house.chat("aicarousel").status == 200
    page.wait(lambda: page.state("a/1:m").startswith("cooling 1"))          # by itself, in two seconds
    assert "0 of 1 free" in page.text('[data-provider="a"]') and "last error: rate" in page.text('[data-provider="a"]') and page.state("b/1:m") == "serving"
    house.pass_time(121.0)
    page.wait(lambda: page.state("a/1:m") == "serving")
    assert "last error" not in page.text('[data-provider="a"]')
    page.check_console()


def test_a_live_request_appears_and_goes(build: Build, browser: Any, provider: Provider) -> None:  # noqa: F811
    house = build(a=stream(ROLE, content("one"), Pause("more"), *chat_stream("two")[1:]))
    page = Page(browser, house)
    page.enter()
    assert page.all("#live tr") == ["Nothing is under way."] and page.all("#none tr") == ["None since the start."] and page.all("#last tr") == []
    with house.start_chat("a/m") as client:
        provider.wait_paused("more")
        page.look()
        [row] = page.wait(lambda: page.all("#live [data-request]"))
        assert "a/m" in row and "chat, streamed" in row and "answering" in row
        provider.release("more")
        client.read_all()
    page.look()
    page.wait(lambda: not page.all("#live [data-request]"))
    [row] = page.wait(lambda: page.all("#last [data-request]"))
    assert "served" in row and "a/1:m" in row and page.all("#none tr") == []


def test_the_plots_show_what_stats_prints(build: Build, browser: Any, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    price = {"input": 1.5, "output": 6.0}
    house = build(a=healthy(), b=healthy(), entries={"a": {"models": [{"id": "m", "price": price}]}, "b": {"default": "n", "models": ["n"]}})
    for model in ("a/m", "a/m", "b/n"):
        assert house.chat(model).status == 200
    house.wait_rows(3)

    def stats(*words: str) -> Any:
        assert aicarousel.main(["stats", "--json", "--days", "30", "--home", str(house.folder), *words]) == 0
        return json.loads(capsys.readouterr().out)

    def drawn(css: str) -> list[float]:
        return [float(value) for value in page.run("return [...document.querySelectorAll(arguments[0])].map(one => one.dataset.value || one.dataset.total)", css)]

    def tokens(row: Any) -> float:
        return row["input"] + row["cached"] + row["cache_write"] + row["output"]

    page = Page(browser, house)
    page.enter()
    days, by_model, by_key = stats("--by", "day", "--heatmap"), stats("--by", "model"), stats("--by", "key")
    total, [today] = days["total"], days["groups"]
    assert drawn("#p-tokens [data-total]") == [tokens(total)] and tokens(total) > 0 and total["cost_usd"] > 0
    assert drawn("#p-tokens .b-in")[-1] == today["input"] + today["cached"] + today["cache_write"] and drawn("#p-tokens .b-out")[-1] == today["output"]
    assert len(drawn("#p-tokens .b-in")) == 30 and sum(drawn("#p-tokens b")) == tokens(total)
    assert drawn("#p-cost [data-total]") == [total["cost_usd"]] and sum(drawn("#p-cost b")) == pytest.approx(total["cost_usd"])
    for name, told in (("model", by_model), ("key", by_key)):
        shown = dict(zip(page.run("return [...document.querySelectorAll(arguments[0])].map(one => one.dataset.name)", f"#p-{name} tr[data-name]"), drawn(f"#p-{name} [data-value]")))
        assert shown == {row[name]: tokens(row) for row in told["groups"]}
    assert drawn("#p-heat [data-value]") == [count for row in days["hours"] for count in row] and sum(drawn("#p-heat [data-value]")) == 3
    page.run("at('days').value = '7'; at('days').dispatchEvent(new Event('change'))")
    page.wait(lambda: len(drawn("#p-tokens .b-in")) == 7)


def test_what_has_no_known_price_costs_an_unknown_sum(build: Build, browser: Any) -> None:  # noqa: F811
    house = build(a=healthy())
    assert house.chat("a/m").status == 200
    house.wait_rows(1)
    page = Page(browser, house)
    page.enter()
    assert page.text("#p-cost figcaption").endswith("unknown") and "1 request without a known price" in page.text("#p-cost")


def test_the_key_is_asked_for_once_and_kept_in_the_tab_until_it_is_forgotten(build: Build, browser: Any) -> None:  # noqa: F811
    house = build(a=healthy())
    page = Page(browser, house)
    assert page.focus() == "key" and page.all("#shown") == []
    page.enter()
    assert page.all("#ask") == []
    page.browser.refresh()
    page.wait(lambda: page.all("#shown"))
    assert page.all("#ask") == [] and page.run("return localStorage.length + document.cookie.length") == 0 and page.run("return Object.keys(sessionStorage)") == ["key"]
    page.run("at('forget').click()")
    assert page.all("#shown") == [] and page.focus() == "key" and page.run("return sessionStorage.length + at('carousel').childNodes.length + at('last').childNodes.length") == 0
    page.browser.refresh()
    page.wait(lambda: page.all("#ask"))
    assert page.all("#shown") == []
    page.check_console()


@pytest.mark.parametrize(("shown", "told"), [("sk-" + "0" * 64, "Invalid API key"), ("", "This takes an admin key")], ids=["unknown", "not of an admin"])
def test_a_wrong_key_says_so(build: Build, browser: Any, shown: str, told: str) -> None:  # noqa: F811
    house = build(a=healthy())
    page = Page(browser, house)
    page.press(shown or house.key, keys.ENTER)
    page.wait(lambda: told in page.text("#trouble"))
    assert page.all("#shown") == [] and page.focus() == "key" and page.run("return sessionStorage.length + at('key').value.length") == 0
    page.enter()
    assert page.text("#trouble") == ""
    page.check_console("401", "403")


def test_what_cannot_be_a_key_is_not_sent(build: Build, browser: Any) -> None:  # noqa: F811
    page = Page(browser, build(a=healthy()))
    page.press("sk-\u043a\u043b\u044e\u0447", keys.ENTER)
    assert page.run("return at('key').validity.patternMismatch && sessionStorage.length === 0")


def test_it_says_when_the_gateway_does_not_answer_and_goes_on(build: Build, browser: Any) -> None:  # noqa: F811
    house = build(a=healthy())
    page = Page(browser, house)
    page.enter()
    nothing = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    page.browser.execute_cdp_cmd("Network.emulateNetworkConditions", {"offline": True, **nothing})
    page.look()
    page.wait(lambda: page.text("#trouble") == "The gateway does not answer.")
    assert page.state("a/1:m") == "serving"
    page.browser.execute_cdp_cmd("Network.emulateNetworkConditions", {"offline": False, **nothing})
    page.look()
    page.wait(lambda: not page.text("#trouble"))


def test_by_keyboard_alone(build: Build, browser: Any) -> None:  # noqa: F811
    house = build(a=SLOW_DOWN, b=healthy(), carousel={"strategy": "priority"})
    house.gateway.recipes = lambda: {"One": "first {url} {key}", "Two": "second", "Three": "third"}
    first = house.chat("aicarousel").headers["x-aicarousel-request-id"]
    page = Page(browser, house)
    page.enter()

    def go(*words: str) -> list[str]:
        """What gets the focus one after the other, until nothing has it."""
        reached: list[str] = []
        while (page.press(*words), page.focus())[1] and len(reached) < 30:
            reached.append(page.focus())
        return reached

    assert go(keys.TAB) == ["days", first, "One", "recipe", "copy"]
    assert go(keys.SHIFT + keys.TAB)[-7:] == ["copy", "recipe", "One", first, "days", "forget", "API"]
    while page.focus() != first:
        page.press(keys.TAB)
    page.press(keys.ENTER)
    page.wait(lambda: "tried, in order" in page.text("#last pre"))
    # What comes meanwhile takes neither the focus nor what is open.
    second = house.chat("aicarousel").headers["x-aicarousel-request-id"]
    page.look()
    page.wait(lambda: page.all("#last button") == [second, first])
    page.look()
    page.look()
    assert page.focus() == first and "tried, in order" in page.text("#last pre") and len(page.all("#last pre")) == 1
    page.press(keys.SPACE)
    page.wait(lambda: page.all("#last pre") == [])
    while page.focus() != "One":
        page.press(keys.TAB)
    assert page.text("#recipe") == f"first {page.url} sk-..."
    for arrow, name, text in ((keys.ARROW_RIGHT, "Two", "second"), (keys.ARROW_LEFT, "One", "first"), (keys.ARROW_LEFT, "Three", "third")):
        page.press(arrow)
        assert page.focus() == name and page.text("#recipe").startswith(text) and page.all("[aria-selected=true]") == [name]
    page.press(keys.TAB)
    assert page.focus() == "recipe"
    page.press(keys.TAB, keys.ENTER)
    page.wait(lambda: page.text("#copy") == "Copied")
    page.wait(lambda: page.text("#copy") == "Copy")
    page.check_console()


def test_copy_puts_the_recipe_where_it_can_be_pasted(build: Build, browser: Any) -> None:  # noqa: F811
    house = build(a=healthy())
    house.gateway.recipes = aicarousel.page_recipes
    page = Page(browser, house)
    page.run("navigator.clipboard.writeText = () => Promise.reject(new Error('not allowed')); at('copy').click()")
    page.wait(lambda: page.text("#copy") == "Selected")
    assert page.run("return String(getSelection())").startswith("# ~/.claude")
    page.run("delete navigator.clipboard.writeText")
    page.browser.execute_cdp_cmd("Browser.grantPermissions", {"origin": page.url, "permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]})
    assert page.all("[role=tab]") == [client.title for client in aicarousel.CLIENTS.values()]
    for number, text in enumerate(aicarousel.page_recipes().values()):
        page.run("document.querySelectorAll('[role=tab]')[arguments[0]].click(); at('copy').click()", number)
        wanted = text.replace("{url}", page.url).replace("{key}", "sk-...")
        read = "navigator.clipboard.readText().then(arguments[0], error => arguments[0](String(error)))"
        page.wait(lambda: page.browser.execute_async_script(read) == wanted)
        assert page.text("#copy") == "Copied"


def test_markup_from_elsewhere_is_shown_as_text(build: Build, browser: Any) -> None:  # noqa: F811
    house = build(a=SLOW_DOWN, entries={"a": {"models": [f"m{MARKUP}"], "default": f"m{MARKUP}"}}, carousel={"maxWait": 0})
    key, _ = aicarousel.create_key(house.database, f"team {MARKUP}")
    house.request("POST", "/v1/chat/completions", chat_body(f"a/m{MARKUP}"), key=key)
    house.wait_rows(1)
    page = Page(browser, house)
    page.enter()
    page.run("document.querySelector('#last button').click()")
    page.wait(lambda: page.all("#last pre"))
    for place in ("#carousel", "#last", "#last pre", "#p-model", "#p-key"):
        assert MARKUP in page.text(place), place
    assert f"Slow down {MARKUP}" in page.text("#carousel")
    assert page.run("return [window.hit === undefined, document.querySelectorAll('#bold, img').length]") == [True, 0]
    page.check_console()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_nothing_is_wider_than_the_screen(build: Build, browser: Any, provider: Provider, theme: str) -> None:  # noqa: F811
    house = build(a=SLOW_DOWN, c=healthy(), b=stream(Pause("head")), entries={"b": {"models": ["m", "a-model-with-a-name-that-is-" + "very-" * 20 + "long"]}}, carousel={"strategy": "priority", "maxWait": 0})
    house.gateway.recipes = aicarousel.page_recipes
    assert [house.chat(name).status for name in ("a/m", "c/" + "w" * 150)] == [200, 200]
    with house.start_chat("b/m"):
        provider.wait_calls("b")
        page = Page(browser, house)
        page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": theme}]})
        page.enter()
        page.run("document.querySelectorAll('#last button').forEach(one => one.click())")
        page.wait(lambda: page.all("#last pre") and page.all("#live [data-request]"))
        assert page.run("return getComputedStyle(document.body).backgroundColor") == ("rgb(246, 247, 249)" if theme == "light" else "rgb(17, 21, 28)")
        for path in ("/", "/docs"):
            if path == "/docs":
                page.browser.get(page.url + path)
                page.run("document.querySelectorAll('details').forEach(one => { one.open = true; })")
            for width in (360, 820, 1400):
                page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False})
                assert page.run("return [innerWidth, Math.max(document.documentElement.scrollWidth - document.documentElement.clientWidth, 0)]") == [width, 0], path
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_a_request_is_tried_from_the_docs_and_its_answer_streams_in(build: Build, browser: Any, provider: Provider) -> None:  # noqa: F811
    house = build(a=stream(ROLE, content("caf\u00e9 "), Pause("more"), *chat_stream(MARKUP)[1:]))
    page = Page(browser, house, "/docs")
    page.run("at('key').focus()")
    page.press(house.key, keys.ENTER)
    calls = page.all("summary b")
    assert calls[0] == "POST /v1/chat/completions" and len(calls) == len(aicarousel._API)
    page.run("document.querySelector('summary').focus()")
    page.press(keys.ENTER)
    page.wait(lambda: page.all("details textarea"))
    page.run("document.querySelector('details button.main').focus()")
    page.press(keys.ENTER)
    page.wait(lambda: '"content":"caf' in page.text("details pre").replace(" ", ""))
    shown = page.text("details pre")
    assert shown.startswith("200 OK\ncontent-type: text/event-stream") and "x-aicarousel-request-id: " in shown and "[DONE]" not in shown
    provider.release("more")
    page.wait(lambda: "[DONE]" in page.text("details pre"))
    assert page.run("return [window.hit === undefined, document.querySelectorAll('#bold, img').length, document.querySelector('details button.main').disabled]") == [True, 0, False]
    page.check_console()
