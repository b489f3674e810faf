// A network device (virtio 1.2, 5.1) before a tap.

// Bits of the configuration's status (5.1.4).
#define KMIG_NET_S_LINK_UP 1
#define KMIG_NET_S_ANNOUNCE 2

#define KMIG_NET_RX 0
#define KMIG_NET_TX 1
#define KMIG_NET_CTRL 2
#define KMIG_NET_NR_QUEUES 3

// What lies behind a network device.
struct kmig_virtio_net {
    int fd;                    // a tap, non-blocking, each packet behind a virtio_net_hdr of 12 bytes
    int timer_fd;              // when to tell the network once more where the guest is
    uint32_t status;           // KMIG_NET_S_…, changed atomically
    uint32_t nr_announce;      // how often still
    uint8_t mac[6];
    uint8_t reserved[2];
    uint64_t nr_received;      // counters, for who looks
    uint64_t nr_sent;
    uint64_t nr_dropped;       // either way: the tap or the guest could not take it
};

// fd stays its owner's; the timer is the device's own.
int kmig_virtio_net_create(int fd, const uint8_t *mac, struct kmig_virtio_net **ret);
void kmig_virtio_net_destroy(struct kmig_virtio_net *net);

// The body of the device's thread. Returns 0 after kmig_virtio_quit, or -errno.
int kmig_virtio_net_serve(struct kmig_virtio *device, struct kmig_virtio_net *net);

// The guest has moved: have its driver announce itself (5.1.6.5.4) when it knows how, and the device's thread send a few
// RARP requests in its name, for the switches that must learn where it is now. Returns at once, 0 or -errno.
int kmig_virtio_net_announce(struct kmig_virtio *device, struct kmig_virtio_net *net);
