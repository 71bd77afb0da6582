/*
 * share.h: private: read once per host, what its files share.
 *
 * Ranks of one host read what several of them want once, into memory that all of them see:
 *   share_segment.c   every rank's own segment, how the ranks of a host find each other
 *   share_rounds.c    how they agree to share, and waits
 *   share_wants.c     what a rank wants, published in its segment
 *   share_schedule.c  the same order of units, computed by every rank from what all published
 *   share_unit.c      what is done with a unit: read, checked, taken by who wants it
 *   share_agree.c     whether a rank takes part, and with what
 *   share_read.c      threads that fill slots, the calling thread that empties them
 *
 * A segment: [header][wants][details][slots].  Its header alone is there from the start; the rest
 * before its state becomes JOINED, and does not change after that, but for the slots.
 */
#ifndef DCP_SHARE_H
#define DCP_SHARE_H

#include <stdatomic.h>

#include "dcp_engine.h"
#include "dcp_shm.h"

/* Ranks that share on one host; masks of them are 64 bits.  The others read for themselves. */
#define DCP_SHARE_MOST_RANKS 64
/* Ranks that read: a few saturate any device, and each needs room for two slots. */
#define DCP_SHARE_MOST_READERS 5
#define DCP_SHARE_MOST_SLOTS 16
/* Slots of all readers of a host: a third of the 64 MiB that containers get by default, and less
 * than the ring that a rank uses when it reads alone. */
#define DCP_SHARE_HOST_BYTES (20u << 20)
/* A slot, and so a unit; with two readers the larger one. */
#define DCP_SHARE_SLOT_BYTES (2u << 20)
#define DCP_SHARE_LARGE_SLOT_BYTES (4u << 20)
/* Payloads below this are read by each rank: the page cache serves them as well. */
#define DCP_SHARE_LEAST_PAYLOAD_BYTES (64u << 10)
/* A rank that wants less than this takes no part. */
#define DCP_SHARE_LEAST_WANTED_BYTES (1u << 20)
/* A chunk of more blocks is read by each rank (4 TiB): bounds the bitmaps. */
#define DCP_SHARE_MOST_BLOCKS (1u << 22)
/* What a rank may publish: half a million chunks, or bitmaps of 4 MiB. */
#define DCP_SHARE_MOST_WANTS_BYTES (4u << 20)
/* Unwanted bytes between two payloads of one unit. */
#define DCP_SHARE_GAP_BYTES (16u << 10)
/* Payloads of one unit: as many of the least size as a small slot holds. */
#define DCP_SHARE_MOST_PIECES 32
/* Longest sleep before a waiting rank looks whether the others still live, in ns. */
#define DCP_SHARE_SLICE_NS 100000000u
/* Longest wait for one step of another rank, in ns: a device that delivers no slot in five minutes
 * is broken. */
#define DCP_SHARE_DEADLINE_NS 300000000000u

/* ---- what lies in a segment ---- */

enum dcp_share_state {
    DCP_SHARE_NEW = 0,     /* made; whether it takes part is not known */
    DCP_SHARE_OUT = 1,     /* from NEW: takes no part; final */
    DCP_SHARE_JOINED = 2,  /* wants and slots are there */
    DCP_SHARE_READY = 3,   /* from JOINED: has mapped all that joined, and has memory for slots */
    DCP_SHARE_REFUSED = 4, /* from JOINED: has not; all read for themselves; final */
    DCP_SHARE_DONE = 5,    /* has taken all it wants and filled all its units; final */
    DCP_SHARE_FAILED = 6,  /* broke off; final */
};

/* One cache line.  `filled` is n + 1 once the reader's unit number n is in it, `left` counts the
 * ranks that have not taken theirs; at 0 the reader may fill it again. */
struct dcp_share_slot {
    _Alignas(64) _Atomic uint32_t filled;
    _Atomic uint32_t left;
    uint64_t verified; /* bit of every piece of the unit whose checksums were compared */
};

struct dcp_share_header {
    _Atomic uint32_t state; /* enum dcp_share_state */
    uint32_t rank;
    struct dcp_shm_host host;
    uint32_t options; /* share_options; equal among ranks that share */
    uint32_t hot;     /* what the rank wants lies in the page cache, where copies are cheap */
    uint32_t slots_count, slot_bytes;
    uint64_t members_hash; /* of the ranks it shares with; there before its state is READY */
    uint64_t segment_bytes, wants_count, details_count, details_offset, slots_offset;
    struct dcp_share_slot slots[DCP_SHARE_MOST_SLOTS];
};

enum { DCP_SHARE_HEADER_BYTES = 4096 };

/* A chunk that a rank wants; ascending by file and offset of the chunk. */
struct dcp_share_want {
    uint32_t chunk, entry; /* indices in the metadata */
    uint32_t detail;       /* 0: all of it; else 1 + index in details: */
    uint32_t reserved;
};

/* Details of a chunk that is wanted in part. */
enum {
    DCP_SHARE_DETAIL_READ = 0, /* bytes that the rank would read by itself */
    DCP_SHARE_DETAIL_WEAK = 1, /* bytes of them that it could not verify */
    DCP_SHARE_DETAIL_BITS = 2, /* a bit for every block of the payload that holds wanted bytes */
};

/* ---- share_segment.c ---- */

struct dcp_share_member {
    uint32_t rank;
    int fd; /* -1 when closed */
    struct dcp_share_header *header;
    uint64_t mapped_bytes;
    const struct dcp_share_want *wants; /* valid once it was mapped whole */
    const uint64_t *details;
    uint8_t *slots;
};

enum { DCP_SHARE_NAME_BYTES = 128, DCP_SHARE_REASON_BYTES = 192 };

struct dcp_share {
    const struct dcp_shm *shm;
    struct dcp_shm_host host; /* who made it: a forked child is somebody else */
    struct dcp_save_id load_id;
    char name[DCP_SHARE_NAME_BYTES];
    bool linked; /* the name is there */
    struct dcp_share_member own;
    /* Ranks of this host, ascending, this one included (its member is a copy of `own`). */
    struct dcp_share_member members[DCP_SHARE_MOST_RANKS];
    uint32_t members_count, self;
    uint32_t slot_bytes; /* 0: chosen by the number of ranks; else of two slots (tests) */
    char reason[DCP_SHARE_REASON_BYTES]; /* why nothing is shared; "" */
};

/* Makes this rank's segment, header only.  Before an agreement that all ranks enter; after it
 * every rank finds the segments of all ranks of its host.  Never fails: a rank without a segment
 * reads for itself.  `share` zeroed. */
void dcp_share_begin(struct dcp_share *share, const struct dcp_shm *shm,
                     const struct dcp_save_id *load_id, uint32_t rank);
/* Finds the others (not more than DCP_SHARE_MOST_RANKS; itself at `self`). */
bool dcp_share_find(struct dcp_share *share);
/* Makes room for what this rank publishes, which the caller then copies to share->own; slots take
 * memory only when they will be used. */
bool dcp_share_grow(struct dcp_share *share, uint64_t wants_count, uint64_t details_count,
                    uint32_t slots_count, uint32_t slot_bytes);
/* Tells the others, once, that this rank takes no part, or no further part; removes the name.  Any
 * time, also when nothing was begun. */
void dcp_share_leave(struct dcp_share *share, enum dcp_share_state how);
/* The same as FAILED (OUT before it joined), and frees. */
void dcp_share_end(struct dcp_share *share);
/* Says why nothing is shared, unless something was said before. */
void dcp_share_because(struct dcp_share *share, const char *fmt, ...) DCP_PRINTF(2, 3);

/* For the rounds: states, and other ranks' segments. */
static inline uint32_t
dcp_share_state_of(const struct dcp_share_member *member)
{
    return atomic_load_explicit(&member->header->state, memory_order_acquire);
}
void dcp_share_set_state(struct dcp_share *share, enum dcp_share_state state);
/* Maps `bytes` of a segment in place of what was mapped.  0 or -errno. */
int dcp_share_map(const struct dcp_share *share, struct dcp_share_member *member, uint64_t bytes);
void dcp_share_set_parts(struct dcp_share_member *member);
void dcp_share_release(const struct dcp_share *share, struct dcp_share_member *member);
void dcp_share_no_room(struct dcp_share *share, uint64_t bytes, int rc);

/* ---- share_rounds.c ---- */

/* First round: publishes, and keeps those that joined as well.  *ret_joined false: this rank reads
 * for itself. */
int dcp_share_join(struct dcp_share *share, uint32_t options, const atomic_int *cancel,
                   bool *ret_joined, struct dcp_error *err) DCP_MUST_CHECK;
/* Second round: whether all that joined are able, and have their slots.  *ret_ready is the same on
 * all of them. */
int dcp_share_ready(struct dcp_share *share, bool able, const atomic_int *cancel, bool *ret_ready,
                    struct dcp_error *err) DCP_MUST_CHECK;
/* Waits until *word is `goal`.  DCP_E_CANCELLED; DCP_E_PEER: another rank broke off or died;
 * DCP_E_TIMEOUT.  `stop`, which may be NULL, ends the wait with DCP_E_CANCELLED too. */
int dcp_share_wait(const struct dcp_share *share, const _Atomic uint32_t *word, uint32_t goal,
                   const atomic_int *cancel, const atomic_int *stop,
                   struct dcp_error *err) DCP_MUST_CHECK;
int dcp_share_check_cancel(const atomic_int *cancel, struct dcp_error *err) DCP_MUST_CHECK;

/* ---- share_wants.c ---- */

/* An item of this rank that can be shared; ascending by file, offset and chunk. */
struct dcp_share_visit {
    uint64_t offset_bytes;
    uint32_t file, chunk;
    uint64_t item; /* index in plan items */
};

struct dcp_share_wants {
    struct dcp_share_visit *visits; /* owned */
    uint64_t visits_count;
    struct dcp_share_want *wants; /* owned; one per chunk */
    uint64_t wants_count;
    struct dcp_buf details; /* 64-bit words, host order */
    uint64_t wanted_bytes;
};

/* By file, offset and chunk, unless they are so already. */
void dcp_share_sort_visits(struct dcp_share_visit *visits, uint64_t count);
/* Where a record of ours has its payload; false when the chunk is none that can be shared. */
bool dcp_share_payload(const struct dcp_metadata *md, uint32_t entry, uint32_t chunk,
                       uint64_t *ret_offset_bytes, uint64_t *ret_payload_bytes);
int dcp_share_wants_build(const struct dcp_read_plan *plan,
                          const struct dcp_engine_options *options, struct dcp_share_wants *ret,
                          struct dcp_error *err) DCP_MUST_CHECK;
void dcp_share_wants_clean_up(struct dcp_share_wants *wants);

/* ---- share_schedule.c ---- */

/* Blocks of one chunk that lie behind each other. */
struct dcp_share_piece {
    uint32_t chunk, entry;
    uint64_t users;                /* bit of every member that wants some of it */
    uint64_t payload_offset_bytes; /* in the file */
    uint64_t payload_bytes;        /* of the chunk */
    uint64_t from, to;             /* in the payload */
    uint64_t end_bytes;            /* in the file, with the descriptor that checks a small one */
};

/* What is read in one go. */
struct dcp_share_unit {
    uint32_t file;
    uint32_t reader;                /* index in members */
    uint64_t number;                /* of that reader's units */
    uint64_t from_bytes, end_bytes; /* in the file; from_bytes is aligned for direct I/O */
    uint64_t users;
    uint32_t pieces_count;
    struct dcp_share_piece pieces[DCP_SHARE_MOST_PIECES];
};

struct dcp_share_head {
    uint32_t file, chunk;
    uint64_t offset_bytes;
};

/* A walk over the schedule.  Depends on nothing but its members' wants: two walks meet the same
 * units, on every rank.  May be copied. */
struct dcp_share_cursor {
    const struct dcp_metadata *md;
    const struct dcp_share_member *members;
    uint32_t members_count;
    uint64_t unit_bytes;               /* 0: nobody has slots, nothing is shared */
    uint64_t at[DCP_SHARE_MOST_RANKS]; /* next want of each member */
    struct dcp_share_head heads[DCP_SHARE_MOST_RANKS];
    /* the chunk it is in; no users: in none */
    struct dcp_share_piece chunk;
    uint64_t blocks_count, block;                  /* of it; the next one */
    const uint64_t *details[DCP_SHARE_MOST_RANKS]; /* of the users; NULL: all blocks */
    uint64_t reader_bytes[DCP_SHARE_MOST_RANKS], reader_units[DCP_SHARE_MOST_RANKS];
};

/* Whether what the members published can be walked: sorted, within bounds. */
bool dcp_share_check_wants(const struct dcp_share *share, const struct dcp_metadata *md);
void dcp_share_cursor_init(struct dcp_share_cursor *cursor, const struct dcp_share *share,
                           const struct dcp_metadata *md);
/* The next chunk that is shared, or that is left of one: cursor->chunk.  False at the end. */
bool dcp_share_next_chunk(struct dcp_share_cursor *cursor);
bool dcp_share_next_unit(struct dcp_share_cursor *cursor, struct dcp_share_unit *ret);

/* Where the caller of dcp_share_grow puts what it wants. */
static inline void *
dcp_share_own_wants(const struct dcp_share *share)
{
    return (uint8_t *)share->own.header + DCP_SHARE_HEADER_BYTES;
}

static inline void *
dcp_share_own_details(const struct dcp_share *share)
{
    return (uint8_t *)share->own.header + share->own.header->details_offset;
}

static inline bool
dcp_share_is_user(uint64_t users, uint32_t member)
{
    return (users >> member) & 1;
}

/* ---- share_unit.c ---- */

struct dcp_reader;

/* Reads a unit; `wanted_bytes` of its file decide how, when it is not open yet. */
int dcp_share_read_unit(struct dcp_reader *reader, const struct dcp_share_unit *unit,
                        uint64_t wanted_bytes, uint8_t *data, struct dcp_error *err) DCP_MUST_CHECK;
/* Whether the unit's file is the one that the reader has open. */
bool dcp_share_is_open(const struct dcp_reader *reader, const struct dcp_share_unit *unit);
/* Compares the checksums of what was read, on the way to `copy` unless that is NULL. *ret_verified:
 * a bit for each piece that had any. */
int dcp_share_check_unit(struct dcp_reader *reader, const struct dcp_share_unit *unit,
                         const uint8_t *data, uint8_t *copy, uint64_t *ret_verified,
                         struct dcp_error *err) DCP_MUST_CHECK;

/* Takes what this rank wants of units, in their order. */
struct dcp_share_taker {
    const struct dcp_read_plan *plan;
    const struct dcp_share_wants *wants;
    const struct dcp_engine_options *options;
    uint32_t member; /* this rank, in the masks of users */
    uint64_t visit;  /* of wants; follows the units */
    struct dcp_read_stats stats;
};

/* Moves rows of the unit to their targets.  `is_own`: this rank read it. */
int dcp_share_take_unit(struct dcp_share_taker *taker, const struct dcp_share_unit *unit,
                        const uint8_t *data, uint64_t verified, bool is_own,
                        struct dcp_error *err) DCP_MUST_CHECK;

/* ---- share_read.c ---- */

/* Reads a plan: what other ranks of the host want too with them, the rest alone.  Arguments as of
 * dcp_reader_run. */
int dcp_share_read(struct dcp_share *share, const struct dcp_io *io, int dirfd,
                   const char *dir_path, const struct dcp_read_plan *plan,
                   const struct dcp_engine_options *options, dcp_record_fn on_record,
                   void *on_record_ctx, struct dcp_read_stats *ret_stats,
                   struct dcp_error *err) DCP_MUST_CHECK;

#endif
