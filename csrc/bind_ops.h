// The ops of one device, written once: words off torch's stack, a Problem, a kernel of the engine, words
// back. attn/native.py defines their schemas. An engine is a struct of static members:
//
//   kLibrary                 its name in messages
//   kReadsValues             whether the values of tensors can be looked at here, and are then checked
//   kWeightsFromResiduals    whether its forward makes weights from m and l, which then exist
//   forward(problem, weights or null, device), weights(problem, weights, device),
//   backward(problem, backward, device), decode(decode, device)
//   fill(data, byte, bytes, device)
#pragma once
#include <atomic>

#include "bind_operands.h"

#ifdef _WIN32
#define ATTN_EXPORT extern "C" __declspec(dllexport)
#else
#define ATTN_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace attn::bind {

enum Wanted { kNone, kMean, kHeads };  // of the weights

inline Rows rows_at(const Tensor& t) { return {t.data(), t.stride(0), t.stride(1), t.stride(2)}; }

struct Results {
  Tensor out, m, l, weights;  // those that were asked for

  void release(uint64_t* s) {
    s[0] = out.release();
    s[1] = m.release();
    s[2] = l.release();
    s[3] = weights.release();
  }
};

// What forward left, and the gradients of its results.
struct Incoming {
  Tensor d_out, d_lse, d_weights, out, m, l;

  void read(Call& c) {
    for (Tensor* t : {&d_out, &d_lse, &d_weights, &out, &m, &l}) {
      t->look();
      require_device("every tensor of a call", *t, c.device());
    }
    Problem& p = c.p;
    const int32_t sums = torch_dtype(accumulate(p.dtype));
    gradients.d_out = rows_of("d_out", d_out, p.dtype);
    p.out = rows_of("out", out, p.dtype);
    require_shape("d_out", d_out, {p.B, p.Hq, p.L, p.Dv});
    require_shape("out", out, {p.B, p.Hq, p.L, p.Dv});
    read_residuals(p, m, l);
    gradients.d_lse = vector_of<char>("d_lse", d_lse, sums, {p.B, p.Hq, p.L});
    if (d_weights) read_weights(p);
  }

  static void read_residuals(Problem& p, Tensor& m, Tensor& l) {
    const int32_t sums = torch_dtype(accumulate(p.dtype));
    p.m = const_cast<char*>(vector_of<char>("m", m, sums, {p.B, p.Hq, p.L}));
    p.l = const_cast<char*>(vector_of<char>("l", l, sums, {p.B, p.Hq, p.L}));
  }

  Backward gradients;

 private:
  void read_weights(const Problem& p) {
    const Tensor& t = d_weights;
    require(t.dtype() == torch_dtype(p.dtype), "d_weights must have the dtype of q");
    gradients.average = t.dims() == 3;
    if (gradients.average) {
      require_shape("d_weights", t, {p.B, p.L, p.S});
      gradients.d_weights = {t.data(), t.stride(0), 0, t.stride(1), t.stride(2), p.dtype};
    } else {
      require_shape("d_weights", t, {p.B, p.Hq, p.L, p.S});
      gradients.d_weights = {t.data(), t.stride(0), t.stride(1), t.stride(2), t.stride(3), p.dtype};
    }
  }
};

template <class Engine>
class Ops {
 public:
  static void add(stable::Registration& registration) {
    registration.add("forward", forward)
        .add("weights", weights)
        .add("backward", backward)
        .add("decode", decode);
  }

  // Whether new outputs are filled, before a kernel writes them, with bytes that read as NaN in every float
  // type: what it forgets to write then shows. For tests.
  static void poison(bool on) { poisoned_.store(on, std::memory_order_relaxed); }

  // A library of another version than the Python beside it would read words that are not there.
  static void require_words(uint64_t given, uint64_t arguments, uint64_t taken, uint64_t results) {
    require(given == arguments && taken == results, Engine::kLibrary,
            ": the library is not that of these Python files; build it anew");
  }

  // Runs forward on a call that was read.
  static Results run_forward(Call& c, int64_t wanted, bool residuals) {
    Problem& p = c.p;
    Results r;
    r.out = new_rows(c, p.Hq, p.L, p.Dv);
    p.out = rows_at(r.out);
    if (residuals || (Engine::kWeightsFromResiduals && wanted != kNone)) {
      r.m = new_dense({p.B, p.Hq, p.L}, accumulate(p.dtype), c.device());
      r.l = new_dense({p.B, p.Hq, p.L}, accumulate(p.dtype), c.device());
      p.m = r.m.data();
      p.l = r.l.data();
    }
    Weights w;
    if (wanted != kNone) {
      r.weights = new_weights(c, wanted);
      w = {r.weights.data(), wanted == kMean};
    }
    if (p.B * p.Hq * p.L > 0) Engine::forward(p, wanted != kNone ? &w : nullptr, c.device());
    if (!residuals) r.m = Tensor(), r.l = Tensor();
    return r;
  }

  // Runs backward on a call that was read; returns dq, dk, dv, d_bias in s[0..3].
  static void backward_into(uint64_t* s, Call& c, Incoming& in, bool bias_grad) {
    in.read(c);
    Problem& p = c.p;
    Backward& b = in.gradients;
    Tensor dq = new_rows(c, p.Hq, p.L, p.D), dk = new_rows(c, p.Hkv, p.S, p.D),
           dv = new_rows(c, p.Hkv, p.S, p.Dv);
    Tensor d_bias;
    b.dq = rows_at(dq);
    b.dk = rows_at(dk);
    b.dv = rows_at(dv);
    const Tensor& bias = c.t[Call::bias];
    if (bias_grad && bias) {
      const Dtype dtype = dtype_of("bias", bias);
      d_bias = new_dense({bias.size(0), bias.size(1), bias.size(2), bias.size(3)}, dtype, c.device());
      b.d_bias = dense_of("bias", d_bias, p);
      b.d_bias.dtype = dtype;
    }
    if (p.B * p.Hq * p.L * p.S > 0) {
      Engine::backward(p, b, c.device());
    } else {
      for (Tensor* t : {&dq, &dk, &dv}) t->zero();
      if (d_bias) d_bias.zero();
    }
    s[0] = dq.release();
    s[1] = dk.release();
    s[2] = dv.release();
    s[3] = d_bias.release();
  }

 private:
  static Tensor fresh(Tensor t, Dtype dtype, Device device) {
    if (poisoned_.load(std::memory_order_relaxed) && t.numel() > 0)
      Engine::fill(t.data(), 0xff, t.numel() * static_cast<int64_t>(bytes(dtype)), device);
    return t;
  }
  static Tensor new_dense(std::initializer_list<int64_t> sizes, Dtype dtype, Device device) {
    return fresh(empty_dense(sizes, dtype, device), dtype, device);
  }
  static Tensor new_rows(const Call& c, int64_t H, int64_t rows, int64_t width) {
    return fresh(empty_rows(c.p.B, H, rows, width, c.p.dtype, c.device()), c.p.dtype, c.device());
  }
  static Tensor new_weights(const Call& c, int64_t wanted) {
    const Problem& p = c.p;
    require(wanted == kMean || wanted == kHeads, "weights must be 0, 1 or 2");
    return wanted == kMean ? new_dense({p.B, p.L, p.S}, p.dtype, c.device())
                           : new_dense({p.B, p.Hq, p.L, p.S}, p.dtype, c.device());
  }

  static void forward(uint64_t* s, uint64_t given, uint64_t taken) {
    require_words(given, Call::kWords + 2, taken, 4);
    Call c(Engine::kReadsValues);
    c.own(s);
    c.read(s);
    run_forward(c, stable::integer(s[Call::kWords]), stable::boolean(s[Call::kWords + 1])).release(s);
  }

  static void weights(uint64_t* s, uint64_t given, uint64_t taken) {
    require_words(given, Call::kWords + 3, taken, 1);
    Tensor m = Tensor::input(s[0]), l = Tensor::input(s[1]);
    Call c(Engine::kReadsValues);
    c.own(s + 2);
    c.read(s + 2);
    for (Tensor* t : {&m, &l}) {
      t->look();
      require_device("every tensor of a call", *t, c.device());
    }
    Incoming::read_residuals(c.p, m, l);
    const bool average = stable::boolean(s[2 + Call::kWords]);
    Tensor made = new_weights(c, average ? kMean : kHeads);
    if (c.p.B * c.p.Hq * c.p.L > 0) Engine::weights(c.p, {made.data(), average}, c.device());
    s[0] = made.release();
  }

  static void backward(uint64_t* s, uint64_t given, uint64_t taken) {
    require_words(given, Call::kWords + 7, taken, 4);
    Incoming in{Tensor::input(s[0]),
                Tensor::optional(s[1]),
                Tensor::optional(s[2]),
                Tensor::input(s[3]),
                Tensor::input(s[4]),
                Tensor::input(s[5]),
                {}};
    Call c(Engine::kReadsValues);
    c.own(s + 6);
    c.read(s + 6);
    backward_into(s, c, in, stable::boolean(s[6 + Call::kWords]));
  }

  static void require_pages(const Decode& d) {
    for (int64_t b = 0; b < d.B; ++b) {
      const int64_t used = (d.lengths[b] + d.slots - 1) / d.slots;
      for (int64_t i = 0; i < used; ++i) {
        const int32_t page = d.block_table[b * d.pages + i];
        require(page >= 0 && page < d.blocks, "block_table[", b, ", ", i, "] is ", page,
                "; it must be in [0, ", d.blocks - 1, "]");
      }
    }
  }

  static void decode(uint64_t* s, uint64_t given, uint64_t taken) {
    require_words(given, 10, taken, 2);
    Tensor q = Tensor::input(s[0]), k = Tensor::input(s[1]), v = Tensor::input(s[2]),
           lengths = Tensor::input(s[3]), table = Tensor::optional(s[4]), slopes = Tensor::optional(s[5]);
    for (Tensor* t : {&q, &k, &v, &lengths, &table, &slopes}) {
      t->look();
      require_device("every tensor of a call", *t, q.device());
    }
    static const int32_t i32 = aoti_torch_dtype_int32(), f32 = aoti_torch_dtype_float32();
    Decode d;
    d.dtype = dtype_of("q", q);
    d.q = rows_of("q", q, d.dtype);
    d.k = rows_of("k_cache", k, d.dtype);
    d.v = rows_of("v_cache", v, d.dtype);
    d.B = q.size(0);
    d.Hq = q.size(1);
    d.L = q.size(2);
    d.D = q.size(3);
    d.Hkv = k.size(1);
    d.slots = k.size(2);
    d.Dv = v.size(3);
    require_shape("v_cache", v, {k.size(0), d.Hkv, d.slots, d.Dv});
    require(k.size(3) == d.D && d.D >= 1 && d.Dv >= 1,
            "q and k_cache must share a head_dim >= 1, v_cache have one >= 1");
    require(std::max(d.D, d.Dv) <= 256, "head_dim must be at most 256");
    require(d.Hkv == d.Hq || (d.Hkv > 0 && d.Hq % d.Hkv == 0), "q's heads must be a multiple of the cache's");
    int64_t capacity = d.slots;
    if (table) {
      require(table.dims() == 2 && d.slots >= 1, "block_table must have 2 dims, and pages at least one slot");
      d.pages = table.size(1);
      d.blocks = k.size(0);
      d.block_table = vector_of<int32_t>("block_table", table, i32, {d.B, d.pages});
      capacity = d.slots * d.pages;
    } else {
      require(k.size(0) == d.B, "k_cache must have the batch size of q, or come with block_table");
    }
    d.lengths = vector_of<int32_t>("lengths", lengths, i32, {d.B});
    if (Engine::kReadsValues) {
      require_range("lengths", d.lengths, d.B, 0, capacity);
      if (table) require_pages(d);
    }
    d.alibi_slopes = vector_of<float>("alibi_slopes", slopes, f32, {d.B, d.Hq});
    d.left = side(stable::integer(s[6]));
    d.right = side(stable::integer(s[7]));
    d.scale = stable::real(s[8]);
    d.softcap = stable::real(s[9]);
    Tensor out = fresh(empty_rows(d.B, d.Hq, d.L, d.Dv, d.dtype, q.device()), d.dtype, q.device());
    Tensor lse = new_dense({d.B, d.Hq, d.L}, accumulate(d.dtype), q.device());
    d.out = rows_at(out);
    d.lse = lse.data();
    if (d.B * d.Hq * d.L > 0) Engine::decode(d, q.device());
    s[0] = out.release();
    s[1] = lse.release();
  }

  inline static std::atomic<bool> poisoned_{false};
};

}  // namespace attn::bind
