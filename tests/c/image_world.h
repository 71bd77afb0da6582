/*
 * image_world.h: the image of a world's files, filled into memory that held something else before.
 */
#ifndef IMAGE_WORLD_H
#define IMAGE_WORLD_H

#include "dcp_image.h"
#include "engine_world.h"

struct world_image {
    struct dcp_image image;
    uint8_t *memory; /* image.bytes */
};

enum { WORLD_IMAGE_GARBAGE = 0xA5 };

/* Places and fills; what failed is left clean. */
int world_image_make(const struct world *world, const struct dcp_engine_options *options,
                     uint32_t *crcs, struct world_image *ret, struct dcp_error *err);
void world_image_clean_up(struct world_image *image);
int world_image_write(const struct dcp_io *io, int dirfd, const struct world_image *image,
                      const struct dcp_engine_options *options, struct dcp_write_stats *stats,
                      struct dcp_error *err);
/* Reads each file back, compares it with the image, removes it; says what is wrong. */
bool world_image_check_files(const struct dcp_io *io, int dirfd, const struct world *world,
                             const struct world_image *image);
/* Each file is its naive image, with zeros behind it; says what is wrong. */
bool world_image_check(const struct world *world, const struct world_image *image);

#endif
