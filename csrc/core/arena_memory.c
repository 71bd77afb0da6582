/*
 * arena_memory.c: how much memory this process may still take.
 *
 * Two sides can refuse memory, or kill for it: the machine, and every control group from that of
 * this process up to the root, each with a limit of its own over all that is below it.  Both are
 * read from /proc and from where the groups are mounted, version 1 and 2 alike: container hosts
 * have either, or both.  Page cache that nobody has used twice (inactive_file) is given back
 * before anybody is refused, so it counts as spare.
 *
 * What cannot be read or understood does not limit: the kernel's own refusal still does.
 * Threads: no state.
 */
#include "dcp_arena.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>

enum {
    NAME_BYTES = 128,
    /* Hosts of many containers have thousands of mounts, of 200 bytes each. */
    MOST_FILE_BYTES = 4 << 20,
    READ_STEP_BYTES = 16 << 10,
    MOST_PATH_BYTES = 4096,
    MOST_FILE_NAME_BYTES = 64,
};

/* A piece of text that somebody else owns. */
struct text {
    const char *at;
    size_t len;
};

struct least {
    uint64_t spare_bytes;
    char name[NAME_BYTES];
};

/* The files that tell about a group. */
struct version {
    bool is_v2;
    const char *limits[2]; /* or NULL */
    const char *usage;
    const char *reclaimable; /* its word in memory.stat */
};

static const struct version versions[] = {
    {true, {"memory.max", "memory.high"}, "memory.current", "inactive_file"},
    {false, {"memory.limit_in_bytes", NULL}, "memory.usage_in_bytes", "total_inactive_file"},
};

/* ---- text ---- */

static bool
text_is(struct text text, const char *word)
{
    return text.len == strlen(word) && memcmp(text.at, word, text.len) == 0;
}

/* Takes what is before `end`, or all that is left. */
static struct text
take_until(struct text *rest, char end)
{
    const char *found = rest->len == 0 ? NULL : memchr(rest->at, end, rest->len);
    struct text taken = {rest->at, found != NULL ? (size_t)(found - rest->at) : rest->len};
    size_t step = taken.len + (found != NULL ? 1 : 0);
    rest->at += step;
    rest->len -= step;
    return taken;
}

static struct text
take_word(struct text *rest)
{
    while (rest->len > 0 && (*rest->at == ' ' || *rest->at == '\t')) {
        rest->at++;
        rest->len--;
    }
    return take_until(rest, ' ');
}

/* A decimal number; one that is too large is UINT64_MAX. */
static bool
parse_u64(struct text text, uint64_t *ret)
{
    uint64_t value = 0;
    while (text.len > 0 && (text.at[text.len - 1] == '\n' || text.at[text.len - 1] == ' ')) {
        text.len--;
    }
    for (size_t i = 0; i < text.len; i++) {
        if (text.at[i] < '0' || text.at[i] > '9') {
            return false;
        }
        if (dcp_mul_overflows_u64(value, 10, &value) ||
            dcp_add_overflows_u64(value, (uint64_t)(text.at[i] - '0'), &value)) {
            *ret = UINT64_MAX;
            return true;
        }
    }
    *ret = value;
    return text.len > 0;
}

/* Whether `word` is one of a list with commas. */
static bool
list_has(struct text list, const char *word)
{
    while (list.len > 0) {
        if (text_is(take_until(&list, ','), word)) {
            return true;
        }
    }
    return false;
}

/* The number behind `word` at the start of a line. */
static bool
find_number(struct text lines, const char *word, uint64_t *ret)
{
    while (lines.len > 0) {
        struct text line = take_until(&lines, '\n');
        if (text_is(take_word(&line), word)) {
            return parse_u64(take_word(&line), ret);
        }
    }
    return false;
}

/* Octal escapes (of blanks, mostly) are undone.  False when it does not fit. */
static bool
unescape(struct text text, char *ret, size_t cap)
{
    size_t len = 0;
    for (size_t i = 0; i < text.len; i++) {
        char c = text.at[i];
        if (c == '\\' && text.len - i > 3) {
            const char *octal = text.at + i + 1;
            c = (char)((octal[0] - '0') * 64 + (octal[1] - '0') * 8 + (octal[2] - '0'));
            i += 3;
        }
        if (len + 1 >= cap) {
            return false;
        }
        ret[len++] = c;
    }
    ret[len] = '\0';
    return true;
}

/* ---- files ---- */

/* All of a file whose size is not known before it is read; empties `buf` first. */
static bool
read_all(const struct dcp_io *io, int dirfd, const char *name, struct dcp_buf *buf)
{
    ssize_t n;
    int fd;
    dcp_buf_clear(buf);
    do {
        fd = io->open_at(io->ctx, dirfd, name, O_RDONLY, 0);
    } while (fd == -EINTR);
    if (fd < 0) {
        return false;
    }
    do {
        uint8_t *at = dcp_buf_extend(buf, READ_STEP_BYTES);
        if (at == NULL || buf->len > MOST_FILE_BYTES) {
            n = -EFBIG;
            break;
        }
        buf->len -= READ_STEP_BYTES;
        do {
            n = io->pread(io->ctx, fd, at, READ_STEP_BYTES, buf->len);
        } while (n == -EINTR);
        buf->len += n > 0 ? (size_t)n : 0;
    } while (n > 0);
    io->close(io->ctx, fd);
    return n == 0;
}

static struct text
text_of(const struct dcp_buf *buf)
{
    return (struct text){(const char *)buf->data, buf->len};
}

/* ---- control groups ---- */

static void
take_least(struct least *least, uint64_t spare_bytes, const char *kind, const char *path)
{
    if (spare_bytes < least->spare_bytes) {
        least->spare_bytes = spare_bytes;
        snprintf(least->name, sizeof least->name, "%s%.100s", kind, path); /* cut when long */
    }
}

/* `dir` is of the group, below the mount: "" or "a/b/". */
static bool
read_number(const struct dcp_io *io, int mount, const char *dir, const char *file, const char *word,
            struct dcp_buf *buf, uint64_t *ret)
{
    char name[MOST_PATH_BYTES + MOST_FILE_NAME_BYTES];
    snprintf(name, sizeof name, "%s%s", dir, file);
    if (!read_all(io, mount, name, buf)) {
        return false;
    }
    return word != NULL ? find_number(text_of(buf), word, ret) : parse_u64(text_of(buf), ret);
}

/* One group: the lower of its limits less what it uses. */
static void
ask_group(const struct dcp_io *io, int mount, const struct version *version, const char *dir,
          const char *path, struct dcp_buf *buf, struct least *least)
{
    uint64_t limit = UINT64_MAX, usage = 0, reclaimable = 0;
    for (int i = 0; i < 2 && version->limits[i] != NULL; i++) {
        uint64_t value;
        if (read_number(io, mount, dir, version->limits[i], NULL, buf, &value)) {
            limit = dcp_min_u64(limit, value); /* "max" is no number */
        }
    }
    if (limit >= INT64_MAX / 2) {
        return; /* version 1 says "none" by a number near 2^63 */
    }
    if (!read_number(io, mount, dir, version->usage, NULL, buf, &usage)) {
        usage = 0;
    }
    if (!read_number(io, mount, dir, "memory.stat", version->reclaimable, buf, &reclaimable)) {
        reclaimable = 0;
    }
    usage -= dcp_min_u64(usage, reclaimable);
    take_least(least, limit - dcp_min_u64(limit, usage), "cgroup ", path);
}

/* The group `path` and all above it that the mount shows.  `root` is what the mount shows as its
 * top: of a container without a namespace of its own, the container's group. */
static void
ask_groups(const struct dcp_io *io, const char *mount_path, const struct version *version,
           const char *root, const char *path, struct dcp_buf *buf, struct least *least)
{
    char dir[MOST_PATH_BYTES], shown[MOST_PATH_BYTES];
    size_t root_len = strcmp(root, "/") == 0 ? 0 : strlen(root);
    bool below = strncmp(path, root, root_len) == 0 &&
                 (path[root_len] == '/' || path[root_len] == '\0') && strstr(path, "/..") == NULL;
    /* A group outside of what is mounted can't be looked at; what limits all of it may be. */
    snprintf(shown, sizeof shown, "%s", below ? path : root);
    int mount = io->open_dir(io->ctx, mount_path);
    if (mount < 0) {
        return;
    }
    for (;;) {
        size_t len = strlen(shown);
        const char *relative = len > root_len ? shown + root_len + 1 : "";
        snprintf(dir, sizeof dir, "%s%s", relative, *relative != '\0' ? "/" : "");
        ask_group(io, mount, version, dir, len == 0 ? "/" : shown, buf, least);
        char *slash = strrchr(shown, '/');
        if (len <= root_len || len <= 1 || slash == NULL) {
            break;
        }
        *slash = '\0';
    }
    io->close(io->ctx, mount);
}

/* The group of this process in a hierarchy; `groups` is /proc/self/cgroup. */
static bool
find_group(struct text groups, const struct version *version, char path[MOST_PATH_BYTES])
{
    while (groups.len > 0) {
        struct text line = take_until(&groups, '\n');
        struct text id = take_until(&line, ':'), controllers = take_until(&line, ':');
        bool is_it = version->is_v2 ? text_is(id, "0") && controllers.len == 0
                                    : list_has(controllers, "memory");
        if (is_it && line.len > 0 && line.len < MOST_PATH_BYTES) {
            memcpy(path, line.at, line.len);
            path[line.len] = '\0';
            return true;
        }
    }
    return false;
}

/* Where a line of mountinfo mounts the hierarchy, and what of it. */
static bool
parse_mount(struct text line, const struct version *version, char root[MOST_PATH_BYTES],
            char mount_path[MOST_PATH_BYTES])
{
    struct text root_text = {0}, path_text = {0};
    for (int i = 0; i < 5; i++) { /* id, parent, device, root, mount point */
        struct text word = take_word(&line);
        root_text = i == 3 ? word : root_text;
        path_text = i == 4 ? word : path_text;
    }
    while (line.len > 0 && !text_is(take_word(&line), "-")) {
        continue;
    }
    struct text type = take_word(&line), source = take_word(&line), options = take_word(&line);
    (void)source;
    bool is_it = version->is_v2 ? text_is(type, "cgroup2")
                                : text_is(type, "cgroup") && list_has(options, "memory");
    return is_it && unescape(root_text, root, MOST_PATH_BYTES) &&
           unescape(path_text, mount_path, MOST_PATH_BYTES);
}

/* The first mount of each version: others show the same groups. */
static void
ask_hierarchy(const struct dcp_io *io, int proc, const struct version *version, struct dcp_buf *buf,
              struct least *least)
{
    char path[MOST_PATH_BYTES], root[MOST_PATH_BYTES], mount_path[MOST_PATH_BYTES];
    if (!read_all(io, proc, "self/cgroup", buf) || !find_group(text_of(buf), version, path) ||
        !read_all(io, proc, "self/mountinfo", buf)) {
        return;
    }
    struct text lines = text_of(buf);
    while (lines.len > 0) {
        if (parse_mount(take_until(&lines, '\n'), version, root, mount_path)) {
            ask_groups(io, mount_path, version, root, path, buf, least);
            return;
        }
    }
}

uint64_t
dcp_memory_spare_bytes(const struct dcp_io *io, char ret_name[128])
{
    struct least least = {.spare_bytes = UINT64_MAX};
    struct dcp_buf buf = {0};
    uint64_t available_kib;
    int proc = io->open_dir(io->ctx, "/proc");
    if (proc >= 0) {
        if (read_all(io, proc, "meminfo", &buf) &&
            find_number(text_of(&buf), "MemAvailable:", &available_kib)) {
            take_least(&least, dcp_min_u64(available_kib, UINT64_MAX >> 10) << 10, "MemAvailable",
                       "");
        }
        for (size_t i = 0; i < sizeof versions / sizeof versions[0]; i++) {
            ask_hierarchy(io, proc, &versions[i], &buf, &least);
        }
        io->close(io->ctx, proc);
    }
    dcp_buf_clean_up(&buf);
    memcpy(ret_name, least.name, sizeof least.name);
    return least.spare_bytes;
}
