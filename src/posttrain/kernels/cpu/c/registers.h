/* The registers of a processor's matrix unit (AMX): 16 rows of 32 bfloat16, or 16 x 16 sums. */
#ifndef POSTTRAIN_REGISTERS
#define POSTTRAIN_REGISTERS

#include "vectors.h"

/* As the processor reads it. */
struct shape {
    uint8_t palette, start, unused[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} __attribute__((aligned(64)));

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define HAS_TILES 1

/* Rows of a register, numbers of one of its rows. */
#define SIDE 16
#define DEEP 32
/* Words of a register. */
#define TILE (SIDE * SIDE)

/* Whether the system lets this process use them; known once `tiles` was called, before anything else is computed. */
extern int tiles_open;

/* What was written lies in memory. The compiler is not told what a register is loaded from, and might write it later. */
#define WRITTEN __asm__ volatile("" ::: "memory")

/* Eight whole registers; `before` is what another library has set up in this thread. */
ALWAYS void open_tiles(struct shape *before) {
    struct shape own = {.palette = 1};
    for (int i = 0; i < 8; i++) own.bytes[i] = 64, own.rows[i] = SIDE;
    _tile_storeconfig(before);
    _tile_loadconfig(&own);
}

ALWAYS void close_tiles(const struct shape *before) {
    if (before->palette) _tile_loadconfig(before);
    else _tile_release();
}

/* Lines of memory that are on their way to the second cache. */
ALWAYS void ask(const bf16 *from, int64_t lines) {
    for (int64_t i = 0; i < lines; i++) _mm_prefetch(from + i * DEEP, _MM_HINT_T1);
}

#endif
#endif
