/*
 * test_group_read.c: what every rank of a group wants is read by one of them and reaches all, and
 * whatever happens to one rank, all come to an end.
 */
#include <errno.h>

#include "ctest.h"
#include "engine_load.h"
#include "group_read.h"
#include "save_faults.h"
#include "sim_ranks.h"

enum { RANKS = 4, TIMEOUT_MS = 60000, UNIT_BYTES = DCP_BLOCK_BYTES + 2 * DCP_DIRECT_ALIGN_BYTES };

struct rank_case {
    struct load load;
    struct dcp_engine_options engine;
    struct io_faults io;
    atomic_int cancel;
    struct comm_faults comm;
    enum fault_mode comm_mode;
    uint32_t comm_nth;
    bool declines;
    int rc;
    struct dcp_error err;
    struct dcp_read_stats stats; /* of the group alone */
    bool shared;                 /* something was read together */
    uint64_t rest_count;
};

struct party {
    struct world world;
    struct disk disk;
    uint32_t ranks_count;
    struct rank_case ranks[RANKS];
};

static void
party_make(struct party *party, uint64_t seed, uint32_t ranks)
{
    memset(party, 0, sizeof *party);
    world_to_share(&party->world, seed, 1 + (uint32_t)seed % 2, false);
    disk_make(&party->disk, &party->world, 512);
    party->ranks_count = ranks;
}

static void
party_begin(struct party *party, enum dcp_direct direct)
{
    for (uint32_t r = 0; r < party->ranks_count; r++) {
        struct rank_case *rank = &party->ranks[r];
        memset(rank, 0, sizeof *rank);
        load_init(&rank->load, &party->world);
        rank->engine =
            (struct dcp_engine_options){.direct = direct, .verify = true, .cancel = &rank->cancel};
        io_faults_init(&rank->io, party->disk.io);
        dcp_error_clear(&rank->err);
    }
}

/* A party of which every rank wants everything. */
static void
party_begin_wanting_all(struct party *party, enum dcp_direct direct)
{
    party_begin(party, direct);
    for (uint32_t r = 0; r < party->ranks_count; r++) {
        load_add_all(&party->ranks[r].load, &party->world.rng, r % 2 == 1, 0);
    }
}

static void
run_rank(const struct dcp_comm *comm, struct dcp_comm_sim *sim, void *arg)
{
    struct party *party = arg;
    struct rank_case *rank = &party->ranks[comm->rank];
    struct dcp_comm table;
    comm_faults_init(&rank->comm, sim, comm, &table);
    comm_faults_arm(&rank->comm, rank->comm_mode, rank->comm_nth);
    int64_t *lanes = dcp_malloc_array(DCP_GROUP_READ_LANES, sizeof *lanes);
    struct dcp_group_read read = {.comm = &table, .lanes = lanes, .unit_bytes = UNIT_BYTES};
    struct dcp_read_plan rest = rank->load.plan;
    struct dcp_read_stats stats;

    if (rank->declines) {
        rank->rc = dcp_group_read_decline(&read, rank->load.plan.md, &rank->err);
    } else {
        rank->rc = dcp_group_read_run(&read, &rank->io.io, party->disk.dirfd, "/d",
                                      &rank->load.plan, &rank->engine, &rank->stats, &rank->err);
    }
    if (read.rest != NULL) {
        rank->shared = true;
        rank->rest_count = read.rest_count;
        rest.items = read.rest;
        rest.items_count = read.rest_count;
    }
    if (rank->rc == 0) {
        rank->rc = dcp_reader_run(&rank->io.io, party->disk.dirfd, "/d", &rest, &rank->engine,
                                  on_record, &rank->load, &stats, &rank->err);
    }
    dcp_free(read.rest);
    dcp_free(lanes);
}

static void
party_run(struct party *party)
{
    for (uint32_t r = 0; r < party->ranks_count; r++) {
        struct dcp_error err = {0};
        CHECK_OK(dcp_read_plan_build(&party->ranks[r].load.plan, true, NULL, &err), &err);
    }
    sim_ranks_run(party->ranks_count, TIMEOUT_MS, run_rank, party);
    CHECK_EQ(io_memory_open_files(party->disk.fs), 1); /* the directory */
    for (uint32_t r = 0; r < party->ranks_count; r++) {
        const struct rank_case *rank = &party->ranks[r];
        CHECK((rank->rc == 0) == (rank->err.code == 0));
        if (rank->rc == 0) {
            load_check(&rank->load);
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
}

/* The victim's own error; of the others none but that it failed. */
static void
check_only_victim_fails(const struct party *party, uint32_t victim)
{
    for (uint32_t r = 0; r < party->ranks_count; r++) {
        int rc = party->ranks[r].rc;
        CHECK(r == victim || rc == 0 || rc == DCP_E_PEER);
    }
}

/* ---- what is read ---- */

static void
what_all_want_is_read_once_by_ranks_in_equal_parts(void)
{
    const uint64_t payload = 900 * 4000 + 64 * 20 * 66 + 400 * 800 + 512 * 2048;
    for (uint32_t c = 0; c < 6; c++) {
        struct party party;
        uint64_t read = 0, shared = 0;
        party_make(&party, c, 2 + c % 3);
        party_begin_wanting_all(&party, c < 3 ? DCP_DIRECT_ON : DCP_DIRECT_OFF);
        party_run(&party);
        for (uint32_t r = 0; r < party.ranks_count; r++) {
            const struct rank_case *rank = &party.ranks[r];
            CHECK_OK(rank->rc, &rank->err);
            CHECK(rank->shared);
            /* the small tensors and the object */
            CHECK(rank->rest_count < rank->load.plan.items_count);
            CHECK_EQ(rank->stats.wanted_bytes, rank->stats.verified_bytes);
            CHECK(rank->stats.read_bytes < payload / party.ranks_count + 2 * UNIT_BYTES);
            CHECK_EQ(rank->load.records_seen, 1);
            read += rank->stats.read_bytes;
            shared += rank->stats.shared_bytes;
        }
        CHECK_EQ(shared % (party.ranks_count - 1), 0);
        CHECK(shared / (party.ranks_count - 1) > payload - payload / 10);
        CHECK(read < payload + payload / 20);
        party_end(&party);
        party_clean_up(&party);
    }
}

static void
any_boxes_get_the_bytes_they_would_get_alone(void)
{
    uint32_t together = 0, alone = 0;
    for (uint64_t seed = 0; seed < 24; seed++) {
        struct party party;
        party_make(&party, seed, 2 + (uint32_t)(seed % 3));
        party_begin(&party, seed % 4 == 0 ? DCP_DIRECT_OFF : DCP_DIRECT_ON);
        for (uint32_t r = 0; r < party.ranks_count; r++) {
            load_add_random(&party.ranks[r].load, &party.world.rng, 1 + (uint32_t)(seed % 2));
            if (seed % 3 != 0) {
                load_add_all(&party.ranks[r].load, &party.world.rng, r % 2 == 1, 0);
            }
            party.ranks[r].engine.verify = seed % 5 != 2;
        }
        party_run(&party);
        for (uint32_t r = 0; r < party.ranks_count; r++) {
            CHECK_OK(party.ranks[r].rc, &party.ranks[r].err);
            CHECK_EQ(party.ranks[r].shared, party.ranks[0].shared);
            CHECK(seed % 5 != 2 || party.ranks[r].stats.verified_bytes == 0);
        }
        together += party.ranks[0].shared;
        alone += !party.ranks[0].shared;
        party_end(&party);
        party_clean_up(&party);
    }
    CHECK(together > 8 && alone > 0);
}

static void
nothing_is_read_together_when_one_rank_declines(void)
{
    struct party party;
    party_make(&party, 1, 3);
    for (uint32_t victim = 0; victim < 3; victim++) {
        party_begin_wanting_all(&party, DCP_DIRECT_ON);
        party.ranks[victim].declines = true;
        party_run(&party);
        for (uint32_t r = 0; r < 3; r++) {
            CHECK_OK(party.ranks[r].rc, &party.ranks[r].err);
            CHECK(!party.ranks[r].shared);
        }
        party_end(&party);
    }
    party_clean_up(&party);
}

/* ---- what goes wrong ---- */

static void
a_failing_read_ends_all_and_names_itself(void)
{
    struct party party;
    uint32_t hits = 0, told = 0;
    party_make(&party, 1, 3);
    for (uint32_t victim = 0; victim < 3; victim++) {
        bool hit = true;
        for (uint32_t nth = 1; hit && ctest_failures < 10; nth++) {
            party_begin_wanting_all(&party, nth % 2 == 0 ? DCP_DIRECT_ON : DCP_DIRECT_OFF);
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
    CHECK(hits > 10 && told > 10);
    party_clean_up(&party);
}

static void
damage_is_named_by_the_rank_that_read_it(void)
{
    struct party party;
    party_make(&party, 2, 3);
    disk_damage(&party.disk, &party.world, 0, 2 << 20, 1, UINT64_MAX);
    party_begin_wanting_all(&party, DCP_DIRECT_ON);
    party_run(&party);
    uint32_t found = 0;
    for (uint32_t r = 0; r < 3; r++) {
        bool own = party.ranks[r].rc == DCP_E_CHECKSUM;
        found += own;
        CHECK(own || party.ranks[r].rc == DCP_E_PEER);
        CHECK(!own || strstr(party.ranks[r].err.message, "tensor.0 in /d/") != NULL);
    }
    CHECK_EQ(found, 1);
    party_end(&party);
    party_clean_up(&party);
}

static void
a_cancelled_rank_ends_and_so_do_the_others(void)
{
    struct party party;
    party_make(&party, 1, 3);
    for (uint32_t victim = 0; victim < 3; victim++) {
        party_begin_wanting_all(&party, DCP_DIRECT_ON);
        atomic_store(&party.ranks[victim].cancel, 1);
        party_run(&party);
        check_only_victim_fails(&party, victim);
        CHECK_EQ(party.ranks[victim].rc, DCP_E_CANCELLED);
        party_end(&party);
    }
    party_clean_up(&party);
}

static void
a_rank_that_is_lost_in_a_collective_fails_all(void)
{
    struct party party;
    party_make(&party, 1, 3);
    for (uint32_t victim = 0; victim < 3; victim++) {
        for (uint32_t nth = 1; nth < 6; nth++) {
            party_begin_wanting_all(&party, DCP_DIRECT_ON);
            party.ranks[victim].comm_mode = FAULT_BEFORE;
            party.ranks[victim].comm_nth = nth;
            party_run(&party);
            for (uint32_t r = 0; r < 3; r++) {
                CHECK(party.ranks[r].rc == DCP_E_COMM);
            }
            party_end(&party);
        }
    }
    party_clean_up(&party);
}

CTEST_MAIN(RUN(what_all_want_is_read_once_by_ranks_in_equal_parts);
           RUN(any_boxes_get_the_bytes_they_would_get_alone);
           RUN(nothing_is_read_together_when_one_rank_declines);
           RUN(a_failing_read_ends_all_and_names_itself);
           RUN(damage_is_named_by_the_rank_that_read_it);
           RUN(a_cancelled_rank_ends_and_so_do_the_others);
           RUN(a_rank_that_is_lost_in_a_collective_fails_all);)
