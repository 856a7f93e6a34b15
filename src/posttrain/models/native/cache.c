/* Attention of rows that decode, over a cache of keys and values: what `segments` gives for a row's last token, to the bit. */
#include "rows.h"
#include "team.h"

/* In the order that compiled.attend gives them. Strides are in numbers. */
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

/* Rows [at, UP(end)) of a head of the cache; zeros from `end` on. */
ALWAYS void gather_cached(
    const struct cache *s, const bf16 *from, int64_t place, int64_t head, int64_t at, int64_t end, bf16 *rows
) {
    int64_t padded = UP(s->width), count = UP(end) - at;
    for (int64_t i = 0; i < end - at; i++) copy_row(from + lies(s, place, head, at + i), s->width, rows + i * padded);
    memset(rows + (end - at) * padded, 0, (count - (end - at)) * padded * sizeof(bf16));
}

/* One head of keys and values for one row: its G queries over tokens [first, length]. */
static void attend_one(
    const struct cache *s, const bf16 *q, const bf16 *keys, const bf16 *values, int64_t place, int64_t head, int64_t length,
    float scale, uint32_t *work, bf16 *out
) {
    int64_t G = s->groups, D = s->width, padded = UP(D), half = padded / 2, last = length + 1;
    int64_t first = s->window && last > s->window ? last - s->window : 0, base = DOWN(first), stride = UP(last) - base;
    bf16 *rows = (bf16 *)work, *queries = rows + TOGETHER * padded, *rounded = queries + G * padded;
    uint32_t *ordered = work + TOGETHER * half + G * half + G * stride / 2;
    float *sums = (float *)(ordered + TOGETHER * half), *weights = sums + G * padded;
    for (int64_t g = 0; g < G; g++) copy_row(q + g * s->q_head, D, queries + g * padded);
    memset(sums, 0, G * (padded + stride) * sizeof(float));
    for (int64_t at = base; at < last; at += TOGETHER) {
        int64_t end = at + TOGETHER < last ? at + TOGETHER : last, count = UP(end) - at;
        gather_cached(s, keys, place, head, at, end, rows);
        turn_rows(rows, count, padded, ordered);
        add_products((uint32_t *)queries, half, 1, G, half, ordered, count, count, weights + at - base, stride);
    }
    for (int64_t g = 0; g < G; g++) softmax(weights + g * stride, first - base, last - base, scale);
    for (int64_t g = 0; g < G; g++) round_row(weights + g * stride, stride, rounded + g * stride);
    for (int64_t at = base; at < last; at += TOGETHER) {
        int64_t end = at + TOGETHER < last ? at + TOGETHER : last, count = UP(end) - at;
        gather_cached(s, values, place, head, at, end, rows);
        pair_all(rows, count, padded, padded, ordered);
        add_products((uint32_t *)(rounded + at - base), stride / 2, 1, G, count / 2, ordered, padded, padded, sums, padded);
    }
    for (int64_t g = 0; g < G; g++)
        for (int64_t d = 0; d < D; d++) out[g * D + d] = narrow(sums[g * padded + d]);
}

/* Returns 0, or 1 where there is no memory. */
int attend_part(
    const struct cache *s, const bf16 *q, const bf16 *k, const bf16 *v, bf16 *keys, bf16 *values, const int64_t *place_N,
    const int64_t *length_N, const int64_t *token_N, float scale, bf16 *out
) {
    int64_t most = 0, D = s->width, G = s->groups, K = s->kv_heads;
    for (int64_t n = 0; n < s->rows; n++) most = length_N[n] > most ? length_N[n] : most;
    int64_t stride = UP(most + 1) + LANES;
    uint32_t *work = malloc(((TOGETHER + 2 * G) * UP(D) + 2 * G * stride) * sizeof(uint32_t));
#pragma omp for schedule(dynamic, 2) nowait
    for (int64_t i = 0; i < s->rows * K; i++) {
        int64_t n = i / K, head = i % K, place = place_N[n], length = length_N[n], token = token_N[n];
        int64_t at = lies(s, place, head, length);
        memcpy(keys + at, k + head * s->k_head + token * s->k_token, D * sizeof(bf16));
        memcpy(values + at, v + head * s->v_head + token * s->v_token, D * sizeof(bf16));
        if (work)
            attend_one(s, q + head * G * s->q_head + token * s->q_token, keys, values, place, head, length, scale, work,
                       out + (token * K + head) * G * D);
    }
    int failed = !work;
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
