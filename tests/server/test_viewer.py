"""The page in a real headless Chromium: what a person does with it, by mouse, by keyboard, on a phone."""

import base64
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ficoco_vllm.demo_model import examples
from tests.support.server import API_KEY, DEMO_KEEP, Server

pytest.importorskip("selenium", reason="selenium is not installed (requirements/dev.lock)")

from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

from tests.support import axe
from tests.support.browser import Browser, chromium, why_missing

NUM_PATCHES = 576
EXAMPLE = examples()[3]
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
# `make screenshots` writes these into the documentation.
SCREENSHOTS = os.environ.get("FICOCO_SCREENSHOTS")
PICTURES = {("desktop", "light"): "viewer.png", ("phone", "dark"): "viewer-phone.png"}

pytestmark = [
    pytest.mark.server,
    pytest.mark.long,
    pytest.mark.needs(why_missing() is None, f"the page's tests: {why_missing()}"),
]


def open_page(browser: Browser, server: Server, fragment: str = "") -> None:
    """Load the page and enter the key that it asks for."""
    browser.driver.get(f"{server.url}/ficoco/{fragment}")
    browser.wait(lambda: browser.find("#key-field").is_displayed())
    assert browser.text("#error") == ""
    browser.find("#key").send_keys(API_KEY, Keys.ENTER)
    browser.wait(lambda: browser.text("#model") == "ficoco-demo")
    assert not browser.find("#key-field").is_displayed()
    # The browser itself notes that the first call was answered with 401.
    assert all("options" in said and "401" in said for said in browser.complaints())


def is_idle(browser: Browser) -> bool:
    return browser.text("#ask") == "Ask"


def wait_for_answers(browser: Browser) -> None:
    browser.wait(lambda: is_idle(browser) and browser.find("#way").is_displayed())
    assert browser.text("#error") == ""


def ask(browser: Browser) -> None:
    """Choose the example, which asks its question."""
    browser.find(f'#examples button[data-name="{EXAMPLE.image.name}"]').click()
    wait_for_answers(browser)


def patch(browser: Browser, token: int) -> Any:
    return browser.find(f'.patch[data-token="{token}"]')


def count(browser: Browser, state: str) -> int:
    return len(browser.all(f'.patch[data-state="{state}"]'))


def first(browser: Browser, state: str) -> int:
    return int(str(browser.find(f'.patch[data-state="{state}"]').get_attribute("data-token")))


def to_step(browser: Browser, index: int) -> None:
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


def test_the_headline_is_the_saving_and_both_answers_stand_side_by_side(page: Browser) -> None:
    assert page.text("#headline") == "89% fewer visual tokens"
    assert page.text("#explained") == (
        f"{DEMO_KEEP} of {NUM_PATCHES} visual tokens reach the language model. Both answers are the same."
    )
    full, reduced = (card.text.splitlines() for card in page.all(".answer"))
    assert full == [f"All {NUM_PATCHES} tokens", EXAMPLE.answer]
    assert reduced == [f"FiCoCo-V, {DEMO_KEEP} kept", EXAMPLE.answer]
    assert len({card.location["y"] for card in page.all(".answer")}) == 1
    rows = [row.text for row in page.all("#figures tbody tr")]
    assert [row.split("\n")[0].split(" ")[0] for row in rows] == ["KV", "First", "Whole"]
    assert rows[0].endswith("\N{MINUS SIGN}87%")
    assert all("median of 3" in row for row in rows[1:])


def test_the_result_is_announced_and_focus_stays(page: Browser) -> None:
    heard = page.run("return document.getElementById('heard').textContent")
    assert heard.startswith("89% fewer visual tokens. 64 of 576 visual tokens reach the language model.")
    assert EXAMPLE.answer in heard
    assert page.driver.switch_to.active_element.get_attribute("data-name") == EXAMPLE.image.name
    assert page.find("#result").get_attribute("aria-busy") == "false"


def test_step_by_step(page: Browser) -> None:
    for index, gone in {0: 0, 1: 128, 2: 256, 3: 384, 4: 512}.items():
        to_step(page, index)
        assert count(page, "left") + count(page, "now") == gone
        assert count(page, "now") == (128 if index else 0)
    assert page.text("#caption") == "Step 4 of 4, 7th layer of the vision tower: 128 leave, 64 stay."
    page.find("#next").click()
    assert page.text("#caption").startswith("Result: 64 tokens kept, 512 patches merged into them.")
    assert (count(page, "kept"), count(page, "now"), count(page, "left")) == (DEMO_KEEP, 0, 512)
    # The kept ones, and no others, have a ring.
    rings = page.run(
        """return [...document.querySelectorAll(".patch")].filter((cell) => cell.style.boxShadow)
          .map((cell) => cell.dataset.state)"""
    )
    assert rings == ["kept"] * DEMO_KEEP
    page.find("#previous").click()
    assert page.text("#caption").startswith("Step 4 of 4")


def test_it_plays(page: Browser) -> None:
    to_step(page, 5)
    page.find("#play").click()
    assert page.text("#caption").startswith("Before any reduction")
    page.wait(lambda: page.text("#caption").startswith("Result"), seconds=20)
    assert page.find("#play").get_attribute("aria-label") == "Play the layers"


def test_a_click_shows_where_information_went(page: Browser) -> None:
    to_step(page, 5)
    left = first(page, "left")
    patch(page, left).click()
    assert page.text("#detail h3") == f"Row {left // 24 + 1}, column {left % 24 + 1}"
    assert "Its information is now in" in page.text("#detail")
    assert patch(page, left).get_attribute("aria-selected") == "true"
    assert "rgb(255, 59, 70)" in page.run(
        "return getComputedStyle(arguments[0]).boxShadow", patch(page, left)
    )
    # The way back: the target names the chosen patch among what was merged into it.
    name = page.text("#detail ol button")
    page.find("#detail ol button").click()
    assert page.text("#detail h3").lower() == name
    assert "Kept to the end. It received information from" in page.text("#detail")
    assert page.driver.switch_to.active_element.get_attribute("aria-selected") == "true"
    page.driver.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert page.all(".patch.is-chosen") == []


def test_sizes_and_destinations(page: Browser) -> None:
    """Heat for the size of every kept token; every removed patch has the colour of the token that took most of it."""
    to_step(page, 5)
    fills = "return [...document.querySelectorAll('.patch')].map((cell) => [cell.dataset.state, cell.style.background])"
    page.find('#modes input[value="sizes"]').click()
    kept = {fill for state, fill in page.run(fills) if state == "kept"}
    assert len(kept) > 5
    assert "481 patches" in page.text("#caption") or "represents" in page.text("#caption")
    page.find('#modes input[value="flow"]').click()
    colours: dict[str, set[Any]] = {"kept": set(), "left": set()}
    for state, fill in page.run(fills):
        colours[state].add(fill.rpartition(",")[0])
    assert len(colours["kept"]) == DEMO_KEEP
    assert colours["left"] <= colours["kept"]
    page.find('#modes input[value="kept"]').click()


def test_keyboard(page: Browser) -> None:
    to_step(page, 5)
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
    assert page.run("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.driver.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert page.all(".patch.is-chosen") == []


def test_every_control_shows_that_it_has_the_focus(page: Browser) -> None:
    """Once around the page by the tab key; a ring is around each control, or around what stands for it."""
    stops: dict[str, float] = {}
    while True:
        ActionChains(page.driver).send_keys(Keys.TAB).perform()
        stop = page.run(
            """const active = document.activeElement;
            const ringed = [active, active.nextElementSibling, active.closest("label")].filter(Boolean);
            const rings = ringed.map((element) => getComputedStyle(element))
              .filter((style) => style.outlineStyle === "solid").map((style) => parseFloat(style.outlineWidth));
            const name = active.id || active.dataset.name || active.className || active.outerHTML;
            return active === document.body ? null : [name, Math.max(0, ...rings)];"""
        )
        if stop is None:  # behind the last control
            continue
        name, ring = stop
        if name in stops:
            break
        stops[name] = ring
    assert {"question", "ask", "method", EXAMPLE.image.name, "play", "layer"} <= stops.keys()
    assert [name for name, ring in stops.items() if ring < 3] == []


def test_shares_are_followed_as_the_server_does(page: Browser) -> None:
    """The page's own arithmetic against the destinations that the server sends."""
    worst = page.driver.execute_async_script(
        """const [key, image, question, done] = arguments;
        (async () => {
          const { destinations } = await import("./trace.js");
          const body = JSON.stringify({ image, question, compare: false });
          const headers = { "Content-Type": "application/json", Authorization: `Bearer ${key}` };
          const answer = await (await fetch("explain", { method: "POST", headers, body })).json();
          const traced = destinations(answer.layers, answer.layers.length);
          let worst = 0;
          for (const item of answer.destinations) {
            const { shares, lost } = traced.get(item.token);
            const byToken = new Map(shares);
            for (const [token, share] of item.targets) {
              worst = Math.max(worst, Math.abs(share - (byToken.get(token) ?? 0)));
            }
            worst = Math.max(worst, Math.abs(lost - item.lost - item.rest));
          }
          return [answer.destinations.length, worst];
        })().then(done, (error) => done([String(error), 1]));""",
        API_KEY,
        page.run("return document.getElementById('preview').src"),
        EXAMPLE.question,
    )
    assert worst[0] == NUM_PATCHES - DEMO_KEEP
    assert worst[1] < 1e-3  # five digits a layer


def test_a_link_reproduces_the_view(page: Browser, server: Server) -> None:
    """The address names example, question, method, budget, mode, step and patch, and no server sees them."""
    page.find("#method").send_keys("ToMe")
    page.run(
        "const keep = document.getElementById('keep'); keep.value = 100; keep.dispatchEvent(new Event('input'))"
    )
    page.find("#ask").click()
    wait_for_answers(page)
    page.find('#modes input[value="sizes"]').click()
    to_step(page, 2)
    left = first(page, "left")
    patch(page, left).click()
    before = (page.text("#caption"), page.text("#detail"), page.text("#headline"))
    address = page.driver.current_url
    assert address.startswith(f"{server.url}/ficoco/#")
    assert API_KEY not in address.replace("tome", "")
    page.driver.get("about:blank")
    page.driver.get(address)
    wait_for_answers(page)
    assert (page.text("#caption"), page.text("#detail"), page.text("#headline")) == before
    assert page.run("return document.querySelector('#modes input:checked').value") == "sizes"
    assert page.driver.current_url == address


def test_the_link_is_copied(page: Browser) -> None:
    page.run(
        "navigator.clipboard.writeText = async (text) => { window.written = text; };"
        "document.getElementById('copied').textContent = ''"
    )
    page.find("#copy").click()
    page.wait(lambda: page.text("#copied"))
    assert page.text("#copied") == "Link copied."
    assert page.run("return window.written") == page.driver.current_url
    # Over plain HTTP, but for this computer, browsers have no clipboard.
    page.run("Object.defineProperty(navigator, 'clipboard', { value: undefined, configurable: true })")
    try:
        page.find("#copy").click()
        page.wait(lambda: "cannot copy here" in page.text("#copied"))
    finally:
        page.run("delete navigator.clipboard; delete navigator.clipboard?.writeText")
    assert page.text("#copied") == "This browser cannot copy here. The address of the page is the link."


def test_the_picture_is_what_the_page_shows(page: Browser) -> None:
    data = page.driver.execute_async_script(
        """const done = arguments[0];
        const create = URL.createObjectURL;
        URL.createObjectURL = (blob) => {
          blob.arrayBuffer().then((bytes) => done(btoa(String.fromCharCode(...new Uint8Array(bytes)))));
          URL.createObjectURL = create;
          return create(blob);
        };
        document.getElementById("download").click();"""
    )
    with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
        assert picture.format == "PNG"
        assert picture.width == 1200
        counted: Any = picture.convert("RGB").getcolors(2**24)
        colours = {colour[:3] for _, colour in counted}
    assert (18, 83, 58) in colours
    assert len(colours) > 20


def test_asking_can_be_cancelled(page: Browser, server: Server) -> None:
    """The button cancels while the page waits, and elapsed time is shown. The server logs no exception."""
    page.run(
        """window.original = window.fetch;
        window.fetch = (path, options) => path === "explain"
          ? new Promise((_, reject) => options.signal.addEventListener("abort", () => reject(options.signal.reason)))
          : window.original(path, options);"""
    )
    page.find("#ask").click()
    page.wait(lambda: page.text("#ask") == "Cancel")
    assert page.find("#result").get_attribute("aria-busy") == "true"
    assert page.text("#status").startswith("Asking with all tokens and with")
    page.wait(lambda: page.text("#elapsed") == "1 s")
    page.find("#ask").click()
    page.wait(lambda: is_idle(page))
    assert (page.text("#status"), page.text("#elapsed"), page.text("#error")) == ("Cancelled.", "", "")
    page.run("window.fetch = window.original")
    for _ in range(2):  # asks and cancels
        page.find("#ask").click()
    page.wait(lambda: is_idle(page))
    page.find("#ask").click()
    wait_for_answers(page)
    assert "Exception in ASGI" not in server.log.read_text()


def test_it_waits_where_the_server_says_so(page: Browser) -> None:
    page.run(
        """window.original = window.fetch;
        let refused = false;
        window.fetch = (path, options) => {
          if (path !== "explain" || refused) return window.original(path, options);
          refused = true;
          const error = { message: "at most 20 explanations a minute are allowed; try again in 1 s" };
          const headers = { "Retry-After": 1 };
          return Promise.resolve(new Response(JSON.stringify({ error }), { status: 429, headers }));
        };"""
    )
    page.find("#ask").click()
    page.wait(lambda: page.text("#status").startswith("At most 20 explanations a minute are allowed"))
    wait_for_answers(page)
    page.run("window.fetch = window.original")


def test_an_answer_is_text_and_never_markup(page: Browser) -> None:
    """An answer, a method and an error that look like HTML, from a server that means harm."""
    evil = "<img src=x onerror='window.broken = 1'><script>window.broken = 1</script>"
    page.run(
        """const evil = arguments[0];
        window.original = window.fetch;
        window.fetch = async (path) => {
          const side = { answer: evil, method: evil, visual_tokens: 4, last_visual_tokens: 4, prompt_tokens: 9,
            completion_tokens: 1, ttft_seconds: 1, total_seconds: 1, kv_bytes: 1 };
          return new Response(JSON.stringify({ model: evil, question: evil, method: evil, keep: 4, grid: [2, 2],
            views: [{ first: 0, grid: [2, 2], box: [0, 0, 1, 1], tile: null }],
            central_square: null, reduced: side, full: side, layers: [], destinations: [] }));
        };""",
        evil,
    )
    page.find("#ask").click()
    page.wait(lambda: len(page.all(".patch")) == 4 and is_idle(page))
    assert page.text(".answer .said") == evil
    assert page.text("#headline") == "All visual tokens are kept"
    page.run(
        """const evil = arguments[0];
        window.fetch = async () => new Response(JSON.stringify({ error: { message: evil } }), { status: 400 });""",
        evil,
    )
    page.find("#ask").click()
    page.wait(lambda: page.text("#error"))
    assert page.text("#error") == evil
    assert page.run("return window.broken ?? null") is None
    page.run("window.fetch = window.original")


def test_tiles_are_drawn_where_they_lie(page: Browser) -> None:
    """A base tile over the whole image, and four tiles, the lower ones of which are cut."""
    page.run(
        """window.original = window.fetch;
        window.fetch = async () => {
          const side = (visual_tokens) => ({ answer: "one", method: "tome", visual_tokens, last_visual_tokens:
            visual_tokens, prompt_tokens: 9, completion_tokens: 1, ttft_seconds: 1, total_seconds: 1, kv_bytes: 1 });
          const views = [{ first: 0, grid: [2, 2], box: [0, 0, 1, 1], tile: null }];
          for (const row of [0, 1]) {
            for (const column of [0, 1]) {
              const grid = [2 - row, 2];
              const box = [column / 2, row * 2 / 3, 0.5, row ? 1 / 3 : 2 / 3];
              views.push({ first: 4 + row * 8 + column * (4 - 2 * row), grid, box, tile: [row, column] });
            }
          }
          const kept = [...Array(16).keys()].filter((token) => token !== 5);
          const left = [{ token: 5, targets: [[6, 1]], rest: 0, lost: 0 }];
          const sizes = kept.map((token) => (token === 6 ? 2 : 1));
          const layers = [{ site: "encoder", layer: 3, kept, num_fused: 0, left, sizes }];
          return new Response(JSON.stringify({ model: "next", question: "?", method: "tome", keep: 3, grid: [2, 2],
            views, central_square: null, reduced: side(15), full: side(16), layers, destinations: left }));
        };"""
    )
    page.find("#ask").click()
    page.wait(lambda: len(page.all(".patch")) == 16 and is_idle(page))
    page.run("window.fetch = window.original")
    assert [caption.text for caption in page.all("figcaption")] == [
        "Base tile: the whole image",
        "4 tiles of higher resolution",
    ]
    shown = [cell.get_attribute("aria-label") for cell in page.all(".patch")]
    assert shown[0] == "base tile, row 1, column 1: kept"
    assert shown[5] == "tile 1.1, row 1, column 2: has left"
    assert shown[6] == "tile 1.1, row 2, column 1: kept, represents 2.0 patches"
    assert shown[15] == "tile 2.2, row 1, column 2: kept"
    boxes = page.run(
        """return [...document.querySelectorAll(".patch")].map((cell) => {
          const stage = cell.closest(".stage").getBoundingClientRect();
          const box = cell.getBoundingClientRect();
          return [(box.left - stage.left) / stage.width, (box.top - stage.top) / stage.height, box.width / stage.width];
        })"""
    )
    assert boxes[15] == pytest.approx([0.75, 2 / 3, 0.25], abs=0.01)
    assert boxes[3] == pytest.approx([0.5, 0.5, 0.5], abs=0.01)
    patch(page, 5).click()
    assert page.text("#detail ol") == "tile 1.1, row 2, column 1\n100%"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("device", SIZES)
def test_accessible_and_legible_in_every_state(
    server: Server, tmp_path: Path, scheme: str, device: str
) -> None:
    folder = Path(SCREENSHOTS or tmp_path)
    with chromium(tmp_path / "profile", scheme, SIZES[device]) as browser:
        browser.driver.get(f"{server.url}/ficoco/")
        browser.wait(lambda: browser.find("#key-field").is_displayed())
        assert axe.violations(browser) == [], "asks for the key"
        open_page(browser, server)
        assert axe.violations(browser) == [], "empty"
        browser.run("window.original = window.fetch; window.fetch = () => new Promise(() => {})")
        browser.find("#question").send_keys("what is this?")
        browser.find("#file").send_keys(str(EXAMPLE.image))
        browser.wait(lambda: browser.find("#preview").is_displayed())
        browser.find("#ask").click()
        browser.wait(lambda: not is_idle(browser))
        assert axe.violations(browser) == [], "busy"
        browser.driver.refresh()
        browser.wait(lambda: browser.text("#model") == "ficoco-demo")  # with the key of this tab
        ask(browser)
        assert axe.violations(browser) == [], "result"
        assert browser.run("return document.documentElement.scrollWidth") <= SIZES[device][0]
        browser.run("window.scrollTo(0, 0)")
        if (device, scheme) in PICTURES:
            browser.screenshot(folder / PICTURES[device, scheme])
        for mode in ("sizes", "flow"):
            browser.run(f"document.querySelector('#modes input[value={mode}]').click()")
            browser.run("document.querySelector('.patch[data-state=left]').click()")
            assert axe.violations(browser) == [], mode
        browser.run("window.fetch = async () => { throw new TypeError('Failed to fetch'); }")
        browser.run("document.getElementById('ask').click()")
        browser.wait(lambda: browser.text("#error"))
        assert axe.violations(browser) == [], "error"
        small = browser.run(
            """return [...document.querySelectorAll("button, select, textarea")].filter((element) =>
              element.checkVisibility() && element.getBoundingClientRect().height < 24
            ).map((element) => element.outerHTML)"""
        )
        assert small == []
        assert browser.run("return getComputedStyle(document.body).fontSize") == "16px"
        background = browser.run("return getComputedStyle(document.body).backgroundColor")
        assert background == ("rgb(247, 247, 245)" if scheme == "light" else "rgb(18, 21, 24)")
        assert browser.complaints() == []


def test_images_come_by_drop_paste_and_choice_and_errors_are_in_words(server: Server, tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("no image")
    with chromium(tmp_path / "profile") as browser:
        browser.driver.get(f"{server.url}/ficoco/")
        browser.wait(lambda: browser.find("#key-field").is_displayed())
        browser.find("#key").send_keys("wrong", Keys.ENTER)
        browser.wait(lambda: browser.text("#error") == "The server does not accept this API key.")
        browser.complaints()
        open_page(browser, server)
        browser.find("#question").send_keys("what is this?")
        browser.find("#ask").click()
        assert browser.text("#error") == "Choose an image first."
        browser.drop("#drop", text)
        browser.wait(lambda: "notes.txt is not an image" in browser.text("#error"))
        for number, take in enumerate(
            (
                lambda: browser.find("#file").send_keys(str(EXAMPLE.image)),
                lambda: browser.drop("#drop", examples()[0].image),
                lambda: browser.paste(examples()[1].image),
            )
        ):
            before = browser.find("#preview").get_attribute("src")
            take()
            browser.wait(lambda: browser.find("#preview").get_attribute("src") != before)  # noqa: B023
            assert browser.text("#error") == "", number
        for script, words in (
            ("throw new TypeError('Failed to fetch')", "The server cannot be reached. It may have stopped"),
            ("return new Response('<html>', { status: 502 })", "The server answered with status 502."),
            ("return new Response('{\"cut', { status: 200 })", "The response of the server was cut off."),
        ):
            browser.run(f"window.fetch = async () => {{ {script}; }}")
            browser.find("#ask").click()
            browser.wait(lambda: words in browser.text("#error"))  # noqa: B023
            assert is_idle(browser)
        assert browser.complaints() == []
