// Causal attention within each of many samples of a stream, forward and backward.
//
// A thread takes a sample and a key head: its keys and values are packed once and stay in the cache, a strip of
// queries meets the keys up to its last row, and scores and probabilities never leave the first cache. Backward makes
// them again. Products are summed up in float32. The formula is in ../layers/attention.py.

#include <algorithm>
#include <atomic>

#include "vectors.h"

namespace {

constexpr int64_t TILE = 64;        // queries whose gradients of keys and values are one product
constexpr int64_t MOST_WIDE = 256;  // numbers of a head
constexpr int64_t ALIGNED = 16;     // keys are filled up to a multiple of it

// The left factor of a product: word (row, depth) is at row * by_row + depth * by_depth.
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
        for (int64_t i = 0; i < COUNT; i++) part[i] = load_words(right + k * by_depth + i * LANES);
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

template <class T>
Left left_of(const T *rows, int64_t by_row) {
    return {reinterpret_cast<const uint32_t *>(rows), by_row / PAIR<T>, 1};
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
            multiply_block<T, VECTORS>(strip, right + column, by_depth, depth, factor, place + column, by_row, add);
        for (; column < columns; column += LANES)
            multiply_block<T, 1>(strip, right + column, by_depth, depth, factor, place + column, by_row, add);
    }
}

// Where the tokens of samples are, see ../layout.py: token t of sample i at gather_index[bounds[i] + t]; it has queries
// from query_start[i] on.
struct Samples {
    const int64_t *bounds, *query_start, *gather_index;
    int64_t count;
};

struct Shape {
    int64_t heads, kv_heads, width;

    int64_t group() const { return heads / kv_heads; }  // query heads of a key head
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
        if (rows == ROWS) return left_of(row(token), by_token);
        std::memset(copy, 0, ROWS * words * sizeof(uint32_t));
        for (int64_t i = 0; i < rows; i++) std::memcpy(copy + i * words, row(token + i), words * sizeof(uint32_t));
        return {copy, words, 1};
    }
};

// A sample and a key head.
struct Unit {
    Samples samples;
    Shape shape;
    int64_t sample, kv_head, length, filled;

    Unit(Samples samples, Shape shape, int64_t number)
        : samples(samples), shape(shape), sample(number / shape.kv_heads), kv_head(number % shape.kv_heads) {
        length = samples.bounds[sample + 1] - samples.bounds[sample];
        filled = round_up(length, ALIGNED);
    }

    template <class T>
    Head<T> keys(const T *states) const {
        return head(states, shape.kv_heads, kv_head);
    }

    template <class T>
    Head<T> queries(const T *states, int64_t member) const {
        return head(states, shape.heads, kv_head * shape.group() + member);
    }

    int64_t place(int64_t token) const { return samples.gather_index[samples.bounds[sample] + token]; }

    // Of a query head of the group, the row of (tokens, heads) that a token has.
    int64_t row(int64_t token, int64_t member) const {
        return place(token) * shape.heads + kv_head * shape.group() + member;
    }

   private:
    template <class T>
    Head<T> head(const T *states, int64_t heads, int64_t number) const {
        const int64_t *places = samples.gather_index + samples.bounds[sample];
        return {states + number * shape.width, places, heads * shape.width, length, shape.width};
    }
};

// All of them, the longest first, so that no thread is left with one.
std::vector<Unit> list_units(Samples samples, Shape shape) {
    std::vector<Unit> units;
    for (int64_t i = 0; i < samples.count * shape.kv_heads; i++) units.emplace_back(samples, shape, i);
    std::stable_sort(units.begin(), units.end(),
                     [](const Unit &left, const Unit &right) { return left.length > right.length; });
    return units;
}

// Pieces of a thread's memory, one behind the other.
class Room {
   public:
    explicit Room(int64_t words) : next_(scratch(words)) {}

    bool is_there() const { return next_; }

    template <class Number>
    Number *take(int64_t count) {
        Number *piece = reinterpret_cast<Number *>(next_);
        next_ += round_up(count * sizeof(Number) / sizeof(uint32_t), ALIGNED);
        return piece;
    }

   private:
    uint32_t *next_;
};

template <class T>
void write_row(const float *numbers, float factor, int64_t width, T *to) {
    for (int64_t i = 0; i < width; i += LANES) store(load(numbers + i) * factor, to + i);
}

// What lies behind `seen` of the numbers from `start` on is another number.
inline Floats hide(Floats numbers, int64_t start, int64_t seen, float other) {
    if (start + LANES <= seen) return numbers;
    return count_up() < static_cast<uint32_t>(std::max<int64_t>(seen - start, 0)) ? numbers : Floats{} + other;
}

// Where one of them is NaN: the right one.
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
    const Floats power = larger(Floats{} - 126.0f, x * 1.44269504f), shifted = power + 12582912.0f;
    const Floats rest = power - (shifted - 12582912.0f);
    return power_of_two(rest) * reinterpret_cast<Floats>((reinterpret_cast<Integers>(shifted) << 23) + (127 << 23));
}

constexpr float NEVER = -__builtin_inff();

// What makes weights of a row of scores: e^(score - largest) * inverse. Not one number, the logarithm of the sum: of
// large scores that would be as coarse as they are.
struct Normalizer {
    float largest, inverse;
};

// Turn scores into e^(score - largest), 0 from `seen` on; return their sum and the largest.
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
bool attend(const T *query, const T *key, const T *value, const int64_t *bounds, const int64_t *query_start,
            const int64_t *gather_index, int64_t count, int64_t heads, int64_t kv_heads, int64_t width, float scale,
            T *mixed, Normalizer *normalizers) {
    const Samples samples{bounds, query_start, gather_index, count};
    const Shape shape{heads, kv_heads, width};
    const auto units = list_units(samples, shape);
    const int64_t deep = width / PAIR<T>;
    std::atomic<bool> fits{true};
#pragma omp parallel for schedule(dynamic, 1)
    for (size_t each = 0; each < units.size(); each++) {
        const Unit &unit = units[each];
        const int64_t filled = unit.filled;
        Room room(2 * filled * deep + ROWS * (2 * filled + 2 * width));
        if (!room.is_there()) {
            fits = false;
            continue;
        }
        auto *columns = room.take<uint32_t>(filled * deep), *rows_of_values = room.take<uint32_t>(filled * deep);
        auto *copy = room.take<uint32_t>(ROWS * deep);
        auto *scores = room.take<float>(ROWS * filled), *sums = room.take<float>(ROWS * width);
        auto *weights = room.take<T>(ROWS * filled);
        unit.keys(key).pack_columns(columns, filled);
        unit.keys(value).pack_rows(rows_of_values, 0, filled);
        for (int64_t token = samples.query_start[unit.sample]; token < unit.length; token += ROWS) {
            const int64_t rows = std::min(ROWS, unit.length - token), seen = round_up(token + rows, ALIGNED);
            for (int64_t member = 0; member < shape.group(); member++) {
                const Left queries = unit.queries(query, member).strip(token, rows, copy);
                multiply<T>(queries, ROWS, columns, filled, deep, seen, scale, scores, filled);
                float sum[ROWS], largest[ROWS];
                for (int64_t row = 0; row < rows; row++)
                    to_weights(scores + row * filled, token + row + 1, seen, weights + row * filled, sum[row],
                               largest[row]);
                multiply<T>(left_of(weights, filled), ROWS, rows_of_values, width, seen / PAIR<T>, width, 1.0f, sums,
                            width);
                for (int64_t row = 0; row < rows; row++) {
                    const int64_t at = unit.row(token + row, member);
                    normalizers[at] = {largest[row], 1.0f / sum[row]};
                    write_row(sums + row * width, normalizers[at].inverse, width, mixed + at * width);
                }
            }
        }
    }
    return fits;
}

// Of one row: compute the weights again from scores, and the gradient of scale * scores from that of theirs.
template <class T>
void differentiate(float *scores, const float *grads, int64_t seen, int64_t filled, Normalizer normalizer, T *weights,
                   T *of_scores) {
    Floats total{};
    for (int64_t i = 0; i < filled; i += LANES) {
        const Floats positive = exponentials(load(scores + i) - normalizer.largest) * normalizer.inverse;
        const Floats weight = hide(positive, i, seen, 0);
        total += weight * load(grads + i);
        store(weight, scores + i);
        store(weight, weights + i);
    }
    const float mean = sum_of(total);
    for (int64_t i = 0; i < filled; i += LANES) store(load(scores + i) * (load(grads + i) - mean), of_scores + i);
}

// The gradients that leave backward.
template <class T>
struct Gradients {
    T *query, *key, *value;
    float *parts;           // (2, tokens of all samples, kv_heads, width): of keys and values of shared tokens, by sample
    const int64_t *copy_offsets;  // where the tokens of each place begin among its copies
};

// Backward of one unit.
template <class T>
struct Backward {
    const Unit &unit;
    const T *query, *grad;
    const Normalizer *normalizers;
    float scale;
    int64_t width, deep, filled;
    uint32_t *columns, *columns_of_values, *rows_of_keys;   // what is packed of keys and values
    uint32_t *weights, *of_scores;                          // of a tile, in pairs of rows, (TILE / PAIR, filled)
    uint32_t *rows_of_queries, *rows_of_grads, *copies;     // of a tile, of a strip
    float *of_keys, *of_values, *scores, *grads, *sums;     // gradients, (filled, width); of a strip
    T *strip_of_weights, *strip_of_scores;

    Backward(const Unit &unit, const T *query, const T *key, const T *value, const T *grad,
             const Normalizer *normalizers, float scale, Room &room)
        : unit(unit), query(query), grad(grad), normalizers(normalizers), scale(scale), width(unit.shape.width),
          deep(width / PAIR<T>), filled(unit.filled) {
        columns = room.take<uint32_t>(filled * deep), columns_of_values = room.take<uint32_t>(filled * deep);
        rows_of_keys = room.take<uint32_t>(filled * deep);
        of_keys = room.take<float>(filled * width), of_values = room.take<float>(filled * width);
        weights = room.take<uint32_t>(TILE / PAIR<T> * filled), of_scores = room.take<uint32_t>(TILE / PAIR<T> * filled);
        rows_of_queries = room.take<uint32_t>(TILE * deep), rows_of_grads = room.take<uint32_t>(TILE * deep);
        copies = room.take<uint32_t>(2 * ROWS * deep);
        scores = room.take<float>(ROWS * filled), grads = room.take<float>(ROWS * filled);
        sums = room.take<float>(ROWS * width);
        strip_of_weights = room.take<T>(ROWS * filled), strip_of_scores = room.take<T>(ROWS * filled);
        unit.keys(key).pack_columns(columns, filled);
        unit.keys(value).pack_columns(columns_of_values, filled);
        unit.keys(key).pack_rows(rows_of_keys, 0, filled);
        std::fill(of_keys, of_keys + filled * width, 0.0f);
        std::fill(of_values, of_values + filled * width, 0.0f);
    }

    static int64_t words(const Unit &unit) {
        const int64_t width = unit.shape.width, filled = unit.filled;
        return 5 * filled * width + 2 * TILE * (filled + width) + ROWS * (4 * filled + 3 * width);
    }

    void run(const Gradients<T> &to) {
        for (int64_t start = unit.samples.query_start[unit.sample]; start < unit.length; start += TILE)
            for (int64_t member = 0; member < unit.shape.group(); member++) do_tile(start, member, to.query);
        for (int64_t token = 0; token < unit.length; token++) write_token(token, to);
    }

   private:
    void do_tile(int64_t start, int64_t member, T *of_query) {
        const int64_t tile = std::min(TILE, unit.length - start), seen = round_up(start + tile, ALIGNED);
        const int64_t rows = round_up(tile, ROWS), depth = rows / PAIR<T>;
        unit.queries(query, member).pack_rows(rows_of_queries, start, rows);
        unit.queries(grad, member).pack_rows(rows_of_grads, start, rows);
        for (int64_t first = 0; first < tile; first += ROWS)
            do_strip(start + first, std::min(ROWS, tile - first), first, seen, member, of_query);
        multiply<T>({of_scores, 1, filled}, seen, rows_of_queries, width, depth, width, scale, of_keys, width, true);
        multiply<T>({weights, 1, filled}, seen, rows_of_grads, width, depth, width, 1.0f, of_values, width, true);
    }

    void do_strip(int64_t token, int64_t rows, int64_t first, int64_t seen_by_tile, int64_t member, T *of_query) {
        const int64_t seen = round_up(token + rows, ALIGNED);
        const Left queries = unit.queries(query, member).strip(token, rows, copies);
        const Left of_mixed = unit.queries(grad, member).strip(token, rows, copies + ROWS * deep);
        multiply<T>(queries, ROWS, columns, filled, deep, seen, scale, scores, filled);
        multiply<T>(of_mixed, ROWS, columns_of_values, filled, deep, seen, 1.0f, grads, filled);
        for (int64_t row = 0; row < ROWS; row++) {  // those behind the end see nothing
            const int64_t own = row < rows ? token + row + 1 : 0, at = unit.row(token + std::min(row, rows - 1), member);
            differentiate(scores + row * filled, grads + row * filled, own, seen, normalizers[at],
                          strip_of_weights + row * filled, strip_of_scores + row * filled);
        }
        for (int64_t row = 0; row < ROWS; row += PAIR<T>) {
            keep_pair(strip_of_weights + row * filled, weights + (first + row) / PAIR<T> * filled, seen, seen_by_tile);
            keep_pair(strip_of_scores + row * filled, of_scores + (first + row) / PAIR<T> * filled, seen, seen_by_tile);
        }
        multiply<T>(left_of(strip_of_scores, filled), ROWS, rows_of_keys, width, seen / PAIR<T>, width, scale, sums,
                    width);
        for (int64_t row = 0; row < rows; row++)
            write_row(sums + row * width, 1.0f, width, of_query + unit.row(token + row, member) * width);
    }

    void keep_pair(const T *rows, uint32_t *to, int64_t seen, int64_t seen_by_tile) {
        pack(rows, rows + (PAIR<T> - 1) * filled, to, seen);
        std::fill(to + seen, to + seen_by_tile, 0);
    }

    void write_token(int64_t token, const Gradients<T> &to) {
        const int64_t place = unit.place(token), kv_heads = unit.shape.kv_heads;
        const float *from = of_keys + token * width, *from_values = of_values + token * width;
        if (to.copy_offsets[place + 1] - to.copy_offsets[place] == 1) {
            const int64_t at = (place * kv_heads + unit.kv_head) * width;
            write_row(from, 1.0f, width, to.key + at);
            write_row(from_values, 1.0f, width, to.value + at);
        } else {
            const Samples &samples = unit.samples;
            const int64_t at = ((samples.bounds[unit.sample] + token) * kv_heads + unit.kv_head) * width;
            write_row(from, 1.0f, width, to.parts + at);
            write_row(from_values, 1.0f, width, to.parts + samples.bounds[samples.count] * kv_heads * width + at);
        }
    }
};

// Sum up what the tokens of samples at each place have, in their copies; those of place p are copies[copy_offsets[p]]
// and on.
template <class T>
void sum_up(const float *parts, const int64_t *copies, const int64_t *copy_offsets, int64_t places, int64_t width, T *to) {
#pragma omp parallel for
    for (int64_t place = 0; place < places; place++) {
        if (copy_offsets[place + 1] - copy_offsets[place] == 1) continue;
#pragma omp simd
        for (int64_t i = 0; i < width; i++) {
            float sum = 0;
            for (int64_t each = copy_offsets[place]; each < copy_offsets[place + 1]; each++) sum += parts[copies[each] * width + i];
            write(to[place * width + i], sum);
        }
    }
}

template <class T>
bool attend_backward(const T *query, const T *key, const T *value, const T *grad, const Normalizer *normalizers,
                     const int64_t *bounds, const int64_t *query_start, const int64_t *gather_index,
                     const int64_t *copies, const int64_t *copy_offsets, int64_t count, int64_t tokens, int64_t heads,
                     int64_t kv_heads, int64_t width, float scale, float *parts, T *of_query, T *of_key, T *of_value) {
    const auto units = list_units({bounds, query_start, gather_index, count}, {heads, kv_heads, width});
    const Gradients<T> to{of_query, of_key, of_value, parts, copy_offsets};
    std::atomic<bool> fits{true};
#pragma omp parallel for schedule(dynamic, 1)
    for (size_t each = 0; each < units.size(); each++) {
        Room room(Backward<T>::words(units[each]));
        if (room.is_there())
            Backward<T>(units[each], query, key, value, grad, normalizers, scale, room).run(to);
        else
            fits = false;
    }
    const int64_t wide = kv_heads * width;
    if (fits) sum_up(parts, copies, copy_offsets, tokens, wide, of_key);
    if (fits) sum_up(parts + bounds[count] * wide, copies, copy_offsets, tokens, wide, of_value);
    return fits;
}

}  // namespace

EXPORT(attend_float32, attend<float>)
EXPORT(attend_backward_float32, attend_backward<float>)
#ifdef __AVX512BF16__
EXPORT(attend_bfloat16, attend<bf16>)
EXPORT(attend_backward_bfloat16, attend_backward<bf16>)
#endif
