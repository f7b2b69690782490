/* What a LLaMA does on a CPU between its matrix products: attention over a token forest, forward and backward, and for
 * one step of decoding; RMSNorm, SwiGLU and log-probs; and a step of decoding as a whole, with its products.
 *
 * What attention does with short, ragged sequences of small heads is poor work for a matrix library: padding, the
 * masked half, tiny products and several passes over memory cost more than the arithmetic. Here every sequence has its
 * own length, nothing is padded, only what is visible is computed, and scores never leave the cache (online softmax:
 * Milakov and Gimelshein 2018; scores computed again in the backward pass: Dao et al. 2022).
 *
 * A vector holds LANES queries. Keys and values enter as scalars that are broadcast, so no product needs a sum across a
 * vector, and a head of 8 numbers fills the vectors as well as one of 128.
 *
 * A task is one group of a forest (a tree with all its segments) and one key head: it alone writes the gradients of
 * these keys and values, in one order, so that results do not depend on the number of threads.
 *
 * pipeline/llama/kernel.py is the Python side and says what the arguments are.
 */

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 16
#define BLOCK 64 /* keys whose scores are held at once */
#define MAX_HEAD 256
#define TEXT(x) #x
#define UNROLL(n) _Pragma(TEXT(GCC unroll n))
#define INLINE static inline __attribute__((always_inline))

/* The same code for several generations of processors, chosen when the library is loaded. */
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EVERY_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EVERY_CPU
#endif

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef float vfu __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float v8u __attribute__((vector_size(32), aligned(4), may_alias));
typedef float v8 __attribute__((vector_size(32)));
typedef int32_t v8i __attribute__((vector_size(32)));
typedef uint16_t h __attribute__((vector_size(2 * LANES)));
typedef uint16_t hu __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef uint16_t h8 __attribute__((vector_size(16)));
typedef uint16_t h8u __attribute__((vector_size(16), aligned(2), may_alias));

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (v8i){__VA_ARGS__})
#endif

INLINE vf splat(float x) { return x - (vf){0}; }

INLINE vf choose(vi which, vf yes, vf no) { return (vf)((which & (vi)yes) | (~which & (vi)no)); }

INLINE vf larger(vf a, vf b) { return choose(a > b, a, b); }

/* 2^x as 2^n 2^r with |r| <= 1/2 and a polynomial of degree 6, to about 1 ulp. 0 below the normal numbers; NaN stays. */
INLINE vf power_of_two(vf x) {
    x = choose(x <= -126.0f, splat(-127.0f), x); /* of which the exponent's bits are 0, and so is the result */
    const vf shifted = x + 12582912.0f; /* 1.5 * 2^23: n stands in the low bits */
    const vf r = x - (shifted - 12582912.0f);
    vf p = splat(1.5403530393381608e-4f); /* (ln 2)^k / k! */
    p = p * r + 1.3333558146428443e-3f;
    p = p * r + 9.6181291076284772e-3f;
    p = p * r + 5.5504108664821580e-2f;
    p = p * r + 2.4022650695910071e-1f;
    p = p * r + 6.9314718055994531e-1f;
    p = p * r + 1.0f;
    return p * (vf)(((vi)shifted << 23) + 0x3f800000);
}

#define LOG2_E 1.44269504088896341f

INLINE float widen(uint16_t x) {
    const uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}

/* float32 to the 16 bits of a bfloat16, in vectors of V: to the nearest, ties to even; NaN stays NaN. */
#define NARROW(V, x)                                                                            \
    (CHOOSE_BITS((x) != (x), (V)(x) | 0x400000, (V)(x) + 0x7fff + (((V)(x) >> 16) & 1)) >> 16)
#define CHOOSE_BITS(which, yes, no) (((which) & (yes)) | (~(which) & (no)))

/* Pairs side by side turned by their cosines and sines, or back (by = -1). Rotary positions: Su et al. 2021. */
INLINE void turn(float *row, const float *angle, int size, float by) {
    for (int d = 0; d < size; d += 2) {
        const float x = row[d], y = row[d + 1], cosine = angle[d], sine = angle[d + 1] * by;
        row[d] = x * cosine - y * sine;
        row[d + 1] = x * sine + y * cosine;
    }
}

/* The same for 8 numbers in a vector. */
INLINE v8 turn8(v8 x, const float *angle, float by) {
    const v8 a = *(const v8u *)angle, sign = {-by, by, -by, by, -by, by, -by, by};
    return x * SHUFFLE(a, a, 0, 0, 2, 2, 4, 4, 6, 6) +
           SHUFFLE(x, x, 1, 0, 3, 2, 5, 4, 7, 6) * (SHUFFLE(a, a, 1, 1, 3, 3, 5, 5, 7, 7) * sign);
}

/* 8 numbers, float32 or bfloat16 (half). */
INLINE v8 read8(const void *from, int64_t at, int half) {
    if (half) return (v8)(__builtin_convertvector(*(const h8u *)((const uint16_t *)from + at), v8i) << 16);
    return *(const v8u *)((const float *)from + at);
}

INLINE void write8(void *to, int64_t at, int half, v8 x) {
    if (half)
        *(h8u *)((uint16_t *)to + at) = __builtin_convertvector(NARROW(v8i, x), h8);
    else
        *(v8u *)((float *)to + at) = x;
}

/* 8 rows of 8 numbers become 8 columns: neighbours of 1, 2 and 4 numbers change places. */
INLINE void transpose8(v8 *r) {
    v8 a[8], b[8];
    UNROLL(4) for (int i = 0; i < 8; i += 2) {
        a[i] = SHUFFLE(r[i], r[i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
        a[i + 1] = SHUFFLE(r[i], r[i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
    }
    UNROLL(4) for (int i = 0; i < 4; i++) {
        const int j = i / 2 * 4 + i % 2;
        b[j] = SHUFFLE(a[j], a[j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
        b[j + 2] = SHUFFLE(a[j], a[j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
    UNROLL(4) for (int j = 0; j < 4; j++) {
        r[j] = SHUFFLE(b[j], b[j + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        r[j + 4] = SHUFFLE(b[j], b[j + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
}

/* --- the forest -------------------------------------------------------------------------------------------------- */

typedef struct {
    const int64_t *start, *length, *parent; /* by segment, as in pipeline/data/forest.py */
    const int64_t *first;                   /* first segment of each group, and one past the last */
    int64_t groups;
    int heads, kv_heads, size, half;
    int64_t window; /* tokens that a token sees, itself included; 0 for all before it */
    float scale;
    const float *turns; /* [T, D] cosine and sine by which pairs of queries and keys are turned, or NULL */
    const void *rows; /* [T, H + 2K, D] */
    void *out;        /* [T, H, D] */
    float *softmax;   /* [T, H, 2] largest score and 1 / sum of the exponentials, for the backward pass */
    const void *grad; /* [T, H, D] */
    void *grad_rows;  /* [T, H + 2K, D] */
} Forest;

typedef struct {
    int64_t at, length, position; /* first token within the group, how many, position of the first */
} Run;

typedef struct { /* what a task works in */
    float *keys, *values, *dkeys, *dvalues; /* [tokens of the group, D] */
    Run *runs;
} Room;

/* The tokens that a segment sees: its ancestors from the root down, and itself last. */
INLINE int64_t runs_of(const Forest *f, int64_t segment, int64_t origin, Run *runs) {
    int64_t count = 0;
    for (int64_t s = segment; s >= 0; s = f->parent[s])
        if (f->length[s]) runs[count++] = (Run){f->start[s] - origin, f->length[s], 0};
    for (int64_t i = 0; i < count / 2; i++) {
        const Run other = runs[i];
        runs[i] = runs[count - 1 - i];
        runs[count - 1 - i] = other;
    }
    for (int64_t i = 1; i < count; i++) runs[i].position = runs[i - 1].position + runs[i - 1].length;
    return count;
}

/* A block of LANES queries: the G query heads of a token side by side, so that short segments fill the lanes too. */
typedef struct {
    int count;                             /* lanes in use */
    int64_t first, last;                   /* positions of the first and the last query */
    int64_t token[LANES], head[LANES];     /* of the run of tokens, of the query heads */
    vi position;                           /* of each lane */
} Lanes;

INLINE void lanes_of(Lanes *b, int64_t row, int64_t rows, int group, int kv, int64_t start, int64_t before) {
    int64_t token = row / group, head = row % group;
    b->count = rows - row < LANES ? rows - row : LANES;
    b->first = before + token;
    for (int i = 0; i < LANES; i++) {
        b->token[i] = start + token, b->head[i] = kv * group + head, b->position[i] = before + token;
        if (i < b->count) b->last = before + token;
        if (i < b->count - 1 && ++head == group) head = 0, token++;
    }
}

/* Keys lo .. hi - 1 of a run that at least one lane sees. */
INLINE void seen_of(const Forest *f, const Lanes *b, const Run *run, int64_t *lo, int64_t *hi) {
    *lo = 0, *hi = run->length;
    if (*hi > b->last - run->position + 1) *hi = b->last - run->position + 1;
    if (f->window && b->first - f->window + 1 > run->position) *lo = b->first - f->window + 1 - run->position;
}

/* Which lanes see the key at a position; all of them between the two limits. */
INLINE int all_see(const Forest *f, const Lanes *b, int64_t from, int64_t to) {
    return to <= b->first && (!f->window || from > b->last - f->window);
}

INLINE vi sees(const Forest *f, const Lanes *b, int64_t key) {
    const vi at = (vi){0} + (int32_t)key;
    vi seen = at <= b->position;
    if (f->window) seen &= at > b->position - (int32_t)f->window;
    return seen;
}

INLINE void pack(const Forest *f, int64_t origin, int64_t tokens, int kv, int size, Room *room) {
    const int width = f->heads + 2 * f->kv_heads;
    for (int64_t t = 0; t < tokens; t++)
        for (int d = 0; d < size; d += 8) {
            const int64_t at = ((origin + t) * width + f->heads + kv) * size + d;
            const v8 key = read8(f->rows, at, f->half);
            *(v8u *)(room->keys + t * size + d) = f->turns ? turn8(key, f->turns + (origin + t) * size + d, 1.0f) : key;
            *(v8u *)(room->values + t * size + d) = read8(f->rows, at + (int64_t)f->kv_heads * size, f->half);
        }
}

/* Rows of a block's lanes in an array [T, width, D], side by side ([LANES, D], zeros in unused lanes), if asked, and
 * transposed ([D] of LANES). */
INLINE void gather(const Forest *f, const void *from, const float *turns, int width, const Lanes *b, int size,
                   float scale, float *plain, vf *transposed) {
    for (int d = 0; d < size; d += 8)
        for (int first = 0; first < LANES; first += 8) {
            v8 rows[8];
            for (int i = 0; i < 8; i++) {
                const int lane = first + i;
                rows[i] = (v8){0};
                if (lane < b->count) {
                    rows[i] = read8(from, (b->token[lane] * width + b->head[lane]) * size + d, f->half);
                    if (turns) rows[i] = turn8(rows[i], turns + b->token[lane] * size + d, 1.0f);
                    rows[i] *= scale;
                }
                if (plain) *(v8u *)(plain + lane * size + d) = rows[i];
            }
            transpose8(rows);
            for (int i = 0; i < 8; i++) *(v8u *)((float *)(transposed + d + i) + first) = rows[i];
        }
}

INLINE void scatter(const Forest *f, void *to, const float *turns, int width, const Lanes *b, int size,
                    const vf *transposed) {
    for (int d = 0; d < size; d += 8)
        for (int first = 0; first < b->count; first += 8) {
            v8 rows[8];
            for (int i = 0; i < 8; i++) rows[i] = *(const v8u *)((const float *)(transposed + d + i) + first);
            transpose8(rows);
            for (int lane = first; lane < first + 8 && lane < b->count; lane++) {
                v8 row = rows[lane - first];
                if (turns) row = turn8(row, turns + b->token[lane] * size + d, -1.0f);
                write8(to, (b->token[lane] * width + b->head[lane]) * size + d, f->half, row);
            }
        }
}

/* scores[j] = q . k_j for `count` keys, rounded up to 8: what is beyond is computed and not used. */
INLINE void dot(const vf *q, const float *keys, int count, int size, vf *scores) {
    for (int j = 0; j < count; j += 8) {
        vf s[8] = {{0}};
        const float *k = keys + j * size;
        for (int d = 0; d < size; d++)
            UNROLL(8) for (int t = 0; t < 8; t++) s[t] += q[d] * k[t * size + d];
        UNROLL(8) for (int t = 0; t < 8; t++) scores[j + t] = s[t];
    }
}

/* sum[d] += weight[j] * row_j[d] */
INLINE void add_rows(const vf *weights, const float *rows, int count, int size, vf *sum) {
    for (int d = 0; d < size; d += 8) {
        vf a[8];
        UNROLL(8) for (int t = 0; t < 8; t++) a[t] = sum[d + t];
        for (int j = 0; j < count; j++) {
            const float *row = rows + j * size + d;
            UNROLL(8) for (int t = 0; t < 8; t++) a[t] += weights[j] * row[t];
        }
        UNROLL(8) for (int t = 0; t < 8; t++) sum[d + t] = a[t];
    }
}

/* to_j[d] += sum over lanes of weight[j][lane] * row[lane][d], for two pairs of weights and rows at once */
#define GATHER_LANES(V, VU, STEP)                                                                          \
    for (int j = 0; j < count; j += 4) {                                                                   \
        const int some = count - j < 4 ? count - j : 4;                                                    \
        for (int d = 0; d < size; d += STEP) {                                                             \
            V a[4] = {{0}}, b[4] = {{0}};                                                                  \
            for (int i = 0; i < LANES; i++) {                                                              \
                const V x = *(const VU *)(q + i * size + d), y = *(const VU *)(g + i * size + d);          \
                UNROLL(4) for (int t = 0; t < 4; t++) {                                                              \
                    a[t] += x * ((const float *)(ds + j + t))[i];                                          \
                    b[t] += y * ((const float *)(p + j + t))[i];                                           \
                }                                                                                          \
            }                                                                                              \
            for (int t = 0; t < some; t++) {                                                               \
                *(VU *)(dk + (j + t) * size + d) += a[t];                                                  \
                *(VU *)(dv + (j + t) * size + d) += b[t];                                                  \
            }                                                                                              \
        }                                                                                                  \
    }

INLINE void add_lanes(const vf *ds, const vf *p, const float *q, const float *g, int count, int size, float *dk,
                      float *dv) {
    if (size % LANES == 0) {
        GATHER_LANES(vf, vfu, LANES)
    } else {
        GATHER_LANES(v8, v8u, 8)
    }
}

INLINE void forward(const Forest *f, int64_t group, int kv, int size, Room *room) {
    const int each = f->heads / f->kv_heads, width = f->heads + 2 * f->kv_heads;
    const int64_t begin = f->first[group], end = f->first[group + 1];
    if (begin == end) return;
    const int64_t origin = f->start[begin];
    pack(f, origin, f->start[end - 1] + f->length[end - 1] - origin, kv, size, room);
    vf q[MAX_HEAD], sum[MAX_HEAD], scores[BLOCK];
    for (int64_t s = begin; s < end; s++) {
        const int64_t rows = f->length[s] * each;
        if (!rows) continue;
        const int64_t count = runs_of(f, s, origin, room->runs), before = room->runs[count - 1].position;
        for (int64_t row = 0; row < rows; row += LANES) {
            Lanes b;
            lanes_of(&b, row, rows, each, kv, f->start[s], before);
            gather(f, f->rows, f->turns, width, &b, size, f->scale * LOG2_E, NULL, q);
            vf most = splat(-FLT_MAX), total = {0};
            for (int d = 0; d < size; d++) sum[d] = (vf){0};
            for (int64_t r = 0; r < count; r++) {
                int64_t lo, hi;
                seen_of(f, &b, room->runs + r, &lo, &hi);
                for (int64_t at = lo; at < hi; at += BLOCK) {
                    const int n = hi - at < BLOCK ? hi - at : BLOCK;
                    const int64_t place = (room->runs[r].at + at) * size, key = room->runs[r].position + at;
                    dot(q, room->keys + place, n, size, scores);
                    const int all = all_see(f, &b, key, key + n - 1);
                    if (!all)
                        for (int j = 0; j < n; j++) scores[j] = choose(sees(f, &b, key + j), scores[j], splat(-INFINITY));
                    vf high = most;
                    for (int j = 0; j < n; j++) high = larger(scores[j], high);
                    const vf shrink = power_of_two(most - high);
                    most = high;
                    total *= shrink;
                    for (int d = 0; d < size; d++) sum[d] *= shrink;
                    for (int j = 0; j < n; j++) {
                        vf p = power_of_two(scores[j] - most);
                        if (!all) p = choose(sees(f, &b, key + j), p, (vf){0});
                        scores[j] = p;
                        total += p;
                    }
                    add_rows(scores, room->values + place, n, size, sum);
                }
            }
            const vf inverse = 1.0f / total;
            for (int d = 0; d < size; d++) sum[d] *= inverse;
            scatter(f, f->out, NULL, f->heads, &b, size, sum);
            for (int i = 0; i < b.count; i++) {
                float *kept = f->softmax + 2 * (b.token[i] * f->heads + b.head[i]);
                kept[0] = most[i], kept[1] = inverse[i];
            }
        }
    }
}

INLINE void backward(const Forest *f, int64_t group, int kv, int size, Room *room) {
    const int each = f->heads / f->kv_heads, width = f->heads + 2 * f->kv_heads;
    const int64_t begin = f->first[group], end = f->first[group + 1];
    if (begin == end) return;
    const int64_t origin = f->start[begin];
    const int64_t tokens = f->start[end - 1] + f->length[end - 1] - origin;
    pack(f, origin, tokens, kv, size, room);
    for (int64_t i = 0; i < tokens * size; i++) room->dkeys[i] = room->dvalues[i] = 0.0f;
    vf q[MAX_HEAD], g[MAX_HEAD], o[MAX_HEAD], dq[MAX_HEAD], p[BLOCK + 4], ds[BLOCK + 4];
    float q_plain[LANES * MAX_HEAD], g_plain[LANES * MAX_HEAD];
    for (int i = 0; i < BLOCK + 4; i++) p[i] = ds[i] = (vf){0}; /* what lies behind a short block is read, not used */
    for (int64_t s = begin; s < end; s++) {
        const int64_t rows = f->length[s] * each;
        if (!rows) continue;
        const int64_t count = runs_of(f, s, origin, room->runs), before = room->runs[count - 1].position;
        for (int64_t row = 0; row < rows; row += LANES) {
            Lanes b;
            lanes_of(&b, row, rows, each, kv, f->start[s], before);
            gather(f, f->rows, f->turns, width, &b, size, f->scale * LOG2_E, q_plain, q);
            gather(f, f->grad, NULL, f->heads, &b, size, 1.0f, g_plain, g);
            gather(f, f->out, NULL, f->heads, &b, size, 1.0f, NULL, o);
            /* in the order of `dot`, so that where one key has all the weight delta is its dot product to the bit */
            vf delta = {0}, most = {0}, inverse = {0};
            for (int d = 0; d < size; d++) delta += g[d] * o[d], dq[d] = (vf){0};
            for (int i = 0; i < b.count; i++) {
                const float *kept = f->softmax + 2 * (b.token[i] * f->heads + b.head[i]);
                most[i] = kept[0], inverse[i] = kept[1];
            }
            for (int64_t r = 0; r < count; r++) {
                int64_t lo, hi;
                seen_of(f, &b, room->runs + r, &lo, &hi);
                for (int64_t at = lo; at < hi; at += BLOCK) {
                    const int n = hi - at < BLOCK ? hi - at : BLOCK;
                    const int64_t place = (room->runs[r].at + at) * size, key = room->runs[r].position + at;
                    dot(q, room->keys + place, n, size, p);
                    dot(g, room->values + place, n, size, ds);
                    for (int j = 0; j < n; j++) p[j] = power_of_two(p[j] - most) * inverse;
                    if (!all_see(f, &b, key, key + n - 1))
                        for (int j = 0; j < n; j++) p[j] = choose(sees(f, &b, key + j), p[j], (vf){0});
                    for (int j = 0; j < n; j++) ds[j] = p[j] * (ds[j] - delta);
                    add_rows(ds, room->keys + place, n, size, dq);
                    add_lanes(ds, p, q_plain, g_plain, n, size, room->dkeys + place, room->dvalues + place);
                }
            }
            for (int d = 0; d < size; d++) dq[d] *= f->scale;
            scatter(f, f->grad_rows, f->turns, width, &b, size, dq);
        }
    }
    for (int64_t t = 0; t < tokens; t++) {
        for (int d = 0; d < size; d += 8) {
            const int64_t at = ((origin + t) * width + f->heads + kv) * size + d;
            v8 dkey = *(const v8u *)(room->dkeys + t * size + d) * (1.0f / LOG2_E); /* of the queries in add_lanes */
            if (f->turns) dkey = turn8(dkey, f->turns + (origin + t) * size + d, -1.0f);
            write8(f->grad_rows, at, f->half, dkey);
            write8(f->grad_rows, at + (int64_t)f->kv_heads * size, f->half, *(const v8u *)(room->dvalues + t * size + d));
        }
    }
}

/* --- one step of decoding ----------------------------------------------------------------------------------------- */

typedef struct {
    int heads, kv_heads, size, append;
    int64_t columns;           /* of the cache, a multiple of LANES */
    const int64_t *rows;       /* [N] row of the cache of each sequence */
    const int64_t *positions;  /* [N] of its new token */
    const float *projected;    /* [N, H + 2K, D] its queries, keys and values, pairs to be turned side by side */
    const float *turns;        /* [C, D] cosine and sine of each pair, by position */
    float scale;
    float *keys;   /* [R, K, D, C] */
    float *values; /* [R, K, C, D] */
    float *out;    /* [N, H, D] */
} Decode;

/* out[d] = sum of weight[j] * row_j[d] */
#define WEIGHTED_SUM(V, VU, STEP)                                                                                  \
    for (int d = 0; d < size; d += STEP) {                                                                         \
        V a[4] = {{0}};                                                                                            \
        int64_t j = 0;                                                                                             \
        for (; j + 4 <= count; j += 4)                                                                             \
            UNROLL(4) for (int t = 0; t < 4; t++) a[t] += weights[j + t] * *(const VU *)(rows + (j + t) * size + d); \
        for (; j < count; j++) a[0] += weights[j] * *(const VU *)(rows + j * size + d);                            \
        *(VU *)(out + d) = (a[0] + a[1]) + (a[2] + a[3]);                                                          \
    }

INLINE void weighted_sum(const float *weights, const float *rows, int64_t count, int size, float *out) {
    if (size % LANES == 0) {
        WEIGHTED_SUM(vf, vfu, LANES)
    } else {
        WEIGHTED_SUM(v8, v8u, 8)
    }
}

/* weights = 2^(q . k_j - max) in place of scores for the `count` keys of a row [D, C]; their sum. */
INLINE float weigh(const float *q, const float *keys, int64_t columns, int64_t count, int size, float *weights) {
    vf most = splat(-INFINITY), total = {0}, lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    int64_t j = 0;
    for (; j + 4 * LANES <= count; j += 4 * LANES) {
        vf s[4] = {{0}};
        for (int d = 0; d < size; d++)
            UNROLL(4) for (int t = 0; t < 4; t++) s[t] += q[d] * *(const vfu *)(keys + d * columns + j + t * LANES);
        UNROLL(4) for (int t = 0; t < 4; t++) {
            *(vfu *)(weights + j + t * LANES) = s[t];
            most = larger(s[t], most);
        }
    }
    for (; j < count; j += LANES) {
        vf s = {0};
        for (int d = 0; d < size; d++) s += q[d] * *(const vfu *)(keys + d * columns + j);
        s = choose(lane < splat((float)(count - j)), s, splat(-INFINITY));
        *(vfu *)(weights + j) = s;
        most = larger(s, most);
    }
    float top = most[0];
    for (int i = 1; i < LANES; i++) top = most[i] > top ? most[i] : top;
    for (j = 0; j < count; j += LANES) {
        vf p = power_of_two(*(const vfu *)(weights + j) - splat(top));
        if (j + LANES > count) p = choose(lane < splat((float)(count - j)), p, (vf){0});
        *(vfu *)(weights + j) = p;
        total += p;
    }
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += total[i];
    return sum;
}

INLINE void decode(const Decode *f, int64_t n, int kv, int size, float *weights) {
    const int each = f->heads / f->kv_heads, width = f->heads + 2 * f->kv_heads;
    const int64_t position = f->positions[n], count = position + 1, row = f->rows[n] * f->kv_heads + kv;
    const float *own = f->projected + n * width * size, *by = f->turns + position * size;
    float *keys = f->keys + row * size * f->columns, *values = f->values + row * size * f->columns;
    float q[MAX_HEAD];
    if (f->append) {
        memcpy(q, own + (f->heads + kv) * size, 4 * size);
        turn(q, by, size, 1.0f);
        for (int d = 0; d < size; d++) keys[d * f->columns + position] = q[d];
        memcpy(values + position * size, own + (f->heads + f->kv_heads + kv) * size, 4 * size);
    }
    for (int g = 0; g < each; g++) {
        for (int d = 0; d < size; d++) q[d] = own[(kv * each + g) * size + d] * (f->scale * LOG2_E);
        turn(q, by, size, 1.0f);
        const float inverse = 1.0f / weigh(q, keys, f->columns, count, size, weights);
        float *out = f->out + (n * f->heads + kv * each + g) * size;
        weighted_sum(weights, values, count, size, out);
        for (int d = 0; d < size; d++) out[d] *= inverse;
    }
}

/* --- between the products ------------------------------------------------------------------------------------------ */

#define ROWS 64 /* of a task; sums over rows are made task by task, whatever the number of threads */

INLINE vf load(const void *from, int64_t at, int half) {
    if (half) return (vf)(__builtin_convertvector(*(const hu *)((const uint16_t *)from + at), vi) << 16);
    return *(const vfu *)((const float *)from + at);
}

INLINE void save(void *to, int64_t at, int half, vf x) {
    if (half)
        *(hu *)((uint16_t *)to + at) = __builtin_convertvector(NARROW(vi, x), h);
    else
        *(vfu *)((float *)to + at) = x;
}

INLINE float sum_lanes(vf x) {
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += x[i];
    return sum;
}

typedef struct {
    int64_t rows, size;
    int half;
    float eps;
    const void *x, *grad;
    const float *weight;
    void *out;       /* y, or the gradient of x */
    float *inverse;  /* [rows] 1 / rms */
    float *dweight;  /* [tasks, size] */
} Norm;

/* y = x / rms(x) * w, or with grad the gradients of x and, unless dweight is NULL, of w. */
INLINE void norm(const Norm *f, int64_t first, int64_t last, int half, float *dweight) {
    const int64_t n = f->size;
    for (int64_t r = first; r < last; r++) {
        vf sum = {0};
        if (!f->grad) {
            for (int64_t i = 0; i < n; i += LANES) {
                const vf x = load(f->x, r * n + i, half);
                sum += x * x;
            }
            const float inverse = 1.0f / sqrtf(sum_lanes(sum) / n + f->eps);
            f->inverse[r] = inverse;
            for (int64_t i = 0; i < n; i += LANES)
                save(f->out, r * n + i, half, load(f->x, r * n + i, half) * inverse * *(const vfu *)(f->weight + i));
            continue;
        }
        const float inverse = f->inverse[r];
        for (int64_t i = 0; i < n; i += LANES) {
            const vf unit = load(f->x, r * n + i, half) * inverse, g = load(f->grad, r * n + i, half);
            if (dweight) *(vfu *)(dweight + i) += g * unit;
            sum += g * *(const vfu *)(f->weight + i) * unit;
        }
        const float along = sum_lanes(sum) / n;
        for (int64_t i = 0; i < n; i += LANES) {
            const vf unit = load(f->x, r * n + i, half) * inverse, g = load(f->grad, r * n + i, half);
            save(f->out, r * n + i, half, (g * *(const vfu *)(f->weight + i) - unit * along) * inverse);
        }
    }
}

typedef struct {
    int64_t rows, size; /* of the product: the input is [rows, 2 size], gates before ups */
    int half;
    const void *x, *grad;
    void *out;
} Swiglu;

/* silu(gate) * up, or with grad the gradients of both. */
INLINE void swiglu(const Swiglu *f, int64_t first, int64_t last, int half) {
    const int64_t n = f->size;
    for (int64_t r = first; r < last; r++)
        for (int64_t i = 0; i < n; i += LANES) {
            const int64_t at = 2 * r * n + i;
            const vf gate = load(f->x, at, half), up = load(f->x, at + n, half);
            const vf e = power_of_two(choose(gate > 0.0f, -gate, gate) * LOG2_E); /* of minus the size: never too large */
            const vf sigmoid = choose(gate > 0.0f, splat(1.0f), e) / (1.0f + e);
            if (!f->grad) {
                save(f->out, r * n + i, half, gate * sigmoid * up);
                continue;
            }
            const vf g = load(f->grad, r * n + i, half);
            save(f->out, at, half, g * up * sigmoid * (1.0f + gate * (1.0f - sigmoid)));
            save(f->out, at + n, half, g * gate * sigmoid);
        }
}

/* --- log-probs of chosen tokens ------------------------------------------------------------------------------------ */

#define LN_2 0.693147180559945309f
#define FEW 8 /* rows of a task */

typedef struct {
    int64_t rows, size; /* size: of the vocabulary, a multiple of LANES */
    int half;
    float inverse;       /* 1 / temperature */
    const void *logits;  /* [N, V] */
    const int64_t *ids;  /* [N] */
    float *normaliser;   /* [N, 2] largest scaled logit and log of the sum, in base 2: written forward, read backward */
    float *logp;         /* [N] */
    float *entropy;      /* [N], or NULL where it is not wanted */
    const float *grad, *grad_entropy; /* [N], each NULL where there is none */
    void *out;                        /* [N, V] the gradient of the logits, or NULL forward */
} Chosen;

/* log softmax(logits / temperature) of one token of each row, and the entropy H; or the gradient of the logits:
 * d logp_y / d logit_v = [v = y] - p_v and d H / d logit_v = -p_v (logp_v + H), over the temperature. */
INLINE void chosen(const Chosen *f, int64_t r, int half) {
    const int64_t n = f->size, at = r * n, y = at + f->ids[r];
    const float scale = f->inverse * LOG2_E;
    if (!f->out) {
        vf most = splat(-INFINITY), sum = {0}, weighted = {0};
        for (int64_t i = 0; i < n; i += LANES) most = larger(load(f->logits, at + i, half) * scale, most);
        float top = most[0];
        for (int i = 1; i < LANES; i++) top = most[i] > top ? most[i] : top;
        for (int64_t i = 0; i < n; i += LANES) {
            const vf below = load(f->logits, at + i, half) * scale - top, p = power_of_two(below);
            sum += p;
            weighted += choose(p == 0.0f, (vf){0}, p * below);
        }
        const float total = sum_lanes(sum), log_total = logf(total);
        const float own = half ? widen(((const uint16_t *)f->logits)[y]) : ((const float *)f->logits)[y];
        f->normaliser[2 * r] = top;
        f->normaliser[2 * r + 1] = log_total * LOG2_E;
        f->logp[r] = (own * scale - top) * LN_2 - log_total;
        if (f->entropy) f->entropy[r] = log_total - sum_lanes(weighted) / total * LN_2;
        return;
    }
    const float g = f->grad ? f->grad[r] * f->inverse : 0.0f, h = f->grad_entropy ? f->grad_entropy[r] * f->inverse : 0.0f;
    const float top = f->normaliser[2 * r], rest = f->normaliser[2 * r + 1], own = h != 0.0f ? f->entropy[r] : 0.0f;
    for (int64_t i = 0; i < n; i += LANES) {
        const vf logp2 = load(f->logits, at + i, half) * scale - top - rest, p = power_of_two(logp2);
        vf d = p * -g;
        if (h != 0.0f) d -= choose(p == 0.0f, (vf){0}, p * (logp2 * LN_2 + own)) * h;
        if (i <= y - at && y - at < i + LANES) d[y - at - i] += g;
        save(f->out, at + i, half, d);
    }
}

/* --- a whole step of decoding --------------------------------------------------------------------------------------- */

/* With few rows and a small model each product takes less time than calling it. Rows are independent of each other, so a
 * thread takes its share of them through all layers. Every number is one sum in the order of the inputs, however many rows
 * are computed together, so that a row's bits do not depend on its neighbours. */

#define PANEL (2 * LANES) /* outputs of a product that are computed together */
#define WORTH_A_THREAD 4000000 /* products of numbers, 0.1 ms: waking a thread may take longer than less than that */

typedef struct { /* one decoder layer; weights in panels [outputs / PANEL, inputs, PANEL] */
    const float *norm_in, *qkv, *out, *norm_mlp, *gate_up, *down;
    float *keys, *values; /* [R, K, D, C], [R, K, C, D] */
} Layer;

typedef struct {
    int64_t hidden, inner, vocabulary, columns; /* vocabulary: filled up to whole panels */
    int layers, heads, kv_heads, size;
    float eps;
    const Layer *layer;
    const float *embed, *turns, *norm, *head;
    const int64_t *tokens, *rows, *positions; /* [N] */
    float *logits;                            /* [N, vocabulary] */
} Step;

/* y = (add ? y : 0) + x w of `count` rows, for one panel, of which the first `halves` are outputs. */
INLINE void panel(const float *x, int64_t inputs, const float *w, float *y, int64_t outputs, int add, int count,
                  int halves) {
    vf sum[8][2] = {{{0}}};
    for (int64_t k = 0; k < inputs; k++) {
        const vf low = *(const vfu *)(w + k * PANEL), high = *(const vfu *)(w + k * PANEL + LANES);
        UNROLL(8) for (int r = 0; r < count; r++) {
            sum[r][0] += x[r * inputs + k] * low;
            sum[r][1] += x[r * inputs + k] * high;
        }
    }
    UNROLL(8) for (int r = 0; r < count; r++) for (int i = 0; i < halves; i++) {
        vfu *at = (vfu *)(y + r * outputs + i * LANES);
        if (add)
            *at += sum[r][i];
        else
            *at = sum[r][i];
    }
}

INLINE void product(const float *x, int64_t rows, int64_t inputs, const float *w, float *y, int64_t outputs, int add) {
    for (int64_t c = 0; c < outputs; c += PANEL, w += inputs * PANEL) {
        const int halves = c + LANES < outputs ? 2 : 1;
        int64_t r = 0;
#define TAKE(n) \
    for (; r + n <= rows; r += n) panel(x + r * inputs, inputs, w, y + r * outputs + c, outputs, add, n, halves);
        TAKE(8) TAKE(4) TAKE(2) TAKE(1)
#undef TAKE
    }
}

INLINE void unit(const float *x, int64_t rows, int64_t size, const float *weight, float eps, float *y) {
    for (; rows > 0; rows--, x += size, y += size) {
        vf sum = {0};
        for (int64_t i = 0; i < size; i += LANES) sum += *(const vfu *)(x + i) * *(const vfu *)(x + i);
        const float inverse = 1.0f / sqrtf(sum_lanes(sum) / size + eps);
        for (int64_t i = 0; i < size; i += LANES)
            *(vfu *)(y + i) = *(const vfu *)(x + i) * inverse * *(const vfu *)(weight + i);
    }
}

/* Numbers that a thread works in, of one row. */
static int64_t step_room(const Step *f) {
    const int64_t wide = (f->heads + 2 * f->kv_heads) * f->size, both = 2 * f->inner;
    const int64_t attended = f->heads * f->size > f->inner ? f->heads * f->size : f->inner;
    return 2 * f->hidden + (wide > both ? wide : both) + attended;
}

/* --- for every processor, every size and every task ---------------------------------------------------------------- */

/* Common sizes of a head as constants, which lets the compiler unroll. */
#define BY_SIZE(CALL)           \
    switch (f->size) {          \
        case 8: CALL(8); break;   \
        case 16: CALL(16); break; \
        case 32: CALL(32); break; \
        default: CALL(f->size); \
    }

FOR_EVERY_CPU void rlhf_forward_task(const Forest *f, int64_t group, int kv, Room *room) {
#define CALL(D) forward(f, group, kv, D, room)
    BY_SIZE(CALL)
#undef CALL
}

FOR_EVERY_CPU void rlhf_backward_task(const Forest *f, int64_t group, int kv, Room *room) {
#define CALL(D) backward(f, group, kv, D, room)
    BY_SIZE(CALL)
#undef CALL
}

FOR_EVERY_CPU void rlhf_decode_task(const Decode *f, int64_t n, int kv, float *weights) {
#define CALL(D) decode(f, n, kv, D, weights)
    BY_SIZE(CALL)
#undef CALL
}

FOR_EVERY_CPU void rlhf_norm_task(const Norm *f, int64_t task) {
    const int64_t first = task * ROWS, last = first + ROWS < f->rows ? first + ROWS : f->rows;
    float *dweight = f->dweight ? f->dweight + task * f->size : NULL;
    if (dweight) memset(dweight, 0, 4 * f->size);
    if (f->half)
        norm(f, first, last, 1, dweight);
    else
        norm(f, first, last, 0, dweight);
}

FOR_EVERY_CPU void rlhf_chosen_task(const Chosen *f, int64_t task) {
    for (int64_t r = task * FEW; r < task * FEW + FEW && r < f->rows; r++)
        if (f->half)
            chosen(f, r, 1);
        else
            chosen(f, r, 0);
}

FOR_EVERY_CPU void rlhf_swiglu_task(const Swiglu *f, int64_t task) {
    const int64_t first = task * ROWS, last = first + ROWS < f->rows ? first + ROWS : f->rows;
    if (f->half)
        swiglu(f, first, last, 1);
    else
        swiglu(f, first, last, 0);
}

/* Rows `first` to `last` through all layers; `room` as `step_room` says for each of them, then `columns` numbers. */
FOR_EVERY_CPU void rlhf_step_task(const Step *f, int64_t first, int64_t last, float *room) {
    const int64_t n = last - first, hidden = f->hidden, wide = (f->heads + 2 * f->kv_heads) * f->size;
    float *x = room, *normed = x + n * hidden, *attended = normed + n * hidden;
    float *projected = attended + n * (f->heads * f->size > f->inner ? f->heads * f->size : f->inner);
    float *weights = room + n * step_room(f);
    for (int64_t r = 0; r < n; r++) memcpy(x + r * hidden, f->embed + f->tokens[first + r] * hidden, 4 * hidden);
    for (const Layer *l = f->layer; l < f->layer + f->layers; l++) {
        unit(x, n, hidden, l->norm_in, f->eps, normed);
        product(normed, n, hidden, l->qkv, projected, wide, 0);
        const Decode d = {f->heads, f->kv_heads, f->size, 1, f->columns, f->rows + first, f->positions + first,
                          projected, f->turns, 1.0f / sqrtf(f->size), l->keys, l->values, attended};
        for (int64_t task = 0; task < n * f->kv_heads; task++) {
#define CALL(D) decode(&d, task / f->kv_heads, task % f->kv_heads, D, weights)
            BY_SIZE(CALL)
#undef CALL
        }
        product(attended, n, f->heads * f->size, l->out, x, hidden, 1);
        unit(x, n, hidden, l->norm_mlp, f->eps, normed);
        product(normed, n, hidden, l->gate_up, projected, 2 * f->inner, 0);
        const Swiglu s = {n, f->inner, 0, projected, NULL, attended};
        swiglu(&s, 0, n, 0);
        product(attended, n, f->inner, l->down, x, hidden, 1);
    }
    unit(x, n, hidden, f->norm, f->eps, normed);
    product(normed, n, hidden, f->head, f->logits + first * f->vocabulary, f->vocabulary, 0);
}

/* Raised with every change of the arguments below, and in kernel.py with it. */
int rlhf_version(void) { return 6; }

/* Those with a result return 0, or 1 where there is no memory. */

int rlhf_forest(const int64_t *start, const int64_t *length, const int64_t *parent, const int64_t *first,
                int64_t groups, int64_t most_tokens, int64_t most_segments, int64_t window, int heads, int kv_heads,
                int size, int half, float scale, int threads, const float *turns, const void *rows, void *out,
                float *softmax, const void *grad, void *grad_rows) {
    const Forest f = {start, length, parent, first, groups, heads, kv_heads, size, half, window, scale, turns, rows,
                      out, softmax, grad, grad_rows};
    const int64_t tasks = groups * kv_heads, part = (most_tokens + 8) * size; /* `dot` reads up to 7 keys too many */
    /* A group's heads by one thread where there are enough groups: heads side by side share lines of the cache. */
    const int together = groups >= 4 * threads ? kv_heads : 1;
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        float *numbers = malloc(4 * part * (grad ? 4 : 2));
        Run *runs = malloc(sizeof(Run) * (most_segments + 1));
        const int ready = numbers && runs;
        if (!ready) {
#pragma omp atomic write
            failed = 1;
        }
        Room room = {numbers, numbers + part, numbers + 2 * part, numbers + 3 * part, runs};
#pragma omp for schedule(dynamic, together)
        for (int64_t task = 0; task < tasks; task++) {
            if (!ready) continue;
            if (grad)
                rlhf_backward_task(&f, task / kv_heads, task % kv_heads, &room);
            else
                rlhf_forward_task(&f, task / kv_heads, task % kv_heads, &room);
        }
        free(numbers);
        free(runs);
    }
    return failed;
}

int rlhf_decode(int64_t sequences, int64_t columns, int heads, int kv_heads, int size, int append, float scale,
                int threads, const int64_t *rows, const int64_t *positions, const float *projected,
                const float *turns, float *keys, float *values, float *out) {
    const Decode f = {heads, kv_heads, size, append, columns, rows, positions, projected, turns, scale, keys, values,
                      out};
    const int64_t tasks = sequences * kv_heads;
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        float *weights = malloc(4 * columns);
        if (!weights) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic, 8)
        for (int64_t task = 0; task < tasks; task++)
            if (weights) rlhf_decode_task(&f, task / kv_heads, task % kv_heads, weights);
        free(weights);
    }
    return failed;
}

int rlhf_step(int64_t sequences, int64_t hidden, int64_t inner, int64_t vocabulary, int64_t columns, int layers,
              int heads, int kv_heads, int size, float eps, int threads, const void *layer, const float *embed,
              const float *turns, const float *norm, const float *head, const int64_t *tokens, const int64_t *rows,
              const int64_t *positions, float *logits) {
    const Step f = {hidden, inner, vocabulary, columns, layers, heads, kv_heads, size, eps, layer, embed, turns, norm,
                    head, tokens, rows, positions, logits};
    const int64_t wide = (int64_t)(2 * heads + 2 * kv_heads) * size; /* of all four projections of attention */
    const int64_t products = sequences * (layers * hidden * (wide + 3 * inner) + hidden * vocabulary);
    if (threads > sequences) threads = sequences;
    if (threads > 1 + products / WORTH_A_THREAD) threads = 1 + products / WORTH_A_THREAD;
    const int64_t each = (sequences + threads - 1) / threads;
    int failed = 0;
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
    for (int64_t task = 0; task < threads; task++) {
        const int64_t first = task * each, last = first + each < sequences ? first + each : sequences;
        if (first >= last) continue;
        float *room = malloc(4 * ((last - first) * step_room(&f) + columns));
        if (room)
            rlhf_step_task(&f, first, last, room);
        else {
#pragma omp atomic write
            failed = 1;
        }
        free(room);
    }
    return failed;
}

/* Keys, turned, and values of prompts, tokens one after another without padding, into the rows of their samples. */
void rlhf_store(int64_t prompts, int64_t samples, int64_t columns, int heads, int kv_heads, int size, int threads,
                const int64_t *start, const int64_t *length, const int64_t *rows, const float *projected,
                const float *turns, float *keys, float *values) {
    const int width = heads + 2 * kv_heads;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t task = 0; task < prompts * samples * kv_heads; task++) {
        const int kv = task % kv_heads;
        const int64_t p = task / kv_heads / samples, row = rows[task / kv_heads] * kv_heads + kv;
        const float *own = projected + (start[p] * width + heads + kv) * size;
        float *k = keys + row * size * columns, *v = values + row * size * columns;
        for (int64_t t = 0; t < length[p]; t++, own += width * size) {
            float key[MAX_HEAD];
            memcpy(key, own, 4 * size);
            turn(key, turns + t * size, size, 1.0f);
            for (int d = 0; d < size; d++) k[d * columns + t] = key[d];
            memcpy(v + t * size, own + kv_heads * size, 4 * size);
        }
    }
}

void rlhf_norm(int64_t rows, int64_t size, int half, float eps, int threads, const void *x, const float *weight,
               void *out, float *inverse, const void *grad, float *dweight) {
    const Norm f = {rows, size, half, eps, x, grad, weight, out, inverse, dweight};
#pragma omp parallel for num_threads(threads) schedule(static) if (rows > ROWS)
    for (int64_t task = 0; task < (rows + ROWS - 1) / ROWS; task++) rlhf_norm_task(&f, task);
}

void rlhf_swiglu(int64_t rows, int64_t size, int half, int threads, const void *x, void *out, const void *grad) {
    const Swiglu f = {rows, size, half, x, grad, out};
#pragma omp parallel for num_threads(threads) schedule(static) if (rows > ROWS)
    for (int64_t task = 0; task < (rows + ROWS - 1) / ROWS; task++) rlhf_swiglu_task(&f, task);
}

void rlhf_chosen(int64_t rows, int64_t size, int half, float inverse, int threads, const void *logits, const int64_t *ids,
                 float *normaliser, float *logp, float *entropy, const float *grad, const float *grad_entropy, void *out) {
    const Chosen f = {rows, size, half, inverse, logits, ids, normaliser, logp, entropy, grad, grad_entropy, out};
#pragma omp parallel for num_threads(threads) schedule(static) if (rows > FEW)
    for (int64_t task = 0; task < (rows + FEW - 1) / FEW; task++) rlhf_chosen_task(&f, task);
}
