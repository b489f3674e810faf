// The block device (virtio 1.2, 5.2): the thread that reads and writes an image straight out of and into guest memory.
#include <fcntl.h>
#include <linux/virtio_blk.h>
#include <string.h>
#include <unistd.h>

#include "internal.h"
#include "virtq.h"

#define SECTOR_BYTES 512
#define HEADER_BYTES 16
#define MAX_SEGMENTS 16
#define MAX_ZERO_SECTORS 32768    // 16 MiB: what has to be written out where the file system cannot zero a range
#define MAX_DISCARD_SECTORS 4194304

_Static_assert(sizeof(struct virtio_blk_outhdr) == HEADER_BYTES, "5.2.6");

struct request {
    const struct kmig_chain *chain;
    uint32_t type;
    uint64_t sector;
};

static bool in_bounds(const struct kmig_virtio_blk *disk, uint64_t sector, uint64_t nr_sectors)
{
    return sector <= disk->nr_sectors && nr_sectors <= disk->nr_sectors - sector;
}

// Take size_bytes off the front of nr iovecs; returns how many iovecs are used up.
static uint32_t advance(struct iovec *iov, uint32_t nr, size_t size_bytes)
{
    uint32_t i = 0;

    for (; i < nr && size_bytes >= iov[i].iov_len; i++)
        size_bytes -= iov[i].iov_len;
    if (i < nr) {
        iov[i].iov_base = (uint8_t *)iov[i].iov_base + size_bytes;
        iov[i].iov_len -= size_bytes;
    }
    return i;
}

// The guest learns only that its request failed; why is for whoever looks after the host.
static uint8_t host_failed(struct kmig_virtio_blk *disk, int error)
{
    disk->host_error = error;
    return VIRTIO_BLK_S_IOERR;
}

// All of nr iovecs to or from the file at offset.
static uint8_t transfer(struct kmig_virtio_blk *disk, struct iovec *iov, uint32_t nr, uint64_t offset, bool write)
{
    while (nr) {
        ssize_t got = write ? pwritev(disk->fd, iov, (int)nr, (off_t)offset)
                            : preadv(disk->fd, iov, (int)nr, (off_t)offset);
        if (got < 0 && errno == EINTR)
            continue;
        // 0: the file ends before the capacity that the guest was told.
        if (got <= 0)
            return host_failed(disk, got < 0 ? errno : ENODATA);
        uint32_t used_up = advance(iov, nr, (size_t)got);
        iov += used_up;
        nr -= used_up;
        offset += (uint64_t)got;
    }
    return VIRTIO_BLK_S_OK;
}

// A file that shrank would grow again by a write behind its end, and show zeros where the guest had its data.
static bool has_shrunk(int fd, uint64_t end)
{
    off_t size = lseek(fd, 0, SEEK_END);
    return size < 0 || (uint64_t)size < end;
}

static uint8_t read_write(struct kmig_virtio_blk *disk, const struct request *request)
{
    const struct kmig_chain *chain = request->chain;
    bool write = request->type == VIRTIO_BLK_T_OUT;
    const struct iovec *from = write ? chain->iov : chain->iov + chain->nr_out;
    uint64_t size_bytes = write ? chain->out_bytes - HEADER_BYTES : chain->in_bytes - 1;
    struct iovec iov[KMIG_VIRTQ_MAX_IOV];

    if (size_bytes % SECTOR_BYTES || !in_bounds(disk, request->sector, size_bytes / SECTOR_BYTES))
        return VIRTIO_BLK_S_IOERR;
    uint64_t offset = request->sector * SECTOR_BYTES;
    if (write && disk->read_only)
        return VIRTIO_BLK_S_IOERR;
    if (write && has_shrunk(disk->fd, offset + size_bytes))
        return host_failed(disk, ENODATA);
    uint32_t nr = kmig_iov_slice(from, write ? chain->nr_out : chain->nr_in, write ? HEADER_BYTES : 0, size_bytes, iov);
    return transfer(disk, iov, nr, offset, write);
}

static int change_range(int fd, int mode, uint64_t offset, uint64_t size_bytes)
{
    int rc;
    do
        rc = fallocate(fd, mode | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)size_bytes);
    while (rc < 0 && errno == EINTR);
    return rc < 0 ? -errno : 0;
}

static uint8_t write_zeros(struct kmig_virtio_blk *disk, uint64_t offset, uint64_t size_bytes)
{
    static const uint8_t zeros[65536];

    while (size_bytes) {
        struct iovec iov = {(void *)zeros, size_bytes < sizeof(zeros) ? size_bytes : sizeof(zeros)};
        uint64_t part = iov.iov_len;
        if (transfer(disk, &iov, 1, offset, true) != VIRTIO_BLK_S_OK)
            return VIRTIO_BLK_S_IOERR;
        offset += part;
        size_bytes -= part;
    }
    return VIRTIO_BLK_S_OK;
}

// One segment of a discard or of a write of zeros (5.2.6). To discard is a hint: what the file system cannot do is done.
static uint8_t clear_segment(struct kmig_virtio_blk *disk, bool discard,
                             const struct virtio_blk_discard_write_zeroes *segment)
{
    uint64_t sector = segment->sector, nr = segment->num_sectors;
    uint64_t offset = sector * SECTOR_BYTES, size_bytes = nr * SECTOR_BYTES;
    bool unmap = segment->flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;

    if (segment->flags & ~(discard ? 0u : VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP))
        return VIRTIO_BLK_S_UNSUPP;
    if (!in_bounds(disk, sector, nr) || nr > (discard ? MAX_DISCARD_SECTORS : MAX_ZERO_SECTORS))
        return VIRTIO_BLK_S_IOERR;
    if (!nr)
        return VIRTIO_BLK_S_OK;
    if (has_shrunk(disk->fd, offset + size_bytes))
        return host_failed(disk, ENODATA);
    int mode = discard || unmap ? FALLOC_FL_PUNCH_HOLE : FALLOC_FL_ZERO_RANGE;
    int rc = change_range(disk->fd, mode, offset, size_bytes);
    if (rc != -EOPNOTSUPP)
        return rc ? host_failed(disk, -rc) : VIRTIO_BLK_S_OK;
    return discard ? VIRTIO_BLK_S_OK : write_zeros(disk, offset, size_bytes);
}

static uint8_t clear(struct kmig_virtio_blk *disk, const struct request *request)
{
    const struct kmig_chain *chain = request->chain;
    struct virtio_blk_discard_write_zeroes segment[MAX_SEGMENTS];
    uint64_t size_bytes = chain->out_bytes - HEADER_BYTES;
    uint8_t status = VIRTIO_BLK_S_OK;

    if (!disk->can_discard)
        return VIRTIO_BLK_S_UNSUPP;
    if (disk->read_only || size_bytes % sizeof(*segment) || size_bytes > sizeof(segment))
        return VIRTIO_BLK_S_IOERR;
    kmig_iov_read(chain->iov, chain->nr_out, HEADER_BYTES, segment, size_bytes);
    for (uint64_t i = 0; i < size_bytes / sizeof(*segment) && status == VIRTIO_BLK_S_OK; i++)
        status = clear_segment(disk, request->type == VIRTIO_BLK_T_DISCARD, &segment[i]);
    return status;
}

static uint8_t get_id(const struct kmig_virtio_blk *disk, const struct kmig_chain *chain)
{
    uint64_t room = chain->in_bytes - 1;

    if (room < sizeof(disk->id))
        return VIRTIO_BLK_S_IOERR;
    kmig_iov_write(chain->iov + chain->nr_out, chain->nr_in, 0, disk->id, sizeof(disk->id));
    return VIRTIO_BLK_S_OK;
}

static uint8_t handle(struct kmig_virtio_blk *disk, const struct request *request)
{
    switch (request->type) {
    case VIRTIO_BLK_T_IN:
    case VIRTIO_BLK_T_OUT:
        return read_write(disk, request);
    case VIRTIO_BLK_T_FLUSH:
        return fdatasync(disk->fd) < 0 ? host_failed(disk, errno) : VIRTIO_BLK_S_OK;
    case VIRTIO_BLK_T_GET_ID:
        return get_id(disk, request->chain);
    case VIRTIO_BLK_T_DISCARD:
    case VIRTIO_BLK_T_WRITE_ZEROES:
        return clear(disk, request);
    default:
        return VIRTIO_BLK_S_UNSUPP;
    }
}

// How the driver cuts a request into buffers is its own affair (5.2.6, 2.7.4.1): a header of 16 bytes begins what it
// wrote, a status byte ends what we may write.
static void serve_one(struct kmig_virtio *device, struct kmig_virtio_blk *disk, const struct kmig_chain *chain)
{
    struct virtio_blk_outhdr header;

    if (chain->out_bytes < HEADER_BYTES || !chain->in_bytes) {
        kmig_virtio_break(device);
        return;
    }
    kmig_iov_read(chain->iov, chain->nr_out, 0, &header, sizeof(header));
    struct request request = {chain, header.type, header.sector};
    uint8_t status = handle(disk, &request);
    kmig_iov_write(chain->iov + chain->nr_out, chain->nr_in, chain->in_bytes - 1, &status, 1);
    kmig_count(&disk->nr_requests, 1);
    kmig_count(&disk->nr_errors, status != VIRTIO_BLK_S_OK);
    // All of it counts as written: a read that failed may have written any part.
    kmig_virtq_push(device, 0, chain, (uint32_t)chain->in_bytes);
    kmig_virtq_notify(device, 0);
}

int kmig_virtio_blk_serve(struct kmig_virtio *device, struct kmig_virtio_blk *disk)
{
    struct kmig_chain chain;
    int error = disk->host_error;
    uint32_t queues;
    int rc = 1;

    // To leave while the queue holds requests would be to wait for a kick that has been.
    while (disk->host_error == error && (rc = kmig_virtio_wait(device, NULL, 0, &queues)) > 0)
        while (!kmig_virtio_wanted(device) && kmig_virtq_pop(device, 0, &chain) > 0)
            serve_one(device, disk, &chain);
    return rc;
}
