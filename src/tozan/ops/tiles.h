// Intel's tile registers (AMX): eight of 16 rows × 64 bytes, and products of bf16 among them.
//
// In words of the assembler and not by the compilers' intrinsics: those of GCC 12 do not say that a tile is loaded from
// memory, nor that more than eight bytes of a configuration are read, so that what was written there just before may
// come too late (GCC's bug 114098). Compilers keep nothing in tile registers by themselves.

#pragma once

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__)
#define TILES
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

namespace tiles {

constexpr long ROWS = 16, WORDS = 16;  // of a tile; a word is one fp32 or two bf16 that are neighbours along k

// What LDTILECFG reads.
struct alignas(64) Configuration {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};
static_assert(sizeof(Configuration) == 64, "the processor reads 64 bytes");

constexpr Configuration WHOLE = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

// Has this process, its threads and its children use tile registers from now on; whether Linux allows it.
inline bool permitted() {
    constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

// Tile registers of the calling thread, all of them whole. They are given back at the end: oneDNN then sees that its
// own configuration is gone, and nothing has to be saved when the system changes to another thread.
struct Session {
    Session() { asm volatile("ldtilecfg %0" ::"m"(WHOLE)); }
    ~Session() { asm volatile("tilerelease"); }
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;
};

template <int TILE>
inline void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(TILE));
}

// Rows lie `stride` bytes apart.
template <int TILE>
inline void load(const void* from, long stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(TILE) : "memory");
}

template <int TILE>
inline void store(void* to, long stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(TILE) : "memory");
}

// Adds A · B to SUM: 16 × 16 in fp32, of 16 rows of 16 words and 16 words of 16 columns. Denormals count as 0.
template <int SUM, int A, int B>
inline void multiply_add() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(A), "i"(B));
}

}  // namespace tiles

// Each library's: whether this process may use tile registers; asks for them.
extern "C" int tiles_permitted() { return tiles::permitted(); }
#endif
