/* Numbers in bfloat16, and vectors of sixteen float32. kernels/cpu/bindings.py says what each function of this folder computes.
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

#endif
