"""Numbers of bytes as people read them."""


def format_bytes(count: int) -> str:
    """Word a number of bytes in decimal units, as file managers and model hubs do: ``98 MB``, ``5.6 GB``."""
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    digits = 1 if unit in ("GB", "TB") and size < 100 else 0
    return f"{size:.{digits}f} {unit}"
