/* The pool's threads: n_threads - 1 of them and the caller do the parts of a run together. Any thread takes any part; the
 * caller takes parts too, and goes on as soon as all are done. So it never waits for a thread to wake up, only for parts
 * that a thread has begun: where all of it is shorter than a wake-up (100 us and more in virtual machines), the caller
 * does it alone.
 *
 *     ticket, one atomic number:  | number of the run, 32 bits | parts, 16 bits | next part, 16 bits |
 *
 * Taking a part is adding 1 to the ticket by compare-and-exchange, which fails if the run has changed meanwhile.
 * Threads without a part spin for a moment, in case the next run comes at once, then sleep until the caller begins anew:
 * its own threads need the cores.
 */
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "pool.h"
#include "step.h"

/* Rounds of spinning before sleep: 20 to 200 us, by the processor's pause instruction. Longer than what a caller does
 * between two calls of a decode step (some us; with 500 rounds a step of 11.5 ms took 0.5 ms more). */
#define SPIN_ROUNDS 2000

#define MAX_THREADS 0xFFFFu /* parts have 16 bits of the ticket */

struct ksort_pool {
    uint32_t n_threads; /* with the caller */
    uint32_t n_started;
    pthread_t *threads;      /* [n_started] */
    struct ksort_step *step; /* the caller's, in the pool so that no call allocates */
    pool_function *function; /* of the run; written, like context, by the caller while no part is being done */
    const void *context;
    uint32_t n_runs; /* the caller's count */
    _Atomic uint64_t ticket;
    atomic_uint n_done; /* parts of the run */
    atomic_int status;  /* since the caller began: the first that is not KSORT_OK */
    atomic_uint n_begun;
    atomic_uint n_sleeping;
    bool stopping; /* under the mutex */
    pthread_mutex_t mutex;
    pthread_cond_t wake;
};

static void spin_pause(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static uint64_t ticket_of(uint32_t run, uint32_t n_parts)
{
    return (uint64_t)run << 32 | (uint64_t)n_parts << 16;
}

static uint32_t ticket_parts(uint64_t ticket)
{
    return (uint32_t)ticket >> 16;
}

static uint32_t ticket_part(uint64_t ticket)
{
    return (uint32_t)ticket & 0xFFFFu;
}

/* Takes and does one part of the current run; false if none is left. */
static bool do_next_part(struct ksort_pool *pool)
{
    uint64_t ticket = atomic_load(&pool->ticket);
    do {
        if (ticket_part(ticket) >= ticket_parts(ticket))
            return false;
    } while (!atomic_compare_exchange_weak(&pool->ticket, &ticket, ticket + 1));
    ksort_status status = pool->function(pool->context, ticket_part(ticket), ticket_parts(ticket));
    int ok = KSORT_OK;
    if (status != KSORT_OK)
        atomic_compare_exchange_strong(&pool->status, &ok, status);
    atomic_fetch_add(&pool->n_done, 1);
    return true;
}

/* Waits until the caller begins after number `seen`. A thread counts itself as sleeping before it looks at n_begun a last
 * time, and the caller counts before it looks for sleepers: one of them sees the other. False: the pool ends. */
static bool sleep_until_begun(struct ksort_pool *pool, unsigned seen)
{
    pthread_mutex_lock(&pool->mutex);
    atomic_fetch_add(&pool->n_sleeping, 1);
    while (!pool->stopping && atomic_load(&pool->n_begun) == seen)
        pthread_cond_wait(&pool->wake, &pool->mutex);
    atomic_fetch_sub(&pool->n_sleeping, 1);
    bool stopping = pool->stopping;
    pthread_mutex_unlock(&pool->mutex);
    return !stopping;
}

static void *worker_main(void *argument)
{
    struct ksort_pool *pool = argument;
    unsigned seen;
    do {
        seen = atomic_load(&pool->n_begun);
        for (int idle_rounds = 0; idle_rounds < SPIN_ROUNDS; idle_rounds++) {
            if (do_next_part(pool))
                idle_rounds = 0;
            spin_pause();
        }
    } while (sleep_until_begun(pool, seen));
    return NULL;
}

static void wake_sleepers(struct ksort_pool *pool)
{
    if (atomic_load(&pool->n_sleeping) == 0)
        return;
    pthread_mutex_lock(&pool->mutex);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->mutex);
}

ksort_status ksort_pool_run(struct ksort_pool *pool, pool_function *function, const void *context, uint32_t n_parts)
{
    pool->function = function;
    pool->context = context;
    atomic_store(&pool->n_done, 0);
    atomic_store(&pool->ticket, ticket_of(++pool->n_runs, n_parts));
    while (do_next_part(pool)) {
    }
    for (int rounds = 0; atomic_load(&pool->n_done) < n_parts; rounds++) {
        if (rounds < SPIN_ROUNDS)
            spin_pause();
        else
            sched_yield(); /* a part takes long, or its thread lost its core: perhaps to this one */
    }
    return (ksort_status)atomic_load(&pool->status);
}

struct ksort_step *ksort_pool_step_memory(struct ksort_pool *pool)
{
    return pool->step;
}

uint32_t ksort_pool_threads(const struct ksort_pool *pool)
{
    return pool->n_threads;
}

void ksort_pool_begin(struct ksort_pool *pool)
{
    atomic_store(&pool->status, KSORT_OK);
    atomic_fetch_add(&pool->n_begun, 1);
    wake_sleepers(pool);
}

static bool init_pool(struct ksort_pool *pool, uint32_t n_threads)
{
    pool->n_threads = n_threads;
    atomic_init(&pool->ticket, ticket_of(0, 0)); /* no part to take */
    pool->threads = calloc(n_threads, sizeof *pool->threads);
    pool->step = malloc(ksort_step_bytes());
    if (pool->threads && pool->step && pthread_mutex_init(&pool->mutex, NULL) == 0) {
        if (pthread_cond_init(&pool->wake, NULL) == 0)
            return true;
        pthread_mutex_destroy(&pool->mutex);
    }
    free(pool->threads);
    free(pool->step);
    return false;
}

ksort_status ksort_pool_create(uint32_t n_threads, ksort_pool **pool)
{
    if (n_threads == 0 || n_threads > MAX_THREADS || !pool)
        return KSORT_ERR_ARGUMENT;
    struct ksort_pool *created = calloc(1, sizeof *created);
    if (!created)
        return KSORT_ERR_THREADS;
    if (!init_pool(created, n_threads)) {
        free(created);
        return KSORT_ERR_THREADS;
    }
    for (; created->n_started < n_threads - 1; created->n_started++)
        if (pthread_create(&created->threads[created->n_started], NULL, worker_main, created)) {
            ksort_pool_destroy(created);
            return KSORT_ERR_THREADS;
        }
    *pool = created;
    return KSORT_OK;
}

void ksort_pool_destroy(ksort_pool *pool)
{
    if (!pool)
        return;
    pthread_mutex_lock(&pool->mutex);
    pool->stopping = true;
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->mutex);
    for (uint32_t i = 0; i < pool->n_started; i++)
        pthread_join(pool->threads[i], NULL);
    pthread_cond_destroy(&pool->wake);
    pthread_mutex_destroy(&pool->mutex);
    free(pool->threads);
    free(pool->step);
    free(pool);
}
