/* Products of small matrices of pairs of bfloat16, by vectors or by the registers of a matrix unit. In both a sum runs over the
 * pairs in their order, in registers 32 numbers at a time: zeros behind or before them change nothing. */
#ifndef POSTTRAIN_PAIRS
#define POSTTRAIN_PAIRS

#include "registers.h"

/* Widths and keys come in as many numbers: what a register takes at once. */
#define WHOLE 32
#define UP_WHOLE(n) (((n) + WHOLE - 1) / WHOLE * WHOLE)
#define DOWN_WHOLE(n) ((n) / WHOLE * WHOLE)

/* to[0 .. UP_WHOLE(count)): a row of numbers, and zeros. */
ALWAYS void copy_row(const bf16 *from, int64_t count, bf16 *to) {
    memcpy(to, from, count * sizeof(bf16));
    memset(to + count, 0, (UP_WHOLE(count) - count) * sizeof(bf16));
}

/* sum + products of the lower and of the upper halves. */
ALWAYS vec add_pairs(vec sum, words a, words b) {
#ifdef __AVX512BF16__
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
    sum += (vec)(a << 16) * (vec)(b << 16);
    return sum + (vec)(a & 0xffff0000u) * (vec)(b & 0xffff0000u);
#endif
}

/* Rows c[m] += sum over k < pairs of the word a[m along + k across] times row k of b, of `vecs` vectors each; rows of b lie `bw`
 * apart and those of c `cw`. With constant counts the sums stay in registers. */
ALWAYS void add_piece(
    const uint32_t *a, int64_t along, int64_t across, const int rows, int64_t pairs, const uint32_t *b, int64_t bw,
    const int vecs, float *c, int64_t cw
) {
    vec s[4][4];
#pragma GCC unroll 4
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
        for (int j = 0; j < vecs; j++) s[m][j] = load(c + m * cw + j * LANES);
    for (int64_t k = 0; k < pairs; k++) {
        words own[4];
#pragma GCC unroll 4
        for (int j = 0; j < vecs; j++) own[j] = load_words(b + k * bw + j * LANES);
#pragma GCC unroll 4
        for (int m = 0; m < rows; m++) {
            words one = (words){0} + a[m * along + k * across];
#pragma GCC unroll 4
            for (int j = 0; j < vecs; j++) s[m][j] = add_pairs(s[m][j], one, own[j]);
        }
    }
#pragma GCC unroll 4
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
        for (int j = 0; j < vecs; j++) store(c + m * cw + j * LANES, s[m][j]);
}

ALWAYS void add_rows(
    const uint32_t *a, int64_t along, int64_t across, int64_t rows, int64_t pairs, const uint32_t *b, int64_t bw,
    const int vecs, float *c, int64_t cw
) {
    int64_t m = 0;
    for (; m + 4 <= rows; m += 4) add_piece(a + m * along, along, across, 4, pairs, b, bw, vecs, c + m * cw, cw);
    if (rows - m == 3) add_piece(a + m * along, along, across, 3, pairs, b, bw, vecs, c + m * cw, cw);
    if (rows - m == 2) add_piece(a + m * along, along, across, 2, pairs, b, bw, vecs, c + m * cw, cw);
    if (rows - m == 1) add_piece(a + m * along, along, across, 1, pairs, b, bw, vecs, c + m * cw, cw);
}

/* What a thread does before its first product of this kind, and after its last one. */
ALWAYS void open_pairs(struct shape *before) {
    (void)before;
#ifdef HAS_TILES
    if (tiles_open) open_tiles(before);
#endif
}

ALWAYS void close_pairs(const struct shape *before) {
    (void)before;
#ifdef HAS_TILES
    if (tiles_open) close_tiles(before);
#endif
}

#ifdef HAS_TILES
/* Sixteen words of sixteen rows of the left side, in order; zeros for pairs from `pairs` on. */
ALWAYS void take_left(const uint32_t *a, int64_t across, int64_t pairs, uint32_t *to) {
    uint32_t columns[TILE] = {0};
    for (int64_t k = 0; k < pairs && k < SIDE; k++) memcpy(columns + k * SIDE, a + k * across, SIDE * sizeof(uint32_t));
    turn(columns, SIDE, to, SIDE);
    WRITTEN;
}

/* By registers, which stand open: 16 rows and 64 columns at a time. */
static void add_tiles(
    const uint32_t *a, int64_t along, int64_t across, int64_t rows, int64_t pairs, const uint32_t *b, int64_t bw,
    int64_t columns, float *c, int64_t cw
) {
    uint32_t room[TILE];
    WRITTEN;
    for (int64_t m = 0; m < rows; m += SIDE)
        for (int64_t n = 0; n < columns; n += 4 * SIDE) {
            float *to = c + m * cw + n;
            int64_t vecs = (columns - n) / SIDE, at = cw * sizeof(float);
            _tile_loadd(0, to, at);
            if (vecs > 1) _tile_loadd(1, to + SIDE, at);
            if (vecs > 2) _tile_loadd(2, to + 2 * SIDE, at);
            if (vecs > 3) _tile_loadd(3, to + 3 * SIDE, at);
            for (int64_t k = 0; k < pairs; k += SIDE) {
                const uint32_t *right = b + k * bw + n;
                int64_t far = bw * sizeof(uint32_t);
                if (across == 1) _tile_loadd(4, a + m * along + k, along * sizeof(uint32_t));
                else {
                    take_left(a + m * along + k * across, across, pairs - k, room);
                    _tile_loadd(4, room, 64);
                }
                _tile_loadd(5, right, far);
                _tile_dpbf16ps(0, 4, 5);
                if (vecs > 1) {
                    _tile_loadd(5, right + SIDE, far);
                    _tile_dpbf16ps(1, 4, 5);
                }
                if (vecs > 2) {
                    _tile_loadd(5, right + 2 * SIDE, far);
                    _tile_dpbf16ps(2, 4, 5);
                }
                if (vecs > 3) {
                    _tile_loadd(5, right + 3 * SIDE, far);
                    _tile_dpbf16ps(3, 4, 5);
                }
            }
            _tile_stored(0, to, at);
            if (vecs > 1) _tile_stored(1, to + SIDE, at);
            if (vecs > 2) _tile_stored(2, to + 2 * SIDE, at);
            if (vecs > 3) _tile_stored(3, to + 3 * SIDE, at);
        }
}
#endif

/* The same for columns [0, columns). Of a (unless it is read across) and c there are as many rows as fill registers, of b
 * too, and where a has no more pairs b has zeros. */
static inline void add_products(
    const uint32_t *a, int64_t along, int64_t across, int64_t rows, int64_t pairs, const uint32_t *b, int64_t bw,
    int64_t columns, float *c, int64_t cw
) {
#ifdef HAS_TILES
    if (tiles_open) {
        add_tiles(a, along, across, rows, pairs, b, bw, columns, c, cw);
        return;
    }
#endif
    int64_t at = 0;
    for (; at + 4 * LANES <= columns; at += 4 * LANES) add_rows(a, along, across, rows, pairs, b + at, bw, 4, c + at, cw);
    if (columns - at == 3 * LANES) add_rows(a, along, across, rows, pairs, b + at, bw, 3, c + at, cw);
    if (columns - at == 2 * LANES) add_rows(a, along, across, rows, pairs, b + at, bw, 2, c + at, cw);
    if (columns - at == LANES) add_rows(a, along, across, rows, pairs, b + at, bw, 1, c + at, cw);
}

#endif
