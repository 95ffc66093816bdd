// Sixteen floats as AVX-512, AVX2 or plain C++ has them. Included once for each, inside a namespace of its own, where
// LLMOPT_LANES says which: 16, 8 or 1. No include guard for that reason.

#if LLMOPT_LANES == 16

struct Vector {
  __m512 v;
};
static inline Vector load(const float* from) { return {_mm512_loadu_ps(from)}; }
static inline Vector load(const int8_t* from) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))))};
}
static inline Vector load(const Bfloat16* from) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16))};
}
static inline void store(float* to, Vector x) { _mm512_storeu_ps(to, x.v); }
static inline Vector all(float x) { return {_mm512_set1_ps(x)}; }
static inline Vector operator+(Vector a, Vector b) { return {_mm512_add_ps(a.v, b.v)}; }
static inline Vector operator-(Vector a, Vector b) { return {_mm512_sub_ps(a.v, b.v)}; }
static inline Vector operator*(Vector a, Vector b) { return {_mm512_mul_ps(a.v, b.v)}; }
static inline Vector operator/(Vector a, Vector b) { return {_mm512_div_ps(a.v, b.v)}; }
static inline Vector fma(Vector a, Vector b, Vector c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// A NaN in b stays.
static inline Vector max(Vector a, Vector b) { return {_mm512_max_ps(a.v, b.v)}; }
static inline Vector magnitude(Vector x) { return {_mm512_abs_ps(x.v)}; }
static inline Vector rounded(Vector x) { return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT)}; }
// x times two to the power of the whole number n.
static inline Vector scaled(Vector x, Vector n) { return {_mm512_scalef_ps(x.v, n.v)}; }
static inline float sum(Vector x) { return _mm512_reduce_add_ps(x.v); }
static inline float largest(Vector x) { return _mm512_reduce_max_ps(x.v); }
// Lanes first..last-1 of x, the others filled.
static inline Vector between(Vector x, int first, int last, float filling) {
  const uint32_t below = last >= 16 ? 0xffffu : (1u << (last < 0 ? 0 : last)) - 1;
  const uint32_t skipped = first >= 16 ? 0xffffu : (1u << (first < 0 ? 0 : first)) - 1;
  return {_mm512_mask_mov_ps(_mm512_set1_ps(filling), static_cast<__mmask16>(below & ~skipped), x.v)};
}
static inline void transpose(const Vector (&in)[16], float* to, size_t stride) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps(in[i].v, in[i + 1].v);
    a[i + 1] = _mm512_unpackhi_ps(in[i].v, in[i + 1].v);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; j++) {
      const __m512d x = _mm512_castps_pd(a[i + j]), y = _mm512_castps_pd(a[i + j + 2]);
      b[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(x, y));
      b[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(x, y));
    }
  }
  // b[4 i + j] has rows 4 i .. 4 i + 3 of the columns j, 4 + j, 8 + j and 12 + j.
  for (int j = 0; j < 4; j++) {
    const __m512 low = _mm512_shuffle_f32x4(b[j], b[4 + j], 0x88), high = _mm512_shuffle_f32x4(b[j], b[4 + j], 0xdd);
    const __m512 low2 = _mm512_shuffle_f32x4(b[8 + j], b[12 + j], 0x88);
    const __m512 high2 = _mm512_shuffle_f32x4(b[8 + j], b[12 + j], 0xdd);
    _mm512_storeu_ps(to + (j + 0) * stride, _mm512_shuffle_f32x4(low, low2, 0x88));
    _mm512_storeu_ps(to + (j + 4) * stride, _mm512_shuffle_f32x4(high, high2, 0x88));
    _mm512_storeu_ps(to + (j + 8) * stride, _mm512_shuffle_f32x4(low, low2, 0xdd));
    _mm512_storeu_ps(to + (j + 12) * stride, _mm512_shuffle_f32x4(high, high2, 0xdd));
  }
}
// Integers of 0..255 nearest to x, ties to even; a NaN becomes 0.
static inline void store_bytes(uint8_t* to, Vector x) {
  const __m512i whole = _mm512_max_epi32(_mm512_cvtps_epi32(x.v), _mm512_setzero_si512());
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtusepi32_epi8(whole));
}

// What is kept, in the lanes in which x is at least bound, elsewhere 0.
static inline Vector where_at_least(Vector x, float bound, Vector kept) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, _mm512_set1_ps(bound), _CMP_GE_OQ), kept.v)};
}

constexpr int kRows = 6, kColumns = 4;  // of a block of a product that stays in registers, columns in vectors

#elif LLMOPT_LANES == 8

struct Vector {
  __m256 v, w;
};
static inline Vector load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
static inline Vector load(const int8_t* from) {
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(x)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(x, 8)))};
}
static inline __m256 load8(const Bfloat16* from) {
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}
static inline Vector load(const Bfloat16* from) { return {load8(from), load8(from + 8)}; }
static inline void store(float* to, Vector x) { _mm256_storeu_ps(to, x.v), _mm256_storeu_ps(to + 8, x.w); }
static inline Vector all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
static inline Vector operator+(Vector a, Vector b) { return {_mm256_add_ps(a.v, b.v), _mm256_add_ps(a.w, b.w)}; }
static inline Vector operator-(Vector a, Vector b) { return {_mm256_sub_ps(a.v, b.v), _mm256_sub_ps(a.w, b.w)}; }
static inline Vector operator*(Vector a, Vector b) { return {_mm256_mul_ps(a.v, b.v), _mm256_mul_ps(a.w, b.w)}; }
static inline Vector operator/(Vector a, Vector b) { return {_mm256_div_ps(a.v, b.v), _mm256_div_ps(a.w, b.w)}; }
static inline Vector fma(Vector a, Vector b, Vector c) {
  return {_mm256_fmadd_ps(a.v, b.v, c.v), _mm256_fmadd_ps(a.w, b.w, c.w)};
}
static inline Vector max(Vector a, Vector b) { return {_mm256_max_ps(a.v, b.v), _mm256_max_ps(a.w, b.w)}; }
static inline Vector magnitude(Vector x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, x.v), _mm256_andnot_ps(sign, x.w)};
}
static inline Vector rounded(Vector x) {
  return {_mm256_round_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
          _mm256_round_ps(x.w, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
static inline __m256 power(__m256 n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
static inline Vector scaled(Vector x, Vector n) {
  return {_mm256_mul_ps(x.v, power(n.v)), _mm256_mul_ps(x.w, power(n.w))};
}
static inline float sum(Vector x) {
  const __m256 both = _mm256_add_ps(x.v, x.w);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}
static inline float largest(Vector x) {
  const __m256 both = _mm256_max_ps(x.v, x.w);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
}
static inline Vector between(Vector x, int first, int last, float filling) {
  alignas(32) float lanes[16];
  store(lanes, x);
  for (int i = 0; i < 16; i++) lanes[i] = i >= first && i < last ? lanes[i] : filling;
  return load(lanes);
}
static inline void transpose(const Vector (&in)[16], float* to, size_t stride) {
  alignas(32) float rows[16][16];
  for (int i = 0; i < 16; i++) store(rows[i], in[i]);
  for (int j = 0; j < 16; j++)
    for (int i = 0; i < 16; i++) to[j * stride + i] = rows[i][j];
}
static inline void store_bytes(uint8_t* to, Vector x) {
  const __m256i low = _mm256_cvtps_epi32(x.v), high = _mm256_cvtps_epi32(x.w);
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);
  const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bytes);
}
static inline Vector where_at_least(Vector x, float bound, Vector kept) {
  const __m256 least = _mm256_set1_ps(bound);
  return {_mm256_and_ps(_mm256_cmp_ps(x.v, least, _CMP_GE_OQ), kept.v), _mm256_and_ps(_mm256_cmp_ps(x.w, least, _CMP_GE_OQ), kept.w)};
}

constexpr int kRows = 3, kColumns = 2;

#else

struct Vector {
  float v[16];
};
#define LLMOPT_EACH(expression) \
  Vector y;                     \
  for (int i = 0; i < 16; i++) y.v[i] = (expression); \
  return y;
static inline Vector load(const float* from) { LLMOPT_EACH(from[i]) }
static inline Vector load(const int8_t* from) { LLMOPT_EACH(from[i]) }
static inline Vector load(const Bfloat16* from) { LLMOPT_EACH(from[i]) }
static inline void store(float* to, Vector x) { memcpy(to, x.v, sizeof x.v); }
static inline Vector all(float x) { LLMOPT_EACH(x) }
static inline Vector operator+(Vector a, Vector b) { LLMOPT_EACH(a.v[i] + b.v[i]) }
static inline Vector operator-(Vector a, Vector b) { LLMOPT_EACH(a.v[i] - b.v[i]) }
static inline Vector operator*(Vector a, Vector b) { LLMOPT_EACH(a.v[i] * b.v[i]) }
static inline Vector operator/(Vector a, Vector b) { LLMOPT_EACH(a.v[i] / b.v[i]) }
static inline Vector fma(Vector a, Vector b, Vector c) { LLMOPT_EACH(a.v[i] * b.v[i] + c.v[i]) }
static inline Vector max(Vector a, Vector b) { LLMOPT_EACH(a.v[i] > b.v[i] ? a.v[i] : b.v[i]) }
static inline Vector magnitude(Vector x) { LLMOPT_EACH(fabsf(x.v[i])) }
static inline Vector rounded(Vector x) { LLMOPT_EACH(rintf(x.v[i])) }
static inline Vector scaled(Vector x, Vector n) { LLMOPT_EACH(ldexpf(x.v[i], static_cast<int>(n.v[i]))) }
static inline Vector between(Vector x, int first, int last, float filling) {
  LLMOPT_EACH(i >= first && i < last ? x.v[i] : filling)
}
static inline Vector where_at_least(Vector x, float bound, Vector kept) { LLMOPT_EACH(x.v[i] >= bound ? kept.v[i] : 0) }
#undef LLMOPT_EACH
static inline float sum(Vector x) {
  float total = 0;
  for (float each : x.v) total += each;
  return total;
}
static inline float largest(Vector x) {
  float found = x.v[0];
  for (float each : x.v) found = found > each ? found : each;
  return found;
}
static inline void transpose(const Vector (&in)[16], float* to, size_t stride) {
  for (int j = 0; j < 16; j++)
    for (int i = 0; i < 16; i++) to[j * stride + i] = in[i].v[j];
}
static inline void store_bytes(uint8_t* to, Vector x) {
  for (int i = 0; i < 16; i++) {
    const float whole = rintf(x.v[i]);
    to[i] = whole >= 255 ? 255 : whole > 0 ? static_cast<uint8_t>(whole) : 0;
  }
}

constexpr int kRows = 2, kColumns = 2;

#endif

// e to the power of x, at most 87: Cephes' polynomial behind a reduction by ln 2. Off by 2e-7 of the result at most; exactly 1 for 0;
// 1e-38 for everything below -87; a NaN stays.
static inline Vector exponential(Vector x) {
  x = max(all(-87.0f), x);
  const Vector n = rounded(x * all(1.44269504f));
  const Vector r = fma(n, all(2.12194440e-4f), fma(n, all(-0.693359375f), x));
  Vector p = fma(all(1.9875691500e-4f), r, all(1.3981999507e-3f));
  p = fma(p, r, all(8.3334519073e-3f));
  p = fma(p, r, all(4.1665795894e-2f));
  p = fma(p, r, all(1.6666665459e-1f));
  p = fma(p, r, all(5.0000001201e-1f));
  return scaled(fma(p * r, r, r + all(1.0f)), n);
}

// x / divisor, correctly rounded as a division is, from the correctly rounded 1 / divisor (Markstein 1990): a division
// takes five times as long.
static inline Vector divided(Vector x, Vector divisor, Vector inverse) {
#if LLMOPT_LANES == 1
  return x / divisor;
#else
  const Vector nearly = x * inverse;
  return fma(fma(all(0) - nearly, divisor, x), inverse, nearly);
#endif
}

// Sixteen columns of a row from column first on; beyond the row's end zeros.
template <class Number, class Index>
static inline Vector line_of(const Number* row, Index first, Index columns) {
  if (first + 16 <= columns) return load(row + first);
  float lanes[16] = {};
  for (Index i = first; i < columns; i++) lanes[i - first] = static_cast<float>(row[i]);
  return load(lanes);
}
