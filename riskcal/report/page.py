"""One page of sections that loads nothing: its style and its script stand in it, and its policy lets no request leave."""

import base64
import hashlib
from collections.abc import Sequence
from functools import cache
from importlib import resources

from riskcal.report.html import Html, joined, tag
from riskcal.report.sections import Section

#: No page may be larger: it is to be mailed, and opened on a phone.
LARGEST = 3 * 2**20


@cache
def _asset(name: str) -> str:
    return (resources.files("riskcal.report") / name).read_text(encoding="utf-8")


def page(title: str, about: str, sections: Sequence[Section], footer: str) -> str:
    """The whole document. Only the script whose hash it names runs, so that no text could, were it not escaped."""
    script, style = _asset("page.js"), _asset("page.css")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
        "form-action 'none'"
    )
    head = (
        '<meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
    )
    links = [tag("li", tag("a", one.title, href=f"#{one.name}")) for one in sections]
    parts = [
        tag("section", tag("h2", one.title), one.body, id=one.name, class_="part")
        for one in sections
    ]
    body = joined(
        [
            tag("a", "Skip to the content", href="#content", class_="skip"),
            tag("header", tag("h1", title), tag("p", about, class_="about")),
            tag("nav", tag("ol", *links), aria_label="Sections"),
            tag("main", *parts, id="content"),
            tag("footer", tag("p", footer)),
            tag("script", Html(script)),
        ]
    )
    whole = tag("head", Html(head), tag("title", title), tag("style", Html(style)))
    return f'<!doctype html>\n<html lang="en">{whole}<body>{body}</body></html>\n'
