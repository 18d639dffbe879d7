"""Words to numbers."""

import re
from collections import Counter
from collections.abc import Iterable

PADDING, UNKNOWN = 0, 1
SPECIAL = ["<padding>", "<unknown>"]
# A word only seen once trains the unknown word instead of a vector of its own.
LEAST_COUNT = 2
TOKEN = re.compile(r"\w+(?:['’-]\w+)*|[^\w\s]")


def tokenize(caption: str) -> list[str]:
    """Lower-case words and punctuation marks."""
    return TOKEN.findall(caption.lower())


class Vocabulary:
    """A number for every word; index 0 pads, index 1 stands for every unknown word."""

    def __init__(self, words: list[str]) -> None:
        self.words = words
        self._index = {word: i for i, word in enumerate(words)}

    @classmethod
    def build(cls, captions: Iterable[str]) -> "Vocabulary":
        counts = Counter(word for caption in captions for word in tokenize(caption))
        return cls(SPECIAL + sorted(word for word in counts if counts[word] >= LEAST_COUNT))

    def encode(self, caption: str) -> list[int]:
        return [self._index.get(word, UNKNOWN) for word in tokenize(caption)]

    def __len__(self) -> int:
        return len(self.words)
