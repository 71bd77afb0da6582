/*
 * dcp_alloc.h: memory of the core: counted blocks, growing byte buffers, bump arenas and huge-page
 * mappings.
 *
 * Every allocation of the core goes through here so that a test can fail on one leaked byte and can
 * make the n-th allocation fail.  Sizes are bytes.
 */
#ifndef DCP_ALLOC_H
#define DCP_ALLOC_H

#include "dcp_error.h"

#ifdef __cplusplus
extern "C" {
#endif

void *dcp_malloc(size_t size) DCP_MUST_CHECK; /* NULL when out of memory; size 0 gives a block */
void *dcp_calloc(size_t count, size_t size) DCP_MUST_CHECK; /* checks the product */
void *dcp_realloc(void *block,
                  size_t size) DCP_MUST_CHECK; /* the old block stays valid on failure */
void *dcp_malloc_array(size_t count,
                       size_t size) DCP_MUST_CHECK; /* checks the product; not zeroed */
void dcp_free(void *block);                         /* NULL is fine */

/* Bytes that are allocated now, mappings included.  Tests compare before and after. */
uint64_t dcp_alloc_live_bytes(void);
/* The most bytes that were allocated at a time since the last reset. */
uint64_t dcp_alloc_peak_bytes(void);
void dcp_alloc_reset_peak(void);
/* Tests: the allocation number `n` from now on fails, and all after it; 0 switches it off. */
void dcp_alloc_fail_after(uint64_t n);

/* Memory that is mapped elsewhere counts as allocated too.  False: a test makes this one fail, and
 * nothing was counted. */
bool dcp_alloc_count(uint64_t bytes) DCP_MUST_CHECK;
void dcp_alloc_uncount(uint64_t bytes);

/* A growing byte buffer.  Zero-initialised is a valid empty one.  After a failed append `failed`
 * stays set, so that a run of appends is checked once, at its end. */
struct dcp_buf {
    uint8_t *data;
    size_t len;
    size_t cap;
    bool failed;
};

void dcp_buf_clean_up(struct dcp_buf *buf);
void dcp_buf_clear(struct dcp_buf *buf); /* keeps the memory, forgets the bytes and the failure */
int dcp_buf_reserve(struct dcp_buf *buf, size_t more);
uint8_t *dcp_buf_extend(struct dcp_buf *buf,
                        size_t n); /* room for n bytes, counted as written; NULL on failure */
void dcp_buf_put(struct dcp_buf *buf, const void *bytes, size_t n);
void dcp_buf_put_u8(struct dcp_buf *buf, uint8_t v);
void dcp_buf_put_u16(struct dcp_buf *buf,
                     uint16_t v); /* little endian, as all numbers that leave the process */
void dcp_buf_put_u32(struct dcp_buf *buf, uint32_t v);
void dcp_buf_put_u64(struct dcp_buf *buf, uint64_t v);
void dcp_buf_put_varint(struct dcp_buf *buf, uint64_t v); /* LEB128 */
int dcp_buf_check(const struct dcp_buf *buf,
                  struct dcp_error *err) DCP_MUST_CHECK; /* DCP_E_NOMEM if `failed` */

/* A bounds-checked reader.  After the first read past the end `failed` is set and every read gives
 * 0 / NULL. */
struct dcp_cursor {
    const uint8_t *data;
    size_t len;
    size_t pos;
    bool failed;
};

uint8_t dcp_cursor_u8(struct dcp_cursor *c);
uint16_t dcp_cursor_u16(struct dcp_cursor *c);
uint32_t dcp_cursor_u32(struct dcp_cursor *c);
uint64_t dcp_cursor_u64(struct dcp_cursor *c);
uint64_t dcp_cursor_varint(struct dcp_cursor *c);
const uint8_t *dcp_cursor_bytes(struct dcp_cursor *c, uint64_t n); /* borrows; NULL past the end */

/* Memory that lives and dies together: names, dimensions.  Zero-initialised is valid.  Blocks never
 * move. */
struct dcp_bump {
    struct dcp_bump_block *first;
};

void *dcp_bump_alloc(struct dcp_bump *bump, size_t size, size_t align) DCP_MUST_CHECK;
void dcp_bump_clean_up(struct dcp_bump *bump);

/* Anonymous memory on huge pages where the kernel gives them, page aligned, not inherited by a
 * fork, not dumped. */
void *dcp_map_huge(size_t size, struct dcp_error *err) DCP_MUST_CHECK;
void dcp_unmap_huge(void *block, size_t size);
/* Grows or shrinks such a block, by moving its pages and not their bytes; the old one stays valid
 * on failure. */
void *dcp_remap_huge(void *block, size_t old_size, size_t size,
                     struct dcp_error *err) DCP_MUST_CHECK;

#ifdef __cplusplus
}
#endif
#endif
