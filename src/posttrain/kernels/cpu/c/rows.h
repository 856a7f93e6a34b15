/* What both kinds of attention do with rows: weights of scores, and the orders in which products read them. */
#ifndef POSTTRAIN_ROWS
#define POSTTRAIN_ROWS

#include "pairs.h"

/* The first key that a query sees of `last`, its own behind all others; `window` of them at most, 0: all. */
ALWAYS int64_t seen_from(int64_t window, int64_t last) { return window && last > window ? last - window : 0; }

/* Scores w / scale of keys [first, last) become weights; those beside them, up to whole vectors, zeros. */
static void softmax(float *w, int64_t first, int64_t last, float scale) {
    int64_t begin = DOWN(first), end = UP(last);
    for (int64_t i = begin; i < end; i += LANES) store(w + i, load(w + i) * scale);
    for (int64_t i = begin; i < first; i++) w[i] = -INFINITY;
    for (int64_t i = last; i < end; i++) w[i] = -INFINITY;
    vec most = load(w + begin);
    for (int64_t i = begin + LANES; i < end; i += LANES) {
        vec x = load(w + i);
        most = choose(x > most, x, most);
    }
    float lane[LANES], top;
    store(lane, most);
    top = lane[0];
    for (int i = 1; i < LANES; i++) top = lane[i] > top ? lane[i] : top;
    vec total = {0};
    for (int64_t i = begin; i < end; i += LANES) {
        vec x = load(w + i), e = choose(x < -3.0e38f, (vec){0}, exponentials(x - top));
        store(w + i, e);
        total += e;
    }
    float share = 1.0f / sum_of(total);
    for (int64_t i = begin; i < end; i += LANES) store(w + i, load(w + i) * share);
}

static void turn_rows(const bf16 *rows, int64_t count, int64_t padded, uint32_t *to) {
    for (int64_t i = 0; i < count; i += LANES) turn((const uint32_t *)(rows + i * padded), padded / 2, to + i, count);
}

static void pair_all(const bf16 *rows, int64_t count, int64_t columns, int64_t stride, uint32_t *to) {
    for (int64_t i = 0; i < count; i += 2) pair_rows(rows + i * stride, rows + (i + 1) * stride, columns, to + i / 2 * stride);
}

static void round_row(const float *from, int64_t count, bf16 *to) {
    for (int64_t i = 0; i < count; i += LANES) store_halves(to + i, narrowed(load(from + i)));
}

#endif
