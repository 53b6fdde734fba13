"""The order of what is measured in turn. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def turned(items: Sequence[T], number: int) -> list[T]:
    """The items in the order of round `number`: A B C, B C A, C A B, and again.

    In a fixed order whatever recurs with each round, a card that is cold at its start say, would be the first one's.
    """
    begin = number % len(items) if items else 0
    return [*items[begin:], *items[:begin]]
