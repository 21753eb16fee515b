// Matrix products on AVX-512 with bf16 dot products: C (m, n) = A (m, k) · B (k, n), from fp32 or bf16 to fp32 or bf16.
//
// Both operands are packed (see panels.h). A tile stays in registers over all of k: what an element's bits are depends
// on its row of A and its column of B alone, not on where the element lies, nor on the number of threads.

#include "panels.h"

#ifdef PANELS
namespace {

constexpr long ROWS = 12, COLUMNS = 32;          // of a tile: 24 of 32 registers hold it
constexpr long BLOCK_BYTES = 384 << 10;          // of A's panels that stay in the second-level cache together
constexpr long DEPTH = 768;                      // words along k that panels have at most, if sums can wait
constexpr long PACKED_BYTES = 16 << 20;          // of B's panels at once

// One tile: `rows` × `columns` of the result from a panel of A and one of B, beginning with what is there (`add`) or
// with 0, and with the bias of each column added at the end, unless it is null.
template <class Word, class Result>
void tile(long words, const uint32_t* a, const uint32_t* b, Result* c, long ldc, long rows, long columns,
          const float* bias, bool add) {
    const __mmask16 inside[2] = {lanes(columns), lanes(columns - 16)};
    __m512 sums[ROWS][2];
#pragma GCC unroll 12
    for (long i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j)
            sums[i][j] = add && i < rows ? get(c + i * ldc + 16 * j, inside[j]) : _mm512_setzero_ps();
    for (long l = 0; l < words; ++l, a += ROWS, b += COLUMNS) {
        const __m512i left = _mm512_loadu_si512(b), right = _mm512_loadu_si512(b + 16);
#pragma GCC unroll 12
        for (long i = 0; i < ROWS; ++i) {
            sums[i][0] = multiply_add(sums[i][0], a[i], left, Word{});
            sums[i][1] = multiply_add(sums[i][1], a[i], right, Word{});
        }
    }
#pragma GCC unroll 12
    for (long i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
            if (bias) sums[i][j] = _mm512_add_ps(sums[i][j], get(bias + 16 * j, inside[j]));
            if (i < rows) put(c + i * ldc + 16 * j, inside[j], sums[i][j]);
        }
}

template <class Word, class EA, class EB, class Result>
void gemm(Operand<EA> a, Operand<EB> b, Result* c, long m, long n, long k, const float* bias, bool add, int threads) {
    const long each = Words<Word, EA>::EACH, all_words = (k + each - 1) / each, row_panels = panels(m, ROWS);
    // Sums wait in memory for the next part of k, if they are fp32 there.
    const long depth = sizeof(Result) == 4 ? std::min(all_words, DEPTH) : all_words;
    const long at_once = std::max(1L, PACKED_BYTES / (depth * COLUMNS * 4));
    const long rows_at_once = std::max(1L, BLOCK_BYTES / (depth * ROWS * 4));
    uint32_t* packed_b = room_for_b.get(std::min(at_once, panels(n, COLUMNS)) * COLUMNS * depth);
    for (long left = 0; left < n; left += at_once * COLUMNS)
        for (long start = 0; start < all_words; start += depth) {
            const long width = std::min(n - left, at_once * COLUMNS), column_panels = panels(width, COLUMNS);
            const long words = std::min(all_words - start, depth);
            const long along = threads_along_rows(row_panels, column_panels, threads), across = threads / along;
            const bool last = start + words == all_words;
#pragma omp parallel num_threads(threads)
            {
#pragma omp for schedule(static)
                for (long j = 0; j < column_panels; ++j)
                    pack<Word, COLUMNS>(b, left + j * COLUMNS, std::min(width - j * COLUMNS, COLUMNS), start, words, k,
                                        packed_b + j * COLUMNS * words);
                uint32_t* packed_a = room_for_a.get((rows_at_once * ROWS * words + 15) / 16 * 16);
#pragma omp for schedule(static)
                for (long t = 0; t < threads; ++t) {
                    const long end = row_panels * (t / across + 1) / along;
                    const long last_column = column_panels * (t % across + 1) / across;
                    for (long i = row_panels * (t / across) / along, here; i < end; i += here) {
                        here = panels(end - i, panels(end - i, rows_at_once));
                        const long rows = std::min(m - i * ROWS, here * ROWS);
                        pack<Word, ROWS>(a, i * ROWS, rows, start, words, k, packed_a);
                        for (long j = column_panels * (t % across) / across; j < last_column; ++j)
                            for (long p = 0; p < here; ++p)
                                tile<Word>(words, packed_a + p * ROWS * words, packed_b + j * COLUMNS * words,
                                           c + (i + p) * ROWS * n + left + j * COLUMNS, n,
                                           std::min(rows - p * ROWS, ROWS), std::min(width - j * COLUMNS, COLUMNS),
                                           bias && last ? bias + left + j * COLUMNS : nullptr, add || start);
                    }
                }
            }
        }
}

}  // namespace

PRODUCT(fff, gemm<float>, float, float, float)
PRODUCT(bfb, gemm<bf16>, bf16, float, bf16)
PRODUCT(bff, gemm<bf16>, bf16, float, float)
PRODUCT(bbb, gemm<bf16>, bf16, bf16, bf16)
PRODUCT(bbf, gemm<bf16>, bf16, bf16, float)

// Whether these beat the libraries that PyTorch brings, which are Intel's.
extern "C" int gemm_pays() {
    return made_by_amd();
}
#endif
