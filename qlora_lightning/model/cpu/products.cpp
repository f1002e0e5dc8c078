// Products with frozen weights, in 4 bits or dense, and with the thin matrix of an adapter, in bfloat16.
//
// A thread takes some of the columns: their part of the weight is laid into its cache, dense and in pairs along the
// depth of the product, meets all rows, and is never seen again. Everything that a result is the sum of is summed up in
// float32 and rounded once.

#include <algorithm>
#include <atomic>

#include <omp.h>

#include "vectors.h"

#ifdef __AVX512BF16__

namespace {

constexpr int64_t PANEL = VECTORS * LANES;  // columns of a block of sums
constexpr int64_t MOST_DEPTH = 1536;        // of a product that is summed up in one sweep over the rows
constexpr int64_t MOST_WORDS = 96 * 1024;   // of a weight that are in the cache at a time, if more than one panel
constexpr int64_t LEAST_PANELS = 4;         // of a thread, before threads share out rows too

// A weight W (out, in), dense or as bitsandbytes keeps it, and the left factor of its product, (rows, depth).
struct Weight {
    const bf16 *left;
    int64_t by_row;
    const void *numbers;  // dense ones, or two a byte, the first in the upper half
    int64_t outputs, inputs;
    const float *table;   // the 16 values, or none of a dense weight
    const float *scales;  // of each block of numbers, or none: then
    const uint8_t *codes;
    const float *scale_table, *scale_scales;  // scale = scale_table[code] * scale_scales[at] + offset
    int64_t block, block_of_scales;  // numbers with one scale, scales with one of their own
    double offset;

    // The 16 values of a block, each in the lower half of a word.
    Words values(int64_t number) const {
        if (!table) return Words{};
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

    // Numbers that lie beside each other, PANEL of them: the first, third and so on, and those behind each.
    struct Neighbours {
        Words first, second;  // in the lower halves
    };

    Neighbours read(int64_t number, Words values) const {
        if (!table) {
            const Words pairs = load_words(static_cast<const bf16 *>(numbers) + number);
            return {pairs & 0xffff, pairs >> 16};
        }
        uint8_t from __attribute__((vector_size(LANES)));
        std::memcpy(&from, static_cast<const uint8_t *>(numbers) + number / 2, LANES);
        const Words bytes = __builtin_convertvector(from, Words);
        return {__builtin_shuffle(values, bytes >> 4), __builtin_shuffle(values, bytes & 15)};
    }
};

// What of a weight belongs to a sweep: [start, stop) along the depth.
struct Stretch {
    const Weight *weight;
    int64_t start, stop;
};

// What an adapter adds: x A^T (rows, rank) times its other matrix.
struct Adapter {
    const bf16 *xa;
    int64_t by_row, rank;
    const bf16 *matrix;
    float scaling;
};

// Of W^T, whose depth is W's inputs: columns [first, first + PANEL), words along the depth.
void pack_panel(const Stretch &stretch, int64_t first, uint32_t *to) {
    const Weight &weight = *stretch.weight;
    for (int64_t group = 0; group < PANEL; group += LANES)
        for (int64_t start = stretch.start; start < stretch.stop; start += weight.block) {
            const int64_t number = (first + group) * weight.inputs + start;
            Words values[LANES];
            for (int64_t i = 0; i < LANES; i++) values[i] = weight.values(number + i * weight.inputs);
            for (int64_t k = 0; k < weight.block; k += 2 * LANES) {
                Words words[LANES];
                for (int64_t i = 0; i < LANES; i++) {
                    const Weight::Neighbours read = weight.read(number + i * weight.inputs + k, values[i]);
                    words[i] = read.first | read.second << 16;
                }
                transpose(words);
                for (int64_t i = 0; i < LANES; i++)
                    std::memcpy(to + ((start - stretch.start + k) / 2 + i) * PANEL + group, &words[i], sizeof(Words));
            }
        }
}

// Of W, whose depth is its outputs: likewise, for the gradient of the input.
void pack_panel_backward(const Stretch &stretch, int64_t first, uint32_t *to) {
    static const Words lower{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
    static const Words upper{8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const Weight &weight = *stretch.weight;
    for (int64_t row = stretch.start; row < stretch.stop; row += 2) {
        const int64_t number = row * weight.inputs + first, below = number + weight.inputs;
        const Weight::Neighbours read = weight.read(number, weight.values(number));
        const Weight::Neighbours read_below = weight.read(below, weight.values(below));
        const Words even = read.first | read_below.first << 16, odd = read.second | read_below.second << 16;
        const Words pairs = __builtin_shuffle(even, odd, lower), more = __builtin_shuffle(even, odd, upper);
        std::memcpy(to, &pairs, sizeof pairs);
        std::memcpy(to + LANES, &more, sizeof more);
        to += PANEL;
    }
}

void pack_adapter(const Adapter &adapter, bool backward, int64_t columns, int64_t first, uint32_t *to) {
    for (int64_t k = 0; k < adapter.rank; k += 2)
        for (int64_t i = 0; i < PANEL; i++) {
            const bf16 *at = backward ? adapter.matrix + k * columns + first + i : adapter.matrix + (first + i) * adapter.rank + k;
            to[k / 2 * PANEL + i] = pair(at[0], at[backward ? columns : 1]);
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

// Parts of a product that are summed up in registers while all rows pass by.
struct Sweep {
    std::vector<Stretch> stretches;
    bool is_first, is_last;
    int64_t words;  // of a panel
};

struct Product {
    const Weight *weights;
    int64_t count;
    bool backward;
    Adapter adapter;
    const bf16 *bias, *residual;
    bf16 *to;
    int64_t rows, columns;

    std::vector<Sweep> sweeps() const {
        std::vector<Sweep> made;
        int64_t room = 0;
        for (const Weight *weight = weights; weight < weights + count; weight++) {
            const int64_t depth = backward ? weight->outputs : weight->inputs;
            const int64_t step = backward ? 2 : weight->block;  // a block has one scale
            for (int64_t start = 0, stop; start < depth; start = stop) {
                if (room < step) {
                    made.push_back({{}, made.empty(), false, made.empty() ? adapter.rank / 2 * PANEL : 0});
                    room = std::max(MOST_DEPTH, step);
                }
                stop = std::min(depth, start + room / step * step);
                made.back().stretches.push_back({weight, start, stop});
                made.back().words += (stop - start) / 2 * PANEL;
                room -= stop - start;
            }
        }
        made.back().is_last = true;
        return made;
    }

    void pack(const Sweep &sweep, int64_t first, uint32_t *panel) const {
        if (sweep.is_first) {
            pack_adapter(adapter, backward, columns, first, panel);
            panel += adapter.rank / 2 * PANEL;
        }
        for (const Stretch &stretch : sweep.stretches) {
            (backward ? pack_panel_backward : pack_panel)(stretch, first, panel);
            panel += (stretch.stop - stretch.start) / 2 * PANEL;
        }
    }

    // Rows [row, row + COUNT), columns [first, first + PANEL); kept: their sums between sweeps.
    template <int64_t COUNT>
    void block(const Sweep &sweep, int64_t row, int64_t first, const uint32_t *panel, float *kept, int64_t by_row) const {
        Floats sums[COUNT][VECTORS] = {};
        if (!sweep.is_first) {
            for (int64_t each = 0; each < COUNT; each++)
                for (int64_t i = 0; i < VECTORS; i++) sums[each][i] = load(kept + each * by_row + i * LANES);
        } else if (adapter.rank) {
            add_product<COUNT>(sums, adapter.xa + row * adapter.by_row, adapter.by_row, adapter.rank, panel);
            for (auto &sum : sums)
                for (Floats &part : sum) part *= adapter.scaling;
            panel += adapter.rank / 2 * PANEL;
        }
        for (const Stretch &stretch : sweep.stretches) {
            const int64_t by_left = stretch.weight->by_row, depth = stretch.stop - stretch.start;
            add_product<COUNT>(sums, stretch.weight->left + row * by_left + stretch.start, by_left, depth, panel);
            panel += depth / 2 * PANEL;
        }
        for (int64_t each = 0; each < COUNT; each++)
            for (int64_t i = 0; i < VECTORS; i++) {
                const int64_t column = first + i * LANES, at = (row + each) * columns + column;
                Floats sum = sums[each][i];
                if (!sweep.is_last) {
                    store(sum, kept + each * by_row + i * LANES);
                    continue;
                }
                if (bias) sum += load(bias + column);
                if (residual) sum += load(residual + at);
                store(sum, to + at);
            }
    }
};

bool multiply(const Weight *weights, int64_t count, int64_t backward, const bf16 *xa, int64_t by_row_of_xa, int64_t rank,
              const bf16 *matrix, float scaling, const bf16 *bias, const bf16 *residual, bf16 *to, int64_t rows,
              int64_t columns) {
    const Product product{weights, count, backward != 0, {xa, by_row_of_xa, rank, matrix, scaling}, bias, residual, to,
                          rows, columns};
    std::atomic<bool> fits{true};
    const std::vector<Sweep> sweeps = product.sweeps();
    int64_t words = 0;
    for (const Sweep &sweep : sweeps) words = std::max(words, sweep.words);
    const int64_t panels = product.columns / PANEL, together = std::max<int64_t>(1, MOST_WORDS / words);
#pragma omp parallel
    {
        const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
        int64_t wide = threads;  // threads that share out columns; the others take other rows of the same
        while (wide > 1 && (threads % wide || panels < wide * LEAST_PANELS)) wide--;
        const int64_t high = threads / wide, strips = (product.rows + ROWS - 1) / ROWS;
        const int64_t begin = panels * (thread % wide) / wide, end = panels * (thread % wide + 1) / wide;
        const int64_t top = strips * (thread / wide) / high * ROWS;
        const int64_t bottom = std::min(product.rows, strips * (thread / wide + 1) / high * ROWS);
        const int64_t by_row = together * PANEL, to_keep = sweeps.size() > 1 ? (bottom - top) * by_row : 0;
        uint32_t *dense = scratch(together * words + to_keep);
        if (!dense) fits = false;
        float *kept = reinterpret_cast<float *>(dense + together * words);
        for (int64_t start = begin; dense && start < end; start += together) {
            const int64_t stop = std::min(end, start + together);
            for (const Sweep &sweep : sweeps) {
                for (int64_t panel = start; panel < stop; panel++)
                    product.pack(sweep, panel * PANEL, dense + (panel - start) * words);
                for (int64_t row = top; row < bottom; row += ROWS)
                    for (int64_t panel = start; panel < stop; panel++) {
                        const uint32_t *right = dense + (panel - start) * words;
                        float *sums = kept + (row - top) * by_row + (panel - start) * PANEL;
                        if (row + ROWS <= bottom)
                            product.block<ROWS>(sweep, row, panel * PANEL, right, sums, by_row);
                        else
                            for (int64_t single = row; single < bottom; single++, sums += by_row)
                                product.block<1>(sweep, single, panel * PANEL, right, sums, by_row);
                    }
            }
        }
    }
    return fits;
}

}  // namespace

EXPORT(multiply_bfloat16, multiply)

#endif
