"""Words to numbers, kept as JSON."""

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from .data import InputError

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

    @classmethod
    def from_json(cls, path: Path) -> "Vocabulary":
        try:
            words = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(f"{path}: no such file") from None
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: not a vocabulary: {error}") from None
        if (
            not isinstance(words, list)
            or words[:2] != SPECIAL
            or not all(isinstance(word, str) for word in words)
            or len(set(words)) != len(words)
        ):
            raise InputError(f"{path}: not a vocabulary: expected a list of words, {SPECIAL} first")
        return cls(words)

    def to_json(self) -> bytes:
        return json.dumps(self.words, ensure_ascii=False, indent=0).encode()

    def encode(self, caption: str) -> list[int]:
        return [self._index.get(word, UNKNOWN) for word in tokenize(caption)]

    def __len__(self) -> int:
        return len(self.words)
