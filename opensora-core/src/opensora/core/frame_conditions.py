"""Frames to start from, in readable names: an image to animate, a clip to extend, two to connect, one to edit.

Each means the same as references with a mask strategy; see `opensora.core.mask_strategy`.

    image        first.png              0                   of a video its first frame
    last_image   last.png               0,0,0,-1
    extend       clip.mp4               0,0,-L,0,L          L: condition_frame_length, latent frames
    connect      a.png, b.png           0;0,1,0,-1
    connect      a.mp4, b.mp4           0,0,-L,0,L;0,1,0,-L,L
    edit         clip.mp4, strength s   0,0,0,0,(all),s
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from attrs import evolve, frozen

from opensora.core.errors import ConfigError
from opensora.core.mask_strategy import FrameEdit, parse_mask_strategy
from opensora.core.prompt_syntax import is_url, split_references

__all__ = ["ALL_FRAMES", "DEFAULT_STRENGTH", "given_frames_of", "override_conditions"]

ALL_FRAMES = 1_000_000
"""A length that stands for as many frames as the sample has."""
DEFAULT_STRENGTH = 0.5
"""Of ``edit``, if none is given."""

_READABLE = ("image", "last_image", "extend", "connect", "edit")
_GRAMMAR = ("reference_path", "mask_strategy")
_ENDS = {
    "first": ("image", "extend", "connect", "edit"),
    "last": ("last_image", "connect", "edit"),
}
"""Which frames each name gives; two can't give the same."""


def given_frames_of(
    *,
    length: int,
    image: str | None = None,
    last_image: str | None = None,
    extend: str | None = None,
    connect: Sequence[str] | None = None,
    edit: str | None = None,
    strength: float | None = None,
    reference_path: str | None = None,
    mask_strategy: str | None = None,
    loop: int | None = None,
) -> tuple[list[str], list[FrameEdit]]:
    """References (paths and URLs) and what of them goes where in a sample. Opens no file; kinds are told by extensions.

    Args:
        length: Latent frames that ``extend`` and ``connect`` take from a video, or give to it.
        strength: How far ``edit`` may change the clip, in (0, 1]; None: 0.5.
        reference_path: The general form, ``;``-separated, with ``mask_strategy``; goes with none of the names above.
        loop: How many rounds there are, to check those that ``mask_strategy`` names.

    Raises:
        ConfigError: Two of them contradict each other, one lacks another, or a value is wrong.
    """
    given = {"image": image, "last_image": last_image, "extend": extend, "connect": connect, "edit": edit}
    names = [name for name, value in given.items() if value is not None]
    _check_alone(names, has_strength=strength is not None, grammar=_filled(reference_path, mask_strategy))
    if not names:
        return _from_grammar(reference_path, mask_strategy, loop)
    _check_ends(names)
    if length < 1:
        raise ConfigError(f"condition_frame_length is {length}; at least one latent frame is needed.")
    pieces: list[_Piece] = []
    if image is not None:
        pieces.append(_Piece(_of_kind("image", image, None), FrameEdit()))
    if extend is not None:
        pieces.append(_Piece(_of_kind("extend", extend, "video"), _last_to_first(length)))
    if connect is not None:
        pieces += _connection(connect, length)
    if last_image is not None:
        pieces.append(_Piece(_of_kind("last_image", last_image, "image"), FrameEdit(target_start=-1)))
    if edit is not None:
        pieces.append(_Piece(_of_kind("edit", edit, None), _change_all(strength)))
    edits = [evolve(piece.edit, reference=index) for index, piece in enumerate(pieces)]
    return [piece.path for piece in pieces], edits


def override_conditions(general: Mapping[str, Any], special: Mapping[str, Any]) -> dict[str, Any]:
    """Conditions of one prompt over those of its run, so that the two never contradict each other. None is not given.

    A readable name in ``special`` takes the place of all in ``general``; ``reference_path`` or ``mask_strategy`` take that of
    the readable names, and each that of its own kind.

    Args:
        general: Arguments of `given_frames_of`, of those that say what is given.
        special: The same.
    """
    said = {name: value for name, value in special.items() if value is not None}
    dropped: tuple[str, ...] = ()
    if said.keys() & set(_READABLE):
        dropped = (*_READABLE, *_GRAMMAR, "strength")
    elif said.keys() & set(_GRAMMAR):
        dropped = (*_READABLE, "strength")
    return {**{name: value for name, value in general.items() if name not in dropped}, **said}


@frozen
class _Piece:
    path: str
    edit: FrameEdit


def _last_to_first(length: int) -> FrameEdit:
    return FrameEdit(reference_start=-length, length=length)


def _first_to_last(length: int) -> FrameEdit:
    return FrameEdit(target_start=-length, length=length)


def _change_all(strength: float | None) -> FrameEdit:
    strength = DEFAULT_STRENGTH if strength is None else strength
    if not 0 < strength <= 1:
        raise ConfigError(f"strength is {strength}; it is from above 0 (hardly changed) to 1 (all new).")
    return FrameEdit(length=ALL_FRAMES, edit_ratio=strength)


def _connection(connect: Sequence[str], length: int) -> list[_Piece]:
    if isinstance(connect, str) or len(connect) != 2:
        raise ConfigError(f"connect is {connect!r}; it takes two files: the one to come from, the one to arrive at.")
    before, after = (_of_kind("connect", path, None) for path in connect)
    return [
        _Piece(before, FrameEdit() if _kind(before) == "image" else _last_to_first(length)),
        _Piece(after, _first_to_last(1 if _kind(after) == "image" else length)),
    ]


def _from_grammar(
    reference_path: str | None, mask_strategy: str | None, loop: int | None
) -> tuple[list[str], list[FrameEdit]]:
    references = split_references(reference_path)
    edits = parse_mask_strategy(mask_strategy, num_references=len(references), loop=loop)
    if references and not edits:
        raise ConfigError(
            f'reference_path "{reference_path}" has no mask_strategy, so nothing of it would be used. '
            'mask_strategy "0" makes its first frame the first of the sample.'
        )
    return references, edits


def _filled(reference_path: str | None, mask_strategy: str | None) -> list[str]:
    return [name for name, value in zip(_GRAMMAR, (reference_path, mask_strategy), strict=True) if value]


def _check_alone(names: Sequence[str], *, has_strength: bool, grammar: Sequence[str]) -> None:
    """Refuse readable names with the general form, and a strength of nothing."""
    readable = [*names, *(["strength"] if has_strength else [])]
    if readable and grammar:
        raise ConfigError(
            f"{readable[0]} and {grammar[0]} can't be given together: both say which frames are given. "
            "A mask strategy says all that the readable names do; see docs/prompts.md."
        )
    if has_strength and "edit" not in names:
        raise ConfigError("strength is given without edit. It says how far the clip of edit may change.")


def _check_ends(names: Sequence[str]) -> None:
    for end, givers in _ENDS.items():
        both = [name for name in names if name in givers]
        if len(both) > 1:
            raise ConfigError(
                f"{both[0]} and {both[1]} contradict each other: both give the {end} frames. Leave one out."
            )


def _of_kind(name: str, path: str, wanted: str | None) -> str:
    """The path, unless its extension is that of the other kind."""
    if not path.strip():
        raise ConfigError(f"{name} is empty; give a file.")
    kind = _kind(path)
    if wanted and kind and kind != wanted:
        instead = "extend, connect or edit" if kind == "video" else "image, last_image or connect"
        raise ConfigError(f"{name} is {path}, but takes {_ARTICLES[wanted]}. For {_ARTICLES[kind]} there is {instead}.")
    return path


_ARTICLES = {"image": "an image", "video": "a video"}


def _kind(path: str) -> str | None:
    """Image or video, by the extension; None if that tells nothing."""
    from opensora.core.video import is_image, is_video  # imports torch

    name = urlsplit(path).path if is_url(path) else path
    return "image" if is_image(name) else "video" if is_video(name) else None
