"""Mask strategies: which latent frames of which reference go where in a sample, and how far they may change.

    0;0,1,0,-1        the first frame of reference 0 first, the first of reference 1 last
    0,0,-8,0,8        the last 8 frames of reference 0 become the first 8

Entries are separated by ``;``, their fields by ``,``. Fields from the right may be left out:

    loop, reference, reference start, target start, length, edit ratio
    0     0          0                0             1       0

The grammar is that of Open-Sora 1.1 and 1.2. Nothing here needs torch; `opensora.core.given_frames` moves the frames.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import attrs
from attrs import field, frozen
from attrs.validators import and_, ge, le

from opensora.core._pointing import parts_of, pointed, quoted
from opensora.core.errors import ConfigError

__all__ = [
    "FrameEdit",
    "Placement",
    "carry_over",
    "edits_of_round",
    "nearest_multiple",
    "parse_mask_strategy",
    "place_edit",
    "place_edits",
    "print_mask_strategy",
]


@frozen(kw_only=True)
class FrameEdit:
    """Frames of a reference that are given to a sample: an entry of a mask strategy. Frames are latent ones."""

    loop: int = field(default=0, validator=ge(0))
    """The round in which it applies, from 0."""
    reference: int = 0
    """Which of the references; negative from the last."""
    reference_start: int = 0
    """First frame taken; negative from the reference's end."""
    target_start: int = 0
    """First frame replaced; negative from the sample's end."""
    length: int = field(default=1, validator=ge(1))
    """How many frames; fewer if the sample or the reference ends before."""
    edit_ratio: float = field(default=0.0, validator=and_(ge(0), le(1)))
    """0 keeps them as they are, 1 treats them as noise, between: generated from that share of the way on."""


@frozen(kw_only=True)
class Placement:
    """A `FrameEdit` in numbers that count from 0, for one reference and one sample."""

    reference: int
    reference_start: int
    target_start: int
    length: int
    edit_ratio: float
    num_missing: int
    """Frames that the sample has room for and the reference lacks; 0 if the reference was as long as asked."""


_NAMES = tuple(one.name for one in attrs.fields(FrameEdit))
_LIMITS = {
    "loop": (0, math.inf, "Rounds count from 0."),
    "length": (1, math.inf, "At least one latent frame is needed."),
    "edit_ratio": (0, 1, "It is from 0 (kept) to 1 (free)."),
}


def parse_mask_strategy(
    text: str | None, *, num_references: int | None = None, loop: int | None = None
) -> list[FrameEdit]:
    """The entries of a mask strategy, in order; of None or a blank text none.

    Args:
        num_references: If given, entries that name another reference are refused.
        loop: If given, entries for a round beyond it are refused.

    Raises:
        ConfigError: An entry is malformed; the message points at the place.
    """
    if text is None or not text.strip():
        return []
    edits = []
    for column, entry in parts_of(text, ";"):
        edit, columns = _parse_entry(text, entry, column)
        if loop is not None and edit.loop >= loop:
            message = (
                f"mask_strategy: round {edit.loop} of {loop} is none; they count from 0. Raise loop, or change it."
            )
            raise ConfigError(pointed(message, text, columns[0]))
        if num_references is not None and not _has(num_references, edit.reference):
            message = f"mask_strategy: {_no_reference(edit, num_references)}"
            raise ConfigError(pointed(message, text, columns[min(1, len(columns) - 1)]))
        edits.append(edit)
    return edits


def _parse_entry(text: str, entry: str, column: int) -> tuple[FrameEdit, list[int]]:
    """An entry of ``text``, and the columns of its fields."""
    if not entry:
        raise ConfigError(pointed('mask_strategy: an entry is empty. Separate entries with one ";".', text, column))
    fields = list(parts_of(entry, ",", offset=column))
    if len(fields) > len(_NAMES):
        message = f"mask_strategy: an entry has at most {len(_NAMES)} fields: {', '.join(map(_said, _NAMES))}."
        raise ConfigError(pointed(message, text, fields[len(_NAMES)][0]))
    values = {name: _parse_field(text, part, at, name) for name, (at, part) in zip(_NAMES, fields, strict=False)}
    return FrameEdit(**values), [at for at, _ in fields]  # type: ignore[arg-type]  # ints where ints belong


def _parse_field(text: str, part: str, column: int, name: str) -> int | float:
    is_ratio = name == "edit_ratio"
    try:
        value = float(part) if is_ratio else int(part)
    except ValueError:
        wanted = f"{_said(name)} must be a {'number' if is_ratio else 'whole number'}"
        found = f"not {quoted(part)}" if part else "and is empty"
        raise ConfigError(pointed(f"mask_strategy: {wanted}, {found}.", text, column)) from None
    low, high, reason = _LIMITS.get(name, (-math.inf, math.inf, ""))
    if not low <= value <= high:
        raise ConfigError(pointed(f"mask_strategy: {_said(name)} can't be {part}. {reason}", text, column))
    return value


def _said(name: str) -> str:
    return name.replace("_", " ")


def print_mask_strategy(edits: Iterable[FrameEdit]) -> str:
    """The shortest text that `parse_mask_strategy` reads as these entries."""
    return ";".join(map(_print_entry, edits))


def _print_entry(edit: FrameEdit) -> str:
    values = attrs.astuple(edit)
    changed = [index for index, value in enumerate(values) if value != attrs.astuple(FrameEdit())[index]]
    return ",".join(repr(value).removesuffix(".0") for value in values[: max(changed, default=0) + 1])


def edits_of_round(edits: Iterable[FrameEdit], loop: int) -> list[FrameEdit]:
    """Those that apply in this round, in order."""
    return [edit for edit in edits if edit.loop == loop]


def carry_over(*, loop: int, reference: int, length: int, edit_ratio: float = 0.0) -> FrameEdit:
    """The entry by which a round starts with the last frames of the one before.

    Args:
        loop: The round, from 1.
        reference: Where the clip that the round before made stands among the references.
        length: Latent frames to take over.
    """
    return FrameEdit(loop=loop, reference=reference, reference_start=-length, length=length, edit_ratio=edit_ratio)


def nearest_multiple(value: int, align: int, maximum: int) -> int:
    """The multiple of ``align`` nearest to ``value``, the lower one on ties, that leaves ``align`` frames before ``maximum``.

    A multiple itself stays. With ``maximum`` 10 and ``align`` 5, 9 goes to 5.

    Raises:
        ConfigError: ``align`` is less than 1.
    """
    if align < 1:
        raise ConfigError(f"align is {align}; it must be at least 1, or None for no alignment.")
    quotient, rest = divmod(value, align)
    goes_up = rest > align / 2 and quotient < maximum // align - 1
    return (quotient + goes_up) * align


def place_edit(
    edit: FrameEdit, *, reference_frames: int, target_frames: int, align: int | None = None, name: str = ""
) -> Placement:
    """Where an edit takes frames from, and where it puts them.

    Args:
        reference_frames: Latent frames that its reference has.
        target_frames: Latent frames of the sample.
        align: Move both starts to the nearest multiple of this.
        name: Of the reference, for messages.

    Raises:
        ConfigError: A start is outside of the reference or the sample.
    """
    whose = f"reference {edit.reference}{f' ({name})' if name else ''}"
    reference_start = _start(edit, edit.reference_start, reference_frames, align, whose)
    target_start = _start(edit, edit.target_start, target_frames, align, "the sample")
    wanted = min(edit.length, target_frames - target_start)
    length = min(wanted, reference_frames - reference_start)
    return Placement(
        reference=edit.reference,
        reference_start=reference_start,
        target_start=target_start,
        length=length,
        edit_ratio=edit.edit_ratio,
        num_missing=wanted - length,
    )


def place_edits(
    edits: Iterable[FrameEdit],
    reference_frames: Sequence[int],
    *,
    target_frames: int,
    align: int | None = None,
    names: Sequence[str] = (),
) -> list[Placement]:
    """`place_edit` for the edits of one round. Needs no frames, only how many there are: so a run can be checked ahead.

    Args:
        reference_frames: Latent frames of each reference.
        names: Of the references, for messages.

    Raises:
        ConfigError: A reference is missing, or a start is outside.
    """
    placements = []
    for edit in edits:
        if not _has(len(reference_frames), edit.reference):
            raise ConfigError(
                f'Mask strategy "{_print_entry(edit)}" can\'t be applied: {_no_reference(edit, len(reference_frames))}'
            )
        index = edit.reference % len(reference_frames)
        placement = place_edit(
            edit,
            reference_frames=reference_frames[index],
            target_frames=target_frames,
            align=align,
            name=names[index] if index < len(names) else "",
        )
        placements.append(attrs.evolve(placement, reference=index))
    return placements


def _start(edit: FrameEdit, start: int, frames: int, align: int | None, whose: str) -> int:
    """A start that counts from 0."""
    if not _has(frames, start):
        raise ConfigError(
            f'Mask strategy "{_print_entry(edit)}" starts at latent frame {start} of {whose}, which has {frames}'
            + (f"; a start is from {-frames} to {frames - 1}." if frames else ".")
        )
    resolved = start % frames
    return resolved if align is None else nearest_multiple(resolved, align, frames)


def _has(count: int, index: int) -> bool:
    return -count <= index < count


def _no_reference(edit: FrameEdit, count: int) -> str:
    there = f"there are {count}, counted from 0" if count else "there is none"
    return f"reference {edit.reference} is missing: {there}."
