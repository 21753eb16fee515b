// Matrix products on AMX: C (m, n) = A (m, k) · B (k, n), from bf16 (B also from fp32) to fp32 or bf16.
//
// A block of the result has 32 × 32 elements (see tile_blocks.h). Both operands are packed (see panels.h), of A as many
// panels at a time as fit into the second-level cache. Sums are added up in tiles in the order of k, in fp32: as in
// gemm.cpp an element's bits depend on its row of A and its column of B alone.

#include "panels.h"
#include "tile_blocks.h"
#include "tiles.h"

#if defined(PANELS) && defined(TILES)
namespace {

constexpr long BLOCK_BYTES = 1280 << 10;    // of A's panels that stay in the second-level cache together
constexpr long PACKED_BYTES = 16 << 20;     // of B's panels at once
constexpr long STREAMED_BYTES = 2 << 20;    // of a result that no cache keeps until it is read

// What is decided by measurement on each machine (see trial.py); bits do not depend on it.
long steps_at_once = 12;  // along k: then a panel of B stays in the first-level cache
bool streams = true;      // whether large results are written past the caches

thread_local Room room_for_sums;

// Packs rows `first` … `first + count` into panels of EDGE rows: of a panel, two tiles for each of `steps` along k. It
// goes along whatever lies together in memory.
void pack_rows(Operand<bf16> from, long first, long count, long steps, long k, uint32_t* to) {
    const bf16* corner = from.p + first * from.step;
    const long high = panels(count, EDGE) * 2;
    for (long t = 0; t < high * steps; ++t) {
        const long s = from.step == 1 ? t / high : t % steps, i = from.step == 1 ? t % high : t / steps;
        pack_tile(corner + i * tiles::ROWS * from.step + s * EDGE * from.stride, from.step, from.stride,
                  count - i * tiles::ROWS, k - s * EDGE, to + (i / 2 * steps + s) * STEP + i % 2 * STEP / 2,
                  tiles::WORDS);
    }
}

// Packs `count` columns into panels, one panel only if there must be zeros behind k.
template <class Element>
void pack_columns(Operand<Element> from, long first, long count, long words, long steps, long k, uint32_t* to) {
    pack<bf16, EDGE>(from, first, count, 0, words, k, to);
    std::memset(to + words * EDGE, 0, (steps * STEP - words * EDGE) * 4);
}

// Adds `steps` steps along k of a panel of A and one of B to `sums` (32 × 32), or begins with 0.
inline void multiply(long steps, const uint32_t* a, const uint32_t* b, float* sums, bool begin) {
    begin_block(sums, EDGE * 4, !begin);
    for (long s = 0; s < steps; ++s, a += STEP, b += STEP) step_block(a, a + STEP / 2, tiles::WORDS * 4, b);
    end_block(sums, EDGE * 4);
}

// The first `columns` of 32 sums as they lie in the result; whole lines go past the caches, if `stream`.
inline void put_row(float* p, long columns, __m512 left, __m512 right, bool stream) {
    if (stream && columns >= EDGE && (uintptr_t)p % 64 == 0) {
        _mm512_stream_ps(p, left);
        _mm512_stream_ps(p + 16, right);
    } else {
        put(p, lanes(columns), left);
        put(p + 16, lanes(columns - 16), right);
    }
}
inline void put_row(bf16* p, long columns, __m512 left, __m512 right, bool stream) {
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(right, left);
    if (stream && columns >= EDGE && (uintptr_t)p % 64 == 0)
        _mm512_stream_si512((__m512i*)p, both);
    else
        _mm512_mask_storeu_epi16(p, lanes32(columns), both);
}

// Writes a finished block, or adds it to what is there, with each column's bias, unless that is null.
template <class Result>
void finish(const float* sums, Result* c, long ldc, long rows, long columns, const float* bias, bool add, bool stream) {
    const __mmask16 inside[2] = {lanes(columns), lanes(columns - 16)};
    const __m512 nothing = _mm512_setzero_ps();
    const __m512 bias_left = bias ? get(bias, inside[0]) : nothing;
    const __m512 bias_right = bias ? get(bias + 16, inside[1]) : nothing;
    for (long i = 0; i < std::min(rows, EDGE); ++i, sums += EDGE, c += ldc) {
        __m512 left = _mm512_load_ps(sums), right = _mm512_load_ps(sums + 16);
        if (bias) left = _mm512_add_ps(left, bias_left), right = _mm512_add_ps(right, bias_right);
        if (add) left = _mm512_add_ps(left, get(c, inside[0])), right = _mm512_add_ps(right, get(c + 16, inside[1]));
        put_row(c, columns, left, right, stream);
    }
}

// `rows` of the result from packed rows, and the columns of `count` panels of B.
template <class Result>
void rows_of(const uint32_t* a, const uint32_t* b, Result* c, long rows, long columns, long n, long steps,
             const float* bias, bool add, bool stream) {
    const long row_panels = panels(rows, EDGE), part = std::min(steps, steps_at_once);
    float* sums = (float*)room_for_sums.get((part < steps ? row_panels : 1) * EDGE * EDGE);
    for (long j = 0; j < columns; j += EDGE, b += steps * STEP)
        for (long s = 0; s < steps; s += part)
            for (long p = 0; p < row_panels; ++p) {
                float* block = sums + (part < steps ? p * EDGE * EDGE : 0);
                multiply(std::min(part, steps - s), a + (p * steps + s) * STEP, b + s * STEP, block, s == 0);
                if (s + part >= steps)
                    finish(block, c + p * EDGE * n + j, n, rows - p * EDGE, columns - j, bias ? bias + j : nullptr,
                           add, stream);
            }
}

template <class EB, class Result>
void gemm(Operand<bf16> a, Operand<EB> b, Result* c, long m, long n, long k, const float* bias, bool add, int threads) {
    const long words = (k + 1) / 2, steps = panels(words, tiles::WORDS), row_panels = panels(m, EDGE);
    const long at_once = std::max(1L, PACKED_BYTES / (steps * STEP * 4));
    const long rows_at_once = std::max(1L, BLOCK_BYTES / (steps * STEP * 4));
    const bool stream = streams && !add && m * n * (long)sizeof(Result) >= STREAMED_BYTES;
    uint32_t* packed_b = room_for_b.get(std::min(at_once, panels(n, EDGE)) * steps * STEP);
    for (long left = 0; left < n; left += at_once * EDGE) {
        const long width = std::min(n - left, at_once * EDGE), column_panels = panels(width, EDGE);
        const long along = threads_along_rows(row_panels, column_panels, threads), across = threads / along;
        // Panels that are packed at once, so that rows of B are read in longer pieces.
        const long together = words % tiles::WORDS ? 1 : std::clamp(column_panels / threads, 1L, 16L);
#pragma omp parallel num_threads(threads)
        {
            const tiles::Session session;
#pragma omp for schedule(static)
            for (long j = 0; j < column_panels; j += together)
                pack_columns(b, left + j * EDGE, std::min(width - j * EDGE, together * EDGE), words, steps, k,
                             packed_b + j * steps * STEP);
            uint32_t* packed_a = room_for_a.get(rows_at_once * steps * STEP);
#pragma omp for schedule(static)
            for (long t = 0; t < threads; ++t) {
                const long end = row_panels * (t / across + 1) / along;
                const long first = column_panels * (t % across) / across * EDGE;
                const long columns = std::min(width, column_panels * (t % across + 1) / across * EDGE) - first;
                for (long i = row_panels * (t / across) / along, here; i < end; i += here) {
                    here = panels(end - i, panels(end - i, rows_at_once));
                    const long rows = std::min(m - i * EDGE, here * EDGE);
                    pack_rows(a, i * EDGE, rows, steps, k, packed_a);
                    rows_of(packed_a, packed_b + first / EDGE * steps * STEP, c + i * EDGE * n + left + first, rows,
                            columns, n, steps, bias ? bias + left + first : nullptr, add, stream);
                }
            }
            if (stream) _mm_sfence();  // what went past the caches is there before other threads go on
        }
    }
}

}  // namespace

PRODUCT(bfb, gemm, bf16, float, bf16)
PRODUCT(bff, gemm, bf16, float, float)
PRODUCT(bbb, gemm, bf16, bf16, bf16)
PRODUCT(bbf, gemm, bf16, bf16, float)

// Steps of 32 elements along k that are done at once, and whether large results are written past the caches.
extern "C" void gemm_tiles_tune(long steps, int stream) { steps_at_once = steps, streams = stream != 0; }
#endif
