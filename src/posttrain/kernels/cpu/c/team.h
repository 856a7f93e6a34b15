/* What the threads of one parallel region compute together: each takes a part, and none waits for the others at the end. All
 * threads of the region must call them in the same order. */
#ifndef POSTTRAIN_TEAM
#define POSTTRAIN_TEAM

#include "common.h"

#ifdef _OPENMP
#include <omp.h>
#define TEAM omp_get_num_threads()
#else
#define TEAM 1
#endif

struct cache;

void rms_norm_part(const bf16 *x, const float *weight, int64_t rows, int64_t width, float eps, bf16 *y);
void rotate_part(
    const bf16 *x, int64_t x_head, int64_t x_token, const bf16 *cosine, const bf16 *sine, int64_t heads, int64_t tokens,
    int64_t width, int64_t rounds, bf16 *out
);
void gated_part(const bf16 *gate, const bf16 *up, int64_t count, int64_t gelu, bf16 *y);
void add_part(const bf16 *a, const bf16 *b, int64_t count, bf16 *y);
int attend_part(
    const struct cache *s, const bf16 *q, const bf16 *k, const bf16 *v, bf16 *keys, bf16 *values, const int64_t *place_N,
    const int64_t *length_N, const int64_t *token_N, float scale, bf16 *out
);
int multiply_part(
    const bf16 *x, const bf16 *weight, const bf16 *bias, int64_t rows, int64_t inputs, int64_t outputs, bf16 *y
);
int project_part(
    const bf16 *x, const bf16 *a, const int64_t *order, const int64_t *start, int64_t slots, int64_t columns, int64_t inputs,
    float *p
);
void expand_part(
    const float *p, const bf16 *b, const int64_t *order, const int64_t *start, int64_t slots, int64_t columns, int64_t rank,
    int64_t outputs, bf16 *y
);

#endif
