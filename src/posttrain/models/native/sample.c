/* The next token of each row: the likeliest, or where a number falls in the cumulative distribution of softmax(z / temperature).
 *
 * Weights are summed in pieces of the vocabulary; a draw finds its piece, and then its token inside of it. */
#include "vectors.h"

/* Tokens of one piece. */
#define PIECE 1024

/* z of sixteen tokens, -inf behind the last one. */
ALWAYS vec some(const bf16 *z, int64_t left) {
    if (left >= LANES) return (vec)(load_halves(z) << 16);
    bf16 own[LANES];
    for (int n = 0; n < LANES; n++) own[n] = n < left ? z[n] : 0xff80;
    return (vec)(load_halves(own) << 16);
}

/* e^x of x <= 0, and zero where it is next to nothing. */
ALWAYS vec weights(vec x) { return choose(x < -87.0f, (vec){0}, exponentials(x)); }

/* The largest; none where some are no numbers to choose by. */
static float largest(const bf16 *z, int64_t count) {
    vec most = (vec){0} - INFINITY;
    ints bad = {0};
    for (int64_t i = 0; i < count; i += LANES) {
        vec x = some(z + i, count - i);
        most = choose(x > most, x, most);
        bad |= (x != x) | (x == INFINITY);
    }
    float top = -INFINITY;
    for (int n = 0; n < LANES; n++) top = most[n] > top ? most[n] : top;
    return lanes_of(bad) || top == -INFINITY ? NAN : top;
}

static int64_t first_of(const bf16 *z, int64_t count, float top) {
    for (int64_t i = 0; i < count; i += LANES) {
        uint32_t found = lanes_of(some(z + i, count - i) == top);
        if (found) return i + __builtin_ctz(found);
    }
    return 0;
}

/* The sum of all weights; before[p]: of the pieces up to p, with it. */
static double sums(const bf16 *z, int64_t count, float top, float scale, double *before) {
    double total = 0;
    for (int64_t first = 0, p = 0; first < count; first += PIECE, p++) {
        int64_t end = first + PIECE < count ? first + PIECE : count;
        vec here = {0};
        for (int64_t i = first; i < end; i += LANES) here += weights((some(z + i, count - i) - top) * scale);
        total += sum_of(here);
        if (before) before[p] = total;
    }
    return total;
}

/* The token at which the sum of weights passes `wanted`. */
static int64_t drawn(const bf16 *z, int64_t count, float top, float scale, const double *before, double wanted) {
    int64_t p = 0, last = (count - 1) / PIECE;
    while (p < last && before[p] <= wanted) p++;
    double sum = p ? before[p - 1] : 0;
    int64_t first = p * PIECE, end = first + PIECE < count ? first + PIECE : count, found = first;
    for (int64_t i = first; i < end; i += LANES) {
        vec w = weights((some(z + i, count - i) - top) * scale);
        for (int n = 0; n < LANES; n++) {
            sum += w[n];
            /* Rounding must not carry a draw past the last token with any weight. */
            if (w[n] > 0) found = i + n;
            if (sum > wanted) return found;
        }
    }
    return found;
}

/* rows [R, 3]: a number in [0, 1), the temperature (0: the likeliest), whether log-probabilities are wanted. out [R, 4]: token,
 * its log-probability under what was sampled from and under the model's own distribution, whether the logits are numbers. */
int choose_tokens(const bf16 *logits, int64_t count_R, int64_t count, int64_t along, const double *rows, double *out) {
    int failed = 0;
#pragma omp parallel reduction(| : failed) if (count_R * count > WORTH_THREADS)
    {
        double *before = malloc((count / PIECE + 1) * sizeof(double));
        failed |= !before;
#pragma omp for schedule(dynamic, 1)
        for (int64_t r = 0; r < count_R; r++) {
            const bf16 *z = logits + r * along;
            double uniform = rows[3 * r], temperature = rows[3 * r + 1], *own = out + 4 * r;
            float top = largest(z, count), scale = temperature ? (float)(1 / temperature) : 1.0f;
            memset(own, 0, 4 * sizeof(double));
            if (!before || top != top) continue;
            own[3] = 1;
            int64_t token = 0;
            double total = 0;
            if (temperature || rows[3 * r + 2]) total = sums(z, count, top, scale, before);
            if (temperature) {
                double most = nextafter(total, 0), wanted = uniform * total;
                token = drawn(z, count, top, scale, before, wanted < most ? wanted : most);
            } else token = first_of(z, count, top);
            own[0] = (double)token;
            if (!rows[3 * r + 2]) continue;
            float x = wide(z[token]) - top;
            own[1] = (double)(x * scale) - log(total);
            own[2] = scale == 1.0f ? own[1] : (double)x - log(sums(z, count, top, 1.0f, 0));
        }
        free(before);
    }
    return failed;
}
