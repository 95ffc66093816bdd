// Our kernels as custom operators of ONNX Runtime, in the domain llmopt.kernels. Their work runs on ONNX Runtime's own
// threads: a second pool on the same cores would fight with it.
//
//   GroupQueryAttention  drop-in for com.microsoft's, for what lower_attention makes: causal, in place, float or int8
//                        cache with scales per channel, rope, sliding window, soft cap.
//   QuantizeRows         x -> integers around 128 and the largest magnitude of each row, for W8A8.
//   QuantizeGatedRows    the same of silu(gate) * up, from the product of integers that has gate and up side by side, and
//                        that product's own largest magnitudes.
//   QuantizeNormedRows   the same of the root mean square norm of a residual plus such a product; also gives that sum.
//                        Both give the row itself too, where an adapter reads it.
//   LoraAdd, LoraAddBfloat16
//                        y + up (down x), where each row has the factors of its own adapter or none: then it stays as it is.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "ort.h"

namespace {

constexpr int kBlock = 64;  // keys that attention looks at together
constexpr int kGroup = 64;  // weights that the sampler has the sum and the largest of

// One call of attention. Strides are in floats, from one token to the next.
struct Problem {
  const float *query, *key, *value;
  const float *cosines = nullptr, *sines = nullptr;          // [positions][half]
  const float *key_scale = nullptr, *value_scale = nullptr;  // [kv_heads * columns]
  const int32_t* last;                                       // [batch], the last position of each sequence
  void *keys, *values;                                       // [batch][kv_heads][capacity][columns]
  float* output;
  int64_t batch, tokens, kv_heads, capacity, query_stride, key_stride, positions = 0;
  int64_t window = -1;
  int group, columns, half = 0;
  float scale, softcap;

  int64_t past(int64_t sequence) const { return last[sequence] + 1 - tokens; }
  int width() const { return (columns + 15) / 16 * 16; }
};

// The upper half of a float.
struct Bfloat16 {
  uint16_t bits;
  operator float() const {
    const uint32_t whole = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &whole, sizeof(value));
    return value;
  }
};

// One adapter's factors for one linear, whose results are some of y's columns.
template <class Number>
struct LoraPart {
  const Number *down, *up, *bias;  // [rank][inputs], [rank][columns], [columns] or null
  const Number* next;              // what is read behind these
  int rank;
  int64_t inputs, columns, stride;  // stride of y
};

}  // namespace

// Vectors are passed only between functions that are inlined: their calling convention does not matter.
#pragma GCC diagnostic ignored "-Wpsabi"

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq")
#define LLMOPT_LANES 16
namespace avx512 {
#include "vector.h"
#include "attention_body.h"
#include "quantize_body.h"
#include "lora_body.h"
#include "sampling_body.h"
}
#undef LLMOPT_LANES
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define LLMOPT_LANES 8
namespace avx2 {
#include "vector.h"
#include "attention_body.h"
#include "quantize_body.h"
#include "lora_body.h"
#include "sampling_body.h"
}
#undef LLMOPT_LANES
#pragma GCC pop_options
#endif
#define LLMOPT_LANES 1
namespace plain {
#include "vector.h"
#include "attention_body.h"
#include "quantize_body.h"
#include "lora_body.h"
#include "sampling_body.h"
}
#undef LLMOPT_LANES

namespace {

// The kernels of one set of instructions.
struct Kernels {
  const char* name;
  void (*append_float)(const Problem&, int64_t, int64_t, int64_t, int64_t);
  void (*append_int8)(const Problem&, int64_t, int64_t, int64_t, int64_t);
  void (*attend_float)(const Problem&, int64_t, int64_t, int64_t, int, float*);
  void (*attend_int8)(const Problem&, int64_t, int64_t, int64_t, int, float*);
  void (*quantize_row)(const float*, int64_t, uint8_t*, float*);
  void (*quantize_gated_row)(const float*, float, int64_t, float*, uint8_t*, float*);
  void (*quantize_normed_row)(const float*, float, const float*, const float*, float, int64_t, float*, float*, uint8_t*,
                              float*);
  void (*weigh_logits)(const float*, int64_t, float, float*, double*, float*);
  void (*add_lora)(const LoraPart<float>&, const float*, const float*, int, float*, float*);
  void (*add_lora_bfloat16)(const LoraPart<Bfloat16>&, const float*, const float*, int, float*, float*);
  void add(const LoraPart<float>& p, const float* x, const float* scale, int rows, float* inner, float* y) const {
    add_lora(p, x, scale, rows, inner, y);
  }
  void add(const LoraPart<Bfloat16>& p, const float* x, const float* scale, int rows, float* inner, float* y) const {
    add_lora_bfloat16(p, x, scale, rows, inner, y);
  }
};

size_t aligned(size_t floats) { return (floats + 15) / 16 * 16; }

size_t scratch_floats(const Problem& p, int tokens) {
  const size_t rows = size_t(tokens) * p.group, width = p.width();
  return 2 * kBlock * width + rows * (2 * width + kBlock) + 2 * aligned(rows);
}

template <class Scratch>
Scratch divided(const Problem& p, int tokens, float* memory) {
  const size_t rows = size_t(tokens) * p.group, width = p.width();
  Scratch s;
  s.keys = memory, s.values = s.keys + kBlock * width, s.queries = s.values + kBlock * width;
  s.scores = s.queries + rows * width, s.sums = s.scores + rows * kBlock, s.most = s.sums + rows * width;
  s.total = s.most + aligned(rows);
  return s;
}

#define LLMOPT_KERNELS(space)                                                                                       \
  Kernels {                                                                                                         \
    #space, space::append<float>, space::append<int8_t>,                                                            \
        [](const Problem& p, int64_t b, int64_t h, int64_t first, int n, float* memory) {                           \
          space::attend<float>(p, b, h, first, n, divided<space::Scratch>(p, n, memory));                           \
        },                                                                                                          \
        [](const Problem& p, int64_t b, int64_t h, int64_t first, int n, float* memory) {                           \
          space::attend<int8_t>(p, b, h, first, n, divided<space::Scratch>(p, n, memory));                          \
        },                                                                                                          \
        space::quantize_row, space::quantize_gated_row, space::quantize_normed_row, space::weigh_logits,            \
        space::add_lora<float>, space::add_lora<Bfloat16>                                                           \
  }

// The best set this CPU has; LLMOPT_KERNELS=avx2 or plain asks for a lesser one, for tests.
const Kernels& kernels() {
  static const Kernels chosen = [] {
    const char* asked = std::getenv("LLMOPT_KERNELS");
    const std::string most = asked == nullptr ? "avx512" : asked;
#if defined(__x86_64__)
    if (most == "avx512" && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
      return LLMOPT_KERNELS(avx512);
    if (most != "plain" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return LLMOPT_KERNELS(avx2);
#endif
    return LLMOPT_KERNELS(plain);
  }();
  return chosen;
}

using ort::Api;
using ort::CustomOp;
using ort::KernelContext;
using ort::KernelInfo;
using ort::Status;
using ort::Value;

Status* failed(const Api* api, const std::string& why) {
  return ort::call<Status*>(api, ort::kCreateStatus, ort::kInvalidArgument, why.c_str());
}

// What a kernel is given and gives, in this call.
class Call {
 public:
  Call(const Api* api, KernelContext* context) : api_(api), context_(context) {}

  const Value* input(size_t index) const {
    const Value* value = nullptr;
    ort::call<Status*>(api_, ort::kContextInput, static_cast<const KernelContext*>(context_), index, &value);
    return value;
  }

  std::vector<int64_t> shape(const Value* value) const {
    ort::ShapeInfo* info = nullptr;
    ort::call<Status*>(api_, ort::kGetTensorTypeAndShape, value, &info);
    size_t count = 0;
    ort::call<Status*>(api_, ort::kGetDimensionsCount, static_cast<const ort::ShapeInfo*>(info), &count);
    std::vector<int64_t> found(count);
    ort::call<Status*>(api_, ort::kGetDimensions, static_cast<const ort::ShapeInfo*>(info), found.data(), count);
    ort::call<void>(api_, ort::kReleaseShapeInfo, info);
    return found;
  }

  int64_t size(const Value* value) const {
    int64_t elements = 1;
    for (int64_t each : shape(value)) elements *= each;
    return elements;
  }

  template <class T>
  T* data(const Value* value) const {
    void* found = nullptr;
    ort::call<Status*>(api_, ort::kGetTensorMutableData, const_cast<Value*>(value), &found);
    return static_cast<T*>(found);
  }

  // Null for an optional output that nobody asks for.
  template <class T>
  T* output(size_t index, const std::vector<int64_t>& shape) const {
    Value* value = nullptr;
    ort::call<Status*>(api_, ort::kContextOutput, context_, index, shape.data(), shape.size(), &value);
    return value == nullptr ? nullptr : data<T>(value);
  }

  // work(i) for i in 0..count-1, on ONNX Runtime's threads.
  template <class Work>
  void parallel(size_t count, const Work& work) const {
    void (*const each)(void*, size_t) = [](void* data, size_t index) { (*static_cast<const Work*>(data))(index); };
    ort::call<Status*>(api_, ort::kParallelFor, static_cast<const KernelContext*>(context_), each, count, size_t(0),
                       const_cast<void*>(static_cast<const void*>(&work)));
  }

 private:
  const Api* api_;
  KernelContext* context_;
};

int64_t integer(const Api* api, const KernelInfo* info, const char* name, int64_t otherwise) {
  int64_t value = otherwise;
  Status* status = ort::call<Status*>(api, ort::kAttributeInt64, info, name, &value);
  if (status == nullptr) return value;
  ort::call<void>(api, ort::kReleaseStatus, status);
  return otherwise;
}

float number(const Api* api, const KernelInfo* info, const char* name, float otherwise) {
  float value = otherwise;
  Status* status = ort::call<Status*>(api, ort::kAttributeFloat, info, name, &value);
  if (status == nullptr) return value;
  ort::call<void>(api, ort::kReleaseStatus, status);
  return otherwise;
}

class Attention {
 public:
  static constexpr size_t kInputs = 14, kOutputs = 3;

  Attention(const Api* api, const KernelInfo* info) : api_(api) {
    heads_ = integer(api, info, "num_heads", 0), kv_heads_ = integer(api, info, "kv_num_heads", 0);
    window_ = integer(api, info, "local_window_size", -1), rotary_ = integer(api, info, "do_rotary", 0);
    scale_ = number(api, info, "scale", 0), softcap_ = number(api, info, "softcap", 0);
  }

  Status* compute(KernelContext* context, bool int8) const {
    const Call call(api_, context);
    const Value* in[kInputs];
    for (size_t i = 0; i < kInputs; i++) in[i] = call.input(i);
    if (in[9] != nullptr || in[10] != nullptr || in[11] != nullptr)
      return failed(api_, "llmopt's attention takes no positions, no bias and no sinks");
    const auto query = call.shape(in[0]), cache = call.shape(in[3]);
    if (query.size() != 3 || cache.size() != 4 || kv_heads_ < 1 || heads_ % kv_heads_ || cache[1] != kv_heads_ ||
        call.shape(in[4]) != cache || cache[0] != query[0])
      return failed(api_, "shapes of query and cache do not fit together");
    const bool packed = in[1] == nullptr;
    const int64_t own = query[0] * query[1] * kv_heads_ * cache[3];
    if (call.size(in[5]) != query[0] || (!packed && (call.size(in[1]) != own || in[2] == nullptr || call.size(in[2]) != own)))
      return failed(api_, "keys, values or lengths do not fit the queries");
    Problem p{};
    p.batch = query[0], p.tokens = query[1], p.kv_heads = kv_heads_, p.capacity = cache[2];
    p.columns = static_cast<int>(cache[3]), p.group = static_cast<int>(heads_ / kv_heads_);
    if (query[2] != (heads_ + (packed ? 2 * kv_heads_ : 0)) * p.columns)
      return failed(api_, "the query does not have the columns of its heads");
    p.query = call.data<float>(in[0]);
    p.query_stride = query[2];
    p.key = packed ? p.query + heads_ * p.columns : call.data<float>(in[1]);
    p.value = packed ? p.key + kv_heads_ * p.columns : call.data<float>(in[2]);
    p.key_stride = packed ? query[2] : kv_heads_ * p.columns;
    p.last = call.data<int32_t>(in[5]);
    p.window = window_, p.softcap = softcap_;
    p.scale = scale_ == 0 ? 1 / std::sqrt(static_cast<float>(p.columns)) : scale_;
    if (rotary_) {
      if (in[7] == nullptr || in[8] == nullptr || call.shape(in[7]) != call.shape(in[8]) ||
          2 * call.shape(in[7])[1] > p.columns)
        return failed(api_, "the tables of cosines and sines do not fit the heads");
      const auto table = call.shape(in[7]);
      p.cosines = call.data<float>(in[7]), p.sines = call.data<float>(in[8]);
      p.positions = table[0], p.half = static_cast<int>(table[1]);
    }
    if (int8) {
      for (size_t i : {12, 13})
        if (in[i] == nullptr || call.size(in[i]) != kv_heads_ * p.columns)
          return failed(api_, "an int8 cache needs a scale for every channel of its keys and of its values");
      p.key_scale = call.data<float>(in[12]), p.value_scale = call.data<float>(in[13]);
    }
    for (int64_t b = 0; b < p.batch; b++)
      if (p.past(b) < 0 || p.last[b] >= p.capacity || (rotary_ && p.last[b] >= p.positions))
        return failed(api_, "a sequence of " + std::to_string(p.last[b] + 1) + " tokens, " + std::to_string(p.tokens) +
                                " of them new, does not fit in a cache of " + std::to_string(p.capacity));
    p.output = call.output<float>(0, {query[0], query[1], heads_ * p.columns});
    const size_t bytes = cache[0] * cache[1] * cache[2] * cache[3] * (int8 ? 1 : sizeof(float));
    p.keys = present(call, in[3], 1, cache, bytes), p.values = present(call, in[4], 2, cache, bytes);
    run(call, p, int8);
    return nullptr;
  }

 private:
  // The present cache: the past's own memory when it is bound so, else a copy.
  static void* present(const Call& call, const Value* past, size_t index, const std::vector<int64_t>& shape, size_t bytes) {
    void *from = call.data<void>(past), *to = call.output<void>(index, shape);
    if (from != to) std::memcpy(to, from, bytes);
    return to;
  }

  static void run(const Call& call, const Problem& p, bool int8) {
    const Kernels& use = kernels();
    const auto append = int8 ? use.append_int8 : use.append_float;
    const auto attend = int8 ? use.attend_int8 : use.attend_float;
    // A chunk's keys are all in the cache before the first query looks at them; a single token's head needs only itself.
    const bool single = p.tokens == 1;
    const int64_t heads = p.batch * p.kv_heads;
    if (!single) {
      const int64_t part = 64, parts = (p.tokens + part - 1) / part;
      call.parallel(heads * parts, [&](size_t i) {
        const int64_t head = i / parts, first = i % parts * part;
        append(p, head / p.kv_heads, head % p.kv_heads, first, std::min(first + part, p.tokens));
      });
    }
    const int64_t most = std::max(1, kTileRows / p.group), tiles = (p.tokens + most - 1) / most;
    const size_t floats = scratch_floats(p, static_cast<int>(std::min(most, p.tokens)));
    call.parallel(heads * tiles, [&](size_t i) {
      // Late tiles see the most keys: they begin first, so that the threads end together.
      const int64_t head = i % heads, first = (tiles - 1 - static_cast<int64_t>(i) / heads) * most;
      thread_local std::vector<float> memory;
      if (memory.size() < floats + 16) memory.resize(floats + 16);
      float* start = memory.data();
      start += (64 - reinterpret_cast<uintptr_t>(start) % 64) % 64 / sizeof(float);
      if (single) append(p, head / p.kv_heads, head % p.kv_heads, 0, 1);
      attend(p, head / p.kv_heads, head % p.kv_heads, first, static_cast<int>(std::min(most, p.tokens - first)), start);
    });
  }

  static constexpr int kTileRows = 48;  // queries, sums and weights of a tile, and a block of keys, stay in the L2 cache

  const Api* api_;
  int64_t heads_, kv_heads_, window_, rotary_;
  float scale_, softcap_;
};

template <bool int8>
class CachedAttention : public Attention {
 public:
  using Attention::Attention;
  static constexpr const char* kName = int8 ? "GroupQueryAttentionInt8" : "GroupQueryAttention";
  static ort::Type input_type(size_t i) {
    if (i == 3 || i == 4) return int8 ? ort::kInt8 : ort::kFloat;
    return i == 5 || i == 6 ? ort::kInt32 : ort::kFloat;
  }
  static ort::Type output_type(size_t i) { return i == 0 ? ort::kFloat : input_type(3); }
  static bool optional(size_t i) { return i == 1 || i == 2 || i > 6; }
  static bool optional_output(size_t) { return false; }
  Status* compute(KernelContext* context) const { return Attention::compute(context, int8); }
};

// Several rows at a time, as many as are worth a thread's attention.
template <class Work>
void each_row(const Call& call, int64_t rows, int64_t columns, const Work& work) {
  const int64_t part = std::max<int64_t>(1, (1 << 13) / columns), parts = (rows + part - 1) / part;
  const auto some = [&](size_t i) {
    for (int64_t row = i * part; row < std::min<int64_t>(rows, (i + 1) * part); row++) work(row);
  };
  if (parts == 1) {
    some(0);
  } else {
    call.parallel(parts, some);
  }
}

float* row_memory(int64_t columns) {
  thread_local std::vector<float> memory;
  if (memory.size() < size_t(columns)) memory.resize(columns);
  return memory.data();
}

// What the operators that make integers have in common.
class Quantizer {
 public:
  static ort::Type input_type(size_t) { return ort::kFloat; }
  static ort::Type output_type(size_t i) { return i == 0 ? ort::kUint8 : ort::kFloat; }
  static bool optional(size_t) { return false; }
  static bool optional_output(size_t) { return false; }

 protected:
  explicit Quantizer(const Api* api) : api_(api) {}

  // Whether there is one number for each row of shape, whose rows have numbers at all.
  static bool fits(const std::vector<int64_t>& shape, std::vector<int64_t> scales) {
    if (shape.empty() || shape.back() == 0 || scales.size() != shape.size() || scales.back() != 1) return false;
    scales.back() = shape.back();
    return scales == shape;
  }

  static std::vector<int64_t> with_last(std::vector<int64_t> shape, int64_t columns) {
    shape.back() = columns;
    return shape;
  }

  const Api* api_;
};

class QuantizeRows : public Quantizer {
 public:
  static constexpr size_t kInputs = 1, kOutputs = 2;
  static constexpr const char* kName = "QuantizeRows";

  QuantizeRows(const Api* api, const KernelInfo*) : Quantizer(api) {}

  Status* compute(KernelContext* context) const {
    const Call call(api_, context);
    const Value* in = call.input(0);
    const auto shape = call.shape(in);
    if (shape.empty() || shape.back() == 0) return failed(api_, "a row needs numbers");
    const int64_t columns = shape.back();
    const float* x = call.data<float>(in);
    uint8_t* integers = call.output<uint8_t>(0, shape);
    float* most = call.output<float>(1, with_last(shape, 1));
    each_row(call, call.size(in) / columns, columns, [&](int64_t row) {
      kernels().quantize_row(x + row * columns, columns, integers + row * columns, most + row);
    });
    return nullptr;
  }
};

class QuantizeGatedRows : public Quantizer {
 public:
  static constexpr size_t kInputs = 2, kOutputs = 3;
  static bool optional_output(size_t i) { return i == 2; }
  static constexpr const char* kName = "QuantizeGatedRows";

  QuantizeGatedRows(const Api* api, const KernelInfo*) : Quantizer(api) {}

  Status* compute(KernelContext* context) const {
    const Call call(api_, context);
    const Value *in = call.input(0), *scales = call.input(1);
    const auto shape = call.shape(in);
    if (!fits(shape, call.shape(scales)) || shape.back() % 2)
      return failed(api_, "gate and up need the same columns, and every row a scale");
    const int64_t columns = shape.back() / 2;
    const float *product = call.data<float>(in), *scale = call.data<float>(scales);
    uint8_t* integers = call.output<uint8_t>(0, with_last(shape, columns));
    float* most = call.output<float>(1, with_last(shape, 1));
    float* rows = call.output<float>(2, with_last(shape, columns));
    each_row(call, call.size(scales), 4 * columns, [&](int64_t row) {
      kernels().quantize_gated_row(product + 2 * row * columns, scale[row], columns,
                                   rows == nullptr ? row_memory(columns) : rows + row * columns,
                                   integers + row * columns, most + row);
    });
    return nullptr;
  }
};

class QuantizeNormedRows : public Quantizer {
 public:
  static constexpr size_t kInputs = 4, kOutputs = 4;
  static bool optional_output(size_t i) { return i == 3; }
  static constexpr const char* kName = "QuantizeNormedRows";

  QuantizeNormedRows(const Api* api, const KernelInfo* info) : Quantizer(api), epsilon_(number(api, info, "epsilon", 0)) {}

  Status* compute(KernelContext* context) const {
    const Call call(api_, context);
    const Value *in = call.input(0), *scales = call.input(1), *before = call.input(2), *weights = call.input(3);
    const auto shape = call.shape(in);
    if (!fits(shape, call.shape(scales)) || call.shape(before) != shape || call.size(weights) != shape.back())
      return failed(api_, "product and residual need the same shape, every row a scale, and every column a weight");
    const int64_t columns = shape.back();
    const float *product = call.data<float>(in), *scale = call.data<float>(scales);
    const float *residual = call.data<float>(before), *weight = call.data<float>(weights);
    uint8_t* integers = call.output<uint8_t>(0, shape);
    float* most = call.output<float>(1, with_last(shape, 1));
    float *sums = call.output<float>(2, shape), *rows = call.output<float>(3, shape);
    each_row(call, call.size(scales), 2 * columns, [&](int64_t row) {
      const int64_t at = row * columns;
      kernels().quantize_normed_row(product + at, scale[row], residual + at, weight, epsilon_, columns,
                                    rows == nullptr ? row_memory(columns) : rows + at, sums + at, integers + at,
                                    most + row);
    });
    return nullptr;
  }

 private:
  float epsilon_;
};

// y with up (down x) added, in each row that has an adapter. The factors of all adapters lie in one matrix, a row each; the
// parts say for each linear whose results are columns of y: its number, where down and up begin, its columns in y, and
// whether a bias lies behind up. With a scale y is a product of integers that is to be multiplied with it.
template <class Number>
class LoraAdd {
 public:
  static constexpr size_t kInputs = 7, kOutputs = 1;
  static constexpr bool kIsHalf = std::is_same<Number, Bfloat16>::value;
  static constexpr const char* kName = kIsHalf ? "LoraAddBfloat16" : "LoraAdd";
  static ort::Type input_type(size_t i) {
    if (i == 3 && kIsHalf) return ort::kBfloat16;
    return i == 2 || i == 4 || i == 5 ? ort::kInt64 : ort::kFloat;
  }
  static ort::Type output_type(size_t) { return ort::kFloat; }
  static bool optional(size_t i) { return i == 6; }
  static bool optional_output(size_t) { return false; }

  LoraAdd(const Api* api, const KernelInfo* info) : api_(api), max_rank_(integer(api, info, "max_rank", 0)) {}

  Status* compute(KernelContext* context) const {
    const Call call(api_, context);
    const Value* in[kInputs];
    for (size_t i = 0; i < kInputs; i++) in[i] = call.input(i);
    const auto shape = call.shape(in[0]);
    const float* y = call.data<float>(in[0]);
    float* output = call.output<float>(0, shape);
    const int64_t columns = shape.back(), rows = call.size(in[2]);
    if (output != y) std::memcpy(output, y, rows * columns * sizeof(float));
    const int64_t* adapters = call.data<int64_t>(in[2]);
    if (std::all_of(adapters, adapters + rows, [](int64_t slot) { return slot == 0; })) return nullptr;
    const auto inputs = call.shape(in[1]), pool = call.shape(in[3]), ranks = call.shape(in[4]), parts = call.shape(in[5]);
    const int64_t *rank = call.data<int64_t>(in[4]), *part = call.data<int64_t>(in[5]);
    if (columns * rows != call.size(in[0]) || call.size(in[1]) != rows * inputs.back() || pool.size() != 2 ||
        ranks.size() != 2 || ranks[0] != pool[0] || parts.size() != 2 || parts[1] != kFields ||
        (in[6] != nullptr && call.size(in[6]) != rows))
      return failed(api_, "rows, adapters and their factors do not fit together");
    for (int64_t row = 0; row < rows; row++)
      if (adapters[row] < 0 || adapters[row] > pool[0])
        return failed(api_, "there are adapters 1 to " + std::to_string(pool[0]) + ", not " + std::to_string(adapters[row]));
    std::vector<Task> tasks;
    for (int64_t i = 0; i < parts[0]; i++)
      for (int64_t first = 0, last; first < rows; first = last) {
        for (last = first + 1; last < rows && last - first < kPiece && adapters[last] == adapters[first];) last++;
        if (adapters[first] == 0) continue;
        const int64_t* p = part + i * kFields;
        const int64_t slot = adapters[first] - 1, own = rank[slot * ranks[1] + p[0]];
        const Number* factors = call.data<Number>(in[3]) + slot * pool[1];
        if (own < 0 || own > max_rank_) return failed(api_, "an adapter's rank is beyond the engine's");
        if (own == 0) continue;
        const Number *down = factors + p[1], *up = factors + p[2], *bias = p[5] ? up + max_rank_ * p[4] : nullptr;
        tasks.push_back({{down, up, bias, down, static_cast<int>(own), inputs.back(), p[4], columns},
                         first, static_cast<int>(last - first), p[3]});
      }
    const float *x = call.data<float>(in[1]), *scale = in[6] == nullptr ? nullptr : call.data<float>(in[6]);
    for (size_t i = 1; i < tasks.size(); i++) tasks[i - 1].part.next = tasks[i].part.down;
    const auto one = [&](size_t i) {
      const Task& t = tasks[i];
      kernels().add(t.part, x + t.first * inputs.back(), scale == nullptr ? nullptr : scale + t.first, t.rows,
                    row_memory(kPiece * max_rank_), output + t.first * columns + t.column);
    };
    if (tasks.size() == 1) {
      one(0);
    } else if (!tasks.empty()) {
      call.parallel(tasks.size(), one);
    }
    return nullptr;
  }

 private:
  // Neighboring rows that have one adapter, and one linear.
  struct Task {
    LoraPart<Number> part;
    int64_t first;
    int rows;
    int64_t column;
  };

  static constexpr int64_t kFields = 6, kPiece = 12;

  const Api* api_;
  int64_t max_rank_;
};

// The table of functions by which ONNX Runtime knows a kernel.
template <class Kernel>
CustomOp operator_of() {
  CustomOp op{};
  op.version = ort::kApiVersion;
  op.GetName = [](const CustomOp*) { return Kernel::kName; };
  op.GetExecutionProviderType = [](const CustomOp*) -> const char* { return nullptr; };
  op.GetInputType = [](const CustomOp*, size_t i) { return Kernel::input_type(i); };
  op.GetInputTypeCount = [](const CustomOp*) { return size_t(Kernel::kInputs); };
  op.GetOutputType = [](const CustomOp*, size_t i) { return Kernel::output_type(i); };
  op.GetOutputTypeCount = [](const CustomOp*) { return size_t(Kernel::kOutputs); };
  op.GetInputCharacteristic = [](const CustomOp*, size_t i) { return Kernel::optional(i) ? ort::kOptional : ort::kRequired; };
  op.GetOutputCharacteristic = [](const CustomOp*, size_t i) {
    return Kernel::optional_output(i) ? ort::kOptional : ort::kRequired;
  };
  op.GetInputMemoryType = [](const CustomOp*, size_t) { return 0; };
  op.GetVariadicInputMinArity = op.GetVariadicOutputMinArity = [](const CustomOp*) { return 1; };
  op.GetVariadicInputHomogeneity = op.GetVariadicOutputHomogeneity = [](const CustomOp*) { return 1; };
  op.CreateKernelV2 = [](const CustomOp*, const Api* api, const KernelInfo* info, void** kernel) -> Status* {
    *kernel = new Kernel(api, info);
    return nullptr;
  };
  op.KernelComputeV2 = [](void* kernel, KernelContext* context) -> Status* {
    return static_cast<const Kernel*>(kernel)->compute(context);
  };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.GetStartVersion = [](const CustomOp*) { return 1; };
  op.GetEndVersion = [](const CustomOp*) { return std::numeric_limits<int>::max(); };
  return op;
}

// The same of a kernel whose output may lie in its first input's memory.
template <class Kernel>
CustomOp in_place_operator_of() {
  CustomOp op = operator_of<Kernel>();
  op.GetMayInplace = [](int** inputs, int** outputs) {
    *inputs = new int[1]{0}, *outputs = new int[1]{0};
    return size_t(1);
  };
  op.ReleaseMayInplace = [](int* inputs, int* outputs) { delete[] inputs, delete[] outputs; };
  return op;
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) ort::Status* RegisterCustomOps(ort::SessionOptions* options, const ort::ApiBase* base) {
  static const CustomOp ops[] = {operator_of<CachedAttention<false>>(), operator_of<CachedAttention<true>>(),
                                 operator_of<QuantizeRows>(), operator_of<QuantizeGatedRows>(),
                                 operator_of<QuantizeNormedRows>(), in_place_operator_of<LoraAdd<float>>(),
                                 in_place_operator_of<LoraAdd<Bfloat16>>()};
  const Api* api = base->GetApi(ort::kApiVersion);
  // It lives as long as the process: sessions keep pointers to it.
  ort::Domain* domain = nullptr;
  Status* status = ort::call<Status*>(api, ort::kCreateCustomOpDomain, "llmopt.kernels", &domain);
  for (const CustomOp& op : ops)
    if (status == nullptr) status = ort::call<Status*>(api, ort::kCustomOpDomainAdd, domain, &op);
  if (status == nullptr) status = ort::call<Status*>(api, ort::kAddCustomOpDomain, options, domain);
  return status;
}

// Which set of instructions the kernels use here: avx512, avx2 or plain.
__attribute__((visibility("default"))) const char* llmopt_instructions() { return kernels().name; }

// For the sampler, outside of ONNX Runtime: rows of logits become weights (sampling_body.h). Sums and largest have a number
// for every kGroup columns of a row, the last of which may be fewer.
__attribute__((visibility("default"))) void llmopt_weigh_logits(const float* logits, int64_t rows, int64_t columns,
                                                                const float* temperatures, float* weights, double* sums,
                                                                float* largest) {
  const int64_t groups = (columns + kGroup - 1) / kGroup;
  for (int64_t row = 0; row < rows; row++)
    kernels().weigh_logits(logits + row * columns, columns, temperatures[row], weights + row * columns,
                           sums + row * groups, largest + row * groups);
}
}
