// Causal attention forward (see attention.h): 32 queries at a time through blocks of keys.
//
// While exponentials of a block are made, a unit that queues adds the values of the one before and makes the scores of
// the next. The output lies with a query in each lane, too, so that it is Vᵀ · P.

#pragma once

#include "attention.h"

#ifdef PANELS
namespace {

// Takes each query's largest of scores (keys, 32), a multiple of 4; what lies above the diagonal becomes less than all.
inline void highest(float* scores, long query, long key, long keys, __m512 (&top)[2]) {
    for (long r = 0; r < keys; r += 4, scores += 4 * LANES)
        for (int v = 0; v < 2; ++v) {
            __m512 s[4];
#pragma GCC unroll 4
            for (long i = 0; i < 4; ++i) {
                float* at = scores + i * LANES + 16 * v;
                s[i] = _mm512_load_ps(at);
                if (key + r + 4 > query)
                    s[i] = _mm512_mask_mov_ps(splat(NEVER), seeing(key + r + i, query + 16 * v), s[i]),
                    _mm512_store_ps(at, s[i]);
            }
            top[v] = _mm512_max_ps(_mm512_max_ps(_mm512_max_ps(s[0], s[1]), _mm512_max_ps(s[2], s[3])), top[v]);
        }
}

// Exponentials of scores, beside the largest, as words that pair keys; adds them to `sum`.
template <class Word, class Unit>
void exponentials(const float* scores, long keys, float scale, const __m512 (&top)[2], __m512 (&sum)[2], uint32_t* to,
                  Unit& unit) {
    const __m512 by = splat(scale * LOG2_E), less[2] = {_mm512_mul_ps(top[0], by), _mm512_mul_ps(top[1], by)};
    for (long r = 0; r < keys; r += 2, scores += 2 * LANES) {
        __m512 p[2][2];
        for (int i = 0; i < 2; ++i)
            for (int v = 0; v < 2; ++v) {
                p[i][v] = exponential<Word>(_mm512_fmsub_ps(_mm512_load_ps(scores + LANES * i + 16 * v), by, less[v]));
                sum[v] = _mm512_add_ps(sum[v], p[i][v]);
            }
        put_pairs(to + r / EACH<Word> * LANES, p[0], p[1], Word{});
        unit.tick();
    }
}

template <class Unit>
struct Forward {
    using Word = typename Unit::Word;
    Sizes sizes;
    View<const Word> q, k, v;
    View<Word> y;
    float* logs;  // (samples, heads, tokens): logarithm to base 2 of each query's sum of exponentials

    static constexpr long KEYS = Unit::FORWARD_KEYS;
    static constexpr long SIDES = Unit::QUEUED ? 2 : 1;  // buffers, of which one is written, one is read

    long words() const { return Unit::words(sizes.size); }
    long blocks() const { return panels(sizes.tokens, KEYS); }
    long most() const { return panels(sizes.tokens, LANES); }
    long key_words() const { return KEYS * words(); }
    long value_words() const { return up(sizes.size, Unit::ROWS) * Unit::words(KEYS); }
    long shared() const { return blocks() * (key_words() + value_words()); }

    // One thread's: a panel of queries, scores and probabilities of a block, and the output (columns, 32).
    struct Own {
        uint32_t *panel, *p[SIDES];
        float *scores[SIDES], *output;
    };
    Own cut(Pieces& pieces) const {
        Own x;
        x.panel = pieces.words(words() * LANES);
        for (uint32_t*& p : x.p) p = pieces.words(Unit::words(KEYS) * LANES);
        for (float*& s : x.scores) s = pieces.floats(KEYS * LANES);
        x.output = pieces.floats(sizes.columns() * LANES);
        return x;
    }
    long own() const {
        Pieces count{nullptr};
        cut(count);
        return count.next - (uint32_t*)nullptr;
    }

    void head(long b, long kv_head, Team& team, Pieces pieces, Unit& unit) const {
        const Own x = cut(pieces);
        uint32_t *key_panels = team.room, *value_panels = team.room + blocks() * key_words();
        team.share(blocks(), [&](long block) {
            const long key = block * KEYS, keys = std::min(KEYS, sizes.tokens - key);
            Unit::pack_left(rows(k.of(b, kv_head) + key * k.token, k.token), keys, sizes.size,
                            key_panels + block * key_words());
            Unit::pack_left(columns(v.of(b, kv_head) + key * v.token, v.token), sizes.size, keys,
                            value_panels + block * value_words());
        });
        team.share(sizes.group() * most(), [&](long piece) {  // the longest first
            const long h = kv_head * sizes.group() + piece % sizes.group();
            queries(b, h, (most() - 1 - piece / sizes.group()) * LANES, key_panels, value_panels, x, unit);
        });
    }

    void queries(long b, long h, long query, const uint32_t* key_panels, const uint32_t* value_panels, const Own& x,
                 Unit& unit) const {
        const long here = std::min(LANES, sizes.tokens - query), end = query + here, count = panels(end, KEYS);
        const __m512 by = splat(sizes.scale() * LOG2_E);
        __m512 top[2] = {splat(NEVER), splat(NEVER)}, sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
        pack_right<Unit>(rows(q.of(b, h) + query * q.token, q.token), here, sizes.size, x.panel);
        const auto keys_of = [&](long block) { return std::min(KEYS, end - block * KEYS); };
        const auto score = [&](long block) {
            multiply_keys(unit, key_panels + block * key_words(), x.panel, words(), query, block * KEYS,
                          up(keys_of(block), Unit::ROWS), x.scores[block % SIDES]);
        };
        const auto add_values = [&](long block) {
            const long all = Unit::words(std::min(KEYS, sizes.tokens - block * KEYS)), here = Unit::words(keys_of(block));
            const long seen = panels(query + LANES / 2 - block * KEYS, EACH<Word>);  // by any of the first 16 queries
            unit.template product<0>(value_panels + block * value_words(), all, x.p[block % SIDES], here,
                                     up(sizes.size, Unit::ROWS), x.output, LANES, block, std::max(0L, here - seen));
        };
        if (Unit::QUEUED) score(0);
        for (long block = 0; block < count; ++block) {
            const long keys = up(keys_of(block), Unit::ROWS);
            if (!Unit::QUEUED) score(block);
            unit.finish();
            const __m512 before[2] = {top[0], top[1]};
            __m512 factors[2];
            highest(x.scores[block % SIDES], query, block * KEYS, keys, top);
            for (int v = 0; v < 2; ++v) {
                factors[v] = exponential<Word>(_mm512_mul_ps(_mm512_sub_ps(before[v], top[v]), by));
                sum[v] = _mm512_mul_ps(sum[v], factors[v]);
            }
            if (Unit::QUEUED && block) add_values(block - 1);
            if (Unit::QUEUED && block + 1 < count) score(block + 1);
            exponentials<Word>(x.scores[block % SIDES], keys, sizes.scale(), top, sum, x.p[block % SIDES], unit);
            unit.finish();
            if (block) weigh(x.output, factors);
            if (!Unit::QUEUED) add_values(block);
        }
        if (Unit::QUEUED) add_values(count - 1);
        unit.finish();
        finish(b, h, query, here, top, sum, x.output);
    }

    // Multiplies the output so far by each query's factor.
    void weigh(float* output, const __m512 (&factors)[2]) const {
        const auto other = [](__m512 x) { return _mm512_cmp_ps_mask(x, splat(1), _CMP_NEQ_UQ); };
        if (!(other(factors[0]) | other(factors[1]))) return;
        for (long c = 0; c < sizes.size; ++c, output += LANES)
            for (int v = 0; v < 2; ++v)
                _mm512_store_ps(output + 16 * v, _mm512_mul_ps(_mm512_load_ps(output + 16 * v), factors[v]));
    }

    void finish(long b, long h, long query, long here, const __m512 (&top)[2], const __m512 (&sum)[2],
                const float* output) const {
        float* log = logs + (b * sizes.heads + h) * sizes.tokens + query;
        alignas(64) float tops[LANES], sums[LANES];
        for (int v = 0; v < 2; ++v) {
            _mm512_store_ps(sums + 16 * v, sum[v]);
            _mm512_store_ps(tops + 16 * v, _mm512_mul_ps(top[v], splat(sizes.scale() * LOG2_E)));
        }
        for (long i = 0; i < here; ++i) log[i] = tops[i] + std::log2(sums[i]);
        const __m512 shares[2] = {_mm512_div_ps(splat(1), sum[0]), _mm512_div_ps(splat(1), sum[1])};
        put_queries(output, shares, sizes.size, here, y.of(b, h) + query * y.token, y.token);
    }
};

}  // namespace
#endif
