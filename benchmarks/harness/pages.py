"""Committed pages with generated blocks: Markdown tables, and the command that writes or checks the pages."""

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

# Resolved: the package may reach this file through a link.
ROOT = Path(__file__).resolve().parents[2]
_BLOCK = re.compile(r"(<!-- begin ([a-z0-9-]+) -->\n).*?(<!-- end \2 -->)", re.DOTALL)


def table(header: Sequence[object], rows: Iterable[Sequence[object]], rule: str = "---") -> list[str]:
    """Lines of a Markdown table; `rule` stands below each cell of the header."""
    head, *body = ("| " + " | ".join(map(str, row)) + " |" for row in (header, *rows))
    return [head, "|" + f"{rule}|" * len(header), *body]


def fill(page: str, blocks: Mapping[str, Sequence[str]]) -> str:
    """A page with new lines between its markers `<!-- begin NAME -->` and `<!-- end NAME -->`.

    Raises:
        ValueError: the page does not have exactly one block of each name.
    """
    names = [match[2] for match in _BLOCK.finditer(page)]
    if sorted(names) != sorted(blocks):
        raise ValueError(f"the page has the blocks {sorted(names)}; needed: {sorted(blocks)}, once each")
    return _BLOCK.sub(lambda m: m[1] + "".join(f"{line}\n" for line in blocks[m[2]]) + m[3], page)


def write_pages(description: str | None, make: Callable[[], Mapping[Path, str]]) -> int:
    """Write generated files, or with `--check` only name those that would change and return 1."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 on a difference")
    check = parser.parse_args().check
    changed = [(p, text) for p, text in make().items() if not p.exists() or p.read_text("utf-8") != text]
    for path, text in changed:
        if check:
            print(f"{path.relative_to(ROOT)} differs from what this command writes", file=sys.stderr)
        else:
            path.write_text(text, encoding="utf-8")
    return int(check and bool(changed))
