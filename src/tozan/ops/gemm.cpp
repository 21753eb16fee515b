// Matrix products on AVX-512 with bf16 dot products: C (m, n) = A (m, k) · B (k, n), from fp32 or bf16 to fp32 or bf16.
//
// The unit of everything is a word of 32 bits: one fp32, or two bf16 that are neighbours along k. Of either, one
// instruction multiplies and adds 16, so both types share all code but that instruction. As in BLIS (Van Zee and van de
// Geijn, 2015) operands are packed into panels first: of A as many rows as one tile of the result has, of B as many
// columns. That costs one pass over each operand, and makes all layouts equally fast, transposes included. A tile
// stays in registers over all of k: what an element's bits are depends on its row of A and its column of B alone, not
// on where the element lies, nor on the number of threads.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512BF16__)
#include <immintrin.h>

namespace {

constexpr long ROWS = 12, COLUMNS = 32;          // of a tile: 24 of 32 registers hold it
constexpr long BLOCK_BYTES = 384 << 10;          // of A's panels that stay in the second-level cache together
constexpr long PACKED_BYTES = 16 << 20;          // of B's panels at once

struct bf16 {
    uint16_t bits;
};

// The first `count` lanes.
inline __mmask16 lanes(long count) { return count >= 16 ? 0xffff : (1u << count) - 1; }
inline __mmask32 lanes32(long count) { return count >= 32 ? 0xffffffff : (1u << count) - 1; }

// `count` (at most 16) elements from p on, as bf16 in the lower half of a word each; the others are 0.
inline __m512i halves(const bf16* p, long count) {
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes(count), p));
}
inline __m512i halves(const float* p, long count) {
    return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(lanes(count), p)));
}

// How operands become words: `Word` is the type that is multiplied, `Element` the type in memory.
template <class Word, class Element>
struct Words;

template <>
struct Words<float, float> {
    static constexpr long EACH = 1;  // elements in a word
    // 16 words of a row that runs along k.
    static __m512i along(const float* p, long count) { return _mm512_maskz_loadu_epi32(lanes(count), p); }
    // One word of each of 16 neighbours, where the next along k is `stride` elements away, if there is one.
    static __m512i across(const float* p, long, long, long count) { return along(p, count); }
};

template <class Element>
struct Words<bf16, Element> {
    static constexpr long EACH = 2;
    static __m512i along(const Element* p, long count) {
        const __m512i first = halves(p, std::min(count, 16L)), second = halves(p + 16, std::max(count - 16, 0L));
        return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(first)), _mm512_cvtepi32_epi16(second), 1);
    }
    static __m512i across(const Element* p, long stride, long left, long count) {
        const __m512i low = halves(p, count), high = left > 1 ? halves(p + stride, count) : _mm512_setzero_si512();
        return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
    }
};

template <>
inline __m512i Words<bf16, bf16>::along(const bf16* p, long count) {
    return _mm512_maskz_loadu_epi16(lanes32(count), p);
}

// Transposes 16 × 16 words.
inline void transpose(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; ++i)
        for (int half = 0; half < 16; half += 8) {
            t[half + i] = _mm512_shuffle_i32x4(r[half + i], r[half + i + 4], 0x88);
            t[half + i + 4] = _mm512_shuffle_i32x4(r[half + i], r[half + i + 4], 0xdd);
        }
    for (int i = 0; i < 8; ++i) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    }
}

// An operand as `count` vectors of `k` elements each: element (i, l) lies at i · step + l · stride; one of both is 1.
template <class Element>
struct Operand {
    const Element* p;
    long step, stride;
};

// Packs vectors `first` … `first + count` into panels of WIDTH: of a panel, WIDTH words for each word along k.
template <class Word, long WIDTH, class Element>
void pack(Operand<Element> from, long first, long count, long k, uint32_t* to) {
    using W = Words<Word, Element>;
    const long words = (k + W::EACH - 1) / W::EACH;
    if (from.step == 1 && from.stride != 1) {  // neighbours along k lie a row apart
        for (long l = 0; l < words; ++l) {
            const Element* row = from.p + first + l * W::EACH * from.stride;
            for (long i = 0; i < count; i += WIDTH)
                for (long j = 0; j < WIDTH; j += 16) {
                    const long left = std::min(std::min(count - i - j, WIDTH - j), 16L);
                    const __m512i v = W::across(row + i + j, from.stride, k - l * W::EACH, std::max(left, 0L));
                    _mm512_mask_storeu_epi32(to + i * words + l * WIDTH + j, lanes(WIDTH - j), v);
                }
        }
        return;
    }
    for (long i = 0; i < count; i += WIDTH)
        for (long j = 0; j < WIDTH; j += 16) {
            const long rows = std::min(std::min(count - i - j, WIDTH - j), 16L);
            for (long l = 0; l < words; l += 16) {
                __m512i r[16];
                for (long n = 0; n < 16; ++n)
                    r[n] = n < rows ? W::along(from.p + (first + i + j + n) * from.step + l * W::EACH, k - l * W::EACH)
                                    : _mm512_setzero_si512();
                transpose(r);
                for (long n = 0; n < std::min(words - l, 16L); ++n)
                    _mm512_mask_storeu_epi32(to + i * words + (l + n) * WIDTH + j, lanes(WIDTH - j), r[n]);
            }
        }
}

inline __m512 multiply_add(__m512 sum, uint32_t a, __m512i b, float) {
    return _mm512_fmadd_ps((__m512)_mm512_set1_epi32(a), (__m512)b, sum);
}
inline __m512 multiply_add(__m512 sum, uint32_t a, __m512i b, bf16) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(a), (__m512bh)b);
}

inline void put(float* p, __mmask16 mask, __m512 x) { _mm512_mask_storeu_ps(p, mask, x); }
inline void put(bf16* p, __mmask16 mask, __m512 x) {
    _mm256_mask_storeu_epi16(p, mask, (__m256i)_mm512_cvtneps_pbh(x));
}

// What is added to the sums: a bias for each column, and what is there.
struct Ending {
    const float* bias;
    bool add;
};

inline __m512 end(__m512 sum, const float* bias, const float* there, __mmask16 mask) {
    if (bias) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, bias));
    if (there) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, there));
    return sum;
}
inline const float* there(const float* p) { return p; }
inline const float* there(const bf16*) { return nullptr; }  // only fp32 is added to

// One tile: `rows` × `columns` of the result from a panel of A and one of B.
template <class Word, class Result>
void tile(long words, const uint32_t* a, const uint32_t* b, Result* c, long ldc, long rows, long columns,
          const float* bias, const Ending& ending) {
    __m512 sums[ROWS][2];
#pragma GCC unroll 12
    for (long i = 0; i < ROWS; ++i) sums[i][0] = sums[i][1] = _mm512_setzero_ps();
    for (long l = 0; l < words; ++l, a += ROWS, b += COLUMNS) {
        const __m512i left = _mm512_loadu_si512(b), right = _mm512_loadu_si512(b + 16);
#pragma GCC unroll 12
        for (long i = 0; i < ROWS; ++i) {
            sums[i][0] = multiply_add(sums[i][0], a[i], left, Word{});
            sums[i][1] = multiply_add(sums[i][1], a[i], right, Word{});
        }
    }
    const __mmask32 inside = lanes32(columns);
#pragma GCC unroll 12
    for (long i = 0; i < ROWS; ++i) {
        if (i >= rows) break;
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
            const __mmask16 mask = inside >> 16 * j;
            Result* p = c + i * ldc + 16 * j;
            put(p, mask, end(sums[i][j], bias ? bias + 16 * j : nullptr, ending.add ? there(p) : nullptr, mask));
        }
    }
}

// A thread's room for panels, which it keeps: what is given back to the system is costly to get again.
struct Room {
    uint32_t* words = nullptr;
    long size = 0;
    uint32_t* get(long wanted) {
        if (wanted > size) {
            std::free(words);
            words = (uint32_t*)std::aligned_alloc(64, wanted * 4);
            size = wanted;
        }
        return words;
    }
    ~Room() { std::free(words); }
};

thread_local Room room_for_a, room_for_b;

inline long panels(long n, long width) { return (n + width - 1) / width; }

// Threads along the rows of the result; the others lie along its columns.
inline long threads_along_rows(long row_panels, long column_panels, long threads) {
    long best = 1, cost = INT64_MAX;
    for (long along = 1; along <= threads; ++along) {
        if (threads % along) continue;
        const long mine = panels(row_panels, along) * panels(column_panels, threads / along);
        if (mine <= cost) best = along, cost = mine;
    }
    return best;
}

template <class Word, class EA, class EB, class Result>
void gemm(Operand<EA> a, Operand<EB> b, Result* c, long m, long n, long k, Ending ending, int threads) {
    const long words = (k + Words<Word, EA>::EACH - 1) / Words<Word, EA>::EACH;
    const long row_panels = panels(m, ROWS);
    const long at_once = std::max(1L, PACKED_BYTES / (words * COLUMNS * 4));
    const long rows_at_once = std::max(1L, BLOCK_BYTES / (words * ROWS * 4));
    uint32_t* packed_b = room_for_b.get(std::min(at_once, panels(n, COLUMNS)) * COLUMNS * words);
    for (long start = 0; start < n; start += at_once * COLUMNS) {
        const long width = std::min(n - start, at_once * COLUMNS), column_panels = panels(width, COLUMNS);
        const long along = threads_along_rows(row_panels, column_panels, threads);
#pragma omp parallel num_threads(threads)
        {
#pragma omp for schedule(static)
            for (long j = 0; j < column_panels; ++j)
                pack<Word, COLUMNS>(b, start + j * COLUMNS, std::min(width - j * COLUMNS, COLUMNS), k,
                                    packed_b + j * COLUMNS * words);
            uint32_t* packed_a = room_for_a.get((rows_at_once * ROWS * words + 15) / 16 * 16);
#pragma omp for schedule(static)
            for (long t = 0; t < threads; ++t) {
                const long across = threads / along, r = t / across, s = t % across;
                const long last = row_panels * (r + 1) / along, last_column = column_panels * (s + 1) / across;
                for (long i = row_panels * r / along; i < last;) {
                    const long blocks = panels(last - i, rows_at_once), here = panels(last - i, blocks);
                    const long rows = std::min(m - i * ROWS, here * ROWS);
                    pack<Word, ROWS>(a, i * ROWS, rows, k, packed_a);
                    for (long j = column_panels * s / across; j < last_column; ++j)
                        for (long p = 0; p < here; ++p)
                            tile<Word>(words, packed_a + p * ROWS * words, packed_b + j * COLUMNS * words,
                                       c + (i + p) * ROWS * n + start + j * COLUMNS, n,
                                       std::min(rows - p * ROWS, ROWS), std::min(width - j * COLUMNS, COLUMNS),
                                       ending.bias ? ending.bias + start + j * COLUMNS : nullptr, ending);
                    i += here;
                }
            }
        }
    }
}

}  // namespace

#define PRODUCT(NAME, WORD, EA, EB, RESULT)                                                                          \
    extern "C" void gemm_##NAME(const void* a, const void* b, long a_step, long a_stride, long b_stride,             \
                                long b_step, long m, long n, long k, void* c, const float* bias, long add,           \
                                int threads) {                                                                       \
        gemm<WORD>(Operand<EA>{(const EA*)a, a_step, a_stride}, Operand<EB>{(const EB*)b, b_step, b_stride},         \
                   (RESULT*)c, m, n, k, Ending{bias, add != 0}, threads);                                            \
    }

PRODUCT(fff, float, float, float, float)
PRODUCT(bfb, bf16, bf16, float, bf16)
PRODUCT(bff, bf16, bf16, float, float)
PRODUCT(bbb, bf16, bf16, bf16, bf16)
PRODUCT(bbf, bf16, bf16, bf16, float)

// Whether these beat the libraries that PyTorch brings, which are Intel's.
extern "C" int gemm_pays() {
    __builtin_cpu_init();
    return __builtin_cpu_is("amd");
}
#endif
