"""Do the tests see deliberate bugs? Each is put into a copy of the sources, one at a time, and the tests run:

    python -m tests.mutations [-k hopper] [--new] [--survivors]

Results go to RESULTS.md beside this file, a row a bug: what killed it. A survivor needs a test, or a sentence
why it changes nothing (`Bug.equivalent`).
"""

from typing import NamedTuple


class Bug(NamedTuple):
    name: str
    file: str  # below the root of the repository
    old: str  # occurs once
    new: str
    also: tuple[tuple[str, str, str], ...] = ()  # file, old, new of further changes
    equivalent: str = ""  # why no test can see it

    @property
    def changes(self) -> tuple[tuple[str, str, str], ...]:
        return (self.file, self.old, self.new), *self.also
