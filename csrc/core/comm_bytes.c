/*
 * comm_bytes.c: messages of any length over collectives of one fixed size.
 *
 * A transport is given equal sizes on all ranks or it aborts, hangs or truncates without a word, so
 * three steps come in the same order everywhere:
 *   1. agree on the longest message (an all-reduce) and refuse what is over the limit;
 *   2. allocate, then agree that every rank could: a rank that returned alone would leave the
 *      others waiting for it until their deadline;
 *   3. move the messages in rounds of one piece per rank, padded with zeros to the longest.
 * A message travels as its length (8 bytes, little endian) and its bytes, so lengths need no
 * exchange of their own.  Rounds bound the padded buffer of whoever holds all ranks' pieces; what
 * is kept is the sum of the lengths, not the longest times the ranks.
 *
 * What can still fail on one rank after step 2 is the block for received bytes, whose size is known
 * only then.  That rank takes part in all rounds, and a last agreement after a gather lets all
 * ranks fail together: the others would wait in their next call for one that has left.
 *
 * Threads: the comm table's rule, one caller at a time.
 */
#include "comm_bytes.h"

#include <string.h>

#include "dcp_limits.h"

/* Bytes of one round, of all ranks together; 64 MiB is far above what one round's latency costs. */
#define ROUND_BYTES (64u << 20)
/* At least a page per rank and round, so that 2^17 ranks need 512 MiB and not as many rounds. */
#define MIN_PIECE_BYTES 4096u
/* One message: whatever is sent ends up in, or is, a metadata image. */
#define MAX_MESSAGE_BYTES DCP_MAX_METADATA_BYTES

enum { LENGTH_BYTES = 8 };

/* Rounds of one exchange: the same numbers on every rank. */
struct rounds {
    uint64_t longest; /* bytes of the longest message */
    uint64_t stream;  /* bytes of the longest message with its length in front */
    size_t piece;     /* bytes of one rank in one round; at least LENGTH_BYTES */
};

/* One step of agreement: the longest `len` and whether `rc` is 0 everywhere.  A rank's own failure
 * is what it returns, in `err` already. */
static int
agree(const struct dcp_comm *comm, const char *what, int rc, uint64_t len, uint64_t *ret_longest,
      struct dcp_error *err)
{
    int64_t lanes[2] = {-(int64_t)dcp_min_u64(len, INT64_MAX), rc == 0};
    int comm_rc = comm->all_reduce_min(comm->ctx, lanes, 2, err);
    if (comm_rc != 0) {
        return comm_rc;
    }
    if (rc != 0) {
        return rc;
    }
    if (lanes[1] != 1) {
        return dcp_error_set(err, DCP_E_PEER, 0, NULL,
                             "%s among %u ranks (%s): another rank could not take part; its own "
                             "error says why",
                             what, comm->size, comm->kind);
    }
    *ret_longest = (uint64_t)-lanes[0];
    return 0;
}

static int
agree_on_longest(const struct dcp_comm *comm, const char *what, int rc, uint64_t len,
                 struct rounds *ret_rounds, struct dcp_error *err)
{
    uint64_t longest = 0;
    rc = agree(comm, what, rc, len, &longest, err);
    if (rc != 0) {
        return rc;
    }
    if (longest > MAX_MESSAGE_BYTES) {
        return dcp_error_set(err, DCP_E_LIMIT, 0, NULL,
                             "%s among %u ranks (%s): the longest message is %llu bytes, the limit "
                             "%llu; save large objects as tensors",
                             what, comm->size, comm->kind, (unsigned long long)longest,
                             (unsigned long long)MAX_MESSAGE_BYTES);
    }
    uint64_t share = dcp_max_u64(ROUND_BYTES / comm->size, MIN_PIECE_BYTES);
    ret_rounds->longest = longest;
    ret_rounds->stream = longest + LENGTH_BYTES;
    ret_rounds->piece = (size_t)dcp_min_u64(ret_rounds->stream, share);
    return 0;
}

static int
agree_on_memory(const struct dcp_comm *comm, const char *what, bool allocated,
                struct dcp_error *err)
{
    int rc = 0;
    if (!allocated) {
        rc = dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "%s among %u ranks (%s): no memory for it",
                           what, comm->size, comm->kind);
    }
    uint64_t unused = 0;
    return agree(comm, what, rc, 0, &unused, err);
}

/* Bytes [offset, offset + piece) of a message's stream, zeros behind its end. */
static void
write_piece(uint8_t *dst, size_t piece, uint64_t offset, const uint8_t *data, uint64_t len)
{
    size_t filled = 0;
    if (offset == 0) {
        for (int i = 0; i < LENGTH_BYTES; i++) {
            dst[i] = (uint8_t)(len >> (8 * i));
        }
        filled = LENGTH_BYTES;
    }
    uint64_t from = offset + filled - LENGTH_BYTES;
    if (from < len) {
        size_t n = (size_t)dcp_min_u64(len - from, piece - filled);
        memcpy(dst + filled, data + from, n);
        filled += n;
    }
    memset(dst + filled, 0, piece - filled);
}

/* The reverse: puts what a piece holds of the message's bytes to their place in `dst`. */
static void
read_piece(const uint8_t *src, size_t piece, uint64_t offset, uint8_t *dst, uint64_t len)
{
    size_t skip = offset == 0 ? LENGTH_BYTES : 0;
    uint64_t from = offset + skip - LENGTH_BYTES;
    if (from < len) {
        memcpy(dst + from, src + skip, (size_t)dcp_min_u64(len - from, piece - skip));
    }
}

static int
read_length(const uint8_t *piece, const struct rounds *rounds, uint32_t from_rank,
            uint64_t *ret_len, struct dcp_error *err)
{
    struct dcp_cursor c = {.data = piece, .len = LENGTH_BYTES};
    uint64_t len = dcp_cursor_u64(&c);
    if (len > rounds->longest) {
        return dcp_error_set(err, DCP_E_COMM, 0, NULL,
                             "a message from rank %u claims %llu bytes where all ranks agreed on "
                             "%llu at most: it was damaged on the way",
                             from_rank, (unsigned long long)len,
                             (unsigned long long)rounds->longest);
    }
    *ret_len = len;
    return 0;
}

/* From the first round's pieces: checks all lengths, then allocates once and points the spans. */
static int
place_messages(const struct dcp_comm *comm, const uint8_t *pieces, const struct rounds *rounds,
               struct dcp_span *spans, uint8_t **ret_block, struct dcp_error *err)
{
    uint64_t total = 0;
    for (uint32_t i = 0; i < comm->size; i++) {
        uint64_t len = 0;
        int rc = read_length(pieces + (size_t)i * rounds->piece, rounds, i, &len, err);
        if (rc != 0) {
            return rc;
        }
        if (dcp_add_overflows_u64(total, len, &total)) {
            return dcp_error_set(err, DCP_E_LIMIT, 0, NULL,
                                 "the messages of %u ranks do not fit 64 bits", comm->size);
        }
        spans[i].len = (size_t)len;
    }
    uint8_t *block = dcp_malloc((size_t)total);
    if (block == NULL) {
        return dcp_error_set(err, DCP_E_NOMEM, 0, NULL,
                             "no memory for %llu bytes of messages from %u ranks",
                             (unsigned long long)total, comm->size);
    }
    size_t at = 0;
    for (uint32_t i = 0; i < comm->size; i++) {
        spans[i].data = block + at;
        at += spans[i].len;
    }
    *ret_block = block;
    return 0;
}

static void
read_round(const struct dcp_comm *comm, const uint8_t *pieces, const struct rounds *rounds,
           uint64_t offset, const struct dcp_span *spans, uint8_t *block)
{
    size_t at = 0;
    for (uint32_t i = 0; i < comm->size; i++) {
        read_piece(pieces + (size_t)i * rounds->piece, rounds->piece, offset, block + at,
                   spans[i].len);
        at += spans[i].len;
    }
}

/* All messages at `root`, or on every rank when `to_all`. */
static int
collect(const struct dcp_comm *comm, const char *what, bool to_all, uint32_t root,
        const struct dcp_span *mine, uint8_t **ret_block, struct dcp_span **ret_spans,
        struct dcp_error *err)
{
    bool receives = to_all || comm->rank == root;
    struct rounds rounds;
    uint8_t *piece = NULL;
    uint8_t *pieces = NULL;
    uint8_t *block = NULL;
    struct dcp_span *spans = NULL;
    int receive_rc = 0;

    int rc = agree_on_longest(comm, what, 0, mine->len, &rounds, err);
    if (rc != 0) {
        return rc;
    }
    piece = dcp_malloc(rounds.piece);
    if (receives) {
        pieces = dcp_malloc_array(comm->size, rounds.piece);
        spans = dcp_malloc_array(comm->size, sizeof *spans);
    }
    bool allocated = piece != NULL && (!receives || (pieces != NULL && spans != NULL));
    rc = agree_on_memory(comm, what, allocated, err);
    if (rc != 0) {
        goto done;
    }
    for (uint64_t offset = 0; offset < rounds.stream; offset += rounds.piece) {
        write_piece(piece, rounds.piece, offset, mine->data, mine->len);
        rc = to_all ? comm->all_gather(comm->ctx, piece, pieces, rounds.piece, err)
                    : comm->gather(comm->ctx, root, piece, pieces, rounds.piece, err);
        if (rc != 0) {
            goto done;
        }
        if (receives && offset == 0) {
            receive_rc = place_messages(comm, pieces, &rounds, spans, &block, err);
        }
        if (block != NULL) {
            read_round(comm, pieces, &rounds, offset, spans, block);
        }
    }
    uint64_t unused = 0;
    rc = agree(comm, what, receive_rc, 0, &unused, err);
    if (rc == 0 && receives) {
        *ret_block = block;
        *ret_spans = spans;
        block = NULL;
        spans = NULL;
    }

done:
    dcp_free(block);
    dcp_free(spans);
    dcp_free(pieces);
    dcp_free(piece);
    return rc;
}

static int
check_root(const struct dcp_comm *comm, const char *what, uint32_t root, struct dcp_error *err)
{
    if (root < comm->size) {
        return 0;
    }
    return dcp_error_set(err, DCP_E_INVALID, 0, NULL, "%s with root %u in a group of %u ranks (%s)",
                         what, root, comm->size, comm->kind);
}

int
dcp_comm_all_gather_bytes(const struct dcp_comm *comm, const uint8_t *data, size_t len,
                          uint8_t **ret_block, struct dcp_span **ret_spans, struct dcp_error *err)
{
    struct dcp_span mine = {data, len};
    return collect(comm, "all-gather of messages", true, 0, &mine, ret_block, ret_spans, err);
}

int
dcp_comm_gather_bytes(const struct dcp_comm *comm, uint32_t root, const uint8_t *data, size_t len,
                      uint8_t **ret_block, struct dcp_span **ret_spans, struct dcp_error *err)
{
    static const char what[] = "gather of messages";
    int rc = check_root(comm, what, root, err);
    if (rc != 0) {
        return rc;
    }
    struct dcp_span mine = {data, len};
    return collect(comm, what, false, root, &mine, ret_block, ret_spans, err);
}

/* The rounds of a scatter; `pieces` at the root only.  Bytes go behind ret->len, where room for the
 * longest message is reserved. */
static int
scatter_rounds(const struct dcp_comm *comm, uint32_t root, const struct dcp_span *spans,
               const struct rounds *rounds, uint8_t *pieces, uint8_t *piece, struct dcp_buf *ret,
               struct dcp_error *err)
{
    uint64_t len = 0;
    int receive_rc = 0;
    for (uint64_t offset = 0; offset < rounds->stream; offset += rounds->piece) {
        for (uint32_t i = 0; pieces != NULL && i < comm->size; i++) {
            write_piece(pieces + (size_t)i * rounds->piece, rounds->piece, offset, spans[i].data,
                        spans[i].len);
        }
        int rc = comm->scatter(comm->ctx, root, pieces, piece, rounds->piece, err);
        if (rc != 0) {
            return rc;
        }
        if (offset == 0) {
            receive_rc = read_length(piece, rounds, root, &len, err);
        }
        if (len != 0) {
            read_piece(piece, rounds->piece, offset, ret->data + ret->len, len);
        }
    }
    if (receive_rc == 0) {
        ret->len += (size_t)len;
    }
    return receive_rc;
}

int
dcp_comm_scatter_bytes(const struct dcp_comm *comm, uint32_t root, const struct dcp_span *spans,
                       struct dcp_buf *ret, struct dcp_error *err)
{
    static const char what[] = "scatter of messages";
    int rc = check_root(comm, what, root, err);
    if (rc != 0) {
        return rc;
    }
    bool is_root = comm->rank == root;
    uint64_t longest = 0;
    for (uint32_t i = 0; is_root && i < comm->size; i++) {
        longest = dcp_max_u64(longest, spans[i].len);
    }
    struct rounds rounds;
    uint8_t *pieces = NULL;
    uint8_t *piece = NULL;

    rc = agree_on_longest(comm, what, dcp_buf_check(ret, err), longest, &rounds, err);
    if (rc != 0) {
        return rc;
    }
    piece = dcp_malloc(rounds.piece);
    if (is_root) {
        pieces = dcp_malloc_array(comm->size, rounds.piece);
    }
    bool allocated = piece != NULL && (!is_root || pieces != NULL) &&
                     dcp_buf_reserve(ret, (size_t)rounds.longest) == 0;
    rc = agree_on_memory(comm, what, allocated, err);
    if (rc == 0) {
        rc = scatter_rounds(comm, root, spans, &rounds, pieces, piece, ret, err);
    }
    dcp_free(pieces);
    dcp_free(piece);
    return rc;
}

int
dcp_comm_broadcast_bytes(const struct dcp_comm *comm, uint32_t root, struct dcp_buf *buf,
                         struct dcp_error *err)
{
    static const char what[] = "broadcast of a message";
    int rc = check_root(comm, what, root, err);
    if (rc != 0) {
        return rc;
    }
    bool is_root = comm->rank == root;
    struct rounds rounds;
    rc =
        agree_on_longest(comm, what, dcp_buf_check(buf, err), is_root ? buf->len : 0, &rounds, err);
    if (rc != 0) {
        return rc;
    }
    size_t len = (size_t)rounds.longest;
    rc = agree_on_memory(comm, what, is_root || dcp_buf_reserve(buf, len) == 0, err);
    if (rc != 0 || len == 0) {
        return rc;
    }
    uint8_t *at = is_root ? buf->data : buf->data + buf->len;
    rc = comm->broadcast(comm->ctx, root, at, len, err);
    if (rc == 0 && !is_root) {
        buf->len += len;
    }
    return rc;
}
