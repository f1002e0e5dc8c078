"""The version of what this package writes into checkpoints and adapter folders."""

from qlora_lightning.errors import UserError

FORMAT_VERSION = 1


def check_version(version: int, source: str) -> None:
    """Refuse a format that a newer version of this package wrote.

    Raises:
        UserError: It is newer.
    """
    if version > FORMAT_VERSION:
        raise UserError(
            f"{source} has format version {version}, and this version of qlora_lightning reads up to {FORMAT_VERSION}: "
            "update qlora_lightning."
        )
