// Causal attention on AVX-512 with bf16 dot products, forward and backward: softmax(Q·Kᵀ/√S)·V, a head at a time.
//
// Scores lie with a key in each row and a query in each lane, so that what softmax needs of a query (largest score,
// sum, gradient's dot product) is a lane of a vector, and nothing is added up across lanes. 32 queries go through
// blocks of keys from the first to their own; of the scores only those of one such block exist, in the second-level
// cache. Forward keeps of each query the logarithm of the sum of its exponentials; backward makes the probabilities
// again from that, as FlashAttention-2 does (Dao, 2023, arXiv 2307.08691), block of keys by block of keys. Tiles above
// the diagonal are neither computed nor read.
//
// Each head is computed by one thread in one order. Exponentials are those of base 2, which spares a product.

#include "panels.h"

#ifdef PANELS
#include <cmath>

namespace {

constexpr long ROWS = 8, LANES = 32;       // of a tile: its sums are half of the registers
constexpr long FORWARD_KEYS = 256;         // in a block of forward's
constexpr long KEYS = 128, QUERIES = 128;  // in a block of backward's; both multiples of 32

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

// 2^x for x up to 127, as exactly as the word that it becomes: within 3e-6 (bf16) or 1e-7; 0 below -150; NaN stays NaN.
template <class Word>
inline __m512 exponential(__m512 x) {
    x = _mm512_max_ps(splat(-160), x);
    const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), r = _mm512_sub_ps(x, n);
    constexpr bool LONG = sizeof(Word) == 4;
    __m512 y = LONG ? _mm512_fmadd_ps(r, splat(0.001327647199f), splat(0.009675541334f)) : splat(0.009570101911f);
    y = _mm512_fmadd_ps(y, r, splat(LONG ? 0.05550713273f : 0.05591786032f));
    y = _mm512_fmadd_ps(y, r, splat(LONG ? 0.2402211972f : 0.2402474483f));
    y = _mm512_fmadd_ps(y, r, splat(LONG ? 0.6931469671f : 0.6931218147f));
    y = _mm512_fmadd_ps(y, r, splat(LONG ? 1.000000072f : 0.9999992614f));
    return _mm512_scalef_ps(y, n);
}

// A tile of a result, in registers.
typedef __m512 Tile[ROWS][2];

inline __attribute__((always_inline)) void zero(Tile& sums) {
#pragma GCC unroll 8
    for (long i = 0; i < ROWS; ++i) sums[i][0] = sums[i][1] = _mm512_setzero_ps();
}
inline __attribute__((always_inline)) void load(Tile& sums, const float* from, long step) {
#pragma GCC unroll 8
    for (long i = 0; i < ROWS; ++i)
        sums[i][0] = _mm512_load_ps(from + i * step), sums[i][1] = _mm512_load_ps(from + i * step + 16);
}
inline __attribute__((always_inline)) void store(const Tile& sums, float* to, long step) {
#pragma GCC unroll 8
    for (long i = 0; i < ROWS; ++i)
        _mm512_store_ps(to + i * step, sums[i][0]), _mm512_store_ps(to + i * step + 16, sums[i][1]);
}

// Adds A · B: word l of row i of A is a[i · ROW + l · NEXT], B is a panel.
template <class Word, long ROW, long NEXT>
inline __attribute__((always_inline)) void multiply(Tile& sums, long words, const uint32_t* a, const uint32_t* b) {
    for (long l = 0; l < words; ++l, a += NEXT, b += LANES) {
        const __m512i left = _mm512_load_si512(b), right = _mm512_load_si512(b + 16);
#pragma GCC unroll 8
        for (long i = 0; i < ROWS; ++i) {
            sums[i][0] = multiply_add(sums[i][0], a[i * ROW], left, Word{});
            sums[i][1] = multiply_add(sums[i][1], a[i * ROW], right, Word{});
        }
    }
}

// Lanes of 16 queries from `query` on that see `key`.
inline __mmask16 seeing(long key, long query) { return (__mmask16)~lanes(key - query); }

// The rows of two neighbouring keys, 32 queries each, as words that pair the keys (bf16) or as they are (fp32).
inline void put_pairs(uint32_t* to, long step, const __m512 (&upper)[2], const __m512 (&lower)[2], float) {
    for (int v = 0; v < 2; ++v)
        _mm512_store_ps(to + 16 * v, upper[v]), _mm512_store_ps(to + step + 16 * v, lower[v]);
}
inline void put_pairs(uint32_t* to, long, const __m512 (&upper)[2], const __m512 (&lower)[2], bf16) {
    for (int v = 0; v < 2; ++v) {  // the upper key's in the lower half of a word
        const __m512i first = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(upper[v]));
        const __m512i second = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(lower[v]));
        _mm512_store_si512(to + 16 * v, _mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
    }
}

// A key's row, 32 queries, as words that pair the queries.
inline void put_row(uint32_t* to, __m512 left, __m512 right, float) {
    _mm512_store_ps(to, left), _mm512_store_ps(to + 16, right);
}
inline void put_row(uint32_t* to, __m512 left, __m512 right, bf16) {
    _mm512_store_si512(to, (__m512i)_mm512_cvtne2ps_pbh(right, left));
}

// Cuts a thread's room into pieces that begin at whole cache lines.
struct Pieces {
    uint32_t* next;
    uint32_t* words(long count) {
        uint32_t* here = next;
        next += (count + 15) / 16 * 16;
        return here;
    }
    float* floats(long count) { return (float*)words(count); }
};

// `count` rows of a head from `first` on, in panels of WIDTH rows with words along the head.
template <long WIDTH, class Word>
void pack_rows(const Word* head, long token, long size, long first, long count, uint32_t* to) {
    pack<Word, WIDTH>(Operand<Word>{head, token, 1}, first, count, 0, panels(size, EACH<Word>), size, to);
}
// The same in panels of 32 columns with words that pair rows.
template <class Word>
void pack_columns(const Word* head, long token, long size, long first, long count, uint32_t* to) {
    pack<Word, LANES>(Operand<Word>{head + first * token, 1, token}, 0, size, 0, panels(count, EACH<Word>), count, to);
}

// ---------------------------------------------------------------------------------------------------------------------

// What forward makes of 32 queries while it goes along the keys: their largest score, the sum of their exponentials
// and the output as far as it is known, which counts as much as the exponentials do.
struct Running {
    __m512 top[2], sum[2];
    float* output;  // (32, columns)
};

// Scores (keys, 32) of 32 queries from `query` on with `keys` keys from `key` on.
template <class Word>
void scores(const uint32_t* query_panel, const uint32_t* key_panels, long words, long query, long key, long keys,
            float* to, __m512 (&top)[2]) {
    for (long r = 0; r < keys; r += ROWS) {
        Tile s;
        zero(s);
        multiply<Word, 1, ROWS>(s, words, key_panels + r * words, query_panel);
#pragma GCC unroll 8
        for (long i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
            for (int v = 0; v < 2; ++v) {
                if (key + r + ROWS > query)
                    s[i][v] = _mm512_mask_mov_ps(splat(-INFINITY), seeing(key + r + i, query + 16 * v), s[i][v]);
                top[v] = _mm512_max_ps(s[i][v], top[v]);
            }
        store(s, to + r * LANES, LANES);
    }
}

// Exponentials of scores, beside the largest, as words that pair keys; adds them to `sum`.
template <class Word>
void exponentials(const float* scores, long keys, float scale, const __m512 (&top)[2], __m512 (&sum)[2], uint32_t* to) {
    const __m512 by = splat(scale * LOG2_E), less[2] = {_mm512_mul_ps(top[0], by), _mm512_mul_ps(top[1], by)};
    for (long r = 0; r < keys; r += 2, scores += 2 * LANES) {
        __m512 p[2][2];
        for (int i = 0; i < 2; ++i)
            for (int v = 0; v < 2; ++v) {
                p[i][v] = exponential<Word>(_mm512_fmsub_ps(_mm512_load_ps(scores + LANES * i + 16 * v), by, less[v]));
                sum[v] = _mm512_add_ps(sum[v], p[i][v]);
            }
        put_pairs(to + r / EACH<Word> * LANES, LANES, p[0], p[1], Word{});
    }
}

template <class Word>
struct Forward {
    Sizes sizes;
    View<const Word> q, k, v;
    View<Word> y;
    float* logs;  // (samples, heads, tokens): logarithm to base 2 of each query's sum of exponentials

    static constexpr long PAIRED = FORWARD_KEYS / EACH<Word>;  // words along the keys of a block

    long room() const {
        const long words = panels(sizes.size, EACH<Word>), rows = sizes.tokens + LANES;
        return rows * words + rows * sizes.columns() + LANES * (words + FORWARD_KEYS + PAIRED + sizes.columns() + 8);
    }

    // Of one head of keys and values, the panels of queries `part`, `part` + `parts`, ….
    void head(long b, long kv_head, long part, long parts, Pieces pieces) const {
        const long tokens = sizes.tokens, words = panels(sizes.size, EACH<Word>);
        uint32_t* key_panels = pieces.words(panels(tokens, ROWS) * ROWS * words);
        uint32_t* value_panels = pieces.words(panels(tokens, EACH<Word>) * sizes.columns());
        pack_rows<ROWS>(k.of(b, kv_head), k.token, sizes.size, 0, tokens, key_panels);
        pack_columns(v.of(b, kv_head), v.token, sizes.size, 0, tokens, value_panels);
        for (long h = kv_head * sizes.group(); h < (kv_head + 1) * sizes.group(); ++h)
            for (long query = part * LANES; query < tokens; query += parts * LANES)
                queries(b, h, query, key_panels, value_panels, pieces);
    }

    void queries(long b, long h, long query, const uint32_t* key_panels, const uint32_t* value_panels,
                 Pieces pieces) const {
        const long size = sizes.size, words = panels(size, EACH<Word>), columns = sizes.columns();
        const long here = std::min(LANES, sizes.tokens - query), end = query + here;
        uint32_t *panel = pieces.words(words * LANES), *p = pieces.words(PAIRED * LANES);
        float *s = pieces.floats(FORWARD_KEYS * LANES), *output = pieces.floats(LANES * columns);
        float* factors = pieces.floats(LANES);
        pack_rows<LANES>(q.of(b, h), q.token, size, query, here, panel);
        __m512 top[2] = {splat(-INFINITY), splat(-INFINITY)}, sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
        const __m512 by = splat(sizes.scale() * LOG2_E);
        for (long key = 0; key < end; key += FORWARD_KEYS) {
            const long keys = panels(std::min(FORWARD_KEYS, end - key), ROWS) * ROWS;
            const __m512 before[2] = {top[0], top[1]};
            scores<Word>(panel, key_panels + key * words, words, query, key, keys, s, top);
            for (int v = 0; v < 2; ++v) {
                const __m512 factor = exponential<Word>(_mm512_mul_ps(_mm512_sub_ps(before[v], top[v]), by));
                _mm512_store_ps(factors + 16 * v, factor);
                sum[v] = _mm512_mul_ps(sum[v], factor);
            }
            exponentials<Word>(s, keys, sizes.scale(), top, sum, p);
            values(p, value_panels, query, key, end, key ? factors : nullptr, output);
        }
        finish(b, h, query, here, top, sum, factors, output);
    }

    // Adds the values of a block of keys to the output of 32 queries, after multiplying that by their `factors`.
    void values(const uint32_t* p, const uint32_t* value_panels, long query, long key, long end, const float* factors,
                float* output) const {
        const long columns = sizes.columns(), all = panels(sizes.tokens, EACH<Word>);
        for (long c = 0; c < columns; c += LANES)
            for (long i = 0; i < LANES; i += ROWS) {
                Tile sums;
                if (factors) {
                    load(sums, output + i * columns + c, columns);
#pragma GCC unroll 8
                    for (long row = 0; row < ROWS; ++row)
                        for (int v = 0; v < 2; ++v)
                            sums[row][v] = _mm512_mul_ps(sums[row][v], splat(factors[i + row]));
                } else {
                    zero(sums);
                }
                const long keys = std::min({FORWARD_KEYS, query + i + ROWS - key, end - key});
                multiply<Word, 1, LANES>(sums, panels(keys, EACH<Word>), p + i,
                                         value_panels + c * all + key / EACH<Word> * LANES);
                store(sums, output + i * columns + c, columns);
            }
    }

    void finish(long b, long h, long query, long here, const __m512 (&top)[2], const __m512 (&sum)[2], float* factors,
                const float* output) const {
        float* log = logs + (b * sizes.heads + h) * sizes.tokens + query;
        alignas(64) float tops[LANES];
        for (int v = 0; v < 2; ++v) {
            _mm512_store_ps(factors + 16 * v, sum[v]);
            _mm512_store_ps(tops + 16 * v, _mm512_mul_ps(top[v], splat(sizes.scale() * LOG2_E)));
        }
        for (long i = 0; i < here; ++i) {
            log[i] = tops[i] + std::log2(factors[i]);
            Word* row = y.of(b, h) + (query + i) * y.token;
            const __m512 share = splat(1 / factors[i]);
            for (long c = 0; c < sizes.size; c += 16)
                put(row + c, lanes(sizes.size - c),
                    _mm512_mul_ps(_mm512_load_ps(output + i * sizes.columns() + c), share));
        }
    }
};

// ---------------------------------------------------------------------------------------------------------------------

template <class Word>
struct Backward {
    Sizes sizes;
    View<const Word> q, k, v, y, dy;
    const float* logs;
    View<Word> dq, dk, dv;

    static constexpr long ACROSS = QUERIES / EACH<Word>, DOWN = KEYS / EACH<Word>;  // words of a block

    long words() const { return panels(sizes.size, EACH<Word>); }
    long rows() const { return panels(sizes.tokens, LANES) * LANES; }
    long row_words() const { return panels(sizes.tokens, EACH<Word>); }

    // What one head of queries needs, and a block of keys.
    struct Head {
        uint32_t *queries, *query_columns, *arriving, *arriving_columns;  // panels of q and dy, both ways
        float *logs, *dots;                                               // of each query; dots: Σ dy·y
        float *dq, *dk, *dv;                                              // (rows, columns), not scaled yet
        uint32_t *keys, *key_columns, *values;                            // panels of a block
        uint32_t *p, *ds, *ds_pairs;                                      // (keys, queries) of a block
        float* kept;                                                      // p of a tile
    };

    Head cut(Pieces pieces) const {
        Head x;
        const long panel = rows() * words(), columns = row_words() * sizes.columns(), sums = rows() * sizes.columns();
        for (uint32_t** to : {&x.queries, &x.arriving}) *to = pieces.words(panel);
        for (uint32_t** to : {&x.query_columns, &x.arriving_columns}) *to = pieces.words(columns);
        for (float** to : {&x.logs, &x.dots}) *to = pieces.floats(rows());
        for (float** to : {&x.dq, &x.dk, &x.dv}) *to = pieces.floats(sums);
        for (uint32_t** to : {&x.keys, &x.values}) *to = pieces.words(KEYS * words());
        x.key_columns = pieces.words(DOWN * sizes.columns());
        for (uint32_t** to : {&x.p, &x.ds}) *to = pieces.words(KEYS * ACROSS);
        x.ds_pairs = EACH<Word> == 1 ? x.ds : pieces.words(DOWN * QUERIES);
        x.kept = pieces.floats(ROWS * LANES);
        return x;
    }
    long room() const { return cut(Pieces{nullptr}).kept + ROWS * LANES - (float*)nullptr; }

    void head(long b, long kv_head, Pieces pieces) const {
        const Head x = cut(pieces);
        const long tokens = sizes.tokens, columns = sizes.columns();
        std::memset(x.dk, 0, rows() * columns * 4);
        std::memset(x.dv, 0, rows() * columns * 4);
        for (long h = kv_head * sizes.group(); h < (kv_head + 1) * sizes.group(); ++h) {
            prepare(b, h, x);
            for (long key = 0; key < tokens; key += KEYS) {
                const long keys = std::min(KEYS, tokens - key);
                pack_rows<ROWS>(k.of(b, kv_head), k.token, sizes.size, key, keys, x.keys);
                pack_rows<ROWS>(v.of(b, kv_head), v.token, sizes.size, key, keys, x.values);
                pack_columns(k.of(b, kv_head), k.token, sizes.size, key, keys, x.key_columns);
                for (long query = key / QUERIES * QUERIES; query < tokens; query += QUERIES)
                    block(x, query, std::min(QUERIES, tokens - query), key, keys);
            }
            write(x.dq, sizes.scale(), dq.of(b, h), dq.token);
        }
        write(x.dk, sizes.scale(), dk.of(b, kv_head), dk.token);
        write(x.dv, 1, dv.of(b, kv_head), dv.token);
    }

    void prepare(long b, long h, const Head& x) const {
        const long tokens = sizes.tokens, size = sizes.size;
        pack_rows<LANES>(q.of(b, h), q.token, size, 0, tokens, x.queries);
        pack_rows<LANES>(dy.of(b, h), dy.token, size, 0, tokens, x.arriving);
        pack_columns(q.of(b, h), q.token, size, 0, tokens, x.query_columns);
        pack_columns(dy.of(b, h), dy.token, size, 0, tokens, x.arriving_columns);
        for (long t = 0; t < rows(); ++t) {  // a query beyond the last has no probabilities
            x.logs[t] = t < tokens ? logs[(b * sizes.heads + h) * tokens + t] : INFINITY;
            x.dots[t] = t < tokens ? dot(y.of(b, h) + t * y.token, dy.of(b, h) + t * dy.token, size) : 0;
        }
    }

    static float dot(const Word* a, const Word* b, long size) {
        __m512 sum = _mm512_setzero_ps();
        for (long c = 0; c < size; c += 16) sum = _mm512_fmadd_ps(wide(a + c, size - c), wide(b + c, size - c), sum);
        return _mm512_reduce_add_ps(sum);
    }
    static __m512 wide(const float* p, long count) { return _mm512_maskz_loadu_ps(lanes(count), p); }
    static __m512 wide(const bf16* p, long count) { return (__m512)_mm512_slli_epi32(halves(p, count), 16); }

    void write(const float* sums, float scale, Word* to, long token) const {
        for (long t = 0; t < sizes.tokens; ++t)
            for (long c = 0; c < sizes.size; c += 16)
                put(to + t * token + c, lanes(sizes.size - c),
                    _mm512_mul_ps(_mm512_load_ps(sums + t * sizes.columns() + c), splat(scale)));
    }

    // All that a block of queries and one of keys add to the gradients.
    void block(const Head& x, long query, long queries, long key, long keys) const {
        for (long i = 0; i < queries; i += LANES)
            for (long r = 0; r < keys && key + r < query + i + LANES; r += ROWS)
                probabilities(x, query + i, i / EACH<Word>, key + r, r);
        const long columns = sizes.columns(), across = row_words();
        for (long c = 0; c < columns; c += LANES)
            for (long r = 0; r < keys; r += ROWS) {
                const long first = std::max(0L, (key + r - query) / LANES * LANES);  // of the panels that see this key
                if (first >= queries) continue;
                const long skipped = first / EACH<Word>, words = panels(queries, EACH<Word>) - skipped;
                const long at = c * across + (query + first) / EACH<Word> * LANES, sum = (key + r) * columns + c;
                add<ACROSS, 1>(words, x.p + r * ACROSS + skipped, x.arriving_columns + at, x.dv + sum, false);
                add<ACROSS, 1>(words, x.ds + r * ACROSS + skipped, x.query_columns + at, x.dk + sum, false);
            }
        const long down = panels(keys, EACH<Word>);
        for (long c = 0; c < columns; c += LANES)
            for (long i = 0; i < queries; i += ROWS) {
                const long seen = std::min(keys, query + i + ROWS - key);
                if (seen > 0)
                    add<1, QUERIES>(panels(seen, EACH<Word>), x.ds_pairs + i, x.key_columns + c * down,
                                    x.dq + (query + i) * columns + c, key == 0);
            }
    }

    template <long ROW, long NEXT>
    void add(long words, const uint32_t* a, const uint32_t* panel, float* to, bool fresh) const {
        Tile sums;
        if (fresh)
            zero(sums);
        else
            load(sums, to, sizes.columns());
        multiply<Word, ROW, NEXT>(sums, words, a, panel);
        store(sums, to, sizes.columns());
    }

    // Probabilities and gradients of the scores of 32 queries with 8 keys: a tile at row r, word `across`.
    void probabilities(const Head& x, long query, long across, long key, long r) const {
        const __m512 by = splat(sizes.scale() * LOG2_E);
        Tile s;
        zero(s);
        multiply<Word, 1, ROWS>(s, words(), x.keys + r * words(), x.queries + query * words());
#pragma GCC unroll 8
        for (long i = 0; i < ROWS; ++i) {
#pragma GCC unroll 2
            for (int v = 0; v < 2; ++v) {
                const __m512 less = _mm512_load_ps(x.logs + query + 16 * v);
                s[i][v] = exponential<Word>(_mm512_fmsub_ps(s[i][v], by, less));
                if (key + ROWS > query) s[i][v] = _mm512_maskz_mov_ps(seeing(key + i, query + 16 * v), s[i][v]);
            }
            put_row(x.p + (r + i) * ACROSS + across, s[i][0], s[i][1], Word{});
        }
        store(s, x.kept, LANES);
        zero(s);
        multiply<Word, 1, ROWS>(s, words(), x.values + r * words(), x.arriving + query * words());
#pragma GCC unroll 8
        for (long i = 0; i < ROWS; ++i) {
#pragma GCC unroll 2
            for (int v = 0; v < 2; ++v)
                s[i][v] = _mm512_mul_ps(_mm512_sub_ps(s[i][v], _mm512_load_ps(x.dots + query + 16 * v)),
                                        _mm512_load_ps(x.kept + i * LANES + 16 * v));
            put_row(x.ds + (r + i) * ACROSS + across, s[i][0], s[i][1], Word{});
        }
        if (EACH<Word> == 2)
#pragma GCC unroll 4
            for (long i = 0; i < ROWS; i += 2)
                put_pairs(x.ds_pairs + (r + i) / 2 * QUERIES + across * 2, 0, s[i], s[i + 1], Word{});
    }
};

thread_local Room room_for_heads;

// All heads, on so many threads; where heads are few, several threads share one and take queries of their own.
template <class Word>
void run(const Forward<Word>& work, int threads) {
    const Sizes& n = work.sizes;
    const long all = n.samples * n.kv_heads, most = panels(n.tokens, LANES);
    const long parts = std::min(most, panels(4L * threads, all));
#pragma omp parallel num_threads(threads)
    {
        const Pieces pieces{room_for_heads.get((work.room() + 15) / 16 * 16)};
#pragma omp for schedule(dynamic)
        for (long t = 0; t < all * parts; ++t)
            work.head(t / parts / n.kv_heads, t / parts % n.kv_heads, t % parts, parts, pieces);
    }
}

template <class Word>
void run(const Backward<Word>& work, int threads) {
    const Sizes& n = work.sizes;
#pragma omp parallel num_threads(threads)
    {
        const Pieces pieces{room_for_heads.get((work.room() + 15) / 16 * 16)};
#pragma omp for schedule(dynamic)
        for (long t = 0; t < n.samples * n.kv_heads; ++t) work.head(t / n.kv_heads, t % n.kv_heads, pieces);
    }
}

}  // namespace

#define ATTENTION(NAME, E)                                                                                           \
    extern "C" void attention_##NAME(const Sizes* n, const View<const E>* q, const View<const E>* k,                 \
                                     const View<const E>* v, const View<E>* y, float* logs, int threads) {           \
        run(Forward<E>{*n, *q, *k, *v, *y, logs}, threads);                                                          \
    }                                                                                                                \
    extern "C" void attention_backward_##NAME(const Sizes* n, const View<const E>* q, const View<const E>* k,        \
                                              const View<const E>* v, const View<const E>* y,                        \
                                              const View<const E>* dy, const float* logs, const View<E>* dq,         \
                                              const View<E>* dk, const View<E>* dv, int threads) {                   \
        run(Backward<E>{*n, *q, *k, *v, *y, *dy, logs, *dq, *dk, *dv}, threads);                                     \
    }

ATTENTION(fp32, float)
ATTENTION(bf16, bf16)

// Whether this beats what PyTorch brings: measured on Zen 4 only.
extern "C" int attention_pays() {
    return made_by_amd();
}
#endif
