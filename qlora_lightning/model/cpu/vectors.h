// Vectors of float32, and products of float32 or of pairs of bfloat16 that are summed up in them.

#pragma once

#include <new>
#include <vector>

#include "numbers.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

#ifdef __AVX512F__
constexpr int64_t LANES = 16, VECTORS = 2;
#else
constexpr int64_t LANES = 8, VECTORS = 1;
#endif
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

inline Floats load(const bf16 *from) {
    uint16_t bits __attribute__((vector_size(2 * LANES)));
    std::memcpy(&bits, from, sizeof bits);
    return reinterpret_cast<Floats>(__builtin_convertvector(bits, Words) << 16);
}

inline void store(Floats numbers, float *to) { std::memcpy(to, &numbers, sizeof numbers); }

inline void store(Floats numbers, bf16 *to) {
#ifdef __AVX512BF16__
    const __m256bh rounded = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(numbers));
    std::memcpy(to, &rounded, sizeof rounded);
#else
    for (int64_t i = 0; i < LANES; i++) write(to[i], numbers[i]);
#endif
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
inline Floats multiply_add(Words left, Words right, Floats sum) {
    return reinterpret_cast<Floats>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(left),
                                                     reinterpret_cast<__m512bh>(right)));
}

template <>
inline Floats multiply_add<bf16>(uint32_t left, Words right, Floats sum) {
    return multiply_add(reinterpret_cast<Words>(_mm512_set1_epi32(left)), right, sum);
}
#endif

constexpr Words count_up() {
    Words numbers{};
    for (int i = 0; i < LANES; i++) numbers[i] = i;
    return numbers;
}

// Exchange rows and columns: in turn of blocks of 1, 2, 4 and so on, the upper right with the lower left.
template <int SIZE = 1>
inline void transpose(Words (&rows)[LANES]) {
    const Words lane = count_up(), is_right = Words{} - (lane & SIZE) / SIZE;
    const Words upper = (lane & ~is_right) | ((lane - SIZE + LANES) & is_right);
    const Words lower = ((lane + SIZE) & ~is_right) | ((lane + LANES) & is_right);
    for (int64_t i = 0; i < LANES; i++)
        if (!(i & SIZE)) {
            const Words first = rows[i], second = rows[i + SIZE];
            rows[i] = __builtin_shuffle(first, second, upper);
            rows[i + SIZE] = __builtin_shuffle(first, second, lower);
        }
    if constexpr (2 * SIZE < LANES) transpose<2 * SIZE>(rows);
}

inline uint32_t pair(bf16 first, bf16 second) { return first.bits | static_cast<uint32_t>(second.bits) << 16; }

// Lay two rows into pairs; of floats there is one.
inline void pack(const float *first, const float *, uint32_t *to, int64_t width) {
    std::memcpy(to, first, width * sizeof(float));
}

inline void pack(const bf16 *first, const bf16 *second, uint32_t *to, int64_t width) {
#pragma omp simd
    for (int64_t i = 0; i < width; i++) to[i] = pair(first[i], second[i]);
}

inline int64_t round_up(int64_t number, int64_t step) { return (number + step - 1) / step * step; }

// Memory of a thread, kept from call to call; none where there is not enough: no exception leaves a thread of OpenMP.
inline uint32_t *scratch(int64_t words) {
    thread_local std::vector<uint32_t> kept;
    const int64_t spare = 16;
    try {
        if (static_cast<int64_t>(kept.size()) < words + spare) kept.resize(words + spare);
    } catch (const std::bad_alloc &) {
        return nullptr;
    }
    const uintptr_t start = reinterpret_cast<uintptr_t>(kept.data());
    return reinterpret_cast<uint32_t *>((start + 63) / 64 * 64);
}

}  // namespace
