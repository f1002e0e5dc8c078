// What a LLaMA computes row by row, without operators' results in between; sums are taken in float32, results rounded
// once. The same in torch's operations: ../layers/elementwise.py and ../step/loss.py.

#include "numbers.h"

namespace {

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

template <class T>
void rms_norm(const T *__restrict x, const T *__restrict weight, float eps, T *__restrict out,
              float *__restrict inverse, int64_t rows, int64_t width) {
#pragma omp parallel for
    for (int64_t row = 0; row < rows; row++) {
        const T *from = x + row * width;
        T *to = out + row * width;
        float squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int64_t i = 0; i < width; i++) squares += read(from[i]) * read(from[i]);
        const float factor = inverse[row] = 1.0f / std::sqrt(squares / width + eps);
#pragma omp simd
        for (int64_t i = 0; i < width; i++) write(to[i], read(from[i]) * factor * read(weight[i]));
    }
}

template <class T>
void rms_norm_backward(const T *__restrict x, const T *__restrict weight, const float *__restrict inverse,
                       T *__restrict grad, int64_t rows, int64_t width) {
#pragma omp parallel for
    for (int64_t row = 0; row < rows; row++) {
        const T *from = x + row * width;
        T *to = grad + row * width;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < width; i++) sum += read(to[i]) * read(weight[i]) * read(from[i]);
        const float factor = inverse[row], mean = sum * factor * factor / width;
#pragma omp simd
        for (int64_t i = 0; i < width; i++)
            write(to[i], factor * (read(to[i]) * read(weight[i]) - read(from[i]) * mean));
    }
}

constexpr int64_t BLOCK = 4096;  // numbers that a thread takes at a time

template <class T>
void swiglu(const T *__restrict gate, const T *__restrict up, T *__restrict out, int64_t count) {
#pragma omp parallel for
    for (int64_t start = 0; start < count; start += BLOCK) {
        const int64_t end = start + BLOCK < count ? start + BLOCK : count;
#pragma omp simd
        for (int64_t i = start; i < end; i++) write(out[i], read(gate[i]) * sigmoid(read(gate[i])) * read(up[i]));
    }
}

template <class T>
void swiglu_backward(const T *__restrict gate, const T *__restrict up, T *__restrict grad, T *__restrict grad_up,
                     T *__restrict out, int64_t count) {
#pragma omp parallel for
    for (int64_t start = 0; start < count; start += BLOCK) {
        const int64_t end = start + BLOCK < count ? start + BLOCK : count;
#pragma omp simd
        for (int64_t i = start; i < end; i++) {
            const float x = read(gate[i]), y = read(up[i]), grad_out = read(grad[i]);
            const float part = sigmoid(x), active = x * part;
            write(out[i], active * y);
            write(grad_up[i], grad_out * active);
            write(grad[i], grad_out * y * part * (1.0f + x * (1.0f - part)));
        }
    }
}

template <class T>
void rotate(const T *__restrict x, const T *__restrict cos, const T *__restrict sin, float sign, T *__restrict out,
            int64_t tokens, int64_t heads, int64_t width) {
    const int64_t half = width / 2;
#pragma omp parallel for
    for (int64_t token = 0; token < tokens; token++) {
        const T *c = cos + token * width, *s = sin + token * width;
        for (int64_t head = 0; head < heads; head++) {
            const T *from = x + (token * heads + head) * width;
            T *to = out + (token * heads + head) * width;
            // which half's sine: backward takes each number's from where forward had put it
            const T *first = sign > 0 ? s : s + half, *second = sign > 0 ? s + half : s;
#pragma omp simd
            for (int64_t i = 0; i < half; i++) {
                write(to[i], read(from[i]) * read(c[i]) - sign * read(from[half + i]) * read(first[i]));
                write(to[half + i], read(from[half + i]) * read(c[half + i]) + sign * read(from[i]) * read(second[i]));
            }
        }
    }
}

// Of each row of logits the negative log-likelihood of its target, and whether that is the first of the largest; in the
// place of the logits, if wanted, the gradient: softmax - onehot.
template <class T>
void cross_entropy(T *__restrict logits, const int64_t *targets, int64_t with_gradient, float *nll, bool *correct,
                   int64_t rows, int64_t vocabulary) {
#pragma omp parallel for
    for (int64_t row = 0; row < rows; row++) {
        T *row_logits = logits + row * vocabulary;
        const int64_t target = targets[row];
        const float target_logit = read(row_logits[target]);
        float largest = -__builtin_inff();
#pragma omp simd reduction(max : largest)
        for (int64_t i = 0; i < vocabulary; i++) largest = read(row_logits[i]) > largest ? read(row_logits[i]) : largest;
        int32_t earlier = 0;
        if (target_logit == largest)
#pragma omp simd reduction(+ : earlier)
            for (int64_t i = 0; i < target; i++) earlier += read(row_logits[i]) == largest;
        correct[row] = target_logit == largest && !earlier;
        double sum = 0;  // of blocks' sums: a float would lose digits of a large vocabulary
        for (int64_t start = 0; start < vocabulary; start += BLOCK) {
            const int64_t end = start + BLOCK < vocabulary ? start + BLOCK : vocabulary;
            float part = 0;
#pragma omp simd reduction(+ : part)
            for (int64_t i = start; i < end; i++) part += exponential(read(row_logits[i]) - largest);
            sum += part;
        }
        nll[row] = static_cast<float>(std::log(sum)) + (largest - target_logit);
        if (!with_gradient) continue;
        const float factor = static_cast<float>(1 / sum);
#pragma omp simd
        for (int64_t i = 0; i < vocabulary; i++) write(row_logits[i], exponential(read(row_logits[i]) - largest) * factor);
        write(row_logits[target], exponential(target_logit - largest) * factor - 1.0f);
    }
}

}  // namespace

#define FOR_TYPE(T, NAME)                              \
    EXPORT(rms_norm_##NAME, rms_norm<T>)               \
    EXPORT(rms_norm_backward_##NAME, rms_norm_backward<T>) \
    EXPORT(swiglu_##NAME, swiglu<T>)                   \
    EXPORT(swiglu_backward_##NAME, swiglu_backward<T>) \
    EXPORT(rotate_##NAME, rotate<T>)                   \
    EXPORT(cross_entropy_##NAME, cross_entropy<T>)

FOR_TYPE(float, float32)
FOR_TYPE(bf16, bfloat16)
