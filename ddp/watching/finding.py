"""What looks wrong, in words."""

from __future__ import annotations

from dataclasses import dataclass

SEPARATOR = ": "


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is off. A run says it once: `title` tells whether it was said.

    Attributes:
        title: what, and where if it is one layer; without a colon.
        text: the numbers, and what to do.
    """

    title: str
    text: str

    @property
    def sentence(self) -> str:
        return f"{self.title}{SEPARATOR}{self.text}"


def title_of(sentence: str) -> str:
    """The title of a sentence that a finding made."""
    return sentence.partition(SEPARATOR)[0]


def listed(names: list[str], most: int = 3) -> str:
    """The first few, and how many more: "a, b, c and 4 more"."""
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
