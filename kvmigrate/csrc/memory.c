// Guest RAM: reserve, map, read, write, empty.
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "hash.h"
#include "internal.h"

#define MAX_GFN (UINT64_C(1) << 40)

int kmig_memory_create(int backend, struct kmig_memory **ret)
{
    if (backend < KMIG_BACKEND_ANONYMOUS || backend > KMIG_BACKEND_HUGETLBFS)
        return -EINVAL;
    struct kmig_memory *memory = calloc(1, sizeof(*memory));
    if (!memory)
        return -ENOMEM;
    memory->backend = backend;
    memory->vm_fd = -1;
    int rc = kmig_cursor_create(&memory->cursor);
    if (rc == 0) {
        memory->pagemap_fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
        rc = memory->pagemap_fd < 0 ? -errno : 0;
    }
    if (rc < 0) {
        kmig_cursor_destroy(memory->cursor);
        free(memory);
        return rc;
    }
    *ret = memory;
    return 0;
}

static void unmap(void *at, uint64_t size_bytes)
{
    if (at)
        munmap(at, size_bytes);
}

static void slot_release(struct kmig_slot *slot)
{
    uint64_t bitmap_bytes = kmig_bits_words(slot->nr_pages) * 8;
    uint64_t window_bytes = kmig_bits_words(kmig_windows_of(slot->nr_pages)) * 8;

    unmap(slot->hva, slot->nr_pages * KMIG_PAGE_BYTES);
    if (slot->fd >= 0)
        close(slot->fd);
    unmap(slot->host_dirty, bitmap_bytes);
    unmap(slot->host_windows, window_bytes);
    unmap(slot->backed, bitmap_bytes);
    unmap(slot->pending, bitmap_bytes);
    unmap(slot->pending_windows, window_bytes);
    unmap(slot->empty_windows, window_bytes);
    unmap(slot->log, bitmap_bytes);
    unmap(slot->hash, slot->nr_pages * sizeof(*slot->hash));
}

void kmig_memory_destroy(struct kmig_memory *memory)
{
    if (!memory)
        return;
    for (uint32_t i = 0; i < memory->nr_slots; i++)
        slot_release(&memory->slot[i]);
    close(memory->pagemap_fd);
    kmig_cursor_destroy(memory->cursor);
    free(memory);
}

// Zeroed memory that costs nothing until it is touched.
static void *map_zeroed(uint64_t size_bytes)
{
    void *at = mmap(NULL, size_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return at == MAP_FAILED ? NULL : at;
}

static int check_new_slot(const struct kmig_memory *memory, uint32_t id, uint64_t base_gfn, uint64_t nr_pages)
{
    if (memory->vm_fd >= 0)
        return -EBUSY;
    if (memory->nr_slots == KMIG_MAX_SLOTS)
        return -ENOSPC;
    if (!nr_pages || base_gfn >= MAX_GFN || nr_pages > MAX_GFN - base_gfn)
        return -EINVAL;
    for (uint32_t i = 0; i < memory->nr_slots; i++)
        if (memory->slot[i].id == id || base_gfn < memory->slot[i].base_gfn + memory->slot[i].nr_pages)
            return -EEXIST;
    return 0;
}

int kmig_memory_add(struct kmig_memory *memory, uint32_t id, uint64_t base_gfn, uint64_t nr_pages)
{
    int rc = check_new_slot(memory, id, base_gfn, nr_pages);
    if (rc)
        return rc;
    uint64_t bitmap_bytes = kmig_bits_words(nr_pages) * 8;
    uint64_t window_bytes = kmig_bits_words(kmig_windows_of(nr_pages)) * 8;
    struct kmig_slot slot = {
        .id = id,
        .base_gfn = base_gfn,
        .nr_pages = nr_pages,
        .fd = -1,
        .host_dirty = map_zeroed(bitmap_bytes),
        .host_windows = map_zeroed(window_bytes),
        .backed = map_zeroed(bitmap_bytes),
        .pending = map_zeroed(bitmap_bytes),
        .pending_windows = map_zeroed(window_bytes),
        .empty_windows = map_zeroed(window_bytes),
        .log = map_zeroed(bitmap_bytes),
        .hash = map_zeroed(nr_pages * sizeof(*slot.hash)),
    };
    rc = kmig_backend_map(memory->backend, &slot);
    if (!rc && (!slot.host_dirty || !slot.host_windows || !slot.backed || !slot.pending || !slot.pending_windows ||
                !slot.empty_windows || !slot.log || !slot.hash))
        rc = -ENOMEM;
    if (rc) {
        slot_release(&slot);
        return rc;
    }
    memory->slot[memory->nr_slots++] = slot;
    return 0;
}

static int set_region(int vm_fd, const struct kmig_slot *slot, uint32_t flags)
{
    struct kvm_userspace_memory_region region = {
        .slot = slot->id,
        .flags = flags,
        .guest_phys_addr = slot->base_gfn * KMIG_PAGE_BYTES,
        .memory_size = slot->nr_pages * KMIG_PAGE_BYTES,
        .userspace_addr = (uintptr_t)slot->hva,
    };
    return kmig_ioctl(vm_fd, KVM_SET_USER_MEMORY_REGION, &region);
}

int kmig_memory_attach(struct kmig_memory *memory, int vm_fd)
{
    if (memory->vm_fd >= 0 || memory->log_mode != KMIG_LOG_OFF)
        return -EBUSY;
    for (uint32_t i = 0; i < memory->nr_slots; i++) {
        int rc = set_region(vm_fd, &memory->slot[i], 0);
        if (rc < 0)
            return rc;
    }
    memory->vm_fd = vm_fd;
    return 0;
}

int kmig_memory_log_slot(const struct kmig_memory *memory, uint32_t slot_index, bool on)
{
    return set_region(memory->vm_fd, &memory->slot[slot_index], on ? KVM_MEM_LOG_DIRTY_PAGES : 0);
}

struct kmig_slot *kmig_memory_slot(const struct kmig_memory *memory, uint64_t gfn)
{
    for (uint32_t i = 0; i < memory->nr_slots; i++) {
        const struct kmig_slot *slot = &memory->slot[i];
        if (gfn >= slot->base_gfn && gfn - slot->base_gfn < slot->nr_pages)
            return (struct kmig_slot *)slot;
    }
    return NULL;
}

// The slot that holds all of nr_pages from gfn on, with the first one's number in the slot.
static struct kmig_slot *slot_of_range(const struct kmig_memory *memory, uint64_t gfn, uint64_t nr_pages,
                                       uint64_t *ret_page)
{
    struct kmig_slot *slot = kmig_memory_slot(memory, gfn);
    if (!slot || nr_pages > slot->nr_pages - (gfn - slot->base_gfn))
        return NULL;
    *ret_page = gfn - slot->base_gfn;
    return slot;
}

int kmig_memory_map_file(struct kmig_memory *memory, uint64_t gfn, uint64_t nr_pages, int fd, uint64_t offset)
{
    uint64_t page, size_bytes;
    struct stat status;
    struct kmig_slot *slot = slot_of_range(memory, gfn, nr_pages, &page);

    if (!slot || !nr_pages)
        return -EFAULT;
    // Memory that is shared or huge would not be any more.
    if (slot->fd >= 0)
        return -EOPNOTSUPP;
    if (fstat(fd, &status) < 0)
        return -errno;
    size_bytes = nr_pages * KMIG_PAGE_BYTES;
    // A page mapped past the end of its file kills whoever touches it.
    if (offset % KMIG_PAGE_BYTES || offset > (uint64_t)status.st_size || size_bytes > (uint64_t)status.st_size - offset)
        return -EINVAL;
    void *at = mmap(slot->hva + page * KMIG_PAGE_BYTES, size_bytes, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE, fd, (off_t)offset);
    if (at == MAP_FAILED)
        return -errno;
    kmig_backend_keep_private(at, size_bytes);
    kmig_bits_set_range(slot->backed, page, page + nr_pages);
    return 0;
}

static bool range_is_ram(const struct kmig_memory *memory, uint64_t gpa, uint64_t size_bytes)
{
    while (size_bytes) {
        const struct kmig_slot *slot = kmig_memory_slot(memory, gpa / KMIG_PAGE_BYTES);
        if (!slot)
            return false;
        uint64_t left = (slot->base_gfn + slot->nr_pages) * KMIG_PAGE_BYTES - gpa;
        if (left >= size_bytes)
            return true;
        gpa += left;
        size_bytes -= left;
    }
    return true;
}

// The piece of gpa..gpa+size_bytes that lies in the first slot of the range, which is known to be RAM.
struct piece {
    struct kmig_slot *slot;
    uint64_t offset;
    uint64_t size_bytes;
};

static struct piece first_piece(const struct kmig_memory *memory, uint64_t gpa, uint64_t size_bytes)
{
    struct kmig_slot *slot = kmig_memory_slot(memory, gpa / KMIG_PAGE_BYTES);
    uint64_t offset = gpa - slot->base_gfn * KMIG_PAGE_BYTES;
    uint64_t left = slot->nr_pages * KMIG_PAGE_BYTES - offset;
    return (struct piece){slot, offset, left < size_bytes ? left : size_bytes};
}

int kmig_memory_read(struct kmig_memory *memory, uint64_t gpa, void *data, uint64_t size_bytes)
{
    uint8_t *to = data;

    if (!range_is_ram(memory, gpa, size_bytes))
        return -EFAULT;
    while (size_bytes) {
        struct piece piece = first_piece(memory, gpa, size_bytes);
        memcpy(to, piece.slot->hva + piece.offset, piece.size_bytes);
        to += piece.size_bytes;
        gpa += piece.size_bytes;
        size_bytes -= piece.size_bytes;
    }
    return 0;
}

int kmig_memory_write(struct kmig_memory *memory, uint64_t gpa, const void *data, uint64_t size_bytes)
{
    const uint8_t *from = data;

    if (!range_is_ram(memory, gpa, size_bytes))
        return -EFAULT;
    while (size_bytes) {
        struct piece piece = first_piece(memory, gpa, size_bytes);
        memcpy(piece.slot->hva + piece.offset, from, piece.size_bytes);
        kmig_host_wrote(piece.slot, piece.offset / KMIG_PAGE_BYTES,
                        (piece.offset + piece.size_bytes + KMIG_PAGE_BYTES - 1) / KMIG_PAGE_BYTES);
        from += piece.size_bytes;
        gpa += piece.size_bytes;
        size_bytes -= piece.size_bytes;
    }
    return 0;
}

int kmig_memory_prefault(struct kmig_memory *memory, uint64_t gfn, uint64_t nr_pages)
{
    uint64_t page;
    struct kmig_slot *slot = slot_of_range(memory, gfn, nr_pages, &page);

    if (!slot)
        return -EFAULT;
    if (madvise(slot->hva + page * KMIG_PAGE_BYTES, nr_pages * KMIG_PAGE_BYTES, MADV_POPULATE_WRITE) < 0)
        return -errno;
    return 0;
}

static int slot_clear(struct kmig_memory *memory, uint32_t slot_index)
{
    struct kmig_slot *slot = &memory->slot[slot_index];
    size_t nr_words = kmig_bits_words(slot->nr_pages);
    uint64_t *resident = calloc(nr_words, sizeof(*resident));

    if (!resident)
        return -ENOMEM;
    long rc = kmig_memory_resident(memory, slot_index, 0, slot->nr_pages, resident);
    if (rc >= 0)
        rc = kmig_backend_empty(memory, slot, 0, slot->nr_pages);
    // After they are empty: who copied them before copies them again, as zeros.
    for (size_t word = 0; rc >= 0 && word < nr_words; word++)
        if (resident[word])
            kmig_host_wrote_word(slot, word, resident[word]);
    free(resident);
    return rc < 0 ? (int)rc : 0;
}

int kmig_memory_clear(struct kmig_memory *memory)
{
    int rc = 0;

    for (uint32_t i = 0; rc == 0 && i < memory->nr_slots; i++)
        rc = slot_clear(memory, i);
    return rc;
}
