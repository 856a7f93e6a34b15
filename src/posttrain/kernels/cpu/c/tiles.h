/* Products with weights as they lie, by a processor's matrix tiles, with the low-rank products of adapters added to them:
 *
 *     y_t = W x_t + bias + B_s p_t,     p_t = A_s x_t rounded,     s: the slot of token t
 *
 * A register holds 16 rows of 32 bfloat16, or 16 x 16 sums. Weights are the rows of the left side, so nothing is brought into
 * another order but x: 16 tokens side by side, a word of two numbers each. A sum runs over the inputs in their order and then
 * over the rank, whatever stands beside: what many tokens get in training is what one gets in decoding, to the bit.
 *
 * Matrices of all slots lie side by side, `columns` in all. A block of 32 columns may be of several slots: where p is of
 * another token's slot it is zero, so all matrices must be finite.
 */
#ifndef POSTTRAIN_TILES
#define POSTTRAIN_TILES

#include "registers.h"

#ifdef HAS_TILES
#include <omp.h>

/* Outputs of one piece of work. */
#define OUT 32
/* Outputs that one thread takes at a time. */
#define OUTPUTS 256

/* The sizes, matrices and places of one call. */
struct work {
    const int64_t tokens, inputs, outputs, along, columns, rank, across;
    const bf16 *x, *w, *bias, *a, *b;
    /* Tokens tile by tile, -1 for none, and their slots, -1 for the base; none: in their own order, all of slot 0. */
    const int32_t *order, *slot;
    int64_t tiles, most;
    bf16 *p, *y;
};

/* Of some tiles x and p as words and the blocks of each tile, and room for copies of rows. */
struct rooms {
    uint32_t *x, *p;
    int32_t *blocks;
    int64_t *counts;
    bf16 *copies;
};

static int64_t least_of(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t parts_of(int64_t all, int64_t each) { return (all + each - 1) / each; }

/* `sizes` are in the order of struct work, then the count of tiles. */
ALWAYS struct work work_of(
    const int64_t *sizes, const bf16 *x, const bf16 *w, const bf16 *bias, const bf16 *a, const bf16 *b, const int32_t *order,
    const int32_t *slot, bf16 *p, bf16 *y
) {
    int64_t columns = sizes[4], rank = sizes[5];
    int64_t most = columns ? least_of(columns / DEEP, SIDE * (rank > DEEP ? rank / DEEP : 1)) : 0;
    struct work k = {
        sizes[0], sizes[1], sizes[2], sizes[3], columns, rank, sizes[6], x, w, bias, a, b, order, slot, sizes[7], most, p, y,
    };
    return k;
}

/* Outputs of one piece of work, where each thread takes some of them. */
ALWAYS int64_t outputs_of(const struct work *k, int64_t threads) {
    return least_of(OUTPUTS, parts_of(parts_of(k->outputs, 2 * threads), OUT) * OUT);
}

ALWAYS int64_t token_of(const struct work *k, int64_t at) {
    if (k->order) return k->order[at];
    return at < k->tokens ? at : -1;
}

ALWAYS int64_t slot_of(const struct work *k, int64_t token) {
    if (token < 0) return -1;
    return k->slot ? k->slot[token] : 0;
}

/* The blocks of columns that the tokens of a tile need. */
static int64_t blocks_of(const struct work *k, int64_t tile, int32_t *blocks) {
    int64_t count = 0, each = k->rank > DEEP ? k->rank / DEEP : 1;
    if (!k->columns) return 0;
    for (int n = 0; n < SIDE; n++) {
        int64_t slot = slot_of(k, token_of(k, tile * SIDE + n)), first = slot * k->rank / DEEP, seen = slot < 0;
        for (int64_t i = 0; i < count && !seen; i++) seen = blocks[i] == first;
        for (int64_t i = 0; i < each && !seen; i++) blocks[count++] = (int32_t)(first + i);
    }
    return count;
}

/* Whether the tokens of a tile are sixteen that lie one behind the other. */
static int in_place(const struct work *k, int64_t tile) {
    if (k->along != k->inputs || (tile + 1) * SIDE > k->tokens) return 0;
    for (int n = 1; k->order && n < SIDE; n++)
        if (k->order[tile * SIDE + n] != k->order[tile * SIDE] + n) return 0;
    return 1;
}

/* x of sixteen tokens [inputs / 2][16], zeros where there is none. */
static void gather(const struct work *k, int64_t tile, bf16 *room, uint32_t *to) {
    const bf16 *from = room;
    if (in_place(k, tile)) from = k->x + token_of(k, tile * SIDE) * k->along;
    else
        for (int n = 0; n < SIDE; n++) {
            int64_t token = token_of(k, tile * SIDE + n);
            if (token < 0) memset(room + n * k->inputs, 0, k->inputs * sizeof(bf16));
            else memcpy(room + n * k->inputs, k->x + token * k->along, k->inputs * sizeof(bf16));
        }
    turn((const uint32_t *)from, k->inputs / 2, to, SIDE);
}

/* Two rows of sums as words, the lower half from the first. */
ALWAYS words paired(vec lower, vec upper) {
    const __m512i side_by_side = _mm512_set_epi16(
        31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0
    );
    return (words)_mm512_permutexvar_epi16(side_by_side, (__m512i)_mm512_cvtne2ps_pbh((__m512)upper, (__m512)lower));
}

/* Sixteen columns, half a block, for the tokens of a tile: their x, their slots, and where p goes [8][16] words. */
struct part {
    int64_t column;
    const uint32_t *x;
    ints slot;
    uint32_t *to;
};

/* p of sums: zeros where a column is of another slot than the token. */
static void keep(const struct work *k, const struct part *part, const float *sums) {
    for (int r = 0; r < SIDE / 2; r++) {
        words two = paired(load(sums + 2 * r * SIDE), load(sums + (2 * r + 1) * SIDE));
        int32_t own = (int32_t)((part->column + 2 * r) / k->rank);
        store_words(part->to + r * SIDE, two & (words)(part->slot == own));
    }
}

/* Of up to four parts at once, which do not wait for each other. */
ALWAYS void project_parts(const struct work *k, const struct part *parts, const int count) {
    float sums[4 * TILE] __attribute__((aligned(64)));
    int64_t bytes = k->inputs * sizeof(bf16);
    const bf16 *a[4];
    const uint32_t *x[4];
    for (int n = 0; n < count; n++) a[n] = k->a + parts[n].column * k->inputs, x[n] = parts[n].x;
    WRITTEN;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t i = 0; i < k->inputs; i += DEEP) {
        _tile_loadd(4, a[0] + i, bytes);
        _tile_loadd(5, x[0] + i / 2 * SIDE, 64);
        _tile_dpbf16ps(0, 4, 5);
        if (count > 1) {
            _tile_loadd(4, a[1] + i, bytes);
            _tile_loadd(5, x[1] + i / 2 * SIDE, 64);
            _tile_dpbf16ps(1, 4, 5);
        }
        if (count > 2) {
            _tile_loadd(4, a[2] + i, bytes);
            _tile_loadd(5, x[2] + i / 2 * SIDE, 64);
            _tile_dpbf16ps(2, 4, 5);
        }
        if (count > 3) {
            _tile_loadd(4, a[3] + i, bytes);
            _tile_loadd(5, x[3] + i / 2 * SIDE, 64);
            _tile_dpbf16ps(3, 4, 5);
        }
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + TILE, 64);
    _tile_stored(2, sums + 2 * TILE, 64);
    _tile_stored(3, sums + 3 * TILE, 64);
    for (int n = 0; n < count; n++) keep(k, parts + n, sums + n * TILE);
}

static void project_all(const struct work *k, const struct part *parts, int64_t count) {
    switch (count) {
    case 0: break;
    case 1: project_parts(k, parts, 1); break;
    case 2: project_parts(k, parts, 2); break;
    case 3: project_parts(k, parts, 3); break;
    default: project_parts(k, parts, 4);
    }
}

/* `rows` rows of a matrix for the left side: where they lie, or a copy with zeros behind the last. */
ALWAYS const bf16 *left(const bf16 *from, int64_t rows, int64_t width, bf16 *room) {
    if (rows >= OUT) return from;
    memcpy(room, from, rows * width * sizeof(bf16));
    memset(room + rows * width, 0, (OUT - rows) * width * sizeof(bf16));
    return room;
}

/* sums [OUT][16 tokens] of a tile to y. */
static void put(const struct work *k, int64_t tile, int64_t out, float *sums) {
    int64_t count = k->outputs - out < OUT ? k->outputs - out : OUT;
    if (k->bias)
        for (int r = 0; r < count; r++) store(sums + r * SIDE, load(sums + r * SIDE) + wide(k->bias[out + r]));
    if (k->across) {
        for (int r = 0; r < count; r++) {
            __m256i row = (__m256i)_mm512_cvtneps_pbh((__m512)load(sums + r * SIDE));
            memcpy(k->y + (out + r) * k->across + tile * SIDE, &row, sizeof row);
        }
        return;
    }
    uint32_t pairs[TILE], rows[TILE];
    for (int r = 0; r < SIDE; r++)
        store_words(pairs + r * SIDE, paired(load(sums + 2 * r * SIDE), load(sums + (2 * r + 1) * SIDE)));
    turn(pairs, SIDE, rows, SIDE);
    for (int n = 0; n < SIDE; n++) {
        int64_t token = token_of(k, tile * SIDE + n);
        if (token < 0) continue;
        if (count == OUT) memcpy(k->y + token * k->outputs + out, rows + n * SIDE, OUT * sizeof(bf16));
        else memcpy(k->y + token * k->outputs + out, rows + n * SIDE, count * sizeof(bf16));
    }
}

/* The weights of outputs that come next, and of their B the blocks that are needed, which lie side by side. */
struct ahead {
    const bf16 *w, *b;
    int64_t columns, blocks;
};

/* Sums of 32 outputs over the inputs, for one tile or two that stand side by side. Meanwhile what comes next is asked for: what
 * a register is loaded from comes too late otherwise. Six registers are used of eight: at times, it seems while a core's other
 * thread multiplies too, loads between products take twice as long with all of them. */
ALWAYS void add_inputs(const bf16 *w, int64_t inputs, const uint32_t *x, const int two, const struct ahead *ahead) {
    int64_t bytes = inputs * sizeof(bf16), each = parts_of(OUT * DEEP, inputs);
    const uint32_t *next = x + inputs / 2 * SIDE;
    for (int64_t i = 0; i < inputs; i += DEEP) {
        if (ahead->w) ask(ahead->w + i * OUT, OUT);
        for (int64_t r = i / DEEP * each; ahead->b && r < least_of(OUT, (i / DEEP + 1) * each); r++)
            ask(ahead->b + r * ahead->columns, ahead->blocks);
        _tile_loadd(4, w + i, bytes);
        _tile_loadd(5, x + i / 2 * SIDE, 64);
        _tile_dpbf16ps(0, 4, 5);
        if (two) {
            _tile_loadd(5, next + i / 2 * SIDE, 64);
            _tile_dpbf16ps(2, 4, 5);
            _tile_loadd(4, w + SIDE * inputs + i, bytes);
            _tile_dpbf16ps(3, 4, 5);
            _tile_loadd(5, x + i / 2 * SIDE, 64);
            _tile_dpbf16ps(1, 4, 5);
        } else {
            _tile_loadd(4, w + SIDE * inputs + i, bytes);
            _tile_dpbf16ps(1, 4, 5);
        }
    }
}

/* What the adapters of a tile add. */
ALWAYS void add_rank(const struct work *k, const struct rooms *s, int64_t at, const bf16 *b, const int second) {
    int64_t bytes = k->columns * sizeof(bf16);
    for (int64_t i = at * k->most; i < at * k->most + s->counts[at]; i++) {
        _tile_loadd(4, b + s->blocks[i] * DEEP, bytes);
        _tile_loadd(5, s->p + i * TILE, 64);
        if (second) _tile_dpbf16ps(2, 4, 5);
        else _tile_dpbf16ps(0, 4, 5);
        _tile_loadd(4, b + SIDE * k->columns + s->blocks[i] * DEEP, bytes);
        if (second) _tile_dpbf16ps(3, 4, 5);
        else _tile_dpbf16ps(1, 4, 5);
    }
}

ALWAYS ints slots_of(const struct work *k, int64_t tile) {
    ints slot = {0};
    for (int n = 0; n < SIDE; n++) slot[n] = (int32_t)slot_of(k, token_of(k, tile * SIDE + n));
    return slot;
}

/* Projections of tiles [at, end) for blocks [from, to) of those that each needs. */
static void project(
    const struct work *k, const struct rooms *s, int64_t first, int64_t at, int64_t end, int64_t from, int64_t to
) {
    struct part parts[4];
    int64_t count = 0;
    for (int64_t t = at; t < end; t++) {
        ints slot = slots_of(k, first + t);
        for (int64_t i = 2 * from; i < 2 * least_of(to, s->counts[t]); i++) {
            int64_t n = t * k->most + i / 2, column = s->blocks[n] * DEEP + i % 2 * SIDE;
            uint32_t *p = s->p + n * TILE + i % 2 * TILE / 2;
            ints own = (slot >= (int32_t)(column / k->rank)) & (slot <= (int32_t)((column + SIDE - 1) / k->rank));
            if (!lanes_of(own)) {
                memset(p, 0, TILE / 2 * sizeof *p);
                continue;
            }
            parts[count++] = (struct part){column, s->x + t * k->inputs / 2 * SIDE, slot, p};
            if (count == 4) project_all(k, parts, count), count = 0;
        }
    }
    project_all(k, parts, count);
}

/* From the least to the largest block that these tiles need. */
static int64_t needed_blocks(const struct work *k, const struct rooms *s, int64_t at, int64_t end, int64_t *least) {
    int64_t largest = -1;
    *least = k->columns / DEEP;
    for (int64_t t = at; t < end; t++)
        for (int64_t i = t * k->most; i < t * k->most + s->counts[t]; i++) {
            if (s->blocks[i] < *least) *least = s->blocks[i];
            if (s->blocks[i] > largest) largest = s->blocks[i];
        }
    return largest < *least ? 0 : largest - *least + 1;
}

static void multiply_piece(
    const struct work *k, const struct rooms *s, int64_t first, int64_t at, int64_t end, int64_t out, int64_t last, bf16 *room
) {
    float sums[4 * TILE] __attribute__((aligned(64)));
    int64_t least, blocks = needed_blocks(k, s, at, end, &least);
    for (; out < last; out += OUT) {
        const bf16 *w = left(k->w + out * k->inputs, k->outputs - out, k->inputs, room);
        const bf16 *b = k->columns ? left(k->b + out * k->columns, k->outputs - out, k->columns, room + OUT * k->inputs) : 0;
        WRITTEN;
        for (int64_t t = at; t < end; t += 2) {
            int two = t + 1 < end;
            const uint32_t *x = s->x + t * k->inputs / 2 * SIDE;
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            struct ahead ahead = {0, 0, k->columns, blocks};
            if (t == at && out + 2 * OUT <= k->outputs) {
                ahead.w = w + OUT * k->inputs;
                if (blocks) ahead.b = b + OUT * k->columns + least * DEEP;
            }
            if (two) add_inputs(w, k->inputs, x, 1, &ahead);
            else add_inputs(w, k->inputs, x, 0, &ahead);
            add_rank(k, s, t, b, 0);
            if (two) add_rank(k, s, t + 1, b, 1);
            _tile_stored(0, sums, 64);
            _tile_stored(1, sums + TILE, 64);
            put(k, first + t, out, sums);
            if (!two) continue;
            _tile_stored(2, sums + 2 * TILE, 64);
            _tile_stored(3, sums + 3 * TILE, 64);
            put(k, first + t + 1, out, sums + 2 * TILE);
        }
    }
}

#endif
#endif
