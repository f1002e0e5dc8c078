// Products with the thin matrices of adapters, in bfloat16: wide (rows, width) with a matrix (rank, width) along their
// rows, and a thin one (rows, rank) with wide along the rows of both. Where both are asked for, wide is read once.
//
// Rows are shared out in as many parts whatever the threads; each part's sum over its rows is kept in float32, and the
// parts are added up in order.

#include <algorithm>
#include <atomic>

#include "vectors.h"

#ifdef __AVX512BF16__

namespace {

constexpr int64_t PARTS = 16;
constexpr int64_t CHUNK = 128;            // rows that stay in the cache from the first product to the second
constexpr int64_t GROUP = 8;              // of the rank, at a time: their sums fit into the registers
constexpr int64_t PANEL = 2 * LANES;      // numbers of a vector

struct Wide {
    const bf16 *numbers;
    int64_t by_row, rows, width;
};

struct Matrix {  // number (rank, column) at rank * by_rank + column * by_column
    float *numbers;
    int64_t by_rank, by_column;
};

struct Low {
    bf16 *numbers;
    int64_t by_row;
};

// low[row] = factor * wide[row] · matrix, for COUNT rows and a group of the rank.
template <int64_t COUNT>
void narrow(const bf16 *wide, int64_t by_row, const bf16 *matrix, int64_t width, int64_t ranks, float factor, bf16 *low,
            int64_t by_low) {
    Floats sums[COUNT][GROUP] = {};
    for (int64_t i = 0; i < width; i += PANEL) {
        Words part[COUNT];
        for (int64_t row = 0; row < COUNT; row++) part[row] = load_words(wide + row * by_row + i);
        for (int64_t rank = 0; rank < GROUP; rank++) {
            const Words other = load_words(matrix + rank * width + i);
            for (int64_t row = 0; row < COUNT; row++)
                sums[row][rank] = multiply_add(part[row], other, sums[row][rank]);
        }
    }
    for (int64_t row = 0; row < COUNT; row++)
        for (int64_t rank = 0; rank < ranks; rank++)
            write(low[row * by_low + rank], _mm512_reduce_add_ps(reinterpret_cast<__m512>(sums[row][rank])) * factor);
}

// sums (GROUP, PANEL) += low^T wide; low in pairs of rows, (pairs, GROUP). Even columns come first, then the odd ones.
void add_partner(const uint32_t *low, int64_t by_pair, const bf16 *wide, int64_t by_row, int64_t pairs, float *to,
                 int64_t by_rank) {
    Floats even[GROUP], odd[GROUP];
    for (int64_t rank = 0; rank < GROUP; rank++)
        even[rank] = load(to + rank * by_rank), odd[rank] = load(to + rank * by_rank + LANES);
    for (int64_t k = 0; k < pairs; k++) {
        const Words first = load_words(wide + 2 * k * by_row), second = load_words(wide + (2 * k + 1) * by_row);
        const Words of_even = (first & 0xffff) | (second << 16), of_odd = (first >> 16) | (second & 0xffff0000);
        for (int64_t rank = 0; rank < GROUP; rank++) {
            even[rank] = multiply_add<bf16>(low[k * by_pair + rank], of_even, even[rank]);
            odd[rank] = multiply_add<bf16>(low[k * by_pair + rank], of_odd, odd[rank]);
        }
    }
    for (int64_t rank = 0; rank < GROUP; rank++)
        store(even[rank], to + rank * by_rank), store(odd[rank], to + rank * by_rank + LANES);
}

struct Thin {
    Wide wide;
    Matrix matrix;  // for narrowed, or none
    int64_t rank;
    float factor;
    Low narrowed, low;
    float *parts;    // (PARTS, rank filled up, width)
    Matrix partner;  // low^T wide, or none

    int64_t filled() const { return round_up(rank, GROUP); }

    bool run() const {
        std::atomic<bool> fits{true};
#pragma omp parallel
        {
            bf16 *rounded = reinterpret_cast<bf16 *>(scratch(filled() * (wide.width + CHUNK) / 2));
            if (!rounded) fits = false;
#pragma omp barrier
            if (fits) share_out(rounded);
        }
        return fits;
    }

    // What each of the threads does, with memory of its own.
    void share_out(bf16 *rounded) const {
        const int64_t of_part = round_up((wide.rows + PARTS - 1) / PARTS, 2);
        uint32_t *pairs = reinterpret_cast<uint32_t *>(rounded + filled() * wide.width);
        if (matrix.numbers) round(rounded);
#pragma omp for schedule(static)
        for (int64_t part = 0; part < PARTS; part++) {
            const int64_t end = std::min(wide.rows, (part + 1) * of_part);
            float *sums = parts + part * filled() * wide.width;
            if (partner.numbers) std::fill(sums, sums + filled() * wide.width, 0.0f);
            for (int64_t row = part * of_part; row < end; row += CHUNK) {
                const int64_t count = std::min(CHUNK, end - row);
                if (matrix.numbers) narrow_chunk(row, count, rounded);
                if (partner.numbers) add_partner_of_chunk(row, count, pairs, sums);
            }
        }
        if (partner.numbers) {
#pragma omp for schedule(static)
            for (int64_t panel = 0; panel < wide.width / PANEL; panel++) sum_up(panel * PANEL);
        }
    }

    void round(bf16 *to) const {
        for (int64_t each = 0; each < filled(); each++)
            for (int64_t i = 0; i < wide.width; i++)
                write(to[each * wide.width + i],
                      each < rank ? matrix.numbers[each * matrix.by_rank + i * matrix.by_column] : 0.0f);
    }

    void narrow_chunk(int64_t first, int64_t count, const bf16 *rounded) const {
        for (int64_t row = first; row < first + count; row += 2)
            for (int64_t start = 0; start < rank; start += GROUP) {
                const bf16 *from = wide.numbers + row * wide.by_row, *other = rounded + start * wide.width;
                bf16 *to = narrowed.numbers + row * narrowed.by_row + start;
                const int64_t ranks = std::min(GROUP, rank - start);
                (row + 1 < first + count ? narrow<2> : narrow<1>)(from, wide.by_row, other, wide.width, ranks, factor, to,
                                                                  narrowed.by_row);
            }
    }

    void add_partner_of_chunk(int64_t first, int64_t count, uint32_t *pairs, float *sums) const {
        for (int64_t k = 0; k < (count + 1) / 2; k++)
            for (int64_t each = 0; each < filled(); each++) {
                const bf16 *at = low.numbers + (first + 2 * k) * low.by_row + each;
                const bool is_there = each < rank, has_next = is_there && 2 * k + 1 < count;
                pairs[k * filled() + each] = pair(is_there ? at[0] : bf16{}, has_next ? at[low.by_row] : bf16{});
            }
        // of an odd row at the end the partner is itself, times zero: it may not be a number, and is then none alone
        for (int64_t start = 0; start < filled(); start += GROUP)
            for (int64_t column = 0; column < wide.width; column += PANEL) {
                const bf16 *from = wide.numbers + first * wide.by_row + column;
                float *to = sums + start * wide.width + column;
                add_partner(pairs + start, filled(), from, wide.by_row, count / 2, to, wide.width);
                if (count % 2)
                    add_partner(pairs + count / 2 * filled() + start, filled(), from + (count - 1) * wide.by_row, 0, 1, to,
                                wide.width);
            }
    }

    void sum_up(int64_t column) const {
        for (int64_t each = 0; each < rank; each++)
            for (int64_t half = 0; half < 2; half++) {
                Floats sum{};
                for (int64_t part = 0; part < PARTS; part++)
                    sum += load(parts + (part * filled() + each) * wide.width + column + half * LANES);
                for (int64_t i = 0; i < LANES; i++) {
                    const int64_t at = column + 2 * i + half;
                    partner.numbers[each * partner.by_rank + at * partner.by_column] = sum[i] * factor;
                }
            }
    }
};

}  // namespace

extern "C" int thin_bfloat16(const bf16 *wide, int64_t by_row, int64_t rows, int64_t width, float *matrix, int64_t by_rank,
                             int64_t by_column, int64_t rank, float factor, bf16 *narrowed, int64_t by_narrowed, bf16 *low,
                             int64_t by_low, float *parts, float *partner, int64_t partner_by_rank,
                             int64_t partner_by_column) {
    return Thin{{wide, by_row, rows, width},
                {matrix, by_rank, by_column},
                rank,
                factor,
                {narrowed, by_narrowed},
                {low, by_low},
                parts,
                {partner, partner_by_rank, partner_by_column}}
        .run();
}

#endif
