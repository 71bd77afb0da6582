/*
 * test_cuda_device.c: the table of a CUDA device over functions that stand in for CUDA's.
 */
#include "ctest.h"

#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "cuda_device.h"
#include "cuda_stand_in.h"
#include "dcp_crc32.h"
#include "dcp_engine.h"

static struct dcp_device *
lend(void)
{
    struct dcp_device *device = NULL;
    struct dcp_error err = {0};

    CHECK_OK(dcp_cuda_lend(STAND_IN_DEVICE, &device, &err), &err);
    CHECK(device->index == STAND_IN_DEVICE && strcmp(device->kind, "cuda") == 0);
    return device;
}

static uint64_t
address(const void *memory)
{
    return (uint64_t)(uintptr_t)memory;
}

static void
without_cuda_there_is_no_device(void)
{
    struct dcp_device *device = NULL;
    struct dcp_error err = {0};

    CHECK(!dcp_cuda_is_there());
    CHECK_EQ(dcp_cuda_lend(0, &device, &err), DCP_E_UNSUPPORTED);
    CHECK(device == NULL && strstr(err.message, "libcudart") != NULL);
    dcp_cuda_give_back(NULL);
    stand_in_begin();
    CHECK(dcp_cuda_is_there());
    CHECK_EQ(stand_in.calls, 0);
    CHECK_EQ(dcp_cuda_lend(-1, &device, NULL), DCP_E_INVALID);
    CHECK_EQ(dcp_cuda_lend(CUDA_MAX_DEVICES, &device, NULL), DCP_E_INVALID);
    stand_in_end();
}

static void
copies_run_behind_the_callers_stream_and_it_behind_them(void)
{
    uint8_t host[100] = {0}, memory[100];
    struct dcp_error err = {0};

    stand_in_begin();
    struct dcp_device *device = lend();
    memset(memory, 7, sizeof memory);
    CHECK_OK(device->follow(device->ctx, stand_in_stream, &err), &err);
    CHECK_OK(device->to_host(device->ctx, host, address(memory), 100, &err), &err);
    CHECK_OK(device->lead(device->ctx, stand_in_stream, &err), &err);
    CHECK(strcmp(stand_in.order, "rWrWCRw") == 0); /* both our streams follow */
    CHECK_EQ(host[99], 0);
    stand_in_run();
    CHECK(memcmp(host, memory, 100) == 0);
    memset(host, 9, sizeof host);
    CHECK_OK(device->to_device(device->ctx, address(memory), host, 100, &err), &err);
    stand_in_run();
    CHECK_EQ(memory[0], 9);
    dcp_cuda_give_back(device);
    stand_in_end();
}

static void
a_capture_of_a_graph_is_refused_and_nothing_is_put_on_a_stream(void)
{
    struct dcp_error err = {0};

    stand_in_begin();
    struct dcp_device *device = lend();
    stand_in.capturing = stand_in_stream;
    CHECK_EQ(device->follow(device->ctx, stand_in_stream, &err), DCP_E_UNSUPPORTED);
    CHECK(strstr(err.message, "outside of the capture") != NULL);
    CHECK_EQ(device->lead(device->ctx, stand_in_stream, NULL), DCP_E_UNSUPPORTED);
    stand_in.legacy_is_caught = true;
    CHECK_EQ(device->follow(device->ctx, NULL, NULL), DCP_E_UNSUPPORTED);
    CHECK(strcmp(stand_in.order, "") == 0);
    dcp_cuda_give_back(device);
    stand_in_end();
}

static void
events_happen_in_the_order_of_the_stream(void)
{
    dcp_device_event *first = NULL, *second = NULL, *again = NULL;
    uint8_t host[2], memory[2] = {1, 2};
    struct dcp_error err = {0};

    stand_in_begin();
    struct dcp_device *device = lend();
    CHECK_OK(device->to_host(device->ctx, host, address(memory), 1, &err), &err);
    CHECK_OK(device->record(device->ctx, &first, &err), &err);
    CHECK_OK(device->to_host(device->ctx, host + 1, address(memory + 1), 1, &err), &err);
    CHECK_OK(device->record(device->ctx, &second, &err), &err);
    CHECK_EQ(device->poll(device->ctx, first, &err), 0);
    stand_in_run_some(2);
    CHECK_EQ(device->poll(device->ctx, first, &err), 1);
    CHECK_EQ(device->poll(device->ctx, second, &err), 0);
    CHECK_OK(device->wait_idle(device->ctx, &err), &err);
    CHECK_EQ(device->poll(device->ctx, second, &err), 1);
    device->forget(device->ctx, second);
    device->forget(device->ctx, NULL);
    CHECK_OK(device->record(device->ctx, &again, &err), &err);
    CHECK(again == second);
    device->forget(device->ctx, first);
    device->forget(device->ctx, again);
    dcp_cuda_give_back(device);
    stand_in_end();
}

static void
an_error_of_the_device_is_told_with_its_text_and_left_to_nobody_else(void)
{
    dcp_device_event *event = NULL;
    struct dcp_error err = {0};

    stand_in_begin();
    struct dcp_device *device = lend();
    CHECK_OK(device->record(device->ctx, &event, &err), &err);
    stand_in.sick_with = STAND_IN_SICK;
    CHECK_EQ(device->poll(device->ctx, event, &err), DCP_E_IO);
    CHECK(strstr(err.message, "cuda:3: ") == err.message);
    CHECK(strstr(err.message, "an illegal memory access") != NULL);
    CHECK_EQ(stand_in.last_error, 0);
    CHECK_EQ(device->wait_idle(device->ctx, NULL), DCP_E_IO);
    device->forget(device->ctx, event);
    dcp_cuda_give_back(device);
    stand_in_end();
}

/* Memory that has an end of a piece in it. */
static char *
across_a_piece(char *mapping)
{
    uint64_t end = (address(mapping) + CUDA_PIN_BYTES) / CUDA_PIN_BYTES * CUDA_PIN_BYTES;
    return (char *)(uintptr_t)(end - 4096);
}

static void
memory_is_pinned_in_pieces_and_copies_end_with_them(void)
{
    enum { MAPPED = 2 * CUDA_PIN_BYTES };
    char *mapping = mmap(NULL, MAPPED, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    char *memory = across_a_piece(mapping), from[2000];
    struct dcp_error err = {0};

    CHECK(mapping != MAP_FAILED);
    stand_in_begin();
    struct dcp_device *device = lend();
    memset(from, 5, sizeof from);
    CHECK_OK(device->pin(device->ctx, memory, CUDA_PIN_BYTES + 4097, &err), &err);
    CHECK_EQ(stand_in.pins, 3);
    CHECK_OK(device->to_host(device->ctx, memory + 3000, address(from), 2000, &err), &err);
    CHECK_EQ(stand_in.copies, 2);
    stand_in_run();
    CHECK(memcmp(memory + 3000, from, 2000) == 0 && memory[2999] == 0 && memory[5000] == 0);
    CHECK_OK(device->pin(device->ctx, memory, 4097, &err), &err); /* as it is */
    CHECK_EQ(stand_in.pins, 3);
    dcp_cuda_give_back(device);
    device->unpin(device->ctx, memory);
    CHECK_EQ(stand_in.pins, 0);
    device->unpin(device->ctx, memory);
    CHECK_EQ(stand_in.unpins, 3);
    stand_in_end();
    munmap(mapping, MAPPED);
}

static void
memory_that_grew_keeps_its_pieces_but_the_last(void)
{
    enum { MAPPED = 4 * CUDA_PIN_BYTES };
    char *mapping = mmap(NULL, MAPPED, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    char *memory = across_a_piece(mapping), from[5000];
    struct dcp_error err = {0};

    CHECK(mapping != MAP_FAILED);
    stand_in_begin();
    struct dcp_device *device = lend();
    memset(from, 7, sizeof from);
    CHECK_OK(device->pin(device->ctx, memory, 8192, &err), &err);
    CHECK_EQ(stand_in.pins, 2);
    CHECK_OK(device->pin(device->ctx, memory, CUDA_PIN_BYTES + 8192, &err), &err);
    CHECK_EQ(stand_in.pins, 3); /* the second one as a whole, and a third */
    CHECK_EQ(stand_in.unpins, 1);
    CHECK_OK(device->pin(device->ctx, memory, CUDA_PIN_BYTES + 4096, &err), &err);
    CHECK_EQ(stand_in.pins + stand_in.unpins, 4);
    CHECK_OK(device->to_host(device->ctx, memory + 4096, address(from), 5000, &err), &err);
    CHECK_EQ(stand_in.copies, 1); /* past where it had ended */
    stand_in_run();
    CHECK(memcmp(memory + 4096, from, sizeof from) == 0);
    /* One that ends where a piece does keeps all of them. */
    CHECK_OK(device->pin(device->ctx, memory, 2 * (uint64_t)CUDA_PIN_BYTES + 4096, &err), &err);
    CHECK_EQ(stand_in.unpins, 2);
    CHECK_OK(device->pin(device->ctx, memory, 2 * (uint64_t)CUDA_PIN_BYTES + 8192, &err), &err);
    CHECK_EQ(stand_in.unpins, 2);
    CHECK_EQ(stand_in.pins, 4);
    stand_in.fail_with = DCP_CUDA_ERROR_OUT_OF_MEMORY;
    stand_in.fail_at = stand_in.calls + 3; /* two to enter, then the last piece */
    CHECK_EQ(device->pin(device->ctx, memory, 3 * (uint64_t)CUDA_PIN_BYTES, &err), DCP_E_NOMEM);
    CHECK_EQ(stand_in.pins, 0);
    device->unpin(device->ctx, memory);
    CHECK_EQ(stand_in.unpins, 6);
    dcp_cuda_give_back(device);
    stand_in_end();
    munmap(mapping, MAPPED);
}

static void
rows_are_one_copy_but_where_a_piece_ends(void)
{
    enum { MAPPED = 2 * CUDA_PIN_BYTES, ROW = 24, ROWS = 400, PITCH = 40 };
    char *mapping = mmap(NULL, MAPPED, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    char *memory = across_a_piece(mapping), to[ROWS * PITCH] = {0};
    struct dcp_error err = {0};
    bool same = true;

    CHECK(mapping != MAP_FAILED);
    stand_in_begin();
    struct dcp_device *device = lend();
    CHECK_OK(device->pin(device->ctx, memory, ROW * ROWS, &err), &err);
    for (int i = 0; i < ROW * ROWS; i++) {
        memory[i] = (char)(1 + i % 101);
    }
    CHECK_OK(device->to_device_rows(device->ctx, address(to), PITCH, memory, ROW, 100, &err), &err);
    CHECK_EQ(stand_in.copies, 1);
    CHECK_OK(device->to_device_rows(device->ctx, address(to) + 100 * PITCH, PITCH,
                                    memory + 100 * ROW, ROW, ROWS - 100, &err),
             &err);
    CHECK_EQ(stand_in.copies, 1 + 4); /* 4096 is no multiple of 24: a row lies in both pieces */
    stand_in_run();
    for (int i = 0; i < ROWS * PITCH; i++) {
        int column = i % PITCH;
        same = same && to[i] == (column < ROW ? memory[i / PITCH * ROW + column] : 0);
    }
    CHECK(same);
    device->unpin(device->ctx, memory);
    dcp_cuda_give_back(device);
    stand_in_end();
    munmap(mapping, MAPPED);
}

static void
what_others_pinned_stays_pinned_and_a_failure_undoes_the_rest(void)
{
    enum { MAPPED = 2 * CUDA_PIN_BYTES };
    char *mapping = mmap(NULL, MAPPED, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    char *memory = across_a_piece(mapping);
    struct dcp_error err = {0};

    stand_in_begin();
    struct dcp_device *device = lend();
    stand_in.pinned_elsewhere = memory;
    CHECK_OK(device->pin(device->ctx, memory, 8192, &err), &err);
    CHECK_EQ(stand_in.pins, 1);
    device->unpin(device->ctx, memory);
    CHECK_EQ(stand_in.unpins, 1);
    CHECK_EQ(stand_in.last_error, 0);
    stand_in.pinned_elsewhere = NULL;
    stand_in.fail_with = DCP_CUDA_ERROR_OUT_OF_MEMORY;
    stand_in.fail_at = stand_in.calls + 4; /* two to enter, and the first piece */
    CHECK_EQ(device->pin(device->ctx, memory, 8192, &err), DCP_E_NOMEM);
    CHECK(strstr(err.message, "8192") != NULL);
    CHECK_EQ(stand_in.pins, 0);
    device->unpin(device->ctx, memory);
    CHECK_EQ(stand_in.unpins, 2);
    dcp_cuda_give_back(device);
    stand_in_end();
    munmap(mapping, MAPPED);
}

enum { TENSORS = 20000, TENSOR_ITEMS = 3 };

static void
boxes_of(struct dcp_device_box *boxes, uint16_t *strided, uint16_t *packed)
{
    for (uint32_t i = 0; i < TENSORS; i++) {
        boxes[i] = (struct dcp_device_box){.strided = address(strided + 2 * TENSOR_ITEMS * i),
                                           .packed = address(packed + TENSOR_ITEMS * i),
                                           .count = TENSOR_ITEMS,
                                           .item_bytes = 2,
                                           .ndim = 1};
        boxes[i].sizes[0] = TENSOR_ITEMS;
        boxes[i].strides_bytes[0] = 4;
    }
}

/* Nothing runs until the end, so a list that was used again too early would show. */
static void
many_small_tensors_are_packed_by_few_launches_whose_lists_outlive_them(void)
{
    struct dcp_device_box *boxes = dcp_malloc(TENSORS * sizeof *boxes);
    uint16_t *strided = dcp_calloc(2 * TENSORS * TENSOR_ITEMS, 2);
    uint16_t *packed = dcp_calloc(TENSORS * TENSOR_ITEMS, 2);
    struct dcp_error err = {0};

    for (uint32_t i = 0; i < 2 * TENSORS * TENSOR_ITEMS; i++) {
        strided[i] = (uint16_t)(i / 2);
    }
    stand_in_begin();
    struct dcp_device *device = lend();
    CHECK_EQ(device->features, DCP_DEVICE_PACKS | DCP_DEVICE_CHECKSUMS);
    boxes_of(boxes, strided, packed);
    CHECK_OK(device->pack(device->ctx, boxes, TENSORS, &err), &err);
    memset(boxes, 0, TENSORS * sizeof *boxes);
    uint32_t lists = stand_in.lists;
    CHECK(lists >= 2 && lists <= 4);
    CHECK(stand_in.waiting <= 2 * lists);
    stand_in_run();
    for (uint32_t i = 0; i < TENSORS * TENSOR_ITEMS; i++) {
        CHECK_EQ(packed[i], (uint16_t)i);
        packed[i] = (uint16_t)(i * 3);
    }
    boxes_of(boxes, strided, packed);
    for (uint32_t i = 0; i < TENSORS; i += 100) {
        CHECK_OK(device->unpack(device->ctx, boxes + i, 100, &err), &err);
    }
    CHECK_EQ(stand_in.lists, lists);
    stand_in_run();
    for (uint32_t i = 0; i < 2 * TENSORS * TENSOR_ITEMS; i++) {
        CHECK_EQ(strided[i], (uint16_t)(i % 2 == 0 ? i / 2 * 3 : i / 2));
    }
    boxes[1].item_bytes = 5;
    CHECK_EQ(device->pack(device->ctx, boxes, 2, NULL), DCP_E_INVALID);
    dcp_cuda_give_back(device);
    stand_in_end();
    dcp_free(boxes);
    dcp_free(strided);
    dcp_free(packed);
}

static void
checksums_come_together_before_an_event(void)
{
    uint64_t bytes = 2 * DCP_BLOCK_BYTES + 100;
    uint8_t *data = dcp_calloc(1, bytes);
    uint32_t crcs[4] = {0};
    dcp_device_event *event = NULL;
    struct dcp_error err = {0};

    stand_in_begin();
    struct dcp_device *device = lend();
    CHECK_OK(device->checksum(device->ctx, address(data), bytes, crcs, &err), &err);
    CHECK_OK(device->checksum(device->ctx, address(data), 0, NULL, &err), &err);
    CHECK_OK(device->checksum(device->ctx, address(data), 100, crcs + 3, &err), &err);
    CHECK(strcmp(stand_in.order, "ZKK") == 0);
    CHECK_OK(device->record(device->ctx, &event, &err), &err);
    CHECK(strcmp(stand_in.order, "ZKKCZRR") == 0);
    memset(data, 3, bytes);
    stand_in_run_some(6);
    CHECK_EQ(device->poll(device->ctx, event, &err), 0); /* of the second stream */
    stand_in_run();
    CHECK_EQ(device->poll(device->ctx, event, &err), 1);
    device->forget(device->ctx, event);
    /* What nobody waits for goes nowhere. */
    CHECK_OK(device->checksum(device->ctx, address(data), 1, crcs, &err), &err);
    CHECK_EQ(crcs[0], dcp_crc32(0, data, DCP_BLOCK_BYTES));
    CHECK_EQ(crcs[1], crcs[0]);
    CHECK_EQ(crcs[2], dcp_crc32(0, data, 100));
    CHECK_EQ(crcs[3], crcs[2]);
    dcp_cuda_give_back(device);
    stand_in_end();
    dcp_free(data);
}

static void
a_device_without_pools_has_no_slabs_and_no_checksums(void)
{
    struct dcp_error err = {0};
    uint64_t slab = 0;

    stand_in_begin();
    struct dcp_device *device = lend();
    CHECK_OK(device->allocate(device->ctx, 100, &slab, &err), &err);
    CHECK_EQ(stand_in.slabs, 1);
    device->release(device->ctx, slab);
    CHECK_EQ(stand_in.slabs, 1);
    stand_in_run();
    CHECK_EQ(stand_in.slabs, 0);
    stand_in.fail_with = DCP_CUDA_ERROR_OUT_OF_MEMORY;
    stand_in.fail_at = stand_in.calls + 3;
    CHECK_EQ(device->allocate(device->ctx, 123456, &slab, &err), DCP_E_NOMEM);
    CHECK(strstr(err.message, "123456") != NULL);
    dcp_cuda_give_back(device);
    stand_in_end();

    stand_in_begin();
    stand_in.has_pools = false;
    device = lend();
    CHECK_EQ(device->features, DCP_DEVICE_PACKS);
    CHECK_EQ(device->allocate(device->ctx, 100, &slab, NULL), DCP_E_NOMEM);
    dcp_cuda_give_back(device);
    stand_in_end();
}

static void
tables_are_lent_again_once_they_are_idle(void)
{
    uint8_t host, memory = 1;
    struct dcp_error err = {0};

    stand_in_begin();
    struct dcp_device *first = lend(), *second = lend();
    CHECK(first != second);
    dcp_cuda_give_back(first);
    CHECK(lend() == first);
    CHECK_OK(first->to_host(first->ctx, &host, address(&memory), 1, &err), &err);
    CHECK_OK(first->to_host(first->ctx, &host, address(&memory), 1, &err), &err);
    CHECK_OK(first->to_host(first->ctx, &host, address(&memory), 1, &err), &err);
    dcp_cuda_give_back(first);
    struct dcp_device *third = lend();
    CHECK(third != first && third != second);
    stand_in_run();
    CHECK(lend() == first);
    dcp_cuda_give_back(first);
    dcp_cuda_give_back(second);
    dcp_cuda_give_back(third);
    stand_in_end();
}

static void
a_forked_child_is_told_to_be_spawned(void)
{
    int status = 0;

    stand_in_begin();
    struct dcp_device *device = lend();
    pid_t child = fork();
    if (child == 0) {
        struct dcp_device *other = NULL;
        struct dcp_error err = {0};
        bool refused = dcp_cuda_lend(STAND_IN_DEVICE, &other, &err) == DCP_E_UNSUPPORTED &&
                       strstr(err.message, "spawn") != NULL &&
                       device->wait_idle(device->ctx, NULL) == DCP_E_UNSUPPORTED;
        _exit(refused ? 0 : 1);
    }
    CHECK(waitpid(child, &status, 0) == child && status == 0);
    dcp_cuda_give_back(device);
    stand_in_end();
}

static void
files_are_read_once_the_stream_is_idle_and_doubts_are_left_to_the_caller(void)
{
    char path[] = "/tmp/dcp_cuda_file_XXXXXX";
    uint8_t bytes[4000], memory[4000] = {0}, other = 0;
    struct dcp_error err = {0};
    int fd = mkstemp(path);

    for (size_t i = 0; i < sizeof bytes; i++) {
        bytes[i] = (uint8_t)(i * 7);
    }
    CHECK(fd >= 0 && unlink(path) == 0 && write(fd, bytes, sizeof bytes) == sizeof bytes);
    stand_in_begin();
    struct dcp_device *device = lend();
    stand_in.cufile_fails = true;
    CHECK_EQ(dcp_cuda_use_cufile(device, NULL), DCP_E_UNSUPPORTED);
    CHECK_EQ(device->features & DCP_DEVICE_READS_FILES, 0);
    stand_in.cufile_fails = false;
    CHECK_OK(dcp_cuda_use_cufile(device, &err), &err);
    CHECK_EQ(device->features & DCP_DEVICE_READS_FILES, DCP_DEVICE_READS_FILES);
    CHECK_OK(device->to_host(device->ctx, &other, address(memory), 1, &err), &err);
    CHECK_OK(device->read_file(device->ctx, fd, 500, address(memory), 3500, &err), &err);
    CHECK(memcmp(memory, bytes + 500, 3500) == 0);
    CHECK_EQ(device->read_file(device->ctx, fd, 500, address(memory), 3501, &err),
             DCP_E_UNSUPPORTED);
    CHECK_EQ(device->read_file(device->ctx, fd, UINT64_MAX, 0, 2, NULL), DCP_E_INVALID);
    struct dcp_device *second = lend();
    CHECK_EQ(second->features & DCP_DEVICE_READS_FILES, DCP_DEVICE_READS_FILES);
    dcp_cuda_give_back(second);
    dcp_cuda_give_back(device);
    stand_in_end();
    close(fd);
}

static uint64_t use_all_calls; /* that can be made to fail */

/* Everything once; the first failure. */
static int
use_all(struct dcp_error *err)
{
    struct dcp_device *device = NULL;
    uint8_t host[64], memory[64] = {0};
    uint32_t crc;
    uint64_t slab = 0;
    dcp_device_event *event = NULL;
    struct dcp_device_box box = {.strided = address(memory), .packed = address(host), .count = 1};
    int rc = dcp_cuda_lend(STAND_IN_DEVICE, &device, err);

    if (rc != 0) {
        use_all_calls = stand_in.calls;
        return rc;
    }
    box.item_bytes = 4;
    rc = device->pin(device->ctx, host, sizeof host, err);
    rc = rc != 0 ? rc : device->follow(device->ctx, stand_in_stream, err);
    rc = rc != 0 ? rc : device->allocate(device->ctx, 64, &slab, err);
    if (rc == 0 && (device->features & DCP_DEVICE_CHECKSUMS) != 0) {
        rc = device->pack(device->ctx, &box, 1, err);
        rc = rc != 0 ? rc : device->checksum(device->ctx, address(memory), 64, &crc, err);
    }
    rc = rc != 0 ? rc : device->to_host(device->ctx, host, address(memory), 64, err);
    rc = rc != 0 ? rc : device->record(device->ctx, &event, err);
    stand_in_run();
    if (rc == 0) {
        int answer = device->poll(device->ctx, event, err);
        rc = answer < 0 ? answer : 0;
    }
    rc = rc != 0 ? rc : device->lead(device->ctx, stand_in_stream, err);
    stand_in_run();
    rc = rc != 0 ? rc : device->wait_idle(device->ctx, err);
    use_all_calls = stand_in.calls;
    stand_in.fail_at = 0; /* what gives back has no failure to tell */
    device->forget(device->ctx, event);
    device->release(device->ctx, slab);
    device->unpin(device->ctx, host);
    dcp_cuda_give_back(device);
    return rc;
}

static void
every_call_may_fail_and_nothing_is_lost(void)
{
    uint64_t calls = UINT64_MAX, failures = 0;

    for (uint64_t n = 1; n <= calls; n++) {
        struct dcp_error err = {0};
        stand_in_begin();
        stand_in.fail_at = n;
        stand_in.fail_with = STAND_IN_SICK;
        int rc = use_all(&err);
        CHECK_EQ(stand_in.depth, 0);
        CHECK_EQ(stand_in.last_error, 0);
        CHECK(rc == 0 || rc == DCP_E_IO);
        CHECK((rc == 0) == (err.message[0] == 0));
        failures += rc != 0 ? 1 : 0;
        if (use_all_calls < n) {
            CHECK_EQ(rc, 0);
            calls = n - 1;
        }
        stand_in_end();
    }
    /* Without the four that load kernels one does without them; a failure to give back memory is
     * nobody's. */
    CHECK_EQ(failures, calls - 5);
}

CTEST_MAIN(RUN(without_cuda_there_is_no_device);
           RUN(copies_run_behind_the_callers_stream_and_it_behind_them);
           RUN(a_capture_of_a_graph_is_refused_and_nothing_is_put_on_a_stream);
           RUN(events_happen_in_the_order_of_the_stream);
           RUN(an_error_of_the_device_is_told_with_its_text_and_left_to_nobody_else);
           RUN(memory_is_pinned_in_pieces_and_copies_end_with_them);
           RUN(memory_that_grew_keeps_its_pieces_but_the_last);
           RUN(rows_are_one_copy_but_where_a_piece_ends);
           RUN(what_others_pinned_stays_pinned_and_a_failure_undoes_the_rest);
           RUN(many_small_tensors_are_packed_by_few_launches_whose_lists_outlive_them);
           RUN(checksums_come_together_before_an_event);
           RUN(a_device_without_pools_has_no_slabs_and_no_checksums);
           RUN(tables_are_lent_again_once_they_are_idle); RUN(a_forked_child_is_told_to_be_spawned);
           RUN(files_are_read_once_the_stream_is_idle_and_doubts_are_left_to_the_caller);
           RUN(every_call_may_fail_and_nothing_is_lost);)
