// Causal attention within each of many samples of a stream, forward and backward; the formula is in
// ../layers/attention.py. Tensors are contiguous: query and attn_out (queries, heads, head_dim), key and value
// (keys, kv_heads, head_dim).
//
// A thread takes a sample and a key head: its keys and values are packed once and stay in the cache, a strip of
// queries meets the keys up to its last row, and scores and probabilities never leave the first cache. Backward
// computes them again. Products are summed up in float32.

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <vector>

#include "vectors.h"

namespace {

constexpr int64_t TILE = 64;           // queries whose gradients of keys and values are one product
constexpr int64_t MAX_HEAD_DIM = 256;  // numbers of a head
constexpr int64_t KEY_BLOCK = 16;      // keys are padded with zeros to a multiple of it

// The left factor of a product, in words along its depth.
struct LeftOperand {
    const uint32_t *words;
    int64_t row_stride;
};

template <class T>
LeftOperand left_of(const T *rows, int64_t row_stride) {
    return {reinterpret_cast<const uint32_t *>(rows), row_stride / PAIR<T>};
}

template <class T, int64_t COUNT>
inline void multiply_block(LeftOperand left, const uint32_t *right, int64_t depth_stride, int64_t depth, float *to,
                           int64_t row_stride, bool add) {
    Floats sums[ROWS<T>][COUNT] = {};
    for (int64_t k = 0; k < depth; k++) {
        Words part[COUNT];
        for (int64_t i = 0; i < COUNT; i++) part[i] = load_words(right + k * depth_stride + i * LANES);
        for (int64_t row = 0; row < ROWS<T>; row++)
            for (int64_t i = 0; i < COUNT; i++)
                sums[row][i] = multiply_add<T>(left.words[row * left.row_stride + k], part[i], sums[row][i]);
    }
    for (int64_t row = 0; row < ROWS<T>; row++)
        for (int64_t i = 0; i < COUNT; i++) {
            float *place = to + row * row_stride + i * LANES;
            store(add ? load(place) + sums[row][i] : sums[row][i], place);
        }
}

// to = left * right, or to += that; right is (depth, columns) in words, columns a multiple of KEY_BLOCK, rows of ROWS<T>.
template <class T>
void multiply(LeftOperand left, int64_t rows, const uint32_t *right, int64_t depth_stride, int64_t depth, int64_t columns,
              float *to, int64_t row_stride, bool add = false) {
    for (int64_t row = 0; row < rows; row += ROWS<T>) {
        const LeftOperand strip{left.words + row * left.row_stride, left.row_stride};
        float *place = to + row * row_stride;
        int64_t column = 0;
        for (; column + VECTORS * LANES <= columns; column += VECTORS * LANES)
            multiply_block<T, VECTORS>(strip, right + column, depth_stride, depth, place + column, row_stride, add);
        for (; column < columns; column += LANES)
            multiply_block<T, 1>(strip, right + column, depth_stride, depth, place + column, row_stride, add);
    }
}

#ifdef __AMX_BF16__
// The same by tiles of 16 rows and 16 words: 0 for the sums, 1 and 2 for the factors. The depth is a multiple of 8 words; 8
// that are left over take tiles 3 and 4.
template <>
void multiply<bf16>(LeftOperand left, int64_t rows, const uint32_t *right, int64_t depth_stride, int64_t depth,
                    int64_t columns, float *to, int64_t row_stride, bool add) {
    __asm__ volatile("" ::: "memory");  // tiles read what was written before, which older headers do not say
    const int64_t left_bytes = left.row_stride * 4, right_bytes = depth_stride * 4, to_bytes = row_stride * 4;
    for (int64_t row = 0; row < rows; row += 16)
        for (int64_t column = 0; column < columns; column += 16) {
            const uint32_t *from_left = left.words + row * left.row_stride, *from_right = right + column;
            float *place = to + row * row_stride + column;
            if (add) _tile_loadd(0, place, to_bytes);
            else _tile_zero(0);
            int64_t k = 0;
            for (; k + 16 <= depth; k += 16) {
                _tile_loadd(1, from_left + k, left_bytes);
                _tile_loadd(2, from_right + k * depth_stride, right_bytes);
                _tile_dpbf16ps(0, 1, 2);
            }
            if (k < depth) {
                _tile_loadd(3, from_left + k, left_bytes);
                _tile_loadd(4, from_right + k * depth_stride, right_bytes);
                _tile_dpbf16ps(0, 3, 4);
            }
            _tile_stored(0, place, to_bytes);
        }
}
#endif

struct Shape {
    int64_t heads, kv_heads, head_dim;

    int64_t group() const { return heads / kv_heads; }  // query heads of a key head
};

// The states of one head of a sample's tokens.
template <class T>
struct Head {
    const T *states;
    int64_t by_token, length, head_dim;

    const T *row(int64_t token) const { return states + token * by_token; }

    // (head_dim / PAIR, padded): words along the head_dim, a column for each token
    void pack_columns(uint32_t *to, int64_t padded) const {
        const int64_t words = head_dim / PAIR<T>;
        for (int64_t k = 0; k < words; k++)
            for (int64_t token = 0; token < padded; token++) {
                uint32_t word = 0;
                if (token < length) std::memcpy(&word, row(token) + k * PAIR<T>, sizeof word);
                to[k * padded + token] = word;
            }
    }

    // (padded / PAIR, head_dim): words along the tokens
    void pack_rows(uint32_t *to, int64_t padded) const {
        static const std::vector<T> nothing(MAX_HEAD_DIM);
        for (int64_t token = 0; token < padded; token += PAIR<T>) {
            const T *lower = token < length ? row(token) : nothing.data();
            const T *upper = token + PAIR<T> - 1 < length ? row(token + PAIR<T> - 1) : nothing.data();
            pack(lower, upper, to + token / PAIR<T> * head_dim, head_dim);
        }
    }

    // (head_dim, count / PAIR): words along the tokens; behind the last there are zeros
    void pack_transposed(uint32_t *to, int64_t first, int64_t count) const {
        T *numbers = reinterpret_cast<T *>(to);
        std::memset(to, 0, head_dim * count * sizeof(T));
        for (int64_t token = 0; token < std::min(count, length - first); token++)
            for (int64_t i = 0; i < head_dim; i++) numbers[i * count + token] = row(first + token)[i];
    }

    // A strip of rows as the left factor; a strip that is not full is copied.
    LeftOperand strip(int64_t token, int64_t rows, uint32_t *copy) const {
        const int64_t words = head_dim / PAIR<T>;
        if (rows == ROWS<T>) return left_of(row(token), by_token);
        std::memset(copy, 0, ROWS<T> * words * sizeof(uint32_t));
        for (int64_t i = 0; i < rows; i++) std::memcpy(copy + i * words, row(token + i), words * sizeof(uint32_t));
        return {copy, words};
    }
};

// A sample, whose keys are from row `start` on, and a key head. The queries are of its last tokens, from `first` on: those
// before are computed with another sample. Token t has query t + q_offset.
struct SampleHead {
    Shape shape;
    int64_t start, length, kv_head, first, q_offset;

    int64_t padded() const { return round_up(length, KEY_BLOCK); }

    template <class T>
    Head<T> keys(const T *states) const {
        return head(states, start, shape.kv_heads, kv_head);
    }

    template <class T>
    Head<T> queries(const T *states, int64_t group_head) const {
        return head(states, q_offset, shape.heads, kv_head * shape.group() + group_head);
    }

    // Of a query head of the group, the row of (tokens, heads) that a token has.
    int64_t row(int64_t token, int64_t group_head) const {
        return (token + q_offset) * shape.heads + kv_head * shape.group() + group_head;
    }

   private:
    template <class T>
    Head<T> head(const T *states, int64_t row, int64_t heads, int64_t number) const {
        return {states + (row * heads + number) * shape.head_dim, heads * shape.head_dim, length, shape.head_dim};
    }
};

// All of them, the longest first, so that no thread is left with one. Sample i has keys from cu_k[i] to cu_k[i + 1], and
// queries from cu_q[i] to cu_q[i + 1].
std::vector<SampleHead> list_items(const int32_t *cu_q, const int32_t *cu_k, int64_t count, Shape shape) {
    std::vector<SampleHead> items;
    for (int64_t i = 0; i < count; i++) {
        const int64_t length = cu_k[i + 1] - cu_k[i], first = length - (cu_q[i + 1] - cu_q[i]);
        for (int64_t kv_head = 0; kv_head < shape.kv_heads; kv_head++)
            items.push_back({shape, cu_k[i], length, kv_head, first, cu_q[i] - first});
    }
    std::stable_sort(items.begin(), items.end(),
                     [](const SampleHead &left, const SampleHead &right) { return left.length > right.length; });
    return items;
}

// Memory of a thread, handed out array by array; without it, `is_allocated` is false.
class Memory {
   public:
    explicit Memory(int64_t words) : words_(new (std::nothrow) uint32_t[words + KEY_BLOCK]) { reset(); }

    bool is_allocated() const { return words_ != nullptr; }

    // Hand all of it out again, to the next item.
    void reset() {
        const uintptr_t start = reinterpret_cast<uintptr_t>(words_.get());
        next_ = reinterpret_cast<uint32_t *>((start + 63) / 64 * 64);  // a cache line has 64 bytes
    }

    template <class Number>
    Number *array(int64_t count) {
        Number *numbers = reinterpret_cast<Number *>(next_);
        next_ += round_up(count * sizeof(Number) / sizeof(uint32_t), KEY_BLOCK);
        return numbers;
    }

   private:
    std::unique_ptr<uint32_t[]> words_;
    uint32_t *next_;
};

template <class T>
void write_row(const float *numbers, float factor, int64_t head_dim, T *to) {
    for (int64_t i = 0; i < head_dim; i += LANES) store(load(numbers + i) * factor, to + i);
}

template <class T>
void write_column(const float *numbers, int64_t stride, float factor, int64_t head_dim, T *to) {
    float row[MAX_HEAD_DIM];
    for (int64_t i = 0; i < head_dim; i++) row[i] = numbers[i * stride];
    write_row(row, factor, head_dim, to);
}

// Replace the numbers at `end` and behind it, the first of them being at `start`.
inline Floats mask_from(int64_t end, Floats numbers, int64_t start, float other) {
    if (start + LANES <= end) return numbers;
    return count_up() < static_cast<uint32_t>(std::max<int64_t>(end - start, 0)) ? numbers : Floats{} + other;
}

template <class Join>
inline float reduce(Floats numbers, Join join) {
    for (int half = LANES / 2; half; half /= 2) numbers = join(numbers, __builtin_shuffle(numbers, count_up() ^ half));
    return numbers[0];
}

inline float sum_of(Floats numbers) {
    return reduce(numbers, [](Floats left, Floats right) { return left + right; });
}

constexpr float NEG_INF = -__builtin_inff();

// Turn a row of scores into e^(scale * score - largest), 0 from key `visible` on; return their sum and the largest.
template <class T>
void softmax_row(const float *scores, float scale, int64_t visible, int64_t end, T *probs, float &sum, float &largest) {
    Floats most = Floats{} + NEG_INF, total{};
    for (int64_t i = 0; i < end; i += LANES) most = larger(mask_from(visible, load(scores + i) * scale, i, NEG_INF), most);
    largest = reduce(most, larger);
    for (int64_t i = 0; i < end; i += LANES) {
        const Floats prob = mask_from(visible, exponentials(load(scores + i) * scale - largest), i, 0);
        total += prob;
        store(prob, probs + i);
    }
    sum = sum_of(total);
}

template <class T>
bool attend(const T *query, const T *key, const T *value, const int32_t *cu_q, const int32_t *cu_k, int64_t count,
            int64_t heads, int64_t kv_heads, int64_t head_dim, float scale, T *attn_out, float *lse) {
    const auto items = list_items(cu_q, cu_k, count, {heads, kv_heads, head_dim});
    const int64_t head_words = head_dim / PAIR<T>, longest = items.front().padded();
    std::atomic<bool> done{true};
#pragma omp parallel
    {
        const Tiles<T> tiles;
        Memory memory(2 * longest * head_words + ROWS<T> * (2 * longest + 2 * head_dim));
        if (!memory.is_allocated()) done = false;
#pragma omp for schedule(dynamic, 1)
        for (size_t i = 0; i < items.size(); i++) {
            if (!done) continue;
            const SampleHead &item = items[i];
            const int64_t padded = item.padded();
            memory.reset();
            auto *k_columns = memory.array<uint32_t>(padded * head_words);  // (head_words, padded)
            auto *v_rows = memory.array<uint32_t>(padded * head_words);     // (padded / PAIR, head_dim)
            auto *copy = memory.array<uint32_t>(ROWS<T> * head_words);
            auto *scores = memory.array<float>(ROWS<T> * padded), *sums = memory.array<float>(ROWS<T> * head_dim);
            auto *probs = memory.array<T>(ROWS<T> * padded);
            item.keys(key).pack_columns(k_columns, padded);
            item.keys(value).pack_rows(v_rows, padded);
            for (int64_t token = item.first; token < item.length; token += ROWS<T>) {
                const int64_t rows = std::min(ROWS<T>, item.length - token), end = round_up(token + rows, KEY_BLOCK);
                for (int64_t group_head = 0; group_head < item.shape.group(); group_head++) {
                    const LeftOperand q_strip = item.queries(query, group_head).strip(token, rows, copy);
                    multiply<T>(q_strip, ROWS<T>, k_columns, padded, head_words, end, scores, padded);
                    float sum[ROWS<T>];
                    for (int64_t row = 0; row < rows; row++) {
                        float largest;
                        softmax_row(scores + row * padded, scale, token + row + 1, end, probs + row * padded, sum[row],
                                    largest);
                        lse[item.row(token + row, group_head)] = largest + std::log(sum[row]);
                    }
                    multiply<T>(left_of(probs, padded), ROWS<T>, v_rows, head_dim, end / PAIR<T>, head_dim, sums,
                                head_dim);
                    for (int64_t row = 0; row < rows; row++)
                        write_row(sums + row * head_dim, 1.0f / sum[row], head_dim,
                                  attn_out + item.row(token + row, group_head) * head_dim);
                }
            }
        }
    }
    return done;
}

// Of one row: compute the probabilities again, in the place of scores, and from their gradient that of scale * scores.
template <class T>
void softmax_backward_row(float *scores, float scale, const float *grad_probs, int64_t visible, int64_t end, float lse, T *probs,
                   T *grad_scores) {
    Floats total{};
    for (int64_t i = 0; i < end; i += LANES) {
        const Floats unmasked = exponentials(load(scores + i) * scale - lse);
        const Floats prob = mask_from(visible, unmasked, i, 0);
        total += prob * load(grad_probs + i);
        store(prob, scores + i);
        store(prob, probs + i);
    }
    const float mean = sum_of(total);
    for (int64_t i = 0; i < end; i += LANES) store(load(scores + i) * (load(grad_probs + i) - mean), grad_scores + i);
}

// Pack a strip's rows into the tile's, with zeros behind `end`.
template <class T>
void pack_strip(const T *rows, int64_t stride, int64_t end, int64_t tile_end, uint32_t *to) {
    for (int64_t row = 0; row < ROWS<T>; row += PAIR<T>, to += stride) {
        pack(rows + row * stride, rows + (row + PAIR<T> - 1) * stride, to, end);
        std::fill(to + end, to + tile_end, 0);
    }
}

// Words that backward takes for an item of so many keys.
template <class T>
int64_t backward_words(int64_t padded, int64_t head_dim) {
    return 5 * padded * head_dim + 2 * TILE * (padded + head_dim) + ROWS<T> * (4 * padded + 3 * head_dim);
}

// Gradients of one sample and key head: of queries strip by strip, of keys and values summed up over tiles of queries.
// `grad` is that of attn_out.
template <class T>
void attend_item_backward(const SampleHead &item, const T *query, const T *key, const T *value, const T *grad,
                          const float *lse, float scale, Memory &memory, T *grad_q, T *grad_k, T *grad_v) {
    const int64_t head_dim = item.shape.head_dim, head_words = head_dim / PAIR<T>, padded = item.padded();
    memory.reset();
    auto *k_columns = memory.array<uint32_t>(padded * head_words);  // (head_words, padded)
    auto *v_columns = memory.array<uint32_t>(padded * head_words);  // (head_words, padded)
    auto *k_rows = memory.array<uint32_t>(padded * head_words);     // (padded / PAIR, head_dim)
    auto *k_sums = memory.array<float>(padded * head_dim);          // (head_dim, padded), as v_sums
    auto *v_sums = memory.array<float>(padded * head_dim);
    auto *tile_probs = memory.array<uint32_t>(TILE / PAIR<T> * padded);  // (TILE / PAIR, padded)
    auto *tile_grad_scores = memory.array<uint32_t>(TILE / PAIR<T> * padded);
    auto *tile_q = memory.array<uint32_t>(TILE * head_words);  // (head_dim, TILE / PAIR)
    auto *tile_grad = memory.array<uint32_t>(TILE * head_words);
    auto *q_copy = memory.array<uint32_t>(ROWS<T> * head_words), *grad_copy = memory.array<uint32_t>(ROWS<T> * head_words);
    auto *scores = memory.array<float>(ROWS<T> * padded), *grad_probs = memory.array<float>(ROWS<T> * padded);
    auto *q_sums = memory.array<float>(ROWS<T> * head_dim);
    auto *probs = memory.array<T>(ROWS<T> * padded), *grad_scores = memory.array<T>(ROWS<T> * padded);
    item.keys(key).pack_columns(k_columns, padded);
    item.keys(value).pack_columns(v_columns, padded);
    item.keys(key).pack_rows(k_rows, padded);
    std::fill(k_sums, k_sums + padded * head_dim, 0.0f);
    std::fill(v_sums, v_sums + padded * head_dim, 0.0f);

    for (int64_t start = item.first; start < item.length; start += TILE)
        for (int64_t group_head = 0; group_head < item.shape.group(); group_head++) {
            const auto q_head = item.queries(query, group_head), grad_head = item.queries(grad, group_head);
            const int64_t tile = std::min(TILE, item.length - start), tile_end = round_up(start + tile, KEY_BLOCK);
            const int64_t tile_rows = round_up(tile, ROWS<T>), depth = tile_rows / PAIR<T>;
            for (int64_t first = 0; first < tile; first += ROWS<T>) {  // a strip of the tile
                const int64_t token = start + first, rows = std::min(ROWS<T>, tile - first);
                const int64_t end = round_up(token + rows, KEY_BLOCK);
                multiply<T>(q_head.strip(token, rows, q_copy), ROWS<T>, k_columns, padded, head_words, end, scores, padded);
                multiply<T>(grad_head.strip(token, rows, grad_copy), ROWS<T>, v_columns, padded, head_words, end, grad_probs,
                            padded);
                for (int64_t row = 0; row < ROWS<T>; row++) {  // those behind the end see nothing
                    const int64_t visible = row < rows ? token + row + 1 : 0;
                    const int64_t at = item.row(token + std::min(row, rows - 1), group_head);
                    softmax_backward_row(scores + row * padded, scale, grad_probs + row * padded, visible, end, lse[at],
                                         probs + row * padded, grad_scores + row * padded);
                }
                pack_strip(probs, padded, end, tile_end, tile_probs + first / PAIR<T> * padded);
                pack_strip(grad_scores, padded, end, tile_end, tile_grad_scores + first / PAIR<T> * padded);
                multiply<T>(left_of(grad_scores, padded), ROWS<T>, k_rows, head_dim, end / PAIR<T>, head_dim, q_sums,
                            head_dim);
                for (int64_t row = 0; row < rows; row++)
                    write_row(q_sums + row * head_dim, scale, head_dim,
                              grad_q + item.row(token + row, group_head) * head_dim);
            }
            q_head.pack_transposed(tile_q, start, tile_rows);
            grad_head.pack_transposed(tile_grad, start, tile_rows);
            multiply<T>({tile_q, depth}, head_dim, tile_grad_scores, padded, depth, tile_end, k_sums, padded, true);
            multiply<T>({tile_grad, depth}, head_dim, tile_probs, padded, depth, tile_end, v_sums, padded, true);
        }

    for (int64_t token = 0; token < item.length; token++) {
        const int64_t at = ((item.start + token) * item.shape.kv_heads + item.kv_head) * head_dim;
        write_column(k_sums + token, padded, scale, head_dim, grad_k + at);
        write_column(v_sums + token, padded, 1.0f, head_dim, grad_v + at);
    }
}

template <class T>
bool attend_backward(const T *query, const T *key, const T *value, const T *grad, const float *lse,
                     const int32_t *cu_q, const int32_t *cu_k, int64_t count, int64_t heads, int64_t kv_heads,
                     int64_t head_dim, float scale, T *grad_q, T *grad_k, T *grad_v) {
    const auto items = list_items(cu_q, cu_k, count, {heads, kv_heads, head_dim});
    std::atomic<bool> done{true};
#pragma omp parallel
    {
        const Tiles<T> tiles;
        Memory memory(backward_words<T>(items.front().padded(), head_dim));
        if (!memory.is_allocated()) done = false;
#pragma omp for schedule(dynamic, 1)
        for (size_t i = 0; i < items.size(); i++)
            if (done) attend_item_backward(items[i], query, key, value, grad, lse, scale, memory, grad_q, grad_k, grad_v);
    }
    return done;
}

}  // namespace

EXPORT(attend_float32, attend<float>)
EXPORT(attend_backward_float32, attend_backward<float>)
#ifdef __AVX512BF16__
EXPORT(attend_bfloat16, Tiles<bf16>::allowed() ? attend<bf16> : nullptr)
EXPORT(attend_backward_bfloat16, Tiles<bf16>::allowed() ? attend_backward<bf16> : nullptr)
#endif
