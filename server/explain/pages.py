"""The page at `/ficoco/`: static files of this package only."""

from importlib.resources import files

from fastapi import APIRouter, HTTPException
from fastapi.responses import RedirectResponse, Response

PAGE = "index.html"
_TYPES = {
    "index.html": "text/html; charset=utf-8",
    "viewer.css": "text/css; charset=utf-8",
    "viewer.js": "text/javascript; charset=utf-8",
    "stage.js": "text/javascript; charset=utf-8",
    "trace.js": "text/javascript; charset=utf-8",
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


@router.get("/ficoco/{name}")
async def asset(name: str) -> Response:
    """A file that the page loads."""
    return _file(name)


def _file(name: str) -> Response:
    if name not in _TYPES:
        raise HTTPException(404, "Not Found")
    content = files("ficoco_vllm.server").joinpath("static", name).read_bytes()
    return Response(content, media_type=_TYPES[name], headers=_HEADERS)
