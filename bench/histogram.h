/* A histogram of microseconds: 64 buckets for each doubling, so a percentile is at most 1.6 % above the truth. */
#ifndef BENCH_HISTOGRAM_H
#define BENCH_HISTOGRAM_H

#include <stdint.h>

enum { FINE_BITS = 6, FINE = 1 << FINE_BITS };

struct histogram {
    uint64_t bucket[(64 - FINE_BITS + 1) * FINE];
    uint64_t count, max;
};

static inline void histogram_add(struct histogram *h, uint64_t us)
{
    unsigned doubling = us < FINE ? 0 : 63 - (unsigned)__builtin_clzll(us) - FINE_BITS + 1;
    unsigned fine = doubling ? (us >> (doubling - 1)) & (FINE - 1) : (unsigned)us;
    h->bucket[doubling * FINE + fine]++;
    h->count++;
    if (us > h->max)
        h->max = us;
}

/* The upper edge of the bucket in which the given share (0 to 1) of the values is reached; 0 without values. */
static inline uint64_t histogram_percentile(const struct histogram *h, double share)
{
    uint64_t seen = 0, wanted = (uint64_t)(share * (double)h->count + 0.999999);
    for (unsigned i = 0; h->count && i < sizeof h->bucket / sizeof *h->bucket; i++) {
        seen += h->bucket[i];
        if (seen < wanted)
            continue;
        unsigned doubling = i / FINE;
        uint64_t fine = i % FINE;
        uint64_t edge = doubling ? ((fine + FINE + 1) << (doubling - 1)) - 1 : fine;
        return edge < h->max ? edge : h->max;
    }
    return h->max;
}

#endif
