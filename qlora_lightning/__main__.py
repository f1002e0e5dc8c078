"""``python -m qlora_lightning``."""

import sys

from qlora_lightning.cli import main

if __name__ == "__main__":
    sys.exit(main())
