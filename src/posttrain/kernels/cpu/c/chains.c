/* Chains of small operations in one pass each way: norms, rotations, gates. */
#include "team.h"
#include "vectors.h"

/* y = x w / sqrt(mean x^2 + eps). */
void rms_norm_part(const bf16 *x, const float *weight, int64_t rows, int64_t width, float eps, bf16 *y) {
#pragma omp for schedule(static) nowait
    for (int64_t t = 0; t < rows; t++) {
        const bf16 *in = x + t * width;
        bf16 *out = y + t * width;
        float sum = 0.0f;
        for (int64_t d = 0; d < width; d++) sum += wide(in[d]) * wide(in[d]);
        float root = 1.0f / sqrtf(sum / (float)width + eps);
        for (int64_t d = 0; d < width; d++) out[d] = narrow(wide(in[d]) * root * weight[d]);
    }
}

void rms_norm(const bf16 *x, const float *weight, int64_t rows, int64_t width, float eps, bf16 *y) {
#pragma omp parallel if (rows * width > WORTH_THREADS)
    rms_norm_part(x, weight, rows, width, eps, y);
}

/* dx = r (g w - x r^2 mean(g w x)),  r = 1 / sqrt(mean x^2 + eps). */
void rms_norm_backward(
    const bf16 *x, const float *weight, const bf16 *grad, int64_t rows, int64_t width, float eps, bf16 *dx
) {
#pragma omp parallel for schedule(static) if (rows * width > WORTH_THREADS)
    for (int64_t t = 0; t < rows; t++) {
        const bf16 *in = x + t * width, *g = grad + t * width;
        bf16 *out = dx + t * width;
        float sum = 0.0f, along = 0.0f;
        for (int64_t d = 0; d < width; d++) {
            sum += wide(in[d]) * wide(in[d]);
            along += wide(g[d]) * weight[d] * wide(in[d]);
        }
        float root = 1.0f / sqrtf(sum / (float)width + eps);
        float back = root * root * along / (float)width;
        for (int64_t d = 0; d < width; d++) out[d] = narrow(root * (wide(g[d]) * weight[d] - wide(in[d]) * back));
    }
}

/* Sixteen bfloat16 as float32. */
ALWAYS vec widened(const bf16 *from) { return (vec)(load_halves(from) << 16); }

ALWAYS vec rounded_all(vec x) { return (vec)(narrowed(x) << 16); }

/* Heads [H, T, D], with strides, turned by cos and sin [T, D] into out [T, H, D]: x cos + (-x_2, x_1) sin. With `rounds` each
 * product is rounded, as the library's operations do. */
void rotate_part(
    const bf16 *x, int64_t x_head, int64_t x_token, const bf16 *cosine, const bf16 *sine, int64_t heads, int64_t tokens,
    int64_t width, int64_t rounds, bf16 *out
) {
    int64_t half = width / 2;
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < heads * tokens; i++) {
        int64_t token = i / heads, head = i % heads, d = 0;
        const bf16 *restrict in = x + head * x_head + token * x_token, *c = cosine + token * width, *s = sine + token * width;
        bf16 *restrict to = out + i * width;
        for (; d + LANES <= half; d += LANES) {
            vec left = widened(in + d), right = widened(in + d + half);
            vec a = left * widened(c + d), b = right * widened(s + d);
            vec e = right * widened(c + d + half), f = left * widened(s + d + half);
            store_halves(to + d, narrowed(rounds ? rounded_all(a) - rounded_all(b) : a - b));
            store_halves(to + d + half, narrowed(rounds ? rounded_all(e) + rounded_all(f) : e + f));
        }
        for (; d < half; d++) {
            float left = wide(in[d]), right = wide(in[d + half]);
            float a = left * wide(c[d]), b = right * wide(s[d]), e = right * wide(c[d + half]), f = left * wide(s[d + half]);
            to[d] = narrow(rounds ? rounded(a) - rounded(b) : a - b);
            to[d + half] = narrow(rounds ? rounded(e) + rounded(f) : e + f);
        }
    }
}

void rotate(
    const bf16 *x, int64_t x_head, int64_t x_token, const bf16 *cosine, const bf16 *sine, int64_t heads, int64_t tokens,
    int64_t width, int64_t rounds, bf16 *out
) {
#pragma omp parallel if (heads * tokens * width > WORTH_THREADS)
    rotate_part(x, x_head, x_token, cosine, sine, heads, tokens, width, rounds, out);
}

/* y = a + b. */
void add_part(const bf16 *a, const bf16 *b, int64_t count, bf16 *y) {
    int64_t whole = DOWN(count);
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < whole; i += LANES) store_halves(y + i, narrowed(widened(a + i) + widened(b + i)));
#pragma omp single nowait
    for (int64_t i = whole; i < count; i++) y[i] = narrow(wide(a[i]) + wide(b[i]));
}

/* 1 / (1 + e^-z); a gelu by its tanh form is x sigmoid(2 z). */
ALWAYS vec sigmoid(vec z) {
    vec e = exponentials(choose(z < 0.0f, z, -z));
    return choose(z < 0.0f, e, (vec){0} + 1.0f) / (e + 1.0f);
}

ALWAYS vec gate_of(vec x, int64_t gelu) { return sigmoid(gelu ? 1.59576912f * (x + 0.044715f * x * x * x) : x); }

ALWAYS void gate_sixteen(const bf16 *gate, const bf16 *up, int64_t gelu, bf16 *y) {
    vec x = widened(gate);
    store_halves(y, narrowed(rounded_all(x * gate_of(x, gelu)) * widened(up)));
}

ALWAYS void gate_sixteen_back(const bf16 *gate, const bf16 *up, const bf16 *grad, int64_t gelu, bf16 *d_gate, bf16 *d_up) {
    vec x = widened(gate), g = widened(grad), s = gate_of(x, gelu), slope = x * s * (1.0f - s);
    if (gelu) slope *= 1.59576912f * (1.0f + 0.134145f * x * x);
    store_halves(d_up, narrowed(g * x * s));
    store_halves(d_gate, narrowed(g * widened(up) * (s + slope)));
}

/* y = gate's activation times up: silu (gelu = 0), or gelu. */
void gated_part(const bf16 *gate, const bf16 *up, int64_t count, int64_t gelu, bf16 *y) {
    int64_t whole = DOWN(count), rest = count - whole;
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < whole; i += LANES) gate_sixteen(gate + i, up + i, gelu, y + i);
#pragma omp single nowait
    if (rest) {
        bf16 last[3][LANES] = {{0}};
        memcpy(last[0], gate + whole, rest * sizeof(bf16));
        memcpy(last[1], up + whole, rest * sizeof(bf16));
        gate_sixteen(last[0], last[1], gelu, last[2]);
        memcpy(y + whole, last[2], rest * sizeof(bf16));
    }
}

void gated(const bf16 *gate, const bf16 *up, int64_t count, int64_t gelu, bf16 *y) {
#pragma omp parallel if (count > WORTH_THREADS)
    gated_part(gate, up, count, gelu, y);
}

/* Gradients of both factors of `gated`. */
void gated_backward(
    const bf16 *gate, const bf16 *up, const bf16 *grad, int64_t count, int64_t gelu, bf16 *d_gate, bf16 *d_up
) {
    int64_t whole = DOWN(count), rest = count - whole;
#pragma omp parallel for schedule(static) if (count > WORTH_THREADS)
    for (int64_t i = 0; i < whole; i += LANES) gate_sixteen_back(gate + i, up + i, grad + i, gelu, d_gate + i, d_up + i);
    bf16 last[5][LANES] = {{0}};
    memcpy(last[0], gate + whole, rest * sizeof(bf16));
    memcpy(last[1], up + whole, rest * sizeof(bf16));
    memcpy(last[2], grad + whole, rest * sizeof(bf16));
    gate_sixteen_back(last[0], last[1], last[2], gelu, last[3], last[4]);
    memcpy(d_gate + whole, last[3], rest * sizeof(bf16));
    memcpy(d_up + whole, last[4], rest * sizeof(bf16));
}
