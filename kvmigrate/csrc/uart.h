// What uart.c (the registers), uart_line.c (the line, the state) and uart_map.c (the state in msgpack) share, and what answer.c has of them.
#ifndef KMIG_UART_H
#define KMIG_UART_H

#include "core.h"

#define KMIG_UART_FIFO_ON 1      // FCR bit 0
#define KMIG_UART_OUT2 8         // MCR, set at power-on
#define KMIG_UART_LOOP 0x10      // MCR
// A guest that looked once may write a FIFO or several.
#define KMIG_UART_TX_READY_BYTES (KMIG_UART_TX_BYTES - 256)

enum kmig_uart_sender { KMIG_SENDER_BUSY, KMIG_SENDER_RESTING, KMIG_SENDER_IDLE };

struct kmig_uart {
    pthread_mutex_t lock;       // guards everything below
    pthread_cond_t changed;     // for the thread in kmig_uart_wait
    struct kmig_uart_state s;   // its tx is a ring of wr - rd bytes; nr_tx is set by get only
    uint32_t rd;
    uint32_t wr;
    uint32_t told;              // the guest was told that the bytes before this one have left
    uint32_t nr_ahead;          // so many of the first bytes in the queue have left already
    bool refused;               // the back-end took no more; the queue is not empty
    bool paused;
    bool quit;
    bool level;
    enum kmig_uart_sender sender;
    uint64_t worked_from_ns;    // CPU time of the sending thread when kmig_uart_wait last came back
    int socket_fd;              // where the back-end sends, -1 where it must do so itself
    int vm_fd;                  // -1: the line is not ours
    uint32_t gsi;
};

static inline uint32_t kmig_uart_nr_waiting(const struct kmig_uart *uart)
{
    return uart->wr - uart->rd;
}

// Whether the guest finds the transmitter empty.
static inline bool kmig_uart_tx_ready(const struct kmig_uart *uart)
{
    return kmig_uart_nr_waiting(uart) == 0 || (!uart->refused && kmig_uart_nr_waiting(uart) <= KMIG_UART_TX_READY_BYTES);
}

static inline uint32_t kmig_uart_rx_room(const struct kmig_uart *uart)
{
    return (uart->s.fcr & KMIG_UART_FIFO_ON ? KMIG_UART_FIFO_BYTES : 1) - uart->s.nr_rx;
}

// Become what was checked; not under the lock.
void kmig_uart_set(struct kmig_uart *uart, const struct kmig_uart_state *state);

// All of these under the lock. Drive the line to `level`; whether it should be high; make it so.
void kmig_uart_drive(const struct kmig_uart *uart);
bool kmig_uart_wants_irq(const struct kmig_uart *uart);
void kmig_uart_update_irq(struct kmig_uart *uart);

// After the queue or `refused` changed; was_ready is what kmig_uart_tx_ready said before.
void kmig_uart_tx_changed(struct kmig_uart *uart, bool was_ready);

// Send the first byte after a silence at once: nobody has to wake up for it, nor to wait for the interpreter.
void kmig_uart_send_first(struct kmig_uart *uart);

// Wake the thread that sends, if there is something for it.
void kmig_uart_wake_sender(struct kmig_uart *uart);

// Make `count` accesses of one byte to the register at `offset`, the bytes read into or written from data. Returns false,
// with nothing done, when somebody outside must have a part in them: the guest clears a FIFO or takes the last place of
// one, or leaves loopback, so that the back-end must be told; or the queue is full, so that it must be waited for.
bool kmig_uart_answer(struct kmig_uart *uart, uint32_t offset, bool is_write, uint8_t *data, uint32_t count);

#endif
