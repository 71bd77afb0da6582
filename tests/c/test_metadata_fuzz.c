/*
 * test_metadata_fuzz.c: mutated `.metadata` images and data.pkl files never crash, hang or give a
 * result that validation refuses.
 *
 * LLVMFuzzerTestOneInput is what libFuzzer calls; without it (gcc) the main program below mutates
 * images from a fixed seed for a bounded number of rounds.  Images are those of stock torch in
 * ../shared/golden where that directory is, and always some of our own.
 */
#include "ctest.h"

#include <dirent.h>
#include <time.h>

#include "dcp_crc32.h"
#include "metadata_maker.h"
#include "metadata_private.h"
#include "plan_maker.h"

enum {
    MAX_IMAGES = 64,
    ROUNDS = 40000,
    MAX_IMAGE_BYTES = 1 << 20,
    ROUND_LIMIT_MS = 2000, /* of CPU time; a round takes far less than one */
};

static const char golden[] = "../shared/golden";

struct images {
    uint8_t *data[MAX_IMAGES];
    size_t len[MAX_IMAGES];
    int count;
};

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* Everything of the module that reads bytes from outside. */
int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct dcp_error err;
    for (unsigned pickle_only = 0; pickle_only < 2; pickle_only++) {
        int rc = metadata_read_copy(data, size, pickle_only != 0, NULL, NULL, &err);
        if (rc != 0 && rc != DCP_E_CORRUPT && rc != DCP_E_UNSUPPORTED) {
            fprintf(stderr, "unexpected code %d: %s\n", rc, err.message);
            abort();
        }
    }
    struct dcp_metadata md;
    dcp_error_clear(&err);
    if (dcp_metadata_index_decode(data, size, &md, &err) == 0) {
        dcp_metadata_clean_up(&md);
    }
    struct dcp_tensor_pickle tensor;
    dcp_error_clear(&err);
    if (dcp_pickle_read_tensor(data, size, &tensor, &err) == 0 &&
        tensor.storage_bytes > DCP_MAX_PAYLOAD_BYTES) {
        abort();
    }
    return 0;
}

/* ---- images ---- */

static void
keep(struct images *images, const void *data, size_t len)
{
    if (images->count == MAX_IMAGES) {
        return;
    }
    uint8_t *copy = malloc(len == 0 ? 1 : len);
    memcpy(copy, data, len);
    images->data[images->count] = copy;
    images->len[images->count++] = len;
}

static void
keep_file(struct images *images, const char *path)
{
    FILE *file = fopen(path, "rb");
    if (file == NULL) {
        return;
    }
    uint8_t *data = malloc(MAX_IMAGE_BYTES);
    size_t len = fread(data, 1, MAX_IMAGE_BYTES, file);
    fclose(file);
    keep(images, data, len);
    free(data);
}

static void
keep_golden(struct images *images)
{
    DIR *dir = opendir(golden);
    if (dir == NULL) {
        printf("     no %s here: only images of our own\n", golden);
        return;
    }
    struct dirent *entry;
    while ((entry = readdir(dir)) != NULL) {
        static const char *const kinds[] = {"plain", "sharded"};
        for (unsigned k = 0; k < 2 && entry->d_name[0] != '.'; k++) {
            char path[512];
            snprintf(path, sizeof path, "%s/%.100s/%s/.metadata", golden, entry->d_name, kinds[k]);
            keep_file(images, path);
        }
    }
    closedir(dir);
}

static void
keep_our_own(struct images *images)
{
    for (uint64_t seed = 1; seed <= 6; seed++) {
        struct metadata_sample sample;
        struct dcp_buf image = {0};
        struct dcp_metadata_footer footer;
        metadata_sample_make(&sample, seed);
        if (seed > 3) {
            metadata_sample_link(&sample, seed);
        }
        metadata_sample_image(&sample, &image);
        keep(images, image.data, image.len);
        if (dcp_metadata_footer_parse(image.data, image.len, &footer)) {
            keep(images, image.data, (size_t)footer.pickle_bytes);
            keep(images, image.data + footer.pickle_bytes, (size_t)footer.index_bytes);
        }
        dcp_buf_clear(&image);
        uint64_t sizes[3] = {4, 300, 70000};
        dcp_pickle_put_tensor(&image, seed == 1 ? DCP_DTYPE_UINT16 : DCP_DTYPE_FLOAT32,
                              1 + (uint32_t)(seed - 1) % 3, sizes);
        keep(images, image.data, image.len);
        dcp_buf_clean_up(&image);
        metadata_sample_clean_up(&sample);
    }
}

/* ---- mutations ---- */

static void
mutate_once(struct maker_rng *rng, const struct images *images, struct dcp_buf *b)
{
    static const char ops[] = "()]}taesub0RNKhjqr.cX"
                              "\x80\x81\x85\x86\x87\x88\x89\x8A\x8C\x93\x94\x95";
    static const uint8_t extremes[] = {0x00, 0x01, 0x7F, 0x80, 0xFE, 0xFF};
    if (b->len == 0) {
        return;
    }
    size_t at = (size_t)maker_below(rng, b->len);
    size_t run = 1 + (size_t)maker_below(rng, dcp_min_u64(b->len - at, 40));
    switch (maker_below(rng, 8)) {
    case 0:
        b->data[at] ^= (uint8_t)(1u << maker_below(rng, 8));
        break;
    case 1:
        b->data[at] = (uint8_t)ops[maker_below(rng, sizeof ops - 1)];
        break;
    case 2:
        memset(b->data + at, extremes[maker_below(rng, sizeof extremes)],
               dcp_min_u64(run, 1u << maker_below(rng, 4)));
        break;
    case 3: /* cut out */
        memmove(b->data + at, b->data + at + run, b->len - at - run);
        b->len -= run;
        break;
    case 4: /* cut off, rarely */
        b->len = maker_below(rng, 8) == 0 ? at : b->len;
        break;
    case 5: { /* repeat a run elsewhere */
        size_t to = (size_t)maker_below(rng, b->len - run + 1);
        memmove(b->data + to, b->data + at, run);
        break;
    }
    case 6: { /* insert an opcode */
        if (dcp_buf_extend(b, 1) != NULL) {
            memmove(b->data + at + 1, b->data + at, b->len - 1 - at);
            b->data[at] = (uint8_t)ops[maker_below(rng, sizeof ops - 1)];
        }
        break;
    }
    default: { /* a run of another image */
        int other = (int)maker_below(rng, (uint64_t)images->count);
        size_t from = (size_t)maker_below(rng, images->len[other]);
        memcpy(b->data + at, images->data[other] + from,
               dcp_min_u64(run, images->len[other] - from));
        break;
    }
    }
}

/* Makes the footer true again, so that the index and the ids before it are looked at. */
static void
repair_footer(struct dcp_buf *b, const struct dcp_metadata_footer *old)
{
    struct dcp_metadata_footer footer = *old;
    size_t accepted_bytes = footer.accepted_count * sizeof(struct dcp_save_id);
    if (b->len < DCP_METADATA_FOOTER_BYTES + old->pickle_bytes + accepted_bytes) {
        return;
    }
    b->len -= DCP_METADATA_FOOTER_BYTES;
    footer.index_bytes = b->len - footer.pickle_bytes - accepted_bytes;
    footer.accepted_crc = dcp_crc32(0, b->data + b->len - accepted_bytes, accepted_bytes);
    footer.pickle_crc = dcp_crc32(0, b->data, (size_t)footer.pickle_bytes);
    footer.index_crc = dcp_crc32(0, b->data + footer.pickle_bytes, (size_t)footer.index_bytes);
    dcp_metadata_footer_put(b, &footer);
}

static double
cpu_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec / 1e6;
}

static void
case_mutated_images_are_survived(void)
{
    struct images images = {.count = 0};
    struct maker_rng rng = {20240607};
    struct dcp_buf b = {0};
    keep_golden(&images);
    keep_our_own(&images);
    CHECK(images.count >= 10);
    double worst_ms = 0;
    for (int round = 0; round < ROUNDS; round++) {
        int i = (int)maker_below(&rng, (uint64_t)images.count);
        struct dcp_metadata_footer footer;
        bool has_footer = dcp_metadata_footer_parse(images.data[i], images.len[i], &footer);
        dcp_buf_clear(&b);
        dcp_buf_put(&b, images.data[i], images.len[i]);
        for (uint64_t n = 1 + maker_below(&rng, 4); n > 0; n--) {
            mutate_once(&rng, &images, &b);
        }
        if (has_footer && maker_below(&rng, 2) == 0) {
            repair_footer(&b, &footer);
        }
        double start = cpu_ms();
        (void)LLVMFuzzerTestOneInput(b.data, b.len);
        double took_ms = cpu_ms() - start;
        worst_ms = took_ms > worst_ms ? took_ms : worst_ms;
    }
    CHECK(worst_ms < ROUND_LIMIT_MS);
    printf("     %d rounds over %d images, at most %.1f ms each\n", ROUNDS, images.count, worst_ms);
    dcp_buf_clean_up(&b);
    for (int i = 0; i < images.count; i++) {
        free(images.data[i]);
    }
}

static void
case_golden_images_are_read(void)
{
    struct images images = {.count = 0};
    struct dcp_error err;
    keep_golden(&images);
    for (int i = 0; i < images.count; i++) {
        struct dcp_metadata md = {0};
        dcp_error_clear(&err);
        CHECK_OK(dcp_metadata_read(images.data[i], images.len[i], &md, &err), &err);
        CHECK(md.entries_count >= 7 && !md.is_native);
        for (uint64_t c = 0; c < md.chunks_count; c++) {
            CHECK(md.chunks[c].file != DCP_NO_FILE && md.chunks[c].length_bytes > 0);
        }
        CHECK(dcp_metadata_find(&md, "step", 4) != NULL);
        dcp_metadata_clean_up(&md);
        free(images.data[i]);
    }
}

CTEST_MAIN(RUN(case_golden_images_are_read); RUN(case_mutated_images_are_survived);)
