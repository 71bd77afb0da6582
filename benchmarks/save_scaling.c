/*
 * save_scaling.c: the planning of whole saves by 64 to 4096 simulated ranks, and who pays for it.
 *
 *     make build/bench/save_scaling
 *     build/bench/save_scaling [--json] [ranks] [tensors per rank] [FAST rounds] [own keys] [file]
 *
 * Every rank is a thread with its own FSDP-like plan (one tensor in 16 replicated, one object in
 * 64) and makes the calls that a save makes: vote, gather, decide, scatter, install, then FAST
 * rounds of one vote each, then another SLOW round with one more tensor on every rank.  Ranks have
 * the same names, and `own keys` names besides that no other rank has, objects as samplers' states.
 *
 * Costs are CPU time of the rank's own thread outside of the collectives, since in here a transport
 * costs what copying costs.  Bytes are what the gather's rounds carry, padding included.  Memory is
 * what the core's allocator holds, of the coordinator: `answering` when it sends the answers,
 * `kept` after the round.  With a file, the last round's metadata image is written there and
 * synced, as a commit does, within the metadata's time.  Exits 1 when a verdict or a count is
 * wrong.
 */
#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include "group.h"

enum { STACK_BYTES = 256 << 10, TIMEOUT_MS = 600000, REPLICATED_EVERY = 16, OBJECT_EVERY = 64 };

/* The SLOW rounds. */
enum { FIRST, CHANGED, ROUNDS };
static const char *const round_names[ROUNDS] = {"first SLOW round", "one more tensor"};

/* In the order they come; a rank is in one at a time. */
enum step { STEP_VOTE, STEP_GATHER, STEP_DECIDE, STEP_SCATTER, STEP_INSTALL, STEPS };

static const char *const step_names[STEPS] = {"fingerprint, vote", "encode, gather", "decide",
                                              "scatter", "layout, install"};

/* What a rank did in one round, or in all FAST rounds together. */
struct books {
    uint64_t cpu_ns[STEPS];
    uint64_t wall_ns[STEPS]; /* from entering the step to leaving it, waiting included */
    uint64_t sent_bytes;     /* to the coordinator */
    uint64_t kept_items;
    uint64_t own_bytes; /* what this rank keeps between saves */
};

struct rank {
    pthread_t thread;
    struct job *job;
    struct dcp_comm inner; /* of the simulated group */
    enum step step;
    uint64_t since_ns; /* CPU time at the last return from a collective */
    uint64_t entered_ns;
    struct books *books; /* the open ones */
    struct books slow[ROUNDS], fast;
};

struct job {
    uint32_t ranks, tensors, own_keys, fast_rounds;
    struct rank *all;
    /* Live bytes of all ranks together, and what is the coordinator's of them. */
    uint64_t plans_bytes[ROUNDS], answering_bytes[ROUNDS], installed_bytes[ROUNDS];
    uint64_t metadata_ns[ROUNDS], metadata_bytes[ROUNDS];
    const char *metadata_path; /* NULL: not written */
};

static uint32_t
round_tensors(const struct job *job, int round)
{
    return job->tensors + (round == CHANGED);
}

static void
must(int rc, const struct dcp_error *err)
{
    if (rc != 0) {
        fprintf(stderr, "save_scaling: %s\n", err->message);
        exit(1);
    }
}

static uint64_t
cpu_now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* ---- the table: passes on and keeps the books ---- */

static void
next_step(struct rank *rank)
{
    uint64_t now_ns = dcp_now_ns();
    rank->books->wall_ns[rank->step] += now_ns - rank->entered_ns;
    rank->entered_ns = now_ns;
    rank->step++;
}

static void
leave(struct rank *rank)
{
    rank->books->cpu_ns[rank->step] += cpu_now_ns() - rank->since_ns;
}

static void
come_back(struct rank *rank)
{
    rank->since_ns = cpu_now_ns();
}

static int
counted_all_reduce_min(void *ctx, int64_t *lanes, size_t count, struct dcp_error *err)
{
    struct rank *rank = ctx;
    leave(rank);
    if (rank->step == STEP_DECIDE) {
        next_step(rank); /* the answers are ready */
    }
    int rc = rank->inner.all_reduce_min(rank->inner.ctx, lanes, count, err);
    /* The vote, and the agreement behind the gather. */
    if (rank->step == STEP_VOTE || (rank->step == STEP_GATHER && rank->books->sent_bytes > 0)) {
        next_step(rank);
    }
    come_back(rank);
    return rc;
}

static int
counted_gather(void *ctx, uint32_t root, const void *send, void *recv, size_t bytes,
               struct dcp_error *err)
{
    struct rank *rank = ctx;
    leave(rank);
    rank->books->sent_bytes += bytes;
    int rc = rank->inner.gather(rank->inner.ctx, root, send, recv, bytes, err);
    come_back(rank);
    return rc;
}

static int
counted_scatter(void *ctx, uint32_t root, const void *send, void *recv, size_t bytes,
                struct dcp_error *err)
{
    struct rank *rank = ctx;
    leave(rank);
    if (rank->inner.rank == root && rank->books != &rank->fast) {
        rank->job->answering_bytes[rank->books - rank->slow] = dcp_alloc_live_bytes();
    }
    int rc = rank->inner.scatter(rank->inner.ctx, root, send, recv, bytes, err);
    if (rank->step == STEP_SCATTER) {
        next_step(rank); /* a second round of answers counts as installing */
    }
    come_back(rank);
    return rc;
}

static void
counted_destroy(void *ctx)
{
    struct rank *rank = ctx;
    rank->inner.destroy(rank->inner.ctx);
}

static void
wait_for_all(struct rank *rank)
{
    struct dcp_error err = {0};
    int64_t lane = 0;
    must(rank->inner.all_reduce_min(rank->inner.ctx, &lane, 1, &err), &err);
}

/* ---- plans ---- */

static void
make_item(struct dcp_plan *plan, uint32_t ranks, uint32_t i, struct dcp_error *err)
{
    static const char *const parts[] = {"attention.wq.weight", "attention.wk.weight",
                                        "attention.wv.weight", "feed_forward.w1.weight"};
    char fqn[96];
    struct dcp_buf path = {0};
    struct dcp_item item = {.kind = DCP_ITEM_SHARD, .dtype = DCP_DTYPE_FLOAT32, .ndim = 2};
    int len = snprintf(fqn, sizeof fqn, "model.layers.%u.%s", i / 4, parts[i % 4]);
    uint64_t rows = 64 + i % 5 * 16;
    uint64_t size[] = {rows * ranks, 1024}, offsets[] = {rows * plan->rank, 0};
    uint64_t sizes[] = {rows, 1024};

    dcp_path_put_str(&path, "model", 5);
    dcp_path_put_str(&path, fqn + 6, (size_t)len - 6);
    must(dcp_plan_add_name(plan, fqn, (size_t)len, path.data, path.len, 2, &item.name, err), err);
    dcp_buf_clean_up(&path);
    if (i % OBJECT_EVERY == 7) {
        item = (struct dcp_item){.name = item.name, .kind = DCP_ITEM_BYTES, .slot_bytes = 800};
    } else if (i % REPLICATED_EVERY == 3) {
        item.kind = DCP_ITEM_TENSOR;
        offsets[0] = 0;
        size[0] = rows;
    }
    must(dcp_plan_add_item(plan, &item, size, offsets, sizes, err), err);
}

static uint64_t
replicas_count(uint32_t tensors)
{
    uint64_t count = 0;
    for (uint32_t i = 0; i < tensors; i++) {
        count += i % OBJECT_EVERY == 7 || i % REPLICATED_EVERY == 3;
    }
    return count;
}

static void
make_own_keys(struct dcp_plan *plan, uint32_t count, struct dcp_error *err)
{
    char fqn[96];
    for (uint32_t i = 0; i < count; i++) {
        struct dcp_item item = {.kind = DCP_ITEM_BYTES, .slot_bytes = 800};
        struct dcp_buf path = {0};
        int len = snprintf(fqn, sizeof fqn, "loader.dp_rank_%u.worker_%u", plan->rank, i);
        dcp_path_put_str(&path, fqn, (size_t)len);
        must(dcp_plan_add_name(plan, fqn, (size_t)len, path.data, path.len, 1, &item.name, err),
             err);
        must(dcp_plan_add_item(plan, &item, NULL, NULL, NULL, err), err);
        dcp_buf_clean_up(&path);
    }
}

static struct dcp_save *
start_save(struct dcp_group *group, struct rank *rank, uint32_t tensors)
{
    struct dcp_save_params params = {.io = dcp_io_posix(), .dir_path = "/nowhere"};
    struct dcp_plan plan = {.rank = dcp_group_comm(group)->rank,
                            .thread_count = 1,
                            .single_file_per_rank = true,
                            .has_paths = true};
    struct dcp_error err = {0};
    struct dcp_save *save = NULL;

    must(dcp_save_new(group, &params, &save, &err), &err);
    for (uint32_t i = 0; i < tensors; i++) {
        make_item(&plan, rank->job->ranks, i, &err);
    }
    make_own_keys(&plan, rank->job->own_keys, &err);
    uint64_t since_ns = cpu_now_ns();
    dcp_save_set_plan(save, &plan);
    rank->books->cpu_ns[STEP_VOTE] += cpu_now_ns() - since_ns;
    return save;
}

/* ---- a rank ---- */

static void
agree(struct rank *rank, struct dcp_save *save, bool expect_fast)
{
    struct dcp_failure_list failures = {0};
    struct dcp_save_info info;
    struct dcp_error err = {0};

    wait_for_all(rank);
    rank->step = STEP_VOTE;
    rank->entered_ns = dcp_now_ns();
    rank->since_ns = cpu_now_ns();
    must(dcp_save_agree(save, NULL, &failures, &err), &err);
    leave(rank);
    rank->books->wall_ns[rank->step] += dcp_now_ns() - rank->entered_ns;
    dcp_save_get_info(save, &info);
    rank->books->kept_items = info.kept_items;
    if (info.fast != expect_fast) {
        fprintf(stderr, "save_scaling: a round was %s\n", info.fast ? "FAST" : "SLOW");
        exit(1);
    }
}

static void
write_file(const char *path, const struct dcp_buf *image)
{
    FILE *file = fopen(path, "wb");
    bool ok = file != NULL && fwrite(image->data, 1, image->len, file) == image->len &&
              fflush(file) == 0 && fsync(fileno(file)) == 0;

    if (!ok || fclose(file) != 0) {
        fprintf(stderr, "save_scaling: could not write %s\n", path);
        exit(1);
    }
}

static void
write_metadata(struct job *job, int round, const struct dcp_group *group)
{
    struct dcp_storage_meta meta = {.checkpoint_id = "/nowhere", .version = "1.0.0"};
    struct dcp_save_id id = {{1}};
    struct dcp_buf image = {0};
    struct dcp_error err = {0};
    uint64_t since_ns = cpu_now_ns();

    must(dcp_metadata_write(&group->installed->global, &meta, &id, 0, NULL, &image, &err), &err);
    if (job->metadata_path != NULL && round == CHANGED) {
        write_file(job->metadata_path, &image);
    }
    job->metadata_ns[round] = cpu_now_ns() - since_ns;
    job->metadata_bytes[round] = image.len;
    dcp_buf_clean_up(&image);
}

static uint64_t
kept_by_rank(const struct dcp_installed_plan *installed, uint32_t items)
{
    const struct dcp_layout *layout = &installed->layout;
    return layout->records_count * sizeof *layout->records +
           layout->files_count * sizeof *layout->files + (items + 7) / 8;
}

static void
run_slow_round(struct rank *rank, struct dcp_group *group, int round)
{
    struct job *job = rank->job;
    uint32_t tensors = round_tensors(job, round);

    rank->books = &rank->slow[round];
    uint64_t before_bytes = 0;
    wait_for_all(rank);
    if (rank->inner.rank == 0) {
        before_bytes = dcp_alloc_live_bytes(); /* what the round before installed */
    }
    wait_for_all(rank);
    struct dcp_save *save = start_save(group, rank, tensors);
    wait_for_all(rank);
    if (rank->inner.rank == 0) {
        job->plans_bytes[round] = dcp_alloc_live_bytes() - before_bytes;
    }
    agree(rank, save, false);
    rank->books->own_bytes = kept_by_rank(group->installed, tensors + job->own_keys);
    wait_for_all(rank);
    if (rank->inner.rank == 0) {
        job->installed_bytes[round] = dcp_alloc_live_bytes() - job->plans_bytes[round];
        job->answering_bytes[round] -= job->plans_bytes[round];
        write_metadata(job, round, group);
    }
    wait_for_all(rank);
    dcp_save_destroy(save);
}

static void *
run_rank(void *arg)
{
    struct rank *rank = arg;
    struct dcp_group *group = NULL;
    struct dcp_error err = {0};
    struct dcp_comm comm = rank->inner;

    comm.ctx = rank;
    comm.all_reduce_min = counted_all_reduce_min;
    comm.gather = counted_gather;
    comm.scatter = counted_scatter;
    comm.destroy = counted_destroy;
    must(dcp_group_new(&comm, 0, &group, &err), &err);
    run_slow_round(rank, group, FIRST);
    rank->books = &rank->fast;
    for (uint32_t i = 0; i < rank->job->fast_rounds; i++) {
        struct dcp_save *save = start_save(group, rank, rank->job->tensors);
        agree(rank, save, true);
        dcp_save_destroy(save);
    }
    run_slow_round(rank, group, CHANGED);
    dcp_group_destroy(group);
    return NULL;
}

/* ---- the job ---- */

static void
run_job(struct job *job)
{
    struct dcp_comm_sim *sim = NULL;
    struct dcp_error err = {0};
    pthread_attr_t attr;

    job->all = calloc(job->ranks, sizeof *job->all);
    if (job->all == NULL || pthread_attr_init(&attr) != 0 ||
        pthread_attr_setstacksize(&attr, STACK_BYTES) != 0) {
        fprintf(stderr, "save_scaling: no memory\n");
        exit(1);
    }
    must(dcp_comm_sim_new(job->ranks, TIMEOUT_MS, &sim, &err), &err);
    for (uint32_t r = 0; r < job->ranks; r++) {
        job->all[r].job = job;
        dcp_comm_sim_rank(sim, r, &job->all[r].inner);
        if (pthread_create(&job->all[r].thread, &attr, run_rank, &job->all[r]) != 0) {
            fprintf(stderr, "save_scaling: no thread for rank %u\n", r);
            exit(1);
        }
    }
    for (uint32_t r = 0; r < job->ranks; r++) {
        pthread_join(job->all[r].thread, NULL);
    }
    pthread_attr_destroy(&attr);
    dcp_comm_sim_destroy(sim);
}

static double
bytes_of_ranks(const struct job *job, int round)
{
    double own_bytes = 0;
    for (uint32_t r = 0; r < job->ranks; r++) {
        own_bytes += (double)job->all[r].slow[round].own_bytes;
    }
    return own_bytes;
}

static double
fast_mean_ns(const struct job *job)
{
    double fast_ns = 0;

    for (uint32_t r = 0; r < job->ranks && job->fast_rounds > 0; r++) {
        const struct books *fast = &job->all[r].fast;
        fast_ns += (double)(fast->cpu_ns[STEP_VOTE] + fast->cpu_ns[STEP_GATHER]) / job->fast_rounds;
    }
    return fast_ns / job->ranks;
}

static uint64_t
peak_bytes(void)
{
    struct rusage usage = {0};

    (void)getrusage(RUSAGE_SELF, &usage);
    return (uint64_t)usage.ru_maxrss * 1024;
}

/* One line per SLOW round. */
static void
report_json(const struct job *job, int round)
{
    const struct books *coordinator = &job->all[0].slow[round];
    uint64_t cpu_ns = job->metadata_ns[round];
    double own_bytes = bytes_of_ranks(job, round);

    printf("{\"round\": \"%s\", \"ranks\": %u, \"tensors\": %u, \"steps_cpu_ns\": {",
           round_names[round], job->ranks, round_tensors(job, round));
    for (int s = 0; s < STEPS; s++) {
        printf("\"%s\": %" PRIu64 ", ", step_names[s], coordinator->cpu_ns[s]);
        cpu_ns += coordinator->cpu_ns[s];
    }
    printf("\"metadata\": %" PRIu64 "}, \"cpu_ns\": %" PRIu64 ", \"metadata_bytes\": %" PRIu64 ", ",
           job->metadata_ns[round], cpu_ns, job->metadata_bytes[round]);
    printf("\"gathered_bytes\": %" PRIu64 ", \"plans_bytes\": %" PRIu64 ", ",
           coordinator->sent_bytes * job->ranks, job->plans_bytes[round]);
    printf("\"answering_bytes\": %" PRIu64
           ", \"layouts_bytes\": %.0f, \"coordinator_bytes\": %.0f, ",
           job->answering_bytes[round], own_bytes, (double)job->installed_bytes[round] - own_bytes);
    printf("\"peak_bytes\": %" PRIu64 ", \"fast_cpu_ns\": %.0f}\n", peak_bytes(),
           fast_mean_ns(job));
}

static void
report_slow(const struct job *job, int round)
{
    const struct books *coordinator = &job->all[0].slow[round];
    double items = (double)job->ranks * (round_tensors(job, round) + job->own_keys);
    double coordinator_ns = 0, own_bytes = bytes_of_ranks(job, round);

    printf("  %-18s %14s %14s %16s %12s\n", round_names[round], "coordinator ms", "ns per item",
           "other rank ms", "wall ms");
    for (int s = 0; s < STEPS; s++) {
        double others_ns = 0;
        for (uint32_t r = 1; r < job->ranks; r++) {
            others_ns += (double)job->all[r].slow[round].cpu_ns[s];
        }
        others_ns /= job->ranks > 1 ? job->ranks - 1 : 1;
        printf("  %-18s %14.2f %14.1f %16.3f %12.2f\n", step_names[s],
               (double)coordinator->cpu_ns[s] / 1e6, (double)coordinator->cpu_ns[s] / items,
               others_ns / 1e6, (double)coordinator->wall_ns[s] / 1e6);
        coordinator_ns += (double)coordinator->cpu_ns[s];
    }
    printf("  %-18s %14.2f %14.1f %16s %12s (%.1f bytes per item)\n", "metadata",
           (double)job->metadata_ns[round] / 1e6, (double)job->metadata_ns[round] / items, "-", "-",
           (double)job->metadata_bytes[round] / items);
    coordinator_ns += (double)job->metadata_ns[round];
    printf("  %-18s %14.2f %14.1f\n", "all", coordinator_ns / 1e6, coordinator_ns / items);
    printf("  bytes per item: a rank sends %.1f; the coordinator answering %.0f, kept %.0f; a "
           "rank's plan %.0f, its layout %.0f\n",
           (double)coordinator->sent_bytes * job->ranks / items,
           (double)job->answering_bytes[round] / items,
           ((double)job->installed_bytes[round] - own_bytes) / items,
           (double)job->plans_bytes[round] / items, own_bytes / items);
}

static void
report(const struct job *job)
{
    printf("%u ranks x %u tensors, %u keys of its own each\n", job->ranks, job->tensors,
           job->own_keys);
    for (int round = 0; round < ROUNDS; round++) {
        report_slow(job, round);
    }
    if (job->fast_rounds > 0) {
        const struct books *coordinator = &job->all[0].fast;
        double wall_ns =
            (double)(coordinator->wall_ns[STEP_VOTE] + coordinator->wall_ns[STEP_GATHER]);
        printf("  FAST round: %.1f us CPU per rank (%.1f ns per item), agreed in %.2f ms wall\n",
               fast_mean_ns(job) / 1e3, fast_mean_ns(job) / (job->tensors + job->own_keys),
               wall_ns / job->fast_rounds / 1e6);
    }
    printf("  peak of all %.2f GB\n", (double)peak_bytes() / 1e9);
}

/* Every replica once, everything else by everybody. */
static void
check_counts(const struct job *job, int round)
{
    uint64_t kept = 0, tensors = round_tensors(job, round);
    uint64_t replicas = replicas_count((uint32_t)tensors);

    for (uint32_t r = 0; r < job->ranks; r++) {
        kept += job->all[r].slow[round].kept_items;
    }
    if (kept != (tensors - replicas + job->own_keys) * job->ranks + replicas) {
        fprintf(stderr, "save_scaling: %" PRIu64 " items are kept\n", kept);
        exit(1);
    }
}

int
main(int argc, char **argv)
{
    bool as_json = argc > 1 && strcmp(argv[1], "--json") == 0;
    argc -= as_json;
    argv += as_json;
    struct job job = {.ranks = argc > 1 ? (uint32_t)strtoul(argv[1], NULL, 10) : 64,
                      .tensors = argc > 2 ? (uint32_t)strtoul(argv[2], NULL, 10) : 200,
                      .fast_rounds = argc > 3 ? (uint32_t)strtoul(argv[3], NULL, 10) : 3,
                      .own_keys = argc > 4 ? (uint32_t)strtoul(argv[4], NULL, 10) : 0,
                      .metadata_path = argc > 5 ? argv[5] : NULL};

    if (job.ranks == 0 || job.tensors == 0) {
        fprintf(stderr,
                "usage: save_scaling [--json] [ranks] [tensors per rank] [FAST rounds] [own keys] "
                "[file]\n");
        return 2;
    }
    run_job(&job);
    for (int round = 0; round < ROUNDS; round++) {
        check_counts(&job, round);
    }
    for (int round = 0; as_json && round < ROUNDS; round++) {
        report_json(&job, round);
    }
    if (!as_json) {
        report(&job);
    }
    free(job.all);
    if (dcp_alloc_live_bytes() != 0) {
        fprintf(stderr, "save_scaling: leaked %" PRIu64 " bytes\n", dcp_alloc_live_bytes());
        return 1;
    }
    return 0;
}
