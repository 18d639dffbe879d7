"""Bugs in the Python formulas and in what the ranks exchange."""

from . import Bug

LOSSES, FORMULAS, EQUAL = "fused_vse/losses.py", "fused_vse/formulas.py", "fused_vse/equal.py"
DEFINITIONS = "fused_vse/definitions.py"
RANKS, EXCHANGE = "fused_vse/distributed/statistics.py", "fused_vse/distributed/exchange.py"

BUGS = [
    Bug("all negatives: sign of the margin", FORMULAS, "reference - options.margin) - log_sum", "reference + options.margin) - log_sum"),
    Bug("all negatives: the log-sum is scaled, too", FORMULAS, "(positive - reference - options.margin) - log_sum", "(positive - reference - options.margin - log_sum)"),
    Bug("hardest: no hinge", FORMULAS, "(scores - positive + margin).relu()", "(scores - positive + margin)"),
    Bug("smooth: an anchor without negatives counts", FORMULAS, "return torch.where(alone, 0, -logsigmoid(-scale * violation)), hardest", "return -logsigmoid(-scale * violation), hardest"),
    Bug("mean over one pair too many", LOSSES, 'total / loss.shape[1] if reduction', 'total / (loss.shape[1] + 1) if reduction'),
    Bug("direction weights swapped", LOSSES, "[loss[0] * weights[0], loss[1] * weights[1]]", "[loss[0] * weights[1], loss[1] * weights[0]]"),
    Bug("recall counts a draw", LOSSES, "(positive > scores)", "(positive >= scores)"),
    Bug("active share without the margin", LOSSES, "(scores - positive + margin > 0)", "(scores - positive > 0)"),
    Bug("gradient without the thresholds' part", DEFINITIONS, "d_positive - (results[1] * d).view(2, -1).sum(0), None", "d_positive, None"),
    Bug("thresholds of the other pairs", DEFINITIONS, "threshold = (positive - margin).repeat(2)", "threshold = (positive - margin).repeat_interleave(2)"),
    Bug("hardness: the gradient is that of both terms", "fused_vse/statistics.py", "_ScaledGradient.apply(log_sum, share) + hardness", "log_sum + hardness"),
    Bug("hardness: the temperature's gradient shrinks, too", "fused_vse/statistics.py", "_ScaledGradient.apply(wider, 1 / share)", "wider"),
    Bug("false negatives: the comparison has a gradient", DEFINITIONS, "(positive.detach() + false_negative_margin).repeat(2)", "(positive - false_negative_margin).repeat(2)"),
    Bug("select: the sum in place of the mean", FORMULAS, "total / _negative_counts(batch, peers).clamp(min=1)", "total / 1"),
    Bug("select: the pairs count as negatives", FORMULAS, "return everything - 1", "return everything"),
    Bug("positives: the sum in place of the mean", FORMULAS, "mean = total / count.clamp(min=1)", "mean = total"),
    Bug("positives: equal ids keep no share of the others", EQUAL, "d_images[:rows] += of_rows * _sums(captions, caption_ids, image_ids[:rows])", "d_images[:rows] += 0"),
    Bug("positives: 16 bits are not widened", FORMULAS, "    batch = widened(batch)\n", ""),
    Bug("sigmoid: the pairs are left out", FORMULAS, "if not options.equal_positive:", "if False:"),
    Bug("sigmoid: no gradient for the bias", DEFINITIONS, "return d_positive, (results[1] * d).sum()", "return d_positive, (0 * d).sum()"),
    Bug("ranks: the bias has another rank's gradient", LOSSES, "bias=shared_by_ranks(options.bias, peers)", "bias=options.bias"),
    Bug("ranks: thresholds of rows for columns", "fused_vse/distributed/plain.py", "(of_columns, slice(k, None))", "(of_columns, slice(k))"),
    Bug("double backward is not refused", "fused_vse/first_order.py", "if not torch.is_grad_enabled():", "if True:"),
    Bug("gradients rounded twice by the reference", "fused_vse/reference.py", "return batch._replace(images=batch.images.to(dtype), captions=captions)", "return batch"),
    Bug("a temperature out of range passes", "fused_vse/arguments.py", "torch.where(in_range, temperature, torch.nan).reciprocal()", "temperature.reciprocal()"),
    Bug("ranks: ties go to the later rank", DEFINITIONS, "(score == best) & (number < where)", "(score == best) & (number > where)"),
    Bug("ranks: sums are not rescaled", DEFINITIONS, "terms = scale * (references - reference) + log_sums", "terms = log_sums + 0 * reference"),
    Bug("ranks: the own pairs in another chunk's place", EXCHANGE, "pairs = (chunk.begin, before, count)", "pairs = (0, before, count)"),
    Bug("ranks: columns numbered without the ranks before", EXCHANGE, "firsts = sum(counts[:rank]), sum(counts) + sum(extras[:rank])", "firsts = 0, sum(counts) + sum(extras[:rank])"),
    Bug("ranks: a part of the gradients is not waited for", RANKS, "        finish()\n        gradients = first_order_only(", "        gradients = first_order_only("),
    Bug("ranks: gradients of captions in 16 bits", RANKS, "dtype = accumulation_dtype(own.images.dtype)\n        d_images", "dtype = own.images.dtype\n        d_images"),
    Bug("ranks: the temperature's gradient is summed", "fused_vse/distributed/reduction.py", "return gradient / ctx.group.size(), None", "return gradient, None"),
    Bug("gather_rows: another rank's gradient", "fused_vse/distributed/rows.py", "rows.roll(own * size, 0)", "rows.roll(-own * size, 0)"),
]  # fmt: skip
