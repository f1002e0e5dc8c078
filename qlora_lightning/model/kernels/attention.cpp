// Causal attention within each of many samples of a stream, forward and backward.
//
// A thread takes a sample and a key head: its keys and values are packed once and stay in the cache, a strip of
// queries meets the keys up to its last row, and scores and probabilities never leave the first cache. Backward makes
// them again. Products are summed up in float32. What is computed is said in ../layers/sample_attention.py.

#include <algorithm>

#include "vectors.h"

namespace {

constexpr int64_t TILE = 64;        // queries whose gradients of keys and values are one product
constexpr int64_t MOST_WIDE = 256;  // numbers of a head
constexpr int64_t ALIGNED = 16;     // keys are filled up to a multiple of it

// The left factor of a product: word (row, depth) stands at row * by_row + depth * by_depth.
struct Left {
    const uint32_t *words;
    int64_t by_row, by_depth;
};

template <class T, int64_t COUNT>
inline void multiply_block(Left left, const uint32_t *right, int64_t by_depth, int64_t depth, float factor, float *to,
                           int64_t by_row, bool add) {
    Floats sums[ROWS][COUNT] = {};
    for (int64_t k = 0; k < depth; k++) {
        Words part[COUNT];
        for (int64_t i = 0; i < COUNT; i++) std::memcpy(&part[i], right + k * by_depth + i * LANES, sizeof(Words));
        for (int64_t row = 0; row < ROWS; row++) {
            const uint32_t word = left.words[row * left.by_row + k * left.by_depth];
            for (int64_t i = 0; i < COUNT; i++) sums[row][i] = multiply_add<T>(word, part[i], sums[row][i]);
        }
    }
    for (int64_t row = 0; row < ROWS; row++)
        for (int64_t i = 0; i < COUNT; i++) {
            float *place = to + row * by_row + i * LANES;
            store(add ? load(place) + sums[row][i] * factor : sums[row][i] * factor, place);
        }
}

// to = factor * left * right, or to += that; right is (depth, columns) in words, columns a multiple of ALIGNED.
template <class T>
void multiply(Left left, int64_t rows, const uint32_t *right, int64_t by_depth, int64_t depth, int64_t columns,
              float factor, float *to, int64_t by_row, bool add = false) {
    for (int64_t row = 0; row < rows; row += ROWS) {
        const Left strip{left.words + row * left.by_row, left.by_row, left.by_depth};
        float *place = to + row * by_row;
        int64_t column = 0;
        for (; column + VECTORS * LANES <= columns; column += VECTORS * LANES)
            multiply_block<T, VECTORS>(strip, right + column, by_depth, depth, factor, place + column, by_row,
                                       add);
        for (; column < columns; column += LANES)
            multiply_block<T, 1>(strip, right + column, by_depth, depth, factor, place + column, by_row,
                                       add);
    }
}

// Where the tokens of samples are: token t of sample i at places[bounds[i] + t]; its own are those from own[i] on.
struct Samples {
    const int64_t *bounds, *own, *places;
    int64_t count;
};

struct Shape {
    int64_t heads, kv_heads, width;
};

// The states of one head of a sample's tokens.
template <class T>
struct Head {
    const T *states;
    const int64_t *places;
    int64_t by_token, length, width;

    const T *row(int64_t token) const { return states + places[token] * by_token; }

    // (width / PAIR, filled): words along the width, a column for each token
    void pack_columns(uint32_t *to, int64_t filled) const {
        static const std::vector<T> nothing(MOST_WIDE);
        for (int64_t start = 0; start < filled; start += ALIGNED) {
            for (int64_t k = 0; k < width / PAIR<T>; k += LANES)
                for (int64_t part = start; part < start + ALIGNED; part += LANES) {
                    const int64_t count = std::min(LANES, width / PAIR<T> - k);
                    Words words[LANES] = {};
                    for (int64_t i = 0; i < LANES; i++) {
                        const T *from = part + i < length ? row(part + i) : nothing.data();
                        std::memcpy(&words[i], from + k * PAIR<T>, count * sizeof(uint32_t));
                    }
                    transpose(words);
                    for (int64_t i = 0; i < count; i++)
                        std::memcpy(to + (k + i) * filled + part, &words[i], sizeof(Words));
                }
        }
    }

    // (filled / PAIR, width): words along the tokens
    void pack_rows(uint32_t *to, int64_t first, int64_t filled) const {
        static const std::vector<T> nothing(MOST_WIDE);
        for (int64_t token = 0; token < filled; token += PAIR<T>) {
            const int64_t at = first + token;
            const T *lower = at < length ? row(at) : nothing.data();
            const T *upper = at + PAIR<T> - 1 < length ? row(at + PAIR<T> - 1) : nothing.data();
            pack(lower, upper, to + token / PAIR<T> * width, width);
        }
    }

    // A strip of rows as the left factor; a strip that is not full is copied.
    Left strip(int64_t token, int64_t rows, uint32_t *copy) const {
        const int64_t words = width / PAIR<T>;
        if (rows == ROWS) return {reinterpret_cast<const uint32_t *>(row(token)), by_token / PAIR<T>, 1};
        std::memset(copy, 0, ROWS * words * sizeof(uint32_t));
        for (int64_t i = 0; i < rows; i++) std::memcpy(copy + i * words, row(token + i), words * sizeof(uint32_t));
        return {copy, words, 1};
    }
};

template <class T>
Head<T> head_of(const T *states, int64_t heads, int64_t head, Samples samples, int64_t sample, int64_t width) {
    const int64_t start = samples.bounds[sample], length = samples.bounds[sample + 1] - start;
    return {states + head * width, samples.places + start, heads * width, length, width};
}

// Samples and key heads, the longest first, so that no thread is left with one.
std::vector<int64_t> order_units(Samples samples, int64_t kv_heads) {
    std::vector<int64_t> units(samples.count * kv_heads);
    for (size_t i = 0; i < units.size(); i++) units[i] = i;
    std::stable_sort(units.begin(), units.end(), [&](int64_t left, int64_t right) {
        const auto length = [&](int64_t unit) {
            return samples.bounds[unit / kv_heads + 1] - samples.bounds[unit / kv_heads];
        };
        return length(left) > length(right);
    });
    return units;
}

// What lies behind `seen` of the numbers from `start` on is another number.
inline Floats hide(Floats numbers, int64_t start, int64_t seen, float other) {
    if (start + LANES <= seen) return numbers;
    return count_up() < static_cast<uint32_t>(std::max<int64_t>(seen - start, 0)) ? numbers : Floats{} + other;
}

inline Floats larger(Floats left, Floats right) { return left > right ? left : right; }

template <class Join>
inline float reduce(Floats numbers, Join join) {
    for (int half = LANES / 2; half; half /= 2) numbers = join(numbers, __builtin_shuffle(numbers, count_up() ^ half));
    return numbers[0];
}

inline float sum_of(Floats numbers) {
    return reduce(numbers, [](Floats left, Floats right) { return left + right; });
}

// As exponential() of numbers.h, for x <= 0 or NaN: to add 1.5 * 2^23 rounds, and leaves the integer in the last bits.
inline Floats exponentials(Floats x) {
    const Floats power = larger(x * 1.44269504f, Floats{} - 126.0f), shifted = power + 12582912.0f;
    const Floats rest = power - (shifted - 12582912.0f);
    Floats sum = Floats{} + 1.52527338e-5f;
    sum = sum * rest + 1.54035304e-4f;
    sum = sum * rest + 1.33335581e-3f;
    sum = sum * rest + 9.61812911e-3f;
    sum = sum * rest + 5.55041087e-2f;
    sum = sum * rest + 2.40226507e-1f;
    sum = sum * rest + 6.93147181e-1f;
    sum = sum * rest + 1.0f;
    return sum * reinterpret_cast<Floats>((reinterpret_cast<Integers>(shifted) << 23) + (127 << 23));
}

constexpr float NEVER = -__builtin_inff();

// Turn scores into e^(score - largest), 0 from `seen` on; give their sum and the largest.
template <class T>
void to_weights(const float *scores, int64_t seen, int64_t filled, T *weights, float &sum, float &largest) {
    Floats most = Floats{} + NEVER, total{};
    for (int64_t i = 0; i < filled; i += LANES) most = larger(hide(load(scores + i), i, seen, NEVER), most);
    largest = reduce(most, larger);
    for (int64_t i = 0; i < filled; i += LANES) {
        const Floats weight = hide(exponentials(load(scores + i) - largest), i, seen, 0);
        total += weight;
        store(weight, weights + i);
    }
    sum = sum_of(total);
}

template <class T>
void attend(const T *query, const T *key, const T *value, Samples samples, Shape shape, float scale, T *mixed,
            float *normalizers) {
    const auto units = order_units(samples, shape.kv_heads);
    const int64_t width = shape.width, group = shape.heads / shape.kv_heads;
#pragma omp parallel for schedule(dynamic, 1)
    for (size_t each = 0; each < units.size(); each++) {
        const int64_t sample = units[each] / shape.kv_heads, kv_head = units[each] % shape.kv_heads;
        const auto keys = head_of(key, shape.kv_heads, kv_head, samples, sample, width);
        const auto values = head_of(value, shape.kv_heads, kv_head, samples, sample, width);
        const int64_t length = keys.length, filled = round_up(length, ALIGNED);
        uint32_t *columns = scratch(filled * width / PAIR<T> * 2 + ROWS * (2 * filled + 2 * width));
        uint32_t *rows_of_values = columns + filled * width / PAIR<T>;
        uint32_t *copy = rows_of_values + filled * width / PAIR<T>, *weights = copy + ROWS * width;
        float *scores = reinterpret_cast<float *>(weights + ROWS * filled), *sums = scores + ROWS * filled;
        keys.pack_columns(columns, filled);
        values.pack_rows(rows_of_values, 0, filled);
        for (int64_t token = samples.own[sample]; token < length; token += ROWS) {
            const int64_t rows = std::min(ROWS, length - token), seen = round_up(token + rows, ALIGNED);
            for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++) {
                const auto queries = head_of(query, shape.heads, head, samples, sample, width);
                multiply<T>(queries.strip(token, rows, copy), ROWS, columns, filled, width / PAIR<T>, seen, scale,
                            scores, filled);
                float sum[ROWS], largest[ROWS];
                for (int64_t row = 0; row < rows; row++)
                    to_weights(scores + row * filled, token + row + 1, seen,
                               reinterpret_cast<T *>(weights) + row * filled, sum[row], largest[row]);
                multiply<T>({weights, filled / PAIR<T>, 1}, ROWS, rows_of_values, width, seen / PAIR<T>, width, 1.0f,
                            sums, width);
                for (int64_t row = 0; row < rows; row++) {
                    const int64_t place = keys.places[token + row] * shape.heads + head;
                    const float factor = 1.0f / sum[row];
                    T *to = mixed + place * width;
#pragma omp simd
                    for (int64_t i = 0; i < width; i++) write(to[i], sums[row * width + i] * factor);
                    normalizers[place] = largest[row] + std::log(sum[row]);
                }
            }
        }
    }
}

// Of one row: make the weights again from scores, and give the gradient of scale * scores from that of theirs.
template <class T>
void differentiate(float *scores, const float *grads, int64_t seen, int64_t filled, float normalizer, T *weights,
                   T *of_scores) {
    Floats total{};
    for (int64_t i = 0; i < filled; i += LANES) {
        const Floats weight = hide(exponentials(load(scores + i) - normalizer), i, seen, 0);
        total += weight * load(grads + i);
        store(weight, scores + i);
        store(weight, weights + i);
    }
    const float mean = sum_of(total);
    for (int64_t i = 0; i < filled; i += LANES) store(load(scores + i) * (load(grads + i) - mean), of_scores + i);
}

// parts: (2, tokens of all samples, kv_heads, width), the gradient of keys and of values in each sample.
template <class T>
void attend_backward(const T *query, const T *key, const T *value, const T *grad, const float *normalizers,
                     Samples samples, const int64_t *begins, Shape shape, float scale, float *parts, T *of_query, T *of_key,
                     T *of_value) {
    const auto units = order_units(samples, shape.kv_heads);
    const int64_t width = shape.width, group = shape.heads / shape.kv_heads, deep = width / PAIR<T>;
    const int64_t all = samples.bounds[samples.count] * shape.kv_heads * width;
#pragma omp parallel for schedule(dynamic, 1)
    for (size_t each = 0; each < units.size(); each++) {
        const int64_t sample = units[each] / shape.kv_heads, kv_head = units[each] % shape.kv_heads;
        const auto keys = head_of(key, shape.kv_heads, kv_head, samples, sample, width);
        const auto values = head_of(value, shape.kv_heads, kv_head, samples, sample, width);
        const int64_t length = keys.length, filled = round_up(length, ALIGNED);
        uint32_t *columns = scratch(3 * filled * deep + 2 * filled * width + TILE * (2 * filled + 2 * width) / PAIR<T> +
                                    ROWS * (4 * filled + 3 * width));
        uint32_t *columns_of_values = columns + filled * deep, *rows_of_keys = columns_of_values + filled * deep;
        float *of_keys = reinterpret_cast<float *>(rows_of_keys + filled * deep), *of_values = of_keys + filled * width;
        uint32_t *weights = reinterpret_cast<uint32_t *>(of_values + filled * width);
        uint32_t *of_scores = weights + TILE / PAIR<T> * filled;
        uint32_t *rows_of_queries = of_scores + TILE / PAIR<T> * filled;
        uint32_t *rows_of_grads = rows_of_queries + TILE / PAIR<T> * width;
        uint32_t *copy = rows_of_grads + TILE / PAIR<T> * width;
        float *scores = reinterpret_cast<float *>(copy + 2 * ROWS * width), *grads = scores + ROWS * filled;
        float *sums = grads + ROWS * filled;
        T *strip_of_weights = reinterpret_cast<T *>(sums + ROWS * width);
        T *strip_of_scores = strip_of_weights + ROWS * filled;
        keys.pack_columns(columns, filled);
        values.pack_columns(columns_of_values, filled);
        keys.pack_rows(rows_of_keys, 0, filled);
        std::fill(of_keys, of_keys + 2 * filled * width, 0.0f);
        for (int64_t start = samples.own[sample]; start < length; start += TILE) {
            const int64_t tile = std::min(TILE, length - start), seen_by_tile = round_up(start + tile, ALIGNED);
            for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++) {
                const auto queries = head_of(query, shape.heads, head, samples, sample, width);
                const auto of_mixed = head_of(grad, shape.heads, head, samples, sample, width);
                queries.pack_rows(rows_of_queries, start, round_up(tile, ROWS));
                of_mixed.pack_rows(rows_of_grads, start, round_up(tile, ROWS));
                for (int64_t first = 0; first < tile; first += ROWS) {
                    const int64_t token = start + first, rows = std::min(ROWS, tile - first);
                    const int64_t seen = round_up(token + rows, ALIGNED);
                    multiply<T>(queries.strip(token, rows, copy), ROWS, columns, filled, deep, seen, scale, scores,
                                filled);
                    multiply<T>(of_mixed.strip(token, rows, copy + ROWS * width), ROWS, columns_of_values, filled, deep,
                                seen, 1.0f, grads, filled);
                    for (int64_t row = 0; row < ROWS; row++) {
                        const bool there = row < rows;
                        const int64_t place = keys.places[token + (there ? row : 0)] * shape.heads + head;
                        differentiate(scores + row * filled, grads + row * filled, there ? token + row + 1 : 0, seen,
                                      normalizers[place], strip_of_weights + row * filled,
                                      strip_of_scores + row * filled);
                    }
                    for (int64_t row = 0; row < ROWS; row += PAIR<T>) {
                        const int64_t at = (first + row) / PAIR<T> * filled, next = row + PAIR<T> - 1;
                        pack(strip_of_weights + row * filled, strip_of_weights + next * filled, weights + at, seen);
                        pack(strip_of_scores + row * filled, strip_of_scores + next * filled, of_scores + at, seen);
                        std::fill(weights + at + seen, weights + at + seen_by_tile, 0);
                        std::fill(of_scores + at + seen, of_scores + at + seen_by_tile, 0);
                    }
                    multiply<T>({reinterpret_cast<uint32_t *>(strip_of_scores), filled / PAIR<T>, 1}, ROWS, rows_of_keys, width, seen / PAIR<T>,
                                width, scale, sums, width);
                    for (int64_t row = 0; row < rows; row++) {
                        T *to = of_query + (keys.places[token + row] * shape.heads + head) * width;
#pragma omp simd
                        for (int64_t i = 0; i < width; i++) write(to[i], sums[row * width + i]);
                    }
                }
                const int64_t depth = round_up(tile, ROWS) / PAIR<T>;
                multiply<T>({of_scores, 1, filled}, seen_by_tile, rows_of_queries, width, depth, width, scale, of_keys,
                            width, true);
                multiply<T>({weights, 1, filled}, seen_by_tile, rows_of_grads, width, depth, width, 1.0f, of_values,
                            width, true);
            }
        }
        for (int64_t token = 0; token < length; token++) {
            const int64_t place = keys.places[token];
            const float *from = of_keys + token * width, *from_values = of_values + token * width;
            if (begins[place + 1] - begins[place] == 1) {
                T *to = of_key + (place * shape.kv_heads + kv_head) * width;
                T *to_values = of_value + (place * shape.kv_heads + kv_head) * width;
#pragma omp simd
                for (int64_t i = 0; i < width; i++) {
                    write(to[i], from[i]);
                    write(to_values[i], from_values[i]);
                }
            } else {
                float *to = parts + ((samples.bounds[sample] + token) * shape.kv_heads + kv_head) * width;
#pragma omp simd
                for (int64_t i = 0; i < width; i++) {
                    to[i] = from[i];
                    to[all + i] = from_values[i];
                }
            }
        }
    }
}

// Sum up what the tokens of samples at each place have, in their order; those of place p are order[begins[p]] and on.
template <class T>
void sum_up(const float *parts, const int64_t *order, const int64_t *begins, int64_t places, int64_t width, T *to) {
#pragma omp parallel for
    for (int64_t place = 0; place < places; place++) {
        if (begins[place + 1] - begins[place] == 1) continue;
#pragma omp simd
        for (int64_t i = 0; i < width; i++) {
            float sum = 0;
            for (int64_t each = begins[place]; each < begins[place + 1]; each++) sum += parts[order[each] * width + i];
            write(to[place * width + i], sum);
        }
    }
}

}  // namespace

#define FOR_TYPE(T, NAME)                                                                                              \
    extern "C" void attend_##NAME(const T *query, const T *key, const T *value, const int64_t *bounds,                 \
                                  const int64_t *own, const int64_t *places, int64_t count, int64_t heads,             \
                                  int64_t kv_heads, int64_t width, float scale, T *mixed, float *normalizers) {        \
        attend(query, key, value, {bounds, own, places, count}, {heads, kv_heads, width}, scale, mixed, normalizers);  \
    }                                                                                                                  \
    extern "C" void attend_backward_##NAME(                                                                            \
        const T *query, const T *key, const T *value, const T *grad, const float *normalizers, const int64_t *bounds,  \
        const int64_t *own, const int64_t *places, const int64_t *order, const int64_t *begins, int64_t count,         \
        int64_t tokens, int64_t heads, int64_t kv_heads, int64_t width, float scale, float *parts, T *of_query,        \
        T *of_key, T *of_value) {                                                                                      \
        attend_backward(query, key, value, grad, normalizers, {bounds, own, places, count}, begins,                    \
                        {heads, kv_heads, width}, scale, parts, of_query, of_key, of_value);                           \
        const int64_t wide = kv_heads * width;                                                                         \
        sum_up(parts, order, begins, tokens, wide, of_key);                                                            \
        sum_up(parts + bounds[count] * wide, order, begins, tokens, wide, of_value);                                   \
    }

FOR_TYPE(float, float32)
#ifdef __AVX512BF16__
FOR_TYPE(bf16, bfloat16)
#endif
