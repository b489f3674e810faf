// What guest RAM is made of: anonymous memory, a memory file, or a file of huge pages that the host has set aside.
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "internal.h"

#define HUGE_PAGE_BYTES (UINT64_C(2) << 20)
#define PIECE_PAGES 512

// As in linux/memfd.h, which cannot be included beside sys/mman.h; the headers may be older than the kernel.
#define HUGE_2MB (21U << 26)
#define NOEXEC_SEAL 8U

static uint64_t bytes_of(const struct kmig_slot *slot)
{
    return slot->nr_pages * KMIG_PAGE_BYTES;
}

// Memory that goes away with its last mapping and descriptor, and whose size nobody can change: a page cut off under a
// mapping kills whoever touches it.
static int create_file(uint64_t size_bytes, unsigned int flags)
{
    flags |= MFD_CLOEXEC | MFD_ALLOW_SEALING;
    int fd = memfd_create("kvmigrate-guest", flags | NOEXEC_SEAL);
    if (fd < 0 && errno == EINVAL) // before Linux 6.3
        fd = memfd_create("kvmigrate-guest", flags);
    if (fd < 0)
        return -errno;
    if (ftruncate(fd, (off_t)size_bytes) < 0 || fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) < 0) {
        int rc = -errno;
        close(fd);
        return rc;
    }
    return fd;
}

void kmig_backend_keep_private(void *at, uint64_t size_bytes)
{
    // Guest RAM in a core dump helps nobody and may be secret.
    madvise(at, size_bytes, MADV_DONTDUMP);
    // A child would share the guest's memory, or have all of it made read-only first, and hold on to it.
    madvise(at, size_bytes, MADV_DONTFORK);
}

// A kernel without transparent huge pages refuses this; memory is then slower to touch and works all the same.
static void want_huge(void *at, uint64_t size_bytes, bool wanted)
{
    madvise(at, size_bytes, wanted ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
}

void kmig_memory_want_huge(struct kmig_memory *memory, int wanted)
{
    for (uint32_t i = 0; i < memory->nr_slots; i++)
        want_huge(memory->slot[i].hva, bytes_of(&memory->slot[i]), wanted);
}

static void advise(void *at, uint64_t size_bytes)
{
    want_huge(at, size_bytes, true);
    kmig_backend_keep_private(at, size_bytes);
}

// Address space for a slot. hva and gpa must agree modulo 2 MiB: only then can KVM map a huge page of the host as one of
// the guest (kvm_mmu_hugepage_adjust and lpage_info in arch/x86/kvm).
static uint8_t *reserve(const struct kmig_slot *slot)
{
    uint64_t size_bytes = bytes_of(slot);
    uint8_t *area = mmap(NULL, size_bytes + HUGE_PAGE_BYTES, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (area == MAP_FAILED)
        return NULL;
    uint64_t head = (slot->base_gfn * KMIG_PAGE_BYTES - (uintptr_t)area) % HUGE_PAGE_BYTES;
    if (head)
        munmap(area, head);
    munmap(area + head + size_bytes, HUGE_PAGE_BYTES - head);
    return area + head;
}

int kmig_backend_map(int backend, struct kmig_slot *slot)
{
    const bool huge = backend == KMIG_BACKEND_HUGETLBFS;

    slot->fd = -1;
    if (huge && (slot->base_gfn * KMIG_PAGE_BYTES % HUGE_PAGE_BYTES || bytes_of(slot) % HUGE_PAGE_BYTES))
        return -EINVAL;
    if (backend != KMIG_BACKEND_ANONYMOUS) {
        int fd = create_file(bytes_of(slot), huge ? MFD_HUGETLB | HUGE_2MB : 0);
        if (fd < 0)
            return fd;
        slot->fd = fd;
    }
    slot->hva = reserve(slot);
    if (!slot->hva)
        return -ENOMEM;
    // Without MAP_NORESERVE this sets the huge pages aside: one that could not be had later would be a SIGBUS.
    if (slot->fd >= 0 &&
        mmap(slot->hva, bytes_of(slot), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, slot->fd, 0) == MAP_FAILED)
        return -errno;
    advise(slot->hva, bytes_of(slot));
    return 0;
}

// What lies in a snapshot's file would come from there again when it is dropped: put empty memory in its place, in one
// piece, since the kernel bounds how many mappings there are.
static int empty_private(struct kmig_slot *slot, uint64_t first, uint64_t end)
{
    uint8_t *at = slot->hva + first * KMIG_PAGE_BYTES;
    uint64_t size_bytes = (end - first) * KMIG_PAGE_BYTES;
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE;

    if (kmig_bits_next(slot->backed, first, end) == end)
        return madvise(at, size_bytes, MADV_DONTNEED) < 0 ? -errno : 0;
    if (mmap(at, size_bytes, PROT_READ | PROT_WRITE, flags, -1, 0) == MAP_FAILED)
        return -errno;
    advise(at, size_bytes);
    for (uint64_t word = first / 64; word < kmig_bits_words(end); word++)
        __atomic_fetch_and(&slot->backed[word], ~kmig_bits_mask(word, first, end), __ATOMIC_RELAXED);
    return 0;
}

// A huge page that is given back is not set aside any more, and may be gone when the guest wants it again: it stays, and
// what it holds is made zero.
static int wipe(struct kmig_memory *memory, struct kmig_slot *slot, uint64_t first, uint64_t end)
{
    for (uint64_t at = first, next; at < end; at = next) {
        uint64_t resident[PIECE_PAGES / 64] = {0};
        next = end - at < PIECE_PAGES ? end : at + PIECE_PAGES;
        int rc = kmig_slot_resident(memory, slot, at, next, resident);
        if (rc < 0)
            return rc;
        for (uint64_t page = at; page < next; page++)
            if (kmig_bits_test(resident, page - at))
                memset(slot->hva + page * KMIG_PAGE_BYTES, 0, KMIG_PAGE_BYTES);
    }
    return 0;
}

int kmig_backend_empty(struct kmig_memory *memory, struct kmig_slot *slot, uint64_t first, uint64_t end)
{
    if (memory->backend == KMIG_BACKEND_HUGETLBFS)
        return wipe(memory, slot, first, end);
    if (memory->backend == KMIG_BACKEND_ANONYMOUS)
        return empty_private(slot, first, end);
    // MADV_DONTNEED would only unmap the file's pages.
    off_t offset = (off_t)(first * KMIG_PAGE_BYTES), size_bytes = (off_t)((end - first) * KMIG_PAGE_BYTES);
    return fallocate(slot->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, size_bytes) < 0 ? -errno : 0;
}
