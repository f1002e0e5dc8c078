"""What every HTML page of ours shares: one style, nothing beside itself, and whatever comes from outside stays text."""

from pathlib import Path
from typing import Any

from qlora_lightning.support.console import show_controls

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # no script, no request, no font


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
