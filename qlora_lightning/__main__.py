"""``python -m qlora_lightning``."""

import sys

if __name__ == "__main__":
    if not sys.flags.safe_path:
        del sys.path[0]  # the current folder, whose modules Python would find first
    from qlora_lightning.cli import main

    sys.exit(main())
