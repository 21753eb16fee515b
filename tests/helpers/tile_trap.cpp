// AMX instructions in software, for processors that have none: they raise SIGILL there, and its handler carries out the
// instruction and goes on behind it. So tests run the very machine code that runs on tiles elsewhere.
//
// What each does, and when it is refused, is written from Intel's Software Developer's Manual, volume 2. Beside that,
// operands must be aligned to 64 bytes, which the processor does not ask for, but speed does.

#include <signal.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>

#include <immintrin.h>

namespace {

struct Configuration {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

struct Registers {
    Configuration set;  // all 0: not configured
    uint8_t tile[8][16][64];
};
thread_local Registers own;

enum Kind { CONFIGURED, RELEASED, ZEROED, LOADED, STORED, MULTIPLIED, KINDS };
long counts[KINDS];
char trouble[200];
struct sigaction before;

void refuse(const char* why) {
    if (!trouble[0]) snprintf(trouble, sizeof trouble, "%s", why);
}
void require(bool met, const char* why) {
    if (!met) refuse(why);
}

float number(uint16_t bf16) {
    const uint32_t bits = (uint32_t)bf16 << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

// Of the machine's registers, as instructions count them.
uint64_t value(const ucontext_t* context, int number) {
    constexpr int NAMES[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                               REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    return context->uc_mcontext.gregs[NAMES[number]];
}

struct Instruction {
    int opcode, prefix, mod, reg, rm, other;  // prefix: 0 none, 1 66, 2 F3, 3 F2; other: VEX.vvvv
    uint8_t* address;                         // of the memory operand
    long stride;
    const uint8_t* end;
};

bool decode(const ucontext_t* context, Instruction& found) {
    const uint8_t* p = (const uint8_t*)context->uc_mcontext.gregs[REG_RIP];
    if (p[0] != 0xc4 || (p[1] & 31) != 2 || (p[2] & 0x84)) return false;  // VEX, map 0F38, W0, 128 bits
    const int index_high = p[1] & 0x40 ? 0 : 8, base_high = p[1] & 0x20 ? 0 : 8;
    found = {p[3], p[2] & 3, p[4] >> 6, p[4] >> 3 & 7, p[4] & 7, ~(p[2] >> 3) & 15, nullptr, 0, p + 5};
    if (found.mod == 3) return true;
    int base = found.rm, index = -1, scale = 1;
    if (found.rm == 4) {
        const uint8_t sib = *found.end++;
        base = sib & 7, scale = 1 << (sib >> 6);
        index = (sib >> 3 & 7) | index_high;
    }
    const bool no_base = found.mod == 0 && base == 5;
    const int size = found.mod == 1 ? 1 : found.mod == 2 || no_base ? 4 : 0;
    int32_t displacement = 0;
    if (size == 1) displacement = (int8_t)*found.end;
    if (size == 4) memcpy(&displacement, found.end, 4);
    found.end += size;
    uint64_t address = displacement;
    if (!no_base) address += value(context, base | base_high);
    if (no_base && found.rm == 5) address += (uint64_t)found.end;
    found.address = (uint8_t*)address;
    if (index >= 0 && index != 4) found.stride = value(context, index) * scale;
    return true;
}

void configure(const uint8_t* from) {
    Configuration wanted;
    memcpy(&wanted, from, 64);
    require((uintptr_t)from % 64 == 0, "a configuration is not aligned");
    require(wanted.palette == 1 && wanted.start_row == 0, "another palette than 1, or a row to start at");
    for (int i = 0; i < 14; ++i) require(wanted.reserved[i] == 0, "reserved bytes of a configuration are not 0");
    for (int i = 0; i < 16; ++i) {
        require(wanted.rows[i] <= (i < 8 ? 16 : 0) && wanted.row_bytes[i] <= (i < 8 ? 64 : 0), "a tile is too large");
        require(!wanted.rows[i] == !wanted.row_bytes[i], "a tile has rows or columns only");
    }
    own = {wanted, {}};
}

void move(const Instruction& one, bool load) {
    require(own.set.rows[one.reg], "a tile is used that is not configured");
    require((uintptr_t)one.address % 64 == 0 && one.stride % 64 == 0, "a tile in memory is not aligned");
    for (int i = 0; i < own.set.rows[one.reg]; ++i) {
        uint8_t *row = own.tile[one.reg][i], *there = one.address + i * one.stride;
        memcpy(load ? row : there, load ? there : row, own.set.row_bytes[one.reg]);
    }
}

void multiply(int sum, int a, int b) {
    const Configuration& set = own.set;
    require(sum != a && sum != b && a != b, "a tile is used twice in a product");
    require(set.rows[sum] && set.rows[a] == set.rows[sum] && set.row_bytes[b] == set.row_bytes[sum] &&
            set.row_bytes[a] == 4 * set.rows[b], "tiles of a product do not fit");
    _mm_setcsr(_mm_getcsr() | 0x8040);  // denormals are 0, before and after
    for (int m = 0; m < set.rows[sum]; ++m) {
        float even[16] = {}, odd[16] = {}, there[16];
        for (int k = 0; k < set.rows[b]; ++k) {
            uint16_t left[2], right[32];
            memcpy(left, own.tile[a][m] + 4 * k, sizeof left);
            memcpy(right, own.tile[b][k], sizeof right);
            for (int n = 0; n < 16; ++n) {
                even[n] = std::fma(number(left[0]), number(right[2 * n]), even[n]);
                odd[n] = std::fma(number(left[1]), number(right[2 * n + 1]), odd[n]);
            }
        }
        memcpy(there, own.tile[sum][m], sizeof there);
        for (int n = 0; n < 16; ++n) there[n] += even[n] + odd[n];
        memcpy(own.tile[sum][m], there, sizeof there);
    }
}

// Which of AMX's instructions this is, carried out; KINDS if it is none.
Kind carry_out(const Instruction& one) {
    const int form = one.opcode << 8 | one.prefix << 4 | (one.mod == 3);
    switch (form) {
        case 0x4900: return configure(one.address), CONFIGURED;
        case 0x4901: return own = {}, RELEASED;
        case 0x4931: return memset(own.tile[one.reg], 0, sizeof own.tile[0]), ZEROED;
        case 0x4b30: return move(one, true), LOADED;
        case 0x4b20: return move(one, false), STORED;
        case 0x5c21: return multiply(one.reg, one.rm, one.other), MULTIPLIED;
        default: return KINDS;
    }
}

void handle(int signal, siginfo_t*, void* raw) {
    ucontext_t* context = (ucontext_t*)raw;
    Instruction one;
    const Kind kind = decode(context, one) ? carry_out(one) : KINDS;
    if (kind == KINDS) {
        sigaction(signal, &before, nullptr);  // not ours: it happens again, to whom it was before
        return;
    }
    __atomic_add_fetch(&counts[kind], 1, __ATOMIC_RELAXED);
    context->uc_mcontext.gregs[REG_RIP] = (long long)one.end;
}

}  // namespace

extern "C" void trap_install() {
    memset(counts, 0, sizeof counts);
    trouble[0] = 0;
    struct sigaction action = {};
    action.sa_sigaction = handle;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGILL, &action, &before);
}

// Gives the signal back; of each kind of instruction, how many were carried out, and what was wrong, or "".
extern "C" const char* trap_remove(long* out) {
    sigaction(SIGILL, &before, nullptr);
    memcpy(out, counts, sizeof counts);
    return trouble;
}
