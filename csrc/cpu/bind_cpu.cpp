// The ops `attn_cpu::*`, whose schemas attn/native.py defines: words off torch's stack, a Problem, a kernel,
// words back.
#include <atomic>

#include "bind_operands.h"

#ifdef _WIN32
#define ATTN_EXPORT extern "C" __declspec(dllexport)
#else
#define ATTN_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace attn::cpu {

void parallel_for(int64_t n, void (*body)(void*, int64_t, int64_t), void* context) {
  if (n <= 1) {
    if (n == 1) body(context, 0, 1);
    return;
  }
  struct Work {
    void (*body)(void*, int64_t, int64_t);
    void* context;
  } work{body, context};
  const auto part = [](int64_t begin, int64_t end, void* w) {
    const auto* work = static_cast<const Work*>(w);
    work->body(work->context, begin, end);
  };
  stable::must(torch_parallel_for(0, n, 1, part, &work));
}

int thread_count() {
  uint32_t n = 1;
  stable::must(torch_get_num_threads(&n));
  return static_cast<int>(n);
}

namespace {

std::atomic<const Kernels*> selected{nullptr};
std::atomic<bool> poisoned{false};

const Kernels& active() {
  const Kernels* set = selected.load(std::memory_order_relaxed);
  require(set != nullptr, "attn_cpu: no instruction set is selected; call the ops through attn.native");
  return *set;
}

void fill(const Tensor& t, int byte, Dtype dtype) {
  if (t.numel() > 0) std::memset(t.data(), byte, t.numel() * bytes(dtype));
}

// Bytes that read as NaN in every float type, where tests ask for it: what a kernel forgets to write then
// shows.
Tensor fresh(Tensor t, Dtype dtype) {
  if (poisoned.load(std::memory_order_relaxed)) fill(t, 0xff, dtype);
  return t;
}

Rows rows_at(const Tensor& t) { return {t.data(), t.stride(0), t.stride(1), t.stride(2)}; }

Tensor new_rows(const Call& c, int64_t H, int64_t rows, int64_t width) {
  return fresh(Call::empty_rows(c.p.B, H, rows, width, c.p.dtype), c.p.dtype);
}

enum Wanted { kNone, kMean, kHeads };  // of the weights

Tensor new_weights(const Problem& p, int64_t wanted) {
  require(wanted == kMean || wanted == kHeads, "weights must be 0, 1 or 2");
  return fresh(wanted == kMean ? Call::empty_dense({p.B, p.L, p.S}, p.dtype)
                               : Call::empty_dense({p.B, p.Hq, p.L, p.S}, p.dtype),
               p.dtype);
}

struct Results {
  Tensor out, m, l, weights;  // those that were asked for

  void release(uint64_t* s) {
    s[0] = out.release();
    s[1] = m.release();
    s[2] = l.release();
    s[3] = weights.release();
  }
};

// Runs forward on a call that was read.
Results run_forward(Call& c, int64_t wanted, bool residuals) {
  Problem& p = c.p;
  Results r;
  r.out = new_rows(c, p.Hq, p.L, p.Dv);
  p.out = rows_at(r.out);
  if (residuals) {
    r.m = fresh(Call::empty_dense({p.B, p.Hq, p.L}, accumulate(p.dtype)), accumulate(p.dtype));
    r.l = fresh(Call::empty_dense({p.B, p.Hq, p.L}, accumulate(p.dtype)), accumulate(p.dtype));
    p.m = r.m.data();
    p.l = r.l.data();
  }
  Weights w;
  if (wanted != kNone) {
    r.weights = new_weights(p, wanted);
    w = {r.weights.data(), wanted == kMean};
  }
  if (p.B * p.Hq * p.L > 0) active().forward(p, wanted != kNone ? &w : nullptr);
  return r;
}

// What forward left, and the gradients of its results.
struct Incoming {
  Tensor d_out, d_lse, d_weights, out, m, l;

  void read(Call& c) {
    for (Tensor* t : {&d_out, &d_lse, &d_weights, &out, &m, &l}) t->look();
    Problem& p = c.p;
    const int32_t sums = torch_dtype(accumulate(p.dtype));
    gradients.d_out = rows_of("d_out", d_out, p.dtype);
    p.out = rows_of("out", out, p.dtype);
    require_shape("d_out", d_out, {p.B, p.Hq, p.L, p.Dv});
    require_shape("out", out, {p.B, p.Hq, p.L, p.Dv});
    p.m = const_cast<char*>(vector_of<char>("m", m, sums, {p.B, p.Hq, p.L}));
    p.l = const_cast<char*>(vector_of<char>("l", l, sums, {p.B, p.Hq, p.L}));
    gradients.d_lse = vector_of<char>("d_lse", d_lse, sums, {p.B, p.Hq, p.L});
    if (d_weights) read_weights(p);
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

// Runs backward on a call that was read; returns dq, dk, dv, d_bias in s[0..3].
void backward_into(uint64_t* s, Call& c, Incoming& in, bool bias_grad) {
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
    d_bias = fresh(Call::empty_dense({bias.size(0), bias.size(1), bias.size(2), bias.size(3)}, dtype), dtype);
    b.d_bias = dense_of("bias", d_bias, p);
    b.d_bias.dtype = dtype;
  }
  if (p.B * p.Hq * p.L * p.S > 0) {
    active().backward(p, b);
  } else {
    for (const Tensor* t : {&dq, &dk, &dv}) fill(*t, 0, p.dtype);
    if (d_bias) fill(d_bias, 0, b.d_bias.dtype);
  }
  s[0] = dq.release();
  s[1] = dk.release();
  s[2] = dv.release();
  s[3] = d_bias.release();
}

// A library of another version than the Python beside it would read words that are not there.
void require_words(uint64_t given, uint64_t arguments, uint64_t taken, uint64_t results) {
  require(given == arguments && taken == results,
          "attn_cpu: the library is not that of these Python files; build it anew");
}

void forward_op(uint64_t* s, uint64_t given, uint64_t taken) {
  require_words(given, Call::kWords + 2, taken, 4);
  Call c;
  c.own(s);
  c.read(s);
  run_forward(c, stable::integer(s[Call::kWords]), stable::boolean(s[Call::kWords + 1])).release(s);
}

// A call of three tensors without residuals: the fewest arguments and results.
void infer_op(uint64_t* s, uint64_t given, uint64_t taken) {
  require_words(given, Call::kPlainWords, taken, 1);
  Call c;
  c.own_plain(s);
  c.read_plain(s);
  s[0] = run_forward(c, kNone, false).out.release();
}

void infer_weights_op(uint64_t* s, uint64_t given, uint64_t taken) {
  require_words(given, Call::kPlainWords + 1, taken, 2);
  Call c;
  c.own_plain(s);
  c.read_plain(s);
  Results r = run_forward(c, stable::integer(s[Call::kPlainWords]), false);
  s[0] = r.out.release();
  s[1] = r.weights.release();
}

void plain_op(uint64_t* s, uint64_t given, uint64_t taken) {
  require_words(given, Call::kPlainWords + 1, taken, 4);
  Call c;
  c.own_plain(s);
  c.read_plain(s);
  run_forward(c, stable::integer(s[Call::kPlainWords]), true).release(s);
}

void weights_op(uint64_t* s, uint64_t given, uint64_t taken) {
  require_words(given, Call::kWords + 3, taken, 1);
  Tensor m = Tensor::input(s[0]), l = Tensor::input(s[1]);
  Call c;
  c.own(s + 2);
  m.look();
  l.look();
  c.read(s + 2);
  Problem& p = c.p;
  const int32_t sums = torch_dtype(accumulate(p.dtype));
  p.m = const_cast<char*>(vector_of<char>("m", m, sums, {p.B, p.Hq, p.L}));
  p.l = const_cast<char*>(vector_of<char>("l", l, sums, {p.B, p.Hq, p.L}));
  const bool average = stable::boolean(s[2 + Call::kWords]);
  Tensor weights = new_weights(p, average ? kMean : kHeads);
  if (p.B * p.Hq * p.L > 0) active().weights(p, {weights.data(), average});
  s[0] = weights.release();
}

void backward_op(uint64_t* s, uint64_t given, uint64_t taken) {
  require_words(given, Call::kWords + 7, taken, 4);
  Incoming in{Tensor::input(s[0]),
              Tensor::optional(s[1]),
              Tensor::optional(s[2]),
              Tensor::input(s[3]),
              Tensor::input(s[4]),
              Tensor::input(s[5]),
              {}};
  Call c;
  c.own(s + 6);
  c.read(s + 6);
  backward_into(s, c, in, stable::boolean(s[6 + Call::kWords]));
}

void plain_backward_op(uint64_t* s, uint64_t given, uint64_t taken) {
  require_words(given, Call::kPlainWords + 4, taken, 4);
  Incoming in{Tensor::input(s[0]), Tensor(), Tensor(), Tensor::input(s[1]), Tensor::input(s[2]),
              Tensor::input(s[3]), {}};
  Call c;
  c.own_plain(s + 4);
  c.read_plain(s + 4);
  backward_into(s, c, in, false);
}

void require_pages(const Decode& d, int64_t blocks) {
  for (int64_t b = 0; b < d.B; ++b) {
    const int64_t used = (d.lengths[b] + d.slots - 1) / d.slots;
    for (int64_t i = 0; i < used; ++i) {
      const int32_t page = d.block_table[b * d.pages + i];
      require(page >= 0 && page < blocks, "block_table[", b, ", ", i, "] is ", page, "; it must be in [0, ",
              blocks - 1, "]");
    }
  }
}

void decode_op(uint64_t* s, uint64_t given, uint64_t taken) {
  require_words(given, 10, taken, 2);
  Tensor q = Tensor::input(s[0]), k = Tensor::input(s[1]), v = Tensor::input(s[2]),
         lengths = Tensor::input(s[3]), table = Tensor::optional(s[4]), slopes = Tensor::optional(s[5]);
  for (Tensor* t : {&q, &k, &v, &lengths, &table, &slopes}) t->look();
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
    d.block_table = vector_of<int32_t>("block_table", table, i32, {d.B, d.pages});
    capacity = d.slots * d.pages;
  } else {
    require(k.size(0) == d.B, "k_cache must have the batch size of q, or come with block_table");
  }
  d.lengths = vector_of<int32_t>("lengths", lengths, i32, {d.B});
  require_range("lengths", d.lengths, d.B, 0, capacity);
  if (table) require_pages(d, k.size(0));
  d.alibi_slopes = vector_of<float>("alibi_slopes", slopes, f32, {d.B, d.Hq});
  d.left = side(stable::integer(s[6]));
  d.right = side(stable::integer(s[7]));
  d.scale = stable::real(s[8]);
  d.softcap = stable::real(s[9]);
  Tensor out = fresh(Call::empty_rows(d.B, d.Hq, d.L, d.Dv, d.dtype), d.dtype);
  Tensor lse = fresh(Call::empty_dense({d.B, d.Hq, d.L}, accumulate(d.dtype)), accumulate(d.dtype));
  d.out = rows_at(out);
  d.lse = lse.data();
  if (d.B * d.Hq * d.L > 0) active().decode(d);
  s[0] = out.release();
  s[1] = lse.release();
}

struct Ops {
  Ops() : registration("attn_cpu", "CPU") {
    registration.add("forward", forward_op)
        .add("infer", infer_op)
        .add("infer_weights", infer_weights_op)
        .add("plain", plain_op)
        .add("weights", weights_op)
        .add("backward", backward_op)
        .add("plain_backward", plain_backward_op)
        .add("decode", decode_op);
  }
  stable::Registration registration;
};
const Ops ops;

}  // namespace
}  // namespace attn::cpu

// The instruction set that runs from now on, null: the best of this CPU. Returns its name; null where it
// cannot run here, and then nothing changes.
ATTN_EXPORT const char* attn_cpu_select(const char* isa) {
  const attn::cpu::Kernels* found = attn::cpu::kernels(isa);
  if (found == nullptr) return nullptr;
  attn::cpu::selected.store(found, std::memory_order_relaxed);
  return found->isa;
}

// Whether new outputs are filled with NaN before a kernel writes them: for tests.
ATTN_EXPORT void attn_cpu_poison(int on) { attn::cpu::poisoned.store(on != 0, std::memory_order_relaxed); }

// Floating-point operations done in `rounds` of nothing but multiply-adds, for the peak that benchmarks
// measure.
ATTN_EXPORT double attn_cpu_multiply_adds(int64_t rounds) {
  const attn::cpu::Kernels* set = attn::cpu::selected.load(std::memory_order_relaxed);
  return set == nullptr ? 0.0 : set->multiply_adds(rounds);
}
