/* The next token of each row: the likeliest, or where a number falls in the cumulative distribution of
 * softmax(z / temperature). Weights are summed in pieces of the vocabulary; a draw finds its piece, and then its token inside. */
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

/* One row: see choose_tokens. The tokens that may not come are taken out of z, and put back. */
static void choose_one(
    bf16 *z, int64_t count, const double *row, const int64_t *without, int64_t withouts, bf16 *kept, double *before, double *out
) {
    double uniform = row[0], temperature = row[1], own = 0, total = 0;
    int told = row[2] != 0;
    float first = largest(z, count), top = first, scale = temperature ? (float)(1 / temperature) : 1.0f;
    int64_t token = 0;
    memset(out, 0, 4 * sizeof(double));
    if (first != first) return;
    if (told && (withouts || scale != 1.0f)) own = log(sums(z, count, first, 1.0f, 0));
    for (int64_t i = 0; i < withouts; i++) kept[i] = z[without[i]];
    for (int64_t i = 0; i < withouts; i++) z[without[i]] = 0xff80;
    if (withouts) top = largest(z, count);
    if (top == top) {
        out[3] = 1;
        if (temperature || told) total = sums(z, count, top, scale, before);
        if (temperature) {
            double most = nextafter(total, 0), wanted = uniform * total;
            token = drawn(z, count, top, scale, before, wanted < most ? wanted : most);
        } else token = first_of(z, count, top);
        out[0] = (double)token;
        if (told) {
            out[1] = (double)((wide(z[token]) - top) * scale) - log(total);
            out[2] = withouts || scale != 1.0f ? (double)(wide(z[token]) - first) - own : out[1];
        }
    }
    for (int64_t i = withouts - 1; i >= 0; i--) z[without[i]] = kept[i];
}

/* rows [R, 3]: a number in [0, 1), the temperature (0: the likeliest), whether log-probabilities are wanted. Tokens
 * without[start[r] .. start[r + 1]) may not come in row r; there are at most `most` of them. out [R, 4]: token, its
 * log-probability under what was sampled from and under the model's own distribution, whether the logits are numbers. */
int choose_tokens(
    bf16 *logits, int64_t count_R, int64_t count, int64_t along, const double *rows, const int64_t *start,
    const int64_t *without, int64_t most, double *out
) {
    int failed = 0;
#pragma omp parallel reduction(| : failed) if (count_R * count > WORTH_THREADS)
    {
        double *before = malloc((count / PIECE + 1) * sizeof(double));
        bf16 *kept = malloc((most + 1) * sizeof(bf16));
        failed |= !before || !kept;
#pragma omp for schedule(dynamic, 1)
        for (int64_t r = 0; r < count_R; r++) {
            const int64_t *own = without + start[r], withouts = start[r + 1] - start[r];
            if (before && kept)
                choose_one(logits + r * along, count, rows + 3 * r, own, withouts, kept, before, out + 4 * r);
        }
        free(before);
        free(kept);
    }
    return failed;
}
