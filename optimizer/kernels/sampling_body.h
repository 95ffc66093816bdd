// The weights of a row of logits at a temperature, for the sampler. Included behind quantize_body.h.

// weights[i] = exp((logits[i] - the largest) / temperature), 0 where that is below exp(-87); of every kGroup of them the sum
// and the largest.
static void weigh_logits(const float* logits, int64_t columns, float temperature, float* weights, double* sums,
                         float* largest_of) {
  Vector top = line_of(logits, int64_t(0), std::min<int64_t>(columns, 16));
  if (columns < 16) top = between(top, 0, static_cast<int>(columns), logits[0]);
  int64_t first = 16;
  for (; first + 16 <= columns; first += 16) top = max(top, load(logits + first));
  float most = largest(top);
  for (; first < columns; first++) most = std::max(most, logits[first]);
  const Vector start = all(most), scale = all(1.0f / temperature);
  for (int64_t group = 0; group < columns; group += kGroup) {
    Vector added = all(0), highest = all(0);
    for (int64_t i = group; i < std::min<int64_t>(columns, group + kGroup); i += 16) {
      const Vector x = (line_of(logits, i, columns) - start) * scale;
      Vector line = where_at_least(x, -87.0f, exponential(x));
      if (i + 16 > columns) line = between(line, 0, static_cast<int>(columns - i), 0);
      keep(weights, i, columns, line);
      added = added + line;
      highest = max(highest, line);
    }
    sums[group / kGroup] = sum(added);
    largest_of[group / kGroup] = largest(highest);
  }
}
