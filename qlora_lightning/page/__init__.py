"""What every HTML page of ours shares: one style, nothing beside itself, and whatever comes from outside stays text."""

import unicodedata
from pathlib import Path
from typing import Any

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # no script, no request, no font
_PICTURES = {code: 0x2400 + code for code in range(32)} | {9: "⇥", 10: "\n", 127: "␡"}
_SHOWN = "\n\N{ZERO WIDTH JOINER}"  # the joiner is inside emoji


def render_page(template: Path, **values: Any) -> str:
    """Return a page's HTML; every text among the values is escaped.

    Args:
        template: Jinja; it may include ``style.css``, and what is in its own folder. It gets ``policy``, the content of
            its Content-Security-Policy, and a filter ``visible`` for texts of the user's.
        values: For the template.
    """
    import jinja2  # here, so that a fit starts without it

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["visible"] = show_controls
    return environment.get_template(template.name).render(policy=_POLICY, **values)


def show_controls(text: str) -> str:
    """Make characters visible that would not be, or that would act on a terminal; newlines stay."""
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) in ("Cc", "Cf") and character not in _SHOWN
        else character
        for character in text.translate(_PICTURES)
    )
