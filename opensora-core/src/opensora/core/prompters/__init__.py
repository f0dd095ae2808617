"""Prompters: what rewrites prompts before a text encoder reads them. Each is imported when it is used."""
