// Backward: which kernels run, in which order, and what they leave each other in scratch.
#include "backward_kernels.h"

namespace attn::cuda {
namespace {

// With few keys nearly all of a gradient may cancel; a delta from the scores is then free of the rounding of
// `out`.
constexpr int64_t kFewKeys = 64;

// Floats of scratch, in this order: m, r and delta of each row; delta from the scores; partial sums of a bias
// gradient.
struct Layout {
  bool whole;  // whether delta is from the scores alone
  int64_t row_count, delta_count, bias_count;

  Layout(const Problem& p, const Backward& b) {
    whole = p.dtype == Dtype::f32 && p.S <= kFewKeys;
    row_count = padded_rows(p) * p.Hq * (p.N > 0 ? 1 : p.B);
    delta_count = whole || b.d_weights.data ? row_count : 0;
    const Over over = over_of(p, b.d_bias);
    const bool partial = b.d_bias.data && is_partial(over);
    bias_count = partial ? p.B * p.Hq * (over.row ? 1 : p.L) * (over.col ? 1 : p.S) : 0;
  }
  int64_t bytes() const { return (3 * row_count + delta_count + bias_count) * int64_t{sizeof(float)}; }

  // Where rows or columns are summed, too few blocks would be at work if they also summed batches and heads.
  static bool is_partial(const Over& over) { return (over.row || over.col) && (over.batch || over.head); }
};

template <class T>
const char* bias_gradient(const Call& c, const Backward& b, const RowStatistics& rows, float* partial,
                          Stream stream) {
  const Problem& p = c.p;
  const Over over = over_of(p, b.d_bias);
  typename BackwardBias<T>::Params x{c, b, rows, access_of(b.d_out, p.dtype), b.d_bias, over};
  if (!Layout::is_partial(over)) return launch_bias<T>(x, stream);
  const int64_t L = over.row ? 1 : p.L, S = over.col ? 1 : p.S;
  x.over = {false, false, over.row, over.col};
  x.to = {partial, p.Hq * L * S, L * S, S, 1, Dtype::f32};
  if (const char* said = launch_bias<T>(x, stream); *said) return said;
  const BackwardBiasSum::Params sum{x.to, b.d_bias, over, p.B, p.Hq, L, S};
  constexpr int kThreads = BackwardBiasSum::kThreads;
  return launch<BackwardBiasSum>(sum, {(sum.elements() + kThreads - 1) / kThreads, 1, 1}, stream);
}

template <class T>
const char* all_passes(const Call& c, const Backward& b, float* scratch, Stream stream) {
  const Problem& p = c.p;
  const Layout layout(p, b);
  const int64_t n = layout.row_count;
  RowStatistics rows{scratch, scratch + n, scratch + 2 * n, padded_rows(p)};
  const bool light = is_light(p) && !b.d_weights.data && !b.d_bias.data;
  const bool wide = access_of(p.out, p.dtype) == 16 && access_of(b.d_out, p.dtype) == 16 &&
                    p.Dv % (16 / static_cast<int64_t>(sizeof(T))) == 0;
  const bool folded = light && !std::is_same_v<T, float>;
  const char* said = launch_rows<T>(
      {c, b.d_out, static_cast<const float*>(b.d_lse), rows, folded, wide, !layout.whole}, stream);
  if (*said) return said;
  if (layout.delta_count > 0) {
    said = launch_delta<T>({c, b, rows, scratch + 3 * n, access_of(b.d_out, p.dtype), layout.whole}, stream);
    if (*said) return said;
    rows.delta = scratch + 3 * n;
  }
  said = by_dim<32, 64, 128, 256>(largest_dim(p), [&](auto dim) {
    constexpr int kDim = decltype(dim)::value;
    return light ? launch_backward<T, kDim, false>(c, b, rows, stream)
                 : launch_backward<T, kDim, true>(c, b, rows, stream);
  });
  if (*said || !b.d_bias.data) return said;
  return bias_gradient<T>(c, b, rows, scratch + 3 * n + layout.delta_count, stream);
}

}  // namespace

int64_t backward_scratch(const Problem& p, const Backward& b) { return Layout(p, b).bytes(); }

const char* backward(const Problem& p, const Backward& b, void* scratch, Stream stream) {
  if (p.L > kMostRows || p.S > kMostRows) return kTooMany;
  const Call c = call_of(p);
  return by_dtype(p.dtype, [&](auto type) {
    return all_passes<typename decltype(type)::type>(c, b, static_cast<float*>(scratch), stream);
  });
}

}  // namespace attn::cuda
