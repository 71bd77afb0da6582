/*
 * engine_world.c: plans with memory, naive file images and hand-made metadata for tests of the
 * engine.
 */
#include "engine_world.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void
must(bool ok, const char *what)
{
    if (!ok) {
        fprintf(stderr, "engine_world: %s\n", what);
        exit(1);
    }
}

uint32_t
world_crc32(const uint8_t *data, uint64_t len)
{
    static uint32_t table[256];
    if (table[1] == 0) {
        for (uint32_t i = 0; i < 256; i++) {
            uint32_t reg = i;
            for (int bit = 0; bit < 8; bit++) {
                reg = (reg >> 1) ^ (0xEDB88320u & (0 - (reg & 1)));
            }
            table[i] = reg;
        }
    }
    uint32_t crc = 0xFFFFFFFFu;
    for (uint64_t i = 0; i < len; i++) {
        crc = (crc >> 8) ^ table[(crc ^ data[i]) & 255];
    }
    return ~crc;
}

static void
fill_noise(struct maker_rng *rng, uint8_t *data, uint64_t len)
{
    for (uint64_t i = 0; i < len; i += 8) {
        uint64_t word = maker_next(rng);
        memcpy(data + i, &word, len - i < 8 ? len - i : 8);
    }
}

/* Offset of element `index` of a row-major box in memory of other strides. */
static int64_t
offset_of(uint32_t ndim, const uint64_t *sizes, const int64_t *strides, uint64_t index)
{
    int64_t at = 0;
    for (uint32_t d = ndim; d > 0; d--) {
        at += (int64_t)(index % sizes[d - 1]) * strides[d - 1];
        index /= sizes[d - 1];
    }
    return at;
}

void
world_cut(const struct world_tensor *tensor, const uint64_t *offsets, const uint64_t *sizes,
          uint8_t *ret)
{
    int64_t strides[DCP_MAX_DIMS] = {0};
    int64_t stride = tensor->item_bytes, start = 0;
    uint64_t elements = 1;
    for (uint32_t d = tensor->ndim; d > 0; d--) {
        strides[d - 1] = stride;
        start += (int64_t)offsets[d - 1] * stride;
        stride *= (int64_t)tensor->size[d - 1];
        elements *= sizes[d - 1];
    }
    for (uint64_t i = 0; i < elements; i++) {
        memcpy(ret + i * tensor->item_bytes,
               tensor->image + start + offset_of(tensor->ndim, sizes, strides, i),
               tensor->item_bytes);
    }
}

static void
grow_items(struct world *world)
{
    size_t n = world->plan.items_count;
    world->sources = dcp_realloc(world->sources, n * sizeof *world->sources);
    world->memory = dcp_realloc(world->memory, n * sizeof *world->memory);
    world->strides = dcp_realloc(world->strides, n * sizeof *world->strides);
    world->records = dcp_realloc(world->records, n * sizeof *world->records);
    world->item_tensor = dcp_realloc(world->item_tensor, n * sizeof *world->item_tensor);
    world->sources[n - 1] = (struct dcp_source){0};
    world->memory[n - 1] = NULL;
    world->records[n - 1] = NULL;
    world->item_tensor[n - 1] = UINT32_MAX;
}

/* Memory for the last item: dims in a random order, now and then with room between rows. */
static void
place_source(struct world *world, const struct world_tensor *tensor, const uint64_t *offsets,
             const uint64_t *sizes)
{
    uint32_t item = world->plan.items_count - 1;
    uint32_t order[DCP_MAX_DIMS];
    int64_t *strides = world->strides[item];
    int64_t stride = tensor->item_bytes;
    uint64_t elements = 1;
    bool plain = maker_below(&world->rng, 2) == 0;
    for (uint32_t d = 0; d < tensor->ndim; d++) {
        order[d] = tensor->ndim - 1 - d;
        elements *= sizes[d];
    }
    for (uint32_t d = tensor->ndim; !plain && d > 1; d--) {
        uint32_t other = (uint32_t)maker_below(&world->rng, d), keep = order[d - 1];
        order[d - 1] = order[other];
        order[other] = keep;
    }
    for (uint32_t i = 0; i < tensor->ndim; i++) {
        strides[order[i]] = stride;
        uint64_t room = plain || tensor->bytes > (1 << 20) ? 0 : maker_below(&world->rng, 2);
        stride *= (int64_t)(sizes[order[i]] + room);
    }
    uint8_t *memory = dcp_calloc(1, (size_t)stride + 64);
    uint8_t *dense = dcp_malloc(elements * tensor->item_bytes + 1);
    world_cut(tensor, offsets, sizes, dense);
    for (uint64_t i = 0; i < elements; i++) {
        memcpy(memory + offset_of(tensor->ndim, sizes, strides, i), dense + i * tensor->item_bytes,
               tensor->item_bytes);
    }
    dcp_free(dense);
    world->memory[item] = memory;
    world->sources[item].data = elements > 0 ? memory : NULL;
    world->sources[item].strides_bytes = plain && maker_below(&world->rng, 2) == 0 ? NULL : strides;
}

static uint8_t *
make_record(struct world *world, size_t pickle_bytes, uint64_t *ret_slot)
{
    struct dcp_error err = {0};
    struct dcp_buf zip = {0}, padded = {0};
    uint8_t *pickle = dcp_malloc(pickle_bytes + 8);
    fill_noise(&world->rng, pickle, pickle_bytes);
    must(dcp_record_put_object(&zip, pickle, pickle_bytes, &err) == 0, err.message);
    uint64_t slot = dcp_record_slot_bytes(zip.len);
    must(dcp_record_put_padded(&padded, zip.data, zip.len, slot, &err) == 0, err.message);
    dcp_free(pickle);
    dcp_buf_clean_up(&zip);
    *ret_slot = slot;
    return padded.data;
}

/* Takes the record. */
static void
add_ready(struct world *world, uint8_t *record, uint64_t len)
{
    char fqn[32];
    snprintf(fqn, sizeof fqn, "object.%u", world->plan.items_count);
    maker_object(&world->plan, fqn, len);
    grow_items(world);
    uint32_t item = world->plan.items_count - 1;
    world->records[item] = record;
    world->sources[item].data = record;
}

void
world_add_object(struct world *world, size_t pickle_bytes)
{
    uint64_t slot;
    uint8_t *record = make_record(world, pickle_bytes, &slot);
    add_ready(world, record, slot);
}

void
world_add_bytes(struct world *world, size_t len)
{
    uint8_t *bytes = dcp_malloc(len + 8);
    fill_noise(&world->rng, bytes, len);
    add_ready(world, bytes, len);
}

uint32_t
world_add_tensor(struct world *world, int dtype, uint32_t ndim, const uint64_t *size,
                 const uint64_t *parts)
{
    must(world->tensors_count < WORLD_TENSORS, "too many tensors");
    uint32_t index = world->tensors_count++;
    struct world_tensor *tensor = &world->tensors[index];
    *tensor = (struct world_tensor){.ndim = ndim, .item_bytes = dcp_dtype_bytes(dtype)};
    tensor->bytes = tensor->item_bytes;
    uint64_t chunks = 1;
    for (uint32_t d = 0; d < ndim; d++) {
        tensor->size[d] = size[d];
        tensor->bytes *= size[d];
        chunks *= parts[d];
    }
    tensor->image = dcp_malloc(tensor->bytes + 8);
    fill_noise(&world->rng, tensor->image, tensor->bytes);
    char fqn[32];
    snprintf(fqn, sizeof fqn, "tensor.%u", index);
    for (uint64_t c = 0; c < chunks; c++) {
        uint64_t offsets[DCP_MAX_DIMS], sizes[DCP_MAX_DIMS], rest = c;
        for (uint32_t d = ndim; d > 0; d--) {
            uint64_t part = rest % parts[d - 1];
            rest /= parts[d - 1];
            offsets[d - 1] = size[d - 1] * part / parts[d - 1];
            sizes[d - 1] = size[d - 1] * (part + 1) / parts[d - 1] - offsets[d - 1];
        }
        if (chunks == 1) {
            maker_tensor(&world->plan, fqn, dtype, ndim, size);
        } else {
            maker_shard(&world->plan, fqn, dtype, ndim, size, offsets, sizes);
        }
        grow_items(world);
        world->item_tensor[world->plan.items_count - 1] = index;
        place_source(world, tensor, offsets, sizes);
    }
    return index;
}

/* Makes the last tensor one that only torch.save could write. */
static void
make_opaque(struct world *world)
{
    uint32_t item = world->plan.items_count - 1;
    must(world->plan.items[item].kind == DCP_ITEM_TENSOR, "only whole tensors are opaque here");
    uint64_t slot;
    uint8_t *record = make_record(world, 700, &slot);
    world->plan.items[item].slot_bytes = slot;
    world->records[item] = record;
    world->sources[item].data = record;
    world->tensors[world->tensors_count - 1].opaque = true;
}

/* ---- metadata ---- */

static void
copy_dims(struct dcp_metadata *md, const uint64_t *numbers, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++) {
        md->dims[md->dims_count++] = numbers[i];
    }
}

static void
make_metadata(struct world *world)
{
    struct dcp_metadata *md = &world->md;
    const struct dcp_plan *plan = &world->plan;
    struct dcp_buf strings = {0};
    uint32_t n = plan->items_count;
    *md = (struct dcp_metadata){.is_native = true, .save_id = world->save_id};
    md->entries = dcp_calloc(plan->names_count, sizeof *md->entries);
    md->chunks = dcp_calloc(n, sizeof *md->chunks);
    md->dims = dcp_calloc(plan->dims_count + 64, sizeof *md->dims);
    md->files = dcp_calloc(world->layout.files_count, sizeof *md->files);
    md->files_count = world->layout.files_count;
    md->entries_count = plan->names_count;
    md->chunks_count = n;
    for (uint32_t f = 0; f < md->files_count; f++) {
        char name[64];
        world_file_name(world, f, name, sizeof name);
        md->files[f].name = strings.len;
        md->files[f].name_len = (uint32_t)strlen(name);
        dcp_buf_put(&strings, name, strlen(name));
    }
    for (uint32_t i = 0; i < n; i++) {
        const struct dcp_item *item = &plan->items[i];
        struct dcp_md_entry *entry = &md->entries[item->name];
        struct dcp_md_chunk *chunk = &md->chunks[i];
        if (entry->chunks_count++ == 0) {
            const struct dcp_name *name = &plan->names[item->name];
            entry->name = strings.len;
            entry->name_len = name->fqn_len;
            dcp_buf_put(&strings, name->fqn, name->fqn_len);
            entry->kind = item->kind == DCP_ITEM_BYTES ? DCP_ITEM_BYTES : DCP_ITEM_TENSOR;
            entry->dtype = item->dtype;
            entry->ndim = item->ndim;
            entry->first_chunk = i;
            entry->size = md->dims_count;
            copy_dims(md, dcp_item_global_size(plan, item), item->ndim);
        }
        chunk->dims = md->dims_count;
        copy_dims(md, dcp_item_offsets(plan, item), 2 * (uint32_t)item->ndim);
    }
    for (uint32_t r = 0; r < world->layout.records_count; r++) {
        const struct dcp_placed_record *record = &world->layout.records[r];
        struct dcp_md_chunk *chunk = &md->chunks[record->item];
        chunk->offset_bytes = record->offset_bytes;
        chunk->length_bytes = record->length_bytes;
        chunk->file = record->file;
    }
    md->strings = (char *)strings.data;
    md->strings_len = strings.len;
}

void
world_finish(struct world *world, uint32_t thread_count, bool file_per_item)
{
    struct dcp_error err = {0};
    world->plan.thread_count = thread_count;
    world->plan.single_file_per_rank = !file_per_item;
    for (uint32_t i = 0; i < world->plan.items_count; i++) { /* the array has stopped moving */
        world->sources[i].strides_bytes =
            world->sources[i].strides_bytes != NULL ? world->strides[i] : NULL;
    }
    must(dcp_layout_build(&world->plan, NULL, &world->layout, &err) == 0, err.message);
    make_metadata(world);
}

void
world_make(struct world *world, const struct world_options *options)
{
    static const int dtypes[] = {DCP_DTYPE_UINT8, DCP_DTYPE_BFLOAT16, DCP_DTYPE_FLOAT32,
                                 DCP_DTYPE_INT64, DCP_DTYPE_COMPLEX128};
    memset(world, 0, sizeof *world);
    world->rng.state = options->seed;
    world->plan.content_hash = options->content_hash;
    world->plan.rank = (uint32_t)maker_below(&world->rng, 1000);
    world->n0 = maker_below(&world->rng, 100);
    fill_noise(&world->rng, world->save_id.bytes, sizeof world->save_id.bytes);
    for (uint32_t i = 0; i < options->objects; i++) {
        world_add_object(world, (size_t)maker_below(&world->rng, 3000));
    }
    for (uint32_t i = 0; i < options->tensors; i++) {
        uint64_t size[4], parts[4];
        uint32_t ndim = (uint32_t)maker_below(&world->rng, 5);
        for (uint32_t d = 0; d < ndim; d++) {
            size[d] = maker_below(&world->rng, 20) == 0 ? 0 : 1 + maker_below(&world->rng, 14);
            parts[d] = 1 + maker_below(&world->rng, 3);
            parts[d] = parts[d] > size[d] ? 1 : parts[d];
        }
        world_add_tensor(world, dtypes[maker_below(&world->rng, 5)], ndim, size, parts);
        if (world->plan.items[world->plan.items_count - 1].kind == DCP_ITEM_TENSOR &&
            maker_below(&world->rng, 6) == 0) {
            make_opaque(world);
        }
    }
    if (options->large_bytes > 0) {
        uint64_t rows = 600 + maker_below(&world->rng, 100);
        uint64_t size[] = {rows, options->large_bytes / rows / 2};
        uint64_t parts[] = {1 + maker_below(&world->rng, 2), 1};
        world_add_tensor(world, DCP_DTYPE_BFLOAT16, 2, size, parts);
    }
    world_finish(world, options->thread_count, options->file_per_item);
}

void
world_clean_up(struct world *world)
{
    for (uint32_t i = 0; i < world->plan.items_count; i++) {
        dcp_free(world->memory[i]);
        dcp_free(world->records[i]);
    }
    for (uint32_t i = 0; i < world->tensors_count; i++) {
        dcp_free(world->tensors[i].image);
    }
    dcp_free(world->sources);
    dcp_free(world->memory);
    dcp_free(world->strides);
    dcp_free(world->records);
    dcp_free(world->item_tensor);
    dcp_free(world->md.strings);
    dcp_free(world->md.entries);
    dcp_free(world->md.chunks);
    dcp_free(world->md.dims);
    dcp_free(world->md.files);
    dcp_layout_clean_up(&world->layout);
    dcp_plan_clean_up(&world->plan);
    memset(world, 0, sizeof *world);
}

/* ---- what files must hold ---- */

void
world_file_name(const struct world *world, uint32_t index, char *name, size_t cap)
{
    snprintf(name, cap, "__%u_%llu.distcp", world->plan.rank,
             (unsigned long long)(world->n0 + index));
}

static void
pad_to(struct dcp_buf *buf, size_t base, uint64_t position)
{
    while (buf->len - base < position) {
        dcp_buf_put_u8(buf, 0);
    }
}

/* What a block table says of a payload; the caller owns its block checksums. */
static struct dcp_block_entry
list_payload(const struct dcp_placed_record *record, const uint8_t *payload, uint32_t **ret_crcs)
{
    uint64_t blocks = (record->payload_bytes + DCP_BLOCK_BYTES - 1) / DCP_BLOCK_BYTES;
    uint32_t *crcs = dcp_malloc_array(blocks + 1, sizeof *crcs);
    for (uint64_t b = 0; b < blocks; b++) {
        uint64_t from = b * DCP_BLOCK_BYTES;
        crcs[b] =
            world_crc32(payload + from, dcp_min_u64(DCP_BLOCK_BYTES, record->payload_bytes - from));
    }
    *ret_crcs = crcs;
    return (struct dcp_block_entry){record->payload_offset_bytes, record->payload_bytes,
                                    world_crc32(payload, record->payload_bytes), crcs};
}

/* Appends a record of raw elements; keeps block checksums for the table in *ret_crcs (caller's) and
 * the hash of the payload. */
static void
put_raw(const struct world *world, const struct dcp_placed_record *record, struct dcp_buf *buf,
        struct dcp_block_entry *ret_entry, uint32_t **ret_crcs, struct dcp_hash128 *ret_hash)
{
    const struct dcp_item *item = &world->plan.items[record->item];
    const struct world_tensor *tensor = &world->tensors[world->item_tensor[record->item]];
    struct dcp_tensor_shape shape = {.dtype = item->dtype,
                                     .ndim = item->ndim,
                                     .sizes = dcp_item_sizes(&world->plan, item),
                                     .payload_bytes = record->payload_bytes};
    uint8_t *payload = dcp_malloc(record->payload_bytes + 1);
    world_cut(tensor, dcp_item_offsets(&world->plan, item), shape.sizes, payload);
    *ret_entry = list_payload(record, payload, ret_crcs);
    dcp_record_put_head(buf, record->payload_bytes);
    dcp_buf_put(buf, payload, record->payload_bytes);
    dcp_record_put_tail(buf, &shape, ret_entry->payload_crc, *ret_crcs);
    *ret_hash = dcp_content_hash_of(payload, record->payload_bytes);
    dcp_free(payload);
}

void
world_file_image(const struct world *world, uint32_t index, struct dcp_buf *buf)
{
    const struct dcp_placed_file *file = &world->layout.files[index];
    struct dcp_file_header header = {.save_id = world->save_id,
                                     .rank = world->plan.rank,
                                     .n = (uint32_t)(world->n0 + file->index),
                                     .length_bytes = file->length_bytes,
                                     .table_offset_bytes = file->table_offset_bytes,
                                     .table_bytes = file->table_bytes,
                                     .planned_outside = world->plan.planned_outside,
                                     .hash_offset_bytes = file->hash_offset_bytes,
                                     .hash_bytes = file->hash_bytes};
    size_t base = buf->len;
    uint32_t entries_count = 0;
    struct dcp_block_entry *entries = dcp_malloc_array(file->records_count + 1, sizeof *entries);
    struct dcp_hash_entry *hashes = dcp_calloc(file->records_count + 1, sizeof *hashes);
    uint32_t **crcs = dcp_calloc(file->records_count + 1, sizeof *crcs);
    dcp_file_put_header(buf, &header);
    for (uint32_t i = 0; i < file->records_count; i++) {
        const struct dcp_placed_record *record = &world->layout.records[file->first_record + i];
        pad_to(buf, base, record->offset_bytes);
        hashes[i].record_offset_bytes = record->offset_bytes;
        hashes[i].record_bytes = record->length_bytes;
        if (world->records[record->item] != NULL) {
            dcp_buf_put(buf, world->records[record->item], record->length_bytes);
            hashes[i].hash =
                dcp_content_hash_of(world->records[record->item], record->length_bytes);
            if (world->plan.planned_outside) {
                entries[entries_count++] =
                    list_payload(record, world->records[record->item], &crcs[i]);
            }
            continue;
        }
        put_raw(world, record, buf, &entries[entries_count], &crcs[i], &hashes[i].hash);
        entries_count += record->payload_bytes > DCP_BLOCK_BYTES ? 1 : 0;
    }
    pad_to(buf, base, file->table_offset_bytes);
    if (entries_count > 0) {
        dcp_block_table_put(buf, &world->save_id, entries, entries_count);
    }
    if (file->hash_bytes > 0) {
        pad_to(buf, base, file->hash_offset_bytes);
        dcp_hash_table_put(buf, &world->save_id, hashes, file->records_count);
    }
    must(!buf->failed && buf->len - base == file->length_bytes, "the image has another length");
    for (uint32_t i = 0; i < file->records_count; i++) {
        dcp_free(crcs[i]);
    }
    dcp_free(crcs);
    dcp_free(hashes);
    dcp_free(entries);
}

/* ---- the writer ---- */

int
world_write(const struct dcp_io *io, int dirfd, const struct world *world,
            const struct dcp_engine_options *options, uint32_t *crcs, struct dcp_write_stats *stats,
            struct dcp_error *err)
{
    return dcp_writer_run(io, dirfd, "dir", &world->plan, &world->layout, world->sources,
                          &world->save_id, world->n0, options, crcs, stats, err);
}

bool
world_check_files(const struct dcp_io *io, int dirfd, const struct world *world)
{
    bool all_good = true;

    for (uint32_t f = 0; f < world->layout.files_count; f++) {
        struct dcp_buf want = {0}, got = {0};
        struct dcp_error err = {0};
        char name[64];
        world_file_name(world, f, name, sizeof name);
        world_file_image(world, f, &want);
        bool good = dcp_io_read_file(io, dirfd, name, 1u << 30, &got, &err) == 0 &&
                    got.len == want.len && memcmp(got.data, want.data, want.len) == 0 &&
                    io->unlink_at(io->ctx, dirfd, name) == 0;
        if (!good) {
            fprintf(stderr, "engine_world: %s has %zu bytes, wanted %zu of its image; %s\n", name,
                    got.len, want.len, err.message);
        }
        all_good = all_good && good;
        dcp_buf_clean_up(&want);
        dcp_buf_clean_up(&got);
    }
    return all_good;
}
