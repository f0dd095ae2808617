"""How much a config may compute, so that one that is huge by accident or on purpose can't hang or fill the machine."""

from __future__ import annotations

MAX_FILE_BYTES = 1_000_000
MAX_WORK = 2_000_000
"""Units of work for one file: about one for each expression evaluated and each element or 8 characters made or read."""
MAX_INT_BITS = 16_384
MAX_DEPTH = 50
"""Of dicts and lists in one another."""


class TooMuchError(Exception):
    """An expression would compute or hold too much; the message completes "this ..."."""


class Budget:
    """Counts the work of evaluating one file, so that nested repetition ends early instead of filling the memory.

    A container weighs as much as everything in it, counted as often as it is there: a list that holds one list a
    thousand times weighs a thousand lists, since whoever walks, prints or compares it takes that long.
    """

    def __init__(self) -> None:
        self._left = MAX_WORK
        self._measures: dict[int, tuple[int, int]] = {}
        self._alive: list[object] = []  # an id stays ours only while its object lives

    def spend(self, amount: int) -> None:
        """Take from what is left.

        Raises:
            TooMuchError: Nothing is left.
        """
        self._left -= amount
        if self._left < 0:
            raise TooMuchError("computes more than a config may")

    def weigh(self, value: object) -> int:
        """Roughly the number of elements, counted through all levels.

        Raises:
            TooMuchError: The levels are too many.
        """
        weight, depth = self._measure(value)
        if depth > MAX_DEPTH:
            raise TooMuchError(f"nests more than {MAX_DEPTH} levels")
        return weight

    def _measure(self, value: object) -> tuple[int, int]:
        if isinstance(value, str):
            return 1 + len(value) // 8, 0
        if isinstance(value, int):
            return 1 + value.bit_length() // 64, 0
        if isinstance(value, range):
            return 1 + len(value), 1
        if not isinstance(value, list | tuple | dict):
            return 1, 0
        if id(value) not in self._measures:
            parts = [*value, *value.values()] if isinstance(value, dict) else value
            measures = [self._measure(part) for part in parts]
            self._measures[id(value)] = (
                1 + sum(weight for weight, _ in measures),
                1 + max((depth for _, depth in measures), default=0),
            )
            self._alive.append(value)
        return self._measures[id(value)]


def check_int_power(base: object, exponent: object) -> None:
    """Refuse ``base ** exponent`` that has too many bits."""
    if isinstance(base, int) and isinstance(exponent, int) and exponent > 0:
        _check_bits(base.bit_length() * exponent)


def check_int_shift(value: object, by: object) -> None:
    """Refuse ``value << by`` that has too many bits."""
    if isinstance(value, int) and isinstance(by, int) and by > 0:
        _check_bits(value.bit_length() + by)


def check_int_product(left: object, right: object) -> None:
    """Refuse ``left * right`` that has too many bits."""
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() + right.bit_length())


def _check_bits(bits: int) -> None:
    if bits > MAX_INT_BITS:
        raise TooMuchError("makes a number larger than a config may")
