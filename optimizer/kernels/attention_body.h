// Attention of one key/value head over one sequence's cache. Included once for each set of instructions, behind vector.h.
//
// Every row, that is one query head of one token, is computed from that row and the keys and values it sees by the same
// operations in the same order, whatever other rows are beside it: blocks of kBlock keys begin at multiples of kBlock in
// the cache, sums run over a block's keys one after the other, and what a row does not see counts as zero. So a token's
// result has the same bits alone, in any chunk of a prompt and in any batch.

struct Scratch {
  float *keys, *values, *queries, *scores, *sums;  // [columns][kBlock], [kBlock][columns], [rows][columns|kBlock|columns]
  float *most, *total;                             // [rows]
};

// c[rows][width] += a[rows][depth] b[depth][width]; a block of at most kRows x kColumns vectors at a time.
template <int rows, int columns, class Number>
static inline void multiply_block(const float* a, size_t lda, const Number* b, size_t ldb, float* c, size_t ldc, int depth) {
  Vector sums[rows][columns];
  for (int i = 0; i < rows; i++)
    for (int j = 0; j < columns; j++) sums[i][j] = load(c + i * ldc + 16 * j);
  for (int k = 0; k < depth; k++) {
    Vector line[columns];
    for (int j = 0; j < columns; j++) line[j] = load(b + k * ldb + 16 * j);
    for (int i = 0; i < rows; i++) {
      const Vector factor = all(a[i * lda + k]);
      for (int j = 0; j < columns; j++) sums[i][j] = fma(factor, line[j], sums[i][j]);
    }
  }
  for (int i = 0; i < rows; i++)
    for (int j = 0; j < columns; j++) store(c + i * ldc + 16 * j, sums[i][j]);
}

template <int rows, class Number>
static inline void multiply_rows(const float* a, size_t lda, const Number* b, size_t ldb, float* c, size_t ldc, int depth,
                                 int width) {
  int first = 0;
  for (; first + 16 * kColumns <= width; first += 16 * kColumns)
    multiply_block<rows, kColumns>(a, lda, b + first, ldb, c + first, ldc, depth);
  for (; first < width; first += 16) multiply_block<rows, 1>(a, lda, b + first, ldb, c + first, ldc, depth);
}

template <class Number>
static void multiply(const float* a, size_t lda, const Number* b, size_t ldb, float* c, size_t ldc, int rows, int depth,
                     int width) {
  int i = 0;
  for (; i + kRows <= rows; i += kRows)
    multiply_rows<kRows>(a + i * lda, lda, b, ldb, c + i * ldc, ldc, depth, width);
  if (kRows > 3 && i + 3 <= rows) {
    multiply_rows<3>(a + i * lda, lda, b, ldb, c + i * ldc, ldc, depth, width);
    i += 3;
  }
  for (; i < rows; i++) multiply_rows<1>(a + i * lda, lda, b, ldb, c + i * ldc, ldc, depth, width);
}

// keys[column][key] of count keys, the others zero.
template <class Cache>
static void read_keys(const Cache* cache, int count, int columns, float* keys) {
  for (int key = 0; key < kBlock; key += 16) {
    for (int first = 0; first < columns; first += 16) {
      Vector lines[16];
      for (int i = 0; i < 16; i++)
        lines[i] = key + i < count ? line_of(cache + size_t(key + i) * columns, first, columns) : all(0);
      transpose(lines, keys + size_t(first) * kBlock + key, kBlock);
    }
  }
}

#if LLMOPT_LANES == 16
// Bytes are turned four at a time, before they become floats: that takes a quarter of the shuffles.
static void read_keys(const int8_t* cache, int count, int columns, float* keys) {
  if (columns % 64 != 0) return read_keys<int8_t>(cache, count, columns, keys);
  for (int key = 0; key < kBlock; key += 16) {
    for (int first = 0; first < columns; first += 64) {
      Vector lines[16];
      for (int i = 0; i < 16; i++)
        lines[i].v = key + i < count ? _mm512_castsi512_ps(_mm512_loadu_si512(cache + size_t(key + i) * columns + first))
                                     : _mm512_setzero_ps();
      alignas(64) float turned[16 * 16];
      transpose(lines, turned, 16);
      float* to = keys + size_t(first) * kBlock + key;
      for (int i = 0; i < 16; i++, to += 4 * kBlock) {
        const __m512i four = _mm512_castps_si512(load(turned + 16 * i).v);
        store(to, {_mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(four, 24), 24))});
        store(to + kBlock, {_mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(four, 16), 24))});
        store(to + 2 * kBlock, {_mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(four, 8), 24))});
        store(to + 3 * kBlock, {_mm512_cvtepi32_ps(_mm512_srai_epi32(four, 24))});
      }
    }
  }
}
#endif

template <class Cache>
static void read_values(const Cache* cache, int count, int columns, int width, float* values) {
  for (int key = 0; key < count; key++)
    for (int first = 0; first < columns; first += 16)
      store(values + size_t(key) * width + first, line_of(cache + size_t(key) * columns, first, columns));
}

// x rotated by the angles of a position, the columns behind them as they are.
static void rotate(const float* x, const float* cosines, const float* sines, int half, int columns, float* y) {
  for (int i = 0; i < half; i++) {
    const float a = x[i], b = x[i + half];
    y[i] = a * cosines[i] - b * sines[i];
    y[i + half] = b * cosines[i] + a * sines[i];
  }
  for (int i = 2 * half; i < columns; i++) y[i] = x[i];
}

static inline void write(float* to, const float* x, const float*, int columns) { memcpy(to, x, columns * sizeof(float)); }
static inline void write(int8_t* to, const float* x, const float* scale, int columns) {
  for (int i = 0; i < columns; i++) {
    const float whole = rintf(x[i] / scale[i]);
    to[i] = static_cast<int8_t>(whole >= 127 ? 127 : whole > -128 ? whole : -128);
  }
}

// Puts the keys, rotated, and values of new tokens into the cache.
template <class Cache>
static void append(const Problem& p, int64_t sequence, int64_t head, int64_t first, int64_t last) {
  const int columns = p.columns;
  const size_t slot = (sequence * p.kv_heads + head) * p.capacity;
  const bool scaled = p.key_scale != nullptr;
  const float* key_scale = scaled ? p.key_scale + head * columns : nullptr;
  const float* value_scale = scaled ? p.value_scale + head * columns : nullptr;
  std::vector<float> rotated(columns);
  for (int64_t token = first; token < last; token++) {
    const int64_t position = p.past(sequence) + token;
    const size_t place = (slot + position) * columns;
    const float* key = p.key + (sequence * p.tokens + token) * p.key_stride + head * columns;
    const float* value = p.value + (sequence * p.tokens + token) * p.key_stride + head * columns;
    if (p.half > 0) {
      rotate(key, p.cosines + position * p.half, p.sines + position * p.half, p.half, columns, rotated.data());
      key = rotated.data();
    }
    write(static_cast<Cache*>(p.keys) + place, key, key_scale, columns);
    write(static_cast<Cache*>(p.values) + place, value, value_scale, columns);
  }
}

static void read_queries(const Problem& p, int64_t sequence, int64_t head, int64_t first, int tokens, int width,
                         float* queries) {
  const int columns = p.columns, group = p.group;
  for (int row = 0; row < tokens * group; row++) {
    const int64_t token = first + row / group, position = p.past(sequence) + token;
    const float* x = p.query + (sequence * p.tokens + token) * p.query_stride + (head * group + row % group) * columns;
    float* y = queries + size_t(row) * width;
    rotate(x, p.cosines + position * p.half, p.sines + position * p.half, p.half, columns, y);
    for (int i = 0; i < columns; i++) y[i] *= p.scale;
    if (p.key_scale != nullptr)
      for (int i = 0; i < columns; i++) y[i] *= p.key_scale[head * columns + i];
    for (int i = columns; i < width; i++) y[i] = 0;
  }
}

// The soft cap's s -> cap * tanh(s / cap).
static inline Vector capped(Vector s, float cap) {
  const Vector x = s / all(cap), e = exponential(all(-2.0f) * magnitude(x));
  const Vector y = all(cap) * ((all(1.0f) - e) / (all(1.0f) + e));
  alignas(64) float lanes[16], signs[16];
  store(lanes, y), store(signs, s);
  for (int i = 0; i < 16; i++) lanes[i] = copysignf(lanes[i], signs[i]);
  return load(lanes);
}

// A row's scores of one block become weights; what was summed before is scaled to the new largest score.
static void weigh(float* scores, int from, int to, float cap, float* most, float* total, float* sums, int width) {
  if (from >= to) {
    for (int i = 0; i < kBlock; i += 16) store(scores + i, all(0));
    return;
  }
  constexpr int count = kBlock / 16;
  Vector s[count], top = all(*most);
  for (int i = 0; i < count; i++) {
    s[i] = load(scores + 16 * i);
    if (cap > 0) s[i] = capped(s[i], cap);
    if (from > 16 * i || to < 16 * i + 16) s[i] = between(s[i], from - 16 * i, to - 16 * i, -INFINITY);
    top = max(top, s[i]);
  }
  const float found = largest(top);
  Vector added = all(0);
  for (int i = 0; i < count; i++) {
    s[i] = exponential(s[i] - all(found));
    if (from > 16 * i || to < 16 * i + 16) s[i] = between(s[i], from - 16 * i, to - 16 * i, 0);
    store(scores + 16 * i, s[i]);
    added = added + s[i];
  }
  if (*most != found) {
    alignas(64) float lanes[16];
    store(lanes, exponential(all(*most - found)));
    *total *= lanes[0];
    for (int i = 0; i < width; i += 16) store(sums + i, load(sums + i) * all(lanes[0]));
    *most = found;
  }
  *total += sum(added);
}

// The outputs of one head's queries of some tokens.
template <class Cache>
static void attend(const Problem& p, int64_t sequence, int64_t head, int64_t first, int tokens, const Scratch& scratch) {
  const int columns = p.columns, width = p.width(), rows = tokens * p.group;
  const int64_t past = p.past(sequence), end = past + first + tokens;
  const size_t slot = (sequence * p.kv_heads + head) * size_t(p.capacity) * columns;
  const Cache *keys = static_cast<const Cache*>(p.keys) + slot, *values = static_cast<const Cache*>(p.values) + slot;
  read_queries(p, sequence, head, first, tokens, width, scratch.queries);
  for (int i = 0; i < rows; i++) scratch.most[i] = -INFINITY, scratch.total[i] = 0;
  memset(scratch.sums, 0, size_t(rows) * width * sizeof(float));
  const int64_t start = p.window > 0 ? std::max<int64_t>(0, past + first - p.window + 1) : 0;
  for (int64_t block = start / kBlock * kBlock; block < end; block += kBlock) {
    const int count = static_cast<int>(std::min<int64_t>(kBlock, end - block));
    read_keys(keys + block * columns, count, columns, scratch.keys);
    memset(scratch.scores, 0, size_t(rows) * kBlock * sizeof(float));
    multiply(scratch.queries, width, scratch.keys, kBlock, scratch.scores, kBlock, rows, columns, kBlock);
    for (int row = 0; row < rows; row++) {
      const int64_t position = past + first + row / p.group;
      const int64_t from = p.window > 0 ? position - p.window + 1 - block : 0;
      weigh(scratch.scores + size_t(row) * kBlock, static_cast<int>(std::max<int64_t>(from, 0)),
            static_cast<int>(std::min<int64_t>(position + 1 - block, kBlock)), p.softcap, scratch.most + row,
            scratch.total + row, scratch.sums + size_t(row) * width, width);
    }
    read_values(values + block * columns, count, columns, width, scratch.values);
    multiply(scratch.scores, kBlock, scratch.values, width, scratch.sums, width, rows, count, width);
  }
  for (int row = 0; row < rows; row++) {
    const int64_t token = first + row / p.group;
    float* y = p.output + ((sequence * p.tokens + token) * p.kv_heads + head) * p.group * columns;
    y += size_t(row % p.group) * columns;
    const float* x = scratch.sums + size_t(row) * width;
    for (int i = 0; i < columns; i++) {
      const float value = x[i] / scratch.total[row];
      y[i] = p.value_scale != nullptr ? value * p.value_scale[head * columns + i] : value;
    }
  }
}
