"""MkDocs hook: pages that live elsewhere in the repository, links between them and docs/, no page listed twice."""

import posixpath
import re
from collections import Counter
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
# Path in the repository -> page.
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "examples/README.md": "examples.md",
    "ficoco_vllm/demo_model/MODEL_CARD.md": "demo-model.md",
    "kernels/README.md": "kernels.md",
    "kernels/attention_scores/README.md": "kernels-attention-scores.md",
    "kernels/farthest_points/README.md": "kernels-farthest-points.md",
    "kernels/filter_scores/README.md": "kernels-filter-scores.md",
    "kernels/partition/README.md": "kernels-partition.md",
    "kernels/quantile_merge/README.md": "kernels-quantile-merge.md",
}
SOURCES = {page: source for source, page in PAGES.items()}
LINK = re.compile(r"(\]\()([^)#\s]+)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages from outside of docs/."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_nav(nav: Any, config: Any, files: Files) -> None:
    """Refuse a page that the navigation lists twice; strict builds do not."""
    listed = Counter(page.file.src_uri for page in nav.pages)
    if twice := sorted(page for page, count in listed.items() if count > 1):
        raise PluginError(f"mkdocs.yml lists {', '.join(twice)} more than once")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Rewrite links, which are relative to the file in the repository: to pages, or to the repository's host."""
    source = SOURCES.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def to_page(match: re.Match[str]) -> str:
        target = match[2]
        if "://" in target:
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if path in PAGES:
            return match[1] + PAGES[path]
        if path.startswith("docs/"):
            return match[1] + path.removeprefix("docs/")
        if (ROOT / path).is_file():
            return f"{match[1]}{config.repo_url}/blob/main/{path}"
        return match[0]  # a file that is missing fails the strict build

    return LINK.sub(to_page, markdown)
