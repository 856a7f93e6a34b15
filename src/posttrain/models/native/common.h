/* Numbers in bfloat16, and vectors of sixteen float32. models/compiled.py says what each function of this folder computes.
 *
 * A row's result depends on nothing but the row: not on how many others there are, nor on what is computed together. So the
 * policy that samples, a token at a time, is the one that is trained, on whole packed batches.
 */
#ifndef POSTTRAIN_COMMON
#define POSTTRAIN_COMMON

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef uint16_t bf16;

/* Below so many numbers a second thread costs more than it saves. */
#define WORTH_THREADS 16384
#define ALWAYS static inline __attribute__((always_inline))

ALWAYS float wide(bf16 x) {
    union { uint32_t u; float f; } v = {(uint32_t)x << 16};
    return v.f;
}

/* To the nearest, ties to even; what is no number stays none. */
ALWAYS bf16 narrow(float x) {
    union { float f; uint32_t u; } v = {x};
    uint32_t rounded = (v.u + 0x7fff + ((v.u >> 16) & 1)) >> 16;
    return (bf16)(x == x ? rounded : (v.u >> 16) | 0x40);
}

ALWAYS float rounded(float x) { return wide(narrow(x)); }

/* e^x for x <= 0 to 2e-7: 2^n (1 + r + r^2/2 + ...), |r| <= ln 2 / 2. */
ALWAYS float exponential(float x) {
    float bounded = x < -87.0f ? -87.0f : x;
    float n = (float)(int)(bounded * 1.44269504f - 0.5f);
    float r = bounded - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.0f + r * (1.0f + r * (0.5f + r * (1.66666672e-1f + r * (4.16664853e-2f + r * (8.3333610e-3f + r * 1.3981999e-3f)))));
    union { uint32_t u; float f; } power = {(uint32_t)((int)n + 127) << 23};
    return p * power.f;
}

#endif
