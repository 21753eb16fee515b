// Element-wise work and row reductions, one pass over memory each, on 16 lanes of fp32 (`lanes.h`).
//
// Plain C functions over pointers, called by ctypes, which gives up Python's lock. Threads are those of OpenMP; the
// library binds to the libgomp that PyTorch has loaded, so there is one pool of them.

#include <vector>

#include "lanes.h"
#include "norms.h"
#include "update.h"

namespace {

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
    }                                                                                                                \
    void rotate_##NAME(const T* x, long samples, long tokens, long heads, long size, long turned,                    \
                       const float* cosines, const float* sines, long back, T* y, int threads) {                     \
        rotate(x, samples, tokens, heads, size, turned, cosines, sines, back, y, threads);                           \
    }

// X is the type of what is normed, Y that of the result.
#define FOR_TYPES(X, Y, NAMES)                                                                                       \
    void norm_##NAMES(const X* x, long rows, long n, const float* weight, const float* bias, float eps,              \
                      long centred, Y* y, float* kept, int threads) {                                                \
        norm(x, rows, n, weight, bias, eps, centred, y, kept, threads);                                              \
    }                                                                                                                \
    void norm_backward_##NAMES(const Y* dy, const X* x, long rows, long n, const float* weight, const float* kept,   \
                               long centred, X* dx, float* dweight, float* dbias, float* parts, int threads) {       \
        norm_backward(dy, x, rows, n, weight, kept, centred, dx, dweight, dbias, parts, threads);                    \
    }

extern "C" {
FOR_TYPE(float, fp32)
FOR_TYPE(bf16, bf16)
FOR_TYPES(float, float, fp32_fp32)
FOR_TYPES(float, bf16, fp32_bf16)
FOR_TYPES(bf16, bf16, bf16_bf16)

void adamw_fp32(long count, float* const* p, const float* const* g, float* const* m, float* const* v,
                const int64_t* sizes, const Step* step, uint64_t* sums, int threads) {
    adamw(count, p, g, m, v, sizes, step, sums, threads);
}
void checksums(long count, const char* const* p, const int64_t* bytes, uint64_t* sums, int threads) {
    sums_of_words(count, p, bytes, sums, threads);
}
}
