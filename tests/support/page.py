"""What a person does on the page `/ficoco/` of any server, without a key."""

from pathlib import Path

from tests.support.browser import Browser


def ask(browser: Browser, url: str, model: str, image: Path, question: str) -> None:
    """Open the page, choose an image, ask, and wait for both answers."""
    browser.driver.get(f"{url}/ficoco/")
    browser.wait(lambda: browser.text("#model") == model)
    browser.find("#file").send_keys(str(image))
    browser.wait(lambda: browser.find("#preview").is_displayed())
    browser.find("#question").send_keys(question)
    browser.find("#ask").click()
    browser.wait(lambda: browser.find("#way").is_displayed() or browser.text("#error"), seconds=120)
    assert browser.text("#error") == ""


def captions(browser: Browser) -> list[str]:
    """The line under the picture at each step, from before any reduction to the result."""
    last = int(str(browser.find("#layer").get_attribute("max")))
    said = []
    for step in range(last + 1):
        browser.run(
            "const layer = document.getElementById('layer'); layer.value = arguments[0];"
            "layer.dispatchEvent(new Event('input'));",
            step,
        )
        said.append(browser.text("#caption"))
    return said
