// Rounds into a snapshot's memory file, and such a file back into memory.
#include <fcntl.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include "bits.h"
#include "hash.h"
#include "internal.h"

// Where gfn, which is RAM, lies in the file.
static uint64_t file_offset(const struct kmig_memory *memory, uint64_t gfn)
{
    uint64_t pages_before = 0;

    for (uint32_t i = 0; i < memory->nr_slots; i++) {
        const struct kmig_slot *slot = &memory->slot[i];
        if (gfn >= slot->base_gfn && gfn - slot->base_gfn < slot->nr_pages)
            return (pages_before + gfn - slot->base_gfn) * KMIG_PAGE_BYTES;
        pages_before += slot->nr_pages;
    }
    return pages_before * KMIG_PAGE_BYTES;
}

static int write_all(int fd, const uint8_t *data, uint64_t size_bytes, uint64_t offset)
{
    while (size_bytes) {
        ssize_t put = pwrite(fd, data, size_bytes, (off_t)offset);
        if (put < 0 && errno != EINTR)
            return -errno;
        if (put > 0) {
            data += put;
            size_bytes -= (uint64_t)put;
            offset += (uint64_t)put;
        }
    }
    return 0;
}

static int write_zeros(int fd, uint64_t size_bytes, uint64_t offset)
{
    static const uint8_t zeros[KMIG_PAGE_BYTES];
    int rc = 0;

    if (fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)size_bytes) == 0)
        return 0;
    if (errno != EOPNOTSUPP && errno != ENOSYS)
        return -errno;
    for (uint64_t done = 0; done < size_bytes && !rc; done += KMIG_PAGE_BYTES)
        rc = write_all(fd, zeros, KMIG_PAGE_BYTES, offset + done);
    return rc;
}

static int save_chunk(const struct kmig_memory *memory, struct kmig_round *round, const struct kmig_chunk *chunk, int fd)
{
    uint64_t data_bytes = (uint64_t)chunk->nr_data_pages * KMIG_PAGE_BYTES;
    int rc = kmig_round_pace(round, data_bytes);
    uint64_t began_ns = kmig_now_ns();

    for (uint32_t i = 0; i < chunk->nr_runs && !rc; i++) {
        const struct kmig_page_run *run = &chunk->run[i];
        uint64_t size_bytes = (uint64_t)run->nr_pages * KMIG_PAGE_BYTES;
        uint64_t offset = file_offset(memory, run->gfn);
        rc = run->kind == KMIG_RUN_DATA ? write_all(fd, chunk->hva[i], size_bytes, offset)
                                        : write_zeros(fd, size_bytes, offset);
    }
    kmig_count(&round->busy_ns, kmig_now_ns() - began_ns);
    if (!rc)
        kmig_count(&round->bytes_sent, data_bytes);
    return rc;
}

int kmig_file_save_round(struct kmig_memory *memory, struct kmig_round *round, int fd)
{
    struct kmig_chunk chunk;
    int rc;

    kmig_round_begin(memory, round);
    while ((rc = kmig_round_next(memory, round, &chunk, NULL)) > 0) {
        rc = kmig_aborted(round->abort_fd) ? -ECANCELED : save_chunk(memory, round, &chunk, fd);
        if (rc < 0) {
            kmig_round_put_back(memory, round, &chunk);
            break;
        }
    }
    return rc;
}

// Read the pages first..end of a slot, which lie in the file from offset on. -ENODATA: the file ends before.
static int load_pages(struct kmig_memory *memory, struct kmig_slot *slot, uint64_t first, uint64_t end, int fd,
                      uint64_t offset)
{
    uint8_t *at = slot->hva + first * KMIG_PAGE_BYTES;
    uint64_t left = (end - first) * KMIG_PAGE_BYTES;

    while (left) {
        ssize_t got = pread(fd, at, left, (off_t)offset);
        if (got == 0)
            return -ENODATA;
        if (got < 0 && errno != EINTR)
            return -errno;
        if (got > 0) {
            at += got;
            left -= (uint64_t)got;
            offset += (uint64_t)got;
        }
    }
    for (uint64_t page = first; page < end; page++)
        kmig_hash_set(memory, slot, page, kmig_page_hash(slot->hva + page * KMIG_PAGE_BYTES));
    return 0;
}

int kmig_file_load_range(struct kmig_memory *memory, uint64_t gfn, uint64_t nr_pages, int fd, uint64_t offset)
{
    struct kmig_slot *slot = kmig_memory_slot(memory, gfn);
    int rc = 0;

    if (!slot || nr_pages > slot->nr_pages - (gfn - slot->base_gfn))
        return -EFAULT;
    uint64_t end = gfn - slot->base_gfn + nr_pages;
    // Piece by piece: what has just been read is hashed while it is in the processor's cache.
    for (uint64_t at = gfn - slot->base_gfn, next; at < end && !rc; at = next) {
        next = end - at < KMIG_CHUNK_PAGES ? end : at + KMIG_CHUNK_PAGES;
        rc = load_pages(memory, slot, at, next, fd, offset);
        offset += (next - at) * KMIG_PAGE_BYTES;
    }
    return rc;
}

// The file's bitmap runs on over the slots, whose bits need not begin at a word.
static int load_slot(struct kmig_memory *memory, struct kmig_slot *slot, int fd, const uint64_t *bitmap,
                     uint64_t pages_before)
{
    uint64_t file_end = pages_before + slot->nr_pages;
    int rc = 0;

    for (uint64_t at = kmig_bits_next(bitmap, pages_before, file_end); at < file_end && !rc;) {
        uint64_t end = kmig_bits_next_unset(bitmap, at, file_end);
        if (end - at > KMIG_CHUNK_PAGES)
            end = at + KMIG_CHUNK_PAGES;
        rc = load_pages(memory, slot, at - pages_before, end - pages_before, fd, at * KMIG_PAGE_BYTES);
        at = kmig_bits_next(bitmap, end, file_end);
    }
    return rc;
}

int kmig_file_load(struct kmig_memory *memory, int fd, const uint64_t *bitmap)
{
    uint64_t pages_before = 0;
    int rc = 0;

    for (uint32_t i = 0; i < memory->nr_slots && !rc; i++) {
        rc = load_slot(memory, &memory->slot[i], fd, bitmap, pages_before);
        pages_before += memory->slot[i].nr_pages;
    }
    return rc;
}

int kmig_file_chunk_hashes(const struct kmig_memory *memory, uint32_t slot_index, uint64_t *ret)
{
    if (slot_index >= memory->nr_slots)
        return -EINVAL;
    const struct kmig_slot *slot = &memory->slot[slot_index];
    for (uint64_t first = 0; first < slot->nr_pages; first += 64) {
        uint64_t hashes[64] = {0};
        uint64_t nr = slot->nr_pages - first < 64 ? slot->nr_pages - first : 64;
        uint64_t any = 0;
        for (uint64_t i = 0; i < nr; i++)
            any |= hashes[i] = slot->hash[first + i];
        ret[first / 64] = any ? kmig_hash(hashes, sizeof(hashes)) : 0;
    }
    return 0;
}
