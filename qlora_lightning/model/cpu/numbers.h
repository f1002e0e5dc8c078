// float32 and bfloat16 as the loops read and write them.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

struct bf16 {
    uint16_t bits;
};

// A function under a name that Python finds: a pointer to it.
#define EXPORT(NAME, ...) extern "C" { auto *NAME = __VA_ARGS__; }

inline float read(float number) { return number; }

inline float read(bf16 number) {
    const uint32_t bits = static_cast<uint32_t>(number.bits) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

inline void write(float &place, float number) { place = number; }

inline void write(bf16 &place, float number) {  // to the nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &number, sizeof bits);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    place.bits = number != number ? 0x7fc0 : static_cast<uint16_t>(rounded);
}

// 2^r for |r| <= 1/2 to 2e-7 relative, by its Taylor series: of a float, or of a vector of them.
template <class Number>
inline Number power_of_two(Number rest) {
    Number sum = Number{} + 1.52527338e-5f;
    sum = sum * rest + 1.54035304e-4f;
    sum = sum * rest + 1.33335581e-3f;
    sum = sum * rest + 9.61812911e-3f;
    sum = sum * rest + 5.55041087e-2f;
    sum = sum * rest + 2.40226507e-1f;
    sum = sum * rest + 6.93147181e-1f;
    sum = sum * rest + 1.0f;
    return sum;
}

// e^x: 2^n by the exponent's bits, times 2^r. Beyond 2^127 it is infinite, below 2^-126 that; NaN stays NaN.
inline float exponential(float x) {
    float power = x * 1.44269504f;
    power = power < -126.0f ? -126.0f : power;
    power = power > 128.0f ? 128.0f : power;
    const float whole = __builtin_rintf(power), rest = power - whole;
    const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(whole) + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, sizeof scale);
    return power_of_two(rest) * scale;
}

}  // namespace
