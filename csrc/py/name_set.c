/*
 * name_set.c: a hash set of names: open addressing, at most half full, texts in one buffer.
 */
#include "name_set.h"

#include <string.h>

#include "dcp_hash.h"

struct name_slot {
    uint64_t offset; /* in text */
    uint32_t hash;   /* low bits of the name's */
    uint32_t len1;   /* length + 1; 0: the slot is free */
};

/* A hint may be wrong: more than this many slots are made only when names came. */
enum { NAME_SET_FIRST_SLOTS = 64, NAME_SET_MAX_EXPECTED = 1 << 20 };

static struct name_slot *
name_set_slot(const struct name_set *set, uint32_t hash, const char *name, size_t len)
{
    size_t mask = set->slots_count - 1;

    for (size_t i = hash & mask;; i = (i + 1) & mask) {
        struct name_slot *slot = &set->slots[i];

        if (slot->len1 == 0 ||
            (slot->hash == hash && slot->len1 == len + 1 &&
             (len == 0 || memcmp(set->text.data + slot->offset, name, len) == 0))) {
            return slot;
        }
    }
}

static int
name_set_resize(struct name_set *set, size_t count)
{
    struct name_slot *slots = dcp_calloc(count, sizeof(*slots));

    if (slots == NULL) {
        return -1;
    }
    for (size_t i = 0; i < set->slots_count; i++) {
        size_t at = set->slots[i].hash & (count - 1);

        if (set->slots[i].len1 == 0) {
            continue;
        }
        while (slots[at].len1 != 0) {
            at = (at + 1) & (count - 1);
        }
        slots[at] = set->slots[i];
    }
    dcp_free(set->slots);
    set->slots = slots;
    set->slots_count = count;
    return 0;
}

void
name_set_expect(struct name_set *set, size_t names_count)
{
    size_t count = NAME_SET_FIRST_SLOTS;

    while (count < 2 * names_count && count < NAME_SET_MAX_EXPECTED) {
        count *= 2;
    }
    if (set->slots_count == 0) {
        (void)name_set_resize(set, count);
    }
}

int
name_set_add(struct name_set *set, const char *name, size_t len)
{
    uint32_t hash = (uint32_t)dcp_hash64(name, len, 0);
    struct name_slot *slot;

    DCP_ASSERT(len < UINT32_MAX);
    if (set->names_count * 2 >= set->slots_count &&
        name_set_resize(set, dcp_max_u64(NAME_SET_FIRST_SLOTS, set->slots_count * 2)) != 0) {
        PyErr_NoMemory();
        return -1;
    }
    slot = name_set_slot(set, hash, name, len);
    if (slot->len1 != 0) {
        return 0;
    }
    slot->offset = set->text.len;
    dcp_buf_put(&set->text, name, len);
    if (set->text.failed) {
        PyErr_NoMemory();
        return -1;
    }
    slot->hash = hash;
    slot->len1 = (uint32_t)len + 1;
    set->names_count++;
    return 1;
}

bool
name_set_has(const struct name_set *set, const char *name, size_t len)
{
    return set->slots_count != 0 &&
           name_set_slot(set, (uint32_t)dcp_hash64(name, len, 0), name, len)->len1 != 0;
}

void
name_set_clean_up(struct name_set *set)
{
    dcp_buf_clean_up(&set->text);
    dcp_free(set->slots);
    memset(set, 0, sizeof(*set));
}
