"""The page in a real headless Chromium: what a person does with it, by mouse, by keyboard, on a phone."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ficoco_vllm.demo_model import examples
from tests.support.server import API_KEY, DEMO_KEEP, Server

pytest.importorskip("selenium", reason="selenium is not installed (requirements/dev.lock)")

from selenium.webdriver.common.keys import Keys

from tests.support.browser import Browser, chromium, why_missing

NUM_PATCHES = 576
EXAMPLE = examples()[2]
LEFT, KEPT = 30, 1  # of the example: a patch that leaves and one that stays

pytestmark = [
    pytest.mark.server,
    pytest.mark.long,
    pytest.mark.needs(why_missing() is None, f"the page's tests: {why_missing()}"),
]


def open_page(browser: Browser, server: Server) -> None:
    """Load it and give the key that it asks for."""
    browser.driver.get(f"{server.url}/ficoco/")
    browser.wait(lambda: browser.find("#key-field").is_displayed())
    assert not browser.find("#ask").is_enabled()
    browser.find("#key").send_keys(API_KEY, Keys.ENTER)
    browser.wait(lambda: browser.text("#model") == "ficoco-demo")
    # The browser itself notes that the first call was answered with 401.
    assert all("options" in said and "401" in said for said in browser.complaints())


def ask(browser: Browser, image: Path = EXAMPLE.image, question: str = EXAMPLE.question) -> None:
    """Drop an image and ask."""
    browser.drop("#drop", image)
    browser.wait(lambda: browser.find("#preview").is_displayed())
    browser.find("#question").clear()
    browser.find("#question").send_keys(question)
    browser.find("#ask").click()
    browser.wait(lambda: browser.find("#ask").is_enabled())
    assert browser.text("#error") == ""
    assert browser.find("#way").is_displayed()


def patch(browser: Browser, token: int) -> Any:
    return browser.find(f'.patch[data-token="{token}"]')


def count(browser: Browser, name: str) -> int:
    return len(browser.all(f".patch.{name}"))


def to_layer(browser: Browser, index: int) -> None:
    browser.run(
        "const layer = document.getElementById('layer'); layer.value = arguments[0];"
        "layer.dispatchEvent(new Event('input'));",
        index,
    )


@pytest.fixture(scope="module")
def page(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A desktop browser with the answers about the example."""
    with chromium(tmp_path_factory.mktemp("profile")) as browser:
        open_page(browser, server)
        ask(browser)
        yield browser
        assert browser.complaints() == []


def test_two_answers_side_by_side(page: Browser) -> None:
    full, reduced = (card.text.splitlines() for card in page.all(".answer"))
    assert full[:2] == [f"All {NUM_PATCHES} visual tokens", EXAMPLE.answer]
    assert reduced[:2] == [f"FiCoCo-V, {DEMO_KEEP} kept", EXAMPLE.answer]
    assert full[3] == str(NUM_PATCHES)
    assert reduced[3] == str(DEMO_KEEP)
    tops = {card.location["y"] for card in page.all(".answer")}
    assert len(tops) == 1
    assert page.text("dl dt:nth-of-type(4)") == "KV cache"


def test_layer_by_layer(page: Browser) -> None:
    left = {0: 0, 1: 128, 2: 256, 3: 384, 4: 512}
    for index, gone in left.items():
        to_layer(page, index)
        assert count(page, "is-left") + count(page, "is-now") == gone
        assert count(page, "is-now") == (128 if index else 0)
    assert page.text("#caption") == "4 of 4: 7th layer of the vision tower, 128 leave, 64 stay"
    page.find("#previous").click()
    assert page.text("#caption").startswith("3 of 4")


def test_it_plays(page: Browser) -> None:
    to_layer(page, 4)
    page.find("#play").click()
    assert page.text("#caption").startswith("before any reduction")
    page.wait(lambda: page.text("#caption").startswith("4 of 4"), seconds=20)
    assert page.find("#play").get_attribute("aria-label") == "Play the layers"


def test_a_click_shows_where_information_went(page: Browser) -> None:
    to_layer(page, 4)
    patch(page, LEFT).click()
    assert page.text("#detail h3") == "Row 2, column 7"
    assert "Left in the" in page.text("#detail")
    assert patch(page, LEFT).get_attribute("aria-selected") == "true"
    targets = page.all(".patch.is-target")
    assert targets
    border = page.run("return getComputedStyle(arguments[0]).boxShadow", patch(page, LEFT))
    assert "rgb(211, 34, 42)" in border
    # The way back: the target names the chosen patch among what it took in.
    targets[0].click()
    assert LEFT in [int(cell.get_attribute("data-token")) for cell in page.all(".patch.is-origin")]
    assert "Kept to the end" in page.text("#detail")


def test_keyboard(page: Browser) -> None:
    to_layer(page, 4)
    assert len(page.all('.patch[tabindex="0"]')) == 1
    patch(page, 0).click()
    page.run("arguments[0].focus()", patch(page, 0))
    active = page.driver.switch_to.active_element
    for keys, token in (
        (Keys.ARROW_RIGHT, 1),
        (Keys.ARROW_DOWN, 25),
        (Keys.END, 47),
        (Keys.ARROW_RIGHT, 47),
        (Keys.HOME, 24),
        (Keys.ARROW_UP, 0),
        (Keys.ARROW_UP, 0),
    ):
        page.driver.switch_to.active_element.send_keys(keys)
        active = page.driver.switch_to.active_element
        assert active.get_attribute("data-token") == str(token)
    active.send_keys(Keys.ARROW_RIGHT, Keys.NULL)
    page.driver.switch_to.active_element.send_keys(Keys.ENTER)
    assert page.text("#detail h3") == "Row 1, column 2"
    page.driver.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert count(page, "is-chosen") == 0


def test_every_control_has_a_name(page: Browser) -> None:
    unnamed = page.run(
        """return [...document.querySelectorAll("button, input, select, textarea, [role=gridcell]")].filter((element) =>
          !(element.getAttribute("aria-label") || element.textContent.trim() || element.labels?.length)
        ).map((element) => element.outerHTML)"""
    )
    assert unnamed == []


def test_shares_are_followed_as_the_server_does(page: Browser) -> None:
    """The page's own arithmetic against the destinations that the server sends."""
    worst = page.driver.execute_async_script(
        """const [key, image, question, done] = arguments;
        (async () => {
          const { whereIs } = await import("./trace.js");
          const src = document.getElementById("picture").src;
          const body = JSON.stringify({ image: src, question, compare: false });
          const headers = { "Content-Type": "application/json", Authorization: `Bearer ${key}` };
          const answer = await (await fetch("explain", { method: "POST", headers, body })).json();
          let worst = 0;
          for (const item of answer.destinations) {
            const { shares, lost } = whereIs(answer.layers, item.token, answer.layers.length);
            const traced = new Map(shares);
            for (const [token, share] of item.targets) {
              worst = Math.max(worst, Math.abs(share - (traced.get(token) ?? 0)));
            }
            worst = Math.max(worst, Math.abs(lost - item.lost - item.rest));
          }
          return [answer.destinations.length, worst];
        })().then(done, (error) => done([String(error), 1]));""",
        API_KEY,
        None,
        EXAMPLE.question,
    )
    assert worst[0] == NUM_PATCHES - DEMO_KEEP
    assert worst[1] < 1e-3  # five digits a layer


def test_an_answer_is_text_and_never_markup(page: Browser) -> None:
    """An answer, a method and an error that look like HTML, from a server that means it ill."""
    evil = "<img src=x onerror='window.broken = 1'><script>window.broken = 1</script>"
    page.run(
        """const evil = arguments[0];
        window.original = window.fetch;
        window.fetch = async (path) => {
          const side = { answer: evil, method: evil, visual_tokens: 4, last_visual_tokens: 4, prompt_tokens: 9,
            completion_tokens: 1, ttft_seconds: 1, total_seconds: 1, kv_bytes: 1 };
          return new Response(JSON.stringify({ model: evil, question: evil, method: evil, keep: 4, grid: [2, 2],
            central_square: null, reduced: side, full: side, layers: [], destinations: [] }));
        };""",
        evil,
    )
    page.find("#ask").click()
    page.wait(lambda: len(page.all(".patch")) == 4)
    assert page.text(".answer .said") == evil
    page.run(
        """const evil = arguments[0];
        window.fetch = async () => new Response(JSON.stringify({ error: { message: evil } }), { status: 400 });""",
        evil,
    )
    page.find("#ask").click()
    page.wait(lambda: page.text("#error"))
    assert page.text("#error") == evil
    assert page.run("return window.broken ?? null") is None
    assert len(page.all("main img")) == 2
    page.run("window.fetch = window.original")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_readable_on_a_phone(server: Server, tmp_path: Path, scheme: str) -> None:
    with chromium(tmp_path / "profile", scheme, (390, 844)) as browser:
        open_page(browser, server)
        ask(browser)
        assert browser.run("return document.documentElement.scrollWidth") <= 390
        small = browser.run(
            """return [...document.querySelectorAll("button, select, textarea")].filter((element) =>
              element.checkVisibility() && element.getBoundingClientRect().height < 32 && !element.closest("ol")
            ).map((element) => element.id)"""
        )
        assert small == []
        assert browser.run("return getComputedStyle(document.body).fontSize") == "16px"
        luminance = browser.run(CONTRAST)
        assert min(luminance.values()) >= 4.5, luminance
        background = browser.run("return getComputedStyle(document.body).backgroundColor")
        assert background == ("rgb(246, 246, 243)" if scheme == "light" else "rgb(20, 23, 26)")
        assert browser.complaints() == []


# Contrast of text against its background, WCAG 2.2, for samples of every kind of text on the page.
CONTRAST = """
const channels = (color) => color.match(/[\\d.]+/g).map(Number);
const luminance = (color) => channels(color).slice(0, 3).map((c) => c / 255)
  .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
  .reduce((sum, c, index) => sum + c * [0.2126, 0.7152, 0.0722][index], 0);
const background = (element) => {
  const color = getComputedStyle(element).backgroundColor;
  return (channels(color)[3] ?? 1) > 0 ? color : background(element.parentElement);
};
const contrasts = {};
for (const name of ["h1", "#model", "label", "#keep-value", ".primary", ".answer h2", ".said", ".answer dt",
    ".answer dd", "#caption", "#detail", ".legend li", "select", "textarea"]) {
  const element = [...document.querySelectorAll(name)].find((one) => one.checkVisibility());
  const [one, other] = [getComputedStyle(element).color, background(element)].map(luminance).sort((a, b) => b - a);
  contrasts[name] = (one + 0.05) / (other + 0.05);
}
return contrasts;
"""


def test_what_is_no_image_is_said(server: Server, tmp_path: Path) -> None:
    """And a server that cannot be reached."""
    text = tmp_path / "notes.txt"
    text.write_text("no image")
    with chromium(tmp_path / "profile") as browser:
        open_page(browser, server)
        browser.find("#question").send_keys("what is this?")
        browser.find("#ask").click()
        assert browser.text("#error") == "Choose an image first."
        browser.drop("#drop", text)
        browser.wait(lambda: "notes.txt is not an image" in browser.text("#error"))
        browser.find("#file").send_keys(str(EXAMPLE.image))
        browser.wait(lambda: browser.find("#preview").is_displayed())
        assert browser.text("#error") == ""
        browser.run("window.fetch = async () => { throw new TypeError('Failed to fetch'); }")
        browser.find("#ask").click()
        browser.wait(lambda: browser.text("#error") == "Failed to fetch")
        assert browser.complaints() == []
