"""Stop strings in text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Holds back only text that could still become a stop string, and cuts at the first one to complete.

    One Knuth–Morris–Pratt automaton a stop string: O(1) a character and string, whatever the strings.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """`stops` are not empty. None of them ever appears in what `feed` and `finish` return."""
        self._stops = stops
        self._fallbacks = [_fallbacks(stop) for stop in stops]
        self._matched = [0] * len(stops)  # leading characters of each stop string that the text ends with
        self._held = ""

    def feed(self, piece: str) -> tuple[str, bool]:
        """Text that can go out now, and whether a stop string has completed. Feed nothing after that."""
        text = self._held + piece
        for position, char in enumerate(piece, start=len(self._held) + 1):
            cut = self._step(char, position)
            if cut is not None:
                self._held = ""
                return text[:cut], True
        certain = len(text) - max(self._matched, default=0)
        self._held = text[certain:]
        return text[:certain], False

    def finish(self) -> str:
        """What was held back, when no text follows."""
        held, self._held = self._held, ""
        return held

    def _step(self, char: str, position: int) -> int | None:
        """Advance all automata; the earliest start among the stop strings that end at `position`."""
        cut: int | None = None
        for i, stop in enumerate(self._stops):
            matched = self._matched[i]
            while matched and stop[matched] != char:
                matched = self._fallbacks[i][matched - 1]
            if stop[matched] == char:
                matched += 1
            self._matched[i] = matched
            if matched == len(stop):
                start = position - matched
                cut = start if cut is None else min(cut, start)
        return cut


def _fallbacks(stop: str) -> list[int]:
    """For each prefix of `stop`: the length of its longest proper suffix that is also its prefix."""
    table = [0] * len(stop)
    length = 0
    for i in range(1, len(stop)):
        while length and stop[i] != stop[length]:
            length = table[length - 1]
        if stop[i] == stop[length]:
            length += 1
        table[i] = length
    return table
