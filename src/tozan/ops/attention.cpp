// Causal attention on AVX-512 with bf16 dot products: the products of attention.h, from fp32 or bf16.

#include "attention.h"
#include "attention_backward.h"
#include "attention_forward.h"
#include "panels.h"

#ifdef PANELS
namespace {

// Products in registers, done at once. A is packed in panels of 8 rows.
template <class W>
struct Vectors {
    using Word = W;
    static constexpr long ROWS = 8, GRAIN = 1;  // of a tile: its sums are half of the registers
    static constexpr long FORWARD_KEYS = 256;
    static constexpr bool QUEUED = false;
    typedef __m512 Tile[ROWS][2];

    static long words(long k) { return panels(k, EACH<W>); }
    static void pack_left(Operand<W> from, long rows, long k, uint32_t* to) {
        pack<W, ROWS>(from, 0, rows, 0, words(k), k, to);
    }

    // Word l of row i of A is a[i · ROW + l · NEXT].
    template <long ROW, long NEXT>
    static inline __attribute__((always_inline)) void multiply(Tile& sums, long words, const uint32_t* a,
                                                               const uint32_t* b, long only_right) {
        for (long l = 0; l < words - only_right; ++l, a += NEXT, b += LANES) {
            const __m512i left = _mm512_load_si512(b), right = _mm512_load_si512(b + 16);
#pragma GCC unroll 8
            for (long i = 0; i < ROWS; ++i) {
                sums[i][0] = multiply_add(sums[i][0], a[i * ROW], left, Word{});
                sums[i][1] = multiply_add(sums[i][1], a[i * ROW], right, Word{});
            }
        }
        for (long l = 0; l < only_right; ++l, a += NEXT, b += LANES)
#pragma GCC unroll 8
            for (long i = 0; i < ROWS; ++i)
                sums[i][1] = multiply_add(sums[i][1], a[i * ROW], _mm512_load_si512(b + 16), Word{});
    }

    template <long ACROSS>
    void product(const uint32_t* a, long across, const uint32_t* b, long words, long rows, float* to, long step,
                 bool add, long only_right = 0) {
        for (long r = 0; r < rows; r += ROWS, a += ROWS * (ACROSS ? ACROSS : across), to += ROWS * step) {
            Tile sums;
#pragma GCC unroll 8
            for (long i = 0; i < ROWS; ++i)
                for (long j = 0; j < 2; ++j)
                    sums[i][j] = add ? _mm512_load_ps(to + i * step + 16 * j) : _mm512_setzero_ps();
            multiply<ACROSS ? ACROSS : 1, ACROSS ? 1 : ROWS>(sums, words, a, b, only_right);
#pragma GCC unroll 8
            for (long i = 0; i < ROWS; ++i)
                for (long j = 0; j < 2; ++j) _mm512_store_ps(to + i * step + 16 * j, sums[i][j]);
        }
    }
    template <long ACROSS, class... Arguments>
    void later(Arguments... arguments) {
        product<ACROSS>(arguments...);
    }
    void tick() {}
    void finish_soon() {}
    void finish() {}
};

}  // namespace

ATTENTION(fp32, Vectors<float>)
ATTENTION(bf16, Vectors<bf16>)

// Whether this beats what PyTorch brings: measured on Zen 4 only.
extern "C" int attention_pays() { return made_by_amd(); }
#endif
