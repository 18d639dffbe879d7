"""Bugs in the Triton kernels and in their host code."""

from . import Bug

WALK, TILES, LOGSUMEXP, HARDEST = "walk.py", "tiles.py", "logsumexp.py", "hardest.py"
FORWARD, BACKWARD, CERTIFIED, PLAN = "forward.py", "backward.py", "certified.py", "plan.py"


def bug(name: str, file: str, old: str, new: str, equivalent: str = "") -> Bug:
    return Bug(name, f"fused_vse/backends/triton/{file}", old, new, equivalent=equivalent)


BUGS = [
    bug("mask: one column too many", TILES, "keep = (offs_m < piece.row_stop)[:, None] & (offs_n < piece.num_columns)[None, :]", "keep = (offs_m < piece.row_stop)[:, None] & (offs_n <= piece.num_columns)[None, :]"),
    bug("ids are not compared", TILES, "            keep &= row_ids[:, None] != column_ids[None, :]\n", "            keep &= True\n"),
    bug("ids: ranges that touch do not meet", TILES, "(tl.min(row_ids, 0) <= tl.max(column_ids, 0))", "(tl.min(row_ids, 0) < tl.max(column_ids, 0))"),
    bug("pairs below the diagonal of a tile are missed", TILES, "(column < row + acc.shape[0])\n    return", "(column <= row)\n    return"),
    bug("pairs without their column's offset", TILES, "pair + ids.pair_column - tile.column, -1)", "pair - tile.column, -1)"),
    bug("columns' results in the slot before", TILES, "slot = (row - piece.row_start) // acc.shape[0] + 1", "slot = (row - piece.row_start) // acc.shape[0]"),
    bug("ceiling of the other side", TILES, "return tile.piece.row_anchors + offs, offs < tile.piece.column_anchors", "return offs, offs < tile.piece.column_anchors"),
    bug("raster: the last group's height", TILES, "height = tl.minimum(row_tiles - first_row, GROUP)", "height = GROUP"),
    bug("poison: the bound lacks D", TILES, "bound = image * caption * bounds.D", "bound = image * caption"),
    bug("ties go to the larger index", HARDEST, "((new_best == best) & (new_index < index))", "((new_best == best) & (new_index > index))"),
    bug("ties inside a tile go to the larger index", HARDEST, "return best, tl.min(tl.where(winners, offs, NO_INDEX), AXIS)", "return best, tl.max(tl.where(winners, offs, -1), AXIS)"),
    bug("backward: the own hardest negative of another row", HARDEST, "    position = own.first_anchor + row\n", "    position = row\n"),
    bug("backward: rows that choose several anchors", HARDEST, "anchor = tl.min(tl.where(chosen & (offs > anchor), offs, NO_INDEX), 0)", "anchor = NO_INDEX"),
    bug("sums are not rescaled", LOGSUMEXP, "    total *= tl.exp2((largest - finite(new_largest)) * c)\n", ""),
    bug("one exponential where it underflows", LOGSUMEXP, "one_exp = most <= LARGEST_EXPONENT", "one_exp = most <= 100 * LARGEST_EXPONENT"),
    bug("the scale in float32", LOGSUMEXP, "c = c * scale.value + c * scale.rest", "c = c * scale.value"),
    bug("gradient without its scale", LOGSUMEXP, ".to(c.dtype) * (c * LN_2)", ".to(c.dtype)"),
    bug("an anchor without negatives has a gradient", LOGSUMEXP, "log_sum = tl.where(log_sum == -float(\"inf\"), float(\"inf\"), log_sum).to(c.dtype) * LOG2_E", "log_sum = log_sum.to(c.dtype) * LOG2_E"),
    bug("hinges: the kink has a gradient", "hinge.py", "active = scores > tl.expand_dims(threshold, AXIS)", "active = scores >= tl.expand_dims(threshold, AXIS)"),
    bug("hinges: what is no anchor is active", "hinge.py", "mask=mask, other=float(\"inf\"))\n    g =", "mask=mask, other=-float(\"inf\"))\n    g ="),
    bug("gradient without the pairs", WALK, "        gradient += tl.where(is_pair, d_pair[:, None], 0.0)\n", "        pass\n"),
    bug("gradient without its gain", WALK, "gradient = (gradient * target.factor).to(", "gradient = gradient.to("),
    bug("a total is not carried to the next piece", FORWARD, "tiles[number][1], 0 if number else 1, tiles[number][0] + 1", "tiles[number][1], 1, tiles[number][0] + 1"),
    bug("the last slot of the columns", FORWARD, "0 if number else 1, tiles[number][0] + 1", "0 if number else 1, tiles[number][0]"),
    bug("a workspace a slot too small", FORWARD, "size = base + (max((n for n, _ in tiles), default=0) + 1) *", "size = base + max((n for n, _ in tiles), default=0) *"),
    bug("a second piece overwrites d_captions", BACKWARD, "product(gradient.t(), images[chunk], total[seen], accumulate=number > 0)", "product(gradient.t(), images[chunk], total[seen])"),
    bug("the gain is not taken back", BACKWARD, "        torch.mul(total, gain[1], out=d_captions)", "        d_captions.copy_(total)"),
    bug("d_scale of the temperature instead", BACKWARD, "        logsumexp, walk, terms, log_sum, d_positive, scores, gain, Wanted(*wanted)\n    )\n    return *results, d_scale.sum() / factor", "        logsumexp, walk, terms, log_sum, d_positive, scores, gain, Wanted(*wanted)\n    )\n    return *results, d_scale.sum()"),
    bug("search: runners-up are not rescored", CERTIFIED, "crowded = contender & (second >= threshold) & (second > -float(\"inf\"))", "crowded = contender & (second > float(\"inf\"))"),
    bug("search: no error's bound", CERTIFIED, "threshold = tl.maximum(tl.max(value, 0) - 2 * error, best - error) - slack", "threshold = tl.maximum(tl.max(value, 0), best)"),
    bug("rows that are not aligned", PLAN, "embeddings.data_ptr() % 16 == 0", "True"),
    bug("the remainder along D", PLAN, "remainder = num_dimensions % tiles.block_k != 0 and not tiles.tma", "remainder = False"),
    bug("softplus: small terms are rounded to 0", "softplus.py", "total = tl.sum(tl.maximum(x, 0.0) + log1p(y), AXIS)", "total = tl.sum(tl.maximum(x, 0.0) + tl.log(1 + y), AXIS)"),
    bug("softplus: entries of two anchors count twice", "softplus.py", "        mask &= tile.row >= tile.piece.row_anchors\n", "        mask &= True\n"),
    bug("softplus: equal ids as negatives", "softplus.py", "tl.where(equal, -1.0, 1.0)", "tl.where(equal, 1.0, 1.0)"),
    bug("softplus: columns' second half in the first's place", "softplus.py", "leave_column_sums(right, right_tile, constants, out)", "leave_column_sums(right, tile, constants, out)"),
]  # fmt: skip
