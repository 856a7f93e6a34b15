/* Adapters in float32, copied in bfloat16 to where they stand side by side. */
#include "common.h"

/* numbers [rows, columns] times scale, to [rows, stride]: the first of each row's `room`, zeros behind. Their sum. */
static double copy(const float *from, int64_t rows, int64_t columns, float scale, bf16 *to, int64_t room, int64_t stride) {
    double total = 0;
    for (int64_t row = 0; row < rows; row++, from += columns, to += stride) {
        float sum = 0;
        for (int64_t n = 0; n < columns; n++) {
            sum += from[n] * scale;
            to[n] = narrow(from[n] * scale);
        }
        memset(to + columns, 0, (room - columns) * sizeof(bf16));
        total += sum;
    }
    return total;
}

/* A [r, inputs] and B [outputs, r] of each layer, four addresses (from, to), and its r, R, inputs, outputs and the stride of
 * B's rows where it goes. Whether their sum is a number. */
int fill_slot(int64_t layers, void *const (*at)[4], const int64_t (*sizes)[5], float scale) {
    double total = 0;
#pragma omp parallel for schedule(dynamic) reduction(+ : total)
    for (int64_t layer = 0; layer < layers; layer++) {
        void *const *own = at[layer];
        int64_t rank = sizes[layer][0], room = sizes[layer][1], inputs = sizes[layer][2], outputs = sizes[layer][3];
        total += copy(own[0], rank, inputs, 1, own[1], inputs, inputs);
        memset((bf16 *)own[1] + rank * inputs, 0, (room - rank) * inputs * sizeof(bf16));
        total += copy(own[2], outputs, rank, scale, own[3], room, sizes[layer][4]);
    }
    return isfinite(total);
}
