/* Sixteen numbers at once, by the vector types that gcc and clang share, and products of pairs of bfloat16, which have an
 * instruction of their own. A sum runs over pairs of numbers in their order: the same in every function, to the bit.
 */
#ifndef POSTTRAIN_VECTORS
#define POSTTRAIN_VECTORS

#include "common.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define LANES 16
#define UP(n) (((n) + LANES - 1) / LANES * LANES)
#define DOWN(n) ((n) / LANES * LANES)

typedef float vec __attribute__((vector_size(64)));
typedef int32_t ints __attribute__((vector_size(64)));
typedef uint32_t words __attribute__((vector_size(64)));
typedef uint16_t halves __attribute__((vector_size(32)));

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define MIX(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#endif
#endif
#ifndef MIX
#define MIX(a, b, ...) __builtin_shuffle(a, b, (ints){__VA_ARGS__})
#endif

ALWAYS vec load(const float *from) {
    vec x;
    memcpy(&x, from, sizeof x);
    return x;
}

ALWAYS words load_words(const uint32_t *from) {
    words x;
    memcpy(&x, from, sizeof x);
    return x;
}

/* Sixteen bfloat16, each the lower half of a word. */
ALWAYS words load_halves(const bf16 *from) {
    halves x;
    memcpy(&x, from, sizeof x);
    return __builtin_convertvector(x, words);
}

ALWAYS void store(float *to, vec x) { memcpy(to, &x, sizeof x); }
ALWAYS void store_words(uint32_t *to, words x) { memcpy(to, &x, sizeof x); }

ALWAYS void store_halves(bf16 *to, words x) {
    halves h = __builtin_convertvector(x, halves);
    memcpy(to, &h, sizeof h);
}

/* `narrow` of each, in the lower half of a word. */
ALWAYS words narrowed(vec x) {
    words u = (words)x, number = (words)(x == x), rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    return (rounded & number) | ((u >> 16 | 0x40) & ~number);
}

ALWAYS vec choose(ints yes, vec a, vec b) { return (vec)((yes & (ints)a) | (~yes & (ints)b)); }

/* A bit for each lane that holds. */
ALWAYS uint32_t lanes_of(ints yes) {
#ifdef __AVX512F__
    return _mm512_test_epi32_mask((__m512i)yes, (__m512i)yes);
#else
    uint32_t found = 0;
    for (int n = 0; n < LANES; n++) found |= (uint32_t)(yes[n] != 0) << n;
    return found;
#endif
}

/* e^x of each x <= 0 to 2e-7: 2^n (1 + r + r^2/2 + ...), |r| <= ln 2 / 2. */
ALWAYS vec exponentials(vec x) {
    vec bounded = choose(x < -87.0f, (vec){0} - 87.0f, x);
    ints whole = __builtin_convertvector(bounded * 1.44269504f - 0.5f, ints);
    vec n = __builtin_convertvector(whole, vec);
    vec r = bounded - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = r * 1.3981999e-3f + 8.3333610e-3f;
    p = p * r + 4.16664853e-2f;
    p = p * r + 1.66666672e-1f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return p * (vec)((words)(whole + 127) << 23);
}

/* The sum of all lanes. */
ALWAYS float sum_of(vec x) {
    float lane[LANES];
    store(lane, x);
    for (int n = LANES / 2; n; n /= 2)
        for (int i = 0; i < n; i++) lane[i] += lane[i + n];
    return lane[0];
}

/* Sixteen rows of `width` words that lie one after the other become columns: to[w] has word w of each, and lies `across` behind
 * to[w - 1]. */
ALWAYS void turn(const uint32_t *rows, int64_t width, uint32_t *to, int64_t across) {
    for (int64_t w = 0; w < width; w += LANES) {
        int64_t wanted = width - w < LANES ? width - w : LANES;
        words a[LANES], b[LANES];
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) {
            if (wanted == LANES) a[i] = load_words(rows + i * width + w);
            else {
                a[i] = (words){0};
                memcpy(&a[i], rows + i * width + w, wanted * sizeof(uint32_t));
            }
        }
#pragma GCC unroll 4
        for (int round = 0; round < 4; round++) {
#pragma GCC unroll 8
            for (int i = 0; i < LANES / 2; i++) {
                b[2 * i] = MIX(a[i], a[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
                b[2 * i + 1] = MIX(a[i], a[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
            }
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++) a[i] = b[i];
        }
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++)
            if (i < wanted) store_words(to + (w + i) * across, a[i]);
    }
}

/* Words of which the lower half is from one row and the upper one from another. */
ALWAYS void pair_rows(const bf16 *lower, const bf16 *upper, int64_t width, uint32_t *to) {
    for (int64_t i = 0; i < width; i += LANES) store_words(to + i, load_halves(lower + i) | load_halves(upper + i) << 16);
}

#endif
