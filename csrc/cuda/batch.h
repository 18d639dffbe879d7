// What every op asks of a batch's shapes, as a plain function. Python has checked them in other words
// (fused_vse/arguments.py); this is for whoever calls an op directly.
#pragma once

#include <cstdint>
#include <string>

namespace fused_vse {

struct BatchShape {
  int64_t n, images_dim, m, captions_dim, num_pairs;
  int64_t image_ids, caption_ids;  // how many, or -1 for none
};

// What is wrong, or "".
inline std::string mistake(const BatchShape& x) {
  const auto text = [](int64_t number) { return std::to_string(number); };
  if (x.n < 1 || x.m < 1 || x.images_dim < 1) return "there must be images and captions";
  if (x.images_dim != x.captions_dim)
    return "images and captions must share D, got " + text(x.images_dim) + " and " + text(x.captions_dim);
  if (x.num_pairs < 1 || x.num_pairs > x.n || x.num_pairs > x.m)
    return "num_pairs must be in 1 .. min(N, M), got " + text(x.num_pairs);
  if ((x.image_ids < 0) != (x.caption_ids < 0)) return "give both ids or none";
  if (x.image_ids >= 0 && (x.image_ids != x.n || x.caption_ids != x.m))
    return "there must be an id for each image and caption, got " + text(x.image_ids) + " and " +
           text(x.caption_ids);
  return "";
}

}  // namespace fused_vse
