/*
 * io_memory_state.c: files, names, fsync and the power cut of the file system in memory.
 */
#include "io_memory_private.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

static void *
must(void *block)
{
    if (block == NULL) {
        abort();
    }
    return block;
}

uint64_t
io_mix(uint64_t hash, uint64_t value)
{
    hash = (hash ^ value) * 0x9E3779B97F4A7C15u;
    return hash ^ (hash >> 29);
}

uint64_t
io_random(struct io_memory *fs)
{
    fs->random += 0x9E3779B97F4A7C15u;
    return io_mix(io_mix(fs->random, fs->random >> 31), 0x94D049BB133111EBu);
}

uint64_t
io_hash_bytes(const void *data, size_t len)
{
    const uint8_t *at = data;
    uint64_t hash = len + 1, word;

    for (; len >= sizeof word; len -= sizeof word, at += sizeof word) {
        memcpy(&word, at, sizeof word);
        hash = io_mix(hash, word);
    }
    word = 0;
    if (len > 0) {
        memcpy(&word, at, len);
    }
    return io_mix(hash, word);
}

/* ---- files ---- */

struct io_inode *
io_inode_new(struct io_memory *fs, uint64_t label)
{
    struct io_inode *inode = must(calloc(1, sizeof *inode));

    inode->mode = 0644;
    inode->label = label;
    inode->next = fs->inodes;
    fs->inodes = inode;
    return inode;
}

void
io_inode_reserve(struct io_inode *inode, size_t len)
{
    size_t cap = inode->cap == 0 ? IO_MEMORY_BLOCK_BYTES : inode->cap;
    size_t old_blocks = inode->cap / IO_MEMORY_BLOCK_BYTES;

    if (len <= inode->cap) {
        return;
    }
    while (cap < len) {
        cap *= 2;
    }
    inode->data = must(realloc(inode->data, cap));
    inode->durable = must(realloc(inode->durable, cap));
    inode->dirty = must(realloc(inode->dirty, cap / IO_MEMORY_BLOCK_BYTES));
    memset(inode->data + inode->cap, 0, cap - inode->cap);
    memset(inode->durable + inode->cap, 0, cap - inode->cap);
    memset(inode->dirty + old_blocks, 0, cap / IO_MEMORY_BLOCK_BYTES - old_blocks);
    inode->cap = cap;
}

void
io_inode_touch(struct io_inode *inode, size_t offset, size_t len)
{
    inode->hash = 0;
    if (len > 0) {
        size_t first = offset / IO_MEMORY_BLOCK_BYTES;
        size_t last = (offset + len - 1) / IO_MEMORY_BLOCK_BYTES;
        memset(inode->dirty + first, 1, last - first + 1);
    }
}

/* A failed fsync forgets what was dirty: some of it reached the disk, and a second fsync says yes.
 * */
void
io_inode_sync(struct io_memory *fs, struct io_inode *inode, bool fails)
{
    for (size_t block = 0; block < inode->cap / IO_MEMORY_BLOCK_BYTES; block++) {
        size_t at = block * IO_MEMORY_BLOCK_BYTES;
        if (inode->dirty[block] && (!fails || io_random(fs) % 2 == 0)) {
            memcpy(inode->durable + at, inode->data + at, IO_MEMORY_BLOCK_BYTES);
        }
        inode->dirty[block] = 0;
    }
    if (!fails || io_random(fs) % 2 == 0) {
        inode->durable_len = inode->len;
    }
}

uint64_t
io_inode_hash(struct io_inode *inode)
{
    if (inode->hash == 0) {
        inode->hash = io_hash_bytes(inode->data, inode->len) | 1;
    }
    return inode->hash;
}

/* What a power cut leaves of a file: each unsynced block, and the length, for itself. */
static void
inode_cut_power(struct io_memory *fs, struct io_inode *inode)
{
    size_t longest = inode->len > inode->durable_len ? inode->len : inode->durable_len;

    switch (io_random(fs) % 3) {
    case 0:
        inode->len = inode->durable_len;
        break;
    case 1:
        inode->len = longest == 0 ? 0 : (size_t)(io_random(fs) % (longest + 1));
        if (inode->len < inode->durable_len && inode->durable_len <= longest) {
            inode->len = inode->durable_len;
        }
        break;
    default:
        break;
    }
    for (size_t block = 0; block < inode->cap / IO_MEMORY_BLOCK_BYTES; block++) {
        size_t at = block * IO_MEMORY_BLOCK_BYTES;
        if (inode->dirty[block] && io_random(fs) % 2 == 0) {
            memcpy(inode->data + at, inode->durable + at, IO_MEMORY_BLOCK_BYTES);
        }
        inode->dirty[block] = 0;
    }
    if (inode->cap > inode->len) {
        memset(inode->data + inode->len, 0, inode->cap - inode->len);
    }
    if (inode->cap > 0) {
        memcpy(inode->durable, inode->data, inode->cap);
    }
    inode->durable_len = inode->len;
    inode->hash = 0;
}

/* ---- names ---- */

static size_t
entries_place(const struct io_entries *entries, const char *name)
{
    size_t i = 0;

    while (i < entries->count && strcmp(entries->items[i].name, name) < 0) {
        i++;
    }
    return i;
}

struct io_entry *
io_entries_find(const struct io_entries *entries, const char *name)
{
    size_t i = entries_place(entries, name);

    return i < entries->count && strcmp(entries->items[i].name, name) == 0 ? &entries->items[i]
                                                                           : NULL;
}

static void
entries_remove(struct io_entries *entries, const char *name)
{
    struct io_entry *entry = io_entries_find(entries, name);

    if (entry != NULL) {
        size_t i = (size_t)(entry - entries->items);
        memmove(entry, entry + 1, (entries->count - i - 1) * sizeof *entry);
        entries->count--;
    }
}

static void
entries_put(struct io_entries *entries, const char *name, struct io_inode *inode)
{
    struct io_entry *entry = io_entries_find(entries, name);

    if (entry == NULL) {
        size_t i = entries_place(entries, name);
        if (entries->count == entries->cap) {
            entries->cap = entries->cap == 0 ? 16 : 2 * entries->cap;
            entries->items = must(realloc(entries->items, entries->cap * sizeof *entry));
        }
        entry = &entries->items[i];
        memmove(entry + 1, entry, (entries->count - i) * sizeof *entry);
        entries->count++;
        strcpy(entry->name, name);
    }
    entry->inode = inode;
}

static void
entries_copy(struct io_entries *to, const struct io_entries *from)
{
    if (to->cap < from->count) {
        to->cap = from->count;
        to->items = must(realloc(to->items, to->cap * sizeof *to->items));
    }
    if (from->count > 0) {
        memcpy(to->items, from->items, from->count * sizeof *to->items);
    }
    to->count = from->count;
}

static void
entries_apply(struct io_entries *entries, const struct io_change *change)
{
    struct io_entry *from = io_entries_find(entries, change->from);

    if (change->from[0] != '\0' && from != NULL && from->inode == change->inode) {
        entries_remove(entries, change->from);
    }
    if (change->to[0] != '\0') {
        entries_put(entries, change->to, change->inode);
    }
}

struct io_dir *
io_dir_find(const struct io_memory *fs, const char *path)
{
    for (size_t i = 0; i < IO_MEMORY_DIRS; i++) {
        if (fs->dirs[i].used && !fs->dirs[i].removed && strcmp(fs->dirs[i].path, path) == 0) {
            return (struct io_dir *)&fs->dirs[i];
        }
    }
    return NULL;
}

static void
keep_version(const struct io_memory *fs, struct io_dir *dir)
{
    if (!fs->faults.stale_lists) {
        return;
    }
    if (dir->version >= dir->history_cap) {
        size_t cap = (size_t)dir->version + 16;
        dir->history = must(realloc(dir->history, cap * sizeof *dir->history));
        memset(dir->history + dir->history_cap, 0, (cap - dir->history_cap) * sizeof *dir->history);
        dir->history_cap = cap;
    }
    entries_copy(&dir->history[dir->version], &dir->entries);
}

const struct io_entries *
io_dir_version(const struct io_dir *dir, uint64_t version)
{
    return version >= dir->version || version >= dir->history_cap ||
                   dir->history[version].items == NULL
               ? &dir->entries
               : &dir->history[version];
}

void
io_dir_change(struct io_memory_process *process, struct io_dir *dir, const char *from,
              const char *to, struct io_inode *inode)
{
    struct io_entry *replaced = io_entries_find(&dir->entries, to);
    struct io_change *change;

    keep_version(process->fs, dir);
    if (dir->changes_count == dir->changes_cap) {
        dir->changes_cap = dir->changes_cap == 0 ? 16 : 2 * dir->changes_cap;
        dir->changes = must(realloc(dir->changes, dir->changes_cap * sizeof *dir->changes));
    }
    change = &dir->changes[dir->changes_count++];
    strcpy(change->from, from);
    strcpy(change->to, to);
    change->inode = inode;
    if (replaced != NULL) {
        replaced->inode->names--;
    }
    inode->names += to[0] != '\0';
    inode->names -= from[0] != '\0';
    entries_apply(&dir->entries, change);
    dir->version++;
    process->listed_version[dir - process->fs->dirs] = dir->version;
}

void
io_dir_sync(struct io_dir *dir)
{
    entries_copy(&dir->durable, &dir->entries);
    dir->changes_count = 0;
}

/* ---- the whole ---- */

void
io_memory_reboot(struct io_memory *fs, bool power_cut, uint64_t seed)
{
    fs->random = seed;
    for (size_t i = 0; power_cut && i < IO_MEMORY_DIRS; i++) {
        struct io_dir *dir = &fs->dirs[i];
        /* Mostly a random choice, sometimes nothing and sometimes everything. */
        uint64_t mode = io_random(fs) % 6;
        for (size_t k = 0; k < dir->changes_count; k++) {
            if (mode != 0 && (mode == 1 || io_random(fs) % 2 == 0)) {
                entries_apply(&dir->durable, &dir->changes[k]);
            }
        }
        entries_copy(&dir->entries, &dir->durable);
        dir->changes_count = 0;
        dir->version++;
    }
    for (struct io_inode *inode = fs->inodes; inode != NULL; inode = inode->next) {
        inode->opens = 0;
        if (power_cut) {
            inode_cut_power(fs, inode);
            inode->allocated = 0;
        }
        inode->names = 0;
    }
    for (size_t i = 0; i < IO_MEMORY_DIRS; i++) {
        for (size_t k = 0; k < fs->dirs[i].entries.count; k++) {
            fs->dirs[i].entries.items[k].inode->names++;
        }
    }
    fs->fds_count = 0;
    fs->crashed = false;
    fs->faults = (struct io_memory_faults){.space_bytes = UINT64_MAX, .crash_at = UINT64_MAX};
}

uint64_t
io_memory_state_hash(const struct io_memory *fs)
{
    uint64_t hash = 0;

    for (size_t i = 0; i < IO_MEMORY_DIRS; i++) {
        const struct io_dir *dir = &fs->dirs[i];
        hash = io_mix(hash, (uint64_t)dir->used << 1 | dir->removed);
        for (size_t k = 0; k < dir->entries.count; k++) {
            struct io_entry *entry = &dir->entries.items[k];
            hash = io_mix(hash, io_hash_bytes(entry->name, strlen(entry->name)));
            hash = io_mix(hash, entry->inode->label);
            hash = io_mix(hash, io_inode_hash(entry->inode));
        }
        for (size_t p = 0; fs->faults.stale_lists && p < IO_MEMORY_PROCESSES; p++) {
            const struct io_entries *old = io_dir_version(dir, fs->processes[p].listed_version[i]);
            for (size_t k = 0; k < old->count; k++) {
                hash = io_mix(hash, io_hash_bytes(old->items[k].name, strlen(old->items[k].name)));
            }
        }
    }
    return io_mix(hash, fs->faults.lost_replies);
}

uint64_t
io_memory_version(const struct io_memory *fs)
{
    uint64_t version = 0;

    for (size_t i = 0; i < IO_MEMORY_DIRS; i++) {
        version += fs->dirs[i].version;
    }
    return version;
}

bool
io_memory_dir_removed(const struct io_memory *fs, const char *path)
{
    return io_dir_find(fs, path) == NULL;
}

size_t
io_memory_names_count(const struct io_memory *fs, const char *path)
{
    const struct io_dir *dir = io_dir_find(fs, path);

    return dir == NULL ? 0 : dir->entries.count;
}

const char *
io_memory_name(const struct io_memory *fs, const char *path, size_t i)
{
    return io_dir_find(fs, path)->entries.items[i].name;
}

unsigned
io_memory_file_mode(const struct io_memory *fs, const char *path, const char *name)
{
    const struct io_dir *dir = io_dir_find(fs, path);
    const struct io_entry *entry = dir == NULL ? NULL : io_entries_find(&dir->entries, name);

    return entry == NULL ? 0 : entry->inode->mode;
}

const uint8_t *
io_memory_file(const struct io_memory *fs, const char *path, const char *name, size_t *ret_len)
{
    static const uint8_t empty[1];
    const struct io_dir *dir = io_dir_find(fs, path);
    const struct io_entry *entry = dir == NULL ? NULL : io_entries_find(&dir->entries, name);

    if (entry == NULL) {
        return NULL;
    }
    *ret_len = entry->inode->len;
    return entry->inode->data == NULL ? empty : entry->inode->data;
}

void
io_memory_put_file(struct io_memory *fs, const char *path, const char *name, const void *data,
                   size_t len)
{
    struct io_memory_process *process = io_memory_process(fs, IO_MEMORY_PROCESSES - 1);
    struct io_dir *dir = io_dir_find(fs, path);
    struct io_inode *inode = io_inode_new(fs, 0xF0000 + process->files_made++);

    io_inode_reserve(inode, len);
    if (len > 0) {
        memcpy(inode->data, data, len);
    }
    inode->len = len;
    io_inode_touch(inode, 0, len);
    io_inode_sync(fs, inode, false);
    io_dir_change(process, dir, "", name, inode);
    io_dir_sync(dir);
}

struct io_memory *
io_memory_new(uint64_t seed)
{
    struct io_memory *fs = must(calloc(1, sizeof *fs));

    pthread_mutex_init(&fs->mutex, NULL);
    fs->random = seed;
    fs->faults.space_bytes = UINT64_MAX;
    fs->faults.crash_at = UINT64_MAX;
    fs->dio = (struct dcp_dio_align){.mem_bytes = 512, .offset_bytes = 512};
    fs->now_ns = 1000000000;
    return fs;
}

void
io_memory_free(struct io_memory *fs)
{
    if (fs == NULL) {
        return;
    }
    while (fs->inodes != NULL) {
        struct io_inode *inode = fs->inodes;
        fs->inodes = inode->next;
        free(inode->data);
        free(inode->durable);
        free(inode->dirty);
        free(inode);
    }
    for (size_t i = 0; i < IO_MEMORY_DIRS; i++) {
        struct io_dir *dir = &fs->dirs[i];
        for (size_t k = 0; k < dir->history_cap; k++) {
            free(dir->history[k].items);
        }
        free(dir->history);
        free(dir->entries.items);
        free(dir->durable.items);
        free(dir->changes);
    }
    free(fs->fds);
    pthread_mutex_destroy(&fs->mutex);
    free(fs);
}
