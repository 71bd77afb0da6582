/*
 * dcp_export.h: boxes of tensors at given places of files that several ranks write together.
 *
 * For formats whose layout is known before the first byte (safetensors): one rank creates the files
 * at their final length with their heads, under names of this export; every rank writes the boxes
 * that it holds where they belong; when all are durable one rank publishes them under their final
 * names, the index last.  No byte is written twice, and no tensor is ever whole in memory.
 */
#ifndef DCP_EXPORT_H
#define DCP_EXPORT_H

#include "dcp_engine.h"

/* Files of an export that is not published, and probes, have names that begin with this: whoever
 * creates the next export in the directory removes them. */
#define DCP_EXPORT_PREFIX ".dcp_native-export-"

struct dcp_export_file {
    const char *name; /* in the directory; borrowed */
    uint64_t length_bytes;
    struct dcp_span head; /* its first bytes, written by whoever creates it */
};

/* A box of memory and where it lies in a file. */
struct dcp_export_piece {
    const uint8_t *data;               /* element 0 of the box */
    const uint64_t *lengths;           /* ndim of them, as of the two arrays below; borrowed */
    const int64_t *strides_bytes;      /* in memory */
    const int64_t *file_strides_bytes; /* in the file, those of a row-major tensor: none is negative
                                          and each spans the dims behind it */
    uint64_t offset_bytes;             /* of element 0 in the file */
    uint32_t file;                     /* index in the files */
    uint32_t ndim, item_bytes;
};

struct dcp_export_stats {
    uint64_t payload_bytes;
    uint64_t direct_bytes;   /* of them, by direct I/O */
    uint64_t requests_count; /* writes; rows of a strided box count one each */
    uint64_t read_bytes;     /* joining */
    uint64_t wall_ns, wait_ns, sync_ns;
    uint64_t memory_bytes; /* buffers in use */
};

/* Removes what exports that were given up or killed left in the directory.  One that runs beside
 * this one loses its files too, and fails by name when it comes to write or to publish: the newest
 * wins. */
int dcp_export_sweep(const struct dcp_io *io, const char *dir_path,
                     struct dcp_error *err) DCP_MUST_CHECK;
/* Makes the directory if need be, then the files: at their length, blocks allocated where the file
 * system can, heads written. */
int dcp_export_create(const struct dcp_io *io, const char *dir_path,
                      const struct dcp_export_file *files, uint32_t files_count,
                      struct dcp_error *err) DCP_MUST_CHECK;

/* Writes the pieces, in any order given, into files that were created.  With options->sync they are
 * durable on return. Options that are not about writing, direct I/O, priority, sync, progress and
 * cancelling are not looked at. */
int dcp_export_write(const struct dcp_io *io, const char *dir_path,
                     const struct dcp_export_file *files, uint32_t files_count,
                     const struct dcp_export_piece *pieces, uint64_t pieces_count,
                     const struct dcp_engine_options *options, struct dcp_export_stats *ret_stats,
                     struct dcp_error *err) DCP_MUST_CHECK;

/* ---- joining ---- */

/* A box of a tensor that lies, row major and without gaps, in a source file. */
struct dcp_export_chunk {
    const uint64_t *box; /* offsets, then sizes: 2 * ndim; borrowed */
    uint64_t offset_bytes;
    uint32_t source; /* index in the sources */
};

/* A tensor whose bytes are taken out of source files. */
struct dcp_export_tensor {
    const char *name;                      /* for messages */
    const uint64_t *sizes;                 /* ndim */
    const struct dcp_export_chunk *chunks; /* borrowed */
    uint64_t chunks_count;
    uint64_t offset_bytes; /* of element 0 in the file */
    uint32_t file;         /* index in the files */
    uint32_t ndim, item_bytes;
};

struct dcp_export_sources {
    const char *dir_path;
    const char *const *names;
    uint32_t count;
};

/* Fills files that were created with tensors from source files.  Tensors are given in the order of
 * their places.  A tensor that its chunks do not cover, a chunk that is not inside of its tensor or
 * of its file is an error; of chunks that overlap one is taken.  Reading and writing overlap; all
 * memory together is bounded, whatever the tensors' size. */
int dcp_export_join(const struct dcp_io *io, const struct dcp_export_sources *sources,
                    const char *dir_path, const struct dcp_export_file *files, uint32_t files_count,
                    const struct dcp_export_tensor *tensors, uint64_t tensors_count,
                    const struct dcp_engine_options *options, struct dcp_export_stats *ret_stats,
                    struct dcp_error *err) DCP_MUST_CHECK;

/* ---- publishing ---- */

struct dcp_export_name {
    const char *from, *to; /* in the directory */
};

struct dcp_export_publication {
    const struct dcp_export_name *names; /* files of this export, durable */
    uint32_t names_count;
    /* Files of a former export, which must not be mixed with these: "model-#####-of-#####...". Each
     * '#' stands for a digit, the rest for itself. */
    const char *replaced_pattern;
    const char *index_name;     /* NULL: there is none */
    const char *index_tmp_name; /* with the prefix */
    struct dcp_span index;
    bool sync;
    atomic_int *cancel; /* looked at before the former export goes, never after; may be NULL */
};

/* One file that replaces at most itself is renamed over it: old or new, at every instant.  Else the
 * old index goes first, then the old files, then the new ones get their names, then the new index:
 * a crash in between leaves no index, and never files of two exports.
 *
 * A failure before the first name of the former export is removed leaves that one as it was and, if
 * the directory can be opened, nothing of this one.  From that removal on a failure leaves all of
 * this one, which may be all there is: what could not be published is not the caller's to remove.
 */
int dcp_export_publish(const struct dcp_io *io, const char *dir_path,
                       const struct dcp_export_publication *publication,
                       struct dcp_error *err) DCP_MUST_CHECK;
/* Removes files that are there; for an export that is given up.  Says nothing of what it could not
 * remove: the next export does. */
void dcp_export_discard(const struct dcp_io *io, const char *dir_path, const char *const *names,
                        uint32_t count);

#endif
