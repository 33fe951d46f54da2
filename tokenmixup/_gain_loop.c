/* The gain matrix of Horizontal TokenMixup in one pass over its operands, without temporaries.
 *
 *     gain[r][c] = sum_t max(columns[c][t] - rows[r][t] - rho, 0)
 *
 * Dimensions: R rows (samples that gain), C columns (samples that give), T patch tokens.
 * The plain twin is `_plain` in _gain.py, and a test holds them together.
 */

#include <pthread.h>
#include <stddef.h>

enum {
    LANES = 16, /* partial sums side by side: one vector register of 512 bits, two of 256 */
    MAX_THREADS = 64
};

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
/* compiled for each of these, and chosen when the library is loaded */
#define FOR_EVERY_PROCESSOR __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_EVERY_PROCESSOR
#endif

struct task {
    const float *rows, *columns;
    float rho;
    ptrdiff_t first, last, num_columns, num_tokens;
    float *gain;
};

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
static void compute(const struct task *task) {
    const ptrdiff_t tokens = task->num_tokens, stride = task->num_columns;
    ptrdiff_t r = task->first;
    for (; r + 4 <= task->last; r += 4)
        for (ptrdiff_t c = 0; c < stride; c++)
            four_rows(task->rows + r * tokens, task->columns + c * tokens, task->rho, tokens,
                      stride, task->gain + r * stride + c);
    for (; r < task->last; r++) /* at most three a thread */
        for (ptrdiff_t c = 0; c < stride; c++)
            task->gain[r * stride + c] =
                one_row(task->rows + r * tokens, task->columns + c * tokens, task->rho, tokens);
}

static void *run(void *task) {
    compute(task);
    return NULL;
}

/* All arrays are row-major and without gaps; `gain` is (R, C). Computes on up to `threads` threads. */
void tokenmixup_gain(const float *rows, const float *columns, float rho, ptrdiff_t num_rows,
                     ptrdiff_t num_columns, ptrdiff_t num_tokens, int threads, float *gain) {
    struct task tasks[MAX_THREADS];
    pthread_t started[MAX_THREADS];
    int is_started[MAX_THREADS] = {0};
    if (threads > MAX_THREADS) threads = MAX_THREADS;
    ptrdiff_t share = (num_rows + threads - 1) / threads;
    share = (share + 3) / 4 * 4;
    for (int i = 0; i < threads; i++) {
        ptrdiff_t first = i * share, last = first + share;
        if (first > num_rows) first = num_rows;
        if (last > num_rows) last = num_rows;
        tasks[i] = (struct task){rows, columns, rho, first, last, num_columns, num_tokens, gain};
        /* this thread takes the first share, and any for which no thread can be had */
        if (i > 0) is_started[i] = pthread_create(&started[i], NULL, run, &tasks[i]) == 0;
    }
    for (int i = 0; i < threads; i++)
        if (!is_started[i]) compute(&tasks[i]);
    for (int i = 0; i < threads; i++)
        if (is_started[i]) pthread_join(started[i], NULL);
}
