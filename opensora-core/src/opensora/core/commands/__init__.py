"""The commands ``opensora`` and ``opensora-run``."""
