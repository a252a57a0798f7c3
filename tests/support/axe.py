"""axe-core, which checks a page for accessibility: npm's package of one version, fetched once into build/."""

import base64
import hashlib
import shutil
import subprocess
import tarfile
from functools import cache
from pathlib import Path
from typing import Any

from tests.support.browser import Browser

PACKAGE = "axe-core@4.14.1"
SHA512 = "FHfa+lmNjQZfJz1q8wKqIDwC6DExcHt/pkjNQb09a3NPjCKg2rhu5qb2S4r76ASyFNNtuFooJpZe37OgudVGtQ=="
FOLDER = Path(__file__).parents[2] / "build" / "axe"
# Every rule of WCAG 2.2 A and AA, and axe-core's own advice.
RUN = """
const done = arguments[arguments.length - 1];
axe.run(document, { resultTypes: ["violations"] }).then(
  ({ violations, passes }) => done({
    checked: passes.length,
    violations: violations.map(({ id, nodes }) => `${id}: ${nodes.map(({ html }) => html.slice(0, 160)).join(" | ")}`),
  }),
  (error) => done({ checked: 0, violations: [String(error)] }),
);
"""


@cache
def source() -> str:
    """The checker's script.

    Raises:
        OSError: npm or the network is missing.
        ValueError: the package is not the pinned one.
    """
    archive = FOLDER / "axe-core-4.14.1.tgz"
    if not archive.exists():
        npm = shutil.which("npm")
        if npm is None:
            raise OSError("no npm (Debian's package npm)")
        FOLDER.mkdir(parents=True, exist_ok=True)
        command = [npm, "pack", PACKAGE, "--silent", "--pack-destination", str(FOLDER)]
        fetched = subprocess.run(
            command, capture_output=True, text=True, timeout=120, check=False, cwd=FOLDER
        )
        if fetched.returncode:
            raise OSError(f"npm cannot fetch {PACKAGE}: {fetched.stderr.strip()}")
    if base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode() != SHA512:
        raise ValueError(f"{archive} is not {PACKAGE}")
    with tarfile.open(archive) as package:
        script = package.extractfile("package/axe.min.js")
        assert script is not None
        return script.read().decode()


def violations(browser: Browser) -> list[str]:
    """Rules that the page breaks in its present state, with the elements."""
    if browser.run("return typeof axe") == "undefined":
        browser.run(source())
    result: dict[str, Any] = browser.driver.execute_async_script(RUN)
    assert result["checked"] > 10
    return list(result["violations"])
