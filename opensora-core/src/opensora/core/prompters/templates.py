"""Prompts made longer from templates: without a network, a model or chance, and so for tests and for comparisons.

It knows no language. The user's words stay as they are, line breaks apart, and sentences that fit anything
are put behind them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar, Literal

from attrs import field, frozen

from opensora.core.prompters._phrases import ADDITIONS, MARKERS, SCENES

__all__ = ["Templates", "TemplatesSpec"]

_BREAKS = re.compile(r"\s*[\r\n]+\s*")
Part = Literal["shot", "light", "camera", "detail"]


@frozen(kw_only=True)
class TemplatesSpec:
    """Options of `Templates`."""

    seed: int = 0
    """Another one chooses other sentences."""
    parts: tuple[Part, ...] = field(default=("shot", "light", "camera", "detail"), converter=tuple)
    """What is added, unless a text speaks of it already. Without "camera" for images."""


class Templates:
    """Sentences on shot, light, camera and details behind each text, a scene for an empty one; chosen by text and seed."""

    Spec: ClassVar[type] = TemplatesSpec

    def __init__(self, spec: TemplatesSpec) -> None:
        self.spec = spec

    def refine(self, texts: Sequence[str]) -> list[str]:
        """See `opensora.core.protocols.Prompter`. What becomes of a text depends on nothing but that text and the seed.

        Empty texts are told apart by their number among the empty ones of the call.
        """
        refined, num_empty = [], 0
        for text in texts:
            subject = _BREAKS.sub(" ", text.strip())
            if not subject:
                subject = self._scene(num_empty)
                num_empty += 1
            refined.append(self._expand(subject))
        return refined

    def _expand(self, subject: str) -> str:
        ended = subject if subject[-1] in ".!?\u3002" else f"{subject}."
        added = [self._draw(ADDITIONS[part], part, subject) for part in ADDITIONS if self._is_wanted(part, subject)]
        return " ".join([ended, *added])

    def _is_wanted(self, part: str, subject: str) -> bool:
        spoken_of = part in MARKERS and re.search(rf"\b(?:{MARKERS[part]})\b", subject, re.IGNORECASE)
        return part in self.spec.parts and not spoken_of

    def _scene(self, number: int) -> str:
        scene = SCENES[self._number("scene", number) % len(SCENES)]
        return " ".join(self._draw(phrases, "scene", number, place) for place, phrases in enumerate(scene)) + "."

    def _draw(self, phrases: Sequence[str], *key: object) -> str:
        return phrases[self._number(*key) % len(phrases)]

    def _number(self, *key: object) -> int:
        from opensora.core.randomness import seed_for  # imports torch, which listing components must not

        return seed_for("templates", self.spec.seed, *key)
