// What both directions of causal attention share (attention_forward.h, attention_backward.h): softmax(Q·Kᵀ/√S)·V.
//
// Scores lie with a key in each row and a query in each lane, so that what softmax needs of a query (largest score,
// sum, gradient's dot product) is a lane of a vector, and nothing is added up across lanes. 32 queries go through
// blocks of keys from the first to their own; of the scores only those of one such block exist, in the second-level
// cache. Forward keeps of each query the logarithm of the sum of its exponentials; backward makes the probabilities
// again from that, as FlashAttention-2 does (Dao, 2023, arXiv 2307.08691), block of keys by block of keys. What lies
// above the diagonal is neither computed nor read. Exponentials are those of base 2, which spares a product.
//
// All products are A · B with 32 columns of B, which lie in packed panels. A `Unit` makes them (AVX-512: attention.cpp,
// AMX: attention_tiles.cpp), at once or while `tick` is called between vector operations, and says how it wants A:
//
//   Word, ROWS, GRAIN             type of the operands; rows, and words along k, that it makes at once
//   words(k)                      of a row of k elements, with what fills it up
//   pack_left(A, rows, k, to)     packs A
//   product<ACROSS>(a, across, b, words, rows, to, step, add, only_right)
//       writes or adds to (rows, 32) sums of which rows lie `step` apart. A lies packed, with `across` words in a row,
//       or, if ACROSS is not 0, with so many words from each row to the next. Of the last `only_right` words the left 16
//       columns are 0. `later` is the same, but may wait longer.
//   tick()                        does a little of what was asked for
//   finish_soon(), finish()       does what `product` was asked for; what `later` was, too
//   QUEUED                        whether anything waits; then its operands and sums must be left alone

#pragma once

#include "panels.h"

#ifdef PANELS
#include <omp.h>
#include <sched.h>

#include <cmath>
#include <vector>

namespace {

constexpr long LANES = 32;  // queries side by side

// q, k, v or their gradients: the heads of a token, of all samples, `size` elements each that lie side by side.
template <class E>
struct View {
    E* p;
    long sample, head, token;
    E* of(long b, long h) const { return p + b * sample + h * head; }
};

// What both directions are told.
struct Sizes {
    long samples, heads, kv_heads, tokens, size;
    long group() const { return heads / kv_heads; }
    float scale() const { return 1 / std::sqrt((float)size); }
    long columns() const { return panels(size, LANES) * LANES; }  // of a head, rounded up to whole panels
};

constexpr float LOG2_E = 1.44269504088896341f;

template <class Word>
constexpr long EACH = Words<Word, Word>::EACH;

inline __m512 splat(float x) { return _mm512_set1_ps(x); }

inline long up(long n, long step) { return panels(n, step) * step; }

constexpr float NEVER = -1e30f;  // a score whose exponential is 0; of -∞ that is NaN

// 2^x for x up to 127, as exactly as the word that it becomes: within 3e-6 (bf16) or 1e-7; 0 below -150; NaN stays NaN.
template <class Word>
inline __m512 exponential(__m512 x) {
    const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), r = _mm512_sub_ps(x, n);
    constexpr bool LONG = sizeof(Word) == 4;
    __m512 y = LONG ? _mm512_fmadd_ps(r, splat(0.001327647199f), splat(0.009675541334f)) : splat(0.009570101911f);
    y = _mm512_fmadd_ps(y, r, splat(LONG ? 0.05550713273f : 0.05591786032f));
    y = _mm512_fmadd_ps(y, r, splat(LONG ? 0.2402211972f : 0.2402474483f));
    y = _mm512_fmadd_ps(y, r, splat(LONG ? 0.6931469671f : 0.6931218147f));
    y = _mm512_fmadd_ps(y, r, splat(LONG ? 1.000000072f : 0.9999992614f));
    return _mm512_scalef_ps(y, n);
}

// Lanes of 16 queries from `query` on that see `key`.
inline __mmask16 seeing(long key, long query) { return (__mmask16)~lanes(key - query); }

// The rows of two neighbouring keys, 32 queries each, as words that pair the keys (bf16) or as they are (fp32).
inline void put_pairs(uint32_t* to, const __m512 (&upper)[2], const __m512 (&lower)[2], float) {
    for (int v = 0; v < 2; ++v)
        _mm512_store_ps(to + 16 * v, upper[v]), _mm512_store_ps(to + LANES + 16 * v, lower[v]);
}
inline void put_pairs(uint32_t* to, const __m512 (&upper)[2], const __m512 (&lower)[2], bf16) {
    alignas(64) static constexpr uint16_t IN_TURN[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                         8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    for (int v = 0; v < 2; ++v) {  // the upper key's in the lower half of a word
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(lower[v], upper[v]);
        _mm512_store_si512(to + 16 * v, _mm512_permutexvar_epi16(_mm512_load_si512(IN_TURN), both));
    }
}

// A key's row, 32 queries, as words that pair the queries.
inline void put_row(uint32_t* to, __m512 left, __m512 right, float) {
    _mm512_store_ps(to, left), _mm512_store_ps(to + 16, right);
}
inline void put_row(uint32_t* to, __m512 left, __m512 right, bf16) {
    _mm512_store_si512(to, (__m512i)_mm512_cvtne2ps_pbh(right, left));
}

// Writes rows of a head of `here` (at most 32) queries from sums with a query in each lane, (columns, 32), each query's
// multiplied by its factor.
template <class Word>
void put_queries(const float* sums, const __m512 (&factors)[2], long size, long here, Word* to, long token) {
    for (long first = 0; first < here; first += 16)
        for (long c = 0; c < size; c += 16) {
            __m512i r[16];
            for (long i = 0; i < 16; ++i)
                r[i] = (__m512i)_mm512_mul_ps(_mm512_load_ps(sums + (c + i) * LANES + first), factors[first / 16]);
            transpose(r);
            for (long i = 0; i < std::min(16L, here - first); ++i)
                put(to + (first + i) * token + c, lanes(size - c), (__m512)r[i]);
        }
}

// Packs B: `count` columns (see `Operand`) of `k` elements into panels of 32, each a multiple of what a unit wants.
template <class Unit, class Word>
void pack_right(Operand<Word> from, long count, long k, uint32_t* to) {
    const long there = panels(k, EACH<Word>), all = Unit::words(k);
    for (long i = 0; i < count; i += LANES, to += LANES * all) {
        pack<Word, LANES>(from, i, std::min(LANES, count - i), 0, there, k, to);
        std::memset(to + there * LANES, 0, (all - there) * LANES * 4);
    }
}

// Rows of a head from p on as vectors along the head, and its columns as vectors along the tokens.
template <class Word>
Operand<Word> rows(const Word* p, long token) {
    return {p, token, 1};
}
template <class Word>
Operand<Word> columns(const Word* p, long token) {
    return {p, 1, token};
}

// Has a unit make the products of `keys` keys from `key` on, packed, with a panel of queries from `query` on: (keys, 32).
// The first 16 queries get none of what they all do not see, if that leaves the unit anything.
template <class Unit>
void multiply_keys(Unit& unit, const uint32_t* packed, const uint32_t* panel, long words, long query, long key,
                   long keys, float* to) {
    const long both = std::min(keys, up(query + LANES / 2 - key, Unit::ROWS));
    unit.template product<0>(packed, words, panel, words, both, to, LANES, false);
    unit.template product<0>(packed + both * words, words, panel, words, keys - both, to + both * LANES, LANES, false,
                             words);
}

// Cuts room into pieces that begin at whole cache lines; without room it counts.
struct Pieces {
    uint32_t* next;
    uint32_t* words(long count) {
        uint32_t* here = next;
        next += up(count, 16);
        return here;
    }
    float* floats(long count) { return (float*)words(count); }
};

// Waits until another thread has written `value`.
inline void await(const uint32_t* place, uint32_t value) {
    for (long turn = 1; __atomic_load_n(place, __ATOMIC_ACQUIRE) != value; ++turn)
        if (turn % 256)
            _mm_pause();
        else
            sched_yield();  // it may wait for this core
}
inline void tell(uint32_t* place, uint32_t value) { __atomic_store_n(place, value, __ATOMIC_RELEASE); }

// Threads that share a head: they take pieces of its work in order, and wait for each other behind the last.
struct alignas(64) Team {
    long size = 1, head = 0;
    uint32_t* room = nullptr;
    long taken = 0, ready = 0;
    uint32_t round = 0;

    template <class Work>
    void share(long pieces, Work work) {
        const uint32_t now = __atomic_load_n(&round, __ATOMIC_ACQUIRE);
        for (long i; (i = __atomic_fetch_add(&taken, 1, __ATOMIC_RELAXED)) < pieces;) work(i);
        if (__atomic_add_fetch(&ready, 1, __ATOMIC_ACQ_REL) < size) return await(&round, now + 1);
        taken = ready = 0;
        tell(&round, now + 1);
    }
};

// How many threads share a head, of which at most `most` find something to do. Bits do not depend on it.
inline long team_size(long heads, long threads, long most) {
    long best = 1;
    double least = INFINITY;
    for (long size = 1; size <= std::min(threads, most); ++size) {
        const double time = (double)panels(heads, threads / size) / size;
        if (time < 0.95 * least) best = size, least = time;  // else it is not worth waiting for each other
    }
    return best;
}

thread_local Room room_for_teams, room_for_threads;

// Does all heads on so many threads. Work says how much it can share, and what rooms it needs.
template <class Unit, class Work>
void run(const Work& work, int threads) {
    const Sizes& n = work.sizes;
    const long heads = n.samples * n.kv_heads;
    std::vector<Team> teams(threads);
    long next = 0;
#pragma omp parallel num_threads(threads)
    {
        const long all = omp_get_num_threads(), me = omp_get_thread_num(), size = team_size(heads, all, work.most());
        Team& team = teams[me / size];
        if (me % size == 0) {
            team.size = std::min(size, all - me);
            team.room = room_for_teams.get(up(work.shared(), 16));
        }
#pragma omp barrier
        Unit unit;
        const Pieces own{room_for_threads.get(up(work.own(), 16))};
        for (;;) {
            team.share(1, [&](long) { team.head = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED); });
            const long head = team.head;
            if (head >= heads) break;
            work.head(head / n.kv_heads, head % n.kv_heads, team, own, unit);
        }
    }
}

}  // namespace

// Both directions for Python, by the products of UNIT; attention_forward.h and attention_backward.h have to be there.
#define ATTENTION(NAME, UNIT)                                                                                        \
    extern "C" void attention_##NAME(const Sizes* n, const View<const UNIT::Word>* q, const View<const UNIT::Word>* k, \
                                     const View<const UNIT::Word>* v, const View<UNIT::Word>* y, float* logs,        \
                                     int threads) {                                                                  \
        run<UNIT>(Forward<UNIT>{*n, *q, *k, *v, *y, logs}, threads);                                                 \
    }                                                                                                                \
    extern "C" void attention_backward_##NAME(                                                                       \
        const Sizes* n, const View<const UNIT::Word>* q, const View<const UNIT::Word>* k,                            \
        const View<const UNIT::Word>* v, const View<const UNIT::Word>* y, const View<const UNIT::Word>* dy,          \
        const float* logs, const View<UNIT::Word>* dq, const View<UNIT::Word>* dk, const View<UNIT::Word>* dv,       \
        int threads) {                                                                                               \
        run<UNIT>(Backward<UNIT>{*n, *q, *k, *v, *y, *dy, logs, *dq, *dk, *dv}, threads);                            \
    }
#endif
