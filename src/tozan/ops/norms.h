// Norms over the last dim and rotary positions, forward and backward. A row, or a head, is read once from memory.

#pragma once

#include "lanes.h"

namespace {

// y = (x - mean) · scale · weight + bias, where scale is 1 / √(mean square deviation + eps). Without `centred` the mean
// is taken for 0 (RMSNorm). Weight and bias are (n,), the bias may be null; `kept` gets each row's mean and scale.
template <class X, class Y>
void norm(const X* x, long rows, long n, const float* weight, const float* bias, float eps, long centred, Y* y,
          float* kept, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long row = 0; row < rows; ++row) {
        const X* p = x + row * n;
        Y* q = y + row * n;
        float mean = 0;
        if (centred) {
            Floats sums = splat(0);
            vectors(n, [&](long i, long count) { sums += load(p + i, count); });
            mean = total(sums) / n;
        }
        Floats squares = splat(0);
        vectors(n, [&](long i, long count) {
            Floats deviation = load(p + i, count, mean) - mean;
            squares += deviation * deviation;
        });
        const float scale = 1 / std::sqrt(total(squares) / n + eps);
        vectors(n, [&](long i, long count) {
            Floats v = (load(p + i, count) - mean) * scale * load(weight + i, count);
            store(q + i, count, bias ? v + load(bias + i, count) : v);
        });
        kept[2 * row] = mean;
        kept[2 * row + 1] = scale;
    }
}

constexpr long TOGETHER = 32;  // rows whose gradients of weight and bias are added up before they meet those of others

// Gradients of x, weight and, unless null, bias. `parts` has room for (blocks of rows, 2, n): sums over rows are made in
// the same order on any number of threads.
template <class X, class Y>
void norm_backward(const Y* dy, const X* x, long rows, long n, const float* weight, const float* kept, long centred,
                   X* dx, float* dweight, float* dbias, float* parts, int threads) {
    const long blocks = (rows + TOGETHER - 1) / TOGETHER;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long block = 0; block < blocks; ++block) {
        float *of_weight = parts + 2 * block * n, *of_bias = of_weight + n;
        std::memset(of_weight, 0, 2 * n * sizeof *of_weight);
        const long end = (block + 1) * TOGETHER < rows ? (block + 1) * TOGETHER : rows;
        for (long row = block * TOGETHER; row < end; ++row) {
            const Y* d = dy + row * n;
            const X* p = x + row * n;
            X* q = dx + row * n;
            const float mean = kept[2 * row], scale = kept[2 * row + 1];
            Floats along = splat(0), plain = splat(0);
            vectors(n, [&](long i, long count) {
                Floats v = load(d + i, count), normed = (load(p + i, count, mean) - mean) * scale;
                Floats g = v * load(weight + i, count);
                along += g * normed;
                plain += g;
                store(of_weight + i, count, load(of_weight + i, count) + v * normed);
                if (dbias) store(of_bias + i, count, load(of_bias + i, count) + v);
            });
            const float slope = total(along) / n, offset = centred ? total(plain) / n : 0;
            vectors(n, [&](long i, long count) {
                Floats normed = (load(p + i, count, mean) - mean) * scale;
                Floats g = load(d + i, count) * load(weight + i, count);
                store(q + i, count, scale * (g - offset - normed * slope));
            });
        }
    }
    for (int which = 0; which < (dbias ? 2 : 1); ++which) {
        float* sums = which ? dbias : dweight;
#pragma omp parallel for schedule(static) num_threads(threads)
        for (long i = 0; i < n; i += LANES) {
            Floats sum = splat(0);
            for (long block = 0; block < blocks; ++block) sum += load(parts + (2 * block + which) * n + i, n - i);
            store(sums + i, n - i, sum);
        }
    }
}

// Turns the first `turned` heads of every token of x (samples, tokens, heads, size) by the angles of its position, whose
// cosines and sines are (tokens, size / 2); element i makes a pair with i + size / 2. `back`: the other way round. The
// other heads are copied.
template <class T>
void rotate(const T* x, long samples, long tokens, long heads, long size, long turned, const float* cosines,
            const float* sines, long back, T* y, int threads) {
    const long half = size / 2;
    const float sign = back ? -1 : 1;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long row = 0; row < samples * tokens; ++row) {
        const T* p = x + row * heads * size;
        T* q = y + row * heads * size;
        const float *c = cosines + row % tokens * half, *s = sines + row % tokens * half;
        for (long head = 0; head < turned; ++head, p += size, q += size) {
            vectors(half, [&](long i, long count) {
                Floats a = load(p + i, count), b = load(p + half + i, count);
                Floats cosine = load(c + i, count), sine = sign * load(s + i, count);
                store(q + i, count, a * cosine - b * sine);
                store(q + half + i, count, b * cosine + a * sine);
            });
        }
        std::memcpy((void*)q, p, (heads - turned) * size * sizeof *p);
    }
}

}  // namespace
