/*
 * test_writer_message.c: messages of a writer process come back as they were put; whatever else
 * arrives is refused, by decoders and by the process, and harms neither.
 */
#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include "ctest.h"
#include "le_bytes.h"
#include "writer_frame.h"
#include "writer_message.h"
#include "writer_service.h"
#include "writer_world.h"

enum { FILES = 5 };

/* A request with a bit of everything. */
static void
make_request(struct dcp_writer_request *ret, char *path)
{
    uint64_t at = 0;

    *ret = (struct dcp_writer_request){
        .save_id = {{1, 2, 3}},
        .image = {.rank = 3, .files_count = FILES},
        .options = {.direct = DCP_DIRECT_ON,
                    .sync = true,
                    .ring_buffers = 3,
                    .ring_buffer_bytes = 8192,
                    .tuning = {.queue = DCP_QUEUE_OFF,
                               .nice = 7,
                               .io_priority = 0x6000,
                               .limit_bytes_s = 1u << 30}},
        .dir_path = path,
        .survives = true,
        .survival = {.claim_rank = 5,
                     .n0 = 10,
                     .metadata = {(const uint8_t *)"metadata", sizeof "metadata"}},
    };
    ret->image.files = dcp_calloc(FILES, sizeof *ret->image.files);
    for (uint32_t i = 0; i < FILES; i++) {
        ret->image.files[i] = (struct dcp_image_file){at, 5000 * i + 64, 10 + i};
        at += dcp_align_up(5000 * i + 64, DCP_DIRECT_ALIGN_BYTES);
        ret->image.total_bytes += 5000 * i + 64;
    }
    ret->image.bytes = at;
    ret->image.payload_bytes = 700;
}

static struct dcp_span
body_of(const struct dcp_buf *message)
{
    return (struct dcp_span){message->data + DCP_WRITER_HEADER_BYTES,
                             message->len - DCP_WRITER_HEADER_BYTES};
}

static void
make_result(struct dcp_writer_result *ret)
{
    *ret = (struct dcp_writer_result){.code = DCP_E_IO, .created_files = 4, .payload_bytes = 99};
    dcp_error_set(&ret->err, DCP_E_IO, 28, "/d/__0_0.distcp", "writing %s failed", "it");
    ret->stats.file_bytes = 12345;
    ret->stats.ring_bytes = 678;
}

static void
what_is_put_is_what_is_read(void)
{
    struct dcp_writer_request request, got = {0};
    struct dcp_writer_result result, got_result;
    struct dcp_writer_progress progress = {77}, got_progress = {0};
    uint64_t prepare_bytes = 0;
    struct dcp_buf buf = {0};
    struct dcp_error err = {0};
    char path[] = "/some/directory";

    make_request(&request, path);
    dcp_writer_put_request(&buf, &request);
    CHECK_OK(dcp_writer_get_request(body_of(&buf), &got, &err), &err);
    CHECK(memcmp(&got.save_id, &request.save_id, sizeof got.save_id) == 0);
    CHECK(memcmp(&got.options, &request.options, sizeof got.options) == 0);
    CHECK(strcmp(got.dir_path, path) == 0);
    CHECK(got.image.rank == 3 && got.image.files_count == FILES);
    CHECK(got.image.bytes == request.image.bytes && got.image.payload_bytes == 700);
    CHECK_EQ(got.image.total_bytes, request.image.total_bytes);
    CHECK(memcmp(got.image.files, request.image.files, FILES * sizeof *got.image.files) == 0);
    CHECK(got.survives && got.survival.claim_rank == 5 && got.survival.n0 == 10);
    CHECK(got.survival.metadata.len == sizeof "metadata" &&
          memcmp(got.survival.metadata.data, "metadata", sizeof "metadata") == 0);
    dcp_writer_request_clean_up(&got);
    dcp_buf_clear(&buf);
    request.survives = false;
    dcp_writer_put_request(&buf, &request);
    CHECK_OK(dcp_writer_get_request(body_of(&buf), &got, &err), &err);
    CHECK(!got.survives && got.survival.metadata.len == 0);
    dcp_writer_request_clean_up(&got);
    dcp_image_clean_up(&request.image);

    make_result(&result);
    dcp_buf_clear(&buf);
    dcp_writer_put_result(&buf, &result);
    CHECK(dcp_writer_get_result(body_of(&buf), &got_result));
    CHECK(got_result.code == DCP_E_IO && got_result.created_files == 4);
    CHECK(got_result.err.sys_errno == 28 && got_result.err.rank == result.err.rank);
    CHECK(got_result.err.offset_bytes == UINT64_MAX);
    CHECK(strcmp(got_result.err.path, result.err.path) == 0);
    CHECK(strcmp(got_result.err.message, "writing it failed") == 0);
    CHECK(memcmp(&got_result.stats, &result.stats, sizeof result.stats) == 0);

    dcp_buf_clear(&buf);
    dcp_writer_put_progress(&buf, &progress);
    CHECK(dcp_writer_get_progress(body_of(&buf), &got_progress) &&
          got_progress.payload_bytes == 77);
    dcp_buf_clear(&buf);
    dcp_writer_put_prepare(&buf, 88);
    CHECK(dcp_writer_get_prepare(body_of(&buf), &prepare_bytes) && prepare_bytes == 88);
    buf.data[DCP_WRITER_HEADER_BYTES] = 0;
    CHECK(!dcp_writer_get_prepare(body_of(&buf), &prepare_bytes)); /* of nothing */
    dcp_buf_clear(&buf);
    dcp_writer_put_hello(&buf);
    CHECK(dcp_writer_get_hello(body_of(&buf)));
    buf.data[DCP_WRITER_HEADER_BYTES] ^= 1;
    CHECK(!dcp_writer_get_hello(body_of(&buf)));
    dcp_buf_clean_up(&buf);
}

/* What a decoder lets through must be safe to act on. */
static void
check_request(const struct dcp_writer_request *request)
{
    uint64_t total = 0;

    for (uint32_t i = 0; i < request->image.files_count; i++) {
        const struct dcp_image_file *file = &request->image.files[i];
        CHECK(file->offset_bytes <= request->image.bytes);
        CHECK(file->length_bytes <= request->image.bytes - file->offset_bytes);
        CHECK(file->offset_bytes % DCP_DIRECT_ALIGN_BYTES == 0);
        CHECK(file->n <= UINT32_MAX);
        total += file->length_bytes;
    }
    CHECK(total == request->image.total_bytes && request->image.payload_bytes <= total);
    CHECK(request->options.tuning.nice >= 0 && request->options.tuning.nice <= 19);
}

/* Cuts the message or changes some of its bytes; a copy of its own size, so that ASan sees reads
 * past its end. */
static struct dcp_span
damage(struct maker_rng *rng, const struct dcp_buf *message, uint8_t **ret_copy)
{
    size_t len = message->len;
    uint64_t kind = maker_below(rng, 3);

    if (kind == 0) {
        len = DCP_WRITER_HEADER_BYTES + maker_below(rng, len - DCP_WRITER_HEADER_BYTES);
    }
    uint8_t *copy = dcp_malloc(len);
    memcpy(copy, message->data, len);
    for (uint64_t i = kind == 0 ? 0 : 1 + maker_below(rng, 4); i != 0; i--) {
        size_t at = DCP_WRITER_HEADER_BYTES + maker_below(rng, len - DCP_WRITER_HEADER_BYTES);
        copy[at] = kind == 1 ? (uint8_t)maker_below(rng, 256) : (uint8_t)(copy[at] ^ 0x80);
    }
    *ret_copy = copy;
    return (struct dcp_span){copy + DCP_WRITER_HEADER_BYTES, len - DCP_WRITER_HEADER_BYTES};
}

static void
damaged_messages_are_refused_or_harmless(void)
{
    struct maker_rng rng = {.state = 11};
    struct dcp_buf asked = {0}, answered = {0};
    struct dcp_writer_request request;
    struct dcp_writer_result result;
    uint32_t refused = 0;
    char path[] = "/some/directory";

    make_request(&request, path);
    make_result(&result);
    dcp_writer_put_request(&asked, &request);
    dcp_writer_put_result(&answered, &result);
    for (int i = 0; i < 4000; i++) {
        struct dcp_writer_request got = {0};
        struct dcp_writer_result got_result;
        struct dcp_error err = {0};
        uint8_t *copy;

        struct dcp_span body = damage(&rng, &asked, &copy);
        int rc = dcp_writer_get_request(body, &got, &err);
        refused += rc == DCP_E_CORRUPT;
        CHECK(rc == 0 || rc == DCP_E_CORRUPT);
        if (rc == 0) {
            check_request(&got);
            dcp_writer_request_clean_up(&got);
        }
        dcp_free(copy);
        body = damage(&rng, &answered, &copy);
        if (dcp_writer_get_result(body, &got_result)) {
            CHECK(got_result.code <= 0);
            CHECK(memchr(got_result.err.message, 0, sizeof got_result.err.message) != NULL);
        } else {
            refused++;
        }
        dcp_free(copy);
    }
    CHECK(refused > 2000);
    dcp_image_clean_up(&request.image);
    dcp_buf_clean_up(&asked);
    dcp_buf_clean_up(&answered);
}

static void
requests_that_no_memory_can_hold_fail_and_leave_nothing(void)
{
    struct dcp_writer_request request, got;
    struct dcp_buf buf = {0};
    char path[] = "";

    make_request(&request, path);
    dcp_writer_put_request(&buf, &request);
    for (uint64_t n = 1; n <= 3; n++) {
        struct dcp_error err = {0};
        dcp_alloc_fail_after(n);
        CHECK_EQ(dcp_writer_get_request(body_of(&buf), &got, &err), DCP_E_NOMEM);
        dcp_alloc_fail_after(0);
    }
    dcp_image_clean_up(&request.image);
    dcp_buf_clean_up(&buf);
}

/* ---- at the process ---- */

struct stranger {
    int socket;
    int64_t pid;
    struct dcp_writer_channel channel;
};

static void
meet(struct stranger *s)
{
    struct dcp_writer_message message;
    struct dcp_error err = {0};

    *s = (struct stranger){0};
    CHECK_EQ(dcp_process_spawn(writer_executable(), &s->socket, &s->pid), 0);
    s->channel.socket = s->socket;
    CHECK_EQ(dcp_writer_receive(&s->channel, 30000000000u, &message, &err), 1);
    CHECK(message.kind == DCP_WRITER_HELLO && dcp_writer_get_hello(message.body));
}

static void
part(struct stranger *s, int status_wanted)
{
    int status = 0;

    CHECK(writer_await(s->pid, &status));
    CHECK(WIFEXITED(status));
    CHECK_EQ(WEXITSTATUS(status), status_wanted);
    dcp_writer_channel_clean_up(&s->channel);
    close(s->socket);
}

/* A damaged header or body, whole or with its end missing. */
static void
the_process_ends_orderly_on_garbage(void)
{
    /* From the first file on: count of files, bytes of payload, rank; offset, length, n. */
    static const int numbers[] = {-4, -8, -12, -24, 0, 4, 12, 20};
    struct maker_rng rng = {.state = 5};
    struct dcp_writer_request request;
    struct dcp_buf good = {0};
    char path[] = "/some/directory";
    int nowhere = open("/dev/null", O_RDONLY | O_CLOEXEC);
    const int fds[2] = {nowhere, nowhere};

    make_request(&request, path);
    dcp_writer_put_request(&good, &request);
    for (int i = 0; i < 24; i++) {
        struct dcp_buf bad = {0};
        struct stranger s;

        meet(&s);
        dcp_buf_put(&bad, good.data, good.len);
        if (i < 8) {
            /* Noise, and a kind, a version, a length that cannot be. */
            memset(bad.data, (int)maker_below(&rng, 256), i < 5 ? 16 : 0);
            bad.data[i == 5 ? 4 : i == 6 ? 6 : 14] ^= 0x40;
        } else if (i < 16) {
            le_put32(bad.data + bad.len - DCP_WRITER_FILE_BYTES * FILES + numbers[i - 8],
                     0xF0F0F0F0);
        }
        bool whole = i < 16;
        (void)!dcp_socket_send(s.socket, bad.data, whole ? bad.len : bad.len - (size_t)i, fds,
                               i % 2 == 0 ? 2 : 0);
        dcp_buf_clean_up(&bad);
        if (!whole) {
            dcp_socket_end(s.socket);
        }
        part(&s, whole ? DCP_WRITER_END_PROTOCOL : DCP_WRITER_END_OK);
    }
    close(nowhere);
    dcp_image_clean_up(&request.image);
    dcp_buf_clean_up(&good);
}

static void
a_preparation_without_an_arena_is_no_protocol(void)
{
    int nowhere = open("/dev/null", O_RDONLY | O_CLOEXEC);
    const int fds[2] = {nowhere, nowhere};

    for (uint32_t fds_count = 0; fds_count <= 2; fds_count += 2) {
        struct dcp_error err = {0};
        struct dcp_buf buf = {0};
        struct stranger s;

        meet(&s);
        dcp_writer_put_prepare(&buf, 4096);
        CHECK_OK(dcp_writer_send(&s.channel, &buf, fds, fds_count, 10, NULL, &err), &err);
        dcp_buf_clean_up(&buf);
        part(&s, DCP_WRITER_END_PROTOCOL);
    }
    close(nowhere);
}

static void
descriptors_that_are_none_of_an_arena_are_an_error_that_is_told(void)
{
    struct dcp_writer_request request;
    struct dcp_writer_message message;
    struct dcp_writer_result result;
    struct dcp_buf buf = {0};
    struct dcp_error err = {0};
    struct stranger s;
    char path[] = "/some/directory";
    int nowhere = open("/dev/null", O_RDONLY | O_CLOEXEC);
    const int fds[2] = {nowhere, nowhere};

    meet(&s);
    make_request(&request, path);
    request.survives = false; /* nothing of it is kept */
    dcp_writer_put_request(&buf, &request);
    for (int i = 0; i < 3; i++) {
        CHECK_OK(dcp_writer_send(&s.channel, &buf, fds, 2, 10, NULL, &err), &err);
        CHECK_EQ(dcp_writer_receive(&s.channel, 30000000000u, &message, &err), 1);
        CHECK(message.kind == DCP_WRITER_DONE && dcp_writer_get_result(message.body, &result));
        CHECK_EQ(result.code, DCP_E_IO);
    }
    CHECK_EQ(writer_descriptors(s.pid), 4);
    dcp_socket_end(s.socket);
    part(&s, DCP_WRITER_END_OK);
    close(nowhere);
    dcp_image_clean_up(&request.image);
    dcp_buf_clean_up(&buf);
}

/* Many files: more than a packet or the socket's buffer holds at a time. */
static void
long_messages_arrive_whole_and_take_no_memory_ahead(void)
{
    struct dcp_writer_request request = {.image = {.files_count = 100000}};
    struct dcp_writer_message message;
    struct dcp_writer_result result;
    struct dcp_buf buf = {0};
    struct dcp_error err = {0};
    struct stranger s;
    int nowhere = open("/dev/null", O_RDONLY | O_CLOEXEC);
    const int fds[2] = {nowhere, nowhere};

    request.image.bytes = 100000ull * DCP_DIRECT_ALIGN_BYTES;
    request.image.files = dcp_calloc(request.image.files_count, sizeof *request.image.files);
    for (uint32_t i = 0; i < request.image.files_count; i++) {
        request.image.files[i] =
            (struct dcp_image_file){(uint64_t)i * DCP_DIRECT_ALIGN_BYTES, 64, i};
    }
    dcp_writer_put_request(&buf, &request);
    meet(&s);
    CHECK_OK(dcp_writer_send(&s.channel, &buf, fds, 2, 600, NULL, &err), &err);
    CHECK_EQ(dcp_writer_receive(&s.channel, 30000000000u, &message, &err), 1);
    CHECK(message.kind == DCP_WRITER_DONE && dcp_writer_get_result(message.body, &result));
    CHECK_EQ(result.code, DCP_E_IO);
    dcp_socket_end(s.socket);
    part(&s, DCP_WRITER_END_OK);
    close(nowhere);
    dcp_image_clean_up(&request.image);
    dcp_buf_clean_up(&buf);
}

CTEST_MAIN(RUN(what_is_put_is_what_is_read); RUN(damaged_messages_are_refused_or_harmless);
           RUN(requests_that_no_memory_can_hold_fail_and_leave_nothing);
           RUN(the_process_ends_orderly_on_garbage);
           RUN(a_preparation_without_an_arena_is_no_protocol);
           RUN(descriptors_that_are_none_of_an_arena_are_an_error_that_is_told);
           RUN(long_messages_arrive_whole_and_take_no_memory_ahead);)
