// The dirty log: what the guest wrote as KVM logs it, and what the VMM wrote, in one bitmap.

#define KMIG_LOG_OFF 0
#define KMIG_LOG_GET 1     // KVM_GET_DIRTY_LOG fetches and clears at once
#define KMIG_LOG_CLEAR 2   // KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: fetched whole, cleared piece by piece before each is copied

// Turn logging on for every slot. The first round takes all resident pages, whatever the log says, and needs no sync.
// -EOPNOTSUPP when the kernel lacks KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 and mode is KMIG_LOG_CLEAR; -EBUSY when it is on.
int kmig_dirty_start(struct kmig_memory *memory, int mode);

// Turn it off and forget what was logged.
int kmig_dirty_stop(struct kmig_memory *memory);

// Start a round: fetch every slot's log, add the VMM's own writes, and make the sum what is pending. Pages still
// pending from an interrupted round stay so. Returns the number of pending pages; of a window that was empty all that is
// resident by now is one of them, written or not.
long kmig_dirty_sync(struct kmig_memory *memory);

// In KMIG_LOG_CLEAR: write-protect again the pages first + n of the slot for which bit n of bitmap is set (n under nr_pages;
// first a multiple of 64, nr_pages too unless it ends the slot), *before* they are copied. In other modes nothing.
int kmig_dirty_clear(struct kmig_memory *memory, uint32_t slot_index, uint64_t first, uint64_t nr_pages,
                     uint64_t *bitmap);
