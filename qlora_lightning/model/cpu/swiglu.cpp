// SwiGLU forward and backward, as ../layers/elementwise.py has it, each in one pass: torch takes two and five.
// Numbers are computed in float32; of `count` there are a multiple of LANES.

#include "vectors.h"

namespace {

// 1 / (1 + e^-x), without an overflow
inline Floats sigmoid(Floats x) {
    const Floats small = exponentials(x < 0 ? x : -x);
    return (x < 0 ? small : Floats{} + 1.0f) / (1.0f + small);
}

template <class T>
bool swiglu(const T *gate, const T *up, int64_t count, T *hidden) {
#pragma omp parallel for
    for (int64_t i = 0; i < count; i += LANES) {
        const Floats x = load(gate + i);
        store(x * sigmoid(x) * load(up + i), hidden + i);
    }
    return true;
}

template <class T>
bool swiglu_backward(const T *gate, const T *up, const T *grad, int64_t count, T *hidden, T *grad_gate, T *grad_up) {
#pragma omp parallel for
    for (int64_t i = 0; i < count; i += LANES) {
        const Floats x = load(gate + i), factor = load(up + i), grad_hidden = load(grad + i);
        const Floats open = sigmoid(x), active = x * open;
        store(active * factor, hidden + i);
        store(grad_hidden * factor * (open + active * (1.0f - open)), grad_gate + i);
        store(grad_hidden * active, grad_up + i);
    }
    return true;
}

}  // namespace

EXPORT(swiglu_float32, swiglu<float>)
EXPORT(swiglu_backward_float32, swiglu_backward<float>)
#ifdef __AVX512BF16__
EXPORT(swiglu_bfloat16, swiglu<bf16>)
EXPORT(swiglu_backward_bfloat16, swiglu_backward<bf16>)
#endif
