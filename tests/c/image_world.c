/*
 * image_world.c: images of worlds for tests.
 */
#include "image_world.h"

#include <stdio.h>
#include <string.h>

int
world_image_make(const struct world *world, const struct dcp_engine_options *options,
                 uint32_t *crcs, struct world_image *ret, struct dcp_error *err)
{
    struct world_image made = {0};
    int rc = dcp_image_place(&world->layout, world->plan.rank, world->n0, &made.image, err);
    if (rc != 0) {
        return rc;
    }
    made.memory = dcp_map_huge(made.image.bytes, err);
    if (made.memory == NULL) {
        dcp_image_clean_up(&made.image);
        return DCP_E_NOMEM;
    }
    memset(made.memory, WORLD_IMAGE_GARBAGE, made.image.bytes);
    rc = dcp_image_fill(&made.image, made.memory, &world->plan, &world->layout, world->sources,
                        &world->save_id, world->n0, options, crcs, err);
    if (rc != 0) {
        world_image_clean_up(&made);
        return rc;
    }
    *ret = made;
    return 0;
}

void
world_image_clean_up(struct world_image *image)
{
    dcp_unmap_huge(image->memory, image->image.bytes);
    dcp_image_clean_up(&image->image);
    image->memory = NULL;
}

int
world_image_write(const struct dcp_io *io, int dirfd, const struct world_image *image,
                  const struct dcp_engine_options *options, struct dcp_write_stats *stats,
                  struct dcp_error *err)
{
    return dcp_image_write(io, dirfd, "dir", &image->image, image->memory, options, stats, err);
}

bool
world_image_check_files(const struct dcp_io *io, int dirfd, const struct world *world,
                        const struct world_image *image)
{
    bool all_good = true;
    for (uint32_t i = 0; i < image->image.files_count; i++) {
        const struct dcp_image_file *file = &image->image.files[i];
        struct dcp_buf got = {0};
        struct dcp_error err = {0};
        char name[64];
        world_file_name(world, i, name, sizeof name);
        bool good = dcp_io_read_file(io, dirfd, name, 1u << 30, &got, &err) == 0 &&
                    got.len == file->length_bytes &&
                    memcmp(got.data, image->memory + file->offset_bytes, got.len) == 0 &&
                    io->unlink_at(io->ctx, dirfd, name) == 0;
        if (!good) {
            fprintf(stderr, "image_world: %s is not what the image holds; %s\n", name, err.message);
        }
        all_good = all_good && good;
        dcp_buf_clean_up(&got);
    }
    return all_good;
}

static bool
check_file(const struct world *world, const struct world_image *image, uint32_t index)
{
    const struct dcp_image_file *file = &image->image.files[index];
    const uint8_t *got = image->memory + file->offset_bytes;
    uint64_t end = dcp_align_up(file->length_bytes, DCP_DIRECT_ALIGN_BYTES);
    struct dcp_buf want = {0};
    world_file_image(world, index, &want);
    bool good = file->offset_bytes % DCP_DIRECT_ALIGN_BYTES == 0 &&
                file->offset_bytes + end <= image->image.bytes && file->length_bytes == want.len &&
                file->n == world->n0 + world->layout.files[index].index &&
                memcmp(got, want.data, want.len) == 0;
    for (uint64_t at = file->length_bytes; good && at < end; at++) {
        good = got[at] == 0;
    }
    if (!good) {
        fprintf(stderr, "image_world: file %u is not its naive image\n", index);
    }
    dcp_buf_clean_up(&want);
    return good;
}

bool
world_image_check(const struct world *world, const struct world_image *image)
{
    bool good = image->image.files_count == world->layout.files_count &&
                image->image.total_bytes == world->layout.total_bytes;
    for (uint32_t i = 0; good && i < image->image.files_count; i++) {
        good = check_file(world, image, i);
    }
    return good;
}
