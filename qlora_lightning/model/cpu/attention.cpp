// Causal attention within each of many samples of a stream, forward and backward; the formula is in
// ../layers/attention.py. Tensors are contiguous: query and attn_out (queries, heads, head_dim), key and value
// (keys, kv_heads, head_dim).
//
// A thread takes a sample and a key head: its keys and values are packed once and stay in the cache, a strip of
// queries meets the keys up to its last row, and scores and probabilities never leave the first cache. Backward
// computes them again. Products are of float32, or of pairs of bfloat16, and are summed up in float32.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <vector>

#include <omp.h>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

// ---- vectors --------------------------------------------------------------------------------------------------------

#ifdef __AVX512F__
constexpr int64_t LANES = 16, ROWS = 16;  // a vector's numbers; sums of so many rows fit into the registers
#else
constexpr int64_t LANES = 8, ROWS = 8;
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));

struct bf16 {
    uint16_t bits;
};

inline Floats load(const float *from) {
    Floats numbers;
    std::memcpy(&numbers, from, sizeof numbers);
    return numbers;
}

inline void store(Floats numbers, float *to) { std::memcpy(to, &numbers, sizeof numbers); }

constexpr Words count_up() {
    Words numbers{};
    for (int i = 0; i < LANES; i++) numbers[i] = i;
    return numbers;
}

// Replace the numbers at `end` and behind it, the first of them being at `start`.
inline Floats mask_from(int64_t end, Floats numbers, int64_t start, float other) {
    if (start + LANES <= end) return numbers;
    return count_up() < static_cast<uint32_t>(std::max<int64_t>(end - start, 0)) ? numbers : Floats{} + other;
}

// Where one of them is NaN: the right one.
inline Floats larger(Floats left, Floats right) { return left > right ? left : right; }

inline Floats add(Floats left, Floats right) { return left + right; }

inline float reduce(Floats numbers, Floats (*join)(Floats, Floats)) {
    for (int half = LANES / 2; half; half /= 2) numbers = join(numbers, __builtin_shuffle(numbers, count_up() ^ half));
    return numbers[0];
}

// e^x for x <= 0 or NaN, to 2e-7: 2^n by the exponent's bits, times the Taylor series of 2^r for |r| <= 1/2. To add
// 1.5 * 2^23 rounds, and leaves the integer n in the last bits.
inline Floats exponentials(Floats x) {
    const Floats power = larger(Floats{} - 126.0f, x * 1.44269504f), shifted = power + 12582912.0f;
    const Floats rest = power - (shifted - 12582912.0f);
    Floats sum = Floats{} + 1.52527338e-5f;
    for (float factor : {1.54035304e-4f, 1.33335581e-3f, 9.61812911e-3f, 5.55041087e-2f, 2.40226507e-1f, 6.93147181e-1f,
                         1.0f})
        sum = sum * rest + factor;
    return sum * reinterpret_cast<Floats>((reinterpret_cast<Integers>(shifted) << 23) + (127 << 23));
}

// ---- products -------------------------------------------------------------------------------------------------------

// Numbers of a word of 32 bits, of which products take one of each factor at a time: a float, or a pair of bfloat16.
template <class T>
constexpr int64_t PAIR = sizeof(uint32_t) / sizeof(T);

inline Floats multiply_add(const float *left, Words right, Floats sum) {
    return sum + *left * reinterpret_cast<Floats>(right);
}

// Pack two rows into words; of floats there is one.
inline void pack(const float *row, const float *, int64_t width, uint32_t *to) {
    std::memcpy(to, row, width * sizeof(float));
}

#ifdef __AVX512BF16__
inline void store(Floats numbers, bf16 *to) {
    const __m256bh rounded = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(numbers));
    std::memcpy(to, &rounded, sizeof rounded);
}

inline Floats multiply_add(const bf16 *left, Words right, Floats sum) {
    int32_t word;
    std::memcpy(&word, left, sizeof word);
    const auto pairs = reinterpret_cast<__m512bh>(_mm512_set1_epi32(word));
    return reinterpret_cast<Floats>(
        _mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), pairs, reinterpret_cast<__m512bh>(right)));
}

inline void pack(const bf16 *first, const bf16 *second, int64_t width, uint32_t *to) {
#pragma omp simd
    for (int64_t i = 0; i < width; i++) to[i] = first[i].bits | static_cast<uint32_t>(second[i].bits) << 16;
}
#endif

// (rows / PAIR, width): words along the rows, which are `stride` apart in `to`
template <class T>
void pack_rows(const T *from, int64_t rows, int64_t width, uint32_t *to, int64_t stride) {
    for (int64_t row = 0; row < rows; row += PAIR<T>)
        pack(from + row * width, from + (row + PAIR<T> - 1) * width, width, to + row / PAIR<T> * stride);
}

// (width, rows): numbers, or words along the width
template <class Unit>
void transpose(const Unit *from, int64_t rows, int64_t width, Unit *to) {
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = 0; i < width; i++) to[i * rows + row] = from[row * width + i];
}

// to = left * right, or to += that: left is (rows, depth) numbers, right (depth / PAIR, columns) words, whose rows are
// `right_stride` apart, as those of `to` are `to_stride` apart. Rows are a multiple of ROWS, columns of LANES.
template <class T>
void multiply(const T *left, int64_t rows, int64_t depth, const uint32_t *right, int64_t right_stride, int64_t columns,
              float *to, int64_t to_stride, bool adds = false) {
    for (int64_t row = 0; row < rows; row += ROWS, left += ROWS * depth, to += ROWS * to_stride)
        for (int64_t column = 0; column < columns; column += LANES) {
            Floats sums[ROWS] = {};
            for (int64_t k = 0; k < depth; k += PAIR<T>) {
                Words part;
                std::memcpy(&part, right + k / PAIR<T> * right_stride + column, sizeof part);
                for (int64_t i = 0; i < ROWS; i++) sums[i] = multiply_add(left + i * depth + k, part, sums[i]);
            }
            for (int64_t i = 0; i < ROWS; i++) {
                float *place = to + i * to_stride + column;
                store(adds ? load(place) + sums[i] : sums[i], place);
            }
        }
}

// ---- samples --------------------------------------------------------------------------------------------------------

constexpr int64_t TILE = 64;           // queries whose gradients of keys and values are one product
constexpr int64_t MAX_HEAD_DIM = 256;  // numbers of a head
constexpr int64_t KEY_BLOCK = 16;      // keys are padded with zeros to a multiple of it

inline int64_t round_up(int64_t number, int64_t step) { return (number + step - 1) / step * step; }

// A sample, whose keys are from row `start` on, and a key head. The queries are of its last tokens, from `first` on: those
// before are computed with another sample. Token t has query t + q_offset.
struct Item {
    int64_t heads, kv_heads, head_dim, kv_head, start, length, first, q_offset;

    int64_t padded() const { return round_up(length, KEY_BLOCK); }
    int64_t group() const { return heads / kv_heads; }  // query heads of a key head

    // The row of (keys, kv_heads) that a token has; and of (queries, heads), of a query head of the group.
    int64_t key_row(int64_t token) const { return (start + token) * kv_heads + kv_head; }
    int64_t query_row(int64_t token, int64_t group_head) const {
        return (token + q_offset) * heads + kv_head * group() + group_head;
    }
};

// All of them, the longest first, so that no thread is left with one. Sample i has keys from cu_k[i] to cu_k[i + 1], and
// queries from cu_q[i] to cu_q[i + 1].
std::vector<Item> list_items(const int32_t *cu_q, const int32_t *cu_k, int64_t count, int64_t heads, int64_t kv_heads,
                             int64_t head_dim) {
    std::vector<Item> items;
    for (int64_t i = 0; i < count; i++) {
        const int64_t length = cu_k[i + 1] - cu_k[i], first = length - (cu_q[i + 1] - cu_q[i]);
        for (int64_t kv_head = 0; kv_head < kv_heads; kv_head++)
            items.push_back({heads, kv_heads, head_dim, kv_head, cu_k[i], length, first, cu_q[i] - first});
    }
    std::stable_sort(items.begin(), items.end(),
                     [](const Item &left, const Item &right) { return left.length > right.length; });
    return items;
}

// A thread's memory, handed out array by array; each takes a whole number of cache lines.
struct Memory {
    uint32_t *next;

    template <class Number>
    Number *array(int64_t count) {
        Number *numbers = reinterpret_cast<Number *>(next);
        next += count * sizeof(Number) / sizeof(uint32_t);
        return numbers;
    }
};

// Compute all items, each with a thread's memory of some words; return whether there was memory.
template <class Compute>
bool compute_items(const std::vector<Item> &items, int64_t words, Compute compute) {
    const size_t bytes = omp_get_max_threads() * words * sizeof(uint32_t);
    const std::unique_ptr<void, void (*)(void *)> memory(std::aligned_alloc(64, bytes), std::free);
    if (!memory) return false;
#pragma omp parallel for schedule(dynamic, 1)
    for (size_t i = 0; i < items.size(); i++)
        compute(items[i], Memory{static_cast<uint32_t *>(memory.get()) + omp_get_thread_num() * words});
    return true;
}

// Copy rows of a head that are `stride` apart, and put zeros behind them, up to `padded` rows.
template <class T>
void copy_rows(const T *from, int64_t stride, int64_t rows, int64_t padded, int64_t width, T *to) {
    for (int64_t row = 0; row < rows; row++) std::memcpy(to + row * width, from + row * stride, width * sizeof(T));
    std::memset(to + rows * width, 0, (padded - rows) * width * sizeof(T));
}

template <class T>
void write_row(const float *numbers, int64_t stride, float factor, int64_t head_dim, T *to) {
    alignas(64) float row[MAX_HEAD_DIM];
    for (int64_t i = 0; i < head_dim; i++) row[i] = numbers[i * stride];
    for (int64_t i = 0; i < head_dim; i += LANES) store(load(row + i) * factor, to + i);
}

// ---- forward --------------------------------------------------------------------------------------------------------

// Turn a row of scores into e^(scale * score - largest), 0 from key `visible` on; return their sum and the largest.
template <class T>
void softmax_row(const float *scores, float scale, int64_t visible, int64_t end, T *probs, float &sum, float &largest) {
    constexpr float NEG_INF = -__builtin_inff();
    Floats most = Floats{} + NEG_INF, total{};
    for (int64_t i = 0; i < end; i += LANES) most = larger(mask_from(visible, load(scores + i) * scale, i, NEG_INF), most);
    largest = reduce(most, larger);
    for (int64_t i = 0; i < end; i += LANES) {
        const Floats prob = mask_from(visible, exponentials(load(scores + i) * scale - largest), i, 0);
        total += prob;
        store(prob, probs + i);
    }
    sum = reduce(total, add);
}

template <class T>
void attend_item(const Item &item, const T *query, const T *key, const T *value, float scale, T *attn_out, float *lse,
                 Memory memory) {
    const int64_t head_dim = item.head_dim, head_words = head_dim / PAIR<T>, padded = item.padded();
    auto *states = memory.array<T>(padded * head_dim);  // (padded, head_dim)
    const auto *state_words = reinterpret_cast<const uint32_t *>(states);
    auto *k_columns = memory.array<uint32_t>(head_words * padded);  // (head_words, padded)
    auto *v_rows = memory.array<uint32_t>(padded * head_words);     // (padded / PAIR, head_dim)
    auto *q_strip = memory.array<T>(ROWS * head_dim);
    auto *scores = memory.array<float>(ROWS * padded), *sums = memory.array<float>(ROWS * head_dim);
    auto *probs = memory.array<T>(ROWS * padded);
    const int64_t k_stride = item.kv_heads * head_dim, q_stride = item.heads * head_dim;
    copy_rows(key + item.key_row(0) * head_dim, k_stride, item.length, padded, head_dim, states);
    transpose(state_words, padded, head_words, k_columns);
    copy_rows(value + item.key_row(0) * head_dim, k_stride, item.length, padded, head_dim, states);
    pack_rows(states, padded, head_dim, v_rows, head_dim);
    for (int64_t token = item.first; token < item.length; token += ROWS) {
        const int64_t rows = std::min(ROWS, item.length - token), end = round_up(token + rows, KEY_BLOCK);
        for (int64_t group_head = 0; group_head < item.group(); group_head++) {
            const int64_t row = item.query_row(token, group_head);
            copy_rows(query + row * head_dim, q_stride, rows, ROWS, head_dim, q_strip);
            multiply(q_strip, ROWS, head_dim, k_columns, padded, end, scores, end);
            float sum[ROWS], largest;
            for (int64_t i = 0; i < rows; i++) {
                softmax_row(scores + i * end, scale, token + i + 1, end, probs + i * end, sum[i], largest);
                lse[row + i * item.heads] = largest + std::log(sum[i]);
            }
            multiply(probs, ROWS, end, v_rows, head_dim, head_dim, sums, head_dim);
            for (int64_t i = 0; i < rows; i++)
                write_row(sums + i * head_dim, 1, 1.0f / sum[i], head_dim, attn_out + row * head_dim + i * q_stride);
        }
    }
}

template <class T>
bool attend(const T *query, const T *key, const T *value, const int32_t *cu_q, const int32_t *cu_k, int64_t count,
            int64_t heads, int64_t kv_heads, int64_t head_dim, float scale, T *attn_out, float *lse) {
    const auto items = list_items(cu_q, cu_k, count, heads, kv_heads, head_dim);
    const int64_t longest = items.front().padded();
    return compute_items(items, 3 * longest * head_dim + ROWS * (2 * longest + 2 * head_dim), [=](auto &item, Memory memory) {
        attend_item(item, query, key, value, scale, attn_out, lse, memory);
    });
}

// ---- backward -------------------------------------------------------------------------------------------------------

// Of one row: compute the probabilities again, in the place of scores, and from their gradient that of scale * scores.
template <class T>
void softmax_backward_row(float *scores, float scale, const float *grad_probs, int64_t visible, int64_t end, float lse,
                          T *probs, T *grad_scores) {
    Floats total{};
    for (int64_t i = 0; i < end; i += LANES) {
        const Floats prob = mask_from(visible, exponentials(load(scores + i) * scale - lse), i, 0);
        total += prob * load(grad_probs + i);
        store(prob, scores + i);
        store(prob, probs + i);
    }
    const float mean = reduce(total, add);
    for (int64_t i = 0; i < end; i += LANES) store(load(scores + i) * (load(grad_probs + i) - mean), grad_scores + i);
}

// Gradients of one sample and key head: of queries strip by strip, of keys and values summed up over tiles of queries.
// `grad` is that of attn_out.
template <class T>
void attend_item_backward(const Item &item, const T *query, const T *key, const T *value, const T *grad,
                          const float *lse, float scale, T *grad_q, T *grad_k, T *grad_v, Memory memory) {
    const int64_t head_dim = item.head_dim, head_words = head_dim / PAIR<T>, padded = item.padded();
    auto *states = memory.array<T>(padded * head_dim);  // (padded, head_dim)
    const auto *state_words = reinterpret_cast<const uint32_t *>(states);
    auto *k_columns = memory.array<uint32_t>(head_words * padded);  // (head_words, padded)
    auto *v_columns = memory.array<uint32_t>(head_words * padded);  // (head_words, padded)
    auto *k_rows = memory.array<uint32_t>(padded * head_words);     // (padded / PAIR, head_dim)
    auto *k_sums = memory.array<float>(padded * head_dim);                  // (head_dim, padded), as v_sums
    auto *v_sums = memory.array<float>(padded * head_dim);
    auto *tile_q = memory.array<T>(TILE * head_dim), *tile_grad = memory.array<T>(TILE * head_dim);
    auto *transposed = memory.array<T>(TILE * head_dim);                 // (head_dim, TILE)
    auto *tile_probs = memory.array<uint32_t>(TILE / PAIR<T> * padded);  // (TILE / PAIR, padded)
    auto *tile_grad_scores = memory.array<uint32_t>(TILE / PAIR<T> * padded);
    auto *scores = memory.array<float>(ROWS * padded), *grad_probs = memory.array<float>(ROWS * padded);
    auto *probs = memory.array<T>(ROWS * padded), *grad_scores = memory.array<T>(ROWS * padded);
    auto *q_sums = memory.array<float>(ROWS * head_dim);
    const int64_t k_stride = item.kv_heads * head_dim, q_stride = item.heads * head_dim;
    copy_rows(value + item.key_row(0) * head_dim, k_stride, item.length, padded, head_dim, states);
    transpose(state_words, padded, head_words, v_columns);
    copy_rows(key + item.key_row(0) * head_dim, k_stride, item.length, padded, head_dim, states);
    transpose(state_words, padded, head_words, k_columns);
    pack_rows(states, padded, head_dim, k_rows, head_dim);
    std::fill(k_sums, k_sums + padded * head_dim, 0.0f);
    std::fill(v_sums, v_sums + padded * head_dim, 0.0f);

    for (int64_t start = item.first; start < item.length; start += TILE)
        for (int64_t group_head = 0; group_head < item.group(); group_head++) {
            const int64_t tile = std::min(TILE, item.length - start), tile_end = round_up(start + tile, KEY_BLOCK);
            const int64_t tile_rows = round_up(tile, ROWS), tile_row = item.query_row(start, group_head);
            copy_rows(query + tile_row * head_dim, q_stride, tile, tile_rows, head_dim, tile_q);
            copy_rows(grad + tile_row * head_dim, q_stride, tile, tile_rows, head_dim, tile_grad);
            std::fill(tile_probs, tile_probs + tile_rows / PAIR<T> * tile_end, 0);
            std::fill(tile_grad_scores, tile_grad_scores + tile_rows / PAIR<T> * tile_end, 0);
            for (int64_t first = 0; first < tile; first += ROWS) {  // a strip of the tile
                const int64_t rows = std::min(ROWS, tile - first), end = round_up(start + first + rows, KEY_BLOCK);
                multiply(tile_q + first * head_dim, ROWS, head_dim, k_columns, padded, end, scores, end);
                multiply(tile_grad + first * head_dim, ROWS, head_dim, v_columns, padded, end, grad_probs, end);
                for (int64_t i = 0; i < ROWS; i++) {  // those behind the end see nothing
                    const int64_t visible = i < rows ? start + first + i + 1 : 0;
                    const float row_lse = lse[tile_row + (first + std::min(i, rows - 1)) * item.heads];
                    softmax_backward_row(scores + i * end, scale, grad_probs + i * end, visible, end, row_lse,
                                         probs + i * end, grad_scores + i * end);
                }
                pack_rows(probs, ROWS, end, tile_probs + first / PAIR<T> * tile_end, tile_end);
                pack_rows(grad_scores, ROWS, end, tile_grad_scores + first / PAIR<T> * tile_end, tile_end);
                multiply(grad_scores, ROWS, end, k_rows, head_dim, head_dim, q_sums, head_dim);
                for (int64_t i = 0; i < rows; i++)
                    write_row(q_sums + i * head_dim, 1, scale, head_dim,
                              grad_q + tile_row * head_dim + (first + i) * q_stride);
            }
            transpose(tile_q, tile_rows, head_dim, transposed);
            multiply(transposed, head_dim, tile_rows, tile_grad_scores, tile_end, tile_end, k_sums, padded, true);
            transpose(tile_grad, tile_rows, head_dim, transposed);
            multiply(transposed, head_dim, tile_rows, tile_probs, tile_end, tile_end, v_sums, padded, true);
        }

    for (int64_t token = 0; token < item.length; token++) {
        write_row(k_sums + token, padded, scale, head_dim, grad_k + item.key_row(token) * head_dim);
        write_row(v_sums + token, padded, 1.0f, head_dim, grad_v + item.key_row(token) * head_dim);
    }
}

template <class T>
bool attend_backward(const T *query, const T *key, const T *value, const T *grad, const float *lse,
                     const int32_t *cu_q, const int32_t *cu_k, int64_t count, int64_t heads, int64_t kv_heads,
                     int64_t head_dim, float scale, T *grad_q, T *grad_k, T *grad_v) {
    const auto items = list_items(cu_q, cu_k, count, heads, kv_heads, head_dim);
    const int64_t longest = items.front().padded();
    const int64_t words = 6 * longest * head_dim + TILE * (2 * longest + 3 * head_dim) + ROWS * (4 * longest + head_dim);
    return compute_items(items, words, [=](const Item &item, Memory memory) {
        attend_item_backward(item, query, key, value, grad, lse, scale, grad_q, grad_k, grad_v, memory);
    });
}

}  // namespace

// Functions that Python finds by name, as pointers.
extern "C" {
auto *attend_float32 = attend<float>;
auto *attend_backward_float32 = attend_backward<float>;
#ifdef __AVX512BF16__
auto *attend_bfloat16 = attend<bf16>;
auto *attend_backward_bfloat16 = attend_backward<bf16>;
#endif
}
