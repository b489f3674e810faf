// Guest RAM: memory under a handful of slots, and what is known of each page.

#define KMIG_PAGE_BYTES 4096
#define KMIG_MAX_SLOTS 32
// What it is made of. The last two are shared mappings of a memory file of each slot, whose size is sealed.
#define KMIG_BACKEND_ANONYMOUS 0
#define KMIG_BACKEND_MEMFD 1
#define KMIG_BACKEND_HUGETLBFS 2   // huge pages of 2 MiB, set aside for it as long as it exists
// What is cleared in the log, and asked for in the pagemap, at once: few enough pages that not many are written again
// between their clearing and their copying, many enough that the calls cost nothing.
#define KMIG_WINDOW_PAGES 8192

// One memory slot. Page n of a slot is gfn base_gfn + n and bit n of each bitmap; bitmaps have a multiple of 64 bits.
struct kmig_slot {
    uint32_t id;              // KVM's slot number
    int fd;                   // its memory file, -1 for anonymous memory
    uint64_t base_gfn;
    uint64_t nr_pages;
    uint8_t *hva;
    uint64_t *host_dirty;     // written by the VMM since the last sync
    uint64_t *host_windows;   // bit n: host_dirty may have bits in window n, KMIG_WINDOW_PAGES pages long
    uint64_t *backed;         // content lies in a file mapped under the slot, touched or not
    uint64_t *pending;        // to be copied in this round
    uint64_t *pending_windows; // bit n: pending may have bits in window n; where it is 0, it has none
    uint64_t *empty_windows;  // bit n: nothing was resident in window n; KVM's log says nothing of it, the page map does
    uint64_t *log;            // what KVM's log said at the last sync
    uint64_t *hash;           // per page: XXH3-64 as last copied out or in; 0 for a zero page
};

struct kmig_cursor;

struct kmig_memory {
    uint32_t nr_slots;
    int log_mode;             // KMIG_LOG_OFF, …
    int vm_fd;                // -1 without a VM: then only host writes are logged
    int pagemap_fd;
    int no_pagemap_scan;      // 1: the kernel has no PAGEMAP_SCAN (before Linux 6.7)
    int backend;              // KMIG_BACKEND_ANONYMOUS, …
    struct kmig_cursor *cursor; // where the round stands that is under way
    uint64_t digest;          // sum over all pages of a mix of gfn and hash, kept up to date with every hash
    uint64_t nr_hashed;       // pages whose hash is not 0
    struct kmig_slot slot[KMIG_MAX_SLOTS];
};

int kmig_memory_create(int backend, struct kmig_memory **ret);
void kmig_memory_destroy(struct kmig_memory *memory);

// Map nr_pages of empty memory (MADV_HUGEPAGE; of huge pages all are set aside) and describe them as the next slot. Slots
// are added by rising gfn, before kmig_memory_attach tells KVM of them. -ENOMEM when too few huge pages are free; -EINVAL
// for a slot that is not made of whole ones.
int kmig_memory_add(struct kmig_memory *memory, uint32_t id, uint64_t base_gfn, uint64_t nr_pages);

// KVM_SET_USER_MEMORY_REGION for every slot.
int kmig_memory_attach(struct kmig_memory *memory, int vm_fd);

// Map nr_pages of fd at offset privately over the slot's pages from gfn on, and mark them backed. -EOPNOTSUPP where memory
// is not anonymous: what is to be shared, or huge, would not be any more.
int kmig_memory_map_file(struct kmig_memory *memory, uint64_t gfn, uint64_t nr_pages, int fd, uint64_t offset);

// Copy out of or into guest memory, across slots; -EFAULT when a byte lies outside of RAM, and then nothing was written.
// A write marks host_dirty *after* the bytes are there: a sync between both sees the page in its next round.
int kmig_memory_read(struct kmig_memory *memory, uint64_t gpa, void *data, uint64_t size_bytes);
int kmig_memory_write(struct kmig_memory *memory, uint64_t gpa, const void *data, uint64_t size_bytes);

// Set bit n of bitmap for each page first + n of the slot (first a multiple of 64, n under nr_pages) that may hold
// anything but zeros: present or swapped out as the kernel's pagemap says, or its file, or backed. Reads no page. Returns
// how many.
long kmig_memory_resident(struct kmig_memory *memory, uint32_t slot_index, uint64_t first, uint64_t nr_pages,
                          uint64_t *bitmap);

// The same as runs of whole huge pages by rising gfn, up to most of them: the first gfn and the number of pages of each,
// one after the other, in runs (2 × most words). Returns how many runs.
long kmig_memory_resident_runs(struct kmig_memory *memory, uint64_t *runs, uint64_t most);

// Touch nr_pages from gfn on so that they take no fault later.
int kmig_memory_prefault(struct kmig_memory *memory, uint64_t gfn, uint64_t nr_pages);

// Whether what is touched from now on becomes huge pages, where the host has them for the asking. At first it does.
void kmig_memory_want_huge(struct kmig_memory *memory, int wanted);

// Make all of RAM zero by giving its pages back, those of a mapped file too, and mark host_dirty what held anything: rounds
// that are under way send it again. Huge pages that were set aside are kept and written over. No vCPU and no device may
// write meanwhile. After an error RAM may be cleared in part.
int kmig_memory_clear(struct kmig_memory *memory);

// XXH3-64 of every page of a slot as it is now into hashes (nr_pages words), 0 for a zero or untouched page. For tests.
int kmig_memory_hash_all(struct kmig_memory *memory, uint32_t slot_index, uint64_t *hashes);

// XXH3-64 of any bytes.
uint64_t kmig_hash(const void *data, size_t size_bytes);
