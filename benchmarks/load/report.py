"""A load test as a page that needs nothing beside it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from ficoco_vllm.benchmarks.load.plots import draw


def as_html(result: Mapping[str, Any]) -> str:
    """The report."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    template = environment.get_template("report.html.jinja")
    return template.render(
        **result, traffic=result["rows"][0]["traffic"], pictures=draw(result["rows"], result["summary"])
    )
