// The dense statistics as C++ functions, for small_loss; ops.py documents them.
#pragma once

#include <tuple>

#include "source.h"

namespace fused_vse {

using LogSums = std::tuple<Tensor, Tensor, Tensor>;  // reference, log_sum, scores
LogSums negative_logsumexp(const Batch& batch, const OptionalTensor& ceiling, double scale,
                           const OptionalTensor& scale_tensor, bool save_scores);
std::tuple<Tensor, Tensor, Tensor> negative_logsumexp_backward(
    const Batch& batch, const OptionalTensor& ceiling, double scale, const OptionalTensor& scale_tensor,
    const Tensor& reference, const Tensor& log_sum, const Tensor& scores, const Tensor& d_positive,
    const Tensor& d_log_sum, bool need_images, bool need_captions, bool accumulate);

using Hinges = std::tuple<Tensor, Tensor, Tensor>;  // hinge_sum, active, scores
Hinges hinge_sum(const Batch& batch, const OptionalTensor& ceiling, const Tensor& threshold,
                 bool save_scores);
Gradients hinge_sum_backward(const Batch& batch, const OptionalTensor& ceiling, const Tensor& threshold,
                             const Tensor& hinge_sum, const Tensor& scores, const Tensor& d_positive,
                             const Tensor& d_hinge_sum, bool need_images, bool need_captions,
                             bool accumulate);

}  // namespace fused_vse
