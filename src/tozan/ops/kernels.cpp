// Element-wise work and row reductions, one pass over memory each, on 16 lanes of fp32.
//
// The lanes are the compiler's vector extension (GCC, Clang): one register with AVX-512, several with AVX2, NEON or SVE,
// always the same operations in the same order. So results depend neither on the number of threads nor on where in a
// tensor an element lies: the last, partial vector goes through the same code as all others.
//
// Plain C functions over pointers, called by ctypes, which gives up Python's lock. Threads are those of OpenMP; the
// library binds to the libgomp that PyTorch has loaded, so there is one pool of them.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
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

// The logistic function σ, and 1 - σ without cancellation.
struct Logistic {
    Floats value, rest;
};

inline Logistic logistic(Floats x) {
    Floats e = exponential(-maximum(splat(-87.0f), x)), value = 1.0f / (1.0f + e);
    return {value, e * value};
}

template <class T>
float row_maximum(const T* x, long n) {
    Floats top = splat(-INFINITY);
    vectors(n, [&](long i, long count) {
        top = maximum(load(x + i, count, -INFINITY), top);
    });
    return largest(top);
}

// Loss (rows,) and, unless null, softmax - one-hot (rows, n), which may lie where the logits are.
template <class T>
void cross_entropy(const T* logits, long rows, long n, const int64_t* targets, int64_t ignored, float* loss,
                   T* gradient, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long row = 0; row < rows; ++row) {
        const T* x = logits + row * n;
        T* g = gradient ? gradient + row * n : nullptr;
        if (targets[row] == ignored) {
            loss[row] = 0;
            if (g) std::memset((void*)g, 0, n * sizeof *g);
            continue;
        }
        const float top = row_maximum(x, n), own = get(x + targets[row]);
        double sum = 0;
        for (long first = 0; first < n; first += 1024) {  // fp32 would lose digits over a whole vocabulary
            Floats sums = splat(0);
            vectors(n - first < 1024 ? n - first : 1024, [&](long i, long count) {
                sums += exponential(load(x + first + i, count, -INFINITY) - top);
            });
            sum += total(sums);
        }
        loss[row] = (float)(std::log(sum) + top - own);
        if (!g) continue;
        const float scale = (float)(1 / sum);
        vectors(n, [&](long i, long count) { store(g + i, count, exponential(load(x + i, count) - top) * scale); });
        put(g + targets[row], exponential(splat(own - top))[0] * scale - 1);
    }
}

// Softmax in place over the first (first + row % block + 1) of `n` scores of each row; the others become 0.
template <class T>
void causal_softmax(T* scores, long rows, long block, long first, long n, int threads) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> kept(n + LANES);
#pragma omp for schedule(static)
        for (long row = 0; row < rows; ++row) {
            T* x = scores + row * n;
            const long seen = first + row % block + 1;
            const float top = row_maximum(x, seen);
            Floats sums = splat(0);
            vectors(seen, [&](long i, long count) {
                Floats e = exponential(load(x + i, count, -INFINITY) - top);
                store(&kept[i], LANES, e);
                sums += e;
            });
            const float scale = 1 / total(sums);
            vectors(seen, [&](long i, long count) { store(x + i, count, load(&kept[i], LANES) * scale); });
            std::memset((void*)(x + seen), 0, (n - seen) * sizeof *x);
        }
    }
}

// Sums of the columns of x (rows, n), each from the first row to the last, four rows at a time.
template <class T>
void column_sums(const T* x, long rows, long n, float* sums, int threads) {
    constexpr long MOST = 1024;  // columns whose sums stay in the first-level cache
    const long strips = (n + MOST * threads - 1) / (MOST * threads) * threads;  // as many for every thread
    const long strip = ((n + strips - 1) / strips + LANES - 1) / LANES * LANES;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long first = 0; first < n; first += strip) {
        const long width = n - first < strip ? n - first : strip;
        std::memset(sums + first, 0, width * sizeof *sums);
        for (long row = 0; row < rows; row += 4) {
            const T* p = x + row * n + first;
            const long here = rows - row;
            vectors(width, [&](long i, long count) {
                Floats sum = load(p + i, count);
                if (here > 1) sum += load(p + n + i, count);
                if (here > 2) sum += load(p + 2 * n + i, count);
                if (here > 3) sum += load(p + 3 * n + i, count);
                store(sums + first + i, count, load(sums + first + i, count) + sum);
            });
        }
    }
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

// GELU in its tanh form is x · σ(2u), u = √(2/π) (x + 0.044715 x³).
constexpr float TWICE = 1.5957691216057308f, CUBIC = 0.044715f;

template <class T>
void gelu(const T* x, T* y, long n, int threads) {
    pieces(n, threads, [=](long i, long count) {
        Floats v = load(x + i, count);
        store(y + i, count, v * logistic(TWICE * v * (1.0f + CUBIC * v * v)).value);
    });
}

template <class T>
void gelu_backward(const T* dy, const T* x, T* dx, long n, int threads) {
    pieces(n, threads, [=](long i, long count) {
        Floats v = load(x + i, count), square = v * v;
        Logistic s = logistic(TWICE * v * (1.0f + CUBIC * square));
        Floats slope = s.value + v * s.value * s.rest * TWICE * (1.0f + 3.0f * CUBIC * square);
        store(dx + i, count, load(dy + i, count) * slope);
    });
}

template <class T>
void swiglu(const T* gate, const T* up, T* y, long n, int threads) {
    pieces(n, threads, [=](long i, long count) {
        Floats v = load(gate + i, count);
        store(y + i, count, v * logistic(v).value * load(up + i, count));
    });
}

template <class T>
void swiglu_backward(const T* dy, const T* gate, const T* up, T* dgate, T* dup, long n, int threads) {
    pieces(n, threads, [=](long i, long count) {
        Floats v = load(gate + i, count), d = load(dy + i, count);
        Logistic s = logistic(v);
        store(dgate + i, count, d * load(up + i, count) * s.value * (1.0f + v * s.rest));
        store(dup + i, count, d * v * s.value);
    });
}

}  // namespace

#define FOR_TYPE(T, NAME)                                                                                            \
    void cross_entropy_##NAME(const T* x, long rows, long n, const int64_t* targets, int64_t ignored, float* loss,   \
                              T* g, int threads) {                                                                   \
        cross_entropy(x, rows, n, targets, ignored, loss, g, threads);                                               \
    }                                                                                                                \
    void causal_softmax_##NAME(T* x, long rows, long block, long first, long n, int threads) {                       \
        causal_softmax(x, rows, block, first, n, threads);                                                           \
    }                                                                                                                \
    void column_sums_##NAME(const T* x, long rows, long n, float* sums, int threads) {                               \
        column_sums(x, rows, n, sums, threads);                                                                      \
    }                                                                                                                \
    void gelu_##NAME(const T* x, T* y, long n, int threads) { gelu(x, y, n, threads); }                              \
    void gelu_backward_##NAME(const T* dy, const T* x, T* dx, long n, int threads) {                                 \
        gelu_backward(dy, x, dx, n, threads);                                                                        \
    }                                                                                                                \
    void swiglu_##NAME(const T* gate, const T* up, T* y, long n, int threads) { swiglu(gate, up, y, n, threads); }   \
    void swiglu_backward_##NAME(const T* dy, const T* gate, const T* up, T* dgate, T* dup, long n, int threads) {    \
        swiglu_backward(dy, gate, up, dgate, dup, n, threads);                                                       \
    }

extern "C" {
FOR_TYPE(float, fp32)
FOR_TYPE(bf16, bf16)
}
