// Vectors of float32, and products of float32 or of pairs of bfloat16 that are summed up in them.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#ifdef __AVX512BF16__
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

// A function under a name that Python finds: a pointer to it. It returns whether there was memory for it.
#define EXPORT(NAME, ...) extern "C" { auto *NAME = __VA_ARGS__; }

namespace {

struct bf16 {
    uint16_t bits;
};

#ifdef __AVX512F__
constexpr int64_t LANES = 16, VECTORS = 2;
#else
constexpr int64_t LANES = 8, VECTORS = 1;
#endif
template <class T>
constexpr int64_t ROWS = 8;  // sums of so many rows, VECTORS wide, fit into the registers

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES), aligned(4)));

inline Floats load(const float *from) {
    Floats numbers;
    std::memcpy(&numbers, from, sizeof numbers);
    return numbers;
}

inline Words load_words(const void *from) {
    Words words;
    std::memcpy(&words, from, sizeof words);
    return words;
}

inline void store(Floats numbers, float *to) { std::memcpy(to, &numbers, sizeof numbers); }

#ifdef __AVX512BF16__
inline void store(Floats numbers, bf16 *to) {
    const __m256bh rounded = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(numbers));
    std::memcpy(to, &rounded, sizeof rounded);
}
#endif

// Where one of them is NaN: the right one.
inline Floats larger(Floats left, Floats right) { return left > right ? left : right; }

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

// Products take 32 bits of each factor at a time: a float, or a pair of bfloat16 along the depth of the product.
template <class T>
constexpr int64_t PAIR = sizeof(uint32_t) / sizeof(T);

template <class T>
Floats multiply_add(uint32_t left, Words right, Floats sum);

template <>
inline Floats multiply_add<float>(uint32_t left, Words right, Floats sum) {
    float factor;
    std::memcpy(&factor, &left, sizeof factor);
    return sum + factor * reinterpret_cast<Floats>(right);
}

#ifdef __AVX512BF16__
template <>
inline Floats multiply_add<bf16>(uint32_t left, Words right, Floats sum) {
    const auto pairs = reinterpret_cast<__m512bh>(_mm512_set1_epi32(left));
    return reinterpret_cast<Floats>(
        _mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), pairs, reinterpret_cast<__m512bh>(right)));
}
#endif

// Configures the tiles of Intel's AMX while it exists, where products of T take them; then restores the configuration that
// another library had.
template <class T>
struct Tiles {
    Tiles() {}
    static bool allowed() { return true; }
};

#ifdef __AMX_BF16__
template <>
constexpr int64_t ROWS<bf16> = 16;  // of a tile

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 32, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 8};
};

template <>
struct Tiles<bf16> {
    Tiles() {
        const TileConfig config;
        _tile_storeconfig(&before_);
        _tile_loadconfig(&config);
    }
    ~Tiles() { _tile_loadconfig(&before_); }

    // Linux gives a process the tiles if it asks: ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA.
    static bool allowed() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

   private:
    TileConfig before_;
};
#endif

constexpr Words count_up() {
    Words numbers{};
    for (int i = 0; i < LANES; i++) numbers[i] = i;
    return numbers;
}

// Lay two rows into pairs; of floats there is one.
inline void pack(const float *first, const float *, uint32_t *to, int64_t width) {
    std::memcpy(to, first, width * sizeof(float));
}

inline void pack(const bf16 *first, const bf16 *second, uint32_t *to, int64_t width) {
#pragma omp simd
    for (int64_t i = 0; i < width; i++) to[i] = first[i].bits | static_cast<uint32_t>(second[i].bits) << 16;
}

inline int64_t round_up(int64_t number, int64_t step) { return (number + step - 1) / step * step; }

}  // namespace
