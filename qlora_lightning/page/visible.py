"""Texts of rows and files, made safe to look at."""

import unicodedata

_JOINER = "\N{ZERO WIDTH JOINER}"  # inside emoji


def show_controls(text: str) -> str:
    """Make characters visible that would not be, or that would act on a terminal; newlines stay."""
    return "".join(map(_show_control, text))


def _show_control(character: str) -> str:
    code = ord(character)
    if character == "\t":
        return "⇥"
    if code < 32 and character != "\n":
        return chr(0x2400 + code)  # Unicode's pictures of control characters
    if code == 127:
        return "␡"
    invisible = unicodedata.category(character) in ("Cc", "Cf") and character not in ("\n", _JOINER)
    if not invisible:
        return character
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"
