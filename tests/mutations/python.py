"""Bugs in the Python formulas and in what the ranks exchange."""

from . import Bug

LOSSES, STATISTICS = "fused_vse/losses.py", "fused_vse/statistics.py"
RANKS, EXCHANGE = "fused_vse/distributed/statistics.py", "fused_vse/distributed/exchange.py"

BUGS = [
    Bug("all negatives: sign of the margin", LOSSES, "reference - margin) - log_sum", "reference + margin) - log_sum"),
    Bug("all negatives: the log-sum is scaled, too", LOSSES, "(positive - reference - margin) - log_sum", "(positive - reference - margin - log_sum)"),
    Bug("hardest: no hinge", LOSSES, "hardest.positive_scores + margin).relu(), hardest", "hardest.positive_scores + margin), hardest"),
    Bug("smooth: an anchor without negatives counts", LOSSES, "return torch.where(alone, 0, -logsigmoid(-scale * violation)), hardest", "return -logsigmoid(-scale * violation), hardest"),
    Bug("mean over one pair too many", LOSSES, 'total / loss.shape[1] if reduction', 'total / (loss.shape[1] + 1) if reduction'),
    Bug("direction weights swapped", LOSSES, "[loss[0] * weights[0], loss[1] * weights[1]]", "[loss[0] * weights[1], loss[1] * weights[0]]"),
    Bug("recall counts a draw", LOSSES, "(positive > scores)", "(positive >= scores)"),
    Bug("active share without the margin", LOSSES, "(scores - positive + margin > 0)", "(scores - positive > 0)"),
    Bug("gradient without the thresholds' part", STATISTICS, "d_positive - of_thresholds, d_total", "d_positive, d_total"),
    Bug("thresholds of the other pairs", STATISTICS, "threshold = (positive - margin).repeat(2)\n        total, active", "threshold = (positive - margin).repeat_interleave(2)\n        total, active"),
    Bug("double backward is not refused", "fused_vse/first_order.py", "if not torch.is_grad_enabled():", "if True:"),
    Bug("gradients rounded twice by the reference", "fused_vse/reference.py", "return batch._replace(images=batch.images.to(dtype), captions=captions)", "return batch"),
    Bug("a temperature out of range passes", "fused_vse/arguments.py", "torch.where(in_range, temperature, torch.nan).reciprocal()", "temperature.reciprocal()"),
    Bug("whole loss: one side's gradient only", "fused_vse/small_loss.py", "needs_grad(batch.images), needs_grad(batch.captions), tensor", "needs_grad(batch.images), needs_grad(batch.images), tensor"),
    Bug("ranks: ties go to the later rank", RANKS, "(score == best) & (number < where)", "(score == best) & (number > where)"),
    Bug("ranks: sums are not rescaled", RANKS, "terms = scale * (references - reference) + log_sums", "terms = log_sums + 0 * reference"),
    Bug("ranks: the own pairs in another chunk's place", EXCHANGE, "pairs = (chunk.begin, before, count)", "pairs = (0, before, count)"),
    Bug("ranks: columns numbered without the ranks before", EXCHANGE, "firsts = sum(counts[:rank]), sum(counts) + sum(extras[:rank])", "firsts = 0, sum(counts) + sum(extras[:rank])"),
    Bug("ranks: a part of the gradients is not waited for", RANKS, "        finish()\n        gradients = first_order_only(", "        gradients = first_order_only("),
    Bug("ranks: gradients of captions in 16 bits", RANKS, "dtype = accumulation_dtype(own.images.dtype)\n        d_images", "dtype = own.images.dtype\n        d_images"),
    Bug("ranks: the temperature's gradient is summed", "fused_vse/distributed/reduction.py", "return gradient / ctx.group.size(), None", "return gradient, None"),
    Bug("gather_rows: another rank's gradient", "fused_vse/distributed/rows.py", "rows.roll(own * size, 0)", "rows.roll(-own * size, 0)"),
]  # fmt: skip
