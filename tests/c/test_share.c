/*
 * test_share.c: ranks of one host that read what several of them want once: the same bytes as each
 * by itself, each byte from the disk once, and no rank left waiting whatever happens to another.
 *
 * Ranks are threads with segments in the real shared memory.
 */
#include <errno.h>
#include <pthread.h>
#include <unistd.h>

#include "ctest.h"
#include "engine_load.h"
#include "save_faults.h"
#include "share.h"
#include "shm_faults.h"
#include "sim_ranks.h"

enum { RANKS = 4, TIMEOUT_MS = 60000, MOST_READS = 4096, MOST_FAILURES = 10 };

struct rank_case {
    struct load load;
    struct dcp_engine_options engine;
    struct shm_faults shm;
    struct io_faults io;
    struct dcp_io counting; /* around io */
    atomic_int cancel;
    bool absent; /* never reads, but says so */
    bool twin;   /* somebody makes a segment under its number */
    bool blind;  /* does not find rank 0 */
    bool stuck;  /* never reads, and says nothing until the others are done */
    int rc;
    struct dcp_error err;
    struct dcp_read_stats stats;
    char reason[DCP_SHARE_REASON_BYTES];
};

struct party {
    struct world world;
    struct disk disk;
    uint32_t ranks_count;
    uint32_t slot_bytes; /* of struct dcp_share */
    uint64_t run;        /* makes names differ */
    bool all_cached;     /* files lie in the page cache */
    struct rank_case ranks[RANKS];
    pthread_mutex_t lock;
    struct {
        uint64_t offset, len;
    } reads[MOST_READS]; /* of 64 KiB and more */
    uint32_t reads_count;
    atomic_uint over; /* ranks that are through */
};

/* ---- a table that notes what is read ---- */

static struct party *noting;

static ssize_t
noting_pread(void *ctx, int fd, void *buf, size_t len, uint64_t offset)
{
    struct io_faults *inner = ctx;
    ssize_t n = inner->io.pread(inner->io.ctx, fd, buf, len, offset);
    pthread_mutex_lock(&noting->lock);
    if (n >= (64 << 10) && noting->reads_count < MOST_READS) {
        noting->reads[noting->reads_count].offset = offset;
        noting->reads[noting->reads_count++].len = (uint64_t)n;
    }
    pthread_mutex_unlock(&noting->lock);
    return n;
}

static int
noting_open_at(void *ctx, int dirfd, const char *name, int flags, unsigned mode)
{
    struct io_faults *inner = ctx;
    return inner->io.open_at(inner->io.ctx, dirfd, name, flags, mode);
}

static int
noting_close(void *ctx, int fd)
{
    struct io_faults *inner = ctx;
    return inner->io.close(inner->io.ctx, fd);
}

static int
noting_fstat(void *ctx, int fd, struct dcp_stat *ret)
{
    struct io_faults *inner = ctx;
    return inner->io.fstat(inner->io.ctx, fd, ret);
}

static int
noting_dio_align(void *ctx, int fd, struct dcp_dio_align *ret)
{
    struct io_faults *inner = ctx;
    return inner->io.dio_align(inner->io.ctx, fd, ret);
}

static int
noting_set_direct(void *ctx, int fd, bool on)
{
    struct io_faults *inner = ctx;
    return inner->io.set_direct(inner->io.ctx, fd, on);
}

static int
noting_cached(void *ctx, int fd, uint64_t offset, uint64_t len)
{
    struct io_faults *inner = ctx;
    return noting->all_cached ? 100 : inner->io.cached(inner->io.ctx, fd, offset, len);
}

static bool
read_twice(const struct party *party)
{
    for (uint32_t a = 0; a < party->reads_count; a++) {
        for (uint32_t b = 0; b < a; b++) {
            uint64_t from = dcp_max_u64(party->reads[a].offset, party->reads[b].offset);
            uint64_t to = dcp_min_u64(party->reads[a].offset + party->reads[a].len,
                                      party->reads[b].offset + party->reads[b].len);
            /* Neighbours may share a unit of alignment. */
            if (to > from && to - from > 4096) {
                return true;
            }
        }
    }
    return false;
}

/* ---- a party of ranks ---- */

static void
party_make(struct party *party, uint64_t seed, uint32_t ranks, uint32_t files, bool large)
{
    memset(party, 0, sizeof *party);
    world_to_share(&party->world, seed, files, large);
    party->slot_bytes = large ? 0 : DCP_BLOCK_BYTES + 2 * DCP_DIRECT_ALIGN_BYTES;
    disk_make(&party->disk, &party->world, 512);
    party->ranks_count = ranks;
    pthread_mutex_init(&party->lock, NULL);
}

/* Everybody as at first: new loads, no faults. */
static void
party_begin(struct party *party, enum dcp_direct direct)
{
    party->run++;
    party->reads_count = 0;
    atomic_store(&party->over, 0);
    noting = party;
    for (uint32_t r = 0; r < party->ranks_count; r++) {
        struct rank_case *rank = &party->ranks[r];
        memset(rank, 0, sizeof *rank);
        load_init(&rank->load, &party->world);
        rank->engine =
            (struct dcp_engine_options){.direct = direct, .verify = true, .cancel = &rank->cancel};
        shm_faults_init(&rank->shm, SHM_FINE, 0);
        rank->shm.cancel = &rank->cancel;
        io_faults_init(&rank->io, party->disk.io);
        rank->counting = (struct dcp_io){.ctx = &rank->io,
                                         .open_at = noting_open_at,
                                         .close = noting_close,
                                         .pread = noting_pread,
                                         .fstat = noting_fstat,
                                         .dio_align = noting_dio_align,
                                         .set_direct = noting_set_direct,
                                         .cached = noting_cached};
        dcp_error_clear(&rank->err);
    }
}

static void
want_all(struct party *party, uint32_t rank)
{
    load_add_all(&party->ranks[rank].load, &party->world.rng, rank % 2 == 1, rank == 2 ? 64 : 0);
}

/* Names of a load end in "-<process>-<rank>". */
struct blinker {
    dcp_list_fn fn;
    void *ctx;
};

static int
blink_at_rank_0(void *ctx, const char *name)
{
    const struct blinker *blinker = ctx;
    const char *rank = strrchr(name, '-');
    return rank != NULL && strcmp(rank, "-0") == 0 ? 0 : blinker->fn(blinker->ctx, name);
}

static int
list_without_rank_0(void *ctx, dcp_list_fn fn, void *fn_ctx)
{
    struct blinker blinker = {fn, fn_ctx};
    (void)ctx;
    return dcp_shm_posix()->list(NULL, blink_at_rank_0, &blinker);
}

static void
name_of_twin(const struct dcp_share *share, char name[DCP_SHARE_NAME_BYTES])
{
    const char *rank = strrchr(share->name, '-');
    int head = (int)(rank - share->name);
    while (share->name[head - 1] != '-') {
        head--;
    }
    snprintf(name, DCP_SHARE_NAME_BYTES, "%.*s1%s", head, share->name, rank);
}

static void
run_rank(const struct dcp_comm *comm, struct dcp_comm_sim *sim, void *arg)
{
    struct party *party = arg;
    struct rank_case *rank = &party->ranks[comm->rank];
    struct dcp_save_id load_id = {{7}};
    struct dcp_share share = {0};
    struct dcp_error err = {0};
    int64_t lane = 0;
    (void)sim;

    memcpy(load_id.bytes + 1, &party->run, sizeof party->run);
    share.slot_bytes = party->slot_bytes;
    dcp_share_begin(&share, &rank->shm.shm, &load_id, comm->rank);
    char twin[DCP_SHARE_NAME_BYTES] = "";
    if (rank->twin) {
        name_of_twin(&share, twin);
        int fd = dcp_shm_posix()->create(NULL, twin);
        dcp_shm_posix()->close(NULL, fd);
    }
    if (rank->blind) {
        rank->shm.shm.list = list_without_rank_0;
    }
    rank->rc = comm->all_reduce_min(comm->ctx, &lane, 1, &err);
    if (rank->stuck) {
        for (int i = 0; i < 60000 && atomic_load(&party->over) + 1 < comm->size; i++) {
            dcp_io_posix()->sleep_ns(NULL, 1000000);
        }
    } else if (!rank->absent) {
        rank->rc =
            dcp_share_read(&share, &rank->counting, party->disk.dirfd, "/d", &rank->load.plan,
                           &rank->engine, on_record, &rank->load, &rank->stats, &rank->err);
    }
    memcpy(rank->reason, share.reason, sizeof rank->reason);
    dcp_share_end(&share);
    if (rank->twin) {
        (void)dcp_shm_posix()->unlink(NULL, twin); /* a sweep of names of the dead may have */
    }
    atomic_fetch_add(&party->over, 1);
}

static void
party_run(struct party *party)
{
    for (uint32_t r = 0; r < party->ranks_count; r++) {
        struct dcp_error err = {0};
        CHECK_OK(dcp_read_plan_build(&party->ranks[r].load.plan, true, NULL, &err), &err);
    }
    sim_ranks_run(party->ranks_count, TIMEOUT_MS, run_rank, party);
    CHECK_EQ(shm_names_of(getpid()), 0);
    CHECK_EQ(io_memory_open_files(party->disk.fs), 1); /* the directory */
    for (uint32_t r = 0; r < party->ranks_count; r++) {
        const struct rank_case *rank = &party->ranks[r];
        CHECK(rank->rc != DCP_E_TIMEOUT);
        CHECK((rank->rc == 0) == (rank->err.code == 0));
        if (rank->rc == 0 && !rank->absent && !rank->stuck) {
            load_check(&rank->load);
            CHECK_EQ(rank->stats.wanted_bytes,
                     rank->stats.verified_bytes + rank->stats.unverified_bytes);
        }
    }
}

static void
party_end(struct party *party)
{
    for (uint32_t r = 0; r < party->ranks_count; r++) {
        load_clean_up(&party->ranks[r].load);
    }
}

static void
party_clean_up(struct party *party)
{
    disk_clean_up(&party->disk);
    world_clean_up(&party->world);
    pthread_mutex_destroy(&party->lock);
}

/* The victim's error, and of the others none but that they broke off because of it. */
static void
check_only_victim_fails(const struct party *party, uint32_t victim)
{
    for (uint32_t r = 0; r < party->ranks_count; r++) {
        int rc = party->ranks[r].rc;
        if (r != victim && rc != 0 && rc != DCP_E_PEER) {
            fprintf(stderr, "rank %u, not %u: %s\n", r, victim, party->ranks[r].err.message);
        }
        CHECK(r == victim || rc == 0 || rc == DCP_E_PEER);
    }
}

/* ---- what is read ---- */

static void
replicas_are_read_once_and_reach_every_rank(void)
{
    struct party party;
    for (uint32_t c = 0; c < 6; c++) {
        party_make(&party, c, 2 + c % 3, 1, true);
        party_begin(&party, c < 3 ? DCP_DIRECT_ON : DCP_DIRECT_OFF);
        uint64_t read = 0, shared = 0;
        for (uint32_t r = 0; r < party.ranks_count; r++) {
            want_all(&party, r);
        }
        party_run(&party);
        CHECK(!read_twice(&party));
        CHECK(party.reads_count >= 4);
        for (uint32_t r = 0; r < party.ranks_count; r++) {
            const struct rank_case *rank = &party.ranks[r];
            CHECK_OK(rank->rc, &rank->err);
            CHECK(rank->reason[0] == '\0');
            CHECK_EQ(rank->stats.unverified_bytes, 0);
            CHECK_EQ(rank->load.records_seen, 1);
            read += rank->stats.read_bytes;
            shared += rank->stats.shared_bytes;
        }
        uint64_t payload = 1700 * 4000 + 256 * 300 * 66 + 400 * 800 + 512 * 2048;
        CHECK(read >= payload && read < payload + payload / 20);
        CHECK_EQ(shared, payload * (party.ranks_count - 1));
        party_end(&party);
        party_clean_up(&party);
    }
}

static void
any_boxes_of_any_ranks_get_the_bytes_they_would_get_alone(void)
{
    struct party party;
    uint64_t shared = 0;
    for (uint64_t seed = 0; seed < 24; seed++) {
        party_make(&party, seed, 2 + (uint32_t)(seed % 3), 1 + (uint32_t)(seed % 2), seed % 3 == 0);
        party_begin(&party, seed % 4 == 0 ? DCP_DIRECT_OFF : DCP_DIRECT_ON);
        for (uint32_t r = 0; r < party.ranks_count; r++) {
            load_add_random(&party.ranks[r].load, &party.world.rng, 1 + (uint32_t)(seed % 2));
            load_add_objects(&party.ranks[r].load);
            party.ranks[r].engine.verify_all = seed % 5 == 1;
            party.ranks[r].engine.verify = seed % 5 != 2;
        }
        party_run(&party);
        for (uint32_t r = 0; r < party.ranks_count; r++) {
            CHECK_OK(party.ranks[r].rc, &party.ranks[r].err);
            shared += party.ranks[r].stats.shared_bytes;
            CHECK(seed % 5 != 2 || party.ranks[r].stats.verified_bytes == 0);
        }
        party_end(&party);
        party_clean_up(&party);
    }
    CHECK(shared > (5 << 20));
}

/* Rank r's columns of a tensor of rows: each rank alone would read all of it. */
static void
columns_of_shards_of_rows_are_read_once(void)
{
    struct party party;
    party_make(&party, 1, 2, 1, true);
    party_begin(&party, DCP_DIRECT_ON);
    for (uint32_t r = 0; r < 2; r++) {
        uint64_t offsets[2] = {0, 500 * r}, sizes[2] = {1700, 500};
        load_add(&party.ranks[r].load, &party.world.rng, 0, offsets, sizes, false, 0);
    }
    party_run(&party);
    CHECK(!read_twice(&party));
    for (uint32_t r = 0; r < 2; r++) {
        CHECK_OK(party.ranks[r].rc, &party.ranks[r].err);
        CHECK_EQ(party.ranks[r].stats.verified_bytes, 1700 * 2000);
    }
    CHECK(party.ranks[0].stats.read_bytes + party.ranks[1].stats.read_bytes < 1700 * 4000 * 1.05);
    party_end(&party);
    party_clean_up(&party);
}

static void
what_one_rank_wants_alone_is_not_shared(void)
{
    struct party party;
    party_make(&party, 1, 3, 1, true);
    party_begin(&party, DCP_DIRECT_ON);
    for (uint32_t r = 0; r < 3; r++) {
        uint64_t offsets[3] = {0}, sizes[] = {1700, 1000, 0};
        uint64_t third[] = {256, 300, 33};
        load_add(&party.ranks[r].load, &party.world.rng, r == 1 ? 1 : 0, offsets,
                 r == 1 ? third : sizes, false, 0);
    }
    party.ranks[2].engine.verify_all = true; /* reads in another way */
    party_run(&party);
    for (uint32_t r = 0; r < 3; r++) {
        CHECK_OK(party.ranks[r].rc, &party.ranks[r].err);
        CHECK_EQ(party.ranks[r].stats.shared_bytes, 0);
        CHECK(strstr(party.ranks[r].reason, "settings") != NULL);
    }
    party_end(&party);
    party_clean_up(&party);
}

static void
what_lies_in_the_page_cache_is_read_by_each_rank(void)
{
    struct party party;
    party_make(&party, 1, 3, 2, true);
    party.all_cached = true;
    party_begin(&party, DCP_DIRECT_AUTO);
    for (uint32_t r = 0; r < 3; r++) {
        want_all(&party, r);
    }
    party_run(&party);
    for (uint32_t r = 0; r < 3; r++) {
        CHECK_OK(party.ranks[r].rc, &party.ranks[r].err);
        CHECK_EQ(party.ranks[r].stats.shared_bytes, 0);
        CHECK(party.ranks[r].stats.hot_bytes > 0);
        CHECK(strstr(party.ranks[r].reason, "page cache") != NULL);
    }
    party_end(&party);
    party_clean_up(&party);
}

/* ---- what goes wrong ---- */

static void
a_rank_that_can_not_share_reads_alone_and_so_do_those_it_leaves(void)
{
    struct party party;
    party_make(&party, 1, 3, 1, false);
    uint32_t hits = 0;
    for (uint32_t victim = 0; victim < 3; victim++) {
        bool hit = true;
        for (uint32_t nth = 1; hit && ctest_failures < MOST_FAILURES; nth++) {
            party_begin(&party, DCP_DIRECT_ON);
            for (uint32_t r = 0; r < 3; r++) {
                want_all(&party, r);
            }
            shm_faults_init(&party.ranks[victim].shm, nth % 2 == 0 ? SHM_FULL : SHM_FAILS, nth);
            party_run(&party);
            for (uint32_t r = 0; r < 3; r++) {
                CHECK_OK(party.ranks[r].rc, &party.ranks[r].err);
            }
            hit = atomic_load(&party.ranks[victim].shm.hit);
            hits += hit;
            party_end(&party);
        }
    }
    CHECK(hits > 3 * 10);
    party_clean_up(&party);
}

static void
ranks_that_found_different_others_read_alone(void)
{
    struct party party;
    party_make(&party, 1, 4, 1, false);
    for (int twin = 0; twin < 2; twin++) {
        party_begin(&party, DCP_DIRECT_ON);
        for (uint32_t r = 0; r < 4; r++) {
            want_all(&party, r);
        }
        party.ranks[1].twin = twin == 1;
        party.ranks[2].blind = twin == 0;
        party_run(&party);
        for (uint32_t r = 0; r < 4; r++) {
            CHECK_OK(party.ranks[r].rc, &party.ranks[r].err);
            CHECK(twin == 1 || party.ranks[r].stats.shared_bytes == 0);
        }
        CHECK_EQ(party.ranks[1].stats.shared_bytes, 0);
        party_end(&party);
    }
    party_clean_up(&party);
}

static void
full_shared_memory_is_a_reason_and_no_failure(void)
{
    struct party party;
    uint32_t told = 0;
    party_make(&party, 1, 2, 1, false);
    party_begin(&party, DCP_DIRECT_ON);
    for (uint32_t r = 0; r < 2; r++) {
        want_all(&party, r);
        shm_faults_init(&party.ranks[r].shm, SHM_FULL, 8);
    }
    party_run(&party);
    for (uint32_t r = 0; r < 2; r++) {
        CHECK_OK(party.ranks[r].rc, &party.ranks[r].err);
        CHECK_EQ(party.ranks[r].stats.shared_bytes, 0);
        /* Who comes late finds nobody. */
        told += strstr(party.ranks[r].reason, "No space") != NULL;
        CHECK(party.ranks[r].reason[0] != '\0');
    }
    CHECK(told > 0);
    party_end(&party);
    party_clean_up(&party);
}

static void
a_failing_read_of_any_rank_ends_all_and_names_itself(void)
{
    struct party party;
    uint32_t hits = 0, told = 0;
    party_make(&party, 1, 3, 2, false);
    for (uint32_t victim = 0; victim < 3; victim++) {
        bool hit = true;
        for (uint32_t nth = 1; hit && ctest_failures < MOST_FAILURES; nth++) {
            party_begin(&party, DCP_DIRECT_OFF);
            for (uint32_t r = 0; r < 3; r++) {
                want_all(&party, r);
            }
            io_faults_arm(&party.ranks[victim].io, FAULT_FOR_EVER, nth, EIO);
            party_run(&party);
            check_only_victim_fails(&party, victim);
            hit = atomic_load(&party.ranks[victim].io.hit);
            CHECK(party.ranks[victim].rc == 0 || hit); /* a failing close hurts nobody */
            for (uint32_t r = 0; r < 3; r++) {
                told += party.ranks[r].rc == DCP_E_PEER;
            }
            hits += hit;
            party_end(&party);
        }
    }
    CHECK(hits > 10 && told > hits / 2);
    party_clean_up(&party);
}

static void
a_cancelled_rank_ends_all(void)
{
    struct party party;
    uint32_t cancelled = 0;
    party_make(&party, 1, 3, 1, false);
    for (uint32_t nth = 1; nth < 48 && ctest_failures < MOST_FAILURES; nth += 4) {
        uint32_t victim = nth % 3;
        party_begin(&party, DCP_DIRECT_ON);
        for (uint32_t r = 0; r < 3; r++) {
            want_all(&party, r);
        }
        shm_faults_init(&party.ranks[victim].shm, SHM_CANCELS, nth);
        party.ranks[victim].shm.cancel = &party.ranks[victim].cancel;
        party_run(&party);
        check_only_victim_fails(&party, victim);
        CHECK(party.ranks[victim].rc == 0 || party.ranks[victim].rc == DCP_E_CANCELLED);
        cancelled += party.ranks[victim].rc == DCP_E_CANCELLED;
        party_end(&party);
    }
    CHECK(cancelled > 5);
    party_clean_up(&party);
}

static void
a_rank_that_does_not_read_is_not_waited_for(void)
{
    struct party party;
    party_make(&party, 1, 3, 1, false);
    for (uint32_t victim = 0; victim < 3; victim++) {
        party_begin(&party, DCP_DIRECT_ON);
        for (uint32_t r = 0; r < 3; r++) {
            want_all(&party, r);
        }
        party.ranks[victim].absent = true;
        party_run(&party);
        for (uint32_t r = 0; r < 3; r++) {
            CHECK_OK(party.ranks[r].rc, &party.ranks[r].err);
            CHECK((party.ranks[r].stats.shared_bytes > 0) == (r != victim));
        }
        party_end(&party);
    }
    party_clean_up(&party);
}

static void
a_rank_that_is_gone_is_noticed(void)
{
    struct party party;
    party_make(&party, 1, 3, 1, false);
    party_begin(&party, DCP_DIRECT_ON);
    for (uint32_t r = 0; r < 3; r++) {
        want_all(&party, r);
        shm_faults_init(&party.ranks[r].shm, SHM_SEES_DEATH, 7); /* behind the sweep */
    }
    party.ranks[1].stuck = true;
    party_run(&party);
    CHECK_EQ(party.ranks[0].rc, DCP_E_PEER);
    CHECK_EQ(party.ranks[2].rc, DCP_E_PEER);
    CHECK(strstr(party.ranks[0].err.message, "rank") != NULL);
    party_end(&party);
    party_clean_up(&party);
}

static void
damage_is_found_by_the_one_that_reads_it(void)
{
    struct party party;
    for (uint32_t c = 0; c < 6; c++) {
        party_make(&party, c, 3, 1, false);
        party_begin(&party, DCP_DIRECT_ON);
        for (uint32_t r = 0; r < 3; r++) {
            want_all(&party, r);
        }
        /* Tensors 0, 2 and 3: blocks of a large one, and payloads that have a descriptor. */
        static const uint32_t tensors[] = {0, 2, 3};
        uint64_t entry = entry_of(&party.world, tensors[c % 3]);
        const struct dcp_md_entry *e = &party.world.md.entries[entry];
        const struct dcp_md_chunk *chunk = &party.world.md.chunks[e->first_chunk];
        disk_damage(&party.disk, &party.world, 0, chunk->offset_bytes + chunk->length_bytes / 2,
                    0x10, UINT64_MAX);
        if (c < 3) {
            party_run(&party);
            uint32_t found = 0;
            for (uint32_t r = 0; r < 3; r++) {
                const struct rank_case *rank = &party.ranks[r];
                CHECK(rank->rc == DCP_E_CHECKSUM || rank->rc == DCP_E_PEER || rank->rc == 0);
                if (rank->rc == DCP_E_CHECKSUM) {
                    found++;
                    char name[32];
                    snprintf(name, sizeof name, "tensor.%u", tensors[c % 3]);
                    CHECK(strstr(rank->err.message, name) != NULL);
                    CHECK(rank->err.path[0] != '\0');
                    CHECK(rank->err.offset_bytes >= chunk->offset_bytes &&
                          rank->err.offset_bytes < chunk->offset_bytes + chunk->length_bytes);
                }
            }
            CHECK_EQ(found, 1);
        } else {
            /* Without checksums everybody gets what the file holds. */
            for (uint32_t r = 0; r < 3; r++) {
                party.ranks[r].engine.verify = false;
                struct dcp_error err = {0};
                CHECK_OK(dcp_read_plan_build(&party.ranks[r].load.plan, true, NULL, &err), &err);
            }
            sim_ranks_run(3, TIMEOUT_MS, run_rank, &party);
            for (uint32_t r = 0; r < 3; r++) {
                CHECK_OK(party.ranks[r].rc, &party.ranks[r].err);
                CHECK_EQ(party.ranks[r].stats.verified_bytes, 0);
                CHECK(party.ranks[r].stats.shared_bytes > 0);
            }
        }
        party_end(&party);
        party_clean_up(&party);
    }
}

/* ---- failures of several ranks ---- */

static void
exchange_rank(const struct dcp_comm *comm, struct dcp_comm_sim *sim, void *arg)
{
    struct dcp_failure_list *lists = arg;
    struct dcp_error mine = {.code = DCP_E_IO}, err = {0};
    struct dcp_failure failure = {
        .kind = DCP_FAILURE_CORE, .bytes = (uint8_t *)&mine, .len = sizeof mine};
    (void)sim;
    for (uint32_t round = 0; round < 2; round++) {
        /* Rank 0 and 2 break off, in the first round because of rank 1. */
        if (comm->rank != 1) {
            failure.kind = DCP_FAILURE_CORE | DCP_FAILURE_ECHO;
        }
        bool ok = round == 1 && comm->rank == 1;
        if (dcp_failure_exchange(comm, ok ? NULL : &failure, &lists[round * 3 + comm->rank],
                                 &err) != 0) {
            lists[round * 3 + comm->rank].count = SIZE_MAX;
        }
    }
}

static void
only_causes_are_told_where_there_are_any(void)
{
    struct dcp_failure_list lists[6] = {{0}};
    sim_ranks_run(3, TIMEOUT_MS, exchange_rank, lists);
    for (uint32_t i = 0; i < 6; i++) {
        CHECK_EQ(lists[i].count, i < 3 ? 1 : 2);
        CHECK_EQ(lists[i].items[0].rank, i < 3 ? 1 : 0);
        CHECK_EQ(lists[i].items[0].kind, DCP_FAILURE_CORE);
        dcp_failure_list_clean_up(&lists[i]);
    }
}

CTEST_MAIN(RUN(replicas_are_read_once_and_reach_every_rank);
           RUN(any_boxes_of_any_ranks_get_the_bytes_they_would_get_alone);
           RUN(columns_of_shards_of_rows_are_read_once);
           RUN(what_one_rank_wants_alone_is_not_shared);
           RUN(what_lies_in_the_page_cache_is_read_by_each_rank);
           RUN(a_rank_that_can_not_share_reads_alone_and_so_do_those_it_leaves);
           RUN(ranks_that_found_different_others_read_alone);
           RUN(full_shared_memory_is_a_reason_and_no_failure);
           RUN(a_failing_read_of_any_rank_ends_all_and_names_itself);
           RUN(a_cancelled_rank_ends_all); RUN(a_rank_that_does_not_read_is_not_waited_for);
           RUN(a_rank_that_is_gone_is_noticed); RUN(damage_is_found_by_the_one_that_reads_it);
           RUN(only_causes_are_told_where_there_are_any);)
