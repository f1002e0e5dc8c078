"""Lines for the user, as they are: paths and row texts may look like markup."""

import rich


def say(line: str) -> None:
    """Print a line without markup, colours or breaks of our own."""
    rich.get_console().print(line, markup=False, highlight=False, soft_wrap=True)
