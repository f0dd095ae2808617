"""Commands that this package adds to `opensora`."""
