// The two loops over time of the fused recurrence, as XLA FFI handlers for CPUs, in float32.
//
// A loop runs phase after phase. The pieces of a phase, ranges of units, are computed in any order
// by any thread. No sum depends on the threads, so any number of them gives the same bits.
// native.py packs the recurrent kernel into panels of 32 columns, which a piece reads in order.
// Axes: T, B, H (a multiple of 32), G = 4H, F = G or G + H, and N rows. An optional array without
// elements is absent.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <memory>
#include <new>
#include <numeric>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using Args = ffi::RemainingArgs;
using Results = ffi::RemainingRets;
using Int = int64_t;
using Shape = std::initializer_list<Int>;
using Sizes = ffi::Span<const Int>;

#if defined(__AVX512F__)
constexpr int W = 16, kMaxSums = 24;  // floats of a vector, vectors of sums in registers
#elif defined(__AVX__)
constexpr int W = 8, kMaxSums = 12;
#elif defined(__aarch64__)
constexpr int W = 4, kMaxSums = 24;
#else
constexpr int W = 4, kMaxSums = 12;
#endif
constexpr Int kPanel = 32, kUnits = 16;  // columns of a panel, units of a piece of Forward
constexpr Int kPad = 16;                 // floats between rows, against rows in one cache set
constexpr Int kMinWork = 100'000;        // multiplications of a phase that are worth a thread
constexpr int kSpins = 200;              // before a waiting thread yields; a few microseconds

typedef float Vec __attribute__((vector_size(4 * W)));
typedef float LooseVec __attribute__((vector_size(4 * W), aligned(4), may_alias));

inline Vec Load(const float* p) { return *reinterpret_cast<const LooseVec*>(p); }
inline void Store(float* p, Vec v) { *reinterpret_cast<LooseVec*>(p) = v; }

inline float Sum(Vec v) {
  float values[W];
  Store(values, v);
  return std::accumulate(values, values + W, 0.0f);
}

// The quotient of polynomials that XLA uses, to a few units in the last place; NaN stays NaN. Large
// values give 1 exactly, as in XLA: a derivative of 5e-7 in place of 0 changes what Adam learns.
inline Vec Tanh(Vec x) {
  constexpr float kLimit = 7.90531110763549805f;
  constexpr float kP[] = {2.00018790482477e-13f, -8.60467152213735e-11f, 5.12229709037114e-08f,
                          1.48572235717979e-05f, 6.37261928875436e-04f,  4.89352455891786e-03f};
  constexpr float kQ[] = {1.18534705686654e-04f, 2.26843463243900e-03f, 4.89352518554385e-03f};
  const Vec s = x * x;
  Vec p = Vec{} - 2.76076847742355e-16f, q = Vec{} + 1.19825839466702e-06f;
  for (float k : kP) p = p * s + k;
  for (float k : kQ) q = q * s + k;
  const Vec tanh = x * p / q;
  return x > kLimit ? Vec{} + 1 : x < -kLimit ? Vec{} - 1 : tanh;
}

constexpr int VectorsOfTile(int rows) {
  int vectors = kPanel / W;
  while (vectors > 1 && rows * vectors > kMaxSums) vectors /= 2;
  return vectors;
}

// Writes the product of the rows of `a` with a panel to rows of `out`, in tiles of at most R rows.
template <int R = kMaxSums / 2>
void Product(Int rows, const float* a, Int a_stride, const float* panel, Int depth, float* out,
             Int out_stride) {
  constexpr int V = VectorsOfTile(R);
  for (; rows >= R; rows -= R, a += R * a_stride, out += R * out_stride) {
    for (Int u = 0; u < kPanel; u += V * W) {
      Vec sums[R][V] = {};
      for (Int k = 0; k < depth; ++k) {
        for (int r = 0; r < R; ++r) {
          const float factor = a[r * a_stride + k];
          for (int i = 0; i < V; ++i) sums[r][i] += factor * Load(panel + k * kPanel + u + i * W);
        }
      }
      for (int r = 0; r < R; ++r) {
        for (int i = 0; i < V; ++i) Store(out + r * out_stride + u + i * W, sums[r][i]);
      }
    }
  }
  if constexpr (R > 1) Product<R - 1>(rows, a, a_stride, panel, depth, out, out_stride);
}

using RunPiece = std::function<void(Int phase, Int piece)>;

// Threads that run the pieces of one phase after another. Each has a range of pieces, whose weights
// stay in its cache, and then takes those of others. A thread that waits holds no piece.
struct Team {
  void Work(Int me) {
    const Int threads = ranges.size();
    for (Int phase = 0;; ++phase) {
      for (int spins = 0; done.load(std::memory_order_acquire) < phase * pieces; ++spins) {
        if (spins > kSpins) std::this_thread::yield();
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
      }
      if (phase == phases) return;
      Int finished = 0;
      for (Int i = 0; i < threads; ++i) {
        const Int range = (me + i) % threads, begin = pieces * range / threads;
        const Int size = pieces * (range + 1) / threads - begin;
        std::atomic<Int>& claimed = ranges[range].claimed;
        for (Int next = claimed; next < (phase + 1) * size;) {
          if (!claimed.compare_exchange_weak(next, next + 1)) continue;
          run_piece(phase, begin + next - phase * size);
          ++finished;
          next = claimed;
        }
      }
      if (finished) done.fetch_add(finished, std::memory_order_acq_rel);
    }
  }

  struct alignas(64) Range {
    std::atomic<Int> claimed{0};  // pieces, in all phases up to now
  };
  const Int phases, pieces;
  const RunPiece run_piece;
  std::vector<Range> ranges;
  alignas(64) std::atomic<Int> done{0};  // pieces, in all phases up to now
};

void Run(ffi::ThreadPool& pool, Int work, Int phases, Int pieces, RunPiece run_piece) {
  const Int cores = std::min<Int>(pool.num_threads(), std::thread::hardware_concurrency());
  const Int threads = std::max<Int>(1, std::min({cores, pieces, work / kMinWork}));
  // Shared, since a helper may begin after the last piece is done, and then does nothing.
  std::shared_ptr<Team> team(
      new Team{phases, pieces, std::move(run_piece), std::vector<Team::Range>(threads)});
  for (Int i = 1; i < threads; ++i) pool.Schedule([team, i] { team->Work(i); });
  team->Work(0);
}

// Memory for one call, from a cache line's beginning.
struct Array {
  struct alignas(64) Line { float values[16]; };
  explicit Array(Int size) : lines(size / 16 + 1) {}
  operator float*() { return lines[0].values; }
  std::vector<Line> lines;
};

// The sizes and options of a call; `error` says what is wrong with them.
struct Call {
  Call(Args args, Results results, Sizes sizes) : args(args), results(results) {
    const bool are_positive = std::all_of(sizes.begin(), sizes.end(), [](Int n) { return n > 0; });
    Expect(sizes.size() == 5 && are_positive, "sizes");
    if (error.failure()) return;
    T = sizes[0], B = sizes[1], H = sizes[2], F = sizes[3], N = sizes[4], G = 4 * H;
    Expect(H % kPanel == 0 && (F == G || F == G + H), "sizes");
    ids_TB = In<ffi::S32>({T, B}, true);
    keep_TB = In<ffi::PRED>({T, B}, true);
    mask_BH = In({B, H}, true);
    gain_G = In({G}, true);
    Expect(ids_TB || N == T * B, "rows");
  }

  template <typename Buffer>
  auto Data(Buffer& buffer, Shape shape, bool is_optional, const char* kind, int number) {
    const auto found = buffer.dimensions();
    const bool is_absent = is_optional && buffer.element_count() == 0;
    const bool is_right = std::equal(found.begin(), found.end(), shape.begin(), shape.end());
    Expect(is_absent || is_right, kind, number);
    return is_absent ? nullptr : buffer.typed_data();
  }
  // Return the next argument or result, or null where an optional one has no elements.
  template <ffi::DataType type = ffi::F32>
  const ffi::NativeType<type>* In(Shape shape, bool is_optional = false) {
    auto buffer = args.get<ffi::Buffer<type>>(num_args++);
    Expect(buffer.has_value(), "argument ", num_args);
    return buffer ? Data(*buffer, shape, is_optional, "argument ", num_args) : nullptr;
  }
  float* Out(Shape shape, bool is_optional = false) {
    auto buffer = results.get<ffi::Buffer<ffi::F32>>(num_results++);
    Expect(buffer.has_value(), "result ", num_results);
    return buffer ? Data(**buffer, shape, is_optional, "result ", num_results) : nullptr;
  }
  void Expect(bool is_right, const char* name, int number = 0) {
    if (is_right || error.failure()) return;
    const std::string which = number ? std::to_string(number) : "";
    error = ffi::Error::InvalidArgument("native LSTM: wrong " + (name + which));
  }

  Int Row(Int t, Int b) const {
    if (!ids_TB) return t * B + b;
    const Int id = ids_TB[t * B + b];
    return std::clamp<Int>(id < 0 ? id + N : id, 0, N - 1);  // as JAX looks up
  }
  bool Keep(Int t, Int b) const { return !keep_TB || keep_TB[t * B + b]; }

  Args args;
  Results results;
  int num_args = 0, num_results = 0;
  ffi::Error error = ffi::Error::Success();
  Int T = 1, B = 1, H = kPanel, F = 4 * kPanel, N = 1, G = 4 * kPanel;
  const int32_t* ids_TB = nullptr;  // absent: row t B + b
  const bool* keep_TB = nullptr;    // absent: all are kept
  const float* mask_BH = nullptr;   // absent: 1
  const float* gain_G = nullptr;    // absent: sums are not normalised
};

ffi::Error Forward(ffi::ThreadPool pool, Args args, Results results, Sizes sizes, float epsilon) {
  Call call(args, results, sizes);
  const Int T = call.T, B = call.B, H = call.H, G = call.G, F = call.F, pieces = H / kUnits;
  const float* panels = call.In({pieces, 2, H, 2, kUnits});
  const float *rows_NF = call.In({call.N, F}), *c0_BH = call.In({B, H}), *h0_BH = call.In({B, H});
  float *hidden_TBH = call.Out({T, B, H}), *c_BH = call.Out({B, H});
  float* by_sums_TBG = call.Out({T, B, G}, true);  // absent: no residuals
  float *dh_by_dc_TBH = call.Out({T, B, H}, true), *dc_by_c_TBH = call.Out({T, B, H}, true);
  float *normed_TBG = call.Out({T, B, G}, true), *roots_TB = call.Out({T, B, 1}, true);
  const bool with_residuals = by_sums_TBG, with_norm = call.gain_G;
  call.Expect(with_residuals == (dh_by_dc_TBH && dc_by_c_TBH), "residuals");
  call.Expect((with_residuals && with_norm) == (normed_TBG && roots_TB), "residuals");
  if (call.error.failure()) return call.error;

  const Int stride = H + kPad;
  Array gated_h(2 * B * stride);  // [t % 2][B][stride]: h times scale and mask
  Array products(B * G);  // [piece][B][gate][kUnits]
  Array squares(B * pieces);  // [B][piece]

  auto set_gated_h = [&](Int t, Int b, Int unit, Vec h) {
    if (!call.Keep(t, b)) h = Vec{};
    if (F > G) h *= Load(rows_NF + call.Row(t, b) * F + G + unit);
    if (call.mask_BH) h *= Load(call.mask_BH + b * H + unit);
    Store(gated_h + (t % 2 * B + b) * stride + unit, h);
  };
  auto multiply = [&](Int t, Int piece) {
    float* to = products + piece * B * 4 * kUnits;
    for (Int pair = 0; pair < 2; ++pair) {  // the panels of i and f, and of g and o
      Product(B, gated_h + t % 2 * B * stride, stride, panels + (2 * piece + pair) * H * kPanel,
              H, to + pair * kPanel, 4 * kUnits);
    }
    for (Int b = 0; with_norm && b < B; ++b) {
      Vec sums = {};
      for (Int i = 0; i < 4 * kUnits; i += W) {
        const Vec product = Load(to + b * 4 * kUnits + i);
        sums += product * product;
      }
      squares[b * pieces + piece] = Sum(sums);
    }
  };
  auto gate = [&](Int t, Int b, Int unit, const float* product, float root) {
    const Int at = (t * B + b) * H + unit, at_G = (t * B + b) * G + unit;
    const float* row = rows_NF + call.Row(t, b) * F + unit;
    Vec tanhs[4];
    for (Int g = 0; g < 4; ++g) {
      Vec sum = Load(product + g * kUnits);
      if (with_norm) {
        sum *= root;
        if (with_residuals) Store(normed_TBG + at_G + g * H, sum);
        sum *= Load(call.gain_G + g * H + unit);
      }
      tanhs[g] = Tanh(sum + Load(row + g * H));
    }
    const Vec i = (1 + tanhs[0]) / 2, f = (1 + tanhs[1]) / 2, g = tanhs[2], o = (1 + tanhs[3]) / 2;
    const bool keeps = call.Keep(t, b);
    const Vec c_before = keeps ? Load(c_BH + b * H + unit) : Vec{};
    const Vec c = f * c_before + i * g, tanh_c = Tanh(c), h = o * tanh_c;
    Store(c_BH + b * H + unit, c);
    Store(hidden_TBH + at, h);
    if (t + 1 < T) set_gated_h(t + 1, b, unit, h);
    if (!with_residuals) return;
    const Vec factors[4] = {g / 2, c_before / 2, i, tanh_c / 2};
    for (Int k = 0; k < 4; ++k) {
      Store(by_sums_TBG + at_G + k * H, (1 - tanhs[k] * tanhs[k]) * factors[k]);
    }
    Store(dh_by_dc_TBH + at, o * (1 - tanh_c * tanh_c));
    Store(dc_by_c_TBH + at, keeps ? f : Vec{});
  };

  std::copy_n(c0_BH, B * H, c_BH);
  for (Int b = 0; b < B; ++b) {
    for (Int unit = 0; unit < H; unit += W) set_gated_h(0, b, unit, Load(h0_BH + b * H + unit));
  }
  const Int each = with_norm ? 2 : 1;  // phases of a time step
  Run(pool, B * H * G, each * T, pieces, [&](Int phase, Int piece) {
    const Int t = phase / each;
    if (phase % each == 0) multiply(t, piece);
    for (Int b = 0; phase % each == each - 1 && b < B; ++b) {
      const float *row = products + (piece * B + b) * 4 * kUnits, *parts = squares + b * pieces;
      const float mean = with_norm ? std::accumulate(parts, parts + pieces, 0.0f) / G : 0;
      const float root = 1 / std::sqrt(mean + epsilon);
      if (roots_TB && piece == 0) roots_TB[t * B + b] = root;
      for (Int u = 0; u < kUnits; u += W) gate(t, b, piece * kUnits + u, row + u, root);
    }
  });
  return ffi::Error::Success();
}

ffi::Error Backward(ffi::ThreadPool pool, Args args, Results results, Sizes sizes, float) {
  Call call(args, results, sizes);
  const Int T = call.T, B = call.B, H = call.H, G = call.G, F = call.F, N = call.N;
  const Int pieces = H / kPanel;
  const float* panels = call.In({pieces, G, kPanel});
  const float *scale_NH = call.In({N, H}, true), *h0_BH = call.In({B, H});
  const float* hidden_TBH = call.In({T, B, H});
  const float *by_sums_TBG = call.In({T, B, G}), *dh_by_dc_TBH = call.In({T, B, H});
  const float *dc_by_c_TBH = call.In({T, B, H}), *normed_TBG = call.In({T, B, G}, true);
  const float *roots_TB = call.In({T, B, 1}, true), *dhidden_TBH = call.In({T, B, H});
  const float *dc_last_BH = call.In({B, H}), *dh_last_BH = call.In({B, H});
  float *gated_h_TBH = call.Out({T, B, H}), *dproducts_TBG = call.Out({T, B, G});
  float* drows_NF = call.Out({N, F});
  float *dgain_G = call.Out({G}, true), *dc_BH = call.Out({B, H}), *dh_BH = call.Out({B, H});
  const bool with_norm = call.gain_G;
  call.Expect((F > G) == (scale_NH != nullptr), "scale");
  call.Expect(with_norm == (normed_TBG && roots_TB && dgain_G), "norm");
  if (call.error.failure()) return call.error;

  const Int stride = G + kPad;
  Array sums(2 * B * stride);  // [t % 2][B][stride]: gradients of the products
  Array products(B * H);  // [piece][B][kPanel]
  Array along(B * pieces);  // [B][piece]: parts of sums of gradient times normed product

  auto add_to_row = [&](Int t, Int b, Int column, Vec gradient) {
    float* to = drows_NF + call.Row(t, b) * F + column;
    Store(to, call.ids_TB ? Load(to) + gradient : gradient);
  };
  // Finds the gradients of the sums at t from that of h from later steps; returns their part in
  // `along`.
  auto differentiate = [&](Int t, Int b, Int unit, Vec dh) {
    const Int at = (t * B + b) * H + unit, at_G = (t * B + b) * G + unit;
    dh += Load(dhidden_TBH + at);
    const Vec dc = Load(dc_BH + b * H + unit) + dh * Load(dh_by_dc_TBH + at);
    Store(dc_BH + b * H + unit, dc * Load(dc_by_c_TBH + at));
    Vec part = {};
    for (Int g = 0; g < 4; ++g) {
      Vec gradient = (g < 3 ? dc : dh) * Load(by_sums_TBG + at_G + g * H);
      add_to_row(t, b, g * H + unit, gradient);
      if (with_norm) {
        const Vec normed = Load(normed_TBG + at_G + g * H);
        float* dgain = dgain_G + g * H + unit;
        Store(dgain, Load(dgain) + gradient * normed);
        gradient *= Load(call.gain_G + g * H + unit);
        part += gradient * normed;
      } else {
        Store(dproducts_TBG + at_G + g * H, gradient);
      }
      Store(sums + (t % 2 * B + b) * stride + g * H + unit, gradient);
    }
    return part;
  };
  // Writes gated_h at t; returns the gradient of h before t from that of gated_h.
  auto differentiate_gated_h = [&](Int t, Int b, Int unit, Vec dh) {
    const Int at = b * H + unit;
    const bool keeps = call.Keep(t, b);
    const Vec h = !keeps ? Vec{} : Load(at + (t > 0 ? hidden_TBH + (t - 1) * B * H : h0_BH));
    Vec factor = Vec{} + 1;
    if (call.mask_BH) factor = Load(call.mask_BH + at);
    if (scale_NH) {
      add_to_row(t, b, G + unit, dh * factor * h);
      factor *= Load(scale_NH + call.Row(t, b) * H + unit);
    }
    Store(gated_h_TBH + t * B * H + at, h * factor);
    return keeps ? dh * factor : Vec{};
  };
  // Takes the gradient of h after t - 1 from the products at t, and those of the sums at t - 1
  // from it while it is in the cache.
  auto propagate = [&](Int t, Int piece) {
    float* product = products + piece * B * kPanel;
    if (t < T) {
      const float *gradients = sums + t % 2 * B * stride, *panel = panels + piece * G * kPanel;
      Product(B, gradients, stride, panel, G, product, kPanel);
    }
    for (Int b = 0; b < B; ++b) {
      Vec part = {};
      for (Int u = 0, unit = piece * kPanel; u < kPanel; u += W, unit += W) {
        const Vec dh = t == T ? Load(dh_last_BH + b * H + unit)
                              : differentiate_gated_h(t, b, unit, Load(product + b * kPanel + u));
        if (t > 0) {
          part += differentiate(t - 1, b, unit, dh);
        } else {
          Store(dh_BH + b * H + unit, dh);
        }
      }
      along[b * pieces + piece] = Sum(part);
    }
  };

  std::copy_n(dc_last_BH, B * H, dc_BH);
  if (with_norm) std::fill_n(dgain_G, G, 0.0f);
  if (call.ids_TB) std::fill_n(drows_NF, N * F, 0.0f);
  const Int each = with_norm ? 2 : 1;  // phases of a time step
  Run(pool, B * H * G, 1 + each * T, pieces, [&](Int phase, Int piece) {
    const Int t = T - phase / each;
    if (phase % each == 0) return propagate(t, piece);
    for (Int b = 0; b < B; ++b) {
      const float* parts = along + b * pieces;
      const float root = roots_TB[(t - 1) * B + b];
      const float mean = std::accumulate(parts, parts + pieces, 0.0f) / G;
      for (Int u = 0; u < 4 * kPanel; u += W) {
        const Int column = u / kPanel * H + piece * kPanel + u % kPanel;
        const Int at_G = ((t - 1) * B + b) * G + column;
        float* sum = sums + ((t - 1) % 2 * B + b) * stride + column;
        const Vec gradient = (Load(sum) - Load(normed_TBG + at_G) * mean) * root;
        Store(sum, gradient);
        Store(dproducts_TBG + at_G, gradient);
      }
    }
  });
  return ffi::Error::Success();
}

template <auto kLoop>
ffi::Error Guard(ffi::ThreadPool pool, Args args, Results rets, Sizes sizes, float epsilon) try {
  return kLoop(pool, args, rets, sizes, epsilon);
} catch (const std::bad_alloc&) {
  return ffi::Error(ffi::ErrorCode::kResourceExhausted, "native LSTM: no memory");
}

}  // namespace

#define DEFINE_HANDLER(symbol, function)                                                      \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(symbol, Guard<function>,                                      \
                                ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().RemainingArgs()       \
                                    .RemainingRets().Attr<ffi::Span<const Int>>("sizes")      \
                                    .Attr<float>("epsilon"))
DEFINE_HANDLER(LstmForward, Forward);
DEFINE_HANDLER(LstmBackward, Backward);
