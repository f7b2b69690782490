"""Regular expressions over text that a model wrote: bounded in length and in time.

A backtracking engine can take exponential time on a few dozen characters, (a|aa)+$ on a row of a's for one. Text is
cut to a length, and a search that exceeds its time is an error, never a score: no result depends on the clock.
"""

from __future__ import annotations

from itertools import islice

import regex

LIMIT = 10_000  # characters of a text that are searched
SECONDS = 10.0  # a search that takes longer is refused; a sane one takes microseconds


class Pattern:
    """A pattern of the `regex` package, which reads what `re` reads. ValueError where it cannot be compiled."""

    def __init__(self, pattern: str, *, ignore_case: bool = False) -> None:
        try:
            self.compiled = regex.compile(pattern, regex.IGNORECASE if ignore_case else 0)
        except regex.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from error

    def found_in(self, text: str, *, whole: bool = False, most: int = 1, seconds: float | None = None) -> int:
        """How often it matches in the first LIMIT characters, up to `most`, or whether it matches exactly the `whole`
        text, which then must not be longer. ValueError where a search takes too long."""
        if whole and len(text) > LIMIT:
            return 0
        limit = SECONDS if seconds is None else seconds
        try:
            if whole:
                return int(self.compiled.fullmatch(text[:LIMIT], timeout=limit) is not None)
            return sum(1 for _ in islice(self.compiled.finditer(text[:LIMIT], timeout=limit), most))
        except TimeoutError as error:
            raise ValueError(
                f"the pattern {self.compiled.pattern!r} took more than {limit:g} s on {len(text[:LIMIT])} characters: "
                "write it without repetitions inside repetitions"
            ) from error
