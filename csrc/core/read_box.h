/*
 * read_box.h: private: an overlap of a stored payload with a target, as arithmetic on positions.
 *
 * Dims are in the order in which the payload is stored (a transposed tensor of stock torch is
 * stored with its dims permuted), neighbours merged where both sides allow.  Positions are bytes in
 * the payload.
 */
#ifndef DCP_READ_BOX_H
#define DCP_READ_BOX_H

#include "dcp_engine.h"

struct dcp_read_box {
    uint32_t ndim, item_bytes;
    uint32_t target_item_bytes;  /* what target strides count per element; 1 when handed over */
    uint8_t dtype, target_dtype; /* they differ: elements are converted when they are put */
    bool handed_over;            /* no memory: pieces go to the plan's on_piece */
    uint64_t payload_bytes;      /* of the stored tensor */
    uint64_t wanted_bytes;       /* of the overlap */
    uint8_t *target;             /* the overlap's first element; NULL when handed over */
    int64_t target_at;           /* the same, in elements, when handed over */
    const struct dcp_read_plan *plan; /* borrows, as `item` */
    const struct dcp_read_item *item;
    uint64_t sizes[DCP_MAX_DIMS];
    uint64_t offsets[DCP_MAX_DIMS];
    uint64_t lengths[DCP_MAX_DIMS];
    int64_t target_strides[DCP_MAX_DIMS]; /* bytes; elements when handed over */
    uint64_t pitch[DCP_MAX_DIMS];         /* payload bytes from one index to the next */
    uint64_t inner[DCP_MAX_DIMS];         /* bytes of the overlap in one index */
    /* rows: what is read in one go, small gaps included */
    uint64_t row_bytes;  /* span in the payload */
    uint64_t row_wanted; /* bytes of the overlap in it */
};

/* Row-major payload.  Gaps of at most `gap_bytes` are read over.  DCP_E_CORRUPT when the chunk's
 * numbers make no sense. */
int dcp_read_box_init(struct dcp_read_box *box, const struct dcp_read_plan *plan,
                      const struct dcp_read_item *item, uint64_t gap_bytes,
                      struct dcp_error *err) DCP_MUST_CHECK;
/* The payload as `view` says.  *ret_dense false: its memory is no permutation of a dense box, so
 * the record must be read whole. */
int dcp_read_box_init_view(struct dcp_read_box *box, const struct dcp_read_plan *plan,
                           const struct dcp_read_item *item, const struct dcp_record_view *view,
                           uint64_t gap_bytes, bool *ret_dense,
                           struct dcp_error *err) DCP_MUST_CHECK;

/* Whether a record that holds the tensor `view` is to be handed over, for it is another than the
 * metadata says: of another dtype (planners may cast what they save), or where the plan leaves all
 * of it to the record. */
bool dcp_read_view_differs(const struct dcp_read_plan *plan, const struct dcp_read_item *item,
                           const struct dcp_record_view *view);

/* Bytes of the overlap before payload position `at`. */
uint64_t dcp_read_box_below(const struct dcp_read_box *box, uint64_t at);
/* Bytes before payload position `at` that rows span: wanted ones and the gaps read over. */
uint64_t dcp_read_box_spanned(const struct dcp_read_box *box, uint64_t at);
/* The next range at or behind `at` that holds wanted bytes, up to the end of its row; false at the
 * end. */
bool dcp_read_box_next(const struct dcp_read_box *box, uint64_t at, uint64_t *ret_from,
                       uint64_t *ret_to);
/* Where [from, to) belongs when all of it is wanted, is one run in the target and needs no
 * conversion; else NULL. */
uint8_t *dcp_read_box_run(const struct dcp_read_box *box, uint64_t from, uint64_t to);

/* ---- read_put.c ---- */
/* Puts the wanted bytes of [from, to) where they belong; `bytes` holds that range. */
void dcp_read_box_put(const struct dcp_read_box *box, const uint8_t *bytes, uint64_t from,
                      uint64_t to);
/* Puts an overlap of a stored tensor whose memory is no permutation of a dense box; `payload` holds
 * its whole storage. */
void dcp_read_put_strided(const struct dcp_read_plan *plan, const struct dcp_read_item *item,
                          const struct dcp_record_view *view, const uint8_t *payload);

/* ---- between read_box.c and read_put.c ---- */
/* Fills what does not depend on how the payload is stored; *ret_strides in the item's own order of
 * dims. */
void dcp_read_box_aim(struct dcp_read_box *box, const struct dcp_read_plan *plan,
                      const struct dcp_read_item *item, int64_t *ret_strides);
/* Where elements [first, first + count) of the overlap's image lie when they are one run in the
 * target, whatever its dtype; else NULL. */
uint8_t *dcp_read_box_target_run(const struct dcp_read_box *box, uint64_t first, uint64_t count);

#endif
