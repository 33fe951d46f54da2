/* The assignment problem of Horizontal TokenMixup, solved exactly.
 *
 *     maximise  sum_r gain[r][column(r)],  no column twice
 *
 * Gains are whole numbers, so small that no sum of this file is rounded: equal totals stay equal. A row
 * wants the column whose price less its gain is smallest; prices at which each row can have such a column
 * prove an assignment optimal. Good first prices come from the columns' gains and an auction (Bertsekas,
 * 1988), the last ones from shortest augmenting paths (Jonker and Volgenant, 1987), searched from all rows
 * without a column at once. The prices need not be good for the result to be exact.
 *
 * Of assignments with equal totals the rows choose in turn: each takes the first column that leaves the rows
 * before it their choice and the total as it is. Which prices and which assignment the searches ended with
 * does not matter for that. `_settled` in _assignment.py is the twin.
 *
 * Rows without any gain take what is left. In this file they are the spare row, one for all of them: a row
 * of zeros that owns as many columns as there are more columns than rows.
 *
 * In the worst case the searches take R phases of R * B steps each, as shortest augmenting paths do, and the
 * choice among equal totals R * R * B / 64.
 *
 * Dimensions: R rows that gain something, B columns, S columns in memory: B rounded up.
 */

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum {
    DIGITS = 50, /* of B times the greatest gain; prices and distances have fewer than float64's 53 */
    LANES = 8,   /* columns side by side: one vector register of 512 bits, two of 256 */
    WORD = 64,   /* columns of a word of a set, and bytes of alignment */
    FREE = -1    /* the owner of a column that has none */
};

/* Where the time goes: a step too large leaves most to the searches, one too small most to the auction. */
static const double STEP = 0.003;        /* of the auction, in parts of a row's mean range */
static const double STEP_BY_SPACING = 3; /* the same, in mean differences between best and next best */
static const ptrdiff_t BIDS = 5;         /* of the auction, at most, for each row */
static const ptrdiff_t REDUCTIONS = 2;   /* of the auction without a step, at most, for each row */

typedef double doubles __attribute__((vector_size(8 * LANES)));
typedef int64_t integers __attribute__((vector_size(8 * LANES)));

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
/* compiled for each of these, and chosen when the library is loaded */
#define FOR_EVERY_PROCESSOR __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_EVERY_PROCESSOR
#endif

typedef struct {
    ptrdiff_t rows, columns, stride, words; /* R, B, S, and words of a set of columns */
    float *gain;                            /* (R + 1, S), the last row the spare one's zeros */
    double *sum, *most;                     /* (S,) of a column's gains */
    double *price;                          /* (S,) */
    int64_t *owner;                         /* (S,) row of a column, R the spare one, or FREE */
    int64_t *column;                        /* (R + 1,) column of a row, where it has one */
    int64_t *waiting;                       /* (R,) rows without a column */
    double *least;                          /* (R,) smallest price less gain of a row that waits */
    double *distance;                       /* (S,) of a search: to a column */
    double *closed;                         /* (S,) of a search: infinite where the distance is final, else 0 */
    int64_t *from;                          /* (S,) of a search: the row before a column */
    int64_t *root;                          /* (R + 1,) of a search: place among the waiting where it began */
    int64_t *path;                          /* (S,) columns, one after the other */
    uint64_t *tight;                        /* (R + 1, words) the columns that are best for a row */
    uint64_t *known;                        /* (words,) rows whose set `tight` is up to date */
    uint64_t *done;                         /* (words,) columns that are out of question */
    uint64_t *spares;                       /* (words,) columns of the spare row */
    uint64_t *seen;                         /* (words,) columns that need no second look */
} Problem;

typedef struct {
    double best, second; /* reduced gain of the column, and of the next best */
    ptrdiff_t column;
} Offer;

static inline integers where(integers condition, integers yes, integers no) {
    return (condition & yes) | (~condition & no);
}

static inline doubles smaller(doubles a, doubles b) {
    for (int lane = 0; lane < LANES; lane++) a[lane] = a[lane] < b[lane] ? a[lane] : b[lane];
    return a;
}

static inline doubles larger(doubles a, doubles b) {
    for (int lane = 0; lane < LANES; lane++) a[lane] = a[lane] > b[lane] ? a[lane] : b[lane];
    return a;
}

static inline doubles everywhere(double value) { return (doubles){0} + value; }

/* Price less gain, which a row wants to be small, of the columns from `column` on. */
static inline doubles reduced(const Problem *problem, ptrdiff_t row, ptrdiff_t column) {
    const float *single = problem->gain + row * problem->stride + column;
    doubles gain;
    for (int lane = 0; lane < LANES; lane++) gain[lane] = single[lane];
    return *(const doubles *)(problem->price + column) - gain;
}

static double reduced_of_one(const Problem *problem, ptrdiff_t row, ptrdiff_t column) {
    return problem->price[column] - problem->gain[row * problem->stride + column];
}

static inline int is_in(const uint64_t *set, ptrdiff_t item) { return set[item / WORD] >> item % WORD & 1; }

static inline void put(uint64_t *set, ptrdiff_t item) { set[item / WORD] |= (uint64_t)1 << item % WORD; }

static void empty(const Problem *problem, uint64_t *set) { memset(set, 0, problem->words * sizeof *set); }

static inline int smallest(doubles value) {
    int lane = 0;
    for (int other = 1; other < LANES; other++)
        if (value[other] < value[lane]) lane = other;
    return lane;
}

FOR_EVERY_PROCESSOR
static Offer best_offer(const Problem *problem, ptrdiff_t row) {
    doubles best = everywhere(INFINITY), second = best;
    integers at = {0}, index = {0, 1, 2, 3, 4, 5, 6, 7};
    for (ptrdiff_t c = 0; c < problem->stride; c += LANES, index += LANES) {
        doubles value = reduced(problem, row, c);
        integers better = value < best;
        doubles worse = (doubles)where(better, (integers)best, (integers)value);
        at = where(better, index, at);
        second = smaller(worse, second);
        best = smaller(value, best);
    }
    int lane = smallest(best);
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

/* The columns of a row whose price less gain is `least`. */
FOR_EVERY_PROCESSOR
static void find_tight(Problem *problem, ptrdiff_t row, double least) {
    uint64_t *word = problem->tight + row * problem->words;
    for (ptrdiff_t first = 0; first < problem->stride; first += WORD, word++) {
        integers found = {0}, bit = {1, 2, 4, 8, 16, 32, 64, 128};
        ptrdiff_t end = first + WORD < problem->stride ? first + WORD : problem->stride;
        for (ptrdiff_t c = first; c < end; c += LANES, bit <<= LANES)
            found |= (reduced(problem, row, c) == everywhere(least)) & bit;
        *word = 0;
        for (int lane = 0; lane < LANES; lane++) *word |= found[lane];
    }
    put(problem->known, row);
}

/* The first column that is tight for a row and not in `seen`, if possible none of `last`; -1 if none is left. */
static inline ptrdiff_t unseen(const Problem *problem, ptrdiff_t row, const uint64_t *last) {
    const uint64_t *tight = problem->tight + row * problem->words;
    ptrdiff_t found = -1;
    for (ptrdiff_t w = 0; w < problem->words; w++) {
        uint64_t word = tight[w] & ~problem->seen[w], better = word & ~last[w];
        if (better) return w * WORD + __builtin_ctzll(better);
        if (word && found < 0) found = w * WORD + __builtin_ctzll(word);
    }
    return found;
}

/* The columns of `path` are handed on: each goes to the row that owned the one before, the first to `start`. */
static void hand_on(Problem *problem, int64_t start, ptrdiff_t length) {
    while (length-- > 0) {
        ptrdiff_t column = problem->path[length];
        int64_t row = length ? problem->owner[problem->path[length - 1]] : start;
        problem->owner[column] = row;
        problem->column[row] = column;
    }
}

/* Gives columns that are tight to rows that wait, where other rows can be moved for it, over columns that
 * are not in `seen`. Returns how many still wait. */
static ptrdiff_t match(Problem *problem, ptrdiff_t waiting) {
    uint64_t *taken = problem->done;
    ptrdiff_t left = 0;
    empty(problem, taken);
    for (ptrdiff_t c = 0; c < problem->columns; c++)
        if (problem->owner[c] != FREE) put(taken, c);
    for (ptrdiff_t w = 0; w < waiting; w++) {
        const int64_t start = problem->waiting[w];
        int64_t row = start;
        ptrdiff_t length = 0;
        while (row != FREE && length >= 0) {
            if (!is_in(problem->known, row)) {
                double least =
                    row == start ? problem->least[row] : reduced_of_one(problem, row, problem->column[row]);
                find_tight(problem, row, least);
            }
            ptrdiff_t column = unseen(problem, row, taken);
            if (column >= 0) {
                put(problem->seen, column);
                problem->path[length++] = column;
                row = problem->owner[column];
                if (row != FREE) problem->column[row] = column; /* of the spare row's, the one it would give */
            } else {
                length--;
                row = length > 0 ? problem->owner[problem->path[length - 1]] : start;
            }
        }
        if (length < 0) {
            problem->waiting[left++] = start;
            continue;
        }
        put(taken, problem->path[length - 1]);
        hand_on(problem, start, length);
    }
    return left;
}

/* Distances over `row`, which is reached after `before`; returns the nearest column not yet closed. */
FOR_EVERY_PROCESSOR
static ptrdiff_t nearest(const Problem *problem, ptrdiff_t row, double before) {
    doubles least = everywhere(INFINITY);
    integers at = {0}, index = {0, 1, 2, 3, 4, 5, 6, 7};
    for (ptrdiff_t c = 0; c < problem->stride; c += LANES, index += LANES) {
        doubles *distance = (doubles *)(problem->distance + c);
        integers *from = (integers *)(problem->from + c);
        doubles over = reduced(problem, row, c) + before;
        *from = where(over < *distance, (integers){0} + row, *from);
        *distance = smaller(over, *distance);
        doubles open = *distance + *(const doubles *)(problem->closed + c);
        at = where(open < least, index, at);
        least = smaller(open, least);
    }
    return at[smallest(least)];
}

static ptrdiff_t nearest_open(const Problem *problem) {
    ptrdiff_t found = 0;
    double least = INFINITY;
    for (ptrdiff_t c = 0; c < problem->columns; c++)
        if (problem->closed[c] == 0 && problem->distance[c] < least) least = problem->distance[found = c];
    return found;
}

/* Shortest paths from all waiting rows at once (Dijkstra), until half as many free columns are reached.
 *
 * Each waiting row whose paths reached one gets the nearest. Returns how many still wait. */
static ptrdiff_t search(Problem *problem, ptrdiff_t waiting) {
    const ptrdiff_t spare = problem->rows, wanted = (waiting + 1) / 2;
    ptrdiff_t column = 0, reached = 0, paths = 0, left = 0;
    double now;
    for (ptrdiff_t c = 0; c < problem->stride; c++) {
        problem->distance[c] = INFINITY;
        problem->closed[c] = 0;
    }
    for (ptrdiff_t w = 0; w < waiting; w++) {
        int64_t row = problem->waiting[w];
        problem->root[row] = w;
        problem->column[row] = FREE;
        column = nearest(problem, row, -problem->least[row]);
    }
    for (;;) {
        int64_t row = problem->owner[column], root = problem->root[problem->from[column]];
        now = problem->distance[column];
        problem->closed[column] = INFINITY;
        if (row == FREE) {
            if (problem->waiting[root] != FREE) {
                problem->waiting[root] = FREE;
                problem->path[paths++] = column;
            }
            if (++reached == wanted) break;
            column = nearest_open(problem);
            continue;
        }
        problem->root[row] = root;
        if (row == spare) { /* all of its columns are as near, over the spare row, and lead no further */
            problem->column[spare] = column;
            for (ptrdiff_t c = 0; c < problem->columns; c++)
                if (problem->owner[c] == spare) {
                    problem->distance[c] = now;
                    problem->closed[c] = INFINITY;
                }
        }
        column = nearest(problem, row, now - reduced_of_one(problem, row, column));
    }
    if (now > 0) empty(problem, problem->known);
    memset(problem->seen, -1, problem->words * sizeof *problem->seen);
    for (ptrdiff_t c = 0; c < problem->columns; c++)
        if (problem->distance[c] <= now) {
            problem->price[c] += now - problem->distance[c];
            problem->seen[c / WORD] ^= (uint64_t)1 << c % WORD;
        }
    for (ptrdiff_t w = 0; w < waiting; w++)
        if (problem->waiting[w] != FREE) {
            problem->least[problem->waiting[w]] += now;
            problem->waiting[left++] = problem->waiting[w];
        }
    for (ptrdiff_t p = 0; p < paths; p++)
        for (column = problem->path[p]; column != FREE;) {
            int64_t row = problem->from[column];
            ptrdiff_t given = problem->column[row];
            problem->owner[column] = row;
            problem->column[row] = column;
            column = given;
        }
    return match(problem, left); /* others may have had a column that one row's paths led to */
}

/* The value that `rank` others are not above, of `count` (Hoare, 1961); their order changes. */
static double ranked(double *values, ptrdiff_t count, ptrdiff_t rank) {
    ptrdiff_t low = 0, high = count - 1;
    while (low < high) {
        const double pivot = values[(low + high) / 2];
        ptrdiff_t left = low, right = high;
        while (left <= right) {
            while (values[left] < pivot) left++;
            while (values[right] > pivot) right--;
            if (left > right) break;
            double value = values[left];
            values[left++] = values[right];
            values[right--] = value;
        }
        if (rank <= right)
            high = right;
        else if (rank >= left)
            low = left;
        else
            break;
    }
    return values[rank];
}

/* The lowest price that at least `count` columns do not exceed becomes the least of all. */
static double raise_lowest(Problem *problem, ptrdiff_t count) {
    double *prices = problem->distance; /* of no search yet */
    memcpy(prices, problem->price, problem->columns * sizeof *prices);
    double lowest = ranked(prices, problem->columns, count - 1);
    for (ptrdiff_t c = 0; c < problem->columns; c++)
        if (problem->price[c] < lowest) problem->price[c] = lowest;
    return lowest;
}

/* All columns are free but those of the spare row, which takes the cheapest, at one price: of these first
 * the ones that nobody has yet. */
static void give_to_spare(Problem *problem) {
    ptrdiff_t count = problem->columns - problem->rows;
    double lowest = count ? raise_lowest(problem, count) : 0;
    for (int sold = 0; sold <= 1; sold++)
        for (ptrdiff_t c = 0; c < problem->columns && count; c++)
            if (problem->price[c] == lowest && sold == (problem->owner[c] != FREE) &&
                problem->owner[c] != problem->rows)
                problem->owner[c] = problem->rows, count--;
    for (ptrdiff_t c = 0; c < problem->stride; c++)
        if (problem->owner[c] != problem->rows) problem->owner[c] = FREE;
}

/* What the present prices say of the total, of which the best one is the smallest: how much it is at most. */
typedef struct {
    double total, spacing; /* and the mean difference between a row's best and next best column */
    ptrdiff_t tied;        /* rows where they are equal */
} Bound;

static Bound bound(Problem *problem) {
    Bound found = {0};
    empty(problem, problem->known);
    for (ptrdiff_t c = 0; c < problem->columns; c++) found.total += problem->price[c];
    for (ptrdiff_t r = 0; r < problem->rows; r++) {
        Offer offer = best_offer(problem, r);
        problem->least[r] = offer.best;
        found.total -= offer.best;
        if (isfinite(offer.second)) found.spacing += (offer.second - offer.best) / problem->rows;
        if (offer.second == offer.best) {
            found.tied++;
            find_tight(problem, r, offer.best); /* now that the row is in the cache */
        }
    }
    return found;
}

FOR_EVERY_PROCESSOR
static double mean_range(const Problem *problem) {
    double sum = 0;
    for (ptrdiff_t r = 0; r < problem->rows; r++) {
        doubles least = everywhere(INFINITY), most = -least;
        for (ptrdiff_t c = 0; c + LANES <= problem->columns; c += LANES) {
            doubles value = reduced(problem, r, c);
            least = smaller(value, least);
            most = larger(value, most);
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

static ptrdiff_t all_wait(Problem *problem) {
    for (ptrdiff_t r = 0; r < problem->rows; r++) problem->waiting[r] = problem->rows - 1 - r;
    return problem->rows;
}

/* Prices from the columns' mean gains where they are nearer to the optimum than those of `bound`, which are
 * from the greatest gains, and from an auction. */
static void find_prices(Problem *problem, Bound by_most) {
    double *before = problem->sum; /* no longer needed when the prices go there */
    for (ptrdiff_t c = 0; c < problem->columns; c++) {
        double mean = rint(problem->sum[c] / problem->rows);
        before[c] = problem->price[c];
        problem->price[c] = mean;
    }
    if (problem->columns > problem->rows) raise_lowest(problem, problem->columns - problem->rows);
    double step;
    if (bound(problem).total <= by_most.total)
        step = STEP * mean_range(problem);
    else {
        memcpy(problem->price, before, problem->columns * sizeof *before);
        step = STEP_BY_SPACING * by_most.spacing;
    }
    for (ptrdiff_t c = 0; c < problem->stride; c++) problem->owner[c] = FREE;
    auction(problem, all_wait(problem), 1 + rint(step), BIDS * problem->rows);
}

static void solve(Problem *problem) {
    memcpy(problem->price, problem->most, problem->stride * sizeof *problem->price);
    give_to_spare(problem);
    Bound by_most = bound(problem);
    ptrdiff_t waiting = all_wait(problem);
    empty(problem, problem->seen);
    if (2 * by_most.tied > problem->rows) waiting = match(problem, waiting);
    if (2 * waiting > problem->rows) { /* else the greatest gains are nearly the best prices */
        find_prices(problem, by_most);
        give_to_spare(problem);
        waiting = auction(problem, all_wait(problem), 0, REDUCTIONS * problem->rows);
        for (ptrdiff_t w = 0; w < waiting; w++)
            problem->least[problem->waiting[w]] = best_offer(problem, problem->waiting[w]).best;
        empty(problem, problem->known);
        empty(problem, problem->seen);
        waiting = match(problem, waiting);
    }
    while (waiting > 0) waiting = search(problem, waiting);
}

/* Rows whose only tight column that is not done is their own are done, and so on.
 *
 * Depth first: where no rows could exchange their columns, each row comes after all that it could disturb. */
static void finish_fixed(Problem *problem) {
    const uint64_t *done = problem->done;
    empty(problem, problem->seen);
    for (ptrdiff_t c = 0; c < problem->columns; c++) {
        ptrdiff_t length = 0, next = is_in(problem->seen, c) ? -1 : c;
        while (next >= 0 || length > 0) {
            if (next >= 0) {
                problem->path[length++] = next;
                put(problem->seen, next);
            } else {
                ptrdiff_t column = problem->path[--length];
                const int64_t row = problem->owner[column];
                const uint64_t *tight = problem->tight + row * problem->words;
                uint64_t others = 0;
                for (ptrdiff_t w = 0; w < problem->words; w++) {
                    uint64_t own = row == problem->rows ? problem->spares[w] : 0;
                    if (w == column / WORD) own |= (uint64_t)1 << column % WORD;
                    others |= tight[w] & ~done[w] & ~own;
                }
                if (!others) put(problem->done, column);
            }
            next = length ? unseen(problem, problem->owner[problem->path[length - 1]], problem->seen) : -1;
        }
    }
}

/* Of the assignments with the same total, the one that is first in the order of the rows' columns. */
static void settle(Problem *problem) {
    empty(problem, problem->done);
    for (ptrdiff_t c = 0; c < problem->columns; c++) {
        problem->column[problem->owner[c]] = c;
        if (problem->owner[c] == problem->rows) put(problem->spares, c);
    }
    for (ptrdiff_t r = 0; r <= problem->rows && problem->column[r] != FREE; r++)
        if (!is_in(problem->known, r))
            find_tight(problem, r, reduced_of_one(problem, r, problem->column[r]));
    finish_fixed(problem);
    for (int64_t r = 0; r < problem->rows; r++) {
        const ptrdiff_t own = problem->column[r];
        if (is_in(problem->done, own)) continue;
        /* a path from a column before its own, over the rows behind, to its own */
        memcpy(problem->seen, problem->done, problem->words * sizeof *problem->seen);
        put(problem->seen, own);
        ptrdiff_t length = 0, column = unseen(problem, r, problem->seen);
        while (length > 0 || (column >= 0 && column < own)) {
            if (column >= 0) {
                put(problem->seen, column);
                problem->path[length++] = column;
            } else
                length--;
            if (length) {
                int64_t row = problem->owner[problem->path[length - 1]];
                if (is_in(problem->tight + row * problem->words, own)) {
                    problem->path[length++] = own;
                    hand_on(problem, r, length);
                    break;
                }
                column = unseen(problem, row, problem->seen);
            } else
                column = unseen(problem, r, problem->seen);
        }
        put(problem->done, problem->column[r]);
    }
}

/* `next` bytes of `memory`, aligned; with memory NULL it only counts. */
static void *part(char *memory, size_t *used, size_t bytes) {
    void *found = memory ? memory + *used : NULL;
    *used += (bytes + WORD - 1) / WORD * WORD;
    return found;
}

static size_t lay_out(Problem *problem, char *memory) {
    const size_t stride = problem->stride, rows = problem->rows + 1, words = problem->words;
    size_t used = 0;
    problem->tight = part(memory, &used, rows * words * sizeof(uint64_t));
    problem->known = part(memory, &used, words * sizeof(uint64_t));
    problem->done = part(memory, &used, words * sizeof(uint64_t));
    problem->seen = part(memory, &used, words * sizeof(uint64_t));
    problem->spares = part(memory, &used, words * sizeof(uint64_t));
    problem->sum = part(memory, &used, stride * sizeof(double));
    problem->most = part(memory, &used, stride * sizeof(double));
    problem->price = part(memory, &used, stride * sizeof(double));
    problem->distance = part(memory, &used, stride * sizeof(double));
    problem->closed = part(memory, &used, stride * sizeof(double));
    problem->least = part(memory, &used, rows * sizeof(double));
    problem->from = part(memory, &used, stride * sizeof(int64_t));
    problem->root = part(memory, &used, rows * sizeof(int64_t));
    problem->path = part(memory, &used, stride * sizeof(int64_t));
    problem->owner = part(memory, &used, stride * sizeof(int64_t));
    problem->column = part(memory, &used, rows * sizeof(int64_t));
    problem->waiting = part(memory, &used, rows * sizeof(int64_t));
    problem->gain = part(memory, &used, rows * stride * sizeof(float));
    return used;
}

/* The bits of the number that is farthest from 0; those that are not finite have the greatest. */
FOR_EVERY_PROCESSOR
static uint32_t farthest(const float *row, ptrdiff_t columns) {
    uint32_t most = 0;
    for (ptrdiff_t c = 0; c < columns; c++) {
        uint32_t bits;
        memcpy(&bits, row + c, sizeof bits);
        bits &= 0x7fffffff;
        most = bits > most ? bits : most;
    }
    return most;
}

/* A row in whole numbers, and what it adds to the columns' sums and greatest gains. */
FOR_EVERY_PROCESSOR
static void scale(const float *restrict row, ptrdiff_t columns, double factor, float *restrict whole,
                  double *restrict sum, double *restrict most) {
    for (ptrdiff_t c = 0; c < columns; c++) {
        double gain = rint(row[c] * factor);
        whole[c] = (float)gain; /* exact: a float has fewer digits than the limit, and keeps those it has */
        sum[c] += gain;
        most[c] = gain > most[c] ? gain : most[c];
    }
}

/* `gain` is (rows, columns), row-major, without gaps, rows <= columns; `chosen` (rows,) gets the columns.
 *
 * Returns -1, or the place in `gain` of a number that is not finite, or -2 where memory is short. */
ptrdiff_t tokenmixup_solve_assignment(const float *gain, ptrdiff_t rows, ptrdiff_t columns,
                                      int64_t *chosen) {
    Problem problem = {.columns = columns,
                       .stride = (columns + LANES - 1) / LANES * LANES,
                       .words = columns / WORD + 1};
    uint32_t bits = 0;
    for (ptrdiff_t r = 0; r < rows; r++) {
        chosen[r] = farthest(gain + r * columns, columns);
        if (chosen[r] > bits) bits = chosen[r];
    }
    float most;
    memcpy(&most, &bits, sizeof most);
    if (!isfinite(most))
        for (ptrdiff_t place = 0;; place++)
            if (!isfinite(gain[place])) return place;
    int exponent, digits = DIGITS;
    frexp(most, &exponent);
    for (ptrdiff_t c = columns; c; c >>= 1) digits--;
    const double factor = ldexp(1, digits - exponent);
    for (ptrdiff_t r = 0; r < rows; r++) {
        float greatest;
        bits = (uint32_t)chosen[r];
        memcpy(&greatest, &bits, sizeof greatest);
        chosen[r] = rint(greatest * factor) != 0 ? problem.rows++ : FREE;
    }

    char *memory = aligned_alloc(WORD, lay_out(&problem, NULL));
    if (!memory) return -2;
    memset(memory, 0, lay_out(&problem, memory) - (problem.rows + 1) * problem.stride * sizeof *gain);
    for (ptrdiff_t c = 0; c < problem.stride; c++) {
        problem.most[c] = c < columns ? -INFINITY : 0;
        problem.owner[c] = FREE;
    }
    problem.column[problem.rows] = FREE;
    for (ptrdiff_t r = 0; r < rows; r++)
        if (chosen[r] != FREE)
            scale(gain + r * columns, columns, factor, problem.gain + chosen[r] * problem.stride,
                  problem.sum, problem.most);
    for (ptrdiff_t r = 0; r <= problem.rows; r++) {
        float *row = problem.gain + r * problem.stride;
        if (r == problem.rows) memset(row, 0, columns * sizeof *row);
        for (ptrdiff_t c = columns; c < problem.stride; c++) row[c] = -INFINITY; /* taken by nobody */
    }
    if (problem.rows) {
        solve(&problem);
        settle(&problem);
    }
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
