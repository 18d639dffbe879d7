"""Checks under the names that a project's users know; what passes is left to the losses."""

from torch import Tensor

from ..arguments import check_embeddings, check_matrix, describe


def check_pairs(**embeddings: object) -> None:
    """Raises TypeError or ValueError unless both are embeddings [B, D] of the same pairs."""
    one, other = embeddings
    check_embeddings(*embeddings.values(), (one, other))
    rows = [x.shape[0] for x in embeddings.values()]
    if rows[0] != rows[1]:
        raise ValueError(f"{one} and {other} must be pairs, got {rows[0]} and {rows[1]} rows")


def check_square(**matrix: object) -> None:
    """Raises TypeError or ValueError unless it is a score matrix [B, B]."""
    ((name, scores),) = matrix.items()
    check_matrix(name, scores, "[B, B]")
    if scores.shape[0] != scores.shape[1]:
        raise ValueError(f"{name} must be a matrix [B, B] of pairs, got shape {list(scores.shape)}")


def option(opt: object, name: str) -> object:
    """`opt.<name>`; raises TypeError where there is none."""
    if not hasattr(opt, name):
        raise TypeError(f"opt must have the attribute {name!r}, got {describe(opt)}")
    return getattr(opt, name)


def mean_of(name: str, embeddings: object) -> Tensor | object:
    """The entry "mean" of a dict, or what it got."""
    if not isinstance(embeddings, dict):
        return embeddings
    if "mean" not in embeddings:
        raise TypeError(
            f"{name} must be a tensor or a dict with the entry 'mean', got the entries {list(embeddings)}"
        )
    return embeddings["mean"]
