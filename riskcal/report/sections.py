"""What a report is made of: sections in order, each with a heading and markup."""

from dataclasses import dataclass

from riskcal.report.html import Html


@dataclass(frozen=True)
class Section:
    """One part of the page; ``name`` is its anchor."""

    name: str
    title: str
    body: Html
