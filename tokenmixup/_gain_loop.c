/* The gain matrix of Horizontal TokenMixup in one pass over its operands, without temporaries.
 *
 *     gain[r][c] = sum_t max(columns[c][t] - rows[r][t] - rho, 0)
 *
 * Dimensions: R rows (samples that gain), C columns (samples that give), T patch tokens.
 * The plain twin is `_plain` in _gain.py, and a test holds them together.
 */

#include <stddef.h>

enum {
    LANES = 16, /* partial sums side by side: one vector register of 512 bits, two of 256 */
    ROWS = 4    /* rows side by side, so that a column is read once for all of them */
};

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
/* compiled for each of these, and chosen when the library is loaded */
#define FOR_EVERY_PROCESSOR __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_EVERY_PROCESSOR
#endif

/* In this order of the operands a NaN stays one, and is found where the gains are read. */
static inline float positive(float difference) { return 0 > difference ? 0 : difference; }

/* Written out row by row: so compilers keep the four partial sums in registers. */
static inline void four_rows(const float *restrict row, const float *restrict column, float rho,
                             ptrdiff_t tokens, ptrdiff_t stride, float *restrict gain) {
    const float *row0 = row, *row1 = row0 + tokens, *row2 = row1 + tokens, *row3 = row2 + tokens;
    float lanes0[LANES] = {0}, lanes1[LANES] = {0}, lanes2[LANES] = {0}, lanes3[LANES] = {0};
    float sum0 = 0, sum1 = 0, sum2 = 0, sum3 = 0;
    ptrdiff_t t = 0;
    for (; t + LANES <= tokens; t += LANES)
        for (int lane = 0; lane < LANES; lane++) {
            float value = column[t + lane];
            lanes0[lane] += positive(value - row0[t + lane] - rho);
            lanes1[lane] += positive(value - row1[t + lane] - rho);
            lanes2[lane] += positive(value - row2[t + lane] - rho);
            lanes3[lane] += positive(value - row3[t + lane] - rho);
        }
    for (int lane = 0; lane < LANES; lane++) {
        sum0 += lanes0[lane];
        sum1 += lanes1[lane];
        sum2 += lanes2[lane];
        sum3 += lanes3[lane];
    }
    for (; t < tokens; t++) {
        sum0 += positive(column[t] - row0[t] - rho);
        sum1 += positive(column[t] - row1[t] - rho);
        sum2 += positive(column[t] - row2[t] - rho);
        sum3 += positive(column[t] - row3[t] - rho);
    }
    gain[0] = sum0;
    gain[stride] = sum1;
    gain[2 * stride] = sum2;
    gain[3 * stride] = sum3;
}

static inline float one_row(const float *restrict row, const float *restrict column, float rho,
                            ptrdiff_t tokens) {
    float sum = 0;
    for (ptrdiff_t t = 0; t < tokens; t++) sum += positive(column[t] - row[t] - rho);
    return sum;
}

FOR_EVERY_PROCESSOR
static void gain_of_rows(const float *rows, const float *columns, float rho, ptrdiff_t num_rows,
                         ptrdiff_t num_columns, ptrdiff_t num_tokens, float *gain) {
    for (ptrdiff_t c = 0; c < num_columns; c++, columns += num_tokens, gain++)
        if (num_rows == ROWS)
            four_rows(rows, columns, rho, num_tokens, num_columns, gain);
        else
            for (ptrdiff_t r = 0; r < num_rows; r++)
                gain[r * num_columns] = one_row(rows + r * num_tokens, columns, rho, num_tokens);
}

/* All arrays are row-major and without gaps; `gain` is (R, C).
 *
 * OpenMP's threads, because they are torch's own, which uses the same library: others would compete
 * for the processor with those, which go on spinning for a while after each of torch's operations. */
void tokenmixup_gain(const float *rows, const float *columns, float rho, ptrdiff_t num_rows,
                     ptrdiff_t num_columns, ptrdiff_t num_tokens, int threads, float *gain) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (ptrdiff_t r = 0; r < num_rows; r += ROWS)
        gain_of_rows(rows + r * num_tokens, columns, rho, num_rows - r < ROWS ? num_rows - r : ROWS,
                     num_columns, num_tokens, gain + r * num_columns);
}
