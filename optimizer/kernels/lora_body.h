// Low-rank adapters: up (down x) of some rows that have one adapter, added to y. Included behind attention_body.h.
//
// Each row's sums run over its own columns in one order, however many rows are beside it.

constexpr int kLoraTile = 4;  // rows, and rows of down, whose products stay in registers

// inner[row][r] = x[row] . down[r].
template <int rows, int ranks, class Number>
static inline void dots(const float* x, int64_t columns, const Number* down, float* inner, int rank) {
  Vector sums[rows][ranks];
  for (int i = 0; i < rows; i++)
    for (int j = 0; j < ranks; j++) sums[i][j] = all(0);
  for (int64_t first = 0; first < columns; first += 16) {
    Vector lines[ranks];
    for (int j = 0; j < ranks; j++) lines[j] = line_of(down + j * columns, first, columns);
    for (int i = 0; i < rows; i++) {
      const Vector line = line_of(x + i * columns, first, columns);
      for (int j = 0; j < ranks; j++) sums[i][j] = fma(line, lines[j], sums[i][j]);
    }
  }
  for (int i = 0; i < rows; i++)
    for (int j = 0; j < ranks; j++) inner[i * rank + j] = sum(sums[i][j]);
}

template <int rows, class Number>
static inline void dots_of_rows(const float* x, int64_t columns, const Number* down, int rank, float* inner) {
  int r = 0;
  for (; r + kLoraTile <= rank; r += kLoraTile) dots<rows, kLoraTile>(x, columns, down + r * columns, inner + r, rank);
  for (; r < rank; r++) dots<rows, 1>(x, columns, down + r * columns, inner + r, rank);
}

// The last columns of up, fewer than a vector: padded, so that they are summed as all others.
template <class Number>
static void add_tail(const LoraPart<Number>& p, int first, int rows, const float* inner, float* y) {
  const int count = static_cast<int>(p.columns) - first;
  std::vector<float> up(size_t(p.rank) * 16), sums(size_t(rows) * 16);
  for (int r = 0; r < p.rank; r++) std::copy_n(p.up + r * p.columns + first, count, &up[size_t(r) * 16]);
  for (int i = 0; i < rows; i++) memcpy(&sums[size_t(i) * 16], y + i * p.stride + first, count * sizeof(float));
  multiply(inner, p.rank, up.data(), 16, sums.data(), 16, rows, p.rank, 16);
  for (int i = 0; i < rows; i++) memcpy(y + i * p.stride + first, &sums[size_t(i) * 16], count * sizeof(float));
}

// y += up (down x) + bias of neighboring rows; with scale y += (up (down x) + bias) / scale. inner has room for rows * rank.
template <class Number>
static void add_lora(const LoraPart<Number>& p, const float* x, const float* scale, int rows, float* inner, float* y) {
  int i = 0;
  for (; i + kLoraTile <= rows; i += kLoraTile)
    dots_of_rows<kLoraTile>(x + i * p.inputs, p.inputs, p.down, p.rank, inner + i * p.rank);
  for (; i < rows; i++) dots_of_rows<1>(x + i * p.inputs, p.inputs, p.down, p.rank, inner + i * p.rank);
  // A row whose scale is 0 has zeros only, and what is added to it is 0 as well.
  if (scale != nullptr)
    for (i = 0; i < rows; i++)
      for (int r = 0; r < p.rank; r++) inner[i * p.rank + r] = scale[i] > 0 ? inner[i * p.rank + r] / scale[i] : 0;
  if (p.bias != nullptr)
    for (i = 0; i < rows; i++)
      for (int64_t j = 0; j < p.columns; j++)
        y[i * p.stride + j] += scale == nullptr ? float(p.bias[j]) : scale[i] > 0 ? float(p.bias[j]) / scale[i] : 0;
  const int whole = static_cast<int>(p.columns / 16 * 16);
  multiply(inner, p.rank, p.up, p.columns, y, p.stride, rows, p.rank, whole);
  if (whole < p.columns) add_tail(p, whole, rows, inner, y);
}
