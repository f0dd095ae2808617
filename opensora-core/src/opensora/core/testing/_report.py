"""Collecting the outcome of checks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from attrs import define, field

from opensora.core.errors import ComponentError

__all__ = ["Report", "check"]

_CHECKERS = {
    "models": ("_denoisers", "check_denoiser"),
    "schedulers": ("_schedulers", "check_scheduler"),
    "text_encoders": ("_encoders", "check_text_encoder"),
    "vaes": ("_encoders", "check_vae"),
    "prompters": ("_prompters", "check_prompter"),
}


@define
class Report:
    """Which checks passed, in order; a failing one raises."""

    component: str
    passed: list[str] = field(factory=list)
    on_pass: Callable[[str], None] | None = None

    @contextmanager
    def checking(self, title: str) -> Iterator[None]:
        """A check: the block raises ``AssertionError`` if the component doesn't conform.

        Raises:
            AssertionError: Names the component and the check.
        """
        try:
            yield
        except Exception as error:  # whatever a component raises here is its failure, and is chained
            raise AssertionError(f"{self.component}: {title}: {type(error).__name__}: {error}") from error
        self.passed.append(title)
        if self.on_pass:
            self.on_pass(title)


def check(kind: str, name: str, *, on_pass: Callable[[str], None] | None = None, **options: Any) -> Report:
    """Run the checks of a kind. ``options`` are those of the component's ``Spec``, and keywords of the checker.

    Args:
        on_pass: Called with each check's title as it passes.

    Raises:
        AssertionError: A check failed.
        ComponentError: There are no checks for this kind.
    """
    if kind not in _CHECKERS:
        raise ComponentError(f'There are no checks for kind "{kind}"; there are for {", ".join(_CHECKERS)}.')
    module, function = _CHECKERS[kind]
    checker = getattr(import_module(f"opensora.core.testing.{module}"), function)
    report: Report = checker(name, on_pass=on_pass, **options)
    return report
