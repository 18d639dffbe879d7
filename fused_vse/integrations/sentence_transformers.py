"""Sentence Transformers: `losses.MultipleNegativesRankingLoss` (arXiv 1705.00652)."""

import inspect

import torch
from torch import Tensor, distributed

from ..arguments import check_temperature
from ..distributed.peers import check_on_all
from ..normalization import l2_normalize
from ..ops import accumulation_dtype
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

    A `similarity_fct` other than `cos_sim` and `dot_score` runs the library's own code.
    """

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        """The loss of queries [B, D], positives [B, D] and any number of columns of negatives [B, D]."""
        if self.similarity_fct not in (cos_sim, dot_score) or len(embeddings) < 2:
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
        query = torch.arange(own, device=queries.device)
        if group := self._group():  # of all ranks
            query = query * group.size() + group.rank()
        ids = query, query.repeat(len(embeddings) - 1)

        both = None
        if not self._weighted or "doc_to_query" in self.directions:
            both = self._statistic(queries, documents, own)
        if self._weighted:
            pairs, from_queries = self._weighted_queries(embeddings, documents, own, ids)
        else:
            pairs, from_queries = both[0], self._relative(both[0], both, 0)
        # Every term is log Σ exp over one direction's candidates, less the positive's logit, which nearly
        # cancels; the candidates of two of them hold the positive, too.
        zero = torch.zeros((), dtype=torch.float64, device=pairs.device)
        logits = {"query_to_doc": torch.logaddexp(from_queries, zero)}
        if "doc_to_query" in self.directions:
            logits["doc_to_query"] = torch.logaddexp(self._relative(pairs, both, 1), zero)
        if "query_to_query" in self.directions:
            logits["query_to_query"] = self._relative(
                pairs, self._statistic(queries, queries, own), 0
            )
        if "doc_to_doc" in self.directions:
            logits["doc_to_doc"] = self._relative(
                pairs, self._statistic(embeddings[1], documents, own, *ids), 0
            )

        terms = torch.stack([logits[direction] for direction in self.directions])
        normalizer = terms.logsumexp(0) if self.partition_mode == "joint" else terms.mean(0)
        return normalizer.mean().to(pairs.dtype)

    @property
    def _weighted(self) -> bool:
        return self.hardness_mode is not None and self.hardness_strength > 0

    def _weighted_queries(
        self, embeddings: list[Tensor], documents: Tensor, own: int, ids: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Positive scores [K], and log Σ exp(scale (s - p) + strength stop_gradient(s)) [K] over its
        documents. Those of the query itself and those of others may have different strengths."""
        queries, strength = embeddings[0], self.hardness_strength
        if self.hardness_mode == "all_negatives":
            statistic = self._statistic(queries, documents, own, hardness=strength)
            return statistic[0], self._relative(statistic[0], statistic, 0)
        in_batch = self.hardness_mode == "in_batch_negatives"
        statistic = self._statistic(queries, documents, own, *ids, strength * in_batch)
        terms = [self._relative(statistic[0], statistic, 0)]
        for negatives in embeddings[2:]:  # as pairs of the queries
            scores = self._scores_of_pairs(queries, negatives)
            logits = self.scale * (scores - statistic[0])
            terms.append((logits if in_batch else logits + strength * scores.detach()).double())
        # Where there is one query only, its own negatives are all.
        return statistic[0], terms[0] if len(terms) == 1 else torch.stack(terms).logsumexp(0)

    def _scores_of_pairs(self, *pair: Tensor) -> Tensor:
        if self.similarity_fct is cos_sim:
            pair = map(l2_normalize, pair)
        queries, documents = (x.to(accumulation_dtype(x.dtype)) for x in pair)
        return (queries * documents).sum(1)

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
        hardness: float = 0.0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        normalize = self.similarity_fct is cos_sim
        inputs = rows, columns, None, row_ids, column_ids, own, "dot", normalize
        scale = float(check_temperature(self.scale, torch.device("cpu"), "scale"))
        batch, _, peers = checked(inputs, 1 / scale, self._group())
        return logsumexp_statistic(batch, scale, "auto", peers, hardness=hardness)

    def _relative(self, pairs: Tensor, statistic: tuple, direction: int) -> Tensor:
        """log Σ exp(scale (s - p)) over the negatives [K], with p of `pairs`."""
        _, reference, log_sum = (x if x.dim() == 1 else x[direction] for x in statistic)
        return self.scale * (reference - pairs) + log_sum
