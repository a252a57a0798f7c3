"""The page at `/ficoco/`: static files of this package only."""

from importlib.resources import files

from fastapi import APIRouter, HTTPException
from fastapi.responses import RedirectResponse, Response

from ficoco_vllm import demo_model
from ficoco_vllm.server.explain.schema import ExampleChoice

PAGE = "index.html"
_SCRIPTS = (
    "viewer.js",
    "answers.js",
    "api.js",
    "image.js",
    "link.js",
    "marks.js",
    "picture.js",
    "stage.js",
    "trace.js",
)
_TYPES = {
    "index.html": "text/html; charset=utf-8",
    "viewer.css": "text/css; charset=utf-8",
    **dict.fromkeys(_SCRIPTS, "text/javascript; charset=utf-8"),
    "icon.svg": "image/svg+xml",
}
# The page loads from this server alone, cannot be framed, and never runs an answer of the model as a script.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}

router = APIRouter(include_in_schema=False)


@router.get("/ficoco")
async def to_page() -> RedirectResponse:
    """Redirect to the page: its relative addresses need the trailing slash."""
    return RedirectResponse("ficoco/")


@router.get("/ficoco/")
async def page() -> Response:
    """The page."""
    return _file(PAGE)


@router.get("/ficoco/examples/{name}")
async def example(name: str) -> Response:
    """An example image."""
    for example in demo_model.examples():
        if example.image.name == name:
            return Response(example.image.read_bytes(), media_type="image/png", headers=_HEADERS)
    raise HTTPException(404, "Not Found")


@router.get("/ficoco/{name}")
async def asset(name: str) -> Response:
    """A file that the page loads."""
    return _file(name)


def examples() -> list[ExampleChoice]:
    """The demo model's examples, which this server can serve."""
    return [
        ExampleChoice(image=f"examples/{example.image.name}", question=example.question)
        for example in demo_model.examples()
    ]


def _file(name: str) -> Response:
    if name not in _TYPES:
        raise HTTPException(404, "Not Found")
    content = files("ficoco_vllm.server").joinpath("static", name).read_bytes()
    return Response(content, media_type=_TYPES[name], headers=_HEADERS)
