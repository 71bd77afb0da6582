/*
 * test_save_outside.c: saves whose plans are made outside of the core: what ranks send arrives,
 * what each was given is written, and a rank that fails anywhere on the way fails all of them, with
 * its reason, and leaves the checkpoint that was there.
 */
#include "ctest.h"

#include "data_file.h"
#include "dcp_metadata.h"
#include "dcp_transfer.h"
#include "plan_maker.h"
#include "save_world.h"
#include "sim_ranks.h"

enum { RANKS = 4, COORDINATOR = 1, ASKING_RANK = 2, TIMEOUT_MS = 20000, OBJECT_BYTES = 100 };

enum step { NOWHERE, BEFORE_AGREE, PLANNING, LAYING_OUT, METADATA, WRITING, STEPS };

/* The first save, which succeeds; one that may fail; one more on the same group. */
enum { SAVES = 3, MIDDLE = 1 };

struct job {
    struct io_memory *fs;
    enum step fails_at;
    uint32_t fails_on;
    int saves;
    /* What ranks saw, by save. */
    int rc[SAVES][RANKS];
    struct dcp_save_info info[SAVES][RANKS];
    char why[SAVES][RANKS][DCP_ERROR_MESSAGE_BYTES];
    uint32_t failed_rank[SAVES][RANKS];
    uint64_t failures_count[SAVES][RANKS];
    bool told_all[SAVES], got_own_part[SAVES][RANKS]; /* by the messages */
};

struct rank_save {
    struct job *job;
    int number;
    uint32_t rank;
    struct dcp_save *save;
    struct dcp_error why; /* of what failed on this rank */
    struct dcp_failure failure;
    uint8_t object[OBJECT_BYTES];
    struct dcp_source source;
};

static const struct dcp_failure *
failure_of(struct rank_save *s)
{
    s->failure = (struct dcp_failure){.rank = s->rank,
                                      .kind = DCP_FAILURE_CORE,
                                      .bytes = (uint8_t *)&s->why,
                                      .len = sizeof s->why};
    return s->why.code != 0 ? &s->failure : NULL;
}

static void
maybe_fail(struct rank_save *s, enum step step)
{
    if (s->number == MIDDLE && s->job->fails_at == step && s->job->fails_on == s->rank) {
        (void)!dcp_error_set(&s->why, DCP_E_INVALID, 0, NULL, "no luck in step %d", step);
    }
}

/* A message of a rank, of any length: those of rank 0 are empty. */
static struct dcp_buf
message_of(const char *what, uint32_t rank)
{
    struct dcp_buf message = {0};
    for (uint32_t i = 0; i < rank * 700; i++) {
        dcp_buf_put(&message, what, strlen(what));
        dcp_buf_put_u32(&message, rank);
    }
    return message;
}

static bool
is_message(const struct dcp_span *span, const char *what, uint32_t rank)
{
    struct dcp_buf want = message_of(what, rank);
    bool same =
        span->len == want.len && (want.len == 0 || memcmp(span->data, want.data, want.len) == 0);
    dcp_buf_clean_up(&want);
    return same;
}

/* Both messages; a rank that failed sends nothing. */
static int
exchange_plans(struct rank_save *s, struct dcp_error *err)
{
    struct dcp_buf mine = s->why.code == 0 ? message_of("plan", s->rank) : (struct dcp_buf){0};
    struct dcp_buf parts[RANKS] = {{0}}, part = {0};
    struct dcp_span span = {mine.data, mine.len}, part_spans[RANKS], *spans = NULL;
    uint8_t *block = NULL;
    bool failed_before = s->number == MIDDLE && s->job->fails_at == PLANNING;
    int rc = dcp_save_gather(s->save, &span, &block, &spans, err);
    for (uint32_t r = 0; rc == 0 && r < RANKS && s->rank == COORDINATOR; r++) {
        bool is_empty = failed_before && r == s->job->fails_on;
        s->job->told_all[s->number] =
            (r == 0 || s->job->told_all[s->number]) &&
            (is_empty ? spans[r].len == 0 : is_message(&spans[r], "plan", r));
        parts[r] = failed_before ? (struct dcp_buf){0} : message_of("part", r);
        part_spans[r] = (struct dcp_span){parts[r].data, parts[r].len};
    }
    if (rc == 0) {
        rc = dcp_save_scatter(s->save, s->rank == COORDINATOR ? part_spans : NULL, &part, err);
        span = (struct dcp_span){part.data, part.len};
        s->job->got_own_part[s->number][s->rank] =
            failed_before ? part.len == 0 : is_message(&span, "part", s->rank);
    }
    for (uint32_t r = 0; r < RANKS; r++) {
        dcp_buf_clean_up(&parts[r]);
    }
    dcp_buf_clean_up(&mine);
    dcp_buf_clean_up(&part);
    dcp_free(block);
    dcp_free(spans);
    return rc;
}

/* One object of the rank's own bytes; without a length where laying it out is to fail. */
static void
lay_out(struct rank_save *s)
{
    bool fails =
        s->number == MIDDLE && s->job->fails_at == LAYING_OUT && s->job->fails_on == s->rank;
    struct dcp_plan plan = {
        .rank = s->rank, .thread_count = 1, .single_file_per_rank = true, .planned_outside = true};
    char fqn[32];
    if (s->why.code != 0) {
        return;
    }
    snprintf(fqn, sizeof fqn, "object.%u", s->rank);
    maker_object(&plan, fqn, fails ? 0 : OBJECT_BYTES);
    memset(s->object, (int)(16 * (uint32_t)s->number + s->rank), sizeof s->object);
    s->source = (struct dcp_source){.data = s->object};
    CHECK(dcp_save_laid_out(s->save) == NULL);
    dcp_save_set_plan(s->save, &plan);
    if (dcp_save_lay_out(s->save, &s->why) == 0) {
        CHECK(dcp_save_laid_out(s->save)->records_count == 1);
    } else {
        CHECK(dcp_save_laid_out(s->save) == NULL);
    }
}

static int
settle_plan(struct rank_save *s, struct dcp_failure_list *failures, struct dcp_error *err)
{
    static const uint8_t pickle[] = "\x80\2}q\0.";
    struct dcp_span nothing = {NULL, 0}, image = {pickle, sizeof pickle - 1}, *spans = NULL;
    uint8_t *block = NULL;
    int rc = dcp_save_gather(s->save, &nothing, &block, &spans, err);
    dcp_free(block);
    dcp_free(spans);
    if (rc != 0) {
        return rc;
    }
    maybe_fail(s, METADATA);
    if (s->rank == COORDINATOR && s->why.code == 0) {
        (void)!dcp_save_set_metadata(s->save, &image, &s->why);
    }
    return dcp_save_settle_plan(s->save, failure_of(s), failures, err);
}

static int
save_steps(struct rank_save *s, struct dcp_failure_list *failures, struct dcp_error *err)
{
    bool exists;
    if (dcp_save_open(s->save, &exists, &s->why) == 0) {
        (void)!dcp_save_claim(s->save, &s->why);
    }
    maybe_fail(s, BEFORE_AGREE);
    int rc = dcp_save_agree(s->save, failure_of(s), failures, err);
    if (rc != 0) {
        return rc;
    }
    maybe_fail(s, PLANNING);
    rc = exchange_plans(s, err);
    if (rc == 0) {
        lay_out(s);
        rc = settle_plan(s, failures, err);
    }
    if (rc != 0) {
        return rc;
    }
    maybe_fail(s, WRITING);
    if (s->why.code == 0) {
        (void)!dcp_save_write(s->save, &s->source, NULL, NULL, &s->why);
    }
    return dcp_save_finish(s->save, failure_of(s), failures, err);
}

static void
save_one(struct dcp_group *group, struct job *job, int number, uint32_t rank)
{
    const struct dcp_save_params params = {
        .io = &io_memory_process(job->fs, rank)->io,
        .dir_path = SAVE_DIR,
        .meta = {.checkpoint_id = SAVE_DIR, .version = "1.0.0"},
        .call_hash = 5,
        .sync = true,
        /* One rank's planner is enough. */
        .planned_outside = rank == ASKING_RANK,
    };
    struct rank_save s = {.job = job, .number = number, .rank = rank};
    struct dcp_failure_list failures = {0};
    struct dcp_error err = {0};
    CHECK_OK(dcp_save_new(group, &params, &s.save, &err), &err);
    dcp_error_clear(&s.why);
    dcp_error_clear(&err);
    int rc = save_steps(&s, &failures, &err);
    job->rc[number][rank] = rc;
    dcp_save_get_info(s.save, &job->info[number][rank]);
    job->failures_count[number][rank] = failures.count;
    if (failures.count > 0) {
        const struct dcp_error *first =
            (const struct dcp_error *)(const void *)failures.items[0].bytes;
        job->failed_rank[number][rank] = failures.items[0].rank;
        snprintf(job->why[number][rank], DCP_ERROR_MESSAGE_BYTES, "%s", first->message);
    }
    dcp_failure_list_clean_up(&failures);
    dcp_save_destroy(s.save);
}

static void
run_rank(const struct dcp_comm *comm, struct dcp_comm_sim *sim, void *arg)
{
    struct dcp_group *group = save_world_group(comm, COORDINATOR);
    (void)sim;
    for (int number = 0; number < ((struct job *)arg)->saves; number++) {
        save_one(group, arg, number, comm->rank);
    }
    dcp_group_destroy(group);
}

/* The save whose bytes lie in the directory, -1 when they are of none or of several; the metadata
 * must be the planner's, and nothing else there. */
static int
save_found(const struct io_memory *fs)
{
    size_t len, count = io_memory_names_count(fs, SAVE_DIR);
    const uint8_t *image = io_memory_file(fs, SAVE_DIR, ".metadata", &len);
    struct dcp_save_id id;
    int found = -1;
    CHECK(image != NULL && memcmp(image, "\x80\2}q\0.", 6) == 0);
    CHECK(dcp_metadata_peek_save_id(image, len, &id));
    CHECK_EQ(count, RANKS + 1);
    for (size_t i = 0; i < count; i++) {
        const char *name = io_memory_name(fs, SAVE_DIR, i);
        struct dcp_file_header header;
        struct dcp_error err = {0};
        uint32_t rank;
        uint64_t n;
        if (!dcp_data_file_parse(name, &rank, &n)) {
            continue;
        }
        const uint8_t *bytes = io_memory_file(fs, SAVE_DIR, name, &len);
        CHECK_OK(dcp_file_parse_header(bytes, &header, &err), &err);
        CHECK(memcmp(&header.save_id, &id, sizeof id) == 0);
        CHECK(header.planned_outside && header.table_bytes > 0);
        int number = (bytes[DCP_FILE_HEADER_BYTES] - (int)rank) / 16;
        for (int b = 0; b < OBJECT_BYTES; b++) {
            CHECK_EQ(bytes[DCP_FILE_HEADER_BYTES + b], 16 * number + (int)rank);
        }
        CHECK(found == -1 || found == number);
        found = number;
    }
    return found;
}

static void
run_job(struct job *job, enum step fails_at, uint32_t fails_on, int saves)
{
    *job = (struct job){
        .fs = io_memory_new(1), .fails_at = fails_at, .fails_on = fails_on, .saves = saves};
    sim_ranks_run(RANKS, TIMEOUT_MS, run_rank, job);
}

static void
end_job(struct job *job)
{
    CHECK_EQ(io_memory_open_files(job->fs), 0);
    io_memory_free(job->fs);
    dcp_engine_trim();
}

static void
one_ranks_planner_plans_for_all_and_every_rank_writes_what_it_was_given(void)
{
    struct job *job = calloc(1, sizeof *job);
    run_job(job, NOWHERE, 0, SAVES);
    for (int number = 0; number < SAVES; number++) {
        CHECK(job->told_all[number]);
        for (uint32_t r = 0; r < RANKS; r++) {
            CHECK_EQ(job->rc[number][r], 0);
            CHECK(job->got_own_part[number][r]);
            CHECK(job->info[number][r].planned_outside);
            CHECK(!job->info[number][r].fast); /* such a plan is its save's alone */
            CHECK_EQ(job->info[number][r].outcome, DCP_OUTCOME_COMMITTED);
        }
    }
    CHECK_EQ(save_found(job->fs), SAVES - 1);
    end_job(job);
    free(job);
}

static void
a_rank_that_fails_fails_all_and_the_next_save_is_not_hindered(void)
{
    struct job *job = calloc(1, sizeof *job);
    for (int step = BEFORE_AGREE; step < STEPS; step++) {
        for (uint32_t rank = 0; rank < RANKS; rank++) {
            run_job(job, (enum step)step, rank, MIDDLE + 1);
            CHECK_EQ(save_found(job->fs), 0); /* what was there stays */
            end_job(job);
            run_job(job, (enum step)step, rank, SAVES);
            for (uint32_t r = 0; r < RANKS; r++) {
                CHECK_EQ(job->rc[0][r], 0);
                CHECK_EQ(job->rc[MIDDLE][r], DCP_E_PEER);
                CHECK_EQ(job->failures_count[MIDDLE][r], 1);
                CHECK_EQ(job->failed_rank[MIDDLE][r], rank);
                CHECK(strstr(job->why[MIDDLE][r],
                             step == LAYING_OUT ? "has no record length" : "no luck") != NULL);
                CHECK_EQ(job->rc[2][r], 0);
            }
            CHECK_EQ(save_found(job->fs), 2);
            end_job(job);
        }
    }
    free(job);
}

CTEST_MAIN(RUN(one_ranks_planner_plans_for_all_and_every_rank_writes_what_it_was_given);
           RUN(a_rank_that_fails_fails_all_and_the_next_save_is_not_hindered);)
