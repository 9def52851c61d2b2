"""A status page for people: one HTML file that asks the same API as everybody, with the key its reader types in."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import HTMLResponse, Response

router = APIRouter(tags=["console"])
_PAGE = Path(__file__).with_name("console.html")
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src 'self' data:"


@router.get("/console", response_class=HTMLResponse, include_in_schema=False)
async def console() -> Response:
    """Return the page; it holds no data."""
    return HTMLResponse(_PAGE.read_text(encoding="utf-8"), headers={"Content-Security-Policy": _POLICY})
