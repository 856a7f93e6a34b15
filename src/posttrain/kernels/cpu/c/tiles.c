/* The products of `tiles.h` for one layer, by threads of their own. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "tiles.h"

#ifdef HAS_TILES
#include <sys/syscall.h>
#include <unistd.h>

/* Tiles of tokens that one thread takes at a time: their x stays in its cache. */
#define TILES 16
/* So few tiles are prepared by every thread. */
#define FEW 2

#define ASK_FOR_STATE 0x1023
#define TILE_DATA 18

int tiles_open;

int tiles(void) { return tiles_open = syscall(SYS_arch_prctl, ASK_FOR_STATE, TILE_DATA) == 0; }

/* p of a tile where it is wanted, token by token. */
static void give_p(const struct work *k, const struct rooms *s, int64_t first, int64_t at) {
    uint32_t rows[TILE];
    for (int64_t i = at * k->most; i < at * k->most + s->counts[at]; i++) {
        turn(s->p + i * TILE, SIDE, rows, SIDE);
        for (int n = 0; n < SIDE; n++) {
            int64_t token = token_of(k, (first + at) * SIDE + n);
            if (token >= 0) memcpy(k->p + token * k->columns + s->blocks[i] * DEEP, rows + n * SIDE, DEEP * sizeof(bf16));
        }
    }
}

/* x, blocks and p of tiles [at, end). */
static void prepare(const struct work *k, const struct rooms *s, int64_t first, int64_t at, int64_t end, bf16 *room) {
    for (int64_t t = at; t < end; t++) {
        s->counts[t] = blocks_of(k, first + t, s->blocks + t * k->most);
        gather(k, first + t, room, s->x + t * k->inputs / 2 * SIDE);
    }
    if (k->columns) project(k, s, first, at, end, 0, k->most);
    for (int64_t t = at; k->p && t < end; t++) give_p(k, s, first, t);
}

static void *room_of(int64_t bytes) { return aligned_alloc(64, (bytes + 127) / 64 * 64); }

static int open_rooms(const struct work *k, int64_t tiles, struct rooms *s) {
    s->x = room_of(tiles * k->inputs * SIDE * sizeof(bf16));
    s->p = room_of(tiles * k->most * TILE * sizeof(uint32_t));
    s->blocks = room_of(tiles * k->most * sizeof(int32_t));
    s->counts = room_of(tiles * sizeof(int64_t));
    s->copies = room_of(OUT * (k->inputs + k->columns) * sizeof(bf16));
    return s->x && s->p && s->blocks && s->counts && s->copies;
}

static void close_rooms(const struct rooms *s) {
    free(s->x);
    free(s->p);
    free(s->blocks);
    free(s->counts);
    free(s->copies);
}

/* Many tokens: each thread takes some of them and computes all outputs, so that their x is in its own cache. */
static void by_tokens(const struct work *k, int64_t each, const struct rooms *own) {
    int64_t pieces = parts_of(k->tiles, each);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < pieces; i++) {
        int64_t first = i * each, count = least_of(each, k->tiles - first);
        prepare(k, own, first, 0, count, own->copies);
        for (int64_t out = 0; out < k->outputs; out += OUTPUTS)
            multiply_piece(k, own, first, 0, count, out, least_of(out + OUTPUTS, k->outputs), own->copies);
    }
}

/* Few tokens: each thread takes some of the outputs. Of very few each prepares all, which costs less than to wait. */
static void by_outputs(const struct work *k, int64_t each, int alone, const struct rooms *shared, const struct rooms *own) {
    int64_t pieces = parts_of(k->outputs, each);
    if (alone) prepare(k, own, 0, 0, k->tiles, own->copies);
    else {
#pragma omp for schedule(static)
        for (int64_t at = 0; at < k->tiles; at++) prepare(k, shared, 0, at, at + 1, own->copies);
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < pieces; i++)
        multiply_piece(k, shared, 0, 0, k->tiles, i * each, least_of((i + 1) * each, k->outputs), own->copies);
}

/* x [tokens, inputs], rows `along` apart; w [outputs, inputs]; a [columns, inputs], b [outputs, columns], columns a multiple of
 * 32, or 0 for none; rank a power of two up to 32, or a multiple of it; inputs a multiple of 32. y is [tokens, outputs], or
 * [outputs, across] with `across` for whole tiles. `sizes` are in the order of struct work, then the count of tiles. Returns 0,
 * or 1 where there is no memory. */
int products(
    const int64_t *sizes, const bf16 *x, const bf16 *w, const bf16 *bias, const bf16 *a, const bf16 *b, const int32_t *order,
    const int32_t *slot, bf16 *p, bf16 *y
) {
    struct work k = work_of(sizes, x, w, bias, a, b, order, slot, p, y);
    if (!k.tokens) return 0;
    int64_t threads = k.tokens * k.inputs * k.outputs > WORTH_THREADS * 64 ? omp_get_max_threads() : 1;
    int many = k.tiles >= TILES / 2 * threads, few = k.tiles <= FEW && !k.p, failed = 0;
    int64_t tiles = parts_of(k.tiles, threads * parts_of(k.tiles, TILES * threads)), outputs = outputs_of(&k, threads);
    struct rooms *rooms = calloc(threads, sizeof *rooms);
    if (!rooms) return 1;
    for (int64_t i = 0; i < threads; i++) failed |= !open_rooms(&k, many ? tiles : few || !i ? k.tiles : 0, &rooms[i]);
#pragma omp parallel num_threads(threads) if (threads > 1 && !failed)
    if (!failed) {
        struct shape before = {0};
        const struct rooms *own = rooms + omp_get_thread_num();
        open_tiles(&before);
        if (many) by_tokens(&k, tiles, own);
        else by_outputs(&k, outputs, few, few ? own : rooms, own);
        close_tiles(&before);
    }
    for (int64_t i = 0; i < threads; i++) close_rooms(&rooms[i]);
    free(rooms);
    return failed;
}
#else
int tiles(void) { return 0; }
#endif
