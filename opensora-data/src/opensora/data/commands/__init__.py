"""The command ``opensora data``."""
