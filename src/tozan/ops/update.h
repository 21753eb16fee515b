// What happens to the state of training between two steps: AdamW's update, and checksums. Many tensors in one call.

#pragma once

#include "lanes.h"

namespace {

typedef uint64_t Pairs __attribute__((vector_size(64)));

// The bits of the first `count` lanes as words of 64 bits; the others are 0.
inline Pairs words(Floats x, long count) {
    Pairs found = {};
    std::memcpy(&found, &x, (count < LANES ? count : LANES) * sizeof(float));
    return found;
}

inline uint64_t total(Pairs x) {
    uint64_t sum = 0;
    for (int i = 0; i < 8; ++i) sum += x[i];
    return sum;
}

inline Floats root(Floats x) {
#ifdef __AVX512F__
    return (Floats)_mm512_sqrt_ps((__m512)x);
#else
    for (long i = 0; i < LANES; ++i) x[i] = std::sqrt(x[i]);
    return x;
#endif
}

// Numbers of an update, all but eps made from others in fp64.
struct Step {
    float scale;   // of gradients
    float shrink;  // 1 - lr · weight decay
    float first, second, rest;  // 1 - beta1; beta2, 1 - beta2
    float correction;  // √(1 - beta2^t)
    float eps;
    float size;  // lr / (1 - beta1^t)
};

// AdamW (arXiv 1711.05101) for `count` tensors: parameters p, gradients g, moments m and v, of `sizes` elements each.
// `sums` (count, 3) gets the checksums of what p, m and v have become, from the registers that were written.
void adamw(long count, float* const* ps, const float* const* gs, float* const* ms, float* const* vs,
           const int64_t* sizes, const Step* step, uint64_t* sums, int threads) {
    const Step s = *step;
    std::memset(sums, 0, 3 * count * sizeof *sums);
#pragma omp parallel num_threads(threads)
    for (long tensor = 0; tensor < count; ++tensor) {
        float *p = ps[tensor], *m = ms[tensor], *v = vs[tensor];
        const float* g = gs[tensor];
        Pairs of_p = {}, of_m = {}, of_v = {};
#pragma omp for schedule(static) nowait
        for (long start = 0; start < sizes[tensor]; start += PIECE) {
            const long left = sizes[tensor] - start;
            vectors(left < PIECE ? left : PIECE, [&](long offset, long here) {
                const long i = start + offset;
                Floats gradient = load(g + i, here) * s.scale, mean = load(m + i, here);
                mean += s.first * (gradient - mean);
                Floats square = load(v + i, here) * s.second + s.rest * gradient * gradient;
                Floats value = load(p + i, here) * s.shrink - s.size * mean / (root(square) / s.correction + s.eps);
                store(p + i, here, value);
                store(m + i, here, mean);
                store(v + i, here, square);
                of_p += words(value, here);
                of_m += words(mean, here);
                of_v += words(square, here);
            });
        }
        const uint64_t own[3] = {total(of_p), total(of_m), total(of_v)};
        for (int slot = 0; slot < 3; ++slot) {
#pragma omp atomic
            sums[3 * tensor + slot] += own[slot];
        }
    }
}

// Sums modulo 2⁶⁴ of the 64-bit words of `count` stretches of memory; the last word is filled up with zeros.
void sums_of_words(long count, const char* const* stretches, const int64_t* bytes, uint64_t* sums, int threads) {
    constexpr long LINE = 64, MOST = 512 * LINE;
    std::memset(sums, 0, count * sizeof *sums);
#pragma omp parallel num_threads(threads)
    for (long stretch = 0; stretch < count; ++stretch) {
        Pairs found[4] = {};
#pragma omp for schedule(static) nowait
        for (long start = 0; start < bytes[stretch]; start += MOST) {
            const char* p = stretches[stretch] + start;
            const long n = bytes[stretch] - start < MOST ? bytes[stretch] - start : MOST;
            long i = 0;
            for (; i + 4 * LINE <= n; i += 4 * LINE) {
                Pairs lines[4];
                std::memcpy(lines, p + i, sizeof lines);
                for (int k = 0; k < 4; ++k) found[k] += lines[k];
            }
            for (; i < n; i += LINE) {
                Pairs line = {};
                std::memcpy(&line, p + i, n - i < LINE ? n - i : LINE);
                found[0] += line;
            }
        }
        const uint64_t own = total(found[0] + found[1] + found[2] + found[3]);
#pragma omp atomic
        sums[stretch] += own;
    }
}

}  // namespace
