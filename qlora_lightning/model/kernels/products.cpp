// Products with weights in 4 bits, and with the thin matrix of an adapter, in bfloat16.
//
// A thread takes some of the columns: their part of the weight is made dense in its cache, in pairs along the depth of
// the product, meets all rows, and is never seen again. Everything that a result is the sum of is summed up in float32
// and rounded once.

#include <algorithm>

#include <omp.h>

#include "vectors.h"

#ifdef __AVX512BF16__

namespace {

constexpr int64_t PANEL = VECTORS * LANES;  // columns of a block of sums
constexpr int64_t MOST_WORDS = 96 * 1024;   // of a weight that are dense at a time, if more than one panel
constexpr int64_t LEAST_PANELS = 4;         // of a thread, before threads share out rows too

// A weight W (out, in) as bitsandbytes keeps it, and the left factor of its product, (rows, depth).
struct Weight {
    const bf16 *left;
    int64_t by_row;
    const uint8_t *packed;  // two numbers a byte, the first in the upper half
    int64_t outputs, inputs;
    const float *table;   // the 16 values
    const float *scales;  // of each block of numbers, or none: then
    const uint8_t *codes;
    const float *scale_table, *scale_scales;  // scale = scale_table[code] * scale_scales[at] + offset
    int64_t block, block_of_scales;  // numbers with one scale, scales with one of their own
    double offset;

    // The 16 values of a block, each in the lower half of a word.
    Words values(int64_t number) const {
        const int64_t at = number / block;
        float scale;
        if (scales) {
            scale = scales[at];
        } else {
            const float product = scale_table[codes[at]] * scale_scales[at / block_of_scales];
            scale = static_cast<float>(static_cast<double>(product) + offset);
        }
        Words bits = reinterpret_cast<Words>(load(table) * scale);
        return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    }

    Words bytes(int64_t number) const {
        uint8_t from __attribute__((vector_size(LANES)));
        std::memcpy(&from, packed + number / 2, LANES);
        return __builtin_convertvector(from, Words);
    }
};

// What an adapter adds: low (rows, rank) times its matrix.
struct Adapter {
    const bf16 *low;
    int64_t by_row, rank;
    const bf16 *matrix;
    float scaling;
};

// Of W^T, whose depth is W's inputs: columns [first, first + PANEL), words along the depth.
void pack_panel(const Weight &weight, int64_t first, uint32_t *to) {
    for (int64_t group = 0; group < PANEL; group += LANES)
        for (int64_t start = 0; start < weight.inputs; start += weight.block) {
            const int64_t number = (first + group) * weight.inputs + start;
            Words values[LANES];
            for (int64_t i = 0; i < LANES; i++) values[i] = weight.values(number + i * weight.inputs);
            for (int64_t k = 0; k < weight.block; k += 2 * LANES) {
                Words words[LANES];
                for (int64_t i = 0; i < LANES; i++) {
                    const Words bytes = weight.bytes(number + i * weight.inputs + k);
                    words[i] = __builtin_shuffle(values[i], bytes >> 4) | __builtin_shuffle(values[i], bytes & 15) << 16;
                }
                transpose(words);
                for (int64_t i = 0; i < LANES; i++)
                    std::memcpy(to + ((start + k) / 2 + i) * PANEL + group, &words[i], sizeof(Words));
            }
        }
}

// Of W, whose depth is its outputs: likewise.
void pack_panel_turned(const Weight &weight, int64_t first, uint32_t *to) {
    static const Words lower{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
    static const Words upper{8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    for (int64_t row = 0; row < weight.outputs; row += 2) {
        const int64_t number = row * weight.inputs + first, next = number + weight.inputs;
        const Words values = weight.values(number), bytes = weight.bytes(number);
        const Words values_below = weight.values(next), bytes_below = weight.bytes(next);
        const Words even = __builtin_shuffle(values, bytes >> 4) | __builtin_shuffle(values_below, bytes_below >> 4) << 16;
        const Words odd = __builtin_shuffle(values, bytes & 15) | __builtin_shuffle(values_below, bytes_below & 15) << 16;
        const Words pairs = __builtin_shuffle(even, odd, lower), more = __builtin_shuffle(even, odd, upper);
        std::memcpy(to + row / 2 * PANEL, &pairs, sizeof pairs);
        std::memcpy(to + row / 2 * PANEL + LANES, &more, sizeof more);
    }
}

void pack_adapter(const Adapter &adapter, bool turned, int64_t columns, int64_t first, uint32_t *to) {
    for (int64_t k = 0; k < adapter.rank; k += 2)
        for (int64_t i = 0; i < PANEL; i++) {
            const bf16 *at = turned ? adapter.matrix + k * columns + first + i : adapter.matrix + (first + i) * adapter.rank + k;
            to[k / 2 * PANEL + i] = pair(at[0], at[turned ? columns : 1]);
        }
}

template <int64_t COUNT>
inline void add_product(Floats (&sums)[COUNT][VECTORS], const bf16 *left, int64_t by_row, int64_t depth,
                        const uint32_t *right) {
    for (int64_t k = 0; k < depth / 2; k++) {
        Words part[VECTORS];
        for (int64_t i = 0; i < VECTORS; i++) part[i] = load_words(right + k * PANEL + i * LANES);
        for (int64_t row = 0; row < COUNT; row++) {
            uint32_t word;
            std::memcpy(&word, left + row * by_row + 2 * k, sizeof word);
            for (int64_t i = 0; i < VECTORS; i++) sums[row][i] = multiply_add<bf16>(word, part[i], sums[row][i]);
        }
    }
}

struct Product {
    const Weight *weights;
    int64_t count;
    bool turned;
    Adapter adapter;
    const bf16 *bias, *residual;
    bf16 *to;
    int64_t rows, columns;

    int64_t depth_of(const Weight &weight) const { return turned ? weight.outputs : weight.inputs; }

    int64_t depth() const {
        int64_t sum = adapter.rank;
        for (int64_t i = 0; i < count; i++) sum += depth_of(weights[i]);
        return sum;
    }

    void pack(int64_t first, uint32_t *panel) const {
        pack_adapter(adapter, turned, columns, first, panel);
        panel += adapter.rank / 2 * PANEL;
        for (int64_t i = 0; i < count; i++) {
            (turned ? pack_panel_turned : pack_panel)(weights[i], first, panel);
            panel += depth_of(weights[i]) / 2 * PANEL;
        }
    }

    template <int64_t COUNT>
    void block(int64_t row, int64_t first, const uint32_t *panel) const {
        Floats sums[COUNT][VECTORS] = {};
        if (adapter.rank) {
            add_product<COUNT>(sums, adapter.low + row * adapter.by_row, adapter.by_row, adapter.rank, panel);
            for (auto &sum : sums)
                for (Floats &part : sum) part *= adapter.scaling;
            panel += adapter.rank / 2 * PANEL;
        }
        for (int64_t i = 0; i < count; i++) {
            const Weight &weight = weights[i];
            add_product<COUNT>(sums, weight.left + row * weight.by_row, weight.by_row, depth_of(weight), panel);
            panel += depth_of(weight) / 2 * PANEL;
        }
        for (int64_t each = 0; each < COUNT; each++)
            for (int64_t i = 0; i < VECTORS; i++) {
                const int64_t column = first + i * LANES, at = (row + each) * columns + column;
                Floats sum = sums[each][i];
                if (bias) sum += load(bias + column);
                if (residual) sum += load(residual + at);
                store(sum, to + at);
            }
    }
};

void run(const Product &product) {
    const int64_t panels = product.columns / PANEL, words = product.depth() / 2 * PANEL;
    const int64_t together = std::max<int64_t>(1, MOST_WORDS / words);
#pragma omp parallel
    {
        const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
        int64_t wide = threads;  // threads that share out columns; the others take other rows of the same
        while (wide > 1 && (threads % wide || panels < wide * LEAST_PANELS)) wide--;
        const int64_t high = threads / wide, strips = (product.rows + ROWS - 1) / ROWS;
        const int64_t begin = panels * (thread % wide) / wide, end = panels * (thread % wide + 1) / wide;
        const int64_t top = strips * (thread / wide) / high * ROWS;
        const int64_t bottom = std::min(product.rows, strips * (thread / wide + 1) / high * ROWS);
        uint32_t *dense = scratch(together * words);
        for (int64_t start = begin; start < end; start += together) {
            const int64_t stop = std::min(end, start + together);
            for (int64_t panel = start; panel < stop; panel++)
                product.pack(panel * PANEL, dense + (panel - start) * words);
            for (int64_t row = top; row < bottom; row += ROWS)
                for (int64_t panel = start; panel < stop; panel++) {
                    const uint32_t *right = dense + (panel - start) * words;
                    if (row + ROWS <= bottom)
                        product.block<ROWS>(row, panel * PANEL, right);
                    else
                        for (int64_t single = row; single < bottom; single++)
                            product.block<1>(single, panel * PANEL, right);
                }
        }
    }
}

}  // namespace

extern "C" void multiply_bfloat16(const Weight *weights, int64_t count, int64_t turned, const bf16 *low, int64_t by_row,
                                  int64_t rank, const bf16 *matrix, float scaling, const bf16 *bias,
                                  const bf16 *residual, bf16 *to, int64_t rows, int64_t columns) {
    run({weights, count, turned != 0, {low, by_row, rank, matrix, scaling}, bias, residual, to, rows, columns});
}

#endif
