/*
 * test_trace.c: the queue of events: nothing is lost below its size, nothing waits above it, and
 * what comes out is JSON with every value that went in.
 */
#include "ctest.h"

#include <pthread.h>
#include <sys/wait.h>
#include <unistd.h>

#include "trace.h"

enum { THREADS = 8, PER_THREAD = 5000 };

static uint64_t
take(struct dcp_buf *buf)
{
    struct dcp_error err = {0};
    uint64_t count, taken = 0;
    do {
        CHECK_OK(dcp_trace_take(buf, 0, 7, &count, &err), &err);
        CHECK(count <= DCP_TRACE_TAKE_EVENTS);
        taken += count;
    } while (count != 0 && taken < DCP_TRACE_EVENTS);
    return taken;
}

static uint64_t
lines_of(const struct dcp_buf *buf)
{
    uint64_t lines = 0;
    for (size_t i = 0; i < buf->len; i++) {
        lines += buf->data[i] == '\n';
    }
    return lines;
}

static bool
holds(const struct dcp_buf *buf, const char *text)
{
    return memmem(buf->data, buf->len, text, strlen(text)) != NULL;
}

static void
nothing_is_recorded_when_it_is_off(void)
{
    struct dcp_buf buf = {0};
    CHECK_EQ(dcp_trace_begin(), 0);
    dcp_trace_end(dcp_trace_begin(), "phase", "plan", 0);
    dcp_trace_end_io(dcp_trace_begin(), "write", "f", 0, 1);
    dcp_trace_thread("reading");
    CHECK_EQ(take(&buf), 0);
    CHECK_EQ(buf.len, 0);
    dcp_buf_clean_up(&buf);
}

static void
what_was_recorded_comes_out_once_with_its_values(void)
{
    struct dcp_buf buf = {0};
    const struct dcp_trace_event event = {.category = "io",
                                          .name = "write",
                                          .begin_ns = 1234567,
                                          .end_ns = 1334568,
                                          .file = "a \"dir\"/__0_\"\\\n1.distcp",
                                          .offset_bytes = 4096,
                                          .bytes = 99};
    dcp_trace_switch(true);
    dcp_trace_record(&event);
    dcp_trace_thread("reading");
    dcp_trace_switch(false);
    CHECK_EQ(take(&buf), 2);
    CHECK(holds(&buf, "\"ph\":\"X\",\"pid\":7,"));
    CHECK(holds(&buf, "\"ts\":1234.567,\"dur\":100.001"));
    CHECK(holds(&buf, "{\"file\":\"__0____1.distcp\",\"offset\":4096,\"bytes\":99}"));
    CHECK(holds(&buf, "\"name\":\"thread_name\""));
    CHECK(holds(&buf, "{\"name\":\"reading\"}"));
    CHECK_EQ(lines_of(&buf), 2);
    CHECK_EQ(take(&buf), 0);
    dcp_buf_clean_up(&buf);
}

static void
what_the_kernel_does_beside_begins_and_ends(void)
{
    struct dcp_buf buf = {0};
    struct dcp_trace_event event = {.category = "io",
                                    .name = "write",
                                    .begin_ns = 1000,
                                    .end_ns = 3000,
                                    .file = "a_name_that_is_longer_than_there_is_room_for.distcp",
                                    .bytes = UINT64_MAX,
                                    .offset_bytes = UINT64_MAX,
                                    .beside = true};
    dcp_trace_switch(true);
    dcp_trace_record(&event);
    dcp_trace_switch(false);
    CHECK_EQ(take(&buf), 1);
    CHECK_EQ(lines_of(&buf), 2);
    CHECK(holds(&buf, "\"ph\":\"b\"") && holds(&buf, "\"ph\":\"e\""));
    CHECK(holds(&buf, "\"ts\":1.000,") && holds(&buf, "\"ts\":3.000,"));
    CHECK(holds(&buf, "\"a_name_that_is_longer_than_there_is_roo\""));
    dcp_buf_clean_up(&buf);
}

static void
times_before_the_base_are_at_the_base(void)
{
    struct dcp_buf buf = {0};
    struct dcp_error err = {0};
    uint64_t count;
    struct dcp_trace_event event = {
        .category = "phase", .name = "plan", .begin_ns = 1000, .end_ns = 6000};
    dcp_trace_switch(true);
    dcp_trace_record(&event);
    dcp_trace_switch(false);
    CHECK_OK(dcp_trace_take(&buf, 4000, 0, &count, &err), &err);
    CHECK(holds(&buf, "\"ts\":0.000,\"dur\":2.000"));
    dcp_buf_clean_up(&buf);
}

static void
a_full_queue_drops_and_counts_and_goes_on_when_it_was_emptied(void)
{
    struct dcp_trace_event event = {.category = "phase", .name = "plan"};
    uint64_t dropped = dcp_trace_dropped();
    dcp_trace_switch(true);
    for (int lap = 0; lap < 3; lap++) {
        struct dcp_buf buf = {0};
        for (int i = 0; i < DCP_TRACE_EVENTS + 10; i++) {
            dcp_trace_record(&event);
        }
        CHECK_EQ(take(&buf), DCP_TRACE_EVENTS);
        CHECK_EQ(dcp_trace_dropped() - dropped, 10 * (lap + 1));
        dcp_buf_clean_up(&buf);
    }
    dcp_trace_switch(false);
}

/* Every thread numbers its events in `bytes`: 1 + thread * PER_THREAD + i. */
static void *
record_many(void *arg)
{
    uint64_t first = 1 + (uint64_t)(uintptr_t)arg * PER_THREAD;
    for (uint64_t i = 0; i < PER_THREAD; i++) {
        dcp_trace_end(dcp_trace_begin(), "cpu", "copy", first + i);
    }
    return NULL;
}

static void
note_numbers(const struct dcp_buf *buf, uint8_t *seen)
{
    static const char key[] = "\"bytes\":";
    const uint8_t *at = buf->data, *end = buf->data + buf->len;
    while (at < end && (at = memmem(at, (size_t)(end - at), key, sizeof key - 1)) != NULL) {
        at += sizeof key - 1;
        unsigned long long number = strtoull((const char *)at, NULL, 10);
        CHECK(number >= 1 && number <= THREADS * PER_THREAD);
        if (number >= 1 && number <= THREADS * PER_THREAD) {
            seen[number - 1]++;
        }
    }
}

static void
many_threads_lose_nothing_while_another_takes(void)
{
    static uint8_t seen[THREADS * PER_THREAD];
    pthread_t threads[THREADS];
    uint64_t dropped = dcp_trace_dropped(), taken = 0;
    memset(seen, 0, sizeof seen);
    dcp_trace_switch(true);
    for (uintptr_t i = 0; i < THREADS; i++) {
        CHECK_EQ(pthread_create(&threads[i], NULL, record_many, (void *)i), 0);
    }
    for (int rounds = 0; rounds < 50; rounds++) {
        struct dcp_buf buf = {0};
        taken += take(&buf);
        note_numbers(&buf, seen);
        dcp_buf_clean_up(&buf);
    }
    for (int i = 0; i < THREADS; i++) {
        pthread_join(threads[i], NULL);
    }
    dcp_trace_switch(false);
    struct dcp_buf buf = {0};
    taken += take(&buf);
    note_numbers(&buf, seen);
    dcp_buf_clean_up(&buf);
    CHECK_EQ(taken, THREADS * PER_THREAD);
    CHECK_EQ(dcp_trace_dropped(), dropped);
    for (int i = 0; i < THREADS * PER_THREAD; i++) {
        CHECK(seen[i] == 1);
    }
}

static void
a_forked_child_forgets_its_parents_events_and_records_its_own(void)
{
    struct dcp_buf buf = {0};
    dcp_trace_switch(true);
    dcp_trace_end(dcp_trace_begin(), "phase", "plan", 0);
    pid_t child = fork();
    if (child == 0) {
        dcp_trace_forget();
        dcp_trace_end(dcp_trace_begin(), "phase", "write", 0);
        _exit(take(&buf) == 1 && holds(&buf, "\"write\"") ? 0 : 1);
    }
    int status = 1;
    CHECK(waitpid(child, &status, 0) == child && status == 0);
    dcp_trace_switch(false);
    CHECK_EQ(take(&buf), 1);
    CHECK(holds(&buf, "\"plan\""));
    dcp_buf_clean_up(&buf);
}

static void
what_was_packed_is_recorded_by_another_process_as_it_was(void)
{
    struct dcp_buf packed = {0}, want = {0}, got = {0};
    struct dcp_trace_event events[] = {
        {.category = "io",
         .name = "write",
         .begin_ns = 5000,
         .end_ns = 9000,
         .file = "a/__0_0.d",
         .offset_bytes = 77,
         .bytes = 88,
         .beside = true},
        {.category = "thread", .name = "writing", .begin_ns = 1, .end_ns = 1},
        {.category = "phase", .name = "a name that is just as long as it may be", .end_ns = 3},
    };

    dcp_trace_switch(true);
    for (int round = 0; round < 2; round++) {
        for (int i = 0; i < 3; i++) {
            dcp_trace_record(&events[i]);
        }
        if (round == 0) {
            CHECK_EQ(dcp_trace_pack(&packed), 3);
            CHECK_EQ(dcp_trace_pack(&packed), 0);
            CHECK(packed.len <= 3 * DCP_TRACE_PACKED_BYTES);
            CHECK(dcp_trace_unpack((struct dcp_span){packed.data, packed.len}));
            CHECK_EQ(take(&got), 3);
        } else {
            CHECK_EQ(take(&want), 3);
        }
    }
    CHECK(holds(&got, "\"bytes\":88}") && holds(&got, "__0_0.d") && holds(&got, "\"ph\":\"b\""));
    CHECK(holds(&got, "a name that is just as long as it may b\""));
    CHECK_EQ(lines_of(&got), lines_of(&want));
    /* Whatever is cut or turned is refused, or is another event: never more than there was. */
    for (size_t len = 0; len < packed.len; len++) {
        (void)dcp_trace_unpack((struct dcp_span){packed.data, len});
        got.len = 0;
        CHECK(take(&got) <= 3);
    }
    for (size_t at = 0; at < packed.len; at++) {
        uint8_t was = packed.data[at];
        packed.data[at] = 0xff;
        (void)dcp_trace_unpack((struct dcp_span){packed.data, packed.len});
        packed.data[at] = was;
        got.len = 0;
        CHECK(take(&got) <= 3);
        CHECK(!holds(&got, "\xff"));
    }
    dcp_trace_switch(false);
    CHECK(dcp_trace_unpack((struct dcp_span){packed.data, packed.len}));
    got.len = 0;
    CHECK_EQ(take(&got), 0);
    dcp_buf_clean_up(&packed);
    dcp_buf_clean_up(&want);
    dcp_buf_clean_up(&got);
}

static void
names_beyond_the_room_for_them_are_recorded_as_other(void)
{
    struct dcp_buf packed = {0}, got = {0};
    char name[32];
    struct dcp_trace_event event = {.category = "phase", .name = name, .end_ns = 1};

    dcp_trace_switch(true);
    for (int i = 0; i < 100; i++) {
        snprintf(name, sizeof name, "name %d", i);
        dcp_trace_record(&event);
        packed.len = 0;
        CHECK_EQ(dcp_trace_pack(&packed), 1);
        CHECK(dcp_trace_unpack((struct dcp_span){packed.data, packed.len}));
        CHECK_EQ(take(&got), 1);
    }
    CHECK(holds(&got, "\"name 9\"") && holds(&got, "\"other\"") && !holds(&got, "\"name 99\""));
    dcp_trace_switch(false);
    dcp_buf_clean_up(&packed);
    dcp_buf_clean_up(&got);
}

CTEST_MAIN(RUN(nothing_is_recorded_when_it_is_off);
           RUN(what_was_recorded_comes_out_once_with_its_values);
           RUN(what_the_kernel_does_beside_begins_and_ends);
           RUN(times_before_the_base_are_at_the_base);
           RUN(a_full_queue_drops_and_counts_and_goes_on_when_it_was_emptied);
           RUN(many_threads_lose_nothing_while_another_takes);
           RUN(what_was_packed_is_recorded_by_another_process_as_it_was);
           RUN(names_beyond_the_room_for_them_are_recorded_as_other);
           RUN(a_forked_child_forgets_its_parents_events_and_records_its_own);)
