"""Sentence Transformers: `losses.MultipleNegativesRankingLoss` (arXiv 1705.00652)."""

import inspect

import torch
from torch import Tensor, distributed

from ..arguments import check_temperature
from ..distributed.peers import check_on_all
from ..statistics import checked, logsumexp_statistic

try:
    from sentence_transformers.util import cos_sim, dot_score

    try:
        from sentence_transformers.sentence_transformer import losses
    except ModuleNotFoundError:  # before 5.4
        from sentence_transformers import losses
    if "hardness_mode" not in inspect.signature(losses.MultipleNegativesRankingLoss).parameters:
        raise ImportError("the installed one is older")
except ImportError as error:
    raise ImportError(
        "fused_vse.integrations.sentence_transformers needs sentence-transformers 5.3 or newer"
        f" ({error}): pip install -U 'sentence-transformers>=5.3'"
    ) from error


class MultipleNegativesRankingLoss(losses.MultipleNegativesRankingLoss):
    """The library's loss with the score matrices left out; the same arguments, `directions` included.

    A `similarity_fct` other than `cos_sim` and `dot_score`, and hardness weighting, which needs every
    score, run the library's own code.
    """

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        """The loss of queries [B, D], positives [B, D] and any number of columns of negatives [B, D]."""
        weighted = self.hardness_mode is not None and self.hardness_strength > 0
        if weighted or self.similarity_fct not in (cos_sim, dot_score) or len(embeddings) < 2:
            return super().compute_loss_from_embeddings(embeddings, labels)

        own = embeddings[0].shape[0]

        def check() -> None:
            if embeddings[1].shape[0] < own:
                raise ValueError(
                    f"embeddings must hold a positive for each of the {own} queries, got"
                    f" {embeddings[1].shape[0]} rows in column 1"
                )

        check_on_all(self._group(), check)
        queries, documents = embeddings[0], torch.cat(embeddings[1:])
        columns = len(embeddings) - 1

        both = self._statistic(queries, documents, own)
        pairs = both[0]
        # Every term is log Σ exp over one direction's candidates, less the positive's logit, which nearly
        # cancels; the candidates of two of them hold the positive, too.
        zero = torch.zeros((), dtype=torch.float64, device=pairs.device)
        logits = {
            "query_to_doc": torch.logaddexp(self._relative(pairs, both, 0), zero),
            "doc_to_query": torch.logaddexp(self._relative(pairs, both, 1), zero),
        }
        if "query_to_query" in self.directions:
            logits["query_to_query"] = self._relative(
                pairs, self._statistic(queries, queries, own), 0
            )
        if "doc_to_doc" in self.directions:
            query = torch.arange(own, device=queries.device)
            if group := self._group():  # of all ranks
                query = query * group.size() + group.rank()
            ids = query, query.repeat(columns)
            logits["doc_to_doc"] = self._relative(
                pairs, self._statistic(embeddings[1], documents, own, *ids), 0
            )

        terms = torch.stack([logits[direction] for direction in self.directions])
        normalizer = terms.logsumexp(0) if self.partition_mode == "joint" else terms.mean(0)
        return normalizer.mean().to(pairs.dtype)

    def _group(self) -> "distributed.ProcessGroup | None":
        """The ranks that share a batch."""
        shared = self.gather_across_devices and distributed.is_initialized()
        return distributed.group.WORLD if shared else None

    def _statistic(
        self,
        rows: Tensor,
        columns: Tensor,
        own: int,
        row_ids: Tensor | None = None,
        column_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        normalize = self.similarity_fct is cos_sim
        inputs = rows, columns, None, row_ids, column_ids, own, "dot", normalize
        scale = float(check_temperature(self.scale, torch.device("cpu"), "scale"))
        batch, _, peers = checked(inputs, 1 / scale, self._group())
        return logsumexp_statistic(batch, scale, "auto", peers)

    def _relative(self, pairs: Tensor, statistic: tuple, direction: int) -> Tensor:
        """log Σ exp(scale (s - p)) over the negatives [K], with p of `pairs`."""
        _, reference, log_sum = (x if x.dim() == 1 else x[direction] for x in statistic)
        return self.scale * (reference - pairs) + log_sum
