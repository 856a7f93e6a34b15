/* What a decoding step does beside its large products, for a few rows on a CPU in bfloat16: compiled where it runs, by
 * models/compiled.py, which says what each function computes. Sums are float32. A row's result does not depend on the others.
 * What the library's operations would store between them is rounded as they would, so that the policy that samples is the one
 * that is trained.
 *
 * The loops are written so that a compiler turns them into vector instructions; there are no intrinsics.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef uint16_t bf16;

/* Below so many numbers a second thread costs more than it saves. */
#define WORTH_THREADS 16384
/* Rows that one pass over a matrix serves. */
#define TOGETHER 4
/* Outputs, and columns, of one piece of work. */
#define PIECE 64
#define COLUMNS 8

static inline float wide(bf16 x) {
    union { uint32_t u; float f; } v = {(uint32_t)x << 16};
    return v.f;
}

/* To the nearest, ties to even; what is no number stays none. */
static inline bf16 narrow(float x) {
    union { float f; uint32_t u; } v = {x};
    uint32_t rounded = (v.u + 0x7fff + ((v.u >> 16) & 1)) >> 16;
    return (bf16)(x == x ? rounded : (v.u >> 16) | 0x40);
}

static inline float rounded(float x) { return wide(narrow(x)); }

/* e^x for x <= 0 to 2e-7: 2^n (1 + r + r^2/2 + ...), |r| <= ln 2 / 2. */
static inline float exponential(float x) {
    float bounded = x < -87.0f ? -87.0f : x;
    float n = (float)(int)(bounded * 1.44269504f - 0.5f);
    float r = bounded - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.0f + r * (1.0f + r * (0.5f + r * (1.66666672e-1f + r * (4.16664853e-2f + r * (8.3333610e-3f + r * 1.3981999e-3f)))));
    union { uint32_t u; float f; } power = {(uint32_t)((int)n + 127) << 23};
    return p * power.f;
}

static inline float dot(const bf16 *restrict a, const float *restrict b, int n) {
    float sum = 0.0f;
    for (int i = 0; i < n; i++) sum += wide(a[i]) * b[i];
    return sum;
}

/* In the order that compiled.attend gives them. Strides are in numbers. */
struct attention {
    int64_t rows, kv_heads, groups, width, block, places, window;
    int64_t q_head, q_token, k_head, k_token, v_head, v_token;
};

/* One head of keys and values for one row: its G queries over tokens [first, length]. */
static void attend_one(
    const struct attention *s, const bf16 *q, const bf16 *keys, const bf16 *values, int64_t place, int64_t head,
    int64_t length, float scale, float *work, bf16 *out
) {
    int64_t G = s->groups, D = s->width, B = s->block, first = 0;
    if (s->window && length + 1 > s->window) first = length + 1 - s->window;
    int64_t seen = length + 1 - first;
    float *queries = work, *sums = work + G * D, *weights = work + 2 * G * D;
    for (int64_t g = 0; g < G; g++)
        for (int64_t d = 0; d < D; d++) queries[g * D + d] = wide(q[g * s->q_head + d]);
    memset(sums, 0, G * D * sizeof(float));
    for (int64_t i = 0; i < seen; i++) {
        int64_t at = first + i;
        const bf16 *key = keys + (((at / B) * s->places + place) * s->kv_heads + head) * B * D + (at % B) * D;
        for (int64_t g = 0; g < G; g++) weights[g * seen + i] = rounded(dot(key, queries + g * D, D) * scale);
    }
    for (int64_t g = 0; g < G; g++) {
        float *w = weights + g * seen, most = w[0], total = 0.0f;
        for (int64_t i = 1; i < seen; i++) most = w[i] > most ? w[i] : most;
        for (int64_t i = 0; i < seen; i++) w[i] = exponential(w[i] - most);
        for (int64_t i = 0; i < seen; i++) total += w[i];
        float share = 1.0f / total;
        for (int64_t i = 0; i < seen; i++) w[i] = rounded(w[i] * share);
    }
    for (int64_t i = 0; i < seen; i++) {
        int64_t at = first + i;
        const bf16 *value = values + (((at / B) * s->places + place) * s->kv_heads + head) * B * D + (at % B) * D;
        for (int64_t g = 0; g < G; g++) {
            float w = weights[g * seen + i], *sum = sums + g * D;
            for (int64_t d = 0; d < D; d++) sum[d] += w * wide(value[d]);
        }
    }
    for (int64_t i = 0; i < G * D; i++) out[i] = narrow(sums[i]);
}

/* Returns 0, or 1 where there is no memory. */
int attend(
    const struct attention *s, const bf16 *q, const bf16 *k, const bf16 *v, bf16 *keys, bf16 *values,
    const int64_t *place_N, const int64_t *length_N, const int64_t *token_N, float scale, bf16 *out
) {
    int64_t most = 0, total = 0, D = s->width, G = s->groups, K = s->kv_heads, B = s->block;
    for (int64_t n = 0; n < s->rows; n++) {
        total += length_N[n];
        if (length_N[n] > most) most = length_N[n];
    }
    int failed = 0;
#pragma omp parallel if (total * K * D > WORTH_THREADS)
    {
        float *work = malloc((2 * G * D + G * (most + 1)) * sizeof(float));
        if (!work) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic, 2)
        for (int64_t i = 0; i < s->rows * K; i++) {
            int64_t n = i / K, head = i % K, place = place_N[n], length = length_N[n], token = token_N[n];
            int64_t at = (((length / B) * s->places + place) * K + head) * B * D + (length % B) * D;
            memcpy(keys + at, k + head * s->k_head + token * s->k_token, D * sizeof(bf16));
            memcpy(values + at, v + head * s->v_head + token * s->v_token, D * sizeof(bf16));
            if (work)
                attend_one(s, q + head * G * s->q_head + token * s->q_token, keys, values, place, head, length, scale, work,
                           out + (token * K + head) * G * D);
        }
        free(work);
    }
    return failed;
}

/* sums[t] = w . x_t for `count` rows of n numbers, w read and widened once. With a constant count they stay in registers. */
static inline __attribute__((always_inline)) void dots(
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
int project(
    const bf16 *x, const bf16 *a, const int64_t *order, const int64_t *start, int64_t slots, int64_t columns, int64_t inputs,
    float *p
) {
    int64_t chunks = (columns + COLUMNS - 1) / COLUMNS;
    int failed = 0;
#pragma omp parallel if (start[slots] * columns * inputs > WORTH_THREADS)
    {
        float *rows = malloc(TOGETHER * inputs * sizeof(float));
        if (!rows) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic, 1)
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
        free(rows);
    }
    return failed;
}

/* y_t[o] += sum over r of p_t[r] b[r][o] for `tokens` tokens and `count` outputs from o0 on. */
static inline __attribute__((always_inline)) void add_piece(
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
void expand(
    const float *p, const bf16 *b, const int64_t *order, const int64_t *start, int64_t slots, int64_t columns, int64_t rank,
    int64_t outputs, bf16 *y
) {
    int64_t pieces = (outputs + PIECE - 1) / PIECE;
#pragma omp parallel for schedule(dynamic, 4) if (start[slots] * rank * outputs > WORTH_THREADS)
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

/* y[t, o] = weight[o] . x[t] (+ bias[o]) of at most TOGETHER rows: each weight is read once. Returns 0, or 1 where there is no
 * memory. */
int multiply(const bf16 *x, const bf16 *weight, const bf16 *bias, int64_t rows, int64_t inputs, int64_t outputs, bf16 *y) {
    float *widened = malloc(rows * inputs * sizeof(float));
    if (!widened) return 1;
    for (int64_t i = 0; i < rows * inputs; i++) widened[i] = wide(x[i]);
#pragma omp parallel for schedule(static) if (inputs * outputs > WORTH_THREADS)
    for (int64_t o = 0; o < outputs; o++) {
        float sums[TOGETHER], added = bias ? wide(bias[o]) : 0.0f;
        dots_of(weight + o * inputs, widened, (int)rows, inputs, sums);
        for (int64_t t = 0; t < rows; t++) y[t * outputs + o] = narrow(sums[t] + added);
    }
    free(widened);
    return 0;
}

/* y = x w / sqrt(mean x^2 + eps). */
void rms_norm(const bf16 *x, const float *weight, int64_t rows, int64_t width, float eps, bf16 *y) {
#pragma omp parallel for schedule(static) if (rows * width > WORTH_THREADS)
    for (int64_t t = 0; t < rows; t++) {
        const bf16 *in = x + t * width;
        bf16 *out = y + t * width;
        float sum = 0.0f;
        for (int64_t d = 0; d < width; d++) sum += wide(in[d]) * wide(in[d]);
        float root = 1.0f / sqrtf(sum / (float)width + eps);
        for (int64_t d = 0; d < width; d++) out[d] = narrow(wide(in[d]) * root * weight[d]);
    }
}

/* Heads [H, T, D], with strides, turned by cos and sin [T, D] into out [H, T, D]: x cos + (-x_2, x_1) sin. */
void rotate(
    const bf16 *x, int64_t x_head, int64_t x_token, const bf16 *cosine, const bf16 *sine, int64_t heads, int64_t tokens,
    int64_t width, bf16 *out
) {
    int64_t half = width / 2;
#pragma omp parallel for schedule(static) if (heads * tokens * width > WORTH_THREADS)
    for (int64_t i = 0; i < heads * tokens; i++) {
        int64_t head = i / tokens, token = i % tokens;
        const bf16 *restrict in = x + head * x_head + token * x_token, *c = cosine + token * width, *s = sine + token * width;
        bf16 *restrict to = out + i * width;
        for (int64_t d = 0; d < half; d++) {
            to[d] = narrow(rounded(wide(in[d]) * wide(c[d])) - rounded(wide(in[d + half]) * wide(s[d])));
            to[d + half] = narrow(rounded(wide(in[d + half]) * wide(c[d + half])) + rounded(wide(in[d]) * wide(s[d + half])));
        }
    }
}

/* y = gate's activation times up: silu (gelu = 0), or gelu by its tanh form, which is x sigmoid(2 z). */
void gated(const bf16 *gate, const bf16 *up, int64_t count, int64_t gelu, bf16 *y) {
#pragma omp parallel for schedule(static) if (count > WORTH_THREADS)
    for (int64_t i = 0; i < count; i++) {
        float x = wide(gate[i]);
        float z = gelu ? 1.59576912f * (x + 0.044715f * x * x * x) : x;
        float e = exponential(z < 0.0f ? z : -z);
        y[i] = narrow(rounded(x * (z < 0.0f ? e : 1.0f) / (1.0f + e)) * wide(up[i]));
    }
}
