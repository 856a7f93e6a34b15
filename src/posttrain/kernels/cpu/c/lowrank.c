/* Low-rank products of many adapters, and products of one or two rows, which read each weight once. */
#include "team.h"

/* Rows that one pass over a matrix serves. */
#define TOGETHER 4
/* Outputs, and columns, of one piece of work. */
#define PIECE 64
#define COLUMNS 8

/* sums[t] = w . x_t for `count` rows of n numbers, w read and widened once. With a constant count they stay in registers. */
ALWAYS void dots(
    const bf16 *restrict w, const float *restrict x, const int count, int64_t n, float *restrict sums
) {
    float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
    for (int64_t d = 0; d < n; d++) {
        float own = wide(w[d]);
        s0 += own * x[d];
        if (count > 1) s1 += own * x[n + d];
        if (count > 2) s2 += own * x[2 * n + d];
        if (count > 3) s3 += own * x[3 * n + d];
    }
    const float found[TOGETHER] = {s0, s1, s2, s3};
    for (int t = 0; t < count; t++) sums[t] = found[t];
}

static void dots_of(const bf16 *w, const float *x, int count, int64_t n, float *sums) {
    if (count == 1) dots(w, x, 1, n, sums);
    else if (count == 2) dots(w, x, 2, n, sums);
    else if (count == 3) dots(w, x, 3, n, sums);
    else dots(w, x, 4, n, sums);
}

/* p[t, c] = a[slot of t, c] . x[t], rounded as a product in bfloat16 is. `order` lists the tokens of slot s at
 * [start[s], start[s + 1]). Returns 0, or 1 where there is no memory. */
int project_part(
    const bf16 *x, const bf16 *a, const int64_t *order, const int64_t *start, int64_t slots, int64_t columns, int64_t inputs,
    float *p
) {
    int64_t chunks = (columns + COLUMNS - 1) / COLUMNS;
    float *rows = malloc(TOGETHER * inputs * sizeof(float));
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t i = 0; i < slots * chunks; i++) {
        int64_t slot = i / chunks, c0 = i % chunks * COLUMNS, c1 = c0 + COLUMNS < columns ? c0 + COLUMNS : columns;
        for (int64_t t = start[slot]; rows && t < start[slot + 1]; t += TOGETHER) {
            int count = (int)(start[slot + 1] - t < TOGETHER ? start[slot + 1] - t : TOGETHER);
            for (int j = 0; j < count; j++)
                for (int64_t d = 0; d < inputs; d++) rows[j * inputs + d] = wide(x[order[t + j] * inputs + d]);
            for (int64_t c = c0; c < c1; c++) {
                float sums[TOGETHER];
                dots_of(a + (slot * columns + c) * inputs, rows, count, inputs, sums);
                for (int j = 0; j < count; j++) p[order[t + j] * columns + c] = rounded(sums[j]);
            }
        }
    }
    int failed = !rows;
    free(rows);
    return failed;
}

int project(
    const bf16 *x, const bf16 *a, const int64_t *order, const int64_t *start, int64_t slots, int64_t columns, int64_t inputs,
    float *p
) {
    int failed = 0;
#pragma omp parallel reduction(| : failed) if (start[slots] * columns * inputs > WORTH_THREADS)
    failed |= project_part(x, a, order, start, slots, columns, inputs, p);
    return failed;
}

/* y_t[o] += sum over r of p_t[r] b[r][o] for `tokens` tokens and `count` outputs from o0 on. */
ALWAYS void add_piece(
    const float *p, const bf16 *b, const int64_t *order, const int tokens, int64_t columns, int64_t rank, int64_t outputs,
    int64_t o0, const int64_t count, bf16 *y
) {
    float sums[TOGETHER][PIECE] = {{0}};
    for (int64_t r = 0; r < rank; r++) {
        const bf16 *restrict row = b + r * outputs + o0;
        float own[TOGETHER];
        for (int j = 0; j < tokens; j++) own[j] = p[order[j] * columns + r];
        for (int64_t o = 0; o < count; o++) {
            float w = wide(row[o]);
            for (int j = 0; j < tokens; j++) sums[j][o] += own[j] * w;
        }
    }
    for (int j = 0; j < tokens; j++) {
        bf16 *to = y + order[j] * outputs + o0;
        for (int64_t o = 0; o < count; o++) to[o] = narrow(wide(to[o]) + sums[j][o]);
    }
}

/* y[t] += sum over r of p[t, r] b[slot of t, r]. p has `columns` a token, of which these are `rank` from its beginning on. */
void expand_part(
    const float *p, const bf16 *b, const int64_t *order, const int64_t *start, int64_t slots, int64_t columns, int64_t rank,
    int64_t outputs, bf16 *y
) {
    int64_t pieces = (outputs + PIECE - 1) / PIECE;
#pragma omp for schedule(dynamic, 4) nowait
    for (int64_t i = 0; i < slots * pieces; i++) {
        int64_t slot = i / pieces, o0 = i % pieces * PIECE, count = outputs - o0 < PIECE ? outputs - o0 : PIECE;
        const bf16 *own = b + slot * rank * outputs;
        int64_t t = start[slot], end = start[slot + 1];
        if (count == PIECE)
            for (; t + TOGETHER <= end; t += TOGETHER)
                add_piece(p, own, order + t, TOGETHER, columns, rank, outputs, o0, PIECE, y);
        for (; t < end; t++)
            if (count == PIECE) add_piece(p, own, order + t, 1, columns, rank, outputs, o0, PIECE, y);
            else add_piece(p, own, order + t, 1, columns, rank, outputs, o0, count, y);
    }
}

void expand(
    const float *p, const bf16 *b, const int64_t *order, const int64_t *start, int64_t slots, int64_t columns, int64_t rank,
    int64_t outputs, bf16 *y
) {
#pragma omp parallel if (start[slots] * rank * outputs > WORTH_THREADS)
    expand_part(p, b, order, start, slots, columns, rank, outputs, y);
}

/* y[t, o] = weight[o] . x[t] (+ bias[o]) of at most TOGETHER rows: each weight is read once. Returns 0, or 1 where there is no
 * memory. */
int multiply_part(
    const bf16 *x, const bf16 *weight, const bf16 *bias, int64_t rows, int64_t inputs, int64_t outputs, bf16 *y
) {
    float *widened = malloc(rows * inputs * sizeof(float));
    for (int64_t i = 0; widened && i < rows * inputs; i++) widened[i] = wide(x[i]);
#pragma omp for schedule(static) nowait
    for (int64_t o = 0; o < outputs; o++) {
        if (!widened) continue;
        float sums[TOGETHER], added = bias ? wide(bias[o]) : 0.0f;
        dots_of(weight + o * inputs, widened, (int)rows, inputs, sums);
        for (int64_t t = 0; t < rows; t++) y[t * outputs + o] = narrow(sums[t] + added);
    }
    int failed = !widened;
    free(widened);
    return failed;
}

int multiply(const bf16 *x, const bf16 *weight, const bf16 *bias, int64_t rows, int64_t inputs, int64_t outputs, bf16 *y) {
    int failed = 0;
#pragma omp parallel reduction(| : failed) if (inputs * outputs > WORTH_THREADS)
    failed |= multiply_part(x, weight, bias, rows, inputs, outputs, y);
    return failed;
}
