/* A decoding step's forward as a list of the functions that it calls, run by one team of threads: between two of them they wait
 * for each other only where the second needs what the first gives. kernels/cpu/replay.py makes the lists. */
#include "team.h"
#include "tiles.h"

/* In the order of KINDS in kernels/cpu/replay.py. */
enum kind {
    ZERO, ADD, RMS_NORM, ROTATE, GATED, ATTEND, MULTIPLY, PROJECT, EXPAND, TILE_BLOCKS, TILE_TURN, TILE_PROJECT, TILE_MULTIPLY,
};

/* Addresses and numbers as the function takes them; a float by its bits. `wait`: what ran before must be done. */
struct call {
    int64_t kind, wait, arg[14];
};

#define AT(type, n) ((type *)c->arg[n])
#define LINE 64

static float float_of(int64_t bits) {
    union { uint32_t u; float f; } v = {(uint32_t)bits};
    return v.f;
}

static void zero_part(char *to, int64_t bytes) {
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < bytes; i += LINE) memset(to + i, 0, bytes - i < LINE ? bytes - i : LINE);
}

#ifdef HAS_TILES
/* The product of a layer in its parts. What is prepared of x serves all layers that read it. */
static void tile_part(const struct call *c, bf16 *room) {
    struct work k = work_of(
        AT(int64_t, 0), AT(bf16, 1), AT(bf16, 2), AT(bf16, 3), AT(bf16, 4), AT(bf16, 5), AT(int32_t, 6), AT(int32_t, 7), 0,
        AT(bf16, 9)
    );
    struct rooms s = {AT(uint32_t, 10), AT(uint32_t, 11), AT(int32_t, 12), AT(int64_t, 13), room};
    int64_t pairs = (k.most + 1) / 2, outputs = outputs_of(&k, omp_get_num_threads()), pieces = parts_of(k.outputs, outputs);
    switch (c->kind) {
    case TILE_BLOCKS:
#pragma omp for schedule(static) nowait
        for (int64_t t = 0; t < k.tiles; t++) s.counts[t] = blocks_of(&k, t, s.blocks + t * k.most);
        break;
    case TILE_TURN:
#pragma omp for schedule(static) nowait
        for (int64_t t = 0; t < k.tiles; t++) gather(&k, t, room, s.x + t * k.inputs / 2 * SIDE);
        break;
    case TILE_PROJECT:
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t i = 0; i < k.tiles * pairs; i++) {
            int64_t t = i / pairs, from = i % pairs * 2;
            if (from < s.counts[t]) project(&k, &s, 0, t, t + 1, from, from + 2);
        }
        break;
    default:
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t i = 0; i < pieces; i++)
            multiply_piece(&k, &s, 0, 0, k.tiles, i * outputs, least_of((i + 1) * outputs, k.outputs), room);
    }
}
#endif

static int call_part(const struct call *c, bf16 *room) {
    (void)room;
    switch (c->kind) {
    case ZERO: zero_part(AT(char, 0), c->arg[1]); return 0;
    case ADD: add_part(AT(bf16, 0), AT(bf16, 1), c->arg[2], AT(bf16, 3)); return 0;
    case RMS_NORM:
        rms_norm_part(AT(bf16, 0), AT(float, 1), c->arg[2], c->arg[3], float_of(c->arg[4]), AT(bf16, 5));
        return 0;
    case ROTATE:
        rotate_part(
            AT(bf16, 0), c->arg[1], c->arg[2], AT(bf16, 3), AT(bf16, 4), c->arg[5], c->arg[6], c->arg[7], c->arg[8], AT(bf16, 9)
        );
        return 0;
    case GATED: gated_part(AT(bf16, 0), AT(bf16, 1), c->arg[2], c->arg[3], AT(bf16, 4)); return 0;
    case ATTEND:
        return attend_part(
            AT(struct cache, 0), AT(bf16, 1), AT(bf16, 2), AT(bf16, 3), AT(bf16, 4), AT(bf16, 5), AT(int64_t, 6), AT(int64_t, 7),
            AT(int64_t, 8), float_of(c->arg[9]), AT(bf16, 10)
        );
    case MULTIPLY:
        return multiply_part(AT(bf16, 0), AT(bf16, 1), AT(bf16, 2), c->arg[3], c->arg[4], c->arg[5], AT(bf16, 6));
    case PROJECT:
        return project_part(
            AT(bf16, 0), AT(bf16, 1), AT(int64_t, 2), AT(int64_t, 3), c->arg[4], c->arg[5], c->arg[6], AT(float, 7)
        );
    case EXPAND:
        expand_part(
            AT(float, 0), AT(bf16, 1), AT(int64_t, 2), AT(int64_t, 3), c->arg[4], c->arg[5], c->arg[6], c->arg[7], AT(bf16, 8)
        );
        return 0;
    }
#ifdef HAS_TILES
    if (c->kind >= TILE_BLOCKS && c->kind <= TILE_MULTIPLY) {
        tile_part(c, room);
        return 0;
    }
#endif
    return 2;
}

/* `room`: bytes that a thread needs for rows that it copies, 0 where no tiles are used. Returns 0, 1 where there is no
 * memory, or 2 where a call is of no kind. */
int run(const struct call *calls, int64_t count, int64_t room) {
    int failed = 0, without = 0;
#pragma omp parallel reduction(| : failed)
    {
        bf16 *own = aligned_alloc(LINE, (room + 2 * LINE - 1) / LINE * LINE);
        if (!own) {
#pragma omp atomic write
            without = 1;
        }
#ifdef HAS_TILES
        struct shape before = {0};
        if (room) open_tiles(&before);
#endif
#pragma omp barrier
        for (int64_t i = 0; i < count && !without; i++) {
            if (calls[i].wait) {
#pragma omp barrier
            }
            failed |= call_part(calls + i, own);
        }
#ifdef HAS_TILES
        if (room) close_tiles(&before);
#endif
        free(own);
    }
    return failed | without;
}
