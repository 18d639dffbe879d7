// What every op asks of a batch's shapes, as a plain function. Python has checked them in other words
// (fused_vse/arguments.py); this is for whoever calls an op directly.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

namespace fused_vse {

struct BatchShape {
  int64_t n, images_dim, m, captions_dim;
  int64_t image_ids, caption_ids;  // how many, or -1 for none
  int64_t row_anchors, column_anchors, pair_row, pair_column, pair_count;
};

// What is wrong, or "".
inline std::string mistake(const BatchShape& x) {
  std::string why;
  const auto within = [&](const char* name, int64_t number, int64_t least, int64_t most) {
    if (why.empty() && (number < least || number > most))
      why = std::string(name) + " must be in " + std::to_string(least) + " .. " + std::to_string(most) +
            ", got " + std::to_string(number);
  };
  within("the number of images", x.n, 1, INT64_MAX);
  within("the number of captions", x.m, 1, INT64_MAX);
  within("the dimension of images", x.images_dim, 1, INT64_MAX);
  within("the dimension of captions", x.captions_dim, x.images_dim, x.images_dim);
  if (why.empty() && (x.image_ids < 0) != (x.caption_ids < 0)) return "give both ids or none";
  if (x.image_ids >= 0) {
    within("the number of image_ids", x.image_ids, x.n, x.n);
    within("the number of caption_ids", x.caption_ids, x.m, x.m);
  }
  within("row_anchors", x.row_anchors, 0, x.n);
  within("column_anchors", x.column_anchors, 0, x.m);
  within("pair_count", x.pair_count, 0, std::min(x.n, x.m));
  within("pair_row", x.pair_row, 0, x.n - x.pair_count);
  within("pair_column", x.pair_column, 0, x.m - x.pair_count);
  return why;
}

}  // namespace fused_vse
