// Rows as integers around 128 and their largest magnitudes. The integers are those of the standard operators: x / most /
// (1 / 127), each quotient rounded to a float, then to the nearest integer, ties to even. A row with a number that is not
// finite gets NaN for its magnitude, which spoils everything that is made of it. Included behind vector.h.
//
// Whatever makes the row is computed on the way, while it is in the first-level cache. A row is handled in vectors of 16
// columns; what is behind its end counts as zero.

static inline void keep(float* x, int64_t first, int64_t columns, Vector line) {
  if (first + 16 <= columns) return store(x + first, line);
  float lanes[16];
  store(lanes, line);
  memcpy(x + first, lanes, (columns - first) * sizeof(float));
}

// The largest magnitude of the lines it was shown.
struct Largest {
  Vector found = all(0), spoilt = all(0);  // spoilt stays 0 unless something is not finite
  inline void see(Vector line) {
    found = max(found, magnitude(line));
    spoilt = fma(line, all(0), spoilt);
  }
  inline float value() const { return largest(found) + sum(spoilt); }
};

static void round_row(const float* x, int64_t columns, float most, uint8_t* integers) {
  const float step = 1.0f / 127.0f;
  const Vector middle = all(128.0f), steps = all(step), per_step = all(1.0f / step);
  const Vector whole_range = all(most), share = all(1.0f / most);
  for (int64_t first = 0; first < columns; first += 16) {
    const Vector ratio = divided(line_of(x, first, columns), whole_range, share);
    const Vector whole = rounded(divided(ratio, steps, per_step)) + middle;
    if (first + 16 <= columns) {
      store_bytes(integers + first, whole);
    } else {
      uint8_t bytes[16];
      store_bytes(bytes, whole);
      memcpy(integers + first, bytes, columns - first);
    }
  }
}

static void quantize_row(const float* x, int64_t columns, uint8_t* integers, float* most) {
  Largest seen;
  for (int64_t first = 0; first < columns; first += 16) seen.see(line_of(x, first, columns));
  *most = seen.value();
  round_row(x, columns, *most, integers);
}

// silu(x * scale) * (y * scale), where x is the first half of a product of integers and y the second.
static void quantize_gated_row(const float* product, float scale, int64_t columns, float* row, uint8_t* integers,
                               float* most) {
  Largest seen;
  const Vector factor = all(scale);
  for (int64_t first = 0; first < columns; first += 16) {
    const Vector gate = line_of(product, first, columns) * factor;
    const Vector up = line_of(product + columns, first, columns) * factor;
    const Vector line = gate / (all(1.0f) + exponential(all(0) - max(all(-87.0f), gate))) * up;
    seen.see(line);
    keep(row, first, columns, line);
  }
  *most = seen.value();
  round_row(row, columns, *most, integers);
}

// product * scale + residual is kept as sums; it is divided by its root mean square and multiplied by weight.
static void quantize_normed_row(const float* product, float scale, const float* residual, const float* weight,
                                float epsilon, int64_t columns, float* row, float* sums, uint8_t* integers, float* most) {
  const Vector factor = all(scale);
  Vector squares = all(0);
  for (int64_t first = 0; first < columns; first += 16) {
    const Vector line = line_of(product, first, columns) * factor + line_of(residual, first, columns);
    squares = fma(line, line, squares);
    keep(sums, first, columns, line);
  }
  const Vector inverse = all(1.0f / std::sqrt(sum(squares) / static_cast<float>(columns) + epsilon));
  Largest seen;
  for (int64_t first = 0; first < columns; first += 16) {
    const Vector line = line_of(sums, first, columns) * inverse * line_of(weight, first, columns);
    seen.see(line);
    keep(row, first, columns, line);
  }
  *most = seen.value();
  round_row(row, columns, *most, integers);
}
