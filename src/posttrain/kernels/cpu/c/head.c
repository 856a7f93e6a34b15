/* The passes over the logits of a chunk of tokens: log-sum-exp, and the mean of the head's rows under the probabilities.
 *
 *     total = log sum_v exp z_v,       mean = sum of p_v W_v over the v with log p_v > least,    p_v = exp(z_v - total)
 *
 * Logits lie as W h^T has them, the tokens of one v beside each other, so that a lane is a token, a row of W is read once for
 * all tokens that want it, and the product reads W as it lies. p is rounded to bfloat16 before it enters the mean.
 */
#include "vectors.h"

/* Tokens of one piece of work: two vectors, a line of the cache. */
#define WIDE (2 * LANES)
/* Rows of W between two looks at the largest logit. */
#define STEP 64
/* Rows of W that are on their way. */
#define AHEAD 8

ALWAYS vec load_wide(const bf16 *from) { return (vec)(load_halves(from) << 16); }

/* Of `vecs` vectors of tokens. The sum of the steps carries what each addition rounded off. */
ALWAYS void totals(const bf16 *z, int64_t across, int64_t count, const int vecs, float *total) {
    vec top[2], sum[2] = {{0}, {0}}, lost[2] = {{0}, {0}};
    for (int j = 0; j < vecs; j++) top[j] = (vec){0} - INFINITY;
    for (int64_t first = 0; first < count; first += STEP) {
        int64_t end = first + STEP < count ? first + STEP : count;
        vec most[2] = {top[0], top[1]}, here[2] = {{0}, {0}}, from[2];
        for (int64_t v = first; v < end; v++)
            for (int j = 0; j < vecs; j++) {
                vec x = load_wide(z + v * across + j * LANES);
                most[j] = choose(x > most[j], x, most[j]);
            }
        /* Where all so far are -inf, their differences would be no numbers. */
        for (int j = 0; j < vecs; j++) from[j] = choose(most[j] == -INFINITY, (vec){0}, most[j]);
        for (int64_t v = first; v < end; v++)
            for (int j = 0; j < vecs; j++) here[j] += exponentials(load_wide(z + v * across + j * LANES) - from[j]);
        for (int j = 0; j < vecs; j++) {
            vec shrunk = choose(top[j] < most[j], exponentials(top[j] - most[j]), (vec){0} + 1.0f);
            vec more = here[j] - lost[j] * shrunk, before = sum[j] * shrunk;
            sum[j] = before + more;
            lost[j] = (sum[j] - before) - more;
            top[j] = most[j];
        }
    }
    for (int j = 0; j < vecs; j++)
        for (int n = 0; n < LANES; n++) total[j * LANES + n] = top[j][n] + logf(sum[j][n]);
}

/* A token of the vocabulary, and the lanes that want its row. */
struct wanted {
    int64_t v;
    uint32_t lanes;
};

static void add_row(const bf16 *row, float share, int64_t width, float *sums) {
    int64_t d = 0;
    for (; d + LANES <= width; d += LANES) store(sums + d, load(sums + d) + load_wide(row + d) * share);
    for (; d < width; d++) sums[d] += wide(row[d]) * share;
}

/* sums [tokens, width] += p_v W_v, in the order of v. Rows of W lie far apart: each is asked for well before it is read. */
ALWAYS void means(
    const bf16 *z, int64_t across, int64_t count, const int vecs, const float *total, float least, const bf16 *weight,
    int64_t width, struct wanted *list, float *sums
) {
    int64_t some = 0;
    for (int64_t v = 0; v < count; v++) {
        uint32_t lanes = 0;
        for (int j = 0; j < vecs; j++)
            lanes |= lanes_of(load_wide(z + v * across + j * LANES) - load(total + j * LANES) > least) << j * LANES;
        list[some] = (struct wanted){v, lanes};
        some += lanes != 0;
    }
    for (int64_t i = 0; i < some; i++) {
        int64_t v = list[i].v;
        const char *ahead = (const char *)(weight + list[i + AHEAD < some ? i + AHEAD : i].v * width);
        for (int64_t byte = 0; byte < width * (int64_t)sizeof(bf16); byte += 64) __builtin_prefetch(ahead + byte);
        for (uint32_t lanes = list[i].lanes; lanes; lanes &= lanes - 1) {
            int n = __builtin_ctz(lanes);
            add_row(weight + v * width, rounded(expf(wide(z[v * across + n]) - total[n])), width, sums + n * width);
        }
    }
}

/* logits [V, tokens], tokens a multiple of LANES -> total [tokens] and, unless it is none, mean [tokens, D] of weight [V, D].
 * Returns 0, or 1 where there is no memory. */
int head(
    const bf16 *logits, const bf16 *weight, int64_t tokens, int64_t count, int64_t width, float least, float *total, bf16 *mean
) {
    int failed = 0;
#pragma omp parallel if (tokens * count > WORTH_THREADS)
    {
        float *sums = malloc((WIDE * width + 1) * sizeof(float));
        struct wanted *list = malloc((count + 1) * sizeof *list);
        if (!sums || !list) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t t = 0; t < tokens; t += WIDE) {
            const bf16 *z = logits + t;
            int both = t + WIDE <= tokens;
            if (both) totals(z, tokens, count, 2, total + t);
            else totals(z, tokens, count, 1, total + t);
            if (!mean || !sums || !list) continue;
            int64_t numbers = (both ? WIDE : LANES) * width;
            memset(sums, 0, numbers * sizeof(float));
            if (both) means(z, tokens, count, 2, total + t, least, weight, width, list, sums);
            else means(z, tokens, count, 1, total + t, least, weight, width, list, sums);
            for (int64_t i = 0; i < numbers; i++) mean[t * width + i] = narrow(sums[i]);
        }
        free(sums);
        free(list);
    }
    return failed;
}
