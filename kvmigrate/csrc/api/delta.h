// Pages as they were last sent, a bounded number of them, so that a page that is sent again goes as what changed in it.
//
// A page of a KMIG_RUN_DELTA run goes as the XOR of its new and its last content. The receiver keeps nothing: the last
// content is its own memory. That it is what the sender takes it for is checked before a byte is written: the frame holds
// the sum of the digest terms (csrc/hash.h) of the old pages, which must be that of the pages as they lie there.

struct kmig_delta;

// Room for pages and what is known of them in size_bytes, taken as it is used. -EINVAL under 64 KiB, -ENOMEM.
int kmig_delta_create(uint64_t size_bytes, struct kmig_delta **ret);
void kmig_delta_destroy(struct kmig_delta *delta);
