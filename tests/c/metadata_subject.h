/*
 * metadata_subject.h: a sample, its image, what the image says, and where its parts are.
 *
 * Functions, not an object of its own: CHECK counts per test program.
 */
#ifndef METADATA_SUBJECT_H
#define METADATA_SUBJECT_H

#include "ctest.h"

#include "metadata_maker.h"
#include "metadata_private.h"

struct subject {
    struct metadata_sample sample;
    struct dcp_buf image;
    struct dcp_metadata md;
    struct dcp_metadata_footer footer;
};

/* `linked`: some records lie in files of earlier saves. */
static void
make_subject(struct subject *s, uint64_t seed, bool linked)
{
    struct dcp_error err = {0};

    *s = (struct subject){.image = {0}};
    metadata_sample_make(&s->sample, seed);
    if (linked) {
        metadata_sample_link(&s->sample, seed);
    }
    metadata_sample_image(&s->sample, &s->image);
    CHECK_OK(dcp_metadata_read(s->image.data, s->image.len, &s->md, &err), &err);
    CHECK(dcp_metadata_footer_parse(s->image.data, s->image.len, &s->footer));
}

static void
clean_up_subject(struct subject *s)
{
    dcp_metadata_clean_up(&s->md);
    dcp_buf_clean_up(&s->image);
    metadata_sample_clean_up(&s->sample);
}

#endif
