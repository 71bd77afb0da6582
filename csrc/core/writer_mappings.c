/*
 * writer_mappings.c: the arenas that a writer process keeps mapped between saves.
 *
 * Page tables are what a first write of an arena costs over a later one: 0.1 CPU s per GB.  So a
 * mapping is kept for the next save, and can be made ahead of the first.  Several, because a
 * trainer with two saves in flight gives a process now the one arena, now the other.
 *
 * An arena is known by its file, which its trainer keeps for as long as the arena is.  One that has
 * grown is mapped anew.  Pages that the trainer gave up are gone however long they stay mapped
 * here; what is let go in time is address space and page tables.
 *
 * Threads: as one struct.
 */
#include "writer_mappings.h"

static void
drop(struct dcp_writer_mapping *mapping)
{
    dcp_process_unmap(&mapping->memory);
    *mapping = (struct dcp_writer_mapping){0};
}

/* The one of that file, else the one that was not used for longest: a free one comes first. */
static struct dcp_writer_mapping *
choose(struct dcp_writer_mappings *mappings, int fd)
{
    struct dcp_writer_mapping *oldest = &mappings->kept[0];

    for (int i = 0; i < DCP_MAX_ARENAS; i++) {
        struct dcp_writer_mapping *mapping = &mappings->kept[i];
        if (dcp_process_is_mapped(&mapping->memory, fd)) {
            return mapping;
        }
        if (mapping->turn < oldest->turn) {
            oldest = mapping;
        }
    }
    return oldest;
}

static int
map(struct dcp_writer_mappings *mappings, int fd, uint64_t len, bool prepare,
    struct dcp_writer_mapping **ret_mapping)
{
    struct dcp_writer_mapping *mapping = choose(mappings, fd);
    int rc = dcp_process_map(&mapping->memory, fd, len);

    if (rc == 0) {
        mapping->turn = ++mappings->turns;
        mapping->prepared = prepare;
        *ret_mapping = mapping;
    }
    return rc;
}

int
dcp_mappings_use(struct dcp_writer_mappings *mappings, int fd, uint64_t len,
                 const uint8_t **ret_bytes)
{
    struct dcp_writer_mapping *mapping;
    int rc = map(mappings, fd, len, false, &mapping);

    if (rc == 0) {
        *ret_bytes = mapping->memory.bytes;
    }
    return rc;
}

int
dcp_mappings_prepare(struct dcp_writer_mappings *mappings, int fd, uint64_t len,
                     const atomic_int *cancel)
{
    struct dcp_writer_mapping *mapping;
    int rc = map(mappings, fd, len, true, &mapping);

    return rc != 0 ? rc : dcp_process_touch(&mapping->memory, len, cancel);
}

void
dcp_mappings_expire(struct dcp_writer_mappings *mappings, uint64_t idle_ns)
{
    for (int i = 0; i < DCP_MAX_ARENAS; i++) {
        struct dcp_writer_mapping *mapping = &mappings->kept[i];
        if (idle_ns > (mapping->prepared ? DCP_WRITER_KEEP_PREPARED_NS : DCP_WRITER_KEEP_NS)) {
            drop(mapping);
        }
    }
}

void
dcp_mappings_clean_up(struct dcp_writer_mappings *mappings)
{
    for (int i = 0; i < DCP_MAX_ARENAS; i++) {
        drop(&mappings->kept[i]);
    }
}
