// Causal attention on AMX, in bf16: the products of attention.h in blocks of 32 × 32 (see tile_blocks.h).
//
// One step of a block, 32 elements along k, keeps the processor's tile unit busy for 64 cycles, in which its vector
// units have nothing to do. So products wait in a queue, and vector code takes a step from it every few dozen
// instructions: few enough for the processor to see both at once.

#include "attention.h"
#include "attention_backward.h"
#include "attention_forward.h"
#include "panels.h"
#include "tile_blocks.h"
#include "tiles.h"

#if defined(PANELS) && defined(TILES)
namespace {

// A block of results to be made, and as much of it as is.
struct Block {
    const uint32_t *a, *b;
    float* sums;
    long across, stride;  // bytes from a row of A, and of sums, to the next
    long steps;           // along k, that are left
    bool add;
};

// Blocks that wait, first come, first served.
struct Queue {
    static constexpr unsigned MOST = 64;
    Block waiting[MOST];
    unsigned first = 0, end = 0;
    bool empty() const { return first == end; }
    bool full() const { return end - first == MOST; }
    void put(const Block& block) { waiting[end++ % MOST] = block; }
    const Block& take() { return waiting[first++ % MOST]; }
};

struct Tiles {
    using Word = bf16;
    static constexpr long ROWS = EDGE, GRAIN = tiles::WORDS;
    static constexpr long FORWARD_KEYS = 256;
    static constexpr bool QUEUED = true;

    static long words(long k) { return up(panels(k, EACH<bf16>), tiles::WORDS); }

    // A as it is, rows of whole tiles, 0 where nothing is.
    static void pack_left(Operand<bf16> from, long rows, long k, uint32_t* to) {
        const long across = words(k);
        for (long i = 0; i < rows; i += EDGE)
            for (long l = 0; l < across; l += tiles::WORDS)
                for (long half = i; half < i + EDGE; half += tiles::ROWS)
                    pack_tile(from.p + half * from.step + 2 * l * from.stride, from.step, from.stride, rows - half,
                              k - 2 * l, to + half * across + l, across);
    }

    template <long ACROSS>
    void product(const uint32_t* a, long across, const uint32_t* b, long words, long rows, float* to, long step,
                 bool add, long = 0) {
        ask(soon, a, ACROSS ? ACROSS : across, b, words, rows, to, step, add);
    }
    template <long ACROSS>
    void later(const uint32_t* a, long across, const uint32_t* b, long words, long rows, float* to, long step,
               bool add, long = 0) {
        ask(some_time, a, ACROSS ? ACROSS : across, b, words, rows, to, step, add);
    }

    inline __attribute__((always_inline)) void tick() {
        if (!now.steps && !next()) return;
        step_block(now.a, now.a + tiles::ROWS * (now.across / 4), now.across, now.b);
        now.a += tiles::WORDS, now.b += STEP;
        if (!--now.steps) end_block(now.sums, now.stride);
    }
    void finish_soon() {
        while (!soon.empty() || now.steps) tick();
    }
    void finish() {
        while (!soon.empty() || !some_time.empty() || now.steps) tick();
    }

private:
    void ask(Queue& queue, const uint32_t* a, long across, const uint32_t* b, long words, long rows, float* to,
             long step, bool add) {
        for (long r = 0; r < rows; r += EDGE) {
            while (queue.full()) tick();
            queue.put({a + r * across, b, to + r * step, across * 4, step * 4, panels(words, tiles::WORDS), add});
        }
    }
    inline __attribute__((always_inline)) bool next() {
        if (soon.empty() && some_time.empty()) return false;
        now = soon.empty() ? some_time.take() : soon.take();
        begin_block(now.sums, now.stride, now.add);
        return true;
    }

    const tiles::Session session;
    Block now = {};
    Queue soon, some_time;
};

}  // namespace

ATTENTION(bf16, Tiles)
#endif
