// A 16550A UART: its registers, the receive FIFO, and the queue of what the guest wrote and the back-end has not taken.
//
// A guest that writes finds the transmitter empty (THRE and TEMT) as long as the queue has room and the back-end takes
// what it is given. Once the back-end refused a byte, the transmitter is full until the queue is empty.

#define KMIG_UART_NR_PORTS 8
#define KMIG_UART_FIFO_BYTES 16
#define KMIG_UART_TX_BYTES 4096
#define KMIG_UART_MAP_BYTES 4352       // the most that a state takes in msgpack

// The bits that there are of these registers.
#define KMIG_UART_IER_BITS 0x0F
#define KMIG_UART_FCR_BITS 0xC9
#define KMIG_UART_MCR_BITS 0x1F
#define KMIG_UART_MSR_DELTA_BITS 0x0F

struct kmig_uart;

// All that a UART is. IIR, LSR, MSR's lines and the interrupt's level follow from it.
struct kmig_uart_state {
    uint16_t divisor;
    uint8_t ier;
    uint8_t fcr;
    uint8_t lcr;
    uint8_t mcr;
    uint8_t msr_delta;
    uint8_t scr;
    uint8_t overrun;
    uint8_t thre_pending;
    uint32_t nr_rx;
    uint32_t nr_tx;
    uint8_t rx[KMIG_UART_FIFO_BYTES];
    uint8_t tx[KMIG_UART_TX_BYTES];
};

// A UART after power-on, paused.
int kmig_uart_create(struct kmig_uart **ret);
void kmig_uart_destroy(struct kmig_uart *uart);

// From now on the UART itself drives the line `gsi` of the VM behind vm_fd. Until then kmig_uart_level is for the caller.
void kmig_uart_connect(struct kmig_uart *uart, int vm_fd, uint32_t gsi);
int kmig_uart_level(struct kmig_uart *uart);

// pack has the same as get, as a msgpack map: returns its size in bytes, or -ENOSPC. load is for a paused UART and takes
// such a map, which is hostile: returns -EINVAL, with nothing changed, for anything that no UART could be. What waits in
// it was refused by a back-end. What pack gives of a running one can be loaded too.
void kmig_uart_get(struct kmig_uart *uart, struct kmig_uart_state *ret);
long kmig_uart_pack(struct kmig_uart *uart, void *out, uint64_t room_bytes);
int kmig_uart_load(struct kmig_uart *uart, const void *in, uint64_t size_bytes);
void kmig_uart_reset(struct kmig_uart *uart);

// Paused, it gives and takes nothing on the line. Resuming drives the interrupt line to its level again: an interrupt
// controller is restored without knowing who drives its pins, and the same level once more is no new edge there.
void kmig_uart_pause(struct kmig_uart *uart);
void kmig_uart_resume(struct kmig_uart *uart);
int kmig_uart_paused(struct kmig_uart *uart);

// The guest's accesses, to one of KMIG_UART_NR_PORTS registers. A byte for which the queue has no room is lost:
// kmig_uart_is_full says whether that would be so.
uint8_t kmig_uart_read(struct kmig_uart *uart, uint32_t offset);
void kmig_uart_write(struct kmig_uart *uart, uint32_t offset, uint8_t value);
int kmig_uart_is_full(struct kmig_uart *uart);

// The line. Input: how many bytes could be taken now, and taking them. Output: a copy of what waits (returns how much),
// and that nr_bytes of it are gone; `refused` says that the back-end took no more for now. Where the back-end's socket is
// known (-1: not any more), the core sends the first byte after a silence: `ahead` says how many of what waits have left.
uint32_t kmig_uart_room(struct kmig_uart *uart);
void kmig_uart_receive(struct kmig_uart *uart, const uint8_t *data, uint32_t nr_bytes);
uint32_t kmig_uart_waiting(struct kmig_uart *uart, uint8_t *ret);
void kmig_uart_sent(struct kmig_uart *uart, uint32_t nr_bytes, int refused);
int kmig_uart_refused(struct kmig_uart *uart);
void kmig_uart_send_to(struct kmig_uart *uart, int socket_fd);
uint32_t kmig_uart_ahead(struct kmig_uart *uart);

// For the thread that sends: wait until bytes wait that the back-end did not refuse. Returns 1, or 0 after
// kmig_uart_quit. It comes back at once for the first byte after a silence, then so seldom that the thread takes a small
// part of a processor's time, or when much waits.
int kmig_uart_wait(struct kmig_uart *uart);
void kmig_uart_quit(struct kmig_uart *uart);
