/* A pass of a Llama-type decoder over n tokens on a CPU, float32: the newest tokens of many replies, each with its own adapter, or a prompt.
 *
 * torch needs some hundred operations for it, told one by one, which for a small model take longer than the arithmetic. What
 * a token gets does not depend on the others beside it, nor on the number of threads: every sum is added up in one order. Called by
 * `engine/native.py`, which owns the memory and says what each thing is; weights stay where and as torch has them.
 */
#define _GNU_SOURCE
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#ifdef __AVX2__
#include <immintrin.h>
#define PAUSE() _mm_pause()
#define KEEP(v) __asm__("" : "+x"(v)) /* in a register: compilers rather read it again, and reading is what takes the time (37 -> 63 GFLOPS) */
#else
#define PAUSE() ((void)0)
#define KEEP(v) ((void)0)
#endif
#define INLINE static inline __attribute__((always_inline))
#define BLOCK 32   /* weights of 8 bits with a scale of their own */
#define OUTPUTS 64 /* of a product that a thread takes at a time */
#define HELPERS 63 /* threads beside the caller's, at most */

typedef float v8 __attribute__((vector_size(32)));
typedef int32_t i8 __attribute__((vector_size(32)));
typedef float u8v __attribute__((vector_size(32), aligned(4), may_alias)); /* at any address */
typedef int16_t h16 __attribute__((vector_size(32)));
typedef int16_t u16h __attribute__((vector_size(32), aligned(2), may_alias));

typedef struct {              /* y = x W^T + bias, and for rows with an adapter + (x A^T) B */
    const float *w, *bias;    /* (out, in), (out) or none */
    const int8_t *q;          /* (out, in), or none: W in 8 bits, each BLOCK of a row times its scale */
    const float *scales;      /* (out, in / BLOCK) */
    const float *a, *b;       /* every adapter's, end to end: (R, in), (R, out); none where no adapter touches the layer */
    const int32_t *ranks;     /* R of each adapter */
    int64_t in, out;
} Product;

typedef struct {
    const float *norm_1, *q_norm, *k_norm, *norm_2; /* q_norm, k_norm: none but for Qwen3 */
    Product qkv, o, gate_up, down;
} Layer;

typedef struct {
    int64_t layers, dim, heads, kv_heads, head_dim;
    double eps;
    const float *embed, *norm, *inv_freq; /* (V, dim), (dim), (head_dim): the first half negated */
} Model;

typedef struct {
    int64_t n, threads;
    const int64_t *ids, *rows, *at; /* (n): the token, which row of the cache it is in, and where there: those before it are there, or among these n */
    const int32_t *choice;          /* (n): which adapter, -1 for none; or none for no adapters at all */
    float *keys, *values;           /* (layers, rows, kv_heads, length, head_dim) */
    int64_t by_layer, by_row, by_head; /* strides in numbers */
    float *hidden;                  /* (n, dim), the result */
} Step;

/* -- Threads: the caller takes chunks of a phase itself, and those that wake in time take some. ------------------------------------- */

typedef void (*Job)(const void *what, int64_t chunk);

static struct {
    pthread_mutex_t used, lock;
    pthread_cond_t wake;
    pid_t owner;
    int64_t made, wanted, round;
    _Atomic int active;
    _Atomic uint64_t ticket; /* phase << 32 | chunks << 16 | next chunk: a claim holds for its own phase alone */
    _Atomic int64_t done;
    Job job;
    const void *what;
#ifdef __linux__
    cpu_set_t cores;
#endif
} team = {.used = PTHREAD_MUTEX_INITIALIZER, .lock = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};

#ifdef __linux__ /* OpenMP may bind the caller to one core, which a thread made later would share with it */
__attribute__((constructor)) static void note_cores(void) { sched_getaffinity(0, sizeof team.cores, &team.cores); }
#endif

INLINE int claim(int64_t *chunk) {
    uint64_t t = atomic_load_explicit(&team.ticket, memory_order_acquire);
    while ((t & 0xffff) < (t >> 16 & 0xffff))
        if (atomic_compare_exchange_weak_explicit(&team.ticket, &t, t + 1, memory_order_acq_rel, memory_order_acquire)) {
            *chunk = t & 0xffff;
            return 1;
        }
    return 0;
}

INLINE void work(int64_t chunk) {
    team.job(team.what, chunk);
    atomic_fetch_add_explicit(&team.done, 1, memory_order_release);
}

static void *helper(void *at) {
    int64_t me = (int64_t)(intptr_t)at, seen = 0, chunk;
#ifdef __linux__
    pthread_setaffinity_np(pthread_self(), sizeof team.cores, &team.cores);
#endif
    for (;;) {
        pthread_mutex_lock(&team.lock);
        while (team.round == seen || me >= team.wanted) {
            seen = team.round;
            pthread_cond_wait(&team.wake, &team.lock);
        }
        seen = team.round;
        pthread_mutex_unlock(&team.lock);
        for (int idle = 0; atomic_load_explicit(&team.active, memory_order_acquire);) {
            if (claim(&chunk)) {
                work(chunk);
                idle = 0;
            } else if (++idle % 4096)
                PAUSE();
            else
                sched_yield();
        }
    }
    return NULL;
}

/* Have up to `threads` threads for what follows; 0 where another step has them. */
static int gather(int64_t threads) {
    if (threads < 2 || pthread_mutex_trylock(&team.used)) return 0;
    if (team.owner != getpid()) team.owner = getpid(), team.made = 0; /* a forked process has none of its parent's */
    threads = threads - 1 < HELPERS ? threads - 1 : HELPERS;
    pthread_t thread;
    while (team.made < threads && !pthread_create(&thread, NULL, helper, (void *)(intptr_t)team.made)) {
        pthread_detach(thread);
        team.made++;
    }
    atomic_store(&team.ticket, (atomic_load(&team.ticket) >> 32) << 32);
    pthread_mutex_lock(&team.lock);
    team.wanted = threads, team.round++;
    atomic_store(&team.active, 1);
    pthread_cond_broadcast(&team.wake);
    pthread_mutex_unlock(&team.lock);
    return 1;
}

static void dismiss(int gathered) {
    if (!gathered) return;
    atomic_store_explicit(&team.active, 0, memory_order_release);
    pthread_mutex_unlock(&team.used);
}

static void each(int gathered, int64_t chunks, Job job, const void *what) {
    int64_t chunk;
    if (!gathered || chunks == 1 || chunks > 0xffff) {
        for (chunk = 0; chunk < chunks; chunk++) job(what, chunk);
        return;
    }
    team.job = job, team.what = what;
    atomic_store_explicit(&team.done, 0, memory_order_relaxed);
    uint64_t phase = (atomic_load(&team.ticket) >> 32) + 1;
    atomic_store_explicit(&team.ticket, phase << 32 | (uint64_t)chunks << 16, memory_order_release);
    while (claim(&chunk)) work(chunk);
    for (int idle = 0; atomic_load_explicit(&team.done, memory_order_acquire) < chunks;)
        if (++idle % 4096)
            PAUSE();
        else
            sched_yield();
}

/* -- Numbers, eight at a time ------------------------------------------------------------------------------------------------------- */

INLINE v8 load(const float *p) { return *(const u8v *)p; }
INLINE void store(float *p, v8 x) { *(u8v *)p = x; }
INLINE v8 all(float x) { return (v8){x, x, x, x, x, x, x, x}; }
INLINE v8 either(i8 mask, v8 yes, v8 no) { return (v8)((mask & (i8)yes) | (~mask & (i8)no)); }

#ifdef __clang__
#define MIX(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define MIX(a, b, ...) __builtin_shuffle(a, b, (i8){__VA_ARGS__})
#endif

/* The sums of eight vectors. */
INLINE v8 sums(const v8 *x) {
    v8 u[2];
    for (int h = 0; h < 2; h++) {
        v8 t[2];
        for (int i = 0; i < 2; i++) {
            v8 a = x[4 * h + 2 * i], b = x[4 * h + 2 * i + 1];
            t[i] = MIX(a, b, 0, 8, 1, 9, 4, 12, 5, 13) + MIX(a, b, 2, 10, 3, 11, 6, 14, 7, 15);
        }
        u[h] = MIX(t[0], t[1], 0, 1, 8, 9, 4, 5, 12, 13) + MIX(t[0], t[1], 2, 3, 10, 11, 6, 7, 14, 15);
    }
    return MIX(u[0], u[1], 0, 1, 2, 3, 8, 9, 10, 11) + MIX(u[0], u[1], 4, 5, 6, 7, 12, 13, 14, 15);
}

INLINE float sum(v8 x) {
    float s = 0;
    for (int i = 0; i < 8; i++) s += x[i];
    return s;
}

/* e^x to 2 units in the last place, by 2^i and a polynomial on [-ln 2 / 2, ln 2 / 2] (Cephes); e^-87 for less; NaN stays NaN. */
INLINE v8 exponential(v8 x) {
    x = either(x < -87.0f, all(-87.0f), x);
    x = either(x > 88.0f, all(88.0f), x);
    v8 t = x * 1.44269504f + 12582912.0f, i = t - 12582912.0f; /* 1.5 * 2^23: rounds to a whole number */
    v8 r = x - i * 0.693359375f + i * 2.12194440e-4f;
    v8 p = ((((1.9875691500e-4f * r + 1.3981999507e-3f) * r + 8.3334519073e-3f) * r + 4.1665795894e-2f) * r + 1.6666665459e-1f) * r + 0.5f;
    p = p * r * r + r + 1.0f;
    return p * (v8)(((i8)t - 0x4b400000 + 127) << 23);
}

/* rows of x (n, dim) to unit mean square, times w */
static void rms_norm(const float *x, const float *w, float *y, int64_t n, int64_t dim, double eps) {
    for (int64_t j = 0; j < n; j++, x += dim, y += dim) {
        v8 squares = all(0);
        for (int64_t k = 0; k < dim; k += 8) squares += load(x + k) * load(x + k);
        float scale = 1.0f / sqrtf(sum(squares) / dim + (float)eps);
        for (int64_t k = 0; k < dim; k += 8) store(y + k, load(x + k) * scale * load(w + k));
    }
}

#ifdef __AVX2__
INLINE h16 widened(const int8_t *p) { return (h16)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)p)); }
INLINE i8 dots(h16 a, h16 b) { return (i8)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
#else
INLINE h16 widened(const int8_t *p) {
    h16 x;
    for (int i = 0; i < 16; i++) x[i] = p[i];
    return x;
}
INLINE i8 dots(h16 a, h16 b) { /* of neighbours: a0 b0 + a1 b1, ... */
    i8 s;
    for (int i = 0; i < 8; i++) s[i] = a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
    return s;
}
#endif

/* rows of x (n, dim) in 16 bits, and what each is to be multiplied with */
static void to_16_bits(const float *x, int16_t *q, float *scales, int64_t n, int64_t dim) {
    for (int64_t j = 0; j < n; j++, x += dim, q += dim) {
        float most = 0;
        for (int64_t k = 0; k < dim; k++) most = fabsf(x[k]) > most || x[k] != x[k] ? fabsf(x[k]) : most; /* a NaN stays */
        float per = most > 0 ? 32767.0f / most : 0;
        scales[j] = most == most && most <= 3.4e38f ? most / 32767.0f : NAN; /* a row that broke down stays one */
        for (int64_t k = 0; k < dim; k++) q[k] = (int16_t)(int32_t)rintf(x[k] * (per < 1e38f ? per : 0));
    }
}

/* -- Products ----------------------------------------------------------------------------------------------------------------------- */

/* `rows` rows of w, by their addresses, with n rows of x, rows * n <= 12: result i * n + j is of w's i-th and x's j-th. */
INLINE void tile(const float *const *w, int rows, const float *x, int n, int64_t in, v8 *got) {
    v8 s[16] = {};
    for (int64_t k = 0; k < in; k += 8) {
        v8 a[8];
        for (int i = 0; i < rows; i++) a[i] = load(w[i] + k);
        for (int j = 0; j < n; j++) {
            v8 b = load(x + j * in + k);
            KEEP(b);
            for (int i = 0; i < rows; i++) s[i * n + j] += a[i] * b;
        }
    }
    got[0] = sums(s);
    if (rows * n > 8) got[1] = sums(s + 8);
}

/* The same with w in 8 bits and x in 16, whose products add up exactly; `scales` are those of w's rows, x's is its caller's. */
INLINE v8 tile_q(const int8_t *const *w, const float *const *scales, int rows, const int16_t *x, int n, int64_t in) {
    v8 s[8] = {};
    for (int64_t k = 0; k < in; k += BLOCK) {
        h16 a[8][2];
        for (int i = 0; i < rows; i++) a[i][0] = widened(w[i] + k), a[i][1] = widened(w[i] + k + 16);
        for (int j = 0; j < n; j++) {
            h16 b = *(const u16h *)(x + j * in + k), c = *(const u16h *)(x + j * in + k + 16);
            for (int i = 0; i < rows; i++)
                s[i * n + j] += __builtin_convertvector(dots(a[i][0], b) + dots(a[i][1], c), v8) * scales[i][k / BLOCK];
        }
    }
    return sums(s);
}

typedef struct {
    const float *w; /* in 32 bits, */
    const int8_t *q; /* or in 8 */
    const float *scales;
} Weights;

typedef struct {
    const float *x;
    const int16_t *q; /* x in 16 bits, for weights in 8 */
    const float *scales;
} Input;

/* y[j * stride + i] = x_j . w_i for `count` rows of w that follow each other, and n rows of x. The rows of a tile are far apart, so
 * that from tile to tile each goes on where it was in memory: processors fetch ahead what is read in order. */
INLINE void tiles(const Weights w, int64_t count, int rows, const Input x, int n, int64_t in, float *y, int64_t stride) {
    int64_t share = (count + rows - 1) / rows;
    for (int64_t i = 0; i < share; i++) {
        int64_t row[8];
        for (int e = 0; e < rows; e++) row[e] = e * share + i < count ? e * share + i : count - 1;
        v8 both[2];
        if (w.q) {
            const int8_t *at[8];
            const float *scales[8];
            for (int e = 0; e < rows; e++) at[e] = w.q + row[e] * in, scales[e] = w.scales + row[e] * (in / BLOCK);
            both[0] = tile_q(at, scales, rows, x.q, n, in);
        } else {
            const float *at[8];
            for (int e = 0; e < rows; e++) at[e] = w.w + row[e] * in;
            tile(at, rows, x.x, n, in, both);
        }
        const float *got = (const float *)both;
        for (int e = 0; e < rows && e * share + i < count; e++)
            for (int j = 0; j < n; j++) y[j * stride + e * share + i] = w.q ? got[e * n + j] * x.scales[j] : got[e * n + j];
    }
}

typedef struct {
    const Product *p;
    const float *x, *low, *add; /* (n, in); (n, most), x A^T; (n, out) to add, or none */
    float *y;                   /* (n, out), or (n, out / 2) */
    int16_t *q;                 /* room for x in 16 bits, and its scales */
    float *scales;
    int64_t n, most;
    const int32_t *choice;
    int gated; /* the first half of the outputs are gates of the second: SwiGLU */
} Linear;

INLINE int64_t rank_of(const Linear *l, int64_t row, int64_t *before) {
    int32_t choice = l->p->a && l->choice ? l->choice[row] : -1;
    *before = 0;
    for (int32_t i = 0; i < choice; i++) *before += l->p->ranks[i];
    return choice < 0 ? 0 : l->p->ranks[choice];
}

/* x A^T of one row */
static void low_rank(const void *what, int64_t row) {
    const Linear *l = what;
    int64_t before, rank = rank_of(l, row, &before), in = l->p->in;
    if (rank) tiles((Weights){.w = l->p->a + before * in}, rank, 8, (Input){.x = l->x + row * in}, 1, in, (float *)l->low + row * l->most, 0);
}

/* y += low B over `count` outputs from b on */
INLINE void add_low(float *y, int64_t count, const float *low, const float *b, int64_t rank, int64_t out) {
    int64_t o = 0;
    for (; o + 32 <= count; o += 32) {
        v8 s[4] = {};
        for (int64_t t = 0; t < rank; t++)
            for (int i = 0; i < 4; i++) s[i] += load(b + t * out + o + 8 * i) * low[t];
        for (int i = 0; i < 4; i++) store(y + o + 8 * i, load(y + o + 8 * i) + s[i]);
    }
    for (; o < count; o++) {
        float s = 0;
        for (int64_t t = 0; t < rank; t++) s = fmaf(b[t * out + o], low[t], s);
        y[o] += s;
    }
}

/* One chunk of the outputs: OUTPUTS of them, or half as many gates and what they are for. */
static void linear(const void *what, int64_t chunk) {
    const Linear *l = what;
    const Product *p = l->p;
    int64_t in = p->in, halves = l->gated ? 2 : 1, half = OUTPUTS / halves, wide = p->out / halves;
    int64_t from = chunk * half, count = wide - from < half ? wide - from : half;
    float got[4][OUTPUTS] = {};
    for (int64_t row = 0; row < l->n; row += 4) {
        int n = l->n - row < 4 ? (int)(l->n - row) : 4;
        for (int64_t h = 0; h < halves; h++) {
            int64_t first = h * wide + from;
            Weights w = p->q ? (Weights){.q = p->q + first * in, .scales = p->scales + first * (in / BLOCK)} : (Weights){.w = p->w + first * in};
            Input x = {l->x + row * in, l->q + row * in, l->scales + row};
            float *y = got[0] + h * half;
            if (n == 4 && !w.q) tiles(w, count, 3, x, 4, in, y, OUTPUTS); /* 8 bits need more registers a product */
            else if (n == 4) tiles(w, count, 2, x, 4, in, y, OUTPUTS);
            else if (n == 3) tiles(w, count, 2, x, 3, in, y, OUTPUTS);
            else if (n == 2) tiles(w, count, 4, x, 2, in, y, OUTPUTS);
            else tiles(w, count, 8, x, 1, in, y, OUTPUTS);
        }
        for (int j = 0; j < n; j++) {
            int64_t before, rank = rank_of(l, row + j, &before);
            for (int64_t h = 0; h < halves; h++) {
                float *y = got[j] + h * half;
                int64_t first = h * wide + from;
                for (int64_t i = 0; p->bias && i < count; i++) y[i] += p->bias[first + i];
                if (rank) add_low(y, count, l->low + (row + j) * l->most, p->b + before * p->out + first, rank, p->out);
            }
            for (int64_t i = 0; l->gated && i < half; i += 8) {
                v8 gate = load(got[j] + i);
                store(got[j] + i, gate / (1.0f + exponential(-gate)) * load(got[j] + half + i));
            }
            float *y = l->y + (row + j) * wide + from;
            const float *add = l->add ? l->add + (row + j) * wide + from : NULL;
            for (int64_t i = 0; i < count; i++) y[i] = got[j][i] + (add ? add[i] : 0);
        }
    }
}

static void product(int gathered, Linear l) {
    int64_t before, some = 0;
    for (int64_t j = 0; j < l.n; j++) some |= rank_of(&l, j, &before);
    if (some) each(gathered, l.n, low_rank, &l);
    if (l.p->q) to_16_bits(l.x, l.q, l.scales, l.n, l.p->in);
    each(gathered, (l.p->out + OUTPUTS - 1) / OUTPUTS, linear, &l);
}

/* -- Attention ---------------------------------------------------------------------------------------------------------------------- */

typedef struct {
    const Model *m;
    const Layer *layer;
    const Step *s;
    int64_t index;
    float *qkv;            /* (n, (heads + 2 kv_heads) head_dim) */
    const float *cos, *sin; /* (n, head_dim) */
    float *seen;           /* (n, heads head_dim) */
} Attention;

/* One head of one token: norm (Qwen3) and rotation, in place. The sine's first half comes negated. */
INLINE void place(float *x, const float *norm, const float *cos, const float *sin, int64_t d, double eps) {
    float turned[d];
    if (norm) rms_norm(x, norm, x, 1, d, eps);
    for (int64_t i = 0; i < d; i++) turned[i] = x[i] * cos[i] + x[i < d / 2 ? i + d / 2 : i - d / 2] * sin[i];
    memcpy(x, turned, 4 * d);
}

/* y = sum of p[s] v[s] over `wide` vectors of eight */
INLINE void weigh(const float *p, const float *v, int64_t count, int64_t d, int wide, float scale, float *y) {
    v8 s[8] = {};
    for (int64_t t = 0; t < count; t++)
        for (int i = 0; i < wide; i++) s[i] += load(v + t * d + 8 * i) * p[t];
    for (int i = 0; i < wide; i++) store(y + 8 * i, s[i] * scale);
}

INLINE float *cached(float *all, const Attention *a, int64_t token, int64_t head) {
    return all + a->index * a->s->by_layer + a->s->rows[token] * a->s->by_row + head * a->s->by_head;
}

/* One key-value head of one token: into the cache. */
static void keep(const void *what, int64_t chunk) {
    const Attention *a = what;
    const Model *m = a->m;
    int64_t d = m->head_dim, token = chunk / m->kv_heads, head = chunk % m->kv_heads, at = a->s->at[token] * d;
    float *k = a->qkv + (token * (m->heads + 2 * m->kv_heads) + m->heads + head) * d;
    place(k, a->layer->k_norm, a->cos + token * d, a->sin + token * d, d, m->eps);
    memcpy(cached(a->s->keys, a, token, head) + at, k, 4 * d);
    memcpy(cached(a->s->values, a, token, head) + at, k + m->kv_heads * d, 4 * d);
}

/* The queries of one token that share a key-value head. */
static void attend(const void *what, int64_t chunk) {
    const Attention *a = what;
    const Model *m = a->m;
    static _Thread_local float *scores;
    static _Thread_local int64_t room;
    int64_t d = m->head_dim, group = m->heads / m->kv_heads, token = chunk / m->kv_heads, head = chunk % m->kv_heads;
    int64_t at = a->s->at[token], count = at + 1;
    float *qkv = a->qkv + token * (m->heads + 2 * m->kv_heads) * d;
    const float *cos = a->cos + token * d, *sin = a->sin + token * d;
    const float *keys = cached(a->s->keys, a, token, head), *values = cached(a->s->values, a, token, head);
    if (room < count + 8) {
        free(scores);
        room = 2 * count + 8;
        if (!(scores = malloc(4 * room))) abort();
    }
    for (int64_t g = 0; g < group; g++) {
        float *q = qkv + (head * group + g) * d, *y = a->seen + (token * m->heads + head * group + g) * d;
        place(q, a->layer->q_norm, cos, sin, d, m->eps);
        float scale = 1.0f / sqrtf(d);
        v8 top = all(-INFINITY), total = all(0);
        for (int64_t t = 0; t < count; t += 8) {
            const float *each_key[8];
            for (int i = 0; i < 8; i++) each_key[i] = keys + (t + i < count ? t + i : at) * d;
            v8 got;
            tile(each_key, 8, q, 1, d, &got);
            got *= scale;
            store(scores + t, got); /* beyond the last: the last one's again, cleared below */
            top = either(got > top, got, top);
        }
        float highest = top[0];
        for (int i = 1; i < 8; i++) highest = top[i] > highest ? top[i] : highest;
        for (int64_t t = count; t % 8; t++) scores[t] = -INFINITY;
        for (int64_t t = 0; t < count; t += 8) {
            v8 p = exponential(load(scores + t) - highest);
            store(scores + t, p);
            total += p;
        }
        int64_t i = 0;
        float part = 1.0f / sum(total);
        for (; i + 64 <= d; i += 64) weigh(scores, values + i, count, d, 8, part, y + i);
        for (; i + 32 <= d; i += 32) weigh(scores, values + i, count, d, 4, part, y + i);
        for (; i < d; i += 8) weigh(scores, values + i, count, d, 1, part, y + i);
    }
}

#ifdef BUILT_FROM
const char decode_built_from[] = BUILT_FROM; /* sha256 of this file */
#else
const char decode_built_from[] = "";
#endif

/* -- What is called ----------------------------------------------------------------------------------------------------------------- */

/* 0, or 1 where there is no memory for it. */
int decode_step(const Model *m, const Layer *layers, const Step *s) {
    int64_t n = s->n, d = m->head_dim, dim = m->dim, wide = (m->heads + 2 * m->kv_heads) * d, most = 8, inner = 0;
    for (int64_t i = 0; i < m->layers; i++) {
        const Product *each_one[4] = {&layers[i].qkv, &layers[i].o, &layers[i].gate_up, &layers[i].down};
        inner = layers[i].down.in > inner ? layers[i].down.in : inner;
        for (int j = 0; j < 4 && s->choice; j++)
            for (int64_t r = 0; r < n; r++)
                if (each_one[j]->a && s->choice[r] >= 0 && each_one[j]->ranks[s->choice[r]] > most) most = each_one[j]->ranks[s->choice[r]];
    }
    most = (most + 7) / 8 * 8;
    int64_t broad = inner > dim ? inner : dim; /* of what is put into 16 bits */
    broad = m->heads * d > broad ? m->heads * d : broad;
    float *memory = malloc(4 * n * (2 * dim + wide + m->heads * d + inner + most + 2 * d) + (2 * broad + 4) * n), *at = memory;
    if (!memory) return 1;
    float *x = at, *normed = (at += n * dim), *qkv = (at += n * dim), *seen = (at += n * wide), *act = (at += n * m->heads * d);
    float *low = (at += n * inner), *cos = (at += n * most), *sin = at + n * d, *scales = sin + n * d;
    int16_t *q = (int16_t *)(scales + n);
    for (int64_t j = 0; j < n; j++) {
        memcpy(x + j * dim, m->embed + s->ids[j] * dim, 4 * dim);
        for (int64_t i = 0; i < d; i++) {
            float angle = (float)s->at[j] * m->inv_freq[i];
            cos[j * d + i] = cosf(angle), sin[j * d + i] = sinf(angle);
        }
    }
    int gathered = gather(s->threads);
    for (int64_t i = 0; i < m->layers; i++) {
        const Layer *l = layers + i;
        rms_norm(x, l->norm_1, normed, n, dim, m->eps);
        product(gathered, (Linear){.p = &l->qkv, .x = normed, .y = qkv, .low = low, .most = most, .q = q, .scales = scales, .n = n, .choice = s->choice});
        Attention attention = {m, l, s, i, qkv, cos, sin, seen};
        each(gathered, n * m->kv_heads, keep, &attention);
        each(gathered, n * m->kv_heads, attend, &attention);
        product(gathered, (Linear){.p = &l->o, .x = seen, .add = x, .y = x, .low = low, .most = most, .q = q, .scales = scales, .n = n, .choice = s->choice});
        rms_norm(x, l->norm_2, normed, n, dim, m->eps);
        product(gathered, (Linear){.p = &l->gate_up, .x = normed, .y = act, .low = low, .most = most, .q = q, .scales = scales, .n = n, .choice = s->choice, .gated = 1});
        product(gathered, (Linear){.p = &l->down, .x = act, .add = x, .y = x, .low = low, .most = most, .q = q, .scales = scales, .n = n, .choice = s->choice});
    }
    dismiss(gathered);
    rms_norm(x, m->norm, s->hidden, n, dim, m->eps);
    free(memory);
    return 0;
}

/* y (n, out) = x (n, in) W^T; 0, or 1 where there is no memory for it. */
int decode_product(const Product *p, const float *x, float *y, int64_t n, int64_t threads) {
    float *memory = p->q ? malloc((4 + 2 * p->in) * n) : NULL;
    if (p->q && !memory) return 1;
    int gathered = gather(threads);
    product(gathered, (Linear){.p = p, .x = x, .y = y, .n = n, .scales = memory, .q = (int16_t *)(memory + n)});
    dismiss(gathered);
    free(memory);
    return 0;
}
