// Blocks of 32 × 32 results in four tile registers, which products and attention on AMX share.
//
// Two registers hold 32 rows of A and two 32 columns of B, over 32 elements along k. Rows of A are words along k; B lies
// in a panel (see panels.h), 32 words side by side for each along k.

#pragma once

#include "panels.h"
#include "tiles.h"

#if defined(PANELS) && defined(TILES)
namespace {

constexpr long EDGE = 2 * tiles::ROWS;      // rows and columns of a block, and elements along k of a step
constexpr long STEP = EDGE * tiles::WORDS;  // words of a panel for one step along k

// Packs one tile of A: 16 rows (`here` of them there) × 16 words along k (`left` elements), rows `across` words apart.
inline __attribute__((always_inline)) void pack_tile(const bf16* p, long step, long stride, long here, long left,
                                                     uint32_t* to, long across) {
    using W = Words<bf16, bf16>;
    const __m512i nothing = _mm512_setzero_si512();
    __m512i r[16];
    if (step == 1) {  // neighbours along k lie a row apart
        for (long l = 0; l < 32; ++l) _mm_prefetch((const char*)(p + (l + 32) * stride), _MM_HINT_T0);
#pragma GCC unroll 16
        for (long l = 0; l < 32; l += 2)
            r[l / 2] = l < left ? W::across(p + l * stride, stride, left - l, here) : nothing;
        transpose(r);
    } else {
#pragma GCC unroll 16
        for (long i = 0; i < 16; ++i) r[i] = i < here ? W::along(p + i * step, left) : nothing;
    }
#pragma GCC unroll 16
    for (long i = 0; i < 16; ++i) _mm512_store_si512(to + across * i, r[i]);
}

constexpr long BLOCK_RIGHT = tiles::WORDS;  // of a row of sums: the right half

// Begins a block with 0 or, if `add`, with sums of which rows lie `stride` bytes apart.
inline __attribute__((always_inline)) void begin_block(const float* sums, long stride, bool add) {
    if (!add) return tiles::zero<0>(), tiles::zero<1>(), tiles::zero<2>(), tiles::zero<3>();
    const float* low = sums + tiles::ROWS * (stride / 4);
    tiles::load<0>(sums, stride), tiles::load<1>(sums + BLOCK_RIGHT, stride);
    tiles::load<2>(low, stride), tiles::load<3>(low + BLOCK_RIGHT, stride);
}

// Adds 16 words along k: of A the upper and the lower 16 rows, `across` bytes from one to the next, and a panel of B.
inline __attribute__((always_inline)) void step_block(const uint32_t* upper, const uint32_t* lower, long across,
                                                      const uint32_t* b) {
    tiles::load<4>(upper, across);
    tiles::load<6>(b, EDGE * 4);
    tiles::multiply_add<0, 4, 6>();
    tiles::load<7>(b + BLOCK_RIGHT, EDGE * 4);
    tiles::multiply_add<1, 4, 7>();
    tiles::load<5>(lower, across);
    tiles::multiply_add<2, 5, 6>();
    tiles::multiply_add<3, 5, 7>();
}

inline __attribute__((always_inline)) void end_block(float* sums, long stride) {
    float* low = sums + tiles::ROWS * (stride / 4);
    tiles::store<0>(sums, stride), tiles::store<1>(sums + BLOCK_RIGHT, stride);
    tiles::store<2>(low, stride), tiles::store<3>(low + BLOCK_RIGHT, stride);
}

}  // namespace
#endif
