"""The plugin's whole test."""

from opensora.core.testing import check_denoiser


def test_tiny_conforms():
    check_denoiser("Tiny/2", width=8)
