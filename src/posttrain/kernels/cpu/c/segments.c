/* Attention of packed segments in bfloat16 with float32 inside, each way.
 *
 *     P = softmax(scale Q K),  O = P V         dV = P dO,  dS = scale P (dO V - sum(P dO V)),  dQ = dS K,  dK = dS Q
 *
 * P and dS are rounded to bfloat16 where they enter a product; P is made again in backward, so nothing is kept for it. Keys are
 * counted from the beginning of what a query sees, and sums over them run in their order: a query's result is the same to the
 * bit in a packed batch, in a prompt, and a token at a time.
 */
#include "rows.h"

#ifdef _OPENMP
#include <omp.h>
#endif

/* Tokens of one piece of work, and rows (queries of one key/value head) that one pass over its keys serves. */
#define CHUNK 64
#define ROWS 32
#define ROWS_OF(s) ((s)->groups > ROWS ? (s)->groups : ROWS / (s)->groups * (s)->groups)

/* In the order that bindings.py gives them. Strides are in numbers. */
struct sizes {
    int64_t spans, tokens, key_tokens, kv_heads, groups, width, window;
    int64_t q_head, q_token, k_head, k_token, v_head, v_token, grad_head, grad_token;
};

/* Span n has tokens [start, start + length); it sees its pieces, ancestors first and itself last, of which [piece, next) are its
 * own rows of `pieces` (start and length). */
struct span {
    int64_t start, length, piece, next;
};

/* Queries [from, to) of a span, which see keys [first, last) of it, counted from the beginning of its pieces. */
struct chunk {
    int64_t span, from, to, first, last;
};

struct table {
    const struct sizes *s;
    const struct span *spans;
    const int64_t (*pieces)[2];
    struct chunk *chunks;
    int64_t count, most;
};

/* Returns 0 where there is no memory. */
static int cut(struct table *t) {
    int64_t room = 1;
    for (int64_t n = 0; n < t->s->spans; n++) room += (t->spans[n].length + CHUNK - 1) / CHUNK;
    t->chunks = malloc(room * sizeof *t->chunks);
    t->count = t->most = 0;
    for (int64_t n = 0; t->chunks && n < t->s->spans; n++) {
        const struct span *span = t->spans + n;
        int64_t before = 0;
        for (int64_t i = span->piece; i < span->next - 1; i++) before += t->pieces[i][1];
        for (int64_t from = 0; from < span->length; from += CHUNK) {
            int64_t to = from + CHUNK < span->length ? from + CHUNK : span->length;
            struct chunk found = {n, from, to, seen_from(t->s->window, before + from + 1), before + to};
            t->chunks[t->count++] = found;
            if (UP_WHOLE(found.last) - DOWN_WHOLE(found.first) > t->most)
                t->most = UP_WHOLE(found.last) - DOWN_WHOLE(found.first);
        }
    }
    return t->chunks != NULL;
}

/* What a thread works with. Keys are counted from DOWN_WHOLE(first); P and dS are in `rounded` and, by pairs of rows, in
 * `paired`. */
struct work {
    bf16 *rows, *rounded, *queries, *grads;
    uint32_t *turned_keys, *turned_values, *paired_keys, *paired_values, *paired, *paired_queries, *paired_grads;
    float *weights, *slopes, *sums, *d_keys, *d_values;
    void *memory;
};

/* The next words of some memory. */
static uint32_t *next(uint32_t **at, int64_t words) {
    uint32_t *found = *at;
    *at += words;
    return found;
}

static struct work room(const struct table *t) {
    int64_t padded = UP_WHOLE(t->s->width), rows = UP_WHOLE(ROWS_OF(t->s)), keys = t->most * padded / 2, seen = rows * t->most;
    struct work w = {0};
    int64_t row = rows * padded / 2, total = 9 * keys + 3 * seen + 6 * row;
    if (posix_memalign(&w.memory, 64, total * sizeof(uint32_t))) w.memory = NULL;
    if (!w.memory) return w;
    uint32_t *at = w.memory;
    w.rows = (bf16 *)next(&at, keys);
    w.turned_keys = next(&at, keys);
    w.turned_values = next(&at, keys);
    w.paired_keys = next(&at, keys);
    w.paired_values = next(&at, keys);
    w.rounded = (bf16 *)next(&at, seen / 2);
    w.paired = next(&at, seen / 2);
    w.queries = (bf16 *)next(&at, row);
    w.grads = (bf16 *)next(&at, row);
    w.paired_queries = next(&at, row);
    w.paired_grads = next(&at, row);
    w.weights = (float *)next(&at, seen);
    w.slopes = (float *)next(&at, seen);
    w.sums = (float *)next(&at, 2 * row);
    w.d_keys = (float *)next(&at, 2 * keys);
    w.d_values = (float *)next(&at, 2 * keys);
    return w;
}

/* For each key of a chunk its token of the batch: calls of `body` with `row` (from DOWN_WHOLE(first)) and `token`. */
#define FOR_KEYS(t, c, body)                                                                          \
    do {                                                                                              \
        int64_t at_ = 0;                                                                              \
        for (int64_t i_ = (t)->spans[(c)->span].piece; i_ < (t)->spans[(c)->span].next; i_++) {       \
            int64_t begin_ = (c)->first > at_ ? (c)->first : at_, end_ = at_ + (t)->pieces[i_][1];    \
            for (int64_t key_ = begin_; key_ < end_ && key_ < (c)->last; key_++) {                    \
                int64_t row = key_ - DOWN_WHOLE((c)->first), token = (t)->pieces[i_][0] + key_ - at_;       \
                body;                                                                                 \
            }                                                                                         \
            at_ = end_;                                                                               \
        }                                                                                             \
    } while (0)

/* One head's keys or values of a chunk, as rows, and zeros where there are none. */
static void gather(const struct table *t, const struct chunk *c, const bf16 *from, int64_t stride, bf16 *rows) {
    int64_t width = t->s->width, padded = UP_WHOLE(width), base = DOWN_WHOLE(c->first);
    int64_t past = c->last - base, end = UP_WHOLE(c->last) - base;
    memset(rows, 0, (c->first - base) * padded * sizeof(bf16));
    memset(rows + past * padded, 0, (end - past) * padded * sizeof(bf16));
    FOR_KEYS(t, c, copy_row(from + token * stride, width, rows + row * padded));
}

/* Rows of one key/value head for tokens [from, to) of a chunk: the query heads of a token stand beside each other. */
static void take(
    const struct table *t, const struct chunk *c, int64_t from, int64_t to, const bf16 *x, int64_t head, int64_t token, bf16 *rows
) {
    int64_t G = t->s->groups, D = t->s->width, padded = UP_WHOLE(D), count = (to - from) * G;
    int64_t first = t->spans[c->span].start + from;
    for (int64_t r = 0; r < count; r++) copy_row(x + r % G * head + (first + r / G) * token, D, rows + r * padded);
    if (count % 2) memset(rows + count * padded, 0, padded * sizeof(bf16));
}

/* The weights of tokens [from, to) of a chunk over its first `last` keys, in rows of `stride`. */
static void weigh(
    const struct table *t, const struct chunk *c, int64_t from, int64_t to, int64_t last, int64_t stride, float scale,
    struct work *w
) {
    int64_t G = t->s->groups, half = UP_WHOLE(t->s->width) / 2, base = DOWN_WHOLE(c->first), rows = (to - from) * G;
    for (int64_t r = 0; r < rows; r++) memset(w->weights + r * stride, 0, last * sizeof(float));
    add_products((uint32_t *)w->queries, half, 1, rows, half, w->turned_keys, stride, last, w->weights, stride);
    for (int64_t r = 0; r < rows; r++) {
        int64_t own = c->last - (c->to - from - r / G) + 1, first = seen_from(t->s->window, own) - base;
        float *row = w->weights + r * stride;
        memset(row, 0, DOWN(first) * sizeof(float));
        softmax(row, first, own - base, scale);
        memset(row + UP(own - base), 0, (last - UP(own - base)) * sizeof(float));
    }
}

/* The first `last` numbers of rows rounded; an odd last row gets one of zeros beside it. */
static void round_rows(const float *from, int64_t rows, int64_t last, int64_t stride, bf16 *to) {
    for (int64_t r = 0; r < rows; r++) round_row(from + r * stride, last, to + r * stride);
    if (rows % 2) memset(to + rows * stride, 0, last * sizeof(bf16));
}

/* Sums of tokens [from, to) to where their heads lie in out [T, H, D]. */
static void give(const struct table *t, const struct chunk *c, int64_t head, int64_t from, int64_t to, const float *sums, bf16 *out) {
    int64_t G = t->s->groups, D = t->s->width, H = t->s->kv_heads * G, first = t->spans[c->span].start + from;
    for (int64_t r = 0; r < (to - from) * G; r++) {
        bf16 *row = out + ((first + r / G) * H + head * G + r % G) * D;
        for (int64_t d = 0; d < D; d++) row[d] = narrow(sums[r * UP_WHOLE(D) + d]);
    }
}

/* One head of one chunk. */
static void forward(
    const struct table *t, const struct chunk *c, int64_t head, const bf16 *q, const bf16 *k, const bf16 *v, float scale,
    struct work *w, bf16 *out
) {
    const struct sizes *s = t->s;
    int64_t G = s->groups, padded = UP_WHOLE(s->width), base = DOWN_WHOLE(c->first);
    int64_t stride = UP_WHOLE(c->last) - base, step = ROWS_OF(s) / G;
    gather(t, c, k + head * s->k_head, s->k_token, w->rows);
    turn_rows(w->rows, stride, padded, w->turned_keys);
    gather(t, c, v + head * s->v_head, s->v_token, w->rows);
    pair_all(w->rows, stride, padded, padded, w->paired_values);
    for (int64_t from = c->from; from < c->to; from += step) {
        int64_t to = from + step < c->to ? from + step : c->to, rows = (to - from) * G;
        int64_t last = UP_WHOLE(c->last - (c->to - to)) - base;
        take(t, c, from, to, q + head * G * s->q_head, s->q_head, s->q_token, w->queries);
        weigh(t, c, from, to, last, stride, scale, w);
        round_rows(w->weights, rows, last, stride, w->rounded);
        memset(w->sums, 0, rows * padded * sizeof(float));
        add_products((uint32_t *)w->rounded, stride / 2, 1, rows, last / 2, w->paired_values, padded, padded, w->sums, padded);
        give(t, c, head, from, to, w->sums, out);
    }
}

/* out [T, H, D] = softmax(scale Q K) V; tokens of no span stay as they are. Returns 0, or 1 where there is no memory. */
int segments(
    const struct sizes *s, const struct span *spans, const int64_t (*pieces)[2], const bf16 *q, const bf16 *k, const bf16 *v,
    float scale, bf16 *out
) {
    struct table table = {s, spans, pieces, NULL, 0, 0}, *t = &table;
    int failed = !cut(t);
    int64_t K = s->kv_heads;
#pragma omp parallel if (!failed && s->tokens * K * s->groups * s->width > WORTH_THREADS)
    {
        struct work w = room(t);
        struct shape before = {0};
        open_pairs(&before);
        if (!w.memory) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < t->count * K; i++)
            if (w.memory) forward(t, t->chunks + i / K, i % K, q, k, v, scale, &w, out);
        close_pairs(&before);
        free(w.memory);
    }
    free(t->chunks);
    return failed;
}

/* Rows by pairs, and pairs of zeros behind them that fill a register. */
static void pair_up(const bf16 *rows, int64_t count, int64_t padded, uint32_t *to) {
    int64_t pairs = (count + 1) / 2;
    pair_all(rows, count, padded, padded, to);
    memset(to + pairs * padded, 0, (UP(pairs) - pairs) * padded * sizeof(uint32_t));
}

/* One head of one chunk: gradients of its queries, and in w those of its keys and values. */
static void backward(
    const struct table *t, const struct chunk *c, int64_t head, const bf16 *q, const bf16 *k, const bf16 *v, const bf16 *grad,
    float scale, struct work *w, bf16 *dq
) {
    const struct sizes *s = t->s;
    int64_t G = s->groups, padded = UP_WHOLE(s->width), base = DOWN_WHOLE(c->first);
    int64_t stride = UP_WHOLE(c->last) - base, step = ROWS_OF(s) / G;
    gather(t, c, k + head * s->k_head, s->k_token, w->rows);
    turn_rows(w->rows, stride, padded, w->turned_keys);
    pair_all(w->rows, stride, padded, padded, w->paired_keys);
    gather(t, c, v + head * s->v_head, s->v_token, w->rows);
    turn_rows(w->rows, stride, padded, w->turned_values);
    memset(w->d_keys, 0, stride * padded * sizeof(float));
    memset(w->d_values, 0, stride * padded * sizeof(float));
    for (int64_t from = c->from; from < c->to; from += step) {
        int64_t to = from + step < c->to ? from + step : c->to, rows = (to - from) * G, pairs = (rows + 1) / 2;
        int64_t last = UP_WHOLE(c->last - (c->to - to)) - base;
        take(t, c, from, to, q + head * G * s->q_head, s->q_head, s->q_token, w->queries);
        take(t, c, from, to, grad + head * G * s->grad_head, s->grad_head, s->grad_token, w->grads);
        pair_up(w->queries, rows, padded, w->paired_queries);
        pair_up(w->grads, rows, padded, w->paired_grads);
        weigh(t, c, from, to, last, stride, scale, w);
        round_rows(w->weights, rows, last, stride, w->rounded);
        pair_all(w->rounded, rows, last, stride, w->paired);
        add_products(w->paired, 1, stride, last, pairs, w->paired_grads, padded, padded, w->d_values, padded);
        for (int64_t r = 0; r < rows; r++) memset(w->slopes + r * stride, 0, last * sizeof(float));
        add_products((uint32_t *)w->grads, padded / 2, 1, rows, padded / 2, w->turned_values, stride, last, w->slopes, stride);
        for (int64_t r = 0; r < rows; r++) {
            float *weights = w->weights + r * stride, *slopes = w->slopes + r * stride;
            vec along = {0};
            for (int64_t i = 0; i < last; i += LANES) along += load(weights + i) * load(slopes + i);
            float mean = sum_of(along);
            for (int64_t i = 0; i < last; i += LANES) store(slopes + i, load(weights + i) * (load(slopes + i) - mean) * scale);
        }
        round_rows(w->slopes, rows, last, stride, w->rounded);
        pair_all(w->rounded, rows, last, stride, w->paired);
        add_products(w->paired, 1, stride, last, pairs, w->paired_queries, padded, padded, w->d_keys, padded);
        memset(w->sums, 0, rows * padded * sizeof(float));
        add_products((uint32_t *)w->rounded, stride / 2, 1, rows, last / 2, w->paired_keys, padded, padded, w->sums, padded);
        give(t, c, head, from, to, w->sums, dq);
    }
}

static void add_row(const float *from, int64_t width, float *to) {
    for (int64_t d = 0; d < width; d++) to[d] += from[d];
}

/* dq [T, H, D], dk and dv [key tokens, K, D] of `segments`. Sums of keys and values are kept in lanes, each of them added to by
 * one thread at a time, so that they are the same in every run with as many threads. Returns 0, or 1 where there is no memory. */
int segments_backward(
    const struct sizes *s, const struct span *spans, const int64_t (*pieces)[2], const bf16 *q, const bf16 *k, const bf16 *v,
    const bf16 *grad, float scale, bf16 *dq, bf16 *dk, bf16 *dv
) {
    struct table table = {s, spans, pieces, NULL, 0, 0}, *t = &table;
    int failed = !cut(t), threads = 1;
#ifdef _OPENMP
    threads = omp_get_max_threads();
#endif
    int64_t K = s->kv_heads, D = s->width, padded = UP_WHOLE(D);
    int64_t lanes = (3 * threads + K - 1) / K, size = s->key_tokens * padded;
    if (lanes > t->count) lanes = t->count ? t->count : 1;
    float *sums = calloc(2 * K * lanes * size, sizeof(float));
    if (!sums) failed = 1;
#pragma omp parallel if (!failed && s->tokens * K * s->groups * D > WORTH_THREADS)
    {
        struct work w = room(t);
        struct shape before = {0};
        open_pairs(&before);
        if (!w.memory) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < lanes * K; i++) {
            int64_t lane = i / K, head = i % K;
            float *d_keys = sums + 2 * (head * lanes + lane) * size, *d_values = d_keys + size;
            for (int64_t n = lane; sums && w.memory && n < t->count; n += lanes) {
                const struct chunk *c = t->chunks + n;
                backward(t, c, head, q, k, v, grad, scale, &w, dq);
                FOR_KEYS(t, c, {
                    add_row(w.d_keys + row * padded, padded, d_keys + token * padded);
                    add_row(w.d_values + row * padded, padded, d_values + token * padded);
                });
            }
        }
        close_pairs(&before);
        free(w.memory);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < s->key_tokens * K; i++) {
            int64_t token = i / K, head = i % K;
            for (int64_t d = 0; sums && d < D; d++) {
                const float *first = sums + 2 * head * lanes * size + token * padded + d;
                float key = 0.0f, value = 0.0f;
                for (int64_t lane = 0; lane < lanes; lane++) {
                    key += first[2 * lane * size];
                    value += first[(2 * lane + 1) * size];
                }
                dk[i * D + d] = narrow(key);
                dv[i * D + d] = narrow(value);
            }
        }
    }
    free(sums);
    free(t->chunks);
    return failed;
}
