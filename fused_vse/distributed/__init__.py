"""Losses over the batch of all ranks: `group=` of every loss, and `gather_rows` for those who want rows."""

from .exchange import set_gather_bytes
from .rows import gather_rows

__all__ = ["gather_rows", "set_gather_bytes"]
