/*
 * test_content_hash.c: the content hash is what its head comment says, however it is computed and
 * however the content is cut, and it tells contents apart that a weaker one would confuse.
 *
 * The reference is the definition: keys, sums and polynomial written here again, the field by
 * doubling and adding.  The known answers pin all of it, since hashes are stored in data files.
 */
#include "ctest.h"
#include "dcp_hash.h"

static const char *const implementations[] = {"portable", "avx2", "avx512"};
enum {
    IMPLEMENTATIONS = sizeof implementations / sizeof implementations[0],
    BLOCK = 4096,
    STRIPES = 64,
};

__extension__ typedef unsigned __int128 uint128;

static uint64_t seed = 20260401;

static uint64_t
next_random(void)
{
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return seed;
}

static void
fill_random(uint8_t *data, size_t len)
{
    for (size_t i = 0; i < len; i++) {
        data[i] = (uint8_t)(next_random() >> 24);
    }
}

/* ---- the definition ---- */

static uint64_t
split_mix(uint64_t *state)
{
    uint64_t z = *state += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
}

static const uint128 prime = ((uint128)1 << 127) - 1;

static uint128
add_mod(uint128 a, uint128 b)
{
    return (a % prime + b % prime) % prime;
}

static uint128
multiply_mod(uint128 a, uint128 b)
{
    uint128 product = 0;
    for (int bit = 127; bit >= 0; bit--) {
        product = add_mod(product, product);
        if ((b >> bit & 1) != 0) {
            product = add_mod(product, a);
        }
    }
    return product;
}

static uint32_t
word_at(const uint8_t *data, size_t len, size_t at)
{
    uint32_t word = 0;
    for (size_t i = 0; i < 4; i++) {
        word |= (at + i < len ? (uint32_t)data[at + i] : 0) << (8 * i);
    }
    return word;
}

static struct dcp_hash128
reference(const uint8_t *data, size_t len)
{
    uint64_t keys[(STRIPES + 3) * 8], state = 0x6463705f68617368;
    for (size_t i = 0; i < sizeof keys / sizeof keys[0]; i++) {
        keys[i] = split_mix(&state);
    }
    uint128 x = split_mix(&state);
    x |= (uint128)(split_mix(&state) >> 1) << 64;
    uint128 h = 1;
    for (size_t start = 0; start < len; start += BLOCK) {
        size_t n = len - start < BLOCK ? len - start : BLOCK;
        uint64_t sums[4] = {0};
        for (size_t pair = 0; pair < (n + 63) / 64 * 8; pair++) {
            for (size_t pass = 0; pass < 4; pass++) {
                uint64_t key = keys[pair + 8 * pass];
                uint32_t a = word_at(data + start, n, 8 * pair) + (uint32_t)key;
                uint32_t b = word_at(data + start, n, 8 * pair + 4) + (uint32_t)(key >> 32);
                sums[pass] += (uint64_t)a * b;
            }
        }
        h = multiply_mod(add_mod(h, (uint128)sums[1] << 64 | sums[0]), x);
        h = multiply_mod(add_mod(h, (uint128)sums[3] << 64 | sums[2]), x);
    }
    h = multiply_mod(add_mod(h, len), x);
    return (struct dcp_hash128){.lo = (uint64_t)h, .hi = (uint64_t)(h >> 64)};
}

/* ---- cases ---- */

static void
every_implementation_is_the_definition(void)
{
    enum { MOST = 3 * BLOCK + 200 };
    uint8_t *data = dcp_malloc(MOST + 64);
    int ran = 0;
    fill_random(data, MOST + 64);
    for (int i = 0; i < IMPLEMENTATIONS; i++) {
        if (!dcp_content_hash_force(implementations[i])) {
            continue;
        }
        ran++;
        CHECK(strcmp(dcp_content_hash_implementation(), implementations[i]) == 0);
        for (size_t len = 0; len <= MOST; len += len < 200 ? 1 : 61) {
            size_t at = len % 64; /* no alignment is asked for */
            CHECK(
                dcp_hash128_equal(dcp_content_hash_of(data + at, len), reference(data + at, len)));
        }
        /* All ones: the largest sums and carries. */
        memset(data, 0xff, MOST);
        CHECK(dcp_hash128_equal(dcp_content_hash_of(data, MOST), reference(data, MOST)));
        fill_random(data, MOST + 64);
    }
    CHECK(ran >= 1);
    CHECK(!dcp_content_hash_force("no such thing"));
    dcp_free(data);
}

/* Stored in data files: if one of these changes, every old checkpoint's hashes are worthless. */
static void
the_known_answers_hold(void)
{
    static const struct {
        size_t len;
        uint64_t lo, hi;
    } known[] = {
        {0, 0x77974565ee3ff16c, 0x3b180a2561848919},
        {1, 0xe5944f365c7ee886, 0x1c496499d52059ce},
        {3, 0xa81044b18ac4996a, 0x38be0a76013b4cb4},
        {8, 0x09e7e0bb892dee9f, 0x66c5c0fa9b0f9e10},
        {64, 0x91e6731b87581ee5, 0x017f95ac11ab4208},
        {65, 0x7e3df344da198f9c, 0x6e476967b430ead4},
        {1000, 0xb5c7db64508dc4df, 0x43b858782d5d0bfc},
        {4096, 0xc61988b7552f6149, 0x32c0c3c81f6ad3c4},
        {4097, 0xdb8b3cd877eccc9a, 0x698942914274521f},
        {10000, 0x6ab936f875408c08, 0x6335e7604052a780},
        {65536, 0x49a92031d12e3820, 0x19e0dfb92b1708e2},
        {1048575, 0x1ce9a6078b94a08b, 0x532c3d2e6359e470},
        {1048576, 0x98b4166e8502fa52, 0x4b82cde5cef61efd},
    };
    enum { MOST = 1 << 20 };
    uint8_t *data = dcp_malloc(MOST);
    for (size_t i = 0; i < MOST; i++) {
        data[i] = (uint8_t)(i * 7 + i / 251);
    }
    for (int i = 0; i < IMPLEMENTATIONS; i++) {
        if (!dcp_content_hash_force(implementations[i])) {
            continue;
        }
        for (size_t k = 0; k < sizeof known / sizeof known[0]; k++) {
            struct dcp_hash128 got = dcp_content_hash_of(data, known[k].len);
            CHECK(got.lo == known[k].lo && got.hi == known[k].hi);
        }
    }
    dcp_free(data);
}

static void
cuts_do_not_matter(void)
{
    enum { LEN = 5 * BLOCK + 777 };
    uint8_t *data = dcp_malloc(LEN);
    fill_random(data, LEN);
    for (int trial = 0; trial < 400; trial++) {
        size_t len = trial == 0 ? LEN : next_random() % (LEN + 1), at = 0;
        size_t most = trial % 3 == 0 ? 2 : trial % 3 == 1 ? 300 : 3 * BLOCK;
        struct dcp_content_hash state;
        dcp_content_hash_begin(&state);
        while (at < len) {
            size_t n = next_random() % (most + 1);
            n = n < len - at ? n : len - at;
            n = next_random() % 8 == 0 && at / BLOCK * BLOCK + BLOCK <= len
                    ? at / BLOCK * BLOCK + BLOCK - at
                    : n;
            dcp_content_hash_add(&state, data + at, n);
            at += n;
            if (next_random() % 16 == 0) {
                /* Looking at the hash so far leaves the state as it was. */
                CHECK(
                    dcp_hash128_equal(dcp_content_hash_end(&state), dcp_content_hash_of(data, at)));
            }
        }
        CHECK(dcp_hash128_equal(dcp_content_hash_end(&state), dcp_content_hash_of(data, len)));
    }
    struct dcp_content_hash empty;
    dcp_content_hash_begin(&empty);
    dcp_content_hash_add(&empty, NULL, 0);
    CHECK(dcp_hash128_equal(dcp_content_hash_end(&empty), dcp_content_hash_of(NULL, 0)));
    dcp_free(data);
}

static int
compare_hashes(const void *left, const void *right)
{
    const struct dcp_hash128 *a = left, *b = right;
    if (a->hi != b->hi) {
        return a->hi < b->hi ? -1 : 1;
    }
    return a->lo < b->lo ? -1 : a->lo > b->lo;
}

static bool
all_differ(struct dcp_hash128 *hashes, size_t count)
{
    qsort(hashes, count, sizeof *hashes, compare_hashes);
    for (size_t i = 1; i < count; i++) {
        if (dcp_hash128_equal(hashes[i - 1], hashes[i])) {
            return false;
        }
    }
    return true;
}

/* Zeros are what padding is made of, so only the length tells these contents apart. */
static void
trailing_zeros_differ(void)
{
    enum { MOST = 3 * BLOCK };
    uint8_t *zeros = dcp_calloc(MOST, 1);
    struct dcp_hash128 *hashes = dcp_malloc((MOST + 1) * sizeof *hashes);
    for (size_t len = 0; len <= MOST; len++) {
        hashes[len] = dcp_content_hash_of(zeros, len);
    }
    CHECK(all_differ(hashes, MOST + 1));
    dcp_free(hashes);
    dcp_free(zeros);
}

static void
every_bit_counts(void)
{
    static const size_t lens[] = {1, 4, 8, 63, 64, 65, 200, BLOCK, BLOCK + 1, 2 * BLOCK + 70};
    uint8_t data[2 * BLOCK + 70];
    struct dcp_hash128 *hashes = dcp_malloc((8 * sizeof data + 1) * sizeof *hashes);
    for (size_t l = 0; l < sizeof lens / sizeof lens[0]; l++) {
        for (int zeros = 0; zeros < 2; zeros++) {
            fill_random(data, sizeof data);
            if (zeros != 0) {
                memset(data, 0, sizeof data);
            }
            size_t bits = 8 * lens[l];
            for (size_t bit = 0; bit < bits; bit++) {
                data[bit / 8] ^= (uint8_t)(1 << bit % 8);
                hashes[bit] = dcp_content_hash_of(data, lens[l]);
                data[bit / 8] ^= (uint8_t)(1 << bit % 8);
            }
            hashes[bits] = dcp_content_hash_of(data, lens[l]);
            CHECK(all_differ(hashes, bits + 1));
        }
    }
    dcp_free(hashes);
}

static void
swap_bytes(uint8_t *a, uint8_t *b, size_t len)
{
    for (size_t i = 0; i < len; i++) {
        uint8_t t = a[i];
        a[i] = b[i];
        b[i] = t;
    }
}

/* Every pair of equal-sized pieces, from words over stripes to whole blocks. */
static void
moved_pieces_differ(void)
{
    static const size_t pieces[] = {1, 4, 8, 32, 64, 256, BLOCK};
    enum { LEN = 6 * BLOCK };
    uint8_t *data = dcp_malloc(LEN);
    fill_random(data, LEN);
    struct dcp_hash128 before = dcp_content_hash_of(data, LEN);
    for (size_t p = 0; p < sizeof pieces / sizeof pieces[0]; p++) {
        size_t count = LEN / pieces[p];
        for (int trial = 0; trial < 300; trial++) {
            uint8_t *a = data + next_random() % count * pieces[p];
            uint8_t *b = data + next_random() % count * pieces[p];
            bool same = memcmp(a, b, pieces[p]) == 0;
            swap_bytes(a, b, pieces[p]);
            CHECK(dcp_hash128_equal(dcp_content_hash_of(data, LEN), before) == same);
            swap_bytes(a, b, pieces[p]);
        }
    }
    dcp_free(data);
}

/* A flipped input bit flips about half of the 127 bits of the hash. */
static void
flips_spread(void)
{
    enum { LEN = BLOCK + 256, TRIALS = 4000 };
    static uint8_t data[LEN];
    uint64_t flipped = 0, of_bit[127] = {0};
    for (int trial = 0; trial < TRIALS; trial++) {
        size_t len = trial % 2 == 0 ? LEN : 8 + next_random() % 64;
        fill_random(data, len);
        struct dcp_hash128 before = dcp_content_hash_of(data, len);
        size_t bit = next_random() % (8 * len);
        data[bit / 8] ^= (uint8_t)(1 << bit % 8);
        struct dcp_hash128 after = dcp_content_hash_of(data, len);
        for (unsigned i = 0; i < 127; i++) {
            uint64_t a = i < 64 ? before.lo >> i : before.hi >> (i - 64);
            uint64_t b = i < 64 ? after.lo >> i : after.hi >> (i - 64);
            of_bit[i] += (a ^ b) & 1;
            flipped += (a ^ b) & 1;
        }
    }
    CHECK(flipped > TRIALS * 127 * 49ull / 100 && flipped < TRIALS * 127 * 51ull / 100);
    for (unsigned i = 0; i < 127; i++) {
        CHECK(of_bit[i] > TRIALS * 44ull / 100 && of_bit[i] < TRIALS * 56ull / 100);
    }
}

CTEST_MAIN(RUN(every_implementation_is_the_definition); RUN(the_known_answers_hold);
           RUN(cuts_do_not_matter); RUN(trailing_zeros_differ); RUN(every_bit_counts);
           RUN(moved_pieces_differ); RUN(flips_spread);)
