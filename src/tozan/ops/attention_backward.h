// Causal attention backward (see attention.h): blocks of 128 keys, each with all queries that see it, the last first.
//
// Of 32 queries and a block of keys, probabilities P and gradients of scores dS are made; when those of 128 queries
// are there, dV += Pᵀ · dY, dK += dSᵀ · Q and dQ += dS · K. A unit that queues does that while the next 128 are at
// work, and makes the scores of the next 32. What a block of keys adds to dQ comes behind that of the block before,
// also where another thread makes that.

#pragma once

#include "attention.h"

#ifdef PANELS
namespace {

template <class Unit>
struct Backward {
    using Word = typename Unit::Word;
    Sizes sizes;
    View<const Word> q, k, v, y, dy;
    const float* logs;
    View<Word> dq, dk, dv;

    static constexpr long BLOCK = 128;                   // keys, and queries
    static constexpr long ACROSS = BLOCK / EACH<Word>;   // words of a block along either
    static constexpr long SIDES = Unit::QUEUED ? 2 : 1;  // buffers, of which one is written, one is read

    long words() const { return Unit::words(sizes.size); }
    long high() const { return up(sizes.size, Unit::ROWS); }
    long blocks() const { return panels(sizes.tokens, BLOCK); }
    long most() const { return panels(blocks(), 2); }
    long length(long block) const { return std::min(BLOCK, sizes.tokens - block * BLOCK); }

    // What the threads of a team share, for one head of queries.
    struct Head {
        uint32_t *queries, *arriving;                // q and dy: panels of 32 queries, words along the head
        uint32_t *query_columns, *arriving_columns;  // panels of 32 of the head's columns, words that pair queries
        float *logs, *dots;                          // of each query; dots: Σ dy·y
        float *dq, *dk, *dv;                         // (rows, columns), not scaled yet; dq: (columns, 32) of 32 queries
        uint32_t* turns;                             // of each block of queries: blocks of keys that are in dq
    };
    Head cut_head(Pieces& pieces) const {
        Head x;
        const long all = blocks() * BLOCK, panel = all * words(), columns = all / EACH<Word> * sizes.columns();
        for (uint32_t** to : {&x.queries, &x.arriving}) *to = pieces.words(panel);
        for (uint32_t** to : {&x.query_columns, &x.arriving_columns}) *to = pieces.words(columns);
        for (float** to : {&x.logs, &x.dots}) *to = pieces.floats(all);
        for (float** to : {&x.dq, &x.dk, &x.dv}) *to = pieces.floats(all * sizes.columns());
        x.turns = pieces.words(blocks());
        return x;
    }

    // One thread's: a block of keys, and what it makes of them.
    struct Own {
        uint32_t *keys, *values, *key_columns;
        float *scores[SIDES], *arriving[SIDES];         // (keys, 32): keys' products with q, values' with dy
        uint32_t *p[SIDES], *ds[SIDES], *pairs[SIDES];  // of (keys, queries), words pair queries; in `pairs`, keys
    };
    Own cut(Pieces& pieces) const {
        Own x;
        for (uint32_t** to : {&x.keys, &x.values}) *to = pieces.words(BLOCK * words());
        x.key_columns = pieces.words(high() * ACROSS);
        for (long side = 0; side < SIDES; ++side) {
            for (float** to : {&x.scores[side], &x.arriving[side]}) *to = pieces.floats(BLOCK * LANES);
            for (uint32_t** to : {&x.p[side], &x.ds[side], &x.pairs[side]}) *to = pieces.words(BLOCK * ACROSS);
        }
        return x;
    }
    long shared() const {
        Pieces count{nullptr};
        cut_head(count);
        return count.next - (uint32_t*)nullptr;
    }
    long own() const {
        Pieces count{nullptr};
        cut(count);
        return count.next - (uint32_t*)nullptr;
    }

    void head(long b, long kv_head, Team& team, Pieces pieces, Unit& unit) const {
        Pieces room{team.room};
        const Head x = cut_head(room);
        const Own own = cut(pieces);
        for (long h = kv_head * sizes.group(), end = h + sizes.group(), first = h; h < end; ++h) {
            team.share(blocks(), [&](long block) { prepare(b, h, block, x); });
            team.share(blocks(), [&](long block) {
                keys(b, kv_head, block, x, own, unit, h == first, team.size > 1);
                if (h + 1 < end) return;
                write(x.dk, sizes.scale(), block, dk.of(b, kv_head), dk.token);
                write(x.dv, 1, block, dv.of(b, kv_head), dv.token);
            });
            team.share(blocks(), [&](long block) {
                const __m512 scale = splat(sizes.scale()), factors[2] = {scale, scale};
                for (long t = block * BLOCK; t < block * BLOCK + length(block); t += LANES)
                    put_queries(x.dq + t * sizes.columns(), factors, sizes.size, std::min(LANES, sizes.tokens - t),
                                dq.of(b, h) + t * dq.token, dq.token);
            });
        }
    }

    // Packs a block of queries and what arrives for them.
    void prepare(long b, long h, long block, const Head& x) const {
        const long at = block * BLOCK, here = length(block), size = sizes.size;
        const Word *from = q.of(b, h) + at * q.token, *back = dy.of(b, h) + at * dy.token;
        const Word* out = y.of(b, h) + at * y.token;
        pack_right<Unit>(rows(from, q.token), here, size, x.queries + at * words());
        pack_right<Unit>(rows(back, dy.token), here, size, x.arriving + at * words());
        const long columns_at = at / EACH<Word> * sizes.columns();
        pack_right<Unit>(columns(from, q.token), size, here, x.query_columns + columns_at);
        pack_right<Unit>(columns(back, dy.token), size, here, x.arriving_columns + columns_at);
        for (long t = 0; t < up(here, LANES); ++t) {  // a query beyond the last has no probabilities
            x.logs[at + t] = t < here ? logs[(b * sizes.heads + h) * sizes.tokens + at + t] : -NEVER;
            x.dots[at + t] = t < here ? dot(out + t * y.token, back + t * dy.token, size) : 0;
        }
        x.turns[block] = 0;
    }

    static float dot(const Word* a, const Word* b, long size) {
        __m512 sum = _mm512_setzero_ps();
        for (long c = 0; c < size; c += 16) sum = _mm512_fmadd_ps(wide(a + c, size - c), wide(b + c, size - c), sum);
        return _mm512_reduce_add_ps(sum);
    }
    static __m512 wide(const float* p, long count) { return _mm512_maskz_loadu_ps(lanes(count), p); }
    static __m512 wide(const bf16* p, long count) { return (__m512)_mm512_slli_epi32(halves(p, count), 16); }

    void write(const float* sums, float scale, long block, Word* to, long token) const {
        for (long t = block * BLOCK; t < block * BLOCK + length(block); ++t)
            for (long c = 0; c < sizes.size; c += 16)
                put(to + t * token + c, lanes(sizes.size - c),
                    _mm512_mul_ps(_mm512_load_ps(sums + t * sizes.columns() + c), splat(scale)));
    }

    // All that a block of keys has to do with a head of queries.
    void keys(long b, long kv_head, long block, const Head& x, const Own& own, Unit& unit, bool fresh,
              bool in_turn) const {
        const long key = block * BLOCK, here = length(block), count = up(here, Unit::ROWS);
        const Word *from = k.of(b, kv_head) + key * k.token, *values = v.of(b, kv_head) + key * v.token;
        Unit::pack_left(rows(from, k.token), here, sizes.size, own.keys);
        Unit::pack_left(rows(values, v.token), here, sizes.size, own.values);
        Unit::pack_left(columns(from, k.token), sizes.size, here, own.key_columns);
        const long last = panels(sizes.tokens, LANES) - 1, first = key / LANES;
        const auto seen = [&](long panel) { return std::min(count, (panel + 1) * LANES - key); };
        const auto score = [&](long panel) {
            const long side = panel % SIDES, query = panel * LANES, at = query * words();
            multiply_keys(unit, own.keys, x.queries + at, words(), query, key, seen(panel), own.scores[side]);
            multiply_keys(unit, own.values, x.arriving + at, words(), query, key, seen(panel), own.arriving[side]);
        };
        if (Unit::QUEUED) score(last);
        for (long panel = last; panel >= first; --panel) {
            if (!Unit::QUEUED) score(panel);
            unit.finish_soon();
            if (Unit::QUEUED && panel > first) score(panel - 1);
            gradients(x, own, panel * LANES, key, seen(panel), unit);
            if (panel % (BLOCK / LANES) == 0) {
                const long queries = panel * LANES / BLOCK;
                unit.finish();
                add(x, own, queries, block, unit, fresh && queries == blocks() - 1);
                add_queries(x, own, queries, block, unit, in_turn);
            }
        }
        unit.finish();
    }

    // Probabilities and gradients of the scores of 32 queries with `keys` keys.
    void gradients(const Head& x, const Own& own, long query, long key, long keys, Unit& unit) const {
        const __m512 by = splat(sizes.scale() * LOG2_E);
        const long panel = query / LANES, here = query % BLOCK, side = query / BLOCK % SIDES;
        const float *scores = own.scores[panel % SIDES], *arriving = own.arriving[panel % SIDES];
        uint32_t *p_to = own.p[side] + here / EACH<Word>, *ds_to = own.ds[side] + here / EACH<Word>;
        uint32_t* pairs = own.pairs[side] + here * ACROSS;
        __m512 less[2], dots[2];
        for (int v = 0; v < 2; ++v)
            less[v] = _mm512_load_ps(x.logs + query + 16 * v), dots[v] = _mm512_load_ps(x.dots + query + 16 * v);
        for (long r = 0; r < keys; r += 2) {
            __m512 ds[2][2];
#pragma GCC unroll 2
            for (long i = 0; i < 2; ++i) {
                __m512 p[2];
#pragma GCC unroll 2
                for (int v = 0; v < 2; ++v) {
                    const long at = (r + i) * LANES + 16 * v;
                    p[v] = exponential<Word>(_mm512_fmsub_ps(_mm512_load_ps(scores + at), by, less[v]));
                    if (key + r + 2 > query) p[v] = _mm512_maskz_mov_ps(seeing(key + r + i, query + 16 * v), p[v]);
                    ds[i][v] = _mm512_mul_ps(_mm512_sub_ps(_mm512_load_ps(arriving + at), dots[v]), p[v]);
                }
                put_row(p_to + (r + i) * ACROSS, p[0], p[1], Word{});
                put_row(ds_to + (r + i) * ACROSS, ds[i][0], ds[i][1], Word{});
            }
            put_pairs(pairs + r / EACH<Word> * LANES, ds[0], ds[1], Word{});
            unit.tick();
        }
    }

    // What a block of queries adds to the gradients of a block of keys and its values, or begins them with.
    void add(const Head& x, const Own& own, long queries, long block, Unit& unit, bool fresh) const {
        const long key = block * BLOCK, query = queries * BLOCK, side = queries % SIDES, columns = sizes.columns();
        const long words = Unit::words(length(queries)), at = query / EACH<Word> * columns;
        for (long c = 0; c < columns; c += LANES)
            for (long r = 0; r < length(block); r += Unit::ROWS) {
                // Queries before these keys do not see them.
                const long skipped = std::max(0L, key + r - query) / EACH<Word> / Unit::GRAIN * Unit::GRAIN;
                const long rest = words - skipped;
                if (rest <= 0) continue;
                const long left = r * ACROSS + skipped, right = at + c * words + skipped * LANES;
                const long sum = (key + r) * columns + c;
                unit.template later<ACROSS>(own.p[side] + left, 0, x.arriving_columns + right, rest, Unit::ROWS,
                                            x.dv + sum, columns, !fresh);
                unit.template later<ACROSS>(own.ds[side] + left, 0, x.query_columns + right, rest, Unit::ROWS,
                                            x.dk + sum, columns, !fresh);
            }
    }

    // What a block of keys adds to the gradient of a block of queries, or begins it with; in turn, if threads share it.
    void add_queries(const Head& x, const Own& own, long queries, long block, Unit& unit, bool in_turn) const {
        const long key = block * BLOCK, side = queries % SIDES, all = Unit::words(length(block));
        const auto ask = [&](auto... arguments) {
            in_turn ? unit.template product<0>(arguments...) : unit.template later<0>(arguments...);
        };
        if (in_turn) await(x.turns + queries, block);
        for (long i = 0; i < length(queries); i += LANES) {
            const long query = queries * BLOCK + i, seen = std::min(length(block), query + LANES - key);
            ask(own.key_columns, all, own.pairs[side] + i * ACROSS, Unit::words(seen), high(),
                x.dq + query * sizes.columns(), LANES, block > 0);
        }
        if (!in_turn) return;
        unit.finish_soon();
        tell(x.turns + queries, block + 1);
    }
};

}  // namespace
#endif
