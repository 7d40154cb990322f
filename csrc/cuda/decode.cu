// Plans a decoding step and chooses its kernel.
#include "decode_kernels.h"

namespace attn::cuda {

namespace {

constexpr int kMostSplits = 128, kLeastKeys = 128;  // per split

int64_t largest_dim(const Decode& d) { return d.D > d.Dv ? d.D : d.Dv; }
int64_t rows_of(const Decode& d) { return d.Hkv > 0 ? d.Hq / d.Hkv * d.L : 0; }

// The fewest splits whose last wave of blocks is nearly as full as with the best number.
int splits_of(int64_t blocks, int64_t capacity, int multiprocessors) {
  const int64_t at_once = 2 * int64_t{multiprocessors > 0 ? multiprocessors : 1};
  const int64_t by_keys = (capacity + kLeastKeys - 1) / kLeastKeys;
  const int most = static_cast<int>(by_keys < 1 ? 1 : by_keys < kMostSplits ? by_keys : kMostSplits);
  const auto full = [&](int splits) {
    const int64_t all = blocks * splits, waves = (all + at_once - 1) / at_once;
    return static_cast<double>(all) / static_cast<double>(waves * at_once);
  };
  double best = 0;
  for (int n = 1; n <= most; ++n) best = full(n) > best ? full(n) : best;
  int n = 1;
  while (n < most && full(n) < 0.85 * best) ++n;
  return n;
}

DecodeCall plan(const Decode& d, int multiprocessors) {
  DecodeCall c{};
  c.d = d;
  c.scale = static_cast<float>(d.scale);
  c.softcap = static_cast<float>(d.softcap);
  c.uncap = d.softcap > 0 ? static_cast<float>(1 / d.softcap) : 0.f;
  c.left = side_of(d.left);
  c.right = side_of(d.right);
  c.capacity = static_cast<int>(d.block_table ? (d.blocks > 0 ? d.slots * d.pages : 0) : d.slots);
  c.q_access = access_of(d.q, d.dtype);
  c.k_access = access_of(d.k, d.dtype);
  c.v_access = access_of(d.v, d.dtype);
  const int64_t rows = rows_of(d);
  const int tile =
      rows <= kFewRows ? kFewRows : many_rows(d.dtype == Dtype::f32, static_cast<int>(largest_dim(d)));
  c.row_tiles = static_cast<int>((rows + tile - 1) / tile);
  c.splits = splits_of(d.B * d.Hkv * c.row_tiles, c.capacity, multiprocessors);
  return c;
}

bool too_many(const Decode& d) {
  return d.L > kMostRows || rows_of(d) > kMostRows || d.slots > kMostRows || d.slots * d.pages > kMostRows;
}

}  // namespace

int64_t decode_scratch(const Decode& d, int multiprocessors) {
  if (too_many(d)) return 0;
  const int64_t splits = plan(d, multiprocessors).splits;
  return splits == 1 ? 0 : 4 * splits * d.B * d.Hq * d.L * (d.Dv + 2);
}

const char* decode(const Decode& d, int multiprocessors, void* scratch, Stream stream) {
  if (too_many(d)) return kTooMany;
  DecodeCall c = plan(d, multiprocessors);
  c.scratch = static_cast<float*>(scratch);
  return by_dtype(d.dtype, [&](auto type) {
    return by_dim<32, 64, 128, 256>(largest_dim(d), [&](auto dim) {
      using T = typename decltype(type)::type;
      constexpr int kDim = decltype(dim)::value;
      return rows_of(d) <= kFewRows ? launch_decode<T, kDim, false>(c, stream)
                                    : launch_decode<T, kDim, true>(c, stream);
    });
  });
}

}  // namespace attn::cuda
