"""A real headless Chromium, driven through its own driver."""

import base64
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from ficoco_vllm.benchmarks.harness.serving import free_port

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
DRIVER = "chromedriver"
# As root in a container, without a screen and without calls home.
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--force-device-scale-factor=1",
)
# Drops a file as a user does: the browser sends no drag events of files to a test.
DROP = """
const [target, name, data] = arguments;
const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
const transfer = new DataTransfer();
transfer.items.add(new File([bytes], name, { type: "image/png" }));
for (const kind of ["dragenter", "dragover", "drop"]) {
  target.dispatchEvent(new DragEvent(kind, { bubbles: true, cancelable: true, dataTransfer: transfer }));
}
"""
# Pastes an image as a user does, wherever the focus is.
PASTE = """
const [name, data] = arguments;
const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
const clipboardData = new DataTransfer();
clipboardData.items.add(new File([bytes], name, { type: "image/png" }));
document.activeElement.dispatchEvent(new ClipboardEvent("paste", { bubbles: true, cancelable: true, clipboardData }));
"""


def why_missing() -> str | None:
    """Reason why the browser cannot start, or None."""
    if not any(map(shutil.which, BROWSERS)):
        return f"no browser: none of {', '.join(BROWSERS)} (Debian's package chromium)"
    if shutil.which(DRIVER) is None:
        return f"no {DRIVER} (Debian's package chromium-driver)"
    return None


@contextmanager
def chromium(
    profile: Path, scheme: str = "light", size: tuple[int, int] = (1280, 900)
) -> Iterator["Browser"]:
    """Start a browser that ends with the block.

    Args:
        profile: an empty folder.
        scheme: "light" or "dark", what the user prefers.
        size: of the viewport; a narrow one is emulated as a phone.
    """
    options = ChromeOptions()
    options.binary_location = next(filter(None, map(shutil.which, BROWSERS)))
    for flag in (*FLAGS, f"--user-data-dir={profile}", f"--window-size={size[0]},{size[1]}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = Chrome(options=options, service=Service(shutil.which(DRIVER), port=free_port()))
    try:
        driver.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        )
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size[0] < 600}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        yield Browser(driver)
    finally:
        driver.quit()


class Browser:
    """A page of the browser."""

    def __init__(self, driver: Chrome) -> None:
        self.driver = driver

    def find(self, selector: str) -> WebElement:
        """The first element, by CSS."""
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        """Every element, by CSS."""
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        """Visible text of an element."""
        return str(self.find(selector).text)

    def run(self, script: str, *args: Any) -> Any:
        """Run JavaScript and give back what it returns."""
        return self.driver.execute_script(script, *args)

    def wait(self, condition: Any, seconds: float = 120) -> Any:
        """Until a function of no arguments gives something."""
        return WebDriverWait(self.driver, seconds).until(lambda _: condition())

    def drop(self, selector: str, image: Path) -> None:
        """Drop an image file on an element."""
        data = base64.b64encode(image.read_bytes()).decode()
        self.run(DROP, self.find(selector), image.name, data)

    def paste(self, image: Path) -> None:
        """Paste an image from the clipboard."""
        self.run(PASTE, image.name, base64.b64encode(image.read_bytes()).decode())

    def complaints(self) -> list[str]:
        """Messages of the browser's console since the last call, without plain ones."""
        return [
            entry["message"]
            for entry in self.driver.get_log("browser")
            if entry["level"] in ("SEVERE", "WARNING")
        ]

    def screenshot(self, file: Path) -> None:
        """The whole page, not only what is in view, as PNG."""
        shown = self.driver.execute_cdp_cmd(
            "Page.captureScreenshot", {"format": "png", "captureBeyondViewport": True, "fromSurface": True}
        )
        file.write_bytes(base64.b64decode(shown["data"]))
