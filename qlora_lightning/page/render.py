"""Renders a page that needs nothing beside itself: no request, no font, and no script but one that is named."""

import base64
import hashlib
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from qlora_lightning.page.visible import show_controls


def render_page(template: Path, script: str = "", **values: Any) -> str:
    """Return a page's HTML; every text among the values is escaped.

    Args:
        template: Jinja; it may include ``style.css``, and what lies in its own folder. It gets ``policy``, the content
            of its Content-Security-Policy, ``script``, and a filter ``visible`` for texts of the user's.
        script: JavaScript, the only one that the policy lets a browser run: its hash stands there.
        values: For the template.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["visible"] = show_controls
    found = environment.get_template(template.name)
    return found.render(policy=Markup(_policy(script)), script=Markup(script), **values)


def _policy(script: str) -> str:
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    if not script:
        return policy
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"{policy}; script-src 'sha256-{digest}'"
