/*
 * name_table.h: names and paths that the plans of several ranks share (private to the core).
 *
 * Nearly all ranks of a job have the same names in the same order, so a coordinator holds one table
 * of them, not one per rank.  A table is known by its content: by the 128-bit hash of names and
 * paths (dcp_plan_names_hash), or by the bytes it was decoded from.
 *
 * Where each rank has a name of its own (a sampler's state), no two tables are equal, and yet all
 * but a few of their names are.  Such tables take the text of those names from the coordinator's
 * and keep that one alive.
 *
 * Threads: tables are shared among the plans of one group and follow its rule, one thread at a
 * time; the count of references is a plain number.
 */
#ifndef DCP_CORE_NAME_TABLE_H
#define DCP_CORE_NAME_TABLE_H

#include "index_map.h"
#include "plan_private.h"

/* Does not change once it is made. */
struct dcp_name_table {
    uint32_t references;
    struct dcp_hash128 hash;
    struct dcp_name *names; /* owned */
    uint32_t names_count;
    struct dcp_bump strings; /* owns names' text and paths */
    /* A reference, or NULL: text and paths of some names are this table's. */
    struct dcp_name_table *lender;
};

struct dcp_known_table {
    struct dcp_name_table *table; /* a reference */
    struct dcp_span image;        /* borrows: the names as they were sent; empty when unknown */
};

/* What a coordinator knows while it decodes the plans of a gather.  Zero-initialised is valid. */
struct dcp_name_tables {
    struct dcp_known_table *known; /* owned */
    uint32_t known_count, known_cap;
    struct dcp_index_map by_hash, by_image; /* to `known` */
    struct dcp_name_table *lender; /* borrows: what new tables may take text from; may be NULL */
};

void dcp_name_tables_clean_up(struct dcp_name_tables *tables);

/* Moves the names of `plan` into a table of their own, which the plan refers to from then on. */
int dcp_plan_share_names(struct dcp_plan *plan, struct dcp_error *err) DCP_MUST_CHECK;
/* Gives a plan without names those of a table; takes a reference. */
void dcp_plan_use_table(struct dcp_plan *plan, struct dcp_name_table *table);
/* NULL is fine. */
void dcp_name_table_release(struct dcp_name_table *table);

/* Adds the lender's name `n` to the plan; its text and path are borrowed. */
int dcp_plan_borrow_name(struct dcp_plan *plan, const struct dcp_name_table *lender, uint32_t n,
                         struct dcp_error *err) DCP_MUST_CHECK;

/* ---- the set; after an error it can only be cleaned up ---- */

/* Takes a reference, unless a table of this content is known. */
int dcp_name_tables_add(struct dcp_name_tables *tables, struct dcp_name_table *table,
                        struct dcp_error *err) DCP_MUST_CHECK;
/* Shares the plan's own names: as the known table of their content, or as a new one.  `image`: what
 * they were decoded from; from now on it finds the table. */
int dcp_name_tables_intern(struct dcp_name_tables *tables, struct dcp_plan *plan,
                           struct dcp_span image, struct dcp_error *err) DCP_MUST_CHECK;
/* Adds a copy of the plan's names, whose hash is given, and makes it the lender. */
int dcp_name_tables_add_copy(struct dcp_name_tables *tables, const struct dcp_plan *plan,
                             const struct dcp_hash128 *hash, struct dcp_error *err) DCP_MUST_CHECK;

/* Borrows; NULL when no such table is known. */
struct dcp_name_table *dcp_name_tables_by_hash(const struct dcp_name_tables *tables,
                                               const struct dcp_hash128 *hash);
struct dcp_name_table *dcp_name_tables_by_image(const struct dcp_name_tables *tables,
                                                struct dcp_span image);

#endif
