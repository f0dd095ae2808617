"""Conformance: what every component must do, for the built-in ones and for yours.

In a plugin's tests::

    from opensora.core.testing import check_denoiser

    def test_tiny_conforms():
        check_denoiser("Tiny/2", width=8)

or from a shell: ``opensora verify models Tiny/2 width=8``. Each check that fails raises ``AssertionError`` and says what
was expected.
"""

from opensora.core.testing._denoisers import check_denoiser
from opensora.core.testing._encoders import check_text_encoder, check_vae
from opensora.core.testing._prompters import check_prompter
from opensora.core.testing._report import Report, check
from opensora.core.testing._schedulers import ToyDenoiser, check_scheduler

__all__ = [
    "Report",
    "ToyDenoiser",
    "check",
    "check_denoiser",
    "check_prompter",
    "check_scheduler",
    "check_text_encoder",
    "check_vae",
]
