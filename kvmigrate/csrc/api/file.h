// Rounds into a snapshot's memory file: page-aligned and sparse, the page of a slot at file offset
// (pages of the slots before it + its index) × 4096.

// All of a round by pwritev; a page that turned zero after it was written is punched out.
int kmig_file_save_round(struct kmig_memory *memory, struct kmig_round *round, int fd);

// Read every page that index marks (bitmap over the file's pages) into memory, hashing as it goes.
int kmig_file_load(struct kmig_memory *memory, int fd, const uint64_t *bitmap);

// Read nr_pages of fd from offset on into memory from gfn on, hashing as it goes. -ENODATA when the file ends before.
int kmig_file_load_range(struct kmig_memory *memory, uint64_t gfn, uint64_t nr_pages, int fd, uint64_t offset);

// Fold the page hashes of each 64 pages of a slot into one word: XXH3-64 of the 64 hashes, 0 where all are 0.
int kmig_file_chunk_hashes(const struct kmig_memory *memory, uint32_t slot_index, uint64_t *ret);
