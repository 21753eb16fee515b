// What matrix products and attention share: operands are read as words and packed into panels, in AVX-512.
//
// The unit of everything is a word of 32 bits: one fp32, or two bf16 that are neighbours along k. Of either, one
// instruction multiplies and adds 16, so both types share all code but that instruction. As in BLIS (Van Zee and van de
// Geijn, 2015) operands are packed into panels first: of A as many rows as one tile of the result has, of B as many
// columns. That costs one pass over each operand, and makes all layouts equally fast, transposes included.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512BF16__)
#define PANELS
#include <immintrin.h>

namespace {

struct bf16 {
    uint16_t bits;
};

// The first `count` lanes.
inline __mmask16 lanes(long count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1; }
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
    static __m512i along(const Element* p, long count);
    static __m512i across(const Element* p, long stride, long left, long count) {
        const __m512i low = halves(p, count), high = left > 1 ? halves(p + stride, count) : _mm512_setzero_si512();
        return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
    }
};

template <>
inline __m512i Words<bf16, bf16>::along(const bf16* p, long count) {
    return _mm512_maskz_loadu_epi16(lanes32(count), p);
}

template <>
inline __m512i Words<bf16, float>::along(const float* p, long count) {
    const __m512 first = _mm512_maskz_loadu_ps(lanes(count), p), second = _mm512_maskz_loadu_ps(lanes(count - 16), p + 16);
    return (__m512i)_mm512_cvtne2ps_pbh(second, first);
}

// Transposes 16 × 16 words.
inline void transpose(__m512i r[16]) {
    __m512i t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
#pragma GCC unroll 2
        for (int half = 0; half < 16; half += 8) {
            t[half + i] = _mm512_shuffle_i32x4(r[half + i], r[half + i + 4], 0x88);
            t[half + i + 4] = _mm512_shuffle_i32x4(r[half + i], r[half + i + 4], 0xdd);
        }
#pragma GCC unroll 8
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

// Packs vectors `first` … `first + count`, from word `start` on along k, into panels of WIDTH: of a panel, WIDTH words
// for each of `words` along k. What lies beyond the operand's edges becomes 0.
template <class Word, long WIDTH, class Element>
void pack(Operand<Element> from, long first, long count, long start, long words, long k, uint32_t* to) {
    using W = Words<Word, Element>;
    const long left = k - start * W::EACH;
    const Element* corner = from.p + first * from.step + start * W::EACH * from.stride;
    if (from.step == 1) {  // neighbours along k lie a row apart: a few rows at a time, which stay in cache
        for (long upper = 0; upper < words; upper += 32)
            for (long i = 0; i < count; i += WIDTH)
                for (long j = 0; j < WIDTH; j += 16) {
                    const long here = std::min(count - i, WIDTH) - j;
                    const __mmask16 mask = lanes(WIDTH - j);
                    const Element* row = corner + i + j + upper * W::EACH * from.stride;
                    uint32_t* target = to + i * words + upper * WIDTH + j;
                    for (long l = upper; l < std::min(upper + 32, words); ++l, target += WIDTH) {
                        const Element* ahead = row + 32 * W::EACH * from.stride;
                        for (long n = 0; n < W::EACH; ++n)
                            _mm_prefetch((const char*)(ahead + n * from.stride), _MM_HINT_T0);
                        _mm512_mask_storeu_epi32(target, mask, W::across(row, from.stride, left - l * W::EACH, here));
                        row += W::EACH * from.stride;
                    }
                }
        return;
    }
    for (long i = 0; i < count; i += WIDTH)
        for (long j = 0; j < WIDTH; j += 16) {
            const long rows = std::min(count - i, WIDTH) - j;
            const Element* row = corner + (i + j) * from.step;
            uint32_t* target = to + i * words + j;
            for (long l = 0; l < words; l += 16, row += 16 * W::EACH, target += 16 * WIDTH) {
                __m512i r[16];
#pragma GCC unroll 16
                for (long n = 0; n < 16; ++n)
                    r[n] = n < rows ? W::along(row + n * from.step, left - l * W::EACH) : _mm512_setzero_si512();
                transpose(r);
                const long whole = std::min(words - l, 16L);
#pragma GCC unroll 16
                for (long n = 0; n < 16; ++n)
                    if (n < whole) _mm512_mask_storeu_epi32(target + n * WIDTH, lanes(WIDTH - j), r[n]);
            }
        }
}

inline void put(float* p, __mmask16 mask, __m512 x) { _mm512_mask_storeu_ps(p, mask, x); }
inline void put(bf16* p, __mmask16 mask, __m512 x) {
    _mm256_mask_storeu_epi16(p, mask, (__m256i)_mm512_cvtneps_pbh(x));
}

inline __m512 get(const float* p, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, p); }
inline __m512 get(const bf16*, __mmask16) { return _mm512_setzero_ps(); }  // only fp32 is added to

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

// The product of a word of A, the same for all lanes, and 16 of B, added to 16 sums.
inline __m512 multiply_add(__m512 sum, uint32_t a, __m512i b, float) {
    return _mm512_fmadd_ps((__m512)_mm512_set1_epi32(a), (__m512)b, sum);
}
inline __m512 multiply_add(__m512 sum, uint32_t a, __m512i b, bf16) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(a), (__m512bh)b);
}

inline bool made_by_amd() {
    __builtin_cpu_init();
    return __builtin_cpu_is("amd");
}

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

}  // namespace

// A product for Python: FUNCTION on operands of types EA and EB, of the strides given.
#define PRODUCT(NAME, FUNCTION, EA, EB, RESULT)                                                                      \
    extern "C" void gemm_##NAME(const void* a, const void* b, long a_step, long a_stride, long b_stride,             \
                                long b_step, long m, long n, long k, void* c, const float* bias, long add,           \
                                int threads) {                                                                       \
        FUNCTION(Operand<EA>{(const EA*)a, a_step, a_stride}, Operand<EB>{(const EB*)b, b_step, b_stride},           \
                 (RESULT*)c, m, n, k, bias, add != 0, threads);                                                      \
    }
#endif
