/*
 * metadata_maker.h: global plans and `.metadata` images for tests.  Failures end the test program.
 */
#ifndef METADATA_MAKER_H
#define METADATA_MAKER_H

#include "dcp_metadata.h"

enum { SAMPLE_RANKS = 3, SAMPLE_N0 = 300 };

struct metadata_sample {
    struct dcp_plan plans[SAMPLE_RANKS];
    struct dcp_global_plan global;
    struct dcp_links links; /* empty until metadata_sample_link */
    struct dcp_save_id save_id;
};

/* Objects, whole tensors, shards of 1 to 3 dimensions (uneven and empty ones too), replicas, long
 * and non-ASCII names, numbers of every width. */
void metadata_sample_make(struct metadata_sample *sample, uint64_t seed);
void metadata_sample_clean_up(struct metadata_sample *sample);
/* Leaves about half of the items unwritten: the layouts shrink, and links to files of some earlier
 * saves take their place. */
void metadata_sample_link(struct metadata_sample *sample, uint64_t seed);
/* Appends the image of the sample. */
void metadata_sample_image(const struct metadata_sample *sample, struct dcp_buf *image);

/* Every array, not the save id. */
bool metadata_is_same(const struct dcp_metadata *a, const struct dcp_metadata *b);

/* The reader over an exact heap copy, so that any overread is caught; sets *err as the reader does
 * and ends the program when code and record disagree.  Cleans up; `same_as` (may be NULL) is
 * compared with the result into *ret_same. */
int metadata_read_copy(const uint8_t *image, size_t len, bool pickle_only,
                       const struct dcp_metadata *same_as, bool *ret_same, struct dcp_error *err);

#endif
