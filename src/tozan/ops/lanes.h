// Vectors of 16 fp32 lanes: what the kernels of `kernels.cpp` are written in.
//
// The lanes are the compiler's vector extension (GCC, Clang): one register with AVX-512, several with AVX2, NEON or SVE,
// always the same operations in the same order. So results depend neither on the number of threads nor on where in a
// tensor an element lies: the last, partial vector goes through the same code as all others.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

constexpr long LANES = 16;
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

struct bf16 {
    uint16_t bits;
};

inline Floats splat(float x) { return Floats{} + x; }

// The first `count` of 16 elements from p on; the other lanes hold `fill`.
template <class Vector, class Element>
inline Vector part(const Element* p, long count, Element fill) {
    Vector v;
    if (count >= LANES) {
        std::memcpy(&v, p, sizeof v);
        return v;
    }
    Element lanes[LANES];
    for (long i = 0; i < LANES; ++i) lanes[i] = i < count ? p[i] : fill;
    std::memcpy(&v, lanes, sizeof v);
    return v;
}

inline Floats widen(Halves bits) {
#ifdef __AVX512F__
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)bits), 16);
#else
    return (Floats)(__builtin_convertvector(bits, Words) << 16);
#endif
}

// Round to nearest, ties to even, as PyTorch does; NaN stays NaN. (The instruction takes numbers below 1e-38 for 0.)
inline Halves narrow(Floats x) {
#ifdef __AVX512BF16__
    return (Halves)_mm512_cvtneps_pbh((__m512)x);
#else
    Words bits = (Words)x;
    Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    Words nan = (Words)(x != x);
    return __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), Halves);
#endif
}

// The larger one of each lane; b where either is NaN.
inline Floats maximum(Floats a, Floats b) {
#ifdef __AVX512F__
    return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return a > b ? a : b;
#endif
}

inline Floats load(const float* p, long count, float fill = 0) { return part<Floats>(p, count, fill); }

inline Floats load(const bf16* p, long count, float fill = 0) {
    if (count >= LANES) return widen(part<Halves>(&p->bits, LANES, (uint16_t)0));
    Floats v = widen(part<Halves>(&p->bits, count, (uint16_t)0));
    for (long i = count; i < LANES; ++i) v[i] = fill;
    return v;
}

inline void store(float* p, long count, Floats x) { std::memcpy(p, &x, (count < LANES ? count : LANES) * sizeof *p); }

inline void store(bf16* p, long count, Floats x) {
    Halves bits = narrow(x);
    std::memcpy(p, &bits, (count < LANES ? count : LANES) * sizeof *p);
}

template <class T>
float get(const T* p) {
    return load(p, 1)[0];
}

template <class T>
void put(T* p, float x) {
    store(p, 1, splat(x));
}

// Calls f(first, count) for every 16 elements of n.
template <class F>
inline void vectors(long n, F f) {
    long i = 0;
    for (; i + LANES <= n; i += LANES) f(i, LANES);
    if (i < n) f(i, n - i);
}

inline float total(Floats x) {
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; ++i) x[i] += x[i + half];
    return x[0];
}

inline float largest(Floats x) {
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; ++i) x[i] = x[i + half] > x[i] ? x[i + half] : x[i];
    return x[0];
}

// e^x for x up to 88, within 2 ulp (Cephes' polynomial); 0 below -87; NaN stays NaN.
inline Floats exponential(Floats x) {
    const Floats c = maximum(splat(-87.0f), x);
    const float rounding = 12582912.0f;  // 1.5 · 2²³: after the addition the lowest bits are the nearest integer
    Floats shifted = c * 1.44269504088896341f + rounding;
    Ints exponent = (Ints)shifted << 23;
    Floats n = shifted - rounding;
    Floats r = c - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    return x < -87.0f ? splat(0.0f) : (Floats)((Ints)p + exponent);
}

constexpr long PIECE = 4096;  // elements that one thread takes at once

template <class F>
void pieces(long n, int threads, F f) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long start = 0; start < n; start += PIECE) {
        const long end = start + PIECE < n ? start + PIECE : n;
        vectors(end - start, [&](long i, long count) { f(start + i, count); });
    }
}

}  // namespace
