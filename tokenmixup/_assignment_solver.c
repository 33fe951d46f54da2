/* The assignment problem of Horizontal TokenMixup, solved exactly.
 *
 *     maximise  sum_r gain[r][column(r)],  no column twice
 *
 * Prices of the columns come from an auction whose bids exceed the next best offer by a small step
 * (Bertsekas, 1988). Its assignment is then thrown away: from its prices an auction without that
 * step and shortest augmenting paths (Jonker and Volgenant, 1987) reach the optimum, which they do
 * from any prices, but from good ones in a tenth of the searches.
 *
 * Of assignments whose totals are equal, which is common, a tilt of the gains decides and not the way
 * that the solver went; `_tilt` in _assignment.py is its twin and says how far this holds.
 *
 * Rows without any gain take what is left. In this file they are the spare row, one for all of them:
 * a row of zeros that owns as many columns as there are more columns than rows.
 *
 * Dimensions: R rows that gain something, B columns, S columns in memory: B rounded up.
 */

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum {
    LANES = 8, /* columns side by side: one vector register of 512 bits, two of 256 */
    ALIGNMENT = 64,
    FREE = -1 /* the owner of a column that has none */
};

static const double TILT = 0x1p-40;

/* Where the time goes: a step too large leaves most to the searches, one too small most to the auction. */
static const double STEP = 0.003;      /* of the auction for prices, in parts of a row's mean range */
static const ptrdiff_t BIDS = 20;      /* of the auction for prices, at most, for each row */
static const ptrdiff_t REDUCTIONS = 2; /* of the auction without a step, at most, for each row */

typedef double doubles __attribute__((vector_size(8 * LANES)));
typedef int64_t integers __attribute__((vector_size(8 * LANES)));
typedef float floats __attribute__((vector_size(4 * LANES)));

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
/* compiled for each of these, and chosen when the library is loaded */
#define FOR_EVERY_PROCESSOR __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_EVERY_PROCESSOR
#endif

typedef struct {
    ptrdiff_t rows, columns, stride; /* R, B, S */
    float *gain;                     /* (R + 1, S), the last row the spare one's zeros */
    double *row_tilt, *column_tilt;  /* (R + 1,) and (S,) */
    double *price;                   /* (S,) */
    int64_t *owner;                  /* (S,) row of a column, R the spare one, or FREE */
    int64_t *column;                 /* (R + 1,) column of a row, where it has one */
    int64_t *waiting;                /* (R,) rows without a column */
    int64_t *idle;                   /* (R,) columns without a row */
    double *distance;                /* (S,) of a search: to a column */
    double *closed;                  /* (S,) of a search: infinite where the distance is final, else 0 */
    int64_t *from;                   /* (S,) of a search: the row before a column */
} Problem;

typedef struct {
    double best, second; /* reduced gain of the column, and of the next best */
    ptrdiff_t column;
} Offer;

static inline doubles where(integers condition, doubles yes, doubles no) {
    return (doubles)((condition & (integers)yes) | (~condition & (integers)no));
}

static inline integers where_integer(integers condition, integers yes, integers no) {
    return (condition & yes) | (~condition & no);
}

static inline doubles everywhere(double value) { return (doubles){0} + value; }

/* Price less gain, which a row wants to be small, of the columns from `column` on. */
static inline doubles reduced(const Problem *problem, ptrdiff_t row, ptrdiff_t column) {
    const floats *single = (const floats *)(problem->gain + row * problem->stride + column);
    doubles gain = __builtin_convertvector(*single, doubles);
    doubles tilt = problem->row_tilt[row] * *(const doubles *)(problem->column_tilt + column);
    return *(const doubles *)(problem->price + column) - (gain + gain * tilt);
}

static double reduced_of_one(const Problem *problem, ptrdiff_t row, ptrdiff_t column) {
    double gain = problem->gain[row * problem->stride + column];
    double tilt = problem->row_tilt[row] * problem->column_tilt[column];
    return problem->price[column] - (gain + gain * tilt);
}

/* The lane of the smallest value; of equal ones that of the smallest index, for one result everywhere. */
static inline int first_smallest(doubles value, integers index) {
    int lane = 0;
    for (int other = 1; other < LANES; other++)
        if (value[other] < value[lane] ||
            (value[other] == value[lane] && index[other] < index[lane]))
            lane = other;
    return lane;
}

FOR_EVERY_PROCESSOR
static Offer best_offer(const Problem *problem, ptrdiff_t row) {
    doubles best = everywhere(INFINITY), second = best;
    integers at = {0}, index = {0, 1, 2, 3, 4, 5, 6, 7};
    for (ptrdiff_t c = 0; c < problem->stride; c += LANES, index += LANES) {
        doubles value = reduced(problem, row, c);
        integers better = value < best;
        doubles worse = where(better, best, value);
        second = where(worse < second, worse, second);
        at = where_integer(better, index, at);
        best = where(better, value, best);
    }
    int lane = first_smallest(best, at);
    Offer offer = {best[lane], INFINITY, at[lane]};
    for (int other = 0; other < LANES; other++) {
        if (other != lane && best[other] < offer.second) offer.second = best[other];
        if (second[other] < offer.second) offer.second = second[other];
    }
    return offer;
}

/* Rows bid in turn for the column that is best at the present prices, and raise its price to where the
 * next best is as good, and by `step`. Who loses a column bids next.
 *
 * Bids by whoever waits; returns how many still wait in the end. */
static ptrdiff_t auction(Problem *problem, ptrdiff_t waiting, double step, ptrdiff_t bids) {
    ptrdiff_t left = 0; /* who could not outbid without a step: kept below those to come */
    while (left < waiting && bids-- > 0) {
        int64_t row = problem->waiting[waiting - 1];
        Offer offer = best_offer(problem, row);
        double raise = isfinite(offer.second) ? offer.second - offer.best + step : step;
        int64_t before = problem->owner[offer.column];
        if (before == problem->rows || (before != FREE && raise == 0)) {
            problem->waiting[waiting - 1] = problem->waiting[left];
            problem->waiting[left++] = row;
            continue;
        }
        waiting--;
        problem->price[offer.column] += raise;
        problem->owner[offer.column] = row;
        problem->column[row] = offer.column;
        if (before != FREE) problem->waiting[waiting++] = before;
    }
    return waiting;
}

/* Distances over `row`, which is reached after `before`; returns the nearest column not yet closed. */
FOR_EVERY_PROCESSOR
static ptrdiff_t nearest(const Problem *problem, ptrdiff_t row, double before) {
    doubles least = everywhere(INFINITY);
    integers at = {0}, index = {0, 1, 2, 3, 4, 5, 6, 7};
    for (ptrdiff_t c = 0; c < problem->stride; c += LANES, index += LANES) {
        doubles *distance = (doubles *)(problem->distance + c);
        integers *from = (integers *)(problem->from + c);
        doubles closed = *(const doubles *)(problem->closed + c);
        /* what is closed stays as it is, even where rounding found it nearer */
        doubles over = reduced(problem, row, c) + before + closed;
        integers nearer = over < *distance;
        *from = where_integer(nearer, (integers){0} + row, *from);
        *distance = where(nearer, over, *distance);
        doubles open = *distance + closed;
        nearer = open < least;
        at = where_integer(nearer, index, at);
        least = where(nearer, open, least);
    }
    return at[first_smallest(least, at)];
}

/* Gives a waiting row a column along the shortest path to one of the `count` idle ones (Dijkstra).
 *
 * Returns which of them it was. */
static ptrdiff_t augment(Problem *problem, int64_t start, ptrdiff_t count) {
    const ptrdiff_t spare = problem->rows;
    const int64_t *idle = problem->idle;
    ptrdiff_t found;
    for (ptrdiff_t c = 0; c < problem->stride; c++) {
        problem->distance[c] = INFINITY;
        problem->closed[c] = 0;
    }
    int64_t row = start;
    double before = 0;
    ptrdiff_t column;
    for (;;) {
        column = nearest(problem, row, before);
        /* of columns as near, a free one ends the search */
        for (found = 0; found < count; found++)
            if (problem->distance[idle[found]] == problem->distance[column]) break;
        if (found < count) break;
        row = problem->owner[column];
        problem->closed[column] = INFINITY;
        if (row == spare) { /* all of its columns are as near, over the spare row, and lead no further */
            problem->column[spare] = column;
            for (ptrdiff_t c = 0; c < problem->columns; c++)
                if (problem->owner[c] == spare) {
                    problem->distance[c] = problem->distance[column];
                    problem->closed[c] = INFINITY;
                }
        }
        before = problem->distance[column] - reduced_of_one(problem, row, column);
    }
    column = idle[found];
    for (ptrdiff_t c = 0; c < problem->columns; c++)
        if (problem->closed[c] != 0) problem->price[c] += problem->distance[column] - problem->distance[c];
    do {
        row = problem->from[column];
        problem->owner[column] = row;
        ptrdiff_t given = problem->column[row];
        problem->column[row] = column;
        column = given;
    } while (row != start);
    return found;
}

static int ascending(const void *first, const void *second) {
    double a = *(const double *)first, b = *(const double *)second;
    return (a > b) - (a < b);
}

/* The lowest price that at least `count` columns do not exceed becomes the least of all. */
static double raise_lowest(Problem *problem, ptrdiff_t count) {
    double *sorted = problem->distance;
    memcpy(sorted, problem->price, problem->columns * sizeof *sorted);
    qsort(sorted, problem->columns, sizeof *sorted, ascending);
    double lowest = sorted[count - 1];
    for (ptrdiff_t c = 0; c < problem->columns; c++)
        if (problem->price[c] < lowest) problem->price[c] = lowest;
    return lowest;
}

/* A column's mean gain is what it is worth to anyone: a better start than prices of 0. */
FOR_EVERY_PROCESSOR
static void price_by_mean(Problem *problem) {
    for (ptrdiff_t c = 0; c < problem->stride; c++) problem->price[c] = 0;
    for (ptrdiff_t r = 0; r < problem->rows; r++)
        for (ptrdiff_t c = 0; c < problem->columns; c++)
            problem->price[c] += problem->gain[r * problem->stride + c];
    for (ptrdiff_t c = 0; c < problem->columns; c++) problem->price[c] /= problem->rows;
}

FOR_EVERY_PROCESSOR
static double mean_range(const Problem *problem) {
    double sum = 0;
    for (ptrdiff_t r = 0; r < problem->rows; r++) {
        doubles least = everywhere(INFINITY), most = -least;
        for (ptrdiff_t c = 0; c + LANES <= problem->columns; c += LANES) {
            doubles value = reduced(problem, r, c);
            least = where(value < least, value, least);
            most = where(value > most, value, most);
        }
        double low = INFINITY, high = -INFINITY;
        for (int lane = 0; lane < LANES; lane++) {
            if (least[lane] < low) low = least[lane];
            if (most[lane] > high) high = most[lane];
        }
        if (low <= high) sum += high - low;
    }
    return sum / problem->rows;
}

/* The spare row takes the `count` cheapest columns, at one price: those first that the auction left. */
static void give_to_spare(Problem *problem, ptrdiff_t count, int64_t *owner) {
    double lowest = raise_lowest(problem, count);
    for (int sold = 0; sold <= 1; sold++)
        for (ptrdiff_t c = 0; c < problem->columns && count; c++)
            if (problem->price[c] == lowest && sold == (problem->owner[c] != FREE))
                owner[c] = problem->rows, count--;
}

static ptrdiff_t all_wait(Problem *problem) {
    for (ptrdiff_t r = 0; r < problem->rows; r++) problem->waiting[r] = problem->rows - 1 - r;
    return problem->rows;
}

static void solve(Problem *problem) {
    const ptrdiff_t rows = problem->rows, columns = problem->columns, spare = columns - rows;
    price_by_mean(problem);
    if (spare) raise_lowest(problem, spare);
    auction(problem, all_wait(problem), STEP * mean_range(problem), BIDS * rows);

    int64_t *owner = problem->from; /* which no search uses yet */
    for (ptrdiff_t c = 0; c < columns; c++) owner[c] = FREE;
    if (spare) give_to_spare(problem, spare, owner);
    memcpy(problem->owner, owner, columns * sizeof *owner);
    ptrdiff_t waiting = auction(problem, all_wait(problem), 0, REDUCTIONS * rows);

    ptrdiff_t count = 0;
    for (ptrdiff_t c = 0; c < columns; c++)
        if (problem->owner[c] == FREE) problem->idle[count++] = c;
    while (waiting > 0) {
        ptrdiff_t found = augment(problem, problem->waiting[--waiting], count);
        problem->idle[found] = problem->idle[--count];
    }
}

/* `next` bytes of `memory`, aligned; with memory NULL it only counts. */
static void *part(char *memory, size_t *used, size_t bytes) {
    void *found = memory ? memory + *used : NULL;
    *used += (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    return found;
}

static size_t lay_out(Problem *problem, char *memory) {
    const size_t stride = problem->stride, rows = problem->rows + 1;
    size_t used = 0;
    problem->gain = part(memory, &used, rows * stride * sizeof(float));
    problem->row_tilt = part(memory, &used, rows * sizeof(double));
    problem->column_tilt = part(memory, &used, stride * sizeof(double));
    problem->price = part(memory, &used, stride * sizeof(double));
    problem->distance = part(memory, &used, stride * sizeof(double));
    problem->closed = part(memory, &used, stride * sizeof(double));
    problem->from = part(memory, &used, stride * sizeof(int64_t));
    problem->owner = part(memory, &used, stride * sizeof(int64_t));
    problem->column = part(memory, &used, rows * sizeof(int64_t));
    problem->waiting = part(memory, &used, rows * sizeof(int64_t));
    problem->idle = part(memory, &used, rows * sizeof(int64_t));
    return used;
}

/* Between 0 and 1, and of any two places another. */
static double scattered(ptrdiff_t place, double irrational) {
    double product = (place + 1) * irrational;
    return product - floor(product);
}

/* Whether a row gains anything: 1, 0, or -1 where a number is not finite, whose place goes into `bad`. */
static int gains(const float *row, ptrdiff_t columns, ptrdiff_t *bad) {
    int any = 0;
    for (ptrdiff_t c = 0; c < columns; c++) {
        if (!isfinite(row[c])) return *bad = c, -1;
        any |= row[c] != 0;
    }
    return any;
}

/* `gain` is (rows, columns), row-major, without gaps, rows <= columns; `chosen` (rows,) gets the columns.
 *
 * Returns -1, or the place in `gain` of a number that is not finite, or -2 where memory is short. */
ptrdiff_t tokenmixup_solve_assignment(const float *gain, ptrdiff_t rows, ptrdiff_t columns,
                                      int64_t *chosen) {
    Problem problem = {.columns = columns, .stride = (columns + LANES - 1) / LANES * LANES};
    for (ptrdiff_t r = 0, bad; r < rows; r++) {
        int any = gains(gain + r * columns, columns, &bad);
        if (any < 0) return r * columns + bad;
        chosen[r] = any ? problem.rows++ : FREE;
    }
    char *memory = aligned_alloc(ALIGNMENT, lay_out(&problem, NULL));
    if (!memory) return -2;
    lay_out(&problem, memory);
    const size_t bytes = columns * sizeof *gain;
    memset(problem.gain + problem.rows * problem.stride, 0, problem.stride * sizeof *gain);
    for (ptrdiff_t r = 0; r < rows; r++)
        if (chosen[r] != FREE) {
            memcpy(problem.gain + chosen[r] * problem.stride, gain + r * columns, bytes);
            problem.row_tilt[chosen[r]] = TILT * scattered(r, 1.4142135623730951);
        }
    problem.row_tilt[problem.rows] = TILT; /* of zeros; any but 0, which makes a NaN of what follows */
    for (ptrdiff_t c = 0; c < problem.stride; c++)
        problem.column_tilt[c] = scattered(c, 0.6180339887498949);
    for (ptrdiff_t r = 0; r <= problem.rows; r++) /* columns that nobody takes */
        for (ptrdiff_t c = columns; c < problem.stride; c++)
            problem.gain[r * problem.stride + c] = -INFINITY;

    for (ptrdiff_t c = 0; c < problem.stride; c++) problem.owner[c] = FREE;
    if (problem.rows) solve(&problem);
    for (ptrdiff_t r = 0, next = 0; r < rows; r++) {
        if (chosen[r] != FREE) {
            chosen[r] = problem.column[chosen[r]];
            continue;
        }
        while (problem.owner[next] != problem.rows && problem.owner[next] != FREE) next++;
        chosen[r] = next++;
    }
    free(memory);
    return -1;
}
