"""axe-core, which checks a page for accessibility: the script that the package axe-playwright-python carries."""

from functools import cache
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

from tests.support.browser import Browser

# Only the script is used: the package's Python code needs Playwright.
PACKAGE, SCRIPT = "axe-playwright-python", "axe_playwright_python/axe.min.js"
# Every rule of WCAG 2.2 A and AA, and axe-core's own advice. Some, such as that of target sizes, are off by default.
TAGS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
RUN = """
const [tags, done] = arguments;
axe.run(document, { runOnly: tags, resultTypes: ["violations"] }).then(
  ({ violations, passes }) => done({
    checked: passes.length,
    violations: violations.map(({ id, nodes }) => `${id}: ${nodes.map(({ html }) => html.slice(0, 160)).join(" | ")}`),
  }),
  (error) => done({ checked: 0, violations: [String(error)] }),
);
"""


@cache
def source() -> str:
    """The checker's script."""
    return Path(str(distribution(PACKAGE).locate_file(SCRIPT))).read_text(encoding="utf-8")


def violations(browser: Browser) -> list[str]:
    """Rules that the page breaks in its present state, with the elements."""
    if browser.run("return typeof axe") == "undefined":
        browser.run(source())
    result: dict[str, Any] = browser.driver.execute_async_script(RUN, TAGS)
    assert result["checked"] > 10
    return list(result["violations"])
