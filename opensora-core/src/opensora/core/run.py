"""``python -m opensora.core.run``: what ``opensora-run`` does, for launchers that want a module, such as torchrun."""

import sys

from opensora.core.commands.opensora_run import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
