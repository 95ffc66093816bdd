// Low-rank adapters: up (down x) of some rows that have one adapter, added to y. Included behind attention_body.h.
//
// Each row's sums run over its own columns in one order, however many rows are beside it.

constexpr int kLoraTile = 4;  // rows, and rows of down, whose products stay in registers

// Asks for count numbers that are wanted soon. Factors lie in short rows far apart, each of which is read once a step: too
// little for the CPU to foresee.
template <class Number>
static inline void fetch(const Number* from, int count) {
  for (int i = 0; i < count; i += 64 / sizeof(Number)) __builtin_prefetch(from + i);
}

// inner[row][r] = x[row] . down[r]. Meanwhile as many numbers are fetched from next on.
template <int rows, int ranks, class Number>
static inline void dots(const float* x, int64_t columns, const Number* down, float* inner, int rank, const Number* next) {
  Vector sums[rows][ranks];
  for (int i = 0; i < rows; i++)
    for (int j = 0; j < ranks; j++) sums[i][j] = all(0);
  for (int64_t first = 0; first < columns; first += 16) {
    Vector lines[ranks];
    for (int j = 0; j < ranks; j++) lines[j] = line_of(down + j * columns, first, columns);
    fetch(next + ranks * first, ranks * 16);
    for (int i = 0; i < rows; i++) {
      const Vector line = line_of(x + i * columns, first, columns);
      for (int j = 0; j < ranks; j++) sums[i][j] = fma(line, lines[j], sums[i][j]);
    }
  }
  for (int i = 0; i < rows; i++)
    for (int j = 0; j < ranks; j++) inner[i * rank + j] = sum(sums[i][j]);
}

template <int rows, class Number>
static inline void dots_of_rows(const float* x, const LoraPart<Number>& p, float* inner) {
  for (int r = 0, last; r < p.rank; r = last) {
    last = r + kLoraTile <= p.rank ? r + kLoraTile : r + 1;
    const Number *down = p.down + r * p.inputs, *next = last < p.rank ? p.down + last * p.inputs : p.up;
    if (last == r + 1)
      dots<rows, 1>(x, p.inputs, down, inner + r, p.rank, next);
    else
      dots<rows, kLoraTile>(x, p.inputs, down, inner + r, p.rank, next);
  }
}

// y += inner . up[some ranks] of one row, in the order in which they lie.
template <int ranks, class Number>
static inline void add_ranks(const float* inner, const Number* up, int64_t columns, int whole, float* y, const Number* next) {
  Vector factors[ranks];
  for (int j = 0; j < ranks; j++) factors[j] = all(inner[j]);
  for (int first = 0; first < whole; first += 16) {
    Vector sums = load(y + first);
    for (int j = 0; j < ranks; j++) sums = fma(factors[j], load(up + j * columns + first), sums);
    fetch(next + ranks * first, ranks * 16);
    store(y + first, sums);
  }
}

// The same operations as multiply's, in the order of up: a row has no use for what lies in registers.
template <class Number>
static inline void add_row(const LoraPart<Number>& p, const float* inner, int whole, float* y) {
  for (int r = 0, last; r < p.rank; r = last) {
    last = r + kLoraTile <= p.rank ? r + kLoraTile : r + 1;
    const Number *up = p.up + r * p.columns, *behind = last < p.rank ? p.up + last * p.columns : p.next;
    if (last == r + 1)
      add_ranks<1>(inner + r, up, p.columns, whole, y, behind);
    else
      add_ranks<kLoraTile>(inner + r, up, p.columns, whole, y, behind);
  }
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
    dots_of_rows<kLoraTile>(x + i * p.inputs, p, inner + i * p.rank);
  for (; i < rows; i++) dots_of_rows<1>(x + i * p.inputs, p, inner + i * p.rank);
  // A row whose scale is 0 has zeros only, and what is added to it is 0 as well.
  if (scale != nullptr)
    for (i = 0; i < rows; i++)
      for (int r = 0; r < p.rank; r++) inner[i * p.rank + r] = scale[i] > 0 ? inner[i * p.rank + r] / scale[i] : 0;
  if (p.bias != nullptr)
    for (i = 0; i < rows; i++)
      for (int64_t j = 0; j < p.columns; j++)
        y[i * p.stride + j] += scale == nullptr ? float(p.bias[j]) : scale[i] > 0 ? float(p.bias[j]) / scale[i] : 0;
  const int whole = static_cast<int>(p.columns / 16 * 16);
  if (rows == 1)
    add_row(p, inner, whole, y);
  else
    multiply(inner, p.rank, p.up, p.columns, y, p.stride, rows, p.rank, whole);
  if (whole < p.columns) add_tail(p, whole, rows, inner, y);
}
