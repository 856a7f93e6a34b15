/* Attention of rows that decode, over a cache of keys and values: what `segments` gives for a row's last token, to the bit. */
#include "rows.h"
#include "team.h"

/* In the order that bindings.attend gives them. Strides are in numbers. */
struct cache {
    int64_t rows, kv_heads, groups, width, block, places, window;
    int64_t q_head, q_token, k_head, k_token, v_head, v_token;
};

/* Where token `at` of a row's head lies in the cache [blocks, places, K, block, D]. */
ALWAYS int64_t lies(const struct cache *s, int64_t place, int64_t head, int64_t at) {
    return (((at / s->block) * s->places + place) * s->kv_heads + head) * s->block * s->width + (at % s->block) * s->width;
}

/* Keys of a row that are brought into order at once. */
#define TOGETHER 64
/* Keys of a head that are asked for before their turn: so many while another head is computed, others so many before. */
#define AHEAD 64

/* What one head of one row is computed in; `next` is what keys the thread reads next, if it knows. */
struct place {
    const struct cache *s;
    int64_t place, head, base, last, stride;
    const bf16 *next;
    /* Queries as rows and, by registers, turned; keys or values in order; weights, as they are and rounded; sums. */
    bf16 *rows, *queries, *rounded;
    uint32_t *turned, *ordered;
    float *weights, *sums;
};

/* Words of its rooms, where a row has at most so many keys. */
static int64_t room(const struct cache *s, int64_t keys) {
    int64_t padded = UP_WHOLE(s->width), rows = UP(s->groups), stride = UP_WHOLE(keys) + WHOLE;
    return (TOGETHER / 2 + TOGETHER / 2 + rows / 2 + rows / 2 + rows) * padded + rows * (stride + stride / 2);
}

static void divide(struct place *p, uint32_t *work) {
    int64_t padded = UP_WHOLE(p->s->width), rows = UP(p->s->groups);
    p->ordered = work;
    p->turned = p->ordered + TOGETHER * padded / 2;
    p->sums = (float *)(p->turned + rows * padded / 2);
    p->weights = p->sums + rows * padded;
    p->rounded = (bf16 *)(p->weights + rows * p->stride);
    p->rows = p->rounded + rows * p->stride;
    p->queries = p->rows + TOGETHER * padded;
}

/* Rows [at, end) of its keys or values, up to a whole number of rows, zeros from `end` on. */
static int64_t gather_cached(const struct place *p, const bf16 *from, int64_t at, int64_t end) {
    int64_t padded = UP_WHOLE(p->s->width), count = UP_WHOLE(end) - at;
    for (int64_t i = 0; i < end - at; i++)
        copy_row(from + lies(p->s, p->place, p->head, at + i), p->s->width, p->rows + i * padded);
    memset(p->rows + (end - at) * padded, 0, (count - (end - at)) * padded * sizeof(bf16));
    return count;
}

static void score(const struct place *p, const bf16 *keys) {
    int64_t padded = UP_WHOLE(p->s->width), half = padded / 2, G = p->s->groups, stride = p->stride;
    memset(p->weights, 0, G * stride * sizeof(float));
    for (int64_t at = p->base; at < p->last; at += TOGETHER) {
        int64_t count = gather_cached(p, keys, at, at + TOGETHER < p->last ? at + TOGETHER : p->last);
        turn_rows(p->rows, count, padded, p->ordered);
        add_products((uint32_t *)p->queries, half, 1, G, half, p->ordered, count, count, p->weights + at - p->base, stride);
    }
}

static void sum_up(const struct place *p, const bf16 *values) {
    int64_t padded = UP_WHOLE(p->s->width), G = p->s->groups;
    memset(p->sums, 0, G * padded * sizeof(float));
    for (int64_t at = p->base; at < p->last; at += TOGETHER) {
        int64_t count = gather_cached(p, values, at, at + TOGETHER < p->last ? at + TOGETHER : p->last);
        uint32_t *weights = (uint32_t *)(p->rounded + at - p->base);
        pair_all(p->rows, count, padded, padded, p->ordered);
        add_products(weights, p->stride / 2, 1, G, count / 2, p->ordered, padded, padded, p->sums, padded);
    }
}

#ifdef HAS_TILES
/* The same where keys and values fill registers as they lie: the keys are then the left side, and nothing is copied. */
static void score_in_place(const struct place *p, const bf16 *keys, const bf16 *values) {
    int64_t half = p->s->width / 2, G = p->s->groups;
    uint32_t sums[TILE], rows[TILE];
    for (int64_t g = 0; g < G; g += SIDE) {
        int64_t count = G - g < SIDE ? G - g : SIDE;
        turn((uint32_t *)(p->queries + g * p->s->width), half, p->turned, SIDE);
        WRITTEN;
        for (int64_t at = p->base; at < p->last; at += SIDE) {
            const bf16 *own = keys + lies(p->s, p->place, p->head, at);
            ask(values + lies(p->s, p->place, p->head, at), SIDE * p->s->width / DEEP);
            if (at + AHEAD < p->last) ask(keys + lies(p->s, p->place, p->head, at + AHEAD), SIDE * p->s->width / DEEP);
            _tile_zero(0);
            for (int64_t k = 0; k < half; k += SIDE) {
                _tile_loadd(4, own + 2 * k, p->s->width * sizeof(bf16));
                _tile_loadd(5, p->turned + k * SIDE, 64);
                _tile_dpbf16ps(0, 4, 5);
            }
            _tile_stored(0, sums, 64);
            turn(sums, SIDE, rows, SIDE);
            for (int64_t i = 0; i < count; i++)
                memcpy(p->weights + (g + i) * p->stride + at - p->base, rows + i * SIDE, SIDE * sizeof(float));
        }
    }
}

static const bf16 no_value[2 * WHOLE];

/* Sums of 32 columns of values, or of 64, for sixteen queries. */
ALWAYS void sum_columns(const struct place *p, const bf16 *values, const bf16 *weights, const int wide, float *sums) {
    int64_t D = p->s->width, columns = wide ? 2 * WHOLE : WHOLE, bytes = columns * sizeof(uint32_t);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t at = p->base; at < p->last; at += WHOLE) {
        const bf16 *own = values + lies(p->s, p->place, p->head, at);
        int64_t count = p->last - at < WHOLE ? p->last - at : WHOLE;
        if (p->next && at - p->base < AHEAD) ask(p->next + (at - p->base) * D, WHOLE * D / DEEP);
        for (int64_t i = 0; i < WHOLE; i += 2) {
            uint32_t *to = p->ordered + i / 2 * columns;
            if (i + 1 < count) pair_rows(own + i * D, own + (i + 1) * D, columns, to);
            else if (i < count) pair_rows(own + i * D, no_value, columns, to);
            else memset(to, 0, bytes);
        }
        WRITTEN;
        _tile_loadd(4, weights + at - p->base, p->stride * sizeof(bf16));
        _tile_loadd(5, p->ordered, bytes);
        _tile_dpbf16ps(0, 4, 5);
        _tile_loadd(5, p->ordered + SIDE, bytes);
        _tile_dpbf16ps(1, 4, 5);
        if (wide) {
            _tile_loadd(5, p->ordered + 2 * SIDE, bytes);
            _tile_dpbf16ps(2, 4, 5);
            _tile_loadd(5, p->ordered + 3 * SIDE, bytes);
            _tile_dpbf16ps(3, 4, 5);
        }
    }
    _tile_stored(0, sums, D * sizeof(float));
    _tile_stored(1, sums + SIDE, D * sizeof(float));
    if (!wide) return;
    _tile_stored(2, sums + 2 * SIDE, D * sizeof(float));
    _tile_stored(3, sums + 3 * SIDE, D * sizeof(float));
}

static void sum_up_in_place(const struct place *p, const bf16 *values) {
    int64_t D = p->s->width;
    for (int64_t g = 0; g < p->s->groups; g += SIDE)
        for (int64_t d = 0; d < D; d += 2 * WHOLE) {
            const bf16 *weights = p->rounded + g * p->stride;
            if (D - d > WHOLE) sum_columns(p, values + d, weights, 1, p->sums + g * D + d);
            else sum_columns(p, values + d, weights, 0, p->sums + g * D + d);
        }
}
#endif

/* One head of keys and values for one row: its G queries over tokens [first, length]. */
static void attend_one(
    const struct cache *s, const bf16 *q, const bf16 *keys, const bf16 *values, int64_t place, int64_t head, int64_t length,
    float scale, const bf16 *next, uint32_t *work, bf16 *out
) {
    int64_t G = s->groups, D = s->width, padded = UP_WHOLE(D), last = length + 1;
    int64_t first = seen_from(s->window, last), base = DOWN_WHOLE(first);
    struct place own = {
        .s = s, .place = place, .head = head, .base = base, .last = last, .stride = UP_WHOLE(last) - base, .next = next,
    };
    struct place *p = &own;
    int in_place = 0;
    divide(p, work);
#ifdef HAS_TILES
    in_place = tiles_open && D % WHOLE == 0 && s->block % WHOLE == 0;
#endif
    for (int64_t g = 0; g < G; g++) copy_row(q + g * s->q_head, D, p->queries + g * padded);
#ifdef HAS_TILES
    if (in_place) score_in_place(p, keys, values);
#endif
    if (!in_place) score(p, keys);
    for (int64_t g = 0; g < G; g++) {
        float *row = p->weights + g * p->stride;
        memset(row, 0, DOWN(first - base) * sizeof(float));
        softmax(row, first - base, last - base, scale);
        memset(row + UP(last - base), 0, (p->stride - UP(last - base)) * sizeof(float));
        round_row(row, p->stride, p->rounded + g * p->stride);
    }
#ifdef HAS_TILES
    if (in_place) sum_up_in_place(p, values);
#endif
    if (!in_place) sum_up(p, values);
    for (int64_t g = 0; g < G; g++)
        for (int64_t d = 0; d < D; d++) out[g * D + d] = narrow(p->sums[g * padded + d]);
}

/* Where the keys begin that one of the heads of all rows sees. */
ALWAYS int64_t first_key(const struct cache *s, const int64_t *place_N, const int64_t *length_N, int64_t i) {
    int64_t n = i / s->kv_heads;
    return lies(s, place_N[n], i % s->kv_heads, DOWN_WHOLE(seen_from(s->window, length_N[n] + 1)));
}

/* Returns 0, or 1 where there is no memory. */
int attend_part(
    const struct cache *s, const bf16 *q, const bf16 *k, const bf16 *v, bf16 *keys, bf16 *values, const int64_t *place_N,
    const int64_t *length_N, const int64_t *token_N, float scale, bf16 *out
) {
    int64_t most = 0, D = s->width, G = s->groups, K = s->kv_heads;
    for (int64_t n = 0; n < s->rows; n++) most = length_N[n] > most ? length_N[n] : most;
    void *memory = NULL;
    struct shape before = {0};
    if (posix_memalign(&memory, 64, room(s, most + 1) * sizeof(uint32_t))) memory = NULL;
    uint32_t *work = memory;
    open_pairs(&before);
    /* Heads that a thread takes at a time: the more, the more of them are asked for before their turn. */
    int64_t all = s->rows * K, each = all / (4 * TEAM) < 2 * K ? all / (4 * TEAM) : 2 * K;
    if (!each) each = 1;
#pragma omp for schedule(dynamic, each) nowait
    for (int64_t i = 0; i < all; i++) {
        int64_t n = i / K, head = i % K, place = place_N[n], length = length_N[n], token = token_N[n];
        int64_t at = lies(s, place, head, length);
        memcpy(keys + at, k + head * s->k_head + token * s->k_token, D * sizeof(bf16));
        memcpy(values + at, v + head * s->v_head + token * s->v_token, D * sizeof(bf16));
        const bf16 *next = (i + 1) % each && i + 1 < all ? keys + first_key(s, place_N, length_N, i + 1) : NULL;
        if (work)
            attend_one(s, q + head * G * s->q_head + token * s->q_token, keys, values, place, head, length, scale, next, work,
                       out + (token * K + head) * G * D);
    }
    int failed = !work;
    close_pairs(&before);
    free(work);
    return failed;
}

int attend(
    const struct cache *s, const bf16 *q, const bf16 *k, const bf16 *v, bf16 *keys, bf16 *values, const int64_t *place_N,
    const int64_t *length_N, const int64_t *token_N, float scale, bf16 *out
) {
    int64_t total = 0;
    int failed = 0;
    for (int64_t n = 0; n < s->rows; n++) total += length_N[n];
#pragma omp parallel reduction(| : failed) if (total * s->kv_heads * s->width > WORTH_THREADS)
    failed |= attend_part(s, q, k, v, keys, values, place_N, length_N, token_N, scale, out);
    return failed;
}
